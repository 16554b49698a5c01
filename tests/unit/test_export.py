"""Exported models: all bits of the pruned model, read without this package, and small where it says so."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors import safe_open
from safetensors.torch import load_file

from feddip_mpi import checkpoint, config, export, federation, masks, server, vector
from feddip_mpi.checkpoint import Loaded, Snapshot
from feddip_mpi.errors import DamagedFileError, InputError
from feddip_mpi.report import inspection


def saved(folder: Path, model: str = "lenet5", sparsity: float = 0.9, name: str = "round-000003.h5") -> Loaded:
    """A checkpoint of an untrained model with a random mask, written and read back."""
    shape = (3, 32, 32) if model == "resnet18" else (1, 28, 28)
    settings = config.parse(f"model: {{name: {model}}}")
    built, layout = federation.build_model(settings, shape, 10)
    weights = vector.flatten(built, layout)
    weights[layout.parameters :] += 0.25  # normalisation statistics that a fresh model does not have
    mask = torch.from_numpy(np.random.default_rng(1).random(layout.prunable) >= sparsity)
    state = server.Server.of(3, weights, mask)
    snapshot = Snapshot(
        settings, layout, state, [], "some data", np.ones((2, 10), np.int64), shape, 10, "today",
        (0.5,) * shape[0], (0.25,) * shape[0], tuple(f"class {i} ä" for i in range(10)),
    )  # fmt: skip
    checkpoint.save(folder / name, snapshot, [])
    return checkpoint.load(folder / name)


@pytest.fixture(scope="module")
def lenet(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return saved(tmp_path_factory.mktemp("lenet"))


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and one[name].shape == other[name].shape
        assert one[name].numpy().tobytes() == other[name].numpy().tobytes(), name


def test_the_small_form_is_a_smaller_network_with_the_same_outputs(tmp_path: Path) -> None:
    loaded = saved(tmp_path)
    layout = federation.build_model(loaded.config, (1, 28, 28), 10)[1]
    mask, start = loaded.server.mask, 0
    mask[:] = True
    for shape in layout.prunable_shapes[:2]:  # nothing takes the last half of the inputs of both convolutions' layers
        start += int(np.prod(shape))
        following = layout.prunable_shapes[layout.prunable_sizes.index(int(np.prod(shape))) + 1]
        view = mask[start : start + int(np.prod(following))].view(following)
        view[:, following[1] // 2 :] = False
    path = tmp_path / "model.small.safetensors"
    written = export.export(loaded, path)
    assert written.form == "small" and written.ratio > 1.5
    small, whole = export.load_small(path), federation.build_model(loaded.config, (1, 28, 28), 10)[0].eval()
    whole.load_state_dict(export.pruned_state(loaded))
    assert [small.conv1.out_channels, small.conv2.in_channels, small.conv2.out_channels, small.fc1.in_features] == [
        3, 3, 8, 200,
    ]  # fmt: skip
    images = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(small(images), whole(images), atol=1e-6)
    assert f"load_small('{path}')" in export.report(written)
    other = tmp_path / "model.safetensors"
    export.export(loaded, other)
    with pytest.raises(InputError, match="not the small form"):
        export.load_small(other)
    with pytest.raises(InputError, match="no such file"):
        export.load_small(tmp_path / "none")


def test_the_small_form_has_the_statistics_of_the_channels_that_are_left(tmp_path: Path) -> None:
    loaded = saved(tmp_path, "test_methods:Net")
    whole, layout = federation.build_model(loaded.config, (1, 28, 28), 10)
    statistics = loaded.server.weights[layout.parameters :]
    statistics.copy_(torch.linspace(0.5, 1.5, statistics.numel()))
    loaded.server.mask.fill_(True)
    loaded.server.mask[layout.prunable_sizes[0] :][: layout.prunable_sizes[1]].view(20, 8, -1)[:, ::2] = False
    path = tmp_path / "model.small.safetensors"
    export.export(loaded, path)
    small = export.load_small(path)
    whole.load_state_dict(export.pruned_state(loaded))
    assert small.norm.num_features == 4 and torch.equal(small.norm.running_var, whole.norm.running_var[1::2])
    images = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(small(images), whole.eval()(images), atol=1e-5)


def test_the_small_form_needs_a_chain_of_layers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="every layer's channels must go into one other"):
        export.export(saved(tmp_path, "resnet18"), tmp_path / "model.small.safetensors")


@given(arrays.arrays(np.bool_, st.integers(0, 2000), elements=st.booleans() | st.just(False)))
def test_gaps_are_undone(mask: np.ndarray) -> None:
    indices = np.flatnonzero(mask)
    gaps = export.to_gaps(indices)
    assert gaps.dtype == np.uint8
    assert export.from_gaps(gaps).tolist() == indices.tolist()


@pytest.mark.parametrize("indices", [[], [0], [254], [255], [256], [509], [510], [0, 255, 510, 511], [10**6]])
def test_gaps_at_the_edges(indices: list[int]) -> None:
    assert export.from_gaps(export.to_gaps(np.array(indices, np.int64))).tolist() == indices


@pytest.mark.parametrize(("sparsity", "kind"), [(0.5, "mask"), (0.99, "gaps"), (0.0, None)])
def test_the_smaller_way_is_taken(sparsity: float, kind: str | None) -> None:
    mask = np.random.default_rng(0).random((40, 50)) >= sparsity
    tensor = torch.randn(40, 50) * torch.from_numpy(mask)
    stored, shapes = export.to_sparse({"w": tensor, "b": torch.ones(3)}, {"w": mask})
    assert set(stored) == ({"b", "w::values", f"w::{kind}"} if kind else {"b", "w"})
    assert shapes == ({"w": [40, 50]} if kind else {})
    assert sum(t.numel() * t.element_size() for t in stored.values()) <= 4 * (2000 + 3)


def test_all_forms_carry_the_same_bits(lenet: Loaded, tmp_path: Path) -> None:
    state = export.pruned_state(lenet)
    for name, mask in lenet.masks.items():
        kept = torch.from_numpy(mask)
        assert torch.equal(state[name][kept], torch.from_numpy(lenet.tensors[name])[kept])
        assert not state[name][~kept].any()
    for file in ("m.safetensors", "m.pt", "m.sparse.safetensors"):
        export.export(lenet, tmp_path / file)
    same_bits(load_file(tmp_path / "m.safetensors"), state)
    same_bits(torch.load(tmp_path / "m.pt", weights_only=True), state)
    same_bits(export.load_sparse(tmp_path / "m.sparse.safetensors"), state)
    assert {file.name for file in tmp_path.iterdir()} == {"m.safetensors", "m.pt", "m.sparse.safetensors"}


def test_negative_zero_inside_the_mask_survives(lenet: Loaded, tmp_path: Path) -> None:
    name, mask = next(iter(lenet.masks.items()))
    tensor = torch.full(mask.shape, -0.0) * torch.from_numpy(mask)
    stored, shapes = export.to_sparse({name: tensor}, {name: mask})
    back = export._to_dense(dict(stored), name, shapes[name]) if shapes else stored[name]
    assert torch.equal(torch.signbit(back)[torch.from_numpy(mask)], torch.ones(int(mask.sum()), dtype=torch.bool))


def test_a_plain_model_loads_it_strictly(tmp_path: Path) -> None:
    """Batch norm counts its batches in integer buffers, which no checkpoint holds."""
    loaded = saved(tmp_path, "resnet18", 0.98)
    made = export.export(loaded, tmp_path / "model.sparse.safetensors")
    plain, _ = federation.build_model(loaded.config, loaded.input_shape, 10)
    plain.load_state_dict(export.load_sparse(made.path), strict=True)
    state = plain.state_dict()
    counters = [value for name, value in state.items() if name.endswith("num_batches_tracked")]
    assert counters and all(int(value) == 0 for value in counters)
    assert float(next(v for n, v in state.items() if n.endswith("running_mean"))[0]) == 0.25
    assert made.kept == int(loaded.server.mask.sum())
    assert made.ratio > 20  # 2 % of the weights at 5 bytes each instead of 4
    assert abs(masks.sparsity(loaded.server.mask) - 0.98) < 0.001


def recipe(report: str) -> str:
    """The lines of Python that the command prints, as they stand."""
    return report.split("without this package:\n")[1].split("\nmodel: ")[0]


@pytest.mark.parametrize("name", ["lenet5", "resnet18"])  # the latter has counters, which are no float32
def test_the_printed_recipe_fills_a_model_without_this_package(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = saved(tmp_path, name, 0.98)
    printed = recipe(export.report(export.export(loaded, tmp_path / "model.sparse.safetensors")))
    model, _ = federation.build_model(loaded.config, loaded.input_shape, loaded.classes)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "feddip_mpi", None)
        exec(printed, {"model": model})
    same_bits(dict(model.state_dict()), export.pruned_state(loaded))


def test_the_recipe_stands_in_the_documents() -> None:
    documents = Path(__file__).parents[2] / "docs" / "checkpoint.md"
    assert f"```python\n{export.READ_SPARSE}```" in documents.read_text()


def test_metadata_say_how_to_use_it(lenet: Loaded, tmp_path: Path) -> None:
    export.export(lenet, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        about = file.metadata()
    assert about["architecture"] == "lenet5"
    assert json.loads(about["input_shape"]) == [1, 28, 28]
    assert (about["classes"], about["round"]) == ("10", "3")
    assert (json.loads(about["mean"]), json.loads(about["std"])) == ([0.5], [0.25])
    assert json.loads(about["class_names"])[3] == "class 3 ä"
    assert float(about["sparsity"]) == pytest.approx(masks.sparsity(lenet.server.mask))


def test_a_small_form_that_is_not_smaller_says_so(tmp_path: Path) -> None:
    written = export.export(saved(tmp_path, sparsity=0.1), tmp_path / "model.small.safetensors")
    assert written.ratio <= 1.05 and "no smaller" in export.report(written)


@pytest.mark.parametrize("ending", ["safetensors", "pt", "sparse.safetensors"])
def test_the_command_says_what_the_network_takes(tmp_path: Path, lenet: Loaded, ending: str) -> None:
    said = export.report(export.export(lenet, tmp_path / f"model.{ending}"))
    assert "its input: float32 (pixel / 255 - mean) / std by channel, mean [0.5], std [0.25]" in said
    made = re.search(r"model: feddip_mpi\.models\.create\((.*)\), or", said)
    assert made and made[1] == "'lenet5', 1, (28, 28), 10"


def test_inspect_tells_the_size_that_export_writes(tmp_path: Path) -> None:
    loaded = saved(tmp_path)
    written = export.export(loaded, tmp_path / "model.sparse.safetensors")
    facts = inspection.describe(tmp_path / "round-000003.h5")
    assert facts["pruned_bytes"] == written.file_bytes == written.path.stat().st_size


def test_nothing_is_overwritten_unless_asked(lenet: Loaded, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_text("mine")
    with pytest.raises(InputError, match="--force"):
        export.export(lenet, path)
    assert path.read_text() == "mine"
    export.export(lenet, path, force=True)
    assert torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("file", "form", "message"),
    [
        ("model.bin", None, "--format"),
        ("model.pt", "onnx", "unknown"),
        ("model.sparse.pt", None, r"end it in \.sparse\.safetensors"),
        ("model.small.pth", None, r"end it in \.small\.safetensors"),
        ("missing/model.pt", None, "there is no folder"),
        (".", "torch", "is a folder"),
    ],
)
def test_what_is_refused(file: str, form: str | None, message: str, lenet: Loaded, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        export.export(lenet, tmp_path / file, form)
    assert not list(tmp_path.iterdir())


def test_format_overrides_the_ending(lenet: Loaded, tmp_path: Path) -> None:
    assert export.export(lenet, tmp_path / "model.bin", "sparse").form == "sparse"
    assert export.load_sparse(tmp_path / "model.bin").keys() == export.pruned_state(lenet).keys()


def test_other_files_are_no_sparse_form(lenet: Loaded, tmp_path: Path) -> None:
    export.export(lenet, tmp_path / "dense.safetensors")
    with pytest.raises(InputError, match="not the sparse form"):
        export.load_sparse(tmp_path / "dense.safetensors")
    with pytest.raises(InputError, match="no such file"):
        export.load_sparse(tmp_path / "nothing")
    data = (tmp_path / "dense.safetensors").read_bytes()
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    with pytest.raises(DamagedFileError):
        export.load_sparse(tmp_path / "cut")


def test_a_changed_model_is_refused(lenet: Loaded) -> None:
    from dataclasses import replace

    with pytest.raises(InputError, match="has changed since"):
        export.pruned_state(replace(lenet, classes=11))
