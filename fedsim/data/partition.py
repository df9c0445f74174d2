"""Partitions: which client owns which training example.

Every function returns one owner for each example, so that none is lost or given twice:
`partition(data, clients, rng, *, options) -> (n,) int64`, with 0 <= owner < clients and no client without
examples. It raises ConfigError where that is impossible.

Shapes: n examples, N clients, L labels.
"""

import hashlib

import numpy as np

from fedsim.base.machine import check_memory
from fedsim.data.dataset import Dataset, Floats, Ints
from fedsim.errors import ConfigError, printable
from fedsim.types import Count, Positive

MAX_LISTED_NAMES = 8  # of owners, in a message
TABLES = 4  # of a number for each client and label, that a partition holds at the same time
MAX_DRAWS = 100  # draws of proportions until every client has min_size examples


def iid(data: Dataset, clients: int, rng: np.random.Generator, /) -> Ints:
    """Random examples for each client; the sizes differ by at most one."""
    n = _check_clients(data, clients)
    return rng.permutation(np.arange(n) % clients)


def shards(data: Dataset, clients: int, rng: np.random.Generator, /, *, per_client: Count = 2) -> Ints:
    """Sorts examples by label, cuts them into shards, and gives each client `per_client` random shards.

    McMahan et al. 2017, arXiv 1602.05629. The sizes of shards differ by at most one.
    """
    n, count = _check_clients(data, clients), clients * per_client
    if count > n:
        raise ConfigError(
            f"data.partition.per_client: {per_client} shards for each of {clients} clients are more shards than "
            f"the {n} examples; allowed: up to {n // clients}"
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
    """Label mixes ~ Dir(alpha): with a small alpha few labels a client, with a large alpha nearly IID.

    Unbalanced: the examples of each label are divided among clients in proportions ~ Dir(alpha), which are drawn
    again until every client has `min_size` examples (Yurochkin et al. 2019, arXiv 1905.12022; NIID-Bench, arXiv
    2102.02079). This follows the text of the papers; their code has a `min_size` of 10, and gives no more examples
    to clients that have more than the mean.

    Balanced: sizes differ by at most one, and each client draws its own label mix ~ Dir(alpha), as long as there
    are examples of those labels left (Hsu et al. 2019, arXiv 1909.06335; Reddi et al. 2021, arXiv 2003.00295).
    """
    n = _check_clients(data, clients, min_size)
    y, available = _dense_labels(data, clients)
    if balanced:
        mixes = _draw_dirichlet(alpha, len(available), clients, rng)
        counts = _draw_by_mix(available, np.bincount(np.arange(n) % clients), mixes, rng)
        return _assign(y, counts, rng)
    for _ in range(MAX_DRAWS):
        counts = _split_by_proportion(_draw_dirichlet(alpha, clients, len(available), rng), available)
        if counts.sum(0).min() >= min_size:
            return _assign(y, counts, rng)
    raise ConfigError(_too_few_message(alpha, clients, min_size, n, ", or set data.partition.balanced=true"))


def quantity(
    data: Dataset, clients: int, rng: np.random.Generator, /, *, alpha: Positive, min_size: Count = 1
) -> Ints:
    """Random examples for each client; the sizes are proportions ~ Dir(alpha) (NIID-Bench, arXiv 2102.02079)."""
    n = _check_clients(data, clients, min_size)
    for _ in range(MAX_DRAWS):
        counts = _split_by_proportion(_draw_dirichlet(alpha, clients, 1, rng), np.array([n]))
        if counts.min() >= min_size:
            return _assign(np.zeros(n, dtype=np.int64), counts, rng)
    raise ConfigError(_too_few_message(alpha, clients, min_size, n))


def labels(data: Dataset, clients: int, rng: np.random.Generator, /, *, per_client: Count = 2) -> Ints:
    """Gives each client `per_client` random labels (NIID-Bench's #C = k, arXiv 2102.02079).

    Every label belongs to at least one client. Its clients divide its examples equally, up to one example.
    """
    n = _check_clients(data, clients)
    y, available = _dense_labels(data, clients)
    if not len(available) <= clients * per_client <= clients * len(available):
        raise ConfigError(
            f"data.partition.per_client: {per_client} of {len(available)} labels for each of {clients} clients; "
            f"allowed: {-(-len(available) // clients)} to {len(available)}, so that every label has a client"
        )
    rank = rng.random((len(available), clients))
    turn = np.arange(max(len(available), clients))
    # A rank of -1 is always chosen: so every label has a client, and every client a label.
    rank[rng.permutation(len(available))[turn % len(available)], turn % clients] = -1
    chosen = rank.argsort(0).argsort(0) < per_client  # (L, N)
    ends = chosen.cumsum(1) * available[:, None] // chosen.sum(1, keepdims=True)
    counts = np.diff(ends, axis=1, prepend=0)
    if not counts.sum(0).all():
        raise ConfigError(
            f"data.partition.per_client: {per_client} labels for each of {clients} clients leave a client "
            f"without any of the {n} examples; raise per_client, or lower data.clients"
        )
    return _assign(y, counts, rng)


def natural(data: Dataset, clients: int, rng: np.random.Generator, /) -> Ints:
    """The clients that the data set itself names, such as devices, writers or users."""
    if data.owner is None:
        raise ConfigError(
            "data.partition.name: natural needs a data set that gives the owner of each example; this one does not"
        )
    numbers, owners = np.unique(data.owner.numpy(), return_inverse=True)
    if len(numbers) != clients:
        names = [data.owner_names[i] for i in numbers[:MAX_LISTED_NAMES]] if data.owner_names else []
        listed = printable(f" ({', '.join(names)}{', ...' if len(numbers) > len(names) else ''})") if names else ""
        raise ConfigError(
            f"data.clients: {clients} should be {len(numbers)}, the number of natural clients{listed}"
        )
    return owners


def content_hash(owners: Ints) -> str:
    """SHA-256 of `owners` (n,) as little-endian int64: the same on every machine."""
    return hashlib.sha256(owners.astype("<i8").tobytes()).hexdigest()


def label_counts(labels: Ints, owners: Ints, clients: int, classes: int) -> Ints:
    """(N, L): the examples of each label of each client. Rows of the server, with owner -1, do not count."""
    _check_table(clients, classes)
    of_clients = owners >= 0
    owners, labels = owners[of_clients], labels[of_clients]
    return np.bincount(owners * classes + labels, minlength=clients * classes).reshape(clients, classes)


def _check_clients(data: Dataset, clients: int, min_size: int = 1) -> int:
    """The number of examples, n; raises ConfigError where not every client can have `min_size`."""
    n = len(data.y_train)
    if clients * min_size > n:
        minimum = f" with data.partition.min_size={min_size}" if min_size > 1 else ""
        raise ConfigError(
            f"data.clients: {clients} is too many for {n} examples{minimum}; allowed: 1 to {n // min_size}"
        )
    return n


def _check_table(clients: int, classes: int) -> None:
    """Raise ConfigError where the work with a number for each client and label does not fit into memory."""
    what = f"data: a table of {clients:,} clients and {classes:,} labels needs"
    check_memory(what, TABLES * 8 * clients * classes, "lower data.clients or the number of classes")


def _dense_labels(data: Dataset, clients: int) -> tuple[Ints, Ints]:
    """(n,) labels numbered without gaps, and (L,) the number of examples of each."""
    y = np.unique(data.y_train.numpy(), return_inverse=True)[1]
    available = np.bincount(y)
    _check_table(clients, len(available))
    return y, available


def _draw_dirichlet(alpha: float, length: int, draws: int, rng: np.random.Generator) -> Floats:
    """(draws, length) proportions ~ Dir(alpha); raises ConfigError where alpha is too extreme for floats."""
    proportions = rng.dirichlet(np.full(length, alpha), draws)
    if not np.allclose(proportions.sum(1), 1):  # zeros where alpha is too small, NaN where it is too large
        raise ConfigError(f"data.partition.alpha: {alpha} is too extreme for Dir(alpha) to be drawn")
    return proportions


def _split_by_proportion(proportions: Floats, available: Ints) -> Ints:
    """Divides the `available` (L,) examples of each label in `proportions` (L, N); returns counts (L, N)."""
    cuts = np.floor(np.cumsum(proportions, axis=1) * available[:, None]).astype(np.int64)
    cuts[:, -1] = available  # as proportions sum to 1 only up to rounding
    return np.diff(np.minimum(cuts, available[:, None]), axis=1, prepend=0)


def _draw_by_mix(available: Ints, sizes: Ints, mixes: Floats, rng: np.random.Generator) -> Ints:
    """Draws `sizes` (N,) labels for the clients from their `mixes` (N, L); returns counts (L, N).

    The counts use up the `available` (L,) examples of each label. All clients draw at once. Where they draw more
    of a label than there is, a random choice of these draws counts, and the other draws are repeated among the
    labels that are left. Each repetition but the last uses up a label.
    """
    counts = np.zeros((len(available), len(sizes)), dtype=np.int64)
    while (missing := sizes - counts.sum(0)).any():
        left = available - counts.sum(1)
        weight = mixes * (left > 0)
        weight[weight.sum(1) < 1e-9] = left  # no label of this client's mix is left
        drawn = rng.multinomial(missing, weight / weight.sum(1, keepdims=True)).T
        for label, limit in enumerate(left):
            if drawn[label].sum() > limit:
                drawn[label] = rng.multivariate_hypergeometric(drawn[label], limit, method="marginals")
        counts += drawn
    return counts


def _assign(y: Ints, counts: Ints, rng: np.random.Generator) -> Ints:
    """(n,) owners that give client j `counts[i, j]` random examples of label i; y is (n,), counts (L, N)."""
    shuffled = rng.permutation(len(y))
    order = shuffled[np.argsort(y[shuffled], kind="stable")]
    owners = np.empty(len(y), dtype=np.int64)
    owners[order] = np.repeat(np.tile(np.arange(counts.shape[1]), len(counts)), counts.ravel())
    return owners


def _too_few_message(alpha: float, clients: int, min_size: int, n: int, way_out: str = "") -> str:
    return (
        f"data.partition.alpha: with {alpha}, each of {MAX_DRAWS} draws gave one of {clients} clients fewer than "
        f"min_size={min_size} of {n} examples; raise alpha, lower data.clients or data.partition.min_size{way_out}"
    )
