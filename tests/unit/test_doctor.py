"""The doctor's verdicts, from rows as ranks would report them, and what it tries out."""

import fcntl
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from alone import Alone

from feddip_mpi import config, probes, runtime, verdicts
from feddip_mpi.models import work

FOLDER = {"path": "runs", "mount": "/", "type": "ext4", "network": False, "writable": True, "free_bytes": 10**12}
NEEDS = {"memory_bytes": 10**9, "data_bytes": 10**8, "one_checkpoint_bytes": 10**8, "disk_bytes": 10**9}


def row(rank: int = 0, **changes) -> dict:
    healthy = {
        "rank": rank, "ranks": 1, "launched": 1, "launched_by": "", "host": "node1", "pid": 100 + rank,
        "cores": [0, 1, 2, 3], "omp_num_threads": "1", "memory_available_bytes": 10**11, "memory_bytes": 10**11,
        "shared_memory": ("/dev/shm", 10**10),
        "processor": "some", "local_rank": rank, "local_rank_rule": "a rule", "library": "Open MPI",
        "thread_level": "multiple", "gpu_aware": False, "gpu_aware_asked": "a call", "device": "cpu",
        "device_error": None, "gpu": None, "threads": 1, "versions": {"torch": "2.0", "numpy": "2.0"},
        "mask": {"digest": "1234abcd", "error": None}, "lock": None if rank else "works",
        "clock": {"offset_seconds": 0.0, "bound_seconds": 1e-4},
    }  # fmt: skip
    return {**healthy, **changes}


def judged(*rows: dict, **changes) -> list[verdicts.Verdict]:
    folder = {**FOLDER, **{name: value for name, value in changes.items() if name in FOLDER}}
    needs = {**NEEDS, **{name: value for name, value in changes.items() if name in NEEDS}}
    return verdicts.verdicts(rows, folder, needs)


def found(*rows: dict, **changes) -> list[tuple[str, str, str]]:
    return [(v.level, v.check, v.text) for v in judged(*rows, **changes) if v.level != "PASS"]


def test_every_check_passes_on_healthy_ranks() -> None:
    said = judged(row(0), row(1), row(2, host="node2"))
    assert [verdict.level for verdict in said] == ["PASS"] * 10
    assert "about 1.0 GB a rank and 100.0 MB of data a node needed and free" in [verdict.text for verdict in said]
    assert {verdict.check for verdict in said} == {
        "launch", "devices", "versions", "mask", "cores", "clocks", "memory", "shared", "folder", "disk",
    }  # fmt: skip


GPU = {"name": "GPU", "id": "GPU-1"}


@pytest.mark.parametrize(
    ("rows", "changes", "level", "check", "text"),
    [
        ([row(launched=4, launched_by="PMI_SIZE")], {}, "FAIL", "launch", "4 ranks were started (PMI_SIZE)"),
        (
            [row(rank, launched=4, launched_by="PMI_SIZE") for rank in range(2)], {},
            "FAIL", "launch", "4 ranks were started (PMI_SIZE), but 2 believe to be all",
        ),
        ([row(device_error="no GPU here")], {}, "FAIL", "devices", "rank 0: no GPU here"),
        ([row(0), row(1, device="cuda:0", gpu=GPU)], {}, "FAIL", "devices", "some ranks compute on a GPU"),
        ([row(r, device="cuda:0", gpu=GPU) for r in range(2)], {}, "WARN", "devices", "ranks 0-1 share one GPU"),
        (
            [row(0), row(1, versions={"torch": "2.1", "numpy": "2.0"})], {},
            "FAIL", "versions", "torch differs between ranks: 2.0 (rank 0); 2.1 (rank 1)",
        ),
        ([row(0), row(1, library="MPICH")], {}, "FAIL", "versions", "MPI library differs"),
        ([row(0), row(1, processor="other")], {}, "WARN", "versions", "processors differ"),
        (
            [row(0), row(1, mask={"digest": "ffff0000", "error": None})], {},
            "FAIL", "mask", "1234abcd (rank 0); ffff0000 (rank 1)",
        ),
        ([row(mask={"digest": None, "error": "no such model"})], {}, "FAIL", "mask", "rank 0: the model cannot be made"),
        ([row(threads=5)], {}, "WARN", "cores", "5 threads (rank 0) on 4 cores"),
        ([row(r, cores=[0]) for r in range(3)], {}, "WARN", "cores", "3 threads (ranks 0-2) on 1 core:"),
        (
            [row(0, cores=[0], threads=2), row(1, cores=[1, 2, 3])], {},
            "WARN", "cores", "rank 0: more threads than cores bound to",
        ),
        (
            [row(0, cores=[0]), row(1, cores=[0]), row(2, cores=[1, 2])], {},
            "WARN", "cores", "ranks 0-1 are pinned to the same core (0)",
        ),
        (
            [row(0), row(1, host="node2", clock={"offset_seconds": -3.5, "bound_seconds": 0.01})], {},
            "WARN", "clocks", "rank 1 (node2) is 3.5 s (to within 0.01 s) behind",
        ),
        (
            [row(rank, shared_memory=("/dev/shm", 64 * 10**6)) for rank in range(2)], {},
            "WARN", "shared", "node1: 64.0 MB are free in /dev/shm",
        ),
        ([row(memory_available_bytes=10**8)], {}, "WARN", "memory", "100.0 MB of memory"),
        ([row()], {"memory_bytes": 10**12}, "WARN", "memory", "about 1.0 TB each and 100.0 MB of data are wanted"),
        (
            [row(r, memory_available_bytes=2 * 10**9) for r in range(2)], {},
            "WARN", "memory", "2.0 GB of memory are free for 2 rank(s), about 1.0 GB each and 100.0 MB of data",
        ),
        ([row()], {"writable": False}, "FAIL", "folder", "may not write"),
        ([row()], {"network": True, "type": "nfs4"}, "WARN", "folder", "network file system (nfs4)"),
        ([row(lock="granted")], {}, "WARN", "folder", "(ext4): locks do not work, seen from rank 0 (a second lock"),
        ([row(lock="OSError: no locks")], {}, "WARN", "folder", "(OSError: no locks)"),
        (
            [row(0), row(1, host="node2", lock="granted")], {}, "WARN", "folder", "locks do not work, seen from rank 1",
        ),
        ([row()], {"free_bytes": 5 * 10**8}, "WARN", "disk", "500.0 MB are free, checkpoints may take 1.0 GB"),
        ([row()], {"free_bytes": 10**7}, "FAIL", "disk", "not even the 100.0 MB of one checkpoint"),
    ],
)  # fmt: skip
def test_one_finding_each(rows: list[dict], changes: dict, level: str, check: str, text: str) -> None:
    ((is_level, is_check, said),) = found(*rows, **changes)
    assert (is_level, is_check) == (level, check)
    assert text in said


def test_a_parallel_file_system_is_where_runs_belong() -> None:
    assert found(row(), network=True, type="lustre") == []


def test_what_is_wrong_with_every_node_is_not_said_for_each() -> None:
    rows = [row(r, host=f"node{r}", memory_available_bytes=10**8) for r in range(512)]
    said = found(*rows)
    assert len(said) == 9 and said[-1] == ("WARN", "memory", "and 504 more of this check")
    rows[300]["memory_available_bytes"] = 10**11
    rows[400]["device_error"] = "no GPU"
    assert found(*rows)[0] == ("FAIL", "devices", "rank 400: no GPU")


def test_a_clock_that_may_be_right_is_not_blamed() -> None:
    assert found(row(0), row(1, clock={"offset_seconds": 3.0, "bound_seconds": 2.5})) == []


def test_equal_indices_on_different_hosts_or_gpus_are_fine() -> None:
    other = {**GPU, "id": "GPU-2"}
    cuda = {"device": "cuda:0"}
    assert found(row(0, gpu=GPU, **cuda), row(1, gpu=other, **cuda), row(2, host="n2", gpu=GPU, **cuda)) == []


def test_what_fails_comes_first() -> None:
    levels = [verdict.level for verdict in judged(row(threads=9), writable=False)]
    assert levels == ["FAIL", "WARN"] + ["PASS"] * 8


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([0, 1], "0-1"), ([0, 1, 2, 5, 7, 8], "0-2,5,7-8")]
)
def test_spans(numbers: list[int], text: str) -> None:
    assert verdicts.spans(numbers) == text


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


def test_clock_offsets_come_from_the_closest_ping() -> None:
    sent, received = np.array([10.0, 20.0]), np.array([10.8, 20.2])
    read = np.array([[10.4, 99.0], [20.1, 25.1]])
    assert probes.offsets(sent, read, received) == [
        {"offset_seconds": 0.0, "bound_seconds": 0.0},
        {"offset_seconds": pytest.approx(5.0), "bound_seconds": pytest.approx(0.1)},
    ]


def test_a_second_process_is_kept_out_by_a_lock(tmp_path: Path) -> None:
    assert probes.lock(Alone(), tmp_path / "new" / "run") == "works"
    assert list(tmp_path.iterdir()) == []


def test_locks_that_keep_nobody_out_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # as a file system without locks does: yes, and nothing
    assert probes.lock(Alone(), tmp_path) == "granted"


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert probes.lock(Alone(), tmp_path) == "OSError: [Errno 95] Operation not supported"


def test_the_mask_depends_on_the_seed_only() -> None:
    def digest(*settings: str) -> str:
        return probes.mask(config.parse("", ["mask.initial=uniform", *settings]))["digest"]

    assert digest("seed=3") == digest("seed=3", "rounds=7") != digest("seed=4")
    broken = probes.mask(config.parse("", ["model.name=nowhere:nothing"]))
    assert broken["digest"] is None and "nowhere" in broken["error"]


def made(size: int = 1000, prunable: int = 800, **more: int) -> dict:
    """What `probes.mask` says of a network and its data."""
    nothing = dict.fromkeys(("data_bytes", "kept_bytes", "largest_bytes", "payload_bytes"), 0)
    return {"size": size, "prunable": prunable, **nothing, **more}


def needs(settings: config.Config, made: dict, ranks: int, on_gpu: bool = False) -> dict:
    return probes.needs(settings, made, ranks, on_gpu)


def test_needs_grow_with_clients_and_shrink_with_ranks() -> None:
    settings = config.parse("", ["clients=50", "checkpoint.keep=2", "checkpoint.best=false"])
    one, many = needs(settings, made(), 1), needs(settings, made(), 50)
    assert one["memory_bytes"] - many["memory_bytes"] == 49 * 4 * 800 + 4 * 4 * 1000
    assert one["disk_bytes"] == 3 * (4 * 1000 + 100 + 50 * 4 * 800) == many["disk_bytes"]
    spilled = needs(config.override(settings, ["upload.residual_memory=0"]), made(), 1)
    assert one["memory_bytes"] - spilled["memory_bytes"] == 50 * 4 * 800
    half = needs(config.override(settings, ["upload.residual_values=bf16"]), made(), 1)
    assert one["memory_bytes"] - half["memory_bytes"] == 50 * 2 * 800
    at_once = needs(config.override(settings, ["clients_at_once=3"]), made(), 1)
    assert at_once["memory_bytes"] > one["memory_bytes"]
    assert needs(config.override(settings, ["clients_at_once=3"]), made(), 50) == many
    assert needs(config.parse("", ["upload.residual=drop"]), made(), 1)["disk_bytes"] == 5 * 4100


def test_needs_count_the_payloads_that_every_rank_gets() -> None:
    settings = config.parse("", ["clients=50", "participants=40"])

    def more(ranks: int, *changes: str) -> int:
        changed = config.override(settings, changes)
        return (
            needs(changed, made(payload_bytes=7), ranks)["memory_bytes"] - needs(changed, made(), ranks)["memory_bytes"]
        )

    assert [more(ranks) for ranks in (1, 2, 40)] == [0, 20 * 7, 39 * 7], "its own are counted with what it trains"
    assert more(40, "exchange=node") == 39 * 7
    assert more(40, "exchange=sharded") == more(40, "exchange=dense") == more(40, "exchange=auto") == 0
    keys = ("mask.initial=uniform", "sparsity.initial=0.5")
    half, whole = (probes.mask(config.parse("", [f"upload.mode={mode}", *keys])) for mode in ("masked", "dense"))
    assert 0.5 < half["payload_bytes"] / whole["payload_bytes"] < 0.6


def test_needs_count_the_data_and_the_larger_of_two_batches() -> None:
    settings = config.parse("", ["batch_size=10", "eval.batch_size=1"])
    bare = needs(settings, made(), 1)
    assert bare["data_bytes"] == 0 and needs(settings, made(data_bytes=70), 1)["data_bytes"] == 140

    def more(*changes: str) -> int:
        layers = made(kept_bytes=1000, largest_bytes=100)
        changed = config.override(settings, changes)
        assert needs(changed, layers, 1, on_gpu=True) == needs(changed, made(), 1)
        return needs(changed, layers, 1)["memory_bytes"] - needs(changed, made(), 1)["memory_bytes"]

    assert more() == 2 * 10 * 1000
    assert more("clients_at_once=3") == 3 * 2 * 10 * 1000
    assert more("eval.batch_size=500") == 3 * 500 * 100


def test_what_a_step_keeps_is_counted_once() -> None:
    """A linear layer keeps its input, ReLU its output, which is the next layer's input; parameters are no activations."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    before = torch.get_rng_state()
    assert work.kept_bytes(model, (3, 2, 2)) == (4 * (12 + 5), 4 * 12)
    assert torch.equal(torch.get_rng_state(), before) and model[1].weight.grad is None


def test_the_size_of_the_data_is_known_without_reading_it() -> None:
    said = probes.mask(config.parse("", ["data.name=cifar100", "data.path=/nowhere"]))
    assert said["data_bytes"] == 60_000 * (3 * 32 * 32 + 8)
    said = probes.mask(config.parse("", ["data.name=synthetic", "data.synthetic.test_samples=100"]))
    assert said["data_bytes"] == 6100 * (28 * 28 + 8)
