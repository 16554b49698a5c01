"""Checkpoints written behind training: the bits of the moment they were asked for, and errors that are told in time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from alone import Alone
from torch import nn

from feddip_mpi import checkpoint, config, federation, hdf5, rounds, run_folder, saver
from feddip_mpi.errors import FeddipError
from feddip_mpi.saver import FolderSaver
from feddip_mpi.schedules import plan_round
from feddip_mpi.writer import Writer

RULES: dict[str, dict[str, Any]] = {
    "keep": {},
    "ef21": {"upload": {"residual": "ef21", "values": "int8"}},
    "owed": {"exchange": "sharded", "download": {"values": "int4"}},
    "in_mask_only": {"upload": {"residual": "in_mask_only", "values": "int4"}},
}


def network(in_channels: int, image_size: tuple[int, int], classes: int) -> nn.Module:
    inputs = in_channels * image_size[0] * image_size[1]
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, classes))


class Run:
    """A few rounds of one rank, saved by a FolderSaver."""

    def __init__(
        self, folder: Path, background: bool = True, rule: str = "keep", keep: int = 9, minutes: float | None = None
    ) -> None:
        settings = config.validate({
            "rounds": 9, "clients": 3, "participants": 2, "local_epochs": 1, "batch_size": 20, "learning_rate": 0.05,
            "mask": {"every": 2}, "model": {"name": f"{__name__}:network"}, "sparsity": {"initial": 0.3, "final": 0.8},
            "checkpoint": {"background": background, "keep": keep, "best": False, "minutes": minutes},
            "data": {"name": "synthetic",
                     "synthetic": {"shape": [1, 8, 8], "classes": 3, "train_samples": 60, "test_samples": 20}},
            **RULES[rule],
        })  # fmt: skip
        self.built = federation.build(settings, Alone(), torch.device("cpu"))
        self.folder = run_folder.RunFolder(folder)
        self.folder.checkpoints.mkdir(parents=True)
        self.saver = FolderSaver(self.built, self.folder, "2026-01-02T03:04:05+0000")
        self.state, self.history = rounds.initial_state(self.built), []

    def play(self, count: int = 1) -> None:
        for _ in range(count):
            plan = plan_round(self.built.config, self.state.server.round)
            self.history.append(rounds.play(self.built, self.state, plan))

    def save(self) -> None:
        """As the loop does: the seconds of the last record are set when saving is over."""
        self.saver.save(self.state, self.history)
        self.history[-1]["checkpoint_seconds"] = 1e9

    def saved(self) -> list[int]:
        return [int(path.stem.split("-")[1]) for path in checkpoint.listed(self.folder.checkpoints)]

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.checkpoints.iterdir())


class Gate:
    """Holds back the end of every file until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, then: Callable[[], None] = lambda: None) -> None:
        self.arrived, self._open = threading.Event(), threading.Event()
        real = hdf5.Draft.finish

        def finish(draft: hdf5.Draft, *arguments: Any) -> str:
            self.arrived.set()
            assert self._open.wait(30)
            then()
            return real(draft, *arguments)

        monkeypatch.setattr(hdf5.Draft, "finish", finish)

    def open(self) -> None:
        self._open.set()


def refuse() -> None:
    raise OSError(28, "No space left on device")


def content(path: Path) -> list[Any]:
    """Everything a resume reads, in a form that is equal for equal bits; not the clock's numbers."""
    loaded = checkpoint.load(path)
    clocks = {name for name, field in rounds.metrics.FIELDS.items() if field.depends_on != "config"}
    rows = [{name: value for name, value in row.items() if name not in clocks} for row in loaded.history]
    residuals = [(c, r.round, r.values.numpy().tobytes()) for c, r in checkpoint.read_residuals(path)]
    memories = {name: values.tobytes() for name, values in loaded.memories.items()}
    server = (loaded.server.round, loaded.server.weights.numpy().tobytes(), loaded.server.mask.numpy().tobytes())
    return [rows, residuals, memories, server]


def test_training_goes_on_while_a_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, gate = Run(tmp_path), Gate(monkeypatch)
    run.play(2)
    run.save()
    assert gate.arrived.wait(30)
    run.play(2)  # rounds end although the file cannot
    assert run.state.server.round == 4 and run.saved() == []
    gate.open()
    run.saver.wait()
    assert run.names() == ["round-000002.h5"]


@pytest.mark.parametrize("rule", RULES)
def test_the_file_holds_the_moment_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    """Later rounds change weights, mask, residuals, references and debts, and seconds change the last record."""
    before = Run(tmp_path / "before", background=False, rule=rule)
    behind = Run(tmp_path / "behind", rule=rule)
    for run in (before, behind):
        run.play(3)
    before.save()
    with monkeypatch.context() as patch:
        held = threading.Event()
        real = checkpoint.complete
        # Not a byte is written before the rounds after it are over.
        patch.setattr(checkpoint, "complete", lambda *arguments: held.wait(30) and real(*arguments))
        behind.save()
        behind.play(3)
        held.set()
        behind.saver.wait()
    name = "round-000003.h5"
    one, other = (content(run.folder.checkpoints / name) for run in (before, behind))
    assert one == other
    assert checkpoint.load(behind.folder.checkpoints / name).history[-1]["checkpoint_seconds"] is None


@pytest.mark.parametrize("room", [0, 5000, 1 << 26])
def test_residuals_that_do_not_fit_are_written_before_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    monkeypatch.setattr(saver, "_KEPT_BYTES", room)
    at_once: list[int] = []
    real, main = checkpoint.add_residual, threading.main_thread()

    def add(draft: hdf5.Draft, client: int, residual: Any) -> None:
        if threading.current_thread() is main:
            at_once.append(client)
        real(draft, client, residual)

    monkeypatch.setattr(checkpoint, "add_residual", add)
    run = Run(tmp_path)
    run.play(4)
    run.save()
    run.saver.wait()
    path = run.folder.checkpoints / "round-000004.h5"
    stored = {client: residual.values for client, residual in checkpoint.read_residuals(path)}
    assert stored.keys() == run.state.held.keys() and len(stored) == 3
    assert all(torch.equal(values, run.state.held[client].values) for client, values in stored.items())
    size = 4 * run.built.layout.prunable
    assert len(at_once) == max(0, 3 - room // size)
    checkpoint.verify(path)


def test_the_next_save_waits_and_tells_what_went_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    run.play()
    run.save()
    run.saver.wait()
    gate = Gate(monkeypatch, refuse)
    run.play()
    run.save()
    assert gate.arrived.wait(30)
    gate.open()
    run.play()
    with pytest.raises(FeddipError, match=r"round-000002.h5: cannot be saved \(No space left on device\); earlier"):
        run.save()
    assert run.names() == ["round-000001.h5"]
    run.saver.wait()  # told once


def test_the_end_tells_it_too_and_close_only_logs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path)
    Gate(monkeypatch, refuse).open()
    run.play()
    run.save()
    with pytest.raises(FeddipError, match="round-000001.h5: cannot be saved"):
        run.saver.wait()
    run.save()
    run.saver.close()
    assert "round-000001.h5: cannot be saved" in caplog.text
    assert run.names() == []


def test_the_last_round_is_saved_before_its_seconds_are_taken(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.play(9)
    run.save()
    assert run.saved() == [9]


def test_a_save_is_overdue_so_many_minutes_after_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(saver, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def overdue(run: Run, seconds: float) -> bool:
        now[0] = seconds
        return run.saver.overdue()

    run, never = Run(tmp_path / "run", minutes=2.5), Run(tmp_path / "never")
    assert [overdue(run, 1000 + seconds) for seconds in (0, 149, 150)] == [False, False, True]
    run.play()
    now[0] = 1200
    run.save()
    run.saver.wait()
    assert [overdue(run, 1200 + seconds) for seconds in (0, 149, 150)] == [False, False, True]
    assert not overdue(never, 1e9)


def test_old_files_go_when_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, keep=1)
    run.play()
    run.save()
    run.saver.wait()
    gate = Gate(monkeypatch)
    run.play()
    run.save()
    assert gate.arrived.wait(30)
    assert run.saved() == [1]
    gate.open()
    run.saver.wait()
    assert run.names() == ["round-000002.h5"]


def test_an_old_file_that_cannot_go_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path, keep=1)
    run.play()
    run.save()
    with monkeypatch.context() as patch:
        unlink = Path.unlink

        def stale(path: Path, missing_ok: bool = False) -> None:
            if path.name == "round-000001.h5":
                raise OSError(116, "Stale file handle")
            unlink(path, missing_ok)

        patch.setattr(Path, "unlink", stale)
        run.play()
        run.save()
        run.saver.wait()
    assert run.saved() == [1, 2]
    assert "round-000001.h5: cannot be tidied up (Stale file handle)" in caplog.text
    run.play()
    run.save()
    run.saver.wait()
    assert run.saved() == [3]


def test_a_folder_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.play()
    run.folder.checkpoints.rmdir()
    with pytest.raises(FeddipError, match="round-000001.h5: cannot be saved \\(No such file or directory\\)"):
        run.save()


def test_an_error_of_the_program_itself_is_not_swallowed() -> None:
    writer = Writer()
    writer.begin(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ZeroDivisionError):
        writer.wait()
    assert writer.wait() is None


def test_nobody_waits_for_the_thread_of_a_process_that_is_ended() -> None:
    writer, release = Writer(), threading.Event()
    writer.begin(lambda: release.wait(30) and None)  # type: ignore[arg-type, return-value]
    assert [thread.daemon for thread in threading.enumerate() if thread.name == "checkpoint"] == [True]
    release.set()
    writer.wait()
