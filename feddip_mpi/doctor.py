"""What each rank runs on, and what is wrong with it, before a long job finds out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from feddip_mpi import config, runtime, session
from feddip_mpi.collectives import Communicator
from feddip_mpi.config import Config
from feddip_mpi.errors import FeddipError, InputError
from feddip_mpi.report import terminal
from feddip_mpi.run_folder import RunFolder

Row = dict[str, Any]

_LITTLE_MEMORY = 10**9  # bytes a rank; torch alone takes a quarter of that


@dataclass(frozen=True)
class Verdict:
    """One finding. `broken`: a run would fail or give wrong results; else it would only be slow, or surprise."""

    broken: bool
    text: str


def examine(comm: Communicator, target: str | None, overrides: Sequence[str], as_json: bool) -> None:
    """Look at every rank and print what is found.

    Args:
        target: a configuration, or a run folder with its config.yaml; None: all defaults.

    Raises:
        InputError: something is broken (on every rank), or `target` cannot be read.
    """

    def read() -> list[Any]:
        settings, folder = _target(target, overrides)
        return [config.to_dict(settings), runtime.file_system(folder)]

    values, folder = session.on_root(comm, read)
    rows = comm.gather_json(look(comm, config.validate(values)))
    found = verdicts(rows, folder)
    if comm.rank == 0:
        if as_json:
            terminal.print_json({"ranks": rows, "folder": folder, "verdicts": [asdict(v) for v in found]})
        else:
            show(rows, folder, found)
    broken = sum(verdict.broken for verdict in found)
    comm.check(InputError(f"{broken} thing{'s' * (broken > 1)} to repair before a run, see above") if broken else None)


def _target(target: str | None, overrides: Sequence[str]) -> tuple[Config, Path]:
    """The configuration to look at, and the folder that runs are written to."""
    if target is None:
        return config.parse("", overrides), Path("runs")
    if Path(target).is_dir():
        folder = RunFolder(Path(target))
        settings = config.load(folder.config, overrides) if folder.config.exists() else config.parse("", overrides)
        return settings, folder.path
    return config.load(target, overrides), Path("runs")


def look(comm: Communicator, settings: Config) -> Row:
    """What this rank runs on, in JSON values. Raises nothing that the report could say."""
    local, rule = runtime.local_rank_and_rule(comm.rank, comm.node_rank)
    launched, variable = runtime.launched_ranks()
    aware, asked = comm.gpu_aware()
    return {
        "rank": comm.rank,
        "ranks": comm.size,
        "launched": launched,
        "launched_by": variable,
        "host": comm.host(),
        **runtime.process(),
        "processor": runtime.hardware()["processor"],
        "local_rank": local,
        "local_rank_rule": rule,
        "library": comm.library(),
        "thread_level": comm.thread_level(),
        "gpu_aware": aware,
        "gpu_aware_asked": asked,
        "versions": runtime.versions(),
        **_device(settings, local),
    }


def _device(settings: Config, local: int) -> Row:
    """The device that a run would use here, prepared as a run does it."""
    import torch

    try:
        device = runtime.prepare_torch(settings, local)
    except FeddipError as error:
        return {"device": "none", "device_error": str(error), "gpu": None, "threads": torch.get_num_threads()}
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        # Launchers hide GPUs from ranks: equal indices need not be the same GPU, equal identifiers are.
        gpu = {"name": properties.name, "id": str(getattr(properties, "uuid", device.index))}
    return {"device": str(device), "device_error": None, "gpu": gpu, "threads": torch.get_num_threads()}


def verdicts(rows: Sequence[Row], folder: Row) -> list[Verdict]:
    """Everything that speaks against a run, the broken things first. Pure.

    Args:
        rows: one a rank, see `look`.
        folder: see `runtime.file_system`.
    """
    found = [*_launch(rows), *_devices(rows), *_differences(rows), *_cores(rows), *_memory(rows), *_folder(folder)]
    return sorted(found, key=lambda verdict: not verdict.broken)


def _launch(rows: Sequence[Row]) -> Iterator[Verdict]:
    launched, variable = rows[0]["launched"], rows[0]["launched_by"]
    if len(rows) == 1 and launched > 1:
        yield Verdict(
            True,
            f"{launched} ranks were started ({variable}), but each believes that it is alone: launcher and MPI library "
            "do not fit together; use the mpirun that belongs to the library above, or srun --mpi=pmix (Open MPI), "
            "--mpi=pmi2 (MPICH)",
        )


def _devices(rows: Sequence[Row]) -> Iterator[Verdict]:
    for error, ranks in _groups(rows, lambda row: row["device_error"]).items():
        if error is not None:
            yield Verdict(True, f"{_ranks(ranks)}: {error}")
    for (host, gpu), ranks in _groups(rows, lambda row: (row["host"], row["gpu"] and row["gpu"]["id"])).items():
        if gpu is not None and len(ranks) > 1:
            yield Verdict(False, f"{_ranks(ranks)} share one GPU of {host} ({gpu}): start one rank a GPU")


def _differences(rows: Sequence[Row]) -> Iterator[Verdict]:
    for name in rows[0]["versions"]:
        if text := _differing(rows, lambda row, name=name: row["versions"].get(name)):  # type: ignore[misc]
            yield Verdict(True, f"{name} differs between ranks: {text}; give all nodes one environment")
    if text := _differing(rows, lambda row: row["library"]):
        yield Verdict(True, f"the MPI library differs between ranks: {text}")
    if text := _differing(rows, lambda row: row["device"].split(":")[0]):
        yield Verdict(True, f"some ranks compute on a GPU and some on the CPU: {text}; replicas would drift apart")
    if text := _differing(rows, lambda row: row["processor"]):
        yield Verdict(False, f"processors differ between ranks: {text}; replicas may drift apart by rounding")


def _cores(rows: Sequence[Row]) -> Iterator[Verdict]:
    for host, ranks in _groups(rows, lambda row: row["host"]).items():
        threads = sum(rows[rank]["threads"] for rank in ranks)
        cores = len({core for rank in ranks for core in rows[rank]["cores"]})
        if threads > cores:
            yield Verdict(
                False,
                f"{host}: {threads} threads ({_ranks(ranks)}) on {cores} core{'s' * (cores > 1)}: fewer ranks, or "
                "bind them otherwise (mpirun --bind-to none, srun --cpus-per-task)",
            )
            continue
        narrow = [rank for rank in ranks if rows[rank]["threads"] > len(rows[rank]["cores"])]
        if narrow:
            yield Verdict(False, f"{host}: {_ranks(narrow)}: more threads than cores bound to; mpirun --bind-to none")


def _memory(rows: Sequence[Row]) -> Iterator[Verdict]:
    for host, ranks in _groups(rows, lambda row: row["host"]).items():
        free = min(rows[rank]["memory_available_bytes"] for rank in ranks)
        if free < _LITTLE_MEMORY * len(ranks):
            yield Verdict(False, f"{host}: {terminal.size(free)} of memory are free for {len(ranks)} rank(s)")


def _folder(folder: Row) -> Iterator[Verdict]:
    if not folder["writable"]:
        yield Verdict(True, f"{folder['path']}: rank 0 may not write there; name a folder with --out")
    elif folder["network"]:
        yield Verdict(
            False,
            f"{folder['path']} lies on a network file system ({folder['type']}): checkpoints take longer; only rank 0 "
            "writes, so no locks are needed",
        )


def _groups(rows: Sequence[Row], key: Callable[[Row], Any]) -> dict[Any, list[int]]:
    """Ranks by a property, in the order of the lowest rank that has it."""
    found: dict[Any, list[int]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row["rank"])
    return found


def _differing(rows: Sequence[Row], key: Callable[[Row], Any]) -> str:
    """Which ranks have which value; empty where all have the same."""
    groups = _groups(rows, key)
    return "; ".join(f"{value} ({_ranks(ranks)})" for value, ranks in groups.items()) if len(groups) > 1 else ""


def _ranks(ranks: Sequence[int]) -> str:
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


def show(rows: Sequence[Row], folder: Row, found: Sequence[Verdict]) -> None:
    """The ranks as a table, what they have in common, and the verdicts, on stdout."""
    right = ("rank", "pid", "local", "threads", "free")
    ranks = terminal.table("rank", "host", "pid", "cores", "local", "device", "threads", "OMP", "free", right=right)
    for row in rows:
        gpu = f" {row['gpu']['name']}" if row["gpu"] else ""
        ranks.add_row(
            str(row["rank"]),
            row["host"],
            str(row["pid"]),
            spans(row["cores"]),
            str(row["local_rank"]),
            row["device"] + gpu,
            str(row["threads"]),
            row["omp_num_threads"] or "not set",
            terminal.size(row["memory_available_bytes"]),
        )
    common = terminal.table()
    for name, value in _common(rows, folder):
        common.add_row(name, value)
    lines = [f"{'BROKEN ' if verdict.broken else 'WARNING'}  {verdict.text}" for verdict in found]
    terminal.print_tables(ranks, common, *(lines or ["OK: nothing speaks against a run"]))


def _common(rows: Sequence[Row], folder: Row) -> list[tuple[str, str]]:
    """What is the same on every rank, or else who has what."""

    def of(key: Callable[[Row], Any]) -> str:
        return _differing(rows, key) or str(key(rows[0]))

    network = ", a network file system" if folder["network"] else ""
    return [
        ("MPI library", of(lambda row: row["library"])),
        ("threads that may call MPI", of(lambda row: row["thread_level"])),
        ("GPU-aware", of(_gpu_aware)),
        ("local rank told by", of(lambda row: row["local_rank_rule"])),
        ("processor", of(lambda row: row["processor"] or "unknown")),
        ("versions", of(lambda row: ", ".join(f"{k} {v}" for k, v in row["versions"].items()))),
        ("run folder", f"{folder['path']} on {folder['mount']}: {folder['type']}{network}, "
                       f"{terminal.size(folder['free_bytes'])} free"),
    ]  # fmt: skip


def _gpu_aware(row: Row) -> str:
    said = {True: "the library says yes", False: "the library says no", None: "the library does not say"}
    return f"{said[row['gpu_aware']]} ({row['gpu_aware_asked']}); updates travel through host memory"
