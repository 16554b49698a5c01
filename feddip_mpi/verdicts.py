"""The doctor's verdicts, over what all ranks have reported. Pure.

Every check says PASS, or WARN (slow, or a surprise) or FAIL (a run would fail, or give wrong results) with the way out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from feddip_mpi.report import terminal

Row = Mapping[str, Any]

PASS, WARN, FAIL = "PASS", "WARN", "FAIL"
_LEVELS = (FAIL, WARN, PASS)
_MOST = 8  # lines of one check
_PARALLEL = {"lustre", "gpfs", "beegfs", "panfs", "pvfs2", "orangefs", "wekafs"}  # made for what many nodes write
_LITTLE_MEMORY = 10**9  # bytes a rank; torch alone takes a quarter of that
_LITTLE_SHARED = 256 * 10**6  # bytes; CIFAR's images and some room
_CLOCK_SECONDS = 1.0  # apart; the lines of logs are stamped with milliseconds, but nobody reads them that closely


@dataclass(frozen=True)
class Verdict:
    """One line of the doctor's.

    Attributes:
        level: PASS, WARN or FAIL.
        check: what was looked at.
        text: what was found, and the way out.
    """

    level: str
    check: str
    text: str


def verdicts(rows: Sequence[Row], folder: Row, needs: Row) -> list[Verdict]:
    """All checks: what fails first, then the warnings, then what is well.

    Args:
        rows: one a rank, see `doctor.look` and `probes`.
        folder: see `runtime.file_system`.
        needs: bytes that the configuration takes, see `probes.needs`.
    """
    checks: dict[str, tuple[Iterator[Verdict], str]] = {
        "launch": (_launch(rows), f"MPI sees {len(rows)} rank(s), as many as were started"),
        "devices": (_devices(rows), "every rank has a device, and no GPU has two ranks"),
        "versions": (_versions(rows), "the same on all ranks"),
        "mask": (_mask(rows), f"all ranks make the same weights and mask ({rows[0]['mask']['digest']})"),
        "cores": (_cores(rows), "at least a core for each thread of the ranks"),
        "clocks": (_clocks(rows), _clock_pass(rows)),
        "memory": (
            _memory(rows, needs),
            f"about {terminal.size(needs['memory_bytes'])} a rank and {terminal.size(needs['data_bytes'])} of data a node "
            "needed and free",
        ),
        "shared": (_shared_memory(rows), "room for a data set that the ranks of a node share"),
        "folder": (_folder(rows, folder), f"{folder['type']}, can be written, locks work"),
        "disk": (_disk(folder, needs), f"at most {terminal.size(needs['disk_bytes'])} for checkpoints needed and free"),
    }
    found = []
    for check, (said, well) in checks.items():
        found += _few([Verdict(v.level, check, v.text) for v in said]) or [Verdict(PASS, check, well)]
    return sorted(found, key=lambda verdict: _LEVELS.index(verdict.level))


def _few(said: Sequence[Verdict]) -> list[Verdict]:
    """What one check has to say, the worst first; what is wrong with every node of a large machine is not said for each."""
    ordered = sorted(said, key=lambda verdict: _LEVELS.index(verdict.level))
    if len(ordered) <= _MOST:
        return ordered
    rest = ordered[_MOST:]
    return [*ordered[:_MOST], Verdict(rest[0].level, rest[0].check, f"and {len(rest)} more of this check")]


def _fail(text: str) -> Verdict:
    return Verdict(FAIL, "", text)


def _warn(text: str) -> Verdict:
    return Verdict(WARN, "", text)


def _launch(rows: Sequence[Row]) -> Iterator[Verdict]:
    launched, variable = rows[0]["launched"], rows[0]["launched_by"]
    if len(rows) < launched:
        believes = "each believes that it is alone and rank 0" if len(rows) == 1 else f"{len(rows)} believe to be all"
        yield _fail(
            f"{launched} ranks were started ({variable}), but {believes}: launcher and MPI library do not fit together (PMI "
            "or PMIx); use the mpirun that belongs to the library above, or srun --mpi=pmix (Open MPI), --mpi=pmi2 (MPICH)"
        )


def _devices(rows: Sequence[Row]) -> Iterator[Verdict]:
    for error, ranks in _groups(rows, lambda row: row["device_error"]).items():
        if error is not None:
            yield _fail(f"{named(ranks)}: {error}")
    for (host, gpu), ranks in _groups(rows, lambda row: (row["host"], row["gpu"] and row["gpu"]["id"])).items():
        if gpu is not None and len(ranks) > 1:
            yield _warn(f"{named(ranks)} share one GPU of {host} ({gpu}): start one rank a GPU")
    if text := differing(rows, lambda row: row["device"].split(":")[0]):
        yield _fail(f"some ranks compute on a GPU and some on the CPU: {text}; replicas would drift apart: set device")


def _versions(rows: Sequence[Row]) -> Iterator[Verdict]:
    for name in rows[0]["versions"]:
        if text := differing(rows, lambda row, name=name: row["versions"].get(name)):  # type: ignore[misc]
            yield _fail(f"{name} differs between ranks: {text}; give all nodes one environment")
    if text := differing(rows, lambda row: row["library"]):
        yield _fail(f"the MPI library differs between ranks: {text}; load one MPI module on all nodes")
    if text := differing(rows, lambda row: row["processor"]):
        yield _warn(
            f"processors differ between ranks: {text}; replicas may drift apart by rounding: ask for equal nodes"
        )


def _mask(rows: Sequence[Row]) -> Iterator[Verdict]:
    for error, ranks in _groups(rows, lambda row: row["mask"]["error"]).items():
        if error is not None:
            yield _fail(f"{named(ranks)}: the model cannot be made: {error}")
    if text := differing(rows, lambda row: row["mask"]["digest"]):
        yield _fail(
            f"initial weights and mask differ between ranks: {text}; the ranks compute differently: give them one "
            "environment, equal processors and equal files"
        )


def _cores(rows: Sequence[Row]) -> Iterator[Verdict]:
    for host, ranks in _groups(rows, lambda row: row["host"]).items():
        threads = sum(rows[rank]["threads"] for rank in ranks)
        cores = len({core for rank in ranks for core in rows[rank]["cores"]})
        if threads > cores:
            yield _warn(
                f"{host}: {threads} threads ({named(ranks)}) on {cores} core{'s' * (cores > 1)}: fewer ranks, or "
                "bind them otherwise (mpirun --bind-to none, srun --cpus-per-task)"
            )
            continue
        yield from _pinned(rows, host, ranks)


def _pinned(rows: Sequence[Row], host: str, ranks: Sequence[int]) -> Iterator[Verdict]:
    """Ranks that crowd some cores while others of the node are free."""
    for cores, same in _groups([rows[rank] for rank in ranks], lambda row: tuple(row["cores"])).items():
        threads = sum(rows[rank]["threads"] for rank in same)
        if threads <= len(cores):
            continue
        if len(same) > 1:
            yield _warn(
                f"{host}: {named(same)} are pinned to the same core{'s' * (len(cores) > 1)} ({spans(cores)}), others are "
                "free: mpirun --bind-to none, or srun --cpu-bind=cores"
            )
        else:
            yield _warn(f"{host}: {named(same)}: more threads than cores bound to; mpirun --bind-to none")


def _clocks(rows: Sequence[Row]) -> Iterator[Verdict]:
    for row in rows:
        offset, bound = row["clock"]["offset_seconds"], row["clock"]["bound_seconds"]
        if abs(offset) - bound > _CLOCK_SECONDS:
            yield _warn(
                f"the clock of rank {row['rank']} ({row['host']}) is {abs(offset):.3g} s (to within {bound:.2g} s) "
                f"{'ahead of' if offset > 0 else 'behind'} rank 0's: times in logs do not compare; set it (chronyd, ntpd)"
            )


def _clock_pass(rows: Sequence[Row]) -> str:
    apart = max(abs(row["clock"]["offset_seconds"]) + row["clock"]["bound_seconds"] for row in rows)
    return f"at most {apart:.2g} s apart" if len(rows) > 1 else "one rank"


def _memory(rows: Sequence[Row], needs: Row) -> Iterator[Verdict]:
    wanted = max(_LITTLE_MEMORY, needs["memory_bytes"])
    for host, ranks in _groups(rows, lambda row: row["host"]).items():
        free = min(rows[rank]["memory_available_bytes"] for rank in ranks)
        if free < wanted * len(ranks) + needs["data_bytes"]:
            yield _warn(
                f"{host}: {terminal.size(free)} of memory are free for {len(ranks)} rank(s), about {terminal.size(wanted)} "
                f"each and {terminal.size(needs['data_bytes'])} of data are wanted: fewer ranks a node, fewer clients a "
                "rank, or smaller batches"
            )


def _shared_memory(rows: Sequence[Row]) -> Iterator[Verdict]:
    for host, ranks in _groups(rows, lambda row: row["host"]).items():
        folder, free = rows[ranks[0]]["shared_memory"]
        if len(ranks) > 1 and free < _LITTLE_SHARED:
            yield _warn(
                f"{host}: {terminal.size(free)} are free in {folder}: of a data set that has no room there each rank has a "
                "copy; enlarge it (docker run --shm-size)"
            )


def _folder(rows: Sequence[Row], folder: Row) -> Iterator[Verdict]:
    path, kind = folder["path"], folder["type"]
    if not folder["writable"]:
        yield _fail(f"{path}: rank 0 may not write there; name a folder with --out")
        return
    if folder["network"] and kind.lower() not in _PARALLEL:
        yield _warn(
            f"{path} lies on a network file system ({kind}): checkpoints take longer; a local or parallel one is faster"
        )
    for lock, ranks in _groups(rows, lambda row: row["lock"]).items():
        if lock in ("works", None):  # None: this rank did not try, or does not see the folder
            continue
        reason = "a second lock was granted while rank 0 held it" if lock == "granted" else lock
        yield _warn(
            f"{path} ({kind}): locks do not work, seen from {named(ranks)} ({reason}): two jobs in one run folder would "
            "not notice each other; put runs on another file system, or start one job a folder"
        )


def _disk(folder: Row, needs: Row) -> Iterator[Verdict]:
    free, wanted = folder["free_bytes"], needs["disk_bytes"]
    if free < needs["one_checkpoint_bytes"]:
        yield _fail(
            f"{folder['path']}: {terminal.size(free)} are free, not even the {terminal.size(needs['one_checkpoint_bytes'])} of "
            "one checkpoint; free space, or name another folder with --out"
        )
    elif free < wanted:
        yield _warn(
            f"{folder['path']}: {terminal.size(free)} are free, checkpoints may take {terminal.size(wanted)}: free space, "
            "lower checkpoint.keep, or name another folder with --out"
        )


def _groups(rows: Sequence[Row], key: Callable[[Any], Any]) -> dict[Any, list[int]]:
    """Ranks by a property, in the order of the lowest rank that has it."""
    found: dict[Any, list[int]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row["rank"])
    return found


def differing(rows: Sequence[Row], key: Callable[[Any], Any]) -> str:
    """Which ranks have which value; empty where all have the same."""
    groups = _groups(rows, key)
    return "; ".join(f"{value} ({named(ranks)})" for value, ranks in groups.items()) if len(groups) > 1 else ""


def named(ranks: Sequence[int]) -> str:
    """Rank 3, or ranks 0-3,6."""
    return f"rank{'s' * (len(ranks) > 1)} {spans(ranks)}"


def spans(numbers: Sequence[int]) -> str:
    """Ascending whole numbers, runs joined: 0-3,6."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)
