"""The picture of a scaling study: speed-up, efficiency, seconds by phase, and the prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from feddip_mpi import scaling
from feddip_mpi.report import plots
from feddip_mpi.report.plots import BLUE, GREY, VERMILION, PathLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Json = Mapping[str, Any]

_COLOURS = {"strong": BLUE, "weak": VERMILION}
_MARKERS = {"strong": "o", "weak": "s"}
_PHASE_COLOURS = {
    "train": BLUE, "encode": "#56B4E9", "exchange": VERMILION, "decode": "#E69F00", "server": "#009E73",
    "evaluate": "#CC79A7", "rest": "#BBBBBB",
}  # fmt: skip


def scaling_figure(result: Json, path: PathLike) -> None:
    """Draw a study.

    Args:
        result: what `feddip-mpi study` saves as scaling.json.
        path: where to write it; its ending chooses the format.

    Raises:
        InputError: matplotlib is missing, or the file cannot be written.
    """
    with plots._style():
        plots._save(draw_scaling(result), path)


def draw_scaling(result: Json) -> Figure:
    """The figure that `scaling_figure` writes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.4), dpi=150, layout="constrained")
    c, note = result["configuration"], result["settings"]["note"]
    title = f"Scaling of {c['model']} on {c['data']}, exchange {result['mode']}"
    figure.suptitle(plots._clip(title, 90) + (f"\n{plots._clip(note, 110)}" if note else ""), fontsize=13)
    panels = list(figure.subplots(2, 2).flat)
    kinds = [kind for kind in scaling.KINDS if any(row["kind"] == kind for row in result["rows"])]
    for kind in kinds:
        mine = [row for row in result["rows"] if row["kind"] == kind]
        ranks = [row["ranks"] for row in mine]
        style = {"color": _COLOURS[kind], "marker": _MARKERS[kind], "label": kind}
        panels[0].plot(ranks, [row["speed_up"] for row in mine], **style)
        panels[1].plot(ranks, [100 * row["efficiency"] for row in mine], **style)
    _finish_speed_up(panels[0], result)
    _finish_efficiency(panels[1], result)
    _draw_phases(panels[2], result["rows"])
    _draw_prediction(panels[3], result, kinds)
    return figure


def _counts(result: Json) -> list[int]:
    return sorted({row["ranks"] for row in result["rows"]})


def _rank_axis(panel: Axes, counts: Sequence[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks(counts, [str(count) for count in counts])
    panel.minorticks_off()
    panel.set_xlabel("ranks")


def _mark_cores(panel: Axes, result: Json) -> None:
    """Where ranks begin to share cores."""
    cores, counts = result["cores"], _counts(result)
    if cores and counts[0] <= cores < counts[-1]:
        panel.axvline(cores, color=GREY, linewidth=1, linestyle=":")
        plots._note(panel, f"dotted: {cores} cores, shared by all ranks")


def _finish_speed_up(panel: Axes, result: Json) -> None:
    counts = _counts(result)
    panel.set(title="Speed-up", ylabel="images a second, against the fewest ranks")
    panel.plot(counts, [count / counts[0] for count in counts], color=GREY, linestyle="--", linewidth=1, label="ideal")
    _rank_axis(panel, counts)
    panel.set_yscale("log", base=2)
    plots._plain_log(panel.yaxis)
    _mark_cores(panel, result)
    plots._legend(panel, loc="upper left")


def _finish_efficiency(panel: Axes, result: Json) -> None:
    panel.set(title="Parallel efficiency", ylabel="speed-up over ranks (%)")
    panel.axhline(100, color=GREY, linestyle="--", linewidth=1)
    _rank_axis(panel, _counts(result))
    panel.set_ylim(0, max(110, 105 * max(row["efficiency"] for row in result["rows"])))
    _mark_cores(panel, result)
    plots._legend(panel, loc="lower left")


def _draw_phases(panel: Axes, rows: Sequence[Json]) -> None:
    """A bar a cell, its phases on top of each other."""
    from feddip_mpi.report.scaling import phase

    panel.set(title="Seconds a round by phase", ylabel="seconds (slowest rank, medians)")
    places, bottom = np.arange(len(rows)), np.zeros(len(rows))
    for name, colour in _PHASE_COLOURS.items():
        height = np.maximum(0.0, [phase(row, name) for row in rows])
        panel.bar(places, height, bottom=bottom, color=colour, width=0.7, label=name)
        bottom += height
    panel.set_xticks(places, [f"{row['ranks']}\n{row['kind']}" for row in rows])
    panel.set_xlabel("ranks")
    panel.set_ylim(0, 1.3 * max(bottom.max(), 1e-12))
    panel.grid(visible=False, axis="x")
    panel.legend(loc="upper center", ncols=4)


def _draw_prediction(panel: Axes, result: Json, kinds: Sequence[str]) -> None:
    """Curves with a core for every rank, the measured points, and what the model says of these."""
    panel.set(title="Prediction", xlabel="ranks", ylabel="seconds a round, a core for every rank")
    for kind in kinds:
        mine = [row for row in result["predictions"] if row["kind"] == kind]
        colour = _COLOURS[kind]
        panel.plot(
            [r["ranks"] for r in mine], [r["round_seconds"] for r in mine], color=colour, label=f"{kind}, predicted"
        )
        measured = [row for row in result["rows"] if row["kind"] == kind]
        panel.plot(
            [r["ranks"] for r in measured], [r["round_seconds"] for r in measured], color=colour, linestyle="none",
            marker=_MARKERS[kind], label=f"{kind}, measured",
        )  # fmt: skip
        fitted = [row for row in result["fitted"] if row["kind"] == kind]
        panel.plot(
            [row["ranks"] for row in fitted], [sum(row["seconds"].values()) for row in fitted], color=colour,
            linestyle=":", linewidth=1.2, label=f"{kind}, model on shared cores" if result["cores"] else f"{kind}, model",
        )  # fmt: skip
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    plots._plain_log(panel.xaxis)
    plots._plain_log(panel.yaxis)
    panel.axvspan(max(_counts(result)), panel.get_xlim()[1], color="#F3F3F3", zorder=0)
    largest = result["errors"]["largest"]
    plots._note(
        panel, "grey: extrapolated; error " + (f"up to {largest:.0%}, see text" if largest is not None else "unknown")
    )
    low, high = panel.get_ylim()
    panel.set_ylim(low, high * (high / low) ** 0.6)  # room for the legend
    panel.legend(loc="upper left", ncols=2, fontsize=8)
