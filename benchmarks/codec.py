"""Encoding and decoding an update: seconds on one core, bytes, and what an entropy coder would save.

    python benchmarks/codec.py [--size 23272266] [--out docs/results/codec.json]

A client's update at sparsity 0.95 with its residual, heavy-tailed as updates are (Student's t, 4 degrees of freedom);
the mask keeps the largest weights of such a vector. Timed: recall of the residual, all messages with their frames, the
new residual; reading the frames and adding them up. Medians; nothing here touches MPI.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from feddip_mpi import codec, masks, residuals, runtime, values
from feddip_mpi.aggregate import Sum
from feddip_mpi.codec import SUPPORT, Message, Upload
from feddip_mpi.settings import UploadConfig
from feddip_mpi.support import Support

OTHER = 9354  # what AlexNet has besides its prunable weights
KEEP = UploadConfig()


def heavy_tailed(size: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(4, size).astype(np.float32)) * 1e-3


def medians(names: list[str], runs: Iterator[dict[str, float]]) -> dict[str, float]:
    found = list(runs)
    return {name: round(statistics.median(run[name] for run in found), 2) for name in names}


def once(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return 1e3 * (time.perf_counter() - started), result


def case(size: int, support: Support, upload: Upload, repeats: int) -> dict[str, Any]:
    update, old = heavy_tailed(size, 1), residuals.Residual(heavy_tailed(support.size, 2) * 0.3, 0)
    buffer = update.clone()

    def encode() -> tuple[list[np.ndarray], list[Message]]:
        residuals.recall(buffer, old, KEEP, support, 1)
        messages, frames = [], []
        for message in codec.encode(buffer, support, upload, 1, 0, np.random.default_rng(0)):
            messages.append(message)
            frames.append(message.frame())
        sent = next(m.coded.restored() for m in messages if m.kind == SUPPORT)
        residuals.remember(buffer[: support.size], sent, old, KEEP, support, 1)
        return frames, messages

    def decode(frames: list[np.ndarray]) -> Sum:
        total = Sum(support, size, 0, size)
        for frame in frames:
            total.add(0.25, codec.read(frame, support, size, 1))
        return total

    def run() -> Iterator[dict[str, float]]:
        for _ in range(repeats):
            buffer.copy_(update)
            spent, (frames, _) = once(encode)
            yield {"encode_ms": spent, "decode_ms": once(lambda frames=frames: decode(frames))[0]}  # type: ignore[misc]

    timed = medians(["encode_ms", "decode_ms"], run())
    buffer.copy_(update)
    frames, messages = encode()
    kinds = [message.framed()[1] for message in messages]
    return {
        **timed,
        "bytes": sum(frame.size for frame in frames),
        "values_bytes": sum(k.values for k in kinds),
        "indices_bytes": sum(k.indices for k in kinds),
        "dense_bytes": 4 * size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=23_272_266)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    prunable = options.size - OTHER
    support = Support.of(masks.select_largest(heavy_tailed(prunable, 0).abs(), masks.kept_count(prunable, 0.95)))
    rows = []
    for kind in values.KINDS:
        for share in (0.0, 0.02, 0.2):
            for compress in (False, True):
                upload = Upload(kind, regrow=round(share * support.count), compress=compress)
                row = {
                    "values": kind,
                    "regrow": share,
                    "zstd": compress,
                    **case(options.size, support, upload, options.repeats),
                }
                rows.append(row)
                print(row, flush=True)
    result = {
        "command": f"python benchmarks/codec.py --size {options.size} --repeats {options.repeats}",
        "sparsity": 0.95, "kept": support.count, "versions": runtime.versions(),
        "hardware": {k: v for k, v in runtime.hardware().items() if k != "host"},
        "load_average": os.getloadavg()[0], "rows": rows,
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
