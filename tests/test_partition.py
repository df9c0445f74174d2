"""Laws of partitions: each example has one owner, each client an example, and one key gives one partition."""

from io import StringIO

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedsim.data import DATASETS, PARTITIONS, Dataset, FederatedData
from fedsim.data.partition import content_hash
from fedsim.data.picture import draw, label_table
from fedsim.errors import ConfigError
from fedsim.types import Stream, random

SPECS = (
    {"name": "iid"},
    {"name": "shards", "per_client": 3},
    {"name": "dirichlet", "alpha": 0.3},
    {"name": "dirichlet", "alpha": 0.1, "balanced": True},
    {"name": "dirichlet", "alpha": 1e-6, "balanced": True},
    {"name": "quantity", "alpha": 0.5},
    {"name": "labels", "per_client": 2},
)


def labelled(labels, owner=None):
    y = torch.as_tensor(labels, dtype=torch.int64)
    owner = None if owner is None else torch.as_tensor(owner, dtype=torch.int64)
    x = torch.arange(len(y), dtype=torch.float32)[:, None]
    return Dataset(x, y, x[:1], y[:1], classes=int(y.max()) + 1, owner=owner)


def balanced(n, classes=10):
    return labelled(np.arange(n) % classes)


def owners_of(spec, data, clients, seed=0):
    return PARTITIONS.bind(spec)(data, clients, random(seed, Stream.PARTITION))


def counts_of(data, owners, clients):
    return np.array([np.bincount(data.y_train[owners == k], minlength=data.classes) for k in range(clients)])


@pytest.mark.parametrize("spec", SPECS, ids=str)
@given(
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=60),
    clients=st.integers(1, 12),
    seed=st.integers(0, 2**32),
)
def test_every_example_has_one_owner_and_every_client_an_example(spec, labels, clients, seed):
    data = labelled(labels)
    try:
        owners = owners_of(spec, data, clients, seed)
    except ConfigError:  # some requests are impossible
        with pytest.raises(ConfigError, match=r"\Adata\.[^\n]+\Z"):
            owners_of(spec, data, clients, seed)
        return
    assert owners.shape == (len(labels),)
    assert owners.dtype == np.int64
    assert set(owners) == set(range(clients))
    np.testing.assert_array_equal(owners, owners_of(spec, data, clients, seed))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_another_key_is_another_partition(spec):
    data = balanced(400)
    assert content_hash(owners_of(spec, data, 8, 0)) != content_hash(owners_of(spec, data, 8, 1))


@given(n=st.integers(1, 200), share=st.floats(0.01, 1), balanced_mix=st.booleans())
def test_sizes_differ_by_at_most_one(n, share, balanced_mix):
    clients = max(1, int(n * share))
    spec = {"name": "dirichlet", "alpha": 0.2, "balanced": True} if balanced_mix else {"name": "iid"}
    assert np.ptp(np.bincount(owners_of(spec, balanced(n, 7), clients))) <= 1


def test_shards_are_those_of_mcmahan():
    data = labelled(np.repeat(np.arange(10), 600))
    counts = counts_of(data, owners_of({"name": "shards"}, data, 10 * 10), 100)
    assert (counts.sum(1) == 60).all()
    assert set(counts.ravel()) <= {0, 30, 60}


@given(n=st.integers(10, 300), clients=st.integers(1, 10), per_client=st.integers(1, 4))
def test_a_shard_spans_as_few_labels_as_its_rows_allow(n, clients, per_client):
    if clients * per_client > n:
        return
    data = labelled(np.arange(n) * 5 // n)
    owners = owners_of({"name": "shards", "per_client": per_client}, data, clients)
    runs = np.bincount(owners[np.flatnonzero(np.diff(owners, prepend=-1))])  # sorted labels: a shard is a run
    assert (runs <= per_client).all()
    assert np.ptp(np.bincount(owners)) <= per_client


@given(
    classes=st.integers(1, 12),
    clients=st.integers(1, 20),
    per_client=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_each_client_holds_its_number_of_labels(classes, clients, per_client, seed):
    data = balanced(40 * classes, classes)
    spec = {"name": "labels", "per_client": per_client}
    if not classes <= clients * per_client <= clients * classes:
        with pytest.raises(ConfigError, match=r"data\.partition\.per_client"):
            owners_of(spec, data, clients, seed)
        return
    counts = counts_of(data, owners_of(spec, data, clients, seed), clients)
    assert ((counts > 0).sum(1) == per_client).all()
    for of_label in counts.T:
        assert np.ptp(of_label[of_label > 0]) <= 1


@pytest.mark.parametrize("balanced_mix", [False, True])
def test_large_alpha_is_iid_and_small_alpha_is_not(balanced_mix):
    data = balanced(20_000)

    def distance(alpha):  # mean total variation between label mixes of clients and population
        spec = {"name": "dirichlet", "alpha": alpha, "balanced": balanced_mix}
        counts = counts_of(data, owners_of(spec, data, 10), 10)
        return np.abs(counts / counts.sum(1, keepdims=True) - 0.1).sum(1).mean() / 2

    assert distance(1e6) < 0.03
    assert distance(0.05) > 0.5
    assert distance(0.05) > distance(0.5) > distance(5.0)


def test_label_shares_have_the_moments_of_dirichlet():
    data, alpha, clients = balanced(40_000, 400), 0.7, 5
    counts = counts_of(data, owners_of({"name": "dirichlet", "alpha": alpha}, data, clients), clients)
    shares = counts / 100
    assert shares.mean() == pytest.approx(1 / clients)
    variance = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    assert shares.var() == pytest.approx(variance, rel=0.15)


@pytest.mark.parametrize(
    "spec", [{"name": "dirichlet", "alpha": 0.5}, {"name": "quantity", "alpha": 0.5}], ids=str
)
def test_min_size_is_kept_or_refused(spec):
    data = balanced(1_000)
    assert np.bincount(owners_of({**spec, "min_size": 20}, data, 10)).min() >= 20
    with pytest.raises(ConfigError, match=r"alpha: .* min_size=99 of 1000 .* lower data\.clients"):
        owners_of({**spec, "min_size": 99}, data, 10)


def test_natural_clients_are_those_of_the_data():
    data = labelled([0, 1, 0, 1], owner=[3, 0, 3, 1])
    np.testing.assert_array_equal(owners_of({"name": "natural"}, data, 3), [2, 0, 2, 1])
    with pytest.raises(ConfigError, match=r"data\.clients: 2 should be 3"):
        owners_of({"name": "natural"}, data, 2)
    with pytest.raises(ConfigError, match="gives the owner of each example"):
        owners_of({"name": "natural"}, balanced(10), 2)


@pytest.mark.parametrize(
    ("spec", "clients", "message"),
    [
        ({"name": "iid"}, 11, r"data\.clients: 11 is too many for 10 examples; allowed: 1 to 10"),
        ({"name": "shards", "per_client": 3}, 4, r"data\.partition\.per_client: 3 .* allowed: up to 2"),
        ({"name": "labels", "per_client": 3}, 4, r"data\.partition\.per_client: 3 of 2 labels .* 1 to 2"),
        ({"name": "labels", "per_client": 1}, 1, r"data\.partition\.per_client: 1 of 2 labels .* 2 to 2"),
        ({"name": "dirichlet", "alpha": 1.0, "min_size": 6}, 2, r"min_size=6; allowed: 1 to 1"),
        ({"name": "dirichlet", "alpha": 0}, 2, r"data\.partition\.alpha"),
        ({"name": "dirichlet", "alpha": 1.7e308}, 2, r"data\.partition\.alpha: 1.7e\+308 is too extreme"),
        ({"name": "dirichlet", "alpha": 1.7e308, "balanced": True}, 2, "is too extreme"),
        ({"name": "quantity", "alpha": 1.7e308}, 2, "is too extreme"),
    ],
)
def test_an_impossible_partition_is_refused_by_its_key(spec, clients, message):
    with pytest.raises(ConfigError, match=message):
        owners_of(spec, balanced(10, 2), clients)


def test_content_hash_is_that_of_little_endian_int64():
    owners = np.array([0, 1, 258])
    assert content_hash(owners) == content_hash(owners.astype(">i8"))
    assert content_hash(owners) != content_hash(owners[::-1])


def test_a_million_examples_on_a_hundred_thousand_clients():
    data = balanced(1_000_000)
    for spec in ({"name": "iid"}, {"name": "shards"}, {"name": "dirichlet", "alpha": 0.5, "balanced": True}):
        federated = FederatedData(data, owners_of(spec, data, 100_000), clients=100_000)
        assert (federated.sizes == 10).all()


@given(
    owners=st.lists(st.integers(0, 5), min_size=1, max_size=80),
    holdout=st.sampled_from([0, 0.1, 0.29, 0.5, 0.999]),
    seed=st.integers(0, 9),
)
def test_rows_and_held_out_rows_cover_without_overlap(owners, holdout, seed):
    owners = np.unique(owners, return_inverse=True)[1]
    clients = int(owners.max()) + 1
    data = FederatedData(balanced(len(owners)), owners, clients=clients, holdout=holdout, seed=seed)
    for k in range(clients):
        mine = np.flatnonzero(owners == k)
        rows, held_out = data.rows(k), data.held_out(k)
        assert len(rows) == data.sizes[k] >= 1
        assert len(held_out) == min(int(round(holdout * 1000) * len(mine) // 1000), len(mine) - 1)
        assert (np.diff(rows) > 0).all()
        assert (np.diff(held_out) > 0).all()
        np.testing.assert_array_equal(np.sort(np.concatenate([rows, held_out])), mine)


def test_held_out_rows_depend_on_the_key_and_are_evenly_spread():
    owners = np.repeat(np.arange(200), 10)

    def held_out(seed):
        data = FederatedData(balanced(2000), owners, clients=200, holdout=0.2, seed=seed)
        return np.concatenate([data.held_out(k) for k in range(200)])

    first, same, other = held_out(0), held_out(0), held_out(1)
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()
    assert (np.bincount(first % 10, minlength=10) > 15).all()  # 40 expected at each place


@pytest.mark.parametrize(
    ("owners", "options", "message"),
    [
        ([0, 0, 1], {"clients": 3}, "left client 2 of 3 without examples"),
        ([0, 1, 3], {"clients": 3}, "owners from 0 to 3; allowed: 0 to 2"),
        ([0, -1, 1], {"clients": 2}, "owners from -1"),
        ([0, 1], {"clients": 2}, r"should return int64 \(3,\)"),
        ([0, 1, 1], {"clients": 2, "holdout": 1.0}, r"data\.holdout: 1\.0"),
    ],
)
def test_bad_owners_are_refused(owners, options, message):
    with pytest.raises(ConfigError, match=message):
        FederatedData(balanced(3), np.array(owners), **options)


@pytest.mark.parametrize(("clients", "classes"), [(1, 1), (10, 10), (25, 62), (1_000, 10), (50_000, 100)])
def test_pictures_and_tables_fit_any_number_of_clients(tmp_path, clients, classes):
    data = balanced(100_000, classes)
    owners = owners_of({"name": "iid"}, data, clients)
    draw(data.y_train.numpy(), owners, classes, tmp_path / "partition.png")
    assert (tmp_path / "partition.png").read_bytes().startswith(b"\x89PNG")
    console = Console(width=80, record=True, file=StringIO())
    console.print(label_table(FederatedData(data, owners, clients=clients)))
    lines = console.export_text().splitlines()
    assert len(lines) < 40
    assert not any("…" in line or len(line) > 80 for line in lines)
    assert "100,000" in lines[-2]


def test_alpha_beta_devices_become_clients():
    data = DATASETS.bind({"name": "synthetic_alpha_beta", "devices": 5})()
    federated = FederatedData(data, owners_of({"name": "natural"}, data, 5), clients=5)
    np.testing.assert_array_equal(federated.sizes, np.bincount(data.owner))
