"""When a round's model is evaluated, and which rank evaluates what. Neither changes a bit of the scores.

A model is evaluated at the end of its round, by all ranks alike, or in the round after it, by those that would wait for
the others there (`eval.overlap`). Its record is complete then. Rounds after which a checkpoint is due are evaluated at
their end; where a checkpoint has to be written at once (a round abandoned, a rank dead), its last record lacks the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor

from feddip_mpi import evaluate, graphs, placement, schedules
from feddip_mpi.evaluate import BatchScores, Scores
from feddip_mpi.federation import Federation
from feddip_mpi.metrics import Record
from feddip_mpi.settings import Config

# A batch that is trained on goes forward once and backward for about the time of two; one that is evaluated goes forward.
_TRAINING = 3


def score_model(federation: Federation, weights: Tensor) -> Scores:
    """Evaluate float32 [n] on the global test set, sharded over the ranks; the same result on every rank."""
    comm = federation.comm
    count = evaluate.batch_count(federation.test_data, federation.config.eval.batch_size)
    return merged(federation, _score(federation, weights, range(comm.rank, count, comm.size)))


def score_part(
    federation: Federation, weights: Tensor, placed: Mapping[int, int], speeds: Sequence[float] | None,
    give_up: Callable[[], bool],
) -> BatchScores:  # fmt: skip
    """What this rank evaluates besides the clients that it trains in a round; the more, the less it trains.

    Args:
        weights: float32 [n], the pruned model of the round before.
        placed, speeds: see `placement.assign`.
        give_up: asked before every batch.

    Raises:
        Abandoned: `give_up` said so.
    """
    own = _spread(federation, placed, speeds)[federation.comm.rank]
    return _score(federation, weights, own, give_up)


def merged(federation: Federation, own: BatchScores) -> Scores:
    """The scores of which every rank has a part; the same on every rank."""
    comm = federation.comm
    whole = BatchScores(comm.total(own.losses), comm.total(own.correct))  # each batch is some rank's
    return evaluate.merge([whole], federation.partition.test if federation.config.eval.clients else None)


def can_wait(federation: Federation, round: int, holders: Sequence[int], speeds: Sequence[float] | None) -> bool:
    """Whether some rank will wait for others in round t = `round`, so that what is to be evaluated is left for it.

    Args:
        holders, speeds: before that round; see `placement.assign`.
    """
    config, size = federation.config, federation.comm.size
    if size == 1 or not config.eval.overlap or round >= config.rounds:
        return False
    placed = placement.assign(schedules.participants(config, round), federation.samples, holders, size, speeds)
    loads = _loads(federation, placed)
    times = [load / pace for load, pace in zip(loads, speeds or [1.0] * size, strict=True)]
    return min(times) < max(times)


def is_owed(config: Config, record: Record) -> bool:
    """Whether a round of a saved history was to be evaluated and was not: a signal ended the run before."""
    round = record["round"]
    return record["test_accuracy"] is None and schedules.evaluates(config, round)


def _spread(federation: Federation, placed: Mapping[int, int], speeds: Sequence[float] | None) -> list[list[int]]:
    """The evaluation batches of each rank."""
    size = federation.config.eval.batch_size
    count = evaluate.batch_count(federation.test_data, size)
    return placement.fill_up(count, size, _loads(federation, placed), speeds)


def _loads(federation: Federation, placed: Mapping[int, int]) -> list[float]:
    """What each rank trains, in images that go forward."""
    each = _TRAINING * federation.config.local_epochs
    clients = placement.by_rank(placed, federation.comm.size)
    return [float(each * sum(federation.samples[client] for client in own)) for own in clients]


def _score(
    federation: Federation, weights: Tensor, batches: Collection[int], give_up: Callable[[], bool] = lambda: False
) -> BatchScores:
    size, recorder = federation.config.eval.batch_size, federation.trainer.recorder
    return graphs.with_room(
        recorder, lambda: evaluate.score(federation.bound, weights, federation.test_data, size, batches, give_up)
    )
