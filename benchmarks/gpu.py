"""Correctness and speed on one GPU, in one call of less than nine minutes; on a machine without one, the same on the CPU.

    python benchmarks/gpu.py [--device cuda|cpu] [--parts NAME ...] [--seconds 500] [--data FOLDER] [--out docs/results/gpu.json]

In turn: a client's round on the device against the CPU; 1 rank against 2 ranks on the same device, all bits; DPF against
plain SGD in fp32, tf32 and bf16, step by step and recorded (`cuda_graphs`); rounds of the published settings by phase; 1, 2
and 5 clients at once (`clients_at_once`), time and bits; from the device to MPI's memory; then the published settings for as
many rounds as fit. FOLDER is what `data.path` names (parent of the data
sets' own folders); a data set that is not there is replaced by generated images of its shape, and the result says so.
On the CPU everything is small (`--device cpu`): that shows that the script runs, not what a GPU does.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.nn import functional as F
from watch import mpirun

from feddip_mpi import collectives, config, federation, methods, rounds, runtime, session, staging
from feddip_mpi.batches import DeviceData
from feddip_mpi.local import LocalTrainer
from feddip_mpi.schedules import plan_round
from feddip_mpi.vector import BoundModel, flatten

SHAPES = {"lenet5": (1, 28, 28), "alexnet": (3, 32, 32), "resnet18": (3, 32, 32)}
# How many times further than the CPU's own rounding a client's update on the device may be from the CPU's.
ROOM = 3
PUBLISHED = {
    "fashion-mnist-lenet5": ("fashion-mnist", (1, 28, 28), 10),
    "cifar10-alexnet": ("cifar10", (3, 32, 32), 10),
    "cifar100-resnet18": ("cifar100", (3, 32, 32), 100),
}
BATCH = 128


def trainer(
    name: str, device: torch.device, images: int, batch: int, *settings: str, record: bool = False
) -> tuple[LocalTrainer, tuple]:
    """A trainer on random images, and the first arguments of its `train`; everything equal for equal arguments."""
    chosen = config.parse(
        f"{{model: {{name: {name}}}, local_epochs: 1, batch_size: {batch}, mask: {{initial: erk}}}}", settings
    )
    generator, shape = np.random.default_rng(0), SHAPES[name]
    raw = torch.from_numpy(generator.integers(0, 256, (images, *shape), dtype=np.uint8)).to(device)
    labels = torch.from_numpy(generator.integers(0, 10, images)).to(device)
    grey = torch.full((1, shape[0], 1, 1), 128.0, device=device)
    model, layout = federation.build_model(chosen, shape, 10)
    initial = flatten(model, layout).to(device)
    method = methods.make(chosen, model, layout, shape)
    _, mask = method.start(initial, [])
    data = DeviceData(raw, labels, grey, grey, channels_last=device.type == "cpu")
    bound = BoundModel(model, layout, device)
    return LocalTrainer(bound, data, method.local_rule(), record=record), (initial, mask, np.arange(images))


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        finish(device)
        started = time.perf_counter()
        work()
        finish(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def against_the_cpu(device: torch.device, models: list[str]) -> dict:
    """Ten batches of 8 images on the device and on the CPU; without dropout, whose random numbers differ by device.

    The yardstick is the CPU itself, beginning one unit in the last place higher, and lower: ||a - b|| / ||b|| of the updates.
    """

    def update(name: str, place: torch.device, towards: float = 0.0) -> torch.Tensor:
        local, (initial, *rest) = trainer(name, place, 80, 8)
        for module in local.bound.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if towards:
            initial = torch.nextafter(initial, torch.full_like(initial, towards))
        return local.train(initial, *rest, 0.01, 1e-3, 0, 0).update.cpu()

    found, cpu = {}, torch.device("cpu")
    for name in models:
        here = update(name, cpu)
        others = [update(name, cpu, float("inf")), update(name, cpu, -float("inf")), update(name, device)]
        *moved, distance = [float((other - here).norm() / here.norm()) for other in others]
        found[name] = {"distance": distance, "of one ulp on the CPU": moved, "within": distance <= ROOM * max(moved)}
    return found


def steps(device: torch.device, models: list[str], images: int, batch: int, repeats: int) -> dict:
    """Milliseconds a batch of plain SGD on preloaded images and of DPF."""
    precisions = ["fp32", "tf32", "bf16"] if device.type == "cuda" else ["fp32", "bf16"]
    found: dict = {}
    for name in models:
        local, arguments = trainer(name, device, images, batch)
        model, _ = federation.build_model(config.parse(f"{{model: {{name: {name}}}}}"), SHAPES[name], 10)
        model = model.to(device).train()
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-4, weight_decay=5e-4)
        preloaded, labels = (local.data.images.float() - 128) / 128, local.data.labels

        def plain(model=model, optimiser=optimiser, preloaded=preloaded, labels=labels) -> None:  # type: ignore[no-untyped-def]
            for chosen in torch.randperm(len(labels), device=device).split(batch):
                optimiser.zero_grad()
                F.cross_entropy(model(preloaded[chosen]), labels[chosen]).backward()
                optimiser.step()

        per_batch = 1e3 / -(-images // batch)
        row = found[name] = {"plain SGD": per_batch * seconds_of(plain, device, repeats)}
        for precision in precisions:
            runtime.prepare_torch(config.Config(device=device.type, precision=precision), 0)
            for record in (False, True) if device.type == "cuda" else (False,):
                chosen, _ = trainer(name, device, images, batch, f"precision={precision}", record=record)
                row[f"DPF {precision}{', recorded' * record}"] = per_batch * seconds_of(
                    lambda chosen=chosen, rest=arguments: chosen.train(*rest, 1e-4, 1e-3, 0, 0), device, repeats
                )
        runtime.prepare_torch(config.Config(device=device.type), 0)
    return found


def whole_rounds(device: torch.device, count: int) -> dict:
    """Seconds by phase of rounds of the published settings on generated images, the last of which renews the mask.

    Median of the rounds after the first two, and those of the last one; with and without recorded steps.
    """
    runtime.prepare_mpi()
    found: dict = {}
    gpu = device.type == "cuda"
    for name, precision in (
        (("lenet5", "fp32"), ("alexnet", "tf32"), ("resnet18", "bf16")) if gpu else (("lenet5", "fp32"),)
    ):
        source, (_, shape, classes) = next((s, d) for s, d in PUBLISHED.items() if s.endswith(name))
        for graphs in ("off", "on") if gpu else ("off",):
            settings = config.load(f"configs/{source}.yaml", [
                f"device={device.type}", f"precision={precision}", f"cuda_graphs={graphs}", "data.name=synthetic",
                f"data.synthetic.shape={list(shape)}", f"data.synthetic.classes={classes}", f"eval.every={count}",
                f"data.synthetic.train_samples={50_000 if gpu else 2_000}", "data.synthetic.test_samples=10000",
                f"mask.every={count}", "sparsity.initial=0.85",
            ])  # fmt: skip
            runtime.prepare_torch(settings, 0)
            built = session.build(collectives.world(), settings)
            state = rounds.initial_state(built)
            records = []
            for _ in range(count):
                started = time.perf_counter()
                record = rounds.play(built, state, plan_round(settings, state.server.round))
                finish(device)
                records.append({**record, "round_seconds": time.perf_counter() - started})
            keys = [key for key in records[0] if key.endswith("_seconds") and any(record[key] for record in records)]
            found[f"{name}, {precision}, cuda_graphs {graphs}"] = {
                "a round": {key: statistics.median(record[key] for record in records[2:-1]) for key in keys},
                "with a mask update and an evaluation": {key: records[-1][key] for key in keys},
                "recordings": built.trainer.recorder.recorded if built.trainer.recorder else 0,
                "peak_device_bytes": runtime.peak_memory(device)[1],
            }
            if gpu:
                del built, state
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
    return found


def transfers(device: torch.device) -> dict:
    """Milliseconds from the device into memory that MPI can read, and back, by megabytes."""
    found = {}
    for megabytes in (1, 10, 93):
        data = torch.zeros(megabytes * 10**6, dtype=torch.uint8, device=device)
        host = np.zeros(megabytes * 10**6, np.uint8)
        found[f"{megabytes} MB"] = {
            "staging.to_host": 1e3 * seconds_of(lambda data=data: staging.to_host(data), device, 9),
            "pageable": 1e3 * seconds_of(lambda data=data: data.cpu(), device, 9),
            "staging.to_device": 1e3 * seconds_of(lambda host=host: staging.to_device(host, device), device, 9),
        }
    return found


def train(ranks: int, source: Path, settings: list[str], run: Path, limit: float) -> int:
    """A run of the program; after `limit` seconds it is told to stop and to save. Returns its exit code."""
    arguments = [x for item in settings for x in ("--set", item)]
    command = [sys.executable, "-m", "feddip_mpi", "train", str(source), *arguments, "--out", str(run)]
    with open(run.with_suffix(".log"), "w") as log:
        process = subprocess.Popen([*mpirun(ranks), *command] if ranks > 1 else command, stdout=log, stderr=log)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGUSR1)  # mpirun passes it on
        try:
            return process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def weights_and_residuals(run: Path) -> dict[str, bytes]:
    """All arrays of a run's newest checkpoint that do not depend on clocks or on the number of ranks."""
    found = {}

    def add(name: str, node: object) -> None:
        if isinstance(node, h5py.Dataset) and node.attrs.get("depends_on", "config") == "config":
            found[name] = np.asarray(node[()]).tobytes()

    with h5py.File(max((run / "checkpoints").glob("round-*.h5"))) as file:
        file.visititems(add)
    return found


def equal_bits(device: torch.device, folder: Path, rounds: int) -> dict:
    """1 rank, 2 ranks on the same device, and 1 rank again: whose arrays differ."""
    source = folder / "empty.yaml"
    source.write_text("{}\n")
    common = [
        "data.name=synthetic",
        "data.synthetic.train_samples=2000",
        "clients=10",
        "participants=4",
        "local_epochs=2",
    ]
    settings = [*common, f"rounds={rounds}", f"device={device.type}", "upload.regrow_rounds=all", "memory_fraction=0.4"]
    found = []
    for number, ranks in enumerate((1, 2, 1)):
        run = folder / f"bits-{number}"
        code = train(ranks, source, settings, run, 100)
        if code:
            return {"exit code": code, "ranks": ranks, "log": run.with_suffix(".log").read_text()[-2000:]}
        found.append(weights_and_residuals(run))
    differing = [[name for name in found[0] if found[0][name] != other.get(name)] for other in found[1:]]
    return {"arrays": len(found[0]), "differing on 2 ranks": differing[0], "differing when repeated": differing[1]}


def side_by_side(device: torch.device, folder: Path, images: int, rounds: int) -> dict:
    """Median seconds in which one rank trains five LeNet-5 clients of `images` images, by `clients_at_once`."""
    source = folder / "side-by-side.yaml"
    source.write_text("{}\n")
    common = ["data.name=synthetic", f"data.synthetic.train_samples={10 * images}", "clients=10", "participants=5"]
    settings = [*common, f"rounds={rounds}", "eval.every=1000", f"device={device.type}"]
    found: dict = {"images a client": images, "seconds to train 5 clients": {}}
    bits = []
    for at_once in (1, 2, 5):
        run = folder / f"at-once-{at_once}"
        code = train(1, source, [*settings, f"clients_at_once={at_once}"], run, 60)
        if code:
            return {**found, "exit code": code, "log": run.with_suffix(".log").read_text()[-2000:]}
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found["seconds to train 5 clients"][at_once] = statistics.median(line["train_seconds"] for line in lines[1:])
        bits.append(weights_and_residuals(run))
    found["differing"] = [name for name in bits[0] if any(bits[0][name] != other.get(name) for other in bits[1:])]
    return found


def published(device: torch.device, folder: Path, data: Path | None, seconds: float) -> dict:
    """The three published settings, each for a third of the time; what the last round says and seconds by phase."""
    found = {}
    for name, (dataset, shape, classes) in PUBLISHED.items():
        there = data is not None and any(data.glob(f"{dataset.replace('10', '-10')}*"))
        settings = [f"device={device.type}"] + ([f"data.path={data}"] if data else [])
        if dataset != "fashion-mnist" and not there:
            settings = [f"device={device.type}", "data.name=synthetic", f"data.synthetic.shape={list(shape)}"]
            settings += [f"data.synthetic.classes={classes}", "data.synthetic.train_samples=50000"]
            settings += ["data.synthetic.test_samples=10000"]
        if device.type == "cpu":
            settings += ["clients=500"]  # a tenth of the images a client, so that a few rounds fit
        run = folder / name
        code = train(1, Path(f"configs/{name}.yaml"), settings, run, seconds / len(PUBLISHED))
        file = run / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        found[name] = {
            "exit code": code,
            "settings": settings,
            "rounds": len(lines),
        }
        if code not in (0, 75):
            found[name]["log"] = run.with_suffix(".log").read_text()[-1000:]
        if lines:
            keys = [key for key in lines[0] if key.endswith("_seconds")]
            found[name] |= {key: statistics.median(line[key] for line in lines[1:] or lines) for key in keys}
            found[name] |= {
                key: lines[-1][key] for key in ("sparsity", "train_loss", "device_memory_bytes", "host_memory_bytes")
            }
            found[name]["test_accuracy"] = next(
                (x["test_accuracy"] for x in reversed(lines) if x["test_accuracy"]), None
            )
    return found


def parts(
    options: argparse.Namespace, device: torch.device, folder: Path, started: float
) -> Iterator[tuple[str, dict]]:
    """Name and result of every part that is asked for, as it ends."""
    gpu = device.type == "cuda"
    models = list(SHAPES) if gpu else ["lenet5", "alexnet"]
    work: dict[str, Callable[[], dict]] = {
        "against the CPU": lambda: against_the_cpu(device, list(SHAPES)),
        "equal bits": lambda: equal_bits(device, folder, 6 if gpu else 3),
        "steps, ms a batch": lambda: steps(
            device, models, 12 * BATCH if gpu else 128, BATCH if gpu else 64, 3 if gpu else 2
        ),
        "rounds": lambda: whole_rounds(device, 6 if gpu else 4),
        "clients at once": lambda: side_by_side(device, folder, 1200 if gpu else 128, 8 if gpu else 3),
        "transfers, ms": lambda: transfers(device),
        "published settings": lambda: published(
            device, folder, options.data, max(30.0, options.seconds - (time.monotonic() - started))
        ),
    }
    for name, part in work.items():
        if not options.parts or any(name.startswith(each) for each in options.parts):
            yield name, part()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="*", help="how the names begin of those that are wanted; all without it")
    parser.add_argument("--seconds", type=float, default=500, help="of all parts together, about")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/results/gpu.json"))
    options = parser.parse_args()
    started = time.monotonic()
    device = runtime.prepare_torch(config.Config(device=options.device), 0)
    hardware = {key: value for key, value in runtime.hardware().items() if key != "host"}
    result: dict = {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu: no GPU has run this",
        "versions": runtime.versions(),
        "hardware": hardware,
        "load_average": os.getloadavg()[0],
    }
    with tempfile.TemporaryDirectory() as scratch:
        for name, found in parts(options, device, Path(scratch), started):
            result[name] = found
            print(f"{name}, after {time.monotonic() - started:.0f} s: {json.dumps(found)}", flush=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")  # what is done is kept if the rest fails
    wrong = [name for name, row in result.get("against the CPU", {}).items() if not row["within"]]
    bits, at_once = result.get("equal bits", {}), result.get("clients at once", {})
    if wrong or bits.get("exit code") or bits.get("differing on 2 ranks") or bits.get("differing when repeated"):
        raise SystemExit(f"not as promised: {wrong} against the CPU, {bits}")
    if at_once.get("exit code") or at_once.get("differing"):
        raise SystemExit(f"not as promised: {at_once}")


if __name__ == "__main__":
    main()
