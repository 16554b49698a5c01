"""What one image costs a network: how often each weight is used, and what a training step keeps for the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from feddip_mpi import generators

_IMAGES = 2  # batch normalisation has no statistics of one


def uses(model: nn.Module, input_shape: Sequence[int], names: Sequence[str]) -> dict[str, int]:
    """Multiplications that one element of each named weight takes part in, per image: 1 for a linear layer on a vector.

    Args:
        model: on the CPU; it and the random generators stay as they are.
        input_shape: channels, height, width.
        names: convolution and linear weights, as in `registry.prunable_names`; one that is not reached has 0 uses.
    """
    found = dict.fromkeys(names, 0)
    copy = deepcopy(model).eval()

    def count(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            channels = getattr(module, "out_channels", None) or output.shape[-1]
            found[name] += output.numel() // (_IMAGES * channels)

        return hook

    for prefix, module in copy.named_modules():
        name = f"{prefix}.weight" if prefix else "weight"
        if name in found:
            module.register_forward_hook(count(name))
    with torch.no_grad(), generators.preserved():
        copy(torch.zeros(_IMAGES, *input_shape))
    return found


def kept_bytes(model: nn.Module, input_shape: Sequence[int]) -> tuple[int, int]:
    """Bytes that a training step keeps from the forward pass for the gradient, and the largest array of these; an image.

    Args:
        model: on the CPU; it and the random generators stay as they are.
        input_shape: channels, height, width.
    """
    copy = deepcopy(model).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in copy.parameters()}
    found: dict[int, int] = {}  # by place: what two operations keep is there once

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes() // _IMAGES
        return tensor

    with generators.preserved(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = copy(torch.zeros(_IMAGES, *input_shape))
    del logits  # until here all that was kept is alive, and no place was given twice
    return sum(found.values()), max(found.values(), default=0)
