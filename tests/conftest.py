"""How tests are shared between workers (pytest-xdist): a file stays whole, as its tests share what its fixtures make."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        """In the order in which they are collected; hosts and their Slurm have addresses, of which there is one set."""

        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::")[0]
            return "cluster" if path.startswith("tests/cluster/") else path

    return Files(config, log)
