"""Laws of the strategies that differ from FedAvg at the server: what they reduce to, and rounds by hand.

F_k(w) = mean of (w - a)^2 / 2 over the client's numbers a, in float64, unless a test says otherwise.
"""

from dataclasses import dataclass, field
from math import fsum

import numpy as np
import pytest
import torch
from conftest import SIZES, close, make_data, make_local, make_simulation, make_strategy, make_task
from hypothesis import given
from hypothesis import strategies as st
from test_laws import Point, Quadratic, plain_net

from fedsim import ConfigError, Wrapper
from fedsim.data import Dataset, FederatedData
from fedsim.strategies.fair.afl import nearest_on_simplex
from fedsim.training.schedules import SCHEDULES
from fedsim.types import form_of

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
ENDED = SCHEDULES.bind({"name": "cosine", "rounds": 1})  # a learning rate of 0 after the first round


def quadratic(strategy, numbers, *, start=0.5, **recipe):
    """A federation of clients with these numbers, from `start`; a step takes one number, so that tau_k = n_k."""
    a = torch.tensor([[value] for own in numbers for value in own])
    zeros = torch.zeros(len(a), dtype=torch.int64)
    owners = np.repeat(np.arange(len(numbers)), [len(own) for own in numbers])
    data = FederatedData(Dataset(a, zeros, a, zeros, 1), owners, clients=len(numbers), dtype=torch.float64)
    network = Point().double()
    network.w.data.fill_(start)
    return make_simulation(strategy, task=Quadratic(network, (1,), 1), data=data, **{"batch_size": 1} | recipe)


def after(simulation, rounds=1):
    """The server's numbers after so many rounds."""
    for _ in range(rounds):
        simulation.round()
    found = {name: value.tolist() for name, value in simulation.server.items() if name != "buffers"}
    return {name: value[0] if name == "model" else value for name, value in found.items()}


def vectors(strategy, rounds=3, dtype=torch.float64, **settings):
    """(P,) the model of a small network after each round."""
    simulation = make_simulation(strategy, task=make_task(plain_net, dtype=dtype), **settings)
    return [(simulation.round(), simulation.server["model"])[1] for _ in range(rounds)]


def same(one, other, dtype=torch.float64):
    for a, b in zip(one, other, strict=True):
        assert (a - b).norm() <= TOLERANCE[dtype] * b.norm()


@dataclass(frozen=True, kw_only=True)
class Uniform(Wrapper):
    """All clients with equal weights."""

    def client_update(self, server, client, local):
        return super().client_update(server, client, local)._replace(weight=1.0)

    def max_weight(self, num_examples, num_steps):
        return 1.0


def refused(key, strategy, **recipe):
    with pytest.raises(ConfigError, match=rf"^{key}: "):
        make_simulation(strategy, **recipe)


# FedNova


def descend(x, gradient, tau, eta, rho=0.0, mu=0.0):
    """A client's model after tau steps with momentum, and a proximal term."""
    y, v = x, 0.0
    for _ in range(tau):
        v = rho * v + gradient(y) + mu * (y - x)
        y -= eta * v
    return y


def norm(tau, eta, rho=0.0, mu=0.0):
    """|a_i|_1: how far tau gradients of 1 lead, in units of eta."""
    return -descend(0.0, lambda y: 1.0, tau, eta, rho, mu) / eta


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("settings", "recipe"), [({}, {}), ({}, {"momentum": 0.9}), ({"mu": 0.4}, {}), ({"tau_eff": "steps"}, {})]
)
def test_fednova_of_equal_steps_is_fedavg(settings, recipe, dtype):
    """With mu, it is FedProx."""
    other = make_strategy("fedprox", mu=settings["mu"]) if "mu" in settings else "fedavg"
    recipe |= {"steps": 4, "dtype": dtype}
    same(vectors(make_strategy("fednova", **settings), **recipe), vectors(other, **recipe), dtype)


@pytest.mark.parametrize(("tau", "expected"), [(1, 1.0), (10, 41.381060), (78, 690.024275), (780, 7710.0)])
def test_the_coefficients_of_momentum_are_those_of_the_paper(tau, expected):
    task, strategy = make_task(plain_net), make_strategy("fednova")
    local = make_local(task, make_data([1]), steps=tau, momentum=0.9, lr=1e-3)
    update = strategy.client_update({"model": task.initial_model}, {}, local)
    assert update.message["work"].item() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("eta_mu", [0.9, 1e-3, 1e-12])
@pytest.mark.parametrize("tau", [1, 7, 500])
def test_the_coefficients_of_a_proximal_term_are_a_geometric_sum(tau, eta_mu):
    local = make_local(make_task(plain_net), make_data([1]), steps=tau, lr=0.5)
    expected = fsum((1 - eta_mu) ** s for s in range(tau))
    found = make_strategy("fednova", mu=2 * eta_mu).coefficients(local)
    assert found.item() == pytest.approx(expected, rel=1e-12)


CASES = [({}, {}), ({}, {"momentum": 0.8}), ({"mu": 1.5}, {}), ({"mu": 1.5, "tau_eff": "steps"}, {})]


@pytest.mark.parametrize(("settings", "recipe"), CASES)
def test_fednova_by_hand(settings, recipe):
    """Three steps towards 3 by one client, one towards -2 by the other."""
    simulation = quadratic(make_strategy("fednova", **settings), [[3.0] * 3, [-2.0]], lr=0.25, **recipe)
    x, p, tau = 0.5, np.array([3, 1]) / 4, (3, 1)
    about = {"eta": 0.25, "rho": recipe.get("momentum", 0.0), "mu": settings.get("mu", 0.0)}
    for _ in range(3):
        y = np.array([descend(x, lambda w, c=c: w - c, t, **about) for c, t in zip((3.0, -2.0), tau, strict=True)])
        a = np.array([norm(t, **about) for t in tau])
        d = (x - y) / (0.25 * a)
        x -= (p @ tau if "tau_eff" in settings else p @ a) * 0.25 * (p @ d)
        assert after(simulation)["model"] == pytest.approx(x, rel=1e-12)


@pytest.mark.parametrize(
    ("strategy", "eta", "expected"),
    [
        *(("fednova", *each) for each in [(0.1, 0.316), (0.01, 0.478), (0.001, 0.498)]),
        *(("fedavg", *each) for each in [(0.1, 0.822), (0.01, 0.901), (0.001, 0.908)]),
    ],
)
def test_unequal_steps_pull_fedavg_to_who_takes_many_and_fednova_less(strategy, eta, expected):
    """The closed form of the fixed point: half of the examples at 0 with 2 steps a client, half at 1 with 20."""
    c, tau = np.array([0.0, 1.0]), np.array([2, 20])
    w = 0.5 * (1 - (1 - eta) ** tau) / (tau if strategy == "fednova" else 1)
    fixed = w @ c / w.sum()
    assert fixed == pytest.approx(expected, abs=5e-4)
    clients = [[0.0, 0.0]] * 10 + [[1.0] * 20]
    assert after(quadratic(strategy, clients, start=fixed, lr=eta), 2)["model"] == pytest.approx(fixed, rel=1e-12)
    nearer = after(quadratic(strategy, clients, start=0.0, lr=eta))["model"]
    assert 0 < nearer < fixed
    if eta == 0.1:
        found = after(quadratic(strategy, clients, start=0.0, lr=eta), 40)["model"]
        assert found == pytest.approx(fixed, rel=1e-9)


@pytest.mark.parametrize("strategy", [("fednova", {"mu": 0.5}), ("qfedavg", {"q": 3.0})], ids=str)
def test_a_learning_rate_of_0_moves_nothing(strategy):
    name, settings = strategy
    simulation = quadratic(make_strategy(name, **settings), [[3.0] * 3, [-2.0]], schedule=ENDED)
    assert after(simulation, 1) == after(simulation, 2)


def test_fednova_refuses_what_its_coefficients_do_not_cover():
    for key, recipe in (
        ("optimizer", {"optimizer": "adam"}),
        ("optimizer", {"optimizer": "lars"}),
        ("nesterov", {"momentum": 0.9, "nesterov": True}),
        ("lr_every", {"lr_every": "step"}),
        ("precision", {"precision": "fp16"}),
    ):
        refused(rf"local\.{key}", "fednova", **recipe)
    refused(r"strategy\.mu", make_strategy("fednova", mu=0.1), momentum=0.9)
    refused(r"strategy\.mu", make_strategy("fednova", mu=11.0), lr=0.1)


# FedAvgM and FedOpt


@pytest.mark.parametrize("nesterov", [False, True])
def test_fedavgm_by_hand(nesterov):
    settings = {"beta": 0.7, "server_lr": 0.6, "nesterov": nesterov}
    simulation = quadratic(make_strategy("fedavgm", **settings), [[3.0] * 3, [-2.0]], lr=0.25)
    x, v = 0.5, 0.0
    for _ in range(4):
        y = [descend(x, lambda w: w - 3, 3, 0.25), descend(x, lambda w: w + 2, 1, 0.25)]
        delta = 0.75 * y[0] + 0.25 * y[1] - x
        v = 0.7 * v + delta
        x += 0.6 * (delta + 0.7 * v if nesterov else v)
        found = after(simulation)
        assert [found["model"], *found["v"]] == pytest.approx([x, v], rel=1e-12)


def test_fedavgm_without_momentum_is_fedavg_to_the_bit():
    for a, b in zip(vectors(make_strategy("fedavgm", beta=0.0)), vectors("fedavg"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("nesterov", [False, True])
def test_fedavgm_is_fedopt_with_sgd(nesterov):
    fedopt = {"optimizer": "sgd", "weights": "examples", "momentum": 0.9}
    for server_lr in (1.0, 0.3):
        both = {"server_lr": server_lr, "nesterov": nesterov}
        same(
            vectors(make_strategy("fedavgm", beta=0.9, **both)), vectors(make_strategy("fedopt", **fedopt, **both))
        )


def test_fedopt_with_plain_sgd_is_fedavg():
    sgd = {"optimizer": "sgd", "server_lr": 1.0}
    same(vectors(make_strategy("fedopt", **sgd, weights="examples")), vectors("fedavg"))
    same(vectors(make_strategy("fedopt", **sgd)), vectors(Uniform(inner=make_strategy("fedavg"))))


RULES = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1}),
    "adagrad": (torch.optim.Adagrad, {"eps": 1e-4, "weight_decay": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"alpha": 0.9, "eps": 1e-4, "momentum": 0.5, "weight_decay": 0.1}),
}


@dataclass(frozen=True, kw_only=True)
class Recorded(Wrapper):
    """Keeps the mean updates."""

    seen: list = field(default_factory=list)

    def server_update(self, server, mean, info):
        self.seen.append(mean["delta"].clone())
        return super().server_update(server, mean, info)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "all options"])
@pytest.mark.parametrize("name", RULES)
def test_fedopt_is_torchs_optimiser_on_the_pseudo_gradient(name, plain, dtype):
    """Over rounds of a federation, beside one optimiser that is never interrupted."""
    rule, options = RULES[name]
    options = {"weight_decay": 0.0} if plain else options
    strategy = Recorded(inner=make_strategy("fedopt", optimizer=name, server_lr=0.05, **options))
    simulation = make_simulation(strategy, task=make_task(plain_net, dtype=dtype))
    w, form = simulation.server["model"].clone().requires_grad_(), form_of(simulation.server)
    optimizer = rule([w], lr=0.05, **({} if name == "sgd" else {"eps": strategy.inner.eps}) | options)
    for _ in range(5):
        simulation.round()
        w.grad = -strategy.seen[-1]
        optimizer.step()
        same([simulation.server["model"]], [w.detach()], dtype)
        assert form_of(simulation.server) == form


@pytest.mark.parametrize("weights", ["uniform", "examples"])
def test_fedopt_by_hand(weights):
    """Adam, with the bias of m and v corrected, on the mean that Algorithm 1 takes or on the weighted one."""
    strategy = make_strategy("fedopt", weights=weights, server_lr=0.1, betas=[0.6, 0.7], eps=0.05)
    simulation = quadratic(strategy, [[3.0] * 3, [-2.0]], lr=0.25)
    x, m, v, p = 0.5, 0.0, 0.0, {"uniform": 0.5, "examples": 0.75}[weights]
    for t in range(1, 5):
        g = x - p * descend(x, lambda w: w - 3, 3, 0.25) - (1 - p) * descend(x, lambda w: w + 2, 1, 0.25)
        m, v = 0.6 * m + 0.4 * g, 0.7 * v + 0.3 * g**2
        x -= 0.1 * m / (1 - 0.6**t) / ((v / (1 - 0.7**t)) ** 0.5 + 0.05)
        assert after(simulation)["model"] == pytest.approx(x, rel=1e-12)


def test_the_first_step_of_torchs_adam_is_not_reddis():
    torchs = {"betas": [0.9, 0.99], "eps": 1e-3}
    for name, more, expected in (("fedopt", torchs, 0.00990), ("fedadam", {}, 0.00905)):
        strategy = make_strategy(name, server_lr=0.01, **more)
        server = strategy.init_server(torch.zeros(1, dtype=torch.float64))
        moved = strategy.server_update(server, {"delta": torch.full((1,), 0.1, dtype=torch.float64)}, None)
        assert moved["model"].item() == pytest.approx(expected, abs=5e-6)


def test_options_of_another_rule_are_refused():
    for name, wrong in (
        ("sgd", "betas eps alpha"),
        ("adam", "momentum alpha"),
        ("adamw", "momentum nesterov"),
        ("adagrad", "betas momentum"),
        ("rmsprop", "nesterov betas"),
    ):
        values = {"betas": [0.5, 0.5], "eps": 0.1, "alpha": 0.5, "momentum": 0.5, "nesterov": True}
        for option in wrong.split():
            refused(rf"strategy\.{option}", make_strategy("fedopt", optimizer=name, **{option: values[option]}))
    refused(r"strategy\.nesterov", make_strategy("fedopt", optimizer="sgd", nesterov=True))
    refused(r"strategy\.nesterov", make_strategy("fedavgm", beta=0.0, nesterov=True))


# q-FedAvg


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_qfedavg_with_q_0_is_the_unweighted_mean(dtype):
    mean = vectors(Uniform(inner=make_strategy("fedavg")), dtype=dtype, momentum=0.5)
    same(vectors(make_strategy("qfedavg", q=0), dtype=dtype, momentum=0.5), mean, dtype)
    weighted = vectors(make_strategy("qfedavg", q=0, weights="examples"), dtype=dtype)
    same(weighted, vectors("fedavg", dtype=dtype), dtype)


@pytest.mark.parametrize("weights", ["uniform", "examples"])
@pytest.mark.parametrize("q", [0.3, 1.0, 4.0])
def test_qfedavg_by_hand(q, weights):
    """Algorithm 2, with F_k of the received model over all of the client's numbers."""
    numbers = [[1.0, 3.0, 5.0], [-2.0]]
    strategy = make_strategy("qfedavg", q=q, weights=weights)
    simulation = quadratic(strategy, numbers, lr=0.25, batch_size="full", epochs=2)
    w, eta, p = 0.5, 0.25, {"uniform": (1, 1), "examples": (3, 1)}[weights]
    for _ in range(3):
        deltas, hs = 0.0, 0.0
        for own, weight in zip(map(np.array, numbers), p, strict=True):
            f = ((w - own) ** 2).mean() / 2 + 1e-10
            dw = (w - descend(w, lambda y, own=own: y - own.mean(), 2, eta)) / eta
            deltas += weight * f**q * dw
            hs += weight * (q * f ** (q - 1) * dw**2 + f**q / eta)
        w -= deltas / hs
        assert after(simulation)["model"] == pytest.approx(w, rel=1e-12)


@pytest.mark.parametrize("q", [0.0, 1.0, 5.0])
def test_qfedavg_stands_still_where_the_powers_of_the_losses_are_least(q):
    """Three clients at 0, one at 1: 3 w^(2q + 1) = (1 - w)^(2q + 1), from 1/4 towards the middle."""
    ratio = 3 ** (-1 / (2 * q + 1))
    least = ratio / (1 + ratio)
    clients = [[0.0], [0.0], [0.0], [1.0]]
    strategy = make_strategy("qfedavg", q=q)
    assert after(quadratic(strategy, clients, start=least, lr=0.1), 2)["model"] == pytest.approx(least, rel=1e-8)
    assert after(quadratic(strategy, clients, start=0.9, lr=0.5), 60)["model"] == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize("q", [0.0, 0.1, 1.0, 3.0])
def test_qfedavg_survives_clients_without_a_loss(q):
    strategy = make_strategy("qfedavg", q=q)
    assert after(quadratic(strategy, [[0.5], [0.5]], lr=0.1), 2)["model"] == 0.5
    assert 0.5 < after(quadratic(strategy, [[0.5], [1.0]], lr=0.1), 2)["model"] < 1


def test_qfedavg_refuses_learning_rates_that_are_no_1_over_l():
    refused(r"local\.optimizer", "qfedavg", optimizer="adam")
    refused(r"local\.lr_every", "qfedavg", lr_every="step")


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "moon", "fedbn", "fedrep", "fedbabu", "fedopt", "qfedavg"])
def test_weights_by_examples_are_declared(name):
    for weights, expected in (("uniform", [1.0] * len(SIZES)), ("examples", [*SIZES])):
        reports, simulation = [], make_simulation(make_strategy(name, weights=weights))
        simulation.round(reports.append)
        assert [report.weight for report in reports] == expected
        assert [simulation.work.bounds(n, torch.float32).weight for n in SIZES] == expected


# AFL


def on_simplex(v):
    """By bisection: max(v - t, 0) has the sum 1 for one t."""
    low, high = min(v) - 1.0, max(v)
    for _ in range(200):
        t = (low + high) / 2
        low, high = (t, high) if np.maximum(v - t, 0).sum() > 1 else (low, t)
    return np.maximum(v - t, 0)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=7))
def test_the_projection_is_the_nearest_point_of_the_simplex(v):
    found = nearest_on_simplex(torch.tensor(v, dtype=torch.float64))
    close(found, torch.from_numpy(on_simplex(np.array(v))), rtol=0, atol=1e-9)


def test_afl_by_hand():
    """The weights rise with the losses of the received model; one of them reaches 0."""
    clients, eta, gamma = [[3.0, 3.0], [-2.0], [0.625]], 0.25, 0.1
    simulation = quadratic(make_strategy("afl", lr_lambda=gamma), clients, lr=eta)
    x, weights, zeros = 0.5, np.full(3, 1 / 3), 0
    for _ in range(4):
        y = [descend(x, lambda w, own=own: w - own[0], len(own), eta) for own in clients]
        losses = np.array([(x - own[0]) ** 2 / 2 for own in clients])
        x, weights = x + weights @ (np.array(y) - x), on_simplex(weights + gamma * losses)
        zeros += int((weights == 0).sum())
        found = after(simulation)
        assert found["model"] == pytest.approx(x, rel=1e-9)
        assert found["lambda"] == pytest.approx(weights, rel=1e-9)
    assert zeros


def test_afl_finds_the_model_whose_worst_client_is_best():
    """Whoever has more examples: half way between 0 and 1, where FedAvg goes to 1/4."""
    clients = [[0.0] * 3, [1.0]]
    afl = quadratic(make_strategy("afl", lr_lambda=0.5), clients, start=0.0, lr=0.1, steps=1)
    found = after(afl, 250)
    assert [found["model"], *found["lambda"]] == pytest.approx([0.5, 0.5, 0.5], abs=1e-3)
    assert after(quadratic("fedavg", clients, lr=0.1, steps=1), 150)["model"] == pytest.approx(0.25, abs=1e-3)


def test_afl_with_fixed_weights_is_the_unweighted_mean():
    same(
        vectors(make_strategy("afl", lr_lambda=0)),
        vectors(Uniform(inner=make_strategy("fedavg"))),
    )


def test_afl_needs_all_clients():
    with pytest.raises(ConfigError, match="AFL needs all clients, and a cohort has 4 clients"):
        make_simulation("afl", cohort={"name": "uniform", "size": 4})
