"""HDF5 files: complete or absent, and no wrong array ever leaves one."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from feddip_mpi import hdf5
from feddip_mpi.errors import DamagedFileError, InputError
from feddip_mpi.hdf5 import Item

ATTRIBUTES = {"format": 3, "name": "a run", "share": 0.25, "shape": np.array([1, 2, 3])}


def items() -> list[Item]:
    return [
        Item("a/weights", np.arange(24, dtype=np.float32).reshape(2, 3, 4), {"kind": "dense", "size": 24}),
        Item("a/mask", np.array([0xA5, 1], np.uint8)),
        Item("b/empty", np.zeros((0, 3), np.int64)),
        Item("b/scalar", np.array(7.5)),
        Item("names", np.array([b"cat", b"tiger"])),
    ]


def written(folder: Path) -> Path:
    path = folder / "file.h5"
    hdf5.write(path, items(), ATTRIBUTES, {"a": {"architecture": "lenet5"}, "new": {"empty": 1}})
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = written(tmp_path)
    with hdf5.open_file(path) as reader:
        assert reader.names() == ["a/mask", "a/weights", "b/empty", "b/scalar", "names"]
        assert reader.names("a/") == ["a/mask", "a/weights"]
        for item in items():
            array = reader.array(item.name)
            assert array.dtype == item.array.dtype and array.shape == item.array.shape
            assert array.tobytes() == item.array.tobytes()
            assert reader.stored_bytes(item.name) == item.array.nbytes
        assert reader.attribute("a/weights", "kind") == "dense"
        assert reader.attribute("a/weights", "size") == 24
        root = reader.attributes()
        assert (root["format"], root["name"], root["share"], root["shape"]) == (3, "a run", 0.25, [1, 2, 3])
        assert reader.attributes("a") == {"architecture": "lenet5"}
        assert reader.attributes("new") == {"empty": 1}
        assert reader.verify() == 5


@settings(deadline=None, max_examples=30)
@given(
    arrays.arrays(
        st.sampled_from([np.float32, np.float64, np.int64, np.uint8, np.bool_]),
        arrays.array_shapes(min_dims=0, min_side=0),
    )
)
def test_any_plain_array_comes_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, array: np.ndarray) -> None:
    path = tmp_path_factory.getbasetemp() / "any.h5"
    for stored in (array, np.array(array, order="F")):
        hdf5.write(path, [Item("x", stored)], {})
        with hdf5.open_file(path) as reader:
            back = reader.array("x")
            assert (back.shape, back.dtype, back.tobytes()) == (array.shape, array.dtype, array.tobytes())
            reader.verify()


def test_the_digest_depends_on_content_alone(tmp_path: Path) -> None:
    def digest(changes: dict[str, np.ndarray] | None = None, **attributes: object) -> str:
        changed = [Item(i.name, (changes or {}).get(i.name, i.array), i.attributes) for i in items()]
        return hdf5.write(tmp_path / f"{os.urandom(4).hex()}.h5", changed, {**ATTRIBUTES, **attributes})

    assert digest() == digest()
    others = {
        digest(),
        digest({"a/mask": np.array([0xA5, 2], np.uint8)}),
        digest({"a/mask": np.array([0xA5, 1], np.uint8).view(np.int8)}),
        digest({"a/weights": np.arange(24, dtype=np.float32).reshape(4, 3, 2)}),
        digest(share=0.5),
        digest(more=1),
    }
    assert len(others) == 6


def test_every_flipped_byte_of_every_array_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path)
    whole = bytearray(path.read_bytes())
    with h5py.File(path, "r") as file:
        places = [
            (name, file[name].id.get_offset(), file[name].nbytes)
            for name in ("a/weights", "a/mask", "b/scalar", "names")
        ]
    for name, offset, size in places:
        assert offset and size
        for position in range(offset, offset + size):
            altered = bytearray(whole)
            altered[position] ^= 1 << (position % 8)
            path.write_bytes(altered)
            hdf5._seal(path)  # as if it had been altered before it was sealed
            with hdf5.open_file(path) as reader, pytest.raises(DamagedFileError, match=f"'{name}'.*checksum"):
                reader.array(name)


def test_damage_is_refused_before_the_library_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flipped byte can send the HDF5 library into an endless loop (a heap object of length 0, for one)."""
    path = written(tmp_path)
    whole = path.read_bytes()
    monkeypatch.setattr(h5py, "File", None)  # whoever calls it fails with a TypeError
    for position in range(0, len(whole), 7):
        altered = bytearray(whole)
        altered[position] ^= 1 + position % 255
        path.write_bytes(altered)
        with pytest.raises(DamagedFileError, match="file.h5"), hdf5.open_file(path):
            pass
    for length in (0, 1, 511, 512, 513, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedFileError, match="not a file of this program|truncated"), hdf5.open_file(path):
            pass
    path.write_bytes(whole + b"more")
    with pytest.raises(DamagedFileError, match=f"{len(whole) + 4} bytes long instead of {len(whole)}"):
        hdf5.check_seal(path)


def test_other_programs_read_the_file(tmp_path: Path) -> None:
    with h5py.File(written(tmp_path), "r") as file:
        assert file.userblock_size == 512
        assert file["a/weights"][0, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["format", "name", "digest", "shape"])
def test_altered_attributes_are_noticed(tmp_path: Path, name: str) -> None:
    path = written(tmp_path)
    for change in ("other", None):
        with h5py.File(path, "r+") as file:
            if change is None:
                del file.attrs[name]
            else:
                file.attrs[name] = change
        hdf5._seal(path)
        with hdf5.open_file(path) as reader, pytest.raises(DamagedFileError, match="do not match the digest"):
            reader.verify()


def test_added_removed_and_renamed_datasets_are_noticed(tmp_path: Path) -> None:
    for change in ("add", "remove", "rename", "swap", "type"):
        path = written(tmp_path)
        with h5py.File(path, "r+") as file:
            if change == "add":
                file["extra"] = 1
                file["extra"].attrs["crc32"] = hdf5._crc(np.array(1))
            elif change == "type":
                file["a/type"] = np.dtype("i4")  # neither group nor dataset: one flipped bit can make one
            elif change == "remove":
                del file["a/mask"]
            elif change == "rename":
                file.move("a/mask", "a/mask2")
            else:
                file.move("a/mask", "tmp")
                file.move("b/scalar", "a/mask")
                file.move("tmp", "b/scalar")
        hdf5._seal(path)
        with hdf5.open_file(path) as reader, pytest.raises(DamagedFileError):
            reader.verify()


def test_a_missing_dataset_or_attribute_is_named(tmp_path: Path) -> None:
    with hdf5.open_file(written(tmp_path)) as reader:
        with pytest.raises(DamagedFileError, match="no dataset 'a/weight'"):
            reader.array("a/weight")
        with pytest.raises(DamagedFileError):
            reader.attribute("a/mask", "size")
        with pytest.raises(DamagedFileError):
            reader.attributes("nowhere")


def test_files_that_are_none_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with pytest.raises(InputError, match="no such file"), hdf5.open_file(path):
        pass
    for content in (b"", b"rounds: 3\n", b"\x89HDF\r\n\x1a\n", os.urandom(5000)):
        path.write_bytes(content)
        with pytest.raises(DamagedFileError, match="x.h5"), hdf5.open_file(path):
            pass
    with h5py.File(path, "w") as file:
        file["theirs"] = [1, 2, 3]
    with pytest.raises(DamagedFileError, match="not a file of this program"), hdf5.open_file(path):
        pass
    with h5py.File(path, "w", userblock_size=512) as file:
        file["theirs"] = [1, 2, 3]
    hdf5._seal(path)
    with pytest.raises(DamagedFileError, match="only in part"), hdf5.open_file(path):
        pass


class Interrupted(Exception):
    pass


def failing_items() -> Iterator[Item]:
    yield items()[0]
    raise Interrupted


def refuse(*args: object, **kwargs: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["items", "fsync", "replace", "create_dataset"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, existing: bool
) -> None:
    path = tmp_path / "file.h5"
    if existing:
        written(tmp_path)
    before = path.read_bytes() if existing else None
    if where == "create_dataset":
        monkeypatch.setattr(h5py.File, where, refuse)
    elif where != "items":
        monkeypatch.setattr(hdf5.os, where, refuse)
    with pytest.raises((OSError, Interrupted)):
        hdf5.write(path, failing_items() if where == "items" else items(), {"other": 1})
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == (["file.h5"] if existing else [])
    assert (path.read_bytes() if existing else None) == before


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode
    ):
        pytest.skip("cannot mount a small tmpfs here")
    try:
        path = written(disk)
        before = path.read_bytes()
        for size in (10_000, 100_000):  # fails at the end and in the middle of the file
            with pytest.raises((OSError, RuntimeError)):
                hdf5.write(path, [Item("big", np.ones(size))], {})
            assert [entry.name for entry in disk.iterdir()] == ["file.h5"]
            assert path.read_bytes() == before
        with pytest.raises(OSError, match="space"):
            hdf5.write_text(disk / "text", "x" * 100_000)
        assert [entry.name for entry in disk.iterdir()] == ["file.h5"]
    finally:
        subprocess.run(["umount", disk], check=True)


NO_LOCKS = """
#include <errno.h>
int flock(int file, int operation) { errno = ENOLCK; return -1; }
"""
PROGRAM = """
import numpy as np, sys
from pathlib import Path
from feddip_mpi import hdf5, run_folder
folder = Path(sys.argv[1])
run_folder.Lock(run_folder.RunFolder(folder))
hdf5.write(folder / "file.h5", [hdf5.Item("x", np.arange(3))], {})
with hdf5.open_file(folder / "file.h5") as reader:
    print(reader.array("x").tolist(), hdf5.read_arrays(folder / "file.h5", ["x"])["x"].tolist())
"""


def test_a_file_system_without_locks_is_warned_of_and_written(tmp_path: Path) -> None:
    """Some network file systems have none: HDF5 takes some of its own unless it is told not to."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to make a system without locks with")
    (tmp_path / "no_locks.c").write_text(NO_LOCKS)
    library = tmp_path / "no_locks.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "no_locks.c"], check=True)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[0, 1, 2] [0, 1, 2]\n", done.stderr
    assert "no lock on this file system" in done.stderr


FULL = """
import numpy as np, resource, sys
from pathlib import Path
from feddip_mpi import hdf5
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
for _ in range(2):
    try:
        hdf5.write(Path(sys.argv[1]) / "file.h5", [hdf5.Item(f"x/{i}", np.arange(300.0)) for i in range(40)], {})
    except OSError as error:
        print(hdf5.reason(error))
"""


@pytest.mark.parametrize("room", [1000, 20_000, 90_000])
def test_no_room_is_told_in_one_line(tmp_path: Path, room: int) -> None:
    """HDF5 itself would print a traceback for every dataset, and crash when the process ends."""
    argv = [sys.executable, "-c", FULL, tmp_path, str(room)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "File too large\n" * 2, "")
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_durable_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real_sync, real_replace = os.fsync, os.replace

    def record_sync(descriptor: int) -> None:
        calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        real_sync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        calls.append(("replace", Path(source).name))
        real_replace(source, target)

    monkeypatch.setattr(hdf5.os, "fsync", record_sync)
    monkeypatch.setattr(hdf5.os, "replace", record_replace)
    path = written(tmp_path)
    temporary = f".file.h5.tmp-{os.getpid()}"
    assert calls == [("fsync", temporary), ("replace", temporary), ("fsync", tmp_path.name)]
    assert path.is_file()


def test_write_text_replaces_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "finished.json"
    hdf5.write_text(path, "a longer text: λ\n")
    hdf5.write_text(path, "short\n")
    assert path.read_text(encoding="utf-8") == "short\n"
    monkeypatch.setattr(hdf5.os, "replace", refuse)
    with pytest.raises(OSError, match="space"):
        hdf5.write_text(path, "never seen")
    assert path.read_text(encoding="utf-8") == "short\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["finished.json"]


def test_a_users_own_arrays_need_no_checksums(tmp_path: Path) -> None:
    path = tmp_path / "own.h5"
    with h5py.File(path, "w") as file:
        file["images"] = np.arange(6)
        file["group/labels"] = [1, 2]
    read = hdf5.read_arrays(path, ["images", "group/labels"])
    assert read["images"].tolist() == list(range(6)) and read["group/labels"].tolist() == [1, 2]
    with pytest.raises(InputError, match="no dataset 'label'; the file holds group, images"):
        hdf5.read_arrays(path, ["images", "label"])
    with pytest.raises(InputError, match="no dataset 'group'"):
        hdf5.read_arrays(path, ["group"])
    with pytest.raises(InputError, match="no such file"):
        hdf5.read_arrays(tmp_path / "none.h5", ["images"])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DamagedFileError, match="own.h5"):
        hdf5.read_arrays(path, ["images"])
