"""The pictures: valid files, the data given in the panels, hardly any data, and what is refused."""

import builtins
import os
from pathlib import Path

import numpy as np
import pytest

from feddip_mpi import config
from feddip_mpi.errors import InputError
from feddip_mpi.report import planning, plots

MAGIC = {"png": b"\x89PNG\r\n\x1a\n", "pdf": b"%PDF-", "svg": b"<?xml"}


def records(rounds: int, evaluate_every: int = 1) -> list[dict]:
    rows = []
    for t in range(rounds):
        evaluated = (t + 1) % evaluate_every == 0
        rows.append(
            {
                "round": t + 1, "test_accuracy": 0.5 + 0.01 * t if evaluated else None, "test_loss": 1.0,
                "train_loss": 0.9, "sparsity": 0.5, "sparsity_asked": 0.5 + 0.01 * t, "penalty": 1e-4 * t,
                "learning_rate": 0.1 * 0.9**t, "upload_bytes": 1000 + t, "dense_bytes": 4000, "mask_grown": 0,
                "mask_pruned": 3,
            }
        )  # fmt: skip
    return rows


def plan(rounds: int) -> list[dict]:
    return [
        {"round": t + 1, "sparsity": 0.01 * t, "penalty": 0.0, "learning_rate": 0.1, "mask_update": t % 5 == 4,
         "upload_bytes": 10, "dense_bytes": 30}
        for t in range(rounds)
    ]  # fmt: skip


def curves(panel) -> dict[str, np.ndarray]:
    return {line.get_label(): np.asarray(line.get_ydata()) for line in panel.lines}


@pytest.mark.parametrize("form", plots.FORMATS)
def test_every_figure_is_a_valid_file_and_nothing_else_is_left(form: str, tmp_path: Path) -> None:
    plots.run_figure(records(12, 3), "a run", tmp_path / f"run.{form}")
    plots.plan_figure(plan(12), "a plan", tmp_path / f"plan.{form}")
    plots.partition_figure(np.arange(30).reshape(10, 3), ["a", "b", "c"], tmp_path / f"partition.{form}")
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"partition.{form}", f"plan.{form}", f"run.{form}"]
    for file in files:
        assert file.read_bytes().startswith(MAGIC[form])
        assert file.stat().st_size > 5000


def test_picture_is_readable_by_others_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "run.png"
    plots.run_figure([], "first", path)
    before = path.read_bytes()
    plots.run_figure(records(2), "second", str(path))
    assert path.read_bytes() != before
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_run_panels_hold_the_records() -> None:
    rows = records(10, evaluate_every=5)
    figure = plots.draw_run(rows, "a run")
    accuracy, sparsity, penalty, sent, rate = figure.axes
    np.testing.assert_allclose(accuracy.lines[0].get_xdata(), [5, 10])
    np.testing.assert_allclose(accuracy.lines[0].get_ydata(), [54, 59])
    np.testing.assert_allclose(curves(sparsity)["real"], [0.5] * 10)
    np.testing.assert_allclose(curves(sparsity)["asked"], [row["sparsity_asked"] for row in rows])
    np.testing.assert_allclose(penalty.lines[0].get_ydata(), [row["penalty"] for row in rows])
    np.testing.assert_allclose(rate.lines[0].get_ydata(), [row["learning_rate"] for row in rows])
    uploads = np.array([row["upload_bytes"] for row in rows])
    np.testing.assert_allclose(curves(sent)["each round"], uploads)
    np.testing.assert_allclose(curves(sent)["total"], uploads.cumsum())
    np.testing.assert_allclose(curves(sent)["total if dense"], 4000 * np.arange(1, 11))
    assert "times as much" in sent.get_title(loc="right")
    assert figure.get_suptitle() == "a run"


def test_plan_panels_hold_the_rows() -> None:
    rows = plan(11)
    figure = plots.draw_plan(rows, "a plan")
    sparsity, penalty, rate, upload = figure.axes
    assert figure.get_suptitle() == "a plan"
    np.testing.assert_allclose(curves(sparsity)["sparsity"], [row["sparsity"] for row in rows])
    np.testing.assert_allclose(sparsity.lines[1].get_xdata(), [5, 10])
    np.testing.assert_allclose(penalty.lines[0].get_ydata(), 0)
    np.testing.assert_allclose(rate.lines[0].get_ydata(), 0.1)
    np.testing.assert_allclose(curves(upload)["total"], 10 * np.arange(1, 12))


def test_what_stays_between_mask_updates_is_drawn_as_steps() -> None:
    figures = plots.draw_plan(plan(11), ""), plots.draw_run(records(11), "")
    for panel in (figures[0].axes[0], figures[0].axes[1], figures[1].axes[1], figures[1].axes[2]):
        styles = {line.get_label(): line.get_drawstyle() for line in panel.lines if line.get_label() != "asked"}
        assert "steps-post" in styles.values() and next(iter(styles.values())) == "steps-post"


def test_the_title_of_a_plan_names_method_model_and_data() -> None:
    settings = config.parse("", ["method=fedprox", "model.name=vgg11", "data.name=cifar10", "clients=70"])
    assert planning.title(settings) == "Plan of fedprox: vgg11 on cifar10, 5 of 70 clients a round"


def test_a_run_shows_what_was_uploaded_on_any_number_of_ranks() -> None:
    """What ranks hand to MPI depends on their number, and on one rank goes nowhere; the ratio to dense is that of uploads."""
    rows = [row | {"wire_bytes": 7} for row in records(3)]
    sent = plots.draw_run(rows, "").axes[3]
    assert sent.get_title() == "Bytes uploaded"
    assert sent.get_title(loc="right") == "dense: 4 times as much"


@pytest.mark.parametrize("counts", [np.array([[3, 0], [1, 5]]), np.zeros((3, 2), np.int64), np.eye(3, dtype=np.int64)])
def test_the_colour_bar_shows_no_colour_for_none(counts: np.ndarray) -> None:
    figure = plots.draw_partition(counts, None)
    heat, _, bar = figure.axes
    figure.canvas.draw()
    image = heat.images[0]
    assert bar.get_ylim()[0] == image.norm.vmin == 1
    assert bar.get_ylabel() == "images (white: none)"
    colours = image.to_rgba(image.get_array())
    assert ((colours[..., :3] == 1).all(axis=-1) == (counts.T == 0)).all()


def test_partition_panels_hold_the_counts() -> None:
    counts = np.array([[3, 0], [1, 5], [0, 2]])
    figure = plots.draw_partition(counts, ["cat", "dog"])
    heat, totals, _ = figure.axes
    assert [bar.get_height() for bar in totals.patches] == [3, 6, 2]
    np.testing.assert_array_equal(heat.images[0].get_array().filled(0), counts.T)
    assert [label.get_text() for label in heat.get_yticklabels()] == ["cat", "dog"]


@pytest.mark.parametrize("clients", [1, 10, 100, 1000])
@pytest.mark.parametrize("classes", [2, 100])
def test_partition_of_any_size_has_room_for_its_labels(clients: int, classes: int, tmp_path: Path) -> None:
    figure = plots.draw_partition(np.ones((clients, classes), dtype=np.int64), None)
    assert len(figure.axes[0].get_yticks()) <= 25
    assert figure.get_figheight() <= 8
    plots.partition_figure(np.ones((clients, classes), dtype=np.int64), None, tmp_path / "p.png")


@pytest.mark.parametrize(
    "rows",
    [
        [],
        records(1),
        [{"round": 1}],
        [{"round": 1, "test_accuracy": None, "wire_bytes": 0, "dense_bytes": 0, "penalty": 0.0, "learning_rate": 0.1}],
        [{"round": 1, "test_accuracy": float("nan"), "wire_bytes": 0, "dense_bytes": 9, "penalty": 0.0}],
    ],
)
def test_hardly_any_data_draws(rows: list[dict], tmp_path: Path) -> None:
    plots.run_figure(rows, "", tmp_path / "run.png")
    plots.plan_figure(rows, "", tmp_path / "plan.png")
    assert (tmp_path / "plan.png").exists()


def test_empty_partition_draws(tmp_path: Path) -> None:
    plots.partition_figure(np.zeros((0, 3), dtype=np.int64), None, tmp_path / "p.png")
    plots.partition_figure(np.zeros((3, 2), dtype=np.int64), None, tmp_path / "p.png")


def test_text_with_a_dollar_sign_is_no_formula(tmp_path: Path) -> None:
    plots.run_figure(records(2), r"cost $\frac{ of a run", tmp_path / "run.png")
    plots.partition_figure(np.ones((2, 1)), [r"$\bad"], tmp_path / "p.png")


def test_wrong_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ending must be one of .png, .pdf, .svg"):
        plots.run_figure([], "x", tmp_path / "run.jpeg2")
    with pytest.raises(InputError, match="2 class names for 3 classes"):
        plots.partition_figure(np.ones((2, 3)), ["a", "b"], tmp_path / "p.png")
    with pytest.raises(InputError, match=r"shape \(3,\)"):
        plots.partition_figure(np.ones(3), None, tmp_path / "p.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the picture"):
        plots.run_figure([], "x", tmp_path / "file" / "run.png")


def test_failed_drawing_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.png"
    path.write_bytes(b"old")

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(InputError, match="No space left"):
        plots.run_figure(records(2), "x", path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_users_settings_are_untouched(tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 33.0}):
        plots.run_figure([], "x", tmp_path / "run.png")
        assert matplotlib.rcParams["font.size"] == 33.0


def test_missing_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install \"feddip-mpi\[plot\]\""):
        plots.run_figure([], "x", tmp_path / "run.png")
