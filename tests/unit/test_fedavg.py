"""FedAvg and FedProx through the engine against a plain loop, and rounds that must fail."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from alone import Alone
from torch import Tensor, nn

from feddip_mpi import checkpoint, config, federation, masks, rounds, run_folder
from feddip_mpi.errors import NumericalError
from feddip_mpi.federation import Federation
from feddip_mpi.local import LocalResult, LocalTrainer
from feddip_mpi.residuals import Residual
from feddip_mpi.saver import FolderSaver
from feddip_mpi.schedules import plan_round
from feddip_mpi.settings import Config
from feddip_mpi.streams import stream


class Net(nn.Module):
    def __init__(self, in_channels: int, image_size: tuple[int, int], classes: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(in_channels, 4, 3), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4 * (image_size[0] - 2) * (image_size[1] - 2), classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.norm(self.conv(x))).flatten(1))


def settings(**values: Any) -> Config:
    return config.validate({
        "rounds": 3, "clients": 5, "participants": 3, "local_epochs": 2, "batch_size": 16, "learning_rate": 0.05,
        "learning_rate_decay": 0.5, "weight_decay": 0.01, "method": "fedavg", "model": {"name": f"{__name__}:Net"},
        "upload": {"values": "fp32"},
        "data": {
            "name": "synthetic", "partition": "quantity", "alpha": 2.0,
            "synthetic": {"shape": [2, 6, 6], "classes": 3, "train_samples": 203, "test_samples": 60},
        },
        **values,
    })  # fmt: skip


def play_all(built: Federation) -> tuple[rounds.State, list[dict]]:
    state = rounds.initial_state(built)
    return state, [rounds.play(built, state, plan_round(built.config, t)) for t in range(built.config.rounds)]


def plain_loop(built: Federation, proximal: float) -> list[dict[str, Tensor]]:
    """FedAvg (FedProx) on copied modules with torch's own SGD; the state dict after each round."""
    c = built.config
    images = (torch.from_numpy(built.dataset.train_images) / 255.0).double()
    shape = (1, -1, 1, 1)
    images = (images - torch.tensor(built.dataset.mean).view(shape)) / torch.tensor(built.dataset.std).view(shape)
    images, labels = images.float(), torch.from_numpy(built.dataset.train_labels)
    model, _ = federation.build_model(c, built.dataset.train_images.shape[1:], built.dataset.classes)
    after = []
    for t in range(c.rounds):
        chosen = sorted(stream(c.seed, "participants", t).choice(c.clients, c.participants, replace=False))
        total = sum(len(built.partition.train[client]) for client in chosen)
        average = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in model.state_dict().items()}
        for client in chosen:
            local, samples = deepcopy(model).train(), built.partition.train[client]
            optimiser = torch.optim.SGD(
                local.parameters(), c.learning_rate * c.learning_rate_decay**t, weight_decay=c.weight_decay
            )
            order = stream(c.seed, "batches", t, int(client))
            for _ in range(c.local_epochs):
                shuffled = order.permutation(samples)
                batches = [shuffled[i : i + 16] for i in range(0, len(shuffled), 16)]
                if len(batches[-1]) == 1:
                    batches[-2:] = [np.concatenate(batches[-2:])]
                for batch in batches:
                    loss = nn.functional.cross_entropy(local(images[batch]), labels[batch])
                    for new, old in zip(local.parameters(), model.parameters(), strict=True):
                        loss = loss + proximal / 2 * (new - old.detach()).square().sum()
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
            for name, value in local.state_dict().items():
                average[name] += len(samples) / total * value.double()
        model.load_state_dict({name: value.to(model.state_dict()[name].dtype) for name, value in average.items()})
        after.append(deepcopy(model.state_dict()))
    return after


@pytest.mark.parametrize(("method", "proximal"), [("fedavg", 0.0), ("fedprox", 0.5)])
def test_the_engine_equals_a_plain_loop(method: str, proximal: float) -> None:
    built = federation.build(settings(method=method, proximal=0.5), Alone(), torch.device("cpu"))
    sizes = {len(part) for part in built.partition.train}
    assert len(sizes) > 2  # clients weigh differently
    expected = plain_loop(built, proximal)
    state = rounds.initial_state(built)
    for t, reference in enumerate(expected):
        record = rounds.play(built, state, plan_round(built.config, t))
        for name, view in zip(built.layout.names, built.layout.views(state.server.weights), strict=True):
            assert torch.allclose(view, reference[name], rtol=1e-5, atol=2e-6), (t, name)
        assert (record["sparsity"], record["mask_updated"], record["upload_bytes"]) == (
            0,
            0,
            record["dense_bytes"] + 3 * 56,
        )
    assert state.held == {}
    distance = max(float((a - b).abs().max()) for a, b in zip(expected[0].values(), expected[-1].values(), strict=True))
    assert distance > 1e-2  # training did something


def test_fedprox_is_not_fedavg() -> None:
    states = [
        play_all(federation.build(settings(method=m, proximal=0.5), Alone(), torch.device("cpu")))[0]
        for m in ("fedavg", "fedprox")
    ]
    assert not torch.allclose(states[0].server.weights, states[1].server.weights, atol=1e-4)


def pruning(**values: Any) -> Config:
    upload = {"values": "int8", "regrow": 0.3, **values.pop("upload", {})}
    return settings(
        method="feddip",
        rounds=values.pop("rounds", 4),
        mask={"every": 2, "freeze_after": 1.0, "initial": "erk"},
        sparsity={"initial": 0.4, "final": 0.8},
        upload=upload,
        **values,
    )


@pytest.mark.parametrize("memory", ["on", "off", "published"])
def test_a_pruned_run_ends_at_the_final_sparsity_and_records_what_it_did(memory: str) -> None:
    built = federation.build(pruning(server_memory=memory), Alone(), torch.device("cpu"))
    state, records = play_all(built)
    prunable = built.layout.prunable
    assert int(state.server.mask.sum()) == masks.kept_count(prunable, 0.8)
    assert [r["mask_updated"] for r in records] == ([1, 0, 1, 1] if memory == "published" else [0, 1, 0, 1])
    assert all((r["upload_indices_bytes"] > 0) == (r["round"] == 2 and memory != "published") for r in records)
    for r in records:
        kinds = ("values", "indices", "other", "frame")
        assert r["upload_bytes"] == sum(r[f"upload_{kind}_bytes"] for kind in kinds)
        assert r["samples"] == 2 * sum(len(built.partition.train[client]) for client in r["participants"])
        assert 0 <= r["test_accuracy"] <= r["test_accuracy_top5"] <= 1
    assert records[-1]["sparsity"] == 1 - int(state.server.mask.sum()) / prunable
    assert set(state.held) == {client for r in records for client in r["participants"]}
    off_mask = state.server.weights[:prunable][~state.server.mask]
    assert bool(off_mask.any()) == (memory == "on")


def test_the_same_configuration_gives_the_same_bits_and_another_seed_does_not() -> None:
    runs = [play_all(federation.build(pruning(seed=s), Alone(), torch.device("cpu"))) for s in (1, 1, 2)]
    weights = [state.server.weights.numpy().tobytes() for state, _ in runs]
    assert weights[0] == weights[1] != weights[2]
    assert runs[0][1][-1]["test_loss"] == runs[1][1][-1]["test_loss"]


def test_what_a_residual_policy_keeps_is_held_and_used() -> None:
    held, weights = {}, {}
    for policy in ("keep", "drop", "in_mask_only"):
        built = federation.build(pruning(upload={"residual": policy}, participants=5), Alone(), torch.device("cpu"))
        state, _ = play_all(built)
        held[policy], weights[policy] = state.held, state.server.weights.numpy().tobytes()
    assert held["drop"] == {}
    assert len(held["keep"]) == len(held["in_mask_only"]) == 5
    assert len(set(weights.values())) == 3


def test_a_record_weighs_losses_by_images_and_adds_up_the_squares_of_residuals(monkeypatch: pytest.MonkeyPatch) -> None:
    results, train = [], LocalTrainer.train

    def noting(self: LocalTrainer, *arguments: Any) -> LocalResult:
        results.append(train(self, *arguments))
        return results[-1]

    monkeypatch.setattr(LocalTrainer, "train", noting)
    built = federation.build(pruning(), Alone(), torch.device("cpu"))
    state = rounds.initial_state(built)
    for t in range(2):
        results.clear()
        record = rounds.play(built, state, plan_round(built.config, t))
        losses, images = [r.loss for r in results], [r.samples for r in results]
        assert record["train_loss"] == pytest.approx(np.average(losses, weights=images), rel=1e-12)
        assert abs(record["train_loss"] - np.mean(losses)) > 1e-4
        left = torch.cat([state.held[client].values for client in record["participants"]])
        assert record["residual_norm"] == pytest.approx(float(left.double().norm()), rel=1e-6)


def finish(comm: Alone, **values: Any) -> tuple[rounds.State, list[dict], Federation]:
    built = federation.build(pruning(**values), comm, torch.device("cpu"))
    return *play_all(built), built


def test_every_exchange_gives_the_same_bits_and_counts_the_same_uploads() -> None:
    results, modes = set(), ("allgatherv", "sharded", "node", "dense")
    for mode, overlap in [("allgatherv", False), *((mode, True) for mode in modes)]:
        comm = Alone(background=True)
        state, records, _ = finish(comm, exchange=mode, overlap=overlap, rounds=2, upload={"values": "int4"})
        used = {"allgatherv": "allgatherv", "sharded": "alltoallv", "node": "node_allgatherv", "dense": "allreduce"}
        assert set(comm.calls) == {used[mode]}
        held = b"".join(state.held[client].values.numpy().tobytes() for client in sorted(state.held))
        uploads = [record["upload_bytes"] for record in records]
        results.add((state.server.weights.numpy().tobytes(), held, str(uploads)))
    assert len(results) == 1


def test_a_sum_that_is_rounded_off_is_owed_until_the_mask_changes() -> None:
    exact, rounded = {}, {}
    for download, states in (("fp32", exact), ("int8", rounded)):
        built = federation.build(
            pruning(exchange="sharded", download={"values": download}), Alone(), torch.device("cpu")
        )
        state = rounds.initial_state(built)
        for t in range(2):
            record = rounds.play(built, state, plan_round(built.config, t))
            states[t] = state.server, state.owed
            assert (state.owed is None) == (download == "fp32" or bool(record["mask_updated"]))
            if download == "int8":
                assert record["download_frame_bytes"] > 0
                if not record["mask_updated"]:
                    assert record["download_values_bytes"] < record["upload_values_bytes"]
    # After the first round nothing else has gone apart yet: what is missing in the weights is what is owed.
    (server, none), (other, owed) = exact[0], rounded[0]
    assert none is None and bool(owed.any())
    kept = server.weights[: built.layout.prunable][server.mask]
    assert torch.allclose(kept, other.weights[: built.layout.prunable][other.mask] + owed, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("mode", "exchange"), [("masked", "allgatherv"), ("masked", "dense"), ("dense_at_mask_updates", "sharded")]
)
def test_the_server_keeps_the_sum_of_all_references(mode: str, exchange: str) -> None:
    state, _, built = finish(Alone(), exchange=exchange, upload={"residual": "ef21", "mode": mode, "values": "int4"})
    total = sum(built.samples)
    expected = torch.zeros(built.layout.prunable, dtype=torch.float64)
    for client, residual in state.held.items():
        expected += built.samples[client] / total * residual.values.double()
    assert len(state.held) > 3 and bool(expected.any())
    assert torch.allclose(state.reference.double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("initial", ["erk", "uniform", "magnitude", "snip", "none"])
def test_every_initial_mask_is_exact(initial: str) -> None:
    values = pruning().model_dump(mode="json")
    values["mask"]["initial"] = initial
    built = federation.build(config.validate(values), Alone(), torch.device("cpu"))
    srv = rounds.initial_state(built).server
    prunable = built.layout.prunable
    assert int(srv.mask.sum()) == (prunable if initial == "none" else masks.kept_count(prunable, 0.4))
    start = built.initial[:prunable]
    assert torch.equal(srv.weights[:prunable], torch.where(srv.mask, start, torch.zeros_like(start)))
    assert torch.equal(srv.weights[prunable:], built.initial[prunable:])
    if initial == "magnitude":
        assert start[srv.mask].abs().min() >= start[~srv.mask].abs().max()


def test_snip_keeps_the_largest_saliency_of_the_mean_loss() -> None:
    values = pruning().model_dump(mode="json")
    values["mask"]["initial"] = "snip"
    values["participants"] = 5
    built = federation.build(config.validate(values), Alone(), torch.device("cpu"))
    mean, total = torch.zeros(built.layout.size, dtype=torch.float64), sum(built.samples)
    for client in range(5):
        gradient = built.trainer.mean_gradient(built.initial, built.partition.train[client], 0, client)
        mean += built.samples[client] / total * gradient.double()
    saliency = (mean * built.initial)[: built.layout.prunable].abs()
    mask = rounds.initial_state(built).server.mask
    assert saliency[mask].min() >= saliency[~mask].max() * (1 - 1e-5)


@pytest.mark.parametrize("method", ["fedavg", "feddip"])
def test_the_best_finished_model_is_kept_also_where_nothing_is_pruned(method: str, tmp_path: Path) -> None:
    values = {**pruning().model_dump(mode="json"), "method": method, "rounds": 4}
    values["sparsity"] = {"initial": 0.1, "final": 0.55}  # of a few hundred weights: reached to one weight, not to 1e-4
    values["mask"] = {"every": 1, "freeze_after": 0.5}
    values["checkpoint"] = {"every": 1, "keep": 1}
    built = federation.build(config.validate(values), Alone(), torch.device("cpu"))
    folder = run_folder.RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    saver = FolderSaver(built, folder, "2026-01-02T03:04:05+0000")
    state, history = rounds.initial_state(built), []
    for t, accuracy in enumerate([0.9, 0.8, 0.7, 0.6]):
        history.append({**rounds.play(built, state, plan_round(built.config, t)), "test_accuracy": accuracy})
        saver.save(state, history)
    # FedDIP reaches its sparsity with round 2, what is better before does not count.
    best = 1 if method == "fedavg" else 2
    assert [path.name for path in checkpoint.listed(folder.checkpoints)] == [f"round-{r:06d}.h5" for r in (best, 4)]
    assert (built.layout.prunable - masks.kept_count(built.layout.prunable, 0.55)) / built.layout.prunable < 0.5499


def test_a_run_that_diverges_names_client_and_round() -> None:
    built = federation.build(
        settings(learning_rate=1000.0, learning_rate_decay=1.0, rounds=9), Alone(), torch.device("cpu")
    )
    with pytest.raises(
        NumericalError, match=r"client \d+ \(rank 0\) diverged in round [1-9]: loss .*, learning rate 1000"
    ):
        play_all(built)


class Hopeless(Net):
    """Its loss is a number, its gradient is none."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (self.fc.weight.sum() * 0).sqrt()


def test_values_that_are_not_finite_before_the_first_round_name_the_client() -> None:
    values = {**pruning().model_dump(mode="json"), "model": {"name": f"{__name__}:Hopeless"}}
    values["mask"]["initial"] = "snip"
    built = federation.build(config.validate(values), Alone(), torch.device("cpu"))
    with pytest.raises(NumericalError, match=r"client \d+ \(rank 0\) found values .* before the first round"):
        rounds.initial_state(built)


def test_a_residual_that_grows_past_all_numbers_names_client_and_round(monkeypatch: pytest.MonkeyPatch) -> None:
    train = LocalTrainer.train

    def far(*arguments: Any) -> LocalResult:
        result = train(*arguments)
        return replace(result, update=torch.full_like(result.update, 3e38))

    monkeypatch.setattr(LocalTrainer, "train", far)
    built = federation.build(pruning(upload={"values": "int4"}), Alone(), torch.device("cpu"))
    state, plan = rounds.initial_state(built), plan_round(built.config, 0)
    for client in plan.participants:
        state.held[client] = Residual(torch.full((built.layout.prunable,), 3e38), 0)
    with pytest.raises(NumericalError, match=r"client \d+ \(rank 0\) diverged in round 1: residual norm (inf|nan)"):
        rounds.play(built, state, plan)
