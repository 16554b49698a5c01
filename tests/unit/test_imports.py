"""Who may import what: one module speaks MPI, one opens HDF5, the mathematics knows neither."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "feddip_mpi"
PURE = (
    "masks", "indices", "values", "entropy", "support", "codec", "aggregate", "residuals", "server", "schedules", "placement",
    "streams", "vector",
)  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(file: Path) -> set[str]:
    """Every module that a file names in an import, function bodies included, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def users(library: str) -> set[str]:
    return {
        str(file.relative_to(PACKAGE)) for file in FILES if any(name.split(".")[0] == library for name in imports(file))
    }


def test_one_home_each() -> None:
    assert users("mpi4py") == {"collectives.py"}
    assert users("h5py") == {"hdf5.py"}
    assert users("click") and all(name.startswith("cli") for name in users("click"))


@pytest.mark.parametrize("name", PURE)
def test_the_mathematics_touches_no_machine(name: str) -> None:
    found = imports(PACKAGE / f"{name}.py")
    edges = {
        "feddip_mpi.collectives",
        "feddip_mpi.deadlines",
        "feddip_mpi.hdf5",
        "feddip_mpi.runtime",
        "feddip_mpi.checkpoint",
    }
    assert not found & edges
    assert not {module.split(".")[0] for module in found} & {
        "mpi4py",
        "h5py",
        "click",
        "os",
        "time",
        "logging",
        "random",
    }


@pytest.mark.parametrize("module", ["feddip_mpi", "feddip_mpi.cli", "feddip_mpi.config"])
def test_importing_the_command_line_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'mpi4py', 'h5py', 'matplotlib'}} & set(sys.modules)))"
    environment = {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
