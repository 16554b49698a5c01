"""The run in a few numbers: what `finished.json` holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from feddip_mpi import metrics, runtime
from feddip_mpi.federation import Federation
from feddip_mpi.metrics import Record

# In the order in which they are written.
FIELDS = {
    "rounds": "finished rounds",
    "ranks": "MPI ranks at the end",
    "ranks_lost": "ranks of the start that have died",
    "test_accuracy": "top-1 accuracy of the pruned model on the test images, after the last round",
    "test_accuracy_mean_of_last_5": (
        "mean of the last five evaluations, without models that keep over 5 % more or fewer weights than the last"
    ),
    "test_accuracy_spread_of_last_5": "the highest of these less the lowest",
    "evaluations_in_mean": "how many they are; fewer than five in a short run",
    "server_remembers": "whether the server's memory W holds weights that the pruned model lacks (`server_memory: on`)",
    "dense_memory_accuracy": "accuracy of that memory W without the mask; the pruned model's where nothing is remembered",
    "sparsity": "share of zeros of the mask among the prunable weights; a weight inside the mask may be zero too",
    "sparsity_by_layer": "the same for each prunable tensor",
    "upload_bytes": "uploads of all clients in all rounds, frames included, and what was sent before the first round",
    "dense_bytes": "the same uploads as dense float32",
    "exchange": "the exchange as configured",
    "upload_bytes_by_kind": "the updates in these: values, indices, values that are not prunable, frames",
    "upload_extra_bytes": "the rest of the uploads: what the method sends besides updates",
    "download_bytes": "sums that owners of slices hand on (`exchange: sharded`)",
    "wire_bytes": "bytes that ranks sent to each other for updates",
    "received_bytes": "bytes that ranks received from each other for updates",
    "seconds": "sum of the rounds' seconds, evaluations and waiting for checkpoints included, the start not",
    "idle_share": "share of all ranks' time in which they waited for slower ones; null where it was not measured",
    "peak_host_memory_bytes": "peak host memory of all ranks together; what ranks of a node share (the data) counts for each",
    "versions": "of the program and of what it runs on",
    "mpi": "the MPI library",
    "hardware": "processor, cores, host",
    "device": "what trained",
    "seed": "of the run",
}


def reference() -> str:
    """The names as a Markdown table."""
    return "\n".join(["| name | meaning |", "|---|---|", *(f"| `{n}` | {text} |" for n, text in FIELDS.items())]) + "\n"


def summarise(
    built: Federation, history: Sequence[Record], accuracy: float, memory_accuracy: float, mask: Tensor
) -> dict[str, Any]:
    """The values of `FIELDS`, and what the method adds (`Method.facts`), in JSON types.

    Args:
        history: the records of all rounds.
        accuracy, memory_accuracy: of the pruned model and of W, in [0, 1].
        mask: bool [P], the last one.
    """
    last = history[-1]
    # The last rounds' mean goes beside the last value: one round's accuracy is noisy.
    scored = metrics.last_accuracies(history) or [accuracy]
    uploaded, dense = (sum(r[name] for r in history) for name in ("upload_bytes", "dense_bytes"))
    return {
        "rounds": last["round"],
        "ranks": built.comm.size,
        "ranks_lost": built.comm.lost_ranks,
        "test_accuracy": accuracy,
        "test_accuracy_mean_of_last_5": sum(scored) / len(scored),
        "test_accuracy_spread_of_last_5": max(scored) - min(scored),
        "evaluations_in_mean": len(scored),
        "server_remembers": built.method.memory(last["round"] - 1) == "on" and not bool(mask.all()),
        "dense_memory_accuracy": memory_accuracy,
        "sparsity": last["sparsity"],
        "sparsity_by_layer": last["sparsity_by_layer"],
        "upload_bytes": uploaded,
        "dense_bytes": dense,
        "exchange": built.config.exchange,
        "upload_bytes_by_kind": {
            kind: sum(r[f"upload_{kind}_bytes"] for r in history) for kind in metrics.KINDS_OF_BYTES
        },
        "upload_extra_bytes": sum(metrics.bytes_besides(r) for r in history),
        "download_bytes": sum(r[f"download_{kind}_bytes"] or 0 for r in history for kind in metrics.KINDS_OF_BYTES),
        "wire_bytes": sum(r["wire_bytes"] for r in history),
        "received_bytes": sum(r["received_bytes"] for r in history),
        "seconds": sum(r["round_seconds"] for r in history),
        "idle_share": _idle_share(history),
        "peak_host_memory_bytes": max(r["host_memory_bytes"] for r in history),
        **built.method.facts(mask),
        "versions": runtime.versions(),
        "mpi": built.comm.library(),
        "hardware": runtime.hardware(),
        "device": runtime.device_name(built.device),
        "seed": built.config.seed,
    }


def _idle_share(history: Sequence[Record]) -> float | None:
    """Of the ranks' time the share in which they waited for slower ones; None where that was not measured."""
    told = [r for r in history if r.get("idle_seconds") is not None]  # a checkpoint of an older version does not say
    return sum(r["idle_seconds"] for r in told) / sum(r["round_seconds"] for r in told) if told else None


if __name__ == "__main__":
    print(reference(), end="")
