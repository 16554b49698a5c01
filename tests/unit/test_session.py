"""Commands of one rank without MPI, from their start to the folder that they leave."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from alone import Alone
from test_methods import settings

from feddip_mpi import checkpoint, config, federation, rounds, runtime, scoring, server, session
from feddip_mpi.errors import Stopped
from feddip_mpi.metrics import Record


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> runtime.StopFlag:
    """What a signal would set. This process keeps its own signals and its log, and no picture is drawn."""
    flag = runtime.StopFlag()
    monkeypatch.setattr(runtime.StopFlag, "installed", lambda: flag)
    monkeypatch.setattr(runtime, "start_log", lambda folder, rank: None)
    monkeypatch.setattr(session, "_draw", lambda built, folder, history: None)
    return flag


def alone() -> Any:
    return Alone()


def train(folder: Path, method: str, **values: Any) -> Path:
    """A finished run's folder."""
    path, run = folder / "config.yaml", folder / "run"
    path.write_text(config.to_yaml(settings(method, device="cpu", **values)))
    session.train(alone(), str(path), [], str(run))
    return run


def finished(run: Path) -> dict[str, Any]:
    return json.loads((run / "finished.json").read_text())


def test_the_memory_is_scored_without_the_mask(tmp_path: Path, stop: runtime.StopFlag) -> None:
    run = train(tmp_path, "feddip", rounds=3, sparsity={"initial": 0.4, "final": 0.95})
    loaded, _ = checkpoint.newest(run / "checkpoints")
    built = federation.build(loaded.config, alone(), torch.device("cpu"))
    whole, mask = loaded.server.weights, loaded.server.mask
    memory, pruned = (scoring.score_model(built, each).top1 for each in (whole, server.pruned(whole, mask)))
    told = finished(run)
    assert (told["dense_memory_accuracy"], told["test_accuracy"]) == (memory, pruned)
    assert memory != pruned and told["server_remembers"]


def test_a_run_that_goes_on_is_not_finished(
    tmp_path: Path, stop: runtime.StopFlag, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(tmp_path, "fedavg", rounds=2)
    assert finished(run)["rounds"] == 2
    real = rounds.play

    def play(built: Any, state: Any, plan: Any, life: Any) -> Record:
        record = real(built, state, plan, life)
        stop.requested = plan.round + 1 == 3
        return record

    monkeypatch.setattr(rounds, "play", play)
    with pytest.raises(Stopped, match="after round 3"):
        session.resume(alone(), str(run), ["rounds=4"])
    assert not (run / "finished.json").exists()
    stop.requested = False
    session.resume(alone(), str(run), [])
    assert finished(run)["rounds"] == 4
