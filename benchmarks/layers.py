"""What changes of the engine gave: the fused first layer, LeNet-5's gradients, and big blocks of memory that are kept.

    python benchmarks/layers.py [--only "first layer" gradients "big blocks"] [--out docs/results/layers.json]

CPU milliseconds of one thread, which other work on the machine does not count into. The first: forward and backward of
LeNet-5's first convolution, pooling and ReLU for 128 images, fused and as PyTorch's three operations in both memory
orders. The second: forward and backward of LeNet-5 with these three operations, and with the fused layer and either way to
the gradients (`fused.has_wide_vectors`), of which the program takes the one that is faster on the CPU it runs on. The
third: one batch of AlexNet by plain SGD and by DPF with glibc's own thresholds and with those of
`runtime.keep_big_blocks`, switched in turn within the process.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import step
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feddip_mpi import runtime
from feddip_mpi.models import fused, lenet
from feddip_mpi.models.fused import conv_pool_relu

_GLIBC_OWN = 128 * 1024  # its M_MMAP_THRESHOLD and M_TRIM_THRESHOLD at the start of a program


def three_operations(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return F.relu(F.max_pool2d(conv(x), 2))


def first_layer(repeats: int = 200) -> dict:
    """Median milliseconds, forward and backward, with big blocks kept as in a run."""
    runtime.keep_big_blocks({})
    conv, plain = nn.Conv2d(1, 6, 5, padding=2), torch.randn(128, 1, 28, 28)
    channels_last = plain.as_strided(plain.shape, (784, 1, 28, 1))
    cases: dict[str, tuple[Callable[[Tensor, nn.Conv2d], Tensor], Tensor]] = {
        "three operations": (three_operations, plain),
        "three operations, channels last": (three_operations, channels_last),
        "fused": (conv_pool_relu, channels_last),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, (layer, x) in cases.items():
            started = time.process_time()
            out = layer(x, conv)
            between = time.process_time()
            torch.autograd.grad(out, (conv.weight, conv.bias), torch.ones_like(out))
            times[name].append((between - started, time.process_time() - between))
    found = {}
    for name, pairs in times.items():
        forward, backward = (1e3 * statistics.median(column) for column in zip(*pairs[20:], strict=True))
        found[name] = {"forward": forward, "backward": backward}
    return found


def gradients(repeats: int = 150) -> dict:
    """Median milliseconds of a batch of 128 images, channels last, with big blocks kept as in a run."""
    runtime.keep_big_blocks({})
    model = lenet.LeNet5(1, (28, 28), 10).to(memory_format=torch.channels_last)
    images, labels = torch.randn(128, 1, 28, 28).as_strided((128, 1, 28, 28), (784, 1, 28, 1)), torch.arange(128) % 10
    ways: dict[str, tuple[Callable[[Tensor, nn.Conv2d], Tensor], bool]] = {
        "three operations": (three_operations, True),
        "fused, gradients as with AVX-512": (conv_pool_relu, True),
        "fused, gradients as without it": (conv_pool_relu, False),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, (layer, wide) in ways.items():
            lenet.conv_pool_relu, fused.has_wide_vectors = layer, lambda wide=wide: wide  # type: ignore[assignment]
            started = time.process_time()
            torch.autograd.grad(F.cross_entropy(model(images), labels), list(model.parameters()))
            times[name].append(time.process_time() - started)
    return {name: 1e3 * statistics.median(own[20:]) for name, own in times.items()}


def big_blocks(batches: int = 3, repeats: int = 3) -> dict:
    """Median milliseconds a batch."""
    allow = ctypes.CDLL(None).mallopt
    contenders = step.contenders("alexnet", (3, 32, 32), batches * step.BATCH)
    times: dict[str, dict[str, list[float]]] = {name: {} for name in contenders}
    for _ in range(repeats + 1):
        for kept in (False, True):
            allow(-3, 2**30 if kept else _GLIBC_OWN)
            allow(-1, 2**31 - 1 if kept else _GLIBC_OWN)
            for name, work in contenders.items():
                started = time.process_time()
                work()
                spent = 1e3 * (time.process_time() - started) / batches
                times[name].setdefault("kept" if kept else "handed back", []).append(spent)
    return {name: {key: statistics.median(own[1:]) for key, own in row.items()} for name, row in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/layers.json"))
    measures = {"first layer": first_layer, "gradients": gradients, "big blocks": big_blocks}
    parser.add_argument("--only", nargs="+", choices=measures, default=list(measures))
    options = parser.parse_args()
    torch.set_num_threads(1)
    hardware = {key: value for key, value in runtime.hardware().items() if key != "host"}
    result: dict = {"command": "python benchmarks/layers.py", "versions": runtime.versions(), "hardware": hardware}
    result["load_average"] = os.getloadavg()[0]
    for name in options.only:
        result[f"{name}, ms"] = measures[name]()
        print(name, json.dumps(result[f"{name}, ms"], indent=1))
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
