"""Tables and figures of the study, from its run folders into README.md and docs/results.

    python benchmarks/study_documents.py runs/fashion-mnist-short
    python benchmarks/study_documents.py runs/cifar10-alexnet-short runs/cifar100-resnet18-short --evaluations cifar-short

What has been run so far counts; the same command again takes up what has finished since. Written are the parts between
`<!-- study -->` and `<!-- end study -->` in README.md and docs/results/study.md, and docs/results/study/: the report's
overview, accuracy by round for each partition and sparsity, its summary.csv, and runs.jsonl with what all that is made
from. Runs that stand there are counted with those of the folders, so that a study can grow where the folders of its first
runs are gone; of a run that is in both, the folder's counts. `--evaluations NAME` writes every evaluation of some runs
into docs/results/study/NAME.csv instead, whatever they train.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from feddip_mpi import config, hdf5
from feddip_mpi.report import accuracy_figures, drawing, figures, page, plots, runs, summaries, tables
from feddip_mpi.report.runs import Found, Hardware, Run
from feddip_mpi.report.summaries import Group, Line

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- study -->", "<!-- end study -->"
# Rows of the README's table: labels of the grid, and what its reader has to know about them.
ROWS = {
    "fedavg": "FedAvg, dense", "feddip-int4": "**FedDIP, int4** (the default)", "feddip": "FedDIP, fp32",
    "gradual": "gradual magnitude", "ssfl": "SSFL", "snip": "SNIP", "feddst": "FedDST", "erk": "static random mask (ERK)",
}  # fmt: skip
COLUMNS = (("iid", 0.95), ("iid", 0.98), ("dirichlet(0.5)", 0.95), ("dirichlet(0.5)", 0.98))


def main(words: Sequence[str] | None = None) -> None:
    """Take what is finished into the documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of the sweep; none: from runs.jsonl alone")
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md and docs lie")
    parser.add_argument("--evaluations", metavar="NAME", help="write NAME.csv and nothing else")
    arguments = parser.parse_args(words)
    if arguments.evaluations and not arguments.runs:
        parser.error("--evaluations: name the folders of the runs")
    found = runs.find(arguments.runs) if arguments.runs else Found()
    if arguments.evaluations:
        path = arguments.root / "docs" / "results" / "study" / f"{arguments.evaluations}.csv"
        hdf5.write_text(path, evaluations(found.runs))
        return
    root, folder = arguments.root, arguments.root / "docs" / "results" / "study"
    folder.mkdir(parents=True, exist_ok=True)
    add_stored(found, folder / "runs.jsonl")
    if not found.runs:
        parser.error("no runs: none given and none stored")
    made = summaries.groups(found.runs)
    families = summaries.families(made)
    if len(families) != 1:
        parser.error(f"one study at a time; these folders hold {'; '.join(families)}")
    ((name, family),) = families.items()
    pictures = draw(made, family, folder)
    letters = summaries.hardware_letters(found.runs)
    lines = [line for groups in family.values() for line in summaries.lines(groups)]
    stored = [json.dumps({"defaults": config.flat(config.Config())}), *map(to_line, sorted(found.runs, key=key_of))]
    hdf5.write_text(folder / "runs.jsonl", "".join(line + "\n" for line in stored))
    hdf5.write_text(folder / "summary.csv", tables.to_csv(tables.summary_rows(lines, letters)))
    fill(root / "README.md", f"{compact(family)}\n{source(found)}")
    whole = [
        tables.to_markdown(name, family),
        source(found),
        *(f"![{title}](study/{name}.png)\n" for name, title in pictures.items()),
    ]
    fill(root / "docs" / "results" / "study.md", "\n".join(whole))


def evaluations(found: Sequence[Run]) -> str:
    """Every evaluation of some runs as CSV, with what was uploaded up to it."""
    rows = []
    for run in sorted(found, key=lambda run: (run.config.data.name, run.label, run.config.seed)):
        sent = 0
        for record in run.records:
            sent += record["upload_bytes"]
            if record["test_accuracy"] is not None:
                rows.append({
                    "data": run.config.data.name, "model": run.config.model.name, "method": run.label,
                    "seed": run.config.seed, "round": record["round"], "test_accuracy": record["test_accuracy"],
                    "sparsity": round(record["sparsity"], 4), "upload_bytes_so_far": sent,
                    "emptied_layers": sum(share == 1 for share in record["sparsity_by_layer"].values()),
                })  # fmt: skip
    return tables.to_csv(rows)


def compact(family: Mapping[str, Sequence[Group]]) -> str:
    """The README's table: the methods of `ROWS` at `COLUMNS`, as far as there are cells, and bytes at the first."""
    lines = {
        (partition, line.group.label, line.group.level): line
        for partition, groups in family.items()
        for line in summaries.lines(groups)
    }

    def cell(label: str, column: tuple[str, float]) -> Line | None:
        partition, level = column
        return lines.get((partition, label, level)) or lines.get((partition, label, 0.0))

    columns = [column for column in COLUMNS if any((column[0], label, column[1]) in lines for label in ROWS)]
    heads = [f"{summaries.capital(partition)}, {100 * level:g} % zeros" for partition, level in columns]
    text = [f"| | {' | '.join(heads)} | uploaded | |", "|---" * (3 + len(columns)) + "|"]
    for label, name in ROWS.items():
        cells = [cell(label, column) for column in columns]
        first = cells[0] if cells else None
        shown = [tables.spread_text(line.last5, 3) if line else "-" for line in cells]
        dense = first is None or first.against is first.group or first.times_fewer_bytes is None
        fewer = "" if dense or first is None else f"{first.times_fewer_bytes:.3g} times less"
        size = f"{first.upload_bytes.mean / 1e6:.1f} MB" if first else "-"
        if any(cells):
            text.append(f"| {name} | {' | '.join(shown)} | {size} | {fewer} |")
    seeds = {line.group.seeds for label in ROWS for column in columns if (line := cell(label, column))}
    if len(seeds) > 1:
        text.append("\nAn accuracy without a range is one seed's; bytes are the mean of the seeds.")
    return "\n".join(text) + "\n"


def source(found: Found) -> str:
    """Seeds, hardware, versions and how much of the grid there is, in one paragraph."""
    seeds = sorted({run.config.seed for run in found.runs})
    cells = len(found.runs)
    left = f" (and {len(found.left_out)} left out: unfinished, damaged or there twice)" if found.left_out else ""
    several = "means of the seeds (lowest to highest), " if len(seeds) > 1 else ""
    counted = f"{several}seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}, {cells} runs{left}"
    kinds = "; ".join(sorted({str(run.hardware) for run in found.runs}))
    text = f"{counted}; {kinds}; {'; '.join(sorted({run.versions for run in found.runs}))}"
    return f"{text[:1].upper()}{text[1:]}.\n"


# What tables and figures take of a summary.
SUMMARY = (
    "rounds", "test_accuracy", "test_accuracy_mean_of_last_5", "evaluations_in_mean", "upload_bytes", "seconds", "seed",
    "versions", "mpi",
)  # fmt: skip
RECORD = ("round", "test_accuracy", "sparsity")


def key_of(run: Run) -> tuple[str, str, float, int]:
    """What a run of the study is told by."""
    settings = run.config
    return summaries.partition_of(settings), run.label, settings.sparsity.final, settings.seed


def to_line(run: Run) -> str:
    """A run as a line of runs.jsonl: what tells it, and the evaluations."""
    settings, defaults = config.flat(run.config), config.flat(config.Config())
    rows = [row for row in run.records if row.get("test_accuracy") is not None]
    return json.dumps({
        "run": run.name, "label": run.label,
        "config": {name: value for name, value in settings.items() if value != defaults[name] and name != "data.path"},
        "summary": {"evaluations_in_mean": min(5, len(rows))}
        | {name: run.summary[name] for name in SUMMARY if name in run.summary},
        "hardware": vars(run.hardware),
        "evaluations": [[row[name] for name in RECORD] for row in rows],
    })  # fmt: skip


def from_line(line: str, defaults: Mapping[str, Any]) -> Run:
    """The inverse of `to_line`, as far as tables and figures go; `defaults`: what the line does not say."""
    told = json.loads(line)
    settings = config.validate(nested({**defaults, **told["config"]}))
    rows = [dict(zip(RECORD, values, strict=True)) for values in told["evaluations"]]
    return Run(Path(told["run"]), settings, rows, told["summary"], Hardware(**told["hardware"]), told["label"])


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key as tables within tables."""
    whole: dict[str, Any] = {}
    for name, value in flat.items():
        *parts, last = name.split(".")
        table = whole
        for part in parts:
            table = table.setdefault(part, {})
        table[last] = value
    return whole


def add_stored(found: Found, path: Path) -> None:
    """Add the runs of a runs.jsonl that are not among those found."""
    own = {key_of(run) for run in found.runs}
    head, *rest = path.read_text(encoding="utf-8").splitlines() if path.exists() else ['{"defaults": {}}']
    stored = [from_line(line, json.loads(head)["defaults"]) for line in rest]
    found.runs += [run for run in stored if key_of(run) not in own]


def draw(made: Sequence[Group], family: Mapping[str, Sequence[Group]], folder: Path) -> dict[str, str]:
    """Save the pictures; their titles by name. Accuracy by round needs every run's evaluations: else what is there stays."""
    look = drawing.Look(made)
    footer = drawing.footer_of(summaries.hardware_letters([run for group in made for run in group.runs]))
    titles: dict[str, str] = {}

    def save(picture: drawing.Picture, level: str) -> None:
        finished = drawing.finish(picture, level, footer)
        name = page.slug(finished.name)
        plots._save(finished.figure, folder / f"{name}.png")
        titles[name] = finished.title

    with drawing.style():
        if (overview := accuracy_figures.overview(family, look)) is not None:
            save(overview, "")
        for partition, groups in family.items():
            dense = [group for group in groups if not group.prunes]
            for level in sorted({group.level for group in groups if group.prunes}):
                members = [*dense, *(group for group in groups if group.prunes and group.level == level)]
                place = f"{summaries.capital(partition)}, sparsity {level:.4g}"
                if all(len(run.records) > 1 for group in members for run in group.runs):
                    if (picture := figures.accuracy_by_round(members, look)) is not None:
                        save(picture, place)
                elif (folder / f"{page.slug(f'accuracy-by-round-{place}')}.png").exists():
                    titles[page.slug(f"accuracy-by-round-{place}")] = f"Accuracy by round, {place}"
    for old in folder.glob("*.png"):
        if old.stem not in titles:
            old.unlink()
    return titles


def fill(path: Path, text: str) -> None:
    """Put the text between the marks of a document."""
    before, mark, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise SystemExit(f"{path}: has no {BEGIN} ... {END}")
    hdf5.write_text(path, f"{before}{BEGIN}\n{text.rstrip()}\n{END}{after}")


if __name__ == "__main__":
    main()
