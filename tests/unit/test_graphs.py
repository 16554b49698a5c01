"""Recorded steps, on the CPU: what a recording reads lies still. That a GPU's recordings change no bit is in test_gpu.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import MagicMock, Mock, call

import numpy as np
import pytest
import torch
from test_methods import build
from torch import Tensor, nn

from feddip_mpi import config, evaluate, federation, graphs, scoring
from feddip_mpi.batches import DeviceData
from feddip_mpi.errors import UnrecordableError
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
    monkeypatch.setattr(graphs, "mark", lambda: lambda: None)
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
    with pytest.raises(UnrecordableError) as told:
        for number in range(20):
            recorder.run("step", [torch.tensor(number)], lambda x: out.append(int(x)))
    assert out == [0, 1, 2] and recorder.recorded == 0
    assert str(told.value) == (
        "cuda_graphs: a client's step cannot be recorded (CUDA error: operation not permitted when stream is capturing); "
        "allowed: a network whose forward pass neither waits for the GPU nor decides by values, and room on the GPU; or "
        "`resume` with cuda_graphs=off, which changes no bit"
    )


OUT_OF_MEMORY = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("CUDA error: out of memory\nCompile with ..."),  # the driver's, in which recordings lie
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["torch", "driver"])
def test_without_memory_beside_others_it_begins_anew_once(
    error: RuntimeError, recordings: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Forms come one after another, for three only is there memory."""
    recorder, out, capture = graphs.Recorder(), [], graphs.capture

    def full(*arguments: Any) -> Any:
        if recorder.recorded == 3:
            raise error
        return capture(*arguments)

    monkeypatch.setattr(graphs, "capture", full)
    recorded = []
    for number in range(50):
        recorder.run(number // 5, [torch.tensor(number)], lambda x: out.append(int(x)))
        recorded.append(recorder.recorded)
    assert out == list(range(50))
    # The fourth form finds no memory at its fourth use, drops the three, and is recorded at its fifth; the sixth is the third
    # one again, and the seventh the last that is tried.
    assert recorded[14:20] == [3, 3, 3, 3, 0, 1] and recorded[24:] == [2] * 4 + [3] * 5 + [0] * 17
    assert [record.getMessage() for record in caplog.records] == [
        "cuda_graphs: the GPU has no memory to record another step (recorded: 3)"
    ] * 2
    assert [arguments[2] for arguments in recordings] == [None, "pool", "pool"] * 2, "a new memory"


def test_without_memory_for_one_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, out, tries = graphs.Recorder(), [], Mock(side_effect=OUT_OF_MEMORY[0])
    monkeypatch.setattr(graphs, "capture", tries)
    for number in range(30):
        recorder.run(number % 3, [torch.tensor(number)], lambda x: out.append(int(x)))
    assert out == list(range(30)) and recorder.recorded == 0 and tries.call_count == 1


@pytest.mark.parametrize(("version", "registers"), [
    ("2.4.1", True), ("2.13.0+cpu", True), ("2.14.0a0+4fdf77b940", False), ("3.0.0", False),
])  # fmt: skip
def test_generators_are_named_where_torch_does_not_find_them(
    version: str, registers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, generator, work = Mock(), torch.Generator(), Mock()
    for name, value in {"CUDAGraph": lambda: graph, "graph": MagicMock(), "synchronize": Mock()}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("current_stream", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, Mock())
    monkeypatch.setattr(torch, "__version__", version)
    start, pool = graphs.capture(work, [generator], None)
    assert (start, pool) == (graph.replay, graph.pool())
    assert graph.register_generator_state.mock_calls == [call(generator)] * registers
    work.assert_called_once_with()


def test_recordings_make_room_for_others(recordings: list[tuple[Any, ...]]) -> None:
    """Sixteen are kept, those that were started last; one that made room has to come twice as often to be recorded again."""
    recorder, out = graphs.Recorder(), []

    def run(form: int, times: int) -> list[int]:
        """By each time the number of recordings made until then."""
        made = []
        for _ in range(times):
            recorder.run(form, [torch.tensor(form)], lambda x: out.append(int(x)))
            made.append(len(recordings))
        return made

    for form in range(16):
        run(form, 4)
        run(0, 1)
    assert recorder.recorded == len(recordings) == 16
    run(16, 4)  # the first one's place: 1, as 0 was started since
    assert (len(recordings), recorder.recorded) == (17, 16)
    assert run(0, 5) == [17] * 5 and run(16, 5) == [17] * 5
    assert run(1, 8) == [17] * 7 + [18]
    for form in (*range(100, 116), 1):
        run(form, 4)
    assert recorder.recorded == 16 and len(recordings) == 34, "1 needs more"
    assert run(1, 12) == [34] * 11 + [35]
    assert len(out) == 16 * 5 + 4 + 10 + 8 + 17 * 4 + 12, "whatever is recorded, everything is computed"


def test_the_first_penalty_and_mask_are_recorded_though_rests_took_all_places(
    recordings: list[tuple[Any, ...]],
) -> None:
    """As with Dirichlet(0.5) clients, each of whom ends its epochs with a batch of a size of its own."""
    recorder = graphs.Recorder()
    for phase in ("dense", "pruned", "penalised"):
        recorded = 0
        for client in range(40):
            for _ in range(5):
                for form in [(64, phase)] * 6 + [(client, phase)]:
                    done = len(recordings)
                    recorder.run(form, [torch.tensor(0)], lambda x: None)
                    recorded += form in recorder._recordings and len(recordings) == done
        assert recorded > 0.85 * 40 * 5 * 7, phase
    assert recorder.recorded == 16


def test_the_host_is_at_most_sixteen_steps_ahead(
    recordings: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps begun, and those that are waited for."""
    begun, waited = 0, 0

    def mark() -> Callable[[], None]:
        told = begun

        def reached() -> None:
            nonlocal waited
            waited = told

        return reached

    monkeypatch.setattr(graphs, "mark", mark)
    recorder = graphs.Recorder()
    for number in range(100):
        begun += number >= 3  # three are not recorded
        recorder.run("step", [torch.tensor(number)], lambda x: None)
        assert begun - waited <= 16
    assert waited >= 80


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


def test_a_client_that_has_no_memory_beside_recordings_begins_again_without(
    recordings: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain, recorded = trainer(RULE, False), trainer(RULE, True)
    start = flatten(plain.bound.model, plain.bound.layout)
    mask = torch.ones(plain.bound.layout.prunable, dtype=torch.bool)
    given = (start, mask, np.arange(21), 0.1, 0.1, 0, 0)
    backward, calls = LocalTrainer._backward, 0

    def full(self: LocalTrainer, *batch: Tensor) -> Any:
        nonlocal calls
        calls += 1
        if self.recorder is not None and self.recorder.recorded and calls > 9:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return backward(self, *batch)

    expected = plain.train(*given)
    monkeypatch.setattr(LocalTrainer, "_backward", full)
    found = recorded.train(*given)
    assert calls == 10 + 12 and len(recordings) == 1
    torch.testing.assert_close(found.update, expected.update, rtol=2e-5, atol=2e-6)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert recorded.recorder is not None and recorded.recorder.recorded == 0
    assert [record.getMessage() for record in caplog.records] == [
        "cuda_graphs: the GPU's memory ran out; the recorded steps (1) are dropped, and steps are slower from here on"
    ]
    recorded.train(*given)
    assert recorded.recorder.recorded == 0 and len(recordings) == 1, "no more are made"
    error = torch.cuda.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(LocalTrainer, "_backward", Mock(side_effect=error))
    with pytest.raises(torch.cuda.OutOfMemoryError):  # without recordings there is nothing to give back
        recorded.train(*given)


def test_an_evaluation_that_has_no_memory_beside_recordings_is_done_again(
    recordings: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build("feddip")
    expected = scoring.score_model(built, built.initial)
    recorder = built.trainer.recorder = graphs.Recorder()
    for _ in range(4):
        recorder.run("step", [torch.tensor(0)], lambda x: None)
    score, error = evaluate.score, torch.cuda.OutOfMemoryError("CUDA out of memory")

    def full(*given: Any) -> Any:
        if recorder.recorded:
            raise error
        return score(*given)

    monkeypatch.setattr(evaluate, "score", full)
    assert scoring.score_model(built, built.initial) == expected and not recorder.recorded
    monkeypatch.setattr(evaluate, "score", Mock(side_effect=error))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        scoring.score_model(built, built.initial)


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
