"""What rank 0 shows: rich progress on a terminal, plain lines in a batch log, the summary at the end."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from feddip_mpi import output
from feddip_mpi.output import note as note
from feddip_mpi.output import say as say

if TYPE_CHECKING:
    from rich.table import Table

    from feddip_mpi.federation import Federation
    from feddip_mpi.metrics import Record


class Progress(Protocol):
    """Shows one record a round."""

    def show(self, record: Record) -> None: ...

    def close(self) -> None: ...


def size(count: float) -> str:
    """Bytes in decimal units: 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def counted(number: int, what: str) -> str:
    """`1 round`, `2 rounds`."""
    return f"{number} {what}{'s' * (number != 1)}"


def clock(seconds: float) -> str:
    """h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def line(record: Record, rounds: int) -> str:
    """One round in one line."""
    accuracy = record["test_accuracy"]
    return "  ".join(
        [
            f"round {record['round']:>{len(str(rounds))}}/{rounds}",
            f"accuracy {accuracy:.4f}" if accuracy is not None else "accuracy   -   ",
            f"loss {record['train_loss']:.3f}",
            f"sparsity {record['sparsity']:.4f}",
            f"sent {size(record['upload_bytes'])} (dense {size(record['dense_bytes'])})",
            f"{record['round_seconds']:.2f} s",
        ]
    )


def progress(built: Federation, folder: Path) -> Progress:
    """Rich on a terminal, else plain lines."""
    wanted = "rich" if is_terminal() else "plain"
    config = built.config
    say(
        f"{config.method}: {config.model.name} ({built.layout.size:,} values, {built.layout.prunable:,} prunable) on "
        f"{built.dataset.name}, {config.clients} clients, {config.participants} a round, on {built.comm.size} rank(s), "
        f"{built.device.type}\nrun folder: {folder}"
    )
    return RichProgress(config.rounds) if wanted == "rich" else PlainProgress(config.rounds)


def is_terminal() -> bool:
    """Whether a person looks at stdout. FEDDIP_PROGRESS=rich or plain decides; without it, a terminal does.

    Open MPI's mpirun gives rank 0 a pseudo-terminal even when its own output goes to a file, so isatty() says
    nothing there; jobs/quickstart.sh looks at its own stdout and sets the variable.
    """
    told = os.environ.get("FEDDIP_PROGRESS")
    if told in ("rich", "plain"):
        return told == "rich"
    return output.stdout().isatty() and "OMPI_COMM_WORLD_SIZE" not in os.environ


class PlainProgress:
    """One line a round, with the time that is left."""

    def __init__(self, rounds: int) -> None:
        self._rounds, self._eta = rounds, Eta(rounds)

    def show(self, record: Record) -> None:
        say(f"{line(record, self._rounds)}  left {clock(self._eta.left(record['round']))}")

    def close(self) -> None:
        pass


class RichProgress:
    """A bar with the newest numbers beside it."""

    def __init__(self, rounds: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        whole = Column(no_wrap=True)
        # On a narrow terminal the bar shrinks first, then the numbers are cut; round and time left stay.
        self._bar = Progress(
            MofNCompleteColumn(table_column=whole),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            TextColumn("{task.fields[numbers]}", table_column=Column(no_wrap=True, overflow="ellipsis", max_width=52)),
            TimeRemainingColumn(compact=True, table_column=whole),
            expand=True,
            console=Console(file=output.stdout()),
        )
        self._rounds = rounds
        self._accuracy = "-"
        self._task = self._bar.add_task("rounds", total=rounds, numbers="")
        self._bar.start()

    def show(self, record: Record) -> None:
        accuracy = record["test_accuracy"]
        if accuracy is not None:
            self._accuracy = f"{accuracy:.4f}"
        numbers = (
            f"acc {self._accuracy} loss {record['train_loss']:.3f} zeros {record['sparsity']:.3f} "
            f"sent {size(record['upload_bytes'])}"
        )
        self._bar.update(self._task, completed=record["round"], numbers=numbers)

    def close(self) -> None:
        self._bar.stop()


class Eta:
    """Seconds left, from the mean of the rounds seen."""

    def __init__(self, rounds: int) -> None:
        self._rounds, self._started = rounds, time.monotonic()
        self._first: int | None = None

    def left(self, finished: int) -> float:
        if self._first is None:
            self._first = finished - 1
        return (time.monotonic() - self._started) / (finished - self._first) * (self._rounds - finished)


def print_json(value: Any) -> None:
    """A value as JSON on stdout; NaN and infinity become null."""
    from feddip_mpi.metrics import without_nan

    say(json.dumps(without_nan(value), indent=2, allow_nan=False))


def warn_refused(reasons: Sequence[str]) -> None:
    """Say why newer checkpoints were passed over."""
    for reason in reasons:
        note(f"refused a checkpoint: {reason}")


def print_tables(*parts: Any) -> None:
    """Rich tables and lines of text on stdout: as wide as the terminal, or as $COLUMNS or 110 columns in a file or a pipe.

    Names are the user's: no markup, no emoji codes, nothing highlighted.
    """
    from rich.console import Console

    width = None if is_terminal() or "COLUMNS" in os.environ else 110
    console = Console(
        file=output.stdout(), force_terminal=None if is_terminal() else False, width=width, markup=False, emoji=False,
        highlight=False,
    )  # fmt: skip
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """A light table; the columns named in `right` hold numbers. Without columns: pairs of a name and a value."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), show_header=bool(columns))
    for column in columns or ("", ""):
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def show_summary(summary: dict[str, Any], folder: Path, plot: Path | None) -> None:
    """The run in two tables: its numbers, and the sparsity of each layer."""
    from rich.table import Table

    numbers = Table(title="Result", show_header=False)
    numbers.add_column(no_wrap=True)  # a name in two lines would read as two rows, the second without a value
    numbers.add_column(overflow="fold")
    for name, value in _rows(summary, folder, plot):
        numbers.add_row(name, value)
    layers = Table("layer", "sparsity", title="Sparsity by layer")
    for name, value in summary["sparsity_by_layer"].items():
        layers.add_row(name, f"{value:.4f}")
    print_tables(numbers, layers)


def _smaller(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The network that is left where whole channels were removed (`method: prunetrain`)."""
    if "channels_removed" not in summary:
        return []
    pairs = (("parameters_left", "parameters"), ("multiplications_left", "multiplications"))
    left = ", ".join(f"{summary[left]:,} of {summary[all_]:,} {all_}" for left, all_ in pairs)
    return [("channels removed", f"{summary['channels_removed']}: {left}")]


def _mean_of_last(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Of as many of the last five evaluations as have the last sparsity; a single one is the accuracy itself."""
    count = summary["evaluations_in_mean"]
    numbers = f"{summary['test_accuracy_mean_of_last_5']:.4f} ({summary['test_accuracy_spread_of_last_5']:.4f})"
    return [(f"  mean (spread) of the last {count} evaluations", numbers)] if count > 1 else []


def _remembered(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Where the server remembers weights that the pruned model lacks (`server_memory: on`)."""
    if not summary["server_remembers"]:
        return []
    return [("  of the server's memory W, without the mask", f"{summary['dense_memory_accuracy']:.4f}")]


def _besides(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What the method sends besides updates, the rest of the bytes above."""
    extra = summary.get("upload_extra_bytes", 0)
    return [("  and besides updates (docs/methods.md)", size(extra))] if extra else []


def _rows(summary: dict[str, Any], folder: Path, plot: Path | None) -> list[tuple[str, str]]:
    ratio = summary["dense_bytes"] / max(1, summary["upload_bytes"])
    return [
        ("accuracy of the pruned model", f"{summary['test_accuracy']:.4f}"),
        *_mean_of_last(summary),
        *_remembered(summary),
        ("sparsity of the prunable weights", f"{summary['sparsity']:.4f}"),
        *_smaller(summary),
        ("bytes uploaded", f"{size(summary['upload_bytes'])}, {ratio:.1f} times fewer than dense float32 "
                           f"({size(summary['dense_bytes'])})"),
        ("  of these values, indices, not prunable, frames",
         ", ".join(size(count) for count in summary["upload_bytes_by_kind"].values())),
        *_besides(summary),
        ("bytes that ranks received from each other", size(summary["received_bytes"])),
        ("time", f"{clock(summary['seconds'])} for {summary['rounds']} rounds on {summary['ranks']} rank(s)"),
        ("run folder", str(folder)),
        ("numbers by round", str(folder / "metrics.jsonl")),
        ("plot", str(plot) if plot else "none (run.log says why)"),
    ]  # fmt: skip
