"""The study's tables in the documents: what the script makes of runs, and that what is committed fits its numbers."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import made_runs
import pytest

from feddip_mpi.report import runs, summaries

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("study_documents", ROOT / "benchmarks" / "study_documents.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_documents_are_filled_between_their_marks_and_again(script: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = made_runs.study(tmp_path / "runs")
    documents = (tmp_path / "README.md", tmp_path / "docs" / "results" / "study.md")
    documents[1].parent.mkdir(parents=True)
    for path in documents:
        path.write_text("before\n<!-- study -->\nold\n<!-- end study -->\nafter\n")
    script.main([str(runs), "--root", str(tmp_path)])
    readme, study = (path.read_text() for path in documents)
    for text in (readme, study):
        assert text.startswith(("before\n<!-- study -->\n|", "before\n<!-- study -->\nlenet5"))
        assert text.endswith("<!-- end study -->\nafter\n") and "\nold\n" not in text
    assert "| FedAvg, dense | 0.720 (0.700 to 0.740) | 0.0 MB |  |" in readme
    assert "| FedDIP, fp32 | 0.560 (0.550 to 0.570) | 0.0 MB | 10 times less |" in readme
    assert "seeds 1, 2, 6 runs; CPU X, 2 cores, CPU, ranks: 1; feddip_mpi 1.0" in readme
    named = re.findall(r"\]\((study/[^)]*)\)", study)
    assert len(named) == 3 and all((documents[1].parent / name).is_file() for name in named)
    script.main([str(runs), "--root", str(tmp_path)])
    assert [path.read_text() for path in documents] == [readme, study]
    documents[0].write_text("no marks")
    with pytest.raises(SystemExit, match="README"):
        script.main([str(runs), "--root", str(tmp_path)])
    assert documents[0].read_text() == "no marks"


def test_only_accuracies_without_a_range_are_one_seeds(script: ModuleType, tmp_path: Path) -> None:
    """Bytes never have a range: those of three seeds would be said to be of one."""
    made_runs.study(tmp_path)
    keys = {"method": "gradual", "upload.values": "fp32", "sparsity.final": 0.95}
    made_runs.make(tmp_path / "gradual-1", 1, 0.6, keys=keys, sparsity=0.95)
    (family,) = summaries.families(summaries.groups(runs.find([tmp_path]).runs)).values()
    text = script.compact(family)
    assert "| gradual magnitude | 0.550 | 0.0 MB |" in text and "| 0.560 (0.550 to 0.570) | 0.0 MB |" in text
    assert text.endswith("\nAn accuracy without a range is one seed's; bytes are the mean of the seeds.\n")


def test_a_study_grows_where_its_first_runs_are_gone(script: ModuleType, tmp_path: Path) -> None:
    """Seed 1, then seed 2 alone: documents, tables and stored runs are those of both at once."""
    pytest.importorskip("matplotlib")
    runs = made_runs.study(tmp_path / "runs")
    (tmp_path / "seed-1").mkdir()
    (tmp_path / "seed-2").mkdir()
    for folder in runs.iterdir():
        shutil.copytree(folder, tmp_path / f"seed-{folder.name[-1]}" / folder.name)
    found = {}
    for name, steps in {"at once": [[runs]], "grown": [[tmp_path / "seed-1"], [tmp_path / "seed-2"], []]}.items():
        root = tmp_path / name
        study = root / "docs" / "results" / "study"
        study.mkdir(parents=True)
        documents = (root / "README.md", root / "docs" / "results" / "study.md")
        for path in documents:
            path.write_text("<!-- study -->\n<!-- end study -->\n")
        for folders in steps:
            script.main([*map(str, folders), "--root", str(root)])
        tables = (study / "summary.csv", study / "runs.jsonl")
        found[name] = [*(path.read_text() for path in (*documents, *tables)), sorted(p.name for p in study.iterdir())]
    assert found["at once"] == found["grown"]
    assert len(found["grown"][3].splitlines()) == 1 + 6

    # Of a run whose evaluations are lost, tables have what its summary says, and its old figures stay as they are.
    stored, picture = study / "runs.jsonl", study / "accuracy-by-round-iid-sparsity-0.9.png"
    head, *lines = stored.read_text().splitlines()
    shorter = [{**json.loads(line), "evaluations": json.loads(line)["evaluations"][-1:]} for line in lines]
    stored.write_text("".join(line + "\n" for line in [head, *map(json.dumps, shorter)]))
    picture.write_bytes(b"as it was")
    script.main(["--root", str(root)])
    assert [path.read_text() for path in (*documents, tables[0])] == found["grown"][:3]
    assert picture.read_bytes() == b"as it was"


def test_short_runs_have_to_be_named(script: ModuleType, tmp_path: Path) -> None:
    """Without them the file would be emptied."""
    with pytest.raises(SystemExit) as caught:
        script.main(["--evaluations", "x", "--root", str(tmp_path)])
    assert caught.value.code == 2 and not list(tmp_path.iterdir())


def test_short_runs_are_listed_evaluation_by_evaluation(script: ModuleType, tmp_path: Path) -> None:
    runs = made_runs.study(tmp_path / "runs")
    (tmp_path / "docs" / "results" / "study").mkdir(parents=True)
    script.main([str(runs), "--root", str(tmp_path), "--evaluations", "cifar-short"])
    with (tmp_path / "docs" / "results" / "study" / "cifar-short.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    first = [row for row in rows if (row["method"], row["seed"]) == ("fedavg", "2")]
    folder = runs / "fedavg-2"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scored = [record for record in records if record["test_accuracy"] is not None]
    assert [int(row["round"]) for row in first] == [record["round"] for record in scored]
    assert int(first[-1]["upload_bytes_so_far"]) == sum(record["upload_bytes"] for record in records)
    assert not (tmp_path / "README.md").exists()


def test_the_readme_says_what_the_committed_summary_says(script: ModuleType) -> None:
    with (ROOT / "docs" / "results" / "study" / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    text = (ROOT / "README.md").read_text(encoding="utf-8").split(script.BEGIN)[1].split(script.END)[0]
    table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    heads = [re.fullmatch(r"(.*), (\d+) % zeros", head) for head in table[0]]
    columns = [(number, head[1].lower(), int(head[2]) / 100) for number, head in enumerate(heads) if head]
    assert columns and len(table) <= 9
    for label, name in script.ROWS.items():
        (cells,) = [line for line in table if line[0] == name]
        for number, partition, level in columns:
            fitting = [
                row for row in rows if row["method"] == label and f", {partition}, " in row["setting"]
                and (abs(float(row["sparsity"]) - level) < 0.002 or float(row["sparsity"]) == 0)
            ]  # fmt: skip
            assert len(fitting) <= 1
            shown = f"{float(fitting[0]['accuracy_last5_mean']):.3f}" if fitting else "-"
            assert cells[number].split(" ")[0] == shown, (label, partition, level)
