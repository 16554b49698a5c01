"""Everything a rank needs before its first round: data, partition, model, buffers."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from feddip_mpi import data, generators, indices, methods, models, runtime
from feddip_mpi.batches import DeviceData
from feddip_mpi.collectives import Communicator
from feddip_mpi.data import partition as partitions
from feddip_mpi.errors import FeddipError, InputError, PeerError
from feddip_mpi.local import LocalTrainer
from feddip_mpi.methods.base import Method
from feddip_mpi.models import trial
from feddip_mpi.models.dropout import Dropout
from feddip_mpi.settings import Config
from feddip_mpi.trainers import SHARED_GENERATORS, Trainers
from feddip_mpi.vector import BoundModel, Layout, flatten


@dataclass(frozen=True)
class Federation:
    """A rank's view of the federation.

    Attributes:
        config, comm, device: as given.
        dataset: the images, one copy per node.
        identity: fingerprint of images and labels; a resume on other data is refused.
        partition: which images belong to which client.
        train_data, test_data: the splits on this rank's device.
        layout, bound: the model and its flat vector.
        trainers: what trains it; the first in `bound`.
        initial: float32 [n] on the device, the initial weights.
        method: what is trained with; the same on every rank.
    """

    config: Config
    comm: Communicator
    device: torch.device
    dataset: data.Dataset
    identity: str
    partition: partitions.Partition
    train_data: DeviceData
    test_data: DeviceData
    layout: Layout
    bound: BoundModel
    trainers: Trainers
    initial: torch.Tensor
    method: Method

    @property
    def trainer(self) -> LocalTrainer:
        """For what clients do one after another."""
        return self.trainers.all[0]

    @cached_property
    def samples(self) -> list[int]:
        """Training images of every client; counted once, because a round must not cost more where there are more clients."""
        return [len(part) for part in self.partition.train]


def build(config: Config, comm: Communicator, device: torch.device) -> Federation:
    """Load, split and place the data, make the model. Raises the same error on all ranks if any rank fails."""
    dataset = load_dataset(config, comm)
    identity = agree_on_identity(dataset, comm)
    error: FeddipError | None = None
    try:
        parts = partitions.make(
            config.data, config.clients, dataset.train_labels, dataset.test_labels, dataset.classes, config.seed
        )
        model, layout = build_model(config, dataset.train_images.shape[1:], dataset.classes)
        _require_places(config, layout)
        _require_batches_of_two(config, model, parts)
        method = methods.make(config, model, layout, dataset.train_images.shape[1:])
        others = _more_models(config, model, dataset.train_images.shape[1:], dataset.classes)
    except FeddipError as caught:
        error = caught
    comm.check(error)
    initial = flatten(model, layout)
    _require_same_start(comm, device, parts, initial)
    initial = initial.to(device)
    bound, *more = (BoundModel(each, layout, device) for each in (model, *others))
    # On the CPU convolution and pooling then run channels last too: 1.3 times the LeNet-5 step (docs/results/step.json).
    # A model by import path may flatten its features with `view`, which takes contiguous ones only.
    channels_last = device.type == "cpu" and config.model.name in models.NAMES
    train_data, test_data = place(dataset, device, channels_last)
    record, rule = _records_steps(config, device), method.local_rule()
    return Federation(
        config=config,
        comm=comm,
        device=device,
        dataset=dataset,
        identity=identity,
        partition=parts,
        train_data=train_data,
        test_data=test_data,
        layout=layout,
        bound=bound,
        trainers=Trainers(
            # The first trains what trains alone, which alone is recorded.
            [
                LocalTrainer(each, train_data, rule, method.hook(each), record and each is bound)
                for each in (bound, *more)
            ],
            config.threads,
        ),
        initial=initial,
        method=method,
    )


def _records_steps(config: Config, device: torch.device) -> bool:
    """Whether this rank's steps become CUDA graphs: if asked for, and where that was seen to change no bit.

    Not seen on AMD's GPUs, nor with networks of the user's own (docs/results/performance.md, "GPUs").
    """
    if device.type != "cuda" or config.cuda_graphs == "off":
        return False
    seen = config.model.name in models.NAMES and torch.version.hip is None
    return config.cuda_graphs == "on" or seen


def build_model(config: Config, input_shape: Any, classes: int) -> tuple[torch.nn.Module, Layout]:
    """The model with its initial weights, which depend on the seed only, and its layout."""
    channels, height, width = (int(x) for x in input_shape)
    with generators.preserved():
        generators.seed_all(config.seed, "initial weights")
        model = models.create(config.model.name, channels, (height, width), classes)
    return model, Layout.of(model, models.prunable_names(model, config.model.keep_dense))


def _more_models(config: Config, model: torch.nn.Module, input_shape: Any, classes: int) -> list[torch.nn.Module]:
    """A network for each further client that trains at once.

    Raises:
        InputError: they are not different ones, or draw from generators that they would share; the latter is also found while
            they train, but that may be late: a rank may train a single client in each round, until another rank dies.
    """
    if config.clients_at_once > 1 and trial.draws_globally(model, (2, *map(int, input_shape))):
        raise InputError(SHARED_GENERATORS.format(config.clients_at_once))
    made = [build_model(config, input_shape, classes)[0] for _ in range(config.clients_at_once - 1)]
    owners: dict[int, int] = {}
    for number, each in enumerate((model, *made)):
        for name, part in _own_parts(each):
            if owners.setdefault(id(part), number) != number:
                raise InputError(
                    f"clients_at_once: got {config.clients_at_once}, but {config.model.name} returns {name} when it is "
                    "called again; allowed: a function that makes a new one, or clients_at_once=1"
                )
    return made


def _own_parts(model: torch.nn.Module) -> Iterator[tuple[str, object]]:
    """What a network that trains beside others may not have in common with them, with a name for messages.

    Floating-point buffers of modules of its own are not among it: `BoundModel` gives each network new ones.
    """
    yield "the same network", model
    for name, module in model.named_modules():
        if (
            isinstance(module, Dropout)
            or next(itertools.chain(module.parameters(False), module.buffers(False)), None) is not None
        ):
            yield f"the same module {name}", module
    for name, parameter in model.named_parameters():
        yield f"the same parameter {name}", parameter
    for name, buffer in model.named_buffers():
        if not buffer.is_floating_point():
            yield f"the same buffer {name}", buffer


def _require_places(config: Config, layout: Layout) -> None:
    """Raises InputError where places of weights could not be sent: hours later otherwise, at the first mask update."""
    if layout.prunable > indices.MAX_SIZE:
        raise InputError(
            f"model.name: {config.model.name} has {layout.prunable} prunable weights; allowed: up to {indices.MAX_SIZE}; "
            "name some of its tensors in model.keep_dense, or take a smaller model"
        )


def _require_batches_of_two(config: Config, model: torch.nn.Module, parts: partitions.Partition) -> None:
    """Raises InputError where batch normalisation would meet a batch of one image."""
    norms = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return
    reason = f"{config.model.name} has batch normalisation ({norms[0]}), which has no statistics of one image"
    if config.batch_size == 1:
        raise InputError(f"batch_size: got 1, but {reason}; allowed: 2 or more")
    single = next((client for client, part in enumerate(parts.train) if len(part) == 1), None)
    if single is None:
        return
    if config.data.partition in ("dirichlet", "quantity"):
        key, got, way_out = "data.min_samples", config.data.min_samples, "raise data.min_samples to 2"
    else:
        key, got, way_out = "clients", config.clients, "lower clients"
    raise InputError(f"{key}: got {got}, which leaves client {single} a single image, but {reason}; {way_out}")


def load_dataset(config: Config, comm: Communicator) -> data.Dataset:
    """One copy per node: its first rank reads, the others map the same memory."""
    loaded, error = None, None
    if comm.node_rank == 0:
        try:
            loaded = data.load(config.data, config.seed)
        except FeddipError as caught:
            error = caught
    comm.check(error)
    metadata = comm.node_broadcast(loaded.metadata() if loaded else None)
    arrays = comm.shared_arrays(loaded.arrays() if loaded else None)
    return data.from_arrays(arrays, metadata)


def agree_on_identity(dataset: data.Dataset, comm: Communicator) -> str:
    """The fingerprint of the data. Raises InputError on all ranks if nodes have different data."""
    # One rank of each node computes it, for all of the node map the same memory.
    identity: str = comm.node_broadcast(identity_of(dataset) if comm.node_rank == 0 else None)
    digests = comm.gather(np.array([float(zlib.crc32(identity.encode()))]))[:, 0]
    error: FeddipError | None = None
    if len(set(digests.tolist())) > 1:
        error = InputError(_differing(comm.gather_json([identity, dataset.source])))
    comm.check(error)
    return identity


def _require_same_start(
    comm: Communicator, device: torch.device, parts: partitions.Partition, initial: torch.Tensor
) -> None:
    """Raises PeerError on all ranks where they would not train the same: wrong results, and no later check may notice.

    Each rank partitions the data and draws the first weights by itself. Versions that differ without changing these are
    warned of: other libraries may compute other last bits, which replicas that drift apart show.
    """
    mine = {
        "device": device.type,
        "partition": f"{_crc([*parts.train, *parts.test]):08x}",
        "initial weights": f"{_crc([initial.numpy()]):08x}",
        "versions": ", ".join(f"{name} {version}" for name, version in runtime.versions().items()),
    }
    digests = comm.gather(np.array([float(zlib.crc32(repr(mine).encode()))]))[:, 0]
    if len(set(digests.tolist())) == 1:
        return
    found = comm.gather_json(mine)
    lines = [
        f"  {name}: {_named(ranks)}: {value}"
        for name in mine
        if len(holders := _holders([each[name] for each in found])) > 1
        for value, ranks in holders.items()
    ]
    told = "\n".join(lines)
    if all(each[name] == mine[name] for each in found for name in ("device", "partition", "initial weights")):
        if comm.rank == 0:
            runtime.log.warning("the ranks differ in their versions, which may change last bits:\n%s", told)
        return
    error = PeerError(
        f"the ranks would not train the same (CRC-32 of what each has made, and where):\n{told}\n"
        "give all ranks the same versions, the same code of your own and GPUs, or none (`device`); `feddip-mpi doctor` "
        "compares them"
    )
    error.shared = True
    raise error


def _crc(arrays: Iterable[np.ndarray]) -> int:
    """CRC-32 of sizes and contents."""
    crc = 0
    for array in arrays:
        crc = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data, zlib.crc32(str(array.shape).encode(), crc))
    return crc


def _holders(values: Iterable[str]) -> dict[str, list[int]]:
    """The ranks that have each value; `values`: of all ranks, in their order."""
    holders: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        holders.setdefault(value, []).append(rank)
    return holders


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {_spans(ranks)}"


def _differing(found: Sequence[Sequence[str]]) -> str:
    """The message for ranks that found different data; `found`: identity and source of each rank."""
    lines = [
        f"  {_named(ranks)}: {identity!r} ({found[ranks[0]][1]})"
        for identity, ranks in _holders(identity for identity, _ in found).items()
    ]
    head, way_out = "data.path: the ranks found different data:", "give every node the same files"
    return "\n".join([head, *lines, way_out])


def _spans(ranks: Sequence[int]) -> str:
    """Ascending numbers as text: 0-3, 6."""
    starts = [rank for i, rank in enumerate(ranks) if i == 0 or rank != ranks[i - 1] + 1]
    ends = [rank for i, rank in enumerate(ranks) if i + 1 == len(ranks) or rank + 1 != ranks[i + 1]]
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in zip(starts, ends, strict=True))


def place(dataset: data.Dataset, device: torch.device, channels_last: bool) -> tuple[DeviceData, DeviceData]:
    """Both splits as uint8 on the device; on the CPU this maps the node's copy. `channels_last`: see `DeviceData`."""
    shape = (1, -1, 1, 1)
    mean = (torch.tensor(dataset.mean, dtype=torch.float32) * 255).view(shape).to(device)
    std = (torch.tensor(dataset.std, dtype=torch.float32) * 255).view(shape).to(device)

    def split(images: np.ndarray, labels: np.ndarray) -> DeviceData:
        on_device = torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)
        return DeviceData(*on_device, mean, std, channels_last)

    return split(dataset.train_images, dataset.train_labels), split(dataset.test_images, dataset.test_labels)


def identity_of(dataset: data.Dataset) -> str:
    """Name, shapes and CRC-32 of the data, e.g. "fashion-mnist 60000x1x28x28 3f1c..."."""
    crc = 0
    for array in dataset.arrays().values():
        crc = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, crc)
    return f"{dataset.name} {'x'.join(map(str, dataset.train_images.shape))} {crc:08x}"
