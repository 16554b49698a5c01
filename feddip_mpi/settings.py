"""The configuration's data: frozen sections, each key with its default, range and meaning. Knows no torch, no MPI, no files.

Every key is declared once, here; `config` reads and checks values, and makes the README's reference from these declarations.
"""

from __future__ import annotations

import difflib
import typing
from typing import Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


def _on_off(value: Any) -> Any:
    """YAML 1.1 reads a bare `on` or `off` as a boolean; the key means the word."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


LARGEST = 2**63 - 1  # integers


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Any, info: ValidationInfo) -> Any:
        parts = typing.get_args(cls.model_fields[str(info.field_name)].annotation)
        if value == "none" and type(None) in parts:  # as the reference and `grid` names write it
            return None
        # pydantic would read `rounds: yes` as one round.
        given = value if isinstance(value, (list, tuple)) else (value,)
        if any(isinstance(item, bool) for item in given) and cls._holds(info, int, float):
            raise PydanticCustomError("number", "a number is no switch")  # `config` says what is allowed
        return value

    @field_validator("*")
    @classmethod
    def _of_64_bits(cls, value: Any, info: ValidationInfo) -> Any:
        """What is larger fits no array and no file, and would show late."""
        given = value if isinstance(value, tuple) else (value,)
        if cls._holds(info, int) and any(item is not None and abs(item) > LARGEST for item in given):
            raise PydanticCustomError("size", "an integer of more than 64 bits")
        return value

    @classmethod
    def _holds(cls, info: ValidationInfo, *types: type) -> bool:
        """Whether a key is of one of these types, or may be none, or is a list of them."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        return any(kind in types for kind in (annotation, *typing.get_args(annotation)))


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
    allocation: Literal["global", "lamp", "erk", "uniform"] = Field(
        "global",
        description="how many weights each layer keeps at a cut by magnitude (feddip, gradual): the largest over all layers; "
        "by LAMP scores; by shape; the same share",
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
    residual_device_memory: int | None = Field(
        None,
        ge=0,
        le=2**30,
        description="megabytes of residuals a rank keeps on its GPU before any go to memory; none: an eighth of what "
        "is free after the first client",
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
    overlap: bool = Field(
        True,
        description="ranks that would wait for others in a round evaluate the model of the round before in that time; "
        "its record comes one round later",
    )


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
        "on",
        description="on: pruned mass is remembered; off: only the pruned model is; published: first all, then masks nest",
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
        description="seconds without progress of a rank (data read, client trained, phase ended) that end the job; none: never",
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
    cuda_graphs: typing.Annotated[Literal["auto", "on", "off"], BeforeValidator(_on_off)] = Field(
        "auto",
        description="a GPU is told of a client's step once and then starts it with a single launch, to the same bits; auto: with "
        "the networks of this program, but not on AMD's GPUs; on: with any, which must draw and decide on the GPU alone",
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
