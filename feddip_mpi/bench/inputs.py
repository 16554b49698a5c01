"""What the benchmark's clients have to send: updates, residuals and masks from streams, the same for any ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from feddip_mpi import masks, models, streams
from feddip_mpi.bench.options import Options
from feddip_mpi.errors import InputError
from feddip_mpi.residuals import Residual
from feddip_mpi.support import Support
from feddip_mpi.vector import Layout

_GREY_28 = (1, (28, 28), 10)
_COLOUR_32 = (3, (32, 32), 10)
# Vectors of n float32 that a client needs (update, residual, its working copy), and a rank besides: what it adds the
# result to, the dense Allreduce's two, random numbers or the sum of slices being made.
_A_CLIENT, _A_RANK = 3, 5


@dataclass(frozen=True)
class Inputs:
    """A rank's part of the benchmark's data.

    Attributes:
        size, prunable: n and P.
        placed: the rank of every client.
        shares: p_k by client; not all equal, as in a federation.
        updates: float32 [n] by client of this rank.
        residuals: by client of this rank.
    """

    size: int
    prunable: int
    placed: dict[int, int]
    shares: dict[int, float]
    updates: dict[int, Tensor]
    residuals: dict[int, Residual]


def counts(options: Options) -> tuple[int, int]:
    """(n, P). Raises InputError for a model that cannot be built."""
    if options.model is None:
        return options.weights, options.weights
    channels, image, classes = _GREY_28 if options.model == "lenet5" else _COLOUR_32
    model = models.create(options.model, channels, image, classes)
    layout = Layout.of(model, models.prunable_names(model))
    return layout.size, layout.prunable


def needed_bytes(size: int, clients: int) -> int:
    """Memory of one rank, roughly."""
    return 4 * size * (_A_CLIENT * clients + _A_RANK)


def require_memory(size: int, clients: int, ranks: int, available: int) -> None:
    """Raise InputError where the ranks of a node would need more memory than it has left."""
    needed = needed_bytes(size, clients) * ranks
    if needed > available:
        raise InputError(
            f"{size} weights and {clients} client(s) a rank need about {needed / 1e9:.1f} GB on a node with {ranks} "
            f"rank(s), {available / 1e9:.1f} GB are free; take a smaller --size or --model, or fewer --clients"
        )


def make(options: Options, size: int, prunable: int, rank: int, ranks: int) -> Inputs:
    """The data of one rank."""
    clients = range(options.clients * ranks)
    samples = [100 + client % 7 for client in clients]
    own = clients[rank * options.clients : (rank + 1) * options.clients]
    return Inputs(
        size=size,
        prunable=prunable,
        placed={client: client // options.clients for client in clients},
        shares={client: samples[client] / sum(samples) for client in clients},
        updates={client: _heavy_tailed(options.seed, "bench update", client, size) for client in own},
        residuals={
            client: Residual(_heavy_tailed(options.seed, "bench residual", client, prunable), -1) for client in own
        },
    )


def support(options: Options, prunable: int, sparsity: float) -> Support:
    """A mask of this sparsity at random: no two kept weights are neighbours for a reason, which is the hardest case."""
    drawn = streams.stream(options.seed, "bench mask").random(prunable, dtype=np.float32)
    return Support.of(masks.select_largest(torch.from_numpy(drawn), masks.kept_count(prunable, sparsity)))


def _heavy_tailed(seed: int, purpose: str, client: int, size: int) -> Tensor:
    """Normal numbers times their magnitudes (kurtosis 11.7): most are small, a few large, as updates are."""
    drawn = torch.from_numpy(streams.stream(seed, purpose, 0, client).standard_normal(size, dtype=np.float32))
    return drawn.mul_(drawn.abs()).mul_(1e-3)
