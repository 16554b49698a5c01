"""Whole channels of a network whose layers form a chain: where they begin and end, and the network without some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from feddip_mpi import generators
from feddip_mpi.errors import InputError

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass(frozen=True)
class Link:
    """The channels that one layer makes and another one takes.

    Attributes:
        producer, consumer: places of their weights among the prunable tensors.
        channels: how many.
        span: inputs of the consumer for each channel (a linear layer on flattened images has many).
        norms: names of the batch normalisations between the two.
    """

    producer: int
    consumer: int
    channels: int
    span: int
    norms: tuple[str, ...]


def chain(model: nn.Module, input_shape: Sequence[int], names: Sequence[str]) -> tuple[Link, ...]:
    """The links of a network, in the order of their producers; found by sending NaN through one channel at a time.

    Args:
        model: on the CPU; it and the random generators stay as they are.
        input_shape: channels, height, width.
        names: its prunable weights.

    Raises:
        InputError: channels of a layer do not go to exactly one other layer (ResNets, grouped convolutions, layers that
            are kept dense).
    """
    probe = _Probe(model, input_shape, names)
    links = []
    for producer, name in enumerate(names):
        channels = probe.layers[producer].weight.shape[0]
        reached = [probe.reached(producer, channel) for channel in sorted({0, channels - 1})]
        if not reached[0].layers and not reached[-1].layers:
            continue  # nothing comes after it
        consumers = {index for each in reached for index in each.layers}
        if len(consumers) != 1 or any(each.output for each in reached):
            raise _no_chain(name, [names[index] for index in sorted(consumers)])
        (consumer,) = consumers
        inputs = probe.layers[consumer].weight.shape[1]
        span = inputs // channels
        for channel, each in zip(sorted({0, channels - 1}), reached, strict=True):
            if each.layers[consumer] != list(range(channel * span, (channel + 1) * span)):
                raise _no_chain(name, [names[consumer]])
        links.append(Link(producer, consumer, channels, span, tuple(reached[0].norms)))
    ends = set(range(len(names))) - {link.producer for link in links}
    if len(ends) != 1 or len({link.consumer for link in links}) != len(links):
        raise _no_chain(names[min(ends)] if ends else "the last layer", [])
    return tuple(links)


def _no_chain(name: str, consumers: Sequence[str]) -> InputError:
    into = f"goes into {', '.join(consumers)}" if consumers else "does not go into exactly one other layer"
    return InputError(
        f"method: prunetrain (and the small export) removes whole channels: every layer's channels must go into one other "
        f"prunable layer, in their order; {name} {into}. Models that fit: lenet5, alexnet, vgg11, "
        "with nothing in model.keep_dense"
    )


@dataclass
class _Reached:
    """Layers (with the inputs that are NaN) and normalisations that see a channel, and whether the output does."""

    layers: dict[int, list[int]]
    norms: list[str]
    output: bool = False


class _Probe:
    def __init__(self, model: nn.Module, input_shape: Sequence[int], names: Sequence[str]) -> None:
        self._model = deepcopy(model).eval()
        # Weights of zero would hide what passes; positive ones let everything through.
        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.fill_(0.01)
        self._shape = tuple(input_shape)
        modules = dict(self._model.named_modules())
        self.layers: list[Any] = [modules[name.rpartition(".")[0]] for name in names]
        self._norms = {name: module for name, module in modules.items() if isinstance(module, _NORMS)}
        if any(getattr(layer, "groups", 1) != 1 for layer in self.layers):
            raise _no_chain(
                next(n for n, m in zip(names, self.layers, strict=True) if getattr(m, "groups", 1) != 1), []
            )

    def reached(self, producer: int, channel: int) -> _Reached:
        """What sees a NaN in one output channel of a layer; the other layers pass none on."""
        found = _Reached({}, [])
        handles = [self.layers[producer].register_forward_hook(_poison(channel))]
        for index, layer in enumerate(self.layers):
            if index != producer:
                handles.append(
                    layer.register_forward_pre_hook(_note(lambda bad, i=index: found.layers.update({i: bad})))
                )
                handles.append(layer.register_forward_hook(lambda module, inputs, output: output.nan_to_num()))
        for name, norm in self._norms.items():
            handles.append(norm.register_forward_pre_hook(_note(lambda bad, n=name: found.norms.append(n))))
        with torch.no_grad(), generators.preserved():
            found.output = bool(self._model(torch.ones(1, *self._shape)).isnan().any())
        for handle in handles:
            handle.remove()
        return found


def _poison(channel: int) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, channel] = float("nan")
        return output

    return hook


def _note(tell: Any) -> Any:
    def hook(module: nn.Module, inputs: Any) -> None:
        flat = inputs[0].transpose(0, 1).reshape(inputs[0].shape[1], -1)
        bad = flat.isnan().any(dim=1)
        if bool(bad.any()):
            tell(bad.nonzero().squeeze(1).tolist())

    return hook


def kept_channels(mask: Tensor, shapes: Sequence[tuple[int, ...]], links: Sequence[Link]) -> list[Tensor]:
    """Which channels of each link a mask bool [P] leaves: bool [channels]."""
    views = _views(mask, shapes)
    return [views[link.producer].flatten(1).any(dim=1) for link in links]


def taken_channels(mask: Tensor, shapes: Sequence[tuple[int, ...]], links: Sequence[Link]) -> list[Tensor]:
    """Which channels of each link anything takes: bool [channels], one True at least; the others do not matter."""
    out = []
    for link in links:
        taken = groups(mask, shapes, link)[1].any(dim=2).any(dim=0)
        taken[0] |= not bool(taken.any())
        out.append(taken)
    return out


def mask_of(kept: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], links: Sequence[Link]) -> Tensor:
    """The mask bool [P] without the removed channels, in both layers of each link."""
    mask = torch.ones(sum(prod(shape) for shape in shapes), dtype=torch.bool, device=kept[0].device)
    views = _views(mask, shapes)
    for link, left in zip(links, kept, strict=True):
        views[link.producer][~left] = False
        views[link.consumer][:, ~left.repeat_interleave(link.span)] = False
    return mask


def weights_left(kept: Sequence[int], shapes: Sequence[tuple[int, ...]], links: Sequence[Link]) -> int:
    """How many weights `mask_of` keeps, from the number of channels that each link keeps."""
    outputs, inputs = {}, {}
    for link, left in zip(links, kept, strict=True):
        outputs[link.producer], inputs[link.consumer] = left, left * link.span
    return sum(outputs.get(i, shape[0]) * inputs.get(i, shape[1]) * prod(shape[2:]) for i, shape in enumerate(shapes))


def groups(vector: Tensor, shapes: Sequence[tuple[int, ...]], link: Link) -> tuple[Tensor, Tensor]:
    """Views of a vector [P] or longer: the weights that make each channel and those that take it.

    Returns:
        [channels, weights] and [outputs, channels, weights].
    """
    views = _views(vector, shapes)
    made, taken = views[link.producer], views[link.consumer]
    return made.view(link.channels, -1), taken.view(taken.shape[0], link.channels, -1)


def _views(vector: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    sizes = [prod(shape) for shape in shapes]
    parts = vector[: sum(sizes)].split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def smaller(model: nn.Module, names: Sequence[str], links: Sequence[Link], kept: Sequence[Tensor]) -> nn.Module:
    """A copy of the network whose layers have the kept channels alone: it computes what the masked one does.

    Args:
        model: with the pruned weights.
        names: its prunable weights.
        kept: bool [channels] for each link.
    """
    copy = deepcopy(model)
    modules: dict[str, Any] = dict(copy.named_modules())
    layers: list[Any] = [modules[name.rpartition(".")[0]] for name in names]
    for link, left in zip(links, kept, strict=True):
        left = left.to(layers[0].weight.device)
        producer, consumer = layers[link.producer], layers[link.consumer]
        _select(producer, ("weight", "bias"), left)
        consumer.weight = nn.Parameter(consumer.weight.data[:, left.repeat_interleave(link.span)].clone())
        for name in link.norms:
            _select(modules[name], ("weight", "bias", "running_mean", "running_var"), left)
    for module in copy.modules():
        _name_sizes(module)
    return copy


def resized(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the network with the tensors of `state`, whose layers may have fewer channels."""
    copy = deepcopy(model)
    modules = dict(copy.named_modules())
    for name, tensor in state.items():
        prefix, _, leaf = name.rpartition(".")
        trained = isinstance(getattr(modules[prefix], leaf), nn.Parameter)
        setattr(modules[prefix], leaf, nn.Parameter(tensor.clone()) if trained else tensor.clone())
    for module in copy.modules():
        _name_sizes(module)
    return copy


def _name_sizes(module: Any) -> None:
    """Let a module's numbers say what its tensors are."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        module.out_channels, module.in_channels = module.weight.shape[:2]
    elif isinstance(module, _NORMS) and module.weight is not None:
        module.num_features = module.weight.shape[0]


def _select(module: Any, names: Sequence[str], left: Tensor) -> None:
    for name in names:
        tensor = getattr(module, name, None)
        if isinstance(tensor, nn.Parameter):
            setattr(module, name, nn.Parameter(tensor.data[left].clone()))
        elif tensor is not None:
            setattr(module, name, tensor[left].clone())
