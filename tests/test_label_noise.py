"""Laws of label noise: which labels are wrong, how many, whose; and losses find them."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_data
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedsim.cli.commands import app
from fedsim.data import DATASETS, Dataset, FederatedData
from fedsim.data.noise import LabelNoise
from fedsim.errors import ConfigError
from fedsim.experiment.build import build_data
from fedsim.experiment.config import load
from fedsim.training.beta_mixture import BetaMixture
from fedsim.types import Stream, random

CLASSES, CLIENTS = 5, 8
CONFIG = {
    "rounds": 1,
    "data": {"name": "synthetic", "examples": 40, "test_examples": 10, "clients": 4, "holdout": 0.25},
    "model": "2nn",
    "strategy": "fedavg",
    "cohort": "all",
}


def federation(n=8000, clients=CLIENTS, holdout=0.0, classes=CLASSES):
    y = torch.arange(n) % classes
    x = torch.zeros(n, 1)
    owners = random(0, Stream.PARTITION).permutation(np.arange(n) % clients)
    return FederatedData(Dataset(x, y, x[:1], y[:1], classes), owners, clients=clients, holdout=holdout)


def wrong_in(data):
    return (data.labels != data.true_labels).numpy()


def noise_of(**noise):
    return LabelNoise(**load(CONFIG | {"data": CONFIG["data"] | {"label_noise": noise}}).data["label_noise"])


def auc(score, wrong):
    """The area under the ROC curve: the probability that a wrong label has a higher score than a clean one."""
    _, place, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]
    k = wrong.sum()
    return (rank[wrong].sum() - k * (k + 1) / 2) / (k * (len(wrong) - k))


def drawn_losses(n=4000, share=0.3, key=0):
    """Losses in random order, and which are of wrong labels: 5 Beta(2, 8) if clean, 5 Beta(8, 3) if wrong."""
    rng = random(key, Stream.DATASET)
    wrong = rng.random(n) < share
    return 5 * np.where(wrong, rng.beta(8, 3, n), rng.beta(2, 8, n)), wrong


# Wrong labels.


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kind", ["symmetric", "pair"])
def test_the_rate_of_wrong_labels_is_the_same_in_every_class(kind, rate):
    data = noise_of(rate=rate, kind=kind).applied(federation(), seed=1)
    for label in range(CLASSES):
        share = wrong_in(data)[(data.true_labels == label).numpy()].mean()
        assert abs(share - rate) <= 4 * (rate * (1 - rate) / 1600) ** 0.5


def test_symmetric_noise_is_uniform_over_the_other_classes_and_pair_noise_gives_the_next():
    clean = federation()
    steps = (noise_of(rate=0.4).applied(clean, seed=1).labels - clean.labels) % CLASSES
    others = torch.bincount(steps, minlength=CLASSES)[1:].double()
    assert (abs(others - others.mean()) < 5 * others.mean() ** 0.5).all()
    steps = (noise_of(rate=0.4, kind="pair").applied(clean, seed=1).labels - clean.labels) % CLASSES
    assert steps.unique().tolist() == [0, 1]


def test_only_the_share_of_clients_has_wrong_labels():
    for share, clients in ((0.01, 1), (0.5, 4), (1.0, 8)):
        data = noise_of(rate=0.5, clients=share).applied(federation(), seed=0)
        assert len(np.unique(data.owners[wrong_in(data)])) == clients


def test_a_client_s_labels_depend_on_no_other_client():
    """The same rows of client 0 in two federations, where the others hold other rows."""
    data, rng = federation(400), np.random.default_rng(0)
    owners = np.where(data.owners == 0, 0, 1 + rng.permutation(400) % 3)
    x = torch.zeros(400, 1)
    other = FederatedData(Dataset(x, data.labels, x, data.labels, CLASSES), owners, clients=4)
    rows = data.rows(0)
    one, two = (noise_of(rate=0.5).applied(d, seed=3).labels[rows] for d in (data, other))
    assert torch.equal(one, two)
    assert not torch.equal(one, data.labels[rows])


def test_one_key_one_noise():
    one, again, other = (noise_of(rate=0.5).applied(federation(), seed).labels for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_noisy_clients_and_the_labels_of_client_0_are_drawn_independently():
    """numpy gives the keys (s, NOISE) and (s, NOISE, 0) the same stream."""
    assert random(0, Stream.NOISE, 0, 1).random() != random(0, Stream.NOISE, 0).random()


def test_more_noise_adds_wrong_labels_to_the_same_ones():
    few, more = (noise_of(rate=r).applied(federation(), 0) for r in (0.2, 0.5))
    assert torch.equal(more.labels[wrong_in(few)], few.labels[wrong_in(few)])
    some, all_ = (noise_of(rate=0.5, clients=c).applied(federation(), 0) for c in (0.25, 1.0))
    assert torch.equal(all_.labels[wrong_in(some)], some.labels[wrong_in(some)])


def test_what_is_held_out_keeps_its_labels_and_nothing_else_changes():
    clean = federation(holdout=0.25)
    noisy = noise_of(rate=1.0).applied(clean, seed=0)
    for client in range(CLIENTS):
        assert not wrong_in(noisy)[noisy.held_out(client)].any()
        assert wrong_in(noisy)[noisy.rows(client)].all()
        assert (noisy.rows(client) == clean.rows(client)).all()
    assert not wrong_in(clean).any()
    assert torch.equal(noisy.test_batch(torch.arange(1))[1], clean.test_batch(torch.arange(1))[1])


def test_batches_and_the_digest_have_the_labels_in_use():
    clean = federation()
    noisy = noise_of(rate=0.4).applied(clean, seed=0)
    rows = torch.arange(len(clean.labels))
    assert torch.equal(noisy.batch(rows)[1], noisy.labels)
    assert noisy.digest() != clean.digest()
    assert noise_of(rate=0.0).applied(clean, seed=0).digest() == clean.digest()
    assert torch.equal(noisy.to("cpu").true_labels, clean.labels)


def test_a_config_makes_noise_after_the_partition_and_says_all_of_it():
    spec = {"label_noise": {"rate": 0.5}, "partition": {"name": "labels", "per_client": 3}}
    config = load(CONFIG | {"data": CONFIG["data"] | spec})
    assert config.data["label_noise"] == {"rate": 0.5, "kind": "symmetric", "clients": 1.0}
    noisy, clean = build_data(config), build_data(load(config.model_dump(), {"data.label_noise": None}))
    assert (noisy.owners == clean.owners).all()
    assert wrong_in(noisy).any()
    assert torch.equal(noisy.true_labels, clean.labels)


def test_fedsim_partition_tells_how_many_labels_are_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(json.dumps(CONFIG))  # JSON is YAML, too
    with pytest.raises(SystemExit, match="0"):
        app(["partition", "c.yaml", "data.label_noise.rate=1"])
    assert "\nlabel noise: 32 of 40 labels are wrong\n" in capsys.readouterr().out  # a client holds out 2 of 10
    with pytest.raises(SystemExit, match="0"):
        app(["partition", "c.yaml"])
    assert "label noise" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("label_noise.rate", 1.5, "data.label_noise.rate: 1.5 should be a number >= 0 and <= 1"),
        ("label_noise.rate", -0.1, "data.label_noise.rate: -0.1 should be a number >= 0 and <= 1"),
        ("label_noise.kind", "pair", "data.label_noise.rate: missing; it should be a number >= 0 and <= 1"),
        ("label_noise", {"rate": 0.1, "kind": "odd"}, 'data.label_noise.kind: "odd" should be symmetric or pair'),
        (
            "label_noise",
            {"rate": 0.1, "clients": 0},
            "data.label_noise.clients: 0 should be a number > 0 and <= 1",
        ),
        ("label_noise", {"rat": 0.1}, "data.label_noise.rat: 'rat' is unknown; did you mean 'rate'?"),
        ("label_noise", 0.4, "data.label_noise: 0.4 should be a mapping, or null"),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_in_one_line(key, value, message):
    with pytest.raises(ConfigError) as error:
        load(CONFIG, {f"data.{key}": value})
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["symmetric", "pair"])
def test_data_of_one_class_is_refused(kind):
    with pytest.raises(ConfigError, match=r"\Adata\.label_noise: this data has 1 class"):
        noise_of(rate=0.4, kind=kind).applied(federation(classes=1), seed=0)


# The Beta mixture.


def test_the_fit_finds_the_mixture():
    """EM has converged here; the ten iterations of the paper rank the labels nearly as well."""
    losses, wrong = drawn_losses()
    mixture = BetaMixture.fit(losses, iterations=200)
    assert mixture.weights[1] == pytest.approx((0.3 - 0.05) / 0.9, abs=0.02)  # without the outer 5 %
    grid = np.linspace(0, 5, 501)
    border = grid[mixture.posterior(grid) > 0.5].min()
    assert border == pytest.approx(2.48, abs=0.1)  # where 0.3 Beta(8, 3) becomes larger than 0.7 Beta(2, 8)
    for fitted, right in ((mixture, 0.965), (BetaMixture.fit(losses), 0.93)):
        doubt = fitted.posterior(losses)
        assert ((doubt >= 0) & (doubt <= 1)).all()
        assert auc(doubt, wrong) > 0.99
        assert ((doubt > 0.5) == wrong).mean() > right


@pytest.mark.parametrize("key", range(5))
@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (0.5, 5, 1, 1), (1, 4, 2, 2), (3, 3, 3, 3)], ids=str)
def test_a_larger_loss_never_means_a_smaller_probability(shape, key):
    a0, b0, a1, b1 = shape
    rng = random(key, Stream.DATASET)
    losses = np.concatenate([rng.beta(a0, b0, 300), rng.beta(a1, b1, 200)])
    mixture = BetaMixture.fit(losses)
    assert (np.diff(mixture.posterior(np.linspace(-1, 3, 2001))) >= -1e-12).all()


@pytest.mark.parametrize(
    ("alphas", "betas", "turn"), [((1.0, 6.0), (2.0, 4.0), 5 / 7), ((3.0, 2.0), (9.0, 3.0), 1 / 7)]
)
def test_the_posterior_is_constant_beyond_its_turning_point(alphas, betas, turn):
    """Two densities, of which the narrow one is larger only in the middle, or only at both ends."""
    losses = np.linspace(0.001, 0.999, 999)
    mixture = BetaMixture(alphas=alphas, betas=betas)
    odds = 0.0
    for sign, a, b in zip((-1, 1), alphas, betas, strict=True):
        density = losses ** (a - 1) * (1 - losses) ** (b - 1)
        odds = odds + sign * np.log(density / density.mean())
    plain, level = 1 / (1 + np.exp(-odds)), mixture.posterior(losses)
    inside = losses < turn if alphas[1] > alphas[0] else losses > turn
    np.testing.assert_allclose(level[inside], plain[inside], atol=2e-3)
    assert np.ptp(level[~inside]) < 1e-12
    assert (np.diff(plain[~inside]) < 0).all()  # this decrease is what the constant replaces


def test_scale_shift_and_order_of_the_losses_do_not_matter():
    losses, _ = drawn_losses()
    doubt = BetaMixture.fit(losses).posterior(losses)
    order = np.random.default_rng(0).permutation(len(losses))
    moved = 7 * losses[order] + 2
    np.testing.assert_allclose(BetaMixture.fit(moved).posterior(moved), doubt[order], atol=1e-9)
    assert BetaMixture.fit(losses) == BetaMixture.fit(losses[order])


def test_a_few_huge_losses_do_not_hide_the_others():
    losses, wrong = drawn_losses()
    losses[np.flatnonzero(wrong)[:40]] = 1e6
    assert auc(BetaMixture.fit(losses).posterior(losses), wrong) > 0.99


@pytest.mark.parametrize(
    "losses",
    [
        np.array([]),
        np.array([0.1]),
        np.array([0.1, 9.0] * 4),
        np.full(100, 2.3),
        np.zeros(100),
        2.3 + 1e-7 * np.arange(10),
        np.full(50, np.nan),
    ],
    ids=["none", "one", "few", "constant", "zero", "rounding", "nan"],
)
def test_losses_without_information_leave_all_labels_clean(losses):
    with np.errstate(all="raise"):
        doubt = BetaMixture.fit(losses).posterior(np.linspace(0, 10, 7))
    assert doubt.tolist() == [0.0] * 7


@pytest.mark.parametrize(
    "losses",
    [
        np.repeat([0.0, 1.0], 50),
        np.repeat([0.0, 0.5, 1.0], [80, 1, 19]),
        np.arange(10.0),
        np.repeat([0, 3.0], [6, 94]),
    ],
    ids=["two values", "three values", "ten", "mostly high"],
)
def test_hard_cases_give_finite_probabilities(losses):
    with np.errstate(invalid="raise", over="raise", divide="raise"):
        doubt = BetaMixture.fit(losses).posterior(np.append(losses, np.inf))
    assert np.isfinite(doubt).all()
    assert (np.diff(doubt) >= -1e-12).all()


def test_losses_in_single_precision_are_enough():
    losses, wrong = drawn_losses()
    assert auc(BetaMixture.fit(losses.astype(np.float32)).posterior(losses.astype(np.float32)), wrong) > 0.99


@pytest.mark.parametrize("kind", ["symmetric", "pair"])
def test_the_losses_of_a_network_find_wrong_labels(kind):
    """Arazo 2019's point, on images: after a short training wrong labels have the larger losses."""
    data = noise_of(rate=0.3, kind=kind).applied(make_data((600,), noise=0.5), seed=0)
    score, wrong = error_probs_after_training(data, epochs=3)
    assert auc(score, wrong) > 0.9
    assert score[wrong].mean() > 0.6
    assert score[~wrong].mean() < 0.3


@pytest.mark.skipif("FEDSIM_DATA" not in os.environ, reason="FEDSIM_DATA names no folder with MNIST")
def test_forty_percent_of_mnist():
    data = DATASETS.bind({"name": "mnist", "root": os.environ["FEDSIM_DATA"]})()
    few = Dataset(data.x_train[:5000], data.y_train[:5000], data.x_test, data.y_test, 10, data.mean, data.std)
    noisy = noise_of(rate=0.4).applied(FederatedData(few, np.zeros(5000, np.int64), clients=1), seed=0)
    assert auc(*error_probs_after_training(noisy, epochs=2)) > 0.95


def error_probs_after_training(data, epochs):
    """The probability that each label is wrong, and which are, after training on all labels."""
    x, y = data.batch(torch.arange(len(data.labels)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Flatten(), nn.Linear(x[0].numel(), 64), nn.ReLU(), nn.Linear(64, data.num_classes)
        )
        optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
        for _ in range(epochs):
            for rows in torch.randperm(len(y)).split(32):
                optimizer.zero_grad()
                F.cross_entropy(network(x[rows]), y[rows]).backward()
                optimizer.step()
    with torch.no_grad():
        losses = F.cross_entropy(network(x), y, reduction="none").numpy()
    return BetaMixture.fit(losses).posterior(losses), wrong_in(data)


@given(st.lists(st.floats(0, 2.0**127) | st.sampled_from([0.0, 1e-30, 1.0]), min_size=1, max_size=40))
def test_any_losses_give_probabilities(losses):
    """Equal, tiny, huge and few ones: no variance, mass or spread is a divisor of 0."""
    losses = np.array(losses)
    wrong = BetaMixture.fit(losses).posterior(losses)
    assert ((wrong >= 0) & (wrong <= 1)).all()
