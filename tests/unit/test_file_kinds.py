"""What a file is by its first bytes."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from feddip_mpi.file_kinds import HDF5, TEXT, ZIP, kind_of

SIGNATURE = b"\x89HDF\r\n\x1a\n"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"rounds: 3\n", TEXT),
        (b"{" + "ä".encode() * 2000, TEXT),  # one of them lies across the end of what is read
        (b"rounds: 3\0", None),
        (b"", None),
        ("ä".encode("latin-1") * 9, None),
        (SIGNATURE + b"...", HDF5),
        (b"MATLAB 7.3 MAT-file".ljust(512) + SIGNATURE, None),
        (save({"x": np.ones(3)}), "a safetensors file"),
        (b"\xff" + bytes(range(256)) * 9, None),
    ],
)
def test_kinds(content: bytes, kind: str | None, tmp_path: Path) -> None:
    path = tmp_path / "some"
    path.write_bytes(content)
    assert kind_of(path) == kind


def test_files_as_their_libraries_write_them(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.ones(3))
    np.savez(tmp_path / "two.npz", x=np.ones(3))
    torch.save({"x": torch.ones(3)}, tmp_path / "three.pt")
    assert [kind_of(tmp_path / name) for name in ("one.npy", "two.npz", "three.pt")] == ["an npy file", ZIP, ZIP]


def test_what_is_no_file_has_no_kind(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    assert [kind_of(path) for path in (tmp_path, tmp_path / "pipe", tmp_path / "none")] == [None] * 3
