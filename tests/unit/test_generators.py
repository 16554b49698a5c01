"""The global generators that a model's own code may draw from."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from feddip_mpi import config, federation, generators, streams


def draw() -> tuple[float, ...]:
    return float(torch.rand(())), random.random(), float(np.random.random())  # noqa: NPY002


def initialised_by_numpy(in_channels: int, image_size: tuple[int, int], classes: int) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size[0] * image_size[1], classes))
    noise = np.random.standard_normal(classes) + random.random()  # noqa: NPY002
    model[1].bias.data = torch.from_numpy(noise).float()
    return model


def test_seeded_numbers_depend_on_the_arguments_alone() -> None:
    keys = [(1, "a", 0, 0), (2, "a", 0, 0), (1, "b", 0, 0), (1, "a", 1, 0), (1, "a", 0, 1)]
    drawn = []
    for key in [*keys, *reversed(keys)]:
        generators.seed_all(*key)
        drawn.append(draw())
    assert drawn[:5] == drawn[:4:-1]
    assert all(len(set(column)) == 5 for column in zip(*drawn, strict=True))


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_every_seed_of_a_run_is_accepted(seed: int) -> None:
    generators.seed_all(seed, "dropout", 3, 4)


def test_preserved_generators_go_on_where_they_were() -> None:
    generators.seed_all(1, "a")
    expected = draw()
    generators.seed_all(1, "a")
    with pytest.raises(ValueError), generators.preserved():
        generators.seed_all(2, "b")
        draw()
        raise ValueError
    assert draw() == expected


def test_initial_weights_depend_on_the_seed_only() -> None:
    def weights(seed: int) -> torch.Tensor:
        settings = config.validate({"seed": seed, "model": {"name": f"{__name__}:initialised_by_numpy"}})
        return federation.build_model(settings, (1, 4, 4), 3)[0][1].bias

    first = weights(3)
    draw()
    assert torch.equal(weights(3), first)
    assert not torch.equal(weights(4), first)


def test_seeding_gives_torch_s_own_numbers() -> None:
    """`torch.manual_seed` is left out because it is slow, not because it would give others."""
    generators.seed_all(5, "dropout", 1, 2)
    ours = torch.rand(4)
    torch.manual_seed(streams.torch_seed(5, "dropout", 1, 2))
    assert torch.equal(torch.rand(4), ours)
