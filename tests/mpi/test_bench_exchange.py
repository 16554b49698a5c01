"""`feddip-mpi bench exchange` under launchers: what it writes, that modes agree, that wrong options end all ranks."""

import json
from pathlib import Path

import launch
import pytest

pytestmark = pytest.mark.mpi

QUICK = ("bench", "exchange", "--repeats", "1", "--seconds", "60")


def bench(out: Path, ranks: int | None, *words: str, library: str = "default", **extra: str) -> dict:
    argv = [*launch.FEDDIP, *QUICK, "--out", str(out), *words]
    done = launch.run(argv, ranks, library, 60, extra, pictures=True).expect(0)
    assert done.orphans == 0
    result: dict = json.loads((out / "exchange.json").read_text())
    assert not result["left_out"]
    return result


def digests(result: dict, *modes: str) -> set[tuple]:
    return {
        (case["sparsity"], case["values"], repeat["digest"])
        for case in result["cases"] if case["mode"] in modes for repeat in case["repeats"]
    }  # fmt: skip


def test_modes_agree_on_any_number_of_ranks(tmp_path: Path) -> None:
    """The same six clients on one rank, and on three that play two nodes."""
    words = ("--size", "3000", "--sparsity", "0.9", "--values", "fp32", "--values", "int8", "--regrow", "0.1")
    modes = ("allgatherv", "sharded", "node")
    alone = bench(tmp_path / "one", None, *words, "--clients", "6")
    spread = bench(tmp_path / "three", 3, *words, "--clients", "2", FEDDIP_RANKS_PER_NODE="2")
    assert (alone["nodes"], spread["nodes"], spread["clients"]) == (1, 2, 6)
    assert digests(spread, *modes) == digests(alone, "allgatherv", "sharded")
    assert len(digests(spread, *modes)) == 2 and spread["unchecked"] == []
    assert len(spread["cases"]) == 1 + 1 + 2 * 4
    for case in spread["cases"]:
        assert case["seconds"]["median"] > 0 and case["predicted"]["seconds"] > 0
        kinds = ("values", "indices", "other", "frame")
        for way in ("sent", "received"):
            assert case[way]["total"] == sum(case[way][kind] for kind in kinds) and min(case[way].values()) >= 0
    assert alone["networks"] == [] and spread["networks"][0]["bandwidth_bytes"] > 0
    assert (tmp_path / "three" / "exchange.png").stat().st_size > 5000


def test_bytes_are_those_of_the_buffers(tmp_path: Path) -> None:
    result = bench(tmp_path / "out", 2, "--size", "2560", "--sparsity", "0.9", "--no-overlap")
    cases = {case["mode"]: case for case in result["cases"]}
    assert cases["dense-allreduce"]["sent"]["total"] == cases["dense-allreduce"]["received"]["total"] == 4 * 2560
    pairs = cases["values+int32"]["sent"]
    assert (pairs["values"], pairs["indices"], pairs["frame"]) == (4 * 256, 4 * 256, 8)
    gathered = cases["allgatherv"]["received"]
    assert gathered["values"] == 256 + 2  # one block: its codes and its scale
    assert cases["dense"]["sent"]["total"] == 4 * 256
    assert cases["node"]["sent"] == {"total": 8, "values": 0, "indices": 0, "other": 0, "frame": 8}  # one node
    assert not result["overlap"]


def test_hardly_any_weights_and_quantised_sums(tmp_path: Path) -> None:
    words = ("--size", "1", "--sparsity", "0", "--sparsity", "0.95", "--values", "int4", "--values", "bf16", "--regrow", "5",
             "--download", "int8")  # fmt: skip
    assert bench(tmp_path / "out", 2, *words, library="mpich")["unchecked"] == []


@pytest.mark.parametrize("words, said", [
    (("--sparsity", "nan", "--clients", "0"), "--sparsity nan"),
    (("--size", "ten"), "'ten'"),
])  # fmt: skip
def test_wrong_options_are_said_once_and_end_all_ranks(words: tuple[str, ...], said: str) -> None:
    done = launch.run([*launch.FEDDIP, *QUICK, *words], 2, seconds=60).expect(2)
    assert done.text.lower().count("error: ") == 1 and said in done.text
    assert "Traceback" not in done.text and done.orphans == 0


def test_a_used_up_budget_is_said(tmp_path: Path) -> None:
    argv = [*launch.FEDDIP, "bench", "exchange", "--size", "1000", "--seconds", "1e-9", "--out", str(tmp_path / "out")]
    done = launch.run(argv, None, seconds=60).expect(0)
    assert "left out" in done.text and "sharded 0.95 int8: 0 of 5 repeats" in done.text
