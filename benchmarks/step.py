"""Times of the local step and of exact selection, as ratios within one run.

    python benchmarks/step.py [--out docs/results/step.json]

One thread, and its CPU seconds: other work on the machine takes none of them. Every contender is timed in turn, many times;
the table shows medians and the ratio to plain SGD.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch.nn import functional as F

from feddip_mpi import config, federation, masks, methods, runtime
from feddip_mpi.batches import DeviceData
from feddip_mpi.local import LocalTrainer
from feddip_mpi.models import fused
from feddip_mpi.vector import BoundModel, flatten

BATCH = 128
BATCHES = {
    "lenet5": 10,
    "alexnet": 12,
    "resnet18": 4,
}  # a call; a client of the published settings has 40 or 50 a round
MODELS = {"lenet5": ((1, 28, 28), 5), "alexnet": ((3, 32, 32), 1), "resnet18": ((3, 32, 32), 1)}


def contenders(name: str, shape: tuple[int, int, int], images: int) -> dict[str, Callable[[], None]]:
    """One epoch over `images` images by plain SGD and by DPF, as functions without arguments."""
    settings = config.parse(f"{{model: {{name: {name}}}, local_epochs: 1, mask: {{initial: erk}}}}")
    generator = np.random.default_rng(0)
    raw = torch.from_numpy(generator.integers(0, 256, (images, *shape), dtype=np.uint8))
    labels = torch.from_numpy(generator.integers(0, 10, images))
    one = torch.full((1, shape[0], 1, 1), 128.0)
    data = DeviceData(raw, labels, one, one, channels_last=True)
    model, layout = federation.build_model(settings, shape, 10)
    initial = flatten(model, layout)
    method = methods.make(settings, model, layout, shape)
    _, mask = method.start(initial, [])
    trainer, in_bf16 = (
        LocalTrainer(BoundModel(deepcopy(model), layout, torch.device("cpu")), data, replace(rule, precision=precision))
        for rule in [method.local_rule()]
        for precision in ("fp32", "bf16")
    )
    order = np.arange(images)
    found: dict[str, Callable[[], None]] = {
        "DPF, penalty 0": lambda: trainer.train(initial, mask, order, 1e-4, 0.0, 0, 0) and None,
        "DPF, penalty 1e-3": lambda: trainer.train(initial, mask, order, 1e-4, 1e-3, 0, 0) and None,
        "DPF, penalty 1e-3, bf16": lambda: in_bf16.train(initial, mask, order, 1e-4, 1e-3, 0, 0) and None,
    }
    for order_name, memory in (("", torch.contiguous_format), (", channels last", torch.channels_last)):
        found[f"plain SGD{order_name}"] = _plain(settings, shape, raw, labels, memory)
    return found


def _plain(settings, shape, raw, labels, memory) -> Callable[[], None]:  # type: ignore[no-untyped-def]
    model, _ = federation.build_model(settings, shape, 10)
    model = model.to(memory_format=memory).train()
    images = ((raw.float() - 128) / 128).contiguous(memory_format=memory)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4, weight_decay=5e-4)

    def epoch() -> None:
        with patch.object(fused, "_fits", lambda *_: False):  # PyTorch's own operations, one by one
            for chosen in torch.randperm(len(labels)).split(BATCH):
                optimiser.zero_grad()
                F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
                optimiser.step()

    return epoch


def medians(found: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each, timed in turn after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for repeat in range(repeats + 1):
        for name, work in found.items():
            started = time.process_time()
            work()
            if repeat:
                times[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def selection(size: int) -> dict[str, Callable[[], object]]:
    values = torch.rand(size, generator=torch.Generator().manual_seed(0))
    keep = size // 20
    return {
        "masks.select_largest": lambda: masks.select_largest(values, keep),
        "torch.topk": lambda: torch.topk(values, keep, sorted=False),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/step.json"))
    parser.add_argument("--only", choices=[*MODELS, "selection"], nargs="+", default=[*MODELS, "selection"])
    options = parser.parse_args()
    runtime.prepare_torch(config.Config(device="cpu"), 0)
    # Models that are not measured again stay in the file.
    result: dict = json.loads(options.out.read_text()) if options.out.exists() else {}
    result |= {
        "command": "python benchmarks/step.py",
        "versions": runtime.versions(),
        "hardware": runtime.hardware(),
    }
    print("| model | contender | ms a batch | time against plain SGD |\n|---|---|---|---|")
    for name in [name for name in MODELS if name in options.only]:
        shape, repeats = MODELS[name]
        images = BATCHES[name] * BATCH
        found = medians(contenders(name, shape, images), repeats * 3)
        result[name] = {key: 1e3 * seconds / (images / BATCH) for key, seconds in found.items()}
        for key, value in result[name].items():
            print(f"| {name} | {key} | {value:.1f} | {value / result[name]['plain SGD']:.2f} |")
    print("\n| selection of 5 % | values | ms |\n|---|---|---|")
    for size in (61_470, 23_262_912) if "selection" in options.only else ():
        found = medians(selection(size), 5)  # type: ignore[arg-type]
        result[f"select {size}"] = {key: 1e3 * seconds for key, seconds in found.items()}
        for key, value in result[f"select {size}"].items():
            print(f"| {key} | {size:,} | {value:.1f} |")
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
