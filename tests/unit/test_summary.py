"""The summary of a run, every number of it made again from the records."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from alone import Alone
from test_methods import build

from feddip_mpi import metrics, runtime, summary
from feddip_mpi.federation import Federation
from feddip_mpi.metrics import KINDS_OF_BYTES, Record

ROUNDS = 9


class Job(Alone):
    size = 3
    lost_ranks = (2,)

    def library(self) -> str:
        return "Some MPI v1"


def federated(method: str, **values: Any) -> Federation:
    return dataclasses.replace(build(method, **values), comm=Job())  # type: ignore[arg-type]


def history() -> list[Record]:
    """Records of rounds that have no number in common; the last but one was not evaluated."""
    draw = np.random.default_rng(3)
    records: list[Record] = []
    for number in range(1, ROUNDS + 1):
        record: Record = {name: int(draw.integers(100, 10**6)) for name, f in metrics.FIELDS.items() if f.kind == "int"}
        record |= {name: float(draw.random()) for name, f in metrics.FIELDS.items() if f.kind == "float"}
        record |= {"round": number, "sparsity_by_layer": {"conv.weight": draw.random(), "out.weight": draw.random()}}
        record["upload_bytes"] = sum(record[f"upload_{kind}_bytes"] for kind in (*KINDS_OF_BYTES, "extra"))
        records.append(record)
    records[-2]["test_accuracy"] = None
    return records


def summarised(built: Federation, records: list[Record], kept: int = 9) -> dict[str, Any]:
    return summary.summarise(built, records, 0.75, 0.875, torch.arange(built.layout.prunable) < kept)


def test_the_summary_is_that_of_all_records() -> None:
    built, records = federated("feddip", seed=7, exchange="sharded"), history()

    def total(name: str) -> Any:
        return pytest.approx(sum(record[name] for record in records))

    last = records[-1]
    accuracies = [records[number - 1]["test_accuracy"] for number in (4, 5, 6, 7, 9)]
    kinds = {kind: total(f"upload_{kind}_bytes") for kind in KINDS_OF_BYTES}
    handed_on = sum(record[f"download_{kind}_bytes"] for record in records for kind in KINDS_OF_BYTES)
    waited, whole = (sum(record[name] for record in records) for name in ("idle_seconds", "round_seconds"))
    expected = {
        "rounds": ROUNDS,
        "ranks": 3,
        "ranks_lost": (2,),
        "test_accuracy": 0.75,
        "test_accuracy_mean_of_last_5": pytest.approx(sum(accuracies) / 5),
        "test_accuracy_spread_of_last_5": pytest.approx(max(accuracies) - min(accuracies)),
        "evaluations_in_mean": 5,
        "server_remembers": True,
        "dense_memory_accuracy": 0.875,
        "sparsity": last["sparsity"],
        "sparsity_by_layer": last["sparsity_by_layer"],
        "upload_bytes": total("upload_bytes"),
        "dense_bytes": total("dense_bytes"),
        "exchange": "sharded",
        "upload_bytes_by_kind": kinds,
        "upload_extra_bytes": total("upload_extra_bytes"),
        "download_bytes": handed_on,
        "wire_bytes": total("wire_bytes"),
        "received_bytes": total("received_bytes"),
        "seconds": total("round_seconds"),
        "idle_share": pytest.approx(waited / whole),
        "peak_host_memory_bytes": max(record["host_memory_bytes"] for record in records),
        "versions": runtime.versions(),
        "mpi": "Some MPI v1",
        "hardware": runtime.hardware(),
        "device": "CPU",
        "seed": 7,
    }
    assert summarised(built, records) == expected and list(expected) == list(summary.FIELDS)


def test_the_mean_is_of_the_evaluations_that_there_were() -> None:
    built, records = federated("feddip"), history()
    found = summarised(built, records[-3:])
    first, last = records[-3]["test_accuracy"], records[-1]["test_accuracy"]
    assert found["test_accuracy_mean_of_last_5"] == pytest.approx((first + last) / 2)
    assert found["test_accuracy_spread_of_last_5"] == pytest.approx(abs(first - last))
    assert found["evaluations_in_mean"] == 2
    alone = summarised(built, records[-2:-1])
    assert (alone["test_accuracy_mean_of_last_5"], alone["evaluations_in_mean"]) == (0.75, 1)


@pytest.mark.parametrize(
    ("method", "memory", "kept", "remembers"),
    [("feddip", "on", 9, True), ("feddip", "on", 10**6, False), ("feddip", "off", 9, False), ("erk", "on", 9, False)],
)
def test_a_server_remembers_where_it_keeps_what_is_pruned(method: str, memory: str, kept: int, remembers: bool) -> None:
    found = summarised(federated(method, server_memory=memory), history(), kept)
    assert found["server_remembers"] is remembers


def test_what_a_checkpoint_of_an_older_version_lacks_is_no_zero() -> None:
    built, records = federated("feddip"), history()
    records[0] |= {"idle_seconds": None, **{f"download_{kind}_bytes": None for kind in KINDS_OF_BYTES}}
    found, later = summarised(built, records), summarised(built, records[1:])
    assert (found["idle_share"], found["download_bytes"]) == (later["idle_share"], later["download_bytes"])
    assert found["wire_bytes"] == later["wire_bytes"] + records[0]["wire_bytes"]
    assert summarised(built, records[:1])["idle_share"] is None


def test_a_method_adds_what_it_says_of_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    built = federated("feddip")
    monkeypatch.setattr(built.method, "facts", lambda mask: {"kept": int(mask.sum())})
    assert summarised(built, history(), 5)["kept"] == 5
