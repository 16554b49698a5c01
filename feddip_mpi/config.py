"""The configuration: frozen, validated data beside its documentation. Knows no torch, no MPI.

Every key is declared once, here, with its range and its meaning; the reference in the README is generated from
these declarations (`python -m feddip_mpi.config`).
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
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from feddip_mpi.errors import InputError


def _on_off(value: Any) -> Any:
    """YAML 1.1 reads a bare `on` or `off` as a boolean; the key means the word."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would read `rounds: yes` as one round.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in (int, float, float | None):
            raise PydanticCustomError(
                "number", "input should be a number; YAML reads a bare on, off, yes and no as a switch"
            )
        return value


class SyntheticConfig(_Section):
    """Shape and size of the generated data set (`data.name: synthetic`)."""

    shape: tuple[int, int, int] = Field((1, 28, 28), description="channels, height, width of one image")
    classes: int = Field(10, ge=2, le=65536, description="number of classes")
    train_samples: int = Field(6000, ge=1, description="training images")
    test_samples: int = Field(1000, ge=1, description="test images")


class DataConfig(_Section):
    """Which data, where it lies, and how it is split over the clients."""

    name: str = Field(
        "fashion-mnist",
        description="fashion-mnist, mnist, cifar10, cifar100, npz, hdf5, synthetic, or an import path package.module:function",
    )
    path: str | None = Field(
        None, description="folder (or file, for npz and hdf5) of the data; default: $FEDDIP_DATA, then the usual places"
    )
    download: bool = Field(False, description="fetch the official files when they are missing (SHA-256 checked)")
    partition: Literal["iid", "dirichlet", "pathological", "quantity"] = Field(
        "iid", description="how the training images are split over the clients"
    )
    alpha: float = Field(
        0.5, gt=0, le=1e6, description="concentration of dirichlet and quantity: smaller is more skewed"
    )
    min_samples: int = Field(10, ge=1, description="fewest training images a client may get (dirichlet, quantity)")
    classes_per_client: int = Field(2, ge=1, description="classes each client holds (pathological)")
    augment: Literal["none", "standard"] = Field(
        "none", description="standard: random crop with 4 pixels of padding and horizontal flip, on the device"
    )
    synthetic: SyntheticConfig = Field(default_factory=SyntheticConfig, description="shape and size of synthetic data")


class ModelConfig(_Section):
    """The network."""

    name: str = Field(
        "lenet5", description="lenet5, alexnet, vgg11, resnet18, resnet50, or an import path package.module:function"
    )
    keep_dense: tuple[str, ...] = Field((), description="names of weight tensors exempt from pruning")


class SparsityConfig(_Section):
    """Share of zeros among the prunable weights, and its way from initial to final."""

    initial: float = Field(0.5, ge=0, lt=1, description="s_0, share of zeros of the initial mask")
    final: float = Field(0.9, ge=0, lt=1, description="s_p, share of zeros of the final model, exact to one weight")
    schedule: Literal["cubic", "linear", "constant", "one_shot"] = Field(
        "cubic", description="the shape of s_t; constant: s_p from the first update; one_shot: s_p at the last update"
    )


class MaskConfig(_Section):
    """When and how the mask is drawn and renewed."""

    every: int = Field(5, ge=1, description="R, rounds between mask updates")
    initial: Literal["erk", "uniform", "magnitude", "snip", "none"] = Field(
        "none", description="the rule of the first mask; none: dense until the first update; the paper's is erk"
    )
    rescale: bool = Field(
        False,
        description="initial weights inside a sparse first mask are scaled so that their layer keeps its norm",
    )
    freeze_after: float = Field(
        0.75, gt=0, le=1, description="share of the rounds after which the mask stays fixed (s_t reaches s_p by then)"
    )


PUBLISHED_PENALTY = 5e-4  # where the published code's penalty begins after its first segment


class PenaltyConfig(_Section):
    """Incremental regularisation: lambda_t times the norm of each pruned weight tensor."""

    maximum: float = Field(1e-3, ge=0, le=1e3, description="lambda_max")
    steps: int = Field(20, ge=1, description="Q, number of equal steps from 0 to lambda_max")
    schedule: typing.Annotated[Literal["steps", "published", "constant", "linear", "off"], BeforeValidator(_on_off)] = (
        Field("steps", description="the shape of lambda_t; published: the published code's 20 segments from 5e-4")
    )
    norm: Literal["l2", "l2_squared", "l1"] = Field(
        "l2", description="the norm per tensor; the paper's is l2, not squared"
    )


ValueType = Literal["fp32", "fp16", "bf16", "int8", "int4"]


class UploadConfig(_Section):
    """What a client sends, and what it remembers of the rest."""

    values: ValueType = Field(
        "int4",
        description="how a value travels; int8 and int4 carry one scale per block, and residuals pay back what they round off",
    )
    rounding: Literal["nearest", "stochastic"] = Field("nearest", description="rounding of values that are quantised")
    mode: Literal["masked", "dense_at_mask_updates", "dense"] = Field(
        "masked", description="which prunable coordinates travel: those in the mask (plus regrow), or all"
    )
    regrow: float = Field(
        0.02,
        ge=0,
        le=1e6,
        description="coordinates sent from outside the mask (mode: masked), as a fraction of the kept weights",
    )
    regrow_schedule: Literal["constant", "linear"] = Field(
        "linear", description="constant, or falling linearly to 0 at the last mask update"
    )
    regrow_rounds: Literal["mask_updates", "all"] = Field(
        "mask_updates", description="send regrow coordinates only in rounds that update the mask, or in all"
    )
    residual: Literal["keep", "decay", "in_mask_only", "drop", "ef21"] = Field(
        "keep", description="what a client keeps of the part it did not send; ef21: both sides keep a reference instead"
    )
    residual_decay: float = Field(0.9, ge=0, le=1, description="factor per absent round (upload.residual: decay)")
    residual_values: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="how a residual is kept; bf16: half the memory, and what rounding takes away is lost (not with ef21)",
    )
    residual_memory: int = Field(
        1024,
        ge=0,
        le=2**30,
        description="megabytes (2^20 bytes) of residuals a rank keeps in memory; others go to a file",
    )
    residual_folder: str | None = Field(
        None, description="where that file lies; none: the system's folder for temporary files ($TMPDIR)"
    )
    entropy: Literal["none", "zstd"] = Field(
        "none", description="entropy coding of the values (package zstandard), where it makes them shorter"
    )


class DownloadConfig(_Section):
    """How the sums of a slice are handed on by the rank that owns it (`exchange: sharded`)."""

    values: ValueType = Field(
        "fp32",
        description="how a sum travels; all but fp32 need exchange: sharded, upload.mode: masked and no ef21; what an owner "
        "rounds off is added the next time",
    )


class NetworkConfig(_Section):
    """What `exchange: auto` takes the network for."""

    latency: float | None = Field(None, gt=0, le=1e7, description="microseconds a message; none: measured at start")
    bandwidth: float | None = Field(
        None, gt=0, le=1e9, description="megabits a second of one rank's link; none: measured at start"
    )


class ControlConfig(_Section):
    """Adaptive control: the coordinator changes the plan by what the rounds measured (`control.py`)."""

    mask_delay: int = Field(
        0,
        ge=0,
        description="rounds a due mask update may wait for the model to recover from the last one; 0: never waits",
    )
    loss_tolerance: float = Field(
        1.05,
        ge=1,
        le=100,
        description="recovered: the train loss is at most this times the loss before the last update",
    )
    pruning_error: float | None = Field(
        None, gt=0, lt=1, description="the penalty is scaled to hold the pruning error of a cut near this; none: never"
    )
    upload_bytes: int | None = Field(
        None, ge=1, description="regrow is scaled down while a participant's mean upload is above this; none: never"
    )


class EvalConfig(_Section):
    """Evaluation of the truly pruned model on the test images."""

    every: int = Field(1, ge=1, description="rounds between evaluations; the last round is always evaluated")
    batch_size: int = Field(500, ge=1, description="images per evaluation batch")
    clients: bool = Field(False, description="also report the accuracy on each client's own test part")


class CheckpointConfig(_Section):
    """When the state is saved."""

    every: int = Field(10, ge=1, description="rounds between checkpoints; the last round is always saved")
    keep: int = Field(3, ge=1, description="newest checkpoints kept")
    best: bool = Field(True, description="also keep the checkpoint with the best test accuracy at the final sparsity")
    minutes: float | None = Field(None, gt=0, description="also save when this many minutes passed since the last save")
    background: bool = Field(True, description="training goes on while rank 0 writes the file")


class FedDSTConfig(_Section):
    """FedDST: clients drop and grow weights, the server keeps what most data voted for (`method: feddst`)."""

    drop: float = Field(
        0.3,
        gt=0,
        lt=1,
        description="alpha, share of each layer's weights that a client exchanges at first; falls as a cosine",
    )
    after: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="share of a client's local batches after which it exchanges them; the rest trains the new ones",
    )


class PruneFLConfig(_Section):
    """PruneFL: squared gradients over time decide what is kept (`method: prunefl`)."""

    size: Literal["sparsity", "adaptive"] = Field(
        "sparsity",
        description="how many weights are kept: as sparsity.* says, or as many as pay for their time (the paper's)",
    )
    removable: float = Field(
        0.3,
        gt=0,
        le=1,
        description="share of each layer's kept weights, the smallest, that a mask update may remove; halves over the run",
    )
    computing: float = Field(
        0.035,
        ge=0,
        le=1e3,
        description="time to compute with a weight at one place of an image, over that of sending it; 0: only sending counts",
    )
    first_rounds: int = Field(
        1, ge=0, description="local rounds of the one client that prunes before the federation begins; 0: none"
    )
    overhead: float = Field(
        0.15,
        ge=0,
        le=1e3,
        description="time of a round that no pruning saves, over that of the dense weights (size: adaptive)",
    )


class PruneTrainConfig(_Section):
    """PruneTrain: group lasso, and whole channels removed (`method: prunetrain`)."""

    ratio: float = Field(
        0.25, gt=0, lt=1, description="share of the group lasso in the first loss, which sets its strength"
    )
    cut: Literal["sparsity", "threshold"] = Field(
        "sparsity",
        description="remove channels until sparsity.* is reached, or by prunetrain.threshold (the paper's)",
    )
    threshold: float = Field(
        1e-4, gt=0, le=1e3, description="channels whose largest weight is below this are removed (cut: threshold)"
    )


class SparsyFedConfig(_Section):
    """SparsyFed: power propagation and pruned activations (`method: sparsyfed`)."""

    power: float = Field(1.25, ge=1, le=4, description="beta of w = theta |theta|^(beta - 1); 1: none")
    activations: bool = Field(
        True, description="gradients of weights see pruned activations, as sparse as the layer's weights"
    )


class FedRTSConfig(_Section):
    """FedRTS: votes of clients and server shape Beta distributions, masks are drawn from them (`method: fedrts`)."""

    adjust: float = Field(
        0.4,
        gt=0,
        lt=1,
        description="alpha, share of each layer's weights that nobody votes for, at first; falls as a cosine",
    )
    mix: float = Field(
        0.5,
        ge=0,
        le=1,
        description="gamma, share of the server's own judgement by the average; the rest: clients' votes",
    )
    scale: float = Field(10.0, gt=0, le=1e4, description="lambda, how many observations one round's votes count for")
    observe: Literal["all", "mask_updates"] = Field(
        "all",
        description="clients vote in every round up to the last mask update, or only in those that update the mask",
    )


# The methods of this program (`feddip_mpi.methods`); any other is named by its import path.
METHODS = (
    "feddip", "fedavg", "fedprox", "erk", "gradual", "snip", "ssfl", "feddst", "prunefl", "prunetrain", "sparsyfed",
    "fedrts",
)  # fmt: skip


class Config(_Section):
    """One experiment. Symbols in descriptions are those of docs/method.md."""

    seed: int = Field(1, ge=0, lt=2**63, description="every random stream derives from it")
    rounds: int = Field(100, ge=1, description="T, communication rounds")
    clients: int = Field(50, ge=1, description="N, clients in the federation")
    participants: int = Field(5, ge=1, description="K, clients that take part in a round")
    local_epochs: int = Field(5, ge=1, description="E, passes over a client's data per round")
    batch_size: int = Field(128, ge=1, description="B, images per SGD step")
    learning_rate: float = Field(0.1, gt=0, le=1e3, description="eta_0")
    learning_rate_decay: float = Field(0.998, gt=0, le=1, description="gamma, factor per round")
    weight_decay: float = Field(5e-4, ge=0, le=1e3, description="mu, on all parameters")
    method: str = Field(
        "feddip", description=f"the federated method: {', '.join(METHODS)}, or an import path package.module:name"
    )
    proximal: float = Field(0.01, ge=0, le=1e6, description="strength of FedProx's proximal term")
    feedback: bool = Field(
        True, description="pruned weights keep moving and may grow back; off also masks the gradient"
    )
    server_memory: typing.Annotated[Literal["on", "off", "published"], BeforeValidator(_on_off)] = Field(
        "on", description="on: pruned mass is remembered; off: only the pruned model is; published: masks nest"
    )
    exchange: Literal["allgatherv", "sharded", "node", "dense", "auto"] = Field(
        "allgatherv",
        description="how updates reach all ranks; the first three give the same bits, auto picks one of them",
    )
    balance: Literal["samples", "speed"] = Field(
        "samples", description="a rank's share of the work: equal images, or by its measured speed; changes no result"
    )
    overlap: bool = Field(True, description="messages travel while the next ones are made")
    data: DataConfig = Field(default_factory=DataConfig, description="the data and its partition")
    model: ModelConfig = Field(default_factory=ModelConfig, description="the network")
    sparsity: SparsityConfig = Field(default_factory=SparsityConfig, description="the sparsity schedule")
    mask: MaskConfig = Field(default_factory=MaskConfig, description="the mask")
    penalty: PenaltyConfig = Field(default_factory=PenaltyConfig, description="the penalty schedule")
    upload: UploadConfig = Field(default_factory=UploadConfig, description="the upload")
    download: DownloadConfig = Field(default_factory=DownloadConfig, description="the download")
    network: NetworkConfig = Field(default_factory=NetworkConfig, description="the network")
    control: ControlConfig = Field(default_factory=ControlConfig, description="adaptive control, off by default")
    feddst: FedDSTConfig = Field(default_factory=FedDSTConfig, description="settings of method: feddst")
    prunefl: PruneFLConfig = Field(default_factory=PruneFLConfig, description="settings of method: prunefl")
    prunetrain: PruneTrainConfig = Field(default_factory=PruneTrainConfig, description="settings of method: prunetrain")
    sparsyfed: SparsyFedConfig = Field(default_factory=SparsyFedConfig, description="settings of method: sparsyfed")
    fedrts: FedRTSConfig = Field(default_factory=FedRTSConfig, description="settings of method: fedrts")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="evaluation")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="checkpoints")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    stop_grace: float = Field(
        60,
        ge=0,
        le=1e6,
        description="seconds that a signal leaves a round to finish; then it is abandoned, and played again by resume",
    )
    watchdog: float | None = Field(
        3600,
        gt=0,
        le=1e7,
        description="seconds without progress of a rank (a client trained, a phase ended) that end the job; none: never",
    )
    tensorboard: bool = Field(False, description="also write the numbers for TensorBoard (package tensorboard)")
    on_rank_failure: Literal["rewind", "continue", "abort"] = Field(
        "rewind",
        description="a rank died under `mpirun --with-ft ulfm`: rewind: the others go back to the last checkpoint, which "
        "changes no bit; continue: they go on from the last complete round; abort: all end",
    )
    recovery_timeout: float = Field(
        60,
        gt=0,
        le=1e6,
        description="seconds in which all others must have noticed a rank's death (a batch, an evaluation); then the job ends",
    )
    threads: int = Field(
        1, ge=1, le=1024, description="torch threads per rank; results are bit-equal for equal threads"
    )
    clients_at_once: int = Field(
        1,
        ge=1,
        le=1024,
        description="clients that a rank trains side by side, each in a thread (on a GPU with a stream) and a workspace of its "
        "own; changes no result",
    )
    precision: Literal["fp32", "tf32", "bf16"] = Field(
        "fp32",
        description="of training's convolutions and matrix products (weights, updates, evaluation: float32); tf32: GPUs only",
    )
    memory_fraction: float = Field(
        1.0, gt=0, le=1, description="share of its GPU's memory that a rank may take; for several ranks a GPU"
    )
    deterministic: bool = Field(True, description="on a GPU, only algorithms that repeat bit for bit")

    @field_validator("method")
    @classmethod
    def _a_method(cls, name: str) -> str:
        if name in METHODS or ":" in name:
            return name
        near = difflib.get_close_matches(name.lower(), METHODS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise PydanticCustomError("method", "{hint}valid: {names}, or package.module:name", {
            "hint": hint, "names": ", ".join(METHODS),
        })  # fmt: skip


# What `resume` may change: nothing here alters the meaning of the rounds that are already done.
RESUMABLE_KEYS = (
    "rounds", "exchange", "overlap", "balance", "network.latency", "network.bandwidth", "data.path", "eval.every",
    "eval.clients", "upload.residual_memory", "upload.residual_folder", "checkpoint.every", "checkpoint.keep",
    "checkpoint.best", "checkpoint.minutes", "checkpoint.background", "device", "clients_at_once", "memory_fraction",
    "stop_grace", "watchdog", "tensorboard", "on_rank_failure", "recovery_timeout",
)  # fmt: skip

# These change neither a bit of a run's result nor what is measured of it.
_WITHOUT_MEANING = (
    "data.path", "data.download", "upload.residual_folder", "stop_grace", "watchdog", "tensorboard", "recovery_timeout",
)  # fmt: skip


def is_without_meaning(key: str) -> bool:
    """Whether runs that differ in this key alone are the same experiment."""
    return key in _WITHOUT_MEANING or key.startswith("checkpoint.")


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `KEY=VALUE` overrides, validate.

    Raises:
        InputError: the file cannot be read or is not YAML, or any key or value is wrong (all problems at once).
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read the configuration {str(path)!r}: {error}; name a YAML file (see configs/)"
        ) from None
    return parse(text, overrides, source=str(path))


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
        detail = " ".join(str(error).split())
        raise InputError(f"{source}: not valid YAML: {detail}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise InputError(f"{source}: expected keys and values (rounds: 100), got {type(values).__name__}")
    return values


def validate(values: Mapping[str, Any], source: str = "configuration") -> Config:
    """Validate nested plain values. Raises InputError that lists every problem."""
    problems: dict[str, str] = {}
    config: Config | None = None
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            key = ".".join(str(part) for part in item["loc"])
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
    """A validated copy of `config` with `KEY=VALUE` overrides; `allowed` limits the keys, `place` says to whom."""
    values = to_dict(config)
    for item in overrides:
        key = item.split("=", 1)[0].strip()
        if allowed is not None and "=" in item and key not in allowed:
            raise InputError(
                f"--set {item}: {key!r} cannot change in {place}; allowed: {', '.join(allowed)}; "
                "start a new run with `train` to change anything else"
            )
        _apply_override(values, item)
    return validate(values, "--set")


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

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # 2020-13-45 looks like a date and is none
            raise yaml.YAMLError(f"{_shorten(node.value)} in line {node.start_mark.line + 1}: {error}") from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            try:
                twice = key in seen
                seen.add(key)
            except TypeError:
                raise yaml.YAMLError(f"{_shorten(key)} in line {key_node.start_mark.line + 1} is no key name") from None
            if twice:
                raise yaml.YAMLError(f"key {key!r} given twice (second time in line {key_node.start_mark.line + 1})")
        return super().construct_mapping(node, deep)


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
    message = item["msg"][:1].lower() + item["msg"][1:]
    if item["type"] == "model_type":  # pydantic would name a class of ours
        message = f"input should be a section with some of the keys {', '.join(_section(item['loc']).model_fields)}"
    elif item["type"] == "int_parsing" and (whole := _whole_number(item["input"])) is not None:
        message += f"; write {whole}"
    return f"{key}: got {_shorten(item['input'])}; {message}"


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
    kind = {int: "integer", float: "number", bool: "on, off", str: "text"}.get(annotation, "list")
    return " ".join([kind, " and ".join(limits)]).strip()


if __name__ == "__main__":
    print(reference(), end="")
