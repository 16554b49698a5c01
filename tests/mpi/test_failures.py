"""Failure is designed: it ends all ranks soon, with its exit code, one message, and nothing lost."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import launch
import numpy as np
import pytest
import runs

pytestmark = pytest.mark.mpi

FRAGILE = {"model__name": "small_models:fragile", "checkpoint__every": 1, "checkpoint__keep": 9}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    return path


def fail(
    config: Path, run: Path, fault: str, ranks: int | None = 2, library: str = "default", **changes: Any
) -> launch.Result:
    """Train with a fault (see small_models.py); whatever happens, the job ends soon and leaves no process."""
    argv = [*launch.FEDDIP, *runs.train(config, run, **{**FRAGILE, **changes})]
    done = launch.run(argv, ranks, library, 60, {"FEDDIP_TEST_FAULT": fault})
    assert done.orphans == 0
    assert not (run / "finished.json").exists()
    return done


@pytest.mark.parametrize(("library", "ranks"), [("default", 2), ("default", 4), ("mpich", 2)])
def test_exception_on_one_rank_ends_all(config: Path, tmp_path: Path, library: str, ranks: int) -> None:
    done = fail(config, tmp_path / "run", f"raise:{ranks - 1}:9", ranks, library)
    assert done.code not in (0, 2, 3, 4, 5, 75), done.text
    assert "RuntimeError: this test's model breaks" in done.text
    assert f"rank {ranks - 1} failed" in done.text


def test_error_of_one_rank_alone_ends_all(config: Path, tmp_path: Path) -> None:
    """A payload that one rank cannot decode: the others know nothing of it and wait for that rank."""
    done = fail(config, tmp_path / "run", "decode:1:6").expect(5)
    assert done.text.count("a frame that this test broke") == 1, done.text


def test_early_exit_of_one_rank_is_a_failure(config: Path, tmp_path: Path) -> None:
    """A model that calls sys.exit(0) would leave the others waiting for ever."""
    assert fail(config, tmp_path / "run", "exit:1:9").code not in (0, 75)


def test_a_rank_that_hangs_is_named_and_ends_all(config: Path, tmp_path: Path) -> None:
    done = fail(config, tmp_path / "run", "hang:1:9", watchdog=4)
    assert done.code not in (0, 2, 75)
    assert "watchdog: rank 1 is stuck: no progress for 4 s in phase 'train' of round 2" in done.text, done.text
    assert "small_models.py" in done.text.split("watchdog: rank 1", 1)[1], "the stacks say where"
    assert saved_rounds(tmp_path / "run") == [1]


@pytest.mark.parametrize(
    ("fault", "where"), [("load:0:1", "phase 'load'"), ("linger:0:1", "phase 'finish' of round 1")]
)
def test_a_rank_that_hangs_before_or_after_the_rounds_ends_all(
    fault: str, where: str, config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = fail(config, run, fault, watchdog=4, data__name="small_models:slow_to_load", rounds=1)
    assert done.code not in (0, 2, 75)
    assert f"watchdog: rank 0 is stuck: no progress for 4 s in {where}; ending all ranks" in done.text, done.text
    assert run.exists() == (fault == "linger:0:1")


def test_a_rank_that_hangs_while_a_run_is_restored_ends_all(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launch.run([*launch.FEDDIP, *runs.train(config, run, **FRAGILE, rounds=1)]).expect(0)
    argv = [*launch.FEDDIP, "resume", str(run), "--set", "rounds=2", "--set", "watchdog=4"]
    done = launch.run(argv, 2, seconds=60, extra={"FEDDIP_TEST_FAULT": "restore:0:1"})
    assert done.code not in (0, 2, 75) and done.orphans == 0
    assert "watchdog: rank 0 is stuck: no progress for 4 s in phase 'restore'; ending all ranks" in done.text, done.text


# As users start it: mpi4py's own runner, which the tests put before the program, would end all ranks after any exception.
BARE = ("-c", "import os, sys; os.execv(sys.executable, [sys.executable, '-m', 'feddip_mpi', *sys.argv[1:]])")


@pytest.mark.parametrize("fault", ["raise:1:9", "decode:1:6", "hang:1:9"])
def test_ranks_that_cannot_say_why_end_all(fault: str, config: Path, tmp_path: Path) -> None:
    """stderr on a full disk: without its message a failure still ends all ranks, and so does the watchdog."""
    run = tmp_path / "run"
    changes = {**FRAGILE, "watchdog": 4 if "hang" in fault else None}
    extra = {"FEDDIP_TEST_FAULT": fault, "FEDDIP_TEST_MUTE": "1"}
    done = launch.run([*BARE, *runs.train(config, run, **changes)], 2, "default", 60, extra)
    assert done.code not in (0, 2, 75) and done.orphans == 0 and "Traceback" not in done.text, done.text
    assert (run / "metrics.jsonl").exists() and not (run / "finished.json").exists()


@pytest.mark.parametrize("moment", ["begin", "save"])
def test_failed_save_ends_all_and_keeps_what_was_saved(config: Path, tmp_path: Path, moment: str) -> None:
    """At once, or behind training: then the next save tells it."""
    done = fail(config, tmp_path / "run", f"{moment}:0:3")
    assert done.code not in (0, 75)
    assert done.text.count("No space left on device") == 1 and "round-000003.h5" in done.text, done.text
    assert saved_rounds(tmp_path / "run") == [1, 2]


def test_a_disk_that_is_full_at_the_very_end_is_told_readably(config: Path, tmp_path: Path) -> None:
    """The last checkpoint has just fitted, finished.json does not."""
    run = tmp_path / "run"
    done = fail(config, run, "finish:0:2")
    assert done.code not in (0, 75) and "Traceback" not in done.text, done.text
    assert "finished.json: cannot be written (No space left on device)" in done.text
    last = saved_rounds(run)[-1]
    launch.run([*launch.FEDDIP, "resume", str(run)]).expect(0)
    assert (run / "finished.json").exists() and saved_rounds(run)[-1] == last


@pytest.mark.parametrize("ranks", [None, 2])
def test_nan_stops_all_and_says_where(config: Path, tmp_path: Path, ranks: int | None) -> None:
    # Every client takes 4 steps a round; rank 1 has 2 of the 4 participants, a plain process all.
    last = 0 if ranks is None else 1
    call = 2 * 16 + 1 if ranks is None else 2 * 8 + 1
    done = fail(config, tmp_path / "run", f"nan:{last}:{call}", ranks).expect(4)
    told = re.findall(r"client (\d+) \(rank (\d+)\) diverged in round (\d+)", done.text)
    assert len(told) == 1, done.text
    client, rank, round = map(int, told[0])
    assert (rank, round) == (last, 3) and 0 <= client < 8
    assert saved_rounds(tmp_path / "run") == [1, 2]


def test_the_last_whole_round_has_its_scores_when_an_error_ends_the_run(config: Path, tmp_path: Path) -> None:
    """Three clients on two ranks: round 2 was to be evaluated in round 3, in which a loss is NaN."""
    done = fail(config, tmp_path / "run", f"nan:0:{2 * 8 + 1}", participants=3, checkpoint__every=99).expect(4)
    assert "diverged in round 3" in done.text
    told = runs.lines(tmp_path / "run")
    assert [line["round"] for line in told] == [1, 2] and all(line["test_accuracy"] is not None for line in told)


def test_the_last_whole_round_has_its_line_when_a_rank_ends_all(config: Path, tmp_path: Path) -> None:
    """Nobody can score it: the other ranks may be anywhere."""
    fail(config, tmp_path / "run", f"raise:0:{2 * 8 + 1}", participants=3, checkpoint__every=99)
    told = runs.lines(tmp_path / "run")
    assert [line["round"] for line in told] == [1, 2] and [line["test_accuracy"] is None for line in told] == [
        False,
        True,
    ]


def saved_rounds(run: Path) -> list[int]:
    """Rounds of all checkpoints, each verified."""
    from feddip_mpi import checkpoint

    paths = checkpoint.listed(run / "checkpoints")
    for path in paths:
        assert checkpoint.verify(path)[0] > 0
    return [int(path.stem.split("-")[1]) for path in paths]


def test_wrong_input_ends_with_code_2_through_the_launcher(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    argv = [*launch.FEDDIP, *runs.train(config, run), "--set", "lerning_rate=1"]
    done = launch.run(argv, 2, seconds=60).expect(2)
    assert done.text.count("lerning_rate") == 1 and "did you mean 'learning_rate'" in done.text
    assert not run.exists()


def test_wrong_input_and_drift_are_told_once_and_change_nothing(config: Path, tmp_path: Path) -> None:
    """In one launch of two ranks: each wrong command, its code on both ranks, its one message, the folders after it."""
    images, labels = np.arange(40 * 144, dtype=np.uint32).astype(np.uint8), np.arange(40) % 4
    for name, first in (("data", 0), ("other", 1)):
        pixels = images.reshape(40, 1, 12, 12).copy()
        pixels[0, 0, 0, 0] = first
        np.savez(
            tmp_path / f"{name}.npz", train_images=pixels, train_labels=labels, test_images=pixels, test_labels=labels
        )
    (tmp_path / "void").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    (tmp_path / "no checkpoint" / "checkpoints").mkdir(parents=True)
    own = {"data__name": "npz", "data__path": str(tmp_path / "data.npz"), "participants": 2, "rounds": 2}
    ran, drifted = tmp_path / "ran", tmp_path / "drifted"
    missing = {"data__name": "fashion-mnist", "data__path": str(tmp_path / "nowhere")}

    # (command, exit code, what the message names)
    table: list[tuple[dict[str, Any], int, list[str]]] = [
        ({"argv": runs.train(config, tmp_path / "a", participants=9)}, 2, ["participants", "9", "8"]),
        ({"argv": runs.train(config, tmp_path / "b", sparsity__final=1.5, rounds=0)}, 2, ["sparsity.final", "rounds"]),
        ({"argv": runs.train(config.with_name("none.yaml"), tmp_path / "c")}, 2, ["none.yaml"]),
        ({"argv": runs.train(config, tmp_path / "taken")}, 2, ["taken", "never overwritten"]),
        ({"argv": runs.train(config, tmp_path / "d", **missing)}, 2, ["nowhere"]),
        ({"argv": runs.train(config, tmp_path / "e", model__name="alexnet")}, 2, ["alexnet", "12x12"]),
        ({"argv": runs.train(config, tmp_path / "f", model__name="small_models:absent")}, 2, ["absent"]),
        ({"argv": runs.train(config, config / "g")}, 2, [str(config / "g")]),
        ({"argv": runs.train(config, tmp_path / "h", data__name="small_models:one_pixel_each"), "ranks_per_node": 1}, 2,
         ["rank 0: ", "rank 1: ", "800x1x12x12", "data.path"]),
        ({"argv": runs.train(config, tmp_path / "i", model__name="small_models:pair")}, 2,
         ["small_models:pair", "a tuple", "[2, 10]"]),
        ({"argv": runs.train(config, tmp_path / "j"), "launched": 4}, 2, ["4 ranks (PMI_SIZE)", "MPI sees 2 ranks"]),
        ({"argv": runs.train(config, tmp_path / "k", model__name="small_models:of_its_rank")}, 5,
         ["initial weights: rank 0: ", "initial weights: rank 1: ", "same code of your own"]),
        ({"argv": ["resume", str(tmp_path / "void")]}, 2, ["void", "no checkpoint"]),
        ({"argv": ["resume", str(tmp_path / "no checkpoint")]}, 2, ["no checkpoint"]),
        ({"argv": ["resume", str(tmp_path / "nothing")]}, 2, ["nothing", "no such run folder"]),
        ({"argv": ["train", str(config), "--colour", "red"]}, 2, ["--colour"]),
        ({"argv": runs.train(config, ran, **own)}, 0, []),
        ({"argv": runs.train(config, ran, **own)}, 2, ["ran", "never overwritten"]),
        ({"argv": ["resume", str(ran), "--set", "rounds=4", "--set", f"data.path={tmp_path / 'other.npz'}"]}, 2,
         ["other.npz", "set data.path to the data of the run"]),
        ({"argv": ["resume", str(ran), "--set", "rounds=3"]}, 0, []),
        ({"argv": runs.train(config, drifted, checkpoint__every=9), "drift": 1}, 5, ["rank 1", "round 5"]),
    ]  # fmt: skip
    commands = [command for command, _, _ in table]
    for (command, code, names), ranks in zip(table, runs.play(commands, tmp_path / "steps", 2), strict=True):
        assert [report["code"] for report in ranks] == [code] * 2, (command, ranks)
        if code:
            spoken = [report["err"] for report in ranks]
            said = "".join(line for line in spoken[0].splitlines(keepends=True) if "no plot" not in line)
            assert all(name in said for name in names), (command, said)
            assert said.count("rror: ") == 1 and "Traceback" not in said, said
            if "--colour" not in command["argv"]:  # found before MPI starts: each process speaks for itself
                assert spoken[1] == "", spoken[1]
    assert [path.name for path in tmp_path.iterdir() if len(path.name) == 1] == []
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["thesis.txt"]
    assert list((tmp_path / "void").iterdir()) == []
    assert saved_rounds(ran) == [2, 3]
    assert saved_rounds(drifted) == [], "a replica that drifted is not saved"
