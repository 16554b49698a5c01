"""The flat vector: every tensor in its place, and a model that lives in it."""

import pytest
import torch
from torch import nn

from feddip_mpi.vector import BoundModel, Layout, flatten


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3), nn.PReLU())


PRUNABLE = ["3.weight", "0.weight"]  # not in module order: the order asked for is the order of the vector


def test_layout_lists_prunable_then_parameters_then_float_buffers() -> None:
    layout = Layout.of(network(), PRUNABLE)
    assert layout.names == (
        "3.weight", "0.weight", "0.bias", "1.weight", "1.bias", "3.bias", "4.weight", "1.running_mean", "1.running_var",
    )  # fmt: skip
    assert layout.prunable_names == ("3.weight", "0.weight")
    assert layout.prunable_shapes == ((3, 8), (2, 1, 3, 3))
    assert layout.prunable_sizes == (24, 18)
    assert (layout.prunable, layout.parameters, layout.size) == (42, 42 + 2 + 2 + 2 + 3 + 1, 52 + 4)
    assert (layout.prunable_tensors, layout.parameter_tensors) == (2, 7)


def test_offsets_tile_the_vector() -> None:
    layout = Layout.of(network(), PRUNABLE)
    ends = [offset + size for offset, size in zip(layout.offsets, layout.sizes, strict=True)]
    assert layout.offsets == (0, *ends[:-1])
    assert ends[-1] == layout.size


@pytest.mark.parametrize(("length", "tensors"), [("size", 9), ("parameters", 7), ("prunable", 2)])
def test_views_cover_whole_tensors_of_a_prefix(length: str, tensors: int) -> None:
    layout = Layout.of(network(), PRUNABLE)
    vector = torch.arange(getattr(layout, length), dtype=torch.float32)
    views = layout.views(vector)
    assert len(views) == tensors
    assert torch.equal(torch.cat([view.reshape(-1) for view in views]), vector)
    assert [tuple(view.shape) for view in views] == list(layout.shapes[:tensors])
    assert len(layout.views(vector[:-1])) == tensors - 1
    views[1].zero_()
    assert not vector[layout.offsets[1] : layout.offsets[1] + layout.sizes[1]].any()


def test_flatten_copies_every_tensor_to_its_place() -> None:
    model = network()
    model[1].running_mean.copy_(torch.tensor([7.0, 8.0]))
    layout = Layout.of(model, PRUNABLE)
    vector = flatten(model, layout)
    state = model.state_dict()
    for name, view in zip(layout.names, layout.views(vector), strict=True):
        assert torch.equal(view, state[name])
    vector.zero_()
    assert model[3].weight.any()


def test_bound_model_computes_what_the_model_did_and_follows_its_vector() -> None:
    model, images = network(), torch.randn(5, 1, 4, 4)
    expected = model.eval()(images)
    layout = Layout.of(model, PRUNABLE)
    bound = BoundModel(model, layout, torch.device("cpu"))
    assert torch.equal(bound.model(images), expected)
    assert [tuple(p.shape) for p in bound.parameters] == list(layout.shapes[: layout.parameter_tensors])
    bound.vector[: layout.prunable] = 0
    assert not bound.model[3].weight.any() and not bound.model[0].weight.any()
    assert bound.model[3].bias.any()
    with torch.no_grad():
        bound.model[3].bias.fill_(3.0)
    assert torch.equal(flatten(bound.model, layout), bound.vector)


def test_statistics_of_a_forward_land_in_the_vector() -> None:
    bound = BoundModel(network(), Layout.of(network(), PRUNABLE), torch.device("cpu"))
    before = bound.vector.clone()
    bound.model.train()(torch.randn(5, 1, 4, 4))
    changed = (bound.vector != before).nonzero().squeeze(1)
    assert changed.tolist() == [52, 53, 54, 55]


def test_counters_go_back_to_where_they_began() -> None:
    model = network()
    model.train()(torch.randn(5, 1, 4, 4))
    bound = BoundModel(model, Layout.of(model, PRUNABLE), torch.device("cpu"))
    for _ in range(3):
        bound.model(torch.randn(5, 1, 4, 4))
    assert int(bound.model[1].num_batches_tracked) == 4
    bound.reset_counters()
    assert int(bound.model[1].num_batches_tracked) == 1


def test_a_model_without_prunable_weights_has_an_empty_prefix() -> None:
    layout = Layout.of(network(), [])
    assert (layout.prunable, layout.prunable_names, layout.parameters) == (0, (), 52)
