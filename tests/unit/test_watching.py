"""What `watch` shows of a run folder: running, stopped, half-written, replaced while it is read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import made_runs
import pytest

from feddip_mpi import checkpoint, hdf5, metrics
from feddip_mpi.errors import InputError
from feddip_mpi.report import watching
from feddip_mpi.run_folder import Lock, RunFolder


@pytest.fixture
def running(tmp_path: Path) -> RunFolder:
    return RunFolder(made_runs.make(tmp_path / "run", finished=False))


def shown(folder: RunFolder) -> dict[str, str]:
    return dict(watching.rows(watching.look(folder)))


def test_the_numbers_of_a_run_at_work(running: RunFolder) -> None:
    running.path.joinpath("run.log").write_text("one\n\ntwo\n")
    lines = running.metrics.read_text().splitlines(True)
    running.metrics.write_text("".join(lines[:2]))
    lock = Lock(running)
    found = shown(running)
    lock.release()
    assert found["state"].startswith("at work: process")
    assert found["round"] == "2 of 3 (67 %)"
    assert found["accuracy"] == "0.4000 in round 2, best 0.4000 in round 2"
    assert found["uploaded"] == "200 B, dense 2.0 kB (10.0 times)"
    assert found["seconds"].startswith("2.00 for the last round: train 1.00, encode 0.10")
    assert found["time left"].startswith("0:00:02")
    assert watching.look(running).log == ("one", "two")
    assert "nobody is at work" in shown(running)["state"]


def test_a_run_that_failed_says_why(running: RunFolder) -> None:
    made_runs.fail(running.path)
    assert shown(running)["state"] == "failed: client 1 (rank 0) diverged in round 1: loss nan"
    lock = Lock(running)
    assert shown(running)["state"].startswith("at work")  # another start
    lock.release()
    with open(running.log, "a") as log:
        log.write("2026-11-27 02:00:00,000 rank 0 INFO resume\n")
    assert "nobody is at work" in shown(running)["state"]


def test_what_was_read_is_not_read_again_until_the_run_is_resumed(
    running: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of a run with many participants is long, and a look comes every second."""
    lines = running.metrics.read_text().splitlines(True)
    running.metrics.write_text("".join(lines[:2]) + lines[2][:20])
    read, real, parsed = watching.Records(running.metrics), json.loads, []
    monkeypatch.setattr(watching.json, "loads", lambda text: parsed.append(text) or real(text))
    assert [row["round"] for row in watching.look(running, read).records] == [1, 2]
    with open(running.metrics, "a") as file:
        file.write(lines[2][20:])
    view = watching.look(running, read)
    assert [row["round"] for row in view.records] == [1, 2, 3] and len(parsed) == 3
    assert not any(isinstance(value, (list, dict)) for row in view.records for value in row.values())
    hdf5.write_text(running.metrics, lines[0])  # as a resume does
    assert [row["round"] for row in watching.look(running, read).records] == [1]
    running.metrics.unlink()
    assert watching.look(running, read).records == ()


def test_before_the_first_round(running: RunFolder) -> None:
    running.metrics.unlink()
    found = shown(running)
    assert found["round"] == "0 of 3 (0 %)" and "accuracy" not in found and "time left" not in found


@pytest.mark.parametrize("cut", [1, 7, 200])
def test_half_a_line_is_no_round(running: RunFolder, cut: int) -> None:
    whole = running.metrics.read_bytes()
    running.metrics.write_bytes(whole[:-cut])
    assert len(watching.look(running).records) == 2
    running.metrics.write_bytes(whole + b'{"round": 4, "\xff\n[1, 2]\n')
    assert [row["round"] for row in watching.look(running).records] == [1, 2, 3]


@pytest.mark.parametrize(
    "wrong", [{"test_accuracy": "high"}, {"round_seconds": []}, {"round": True}, {"sparsity": "half"}]
)
def test_a_record_of_something_else_is_passed_over(running: RunFolder, wrong: dict[str, object]) -> None:
    lines = running.metrics.read_text().splitlines(True)
    foreign = json.dumps(json.loads(lines[0]) | {"round": 9} | wrong)
    running.metrics.write_text("".join([*lines[:2], foreign + "\n", "[" * 100_000 + "\n"]))
    view = watching.look(running)
    assert [row["round"] for row in view.records] == [1, 2]
    assert dict(watching.rows(view))["round"].startswith("2 of ")


def test_finished(tmp_path: Path) -> None:
    found = shown(RunFolder(made_runs.make(tmp_path / "run")))
    assert found["state"] == "finished" and "time left" not in found and "last written" not in found


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run folder"):
        watching.watch(str(tmp_path), once=True)


def test_a_folder_of_run_folders_is_told_from_a_foreign_one(tmp_path: Path) -> None:
    for name in ("b", "a"):
        made_runs.make(tmp_path / name)
    way_out = f"it holds 2 run folders: name one of them, such as {re.escape(str(tmp_path / 'a'))}"
    for refuse in (
        lambda: watching.watch(str(tmp_path), once=True),
        lambda: checkpoint.find(tmp_path),
    ):
        with pytest.raises(InputError, match=way_out):
            refuse()


def test_lines_follow_the_run_to_its_end(
    running: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is written while it is watched, goes back to a checkpoint once, and finishes."""
    monkeypatch.setenv("FEDDIP_PROGRESS", "plain")
    rows = [json.loads(line) for line in running.metrics.read_text().splitlines()]

    def played() -> Iterator[None]:
        for written in ([0], [0, 1], [0], [0, 1], [0, 1, 2]):
            text = "".join(metrics.to_line(rows[place]) + "\n" for place in written)
            (running.path / "new").write_text(text)
            (running.path / "new").replace(running.metrics)
            yield
        running.finished.write_text("{}")
        yield

    running.metrics.unlink()
    steps = played()
    monkeypatch.setattr(watching.time, "sleep", lambda seconds: next(steps))
    watching.watch(str(running.path), once=False)
    said = capsys.readouterr().out.splitlines()
    rounds = [line.split()[1] for line in said if line.startswith("round")]
    assert rounds == ["1/3", "2/3", "2/3", "3/3"]
    assert said[-1] == "finished"


def test_the_live_view_ends_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("FEDDIP_PROGRESS", "rich")
    watching.watch(str(made_runs.make(tmp_path / "run")), once=False)
    assert "3 of 3" in capsys.readouterr().out
