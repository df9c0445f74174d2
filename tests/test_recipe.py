"""Each trick of a client's training is its formula."""

import copy
import warnings
from dataclasses import replace
from itertools import chain, count, islice
from math import cos, pi, sqrt

import pytest
import torch
from conftest import CLASSES, SHAPE, close, conv_net, make_data, make_local, make_simulation, make_task
from covering import in_turn, pairs, sampled
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import fedsim
from fedsim import Batch, ConfigError, Recipe, Task
from fedsim.data import Dataset
from fedsim.data.federated import Shard
from fedsim.experiment.build import build
from fedsim.experiment.config import load
from fedsim.experiment.start import new_run
from fedsim.federated.client import Train
from fedsim.federated.simulation import Failures
from fedsim.models import options
from fedsim.runtimes.vectorized.compute import Client, updates
from fedsim.strategies import CATALOGUE
from fedsim.training.batched.objective import Network
from fedsim.training.example_loss import batch_rows
from fedsim.training.losses import LOSSES
from fedsim.training.optim import LARS
from fedsim.training.precision import check_precision
from fedsim.training.recipe import Distillation, NoisyLabels
from fedsim.training.schedules import SCHEDULES
from fedsim.training.small_batches import clients_to_leave_out
from fedsim.types import Job, Stream, random

DOUBLE = torch.float64


def double(network=lambda: conv_net(dropout=0), **settings):
    return make_task(network, dtype=DOUBLE, **settings)


# The learning rate


def test_linear_and_square_root_scaling():
    for batch_size in (32, 256, 1024):
        plain, linear, root = (
            Recipe(lr=0.1, batch_size=batch_size, lr_scaling=s) for s in ("none", "linear", "sqrt")
        )
        assert plain.lr_at(3) == 0.1
        assert linear.lr_at(3) == pytest.approx(0.1 * batch_size / 256)  # Goyal 2017
        assert root.lr_at(3) == pytest.approx(0.1 * sqrt(batch_size / 256))


def test_by_step_warm_up_is_linear_in_batches_and_the_cosine_follows():
    rounds, warmup, steps = 10, 2, 5
    recipe = Recipe(
        SCHEDULES.bind({"name": "cosine", "rounds": rounds - warmup}), lr=0.4, warmup=warmup, lr_every="step"
    )
    rates = [recipe.lr_at(number, step, steps) for number in range(rounds) for step in range(steps)]
    m, total = warmup * steps, (rounds - warmup) * steps
    assert rates[:m] == pytest.approx([0.4 * i / m for i in range(1, m + 1)])  # He 2019: i eta / m
    assert rates[m:] == pytest.approx([0.2 * (1 + cos(pi * t / total)) for t in range(total)])  # its equation (1)


def test_each_step_takes_its_own_learning_rate():
    task, data = double(), make_data([11], dtype=DOUBLE)
    recipe = {"lr": 0.1, "warmup": 1, "lr_every": "step", "batch_size": 4, "epochs": 2}
    local = make_local(task, data, **recipe)
    trained = local.train(task.initial_model)
    network = copy.deepcopy(task.network).train()
    for i, batch in enumerate(make_local(task, data, **recipe).batches(), 1):
        loss = F.cross_entropy(network(batch.x), batch.y)
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        with torch.no_grad():
            for p, g in zip(network.parameters(), gradients, strict=True):
                p -= 0.1 * i / 6 * g  # six steps in the round
    close(trained, task.layout.flatten(dict(network.named_parameters())))


@pytest.mark.parametrize("factor", [-1.0, float("nan"), float("inf")])
def test_a_rate_that_cannot_be_is_refused(factor):
    with pytest.raises(ConfigError, match=r"^local.schedule: .*: the schedule gave .* in round 4; it should give"):
        Recipe(lambda time: factor if time == 3 else 1.0).check_schedule(3)
    with pytest.raises(ConfigError, match=r"^local.schedule: .*: the schedule gave 1e\+308 in round 2; it should"):
        Recipe(SCHEDULES.bind({"name": "exponential", "factor": 1e308}), lr=100.0).check_schedule(1)


MOVED_WITHOUT_STEPS = {  # what is added in each round, what clients answer, and what they keep of their last round
    "mime": {"model", "c", "s"},
    "fedlin": {"g"},
    "mimelite": {"model", "m"},
    "feddyn": {"model"},
    "feddc": {"model", "g"},
    "moon": {"last"},
}
IN_ALL = ["serial", {"name": "threads", "workers": 2}, {"name": "vectorized", "chunk": 2, "workers": 1}]


@pytest.mark.parametrize(("strategy", "runtime"), sampled(in_turn(CATALOGUE, IN_ALL), CATALOGUE, IN_ALL))
def test_a_rate_of_0_moves_no_client(strategy, runtime):
    """An ended cosine: scaffold's c and c_k stay, too, and the mean update of the others is 0."""
    cosine = SCHEDULES.bind({"name": "cosine", "rounds": 2})
    task = make_task(lambda: conv_net(dropout=0), dtype=DOUBLE)
    simulation = make_simulation(strategy, task=task, runtime=runtime, schedule=cosine)
    for _ in range(2):
        simulation.round()
    server, own = simulation.server, dict(simulation.clients.items())
    simulation.round()
    kept = server.keys() - {"buffers", *simulation.strategy.broadcast}  # of the server's optimiser, which goes on
    moved = {"buffers", "lambda"} | (kept | {"model"} if kept else set())
    moved |= MOVED_WITHOUT_STEPS.get(strategy, set())
    for name in server.keys() - moved:
        assert torch.equal(simulation.server[name], server[name]), name
    for client, state in own.items():
        close(
            {n: v for n, v in simulation.clients[client].items() if n not in moved},
            {n: v for n, v in state.items() if n not in moved},
            rtol=0,
            atol=0,
        )
    assert all(value.isfinite().all() for value in simulation.server.values())


def test_a_rate_that_float32_rounds_to_0_moves_no_client():
    simulation = make_simulation("scaffold", lr=1e-60)
    before = simulation.server["model"].clone()
    simulation.round()
    assert torch.equal(simulation.server["model"], before)
    assert not simulation.server["c"].any()


# Mini-batches


def rows_of(data, **settings):
    recipe = Recipe(batch_size=4, **settings)
    return recipe, list(batch_rows(data, 0, recipe, random(0, Stream.BATCHES, 0, 0)))


@pytest.mark.parametrize("settings", [{"epochs": 2}, {"steps": 5}], ids=["epochs", "steps"])
@pytest.mark.parametrize("n", [1, 3, 4, 5, 11, 13])
def test_drop_last_is_the_data_loaders(n, settings):
    """K and rows; a client of fewer than B examples keeps its only batch."""
    data, stream = make_data([n]), random(0, Stream.BATCHES, 0, 0)
    epochs = (DataLoader(stream.permutation(data.rows(0)), min(4, n), drop_last=True) for _ in count())
    recipe, found = rows_of(data, drop_last=True, **settings)
    assert len(found) == recipe.num_steps(n) == settings.get("steps", 2 * max(n // 4, 1))
    expected = islice(chain.from_iterable(epochs), len(found))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_small_last_batch_joins_the_one_before():
    joined, plain = Recipe(batch_size=4, min_batch=3), Recipe(batch_size=4)
    sizes = {1: [1], 2: [2], 4: [4], 5: [5], 6: [6], 7: [4, 3], 8: [4, 4], 9: [4, 5]}
    assert {n: joined.batch_sizes(n) for n in sizes} == sizes
    data = make_data([9])
    recipe, found = rows_of(data, min_batch=3, epochs=2)
    assert [len(rows) for rows in found] == [4, 5] * 2
    assert recipe.num_steps(9) == 4
    assert torch.equal(torch.cat(found), torch.cat(rows_of(data, epochs=2)[1]))  # the order does not change
    assert [replace(joined, batch_size="full").batch_sizes(n) for n in (1, 9)] == [[1], [9]]
    assert plain.with_all_examples is plain


@pytest.mark.parametrize("oversample", [False, True])
def test_the_gradient_of_the_objective_leaves_nothing_out(oversample):
    task, data = double(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))), make_data([9], dtype=DOUBLE)
    dropping, whole = (
        make_local(task, data, oversample=oversample, **settings) for settings in ({"drop_last": True}, {})
    )
    close(dropping.gradient(task.initial_model), whole.gradient(task.initial_model))
    assert float(dropping.metrics["examples"]) == 9
    close(dropping.loss(task.initial_model), whole.loss(task.initial_model))
    dropping.train(task.initial_model)
    assert (float(dropping.num_steps), float(dropping.metrics["examples"])) == (2, 9 + 8)


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"drop_last": True, "min_batch": 2}, "local.min_batch"), ({"min_batch": 5}, "local.min_batch: 5 exceeds")],
)
def test_batch_options_that_contradict_each_other_are_refused(settings, key):
    with pytest.raises(ConfigError, match=f"^{key}"):
        make_simulation(**settings)


def dense(*layers):
    return lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 5), *layers, nn.Linear(5, CLASSES))


class OfTheBatch(nn.Module):
    """Batch norm as one writes it; the standard deviation of one example is not a number."""

    def forward(self, x):
        return (x - x.mean(0)) / (x.std(0) + 0.1) if self.training else x


class Squeezed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.fc(x.flatten(1)).squeeze()


NEED_TWO = {
    "batch norm": dense(nn.BatchNorm1d(5)),
    "no running statistics": dense(nn.BatchNorm1d(5, track_running_stats=False)),
    "group norm": dense(nn.GroupNorm(5, 5)),
    "one pixel": lambda: nn.Sequential(nn.Conv2d(1, 5, 4), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5, CLASSES)),
    "own": dense(OfTheBatch()),
    "squeeze": Squeezed,
}


@pytest.mark.parametrize("policy", ["raise", "drop"])
@pytest.mark.parametrize("network", NEED_TWO.values(), ids=NEED_TWO)
def test_batches_of_one_are_refused_alike_in_all_runtimes(network, policy):
    task, data = make_task(network), make_data([5, 8, 9, 4, 13, 17])
    lines = set()
    for runtime in IN_ALL:
        with pytest.raises(ConfigError) as caught:
            make_simulation(task=task, data=data, runtime=runtime, failures=Failures(policy=policy))
        lines.add(str(caught.value))
    assert len(lines) == 1
    way_out = "and the network needs two; set local.drop_last=true or local.min_batch=2 ("
    assert min(lines).startswith(
        f"local.batch_size: 4 leaves a last batch of one example to clients 0, 2, 4 and 1 more, {way_out}"
    )
    for settings in ({"drop_last": True}, {"min_batch": 2}):
        assert make_simulation(task=task, data=data, failures=Failures(policy=policy), **settings).left_out == {}
    with pytest.raises(
        ConfigError, match=r"^local.batch_size: 1, and the network needs two examples; set it to 2"
    ):
        make_simulation(task=task, data=data, batch_size=1)
    x, y = data.batch(torch.arange(5))
    with pytest.raises(
        ConfigError, match=r"^local.batch_size: 4 leaves a last batch of one example to this client"
    ):
        clients_to_leave_out(
            task, Shard(Dataset(x, y, x[:0], y[:0], CLASSES), classes=CLASSES), Recipe(batch_size=4)
        )


def test_a_network_that_takes_one_example_gets_it():
    """Batch norm over several pixels, and norms of each example."""
    for network in (conv_net, dense(nn.LayerNorm(5))):
        make_simulation(task=make_task(network), data=make_data([1, 5])).round()


def test_a_client_with_one_example_is_left_out_by_name_or_refused():
    task, data = make_task(NEED_TWO["batch norm"], dtype=DOUBLE), make_data([1, 8, 6, 2], dtype=DOUBLE)
    with pytest.raises(
        ConfigError, match=r"^data.partition: gives one example to client 0, and .*failures\.policy=drop"
    ):
        make_simulation(task=task, data=data)
    found = [make_simulation(task=task, data=data, runtime=r, failures=Failures(policy="drop")) for r in IN_ALL]
    cohort = {"name": "fixed", "clients": [1, 2, 3]}
    others = make_simulation(task=task, data=data, cohort=cohort, failures=Failures(policy="drop"))
    others.round()
    for simulation in found:
        assert set(simulation.round().failed) == {"0"}
        assert simulation.last.failed["0"].startswith("has one example, and the network needs two (Expected more")
        close(simulation.server, others.server)
    assert found[0].fingerprint() == found[1].fingerprint() == others.fingerprint()


def test_vectorized_batch_norm_refuses_one_row_among_padding():
    """Whoever calls it: the check before a run is not its only guard."""
    task, data = make_task(NEED_TWO["batch norm"]), make_data([5, 8])
    simulation = make_simulation(task=task, data=data, min_batch=2)
    work = Train(simulation.strategy, replace(simulation.recipe, min_batch=1), 0)
    clients = [Client(work, simulation.server, Job(k, 0, {})) for k in range(2)]
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        updates(Network(task, torch.device("cpu"), "grouped"), data, clients)


def test_a_test_in_training_mode_has_no_batch_of_one():
    simulation = make_simulation(task=make_task(NEED_TWO["batch norm"]), data=make_data([3, 9]), min_batch=2)
    assert simulation.evaluate(16, train=True) == simulation.evaluate(17, train=True)  # of 17 examples
    assert simulation.evaluate_clients(batch_size=8, train=True) == simulation.evaluate_clients(train=True)


# Optimisers


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("correct", [None, lambda g, w: g], ids=["by tensor", "flat"])
def test_no_bias_decay_is_torchs_with_two_groups(optimizer, correct):
    task, data = double(), make_data([11], dtype=DOUBLE)
    recipe = {
        "optimizer": optimizer,
        "weight_decay": 0.1,
        "decay": "weights",
        "lr": 0.05,
        "epochs": 2,
        "eps": 1e-6,
    }
    if optimizer == "sgd":
        recipe["momentum"] = 0.9
    trained = make_local(task, data, **recipe).train(task.initial_model, correct=correct)
    network = copy.deepcopy(task.network).train()
    groups = [
        {"params": [p for p in network.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in network.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    other = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    plain = torch.optim.SGD(groups, 0.05, 0.9) if optimizer == "sgd" else other[optimizer](groups, 0.05, eps=1e-6)
    for batch in make_local(task, data, **recipe).batches():
        plain.zero_grad()
        F.cross_entropy(network(batch.x), batch.y).backward()
        plain.step()
    close(trained, task.layout.flatten(dict(network.named_parameters())))


def test_lars_by_hand():
    w, bias = torch.tensor([[3.0, 4.0]], dtype=DOUBLE), torch.tensor([1.0], dtype=DOUBLE)
    g, g_bias = torch.tensor([[0.6, 0.8]], dtype=DOUBLE), torch.tensor([0.5], dtype=DOUBLE)
    lars = LARS(momentum=0.9, weight_decay=0.1, trust=0.01)
    lars.begin([w, bias])
    rate = 0.01 * 5 / (1 + 0.1 * 5)  # trust |w| / (|g| + b |w|)
    v, v_bias = 0.2 * rate * (g + 0.1 * w), 0.2 * (g_bias + 0.1 * bias)
    expected = w - v, bias - v_bias
    lars.step([w, bias], [g, g_bias], 0.2)
    close(w, expected[0])
    close(bias, expected[1])
    rate = 0.01 * w.norm() / (1 + 0.1 * w.norm())
    expected = w - (0.9 * v + 0.2 * rate * (g + 0.1 * w))
    lars.step([w, bias], [g, g_bias], 0.2)
    close(w, expected)


def test_lars_moves_what_is_zero():
    w = torch.zeros(2, 2)
    lars = LARS(momentum=0.0, weight_decay=0.1, trust=0.01)
    lars.begin([w])
    lars.step([w], [torch.ones(2, 2)], 0.1)
    close(w, torch.full((2, 2), -0.1))


# Memory for time


@pytest.mark.parametrize("correct", [None, lambda g, w: g], ids=["by tensor", "flat"])
@pytest.mark.parametrize("pieces", [2, 3, 7])
def test_accumulated_gradients_are_those_of_the_whole_batch(pieces, correct):
    task = double(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, CLASSES)))
    data = make_data([13], dtype=DOUBLE)
    whole, parts = (
        make_local(task, data, batch_size=7, accumulate=a, momentum=0.9, epochs=2) for a in (1, pieces)
    )
    close(parts.train(task.initial_model, correct=correct), whole.train(task.initial_model, correct=correct))
    assert parts.num_steps == whole.num_steps
    close(parts.metrics["loss"], whole.metrics["loss"])


class Blocks(nn.Module):
    """Blocks with batch norm and dropout, in a Sequential as shared models have them."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*(self.Block(c) for c in (1, 4, 4)))
        self.fc = nn.Linear(4 * 16, CLASSES)

    class Block(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv, self.bn, self.drop = (
                nn.Conv2d(channels, 4, 3, padding=1),
                nn.BatchNorm2d(4),
                nn.Dropout(0.3),
            )

        def forward(self, x):
            return self.drop(self.bn(self.conv(x)).relu())

    def forward(self, x):
        return self.fc(self.body(x).flatten(1))


PRECISE = (["fedavg", "fedprox", "scaffold"], ["fp32", "bf16", "fp16"], [None, Distillation()])


@pytest.mark.parametrize(("strategy", "precision", "distillation"), sampled(pairs(*PRECISE), *PRECISE))
def test_activation_checkpointing_changes_no_bit(strategy, precision, distillation):
    if strategy == "scaffold" and precision == "fp16":
        pytest.skip("scaffold counts its steps")
    models = []
    for recompute in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            task = Task(Blocks(), SHAPE, CLASSES, recompute=recompute)
        simulation = make_simulation(strategy, task=task, precision=precision, distillation=distillation)
        simulation.round()
        simulation.round()
        models.append(simulation.fingerprint())
    assert models[0] == models[1]


BACKBONES = ["resnet18", "densenet121", "efficientnet_b0", "shufflenet_v2", "inception_v3"]


@pytest.mark.parametrize("name", sampled([("shufflenet_v2",)], BACKBONES))  # the lightest one
def test_backbones_recompute_what_they_computed(name):
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        network = options.make({"name": name, "dropout": 0.2}, (3, 32, 32), CLASSES)
        task = Task(network, (3, 32, 32), CLASSES, recompute=recompute)
        local = make_local(task, make_data([2], shape=(3, 32, 32)), batch_size=2)
        gradient, loss = local.gradient(task.initial_model, next(local.batches()))
        found.append((gradient, loss, local.buffers))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert gradient.any()


def test_activation_checkpointing_keeps_less():
    def kept(recompute):
        torch.manual_seed(0)
        task, sizes = Task(Blocks(), SHAPE, CLASSES, recompute=recompute), []
        local = make_local(task, make_data([8]), batch_size=8)

        def loss(w, batch):
            hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t)
            with hooks:
                return local.loss(w, batch)

        local.train(task.initial_model, loss=loss)
        return sum(sizes)

    assert kept(True) < 0.5 * kept(False)


def test_a_network_without_blocks_has_nothing_to_recompute():
    with pytest.raises(ConfigError, match=r"^local.activation_checkpointing: the network has no blocks"):
        Task(conv_net(), SHAPE, CLASSES, recompute=True)


# The loss


def test_the_loss_is_the_recipes():
    task, data = double(), make_data([11], dtype=DOUBLE)
    hinge = LOSSES.bind({"name": "hinge"})
    local = make_local(task, data, label_loss=hinge)
    batch = next(local.batches())
    expected = F.multi_margin_loss(copy.deepcopy(task.network).train()(batch.x), batch.y)
    close(local.loss(task.initial_model, batch), expected)


def test_class_weights_weigh_each_example():
    task, data = double(), make_data([11], dtype=DOUBLE)
    local = make_local(task, data, class_weights=[1.0, 2.0, 0.5])
    batch = next(local.batches())
    losses = F.cross_entropy(copy.deepcopy(task.network).train()(batch.x), batch.y, reduction="none")
    close(local.loss(task.initial_model, batch), (losses * torch.tensor([1.0, 2.0, 0.5])[batch.y]).mean())


def test_balanced_class_weights_give_each_class_the_same_say():
    """In a batch of one class each loss is multiplied by n / (classes n_c)."""
    task, data = double(), make_data([23], dtype=DOUBLE)
    plain, balanced = (make_local(task, data, class_weights=weights) for weights in (None, "balanced"))
    rows = torch.from_numpy(data.rows(0))
    for label in range(CLASSES):
        own = rows[data.labels[rows] == label]
        batch = Batch(*data.batch(own))
        weight = balanced.loss(task.initial_model, batch) / plain.loss(task.initial_model, batch)
        assert float(weight) * len(own) == pytest.approx(23 / CLASSES)


def test_oversampling_draws_rare_classes_as_often():
    task, data = double(), make_data([40], dtype=DOUBLE)
    data = data.with_labels(torch.where(torch.arange(len(data.labels)) % 10 == 0, 1, 0))
    local = make_local(task, data, oversample=True, epochs=30, batch_size=40)
    labels = torch.cat([batch.y for batch in local.batches()])
    assert len(labels) == 30 * 40
    assert 0.45 < labels.double().mean() < 0.55


def test_auxiliary_heads_count_two_fifths():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.side = nn.Linear(16, CLASSES), nn.Linear(16, CLASSES)

        def forward(self, x):
            x = x.flatten(1)
            return (self.main(x), self.side(x)) if self.training else self.main(x)

    task, data = double(TwoHeads), make_data([11], dtype=DOUBLE)
    local, network = make_local(task, data), copy.deepcopy(task.network).train()
    batch = next(local.batches())
    main, side = network(batch.x)
    close(
        local.loss(task.initial_model, batch),
        F.cross_entropy(main, batch.y) + 0.4 * F.cross_entropy(side, batch.y),
    )
    make_simulation(task=task, data=data).round()


# Distillation


def divergence(student, teacher, temperature):
    p, q = (teacher / temperature).softmax(-1), (student / temperature).log_softmax(-1)
    return temperature**2 * (p * (p.log() - q)).sum(-1).mean()


def test_the_global_model_teaches_what_it_knew():
    task, data = double(), make_data([11], dtype=DOUBLE)
    recipe = {"distillation": Distillation(temperature=3.0, alpha=0.25), "batch_size": 4, "lr": 0.1}
    trained = make_local(task, data, **recipe).train(task.initial_model)
    network, teacher = copy.deepcopy(task.network).train(), copy.deepcopy(task.network).eval()
    for batch in make_local(task, data, **recipe).batches():
        with torch.no_grad():
            taught = teacher(batch.x)
        logits = network(batch.x)
        loss = 0.75 * F.cross_entropy(logits, batch.y) + 0.25 * divergence(logits, taught, 3.0)
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        with torch.no_grad():
            for p, g in zip(network.parameters(), gradients, strict=True):
                p -= 0.1 * g
    close(trained, task.layout.flatten(dict(network.named_parameters())))


TINY = {
    "rounds": 2,
    "data": {"name": "synthetic", "examples": 60, "test_examples": 30, "classes": 3, "clients": 3},
    "model": {"name": "cnn_bn", "widths": [3, 4]},
    "strategy": "fedavg",
    "cohort": "all",
    "runtime": "serial",
}


def test_a_file_teaches(tmp_path):
    other = {"name": "cnn_bn", "widths": [4, 5]}
    donor = build(load(TINY | {"model": other}))
    save_file(donor.task.state_dict(donor.server), tmp_path / "teacher.safetensors")
    distillation = {"teacher": str(tmp_path / "teacher.safetensors"), "model": other, "alpha": 1.0}
    simulation = build(load(TINY | {"local": {"distillation": distillation}}))
    batch = simulation.data.batch(torch.arange(5))[0]
    with torch.no_grad():
        expected = copy.deepcopy(donor.task.network).eval()(batch)
    torch.testing.assert_close(simulation.task.teacher.eval()(batch), expected)
    local = make_local(simulation.task, simulation.data, **vars(simulation.recipe))
    batch = next(local.batches())
    with torch.no_grad():
        logits = copy.deepcopy(simulation.task.network).train()(batch.x)
        taught = copy.deepcopy(donor.task.network).eval()(batch.x)
        found = local.loss(simulation.task.initial_model, batch)
    torch.testing.assert_close(found, divergence(logits, taught, 4.0))  # alpha is 1
    simulation.round()
    match = (
        r"^local.distillation.teacher: \S+teacher.safetensors: conv1.weight has shape \(4, .* it has \(3, [^;]+$"
    )
    with pytest.raises(ConfigError, match=match):
        build(load(TINY | {"local": {"distillation": {"teacher": distillation["teacher"]}}}))


def test_a_teacher_may_be_a_bare_name(tmp_path):
    donor = options.make("cnn_bn", (1, 28, 28), 3)
    shaped = TINY | {"data": TINY["data"] | {"shape": [1, 28, 28]}}
    save_file(donor.state_dict(), tmp_path / "teacher.safetensors")
    distillation = {"teacher": str(tmp_path / "teacher.safetensors"), "model": "cnn_bn"}
    taught = build(load(shaped | {"local": {"distillation": distillation}})).task.teacher
    assert all(torch.equal(v, donor.state_dict()[n]) for n, v in taught.state_dict().items())


def test_a_teacher_like_the_network_starts_and_trains_like_none(tmp_path):
    settings = TINY | {"model": TINY["model"] | {"dropout": 0.5, "init": "he", "freeze": ["bn1.*"]}}
    donor = build(load(settings))
    state = donor.task.state_dict(donor.server)
    save_file(state, tmp_path / "teacher.safetensors")
    local = {"distillation": {"teacher": str(tmp_path / "teacher.safetensors")}}
    teacher = build(load(settings | {"local": local})).task.teacher
    assert all(torch.equal(teacher.state_dict()[name], value) for name, value in state.items())
    assert isinstance(teacher.bn1, torch.nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("key", "value"),
    {
        "weights": "w.safetensors",
        "pretrained": "ResNet18_Weights.IMAGENET1K_V1",
        "new_head": True,
        "init": "he",
        "zero_gamma": True,
        "freeze": ["fc*"],
        "dropout": 0.5,
        "drop_path": 0.1,
    }.items(),
)
def test_what_is_nothing_to_a_teacher_is_refused(key, value):
    distillation = {"teacher": "teacher.safetensors", "model": {"name": "resnet18", key: value}}
    with pytest.raises(ConfigError, match=rf"^local.distillation.model.{key}: has no effect on a teacher"):
        load(TINY | {"local": {"distillation": distillation}})
    for model in ("", {}):
        with pytest.raises(ConfigError, match=r"^local.distillation.model.name: "):
            load(TINY | {"local": {"distillation": distillation | {"model": model}}})


# Noisy labels


def batches_of(local, start):
    """What a round trains on: each mini-batch, the weights before its step, and its loss."""
    seen = []

    def loss(w, batch):
        found = local.loss(w, batch)
        seen.append((batch, w.detach().clone(), found.detach()))
        return found

    local.train(start, loss=loss)
    return seen


@pytest.mark.parametrize("class_weights", [None, [1.0, 2.0, 3.0]], ids=["alike", "weighted"])
def test_doubtful_labels_give_way_to_the_networks_own(class_weights):
    task, data = double(), make_data([40], dtype=DOUBLE)
    recipe = {"noisy_labels": NoisyLabels(start=3), "class_weights": class_weights}
    weights = torch.tensor(class_weights or [1.0] * CLASSES, dtype=DOUBLE)
    for batch, w, found in batches_of(make_local(task, data, number=2, **recipe), task.initial_model):
        logits, doubt = make_local(task, data).logits(w, batch.x, train=True), batch.label_error_prob
        own = F.cross_entropy(logits, logits.argmax(-1), reduction="none")
        losses = (1 - doubt) * F.cross_entropy(logits, batch.y, reduction="none") + doubt * own
        close(found, (losses * weights[batch.y]).mean().detach())
    for batch, *_ in batches_of(make_local(task, data, number=1, **recipe), task.initial_model):
        assert batch.label_error_prob is None


def test_an_example_is_as_doubtful_as_its_loss_at_the_start_says():
    task, data = double(), make_data([40], dtype=DOUBLE)
    local = make_local(task, data, number=2, noisy_labels=NoisyLabels(start=3), epochs=2)
    batches = [batch for batch, *_ in batches_of(local, task.initial_model)]
    x, y, doubt = (
        torch.cat(parts) for parts in zip(*((b.x, b.y, b.label_error_prob) for b in batches), strict=True)
    )
    with torch.no_grad():
        losses = F.cross_entropy(copy.deepcopy(task.network).eval()(x), y, reduction="none")
    order = losses.argsort()
    assert len(doubt) == 80  # each example twice
    assert ((doubt >= 0) & (doubt <= 1)).all()
    assert (doubt[order].diff() >= -1e-9).all()
    assert doubt.max() > doubt.min()


# Mixed labels


def test_mixed_labels_share_the_loss():
    task, data = double(), make_data([11], dtype=DOUBLE)
    local = make_local(task, data)
    x, y, *_ = next(local.batches())
    share = torch.full((len(y),), 0.3, dtype=DOUBLE)
    mixed = Batch(x, y, mixed_labels=y.flip(0), mix_weight=share)
    logits = copy.deepcopy(task.network).train()(x)
    expected = 0.3 * F.cross_entropy(logits, y) + 0.7 * F.cross_entropy(logits, y.flip(0))
    close(local.loss(task.initial_model, mixed), expected)


def test_a_batch_splits_with_all_it_has():
    y = torch.arange(5)
    batch = Batch(torch.randn(5, 2), y, mixed_labels=y.flip(0), mix_weight=y.double())
    pieces = batch.split(3)
    assert [len(piece.y) for piece in pieces] == [2, 2, 1]
    assert all(torch.equal(piece.mixed_labels, 4 - piece.y) and piece.label_error_prob is None for piece in pieces)


# What contradicts itself


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"lr_scaling": "linear", "batch_size": "full"}, "local.lr_scaling: needs a number as local.batch_size"),
        ({"decay": "weights"}, "local.decay: needs local.weight_decay above 0"),
        (
            {"oversample": True, "class_weights": "balanced"},
            "local.oversample: cannot be combined",
        ),
        ({"optimizer": "lars", "nesterov": True, "momentum": 0.9}, "local.nesterov: needs sgd"),
        ({"class_weights": [1.0, 2.0]}, "local.class_weights: has 2 numbers; there are 3 classes"),
    ],
)
def test_contradictions_are_refused(recipe, message):
    with pytest.raises(ConfigError) as error:
        make_simulation(**recipe)
    assert message in str(error.value)


def test_a_precision_that_the_device_lacks_is_refused(monkeypatch):
    conv2d = torch.conv2d

    def lacks_fp16(*arguments):
        if torch.get_autocast_dtype("cpu") == torch.float16:
            raise RuntimeError("not implemented for 'Half'")
        return conv2d(*arguments)

    monkeypatch.setattr(torch, "conv2d", lacks_fp16)
    with pytest.raises(ConfigError, match=r"^local.precision: cpu lacks fp16; allowed: fp32, bf16$"):
        make_simulation(precision="fp16")
    check_precision("bf16", torch.device("cpu"))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7])
def test_no_piece_of_a_batch_is_a_single_example(size):
    task = make_task(lambda: conv_net(dropout=0))
    seen = []
    local = make_local(task, make_data([size]), batch_size=size, accumulate=min(size, 4))
    local.train(task.initial_model, loss=lambda w, batch: seen.append(len(batch.y)) or local.loss(w, batch))
    assert sum(seen) == size
    assert min(seen) >= 2


# The test


def test_evaluation_in_train_mode_takes_the_statistics_of_its_batch():
    task, data = double(), make_data(dtype=DOUBLE)
    simulation = make_simulation(task=task, data=data)
    found = {train: simulation.evaluate(batch_size=7, train=train) for train in (False, True)}
    for train, test in found.items():
        network, losses = copy.deepcopy(task.network).train(train), []
        for rows in torch.arange(data.num_test).split(7):
            x, y = data.test_batch(rows)
            with torch.no_grad():
                losses.append(F.cross_entropy(network(x), y, reduction="sum"))
        assert test.loss == pytest.approx(float(sum(losses)) / data.num_test)
    assert found[True] != found[False]
    config = load(TINY | {"evaluate": {"mode": "train"}})
    other = load(TINY)
    losses = [fedsim.run(c.model_dump(mode="json")).summary["test_loss"] for c in (config, other)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"evaluate.batch_size": 1}, "evaluate.batch_size: 1 example, and in training mode the network needs two"),
        ({"data.test_examples": 1}, "evaluate.mode: the test set has one example"),
        ({"evaluate.clients": True, "data.holdout": 0.05}, "evaluate.mode: a client has one example"),
    ],
)
def test_a_test_in_training_mode_of_one_example_is_refused(tmp_path, monkeypatch, settings, key):
    (tmp_path / "needs_two.py").write_text(
        "from torch import nn\n"
        "def net(shape, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5), nn.Linear(5, classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = TINY | {"model": "needs_two:net", "evaluate": {"mode": "train"}}
    with pytest.raises(ConfigError, match=f"^{key}"):
        build(load(config, settings))
    build(load(config, settings | {"evaluate.mode": "eval"}))


# What a run says of its learning rate before it begins


def test_a_run_says_where_its_rate_is_0_and_a_resume_how_to_go_on(tmp_path):
    still = {"strategy": {"name": "scaffold", "buffers": "frozen"}}  # statistics move with any learning rate
    short = TINY | still | {"local": {"schedule": "cosine"}}

    def notes(config):
        return "; ".join(new_run(load(config))[0].notes)

    assert notes(short) == ""
    line = "local.schedule: the learning rate is 0 in round 2, where clients do not train; local.schedule.rounds=2"
    assert notes(short | {"local": {"schedule": {"name": "cosine", "rounds": 1}}}).startswith(line)
    assert notes(short | {"local": {"warmup": 2}}).startswith(
        "local.warmup: 2 rounds, and the run has 2; local.lr is"
    )
    fedsim.run(short, out=tmp_path / "run")
    line = "local.schedule: the learning rate is 0 in 2 rounds from round 3 on"
    with pytest.warns(UserWarning, match=f"^{line}, .* stop and resume with local.schedule.rounds=4 --force$"):
        ended = resumed(tmp_path / "run", {"rounds": 4})
    losses = [record["test_loss"] for record in ended.rounds]
    assert losses[1] == losses[2] == losses[3]
    longer = resumed(tmp_path / "run", {"rounds": 6, "local.schedule.rounds": 6}, force=True)
    assert longer.rounds[5]["test_loss"] != losses[3]


def resumed(folder, overrides, force=False):
    """What `fedsim.resume` gives, without the warning that says what has changed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "changed: ")
        return fedsim.resume(folder, overrides, force=force)


def test_a_schedule_of_ones_own_that_fails_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def schedule(time, /):\n    return 1 / (1 - time)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"^local.schedule: mine:schedule: ZeroDivisionError: .* \(mine.py:2\)$"):
        fedsim.run(TINY | {"local": {"schedule": "mine:schedule"}})


# What a resume must know of


@pytest.mark.filterwarnings("ignore:changed. rounds")
@pytest.mark.parametrize("file", ["teacher", "frozen"])
def test_a_resume_notices_other_constants(tmp_path, file):
    first, second = build(load(TINY)), build(load(TINY, {"seed": 1}))
    weights = tmp_path / "w.safetensors"
    save_file(first.task.state_dict(first.server), weights)
    settings = {
        "teacher": {"local": {"distillation": {"teacher": str(weights)}}},
        "frozen": {"model": TINY["model"] | {"weights": str(weights), "freeze": ["conv1*", "bn1*"]}},
    }
    fedsim.run(TINY | settings[file], out=tmp_path / "run")
    fedsim.resume(tmp_path / "run", {"rounds": 3})
    save_file(second.task.state_dict(second.server), weights)
    with pytest.raises(ConfigError, match=r"^data or model: other examples, owners, frozen weights or teacher"):
        fedsim.resume(tmp_path / "run", {"rounds": 4})
