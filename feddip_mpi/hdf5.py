"""The only module that opens HDF5. A file is complete or absent, and every byte of it is under a checksum.

The HDF5 library may loop for ever or crash on a damaged file, so a file is compared with the checksum in its user block
(the 512 bytes before the HDF5 data, which other HDF5 programs skip) before the library sees it.

Layout-free: it knows groups, datasets and attributes; what they mean is `checkpoint.py`'s business.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from feddip_mpi.errors import DamagedFileError, FeddipError, InputError, UnreadableFileError

_SEAL_BYTES = 512  # of the user block; HDF5 allows powers of two from 512
_SEAL_TITLE = b"feddip-mpi sealed HDF5\n"
_READ_BYTES = 1 << 20
# A finished file never changes; where a file system has no locks, HDF5 would not open it.
_LOCKING = False


@dataclass(frozen=True)
class Item:
    """A dataset to write: its path in the file, its array, its attributes."""

    name: str
    array: np.ndarray
    attributes: Mapping[str, Any] = field(default_factory=dict)


class _Sink(io.FileIO):
    """What HDF5 writes into. It never tells of an error: `check` does.

    A library that has met a full disk prints a traceback for every dataset that is let go of, and crashes when the process
    ends (h5py 3.16, HDF5 2.0).
    """

    _error: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest and self._error is None:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self._error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self._error = self._error or error
        return size or 0

    def check(self) -> None:
        """Raises OSError where something could not be written."""
        if self._error is not None:
            raise OSError(self._error.errno, self._error.strerror)  # a new one: with its traceback it holds arrays


class Draft:
    """A file under a temporary name in the folder of its own; `finish` gives it that name, complete or not at all.

    One thread at a time may use it. Whoever made it calls `discard` in the end, also after `finish`.
    """

    def __init__(self, path: Path) -> None:
        """Begin a file. Raises OSError where the folder cannot be written."""
        import h5py

        self.path = path
        self._temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        self._sink = _Sink(self._temporary, "w+")
        try:
            self._file = h5py.File(self._sink, "w", userblock_size=_SEAL_BYTES)
        except BaseException:
            self._sink.close()
            self._temporary.unlink(missing_ok=True)
            raise

    def add(self, item: Item) -> None:
        """Write a dataset; its array is not needed any more after that."""
        dataset = self._file.create_dataset(item.name, data=item.array)
        for key, value in item.attributes.items():
            dataset.attrs[key] = value
        dataset.attrs["crc32"] = np.uint32(_crc(item.array))
        self._sink.check()

    def finish(
        self, attributes: Mapping[str, Any], group_attributes: Mapping[str, Mapping[str, Any]] | None = None
    ) -> str:
        """Seal the file, fsync, rename, fsync of the folder; returns the digest (see `write`)."""
        file = self._file
        for group, values in (group_attributes or {}).items():
            for key, value in values.items():
                file.require_group(group).attrs[key] = value
        for key, value in attributes.items():
            file.attrs[key] = value
        digest = _digest(file)
        file.attrs["digest"] = digest
        file.flush()
        self._sink.check()
        file.attrs["complete"] = True
        file.close()
        self._sink.check()
        self._sink.close()
        _seal(self._temporary)
        replace_durably(self._temporary, self.path)
        return digest

    def discard(self) -> None:
        """Close and remove what is not finished; it may be called twice."""
        try:
            with suppress(OSError, RuntimeError):  # whoever wrote was told
                self._file.close()
                self._sink.close()
        finally:
            with suppress(OSError):  # the next save removes it
                self._temporary.unlink(missing_ok=True)


def write(
    path: Path,
    items: Iterable[Item],
    attributes: Mapping[str, Any],
    group_attributes: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """Write a file atomically: a temporary one in the same folder, fsync, rename, fsync of the folder.

    Args:
        items: consumed one by one, so that a generator can stream arrays through little memory.
        attributes: of the root. `digest` and `complete` are added, in this order, as the last thing written.

    Returns:
        The digest: SHA-256 over names, shapes, types, checksums and attributes, whatever the order of the items.
    """
    draft = Draft(path)
    try:
        for item in items:
            draft.add(item)
        return draft.finish(attributes, group_attributes)
    finally:
        draft.discard()


def _seal(path: Path) -> None:
    """Write length and SHA-256 of all that follows the user block into it."""
    with open(path, "r+b") as file:
        file.seek(_SEAL_BYTES)
        length, digest = _hash_rest(file)
        text = _SEAL_TITLE + f"sha256 {digest}\nbytes {length}\n".encode()
        file.seek(0)
        file.write(text.ljust(_SEAL_BYTES, b"\n"))


def _hash_rest(file: BinaryIO) -> tuple[int, str]:
    """Length and SHA-256 of the file from where it stands to its end."""
    digest, length = hashlib.sha256(), 0
    while block := file.read(_READ_BYTES):
        digest.update(block)
        length += len(block)
    return length, digest.hexdigest()


def check_seal(path: Path) -> None:
    """Compare a file with the checksum in its user block, before the HDF5 library sees it.

    Raises:
        InputError: there is no such file.
        DamagedFileError: not written by `write`, cut short or altered.
        UnreadableFileError: it cannot be read now.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(_SEAL_BYTES)
            length, digest = _hash_rest(file)
    except (OSError, MemoryError) as error:
        raise _cannot_read(error, path) from None
    if not head.startswith(_SEAL_TITLE):
        raise DamagedFileError(f"{path}: not a file of this program, or damaged at its beginning")
    if head == (_SEAL_TITLE + f"sha256 {digest}\nbytes {length}\n".encode()).ljust(_SEAL_BYTES, b"\n"):
        return
    stated = head.split(b"\nbytes ")[-1].strip()
    if stated.isdigit() and int(stated) != length:
        size, expected = length + _SEAL_BYTES, int(stated) + _SEAL_BYTES
        raise DamagedFileError(f"{path}: truncated or damaged, {size} bytes long instead of {expected}")
    raise DamagedFileError(f"{path}: does not match its checksum (SHA-256); truncated or damaged")


def is_sealed(path: Path) -> bool:
    """Whether a file begins as `write` begins it; what follows may be damaged."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_SEAL_TITLE)) == _SEAL_TITLE
    except OSError:
        return False


def replace_durably(temporary: Path, path: Path) -> None:
    """fsync `temporary`, rename it to `path`, fsync the folder: after a power cut the old or the new file is there."""
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def reason(error: BaseException) -> str:
    """Why a file cannot be written or read, in the system's words; HDF5 wraps them in its own."""
    if isinstance(error, MemoryError):
        return "not enough memory"
    if isinstance(error, OSError) and error.strerror and "error message" not in error.strerror:
        return error.strerror
    inner = re.search(r"error message = '([^']*)'", str(error))
    return inner[1] if inner else " ".join(str(error).split())


def cannot_write(error: OSError, path: Path | None = None) -> FeddipError:
    """A readable error for a file of the run folder that cannot be written."""
    name = path or error.filename or "a file of the run folder"
    return FeddipError(
        f"{name}: cannot be written ({reason(error)}); checkpoints are untouched: free space or make it writable, then "
        "`feddip-mpi resume` goes on"
    )


def _cannot_read(error: BaseException, path: Path) -> FeddipError:
    """The error for a file that the system cannot read: it is not there, or nothing is known of its content."""
    if isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENOTDIR):
        return InputError(f"{path}: no such file; name a checkpoint such as runs/NAME/checkpoints/round-000100.h5")
    return UnreadableFileError(
        f"{path}: cannot be read now ({reason(error)}), which says nothing about its content; see to its file system, or to "
        "the memory, and try again"
    )


def _is_of_the_system(error: BaseException) -> bool:
    """Whether reading has failed, and not what was read. h5py hands the system's errors on in its own words, also as KeyError."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) is not None or "errno = " in str(error)


def write_text(path: Path, text: str) -> None:
    """Write a text file, complete or not at all."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        replace_durably(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Reader:
    """An open file whose arrays are checked as they are read. Made by `open_file`."""

    def __init__(self, file: Any, path: Path) -> None:
        self._file, self.path = file, path

    @cached_property
    def _names(self) -> dict[str, None]:
        """Paths of all datasets, sorted. Listed once: that opens every object of a file, which does not change."""
        with _guard(self.path):
            return dict.fromkeys(sorted(_datasets(self._file)))

    def attributes(self, group: str = "/") -> dict[str, Any]:
        """Attributes of a group, as Python values."""
        with _guard(self.path):
            found = self._found("group", group, "; not a checkpoint of this program, or damaged")
            return {key: _plain(value) for key, value in found.attrs.items()}

    def names(self, prefix: str = "") -> list[str]:
        """Paths of all datasets below `prefix`, sorted."""
        return [name for name in self._names if name.startswith(prefix)]

    def has(self, name: str) -> bool:
        """Whether there is a dataset of this path."""
        return name in self._names

    def array(self, name: str) -> np.ndarray:
        """The dataset, after its checksum was compared."""
        with _guard(self.path):
            dataset = self._found("dataset", name)
            array = dataset[()]
            if _crc(array) != int(dataset.attrs["crc32"]):
                raise DamagedFileError(
                    f"{self.path}: dataset {name!r} does not match its checksum; the file is damaged"
                )
        return np.asarray(array)

    def _found(self, kind: str, name: str, remark: str = "") -> Any:
        """A group or dataset. `in` would be no way to ask: it calls absent what cannot be read now."""
        try:
            return self._file[name]
        except KeyError as error:
            if _is_of_the_system(error):
                raise
            raise DamagedFileError(f"{self.path}: no {kind} {name!r}{remark}") from None

    def attribute(self, name: str, key: str) -> Any:
        """One attribute of a dataset."""
        with _guard(self.path):
            return _plain(self._file[name].attrs[key])

    def stored_bytes(self, name: str) -> int:
        """Size of a dataset's values; nothing is read."""
        with _guard(self.path):
            return int(self._file[name].nbytes)

    def verify(self) -> int:
        """Read everything and compare all checksums and the digest; returns the number of datasets."""
        names = self.names()
        for name in names:
            self.array(name)
        self.verify_digest()
        return len(names)

    def verify_digest(self) -> None:
        """Compare the digest, which covers names, types, attributes and checksums; no array is read."""
        with _guard(self.path):
            if _digest(self._file) != self.attributes().get("digest"):
                raise DamagedFileError(f"{self.path}: names, types or attributes do not match the digest; damaged")


@contextmanager
def open_file(path: Path) -> Iterator[Reader]:
    """Open a file that `write` finished.

    Raises:
        InputError: there is no such file.
        DamagedFileError: it is no file, was not written by `write`, is not as it was written, or was never finished.
        UnreadableFileError: it cannot be read now.
    """
    import h5py

    _require_file(path)
    check_seal(path)
    with _guard(path):
        file = h5py.File(path, "r", locking=_LOCKING)
    try:
        reader = Reader(file, path)
        if not reader.attributes().get("complete", False):
            raise DamagedFileError(f"{path}: written only in part (no mark of completion)")
        yield reader
    finally:
        file.close()


def _require_file(path: Path) -> None:
    """Opening anything else might wait for ever."""
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        is_file = False
        if error.errno not in (errno.ENOENT, errno.ELOOP) or not path.is_symlink():
            raise _cannot_read(error, path) from None
    if not is_file:
        raise DamagedFileError(f"{path}: no file, but a folder, a link that leads nowhere, or a device")


def read_arrays(path: Path | str, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Named arrays of any HDF5 file (a user's own data): no checksums expected.

    Raises:
        InputError: the file or an array is missing; the message lists what there is.
        DamagedFileError: the file is no HDF5, or damaged.
        UnreadableFileError: it cannot be read now.
    """
    import h5py

    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with _guard(path), h5py.File(path, "r", locking=_LOCKING) as file:
        missing = [name for name in names if not isinstance(file.get(name), h5py.Dataset)]
        if missing:
            raise InputError(
                f"{path}: no dataset {missing[0]!r}; the file holds {', '.join(sorted(file)) or 'nothing'}"
            )
        return {name: np.asarray(file[name][()]) for name in names}


@contextmanager
def _guard(path: Path) -> Iterator[None]:
    """h5py reports damage as many kinds of exception; all of them mean the same to the user, but what the system says of it."""
    try:
        yield
    except (
        OSError,
        LookupError,
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        MemoryError,
        ArithmeticError,
    ) as error:
        if _is_of_the_system(error):
            raise _cannot_read(error, path) from None
        raise DamagedFileError(
            f"{path}: cannot be read as HDF5, it is truncated or damaged ({reason(error)})"
        ) from None


def _crc(array: np.ndarray) -> int:
    contiguous = np.ascontiguousarray(array)
    return zlib.crc32(contiguous.reshape(-1).view(np.uint8).data) if contiguous.size else 0


def _datasets(file: Any) -> list[str]:
    """Paths of all datasets. By what HDF5 says of them: to open each object, as `visititems` does, takes five times as long."""
    from h5py import h5o

    found: list[str] = []

    def add(name: bytes, about: Any) -> None:
        if about.type == h5o.TYPE_DATASET:
            found.append(name.decode())

    h5o.visit(file.id, add, info=True)
    return found


def _digest(file: Any) -> str:
    """SHA-256 over what the checksums of the arrays do not cover, and over the checksums."""
    lines: list[str] = []

    def add(name: str, node: Any) -> None:
        shape = f"{node.shape} {node.dtype.str}" if hasattr(node, "dtype") else "group"
        attributes = {k: _plain(v) for k, v in sorted(node.attrs.items()) if (name, k) not in skipped}
        lines.append(f"{name} {shape} {attributes!r}")

    skipped = {("/", "digest"), ("/", "complete")}
    add("/", file)
    file.visititems(lambda name, node: add(name, node))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value
