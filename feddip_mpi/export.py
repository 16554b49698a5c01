"""The truly pruned model as a file that needs nothing of this package to be read.

Three forms: `safetensors` and `torch` hold every tensor dense, zeros included, ready for `load_state_dict`; `sparse`
holds of every pruned tensor only the weights that are left and where they belong. The sparse form is a safetensors
file too:

    NAME           a tensor that is stored dense (it was not pruned, or dense is smaller)
    NAME::values   float32 [kept], the weights inside the mask, in flat order
    NAME::mask     uint8 [ceil(P / 8)], the mask's bits, most significant first: `numpy.packbits`
    NAME::gaps     uint8, instead of the mask where that is smaller: distances between kept weights. 255 stands for
                   255 steps without a weight; any other byte is the rest of the way to the next one
    metadata       `shapes`: JSON, from NAME to its shape, of the tensors that are not stored dense

All three carry the same bits. A fourth, `small`, is for networks that have lost whole channels (`method: prunetrain`): the
tensors of the smaller network, which `load_small` builds. `READ_SPARSE` reads the sparse form without this package.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from feddip_mpi import __version__, federation, hdf5, models, server
from feddip_mpi.checkpoint import Loaded, check_model
from feddip_mpi.errors import DamagedFileError, InputError
from feddip_mpi.methods import channels
from feddip_mpi.report import terminal

FORMATS = ("safetensors", "torch", "sparse", "small")
_SUFFIXES = {
    ".sparse.safetensors": "sparse", ".small.safetensors": "small", ".safetensors": "safetensors",
    ".pt": "torch", ".pth": "torch",
}  # fmt: skip
_FAR = 255  # in gaps: this many steps, and no weight yet

READ_SPARSE = """\
import json, numpy as np
from safetensors import safe_open

with safe_open(FILE, "numpy") as f:
    state = {name: f.get_tensor(name) for name in f.keys()}
    shapes = json.loads(f.metadata()["shapes"])

for name, shape in shapes.items():
    flat = np.zeros(np.prod(shape, dtype=int), np.float32)
    gaps, mask = state.pop(name + "::gaps", None), state.pop(name + "::mask", None)
    where = np.unpackbits(mask, count=flat.size) == 1 if gaps is None else np.cumsum(gaps, dtype=int)[gaps < 255]
    flat[where] = state.pop(name + "::values")
    state[name] = flat.reshape(shape)

import torch  # what is above needs numpy and safetensors alone

model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
"""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        form: one of FORMATS.
        file_bytes: size of the file.
        dense_bytes: the same model with every value stored: 4 bytes each, counters 8.
        kept, prunable: prunable weights that are left, and all of them.
        network: how `models.create` makes the network.
        normalisation: what the network takes as its input.
    """

    path: Path
    form: str
    file_bytes: int
    dense_bytes: int
    kept: int
    prunable: int
    network: str
    normalisation: str

    @property
    def ratio(self) -> float:
        """How many times smaller than dense."""
        return self.dense_bytes / self.file_bytes


def export(loaded: Loaded, path: Path, form: str | None = None, force: bool = False) -> Exported:
    """Write the pruned model of a checkpoint, complete or not at all.

    Args:
        form: one of FORMATS; None: by the ending of `path`.
        force: whether an existing file is replaced.

    Raises:
        InputError: unknown form, the file exists, its folder does not, or it cannot be written.
    """
    form = form or form_of(path)
    if form not in FORMATS:
        raise InputError(f"--format {form}: unknown; valid: {', '.join(FORMATS)}")
    if path.is_dir() or (path.exists() and not force):
        way_out = "is a folder; name a file" if path.is_dir() else "exists already; --force replaces it"
        raise InputError(f"{path}: {way_out}")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; make it, or name a file elsewhere")
    tensors = pruned_state(loaded)
    dense_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if form == "small":
        tensors = small_state(loaded)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        _write(temporary, tensors, loaded, form)
        hdf5.replace_durably(temporary, path)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be written ({' '.join(str(error).split())})") from None
    finally:
        temporary.unlink(missing_ok=True)
    return Exported(
        path=path,
        form=form,
        file_bytes=path.stat().st_size,
        dense_bytes=dense_bytes,
        kept=int(loaded.server.mask.sum()),
        prunable=loaded.server.mask.numel(),
        network=_network(loaded),
        normalisation=_normalisation(loaded),
    )


def _network(loaded: Loaded) -> str:
    depth, height, width = loaded.input_shape
    return f"feddip_mpi.models.create({loaded.config.model.name!r}, {depth}, ({height}, {width}), {loaded.classes})"


def _normalisation(loaded: Loaded) -> str:
    if not loaded.mean:
        return "float32 images, normalised as in training"
    mean, std = (f"[{', '.join(f'{value:.6g}' for value in values)}]" for values in (loaded.mean, loaded.std))
    return f"float32 (pixel / 255 - mean) / std by channel, mean {mean}, std {std}"


def report(exported: Exported) -> str:
    """What was written, and how to read it, in a few lines."""
    size = terminal.size
    compared = f"{exported.ratio:.1f} times smaller than" if exported.ratio > 1.05 else "zeros stored, like"
    lines = [
        f"{exported.path}: {size(exported.file_bytes)}, {compared} the dense model ({size(exported.dense_bytes)})",
        f"{exported.kept:,} of {exported.prunable:,} prunable weights are left",
    ]
    file = repr(str(exported.path))
    if exported.form == "safetensors":
        lines.append(f"read it: model.load_state_dict(safetensors.torch.load_file({file}))")
    elif exported.form == "torch":
        lines.append(f"read it: model.load_state_dict(torch.load({file}, weights_only=True))")
    elif exported.form == "small":
        lines.append(f"read it: model = feddip_mpi.export.load_small({file}), the network with fewer channels")
        if exported.ratio <= 1.05:
            lines.append("no smaller: few or no channels are without weights (`method: prunetrain` removes whole ones)")
    else:
        lines.append("for storing and sending: only the weights that are left; reading it gives the dense tensors back")
        lines.append(
            f"read it: model.load_state_dict(feddip_mpi.export.load_sparse({file})), or without this package:\n\n"
            + READ_SPARSE.replace("FILE", file)
        )
    if exported.form != "small":
        lines.append(f"model: {exported.network}, or your own copy of this network")
    lines.append(f"its input: {exported.normalisation}")
    return "\n".join(lines)


def form_of(path: Path) -> str:
    """The form that the ending of a file's name asks for. Raises InputError for any other ending."""
    for form in ("sparse", "small"):
        if path.suffix in (".pt", ".pth") and path.stem.endswith(f".{form}"):
            raise InputError(f"{path}: the {form} form is a safetensors file; end it in .{form}.safetensors")
    for suffix, form in _SUFFIXES.items():
        if path.name.endswith(suffix):
            return form
    raise InputError(f"{path}: the ending names no format; end it in {', '.join(_SUFFIXES)}, or say --format")


def pruned_state(loaded: Loaded) -> dict[str, Tensor]:
    """The state dict of the pruned model, on the CPU, complete: `load_state_dict(strict=True)` takes it.

    The model is built for its integer buffers (batch counters): they count nothing here, are in no checkpoint, and
    stand as in a fresh model.
    """
    model, layout = federation.build_model(loaded.config, loaded.input_shape, loaded.classes)
    check_model(loaded, layout)
    vector = server.pruned(loaded.server.weights, loaded.server.mask)
    ours = dict(zip(layout.names, layout.views(vector), strict=True))
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    return {name: ours.get(name, value).detach().clone().contiguous() for name, value in state.items()}


def small_state(loaded: Loaded) -> dict[str, Tensor]:
    """The state dict of the network without the channels that no layer takes any more; its outputs are the same.

    Raises:
        InputError: the network's layers are no chain (see `channels.chain`).
    """
    model, layout = federation.build_model(loaded.config, loaded.input_shape, loaded.classes)
    model.load_state_dict(pruned_state(loaded))
    links = channels.chain(model, loaded.input_shape, layout.prunable_names)
    kept = channels.taken_channels(loaded.server.mask, layout.prunable_shapes, links)
    small = channels.smaller(model, layout.prunable_names, links, kept)
    return {name: value.detach().clone().contiguous() for name, value in small.state_dict().items()}


def _read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What a file says about itself, and its tensors. Raises InputError or DamagedFileError where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(f"{path}: cannot be read as safetensors ({error})") from None


def load_small(path: str | os.PathLike[str]) -> nn.Module:
    """The smaller network of the `small` form, in eval mode.

    Raises:
        InputError: there is no such file, or it is not of this form.
        DamagedFileError: it cannot be read.
    """
    about, state = _read_safetensors(path)
    if about.get("form") != "feddip-mpi small 1":
        raise InputError(f"{path}: not the small form; `feddip-mpi export RUN NAME.small.safetensors` writes it")
    depth, height, width = json.loads(about["input_shape"])
    model = models.create(about["architecture"], depth, (height, width), int(about["classes"]))
    return channels.resized(model, state).eval()


def _write(path: Path, tensors: Mapping[str, Tensor], loaded: Loaded, form: str) -> None:
    if form == "torch":
        torch.save(dict(tensors), path)  # tensors only: torch.load(weights_only=True) reads it
        return
    from safetensors.torch import save

    about = metadata(loaded)
    if form == "small":
        about |= {"form": "feddip-mpi small 1"}
    if form == "sparse":
        path.write_bytes(sparse_file(tensors, loaded))
        return
    # Bytes first, then the file: `save_file` would choose the file's permissions itself.
    path.write_bytes(save(dict(tensors), about))


def sparse_file(tensors: Mapping[str, Tensor], loaded: Loaded) -> bytes:
    """All bytes of the sparse form."""
    from safetensors.torch import save

    stored, shapes = to_sparse(tensors, loaded.masks)
    return save(stored, metadata(loaded) | {"form": "feddip-mpi sparse 1", "shapes": json.dumps(shapes)})


def metadata(loaded: Loaded) -> dict[str, str]:
    """What somebody needs who has only the file: text, and JSON for lists."""
    last = loaded.history[-1] if loaded.history else {}
    about = {
        "format": "pt",
        "architecture": loaded.config.model.name,
        "input_shape": json.dumps(list(loaded.input_shape)),
        "classes": str(loaded.classes),
        "data": loaded.identity,
        "method": loaded.config.method,
        "round": str(loaded.server.round),
        "sparsity": repr(1 - int(loaded.server.mask.sum()) / max(1, loaded.server.mask.numel())),
        "seed": str(loaded.config.seed),
        "writer": f"feddip-mpi {__version__}",
    }
    if last.get("test_accuracy") is not None:
        about["test_accuracy"] = repr(last["test_accuracy"])
    if loaded.mean:  # input = (pixel / 255 - mean) / std, per channel
        about |= {"mean": json.dumps(loaded.mean), "std": json.dumps(loaded.std)}
    if loaded.class_names:
        about["class_names"] = json.dumps(loaded.class_names)
    return about


def to_sparse(
    tensors: Mapping[str, Tensor], masks: Mapping[str, np.ndarray]
) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """The tensors of the sparse form.

    Args:
        tensors: the pruned model's, by name.
        masks: bool, in the shape of their tensor; tensors without one are stored dense.

    Returns:
        The tensors to store, and the shapes of those that are not stored dense.
    """
    stored: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        mask = masks.get(name)
        if mask is None:
            stored[name] = tensor
            continue
        kind, places = _places(mask)
        values = tensor.reshape(-1)[torch.from_numpy(mask.reshape(-1))].clone()
        if 4 * values.numel() + places.size >= 4 * tensor.numel():
            stored[name] = tensor
            continue
        stored |= {f"{name}::values": values, f"{name}::{kind}": torch.from_numpy(places)}
        shapes[name] = list(tensor.shape)
    return stored, shapes


def _places(mask: np.ndarray) -> tuple[str, np.ndarray]:
    """Where the kept weights are, in the smaller way: ("mask", bits) or ("gaps", bytes)."""
    bits, gaps = np.packbits(mask), to_gaps(np.flatnonzero(mask))
    return ("gaps", gaps) if gaps.size < bits.size else ("mask", bits)


def to_gaps(indices: np.ndarray) -> np.ndarray:
    """Ascending indices int64 [k] as uint8: the distance to the index before (to 0 for the first), in base 255.

    255 means: 255 further, nothing there. The running sum, taken where a byte is below 255, gives the indices back.
    """
    distances = np.diff(indices, prepend=0)
    far, rest = np.divmod(distances, _FAR)
    out = np.full(int(far.sum()) + indices.size, _FAR, np.uint8)
    out[np.cumsum(far + 1) - 1] = rest
    return out


def from_gaps(gaps: np.ndarray) -> np.ndarray:
    """The inverse of `to_gaps`: int64 [k]."""
    return np.cumsum(gaps, dtype=np.int64)[gaps < _FAR]


def load_sparse(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the sparse form back as a state dict, dense, all bits as exported.

    Without this package: `READ_SPARSE` is the same; `export` prints it.

    Raises:
        InputError: there is no such file, or it is not of this form.
        DamagedFileError: it cannot be read.
    """
    about, stored = _read_safetensors(path)
    if "shapes" not in about:
        raise InputError(f"{path}: not the sparse form; `safetensors.torch.load_file` reads it as it is")
    try:
        for name, shape in json.loads(about["shapes"]).items():
            stored[name] = _to_dense(stored, name, shape)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise DamagedFileError(f"{path}: its parts do not fit together ({error})") from None
    return stored


def _to_dense(stored: dict[str, Tensor], name: str, shape: list[int]) -> Tensor:
    """float32 [shape] from the parts of one tensor, which leave `stored`."""
    size = prod(shape)
    if f"{name}::gaps" in stored:
        where = from_gaps(stored.pop(f"{name}::gaps").numpy())
    else:
        where = np.flatnonzero(np.unpackbits(stored.pop(f"{name}::mask").numpy(), count=size))
    flat = torch.zeros(size)
    flat[torch.from_numpy(where)] = stored.pop(f"{name}::values")
    return flat.view(shape)
