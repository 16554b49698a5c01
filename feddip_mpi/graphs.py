"""What a GPU is told again and again, recorded once as a CUDA graph and then started with a single launch.

A client's step is some 150 to 1,500 kernels of a few microseconds each, and telling a GPU of one takes the host about as
long: without graphs it waits for the host. A recording starts the same kernels in the same order, so that
it changes no bit.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from feddip_mpi.errors import InputError

log = logging.getLogger(__name__)

# Recording takes as long as a handful of steps, and a batch of a size that hardly ever comes is not worth it.
_USES = 4
# Clients of different sizes end their epochs with batches of as many sizes, and every recording keeps some memory of its own.
_MOST = 16


@dataclass(frozen=True)
class _Recording:
    """Reads `inputs`, which are its own; `start` computes."""

    inputs: tuple[Tensor, ...]
    start: Callable[[], None]


class Recorder:
    """Recordings of one kind of work, by form. They share their memory, that of the largest: one is under way at a time.

    Attributes:
        recorded: how many there are.
    """

    def __init__(self, generators: Sequence[torch.Generator] = ()) -> None:
        """`generators`: besides torch's own, those that the work draws from."""
        self._generators = tuple(generators)
        self._uses: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, _Recording] = {}
        self._pool: object = None
        self._most = _MOST

    @property
    def recorded(self) -> int:
        return len(self._recordings)

    def run(self, form: Hashable, inputs: Sequence[Tensor], work: Callable[..., None]) -> None:
        """Compute `work(*inputs)` on the current stream.

        Args:
            form: inputs of the same form have the same shapes and types.
            inputs: on the GPU; they are copied.
            work: returns nothing and waits for nothing. For a form it may differ in its inputs alone: whatever else it reads
                or writes lies where it lay when that form was first given.

        Raises:
            InputError: this work cannot be recorded. Torch does not find back to what it was before that.
        """
        recording = self._recordings.get(form)
        if recording is None and self.recorded < self._most:
            self._uses[form] += 1
            if self._uses[form] >= _USES:
                recording = self._record(form, inputs, work)
        if recording is None:
            work(*inputs)
            return
        for own, given in zip(recording.inputs, inputs, strict=True):
            own.copy_(given)
        recording.start()

    def _record(self, form: Hashable, inputs: Sequence[Tensor], work: Callable[..., None]) -> _Recording | None:
        """Computes nothing. None where the GPU has no memory for another one, from then on."""
        own = tuple(given.clone() for given in inputs)
        try:
            start, self._pool = capture(lambda: work(*own), self._generators, self._pool)
        except torch.cuda.OutOfMemoryError:
            self._most = self.recorded
            log.warning("cuda_graphs: the GPU has no memory to record more steps (recorded: %d)", self.recorded)
            return None
        except RuntimeError as error:
            # Capturing ends with an error of its own, behind which is what could not be captured.
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            raise InputError(
                f"cuda_graphs: a client's step cannot be recorded ({str(cause).partition(chr(10))[0]}); allowed: a network whose "
                "forward pass neither waits for the GPU nor decides by values, and room on the GPU; or `resume` with "
                "cuda_graphs=off, which changes no bit"
            ) from error
        return self._recordings.setdefault(form, _Recording(own, start))


def capture(
    work: Callable[[], None], generators: Sequence[torch.Generator], pool: object
) -> tuple[Callable[[], None], object]:
    """Record what the GPU is told; returns what starts it, and its memory, for other recordings to share.

    Raises:
        RuntimeError: the work waits for the GPU, or is told something that cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    torch.cuda.synchronize()
    before = torch.cuda.current_stream()
    try:
        # Other threads, which save or send meanwhile, may wait for the GPU.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # type: ignore[arg-type]
            work()
    finally:
        torch.cuda.set_stream(before)  # where capturing fails, torch stays on the stream that it captured
    # Capturing sets what recorded generators read (seed, and offset 0) on its own stream, for which torch does not wait: on a
    # busy GPU that could come after the first start had set its offset, and the same random numbers were drawn twice.
    torch.cuda.synchronize()
    return graph.replay, graph.pool()
