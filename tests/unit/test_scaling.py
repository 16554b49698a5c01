"""Scaling studies: the table, the fit, the prediction, what is written, and how runs are started."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from feddip_mpi import config, metrics, run_folder, runtime, scaling, study
from feddip_mpi.errors import FeddipError, InputError, Stopped
from feddip_mpi.report import scaling as report
from feddip_mpi.report import scaling_plots
from feddip_mpi.scaling import Model, Place, Point, Work
from feddip_mpi.study import Settings

PLACE = Place("allgatherv", ranks_per_node=1)
TRUE = Model(
    place=PLACE,
    constants={
        "train": (0.002,), "encode": (0.01,), "decode": (0.003, 0.004), "server": (0.05,), "evaluate": (0.02, 0.3),
        "rest": (0.1, 0.02),
    },
    latency=1e-3,
    bandwidth=1e8,
    exchange_error=0.0,
)  # fmt: skip


def work(ranks: int, participants: int) -> Work:
    return Work(ranks, participants, images=64.0, payload=1e6, download=0.0, reduced=4e6)


def true_point(kind: str, ranks: int, participants: int, model: Model = TRUE) -> Point:
    """What the model's machine would have measured."""
    took = model.seconds(work(ranks, participants))
    total = sum(took.values())
    took = {name: took[name] for name in scaling.PHASES} | {"wait": 0.0, "checkpoint": 0.0}
    return Point(kind, work(ranks, participants), 5, 1, took, total, total, total, 1e6, 2e6, 0.0, 3e8, 0.0)


def points(model: Model = TRUE, counts: tuple[int, ...] = (1, 2, 4, 8)) -> list[Point]:
    return [true_point(kind, p, 8 if kind == "strong" else p, model) for kind in scaling.KINDS for p in counts]


def record(ranks: int, participants: int, seconds: float, **changes: float) -> dict:
    values = {name: 0 for name, field in metrics.FIELDS.items() if field.kind in ("int", "float")}
    return values | {
        "ranks": ranks, "participants": list(range(participants)), "samples": 100 * participants,
        "round_seconds": seconds, "train_seconds": 0.5, "upload_bytes": 10 * participants, "wire_bytes": 40,
        "received_bytes": 60, "dense_bytes": 1000 * participants, "host_memory_bytes": 2000,
    } | changes  # fmt: skip


# The table


def test_a_point_is_the_median_of_the_rounds_that_count() -> None:
    first = [record(2, 4, 99.0), record(2, 4, 1.0), record(2, 4, 3.0, checkpoint_seconds=1.0)]
    second = [record(2, 4, 99.0), record(2, 4, 6.0, residual_bytes=30)]
    p = scaling.point("strong", [first, second], warm_up=1)
    assert p is not None
    assert (p.round, p.fastest, p.slowest, p.rounds, p.repeats) == (2.0, 1.0, 6.0, 3, 2)
    assert (p.work.participants, p.work.images, p.work.payload, p.work.reduced) == (4, 100.0, 10.0, 1000.0)
    assert (p.sent, p.received, p.memory, p.moved) == (20, 30, 1000, 5)
    assert scaling.point("strong", [first[:1]], warm_up=1) is None


def test_speed_up_and_efficiency() -> None:
    made = [
        scaling.point(kind, [[record(p, k, seconds)]], 0)
        for kind, p, k, seconds in (
            ("weak", 4, 4, 2.5),
            ("strong", 4, 4, 3.0),
            ("strong", 2, 4, 4.5),
            ("weak", 1, 1, 2.0),
        )
    ]
    rows = scaling.rows([p for p in made if p])
    assert [(row["kind"], row["ranks"]) for row in rows] == [("strong", 2), ("strong", 4), ("weak", 1), ("weak", 4)]
    assert [row["speed_up"] for row in rows] == pytest.approx([1, 1.5, 1, 4 * 2.0 / 2.5])
    assert [row["efficiency"] for row in rows] == pytest.approx([1, 0.75, 1, 0.8])


# The model


@pytest.mark.parametrize("cores", [None, 2])
def test_the_fit_recovers_a_known_machine(cores: int | None) -> None:
    true = replace(TRUE, place=replace(PLACE, cores=cores))
    model = scaling.fit(points(true), true.place)
    for phase, constants in TRUE.constants.items():
        assert model.constants[phase] == pytest.approx(constants, rel=1e-6), phase
    assert (model.latency, model.bandwidth) == pytest.approx((1e-3, 1e8), rel=1e-6)
    checks = scaling.left_out(points(true), true.place)
    assert len(checks) == 8
    assert scaling.errors(checks)["largest"] < 1e-6


def test_a_sharded_exchange_is_fitted_too() -> None:
    true = replace(TRUE, place=replace(PLACE, mode="sharded"))
    model = scaling.fit(points(true), true.place)
    for p in points(true):
        assert model.round(p.work) == pytest.approx(p.round, rel=1e-6)


def test_the_error_is_that_of_rank_counts_the_fit_has_not_seen() -> None:
    """A machine that is twice as slow on its most ranks: fitted to all it looks better than it predicts."""
    off = [replace(p, round=2 * p.round, seconds={n: 2 * s for n, s in p.seconds.items()}) if p.ranks == 8 else p
           for p in points()]  # fmt: skip
    checks = scaling.left_out(off, PLACE)
    beyond = [row for row in checks if row["beyond"]]
    assert [row["ranks"] for row in beyond] == [8, 8]
    assert [row["error"] for row in beyond] == pytest.approx([-0.5, -0.5], abs=1e-6)
    said = scaling.errors(checks)
    assert said["beyond"] == pytest.approx(0.5) and said["largest"] >= 0.5 > said["root_mean_square"] > 0
    fitted = scaling.fit(off, PLACE)
    assert max(abs(fitted.round(p.work) / p.round - 1) for p in off) < said["largest"]


def test_too_few_rank_counts_have_no_error() -> None:
    few = points(counts=(1, 2))
    assert scaling.left_out(few, PLACE) == []
    assert scaling.errors([]) == {"root_mean_square": None, "largest": None, "beyond": None}


def test_constants_are_never_negative() -> None:
    columns = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert scaling.nonnegative(columns, np.array([3.0, 5.0, 7.0])) == pytest.approx([1, 2])
    falling = scaling.nonnegative(columns, np.array([3.0, 2.0, 1.0]))
    assert falling == pytest.approx([2, 0])
    assert scaling.nonnegative(columns, np.array([-1.0, -1.0, -1.0])) == pytest.approx([0, 0])


def test_participants_bound_the_speed_up() -> None:
    """Ranks above K idle: however many there are, a strong study gains at most K; and training does not get faster."""
    free = replace(TRUE, latency=0.0, bandwidth=float("inf"), constants={
        **{phase: tuple(0.0 for _ in values) for phase, values in TRUE.constants.items()}, "train": (0.002,),
    })  # fmt: skip
    rows = {row["ranks"]: row for row in scaling.predictions(free, points()) if row["kind"] == "strong"}
    assert rows[8]["speed_up"] == pytest.approx(8)
    assert rows[4096]["speed_up"] == pytest.approx(8)
    assert rows[4096]["idle_ranks"] == 4088 and rows[8]["idle_ranks"] == 0
    assert rows[4]["train_seconds"] == pytest.approx(2 * rows[8]["train_seconds"])


def test_predictions_cover_64_to_4096_ranks_of_both_kinds() -> None:
    rows = scaling.predictions(TRUE, points())
    for kind in scaling.KINDS:
        mine = [row for row in rows if row["kind"] == kind]
        assert [row["ranks"] for row in mine] == [2**k for k in range(13)]
        assert mine[0]["speed_up"] == mine[0]["efficiency"] == 1
        assert [row["participants"] for row in mine][-1] == (8 if kind == "strong" else 4096)
    last = rows[-1]
    assert last["link_bytes_per_rank"] == pytest.approx(4095 * 1e6)  # all payloads but its own
    assert last["round_seconds"] == pytest.approx(TRUE.round(work(4096, 4096)))


def test_predictions_give_every_rank_a_core() -> None:
    shared = replace(TRUE, place=replace(PLACE, cores=2))
    assert shared.round(work(8, 8)) > 2 * TRUE.round(work(8, 8))
    assert scaling.predictions(shared, points()) == scaling.predictions(TRUE, points())


# What is written


def result(tmp_path: Path | None = None, **changes) -> dict:
    model = scaling.fit(points(), PLACE)
    checks = scaling.left_out(points(), PLACE)
    made = {
        "settings": {"note": "5 % of $x_1 & ~all", "per_rank": 1},
        "configuration": {"model": "my_net", "data": "synthetic", "clients": 8, "exchange": "allgatherv", "values": "int4"},
        "hardware": {"processor": "some", "cores": 2}, "mpi": "Open MPI", "mode": "allgatherv", "cores": 2,
        "one_node": False, "missing": ["weak-16"], "same_results": True, "rows": scaling.rows(points()),
        "fitted": [{"kind": p.kind, "ranks": p.ranks, "seconds": model.seconds(p.work)} for p in points()],
        "left_out": checks, "errors": scaling.errors(checks), "predictions": scaling.predictions(model, points()),
    }  # fmt: skip
    return made | changes


def test_csv_can_be_read_back() -> None:
    rows = scaling.rows(points())
    read = list(csv.DictReader(io.StringIO(report.csv_text(rows))))
    assert [(row["kind"], int(row["ranks"])) for row in read] == [(row["kind"], row["ranks"]) for row in rows]
    for name in ("round_seconds", "train_seconds", "speed_up", "efficiency", "received_bytes_per_rank"):
        assert [float(row[name]) for row in read] == pytest.approx([row[name] for row in rows], rel=1e-5)


def test_latex_is_escaped_and_plain() -> None:
    assert report.escaped(r"5% a_b & c{d}\e~f^g #1 $x") == (
        r"5\% a\_b \& c\{d\}\textbackslash{}e\textasciitilde{}f\textasciicircum{}g \#1 \$x"
    )
    text = report.latex(result())
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(body) == 1 + 8
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {9}
    assert r"my\_net" in text and r"5 \% of \$x\_1 \& \textasciitilde{}all" in text
    assert set(re.findall(r"\\begin\{(\w+)\}", text)) == {"table", "tabular"} and "rule" not in text
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")


def test_remarks_say_what_must_not_be_overlooked() -> None:
    said = "\n".join(report.remarks(result(rows=scaling.rows([*points(), true_point("strong", 16, 8)]))))
    assert "more ranks than participants" in said and "strong 16" in said
    assert "2 cores that they share (4, 8, 16 ranks)" in said
    assert "weak-16" in said and "bit for bit" in said
    assert "EXTRAPOLATION: measured up to 16 ranks, predicted up to 4096" in said
    assert "error of the model" in said
    unknown = "\n".join(report.remarks(result(errors=scaling.errors([]), same_results=False, one_node=True)))
    assert "UNKNOWN" in unknown and "NOT THE SAME" in unknown and "no network was measured" in unknown


@pytest.mark.parametrize("changes", [{}, {"errors": scaling.errors([]), "cores": None}])
def test_everything_is_saved(tmp_path: Path, changes: dict, capsys: pytest.CaptureFixture[str]) -> None:
    made = result(**changes)
    written = report.save(made, tmp_path)
    assert sorted(path.name for path in written) == [f"scaling.{end}" for end in ("csv", "json", "pdf", "png", "tex")]
    assert (tmp_path / "scaling.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "scaling.pdf").read_bytes()[
        :4
    ] == b"%PDF"
    report.show(made)
    shown = capsys.readouterr().out
    assert "Strong scaling" in shown and "PREDICTED" in shown and "4096" in shown


def test_the_picture_shows_what_was_measured() -> None:
    figure = scaling_plots.draw_scaling(result())
    speed_up, efficiency, phases, prediction = figure.axes
    rows = scaling.rows(points())
    strong = [row for row in rows if row["kind"] == "strong"]
    lines = {line.get_label(): line.get_ydata() for line in speed_up.lines}
    assert lines["strong"] == pytest.approx([row["speed_up"] for row in strong])
    assert efficiency.lines[0].get_ydata() == pytest.approx([100 * row["efficiency"] for row in strong])
    heights = np.array([[bar.get_height() for bar in container] for container in phases.containers])
    assert heights.sum(axis=0) == pytest.approx([row["round_seconds"] for row in rows])
    measured = {line.get_label(): line.get_ydata() for line in prediction.lines}["weak, measured"]
    assert measured == pytest.approx([row["round_seconds"] for row in rows if row["kind"] == "weak"])


# Running


def test_rank_counts() -> None:
    assert study.rank_counts("4, 1,2,2") == (1, 2, 4)
    for wrong in ("", "1,", "0", "-1", "a", "1 2", "4097", "1.5"):
        with pytest.raises(InputError, match="--ranks"):
            study.rank_counts(wrong)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text("clients: 8\nparticipants: 2\ndata: {name: synthetic}\n")
    return path


def test_a_study_that_cannot_be_is_refused(tiny: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "study")
    for changes, text in (
        ({"ranks": (1, 16)}, "--set clients=16"),
        ({"warm_up": 12}, "--warm-up 12"),
        ({"launcher": "mpirun -n 2"}, "{ranks}"),
        ({"launcher": "mpirun -n {ranks} 'x"}, "No closing quotation"),
    ):
        with pytest.raises(InputError, match=re.escape(text)):
            study.prepare(str(tiny), [], Settings(**changes), out)
    assert not (tmp_path / "study").exists()
    with pytest.raises(InputError, match="is no study"):
        study.prepare(str(tiny), [], Settings(), str(tmp_path))


def test_a_study_grows_and_keeps_its_configuration(tiny: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "study")
    study.prepare(str(tiny), ["data.path=arrays"], Settings(ranks=(1,), kinds=("weak",)), out)
    folder = study.prepare(str(tiny), ["data.path=arrays"], Settings(ranks=(4,), kinds=("strong",), repeats=2), out)
    joined = study.load(folder)
    assert (joined.ranks, joined.kinds, joined.repeats) == ((1, 4), ("strong", "weak"), 2)
    assert [cell.name for cell in joined.cells()][:3] == ["strong-1", "strong-1.2", "strong-4"]
    assert config.load(folder / "config.yaml").data.path == str(Path("arrays").absolute())
    with pytest.raises(InputError, match="another configuration"):
        study.prepare(str(tiny), ["data.path=arrays", "seed=2"], Settings(), out)
    with pytest.raises(InputError, match="another configuration"):
        study.prepare(str(tiny), ["data.path=arrays"], Settings(rounds=20), out)
    (folder / "study.json").write_text('{"ranks": 3}')
    with pytest.raises(InputError, match="study.json"):
        study.load(folder)


def test_commands_that_extend_a_study_together_lose_no_cells(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    study.prepare(str(tiny), [], Settings(ranks=(1,)), str(out))
    other = threading.Thread(target=study.prepare, args=(str(tiny), [], Settings(ranks=(2,)), str(out)))
    with run_folder.alone(out / study._LOCK):  # as a command that has read what is there, and writes it a moment later
        before = study.load(out)
        other.start()
        other.join(0.3)
        (out / "study.json").write_text(json.dumps({**asdict(before), "ranks": [1, 4]}))
    other.join(60)
    assert study.load(out).ranks == (1, 2, 4)


def test_a_failed_run_does_not_stop_the_rest(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The launcher fails on 2 ranks and marks the others as finished: they are not started again."""
    launcher = tmp_path / "launcher.sh"
    launcher.write_text(
        '#!/bin/sh\necho "started on $1: $*" >>"$0.log"\n[ "$1" = 2 ] && { echo "error: no such node"; exit 3; }\n'
        'while [ "$1" != --out ]; do shift; done; mkdir -p "$2"; touch "$2/finished.json"\n'
    )
    settings = Settings(ranks=(1, 2, 4), launcher=f"sh {shlex.quote(str(launcher))} {{ranks}}")
    folder = study.prepare(str(tiny), [], settings, str(tmp_path / "study"))
    for _ in range(2):
        with pytest.raises(FeddipError, match=r"2 run\(s\) of the study failed \(strong-2, weak-2\)"):
            study.run(folder, settings)
    assert "strong-2: failed" in (said := capsys.readouterr().err) and "error: no such node" in said
    started = (tmp_path / "launcher.sh.log").read_text().splitlines()
    assert [line.split()[2] for line in started] == ["1:", "2:", "4:", "1:", "2:", "4:", "2:", "2:"]
    assert "participants=2" in started[2] and "participants=4" in started[5]  # strong keeps K, weak has one a rank


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_launcher_as_usr1_and_ends_the_study(
    number: signal.Signals, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher sends the signal itself, as soon as it is waited for."""
    passing_on, ready, launcher = study._passing_on, tmp_path / "ready", tmp_path / "launcher.sh"
    launcher.write_text(
        "trap 'echo heard USR1; exit 75' USR1\ntrap 'echo heard TERM; exit 1' TERM\n"
        f"until [ -e {shlex.quote(str(ready))} ]; do sleep 0.01; done\nkill -{int(number)} $PPID\n"
        "for i in $(seq 300); do sleep 0.01; done\n"
    )

    @contextmanager
    def announced(process: subprocess.Popen[bytes]) -> Iterator[list[str]]:
        with passing_on(process) as stopped:
            ready.touch()
            yield stopped

    def ignored(*_: object) -> None:
        pass

    monkeypatch.setattr(study, "_passing_on", announced)
    settings = Settings(ranks=(1, 2), kinds=("strong",), launcher=f"sh {shlex.quote(str(launcher))} {{ranks}}")
    folder = study.prepare(str(tiny), [], settings, str(tmp_path / "study"))
    before = signal.signal(number, ignored)
    try:
        with pytest.raises(Stopped, match=f"study stopped by {number.name}; the same command goes on"):
            study.run(folder, settings)
        assert signal.getsignal(number) is ignored
    finally:
        signal.signal(number, before)
    assert (folder / "strong-1.log").read_text() == "heard USR1\n" and not (folder / "strong-2.log").exists()


def test_strong_runs_differ_where_a_number_of_theirs_does() -> None:
    one, other = [record(1, 4, 2.0, train_loss=0.5)], [record(2, 4, 1.0, train_loss=0.5)]
    changed = [{**other[0], "train_loss": 0.5000001}]
    assert study._same_results({"strong-1": one, "strong-2": other, "weak-2": changed}) is True
    assert study._same_results({"strong-1": one, "strong-2": changed}) is False
    assert study._same_results({"strong-1": one, "weak-1": one}) is None


def test_the_script_sets_what_the_batch_script_reads(tiny: Path, tmp_path: Path) -> None:
    settings = Settings(ranks=(1, 2), kinds=("weak",), per_rank=2, rounds=5, ranks_per_node=3, scripts=True)
    folder = study.prepare(str(tiny), [], settings, str(tmp_path / "a study"))
    path = study.write_script(folder, settings, config.load(folder / "config.yaml"))
    subprocess.run(["bash", "-n", str(path)], check=True)
    exported = dict(re.findall(r"^export (\w+)=(.*)$", path.read_text(), re.MULTILINE))
    batch = (Path(study.__file__).parents[1] / "jobs" / "slurm-scaling.sh").read_text()
    read = set(re.findall(r"^(\w+)=\$\{\1:-", batch, re.MULTILINE))
    assert set(exported) <= read  # a setting that the script does not know would be lost silently
    assert shlex.split(exported["STUDY"]) == [str(folder)] and exported["WEAK_PARTICIPANTS"] == "2"
    assert (exported["RANK_COUNTS"], exported["KINDS"], exported["RANKS_PER_NODE"]) == ("'1 2'", "weak", "3")


def test_runs_without_a_study_file_are_found_by_name(tmp_path: Path) -> None:
    for name in ("strong-1", "strong-8", "weak-8.2", "strong-4.old", "other"):
        (tmp_path / name).mkdir()
    found = study.load(tmp_path, Settings(warm_up=3))
    assert (found.ranks, found.kinds, found.repeats, found.warm_up) == ((1, 8), ("strong", "weak"), 2, 3)
    with pytest.raises(InputError, match="no run"):
        study.collect(tmp_path, Settings())
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no study"):
        study.load(tmp_path / "empty")


def test_the_default_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.shutil, "which", lambda name: f"/opt/{name}")
    assert runtime.default_launcher(False, {"SLURM_JOB_ID": "1"}) == "srun --mpi=pmix --ntasks={ranks}"
    monkeypatch.setattr(runtime.sys, "executable", "/nowhere/python")
    for version, crowded, options in (
        ("mpirun (Open MPI) 5.0.11", True, " --oversubscribe --bind-to none --mca mpi_yield_when_idle 1"),
        ("mpirun (Open MPI) 5.0.11", False, " --oversubscribe --bind-to none"),
        ("HYDRA build details", True, ""),
    ):
        done = subprocess.CompletedProcess([], 0, stdout=version)
        monkeypatch.setattr(runtime.subprocess, "run", lambda *_, done=done, **__: done)
        assert runtime.default_launcher(crowded, {}) == "/opt/mpirun -n {ranks}" + options
    monkeypatch.setattr(runtime.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="--launcher"):
        runtime.default_launcher(False, {})


def test_settings_survive_their_file(tiny: Path, tmp_path: Path) -> None:
    settings = Settings(ranks=(2, 8), cores=4, note="a note", launcher="go {ranks}")
    folder = study.prepare(str(tiny), [], settings, str(tmp_path / "study"))
    assert study.load(folder) == settings
    assert json.loads((folder / "study.json").read_text())["ranks"] == [2, 8]
