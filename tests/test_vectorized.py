"""Laws of the vectorized runtime: up to rounding, a batch of clients computes what each does alone."""

import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import (
    CLASSES,
    SIZES,
    close,
    conv_net,
    make_data,
    make_simulation,
    make_strategy,
    make_task,
    trace,
)
from covering import in_turn, sampled
from test_laws import RECIPES, TWO, augmentations, plain_net
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedsim import ConfigError, Update
from fedsim.errors import ClientError
from fedsim.federated.aggregate import WeightedMean
from fedsim.federated.client import Train
from fedsim.federated.runtime import Call
from fedsim.federated.simulation import Failures
from fedsim.runtimes.vectorized import Vectorized
from fedsim.runtimes.vectorized.compute import Client, client_jobs, compute, inputs, updates
from fedsim.runtimes.vectorized.graph import Graphs
from fedsim.strategies import CATALOGUE
from fedsim.strategies.averaging.fedavg import FedAvg
from fedsim.training.batched.cohort import Cohort, rounded_up
from fedsim.training.batched.objective import Network
from fedsim.types import Job


def pair(strategy="fedavg", network=conv_net, sizes=SIZES, chunk=4, conv="auto", dtype=torch.float64, **settings):
    """The same simulation in the serial runtime and in the vectorized one."""
    spec = {"name": "vectorized", "chunk": chunk, "conv": conv, "workers": 1}
    return [
        make_simulation(
            strategy,
            task=make_task(network, dtype=dtype),
            data=make_data(sizes, dtype=dtype, public=4),
            runtime=runtime,
            **settings,
        )
        for runtime in ("serial", spec)
    ]


def assert_agree(pair, rounds=3, near=close):
    """State of server and clients, losses and steps, round by round."""
    serial, vectorized = pair
    for _ in range(rounds):
        one, other = serial.round(), vectorized.round()
        near(vectorized.server, serial.server)
        near(dict(vectorized.clients.items()), dict(serial.clients.items()))
        if (other.train_loss, one.train_loss) != (None, None):
            near(torch.tensor(other.train_loss), torch.tensor(one.train_loss))
        assert (other.steps, other.bytes_up, other.cohort) == (one.steps, one.bytes_up, one.cohort)


CHUNKS = [1, 2, 4, "auto"]


@pytest.mark.parametrize(("strategy", "chunk"), sampled(in_turn(CATALOGUE, CHUNKS), CATALOGUE, CHUNKS))
def test_strategies_agree_with_serial(strategy, chunk):
    assert_agree(pair(strategy, chunk=chunk), rounds=2)


REFUSED = {"fp16": "precision", "cutmix": "accumulate", "noisy labels": "noisy_labels"}


CONDITIONED = {  # so that rounding stays what it is
    "adam": {"eps": 1e-3},
    "augment": {"augment": augmentations("random_crop", "flip", "rotation", "random_resized_crop", "mixup")},
}


BATCHED = [name for name in RECIPES if name not in {*REFUSED, "bf16"}]


@pytest.mark.parametrize(("name", "strategy"), sampled(in_turn(BATCHED, TWO), BATCHED, TWO))
def test_recipes_agree_with_serial(name, strategy):
    assert_agree(pair(strategy, **RECIPES[name] | CONDITIONED.get(name, {})), rounds=2)


@pytest.mark.parametrize(
    "recipe",
    [
        {"augment": augmentations("cutmix")},
        {"optimizer": "adamw", "eps": 1e-3, "weight_decay": 0.1, "decay": "weights"},
        {"momentum": 0.5, "weight_decay": 0.1, "decay": "weights"},
        {"class_weights": [1.0, 2.0, 3.0]},
    ],
    ids=lambda recipe: next(iter(recipe)),
)
def test_more_recipes_agree_with_serial(recipe):
    assert_agree(pair(**recipe), rounds=2)


@pytest.mark.parametrize(
    ("strategy", "recipe"),
    [
        ("fedavg", {"drop_last": True, "momentum": 0.5, "lr_every": "step", "warmup": 1}),
        ("fedavg", {"min_batch": 3, "oversample": True, "steps": 5}),
        ("fedsgd", {"drop_last": True}),
        ("scaffold", {"min_batch": 4, "epochs": 2}),
    ],
    ids=str,
)
def test_last_batches_agree_with_serial(strategy, recipe):
    """And threads compute the very bits of serial."""
    assert_agree(pair(strategy, **recipe), rounds=2)
    runs = [make_simulation(strategy, runtime=r, **recipe) for r in ("serial", {"name": "threads", "workers": 2})]
    assert trace(runs[0], 2) == trace(runs[1], 2)


@pytest.mark.parametrize("strategy", ["fedprox", "fedsgd"])
def test_bf16_is_near_serial(strategy):
    near = lambda a, b: torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)  # noqa: E731
    assert_agree(pair(strategy, dtype=torch.float32, precision="bf16"), rounds=1, near=near)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_batched_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=rf"local\.{REFUSED[name]}.*threads"):
        pair(**RECIPES[name])


def test_a_time_limit_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"failures\.time_limit.*threads"):
        pair(failures=Failures(time_limit=60))


@pytest.mark.parametrize("conv", ["im2col", "grouped"])
@pytest.mark.parametrize(
    "form", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "bias": False}, {"groups": 2}], ids=str
)
def test_convolutions_agree_with_serial(conv, form):
    def network():
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, (2, 1), **form), Mean())

    assert_agree(pair(network=network, conv=conv, sizes=(8, 5)), rounds=2)


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_step_that_a_client_sits_out_leaves_it_as_it_was(momentum):
    """Weights, momentum, statistics, counters and draws, where one client has 20 times the steps of another."""
    net = lambda: conv_net(bn_momentum=momentum)  # noqa: E731
    assert_agree(pair(network=net, sizes=(2, 40, 3, 41), batch_size=2, momentum=0.9), rounds=2)
    assert_agree(pair(network=net, sizes=(2, 30, 3), batch_size=2, optimizer="adam", eps=1e-3), rounds=1)


def test_rows_that_fill_a_batch_up_do_not_show():
    assert_agree(pair(sizes=(2, 3, 40), batch_size="full", epochs=3))


def test_bits_repeat():
    runs = [
        make_simulation(runtime={"name": "vectorized", "chunk": 3, "workers": w}, momentum=0.9) for w in (1, 1, 2)
    ]
    assert trace(runs[0]) == trace(runs[1]) == trace(runs[2])


@pytest.mark.parametrize("conv", ["im2col", "grouped"])
def test_one_step_of_shared_weights_is_one_large_batch(conv):
    """FedSGD: one product over all clients' examples a layer, and each client's own gradient."""
    serial, vectorized = pair("fedsgd", network=plain_net, sizes=(4, 4, 4), batch_size="full")
    server, work = vectorized.server, Train(vectorized.strategy, vectorized.recipe, 0)
    network = Network(vectorized.task, torch.device("cpu"), conv)
    with Forward() as seen:
        found = updates(network, vectorized.data, [Client(work, server, Job(k, 0, {})) for k in range(3)])
    assert seen.sizes == [12, 12]
    reports = []
    serial.aggregator = Kept()
    serial.round(reports.append)
    close([update.message["step"] for update in found], [serial.aggregator.messages[k]["step"] for k in range(3)])


class Kept(WeightedMean):
    """Remembers what each client sent."""

    def __init__(self):
        self.messages = {}

    def fold(self, updates, start=None):
        updates = list(updates)
        self.messages |= {client: message for client, message, _ in updates}
        return super().fold(updates, start)


class Forward(TorchDispatchMode):
    """Notes the number of examples in each forward product."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.sizes.append(len(args[0]))
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default) and len(self.sizes) < 2:
            self.sizes.append(len(args[-2]))
        return func(*args, **(kwargs or {}))


def test_a_client_that_diverges_is_that_client_s_failure():
    spec = {"name": "vectorized", "chunk": 3}
    runs = [make_simulation(Spoiled(), runtime=r, failures=Failures(policy="drop")) for r in ("serial", spec)]
    rounds = [run.round() for run in runs]
    assert set(rounds[0].failed) == set(rounds[1].failed) == {"3"}
    assert "not finite" in rounds[1].failed["3"]
    torch.testing.assert_close(runs[0].server, runs[1].server)
    with pytest.raises(ClientError, match=r"round 1, client 3: delta is not finite; lower local.lr"):
        make_simulation(Spoiled(), runtime=spec).round()


@dataclass(frozen=True, kw_only=True)
class Spoiled(FedAvg):
    """Client 3 sends nan."""

    def client_update(self, server, client, local):
        update = super().client_update(server, client, local)
        spoiled = torch.where(torch.as_tensor(local.client_id) == 3, float("nan"), update.message["delta"])
        return update._replace(message={"delta": spoiled})


def test_memory_that_runs_out_halves_the_chunk(monkeypatch):
    serial, vectorized = pair(chunk=6)
    true = Vectorized._updates

    def out(self, network, members):
        if len(members) > 3:
            raise torch.OutOfMemoryError("of this test")
        return true(self, network, members)

    monkeypatch.setattr(Vectorized, "_updates", out)
    with pytest.warns(UserWarning, match=r"runtime\.chunk: out of memory with 6 clients, continuing with 3"):
        vectorized.round()
    serial.round()
    close(vectorized.server, serial.server)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vectorized.round()


@dataclass(frozen=True, kw_only=True)
class Steps(FedAvg):
    """Steps through its batches itself."""

    def client_update(self, server, client, local):
        w = x = server["model"]
        for batch in local.batches():
            g, _ = local.gradient(w, batch)
            w = w - local.lr * g
        start, end = local.loss(x), local.loss(w)
        return Update({"delta": w - x}, weight=local.num_examples * (1 + (start - end).abs()))

    def max_weight(self, num_examples, num_steps):
        return 100 * num_examples


def test_a_strategy_that_steps_by_itself_agrees_with_serial():
    assert_agree(pair(Steps(), sizes=(8, 5, 8, 5, 3)))


@dataclass(frozen=True, kw_only=True)
class Branches(FedAvg):
    """Does what no batch can."""

    def client_update(self, server, client, local):
        update = super().client_update(server, client, local)
        return update._replace(weight=2.0) if update.message["delta"].norm() > 1 else update


class Mixes(nn.Module):
    """Has statistics of its batch that no batch norm keeps."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x):
        x = x.flatten(1)
        return self.fc((x - x.mean(0)) * 3)


class Asks(Mixes):
    def forward(self, x):
        z = self.fc(x.flatten(1))
        return z if z.sum() > 0 else 2 * z


class Draws(Mixes):
    def forward(self, x):
        z = self.fc(x.flatten(1))
        return z * torch.bernoulli(torch.full_like(z, 0.5))


@pytest.mark.parametrize(
    ("strategy", "network", "why"),
    [
        (
            Branches(),
            plain_net,
            "runtime.name: vectorized cannot batch this strategy and model: RuntimeError: it asks",
        ),
        ("fedavg", Asks, "runtime.name: vectorized cannot batch"),
        ("fedavg", Mixes, "runtime.name: vectorized computes another"),
        ("fedavg", Draws, "model: draws with bernoulli"),
    ],
)
def test_what_cannot_be_batched_is_refused_in_a_line(strategy, network, why):
    with pytest.raises(ConfigError) as caught:
        pair(strategy, network=network)
    assert str(caught.value).startswith(why)
    assert "threads" in str(caught.value)
    assert "\n" not in str(caught.value)


class Noisy(nn.Module):
    """Stochastic depth and noise as torchvision and many networks draw them."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x):
        x = F.dropout2d(x, 0.3, self.training)
        if self.training:
            x = x * torch.empty(len(x), 1, 1, 1, dtype=x.dtype).bernoulli_(0.8)
            x = x + 0.1 * torch.randn(x.shape, dtype=x.dtype)
        return self.fc(x.flatten(1))


def test_networks_that_draw_agree_with_serial():
    assert_agree(pair(network=Noisy))


def test_runs_together_are_the_runs_alone():
    """Seeds and learning rates as more rows of a batch; another strategy goes by itself."""
    task, data = make_task(dtype=torch.float64), make_data(dtype=torch.float64)
    settings = [("fedprox", 0, 0.05), ("fedprox", 1, 0.05), ("fedprox", 0, 0.1), ("scaffold", 0, 0.1)]
    runs = [make_simulation(s, task=task, data=data, seed=seed, lr=lr) for s, seed, lr in settings]
    runtime = Vectorized(task, data, chunk=4, workers=1, device="cpu")
    for run in runs:
        run.round()
    calls = [
        Call(
            Train(run.strategy, run.recipe, run.seed),
            {name: run.server[name] * (1 + 0.01 * i) for name in (*run.strategy.broadcast, "buffers")},
            [Job(k, 1, run.clients.get(k, run.initial_client)) for k in range(len(SIZES))],
            run.aggregator,
        )
        for i, run in enumerate(runs)
    ]
    together = runtime.run_many(calls)
    for run, call, results in zip(runs, calls, together, strict=True):
        expected = run.runtime.run(call.work, call.server, call.jobs, call.aggregator)
        mine, theirs = (_total(call.aggregator, parts) for parts in (results, expected))
        close(mine[0], theirs[0])
        assert [r.client_id for r in mine[1]] == [r.client_id for r in theirs[1]] == list(range(len(SIZES)))
        close([r.client for r in mine[1]], [r.client for r in theirs[1]])
        close(
            [torch.tensor(r.metrics["loss"]) for r in mine[1]],
            [torch.tensor(r.metrics["loss"]) for r in theirs[1]],
        )


def _total(aggregator, results):
    total, reports = aggregator.fold([]), []
    for partial, finished in results:
        total = aggregator.merge(total, partial)
        reports += finished
    return aggregator.result(total), sorted(reports, key=lambda report: report.client_id)


@pytest.mark.parametrize("sizes", [(5, 5, 5), (3, 13, 6)], ids=str)
def test_another_cohort_s_inputs_in_the_same_form_give_its_results(sizes):
    """What a CUDA graph relies on: all that differs between cohorts of a form is in named tensors."""
    task, data = make_task(plain_net, dtype=torch.float64), make_data((*sizes, *sizes), dtype=torch.float64)
    strategy = make_strategy("fedprox")
    simulation = make_simulation(strategy, task=task, data=data, momentum=0.5)
    work = Train(strategy, replace(simulation.recipe, schedule=lambda time: 1 / (1 + time)), 0)
    network, like = Network(task, torch.device("cpu"), "im2col"), task.initial_model
    first, second = (
        [Client(work, simulation.server, Job(k, number, {})) for k in clients]
        for number, clients in ((0, (0, 1, 2)), (3, (3, 4, 5)))
    )
    cohort, other = (Cohort(data, client_jobs(batch), like, static_shapes=True) for batch in (first, second))
    compute(network, work, cohort, *inputs(first, like.device))
    assert cohort.form() == other.form()
    cohort.copy_from(other)
    found = compute(network, work, cohort, *inputs(second, like.device))
    expected = compute(network, work, Cohort(data, client_jobs(second), like), *inputs(second, like.device))
    close(found.message, expected.message)
    close(found.metrics, expected.metrics)


class Replayed:
    """Stands in for a CUDA graph: computes again, from the same tensors and into the same."""

    def __init__(self, again):
        self.again, self.computed = again, again()

    def replay(self):
        for mine, new in zip(tree_leaves(self.computed), tree_leaves(self.again()), strict=True):
            mine.copy_(new)

    def pool(self):
        return None


@pytest.mark.parametrize(
    ("sizes", "network", "captured"),
    [((5, 5, 5), conv_net, 1), ((3, 13, 6), plain_net, 1), ((3, 13, 6), conv_net, 0)],
    ids=["even with dropout", "uneven", "uneven with dropout"],
)
def test_a_graph_is_recorded_once_and_gives_each_cohort_its_results(monkeypatch, sizes, network, captured):
    def recorded(network, work, cohort, pool, *given):
        graph = Replayed(lambda: compute(network, work, cohort, *given))
        return graph, graph.computed

    monkeypatch.setattr("fedsim.runtimes.vectorized.graph.record", recorded)
    task, data = make_task(network, dtype=torch.float64), make_data((*sizes, *sizes), dtype=torch.float64)
    simulation = make_simulation("fedprox", task=task, data=data, momentum=0.5)
    work = Train(simulation.strategy, simulation.recipe, 0)
    graphs = Graphs(Network(task, torch.device("cpu"), "im2col"), data)
    for number, clients in enumerate(((0, 1, 2), (3, 4, 5), (0, 1, 2), (3, 4, 5))):
        batch = [Client(work, simulation.server, Job(k, number, {})) for k in clients]
        expected = updates(graphs.network, data, batch)
        for one, other in zip(graphs(batch), expected, strict=True):
            close(one.message, other.message)
            close(one.metrics, other.metrics)
    assert len(graphs.graphs) == captured


def test_numbers_of_steps_are_rounded_to_few():
    assert [rounded_up(k) for k in (1, 3, 7, 8, 9, 60, 61, 100)] == [1, 3, 7, 8, 10, 64, 64, 112]
    assert all(k <= rounded_up(k) <= 1.34 * k for k in range(1, 1000))
