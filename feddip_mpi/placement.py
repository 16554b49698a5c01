"""Which rank trains which participant. It decides who works and what moves, never a result. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

# A holder may be loaded this much above the mean before its client moves: moving a residual costs a message.
_TOLERANCE = 1.1
# How much of a rank's speed is that of the rounds before.
_MEMORY = 0.7


def assign(
    participants: Sequence[int],
    samples: Sequence[int],
    holders: Sequence[int],
    ranks: int,
    speeds: Sequence[float] | None = None,
) -> dict[int, int]:
    """Spread the participants evenly over the ranks, longest first, at the holder of their residual where it fits.

    Args:
        participants: client ids.
        samples: training images of every client, by client id.
        holders: the rank that holds each client's residual, by client id.
        ranks: number of ranks.
        speeds: images a second of each rank, in any unit; None where all are equal.

    Returns:
        rank by client id, keys in the order of `participants`.
    """
    pace = np.array(speeds, np.float64) if speeds is not None else np.ones(ranks)
    loads = np.zeros(ranks)  # in the time that they take
    longest = max(samples[c] for c in participants) / pace.max()
    limit = _TOLERANCE * max(sum(samples[c] for c in participants) / sum(pace.tolist()), longest)
    placed = {}
    for client in sorted(participants, key=lambda c: (-samples[c], c)):
        rank = holders[client]
        if loads[rank] + samples[client] / pace[rank] > limit:
            rank = int((loads + samples[client] / pace).argmin())  # of equal ones the first
        loads[rank] += samples[client] / pace[rank]
        placed[client] = rank
    return {client: placed[client] for client in participants}


def fill_up(pieces: int, size: float, loads: Sequence[float], speeds: Sequence[float] | None = None) -> list[list[int]]:
    """Give equal pieces of work one by one to the rank that would be done with it first.

    Args:
        pieces: how many.
        size: of each.
        loads: what each rank has to do besides, in the same unit.
        speeds: of the ranks, in any unit; None where all are equal.

    Returns:
        The pieces of each rank, ascending.
    """
    pace = np.array(speeds, np.float64) if speeds is not None else np.ones(len(loads))
    done = np.array(loads, np.float64) / pace
    given: list[list[int]] = [[] for _ in loads]
    for piece in range(pieces):
        rank = int((done + size / pace).argmin())
        done[rank] += size / pace[rank]
        given[rank].append(piece)
    return given


def learnt_speeds(
    old: Sequence[float] | None, placed: Mapping[int, int], samples: Sequence[int], seconds: Sequence[float]
) -> list[float]:
    """Speeds of the ranks after a round, from how long each has trained.

    Args:
        old: what was known before; None for nothing.
        placed: the rank of each participant, by client.
        samples: training images of every client, by client id.
        seconds: that each rank has trained.

    Returns:
        Images of one epoch a second by rank, averaged over the rounds, recent ones counting more. A rank that has not
        trained keeps its speed, or has the mean of the others.
    """
    measured: list[float | None] = [None] * len(seconds)
    for rank, own in enumerate(by_rank(placed, len(seconds))):
        if own and seconds[rank] > 0:
            measured[rank] = sum(samples[client] for client in own) / seconds[rank]
    known = [speed for speed in measured if speed is not None]
    if not known:
        return list(old) if old is not None else [1.0] * len(seconds)
    mean = sum(known) / len(known)
    if old is None:
        return [mean if speed is None else speed for speed in measured]
    return [
        before if now is None else _MEMORY * before + (1 - _MEMORY) * now
        for before, now in zip(old, measured, strict=True)
    ]


def by_rank(placed: Mapping[int, int], ranks: int) -> list[list[int]]:
    """The clients of each rank, in the order of `placed`."""
    lists: list[list[int]] = [[] for _ in range(ranks)]
    for client, rank in placed.items():
        lists[rank].append(client)
    return lists
