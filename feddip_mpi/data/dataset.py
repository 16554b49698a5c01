"""The data set as every other module sees it: four plain arrays and a few numbers about them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from feddip_mpi.errors import InputError

ARRAY_NAMES = ("train_images", "train_labels", "test_images", "test_labels")
MAX_CLASSES = 65536  # a label beyond it is a mistake, and the model's last layer would be built for it
_BLOCK_PIXELS = 1 << 22
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels of one classification task.

    Attributes:
        train_images, test_images: uint8 [N, C, H, W], C-contiguous; N >= 1, the same C, H, W in both.
        train_labels, test_labels: int64 [N], in 0..classes-1.
        classes: number of classes.
        class_names: one name per class, or empty.
        mean, std: per channel, in units of pixel / 255; std > 0. Normalised pixel = (pixel / 255 - mean) / std.
        name: the name in the configuration.
        source: the folder, file or description it came from.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str
    source: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width of one image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    def arrays(self) -> dict[str, np.ndarray]:
        """The four arrays by name, not copied."""
        return {name: getattr(self, name) for name in ARRAY_NAMES}

    def metadata(self) -> dict[str, Any]:
        """Everything but the arrays, in JSON types; with `arrays`, enough for `from_arrays` on another rank."""
        return {
            "classes": self.classes,
            "class_names": list(self.class_names),
            "mean": list(self.mean),
            "std": list(self.std),
            "name": self.name,
            "source": self.source,
        }


def from_arrays(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> Dataset:
    """The data set whose `arrays()` and `metadata()` these are. Copies nothing: arrays may lie in a shared window."""
    return Dataset(
        **{name: arrays[name] for name in ARRAY_NAMES},
        classes=int(metadata["classes"]),
        class_names=tuple(metadata["class_names"]),
        mean=tuple(metadata["mean"]),
        std=tuple(metadata["std"]),
        name=metadata["name"],
        source=metadata["source"],
    )


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in units of pixel / 255.

    Counts pixel values first, so the sums are exact integers and the result depends on no order.

    Args:
        images: uint8 [N, C, H, W], N >= 1.

    Returns:
        mean, std: C floats each; the std of a constant channel is given as 1, so that dividing by it is safe.
    """
    count, channels, height, width = images.shape
    block = max(1, _BLOCK_PIXELS // (height * width))
    histogram = np.zeros((channels, 256), np.int64)
    for start in range(0, count, block):
        for channel in range(channels):
            histogram[channel] += np.bincount(images[start : start + block, channel].ravel(), minlength=256)
    values = np.arange(256) / 255.0
    share = histogram / histogram.sum(axis=1, keepdims=True)
    mean = share @ values
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(axis=1))
    std[(histogram > 0).sum(axis=1) == 1] = 1.0
    return tuple(mean.tolist()), tuple(std.tolist())


def check(dataset: object, source: str) -> Dataset:
    """The data set itself if it keeps every promise of `Dataset`; classes without a training image are logged.

    Args:
        dataset: what a reader or a user's function returned.
        source: who made it; it opens the error message.

    Raises:
        InputError: the first promise that is broken, with what was expected and found.
    """
    if not isinstance(dataset, Dataset):
        raise InputError(f"{source}: expected a feddip_mpi.data.Dataset, found {type(dataset).__name__}")
    for kind in ("train", "test"):
        check_images(getattr(dataset, f"{kind}_images"), f"{source}: {kind}_images")
        check_labels(getattr(dataset, f"{kind}_labels"), dataset.classes, f"{source}: {kind}_labels")
    check_sizes(dataset.arrays(), source)
    _check_numbers(dataset, source)
    _warn_of_empty_classes(dataset, source)
    return dataset


def as_bytes(images: np.ndarray) -> str:
    """How images become uint8, for the end of a message; empty where they are."""
    return "" if images.dtype == np.uint8 else "; scale them to 0..255, then images.round().astype(numpy.uint8)"


def check_images(images: object, what: str) -> None:
    """Raise InputError unless `images` is C-contiguous uint8 [N, C, H, W] without an empty axis."""
    if not isinstance(images, np.ndarray):
        raise InputError(f"{what}: expected a numpy array, found {type(images).__name__}")
    if images.dtype != np.uint8 or images.ndim != 4:
        raise InputError(
            f"{what}: expected uint8 [N, C, H, W], found {images.dtype} {list(images.shape)}{as_bytes(images)}"
        )
    if 0 in images.shape:
        raise InputError(f"{what}: expected at least one image and pixel, found the shape {list(images.shape)}")
    if not images.flags.c_contiguous:
        raise InputError(f"{what}: expected a C-contiguous array; pass it through numpy.ascontiguousarray")


def check_labels(labels: object, classes: object, what: str) -> None:
    """Raise InputError unless `labels` is int64 [N] in 0..classes-1, and classes in 2..MAX_CLASSES."""
    if not isinstance(classes, int) or not 2 <= classes <= MAX_CLASSES:
        raise InputError(f"{what}: expected 2 to {MAX_CLASSES} classes, found {classes!r}")
    if not isinstance(labels, np.ndarray):
        raise InputError(f"{what}: expected a numpy array, found {type(labels).__name__}")
    if labels.dtype != np.int64 or labels.ndim != 1:
        raise InputError(f"{what}: expected int64 [N], found {labels.dtype} {list(labels.shape)}")
    check_label_range(labels, classes, what)


def check_label_range(labels: np.ndarray, classes: int, what: str) -> None:
    """Raise InputError that names the first label outside 0..classes-1. labels: any integer type, [N]."""
    bad = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(bad):
        raise InputError(f"{what}: expected labels 0 to {classes - 1}, found {labels[bad[0]]} at position {bad[0]}")


def check_sizes(arrays: Mapping[str, np.ndarray], source: str) -> None:
    """Raise InputError unless each split has one label per image and both have images of one shape."""
    for kind in ("train", "test"):
        images, labels = len(arrays[f"{kind}_images"]), len(arrays[f"{kind}_labels"])
        if images != labels:
            raise InputError(
                f"{source}: expected one label per image, found {images} {kind} images and {labels} labels"
            )
    train, test = (list(arrays[f"{kind}_images"].shape[1:]) for kind in ("train", "test"))
    if train != test:
        raise InputError(f"{source}: expected images of one shape, found {train} for training and {test} for testing")


def _warn_of_empty_classes(dataset: Dataset, source: str) -> None:
    empty = np.flatnonzero(np.bincount(dataset.train_labels, minlength=dataset.classes) == 0).tolist()
    if empty:
        shown = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
        _log.warning(
            "%s: %d of %d classes have no training image: %s; the model has outputs for them that nothing trains",
            source, len(empty), dataset.classes, shown,
        )  # fmt: skip


def _check_numbers(dataset: Dataset, source: str) -> None:
    channels = dataset.shape[0]
    for name in ("mean", "std"):
        values = getattr(dataset, name)
        real = isinstance(values, tuple) and all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)
        if not real or len(values) != channels or (name == "std" and min(values) <= 0):
            rule = f"a tuple of {channels} finite numbers{' above 0' if name == 'std' else ''}"
            raise InputError(f"{source}: {name}: expected {rule}, one per channel, found {values!r}")
    names = dataset.class_names
    text = isinstance(names, tuple) and all(isinstance(name, str) for name in names)
    if not text or len(names) not in (0, dataset.classes):
        raise InputError(
            f"{source}: class_names: expected a tuple of {dataset.classes} texts or none, found {names!r:.80}"
        )
    for field in fields(dataset):
        if field.name in ("name", "source") and not isinstance(getattr(dataset, field.name), str):
            raise InputError(f"{source}: {field.name}: expected text, found {getattr(dataset, field.name)!r:.80}")
