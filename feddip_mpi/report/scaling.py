"""A scaling study in tables: terminal, CSV, LaTeX; its pictures are in `scaling_plots`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from feddip_mpi import hdf5, scaling
from feddip_mpi.errors import InputError
from feddip_mpi.metrics import without_nan
from feddip_mpi.report import terminal
from feddip_mpi.report.benching import table

Json = Mapping[str, Any]

_SHOWN = (*scaling.PHASES, "wait", "rest")
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}",
}  # fmt: skip


def save(result: Json, folder: Path) -> list[Path]:
    """scaling.json, .csv, .tex, and .png and .pdf where matplotlib is there. Returns what was written.

    Raises:
        InputError: the folder cannot be written to.
    """
    from feddip_mpi.report import scaling_plots

    texts = {
        "scaling.json": json.dumps(without_nan(result), indent=1, allow_nan=False) + "\n",
        "scaling.csv": csv_text(result["rows"]),
        "scaling.tex": latex(result),
    }
    try:
        for name, text in texts.items():
            hdf5.write_text(folder / name, text)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to ({error})") from None
    written = [folder / name for name in texts]
    for ending in ("png", "pdf"):
        try:
            scaling_plots.scaling_figure(result, folder / f"scaling.{ending}")
        except InputError as error:  # matplotlib is an extra: the numbers are complete without a picture
            terminal.note(f"no picture: {error}")
            break
        written.append(folder / f"scaling.{ending}")
    return written


def show(result: Json) -> None:
    """Print everything."""
    parts: list[Any] = [headline(result)]
    for kind, said in (("strong", "the same run on more ranks"), ("weak", weak(result))):
        mine = [row for row in result["rows"] if row["kind"] == kind]
        if mine:
            parts.append(table(f"{kind.capitalize()} scaling: {said}", summary_rows(mine)))
            parts.append(table("  seconds a round by phase (slowest rank, medians)", phase_rows(mine)))
    predicted = [row for row in result["predictions"] if row["ranks"] >= scaling.FEWEST_PREDICTED]
    parts.append(table("PREDICTED, not measured: every rank with a core of its own", predicted_rows(predicted)))
    terminal.print_tables(*parts, *remarks(result))


def headline(result: Json) -> str:
    """What was run, and where, in a few lines."""
    c, hardware = result["configuration"], result["hardware"]
    lines = [
        f"{c['model']} on {c['data']}, {c['clients']} clients; exchange {c['exchange']}, values {c['values']}",
        f"{hardware['processor']} ({hardware['cores']} cores on the node of rank 0); {result['mpi']}",
    ]
    note = result["settings"]["note"]
    return "\n".join([*([note] if note else []), *lines])


def weak(result: Json) -> str:
    """What grows in a weak study."""
    return (
        f"{result['settings']['per_rank']} participant(s) a round for each rank; "
        f"clients ({result['configuration']['clients']}), their images and all else stay"
    )


def summary_rows(rows: Sequence[Json]) -> list[list[str]]:
    """Header and a row a rank count."""
    out = [
        [
            "ranks",
            "K",
            "s/round",
            "fastest",
            "slowest",
            "speed-up",
            "efficiency",
            "sent/rank",
            "received",
            "memory/rank",
        ]
    ]
    for row in rows:
        out.append([
            str(row["ranks"]), str(row["participants"]),
            *(_seconds(row[f"{name}round_seconds"]) for name in ("", "fastest_", "slowest_")),
            f"{row['speed_up']:.2f}", f"{row['efficiency']:.0%}",
            *(terminal.size(row[f"{name}_bytes_per_rank"]) for name in ("sent", "received", "host_memory")),
        ])  # fmt: skip
    return out


def phase_rows(rows: Sequence[Json]) -> list[list[str]]:
    """Header and a row a rank count; what no phase counts is "rest" (see `scaling`), and "wait" runs beside training."""
    return [
        ["ranks", *_SHOWN],
        *([str(row["ranks"]), *(_seconds(phase(row, name)) for name in _SHOWN)] for row in rows),
    ]


def phase(row: Json, name: str) -> float:
    """Seconds of a phase of a row, "rest" included."""
    if name == scaling.REST:
        return float(row["round_seconds"]) - sum(row[f"{p}_seconds"] for p in scaling.PHASES)
    return float(row[f"{name}_seconds"])


def predicted_rows(rows: Sequence[Json]) -> list[list[str]]:
    """Header and a row for each kind and number of ranks."""
    out = [
        ["kind", "ranks", "K", "idle", "s/round", "train", "exchange", "decode", "speed-up", "efficiency", "bytes/rank"]
    ]
    for row in rows:
        out.append([
            row["kind"], str(row["ranks"]), str(row["participants"]), str(row["idle_ranks"]),
            *(_seconds(row[f"{name}_seconds"]) for name in ("round", "train", "exchange", "decode")),
            f"{row['speed_up']:.3g}", f"{row['efficiency']:.2g}", terminal.size(row["link_bytes_per_rank"]),
        ])  # fmt: skip
    return out


def remarks(result: Json) -> list[str]:
    """What a reader must not overlook."""
    rows, cores, said = result["rows"], result["cores"], []
    idle = [row for row in rows if row["ranks"] > row["participants"]]
    if idle:
        names = ", ".join(f"{row['kind']} {row['ranks']}" for row in idle)
        said.append(f"more ranks than participants, the others idle and cannot speed up a round: {names}")
    crowded = [str(row["ranks"]) for row in rows if cores and row["ranks"] > cores]
    if crowded:
        counts = ", ".join(dict.fromkeys(crowded))
        said.append(
            f"more ranks than the {cores} cores that they share ({counts} ranks): computation does not speed up there"
        )
    if result["one_node"]:
        said.append(
            "all ranks are taken for one node (--ranks-per-node): no network was measured, the model has memory for it"
        )
    moved = [f"{row['kind']} {row['ranks']}: {terminal.size(row['moved_bytes_per_rank'])}" for row in rows
             if row["moved_bytes_per_rank"]]  # fmt: skip
    if moved:
        said.append(
            "residuals that followed their client to another rank, bytes a rank and round (in no other column; the time is in "
            f"rest): {', '.join(moved)}"
        )
    if result["same_results"] is not None:
        agreed = "recorded the same numbers, bit for bit"
        said.append(f"checked: all strong runs {agreed}" if result["same_results"] else
                    "NOT THE SAME: strong runs recorded different numbers; nodes that compute differently?")  # fmt: skip
    if result["missing"]:
        said.append(f"not finished, left out: {', '.join(result['missing'])}; start the study again")
    return [*said, *warnings(result)]


def warnings(result: Json) -> list[str]:
    """How far the prediction is to be trusted."""
    errors, most = result["errors"], max(row["ranks"] for row in result["rows"])
    if errors["largest"] is None:
        text = "the model's error is UNKNOWN: a rank count left out needs two others, one above 1, to be predicted from"
    else:
        text = (
            f"error of the model, each rank count predicted from the others: {errors['root_mean_square']:.0%} (root mean "
            f"square), at most {errors['largest']:.0%}"
        )
        if errors["beyond"] is not None:
            text += f"; the largest, predicted from fewer ranks: {errors['beyond']:.0%}"
    last = max((row["ranks"] for row in result["predictions"]), default=most)
    return [
        text,
        f"EXTRAPOLATION: measured up to {most} ranks, predicted up to {last}. What first appears on more ranks (network "
        "contention, topology, stragglers, file systems) is in no measurement and not in the model",
    ]


def csv_text(rows: Sequence[Json]) -> str:
    """The rows of `scaling.rows` as CSV, numbers in six figures."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return out.getvalue()


def latex(result: Json) -> str:
    """A table environment that needs no package."""
    header = [
        "",
        "ranks",
        "$K$",
        "s/round",
        "train",
        "exchange",
        "speed-up",
        "efficiency",
        "received/rank",
        "memory/rank",
    ]
    lines = [
        "% Needs no package. Written by feddip-mpi study.",
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
        r"\hline",
        " & ".join(header) + r" \\",
    ]
    before = ""
    for row in result["rows"]:
        lines += [r"\hline"] * (row["kind"] != before)
        cells = [
            row["kind"] if row["kind"] != before else "", str(row["ranks"]), str(row["participants"]),
            *(_seconds(row[f"{name}_seconds"]) for name in ("round", "train", "exchange")),
            f"{row['speed_up']:.2f}", f"{100 * row['efficiency']:.0f} %",
            *(terminal.size(row[f"{name}_bytes_per_rank"]) for name in ("received", "host_memory")),
        ]  # fmt: skip
        lines.append(" & ".join(escaped(cell) for cell in cells) + r" \\")
        before = row["kind"]
    caption = " ".join([headline(result).replace("\n", "; ") + ".", warnings(result)[0].capitalize() + "."])
    return "\n".join([*lines, r"\hline", r"\end{tabular}", rf"\caption{{{escaped(caption)}}}", r"\end{table}"]) + "\n"


def escaped(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _seconds(value: float) -> str:
    """Three figures; nothing that is measured here means more."""
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}" if value >= 0.001 else f"{value:.4f}"
