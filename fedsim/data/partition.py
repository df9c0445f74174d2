"""Who owns which example: every function returns one owner a row, so no row is lost or held twice.

`partition(data, clients, rng, *, options) -> (n,) int64`, with 0 <= owner < clients and no client empty.
Impossible requests raise ConfigError.
"""

import hashlib

import numpy as np

from fedsim.data.dataset import Dataset, Floats, Ints
from fedsim.errors import ConfigError
from fedsim.types import Count, Positive

TRIES = 100  # draws of unequal sizes before giving up on the smallest


def iid(data: Dataset, clients: int, rng: np.random.Generator, /) -> Ints:
    """Examples at random, sizes that differ by at most one."""
    n = _examples(data, clients)
    return rng.permutation(np.arange(n) % clients)


def shards(data: Dataset, clients: int, rng: np.random.Generator, /, *, per_client: Count = 2) -> Ints:
    """Sort by label, cut into clients x per_client equal shards, deal them out at random.

    McMahan et al. 2017, arXiv 1602.05629. Sizes of shards differ by at most one.
    """
    n, count = _examples(data, clients), clients * per_client
    if count > n:
        raise ConfigError(
            f"data.partition.per_client: {per_client} shards for each of {clients} clients are more than "
            f"{n} examples; allowed: up to {n // clients}"
        )
    owners = np.empty(n, dtype=np.int64)
    shard = np.arange(n) * count // n
    owners[np.argsort(data.y_train.numpy(), kind="stable")] = (rng.permutation(count) // per_client)[shard]
    return owners


def dirichlet(
    data: Dataset,
    clients: int,
    rng: np.random.Generator,
    /,
    *,
    alpha: Positive,
    balanced: bool = False,
    min_size: Count = 1,
) -> Ints:
    """Label mixes from Dir(alpha): small alpha, few labels a client; large alpha, nearly IID.

    Unbalanced: each label's examples are shared out in proportions ~ Dir(alpha) over clients, drawn again
    until every client has `min_size` (Yurochkin et al. 2019, arXiv 1905.12022; NIID-Bench, arXiv 2102.02079).
    As in the papers' text; their code has a `min_size` of 10, and gives no more to clients above the mean.

    Balanced: sizes differ by at most one, and each client draws its own mix of labels ~ Dir(alpha), as far as
    the labels last (Hsu et al. 2019, arXiv 1909.06335; Reddi et al. 2021, arXiv 2003.00295).
    """
    y, n = _labels(data), _examples(data, clients, min_size)
    stock = np.bincount(y)
    if balanced:
        mixes = rng.dirichlet(np.full(len(stock), alpha), clients)
        return _deal(y, _mixed(stock, np.bincount(np.arange(n) % clients), mixes, rng), rng)
    for _ in range(TRIES):
        counts = _shares(rng.dirichlet(np.full(clients, alpha), len(stock)), stock)
        if counts.sum(0).min() >= min_size:
            return _deal(y, counts, rng)
    raise ConfigError(_unlucky(alpha, clients, min_size, n, ", or set data.partition.balanced=true"))


def quantity(
    data: Dataset, clients: int, rng: np.random.Generator, /, *, alpha: Positive, min_size: Count = 1
) -> Ints:
    """IID labels, sizes in proportions ~ Dir(alpha) (NIID-Bench, arXiv 2102.02079)."""
    n = _examples(data, clients, min_size)
    for _ in range(TRIES):
        counts = _shares(rng.dirichlet(np.full(clients, alpha), 1), np.array([n]))
        if counts.min() >= min_size:
            return _deal(np.zeros(n, dtype=np.int64), counts, rng)
    raise ConfigError(_unlucky(alpha, clients, min_size, n))


def labels(data: Dataset, clients: int, rng: np.random.Generator, /, *, per_client: Count = 2) -> Ints:
    """Each client gets `per_client` labels, at random (NIID-Bench's #C = k, arXiv 2102.02079).

    Every label is held by someone, and its holders share its examples equally, give or take one.
    """
    y, n = _labels(data), _examples(data, clients)
    stock = np.bincount(y)
    if not len(stock) <= clients * per_client <= clients * len(stock):
        raise ConfigError(
            f"data.partition.per_client: {per_client} of {len(stock)} labels for each of {clients} clients; "
            f"allowed: {-(-len(stock) // clients)} to {len(stock)}, so that every label is held"
        )
    rank = rng.random((len(stock), clients))
    turn = np.arange(max(len(stock), clients))
    rank[rng.permutation(len(stock))[turn % len(stock)], turn % clients] = -1  # every label, every client
    held = rank.argsort(0).argsort(0) < per_client
    upto = held.cumsum(1) * stock[:, None] // held.sum(1, keepdims=True)
    counts = np.diff(upto, axis=1, prepend=0)
    if not counts.sum(0).all():
        raise ConfigError(
            f"data.partition.per_client: {per_client} labels for each of {clients} clients leave someone "
            f"none of {n} examples; raise it, or lower data.clients"
        )
    return _deal(y, counts, rng)


def natural(data: Dataset, clients: int, rng: np.random.Generator, /) -> Ints:
    """The clients that the data came with: devices, writers, users."""
    if data.owner is None:
        raise ConfigError("data.partition.name: natural needs data with owners; this data has none")
    names, owners = np.unique(data.owner.numpy(), return_inverse=True)
    if len(names) != clients:
        raise ConfigError(f"data.clients: {clients} should be {len(names)}, as many as this data came with")
    return owners


def content_hash(owners: Ints) -> str:
    """SHA-256 of `owners` (n,) as little-endian int64: the same on every machine."""
    return hashlib.sha256(owners.astype("<i8").tobytes()).hexdigest()


def label_counts(labels: Ints, owners: Ints, clients: int, classes: int) -> Ints:
    """(N, L) examples of each label that each client holds; an owner of -1 is no client."""
    held = owners >= 0
    owners, labels = owners[held], labels[held]
    return np.bincount(owners * classes + labels, minlength=clients * classes).reshape(clients, classes)


def _examples(data: Dataset, clients: int, min_size: int = 1) -> int:
    n = len(data.y_train)
    if clients * min_size > n:
        least = f" with data.partition.min_size={min_size}" if min_size > 1 else ""
        raise ConfigError(
            f"data.clients: {clients} is too many for {n} examples{least}; allowed: 1 to {n // min_size}"
        )
    return n


def _labels(data: Dataset) -> Ints:
    """Labels numbered without gaps, so that all of them have examples."""
    return np.unique(data.y_train.numpy(), return_inverse=True)[1]


def _shares(proportions: Floats, stock: Ints) -> Ints:
    """Cuts each label's `stock` (L,) by its row of `proportions` (L, N): counts (L, N)."""
    cuts = np.floor(np.cumsum(proportions, axis=1) * stock[:, None]).astype(np.int64)
    cuts[:, -1] = stock  # as proportions sum to 1 only up to rounding
    return np.diff(np.minimum(cuts, stock[:, None]), axis=1, prepend=0)


def _mixed(stock: Ints, sizes: Ints, mixes: Floats, rng: np.random.Generator) -> Ints:
    """Fills clients of `sizes` (N,) by their rows of `mixes` (N, L): counts (L, N) that use up `stock` (L,).

    All clients draw at once. Where a label runs out, chance decides who gets the last of it, and the others
    draw again among the labels that are left: a label runs out in each turn but the last.
    """
    counts = np.zeros((len(stock), len(sizes)), dtype=np.int64)
    while (free := sizes - counts.sum(0)).any():
        left = stock - counts.sum(1)
        weight = mixes * (left > 0)
        weight[weight.sum(1) < 1e-9] = left  # nothing left that this client would draw
        wanted = rng.multinomial(free, weight / weight.sum(1, keepdims=True)).T
        for label, room in enumerate(left):
            if wanted[label].sum() > room:
                wanted[label] = rng.multivariate_hypergeometric(wanted[label], room, method="marginals")
        counts += wanted
    return counts


def _deal(y: Ints, counts: Ints, rng: np.random.Generator) -> Ints:
    """Gives client j `counts[i, j]` examples of label i, chosen at random. Shapes: counts (L, N)."""
    shuffled = rng.permutation(len(y))
    order = shuffled[np.argsort(y[shuffled], kind="stable")]
    owners = np.empty(len(y), dtype=np.int64)
    owners[order] = np.repeat(np.tile(np.arange(counts.shape[1]), len(counts)), counts.ravel())
    return owners


def _unlucky(alpha: float, clients: int, min_size: int, n: int, way_out: str = "") -> str:
    return (
        f"data.partition.alpha: {alpha} left one of {clients} clients with less than min_size={min_size} "
        f"of {n} examples, {TRIES} times; raise alpha, lower data.clients or data.partition.min_size{way_out}"
    )
