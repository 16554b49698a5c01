"""Recorded steps, on the CPU: what a recording reads lies still. That a GPU's recordings change no bit is in test_gpu.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from feddip_mpi import config, federation, graphs
from feddip_mpi.batches import DeviceData
from feddip_mpi.errors import InputError
from feddip_mpi.local import LocalHook, LocalRule, LocalTrainer
from feddip_mpi.models.dropout import Dropout
from feddip_mpi.vector import BoundModel, Layout, flatten

CPU = torch.device("cpu")


def again(work: Callable[[], None], generators: Any, pool: object) -> tuple[Callable[[], None], object]:
    """In place of a recording: the first call's closure, with all that it has hold of, called again."""
    return work, "pool"


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    seen: list[tuple[Any, ...]] = []

    def capture(*arguments: Any) -> Any:
        seen.append(arguments)
        return again(*arguments)

    monkeypatch.setattr(graphs, "capture", capture)
    return seen


def test_a_form_is_recorded_when_it_has_come_often(recordings: list[tuple[Any, ...]]) -> None:
    recorder, out = graphs.Recorder(), torch.zeros(3)

    def add(x: Tensor) -> None:
        out[: len(x)].add_(x)

    total = torch.zeros(3)
    for number in range(10):
        for size in (3, 2) if number < 2 else (3,):
            given = torch.full((size,), float(number + size))
            recorder.run(size, [given], add)
            total[:size] += given
            given.fill_(1e9)  # a recording has its own inputs
    assert torch.equal(out, total)
    assert len(recordings) == recorder.recorded == 1
    for number in range(3):
        recorder.run(2, [torch.full((2,), float(number))], add)
    assert len(recordings) == recorder.recorded == 2
    assert [arguments[2] for arguments in recordings] == [None, "pool"]  # they share their memory


def test_what_cannot_be_recorded_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(*_: Any) -> Any:
        try:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmany more lines")
        except RuntimeError:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # noqa: B904

    monkeypatch.setattr(graphs, "capture", capture)
    recorder, out = graphs.Recorder(), []
    with pytest.raises(InputError) as told:
        for number in range(20):
            recorder.run("step", [torch.tensor(number)], lambda x: out.append(int(x)))
    assert out == [0, 1, 2] and recorder.recorded == 0
    assert str(told.value) == (
        "cuda_graphs: a client's step cannot be recorded (CUDA error: operation not permitted when stream is capturing); "
        "allowed: a network whose forward pass neither waits for the GPU nor decides by values, and room on the GPU; or "
        "`resume` with cuda_graphs=off, which changes no bit"
    )


def test_without_memory_for_more_it_goes_on_with_what_it_has(
    recordings: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder, out, capture = graphs.Recorder(), [], graphs.capture

    def full(*arguments: Any) -> Any:
        if recordings:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return capture(*arguments)

    monkeypatch.setattr(graphs, "capture", full)
    for number in range(30):
        recorder.run(number % 3, [torch.tensor(number)], lambda x: out.append(int(x)))
    assert out == list(range(30)) and recorder.recorded == 1
    assert [record.getMessage() for record in caplog.records] == [
        "cuda_graphs: the GPU has no memory to record more steps (recorded: 1)"
    ]


def test_recordings_have_a_limit(recordings: list[tuple[Any, ...]]) -> None:
    recorder, out = graphs.Recorder(), []
    for number in range(400):
        recorder.run(number % 40, [torch.tensor(number)], lambda x: out.append(int(x)))
    assert out == list(range(400)) and recorder.recorded == len(recordings) == 16


@pytest.mark.parametrize(("name", "graphs_", "recorded"), [
    ("lenet5", "auto", True), ("lenet5", "off", False), ("own:Net", "auto", False), ("own:Net", "on", True),
    ("alexnet", "auto", True), ("alexnet", "off", False),
])  # fmt: skip
def test_which_networks_are_recorded(name: str, graphs_: str, recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = config.validate({"model": {"name": name}, "cuda_graphs": graphs_})
    assert federation._records_steps(chosen, torch.device("cuda", 0)) == recorded
    assert not federation._records_steps(chosen, CPU)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert federation._records_steps(chosen, torch.device("cuda", 0)) == (graphs_ == "on")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), Dropout(0.3)
        self.out = nn.Linear(4 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(torch.relu(self.norm(self.conv(x))).flatten(1)))


def trainer(rule: LocalRule, record: bool) -> LocalTrainer:
    torch.manual_seed(0)
    model, draw = Net(), np.random.default_rng(1)
    layout = Layout.of(model, ("conv.weight", "out.weight"))
    images = torch.from_numpy(draw.integers(0, 256, (60, 2, 6, 6), dtype=np.uint8))
    one = torch.ones(1, 2, 1, 1)
    data = DeviceData(images, torch.from_numpy(draw.integers(0, 3, 60)), 128 * one, 64 * one)
    return LocalTrainer(BoundModel(model, layout, CPU), data, rule, record=record)


RULE = LocalRule(seed=3, epochs=4, batch_size=8, weight_decay=5e-4)


@pytest.mark.parametrize(
    "rule",
    [
        RULE, replace(RULE, proximal=0.5), replace(RULE, penalty_norm="l1"), replace(RULE, penalty_norm="l2_squared"),
        replace(RULE, feedback=False), replace(RULE, augment="standard"),
    ],
    ids=lambda rule: f"{rule.penalty_norm} {rule.proximal} {rule.feedback} {rule.augment}",
)  # fmt: skip
def test_recorded_clients_are_the_others(rule: LocalRule, recordings: list[tuple[Any, ...]]) -> None:
    """Clients one after the other, all that may differ between them differs; tensors in the place of numbers round alike."""
    plain, recorded = trainer(rule, False), trainer(rule, True)
    draw = torch.Generator().manual_seed(5)
    start = flatten(plain.bound.model, plain.bound.layout)
    size = plain.bound.layout.prunable
    for number in range(8):
        mask = torch.rand(size, generator=draw) < (1.1 if number % 3 == 0 else 0.4)
        samples = np.arange(number, number + 21 + number % 2)
        penalty = (0.0, 0.1, 0.02)[number % 3] if number < 6 else 0.3
        received = start + 0.01 * torch.randn(start.shape, generator=draw)
        received[:size].mul_(mask)
        given = (received, mask, samples, 0.1 / (number + 1), penalty, number, number % 5)
        one, other = plain.train(*given), recorded.train(*given)
        torch.testing.assert_close(other.update, one.update, rtol=2e-5, atol=2e-6)
        assert other.loss == pytest.approx(one.loss, rel=1e-5) and other.samples == one.samples
    assert len(recordings) == recorded.recorder.recorded >= 4
    assert plain.recorder is None
    for arguments in recordings:
        assert list(arguments[1]) == [recorded._generator]


def test_a_client_that_trains_beside_others_is_not_recorded(recordings: list[tuple[Any, ...]]) -> None:
    local = trainer(RULE, True)
    start = flatten(local.bound.model, local.bound.layout)
    mask = torch.ones(local.bound.layout.prunable, dtype=torch.bool)
    local.train(start, mask, np.arange(24), 0.1, 0.0, 0, 0, alone=False)
    assert not recordings
    local.train(start, mask, np.arange(24), 0.1, 0.0, 0, 0)
    assert recordings


def test_a_hook_is_never_recorded() -> None:
    model = Net()
    bound = BoundModel(model, Layout.of(model, ("conv.weight", "out.weight")), CPU)
    assert LocalTrainer(bound, trainer(RULE, False).data, RULE, LocalHook(), record=True).recorder is None
