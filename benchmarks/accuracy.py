"""Accuracy of the truly pruned model at the published Fashion-MNIST setting, and the ablation of the variants.

    python benchmarks/accuracy.py --out runs/accuracy [--grid main|ablation|exchange|values|tried|penalty] [--jobs 2] [--report]

Every cell is an ordinary run folder made by `feddip-mpi train` on one rank and one thread; finished cells are
skipped, so the script can be stopped and started again. At the end it writes accuracy-GRID.json into --results and
prints the table as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from feddip_mpi import config
from feddip_mpi.sweep import states

# Evaluated every second round, so "the last 5" are rounds 92, 94, .. 100.
SETTING = ["clients=50", "participants=5", "local_epochs=5", "batch_size=128", "eval.every=2", "checkpoint.every=50"]
SEEDS = (1, 2, 3)
_PRUNABLE = 61470  # prunable weights of LeNet-5
INT4 = ["upload.values=int4"]

# name: overrides on top of the program's defaults and SETTING
MAIN = {
    "fedavg": ["method=fedavg", "upload.values=fp32"],
    **{f"feddip-{s}": [f"sparsity.final={s}", *INT4] for s in ("0.9", "0.95", "0.98")},
}
_AT_095 = ["sparsity.final=0.95", *INT4]
# What the row "feddip-0.95" of MAIN becomes when one thing is changed.
ABLATION = {
    "initial mask ERK at 0.5": [*_AT_095, "mask.initial=erk"],
    "in-mask only, memory off": [*_AT_095, "server_memory=off", "upload.regrow=0", "upload.residual=in_mask_only"],
    "in-mask only, memory on": [*_AT_095, "upload.regrow=0", "upload.residual=in_mask_only"],
    "no freeze": [*_AT_095, "mask.freeze_after=1.0"],
    "regrow 0.1": [*_AT_095, "upload.regrow=0.1"],
    "regrow 0.5": [*_AT_095, "upload.regrow=0.5"],
    "residual dropped": [*_AT_095, "upload.residual=drop"],
    "no penalty": [*_AT_095, "penalty.schedule=off"],
    "fp32 values": [*_AT_095, "upload.values=fp32"],
    "dense upload": [*_AT_095, "upload.mode=dense", "upload.values=fp32"],
    "published rule": [
        *_AT_095, "server_memory=published", "upload.mode=dense", "upload.values=fp32", "penalty.schedule=published",
        "mask.freeze_after=1.0", "mask.initial=erk",
    ],
    "residual decays 0.9": [*_AT_095, "upload.residual=decay"],
    "regrow in all rounds": [*_AT_095, "upload.regrow_rounds=all"],
    "no feedback": [*_AT_095, "feedback=off"],
}  # fmt: skip
# What travels: one thing changed from int4 values, regrow of 2 % of the kept weights, residuals kept.
_SPARSITIES = ("0.95", "0.98", "0.9", "0.99")
_EXCHANGE = {
    "default": [],
    "fp32": ["upload.values=fp32"],
    "int8": ["upload.values=int8"],
    "ef21": ["upload.residual=ef21"],
    "drop": ["upload.residual=drop"],
    "no regrow": ["upload.regrow=0"],
    "regrow 0.1": ["upload.regrow=0.1"],
    "in mask only": ["upload.residual=in_mask_only"],
    "decay": ["upload.residual=decay"],
    "regrow 0.5": ["upload.regrow=0.5"],
    "zstd": ["upload.entropy=zstd"],
}
EXCHANGE = {
    f"{variant} at {s}": [f"sparsity.final={s}", *INT4, *changes]
    for variant, changes in _EXCHANGE.items()
    for s in (_SPARSITIES if variant != "zstd" else ("0.95",))
    # The default at the other sparsities is in MAIN, with three seeds; zstd changes no bit but the bytes.
    if variant != "default" or s == "0.99"
}
# float32 beside int4 (MAIN) with equal regrow: three seeds, of which EXCHANGE has the first.
VALUES = {"fp32 at 0.95": EXCHANGE["fp32 at 0.95"], "default at 0.99": EXCHANGE["default at 0.99"]}
# What was tried to lose less at 0.95 and 0.98: how weights are shared among the layers, learning rate, regularisation.
_AT_098 = ["sparsity.final=0.98", *INT4]
_DENSE = ["method=fedavg", "upload.values=fp32"]
TRIED = {
    **{f"erk at {s}": [f"sparsity.final={s}", *INT4, "mask.allocation=erk"] for s in ("0.9", "0.95", "0.98", "0.99")},
    **{f"lamp at {s}": [f"sparsity.final={s}", *INT4, "mask.allocation=lamp"] for s in ("0.95", "0.98", "0.99")},
    "uniform at 0.98": [*_AT_098, "mask.allocation=uniform"],
    "erk, gradual at 0.98": ["sparsity.final=0.98", "mask.allocation=erk", "method=gradual", "upload.values=fp32"],
    "rate falls by 0.98 at 0.98": [*_AT_098, "learning_rate_decay=0.98"],
    "no penalty at 0.98": [*_AT_098, "penalty.schedule=off"],
    "no penalty, no weight decay at 0.98": [*_AT_098, "penalty.schedule=off", "weight_decay=0"],
    **{f"rate {rate} at 0.98": [*_AT_098, f"learning_rate={rate}"] for rate in ("0.2", "0.3", "0.5")},
    **{f"rate {rate} at 0.95": [*_AT_095, f"learning_rate={rate}"] for rate in ("0.2", "0.3")},
    "rate 0.3, gradual at 0.98": ["sparsity.final=0.98", "method=gradual", "upload.values=fp32", "learning_rate=0.3"],
    **{f"rate {rate}, fedavg": [*_DENSE, f"learning_rate={rate}"] for rate in ("0.2", "0.3", "0.5")},
}
# When the penalty counts: one cut at the very end, which nothing mends afterwards, and the default's many cuts.
_PENALTIES = {
    **{f"l2 {size}": [f"penalty.maximum={size}"] for size in ("0.01", "0.03", "0.1")},
    **{f"l1 {size}": ["penalty.norm=l1", f"penalty.maximum={size}"] for size in ("0.0003", "0.001", "0.003")},
}
_ONE_CUT = [*_AT_095, "sparsity.schedule=one_shot", "mask.freeze_after=1.0"]
PENALTY = {
    "one cut, no penalty": [*_ONE_CUT, "penalty.schedule=off"],
    "one cut, l2 0.001": _ONE_CUT,
    **{f"one cut, {name}": [*_ONE_CUT, *changes] for name, changes in _PENALTIES.items()},
    "one cut, l1 0.001 in all rounds": [*_ONE_CUT, *_PENALTIES["l1 0.001"], "penalty.schedule=constant"],
    # The default and no penalty at 0.98 are in MAIN and TRIED.
    **{f"{name} at 0.98": [*_AT_098, *changes] for name, changes in _PENALTIES.items()},
}
GRIDS = {
    "main": (MAIN, SEEDS),
    "tried": (TRIED, SEEDS),
    "ablation": (ABLATION, (1, 2)),
    "exchange": (EXCHANGE, (1,)),
    "values": (VALUES, SEEDS),
    "penalty": (PENALTY, (1,)),
}


def run_cell(folder: Path, overrides: list[str], seed: int, rounds: int, train: bool = True) -> dict | None:
    """Train (or resume) one cell, or just look; its summary, or None if it is not finished."""
    empty = Path(__file__).with_name("empty.yaml")
    settings = [*SETTING, f"rounds={rounds}", f"seed={seed}", *overrides]
    finished, begun = folder / "finished.json", folder / "config.yaml"
    if begun.exists() and (differing := states.differences(config.load(begun), config.load(empty, settings))):
        raise SystemExit(f"{folder} was made with other settings ({'; '.join(differing)}): name another --out")
    if train and not finished.exists():
        command = ["resume", str(folder)]
        if not begun.exists():
            flags = [part for setting in settings for part in ("--set", setting)]
            command = ["train", str(empty), "--out", str(folder), *flags]
        log = folder.with_name(f"{folder.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "FEDDIP_PROGRESS": "plain"}
        with open(log, "a") as out:
            subprocess.run([sys.executable, "-m", "feddip_mpi", *command], stdout=out, stderr=out, env=environment)
        if not finished.exists():
            print(f"not finished: {folder.name}, see {log}", file=sys.stderr)
    return json.loads(finished.read_text()) if finished.exists() else None


def last_mask_churn(folder: Path) -> float | None:
    """Share of the kept weights newly admitted at the last mask update; None if the mask was never renewed."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    updates = [r for r in records if r["mask_updated"]]
    if not updates:
        return None
    kept = (1 - updates[-1]["sparsity"]) * _PRUNABLE
    return updates[-1]["mask_grown"] / kept


def last_cut(folder: Path) -> dict[str, float | None]:
    """What the last mask update cost: its pruning error, the accuracies of the evaluations before and after it."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    updates = [r["round"] for r in records if r["mask_updated"]]
    if not updates:
        return {}
    scored = [(r["round"], r["test_accuracy"]) for r in records if r["test_accuracy"] is not None]
    return {
        "pruning_error": next(r["pruning_error"] for r in records if r["round"] == updates[-1]),
        "accuracy_before": next((a for t, a in reversed(scored) if t < updates[-1]), None),
        "accuracy_after": next((a for t, a in scored if t >= updates[-1]), None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--grid", choices=GRIDS, default="main")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--only", help="cells whose name contains this")
    parser.add_argument("--seeds", type=int, nargs="+", help="other seeds than the grid's")
    parser.add_argument("--report", action="store_true", help="train nothing: write down what is finished")
    options = parser.parse_args()
    grid, seeds = GRIDS[options.grid]
    seeds = options.seeds or seeds
    # Seeds outermost: after a stop the grid is complete for the first seeds.
    cells = [(name, seed) for seed in seeds for name in grid if not options.only or options.only in name]

    def folder_of(name: str, seed: int) -> Path:
        return options.out / f"{name.replace(' ', '-').replace(',', '')}-seed{seed}"

    started = time.time()
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(
            pool.map(lambda c: run_cell(folder_of(*c), grid[c[0]], c[1], options.rounds, not options.report), cells)
        )
    table: dict[str, dict] = {}
    for (name, seed), summary in zip(cells, results, strict=True):
        row = table.setdefault(name, {"overrides": grid[name], "seeds": {}})
        if summary is not None:
            summary["hardware"].pop("host", None)
            row["seeds"][seed] = {
                **summary,
                "last_mask_churn": last_mask_churn(folder_of(name, seed)),
                "last_cut": last_cut(folder_of(name, seed)),
            }
    write(table, options, time.time() - started)


def merged(options: argparse.Namespace, table: dict[str, dict]) -> dict[str, dict]:
    """What the result file has already, with the cells of this call in place of the same there."""
    path = options.results / f"accuracy-{options.grid}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if (known.get("rounds"), known.get("setting")) != (options.rounds, SETTING):
        return table
    whole = {name: {**row, "seeds": {int(seed): run for seed, run in row["seeds"].items()}}
             for name, row in known["cells"].items()}  # fmt: skip
    for name, row in table.items():
        kept = whole.get(name, {"overrides": None})
        seeds = kept["seeds"] if kept["overrides"] == row["overrides"] else {}
        whole[name] = {**row, "seeds": dict(sorted({**seeds, **row["seeds"]}.items()))}
    return whole


def write(table: dict[str, dict], options: argparse.Namespace, seconds: float) -> None:
    options.results.mkdir(parents=True, exist_ok=True)
    table = merged(options, table)
    result = {"command": " ".join(["python", *sys.argv]), "rounds": options.rounds, "setting": SETTING, "cells": table}
    path = options.results / f"accuracy-{options.grid}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print("| variant | seeds | accuracy, last round | mean of the last 5 rounds | upload, MB | fewer bytes | churn |")
    print("|---|---|---|---|---|---|---|")
    for name, row in table.items():
        runs = list(row["seeds"].values())
        if runs:
            print(_row(name, list(row["seeds"]), runs))
    print(f"\n{seconds:.0f} s in this call; written to {path}")


def _row(name: str, seeds: list[int], runs: list[dict]) -> str:
    last = [r["test_accuracy"] for r in runs]
    mean5 = [r["test_accuracy_mean_of_last_5"] for r in runs]
    uploaded = statistics.mean(r["upload_bytes"] for r in runs)
    ratio = statistics.mean(r["dense_bytes"] for r in runs) / uploaded
    churn = [r["last_mask_churn"] for r in runs if r["last_mask_churn"] is not None]
    shown = f"{100 * statistics.mean(churn):.1f} %" if churn else "-"

    def spread(values: list[float]) -> str:
        return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"

    seeds_text = ", ".join(map(str, seeds))
    return (
        f"| {name} | {seeds_text} | {spread(last)} | {spread(mean5)} | {uploaded / 1e6:.1f} | {ratio:.1f} | {shown} |"
    )


if __name__ == "__main__":
    main()
