"""Which data is found where, and what the clients of a configuration get of it. No MPI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from feddip_mpi import data
from feddip_mpi.data import Dataset, partition
from feddip_mpi.data.catalog import KNOWN
from feddip_mpi.report import terminal
from feddip_mpi.settings import Config, DataConfig

_MOST_CLIENTS = 20
_MOST_CLASSES = 12  # columns of counts that fit 80 characters


def show_places(config: DataConfig) -> None:
    """Every public data set: its folder, or where it was looked for and how to get it."""
    if config.name not in KNOWN:  # then data.path names other data, and says nothing of these
        config = config.model_copy(update={"path": None})
    table = terminal.table("data set", "found in")
    for location in data.find(config):
        known = KNOWN[location.name]
        if location.folder is not None:
            table.add_row(location.name, str(location.folder))
            continue
        package = f"apt-get install {known.package}, " if known.package else ""
        remarks = "".join(f"\n{remark}" for remark in location.remarks)
        table.add_row(location.name, f"not found ({package}data.download=true, data.path or $FEDDIP_DATA){remarks}")
    missing = [location for location in data.find(config) if location.folder is None]
    places = "\n".join(f"  {folder}" for folder in _parents(missing))
    terminal.print_tables("Public data sets", table, *([f"Looked for in:\n{places}"] if missing else []))


def _parents(missing: Sequence[data.Location]) -> list[str]:
    """The folders under which the data sets that are not there were looked for, each once."""
    found: dict[str, None] = {}
    for location in missing:
        for folder in location.searched:
            text = str(folder)
            for inner in KNOWN[location.name].folders:
                text = text.removesuffix(f"/{inner}")
            found[text] = None
    return list(found)


def load(config: Config) -> tuple[Dataset, np.ndarray]:
    """The data, and int64 [clients, classes], the training images of each client.

    Raises:
        InputError: the data is missing or damaged, or cannot be split as asked.
    """
    dataset = data.load(config.data, config.seed)
    parts = partition.make(
        config.data, config.clients, dataset.train_labels, dataset.test_labels, dataset.classes, config.seed
    )
    return dataset, parts.histogram(dataset.train_labels, dataset.classes)


def show_partition(config: Config, dataset: Dataset, histogram: np.ndarray) -> None:
    """The data set in a few numbers and the table of clients."""
    title = f"{dataset.name} for {config.clients} clients, seed {config.seed}"
    terminal.print_tables(title, _about(config, dataset, histogram), *_client_table(histogram))


def _about(config: Config, dataset: Dataset, histogram: np.ndarray) -> Any:
    sizes, held = histogram.sum(axis=1), (histogram > 0).sum(axis=1)
    skew = {"dirichlet": f" (alpha {config.data.alpha:g})", "quantity": f" (alpha {config.data.alpha:g})"}
    table = terminal.table()
    rows = [
        ("read from", dataset.source),
        ("images", f"{len(dataset.train_labels):,} for training, {len(dataset.test_labels):,} for testing"),
        ("image, classes", f"{'x'.join(map(str, dataset.shape))}, {dataset.classes}"),
        ("partition", config.data.partition + skew.get(config.data.partition, "")),
        ("images of a client", _spread(sizes)),
        ("classes of a client", _spread(held)),
    ]
    for name, value in rows:
        table.add_row(name, value)
    return table


def _spread(values: np.ndarray) -> str:
    return f"min {values.min():,}, median {np.median(values):,.6g}, max {values.max():,}"


def _client_table(histogram: np.ndarray) -> list[Any]:
    """Counts by class where these are few; else how many classes, and the largest."""
    clients, classes = histogram.shape
    step = -(-clients // _MOST_CLIENTS)
    title = "Training images by client" + (f", one in {step} of {clients}" if step > 1 else "")
    if classes <= _MOST_CLASSES:
        columns = ["client", "images", *map(str, range(classes))]
        title += ", one column a class"
    else:
        columns = ["client", "images", "classes", "images of the largest class", "its share"]
    table = terminal.table(*columns, right=columns)
    for client in range(0, clients, step):
        counts = histogram[client]
        if classes <= _MOST_CLASSES:
            cells = [f"{count}" if count else "." for count in counts]
        else:
            cells = [f"{(counts > 0).sum()}", f"{counts.max():,}", f"{counts.max() / counts.sum():.0%}"]
        table.add_row(str(client), f"{counts.sum():,}", *cells)
    return [title, table]
