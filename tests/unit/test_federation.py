"""What a rank gets before its first round."""

from __future__ import annotations

import re
import zlib
from collections.abc import Collection
from typing import Any

import numpy as np
import pytest
import torch
from together import Together, together
from torch import Tensor, nn

from feddip_mpi import config, data, evaluate, federation
from feddip_mpi.data.partition import Partition
from feddip_mpi.errors import FeddipError, InputError, PeerError
from feddip_mpi.federation import Federation


class OneRank:
    """The communicator of a job of one rank, as far as building needs it."""

    rank, size, node_rank = 0, 1, 0

    def check(self, error: FeddipError | None) -> None:
        if error is not None:
            raise error

    def gather(self, row: np.ndarray) -> np.ndarray:
        return row[None].copy()

    def node_broadcast(self, value: Any) -> Any:
        return value

    def shared_arrays(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(arrays)


def split(**values: Any) -> dict[str, Any]:
    shape = {"shape": [3, 12, 12], "train_samples": 60, "test_samples": 20}
    return {"name": "synthetic", "synthetic": shape, **values}


def build(model: str, **values: Any) -> Federation:
    settings = {
        "clients": 4, "participants": 2, "local_epochs": 1, "batch_size": 8, "model": {"name": model},
        "data": split(),
    }  # fmt: skip
    return federation.build(config.validate({**settings, **values}), OneRank(), torch.device("cpu"))


def test_more_weights_than_places_can_name_are_refused_before_the_first_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federation.indices, "MAX_SIZE", 1000)
    with pytest.raises(InputError, match=r"model\.name: lenet5 has \d+ prunable weights; allowed: up to 1000"):
        build("lenet5")


class Peer(OneRank):
    """Rank 5 of 7, the second rank of its node; the other ranks have the data that `found` says."""

    rank, size, node_rank = 5, 7, 1

    def __init__(self, found: list[str]) -> None:
        self.found = found

    def node_broadcast(self, value: Any) -> Any:
        assert value is None, "one rank of a node reads all bytes of the data, not each of them"
        return self.found[self.rank]

    def gather(self, row: np.ndarray) -> np.ndarray:
        if row == float(zlib.crc32(self.found[self.rank].encode())):
            return np.array([[float(zlib.crc32(text.encode()))] for text in self.found])
        return np.repeat(row[None], self.size, axis=0)

    def gather_json(self, value: Any) -> list[Any]:
        assert value[0] == self.found[self.rank]
        return [[text, f"/data/{text}"] for text in self.found]


def test_other_data_on_some_ranks_is_told_to_all() -> None:
    dataset = data.load(config.validate({"data": {"name": "synthetic"}}).data, 1)
    assert federation.agree_on_identity(dataset, Peer(["a"] * 7)) == "a"
    with pytest.raises(InputError) as told:
        federation.agree_on_identity(dataset, Peer(["a", "a", "b", "a", "a", "a", "c"]))
    lines = str(told.value).splitlines()
    assert lines[1:4] == [
        "  ranks 0-1, 3-5: 'a' (/data/a)", "  rank 2: 'b' (/data/b)", "  rank 6: 'c' (/data/c)",
    ]  # fmt: skip
    assert "data.path" in lines[0] and "same files" in lines[4]


def parts(*train: list[int]) -> Partition:
    return Partition(tuple(np.array(own, np.int64) for own in train), tuple(np.zeros(0, np.int64) for _ in train))


def start(comm: Together, odd: dict[int, Partition], weights: dict[int, float], gpus: Collection[int] = ()) -> str:
    """What a rank is told of others with another partition, other first weights or a GPU; nothing where all is well."""
    initial, device = (
        torch.full((3,), weights.get(comm.rank, 1.0)),
        torch.device("cuda" if comm.rank in gpus else "cpu"),
    )
    try:
        federation._require_same_start(comm, device, odd.get(comm.rank, parts([0, 1], [2])), initial)  # type: ignore[arg-type]
    except PeerError as error:
        return str(error)
    return ""


def test_ranks_that_would_not_train_the_same_are_named() -> None:
    assert together(3, lambda comm: start(comm, {}, {})) == [""] * 3
    # The same images, and one client has another of them.
    (told,) = set(together(4, lambda comm: start(comm, {1: parts([0], [1, 2])}, {})))
    assert re.search("partition: ranks 0, 2-3: .*\n  partition: rank 1: ", told) and "weights" not in told
    (told,) = set(together(2, lambda comm: start(comm, {}, {1: -0.0})))
    assert re.search("initial weights: rank 0: .*\n  initial weights: rank 1: ", told) and "partition" not in told


def test_ranks_with_and_without_a_gpu_are_told_before_they_drift_apart() -> None:
    assert together(3, lambda comm: start(comm, {}, {}, gpus=range(3))) == [""] * 3
    (told,) = set(together(3, lambda comm: start(comm, {}, {}, gpus=[1])))
    assert re.search("device: ranks 0, 2: cpu\n  device: rank 1: cuda\n", told) and "weights" not in told


def test_other_versions_alone_are_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    versions = iter([{"torch": "2.4"}, {"torch": "2.13"}])
    monkeypatch.setattr(federation.runtime, "versions", lambda: next(versions))
    assert together(2, lambda comm: start(comm, {}, {})) == ["", ""]
    assert re.search("versions: ranks? .: torch 2.4", caplog.text) and "torch 2.13" in caplog.text


class Viewing(nn.Module):
    """As in torch's own tutorials: features are flattened with `view`."""

    def __init__(self, in_channels: int, image_size: tuple[int, int], classes: int) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(in_channels, 4, 3, padding=1), nn.MaxPool2d(2)
        self.fc = nn.Linear(image_size[0] * image_size[1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.conv(x)))
        return self.fc(x.view(x.size(0), -1))


class Normalised(Viewing):
    """The same with batch normalisation."""

    def __init__(self, in_channels: int, image_size: tuple[int, int], classes: int) -> None:
        super().__init__(in_channels, image_size, classes)
        self.norm = nn.BatchNorm2d(in_channels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


@pytest.mark.parametrize("augment", ["none", "standard"])
def test_a_model_of_ones_own_may_view_its_features(augment: str) -> None:
    built = build(f"{__name__}:Viewing", data=split(augment=augment))
    mask = torch.ones(built.layout.prunable, dtype=torch.bool)
    result = built.trainer.train(built.initial, mask, built.partition.train[0], 0.1, 0.0, 0, 0)
    assert bool(torch.isfinite(result.update).all()) and result.update.any()
    assert len(evaluate.score(built.bound, built.initial, built.test_data, 8).losses) == 3


def test_the_built_in_models_get_channels_last_images_on_the_cpu() -> None:
    for model, expected in (("lenet5", True), (f"{__name__}:Viewing", False)):
        built = build(model)
        assert (built.train_data.channels_last, built.test_data.channels_last) == (expected, expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 1}, "batch_size: got 1, .*norm.*allowed: 2 or more"),
        ({"clients": 50}, "clients: got 50, which leaves client .*norm.*lower clients"),
        ({"data": split(partition="dirichlet", alpha=0.05, min_samples=1), "clients": 20},
         "data.min_samples: got 1, which leaves client .*norm.*raise data.min_samples to 2"),
    ],
)  # fmt: skip
def test_batch_norm_needs_two_images(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(f"{__name__}:Normalised", **values)
    assert build(f"{__name__}:Viewing", **values)


def test_batch_norm_is_content_with_two_images() -> None:
    assert min(build(f"{__name__}:Normalised", clients=30, batch_size=2).samples) == 2
