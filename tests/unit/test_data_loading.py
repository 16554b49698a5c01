"""Where data is looked for, how it is fetched, and `load` for what is no file: synthetic and your own."""

import gzip
import hashlib
import http.server
import io
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

from feddip_mpi import data
from feddip_mpi.data import catalog, download, places
from feddip_mpi.data.catalog import KNOWN, Remote
from feddip_mpi.errors import InputError, NumericalError
from feddip_mpi.report import datasets
from feddip_mpi.settings import DataConfig

IDX_SHAPES = ((3, 28, 28), (3,), (2, 28, 28), (2,))


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No data in any usual place, unless a test puts it there."""
    monkeypatch.delenv("FEDDIP_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(places, "_USUAL_PLACES", (str(tmp_path / "usual one"), str(tmp_path / "usual two")))


def idx_files():
    """Names and contents of a tiny data set in IDX files."""
    for name, shape in zip(KNOWN["mnist"].files, IDX_SHAPES, strict=True):
        header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
        yield name, header + bytes(int(np.prod(shape)))


def put_idx(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in idx_files():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    return folder


def config(name="mnist", **options):
    return DataConfig(name=name, **options)


def test_search_order(tmp_path, monkeypatch):
    second = put_idx(tmp_path / "usual two" / "MNIST" / "raw")
    assert data.load(config(), 1).source == str(second)
    first = put_idx(tmp_path / "usual one" / "mnist")
    assert data.load(config(), 1).source == str(first)
    named = put_idx(tmp_path / "environment")
    monkeypatch.setenv("FEDDIP_DATA", str(named))
    assert data.load(config(), 1).source == str(named)
    own = put_idx(tmp_path / "own")
    assert data.load(config(path=str(own)), 1).source == str(own)
    with pytest.raises(InputError, match="not found"):  # a path that is named is the only one searched
        data.load(config(path=str(tmp_path / "empty")), 1)


def test_find_reports_every_public_data_set(tmp_path):
    put_idx(tmp_path / "usual two" / "fashion-mnist")
    found = {location.name: location for location in data.find(config("cifar10"))}
    assert list(found) == list(KNOWN)
    assert found["fashion-mnist"].folder == tmp_path / "usual two" / "fashion-mnist"
    assert found["mnist"].folder is None
    assert found["mnist"].searched[0] == tmp_path / "usual one" / "mnist"


def test_a_path_of_other_data_hides_no_public_data_set(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    folder = put_idx(tmp_path / "usual two" / "fashion-mnist")
    for name in ("npz", "hdf5", "synthetic", "package.module:function"):
        datasets.show_places(config(name, path=str(tmp_path / "mine.npz")))
        shown = capsys.readouterr().out
        assert str(folder) in shown and "mine.npz" not in shown
    datasets.show_places(config("fashion-mnist", path=str(tmp_path / "empty")))
    assert "empty" in capsys.readouterr().out


def test_files_of_fashion_mnist_are_not_taken_for_mnist(tmp_path):
    folder = put_idx(tmp_path / "fashion-mnist")
    with pytest.raises(InputError, match="by its name it holds fashion-mnist"):
        data.load(config("mnist", path=str(folder)), 1)
    assert data.load(config("fashion-mnist", path=str(folder)), 1).name == "fashion-mnist"
    raw = put_idx(tmp_path / "FashionMNIST" / "raw")
    with pytest.raises(InputError, match="by its name it holds fashion-mnist"):
        data.load(config("mnist", path=str(raw)), 1)


def test_missing_data_names_the_places_and_the_ways_out(tmp_path):
    (put_idx(tmp_path / "usual one" / "fashion-mnist") / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InputError) as caught:
        data.load(config("fashion-mnist"), 1)
    message = str(caught.value)
    for part in ("usual one", "usual two", "t10k-labels-idx1-ubyte missing", "apt-get install dataset-fashion-mnist"):
        assert part in message
    assert "data.download=true" in message
    assert "$FEDDIP_DATA" in message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["npz", "hdf5"])
def test_own_arrays_need_a_path(name):
    with pytest.raises(InputError, match="data.path: not set"):
        data.load(config(name), 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar-10", "did you mean 'cifar10'"),
        ("FashionMNIST", "did you mean 'fashion-mnist'"),
        ("x", "valid: fashion-mnist"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(InputError, match=message):
        data.load(config(name), 1)


OWN = """
from feddip_mpi.data import Dataset, load
from feddip_mpi.errors import NumericalError
import dataclasses
import numpy as np

def good(config, seed):
    base = load(config.model_copy(update={"name": "synthetic"}), seed)
    return dataclasses.replace(base, name="mine")

def nothing(config, seed):
    return None

def floats(config, seed):
    base = good(config, seed)
    return dataclasses.replace(base, train_images=base.train_images / 255)

def strided(config, seed):
    base = good(config, seed)
    return dataclasses.replace(base, test_images=base.test_images[:, :, ::2, ::2])

def labels(config, seed):
    return dataclasses.replace(good(config, seed), classes=3)

def types(config, seed):
    base = good(config, seed)
    return dataclasses.replace(base, train_labels=base.train_labels.astype(np.int32))

def std(config, seed):
    return dataclasses.replace(good(config, seed), std=(0.0,))

def mean(config, seed):
    return dataclasses.replace(good(config, seed), mean=(0.1, 0.2))

def names(config, seed):
    return dataclasses.replace(good(config, seed), class_names=("a", "b"))

def numbers(config, seed):
    return dataclasses.replace(good(config, seed), class_names=tuple(range(10)))

def raising(config, seed):
    raise KeyError("shelf")

def own_error(config, seed):
    raise NumericalError("mine")

wrong_arguments = lambda: None
number = 3
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "my_own_data.py").write_text(OWN)
    (tmp_path / "my_broken_data.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)


def test_your_own_function(own_module):
    dataset = data.load(config("my_own_data:good"), 7)
    base = data.load(config("synthetic"), 7)
    assert dataset.name == "mine"
    np.testing.assert_array_equal(dataset.train_images, base.train_images)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_own_data:nothing", "expected a feddip_mpi.data.Dataset, found NoneType"),
        ("my_own_data:floats", r"train_images: expected uint8 \[N, C, H, W\], found float64"),
        ("my_own_data:strided", "test_images: expected a C-contiguous array"),
        ("my_own_data:labels", "train_labels: expected labels 0 to 2, found"),
        ("my_own_data:types", r"train_labels: expected int64 \[N\], found int32"),
        ("my_own_data:std", "std: expected a tuple of 1 finite numbers above 0"),
        ("my_own_data:mean", "mean: expected a tuple of 1 finite numbers, one per channel"),
        ("my_own_data:names", "class_names: expected a tuple of 10 texts"),
        ("my_own_data:numbers", "class_names: expected a tuple of 10 texts"),
        ("my_own_data:raising", "raised KeyError: 'shelf'"),
        ("my_own_data:wrong_arguments", "raised TypeError"),
        ("my_own_data:number", "expected a function 'number' in my_own_data, found int"),
        ("my_own_data:godo", "found nothing; did you mean 'good'"),
        ("my_broken_data:good", "cannot import 'my_broken_data': ZeroDivisionError"),
        ("my_absent_data:good", "cannot import 'my_absent_data': ModuleNotFoundError.*PYTHONPATH"),
        ("my_own_data:", "form package.module:function"),
        (":good", "form package.module:function"),
        ("my_own_data:good:x", "form package.module:function"),
    ],
)
def test_your_own_function_that_does_not_work(own_module, name, message):
    with pytest.raises(InputError, match=message):
        data.load(config(name), 1)


def test_your_own_function_keeps_its_kind_of_error(own_module):
    with pytest.raises(NumericalError, match="mine"):
        data.load(config("my_own_data:own_error"), 1)


def synthetic(seed=1, **options):
    return data.load(config("synthetic", synthetic={"train_samples": 2000, "test_samples": 500, **options}), seed)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (2, 5, 3)])
def test_synthetic_data_can_be_learnt(shape):
    dataset = synthetic(shape=shape)
    assert dataset.shape == shape
    images = dataset.train_images.reshape(2000, -1).astype(np.float64)
    prototypes = np.stack([images[dataset.train_labels == label].mean(axis=0) for label in range(10)])
    tests = dataset.test_images.reshape(500, -1).astype(np.float64)
    nearest = ((tests[:, None] - prototypes) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == dataset.test_labels).mean() > 0.5
    assert np.ptp(np.bincount(dataset.train_labels)) <= 1


def test_synthetic_data_is_a_function_of_the_seed_alone(monkeypatch):
    first, again, other = synthetic(1), synthetic(1), synthetic(2)
    assert all(np.array_equal(a, b) for a, b in zip(first.arrays().values(), again.arrays().values(), strict=True))
    assert not np.array_equal(first.train_images, other.train_images)
    assert not np.array_equal(first.train_images[:500], first.test_images)
    assert first.mean == again.mean


@pytest.mark.parametrize(
    "options",
    [{"train_samples": 10**15}, {"train_samples": 2**63 - 1}, {"shape": [1, 10**17, 3]}, {"shape": [10**15, 1, 1]}],
)
def test_synthetic_data_that_does_not_fit_is_refused(options):
    with pytest.raises(InputError, match="do not fit into memory"):
        synthetic(**options)


def test_downloads_are_encrypted_and_checked():
    for known in KNOWN.values():
        assert all(remote.url.startswith("https://") and len(remote.sha256) == 64 for remote in known.remotes)
        assert len(known.class_names) == len(set(known.class_names))
        assert len(known.mean) == len(known.std)
    assert list(KNOWN["cifar100"].class_names) == sorted(KNOWN["cifar100"].class_names)
    assert len({remote.sha256 for known in KNOWN.values() for remote in known.remotes}) == 10


class Server(http.server.BaseHTTPRequestHandler):
    files: dict[str, bytes] = {}  # noqa: RUF012

    def do_GET(self):
        kind, _, name = self.path[1:].partition("/")
        content = self.files.get(name)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) + (100 if kind == "cut" else 0)))
        self.end_headers()
        if kind == "silent":
            stop.wait(5)
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


stop = threading.Event()


@pytest.fixture(scope="module")
def server():
    stop.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        stop.set()
        running.shutdown()


def offer(server, name, content, kind="good"):
    Server.files[name] = content
    return Remote(f"{server}/{kind}/{name}", hashlib.sha256(content).hexdigest())


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_download_of_a_file(server, tmp_path):
    content = np.random.default_rng(0).bytes(3_000_000)
    path = download.fetch_file(offer(server, "a.gz", content), tmp_path / "new" / "folder")
    assert path.read_bytes() == content
    assert everything(tmp_path / "new") == ["folder", "folder/a.gz"]


def test_failed_downloads_leave_nothing(server, tmp_path):
    good = offer(server, "b.gz", b"content")
    offer(server, "b.gz", b"content", "cut")
    cases = {
        "expected 0000": Remote(good.url, "0" * 64),
        "the connection ended after 7 of 107 bytes": Remote(good.url.replace("good", "cut"), good.sha256),
        "404": Remote(f"{server}/good/absent.gz", good.sha256),
        "refused": Remote("http://127.0.0.1:9/b.gz", good.sha256),
        "timed out": Remote(good.url.replace("good", "silent"), good.sha256),
        "unknown url": Remote("nonsense/b.gz", good.sha256),
    }
    for message, remote in cases.items():
        with pytest.raises(InputError, match=message):
            download.fetch_file(remote, tmp_path / "new" / "folder", timeout=0.3)
        assert everything(tmp_path) == []


def test_a_failed_download_keeps_the_file_that_is_there(server, tmp_path):
    (tmp_path / "c.gz").write_bytes(b"old")
    remote = offer(server, "c.gz", b"new")
    with pytest.raises(InputError, match="SHA-256"):
        download.fetch_file(Remote(remote.url, "0" * 64), tmp_path)
    assert (tmp_path / "c.gz").read_bytes() == b"old"
    assert everything(tmp_path) == ["c.gz"]


def test_an_endless_answer_is_cut_off(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_MAX_BYTES", 1000)
    with pytest.raises(InputError, match="more than 1000 bytes"):
        download.fetch_file(offer(server, "d.gz", bytes(1001)), tmp_path / "new")
    assert everything(tmp_path) == []


def test_a_place_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write into .*file.*data.path"):
        download.fetch_file(offer(server, "e.gz", b"content"), tmp_path / "file" / "folder")


def tar(members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
            else:
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return out.getvalue()


def test_download_of_an_archive_takes_only_the_files_wanted(server, tmp_path):
    members = {"set/a.bin": b"a", "./set/b.bin": b"b", "set/more.txt": b"x", "../evil": b"x", "/tmp/feddip-evil": b"x"}
    download.fetch_archive(offer(server, "f.tar.gz", tar(members)), tmp_path / "set", ("a.bin", "b.bin"))
    assert everything(tmp_path) == ["set", "set/a.bin", "set/b.bin"]
    assert not Path("/tmp/feddip-evil").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tar({"set/a.bin": b"a"}), "the archive lacks b.bin"),
        (tar({"set/a.bin": b"a", "set/b.bin": "/etc/passwd"}), "the archive lacks b.bin"),
        (tar({"set/a.bin": bytes(range(256)) * 99})[:-60], "not a usable tar archive"),
        (b"no archive", "not a usable tar archive"),
        (gzip.compress(b"no tar" * 999), "not a usable tar archive"),
    ],
    ids=["a file less", "a link", "cut off", "no gzip", "no tar"],
)
def test_bad_archives_leave_nothing(server, tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        download.fetch_archive(offer(server, "g.tar.gz", content), tmp_path / "set", ("a.bin", "b.bin"))
    assert everything(tmp_path) == []


def test_load_fetches_what_is_missing(server, tmp_path, monkeypatch):
    packed = {f"{name}.gz": gzip.compress(content) for name, content in idx_files()}
    remotes = tuple(offer(server, name, content) for name, content in packed.items())
    known = catalog.Known(**{**vars(KNOWN["mnist"]), "remotes": remotes})
    monkeypatch.setitem(KNOWN, "mnist", known)
    there = tmp_path / "root" / "mnist"
    there.mkdir(parents=True)
    (there / "train-labels-idx1-ubyte").write_bytes(dict(idx_files())["train-labels-idx1-ubyte"])
    with pytest.raises(InputError, match="not found"):
        data.load(config(path=str(tmp_path / "root")), 1)
    dataset = data.load(config(path=str(tmp_path / "root"), download=True), 1)
    assert (len(dataset.train_images), len(dataset.test_images)) == (3, 2)
    still_missing = [name for name in packed if name != "train-labels-idx1-ubyte.gz"]
    assert everything(there) == sorted([*still_missing, "train-labels-idx1-ubyte"])
