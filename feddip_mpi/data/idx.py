"""Reader of IDX files, the format of MNIST and Fashion-MNIST, gzipped or not.

Layout: two zero bytes, the type (8: unsigned byte), the number of axes, one big-endian uint32 per axis, the values.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from io import BufferedReader
from pathlib import Path

import numpy as np

from feddip_mpi.errors import InputError

_UNSIGNED_BYTE = 8
_GZIP_MAGIC = b"\x1f\x8b"
_BLOCK_BYTES = 1 << 20
MAX_DEFLATE_RATIO = 1032  # deflate cannot pack tighter (zlib, technical details)


def read(path: Path, axes: int) -> np.ndarray:
    """The array of one IDX file of unsigned bytes.

    Nothing is allocated on the header's word: its size is first compared with the size of the file.

    Args:
        path: the file; whether it is gzipped is told by its content.
        axes: the number of axes it must have.

    Returns:
        uint8 [...], writable, C-contiguous, no axis empty.

    Raises:
        InputError: the file cannot be read, is truncated, corrupt or longer than its header says.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            packed = file.read(2) == _GZIP_MAGIC
            file.seek(0)
            if not packed:
                return _parse(file, path, axes, most=size)
            with gzip.GzipFile(fileobj=file) as content:
                return _parse(content, path, axes, most=size * MAX_DEFLATE_RATIO)
    except EOFError:
        raise _damaged(path, "a complete gzip stream", "its end is missing") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(path, "a valid gzip stream", str(error)) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _parse(content: gzip.GzipFile | BufferedReader, path: Path, axes: int, most: int) -> np.ndarray:
    """The array; `most` is an upper bound of the bytes that `content` can hold."""
    header = content.read(4 + 4 * axes)
    magic = bytes([0, 0, _UNSIGNED_BYTE, axes])
    if header[:4] != magic:
        raise _damaged(path, f"the IDX magic number {magic.hex()}", header[:4].hex() or "an empty file")
    if len(header) < 4 + 4 * axes:
        raise _damaged(path, f"a header of {4 + 4 * axes} bytes", f"{len(header)} bytes")
    shape = struct.unpack(f">{axes}I", header[4:])
    expected = math.prod(shape)
    if expected == 0:
        raise _damaged(path, "at least one value", f"the shape {list(shape)}")
    if len(header) + expected > most:
        raise _damaged(path, f"{expected} values, as its shape {list(shape)} says", f"room for at most {most} bytes")
    values = _read_exactly(content, expected)
    if len(values) < expected:
        raise _damaged(path, f"{expected} values, as its shape {list(shape)} says", f"only {len(values)}")
    if content.read(1):  # reads on to the end of a gzip stream, so its checksum is verified too
        raise _damaged(path, f"{expected} values, as its shape {list(shape)} says", "more bytes after them")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _read_exactly(content: gzip.GzipFile | BufferedReader, expected: int) -> bytearray:
    """Up to `expected` bytes; memory grows with what is really there."""
    values = bytearray()
    while len(values) < expected:
        block = content.read(min(_BLOCK_BYTES, expected - len(values)))
        if not block:
            break
        values += block
    return values


def _damaged(path: Path, expected: str, found: str) -> InputError:
    return InputError(f"{path}: damaged: expected {expected}, found {found}; replace the file with the original")
