"""The checkpoint: HDF5 format 1 (docs/checkpoint.md), what it holds, which ones are kept, which one is resumed.

Every array needed to go on bit for bit is in it; schedules and random streams are functions of the round and are not.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from feddip_mpi import __version__, config, file_kinds, hdf5, masks, metrics, run_folder, runtime
from feddip_mpi.errors import DamagedFileError, FeddipError, InputError, UnreadableFileError
from feddip_mpi.hdf5 import Item, Reader
from feddip_mpi.residuals import Residual
from feddip_mpi.server import Server
from feddip_mpi.settings import Config
from feddip_mpi.vector import Layout

FORMAT_VERSION = 1
_NAME = re.compile(r"round-(\d{6,})\.h5")
# Below this share of non-zeros indices (4 bytes) and values take less than all values.
_SPARSE_BELOW = 0.5
_PART = 1 << 20
_CLASS_NAMES = "model/class_names"
_PAUSES = (0.5, 2.0, 5.0)  # seconds, between tries to read a file

T = TypeVar("T")


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint says besides the residuals.

    Attributes:
        config: of the run.
        layout: names and places of the tensors.
        server: W, mask and finished rounds, on the CPU.
        history: records of all finished rounds.
        identity: what must be the same on resume and cannot be read off the config (data fingerprint).
        histogram: int64 [clients, classes], the partition's training images.
        input_shape, classes: what `evaluate` and `export` need to build the model again.
        created: ISO 8601 time at which the run began.
        mean, std: normalisation per channel, in units of pixel / 255; whoever uses the model needs them.
        class_names: one per class, or none.
        memories: float32 arrays that the server keeps besides W: "reference" [P] (upload.residual: ef21) and "owed"
            [kept weights] (download.values), and those of the method, where there are any.
    """

    config: Config
    layout: Layout
    server: Server
    history: Sequence[metrics.Record]
    identity: str
    histogram: np.ndarray
    input_shape: tuple[int, int, int]
    classes: int
    created: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    class_names: tuple[str, ...] = ()
    memories: Mapping[str, np.ndarray] = field(default_factory=dict)


def path_of(folder: Path, round: int) -> Path:
    """The file of a round's checkpoint."""
    return folder / f"round-{round:06d}.h5"


def save(path: Path, snapshot: Snapshot, residuals: Iterable[tuple[int, Residual]]) -> str:
    """Write a checkpoint, complete or not at all; returns its digest.

    Args:
        residuals: (client, residual), consumed one at a time.
    """
    draft = hdf5.Draft(path)
    try:
        return complete(draft, snapshot, residuals)
    finally:
        draft.discard()


def complete(draft: hdf5.Draft, snapshot: Snapshot, residuals: Iterable[tuple[int, Residual]]) -> str:
    """Write what a begun checkpoint still lacks, and give it its name; see `save`.

    Args:
        draft: may hold residuals of other clients already (`add_residual`).
    """
    for item in _items(snapshot):
        draft.add(item)
    for client, residual in residuals:
        add_residual(draft, client, residual)
    server, layout = snapshot.server, snapshot.layout
    last = snapshot.history[-1] if snapshot.history else {}
    attributes = {
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "versions": json.dumps(runtime.versions()),
        "round": server.round,
        "config": json.dumps(config.to_dict(snapshot.config)),
        "seed": snapshot.config.seed,
        "created": snapshot.created,
        "saved": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "data_identity": snapshot.identity,
        "sparsity": masks.sparsity(server.mask),
        "test_accuracy": _or_nan(last.get("test_accuracy")),
    }
    groups = {
        "model": {
            "architecture": snapshot.config.model.name,
            "prunable": json.dumps(list(layout.prunable_names)),
            "parameters": json.dumps(list(layout.names[: layout.parameter_tensors])),
            "buffers": json.dumps(list(layout.names[layout.parameter_tensors :])),
            "input_shape": np.array(snapshot.input_shape),
            "classes": snapshot.classes,
            "normalisation": json.dumps({"mean": snapshot.mean, "std": snapshot.std}),
        }
    }
    return draft.finish(attributes, groups)


def _items(snapshot: Snapshot) -> Iterator[Item]:
    server, layout = snapshot.server, snapshot.layout
    for index, (name, view) in enumerate(zip(layout.names, layout.views(server.weights), strict=True)):
        kind = "parameters" if index < layout.parameter_tensors else "buffers"
        yield Item(f"model/{kind}/{name}", view.numpy())
    parts = server.mask.split(list(layout.prunable_sizes))
    for name, shape, part in zip(layout.prunable_names, layout.prunable_shapes, parts, strict=True):
        yield Item(f"model/masks/{name}", masks.pack(part), {"shape": np.array(shape)})
    if snapshot.class_names:  # a dataset: an attribute may not pass 64 KiB
        yield Item(_CLASS_NAMES, np.array([name.encode() for name in snapshot.class_names]))
    for name, values in snapshot.memories.items():
        yield Item(f"server/{name}", values)
    yield Item("partition/histogram", snapshot.histogram)
    for name, column in metrics.columns(snapshot.history).items():
        yield Item(f"history/{name}", column, {"depends_on": metrics.FIELDS[name].depends_on})


def add_residual(draft: hdf5.Draft, client: int, residual: Residual) -> None:
    """Write one client's residual, in the shorter of the two forms; beside it in memory lies at most its own size."""
    values = residual.values.cpu().numpy()
    attributes = {"round": residual.round, "size": values.size}
    count = int(np.count_nonzero(values))
    if count < _SPARSE_BELOW * values.size:
        where = _places(values, count)
        draft.add(Item(f"clients/{client}/residual/indices", where))
        values = values[where]
    draft.add(Item(f"clients/{client}/residual/values", values, attributes))


def _places(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` values that are not 0, found part by part: all at once they would be int64."""
    places = np.empty(count, np.int32 if values.size < 2**31 else np.int64)
    filled = 0
    for start in range(0, values.size, _PART):
        found = np.flatnonzero(values[start : start + _PART])
        places[filled : filled + found.size] = found + start
        filled += found.size
    return places


@dataclass(frozen=True)
class Loaded:
    """A checkpoint read back: all but the residuals.

    Attributes:
        tensors: every tensor of the layout by name; the prunable ones dense, as the server remembers them.
        masks: bool, one per prunable tensor, in its shape.
        saved: ISO 8601 time of the file; `created` is that of the run.
        versions: of the libraries that wrote it.
        The rest as in `Snapshot`.
    """

    path: Path
    config: Config
    server: Server
    layout_names: tuple[str, ...]
    prunable_names: tuple[str, ...]
    parameter_count: int
    masks: dict[str, np.ndarray]
    tensors: dict[str, np.ndarray]
    history: list[metrics.Record]
    identity: str
    histogram: np.ndarray
    input_shape: tuple[int, int, int]
    classes: int
    created: str
    saved: str
    versions: dict[str, str]
    digest: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    memories: dict[str, np.ndarray]


def load(path: Path) -> Loaded:
    """Read everything but the residuals (see `read_residuals`).

    Raises:
        InputError: no such file, or written by a newer version.
        DamagedFileError: damaged or unfinished; says where.
        UnreadableFileError: it could not be read, also not a few seconds later.
    """

    def read() -> Loaded:
        with hdf5.open_file(path) as reader:
            return _loaded(reader, check_format(reader))

    return _patiently(read)


def _patiently(read: Callable[[], T]) -> T:
    """What `read` returns, tried again for some seconds where a file system answers with an error (a stale handle)."""
    for pause in _PAUSES:
        try:
            return read()
        except UnreadableFileError as error:
            runtime.log.warning("%s; tries again in %g s", error, pause)
            time.sleep(pause)
    return read()


def _loaded(reader: Reader, attributes: dict[str, Any]) -> Loaded:
    try:
        loaded = _read(reader.path, reader, attributes)
    except (KeyError, TypeError, json.JSONDecodeError, ValueError) as error:
        raise DamagedFileError(
            f"{reader.path}: not a checkpoint of this program ({error!r} is missing or wrong)"
        ) from None
    named, round = _NAME.fullmatch(reader.path.name), loaded.server.round
    if named and int(named[1]) != round:  # files are taken for the newest, and deleted as old, by their names
        raise DamagedFileError(f"{reader.path}: its name is another round's, it holds round {round}: rename it")
    return loaded


def check_format(reader: Reader) -> dict[str, Any]:
    """Root attributes, after the format version was accepted."""
    attributes = reader.attributes()
    version = attributes.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise DamagedFileError(
            f"{reader.path}: not a checkpoint of this program (format_version {version}; the first is 1)"
        )
    if version > FORMAT_VERSION:
        reader.verify_digest()  # a damaged number is damage: an older checkpoint may then be resumed
        raise InputError(
            f"{reader.path}: checkpoint format {version} is newer than this program reads ({FORMAT_VERSION}); "
            f"it was written by feddip_mpi {attributes.get('package_version')}: update the package"
        )
    return attributes


def _read(path: Path, reader: Reader, attributes: dict[str, Any]) -> Loaded:
    model = reader.attributes("model")
    prunable = tuple(json.loads(model["prunable"]))
    parameters, buffers = json.loads(model["parameters"]), json.loads(model["buffers"])
    tensors = {name: reader.array(f"model/parameters/{name}") for name in parameters}
    tensors |= {name: reader.array(f"model/buffers/{name}") for name in buffers}
    packed = {name: reader.array(f"model/masks/{name}") for name in prunable}
    names = (*parameters, *buffers)
    flat = [torch.from_numpy(tensors[name].reshape(-1)) for name in names]
    parts = [masks.unpack(packed[name], tensors[name].size) for name in prunable]
    server = Server.of(
        round=attributes["round"],
        weights=torch.cat(flat),
        mask=torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool),
    )
    # A file of an earlier version may lack a name that was added since.
    stored = set(reader.names("history/"))
    table = {name: reader.array(f"history/{name}") for name in metrics.FIELDS if f"history/{name}" in stored}
    normalisation = json.loads(model["normalisation"])
    return Loaded(
        path=path,
        config=config.validate(json.loads(attributes["config"]), f"{path}: stored configuration"),
        server=server,
        layout_names=names,
        prunable_names=prunable,
        parameter_count=len(parameters),
        masks={n: p.numpy().reshape(tensors[n].shape) for n, p in zip(prunable, parts, strict=True)},
        tensors=tensors,
        history=metrics.records(table, prunable),
        identity=attributes["data_identity"],
        histogram=reader.array("partition/histogram"),
        input_shape=tuple(model["input_shape"]),
        classes=model["classes"],
        created=attributes["created"],
        saved=attributes["saved"],
        versions=json.loads(attributes["versions"]),
        digest=attributes["digest"],
        mean=tuple(normalisation["mean"]),
        std=tuple(normalisation["std"]),
        class_names=_class_names(reader),
        memories={name.removeprefix("server/"): reader.array(name) for name in reader.names("server/")},
    )


def _class_names(reader: Reader) -> tuple[str, ...]:
    if not reader.has(_CLASS_NAMES):
        return ()
    return tuple(name.decode() for name in reader.array(_CLASS_NAMES).tolist())


def read_residuals(path: Path) -> Iterator[tuple[int, Residual]]:
    """(client, residual) of every client that has one, in client order, one at a time."""
    with hdf5.open_file(path) as reader:
        values = [name for name in reader.names("clients/") if name.endswith("/residual/values")]
        for name in sorted(values, key=lambda n: int(n.split("/")[1])):
            yield int(name.split("/")[1]), _read_residual(reader, name)


def _read_residual(reader: Reader, name: str) -> Residual:
    size, round = reader.attribute(name, "size"), reader.attribute(name, "round")
    where = name.replace("/values", "/indices")
    if not reader.has(where):
        values = reader.array(name)
        if values.size != size:
            raise DamagedFileError(f"{reader.path}: {name!r} has {values.size} values of {size}, and no indices")
        return Residual(torch.from_numpy(values), round)
    # The dense one first: what is freed then lies at the end of the heap, where the next large block takes its room.
    dense = np.zeros(size, np.float32)
    dense[reader.array(where)] = reader.array(name)
    return Residual(torch.from_numpy(dense), round)


def read_partition(path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """int64 [clients, classes], the partition's training images, and the names of the classes, if there are any."""
    with hdf5.open_file(path) as reader:
        check_format(reader)
        return reader.array("partition/histogram"), _class_names(reader)


def residual_rounds(path: Path) -> dict[int, int]:
    """The round in which each client left its residual, in client order; clients without one are left out."""

    def read() -> dict[int, int]:
        with hdf5.open_file(path) as reader:
            values = [name for name in reader.names("clients/") if name.endswith("/residual/values")]
            return dict(sorted((int(name.split("/")[1]), int(reader.attribute(name, "round"))) for name in values))

    return _patiently(read)


def residual_bytes(path: Path) -> dict[int, int]:
    """Bytes that each client's residual takes in the file, by client; clients without one are left out."""
    found: dict[int, int] = {}
    with hdf5.open_file(path) as reader:
        for name in reader.names("clients/"):
            client = int(name.split("/")[1])
            found[client] = found.get(client, 0) + reader.stored_bytes(name)
    return dict(sorted(found.items()))


def verify(path: Path) -> tuple[int, Loaded]:
    """Read every byte that has a checksum, and what a resume reads; returns (datasets, what it holds)."""
    with hdf5.open_file(path) as reader:
        attributes = check_format(reader)
        datasets = reader.verify()
        return datasets, _loaded(reader, attributes)


def check_config(path: Path, told: Config, found: Loaded) -> None:
    """Raise InputError where a run folder's configuration, `told`, read from `path`, is not that of its checkpoint."""
    saved, now = config.flat(found.config), config.flat(told)
    differing = [key for key in saved if saved[key] != now[key] and key not in config.RESUMABLE_KEYS]
    if differing:
        lines = [f"  {key} is {now[key]!r}, but {saved[key]!r} in {found.path.name}" for key in differing]
        raise InputError("\n".join([f"{path}: says what cannot change in a resumed run, or is another run's:", *lines]))


def listed(folder: Path) -> list[Path]:
    """Checkpoints in a folder, oldest first, by the round in their name (clocks can go backwards)."""
    found = [(int(match[1]), path) for path in folder.glob("round-*.h5") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def newest(folder: Path) -> tuple[Loaded, list[str]]:
    """The newest checkpoint that verifies, and why each newer one was refused.

    Raises:
        InputError: there is none at all, or the newest is of a newer format.
        DamagedFileError: none verifies; lists the reasons.
        UnreadableFileError: the newest that may verify could not be read; nothing older is taken for it.
    """
    refused: list[str] = []
    paths = listed(folder)
    if not paths:
        named = folder.parent if folder.name == "checkpoints" else folder
        way_out = run_folder.name_one_of(named) or "start the run with `train`"
        raise InputError(f"{folder}: no checkpoint (round-NNNNNN.h5) in this folder; {way_out}")
    for path in reversed(paths):
        try:
            return load(path), refused
        except DamagedFileError as error:
            refused.append(str(error))
        except InputError:
            if path in listed(folder):  # of a newer format
                raise
            return newest(folder)  # deleted since it was listed, because newer ones are there
    raise DamagedFileError("no checkpoint of this run can be read:\n  " + "\n  ".join(refused))


def check_model(loaded: Loaded, layout: Layout) -> None:
    """Raise InputError where the model built from the stored configuration has other tensors than the checkpoint."""
    stored = {name: tuple(loaded.tensors[name].shape) for name in loaded.layout_names}
    ours = dict(zip(layout.names, layout.shapes, strict=True))
    if list(stored.items()) != list(ours.items()):
        name = next((n for n in {**stored, **ours} if stored.get(n) != ours.get(n)), "")
        there, here = (list(shapes[name]) if name in shapes else "not" for shapes in (stored, ours))
        differing = f"{name}: {there} there, {here} now" if name else "the order of its tensors"
        raise InputError(
            f"{loaded.path}: the model {loaded.config.model.name!r} has changed since ({differing}); take the code that the "
            "run was trained with, or start a new run with `train`"
        )


def other_kind(path: Path) -> InputError | None:
    """The error for a file that the user named and that never was a checkpoint: a configuration, say, or an exported model."""
    kind = file_kinds.kind_of(path)
    if kind is None or _NAME.fullmatch(path.name) or hdf5.is_sealed(path):
        return None
    inside = listed(folder_of(path.parent))
    example = inside[-1] if inside else "runs/NAME/checkpoints/round-000100.h5"
    return InputError(f"{path}: is {kind} and no checkpoint; name one such as {example}, or a run folder")


def find(path: Path) -> tuple[Loaded, list[str]]:
    """The checkpoint that a path means: the file itself, or the newest good one of a run folder.

    Returns:
        The checkpoint, and why newer ones of the folder were refused.

    Raises:
        InputError: there is none, or the file is of another kind.
        DamagedFileError: none can be read.
    """
    if path.is_dir():
        return newest(folder_of(path))
    if (error := other_kind(path)) is not None:
        raise error
    return load(path), []


def folder_of(path: Path) -> Path:
    """Where the checkpoints of a run folder lie; a folder that holds checkpoints itself is returned as it is."""
    inside = path / "checkpoints"
    return inside if inside.is_dir() else path


def prune_old(folder: Path, keep: int, keep_best: bool, final_sparsity: float, round: int) -> None:
    """Delete all but the newest `keep` and, if asked, the most accurate one that has reached the final sparsity.

    Args:
        round: of the checkpoint that was just written. Later ones were refused when the run went on from before them:
            they count for nothing, and stay until they are written again or are old.

    What cannot be read or deleted stays, with a warning.
    """
    with _tidying(folder):
        paths = [path for path in listed(folder) if int(path.stem.removeprefix("round-")) <= round]
        spared = set(paths[-keep:])
        if keep_best:
            spared |= _best(paths, final_sparsity)
        for path in [*(path for path in paths if path not in spared), *folder.glob(".round-*.h5.tmp-*")]:
            with _tidying(path):
                path.unlink(missing_ok=True)


@contextmanager
def _tidying(path: Path) -> Iterator[None]:
    """The new checkpoint is there: old files that cannot be read or removed are no reason to end the run."""
    try:
        yield
    except (OSError, FeddipError) as error:
        runtime.log.warning("%s: cannot be tidied up (%s); the next save tries again", path, hdf5.reason(error))


def _best(paths: Sequence[Path], final_sparsity: float) -> set[Path]:
    """The most accurate checkpoint that has reached the final sparsity, and those that cannot be read: it may be one of them."""
    scored, unread = [], set(paths)
    for path in paths:
        with _tidying(path):
            accuracy = _final_accuracy(path, final_sparsity)
            unread.remove(path)
            if accuracy is not None:
                scored.append((accuracy, path))
    return unread | ({max(scored)[1]} if scored else set())


def _final_accuracy(path: Path, final_sparsity: float) -> float | None:
    """Test accuracy of a checkpoint whose model is as sparse as the final one; None if it is not, or is damaged."""
    found = path.stat()
    accuracy, reached = _scores(path, found.st_mtime_ns, found.st_size)
    return accuracy if reached >= final_sparsity - 1e-4 and accuracy == accuracy else None


@lru_cache(maxsize=64)
def _scores(path: Path, modified_ns: int, size: int) -> tuple[float, float]:
    """Test accuracy and sparsity of a file; NaN if it is damaged. A file that stays the same is read once."""
    try:
        with hdf5.open_file(path) as reader:
            attributes = reader.attributes()
            return float(attributes["test_accuracy"]), float(attributes["sparsity"])
    except (DamagedFileError, KeyError):
        return float("nan"), float("nan")


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
