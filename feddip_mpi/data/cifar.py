"""Reader of CIFAR-10 and CIFAR-100 in their official binary layout.

A file is a row of records without a header: the label bytes, then 3072 bytes, the red, green and blue plane of
32 x 32 pixels. CIFAR-100 has two label bytes, the coarse and the fine class; the fine one is the label.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from feddip_mpi.data.dataset import check_label_range
from feddip_mpi.errors import InputError

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
COARSE_CLASSES = 20


def read10(folder: Path) -> dict[str, np.ndarray]:
    """The four arrays of CIFAR-10 from `data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin`.

    Raises:
        InputError: a file cannot be read, is truncated or holds a label outside 0..9, or the six differ in size
            (the official ones have 10000 records each; equal smaller ones are accepted).
    """
    train = [folder / f"data_batch_{batch}.bin" for batch in range(1, 6)]
    test = folder / "test_batch.bin"
    sizes = {path: _records(path, 1 + _PIXELS) for path in [*train, test]}
    # A file cut between two records has no other sign of damage.
    for path, records in sizes.items():
        if records != max(sizes.values()):
            raise _damaged(path, f"{max(sizes.values())} records, as in the other batches", f"{records}")
    return _splits(train, [test], (10,))


def read100(folder: Path) -> dict[str, np.ndarray]:
    """The four arrays of CIFAR-100, fine labels, from `train.bin` and `test.bin`.

    Raises:
        InputError: a file cannot be read, is truncated or holds a label out of range, or `train.bin` is not five
            times as long as `test.bin` (50000 and 10000 records officially; smaller ones are accepted).
    """
    train, test = folder / "train.bin", folder / "test.bin"
    records, expected = _records(train, 2 + _PIXELS), 5 * _records(test, 2 + _PIXELS)
    if records != expected:
        raise _damaged(train, f"{expected} records, five times as many as in test.bin", f"{records}")
    return _splits([train], [test], (COARSE_CLASSES, 100))


def _splits(train: Sequence[Path], test: Sequence[Path], classes: tuple[int, ...]) -> dict[str, np.ndarray]:
    train_images, train_labels = _read(train, classes)
    test_images, test_labels = _read(test, classes)
    return {
        "train_images": train_images,
        "train_labels": train_labels,
        "test_images": test_images,
        "test_labels": test_labels,
    }


def _read(paths: Sequence[Path], classes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 3, 32, 32] and labels int64 [N] of the files in their order.

    classes: how many classes each label byte of a record may name; the last one is the label.
    """
    record = len(classes) + _PIXELS
    counts = [_records(path, record) for path in paths]
    images = np.empty((sum(counts), _PIXELS), np.uint8)
    labels = np.empty(sum(counts), np.int64)
    start = 0
    for path, count in zip(paths, counts, strict=True):
        rows = _rows(path, count, record)
        for column, limit in enumerate(classes):
            check_label_range(rows[:, column], limit, f"{path}: label byte {column + 1}")
        images[start : start + count] = rows[:, len(classes) :]
        labels[start : start + count] = rows[:, len(classes) - 1]
        start += count
    return images.reshape(-1, *_SHAPE), labels


def _records(path: Path, record: int) -> int:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    if size == 0 or size % record:
        raise _damaged(path, f"a multiple of {record} bytes, one record per image", f"{size} bytes")
    return size // record


def _rows(path: Path, count: int, record: int) -> np.ndarray:
    try:
        values = np.fromfile(path, np.uint8)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(values) != count * record:
        raise _damaged(path, f"{count * record} bytes", f"{len(values)}: it changed while it was read")
    return values.reshape(count, record)


def _damaged(path: Path, expected: str, found: str) -> InputError:
    return InputError(f"{path}: damaged: expected {expected}, found {found}; replace the file with the original")
