"""The loop: what of the configuration, the history and the clock has to reach a round."""

import dataclasses
import logging
import threading
from typing import Any

import pytest
import torch
from alone import Alone
from test_methods import build, play
from together import Together, together

from feddip_mpi import control, errors, local, metrics, records, rounds
from feddip_mpi.federation import Federation
from feddip_mpi.life import Life
from feddip_mpi.rounds import Choice, State
from feddip_mpi.schedules import RoundPlan, plan_round
from feddip_mpi.support import Support


def trained(**upload: Any) -> tuple[torch.Tensor, int]:
    """The weights after a run of FedDIP, and the bytes of values that were uploaded for them."""
    built = build("feddip", rounds=2, upload={"values": "int8", **upload})
    state = rounds.initial_state(built)
    uploaded = sum(record["upload_values_bytes"] for record in play(built, state))
    return state.server.weights, uploaded


def test_an_entropy_coder_shortens_uploads_and_changes_no_weight() -> None:
    (plain, whole), (coded, shorter) = trained(), trained(entropy="zstd")
    assert torch.equal(plain, coded) and shorter < 0.95 * whole


def test_rounding_at_random_leads_elsewhere() -> None:
    (nearest, _), (stochastic, _) = trained(), trained(rounding="stochastic")
    assert not torch.equal(nearest, stochastic)


class Clock(threading.local):
    """Each rank is a thread, and has seconds of its own."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_a_rank_that_trains_fast_gets_more_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten images a client, for which one rank takes three seconds and the other one."""
    data = {"name": "synthetic", "synthetic": {"shape": [2, 6, 6], "train_samples": 80, "test_samples": 20}}
    built = [build("fedavg", clients=8, participants=8, balance="speed", data=data) for _ in range(2)]
    clock, real = Clock(), local.LocalTrainer.train

    def train(trainer: local.LocalTrainer, *arguments: Any) -> local.LocalResult:
        clock.now += 3.0 if trainer is built[0].trainer else 1.0
        return real(trainer, *arguments)

    monkeypatch.setattr(local.LocalTrainer, "train", train)
    monkeypatch.setattr(records, "time", clock)

    def work(comm: Together) -> list[tuple[int, list[float] | None]]:
        own = dataclasses.replace(built[comm.rank], comm=comm)  # type: ignore[arg-type]
        state, seen = rounds.initial_state(own), []
        for t in range(2):
            rounds.play(own, state, plan_round(own.config, t))
            seen.append((state.holders.count(1), state.speeds))
        return seen

    speeds = pytest.approx([10 / 3, 10])
    assert together(2, work) == [[(4, speeds), (6, speeds)]] * 2


class Eight(Alone):
    """Eight ranks on so many nodes, as far as a choice of exchange asks."""

    size = 8

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self._nodes = nodes

    def open_nodes(self) -> int:
        return self._nodes


def choice(nodes: int = 8, **network: float) -> tuple[Choice, Federation]:
    network, upload = {"bandwidth": 100, **network}, {"values": "fp32"}
    built = build("fedavg", clients=16, participants=16, exchange="auto", overlap=False, upload=upload, network=network)
    return Choice(dataclasses.replace(built, comm=Eight(nodes))), built  # type: ignore[arg-type]


def test_the_cheapest_exchange_is_chosen_and_each_change_told(caplog: pytest.LogCaptureFixture) -> None:
    made, built = choice(latency=30)
    plan, size = plan_round(built.config, 0), built.layout.prunable
    dense, sparse = Support.of(torch.ones(size, dtype=torch.bool)), Support.of(torch.arange(size) < 9)
    with caplog.at_level(logging.INFO, logger="feddip_mpi"):
        chosen = [
            made.mode(dataclasses.replace(plan, round=t), support)
            for t, support in enumerate([dense, dense, sparse, sparse, dense])
        ]
    assert chosen == ["sharded", "sharded", "allgatherv", "allgatherv", "sharded"]
    told = [message.partition(" (predicted: ")[0] for message in caplog.messages]
    assert told == [
        f"exchange from round {t}: {mode}" for t, mode in ((1, "sharded"), (3, "allgatherv"), (5, "sharded"))
    ]
    assert all("8 ranks on 8 nodes, latency 30 us, bandwidth 100 Mbit/s" in message for message in caplog.messages)


@pytest.mark.parametrize(("latency", "nodes", "mode"), [(30, 8, "sharded"), (1e6, 8, "allgatherv"), (30, 2, "node")])
def test_latency_and_nodes_decide_on_the_exchange(latency: float, nodes: int, mode: str) -> None:
    made, built = choice(nodes, latency=latency)
    whole = Support.of(torch.ones(built.layout.prunable, dtype=torch.bool))
    assert made.mode(plan_round(built.config, 0), whole) == mode


class Saver:
    """Counts what is saved; the clock asks for a checkpoint in some rounds."""

    def __init__(self, overdue: tuple[int, ...] = ()) -> None:
        self.saved: list[int] = []
        self._overdue, self._round = overdue, 0

    def overdue(self) -> bool:
        self._round += 1
        return self._round in self._overdue

    def save(self, state: State, history: Any) -> None:
        self.saved.append(state.server.round)


def run(built: Federation, saver: Saver) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = []
    told: list[dict[str, Any]] = []
    assert not rounds.run(built, rounds.initial_state(built), history, saver, told.append, lambda: False)
    assert told == history
    return history


def test_adaptive_control_decides_by_the_rounds_before() -> None:
    keys = {"control": {"pruning_error": 1e-6, "upload_bytes": 1}, "mask": {"every": 2, "initial": "erk"}}
    built = build("feddip", upload={"values": "fp32", "regrow": 0.1}, **keys)
    history = run(built, Saver())
    scales = [(record["penalty_scale"], record["regrow_scale"]) for record in history]
    assert scales == [(1.0, 1.0), (1.0, 1.0), (1.25, 0.5), (1.25**2, 0.5)]
    assert 0 < history[3]["penalty"] == pytest.approx(1.25**2 * plan_round(built.config, 3).penalty)
    decided = [control.decide(built.config, history[:t]) for t in range(4)]
    assert scales == [(each.penalty_scale, each.regrow_scale) for each in decided]


@pytest.mark.parametrize(("rank", "fault_tolerant", "kept"), [(0, False, 4), (1, False, 1), (1, True, 4)])
def test_rank_0_and_whoever_may_replace_it_keep_the_rounds_before(
    monkeypatch: pytest.MonkeyPatch, rank: int, fault_tolerant: bool, kept: int
) -> None:
    built, history = build("feddip"), list[dict[str, Any]]()
    state = rounds.initial_state(built)
    monkeypatch.setattr(built.comm, "rank", rank, raising=False)
    monkeypatch.setattr(built.comm, "fault_tolerant", fault_tolerant, raising=False)

    def play(federation: Federation, state: State, plan: RoundPlan, life: Any) -> dict[str, Any]:
        state.server = dataclasses.replace(state.server, round=plan.round + 1)
        return dict.fromkeys(metrics.FIELDS, 0) | {"round": plan.round + 1, "samples": 1}

    monkeypatch.setattr(rounds, "play", play)
    saver = Saver()
    rounds.run(built, state, history, saver, lambda record: None, lambda: False)
    assert [record["round"] for record in history] == [1, 2, 3, 4][-kept:] and saver.saved


def test_a_checkpoint_that_is_overdue_is_written() -> None:
    saver = Saver(overdue=(2,))
    run(build("feddip", checkpoint={"every": 3}), saver)
    assert saver.saved == [2, 3, 4]


@pytest.mark.parametrize(("error", "scored"), [
    (errors.InputError, True), (errors.NumericalError, True), (errors.Abandoned, False),
    (errors.UnrecordableError, False), (KeyError, False),
])  # fmt: skip
def test_the_round_before_one_that_fails_is_scored_by_ranks_that_can(
    error: type[Exception], scored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, told = build("feddip"), []
    state = rounds.initial_state(built)
    record = state.unscored = {"round": 1, "test_accuracy": None}
    monkeypatch.setattr(rounds, "_score_now", lambda *_: record.update(test_accuracy=0.5))
    failed = error("of every rank")
    failed.shared = True  # type: ignore[attr-defined]
    with pytest.raises(error), rounds._line_of_the_round_before(built, state, told.append, Life()):
        raise failed
    assert told == [record] and record["test_accuracy"] == (0.5 if scored else None)
