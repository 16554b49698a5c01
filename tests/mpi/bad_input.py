"""A table of wrong input: broken configurations, data files, checkpoints and command lines, and what must be said.

`cases` makes the files in a folder and returns the commands. Those of `train`, `resume` and `evaluate` are for several ranks.
"""

from __future__ import annotations

import gzip
import io
import shutil
import struct
import typing
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from feddip_mpi import checkpoint, config, hdf5
from feddip_mpi.settings import MaskConfig

INPUT, DAMAGED = 2, 3


@dataclass(frozen=True)
class Case:
    """A command that must fail.

    Attributes:
        kind: of the table: config, yaml, data, checkpoint, command.
        argv: without the program's name.
        code: exit code.
        words: what the message must hold.
    """

    kind: str
    argv: list[str]
    code: int
    words: tuple[str, ...]

    @property
    def needs_mpi(self) -> bool:
        return self.argv[:1] in (["train"], ["resume"], ["evaluate"]) and "click" not in self.kind


def cases(folder: Path, run: Path) -> list[Case]:
    """All of them.

    Args:
        folder: new files go there.
        run: a finished run with two checkpoints or more, which stays as it is.
    """
    empty = folder / "empty.yaml"
    empty.write_text("")
    return [
        *_values(empty, folder),
        *_rules(empty, folder),
        *_yaml(folder),
        *_data(empty, folder),
        *_checkpoints(folder, run),
        *_command_lines(empty, folder, run),
    ]


def _train(config_file: Path, folder: Path, *values: str) -> list[str]:
    sets = [word for value in values for word in ("--set", value)]
    return ["train", str(config_file), *sets, "--out", str(folder / "never")]


# Configurations


def _values(empty: Path, folder: Path) -> Iterator[Case]:
    """For every key: outside its limits, and of another kind."""
    for key, field, _ in config.fields():
        for text, shown in _wrong(field):
            yield Case("config", _train(empty, folder, f"{key}={text}"), INPUT, (f"{key}: got {shown}",))


def _wrong(field: Any) -> Iterator[tuple[str, str]]:
    """Values that a key refuses, as on the command line and as the message repeats them."""
    kinds = typing.get_args(field.annotation) or (field.annotation,)
    if typing.get_origin(field.annotation) is tuple:
        yield "7", "7"
        return
    if typing.get_origin(field.annotation) is Literal:
        yield "nonsense", "'nonsense'"
        yield "3.5", "3.5"
        return
    if int in kinds or float in kinds:
        yield "nonsense", "'nonsense'"
        for rule in field.metadata:
            for name, step in (("ge", -1), ("gt", 0), ("le", 1), ("lt", 0)):
                limit = getattr(rule, name, None)
                if limit is not None:
                    value = limit + step
                    yield f"{value}", f"{value}"
        yield (".nan", "nan") if float in kinds else ("1.5", "1.5")
    elif bool in kinds:
        yield "maybe", "'maybe'"
    else:
        yield "[1, 2]", "[1, 2]"


def _rules(empty: Path, folder: Path) -> Iterator[Case]:
    """Keys that do not fit each other, and names that nothing answers to."""
    tiny = ("data.name=synthetic", "data.synthetic.train_samples=60", "data.synthetic.test_samples=20", "clients=3",
            "participants=2", "data.min_samples=1")  # fmt: skip
    for values, words in (
        (["participants=60"], ["participants: got 60", "clients = 50", "lower participants"]),
        (["clients=3"], ["participants: got 5", "raise clients"]),
        (["sparsity.initial=0.95"], ["sparsity.initial: got 0.95", "raise final"]),
        (["sparsity.final=0.3"], ["sparsity.final = 0.3"]),
        (["penalty.schedule=published", "penalty.maximum=1e-4"], ["penalty.maximum: got 0.0001", "published"]),
        (["data.synthetic.shape=[1, 28]"], ["data.synthetic.shape"]),
        (["data.synthetic.shape=[1, 0, 28]"], ["data.synthetic.shape: got [1, 0, 28]", "at least 1"]),
        (["data.synthetic.shape=[1, x, 28]"], ["data.synthetic.shape", "'x'"]),
        (["data.name=synthetic", "data.synthetic.train_samples=40"], ["train_samples: got 40", "clients = 50"]),
        (["download.values=int8"], ["download.values: got int8", "exchange=sharded"]),
        (["download.values=int8", "exchange=sharded", "upload.mode=dense"], ["upload.mode=masked"]),
        (["download.values=int8", "exchange=sharded", "upload.residual=ef21"], ["upload.residual=ef21"]),
        (["rounds=1e3"], ["rounds: got '1e3'", "write 1000"]),
        (["rounds=yes"], ["rounds: got True", "YAML reads"]),
        (["round=3"], ["round: unknown key", "did you mean"]),
        (["sparsity.finale=0.9"], ["sparsity.finale: unknown key", "did you mean 'sparsity.final'"]),
        (["final=0.9"], ["final: unknown key", "'sparsity.final'"]),
        (["mask=erk"], ["mask: got 'erk'", "section", ", ".join(MaskConfig.model_fields)]),
        (["mask.every.often=3"], ["mask.every: got {'often': 3}"]),
        (["mask.every=2", "mask.every.often=3"], ["'every' holds the value 2, not a section"]),
        (["rounds"], ["--set 'rounds'", "expected KEY=VALUE"]),
        (["=5"], ["--set '=5'", "expected KEY=VALUE"]),
        (["rounds=[1"], ["--set 'rounds=[1'", "not valid YAML"]),
        (["rounds=" + "[" * 5000], ["not valid YAML"]),
        (["rounds=0", "clients=0", "batch_size=-1"], ["3 problems", "rounds", "clients", "batch_size"]),
        (["data.name=minst"], ["data.name: got 'minst'", "did you mean 'mnist'"]),
        (["data.name=no_such_module:load"], ["data.name", "cannot import 'no_such_module'", "PYTHONPATH"]),
        (["data.name=json:load_all"], ["data.name", "'load_all'", "did you mean"]),
        (["data.name=json:dumps"], ["data.name: json:dumps(config, seed) raised TypeError"]),
        (["data.name=a b:c"], ["'a b:c'", "package.module:function"]),
        (["data.name=npz"], ["data.path: not set", "npz"]),
        ([*tiny, "model.name=lenet"], ["model.name: 'lenet' is unknown", "did you mean 'lenet5'"]),
        ([*tiny, "model.name=alexnet", "data.synthetic.shape=[3, 8, 8]"], ["alexnet needs images of at least 16x16", "8x8"]),
        ([*tiny, "model.name=no_such_module:net"], ["model.name: cannot import 'no_such_module'"]),
        ([*tiny, "model.name=json:nothing"], ["model.name: 'json:nothing'", "no function"]),
        ([*tiny, "model.name=json:dumps"], ["model.name: json:dumps", "failed", "TypeError"]),
        ([*tiny, "model.name=:net"], ["':net'", "package.module:function"]),
        ([*tiny, "model.keep_dense=[conv9.weight]"], ["model.keep_dense: 'conv9.weight'", "valid names: conv1.weight"]),
        ([*tiny, "clients=60", "participants=2", "data.partition=pathological", "data.classes_per_client=11"],
         ["data.classes_per_client", "11"]),
        ([*tiny, "data.partition=dirichlet", "data.min_samples=30"], ["data.min_samples", "30"]),
        *([([*tiny, "device=cuda"], ["device: cuda", "device=auto or cpu"])] if not Path("/dev/nvidia0").exists() else []),
    ):  # fmt: skip
        yield Case("config", _train(empty, folder, *values), INPUT, tuple(words))


def _yaml(folder: Path) -> Iterator[Case]:
    """Files that are no configuration."""
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 25))
    for name, content, words in (
        ("bracket", "rounds: [1, 2\n", ["not valid YAML"]),
        ("tab", "mask:\n\tevery: 3\n", ["not valid YAML", "line 2: a tab; indent with spaces"]),
        ("twice", "rounds: 3\nclients: 9\nrounds: 4\n", ["key 'rounds' given twice", "line 3"]),
        ("twice inside", "mask:\n  every: 3\n  every: 4\n", ["key 'every' given twice"]),
        ("list", "- rounds\n- clients\n", ["expected keys and values", "list"]),
        ("text", "just a sentence\n", ["expected keys and values", "str"]),
        ("number", "42\n", ["expected keys and values", "int"]),
        ("web page", "<!DOCTYPE html>\n<html><body>Not found</body></html>\n", ["expected keys and values"]),
        ("json cut", '{"rounds": 3, "clients": ', ["not valid YAML"]),
        ("dots", "mask.every: 3\n", ["mask.every", "indented below `mask:`"]),
        ("misspelt", "lerning_rate: 0.1\n", ["lerning_rate: unknown key", "did you mean 'learning_rate'"]),
        ("misspelt section", "masks:\n  every: 3\n", ["masks: unknown key", "did you mean"]),
        ("key list", "[a, b]: 3\n", ["is no key name"]),
        ("number key", "3: 4\n", ["which is no name"]),
        ("null section", "mask:\nrounds: x\n", ["rounds: got 'x'"]),
        ("python", "rounds: !!python/object/apply:os.system ['true']\n", ["not valid YAML", "python/object"]),
        ("anchor", "rounds: *nothing\n", ["not valid YAML", "nothing"]),
        ("two documents", "rounds: 3\n---\nrounds: 4\n", ["not valid YAML"]),
        ("date", "seed: 2020-01-01\n", ["seed: got datetime.date(2020, 1, 1)"]),
        ("no date", "rounds: 3\nseed: 2020-13-45\n", ["not valid YAML", "'2020-13-45' in line 2: month"]),
        ("deep", "[" * 20000, ["not valid YAML"]),
        ("laughs", laughs + "rounds: *a24\n", ["rounds: got", "a0: unknown key", "14 more"]),
        ("laughs as a section", laughs + "mask: *a24\n", ["mask: got"]),
        ("laughs as a key", laughs + "? *a24\n: 3\n", ["is no key name"]),
        ("control", "rounds: 3\x00\n", ["not valid YAML"]),
        ("latin", "rounds: 3  # gr\xf6\xdfer\n".encode("latin-1"), ["cannot read the configuration"]),
        ("binary", bytes(range(256)), ["cannot read the configuration"]),
        ("hdf5", b"\x89HDF\r\n\x1a\n" + bytes(200), ["cannot read the configuration"]),
    ):  # fmt: skip
        path = folder / f"{name}.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        yield Case("yaml", _train(path, folder), INPUT, (str(path), *words))
    yield Case(
        "yaml", _train(folder / "nowhere.yaml", folder), INPUT, ("nowhere.yaml", "No such file", "name a YAML file")
    )
    yield Case("yaml", _train(folder, folder), INPUT, (str(folder), "directory", "name a YAML file"))


# Data


IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def _idx(array: np.ndarray, shape: tuple[int, ...] | None = None, kind: int = 8) -> bytes:
    axes = array.shape if shape is None else shape
    return bytes([0, 0, kind, len(axes)]) + struct.pack(f">{len(axes)}I", *axes) + array.tobytes()


def _pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).integers(0, 256, shape, np.uint8)


def _labels(count: int, classes: int) -> np.ndarray:
    return (np.arange(count) % classes).astype(np.uint8)


def _data(empty: Path, folder: Path) -> Iterator[Case]:
    few = ["clients=3", "participants=2", "model.name=lenet5"]
    for name, path, code, words in (
        *_idx_files(folder), *_cifar_files(folder), *_npz_files(folder), *_hdf5_files(folder)
    ):  # fmt: skip
        argv = _train(empty, folder, *few, f"data.name={name}", f"data.path={path}")
        yield Case("data", argv, code, (str(path), *words))


Found = Iterator[tuple[str, Path, int, list[str]]]


def _idx_files(folder: Path) -> Found:
    images, labels = _pixels(20, 28, 28), _labels(20, 10)
    good = dict(zip(IDX, (_idx(images), _idx(labels), _idx(images[:10]), _idx(labels[:10])), strict=True))
    first, second = IDX[0], IDX[1]
    packed = gzip.compress(good[first])
    for label, name, content, words in (
        ("empty", first, b"", ["an empty file"]),
        ("header", first, good[first][:10], ["header of 16 bytes, found 10"]),
        ("nothing behind", first, good[first][:16], ["15680 values"]),
        ("short", first, good[first][:-1], ["15680 values"]),
        ("long", first, good[first] + b"x", ["more bytes after them"]),
        ("wrong magic", first, b"\x00\x00\x08\x01" + good[first][4:], ["magic number 00000803, found 00000801"]),
        ("floats", first, _idx(images, kind=13), ["found 00000d03"]),
        ("web page", first, b"<!DOCTYPE html>" * 9, ["found 3c21444f"]),
        ("other size", first, _idx(_pixels(20, 32, 32)), ["[28, 28] pixels, found [32, 32]"]),
        ("count too large", first, _idx(images, (2**32 - 1, 28, 28)), ["room for at most"]),
        ("no images", first, _idx(images[:0]), ["at least one value"]),
        ("label 10", second, good[second][:-1] + b"\x0a", ["labels 0 to 9, found 10 at position 19"]),
        ("label 255", second, good[second][:-1] + b"\xff", ["found 255"]),
        ("fewer labels", second, _idx(labels[:19]), ["one label for each of 20 images, found 19"]),
        ("test labels missing", IDX[3], None, ["missing", "data.download=true"]),
        ("train images missing", first, None, ["missing"]),
        ("gzip cut", first, packed[:-200], ["its end is missing"]),
        ("gzip only", first, b"\x1f\x8b", ["gzip stream"]),
        ("gzip garbage", first, packed[:10] + b"\xff" * 90, ["valid gzip stream"]),
        ("gzip twice", first, packed * 2, ["more bytes after them"]),
    ):
        path = folder / f"idx {label}"
        path.mkdir()
        for file, whole in good.items():
            wanted = content if file == name else whole
            if wanted is not None:
                (path / file).write_bytes(wanted)
        yield "mnist", path, INPUT, [name, *words] if "missing" not in label else words
    (folder / "idx nothing").mkdir()
    yield "mnist", folder / "idx nothing", INPUT, ["not found", "ways out"]
    yield "fashion-mnist", folder / "nowhere", INPUT, ["not found", "data.path"]


def _cifar_files(folder: Path) -> Found:
    ten = np.column_stack([_labels(10, 10), _pixels(10, 3072)])
    hundred = np.column_stack([_labels(50, 20), _labels(50, 100), _pixels(50, 3072)])
    names = [*(f"data_batch_{batch}.bin" for batch in range(1, 6)), "test_batch.bin"]
    high = ten.copy()
    high[3, 0] = 10
    for label, content, words in (
        ("empty", b"", ["a multiple of 3073 bytes", "found 0"]),
        ("cut", ten.tobytes()[:-1], ["found 30729 bytes"]),
        ("record missing", ten[:9].tobytes(), ["10 records, as in the other batches, found 9"]),
        ("label 10", high.tobytes(), ["expected labels 0 to 9, found 10 at position 3"]),
        ("other kind", hundred.tobytes(), ["a multiple of 3073"]),
    ):
        path = folder / f"cifar10 {label}"
        path.mkdir()
        for name in names:
            (path / name).write_bytes(content if name == names[2] else ten.tobytes())
        yield "cifar10", path, INPUT, [names[2], *words]
    fine, coarse = hundred.copy(), hundred.copy()
    fine[7, 1], coarse[7, 0] = 100, 20
    for label, content, words in (
        ("fine", fine.tobytes(), ["label byte 2", "found 100 at position 7"]),
        ("coarse", coarse.tobytes(), ["label byte 1", "found 20 at position 7"]),
        ("short", hundred[:-1].tobytes(), ["50 records, five times as many", "found 49"]),
        ("cut", hundred.tobytes()[:-7], ["a multiple of 3074"]),
    ):
        path = folder / f"cifar100 {label}"
        path.mkdir()
        (path / "train.bin").write_bytes(content)
        (path / "test.bin").write_bytes(hundred[:10].tobytes())
        yield "cifar100", path, INPUT, ["train.bin", *words]


def _own() -> dict[str, np.ndarray]:
    return {
        "train_images": _pixels(12, 14, 14), "train_labels": _labels(12, 4).astype(int),
        "test_images": _pixels(8, 14, 14), "test_labels": _labels(8, 4).astype(int),
    }  # fmt: skip


def _array_faults() -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    """Wrong arrays of one's own: a label, what replaces the good ones, what is said."""
    nan = np.full((12, 14, 14), np.nan, np.float32)
    yield "nan images", {"train_images": nan}, ["train_images: expected uint8", "found float32", "scale them to 0..255"]
    yield "float images", {"test_images": np.zeros((8, 14, 14))}, ["test_images: expected uint8", "found float64"]
    yield "flat", {"train_images": _pixels(12, 196)}, ["found uint8 [12, 196]"]
    yield "five axes", {"train_images": _pixels(12, 1, 1, 14, 14)}, ["[12, 1, 1, 14, 14]"]
    yield "no images", {"train_images": _pixels(0, 14, 14)}, ["at least one image"]
    yield "nan labels", {"train_labels": np.full(12, np.nan)}, ["train_labels: expected integers", "float64"]
    yield "one-hot", {"train_labels": np.eye(12, dtype=int)}, ["expected integers [N]"]
    yield "no labels", {"test_labels": np.zeros(0, int)}, ["test_labels: expected integers [N], N >= 1"]
    yield "negative", {"train_labels": -np.ones(12, int)}, ["found -1 at position 0"]
    yield "huge label", {"train_labels": np.full(12, 2**63, np.uint64)}, ["found 9223372036854775808"]
    yield "new label", {"test_labels": np.full(8, 9)}, ["test_labels: found 9", "allowed: 0 to 3"]
    yield "one class", {"train_labels": np.zeros(12, int), "test_labels": np.zeros(8, int)}, ["2 to 65536 classes"]
    yield "counts", {"test_labels": np.zeros(7, int)}, ["8 test images and 7 labels"]
    yield "shapes", {"test_images": _pixels(8, 15, 14)}, ["images of one shape"]


def _npz_files(folder: Path) -> Found:
    for label, changes, words in _array_faults():
        path = folder / f"{label}.npz"
        np.savez(path, **{**_own(), **changes})
        yield "npz", path, INPUT, words
    whole = folder / "whole.npz"
    np.savez_compressed(whole, **_own())
    good = whole.read_bytes()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**3, 10**3)}
    )
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("train_images.npy", header.getvalue() + b"abc")
    for label, content, words in (
        ("empty", b"", ["expected an npz file"]),
        ("cut npz", good[:-100], ["expected an npz file"]),
        ("half npz", good[: len(good) // 2], ["expected an npz file"]),
        ("flipped npz", good[:200] + bytes([good[200] ^ 1]) + good[201:], ["expected an npz file"]),
        ("text npz", b"train_images = ...", ["a text file, but data.name=npz"]),
        ("huge npz", archive.getvalue(), ["expected 1000000000000 bytes"]),
    ):
        path = folder / f"{label}.npz"
        path.write_bytes(content)
        yield "npz", path, INPUT, words
    np.savez(folder / "objects.npz", **{**_own(), "train_labels": np.array([{}] * 12, object)})
    yield "npz", folder / "objects.npz", INPUT, ["never unpickled"]
    np.savez(folder / "renamed.npz", x_train=_pixels(3, 4, 4))
    yield "npz", folder / "renamed.npz", INPUT, ["expected the arrays train_images", "found x_train"]
    yield "npz", folder / "nowhere.npz", INPUT, ["data.path", "no such file", "--set data.path=FILE"]
    (folder / "no npz").mkdir()
    yield "npz", folder / "no npz", INPUT, ["expected one .npz file in this folder, found none"]


def _hdf5_files(folder: Path) -> Found:
    def write(label: str, arrays: dict[str, Any], **options: Any) -> Path:
        path = folder / f"{label}.h5"
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file.create_dataset(name, data=array, **options)
        return path

    for label, changes, words in _array_faults():
        yield "hdf5", write(label, {**_own(), **changes}), INPUT, words
    renamed = _own()
    renamed["images"] = renamed.pop("train_images")
    yield "hdf5", write("renamed", renamed), INPUT, ["no dataset 'train_images'", "the file holds images"]
    inside = {name if name != "test_labels" else "test_labels/of": array for name, array in _own().items()}
    yield "hdf5", write("group", inside), INPUT, ["no dataset 'test_labels'"]
    yield (
        "hdf5",
        write("strings", {**_own(), "train_labels": [b"cat"] * 12}),
        INPUT,
        ["train_labels: expected integers"],
    )
    path = write("packed", _own(), compression="gzip", chunks=True)
    with h5py.File(path) as file:
        chunk = file["train_images"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + 5 : chunk.byte_offset + 60] = bytes(55)
    path.write_bytes(content)
    yield "hdf5", path, DAMAGED, ["truncated or damaged"]
    good = write("good", _own()).read_bytes()
    for label, content in (
        ("empty", b""), ("cut", good[:-3000]), ("head", good[:40]),
        ("superblock", good[:20] + bytes(60) + good[80:]),
    ):  # fmt: skip
        path = folder / f"{label} file.h5"
        path.write_bytes(content)
        yield "hdf5", path, DAMAGED, ["cannot be read as HDF5", "truncated or damaged"]
    path = folder / "text file.h5"
    path.write_bytes(b"train_images: ...")
    yield "hdf5", path, INPUT, ["a text file, but data.name=hdf5"]
    yield "hdf5", folder / "nowhere.h5", INPUT, ["data.path", "no such file", "--set data.path=FILE"]


# Checkpoints


def _checkpoints(folder: Path, run: Path) -> Iterator[Case]:
    newest = checkpoint.listed(run / "checkpoints")[-1]
    whole = newest.read_bytes()
    with h5py.File(newest) as file:
        place = file["model/parameters/fc1.weight"].id.get_offset() + 5
    flipped = bytearray(whole)
    flipped[place] ^= 1
    other = folder / "foreign.h5"
    with h5py.File(other, "w") as file:
        file["weights"] = np.ones(3)
    hdf5.write(folder / "sealed.h5", [], {"by": "another program"})
    hdf5.write(folder / "half.h5", [], {"format_version": 1})
    faults: dict[str, tuple[bytes, list[str]]] = {
        "empty": (b"", ["not a file of this program"]),
        "seal only": (whole[:512], ["truncated or damaged"]),
        "half": (whole[: len(whole) // 2], ["truncated or damaged", f"instead of {len(whole)}"]),
        "last byte": (whole[:-1], ["truncated or damaged"]),
        "longer": (whole + b"x", ["truncated or damaged"]),
        "flipped": (bytes(flipped), ["does not match its checksum"]),
        "text": (b"rounds: 3\n", ["not a file of this program"]),
        "foreign": (other.read_bytes(), ["not a file of this program"]),
        "sealed by others": ((folder / "sealed.h5").read_bytes(), ["not a checkpoint of this program"]),
        "without content": ((folder / "half.h5").read_bytes(), ["not a checkpoint of this program"]),
    }
    target = folder / "model.safetensors"
    kinds = {"text": "a text file", "foreign": "an HDF5 file"}
    for label, (content, words) in faults.items():
        path = folder / f"{label} checkpoint.h5"
        path.write_bytes(content)
        for argv in (["inspect", str(path)], ["export", str(path), str(target)], ["evaluate", str(path)]):
            if label in kinds:
                yield Case(
                    "checkpoint", argv, INPUT, (str(path), f"is {kinds[label]} and no checkpoint; name one such as")
                )
            else:
                yield Case("checkpoint", argv, DAMAGED, (str(path), *words))
        if label in kinds:
            yield Case("checkpoint", ["verify", str(path)], INPUT, ("REFUSED", str(path), "and no checkpoint"))
        else:
            yield Case("checkpoint", ["verify", str(path)], DAMAGED, ("DAMAGED", str(path), "1 of 1 files damaged"))
        broken = folder / f"run {label}"
        shutil.copytree(run, broken)
        inside = checkpoint.listed(broken / "checkpoints")
        for file in inside:
            file.write_bytes(content)
        yield Case(
            "checkpoint", ["resume", str(broken)], DAMAGED, ("no checkpoint of this run can be read", *map(str, inside))
        )
    newer = folder / "run newer"
    shutil.copytree(run, newer)
    path = checkpoint.listed(newer / "checkpoints")[-1]
    _with_format(path, 2)
    for argv in (["resume", str(newer)], ["evaluate", str(newer)], ["inspect", str(newer)], ["verify", str(path)],
                 ["export", str(path), str(target)]):  # fmt: skip
        yield Case("checkpoint", argv, INPUT, (str(path), "format 2 is newer", "update the package"))


def _with_format(path: Path, version: int) -> None:
    """The file as a later version of the program would have written it."""
    with h5py.File(path, "r+") as file:
        file.attrs.modify("format_version", version)
        del file.attrs["digest"]
        file.attrs["digest"] = hdf5._digest(file)
    hdf5._seal(path)


# Command lines


def _command_lines(empty: Path, folder: Path, run: Path) -> Iterator[Case]:
    path = str(checkpoint.listed(run / "checkpoints")[-1])
    taken = folder / "taken.safetensors"
    taken.write_bytes(b"mine")
    void = folder / "void"
    void.mkdir()
    for argv, words in (
        (["trian", str(empty)], ["trian"]),
        (["train"], ["CONFIG"]),
        (["train", str(empty), "--colour", "red"], ["--colour"]),
        (["train", str(empty), str(empty)], ["unexpected extra argument"]),
        (["train", str(empty), "--set"], ["--set", "argument"]),
        (["resume"], ["DIR"]),
        (["resume", str(run), "--rounds", "9"], ["--rounds", "use --set rounds=9"]),
        (["evaluate", path, "--batch-size", "0"], ["--batch-size", "0"]),
        (["evaluate", path, "--batch-size", "many"], ["--batch-size", "many"]),
        (["evaluate"], ["CHECKPOINT"]),
    ):
        yield Case("command: click", argv, INPUT, tuple(words))
    for argv, words in (
        (["plan"], ["CONFIG"]),
        (["plan", str(empty), "--every", "0"], ["--every", "0"]),
        (["plan", str(empty), "--every", "often"], ["--every", "often"]),
        (["plan", str(empty), "--set", "rounds=0"], ["rounds: got 0"]),
        (["plan", str(folder / "nowhere.yaml")], ["nowhere.yaml", "name a YAML file"]),
        # steps.py runs without matplotlib
        (["plan", str(empty), "--plot", str(folder / "plan.png")], ["pictures need matplotlib", "pip install"]),
        (["data", "--plot", "x.png"], ["--plot", "name a CONFIG"]),
        (["data", str(empty), "--set", "data.name=minst"], ["data.name", "did you mean 'mnist'"]),
        (["verify"], ["CHECKPOINT"]),
        (["verify", str(folder / "nothing.h5")], ["no such file"]),
        (["verify", str(void)], ["no checkpoint"]),
        (["inspect"], ["CHECKPOINT"]),
        (["inspect", str(folder / "nothing.h5")], ["no such file"]),
        (["inspect", str(void)], ["no checkpoint"]),
        (["export", path], ["FILE"]),
        (["export", path, str(taken)], ["taken.safetensors", "--force"]),
        (["export", path, str(folder / "m.onnx")], ["m.onnx"]),
        (["export", path, str(folder / "m.pt"), "--format", "onnx"], ["--format", "onnx"]),
        (["export", path, str(void)], [str(void)]),
        (["export", path, str(folder / "no" / "m.pt")], ["m.pt", "there is no folder"]),
        (["export", str(folder / "nothing.h5"), str(folder / "m.pt")], ["no such file"]),
        (["bench"], []),
        (["bench", "everything"], ["everything"]),
        (["bench", "exchange", "--size", "large"], ["--size", "large"]),
    ):
        yield Case("command", argv, INPUT, tuple(words))
    for argv, words in (
        (["train", str(empty), "--out", str(folder)], [str(folder), "never overwritten"]),
        (["train", str(empty), "--out", str(empty)], [str(empty), "no folder"]),
        (["resume", str(void)], [str(void), "no checkpoint"]),
        (["resume", str(folder / "nothing")], ["no such run folder"]),
        (["resume", path], ["no such run folder"]),
        (["resume", str(run), "--set", "learning_rate=1"], ["'learning_rate' cannot change", "allowed: rounds"]),
        (["resume", str(run), "--set", "rounds=1"], ["rounds=1", "must be at least"]),
        (["resume", str(run), "--set", "rounds=x"], ["rounds: got 'x'"]),
        (["resume", str(run), "--set", "rounds"], ["expected KEY=VALUE"]),
        (["evaluate", path, "--set", "seed=2"], ["'seed' cannot change in an evaluation", "allowed: data.path"]),
        (["evaluate", path, "--set", "eval.batch_size=0"], ["eval.batch_size: got 0"]),
        (["evaluate", str(folder / "nothing.h5")], ["no such file"]),
        (["evaluate", str(void)], ["no checkpoint"]),
    ):
        yield Case("command", argv, INPUT, tuple(words))
    for words in (["--sparsity", "1"], ["--sparsity", "-0.1"], ["--values", "int7"], ["--modes", "telepathy"],
                  ["--size", "0"], ["--regrow", "-1"], ["--clients", "0"], ["--repeats", "0"], ["--seconds", "0"],
                  ["--download", "int9"], ["--model", "lenet"]):  # fmt: skip
        argv = ["bench", "exchange", *words, "--out", str(folder / "never")]
        yield Case("command: bench", argv, INPUT, (words[0] if words[0] != "--model" else "lenet", words[1]))


def problem(case: Case, code: int, out: str, err: str) -> str:
    """What is wrong with how a command ended; "" for nothing."""
    text = out + err
    spoken = [line for line in err.splitlines() if line.lower().startswith(("error: ", "usage error: "))]
    if code != case.code:
        return f"exit code {code}, not {case.code}: {text[-600:]}"
    if "Traceback" in text:
        return f"a traceback: {text[-600:]}"
    if len(spoken) != 1 and case.argv != ["bench"]:
        return f"{len(spoken)} messages: {err[-600:]}"
    if len(text) > 6000:
        return f"a message of {len(text)} characters: {text[:300]}"
    flat = " ".join(text.split())
    missing = [word for word in case.words if " ".join(word.split()) not in flat]
    return f"does not say {missing}: {text[-600:]}" if missing else ""


def table(given: list[Case]) -> dict[str, int]:
    """How many there are of each kind."""
    kinds = [case.kind.split(":")[0] for case in given]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
