"""The store of residuals: whatever the budget, what was stored is what is read, and a round that fails changes nothing."""

import os
from pathlib import Path

import pytest
import torch
from alone import Alone
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended import GPU, pretended_gpu

from feddip_mpi import config, deadlines, session
from feddip_mpi.errors import FeddipError, InputError
from feddip_mpi.residual_store import ResidualStore, device_budget
from feddip_mpi.residuals import Residual, remember
from feddip_mpi.settings import UploadConfig
from feddip_mpi.support import Support

SIZE = 100
BYTES = 4 * SIZE


def residual(number: int) -> Residual:
    values = torch.randn(SIZE, generator=torch.Generator().manual_seed(number))
    return Residual(values, number)


def rounded(number: int) -> Residual:
    return Residual(residual(number).values.bfloat16().float(), number)


def same(one: Residual, other: Residual) -> bool:
    return one.round == other.round and one.values.numpy().tobytes() == other.values.numpy().tobytes()


@given(
    st.lists(st.tuples(st.sampled_from(["set", "set", "delete", "commit", "fail"]), st.integers(0, 6)), max_size=40),
    st.sampled_from([0, BYTES, 3 * BYTES + 10, 10**9]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_the_store_is_a_dictionary_whatever_fits_in_memory(steps: list, budget: int, half: bool) -> None:
    store, kept = ResidualStore(budget, half=half), {}
    stage, seen, made = store.copy(), {}, 0
    for what, client in steps:
        if what == "set":
            made += 1
            seen[client] = (rounded if half else residual)(made)
            stage[client] = seen[client]
        elif what == "delete":
            assert (stage.pop(client, None) is not None) == (seen.pop(client, None) is not None)
        elif what == "commit":
            store, stage = stage, stage.copy()
            kept = dict(seen)
        else:  # the round failed: its copy is forgotten
            stage, seen = store.copy(), dict(kept)
        assert store.memory_bytes <= budget
        for mapping, expected in ((stage, seen), (store, kept)):
            assert set(mapping) == set(expected) and len(mapping) == len(expected)
            for key, value in expected.items():
                assert key in mapping and same(mapping[key], value)


def test_memory_stays_within_the_budget_and_slots_are_used_again(tmp_path: Path) -> None:
    store = ResidualStore(2 * BYTES, str(tmp_path))
    for number in range(200):
        after = store.copy()
        after[number % 10] = residual(number)
        store = after
        assert store.memory_bytes <= 2 * BYTES
    assert all(same(store[client], residual(190 + client)) for client in range(10))
    assert store.file_bytes <= 11 * BYTES
    assert list(tmp_path.iterdir()) == []  # the file has no name: nothing is left behind, however the process ends


def test_what_nobody_refers_to_is_given_back() -> None:
    store = ResidualStore(10**9)
    store[0] = residual(0)
    failed = store.copy()
    for number in range(1, 5):
        failed[0] = failed[1] = residual(number)
    assert store.memory_bytes == 3 * BYTES
    del failed
    assert store.memory_bytes == BYTES and same(store[0], residual(0))
    del store[0]
    assert store.memory_bytes == 0


def test_half_takes_half() -> None:
    whole, half = ResidualStore(10**9), ResidualStore(10**9, half=True)
    whole[0], half[0] = residual(1), rounded(1)
    assert half.memory_bytes == whole.memory_bytes // 2 == BYTES // 2


def test_nothing_is_written_where_memory_is_enough(tmp_path: Path) -> None:
    store = ResidualStore(3 * BYTES, str(tmp_path / "missing"))
    for client in range(3):
        store[client] = residual(client)
    assert store.file_bytes == 0
    with pytest.raises(FeddipError, match=r"missing.*upload\.residual_folder"):
        store[3] = residual(3)


def test_a_full_disk_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    store = ResidualStore(0)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(FeddipError, match="No space left on device"):
        store[0] = residual(0)


def test_a_file_that_cannot_be_read_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an OSError: whoever writes a checkpoint would take that for the checkpoint's."""

    def lost(*_: object) -> int:
        raise OSError(116, "Stale file handle")

    store = ResidualStore(0)
    store[0] = residual(0)
    monkeypatch.setattr(os, "preadv", lost)
    with pytest.raises(FeddipError, match=r"cannot be read \(Stale file handle\); resume"):
        store[0].values.sum()


def test_the_configuration_chooses_budget_folder_and_width(tmp_path: Path) -> None:
    chosen = UploadConfig(residual_memory=0, residual_folder=str(tmp_path), residual_values="bf16")
    store = ResidualStore.of(chosen)
    store[5] = rounded(5)
    assert store.memory_bytes == 0 and store.file_bytes == BYTES // 2
    assert same(store[5], rounded(5))


def test_bf16_residuals_are_rounded_when_they_are_made() -> None:
    """Not when they are stored: a checkpoint would hold other values than the run goes on with."""
    left = residual(3).values
    kept = remember(left, None, None, UploadConfig(residual_values="bf16"), Support.of(left > 0), 4)
    assert kept is not None and torch.equal(kept.values, left.bfloat16().float()) and not torch.equal(kept.values, left)


def test_a_folder_that_is_not_there_is_found_before_the_first_round(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("missing", "file"):
        chosen = config.validate({"upload": {"residual_folder": str(tmp_path / name)}, "device": "cpu"})
        with pytest.raises(InputError, match=f"upload.residual_folder: got '.*{name}', which is no folder"):
            session._build_to_train(Alone(), chosen, deadlines.Watchdog(None, 0, lambda *_: None))  # type: ignore[arg-type]


@pytest.mark.parametrize("half", [False, True])
def test_residuals_stay_on_the_gpu_while_there_is_room(tmp_path: Path, half: bool) -> None:
    size = BYTES // 2 if half else BYTES
    given = [(rounded if half else residual)(number) for number in range(9)]
    with pretended_gpu():
        store = ResidualStore(2 * size, str(tmp_path), half, device_budget=lambda: 3 * size)
        for client, each in enumerate(given):
            store[client] = Residual(each.values.to(GPU), each.round)
            assert store.device_bytes == size * min(client + 1, 3)
        copy = store.copy()
        assert (store.device_bytes, store.memory_bytes, store.file_bytes) == (3 * size, 2 * size, 4 * size)
        for client, each in enumerate(given):  # those stored longest ago lie furthest away
            found = store[client]
            assert found.values.device == (GPU if client >= 6 else torch.device("cpu"))
            assert same(Residual(found.values.cpu(), found.round), each)
        del store[7]
        assert store.device_bytes == 3 * size, "the copy has it"
        del copy[7]
        assert store.device_bytes == 2 * size
        store[0] = given[0]  # from the host, as a resumed run has it: it stays there
        assert store.device_bytes == 2 * size and store[0].values.device.type == "cpu"


def test_the_gpus_share_follows_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60_000, 80_000))
    reserved = 0
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    assert device_budget(config.parse(""), GPU) == 7_500
    assert device_budget(config.parse("memory_fraction: 0.5"), GPU) == 5_000
    reserved = 24_000  # what it has taken is gone from what is free, and from its share
    assert device_budget(config.parse(""), GPU) == 7_500
    assert device_budget(config.parse("memory_fraction: 0.5"), GPU) == 2_000
    assert device_budget(config.parse("memory_fraction: 0.2"), GPU) == 0
    assert device_budget(config.parse("upload: {residual_device_memory: 3}"), GPU) == 3 * 2**20
    assert device_budget(config.parse("upload: {residual_device_memory: 0}"), GPU) == 0
    assert device_budget(config.parse("upload: {residual_device_memory: 3}"), torch.device("cpu")) == 0
