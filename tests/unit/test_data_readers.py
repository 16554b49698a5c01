"""The readers of files: what they read, and how they refuse what is damaged."""

import gzip
import io
import struct
import sys
import types
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from feddip_mpi import data
from feddip_mpi.errors import InputError
from feddip_mpi.settings import DataConfig

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx(array, axes=None, kind=8):
    shape = array.shape if axes is None else axes
    return bytes([0, 0, kind, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + array.tobytes()


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def labels(count, classes, dtype=np.uint8):
    return (np.arange(count) % classes).astype(dtype)


def write_idx(folder, packed=False):
    arrays = (pixels(20, 28, 28), labels(20, 10), pixels(10, 28, 28, seed=1), labels(10, 10))
    for name, array in zip(IDX, arrays, strict=True):
        content = idx(array)
        (folder / f"{name}.gz" if packed else folder / name).write_bytes(gzip.compress(content) if packed else content)
    return arrays


def cifar_records(count, classes, seed=0):
    columns = [labels(count, limit) for limit in classes]
    return np.column_stack([*columns, pixels(count, 3072, seed=seed)])


def write_cifar10(folder):
    names = [*(f"data_batch_{batch}.bin" for batch in range(1, 6)), "test_batch.bin"]
    records = [cifar_records(10, (10,), seed) for seed in range(6)]
    for name, rows in zip(names, records, strict=True):
        rows.tofile(folder / name)
    return records


def write_cifar100(folder):
    train, test = cifar_records(500, (20, 100)), cifar_records(100, (20, 100), seed=1)
    train.tofile(folder / "train.bin")
    test.tofile(folder / "test.bin")
    return train, test


def own(**changes):
    arrays = {
        "train_images": pixels(12, 5, 6, 3),
        "train_labels": labels(12, 4),
        "test_images": pixels(8, 5, 6, 3, seed=1),
        "test_labels": labels(8, 4),
    }
    arrays.update(changes)
    return {name: array for name, array in arrays.items() if array is not None}


def npz(path, **changes):
    np.savez_compressed(path, **own(**changes))
    return path


def load(name, path):
    return data.load(DataConfig(name=name, path=str(path)), seed=1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx(tmp_path, name, packed):
    arrays = write_idx(tmp_path, packed)
    dataset = load(name, tmp_path)
    np.testing.assert_array_equal(dataset.train_images, arrays[0][:, None])
    np.testing.assert_array_equal(dataset.train_labels, arrays[1])
    np.testing.assert_array_equal(dataset.test_images, arrays[2][:, None])
    np.testing.assert_array_equal(dataset.test_labels, arrays[3])
    assert (dataset.classes, dataset.shape, dataset.source) == (10, (1, 28, 28), str(tmp_path))
    keeps_promises(dataset)


@pytest.mark.parametrize("inner", [False, True])
def test_cifar10(tmp_path, inner):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    records = write_cifar10(folder)
    dataset = load("cifar10", folder if inner else tmp_path)
    rows = np.concatenate(records[:5])
    np.testing.assert_array_equal(dataset.train_images.reshape(50, -1), rows[:, 1:])
    np.testing.assert_array_equal(dataset.train_labels, rows[:, 0])
    np.testing.assert_array_equal(dataset.test_images[7, 1, 2, 3], records[5][7, 1 + 1024 + 2 * 32 + 3])
    assert dataset.class_names[9] == "truck"
    keeps_promises(dataset)


@pytest.mark.parametrize("inner", [False, True])
def test_cifar100_takes_the_fine_label(tmp_path, inner):
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    train, test = write_cifar100(folder)
    dataset = load("cifar100", folder if inner else tmp_path)
    np.testing.assert_array_equal(dataset.train_labels, train[:, 1])
    np.testing.assert_array_equal(dataset.test_images.reshape(100, -1), test[:, 2:])
    assert dataset.classes == 100 == len(set(dataset.class_names))
    keeps_promises(dataset)


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ((9, 7), (1, 9, 7)),
        ((9, 7, 3), (3, 9, 7)),
        ((3, 9, 7), (3, 9, 7)),
        ((9, 7, 1), (1, 9, 7)),
        ((3, 9, 3), (3, 9, 3)),
    ],
)
def test_npz_layouts(tmp_path, layout, shape):
    images = pixels(12, *layout)
    path = npz(
        tmp_path / "mine.npz", train_images=images, test_images=pixels(8, *layout), train_labels=labels(12, 4, int)
    )
    for place in (path, tmp_path):
        dataset = load("npz", place)
        assert (dataset.shape, dataset.classes, dataset.source) == (shape, 4, str(path))
        keeps_promises(dataset)
    if shape == layout:
        np.testing.assert_array_equal(dataset.train_images, images)
    elif len(layout) == 3:
        np.testing.assert_array_equal(dataset.train_images, np.moveaxis(images, -1, 1))


def test_classes_without_a_training_image_are_told(tmp_path, caplog):
    caplog.set_level("WARNING", "feddip_mpi")
    assert load("npz", npz(tmp_path / "full.npz")).classes == 4 and not caplog.records
    few = np.array([0, 1, 5] * 4)
    assert load("npz", npz(tmp_path / "mine.npz", train_labels=few)).classes == 6
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{tmp_path / 'mine.npz'}: 3 of 6 classes have no training image: 2, 3, 4;")


def test_hdf5_goes_through_the_one_module_that_opens_it(tmp_path, monkeypatch):
    asked = []

    def read_arrays(path, names):
        asked.append((Path(path), tuple(names)))
        return own()

    monkeypatch.setitem(sys.modules, "feddip_mpi.hdf5", types.SimpleNamespace(read_arrays=read_arrays))
    path = tmp_path / "mine.h5"
    path.touch()
    dataset = load("hdf5", tmp_path)
    assert asked == [(path, ("train_images", "train_labels", "test_images", "test_labels"))]
    assert (dataset.name, dataset.shape) == ("hdf5", (3, 5, 6))
    keeps_promises(dataset)


def test_statistics_of_own_arrays_are_those_of_float64(tmp_path):
    images = pixels(200, 3, 5, 6) // np.array([1, 2, 3], np.uint8)[:, None, None]
    mean, std = data.channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255).std(axis=(0, 2, 3)), rtol=1e-12)
    assert data.channel_statistics(np.full((4, 1, 2, 2), 51, np.uint8)) == ((0.2,), (1.0,))


def test_metadata_and_arrays_rebuild_the_data_set_without_a_copy(tmp_path):
    import json

    dataset = load("npz", npz(tmp_path / "mine.npz"))
    again = data.from_arrays(dataset.arrays(), json.loads(json.dumps(dataset.metadata())))
    assert again.train_images is dataset.train_images
    assert {**vars(again), **dataset.arrays()} == {**vars(dataset), **dataset.arrays()}


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_official_fashion_mnist(monkeypatch):
    monkeypatch.delenv("FEDDIP_DATA", raising=False)
    dataset = load("fashion-mnist", DEBIAN)
    assert dataset.train_images.shape == (60000, 1, 28, 28)
    assert dataset.test_images.shape == (10000, 1, 28, 28)
    assert np.bincount(dataset.train_labels).tolist() == [6000] * 10
    mean, std = data.channel_statistics(dataset.train_images)
    np.testing.assert_allclose([mean, std], [dataset.mean, dataset.std], atol=5e-5)


# One broken file each: data set, file, its content made from the good one, what the message must say.
IDX_IMAGES, IDX_LABELS = IDX[0], IDX[1]
BROKEN_IDX = {
    "empty": (IDX_IMAGES, lambda good: b"", "an empty file"),
    "two bytes": (IDX_IMAGES, lambda good: good[:2], "magic number 00000803, found 0000"),
    "header cut": (IDX_IMAGES, lambda good: good[:10], "header of 16 bytes, found 10"),
    "header only": (IDX_IMAGES, lambda good: good[:16], "room for at most 16"),
    "one byte short": (IDX_IMAGES, lambda good: good[:-1], "15680 values"),
    "one byte more": (IDX_IMAGES, lambda good: good + b"x", "more bytes after them"),
    "labels as images": (IDX_IMAGES, lambda good: idx(labels(20, 10)), "found 00000801"),
    "images as labels": (IDX_LABELS, lambda good: idx(pixels(20, 28, 28)), "found 00000803"),
    "floats": (IDX_IMAGES, lambda good: idx(pixels(20, 28, 28), kind=13), "found 00000d03"),
    "little endian": (IDX_IMAGES, lambda good: good[:4][::-1] + good[4:], "found 03080000"),
    "web page": (IDX_IMAGES, lambda good: b"<!DOCTYPE html>" * 9, "found 3c21444f"),
    "other size": (IDX_IMAGES, lambda good: idx(pixels(20, 32, 32)), "[28, 28] pixels, found [32, 32]"),
    "no images": (IDX_IMAGES, lambda good: idx(pixels(0, 28, 28)), "at least one value, found the shape [0, 28, 28]"),
    "no width": (IDX_IMAGES, lambda good: idx(pixels(20, 28, 0)), "at least one value"),
    "no labels": (IDX_LABELS, lambda good: idx(labels(0, 1)), "at least one value"),
    "huge header": (IDX_IMAGES, lambda good: idx(pixels(20, 28, 28), (2**32 - 1, 28, 28)), "room for at most"),
    "overflowing header": (IDX_IMAGES, lambda good: idx(pixels(20), (2**32 - 1,) * 3), "room for at most"),
    "label 10": (IDX_LABELS, lambda good: good[:-1] + b"\x0a", "labels 0 to 9, found 10 at position 19"),
    "fewer labels": (IDX_LABELS, lambda good: idx(labels(19, 10)), "one label for each of 20 images, found 19"),
    "gzip: header only": (IDX_IMAGES, lambda good: b"\x1f\x8b", "gzip stream"),
    "gzip: cut": (IDX_IMAGES, lambda good: gzip.compress(good)[:-2000], "its end is missing"),
    "gzip: without checksum": (IDX_IMAGES, lambda good: gzip.compress(good)[:-8], "its end is missing"),
    "gzip: bit flipped": (IDX_IMAGES, lambda good: flip(gzip.compress(good, 0), 9000), "CRC check failed"),
    "gzip: not deflate": (IDX_IMAGES, lambda good: gzip.compress(good)[:10] + b"\xff" * 90, "valid gzip stream"),
    "gzip: garbage after": (IDX_IMAGES, lambda good: gzip.compress(good) + b"garbage", "Not a gzipped file"),
    "gzip: second member": (IDX_IMAGES, lambda good: gzip.compress(good) * 2, "more bytes after them"),
    "gzip: short inside": (IDX_IMAGES, lambda good: gzip.compress(good[:-5]), "only 15675"),
    "gzip: huge header": (IDX_LABELS, lambda good: gzip.compress(idx(labels(9, 9), (2**32 - 1,))), "room for at most"),
}


def flip(content, position):
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


@pytest.mark.parametrize("case", BROKEN_IDX)
def test_broken_idx(tmp_path, case):
    name, damage, message = BROKEN_IDX[case]
    write_idx(tmp_path)
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    refused("mnist", tmp_path, path, message)


BROKEN_CIFAR10 = {
    "empty": (lambda rows: rows[:0], "a multiple of 3073 bytes, one record per image, found 0"),
    "cut": (lambda rows: rows.ravel()[:-1], "found 30729 bytes"),
    "cut between records": (lambda rows: rows[:9], "10 records, as in the other batches, found 9"),
    "CIFAR-100 records": (lambda rows: cifar_records(10, (20, 100)), "a multiple of 3073"),
    "label 10": (lambda rows: rows + np.eye(10, 3073, dtype=np.uint8) * 10, "label byte 1: expected labels 0 to 9"),
}


@pytest.mark.parametrize("case", BROKEN_CIFAR10)
def test_broken_cifar10(tmp_path, case):
    damage, message = BROKEN_CIFAR10[case]
    rows = write_cifar10(tmp_path)[2]
    path = tmp_path / "data_batch_3.bin"
    damage(rows).tofile(path)
    refused("cifar10", tmp_path, path, message)


BROKEN_CIFAR100 = {
    "fine label": (
        lambda rows: set_byte(rows, 3, 1, 100),
        "label byte 2: expected labels 0 to 99, found 100 at position 3",
    ),
    "coarse label": (lambda rows: set_byte(rows, 4, 0, 20), "label byte 1: expected labels 0 to 19, found 20"),
    "cut between records": (lambda rows: rows[:-1], "500 records, five times as many as in test.bin, found 499"),
}


def set_byte(rows, row, column, value):
    rows = rows.copy()
    rows[row, column] = value
    return rows


@pytest.mark.parametrize("case", BROKEN_CIFAR100)
def test_broken_cifar100(tmp_path, case):
    damage, message = BROKEN_CIFAR100[case]
    rows, _ = write_cifar100(tmp_path)
    damage(rows).tofile(tmp_path / "train.bin")
    refused("cifar100", tmp_path, tmp_path / "train.bin", message)


BROKEN_ARRAYS = {
    "missing": ({"test_labels": None}, "expected the arrays train_images"),
    "float images": (
        {"train_images": np.zeros((12, 5, 6), np.float32)},
        "found float32 [12, 5, 6]; scale them to 0..255, then",
    ),
    "flat images": ({"train_images": pixels(12, 30)}, "found uint8 [12, 30]"),
    "no images": ({"train_images": pixels(0, 5, 6)}, "at least one image"),
    "scalar": ({"train_labels": np.int64(3)}, "expected integers [N]"),
    "float labels": ({"train_labels": np.zeros(12)}, "expected integers [N], N >= 1, found float64"),
    "one-hot labels": ({"train_labels": np.eye(12, dtype=int)}, "expected integers [N]"),
    "no test labels": ({"test_labels": labels(0, 1)}, "expected integers [N]"),
    "negative label": ({"train_labels": -np.ones(12, int)}, "found -1 at position 0"),
    "label 2**63": ({"train_labels": np.full(12, 2**63, np.uint64)}, "found 9223372036854775808"),
    "new test label": (
        {"test_labels": np.array([0, 1, 2, 3, 0, 255, 7, 3])},
        "test_labels: found 255 at position 5, above the largest of train_labels; allowed: 0 to 3",
    ),
    "one class": ({"train_labels": np.zeros(12, int), "test_labels": np.zeros(8, int)}, "2 to 65536 classes, found 1"),
    "fewer labels": ({"test_labels": labels(7, 4)}, "8 test images and 7 labels"),
    "two shapes": ({"test_images": pixels(8, 6, 6, 3)}, "images of one shape, found [3, 5, 6] for training"),
    "objects": ({"train_labels": np.array([{}] * 12, object)}, "never unpickled"),
}


@pytest.mark.parametrize("case", BROKEN_ARRAYS)
def test_broken_arrays(tmp_path, case):
    changes, message = BROKEN_ARRAYS[case]
    refused("npz", tmp_path, npz(tmp_path / "mine.npz", **changes), message)


def zip_with_header(shape):
    """An npz whose first array claims `shape` in its header but holds three bytes."""
    npy = io.BytesIO()
    np.lib.format.write_array_header_1_0(npy, {"descr": "|u1", "fortran_order": False, "shape": shape})
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train_images.npy", npy.getvalue() + b"abc")
    return out.getvalue()


BROKEN_NPZ = {
    "empty": (lambda good: b"", "expected an npz file"),
    "no zip": (lambda good: b"PK\0" * 99, "expected an npz file"),
    "text": (lambda good: b"PK" * 99, "is a text file, but data.name=npz; --set data.path=FILE names another"),
    "cut": (lambda good: good[:-100], "expected an npz file"),
    "bit flipped": (lambda good: flip(good, 200), "expected an npz file"),
    "huge header": (lambda good: zip_with_header((10**6, 10**3, 10**3)), "expected 1000000000000 bytes"),
}


@pytest.mark.parametrize("case", BROKEN_NPZ)
def test_broken_npz(tmp_path, case):
    damage, message = BROKEN_NPZ[case]
    path = npz(tmp_path / "mine.npz")
    path.write_bytes(damage(path.read_bytes()))
    refused("npz", path, path, message)


def test_arrays_in_a_file_of_another_kind_are_told_their_name(tmp_path):
    npz(tmp_path / "mine.npz").rename(tmp_path / "mine.h5")
    refused(
        "hdf5",
        tmp_path / "mine.h5",
        tmp_path / "mine.h5",
        "as npz and torch write), but data.name=hdf5; set data.name=npz",
    )
    with h5py.File(tmp_path / "mine.npz", "w"):
        pass
    refused(
        "npz", tmp_path / "mine.npz", tmp_path / "mine.npz", "is an HDF5 file, but data.name=npz; set data.name=hdf5"
    )
    (tmp_path / "mine.h5").write_text("version https://git-lfs.github.com/spec/v1\n")
    refused("hdf5", tmp_path / "mine.h5", tmp_path / "mine.h5", "is a text file, but data.name=hdf5")


def test_a_folder_for_npz_must_hold_one_file(tmp_path):
    refused("npz", tmp_path, tmp_path, "expected one .npz file in this folder, found none")
    npz(tmp_path / "a.npz"), npz(tmp_path / "b.npz")
    refused("npz", tmp_path, tmp_path, "found a.npz, b.npz")
    refused(
        "npz",
        tmp_path / "c.npz",
        tmp_path / "c.npz",
        "no such file; data.name=npz needs a .npz file: --set data.path=FILE",
    )
    refused(
        "hdf5", tmp_path / "c.h5", tmp_path / "c.h5", "no such file; data.name=hdf5 needs a .h5 or .hdf5 file: --set"
    )


def refused(name, path, named, message):
    with pytest.raises(InputError) as caught:
        load(name, path)
    assert str(named) in str(caught.value)
    assert message in str(caught.value)


def keeps_promises(dataset):
    from feddip_mpi.data.dataset import check

    assert check(dataset, "test") is dataset
