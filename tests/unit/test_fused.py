"""The fused first layer against PyTorch's three operations."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from feddip_mpi.models import fused
from feddip_mpi.models.fused import conv_of_few_channels, conv_pool_relu
from feddip_mpi.models.lenet import LeNet5

Layer = Callable[[torch.Tensor, nn.Conv2d], torch.Tensor]


@pytest.fixture(params=[True, False], ids=["AVX-512", "other vectors"], autouse=True)
def vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to a gradient, on any CPU."""
    monkeypatch.setattr(fused, "has_wide_vectors", lambda: request.param)


def plain(x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    return F.relu(F.max_pool2d(conv(x), 2))


def both(x: torch.Tensor, conv: nn.Conv2d) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Value and gradients of weight and bias, fused and plain."""
    found = []
    for layer in (conv_pool_relu, plain):
        out = layer(x, conv)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        found.append([out.detach(), *torch.autograd.grad(out, (conv.weight, conv.bias), direction)])
    return found[0], found[1]


@pytest.mark.parametrize(
    ("channels", "side", "kernel", "padding"),
    [(1, 28, 5, 2), (3, 32, 5, 0), (2, 14, 3, 1), (1, 12, 5, 2), (3, 20, 1, 0)],
)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_value_and_gradients_are_those_of_the_three_operations(
    channels: int, side: int, kernel: int, padding: int, order: torch.memory_format
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, 6, kernel, padding=padding)
    x = torch.randn(9, channels, side, side + 2).contiguous(memory_format=order)
    assert fused._fits(x, conv)
    ours, theirs = both(x, conv)
    assert ours[0].shape == theirs[0].shape
    for value, expected in zip(ours, theirs, strict=True):
        assert torch.allclose(value, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_of_equal_values_the_first_gets_the_gradient_and_only_that() -> None:
    """Black borders make ties in every image: a gradient that went to all four would count the bias four times."""
    conv = nn.Conv2d(1, 4, 5, padding=2)
    with torch.no_grad():
        conv.bias.add_(1.0)
    ours, theirs = both(torch.zeros(3, 1, 28, 28), conv)
    assert float(theirs[2].abs().max()) > 1
    for value, expected in zip(ours, theirs, strict=True):
        assert torch.allclose(value, expected, rtol=1e-5, atol=1e-4)


def gradients(layer: Layer, x: torch.Tensor, conv: nn.Conv2d) -> list[torch.Tensor]:
    """Value and gradients of images, weight and bias."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = layer(x, conv)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad(out, (x, conv.weight, conv.bias), direction)]


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("channels", "kernel", "padding", "stride"), [(6, 5, 0, 1), (2, 3, 0, 1), (6, 5, 2, 1), (3, 3, 0, 2)]
)
def test_a_convolution_of_few_channels_has_the_gradients_of_any(
    channels: int, kernel: int, padding: int, stride: int, order: torch.memory_format
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, 16, kernel, padding=padding, stride=stride).to(memory_format=order)
    x = torch.randn(7, channels, 14, 12).contiguous(memory_format=order)
    for value, expected in zip(
        gradients(conv_of_few_channels, x, conv), gradients(lambda x, conv: conv(x), x, conv), strict=True
    ):
        assert torch.allclose(value, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_which_convolutions_of_few_channels_are_left_to_torch() -> None:
    """Images without a gradient, other types, autocast, and layers that somebody watches."""
    conv, x, seen = nn.Conv2d(2, 4, 3), torch.randn(2, 2, 6, 6), []
    assert conv_of_few_channels(x, conv).grad_fn.name().startswith("Convolution")
    double = x.double().requires_grad_()
    assert conv_of_few_channels(double, nn.Conv2d(2, 4, 3).double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert conv_of_few_channels(x.clone().requires_grad_(), conv).dtype == torch.bfloat16
    conv.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].shape))
    conv_of_few_channels(x.clone().requires_grad_(), conv).sum().backward()
    conv.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    conv_of_few_channels(x.clone().requires_grad_(), conv)
    assert seen == [(2, 4, 4, 4)] * 2

    class Twice(nn.Conv2d):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(images)

    own = Twice(2, 4, 3)
    assert torch.equal(conv_of_few_channels(x.clone().requires_grad_(), own), own(x))
    assert not fused._fits(torch.randn(2, 1, 12, 12), Twice(1, 6, 5))


def test_no_images_have_a_gradient_of_zero() -> None:
    ours, theirs = both(torch.zeros(0, 1, 28, 28), nn.Conv2d(1, 6, 5, padding=2))
    for value, expected in zip(ours, theirs, strict=True):
        assert torch.equal(value, expected)


def test_gradients_where_denormal_numbers_are_flushed() -> None:
    conv, x = nn.Conv2d(1, 6, 5, padding=2), torch.randn(9, 1, 28, 28)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush")
    try:
        ours, theirs = both(x, conv)
    finally:
        torch.set_flush_denormal(False)
    for value, expected in zip(ours, theirs, strict=True):
        assert torch.allclose(value, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv2d(1, 6, 5), (2, 1, 13, 13)),  # an odd row is dropped by the pooling
        (nn.Conv2d(1, 6, 5, stride=2), (2, 1, 19, 19)),
        (nn.Conv2d(4, 6, 5), (2, 4, 12, 12)),
        (nn.Conv2d(1, 6, 5, bias=False), (2, 1, 12, 12)),
        (nn.Conv2d(1, 6, 5, padding="same"), (2, 1, 12, 12)),
        (nn.Conv2d(2, 6, 5, groups=2), (2, 2, 12, 12)),
        (nn.Conv2d(1, 6, 3, padding=1, padding_mode="circular"), (2, 1, 12, 12)),
        (nn.Conv2d(1, 6, 5).double(), (2, 1, 12, 12)),
    ],
)
def test_what_does_not_fit_goes_the_plain_way(conv: nn.Conv2d, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=conv.weight.dtype)
    assert not fused._fits(x, conv)
    assert torch.equal(conv_pool_relu(x, conv), plain(x, conv))


def test_images_with_a_gradient_and_autocast_go_the_plain_way() -> None:
    conv, x = nn.Conv2d(1, 6, 5), torch.randn(2, 1, 12, 12)
    assert fused._fits(x, conv) and not fused._fits(x.clone().requires_grad_(), conv)
    with torch.autocast("cpu", torch.bfloat16):
        assert not fused._fits(x, conv)


def test_a_value_that_is_no_number_stays_one() -> None:
    """A client that diverges must be noticed."""
    conv, x = nn.Conv2d(1, 6, 5), torch.randn(2, 1, 12, 12)
    x[0, 0, 5, 5] = float("nan")
    assert bool(torch.isnan(conv_pool_relu(x, conv)).any())


@pytest.mark.parametrize("side", [12, 28, 32, 33])
def test_lenet_is_the_network_it_was(side: int) -> None:
    torch.manual_seed(3)
    model, x = LeNet5(1, (side, side), 10), torch.randn(5, 1, side, side)
    expected = plain(plain(x, model.conv1), model.conv2).flatten(1)
    expected = model.fc3(F.relu(model.fc2(F.relu(model.fc1(expected)))))
    assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(model(x).square().sum(), list(model.parameters())),
        torch.autograd.grad(expected.square().sum(), list(model.parameters())),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_a_layer_that_is_watched_is_called() -> None:
    conv, seen = torch.nn.Conv2d(1, 6, 5, padding=2), []
    images = torch.rand(2, 1, 28, 28)
    fused = conv_pool_relu(images, conv)
    conv.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    assert torch.allclose(conv_pool_relu(images, conv), fused, atol=1e-6)
    assert seen == [(2, 6, 28, 28)]
