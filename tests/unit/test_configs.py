"""The files in configs/: each parses, says what it is, and fits the model and data it names."""

from pathlib import Path

import pytest

from feddip_mpi import config, models, settings

ROOT = Path(__file__).parents[2]
METHODS = sorted((ROOT / "configs" / "methods").glob("*.yaml"))
FILES = [*sorted((ROOT / "configs").glob("*.yaml")), *METHODS]
IMAGES = {"fashion-mnist": (1, 28, 10), "cifar10": (3, 32, 10), "cifar100": (3, 32, 100)}


def test_the_announced_files_exist() -> None:
    announced = {"quickstart", "fashion-mnist-lenet5", "cifar10-alexnet", "cifar100-resnet18", "non-iid", "fedavg"}
    assert announced <= {file.stem for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_file_parses_and_is_commented(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert sum("#" in line for line in lines) >= 5
    assert max(map(len, lines)) <= 120
    loaded = config.load(file)
    assert config.parse(config.to_yaml(loaded)) == loaded


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_model_fits_the_data(file: Path) -> None:
    loaded = config.load(file)
    channels, side, classes = IMAGES[loaded.data.name]
    model = models.create(loaded.model.name, channels, (side, side), classes)
    assert models.prunable_names(model, loaded.model.keep_dense)


def test_published_setting_is_the_default_of_every_key_it_names() -> None:
    published = config.load(ROOT / "configs" / "fashion-mnist-lenet5.yaml")
    values = {"rounds": 1000, "checkpoint": {"every": 50}, "upload": {"values": "int4"}}
    assert published == config.validate(values)


def test_fedavg_differs_from_the_published_setting_in_the_method_alone() -> None:
    def setting(name: str) -> dict:
        loaded = config.to_dict(config.load(ROOT / "configs" / name))
        return {key: loaded[key] for key in loaded if key not in ("method", "sparsity", "mask", "penalty", "upload")}

    assert setting("fedavg.yaml") == setting("fashion-mnist-lenet5.yaml")


def test_the_methods_differ_in_the_method_alone() -> None:
    """Every method once; what all share is equal, and so is what they are compared at."""
    loaded = {file.stem: config.to_dict(config.load(file)) for file in METHODS}
    assert set(loaded) == {*settings.METHODS, "feddip-published"}
    for name, values in loaded.items():
        assert values["method"] == name.removesuffix("-published")
        assert values["upload"]["values"] == "fp32" and values["sparsity"] == loaded["feddip"]["sparsity"]
        own = {"method", "mask", "penalty", "proximal", "server_memory", "upload", values["method"]}
        shared = {key: value for key, value in values.items() if key not in own}
        assert shared == {key: loaded["feddip"][key] for key in shared}, name
        if name not in ("feddip-published", "fedavg", "fedprox"):
            assert values["mask"] == loaded["feddip"]["mask"]


def test_quickstart_is_small_enough() -> None:
    quick = config.load(ROOT / "configs" / "quickstart.yaml")
    images = quick.rounds * quick.participants * quick.local_epochs * 60_000 // quick.clients
    assert images <= 800_000  # three minutes on 2 cores at 2,200 images a second each, a third of what was measured
    assert quick.sparsity.final == 0.9
