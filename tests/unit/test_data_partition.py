"""The laws of every partition, and what is particular to each rule."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feddip_mpi.data import partition
from feddip_mpi.errors import InputError
from feddip_mpi.settings import DataConfig

RULES = ("iid", "dirichlet", "pathological", "quantity")


def balanced(count, classes):
    return np.random.default_rng(5).permutation(np.arange(count) % classes)


def make(rule, clients, train, test, classes, seed=1, **options):
    return partition.make(DataConfig(partition=rule, **options), clients, train, test, classes, seed)


@st.composite
def problems(draw):
    """A rule, its options, a number of clients, and labels that may leave classes empty."""
    classes = draw(st.integers(1, 12))
    clients = draw(st.integers(1, 30))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    weights = random.dirichlet(np.full(classes, draw(st.sampled_from([0.1, 1.0, 100.0]))))
    train = random.choice(classes, draw(st.integers(1, 600)), p=weights)
    test = random.integers(0, classes, draw(st.integers(0, 200)))
    options = {
        "alpha": draw(st.sampled_from([1e-300, 1e-6, 0.1, 0.5, 5.0, 1e6])),
        "min_samples": draw(st.integers(1, 12)),
        "classes_per_client": draw(st.integers(1, 13)),
    }
    return draw(st.sampled_from(RULES)), options, clients, train, test, classes


@settings(max_examples=300, deadline=None)
@given(problems(), st.integers(0, 2**63 - 1))
def test_laws(problem, seed):
    rule, options, clients, train, test, classes = problem
    present, totals = len(np.unique(train)), np.bincount(train, minlength=classes)
    per_client = options["classes_per_client"]
    possible = clients <= len(train)
    if rule in ("dirichlet", "quantity"):
        possible &= options["min_samples"] * clients <= len(train)
    if rule == "pathological":
        places = per_client * clients
        possible &= per_client <= present and present <= places <= np.minimum(totals, clients).sum()
    if not possible:
        with pytest.raises(InputError, match=r"^(clients|data\.\w+): got \d+.*allowed: "):
            make(rule, clients, train, test, classes, seed, **options)
        return
    result = make(rule, clients, train, test, classes, seed, **options)
    each_sample_has_one_client(result, clients, len(train), len(test))
    counts = result.histogram(train, classes)
    assert counts.shape == (clients, classes)
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts.sum(axis=0), totals)
    assert counts.sum(axis=1).min() >= (options["min_samples"] if rule in ("dirichlet", "quantity") else 1)
    if rule == "iid":
        assert np.ptp(counts.sum(axis=1)) <= 1
        assert np.ptp(counts, axis=0).max() <= 1
    if rule == "pathological":
        np.testing.assert_array_equal((counts > 0).sum(axis=1), per_client)
        shares = np.where(counts > 0, counts, totals // np.maximum((counts > 0).sum(axis=0), 1))
        assert np.ptp(shares, axis=0).max() <= 1
    if rule == "quantity":
        ideal = counts.sum(axis=1)[:, None] * totals / len(train)
        assert np.abs(counts - ideal).max() < 2 + 2 * np.sqrt(clients)
    follows_train(result, counts, test, classes)
    again = make(rule, clients, train, test, classes, seed, **options)
    assert all(np.array_equal(a, b) for a, b in zip(result.train + result.test, again.train + again.test, strict=True))


def each_sample_has_one_client(result, clients, train, test):
    for parts, samples in ((result.train, train), (result.test, test)):
        assert len(parts) == clients
        assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(samples))


def follows_train(result, counts, test, classes):
    for label in range(classes):
        if counts[:, label].any():
            here = np.array([(test[part] == label).sum() for part in result.test])
            ideal = counts[:, label] * (test == label).sum() / counts[:, label].sum()
            assert np.abs(here - ideal).max() < 1


@pytest.mark.parametrize("rule", RULES)
def test_another_seed_deals_otherwise(rule):
    train, test = balanced(600, 10), balanced(100, 10)
    first, second = (make(rule, 8, train, test, 10, seed) for seed in (1, 2))
    assert not all(np.array_equal(a, b) for a, b in zip(first.train, second.train, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first.test, second.test, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_one_client_holds_everything(rule):
    train, test = balanced(60, 3), balanced(20, 3)
    result = make(rule, 1, train, test, 3, classes_per_client=3)
    np.testing.assert_array_equal(result.train[0], np.arange(60))
    np.testing.assert_array_equal(result.test[0], np.arange(20))


def test_iid_of_balanced_data_is_exact():
    train, test = balanced(6000, 10), balanced(1000, 10)
    result = make("iid", 50, train, test, 10)
    assert (result.histogram(train, 10) == 12).all()
    assert all((np.bincount(test[part], minlength=10) == 2).all() for part in result.test)


def test_dirichlet_skew_falls_with_alpha():
    train, test = balanced(6000, 10), balanced(1000, 10)

    def largest_class(alpha):
        counts = make("dirichlet", 20, train, test, 10, alpha=alpha, min_samples=1).histogram(train, 10)
        return (counts.max(axis=1) / counts.sum(axis=1)).mean()

    skews = [largest_class(alpha) for alpha in (0.05, 0.5, 5.0, 1e6)]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 0.6
    assert skews[-1] < 0.11


def test_dirichlet_share_of_a_client_has_the_moments_of_the_distribution():
    train, alpha, clients = balanced(100_000, 100), 2.0, 10
    shares = make("dirichlet", clients, train, train, 100, alpha=alpha).histogram(train, 100) / 1000
    variance = (1 / clients) * (1 - 1 / clients) / (alpha * clients + 1)
    assert shares.mean() == pytest.approx(1 / clients)
    assert shares.var() == pytest.approx(variance, rel=0.2)


def test_dirichlet_takes_little_more_memory_than_its_counts():
    """Every rank draws them: with 100,000 clients and 1,000 classes the counts alone have 0.8 GB."""
    totals = np.full(300, 50)
    tracemalloc.start()
    try:
        counts = partition._draw_shares(0.5, 2000, totals, np.random.default_rng(1))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (counts.sum(axis=0) == totals).all() and peak < 1.2 * counts.nbytes


def test_quantity_skews_sizes_and_keeps_the_mix():
    train = balanced(6000, 10)
    counts = make("quantity", 20, train, train, 10, alpha=0.5).histogram(train, 10)
    sizes = counts.sum(axis=1)
    assert sizes.max() > 5 * sizes.min()
    assert np.abs(counts / sizes[:, None] - 0.1)[sizes > 100].max() < 0.02


def test_pathological_uses_every_class_when_each_client_has_one():
    train = balanced(600, 10)
    counts = make("pathological", 10, train, train, 10, classes_per_client=1).histogram(train, 10)
    assert sorted(counts.argmax(axis=1)) == list(range(10))


def test_a_class_without_training_images_still_gives_its_test_images_away():
    train, test = np.array([0, 0, 1, 1]), np.array([2, 2, 2, 2])
    result = make("iid", 2, train, test, 3)
    assert [len(part) for part in result.test] == [2, 2]


@pytest.mark.parametrize(
    ("rule", "clients", "options", "message"),
    [
        ("iid", 61, {}, "clients: got 61, more than the 60 training images; allowed: 1 to 60"),
        ("dirichlet", 10, {"min_samples": 7}, "data.min_samples: got 7, .* allowed: 1 to 6$"),
        ("quantity", 7, {"min_samples": 10}, "data.min_samples: got 10, .* allowed: 1 to 8$"),
        ("pathological", 10, {"classes_per_client": 11}, "data.classes_per_client: got 11, .*10 .* allowed: 1 to 10$"),
        ("pathological", 3, {"classes_per_client": 2}, "data.classes_per_client: got 2, .*without a client.* 4 to 10$"),
        ("pathological", 50, {"classes_per_client": 2}, "data.classes_per_client: got 2, .* allowed: at most 1$"),
    ],
)
def test_impossible_demands_name_key_value_and_what_is_allowed(rule, clients, options, message):
    labels = balanced(60, 10)
    with pytest.raises(InputError, match=message):
        make(rule, clients, labels, labels, 10, **options)
