"""Schedules: pure functions of the round. A checkpoint holds the round, never a schedule's state.

Rounds are counted t = 0..T-1 while they run; "finished" counts those that are done, 0..T. The mask update of
round t sees the sparsity of t + 1 finished rounds, so the update of the last round reaches the final sparsity.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from feddip_mpi import methods
from feddip_mpi.settings import PUBLISHED_PENALTY, Config, PenaltyConfig, SparsityConfig
from feddip_mpi.streams import stream


def last_mask_update(rounds: int, freeze_after: float) -> int:
    """How many rounds are finished when the mask is cut for the last time: 1..rounds."""
    return max(1, min(rounds, ceil(freeze_after * rounds - 1e-9)))


def updates_mask(config: Config, finished: int) -> bool:
    """Whether the round that brings the count to `finished` renews the mask."""
    last = last_mask_update(config.rounds, config.mask.freeze_after)
    return finished == last or (finished < last and _counted(config, finished) % config.mask.every == 0)


def sparsity_asked(config: Config, finished: int) -> float:
    """s_t of a run after `finished` rounds; s_p from the last mask update on."""
    last = last_mask_update(config.rounds, config.mask.freeze_after)
    return sparsity(config.sparsity, finished if finished >= last else _counted(config, finished), last)


def _counted(config: Config, finished: int) -> int:
    """How many finished rounds the calendar of mask updates counts."""
    return methods.named(config.method).counted(config, finished)


def sparsity(schedule: SparsityConfig, finished: int, horizon: int) -> float:
    """s after `finished` rounds, reaching s_p at `horizon` (cubic: Zhu & Gupta 2017, eq. 1)."""
    start, final = schedule.initial, schedule.final
    progress = min(1.0, finished / horizon)
    if schedule.schedule == "constant" or progress >= 1:
        return final
    if schedule.schedule == "one_shot":
        return start
    power = 3 if schedule.schedule == "cubic" else 1
    return final + (start - final) * (1 - progress) ** power


def penalty(schedule: PenaltyConfig, t: int, rounds: int) -> float:
    """lambda in round t of `rounds`: 0 <= lambda <= maximum (FedDIP, incremental regularisation).

    steps: Q equal steps, 0 in the first and the maximum in the last segment, for any number of rounds.
    published: the published code's 20 segments of floor(rounds / 20) rounds, 0 first, then from 5e-4 up.
    """
    maximum, steps = schedule.maximum, schedule.steps
    if schedule.schedule == "off":
        return 0.0
    if schedule.schedule == "constant":
        return maximum
    if schedule.schedule == "linear":
        return maximum * t / max(1, rounds - 1)
    if schedule.schedule == "published":
        length = rounds // 20
        segment = min(19, t // length) if length else 19  # the remainder, here all rounds, goes to the last one
        rise = (maximum - PUBLISHED_PENALTY) * (segment - 1) / 19
        return 0.0 if segment == 0 else PUBLISHED_PENALTY + rise
    return maximum if steps == 1 else maximum * (steps * t // rounds) / (steps - 1)


def learning_rate(config: Config, t: int) -> float:
    """eta_t = eta_0 * gamma ** t."""
    return config.learning_rate * config.learning_rate_decay**t


def regrow(config: Config, finished: int, update_mask: bool) -> float:
    """Coordinates to send from outside the mask, as a fraction of the kept ones, in the round that ends as `finished`.

    After the last mask update nothing sent could enter the mask, so nothing is sent.
    """
    last = last_mask_update(config.rounds, config.mask.freeze_after)
    if finished > last or config.server_memory == "published":
        return 0.0
    if config.upload.regrow_rounds == "mask_updates" and not update_mask:
        return 0.0
    scale = 1.0 if config.upload.regrow_schedule == "constant" else 1 - finished / last
    return config.upload.regrow * scale


def evaluates(config: Config, finished: int) -> bool:
    """Whether the model is evaluated after so many finished rounds."""
    return finished == config.rounds or finished % config.eval.every == 0


def participants(config: Config, t: int) -> tuple[int, ...]:
    """K of the N clients, drawn without replacement, in ascending order."""
    draw = stream(config.seed, "participants", t).choice(config.clients, config.participants, replace=False)
    return tuple(sorted(int(client) for client in draw))


@dataclass(frozen=True)
class Control:
    """What adaptive control changes in a round; the default changes nothing.

    Attributes:
        penalty_scale, regrow_scale: factors on lambda_t and on the regrow share.
        mask_waits: a mask update that is due does not take place.
        mask_due: a mask update that has waited is due.
    """

    penalty_scale: float = 1.0
    regrow_scale: float = 1.0
    mask_waits: bool = False
    mask_due: bool = False


NO_CONTROL = Control()


@dataclass(frozen=True)
class RoundPlan:
    """What rank 0 decides about a round and tells every rank, in plain JSON types.

    Attributes:
        round: t, counted from 0.
        learning_rate, penalty: eta_t and lambda_t.
        sparsity: asked of the mask after this round.
        update_mask: whether the mask is renewed at the end of the round.
        regrow: coordinates sent from outside the mask, as a fraction of the kept weights.
        dense_upload: every prunable coordinate travels.
        participants: client ids in ascending order.
        evaluate, checkpoint: whether the round ends with an evaluation, with a checkpoint.
        exchange: how updates reach all ranks ("allgatherv", "sharded", "node", "dense"); chosen where asked "auto".
        penalty_scale, regrow_scale: what adaptive control has multiplied lambda_t and the regrow share by.
        mask_delayed: adaptive control lets a due mask update wait.
    """

    round: int
    learning_rate: float
    penalty: float
    sparsity: float
    update_mask: bool
    regrow: float
    dense_upload: bool
    participants: tuple[int, ...]
    evaluate: bool
    checkpoint: bool
    exchange: str = "allgatherv"
    penalty_scale: float = 1.0
    regrow_scale: float = 1.0
    mask_delayed: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RoundPlan:
        return cls(**{**values, "participants": tuple(values["participants"])})


def plan_round(config: Config, t: int, overdue: bool = False, control: Control = NO_CONTROL) -> RoundPlan:
    """The plan of round t, as the method takes it.

    Args:
        overdue: a checkpoint is asked for by the clock.
        control: see `control.decide`.
    """
    finished = t + 1
    last_round = finished == config.rounds
    due = updates_mask(config, finished) or control.mask_due
    update_mask = due and not control.mask_waits
    mode = config.upload.mode
    draft = RoundPlan(
        round=t,
        learning_rate=learning_rate(config, t),
        penalty=control.penalty_scale * penalty(config.penalty, t, config.rounds),
        sparsity=sparsity_asked(config, finished),
        update_mask=update_mask,
        regrow=control.regrow_scale * regrow(config, finished, update_mask) if mode == "masked" else 0.0,
        dense_upload=mode == "dense",
        participants=participants(config, t),
        evaluate=evaluates(config, finished),
        checkpoint=last_round or overdue or finished % config.checkpoint.every == 0,
        exchange=config.exchange,
        penalty_scale=control.penalty_scale,
        regrow_scale=control.regrow_scale,
        mask_delayed=control.mask_waits,
    )
    plan = methods.named(config.method).plan(config, draft)
    return replace(plan, dense_upload=True) if mode == "dense_at_mask_updates" and plan.update_mask else plan
