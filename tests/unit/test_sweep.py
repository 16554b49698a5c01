"""Sweeps: from a grid to cells, what is done of them, the estimate, who is started; with a runner that trains nothing."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import made_runs
import pytest

from feddip_mpi import config, run_folder, settings
from feddip_mpi.errors import FolderBusy, InputError, Stopped
from feddip_mpi.run_folder import Lock, RunFolder
from feddip_mpi.sweep import command, estimate, grid, labels, runner, slurm, states
from feddip_mpi.sweep.grid import Cell
from feddip_mpi.sweep.states import State

ROOT = Path(__file__).parents[2]
TINY = {"data": {"name": "synthetic"}, "rounds": 2, "clients": 4, "participants": 2}


def cells(text: str, base: str = "") -> list[Cell]:
    return grid.cells(config.read_mapping(f"base: {json.dumps(TINY)}\n{base}\n{text}", "grid.yaml"), "grid.yaml", ROOT)


def names(text: str) -> list[str]:
    return [cell.name for cell in cells(text)]


METHODS = """
grid:
  method:
    fedavg: {method: fedavg, sparsity: {initial: 0, final: 0}}
    feddip: {method: feddip}
  sparsity.final: [0.9, 0.95]
  seed: [1, 2]
"""


def test_labels_win_and_equal_cells_are_one() -> None:
    made = cells(METHODS)
    assert [cell.name for cell in made] == [
        "fedavg_seed-1", "fedavg_seed-2", "feddip_sparsity-0.9_seed-1", "feddip_sparsity-0.9_seed-2",
        "feddip_sparsity-0.95_seed-1", "feddip_sparsity-0.95_seed-2",
    ]  # fmt: skip
    assert [(c.config.method, c.config.sparsity.final, c.config.seed) for c in made] == [
        ("fedavg", 0, 1), ("fedavg", 0, 2), ("feddip", 0.9, 1), ("feddip", 0.9, 2), ("feddip", 0.95, 1), ("feddip", 0.95, 2),
    ]  # fmt: skip
    assert all(cell.config.rounds == 2 for cell in made)


def test_a_method_without_a_mask_is_one_cell_for_all_sparsities() -> None:
    text = "grid: {method: [fedavg, feddip], sparsity.final: [0.5, 0.9], penalty.schedule: [steps, off]}"
    made = names(text)
    assert made[0] == "fedavg_sparsity-0.5_schedule-steps" and len(made) == 1 + 4
    assert all(name.startswith("feddip_") for name in made[1:])


def test_exclude_and_also() -> None:
    text = (
        METHODS + "exclude: [{method: feddip, sparsity.final: 0.9, seed: [2]}]\nalso: [{method: feddip, seed: [7, 8]}]"
    )
    assert names(text)[2:] == [
        "feddip_sparsity-0.9_seed-1", "feddip_sparsity-0.95_seed-1", "feddip_sparsity-0.95_seed-2", "feddip_seed-7",
        "feddip_seed-8",
    ]  # fmt: skip


def test_names_never_collide() -> None:
    text = 'grid: {partition: {"a/b": {data.alpha: 0.1}, "a?b": {data.alpha: 0.2}, "A-B": {data.alpha: 0.3}}}'
    made = names(text)
    assert made[0] == "a-b" and len({name.lower() for name in made}) == 3
    assert made == names(text)  # the same names next time
    assert all(set(name) <= set("abAB-_0123456789cdef") for name in made)


def test_keys_with_equal_endings_are_told_apart() -> None:
    made = names("grid: {checkpoint.every: [1, 2], eval.every: [1]}")
    assert made == ["checkpoint.every-1_eval.every-1", "checkpoint.every-2_eval.every-1"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "grid: {seed: [1], sparsity.final: [0.9, 1.5]}",
            ["cell seed-1_sparsity-1.5: sparsity.final: got 1.5", "nothing"],
        ),
        ("grid: {seeds: [1, 2]}", ["cell seeds-1 and 1 more: seeds: unknown key; did you mean 'seed'?"]),
        ("grid: {participants: [2, 5]}", ["cell participants-5: participants: got 5, more than clients = 4"]),
        ("grid: {}", ["grid: got {}"]),
        ("grid: {seed: 3}", ["grid: seed: got 3; give a list"]),
        ("grid: {seed: [1]}\nexclude: [{sed: 1}]", ["exclude: sed: no axis of the grid; its axes: seed"]),
        ("grid: {seed: [1]}\nexclude: [{seed: 4}]", ["exclude: seed: got 4; the axis has 1"]),
        ("grid: {seed: [1]}\nexclude: [{seed: 1}]", ["no cell is left"]),
        ("grid: {seed: [1]}\nalso: [{on: 1}]", ["cell True-1: True: unknown key"]),
        ("gird: {seed: [1]}", ["gird: unknown key of a grid; did you mean 'grid'?"]),
        ("grid: {a: {x: {seed: 1}}, b: {y: {seed: 2}}}", ["seed: a=x sets 1, b=y sets 2"]),
        ("grid: {a: {x: 3}}", ["grid: a: x: got 3; give keys and values"]),
        ("grid: {method: {m: {rounds.x: 1}}}", ["'rounds' holds the value 2, not a section"]),
    ],
)
def test_mistakes_name_the_cell_and_the_key(text: str, said: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        cells(text)
    assert caught.value.exit_code == 2
    assert all(part in str(caught.value) for part in said), str(caught.value)


def test_a_label_may_begin_with_a_file_that_gives_way(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("seed: 9\nmethod: fedavg\nrounds: 7\nlearning_rate: 0.3\nparticipants: 3\n")
    text = """
base: {rounds: 2, clients: 4, participants: 2}
set: {rounds: 5}
grid: {method: {m: {file: m.yaml, participants: 4}}, seed: [1]}
"""
    (cell,) = grid.cells(config.read_mapping(text, "g"), "g", tmp_path)
    c = cell.config
    assert (c.method, c.learning_rate, c.rounds, c.participants, c.seed) == ("fedavg", 0.3, 5, 4, 1)
    assert cell.name == "m_seed-1" and cell.labels == {"method": "m"}
    (tmp_path / "m.yaml").write_text("rounds: many\n")
    with pytest.raises(InputError, match=r"m\.yaml: 1 problem:\n  rounds: got 'many'"):
        grid.cells(config.read_mapping(text, "g"), "g", tmp_path)
    with pytest.raises(InputError, match="cannot read the configuration"):
        grid.cells(config.read_mapping(text.replace("m.yaml", "n.yaml"), "g"), "g", tmp_path)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("base: nope.yaml\ngrid: {seed: [1]}\n", "base"),
        ("grid:\n  method:\n    mine: {file: nope.yaml}\n", "grid: method: mine: file"),
    ],
)
def test_a_file_that_is_not_there_is_told_with_its_grid_and_key(text: str, place: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as told:
        grid.load(path)
    assert str(told.value).startswith(
        f"{path}: {place}: cannot read the configuration '{tmp_path}/nope.yaml': No such file"
    )
    with pytest.raises(InputError, match=r"cannot read the grid '.*': Is a directory; .*configs/study"):
        grid.load(tmp_path)


def test_the_grids_are_good() -> None:
    files = sorted((ROOT / "configs" / "study").glob("*.yaml"))
    assert "fashion-mnist" in [file.stem for file in files]
    for file in files:
        made = grid.load(file)
        assert len({cell.name for cell in made}) == len(made)
    study = {cell.name: cell.config for cell in grid.load(ROOT / "configs" / "study" / "fashion-mnist.yaml")}
    assert {c.method for c in study.values()} == set(settings.METHODS)
    assert {c.seed for c in study.values()} == {1, 2, 3} and {c.rounds for c in study.values()} == {100}
    assert {c.sparsity.final for c in study.values() if c.method == "feddip"} == {0.8, 0.9, 0.95, 0.98, 0.99}
    assert len(study) == 4 * 3 * (2 + 12 * 5)  # partitions, seeds, dense methods and the others at five sparsities
    assert study["dirichlet-0.1_feddip_sparsity-0.98_seed-3"].data.alpha == 0.1
    assert study["pathological-2_fedavg_seed-1"].upload.values == "fp32"


# states


def begun(cell: Cell, out: Path, rounds: int = 0, finished: bool = False) -> RunFolder:
    folder = RunFolder(out / cell.name)
    folder.create(cell.config).release()
    row = {"train_seconds": 2.0, "evaluate_seconds": 0.5, "round_seconds": 3.0, "samples": 100, "test_accuracy": 0.5}
    folder.metrics.write_text("".join(json.dumps({"round": r + 1, **row}) + "\n" for r in range(rounds)))
    if finished:
        folder.finished.write_text(json.dumps({"rounds": cell.config.rounds}))
    return folder


def test_states(tmp_path: Path) -> None:
    one, two, three, four, five = cells("grid: {seed: [1, 2, 3, 4, 5]}")
    begun(two, tmp_path, 1)
    begun(three, tmp_path, 2, finished=True)
    lock = Lock(begun(four, tmp_path, 1))
    begun(five, tmp_path, 2).finished.write_text("{")
    assert states.look(one, tmp_path) == State(states.NEW)
    assert states.look(two, tmp_path) == State(states.UNFINISHED, 1)
    assert states.look(three, tmp_path) == State(states.FINISHED, 2)
    assert states.look(four, tmp_path).kind == states.BUSY and "process" in states.look(four, tmp_path).remark
    assert "finished.json is damaged" in states.look(five, tmp_path).remark
    lock.release()
    assert states.look(four, tmp_path).kind == states.UNFINISHED
    Lock(RunFolder(tmp_path / four.name)).release()  # to look takes nothing away


def test_a_cell_that_failed_says_so_and_is_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = cells("grid: {seed: [1, 2]}", "set: {rounds: 4}")
    made_runs.fail(begun(made[0], tmp_path, 1).path)
    begun(made[1], tmp_path, 4, finished=True)
    found = [states.look(cell, tmp_path) for cell in made]
    error = "error: client 1 (rank 0) diverged in round 1: loss nan"
    assert found[0] == State(states.FAILED, 1, error)
    command._show_plan(made, found, tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert "1 failed, 1 finished" in said and f"seed-1: {error}" in said
    paces = estimate.known_paces(made, found, tmp_path)
    left = estimate.estimate(made, found, tmp_path, paces, lambda c: 40, lambda c: (1, 1))
    assert left.seconds is not None and left.seconds > 0
    outcomes = runner.run(made, tmp_path, Fake(tmp_path, {}), 1, print, runner.Stop())
    assert [outcome.kind for outcome in outcomes] == ["finished"]
    assert "seed-1: goes on after round 1" in capsys.readouterr().out


def test_a_folder_that_is_being_made_is_busy_and_one_half_made_is_begun(tmp_path: Path) -> None:
    """The lock and checkpoints/ come before config.yaml."""
    (cell,) = cells("grid: {seed: [1]}")
    folder = RunFolder(tmp_path / cell.name)
    folder.checkpoints.mkdir(parents=True)
    lock = Lock(folder)
    assert states.look(cell, tmp_path).kind == states.BUSY
    with pytest.raises(InputError, match="another job is at work"):
        folder.create(cell.config)
    (folder.path / ".config.yaml.tmp-77").write_text("rounds: ")
    assert states.look(cell, tmp_path).kind == states.BUSY
    lock.release()  # its maker died
    assert states.look(cell, tmp_path) == State(states.NEW)
    folder.create(cell.config).release()
    assert states.look(cell, tmp_path).kind == states.UNFINISHED and not list(folder.path.glob(".config*"))
    with pytest.raises(InputError, match="holds files already"):
        folder.create(cell.config)


def test_whoever_looks_keeps_no_job_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`holder` takes the lock for a moment; a job that starts just then waits that long."""
    folder, waits = begun(cells("grid: {seed: [1]}")[0], tmp_path), list[float]()
    with open(folder.lock_file) as file:
        fcntl.flock(file, fcntl.LOCK_SH)

        def waited(seconds: float) -> None:
            waits.append(seconds)
            if sum(waits) > 0.1:
                fcntl.flock(file, fcntl.LOCK_UN)

        monkeypatch.setattr(run_folder.time, "sleep", waited)
        Lock(folder).release()
    assert len(waits) > 1
    monkeypatch.setattr(run_folder.time, "sleep", waits.append)
    with open(folder.lock_file) as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        with pytest.raises(InputError, match="another job is at work"):
            Lock(folder)


def test_a_lock_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file server may keep that of a node that died for a while."""
    folder = begun(cells("grid: {seed: [1]}")[0], tmp_path)
    dead = Lock(folder)
    threading.Timer(0.5, dead.release).start()
    Lock(folder, 30).release()
    assert caplog.text.count("waits up to 30 s for another job to leave this run folder (process") == 1
    alive = Lock(folder)
    with pytest.raises(
        FolderBusy, match=r"another job is at work .*, also after 0.2 s of waiting; wait for its end"
    ) as caught:
        Lock(folder, 0.2)
    assert caught.value.exit_code == 7
    with pytest.raises(FolderBusy):
        Lock(folder, 30, lambda: True)  # a signal came
    alive.release()


def test_a_lock_is_waited_for_longer_where_nobody_sits_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")
    for name in jobs:
        monkeypatch.delenv(name, raising=False)
    assert run_folder.lock_seconds() == 10
    for name in jobs:
        with monkeypatch.context() as patch:
            patch.setenv(name, "7")
            assert run_folder.lock_seconds() == 300


def test_missing_data_is_found_before_the_first_cell(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(
        "base: {rounds: 1, clients: 2, participants: 1, data: {name: npz, path: none.npz}}\ngrid: {seed: [1]}\n"
    )
    with pytest.raises(InputError, match=r"cell seed-1: .*none\.npz"):
        command.sweep(str(tmp_path / "grid.yaml"), str(tmp_path / "runs"), 1, "", False, False)
    assert not (tmp_path / "runs").exists()


def test_a_changed_grid_reuses_nothing_silently(tmp_path: Path) -> None:
    (old,) = cells("grid: {seed: [1]}")
    begun(old, tmp_path, 2, finished=True)
    (new,) = cells("grid: {seed: [1]}", "set: {learning_rate: 0.2, mask.every: 7}")
    assert new.name == old.name
    state = states.look(new, tmp_path)
    assert (state.kind, state.rounds) == (states.REFUSED, 2)
    assert "learning_rate is 0.1 there, 0.2 in the grid; mask.every is 5 there, 7 in the grid" in state.remark
    with pytest.raises(InputError, match="1 of 1 cells have a folder that is not theirs"):
        states.require_none_refused([new], [state], tmp_path)
    (same,) = cells("grid: {seed: [1]}", "set: {checkpoint.every: 3, stop_grace: 5, data.path: /elsewhere}")
    assert states.look(same, tmp_path).kind == states.FINISHED


def test_own_arrays_from_another_file_are_other_data(tmp_path: Path) -> None:
    (old,) = cells("grid: {seed: [1]}", "set: {data.name: npz, data.path: one.npz}")
    begun(old, tmp_path, 2, finished=True)
    (new,) = cells("grid: {seed: [1]}", "set: {data.name: npz, data.path: other.npz}")
    state = states.look(new, tmp_path)
    assert state.kind == states.REFUSED
    one, other = (str(Path(name).absolute()) for name in ("one.npz", "other.npz"))
    assert f"data.path is {one!r} there, {other!r} in the grid" in state.remark
    assert states.look(old, tmp_path).kind == states.FINISHED


def test_foreign_and_damaged_folders_are_refused(tmp_path: Path) -> None:
    foreign, damaged = cells("grid: {seed: [1, 2]}")
    (tmp_path / foreign.name).mkdir()
    (tmp_path / foreign.name / "thesis.tex").write_text("mine")
    begun(damaged, tmp_path).config.write_text("rounds: [")
    assert "no config.yaml" in states.look(foreign, tmp_path).remark
    assert "cannot be read" in states.look(damaged, tmp_path).remark


# the estimate


def test_estimate_from_cells_of_the_sweep(tmp_path: Path) -> None:
    done, half, new = cells("grid: {seed: [1, 2, 3]}", "set: {rounds: 4, local_epochs: 5, eval.every: 2}")
    begun(done, tmp_path, 4, finished=True)
    begun(half, tmp_path, 1)
    made = [done, half, new]
    found = [states.look(cell, tmp_path) for cell in made]
    paces = estimate.known_paces(made, found, tmp_path)
    result = estimate.estimate(made, found, tmp_path, paces, lambda c: 40, lambda c: (1, 1))
    # A round: 40 images / 4 clients x 2 participants x 5 epochs = 100 samples of 0.02 s, and 3 - 2 - 0.5 s besides.
    left = (3 * 2.5 + 2 * 0.5) + (4 * 2.5 + 2 * 0.5)
    assert result.seconds == pytest.approx(left)
    assert result.sources == ("lenet5 on synthetic: rounds of 2 cells of this sweep",)
    size = estimate.folder_bytes(tmp_path / done.name)
    assert result.bytes == size - estimate.folder_bytes(tmp_path / half.name) + size
    assert result.bytes_are == "as finished cells"


def test_ranks_train_their_clients_at_the_same_time() -> None:
    """A pace is one rank's, whether a trial of one client or a whole round on several ranks has shown it."""
    row = {"evaluate_seconds": 0.0, "round_seconds": 9.0, "samples": 800, "ranks": 4, "test_accuracy": None}
    trial = estimate.pace_of([{**row, "train_seconds": 8.0, "participants": [3]}], "")
    whole = estimate.pace_of([{**row, "train_seconds": 2.0, "participants": list(range(8))}], "")
    assert trial is not None and whole is not None
    assert trial.sample_seconds == whole.sample_seconds == pytest.approx(0.01) and trial.ranks == 4
    for participants, busiest in ((8, 2), (5, 2), (3, 1), (1, 1)):
        keys = f"{{rounds: 1, clients: 8, participants: {participants}, local_epochs: 1}}"
        (cell,) = cells("grid: {seed: [1]}", f"set: {keys}")
        # 80 images of 8 clients: 10 a client, 0.01 s each on the busiest rank, 1 s besides.
        assert estimate.seconds_left(cell.config, trial, 80, 0) == pytest.approx(busiest * 10 * 0.01 + 1)


@pytest.mark.parametrize("line", ["{}", "[]", "3", '{"round": 1, "train_seconds": "long"}', "[" * 100_000])
def test_damaged_metrics_are_no_rounds(line: str, tmp_path: Path) -> None:
    (cell,) = cells("grid: {seed: [1]}")
    begun(cell, tmp_path, 1).metrics.write_text(line + "\n")
    found = [states.look(cell, tmp_path)]
    assert found == [State(states.UNFINISHED)]
    assert estimate.known_paces([cell], found, tmp_path) == {}
    assert states.records(begun(cells("grid: {seed: [2]}")[0], tmp_path, 3))[2]["round"] == 3


def test_estimate_without_a_round_says_so(tmp_path: Path) -> None:
    (cell,) = cells("grid: {seed: [1]}")
    result = estimate.estimate([cell], [State(states.NEW)], tmp_path, {}, lambda c: 40, lambda c: (10, 8))
    assert result.seconds is None and result.bytes_are == "at most"
    # 2 rounds, so 2 checkpoints: 10 float32, 8 bits, 4 residuals; and the metrics.
    assert result.bytes == 2 * (40 + 1 + 160) + 8000


# running


class Fake(runner.Commands):
    """Cells that end as told, after so many polls, and train nothing."""

    def __init__(self, out: Path, codes: dict[str, int], patience: int = 1) -> None:
        super().__init__(out)
        self.folder, self.codes, self.patience = out, codes, patience
        self.order: list[str] = []
        self.running: set[str] = set()
        self.most = 0
        self.signals: list[tuple[str, int]] = []

    def start(self, cell: Cell) -> FakeProcess:  # type: ignore[override]
        self.order.append(cell.name)
        self.running.add(cell.name)
        self.most = max(self.most, len(self.running))
        return FakeProcess(self, cell)

    def error_of(self, cell: Cell) -> str:
        return "error: learning_rate: too bold"


class FakeProcess:
    def __init__(self, made: Fake, cell: Cell) -> None:
        self.made, self.cell, self.left = made, cell, made.patience
        if not (made.folder / cell.name).exists():
            begun(cell, made.folder, 1)

    def poll(self) -> int | None:
        self.left -= 1
        if self.left >= 0:
            return None
        self.made.running.discard(self.cell.name)
        code = self.made.codes.get(self.cell.name, 0)
        if code == 0:
            RunFolder(self.made.folder / self.cell.name).finished.write_text(json.dumps({"rounds": 2}))
        return code

    def send_signal(self, sig: int) -> None:
        self.made.signals.append((self.cell.name, sig))
        self.made.codes[self.cell.name] = 75
        self.left = 0


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_TRIES_SECONDS", 0.0)


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_failed_cell_does_not_stop_the_rest(tmp_path: Path, jobs: int) -> None:
    made = cells("grid: {seed: [1, 2, 3, 4]}")
    fake = Fake(tmp_path, {"seed-2": 4}, patience=5)
    outcomes = runner.run(made, tmp_path, fake, jobs, lambda text: None, runner.Stop())
    assert fake.order == ["seed-1", "seed-2", "seed-3", "seed-4"] and fake.most == jobs
    kinds = {outcome.name: outcome.kind for outcome in outcomes}
    assert kinds == {"seed-1": "finished", "seed-2": "failed", "seed-3": "finished", "seed-4": "finished"}
    assert [o.error for o in outcomes if o.error] == ["exit code 4: error: learning_rate: too bold"]


def test_what_another_job_finished_meanwhile_is_skipped(tmp_path: Path) -> None:
    made = cells("grid: {seed: [1, 2, 3]}")
    begun(made[0], tmp_path, 2, finished=True)
    lock = Lock(begun(made[1], tmp_path, 1))
    fake = Fake(tmp_path, {})
    outcomes = runner.run(made, tmp_path, fake, 1, lambda text: None, runner.Stop())
    assert fake.order == ["seed-3"]
    assert [(o.name, o.kind) for o in outcomes] == [("seed-2", "busy"), ("seed-3", "finished")]
    lock.release()


def test_a_cell_that_another_sweep_begins_at_the_same_moment_is_busy_and_not_failed(tmp_path: Path) -> None:
    locks = []

    class Slower(Fake):
        def start(self, cell: Cell) -> FakeProcess:  # type: ignore[override]
            process = super().start(cell)
            if cell.name == "seed-1":
                locks.append(Lock(RunFolder(self.folder / cell.name)))
            return process

    made = cells("grid: {seed: [1, 2]}")
    outcomes = runner.run(made, tmp_path, Slower(tmp_path, {"seed-1": 2}), 1, lambda text: None, runner.Stop())
    assert [(o.name, o.kind) for o in outcomes] == [("seed-1", "busy"), ("seed-2", "finished")]
    assert "another job is at work there (process" in outcomes[0].error
    locks[0].release()


def test_a_signal_saves_what_is_at_work_and_begins_nothing(tmp_path: Path) -> None:
    made = cells("grid: {seed: [1, 2, 3]}")
    stop, fake, said = runner.Stop(), Fake(tmp_path, {}, patience=10**9), []

    def say(text: str) -> None:
        said.append(text)
        stop.requested = len(fake.order) == 2

    with pytest.raises(Stopped, match="1 cells not begun"):
        runner.run(made, tmp_path, fake, 2, say, stop)
    assert fake.order == ["seed-1", "seed-2"]
    assert fake.signals == [(name, signal.SIGUSR1) for name in fake.order]  # the one that every launcher passes on
    assert sum("stopped after" in line for line in said) == 2


def test_a_cell_that_goes_on_hears_of_a_signal_when_it_trains(tmp_path: Path) -> None:
    """Metrics of before are no sign of it: a signal while it still imports would kill it."""
    (cell,) = cells("grid: {seed: [1]}")
    folder, stop, fake = begun(cell, tmp_path, 1), runner.Stop(), Fake(tmp_path, {}, patience=10**9)
    os.utime(folder.metrics, (0, 0))

    class Importing(FakeProcess):
        def poll(self) -> int | None:
            if self.left == 10**9 - 3:
                os.utime(folder.metrics)
            return super().poll()

    fake.start = lambda cell: Importing(fake, cell)  # type: ignore[method-assign]
    with pytest.raises(Stopped, match="0 cells not begun"):
        runner.run([cell], tmp_path, fake, 1, lambda text: setattr(stop, "requested", True), stop)
    assert fake.signals == [(cell.name, signal.SIGUSR1)] and folder.metrics.stat().st_mtime > 0


class Hanging(runner.Commands):
    """Cells that never come to a first round."""

    def __init__(self, out: Path, stop: runner.Stop, signals: int) -> None:
        super().__init__(out)
        self.folder, self.stop, self.signals, self.processes = out, stop, signals, list[subprocess.Popen[bytes]]()

    def start(self, cell: Cell) -> subprocess.Popen[bytes]:
        if not (self.folder / cell.name).exists():
            begun(cell, self.folder, 1)
        self.processes.append(subprocess.Popen(["sleep", "60"], start_new_session=True))
        for _ in range(self.signals):
            os.kill(os.getpid(), signal.SIGTERM)
        return self.processes[-1]


@pytest.mark.parametrize(("signals", "patience"), [(2, 1e9), (1, 0.05)])
def test_a_cell_that_hangs_before_its_first_round_does_not_keep_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals: int, patience: float
) -> None:
    """Also where the file server's clock is ahead of this one: metrics of an earlier start are no round of this one."""
    monkeypatch.setattr(runner, "_SECOND_SIGNAL_SECONDS", 0.0)
    monkeypatch.setattr(runner, "_FIRST_ROUND_SECONDS", patience)
    made, said = cells("grid: {seed: [1, 2]}"), list[str]()
    folder = begun(made[0], tmp_path, 1)
    os.utime(folder.metrics, (time.time() + 3600,) * 2)
    with runner.Stop().heard() as stop, pytest.raises(Stopped, match="1 cells not begun"):
        hanging = Hanging(tmp_path, stop, signals)
        runner.run(made, tmp_path, hanging, 1, said.append, stop)
    assert [process.poll() for process in hanging.processes] == [-signal.SIGKILL]
    assert "seed-1: stopped" in said[-1] and "before its first round, with nothing to save" in said[-1]


def test_the_same_signal_twice_at_once_is_one(tmp_path: Path) -> None:
    with runner.Stop().heard() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested and not stop.insisted


def test_the_batch_script_is_sound(tmp_path: Path) -> None:
    made = cells("grid: {seed: [1, 2]}")
    out = tmp_path / "my runs"
    out.mkdir()
    script = slurm.write(made, out)
    text = script.read_text()
    assert "#SBATCH --array=0-1\n" in text and not re.findall(r"@[A-Z]+@", text)
    assert config.load(out / "_sweep" / "seed-2.yaml") == made[1].config
    # With a job library that only says what it was asked to run.
    (tmp_path / "lib.sh").write_text(
        'prepare_environment() { :; }\nrun_job() { echo "$RUN|$CONFIG"; }\ndie() { exit "$1"; }\n'
    )
    for index, code in ((1, 0), (2, 2)):
        done = subprocess.run(
            ["bash", str(script)], capture_output=True, text=True, cwd=tmp_path, timeout=20,
            env={"PATH": "/usr/bin:/bin", "JOBS": str(tmp_path), "SLURM_ARRAY_TASK_ID": str(index)},
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert done.stdout == (f"{out}/seed-2|{out}/_sweep/seed-2.yaml\n" if code == 0 else "")
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, timeout=60)
        assert checked.returncode == 0, checked.stdout


def test_two_grids_may_share_a_folder(tmp_path: Path) -> None:
    """A second grid does not take away what the first calls its cells: the report told them apart by it."""
    labels.write({"seed-1": {"method": "published"}, "seed-2": {"method": "published"}}, tmp_path)
    labels.write({"seed-2": {"method": "plain"}, "seed-3": {"method": "plain"}}, tmp_path)
    assert {name: own["method"] for name, own in labels.read(tmp_path).items()} == {
        "seed-1": "published", "seed-2": "plain", "seed-3": "plain",
    }  # fmt: skip


def _add_labels(number: int, out: Path) -> None:
    for cell in range(5):
        labels.write({f"grid-{number}-{cell}": {"method": str(number)}}, out)


def test_grids_that_begin_together_lose_no_labels(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_add_labels, args=(number, tmp_path)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert len(labels.read(tmp_path)) == 20


def test_the_same_command_brings_lost_labels_back(tmp_path: Path) -> None:
    """Also where all cells are finished."""
    grid_file, out = tmp_path / "grid.yaml", tmp_path / "out"
    grid_file.write_text(
        "base: {rounds: 2, data.name: synthetic}\ngrid: {method: {plain: {method: fedavg}}, seed: [1, 2]}\n"
    )
    for cell in grid.load(grid_file):
        begun(cell, out, 2, finished=True)
    (out / "_sweep").mkdir()
    (out / "_sweep" / "cells.json").write_text("{")
    command.sweep(str(grid_file), str(out), 1, "", False, True)
    assert labels.read(out) == {}, "a dry run writes nothing"
    command.sweep(str(grid_file), str(out), 1, "", False, False)
    assert labels.read(out) == {"plain_seed-1": {"method": "plain"}, "plain_seed-2": {"method": "plain"}}
    written = (out / "_sweep" / "cells.json").stat().st_mtime_ns
    command.sweep(str(grid_file), str(out), 1, "", False, False)
    assert (out / "_sweep" / "cells.json").stat().st_mtime_ns == written, "what stands there already is not written"


@pytest.mark.parametrize(
    ("launcher", "said"), [("no-such-launcher -n 2", "no program 'no-such-launcher'"), ("'", "quotation")]
)
def test_a_launcher_that_cannot_be_started_is_refused_at_once(launcher: str, said: str, tmp_path: Path) -> None:
    grid_file = tmp_path / "grid.yaml"
    grid_file.write_text("base: {data.name: synthetic}\ngrid: {seed: [1]}\n")
    with pytest.raises(InputError, match=f"--launcher .*{said}"):
        command.sweep(str(grid_file), str(tmp_path / "out"), 1, launcher, False, False)
    assert not (tmp_path / "out").exists()


def test_a_cell_that_cannot_be_started_does_not_stop_the_rest(tmp_path: Path) -> None:
    class Full(Fake):
        def start(self, cell: Cell) -> FakeProcess:  # type: ignore[override]
            if cell.name == "seed-2":
                raise OSError(28, "No space left on device")
            return super().start(cell)

    made = cells("grid: {seed: [1, 2, 3]}")
    outcomes = runner.run(made, tmp_path, Full(tmp_path, {}, 5), 2, lambda text: None, runner.Stop())
    assert {o.name: o.kind for o in outcomes} == {"seed-1": "finished", "seed-2": "failed", "seed-3": "finished"}
    assert [o.error for o in outcomes if o.error] == ["cannot be started ([Errno 28] No space left on device)"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("error: no data\n-------\nprterun ended\n-------\n", "error: no data"),
        ("watchdog: rank 1 is stuck\nThread 0x1:\n  File x\n------\nSorry!\n------\n", "watchdog: rank 1 is stuck"),
        ("Killed by signal 9\n--------\n", "Killed by signal 9"),
        ("", ""),
    ],
)
def test_the_line_of_a_log_that_says_why(tmp_path: Path, text: str, said: str) -> None:
    (cell,) = cells("grid: {seed: [1]}")
    commands = runner.Commands(tmp_path)
    commands.log_of(cell.name).parent.mkdir()
    commands.log_of(cell.name).write_text(text)
    assert commands.error_of(cell) == said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_trial_that_is_interrupted_leaves_nothing(tmp_path: Path, number: int) -> None:
    """Its command is in a session of its own, which no signal to the sweep reaches."""
    begun = []

    class Slow(runner.Commands):
        def start(self, cell: Cell) -> subprocess.Popen[bytes]:
            begun.append((self._out, subprocess.Popen(["sleep", "60"], start_new_session=True)))
            os.kill(os.getpid(), number)
            return begun[0][1]

    handler = signal.getsignal(number)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped, match="during the trial; no cell was begun"):
        patch.setattr(runner, "Commands", Slow)
        command._try(cells("grid: {seed: [1]}")[0], Slow(tmp_path))
    folder, process = begun[0]
    assert process.poll() == -signal.SIGKILL and not folder.exists()
    assert signal.getsignal(number) == handler


@pytest.mark.parametrize("text", ["", "[]", '{"seed-1": 3}', "[" * 100_000])
def test_labels_that_cannot_be_read_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "_sweep").mkdir()
    (tmp_path / "_sweep" / "cells.json").write_text(text)
    assert labels.read(tmp_path) == {}
