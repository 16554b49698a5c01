"""Seconds a round by phase of a scaling study, from the metrics of its runs, as CSV.

python jobs/collect.py runs/scaling --warm-up 2 --out runs/scaling/scaling.csv

Reads STUDY/KIND-RANKS/metrics.jsonl (KIND: strong or weak). Each time is the median over the rounds after the warm-up.
speed_up = t(fewest ranks) / t(ranks) for strong, with the rounds' work taken into account for weak: in both it is the gain
in samples a second. efficiency = speed_up x fewest ranks / ranks. Nothing but the standard library is needed.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(run: Path, warm_up: int) -> Row | None:
    """One run in a line: medians of everything that its metrics call seconds; None while it has too few rounds."""
    with open(run / "metrics.jsonl", encoding="utf-8") as lines:
        rounds = [json.loads(line) for line in lines if line.endswith("\n")][warm_up:]
    if not rounds:
        return None
    kind, _, ranks = run.name.partition("-")
    seconds = [name for name in rounds[0] if name.endswith("_seconds")]
    medians = {name: statistics.median(line[name] for line in rounds) for name in seconds}
    speed = statistics.median(line["samples"] / line["round_seconds"] for line in rounds)
    row = {"kind": kind, "ranks": int(ranks), "rounds": len(rounds), "participants": len(rounds[-1]["participants"])}
    return row | {"samples_per_second": speed} | medians | {"wire_bytes": rounds[-1]["wire_bytes"]}


def compare(rows: Sequence[Row]) -> list[Row]:
    """The rows of one kind, with speed-up and efficiency against the fewest ranks."""
    ordered = sorted(rows, key=lambda row: row["ranks"])
    first = ordered[0]
    compared = []
    for row in ordered:
        gain = row["samples_per_second"] / first["samples_per_second"]
        compared.append(row | {"speed_up": gain, "efficiency": gain * first["ranks"] / row["ranks"]})
    return compared


def main() -> int:
    """Returns 1 if the study has nothing to show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--warm-up", type=int, default=2, help="first rounds that do not count (2)")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows: list[Row] = []
    for kind in ("strong", "weak"):
        runs = [path.parent for path in options.study.glob(f"{kind}-*/metrics.jsonl")]
        whole = [run for run in runs if re.fullmatch(r"\w+-\d+", run.name)]  # not what was moved out of the way
        found = [row for run in whole if (row := read(run, options.warm_up))]
        rows += compare(found) if found else []
    if not rows:
        print(f"{options.study}: no run has more than {options.warm_up} rounds", file=sys.stderr)
        return 1
    with open(options.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    print(f"{options.out}: {len(rows)} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
