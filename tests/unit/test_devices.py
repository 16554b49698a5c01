"""On a GPU nothing mixes devices, and all but rounding ends with the CPU's bits. No GPU has run this: see pretended.py."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from alone import Alone
from pretended import GPU, Pretended, Stream, pretended_gpu
from torch import Tensor, nn

from feddip_mpi import config, federation, masks, rounds, staging, values
from feddip_mpi.methods import sparsyfed
from feddip_mpi.models.dropout import Dropout
from feddip_mpi.schedules import plan_round
from feddip_mpi.settings import METHODS
from feddip_mpi.trainers import Trainers

SMALL = {"shape": [2, 6, 6], "classes": 3, "train_samples": 48, "test_samples": 20}


class Net(nn.Module):
    """A chain with buffers, a counter and random numbers of its own."""

    def __init__(self, in_channels: int, image_size: tuple[int, int], classes: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(in_channels, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.dropout = Dropout(0.3)
        self.hidden = nn.Linear(6 * (image_size[0] // 2) * (image_size[1] // 2), 12)
        self.out = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.norm(self.conv(x))), 2)
        return self.out(torch.relu(self.hidden(self.dropout(x.flatten(1)))))


def run(device: torch.device, **values: Any) -> list[Any]:
    """All bits that a short run leaves, and what it says of its last round."""
    settings = {
        "rounds": 2, "clients": 3, "participants": 2, "local_epochs": 1, "batch_size": 8, "learning_rate": 0.05,
        "model": {"name": f"{__name__}:Net"}, "mask": {"every": 1, "freeze_after": 1.0},
        "sparsity": {"initial": 0.4, "final": 0.8}, "eval": {"batch_size": 16, "clients": True},
        "data": {"name": "synthetic", "synthetic": SMALL},
        **values,
    }  # fmt: skip
    built = federation.build(config.validate(settings), Alone(), device)
    state = rounds.initial_state(built)
    records = [rounds.play(built, state, plan_round(built.config, t)) for t in range(built.config.rounds)]
    server, held = state.server, sorted(state.held.items())
    assert server.weights.device == server.mask.device == device
    names = ("train_loss", "test_loss", "test_accuracy_top5", "upload_bytes", "pruning_error", "residual_norm")
    return [
        *(x.cpu().numpy().tobytes() for x in (server.weights, server.mask, *state.memories.values())),
        *(residual.values.cpu().numpy().tobytes() for _, residual in held),
        [record[name] for record in records for name in names],
        built.method.facts(server.mask),
    ]


@pytest.mark.parametrize(
    "values",
    [
        *({"method": method} for method in METHODS),
        {"upload": {"values": "int4", "rounding": "stochastic", "entropy": "zstd", "residual": "decay"}},
        {"upload": {"values": "bf16", "residual": "in_mask_only", "residual_values": "bf16"}},
        {"upload": {"values": "int8", "residual": "ef21"}, "penalty": {"norm": "l1"}},
        {"exchange": "sharded", "download": {"values": "int8"}, "penalty": {"norm": "l2_squared"}},
        {"exchange": "dense", "server_memory": "published"},
        {"mask": {"every": 1, "allocation": "lamp", "rescale": True, "initial": "snip"}, "feedback": False},
        {"mask": {"every": 1, "allocation": "erk", "initial": "magnitude"}},
        {"method": "prunefl", "prunefl": {"size": "adaptive", "first_rounds": 2}},
        {"method": "prunetrain", "prunetrain": {"cut": "threshold"}},
        {"method": "sparsyfed", "sparsyfed": {"activations": True}},
        {"data": {"name": "synthetic", "augment": "standard", "synthetic": SMALL}},
    ],
    ids=str,
)  # fmt: skip
def test_a_run_on_a_gpu_is_one_on_the_cpu(values: dict[str, Any]) -> None:
    if values.get("upload", {}).get("entropy"):
        pytest.importorskip("zstandard")
    expected = run(torch.device("cpu"), **values)
    with pretended_gpu():
        assert run(GPU, **values) == expected


def test_threads_take_the_gpu_and_one_stream_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread begins with the first GPU, whichever its rank has; and cuBLAS keeps memory for each stream of a thread."""
    expected = run(torch.device("cpu"), clients_at_once=2, clients=4, participants=4)
    seen: dict[int, tuple[Any, set[Stream]]] = {}
    begin = Trainers._begin_thread
    with pretended_gpu() as gpu:
        on = gpu.on

        def noting(stream: Stream | None) -> Any:
            if threading.current_thread().name.startswith("trainer"):
                seen.setdefault(threading.get_ident(), (gpu.here.device, set()))[1].add(stream)
            return on(stream)

        def begin_here(self: Trainers) -> None:
            Pretended.__enter__(gpu)  # in this thread
            begin(self)

        monkeypatch.setattr(torch.cuda, "stream", noting)
        monkeypatch.setattr(Trainers, "_begin_thread", begin_here)
        assert run(GPU, clients_at_once=2, clients=4, participants=4) == expected
        assert len(gpu.recorded) == 8 and set(gpu.recorded) == {gpu.here.stream}  # who reads the updates
    assert seen and all(device == GPU and len(streams) == 1 for device, streams in seen.values())


def test_what_leaves_a_gpu_is_there_when_the_host_reads_it() -> None:
    raw = np.arange(200, dtype=np.uint8)
    with pretended_gpu():
        data = staging.to_device(raw, GPU)
        assert data.device == GPU
        made = Stream.made
        for first in (0, 7, 200):
            assert np.array_equal(staging.to_host(data[first:]), raw[first:])
        assert Stream.made == made + 1  # torch has few: a new one may be a trainer's


@pytest.mark.parametrize("share", [0.01, 0.4, 0.999])
def test_the_largest_inputs_are_the_same_on_a_gpu(share: float) -> None:
    given = torch.from_numpy(np.random.default_rng(1).integers(-5, 6, (8, 40))).float()  # many are equal
    expected = sparsyfed.largest_inputs(given, share)
    with pretended_gpu():
        assert torch.equal(sparsyfed.largest_inputs(given.to(GPU), share).cpu(), expected)


def test_the_pretended_gpu_has_a_gpus_rules() -> None:
    with pretended_gpu():
        there, here = torch.arange(3.0, device=GPU), torch.arange(3.0)
        assert (there[1:].device, (there + here.max()).device, there.cpu().device.type) == (GPU, GPU, "cpu")
        for wrong in (
            lambda: there + here, lambda: torch.cat([there, here]), lambda: here.index_select(0, there.long()),
            lambda: values.as_bytes(there).numpy(), lambda: torch.kthvalue(there, 1), lambda: there.cumsum(0),
            lambda: torch.where(there > 1, here, 0.0), lambda: masks.select_largest(there, 1).numpy(),
        ):  # fmt: skip
            with pytest.raises((RuntimeError, TypeError)):
                wrong()
        staged = torch.empty(3)
        staged.copy_(there, non_blocking=True)
        assert not torch.equal(staged, here)
        torch.cuda.current_stream(GPU).synchronize()
        assert torch.equal(staged, here)
