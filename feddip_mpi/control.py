"""Adaptive control (beyond the paper, off by default): the coordinator changes the plan by what the rounds measured.

A decision is a pure function of the configuration and the history. The history is in the checkpoint, each decision is
in its round's record, so a resumed run decides as one that never stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

from feddip_mpi import methods
from feddip_mpi.metrics import Record
from feddip_mpi.schedules import Control, last_mask_update, updates_mask
from feddip_mpi.settings import Config

# One step of the penalty's factor and how far it may go in all; steps are small because cuts are rare.
_PENALTY_STEP, _PENALTY_LIMIT = 1.25, 4.0
_SMALLEST_REGROW = 1 / 64


def decide(config: Config, history: Sequence[Record]) -> Control:
    """What to change in the round after `history` (all finished rounds).

    - `control.mask_delay`: a mask update that is due waits, at most so many rounds, while the train loss is above
      `control.loss_tolerance` times the loss before the last update: the model has not recovered from that one. The
      last update of a run never waits.
    - `control.pruning_error`: after each cut the penalty's factor goes up by a quarter if the cut lost more than this
      share of ||v||^2, and down if it lost less than half of it; the factor stays within 1/4 and 4.
    - `control.upload_bytes`: the regrow share halves after a round in which a participant sent more than this on the
      mean, and doubles, up to what is configured, after a mask update that stayed below 80 % of it.

    What a method does not have (no penalty, no regrow by `upload.regrow`, a mask that changes in all rounds) stays as it is.
    """
    method = methods.named(config.method)
    if not history or method.masking != "scheduled":
        return Control()
    waits, due = _mask(config, history) if method.waits else (False, False)
    return Control(
        penalty_scale=_penalty_scale(config, history[-1]) if method.penalised else 1.0,
        regrow_scale=_regrow_scale(config, history[-1]) if method.regrows else 1.0,
        mask_waits=waits,
        mask_due=due,
    )


def _mask(config: Config, history: Sequence[Record]) -> tuple[bool, bool]:
    """(an update that is due waits, an update that has waited is due)."""
    finished = len(history) + 1
    last = last_mask_update(config.rounds, config.mask.freeze_after)
    waited = 0
    while waited < len(history) and history[-1 - waited]["mask_delayed"]:
        waited += 1
    pending = waited > 0
    due = pending or updates_mask(config, finished)
    may_wait = due and finished < last and waited < config.control.mask_delay
    return may_wait and not _recovered(config, history), pending and finished <= last


def _recovered(config: Config, history: Sequence[Record]) -> bool:
    """Whether the train loss is back near what it was in the round of the last update, before its cut."""
    before = next((record["train_loss"] for record in reversed(history) if record["mask_updated"]), None)
    return before is None or bool(history[-1]["train_loss"] <= config.control.loss_tolerance * before)


def _penalty_scale(config: Config, last: Record) -> float:
    scale, target = float(last["penalty_scale"]), config.control.pruning_error
    if target is None or not last["mask_updated"]:
        return scale
    if last["pruning_error"] > target:
        return min(_PENALTY_LIMIT, scale * _PENALTY_STEP)
    return max(1 / _PENALTY_LIMIT, scale / _PENALTY_STEP) if last["pruning_error"] < target / 2 else scale


def _regrow_scale(config: Config, last: Record) -> float:
    scale, budget = float(last["regrow_scale"]), config.control.upload_bytes
    if budget is None:
        return scale
    sent = last["upload_bytes"] / len(last["participants"])
    if sent > budget and last["upload_indices_bytes"]:  # what regrow did not send it cannot save
        return max(_SMALLEST_REGROW, scale / 2)
    return min(1.0, scale * 2) if last["mask_updated"] and sent < 0.8 * budget else scale
