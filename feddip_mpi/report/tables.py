"""The tables of a report, as CSV, LaTeX and Markdown text. Pure."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from feddip_mpi import config, metrics
from feddip_mpi.report import summaries
from feddip_mpi.report.runs import Hardware, Run
from feddip_mpi.report.summaries import Group, Line, Spread

SUMMARY_COLUMNS = (
    "setting", "method", "variant", "sparsity", "seeds", "accuracy_mean", "accuracy_lowest", "accuracy_highest",
    "accuracy_last5_mean", "accuracy_last5_lowest", "accuracy_last5_highest", "upload_bytes_mean", "upload_bytes_lowest",
    "upload_bytes_highest", "seconds_mean", "seconds_lowest", "seconds_highest", "compared_with", "accuracy_difference",
    "times_fewer_bytes", "time_ratio", "hardware", "versions", "runs",
)  # fmt: skip
# Every number that a round has one of; `layer_rows` and `client_rows` have what there is one of for each layer and client.
ROUND_NAMES = tuple(
    name for name, field in metrics.FIELDS.items() if field.kind in ("int", "float") and name != "round"
)
# What LaTeX reads as a command, in an order in which no replacement is replaced again.
_LATEX = (
    ("\\", "\x00"), ("{", r"\{"), ("}", r"\}"), ("\x00", r"\textbackslash{}"), ("&", r"\&"), ("%", r"\%"), ("$", r"\$"),
    ("#", r"\#"), ("_", r"\_"), ("~", r"\textasciitilde{}"), ("^", r"\textasciicircum{}"),
)  # fmt: skip


# Heads, and which cell of `display_cells` stands below each.
_LATEX_COLUMNS = {
    "method": "method", "sparsity": "sparsity", "seeds": "seeds", "accuracy": "accuracy", "last 5": "last5",
    "to dense": "difference", "uploaded": "bytes", "fewer": "fewer", "seconds": "seconds", "hardware": "hardware",
}  # fmt: skip
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
# What Markdown and the HTML in it would take for their own.
_MARKDOWN = re.compile(r"[\\`*\[\]<>|&]")


def summary_rows(made: Sequence[Line], letters: Mapping[Hardware, str]) -> list[dict[str, Any]]:
    """A row a group, all numbers at full length; None where there is none."""
    rows = []
    for line in made:
        group = line.group
        rows.append(
            {
                "setting": group.setting,
                "method": group.method,
                "variant": group.variant,
                "sparsity": group.sparsity,
                "seeds": " ".join(map(str, group.seeds)),
                **_spread("accuracy", line.accuracy),
                **_spread("accuracy_last5", line.last5),
                **_spread("upload_bytes", line.upload_bytes),
                **_spread("seconds", line.seconds),
                "compared_with": line.against.title if line.against else None,
                "accuracy_difference": line.accuracy_difference,
                "times_fewer_bytes": line.times_fewer_bytes,
                "time_ratio": line.time_ratio,
                "hardware": " ".join(letters[kind] for kind in group.hardware),
                "versions": " | ".join(sorted({run.versions for run in group.runs})),
                "runs": " ".join(run.name for run in group.runs),
            }
        )
    return rows


def _spread(name: str, value: Spread | None) -> dict[str, float | None]:
    parts = (None, None, None) if value is None else (value.mean, value.low, value.high)
    return dict(zip((f"{name}_mean", f"{name}_lowest", f"{name}_highest"), parts, strict=True))


def run_rows(runs: Sequence[Run], letters: Mapping[Hardware, str]) -> list[dict[str, Any]]:
    """A row a run: its folder, its result, all of its configuration."""
    names = (
        "test_accuracy",
        "test_accuracy_mean_of_last_5",
        "sparsity",
        "upload_bytes",
        "seconds",
        "peak_host_memory_bytes",
    )
    return [
        {
            "run": str(run.path),
            "label": run.label,
            "setting": summaries.setting_of(run.config),
            **{f"final_{name}": run.summary.get(name) for name in names},
            "hardware": letters[run.hardware],
            "hardware_name": str(run.hardware),
            "versions": run.versions,
            **config.flat(run.config),
        }
        for run in runs
    ]


def round_rows(made: Sequence[Group]) -> list[dict[str, Any]]:
    """A row for each group, round and name: mean, lowest and highest of the seeds."""
    return [
        _place(group) | {"round": int(number), "name": name, "mean": mean, "lowest": low, "highest": high}
        for group in made
        for name in ROUND_NAMES
        for number, mean, low, high in summaries.by_round(group, name)
    ]


def layer_rows(made: Sequence[Group]) -> list[dict[str, Any]]:
    """A row for each group, prunable tensor and round: its sparsity, mean, lowest and highest of the seeds."""
    return [
        _place(group) | {"round": int(number), "layer": layer, "mean": mean, "lowest": low, "highest": high}
        for group in made
        for layer, table in summaries.layers(group).items()
        for number, mean, low, high in table
    ]


def client_rows(made: Sequence[Group]) -> list[dict[str, Any]]:
    """A row for each run, round and client that was evaluated: the accuracy on its own test images."""
    return [
        _place(group) | {"seed": run.config.seed, "round": row["round"], "client": client, "accuracy": accuracy}
        for group in made
        for run in group.runs
        for row in run.records
        for client, accuracy in enumerate(row.get("client_accuracy") or [])
        if accuracy is not None
    ]


def partition_rows(made: Sequence[Group]) -> list[dict[str, Any]]:
    """A row for each setting, seed, client and class: training images. Equal for all methods of a seed."""
    found = {
        (group.setting, run.config.seed): run
        for group in reversed(made)  # the first one that has it counts
        for run in group.runs
        if run.histogram is not None
    }
    return [
        {"setting": setting, "seed": seed, "client": client, "class": number, "class_name": name, "images": int(images)}
        for (setting, seed), run in sorted(found.items(), key=lambda item: item[0])
        if run.histogram is not None
        for client, counts in enumerate(run.histogram)
        for number, (images, name) in enumerate(zip(counts, run.class_names or [""] * len(counts), strict=True))
    ]


def _place(group: Group) -> dict[str, Any]:
    return {"setting": group.setting, "method": group.label, "sparsity": group.sparsity}


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as CSV with a header; None is empty, text that could be a formula begins with an apostrophe."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["empty"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _harmless(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _harmless(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula, behind the apostrophe that keeps it text; a label may be anything."""
    return f"'{value}" if isinstance(value, str) and value[:1] in _FORMULA else value


def to_latex(made: Sequence[Line], letters: Mapping[Hardware, str]) -> str:
    """The summary of one setting as a table for booktabs."""
    group = made[0].group
    kinds = sorted({kind for line in made for kind in line.group.hardware})
    versions = sorted({run.versions for line in made for run in line.group.runs})
    caption = (
        f"{group.heading}. Mean of the seeds (lowest to highest); accuracy of the pruned model after the last round, "
        f"beside it the mean of its {summaries.last_evaluations([line.group for line in made])} ({summaries.AS_SPARSE}), which "
        "the figures show; "
        "points to dense after the last round. "
        + (f"{unlike} " if (unlike := summaries.unequal_text([line.group for line in made])) else "")
        + "Hardware: " + "; ".join(f"{letters[kind]}: {kind}" for kind in kinds) + ". "
        + ("Seconds of different letters are not comparable. " if len(kinds) > 1 else "")
        + "Versions: " + "; ".join(versions) + "."
    )  # fmt: skip
    body = [" & ".join(escape(cell) for cell in _latex_cells(line, letters)) + r" \\" for line in made]
    lines = [
        "% Needs \\usepackage{booktabs}.", r"\begin{table}", r"\centering", rf"\caption{{{escape(caption)}}}",
        r"\begin{tabular}{lllllrrrrl}", r"\toprule", " & ".join(_LATEX_COLUMNS) + r" \\", r"\midrule", *body, r"\bottomrule",
        r"\end{tabular}", r"\end{table}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def to_markdown(name: str, family: Mapping[str, Sequence[Group]]) -> str:
    """A task as a table for documents: a row a method, a column for each partition and sparsity.

    A cell has the mean of the last evaluations, the bytes uploaded, and how many times fewer those are than what the dense
    yardstick of its partition uploaded.

    Args:
        family: the groups of settings that differ in the partition alone, by the partition's name.
    """
    every = [group for groups in family.values() for group in groups]
    levels = sorted({group.level for group in every if group.prunes}) or [0.0]
    columns = [(partition, level) for partition in family for level in levels]
    columns = [(p, s) for p, s in columns if any(group.level == s or s == 0 for group in family[p])]
    of_most = max({group.seeds for group in every}, key=[group.seeds for group in every].count)
    unless = "" if all(group.seeds == of_most for group in every) else ", or those that a cell names"
    rows = {group.label: group for group in sorted(every, key=_rank)}  # in the order in which a label comes first
    lines = [
        f"{in_markdown(name)}. Accuracy of the pruned model on the test images, mean of the "
        f"{summaries.last_evaluations(every)} ({summaries.AS_SPARSE}): {_over(of_most)}{unless}; uploads of all clients in all "
        "rounds; how many times fewer bytes than the dense yardstick of the same partition.", "",
        "| method | " + " | ".join(f"{summaries.capital(partition)}, {level:.4g}" for partition, level in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]  # fmt: skip
    for label, first in rows.items():
        cells = [_markdown_cell(label, family[partition], level, of_most) for partition, level in columns]
        lines.append(f"| {in_markdown(first.name)}{'' if first.prunes else ' (dense)'} | " + " | ".join(cells) + " |")
    beside = sorted(
        {f"{in_markdown(g.name)} {g.sparsity:.4g}" for g in every if g.prunes and abs(g.sparsity - g.level) > 1e-4}
    )
    lines += ["", f"Ended beside the sparsity asked for: {', '.join(beside)}."] if beside else []
    lines += ["", in_markdown(unlike)] if (unlike := summaries.unequal_text(every)) else []
    return "\n".join(lines) + "\n"


def _rank(group: Group) -> tuple[bool, float, float]:
    """Dense methods first, then the mildest sparsity, there the best accuracy."""
    return (
        group.prunes,
        group.level,
        -sum(run.summary["test_accuracy_mean_of_last_5"] for run in group.runs) / len(group.runs),
    )


def _markdown_cell(label: str, groups: Sequence[Group], level: float, of_most: Sequence[int]) -> str:
    """Of a method at a sparsity; dense ones are the same at each."""
    from feddip_mpi.report import terminal

    found = [line for line in summaries.lines(groups) if line.group.label == label]
    found = [line for line in found if not line.group.prunes or line.group.level == level]
    if len(found) != 1:
        return "-"
    (line,) = found
    fewer = "" if line.times_fewer_bytes is None or line.against is line.group else f", {line.times_fewer_bytes:.3g} x"
    seeds = line.group.seeds
    other = "" if seeds == of_most else f" (seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))})"
    return f"{spread_text(line.last5, 4)}{other}<br>{terminal.size(line.upload_bytes.mean)}{fewer}"


def _over(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    return f"mean of the seeds {', '.join(map(str, seeds))} (lowest to highest)"


def _latex_cells(line: Line, letters: Mapping[Hardware, str]) -> list[str]:
    cells = display_cells(line, letters)
    return [cells[name] for name in _LATEX_COLUMNS.values()]


def display_cells(line: Line, letters: Mapping[Hardware, str]) -> dict[str, str]:
    """A row of the summary as text, for the page and for LaTeX."""
    from feddip_mpi.report import terminal

    group, seconds, itself = line.group, line.seconds, line.against is line.group
    return {
        "method": group.name,
        "sparsity": f"{group.sparsity:.4g}" if group.prunes else "dense",
        "seeds": ", ".join(map(str, group.seeds)),
        "accuracy": spread_text(line.accuracy, 4),
        "last5": spread_text(line.last5, 4),
        "difference": "-" if itself else _signed(line.accuracy_difference),
        "bytes": terminal.size(line.upload_bytes.mean),
        "fewer": "-" if itself or line.times_fewer_bytes is None else f"{line.times_fewer_bytes:.3g}",
        "seconds": "mixed hardware" if seconds is None else spread_text(seconds, 1),
        "time_ratio": "-" if itself or line.time_ratio is None else f"{line.time_ratio:.2f}",
        "hardware": ", ".join(letters[kind] for kind in group.hardware),
    }


def spread_text(value: Spread, digits: int) -> str:
    """`mean (lowest to highest)`; of a single seed the value alone."""
    if value.count == 1:
        return f"{value.mean:.{digits}f}"
    return f"{value.mean:.{digits}f} ({value.low:.{digits}f} to {value.high:.{digits}f})"


def _signed(difference: float | None) -> str:
    return "-" if difference is None else f"{100 * difference:+.2f}"


def escape(text: str) -> str:
    """Text for LaTeX; what cannot be seen, an empty line among it, is a space."""
    text = "".join(character if character.isprintable() else " " for character in text)
    for character, command in _LATEX:
        text = text.replace(character, command)
    return text


def in_markdown(text: str) -> str:
    """Text in one line of Markdown, also in a cell of a table."""
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(text.split()))
