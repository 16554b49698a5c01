"""Run folders made by hand: every number is known, nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from feddip_mpi import config, metrics

LAYERS = ("conv.weight", "fc.weight")


def make(path: Path, seed: int = 1, accuracy: float = 0.5, **more: Any) -> Path:
    """A finished run of three rounds.

    Args:
        accuracy: after the last round; 0.2 and 0.1 less after the first and the second.
        more: `processor`, `ranks`, `seconds` (of a round), `upload` (bytes of a round), `sparsity`, `clients` (accuracies),
            `finished` (False: the run is not), `keys` (of the configuration, dotted).
    """
    keys = {
        "rounds": 3,
        "clients": 4,
        "participants": 2,
        "data.name": "synthetic",
        "seed": seed,
        **more.get("keys", {}),
    }
    settings = config.parse("", [f"{key}={value}" for key, value in keys.items()])
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(config.to_yaml(settings))
    rows = [_row(number, accuracy, more) for number in range(1, settings.rounds + 1)]
    (path / "metrics.jsonl").write_text("".join(metrics.to_line(row) + "\n" for row in rows))
    if more.get("finished", True):
        (path / "finished.json").write_text(json.dumps(_summary(rows, settings.seed, more)))
    return path


def fail(folder: Path, error: str = "client 1 (rank 0) diverged in round 1: loss nan") -> None:
    """The log of a run that has ended with an error."""
    lines = (
        "2026-11-27 01:32:22,393 rank 0 INFO round 1/3  accuracy 0.1",
        f"2026-11-27 01:32:22,749 rank 0 INFO error: {error}",
    )
    (folder / "run.log").write_text("".join(line + "\n" for line in lines))


def _row(number: int, accuracy: float, more: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(metrics.FIELDS)
    sparsity = more.get("sparsity", 0.9)
    row |= {name: 0 for name, field in metrics.FIELDS.items() if field.kind == "int"}
    row |= {name: 0.1 for name, field in metrics.FIELDS.items() if field.kind == "float"}
    seconds = more.get("seconds", 2.0)
    row |= {
        "round": number,
        "participants": [0, 1],
        "test_accuracy": accuracy - 0.1 * (3 - number),
        "sparsity": sparsity if number > 1 else 0.0,
        "sparsity_by_layer": {name: sparsity * place for place, name in enumerate(LAYERS)},
        "mask_updated": int(sparsity > 0 and number == 2),
        "mask_grown": 10 if number == 2 else 0,
        "mask_pruned": 30 if number == 2 else 0,
        "penalty": 0.001 * number if sparsity else 0.0,
        "pruning_error": 0.25 if sparsity else 0.0,
        "upload_bytes": more.get("upload", 100),
        "upload_values_bytes": more.get("upload", 100) - 20,
        "upload_frame_bytes": 20,
        "dense_bytes": 1000,
        "train_seconds": seconds / 2,
        "evaluate_seconds": seconds / 4,
        "round_seconds": seconds,
        "ranks": more.get("ranks", 1),
        "samples": 80,
        "host_memory_bytes": 10**8 + number,
        "client_accuracy": more.get("clients"),
    }
    return row


def _summary(rows: list[dict[str, Any]], seed: int, more: dict[str, Any]) -> dict[str, Any]:
    scored = metrics.last_accuracies(rows)
    return {
        "rounds": len(rows),
        "ranks": rows[-1]["ranks"],
        "test_accuracy": scored[-1],
        "test_accuracy_mean_of_last_5": sum(scored) / len(scored),
        "evaluations_in_mean": len(scored),
        "upload_bytes": sum(row["upload_bytes"] for row in rows),
        "dense_bytes": sum(row["dense_bytes"] for row in rows),
        "seconds": sum(row["round_seconds"] for row in rows),
        "versions": {"feddip_mpi": "1.0", "torch": "2.0"},
        "mpi": "Some MPI v1, more",
        "hardware": {"host": "h", "processor": more.get("processor", "CPU X"), "cores": 2},
        "device": "CPU",
        "seed": seed,
    }


def study(folder: Path) -> Path:
    """Two methods, two sparsities, two seeds: dense 0.80 and 0.84, pruned 0.7 and 0.6 plus 0 and 0.02."""
    dense = {"method": "fedavg", "upload.values": "fp32", "sparsity.initial": 0, "sparsity.final": 0}
    for seed, more in ((1, 0.0), (2, 0.02)):
        make(folder / f"fedavg-{seed}", seed, 0.8 + 2 * more, keys=dense, sparsity=0.0, upload=1000, seconds=3.0)
        for share, accuracy in ((0.9, 0.7), (0.95, 0.6)):
            make(
                folder / f"feddip-{share}-{seed}", seed, accuracy + more, keys={"sparsity.final": share}, sparsity=share,
                clients=[0.1, None, 0.5, 0.9],
            )  # fmt: skip
    return folder
