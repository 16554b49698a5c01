"""A model as one flat float32 vector, and where each of its tensors lies in it.

The order is fixed: prunable weights first, then the other parameters, then the floating-point buffers
(normalisation statistics). A mask therefore covers a prefix, and "everything not prunable" is one slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """Where each named tensor lies in the flat vector.

    Attributes:
        names: dotted names as in `state_dict`, in flat order.
        shapes: their shapes.
        offsets: where each starts.
        prunable: P, the prunable weights are vector[:P].
        parameters: the trained parameters are vector[:parameters]; buffers follow.
        size: n, length of the vector.
        prunable_tensors: how many of `names` are prunable.
        parameter_tensors: how many of `names` are parameters.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    prunable: int
    parameters: int
    size: int
    prunable_tensors: int
    parameter_tensors: int

    @classmethod
    def of(cls, model: nn.Module, prunable_names: Sequence[str]) -> Layout:
        """The layout of `model`; `prunable_names` are names of some of its parameters."""
        parameters = dict(model.named_parameters())
        dense = [name for name in parameters if name not in set(prunable_names)]
        buffers = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
        names = (*prunable_names, *dense, *buffers)
        shapes = tuple(tuple({**parameters, **buffers}[name].shape) for name in names)
        sizes = [prod(shape) for shape in shapes]
        offsets = tuple(sum(sizes[:i]) for i in range(len(sizes)))
        first_buffer = len(prunable_names) + len(dense)
        return cls(
            names=names,
            shapes=shapes,
            offsets=offsets,
            prunable=sum(sizes[: len(prunable_names)]),
            parameters=sum(sizes[:first_buffer]),
            size=sum(sizes),
            prunable_tensors=len(prunable_names),
            parameter_tensors=first_buffer,
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each tensor."""
        return tuple(prod(shape) for shape in self.shapes)

    @property
    def prunable_names(self) -> tuple[str, ...]:
        return self.names[: self.prunable_tensors]

    @property
    def prunable_shapes(self) -> tuple[tuple[int, ...], ...]:
        return self.shapes[: self.prunable_tensors]

    @property
    def prunable_sizes(self) -> tuple[int, ...]:
        return self.sizes[: self.prunable_tensors]

    def views(self, vector: Tensor) -> list[Tensor]:
        """One view per tensor into `vector` [n] (or [parameters], or [P]: as many tensors as fit), in flat order."""
        return [
            vector[offset : offset + size].view(shape)
            for offset, size, shape in zip(self.offsets, self.sizes, self.shapes, strict=True)
            if offset + size <= vector.numel()
        ]


def flatten(model: nn.Module, layout: Layout) -> Tensor:
    """A copy of the model's tensors as float32 [n]."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return torch.cat([tensors[name].detach().reshape(-1).to(torch.float32) for name in layout.names])


class BoundModel:
    """A model whose parameters and floating-point buffers are views into one flat vector.

    Writing the vector changes the model and the other way round: no state is copied in or out tensor by tensor.
    Integer buffers (batch counters) are no part of the vector; `reset_counters` puts them back to where they
    began, so that no client sees how many others were trained before it on the same rank.
    """

    def __init__(self, model: nn.Module, layout: Layout, device: torch.device) -> None:
        self.layout = layout
        self.vector = flatten(model, layout).to(device)
        self.model = model.to(device)
        owners = dict(self.model.named_modules())
        views = dict(zip(layout.names, layout.views(self.vector), strict=True))
        self.parameters = []
        for name in layout.names[: layout.parameter_tensors]:
            owner, _, leaf = name.rpartition(".")
            parameter = getattr(owners[owner], leaf)
            parameter.data = views[name]
            self.parameters.append(parameter)
        for name in layout.names[layout.parameter_tensors :]:
            owner, _, leaf = name.rpartition(".")
            setattr(owners[owner], leaf, views[name])
        self._counters = [(b, b.clone()) for b in self.model.buffers() if not b.is_floating_point()]

    def reset_counters(self) -> None:
        """Put integer buffers back to their initial values."""
        for buffer, initial in self._counters:
            buffer.copy_(initial)
