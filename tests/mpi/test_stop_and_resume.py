"""Stopped and resumed is never stopped, to the bit: by signals, by a crash, from a damaged file, on other ranks."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path

import launch
import pytest
import runs

from feddip_mpi import run_folder

pytestmark = pytest.mark.mpi

# Long enough for signals to hit it; of two ranks or four some wait, and evaluate the round before meanwhile.
LONG = {"model__name": "small_models:fragile", "rounds": 30, "participants": 3, "checkpoint__every": 3,
        "checkpoint__best": False}  # fmt: skip


@pytest.fixture(scope="module")
def never_stopped(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run LONG on one rank, from its first round to its last."""
    run = tmp_path_factory.mktemp("never") / "stopped"
    launch.run([*launch.FEDDIP, *runs.train(config, run, **LONG)]).expect(0)
    assert (run / "finished.json").exists()
    return run


def slowly(ranks: int | None) -> dict[str, str]:
    """A round lasts 0.3 seconds on any number of ranks: 12 local steps that the ranks share."""
    return {"FEDDIP_TEST_SLEEP": str(0.02 * (ranks or 1))}


def stop(argv: list[str], run: Path, number: signal.Signals, ranks: int | None, library: str = "default") -> int:
    """Start a command, send the signal after two more rounds; returns the round that it says it stopped after."""
    before = len(runs.lines(run))
    with launch.Job([*launch.FEDDIP, *argv], ranks, library, slowly(ranks)) as job:
        job.wait_until(lambda: _advanced(run, before))
        job.send(number)
        done = job.wait(60).expect(75)
    stopped = re.findall(r"^stopped: .*after round (\d+)", done.text, re.MULTILINE)
    assert len(stopped) == 1, done.text
    assert done.orphans == 0 and not (run / "finished.json").exists()
    assert runs.newest(run).name == f"round-{int(stopped[0]):06d}.h5"
    return int(stopped[0])


def _advanced(run: Path, before: int) -> bool:
    # A resume begins by cutting metrics.jsonl back to its checkpoint: here that loses no line, as the last round was saved.
    return len(runs.lines(run)) >= before + 2


def test_signals_stop_after_saving_and_any_number_of_ranks_goes_on(
    config: Path, never_stopped: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    rounds = [
        stop(runs.train(config, run, **LONG), run, signal.SIGUSR1, 2),
        stop(["resume", str(run)], run, signal.SIGUSR2, 4),
        stop(["resume", str(run)], run, signal.SIGTERM, None),
        stop(["resume", str(run)], run, signal.SIGINT, None),
    ]
    assert rounds == sorted(set(rounds)), "each resume went on from where the last one stopped"
    launch.run([*launch.FEDDIP, "resume", str(run)], 2).expect(0)
    runs.assert_equal(never_stopped, run)
    assert [line["round"] for line in runs.lines(run)] == list(range(1, 31))


def test_mpich_stops_and_open_mpi_goes_on(config: Path, never_stopped: Path, tmp_path: Path) -> None:
    launch.require("mpich")
    run = tmp_path / "run"
    stop(runs.train(config, run, **LONG), run, signal.SIGUSR1, 2, "mpich")
    launch.run([*launch.FEDDIP, "resume", str(run)], 2).expect(0)
    runs.assert_equal(never_stopped, run)


def test_killed_rank_ends_the_job_and_the_last_checkpoint_is_good(
    config: Path, never_stopped: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with launch.Job([*launch.FEDDIP, *runs.train(config, run, **LONG)], 2, extra=slowly(2)) as job:
        job.wait_until(lambda: len(runs.lines(run)) >= 7)
        job.kill_rank(1)
        done = job.wait(30)
    assert done.code not in (0, 75) and done.orphans == 0, done.text
    assert not (run / "finished.json").exists()
    # What a power cut leaves: a line of metrics cut in the middle, a checkpoint never renamed.
    with open(run / "metrics.jsonl", "a") as metrics:
        metrics.write('{"round": 8, "partici')
    leftover = run / "checkpoints" / ".round-000009.h5.tmp-123"
    leftover.write_bytes(b"half")
    done = launch.run([*launch.FEDDIP, "resume", str(run)]).expect(0)
    runs.assert_equal(never_stopped, run)
    assert [line["round"] for line in runs.lines(run)] == list(range(1, 31))
    assert not leftover.exists()


def test_damaged_checkpoint_is_refused_and_the_one_before_taken(never_stopped: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(never_stopped, run)
    newest = runs.newest(run)
    damage(newest)
    done = launch.run([*launch.FEDDIP, "resume", str(run)], 2).expect(0)
    refusals = [line for line in done.text.splitlines() if "refused" in line]
    assert len(refusals) == 1 and str(newest) in refusals[0] and "does not match its checksum" in refusals[0], done.text
    assert "from round-000027.h5" in (run / "run.log").read_text()
    runs.assert_equal(never_stopped, run)


def test_nothing_good_left_is_said(never_stopped: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(never_stopped, run)
    paths = sorted((run / "checkpoints").iterdir())
    for path in paths:
        damage(path)
    done = launch.run([*launch.FEDDIP, "resume", str(run)]).expect(3)
    assert all(done.text.count(str(path)) == 1 for path in paths), done.text
    assert sorted((run / "checkpoints").iterdir()) == paths


def damage(path: Path) -> None:
    """One bit in the middle of the array of the first layer's weights."""
    raw = bytearray(path.read_bytes())
    raw[_place_of_weights(path)] ^= 1
    path.write_bytes(raw)


def _place_of_weights(path: Path) -> int:
    import h5py

    with h5py.File(path) as file:
        dataset = file["model/parameters/first.weight"]
        return int(dataset.id.get_offset()) + dataset.nbytes // 2


def test_a_round_that_cannot_finish_in_time_is_abandoned(config: Path, never_stopped: Path, tmp_path: Path) -> None:
    """A signal in the middle of long local training: the state before the round is saved, and no bit is lost."""
    run = tmp_path / "run"
    done = stop(runs.train(config, run, **LONG, stop_grace=0.2), run, signal.SIGUSR1, 2)
    before = len(runs.lines(run))
    assert before == done
    # Four or eight batches a rank of 3 s each, of which 0.2 s are granted.
    with launch.Job([*launch.FEDDIP, "resume", str(run)], 2, extra={"FEDDIP_TEST_SLEEP": "3"}) as job:
        job.wait_until(lambda: "run folder" in job.text)
        time.sleep(2)  # into the first batch
        job.send(signal.SIGUSR1)
        ended = job.wait(60).expect(75)
    assert f"stopped by a signal after round {done}" in ended.text, ended.text
    assert f"stopped by a signal after round {done}" in (run / "run.log").read_text().splitlines()[-1]
    assert runs.newest(run).name == f"round-{done:06d}.h5" and len(runs.lines(run)) == before
    assert f"round {done + 1} was abandoned while client" in (run / "run.log").read_text()
    launch.run([*launch.FEDDIP, "resume", str(run), "--set", "stop_grace=60"], 2).expect(0)
    ours, theirs = runs.contents(runs.newest(never_stopped)), runs.contents(runs.newest(run))
    assert [name for name in ours if name != "config" and ours[name] != theirs[name]] == []


def test_a_resume_evaluates_what_an_abandoned_round_left(config: Path, tmp_path: Path) -> None:
    """The round before the abandoned one was to be evaluated in it, and is saved without its scores."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    changes = {**LONG, "method": "fedavg", "rounds": 8, "checkpoint__every": 99, "stop_grace": 0.2}
    launch.run([*launch.FEDDIP, *runs.train(config, whole, **changes)]).expect(0)
    # Eight batches of 0.4 s on rank 0; the line of a round stands there when the next one has ended.
    with launch.Job(
        [*launch.FEDDIP, *runs.train(config, run, **changes)], 2, extra={"FEDDIP_TEST_SLEEP": "0.4"}
    ) as job:
        job.wait_until(lambda: len(runs.lines(run)) >= 1)
        time.sleep(1)  # into the round after that: it takes 3 s
        job.send(signal.SIGUSR1)
        job.wait(60).expect(75)
    done, accuracies = len(runs.lines(run)), [line["test_accuracy"] for line in runs.lines(run)]
    assert f"round {done + 1} was abandoned" in (run / "run.log").read_text()
    assert done >= 2 and accuracies[-1] is None and None not in accuracies[:-1]
    assert runs.newest(run).name == f"round-{done:06d}.h5"
    for enough in (str(done), "8"):
        other = tmp_path / f"rounds-{enough}"
        shutil.copytree(run, other)
        launch.run([*launch.FEDDIP, "resume", str(other), "--set", f"rounds={enough}"], 2).expect(0)
        told = runs.lines(other)
        assert [line["round"] for line in told] == list(range(1, int(enough) + 1))
        assert [line["test_accuracy"] for line in told] == [
            line["test_accuracy"] for line in runs.lines(whole)[: int(enough)]
        ]
    runs.assert_equal(whole, tmp_path / "rounds-8")


def test_a_run_that_was_never_saved_begins_again(config: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    changes = {"model__name": "small_models:fragile", "checkpoint__every": 99, "rounds": 8}
    with launch.Job([*launch.FEDDIP, *runs.train(config, run, **changes)], extra=slowly(None)) as job:
        job.wait_until(lambda: len(runs.lines(run)) >= 2)
        job.send(signal.SIGKILL)
        job.wait(30)
    assert list((run / "checkpoints").iterdir()) == []
    done = launch.run([*launch.FEDDIP, *runs.train(config, run, **changes)]).expect(2)
    assert f"feddip-mpi resume {run}" in done.text
    # Stopped before its first round, it is no worse: nothing is there to save.
    with launch.Job([*launch.FEDDIP, "resume", str(run)], extra=slowly(None)) as job:
        job.wait_until(lambda: "small_models" in job.text)
        job.send(signal.SIGUSR1)
        job.wait(60).expect(75)
    launch.run([*launch.FEDDIP, "resume", str(run)]).expect(0)
    launch.run([*launch.FEDDIP, *runs.train(config, whole, **changes)]).expect(0)
    runs.assert_equal(whole, run)
    assert "it was never saved: it begins again" in (run / "run.log").read_text()


def test_what_a_resume_was_told_outlives_a_crash_before_it_could_save(config: Path, tmp_path: Path) -> None:
    """A batch script resumes without options; the checkpoint knows nothing of them."""
    run = tmp_path / "run"
    launch.run([*launch.FEDDIP, *runs.train(config, run, method="fedavg", rounds=4)]).expect(0)
    told = [word for item in ("rounds=9", "checkpoint.every=4", "watchdog=99") for word in ("--set", item)]
    crash = {"FEDDIP_FAULT": "rank=0 phase=train round=6", "FEDDIP_TEST_FAULTS": "1"}
    launch.run([*launch.FEDDIP, "resume", str(run), *told], extra=crash).expect(-signal.SIGKILL)
    assert runs.newest(run).name == "round-000004.h5" and not (run / "finished.json").exists()
    launch.run([*launch.FEDDIP, "resume", str(run)]).expect(0)
    assert json.loads((run / "finished.json").read_text())["rounds"] == 9
    last = runs.contents(runs.newest(run))["config"][0]
    assert (last["rounds"], last["checkpoint"]["every"], last["watchdog"]) == (9, 4, 99)


@pytest.mark.parametrize("grace", [300, 0.2])
def test_a_stop_while_clients_open_the_run(config: Path, tmp_path: Path, grace: float) -> None:
    """All clients measure saliencies before the first round of SSFL; a signal there ends the run between two of them.

    After `stop_grace` it ends it within one, which is no failure either.
    """
    whole, run = tmp_path / "whole", tmp_path / "run"
    changes = {"model__name": "small_models:fragile", "method": "ssfl", "rounds": 2, "stop_grace": grace}
    slow = {"FEDDIP_TEST_SLEEP": "0.8"}  # eight clients of four batches on two ranks: 13 s, a client 3 s
    with launch.Job([*launch.FEDDIP, *runs.train(config, run, **changes)], 2, extra=slow) as job:
        job.wait_until(lambda: (run / "run.log").exists() and "start: ssfl" in (run / "run.log").read_text())
        time.sleep(0.5)
        sent = time.monotonic()
        job.send(signal.SIGUSR1)
        ended = job.wait(60).expect(75)
        took = time.monotonic() - sent
    assert f"stopped by a signal before round 1; `feddip-mpi resume {run}` goes on" in ended.text
    assert took < 9 and list((run / "checkpoints").iterdir()) == [] and runs.lines(run) == []
    assert "failed" not in ended.text
    launch.run([*launch.FEDDIP, "resume", str(run)]).expect(0)
    launch.run([*launch.FEDDIP, *runs.train(config, whole, **changes)]).expect(0)
    runs.assert_equal(whole, run)


def test_a_second_job_in_a_run_folder_is_refused(never_stopped: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(never_stopped, run)
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file())
    holder = run_folder.Lock(run_folder.RunFolder(run))
    done = launch.run([*launch.FEDDIP, "resume", str(run), "--set", "rounds=31"]).expect(7)
    assert "waits up to 10 s" in done.text and "another job is at work in this run folder (process " in done.text
    after = sorted(
        (path, path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file() and path.name != ".lock"
    )
    assert after == [entry for entry in before if entry[0].name != ".lock"]
    holder.release()
    launch.run([*launch.FEDDIP, "resume", str(run), "--set", "rounds=41"]).expect(0)


def test_rounds_too_few_for_the_final_sparsity_are_refused(config: Path, tmp_path: Path) -> None:
    """A shorter run must not end short of what was asked; without any evaluation a run still ends."""
    prunes = {"rounds": 20, "eval__every": 20, "model__name": "small_models:fragile"}
    average = {**prunes, "method": "fedavg"}
    commands = [
        {"argv": runs.train(config, tmp_path / "prunes", **prunes), "stop_after": 8},
        {"argv": ["resume", str(tmp_path / "prunes"), "--set", "rounds=9"]},
        {"argv": ["resume", str(tmp_path / "prunes"), "--set", "rounds=11"]},
        {"argv": runs.train(config, tmp_path / "average", **average), "stop_after": 8},
        {"argv": ["resume", str(tmp_path / "average"), "--set", "rounds=8"]},
    ]
    reports = runs.play(commands, tmp_path / "steps", None)
    assert [ranks[0]["code"] for ranks in reports] == [75, 2, 0, 75, 0]
    assert "rounds must be at least 11" in reports[1][0]["err"]
    assert runs.lines(tmp_path / "prunes")[-1]["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert json.loads((tmp_path / "average" / "finished.json").read_text())["test_accuracy"] > 0


def test_every_round_can_be_the_last_before_a_stop(config: Path, tmp_path: Path) -> None:
    """In one launch: stop after round 1, 2, 3, 4, each then resumed; all of them in a row; and more rounds than asked."""
    changes = {
        "upload__values": "int4",
        "upload__rounding": "stochastic",
        "upload__residual": "decay",
        "mask__every": 2,
        # Adaptive control decides by the history, which a resumed run has from the checkpoint.
        "control__mask_delay": 1,
        "control__loss_tolerance": 1.0,
        "control__pruning_error": 0.05,
        "control__upload_bytes": 20000,
    }
    commands = [{"argv": runs.train(config, tmp_path / "whole", **changes)}]
    codes = [0]
    for last in range(1, 5):
        run = tmp_path / f"stopped-{last}"
        commands += [
            {"argv": runs.train(config, run, **changes), "stop_after": last},
            {"argv": ["resume", str(run)]},
        ]
        codes += [75, 0]
    # What servers and owners of slices remember between rounds, and what is owed at the time of the stop.
    memories = {
        "ef21": {"upload__residual": "ef21", "upload__values": "int8", "mask__every": 2},
        # Slices are cut by the bytes of what clients send, not by those of the sums.
        "owed": {"exchange": "sharded", "upload__values": "int8", "download__values": "int4", "mask__every": 3},
    }
    for name, own in memories.items():
        commands.append({"argv": runs.train(config, tmp_path / f"{name}-whole", **own)})
        codes.append(0)
        for last in (1, 2, 4):
            run = tmp_path / f"{name}-{last}"
            commands.append({"argv": runs.train(config, run, **own), "stop_after": last})
            # A resume that gives up its first round saves what it was given.
            commands += [{"argv": ["resume", str(run)], "abandon": True}] * 2 + [{"argv": ["resume", str(run)]}]
            codes += [75, 75, 75, 0]
    often = tmp_path / "often"
    # Here residuals have no room to wait in for the thread that writes, or for one of them only.
    commands.append({"argv": runs.train(config, often, **changes), "stop_after": 1, "kept_bytes": 0})
    commands += [{"argv": ["resume", str(often)], "stop_after": last, "kept_bytes": 20000 * last} for last in (2, 3, 4)]
    # A signal in the last round is no stop: the run is complete.
    commands.append({"argv": ["resume", str(often)], "stop_after": 5})
    codes += [75] * 4 + [0]
    # FedAvg's schedules do not look at the number of rounds: 3 + 2 rounds are 5.
    average = {"method": "fedavg", "upload__values": "int8"}
    commands += [
        {"argv": runs.train(config, tmp_path / "five", **average)},
        {"argv": runs.train(config, tmp_path / "three", **average, rounds=3)},
        {"argv": ["resume", str(tmp_path / "three"), "--set", "rounds=5"]},
        {"argv": ["resume", str(tmp_path / "three")]},
        {"argv": ["resume", str(tmp_path / "three"), "--set", "rounds=4"]},
        {"argv": ["resume", str(tmp_path / "three"), "--set", "learning_rate=0.1"]},
    ]
    codes += [0, 0, 0, 0, 2, 2]
    reports = runs.play(commands, tmp_path / "steps", 2)
    for command, code, ranks in zip(commands, codes, reports, strict=True):
        assert [report["code"] for report in ranks] == [code] * 2, (command, ranks)
    for last in range(1, 5):
        runs.assert_equal(tmp_path / "whole", tmp_path / f"stopped-{last}")
    for name in memories:
        for last in (1, 2, 4):
            runs.assert_equal(tmp_path / f"{name}-whole", tmp_path / f"{name}-{last}")
    runs.assert_equal(tmp_path / "whole", often)
    runs.assert_equal(tmp_path / "five", tmp_path / "three")
    again, too_few, not_allowed = reports[-3:]
    assert "finished after 5 rounds" in again[0]["out"] and "rounds=N" in again[0]["out"]
    assert "rounds=4" in too_few[0]["err"] and "learning_rate" in not_allowed[0]["err"]
    assert [line["round"] for line in runs.lines(tmp_path / "three")] == [1, 2, 3, 4, 5]
