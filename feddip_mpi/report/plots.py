"""Pictures: a run by round, a plan by round, a partition by client, an exchange benchmark.

Each `*_figure` draws and writes one file; the ending of its path chooses the format (.png, .pdf or .svg). Drawing
needs matplotlib, which is loaded here only and only when a picture is asked for; pyplot and its global state are
never touched, so no display is needed and a notebook's own settings stay as they are.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from feddip_mpi.errors import InputError
from feddip_mpi.report import terminal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
PathLike = str | os.PathLike[str]

FORMATS = ("png", "pdf", "svg")

# Okabe and Ito (2008): told apart with every common form of colour blindness, and in grey print.
BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"

_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.parse_math": False,  # a title may hold a dollar sign
    "pdf.fonttype": 42,  # letters stay text in the PDF
}
_MODE_COLOURS = (BLUE, VERMILION, GREEN, "#CC79A7", "#E69F00", "#56B4E9", GREY)
_MARKERS_UP_TO = 40  # points; beyond, markers would merge into a thick line


def run_figure(records: Sequence[Row], title: str, path: PathLike) -> None:
    """Draw a run: test accuracy, sparsity, penalty and learning rate, bytes uploaded, all by round.

    Args:
        records: one mapping a finished round (the lines of metrics.jsonl). Read are `round` (from 1), `test_accuracy`
            and `sparsity`, `sparsity_asked` (all in [0, 1]), `penalty`, `learning_rate`, `upload_bytes` and `dense_bytes` (of
            all participants in this round); a value that is absent or None leaves a point out.
        title: stands above the four panels.
        path: where to write it.

    Raises:
        InputError: matplotlib is missing, or the file cannot be written.
    """
    with _style():
        _save(draw_run(records, title), path)


def plan_figure(rows: Sequence[Row], title: str, path: PathLike) -> None:
    """Draw a plan: sparsity with its mask updates, penalty, learning rate and expected bytes by round.

    Args:
        rows: one mapping a round: `round` (from 1), `sparsity` in [0, 1], `penalty`, `learning_rate`, `mask_update`
            (bool), `upload_bytes` and `dense_bytes` (of all participants in this round).
        title: stands above the four panels.
        path: where to write it.

    Raises:
        InputError: matplotlib is missing, or the file cannot be written.
    """
    with _style():
        _save(draw_plan(rows, title), path)


def partition_figure(histogram: np.ndarray, class_names: Sequence[str] | None, path: PathLike) -> None:
    """Draw how many images of each class each client holds, as a heat map that stays readable for 1000 clients.

    Args:
        histogram: int64 [clients, classes], >= 0.
        class_names: one name a class; None or empty: the classes' numbers.
        path: where to write it.

    Raises:
        InputError: matplotlib is missing, the shapes disagree, or the file cannot be written.
    """
    with _style():
        _save(draw_partition(histogram, class_names), path)


def exchange_figure(result: Mapping[str, Any], path: PathLike) -> None:
    """Draw an exchange benchmark: bytes and seconds by mode against the dense Allreduce, and seconds over the ranks.

    Args:
        result: what `feddip-mpi bench exchange` saves as exchange.json.
        path: where to write it.

    Raises:
        InputError: matplotlib is missing, or the file cannot be written.
    """
    with _style():
        _save(draw_exchange(result), path)


def draw_run(records: Sequence[Row], title: str) -> Figure:
    """The figure that `run_figure` writes."""
    figure, panels = _four_panels(title, records)
    _draw_accuracy(panels[0], records)
    _draw_sparsity(panels[1], records)
    _draw_penalty_and_rate(panels[2], records)
    _draw_bytes(panels[3], records, "upload_bytes", "Bytes uploaded")
    return figure


def draw_plan(rows: Sequence[Row], title: str) -> Figure:
    """The figure that `plan_figure` writes."""
    figure, panels = _four_panels(title, rows)
    updates = [row for row in rows if row.get("mask_update")]
    panels[0].set(title="Sparsity", ylabel="share of zeros", ylim=(0, 1.02))
    _line(panels[0], rows, "sparsity", BLUE, "sparsity", drawstyle="steps-post")
    _line(panels[0], updates, "sparsity", VERMILION, f"mask updates ({len(updates)})", linestyle="none", marker="o")
    _legend(panels[0], loc="lower right")
    panels[1].set(title="Penalty", ylabel="λ")
    _line(panels[1], rows, "penalty", BLUE, "penalty", drawstyle="steps-post")
    panels[2].set(title="Learning rate", ylabel="η")
    _line(panels[2], rows, "learning_rate", BLUE, "learning rate")
    for panel in panels[1:3]:
        _from_zero(panel)
    _draw_bytes(panels[3], rows, "upload_bytes", "Bytes expected, all uploads")
    return figure


def draw_partition(histogram: np.ndarray, class_names: Sequence[str] | None) -> Figure:
    """The figure that `partition_figure` writes."""
    from matplotlib.figure import Figure

    counts = np.asarray(histogram)
    if counts.ndim != 2:
        raise InputError(f"partition: expected counts [clients, classes], got an array of shape {counts.shape}")
    classes = counts.shape[1]
    names = list(class_names or []) or [str(number) for number in range(classes)]
    if len(names) != classes:
        raise InputError(f"partition: {len(names)} class names for {classes} classes; give one name a class")
    figure = Figure(figsize=(11, 3.2 + min(4.5, 0.3 * classes)), dpi=150, layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(50, 1), height_ratios=(1, min(3.0, 1 + classes / 10)))
    heat = figure.add_subplot(grid[1, 0])
    totals = figure.add_subplot(grid[0, 0], sharex=heat)
    _draw_totals(totals, counts)
    _draw_heat(heat, figure.add_subplot(grid[1, 1]), counts, names)
    return figure


def draw_exchange(result: Mapping[str, Any]) -> Figure:
    """The figure that `exchange_figure` writes."""
    from matplotlib.figure import Figure

    cases = result["cases"]
    figure = Figure(figsize=(13, 3.2 + max(2.0, 0.45 * len(cases))), dpi=150, layout="constrained")
    clients, ranks, nodes = (terminal.counted(result[f"{name}s"], name) for name in ("client", "rank", "node"))
    figure.suptitle(f"Exchange of {result['size']:,} weights, {clients} on {ranks} ({nodes})", fontsize=13)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1))
    _draw_cases(left, cases)
    _draw_predicted(right, result)
    return figure


def _draw_cases(panel: Axes, cases: Sequence[Row]) -> None:
    """Two bars a case: how many times faster, and how many times fewer bytes, than the dense Allreduce."""
    panel.set(title="Against the dense Allreduce", xlabel="times faster, times fewer bytes received by a rank")
    if not any(case["times_faster"] for case in cases):
        _no_data(panel)
        return
    places = np.arange(len(cases))
    named = [
        " ".join(filter(None, (case["mode"], _short(case["sparsity"]), case["values"], _short(case["download"], "/"))))
        for case in cases
    ]
    for shift, key, colour, label in (
        (-0.2, "times_faster", BLUE, "seconds"),
        (0.2, "times_fewer_bytes", GREEN, "bytes"),
    ):
        ratios = np.array([case[key] or 1.0 for case in cases])
        panel.barh(places + shift, ratios - 1, left=1, height=0.36, color=colour, label=label)
        for place, ratio, case in zip(places, ratios, cases, strict=True):
            text = _engineering(case["seconds"]["median"], "s") if key == "times_faster" else (
                _engineering(case["received"]["total"], "B"))  # fmt: skip
            panel.annotate(
                text, (max(ratio, 1.0), place + shift), (4, 0), textcoords="offset points", va="center", fontsize=8
            )
    panel.set_yticks(places, [_clip(name, 30) for name in named])
    panel.invert_yaxis()
    panel.grid(visible=False, axis="y")
    panel.set_xscale("log")
    panel.axvline(1, color=GREY, linewidth=1)
    low, high = panel.get_xlim()
    panel.set_xlim(low, high * (high / low) ** 0.2)  # room for the text behind the longest bar
    _plain_log(panel.xaxis)
    _legend(panel, loc="upper right")  # the yardstick comes first and has no bars


def _draw_predicted(panel: Axes, result: Mapping[str, Any]) -> None:
    """Curves of the first group over the ranks, with what was measured as points."""
    panel.set(title="Predicted for more ranks", xlabel="ranks", ylabel="seconds, whole exchange")
    if not result["predicted"]:
        _no_data(panel)
        return
    group = result["predicted"][0]
    ranks = [row["ranks"] for row in group["rows"]]
    for number, mode in enumerate(group["rows"][0]["seconds"]):
        colour, style = _MODE_COLOURS[number % len(_MODE_COLOURS)], ("-", "--")[number // 3 % 2]
        panel.plot(ranks, [row["seconds"][mode] for row in group["rows"]], color=colour, linestyle=style, label=mode)
        measured = [
            case["seconds"]["median"]
            for case in result["cases"]
            if case["mode"] == mode
            and case["sparsity"] in (None, group["sparsity"])
            and case["values"] in (None, group["values"])
        ]
        panel.plot(
            [result["ranks"]] * len(measured), measured, color=colour, linestyle="none", marker="o", markersize=7
        )
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    _plain_log(panel.xaxis)
    _plain_log(panel.yaxis)
    _note(panel, f"sparsity {group['sparsity']:g}, {group['values']}; points: measured")
    _legend(panel, loc="upper left", ncols=2)


def _plain_log(axis: Any) -> None:
    """Numbers as people write them on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _short(value: float | str | None, before: str = "") -> str:
    """A part of a case's name; fp32 goes without saying on the way back."""
    if value in (None, "fp32"):
        return ""
    return before + (f"{value:g}" if isinstance(value, float) else str(value))


def _engineering(value: float, unit: str) -> str:
    from matplotlib.ticker import EngFormatter

    return str(EngFormatter(unit=unit, places=1)(value))


def _draw_accuracy(panel: Axes, records: Sequence[Row]) -> None:
    panel.set(title="Accuracy", ylabel="test accuracy, pruned model (%)")
    rounds, values = _line(panel, records, "test_accuracy", BLUE, "test accuracy", factor=100.0)
    if len(values):
        best = int(values.argmax())
        _note(panel, f"last {values[-1]:.1f} %,  best {values[best]:.1f} % (round {rounds[best]:.0f})")


def _draw_sparsity(panel: Axes, records: Sequence[Row]) -> None:
    panel.set(title="Sparsity", ylabel="share of zeros", ylim=(0, 1.02))
    _line(panel, records, "sparsity_asked", VERMILION, "asked", linewidth=4.0, alpha=0.45, marker="")
    _, values = _line(panel, records, "sparsity", BLUE, "real", drawstyle="steps-post")
    if len(values):
        _note(panel, f"last {values[-1]:.4f}")
    _legend(panel, loc="lower right")


def _draw_penalty_and_rate(panel: Axes, records: Sequence[Row]) -> None:
    panel.set_title("Penalty and learning rate")
    panel.set_ylabel("penalty λ", color=BLUE)
    _line(panel, records, "penalty", BLUE, "penalty λ", drawstyle="steps-post")
    right = panel.twinx()
    right.spines["right"].set_visible(True)
    right.grid(visible=False)
    right.set_ylabel("learning rate η", color=VERMILION)
    _line(right, records, "learning_rate", VERMILION, "learning rate η", linestyle="--")
    for axis, colour in ((panel, BLUE), (right, VERMILION)):
        axis.tick_params(axis="y", labelcolor=colour)
        _from_zero(axis)


def _draw_bytes(panel: Axes, rows: Sequence[Row], key: str, title: str) -> None:
    """Bytes a round and in total, against what dense updates would have cost, on a logarithmic scale."""
    panel.set(title=title)
    rounds, sent = _series(rows, key)
    dense_rounds, dense = _series(rows, "dense_bytes")
    curves: list[tuple[np.ndarray, np.ndarray, dict[str, Any]]] = [
        (rounds, sent, {"color": GREEN, "label": "each round", "linewidth": 1.0}),
        (rounds, sent.cumsum(), {"color": BLUE, "label": "total"}),
        (dense_rounds, dense.cumsum(), {"color": GREY, "label": "total if dense", "linestyle": "--"}),
    ]
    for x, y, style in curves:
        if y.any():
            # A round without bytes has no logarithm.
            panel.plot(x, np.where(y > 0, y, np.nan), marker=_marker(len(x)), **style)
    positive = np.concatenate([sent[sent > 0], dense[dense > 0], [sent.sum()], [dense.sum()]])
    if positive.any():
        _byte_axis(panel, positive[positive > 0].min(), positive.max())
    if not len(rounds) and not len(dense_rounds):
        _no_data(panel)
    elif not sent.any():
        _note(panel, "no bytes")
    elif dense.any():
        _note(panel, f"dense: {dense.sum() / sent.sum():.3g} times as much")
    _legend(panel, loc="lower center", ncols=3)


def _byte_axis(panel: Axes, low: float, high: float) -> None:
    """A logarithmic axis from under `low`, which leaves room for the legend, to over `high`."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    panel.set_yscale("log")
    panel.set_ylim(low / 5, high * 1.8)
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter(EngFormatter(unit="B"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def _draw_totals(panel: Axes, counts: np.ndarray) -> None:
    from matplotlib.ticker import MaxNLocator

    clients = len(counts)
    totals = counts.sum(axis=1)
    if clients <= 100:
        panel.bar(np.arange(clients), totals, width=0.85, color=BLUE)
    else:  # one outline: a thousand bars are slow to draw
        panel.stairs(totals, np.arange(clients + 1) - 0.5, fill=True, color=BLUE)
    panel.set(title="Images per client", ylabel="images")
    panel.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    panel.grid(visible=False, axis="x")
    panel.tick_params(axis="x", labelbottom=False)
    if not counts.size:
        _no_data(panel)


def _draw_heat(panel: Axes, bar: Axes, counts: np.ndarray, names: Sequence[str]) -> None:
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm
    from matplotlib.ticker import MaxNLocator

    classes = counts.shape[1]
    panel.set(title="Images per client and class", xlabel="client", ylabel="class")
    panel.grid(visible=False)
    step = max(1, -(-classes // 25))  # at most 25 class names fit
    panel.set_yticks(range(0, classes, step), [_clip(name) for name in names[::step]])
    panel.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    if not counts.size:
        bar.set_axis_off()
        _no_data(panel)
        return
    # White is exactly 0: which classes a client lacks is what the picture is for. The square root keeps small
    # counts visible beside large ones. The scale begins at 1, so that its bar shows no colour for 0.
    colours = LinearSegmentedColormap.from_list("counts", ("#C6DBEF", "#6BAED6", BLUE, "#08306B")).with_extremes(
        bad="white"
    )
    norm = PowerNorm(0.5, vmin=1, vmax=max(2, counts.max()))
    image = panel.imshow(
        np.ma.masked_equal(counts.T, 0), aspect="auto", cmap=colours, norm=norm, interpolation="nearest"
    )
    panel.figure.colorbar(image, cax=bar, label="images (white: none)").outline.set_edgecolor(GREY)


def _four_panels(title: str, rows: Sequence[Row]) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 7), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    figure.suptitle(_clip(title, 95), fontsize=13)
    panels = list(figure.subplots(2, 2).flat)
    last = max([row["round"] for row in rows], default=1)
    for panel in panels:
        panel.set(xlabel="round", xlim=(0, last + max(1, 0.02 * last)))
        panel.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=(1, 2, 5, 10)))
    return figure, panels


def _line(
    panel: Axes, rows: Sequence[Row], key: str, colour: str, label: str, factor: float = 1.0, **style: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Plot `factor * key` by round; returns what was plotted."""
    rounds, values = _series(rows, key)
    values = factor * values
    if len(values):
        panel.plot(rounds, values, **{"color": colour, "label": label, "marker": _marker(len(rounds))} | style)
    elif not panel.lines and not panel.texts:
        _no_data(panel)
    return rounds, values


def _series(rows: Sequence[Row], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Rounds and finite values of `key`, both float64 [rows that have it]."""
    pairs = [(row["round"], row[key]) for row in rows if row.get(key) is not None]
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    table = table[np.isfinite(table[:, 1])]
    return table[:, 0], table[:, 1]


def _marker(points: int) -> str:
    return "o" if points <= _MARKERS_UP_TO else ""


def _legend(panel: Axes, loc: str, ncols: int = 1) -> None:
    if panel.get_legend_handles_labels()[0]:
        panel.legend(loc=loc, ncols=ncols)


def _note(panel: Axes, text: str) -> None:
    """The number to take away, at the right end of the title's line."""
    panel.set_title(text, loc="right", fontsize=9, fontweight="normal", color=GREY)


def _from_zero(panel: Axes) -> None:
    """A scale from 0 with room above the largest value."""
    highest = max((np.max(line.get_ydata(), initial=0.0) for line in panel.lines), default=0.0)
    panel.set_ylim(0, 1.08 * highest if highest > 0 else 1.0)


def _no_data(panel: Axes) -> None:
    panel.text(0.5, 0.5, "no data", transform=panel.transAxes, ha="center", va="center", color=GREY)


def _clip(text: str, longest: int = 24) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


@contextmanager
def _style() -> Iterator[None]:
    """Our drawing defaults, for the time of one picture; a missing matplotlib is a clear error."""
    try:
        import matplotlib
    except ImportError as error:
        raise InputError(f'pictures need matplotlib ({error}): pip install "feddip-mpi[plot]"') from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a matplotlibrc of the user's would clip or recolour
        matplotlib.rcParams.update(_STYLE)
        yield


def _save(figure: Figure, path: PathLike) -> None:
    """Write the picture so that `path` is complete or absent."""
    target = Path(path)
    form = target.suffix.lower().lstrip(".")
    if form not in FORMATS:
        raise InputError(f"picture {str(target)!r}: the ending must be one of .{', .'.join(FORMATS)}")
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            figure.savefig(file, format=form)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        raise InputError(f"cannot write the picture {str(target)!r}: {error}") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    """The process's umask; mkstemp makes files that only the owner may read."""
    current = os.umask(0)
    os.umask(current)
    return current
