"""A run's checkpoints: what all ranks bring together for one, and when which part of it is written."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property

import numpy as np

from feddip_mpi import checkpoint, hdf5, masks, methods, recovery, rounds, server
from feddip_mpi.checkpoint import Snapshot
from feddip_mpi.errors import FeddipError
from feddip_mpi.federation import Federation
from feddip_mpi.metrics import Record
from feddip_mpi.residuals import Residual
from feddip_mpi.rounds import State
from feddip_mpi.run_folder import RunFolder
from feddip_mpi.runtime import log
from feddip_mpi.writer import Writer, saving

# Residuals of so many bytes wait in memory for the thread that writes a checkpoint.
_KEPT_BYTES = 1 << 26


class FolderSaver:
    """Writes a run's checkpoints: rank 0 owns the file, the others stream it the residuals they hold.

    What the next rounds change is kept back, and a thread of rank 0 writes while training goes on. Tensors of the
    server and residuals are replaced and never altered, so that keeping them is no copy. Residuals beyond
    `_KEPT_BYTES` are written before training goes on: their owners will change them, and rank 0 has no room for all.
    """

    def __init__(
        self, built: Federation, folder: RunFolder, created: str, progress: Callable[[], None] = lambda: None
    ) -> None:
        """`progress`: told on every rank now and then while residuals travel, for nothing else is told meanwhile."""
        self._built, self._folder, self._created, self._progress = built, folder, created, progress
        self._last_save = time.monotonic()
        self._writer = Writer()

    @cached_property
    def _histogram(self) -> np.ndarray:
        """Of rank 0 alone, which writes it: 800 MB for 100,000 clients and 1,000 classes."""
        return self._built.partition.histogram(self._built.dataset.train_labels, self._built.dataset.classes)

    def overdue(self) -> bool:
        minutes = self._built.config.checkpoint.minutes
        return minutes is not None and time.monotonic() - self._last_save >= 60 * minutes

    def save(self, state: State, history: Sequence[Record]) -> None:
        """Begin to write a checkpoint, after the one before is finished; every rank calls it.

        Raises:
            FeddipError: on all ranks, if the one before, or what has to be written at once, cannot be written; older
                checkpoints stay as they are.
        """
        self.wait()
        comm, settings = self._built.comm, self._built.config
        memories = self._memories(state)
        residuals = self._stream(state)
        error: FeddipError | None = None
        if comm.rank == 0:
            error = self._begin(self._snapshot(state, history, memories), residuals)
        for _ in residuals:  # the other ranks send until the last client, also when rank 0 has failed
            pass
        comm.check(error)
        self._last_save = time.monotonic()
        if not settings.checkpoint.background or state.server.round >= settings.rounds:
            self.wait()

    def wait(self) -> None:
        """Wait until the file that is being written is complete; every rank calls it.

        Raises:
            FeddipError: on all ranks, if it cannot be written; older checkpoints stay as they are.
        """
        self._built.comm.check(self._writer.wait())

    def close(self) -> None:
        """Let the file that is being written become complete, on this rank alone: the run ends by another error."""
        error = self._writer.wait()
        if error is not None:
            log.error("%s", error)

    def _begin(self, snapshot: Snapshot, residuals: Iterator[tuple[int, Residual]]) -> FeddipError | None:
        """Write what does not fit into `_KEPT_BYTES`, hand the rest to the thread; returns what went wrong."""
        path = checkpoint.path_of(self._folder.checkpoints, snapshot.server.round)
        kept: deque[tuple[int, Residual]] = deque()
        room = _KEPT_BYTES
        with saving(path) as failed, ExitStack() as undo:
            draft = hdf5.Draft(path)
            undo.callback(draft.discard)
            for client, residual in residuals:
                size = residual.values.numel() * residual.values.element_size()
                if size <= room:
                    kept.append((client, replace(residual, values=residual.values.cpu())))
                    room -= size
                else:
                    checkpoint.add_residual(draft, client, residual)
                del residual  # the next one arrives before the loop would let go of this one
            self._writer.begin(lambda: self._finish(draft, snapshot, kept))
            undo.pop_all()  # the thread has the file now
        return failed[0] if failed else None

    def _finish(self, draft: hdf5.Draft, snapshot: Snapshot, kept: deque[tuple[int, Residual]]) -> FeddipError | None:
        """The thread's part: the rest of the file, its seal and its name, then old checkpoints go."""
        settings = self._built.config.checkpoint
        with saving(draft.path) as failed:
            try:
                checkpoint.complete(draft, snapshot, (kept.popleft() for _ in range(len(kept))))
            finally:
                draft.discard()
        if not failed:
            checkpoint.prune_old(
                self._folder.checkpoints, settings.keep, settings.best, self._final_sparsity(), snapshot.server.round
            )
        return failed[0] if failed else None

    def _final_sparsity(self) -> float:
        """Share of zeros of a finished model, in whole weights; 0 for a method that does not prune."""
        settings, size = self._built.config, self._built.layout.prunable
        asked = settings.sparsity.final if methods.named(settings.method).ends_at_final(settings) else 0.0
        return (size - masks.kept_count(size, asked)) / max(1, size)

    def _stream(self, state: State) -> Iterator[tuple[int, Residual]]:
        """Residuals in client order, on rank 0; it has one of another rank's at a time, and the one that arrives."""
        comm = self._built.comm
        # One question to all, not one for each of the many clients that never took part.
        own = np.array([client in state.held for client in range(len(state.holders))], np.uint8)
        for turn, client in enumerate(np.flatnonzero(comm.total(own)).tolist()):
            holder = state.holders[client]
            if holder == 0:
                residual = state.held.get(client)
            else:
                message = comm.move([(client, holder, 0)], lambda c: rounds.pack_residual(state.held.get(c)))
                residual = rounds.unpack_residual(message.pop(client)) if client in message else None
            if residual is not None and comm.rank == 0:
                yield client, residual
            del residual
            recovery.keep_step(comm, turn, self._progress)

    def _memories(self, state: State) -> dict[str, np.ndarray]:
        """What the server keeps besides W; every rank calls it, because each owns a part of what is owed."""
        found = {}
        if state.reference is not None:
            found["reference"] = state.reference.cpu().numpy()
        if state.owed is not None:
            # Zero on all ranks but the owner's: this sum is exact.
            found["owed"] = self._built.comm.allreduce(state.owed.cpu().numpy())
        return found | {name: values.cpu().numpy() for name, values in state.memories.items()}

    def _snapshot(self, state: State, history: Sequence[Record], memories: dict[str, np.ndarray]) -> Snapshot:
        built, srv = self._built, state.server
        if srv.weights.device.type != "cpu":
            srv = server.Server.of(srv.round, srv.weights.cpu(), srv.mask.cpu())
        return Snapshot(
            config=built.config,
            layout=built.layout,
            server=srv,
            history=[dict(record) for record in history],  # the last one gets its seconds when saving is over
            identity=built.identity,
            histogram=self._histogram,
            input_shape=built.dataset.shape,
            classes=built.dataset.classes,
            created=self._created,
            mean=built.dataset.mean,
            std=built.dataset.std,
            class_names=built.dataset.class_names,
            memories=memories,
        )
