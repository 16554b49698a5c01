"""Every collective against what it must return, computed by hand. Without torch: ranks start in a moment."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from feddip_mpi import collectives, runtime
from feddip_mpi.collectives import Communicator
from feddip_mpi.errors import DamagedFileError, FeddipError, InputError, NumericalError, PeerError

Raised = type[FeddipError]


def check_broadcast(comm: Communicator) -> None:
    value = {"round": 3, "text": "λ = ½", "list": [1.5, None, True], "huge": "x" * 5000}
    for sent in (value, None, [], ""):
        assert comm.broadcast(sent if comm.rank == 0 else "mine") == sent


def check_broadcast_bytes(comm: Communicator) -> None:
    before = comm.sent["control"], comm.received["control"]
    comm.broadcast([1, 2])
    sent, received = comm.sent["control"] - before[0], comm.received["control"] - before[1]
    whole = 8 + len("[1, 2]")
    assert (sent, received) == ((whole, 0) if comm.rank == 0 else (0, whole))


def check_gather(comm: Communicator) -> None:
    row = np.arange(6.0).reshape(2, 3) + 10 * comm.rank
    before = comm.sent["control"], comm.received["control"]
    got = comm.gather(row)
    assert comm.sent["control"] - before[0] == 48 and comm.received["control"] - before[1] == 48 * (comm.size - 1)
    assert np.array_equal(got, np.stack([np.arange(6.0).reshape(2, 3) + 10 * r for r in range(comm.size)]))
    bits = comm.gather(np.array([comm.rank, 255], np.uint8))
    assert bits.dtype == np.uint8 and bits.tolist() == [[r, 255] for r in range(comm.size)]
    # A transposed row is not contiguous.
    assert np.array_equal(comm.gather(row.T)[comm.rank], row.T)


def check_total(comm: Communicator) -> None:
    own = np.zeros((3 * comm.size, 2))
    own[comm.rank :: comm.size] = 0.1 + comm.rank
    before = comm.sent["control"], comm.received["control"]
    got = comm.total(own)
    assert comm.sent["control"] - before[0] == own.nbytes
    assert comm.received["control"] - before[1] == (own.nbytes if comm.size > 1 else 0)
    assert np.array_equal(got, np.array([[0.1 + r % comm.size] * 2 for r in range(3 * comm.size)]))
    assert np.array_equal(comm.total(own.T), got.T)  # not contiguous
    bits = np.zeros(comm.size, np.uint8)
    bits[comm.rank] = 3
    assert comm.total(bits).dtype == np.uint8 and comm.total(bits).tolist() == [3] * comm.size
    assert comm.total(np.zeros((0, 8))).shape == (0, 8)
    with pytest.raises(TypeError, match="not float32"):
        comm.total(np.zeros(1, np.float32))


def check_any(comm: Communicator) -> None:
    assert not comm.any(False)
    for rank in range(comm.size):
        assert comm.any(comm.rank == rank)


def check_check(comm: Communicator) -> None:
    comm.check(None)
    last = comm.size - 1
    for kind in (InputError, PeerError, NumericalError, DamagedFileError, FeddipError):
        for culprit in {0, last}:
            _raises(
                comm, kind(f"rank {comm.rank} says λ") if comm.rank == culprit else None, kind, f"rank {culprit} says λ"
            )
    # All ranks have one: that of the lowest is told, on all ranks.
    mine: FeddipError = PeerError("first") if comm.rank == 0 else InputError(f"from {comm.rank}")
    _raises(comm, mine, PeerError, "first")
    if comm.size > 1:
        _raises(comm, InputError(f"from {comm.rank}") if comm.rank else None, InputError, "from 1")


def _raises(comm: Communicator, error: FeddipError | None, kind: Raised, text: str) -> None:
    try:
        comm.check(error)
    except FeddipError as raised:
        assert type(raised) is kind and str(raised) == text, (type(raised), str(raised))
        return
    raise AssertionError(f"rank {comm.rank}: nothing was raised")


# Lengths of each rank's payloads: ragged, empty, several, none, and on all ranks or on one.
_CASES: tuple[Callable[[int, int], list[int]], ...] = (
    lambda rank, size: [5],
    lambda rank, size: [3 + 7 * rank],
    lambda rank, size: [0, 100, 1] if rank % 2 == 0 else [],
    lambda rank, size: [] if rank == 0 else [rank, 0, 250],
    lambda rank, size: [0] * rank,
    lambda rank, size: [],
    lambda rank, size: [1000] if rank == size - 1 else [],
    lambda rank, size: [64, 64, 64] if rank == 0 else [1],
    lambda rank, size: [size * 16],
)


def _payload(rank: int, place: int, length: int) -> np.ndarray:
    return np.random.default_rng([rank, place]).integers(0, 256, length, np.uint8)


def check_allgatherv(comm: Communicator) -> None:
    for case in _CASES:
        lengths = [case(rank, comm.size) for rank in range(comm.size)]
        expected = [_payload(r, i, n) for r, own in enumerate(lengths) for i, n in enumerate(own)]
        mine = [_payload(comm.rank, i, n) for i, n in enumerate(lengths[comm.rank])]
        # 1 is below the number of ranks; 64 cuts most cases into pieces; 2^20 cuts none.
        for limit in (1, 64, 65, 256, 2**20):
            other = Communicator(comm._handle, message_limit=limit)
            got = other.allgatherv(mine, [len(own) for own in lengths])
            assert len(got) == len(expected), (lengths, limit)
            for ours, theirs in zip(got, expected, strict=True):
                assert ours.dtype == np.uint8 and np.array_equal(ours, theirs), (lengths, limit)
            own, everybody = (sum(n) + 8 * len(n) for n in (lengths[comm.rank], [n for row in lengths for n in row]))
            assert other.sent == {"update": own} and other.received == {"update": everybody - own}, (lengths, limit)


def _part(source: int, place: int, target: int, length: int) -> np.ndarray:
    return np.random.default_rng([source, place, target]).integers(0, 256, length, np.uint8)


def check_alltoallv(comm: Communicator) -> None:
    """A payload's part for rank t has its length plus 3 t bytes."""
    for case in _CASES:
        lengths = [case(rank, comm.size) for rank in range(comm.size)]
        mine = [[_part(comm.rank, i, t, n + 3 * t) for t in range(comm.size)] for i, n in enumerate(lengths[comm.rank])]
        expected = [
            _part(r, i, comm.rank, n + 3 * comm.rank) for r, own in enumerate(lengths) for i, n in enumerate(own)
        ]
        for limit in (1, 64, 2**20):
            other = Communicator(comm._handle, message_limit=limit)
            got = other.alltoallv(mine, [len(own) for own in lengths])
            assert len(got) == len(expected)
            for ours, theirs in zip(got, expected, strict=True):
                assert ours.dtype == np.uint8 and np.array_equal(ours, theirs), (lengths, limit)
            sent = sum(part.size + 8 for parts in mine for part in parts)
            own = sum(parts[comm.rank].size + 8 for parts in mine)
            assert other.sent == {"update": sent}
            assert other.received == {"update": sum(part.size + 8 for part in expected) - own}


def check_node_allgatherv(comm: Communicator) -> None:
    for ranks_per_node in (None, 1, 2, 3):
        other = Communicator(comm._handle, ranks_per_node=ranks_per_node)
        nodes = other.open_nodes()
        assert nodes == (1 if ranks_per_node is None else -(-comm.size // ranks_per_node))
        node_of = [rank // (ranks_per_node or comm.size) for rank in range(comm.size)]
        for background in (False, True):
            if background:
                other.open_background()
            for case in _CASES:
                lengths = [case(rank, comm.size) for rank in range(comm.size)]
                expected = [_payload(r, i, n) for r, own in enumerate(lengths) for i, n in enumerate(own)]
                mine = [_payload(comm.rank, i, n) for i, n in enumerate(lengths[comm.rank])]
                counts = [len(own) for own in lengths]
                before, heard = other.sent["update"], other.received["update"]
                got = other.post(functools.partial(other.node_allgatherv, mine, counts)).result()
                assert len(got) == len(expected)
                assert all(np.array_equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True)), lengths
                # Only the first rank of a node speaks for it: all nodes together hand each byte over once, one none.
                handed = comm.gather(np.array([float(other.sent["update"] - before)]))
                assert handed.sum() == sum(n * (nodes > 1) + 8 for own in lengths for n in own)
                # Everybody hears the others' lengths, who speaks for a node the other nodes' bytes.
                foreign = sum(
                    n for own, node in zip(lengths, node_of, strict=True) if node != node_of[comm.rank] for n in own
                )
                speaks = node_of.index(node_of[comm.rank]) == comm.rank
                assert other.received["update"] - heard == speaks * foreign + 8 * (len(expected) - len(mine))
        other.free()


def check_allreduce(comm: Communicator) -> None:
    ranks = np.arange(comm.size, dtype=np.float32)
    for limit in (4, 64, 2**20):
        other = Communicator(comm._handle, message_limit=limit)
        got = other.allreduce(np.arange(100, dtype=np.float32) * (comm.rank + 1))
        assert np.array_equal(got, np.arange(100, dtype=np.float32) * (ranks + 1).sum())
        assert other.sent["update"] == 400
    for wrong in (np.zeros(4), np.zeros(4, np.uint16), np.zeros(4, np.float16)):  # bfloat16 comes as 16-bit integers
        try:
            comm.allreduce(wrong)
        except TypeError:
            continue
        raise AssertionError(f"{wrong.dtype} was reduced")


def check_background(comm: Communicator) -> None:
    """Exchanges run behind small messages of the same ranks, in their order, whichever end first."""
    other = Communicator(comm._handle)
    threaded = other.open_background()
    assert threaded == (comm.size > 1) or other.thread_level() != "multiple"
    posted = []
    for wave in range(6):
        mine = [_payload(comm.rank, wave, 1000 * (1 + wave % 3))] if (comm.rank + wave) % 2 == 0 else []
        counts = [int((rank + wave) % 2 == 0) for rank in range(comm.size)]
        posted.append(other.post(functools.partial(other.allgatherv, mine, counts)))
        assert other.gather(np.array([float(wave)])).sum() == wave * comm.size
        assert other.broadcast(wave if comm.rank == 0 else None) == wave
    for wave, sent in enumerate(posted):
        senders = [rank for rank in range(comm.size) if (rank + wave) % 2 == 0]
        got = sent.result(30)
        assert len(got) == len(senders)
        for rank, payload in zip(senders, got, strict=True):
            assert np.array_equal(payload, _payload(rank, wave, 1000 * (1 + wave % 3)))
    # A failure there reaches whoever waits for it.
    failed = None
    try:
        failed = other.post(lambda: other.allgatherv([], [1] * comm.size))
    except PeerError:
        assert not threaded
    if failed is not None:
        assert isinstance(failed.exception(30), PeerError)
    other.free()


def check_require_same(comm: Communicator) -> None:
    comm.require_same("the plan", {"round": 3, "list": [1, 2]})
    if comm.size == 1:
        return
    last = comm.size - 1
    try:
        comm.require_same("the plan of round 4", {"round": 3 + (comm.rank == last)})
    except PeerError as error:
        assert error.shared
        for part in ("the plan of round 4", '{"round": 3}', '{"round": 4}', "rank 0", f"rank {last}"):
            assert part in str(error), str(error)
        return
    raise AssertionError("two plans passed for one")


def check_allgatherv_wrong_count(comm: Communicator) -> None:
    try:
        comm.allgatherv([], [1] * comm.size)
    except PeerError as error:
        assert f"rank {comm.rank} has 0 payloads, the plan says 1" in str(error)
    else:
        raise AssertionError("a payload too few was accepted")


def check_broadcast_array(comm: Communicator) -> None:
    arrays = [
        np.arange(1001, dtype=np.float32),
        np.arange(24, dtype=np.int64).reshape(2, 3, 4).transpose(2, 0, 1),
        np.array([[True, False]]),
        np.zeros((0, 3), np.float64),
        np.array(2.5),
        np.array([7], np.uint8),
    ]
    for limit in (64, 63, 2**20):
        other = Communicator(comm._handle, message_limit=limit)
        for array in arrays:
            before = other.sent["data"], other.received["data"]
            got = other.broadcast_array(array if comm.rank == 0 else None)
            assert got.dtype == array.dtype and got.shape == array.shape and np.array_equal(got, array), (array, limit)
            moved = other.sent["data"] - before[0], other.received["data"] - before[1]
            assert moved == ((array.nbytes, 0) if comm.rank == 0 else (0, array.nbytes))


def check_move(comm: Communicator) -> None:
    size, rank = comm.size, comm.rank
    pairs = [(source, destination) for source in range(size) for destination in range(size)]
    # Each pair twice, the second time with an empty message; and all in the other order.
    twice = [(key, *pair) for key, pair in enumerate(pairs + pairs)]
    for transfers in (twice, twice[::-1], []):
        asked: list[int] = []

        def outgoing(key: int, asked: list[int] = asked) -> np.ndarray:
            asked.append(key)
            return _message(key, len(pairs))

        before = comm.sent["residual"], comm.received["residual"]
        arrived = comm.move(transfers, outgoing)
        leaving = [k for k, s, d in transfers if s == rank != d]
        coming = [k for k, s, d in transfers if d == rank != s]
        assert sorted(asked) == sorted(leaving) and sorted(arrived) == sorted(coming)
        assert all(np.array_equal(arrived[key], _message(key, len(pairs))) for key in coming)
        counted = comm.sent["residual"] - before[0], comm.received["residual"] - before[1]
        assert counted == tuple(sum(_message(key, len(pairs)).size for key in keys) for keys in (leaving, coming))


def _message(key: int, pairs: int) -> np.ndarray:
    # Some are above the eager limit of both libraries, so that a receiver has to be there.
    return np.zeros(0, np.uint8) if key >= pairs else _payload(key, 0, 200_000 if key % 2 else key)


def check_move_in_pieces(comm: Communicator) -> None:
    if comm.size == 1:
        return
    for limit in (1, 64, 65):
        other = Communicator(comm._handle, message_limit=limit)
        lengths = (0, 1, 63, 64, 65, 128, 129, 500)
        transfers = [(key, key % 2, 1 - key % 2) for key in range(len(lengths))]
        arrived = other.move(transfers, lambda key, n=lengths: _payload(key, 0, n[key]))  # type: ignore[misc]
        expected = [key for key, _, destination in transfers if destination == comm.rank]
        assert sorted(arrived) == expected
        assert all(np.array_equal(arrived[key], _payload(key, 0, lengths[key])) for key in expected)


def check_move_of_keys_that_are_no_tags(comm: Communicator) -> None:
    """MPI promises tags up to 32767; a client's number may be larger, and two may differ by a multiple of that."""
    if comm.size == 1:
        return
    keys = [5, 2**15 + 5, 2**16 + 5, 2**31 + 5, 2**31 - 1, 100_000]
    transfers = [(key, place % 2, 1 - place % 2) for place, key in enumerate(keys)]
    for order in (transfers, transfers[::-1], [(key, 0, 1) for key in keys]):
        arrived = comm.move(order, lambda key: _payload(key, 0, key % 1000))
        expected = {key for key, _, destination in order if destination == comm.rank}
        assert set(arrived) == expected
        assert all(np.array_equal(arrived[key], _payload(key, 0, key % 1000)) for key in expected)


def check_long_values_in_pieces(comm: Communicator) -> None:
    value = {"history": list(range(100)), "name": "ä" * 50}
    for limit in (1, 64, 2**20):
        other, sizes = Communicator(comm._handle, message_limit=limit), []
        call = other._call

        def noted(
            handle: Any, name: str, array: np.ndarray, sizes: Any = sizes, call: Any = call, **named: Any
        ) -> None:
            sizes.append(array.size)
            call(handle, name, array, **named)

        with mock.patch.object(other, "_call", noted):
            assert other.broadcast(value if comm.rank == 0 else None) == value
        assert max(sizes) <= limit and len(sizes) > 1


def check_shared_arrays(comm: Communicator) -> None:
    def arrays() -> dict[str, np.ndarray]:
        return {
            "images": np.arange(60, dtype=np.uint8).reshape(5, 3, 2, 2),
            "labels": np.arange(5, dtype=np.int64) - 2,
            "empty": np.zeros((0, 3, 2, 2), np.uint8),
            "none": np.zeros(0, np.int64),
            "floats": np.linspace(0, 1, 7, dtype=np.float32),
            "turned": np.arange(6.0).reshape(2, 3).T,
        }

    shared = comm.shared_arrays(arrays() if comm.node_rank == 0 else None)
    assert list(shared) == list(arrays())
    for name, array in arrays().items():
        assert shared[name].dtype == array.dtype and shared[name].shape == array.shape, name
        assert np.array_equal(shared[name], array), name
    # The same memory, not a copy: what one rank writes the others read.
    comm.barrier()
    if comm.node_rank == 0:
        shared["labels"][3] = 77
    comm.barrier()
    assert shared["labels"][3] == 77
    comm.barrier()
    del shared
    comm.free()


def check_arrays_that_cannot_be_shared(comm: Communicator) -> None:
    """No room in shared memory: copies. No memory for these either: an error on all ranks, before MPI is asked."""
    turned = np.arange(6.0).reshape(2, 3).T
    turned.flags.writeable = False
    arrays = {"images": np.arange(300, dtype=np.uint8), "none": np.zeros(0, np.int64), "turned": turned}
    other = Communicator(comm._handle, message_limit=64)
    with mock.patch.object(runtime, "shared_memory", lambda: ("/dev/shm", 2**25)):
        copies = other.shared_arrays(dict(arrays) if other.node_rank == 0 else None)
        assert f"/dev/shm: {2**25} bytes are free, and 348 with {2**25} to spare" in other.unshared
        with mock.patch.object(runtime, "process", lambda: {"memory_available_bytes": -1}):
            try:
                other.shared_arrays(dict(arrays) if other.node_rank == 0 else None)
            except InputError as error:
                assert error.shared and f"a copy for each of this node's {comm.size} ranks" in str(error)
            else:
                raise AssertionError("copies that no memory holds")
    assert list(copies) == list(arrays)
    for name, array in arrays.items():
        assert np.array_equal(copies[name], array) and copies[name].dtype == array.dtype, name
    copies["images"][:] = comm.rank
    copies["turned"][:] = comm.rank
    comm.barrier()
    assert set(copies["images"].tolist()) == set(copies["turned"].ravel().tolist()) == {comm.rank}


def check_a_window_that_cannot_be_made(comm: Communicator) -> None:
    other, real = Communicator(comm._handle), comm._mpi

    def refuse(*_: object, **__: object) -> None:
        raise real.Exception(real.ERR_INTERN)

    other._mpi = SimpleNamespace(Exception=real.Exception, Win=SimpleNamespace(Allocate_shared=refuse))
    with pytest.raises(FeddipError, match="MPI cannot make 77 bytes of memory that the ranks of a node share"):
        other._shared_window(comm._node(), 77)


def check_node_broadcast(comm: Communicator) -> None:
    assert comm.node_broadcast({"a": comm.rank}) == {"a": comm.rank - comm.node_rank}
    assert comm.node_rank == comm.rank  # all ranks of this test are on one machine


def check_library(comm: Communicator) -> None:
    assert "mpi4py" in comm.library() and "\n" not in comm.library()
    assert comm.host()


def main() -> None:
    runtime.prepare_mpi()
    comm = collectives.world()
    assert comm.size == int(sys.argv[1]), f"{comm.size} ranks, not {sys.argv[1]}"
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            check(comm)
            comm.barrier()
            if comm.rank == 0:
                print("passed", name, flush=True)
    assert "torch" not in sys.modules
    comm.free()


if __name__ == "__main__":
    main()
