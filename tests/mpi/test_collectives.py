"""Every collective under real launchers: both MPI libraries; one, two and four ranks."""

import re

import launch
import pytest

pytestmark = pytest.mark.mpi

PROGRAM = launch.PROGRAMS / "collectives.py"
CHECKS = re.findall(r"^def (check_\w+)", PROGRAM.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("library", ["default", "mpich"])
def test_collectives_return_what_was_computed_by_hand(library: str, ranks: int) -> None:
    done = launch.run([str(PROGRAM), str(ranks)], ranks, library, seconds=60).expect(0)
    assert re.findall(r"passed (\w+)", done.text) == CHECKS
    assert done.orphans == 0
