"""How tests are shared between workers (pytest-xdist): a file stays whole, as its tests share what its fixtures make."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        part, *_, file = item.path.relative_to(HERE).parts
        # Hosts and their Slurm have addresses, of which this machine has one set.
        group = part if part == "cluster" else f"{part}/{file}"
        item.add_marker(pytest.mark.xdist_group(group))
