"""On a real GPU: bits repeat, they do not depend on how many clients train at once, and they are the CPU's but for rounding."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_devices
import torch
from alone import Alone
from torch import Tensor, nn

from feddip_mpi import config, errors, federation, graphs, rounds, runtime, staging
from feddip_mpi.local import LocalTrainer
from feddip_mpi.models.dropout import Dropout
from feddip_mpi.schedules import plan_round

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
VARIANTS = next(
    mark for mark in test_devices.test_a_run_on_a_gpu_is_one_on_the_cpu.pytestmark if mark.name == "parametrize"
).args[1]


@pytest.fixture(autouse=True)
def prepared() -> Iterator[None]:
    """As a rank prepares torch; afterwards as it was."""
    before = torch.get_num_threads()
    assert runtime.prepare_torch(config.validate({"device": "cuda"}), 0) == GPU
    yield
    torch.set_deterministic_debug_mode("default")
    torch.set_num_threads(before)


def differing(one: list[Any], other: list[Any]) -> list[int]:
    assert len(one) == len(other)
    return [place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]


@pytest.mark.parametrize("values", VARIANTS, ids=str)
def test_bits_repeat(values: dict[str, Any]) -> None:
    if values.get("upload", {}).get("entropy"):
        pytest.importorskip("zstandard")
    once = test_devices.run(GPU, **values)
    assert not differing(once, test_devices.run(GPU, **values))


@pytest.mark.parametrize("values", VARIANTS, ids=str)
def test_a_run_is_the_cpus_but_for_rounding(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without dropout, whose random numbers are the device's. A weight at the edge of a mask may be in it on one side."""
    if values.get("upload", {}).get("entropy"):
        pytest.importorskip("zstandard")
    monkeypatch.setattr(Dropout, "forward", lambda self, x: x)
    here, there = (test_devices.run(place, **values) for place in (CPU, GPU))
    ours, theirs = (np.frombuffer(found[0], np.float32) for found in (here, there))
    masks = [np.frombuffer(found[1], np.bool_) for found in (here, there)]
    distance, agreement = np.linalg.norm(ours - theirs) / np.linalg.norm(ours), (masks[0] == masks[1]).mean()
    assert distance < 0.05 and agreement > 0.98, (distance, agreement)
    losses = [found[-2][::6] for found in (here, there)]  # of each round six numbers, this first
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every recording."""
    capture, seen = graphs.capture, list[int]()

    def counted(*arguments: Any) -> Any:
        done = capture(*arguments)
        seen.append(1)
        return done

    monkeypatch.setattr(graphs, "capture", counted)
    return seen


@pytest.mark.parametrize("values", [
    {}, {"penalty": {"norm": "l1"}}, {"penalty": {"norm": "l2_squared", "maximum": 0.1}}, {"feedback": False},
    {"method": "fedprox", "proximal": 0.5}, {"method": "fedavg"}, {"method": "snip"}, {"precision": "bf16"},
    {"precision": "tf32"},
    {"data": {"name": "synthetic", "augment": "standard", "synthetic": test_devices.SMALL}},
], ids=str)  # fmt: skip
def test_recorded_steps_change_no_bit(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"local_epochs": 5, "batch_size": 6, "rounds": 3, **values}
    runtime.prepare_torch(config.validate({"device": "cuda", "precision": values.get("precision", "fp32")}), 0)
    seen = counting(monkeypatch)
    plain = test_devices.run(GPU, cuda_graphs="off", **values)
    assert not seen
    recorded = test_devices.run(GPU, cuda_graphs="on", **values)
    assert len(seen) >= 2
    assert not differing(plain, recorded)


# Clients of all sizes, a dense beginning, masks, a penalty: more forms than places, and recordings that make room.
UNEQUAL: dict[str, Any] = {
    "rounds": 8, "clients": 30, "participants": 8, "local_epochs": 5, "batch_size": 12,
    "mask": {"initial": "none", "every": 3, "freeze_after": 1.0}, "penalty": {"maximum": 0.01, "steps": 4},
    "data": {
        "name": "synthetic", "partition": "dirichlet", "alpha": 0.5,
        "synthetic": {**test_devices.SMALL, "train_samples": 600},
    },
}  # fmt: skip


def test_recordings_that_make_room_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three places only: recordings come and go, and come again."""
    plain = test_devices.run(GPU, cuda_graphs="off", **UNEQUAL)
    record, forms = graphs.Recorder._record, []

    def counted(self: graphs.Recorder, form: Any, *rest: Any) -> Any:
        forms.append(form)
        return record(self, form, *rest)

    monkeypatch.setattr(graphs.Recorder, "_record", counted)
    monkeypatch.setattr(graphs, "_MOST", 3)
    assert not differing(plain, test_devices.run(GPU, cuda_graphs="on", **UNEQUAL))
    assert len(set(forms)) > 10 and len(forms) > len(set(forms))


def test_a_step_that_has_no_memory_to_be_recorded_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real allocation that fails, in the middle of the fourth recording."""
    plain = test_devices.run(GPU, cuda_graphs="off", **UNEQUAL)
    seen, backward, failed = counting(monkeypatch), LocalTrainer._backward, []

    def full(self: LocalTrainer, *batch: Tensor) -> Any:
        if torch.cuda.is_current_stream_capturing() and len(seen) == 3 and not failed:
            failed.append(1)
            torch.empty(2**50, dtype=torch.uint8, device=GPU)
        return backward(self, *batch)

    monkeypatch.setattr(LocalTrainer, "_backward", full)
    assert not differing(plain, test_devices.run(GPU, cuda_graphs="on", **UNEQUAL))
    assert failed and len(seen) > 10


def test_a_client_that_had_no_memory_beside_recordings_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU is full once there are six recordings; they then give their memory back."""
    plain = test_devices.run(GPU, cuda_graphs="off", **UNEQUAL)
    backward, given_back = LocalTrainer._backward, []

    def full(self: LocalTrainer, *batch: Tensor) -> Any:
        if self.recorder is not None and self.recorder.recorded > 5:
            given_back.append(self.recorder.recorded)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return backward(self, *batch)

    monkeypatch.setattr(LocalTrainer, "_backward", full)
    assert not differing(plain, test_devices.run(GPU, cuda_graphs="on", **UNEQUAL)) and given_back == [6]


@pytest.mark.parametrize("name", ["lenet5", "alexnet", "resnet18", "vgg11"])
def test_recorded_steps_of_our_networks_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {
        "name": "synthetic",
        "synthetic": {"shape": [3, 32, 32], "classes": 10, "train_samples": 120, "test_samples": 20},
    }
    seen = counting(monkeypatch)
    common = {"model": {"name": name}, "data": data, "local_epochs": 4, "batch_size": 16}
    plain = test_devices.run(GPU, cuda_graphs="off", **common)
    assert not seen and not differing(plain, test_devices.run(GPU, cuda_graphs="on", **common)) and len(seen) >= 2


class Waiting(test_devices.Net):
    """Cannot be recorded: its forward pass waits for the GPU."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * min(2.0, 1.0 + abs(float(x.mean()))))


def test_what_cannot_be_recorded_ends_the_run() -> None:
    """In a process of its own: torch is in no state to go on."""
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import test_gpu, test_devices\n"
        "try: test_devices.run(test_gpu.GPU, cuda_graphs='on', model={'name': 'test_gpu:Waiting'}, local_epochs=5)\n"
        "except test_gpu.errors.InputError as error: print(error)"
    )
    folder = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", script, folder], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("cuda_graphs: a client's step cannot be recorded ("), done
    assert "captur" in done.stdout and done.stdout.endswith("cuda_graphs=off, which changes no bit\n"), done


@pytest.mark.parametrize("at_once", [2, 4])
def test_clients_at_once_change_no_bit(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other they are recorded, at once they are not."""
    seen = counting(monkeypatch)
    for values in ({}, {"method": "sparsyfed"}, {"method": "prunefl"}, {"method": "prunetrain"}):
        values = {"clients": 4, "participants": 4, "local_epochs": 3, "cuda_graphs": "on", **values}
        one, recorded = test_devices.run(GPU, **values), len(seen)
        assert not differing(one, test_devices.run(GPU, clients_at_once=at_once, **values)), values
        assert len(seen) == recorded
    assert seen


def test_what_leaves_the_gpu_is_there_when_the_host_reads_it() -> None:
    raw = np.random.default_rng(0).integers(0, 256, 50_000_000, dtype=np.uint8)
    data = staging.to_device(raw, GPU)
    assert data.device == GPU
    for first in (0, 7, 49_999_999, 50_000_000):
        assert np.array_equal(staging.to_host(data[first:]), raw[first:])
    for number in range(20):  # what made it is waited for
        product = torch.full((3000, 3000), float(number), device=GPU) @ torch.ones(3000, 3000, device=GPU)
        host = staging.to_host(product.view(torch.uint8).reshape(-1)).view(np.float32)
        assert (host == 3000.0 * number).all()


def test_tf32_is_off_unless_asked_for() -> None:
    one, other = torch.randn(512, 512, device=GPU), torch.randn(512, 512, device=GPU)
    exact = one.double() @ other.double()

    def error() -> float:
        return float(((one @ other).double() - exact).norm() / exact.norm())

    assert error() < 2e-6
    runtime.prepare_torch(config.validate({"device": "cuda", "precision": "tf32"}), 0)
    assert 1e-5 < error() < 1e-2
    runtime.prepare_torch(config.validate({"device": "cuda", "precision": "fp32"}), 0)
    assert error() < 2e-6


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_precisions_learn_and_repeat(precision: str) -> None:
    values = {"precision": precision}
    runtime.prepare_torch(config.validate({"device": "cuda", **values}), 0)
    once = test_devices.run(GPU, **values)
    assert not differing(once, test_devices.run(GPU, **values))
    runtime.prepare_torch(config.validate({"device": "cuda"}), 0)
    assert differing(once, test_devices.run(GPU))


class Pooling(nn.Module):
    """Its backward pass has no deterministic form on a GPU."""

    def __init__(self, in_channels: int, image_size: tuple[int, int], classes: int) -> None:
        super().__init__()
        self.conv, self.pool, self.out = nn.Conv2d(in_channels, 4, 3), nn.AdaptiveAvgPool2d(3), nn.Linear(36, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.pool(self.conv(x)).flatten(1))


def one_round(model: str, **values: Any) -> dict[str, Any]:
    settings = {
        "rounds": 1, "clients": 2, "participants": 2, "local_epochs": 1, "batch_size": 8, "model": {"name": model},
        "data": {"name": "synthetic", "synthetic": test_devices.SMALL}, **values,
    }  # fmt: skip
    chosen = config.validate(settings)
    built = federation.build(chosen, Alone(), runtime.prepare_torch(chosen, 0))
    return rounds.play(built, rounds.initial_state(built), plan_round(chosen, 0))


def test_a_layer_that_cannot_repeat_its_bits_is_named() -> None:
    with pytest.raises(errors.InputError, match="deterministic: got on.*adaptive_avg_pool2d.*deterministic=off"):
        one_round(f"{__name__}:Pooling")
    assert one_round(f"{__name__}:Pooling", deterministic=False)["round"] == 1


def test_a_share_of_the_memory_is_kept() -> None:
    try:
        runtime.prepare_torch(config.validate({"device": "cuda", "memory_fraction": 0.05}), 0)
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(GPU).total_memory
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(int(0.1 * total), dtype=torch.uint8, device=GPU)
        torch.empty(int(0.01 * total), dtype=torch.uint8, device=GPU)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)


def test_memory_of_the_gpu_is_told() -> None:
    record = one_round(f"{test_devices.__name__}:Net")
    assert record["device_memory_bytes"] > 0
    assert record["train_seconds"] > 0
