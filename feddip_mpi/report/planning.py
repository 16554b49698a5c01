"""What a run will do, before it does it: every schedule by round, and the bytes that clients will upload. No MPI."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from typing import Any

from feddip_mpi import codec, data, federation, masks, methods
from feddip_mpi.methods.base import Opening
from feddip_mpi.report import terminal
from feddip_mpi.schedules import plan_round
from feddip_mpi.settings import Config
from feddip_mpi.vector import Layout

Row = dict[str, Any]

_SCREEN_ROWS = 18


def make(config: Config) -> tuple[Layout, list[Row]]:
    """The model's layout, and one row a round in JSON values.

    `round` counts from 1. `sparsity` (share of zeros) and `kept` (weights) are those of the model after the round, as
    a run records them. `regrow` is how many coordinates a client sends from outside the mask. `upload_bytes` (of all
    participants), `total_bytes` (up to here) and `dense_bytes` (the same upload as float32) are what the run will
    record, where the size of masks does not depend on the weights (`Method.counts_are_known`); in rounds with regrow
    coordinates to a few per cent of their indices, and without `upload.entropy`.

    Raises:
        InputError: model and data do not fit, or own data cannot be read.
    """
    shape, classes = data.shape_of(config.data, config.seed)
    model, layout = federation.build_model(config, shape, classes)
    return layout, rows(config, layout, methods.make(config, model, layout, shape).opening())


def rows(config: Config, layout: Layout, opening: Opening | None) -> list[Row]:
    """See `make`; `opening`: what the method sends before the first round, which is counted with it."""
    kept, total, out = first_kept(config, layout), 0, []
    method = methods.named(config.method)
    for t in range(config.rounds):
        plan = plan_round(config, t)
        # Clients encode with the mask as it was before the round; see rounds.upload_rule and codec.encode.
        outside = method.regrown(config, plan, layout, kept)
        rule = codec.Upload(config.upload.values, dense=plan.dense_upload, regrow=outside)
        regrow = 0 if plan.dense_upload else min(rule.regrow, layout.prunable - kept)
        updates = method.updates(rule)
        upload = round(codec.expected_bytes(updates, kept, layout.prunable, layout.size) * config.participants)
        for extra in method.extras(config, plan, rule):
            upload += round(codec.expected_bytes(extra, kept, layout.prunable, layout.prunable) * config.participants)
        if opening is not None and t == 0:
            upload += len(opening.clients) * sum(codec.FRAME_BYTES + 4 * size for size in opening.sizes)
        total += upload
        if plan.update_mask:  # server.new_mask: a mask never grows in size
            kept = min(kept, masks.kept_count(layout.prunable, plan.sparsity))
        out.append(
            {
                "round": t + 1,
                "sparsity": 1 - kept / layout.prunable if layout.prunable else 0.0,
                "kept": kept,
                "penalty": plan.penalty,
                "learning_rate": plan.learning_rate,
                "mask_update": plan.update_mask,
                "regrow": regrow,
                "upload_bytes": upload,
                "total_bytes": total,
                "dense_bytes": 4 * layout.size * config.participants,
                "evaluate": plan.evaluate,
                "checkpoint": plan.checkpoint,
            }
        )
    return out


def first_kept(config: Config, layout: Layout) -> int:
    """Weights inside the first mask."""
    return masks.kept_count(layout.prunable, methods.named(config.method).first_sparsity(config))


def title(config: Config) -> str:
    """One line over a picture of the plan."""
    what = f"{config.method}: {config.model.name} on {config.data.name}"
    return f"Plan of {what}, {config.participants} of {config.clients} clients a round"


def show(config: Config, layout: Layout, plan: Sequence[Row], every: int | None = None) -> None:
    """The plan as a table that fits a screen, and its totals.

    Args:
        every: show every n-th round; None: mask updates, as many as fit.
    """
    numbers = ("round ", "sparsity", "kept", "penalty", "rate", "regrow", "upload", "total")
    shown = select(plan, every)
    title = (
        f"{config.method}: {config.model.name} on {config.data.name}, {layout.prunable:,} of {layout.size:,} values "
        f"prunable;\n{len(shown)} of {len(plan)} rounds{', * renews the mask' if any(r['mask_update'] for r in plan) else ''}"
    )
    table = terminal.table(*numbers, right=numbers)
    for row in shown:
        table.add_row(
            f"{row['round']}{'*' if row['mask_update'] else ' '}",
            f"{row['sparsity']:.4f}",
            f"{row['kept']:,}",
            f"{row['penalty']:.1e}",
            f"{row['learning_rate']:.4f}",
            f"{row['regrow']:,}" if row["regrow"] else "-",
            terminal.size(row["upload_bytes"]),
            terminal.size(row["total_bytes"]),
        )
    terminal.print_tables(title, table, summary(config, plan))


def summary(config: Config, plan: Sequence[Row]) -> str:
    """The totals, in a few lines."""
    size = terminal.size
    total, dense = plan[-1]["total_bytes"], sum(row["dense_bytes"] for row in plan)
    updates = [row["round"] for row in plan if row["mask_update"]]
    known = methods.named(config.method).counts_are_known(config)
    lines = [
        *textwrap.wrap(f"{config.method}: {methods.named(config.method).summary}", 78),
        _mask_text(config, updates, plan[-1]["sparsity"]),
        *_regrow_text(config, plan),
        *([] if known else _estimated(config)),
        f"uploads: {size(total)} by {config.participants} of {config.clients} clients a round, "
        f"{size(total / len(plan) / config.participants)} each on average",
        f"dense float32 would take {size(dense)}: {dense / max(1, total):.1f} times as much",
    ]  # fmt: skip
    return "\n".join(lines)


def _estimated(config: Config) -> list[str]:
    """Said where training decides how many weights are kept, and whether it decides so at the end, too."""
    asked_for = methods.named(config.method).ends_at_final(config)
    when = "kept on the way" if asked_for else "kept, also at the end,"
    return textwrap.wrap(
        f"an estimate: how many weights are {when} comes out of the training; planned is what sparsity.* asks for", 78
    )


def _mask_text(config: Config, updates: Sequence[int], sparsity: float) -> str:
    """When masks are made, and the share of zeros that they come to."""
    masking = methods.named(config.method).masking
    if masking == "none":
        return "no mask: every weight is kept and travels"
    if masking == "fixed" and not updates:
        return f"one mask, made before the first round, stays: sparsity {sparsity:.6f} in every round"
    last = f", the last in round {updates[-1]}" if updates else ""
    return f"{len(updates)} mask update{'s' * (len(updates) != 1)}{last}; final sparsity {sparsity:.6f}"


def _regrow_text(config: Config, plan: Sequence[Row]) -> list[str]:
    """Said where clients were to send coordinates from outside the mask, and so few weights are kept that it comes to none."""
    pruned_before = itertools.pairwise(plan)
    rows = [row for before, row in pruned_before if before["sparsity"] > 0]
    asked = [row for row in rows if (p := plan_round(config, row["round"] - 1)).regrow > 0 and not p.dense_upload]
    if not asked or any(row["regrow"] for row in asked):
        return []
    return [
        f"upload.regrow={config.upload.regrow:g} of so few kept weights rounds to 0 in all {len(asked)} rounds that ask for it: "
        "nothing outside the mask is sent (a larger upload.regrow sends some)"
    ]


def select(plan: Sequence[Row], every: int | None = None, most: int = _SCREEN_ROWS) -> list[Row]:
    """The rows worth showing: every n-th, or else the mask updates thinned to `most`; the first and the last always."""
    if every is not None:
        chosen = [row for row in plan if row["round"] % every == 0]
    elif len(plan) <= most:
        chosen = list(plan)
    else:
        chosen = _thinned([row for row in plan if row["mask_update"]] or list(plan), most - 2)
    rounds = {plan[0]["round"], plan[-1]["round"], *(row["round"] for row in chosen)}
    return [row for row in plan if row["round"] in rounds]


def _thinned(rows: Sequence[Row], most: int) -> list[Row]:
    """At most `most` rows, evenly spaced, first and last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[i * (len(rows) - 1) // (most - 1)] for i in range(most)]
