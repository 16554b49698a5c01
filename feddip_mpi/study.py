"""`feddip-mpi study`: the runs of a scaling study, one after the other, and what comes out of them.

A study is a folder: `config.yaml` (of all its runs), `study.json` (its settings), a run folder a cell (`strong-4`,
`weak-8`, repeats as `strong-4.2`) with the output of its launcher beside it (`strong-4.log`), and the report
(scaling.csv, .json, .tex, .png, .pdf). Nothing here needs MPI: cells are started as a user would start them.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

from feddip_mpi import config, costs, hdf5, metrics, run_folder, runtime, scaling
from feddip_mpi.errors import FeddipError, InputError, Stopped
from feddip_mpi.report import terminal
from feddip_mpi.run_folder import RunFolder
from feddip_mpi.settings import Config

Json = dict[str, Any]

_CELL = re.compile(r"(strong|weak)-([1-9]\d*)(?:\.(\d+))?")


@dataclass(frozen=True)
class Settings:
    """What a study runs.

    Attributes:
        ranks: rank counts, ascending.
        kinds: "strong", "weak".
        repeats: runs of a cell.
        rounds: of a run.
        warm_up: first rounds that do not count.
        per_rank: participants of each rank in a weak study.
        launcher: command before the program, with {ranks}; "": found at each start.
        cores: that all ranks share, where they are known; None: this machine's if it is, else one a rank.
        ranks_per_node: how nodes are filled; None: all ranks on one.
        note: stands on everything that is shown.
        scripts: the runs are jobs of submit.sh, not started here.
    """

    ranks: tuple[int, ...] = (1, 2, 4)
    kinds: tuple[str, ...] = scaling.KINDS
    repeats: int = 1
    rounds: int = 12
    warm_up: int = 2
    per_rank: int = 1
    launcher: str = ""
    cores: int | None = None
    ranks_per_node: int | None = None
    note: str = ""
    scripts: bool = False

    def cells(self) -> Iterator[Cell]:
        """Strong before weak, fewest ranks first."""
        for kind in self.kinds:
            for ranks in self.ranks:
                for repeat in range(1, self.repeats + 1):
                    yield Cell(kind, ranks, repeat)

    def participants(self, kind: str, ranks: int, settings: Config) -> int:
        """K of a cell. Strong: the configuration's. Weak: `per_rank` for every rank, and nothing else grows."""
        return settings.participants if kind == "strong" else self.per_rank * ranks


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    kind: str
    ranks: int
    repeat: int = 1

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.ranks}" + (f".{self.repeat}" if self.repeat > 1 else "")


def work(
    target: str,
    overrides: Sequence[str],
    settings: Settings,
    out: str | None,
    only_collect: bool,
    as_json: bool,
) -> None:
    """The command. `target` is a configuration, whose study is run (or written as a script), or a study's folder.

    Raises:
        InputError: wrong options; nothing was started.
        FeddipError: some runs failed; what the others say is reported first.
    """
    from feddip_mpi.report import scaling as report

    launched, variable = runtime.launched_ranks()
    if launched > 1:
        raise InputError(
            f"study starts its ranks itself, but was started as {launched} ({variable}): leave out the launcher"
        )
    failure = None
    if Path(target).is_dir():
        if settings.scripts:
            raise InputError(f"--scripts {target}: is a folder; name the configuration to study")
        folder = Path(target)
    elif only_collect:
        raise InputError(f"--collect {target}: no such folder; name the folder of a study")
    else:
        folder = prepare(target, overrides, settings, out)
        if settings.scripts:
            path = write_script(folder, load(folder), config.load(folder / "config.yaml"))
            terminal.say(f"written: {path}; submit it with `bash {path} --time=30`, it collects into {folder}")
            return
        try:
            run(folder, settings)
        except FeddipError as error:
            failure = error
    if failure is None or any(RunFolder(folder / cell.name).finished.exists() for cell in load(folder).cells()):
        result = collect(folder, settings)
        written = report.save(result, folder)
        (terminal.print_json if as_json else report.show)(result)
        terminal.note(f"saved: {', '.join(map(str, written))}")
    if failure is not None:
        raise failure


def rank_counts(text: str) -> tuple[int, ...]:
    """The numbers of "1,2,4", ascending. Raises InputError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 1 <= int(part) <= costs.MOST_RANKS for part in parts):
        raise InputError(
            f"--ranks {text!r}: must be whole numbers from 1 to {costs.MOST_RANKS} with commas between them, as in 1,2,4,8"
        )
    return tuple(sorted({int(part) for part in parts}))


def prepare(config_path: str, overrides: Sequence[str], settings: Settings, out: str | None) -> Path:
    """Make the study's folder, or go on with it; returns it.

    Raises:
        InputError: wrong options, or the folder belongs to another study.
    """
    if settings.warm_up >= settings.rounds:
        raise InputError(
            f"--warm-up {settings.warm_up}: must be less than --rounds {settings.rounds}, or no round counts; "
            "give more rounds or a shorter --warm-up"
        )
    if settings.launcher and "{ranks}" not in settings.launcher:
        raise InputError(f"--launcher {settings.launcher!r}: must say {{ranks}} where the number of ranks belongs")
    runtime.launcher_words(settings.launcher)
    loaded = config.override(config.load(config_path, overrides), [f"rounds={settings.rounds}"])
    for kind in settings.kinds:
        needed = settings.participants(kind, settings.ranks[-1], loaded)
        if needed > loaded.clients:
            raise InputError(
                f"clients: got {loaded.clients}, but the weak study has {settings.per_rank} participant(s) for each of "
                f"{settings.ranks[-1]} ranks; --set clients={needed}, fewer --ranks, or --kind strong"
            )
    folder = Path(out) if out else Path("runs") / f"study-{Path(config_path).stem}"
    if folder.exists() and (not folder.is_dir() or not _is_free_or_a_study(folder)):
        raise InputError(f"--out {folder}: exists and is no study; name a new folder")
    text = config.to_yaml(loaded)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with run_folder.alone(folder / _LOCK):  # another command may extend it at the same time
            settings = _extended(folder, settings, text)
            hdf5.write_text(folder / "config.yaml", text)
            hdf5.write_text(folder / "study.json", json.dumps(asdict(settings), indent=1) + "\n")
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written ({error}); name a folder you may write to") from None
    return folder


_LOCK = ".study.json.lock"


def _is_free_or_a_study(folder: Path) -> bool:
    return (folder / "study.json").exists() or (folder / _LOCK).exists() or not any(folder.iterdir())


def _extended(folder: Path, settings: Settings, text: str) -> Settings:
    """The settings with those of the study that the folder holds. Raises InputError where the two do not fit together."""
    if not (folder / "study.json").exists():
        return settings
    before = load(folder)
    same = all(getattr(before, name) == getattr(settings, name) for name in ("rounds", "warm_up", "per_rank"))
    if not same or config.load(folder / "config.yaml") != config.parse(text):
        raise InputError(
            f"--out {folder}: holds a study of another configuration (or other --rounds, --warm-up, --per-rank): its runs "
            "would not compare with these; name another folder"
        )
    return _joined(before, settings)


def _joined(before: Settings, now: Settings) -> Settings:
    """A study that is extended keeps what it had."""
    return replace(
        now,
        ranks=tuple(sorted({*before.ranks, *now.ranks})),
        kinds=tuple(kind for kind in scaling.KINDS if kind in (*before.kinds, *now.kinds)),
        repeats=max(before.repeats, now.repeats),
        launcher=now.launcher or before.launcher,
        cores=now.cores or before.cores,
        ranks_per_node=now.ranks_per_node or before.ranks_per_node,
        note=now.note or before.note,
    )


def load(folder: Path, given: Settings | None = None) -> Settings:
    """The settings of a study; without a study.json those that are given, and the names of its runs."""
    given = given or Settings()
    path = folder / "study.json"
    if not path.exists():
        found = [match for run in folder.iterdir() if (match := _CELL.fullmatch(run.name)) and run.is_dir()]
        if not found:
            raise InputError(f"{folder}: holds no study: no study.json, and no run named like strong-4 or weak-4")
        return replace(
            given,
            ranks=tuple(sorted({int(match[2]) for match in found})),
            kinds=tuple(kind for kind in scaling.KINDS if any(match[1] == kind for match in found)),
            repeats=max(int(match[3] or 1) for match in found),
            launcher=given.launcher or "unknown",
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name: values[field.name] for field in fields(Settings) if field.name in values}
        settings = Settings(**known | {"ranks": tuple(known["ranks"]), "kinds": tuple(known["kinds"])})
        list(settings.cells())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: is no study of this program ({type(error).__name__}: {error}); start one with --out"
        ) from None
    return replace(
        settings,
        cores=given.cores or settings.cores,
        ranks_per_node=given.ranks_per_node or settings.ranks_per_node,
        note=given.note or settings.note,
    )


# Running


def run(folder: Path, asked: Settings) -> None:
    """Start every cell that is asked for and not finished, one after the other. A failed one does not stop the rest.

    Raises:
        FeddipError: some cells failed; the message names them.
        Stopped: TERM or USR1 came; the run under way has saved if it could.
    """
    settings, failed = load(folder), []
    base = config.load(folder / "config.yaml")
    crowded = settings.ranks[-1] * base.threads > runtime.cores()
    launcher = settings.launcher or runtime.default_launcher(crowded)
    for cell in asked.cells():
        where = RunFolder(folder / cell.name)
        if where.finished.exists():
            terminal.note(f"{cell.name}: finished already")
            continue
        command = _command(launcher, settings, base, cell, folder)
        terminal.note(f"{cell.name}: {shlex.join(command)}")
        started = time.monotonic()
        code = _launch(command, folder / f"{cell.name}.log", settings.launcher == "", base.threads)
        took = time.monotonic() - started
        if where.finished.exists():
            terminal.note(f"{cell.name}: finished after {took:.1f} s")
            continue
        failed.append(cell.name)
        log = folder / f"{cell.name}.log"
        terminal.note(f"{cell.name}: failed after {took:.1f} s (exit code {code}): {_last_line(log)}; see {log}")
    if failed:
        raise FeddipError(
            f"{len(failed)} run(s) of the study failed ({', '.join(failed)}), see their logs; the same command tries them "
            "again and leaves the finished ones alone"
        )


def _command(launcher: str, settings: Settings, base: Config, cell: Cell, folder: Path) -> list[str]:
    where = folder / cell.name
    program = [sys.executable, "-m", "feddip_mpi"]
    if (where / "config.yaml").exists():
        what = ["resume", str(where)]
    else:
        participants = settings.participants(cell.kind, cell.ranks, base)
        what = ["train", str(folder / "config.yaml"), "--set", f"participants={participants}", "--out", str(where)]
    return [*runtime.launcher_words(launcher.replace("{ranks}", str(cell.ranks))), *program, *what]


def _launch(command: Sequence[str], log: Path, ours: bool, threads: int) -> int:
    """Run to the end; output is appended to `log`, because a pipe would hold up who writes to it."""
    environment = runtime.launch_environment(threads, ours)
    try:
        with open(log, "ab") as output:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
    except OSError as error:
        raise InputError(
            f"--launcher: {command[0]!r} cannot be started ({error}); name the command that starts ranks"
        ) from None
    with _passing_on(process) as stopped:
        code = process.wait()
    if stopped:
        raise Stopped(f"study stopped by {stopped[0]}; the same command goes on")
    return code


@contextmanager
def _passing_on(process: subprocess.Popen[bytes]) -> Iterator[list[str]]:
    """TERM and USR1 reach the launcher as USR1, which it passes to all ranks: they save and end."""
    stopped: list[str] = []

    def forward(number: int, frame: FrameType | None) -> None:
        stopped.append(signal.Signals(number).name)
        process.send_signal(signal.SIGUSR1)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _last_line(log: Path) -> str:
    """The line of a log that says most: the first of our own errors, or the last."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("error:")), lines[-1] if lines else "no output")


# Collecting


def collect(folder: Path, given: Settings) -> Json:
    """Everything that the finished runs of a study say, in JSON values.

    Args:
        given: what the command line says; it counts where the folder has no study.json, and `cores`, `ranks_per_node`
            and `note` count in any case.

    Raises:
        InputError: none is finished, or a file of theirs cannot be read.
    """
    settings = load(folder, given)
    cells = list(settings.cells())
    done = [cell for cell in cells if RunFolder(folder / cell.name).finished.exists()]
    points, facts = [], []
    records: dict[str, list[metrics.Record]] = {}
    try:
        for kind, ranks in dict.fromkeys((cell.kind, cell.ranks) for cell in done):
            runs = [RunFolder(folder / cell.name) for cell in done if (cell.kind, cell.ranks) == (kind, ranks)]
            read = [metrics.read(where.metrics) for where in runs]
            records |= {where.path.name: lines for where, lines in zip(runs, read, strict=True)}
            facts += [json.loads(where.finished.read_text(encoding="utf-8")) for where in runs]
            if found := scaling.point(kind, read, settings.warm_up):
                points.append(found)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder}: a run of the study cannot be read ({error}); remove that run, and run it again"
        ) from None
    if not points:
        raise InputError(
            f"{folder}: no run of the study is finished with more than {settings.warm_up} rounds; wait for it, or start it again"
        )
    place = _place(settings, facts, points)
    model = scaling.fit(points, place)
    checks = scaling.left_out(points, place)
    configuration = _configuration(folder, done)
    return {
        "study": "scaling",
        "date": time.strftime("%Y-%m-%d"),
        "settings": asdict(settings),
        "configuration": configuration,
        "missing": [cell.name for cell in cells if cell not in done],
        # The last bits of a dense sum depend on the number of ranks.
        "same_results": None if configuration["exchange"] == "dense" else _same_results(records),
        "versions": facts[0]["versions"],
        "mpi": facts[0]["mpi"],
        # No host: results are published.
        "hardware": {name: value for name, value in facts[0]["hardware"].items() if name != "host"},
        "mode": place.mode,
        "cores": place.cores,
        "one_node": place.ranks_per_node is None,
        "rows": scaling.rows(points),
        "model": {
            "constants": {phase: list(values) for phase, values in model.constants.items()},
            "latency_seconds": model.latency,
            "bandwidth_bytes": model.bandwidth,
            "exchange_error": model.exchange_error,
        },
        "fitted": [{"kind": p.kind, "ranks": p.ranks, "seconds": model.seconds(p.work)} for p in points],
        "left_out": checks,
        "errors": scaling.errors(checks),
        "predictions": scaling.predictions(model, points),
    }


def _place(settings: Settings, facts: Sequence[Json], points: Sequence[scaling.Point]) -> scaling.Place:
    """How the study's ranks were spread, and which exchange they used."""
    mode = facts[0]["exchange"]
    if mode == "auto":  # which mode it chose shows in the bytes only where sums were handed on
        mode = "sharded" if all(p.work.download for p in points if p.ranks > 1) else "allgatherv"
    cores = settings.cores
    if cores is None and not settings.launcher and not settings.scripts and not runtime.in_allocation():
        cores = facts[0]["hardware"]["cores"]  # all ranks were on this machine
    return scaling.Place(mode, settings.ranks_per_node, cores)


def _configuration(folder: Path, done: Sequence[Cell]) -> Json:
    """What the first run's configuration says of itself."""
    c = config.load(folder / done[0].name / "config.yaml")
    return {
        "model": c.model.name, "data": c.data.name, "clients": c.clients, "local_epochs": c.local_epochs,
        "batch_size": c.batch_size, "exchange": c.exchange, "overlap": c.overlap, "values": c.upload.values,
        "sparsity": [c.sparsity.initial, c.sparsity.final], "seed": c.seed,
    }  # fmt: skip


def _same_results(records: dict[str, list[metrics.Record]]) -> bool | None:
    """Whether all strong runs, which are the same run on other ranks, recorded the same numbers; None: fewer than two."""
    names = [name for name, field in metrics.FIELDS.items() if field.depends_on == "config"]
    found = [
        [[record.get(name) for name in names] for record in lines]
        for run, lines in records.items()
        if run.startswith("strong")
    ]
    return all(lines == found[0] for lines in found[1:]) if len(found) > 1 else None


# Batch scripts


def write_script(folder: Path, settings: Settings, base: Config) -> Path:
    """`submit.sh`: the study as jobs of jobs/slurm-scaling.sh, one a cell. Returns its path.

    Raises:
        InputError: the package is installed without its `jobs` folder.
    """
    top = Path(__file__).resolve().parents[1]
    if not (top / "jobs" / "slurm-scaling.sh").exists():
        raise InputError("--scripts: needs the folder jobs/ of the source tree; run it from a checkout of this program")
    values = {
        "CONFIG": str((folder / "config.yaml").resolve()), "STUDY": str(folder.resolve()),
        "RANK_COUNTS": " ".join(map(str, settings.ranks)), "KINDS": " ".join(settings.kinds),
        "REPEATS": str(settings.repeats), "ROUNDS": str(settings.rounds), "WARM_UP": str(settings.warm_up),
        "STRONG_PARTICIPANTS": str(base.participants), "WEAK_PARTICIPANTS": str(settings.per_rank),
        "RANKS_PER_NODE": str(settings.ranks_per_node or 1),
    }  # fmt: skip
    lines = [
        "#!/usr/bin/env bash",
        "# Submits a scaling study: a job a run, and one that collects. Arguments are options of sbatch, as in --time=30.",
        "# LAUNCHER, PMI, MODULES, FEDDIP_VENV and the other settings of jobs/slurm-scaling.sh may come from the environment.",
        f"cd {shlex.quote(str(top))} || exit 2",
        *(f"export {name}={shlex.quote(value)}" for name, value in values.items()),
        'exec bash jobs/slurm-scaling.sh "$@"',
    ]
    path = folder / "submit.sh"
    hdf5.write_text(path, "\n".join(lines) + "\n")
    path.chmod(0o755)
    return path
