"""What travels besides updates because a method asks for it: its opening, and extra vectors of a round's participants.

It goes by slices where the updates do (`exchange: sharded`), for which no rank has all participants' vectors at once, and else
by `allgatherv`; it is added up in client order, so it is the same bits by either way and on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from feddip_mpi import codec, placement, streams
from feddip_mpi.codec import Message, Upload
from feddip_mpi.errors import FeddipError, NumericalError, RankLost
from feddip_mpi.exchange import Exchange, Phase, Task, untimed
from feddip_mpi.federation import Federation
from feddip_mpi.life import Life
from feddip_mpi.methods.base import Opening
from feddip_mpi.support import Support


@dataclass(frozen=True)
class Opened:
    """What the method's opening took: the bytes of all its clients' uploads, update bytes that this rank sent and received."""

    uploaded: int
    sent: int
    received: int


def shares(samples: Sequence[int], clients: Sequence[int]) -> dict[int, float]:
    """p_k: each client's share of their training images."""
    total = sum(samples[client] for client in clients)
    return {client: samples[client] / total for client in clients}


def encoded(
    vectors: Mapping[int, Sequence[Tensor]], rules: Sequence[Upload], support: Support, round: int, seed: int
) -> tuple[list[list[Message]], dict[int, int]]:
    """This rank's extra vectors as messages.

    Args:
        vectors: float32 [P] each, by client in ascending order; used up.
        rules: how each of a client's vectors is encoded.
        support: of the round's mask.
        round, seed: name the random streams.

    Returns:
        The messages of each vector, clients in order, and the bytes of each client.
    """
    messages: list[list[Message]] = [[] for _ in rules]
    counted = {}
    for client, own in vectors.items():
        generator = streams.stream(seed, "rounding of extras", round, client)
        coded = [
            list(codec.encode(vector, support, rule, round, client, generator))
            for vector, rule in zip(own, rules, strict=True)
        ]
        for all_of_it, part in zip(messages, coded, strict=True):
            all_of_it += part
        counted[client] = sum(message.framed()[1].total for part in coded for message in part)
    return messages, counted


def summed(
    federation: Federation,
    messages: Sequence[Sequence[Message]],
    rules: Sequence[Upload],
    support: Support,
    round: int,
    placed: Mapping[int, int],
    phase: Phase = untimed,
    updates: str = "allgatherv",
) -> list[Tensor]:
    """sum_k p_k x_k [P] of each extra vector, on every rank; `messages` are this rank's (see `encoded`).

    `updates`: how those of the round travel.
    """
    weights = shares(federation.samples, list(placed))
    sums = []
    for rule, own in zip(rules, messages, strict=True):
        task = _task(updates, support, support.size, rule, round, placed, weights)
        exchange = Exchange(federation.comm, task, phase=phase)
        for message in own:
            exchange.post(message)
        exchange.close()
        total = torch.zeros(support.size, device=support.mask.device)
        exchange.finish().aggregate.add_to(total)
        sums.append(total)
    return sums


def _task(
    updates: str, support: Support, size: int, rule: Upload, round: int, placed: Mapping[int, int],
    weights: Mapping[int, float],
) -> Task:  # fmt: skip
    mode = "sharded" if updates == "sharded" else "allgatherv"
    return Task(mode, False, round, support, size, rule, placed, weights)


def opening(federation: Federation, holders: Sequence[int], life: Life) -> tuple[list[Tensor], Opened | None]:
    """What the method's clients measure before the first round, added up: a vector for each size that it asks for.

    An error on one rank ends the opening on all; `life.stopped` is asked before each client, `life.give_up` before each batch.
    """
    config, comm, asked = federation.config, federation.comm, federation.method.opening()
    if asked is None:
        return [], None
    before = comm.sent["update"], comm.received["update"]
    weights = shares(federation.samples, asked.clients)
    sums = [torch.zeros(size, device=federation.device) for size in asked.sizes]
    support = Support.of(torch.ones(federation.layout.prunable, dtype=torch.bool, device=federation.device))
    uploaded = 0
    # As many at a time as take part in a round: no rank ever has more messages in its memory.
    for first in range(0, len(asked.clients), config.participants):
        clients = asked.clients[first : first + config.participants]
        placed = placement.assign(clients, federation.samples, holders, comm.size)
        exchanges = [
            Exchange(comm, _task(config.exchange, support, size, Upload(), 0, placed, weights)) for size in asked.sizes
        ]
        error: FeddipError | None = None
        try:
            for client in clients:
                if placed[client] == comm.rank:
                    life.enter("opening", 0)
                    if (error := life.stopped()) is not None:
                        break
                    uploaded += _measure(federation, asked, support, exchanges, client, life.give_up)
        except RankLost:
            raise
        except FeddipError as caught:
            error = caught
        life.enter("wait", 0)
        comm.check(error)
        for exchange, total in zip(exchanges, sums, strict=True):
            exchange.close()
            exchange.finish().aggregate.add_to(total)
    sent, received = comm.sent["update"] - before[0], comm.received["update"] - before[1]
    # Everybody knows of all uploads: a rank may die before the first round tells of them.
    everybodys = int(comm.total(np.array([uploaded], np.float64))[0])
    return sums, Opened(everybodys, sent, received)


def _measure(
    federation: Federation,
    asked: Opening,
    support: Support,
    exchanges: Sequence[Exchange],
    client: int,
    give_up: Callable[[], bool],
) -> int:
    """One client's part of the opening; returns the bytes of its frames."""
    samples, counted = federation.partition.train[client], 0
    vectors = asked.measure(federation.trainer, federation.initial, samples, client, give_up)
    for vector, exchange in zip(vectors, exchanges, strict=True):
        if not bool(torch.isfinite(vector).all()):
            raise NumericalError(
                f"client {client} (rank {federation.comm.rank}) found values that are not finite before the first round; "
                "start a new run with a lower learning_rate"
            )
        generator = streams.stream(federation.config.seed, "rounding", 0, client)
        for message in codec.encode(vector, support, Upload(), 0, client, generator):
            counted += exchange.post(message).total
    return counted
