"""The figures of a report: what differs between methods, with the spread of their seeds.

Each function draws one figure of a setting from its groups, and returns None where there is nothing to draw. Where lines of many
methods would lie on each other, each method has a panel of its own.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from feddip_mpi.report import accuracy_figures, drawing, plots, summaries, terminal
from feddip_mpi.report.accuracy_figures import accuracy, same_hardware
from feddip_mpi.report.drawing import DENSE_GREY, Look, Picture
from feddip_mpi.report.plots import BLUE, GREEN, GREY, VERMILION
from feddip_mpi.report.summaries import Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KIND_COLOURS = (
    BLUE, "#E69F00", GREEN, GREY, "#56B4E9", "#F0E442", "#8FD3BC", "#BBBBBB", "#CC79A7", VERMILION, "#6A3D9A",
)  # fmt: skip
_LEGEND_LAYERS = 10  # beyond, a legend would hide the lines
Draw = Callable[[Sequence[Group], Look], Picture | None]


def of_settings(
    settings: Mapping[str, Sequence[Group]], look: Look, footer: Callable[[Sequence[Group]], str]
) -> Iterator[Picture]:
    """The figures that put partitions side by side.

    Args:
        settings: the groups of settings that differ in the partition alone, by the partition's name.
    """
    picture = accuracy_figures.overview(settings, look)
    if picture is not None:
        yield drawing.finish(picture, "", footer)


def of_setting(groups: Sequence[Group], look: Look, footer: Callable[[Sequence[Group]], str]) -> Iterator[Picture]:
    """The figures of one setting, one by one: whoever takes them may forget each before the next is drawn.

    Args:
        groups: of one setting.
        footer: the line about runs, versions and hardware that stands in the figure.
    """
    general: tuple[Draw, ...] = (
        accuracy_figures.accuracy_by_sparsity, accuracy_figures.accuracy_by_bytes, accuracy_figures.accuracy_by_seconds,
        accuracy_figures.accuracy_by_method, client_accuracy, bytes_by_kind, time_by_phase, memory, partition,
    )  # fmt: skip
    by_level: tuple[Draw, ...] = (accuracy_by_round, sparsity_by_layer, mask_churn, penalty, pruning_error)
    dense = [group for group in groups if not group.prunes]
    levels = sorted({group.level for group in groups if group.prunes})
    for draw in general:
        picture = draw(groups, look)
        if picture is not None:
            yield drawing.finish(picture, "", footer)
    for level in levels or [0.0]:
        members = [*dense, *(group for group in groups if group.prunes and group.level == level)]
        for draw in by_level:
            picture = draw(members, look)
            if picture is not None:
                yield drawing.finish(picture, f"sparsity {level:.4g}" if levels else "", footer)


# ---- over the rounds


def accuracy_by_round(groups: Sequence[Group], look: Look) -> Picture | None:
    """A panel a method, with the band of its seeds; the yardstick is grey in all."""
    dense = summaries.dense_of(groups)
    shown = [group for group in groups if group is not dense] or list(groups)
    curves = [(group, table) for group in shown if len(table := summaries.by_round(group, "test_accuracy"))]
    if not curves:
        return None
    yardstick = summaries.by_round(dense, "test_accuracy") if dense is not None else np.zeros((0, 4))
    figure, panels = drawing.small_panels(len(curves), 1.25)
    low, high = _scale_of_curves([table for _, table in [*curves, (dense, yardstick)] if len(table)])
    for panel, (group, table) in zip(panels, curves, strict=True):
        _named(panel, group)
        if len(yardstick) and group is not dense:
            panel.plot(yardstick[:, 0], yardstick[:, 1], color=DENSE_GREY, linewidth=0.9)
        drawing.band(panel, table, look.colour(group.label), marker="")
        ending = f"{summaries.last_evaluations([group]).removesuffix(' evaluations')}: {accuracy(group).mean:.3f}"
        if table[:, 1].max() < low:
            ending += " ↓"  # the whole curve is below the scale
        panel.text(
            0.99, 0.09, ending, transform=panel.transAxes, ha="right", fontsize=8,
            bbox={"color": "white", "alpha": 0.8, "pad": 1},
        )  # fmt: skip
        drawing.rounds_below(panel, groups, 5)
    room = 0.05 * max(0.01, high - low)
    panels[0].set_ylim(low - room, high + room)
    figure.subfigs[0].supylabel("accuracy", fontsize=9)
    grey = f" Grey: {dense.name}." if dense is not None and len(curves) > 1 else ""
    drawing.say_below(figure, f"Numbers: mean of the last evaluations.{grey}")
    ends = "; ".join(f"{group.shown}: from {table[0, 1]:.3g} to {table[-1, 1]:.3g}" for group, table in curves)
    of_whom = (*([dense] if dense is not None and dense not in shown else []), *(group for group, _ in curves))
    return Picture("accuracy-by-round", "Accuracy by round", f"{ends}.{grey}", figure, of_whom)


def _scale_of_curves(tables: Sequence[np.ndarray]) -> tuple[float, float]:
    """Ends of the axis that show every seed of `summaries.by_round`'s tables.

    The first tenth of the rounds, in which everybody climbs, and methods that never do, do not set it.
    """
    settled = np.concatenate([table[table[:, 0] >= 0.1 * table[-1, 0]] for table in tables])
    low, high = drawing.whole_scale(settled[:, 1])
    shown = settled[settled[:, 1] >= low]
    return min(low, float(shown[:, 2].min())), max(high, float(shown[:, 3].max()))


def _named(panel: Axes, group: Group) -> None:
    """Its name over its panel, in two lines where it is long."""
    text = "\n".join(textwrap.wrap(plots._clip(group.name, 42), 21))
    panel.set_title(text, fontsize=8.5 if len(text) <= 18 else 7.5, pad=3)


def penalty(groups: Sequence[Group], look: Look) -> Picture | None:
    """Lines of those that have one; equal lines are one."""
    together: dict[bytes, list[Group]] = {}
    for group in groups:
        if any(row["penalty"] for row in group.runs[0].records):
            together.setdefault(summaries.by_round(group, "penalty").tobytes(), []).append(group)
    if not together:
        return None
    figure, (panel,) = drawing.new(3.5)
    told = []
    for members in together.values():
        table = summaries.by_round(members[0], "penalty")
        name = ", ".join(group.name for group in members)
        drawing.band(panel, table, look.colour(members[0].label), name, drawstyle="steps-post")
        told.append(f"{', '.join(g.shown for g in members)}: from {table[0, 1]:.3g} to {table[-1, 1]:.3g}")
    drawing.rounds_below(panel, groups)
    panel.set(xlabel="round", ylabel="penalty λ")
    drawing.legend_below(figure, panel)
    shown = tuple(group for members in together.values() for group in members)
    return Picture("penalty", "Penalty by round", f"{'; '.join(told)}.", figure, shown)


def sparsity_by_layer(groups: Sequence[Group], look: Look) -> Picture | None:
    """A panel a pruning method, a line a prunable tensor; means of the seeds."""
    pruning = [group for group in groups if group.prunes and summaries.layers(group)]
    if not pruning:
        return None
    from matplotlib import colormaps

    figure, panels = drawing.small_panels(len(pruning), 1.4)
    names = list(summaries.layers(pruning[0]))
    for group, panel in zip(pruning, panels, strict=True):
        _named(panel, group)
        found = summaries.layers(group)
        for number, (name, table) in enumerate(found.items()):
            shade = colormaps["viridis"](0.92 * number / max(1, len(found) - 1))
            panel.plot(table[:, 0], table[:, 1], color=shade, linewidth=1.3, label=name, drawstyle="steps-post")
        drawing.rounds_below(panel, [group], 5)
    figure.subfigs[0].supylabel("share of zeros", fontsize=9)
    if len(names) <= _LEGEND_LAYERS:
        drawing.legend_below(figure, panels[0], 4)
    ends = "; ".join(
        f"{group.shown}: " + ", ".join(f"{name} {table[-1, 1]:.3f}" for name, table in summaries.layers(group).items())
        for group in pruning
    )
    order = "" if len(names) <= _LEGEND_LAYERS else f" {len(names)} tensors, dark is the first, bright the last."
    return Picture(
        "sparsity-by-layer", "Sparsity by layer", f"After the last round {ends}.{order}", figure, tuple(pruning)
    )


def mask_churn(groups: Sequence[Group], look: Look) -> Picture | None:
    """Weights that entered and left the mask at each of its updates; a panel a method, the scale logarithmic above 10."""
    renewed = [group for group in groups if any(row.get("mask_updated") for row in group.runs[0].records)]
    if not renewed:
        return None
    figure, panels = drawing.small_panels(len(renewed), 1.3)
    told = []
    for panel, group in zip(panels, renewed, strict=True):
        _named(panel, group)
        sums = []
        for name, what, colour in (("mask_pruned", "pruned", VERMILION), ("mask_grown", "grown", GREEN)):
            table = summaries.by_round(group, lambda row, name=name: row.get(name) if row.get("mask_updated") else None)  # type: ignore[misc]
            if len(table):
                drawing.band(panel, table, colour, what)
                sums.append(f"{table[:, 1].sum():,.0f} {what}")
        told.append(f"{group.shown} {', '.join(sums)}")
        drawing.rounds_below(panel, renewed, 5)
    _symmetric_log(panels[0], 10)
    figure.subfigs[0].supylabel("weights", fontsize=9)
    drawing.legend_below(figure, panels[0], title="scale: logarithmic, linear up to 10")
    return Picture(
        "mask-churn",
        "Mask churn at each update",
        f"Weights at all updates together: {'; '.join(told)}.",
        figure,
        tuple(renewed),
    )


def pruning_error(groups: Sequence[Group], look: Look) -> Picture | None:
    """The two quantities of the convergence analysis, a panel a method: the scale is logarithmic above 0.01."""
    names = (
        ("update_norm", "norm of the mean update", BLUE),
        ("pruning_error", "pruning error (share of the squared norm)", VERMILION),
    )
    tables = {(group, name): summaries.by_round(group, name) for group in groups for name, _, _ in names}
    if not any(len(table) and table[:, 1].any() for table in tables.values()):
        return None
    figure, panels = drawing.small_panels(len(groups), 1.3)
    told = []
    for panel, group in zip(panels, groups, strict=True):
        _named(panel, group)
        for name, what, colour in names:
            table = tables[group, name]
            if len(table) and (table[:, 1].any() or group.prunes):
                drawing.band(panel, table, colour, what, marker="", linewidth=1.1)
                told.append(f"{group.shown}: {what} from {table[0, 1]:.3g} to {table[-1, 1]:.3g}")
        drawing.rounds_below(panel, groups, 5)
    _symmetric_log(panels[0], 0.01)
    keys = {label: key for panel in panels for key, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    title = "scale: logarithmic, linear up to 0.01"
    drawing.keys_below(figure, [(key, label) for label, key in keys.items()], title=title)
    return Picture("pruning-error", "Pruning error and update norm", f"{'; '.join(told)}.", figure, tuple(groups))


def _symmetric_log(panel: Axes, linear: float) -> None:
    """From 0 up: linear to `linear`, then logarithmic."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    panel.set_yscale("symlog", linthresh=linear, linscale=1.0)
    top = max(10 * linear, 1.5 * panel.get_ylim()[1])  # room for the highest mark
    panel.set_ylim(0, top)
    powers = [linear * 10**n for n in range(12) if linear * 10**n <= top]
    panel.yaxis.set_major_locator(FixedLocator([0, *powers[:: 1 + len(powers) // 5]]))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


# ---- a bar a group


def bytes_by_kind(groups: Sequence[Group], look: Look) -> Picture | None:
    """Totals on a logarithmic scale, and of what they consist."""
    from matplotlib.ticker import EngFormatter

    found = [summaries.totals(group, summaries.BYTE_KINDS) for group in groups]
    sums = np.array([sum(kinds.values()) for kinds in found])
    if not sums.all():
        return None
    figure, (left, right) = drawing.new(drawing.bar_height(groups), 1, 2, sharey=True)
    places = drawing.bar_names(left, groups)
    left.plot(sums, places, linestyle="none", marker="o", color=BLUE)
    left.set_xscale("log")
    drawing.few_log_ticks(left, sums.min(), sums.max(), most=20)
    left.xaxis.set_major_formatter(EngFormatter(unit="B"))
    names = [name for name in summaries.BYTE_KINDS if any(kinds[name] for kinds in found)]
    labels = [name.removesuffix("_bytes").replace("_", " ") for name in names]
    uploads_alone = all(name.startswith("upload_") for name in names)
    left.set_xlabel(
        "uploaded in all rounds" if uploads_alone else "uploads, sums handed on, residuals moved", fontsize=9
    )
    _stack(
        right,
        places,
        [[100 * kinds[n] / total for kinds, total in zip(found, sums, strict=True)] for n in names],
        labels,
    )
    right.set_xlabel("of these, %", fontsize=9)
    drawing.legend_below(figure, right, 4)
    told = "; ".join(
        f"{group.shown}: "
        + ", ".join(f"{label} {terminal.size(kinds[n])}" for n, label in zip(names, labels, strict=True))
        for group, kinds in zip(groups, found, strict=True)
    )
    control = summaries.totals(groups[0], ["control_bytes"])["control_bytes"]
    told += f". Besides, not drawn, the ranks' control messages, {terminal.size(control)} with {groups[0].shown}"
    return Picture("bytes-by-kind", "Bytes by kind and phase", f"{told}.", figure, tuple(groups))


def time_by_phase(groups: Sequence[Group], look: Look) -> Picture | None:
    """Seconds of a round, stacked; on one kind of hardware."""
    alike = same_hardware(groups)
    if not alike:
        return None
    found = [summaries.phase_seconds(group) for group in alike]
    figure, (panel,) = drawing.new(drawing.bar_height(alike))
    places = drawing.bar_names(panel, alike)
    phases = [phase for phase in found[0] if any(seconds[phase] >= 5e-4 for seconds in found)]
    _stack(panel, places, [[seconds[phase] for seconds in found] for phase in phases], phases)
    panel.set_xlabel("seconds a round, slowest rank of each phase", fontsize=9)
    drawing.legend_below(figure, panel, 5)
    told = "; ".join(
        f"{group.shown}: " + ", ".join(f"{phase} {seconds[phase]:.3f} s" for phase in phases)
        for group, seconds in zip(alike, found, strict=True)
    )
    return Picture("time-by-phase", "Time by phase", f"{told}.", figure, tuple(alike))


def memory(groups: Sequence[Group], look: Look) -> Picture | None:
    """Peak memory of all ranks together, host and GPU."""
    from matplotlib.ticker import EngFormatter

    names = [n for n in ("host_memory_bytes", "device_memory_bytes") if any(summaries.peak(g, n).mean for g in groups)]
    if not names:
        return None
    figure, (panel,) = drawing.new(drawing.bar_height(groups))
    places = drawing.bar_names(panel, groups)
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
    drawing.legend_below(figure, panel)
    told = "; ".join(f"{g.shown}: {', '.join(terminal.size(summaries.peak(g, n).mean) for n in names)}" for g in groups)
    return Picture("memory", "Peak memory", f"{told}.", figure, tuple(groups))


def client_accuracy(groups: Sequence[Group], look: Look) -> Picture | None:
    """A box a group over its clients: how unlike the model serves them. None where no run recorded it."""
    found = [(group, values) for group in groups if len(values := summaries.client_accuracy(group))]
    if not found:
        return None
    members = [group for group, _ in found]
    figure, (panel,) = drawing.new(drawing.bar_height(members))
    places = drawing.bar_names(panel, members)
    boxes = panel.boxplot(
        [values for _, values in found], positions=places, orientation="horizontal", whis=(0, 100), widths=0.55,
        patch_artist=True, manage_ticks=False, medianprops={"color": "black"},
    )  # fmt: skip
    for box, group in zip(boxes["boxes"], members, strict=True):
        box.set(facecolor=look.colour(group.label), alpha=0.55)
    low, high = drawing.whole_scale(np.median(values) for _, values in found)
    low = min(values[0] for _, values in found if np.median(values) >= low)
    high = max(values[-1] for _, values in found)
    room = 0.04 * max(0.01, high - low)
    panel.set_xlim(low - room, high + room)
    for place, (_, values) in zip(places, found, strict=True):
        if np.median(values) < low:
            panel.text(low, place, f"◂ median {np.median(values):.3f}", fontsize=7, va="center")
    panel.set_xlabel("accuracy on each client's own test images", fontsize=9)
    told = "; ".join(
        f"{group.shown}: lowest {values[0]:.3f}, median {np.median(values):.3f}, highest {values[-1]:.3f}"
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
                figure.set_size_inches(drawing.WIDTH, 4.6)
                sizes, held = run.histogram.sum(axis=1), (run.histogram > 0).sum(axis=1)
                told = (
                    f"{len(sizes)} clients with {sizes.min():,} to {sizes.max():,} images of {held.min()} to {held.max()} "
                    f"classes; seed {run.config.seed}."
                )
                one = Group(group.setting, group.method, group.sparsity, group.variant, (run,))
                return Picture("partition", f"Partition of seed {run.config.seed}", told, figure, (one,))
    return None


def _stack(panel: Axes, places: np.ndarray, rows: Sequence[Sequence[float]], labels: Sequence[str]) -> None:
    left = np.zeros(len(places))
    for row, label, colour in zip(rows, labels, _KIND_COLOURS[: len(rows)], strict=True):
        panel.barh(places, row, left=left, height=0.7, color=colour, label=label)
        left = left + np.array(row)
