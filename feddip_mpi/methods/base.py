"""What a method may change in the engine. Everything here has a default: the default is masked training by magnitude.

The loop (`rounds.play`) asks in this order: `plan` for the schedules; before the first round `opening` and `start`; in
a round `hook` for what local training does besides, `extras` for what clients send besides, and `merge`, `cut` and
`remember` for the server. The last three are pure, and run with the same arguments on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from feddip_mpi import allocation, masks, server
from feddip_mpi.aggregate import Aggregate
from feddip_mpi.codec import Upload
from feddip_mpi.errors import InputError
from feddip_mpi.local import LocalHook, LocalRule, LocalTrainer
from feddip_mpi.schedules import RoundPlan, last_mask_update, participants
from feddip_mpi.server import Server, StepReport
from feddip_mpi.settings import Config
from feddip_mpi.streams import stream
from feddip_mpi.support import Support
from feddip_mpi.vector import BoundModel, Layout

# Of what the server keeps besides W, what is not the method's: see `rounds.State`.
ENTERED = "entered"
ENGINE_MEMORIES = ("reference", "owed", ENTERED)


@dataclass(frozen=True)
class Opening:
    """What clients measure once, before the first round, and send as float32.

    Attributes:
        clients: in ascending order.
        sizes: length of each vector they send.
        measure: (trainer, initial weights float32 [n], the client's images, client, give_up as in
            `LocalTrainer.train`) to the vectors.
    """

    clients: tuple[int, ...]
    sizes: tuple[int, ...]
    measure: Callable[[LocalTrainer, Tensor, np.ndarray, int, Callable[[], bool]], Sequence[Tensor]]


@dataclass(frozen=True)
class Seen:
    """What the server has when it steps; the same on every rank.

    Attributes:
        plan: of the round.
        old: the mask of the round.
        value: float32 [n], v = W + sum_k p_k q_k; for `cut` and `remember` what `merge` made of it.
        extras: float32 [P] each, sum_k p_k x_k of what clients sent besides, in the order of `Method.extras`.
        memories: what the method remembered after the round before.
        weights: float32 [n], W before the step.
    """

    plan: RoundPlan
    old: Support
    value: Tensor
    extras: tuple[Tensor, ...]
    memories: Mapping[str, Tensor]
    weights: Tensor


class Method:
    """A federated method; a subclass says what is different about it.

    Class attributes:
        summary: what it does, in one line.
        masking: "scheduled" masks follow `sparsity.*` and `mask.*`; a "fixed" one has the final sparsity from the start;
            with "none" every weight is kept and travels.
        waits: a mask update may wait (`control.mask_delay`).
        penalised: lambda_t of `penalty.*` applies.
        regrows: clients send coordinates from outside the mask as `upload.regrow*` says.
        names_only: what a plan's `regrow` counts is named among the extras, without values; updates have none of it.
        confined: gradients, residuals and the server's memory stay inside the mask; nothing outside it exists.
        returns: what has left the mask may enter it again, at zero.
        any_residual: `upload.residual: ef21` is possible.
    """

    summary: ClassVar[str] = "masked training, pruned by magnitude"
    masking: ClassVar[Literal["scheduled", "fixed", "none"]] = "scheduled"
    waits: ClassVar[bool] = True
    penalised: ClassVar[bool] = False
    regrows: ClassVar[bool] = False
    names_only: ClassVar[bool] = False
    confined: ClassVar[bool] = True
    returns: ClassVar[bool] = False
    any_residual: ClassVar[bool] = True

    def __init__(self, config: Config, model: nn.Module, layout: Layout, input_shape: tuple[int, ...]) -> None:
        """See `methods.make`."""
        self.config, self.layout = config, layout
        if not self.any_residual and config.upload.residual == "ef21":
            raise InputError(
                f"upload.residual: got ef21, which method: {config.method} cannot use (its clients' masks differ, or "
                "weights that left the mask begin anew); allowed: keep, decay, in_mask_only, drop"
            )

    @classmethod
    def plan(cls, config: Config, draft: RoundPlan) -> RoundPlan:
        """The plan of a round; `draft` applies every schedule of the configuration."""
        plan = replace(
            draft,
            penalty=draft.penalty if cls.penalised else 0.0,
            regrow=draft.regrow if cls.regrows else 0.0,
        )
        if cls.masking == "scheduled":
            return plan
        return replace(plan, sparsity=cls.first_sparsity(config), update_mask=False)

    @classmethod
    def counted(cls, config: Config, finished: int) -> int:
        """How many finished rounds the calendar of mask updates counts: `mask.every` and s_t go by it."""
        return finished

    @classmethod
    def first_sparsity(cls, config: Config) -> float:
        """Of the first mask, share of zeros."""
        if cls.masking == "scheduled":
            return 0.0 if config.mask.initial == "none" else config.sparsity.initial
        return config.sparsity.final if cls.masking == "fixed" else 0.0

    @classmethod
    def ends_at_final(cls, config: Config) -> bool:
        """Whether the run's last model has `sparsity.final`."""
        return cls.masking != "none"

    @classmethod
    def counts_are_known(cls, config: Config) -> bool:
        """Whether the size of every mask follows from the configuration, so that a plan tells it exactly."""
        return True

    def opening(self) -> Opening | None:
        """What clients are asked before the first round."""
        if self.masking != "scheduled" or self.config.mask.initial != "snip":
            return None
        return self.saliency_opening(participants(self.config, 0), before_sum=False)

    def saliency_opening(self, clients: tuple[int, ...], before_sum: bool) -> Opening:
        """Gradients at the initial weights [P], or with `before_sum` each client's own |gradient * weight|."""
        size = self.layout.prunable

        def measure(
            trainer: LocalTrainer, weights: Tensor, samples: np.ndarray, client: int, give_up: Callable[[], bool]
        ) -> Sequence[Tensor]:
            gradient = trainer.mean_gradient(weights, samples, 0, client, give_up)[:size]
            return [(gradient * weights[:size]).abs() if before_sum else gradient]

        return Opening(clients, (size,), measure)

    def start(self, weights: Tensor, opened: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The first weights float32 [n] (not yet pruned) and mask bool [P].

        Args:
            weights: the initial ones, the same for all.
            opened: sum_k p_k of what the clients of `opening` have sent; p_k is their share of its images.
        """
        rule = self.config.mask.initial if self.masking == "scheduled" else "none"
        return weights, self.first_mask(rule, weights[: self.layout.prunable], opened)

    def begin(self, weights: Tensor, opened: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """`start`, and what `mask.rescale` makes of its weights."""
        weights, mask = self.start(weights, opened)
        _require(weights, torch.float32, self.layout.size, "weights of start")
        _require(mask, torch.bool, self.layout.prunable, "mask of start")
        return (rescaled(weights, mask, self.layout) if self.config.mask.rescale else weights), mask

    def first_mask(self, rule: str, prunable: Tensor, opened: Sequence[Tensor]) -> Tensor:
        """A mask bool [P] by a rule of `mask.initial` with exactly the first sparsity."""
        sparsity = self.first_sparsity(self.config)
        keep = masks.kept_count(prunable.numel(), sparsity)
        if rule == "none":
            return torch.ones_like(prunable, dtype=torch.bool)
        if rule == "magnitude":
            return self.select(prunable.abs(), keep)
        if rule == "snip":  # |gradient * weight|, Lee et al. 2019, eq. 7
            return masks.select_largest((opened[0] * prunable).abs(), keep)
        generator = stream(self.config.seed, "initial mask")
        return masks.initial_random(rule, self.layout.prunable_shapes, sparsity, generator).to(prunable.device)

    def begin_memories(self, weights: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """`first_memories`, and where weights return how many rounds were finished when each entered the mask."""
        memories = checked_memories(self.first_memories(weights, mask))
        return {**memories, ENTERED: torch.zeros_like(weights[: mask.numel()])} if self.returns else memories

    def first_memories(self, weights: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """float32 arrays that the server keeps besides W, by name; they are in every checkpoint.

        "reference", "owed" and "entered" are names of the engine's own.
        """
        return {}

    def local_rule(self) -> LocalRule:
        """How clients train."""
        c = self.config
        return LocalRule(
            seed=c.seed,
            epochs=c.local_epochs,
            batch_size=c.batch_size,
            weight_decay=c.weight_decay,
            feedback=not self.confined,
            penalty_norm=c.penalty.norm,
            augment=c.data.augment,
            precision=c.precision,
        )

    def hook(self, bound: BoundModel) -> LocalHook | None:
        """What local training does besides the rule; made once for each client that trains at once."""
        return None

    @classmethod
    def extras(cls, config: Config, plan: RoundPlan, upload: Upload) -> tuple[Upload, ...]:
        """How each vector [P] that a client's hook leaves travels besides its update; `upload`: as the plan says it."""
        return ()

    @classmethod
    def regrown(cls, config: Config, plan: RoundPlan, layout: Layout, kept: int) -> int:
        """How many coordinates outside the mask of `kept` weights a client sends in a round."""
        return round(plan.regrow * kept)

    @classmethod
    def updates(cls, upload: Upload) -> Upload:
        """How updates travel; `upload`: as the plan says it."""
        return replace(upload, regrow=0) if cls.names_only else upload

    def received(self, srv: Server) -> Tensor:
        """What clients begin a round with, float32 [n]; not to be changed."""
        return server.pruned(srv.weights, srv.mask)

    def paid(self, srv: Server, memories: Mapping[str, Tensor], extras: Sequence[Tensor], since: int) -> Tensor | None:
        """The weights, bool [P], whose residual a client adds to its update; None: all.

        Args:
            srv, memories: before the round.
            extras: what the client's hook has left in this one.
            since: t of the round in which the client took part last.
        """
        if not self.confined:
            return None
        entered = memories.get(ENTERED)
        return srv.mask if entered is None else srv.mask & (entered <= since)

    def memory(self, round: int) -> str:
        """What W is after the step of round t: see `server.step`."""
        return "off"

    def merge(self, seen: Seen) -> Tensor:
        """The server's new value float32 [n]."""
        return seen.value

    def cut(self, seen: Seen) -> Tensor | None:
        """The new mask bool [P], in rounds that update it; None: by |v| (`server.new_mask`, `select`)."""
        return None

    def select(self, magnitude: Tensor, keep: int) -> Tensor:
        """A mask bool [P] by |v| [P] as `mask.allocation` says; -1 where a weight may not be kept."""
        return allocation.select(magnitude, keep, self.layout.prunable_shapes, self.config.mask.allocation)

    def remember(self, seen: Seen, mask: Tensor) -> dict[str, Tensor]:
        """The memories after the round; `mask` bool [P] is the new one."""
        return dict(seen.memories)

    def step(
        self, srv: Server, total: Aggregate, extras: Sequence[Tensor], memories: Mapping[str, Tensor], plan: RoundPlan
    ) -> tuple[Server, StepReport, dict[str, Tensor]]:
        """The server step of a round and what the method remembers after it."""
        own = {name: values for name, values in memories.items() if name not in ENGINE_MEMORIES}
        seen = [Seen(plan, srv.support, srv.weights, tuple(extras), own, srv.weights)]

        def merge(value: Tensor) -> Tensor:
            seen[0] = replace(seen[0], value=value)
            merged = self.merge(seen[0])
            _require(merged, torch.float32, self.layout.size, "value of merge")
            seen[0] = replace(seen[0], value=merged)
            return seen[0].value

        def cut() -> Tensor | None:
            mask = self.cut(seen[0])
            if mask is not None:
                _require(mask, torch.bool, srv.support.size, "mask of cut")
            return mask

        after, report = server.step(srv, total, plan, self.memory(plan.round), merge, cut, self.select)
        remembered = checked_memories(self.remember(seen[0], after.mask))
        if ENTERED in memories:
            entered = torch.where(after.mask & ~srv.mask, float(plan.round + 1), memories[ENTERED])
            remembered[ENTERED] = entered if plan.update_mask else memories[ENTERED]
        return after, report, remembered

    def caution(self) -> str | None:
        """What a run's log says before the run, where its configuration does what nobody wants."""
        return None

    def facts(self, mask: Tensor) -> dict[str, object]:
        """What the run's summary says about the mask [P] besides its sparsity, in JSON values."""
        return {}


def untrained_at_the_end(config: Config) -> str | None:
    """Of a method whose weights enter at zero, where the last mask update ends the last round."""
    if last_mask_update(config.rounds, config.mask.freeze_after) < config.rounds:
        return None
    return (
        f"mask.freeze_after={config.mask.freeze_after:g}: the last mask update ends the last round, and what enters the mask "
        "in it is zero in the final model; a smaller share leaves rounds to train it"
    )


def checked_memories(memories: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a method remembers, as it is. Raises InputError where a checkpoint could not hold it."""
    for name, values in memories.items():
        if name in ENGINE_MEMORIES:
            raise _wrong(f"memory {name!r} has a name of the engine's own; take another name")
        _require(values, torch.float32, None, f"memory {name!r}")
    return memories


def _require(values: object, dtype: torch.dtype, size: int | None, what: str) -> None:
    """Raises InputError unless `values` is a tensor [size] of `dtype`; any shape where no size is given."""
    fits = isinstance(values, Tensor) and values.dtype == dtype and size in (None, values.numel())
    if not fits or (size is not None and isinstance(values, Tensor) and values.dim() != 1):
        got = f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        shape = "any shape" if size is None else f"[{size}]"
        raise _wrong(f"{what}: got {got}; allowed: a tensor {dtype}, {shape}")


def _wrong(what: str) -> InputError:
    """What a method of the user's does is wrong; every rank finds it at the same time."""
    error = InputError(f"method: its {what}; correct the class, then `train` or `resume`")
    error.shared = True
    return error


def rescaled(weights: Tensor, mask: Tensor, layout: Layout) -> Tensor:
    """Initial weights whose sums have the variance that the dense ones had (Evci et al. 2022, section 3).

    The kept weights w' of a layer are multiplied by ||w|| / ||w'||, for a random mask about sqrt(size / kept) as there;
    where a mask keeps large weights, that would make sums larger than the dense ones.

    Args:
        weights: float32 [n]; a changed copy is returned.
        mask: bool [P].
        layout: where the layers lie.
    """
    out = weights.clone()
    sizes = list(layout.prunable_sizes)
    for values, part in zip(out[: layout.prunable].split(sizes), mask.split(sizes), strict=True):
        left = float(torch.linalg.vector_norm(values[part]))
        values.mul_(float(torch.linalg.vector_norm(values)) / left if left > 0 else 1.0)
    return out
