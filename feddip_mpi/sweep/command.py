"""`feddip-mpi sweep`: plan, estimate, run or hand to Slurm."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from feddip_mpi import config, runtime
from feddip_mpi.errors import FeddipError, InputError, Stopped
from feddip_mpi.report import terminal
from feddip_mpi.run_folder import RunFolder
from feddip_mpi.settings import Config
from feddip_mpi.sweep import estimate, grid, labels, runner, slurm, states
from feddip_mpi.sweep.estimate import Estimate, Pace
from feddip_mpi.sweep.grid import Cell
from feddip_mpi.sweep.states import State


def sweep(path: str, out: str | None, jobs: int, launcher: str, for_slurm: bool, dry: bool, trial: bool = True) -> None:
    """Run what is left of a grid, or write a batch script for it.

    Args:
        path: the grid file.
        out: folder of the run folders; None: runs/NAME of the grid file.
        jobs: cells at once.
        launcher: before each command, such as "mpirun -n 4"; empty: one rank.
        for_slurm: write the script and start nothing.
        dry: show the plan and start nothing but the trial.
        trial: time a small piece of a cell where nothing is known yet; never done for Slurm, whose nodes are others.

    Raises:
        InputError: a wrong grid, or a folder that belongs to another configuration; nothing was started.
        FeddipError: some cells failed; the others are finished.
        Stopped: by a signal; the cells at work have saved.
    """
    words = _words(launcher, not for_slurm)
    cells = grid.load(Path(path))
    folder = Path(out) if out else Path("runs") / Path(path).stem
    found = [states.look(cell, folder) for cell in cells]
    _show_plan(cells, found, folder)
    states.require_none_refused(cells, found, folder)
    left = [c for c, s in zip(cells, found, strict=True) if s.kind in (states.NEW, *states.BEGUN, states.BUSY)]
    if not left:
        if not dry:  # they may have been lost since, or the grid may call its cells otherwise
            _prepare(cells, folder)
        terminal.say(f"all {len(cells)} cells are finished")
        return
    _check_data(left, here=not for_slurm)
    commands = runner.Commands(folder, words)
    _show_estimate(_estimate(cells, found, folder, commands, trial and not for_slurm), jobs, folder)
    if not dry:
        _prepare(cells, folder)
    if for_slurm:
        script = slurm.write(left, folder)
        terminal.say(
            f"written: {script}, an array of {len(left)}; submit it from the folder of jobs/:\n  sbatch {script}"
        )
    elif not dry:
        _run(left, folder, commands, jobs)


def _words(launcher: str, here: bool) -> list[str]:
    """The launcher as words. Raises InputError where it is none that can be started (if `here`), before a cell fails by it."""
    words = runtime.launcher_words(launcher)
    if words and here and shutil.which(words[0]) is None:
        raise InputError(f"--launcher {launcher!r}: no program {words[0]!r} on PATH; name one, or load its module")
    return words


def _run(left: Sequence[Cell], out: Path, commands: runner.Commands, jobs: int) -> None:
    with runner.Stop().heard() as stop:
        outcomes = runner.run(left, out, commands, jobs, terminal.say, stop)
    unfinished = [outcome for outcome in outcomes if outcome.kind != "finished"]
    if not unfinished:
        terminal.say(f"all cells are finished: feddip-mpi report {out} --out {out}-report")
        return
    table = terminal.table("cell", "outcome", "why")
    for outcome in unfinished:
        table.add_row(outcome.name, outcome.kind, outcome.error)
    terminal.print_tables("Not finished", table)
    message = f"{len(unfinished)} of {len(left)} cells are not finished, see above and {out / labels.BESIDE}/CELL.log"
    if any(outcome.kind == "failed" for outcome in unfinished):
        raise FeddipError(f"{message}; the same command tries them again")
    raise Stopped(f"{message}; the same command goes on")


def _prepare(cells: Sequence[Cell], out: Path) -> None:
    try:
        labels.write({cell.name: cell.labels for cell in cells}, out)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error}); name a folder you may write to") from None


def _show_plan(cells: Sequence[Cell], found: Sequence[State], out: Path) -> None:
    counts = {kind: sum(state.kind == kind for state in found) for kind in dict.fromkeys(state.kind for state in found)}
    title = f"{len(cells)} cells in {out}: " + ", ".join(f"{count} {kind}" for kind, count in counts.items())
    table = terminal.table("cell", "state", "rounds", right=("rounds",))
    for cell, state in zip(cells, found, strict=True):
        table.add_row(cell.name, state.kind, f"{state.rounds} of {cell.config.rounds}")
    failed = [f"{c.name}: {s.remark}" for c, s in zip(cells, found, strict=True) if s.kind == states.FAILED]
    terminal.print_tables(title, table, *failed)


def _show_estimate(made: Estimate, jobs: int, out: Path) -> None:
    if made.seconds is None:
        spent = "unknown (no cell of this kind has a round yet)"
    else:
        spent = f"about {terminal.clock(made.seconds)} of work"
        spent += f", {terminal.clock(made.seconds / jobs)} if {jobs} at once cost no speed" if jobs > 1 else ""
    sources = f" (from {'; '.join(made.sources)})" if made.sources else ""
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    terminal.say(
        f"time left: {spent}{sources}\ndisk: {terminal.size(made.bytes)} more ({made.bytes_are}), "
        f"{terminal.size(free)} are free"
    )
    if made.bytes > free:
        terminal.note("warning: the disk may not hold that; lower checkpoint.keep or name another --out")


def _check_data(cells: Sequence[Cell], here: bool) -> None:
    """Missing data, and models that do not fit, are found before the first cell starts.

    Args:
        here: whether the cells run on this machine, so that the files have to be here.

    Raises:
        InputError: names the cell.
    """
    seen = set()
    for cell in cells:
        kind = (*estimate.kind_of(cell.config), cell.config.model.keep_dense, cell.config.data.path)
        if kind not in seen:
            seen.add(kind)
            try:
                _sizes(cell.config)
                if here and not cell.config.data.download:
                    _images(cell.config)
            except InputError as error:
                raise InputError(f"cell {cell.name}: {error}") from None


def _sizes(settings: Config) -> tuple[int, int]:
    from feddip_mpi.report import planning

    layout, _ = planning.make(config.override(settings, ["rounds=1"]))
    return layout.size, layout.prunable


def _images(settings: Config) -> int:
    from feddip_mpi import data

    if settings.data.name == "synthetic":
        return settings.data.synthetic.train_samples
    return len(data.load(settings.data, settings.seed).train_labels)


def _per_kind(work: Callable[[Config], tuple[int, ...]]) -> Callable[[Config], tuple[int, ...]]:
    """Reading data or building a model once is enough for all cells that are alike."""
    done: dict[tuple[object, ...], tuple[int, ...]] = {}

    def once(settings: Config) -> tuple[int, ...]:
        key = (*estimate.kind_of(settings), settings.data.path, settings.model.keep_dense, settings.data.synthetic)
        if key not in done:
            done[key] = work(settings)
        return done[key]

    return once


def _estimate(
    cells: Sequence[Cell], found: Sequence[State], out: Path, commands: runner.Commands, trial: bool
) -> Estimate:
    paces = estimate.known_paces(cells, found, out)
    images, sizes = _per_kind(lambda c: (_images(c),)), _per_kind(_sizes)
    if trial:
        for cell, state in zip(cells, found, strict=True):
            kind = estimate.kind_of(cell.config)
            if kind not in paces and state.kind == states.NEW and (pace := _try(cell, commands)) is not None:
                paces[kind] = pace
    counted, sized = lambda c: images(c)[0], lambda c: (sizes(c)[0], sizes(c)[1])
    try:
        return estimate.estimate(cells, found, out, paces, counted, sized)
    except InputError:  # for Slurm, the data need not be on this machine
        return estimate.estimate(cells, found, out, {}, counted, sized)


def _try(cell: Cell, commands: runner.Commands) -> Pace | None:
    """One client's round of the cell, with one epoch, in a folder that is removed again; None if it does not work."""
    small = ["rounds=1", "participants=1", "local_epochs=1", "mask.freeze_after=1", "checkpoint.keep=1"]
    with contextlib.suppress(InputError), tempfile.TemporaryDirectory(prefix="feddip-trial-") as place:
        tried = Cell("trial", config.override(cell.config, small))
        started = time.monotonic()
        own = runner.Commands(Path(place), commands.launcher)
        with runner.Stop().heard() as stop:
            process = own.start(tried)
            runner.wait(process, stop)
            runner.end(process)  # its session is its own: no signal to this one reaches it
        if stop.requested:
            raise Stopped("by a signal during the trial; no cell was begun, the same command begins again")
        whole = time.monotonic() - started
        records = states.records(RunFolder(Path(place) / "trial"))
        if records:
            overhead = max(0.0, whole - records[0]["round_seconds"])
            return estimate.pace_of(records, "a trial of one round with one client and one epoch", overhead)
        terminal.note(f"the trial of {cell.name} failed: {own.error_of(tried)}")
    return None
