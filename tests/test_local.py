"""Laws of a client's training: it is what plain PyTorch does, whatever else its worker has done before."""

import copy
from math import cos, pi

import pytest
import torch
from conftest import (
    CLASSES,
    SHAPE,
    close,
    conv_net,
    make_data,
    make_local,
    make_simulation,
    make_strategy,
    make_task,
)
from torch import nn
from torch.nn import functional as F

from fedsim import ConfigError, Recipe
from fedsim.training.draws import KeyedDraws
from fedsim.training.replica import Replica
from fedsim.training.schedules import SCHEDULES
from fedsim.types import Stream, random

# Oracle: one client is a plain loop over torch.optim


class Tied(nn.Module):
    """Two layers share one weight, and one bias is a constant."""

    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.again.weight = self.first.weight
        self.first.bias.requires_grad = False
        self.last = nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.last(self.again(self.first(x.flatten(1)).tanh()))


NETWORKS = {
    "batch norm": lambda: conv_net(dropout=0),
    "cumulative batch norm": lambda: conv_net(dropout=0, bn_momentum=None),
    "tied and frozen": Tied,
}
RECIPES = {
    "sgd": {},
    "momentum": {"momentum": 0.9},
    "decay": {"weight_decay": 0.01},
    "momentum and decay": {"momentum": 0.9, "weight_decay": 0.01},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "clip": {"clip_norm": 0.5, "momentum": 0.5},
    # eps above rounding: a bias before batch norm has no other gradient, which Adam would make a whole step of
    "adam": {"optimizer": "adam", "weight_decay": 0.01, "betas": (0.8, 0.9), "eps": 1e-6},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.01, "eps": 1e-6},
    "full batch": {"batch_size": "full"},
    "steps": {"steps": 7, "epochs": 1},
    "warmup": {"warmup": 2},
}


def optimizer_of(recipe, network, lr):
    if recipe.optimizer == "sgd":
        decay, nesterov = recipe.weight_decay, recipe.nesterov
        return torch.optim.SGD(network.parameters(), lr, recipe.momentum, weight_decay=decay, nesterov=nesterov)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
    return kind(network.parameters(), lr, recipe.betas, recipe.eps, recipe.weight_decay)


def batches_of(recipe, data, number):
    """Shuffled anew in each epoch; the last batch of an epoch is what is left."""
    rows, stream = data.rows(0), random(0, Stream.BATCHES, number, 0)
    size = len(rows) if recipe.batch_size == "full" else recipe.batch_size
    epochs = [stream.permutation(rows) for _ in range(recipe.steps or recipe.epochs)]
    return [part for epoch in epochs for part in torch.from_numpy(epoch).split(size)][: recipe.steps]


def plain_round(network, data, recipe, number):
    """A round of one client as one writes it without a framework."""
    optimizer = optimizer_of(recipe, network.train(), recipe.lr_at(number))
    for rows in batches_of(recipe, data, number):
        x, y = data.batch(rows)
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        if recipe.clip_norm:
            nn.utils.clip_grad_norm_(network.parameters(), recipe.clip_norm)
        optimizer.step()


def floats(state):
    return {name: value for name, value in state.items() if value.is_floating_point()}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize(
    "strategy", [make_strategy("fedavg"), make_strategy("fedprox", mu=0)], ids=["by tensor", "flat"]
)
def test_one_client_is_torch_optim(strategy, recipe, network):
    recipe = {"lr": 0.05, "epochs": 3, "batch_size": 4} | recipe
    task, data = make_task(network, dtype=torch.float64), make_data([11], dtype=torch.float64)
    simulation, plain = make_simulation(strategy, task=task, data=data, **recipe), copy.deepcopy(task.network)
    for number in range(2):
        for module in plain.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked.zero_()  # a client keeps no counters, as it keeps no momentum
        plain_round(plain, data, Recipe(**recipe), number)
        done = simulation.round()
        close(floats(task.state_dict(simulation.server)), floats(plain.state_dict()))
    assert done.steps == len(batches_of(Recipe(**recipe), data, 0))


def test_what_the_network_does_not_use_stays():
    task = make_task(Unused)
    moved = make_local(task, momentum=0.9).train(task.initial_model) != task.initial_model
    used = task.layout.mask(lambda name: name.startswith("used"))
    assert moved[used].any()
    assert not moved[~used].any()


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(16, CLASSES), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x.flatten(1))


def test_channels_last_changes_memory_only():
    simulations = [make_simulation(task=task, epochs=2, channels_last=last) for task, last in _both_formats()]
    for simulation in simulations:
        simulation.round()
    close(*(simulation.task.state_dict(simulation.server) for simulation in simulations))


def _both_formats():
    return [(make_task(dtype=torch.float64, channels_last=last), last) for last in (False, True)]


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_schedules_after_warmup(name):
    options, factor = {
        "constant": ({}, lambda t: 1),
        "step": ({"every": 3, "factor": 0.5}, lambda t: 0.5 ** (t // 3)),
        "exponential": ({"factor": 0.9}, lambda t: 0.9**t),
        "cosine": ({"rounds": 5}, lambda t: (1 + cos(pi * t / 5)) / 2 if t < 5 else 0),
    }[name]
    recipe = Recipe(SCHEDULES.bind({"name": name, **options}), lr=0.4, warmup=3)
    found = [recipe.lr_at(number) for number in range(10)]
    assert found == pytest.approx([0.1, 0.2, 0.3] + [0.4 * factor(t) for t in range(7)], abs=1e-15)


@pytest.mark.parametrize(
    ("recipe", "key"),
    [
        ({"steps": 2, "epochs": 2}, "local.epochs"),
        ({"optimizer": "adam", "momentum": 0.9}, "local.momentum"),
        ({"nesterov": True}, "local.nesterov"),
    ],
)
def test_contradictions_are_refused(recipe, key):
    with pytest.raises(ConfigError, match=key):
        make_simulation(**recipe)


# Precision


@pytest.mark.parametrize(("precision", "scale"), [("bf16", None), ("fp16", 1024.0), ("fp16", 2.0**22)])
def test_mixed_precision_is_autocast_and_grad_scaler(precision, scale):
    """The largest scale overflows at first: those steps change nothing, and training goes on."""
    recipe = {"momentum": 0.9, "steps": 20, "batch_size": 4, "precision": precision, "lr": 0.05}
    task, data = make_task(lambda: conv_net(dropout=0)), make_data([11])
    local = make_local(task, data, **recipe, **({"loss_scale": scale} if scale else {}))
    y = local.train(task.initial_model)

    network = copy.deepcopy(task.network).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.05, 0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=precision == "fp16")
    skipped = 0
    for rows in batches_of(Recipe(**recipe), data, 0):
        x, labels = data.batch(rows)
        before, old_scale = copy.deepcopy(network.bn1.state_dict()), scaler.get_scale()
        with torch.autocast("cpu", torch.bfloat16 if precision == "bf16" else torch.float16):
            logits = network(x)
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(logits.float(), labels)).backward()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < old_scale:
            statistics = {name: value for name, value in before.items() if name.startswith("running")}
            network.bn1.load_state_dict(statistics, strict=False)
            skipped += 1
    assert y.dtype == torch.float32
    assert (skipped > 0) == (scale == 2.0**22)
    assert skipped < 10
    expected = torch.cat([w.detach().flatten() for w in network.parameters()])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(task.buffer_layout.split(local.buffers)["bn1.running_var"], network.bn1.running_var)


def test_a_step_whose_gradient_overflows_changes_nothing():
    """Cumulative batch norm would show a counter that went on."""
    task = make_task(lambda: conv_net(bn_momentum=None))
    local = make_local(task, steps=5, momentum=0.9, precision="fp16", loss_scale=2.0**100)
    before = local.replica.snapshot()
    assert torch.equal(local.train(task.initial_model), task.initial_model)
    for a, b in zip(before, local.replica.snapshot(), strict=True):
        close(a, b, rtol=0, atol=0)


# Draws: what a forward pass draws depends on (seed, round, client), and on nothing else


class Noise(nn.Module):
    def __init__(self, noise):
        super().__init__()
        self.noise = noise

    def forward(self, x):
        return self.noise(x, self.training)


MASKS = {
    "nn.Dropout": nn.Dropout(0.4),
    "F.dropout": Noise(lambda x, train: F.dropout(x, 0.4, train)),
    "F.dropout in place": Noise(lambda x, train: F.dropout(x * 1, 0.4, train, inplace=True)),
    "torch.dropout": Noise(lambda x, train: torch.dropout(x, 0.4, train)),
    "nn.Dropout2d": nn.Dropout2d(0.4),
}
NOISE = MASKS | {
    "torch.randn": Noise(lambda x, train: x + torch.randn(x.shape) * train),
    "torch.randn_like": Noise(lambda x, train: x + torch.randn_like(x) * train),
    "Tensor.normal_": Noise(lambda x, train: x + torch.empty(x.shape).normal_() * train),
}
UNKEYED = {
    "nn.AlphaDropout": nn.AlphaDropout(0.4),
    "nn.RReLU": nn.RReLU(),
}


def noisy(noise, dtype=torch.float32):
    return make_task(lambda: nn.Sequential(noise, nn.Flatten(), nn.Linear(16, CLASSES)), dtype=dtype)


def drawn(task, **key):
    """(B, classes) of a network in training, on one fixed batch."""
    replica = key.pop("replica", None) or Replica(task)
    local = make_local(task, replica=replica, **key)
    return local.logits(replica.w, torch.ones(8, *SHAPE), train=True).detach()


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
def test_draws_have_a_key_and_no_history(noise):
    task = noisy(noise)
    first = drawn(task)
    replica = Replica(task)
    drawn(task, replica=replica, client=1)
    torch.rand(3)
    assert torch.equal(drawn(task, replica=replica), first)
    for other in ({"client": 1}, {"number": 1}, {"seed": 1}):
        assert not torch.equal(drawn(task, **other), first), other


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
def test_nothing_is_drawn_in_evaluation(noise):
    local = make_local(noisy(noise))
    x = torch.ones(8, *SHAPE)
    before = local.replica.generator.get_state()
    a, b = (local.logits(local.replica.w, x, train=False) for _ in range(2))
    assert torch.equal(a, b)
    if noise in MASKS.values():
        assert torch.equal(before, local.replica.generator.get_state())


@pytest.mark.parametrize("noise", UNKEYED.values(), ids=UNKEYED)
def test_what_draws_from_the_global_generator_is_refused(noise):
    with pytest.raises(ConfigError, match="global generator"):
        noisy(noise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dropout", MASKS.values(), ids=MASKS)
def test_dropout_keeps_the_mean(dropout, dtype):
    """Numbers are dropped, each or by channels, or divided by what is kept of them."""
    x = torch.ones(200, 10, 4, 4, dtype=dtype)
    with KeyedDraws(torch.Generator().manual_seed(0)):
        kept = dropout.train()(x)
    assert kept.dtype == dtype
    assert set(kept.unique().tolist()) == {0.0, (torch.ones((), dtype=dtype) / 0.6).item()}
    assert kept.double().mean() == pytest.approx(1, abs=0.05)
    whole = (kept == kept[:, :, :1, :1]).all()
    assert whole == isinstance(dropout, nn.Dropout2d)


# One network, many points


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("network", [conv_net, Tied])
def test_in_place_and_as_a_function_are_the_same(network, channels_last, train):
    """Values and gradients; and the function leaves statistics, counters and weights where they are."""
    task = make_task(network, channels_last=channels_last)
    w = (task.initial_model * 1.1).requires_grad_()
    (x, y), results = make_data().batch(torch.arange(8)), []
    for in_place in (True, False):
        local = make_local(task)
        if in_place:
            local.replica.load(w)
        before = local.replica.snapshot()
        point = local.replica.w if in_place else w
        loss = task.losses(local.logits(point, x, train=train), y).mean()
        gradient = local._backward(loss, flat_gradient=True)[0] if in_place else torch.autograd.grad(loss, w)[0]
        results.append((loss.detach(), gradient.clone()))
        if not in_place:
            close(local.replica.snapshot(), before, rtol=0, atol=0)
            assert torch.equal(local.replica.flat, task.initial_model)
    close(*results, rtol=0, atol=0)


def test_gradient_leaves_the_iterate():
    task = make_task()
    local = make_local(task)
    local.gradient(torch.zeros_like(task.initial_model))
    assert torch.equal(local.replica.flat, task.initial_model)


@pytest.mark.parametrize("bn_momentum", [0.1, None])
def test_a_look_elsewhere_does_not_disturb_training(bn_momentum):
    """Losses and gradients at other points, in the objective and in the correction."""
    task = make_task(lambda: conv_net(dropout=0, bn_momentum=bn_momentum))
    looking, plain = make_local(task, epochs=2, momentum=0.9), make_local(task, epochs=2, momentum=0.9)
    elsewhere, batch = torch.zeros_like(task.initial_model), next(looking.batches())

    def objective(w, batch):
        with torch.no_grad():
            looking.loss(elsewhere, batch)
        return looking.loss(w, batch)

    def correct(g, w):
        there, _ = looking.gradient(elsewhere, batch)
        return g + 0 * there

    found = looking.train(task.initial_model, loss=objective, correct=correct)
    close(found, plain.train(task.initial_model), rtol=0, atol=0)
    close(looking.replica.snapshot(), plain.replica.snapshot(), rtol=0, atol=0)
    assert looking.metrics["steps"] == 2 * plain.metrics["steps"]  # each gradient taken is a step


def test_correction_by_the_gradient_itself_stands_still():
    """g - gradient(w) is 0 on full batches, so that nothing moves but the statistics."""
    task = make_task(lambda: conv_net(dropout=0), dtype=torch.float64)
    local = make_local(task, epochs=3, batch_size="full")
    batch = next(local.batches())
    close(
        local.train(task.initial_model, correct=lambda g, w: g - local.gradient(w, batch)[0]), task.initial_model
    )


def test_gradient_of_the_whole_is_the_mean_over_examples():
    task, data = make_task(Tied, dtype=torch.float64), make_data([11], dtype=torch.float64)
    whole = make_local(task, data, batch_size="full").gradient(task.initial_model)
    parts = make_local(task, data, batch_size=4).gradient(task.initial_model)
    close(whole, parts)


def test_nothing_of_one_client_reaches_the_next():
    """Neither statistics, nor batch-norm counters, nor draws, nor momentum."""
    task = make_task(lambda: conv_net(bn_momentum=None))
    replica, results = Replica(task), []
    make_local(task, client=1, replica=replica, momentum=0.9).train(task.initial_model * 2)
    for worker in (replica, Replica(task)):
        local = make_local(task, client=3, replica=worker, momentum=0.9)
        results.append((local.train(task.initial_model), local.buffers.clone()))
    close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_the_state_dict_is_the_global_model(network):
    """Loaded into the network it gives the same logits, tied weights and constants included."""
    task = make_task(network)
    simulation = make_simulation(task=task, lr=0.5)
    simulation.round()
    x, _ = make_data().batch(torch.arange(8))
    local = make_local(task)
    local.replica.begin_client(simulation.server["buffers"], seed=0)
    network = copy.deepcopy(task.network).eval()
    network.load_state_dict(task.state_dict(simulation.server))
    close(network(x), local.logits(simulation.server["model"], x, train=False), rtol=1e-5, atol=1e-6)
    assert not torch.equal(simulation.server["model"], task.initial_model)


def test_steps_and_batches_are_those_of_an_epoch():
    """Each epoch is a permutation of the client's rows, and num_steps counts what train takes."""
    task = make_task()
    local = make_local(task, client=3, epochs=3)
    sizes = [len(batch.y) for batch in local.batches()]
    assert sizes == [4, 4, 4, 1] * 3
    assert local.num_steps == len(sizes)
    first = torch.cat([batch.x for batch in local.batches(epochs=1)])
    whole, _ = local.data.batch(torch.from_numpy(local.data.rows(3)))
    assert torch.equal(first.flatten(1).sort(0).values, whole.flatten(1).sort(0).values)


def test_bf16_is_autocast():
    """Weights that are cast once a step are what autocast casts in each pass: the same numbers, to the bit."""
    task = make_task(lambda: conv_net(dropout=0))
    local = make_local(task, precision="bf16", epochs=2, lr=0.1)
    network = copy.deepcopy(task.network).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for x, y, *_ in local.batches():
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(x)
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), y).backward()
        optimizer.step()
    expected = torch.cat([p.detach().reshape(-1) for p in network.parameters()])
    close(local.train(task.initial_model), expected, rtol=0, atol=0)


def test_a_network_that_draws_nothing_is_not_watched():
    """Keyed draws cost every operation of a forward pass a call."""
    assert make_task(lambda: conv_net(dropout=0.5)).draws
    assert not make_task(lambda: conv_net(dropout=0)).draws


class Island(nn.Module):
    """Leaves autocast for its last layer, as for a loss of many classes."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, CLASSES)

    def forward(self, x):
        x = torch.relu(self.first(x.flatten(1)))
        with torch.autocast("cpu", enabled=False):
            return self.last(x.float())


def test_bf16_with_an_island_of_fp32():
    task = make_task(Island)
    learnt = make_local(task, precision="bf16").train(task.initial_model)
    close(learnt, make_local(task).train(task.initial_model), rtol=0.05, atol=0.01)
