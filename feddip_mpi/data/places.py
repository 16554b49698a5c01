"""Where the public data sets are looked for, and what was found there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from feddip_mpi.data.catalog import KNOWN, Known
from feddip_mpi.errors import InputError
from feddip_mpi.settings import DataConfig

ENVIRONMENT_KEY = "FEDDIP_DATA"
_USUAL_PLACES = (".data", "data", "~/.cache/feddip-mpi", "/usr/share/datasets")


@dataclass(frozen=True)
class Location:
    """The outcome of one search.

    Attributes:
        name: the data set.
        folder: the folder with all its files, or None.
        searched: every folder looked into, in order, up to the one found.
        remarks: what spoke against a folder that held some of the files.
    """

    name: str
    folder: Path | None
    searched: tuple[Path, ...]
    remarks: tuple[str, ...]


def find(config: DataConfig) -> tuple[Location, ...]:
    """Where each public data set lies, in the order of the catalog. Reads no file and raises nothing."""
    return tuple(locate(name, config) for name in KNOWN)


def locate(name: str, config: DataConfig) -> Location:
    """Look for one public data set.

    In `data.path` alone if it is set; else in $FEDDIP_DATA and then in the usual places.

    Args:
        name: a key of the catalog.
        config: its `path` is searched, and its `name` says whose files may lie in `path` itself: the files of MNIST
            and Fashion-MNIST have the same names.
    """
    known = KNOWN[name]
    searched: list[Path] = []
    remarks: list[str] = []
    for folder in _candidates(known, config):
        searched.append(folder)
        remark = _objection(known, folder)
        if remark is None:
            return Location(name, folder, tuple(searched), tuple(remarks))
        if remark:
            remarks.append(f"{folder}: {remark}")
    return Location(name, None, tuple(searched), tuple(remarks))


def not_found(location: Location) -> InputError:
    """The error for a data set that is nowhere: the places searched, and the ways out."""
    known = KNOWN[location.name]
    package = f"apt-get install {known.package} (Debian, Ubuntu); " if known.package else ""
    lines = [f"data.name: {known.name}: not found; searched:", *(f"  {folder}" for folder in location.searched)]
    lines += [f"but {remark}" for remark in location.remarks]
    lines.append(f"ways out: {package}data.download=true; or name its folder with data.path or ${ENVIRONMENT_KEY}")
    return InputError("\n".join(lines))


def download_root(config: DataConfig) -> Path:
    """The folder that downloads go to: `data.path`, else $FEDDIP_DATA, else `.data`."""
    return named_path(config) or _expand(_USUAL_PLACES[0])


def named_path(config: DataConfig) -> Path | None:
    """The path that the user named, by `data.path` or else by $FEDDIP_DATA; None if neither is set."""
    text = config.path or os.environ.get(ENVIRONMENT_KEY)
    return _expand(text) if text else None


def idx_file(folder: Path, name: str) -> Path:
    """The plain file if it is there, else the gzipped one."""
    plain = folder / name
    return plain if os.path.isfile(plain) else folder / f"{name}.gz"


def has_file(known: Known, folder: Path, name: str) -> bool:
    """Whether a file of the data set is in the folder, in any accepted form; False where it cannot be seen."""
    return os.path.isfile(folder / name) or (known.gzipped and os.path.isfile(folder / f"{name}.gz"))


def _candidates(known: Known, config: DataConfig) -> Iterator[Path]:
    named = named_path(config)
    if named is not None:
        if known.telling or known.name == config.name or named.name in known.folders:
            yield named
        yield from (named / folder for folder in known.folders)
    if config.path is None:
        for place in _USUAL_PLACES:
            yield from (_expand(place) / folder for folder in known.folders)


def _objection(known: Known, folder: Path) -> str | None:
    """None if the folder holds the data set; else why not, empty if it holds nothing of it."""
    missing = [name for name in known.files if not has_file(known, folder, name)]
    if len(missing) == len(known.files):
        return ""
    names = {folder.name, "/".join(folder.parts[-2:])}
    owner = next((other for other in KNOWN.values() if names & set(other.folders)), known)
    if owner is not known:
        return f"by its name it holds {owner.name}"
    return f"{', '.join(missing)} missing" if missing else None


def _expand(text: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(text)))
