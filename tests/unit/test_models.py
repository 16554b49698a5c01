"""The networks: shapes, counts, gradients, batch norm, and what is refused."""

import importlib
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from feddip_mpi import generators, models
from feddip_mpi.errors import InputError

SMALL = [name for name in models.NAMES if name != "resnet50"]
FLAT = "def build(**k):\n    m = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))\n"
TIED = "def build(**k):\n    m = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))\n"


def prunable_count(model: nn.Module) -> int:
    parameters = dict(model.named_parameters())
    return sum(parameters[name].numel() for name in models.prunable_names(model))


@pytest.mark.parametrize(
    ("name", "in_channels", "size", "prunable"),
    [
        ("lenet5", 1, 28, 61_470),
        ("lenet5", 3, 32, 61_770),
        ("alexnet", 3, 32, 23_262_912),
        ("vgg11", 3, 32, 9_222_848),
        ("resnet18", 3, 32, 11_164_352),
        ("resnet50", 3, 32, 23_467_712),
    ],
)
def test_prunable_weights_are_counted(name: str, in_channels: int, size: int, prunable: int) -> None:
    assert prunable_count(models.create(name, in_channels, (size, size), 10)) == prunable


def test_lenet5_fc1_is_400_by_120() -> None:
    for size in (28, 32):
        assert models.create("lenet5", 1, (size, size), 10).fc1.weight.shape == (120, 400)


@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.parametrize("classes", [2, 100])
def test_logits_have_one_column_per_class(name: str, classes: int) -> None:
    model = models.create(name, 3, (32, 32), classes).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, classes)


@pytest.mark.parametrize(
    ("name", "size"),
    [("lenet5", (12, 12)), ("lenet5", (28, 40)), ("lenet5", (33, 31)), ("alexnet", (16, 16)), ("alexnet", (47, 33)),
     ("alexnet", (28, 28)), ("vgg11", (32, 50)), ("resnet18", (16, 16)), ("resnet18", (28, 28))],
)  # fmt: skip
def test_other_image_sizes_work(name: str, size: tuple[int, int]) -> None:
    model = models.create(name, 1, size, 5)
    assert model(torch.zeros(2, 1, *size)).shape == (2, 5)


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    model = models.create(name, 3, (32, 32), 10)
    F.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 2, 3])).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().sum() > 0, key


def test_same_seed_gives_the_same_weights() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return models.create("lenet5", 1, (28, 28), 10).fc1.weight

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


@pytest.mark.parametrize("name", ["vgg11", "resnet18"])
def test_batch_norm_moves_in_training_and_rests_in_evaluation(name: str) -> None:
    torch.manual_seed(0)
    model = models.create(name, 3, (32, 32), 10)
    images = torch.randn(4, 3, 32, 32) + 1.0
    before = {key: value.clone() for key, value in model.named_buffers()}
    model.eval()
    with torch.no_grad():
        alone, together = model(images[:1]), model(images)
    assert all(torch.equal(before[key], value) for key, value in model.named_buffers())
    torch.testing.assert_close(alone, together[:1], rtol=1e-4, atol=1e-5)  # nothing leaks between images
    model.train()(images)
    assert not any(torch.equal(before[key], value) for key, value in model.named_buffers())


def test_alexnet_drops_out_in_training_only() -> None:
    model = models.create("alexnet", 1, (16, 16), 10)
    image = torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        assert not torch.equal(model.train()(image), model(image))
        assert torch.equal(model.eval()(image), model(image))


def test_lenet5_learns_a_batch() -> None:
    torch.manual_seed(0)
    model = models.create("lenet5", 1, (28, 28), 4)
    images, labels = torch.randn(16, 1, 28, 28), torch.arange(16) % 4
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(80):
        optimiser.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.1


def test_prunable_names_are_weights_in_module_order() -> None:
    model = models.create("lenet5", 1, (28, 28), 10)
    names = ["conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight", "fc3.weight"]
    assert models.prunable_names(model) == names
    assert models.prunable_names(model, ("fc3.weight", "conv1.weight")) == names[1:4]


def test_prunable_names_leave_out_what_is_not_pruned() -> None:
    model = nn.Sequential(
        nn.Embedding(4, 4), nn.Conv1d(1, 1, 1), nn.Conv3d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1), nn.LayerNorm(4),
        nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), nn.Linear(4, 4),
    )  # fmt: skip
    assert models.prunable_names(model) == ["1.weight", "2.weight", "6.weight"]
    assert models.prunable_names(nn.Linear(2, 2)) == ["weight"]


def test_resnet_shortcuts_and_classifier_are_prunable_and_batch_norm_is_not() -> None:
    names = models.prunable_names(models.create("resnet18", 3, (32, 32), 10))
    assert len(names) == 21
    assert "layer2.0.downsample.0.weight" in names
    assert not any("bn" in name or name.endswith("downsample.1.weight") for name in names)


def test_keep_dense_must_name_a_prunable_weight() -> None:
    model = models.create("lenet5", 1, (28, 28), 10)
    with pytest.raises(InputError, match=r"'fc3.weigth'.*did you mean 'fc3.weight'.*conv1.weight, conv2.weight"):
        models.prunable_names(model, ["fc3.weigth"])
    with pytest.raises(InputError, match="fc1.bias"):
        models.prunable_names(model, ["fc1.weight", "fc1.bias"])


@pytest.mark.parametrize(("name", "near"), [("LeNet-5", "lenet5"), ("resnet19", "resnet18"), ("vgg", "vgg11")])
def test_unknown_name_gives_the_nearest(name: str, near: str) -> None:
    with pytest.raises(InputError, match=f"did you mean '{near}'.*package.module:function"):
        models.create(name, 1, (28, 28), 10)


def test_image_too_small_names_the_models_that_fit() -> None:
    with pytest.raises(InputError, match=r"vgg11 needs images of at least 32x32 pixels, got 28x28; .*lenet5"):
        models.create("vgg11", 1, (28, 28), 10)
    with pytest.raises(InputError, match="name your own"):
        models.create("lenet5", 1, (28, 8), 10)


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Writes `source` to an importable module and gives its name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made = []

    def write(source: str) -> str:
        name = f"user_models_{len(made)}"
        (tmp_path / f"{name}.py").write_text("from torch import nn\nimport torch\n" + source)
        made.append(name)
        return name

    yield write
    for name in made:
        sys.modules.pop(name, None)


def test_import_path_builds_your_own(user_module) -> None:
    name = user_module(
        "def build(in_channels, image_size, classes):\n"
        "    h, w = image_size\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * h * w, classes))\n"
    )
    model = models.create(f"{name}:build", 2, (3, 4), 7)
    assert model(torch.zeros(5, 2, 3, 4)).shape == (5, 7)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def other(**k): pass\n", "no function 'build'"),
        ("build = 3\n", "a int, not a function"),
        ("def build(**k): return 3\n", "returned a int"),
        ("def build(width): return nn.Linear(1, 1)\n", "TypeError.*in_channels"),
        ("def build(**k): raise RuntimeError('no weights')\n", "RuntimeError: no weights"),
        ("raise OSError('broken')\n", "cannot import.*OSError: broken"),
        (TIED + "    m[1].weight = m[0].weight\n    return m\n", "0.weight and 1.weight share memory"),
        (TIED + "    m[1].weight = nn.Parameter(m[0].weight.data.T)\n    return m\n", "share memory"),
        ("def build(**k): return nn.LazyLinear(3)\n", "no shape yet"),
        ("def build(**k): return nn.Linear(2, 2).double()\n", "must be torch.float32"),
        ("def build(**k): return nn.ReLU()\n", "no parameters"),
        (
            FLAT + "    m[1].bias.requires_grad = False\n    return m\n",
            "1.bias has requires_grad=False.*register_buffer",
        ),
        (
            FLAT + "    m.register_buffer('scale', torch.ones(2).double())\n    return m\n",
            "scale is torch.float64.*buffers",
        ),
        (
            FLAT + "    m.register_buffer('scale', torch.ones(2) / 0)\n    return m\n",
            "scale holds NaN or infinite.*buffers",
        ),
        (FLAT + "    m[1].bias.data[3] = float('nan')\n    return m\n", "1.bias holds NaN or infinite.*parameters"),
        ("def build(**k): return nn.LazyBatchNorm2d(affine=False)\n", "running_mean has no shape yet"),
    ],
)
def test_import_path_that_fails_says_why(user_module, source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        models.create(f"{user_module(source)}:build", 1, (28, 28), 10)


def own(forward: str) -> str:
    """Source of a module whose network computes `forward` of the images `x` and of logits `y` that are right."""
    lines = [
        "class Net(nn.Module):",
        "    def __init__(self, in_channels, image_size, classes):",
        "        super().__init__()",
        "        self.norm, self.drop, self.calls = nn.BatchNorm2d(in_channels), nn.Dropout(), 0",
        "        self.fc = nn.Linear(in_channels * image_size[0] * image_size[1], classes)",
        "    def forward(self, x):",
        "        self.calls += 1",
        "        y = self.fc(self.drop(self.norm(x)).flatten(1)) + random.random() + numpy.random.random()",
        f"        {forward}",
    ]
    return "import random, numpy\n" + "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        ("return y, x", "returned a tuple"),
        ("return {'out': y}", "returned a dict"),
        ("return y[:, :7]", r"returned a tensor \[2, 7\]"),
        ("return y[0]", r"returned a tensor \[10\]"),
        ("return y.mean()", r"returned a tensor \[\]"),
        ("return y / 0", "returned NaN or infinite"),
        ("return self.fc(x)", "raised RuntimeError: mat1 and mat2"),
        ("return self.gone(x)", "raised AttributeError: .*gone"),
        ("raise KeyError('a\\nb')", "raised KeyError"),
        ("return y.detach()", "raised RuntimeError: .*does not require grad"),
        ("return torch.zeros(2, 10, dtype=int)", "raised NotImplementedError"),
    ],
)
def test_a_model_that_cannot_take_a_step_is_refused(user_module, forward: str, message: str) -> None:
    name = user_module(own(forward))
    rule = r"allowed: .* float32 \[2, 3, 8, 9\] into one tensor of finite logits \[2, 10\]"
    with pytest.raises(InputError, match=f"model.name: {name}:Net: .*{message}.*{rule}") as told:
        models.create(f"{name}:Net", 3, (8, 9), 10)
    assert "\n" not in str(told.value)


def test_the_trial_of_a_model_leaves_no_trace(user_module) -> None:
    name = user_module(own("return y"))

    def draw() -> tuple:
        return float(torch.rand(())), random.random(), float(np.random.random())  # noqa: NPY002

    generators.seed_all(1, "a")
    plain = importlib.import_module(name).Net(3, (8, 9), 10)
    expected = draw()
    generators.seed_all(1, "a")
    model = models.create(f"{name}:Net", 3, (8, 9), 10)
    assert draw() == expected
    assert model.calls == 0 and model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    ours, theirs = model.state_dict(), plain.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("path", ["no_such_package.models:build", ":build", "torch:", "..models:build"])
def test_import_path_that_leads_nowhere(path: str) -> None:
    with pytest.raises(InputError, match="model.name: .*(cannot import|is no import path)"):
        models.create(path, 1, (28, 28), 10)
