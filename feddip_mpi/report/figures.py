"""The figures of a report: what differs between methods, with the spread of their seeds.

Each function draws one figure of a setting from its groups, and returns None where there is nothing to draw. The figures are
narrow, so that a page can show them on a telephone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from feddip_mpi.report import plots, summaries, terminal
from feddip_mpi.report.plots import BLUE, GREEN, GREY, VERMILION
from feddip_mpi.report.summaries import Group, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 5.6  # inches
_FOOTER = 0.5  # inches below a figure for what it was made from
_FOOTER_LINES = 5
_COLOURS = (BLUE, VERMILION, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B", "#7F7F00", "#5D3A9B")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h")  # one more than colours: no pair comes twice soon
_KIND_COLOURS = (BLUE, "#E69F00", GREEN, GREY, "#56B4E9", "#F0E442", "#8FD3BC", "#BBBBBB", "#CC79A7", VERMILION)
_CROWDED = 4  # methods
_LEGEND_LAYERS = 10  # beyond, a legend would hide the lines
SPREAD = "mean of the seeds; ranges, bars and bands from the lowest to the highest"


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
    """One colour and one mark for each method of a report, the same in all figures."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._places = {label: place for place, label in enumerate(sorted({group.label for group in groups}))}

    def colour(self, label: str) -> str:
        return _COLOURS[self._places[label] % len(_COLOURS)]

    def line(self, label: str) -> dict[str, Any]:
        place = self._places[label]
        return {"color": self.colour(label), "linestyle": ("-", "--", ":")[place // len(_COLOURS) % 3]}

    def mark(self, label: str) -> str:
        return _MARKS[self._places[label] % len(_MARKS)]


def style() -> AbstractContextManager[None]:
    """Everything here is to be drawn inside it. Raises InputError where matplotlib is missing."""
    return plots._style()


def of_setting(groups: Sequence[Group], look: Look, footer: Callable[[Sequence[Group]], str]) -> Iterator[Picture]:
    """The figures of one setting, one by one: whoever takes them may forget each before the next is drawn.

    Args:
        groups: of one setting.
        footer: the line about runs, versions and hardware that stands in the figure.
    """
    general: tuple[Callable[[Sequence[Group], Look], Picture | None], ...] = (
        accuracy_by_sparsity, accuracy_by_bytes, accuracy_by_seconds, client_accuracy, bytes_by_kind, time_by_phase, memory,
        partition,
    )  # fmt: skip
    by_level: tuple[Callable[[Sequence[Group], Look], Picture | None], ...] = (
        accuracy_by_round, sparsity_by_layer, mask_churn, penalty, pruning_error,
    )  # fmt: skip
    dense = [group for group in groups if not group.prunes]
    levels = sorted({group.level for group in groups if group.prunes})
    for draw in general:
        yield from _finish(draw(groups, look), "", footer)
    for level in levels or [0.0]:
        members = [*dense, *(group for group in groups if group.prunes and group.level == level)]
        for draw in by_level:
            yield from _finish(draw(members, look), f"sparsity {level:.4g}" if levels else "", footer)


def _finish(picture: Picture | None, level: str, footer: Callable[[Sequence[Group]], str]) -> Iterator[Picture]:
    if picture is None:
        return
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
    yield Picture(name, title, f"{title}. {picture.alternative}", whole, picture.groups)


def _new(height: float, rows: int = 1, columns: int = 1, **more: Any) -> tuple[Figure, list[Axes]]:
    """A figure in two parts: the panels, which take a legend at their foot, and the footer of `_finish`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height + _FOOTER), dpi=160, layout="constrained")
    figure.subfigures(2, 1, height_ratios=(height, _FOOTER))
    return figure, list(figure.subfigs[0].subplots(rows, columns, squeeze=False, **more).flat)


def _legend_below(figure: Figure, panel: Axes, columns: int = 3) -> None:
    handles, labels = panel.get_legend_handles_labels()
    if handles:
        shown = [plots._clip(label, 44) for label in labels]
        columns = max(1, min(columns, 100 // (8 + max(map(len, shown)))))
        rows = -(-len(shown) // columns)
        figure.set_figheight(figure.get_figheight() + 0.17 * (rows - 1))  # the panels keep their height
        figure.subfigs[0].legend(handles, shown, loc="outside lower left", ncols=columns, fontsize=8)


def _spread_text(value: Spread, digits: int = 3) -> str:
    return f"{value.mean:.{digits}f} ({value.low:.{digits}f} to {value.high:.{digits}f})"


# ---- accuracy against what it costs


def accuracy_by_sparsity(groups: Sequence[Group], look: Look) -> Picture | None:
    """Points with bars, a line a method; dense methods as level lines."""
    if not any(group.prunes for group in groups):
        return None
    figure, (panel,) = _new(3.8)
    for label, members in _by_label(groups):
        spreads = [_accuracy(group) for group in members]
        if members[0].prunes:
            _points(panel, [group.sparsity for group in members], spreads, label, look)
        else:
            panel.axhspan(spreads[0].low, spreads[0].high, color=look.colour(label), alpha=0.12, linewidth=0)
            panel.axhline(spreads[0].mean, label=f"{label} (dense)", **{**look.line(label), "linestyle": "--"})
    levels = sorted({group.level for group in groups if group.prunes})
    panel.set_xscale(
        "function", functions=(lambda x: -np.log10(1.0001 - np.minimum(x, 1)), lambda y: 1.0001 - 10.0**-y)
    )
    panel.set_xticks(levels, [f"{level:.4g}" for level in levels])
    if len(levels) == 1:
        panel.set_xlim(levels[0] - 0.3 * (1 - levels[0]), levels[0] + 0.3 * (1 - levels[0]))
    panel.minorticks_off()
    panel.set(xlabel="share of zeros among the prunable weights (logarithmic in what is left)", ylabel="accuracy")
    _legend_below(figure, panel)
    return Picture("accuracy-by-sparsity", "Accuracy against sparsity", _told(groups, _accuracy), figure, tuple(groups))


def accuracy_by_bytes(groups: Sequence[Group], look: Look) -> Picture | None:
    """Points with bars: all uploads of the run on a logarithmic scale."""
    from matplotlib.ticker import EngFormatter

    figure, (panel,) = _new(3.8)
    found = [_bytes(group).mean for group in groups]
    if not all(found):
        return None
    _scatter(panel, groups, look, _bytes)
    panel.set_xscale("log")
    _few_log_ticks(panel, min(found), max(found))
    panel.xaxis.set_major_formatter(EngFormatter(unit="B"))
    panel.set(xlabel="uploaded by all clients in all rounds", ylabel="accuracy")
    _legend_below(figure, panel)
    told = _told(groups, _accuracy, lambda group: f" for {terminal.size(_bytes(group).mean)}")
    return Picture("accuracy-by-bytes", "Accuracy against bytes", told, figure, tuple(groups))


def accuracy_by_seconds(groups: Sequence[Group], look: Look) -> Picture | None:
    """Points with bars, on one kind of hardware: that of most groups."""
    alike = _same_hardware(groups)
    if not alike:
        return None
    figure, (panel,) = _new(3.8)
    _scatter(panel, alike, look, _seconds)
    panel.set(xlabel="seconds of all rounds", ylabel="accuracy")
    panel.set_xlim(left=0)
    _legend_below(figure, panel)
    told = _told(alike, _accuracy, lambda group: f" in {_seconds(group).mean:.3g} s")
    if len(alike) < len(groups):
        told += (
            f" Left out, because they ran on other hardware: {', '.join(g.title for g in groups if g not in alike)}."
        )
    return Picture("accuracy-by-seconds", "Accuracy against seconds", told, figure, tuple(alike))


def _same_hardware(groups: Sequence[Group]) -> list[Group]:
    """The groups on the kind of hardware that most of them ran on; seeds on unlike hardware count for none."""
    whole = [group for group in groups if len(group.hardware) == 1]
    kinds = [group.hardware for group in whole]
    if not kinds:
        return []
    most = max(sorted(set(kinds)), key=kinds.count)
    return [group for group in whole if group.hardware == most]


def _accuracy(group: Group) -> Spread:
    return Spread.of(run.summary["test_accuracy"] for run in group.runs)


def _bytes(group: Group) -> Spread:
    return Spread.of(run.summary["upload_bytes"] for run in group.runs)


def _seconds(group: Group) -> Spread:
    return Spread.of(run.summary["seconds"] for run in group.runs)


def _by_label(groups: Sequence[Group]) -> list[tuple[str, list[Group]]]:
    labels = dict.fromkeys(group.label for group in groups)
    return [(label, [group for group in groups if group.label == label]) for label in labels]


def _points(panel: Axes, x: Sequence[float], spreads: Sequence[Spread], label: str, look: Look) -> None:
    means = np.array([spread.mean for spread in spreads])
    bars = np.array(
        [[spread.mean - spread.low for spread in spreads], [spread.high - spread.mean for spread in spreads]]
    )
    panel.errorbar(
        x, means, yerr=bars, label=label, capsize=3, marker=look.mark(label), elinewidth=1, **look.line(label)
    )


def _scatter(panel: Axes, groups: Sequence[Group], look: Look, cost: Callable[[Group], Spread]) -> None:
    """Accuracy over cost, with both spreads; the groups of a method hang together, their sparsities stand beside them.

    Of many methods only the ends are labelled.
    """
    crowded = len(_by_label(groups)) > _CROWDED
    for label, members in _by_label(groups):
        members = sorted(members, key=lambda group: group.sparsity)
        x, y = [cost(group) for group in members], [_accuracy(group) for group in members]
        bars = [np.array([[s.mean - s.low for s in part], [s.high - s.mean for s in part]]) for part in (x, y)]
        panel.errorbar(
            [s.mean for s in x], [s.mean for s in y], xerr=bars[0], yerr=bars[1], label=label, capsize=2, elinewidth=1,
            marker=look.mark(label), linewidth=0.8, **look.line(label),
        )  # fmt: skip
        for group, cost_there, accuracy in zip(members, x, y, strict=True):
            if crowded and group not in (members[0], members[-1]):
                continue
            panel.annotate(
                f"{group.sparsity:.4g}" if group.prunes else "dense", (cost_there.mean, accuracy.mean), (5, 4),
                textcoords="offset points", fontsize=7, color=look.colour(label),
            )  # fmt: skip


def _few_log_ticks(panel: Axes, low: float, high: float) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    panel.set_xlim(low / 1.6, high * 1.8)
    panel.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 3.0)))
    panel.xaxis.set_minor_formatter(NullFormatter())


def _told(
    groups: Sequence[Group], value: Callable[[Group], Spread], more: Callable[[Group], str] = lambda _: ""
) -> str:
    return "; ".join(f"{group.title}: {_spread_text(value(group))}{more(group)}" for group in groups) + "."


# ---- over the rounds


def accuracy_by_round(groups: Sequence[Group], look: Look) -> Picture | None:
    """A line a method, with the band of its seeds."""
    return _curves(
        groups, look, "accuracy-by-round", "Accuracy by round", "accuracy",
        lambda group: summaries.by_round(group, "test_accuracy"),
    )  # fmt: skip


def penalty(groups: Sequence[Group], look: Look) -> Picture | None:
    """Lines of those that have one."""
    return _curves(
        [group for group in groups if any(row["penalty"] for row in group.runs[0].records)], look, "penalty", "Penalty by round",
        "penalty λ", lambda group: summaries.by_round(group, "penalty"), drawstyle="steps-post",
    )  # fmt: skip


def _curves(
    groups: Sequence[Group],
    look: Look,
    name: str,
    title: str,
    what: str,
    curve: Callable[[Group], np.ndarray],
    **more: Any,
) -> Picture | None:
    curves = [(group, table) for group in groups if len(table := curve(group))]
    if not curves:
        return None
    figure, (panel,) = _new(3.5)
    for group, table in curves:
        _band(panel, table, group.label, look, **more)
    _rounds_below(panel, groups)
    panel.set_ylabel(what)
    _legend_below(figure, panel)
    ends = "; ".join(f"{group.title}: from {table[0, 1]:.3g} to {table[-1, 1]:.3g}" for group, table in curves)
    return Picture(name, title, f"{ends}.", figure, tuple(group for group, _ in curves))


def _band(panel: Axes, table: np.ndarray, label: str, look: Look, **more: Any) -> None:
    rounds, mean, low, high = table.T
    panel.plot(rounds, mean, label=label, marker=plots._marker(len(rounds)), markersize=3, **(look.line(label) | more))
    step: Literal["post"] | None = "post" if more.get("drawstyle") == "steps-post" else None
    panel.fill_between(rounds, low, high, step=step, color=look.colour(label), alpha=0.18, linewidth=0)


def _rounds_below(panel: Axes, groups: Sequence[Group]) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.set_xlabel("round")
    last = max(int(group.runs[0].records[-1]["round"]) for group in groups)
    panel.set_xlim(0, last + max(1, 0.02 * last))
    panel.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=(1, 2, 5, 10)))


def sparsity_by_layer(groups: Sequence[Group], look: Look) -> Picture | None:
    """A panel a pruning method, a line a prunable tensor; means of the seeds."""
    pruning = [group for group in groups if group.prunes and summaries.layers(group)]
    if not pruning:
        return None
    from matplotlib import colormaps

    columns = 1 if len(pruning) == 1 else 2 if len(pruning) <= 4 else 3
    rows = -(-len(pruning) // columns)
    figure, panels = _new(0.9 + 2.3 * rows, rows, columns, sharey=True)
    for panel in panels[len(pruning) :]:
        panel.set_axis_off()
    names = list(summaries.layers(pruning[0]))
    for group, panel in zip(pruning, panels, strict=False):
        panel.set_title(plots._clip(group.label, 34), fontsize=9)
        found = summaries.layers(group)
        for number, (name, table) in enumerate(found.items()):
            shade = colormaps["viridis"](0.92 * number / max(1, len(found) - 1))
            panel.plot(table[:, 0], table[:, 1], color=shade, linewidth=1.3, label=name, drawstyle="steps-post")
        _rounds_below(panel, [group])
    for panel in panels[::columns]:
        panel.set_ylabel("share of zeros")
    if len(names) <= _LEGEND_LAYERS:
        _legend_below(figure, panels[0], 4)
    ends = "; ".join(
        f"{group.label}: " + ", ".join(f"{name} {table[-1, 1]:.3f}" for name, table in summaries.layers(group).items())
        for group in pruning
    )
    order = "" if len(names) <= _LEGEND_LAYERS else f" {len(names)} tensors, dark is the first, bright the last."
    return Picture(
        "sparsity-by-layer", "Sparsity by layer", f"After the last round {ends}.{order}", figure, tuple(pruning)
    )


def mask_churn(groups: Sequence[Group], look: Look) -> Picture | None:
    """Weights that entered and left the mask at each of its updates."""
    renewed = [group for group in groups if any(row.get("mask_updated") for row in group.runs[0].records)]
    if not renewed:
        return None
    figure, panels = _new(4.6, 2, 1, sharex=True)
    told = []
    for panel, name, what in ((panels[0], "mask_grown", "grown"), (panels[1], "mask_pruned", "pruned")):
        for group in renewed:
            table = summaries.by_round(group, lambda row, name=name: row.get(name) if row.get("mask_updated") else None)  # type: ignore[misc]
            if len(table):
                _band(panel, table, group.label, look)
                told.append(f"{group.title}: {table[:, 1].sum():,.0f} {what}")
        panel.set_ylabel(f"weights {what}")
        panel.set_ylim(bottom=0)
    _rounds_below(panels[1], renewed)
    panels[0].set_xlabel("")
    _legend_below(figure, panels[0])
    return Picture("mask-churn", "Mask churn at each update", f"In all {'; '.join(told)}.", figure, tuple(renewed))


def pruning_error(groups: Sequence[Group], look: Look) -> Picture | None:
    """The two quantities of the convergence analysis: pruning error of the pruning methods, update norm of all."""
    figure, panels = _new(4.8, 2, 1, sharex=True)
    drawn = []
    for panel, name, what in (
        (panels[0], "pruning_error", "pruning error"),
        (panels[1], "update_norm", "norm of the mean update"),
    ):
        for group in groups:
            table = summaries.by_round(group, name)
            if len(table) and table[:, 1].any():
                _band(panel, table, group.label, look)
                drawn.append(f"{group.title}: {what} from {table[0, 1]:.3g} to {table[-1, 1]:.3g}")
        panel.set_ylabel(what, fontsize=9)
        panel.set_ylim(bottom=0)
    if not drawn:
        return None
    _rounds_below(panels[1], groups)
    _legend_below(figure, panels[1])
    return Picture("pruning-error", "Pruning error and update norm", f"{'; '.join(drawn)}.", figure, tuple(groups))


# ---- a bar a group


def bytes_by_kind(groups: Sequence[Group], look: Look) -> Picture | None:
    """Totals on a logarithmic scale, and of what they consist."""
    from matplotlib.ticker import EngFormatter

    found = [summaries.totals(group, summaries.BYTE_KINDS) for group in groups]
    sums = np.array([sum(kinds.values()) for kinds in found])
    if not sums.all():
        return None
    figure, (left, right) = _new(_bar_height(groups), 1, 2, sharey=True)
    places = _bar_names(left, groups)
    left.plot(sums, places, linestyle="none", marker="o", color=BLUE)
    left.set_xscale("log")
    _few_log_ticks(left, sums.min(), sums.max())
    left.xaxis.set_major_formatter(EngFormatter(unit="B", sep=""))
    left.set_xlabel("all bytes of the run", fontsize=9)
    names = [name for name in summaries.BYTE_KINDS if any(kinds[name] for kinds in found)]
    labels = [name.removesuffix("_bytes").replace("_", " ") for name in names]
    _stack(
        right,
        places,
        [[100 * kinds[n] / total for kinds, total in zip(found, sums, strict=True)] for n in names],
        labels,
    )
    right.set_xlabel("of these, %", fontsize=9)
    _legend_below(figure, right, 4)
    told = "; ".join(
        f"{group.title}: "
        + ", ".join(f"{label} {terminal.size(kinds[n])}" for n, label in zip(names, labels, strict=True))
        + _besides(group)
        for group, kinds in zip(groups, found, strict=True)
    )
    return Picture("bytes-by-kind", "Bytes by kind and phase", f"{told}.", figure, tuple(groups))


def _besides(group: Group) -> str:
    extra = summaries.totals(group, ["upload_extra_bytes"])["upload_extra_bytes"]
    return f" (of the uploads {terminal.size(extra)} besides updates)" if extra else ""


def time_by_phase(groups: Sequence[Group], look: Look) -> Picture | None:
    """Seconds of a round, stacked; on one kind of hardware."""
    alike = _same_hardware(groups)
    if not alike:
        return None
    found = [summaries.phase_seconds(group) for group in alike]
    figure, (panel,) = _new(_bar_height(alike))
    places = _bar_names(panel, alike)
    phases = [phase for phase in found[0] if any(seconds[phase] >= 5e-4 for seconds in found)]
    _stack(panel, places, [[seconds[phase] for seconds in found] for phase in phases], phases)
    panel.set_xlabel("seconds a round, slowest rank of each phase", fontsize=9)
    _legend_below(figure, panel, 5)
    told = "; ".join(
        f"{group.title}: " + ", ".join(f"{phase} {seconds[phase]:.3f} s" for phase in phases)
        for group, seconds in zip(alike, found, strict=True)
    )
    return Picture("time-by-phase", "Time by phase", f"{told}.", figure, tuple(alike))


def memory(groups: Sequence[Group], look: Look) -> Picture | None:
    """Peak memory of all ranks together, host and GPU."""
    from matplotlib.ticker import EngFormatter

    names = [n for n in ("host_memory_bytes", "device_memory_bytes") if any(summaries.peak(g, n).mean for g in groups)]
    if not names:
        return None
    figure, (panel,) = _new(_bar_height(groups))
    places = _bar_names(panel, groups)
    height = 0.7 / len(names)
    for number, (name, colour) in enumerate(zip(names, (BLUE, VERMILION), strict=False)):
        peaks = [summaries.peak(group, name) for group in groups]
        bars = np.array([[s.mean - s.low for s in peaks], [s.high - s.mean for s in peaks]])
        shift = height * (number - (len(names) - 1) / 2)
        panel.barh(
            places + shift, [s.mean for s in peaks], xerr=bars, height=height, color=colour, capsize=2,
            label=name.split("_")[0],
        )  # fmt: skip
    panel.xaxis.set_major_formatter(EngFormatter(unit="B"))
    panel.locator_params(axis="x", nbins=5)
    panel.set_xlabel("peak memory, all ranks together", fontsize=9)
    _legend_below(figure, panel)
    told = "; ".join(f"{g.title}: {', '.join(terminal.size(summaries.peak(g, n).mean) for n in names)}" for g in groups)
    return Picture("memory", "Peak memory", f"{told}.", figure, tuple(groups))


def client_accuracy(groups: Sequence[Group], look: Look) -> Picture | None:
    """A box a group over its clients: how unlike the model serves them. None where no run recorded it."""
    found = [(group, values) for group in groups if len(values := summaries.client_accuracy(group))]
    if not found:
        return None
    members = [group for group, _ in found]
    figure, (panel,) = _new(_bar_height(members))
    places = _bar_names(panel, members)
    boxes = panel.boxplot(
        [values for _, values in found], positions=places, orientation="horizontal", whis=(0, 100), widths=0.55,
        patch_artist=True, manage_ticks=False, medianprops={"color": "black"},
    )  # fmt: skip
    for box, group in zip(boxes["boxes"], members, strict=True):
        box.set(facecolor=look.colour(group.label), alpha=0.55)
    panel.set_xlabel("accuracy on each client's own test images", fontsize=9)
    told = "; ".join(
        f"{group.title}: lowest {values[0]:.3f}, median {np.median(values):.3f}, highest {values[-1]:.3f}"
        for group, values in found
    )
    text = f"Boxes hold the middle half of the clients of all seeds, whiskers all. {told}."
    return Picture("client-accuracy", "Accuracy by client", text, figure, tuple(members))


def partition(groups: Sequence[Group], look: Look) -> Picture | None:
    """Images by client and class, of the first run that has a checkpoint: equal for all methods of one seed."""
    for group in groups:
        for run in group.runs:
            if run.histogram is not None:
                figure = plots.draw_partition(run.histogram, run.class_names)
                figure.set_size_inches(_WIDTH, 4.6)
                sizes, held = run.histogram.sum(axis=1), (run.histogram > 0).sum(axis=1)
                told = (
                    f"{len(sizes)} clients with {sizes.min():,} to {sizes.max():,} images of {held.min()} to {held.max()} "
                    f"classes; seed {run.config.seed}."
                )
                one = Group(group.setting, group.method, group.sparsity, group.variant, (run,))
                return Picture("partition", f"Partition of seed {run.config.seed}", told, figure, (one,))
    return None


def _bar_height(groups: Sequence[Group]) -> float:
    return 1.6 + 0.28 * len(groups)


def _bar_names(panel: Axes, groups: Sequence[Group]) -> np.ndarray:
    """Put the groups' names on the left, the first on top; returns the bars' places."""
    places = np.arange(len(groups), dtype=float)
    panel.set_yticks(places, [plots._clip(group.title, 30) for group in groups], fontsize=8)
    panel.set_ylim(len(groups) - 0.4, -0.6)
    panel.grid(visible=False, axis="y")
    return places


def _stack(panel: Axes, places: np.ndarray, rows: Sequence[Sequence[float]], labels: Sequence[str]) -> None:
    left = np.zeros(len(places))
    for row, label, colour in zip(rows, labels, _KIND_COLOURS, strict=False):
        panel.barh(places, row, left=left, height=0.7, color=colour, label=label)
        left = left + np.array(row)


def footer_of(letters: Mapping[Any, str]) -> Callable[[Sequence[Group]], str]:
    """What stands in every figure: seeds, runs, versions, hardware."""

    def footer(groups: Sequence[Group]) -> str:
        runs = [run for group in groups for run in group.runs]
        seeds = sorted({run.config.seed for run in runs})
        versions = sorted({run.versions for run in runs})
        kinds = sorted({run.hardware for run in runs})
        named = "; ".join(f"{letters[kind]}: {kind}" for kind in kinds)
        places = sorted({run.path.parent.name for run in runs})
        lines = [
            f"{len(runs)} runs in {', '.join(places)}; seeds {', '.join(map(str, seeds))}; {SPREAD}",
            " | ".join(versions),
            f"hardware {named}",
        ]
        pieces = [piece for line in lines for piece in _wrapped(line)]
        if len(pieces) > _FOOTER_LINES:  # the page's caption has all of it
            pieces = [*pieces[: _FOOTER_LINES - 1], f"{pieces[_FOOTER_LINES - 1][:110]} …"]
        return "\n".join(pieces)

    return footer


def _wrapped(line: str) -> list[str]:
    import textwrap

    return textwrap.wrap(line, 125) or [""]
