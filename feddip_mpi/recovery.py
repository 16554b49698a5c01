"""After the death of a rank: what the survivors take over, and what is lost. `session` decides whether they go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from feddip_mpi import checkpoint
from feddip_mpi.collectives import Communicator
from feddip_mpi.exchange import own_part
from feddip_mpi.federation import Federation
from feddip_mpi.metrics import Record
from feddip_mpi.residual_store import ResidualStore
from feddip_mpi.residuals import Residual
from feddip_mpi.rounds import State

# In place of a holder that has died.
NOBODY = -1
# So many residuals of all clients travel one after the other before all ranks meet.
_STEP = 16


@dataclass(frozen=True)
class Losses:
    """What died with its rank and is in no checkpoint.

    Attributes:
        residuals: by client the round, counted from 1, in which it left the residual that is lost.
        owed: whether a part of the server's feedback is lost: that of the dead ranks' slices (`download.values`).
    """

    residuals: dict[int, int]
    owed: bool

    def __str__(self) -> str:
        clients = ", ".join(f"client {client} (round {round})" for client, round in self.residuals.items())
        owed = "; what the dead ranks had rounded off the sums" if self.owed else ""
        return f"residuals lost: {clients or 'none'}{owed}"


def renumber(holders: Sequence[int], survivors: Sequence[int]) -> list[int]:
    """Holders after a `shrink`, NOBODY for the dead; `survivors`: what it returned."""
    now = {before: rank for rank, before in enumerate(survivors)}
    return [now.get(holder, NOBODY) for holder in holders]


def newer_than(done: int, history: Sequence[Record], clients: Sequence[int]) -> dict[int, int]:
    """The round, counted from 1, in which each of `clients` left its newest residual, if that is after round `done`."""
    found: dict[int, int] = {}
    asked = set(clients)
    for record in history:
        if record["round"] > done and record["residual_norm"]:
            found.update(dict.fromkeys(set(record["participants"]) & asked, record["round"]))
    return dict(sorted(found.items()))


def take_over(
    built: Federation,
    state: State,
    history: Sequence[Record],
    saved: tuple[int, Path] | None,
    progress: Callable[[], None] = lambda: None,
) -> tuple[State, Losses] | None:
    """The state after the last complete round on the ranks that are left. `state` itself does not change.

    Args:
        built: of the survivors.
        state: `holders` is renumbered.
        history: the same on all ranks.
        saved: round and path of the newest checkpoint that verifies; on rank 0 only.
        progress: see `hand_out`.

    Returns:
        The new state and what it lacks; None where the survivors cannot go on from here: they are not at the same
        round, or the server's sum counts on references that are lost (`upload.residual: ef21`).

    Raises:
        RankLost: another rank died.
    """
    comm = built.comm
    if len(set(comm.gather(np.array([float(state.server.round)]))[:, 0])) > 1:
        return None
    orphans = [client for client, holder in enumerate(state.holders) if holder == NOBODY]
    done = int(comm.broadcast(saved[0] if saved else 0))
    policy = built.config.upload.residual
    lost = newer_than(done, history, orphans) if policy != "drop" else {}
    if policy == "ef21" and lost:
        return None
    holders = [client % comm.size if holder == NOBODY else holder for client, holder in enumerate(state.holders)]
    held = state.held.copy()
    _from_checkpoint(comm, orphans, holders, saved[1] if saved else None, held, progress)
    count = state.residuals_lost + len(lost)
    # Ranks have other numbers now: their speeds are measured again.
    after = replace(state, held=held, holders=holders, owed=_owed(built, state), residuals_lost=count, speeds=None)
    comm.commit()
    return after, Losses(lost, state.owed is not None)


def _from_checkpoint(
    comm: Communicator, orphans: Sequence[int], holders: Sequence[int], path: Path | None, held: ResidualStore,
    progress: Callable[[], None],
) -> None:  # fmt: skip
    """Add to `held` the orphans' residuals as they were saved, those for this rank; the others begin with none."""
    lost = set(orphans)
    stored = [pair for pair in checkpoint.residual_rounds(path).items() if pair[0] in lost] if path else []
    left = dict(comm.broadcast(stored))
    wanted = (pair for pair in checkpoint.read_residuals(path) if pair[0] in left) if path else None
    hand_out(comm, left, holders, wanted, held, progress)


def _owed(built: Federation, state: State) -> torch.Tensor | None:
    """What this rank owes, now that the slices are cut anew; nothing is known of the dead ranks' slices."""
    if state.owed is None:
        return None
    comm, support, kind = built.comm, state.server.support, built.config.upload.values
    # Zero on all ranks but the owner's: this sum is exact.
    owed = torch.from_numpy(comm.allreduce(state.owed.cpu().numpy())).to(built.device)
    return own_part(owed, support, built.layout.size, comm.size, comm.rank, kind)


def hand_out(
    comm: Communicator,
    left: Mapping[int, int],
    holders: Sequence[int],
    stored: Iterator[tuple[int, Residual]] | None,
    held: ResidualStore,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Stored residuals to their holders, one at a time: rank 0 never has two of them in memory for others.

    Args:
        left: the round in which each client that has one left it, clients in ascending order.
        holders: the rank of every client.
        stored: them, on rank 0.
        held: takes those that are for this rank.
        progress: told on every rank now and then.
    """
    for turn, (client, round) in enumerate(left.items()):
        residual = next(stored)[1] if stored else None
        # The values as they lie, without a copy: their round is known.
        arrived = comm.move([(client, 0, holders[client])], lambda _, r=residual: r.values.numpy().view(np.uint8))  # type: ignore[misc]
        mine = residual if holders[client] == comm.rank == 0 else None
        if client in arrived:
            mine = Residual(torch.from_numpy(arrived[client].view(np.float32)), round)
        if mine is not None:
            held[client] = mine
        del residual, mine, arrived  # before the next one is read
        keep_step(comm, turn, progress)


def keep_step(comm: Communicator, turn: int, progress: Callable[[], None]) -> None:
    """Meet all ranks now and then while residuals travel between rank 0 and their holders, and tell that they do.

    Of 100,000 clients that takes hours where a residual has 100 MB. A rank that has none left would wait for the others at the
    end, and its watchdog would take that for a hang.

    Args:
        turn: counts the residuals of all clients, the same on every rank.
        progress: is told after each meeting.
    """
    if turn % _STEP == _STEP - 1:
        comm.barrier()
        progress()
