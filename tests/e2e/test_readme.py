"""Every command of the README is run, as written; its tables are those that the code declares; its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiny import ROOT

from feddip_mpi import config, errors, metrics, summary

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, flags=re.M | re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line and not line.startswith("#")]
PROGRAM = [command for command in COMMANDS if "feddip-mpi" in command]
SCRIPTS = ["bash jobs/quickstart.sh", "bash jobs/test.sh"]


def test_every_command_is_of_a_kind_that_is_run_here() -> None:
    others = [c for c in COMMANDS if c not in PROGRAM and c not in SCRIPTS and not c.startswith("pip install '.[")]
    assert not others
    assert len(PROGRAM) >= 9
    assert set(SCRIPTS) <= set(COMMANDS)


def test_program_commands_run_in_the_order_they_are_written(tmp_path: Path) -> None:
    """On the quick start's configuration with generated data, so that all of them take seconds."""
    configs = tmp_path / "configs"
    configs.mkdir()
    small = [
        "data.name=synthetic", "data.synthetic.train_samples=400", "data.synthetic.test_samples=100", "local_epochs=1",
    ]  # fmt: skip
    quick = config.load(ROOT / "configs" / "quickstart.yaml", small)
    (configs / "quickstart.yaml").write_text(config.to_yaml(quick))
    script = 'set -euo pipefail\nfeddip-mpi() { python -m feddip_mpi "$@"; }\n' + "\n".join(
        command.replace(" feddip-mpi ", " python -m feddip_mpi ") if command.startswith("mpirun") else command
        for command in PROGRAM
    )
    done = _bash(script, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "runs/demo/finished.json").exists()
    assert len((tmp_path / "runs/demo/metrics.jsonl").read_text().splitlines()) == 30
    assert (tmp_path / "pruned.sparse.safetensors").stat().st_size < (
        tmp_path / "pruned.safetensors"
    ).stat().st_size / 4


def _bash(script: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMPI_MCA_mpi_yield_when_idle": "1",
        **{f"{tool}_ALLOW_RUN_AS_ROOT{tail}": "1" for tool in ("OMPI", "PRTE") for tail in ("", "_CONFIRM")},
        **more,
    }
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=570, check=False
    )


def test_quick_start_runs(tmp_path: Path) -> None:
    if not (Path(sys.prefix) / ".feddip-stamp").exists():
        pytest.skip("this environment was not made by jobs/setup-env.sh, which would change it")
    out = tmp_path / "quick"
    done = _bash(f"bash jobs/quickstart.sh --set rounds=2 --out {out}", ROOT, FEDDIP_VENV=sys.prefix)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (out / "run.png").stat().st_size > 10_000
    assert "Sparsity by layer" in done.stdout


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.InputError, "wrong input"), (errors.DamagedFileError, "a damaged file"),
        (errors.NumericalError, "training diverged"), (errors.PeerError, "ranks disagree"),
        (errors.RankLost, "a rank died"), (errors.FolderBusy, "another job has the run folder"),
        (errors.Stopped, "stopped by a signal"),
    ],
)  # fmt: skip
def test_exit_codes_are_those_of_the_readme(error: type[errors.FeddipError], words: str) -> None:
    assert f"{error.exit_code} {words}" in " ".join(README.split("Exit codes: ")[1].split())


def test_ci_runs_the_readme_s_test_command() -> None:
    assert "bash jobs/test.sh" in (ROOT / ".ci" / "run").read_text()


def test_the_package_installs_whole(tmp_path: Path) -> None:
    """`pip install .` builds a wheel; it must hold every module, and know the extras that the README names."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(next(name for name in names if name.endswith("METADATA"))).decode()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "feddip_mpi").rglob("*.py")}
    assert modules | {"feddip_mpi/report/page.html.j2"} <= names
    for extra in {e for c in COMMANDS for group in re.findall(r"\.\[(.*?)\]", c) for e in group.split(",")}:
        assert f"Provides-Extra: {extra}" in metadata


@pytest.mark.parametrize(
    ("module", "document"),
    [(config, "README.md"), (metrics, "README.md"), (summary, "docs/run-folder.md")],
    ids=["config", "metrics", "summary"],
)
def test_generated_tables_are_up_to_date(module, document: str) -> None:  # type: ignore[no-untyped-def]
    text = (ROOT / document).read_text(encoding="utf-8")
    assert module.reference() in text, f"run python -m {module.__name__} and put its output into {document}"


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = [t.split("#")[0] for t in re.findall(r"\]\(([^)]+)\)", text) if "://" not in t]
    missing = [t for t in targets if t and not ((ROOT / document).parent / t).exists()]
    assert not missing
