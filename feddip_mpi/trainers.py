"""The trainers of a rank: several clients train at once, each in a workspace, a thread and (on a GPU) a stream of its own.

Every client runs the operations that it would run alone, in their order, on memory that no other client touches, and
results are handed out in client order. How many train at once therefore changes no bit.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from queue import SimpleQueue

import torch

from feddip_mpi import generators, graphs
from feddip_mpi.errors import InputError
from feddip_mpi.local import LocalResult, LocalTrainer

# How often the main thread, which alone may call MPI, asks while it waits whether the round is given up.
_POLL_SECONDS = 0.05
# Clients under way or not yet handed out, for each trainer: one need not wait for a slower one before it.
_AHEAD = 2

# Trains a client with a trainer: (trainer, client, asked before every batch whether to give up, is it alone).
Train = Callable[[LocalTrainer, int, Callable[[], bool], bool], LocalResult]


class Trainers:
    """As many trainers as clients train at once.

    Memory: a workspace (`LocalTrainer`) for each trainer and at most two updates that wait, whatever the clients.

    Attributes:
        all: the trainers; the first is also there for what is not a round.
    """

    def __init__(self, trainers: Sequence[LocalTrainer], threads: int) -> None:
        """`threads`: torch threads of each trainer. Raises InputError where a method gives two of them one hook."""
        hooks = [id(trainer.hook) for trainer in trainers if trainer.hook is not None]
        if len(set(hooks)) < len(hooks):
            error = InputError(
                f"clients_at_once: got {len(trainers)}, but hook(bound) of the method returns the same object when it is called "
                "again; allowed: a method whose hook makes a new one, or clients_at_once=1"
            )
            error.shared = True  # every rank finds it at the same time
            raise error
        self.all = tuple(trainers)
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._free: SimpleQueue[LocalTrainer] = SimpleQueue()
        self._own = threading.local()

    def begin_round(self, round: int, updates_mask: bool) -> None:
        """See `LocalHook.begin_round`."""
        for trainer in self.all:
            if trainer.hook is not None:
                trainer.hook.begin_round(round, updates_mask)

    def results(
        self, clients: Sequence[int], train: Train, give_up: Callable[[], bool]
    ) -> Generator[LocalResult, None, None]:
        """Train some clients; what each leaves, in the order of `clients`. Close it where it is not used up.

        Args:
            clients: of this rank.
            train: called once for each; whatever it raises is raised here when the client's turn comes.
            give_up: called by this thread alone, again and again; once it is true, training ends with `Abandoned`.

        Raises:
            InputError: the network draws from global generators, which clients that train at once would share.
        """
        if min(len(self.all), len(clients)) < 2:
            yield from (train(self.all[0], client, give_up, True) for client in clients)
            return
        own_stream = _stream_here(self.all[0])
        gpus, stop = own_stream is not None, threading.Event()
        before = generators.states(gpus)
        pool, left = self._opened(), iter(clients)

        def one(client: int) -> LocalResult:
            trainer = self._free.get()
            try:
                with _on(self._own.stream, own_stream):
                    # The recordings, if any, are the first one's, of rounds in which it trained alone.
                    result = graphs.with_room(self.all[0].recorder, lambda: train(trainer, client, stop.is_set, False))
                if own_stream is not None:
                    # This thread's stream frees them not before that one is done with them.
                    for vector in (result.update, *result.extras):
                        vector.record_stream(own_stream)
                return result
            finally:
                self._free.put(trainer)

        futures: deque[Future[LocalResult]] = deque()
        try:
            futures.extend(pool.submit(one, client) for client in islice(left, _AHEAD * len(self.all)))
            while futures:
                while not wait(list(islice(futures, 1)), _POLL_SECONDS).done:
                    if give_up():
                        stop.set()
                result = futures[0].result()
                futures.popleft()
                futures.extend(pool.submit(one, client) for client in islice(left, 1))
                if not futures and generators.states(gpus) != before:
                    raise InputError(SHARED_GENERATORS.format(len(self.all)))
                yield result
        finally:
            stop.set()
            for future in futures:
                future.cancel()
            wait(futures)

    def _opened(self) -> ThreadPoolExecutor:
        """The threads, which live as long as the run: each keeps what libraries make once a thread."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(len(self.all), "trainer", self._begin_thread)
            for trainer in self.all:
                self._free.put(trainer)
        return self._pool

    def _begin_thread(self) -> None:
        """What a thread does not inherit: how many threads torch may use, and its GPU.

        A stream belongs to a thread and not to a trainer: cuBLAS keeps 32 MiB for each pair of a thread and a stream. A
        thread whose GPU is not set takes the first one, and half a gigabyte of it for nothing.
        """
        torch.set_num_threads(self._threads)
        device = self.all[0].bound.vector.device
        self._own.stream = None
        if device.type == "cuda":
            torch.cuda.set_device(device)
            self._own.stream = torch.cuda.Stream(device)


SHARED_GENERATORS = (
    "clients_at_once: got {}, but the network draws from the global random generators of torch, Python or numpy while it "
    "trains (nn.Dropout?), which clients that train at once would share; allowed: clients_at_once=1, or "
    "feddip_mpi.models.dropout.Dropout in the network"
)


def _stream_here(trainer: LocalTrainer) -> torch.cuda.Stream | None:
    """The stream that this thread computes on; none on the CPU."""
    device = trainer.bound.vector.device
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


@contextmanager
def _on(stream: torch.cuda.Stream | None, before: torch.cuda.Stream | None) -> Iterator[None]:
    """Compute on `stream`, after what `before` has been told until now; all is computed at the end. None: the CPU."""
    with torch.cuda.stream(stream):
        if stream is not None and before is not None:
            stream.wait_stream(before)
        try:
            yield
        finally:
            if stream is not None:
                stream.synchronize()
