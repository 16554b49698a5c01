"""From a name in the configuration to a network, and from a network to its prunable weights."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

import torch
from torch import nn

from feddip_mpi import own_code
from feddip_mpi.errors import InputError
from feddip_mpi.models.alexnet import AlexNet
from feddip_mpi.models.lenet import LeNet5
from feddip_mpi.models.resnet import resnet18, resnet50
from feddip_mpi.models.trial import try_out
from feddip_mpi.models.vgg import VGG11

Builder = Callable[[int, tuple[int, int], int], nn.Module]

# Each builder with the smallest image side it accepts: below it a pooling or a batch norm would see nothing.
_BUILDERS: dict[str, tuple[Builder, int]] = {
    "lenet5": (LeNet5, 12),
    "alexnet": (AlexNet, 16),
    "vgg11": (VGG11, 32),
    "resnet18": (resnet18, 16),
    "resnet50": (resnet50, 16),
}
NAMES = tuple(_BUILDERS)

_PRUNABLE_MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def create(name: str, in_channels: int, image_size: tuple[int, int], classes: int) -> nn.Module:
    """Build a network with torch's default initial weights, drawn from the caller's `torch.manual_seed`.

    The networks are laid out for 28x28 or 32x32 images. They accept any size, square or not, from their minimum
    on: LeNet-5 and AlexNet then have a first linear layer of another width, the others average over positions.

    Args:
        name: one of NAMES, or an import path `package.module:function`, called as
            `function(in_channels=..., image_size=..., classes=...)`.
        in_channels: channels of an image, >= 1.
        image_size: height and width in pixels.
        classes: number of outputs, >= 1.

    Returns:
        A module from float32 [batch, in_channels, height, width] to logits [batch, classes].

    Raises:
        InputError: unknown name, image too small, an import path that does not give a network, or a network that
            the method cannot train (see `check`, `trial.try_out`).
    """
    if ":" in name:
        model = _create_imported(name, in_channels, image_size, classes)
    elif name in _BUILDERS:
        builder, smallest = _BUILDERS[name]
        if min(image_size) < smallest:
            fitting = [other for other, (_, side) in _BUILDERS.items() if side <= min(image_size)]
            hint = f"models that fit: {', '.join(fitting)}" if fitting else "name your own as package.module:function"
            raise InputError(
                f"model.name: {name} needs images of at least {smallest}x{smallest} pixels, "
                f"got {image_size[0]}x{image_size[1]}; {hint}"
            )
        model = builder(in_channels, image_size, classes)
    else:
        raise InputError(_unknown(name))
    check(model, name)
    if name not in _BUILDERS:
        try_out(model, name, in_channels, image_size, classes)
    return model


def check(model: nn.Module, name: str = "model") -> None:
    """Refuse what one flat float32 vector with one mask cannot represent; `name` is for the message.

    Raises:
        InputError: no parameters, or a parameter that is not trained or shares memory with another; a parameter or
            floating-point buffer that has no shape yet, is not float32 or not finite.
    """
    parameters = list(model.named_parameters(remove_duplicate=False))
    for key, tensor in [*parameters, *model.named_buffers()]:
        _check_tensor(key, tensor, name)
    owners: dict[int, str] = {}
    for key, parameter in parameters:
        if not parameter.requires_grad:
            raise InputError(
                f"model.name: {name}: {key} has requires_grad=False; allowed: parameters that are trained; make a fixed "
                "tensor a buffer (register_buffer), or set requires_grad=True"
            )
        if parameter.numel() == 0:
            continue
        first = owners.setdefault(parameter.untyped_storage().data_ptr(), key)
        if first != key:
            raise InputError(
                f"model.name: {name}: {first} and {key} share memory (tied weights), which pruning and averaging "
                "by tensor would treat as two; give each module its own weights"
            )
    if not owners:
        raise InputError(f"model.name: {name} has no parameters to train")


def _check_tensor(key: str, tensor: torch.Tensor, name: str) -> None:
    if nn.parameter.is_lazy(tensor):
        raise InputError(f"model.name: {name}: {key} has no shape yet; give lazy modules their sizes")
    if isinstance(tensor, nn.Parameter):
        what, other = "parameters", "call .float() on the model"
    elif tensor.is_floating_point():
        what, other = "floating-point buffers", "call .float() on it, or compute it in forward"
    else:
        return  # counters and the like are no part of the vector
    if tensor.dtype != torch.float32:
        raise InputError(f"model.name: {name}: {key} is {tensor.dtype}; {what} must be torch.float32: {other}")
    if not torch.isfinite(tensor).all():
        raise InputError(
            f"model.name: {name}: {key} holds NaN or infinite values; {what} must be finite, because they are averaged "
            "over the clients: initialise it, or compute it in forward"
        )


def prunable_names(model: nn.Module, keep_dense: Sequence[str] = ()) -> list[str]:
    """Names of every convolution and linear weight tensor in module order, without those in `keep_dense`.

    Transposed convolutions, embeddings, biases and normalisation parameters are not prunable; neither is a weight
    that is computed from others (torch's parametrisations).

    Raises:
        InputError: a name in `keep_dense` that is no prunable weight.
    """
    parameters = dict(model.named_parameters())
    names = [
        f"{prefix}.weight" if prefix else "weight"
        for prefix, module in model.named_modules()
        if isinstance(module, _PRUNABLE_MODULES)
    ]
    names = [name for name in names if name in parameters]
    unknown = [name for name in keep_dense if name not in names]
    if unknown:
        near = difflib.get_close_matches(unknown[0], names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"model.keep_dense: {', '.join(map(repr, unknown))} names no prunable weight; {hint}"
            f"valid names: {', '.join(names) or 'none'}"
        )
    return [name for name in names if name not in keep_dense]


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name.lower().replace("-", ""), NAMES, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"model.name: {name!r} is unknown; {hint}valid: {', '.join(NAMES)}, or package.module:function"


def _create_imported(path: str, in_channels: int, image_size: tuple[int, int], classes: int) -> nn.Module:
    _, function = own_code.imported("model.name", path, "function")
    if not callable(function):
        module_name, _, name = path.partition(":")
        what = "no function" if function is None else f"a {type(function).__name__}, not a function,"
        raise InputError(f"model.name: {path!r}: module {module_name!r} has {what} {name!r}")
    try:
        model = function(in_channels=in_channels, image_size=image_size, classes=classes)
    except Exception as error:
        raise InputError(
            f"model.name: {path}(in_channels={in_channels}, image_size={image_size}, classes={classes}) failed: "
            f"{_cause(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"model.name: {path!r} returned a {type(model).__name__}; it must return a torch.nn.Module")
    return model


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
