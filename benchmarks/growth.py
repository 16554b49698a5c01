"""Seconds and memory of a round as the federation and the model grow: N clients, K participants, n weights.

    python benchmarks/growth.py [--only clients|participants|weights|residuals] [--out docs/results/growth.json]

Two ranks with one thread each. Every client has four images, so that local training is as short as it can be and what
the rest of a round costs is seen. Curves that are not run again stay in the result file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from watch import mpirun, watched

from feddip_mpi import runtime

RANKS, IMAGES, WARM_UP = 2, 4, 3
_PHASES = ("train", "encode", "wait", "exchange", "decode", "server", "evaluate")
_SMALL = {"data.synthetic.shape": "[1, 28, 28]", "model.name": "lenet5", "rounds": 23}
_LARGE = {"data.synthetic.shape": "[3, 32, 32]", "clients": 20, "participants": 4, "rounds": 9}
# Points by curve: name of the point, settings.
CURVES: dict[str, dict[str, dict]] = {
    "clients": {f"N = {n}": {**_SMALL, "clients": n, "participants": 10} for n in (50, 500, 5000)},
    "participants": {f"K = {k}": {**_SMALL, "clients": 200, "participants": k} for k in (5, 20, 100)},
    "weights": {
        "lenet5": {**_LARGE, "model.name": "lenet5"},
        "resnet18": {**_LARGE, "model.name": "resnet18"},
        "alexnet": {**_LARGE, "model.name": "alexnet"},
    },
    # Every client takes part in every round: each has a residual from the first round on.
    "residuals": {
        "lenet5, N = 1000": {**_SMALL, "clients": 1000, "participants": 1000, "rounds": 4},
        "lenet5, N = 1000, 16 MB a rank": {
            **_SMALL, "clients": 1000, "participants": 1000, "rounds": 4, "upload.residual_memory": 16,
        },
        "alexnet, N = 20": {**_LARGE, "model.name": "alexnet", "participants": 20, "rounds": 4},
        "alexnet, N = 20, 128 MB a rank": {
            **_LARGE, "model.name": "alexnet", "participants": 20, "rounds": 4, "upload.residual_memory": 128,
        },
    },
}  # fmt: skip


def point(settings: dict) -> dict:
    """One run; medians over its rounds but the first few, peak memory of the whole job."""
    clients = settings["clients"]
    common = {
        "data.name": "synthetic",
        "data.synthetic.train_samples": IMAGES * clients,
        "data.synthetic.test_samples": 100,
        "local_epochs": 1,
        "checkpoint.every": settings["rounds"],
        "sparsity.final": 0.95,
        "sparsity.schedule": "constant",
        "mask.every": 2,
    }
    arguments = [f"{key}={value}" for key, value in {**common, **settings}.items()]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "empty.yaml").write_text("{}\n")
        command = [*mpirun(RANKS), sys.executable, "-m", "feddip_mpi", "train", str(folder / "empty.yaml")]
        command += [x for item in arguments for x in ("--set", item)] + ["--out", str(folder / "run")]
        peak = watched(command, folder / "log")
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    skipped = min(WARM_UP, len(lines) - 2)
    timed = lines[skipped:-1]  # the last one saves
    return {
        "settings": arguments,
        "load_average": os.getloadavg()[0],
        "round_seconds": statistics.median(line["round_seconds"] for line in timed),
        **{f"{name}_seconds": statistics.median(line[f"{name}_seconds"] for line in timed) for name in _PHASES},
        "upload_bytes": statistics.median(line["upload_bytes"] for line in timed),
        "control_bytes": statistics.median(line["control_bytes"] for line in timed),
        "checkpoint_seconds": lines[-1]["checkpoint_seconds"],
        "memory_bytes": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/growth.json"))
    parser.add_argument("--only", choices=CURVES, nargs="+", default=list(CURVES))
    options = parser.parse_args()
    hardware = {key: value for key, value in runtime.hardware().items() if key != "host"}
    result = {
        "command": "python benchmarks/growth.py",
        "versions": runtime.versions(),
        "hardware": hardware,
        "curves": {},
    }
    if options.out.exists():
        result["curves"] = json.loads(options.out.read_text())["curves"]
    print("| point | ms a round | train | encode | exchange | decode | server | evaluate | save | MB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for curve in options.only:
        result["curves"][curve] = {}
        for name, settings in CURVES[curve].items():
            found = result["curves"][curve][name] = point(settings)
            phases = [
                found[f"{phase}_seconds"] for phase in ("train", "encode", "exchange", "decode", "server", "evaluate")
            ]
            shown = [found["round_seconds"], *phases, found["checkpoint_seconds"]]
            print(
                f"| {name} | {' | '.join(f'{1e3 * s:.1f}' for s in shown)} | {found['memory_bytes'] / 1e6:.0f} |",
                flush=True,
            )
            options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
