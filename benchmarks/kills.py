"""Kills ranks of a small run at random moments and says what became of it; tells from the same seed the same moments.

    python benchmarks/kills.py docs/results/kills.json --tries 120

Every try is a run of 4 ranks under `mpirun --with-ft ulfm` in which one, two or three of them are killed with SIGKILL, each
0 to 30 ms after it enters a phase of a round. Right is: finished, by its marker, with the bits of the checkpoint of a run
that never failed; where survivors go on without the dead rank's residuals these bits cannot be had, and right is: all rounds,
a checkpoint that verifies. Tries that are in the file are not run again. Needs Open MPI >= 5 beside this Python.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "mpi")]

import runs  # noqa: E402

from feddip_mpi import checkpoint  # noqa: E402
from feddip_mpi.errors import FeddipError  # noqa: E402

RANKS, ROUNDS, LIMIT_SECONDS = 4, 6, 120
PROGRAM = "import sys; sys.modules['matplotlib'] = None; from feddip_mpi.cli import main; main()"
# Three clients on four ranks: some wait, and evaluate the round before in that time.
SETTINGS = {"rounds": ROUNDS, "participants": 3, "model__name": "small_models:dropping", "recovery_timeout": 20,
            "watchdog": 20}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "rewind": {},
    "rewind, sharded, int8 both ways": {"exchange": "sharded", "download__values": "int8"},
    "rewind, node": {"exchange": "node"},
    "continue, no residuals": {"on_rank_failure": "continue", "upload__residual": "drop"},
    "continue, residuals and sharded": {
        "on_rank_failure": "continue",
        "exchange": "sharded",
        "download__values": "int8",
    },
}
OTHER_BITS = "continue, residuals and sharded"
PHASES = (
    "plan", "train", "encode", "wait", "exchange", "decode", "server", "evaluate", "commit", "checkpoint", "finish",
)  # fmt: skip


def draw(seed: int, number: int) -> tuple[str, list[dict[str, Any]]]:
    """A try's variant and faults."""
    rng = random.Random(f"{seed}:{number}")
    variant = rng.choice(list(VARIANTS))
    faults = []
    for rank in rng.sample(range(RANKS), rng.choices((1, 2, 3), (0.4, 0.3, 0.3))[0]):
        phase = PHASES[number % len(PHASES)] if not faults else rng.choice([*PHASES, *4 * ["recover"]])
        last = {"finish": ROUNDS, "recover": 1}.get(phase) or rng.randint(1, ROUNDS)
        delay = 0 if rng.random() < 0.3 else round(rng.uniform(0, 30), 1)
        faults.append({"rank": rank, "phase": phase, "round": last, "delay": delay})
    return variant, faults


def command(run: Path, ranks: int, changes: dict[str, Any]) -> list[str]:
    config = run.parent / "empty.yaml"
    config.write_text("")
    launch = [] if ranks == 1 else [
        str(Path(sys.executable).with_name("mpirun")), "--with-ft", "ulfm", "-n", str(ranks), "--oversubscribe", "--bind-to",
        "none", "--mca", "mpi_yield_when_idle", "1",
    ]  # fmt: skip
    return [*launch, sys.executable, "-c", PROGRAM, *runs.train(config, run, **SETTINGS, **changes)]


def start(run: Path, ranks: int, changes: dict[str, Any], faults: str = "") -> tuple[int | None, str, float]:
    """Exit code (None: it hung and was killed), output, seconds."""
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([*sys.path[:2], str(ROOT / "tests/mpi/programs")]),
        "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "FEDDIP_FAULT": faults, "FEDDIP_TEST_FAULTS": "1",
        "FEDDIP_KILLS": str(run), "TMPDIR": str(run.parent), "OMPI_MCA_btl_sm_backing_directory": str(run.parent),
        "OMPI_MCA_osc_sm_backing_directory": str(run.parent), "OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm,tcp",
    }  # fmt: skip
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "PRTE_ALLOW_RUN_AS_ROOT"):
        environment |= {name: "1", f"{name}_CONFIRM": "1"}
    output, began = run.parent / "output.txt", time.monotonic()
    with open(output, "wb") as file:
        process = subprocess.Popen(
            command(run, ranks, changes), env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    code: int | None
    try:
        code = process.wait(LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        code = None
        for pid in of_this_run(run):  # Python's fault handler answers with the stack of every thread
            os.kill(pid, signal.SIGABRT)
        time.sleep(1)
    took = time.monotonic() - began
    for pid in of_this_run(run):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    return code, output.read_text(errors="replace"), took


def of_this_run(run: Path) -> list[int]:
    """Processes that are left, by their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"FEDDIP_KILLS={run}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def attempt(scratch: Path, seed: int, number: int, references: dict[str, Path], keep: Path | None) -> dict[str, Any]:
    variant, faults = draw(seed, number)
    folder = scratch / f"t{number}"
    folder.mkdir()
    run = folder / "run"
    text = ";".join(" ".join(f"{key}={value}" for key, value in fault.items()) for fault in faults)
    code, output, took = start(run, RANKS, VARIANTS[variant], text)
    finished = run / "finished.json"
    log = (run / "run.log").read_text() if (run / "run.log").exists() else ""
    died = json.loads(finished.read_text())["ranks_lost"] if finished.exists() else None
    found = {
        "number": number, "variant": variant, "faults": faults, "died": died,
        "exit_code": code, "seconds": round(took, 2),
        "recovery_seconds": [float(text) for text in re.findall(r"([\d.]+) s to recover", log)],
    }  # fmt: skip
    found["outcome"] = judge(found, finished.exists(), references, variant, run)
    if found["outcome"] not in ("right", "no kill") and keep:
        (keep / f"{number}.txt").write_text(f"{json.dumps(found)}\n{log}\n{output}")
    shutil.rmtree(folder)
    return found


def judge(found: dict[str, Any], finished: bool, references: dict[str, Path], variant: str, run: Path) -> str:
    if not finished:
        return (
            "hang"
            if found["exit_code"] is None
            else "ended, resume works"
            if resumes(run, references, variant)
            else "wrong"
        )
    try:
        if variant == OTHER_BITS:
            checkpoint.verify(runs.newest(run))
        else:
            runs.assert_equal(references[variant], run)
        assert [line["round"] for line in runs.lines(run)] == list(range(1, ROUNDS + 1))
    except (AssertionError, FeddipError):
        return "wrong"
    # mpirun may hang after the last rank has ended: the run is complete then, and a batch script sees its marker.
    hung = "; mpirun did not end" if found["exit_code"] is None else ""
    return ("right" if found["died"] else "no kill") + hung


def resumes(run: Path, references: dict[str, Path], variant: str) -> bool:
    """Whether a run that ended with an error goes on to the right bits."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path[:2], str(ROOT / "tests/mpi/programs")])}
    subprocess.run(
        [sys.executable, "-c", PROGRAM, "resume", str(run)], env=environment, check=False, capture_output=True
    )
    try:
        runs.assert_equal(references[variant], run)
    except (AssertionError, ValueError):
        return False
    return (run / "finished.json").exists()


def table(tries: list[dict[str, Any]]) -> str:
    """Fault x kills x outcome of their tries as Markdown, by phase and by variant."""
    outcomes = sorted({one["outcome"] for one in tries})
    groups: dict[str, list[str]] = collections.defaultdict(list)
    for one in tries:
        for fault in one["faults"]:
            if one["died"] is None or fault["rank"] in one["died"]:
                groups[f"in `{fault['phase']}`"].append(one["outcome"])
                groups[f"{'rank 0' if fault['rank'] == 0 else 'another rank'}"].append(one["outcome"])
                groups[f"run: {one['variant']}"].append(one["outcome"])
                groups["**all kills**"].append(one["outcome"])
    lines = ["| kill | kills | " + " | ".join(outcomes) + " |", "|---|---|" + "---|" * len(outcomes)]
    for name in sorted(groups):
        counts = [str(groups[name].count(outcome)) for outcome in outcomes]
        lines.append(f"| {name} | {len(groups[name])} | {' | '.join(counts)} |")
    found = collections.Counter(one["outcome"] for one in tries)
    lines += ["", f"{len(tries)} tries: " + ", ".join(f"{count} {outcome}" for outcome, count in found.most_common())]
    times = sorted(t for one in tries for t in one["recovery_seconds"])
    if times:
        lines += [f"{len(times)} recoveries: {times[0]} to {times[-1]} s, median {times[len(times) // 2]} s"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tries", type=int, default=120)
    parser.add_argument("--first", type=int, default=0, help="number of the first try")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no try after so many seconds")
    parser.add_argument("--keep", type=Path, help="folder for the output of tries that went wrong")
    arguments = parser.parse_args()
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    stored = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"seed": arguments.seed, "tries": []}
    tries, began = stored["tries"], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kl") as name:
        scratch, references = Path(name), {}
        for number in sorted(set(range(arguments.first, arguments.tries)) - {one["number"] for one in tries}):
            if time.monotonic() - began > arguments.seconds:
                break
            variant, _ = draw(arguments.seed, number)
            if variant not in references:
                (scratch / f"r{len(references)}").mkdir()
                run = references[variant] = scratch / f"r{len(references)}" / "run"
                code, output, _ = start(run, 1, VARIANTS[variant])
                assert code == 0, output
            tries.append(attempt(scratch, arguments.seed, number, references, arguments.keep))
            print(json.dumps(tries[-1]), flush=True)
            arguments.out.write_text(json.dumps(stored, indent=1) + "\n")
    print(table(tries))


if __name__ == "__main__":
    main()
