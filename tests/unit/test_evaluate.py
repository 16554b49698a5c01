"""Evaluation: ranks of the right class by brute force, the same bits however it is shared out."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from alone import Alone
from torch import Tensor, nn

from feddip_mpi import config, evaluate, reevaluate, session
from feddip_mpi.batches import DeviceData
from feddip_mpi.errors import InputError
from feddip_mpi.settings import Config
from feddip_mpi.vector import BoundModel, Layout


class Table(nn.Module):
    """Returns the row of a table that an image's only pixel names; remembers in which mode it was called."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((self.training, torch.is_grad_enabled()))
        return self.rows[x.reshape(-1).long()]


def bound(rows: Tensor) -> BoundModel:
    model = Table(rows)
    return BoundModel(model, Layout.of(model, []), torch.device("cpu"))


def split(labels: list[int]) -> DeviceData:
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1)
    return DeviceData(images, torch.tensor(labels), torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))


def random_case(count: int = 101, classes: int = 8) -> tuple[Tensor, list[int]]:
    generator = np.random.default_rng(0)
    rows = generator.integers(-2, 3, (count, classes)).astype(np.float32)  # few values: many ties
    rows[::3] += generator.standard_normal((len(rows[::3]), classes)).astype(np.float32)
    return torch.from_numpy(rows), generator.integers(0, classes, count).tolist()


def brute_force(rows: Tensor, labels: list[int]) -> tuple[list[int], float]:
    correct, losses = [], []
    for row, label in zip(rows.double().tolist(), labels, strict=True):
        place = sorted(range(len(row)), key=lambda c: (-row[c], c)).index(label)
        correct.append((place < 1) + 2 * (place < 5))
        losses.append(math.log(sum(math.exp(x - row[label]) for x in row)))
    return correct, sum(losses) / len(losses)


@pytest.mark.parametrize("batch_size", [1, 10, 101, 500])
def test_scores_equal_brute_force(batch_size: int) -> None:
    rows, labels = random_case()
    correct, loss = brute_force(rows, labels)
    model = bound(rows)
    part = evaluate.score(model, model.vector.clone(), split(labels), batch_size)
    assert part.correct.tolist() == correct
    assert len(part.losses) == -(-101 // batch_size)
    scores = evaluate.merge([part])
    assert scores.top1 == sum(c & 1 for c in correct) / 101
    assert scores.top5 == sum(c >> 1 for c in correct) / 101
    assert 0 < scores.top1 < scores.top5 < 1
    assert scores.loss == pytest.approx(loss, rel=1e-6)


def test_ties_go_to_the_lower_class() -> None:
    model = bound(torch.zeros(7, 7))
    part = evaluate.score(model, model.vector.clone(), split(list(range(7))), 3)
    assert part.correct.tolist() == [3, 2, 2, 2, 2, 0, 0]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_never_right(poison: float) -> None:
    for position in range(3):
        rows = torch.tensor([[3.0, 1.0, 2.0]]).repeat(2, 1)
        rows[0, position] = poison
        model = bound(rows)
        assert evaluate.score(model, model.vector.clone(), split([0, 0]), 2).correct.tolist() == [0, 3]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 30])
def test_any_number_of_ranks_gives_the_same_bits(ranks: int) -> None:
    rows, labels = random_case()
    # Losses of very different size: a sum in another order ends in other bits.
    rows *= 10.0 ** torch.from_numpy(np.random.default_rng(1).integers(0, 13, (101, 1)))
    model, images = bound(rows.float()), split(labels)
    weights = model.vector.clone()
    whole = evaluate.merge([evaluate.score(model, weights, images, 10)])
    parts = [evaluate.score(model, weights, images, 10, range(rank, 11, ranks)) for rank in range(ranks)]
    merged = evaluate.merge(parts)
    assert np.float64(merged.loss).tobytes() == np.float64(whole.loss).tobytes()
    assert merged == whole
    done = np.stack([part.losses != 0 for part in parts]).sum(axis=0)
    assert done.tolist() == [1] * 11  # no batch twice, none left out
    assert all((part.losses != 0).sum() in (11 // ranks, -(-11 // ranks)) for part in parts)


def test_accuracy_by_client_covers_its_own_images() -> None:
    rows, labels = random_case()
    correct = np.array(brute_force(rows, labels)[0]) & 1
    model = bound(rows)
    part = evaluate.score(model, model.vector.clone(), split(labels), 10)
    own = [np.array([0, 5, 7]), np.zeros(0, np.int64), np.arange(50, 101)]
    assert evaluate.merge([part], own).by_client == (correct[[0, 5, 7]].mean(), None, correct[50:].mean())
    assert evaluate.merge([part]).by_client is None


def test_accuracy_by_client_is_the_mean_to_the_last_bit() -> None:
    generator = np.random.default_rng(5)
    correct = generator.integers(0, 4, 3000).astype(np.uint8)
    own = np.split(generator.permutation(3000), np.sort(generator.integers(0, 3000, 499)))
    assert {0, 1} < {len(part) for part in own}
    found = evaluate.merge([evaluate.BatchScores(np.ones(3), correct)], own).by_client
    assert found == tuple(float((correct[part] & 1).mean()) if len(part) else None for part in own)


def test_the_given_weights_are_scored_in_eval_mode_without_autograd() -> None:
    model = bound(torch.zeros(4, 3))
    model.model.train()
    better = torch.eye(3)[[2, 1, 0, 2]].reshape(-1)
    part = evaluate.score(model, better, split([2, 1, 0, 2]), 2)
    assert part.correct.tolist() == [3] * 4
    assert model.model.calls == [(False, False)] * 2


def test_an_evaluation_asks_for_nothing_that_training_alone_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is float32, one model after another, and sends no values: a laptop may evaluate what a GPU node has trained."""
    trained = config.parse("", ["precision=tf32", "clients_at_once=4", "upload.entropy=zstd"])
    built: list[Config] = []

    def build(settings: Config, *_: object) -> None:
        built.append(settings)
        raise InputError("far enough")

    def missing() -> None:
        raise InputError("zstandard is not installed")

    monkeypatch.setattr(reevaluate.checkpoint, "find", lambda path: (SimpleNamespace(config=trained), []))
    monkeypatch.setattr(session.entropy, "require", missing)
    monkeypatch.setattr(session.federation, "build", build)
    with pytest.raises(InputError, match="far enough"):
        reevaluate.evaluate(Alone(), "run", ["eval.batch_size=10"])
    assert (built[0].precision, built[0].clients_at_once, built[0].eval.batch_size) == ("fp32", 1, 10)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_an_evaluation_is_float32_and_leaves_training_as_it_was(kind: str) -> None:
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    try:
        products.allow_tf32 = convolutions.allow_tf32 = True
        with evaluate._without_tf32(torch.device(kind)):
            assert products.allow_tf32 == convolutions.allow_tf32 == (kind == "cpu")
        assert products.allow_tf32 and convolutions.allow_tf32
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before
