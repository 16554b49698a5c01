"""What the doctor tries out together with all ranks: clocks, locks, the first mask; and what a configuration needs.

Every rank calls each of these that takes a communicator.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from feddip_mpi import codec, data, federation, masks, methods
from feddip_mpi.collectives import Communicator
from feddip_mpi.errors import FeddipError
from feddip_mpi.models import work
from feddip_mpi.settings import Config
from feddip_mpi.vector import flatten

Json = dict[str, Any]

_PINGS = 8
_CHILD_SECONDS = 60
_GRANTED, _REFUSED, _UNSUPPORTED = 10, 11, 12  # exit codes of the child, none of them Python's own
_CHILD = f"""\
import fcntl, sys
with open(sys.argv[1], "r+") as file:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit({_REFUSED})
    except OSError:
        sys.exit({_UNSUPPORTED})
sys.exit({_GRANTED})
"""

# Vectors of the model's size that a rank has at its peak, besides one for each of its participants, fitted to AlexNet:
# 2.0 GB measured with 1 client on 1 rank, 3.0 GB with 8, 2.2 GB with 4 (docs/results/scaling.md).
_VECTORS = 12
_AT_ONCE = 5  # of a further client that trains at once: network, weights, gradient twice, workspace of the layers
# What a step keeps, and the gradients of it. With the data ResNet-18 (batches of 128) is told to take 2.2 GB, measured 2.3;
# LeNet-5 on Fashion-MNIST 0.45, measured 0.41 (one rank, CPU, torch 2.13).
_OF_A_STEP = 2
_OF_A_LAYER = 3  # in an evaluation, which keeps nothing: what a layer takes, what it gives, and one between them
_LABEL_BYTES = 8
_PROGRAM_BYTES = 300 * 10**6  # Python, torch and MPI before there is a model


def clocks(comm: Communicator) -> list[Json]:
    """Offset of every rank's clock to rank 0's in seconds, and its error bound; the same list on every rank."""
    sent, read, received = [], [], []
    for _ in range(_PINGS):
        sent.append(float(comm.broadcast(time.time())))  # rank 0's
        # Read after rank 0 has sent and before it receives: both ends of the interval are rank 0's time.
        read.append(comm.gather(np.array([time.time()]))[:, 0])
        received.append(float(comm.broadcast(time.time())))
    return offsets(np.array(sent), np.array(read), np.array(received))


def offsets(sent: np.ndarray, read: np.ndarray, received: np.ndarray) -> list[Json]:
    """Clock offsets from pings; of each rank the ping counts that left least room. Pure.

    Args:
        sent, received: float64 [pings], seconds of rank 0's clock before and after.
        read: float64 [pings, ranks], what each rank's clock said in between.
    """
    best = int((received - sent).argmin())
    middle, bound = (sent[best] + received[best]) / 2, (received[best] - sent[best]) / 2
    return [
        {"offset_seconds": float(clock - middle) if rank else 0.0, "bound_seconds": float(bound) if rank else 0.0}
        for rank, clock in enumerate(read[best])
    ]


def lock(comm: Communicator, folder: Path) -> str | None:
    """Whether a lock that rank 0 holds in `folder` keeps others out, seen from here.

    A child of rank 0 tries on its own node, and the first rank of every other host from there.

    Returns:
        "works", "granted" (it does not keep others out), why there are no locks, or None: not tried here, or the folder
        is not seen from here.
    """
    hosts = comm.gather_json(comm.host())
    with _held(folder if comm.rank == 0 else None) as (path, reason):
        path, reason = comm.broadcast([path, reason])
        result = None
        if comm.rank == 0:
            result = reason or (_seen_by_child(path) if path else None)
        elif path and hosts.index(comm.host()) == comm.rank:
            result = _seen_from(path)
        comm.barrier()  # rank 0 holds it until all have tried
    return result


@contextmanager
def _held(folder: Path | None) -> Iterator[tuple[str | None, str | None]]:
    """A locked file in a folder (or the parent of it that exists): its path, or why there is none."""
    if folder is None:
        yield None, None
        return
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    path = existing / f".feddip-doctor-{os.getpid()}.lock"
    try:
        file = open(path, "x", encoding="utf-8")  # noqa: SIM115  (closed below)
    except OSError:  # that nobody may write there is found out elsewhere
        yield None, None
        return
    reason = None
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            reason = f"{type(error).__name__}: {error}"
        yield str(path), reason
    finally:
        file.close()
        with contextlib.suppress(OSError):
            path.unlink()


def _seen_by_child(path: str) -> str | None:
    try:
        done = subprocess.run([sys.executable, "-c", _CHILD, path], check=False, timeout=_CHILD_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return {_REFUSED: "works", _GRANTED: "granted", _UNSUPPORTED: "no locks for a second process"}.get(done.returncode)


def _seen_from(path: str) -> str | None:
    """The same from this process, which is not the one that holds it."""
    try:
        with open(path, "r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "works"
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return "granted"


def mask(settings: Config) -> Json:
    """The initial weights and first mask as this rank makes them, and what training with them takes.

    Where the clients' gradients would decide (snip, ssfl, prunefl) a magnitude mask stands in for theirs.

    Returns:
        "digest" (CRC-32, hexadecimal), "size" (n), "prunable" (P), "data_bytes" (images and labels), "kept_bytes" and
        "largest_bytes" (see `work.kept_bytes`), "payload_bytes" (one client's upload while the mask is the first, or all of its
        weights), and "error" where the model cannot be made.
    """
    try:
        shape, classes, images = data.outline_of(settings.data, settings.seed)
        module, layout = federation.build_model(settings, shape, classes)
        weights = flatten(module, layout)
        method = methods.make(settings, module, layout, shape)
        if method.opening() is None:
            weights, made = method.start(weights, [])
        else:
            made = method.first_mask("magnitude", weights[: layout.prunable], [])
        first = masks.digest(made)
    except FeddipError as error:
        names = ("size", "prunable", "data_bytes", "kept_bytes", "largest_bytes", "payload_bytes")
        nothing = dict.fromkeys(names, 0)
        return {"digest": None, "error": str(error), **nothing}
    digest = zlib.crc32(weights.numpy().view(np.uint8).data, first)
    kept, largest = work.kept_bytes(module, shape)
    upload = codec.Upload(settings.upload.values, dense=settings.upload.mode != "masked")
    return {
        "digest": f"{digest:08x}",
        "error": None,
        "size": layout.size,
        "prunable": layout.prunable,
        "data_bytes": images * (math.prod(shape) + _LABEL_BYTES),
        "kept_bytes": kept,
        "largest_bytes": largest,
        "payload_bytes": round(codec.expected_bytes(upload, int(made.sum()), layout.prunable, layout.size)),
    }


def needs(settings: Config, made: Json, ranks: int, on_gpu: bool) -> Json:
    """Bytes that a run takes, roughly: memory of the busiest rank, and of a node for the data; disk for checkpoints. Pure.

    Memory is the host's.

    Args:
        made: see `mask`.
        ranks: the clients' residuals are spread over.
        on_gpu: whether every rank has one, in whose memory the activations are.
    """
    size, prunable, upload = made["size"], made["prunable"], settings.upload
    residual = 0 if upload.residual == "drop" else (2 if upload.residual_values == "bf16" else 4) * prunable
    held, trained = -(-settings.clients // ranks), -(-settings.participants // ranks)
    at_once = min(settings.clients_at_once, trained)
    vectors = _VECTORS + trained + _AT_ONCE * (at_once - 1)
    in_memory = min(held * residual, upload.residual_memory * 2**20)  # the others lie in a file
    training = _OF_A_STEP * at_once * settings.batch_size * made["kept_bytes"]
    evaluation = _OF_A_LAYER * settings.eval.batch_size * made["largest_bytes"]
    activations = 0 if on_gpu else max(training, evaluation)
    # Every rank has the payloads of all others at once, but for the modes that give it a slice or a sum.
    foreign = settings.participants - trained if settings.exchange in ("allgatherv", "node") else 0
    checkpoint = 4 * size + prunable // 8 + settings.clients * residual
    files = settings.checkpoint.keep + settings.checkpoint.best + 1  # the newest is written before the oldest goes
    return {
        "memory_bytes": _PROGRAM_BYTES + 4 * size * vectors + in_memory + activations + foreign * made["payload_bytes"],
        "data_bytes": 2 * made["data_bytes"],  # as a node's first rank reads them, and as its ranks share them
        "one_checkpoint_bytes": 4 * size + prunable // 8,
        "disk_bytes": checkpoint * min(files, settings.rounds),
    }
