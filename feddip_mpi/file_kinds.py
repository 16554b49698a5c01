"""What a file is by its first bytes: one that a user named by mistake is wrong input, and not damaged."""

from __future__ import annotations

import codecs
import unicodedata
from pathlib import Path

HDF5, ZIP, TEXT = "an HDF5 file", "a zip file (as npz and torch write)", "a text file"

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_USER_BLOCKS = (512, 1024, 2048)  # what comes before the signature in some HDF5 files, and may be text
_SIGNATURES = {_HDF5_SIGNATURE: HDF5, b"PK\x03\x04": ZIP, b"\x93NUMPY": "an npy file", b"\x89PNG": "a picture"}
_HEAD_BYTES = _USER_BLOCKS[-1] + len(_HDF5_SIGNATURE)


def kind_of(path: Path) -> str | None:
    """The kind of a file in words; None where its beginning tells none (also: HDF5 behind a user block), or it cannot be read."""
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return None
    for signature, kind in _SIGNATURES.items():
        if head.startswith(signature):
            return kind
    if any(head.startswith(_HDF5_SIGNATURE, start) for start in _USER_BLOCKS):
        return None
    if head[7:9] == b"\0{":  # the length of what follows, 8 bytes, the last ones zero; then JSON
        return "a safetensors file"
    return TEXT if _is_text(head) else None


def _is_text(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # a character may be cut off at the end
    except UnicodeDecodeError:
        return False
    return bool(text) and all(unicodedata.category(letter) != "Cc" or letter in "\t\n\r\f" for letter in text)
