"""Strategies against drift: each against its paper's algorithm by hand, and their special cases.

By hand is numpy, on least squares: F_k(w) = mean of (a w - b)^2 / 2 over the client's rows (a, b). Clients differ
in number, curvature and minimum, and not all take part in each round.
"""

import copy
from itertools import product

import numpy as np
import pytest
import torch
from conftest import CLASSES, SIZES, close, conv_net, make_data, make_simulation, make_strategy, make_task, trace
from test_vectorized import assert_agree, pair
from torch import nn
from torch.nn import functional as F

from fedsim import ConfigError, Task
from fedsim.data import Dataset, FederatedData
from fedsim.training.recipe import Distillation, NoisyLabels

RNG = np.random.default_rng(7)
ROWS = (3, 2, 5, 4)  # of each client
A, B = (
    [values.astype(np.float32).astype(float) for values in made]  # data sets are float32
    for made in (
        [RNG.normal(size=(n, 2)) * (1 + k) / 2 for k, n in enumerate(ROWS)],
        [RNG.normal(size=n) + k for k, n in enumerate(ROWS)],
    )
)
START = np.array([0.5, -1.0])
N, LR, STEPS = len(ROWS), 0.05, 3
SOME = {"name": "uniform", "size": 2}


class LeastSquares(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.w, self.dropout = nn.Parameter(torch.from_numpy(START)), nn.Dropout(dropout)

    def forward(self, rows):
        return (self.dropout(rows[:, :2]) @ self.w - rows[:, 2]).unsqueeze(1)


class Regression(Task):
    def losses(self, logits, y):
        return logits.squeeze(1).square() / 2


def regression(strategy, *, dropout=0.0, **settings):
    """A simulation of full-batch steps."""
    rows = torch.from_numpy(np.concatenate([np.column_stack(client) for client in zip(A, B, strict=True)]))
    zeros = torch.zeros(len(rows), dtype=torch.int64)
    dataset, owners = Dataset(rows.float(), zeros, rows.float(), zeros, 1), np.repeat(np.arange(N), ROWS)
    data = FederatedData(dataset, owners, clients=N, dtype=torch.float64)
    task = Regression(LeastSquares(dropout), (3,), 1)
    return make_simulation(
        strategy, task=task, data=data, **{"lr": LR, "epochs": STEPS, "batch_size": "full"} | settings
    )


def gradient(k, w):
    return A[k].T @ (A[k] @ w - B[k]) / ROWS[k]


def descend(k, x, change=lambda g, w: g, steps=STEPS, lr=LR):
    """What client k has after its steps from x."""
    y = x
    for _ in range(steps):
        y = y - lr * change(gradient(k, y), y)
    return y


def minimum(weights):
    """Of sum w_k F_k."""
    hessian = sum(w * A[k].T @ A[k] / ROWS[k] for k, w in enumerate(weights))
    return np.linalg.solve(hessian, sum(w * A[k].T @ B[k] / ROWS[k] for k, w in enumerate(weights)))


def means(weights):
    """The mean over a cohort of values by client, and the cohort's part of the population, by these weights."""
    n = np.array(ROWS if weights == "examples" else [1] * N)
    return (
        lambda values, cohort: sum(n[k] * values[k] for k in cohort) / n[cohort].sum(),
        lambda cohort: n[cohort].sum() / n.sum(),
    )


def agrees(server, **expected):
    for name, value in expected.items():
        close(server[name], torch.from_numpy(value))


# FedDyn


def test_feddyn_by_hand():
    """Acar 2021, Algorithm 1: |S| of m take part, h has 1 / m, and the mean of the models is not weighted."""
    alpha, m = 0.3, N
    simulation = regression(make_strategy("feddyn", alpha=alpha), cohort=SOME)
    x, h, g = START, np.zeros(2), np.zeros((N, 2))
    for _ in range(5):
        cohort = simulation.round().cohort
        y = {k: descend(k, x, lambda d, w, k=k, x=x: d - g[k] + alpha * (w - x)) for k in cohort}
        for k in cohort:
            g[k] = g[k] - alpha * (y[k] - x)
        h = h - alpha / m * sum(y[k] - x for k in cohort)
        x = sum(y.values()) / len(cohort) - h / alpha
        agrees(simulation.server, model=x, h=h)


def test_feddyn_keeps_the_mean_of_all_clients_gradients():
    """Those not seen so far have 0."""
    simulation = make_simulation(
        "feddyn", task=make_task(dtype=torch.float64), cohort={"name": "uniform", "size": 2}
    )
    for _ in range(3):
        simulation.round()
        g = torch.stack([state["g"] for state in simulation.clients.values()])
        close(simulation.server["h"], g.sum(0) / len(SIZES))
    assert len(g) < len(SIZES)


def test_feddyn_ends_at_the_minimum_of_the_mean_loss():
    """With many local steps and clients that differ in curvature FedAvg with equal weights ends elsewhere."""
    optimum, x = minimum([1] * N), START
    simulation = regression(make_strategy("feddyn", alpha=1.0), lr=0.1, epochs=10)
    for _ in range(30):
        simulation.round()
        x = sum(descend(k, x, steps=10, lr=0.1) for k in range(N)) / N
    assert (simulation.server["model"] - torch.from_numpy(optimum)).norm() < 1e-3
    assert np.linalg.norm(x - optimum) > 0.1


# FedDC


@pytest.mark.parametrize(
    ("control", "drift", "weights"),
    list(product(["updates", "variates"], ["cohort", "all"], ["examples", "uniform"])),
)
def test_feddc_by_hand(control, drift, weights):
    """Gao 2022, Algorithm 1 and equations 3 to 8; and the control variates of the authors' code."""
    alpha, rate = 0.2, STEPS * LR
    scale = 1 / rate if control == "updates" else 1
    mean, part = means(weights)
    strategy = make_strategy("feddc", alpha=alpha, control=control, drift=drift, weights=weights)
    simulation = regression(strategy, cohort=SOME)
    x, g, h_all = START, np.zeros(2), np.zeros(2)  # in the variates' case g is -c
    g_k, h_k = np.zeros((N, 2)), np.zeros((N, 2))
    for _ in range(5):
        cohort = simulation.round().cohort
        y = {
            k: descend(k, x, lambda d, w, k=k, x=x, g=g: d + alpha * (w + h_k[k] - x) + scale * (g_k[k] - g))
            for k in cohort
        }
        new = {k: y[k] - x if control == "updates" else g_k[k] - g + (y[k] - x) / rate for k in cohort}
        g = (
            mean(new, cohort)
            if control == "updates"
            else g + part(cohort) * mean({k: new[k] - g_k[k] for k in cohort}, cohort)
        )
        for k in cohort:
            g_k[k], h_k[k] = new[k], h_k[k] + y[k] - x
        h_all = h_all + part(cohort) * mean({k: y[k] - x for k in cohort}, cohort)
        x = mean(y, cohort) + (mean(h_k, cohort) if drift == "cohort" else h_all)
        agrees(simulation.server, model=x, g=g)
        for k in cohort:
            agrees(simulation.clients[k], g=g_k[k], h=h_k[k])
    n = np.array(ROWS) / sum(ROWS) if weights == "examples" else np.full(N, 1 / N)
    close(torch.from_numpy(h_all), torch.from_numpy(n @ h_k))  # the mean over all clients
    if control == "variates":
        close(torch.from_numpy(g), torch.from_numpy(n @ g_k))


# FedSAM


@pytest.mark.parametrize("weights", ["examples", "uniform"])
def test_fedsam_by_hand(weights):
    rho, (mean, _) = 0.5, means(weights)
    simulation, x = regression(make_strategy("fedsam", rho=rho, weights=weights), cohort=SOME), START
    for _ in range(3):
        cohort = simulation.round().cohort
        y = {k: descend(k, x, lambda g, w, k=k: gradient(k, w + rho * g / np.linalg.norm(g))) for k in cohort}
        x = mean(y, cohort)
        agrees(simulation.server, model=x)


RECIPES = [{}, {"momentum": 0.9, "weight_decay": 0.01}, {"optimizer": "adam", "eps": 1e-3}, {"clip_norm": 0.1}]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_fedsam_without_rho_is_fedavg(recipe):
    """Also with dropout and batch norm: up to rounding, and to the bit where it divides by 4."""
    sam, sizes = make_strategy("fedsam", rho=0, weights="examples"), (4, 8, 12)
    runs = [trace(make_simulation(s, data=make_data(sizes), **recipe), 2) for s in (sam, "fedavg")]
    assert runs[0] == runs[1]
    task = make_task(dtype=torch.float64)
    one, other = (make_simulation(s, task=task, **recipe) for s in (sam, "fedavg"))
    for _ in range(2):
        assert one.round().train_loss == pytest.approx(other.round().train_loss, rel=1e-12)
        torch.testing.assert_close(one.server, other.server, rtol=1e-12, atol=1e-12)


def test_both_gradients_of_a_fedsam_step_have_one_dropout_mask():
    """Where dropout hides a column of every row, its weight stays."""
    stays = 0
    for seed in range(6):
        settings = {"dropout": 0.7, "epochs": 1, "batch_size": 1, "steps": 1, "seed": seed}
        for k in range(N):
            moved = []
            for strategy in ("fedavg", make_strategy("fedsam", rho=1.0, weights="examples")):
                simulation = regression(strategy, cohort={"name": "fixed", "clients": [k]}, **settings)
                simulation.round()
                moved.append((simulation.server["model"] != torch.from_numpy(START)).tolist())
            assert moved[0] == moved[1]
            stays += moved[0].count(False) == 1
    assert stays


# MOON


def projecting():
    """Batch norm, and a projection head in front of the last layer."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4),
        nn.Linear(4, CLASSES),
    )  # fmt: skip


@pytest.mark.parametrize(("mu", "tau"), [(2.0, 0.5), (0.7, 1.3)])
def test_moon_by_hand(mu, tau):
    """Li 2021, equation 3; z is the projection; the frozen networks, one of them the last own, in eval mode."""
    task, lr, sizes = make_task(projecting, dtype=torch.float64), 0.3, (3, 8, 5)
    data = make_data(sizes, dtype=torch.float64)
    strategy = make_strategy("moon", mu=mu, tau=tau)
    cohort = {"name": "uniform", "size": 2}
    simulation = make_simulation(strategy, task=task, data=data, lr=lr, batch_size="full", epochs=2, cohort=cohort)
    last, seen = dict.fromkeys(range(len(sizes)), task.initial_model), []
    for _ in range(4):
        server = dict(simulation.server)
        taken = simulation.round().cohort
        network = {name: copy.deepcopy(task.network).train(name == "own") for name in ("own", "global", "last")}
        n, total, changed = 0, 0, {}
        for k in taken:
            for name, net in network.items():
                weights = server | ({"model": last[k]} if name == "last" else {})
                net.load_state_dict(task.state_dict(weights))
            x, y = data.batch(torch.from_numpy(data.rows(k)))
            for _ in range(2):
                own = network["own"]
                z, z_global, z_last = (net[:-1](x) for net in network.values())
                e = [(F.cosine_similarity(z, other.detach()) / tau).exp() for other in (z_global, z_last)]
                loss = F.cross_entropy(own[-1](z), y) - mu * (e[0] / (e[0] + e[1])).log().mean()
                grads = torch.autograd.grad(loss, list(own.parameters()))
                with torch.no_grad():
                    for p, g in zip(own.parameters(), grads, strict=True):
                        p -= lr * g
            changed[k] = task.layout.flatten(dict(own.named_parameters()))
            n, total = n + sizes[k], total + sizes[k] * changed[k]
        last |= changed
        seen += taken
        close(simulation.server["model"], total / n)
        for k in taken:
            close(simulation.clients[k]["last"], last[k])
    assert len(seen) > len({*seen})  # somebody came twice, and has a model of its own


@pytest.mark.parametrize("recipe", [{}, {"momentum": 0.9, "accumulate": 2}, {"optimizer": "adam"}], ids=str)
def test_moon_without_mu_is_fedavg(recipe):
    """To the bit; what is frozen draws nothing, so also with dropout. Only the clients keep a model."""
    runs = [trace(make_simulation(s, **recipe), 2) for s in (make_strategy("moon", mu=0), "fedavg")]
    for record in (*runs[0], *runs[1]):
        del record["clients"]
    assert runs[0] == runs[1]


# MimeLite


@pytest.mark.parametrize(("beta", "weights"), [(0.9, "examples"), (0.5, "uniform")])
def test_mimelite_by_hand(beta, weights):
    """Karimireddy 2021, Algorithm 1 with momentum: m stays as it is within a round."""
    mean, _ = means(weights)
    simulation = regression(make_strategy("mimelite", beta=beta, weights=weights), cohort=SOME)
    x, m = START, np.zeros(2)
    for _ in range(4):
        cohort = simulation.round().cohort
        y = {k: descend(k, x, lambda g, w, m=m: (1 - beta) * g + beta * m) for k in cohort}
        m = (1 - beta) * mean({k: gradient(k, x) for k in cohort}, cohort) + beta * m
        x = mean(y, cohort)
        agrees(simulation.server, model=x, m=m)


@pytest.mark.parametrize("recipe", [{}, {"momentum": 0.9}, {"optimizer": "adam", "epochs": 2}], ids=str)
def test_mimelite_without_beta_is_fedavg(recipe):
    """Model, statistics and losses, to the bit, also with dropout: the full gradient is a pass of its own."""
    runs = [
        trace(make_simulation(s, **recipe), 2)
        for s in (make_strategy("mimelite", beta=0, weights="examples"), "fedavg")
    ]
    for record in (*runs[0], *runs[1]):
        record["server"].pop("m", None)
        del record["bytes_up"], record["bytes_down"]
    assert runs[0] == runs[1]


# SCAFFOLD's options


@pytest.mark.parametrize(
    ("control", "correction", "momentum"),
    [
        ("full_gradient", "gradient", 0.0),
        ("full_gradient", "gradient", 0.5),
        ("full_gradient", "after_step", 0.5),
        ("steps", "after_step", 0.0),
        ("steps", "after_step", 0.5),
    ],
)
def test_scaffold_by_hand(control, correction, momentum):
    """Option I is Karimireddy 2020's; after the step, NIID-Bench's, which is no part of the velocity."""
    strategy = make_strategy("scaffold", control=control, correction=correction)
    simulation = regression(strategy, cohort=SOME, momentum=momentum)
    x, c, c_k = START, np.zeros(2), np.zeros((N, 2))
    for _ in range(4):
        cohort, y, new = simulation.round().cohort, {}, {}
        for k in cohort:
            y[k], v = x, 0
            for _ in range(STEPS):
                inside = (c - c_k[k]) if correction == "gradient" else 0
                v = momentum * v + gradient(k, y[k]) + inside
                y[k] = y[k] - LR * v - (0 if correction == "gradient" else LR * (c - c_k[k]))
            new[k] = gradient(k, x) if control == "full_gradient" else c_k[k] - c + (x - y[k]) / (STEPS * LR)
        x = sum(y.values()) / len(cohort)
        c = c + sum(new[k] - c_k[k] for k in cohort) / N
        for k in cohort:
            c_k[k] = new[k]
        agrees(simulation.server, model=x, c=c)


def test_scaffold_after_the_step_is_scaffold_where_there_is_no_momentum():
    task = make_task(lambda: conv_net(dropout=0), dtype=torch.float64)
    inside, after = (
        make_simulation(make_strategy("scaffold", correction=correction), task=task)
        for correction in ("gradient", "after_step")
    )
    for _ in range(3):
        inside.round()
        after.round()
        close(dict(after.server), dict(inside.server))


def test_the_full_gradient_leaves_no_trace_in_the_training():
    """In round 1, with all c at 0, whatever becomes of them: model, statistics, loss, steps."""
    runs = [make_simulation(make_strategy("scaffold", control=c)) for c in ("steps", "full_gradient")]
    (one,), (other,) = (trace(run, 1) for run in runs)
    for record in (one, other):
        del record["server"]["c"], record["clients"]
    assert one == other


# What all of them keep

OPTIONS = [
    ("feddc", {"control": "variates", "drift": "all", "weights": "uniform"}),
    ("fedsam", {"weights": "examples"}),
    ("mimelite", {"weights": "examples"}),
    ("scaffold", {"control": "full_gradient"}),
    ("scaffold", {"correction": "after_step"}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_options_agree_in_all_runtimes(name, options):
    strategy, some = make_strategy(name, **options), {"name": "uniform", "size": 4}
    assert_agree(pair(strategy, cohort=some), rounds=2)
    serial, threads = (
        trace(make_simulation(strategy, cohort=some, runtime=runtime), 2)
        for runtime in ("serial", {"name": "threads", "workers": 2})
    )
    assert serial == threads


@pytest.mark.parametrize("name", ["feddc", "fedsam", "mimelite"])
def test_equal_weights_are_declared(name):
    reports = []
    make_simulation(make_strategy(name, weights="uniform")).round(reports.append)
    assert (
        {report.weight for report in reports} == {1.0} == {make_strategy(name, weights="uniform").max_weight(9, 5)}
    )


FP16, BY_STEP = {"precision": "fp16"}, {"lr_every": "step"}
MOMENTUM, DECAY, CLIP = {"momentum": 0.9}, {"weight_decay": 0.1}, {"clip_norm": 1.0}
TEACHER, NOISY = {"distillation": Distillation()}, {"noisy_labels": NoisyLabels()}
FULL, AFTER = {"control": "full_gradient"}, {"correction": "after_step"}


@pytest.mark.parametrize(
    ("name", "options", "recipe"),
    [
        *(("feddc", {}, recipe) for recipe in (MOMENTUM, {"optimizer": "adam"}, BY_STEP, FP16)),
        ("fedsam", {}, FP16),
        ("moon", {}, TEACHER),
        *(("mimelite", {}, recipe) for recipe in (FP16, TEACHER, NOISY)),
        *(("scaffold", {}, recipe) for recipe in (MOMENTUM, DECAY, CLIP)),
        *(("scaffold", FULL, recipe) for recipe in (FP16, TEACHER, NOISY)),
        *(("scaffold", AFTER, recipe) for recipe in (FP16, BY_STEP, {"optimizer": "adam"})),
        ("scaffold", FULL | AFTER, BY_STEP),
    ],
    ids=str,
)
def test_a_recipe_that_breaks_the_algorithm_is_refused_by_name(name, options, recipe):
    with pytest.raises(ConfigError, match=rf"^local\.{next(iter(recipe))}: {name}") as caught:
        make_simulation(make_strategy(name, **options), **recipe)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "recipe"),
    [*product([AFTER, FULL, FULL | AFTER], [MOMENTUM, DECAY, CLIP]), (FULL, BY_STEP)],
    ids=str,
)
def test_scaffold_takes_what_its_options_make_right(options, recipe):
    assert make_simulation(make_strategy("scaffold", **options), **recipe)


def test_moon_needs_a_head():
    convolutions = lambda: nn.Sequential(nn.Conv2d(1, CLASSES, 4), nn.Flatten())  # noqa: E731
    with pytest.raises(ConfigError, match=r"^model\.head: moon compares what enters the head"):
        make_simulation("moon", task=make_task(convolutions))
    make_simulation("moon", task=make_task(convolutions, head="0")).round()
