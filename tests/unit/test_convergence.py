"""The program against problems whose optimum is known (benchmarks/convergence.py has the curves)."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from alone import Alone

from feddip_mpi import federation


@pytest.fixture(scope="module")
def problems() -> ModuleType:
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)  # for the whole module: the program imports network and data from there
    try:
        yield importlib.import_module("convergence")
    finally:
        sys.path.remove(folder)


def play(problems: ModuleType, **changes: Any) -> Any:
    return problems.play(Alone(), "quadratic", 1, {"rounds": 50, **changes})


def test_the_loss_of_the_network_is_the_quadratic(problems: ModuleType) -> None:
    """Otherwise the known optimum would be that of another problem."""
    built = federation.build(problems.settings("quadratic", 1, {}), Alone(), torch.device("cpu"))
    truth = problems.QuadraticTruth(built)
    point = np.linspace(-2, 2, problems.WEIGHTS)
    everything = np.arange(len(built.train_data.labels))
    gradient = built.trainer.mean_gradient(torch.from_numpy(point).float(), everything, 0, 0).numpy()
    assert np.allclose(gradient, truth.curvature * (point - truth.optimum), rtol=1e-4, atol=1e-4)


def test_newton_finds_the_optimum_that_the_trainer_sees(problems: ModuleType) -> None:
    config = problems.settings("logistic", 1, {})
    built = federation.build(config, Alone(), torch.device("cpu"))
    optimum = torch.from_numpy(problems.LogisticTruth(built).optimum).float()
    everything = np.arange(len(built.train_data.labels))
    gradient = built.trainer.mean_gradient(optimum, everything, 0, 0) + config.weight_decay * optimum
    assert float(optimum.norm()) > 0.5 and float(gradient.abs().max()) < 1e-6


def test_residuals_pay_back_what_int4_rounds_off(problems: ModuleType) -> None:
    kept, dropped = (
        play(problems, **{"upload.values": "int4", "upload.residual": policy}) for policy in ("keep", "drop")
    )
    assert kept.distance[0] > 0.4
    assert kept.distance[-1] < 1e-4
    assert dropped.distance[-1] > 10 * kept.distance[-1]


def test_pruning_keeps_the_weights_of_the_best_sparse_solution(problems: ModuleType) -> None:
    """With equal curvatures the largest weights are those whose removal costs most."""
    equal = {"heterogeneity": 0.0, "spread": 1.0, "upload.values": "int4", "sparsity.final": 0.5}
    curve = play(problems, **equal, learning_rate_decay=0.94)
    assert curve.overlap[-1] == 1.0
    assert curve.distance[-1] < 1e-4
    assert curve.gap[-1] == pytest.approx(curve.best_gap, rel=1e-2)


def test_full_gradients_keep_the_bound(problems: ModuleType) -> None:
    """docs/method.md, "Convergence": one exact step a round, constant, everything travels, W is DPF's dense vector."""
    step, size = 0.2, problems.WEIGHTS
    changes = {
        "heterogeneity": 0.0, "learning_rate": step, "learning_rate_decay": 1.0, "batch_size": problems.SAMPLES,
        "upload.mode": "dense", "sparsity.final": 0.5, "mask.every": 1,
    }  # fmt: skip
    curve = play(problems, **changes)
    built = federation.build(problems.settings("quadratic", 1, changes), Alone(), torch.device("cpu"))
    truth = problems.QuadraticTruth(built)
    smoothness, start = truth.curvature.max(), np.zeros(size)
    error = np.array([r["pruning_error"] for r in curve.records]) * curve.squared_norm
    squared_gradient = (np.array([r["update_norm"] for r in curve.records]) / step) ** 2
    rounds = len(error)
    gaps = [truth.gap(start), *curve.gap[:-1]]  # of the points that gradients were taken at
    first = float(((start - truth.optimum) ** 2).sum()) / (step * rounds)
    bound = first + step * squared_gradient.mean() + 2 * smoothness * error[:-1].sum() / rounds
    assert error[-1] > 0
    assert bound / 20 < np.mean(gaps) < bound
