"""The commands around a run, as a user types them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import runs
from click.testing import CliRunner, Result
from tiny import DEVICE, ROOT, Command, records, settings

from feddip_mpi import checkpoint, config, federation, metrics, summary
from feddip_mpi.cli import cli
from feddip_mpi.errors import DamagedFileError, InputError

COMMANDS = (
    "bench", "data", "doctor", "evaluate", "export", "inspect", "plan", "report", "resume", "study", "sweep", "train",
    "verify", "watch",
)  # fmt: skip


def invoke(*words: str) -> Result:
    """A command that needs no MPI, in this process, 80 columns wide."""
    return CliRunner(env={"COLUMNS": "80", "FEDDIP_PROGRESS": "plain"}).invoke(cli, words)


def flip_a_byte(path: Path) -> None:
    """Change a weight: the middle of the largest array of the file."""
    import h5py

    with h5py.File(path) as file:
        dataset = file["model/parameters/fc1.weight"]
        place = dataset.id.get_offset() + dataset.nbytes // 2
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def test_help_needs_neither_mpi_nor_torch() -> None:
    blocked = "import sys; [sys.modules.__setitem__(name, None) for name in ('torch', 'mpi4py', 'h5py', 'rich')]\n"
    code = blocked + "sys.path.insert(0, sys.argv.pop(1)); from feddip_mpi.cli import main; main()"
    for words in ([], *([name] for name in COMMANDS)):
        done = subprocess.run(
            [sys.executable, "-c", code, str(ROOT), *words, "--help"], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("Usage:")
    listed = invoke("--help").output.split("Commands:")[1]
    assert all(f"\n  {name} " in listed for name in COMMANDS)
    assert "..." not in listed  # nothing cut off at 80 columns


EMPTIED = ((0.9999, "global"), (0.8, "global"), (0.9999, "lamp"))
PLANNED = (
    ("rounds=6", "mask.freeze_after=0.7", "sparsity.schedule=linear"),
    ("upload.values=int8", "mask.initial=none", "upload.regrow_rounds=all", "upload.regrow=3"),
    ("upload.values=int4", "mask.initial=magnitude", "upload.rounding=stochastic", "server_memory=off"),
    ("upload.mode=dense_at_mask_updates", "server_memory=published", "upload.values=bf16"),
    ("method=fedavg",),
    ("method=prunefl", "upload.values=bf16"),
    ("method=feddst", "upload.values=fp32"),
)


@pytest.fixture(scope="module")
def finished(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, Path]:
    """Finished runs by what they are there for; made in one process."""
    folder = tmp_path_factory.mktemp("runs")
    changes = {case: [f"sparsity.final={case[0]}", f"mask.allocation={case[1]}"] for case in EMPTIED}
    changes |= {case: [*case, "checkpoint.every=100"] for case in PLANNED}
    places = {case: folder / str(n) for n, case in enumerate(changes)}
    argvs = (["train", str(tiny_config), *settings(*changes[case]), "--out", str(places[case])] for case in changes)
    for case, reports in zip(changes, runs.play([{"argv": argv} for argv in argvs], folder, None), strict=True):
        assert [r["code"] for r in reports] == [0], (case, reports)
    return places


@pytest.mark.parametrize("case", EMPTIED, ids=str)
def test_a_layer_of_which_nothing_is_left_is_said_once(case: tuple[float, str], finished: dict[tuple, Path]) -> None:
    shares = records(finished[case])[-1]["sparsity_by_layer"]
    emptied = [name for name, share in shares.items() if share == 1.0]
    assert bool(emptied) == (case == (0.9999, "global"))
    log = (finished[case] / "run.log").read_text()
    assert {name: log.count(f"no weight of {name} is left") for name in shares} == {
        name: int(name in emptied) for name in shares
    }


def test_the_summary_has_the_names_that_are_documented(trained: Path) -> None:
    written = json.loads((trained / "finished.json").read_text())
    assert list(written) == list(summary.FIELDS)
    assert written["rounds"] == 4 and written["peak_host_memory_bytes"] > 2**20
    last = metrics.last_accuracies(records(trained))  # of four rounds, two with the last mask
    assert len(last) == written["evaluations_in_mean"] == 2
    assert written["test_accuracy_mean_of_last_5"] == sum(last) / 2


# inspect


def test_inspect_says_what_the_run_recorded(trained: Path) -> None:
    done = invoke("inspect", str(trained), "--json")
    facts, last = json.loads(done.output), records(trained)[-1]
    assert (facts["round"], facts["rounds"]) == (4, 4)
    assert facts["test_accuracy"] == last["test_accuracy"]
    assert facts["sparsity"] == last["sparsity"]
    assert {layer["name"]: layer["sparsity"] for layer in facts["layers"]} == last["sparsity_by_layer"]
    assert sum(layer["kept"] for layer in facts["layers"]) == facts["kept"]
    assert facts["file_bytes"] == Path(facts["checkpoint"]).stat().st_size
    assert facts["uploaded_bytes"] == sum(record["upload_bytes"] for record in records(trained))
    took_part = {client for record in records(trained) for client in record["participants"]}
    assert set(facts["residual_clients"]) <= took_part and facts["residual_bytes"] > 0
    assert facts["pruned_bytes"] < facts["dense_bytes"] / 4
    assert facts["versions"]["torch"] and facts["saved"] and facts["created"]


def test_inspect_shows_tables_in_80_columns(trained: Path) -> None:
    done = invoke("inspect", str(trained / "checkpoints" / "round-000002.h5"))
    assert done.exit_code == 0
    assert "2 of 4" in done.output and "fc1.weight" in done.output
    assert max(map(len, done.output.splitlines()[1:])) <= 80


def test_inspect_prints_the_configuration(trained: Path) -> None:
    text = invoke("inspect", str(trained), "--config").output
    assert config.parse(text) == config.load(trained / "config.yaml")


# verify


def test_verify_whole_files(trained: Path) -> None:
    done = invoke("verify", str(trained), str(trained / "checkpoints" / "round-000002.h5"))
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.output.splitlines()] == ["OK"] * 3


def test_verify_looks_at_every_file_before_it_fails(copy: Path) -> None:
    flip_a_byte(copy / "checkpoints" / "round-000002.h5")
    done = invoke("verify", str(copy))
    assert [line.split()[0] for line in done.output.splitlines()] == ["DAMAGED", "OK"]
    assert isinstance(done.exception, DamagedFileError)


def test_exit_codes_of_verify(copy: Path, tmp_path: Path, feddip: Command) -> None:
    flip_a_byte(copy / "checkpoints" / "round-000004.h5")
    done = feddip("verify", str(copy))
    assert done.returncode == 3
    assert "1 of 2 files damaged" in done.stderr
    (tmp_path / "empty").mkdir()
    assert isinstance(invoke("verify", str(tmp_path / "empty")).exception, InputError)
    assert isinstance(invoke("verify", str(tmp_path / "nothing.h5")).exception, InputError)


# export


def test_export_of_a_run_takes_the_newest_good_checkpoint(copy: Path, tmp_path: Path) -> None:
    flip_a_byte(copy / "checkpoints" / "round-000004.h5")
    file = tmp_path / "model.sparse.safetensors"
    done = invoke("export", str(copy), str(file))
    assert done.exit_code == 0
    assert "refused a checkpoint" in done.output and "round-000004.h5" in done.output
    from safetensors import safe_open

    with safe_open(file, "np") as opened:
        assert opened.metadata()["round"] == "2"
        assert json.loads(opened.metadata()["class_names"])[0] == "pattern 0"
    again = invoke("export", str(copy), str(file))
    assert isinstance(again.exception, InputError) and "--force" in str(again.exception)
    assert invoke("export", str(copy), str(file), "--force").exit_code == 0


# evaluate


def test_evaluate_gives_the_recorded_accuracy(trained: Path, feddip: Command) -> None:
    done = feddip("evaluate", str(trained), "--json", "--set", "eval.clients=true")
    assert done.returncode == 0, done.stderr
    result, last = json.loads(done.stdout), records(trained)[-1]
    for name in ("test_accuracy", "test_accuracy_top5", "test_loss"):
        assert result[name] == last[name]
    assert result["recorded_accuracy"] == last["test_accuracy"]
    total = sum(a * n for a, n in zip(result["client_accuracy"], result["client_images"], strict=True))
    assert total == pytest.approx(90 * result["test_accuracy"])


@pytest.mark.mpi
def test_evaluate_shares_the_images_among_ranks(trained: Path, feddip: Command) -> None:
    done = feddip("evaluate", str(trained / "checkpoints" / "round-000002.h5"), "--json", ranks=2)
    assert done.returncode == 0, done.stderr
    result, recorded = json.loads(done.stdout), records(trained)[1]
    assert result["ranks"] == 2
    for name in ("test_accuracy", "test_accuracy_top5", "test_loss"):
        assert result[name] == recorded[name]


def test_evaluate_refuses_to_change_the_model(trained: Path, feddip: Command) -> None:
    done = feddip("evaluate", str(trained), "--set", "seed=2")
    assert done.returncode == 2
    assert "'seed' cannot change in an evaluation" in done.stderr


def test_evaluate_refuses_other_data(trained: Path, tmp_path: Path, feddip: Command) -> None:
    loaded, _ = checkpoint.find(trained)
    _, layout = federation.build_model(loaded.config, loaded.input_shape, loaded.classes)
    other = checkpoint.Snapshot(
        loaded.config, layout, loaded.server, loaded.history, "other data", loaded.histogram, loaded.input_shape,
        loaded.classes, loaded.created,
    )  # fmt: skip
    checkpoint.save(tmp_path / "other.h5", other, [])
    done = feddip("evaluate", str(tmp_path / "other.h5"))
    assert done.returncode == 2
    assert "trained on 'other data'" in done.stderr and "data.path" in done.stderr


def test_a_run_is_evaluated_and_resumed_from_any_folder(
    tiny_config: Path, tmp_path: Path, feddip: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its data had been named from the folder where it was started."""
    import numpy as np

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    pixels, labels = np.arange(40 * 144, dtype=np.uint8).reshape(40, 12, 12), np.arange(40) % 4
    np.savez("mine.npz", train_images=pixels, train_labels=labels, test_images=pixels[:8], test_labels=labels[:8])
    words = settings("data.name=npz", "data.path=mine.npz", "model.name=lenet5", "rounds=1")
    done = feddip("train", str(tiny_config), *words, "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir("/")
    for command in (["evaluate", str(tmp_path / "run")], ["resume", str(tmp_path / "run"), "--set", "rounds=2"]):
        done = feddip(*command)
        assert done.returncode == 0, done.stderr


# plan


@pytest.mark.parametrize("changes", PLANNED, ids=" ".join)
def test_a_run_does_what_the_plan_says(
    changes: tuple[str, ...], tiny_config: Path, finished: dict[tuple, Path]
) -> None:
    planned = json.loads(invoke("plan", str(tiny_config), *settings(*changes), "--json").stdout)
    real = records(finished[changes])
    same = ("round", "sparsity", "penalty", "learning_rate", "dense_bytes")
    assert [{name: row[name] for name in same} for row in planned] == [
        {name: record[name] for name in same} for record in real
    ]
    for row, record in zip(planned, real, strict=True):
        # How long the indices are depends on where they lie: the plan has the length for random places.
        allowed = 0.2 * record["upload_indices_bytes"] + 8 * len(record["participants"]) if row["regrow"] else 0
        assert abs(row["upload_bytes"] - record["upload_bytes"]) <= allowed
    assert [row["mask_update"] for row in planned] == [bool(record["mask_updated"]) for record in real]


def test_plan_fits_a_terminal_and_draws(tiny_config: Path, tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    done = invoke("plan", str(tiny_config), "--set", "rounds=1000", "--plot", str(picture))
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert len(lines) <= 30 and max(len(line) for line in lines if str(picture) not in line) <= 80
    assert any("1000" in line for line in lines[-8:-5]) and "times as much" in lines[-2]
    assert picture.stat().st_size > 5000
    assert len(invoke("plan", str(tiny_config), "--every", "10").output.splitlines()) <= 22


def test_wrong_configurations_are_refused(tiny_config: Path, feddip: Command) -> None:
    done = feddip("plan", str(tiny_config), "--set", "sparsity.finale=0.9")
    assert done.returncode == 2
    assert "did you mean 'sparsity.final'" in done.stderr


# data


def test_data_shows_what_is_found_and_the_partition(tiny_config: Path, tmp_path: Path) -> None:
    alone = invoke("data", "--set", f"data.path={tmp_path}").output
    assert alone.count("not found") == 4 and str(tmp_path) in alone
    picture = tmp_path / "partition.svg"
    changes = settings("clients=40", "participants=2", "data.partition=dirichlet", "data.min_samples=1")
    done = invoke("data", str(tiny_config), *changes, "--plot", str(picture))
    assert done.exit_code == 0, done.output
    assert "160 for training, 90 for testing" in done.output
    assert "one in 2 of 40" in done.output
    table = done.output.split("Training images by client")[1].split("drawn:")[0]
    assert max(map(len, table.splitlines())) <= 80
    assert picture.stat().st_size > 5000
    many = invoke("data", str(tiny_config), *settings("data.synthetic.classes=40")).output
    assert "images of the largest class" in many


def test_data_without_a_partition_cannot_draw_it() -> None:
    assert isinstance(invoke("data", "--plot", "x.png").exception, InputError)


# doctor


def test_doctor_alone(trained: Path, feddip: Command) -> None:
    done = feddip("doctor", str(trained), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (row,) = found["ranks"]
    assert (row["rank"], row["ranks"], row["omp_num_threads"]) == (0, 1, "1")
    assert (row["device"] == "cpu") == (DEVICE == "cpu")
    assert row["memory_available_bytes"] > 0 and row["cores"]
    assert found["folder"]["path"] == str(trained) and found["folder"]["writable"]
    assert {verdict["level"] for verdict in found["verdicts"]} <= {"PASS", "WARN"}
    assert row["lock"] == "works" and found["needs"]["disk_bytes"] > found["needs"]["one_checkpoint_bytes"] > 0


@pytest.mark.mpi
def test_doctor_gathers_all_ranks(tiny_config: Path, feddip: Command) -> None:
    done = feddip("doctor", str(tiny_config), "--json", ranks=2)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = found["ranks"]
    assert [row["rank"] for row in rows] == [0, 1]
    assert rows[0]["mask"]["digest"] == rows[1]["mask"]["digest"]
    assert {v["check"]: v["level"] for v in found["verdicts"]}["clocks"] == "PASS"  # it is the same clock
    assert abs(rows[1]["clock"]["offset_seconds"]) <= rows[1]["clock"]["bound_seconds"]
    assert len({row["pid"] for row in rows}) == 2


def test_doctor_shows_a_table(feddip: Command) -> None:
    done = feddip("doctor")
    assert done.returncode == 0, done.stderr
    assert "MPI library" in done.stdout and "local rank told by" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_doctor_finds_ranks_that_believe_they_are_alone(feddip: Command) -> None:
    done = feddip("doctor", PMI_SIZE="4")
    assert done.returncode == 2
    assert "FAIL  launch   4 ranks were started (PMI_SIZE)" in done.stdout
    assert "1 thing to repair" in done.stderr


# study


@pytest.mark.mpi
def test_study_runs_collects_and_goes_on(tiny_config: Path, tmp_path: Path, feddip: Command) -> None:
    if not Path(sys.executable).with_name("mpirun").exists():
        pytest.skip("no mpirun beside this Python")
    out = tmp_path / "study"
    length = ("--rounds", "3", "--warm-up", "1")
    words = ["study", str(tiny_config), *settings(), "--kind", "strong", *length, "--out", str(out)]
    done = feddip(*words, "--ranks", "1,2", pictures=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Strong scaling" in done.stdout and "EXTRAPOLATION" in done.stdout
    assert len(records(out / "strong-1")) == len(records(out / "strong-2")) == 3
    found = json.loads((out / "scaling.json").read_text())
    assert [(row["ranks"], row["rounds"]) for row in found["rows"]] == [(1, 2), (2, 2)]
    assert found["same_results"] is True and found["missing"] == []
    second = records(out / "strong-2")[1:]
    assert found["rows"][1]["received_bytes_per_rank"] == sum(r["received_bytes"] for r in second) / 2 / 2
    assert {path.suffix for path in out.glob("scaling.*")} == {".csv", ".json", ".pdf", ".png", ".tex"}
    again = feddip(*words, "--ranks", "1,2")
    assert again.stderr.count("finished already") == 2
    collected = feddip("study", str(out), "--collect", "--json")
    assert json.loads(collected.stdout)["rows"] == found["rows"]
    refused = feddip("study", str(tiny_config), ranks=2)
    assert refused.returncode == 2 and "leave out the launcher" in refused.stderr


# a finished run goes on


def test_a_finished_run_is_extended(copy: Path, feddip: Command) -> None:
    """The row of the round that was saved last has its seconds, which the summary adds up."""
    once = feddip("resume", str(copy))
    assert once.returncode == 0 and "is finished after 4 rounds" in once.stdout, once.stderr
    # What a run has run on is told by where it has trained: reports read that.
    assert (copy / "run.log").read_text().count("trains on ") == 1
    done = feddip("resume", str(copy), "--set", "rounds=5")
    assert done.returncode == 0, done.stderr
    assert [record["round"] for record in records(copy)] == [1, 2, 3, 4, 5]
    assert all(record["round_seconds"] > 0 for record in records(copy))
    assert (copy / "run.log").read_text().count("trains on ") == 2


def test_a_reader_that_goes_away_ends_nothing(tiny_config: Path, tmp_path: Path) -> None:
    """`feddip-mpi ... | head -1`: the run is finished all the same, and a command that shows something ends with 0."""
    run = tmp_path / "run"
    for argv in (
        ["train", str(tiny_config), *settings(), "--out", str(run)], ["inspect", str(run)], ["evaluate", str(run)],
        ["plan", str(tiny_config)],
    ):  # fmt: skip
        reading, writing = os.pipe()
        os.close(reading)  # every write fails from the first one on
        try:
            done = subprocess.run(
                [sys.executable, "-m", "feddip_mpi", *argv], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, check=False,
            )  # fmt: skip
        finally:
            os.close(writing)
        assert done.returncode == 0, (argv, done.stderr)
        assert "Traceback" not in done.stderr and "MPI_ABORT" not in done.stderr
    assert (run / "finished.json").exists()


@pytest.mark.parametrize("stdout", ["full", "ascii"])
def test_neither_a_full_disk_nor_a_picture_ends_a_run(stdout: str, tiny_config: Path, tmp_path: Path) -> None:
    """stdout cannot take what is said, and matplotlib breaks: the run is finished all the same."""
    run, broken = tmp_path / "café", tmp_path / "broken"
    broken.mkdir()
    (broken / "matplotlib.py").write_text("raise RuntimeError('no fonts')")
    environment = {**os.environ, "PYTHONPATH": f"{broken}:{ROOT}", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    with open("/dev/full" if stdout == "full" else tmp_path / "said", "w") as file:
        done = subprocess.run(
            [sys.executable, "-m", "feddip_mpi", "train", str(tiny_config), *settings(), "--out", str(run)],
            stdout=file, stderr=subprocess.PIPE, text=True, timeout=120, env=environment, check=False,
        )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (run / "finished.json").exists()
    assert "no plot: RuntimeError: no fonts" in (run / "run.log").read_text()
    assert stdout == "full" or "caf\\xe9" in (tmp_path / "said").read_text()
