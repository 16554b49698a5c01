"""Download of the public data sets. A file arrives complete and with its checksum, or not at all."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import logging
import os
import posixpath
import secrets
import shutil
import tarfile
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path

from feddip_mpi.data.catalog import Known, Remote
from feddip_mpi.data.places import has_file
from feddip_mpi.errors import InputError

TIMEOUT_SECONDS = 60.0
_MAX_BYTES = 1 << 30  # no public data set here is larger; an endless answer must not fill the disk
_BLOCK_BYTES = 1 << 20
_log = logging.getLogger(__name__)


def fetch(known: Known, root: Path) -> None:
    """Download what is missing of a data set into its folder below `root`.

    Several processes may do so at once: each works on names of its own and renames at the end.

    Raises:
        InputError: no connection, an error answer, a wrong checksum, or no place to write. Files that arrived
            completely stay; nothing else is left behind.
    """
    folder = root / known.folders[0]
    if known.gzipped:
        for remote, name in zip(known.remotes, known.files, strict=True):
            if not has_file(known, folder, name):
                fetch_file(remote, folder)
    else:
        fetch_archive(known.remotes[0], folder, known.files)


def fetch_file(remote: Remote, folder: Path, timeout: float = TIMEOUT_SECONDS) -> Path:
    """Download one file into `folder` and return its path. Raises InputError as `fetch`."""
    with _workplace(folder, remote) as temporary:
        _receive(remote, temporary, timeout)
        target = folder / remote.file_name
        os.replace(temporary, target)
    return target


def fetch_archive(remote: Remote, folder: Path, files: tuple[str, ...], timeout: float = TIMEOUT_SECONDS) -> None:
    """Download a tar archive and move `files`, which it holds in a folder of the same name, to `folder`.

    Raises InputError as `fetch`, and if a file is not in the archive.
    """
    with _workplace(folder, remote) as temporary:
        _receive(remote, temporary, timeout)
        unpacked = temporary.with_suffix(".unpacked")
        try:
            unpacked.mkdir()
            _unpack(temporary, unpacked, folder.name, files, remote)
            for name in files:
                os.replace(unpacked / name, folder / name)
        finally:
            shutil.rmtree(unpacked, ignore_errors=True)


def _unpack(archive_path: Path, target: Path, prefix: str, files: tuple[str, ...], remote: Remote) -> None:
    """Copy the regular files `prefix/<name>` out of a tar archive; no path in it ever becomes a path on disk."""
    wanted = {f"{prefix}/{name}": name for name in files}
    try:
        with tarfile.open(archive_path, "r:gz") as archive:
            for member in archive:
                name = wanted.get(posixpath.normpath(member.name))
                content = archive.extractfile(member) if name and member.isreg() else None
                if name and content:
                    with open(target / name, "wb") as file:
                        shutil.copyfileobj(content, file, _BLOCK_BYTES)
                        file.flush()
                        os.fsync(file.fileno())
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{remote.url}: not a usable tar archive: {error}") from None
    missing = [name for name in files if not (target / name).is_file()]
    if missing:
        raise InputError(f"{remote.url}: the archive lacks {', '.join(missing)}")


@contextlib.contextmanager
def _workplace(folder: Path, remote: Remote) -> Iterator[Path]:
    """A new file name in `folder`; afterwards neither the file nor, after an error, a folder made for it is left."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    temporary = folder / f".{remote.file_name}.{secrets.token_hex(6)}.part"
    arrived = False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield temporary
        arrived = True
    except OSError as error:
        raise InputError(
            f"cannot write into {folder}: {error.strerror or error}; choose another folder with data.path"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
            for path in [] if arrived else made:
                path.rmdir()  # stops at the first folder that another process uses by now


def _receive(remote: Remote, target: Path, timeout: float) -> None:
    """Write the file to `target`, synced to disk, or raise InputError."""
    _log.info("downloading %s", remote.url)
    digest = hashlib.sha256()
    count = 0
    with open(target, "xb") as file:
        for block in _blocks(remote, timeout):
            count += len(block)
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != remote.sha256:
        raise InputError(
            f"{remote.url}: SHA-256: expected {remote.sha256}, found {digest.hexdigest()} ({count} bytes); "
            "the file was changed on its way or at its source and is not used"
        )


def _blocks(remote: Remote, timeout: float) -> Iterator[bytes]:
    """The content of the answer, block by block."""
    count = 0
    try:
        with urllib.request.urlopen(remote.url, timeout=timeout) as answer:
            promised = answer.headers.get("Content-Length")
            while block := answer.read(_BLOCK_BYTES):
                count += len(block)
                if count > _MAX_BYTES:
                    raise _failed(remote, f"more than {_MAX_BYTES} bytes came")
                yield block
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError, HTTPError and timeouts are OSErrors
        raise _failed(remote, str(error) or type(error).__name__) from None
    if promised is not None and promised.isdecimal() and int(promised) != count:
        raise _failed(remote, f"the connection ended after {count} of {promised} bytes")


def _failed(remote: Remote, reason: str) -> InputError:
    return InputError(f"cannot download {remote.url}: {reason}; try again, or get the file yourself and name data.path")
