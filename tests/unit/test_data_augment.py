"""Augmentation, compared with the same thing done image by image."""

import numpy as np
import pytest
import torch

from feddip_mpi.data import augment
from feddip_mpi.streams import stream


def one_by_one(images, offsets, flips):
    _, _, height, width = images.shape
    padded = np.pad(images, ((0, 0), (0, 0), (4, 4), (4, 4)))
    out = []
    for image, (row, column), flip in zip(padded, offsets, flips, strict=True):
        crop = image[:, row : row + height, column : column + width]
        out.append(crop[:, :, ::-1] if flip else crop)
    return np.stack(out)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (2, 5, 9), (1, 1, 1)])
def test_equals_pad_crop_and_flip_of_each_image(dtype, shape):
    images = np.random.default_rng(0).integers(1, 256, (64, *shape)).astype(dtype)
    offsets, flips = augment.draw(stream(3, "augment"), 64)
    tensor = torch.from_numpy(images)
    result = augment.standard(tensor, torch.from_numpy(offsets), torch.from_numpy(flips))
    assert result.dtype == tensor.dtype
    np.testing.assert_array_equal(result.numpy(), one_by_one(images, offsets, flips))


def test_every_corner_of_the_crop():
    images = torch.arange(1, 1 + 2 * 6 * 7, dtype=torch.float32).view(1, 2, 6, 7).repeat(162, 1, 1, 1)
    offsets = np.stack(np.meshgrid(range(9), range(9), range(2)), -1).reshape(-1, 3)
    flips = offsets[:, 2] == 1
    result = augment.standard(images, torch.from_numpy(offsets[:, :2]), torch.from_numpy(flips))
    np.testing.assert_array_equal(result.numpy(), one_by_one(images.numpy(), offsets[:, :2], flips))


def test_the_middle_without_flip_changes_nothing_and_the_input_stays():
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    before = images.clone()
    still = augment.standard(images, torch.full((2, 2), 4), torch.zeros(2, dtype=torch.bool))
    assert torch.equal(still, images)
    augment.standard(images, torch.zeros((2, 2), dtype=torch.int64), torch.ones(2, dtype=torch.bool))
    assert torch.equal(images, before)


def test_works_on_a_view_and_on_no_images():
    images = torch.arange(8 * 3 * 6 * 6).view(8, 6, 6, 3).permute(0, 3, 1, 2)
    offsets, flips = (torch.from_numpy(array) for array in augment.draw(stream(1, "augment"), 8))
    np.testing.assert_array_equal(
        augment.standard(images, offsets, flips).numpy(), one_by_one(images.numpy(), offsets.numpy(), flips.numpy())
    )
    assert augment.standard(images[:0], offsets[:0], flips[:0]).shape == (0, 3, 6, 6)


def test_draw_covers_its_range_evenly_and_repeats():
    offsets, flips = augment.draw(stream(1, "augment"), 9000)
    assert (offsets.dtype, offsets.shape, flips.dtype, flips.shape) == (np.int64, (9000, 2), np.bool_, (9000,))
    assert np.abs(np.bincount(offsets.ravel(), minlength=9) - 2000).max() < 250
    assert abs(flips.mean() - 0.5) < 0.03
    again = augment.draw(stream(1, "augment"), 9000)
    assert np.array_equal(again[0], offsets)
    assert np.array_equal(again[1], flips)


def test_shapes_that_do_not_fit_are_refused():
    images = torch.zeros(3, 1, 4, 4)
    with pytest.raises(ValueError, match="3 images need offsets"):
        augment.standard(images, torch.zeros(2, 2, dtype=torch.int64), torch.zeros(3, dtype=torch.bool))
