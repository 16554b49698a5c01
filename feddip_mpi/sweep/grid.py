"""A grid file and its cells. Pure but for reading the files that it names.

    base: ../fashion-mnist-lenet5.yaml      # a configuration file, or keys and values
    set: {rounds: 100}                      # on top of it
    grid:
      partition:                            # an axis of labels: each sets some keys, and wins over axes of values
        iid: {data.partition: iid}
        dirichlet-0.5: {data.partition: dirichlet, data.alpha: 0.5}
      method:
        fedavg: {file: ../methods/fedavg.yaml}    # a label may begin with a file: what that says comes before `set` and all axes
      sparsity.final: [0.9, 0.95]           # an axis of values of one key
      seed: [1, 2, 3]
    exclude:
      - {partition: iid, seed: [2, 3]}      # cells for which all of this holds are left out
    also:
      - {partition: iid, seed: 4}           # more cells: labels of axes, values of axes, or of any other key

Cells that come to the same configuration are one cell: a label that fixes `sparsity.final` makes one cell, not one for
every sparsity, and so does a method without a mask, which looks at none.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from feddip_mpi import config, identity
from feddip_mpi.errors import InputError
from feddip_mpi.settings import Config

_KEYS = ("base", "set", "grid", "exclude", "also")
_SHORT = {"sparsity.final": "sparsity"}
_LONGEST_NAME = 120  # characters; file systems allow 255 bytes, and a suffix may follow


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes:
        name: of its run folder; readable, and no other cell's of the grid, also where case does not count.
        config: what it runs.
        labels: the label of each axis; a report calls a method by that of the axis `method`.
    """

    name: str
    config: Config
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Choice:
    """One value of one axis: its text in names, the keys it sets, and whether these win over other axes' keys.

    `first` are the keys of its file, which give way to everything else.
    """

    axis: str
    label: str
    keys: Mapping[str, Any]
    wins: bool
    first: Mapping[str, Any] = field(default_factory=dict)


def load(path: Path) -> list[Cell]:
    """The cells of a grid file, in the order of its axes (the last one varies fastest), all validated.

    Raises:
        InputError: the file cannot be read, is no grid, or has cells with wrong values; these are named with their keys.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise config.unreadable("the grid", path, error, "configs/study/") from None
    return cells(config.read_mapping(text, str(path)), str(path), path.parent)


def cells(values: Mapping[str, Any], source: str, folder: Path) -> list[Cell]:
    """The cells of a grid given as plain values.

    Args:
        values: see the module.
        source: names the grid in errors.
        folder: where a `base` file is looked for.
    """
    for key in values:
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(_KEYS)}"
            raise InputError(f"{source}: {key}: unknown key of a grid; {hint}")
    base = _base(values, source, folder)
    common = _keys(values.get("set") or {}, source, "set")
    axes = _axes(values.get("grid"), source, folder)
    excluded = [_conditions(entry, axes, source) for entry in _entries(values, "exclude", source)]
    chosen = [
        choices
        for choices in itertools.product(*axes.values())
        if not any(_matches(choices, conditions) for conditions in excluded)
    ]
    for entry in _entries(values, "also", source):
        chosen += _more(entry, axes, source)
    return _build(base, common, chosen, source)


def _base(values: Mapping[str, Any], source: str, folder: Path) -> dict[str, Any]:
    base = values.get("base")
    if isinstance(base, str):
        return config.to_dict(_configuration(folder / base, f"{source}: base"))
    if base is None or isinstance(base, dict):
        return config.to_dict(config.validate(_nested(_keys(base or {}, source, "base"), source), f"{source}: base"))
    raise InputError(f"{source}: base: got {base!r}; name a configuration file, or give keys and values")


def _configuration(path: Path, place: str) -> Config:
    try:
        return config.load(path)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


def _axes(given: Any, source: str, folder: Path) -> dict[str, list[_Choice]]:
    if not isinstance(given, dict) or not given:
        raise InputError(f"{source}: grid: got {given!r}; give axes, for example `grid: {{seed: [1, 2, 3]}}`")
    return {str(axis): _choices(str(axis), entries, source, folder) for axis, entries in given.items()}


def _choices(axis: str, entries: Any, source: str, folder: Path) -> list[_Choice]:
    if isinstance(entries, dict) and entries:
        return [_labelled_choice(axis, label, keys or {}, source, folder) for label, keys in entries.items()]
    if isinstance(entries, list) and entries:
        return [_plain_choice(axis, value) for value in entries]
    raise InputError(
        f"{source}: grid: {axis}: got {entries!r}; give a list of values of the key {axis!r}, or labels with the keys that "
        "each of them sets"
    )


def _labelled_choice(axis: str, label: Any, given: Any, source: str, folder: Path) -> _Choice:
    keys = _keys(given, source, f"grid: {axis}: {label}")
    first: dict[str, Any] = {}
    if (name := keys.pop("file", None)) is not None:
        path = folder / str(name)
        _configuration(path, f"{source}: grid: {axis}: {label}: file")  # says what is wrong with it
        first = _keys(config.read_mapping(path.read_text(encoding="utf-8"), str(path)), source, str(path))
    return _Choice(axis, _text(label), keys, True, first)


def _plain_choice(key: str, value: Any) -> _Choice:
    return _Choice(key, _text(value), {key: value}, False)


def _keys(given: Any, source: str, place: str) -> dict[str, Any]:
    """Nested or dotted keys as dotted ones."""
    if not isinstance(given, dict):
        raise InputError(f"{source}: {place}: got {given!r}; give keys and values, for example {{data.partition: iid}}")
    found: dict[str, Any] = {}
    for key, value in given.items():
        if isinstance(value, dict):
            found |= {f"{key}.{inner}": item for inner, item in _keys(value, source, place).items()}
        else:
            found[str(key)] = value
    return found


def _nested(keys: Mapping[str, Any], source: str) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in keys.items():
        config.set_key(made, key, value, source)
    return made


def _entries(values: Mapping[str, Any], name: str, source: str) -> list[dict[str, Any]]:
    given = values.get(name) or []
    if not isinstance(given, list) or not all(isinstance(entry, dict) and entry for entry in given):
        raise InputError(f"{source}: {name}: got {given!r}; give a list of axes with values, [{{seed: [2, 3]}}]")
    return given


def _conditions(entry: Mapping[str, Any], axes: Mapping[str, list[_Choice]], source: str) -> dict[str, set[str]]:
    """Axis -> labels; every one of them must be there, or a mistyped exclusion would exclude nothing."""
    conditions = {}
    for axis, wanted in entry.items():
        if axis not in axes:
            raise InputError(f"{source}: exclude: {axis}: no axis of the grid; its axes: {', '.join(axes)}")
        conditions[axis] = {choice.label for choice in _named(axis, wanted, axes[axis], source, "exclude")}
    return conditions


def _named(axis: str, wanted: Any, choices: Sequence[_Choice], source: str, place: str) -> list[_Choice]:
    by_label = {choice.label: choice for choice in choices}
    labels = [_text(value) for value in (wanted if isinstance(wanted, list) else [wanted])]
    unknown = [label for label in labels if label not in by_label]
    if unknown:
        raise InputError(f"{source}: {place}: {axis}: got {unknown[0]}; the axis has {', '.join(by_label)}")
    return [by_label[label] for label in labels]


def _matches(choices: Iterable[_Choice], conditions: Mapping[str, set[str]]) -> bool:
    labels = {choice.axis: choice.label for choice in choices}
    return all(labels[axis] in wanted for axis, wanted in conditions.items())


def _more(entry: Mapping[str, Any], axes: Mapping[str, list[_Choice]], source: str) -> Iterator[tuple[_Choice, ...]]:
    """The cells of an entry of `also`: the product of its lists; axes that it does not name stay as `base` has them."""
    parts = []
    for axis, wanted in ((str(name), values) for name, values in entry.items()):
        if axis in axes and axes[axis][0].wins:
            parts.append(_named(axis, wanted, axes[axis], source, "also"))
        else:
            parts.append([_plain_choice(axis, value) for value in (wanted if isinstance(wanted, list) else [wanted])])
    return itertools.product(*parts)


def _build(
    base: Mapping[str, Any], common: Mapping[str, Any], chosen: Sequence[Sequence[_Choice]], source: str
) -> list[Cell]:
    problems: dict[str, list[str]] = {}
    found: dict[str, Cell] = {}  # by what they run
    used: dict[str, str] = {}
    for choices in chosen:
        name, keys = _name(choices), dict[str, Any]()
        for part in (*(choice.first for choice in choices), common, _merge(choices, source)):
            keys |= part
        values = json.loads(json.dumps(base))
        try:
            for key, value in keys.items():
                config.set_key(values, key, value, f"cell {name}")
            made = config.located(config.validate(values, f"cell {name}"))
        except InputError as error:
            said = str(error).split("\n")[1:] or [str(error)]
            for line in said:
                problems.setdefault(line.strip(), []).append(name)
            continue
        key = json.dumps(identity.what_it_reads(made), sort_keys=True)
        if key not in found:
            name = _unlike(name, json.dumps(config.to_dict(made), sort_keys=True), used)
            found[key] = Cell(name, made, {choice.axis: choice.label for choice in choices if choice.wins})
    if problems:
        lines = [f"  cell {names[0]}{_and_more(names)}: {line}" for line, names in problems.items()]
        raise InputError(f"{source}: nothing was started, {len(problems)} problem(s):\n" + "\n".join(lines))
    if not found:
        raise InputError(f"{source}: no cell is left; take back some of `exclude`")
    return list(found.values())


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _merge(choices: Sequence[_Choice], source: str) -> dict[str, Any]:
    """All keys of a cell; those of labels win. Two labels that set one key to different values are a mistake."""
    keys: dict[str, Any] = {}
    for choice in choices:
        if not choice.wins:
            keys |= choice.keys
    by: dict[str, _Choice] = {}
    for choice in choices:
        for key, value in choice.keys.items() if choice.wins else ():
            if key in by and by[key].keys[key] != value:
                raise InputError(
                    f"{source}: {key}: {by[key].axis}={by[key].label} sets {by[key].keys[key]!r}, {choice.axis}="
                    f"{choice.label} sets {value!r}; let one axis set it"
                )
            by[key], keys[key] = choice, value
    return keys


def _name(choices: Sequence[_Choice]) -> str:
    """Labels, and `key-value` for axes of values, joined by `_`; what a label overrides is left out."""
    fixed = {key for choice in choices if choice.wins for key in choice.keys}
    short = [_SHORT.get(choice.axis, choice.axis.rsplit(".", 1)[-1]) for choice in choices]
    parts = []
    for choice, last in zip(choices, short, strict=True):
        if choice.wins:
            parts.append(choice.label)
        elif choice.axis not in fixed:
            key = choice.axis if short.count(last) > 1 else last
            parts.append(f"{key}-{choice.label}" if key != "method" else choice.label)
    name = "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "-", part).strip("-.") for part in parts) or "base"
    return name[:_LONGEST_NAME]


def _unlike(name: str, what: str, used: dict[str, str]) -> str:
    """The name, with a digest of what the cell runs where another cell has it already."""
    if name.lower() in used:
        name = f"{name}_{hashlib.sha256(what.encode()).hexdigest()[:8]}"
    used[name.lower()] = what
    return name


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return "+".join(map(_text, value))
    return "none" if value is None else str(value)
