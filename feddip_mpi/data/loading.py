"""From `data.name` to a data set: dispatch to the readers, or to a function of your own."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from feddip_mpi import file_kinds, own_code
from feddip_mpi.data import cifar, download, idx, own_arrays, places, synthetic
from feddip_mpi.data.catalog import KNOWN, Known
from feddip_mpi.data.dataset import Dataset, check, check_label_range
from feddip_mpi.errors import FeddipError, InputError
from feddip_mpi.settings import DataConfig

NAMES = (*KNOWN, "npz", "hdf5", "synthetic")
_IDX_SHAPE = (28, 28)
_KIND_OF = {"npz": file_kinds.ZIP, "hdf5": file_kinds.HDF5}


def load(config: DataConfig, seed: int) -> Dataset:
    """The data set that the configuration names.

    Args:
        config: `name`, `path`, `download` and `synthetic` are used.
        seed: of the run; only synthetic data and functions of your own depend on it.

    Raises:
        InputError: unknown name, missing or damaged files, or a function of your own that does not work.
    """
    if ":" in config.name:
        return _load_own(config, seed)
    if config.name in KNOWN:
        return _load_known(config)
    if config.name == "synthetic":
        return synthetic.generate(config.synthetic, seed)
    if config.name == "npz":
        return own_arrays.read_npz(_single_file(config, (".npz",)))
    if config.name == "hdf5":
        return own_arrays.read_hdf5(_single_file(config, (".h5", ".hdf5")))
    near = difflib.get_close_matches(config.name.lower(), NAMES, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(
        f"data.name: got {config.name!r}; {hint}valid: {', '.join(NAMES)}, or an import path package.module:function"
    )


def shape_of(config: DataConfig, seed: int) -> tuple[tuple[int, int, int], int]:
    """Channels, height and width of an image, and the number of classes; read from the data only where it must be."""
    return outline_of(config, seed)[:2]


def outline_of(config: DataConfig, seed: int) -> tuple[tuple[int, int, int], int, int]:
    """The same, and the number of images for training and testing together."""
    if config.name in KNOWN:
        known = KNOWN[config.name]
        return known.shape, len(known.class_names), known.images
    if config.name == "synthetic":
        made = config.synthetic
        return made.shape, made.classes, made.train_samples + made.test_samples
    dataset = load(config, seed)
    return dataset.shape, dataset.classes, len(dataset.train_labels) + len(dataset.test_labels)


def _load_known(config: DataConfig) -> Dataset:
    location = places.locate(config.name, config)
    known = KNOWN[config.name]
    if location.folder is None and config.download:
        download.fetch(known, places.download_root(config))
        location = places.locate(config.name, config)
    if location.folder is None:
        raise places.not_found(location)
    readers = {"cifar10": cifar.read10, "cifar100": cifar.read100}
    arrays = readers[known.name](location.folder) if known.name in readers else _read_idx(known, location.folder)
    return Dataset(
        **arrays,
        classes=len(known.class_names),
        class_names=known.class_names,
        mean=known.mean,
        std=known.std,
        name=known.name,
        source=str(location.folder),
    )


def _read_idx(known: Known, folder: Path) -> dict[str, np.ndarray]:
    """The four arrays of a data set in IDX files. Raises InputError that names the file that is wrong."""
    arrays: dict[str, np.ndarray] = {}
    for kind, images_file, labels_file in zip(("train", "test"), known.files[::2], known.files[1::2], strict=True):
        path = places.idx_file(folder, images_file)
        images = idx.read(path, axes=3)
        if images.shape[1:] != _IDX_SHAPE:
            raise InputError(f"{path}: expected images of {list(_IDX_SHAPE)} pixels, found {list(images.shape[1:])}")
        arrays[f"{kind}_images"] = images[:, None]
        path = places.idx_file(folder, labels_file)
        labels = idx.read(path, axes=1)
        check_label_range(labels, len(known.class_names), str(path))
        if len(labels) != len(images):
            raise InputError(f"{path}: expected one label for each of {len(images)} images, found {len(labels)} labels")
        arrays[f"{kind}_labels"] = labels.astype(np.int64)
    return arrays


def _single_file(config: DataConfig, suffixes: tuple[str, ...]) -> Path:
    """The file that `data.path` names, or the only one of this kind in the folder that it names."""
    path = places.named_path(config)
    wanted = " or ".join(suffixes)
    if path is None:
        raise InputError(
            f"data.path: not set; data.name={config.name} needs the {wanted} file there or in ${places.ENVIRONMENT_KEY}"
        )
    if not os.path.lexists(path):
        raise InputError(
            f"data.path: {path}: no such file; data.name={config.name} needs a {wanted} file: --set data.path=FILE names it"
        )
    if path.is_dir():
        path = _only_one(path, suffixes)
    kind = file_kinds.kind_of(path)
    if kind not in (None, _KIND_OF[config.name]):
        fitting = [name for name in _KIND_OF if _KIND_OF[name] == kind]
        way_out = f"set data.name={fitting[0]}" if fitting else "--set data.path=FILE names another"
        raise InputError(f"data.path: {path}: is {kind}, but data.name={config.name}; {way_out}")
    return path


def _only_one(folder: Path, suffixes: tuple[str, ...]) -> Path:
    files = sorted(item for item in folder.iterdir() if item.suffix in suffixes)
    if len(files) != 1:
        found = ", ".join(item.name for item in files) or "none"
        raise InputError(
            f"data.path: {folder}: expected one {' or '.join(suffixes)} file in this folder, found {found:.200}; name the file"
        )
    return files[0]


def _load_own(config: DataConfig, seed: int) -> Dataset:
    """Call the user's function, and check what it returns."""
    function = _import(config.name)
    try:
        dataset = function(config, seed)
    except FeddipError:
        raise
    except Exception as error:
        raise InputError(f"data.name: {config.name}(config, seed) raised {type(error).__name__}: {error}") from error
    return check(dataset, f"data.name: {config.name}")


def _import(name: str) -> Callable[[DataConfig, int], object]:
    module, function = own_code.imported("data.name", name, "function")
    if not callable(function):
        wanted = name.partition(":")[2]
        near = difflib.get_close_matches(wanted, [n for n in vars(module) if callable(getattr(module, n))], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        found = "nothing" if function is None else type(function).__name__
        raise InputError(f"data.name: {name}: expected a function {wanted!r} in {module.__name__}, found {found}{hint}")
    return function
