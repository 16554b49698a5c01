"""Seconds and memory of a federated round against plain PyTorch in two processes, interleaved.

    python benchmarks/round.py [--series 1] [--rows FedAvg "FedDIP 0.95"] [--append] [--out docs/results/performance.json]

The workload: Fashion-MNIST, LeNet-5, 50 clients (IID), 5 a round, 5 local epochs, batches of 128, evaluation of all 10,000
test images every round, 2 processes with one thread each. The yardstick is in this file (`plain_rank`): tensors preloaded
as normalised float32, a plain SGD loop over index gathers, gloo to average, no autograd in the evaluation, which both
processes share. All jobs run at once but compute in turns of a second (the others are stopped), because a virtual machine's
cores are not the same from one minute to the next; a round's time is the time for which its job was let run.
`--append` adds series to what the result file has.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import psutil
from watch import mpirun, proportional_bytes

RANKS, CLIENTS, PARTICIPANTS, EPOCHS, BATCH = 2, 50, 5, 5, 128
LEARNING_RATE, DECAY, WEIGHT_DECAY = 0.1, 0.998, 5e-4
COMMON = [f"clients={CLIENTS}", f"participants={PARTICIPANTS}", f"local_epochs={EPOCHS}", f"batch_size={BATCH}"]
_FEDAVG = ["method=fedavg", "upload.values=fp32"]
# At its final sparsity from the first mask update on (after round 2), with a new mask every second round: more of them
# than any stretch of a real run has.
_AT_095 = ["sparsity.final=0.95", "sparsity.schedule=constant", "mask.every=2", "mask.freeze_after=1.0"]
ROWS = {
    "FedAvg": _FEDAVG,
    "FedDIP 0.95": _AT_095,
    "FedAvg bf16": [*_FEDAVG, "precision=bf16"],
    "FedDIP 0.95 bf16": [*_AT_095, "precision=bf16"],
    "FedAvg, no overlap": [*_FEDAVG, "eval.overlap=false"],
    "FedDIP 0.95, no overlap": [*_AT_095, "eval.overlap=false"],
}
YARDSTICK = "plain PyTorch"
# The yardstick of somebody who knows what glibc does with big blocks (docs/results/performance.md).
TUNED = "plain PyTorch, big blocks kept"
_BIG_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "9223372036854775807"}
WARM_UP = 2


# The yardstick: nothing of the package is imported here.


def plain_rank(rank: int, folder: Path) -> None:
    """One of the two processes; rank 0 adds a line a round to `folder`/rounds.jsonl."""
    import numpy as np
    import torch
    from torch import distributed, nn
    from torch.nn import functional as F

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    stored = np.load(folder / "data.npz")
    grey = torch.from_numpy(stored["train_images"]).float().div_(255)
    mean, std = grey.mean(), grey.std()
    train_images = grey.sub_(mean).div_(std)
    test_images = torch.from_numpy(stored["test_images"]).float().div_(255).sub_(mean).div_(std)
    train_labels, test_labels = torch.from_numpy(stored["train_labels"]), torch.from_numpy(stored["test_labels"])
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(6, 16, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip
    shards = torch.randperm(len(train_labels)).chunk(CLIENTS)
    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    own_test = slice(rank * len(test_labels) // RANKS, (rank + 1) * len(test_labels) // RANKS)
    progress = open(folder / "rounds.jsonl", "a") if rank == 0 else None  # noqa: SIM115
    for t in range(1000):
        chosen = torch.randperm(CLIENTS)[:PARTICIPANTS]  # the same on both: equal seeds, equal draws
        total = torch.zeros_like(weights)
        generator = torch.Generator().manual_seed(1000 * t + rank)
        for client in chosen[rank::RANKS]:
            nn.utils.vector_to_parameters(weights.clone(), model.parameters())
            optimiser = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE * DECAY**t, weight_decay=WEIGHT_DECAY)
            shard = shards[int(client)]
            for _ in range(EPOCHS):
                for batch in shard[torch.randperm(len(shard), generator=generator)].split(BATCH):
                    optimiser.zero_grad()
                    F.cross_entropy(model(train_images[batch]), train_labels[batch]).backward()
                    optimiser.step()
            total += nn.utils.parameters_to_vector(model.parameters()).detach() / PARTICIPANTS
        distributed.all_reduce(total)
        weights = total
        nn.utils.vector_to_parameters(weights.clone(), model.parameters())
        right = torch.zeros(1)
        with torch.inference_mode():
            for images, labels in zip(
                test_images[own_test].split(1000), test_labels[own_test].split(1000), strict=True
            ):
                right += (model(images).argmax(1) == labels).sum()
        distributed.all_reduce(right)
        if progress is not None:
            print(json.dumps({"test_accuracy": float(right) / len(test_labels)}), file=progress, flush=True)


# Measuring


@dataclass
class Contender:
    """A job that computes only when it is told to, so that several can share the machine in turns of a second.

    Attributes:
        name: of the row.
        rounds: path of a file that gets a line a round.
        seconds: for which the job has been let run.
        ends: `seconds` at the end of every round seen.
        peak: bytes, largest sum of its processes' PSS seen.
    """

    name: str
    job: subprocess.Popen
    rounds: Path
    seconds: float = 0.0
    ends: list[float] = field(default_factory=list)
    peak: int = 0

    def ranks(self) -> list[psutil.Process]:
        """Its processes but for the launcher."""
        family = psutil.Process(self.job.pid).children(recursive=True)
        return [process for process in family if "python" in process.name()]

    def turn(self, seconds: float) -> None:
        """Let it run for so long; ends of rounds are looked for every hundredth of a second."""
        for process in self.ranks():
            process.send_signal(signal.SIGCONT)
        started, before = time.perf_counter(), self.seconds
        while (elapsed := time.perf_counter() - started) < seconds:
            if self.job.poll() is not None:
                raise SystemExit(f"{self.name} ended with {self.job.returncode}: {self.rounds.parent}")
            lines = self.rounds.read_bytes().count(b"\n") if self.rounds.exists() else 0
            self.ends += [before + elapsed] * (lines - len(self.ends))
            time.sleep(0.01)
        for process in self.ranks():
            process.send_signal(signal.SIGSTOP)
        self.seconds = before + time.perf_counter() - started
        self.peak = max(self.peak, proportional_bytes(self.job.pid))

    def round_seconds(self) -> list[float]:
        """Of the rounds after the warm-up."""
        timed = self.ends[WARM_UP - 1 :]
        return [end - start for start, end in pairwise(timed)]

    def end(self) -> None:
        """Stop it for good."""
        for process in [*self.ranks(), psutil.Process(self.job.pid)]:
            process.kill()
        self.job.wait()


def start(name: str, arrays: Path, folder: Path) -> Contender:
    """Start a row's job, which goes on for more rounds than anybody waits for."""
    extra = {"OMP_NUM_THREADS": "1"}
    if name in ROWS:
        config = folder / "round.yaml"
        config.write_text("{}\n")
        settings = [
            x for item in [*COMMON, "rounds=1000", "checkpoint.every=1000", *ROWS[name]] for x in ("--set", item)
        ]
        program = [sys.executable, "-m", "feddip_mpi", "train", str(config), *settings, "--out", str(folder / "run")]
        command, rounds = [*mpirun(RANKS), *program], folder / "run" / "metrics.jsonl"
    else:
        (folder / "data.npz").symlink_to(arrays)
        script = " ".join([sys.executable, __file__, "--plain", str(folder), "--rank"])
        command, rounds = ["bash", "-c", f"{script} 1 & {script} 0; wait"], folder / "rounds.jsonl"
        extra |= _BIG_BLOCKS if name == TUNED else {}
    with open(folder / "log", "w") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **extra})
    return Contender(name, job, rounds)


def series(rows: list[str], rounds: int, arrays: Path, scratch: Path) -> dict:
    """The yardstick and every row in turns, until each has played `rounds` rounds after its warm-up."""
    found: dict = {"load_average": os.getloadavg()[0], "steal": -steal_seconds()}
    contenders: list[Contender] = []
    try:
        for name in [YARDSTICK, *rows]:
            folder = scratch / str(len(contenders))
            folder.mkdir()
            contenders.append(start(name, arrays, folder))
            while len(contenders[-1].ends) < WARM_UP:
                contenders[-1].turn(0.5)
        while any(len(contender.round_seconds()) < rounds for contender in contenders):
            for contender in contenders:  # also those that are done: more rounds do no harm
                contender.turn(1.0)
        for contender in contenders:
            lines = contender.rounds.read_text().splitlines()[: WARM_UP + rounds]
            found[contender.name] = {
                "seconds": contender.round_seconds(),
                "bytes": contender.peak,
                "accuracy": json.loads(lines[-1])["test_accuracy"],
            }
    finally:
        for contender in contenders:
            contender.end()
    found["steal"] += steal_seconds()
    return found


def steal_seconds() -> float:
    """Time that the hypervisor has kept from this machine's cores since it started."""
    return psutil.cpu_times().steal


def save_arrays(path: Path) -> None:
    """Fashion-MNIST as the yardstick reads it."""
    import numpy as np

    from feddip_mpi import config, data

    loaded = data.load(config.parse("{}").data, 0)
    np.savez(
        path,
        train_images=loaded.train_images,
        train_labels=loaded.train_labels,
        test_images=loaded.test_images,
        test_labels=loaded.test_labels,
    )


def table(found: list[dict]) -> str:
    """Medians over all rounds; the ratio is that of the medians of a series."""
    lines = [
        "| | s a round | against plain PyTorch (lowest to highest) | memory, GB | accuracy |",
        "|---|---|---|---|---|",
    ]
    for name in [YARDSTICK, TUNED, *ROWS]:
        having = [one for one in found if name in one]
        if not having:
            continue
        own = [statistics.median(one[name]["seconds"]) for one in having]
        ratios = [s / statistics.median(one[YARDSTICK]["seconds"]) for s, one in zip(own, having, strict=True)]
        memory = max(one[name]["bytes"] for one in having) / 1e9
        accuracy = statistics.median(one[name]["accuracy"] for one in having)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {name} | {statistics.median(own):.2f} | {spread} | {memory:.2f} | {accuracy:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/performance.json"))
    parser.add_argument("--series", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8, help="of each row in a series, after two that do not count")
    parser.add_argument("--rows", nargs="+", choices=[TUNED, *ROWS], default=[TUNED, "FedAvg", "FedDIP 0.95"])
    parser.add_argument("--append", action="store_true")
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        plain_rank(options.rank, options.plain)
        return
    from feddip_mpi import runtime

    hardware = {key: value for key, value in runtime.hardware().items() if key != "host"}
    result = {
        "command": "python benchmarks/round.py",
        "versions": runtime.versions(),
        "hardware": hardware,
        "series": [],
    }
    if options.append and options.out.exists():
        result["series"] = json.loads(options.out.read_text())["series"]
    with tempfile.TemporaryDirectory() as scratch:
        arrays = Path(scratch) / "data.npz"
        save_arrays(arrays)
        for number in range(options.series):
            place = Path(scratch) / f"series-{number}"
            place.mkdir()
            result["series"].append(series(options.rows, options.rounds, arrays, place))
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result["series"]))


if __name__ == "__main__":
    main()
