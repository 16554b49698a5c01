"""Times of exact selection and of coding positions, with the coded length against its bound.

    python benchmarks/selection.py [--out docs/results/selection.json] [--repeats 11]

One thread. Every contender is timed in turn, many times; the table shows medians of the processor time, which other
jobs of a shared machine disturb least, and for selection the ratio to `masks.largest` within the same run.
numpy.partition and torch.topk are given |values|; the first yields the threshold only, "and positions" adds what it takes
to know them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from feddip_mpi import indices, masks, runtime

SIZES = (61_470, 11_000_000, 23_262_912)
SHARES = (0.001, 0.01, 0.05)


def selectors(values: Tensor, exclude: Tensor, count: int) -> dict[str, Callable[[], object]]:
    magnitude = values.abs()
    array, position = magnitude.numpy(), len(values) - count

    def by_partition() -> np.ndarray:
        return np.flatnonzero(array >= np.partition(array, position)[position])

    return {
        "masks.largest": lambda: masks.largest(values, count),
        "masks.largest, 5 % excluded": lambda: masks.largest(values, count, exclude),
        "masks.select_largest": lambda: masks.select_largest(magnitude, count),
        "numpy.partition": lambda: np.partition(array, position),
        "numpy.partition and positions": by_partition,
        "torch.topk": lambda: torch.topk(magnitude, count, sorted=False),
    }


def coders(chosen: Tensor, size: int) -> dict[str, Callable[[], object]]:
    coded = indices.pack(chosen, size)
    form = (coded.coding, coded.parameter, coded.complement, chosen.numel(), size)
    return {"pack": lambda: indices.pack(chosen, size), "unpack": lambda: indices.unpack(coded.data, *form)}


def median_ms(found: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, timed in turn after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for repeat in range(repeats + 1):
        for name, work in found.items():
            started = time.process_time()
            work()
            if repeat:
                times[name].append(1e3 * (time.process_time() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def bits_per_index(chosen: Tensor, size: int) -> dict[str, float]:
    count = chosen.numel()
    bound = (math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)) / math.log(2)
    gaps = torch.diff(chosen, prepend=torch.tensor([-1])) - 1
    varint_bytes = count + sum(int((gaps >= 1 << 7 * j).sum()) for j in range(1, 5))
    coded_bytes = indices.pack(chosen, size).data.numel()
    return {
        "bound": bound / count,
        "coded": 8 * coded_bytes / count,
        "forecast": 8 * indices.expected_bytes(size, count) / count,
        "varint": 8 * varint_bytes / count,
        "bitmap": size / count,
    }


def measure(size: int, share: float, repeats: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(size, generator=generator)
    exclude = torch.rand(size, generator=generator) < 0.05
    count = round(share * size)
    chosen = masks.largest(values, count)
    times = median_ms(selectors(values, exclude, count), repeats)
    return {
        "size": size,
        "share": share,
        "count": count,
        "selection_ms": times,
        "time_against_largest": {name: t / times["masks.largest"] for name, t in times.items()},
        "coding_ms": median_ms(coders(chosen, size), repeats),
        "bits_per_index": bits_per_index(chosen, size),
    }


def rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/selection.json"))
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(size, share, options.repeats) for size in SIZES for share in SHARES]
    for row in rows:
        print(f"\n{row['size']:,} values, {row['count']:,} chosen")
        for kind in ("selection_ms", "coding_ms", "bits_per_index"):
            print(f"  {kind}: " + ", ".join(f"{name} {value:.4g}" for name, value in row[kind].items()))  # type: ignore[attr-defined]
    hardware = {key: value for key, value in runtime.hardware().items() if key != "host"}
    result = {
        "command": "python benchmarks/selection.py",
        "clock": "processor time, median of the repeats, in a process of one thread",
        "repeats": options.repeats,
        "seed": 0,
        "versions": runtime.versions(),
        "hardware": hardware,
        "rows": [rounded(row) for row in rows],
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
