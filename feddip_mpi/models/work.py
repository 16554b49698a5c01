"""How often each weight of a network is used for one image."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from feddip_mpi import generators


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
            found[name] += output.numel() // (2 * channels)

        return hook

    for prefix, module in copy.named_modules():
        name = f"{prefix}.weight" if prefix else "weight"
        if name in found:
            module.register_forward_hook(count(name))
    with torch.no_grad(), generators.preserved():
        copy(torch.zeros(2, *input_shape))
    return found
