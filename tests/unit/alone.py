"""The communicator of a job of one rank, without MPI."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np

from feddip_mpi.errors import FeddipError


class Alone:
    """Answers every collective with what one rank gets back.

    Attributes:
        background: whether messages may travel while the next ones are made.
        calls: the large collectives that were called.
    """

    rank, size, node_rank = 0, 1, 0
    world_ranks: tuple[int, ...] = (0,)
    lost_ranks: tuple[int, ...] = ()
    fault_tolerant = damaged = False
    unshared = ""

    def __init__(self, background: bool = False) -> None:
        self.background = background
        self.sent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def check(self, error: FeddipError | None) -> None:
        if error is not None:
            raise error

    def any(self, flag: bool) -> bool:
        return flag

    def require_same(self, what: str, value: Any) -> None:
        pass

    def gather(self, row: np.ndarray) -> np.ndarray:
        return row[None].copy()

    def total(self, values: np.ndarray) -> np.ndarray:
        return values.copy()

    def broadcast(self, value: Any) -> Any:
        return value

    def broadcast_array(self, array: np.ndarray) -> np.ndarray:
        return array.copy()

    def gather_json(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        pass

    def host(self) -> str:
        return "here"

    def library(self) -> str:
        return "none"

    def abort(self, code: int) -> None:
        raise SystemExit(code)

    def node_broadcast(self, value: Any) -> Any:
        return value

    def shared_arrays(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(arrays)

    def open_background(self) -> bool:
        return self.background

    def open_nodes(self) -> int:
        return 1

    def post(self, work: Callable[[], Any]) -> Future:
        done: Future = Future()
        done.set_result(work())
        return done

    def allgatherv(self, payloads: list[np.ndarray], counts: list[int]) -> list[np.ndarray]:
        self.calls["allgatherv"] += 1
        assert counts == [len(payloads)]
        return list(payloads)

    def node_allgatherv(self, payloads: list[np.ndarray], counts: list[int]) -> list[np.ndarray]:
        self.calls["node_allgatherv"] += 1
        assert counts == [len(payloads)]
        return list(payloads)

    def alltoallv(self, payloads: list[list[np.ndarray]], counts: list[int]) -> list[np.ndarray]:
        self.calls["alltoallv"] += 1
        assert counts == [len(payloads)] and all(len(parts) == 1 for parts in payloads)
        return [parts[0] for parts in payloads]

    def allreduce(self, values: np.ndarray) -> np.ndarray:
        self.calls["allreduce"] += 1
        assert values.dtype == np.float32
        return values.copy()

    def commit(self) -> None:
        pass

    def poll(self) -> None:
        pass

    def move(self, transfers: list[tuple[int, int, int]], outgoing: Any) -> dict[int, np.ndarray]:
        assert all(source == destination == 0 for _, source, destination in transfers)
        return {}
