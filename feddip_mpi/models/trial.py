"""One step of a network of the user's on two made-up images: what it does wrong is told before any work starts."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from feddip_mpi import generators
from feddip_mpi.errors import InputError
from feddip_mpi.models.dropout import Dropout


def try_out(model: nn.Module, name: str, in_channels: int, image_size: tuple[int, int], classes: int) -> None:
    """Forward and backward in training mode, on a copy: the model and the random generators stay as they are.

    Args:
        model: on the CPU.
        name: its import path, for the message.
        in_channels, image_size, classes: as of `create`.

    Raises:
        InputError: the model raises, or does not return finite logits [2, classes].
    """
    shape = [2, in_channels, *image_size]
    wanted = f"allowed: a forward that turns float32 {shape} into one tensor of finite logits {[2, classes]}"
    try:
        with generators.preserved():
            generators.seed_all(0, "trial")
            copy = deepcopy(model).train()
            logits = copy(torch.rand(shape))
            problem = _problem(logits, classes)
            if problem is None:
                loss = nn.functional.cross_entropy(logits, torch.zeros(2, dtype=torch.int64))
                torch.autograd.grad(loss, list(copy.parameters()), allow_unused=True)
    except Exception as error:  # the code is the user's: it may raise anything
        text = " ".join(str(error).split())
        raise InputError(
            f"model.name: {name}: a step on two images raised {type(error).__name__}: {text}; {wanted}"
        ) from error
    if problem is not None:
        raise InputError(f"model.name: {name}: for two images it returned {problem}; {wanted}")


def draws_globally(model: nn.Module, shape: Sequence[int]) -> bool:
    """Whether a forward in training mode, on a copy, takes numbers from the global generators of torch, Python or numpy.

    Args:
        model: on the CPU.
        shape: of a batch of images.
    """
    copy, images = deepcopy(model).train(), torch.zeros(*shape)
    for module in copy.modules():
        if isinstance(module, Dropout):
            module.generator = torch.Generator()
    with generators.preserved(), torch.no_grad():
        before = generators.states()
        copy(images)
        return generators.states() != before


def _problem(logits: object, classes: int) -> str | None:
    if not isinstance(logits, Tensor):
        return f"a {type(logits).__name__}"
    if logits.shape != (2, classes):
        return f"a tensor {list(logits.shape)}"
    if not torch.isfinite(logits).all():
        return "NaN or infinite values"
    return None
