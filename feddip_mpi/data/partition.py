"""How samples are dealt to clients. Pure numpy.

Every rule first decides how many samples of each class each client gets, a matrix of counts [clients, classes]; one
function then deals the samples accordingly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from feddip_mpi.errors import InputError
from feddip_mpi.settings import DataConfig
from feddip_mpi.streams import stream

_REDRAWS = 20


@dataclass(frozen=True, eq=False)
class Partition:
    """Which samples each client holds.

    Attributes:
        train: per client, int64 [n], n >= 1, ascending indices of training samples; each sample has one client.
        test: per client, int64 [n], n >= 0, the same for the test samples.
    """

    train: tuple[np.ndarray, ...]
    test: tuple[np.ndarray, ...]

    def histogram(self, labels: np.ndarray, classes: int) -> np.ndarray:
        """Training samples per client and class.

        Args:
            labels: int64 [N], the labels of all training samples.
            classes: number of classes.

        Returns:
            int64 [clients, classes].
        """
        owners = np.repeat(np.arange(len(self.train)), [len(indices) for indices in self.train])
        cells = owners * classes + labels[np.concatenate(self.train)]
        counts = np.bincount(cells, minlength=len(self.train) * classes).astype(np.int64, copy=False)
        return counts.reshape(len(self.train), classes)


def make(
    config: DataConfig, clients: int, train_labels: np.ndarray, test_labels: np.ndarray, classes: int, seed: int
) -> Partition:
    """Deal all samples to clients by the rule `data.partition`; a pure function of its arguments.

    Of each class, a client gets test samples in proportion to its training samples of that class.

    Args:
        config: `partition`, `alpha`, `min_samples` and `classes_per_client` are used.
        clients: number of clients, >= 1.
        train_labels, test_labels: int64 [N], in 0..classes-1.
        classes: number of classes, >= 1.
        seed: of the run.

    Raises:
        InputError: there are too few samples or classes for what is asked.
    """
    samples = len(train_labels)
    if clients > samples:
        raise InputError(f"clients: got {clients}, more than the {samples} training images; allowed: 1 to {samples}")
    generator = stream(seed, "partition")
    totals = np.bincount(train_labels, minlength=classes).astype(np.int64)
    if config.partition == "iid":
        counts = _iid(clients, totals, generator)
    elif config.partition == "pathological":
        counts = _pathological(config.classes_per_client, clients, totals, generator)
    else:
        _check_min_samples(config.min_samples, clients, samples)
        rule = _dirichlet if config.partition == "dirichlet" else _quantity
        counts = rule(config.alpha, config.min_samples, clients, totals, generator)
    test_totals = np.bincount(test_labels, minlength=classes).astype(np.int64)
    test_counts = _in_proportion(counts, test_totals, generator)
    return Partition(_deal(train_labels, counts, generator), _deal(test_labels, test_counts, generator))


def _iid(clients: int, totals: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Class by class, one sample to each client in turn: per class and in total, clients differ by at most 1."""
    turns = np.resize(generator.permutation(clients), int(totals.sum()))
    return _count_turns(turns, clients, totals)


def _quantity(
    alpha: float, min_samples: int, clients: int, totals: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Sizes from Dirichlet(alpha), the class mix of every client near that of all samples.

    Hsu et al. 2019 skew classes; this skews sizes only. `min_samples` is reached as in `_dirichlet`.
    """
    samples = int(totals.sum())
    everything = np.array([samples])
    sizes = _dirichlet(alpha, min_samples, clients, everything, generator)[:, 0]
    # Each client's turns lie evenly in [0, 1), so each run of turns holds every client in proportion to its size.
    owners = np.repeat(np.arange(clients), sizes)
    rank = np.arange(samples) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    places = (rank + generator.random(clients)[owners]) / sizes[owners]
    return _count_turns(owners[np.argsort(places, kind="stable")], clients, totals)


def _dirichlet(
    alpha: float, min_samples: int, clients: int, totals: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Each class is cut into shares drawn from Dirichlet(alpha) over the clients (Hsu et al. 2019; Li et al. 2022).

    If a client got fewer than `min_samples`, everything is drawn again, at most 20 times in all. If that does not
    help, the draw with the largest smallest client is taken, and samples move to the clients that lack some.
    """
    best = None
    for _ in range(_REDRAWS):
        counts = _draw_shares(alpha, clients, totals, generator)
        smallest = counts.sum(axis=1).min()
        if smallest >= min_samples:
            return counts
        if best is None or smallest > best.sum(axis=1).min():
            best = counts
    assert best is not None
    return _raise_to_minimum(best, min_samples)


def _draw_shares(alpha: float, clients: int, totals: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """int64 [clients, classes] with the column sums `totals`.

    One class after the other: all at once would take six arrays of that size, 5 GB on every rank for 100,000 clients and 1,000
    classes.
    """
    counts = np.zeros((len(totals), clients), np.int64)
    lost = []
    for label, total in enumerate(totals):
        shares = generator.dirichlet(np.full(clients, alpha))
        # An alpha near 0 may underflow to a row without a number; its limit is one client that takes all.
        if not abs(shares.sum() - 1) < 1e-6:
            lost.append(label)
            continue
        cuts = np.rint(np.cumsum(shares) * total).astype(np.int64)
        cuts[-1] = total  # the sum of the shares is 1 only up to rounding
        counts[label] = np.diff(np.minimum(cuts, total), prepend=0)
    counts[lost, generator.integers(clients, size=len(lost))] = totals[lost]
    return counts.T


def _raise_to_minimum(counts: np.ndarray, min_samples: int) -> np.ndarray:
    """Counts in which every client has `min_samples`; deterministic.

    The largest client of the moment gives up to half of its surplus to the next client in need, in the proportions
    of its own classes.
    """
    counts = counts.copy()
    sizes = counts.sum(axis=1)
    for client in np.flatnonzero(sizes < min_samples):
        while sizes[client] < min_samples:
            donor = int(sizes.argmax())  # above min_samples, for the average is not below it
            given = min(int(min_samples - sizes[client]), (int(sizes[donor]) - min_samples + 1) // 2)
            cuts = np.cumsum(counts[donor]) * given // sizes[donor]
            moved = np.diff(cuts, prepend=0)
            counts[donor] -= moved
            counts[client] += moved
            sizes[donor] -= given
            sizes[client] += given
    return counts


def _pathological(per_client: int, clients: int, totals: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Every client holds `per_client` random classes; each class is divided equally among its holders.

    After McMahan et al. 2017, section 3, but with exactly that many classes per client and every sample used.
    """
    holders = _numbers_of_holders(per_client, clients, totals, generator)
    counts = np.zeros((clients, len(totals)), np.int64)
    left = holders.copy()
    for client in generator.permutation(clients):
        # Taking the classes with most places left always leaves a solution for the clients to come (Gale, Ryser).
        chosen = np.lexsort((generator.random(len(totals)), -left))[:per_client]
        left[chosen] -= 1
        counts[client, chosen] = 1
    for label in np.flatnonzero(holders):
        owners = generator.permutation(np.flatnonzero(counts[:, label]))
        counts[owners, label] = totals[label] // len(owners)
        counts[owners[: totals[label] % len(owners)], label] += 1
    return counts


def _numbers_of_holders(
    per_client: int, clients: int, totals: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """How many clients hold each class, int64 [classes]: as equal as the sizes of the classes allow.

    Raises InputError if there is no way to give each client `per_client` classes and each class a client.
    """
    present = int((totals > 0).sum())
    places = clients * per_client
    limits = np.minimum(totals, clients)  # a holder has at least one sample of the class
    if per_client > present:
        allowed = f"the {present} classes that have training images; allowed: 1 to {present}"
        raise InputError(f"data.classes_per_client: got {per_client}, more than {allowed}")
    if places < present:
        least = -(-present // clients)
        problem = f"with {clients} clients leaves some of the {present} classes without a client"
        raise InputError(f"data.classes_per_client: got {per_client}, which {problem}; allowed: {least} to {present}")
    if places > limits.sum():
        most = int(limits.sum()) // clients
        problem = f"for {clients} clients needs more images than some classes have"
        raise InputError(f"data.classes_per_client: got {per_client}, which {problem}; allowed: at most {most}")
    holders = np.zeros(len(totals), np.int64)
    while missing := places - int(holders.sum()):
        open_classes = np.flatnonzero(holders < limits)
        step = missing // len(open_classes)
        if step == 0:
            open_classes, step = generator.permutation(open_classes)[:missing], 1
        holders[open_classes] = np.minimum(holders[open_classes] + step, limits[open_classes])
    return holders


def _in_proportion(weights: np.ndarray, totals: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Counts with the column sums `totals`, each column in proportion to that of `weights`, by largest remainder.

    A class without weights (no training sample) goes by the clients' sizes. Equal remainders are settled for the
    client with fewest samples so far, then at random.

    Args:
        weights: int64 [clients, classes].
        totals: int64 [classes].

    Returns:
        int64 [clients, classes].
    """
    counts = np.zeros_like(weights)
    sizes = np.zeros(len(weights), np.int64)
    for label, total in enumerate(totals):
        column = weights[:, label] if weights[:, label].any() else weights.sum(axis=1)
        counts[:, label], remainders = np.divmod(column * total, column.sum())
        order = np.lexsort((generator.random(len(weights)), sizes + counts[:, label], -remainders))
        counts[order[: total - counts[:, label].sum()], label] += 1
        sizes += counts[:, label]
    return counts


def _count_turns(turns: np.ndarray, clients: int, totals: np.ndarray) -> np.ndarray:
    """Counts [clients, classes] if the samples, sorted by class, go to the clients in `turns`, int64 [samples]."""
    labels = np.repeat(np.arange(len(totals)), totals)
    pairs = np.bincount(turns * len(totals) + labels, minlength=clients * len(totals))
    return pairs.reshape(clients, len(totals)).astype(np.int64)


def _deal(labels: np.ndarray, counts: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Random samples of each class to each client, as many as `counts` [clients, classes] says; ascending indices."""
    clients = len(counts)
    shuffled = generator.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    owners = np.empty(len(labels), np.int64)
    owners[by_class] = np.concatenate([np.repeat(np.arange(clients), column) for column in counts.T])
    by_owner = np.argsort(owners, kind="stable")  # stable: ascending indices within each client
    return tuple(np.split(by_owner, np.cumsum(counts.sum(axis=1))[:-1]))


def _check_min_samples(min_samples: int, clients: int, samples: int) -> None:
    if min_samples * clients > samples:
        raise InputError(
            f"data.min_samples: got {min_samples}, but {clients} clients with that many need more than the {samples} "
            f"training images; allowed: 1 to {samples // clients}"
        )
