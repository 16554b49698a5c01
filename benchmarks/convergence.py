"""The program on problems whose optimum is known: distance to it against rounds.

    python -m mpi4py benchmarks/convergence.py --out docs/results    # convergence.json and convergence.png

Rounds are those of a run (`rounds.play`: local training, codec, residuals, exchange, server step) on one rank; only the
data and the network are this script's, and they reach the program by import path as a user's do.

Quadratic: sample i of client k has the loss 1 + 1/2 sum_j a_ij (w_j - x_ij)^2, for 256 weights, with a_ij > 0 and x_ij
in its image. The optimum and the best solution with k weights are known in closed form. `heterogeneity` sets how far the
clients' own optima and curvatures lie apart. Logistic: two classes, 64 features, l2 penalty by `weight_decay`; the
optimum is found by Newton's method in float64, with a given mask on the weights of that mask.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from feddip_mpi import collectives, config, federation, masks, metrics, rounds, runtime
from feddip_mpi.collectives import Communicator
from feddip_mpi.data import Dataset
from feddip_mpi.federation import Federation
from feddip_mpi.schedules import plan_round
from feddip_mpi.settings import Config, DataConfig
from feddip_mpi.streams import stream

WEIGHTS, FEATURES, CLIENTS, SAMPLES, ROUNDS, SEEDS = 256, 64, 10, 16, 60, (1, 2, 3)
# Means and scales of an image's channels, in grey levels: x, the client's number, a; or the features.
_X, _NUMBER, _CURVATURE = (128, 32), (0, 1), (0, 64)
_OFFSET = 1.0  # keeps the loss of a sample above 0, where cross-entropy lies


class Quadratic(nn.Module):
    """Logits whose cross-entropy is the quadratic loss of the sample: the own class gets probability exp(-loss)."""

    def __init__(self, in_channels: int, image_size: tuple[int, int], classes: int) -> None:
        super().__init__()
        self.point = nn.Linear(image_size[1], 1, bias=False)
        self.classes = classes
        nn.init.zeros_(self.point.weight)

    def forward(self, images: Tensor) -> Tensor:
        x, number, curvature = images[:, :, 0].unbind(1)
        loss = _OFFSET + 0.5 * (curvature * (self.point.weight - x).square()).sum(1)
        own = number[:, :1].round().long().clamp(0, self.classes - 1)
        logit = float(np.log(self.classes - 1)) - (loss + torch.log(-torch.expm1(-loss)))
        return torch.zeros(len(images), self.classes).scatter(1, own, logit[:, None])


class Logistic(nn.Module):
    """Logistic regression; both classes begin at 0, so that their weights stay opposite."""

    def __init__(self, in_channels: int, image_size: tuple[int, int], classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(image_size[1], classes)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1))


def quadratic(given: DataConfig, seed: int) -> Dataset:
    """Client k is class k; `data.path` holds the heterogeneity and the spread of the mean curvatures (1: all equal)."""
    heterogeneity, spread = (float(word) for word in str(given.path).split())
    draw = stream(seed, "quadratic")
    optimum = 3 * np.exp(-4.6 * draw.permutation(WEIGHTS) / WEIGHTS) * draw.choice([-1, 1], WEIGHTS)
    mean_curvature = spread ** -draw.random(WEIGHTS)
    shift = draw.normal(size=(CLIENTS, 1, WEIGHTS)) * 0.5 * heterogeneity
    curvature = mean_curvature * np.exp(0.5 * heterogeneity * draw.normal(size=(CLIENTS, 1, WEIGHTS)))
    x = optimum + shift - shift.mean(0) + 0.25 * draw.normal(size=(CLIENTS, SAMPLES, WEIGHTS))
    number = np.arange(CLIENTS)[:, None, None]
    planes = [
        np.broadcast_to(np.rint(value * scale + mean), x.shape)
        for value, (mean, scale) in ((x, _X), (number, _NUMBER), (curvature, _CURVATURE))
    ]
    planes[2] = np.maximum(planes[2], 1)
    labels = np.repeat(np.arange(CLIENTS), SAMPLES)
    return _dataset(np.stack(planes, 2), labels, CLIENTS, (_X, _NUMBER, _CURVATURE), "quadratic")


def logistic(given: DataConfig, seed: int) -> Dataset:
    """Two overlapping normal distributions whose difference lies in a few features."""
    draw = stream(seed, "logistic")
    labels = np.repeat(np.arange(2), CLIENTS * SAMPLES // 2)
    direction = np.exp(-6 * draw.permutation(FEATURES) / FEATURES) * draw.choice([-1, 1], FEATURES)
    x = draw.normal(size=(len(labels), FEATURES)) + np.where(labels, 1, -1)[:, None] * 0.7 * direction
    return _dataset(np.rint(x * 32 + 128)[:, None], labels, 2, (_X,), "logistic")


def _dataset(pixels: np.ndarray, labels: np.ndarray, classes: int, planes: Any, name: str) -> Dataset:
    """Pixels [..., C, W] as a data set whose test images are a few of the training images."""
    images = np.ascontiguousarray(pixels.reshape(len(labels), len(planes), 1, -1).clip(0, 255).astype(np.uint8))
    mean, std = (tuple(value / 255 for value in values) for values in (  # a pixel is (p - mean) / scale
        [mean for mean, _ in planes], [scale for _, scale in planes]
    ))  # fmt: skip
    labels = labels.astype(np.int64)
    return Dataset(images, labels, images[:4], labels[:4], classes, (), mean, std, name, name)


@dataclass(frozen=True)
class Truth:
    """The objective in float64, as the program sees the samples. Vectors are float64 [n], prunable weights first."""

    built: Federation

    @cached_property
    def _samples(self) -> tuple[np.ndarray, np.ndarray]:
        data = self.built.train_data
        return data.normalised(data.images).double().numpy()[:, :, 0], data.labels.numpy()


class QuadraticTruth(Truth):
    """Separable: curvature H [n] and optimum [n] say all."""

    @cached_property
    def curvature(self) -> np.ndarray:
        return self._samples[0][:, 2].mean(0)

    @cached_property
    def optimum(self) -> np.ndarray:
        x, _, a = self._samples[0].transpose(1, 0, 2)
        return (a * x).mean(0) / a.mean(0)

    def best(self, keep: int) -> np.ndarray:
        """The best solution with `keep` weights: those whose removal costs most."""
        cost = torch.from_numpy(self.curvature * self.optimum**2)
        return np.where(masks.select_largest(cost, keep).numpy(), self.optimum, 0.0)

    def on(self, mask: np.ndarray) -> np.ndarray:
        """The optimum among the points that are 0 outside a mask."""
        return np.where(mask, self.optimum, 0.0)

    def gap(self, point: np.ndarray) -> float:
        """F(point) - min F."""
        return float(0.5 * (self.curvature * (point - self.optimum) ** 2).sum())


class LogisticTruth(Truth):
    """Newton's method; `weight_decay` is the l2 penalty mu / 2 ||w||^2."""

    @cached_property
    def optimum(self) -> np.ndarray:
        return self.on(np.ones(2 * FEATURES, bool))

    def on(self, mask: np.ndarray) -> np.ndarray:
        """As of QuadraticTruth, to a gradient of 1e-13."""
        free = np.concatenate([mask, np.ones(2, bool)])
        point = np.zeros(len(free))
        for _ in range(50):
            _, gradient, hessian = self._at(point)
            if np.abs(gradient[free]).max() < 1e-13:
                return point
            point[free] -= np.linalg.solve(hessian[np.ix_(free, free)], gradient[free])
        raise ArithmeticError("Newton's method did not end")

    def gap(self, point: np.ndarray) -> float:
        return self._at(point)[0] - self._at(self.optimum)[0]

    def _at(self, point: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Value, gradient and Hessian; the difference of the two classes' logits is what the loss depends on."""
        x, labels = self._samples[0][:, 0], self._samples[1]
        rows = np.concatenate([-x, x, -np.ones((len(x), 1)), np.ones((len(x), 1))], axis=1)
        margin, decay = rows @ point, self.built.config.weight_decay
        sign = 2 * labels - 1
        value = np.logaddexp(0, -sign * margin).mean() + decay / 2 * (point**2).sum()
        probability = 1 / (1 + np.exp(-margin))
        gradient = rows.T @ (probability - labels) / len(x) + decay * point
        weighted = rows * (probability * (1 - probability))[:, None]
        return float(value), gradient, weighted.T @ rows / len(x) + decay * np.eye(len(point))


def settings(problem: str, seed: int, changes: dict[str, Any]) -> Config:
    """The configuration of a cell; `changes` are dotted keys, or the `heterogeneity` and `spread` of the quadratic."""
    changes = dict(changes)
    values: dict[str, Any] = {
        "seed": seed, "rounds": ROUNDS, "clients": CLIENTS, "participants": CLIENTS, "local_epochs": 1, "batch_size": 8,
        "learning_rate": 0.2, "learning_rate_decay": 0.97, "weight_decay": 0.0, "penalty": {"schedule": "off"},
        "upload": {"values": "fp32"}, "sparsity": {"initial": 0.0, "final": 0.0}, "eval": {"every": 10**6}, "device": "cpu",
        "model": {"name": f"{_module()}:{problem.capitalize()}"}, "data": {"name": f"{_module()}:{problem}"},
    }  # fmt: skip
    if problem == "quadratic":
        path = f"{changes.pop('heterogeneity', 1.0)} {changes.pop('spread', 2.0)}"
        values["data"] |= {"partition": "pathological", "classes_per_client": 1, "path": path}
    else:
        values |= {"weight_decay": 0.05, "learning_rate": 0.5}
        values["data"] |= {"partition": "dirichlet", "alpha": 0.5}
    for key, value in changes.items():
        *above, last = key.split(".")
        section = values
        for name in above:
            section = section.setdefault(name, {})
        section[last] = value
    return config.validate(values)


def _module() -> str:
    return Path(__file__).stem  # not __name__: as a script this module is __main__


@dataclass(frozen=True)
class Curve:
    """A run; the lists have one value a round.

    Attributes:
        distance: ||m*W - w||^2 / ||w||^2, w the best solution with as many weights as asked at the end (quadratic) or
            the optimum on the mask of the round (logistic).
        gap: F(m*W) - min F over all points, sparse or not.
        overlap: share of the best solution's weights that the mask keeps (quadratic).
        best_gap: of the best solution (quadratic), of the optimum on the last mask (logistic).
        squared_norm: ||W||^2 over the prunable weights; times the recorded pruning error it is ||W - m*W||^2 where W is
            the server's dense memory.
        records: what the rounds recorded.
    """

    distance: list[float]
    gap: list[float]
    overlap: list[float]
    best_gap: float
    squared_norm: list[float]
    records: list[metrics.Record]


def play(comm: Communicator, problem: str, seed: int, changes: dict[str, Any]) -> Curve:
    """Play all rounds of a cell."""
    built = federation.build(settings(problem, seed, changes), comm, torch.device("cpu"))
    state, size = rounds.initial_state(built), built.layout.prunable
    truth = QuadraticTruth(built) if problem == "quadratic" else LogisticTruth(built)
    keep = masks.kept_count(size, built.config.sparsity.final)
    goal = truth.best(keep) if isinstance(truth, QuadraticTruth) else truth.optimum
    distance, gap, overlap, squared_norm, records = [], [], [], [], []
    known = None
    for t in range(built.config.rounds):
        records.append(rounds.play(built, state, plan_round(built.config, t)))
        mask = state.server.mask.numpy()
        point = state.server.weights.double().numpy().copy()
        squared_norm.append(float((point[:size] ** 2).sum()))
        point[:size][~mask] = 0
        if isinstance(truth, LogisticTruth) and (known is None or (known != mask).any()):
            known, goal = mask.copy(), truth.on(mask)
        distance.append(float(((point - goal) ** 2).sum() / (goal**2).sum()))
        gap.append(truth.gap(point))
        overlap.append(float(mask[goal[:size] != 0].mean()))
    return Curve(distance, gap, overlap, truth.gap(goal), squared_norm, records)


_INT4, _CONSTANT = {"upload.values": "int4"}, {"learning_rate_decay": 1.0}
_PARTIAL = {**_INT4, "participants": CLIENTS // 2, "sparsity.final": 0.5}


def _residual(policy: str) -> dict[str, Any]:
    return {"upload.residual": policy}


def _pruned(sparsity: float, start: str, **changes: Any) -> dict[str, Any]:
    """`start`: "none" begins dense; "uniform" with a random mask of the final sparsity."""
    first = 0.0 if start == "none" else sparsity
    return {"sparsity.final": sparsity, "sparsity.initial": first, "mask.initial": start, **changes}


# Title of a panel: the problem, and the changes of each of its cells.
PANELS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "Quadratic, dense: what travels": ("quadratic", {
        "fp32": {},
        "int8, keep": {"upload.values": "int8"},
        "int8, drop": {"upload.values": "int8", **_residual("drop")},
        "int4, keep": _INT4,
        "int4, drop": {**_INT4, **_residual("drop")},
        "int4, ef21": {**_INT4, **_residual("ef21")},
    }),
    "Quadratic, dense: constant step": ("quadratic", {
        "fp32": _CONSTANT,
        "fp32, equal clients": {**_CONSTANT, "heterogeneity": 0.0},
        "int4, keep": {**_CONSTANT, **_INT4},
        "int4, drop": {**_CONSTANT, **_INT4, **_residual("drop")},
    }),
    "Quadratic, s = 0.5, int4, 5 of 10 clients": ("quadratic", {
        name: {**_PARTIAL, **_residual(name)} for name in ("keep", "decay", "in_mask_only", "drop", "ef21")
    }),
    "Quadratic, pruned: feedback": ("quadratic", {
        "s 0.5, random mask, on": _pruned(0.5, "uniform"),
        "s 0.5, random mask, off": _pruned(0.5, "uniform", feedback=False),
        "s 0.9, random mask, on": _pruned(0.9, "uniform"),
        "s 0.9, random mask, off": _pruned(0.9, "uniform", feedback=False),
        "s 0.9, random mask, on, regrow 0.5": _pruned(0.9, "uniform", **{"upload.regrow": 0.5}),
        "s 0.9, random mask, on, dense upload": _pruned(0.9, "uniform", **{"upload.mode": "dense"}),
        "s 0.9, dense start, on": _pruned(0.9, "none"),
        "s 0.9, dense start, off": _pruned(0.9, "none", feedback=False),
    }),
    "Logistic": ("logistic", {
        "fp32": {},
        "int4, keep": _INT4,
        "int4, drop": {**_INT4, **_residual("drop")},
        "int4, ef21": {**_INT4, **_residual("ef21")},
        "s 0.9, random mask, on": _pruned(0.9, "uniform"),
        "s 0.9, random mask, off": _pruned(0.9, "uniform", feedback=False),
    }),
}  # fmt: skip


def measure(comm: Communicator) -> dict[str, Any]:
    """All cells of all panels: last values of every seed, and the curves as medians and extremes over the seeds."""
    found: dict[str, Any] = {}
    for title, (problem, cells) in PANELS.items():
        for name, changes in cells.items():
            started = time.process_time()
            curves = [play(comm, problem, seed, changes) for seed in SEEDS]
            distances = np.array([curve.distance for curve in curves])
            last = [curve.records[-1] for curve in curves]
            found.setdefault(title, {})[name] = row = {
                "changes": changes,
                "distance": distances[:, -1].tolist(),
                "gap": [curve.gap[-1] for curve in curves],
                "best_gap": [curve.best_gap for curve in curves],
                "overlap": [curve.overlap[-1] for curve in curves],
                "pruning_error": [record["pruning_error"] for record in last],
                "update_norm": [record["update_norm"] for record in last],
                "residual_norm": [record["residual_norm"] for record in last],
                "upload_bytes": [sum(record["upload_bytes"] for record in curve.records) for curve in curves],
                "curve": {
                    "median": np.median(distances, 0).tolist(),
                    "lowest": distances.min(0).tolist(),
                    "highest": distances.max(0).tolist(),
                },
            }
            print(
                f"{title} | {name} | distance {_spread(row['distance'])} | gap {_spread(row['gap'])} (best "
                f"{_spread(row['best_gap'])}) | overlap {_spread(row['overlap'])} | delta "
                f"{_spread(row['pruning_error'])} | {time.process_time() - started:.1f} s",
                flush=True,
            )
    return found


def _spread(values: list[float]) -> str:
    return f"{np.median(values):.2g} ({min(values):.2g} to {max(values):.2g})"


def draw(found: dict[str, Any], path: Path) -> None:
    """A panel for each of PANELS: medians over the seeds, shaded from the lowest to the highest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    for axis, (title, cells) in zip(axes, found.items(), strict=False):
        for i, (name, row) in enumerate(cells.items()):
            curve, at = row["curve"], range(1, len(row["curve"]["median"]) + 1)
            style = "--" if name.endswith(("drop", "off")) else "-"
            axis.plot(at, curve["median"], style, color=f"C{i}", label=name)
            axis.fill_between(at, curve["lowest"], curve["highest"], color=f"C{i}", alpha=0.15, linewidth=0)
        axis.set(title=title, yscale="log", xlabel="round")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)  # below: no curve is hidden
    for axis in axes[len(found) :]:
        axis.set_axis_off()
    for axis in axes[::3]:
        axis.set_ylabel("squared distance to the optimum, relative")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of convergence.json and convergence.png")
    given = parser.parse_args()
    torch.set_num_threads(1)
    comm = collectives.world()
    started = time.process_time()
    found = measure(comm)
    result = {
        "command": "python -m mpi4py benchmarks/convergence.py --out docs/results",
        "seeds": list(SEEDS),
        "rounds": ROUNDS,
        "processor_seconds": round(time.process_time() - started, 1),
        "hardware": {name: value for name, value in runtime.hardware().items() if name != "host"},
        "versions": runtime.versions(),
        "mpi": comm.library(),
        "panels": found,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "convergence.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(found, given.out / "convergence.png")
    comm.free()


if __name__ == "__main__":
    main()
