"""One client's round on one device: dynamic pruning with feedback (DPF) over one flat vector."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, ParamSpec

import numpy as np
import torch
from torch import Tensor

from feddip_mpi import descent, generators, graphs
from feddip_mpi.batches import Batches, DeviceData, batch_bounds
from feddip_mpi.data import augment
from feddip_mpi.errors import Abandoned, InputError
from feddip_mpi.models.dropout import Dropout
from feddip_mpi.streams import stream, torch_seed
from feddip_mpi.vector import BoundModel


@dataclass(frozen=True)
class LocalRule:
    """How a client trains; the symbols of docs/method.md, "Local training".

    Attributes:
        seed: the run's seed.
        epochs, batch_size: E and B.
        weight_decay: mu, on all parameters.
        feedback: pruned weights keep moving; otherwise their gradient is masked too.
        penalty_norm: "l2" (the paper's, not squared), "l2_squared" or "l1", per prunable tensor.
        proximal: FedProx's mu; its term (mu / 2) ||w - w_received||^2 adds mu (w - w_received) to the gradient.
        augment: "none" or "standard".
        precision: "fp32", "tf32" (a setting of the device, see runtime.prepare_torch) or "bf16": the forward pass runs
            under autocast, the weights and their gradient stay float32.
    """

    seed: int
    epochs: int
    batch_size: int
    weight_decay: float
    feedback: bool = True
    penalty_norm: str = "l2"
    proximal: float = 0.0
    augment: str = "none"
    precision: str = "fp32"


@dataclass(frozen=True)
class LocalResult:
    """What a client's round leaves: its update float32 [n], mean loss over the images, how many these are.

    `extras`: float32 [P] each, what its method's hook wants to send besides.
    """

    update: Tensor
    loss: float
    samples: int
    extras: tuple[Tensor, ...] = ()


class LocalHook:
    """What a method does in local training besides its rule; this one does nothing. All of it in place, on the device.

    `weights` float32 [parameters] are what is trained, `kept` float32 [P] is the client's mask (1 or 0), `active`
    float32 [n] is what the network computes with.
    """

    def begin_round(self, round: int, updates_mask: bool) -> None:
        """Every rank calls it before its clients of round t train; whether the mask is renewed at its end."""

    def begin(self, weights: Tensor, kept: Tensor, batches: int) -> None:
        """A client begins with the received weights; `batches`: how many steps it will make."""

    def gradient(self, gradient: Tensor, weights: Tensor, active: Tensor, kept: Tensor, batch: int) -> None:
        """Of the loss at `active`, float32 [parameters], for all coordinates; before anything is added or masked."""

    def activate(self, weights: Tensor, kept: Tensor, active: Tensor) -> None:
        """Write the prunable part of `active` after a step."""
        torch.mul(weights[: kept.numel()], kept, out=active[: kept.numel()])

    def end(self, weights: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
        """A client is done: `weights` become what it sends (less the received ones); returns what travels besides."""
        return ()


@contextmanager
def _deterministic_or_told() -> Iterator[None]:
    """Raises InputError where a network or method of the user's computes with what cannot repeat its bits on this device."""
    try:
        yield
    except RuntimeError as error:
        layer, told, _ = str(error).partition(" does not have a deterministic implementation")
        if not told:
            raise
        raise InputError(
            f"deterministic: got on, but training computes with {layer}, which has no form that repeats its bits on this "
            "device; allowed: another operation in its place, or a run with deterministic=off, whose bits do not repeat"
        ) from error


Given = ParamSpec("Given")
Train = Callable[Concatenate["LocalTrainer", Given], LocalResult]


def _with_room(train: Train[Given]) -> Train[Given]:
    """See `graphs.with_room`; a client that begins again draws the same numbers."""

    @wraps(train)
    def begun(self: LocalTrainer, /, *given: Given.args, **named: Given.kwargs) -> LocalResult:
        return graphs.with_room(self.recorder, lambda: train(self, *given, **named))

    return begun


@dataclass(frozen=True)
class _Client:
    """What the steps of a client have in common.

    Attributes:
        weights: float32 [parameters], what is trained; the beginning of the bound vector where nothing is pruned (`whole`).
        kept: the mask as float32 [P].
        received: float32 [n].
        rate, penalty: eta_t and lambda_t (0.0: none), on a GPU tensors, recorded or not: a recording would keep numbers, and
            with tensors sums are rounded otherwise.
        loss_sum: float32 [], of the images so far.
    """

    weights: Tensor
    kept: Tensor
    received: Tensor
    rate: float | Tensor
    penalty: float | Tensor
    loss_sum: Tensor
    whole: bool


class LocalTrainer:
    """Trains any client, one after the other, in the same buffers: memory grows with the model only."""

    def __init__(
        self, bound: BoundModel, data: DeviceData, rule: LocalRule, hook: LocalHook | None = None, record: bool = False
    ) -> None:
        """`record`: steps are CUDA graphs where there is no hook; the forward pass decides and draws on the GPU alone."""
        self.bound, self.data, self.rule, self.hook = bound, data, rule, hook
        layout = bound.layout
        self._weights = torch.empty(layout.parameters, device=bound.vector.device)
        self._gradient = torch.empty_like(self._weights)
        self._generator = torch.Generator(bound.vector.device)
        for module in bound.model.modules():
            if isinstance(module, Dropout):
                module.generator = self._generator
        self._large = bound.vector.device.type == "cpu" and layout.parameters > descent.PIECE
        self._rate, self._penalty, self._loss_sum = (self._weights.new_empty(()) for _ in range(3))
        self.recorder = graphs.Recorder([self._generator]) if record and hook is None else None
        if self.recorder is not None:
            self._kept = self._weights.new_empty(layout.prunable)
            self._received = torch.empty_like(bound.vector) if rule.proximal else None

    @_deterministic_or_told()
    @_with_room
    def train(
        self,
        received: Tensor,
        mask: Tensor,
        samples: np.ndarray,
        learning_rate: float,
        penalty: float,
        round: int,
        client: int,
        give_up: Callable[[], bool] = lambda: False,
        alone: bool = True,
    ) -> LocalResult:
        """E epochs of DPF from the received weights.

        Args:
            received: float32 [n], the global model (`Method.received`).
            mask: bool [P].
            samples: int64, the client's indices into the training images.
            learning_rate, penalty: eta_t, lambda_t.
            round, client: name the random streams.
            give_up: asked before every batch; when true the training ends with Abandoned.
            alone: nothing else trains in this process meanwhile, and global random generators are this client's.
        """
        layout, active, hook = self.bound.layout, self.bound.vector, self.hook
        active.copy_(received)
        recorder = self.recorder if alone else None
        batches = self._batches(samples, round, client, ready=recorder is None)
        state = self._client(received, mask, learning_rate, penalty, recorder is not None)
        self._begin("dropout", round, client, alone)
        if hook is None and not state.whole:
            active[: layout.prunable].mul_(state.kept)  # `Method.received` may give more than the mask keeps
        if hook is not None:
            hook.begin(state.weights, state.kept, len(batches))
        for batch in range(len(batches)):
            if give_up():
                raise Abandoned(f"round {round + 1} was abandoned while client {client} trained")
            if recorder is None:
                self._step(*batches.gathered(batch), state, batch)
                continue
            inputs = batches.places(batch)
            form = (len(inputs[0]), state.whole, bool(penalty))
            recorder.run(form, inputs, lambda *inputs, state=state: self._step(*self.data.batch(*inputs), state, 0))
        extras = () if hook is None else hook.end(state.weights, state.kept)
        update = torch.empty_like(received)
        torch.sub(state.weights, received[: layout.parameters], out=update[: layout.parameters])
        torch.sub(active[layout.parameters :], received[layout.parameters :], out=update[layout.parameters :])
        count = len(samples) * self.rule.epochs
        return LocalResult(update, float(state.loss_sum) / count, count, extras)

    def _client(self, received: Tensor, mask: Tensor, rate: float, penalty: float, recorded: bool) -> _Client:
        """What the steps of a client begin with; `recorded`: where it lay for the one before."""
        active, parameters = self.bound.vector, self.bound.layout.parameters
        # With nothing pruned the weights of the forward pass are the dense ones, and need no memory of their own.
        whole = self.hook is None and bool(mask.all())
        weights = active[:parameters] if whole else self._weights.copy_(received[:parameters])
        kept = self._kept.copy_(mask) if recorded else mask.to(torch.float32)
        if recorded and self._received is not None:
            received = self._received.copy_(received)
        loss_sum = self._loss_sum.zero_()
        if active.device.type == "cpu" and not recorded:
            return _Client(weights, kept, received, rate, penalty, loss_sum, whole)
        there = self._penalty.fill_(penalty) if penalty else 0.0
        return _Client(weights, kept, received, self._rate.fill_(rate), there, loss_sum, whole)

    def _step(self, images: Tensor, labels: Tensor, client: _Client, batch: int) -> None:
        """One batch: w <- w - eta (g + mu w), and the pruned weights after it. Waits for nothing on a GPU."""
        layout, active, hook = self.bound.layout, self.bound.vector, self.hook
        weights, kept, parameters = client.weights, client.kept, layout.parameters
        loss, gradients = self._backward(images, labels)
        client.loss_sum.add_(loss, alpha=len(labels))  # the last batch is smaller or, by one image, larger
        if hook is None and self._large:
            descent.descend_by_pieces(
                gradients, weights, active, layout, kept, self.rule, client.penalty, client.received, client.rate,
                self._gradient,
            )  # fmt: skip
            return
        torch.cat([g.reshape(-1) for g in gradients], out=self._gradient)
        if hook is not None:
            hook.gradient(self._gradient, weights, active, kept, batch)
        descent.add_regularisation(
            self._gradient, weights, active, layout, kept, self.rule, client.penalty, client.received[:parameters]
        )
        descent.descend(weights, self._gradient, client.rate)
        if client.whole:
            return
        if hook is None:
            torch.mul(weights[: layout.prunable], kept, out=active[: layout.prunable])
        else:
            hook.activate(weights, kept, active)
        active[layout.prunable : parameters] = weights[layout.prunable :]

    @_deterministic_or_told()
    def mean_gradient(
        self,
        weights: Tensor,
        samples: np.ndarray,
        round: int,
        client: int,
        give_up: Callable[[], bool] = lambda: False,
    ) -> Tensor:
        """Gradient [n] (zero for buffers) of the mean loss over the client's images at `weights` float32 [n].

        Args:
            weights, samples, give_up: as in `train`.
            round, client: name the random streams, which are not those of `train`.
        """
        bound, layout = self.bound, self.bound.layout
        bound.vector.copy_(weights)
        self._begin("mean gradient", round, client)
        total = torch.zeros_like(weights)
        order = torch.from_numpy(samples).to(weights.device)
        for start, stop in batch_bounds(len(samples), self.rule.batch_size):
            if give_up():
                raise Abandoned(f"the gradient of client {client} was abandoned")
            _, gradients = self._backward(*self.data.batch(order[start:stop]))
            torch.cat([g.reshape(-1) for g in gradients], out=self._gradient)
            total[: layout.parameters].add_(self._gradient, alpha=(stop - start) / len(samples))
            bound.vector[layout.parameters :] = weights[layout.parameters :]
        return total

    def _begin(self, purpose: str, round: int, client: int, alone: bool = True) -> None:
        """The model as a client finds it, whoever was trained before: counters, mode, random numbers of its forward."""
        self.bound.reset_counters()
        self.bound.model.train()
        self._generator.manual_seed(torch_seed(self.rule.seed, purpose, round, client))
        if alone:
            # Not torch's generator alone: a forward of the user's may draw from `random` or `numpy.random`
            # (stochastic depth), and would otherwise see who was trained before it on this rank.
            generators.seed_all(self.rule.seed, purpose, round, client)

    def _backward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """The cross-entropy at the pruned weights (no sync), and its gradient for each parameter."""
        reduced = self.rule.precision == "bf16"
        # The cache of rounded weights is the process's: another client's thread would empty it in mid-pass.
        with torch.autocast(images.device.type, torch.bfloat16, enabled=reduced, cache_enabled=False):
            logits = self.bound.model(images)
        loss = torch.nn.functional.cross_entropy(logits.float() if reduced else logits, labels)
        gradients = torch.autograd.grad(loss, self.bound.parameters, allow_unused=True, materialize_grads=True)
        return loss.detach(), gradients

    def _batches(self, samples: np.ndarray, round: int, client: int, ready: bool = True) -> Batches:
        rule, device = self.rule, self.data.images.device
        order_stream = stream(rule.seed, "batches", round, client)
        # Places among the client's images: the same draws as a permutation of the images themselves.
        order = np.concatenate([order_stream.permutation(len(samples)) for _ in range(rule.epochs)])
        crops = None
        if rule.augment == "standard":
            offsets, flips = augment.draw(stream(rule.seed, "augmentation", round, client), len(order))
            crops = (torch.from_numpy(offsets).to(device), torch.from_numpy(flips).to(device))
        bounds = [
            (epoch * len(samples) + start, epoch * len(samples) + stop)
            for epoch in range(rule.epochs)
            for start, stop in batch_bounds(len(samples), rule.batch_size)
        ]
        own = torch.from_numpy(samples).to(device)
        return Batches(self.data, own, torch.from_numpy(order).to(device), bounds, crops, ready)
