"""Every collective against what it must return, computed by hand. Without torch: ranks start in a moment."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np

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


def check_move_too_large(comm: Communicator) -> None:
    if comm.size == 1:
        return
    other = Communicator(comm._handle, message_limit=64)
    # Rank 0 refuses before anything is sent; nobody else takes part.
    if comm.rank == 0:
        try:
            other.move([(0, 0, 1)], lambda key: np.zeros(65, np.uint8))
        except FeddipError as error:
            assert "65" in str(error) and "64" in str(error)
        else:
            raise AssertionError("a message above the limit was accepted")


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
