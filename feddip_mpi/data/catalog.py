"""What is known about the public data sets: their files, where they come from, their classes and pixel statistics."""

from __future__ import annotations

from dataclasses import dataclass

_IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True)
class Remote:
    """One file to download; it is used only if its SHA-256 is this one."""

    url: str
    sha256: str

    @property
    def file_name(self) -> str:
        return self.url.rsplit("/", 1)[1]


@dataclass(frozen=True)
class Known:
    """One public data set.

    Attributes:
        files: the files that make it complete, in the order train images, train labels, test images, test labels
            for IDX. A file may also be there gzipped, with `.gz` appended, where `gzipped` says so.
        folders: where below a data folder they may lie; the first is where a download puts them.
        telling: whether the names of the files alone tell this data set from the others.
        images: for training and testing together.
        shape: channels, height, width of an image.
        mean, std: per channel, in units of pixel / 255, of the official training images.
        package: the Debian package that installs it, if there is one.
    """

    name: str
    files: tuple[str, ...]
    gzipped: bool
    folders: tuple[str, ...]
    telling: bool
    remotes: tuple[Remote, ...]
    class_names: tuple[str, ...]
    images: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    package: str | None = None


def _idx_remotes(base: str, digests: tuple[str, ...]) -> tuple[Remote, ...]:
    return tuple(Remote(f"{base}{name}.gz", digest) for name, digest in zip(_IDX_FILES, digests, strict=True))


# The publishers list MD5 (Fashion-MNIST, CIFAR) or nothing (MNIST). These SHA-256 sums are those that several independent
# public projects record for the same files and agree on; they were not recomputed from the files here.
_FASHION_MNIST = Known(
    name="fashion-mnist",
    files=_IDX_FILES,
    gzipped=True,
    folders=("fashion-mnist", "fashion_mnist", "FashionMNIST/raw"),
    telling=False,
    remotes=_idx_remotes(
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        (
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    ),
    class_names=(
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
    images=70_000,
    shape=(1, 28, 28),
    mean=(0.2860,),
    std=(0.3530,),
    package="dataset-fashion-mnist",
)  # fmt: skip

_MNIST = Known(
    name="mnist",
    files=_IDX_FILES,
    gzipped=True,
    folders=("mnist", "MNIST/raw"),
    telling=False,
    remotes=_idx_remotes(
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        (
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
    class_names=tuple("0123456789"),
    images=70_000,
    shape=(1, 28, 28),
    mean=(0.1307,),
    std=(0.3081,),
)

_CIFAR10 = Known(
    name="cifar10",
    files=(*(f"data_batch_{batch}.bin" for batch in range(1, 6)), "test_batch.bin"),
    gzipped=False,
    folders=("cifar-10-batches-bin",),
    telling=True,
    remotes=(
        Remote(
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
    ),
    class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    images=60_000,
    shape=(3, 32, 32),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)

_CIFAR100_CLASSES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
    man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
    pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
    tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""

_CIFAR100 = Known(
    name="cifar100",
    files=("train.bin", "test.bin"),
    gzipped=False,
    folders=("cifar-100-binary",),
    telling=True,
    remotes=(
        Remote(
            "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        ),
    ),
    class_names=tuple(_CIFAR100_CLASSES.split()),
    images=60_000,
    shape=(3, 32, 32),
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)

KNOWN: dict[str, Known] = {known.name: known for known in (_FASHION_MNIST, _MNIST, _CIFAR10, _CIFAR100)}
