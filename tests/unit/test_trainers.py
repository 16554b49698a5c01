"""Clients that train at once: the same bits as one after another, and the same errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from alone import Alone
from torch import Tensor, nn
from torch.nn import functional as F

from feddip_mpi import config, federation, generators, graphs, rounds
from feddip_mpi.errors import Abandoned, InputError, NumericalError
from feddip_mpi.federation import Federation
from feddip_mpi.life import Life
from feddip_mpi.local import LocalHook
from feddip_mpi.methods.feddip import FedDIP
from feddip_mpi.models.dropout import Dropout
from feddip_mpi.schedules import plan_round
from feddip_mpi.trainers import Trainers
from feddip_mpi.vector import BoundModel


class Dropping(nn.Module):
    """Batch norm has buffers, an own dropout draws random numbers; the first weights are read by two layers."""

    drop: type[nn.Dropout] = Dropout

    def __init__(self, in_channels: int, image_size: tuple[int, int], classes: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(in_channels, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.dropout = self.drop(0.3)
        self.out = nn.Linear(8 * image_size[0] * image_size[1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x) + self.conv(x.flip(3))))
        return self.out(self.dropout(x).flatten(1))


class Global(Dropping):
    drop = nn.Dropout


_ONE = Dropping(2, (6, 6), 3)
_DROPOUT, _NORM, _WEIGHT, _STEPS = (
    Dropout(0.3),
    nn.BatchNorm2d(8, affine=False),
    nn.Parameter(torch.ones(8)),
    torch.zeros(1, dtype=torch.int64),
)
_FIXED = torch.full((8, 1, 1), 0.1)


class Common(Dropping):
    """Networks that have one part in common."""

    part = ""

    def __init__(self, in_channels: int, image_size: tuple[int, int], classes: int) -> None:
        super().__init__(in_channels, image_size, classes)
        self.dropout = _DROPOUT if self.part == "dropout" else Dropout(0.3)
        self.norm = _NORM if self.part == "norm" else nn.BatchNorm2d(8)
        self.register_parameter("scale", _WEIGHT if self.part == "scale" else nn.Parameter(torch.ones(8)))
        self.register_buffer("steps", _STEPS if self.part == "steps" else torch.zeros(1, dtype=torch.int64))
        self.register_buffer("fixed", _FIXED)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale.mean()


def common(part: str) -> type[Common]:
    return type(f"Common_{part}", (Common,), {"part": part})


Common_dropout, Common_norm, Common_scale, Common_steps = map(common, ("dropout", "norm", "scale", "steps"))


class Late(Global):
    """Draws from the global generators in batches of more than two images only, which the trial does not have."""

    def forward(self, x: Tensor) -> Tensor:
        self.dropout.train(self.training and len(x) > 2)
        return super().forward(x)


def the_same_again(in_channels: int, image_size: tuple[int, int], classes: int) -> nn.Module:
    return _ONE


def build(at_once: int, name: str = "Dropping", **values: Any) -> Federation:
    settings = {
        "rounds": 3, "clients": 8, "participants": 7, "local_epochs": 2, "batch_size": 8, "learning_rate": 0.05,
        "model": {"name": f"{__name__}:{name}"}, "mask": {"every": 2, "freeze_after": 0.75},
        "sparsity": {"initial": 0.4, "final": 0.8}, "upload": {"values": "int4", "rounding": "stochastic"},
        "data": {
            "name": "synthetic", "partition": "quantity", "alpha": 2.0,
            "synthetic": {"shape": [2, 6, 6], "classes": 3, "train_samples": 400, "test_samples": 60},
        },
        "clients_at_once": at_once, **values,
    }  # fmt: skip
    return federation.build(config.validate(settings), Alone(), torch.device("cpu"))


def play(built: Federation, state: rounds.State) -> list[dict[str, Any]]:
    """Play what is left; the records without what clocks say."""
    left = range(state.server.round, built.config.rounds)
    records = [rounds.play(built, state, plan_round(built.config, t)) for t in left]
    return [{k: v for k, v in r.items() if not k.endswith(("_seconds", "_memory_bytes"))} for r in records]


def bits(state: rounds.State) -> list[Any]:
    residuals = {client: residual.values.numpy().tobytes() for client, residual in sorted(state.held.items())}
    return [state.server.weights.numpy().tobytes(), state.server.mask.numpy().tobytes(), residuals]


def together_in() -> tuple[Callable[..., Any], list[int]]:
    """A way to count how many threads are inside a function at once, and the counts seen."""
    inside, seen, lock = [0], [], threading.Lock()

    def watched(work: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            with lock:
                inside[0] += 1
                seen.append(inside[0])
            try:
                return work(*arguments, **named)
            finally:
                with lock:
                    inside[0] -= 1

        return counted

    return watched, seen


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("feddip", {}),
        ("feddip", {"precision": "bf16", "data__augment": "standard"}),
        ("feddst", {}),
        ("prunefl", {}),
        ("sparsyfed", {"model": {"name": "lenet5"}, "data__synthetic__shape": [1, 12, 12]}),
    ],
)
def test_how_many_train_at_once_changes_no_bit(method: str, values: dict[str, Any]) -> None:
    data = {"name": "synthetic", "partition": "quantity", "alpha": 2.0, "augment": values.pop("data__augment", "none")}
    shape = values.pop("data__synthetic__shape", [2, 6, 6])
    data["synthetic"] = {"shape": shape, "classes": 3, "train_samples": 400, "test_samples": 60}
    found = []
    for at_once in (1, 2, 3, 20):
        built = build(at_once, method=method, data=data, **values)
        watched, seen = together_in()
        for trainer in built.trainers.all:
            trainer._backward = watched(trainer._backward)  # type: ignore[method-assign]
        state = rounds.initial_state(built)
        records = play(built, state)
        found.append((records, bits(state)))
        assert (max(seen) > 1) == (at_once > 1), "clients did, or did not, train at once"
        assert max(seen) <= at_once
    assert found[1] == found[0]
    assert found[2] == found[0]
    assert found[3] == found[0]
    assert found[0][0][-1]["train_loss"] < found[0][0][0]["train_loss"]


def test_a_round_given_up_leaves_the_state_and_can_be_played_again() -> None:
    expected = rounds.initial_state(alone := build(1))
    play(alone, expected)
    built = build(3)
    state = rounds.initial_state(built)
    rounds.play(built, state, plan_round(built.config, 0))
    before, asked = bits(state), []
    batches = 0

    def counted(work: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*arguments: Any) -> Any:
            nonlocal batches
            batches += 1
            time.sleep(0.03)
            return work(*arguments)

        return slow

    kept = [trainer._backward for trainer in built.trainers.all]
    for trainer in built.trainers.all:
        trainer._backward = counted(trainer._backward)  # type: ignore[method-assign]

    def give_up() -> bool:
        asked.append(threading.current_thread())
        return batches > 6

    with pytest.raises(Abandoned, match="round 2 was abandoned while client"):
        rounds.play(built, state, plan_round(built.config, 1), Life(give_up))
    ended = batches
    time.sleep(0.1)
    assert batches == ended, "no client trains any more when the round is given up"
    assert set(asked) == {threading.main_thread()}, "only the main thread may call MPI"
    assert bits(state) == before and state.server.round == 1
    for trainer, backward in zip(built.trainers.all, kept, strict=True):
        trainer._backward = backward  # type: ignore[method-assign]
    play(built, state)
    assert bits(state) == bits(expected)


def test_who_diverges_is_told_as_one_after_another() -> None:
    told = []
    for at_once in (1, 3):
        built = build(at_once, learning_rate=1000.0)
        state = rounds.initial_state(built)
        before = bits(state)
        with pytest.raises(NumericalError) as error:
            for t in range(built.config.rounds):
                before = bits(state)
                rounds.play(built, state, plan_round(built.config, t))
        told.append(str(error.value))
        assert bits(state) == before
    assert told[0] == told[1]


def fakes(count: int) -> Trainers:
    here = SimpleNamespace(vector=torch.zeros(1))
    return Trainers([SimpleNamespace(bound=here, hook=None, recorder=None) for _ in range(count)], 1)  # type: ignore[misc]


def test_the_first_client_that_fails_is_the_one_that_is_told() -> None:
    failed, ended = threading.Event(), []

    def train(trainer: Any, client: int, give_up: Callable[[], bool], alone: bool) -> Any:
        assert not alone
        if client == 2:
            failed.set()
            raise NumericalError("client 2")
        if client == 1:  # fails later than client 2, and counts
            assert failed.wait(30)
            time.sleep(0.05)
            raise InputError("client 1")
        if client > 2:
            while not give_up():
                time.sleep(0.001)
            ended.append(client)
            raise Abandoned("given up")
        return SimpleNamespace(update=torch.full((1,), float(client)), extras=())

    handed_out = []
    with (
        closing(fakes(3).results(range(9), train, lambda: False)) as results,
        pytest.raises(InputError, match="client 1"),
    ):
        for result in results:
            handed_out.append(int(result.update))
    assert handed_out == [0]
    assert ended and max(ended) <= 6, "who was under way has ended, who is far behind never began"


def test_results_that_wait_are_bounded_and_in_order() -> None:
    begun, lock = [], threading.Lock()

    def train(trainer: Any, client: int, give_up: Callable[[], bool], alone: bool) -> Any:
        with lock:
            begun.append(client)
        time.sleep(0.02 if client % 2 == 0 else 0.0)
        return SimpleNamespace(update=torch.full((1,), float(client)), extras=())

    got = []
    with closing(fakes(2).results(range(20), train, lambda: False)) as results:
        for result in results:
            got.append(int(result.update))
            with lock:
                assert len(begun) <= len(got) + 4
    assert got == list(range(20)) and sorted(begun) == got


def test_clients_at_once_take_the_memory_of_what_was_recorded_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings are the first trainer's, whichever runs out of memory."""
    monkeypatch.setattr(graphs, "capture", lambda work, *_: (work, "pool"))
    both = fakes(2)
    recorder = both.all[0].recorder = graphs.Recorder()
    for _ in range(4):
        recorder.run("step", [torch.zeros(1)], lambda x: None)
    tried = []

    def train(trainer: Any, client: int, give_up: Callable[[], bool], alone: bool) -> Any:
        tried.append(client)
        if recorder.recorded and trainer is both.all[1]:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        while recorder.recorded:  # under way meanwhile
            time.sleep(0.001)
        return SimpleNamespace(update=torch.full((1,), float(client)), extras=())

    with closing(both.results(range(4), train, lambda: False)) as results:
        assert [int(result.update) for result in results] == [0, 1, 2, 3]
    assert len(tried) == 5 and not recorder.recorded


def test_a_network_that_draws_from_the_global_generators_is_refused() -> None:
    alone = build(1, "Global")
    play(alone, rounds.initial_state(alone))
    message = "clients_at_once: got 2, but the network draws from the global random gener"
    with pytest.raises(InputError, match=message):  # also where each rank would begin with one client a round
        build(2, "Global", participants=1)
    built = build(2, "Late")
    state = rounds.initial_state(built)
    before = bits(state)
    with pytest.raises(InputError, match=message):
        play(built, state)
    assert bits(state) == before
    global_before = generators.states()
    build(2)
    assert generators.states() == global_before


def test_a_network_that_is_made_once_only_is_refused() -> None:
    with pytest.raises(InputError, match="clients_at_once: got 2, but .* returns the same network"):
        build(2, "the_same_again")


@pytest.mark.parametrize("part", ["dropout", "norm", "scale", "steps"])
def test_networks_with_a_part_in_common_are_refused(part: str) -> None:
    with pytest.raises(InputError, match=rf"clients_at_once: got 2, but .* returns the same \w+ {part} when"):
        build(2, f"Common_{part}")


def test_networks_may_have_a_constant_in_common() -> None:
    found = []
    for at_once in (1, 3):
        built = build(at_once, "Common")
        play(built, state := rounds.initial_state(built))
        found.append(bits(state))
    assert found[0] == found[1]


class OneHook(FedDIP):
    _own = LocalHook()

    def hook(self, bound: BoundModel) -> LocalHook:
        return self._own


def test_a_method_with_one_hook_for_all_is_refused() -> None:
    build(1, method=f"{__name__}:OneHook")
    with pytest.raises(InputError, match="clients_at_once: got 3, but hook") as told:
        build(3, method=f"{__name__}:OneHook")
    assert told.value.shared


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_own_generator_gives_the_bits_of_the_global_one(dtype: torch.dtype) -> None:
    x = torch.randn(37, 129).to(dtype).requires_grad_()
    torch.manual_seed(5)
    expected = F.dropout(x, 0.3, True)
    layer = Dropout(0.3)
    layer.generator = torch.Generator().manual_seed(5)
    before = torch.get_rng_state()
    found = layer(x)
    assert torch.equal(found, expected) and found.dtype == dtype
    assert torch.equal(torch.get_rng_state(), before)
    gradients = [torch.autograd.grad(out.float().sum(), x)[0] for out in (found, expected)]
    assert torch.equal(*gradients)
    assert layer.eval()(x) is x
    layer.generator = None
    torch.manual_seed(5)
    assert torch.equal(layer.train()(x), expected)
