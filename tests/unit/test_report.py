"""The report: which folders count and why not, numbers over seeds, tables, and a page that is whole."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import made_runs
import numpy as np
import pytest

from feddip_mpi import metrics, run_folder
from feddip_mpi.errors import InputError
from feddip_mpi.report import accuracy_figures, drawing, figures, page, runs, summaries, tables
from feddip_mpi.report.summaries import Group, Spread
from feddip_mpi.run_folder import Lock, RunFolder
from feddip_mpi.sweep import labels


def groups_of(folder: Path) -> list[Group]:
    return summaries.groups(runs.find([folder]).runs)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_runs.study(tmp_path_factory.mktemp("study") / "runs")


# which folders count


def test_every_folder_is_used_or_listed_with_its_reason(tmp_path: Path) -> None:
    made_runs.make(tmp_path / "good")
    made_runs.make(tmp_path / "deeper" / "good too", seed=2)
    made_runs.make(tmp_path / "twin")
    made_runs.make(tmp_path / "stopped", finished=False)
    made_runs.fail(made_runs.make(tmp_path / "failed", finished=False), "x\n  y: z")
    at_work = RunFolder(made_runs.make(tmp_path / "at work", finished=False))
    short = made_runs.make(tmp_path / "short") / "metrics.jsonl"
    short.write_text("".join(short.read_text().splitlines(True)[:2]))
    torn = made_runs.make(tmp_path / "torn") / "metrics.jsonl"
    torn.write_text(torn.read_text().replace('"round": 2', '"round" 2'))
    (made_runs.make(tmp_path / "no summary") / "finished.json").write_text('{"rounds"')
    (made_runs.make(tmp_path / "newer") / "config.yaml").write_text("gamma_rays: 3\n")
    (made_runs.make(tmp_path / "no config") / "config.yaml").unlink()
    old = made_runs.make(tmp_path / "old") / "metrics.jsonl"
    old.write_text(old.read_text().replace('"update_norm"', '"norm"'))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("mine")
    (tmp_path / "_sweep").mkdir()
    made_runs.fail(at_work.path)  # in an earlier start
    lock = Lock(at_work)
    found = runs.find([tmp_path, tmp_path / "good"])
    lock.release()
    assert [run.name for run in found.runs] == ["good too", "good"]
    reasons = {item.path.name: item.reason for item in found.left_out}
    expected = {
        "twin": "the same configuration and seed as",
        "stopped": "unfinished: 3 of 3 rounds (`feddip-mpi resume` goes on)",
        "failed": "failed after 3 of 3 rounds: error: x y: z",
        "at work": "unfinished: 3 of 3 rounds (at work: process",
        "short": "damaged: metrics.jsonl has 2 rounds, finished.json says 3",
        "torn": "damaged: metrics.jsonl cannot be read",
        "no summary": "damaged: finished.json cannot be read",
        "newer": "gamma_rays: unknown key",
        "no config": "damaged: it has no config.yaml",
        "old": "metrics.jsonl lacks update_norm",
        "foreign": "no run folder",
    }
    assert reasons.keys() == expected.keys()
    assert all(text in reasons[name] for name, text in expected.items()), reasons


def change(run: Path, **values: Any) -> None:
    """Other values in all rounds of a run, or with `finished__` before the name in its summary."""
    told = {name.removeprefix("finished__"): value for name, value in values.items() if name.startswith("finished__")}
    summary, rows = run / "finished.json", run / "metrics.jsonl"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | told))
    new = {name: value for name, value in values.items() if not name.startswith("finished__")}
    rows.write_text("".join(json.dumps(json.loads(line) | new) + "\n" for line in rows.read_text().splitlines()))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"test_accuracy": float("nan")}, "finite numbers as test_accuracy"),
        ({"update_norm": float("inf"), "ranks": "two"}, "finite numbers as ranks, update_norm"),
        ({"train_seconds": 10**400}, "finite numbers as train_seconds"),
        ({"sparsity_by_layer": [0.1]}, "finite numbers as sparsity_by_layer"),
        ({"client_accuracy": "high"}, "finite numbers as client_accuracy"),
        ({"finished__test_accuracy": float("nan")}, "or it is no finite number"),
        ({"finished__rounds": True}, "or it is no finite number"),
        ({"finished__rounds": 10**15}, "has 3 rounds, finished.json says 1000000000000000"),
        ({"finished__versions": "1"}, "no names and values as versions"),
        ({"finished__hardware": [1]}, "no names and values as hardware"),
    ],
)
def test_what_is_no_number_is_listed_and_the_others_are_reported(
    values: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    made_runs.make(tmp_path / "good")
    change(made_runs.make(tmp_path / "wrong", seed=2), **values)
    found = runs.find([tmp_path])
    assert [run.name for run in found.runs] == ["good"]
    assert [(item.path.name, reason in item.reason) for item in found.left_out] == [("wrong", True)], found.left_out


def test_a_folder_whose_name_is_no_text_is_listed(tmp_path: Path) -> None:
    made_runs.make(tmp_path / "good")
    made_runs.make(tmp_path / "b\udcff", seed=2)
    found = runs.find([tmp_path])
    assert [run.name for run in found.runs] == ["good"]
    assert [(item.path.name, item.reason) for item in found.left_out] == [
        ("b\ufffd", "its name is not UTF-8; rename it")
    ]


def test_labels_are_text_in_every_table(tmp_path: Path) -> None:
    said = {"a": "=1+1", "b": "x|y <b>z</b>\nw", "c": "-2", "d": "plain_1"}
    for number, name in enumerate(said):
        made_runs.make(tmp_path / name, keys={"learning_rate": 0.1 + 0.01 * number})
    labels.write({name: {"method": label} for name, label in said.items()}, tmp_path)
    made = summaries.groups(runs.find([tmp_path]).runs)
    lines, letters = summaries.lines(made), summaries.hardware_letters([run for group in made for run in group.runs])
    rows = list(csv.DictReader(tables.to_csv(tables.summary_rows(lines, letters)).splitlines(True)))
    # A newline in a label is quoted; what a spreadsheet would compute is behind an apostrophe, and numbers are not.
    assert {row["method"] for row in rows} == {"'=1+1", "x|y <b>z</b>\nw", "'-2", "plain_1"}
    assert tables.to_csv([{"a": -1.5, "b": "@x", "c": None}]) == "a,b,c\n-1.5,'@x,\n"
    ((name, family),) = summaries.families(made).items()
    table = [line for line in tables.to_markdown(name, family).splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(said), "a row a method"
    assert any(line.startswith(r"| x\|y \<b\>z\</b\> w | 0.4") for line in table)
    assert any(line.startswith("| plain_1 | ") for line in table)
    latex = tables.to_latex(lines, letters)
    assert r"x|y <b>z</b> w & 0.9" in latex and r"plain\_1 & 0.9" in latex


def test_nothing_usable_is_an_error_that_says_why(tmp_path: Path) -> None:
    made_runs.make(tmp_path / "runs" / "stopped", finished=False)
    with pytest.raises(InputError, match=r"no finished run in (.|\n)*stopped: unfinished: 3 of 3") as caught:
        page.report([str(tmp_path / "runs")], str(tmp_path / "out"))
    assert caught.value.exit_code == 2 and not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="no such folder"):
        runs.find([tmp_path / "missing"])


@pytest.mark.parametrize(
    "line",
    [
        run_folder.hardware_line({"host": "a", "processor": "CPU Y", "cores": 8}),
        "start: x; {'host': 'a', 'processor': 'CPU Y', 'cores': 8}",  # of older versions
    ],
)
def test_hardware_of_all_starts_counts(line: str, tmp_path: Path) -> None:
    folder = made_runs.make(tmp_path / "run")
    (folder / "run.log").write_text(f"{line}\nresume\n")
    hardware = runs.load(folder).hardware
    assert (hardware.processor, hardware.cores) == ("CPU X and CPU Y", "2 and 8")
    (group,) = groups_of(tmp_path)
    assert any("resumed on other hardware" in text for text in summaries.warnings([group], {hardware: "A"}))


# numbers over seeds


def test_groups_and_spreads(study: Path) -> None:
    made = groups_of(study)
    assert [(group.title, group.seeds) for group in made] == [
        ("fedavg dense", (1, 2)), ("feddip 0.9", (1, 2)), ("feddip 0.95", (1, 2)),
    ]  # fmt: skip
    assert {group.setting for group in made} == {
        "lenet5 on synthetic, iid, 3 rounds, 2 of 4 clients a round, 5 local epochs"
    }
    dense, mild, hard = summaries.lines(made)
    assert dense.accuracy == Spread(pytest.approx(0.82), pytest.approx(0.80), pytest.approx(0.84), 2)
    assert mild.against is made[0]
    assert mild.accuracy_difference == pytest.approx(0.71 - 0.82)
    assert hard.accuracy.high == pytest.approx(0.62) and hard.last5.mean == pytest.approx(0.56)
    assert mild.times_fewer_bytes == pytest.approx(10) and mild.time_ratio == pytest.approx(2 / 3)
    assert mild.seconds == Spread(6.0, 6.0, 6.0, 2)


def test_the_mean_of_the_last_evaluations_is_of_one_sparsity(tmp_path: Path) -> None:
    """Also of a run whose summary is of a version that took all five: its first model is dense."""
    old = made_runs.make(tmp_path / "run", accuracy=0.7)
    change(old, finished__test_accuracy_mean_of_last_5=0.6, finished__evaluations_in_mean=3)
    (group,) = groups_of(tmp_path)
    (line,) = summaries.lines([group])
    assert line.last5.mean == pytest.approx((0.6 + 0.7) / 2)
    assert summaries.last_evaluations([group]) == "last 2 evaluations"


def test_a_mean_lies_between_the_lowest_and_the_highest() -> None:
    """Sums are rounded: three times 0.1 by three is more than 0.1, and an error bar below zero is none."""
    for value in np.linspace(0, 1, 1001):
        spread = Spread.of([value] * 3)
        assert spread.low <= spread.mean <= spread.high == value


def drawn(folder: Path, draw: figures.Draw) -> drawing.Picture:
    pytest.importorskip("matplotlib")
    made = groups_of(folder)
    with drawing.style():
        picture = draw(made, drawing.Look(made))
    assert picture is not None
    picture.figure.draw_without_rendering()
    return picture


@pytest.mark.parametrize("draw", [figures.mask_churn, figures.pruning_error])
def test_what_stands_beside_small_panels_is_no_taller_than_they(draw: figures.Draw, tmp_path: Path) -> None:
    made_runs.make(tmp_path / "run")
    picture = drawn(tmp_path, draw)
    (upper, _) = picture.figure.subfigs
    panel = upper.axes[0].get_window_extent()
    if upper._supylabel is not None:
        assert upper._supylabel.get_window_extent().height < panel.height
    ticks = [label.get_window_extent() for label in upper.axes[0].get_yticklabels()]
    assert all(low.y1 <= high.y0 + 2 for low, high in itertools.pairwise(ticks)), "numbers lie on each other"
    assert upper.legends[0].get_title().get_text().startswith("scale: logarithmic, linear up to")


def test_accuracy_by_round_shows_all_of_the_seeds(tmp_path: Path) -> None:
    """The band is inside the panel, and the number beside the curve says that it is no end of it."""
    for seed, accuracy in ((1, 0.9), (2, 0.5)):
        made_runs.make(tmp_path / f"s{seed}", seed, accuracy)
    panel = drawn(tmp_path, figures.accuracy_by_round).figure.subfigs[0].axes[0]
    low, high = panel.get_ylim()
    assert low < 0.3 and high > 0.9
    assert [text.get_text() for text in panel.texts] == ["last 2: 0.650"]


def said_below(picture: drawing.Picture, made: list[Group]) -> str:
    """What stands under the panels, and the line about the runs."""
    whole = drawing.finish(picture, "", drawing.footer_of({made[0].hardware[0]: "A"})).figure
    label = whole.subfigs[0]._supxlabel
    return "\n".join([label.get_text() if label else "", *(text.get_text() for text in whole.subfigs[1].texts)])


def test_captions_name_only_what_there_is(study: Path, tmp_path: Path) -> None:
    """No range and no dense line where there is one seed and no dense run; the same names in pictures and words."""
    skewed = {"data.partition": "dirichlet", "local_epochs": 1, "participants": 1, "clients": 1}
    made_runs.make(tmp_path / "one", accuracy=0.1, keys=skewed)
    (alone,) = groups_of(tmp_path)
    assert alone.heading == "lenet5 on synthetic, Dirichlet(0.5), 3 rounds, 1 of 1 client a round, 1 local epoch"
    picture = drawn(tmp_path, accuracy_figures.accuracy_by_method)
    assert picture.alternative == "FedDIP 0.9: 0.050."
    below = said_below(picture, [alone])
    assert below.startswith("accuracy, mean of the last evaluations\n1 run in ") and "seed 1\n" in below
    assert not any(word in below for word in ("dense", "dashed", "mean of the seeds"))
    both = drawn(study, accuracy_figures.accuracy_by_method)
    below = said_below(both, groups_of(study))
    assert "; dashed: FedAvg (dense)\n" in below and drawing.SPREAD in below
    assert both.alternative.startswith("FedAvg dense: 0.720 (0.700 to 0.740); FedDIP 0.9: ")
    churn = drawn(study, figures.mask_churn)
    assert churn.alternative.startswith(
        "Weights at all updates together: FedDIP 0.9 30 pruned, 10 grown; FedDIP 0.95 30"
    )
    made = groups_of(study)
    with drawing.style():
        overview = accuracy_figures.overview({"iid": made}, drawing.Look(made))
    assert overview is not None and overview.alternative.startswith("IID: FedAvg dense: ")
    assert overview.figure.subfigs[0].axes[0].get_ylabel() == "accuracy,\nmean of the last evaluations"


def test_runs_that_stay_at_chance_are_drawn(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        made_runs.make(tmp_path / "runs" / f"dense-{seed}", seed, 0.1, keys={"method": "fedavg"}, sparsity=0.0)
        made_runs.make(tmp_path / "runs" / f"s{seed}", seed, 0.1)
    page.report([str(tmp_path / "runs")], str(tmp_path / "out"))
    assert (tmp_path / "out" / "report.html").exists()


def test_seeds_that_end_with_other_sparsities_have_their_mean(tmp_path: Path) -> None:
    for seed, sparsity in ((1, 0.0), (2, 0.4), (3, 0.8)):
        made_runs.make(tmp_path / f"s{seed}", seed, sparsity=sparsity)
    (group,) = groups_of(tmp_path)
    assert group.sparsity == pytest.approx(0.4) and group.prunes


def test_by_round_takes_the_rounds_that_all_seeds_have(tmp_path: Path) -> None:
    for seed, accuracy in ((1, 0.5), (2, 0.7)):
        made_runs.make(tmp_path / f"s{seed}", seed, accuracy)
    path = tmp_path / "s2" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["test_accuracy"] = None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (group,) = groups_of(tmp_path)
    np.testing.assert_allclose(
        summaries.by_round(group, "test_accuracy"), [[1, 0.4, 0.3, 0.5], [3, 0.6, 0.5, 0.7]], atol=1e-12
    )
    assert summaries.by_round(group, "device_memory_bytes").shape == (3, 4)
    assert summaries.by_round(group, "no such name").shape == (0, 4)
    assert list(summaries.layers(group)) == list(made_runs.LAYERS)


def test_totals_phases_clients(study: Path) -> None:
    mild = groups_of(study)[1]
    assert summaries.totals(mild, ["upload_values_bytes", "upload_frame_bytes"]) == {
        "upload_values_bytes": 240.0, "upload_frame_bytes": 60.0,
    }  # fmt: skip
    phases = summaries.phase_seconds(mild)
    assert phases["train"] == 1.0 and phases["evaluate"] == 0.5
    assert (
        phases["encode"] == pytest.approx(0.1) and phases["other"] == 0.0
    )  # 1.5 s and six phases of 0.1 s pass the 2 s
    slow = summaries.phase_seconds(groups_of(study)[0])  # 3 s, of which 1.5 + 0.75 + 0.6 are in phases
    assert slow["other"] == pytest.approx(0.15) and sum(slow.values()) == pytest.approx(3.0)
    np.testing.assert_array_equal(summaries.client_accuracy(mild), [0.1, 0.1, 0.5, 0.5, 0.9, 0.9])
    assert summaries.peak(mild, "host_memory_bytes").mean == 10**8 + 3


def test_bytes_by_kind_are_the_uploads_of_the_table(tmp_path: Path) -> None:
    """Control messages, which each rank sends whatever the method, are no part of them."""
    change(made_runs.make(tmp_path / "run"), control_bytes=5000)
    picture = drawn(tmp_path, figures.bytes_by_kind)
    (left, _), (line,) = picture.figure.subfigs[0].axes, summaries.lines(picture.groups)
    assert list(left.lines[0].get_xdata()) == [line.upload_bytes.mean] == [300]
    assert left.get_xlabel() == "uploaded in all rounds"
    assert [text.get_text() for text in picture.figure.subfigs[0].legends[0].get_texts()] == [
        "upload values",
        "upload frame",
    ]
    assert "control messages, 15.0 kB with FedDIP 0.9" in picture.alternative


def test_seeds_on_unlike_hardware_have_no_mean_of_seconds(tmp_path: Path) -> None:
    made_runs.make(tmp_path / "a", 1)
    made_runs.make(tmp_path / "b", 2, processor="CPU Y", seconds=9.0)
    found = runs.find([tmp_path])
    (group,) = summaries.groups(found.runs)
    letters = summaries.hardware_letters(found.runs)
    (line,) = summaries.lines([group])
    assert line.seconds is None and sorted(letters.values()) == ["A", "B"]
    assert tables.display_cells(line, letters)["seconds"] == "mixed hardware"
    assert tables.display_cells(line, letters)["hardware"] == "A, B"
    said = summaries.warnings([group], letters)
    assert any("its seeds ran on different hardware (A, B)" in text for text in said)
    assert "Seconds of different letters are not comparable" in tables.to_latex([line], letters)


def test_unlike_hardware_between_groups_gives_no_ratio_of_seconds(tmp_path: Path) -> None:
    dense = {"method": "fedavg", "upload.values": "fp32"}
    made_runs.make(tmp_path / "a", 1, keys=dense, sparsity=0.0, processor="CPU Y")
    made_runs.make(tmp_path / "b", 1)
    line = summaries.lines(groups_of(tmp_path))[1]
    assert line.times_fewer_bytes == 1 and line.time_ratio is None


def test_variants_are_told_apart_by_what_is_not_the_default(tmp_path: Path) -> None:
    made_runs.make(tmp_path / "a")
    made_runs.make(tmp_path / "b", keys={"mask.initial": "erk", "learning_rate": 0.2})
    made_runs.make(tmp_path / "c", keys={"checkpoint.every": 7}, seed=2)  # says nothing about the experiment
    made = groups_of(tmp_path)
    assert [(group.label, group.seeds) for group in made] == [
        ("feddip", (1, 2)), ("feddip (learning_rate=0.2, mask.initial=erk)", (1,)),
    ]  # fmt: skip
    assert any(
        "not all groups have the same seeds" in text for text in summaries.warnings(made, {made[0].hardware[0]: "A"})
    )


def test_what_is_not_the_same_for_all_methods_is_said(tmp_path: Path) -> None:
    """The methods' own keys are what is compared; what the labels of one method tell apart counts for it too."""
    shared = {"learning_rate": 0.2}
    for number, method in enumerate(("gradual", "snip", "ssfl")):
        made_runs.make(
            tmp_path / method, keys=shared | {"method": method, "upload.values": "fp32", "mask.every": number + 1}
        )
    made_runs.make(tmp_path / "feddip", keys=shared | {"penalty.maximum": 0.5})
    made = groups_of(tmp_path)
    expected = ["upload.values (FedDIP: int4; the others: fp32)"]
    assert summaries.unequal(made) == expected
    made_runs.make(tmp_path / "skewed", keys=shared | {"penalty.maximum": 0.5, "data.partition": "dirichlet"})
    assert summaries.unequal(groups_of(tmp_path)) == expected  # a method may have partitions of its own
    letters = {made[0].hardware[0]: "A"}
    (said,) = [text for text in summaries.warnings(made, letters) if "not the same for all methods" in text]
    assert said.endswith(f"not the same for all methods: {expected[0]}")
    assert f"Not the same for all methods: {expected[0]}." in tables.to_latex(summaries.lines(made), letters)
    ((name, family),) = summaries.families(made).items()
    assert tables.to_markdown(name, family).endswith(f"Not the same for all methods: {expected[0]}.\n")
    made_runs.make(tmp_path / "other", keys={"precision": "bf16", "penalty.maximum": 0.5})
    assert summaries.unequal(groups_of(tmp_path)) == [
        "learning_rate (FedDIP: 0.1, 0.2; the others: 0.2)", *expected, "precision (FedDIP: bf16, fp32; the others: fp32)",
    ]  # fmt: skip
    made_runs.make(tmp_path / "alone" / "one")
    assert summaries.unequal_text(groups_of(tmp_path / "alone")) == ""


def plain_grid(folder: Path) -> None:
    """What `method: [fedavg, feddip]` by `sparsity.final: [0.5, 0.9]` made when FedAvg ran once for each sparsity."""
    for share in (0.5, 0.9):
        dense = {"method": "fedavg", "upload.values": "fp32", "sparsity.final": share}
        made_runs.make(folder / f"fedavg-{share}", 1, 0.8, keys=dense, sparsity=0.0, upload=1000)
        made_runs.make(folder / f"feddip-{share}", 1, 0.7, keys={"sparsity.final": share}, sparsity=share)


def test_a_method_without_a_mask_is_one_group_for_all_sparsities(tmp_path: Path) -> None:
    plain_grid(tmp_path)
    found = runs.find([tmp_path])
    ((twin, reason),) = [(item.path.name, item.reason) for item in found.left_out]
    assert twin == "fedavg-0.9" and reason.endswith("fedavg-0.5, but for what fedavg does not look at (sparsity.final)")
    made = summaries.groups(found.runs)
    assert [group.title for group in made] == ["fedavg dense", "feddip 0.5", "feddip 0.9"]
    assert all(line.times_fewer_bytes == pytest.approx(10) for line in summaries.lines(made)[1:])
    ((name, family),) = summaries.families(made).items()
    assert "| FedAvg (dense) | 0.7000<br>3.0 kB | 0.7000<br>3.0 kB |" in tables.to_markdown(name, family)


def test_yardsticks_with_equal_results_are_one_and_others_are_named(tmp_path: Path) -> None:
    dense = {"method": "fedavg", "upload.values": "fp32"}
    letters = {runs.load(made_runs.make(tmp_path / "pruned")).hardware: "A"}
    (missing,) = summaries.warnings(groups_of(tmp_path), letters)
    assert "no dense FedAvg, so nothing" in missing and "method: fedavg and upload.values: fp32" in missing
    made_runs.make(tmp_path / "one", 1, 0.8, keys=dense, sparsity=0.0)
    made_runs.make(tmp_path / "at once", 1, 0.8, keys=dense | {"clients_at_once": 2}, sparsity=0.0)
    assert summaries.dense_of(groups_of(tmp_path)) is not None
    assert not any("dense FedAvg" in text for text in summaries.warnings(groups_of(tmp_path), letters))
    made_runs.make(tmp_path / "faster", 1, 0.9, keys=dense | {"learning_rate": 0.3}, sparsity=0.0)
    assert summaries.dense_of(groups_of(tmp_path)) is None
    (several,) = [text for text in summaries.warnings(groups_of(tmp_path), letters) if "dense FedAvg" in text]
    assert "several dense FedAvgs" in several and "report the runs of one alone" in several
    assert all(name in several for name in ("one", "at once", "faster"))


def test_a_sweep_names_its_methods(tmp_path: Path) -> None:
    made_runs.make(tmp_path / "cell-1", keys={"mask.initial": "erk"})
    (tmp_path / "_sweep").mkdir()
    (tmp_path / "_sweep" / "cells.json").write_text('{"cell-1": {"method": "published", "partition": "iid"}}')
    assert [group.label for group in groups_of(tmp_path)] == ["published"]


# tables


def test_csv_holds_every_number(study: Path) -> None:
    made = groups_of(study)
    letters = summaries.hardware_letters([run for group in made for run in group.runs])
    rows = list(csv.DictReader(io.StringIO(tables.to_csv(tables.summary_rows(summaries.lines(made), letters)))))
    assert tuple(rows[0]) == tables.SUMMARY_COLUMNS
    assert [row["seeds"] for row in rows] == ["1 2"] * 3 and rows[0]["compared_with"] == "fedavg dense"
    assert float(rows[1]["accuracy_lowest"]) == pytest.approx(0.7) and rows[1]["runs"] == "feddip-0.9-1 feddip-0.9-2"
    each = list(csv.DictReader(io.StringIO(tables.to_csv(tables.run_rows(made[1].runs, letters)))))
    assert each[0]["sparsity.final"] == "0.9" and each[1]["seed"] == "2" and each[0]["hardware"] == "A"
    by_round = tables.round_rows(made)
    assert {"round": 3, "name": "mask_grown", "mean": 0.0}.items() <= next(
        row for row in by_round if row["name"] == "mask_grown" and row["round"] == 3
    ).items()


def test_every_number_of_a_round_is_in_a_table(study: Path, tmp_path: Path) -> None:
    made = groups_of(study)
    scalars = {name for name, field in metrics.FIELDS.items() if field.kind in ("int", "float")}
    assert {row["name"] for row in tables.round_rows(made)} == scalars - {"round"}
    of_layers = [row for row in tables.layer_rows(made) if (row["method"], row["sparsity"]) == ("feddip", 0.95)]
    assert [(row["layer"], row["round"], row["mean"]) for row in of_layers[2:4]] == [
        ("conv.weight", 3, 0.0), ("fc.weight", 1, 0.95),
    ]  # fmt: skip
    of_clients = [row for row in tables.client_rows(made) if (row["sparsity"], row["seed"]) == (0.95, 2)]
    assert [(row["round"], row["client"], row["accuracy"]) for row in of_clients[:4]] == [
        (1, 0, 0.1), (1, 2, 0.5), (1, 3, 0.9), (2, 0, 0.1),
    ]  # fmt: skip
    assert tables.partition_rows(made) == []
    run = dataclasses.replace(made[0].runs[0], histogram=np.array([[3, 0], [1, 2]]), class_names=("a", "b"))
    rows = tables.partition_rows([Group("task", "fedavg", 0.0, "", (run,)), *made[1:]])
    assert [tuple(row.values())[1:] for row in rows] == [
        (1, 0, 0, "a", 3), (1, 0, 1, "b", 0), (1, 1, 0, "a", 1), (1, 1, 1, "b", 2),
    ]  # fmt: skip


def test_markdown_has_a_row_a_method_and_a_column_a_partition_and_sparsity(study: Path, tmp_path: Path) -> None:
    dense = {"method": "fedavg", "upload.values": "fp32", "sparsity.initial": 0, "sparsity.final": 0}
    skewed = {"data.partition": "dirichlet"}
    made_runs.make(tmp_path / "d", 1, 0.8, keys=dense | skewed, sparsity=0.0, upload=1000)
    made_runs.make(tmp_path / "p", 1, 0.7, keys=skewed | {"sparsity.final": 0.9}, sparsity=0.9012)
    made = summaries.groups(runs.find([study, tmp_path]).runs)
    ((name, family),) = summaries.families(made).items()
    assert name == "lenet5 on synthetic, 3 rounds, 2 of 4 clients a round, 5 local epochs" and list(family) == [
        "iid",
        "dirichlet(0.5)",
    ]
    text = tables.to_markdown(name, family)
    assert text.splitlines()[2:] == [
        "| method | IID, 0.9 | IID, 0.95 | Dirichlet(0.5), 0.9 |",
        "|---|---|---|---|",
        "| FedAvg (dense) | 0.7200 (0.7000 to 0.7400)<br>3.0 kB | 0.7200 (0.7000 to 0.7400)<br>3.0 kB "
        "| 0.7000 (seed 1)<br>3.0 kB |",
        "| FedDIP | 0.6600 (0.6500 to 0.6700)<br>300 B, 10 x | 0.5600 (0.5500 to 0.5700)<br>300 B, 10 x "
        "| 0.6500 (seed 1)<br>300 B, 10 x |",
        "",
        "Ended beside the sparsity asked for: FedDIP 0.9012.",
        "",
        "Not the same for all methods: upload.values (FedAvg: fp32; FedDIP: int4).",
    ]  # fmt: skip
    assert (
        f"mean of the last 2 to 3 evaluations ({summaries.AS_SPARSE}): mean of the seeds 1, 2 (lowest to highest), or those "
        "that a cell names;" in text
    )


def test_own_arrays_of_two_files_are_two_tasks(tmp_path: Path) -> None:
    for name in ("one", "other"):
        keys = {
            "method": "fedavg",
            "sparsity.final": 0,
            "sparsity.initial": 0,
            "data.name": "npz",
            "data.path": f"a/{name}.npz",
        }
        made_runs.make(tmp_path / name, 1, sparsity=0.0, keys=keys)
    found = runs.find([tmp_path])
    assert not found.left_out
    made = summaries.groups(found.runs)
    assert [group.setting.split(",")[0] for group in made] == ["lenet5 on npz one.npz", "lenet5 on npz other.npz"]


def test_names_as_papers_write_them() -> None:
    assert [summaries.name_of(label) for label in ("feddip", "feddip-int4", "snip", "mine-2", "feddipper")] == [
        "FedDIP", "FedDIP int4", "SNIP", "mine-2", "feddipper",
    ]  # fmt: skip


def test_a_method_that_does_not_learn_does_not_set_the_scale() -> None:
    assert drawing.whole_scale([0.1, 0.85, 0.86, 0.88, 0.89]) == (0.85, 0.89)
    assert drawing.whole_scale([0.7, 0.9]) == (0.7, 0.9)
    assert drawing.whole_scale([0.5]) == (0.5, 0.5)


def test_figures_show_the_mean_of_the_last_evaluations(study: Path) -> None:
    """The last one alone is higher in every run."""
    pytest.importorskip("matplotlib")
    groups = groups_of(study)
    with drawing.style():
        picture = accuracy_figures.accuracy_by_sparsity(groups, drawing.Look(groups))
    assert picture is not None
    (panel,) = picture.figure.axes
    (points,) = panel.containers
    assert points.lines[0].get_ydata() == pytest.approx([0.66, 0.56])
    assert panel.lines[0].get_ydata() == pytest.approx([0.72, 0.72])  # the dense one


def test_seconds_are_shown_of_the_hardware_that_most_groups_ran_on(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for place, processor in enumerate("AABA"):
        made_runs.make(tmp_path / str(place), processor=processor, keys={"sparsity.final": 0.6 + 0.1 * place})
    groups = groups_of(tmp_path)
    other = groups[2]
    assert accuracy_figures.same_hardware(groups) == [group for group in groups if group is not other]
    with drawing.style():
        picture = accuracy_figures.accuracy_by_seconds(groups, drawing.Look(groups))
    assert picture is not None and other not in picture.groups
    assert picture.alternative.endswith(f"Left out, because they ran on other hardware: {other.shown}.")


def test_looks_are_apart_and_the_same_in_every_report(study: Path) -> None:
    (group, *_) = groups_of(study)
    known = [
        "fedavg",
        "fedprox",
        "feddip",
        "feddip-int4",
        "feddip-published",
        "gradual",
        "ssfl",
        "snip",
        "feddst",
        "erk",
    ]
    labels = [*known, *(f"mine-{number}" for number in range(20))]
    groups = [Group(group.setting, label, 0.9, "", group.runs) for label in labels]
    look = drawing.Look(groups)
    pairs = [(look.colour(label), look.mark(label)) for label in labels]
    assert len(set(pairs)) == len(pairs)
    alone = drawing.Look(groups[3:4])
    assert (alone.colour("feddip-int4"), alone.mark("feddip-int4")) == pairs[3]


@pytest.mark.parametrize("methods", [1, 13])
def test_nothing_in_a_figure_is_cut_off(tmp_path: Path, methods: int) -> None:
    """Every text of the figures that compare lies inside its figure, with one method and with many."""
    pytest.importorskip("matplotlib")
    dense = {"method": "fedavg", "upload.values": "fp32", "sparsity.initial": 0, "sparsity.final": 0}
    made_runs.make(tmp_path / "dense", 1, 0.9, keys=dense, sparsity=0.0, upload=10**7)
    for number in range(methods):
        for share in (0.95, 0.98)[:methods]:
            keys = {"sparsity.final": share, "mask.every": 1 + number}
            accuracy = 0.2 if number == 5 else 0.88 - 0.002 * number
            made_runs.make(
                tmp_path / f"{number}-{share}", 1, accuracy, keys=keys, sparsity=share, upload=10**5 + number
            )
    made = groups_of(tmp_path)
    look, footer = drawing.Look(made), drawing.footer_of({made[0].hardware[0]: "A"})
    with drawing.style():
        (family,) = summaries.families(made).values()
        for picture in (*figures.of_settings(family, look, footer), *figures.of_setting(made, look, footer)):
            assert outside(picture.figure) == [], picture.name


def outside(figure: Any) -> list[str]:
    """Texts that pass the figure's edge."""
    from matplotlib.axes import Axes
    from matplotlib.text import Text

    figure.draw_without_rendering()
    width, height = figure.bbox.width, figure.bbox.height
    axes = [axis for panel in figure.findobj(Axes) for axis in (panel.xaxis, panel.yaxis)]
    ticks = {id(label) for axis in axes for tick in axis.get_major_ticks() for label in (tick.label1, tick.label2)}
    ticks -= {id(tick.label1) for axis in axes for tick in axis._update_ticks()}  # those that are drawn count
    found = []
    for text in figure.findobj(Text):
        if text.get_text() and text.get_visible() and id(text) not in ticks and (text.axes is None or text.axes.axison):
            box = text.get_window_extent()
            if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1:
                found.append(f"{text.get_text()}: {box} of {width} x {height}")
    return found


def test_latex_is_escaped() -> None:
    assert tables.escape(r"a_b 5% {x} \y $z$ #1 & ~^") == (
        r"a\_b 5\% \{x\} \textbackslash{}y \$z\$ \#1 \& \textasciitilde{}\textasciicircum{}"
    )


def test_spread_text() -> None:
    assert tables.spread_text(Spread(0.5, 0.25, 0.75, 2), 2) == "0.50 (0.25 to 0.75)"
    assert tables.spread_text(Spread(0.5, 0.5, 0.5, 1), 3) == "0.500"


# the page


class Page(HTMLParser):
    """What the test wants to know of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.tables: list[set[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        if tag == "table":
            self.tables.append(set())
        if tag in ("caption", "thead", "th", "tbody"):
            self.tables[-1].add(tag + (f" {known['scope']}" if "scope" in known else ""))
        self.images += [known] if tag == "img" else []
        self.addresses += [str(known[name]) for name in ("src", "href") if known.get(name)]
        self.ids += [str(known["id"])] if "id" in known else []
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def written(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib")
    made_runs.make(study / "<b>not & done</b>", finished=False)
    out = tmp_path_factory.mktemp("report") / "out"
    page.report([str(study)], str(out))
    return out


def test_page_is_whole_and_alone(written: Path) -> None:
    text = (written / page.PAGE).read_text()
    parsed = Page(text)
    assert not parsed.open
    assert all(address.startswith(("data:", "#")) for address in parsed.addresses)
    assert "url(" not in text and "@import" not in text and "<script" not in text
    assert {address[1:] for address in parsed.addresses if address.startswith("#")} <= set(parsed.ids)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert all({"caption", "thead", "tbody", "th col", "th row"} <= parts for parts in parsed.tables)
    assert all(len(str(image["alt"])) > 40 for image in parsed.images)
    titles = " ".join(re.findall(r"<strong>(.*?)</strong>: ", text))
    for wanted in (
        "Accuracy against bytes and against sparsity", "Accuracy by method",
        "Accuracy against sparsity", "Accuracy against bytes", "Accuracy against seconds", "Accuracy by round, sparsity 0.9",
        "Sparsity by layer, sparsity 0.95", "Mask churn", "Penalty", "Pruning error and update norm", "Bytes by kind and phase",
        "Accuracy by client", "Time by phase", "Peak memory",
    ):  # fmt: skip
        assert wanted in titles
    assert "&lt;b&gt;not &amp; done&lt;/b&gt;" in text and "unfinished: 3 of 3 rounds" in text
    assert "feddip_mpi 1.0, torch 2.0, Some MPI v1" in text and "CPU X, 2 cores, CPU, ranks: 1" in text
    assert text.count("feddip-0.95-2 (seed 2)") >= 8  # each figure names its runs


def test_files_beside_the_page(written: Path) -> None:
    pictures = sorted((written / "figures").glob("*.png"))
    assert len(pictures) == len(list((written / "figures").glob("*.pdf"))) >= 16
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in pictures)
    assert {path.name for path in (written / "tables").iterdir()} == {
        "summary.csv", "summary.tex", "summary.md", "runs.csv", "rounds.csv", "layers.csv", "clients.csv", "left-out.csv",
    }  # fmt: skip
    text = (written / "tables" / "summary.tex").read_text()
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1
    assert r"0.7100 (0.7000 to 0.7200) & 0.6600 (0.6500 to 0.6700) & -11.00" in text
    assert {line.count(" & ") for line in text.splitlines() if line.endswith(r"\\")} == {9}  # a cell a column


def test_unlike_hardware_is_told_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(figures, "of_setting", lambda *_: iter(()))
    made_runs.make(tmp_path / "runs" / "a", 1, keys={"sparsity.final": 0.95}, sparsity=0.95, processor="CPU Y")
    made_runs.make(tmp_path / "runs" / "b", 1)
    page.report([str(tmp_path / "runs")], str(tmp_path / "out"))
    text = (tmp_path / "out" / page.PAGE).read_text()
    assert "Different hardware: seconds of different letters are not comparable" in text
    assert "ran on different hardware (A, B)" in text and "ran on different hardware (A, B)" in capsys.readouterr().err
    assert "There is no single dense FedAvg to compare with" in text


def test_an_earlier_report_is_replaced_and_nothing_else(
    written: Path, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(figures, "of_setting", lambda *_: iter(()))  # drawing takes seconds
    old = written / "figures" / "99-old.png"
    old.write_bytes(b"")
    page.report([str(study / "feddip-0.9-1")], str(written))
    assert not old.exists() and "1 run compared" in (written / page.PAGE).read_text()
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"replaced: the report that was in {written}; of its runs these are not in the new one: ")
    assert str(study / "fedavg-1") in said and "feddip-0.9-1" not in said
    page.report([str(study / "feddip-0.9-1")], str(written))
    assert "replaced" not in capsys.readouterr().err
    assert not (written / "tables" / "left-out.csv").exists()
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="holds files that are no report"):
        page.report([str(study)], str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_report_that_was_interrupted_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_runs.make(tmp_path / "runs" / "one")
    out = tmp_path / "out"
    monkeypatch.setattr(page, "_overviews", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    for _ in range(2):  # the second time the folder is allowed, or InputError would say that it holds something else
        with pytest.raises(KeyboardInterrupt):
            page.report([str(tmp_path / "runs")], str(out))
        assert "not complete" in (out / page.PAGE).read_text() and (out / "figures").is_dir()
