"""What a GPU is told again and again, recorded once as a CUDA graph and then started with a single launch.

A client's step is some 150 to 1,500 kernels of a few microseconds each, and telling a GPU of one takes the host about as
long: without graphs it waits for the host. A recording starts the same kernels in the same order on the same memory, so that
it changes no bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from feddip_mpi.errors import InputError

# Recording takes as long as a handful of steps, and a batch of a size that hardly ever comes is not worth it.
_USES = 4


@dataclass(frozen=True)
class _Recording:
    """Reads `inputs`, which are its own; `start` computes."""

    inputs: tuple[Tensor, ...]
    start: Callable[[], None]


class Recorder:
    """Recordings of one kind of work, by form. They share their memory: only one is under way at a time.

    Attributes:
        recorded: how many there are.
    """

    def __init__(self, generators: Sequence[torch.Generator] = ()) -> None:
        """`generators`: besides torch's own, those that the work draws from."""
        self._generators = tuple(generators)
        self._uses: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, _Recording] = {}
        self._pool: object = None

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
        if recording is None:
            self._uses[form] += 1
            if self._uses[form] < _USES:
                work(*inputs)
                return
            recording = self._recordings[form] = self._record(inputs, work)
        for own, given in zip(recording.inputs, inputs, strict=True):
            own.copy_(given)
        recording.start()

    def _record(self, inputs: Sequence[Tensor], work: Callable[..., None]) -> _Recording:
        """Computes nothing."""
        own = tuple(given.clone() for given in inputs)
        try:
            start, self._pool = capture(lambda: work(*own), self._generators, self._pool)
        except RuntimeError as error:
            # Capturing ends with an error of its own, behind which is what could not be captured.
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            raise InputError(
                f"cuda_graphs: a client's step cannot be recorded ({str(cause).splitlines()[0]}); allowed: a network whose "
                "forward pass neither waits for the GPU nor decides by values, and room on the GPU; or `resume` with "
                "cuda_graphs=off, which changes no bit"
            ) from error
        return _Recording(own, start)


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
    # Other threads, which save or send meanwhile, may wait for the GPU.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # type: ignore[arg-type]
        work()
    # Capturing sets what recorded generators read (seed, and offset 0) on its own stream, for which torch does not wait: on a
    # busy GPU that could come after the first start had set its offset, and the same random numbers were drawn twice.
    torch.cuda.synchronize()
    return graph.replay, graph.pool()
