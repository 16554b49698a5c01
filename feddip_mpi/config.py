"""The configuration, read and checked: YAML and `--set`, and errors that say the way out. Knows no torch, no MPI.

Its data, every key with range and meaning, is in `settings`; `python -m feddip_mpi.config` makes the README's reference of it.
"""

from __future__ import annotations

import difflib
import os
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ValidationError

from feddip_mpi.errors import InputError
from feddip_mpi.settings import LARGEST, PUBLISHED_PENALTY, Config

# What `resume` may change: nothing here alters the meaning of the rounds that are already done.
RESUMABLE_KEYS = (
    "rounds", "exchange", "overlap", "balance", "network.latency", "network.bandwidth", "data.path", "eval.every",
    "eval.clients", "eval.overlap", "upload.residual_memory", "upload.residual_device_memory", "upload.residual_folder",
    "checkpoint.every", "checkpoint.keep", "checkpoint.best", "checkpoint.minutes", "checkpoint.background", "device",
    "clients_at_once", "cuda_graphs", "memory_fraction", "stop_grace", "watchdog", "tensorboard", "on_rank_failure",
    "recovery_timeout",
)  # fmt: skip

# These change neither a bit of a run's result nor what is measured of it.
_WITHOUT_MEANING = (
    "data.path", "data.download", "upload.residual_folder", "stop_grace", "watchdog", "tensorboard", "recovery_timeout",
)  # fmt: skip


def is_without_meaning(key: str, settings: Config) -> bool:
    """Whether runs that differ from these settings in this key alone are the same experiment."""
    if key == "data.path" and holds_own_data(settings):
        return False
    return key in _WITHOUT_MEANING or key.startswith("checkpoint.")


def holds_own_data(settings: Config) -> bool:
    """Whether `data.path` says what the data are; a public data set is the same wherever it lies."""
    return settings.data.name in ("npz", "hdf5") or ":" in settings.data.name


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `KEY=VALUE` overrides, validate. Paths are `located`.

    Raises:
        InputError: the file cannot be read or is not YAML, or any key or value is wrong (all problems at once).
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable("the configuration", Path(path), error, "configs/") from None
    return located(parse(text, overrides, source=str(path)))


def unreadable(what: str, path: Path, error: OSError | UnicodeDecodeError, examples: str) -> InputError:
    """The error for a file that a user named and that cannot be read as text; `examples`: where such files are."""
    if os.path.isfile(path / "config.yaml"):
        reason = f"it is a folder; its configuration is {path / 'config.yaml'}, and `feddip-mpi resume {path}` goes on with a run"
    else:
        reason = error.strerror or str(error) if isinstance(error, OSError) else "it is no text (UTF-8)"
        reason += f"; name a YAML file (see {examples})"
    return InputError(f"cannot read {what} {str(path)!r}: {reason}")


def parse(text: str, overrides: Sequence[str] = (), source: str = "configuration") -> Config:
    """Parse and validate YAML text; `source` names it in errors. See `load`."""
    values = read_mapping(text, source)
    for override in overrides:
        _apply_override(values, override)
    return validate(values, source)


def read_mapping(text: str, source: str) -> dict[str, Any]:
    """YAML text as keys and values; nothing is empty. Raises InputError for other YAML, and for a key given twice."""
    try:
        values = yaml.load(text, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{source}: not valid YAML: {_yaml_problem(error)}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise InputError(f"{source}: expected keys and values (rounds: 100), got {type(values).__name__}")
    return values


def _yaml_problem(error: Exception) -> str:
    """Where and what, without the names that PyYAML has for its input."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
    line, problem, context = error.problem_mark.line, error.problem or "", error.context or ""
    if r"'\t'" in problem:
        return f"line {line + 1}: a tab; indent with spaces"
    if error.context_mark is not None and error.context_mark.line != line:
        context += f" (line {error.context_mark.line + 1})"
    return f"line {line + 1}: {', '.join(filter(None, (context, problem)))}"


def validate(values: Mapping[str, Any], source: str = "configuration") -> Config:
    """Validate nested plain values. Raises InputError that lists every problem."""
    problems: dict[str, str] = {}
    config: Config | None = None
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            # What is missing of a list has no place in it: the list is too short.
            key = ".".join(map(str, item["loc"][:-1] if item["type"] == "missing" else item["loc"]))
            problems.setdefault(key, _describe(key, item))
        config = _without(values, problems)
    if config is not None:
        wrong = list(problems)  # a key that is wrong by itself is not blamed twice, one that breaks two rules is
        for keys, message in _cross_field_problems(config):
            if not any(bad == key or bad.startswith(key + ".") for bad in wrong for key in keys):
                problems[" ".join(keys)] = message
    if problems:
        lines = [f"  {message}" for message in problems.values()]
        if len(lines) > _MOST_PROBLEMS:
            lines[_MOST_PROBLEMS:] = [f"  and {len(lines) - _MOST_PROBLEMS} more"]
        raise InputError(f"{source}: {len(problems)} problem{'s' * (len(problems) > 1)}:\n" + "\n".join(lines))
    assert config is not None
    return config


def override(
    config: Config, overrides: Sequence[str], allowed: Sequence[str] | None = None, place: str = "a resumed run"
) -> Config:
    """A validated, `located` copy with `KEY=VALUE` overrides; `allowed` limits the keys, `place` says to whom."""
    values = to_dict(config)
    for item in overrides:
        key = item.split("=", 1)[0].strip()
        if allowed is not None and "=" in item and key not in allowed:
            raise InputError(
                f"--set {item}: {key!r} cannot change in {place}; allowed: {', '.join(allowed)}; "
                "start a new run with `train` to change anything else"
            )
        _apply_override(values, item)
    return located(validate(values, "--set"))


def located(settings: Config) -> Config:
    """A copy whose folders and files are named from the root: what a run folder says must hold in every other folder too.

    `data.path` may be no path to a function of the user's own: there it stays as it is where nothing has that name.
    """
    data, upload = settings.data, settings.upload
    if data.path and (":" not in data.name or os.path.exists(os.path.expanduser(data.path))):
        data = data.model_copy(update={"path": _absolute(data.path)})
    if upload.residual_folder:
        upload = upload.model_copy(update={"residual_folder": _absolute(upload.residual_folder)})
    return settings.model_copy(update={"data": data, "upload": upload})


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values (JSON types) from which `validate` makes an equal Config."""
    return config.model_dump(mode="json")


def flat(config: Config) -> dict[str, Any]:
    """The same plain values by dotted key."""

    def walk(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    return dict(walk(to_dict(config), ""))


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML text that `parse` reads back to an equal Config."""
    return yaml.dump(to_dict(config), Dumper=_ExactDumper, sort_keys=False, allow_unicode=True)


class _ExactDumper(yaml.SafeDumper):
    """SafeDumper that escapes Unicode's own line breaks: PyYAML writes them bare, and YAML folds them into spaces."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if any(character in "\x85\u2028\u2029" for character in text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_ExactDumper.add_representer(str, _represent_text)


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice: the last one would win silently."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._flat: set[int] = set()  # mappings, by identity; the document holds them all

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # 2020-13-45 looks like a date and is none
            raise yaml.YAMLError(f"{_shorten(node.value)} in line {node.start_mark.line + 1}: {error}") from None

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Looks for such keys before `<<: *name` is put in its place: what that brings gives way to the mapping's own."""
        if id(node) in self._flat:
            return
        self._flat.add(id(node))
        seen = set()
        for key_node, _ in node.value:
            key = "<<" if key_node.tag == _MERGE else self.construct_object(key_node, deep=True)
            try:
                twice = key in seen
                seen.add(key)
            except TypeError:
                raise yaml.YAMLError(f"{_shorten(key)} in line {key_node.start_mark.line + 1} is no key name") from None
            if twice:
                raise yaml.YAMLError(f"key {key!r} given twice (second time in line {key_node.start_mark.line + 1})")
        super().flatten_mapping(node)
        # Each key once, or a few lines that bring in one another would mean a mapping of any length.
        last = {self.construct_object(pair[0], deep=True): pair for pair in node.value}
        node.value = list(last.values())


_MERGE = "tag:yaml.org,2002:merge"


def _apply_override(values: dict[str, Any], item: str) -> None:
    key, separator, text = item.partition("=")
    key = key.strip()
    if not separator or not key:
        raise InputError(f"--set {item!r}: expected KEY=VALUE, for example --set sparsity.final=0.95")
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, RecursionError, ValueError):
        raise InputError(f"--set {_shorten(item)}: the value {_shorten(text)} is not valid YAML; quote it") from None
    set_key(values, key, value, f"--set {_shorten(item)}")


def set_key(values: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Put a value under a dotted key of nested values. Raises InputError where a part of the key is no section."""
    *parents, last = key.split(".")
    if len(parents) > _DEEPEST:
        raise InputError(f"{source}: {_shorten(key)} is no key: none has more than {_DEEPEST} dots")
    section = values
    for parent in parents:
        child = section.setdefault(parent, {})
        if child is None:
            child = section[parent] = {}
        if not isinstance(child, dict):
            raise InputError(f"{source}: {parent!r} holds the value {_shorten(child)}, not a section")
        section = child
    section[last] = value


def _describe(key: str, item: Any) -> str:
    if item["type"] == "extra_forbidden":
        if key in keys() and "." in str(item["loc"][-1]):
            section, _, name = key.rpartition(".")
            return f"{key}: dots are for --set; in YAML write `{name}:` indented below `{section}:`"
        near = difflib.get_close_matches(key, list(keys()), n=1, cutoff=0.5)
        tail = [k for k in keys() if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
        hint = (
            f"did you mean {(tail or near)[0]!r}?" if tail or near else f"valid keys: {', '.join(Config.model_fields)}"
        )
        return f"{key}: unknown key; {hint}"
    if item["type"] == "invalid_key":
        names = _section(item["loc"][:-1]).model_fields
        where = f" of {'.'.join(map(str, item['loc'][:-1]))}" if len(item["loc"]) > 1 else ""
        return (
            f"a key{where} is {item['input']!r}, which is no name (YAML reads on, off, yes and no as switches, and numbers as "
            f"numbers); valid keys: {', '.join(names)}"
        )
    if item["type"] == "model_type":
        message = f"allowed: a section with some of the keys {', '.join(_section(item['loc']).model_fields)}"
    elif item["type"] == "method":
        message = item["msg"]
    else:
        message = f"allowed: {_wanted(item['loc'])}{_way_out(item)}"
    return f"{key}: got {_shorten(item['input'])}; {message}"


def _wanted(location: Sequence[str | int]) -> str:
    """What the reference says of a key (or of an element of its list); what a number stands for tells shares from per cent."""
    key = ".".join(part for part in location if isinstance(part, str))
    field = next(field for name, field, _ in fields() if name == key)
    kinds = typing.get_args(field.annotation) or (field.annotation,)
    meaning = f" ({field.description})" if {int, float} & set(kinds) else ""
    return _allowed(field) + (", or none" if type(None) in kinds else "") + meaning


def _way_out(item: Any) -> str:
    """What to write, where the value tells what was meant."""
    if item["type"] == "int_parsing" and (whole := _whole_number(item["input"])) is not None:
        return f"; write {whole}"
    if item["type"] == "tuple_type":
        return "; a list is written [a, b]"
    if item["type"] == "number":
        return "; YAML reads a bare on, off, yes and no as a switch"
    return f"; no integer may be above {LARGEST}" if item["type"] == "size" else ""


def _section(location: Sequence[str | int]) -> type[BaseModel]:
    section: Any = Config
    for name in location:
        section = section.model_fields[name].annotation
    return section


def _whole_number(text: str) -> int | None:
    """1000 for "1e3", which YAML 1.1 reads as a text; None for what is no whole number."""
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number.is_integer() and abs(number) < 2**53 else None


_DEEPEST = 9  # dots of a key: more sections than any has, few enough to walk through
_MOST_PROBLEMS = 12  # told at once
_BRIEF = reprlib.Repr()
_BRIEF.maxlevel = 3
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxdict = 8
_BRIEF.maxstring = _BRIEF.maxlong = _BRIEF.maxother = 80


def _shorten(value: Any) -> str:
    """The value in at most 80 characters. A few lines of YAML aliases can mean a text of any length: it is not made."""
    text = _BRIEF.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _without(values: Mapping[str, Any], bad_keys: Mapping[str, str]) -> Config | None:
    """The configuration with defaults in place of the wrong keys, so that the other rules can still be checked."""
    copy = deepcopy(dict(values))
    for key in bad_keys:
        section: Any = copy
        *parents, last = key.split(".")
        for parent in parents:
            if not isinstance(section.get(parent), dict):
                last = parent  # an element of a list (data.synthetic.shape.1): the whole list goes
                break
            section = section[parent]
        section.pop(key if key in section else last, None)
    try:
        return Config.model_validate(copy)
    except ValidationError:
        return None


def _cross_field_problems(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """Rules between keys: the keys concerned, and the message."""
    c = config
    if c.participants > c.clients:
        yield (
            ("participants", "clients"),
            (
                f"participants: got {c.participants}, more than clients = {c.clients}; lower participants or raise clients"
            ),
        )
    if c.sparsity.initial > c.sparsity.final:
        yield (
            ("sparsity.initial", "sparsity.final"),
            (
                f"sparsity.initial: got {c.sparsity.initial}, above sparsity.final = {c.sparsity.final}; "
                "sparsity only grows: lower initial or raise final"
            ),
        )
    if c.penalty.schedule == "published" and c.penalty.maximum < PUBLISHED_PENALTY:
        yield (
            ("penalty.maximum", "penalty.schedule"),
            (
                f"penalty.maximum: got {c.penalty.maximum}, below the {PUBLISHED_PENALTY} at which "
                "penalty.schedule=published begins; raise maximum or choose another schedule"
            ),
        )
    shape = c.data.synthetic.shape
    if min(shape) < 1:
        yield ("data.synthetic.shape",), f"data.synthetic.shape: got {list(shape)}; every number must be at least 1"
    if c.data.name == "synthetic" and c.data.synthetic.train_samples < c.clients:
        yield (
            ("data.synthetic.train_samples", "clients"),
            (
                f"data.synthetic.train_samples: got {c.data.synthetic.train_samples}, fewer than clients = {c.clients}; "
                "every client needs at least one image"
            ),
        )
    if c.upload.residual_values != "fp32" and c.upload.residual == "ef21":
        yield (
            ("upload.residual_values", "upload.residual"),
            f"upload.residual_values: got {c.upload.residual_values}, which upload.residual=ef21 does not allow (client and "
            "server must hold the same reference); set upload.residual_values=fp32 or another residual",
        )
    if c.download.values != "fp32":
        # What an owner rounds off is paid back to the same coordinates at the next mask update at the latest.
        for key, wanted in (("exchange", "sharded"), ("upload.mode", "masked")):
            got = c.exchange if key == "exchange" else c.upload.mode
            if got != wanted:
                yield (
                    ("download.values", key),
                    f"download.values: got {c.download.values}, which needs {key}={wanted}, not {got}; "
                    f"set {key}={wanted} (a new run can have download.values=fp32)",
                )
        if c.upload.residual == "ef21":
            yield (
                ("download.values", "upload.residual"),
                f"download.values: got {c.download.values}, which upload.residual=ef21 does not allow (the sum itself is "
                "the server's reference); set download.values=fp32 or another residual",
            )


def keys() -> Iterator[str]:
    """All dotted keys, sections excluded, in the order of their declaration."""
    for key, _, _ in fields():
        yield key


def fields(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, pydantic field, default) of every leaf key."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from fields(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field, field.get_default(call_default_factory=True)


def reference() -> str:
    """The configuration reference as a Markdown table."""
    rows = ["| key | default | allowed | meaning |", "|---|---|---|---|"]
    for key, field, default in fields():
        shown = list(default) if isinstance(default, tuple) else default
        value = {True: "on", False: "off", None: "none"}.get(shown, shown) if not isinstance(shown, list) else shown
        if isinstance(shown, (int, float)) and not isinstance(shown, bool):
            value = shown
        rows.append(f"| `{key}` | {value} | {_allowed(field)} | {field.description} |")
    return "\n".join(rows) + "\n"


def _allowed(field: Any) -> str:
    annotation = field.annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is Literal:
        return ", ".join(str(a) for a in typing.get_args(annotation))
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [
        f"{sign} {getattr(rule, name)}"
        for rule in field.metadata
        for name, sign in signs.items()
        if getattr(rule, name, None) is not None
    ]
    if typing.get_origin(annotation) is tuple:
        return _allowed_list(typing.get_args(annotation))
    kind = {int: "integer", float: "number", bool: "on, off", str: "text"}[annotation]
    return " ".join([kind, " and ".join(limits)]).strip()


def _allowed_list(elements: Sequence[Any]) -> str:
    kind = {int: "integers", str: "names"}[elements[0]]
    return f"list of {kind}" if elements[-1] is Ellipsis else f"list of {len(elements)} {kind}"


if __name__ == "__main__":
    print(reference(), end="")
