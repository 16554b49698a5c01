"""Ranks that are killed, under an MPI that survives it: the others go on, with the right bits, or all end soon."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import launch
import pytest
import runs
import torch

from feddip_mpi import checkpoint, federation
from feddip_mpi.checkpoint import Snapshot

pytestmark = pytest.mark.mpi

TINY = {"model__name": "small_models:dropping", "recovery_timeout": 20}
DROP = {"upload__residual": "drop", "on_rank_failure": "continue"}
SEVEN = {"model__name": "small_models:side_by_side", "participants": 7, "checkpoint__background": False}


@pytest.fixture(scope="module")
def never_failed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs `keep`, `drop`, `ssfl` and `seven` on one rank."""
    folder = tmp_path_factory.mktemp("never")
    cases: dict[str, dict[str, Any]] = {"keep": {}, "drop": DROP, "ssfl": {"method": "ssfl"}, "seven": SEVEN}
    argv = [runs.train(config, folder / name, **{**TINY, **changes}) for name, changes in cases.items()]
    runs.play([{"argv": words} for words in argv], folder / "steps", None)
    return folder


def killed(config: Path, run: Path, faults: str, ranks: int = 3, sleep: float = 0.0, **changes: Any) -> launch.Result:
    """Train on ranks of which FEDDIP_FAULT kills some; mpirun's exit code says nothing then, and is not looked at."""
    argv = [*launch.FEDDIP, *runs.train(config, run, **{**TINY, **changes})]
    extra = {"FEDDIP_FAULT": faults, "FEDDIP_TEST_FAULTS": "1", "FEDDIP_TEST_SLEEP": str(sleep)}
    done = launch.run(argv, ranks, "ulfm", 90, extra)
    assert done.orphans == 0, done.text
    return done


def lost_ranks(run: Path) -> list[int]:
    return json.loads((run / "finished.json").read_text())["ranks_lost"]


def test_every_call_tells_of_a_death_and_the_others_shrink() -> None:
    program = launch.PROGRAMS / "deaths.py"
    checks = re.findall(r"^def (check_\w+)", program.read_text(encoding="utf-8"), re.MULTILINE)
    done = launch.run([str(program)], len(checks) + 1, "ulfm", 60)
    assert re.findall(r"passed (\w+)", done.text) == checks, done.text
    assert done.orphans == 0 and "leave() came back" not in done.text


def test_rewind_changes_no_bit_down_to_one_rank(config: Path, never_failed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    faults = "rank=1 phase=exchange round=4; rank=0 phase=train round=5 delay=2"
    # Else rank 0 may die before the file of round 4 is complete.
    done = killed(config, run, faults, checkpoint__background=False)
    assert (run / "finished.json").exists(), done.text
    assert lost_ranks(run) == [1, 0]
    ours, theirs = (runs.contents(runs.newest(path)) for path in (never_failed / "keep", run))
    assert [name for name in ours if ours[name] != theirs[name]] == ["config"] and len(ours) == len(theirs)
    rows = runs.lines(run)
    assert [row["round"] for row in rows] == [1, 2, 3, 4, 5], "rows of rounds that were played twice stand there once"
    assert [row["ranks"] for row in rows] == [3, 3, 2, 2, 1]
    log = (run / "run.log").read_text()
    assert "rank 1 of the start died: 2 go on after round 2 (rewound to round-000002.h5)" in log
    assert "rank 1, 0 of the start died: 1 go on after round 4 (rewound to round-000004.h5)" in log


def test_rewind_while_clients_train_at_once_changes_no_bit(config: Path, never_failed: Path, tmp_path: Path) -> None:
    """A rank dies while clients train side by side on all; the others end theirs and begin again, down to one rank."""
    run = tmp_path / "run"
    # A client takes 4 batches of at least 20 ms: all are in mid-training when the rank dies.
    faults = "rank=1 phase=train round=4 delay=30; rank=0 phase=train round=5 delay=30"
    done = killed(config, run, faults, 3, 0.02, clients_at_once=2, **SEVEN)
    assert (run / "finished.json").exists(), done.text
    assert lost_ranks(run) == [1, 0]
    ours, theirs = (runs.contents(runs.newest(path)) for path in (never_failed / "seven", run))
    assert [name for name in ours if ours[name] != theirs[name]] == ["config"] and len(ours) == len(theirs)
    assert [row["ranks"] for row in runs.lines(run)] == [3, 3, 2, 2, 1]
    log = (run / "run.log").read_text()
    assert "rank 1 of the start died: 2 go on after round 2 (rewound to round-000002.h5)" in log
    assert "rank 1, 0 of the start died: 1 go on after round 4 (rewound to round-000004.h5)" in log


def test_continue_plays_no_round_twice(config: Path, never_failed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = killed(config, run, "rank=0 phase=decode round=4", **DROP)
    assert (run / "finished.json").exists(), done.text
    runs.assert_equal(never_failed / "drop", run)
    assert [row["ranks"] for row in runs.lines(run)] == [3, 3, 3, 2, 2]
    log = (run / "run.log").read_text()
    assert "residuals lost: none" in log and "2 go on after round 3 (nothing is played again)" in log


def test_continue_says_what_is_lost(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changes = {"on_rank_failure": "continue", "exchange": "sharded", "download__values": "int8"}
    done = killed(config, run, "rank=1 phase=encode round=4", **changes)
    assert (run / "finished.json").exists(), done.text
    rows = runs.lines(run)
    assert [row["round"] for row in rows] == [1, 2, 3, 4, 5]
    told = re.findall(r"WARNING residuals lost: (.*)", (run / "run.log").read_text())
    assert len(told) == 1 and told[0].endswith("; what the dead ranks had rounded off the sums")
    clients = [(int(client), int(round)) for client, round in re.findall(r"client (\d+) \(round (\d+)\)", told[0])]
    # Saved after round 2: of the rank's clients those are lost that took part in round 3.
    assert clients and all(round == 3 and client in rows[2]["participants"] for client, round in clients)
    assert [row["residuals_lost"] for row in rows] == [0, 0, 0, len(clients), 0]


def test_abort_ends_all_and_resume_goes_on(config: Path, never_failed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = killed(config, run, "rank=2 phase=evaluate round=4 delay=1", on_rank_failure="abort")
    assert done.code != 0 and not (run / "finished.json").exists(), done.text
    assert "a rank died" in done.text and f"resume {run}" in done.text
    launch.run([*launch.FEDDIP, "resume", str(run), "--set", "on_rank_failure=rewind"], 2).expect(0)
    ours, theirs = (runs.contents(runs.newest(path)) for path in (never_failed / "keep", run))
    assert ours == theirs


@pytest.mark.parametrize("policy", ["rewind", "continue"])
def test_a_death_in_the_opening_begins_it_again(policy: str, config: Path, never_failed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = killed(config, run, "rank=1 phase=opening round=1", method="ssfl", on_rank_failure=policy)
    assert (run / "finished.json").exists(), done.text
    ours, theirs = (runs.contents(runs.newest(path)) for path in (never_failed / "ssfl", run))
    assert [name for name in ours if ours[name] != theirs[name]] in ([], ["config"]) and len(ours) == len(theirs)
    assert [row["ranks"] for row in runs.lines(run)] == [2] * 5
    assert "2 go on after round 0 (from the start: nothing was saved)" in (run / "run.log").read_text()


def test_a_rank_that_ends_by_an_error_of_its_own_is_survived(config: Path, tmp_path: Path) -> None:
    """Memory that Python or torch cannot have is an exception; memory that the kernel takes back is a kill."""
    run = tmp_path / "run"
    argv = [*launch.FEDDIP, *runs.train(config, run, **{**TINY, "model__name": "small_models:fragile"})]
    done = launch.run(argv, 3, "ulfm", 90, {"FEDDIP_TEST_FAULT": "raise:1:9"})
    assert (run / "finished.json").exists() and done.orphans == 0, done.text
    assert "RuntimeError: this test's model breaks" in done.text
    assert "rank 1 failed: it ends, the others go on without it" in done.text
    assert lost_ranks(run) == [1] and [row["round"] for row in runs.lines(run)] == [1, 2, 3, 4, 5]


def test_an_error_that_every_rank_has_ends_all(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    argv = [*launch.FEDDIP, *runs.train(config, run, **{**TINY, "model__name": "small_models:fragile"})]
    done = launch.run(argv, 2, "ulfm", 90, {"FEDDIP_TEST_FAULT": "raise:all:9"})
    assert not (run / "finished.json").exists() and done.orphans == 0, done.text
    assert done.text.count("RuntimeError: this test's model breaks") == 2, done.text


def test_a_death_before_the_first_round_ends_all(config: Path, tmp_path: Path) -> None:
    done = killed(config, tmp_path / "run", "rank=1 phase=setup round=1")
    assert done.code != 0 and not (tmp_path / "run" / "finished.json").exists()
    assert "a rank died" in done.text


def test_faults_are_for_tests_only(config: Path, tmp_path: Path) -> None:
    argv = [*launch.FEDDIP, *runs.train(config, tmp_path / "run", **TINY)]
    done = launch.run(argv, None, extra={"FEDDIP_FAULT": "rank=0 phase=train round=1"}).expect(2)
    assert "FEDDIP_TEST_FAULTS=1" in done.text


def test_continue_equals_a_resume_of_what_is_left(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in round 4, saved after round 2: as if one had stopped after round 3, put back what was lost, and resumed."""
    run, stopped = tmp_path / "run", tmp_path / "stopped"
    done = killed(config, run, "rank=1 phase=encode round=4", on_rank_failure="continue")
    assert (run / "finished.json").exists(), done.text
    told = re.findall(r"WARNING residuals lost: (.*)", (run / "run.log").read_text())
    lost = [int(client) for client in re.findall(r"client (\d+) \(round 3\)", told[0])]
    assert lost

    changes = {**TINY, "on_rank_failure": "continue"}
    runs.play([{"argv": runs.train(config, stopped, **changes), "stop_after": 3}], tmp_path / "steps", 3)
    monkeypatch.syspath_prepend(str(launch.PROGRAMS))
    put_back(checkpoint.path_of(stopped / "checkpoints", 3), checkpoint.path_of(stopped / "checkpoints", 2), lost)
    runs.play([{"argv": ["resume", str(stopped)]}], tmp_path / "rest", 2)
    runs.assert_equal(run, stopped)


def put_back(newer: Path, older: Path, clients: list[int]) -> None:
    """Write `newer` again, with the residuals that these clients have in `older`."""
    loaded = checkpoint.load(newer)
    _, layout = federation.build_model(loaded.config, loaded.input_shape, loaded.classes)
    held, before = dict(checkpoint.read_residuals(newer)), dict(checkpoint.read_residuals(older))
    assert any(not torch.equal(held[c].values, before[c].values) if c in before else c in held for c in clients)
    for client in clients:
        held.pop(client, None)
        if client in before:
            held[client] = before[client]
    known = {field.name: getattr(loaded, field.name) for field in fields(Snapshot) if field.name != "layout"}
    checkpoint.save(newer, Snapshot(layout=layout, **known), sorted(held.items()))
