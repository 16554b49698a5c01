"""Damaged, missing and impossible files: what is done to them, how often, and what came of it.

    python benchmarks/file_faults.py --folder SCRATCH --out docs/results/file-faults.json [--only NAME ...] [--kills 100]

As root, for the small and the read-only file systems. Every try ends in one of the outcomes that its fault allows, or in
"BAD" with the reason; the exit code is 1 if there is one. A damaged file is refused by name with the reason, the newest
good one is taken instead, `verify` ends with 3; wrong input ends with 2; a run that was killed, or whose disk was full, ends
with the bits of one that never was; nothing prints a traceback. Commands run in forked processes, so that torch is
imported once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import nn

from feddip_mpi import checkpoint, cli, hdf5, metrics, run_folder, runtime
from feddip_mpi.errors import FeddipError

NAME = "round-%06d.h5"
SMALL = {
    "rounds": 6, "clients": 4, "participants": 2, "local_epochs": 1, "batch_size": 20, "learning_rate": 0.05,
    "mask.every": 2, "checkpoint.every": 1, "checkpoint.keep": 3, "checkpoint.best": False, "device": "cpu",
    "upload.residual": "in_mask_only", "sparsity.initial": 0.3, "model.name": "file_faults:narrow",
    "data.name": "synthetic", "data.synthetic.shape": [1, 12, 12], "data.synthetic.classes": 3,
    "data.synthetic.train_samples": 160, "data.synthetic.test_samples": 40, "eval.every": 3,
}  # fmt: skip
# Half a million weights: a checkpoint takes long enough to be hit.
LARGE = {**SMALL, "model.name": "file_faults:wide", "upload.residual": "keep"}


def _network(inputs: int, hidden: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.Linear(hidden, classes))


def narrow(in_channels: int, image_size: tuple[int, int], classes: int) -> nn.Module:
    return _network(in_channels * image_size[0] * image_size[1], 12, classes)


def wide(in_channels: int, image_size: tuple[int, int], classes: int) -> nn.Module:
    return _network(in_channels * image_size[0] * image_size[1], 3500, classes)


@dataclass
class Row:
    """A line of the table."""

    fault: str
    tries: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def add(self, outcome: str, problem: str = "") -> None:
        """Count a try; a problem makes it a bad one."""
        self.tries += 1
        self.outcomes["BAD" if problem else outcome] += 1
        if problem:
            self.bad.append(problem[:500])


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    text: str

    def problem(self, code: int, *words: str) -> str:
        """What is wrong with it, measured by what was expected; "" for nothing."""
        if self.code != code:
            return f"exit code {self.code}, not {code}: {self.text[-400:]}"
        if "Traceback" in self.text:
            return f"a traceback: {self.text[-400:]}"
        missing = [word for word in words if word not in self.text]
        return f"does not name {missing}: {self.text[-400:]}" if missing else ""


class Child:
    """A feddip-mpi command in a forked process."""

    def __init__(self, *argv: str, patch: Callable[[], None] = lambda: None) -> None:
        self._file = Path(os.environ["FEDDIP_FAULTS"]) / f"output-{os.getpid()}-{time.monotonic_ns()}"
        self.pid = os.fork()
        if self.pid == 0:
            with open(self._file, "w") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            sys.argv = ["feddip-mpi", *argv]
            sys.modules["matplotlib"] = None  # type: ignore[assignment]  # no picture: it takes longer than the run
            patch()
            try:
                cli.main()
            except SystemExit as end:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(end.code if isinstance(end.code, int) else 1)
            os._exit(70)

    def running(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, seconds: float = 60) -> Ended:
        """Its end; a command that hangs is killed and has the code 124."""
        deadline = time.monotonic() + seconds
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.005)
        hangs = self.running()
        if hangs:
            self.kill()
        _, status = os.waitpid(self.pid, 0)
        text = self._file.read_text(errors="replace")
        self._file.unlink()
        return Ended(124 if hangs else os.waitstatus_to_exitcode(status), text)


def options(values: dict[str, Any], **changes: Any) -> list[str]:
    values = {**values, **{key.replace("__", "."): value for key, value in changes.items()}}
    return [word for key, value in values.items() for word in ("--set", f"{key}={json.dumps(value)}")]


def train(run: Path, values: dict[str, Any], **changes: Any) -> list[str]:
    config = Path(os.environ["FEDDIP_FAULTS"]) / "empty.yaml"
    config.write_text("")
    return ["train", str(config), *options(values, **changes), "--out", str(run)]


def here(*argv: str) -> Ended:
    """A command without MPI, in this process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        sys.argv = ["feddip-mpi", *argv]
        try:
            cli.main()
        except SystemExit as end:
            return Ended(int(end.code or 0), out.getvalue())
    return Ended(70, out.getvalue())


def state_of(run: Path) -> list[Any]:
    """What the configuration alone decides in a run's newest checkpoint, equal for equal bits."""
    loaded, refused = checkpoint.newest(run / "checkpoints")
    assert not refused, refused
    fields = {name for name, known in metrics.FIELDS.items() if known.depends_on == "config"}
    rows = [{name: row[name] for name in fields} for row in loaded.history]
    residuals = [(c, r.round, r.values.numpy().tobytes()) for c, r in checkpoint.read_residuals(loaded.path)]
    return [
        loaded.server.round,
        loaded.server.weights.numpy().tobytes(),
        loaded.server.mask.numpy().tobytes(),
        rows,
        residuals,
    ]


def refused_and_replaced(folder: Path, damaged: Path, good: int) -> str:
    """The problem with how a damaged newest checkpoint is dealt with: `newest` and `verify`; "" for none."""
    try:
        loaded, refused = checkpoint.newest(folder)
    except FeddipError as error:
        return f"nothing taken: {error}"
    except BaseException as error:
        return f"{type(error).__name__} instead of an error of this program: {error}"
    if loaded.server.round != good:
        return f"round {loaded.server.round} taken, not {good}"
    if len(refused) != 1 or str(damaged) not in refused[0] or len(refused[0]) < len(str(damaged)) + 10:
        return f"not told: {refused}"
    # A folder that `verify` is given is looked into: what stands in a file's place is found through the folder around it.
    path, count = (folder, 3) if damaged.is_dir() else (damaged, 1)
    return here("verify", str(path)).problem(3, "DAMAGED", str(damaged), f"1 of {count} files damaged")


class Tables:
    """Every fault is a method `fault_...` that yields rows."""

    def __init__(self, folder: Path, kills: int, step: int, seed: int) -> None:
        self.folder, self.kills, self.step, self.random = folder, kills, step, random.Random(seed)
        self.small = folder / "small"
        ended = Child(*train(self.small, SMALL)).wait()
        assert ended.code == 0, ended.text
        self.newest = self.small / "checkpoints" / (NAME % 6)
        self.whole = self.newest.read_bytes()

    def alter(self, content: bytes, row: Row, place: str) -> None:
        """Put `content` in the place of the newest checkpoint and see that it is refused."""
        self.newest.write_bytes(content)
        problem = refused_and_replaced(self.newest.parent, self.newest, 5)
        row.add("refused with its reason, the one before taken; verify: 3", problem and f"{place}: {problem}")

    def restore(self) -> None:
        self.newest.write_bytes(self.whole)
        assert checkpoint.newest(self.newest.parent)[1] == []

    def sections(self) -> dict[str, tuple[int, int]]:
        """Offset and bytes of the array of every dataset."""
        found: dict[str, tuple[int, int]] = {}
        with h5py.File(self.newest) as file:
            file.visititems(
                lambda name, node: (
                    found.__setitem__(name, (node.id.get_offset(), node.nbytes))
                    if isinstance(node, h5py.Dataset) and node.nbytes
                    else None
                )
            )
        return found

    def flipped(self, position: int) -> bytes:
        content = bytearray(self.whole)
        content[position] ^= 1 << self.random.randrange(8)
        return bytes(content)

    def fault_truncated(self) -> Iterator[Row]:
        places = {0, 1, 511, 512, 513, 520, 560, 608, len(self.whole) - 1, len(self.whole) - 512}
        for offset, size in self.sections().values():
            places |= {offset, offset + 1, offset + size // 2, offset + size}
        row = Row("truncated at, behind and in every dataset, in the seal, in the superblock, by the last byte")
        for length in sorted(place for place in places if place < len(self.whole)):
            self.alter(self.whole[:length], row, f"{length} bytes")
        self.restore()
        yield row

    def fault_flipped_datasets(self) -> Iterator[Row]:
        row = Row("one bit flipped in every dataset")
        for name, (offset, size) in self.sections().items():
            self.alter(self.flipped(offset + self.random.randrange(size)), row, name)
        self.restore()
        yield row

    def fault_flipped_seal(self) -> Iterator[Row]:
        row = Row("one bit flipped in the seal (first 512 bytes): in every byte of its text, in 20 of its padding")
        text = self.whole[:512].rstrip(b"\n")
        for position in [*range(len(text)), *self.random.sample(range(len(text), 512), 20)]:
            self.alter(self.flipped(position), row, f"byte {position}")
        self.restore()
        yield row

    def fault_flipped_superblock(self) -> Iterator[Row]:
        row = Row("one bit flipped in every byte of the HDF5 superblock (96 bytes)")
        for position in range(512, 512 + 96):
            self.alter(self.flipped(position), row, f"byte {position}")
        self.restore()
        yield row

    def fault_flipped_attributes(self) -> Iterator[Row]:
        places, count = self.attributes()
        row = Row(f"one bit flipped in the value of an attribute, {len(places)} of {count} attributes, no byte twice")
        assert len({position for _, position in places}) == len(places)
        for name, position in places:
            self.alter(self.flipped(position), row, name)
        self.restore()
        yield row

    def fault_flipped_elsewhere(self) -> Iterator[Row]:
        row = Row(f"one bit flipped in every {self.step}th byte that belongs to no dataset (headers, names, heaps)")
        taken = np.zeros(len(self.whole), bool)
        for offset, size in self.sections().values():
            taken[offset : offset + size] = True
        for position in np.flatnonzero(~taken)[608 :: self.step]:
            self.alter(self.flipped(int(position)), row, f"byte {position}")
        self.restore()
        yield row

    def attributes(self) -> tuple[list[tuple[str, int]], int]:
        """(name, place of a byte of its value) of the attributes found in the file, no place twice; how many there are.

        Equal values stand in the file once for each attribute: each occurrence is taken by one of them.
        """
        found: list[tuple[str, bytes]] = []

        def add(name: str, node: Any) -> None:
            for key, value in node.attrs.items():
                found.append(
                    (f"{name}@{key}", value.encode() if isinstance(value, str) else np.asarray(value).tobytes())
                )

        with h5py.File(self.newest) as file:
            add("/", file)
            file.visititems(lambda name, node: add(name, node))
        arrays = sorted(self.sections().values())
        used: set[int] = set()
        places = []
        for name, raw in found:
            start = next((at for at in self._values(name.rpartition("@")[2], raw, arrays) if at not in used), None)
            if start is not None:
                used.add(start)
                places.append((name, start + self.random.randrange(len(raw))))
        return places, len(found)

    def _values(self, key: str, raw: bytes, arrays: list[tuple[int, int]]) -> Iterator[int]:
        """Where a value stands outside of arrays: numbers shortly behind the name of their attribute, texts in heaps."""
        at = self.whole.find(raw, 608) if raw else -1
        while at >= 0:
            array = any(offset <= at < offset + size for offset, size in arrays)
            near = len(raw) > 8 or raw.isalpha() or key.encode() + b"\0" in self.whole[max(0, at - 96) : at]
            if near and not array:
                yield at
            at = self.whole.find(raw, at + 1)

    def fault_killed(self) -> Iterator[Row]:
        """SIGKILL in the middle of writing, again and again, to one run that is resumed each time."""
        plain, run = self.folder / "plain", self.folder / "killed"
        rounds = max(12, self.kills)
        values = {**LARGE, "rounds": rounds}
        ended = Child(*train(plain, values)).wait(300)
        assert ended.code == 0, ended.text
        row = Row("SIGKILL at a random moment of writing; resumed each time (one run)")
        kept = Row("    of these: half a file was left, and is swept up by the next save")
        child, size = Child(*train(run, values)), self._size(plain)
        tries = 0
        while row.tries < self.kills and tries < 4 * self.kills:
            tries += 1
            before = self._rounds(run)
            if not self._kill_while_it_writes(child, run, size):
                ended = child.wait()
                row.add("", f"ended with {ended.code} before it was killed: {ended.text[-300:]}")
                break
            child.wait()
            left = list((run / "checkpoints").glob(".round-*.tmp-*"))
            problem = self._after_kill(run, before)
            if left or problem:  # killed before the file had its name
                row.add("newest good checkpoint taken, nothing refused, goes on", problem)
                kept.add("swept up")
            child = Child("resume", str(run))
        child.wait(300)
        swept = not list((run / "checkpoints").glob(".round-*"))
        same = state_of(run) == state_of(plain)
        last = Row("    the same run, at its end")
        last.add("same bits as never killed", "" if same and swept else f"equal: {same}, swept up: {swept}")
        yield from (row, kept, last)

    def _size(self, run: Path) -> int:
        return max(path.stat().st_size for path in (run / "checkpoints").iterdir())

    def _rounds(self, run: Path) -> list[int]:
        return [int(path.stem[6:]) for path in checkpoint.listed(run / "checkpoints")]

    def _kill_while_it_writes(self, child: Child, run: Path, size: int) -> bool:
        """Wait for a temporary file (sometimes for the second), then until it has some random size, or a little longer."""
        share, skip, seen = self.random.uniform(0, 1.4), self.random.choice([0, 0, 1]), set()
        old = {path.name for path in (run / "checkpoints").glob(".round-*")}
        while child.running():
            for path in (run / "checkpoints").glob(".round-*.tmp-*"):
                if path.name in old:
                    continue
                seen.add(path.name)
                if len(seen) <= skip:
                    continue
                with contextlib.suppress(FileNotFoundError):  # it has its name already
                    while share < 1 and child.running() and path.stat().st_size < share * size:
                        pass
                if share >= 1:  # sealing, fsync, rename
                    time.sleep(self.random.uniform(0, 0.05))
                child.kill()
                return True
        return False

    def _after_kill(self, run: Path, before: list[int]) -> str:
        rounds = self._rounds(run)
        if not rounds:  # killed in the first write ever: resume begins again
            return "" if not before else f"all of {before} are gone"
        try:
            loaded, refused = checkpoint.newest(run / "checkpoints")
            checkpoint.verify(loaded.path)
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
        if refused or loaded.server.round != max(rounds) or (before and max(rounds) < max(before)):
            return f"{refused}, round {loaded.server.round} taken of {rounds}, before {before}"
        return ""

    def fault_full_disk(self) -> Iterator[Row]:
        plain, disk = self.folder / "plain6", self.folder / "disk"
        assert Child(*train(plain, LARGE)).wait().code == 0
        row = Row("disk full while a checkpoint is written (tmpfs of random size); resumed after it was made larger")
        size = self._size(plain)
        for _ in range(5):
            room = int(size * self.random.uniform(1.05, 3.6))
            with mounted(disk, room):
                run = disk / "run"
                ended = Child(*train(run, LARGE)).wait()
                problem = ended.problem(1, "No space left on device", "resume")
                if not problem and list((run / "checkpoints").glob(".round-*")):
                    problem = "half a file is left"
                if not problem and self._rounds(run):
                    problem = here("verify", str(run)).problem(0)
                if not problem:
                    subprocess.run(["mount", "-o", f"remount,size={10 * size}", disk], check=True)
                    problem = Child("resume", str(run)).wait().problem(0)
                if not problem and state_of(run) != state_of(plain):
                    problem = "another result than that of a disk with room"
                row.add("exit 1, earlier checkpoints whole; resumed to the same bits", problem)
        yield row
        row = Row("disk full before a run begins")
        with mounted(disk, 1 << 16):
            (disk / "filler").write_bytes(bytes((1 << 16) - 8192))
            with contextlib.suppress(OSError), open(disk / "rest", "wb", buffering=0) as rest:
                while rest.write(b"x" * 512):
                    pass
            row.add(
                "exit 2, one message",
                Child(*train(disk / "run", SMALL)).wait().problem(2, "--out", "cannot be created"),
            )
        yield row

    def fault_read_only(self) -> Iterator[Row]:
        disk = self.folder / "disk"
        row = Row("read-only file system: train, resume, resume of a finished run")
        with mounted(disk, 1 << 26):
            shutil.copytree(self.small, disk / "run")
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            for argv, code, word in (
                (train(disk / "new", SMALL), 2, "--out"),
                (["resume", str(disk / "run"), "--set", "rounds=9"], 1, "cannot be written"),
                (["resume", str(disk / "run")], 1, "cannot be written"),
            ):
                row.add(f"exit {code}, one message", Child(*argv).wait().problem(code, word, "Read-only file system"))
            row.add("verify and inspect work", here("verify", str(disk / "run")).problem(0))
            row.add("verify and inspect work", here("inspect", str(disk / "run")).problem(0))
        yield row
        plain, run = self.folder / "plain20", self.folder / "locked"
        values = {**LARGE, "rounds": 20}
        assert Child(*train(plain, values)).wait(120).code == 0
        row = Row("checkpoints become read-only while a run is at work; resumed when they can be written again")
        for _ in range(2):
            shutil.rmtree(run, ignore_errors=True)
            child = Child(*train(run, values))
            stop = self.random.randrange(2, 12)
            while child.running() and max(self._rounds(run), default=0) < stop:
                time.sleep(0.002)
            inside = run / "checkpoints"
            with laid_over(inside, self.folder / "side"):
                problem = child.wait().problem(1, "Read-only file system", "round-")
            problem = problem or here("verify", str(run)).problem(0) or Child("resume", str(run)).wait(120).problem(0)
            if not problem and state_of(run) != state_of(plain):
                problem = "another result"
            row.add("exit 1, earlier checkpoints whole; resumed to the same bits", problem)
        yield row

    def fault_two_jobs(self) -> Iterator[Row]:
        run = self.folder / "two"
        row = Row("a second job in the folder of a run that is at work (resume, train)")
        values = {**LARGE, "rounds": 5000, "checkpoint.every": 100}
        child = Child(*train(run, values))
        while child.running() and not (run / "run.log").exists():
            time.sleep(0.01)

        def impatient() -> None:
            run_folder._LOCK_SECONDS = 0.2

        for number in range(20):
            argv = ["resume", str(run)] if number % 2 else train(run, SMALL)
            words = ["another job is at work", f"process {child.pid} on"] if number % 2 else ["never overwritten"]
            problem = Child(*argv, patch=impatient).wait().problem(7 if number % 2 else 2, *words)
            row.add("train: exit 2, resume: exit 7, names the job; the first goes on", problem)
        os.kill(child.pid, signal.SIGUSR1)
        row.add("the first stops when asked: 75", child.wait().problem(75, "resume"))
        yield row

    def fault_clock(self) -> Iterator[Row]:
        """Every checkpoint is saved a day before the last one, by its own word and by the file system's."""
        run = self.folder / "clock"

        def backwards() -> None:
            days = iter(range(10**6))
            real = time.time()
            checkpoint.time = Clock(lambda: real - 86400 * next(days))  # type: ignore[attr-defined]

        row = Row("clock going back a day with every checkpoint")
        child = Child(*train(run, SMALL), patch=backwards)
        problem = child.wait().problem(0)
        saved = [checkpoint.load(path).saved for path in checkpoint.listed(run / "checkpoints")]
        if not problem and (saved != sorted(saved, reverse=True) or len(set(saved)) != 3):
            problem = f"the clock did not go back: {saved}"
        if not problem and self._rounds(run) != [4, 5, 6]:
            problem = f"kept {self._rounds(run)}"
        row.add("newest by round kept and taken", problem)
        for number in range(10):
            paths = checkpoint.listed(run / "checkpoints")
            for age, path in enumerate(paths):
                os.utime(path, (1e9 - 86400 * age, 1e9 - 86400 * age))
            rounds = 7 + number
            problem = Child("resume", str(run), "--set", f"rounds={rounds}", patch=backwards).wait().problem(0)
            if not problem and self._rounds(run) != [rounds - 2, rounds - 1, rounds]:
                problem = f"kept {self._rounds(run)}"
            log = (run / "run.log").read_text()
            if not problem and f"from round-{rounds - 1:06d}.h5" not in log:
                problem = "resumed from another checkpoint"
            row.add("newest by round kept and taken", problem)
        yield row

    def fault_versions(self) -> Iterator[Row]:
        inside = self.newest.parent

        def sealed(change: Callable[[Any], None], digest: bool) -> None:
            """Alter a whole file and seal it again, as another version of the program would have written it."""
            with h5py.File(self.newest, "r+") as file:
                change(file)
                if digest:
                    del file.attrs["digest"]
                    file.attrs["digest"] = hdf5._digest(file)
            hdf5._seal(self.newest)

        row = Row("format newer than this program reads (2, 3, 1000)")
        for version in (2, 3, 1000):
            sealed(lambda file, v=version: file.attrs.modify("format_version", v), True)
            small = str(self.small)
            for argv in (["resume", small, "--set", "rounds=9"], ["verify", str(self.newest)], ["inspect", small]):
                ended = Child(*argv).wait() if argv[0] == "resume" else here(*argv)
                row.add(
                    "exit 2, names both versions; nothing older is taken",
                    ended.problem(2, f"format {version}", "newer"),
                )
            self.restore()
        yield row
        row = Row("format that never was (0, -1), or altered without its digest (2)")
        for version, digest in ((0, True), (-1, True), (2, False)):
            sealed(lambda file, v=version: file.attrs.modify("format_version", v), digest)
            row.add(
                "refused with its reason, the one before taken; verify: 3", refused_and_replaced(inside, self.newest, 5)
            )
            self.restore()
        yield row
        row = Row(
            "format 1 without what was added since: a column of the history, the class names, a key of the configuration"
        )
        with h5py.File(self.newest) as file:
            columns = [f"history/{name}" for name in file["history"] if name not in ("round", "participants")]
        for name in [*columns, "model/class_names"]:
            sealed(lambda file, n=name: file.__delitem__(n), True)
            row.add("loads, the rest as it was", self._loads(name))
            self.restore()
        for section, key in (("checkpoint", "background"), ("upload", "entropy"), (None, "watchdog")):

            def drop(file: Any, section: str | None = section, key: str = key) -> None:
                values = json.loads(file.attrs["config"])
                del (values[section] if section else values)[key]
                file.attrs.modify("config", json.dumps(values))

            sealed(drop, True)
            row.add("loads, the rest as it was", self._loads(key))
            self.restore()
        yield row
        row = Row(
            "files in the place of a checkpoint that are none: text, another HDF5 file, a folder, a dangling link"
        )
        other = self.folder / "other.h5"
        with h5py.File(other, "w") as file:
            file["weights"] = np.ones(3)
        for content in (b"", b"rounds: 3\n", bytes(10**5), other.read_bytes(), self.random.randbytes(10**5)):
            self.alter(content, row, repr(content[:10]))
        for make in (lambda: self.newest.mkdir(), lambda: self.newest.symlink_to("nothing.h5")):
            self.newest.unlink(missing_ok=True)
            make()
            try:
                row.add(
                    "refused with its reason, the one before taken; verify: 3",
                    refused_and_replaced(inside, self.newest, 5),
                )
            finally:
                self.newest.rmdir() if self.newest.is_dir() else self.newest.unlink()
        self.restore()
        yield row

    def _loads(self, missing: str) -> str:
        try:
            loaded, refused = checkpoint.newest(self.newest.parent)
        except BaseException as error:
            return f"without {missing}: {type(error).__name__}: {error}"
        return "" if loaded.server.round == 6 and not refused else f"without {missing}: {refused}"


class Clock:
    """`time`, with another idea of what time it is."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now

    def strftime(self, form: str) -> str:
        return time.strftime(form, time.localtime(self._now()))


@contextlib.contextmanager
def mounted(folder: Path, size: int) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def laid_over(folder: Path, side: Path) -> Iterator[None]:
    """The folder, read-only from one moment to the next, whatever is open in it."""
    side.mkdir(exist_ok=True)
    subprocess.run(["mount", "--bind", folder, side], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", side], check=True)
    subprocess.run(["mount", "--bind", side, folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)
        subprocess.run(["umount", side], check=True)


def add_to(path: Path, found: dict[str, list[dict[str, Any]]], seed: int) -> None:
    """Write the rows; those of the same fault with other seeds are added up."""
    faults = json.loads(path.read_text())["faults"] if path.exists() else {}
    for name, rows in found.items():
        old = faults.setdefault(name, {"seeds": [], "rows": []})
        if seed in old["seeds"]:
            old["seeds"], old["rows"] = [], []
        old["seeds"].append(seed)
        for row in rows:
            same = next((known for known in old["rows"] if known["fault"] == row["fault"]), None)
            if same is None:
                old["rows"].append(row)
                continue
            same["tries"] += row["tries"]
            same["bad"] += row["bad"]
            same["outcomes"] = dict(Counter(same["outcomes"]) + Counter(row["outcomes"]))
    result = {
        "command": "python benchmarks/file_faults.py --folder SCRATCH --only FAULT --seed SEED --out THIS_FILE",
        "hardware": {name: value for name, value in runtime.hardware().items() if name != "host"},
        "versions": runtime.versions(),
        "faults": faults,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, required=True, help="scratch on a disk; a folder is made in it and removed"
    )
    parser.add_argument("--only", nargs="+", help="faults; default: all")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1, help="of the places and moments")
    parser.add_argument("--step", type=int, default=64, help="bytes between two flips where no dataset is")
    parser.add_argument("--out", type=Path, help="JSON file of the result; what is in it is kept or added to")
    given = parser.parse_args()
    folder = given.folder / "file-faults"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.environ |= {"FEDDIP_FAULTS": str(folder), "FEDDIP_PROGRESS": "plain"}
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    tables, found = Tables(folder, given.kills, given.step, given.seed), {}
    for name in [name.removeprefix("fault_") for name in dir(tables) if name.startswith("fault_")]:
        if given.only and name not in given.only:
            continue
        started = time.perf_counter()
        rows = list(getattr(tables, f"fault_{name}")())
        found[name] = [{"fault": r.fault, "tries": r.tries, "outcomes": dict(r.outcomes), "bad": r.bad} for r in rows]
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        for r in rows:
            print(f"  {r.fault}: {r.tries} tries, {dict(r.outcomes)}", *r.bad[:3], sep="\n    ", flush=True)
    shutil.rmtree(folder)
    if given.out:
        add_to(given.out, found, given.seed)
    sys.exit(any(row["bad"] for rows in found.values() for row in rows))


if __name__ == "__main__":
    main()
