"""What survivors take over from a dead rank: residuals from the checkpoint or not at all, and what is said to be lost."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from alone import Alone
from together import together

from feddip_mpi import checkpoint, config, exchange, federation, recovery, rounds, run_folder
from feddip_mpi.federation import Federation
from feddip_mpi.recovery import NOBODY
from feddip_mpi.residual_store import ResidualStore
from feddip_mpi.residuals import Residual
from feddip_mpi.saver import FolderSaver
from feddip_mpi.schedules import plan_round
from feddip_mpi.server import Server

SAVED, DONE = 3, 5


def build(**upload: Any) -> Federation:
    values = {
        "rounds": 9, "clients": 12, "participants": 3, "local_epochs": 1, "batch_size": 8, "mask": {"every": 2, "initial": "erk"},
        "model": {"name": "test_fedavg:Net"}, "upload": {"values": "int4", **upload}, "eval": {"every": 99},
        "data": {"name": "synthetic", "synthetic": {
            "shape": [2, 6, 6], "classes": 3, "train_samples": 120, "test_samples": 60}},
    }  # fmt: skip
    return federation.build(config.validate(values), Alone(), torch.device("cpu"))


def played(built: Federation, folder: Path) -> tuple[rounds.State, list[dict[str, Any]], tuple[int, Path]]:
    """State and history after round DONE, and the checkpoint of round SAVED."""
    paths = run_folder.RunFolder(folder)
    paths.checkpoints.mkdir()
    state, history = rounds.initial_state(built), []
    for t in range(DONE):
        history.append(rounds.play(built, state, plan_round(built.config, t)))
        if t + 1 == SAVED:
            saver = FolderSaver(built, paths, "2026-01-02T03:04:05+0000")
            saver.save(state, history)
            saver.wait()
    return state, history, (SAVED, checkpoint.path_of(paths.checkpoints, SAVED))


def bury(state: rounds.State, dead: list[int]) -> dict[int, Any]:
    """These clients' holder dies; returns the residuals that go with it."""
    state.holders = [NOBODY if client in dead else 0 for client in range(len(state.holders))]
    return {client: state.held.pop(client) for client in dead if client in state.held}


def test_residuals_come_from_the_checkpoint_and_newer_ones_are_lost(tmp_path: Path) -> None:
    built = build()
    state, history, saved = played(built, tmp_path)
    early, late = ({c for r in part for c in r["participants"]} for part in (history[:SAVED], history[SAVED:]))
    dead = [client for client in range(12) if client % 3 != 0]
    stored = dict(checkpoint.read_residuals(saved[1]))
    kinds = [(client in early, client in late) for client in dead]
    assert set(kinds) >= {(True, False), (False, True), (True, True)}, "the seed shows all cases"
    before, kept = bury(state, dead), dict(state.held)
    found = recovery.take_over(built, state, history, saved)
    assert found is not None
    after, losses = found
    for client, (once, again) in zip(dead, kinds, strict=True):
        assert (client in after.held) == once
        if once:
            assert torch.equal(after.held[client].values, stored[client].values)
            assert (after.held[client].round == before[client].round) == (not again)
            assert torch.equal(after.held[client].values, before[client].values) == (not again)
    assert losses.residuals == {
        client: max(r["round"] for r in history if client in r["participants"]) for client in dead if client in late
    }
    assert after.residuals_lost == len(losses.residuals) > 0 and not losses.owed
    assert all(after.held[client].values.data_ptr() == kept[client].values.data_ptr() for client in kept)
    assert all(after.held[client].round == kept[client].round for client in kept)
    assert after.holders == [0] * 12 and state.holders.count(NOBODY) == len(dead), "the state before is as it was"
    record = rounds.play(built, after, plan_round(built.config, DONE))
    assert record["residuals_lost"] == len(losses.residuals) and after.residuals_lost == 0


def test_nothing_is_lost_where_nothing_is_remembered(tmp_path: Path) -> None:
    built = build(residual="drop")
    state, history, saved = played(built, tmp_path)
    bury(state, list(range(12)))
    found = recovery.take_over(built, state, history, saved)
    assert found is not None and found[1].residuals == {} and str(found[1]) == "residuals lost: none"


def test_without_a_checkpoint_all_of_them_are_lost(tmp_path: Path) -> None:
    built = build()
    state, history, _ = played(built, tmp_path)
    gone = bury(state, list(range(12)))
    found = recovery.take_over(built, state, history, None)
    assert found is not None and found[0].held == {}
    assert set(found[1].residuals) == set(gone)
    assert f"client {min(gone)} (round " in str(found[1])


def test_lost_references_cannot_be_gone_on_without(tmp_path: Path) -> None:
    """The server's sum counts on them (EF21); those in the checkpoint are as good as new."""
    built = build(residual="ef21")
    state, history, saved = played(built, tmp_path)
    late = {client for record in history[SAVED:] for client in record["participants"]}
    before = dict(state.held)
    bury(state, [client for client in range(12) if client not in late])
    found = recovery.take_over(built, state, history, saved)
    assert found is not None
    assert all(torch.equal(found[0].held[client].values, before[client].values) for client in before)
    bury(state, sorted(late))
    assert recovery.take_over(built, state, history, saved) is None


def test_survivors_at_different_rounds_cannot_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build()
    state, history, saved = played(built, tmp_path)
    monkeypatch.setattr(built.comm, "gather", lambda row: np.stack([row, row - 1]), raising=False)
    assert recovery.take_over(built, state, history, saved) is None


def test_what_is_owed_goes_to_the_new_owners_of_the_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are cut by the bytes of what clients send, whatever the sums travel as."""
    monkeypatch.setattr(exchange, "_GRANULE", 1)
    built = build(values="int8")
    built = dataclasses.replace(
        built, config=config.override(built.config, ["exchange=sharded", "download.values=int4"])
    )
    everything = torch.ones(built.layout.prunable, dtype=torch.bool)
    state = dataclasses.replace(rounds.initial_state(built), server=Server.of(1, built.initial, everything))
    support, size = state.server.support, built.layout.size
    owed = torch.arange(1.0, support.count + 1)

    def cut(ranks: int, rank: int, kind: str = "int8") -> torch.Tensor:
        return exchange.own_part(owed, support, size, ranks, rank, kind)

    def survive(comm: Any) -> torch.Tensor:
        before = dataclasses.replace(state, owed=cut(3, comm.rank), holders=[0] * 12)
        found = recovery.take_over(dataclasses.replace(built, comm=comm), before, [], None)
        assert found is not None and found[1].owed
        return found[0].owed

    after, known = together(2, survive), cut(3, 0) + cut(3, 1)
    assert bool(cut(3, 2).any()) and not torch.equal(cut(2, 0), cut(2, 0, "int4"))
    for rank in range(2):
        assert torch.equal(after[rank], torch.where(cut(2, rank) > 0, known, 0.0))


def test_all_ranks_see_that_residuals_travel() -> None:
    """Who has none left waits for the others, maybe for hours: a watchdog must not take that for a hang."""
    left = dict.fromkeys(range(50), 3)

    def restore(comm: Any) -> tuple[int, int]:
        met, told, held = [], [], ResidualStore(10**6)
        comm.barrier = lambda: met.append(comm._all(None))
        stored = ((client, Residual(torch.full((4,), float(client)), 3)) for client in left) if comm.rank == 0 else None
        recovery.hand_out(comm, left, [1] * 50, stored, held, lambda: told.append(len(met)))
        assert sorted(held) == (list(left) if comm.rank == 1 else []), "rank 2 has nothing to do"
        return len(told), told == sorted(set(told))

    assert together(3, restore) == [(3, True)] * 3


def test_holders_are_renumbered() -> None:
    assert recovery.renumber([0, 1, 2, 3, 2, NOBODY], [0, 2, 3]) == [0, NOBODY, 1, 2, 1, NOBODY]
