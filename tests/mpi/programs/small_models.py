"""Networks of a few hundred weights, by import path; some break on request, to see how a run ends.

FEDDIP_TEST_FAULT = KIND:RANK:CALL makes rank RANK (or all) fail in its CALL-th training forward (or frame):
    raise   the forward raises RuntimeError
    nan     the forward returns NaN
    exit    the forward calls sys.exit(0)
    hang    the forward does not return
    decode  reading a frame raises PeerError
    begin   (rank and call count as for decode) beginning a checkpoint raises OSError
    save    (likewise) finishing a checkpoint, behind training, raises OSError
    finish  writing finished.json raises OSError (whatever CALL is)
    load, restore, linger   reading the data (`slow_to_load`), reading a checkpoint's residuals, writing finished.json
            does not return (whatever CALL is)
FEDDIP_TEST_MUTE: stderr of all ranks is a full disk.
FEDDIP_TEST_SLEEP: seconds that every training forward takes longer, for signals that have to hit a run.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from feddip_mpi import checkpoint, codec
from feddip_mpi.data import Dataset, synthetic
from feddip_mpi.errors import PeerError
from feddip_mpi.models.dropout import Dropout
from feddip_mpi.settings import DataConfig


class Normalised(nn.Module):
    """Convolutions with batch norm, whose statistics have to travel and to be averaged."""

    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.AvgPool2d(2),  # not adaptive: GPUs
        )  # fmt: skip
        self.head = nn.Linear(48, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).flatten(1))


def normalised(in_channels: int, image_size: tuple[int, int], classes: int) -> nn.Module:
    return Normalised(in_channels, classes)


class Dropping(nn.Module):
    """A classifier whose forward draws random numbers, in training, from torch, Python and numpy."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(inputs, 16), nn.Dropout(0.5), nn.Linear(16, classes)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            images = images * random.uniform(0.9, 1.1) + 0.1 * np.random.standard_normal()  # noqa: NPY002
        return self.second(self.drop(torch.relu(self.first(images.flatten(1)))))


def dropping(in_channels: int, image_size: tuple[int, int], classes: int) -> nn.Module:
    return Dropping(in_channels * image_size[0] * image_size[1], classes)


class SideBySide(nn.Module):
    """Has batch norm, and a dropout that clients may train with at once; sleeps as FEDDIP_TEST_SLEEP says."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, 16), nn.BatchNorm1d(16), nn.ReLU(), Dropout(0.5))
        self.head = nn.Linear(16, classes)
        self.pause = float(os.environ.get("FEDDIP_TEST_SLEEP", "0"))

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            time.sleep(self.pause)
        return self.head(self.body(images.flatten(1)))


def side_by_side(in_channels: int, image_size: tuple[int, int], classes: int) -> nn.Module:
    return SideBySide(in_channels * image_size[0] * image_size[1], classes)


class Pair(Dropping):
    """Returns more than the logits, as some networks do in training."""

    def forward(self, images: Tensor) -> Any:
        return super().forward(images), images


def pair(in_channels: int, image_size: tuple[int, int], classes: int) -> nn.Module:
    return Pair(in_channels * image_size[0] * image_size[1], classes)


class Fragile(nn.Module):
    """A linear classifier that does what FEDDIP_TEST_FAULT and FEDDIP_TEST_SLEEP say."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, 16), nn.Linear(16, classes)
        self.calls = 0
        self.pause = float(os.environ.get("FEDDIP_TEST_SLEEP", "0"))
        self.kind, self.call = _fault()
        if "FEDDIP_TEST_MUTE" in os.environ:
            os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
        if self.kind == "decode":
            codec.read = _failing(codec.read, self.call, PeerError("a frame that this test broke"))
        if self.kind in ("begin", "save"):
            draft, name = checkpoint.hdf5.Draft, "finish" if self.kind == "save" else "__init__"
            setattr(draft, name, _failing(getattr(draft, name), self.call, OSError(28, "No space left on device")))

        if self.kind in ("finish", "linger"):
            fail = _no_space if self.kind == "finish" else _hang
            checkpoint.hdf5.write_text = _breaking(checkpoint.hdf5.write_text, "finished.json", fail)
        if self.kind == "restore":
            checkpoint.residual_rounds = _hang

    def forward(self, images: Tensor) -> Tensor:
        logits = self.second(torch.relu(self.first(images.flatten(1))))
        if not self.training:
            return logits
        time.sleep(self.pause)
        self.calls += 1
        if self.calls == self.call:
            if self.kind == "raise":
                raise RuntimeError("this test's model breaks")
            if self.kind == "exit":
                sys.exit(0)
            if self.kind == "hang":
                _hang()
            if self.kind == "nan":
                return logits * float("nan")
        return logits


def fragile(in_channels: int, image_size: tuple[int, int], classes: int) -> nn.Module:
    return Fragile(in_channels * image_size[0] * image_size[1], classes)


def of_its_rank(in_channels: int, image_size: tuple[int, int], classes: int) -> nn.Module:
    """A network whose first weights differ between the ranks that make it."""
    made = fragile(in_channels, image_size, classes)
    with torch.no_grad():
        next(made.parameters()).view(-1)[0] = float(_own_rank())
    return made


def _fault() -> tuple[str, int]:
    """The kind of fault and the call that has it; ("", 0) on ranks without one."""
    kind, _, rest = os.environ.get("FEDDIP_TEST_FAULT", "::").partition(":")
    rank, _, call = rest.partition(":")
    return (kind, int(call)) if kind and rank in (_own_rank(), "all") else ("", 0)


def _own_rank() -> str:
    return os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0"))


def one_pixel_each(config: DataConfig, seed: int) -> Dataset:
    """Synthetic data of which one pixel differs between the ranks that read it."""
    dataset = synthetic.generate(config.synthetic, seed)
    dataset.test_images[-1, -1, -1, -1] = int(_own_rank())
    return dataset


def slow_to_load(config: DataConfig, seed: int) -> Dataset:
    """Synthetic data, as FEDDIP_TEST_FAULT says."""
    if _fault()[0] == "load":
        _hang()
    return synthetic.generate(config.synthetic, seed)


def _hang(*_: Any) -> None:
    time.sleep(1e6)


def _no_space(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def _breaking(write: Any, name: str, fail: Any) -> Any:
    def wrapped(path: Path, text: str) -> None:
        if path.name == name:
            fail()
        write(path, text)

    return wrapped


def _failing(function: Any, call: int, error: Exception) -> Any:
    calls = 0

    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return function(*arguments, **named)

    return wrapped
