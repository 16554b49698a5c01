"""Your own data from one npz or HDF5 file that holds four arrays.

`train_images`, `test_images`: uint8 [N, H, W], [N, H, W, C] or [N, C, H, W]; `train_labels`, `test_labels`: integers
[N] from 0. Of four axes, the shorter of the second and the last is taken as the channels; a tie means [N, C, H, W].
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from feddip_mpi.data.dataset import (
    ARRAY_NAMES,
    MAX_CLASSES,
    Dataset,
    as_bytes,
    channel_statistics,
    check,
    check_label_range,
    check_sizes,
)
from feddip_mpi.data.idx import MAX_DEFLATE_RATIO
from feddip_mpi.errors import InputError


def read_npz(path: Path) -> Dataset:
    """The data set in an npz file, with mean and std of its training images.

    Raises:
        InputError: the file cannot be read or is damaged, an array is missing, or has a wrong type, shape or label.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {name: _npy(archive, name, path) for name in ARRAY_NAMES}
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{path}: damaged: expected an npz file of plain arrays, found: {error}") from None
    except OSError as error:
        raise InputError(
            f"data.path: {path}: cannot be read: {error.strerror or error}; --set data.path=FILE names another file"
        ) from None
    return _build(arrays, "npz", path)


def read_hdf5(path: Path) -> Dataset:
    """The data set in an HDF5 file, with mean and std of its training images. Raises InputError as `read_npz`."""
    from feddip_mpi.hdf5 import read_arrays  # the one module that opens HDF5; not needed for any other source

    return _build(read_arrays(path, ARRAY_NAMES), "hdf5", path)


def to_channels_first(images: np.ndarray, what: str) -> np.ndarray:
    """uint8 [N, C, H, W], C-contiguous, from any of the three layouts above. Raises InputError if it is none."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        rule = "uint8 [N, H, W], [N, H, W, C] or [N, C, H, W]"
        raise InputError(f"{what}: expected {rule}, found {images.dtype} {list(images.shape)}{as_bytes(images)}")
    if 0 in images.shape:
        raise InputError(f"{what}: expected at least one image and pixel, found the shape {list(images.shape)}")
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[3] < images.shape[1]:
        images = images.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images)


def _build(arrays: Mapping[str, np.ndarray], name: str, path: Path) -> Dataset:
    """Bring the arrays of a file into the form of a Dataset, or say what is wrong with them."""
    arrays = dict(arrays)
    for kind in ("train", "test"):
        key = f"{kind}_images"
        arrays[key] = to_channels_first(arrays[key], f"{path}: {key}")
        key = f"{kind}_labels"
        arrays[key] = _to_labels(arrays[key], f"{path}: {key}")
    check_sizes(arrays, str(path))
    classes = 1 + int(arrays["train_labels"].max())
    _refuse_new_labels(arrays["test_labels"], classes, path)
    mean, std = channel_statistics(arrays["train_images"])
    dataset = Dataset(**arrays, classes=classes, class_names=(), mean=mean, std=std, name=name, source=str(path))
    return check(dataset, str(path))


def _refuse_new_labels(test_labels: np.ndarray, classes: int, path: Path) -> None:
    """A test label above all training labels would make classes that nothing is ever learnt of."""
    bad = np.flatnonzero(test_labels >= classes)
    if len(bad):
        raise InputError(
            f"{path}: test_labels: found {test_labels[bad[0]]} at position {bad[0]}, above the largest of train_labels; "
            f"allowed: 0 to {classes - 1}; remove these images or add training images of their classes"
        )


def _to_labels(labels: np.ndarray, what: str) -> np.ndarray:
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) == 0:
        raise InputError(f"{what}: expected integers [N], N >= 1, found {labels.dtype} {list(labels.shape)}")
    check_label_range(labels, MAX_CLASSES, what)  # before the cast, in which a large uint64 would turn negative
    return labels.astype(np.int64)


def _npy(archive: zipfile.ZipFile, name: str, path: Path) -> np.ndarray:
    """One array of an npz file; its header is compared with the size of the entry before anything is allocated."""
    try:
        entry = archive.getinfo(f"{name}.npy")
    except KeyError:
        found = ", ".join(item.removesuffix(".npy") for item in archive.namelist()) or "none"
        raise InputError(f"{path}: expected the arrays {', '.join(ARRAY_NAMES)}, found {found:.200}") from None
    if entry.file_size > MAX_DEFLATE_RATIO * entry.compress_size + 1024:
        raise InputError(f"{path}: {name}: damaged: {entry.compress_size} bytes cannot hold {entry.file_size}")
    with archive.open(entry) as content:
        version = np.lib.format.read_magic(content)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise InputError(f"{path}: {name}: expected npy format 1.0 or 2.0, found {version[0]}.{version[1]}")
        shape, _, dtype = readers[version](content)
        if dtype.hasobject:
            raise InputError(f"{path}: {name}: expected numbers, found Python objects, which are never unpickled")
        expected, real = math.prod(shape) * dtype.itemsize, entry.file_size - content.tell()
        if expected != real:
            raise InputError(f"{path}: {name}: damaged: expected {expected} bytes for {list(shape)}, found {real}")
    with archive.open(entry) as content:
        return np.lib.format.read_array(content, allow_pickle=False)
