"""What the figures of a report share: sizes, one look for each method, legends, bands, the line about runs and hardware.

The figures are narrow, so that a page can show them on a telephone; a wide one says so.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from feddip_mpi.report import plots, tables, terminal
from feddip_mpi.report.plots import BLUE, GREEN, GREY, VERMILION
from feddip_mpi.report.summaries import Group, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 5.6  # inches
WIDE = 9.6
_FOOTER = 0.5  # inches below a figure for what it was made from
_FOOTER_LINES = 5
SPREAD = "mean of the seeds; ranges, bars and bands from the lowest to the highest"
DENSE_GREY = "#8A8A8A"
# Colours of Okabe and Ito (2008) for the methods that are looked at most, and others that stay apart from them; two of
# one family share neither colour nor mark.
_KNOWN = {
    "fedavg": (DENSE_GREY, "o"), "fedprox": ("#B9B9B9", "s"), "feddip": (BLUE, "o"), "feddip-int4": (VERMILION, "D"),
    "feddip-published": ("#56B4E9", "^"), "gradual": (GREEN, "s"), "ssfl": ("#E69F00", "P"), "snip": ("#CC79A7", "v"),
    "feddst": ("#5D3A9B", "X"), "erk": ("#8C564B", "*"), "prunetrain": ("#000000", "<"), "prunefl": ("#7F7F00", ">"),
    "sparsyfed": ("#882255", "h"), "fedrts": ("#44AA99", "p"),
}  # fmt: skip
_COLOURS = (
    BLUE,
    VERMILION,
    GREEN,
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#8C564B",
    "#7F7F00",
    "#5D3A9B",
    "#882255",
)
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h", "p")  # one more than colours: a pair comes again late


@dataclass(frozen=True, eq=False)
class Picture:
    """A figure with what stands around it.

    Attributes:
        name: of its files, unique within a setting.
        title: one line.
        alternative: what it shows in words and numbers, for who does not see it.
        figure: drawn.
        groups: whose numbers are in it.
    """

    name: str
    title: str
    alternative: str
    figure: Figure
    groups: tuple[Group, ...]


class Look:
    """One colour and one mark for each method, the same in all figures, and in all reports for those of the program."""

    def __init__(self, groups: Sequence[Group]) -> None:
        labels = sorted({group.label for group in groups})
        self._pairs = {label: _KNOWN[label] for label in labels if label in _KNOWN}
        taken = set(self._pairs.values())
        every = len(_COLOURS) * len(_MARKS)
        pairs = ((_COLOURS[n % len(_COLOURS)], _MARKS[n % len(_MARKS)]) for n in range(every))
        free = [pair for pair in pairs if pair not in taken]
        # Colours that no other method of the report has come first.
        free.sort(key=lambda pair: pair[0] in {colour for colour, _ in taken})
        others = [label for label in labels if label not in self._pairs]
        self._pairs |= {label: free[number % len(free)] for number, label in enumerate(others)}

    def colour(self, label: str) -> str:
        return self._pairs[label][0]

    def mark(self, label: str) -> str:
        return self._pairs[label][1]

    def size(self, label: str, size: float) -> float:
        """Of the mark, in points: stars and crosses look smaller than squares of the same size, circles go into them."""
        return size * {"*": 1.6, "X": 1.15, "P": 1.15, "o": 0.85}.get(self.mark(label), 1.0)

    def key(self, group: Group, dense_line: bool = False) -> Any:
        """What stands for a method in a legend."""
        from matplotlib.lines import Line2D

        style = "--" if dense_line and not group.prunes else "-"
        return Line2D(
            [], [], color=self.colour(group.label), marker=self.mark(group.label), linestyle=style, linewidth=1.2,
            markersize=self.size(group.label, 5.5),
            label=group.name if group.prunes else f"{group.name} (dense)",
        )  # fmt: skip


def style() -> AbstractContextManager[None]:
    """Everything here is to be drawn inside it. Raises InputError where matplotlib is missing."""
    return plots._style()


def new(height: float, rows: int = 1, columns: int = 1, width: float = WIDTH, **more: Any) -> tuple[Figure, list[Axes]]:
    """A figure in two parts: the panels, which take a legend at their foot, and the footer of `finish`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height + _FOOTER), dpi=160, layout="constrained")
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(w_pad=0.08, h_pad=0.06)  # type: ignore[call-arg]  # the last tick's number keeps off the edge
    figure.subfigures(2, 1, height_ratios=(height, _FOOTER))
    return figure, list(figure.subfigs[0].subplots(rows, columns, squeeze=False, **more).flat)


def small_panels(count: int, height: float, **more: Any) -> tuple[Figure, list[Axes]]:
    """A panel for each method side by side, with shared axes; the rounds stand under the lowest of each column."""
    columns = 1 if count == 1 else 2 if count <= 4 else 3
    rows = -(-count // columns)
    figure, panels = new(0.6 + height * rows, rows, columns, sharex=True, sharey=True, **more)
    for panel in panels[count:]:
        panel.set_axis_off()
    for place in range(max(0, count - columns), count):
        panels[place].tick_params(labelbottom=True)
        if place >= columns * (rows - 1):
            panels[place].set_xlabel("round", fontsize=9)
    for panel in panels[:count]:
        panel.tick_params(labelsize=8)
    return figure, panels[:count]


def finish(picture: Picture, level: str, footer: Callable[[Sequence[Group]], str]) -> Picture:
    """Title on top, footer below; `level` goes into both and into the name."""
    title = f"{picture.title}, {level}" if level else picture.title
    whole = picture.figure
    upper, lower = whole.subfigs if whole.subfigs else (whole, None)
    upper.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    text = footer(picture.groups)
    look: dict[str, Any] = {"fontsize": 6, "color": GREY, "ha": "left"}
    if lower is not None:
        lower.text(0.01, 0.97, text, va="top", **look)
    else:
        whole.supxlabel(text, x=0.01, **look)
    name = f"{picture.name}-{level.replace(' ', '-')}" if level else picture.name
    return Picture(name, title, f"{title}. {picture.alternative}", whole, picture.groups)


def legend_below(figure: Figure, panel: Axes, columns: int = 3, title: str | None = None) -> None:
    """The panel's labels at the foot of the panels."""
    handles, labels = panel.get_legend_handles_labels()
    keys_below(figure, list(zip(handles, labels, strict=True)), columns, title)


def keys_below(figure: Figure, keys: Sequence[tuple[Any, str]], columns: int = 3, title: str | None = None) -> None:
    """Keys and their names at the foot of the panels, under a line that says something of all of them."""
    if keys:
        shown = [plots._clip(label, 44) for _, label in keys]
        columns = max(1, min(columns, 100 // (8 + max(map(len, shown)))))
        rows = -(-len(shown) // columns) + (title is not None)
        figure.set_figheight(figure.get_figheight() + 0.17 * (rows - 1))  # the panels keep their height
        figure.subfigs[0].legend(
            [key for key, _ in keys], shown, loc="outside lower left", ncols=columns, fontsize=8, title=title,
            title_fontsize=8, alignment="left",
        )  # fmt: skip


def say_below(figure: Figure, text: str) -> None:
    """A line at the foot of the panels."""
    figure.subfigs[0].supxlabel(text, x=0.01, ha="left", fontsize=8)


def told(groups: Sequence[Group], value: Callable[[Group], Spread], more: Callable[[Group], str] = lambda _: "") -> str:
    """A number of each group in words."""
    return "; ".join(f"{group.shown}: {tables.spread_text(value(group), 3)}{more(group)}" for group in groups) + "."


def by_label(groups: Sequence[Group]) -> list[tuple[str, list[Group]]]:
    """Groups of a method together, in their order."""
    labels = dict.fromkeys(group.label for group in groups)
    return [(label, [group for group in groups if group.label == label]) for label in labels]


def band(panel: Axes, table: np.ndarray, colour: str, label: str | None = None, **more: Any) -> None:
    """The mean by round, with the band of the seeds. `table` as `summaries.by_round` makes it."""
    rounds, mean, low, high = table.T
    look: dict[str, Any] = {"color": colour, "marker": plots._marker(len(rounds)), "markersize": 2.5, "linewidth": 1.4}
    panel.plot(rounds, mean, label=label, **(look | more))
    step: Literal["post"] | None = "post" if more.get("drawstyle") == "steps-post" else None
    panel.fill_between(rounds, low, high, step=step, color=colour, alpha=0.2, linewidth=0)


def rounds_below(panel: Axes, groups: Sequence[Group], ticks: int = 8) -> None:
    """The axis of rounds, from 0 to the last of all groups."""
    from matplotlib.ticker import MaxNLocator

    last = max(int(group.runs[0].records[-1]["round"]) for group in groups)
    panel.set_xlim(0, last + max(1, 0.02 * last))
    panel.xaxis.set_major_locator(MaxNLocator(ticks, integer=True, steps=(1, 2, 5, 10)))


def few_log_ticks(panel: Axes, low: float, high: float, most: float = 100) -> None:
    """A logarithmic axis of bytes with numbers that do not touch: over more than `most` times, powers of ten alone."""
    from matplotlib.ticker import LogLocator, NullFormatter

    panel.set_xlim(low / 1.6, high * 1.8)
    panel.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > most * low else (1.0, 3.0)))
    panel.xaxis.set_minor_formatter(NullFormatter())


def whole_scale(values: Iterable[float]) -> tuple[float, float]:
    """Lowest and highest value that a scale should show: all but those far below the others.

    Far below is more than three times the distance of the quartiles (at least 0.02) under the lower quartile: a method that does
    not learn would otherwise press all others into one line.
    """
    found = np.array(list(values), dtype=np.float64)
    low, high = np.quantile(found, (0.25, 0.75))
    within = found[found >= low - 3 * max(0.02, high - low)]
    return float(within.min()), float(found.max())


def bar_height(groups: Sequence[Group]) -> float:
    """Inches of a figure with a bar a group."""
    return 1.6 + 0.25 * len(groups)


def bar_names(panel: Axes, groups: Sequence[Group]) -> np.ndarray:
    """Put the groups' names on the left, the first on top; returns the bars' places. A line parts the sparsities."""
    places = np.arange(len(groups), dtype=float)
    panel.set_yticks(places, [plots._clip(group.shown, 30) for group in groups], fontsize=8)
    panel.set_ylim(len(groups) - 0.4, -0.6)
    panel.grid(visible=False, axis="y")
    for place, (one, other) in enumerate(itertools.pairwise(groups)):
        if one.level != other.level:
            panel.axhline(place + 0.5, color=GREY, linewidth=0.5, linestyle=":")
    return places


def footer_of(letters: Mapping[Any, str]) -> Callable[[Sequence[Group]], str]:
    """What stands in every figure: seeds, runs, versions, hardware."""

    def footer(groups: Sequence[Group]) -> str:
        runs = [run for group in groups for run in group.runs]
        seeds = sorted({run.config.seed for run in runs})
        versions = sorted({run.versions for run in runs})
        kinds = sorted({run.hardware for run in runs})
        named = "; ".join(f"{letters[kind]}: {kind}" for kind in kinds)
        places = sorted({run.path.parent.name for run in runs} - {""})  # a stored run has no folder any more
        where = f" in {', '.join(places)}" if places else ""
        lines = [
            f"{terminal.counted(len(runs), 'run')}{where}; seed{'s' * (len(seeds) != 1)} {', '.join(map(str, seeds))}"
            + (f"; {SPREAD}" if any(len(group.runs) > 1 for group in groups) else ""),
            " | ".join(versions),
            f"hardware {named}",
        ]
        pieces = [piece for line in lines for piece in textwrap.wrap(line, 125) or [""]]
        if len(pieces) > _FOOTER_LINES:  # the page's caption has all of it
            pieces = [*pieces[: _FOOTER_LINES - 1], f"{pieces[_FOOTER_LINES - 1][:110]} …"]
        return "\n".join(pieces)

    return footer
