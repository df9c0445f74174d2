"""Laws of whole runs: one seed is one model, special cases are what they generalise, everyone learns."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import (
    CLASSES,
    PARTIAL,
    SIZES,
    close,
    cohort_for,
    conv_net,
    make_data,
    make_local,
    make_simulation,
    make_strategy,
    make_task,
    trace,
)
from covering import in_turn, sampled
from torch import nn
from torch.nn import functional as F

from fedsim import ConfigError, Task, Wrapper
from fedsim.data import AUGMENTATIONS, Dataset, FederatedData
from fedsim.federated.strategy import surveys
from fedsim.strategies import CATALOGUE
from fedsim.training.losses import LOSSES
from fedsim.training.recipe import Distillation, NoisyLabels

# One seed, one model

SAMPLE = {"name": "uniform", "size": 4}
WORKERS = (1, 2, 3)
THREADS = [{"name": "threads", "workers": workers} for workers in WORKERS]


@dataclass(frozen=True, kw_only=True)
class Halved(Wrapper):
    """Sends half of each message."""

    def client_update(self, server, client, local):
        update = super().client_update(server, client, local)
        return update._replace(message={name: value / 2 for name, value in update.message.items()})


@pytest.fixture(scope="module", params=list(CATALOGUE))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def reference(name):
    """What each strategy does in the serial runtime, once."""
    return trace(make_simulation(name, cohort=cohort_for(name, SAMPLE)))


def test_runtimes_agree(name, reference):
    workers = WORKERS[list(CATALOGUE).index(name) % len(WORKERS)]
    runtime = {"name": "threads", "workers": workers}
    assert trace(make_simulation(name, cohort=cohort_for(name, SAMPLE), runtime=runtime)) == reference


@pytest.mark.slow
@pytest.mark.parametrize("runtime", THREADS, ids=lambda spec: f"threads-{spec['workers']}")
def test_runtimes_agree_with_any_number_of_workers(name, reference, runtime):
    assert trace(make_simulation(name, cohort=cohort_for(name, SAMPLE), runtime=runtime)) == reference


def test_a_run_repeats_itself_whatever_others_draw_and_compute_with(name, reference):
    torch.set_num_threads(2)
    simulation = make_simulation(name, cohort=cohort_for(name, SAMPLE))
    for expected in reference[:2]:
        torch.manual_seed(expected["round"])
        np.random.seed(expected["round"])  # noqa: NPY002 - which is what must not matter
        assert trace(simulation, rounds=1) == [expected]


def test_another_seed_is_another_model(name, reference):
    (other,) = trace(make_simulation(name, cohort=cohort_for(name, SAMPLE), seed=1), rounds=1)
    assert other["fingerprint"] not in {record["fingerprint"] for record in reference}


def test_a_wrapper_that_does_nothing_changes_nothing(name, reference):
    wrapped = make_simulation(Wrapper(inner=make_strategy(name)), cohort=cohort_for(name, SAMPLE))
    assert trace(wrapped, rounds=2) == reference[:2]


def test_a_wrapper_agrees_in_all_runtimes(name):
    wrapped = Halved(inner=make_strategy(name))
    runs = [make_simulation(wrapped, runtime=runtime) for runtime in ("serial", THREADS[2])]
    assert trace(runs[0], rounds=2) == trace(runs[1], rounds=2)


def augmentations(*names):
    return [AUGMENTATIONS.bind({"name": name}) for name in names]


RECIPES = {
    "momentum": {"momentum": 0.9, "nesterov": True, "epochs": 2, "weight_decay": 1e-3},
    "adam": {"optimizer": "adam", "epochs": 2},
    "clip": {"clip_norm": 0.1, "batch_size": "full"},
    "fp16": {"precision": "fp16", "loss_scale": 2.0**24, "epochs": 2},
    "bf16": {"precision": "bf16"},
    "channels_last": {"channels_last": True},
    "steps": {"steps": 5},
    "augment": {
        "augment": augmentations("random_crop", "flip", "rotation", "cutout", "random_resized_crop", "mixup")
    },
    "cutmix": {"augment": augmentations("cutmix"), "accumulate": 2, "precision": "bf16"},
    "lars": {"optimizer": "lars", "weight_decay": 1e-3, "decay": "weights", "momentum": 0.9},
    "by step": {"lr_every": "step", "warmup": 1, "lr_scaling": "sqrt", "epochs": 2},
    "loss": {"label_loss": LOSSES.bind({"name": "cross_entropy", "smoothing": 0.1}), "class_weights": "balanced"},
    "oversample": {"oversample": True, "label_loss": LOSSES.bind("hinge")},
    "distillation": {"distillation": Distillation(), "epochs": 2},
    "noisy labels": {"noisy_labels": NoisyLabels(start=2)},
}


TWO = ["fedprox", "fedbn"]  # one that computes its own loss, and one that has the recipe's


@pytest.mark.parametrize(("recipe", "strategy"), sampled(in_turn(RECIPES, TWO), RECIPES, TWO))
def test_runtimes_agree_on_every_recipe(recipe, strategy):
    runs = [make_simulation(strategy, cohort=SAMPLE, runtime=r, **RECIPES[recipe]) for r in ("serial", THREADS[1])]
    assert trace(runs[0]) == trace(runs[1])


def test_intra_op_threads_of_the_caller_do_not_show():
    """Sums over 50,000 numbers are cut in as many parts as there are threads."""
    task = make_task(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 800), nn.Linear(800, CLASSES)), shape=(1, 8, 8)
    )
    data = make_data(shape=(1, 8, 8))

    def run(threads, runtime):
        torch.set_num_threads(threads)
        strategy = make_strategy("fedprox", mu=0.5)
        return trace(make_simulation(strategy, task=task, data=data, runtime=runtime, clip_norm=0.1), rounds=2)

    assert run(1, "serial") == run(4, "serial") == run(3, THREADS[1])


@pytest.mark.parametrize("name", PARTIAL)
def test_who_else_takes_part_does_not_show(name):
    """A client's loss, message and state depend on the server's state and its own, on nobody else."""
    if surveys(make_strategy(name)):
        pytest.skip("its clients are sent what all have answered")
    few = {"name": "fixed", "clients": [3, 4, 5][: max(make_strategy(name).min_clients, 1)]}
    alone, among = (make_simulation(name, cohort=c) for c in (few, "all"))
    reports = []
    alone.round(reports.append)
    among.round(reports.append)
    mine, *_, again = (r._replace(seconds=0, client={}) for r in reports if r.client_id == 3)
    assert mine == again
    assert _bytes(alone.clients.get(3, {})) == _bytes(among.clients.get(3, {}))


def _bytes(state):
    return {key: value.numpy().tobytes() for key, value in state.items()}


# Reductions


def plain_net():
    """No dropout and no batch norm: nothing depends on how examples are put together."""
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, CLASSES))


def models(strategy="fedavg", rounds=3, **settings):
    """(P,) after each round, in float64."""
    simulation = make_simulation(strategy, task=make_task(plain_net, dtype=torch.float64), **settings)
    models = []
    for _ in range(rounds):
        simulation.round()
        models.append(simulation.server["model"])
    return models


@pytest.mark.parametrize("recipe", [{}, {"momentum": 0.9}, {"optimizer": "adam"}], ids=str)
def test_fedprox_without_mu_is_fedavg(recipe):
    prox = make_simulation(make_strategy("fedprox", mu=0), **recipe)
    assert trace(prox) == trace(make_simulation("fedavg", **recipe))


@pytest.mark.parametrize("batch_size", [4, "full"])
def test_fedavg_of_one_full_step_is_fedsgd(batch_size):
    fedavg, fedsgd = models("fedavg", batch_size="full"), models("fedsgd", batch_size=batch_size)
    close(fedavg, fedsgd)


def test_fedsgd_with_everyone_is_gradient_descent():
    task, data = make_task(plain_net, dtype=torch.float64), make_data(dtype=torch.float64)
    x, y = data.batch(torch.arange(sum(SIZES)))
    network = task.network
    for model in models("fedsgd", lr=0.3):
        network.zero_grad()
        F.cross_entropy(network(x), y).backward()
        with torch.no_grad():
            for w in network.parameters():
                w -= 0.3 * w.grad
        close(model, nn.utils.parameters_to_vector(network.parameters()).detach(), rtol=1e-11)


def test_population_average_of_everyone_is_the_cohort_average():
    population = make_simulation(make_strategy("fedavg", average="population"))
    assert trace(population) == trace(make_simulation("fedavg"))


def test_population_average_of_some_lets_the_global_model_stand_in():
    """Sum over all K of n_k / n w_k, with w_k = w where k did not train (McMahan 2017, Algorithm 1)."""
    some, n = [1, 3], sum(SIZES)
    fixed = {"name": "fixed", "clients": some}
    start = make_task(plain_net, dtype=torch.float64).initial_model
    w = {k: models(cohort={"name": "fixed", "clients": [k]}, rounds=1)[0] for k in some}
    expected = sum((size / n) * w.get(k, start) for k, size in enumerate(SIZES))
    close(models(make_strategy("fedavg", average="population"), cohort=fixed, rounds=1)[0], expected)


@pytest.mark.parametrize("cohort", ["all", SAMPLE], ids=["all", "some"])
def test_scaffold_conserves_control(cohort):
    """The server's c is the mean of all clients' c_k, those not seen so far at 0."""
    simulation = make_simulation("scaffold", task=make_task(dtype=torch.float64), cohort=cohort)
    for _ in range(3):
        simulation.round()
        c_k = torch.stack([state["c"] for state in simulation.clients.values()])
        assert c_k.norm() > 0
        close(simulation.server["c"], c_k.sum(0) / len(SIZES))


def test_fedbn_keeps_normalisation_at_the_clients():
    simulation = make_simulation("fedbn")
    for _ in range(2):
        simulation.round()
    moved = simulation.server["model"] != simulation.task.initial_model
    private = simulation.task.layout.mask(lambda name: name.startswith("bn1"))
    assert moved[~private].any()
    assert not moved[private].any()
    assert torch.equal(simulation.server["buffers"], simulation.task.initial_buffers)
    own = [torch.cat([state["private"], state["buffers"]]) for state in simulation.clients.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(own) for b in own[:i])


def test_private_layers_need_no_statistics():
    """FedBN with layers that normalise and keep no statistics, through rounds in which clients come again."""
    norm = make_task(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), NamedNorm(), nn.Linear(8, CLASSES))
    )
    simulation = make_simulation("fedbn", task=norm)
    trace(simulation)
    assert {len(state["private"]) for state in simulation.clients.values()} == {16}


class NamedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x)


def test_fedbn_refuses_a_network_without_private_layers():
    with pytest.raises(ConfigError, match=r"strategy\.private"):
        make_simulation("fedbn", task=make_task(plain_net))


# Rounds by hand: F_k(w) = mean of (w - a)^2 / 2 over the client's numbers a, so its gradient is w - mean a.

NUMBERS = ([1.0, 3.0, 5.0], [-2.0])
MEANS, COUNTS = np.array([3.0, -2.0]), np.array([3, 1])
LR, STEPS = 0.25, 2


class Point(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5]))

    def forward(self, a):
        return self.w - a


class Quadratic(Task):
    def losses(self, logits, y):
        return logits.squeeze(1).square() / 2


def quadratic(strategy, rounds):
    """The server's state after each round of two full-batch steps at two clients."""
    a = torch.tensor([[value] for numbers in NUMBERS for value in numbers])
    zeros = torch.zeros(len(a), dtype=torch.int64)
    owners = np.repeat(np.arange(2), COUNTS)
    data = FederatedData(Dataset(a, zeros, a, zeros, 1), owners, clients=2, dtype=torch.float64)
    task = Quadratic(Point().double(), (1,), 1)
    simulation = make_simulation(strategy, task=task, data=data, lr=LR, epochs=STEPS, batch_size="full")
    states = []
    for _ in range(rounds):
        simulation.round()
        states.append({name: value.item() for name, value in simulation.server.items() if value.numel()})
    return states


def descend(w, gradient):
    """(2,) what each client has after its steps."""
    y = np.array([w, w])
    for _ in range(STEPS):
        y = y - LR * gradient(y)
    return y


def test_fedavg_by_hand():
    w = 0.5
    for server in quadratic("fedavg", rounds=3):
        w = COUNTS / 4 @ descend(w, lambda y: y - MEANS)
        assert server["model"] == pytest.approx(w, rel=1e-12)


def test_fedprox_by_hand():
    w, mu = 0.5, 0.3
    for server in quadratic(make_strategy("fedprox", mu=mu), rounds=3):
        x = w
        w = COUNTS / 4 @ descend(x, lambda y, x=x: y - MEANS + mu * (y - x))
        assert server["model"] == pytest.approx(w, rel=1e-12)


def test_scaffold_by_hand():
    x, c, c_k = 0.5, 0.0, np.zeros(2)
    for server in quadratic("scaffold", rounds=3):
        y = descend(x, lambda y, c=c, c_k=c_k: y - MEANS - c_k + c)
        c_k = c_k - c + (x - y) / (STEPS * LR)
        x, c = y.mean(), c_k.mean()
        assert (server["model"], server["c"]) == pytest.approx((x, c), rel=1e-12)


@pytest.mark.parametrize("rule", ["fedadam", "fedyogi", "fedadagrad"])
def test_adaptive_servers_by_hand(rule):
    """Reddi 2021, Algorithm 2, over rounds: v starts at tau^2, m at 0."""
    eta, tau, beta2 = 0.1, 0.05, 0.7
    beta1 = 0.0 if rule == "fedadagrad" else 0.6
    x, m, v = 0.5, 0.0, tau**2
    for server in quadratic(make_strategy(rule, server_lr=eta, tau=tau, beta1=beta1, beta2=beta2), rounds=3):
        delta = COUNTS / 4 @ descend(x, lambda y: y - MEANS) - x
        m = beta1 * m + (1 - beta1) * delta
        v = {
            "fedadam": beta2 * v + (1 - beta2) * delta**2,
            "fedyogi": v - (1 - beta2) * delta**2 * np.sign(v - delta**2),
            "fedadagrad": v + delta**2,
        }[rule]
        x += eta * m / (v**0.5 + tau)
        assert (server["model"], server["m"], server["v"]) == pytest.approx((x, m, v), rel=1e-12)


def test_train_loss_is_the_mean_over_all_examples_seen():
    task, data = make_task(plain_net, dtype=torch.float64), make_data(dtype=torch.float64)
    x, y = data.batch(torch.arange(sum(SIZES)))
    loss = make_simulation("fedavg", task=task, data=data, batch_size="full").round().train_loss
    assert loss == pytest.approx(F.cross_entropy(task.network(x), y).item(), rel=1e-12)


def test_evaluation_is_the_mean_over_all_examples():
    simulation = make_simulation("fedavg", task=make_task(dtype=torch.float64))
    simulation.round()
    network, data = simulation.task.network, simulation.data
    network.load_state_dict(simulation.task.state_dict(simulation.server))
    x, y = data.test_batch(torch.arange(data.num_test))
    with torch.no_grad():
        logits = network.eval()(x)
    for batch_size in (1, 7, 500):
        found = simulation.evaluate(batch_size)
        assert found.loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-12)
        assert found.accuracy == (logits.argmax(1) == y).double().mean().item()


def test_a_client_without_a_model_of_its_own_is_tested_on_the_global_one():
    simulation = make_simulation("fedavg", task=make_task(dtype=torch.float64), cohort=SAMPLE)
    simulation.round()
    local = make_local(simulation.task, client=3, batch_size=5)
    local.replica.begin_client(simulation.server["buffers"], seed=0)
    assert simulation.evaluate_clients([3])[3].loss == pytest.approx(
        local.loss(simulation.server["model"]).item(), rel=1e-12
    )


# Everyone learns


def test_everyone_learns(name):
    """The loss, of each client's own model on its own examples, falls below half of what it was."""
    task = make_task(lambda: conv_net(dropout=0.1))
    simulation = make_simulation(name, task=task, data=make_data([30, 40, 50], noise=0.3, public=30), lr=0.1)
    before = own_loss(simulation)
    for _ in range(12):
        simulation.round()
    assert own_loss(simulation) < before / 2


def own_loss(simulation):
    return np.mean([result.loss for result in simulation.evaluate_clients().values()])
