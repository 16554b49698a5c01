"""One rank with eight clients, two with four, four with two, either MPI library: the same bits."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs

pytestmark = pytest.mark.mpi

NORMALISED = {"model__name": "small_models:normalised", "data__synthetic__shape": [3, 8, 8]}
INT4 = {"upload__values": "int4", "upload__rounding": "stochastic", "upload__regrow_rounds": "all"}
# One run each; between them every way in which ranks could matter.
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "int4": INT4,
    "int4 sharded": {**INT4, "exchange": "sharded"},
    "int4 node": {**INT4, "exchange": "node"},
    "int4 auto": {**INT4, "exchange": "auto", "network__latency": 30},
    "int4 at once": {**INT4, "overlap": False},
    "int4 sharded at once": {**INT4, "exchange": "sharded", "overlap": False},
    "ef21": {"upload__residual": "ef21", "upload__values": "int8", "exchange": "sharded"},
    "ef21 allgatherv": {"upload__residual": "ef21", "upload__values": "int8"},
    "download": {"upload__values": "int8", "upload__entropy": "zstd", "exchange": "sharded", "download__values": "int8"},
    "batch norm": {**NORMALISED, "data__augment": "standard", "learning_rate": 0.3, "upload__regrow_rounds": "all",
                   "sparsity__initial": 0.8},
    "dirichlet": {"data__partition": "dirichlet", "data__alpha": 0.3, "eval__clients": True, "eval__every": 2},
    "snip": {"mask__initial": "snip", "server_memory": "off", "upload__residual": "in_mask_only", "participants": 3,
             "upload__values": "bf16"},
    "snip dropout": {"mask__initial": "snip", "model__name": "small_models:dropping"},
    "published": {"server_memory": "published", "upload__residual": "decay", "participants": 8, "rounds": 4},
    "one client": {**NORMALISED, "participants": 1, "upload__values": "bf16", "feedback": False,
                   "upload__regrow_rounds": "all"},
    "quantity": {"data__partition": "quantity", "upload__mode": "dense_at_mask_updates", "upload__values": "int8",
                 "mask__allocation": "lamp"},
    "fedavg": {"method": "fedavg", "upload__values": "fp16"},
    # What travels besides updates: votes, squared gradients, saliencies before the first round.
    "feddst": {"method": "feddst", "exchange": "sharded"},
    "prunefl": {"method": "prunefl", "data__partition": "dirichlet", "exchange": "sharded"},
    "ssfl": {"method": "ssfl", "upload__values": "int8"},
    "sparsyfed": {"method": "sparsyfed", "overlap": False},
    "fedrts": {"method": "fedrts", "data__partition": "dirichlet"},
    "by speed": {**INT4, "balance": "speed"},
    "side by side": {**INT4, "clients_at_once": 2},
    "bf16": {**INT4, "precision": "bf16", "upload__residual_values": "bf16", "upload__residual_memory": 0},
    # Ranks that wait evaluate the model of the round before, but at checkpoints.
    "waiting": {"participants": 3, "eval__clients": True},
    "waiting at the end": {"participants": 3, "eval__clients": True, "eval__overlap": False},
    "fedprox": {"method": "fedprox", "proximal": 0.5, "data__partition": "pathological", "upload__values": "fp32"},
}  # fmt: skip
# By a case, those that say otherwise who works and what travels: they end in the same state.
EQUAL = {
    "int4": (
        "int4 sharded", "int4 node", "int4 auto", "int4 at once", "int4 sharded at once", "by speed", "side by side",
    ),
    "ef21": ("ef21 allgatherv",),
    "waiting": ("waiting at the end",),
}  # fmt: skip
# What a case is there for besides its method: without this key it ends in another model.
PURPOSES = (
    ("bf16", "precision"),
    ("bf16", "upload__residual_values"),
    ("batch norm", "data__augment"),
    ("one client", "feedback"),
    ("one client", "upload__values"),
    ("quantity", "mask__allocation"),
)
LAYOUTS = {"1": (1, "default"), "2": (2, "default"), "4": (4, "default"), "mpich": (2, "mpich")}
# Four ranks, two of them taken for a node: whole runs in which leaders of nodes speak for the others.
NODES = ("int4", "int4 node", "int4 auto", "ef21", "download")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of all cases by layout, filled when a test asks."""
    return {layout: tmp_path_factory.mktemp(layout) for layout in LAYOUTS}


def train_all(trained: dict[str, Path], layout: str) -> Path:
    """All cases in one launch; once per layout."""
    folder = trained[layout]
    if not (folder / "results").exists():
        config = folder / "empty.yaml"
        config.write_text("")
        steps = [{"argv": runs.train(config, folder / name, **changes)} for name, changes in CASES.items()]
        ranks, library = LAYOUTS[layout]
        for name, reports in zip(CASES, runs.play(steps, folder, ranks, library), strict=True):
            assert [r["code"] for r in reports] == [0] * ranks, (name, reports)
    return folder


@pytest.mark.parametrize("layout", ["2", "4", "mpich"])
def test_ranks_and_library_change_no_bit(trained: dict[str, Path], layout: str) -> None:
    one, other = train_all(trained, "1"), train_all(trained, layout)
    for name in CASES:
        runs.assert_equal(one / name, other / name)


def test_the_runs_are_worth_comparing(trained: dict[str, Path]) -> None:
    """Otherwise equality would say nothing: something is learnt, masks move, residuals exist, models differ."""
    folder = train_all(trained, "1")
    found = {name: runs.contents(runs.newest(folder / name)) for name in CASES}
    for name, content in found.items():
        # FedProx sends everything as float32: nothing is left to remember.
        assert any(key.startswith("clients/") for key in content) == (name != "fedprox"), name
    learnt = runs.lines(folder / "batch norm")
    assert learnt[-1]["train_loss"] < learnt[0]["train_loss"] - 0.03
    assert sum(line["mask_grown"] for line in learnt) > 0
    different = CASES.keys() - {name for others in EQUAL.values() for name in others}
    for one, other in itertools.combinations(sorted(different), 2):
        assert model(found[one]) != model(found[other]), (one, other)
    statistics = [np.frombuffer(v[2], "<f4") for k, v in found["batch norm"].items() if k.endswith("running_mean")]
    assert statistics and all(mean.all() for mean in statistics)
    assert any(key == "server/reference" for key in found["ef21"])
    assert any(key == "server/owed" for key in found["download"])


def model(content: dict[str, Any]) -> dict[str, Any]:
    """The network of a checkpoint: its tensors and their masks."""
    found = {name: array for name, array in content.items() if name.startswith("model/")}
    assert found
    return found


def test_what_a_case_is_there_for_is_seen(trained: dict[str, Path], tmp_path: Path) -> None:
    folder, config = train_all(trained, "1"), tmp_path / "empty.yaml"
    config.write_text("")
    twins = [{key: value for key, value in CASES[name].items() if key != purpose} for name, purpose in PURPOSES]
    steps = [{"argv": runs.train(config, tmp_path / str(n), **changes)} for n, changes in enumerate(twins)]
    for n, ((name, purpose), reports) in enumerate(zip(PURPOSES, runs.play(steps, tmp_path, 1), strict=True)):
        assert [r["code"] for r in reports] == [0], (name, reports)
        one, twin = (model(runs.contents(runs.newest(run))) for run in (folder / name, tmp_path / str(n)))
        assert one.keys() == twin.keys() and one != twin, f"{name} is the same without {purpose}"


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_the_exchange_changes_no_bit(trained: dict[str, Path], layout: str) -> None:
    folder = train_all(trained, layout)
    for base, others in EQUAL.items():
        ours = runs.contents(runs.newest(folder / base))
        for other in others:
            theirs = runs.contents(runs.newest(folder / other))
            differing = [name for name in ours if name != "config" and ours[name] != theirs[name]]
            assert not differing, (other, differing)
            assert ours["config"] != theirs["config"]


def test_ranks_that_wait_are_told(trained: dict[str, Path]) -> None:
    """One client a round: one of four ranks trains, three wait."""
    run = train_all(trained, "4") / "one client"
    lines = runs.lines(run)
    for line in lines:
        assert line["wait_seconds"] / 4 < line["idle_seconds"] <= line["wait_seconds"] <= line["round_seconds"]
    waited, whole = (sum(line[name] for line in lines) for name in ("idle_seconds", "round_seconds"))
    assert waited > 0.5 * sum(line["wait_seconds"] for line in lines)
    # The last record's seconds end with the last checkpoint, which the summary's do too.
    assert json.loads((run / "finished.json").read_text())["idle_share"] == pytest.approx(waited / whole)


@pytest.mark.parametrize("layout", ["1", "2", "4"])
def test_ranks_that_wait_evaluate_the_round_before(trained: dict[str, Path], layout: str) -> None:
    """Rounds 2, 4 and 5 are saved and scored at their end, 1 and 3 in rounds 2 and 4: their scores travel there."""
    folder, ranks = train_all(trained, layout), LAYOUTS[layout][0]
    later, at_once = (runs.lines(folder / name) for name in ("waiting", "waiting at the end"))
    scores = ranks * (8 * 7 + 200)  # a loss for each batch of 32 images, a byte for each image
    moved = [own["control_bytes"] - other["control_bytes"] for own, other in zip(later, at_once, strict=True)]
    assert moved == ([0] * 5 if ranks == 1 else [-scores, scores, -scores, scores, 0])


def test_whole_runs_over_two_nodes_change_no_bit(trained: dict[str, Path], tmp_path: Path) -> None:
    folder, config = train_all(trained, "1"), tmp_path / "empty.yaml"
    config.write_text("")
    steps = [{"argv": runs.train(config, tmp_path / name, **CASES[name])} for name in NODES]
    for name, reports in zip(NODES, runs.play(steps, tmp_path, 4, extra={"FEDDIP_RANKS_PER_NODE": "2"}), strict=True):
        assert [r["code"] for r in reports] == [0] * 4, (name, reports)
        runs.assert_equal(folder / name, tmp_path / name)
    for own, alone in zip(runs.lines(tmp_path / "int4 node"), runs.lines(tmp_path / "int4"), strict=True):
        # The leaders send what is on their node once; without nodes every rank sends its own.
        assert own["wire_bytes"] == alone["wire_bytes"] and own["received_bytes"] < alone["received_bytes"]


FRAME = 56  # bytes around a message, whatever it carries


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_bytes_on_the_wire_are_the_frames_and_their_lengths(trained: dict[str, Path], layout: str) -> None:
    folder = train_all(trained, layout)
    ranks = LAYOUTS[layout][0]
    for name, changes in CASES.items():
        for line in runs.lines(folder / name):
            # wire_bytes is counted at the buffers handed to MPI, upload_bytes where a client makes its frames.
            messages, extra = line["upload_frame_bytes"] // FRAME, line["upload_extra_bytes"]
            # How many messages travel besides updates is the method's matter; each has a frame and a length.
            counts = range(messages + 1, messages + extra // FRAME + 1) if extra else [messages]
            handed_on = sum(line[f"download_{kind}_bytes"] for kind in ("values", "indices", "other", "frame"))
            regrow = messages > len(line["participants"]) or extra
            if changes.get("exchange") == "node":  # all ranks are on one node, which shares its memory
                assert line["wire_bytes"] == 8 * messages and handed_on == 0, name
            elif changes.get("exchange") == "auto":
                assert line["wire_bytes"] >= 8 * messages
            elif changes.get("exchange") != "sharded":
                assert line["wire_bytes"] - line["upload_bytes"] in [8 * count for count in counts], name
                assert handed_on == 0
            elif not regrow and "entropy" not in str(changes):
                # Cut for the owners, a message has a frame for each; what they hand on has its lengths too.
                cut = line["upload_bytes"] + messages * ((ranks - 1) * FRAME + 8 * ranks)
                assert line["wire_bytes"] == cut + (handed_on + 8 * ranks if ranks > 1 else 0), name
            if changes.get("exchange") in (None, "allgatherv"):
                assert line["received_bytes"] == (ranks - 1) * line["wire_bytes"], name
            assert line["ranks"] == ranks
            if ranks == 1:
                assert line["residual_bytes"] == line["received_bytes"] == 0
