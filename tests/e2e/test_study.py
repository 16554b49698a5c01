"""From a grid to a page: a real sweep of four tiny cells, its report in a browser, a run that is watched."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chromium
import pytest
from tiny import ROOT, Command, records

GRID = """
base: {rounds: 3, clients: 4, participants: 2, local_epochs: 1, batch_size: 20, mask: {every: 1}, device: cpu,
       data: {name: synthetic, partition: dirichlet, synthetic: {train_samples: 160, test_samples: 90}}, eval: {clients: true}}
grid:
  method:
    fedavg: {method: fedavg, upload.values: fp32, sparsity: {initial: 0, final: 0}}
    feddip: {method: feddip}
  sparsity.final: [0.9]
  seed: [1, 2]
"""
CELLS = ["fedavg_seed-1", "fedavg_seed-2", "feddip_sparsity-0.9_seed-1", "feddip_sparsity-0.9_seed-2"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, feddip: Command) -> Path:
    """The folder of a finished sweep; one cell had failed at first."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "grid.yaml").write_text(GRID)
    words = ("sweep", str(folder / "grid.yaml"), "--out", str(folder / "runs"))
    dry = feddip(*words, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "4 cells" in dry.stdout and all(name in dry.stdout for name in CELLS) and "time left: about" in dry.stdout
    assert "a trial of one round with one client and one epoch" in dry.stdout and not (folder / "runs").exists()
    # A cell that cannot be saved: a file lies where its folder has to be made.
    (folder / "runs").mkdir()
    (folder / "runs" / CELLS[1]).write_text("in the way")
    first = feddip(*words, "--jobs", "2", "--no-trial")
    assert first.returncode == 2 and "no config.yaml" in first.stderr and not (folder / "runs" / CELLS[0]).exists()
    (folder / "runs" / CELLS[1]).unlink()
    done = feddip(*words, "--jobs", "2", "--no-trial")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in CELLS:
        reached = json.loads((folder / "runs" / name / "finished.json").read_text())
        assert re.search(rf"{name}: finished after \d+ s, accuracy {reached['test_accuracy']:.4f} at", done.stdout)
    return folder


def test_cells_are_ordinary_run_folders_and_done_once(swept: Path, feddip: Command) -> None:
    for name in CELLS:
        assert json.loads((swept / "runs" / name / "finished.json").read_text())["rounds"] == 3
    again = feddip("sweep", str(swept / "grid.yaml"), "--out", str(swept / "runs"))
    assert again.returncode == 0 and "all 4 cells are finished" in again.stdout
    changed = swept / "changed.yaml"
    changed.write_text(GRID.replace("batch_size: 20", "batch_size: 10"))
    refused = feddip("sweep", str(changed), "--out", str(swept / "runs"))
    assert refused.returncode == 2 and "batch_size is 20 there, 10 in the grid" in refused.stderr


def test_a_failed_cell_is_listed_and_the_rest_is_done(swept: Path, feddip: Command, tmp_path: Path) -> None:
    only = GRID.replace("    feddip: {method: feddip}\n", "").replace("[1, 2]", "[1]")
    (tmp_path / "grid.yaml").write_text(only + "  learning_rate: [1000, 0.1]\n")
    done = feddip("sweep", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "runs"), "--no-trial")
    finished = [path.parent.name for path in (tmp_path / "runs").glob("*/finished.json")]
    assert done.returncode == 1, done.stdout + done.stderr
    assert finished == ["fedavg_seed-1_learning-rate-0.1"]
    assert "exit code 4" in done.stdout and "1 of 2 cells are not finished" in done.stderr


def at_work(folder: Path) -> list[int]:
    """The processes whose command line names a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if os.fsencode(folder) in entry.read_bytes():
                found.append(int(entry.parent.name))
    return found


def test_a_signal_ends_a_sweep_when_its_cells_have_saved(tmp_path: Path) -> None:
    endless = GRID.replace("rounds: 3", "rounds: 100000").replace("    feddip: {method: feddip}\n", "")
    (tmp_path / "grid.yaml").write_text(endless)
    runs = [tmp_path / "runs" / name for name in CELLS[:2]]
    words = ("sweep", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "runs"), "--jobs", "2", "--no-trial")
    process = subprocess.Popen(
        [sys.executable, "-m", "feddip_mpi", *words], env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while not all((run / "metrics.jsonl").exists() and records(run) for run in runs):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 75 and at_work(tmp_path) == [], said
    finally:
        for left in at_work(tmp_path):
            os.kill(left, signal.SIGKILL)
        process.wait()
    for run in runs:
        newest = max((run / "checkpoints").glob("round-*.h5"))
        assert newest.name == f"round-{len(records(run)):06d}.h5" and f"{run.name}: stopped after" in said


def test_slurm_script_of_what_is_left(swept: Path, feddip: Command, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(swept / "runs" / CELLS[0], runs / CELLS[0])
    done = feddip("sweep", str(swept / "grid.yaml"), "--out", str(runs), "--slurm")
    assert done.returncode == 0, done.stderr
    text = (runs / "_sweep" / "array.sh").read_text()
    assert "--array=0-2\n" in text and CELLS[0] not in text and all(name in text for name in CELLS[1:])
    assert not (runs / CELLS[1]).exists()


def test_watch_once(swept: Path, feddip: Command) -> None:
    done = feddip("watch", str(swept / "runs" / CELLS[2]), "--once")
    assert done.returncode == 0 and "3 of 3" in done.stdout and "finished" in done.stdout


def test_the_page_in_a_browser(swept: Path, feddip: Command, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    browser = chromium.program()
    if browser is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    foreign = tmp_path / ("a_name_without_a_break_" * 5)  # longer than a telephone is wide
    foreign.mkdir()
    done = feddip("report", str(swept / "runs"), str(foreign), "--out", str(tmp_path / "report"), pictures=True)
    assert done.returncode == 0, done.stderr
    with chromium.Chromium(browser, tmp_path / "profile") as page:
        for width in (1280, 400):
            page.open(tmp_path / "report" / "report.html", width)
            assert page.complaints() == []
            assert page.value("document.documentElement.scrollWidth <= window.innerWidth"), width
            images = page.value("[...document.images].map(i => [i.complete && i.naturalWidth, i.width, i.alt.length])")
            assert len(images) >= 13
            assert all(natural > 600 and words > 40 for natural, _, words in images)
            wide = page.value("[...document.querySelectorAll('.wide img')].map(i => i.width)")
            # The overview is for paper and desks: a telephone scrolls it sideways and has its parts in figures of their own.
            assert len(wide) == 1 and (700 < wide[0] <= width if width > 640 else wide[0] == 720)
            assert all(300 < shown <= width for _, shown, _ in images if shown not in wide)
            # Nothing is cut off: what is wider than its box would have to be scrolled to.
            boxes = "[...document.querySelectorAll('.scroll:not(.wide), figure, figcaption')]"
            assert page.value(f"{boxes}.filter(e => e.scrollWidth > e.clientWidth + 1).length") == 0
            assert page.value("Math.min(...[...document.querySelectorAll('td, th, figcaption')].map(e => "
                              "parseFloat(getComputedStyle(e).fontSize)))") >= 12  # fmt: skip
            # Numbers do not press a method's name until its letters stand in two lines.
            page.value("window.cell = document.querySelector('th[data-name=method]'); cell.textContent = 'PruneTrain'")
            page.value("window.range = document.createRange(); range.selectNodeContents(cell)")
            assert page.value("range.getClientRects().length") == 1
            page.picture(tmp_path / f"{width}.png")
            assert (tmp_path / f"{width}.png").stat().st_size > 50_000


def test_the_browser_test_can_fail(tmp_path: Path) -> None:
    """An error in the console, a wide element and an address outside are seen."""
    browser = chromium.program()
    if browser is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    bad = "<div style='width: 900px'>wide</div><script>console.error('no'); missing()</script><img src='http://127.0.0.1:9/x'>"
    (tmp_path / "bad.html").write_text(f"<!DOCTYPE html><meta name=viewport content='width=device-width'>{bad}")
    with chromium.Chromium(browser, tmp_path / "profile") as page:
        page.open(tmp_path / "bad.html", 400)
        said = " ".join(page.complaints())
        assert "missing is not defined" in said and "asked for http://127.0.0.1:9/x" in said and "'no'" in said
        assert page.value("document.documentElement.scrollWidth") > 400
