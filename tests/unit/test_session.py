"""A start: what it finds in its folder, and what it leaves there; commands of one rank without MPI."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from alone import Alone
from test_methods import settings

from feddip_mpi import checkpoint, config, federation, hdf5, rounds, runtime, scoring, server, session
from feddip_mpi.errors import InputError, Stopped
from feddip_mpi.metrics import Record
from feddip_mpi.run_folder import RunFolder
from feddip_mpi.stopping import StopFlag

SAVED = config.validate({"rounds": 4, "seed": 7})


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> StopFlag:
    """What a signal would set. This process keeps its own signals and its log, and no picture is drawn."""
    flag = StopFlag()
    monkeypatch.setattr(StopFlag, "install", lambda self: None)
    monkeypatch.setattr(runtime, "start_log", lambda folder, rank: None)
    monkeypatch.setattr(session, "_draw", lambda built, folder, history: None)
    return flag


def train(folder: Path, stop: StopFlag, method: str, **values: Any) -> Path:
    """A finished run's folder."""
    path, run = folder / "config.yaml", folder / "run"
    path.write_text(config.to_yaml(settings(method, device="cpu", **values)))
    session.train(Alone(), str(path), [], str(run), stop)
    return run


def finished(run: Path) -> dict[str, Any]:
    return json.loads((run / "finished.json").read_text())


def test_the_memory_is_scored_without_the_mask(tmp_path: Path, stop: StopFlag) -> None:
    run = train(tmp_path, stop, "feddip", rounds=3, sparsity={"initial": 0.4, "final": 0.95})
    loaded, _ = checkpoint.newest(run / "checkpoints")
    built = federation.build(loaded.config, Alone(), torch.device("cpu"))
    whole, mask = loaded.server.weights, loaded.server.mask
    memory, pruned = (scoring.score_model(built, each).top1 for each in (whole, server.pruned(whole, mask)))
    told = finished(run)
    assert (told["dense_memory_accuracy"], told["test_accuracy"]) == (memory, pruned)
    assert memory != pruned and told["server_remembers"]


def test_a_run_that_goes_on_is_not_finished(tmp_path: Path, stop: StopFlag, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(tmp_path, stop, "fedavg", rounds=2)
    assert finished(run)["rounds"] == 2
    real = rounds.play

    def play(built: Any, state: Any, plan: Any, life: Any) -> Record:
        record = real(built, state, plan, life)
        stop.requested = plan.round + 1 == 3
        return record

    monkeypatch.setattr(rounds, "play", play)
    with pytest.raises(Stopped, match="after round 3"):
        session.resume(Alone(), str(run), ["rounds=4"], stop)
    assert not (run / "finished.json").exists()
    stop.requested = False
    session.resume(Alone(), str(run), [], stop)
    assert finished(run)["rounds"] == 4


def last_told(folder: Path) -> config.Config:
    found: Any = SimpleNamespace(config=SAVED, path=folder / "checkpoints" / "round-000004.h5")
    return session._last_told(RunFolder(folder), found)


def test_the_folder_says_what_a_resume_was_told_last(tmp_path: Path) -> None:
    assert last_told(tmp_path) == SAVED
    told = config.override(SAVED, ["rounds=9", "network.latency=5", "watchdog=none"], config.RESUMABLE_KEYS)
    (tmp_path / "config.yaml").write_text(config.to_yaml(told))
    assert last_told(tmp_path) == told


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rounds: 9", "seed is 1, but 7 in round-000004.h5"),
        ("rounds: [", "not valid YAML"),
        ("{rounds: 0, seed: 7}", "rounds: got 0"),
        (b"\xff\xfe", "cannot read the configuration"),
    ],
)
def test_a_configuration_that_is_not_the_runs_is_refused(tmp_path: Path, text: str | bytes, said: str) -> None:
    (tmp_path / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=said) as caught:
        last_told(tmp_path)
    assert "config.yaml" in str(caught.value) and "remove it, and `resume` goes on" in str(caught.value)


def test_a_finished_run_is_not_reopened_before_its_new_configuration_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.finished.touch()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="space"):
        patch.setattr(hdf5, "write_text", refuse)
        session._reopen(folder, SAVED)
    assert folder.finished.exists()
    session._reopen(folder, SAVED)
    assert not folder.finished.exists() and config.load(folder.config) == SAVED
