"""What each rank runs on, and what is wrong with it, before a long job finds out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from feddip_mpi import config, probes, runtime, session
from feddip_mpi.collectives import Communicator
from feddip_mpi.errors import FeddipError, InputError
from feddip_mpi.report import terminal
from feddip_mpi.run_folder import RunFolder
from feddip_mpi.settings import Config
from feddip_mpi.verdicts import FAIL, Verdict, differing, spans, verdicts

Row = dict[str, Any]


def examine(comm: Communicator, target: str | None, overrides: Sequence[str], as_json: bool) -> None:
    """Look at every rank and print what is found.

    Args:
        target: a configuration, or a run folder with its config.yaml; None: all defaults.

    Raises:
        InputError: a check has failed (on every rank), or `target` cannot be read.
    """

    def read() -> list[Any]:
        settings, folder = _target(target, overrides)
        return [config.to_dict(settings), runtime.file_system(folder)]

    values, folder = session.on_root(comm, read)
    settings = config.validate(values)
    rows = comm.gather_json({**look(comm, settings), "lock": probes.lock(comm, Path(folder["path"]))})
    rows = [{**row, "clock": clock} for row, clock in zip(rows, probes.clocks(comm), strict=True)]
    needs = probes.needs(settings, rows[0]["mask"], comm.size, on_gpu=all(row["gpu"] for row in rows))
    found = verdicts(rows, folder, needs)
    if comm.rank == 0:
        if as_json:
            said = [asdict(verdict) for verdict in found]
            terminal.print_json({"ranks": rows, "folder": folder, "needs": needs, "verdicts": said})
        else:
            show(rows, folder, found)
    broken = sum(verdict.level == FAIL for verdict in found)
    comm.check(InputError(f"{broken} thing{'s' * (broken > 1)} to repair before a run, see above") if broken else None)


def _target(target: str | None, overrides: Sequence[str]) -> tuple[Config, Path]:
    """The configuration to look at, and the folder that runs are written to."""
    if target is None:
        return config.parse("", overrides), Path("runs")
    if Path(target).is_dir():
        folder = RunFolder(Path(target))
        if not folder.config.exists():
            raise InputError(
                f"{target}: no run folder (it has no {folder.config.name}); name a run folder, a configuration file, or "
                "nothing for the defaults"
            )
        return config.load(folder.config, overrides), folder.path
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
        "mask": probes.mask(settings),
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
    terminal.print_tables(ranks, common, *(f"{v.level}  {v.check:<8} {v.text}" for v in found))


def _common(rows: Sequence[Row], folder: Row) -> list[tuple[str, str]]:
    """What is the same on every rank, or else who has what."""

    def of(key: Callable[[Row], Any]) -> str:
        return differing(rows, key) or str(key(rows[0]))

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
