"""The doctor's verdicts, from rows as ranks would report them."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from feddip_mpi import doctor, runtime

FOLDER = {"path": "runs", "mount": "/", "type": "ext4", "network": False, "writable": True, "free_bytes": 10**12}


def row(rank: int = 0, **changes) -> dict:
    healthy = {
        "rank": rank, "ranks": 1, "launched": 1, "launched_by": "", "host": "node1", "pid": 100 + rank,
        "cores": [0, 1, 2, 3], "omp_num_threads": "1", "memory_available_bytes": 10**11, "memory_bytes": 10**11,
        "processor": "some", "local_rank": rank, "local_rank_rule": "a rule", "library": "Open MPI",
        "thread_level": "multiple", "gpu_aware": False, "gpu_aware_asked": "a call", "device": "cpu",
        "device_error": None, "gpu": None, "threads": 1, "versions": {"torch": "2.0", "numpy": "2.0"},
    }  # fmt: skip
    return {**healthy, **changes}


def found(*rows: dict, **folder) -> list[tuple[bool, str]]:
    return [(verdict.broken, verdict.text) for verdict in doctor.verdicts(rows, {**FOLDER, **folder})]


def test_nothing_to_say_about_healthy_ranks() -> None:
    assert found(row(0), row(1), row(2, host="node2")) == []


GPU = {"name": "GPU", "id": "GPU-1"}


@pytest.mark.parametrize(
    ("rows", "folder", "broken", "text"),
    [
        ([row(launched=4, launched_by="PMI_SIZE")], {}, True, "4 ranks were started (PMI_SIZE)"),
        ([row(device_error="no GPU here")], {}, True, "rank 0: no GPU here"),
        ([row(0), row(1, versions={"torch": "2.1", "numpy": "2.0"})], {}, True, "torch differs"),
        ([row(0), row(1, library="MPICH")], {}, True, "MPI library differs"),
        ([row(0), row(1, device="cuda:0", gpu=GPU)], {}, True, "some ranks compute on a GPU"),
        ([row()], {"writable": False}, True, "may not write"),
        ([row(threads=5)], {}, False, "5 threads (rank 0) on 4 cores"),
        ([row(r, cores=[0]) for r in range(3)], {}, False, "3 threads (ranks 0-2) on 1 core:"),
        ([row(0, cores=[0], threads=2), row(1, cores=[1, 2, 3])], {}, False, "more threads than cores bound to"),
        ([row(r, device="cuda:0", gpu=GPU) for r in range(2)], {}, False, "ranks 0-1 share one GPU"),
        ([row(0), row(1, processor="other")], {}, False, "processors differ"),
        ([row(memory_available_bytes=10**8)], {}, False, "100.0 MB of memory"),
        ([row()], {"network": True, "type": "nfs4"}, False, "network file system (nfs4)"),
    ],
)
def test_one_finding_each(rows: list[dict], folder: dict, broken: bool, text: str) -> None:
    ((is_broken, said),) = found(*rows, **folder)
    assert is_broken == broken
    assert text in said


def test_equal_indices_on_different_hosts_or_gpus_are_fine() -> None:
    other = {**GPU, "id": "GPU-2"}
    cuda = {"device": "cuda:0"}
    assert found(row(0, gpu=GPU, **cuda), row(1, gpu=other, **cuda), row(2, host="n2", gpu=GPU, **cuda)) == []


def test_broken_things_come_first() -> None:
    verdicts = found(row(threads=9), writable=False)
    assert [broken for broken, _ in verdicts] == [True, False]


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([0, 1], "0-1"), ([0, 1, 2, 5, 7, 8], "0-2,5,7-8")]
)
def test_spans(numbers: list[int], text: str) -> None:
    assert doctor.spans(numbers) == text


def test_file_system_of_a_folder_that_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    mounts = [("/", "ext4"), (str(tmp_path), "nfs4"), (str(tmp_path / "a"), "tmpfs"), (str(tmp_path / "a"), "lustre")]
    parts = [SimpleNamespace(mountpoint=point, fstype=kind) for point, kind in mounts]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: parts)
    facts = runtime.file_system(tmp_path / "new" / "run")
    assert (facts["type"], facts["network"], facts["writable"]) == ("nfs4", True, True)
    (tmp_path / "a").mkdir()
    assert runtime.file_system(tmp_path / "a")["type"] == "lustre"  # mounted over the other
    assert runtime.file_system(Path("/"))["type"] == "ext4"
    (tmp_path / "file").touch()
    assert not runtime.file_system(tmp_path / "file" / "run")["writable"]
