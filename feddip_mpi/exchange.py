"""The round's one large exchange: from each client's messages to their weighted sum on every rank.

Four ways, chosen by `exchange` in the configuration. For one codec the first three give the same bits on any number
of ranks, because each decodes the same values and adds them up in client order:

- allgatherv: every rank gets every payload and adds up everything. Bytes a rank grow with the participants.
- sharded: each rank owns a slice of the coordinates, gets the clients' parts of that slice, adds them up and hands
  the sum on. Bytes a rank do not grow with the ranks: about two payloads each way where sums travel like values
  (`download`), more where they travel as float32.
- node: as allgatherv, but a payload enters each node once and is shared there in memory.
- dense: each rank adds up its own clients, then a plain float32 Allreduce. The yardstick; its bits depend on the
  number of ranks.

With `overlap` each message but the last travels while the next is made: in-mask values while the off-mask ones are
searched, one client's payload while the next client trains.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from feddip_mpi import codec, placement, values
from feddip_mpi.aggregate import Aggregate, Sum, joined
from feddip_mpi.codec import AGGREGATE, REGROW, SUPPORT, Bytes, Message, Piece
from feddip_mpi.collectives import Communicator
from feddip_mpi.errors import PeerError
from feddip_mpi.support import Support

# Slices end at multiples of this many kept weights, so that no block of quantised values is shared by two owners.
_GRANULE = max(values.BLOCK.values())

Phase = Callable[[str], AbstractContextManager[None]]


def untimed(name: str) -> AbstractContextManager[None]:
    """A phase that nobody times."""
    return nullcontext()


@dataclass(frozen=True)
class Task:
    """What all ranks know of a round's exchange before it begins.

    Attributes:
        mode: "allgatherv", "sharded", "node" or "dense".
        overlap: messages travel while the next ones are made.
        round: t.
        support: of the server's mask.
        size: n.
        upload: how clients encode.
        placed: the rank of each participant, by client in ascending order.
        shares: p_k by client.
        support_shares: the weights of the support's values where they differ (EF21), by client.
        start: float32 [P], what the support's sums begin with (EF21); None for zeros.
        download: value type in which `sharded` hands the sums of in-mask weights on.
    """

    mode: str
    overlap: bool
    round: int
    support: Support
    size: int
    upload: codec.Upload
    placed: Mapping[int, int]
    shares: Mapping[int, float]
    support_shares: Mapping[int, float] | None = None
    start: Tensor | None = None
    download: str = "fp32"

    @property
    def carried(self) -> Support:
        """The coordinates that travel without indices."""
        return self.support.whole() if self.upload.dense else self.support


@dataclass(frozen=True)
class Outcome:
    """What an exchange leaves on every rank.

    Attributes:
        aggregate: sum_k p_k q_k; the same on every rank.
        download: bytes of the sums that this rank handed on, by kind.
        owed: float32 [carried.count], what the owner of each coordinate kept back when it handed the sum on (zero
            for the others' coordinates); None where everything was handed on exactly.
    """

    aggregate: Aggregate
    download: Bytes
    owed: Tensor | None


class Exchange:
    """One round's exchange. Every rank calls `post` for each message of its clients, then `close` and `finish`.

    Attributes:
        transfer_seconds: how long messages were under way; with `overlap` most of it behind other work.
        received: bytes of the frames of other ranks that were read here, by kind.
    """

    def __init__(self, comm: Communicator, task: Task, owed: Tensor | None = None, phase: Phase = untimed) -> None:
        """Begin.

        Args:
            comm: all ranks.
            task: the same on all ranks.
            owed: see Outcome, of the round before with the same support.
            phase: times "exchange" and "decode".
        """
        self._comm, self._task, self._owed, self._phase = comm, task, owed, phase
        self._overlap = task.overlap and task.mode != "dense" and comm.open_background()
        if task.mode == "node":
            comm.open_nodes()
        self._clients = placement.by_rank(task.placed, comm.size)
        most = max(len(own) for own in self._clients)
        kinds = len(task.upload.kinds)
        # How many messages each rank has in each wave.
        self._waves = [[int(len(own) > slot) for own in self._clients] for slot in range(most) for _ in range(kinds)]
        self._bounds = slices(task.carried, task.size, comm.size if task.mode == "sharded" else 1, task.upload.values)
        self._local = Sum(task.carried, task.size, 0, task.size) if task.mode == "dense" else None
        self.transfer_seconds = 0.0
        self.received = Bytes()
        self._waiting: list[list[np.ndarray]] = []
        self._sent: list[Future[list[np.ndarray]]] = []
        # The last wave has nothing left to hide behind: it goes without the thread, by the faster blocking call.
        self._hidden = len(self._waves) - 1

    def post(self, message: Message) -> Bytes:
        """Send a message of the next of this rank's clients; returns the bytes of its frame, uncut, by kind."""
        whole, counted = message.framed()
        if self._local is not None:
            self._add(self._local, codec.read(whole, self._task.support, self._task.size, self._task.round))
            return counted
        cuts = zip(self._bounds, self._bounds[1:], strict=False)
        self._hand_over([message.frame(lo, hi) for lo, hi in cuts] if len(self._bounds) > 2 else [whole])
        return counted

    def close(self) -> None:
        """Every rank has made what it can: send what is left, and nothing for messages that could not be made."""
        if self._local is not None:
            return
        own = sum(counts[self._comm.rank] for counts in self._waves)
        while len(self._waiting) < own:
            self._hand_over([np.zeros(0, np.uint8)] * (len(self._bounds) - 1))
        if self._overlap:
            for counts in self._waves[len(self._sent) : self._hidden]:
                self._sent.append(self._comm.post(functools.partial(self._transfer, [], counts)))

    def finish(self) -> Outcome:
        """Wait for all messages and add them up in client order. Raises PeerError where a frame is not as planned."""
        task, comm = self._task, self._comm
        if self._local is not None:
            with self._phase("exchange"):
                return Outcome(self._reduced(self._local.result()), Bytes(), None)
        with self._phase("exchange"):
            received = self._received()
        with self._phase("decode"):
            total = self._summed(received)
        if task.mode != "sharded" or (comm.size == 1 and task.download == "fp32" and self._owed is None):
            return Outcome(total.result(), Bytes(), None)
        return self._hand_on(total)

    def _summed(self, received: Mapping[int, Sequence[np.ndarray]]) -> Sum:
        """What concerns this rank of all participants' frames, in client order."""
        task = self._task
        lo, hi = self._bounds[self._comm.rank :][:2] if task.mode == "sharded" else (0, task.size)
        total = Sum(task.carried, task.size, lo, hi, task.start)
        for client, frames in received.items():
            for kind, frame in zip(task.upload.kinds, frames, strict=True):
                piece = self._read(frame, f"from rank {task.placed[client]}, client {client}")
                if (piece.client, piece.kind, piece.lo, piece.hi, piece.dense) != (client, kind, lo, hi, self._dense):
                    raise PeerError(
                        f"round {task.round + 1}: a frame of client {piece.client} (kind {piece.kind}, coordinates "
                        f"{piece.lo} to {piece.hi}) in place of client {client}'s (kind {kind}, {lo} to {hi})"
                    )
                self._add(total, piece)
                if task.placed[client] != self._comm.rank:
                    self.received += piece.bytes
        return total

    def _read(self, frame: np.ndarray, source: str) -> Piece:
        """`codec.read`, whose errors say where the frame should have come from: a damaged header does not know."""
        try:
            return codec.read(frame, self._task.support, self._task.size, self._task.round)
        except PeerError as error:
            raise PeerError(f"{source}: {error}") from None

    def drain(self) -> None:
        """Wait for messages under way, whatever became of them; after an error, and before anything else is sent."""
        for sent in self._sent:
            sent.exception()

    @property
    def _dense(self) -> bool:
        return self._task.upload.dense

    def _add(self, total: Sum, piece: Piece) -> None:
        own = self._task.support_shares
        share = self._task.shares[piece.client]
        # A REGROW frame has no support's values: the weight given for them does not matter.
        total.add(share, piece, None if own is None else own[piece.client])

    def _hand_over(self, frames: list[np.ndarray]) -> None:
        self._waiting.append(frames)
        if not self._overlap or len(self._sent) == self._hidden:
            return
        # Ranks with fewer clients take part in the later waves with nothing; see close.
        counts = self._waves[len(self._sent)]
        self._sent.append(self._comm.post(functools.partial(self._transfer, [frames], counts)))

    def _transfer(self, own: Sequence[Sequence[np.ndarray]], counts: Sequence[int]) -> list[np.ndarray]:
        """Messages of this rank (each cut for the owners of its slices) to whoever needs them."""
        started = time.perf_counter()
        try:
            if self._task.mode == "sharded":
                return self._comm.alltoallv(own, counts)
            whole = [parts[0] for parts in own]
            return (self._comm.node_allgatherv if self._task.mode == "node" else self._comm.allgatherv)(whole, counts)
        finally:
            self.transfer_seconds += time.perf_counter() - started

    def _received(self) -> dict[int, list[np.ndarray]]:
        """The frames of each participant, in client order."""
        kinds = len(self._task.upload.kinds)
        frames: dict[int, list[np.ndarray]] = {client: [] for client in self._task.placed}
        if self._overlap:
            arrived = [sent.result() for sent in self._sent]
            mine = self._waves[-1][self._comm.rank]
            arrived.append(self._transfer(self._waiting[len(self._waiting) - mine :], self._waves[-1]))
            for wave, payloads in enumerate(arrived):
                senders = [own[wave // kinds] for own in self._clients if len(own) > wave // kinds]
                for client, frame in zip(senders, payloads, strict=True):
                    frames[client].append(frame)
            return frames
        gathered = iter(self._transfer(self._waiting, [kinds * len(own) for own in self._clients]))
        for own in self._clients:
            for client in own:
                frames[client] = [next(gathered) for _ in range(kinds)]
        return frames

    def _hand_on(self, total: Sum) -> Outcome:
        """The sum of this rank's slice to all others, and theirs."""
        task, comm = self._task, self._comm
        with self._phase("decode"):
            frames, owed = framed_sum(task, total, self._owed)
        with self._phase("exchange"):
            gathered = comm.allgatherv(frames, [len(frames)] * comm.size)
        with self._phase("decode"):
            owners = (place // len(frames) for place in range(len(gathered)))
            pieces = [self._read(frame, f"from rank {owner}") for owner, frame in zip(owners, gathered, strict=True)]
            aggregate = self._assembled(pieces, len(frames))
        mine = slice(comm.rank * len(frames), (comm.rank + 1) * len(frames))
        own_bytes = sum((piece.bytes for piece in pieces[mine]), Bytes())
        self.received += sum((piece.bytes for piece in pieces[: mine.start] + pieces[mine.stop :]), Bytes())
        return Outcome(aggregate, own_bytes, owed)

    def _assembled(self, pieces: Sequence[Piece], kinds: int) -> Aggregate:
        """The whole sum from all owners' frames, in the order of their slices."""
        parts = []
        for owner, (lo, hi) in enumerate(zip(self._bounds, self._bounds[1:], strict=False)):
            support, *regrow = pieces[owner * kinds : (owner + 1) * kinds]
            for kind, piece in enumerate((support, *regrow)):
                if (piece.client, piece.kind, piece.lo, piece.hi) != (AGGREGATE, kind, lo, hi):
                    raise PeerError(
                        f"round {self._task.round + 1}: rank {owner} handed on the coordinates {piece.lo} to {piece.hi} "
                        f"instead of {lo} to {hi}"
                    )
            outside = regrow[0] if regrow else None
            parts.append(
                Aggregate(
                    self._task.carried,
                    support.values,
                    outside.indices if outside else support.indices,
                    outside.values if outside else support.values[:0],
                    support.other,
                )
            )
        return joined(parts)

    def _reduced(self, own: Aggregate) -> Aggregate:
        """All ranks' sums added up by MPI: packed where only the support has travelled, else the whole vector."""
        task, device = self._task, own.packed.device
        outside = torch.zeros(task.support.size if REGROW in task.upload.kinds else 0, device=device)
        outside[own.indices] = own.sums
        sent = torch.cat([own.packed, own.other, outside])
        packed, other, outside = torch.from_numpy(self._comm.allreduce(sent.cpu().numpy())).to(device).split(
            [own.packed.numel(), own.other.numel(), outside.numel()]
        )  # fmt: skip
        if task.start is not None:
            packed = task.carried.take(task.start) + packed
        indices = outside.nonzero().squeeze(1)
        return Aggregate(own.support, packed, indices, outside[indices], other)


def framed_sum(task: Task, total: Sum, owed: Tensor | None) -> tuple[list[np.ndarray], Tensor | None]:
    """The sum of a slice as frames, and what is owed from now on (see Outcome); `owed`: what was until now."""
    part, carried = total.result(), task.carried
    generator = np.random.default_rng(0)  # codes of a sum are rounded to the nearest: nothing is drawn
    packed = part.packed
    own = slice(total.first, total.first + packed.numel())
    if owed is not None:
        packed = packed + owed[own]
    coded = values.code(packed, task.download, False, generator)
    left = None
    if task.download != "fp32":
        left = torch.zeros(carried.count, device=packed.device)
        left[own] = packed - coded.restored()
    exact = values.code(part.sums, "fp32", False, generator)
    head = (task.round, AGGREGATE, carried, task.size)
    compress, dense = task.upload.compress, task.upload.dense
    messages = [Message(SUPPORT, *head, coded, total.lo, part.indices[:0], part.other, dense, compress)]
    if REGROW in task.upload.kinds:
        messages.append(Message(REGROW, *head, exact, 0, part.indices, part.other[:0], False, compress))
    return [message.frame(total.lo, total.hi) for message in messages], left


def own_part(owed: Tensor, support: Support, size: int, ranks: int, rank: int, kind: str) -> Tensor:
    """What this rank owes of float32 [kept weights], zero elsewhere: see Outcome; the rest is as in `slices`."""
    lo, hi = (support.rank(bound) for bound in slices(support, size, ranks, kind)[rank : rank + 2])
    own = torch.zeros_like(owed)
    own[lo:hi] = owed[lo:hi]
    return own


def slices(support: Support, size: int, ranks: int, kind: str) -> list[int]:
    """Where each rank's slice of the coordinates begins, and n: [ranks + 1], ascending; about equal bytes each.

    Args:
        support: whose kept weights travel as `kind`; what follows the prunable weights travels as float32.
        size: n.
        ranks: P.
        kind: value type.
    """
    a_value = values.bytes_per_value(kind)
    kept = support.count * a_value
    everything = kept + 4 * (size - support.size)
    bounds = [0]
    for rank in range(1, ranks):
        cost = everything * rank / ranks
        if cost < kept:
            bound = support.coordinate(round(cost / a_value / _GRANULE) * _GRANULE)
        else:
            bound = support.size + round((cost - kept) / 4)
        bounds.append(max(bounds[-1], bound))
    return [*bounds, size]
