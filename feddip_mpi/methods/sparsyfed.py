"""SparsyFed (Guastella et al., ICLR 2025): power propagation, pruned activations, and the top weights of each client."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from feddip_mpi import masks
from feddip_mpi.codec import Upload
from feddip_mpi.local import LocalHook
from feddip_mpi.methods.base import Method, Seen
from feddip_mpi.schedules import RoundPlan, last_mask_update, sparsity
from feddip_mpi.settings import Config
from feddip_mpi.streams import torch_seed
from feddip_mpi.vector import BoundModel, Layout

_CUT_OFF_DEVIATION = 0.8796256610342398  # standard deviation of a standard normal variable within -2 and 2


class SparsyFed(Method):
    """Clients keep their largest weights, the server what any of them kept, until the last mask update."""

    summary = "trains w = theta |theta|^(beta-1) with pruned activations; each client keeps its largest weights"
    any_residual = False
    waits = False

    @classmethod
    def plan(cls, config: Config, draft: RoundPlan) -> RoundPlan:
        """Masks merge in every round until the last mask update, which is exact."""
        plan = super().plan(config, draft)
        last = last_mask_update(config.rounds, config.mask.freeze_after)
        return replace(plan, update_mask=plan.round + 1 <= last)

    @classmethod
    def first_sparsity(cls, config: Config) -> float:
        return 0.0

    @classmethod
    def counts_are_known(cls, config: Config) -> bool:
        return False

    def opening(self) -> None:
        return None

    def start(self, weights: Tensor, opened: object) -> tuple[Tensor, Tensor]:
        """The authors' initial values: a cut over all layers needs them (docs/methods.md)."""
        weights = initial_values(weights, self.layout, torch_seed(self.config.seed, "SparsyFed's initial weights"))
        return weights, torch.ones(self.layout.prunable, dtype=torch.bool, device=weights.device)

    def hook(self, bound: BoundModel) -> LocalHook:
        return _Powers(self.config, bound)

    @classmethod
    def extras(cls, config: Config, plan: RoundPlan, upload: Upload) -> tuple[Upload, ...]:
        """Each client's mask, a bit for every weight of the server's."""
        return (Upload("bit"),) if plan.update_mask else ()

    def merge(self, seen: Seen) -> Tensor:
        """W moves by what the clients' theta have moved by on the mean.

        What every client has pruned is exactly zero, whatever its value was rounded to on the way.
        """
        value, beta = seen.value.clone(), self.config.sparsyfed.power
        prunable, before = value[: seen.old.size], seen.weights[: seen.old.size]
        prunable.copy_(power(power(before, 1 / beta).add_(prunable).sub_(before), beta))
        if seen.plan.update_mask:
            prunable.masked_fill_(seen.extras[0] <= 0, 0.0)
        return value

    def cut(self, seen: Seen) -> Tensor:
        """What any client kept; at the last update the largest of that, as many as the final sparsity leaves."""
        union = seen.extras[0] > 0
        last = last_mask_update(self.config.rounds, self.config.mask.freeze_after)
        keep = masks.kept_count(seen.old.size, seen.plan.sparsity)
        if seen.plan.round + 1 < last or int(union.sum()) <= keep:
            return union
        return masks.select_largest(seen.value[: seen.old.size].abs().masked_fill_(~union, -1.0), keep)


def initial_values(weights: Tensor, layout: Layout, seed: int) -> Tensor:
    """A copy of `weights` float32 [n] as the authors' code begins.

    Prunable weights are normal, cut off at twice `scale`, with a standard deviation of sqrt(1 / inputs of a neuron);
    their layers' biases are zero.
    """
    out, generator = weights.clone(), torch.Generator().manual_seed(seed)
    layers = {name.rpartition(".")[0] for name in layout.prunable_names}
    for name, view in zip(layout.names, layout.views(out), strict=True):
        if name in layout.prunable_names:
            scale = (view[0].numel() ** -0.5) / _CUT_OFF_DEVIATION
            drawn = torch.empty(view.shape)
            nn.init.trunc_normal_(drawn, std=scale, a=-2 * scale, b=2 * scale, generator=generator)
            view.copy_(drawn)
        elif name.rpartition(".")[0] in layers and name.endswith(".bias"):
            view.zero_()
    return out


def power(values: Tensor, exponent: float) -> Tensor:
    """sign(x) |x|^exponent."""
    return values.abs().pow_(exponent).mul_(values.sign())


class _Powers(LocalHook):
    """Trains theta, where w = theta |theta|^(beta - 1), and prunes the activations that the weights' gradients see."""

    def __init__(self, config: Config, bound: BoundModel) -> None:
        self._config, self._beta, self._size = config, config.sparsyfed.power, bound.layout.prunable
        self._keep, self._updating = self._size, False
        self._received = torch.empty(self._size, device=bound.vector.device)
        if config.sparsyfed.activations:
            modules = dict(bound.model.named_modules())
            for name in bound.layout.prunable_names:
                prune_activations(modules[name.rpartition(".")[0]])

    def begin_round(self, round: int, updates_mask: bool) -> None:
        self._updating = updates_mask
        last = last_mask_update(self._config.rounds, self._config.mask.freeze_after)
        self._keep = masks.kept_count(self._size, sparsity(self._config.sparsity, round + 1, last))

    def begin(self, weights: Tensor, kept: Tensor, batches: int) -> None:
        self._received.copy_(weights[: self._size])
        weights[: self._size].copy_(power(self._received, 1 / self._beta))

    def gradient(self, gradient: Tensor, weights: Tensor, active: Tensor, kept: Tensor, batch: int) -> None:
        # dL/dtheta = dL/dw * beta |theta|^(beta - 1): a weight of zero stays zero.
        gradient[: self._size].mul_(weights[: self._size].abs().pow_(self._beta - 1)).mul_(self._beta)

    def activate(self, weights: Tensor, kept: Tensor, active: Tensor) -> None:
        torch.mul(power(weights[: self._size], self._beta), kept, out=active[: self._size])

    def end(self, weights: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
        prunable, extras = weights[: self._size], tuple[Tensor, ...]()
        if self._updating:
            keep = min(self._keep, int(kept.sum()))
            chosen = masks.select_largest(prunable.abs().masked_fill(kept == 0, -1.0), keep)
            prunable.mul_(chosen)
            extras = (chosen.to(torch.float32),)
        # What travels is how far theta has moved: `merge` averages that.
        prunable.sub_(power(self._received, 1 / self._beta)).add_(self._received)
        return extras


def prune_activations(layer: nn.Module) -> None:
    """Let the gradient of a layer's weight see only the largest inputs, as large a share as the weight has non-zeros.

    The output and the gradient of the input are those of the whole input. Only while training.
    """
    contexts: list[Any] = []

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        given = inputs[0]
        # Under autocast autograd saves a reduced copy of the input; made here, it is known.
        if torch.is_autocast_enabled(given.device.type):
            given = given.to(torch.get_autocast_dtype(given.device.type))
        weight: Tensor = module.weight  # type: ignore[assignment]

        def pack(saved: Tensor) -> Tensor:
            if not module.training or saved.data_ptr() != given.data_ptr() or saved.shape != given.shape:
                return saved
            share = float(weight.detach().count_nonzero()) / weight.numel()
            return largest_inputs(saved, share)

        context = torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved)
        context.__enter__()
        contexts.append(context)
        return (given, *inputs[1:])

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        contexts.pop().__exit__()

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after, always_call=True)


def largest_inputs(values: Tensor, share: float) -> Tensor:
    """A copy of a batch of activations with the `share` largest by magnitude; the rest is 0."""
    if share >= 1:
        return values
    flat = values.detach().abs().reshape(-1)
    keep = max(1, int(share * flat.numel()))
    if values.device.type == "cpu":
        smallest = torch.kthvalue(flat, flat.numel() - keep + 1).values
    else:  # there older versions of torch refuse kthvalue, whose index does not repeat where values are equal
        smallest = torch.topk(flat, keep, sorted=False).values.min()
    return torch.where(values.detach().abs() >= smallest, values.detach(), torch.zeros((), device=values.device))
