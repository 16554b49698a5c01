"""Evaluate a saved model again: on other ranks, another device, or with a client by client report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from feddip_mpi import checkpoint, config, scoring, server, session
from feddip_mpi.checkpoint import Loaded
from feddip_mpi.collectives import Communicator
from feddip_mpi.federation import Federation
from feddip_mpi.report import terminal

# What says how and where to evaluate, and nothing that would make it another model or other data.
ALLOWED_KEYS = ("data.path", "data.download", "eval.batch_size", "eval.clients", "device", "threads")
_CLIENT_ROWS = 20


def evaluate(comm: Communicator, path: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Scores of the truly pruned model of a checkpoint on the global test set; the same on every rank.

    Args:
        path: a checkpoint, or a run folder (its newest good checkpoint is taken).
        overrides: KEY=VALUE, of ALLOWED_KEYS.

    Returns:
        JSON values; `recorded_accuracy` is what the run itself measured after this round, None if it did not.

    Raises:
        InputError: no checkpoint, a key that may not change, or other data or another model than it was trained on.
        DamagedFileError: the checkpoint cannot be read.
    """
    held: list[Loaded] = []

    def read() -> list[Any]:
        found, refused = checkpoint.find(Path(path))
        held.append(found)
        return [config.to_dict(config.override(found.config, overrides, ALLOWED_KEYS, "an evaluation")), refused]

    values, refused = session.on_root(comm, read)
    if comm.rank == 0:
        terminal.warn_refused(refused)
    # What a run trains with is of no matter here: an evaluation is float32, and one model after another.
    built = session.build(comm, config.override(config.validate(values), ["precision=fp32", "clients_at_once=1"]))
    session.on_root(comm, lambda: session.check_same(built, held[0]))
    weights = server.pruned(held[0].server.weights, held[0].server.mask).numpy() if held else None
    scores = scoring.score_model(built, torch.from_numpy(comm.broadcast_array(weights)).to(built.device))
    own = {
        "test_loss": scores.loss,
        "test_accuracy": scores.top1,
        "test_accuracy_top5": scores.top5,
        "client_accuracy": None if scores.by_client is None else list(scores.by_client),
        "client_images": None if scores.by_client is None else [len(part) for part in built.partition.test],
    }
    result: dict[str, Any] = session.on_root(comm, lambda: {**_about(built, held[0]), **own})
    return result


def _about(built: Federation, loaded: Loaded) -> dict[str, Any]:
    mask = loaded.server.mask
    return {
        "checkpoint": str(loaded.path),
        "round": loaded.server.round,
        "model": loaded.config.model.name,
        "data": loaded.identity,
        "images": len(built.dataset.test_labels),
        "sparsity": 1 - int(mask.sum()) / max(1, mask.numel()),
        "recorded_accuracy": loaded.history[-1]["test_accuracy"] if loaded.history else None,
        "ranks": built.comm.size,
        "device": built.device.type,
    }


def show(result: dict[str, Any]) -> None:
    """The result as a table on stdout."""
    numbers = terminal.table()
    for name, value in _rows(result):
        numbers.add_row(name, value)
    parts = [f"Round {result['round']}: {result['model']} on {result['images']:,} test images", numbers]
    if result["client_accuracy"] is not None:
        parts += _clients(result["client_accuracy"], result["client_images"])
    terminal.print_tables(*parts)


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    recorded = result["recorded_accuracy"]
    if recorded is None:
        remark = "not measured after this round"
    elif recorded == result["test_accuracy"]:
        remark = f"{recorded:.4f}, the same"
    else:
        remark = f"{recorded:.4f}: differs; another kind of device, thread count or batch size?"
    return [
        ("accuracy, top-1", f"{result['test_accuracy']:.4f}"),
        ("accuracy, top-5", f"{result['test_accuracy_top5']:.4f}"),
        ("loss", f"{result['test_loss']:.4f}"),
        ("sparsity", f"{result['sparsity']:.4f}"),
        ("accuracy recorded by the run", remark),
        ("checkpoint", result["checkpoint"]),
    ]


def _clients(accuracy: Sequence[float | None], images: Sequence[int]) -> list[Any]:
    """Every client where they are few; else those that the model serves worst."""
    order = [c for c, value in enumerate(accuracy) if value is not None]
    values = sorted(accuracy[c] for c in order)  # type: ignore[type-var]
    title = "Accuracy on each client's own test images"
    if len(order) > _CLIENT_ROWS:
        order = sorted(order, key=lambda c: (accuracy[c], c))[:_CLIENT_ROWS]
        title += f" (lowest {_CLIENT_ROWS} of {len(values)} clients)"
    if values:
        mean = sum(values) / len(values)  # type: ignore[arg-type]
        title += f"\nmin {values[0]:.4f}, median {values[len(values) // 2]:.4f}, mean {mean:.4f}, max {values[-1]:.4f}"
    made = terminal.table("client", "images", "accuracy", right=("client", "images", "accuracy"))
    for client in order:
        made.add_row(str(client), f"{images[client]:,}", f"{accuracy[client]:.4f}")
    return [title, made]
