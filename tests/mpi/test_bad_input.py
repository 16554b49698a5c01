"""Wrong input of every kind: exit code 2, or 3 for a damaged file, and one message, on one rank and on several."""

from __future__ import annotations

from pathlib import Path

import bad_input
import launch
import pytest
import runs

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "empty.yaml").write_text("")
    few = {"rounds": 4, "clients": 4, "participants": 2, "data__synthetic__train_samples": 80, "checkpoint__every": 2}
    launch.run([*launch.FEDDIP, *runs.train(folder / "empty.yaml", folder / "run", **few)]).expect(0)
    return folder / "run"


def test_wrong_input_of_every_kind(trained: Path, tmp_path: Path) -> None:
    """Commands that need MPI run on two ranks, in one launch; the others in one process."""
    cases = bad_input.cases(tmp_path, trained)
    counts = bad_input.table(cases)
    assert sum(counts.values()) >= 300 and min(counts.values()) >= 25, counts
    before = sorted((path, path.stat().st_mtime_ns) for path in trained.rglob("*") if path.name != ".lock")
    wrong = []
    for ranks in (None, 2):
        own = [case for case in cases if case.needs_mpi == (ranks is not None)]
        steps = [{"argv": case.argv} for case in own]
        for case, reports in zip(own, runs.play(steps, tmp_path / f"steps-{ranks}", ranks), strict=True):
            found = bad_input.problem(case, reports[0]["code"], reports[0]["out"], reports[0]["err"])
            if len({report["code"] for report in reports}) > 1 or any(report["err"] for report in reports[1:]):
                found = found or f"the ranks differ: {reports}"
            if found:
                wrong.append(f"{case.argv}: {found}")
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong)
    assert not (tmp_path / "never").exists(), "a run folder was made for a run that never began"
    assert not (tmp_path / "model.safetensors").exists() and (tmp_path / "taken.safetensors").read_bytes() == b"mine"
    after = sorted((path, path.stat().st_mtime_ns) for path in trained.rglob("*") if path.name != ".lock")
    assert after == before, "nothing was written where nothing could be done"


def test_some_through_the_launcher_itself(trained: Path, tmp_path: Path) -> None:
    """Each in a launch of its own: mpirun hands the code on, and all processes are gone."""
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    (tmp_path / "cut.h5").write_bytes(next((trained / "checkpoints").iterdir()).read_bytes()[:-1])
    for argv, code, word in (
        (["train", str(empty), "--set", "sparsity.final=2"], 2, "sparsity.final: got 2"),
        (["evaluate", str(tmp_path / "cut.h5")], 3, "truncated or damaged"),
        (["train", str(empty), "--colour", "red"], 2, "--colour"),
    ):
        done = launch.run([*launch.FEDDIP, *argv], 2, seconds=60).expect(code)
        assert word in done.text and "Traceback" not in done.text and done.orphans == 0, done.text
