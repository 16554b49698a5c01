"""`feddip-mpi report`: one page that opens from the disk, its figures and its tables in a folder."""

from __future__ import annotations

import base64
import csv
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feddip_mpi import __version__, hdf5
from feddip_mpi.errors import InputError
from feddip_mpi.report import drawing, figures, plots, runs, summaries, tables, terminal
from feddip_mpi.report.drawing import Picture
from feddip_mpi.report.runs import Found, Hardware
from feddip_mpi.report.summaries import Group

PAGE = "report.html"
_MOST_NAMED = 10  # runs, on the terminal
_MARK = "feddip-mpi report"  # in every page of ours: such a folder may be written again


@dataclass(frozen=True)
class Drawn:
    """A figure as the page needs it: its files and its picture as text, without matplotlib's objects."""

    name: str
    title: str
    alternative: str
    source: str
    width: int
    height: int
    caption: Mapping[str, Any]


def report(paths: Sequence[str], out: str) -> None:
    """Write the report of all finished runs in these folders into the folder `out`.

    Raises:
        InputError: nothing usable, a folder that holds something else, or jinja2 or matplotlib is missing.
    """
    folder = Path(out)
    _require_free(folder)
    environment = _templates()
    found = runs.find([Path(path) for path in paths])
    made = summaries.groups(found.runs)
    letters = summaries.hardware_letters(found.runs)
    gone = _earlier(folder) - {str(run.path) for run in found.runs}
    try:
        _clear(folder)
        overviews = _overviews(made, letters, folder)
        sections = [
            _section(number, setting, members, made, letters, folder)
            for number, (setting, members) in enumerate(summaries.settings(made).items(), 1)
        ]
        _write_tables(made, found, letters, folder)
        text = environment.get_template("page.html.j2").render(_values(found, made, letters, overviews, sections))
        hdf5.write_text(folder / PAGE, text)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written ({error}); name a folder you may write to") from None
    _say(found, made, letters, folder)
    if gone:
        shown = ", ".join(sorted(gone)[:_MOST_NAMED]) + (", ..." if len(gone) > _MOST_NAMED else "")
        terminal.note(f"replaced: the report that was in {folder}; of its runs these are not in the new one: {shown}")


def _templates() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise InputError(f'a report needs jinja2 ({error}): pip install "feddip-mpi[report]"') from None
    with drawing.style():  # matplotlib, too, is asked for before anything is read
        pass
    return jinja2.Environment(
        loader=jinja2.PackageLoader("feddip_mpi.report", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def _require_free(folder: Path) -> None:
    """New, empty, or an earlier report: its files are written again."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: exists and is no folder; name another one")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    page = folder / PAGE
    if not page.is_file() or _MARK not in page.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise InputError(
            f"--out {folder}: holds files that are no report; name a new folder, or that of an earlier report"
        )


def _earlier(folder: Path) -> set[str]:
    """The runs of the report that is in a folder; none where there is none, or its table cannot be read."""
    try:
        with open(folder / "tables" / "runs.csv", encoding="utf-8", newline="") as file:
            return {row["run"] for row in csv.DictReader(file) if row.get("run")}
    except (OSError, ValueError, csv.Error):
        return set()


def _clear(folder: Path) -> None:
    """Files of an earlier report go, the page first: it must not stand beside figures of other runs.

    A line stands in its place until there is a new one, so that the same command is allowed again where this one ends before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hdf5.write_text(folder / PAGE, f"<!-- {_MARK} --><p>This report is not complete: run the command again.</p>\n")
    for part in ("figures", "tables"):
        (folder / part).mkdir(exist_ok=True)
        for old in (folder / part).iterdir():
            if old.suffix in (".png", ".pdf", ".csv", ".tex", ".md"):
                old.unlink()


def _overviews(made: Sequence[Group], letters: Mapping[Hardware, str], folder: Path) -> list[dict[str, Any]]:
    """What shows the partitions of a task side by side; drawn and saved here."""
    look, footer = drawing.Look(made), drawing.footer_of(letters)
    found = []
    for number, (family, settings) in enumerate(summaries.families(made).items(), 1):
        with drawing.style():
            drawn = [
                _save(picture, f"00-{number}-{picture.name}", letters, folder)
                for picture in figures.of_settings(settings, look, footer)
            ]
        if drawn:
            found.append({"id": f"overview-{number}", "title": family, "figures": drawn})
    return found


def _section(
    number: int,
    setting: str,
    members: Sequence[Group],
    made: Sequence[Group],
    letters: Mapping[Hardware, str],
    folder: Path,
) -> dict[str, Any]:
    """One setting: its table and its figures, which are drawn and saved here."""
    look, footer = drawing.Look(made), drawing.footer_of(letters)
    stem = f"{number:02d}-{slug(summaries.partition_of(members[0].config))}"
    drawn = []
    with drawing.style():
        for picture in figures.of_setting(members, look, footer):
            drawn.append(_save(picture, f"{stem}-{picture.name}", letters, folder))
    lines = summaries.lines(members)
    return {
        "id": f"setting-{number}",
        "title": members[0].heading,
        "rows": [tables.display_cells(line, letters) for line in lines],
        "last": summaries.last_evaluations(members),
        "against": lines[0].against.shown if lines[0].against else None,
        "unequal": summaries.unequal_text(members),
        "mixed": len({kind for group in members for kind in group.hardware}) > 1,
        "figures": drawn,
        "no_clients": members[0].config.data.partition != "iid"
        and not any(len(summaries.client_accuracy(g)) for g in members),
    }


def _save(picture: Picture, name: str, letters: Mapping[Hardware, str], folder: Path) -> Drawn:
    for suffix in ("png", "pdf"):
        plots._save(picture.figure, folder / "figures" / f"{name}.{suffix}")
    content = (folder / "figures" / f"{name}.png").read_bytes()
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))  # of the PNG's header
    members = [run for group in picture.groups for run in group.runs]
    caption = {
        "groups": [(group.shown, [(run.config.seed, run.name) for run in group.runs]) for group in picture.groups],
        "versions": sorted({run.versions for run in members}),
        "hardware": [f"{letters[kind]}: {kind}" for kind in sorted({run.hardware for run in members})],
        "seeds": ", ".join(map(str, sorted({run.config.seed for run in members}))),
        "count": len(members),
    }
    source = "data:image/png;base64," + base64.b64encode(content).decode()
    return Drawn(name, picture.title, picture.alternative, source, width // 2, height // 2, caption)


def slug(text: str) -> str:
    """For names of files."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _write_tables(made: Sequence[Group], found: Found, letters: Mapping[Hardware, str], folder: Path) -> None:
    lines = {setting: summaries.lines(members) for setting, members in summaries.settings(made).items()}
    place = folder / "tables"
    flat = [line for part in lines.values() for line in part]
    hdf5.write_text(place / "summary.csv", tables.to_csv(tables.summary_rows(flat, letters)))
    hdf5.write_text(place / "summary.tex", "\n".join(tables.to_latex(part, letters) for part in lines.values()))
    families = summaries.families(made).items()
    hdf5.write_text(place / "summary.md", "\n".join(tables.to_markdown(name, family) for name, family in families))
    hdf5.write_text(place / "runs.csv", tables.to_csv(tables.run_rows(found.runs, letters)))
    more = {
        "rounds": tables.round_rows(made),
        "layers": tables.layer_rows(made),
        "clients": tables.client_rows(made),
        "partition": tables.partition_rows(made),
        "left-out": [{"folder": str(item.path), "reason": item.reason} for item in found.left_out],
    }
    for name, rows in more.items():
        if rows:
            hdf5.write_text(place / f"{name}.csv", tables.to_csv(rows))


def _values(
    found: Found,
    made: Sequence[Group],
    letters: Mapping[Hardware, str],
    overviews: Sequence[Mapping[str, Any]],
    sections: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    return {
        "mark": _MARK,
        "version": __version__,
        "written": time.strftime("%Y-%m-%d %H:%M %z"),
        "spread_text": drawing.SPREAD if any(len(group.runs) > 1 for group in made) else "",
        "as_sparse": summaries.AS_SPARSE,
        "warnings": summaries.warnings(made, letters),
        "overviews": overviews,
        "sections": sections,
        "hardware": [(letter, kind) for kind, letter in letters.items()],
        "versions": sorted({run.versions for run in found.runs}),
        "left_out": found.left_out,
        "runs": [
            {
                "name": run.name,
                "label": summaries.name_of(run.label),
                "setting": summaries.capital(summaries.partition_of(run.config)),
                "seed": run.config.seed,
                "sparsity": f"{run.records[-1]['sparsity']:.4f}",
                "accuracy": f"{run.summary['test_accuracy']:.4f}",
                "bytes": terminal.size(run.summary["upload_bytes"]),
                "seconds": f"{run.summary['seconds']:.1f}",
                "hardware": letters[run.hardware],
                "remarks": "; ".join(run.remarks),
            }
            for run in found.runs
        ],
    }


def _say(found: Found, made: Sequence[Group], letters: Mapping[Hardware, str], folder: Path) -> None:
    for warning in summaries.warnings(made, letters):
        terminal.note(f"warning: {warning}")
    for item in found.left_out:
        terminal.note(f"left out: {item.path}: {item.reason}")
    terminal.say(
        f"{terminal.counted(len(found.runs), 'run')} in {terminal.counted(len(made), 'group')}, "
        f"{terminal.counted(len(found.left_out), 'folder')} left out\n"
        f"written: {folder / PAGE}, {folder}/figures, {folder}/tables"
    )
