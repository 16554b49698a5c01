r"""Where the time of one round goes: the operations by torch.profiler, a trace, and a flame graph picture.

    python benchmarks/profile_round.py [--rows "FedAvg"] [--out docs/results/profile.json] [--trace FILE.json.gz]
    py-spy record --native --rate 200 --format flamegraph -o docs/results/round-flame.svg -- \
        python benchmarks/profile_round.py --plain 6

One rank, one thread, the workload of benchmarks/round.py. `--plain N` only plays N rounds, for a profiler from outside;
py-spy is a package of its own and no part of the environment. The trace opens in chrome://tracing or ui.perfetto.dev and
is that of one client with one local epoch, which keeps it small.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch

from feddip_mpi import collectives, config, rounds, runtime, session
from feddip_mpi.schedules import plan_round

WORKLOAD = ["clients=50", "participants=5", "local_epochs=5", "batch_size=128", "rounds=100"]
ROWS = {
    "FedAvg": ["method=fedavg", "upload.values=fp32"],
    "FedDIP 0.95": ["sparsity.final=0.95", "sparsity.schedule=constant", "mask.every=2", "mask.freeze_after=1.0"],
}
# What an operation belongs to; the first that fits.
TERMS = {
    "convolutions, backward": ("convolution_backward",),
    "convolutions, forward": ("mkldnn_convolution", "convolution"),
    "pooling with its gradient": ("max_pool", "maximum", "eq", "_ConvPoolReLU"),
    "linear layers": ("aten::mm", "addmm"),
}


class Playing:
    """A federation on one rank, and its state."""

    def __init__(self, row: str, *more: str) -> None:
        runtime.prepare_mpi()
        settings = config.parse("{}", [*WORKLOAD, *ROWS[row], *more])
        self.federation = session.build(collectives.world(), settings)
        self.state = rounds.initial_state(self.federation)

    def round(self) -> dict:
        plan = plan_round(self.federation.config, self.state.server.round)
        return rounds.play(self.federation, self.state, plan)


def term_of(name: str) -> str:
    return next((term for term, parts in TERMS.items() if any(part in name for part in parts)), "all else")


def profiled(row: str) -> dict:
    """The third round: seconds by phase, and seconds by operation and by term."""
    playing = Playing(row)
    for _ in range(2):
        playing.round()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        record = playing.round()
    own = {event.key: event.self_cpu_time_total / 1e6 for event in profile.key_averages()}
    total, terms = sum(own.values()), dict.fromkeys([*TERMS, "all else"], 0.0)
    for name, seconds in own.items():
        terms[term_of(name)] += seconds
    first = sorted(own.items(), key=lambda item: -item[1])[:15]
    return {
        "seconds in operations": total,
        "share by term": {name: seconds / total for name, seconds in terms.items()},
        "largest operations": {name: seconds / total for name, seconds in first},
        "phases": {key: value for key, value in record.items() if key.endswith("_seconds")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--out", type=Path, default=Path("docs/results/profile.json"))
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--plain", type=int, default=0, metavar="N")
    options = parser.parse_args()
    if options.plain:
        playing = Playing(options.rows[0])
        for _ in range(options.plain):
            playing.round()
        return
    hardware = {key: value for key, value in runtime.hardware().items() if key != "host"}
    result: dict = {
        "command": "python benchmarks/profile_round.py",
        "versions": runtime.versions(),
        "hardware": hardware,
    }
    result["load_average"] = os.getloadavg()[0]
    for row in options.rows:
        result[row] = profiled(row)
        print(row, json.dumps(result[row]["share by term"], indent=1))
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.trace:
        playing = Playing(options.rows[0], "participants=1", "local_epochs=1")
        playing.round()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            playing.round()
        profile.export_chrome_trace(str(options.trace))


if __name__ == "__main__":
    main()
