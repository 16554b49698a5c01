"""A communicator of a few ranks that are threads of one process: the laws of ranks without MPI."""

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from alone import Alone

from feddip_mpi.errors import FeddipError


class Together(Alone):
    """One rank of `ranks`; what they exchange lies on a table that all of them see."""

    def __init__(self, rank: int, ranks: int, table: dict[Any, Any], barrier: threading.Barrier) -> None:
        super().__init__()
        self.rank, self.size, self.node_rank = rank, ranks, rank
        self._table, self._barrier = table, barrier

    def _all(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        self._table[self.rank] = value
        self._barrier.wait(60)
        out = [self._table[rank] for rank in range(self.size)]
        self._barrier.wait(60)
        return out

    def check(self, error: FeddipError | None) -> None:
        for each in self._all(error):
            if each is not None:
                raise each

    def gather(self, row: np.ndarray) -> np.ndarray:
        return np.stack(self._all(np.array(row)))

    def gather_json(self, value: Any) -> list[Any]:
        return self._all(value)

    def total(self, values: np.ndarray) -> np.ndarray:
        return np.sum(self._all(np.array(values)), axis=0, dtype=values.dtype)

    def allreduce(self, values: np.ndarray) -> np.ndarray:
        self.sent["update"] += values.nbytes
        return np.sum(self._all(values.copy()), axis=0, dtype=values.dtype)

    def require_same(self, what: str, value: Any) -> None:
        assert len({repr(each) for each in self._all(value)}) == 1, what

    def allgatherv(self, payloads: list[np.ndarray], counts: list[int]) -> list[np.ndarray]:
        gathered = self._all(list(payloads))
        assert [len(own) for own in gathered] == list(counts)
        self.sent["update"] += sum(payload.size for payload in payloads)
        return [payload for own in gathered for payload in own]

    def alltoallv(self, payloads: list[list[np.ndarray]], counts: list[int]) -> list[np.ndarray]:
        gathered = self._all([list(parts) for parts in payloads])
        assert [len(own) for own in gathered] == list(counts)
        self.sent["update"] += sum(part.size for parts in payloads for part in parts)
        return [parts[self.rank] for own in gathered for parts in own]

    def move(self, transfers: list[tuple[int, int, int]], outgoing: Any) -> dict[int, np.ndarray]:
        away = [(key, to) for key, source, to in transfers if source == self.rank != to]
        mine = {(key, to): outgoing(key) for key, to in away}
        gathered = self._all(mine)
        return {key: message for own in gathered for (key, to), message in own.items() if to == self.rank}


def together(ranks: int, work: Callable[[Together], Any]) -> list[Any]:
    """What `work` returns on each of `ranks` ranks; the first error of any is raised."""
    table: dict[Any, Any] = {}
    barrier, results, errors = threading.Barrier(ranks), [None] * ranks, []

    def run(rank: int) -> None:
        try:
            results[rank] = work(Together(rank, ranks, table, barrier))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    real = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    if errors:
        raise (real or errors)[0]
    assert Counter(result is None for result in results)[True] in (0, ranks)
    return results
