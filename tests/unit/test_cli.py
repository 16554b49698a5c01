"""The command line by itself: what it says of options, before any command begins."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from feddip_mpi import cli


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """What a command that ends with exit code 2 says on stderr."""
    monkeypatch.setattr(sys, "argv", ["feddip-mpi", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "way_out"),
    [
        (["train", "mine.yaml", "--rounds", "5"], "'--rounds', but a key of the configuration: use --set rounds=5"),
        (["train", "mine.yaml", "--rounds=5"], "use --set rounds=5"),
        (["train", "mine.yaml", "--sparsity.final", "0.9"], "use --set sparsity.final=0.9"),
        (["plan", "mine.yaml", "--final", "0.9"], "use --set sparsity.final=0.9"),
        (["resume", "runs/demo", "--learning-rate", "0.1"], "use --set learning_rate=0.1"),
        (["train", "mine.yaml", "--feedback", "--out", "x"], "use --set feedback=VALUE"),
        (["train", "mine.yaml", "--name", "x"], "use --set data.name=x or --set model.name=x"),
    ],
)
def test_an_option_that_is_a_key_is_told_to_be_set(
    words: list[str], way_out: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said(capsys, monkeypatch, *words).rstrip().endswith(way_out)


@pytest.mark.parametrize("words", [["train", "mine.yaml", "--colour", "red"], ["verify", "x.h5", "--rounds", "5"]])
def test_other_options_are_told_as_they_are(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = said(capsys, monkeypatch, *words)
    assert words[2] in text and "--set" not in text


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            ["rounds=5", "rounds=7"],
            ["--set rounds=5: gives way to --set rounds=7; of several for one key the last counts"],
        ),
        (
            ["rounds=5", "rounds = 7", "seed=2"],
            ["--set rounds=5: gives way to --set rounds = 7; of several for one key"],
        ),
        (["rounds=5", "seed=1", "rounds=5"], []),
        (["mask.every=5", "eval.every=7"], []),
    ],
)
def test_a_key_that_is_set_twice_is_told(
    values: list[str], told: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command then fails for want of its file; a later rank of a launch leaves it to the first."""
    words = ["plan", "nowhere.yaml", *(word for value in values for word in ("--set", value))]
    *notes, error = said(capsys, monkeypatch, *words).splitlines()
    assert error.startswith("error: ") and len(notes) == len(told)
    assert all(note.startswith(line) for note, line in zip(notes, told, strict=True))
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setattr(cli, "_PATIENCE_SECONDS", 0.0)
    assert len(said(capsys, monkeypatch, *words).splitlines()) == 1


def test_collections_are_few_while_importing_and_usual_while_working() -> None:
    """What is imported is never looked at again; what work leaves behind, tensors among it, is."""
    code = """
import gc
from alone import Alone
from feddip_mpi import cli, collectives, session
usual = gc.get_threshold()
comm = Alone()
comm.leave = lambda code: None
collectives.world = lambda *_: comm
def train(comm, *_):
    print("importing:", importing[0] > 10 * usual[0], "working:", gc.get_threshold() == usual, gc.get_freeze_count() > 100_000)
session.train = train
importing, under_mpi = [], cli._under_mpi
cli._under_mpi = lambda work: (importing.extend(gc.get_threshold()), under_mpi(work))
cli.main()
"""
    words = [sys.executable, "-c", code, "train", "mine.yaml"]
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(cli.__file__).parents[1])])
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert (done.returncode, done.stdout) == (0, "importing: True working: True True\n"), done.stderr
