"""Which rank trains which participant. It decides who works and what moves, never a result. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# A holder may be loaded this much above the mean before its client moves: moving a residual costs a message.
_TOLERANCE = 1.1


def assign(participants: Sequence[int], samples: Sequence[int], holders: Sequence[int], ranks: int) -> dict[int, int]:
    """Spread the participants evenly over the ranks, longest first, at the holder of their residual where it fits.

    Args:
        participants: client ids.
        samples: training images of every client, by client id.
        holders: the rank that holds each client's residual, by client id.
        ranks: number of ranks.

    Returns:
        rank by client id, keys in the order of `participants`.
    """
    loads = [0] * ranks
    limit = _TOLERANCE * max(sum(samples[c] for c in participants) / ranks, max(samples[c] for c in participants))
    placed = {}
    for client in sorted(participants, key=lambda c: (-samples[c], c)):
        rank = holders[client]
        if loads[rank] + samples[client] > limit:
            rank = min(range(ranks), key=lambda r: (loads[r], r))
        loads[rank] += samples[client]
        placed[client] = rank
    return {client: placed[client] for client in participants}


def by_rank(placed: Mapping[int, int], ranks: int) -> list[list[int]]:
    """The clients of each rank, in the order of `placed`."""
    return [[client for client, rank in placed.items() if rank == r] for r in range(ranks)]
