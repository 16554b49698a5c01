"""What a GPU is told again and again, recorded once as a CUDA graph and then started with a single launch.

A client's step is some 150 to 1,500 kernels of a few microseconds each, and telling a GPU of one takes the host about as
long: without graphs it waits for the host. A recording starts the same kernels in the same order, so that
it changes no bit.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from feddip_mpi.errors import UnrecordableError

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# Recording takes as long as a handful of steps, and a batch of a size that hardly ever comes is not worth it.
_USES = 4
# Clients of different sizes end their epochs with batches of as many sizes, and every recording keeps some memory of its own.
# What was not started for longest makes room: the first mask and the first penalty make all forms new ones.
_MOST = 16
# A recorded step is a launch or two, of which a GPU's queue takes a thousand: without a limit the host would tell it of a whole
# client at once, and notice neither a stop nor a rank's death before that client's end.
_AHEAD = 8
# From there on torch finds the generators that a recording draws from by itself, and warns whoever names them.
_FINDS_GENERATORS = (2, 14)


@dataclass(frozen=True)
class _Recording:
    """Reads `inputs`, which are its own; `start` computes."""

    inputs: tuple[Tensor, ...]
    start: Callable[[], None]


class Recorder:
    """Recordings of one kind of work, by form. They share their memory, that of the largest: one is under way at a time.

    The host is at most sixteen starts ahead of the GPU.

    Attributes:
        recorded: how many there are.
    """

    def __init__(self, generators: Sequence[torch.Generator] = ()) -> None:
        """`generators`: besides torch's own, those that the work draws from."""
        self._generators = tuple(generators)
        self._uses: Counter[Hashable] = Counter()
        self._needed: dict[Hashable, int] = {}
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()  # by their last start, the newest last
        self._pool: object = None
        self._has_room, self._was_full = True, False
        self._started = 0
        self._reached: Callable[[], None] | None = None

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
            UnrecordableError: this work cannot be recorded.
        """
        recording = self._recordings.get(form)
        if recording is None and self._has_room:
            self._uses[form] += 1
            if self._uses[form] >= self._needed.get(form, _USES):
                recording = self._record(form, inputs, work)
        if recording is None:
            work(*inputs)
            return
        self._recordings.move_to_end(form)
        for own, given in zip(recording.inputs, inputs, strict=True):
            own.copy_(given)
        recording.start()
        self._started += 1
        if self._started % _AHEAD == 0:
            reached, self._reached = self._reached, mark()
            if reached is not None:
                reached()

    def drop(self) -> None:
        """Give back the memory of all recordings, and make no more."""
        log.warning(
            "cuda_graphs: the GPU's memory ran out; the recorded steps (%d) are dropped, and steps are slower from here on",
            self.recorded,
        )
        self._has_room = False
        self._clear()

    def _clear(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # one may be under way
        self._recordings.clear()
        self._pool = None
        torch.cuda.empty_cache()

    def _record(self, form: Hashable, inputs: Sequence[Tensor], work: Callable[..., None]) -> _Recording | None:
        """Computes nothing. None where the GPU has no memory for another one beside the others; those are then gone."""
        own = tuple(given.clone() for given in inputs)
        try:
            start, self._pool = capture(lambda: work(*own), self._generators, self._pool)
        except RuntimeError as error:
            if _is_out_of_memory(error):
                # They may be of steps that do not come again, and memory may have been short for a moment: once more, from none.
                log.warning("cuda_graphs: the GPU has no memory to record another step (recorded: %d)", self.recorded)
                self._has_room = bool(self._recordings) and not self._was_full
                self._was_full = True
                self._clear()
                return None
            # Capturing ends with an error of its own, behind which is what could not be captured.
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            raise UnrecordableError(
                f"cuda_graphs: a client's step cannot be recorded ({str(cause).partition(chr(10))[0]}); allowed: a network whose "
                "forward pass neither waits for the GPU nor decides by values, and room on the GPU; or `resume` with "
                "cuda_graphs=off, which changes no bit"
            ) from error
        recording = self._recordings[form] = _Recording(own, start)
        if self.recorded > _MOST:
            # Now: capturing has waited for whatever was under way, and the newest keeps their memory alive.
            oldest, _ = self._recordings.popitem(last=False)
            # With more forms than places in turn, one that is worth less is recorded less and less often.
            self._uses[oldest], self._needed[oldest] = 0, 2 * self._needed.get(oldest, _USES)
        return recording


def with_room(recorder: Recorder | None, work: Callable[[], Result]) -> Result:
    """What `work` returns; where the GPU's memory runs out, once more without recordings, which keep theirs for themselves.

    Args:
        work: may begin again from nothing.
    """
    try:
        return work()
    except RuntimeError as error:
        if recorder is None or not recorder.recorded or not _is_out_of_memory(error):
            raise
    recorder.drop()  # not before the error has gone, and what it holds
    return work()


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Torch's own memory, or the driver's, in which recordings lie."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "CUDA error: out of memory" in str(error)


def capture(
    work: Callable[[], None], generators: Sequence[torch.Generator], pool: object
) -> tuple[Callable[[], None], object]:
    """Record what the GPU is told; returns what starts it, and its memory, for other recordings to share.

    Raises:
        RuntimeError: the work waits for the GPU, or is told something that cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _FINDS_GENERATORS:
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


def mark() -> Callable[[], None]:
    """Returns what waits until the GPU has done all that the current stream has been told so far."""
    event = torch.cuda.Event()
    event.record()
    return event.synchronize
