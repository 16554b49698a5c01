"""Accuracy against what it costs: the figures that a paper takes from a report.

Accuracy is the mean of a run's last evaluations, up to five, at its last sparsity; of non-IID clients a single one swings by
points. A method that is far below the others stands at the foot of its panel with its number, and does not stretch the scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from feddip_mpi.report import drawing, plots, summaries, terminal
from feddip_mpi.report.drawing import Look, Picture
from feddip_mpi.report.plots import GREY
from feddip_mpi.report.summaries import Group, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WHAT = "accuracy, mean of the last evaluations"
_LARGEST, _SMALLEST = 8.5, 5.5  # marks, in points
Cost = Callable[[Group], Spread]


def accuracy(group: Group) -> Spread:
    """The mean of the last evaluations (`metrics.last_accuracies`), over the seeds."""
    return Spread.of(run.summary["test_accuracy_mean_of_last_5"] for run in group.runs)


def uploads(group: Group) -> Spread:
    """Bytes of all clients in all rounds, over the seeds."""
    return Spread.of(run.summary["upload_bytes"] for run in group.runs)


def seconds(group: Group) -> Spread:
    """Of all rounds, over the seeds."""
    return Spread.of(run.summary["seconds"] for run in group.runs)


def same_hardware(groups: Sequence[Group]) -> list[Group]:
    """The groups on the kind of hardware that most of them ran on; seeds on unlike hardware count for none."""
    whole = [group for group in groups if len(group.hardware) == 1]
    kinds = [group.hardware for group in whole]
    if not kinds:
        return []
    most = max(sorted(set(kinds)), key=kinds.count)
    return [group for group in whole if group.hardware == most]


def best_first(groups: Sequence[Group]) -> list[Group]:
    """The best group of each method, in the order of their accuracy; dense methods first."""
    found = [max(members, key=lambda group: accuracy(group).mean) for _, members in drawing.by_label(groups)]
    return sorted(found, key=lambda group: (group.prunes, -accuracy(group).mean))


# ---- figures


def overview(settings: Mapping[str, Sequence[Group]], look: Look) -> Picture | None:
    """For each partition a row: accuracy against bytes, and against sparsity. Wide, for a paper.

    Args:
        settings: the groups of settings that differ in the partition alone, by the partition's name.
    """
    every = [group for groups in settings.values() for group in groups]
    if not any(group.prunes for group in every) or not all(uploads(group).mean for group in every):
        return None
    rows = len(settings)
    figure, panels = drawing.new(0.4 + 3.1 * rows, rows, 2, width=drawing.WIDE, sharex="col", width_ratios=(1.15, 1))
    levels = _levels(every)
    for (name, groups), left, right in zip(settings.items(), panels[::2], panels[1::2], strict=True):
        scale = _scale(groups)
        _against_bytes(left, groups, look, levels, scale)
        _against_sparsity(right, groups, look, levels, scale)
        right.tick_params(labelleft=False)
        left.set_title(summaries.capital(name), fontsize=10)
        left.set_ylabel("accuracy,\nmean of the last evaluations", fontsize=9)
    found = [uploads(group).mean for group in every]
    drawing.few_log_ticks(panels[0], min(found), max(found))
    for panel in panels[:-2]:
        panel.set_xlabel("")
    keys = [look.key(group, dense_line=True) for group in best_first(every)] + _size_keys(levels)
    names = [plots._clip(str(key.get_label()), 26) for key in keys]
    figure.subfigs[0].legend(keys, names, loc="outside right upper", fontsize=8.5)
    told = " ".join(
        f"{summaries.capital(name)}: "
        + drawing.told(groups, accuracy, lambda group: f" for {terminal.size(uploads(group).mean)}")
        for name, groups in settings.items()
    )
    return Picture("overview", "Accuracy against bytes and against sparsity", told, figure, tuple(every))


def accuracy_by_sparsity(groups: Sequence[Group], look: Look) -> Picture | None:
    """Points with bars, a line a method; dense methods as level lines."""
    if not any(group.prunes for group in groups):
        return None
    figure, (panel,) = drawing.new(3.9)
    _against_sparsity(panel, groups, look, _levels(groups), _scale(groups))
    panel.set_ylabel(_WHAT, fontsize=9)
    _keys(figure, groups, look, [])
    told = drawing.told(groups, accuracy)
    return Picture("accuracy-by-sparsity", "Accuracy against sparsity", told, figure, tuple(groups))


def accuracy_by_bytes(groups: Sequence[Group], look: Look) -> Picture | None:
    """Points with bars: all uploads of the run on a logarithmic scale."""
    if not all(uploads(group).mean for group in groups):
        return None
    figure, (panel,) = drawing.new(3.9)
    _against_bytes(panel, groups, look, _levels(groups), _scale(groups))
    panel.set_ylabel(_WHAT, fontsize=9)
    _keys(figure, groups, look, _levels(groups))
    told = drawing.told(groups, accuracy, lambda group: f" for {terminal.size(uploads(group).mean)}")
    return Picture("accuracy-by-bytes", "Accuracy against bytes", told, figure, tuple(groups))


def accuracy_by_seconds(groups: Sequence[Group], look: Look) -> Picture | None:
    """Points with bars, on one kind of hardware: that of most groups."""
    alike = same_hardware(groups)
    if not alike:
        return None
    figure, (panel,) = drawing.new(3.9)
    _against(panel, alike, look, seconds, _levels(alike), _scale(alike))
    panel.set_xlabel("seconds of all rounds", fontsize=9)
    panel.set_xlim(left=0)
    panel.set_ylabel(_WHAT, fontsize=9)
    _keys(figure, alike, look, _levels(alike))
    told = drawing.told(alike, accuracy, lambda group: f" in {seconds(group).mean:.3g} s")
    if len(alike) < len(groups):
        told += (
            f" Left out, because they ran on other hardware: {', '.join(g.shown for g in groups if g not in alike)}."
        )
    return Picture("accuracy-by-seconds", "Accuracy against seconds", told, figure, tuple(alike))


def accuracy_by_method(groups: Sequence[Group], look: Look) -> Picture | None:
    """A panel a sparsity, a row a method, the best on top; small points are the seeds."""
    levels = _levels(groups)
    if not levels:
        return None
    ranked = [group for group in best_first(groups) if group.prunes]
    figure, panels = drawing.new(1.3 + 0.24 * len(ranked), 1, len(levels), sharey=True, sharex=True)
    low, high = _scale(groups)
    for level, panel in zip(levels, panels, strict=True):
        panel.set_title(f"{level:.4g} zeros", fontsize=9)
        _yardstick(panel, groups, look, panel.axvline, panel.axvspan)
        for place, first in enumerate(ranked):
            for group in groups:
                if group.label == first.label and group.prunes and group.level == level:
                    _dot(panel, group, place, look, low)
        panel.grid(visible=False, axis="y")
        panel.locator_params(axis="x", nbins=4)
        panel.tick_params(axis="x", labelsize=8)
    panels[0].set_xlim(low, high)
    panels[0].set_yticks(range(len(ranked)), [group.name for group in ranked], fontsize=8)
    panels[0].set_ylim(len(ranked) - 0.4, -0.6)
    dense = [group.name for group in groups if not group.prunes]
    drawing.say_below(figure, _WHAT + (f"; dashed: {', '.join(dense)} (dense)" if dense else ""))
    told = drawing.told(groups, accuracy)
    return Picture("accuracy-by-method", "Accuracy by method", told, figure, tuple(groups))


def _dot(panel: Axes, group: Group, place: int, look: Look, low: float) -> None:
    found, colour = accuracy(group), look.colour(group.label)
    if found.mean < low:
        panel.text(low, place, f" ◂ {found.mean:.3f}", fontsize=7, color=colour, va="center")
        return
    panel.errorbar(
        found.mean, place, xerr=[[found.mean - found.low], [found.high - found.mean]], color=colour, capsize=2, elinewidth=1,
        marker=look.mark(group.label), markersize=look.size(group.label, 5),
    )  # fmt: skip
    if len(group.runs) > 1:
        values = [run.summary["test_accuracy_mean_of_last_5"] for run in group.runs]
        panel.plot(values, [place] * len(values), ".", color=colour, markersize=2.5, alpha=0.7)


# ---- panels


def _levels(groups: Sequence[Group]) -> list[float]:
    return sorted({group.level for group in groups if group.prunes})


def _scale(groups: Sequence[Group]) -> tuple[float, float]:
    """The ends of the axis of accuracy."""
    low, high = drawing.whole_scale(accuracy(group).mean for group in groups)
    low = min([low, *(accuracy(group).low for group in groups if accuracy(group).mean >= low)])
    high = max([high, *(accuracy(group).high for group in groups)])
    room = 0.06 * max(0.01, high - low)
    return low - 1.6 * room, high + room


def _yardstick(panel: Axes, groups: Sequence[Group], look: Look, line: Callable, span: Callable) -> None:  # type: ignore[type-arg]
    """Dense methods as lines with the band of their seeds, behind everything."""
    for group in groups:
        if not group.prunes:
            found = accuracy(group)
            line(found.mean, color=look.colour(group.label), linestyle="--", linewidth=1.2, zorder=0.9)
            span(found.low, found.high, color=look.colour(group.label), alpha=0.15, linewidth=0, zorder=0.5)


def _against_bytes(
    panel: Axes, groups: Sequence[Group], look: Look, levels: Sequence[float], scale: tuple[float, float]
) -> None:
    from matplotlib.ticker import EngFormatter

    panel.set_xscale("log")
    _against(panel, groups, look, uploads, levels, scale)
    found = [uploads(group).mean for group in groups]
    drawing.few_log_ticks(panel, min(found), max(found))
    panel.xaxis.set_major_formatter(EngFormatter(unit="B"))
    panel.set_xlabel("uploaded in all rounds", fontsize=9)


def _against(
    panel: Axes, groups: Sequence[Group], look: Look, cost: Cost, levels: Sequence[float], scale: tuple[float, float]
) -> None:
    """Accuracy over cost, with both spreads; a thin line joins the sparsities of a method, the larger mark has more weights."""
    _yardstick(panel, groups, look, panel.axhline, panel.axhspan)
    panel.set_ylim(*scale)
    missed = []
    for first in reversed(best_first(groups)):  # the best lie on top
        label, colour = first.label, look.colour(first.label)
        members = sorted((group for group in groups if group.label == label), key=lambda group: group.level)
        shown = [group for group in members if accuracy(group).mean >= scale[0]]
        missed += [(cost(group).mean, group) for group in members if group not in shown]
        panel.plot([cost(g).mean for g in shown], [accuracy(g).mean for g in shown], color=colour, linewidth=0.9)
        for group in shown:
            x, y = cost(group), accuracy(group)
            panel.errorbar(
                x.mean, y.mean, xerr=[[x.mean - x.low], [x.high - x.mean]], yerr=[[y.mean - y.low], [y.high - y.mean]],
                color=colour, capsize=2, elinewidth=1, marker=look.mark(label), markersize=look.size(label, _size(group, levels)),
                markeredgecolor="white", markeredgewidth=0.5, linestyle="none", zorder=3,
            )  # fmt: skip
    _below(panel, missed, look)


def _against_sparsity(
    panel: Axes, groups: Sequence[Group], look: Look, levels: Sequence[float], scale: tuple[float, float]
) -> None:
    """Methods beside each other at each sparsity, so that bars do not hide each other: the horizontal order says nothing."""
    _yardstick(panel, groups, look, panel.axhline, panel.axhspan)
    places = {level: -np.log10(1 - level) for level in levels}
    gap = min((b - a for a, b in zip(places.values(), list(places.values())[1:], strict=False)), default=0.4)
    pruning = [group.label for group in best_first(groups) if group.prunes]
    missed = []
    for number, label in enumerate(pruning):
        shift = 0.5 * gap * ((number + 0.5) / len(pruning) - 0.5)
        members = sorted((g for g in groups if g.label == label and g.prunes), key=lambda group: group.level)
        shown = [group for group in members if accuracy(group).mean >= scale[0]]
        missed += [(places[group.level] + shift, group) for group in members if group not in shown]
        x, y = [places[group.level] + shift for group in shown], [accuracy(group) for group in shown]
        bars = [[value.mean - value.low for value in y], [value.high - value.mean for value in y]]
        panel.errorbar(
            x, [value.mean for value in y], yerr=bars, color=look.colour(label), capsize=2, elinewidth=1, linewidth=0.9,
            marker=look.mark(label), markersize=look.size(label, 6), markeredgecolor="white", markeredgewidth=0.5, zorder=3,
        )  # fmt: skip
    panel.set_xticks(list(places.values()), [f"{level:.4g}" for level in levels])
    panel.set_xlim(min(places.values()) - 0.4 * gap, max(places.values()) + 0.4 * gap)
    panel.set_ylim(*scale)
    panel.set_xlabel("zeros among the prunable weights\n(marks side by side: the same share)", fontsize=9)
    _below(panel, missed, look)


def _below(panel: Axes, missed: Sequence[tuple[float, Group]], look: Look) -> None:
    """What is far below the scale, with its number, at the foot."""
    bottom = panel.get_ylim()[0]
    for number, (x, group) in enumerate(sorted(missed, key=lambda pair: -accuracy(pair[1]).mean)):
        panel.plot(
            [x], [bottom], marker=look.mark(group.label), color=look.colour(group.label), markersize=6, clip_on=False
        )
        side = panel.transAxes.inverted().transform(panel.transData.transform((x, bottom)))[0]
        at = "right" if side > 0.6 else "left" if side < 0.4 else "center"
        panel.annotate(
            f"{group.name} {group.level:.4g}: {accuracy(group).mean:.3f} ↓", (x, bottom), (0, 7 + 9 * number),
            textcoords="offset points", fontsize=7, color=look.colour(group.label), ha=at,
        )  # fmt: skip


def _size(group: Group, levels: Sequence[float]) -> float:
    """Of the mark, in points: the more weights, the larger."""
    if not group.prunes or len(levels) < 2:
        return 7.0
    return _LARGEST - (_LARGEST - _SMALLEST) * levels.index(group.level) / (len(levels) - 1)


def _size_keys(levels: Sequence[float]) -> list:  # type: ignore[type-arg]
    from matplotlib.lines import Line2D

    if len(levels) < 2:
        return []
    sizes = np.linspace(_LARGEST, _SMALLEST, len(levels))
    return [
        Line2D([], [], color=GREY, marker="o", linestyle="none", markersize=size, label=f"{level:.4g} zeros")
        for level, size in zip(levels, sizes, strict=True)
    ]


def _keys(figure, groups: Sequence[Group], look: Look, levels: Sequence[float]) -> None:  # type: ignore[no-untyped-def]
    keys = [look.key(group, dense_line=True) for group in best_first(groups)] + _size_keys(levels)
    drawing.keys_below(figure, [(key, str(key.get_label())) for key in keys])
