"""The words of `local` for strategies: the law of each, and one strategy of all of them in every runtime."""

import copy
from dataclasses import dataclass

import pytest
import torch
from conftest import (
    CLASSES,
    SIZES,
    _digests,
    close,
    conv_net,
    make_local,
    make_simulation,
    make_strategy,
    make_task,
    trace,
    trace_on_ray,
)
from lab import CONFIG as LAB
from lab import Lab
from small_run import CONFIG, state
from test_laws import RECIPES as LAWS
from test_vectorized import assert_agree, pair
from torch import nn
from torch.nn import functional as F

import fedsim
from fedsim import ClientError, ConfigError, ObjectiveWrapper, Update, Wrapper
from fedsim.errors import WrongReturnError
from fedsim.experiment.build import build
from fedsim.experiment.config import load
from fedsim.experiment.execute import execute
from fedsim.experiment.start import resumed_run
from fedsim.strategies.averaging.fedavg import FedAvg
from fedsim.training.losses import LOSSES

SAME = {"rtol": 0, "atol": 0}


# All words in one strategy


@dataclass(frozen=True, kw_only=True)
class Words(FedAvg):
    """A global model and one of each client's own, whose statistics (Q,) the client keeps, too."""

    broadcast = ("model", "personal")

    def init_server(self, model):
        return {"model": model, "personal": model}

    def init_client(self, model, layout, buffers):
        return {"personal": model, "statistics": buffers}

    def client_update(self, server, client, local):
        x, personal = server["model"], local.separate("personal", buffers=client["statistics"], epochs=2, lr=0.03)
        head = local.layout.mask(local.layout.head.__contains__)

        def ascent(w, batch):  # of SAM; one batch, and one dropout mask
            g, _ = noisy.gradient(w, batch)
            return noisy.gradient(w + 0.05 * g / g.norm(), batch)

        def contrast(w, batch):
            z, logits = local.features(w, batch.x)
            anchor, _ = local.features(x, batch.x)
            return local.label_losses(logits, batch).mean() + 0.1 * (z - anchor).square().mean()

        def pulled(w, batch):
            losses = personal.losses(w, batch)
            return (losses * torch.rand_like(losses)).mean() + 0.05 * (w - server["personal"]).square().sum()

        noisy = local.with_batches(lambda batch: batch._replace(x=batch.x + 0.01 * local.normal(batch.x)))
        y = noisy.train(x, gradient=ascent, after_step=lambda w: w.clamp(-1, 1))
        y = local.train(y, loss=contrast, only=head)
        v = personal.train(client["personal"], loss=pulled, correct=lambda g, w: g + 0.01 * personal.normal(g))
        place = (local.cohort < local.client_id).to(x.dtype).mean()
        delta = y - x + 1e-3 * (local.round + 1 + place) * local.uniform(x)
        kept = {"personal": v, "statistics": personal.buffers}
        return Update({"delta": delta, "personal": v}, local.num_examples, kept)

    def server_update(self, server, mean, info):
        return {"model": server["model"] + mean["delta"], "personal": mean["personal"]}

    def max_steps(self, num_steps, epoch_steps):
        return 2 * num_steps


WORDS = Words()
SETTINGS = {"cohort": {"name": "uniform", "size": 4}, "momentum": 0.5, "weight_decay": 0.01, "clip_norm": 0.5}


@pytest.fixture(scope="module")
def expected():
    """All server entries and all clients' states, round by round."""
    return trace(make_simulation(WORDS, **SETTINGS))


@pytest.mark.parametrize("workers", [1, 3])
def test_all_words_give_one_digest_on_threads(expected, workers):
    assert trace(make_simulation(WORDS, runtime={"name": "threads", "workers": workers}, **SETTINGS)) == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ray's, about its own processes
def test_all_words_give_one_digest_on_ray(expected):
    assert trace_on_ray(WORDS, **SETTINGS) == expected


@pytest.mark.parametrize("sizes", [SIZES, (8, 8, 8, 8)], ids=["padded", "even"])
def test_all_words_agree_in_a_batch_of_clients(sizes):
    assert_agree(pair(WORDS, sizes=sizes, **SETTINGS | {"cohort": "all"}), rounds=2)


def test_all_words_go_on_after_a_stop(tmp_path):
    config = CONFIG | {
        "strategy": {"name": "test_words:Words"},
        "evaluate": {"every": 5},
        "hooks": [],
    }
    whole = fedsim.run(config | {"rounds": 3}, out=tmp_path / "whole").rounds
    fedsim.run(config | {"rounds": 1}, out=tmp_path / "stopped")
    ended = execute(*resumed_run(tmp_path / "stopped", {"rounds": 3})).rounds
    assert [r["fingerprint"] for r in ended] == [r["fingerprint"] for r in whole]
    assert state(tmp_path / "stopped") == state(tmp_path / "whole")


def test_all_words_give_one_digest_on_nodes(tmp_path, monkeypatch):
    """The server keeps the mean of what the nodes keep."""
    config = load(LAB | {"strategy": {"name": "test_words:Words"}, "rounds": 2})

    def played(simulation):
        records = [simulation.round() for _ in range(2)]
        return [(r.train_loss, r.steps, r.fingerprint) for r in records], _digests(simulation.server)

    lab = Lab(tmp_path, monkeypatch, double=0.3).allowing("test_words:Words")
    try:
        assert played(lab.simulation(config, wait=1e5, round_timeout=1e6)) == played(build(config))
    finally:
        lab.close()


# gradient


def smoothed():
    return LOSSES.bind({"name": "cross_entropy", "smoothing": 0.1})


GRADIENTS = {
    name: LAWS[name]
    for name in ("momentum", "adam", "bf16", "channels_last", "lars", "by step", "loss", "distillation")
} | {
    "plain": {},
    "clip": {"clip_norm": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "bf16 momentum": {"precision": "bf16", "momentum": 0.9, "weight_decay": 0.01},
    "bf16 clip": {"precision": "bf16", "clip_norm": 0.1},
    "channels last clip": {"channels_last": True, "clip_norm": 0.1, "decay": "weights", "weight_decay": 0.01},
}


@pytest.mark.parametrize("recipe", GRADIENTS.values(), ids=GRADIENTS)
def test_a_gradient_that_is_the_clients_own_changes_nothing(recipe):
    """Model, statistics and metrics to the bit, with dropout; and what is drawn afterwards."""
    task = make_task(channels_last=recipe.get("channels_last", False))
    plain, given = make_local(task, client=3, **recipe), make_local(task, client=3, **recipe)
    models = plain.train(task.initial_model), given.train(task.initial_model, gradient=given.gradient)
    close(*models, **SAME)
    close(given.buffers, plain.buffers, **SAME)
    close(given.metrics, plain.metrics, **SAME)
    close(given.replica.generator.get_state(), plain.replica.generator.get_state(), **SAME)


@dataclass(frozen=True, kw_only=True)
class Given(FedAvg):
    """FedAvg."""

    def client_update(self, server, client, local):
        y = local.train(server["model"], gradient=lambda w, batch: local.gradient(w, batch))
        return Update({"delta": y - server["model"]}, local.num_examples)


@pytest.mark.parametrize("recipe", [{}, {"momentum": 0.9, "weight_decay": 0.01, "clip_norm": 0.5}], ids=str)
def test_a_gradient_that_is_the_clients_own_changes_nothing_in_a_batch_of_clients(recipe):
    (_, given), (_, plain) = pair(Given(), **recipe), pair("fedavg", **recipe)
    for _ in range(2):
        one, other = plain.round(), given.round()
        close(given.server, plain.server)
        assert (other.steps, other.cohort) == (one.steps, one.cohort)
        assert other.train_loss == pytest.approx(one.train_loss, rel=1e-9)


def test_a_gradient_sees_the_whole_batch_where_others_see_pieces():
    task, sizes = make_task(), []
    local = make_local(task, client=3, batch_size=8, accumulate=2)

    def gradient(w, batch):
        sizes.append(len(batch.y))
        return local.gradient(w, batch)

    found = local.train(task.initial_model, gradient=gradient)
    assert sizes == [8, 5]
    close(found, make_local(task, client=3, batch_size=8).train(task.initial_model), **SAME)


def test_all_gradients_of_a_step_have_one_dropout_mask_and_the_strategys_draws_none_twice():
    """Gradients elsewhere change no statistics, and are no steps; draws between them go on."""
    task, drawn = make_task(), []
    local, plain = make_local(task, client=3, epochs=2), make_local(task, client=3, epochs=2)

    def gradient(w, batch):
        with local.replica.draws:
            drawn.append(torch.rand(()))
            found = local.gradient(w, batch)
            elsewhere = local.gradient(w.clone(), batch)
            local.gradient(torch.zeros_like(w), batch)
            local.gradient(torch.zeros_like(w))
            drawn.append(torch.rand(()))
        close(elsewhere, found, rtol=1e-6, atol=1e-7)
        return found

    local.train(task.initial_model, gradient=gradient)
    plain.train(task.initial_model)
    assert len({float(number) for number in drawn}) == len(drawn) == 16
    assert local.metrics["steps"] == plain.metrics["steps"] == 8
    assert local.replica.snapshot()[1]["bn1.num_batches_tracked"] == 8


@pytest.mark.parametrize(
    ("rules", "recipe", "error", "said"),
    [
        ({"gradient": lambda w, b: w}, {}, TypeError, "local.train: gradient gave Tensor; it should"),
        ({"gradient": lambda w, b: (w[1:], w.sum())}, {}, TypeError, r"local.train: gradient gave .*\(\d+,\); it"),
        ({"gradient": lambda w, b: (w, w)}, {}, TypeError, "local.train: the loss of gradient gave"),
        ({"after_step": lambda w: None}, {}, TypeError, "local.train: after_step gave NoneType"),
        (
            {"only": torch.ones(3)},
            {},
            TypeError,
            r"local.train: only is torch.float32 \(3,\); it should be a mask",
        ),
        ({"loss": max, "gradient": max}, {}, TypeError, "local.train: takes a loss or a gradient, not both"),
        ({"gradient": max}, {"precision": "fp16"}, ConfigError, "local.precision: fp16"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_train_cannot_use_is_one_line(rules, recipe, error, said):
    task = make_task()
    with pytest.raises(error, match=said):
        make_local(task, **recipe).train(task.initial_model, **rules)


# after_step


def test_what_follows_a_step_is_outside_of_momentum_and_decay():
    """As one writes it with torch.optim."""
    task = make_task(lambda: conv_net(dropout=0), dtype=torch.float64)
    recipe = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "epochs": 3}
    local = make_local(task, client=3, **recipe)
    network = copy.deepcopy(task.network).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for batch in local.batches():
        optimizer.zero_grad()
        F.cross_entropy(network(batch.x), batch.y).backward()
        optimizer.step()
        with torch.no_grad():
            for w in network.parameters():
                w.mul_(0.9).clamp_(-0.2, 0.2)
    found = local.train(task.initial_model, after_step=lambda w: (0.9 * w).clamp(-0.2, 0.2))
    close(found, nn.utils.parameters_to_vector(network.parameters()).detach())


# only


def two_norms():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 3, 1),
        nn.BatchNorm2d(3),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    )


LAST = ("3.", "5.")  # the second batch norm, and the head


@pytest.mark.parametrize(
    "recipe",
    [
        {"momentum": 0.9, "weight_decay": 0.1, "clip_norm": 0.5},
        {"optimizer": "adamw", "weight_decay": 0.1, "eps": 1e-6},
        {"optimizer": "adam", "weight_decay": 0.1, "eps": 1e-6},
    ],
    ids=lambda recipe: recipe.get("optimizer", "sgd"),
)
@pytest.mark.parametrize("how", ["plain", "loss", "gradient"])
def test_only_a_part_trains_as_if_the_optimiser_had_only_that_part(recipe, how):
    """Neither decay nor momentum nor statistics move elsewhere, and the norm clipped is that of the part."""
    task = make_task(two_norms, dtype=torch.float64)
    local = make_local(task, client=3, lr=0.05, epochs=3, **recipe)
    network = copy.deepcopy(task.network).train()
    part = [w for name, w in network.named_parameters() if name.startswith(LAST)]
    others = recipe["weight_decay"]
    optimizer = {
        "adam": lambda: torch.optim.Adam(part, 0.05, eps=1e-6, weight_decay=others),
        "adamw": lambda: torch.optim.AdamW(part, 0.05, eps=1e-6, weight_decay=others),
        "sgd": lambda: torch.optim.SGD(part, 0.05, momentum=0.9, weight_decay=others),
    }[recipe.get("optimizer", "sgd")]()
    for batch in local.batches():
        optimizer.zero_grad()
        F.cross_entropy(network(batch.x), batch.y).backward()
        if "clip_norm" in recipe:
            nn.utils.clip_grad_norm_(part, recipe["clip_norm"])
        optimizer.step()
    rules = {"plain": {}, "loss": {"loss": local.loss}, "gradient": {"gradient": local.gradient}}[how]
    only = task.layout.mask(lambda name: name.startswith(LAST))
    found = local.train(task.initial_model, only=only, **rules)
    close(found, nn.utils.parameters_to_vector(network.parameters()).detach())
    close(found[~only], task.initial_model[~only], **SAME)
    moved = task.buffer_layout.split(local.buffers)
    initial = task.buffer_layout.split(task.initial_buffers)
    right = {name: b.detach() for name, b in network.named_buffers() if name in moved}
    close(moved, {name: right[name] if name.startswith(LAST) else initial[name] for name in moved})


def test_single_entries_move_alone():
    task = make_task()
    local = make_local(task, client=3, momentum=0.9, weight_decay=0.1)
    only = torch.rand(task.initial_model.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    moved = local.train(task.initial_model, only=only, after_step=lambda w: w + 1) != task.initial_model
    assert torch.equal(moved, only)


def test_no_gradient_is_computed_of_layers_that_do_not_move():
    """The one of the first layer of a deep head alone would be most of the work."""
    task = make_task(two_norms)
    local = make_local(task)
    only = task.layout.mask(lambda name: name.startswith("5."))
    backward = []
    local.replica.network[2].register_full_backward_hook(lambda *_: backward.append(1))
    local.train(task.initial_model, only=only)
    assert not backward
    local.train(task.initial_model)
    assert backward


def test_lars_has_the_norm_of_the_masked_gradient():
    task = make_task(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES, bias=False)), dtype=torch.float64)
    settings = {"optimizer": "lars", "trust": 0.5, "batch_size": "full", "lr": 0.1}
    local, x = make_local(task, **settings), task.initial_model
    only = torch.arange(len(x)) < 10
    g, _ = local.gradient(x, next(local.batches()))
    g = torch.where(only, g, 0)
    close(local.train(x, only=only), x - 0.1 * 0.5 * x.norm() / g.norm() * g)


# separate


def looked(local, x, *, separate):
    """What a client is after training and drawing, to the bit; with another model before, within and after."""
    if separate:
        other = local.separate("other", epochs=2, lr=0.2)
        other.train(x, loss=lambda w, b: other.losses(w, b).mean() + w.square().sum())
        other.normal(x)
        other.gradient(x)

    def loss(w, batch):
        if separate:
            other.loss(w, batch)
            other.gradient(x, batch)
            other.logits(w.detach(), batch.x, train=True)
        return local.loss(w, batch)

    y = local.train(x, loss=loss)
    if separate:
        other.train(y)
        local.loss(y)
    draws = local.normal(x), local.uniform(x), local.replica.generator.get_state()
    return y, local.buffers, local.private_buffers, local.metrics, draws, local.loss(y)


RECIPES = {"plain": {}, "momentum": {"momentum": 0.9, "epochs": 2}, "distillation": LAWS["distillation"]}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_separate_model_leaves_no_trace_in_the_first(recipe):
    """Statistics, counters, dropout, draws, metrics, and the model to distil from."""
    task = make_task(lambda: conv_net(bn_momentum=None))
    alone, beside = (
        looked(make_local(task, client=3, **recipe), task.initial_model, separate=s) for s in (False, True)
    )
    close(beside, alone, **SAME)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_first_leaves_no_trace_in_a_separate_model(recipe):
    """It is one client's training from the statistics that it received, with numbers and metrics of its own."""
    task, found = make_task(), []
    for first in (False, True):
        local = make_local(task, client=3, **recipe)
        if first:
            local.train(task.initial_model)
            local.normal(task.initial_model)
        other = local.separate("other")
        y = other.train(task.initial_model)
        found.append((y, other.buffers, other.metrics, other.normal(y), other.loss(y)))
        assert local.metrics.keys() == (found[0][2].keys() if first else set())
    close(*found, **SAME)
    plain = make_local(task, client=3, **recipe)
    assert not torch.equal(plain.train(task.initial_model), found[0][0])  # other dropout


def test_a_separate_model_trains_as_the_first_does():
    """Where nothing is drawn the two are one, from any statistics."""
    task = make_task(lambda: conv_net(dropout=0))
    buffers = task.initial_buffers + 0.5
    local, plain = make_local(task, epochs=2), make_local(task, epochs=2)
    plain.replica.begin_client(buffers, seed=0)
    other = local.separate("other", buffers=buffers)
    close(other.train(task.initial_model), plain.train(task.initial_model), **SAME)
    close(other.buffers, plain.buffers, **SAME)
    close(other.metrics, plain.metrics, **SAME)
    assert not torch.equal(other.buffers, buffers)
    close(local.buffers, task.initial_buffers, **SAME)


def test_a_separate_model_has_epochs_and_a_rate_of_its_own():
    task = make_task()
    local = make_local(task, client=3, epochs=2, lr_every="step", warmup=2, lr=0.1)
    more, slow = local.separate("more", epochs=3, record=True), local.separate("slow", lr=0.5 * local.lr)
    assert (more.num_steps, slow.num_steps, local.num_steps) == (12, 8, 8)
    more.train(task.initial_model)
    assert len([*more.batches()]) == local.metrics["steps"] == 12  # recorded as the client's own
    plain = make_local(task, client=3, epochs=2, lr=0.5 * local.lr).separate("slow")
    close(slow.train(task.initial_model), plain.train(task.initial_model), **SAME)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("twice", {}, "local.separate: 'twice' was given before"),
        (3, {}, "local.separate: 3 is no name"),
        ("a", {"epochs": 0}, "local.separate: epochs is 0; it should be a whole number >= 1"),
        (
            "a",
            {"buffers": torch.zeros(1)},
            r"local.separate: buffers is .* \(1,\); it should be .* \(6,\)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_separate_model_that_cannot_be_is_one_line(name, options, said):
    local = make_local(make_task())
    local.separate("twice")
    with pytest.raises(TypeError, match=said):
        local.separate(name, **options)


def test_a_training_within_a_training_leaves_it_as_it_was():
    task = make_task()
    local, plain = make_local(task, client=3, momentum=0.9), make_local(task, client=3, momentum=0.9)
    other = local.separate("other")

    def correct(g, w):
        other.train(torch.zeros_like(w))
        return g

    close(local.train(task.initial_model, correct=correct), plain.train(task.initial_model), **SAME)


@dataclass(frozen=True, kw_only=True)
class Apart(FedAvg):
    """Two models a client, with schedules of their own."""

    def client_update(self, server, client, local):
        x = server["model"]
        y = local.train(x, correct=lambda g, w: g + 0.01 * torch.randn_like(g))
        other = local.separate("other", epochs=2)
        z = other.train(x, correct=lambda g, w: g + 0.01 * torch.randn_like(g))
        return Update({"delta": y - x + 0.5 * (z - x) + torch.rand_like(x)}, local.num_examples)


def test_separate_models_agree_in_a_batch_of_clients():
    """Rates by the step, and random numbers of torch in the strategy."""
    assert_agree(pair(Apart(), epochs=3, lr_every="step", warmup=2), rounds=2)


# losses, label_losses, features, logits


@pytest.mark.parametrize("train", [True, False])
def test_losses_are_those_of_the_logits_and_their_mean_the_loss(train):
    task = make_task(lambda: conv_net(dropout=0))
    local = make_local(task, batch_size="full", client=3, **LAWS["loss"])
    batch, w = next(local.batches()), task.initial_model
    losses = local.losses(w, batch, train=train)
    close(local.label_losses(local.logits(w, batch.x, train=train), batch), losses, **SAME)
    close(losses.mean(), local.loss(w, batch) if train else local.loss(w))
    assert losses.shape == (13,)


def test_mixed_labels_have_their_losses():
    task = make_task(lambda: conv_net(dropout=0))
    local = make_local(task, client=3, **LAWS["augment"])
    batch = next(local.batches())
    assert batch.mixed_labels is not None
    logits = local.logits(task.initial_model, batch.x, train=True)
    close(local.label_losses(logits, batch).mean(), local.loss(task.initial_model, batch))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_through_the_head_are_the_logits(precision):
    task = make_task()
    local = make_local(task, client=3, precision=precision)
    batch, head = next(local.batches()), task.layout.split(task.initial_model)
    z, logits = local.features(task.initial_model, batch.x)
    assert (z.shape, z.dtype) == ((4, 48), torch.float32)
    near = {"rtol": 0.02, "atol": 0.02} if precision == "bf16" else {}
    torch.testing.assert_close(z @ head["fc.weight"].T + head["fc.bias"], logits.float(), **near)
    close(logits, local.logits(task.initial_model, batch.x), **SAME)
    assert task.layout.head == {"fc.weight", "fc.bias"}


class Ends(nn.Module):
    def __init__(self):
        super().__init__()
        self.late, self.unused = nn.Linear(16, CLASSES), nn.Linear(16, 8)
        self.early = nn.Linear(16, 16)

    def forward(self, x):
        return self.late(self.early(x.flatten(1)).tanh())


def test_the_head_is_the_last_linear_layer_that_runs_or_the_one_that_is_named():
    assert make_task(Ends).layout.head == {"late.weight", "late.bias"}
    assert make_task(Ends, head="early").layout.head == {"early.weight", "early.bias"}
    x = torch.ones(2, 16)
    assert make_local(make_task(Ends, head="early")).features(make_task(Ends).initial_model, x)[0].equal(x)
    with pytest.raises(ConfigError, match=r"model.head: 'middle' is no layer of the network; its last ones are"):
        make_task(Ends, head="middle")
    unused = make_task(Ends, head="unused")
    with pytest.raises(ConfigError, match=r"model.head: unused did not run"):
        make_local(unused).features(unused.initial_model, x)
    none = make_task(lambda: nn.Sequential(nn.Conv2d(1, CLASSES, 4), nn.Flatten()))
    with pytest.raises(ConfigError, match=r"model.head: no linear layer"):
        make_local(none).features(none.initial_model, torch.ones(2, 1, 4, 4))


def test_weights_that_are_not_trained_are_in_eval_mode_by_default():
    """A teacher, a score, an anchor; weights that require a gradient, as in a loss, are in training mode."""
    task = make_task(lambda: conv_net(dropout=0))
    local, w = make_local(task), task.initial_model
    x = next(local.batches()).x
    by_mode = [local.logits(w, x, train=mode) for mode in (False, True)]
    assert not torch.allclose(*by_mode)
    close(local.logits(w, x), by_mode[0], **SAME)
    close(local.logits(w.clone().requires_grad_(), x).detach(), by_mode[1], **SAME)
    modes = []

    def loss(w, batch):
        modes.extend(torch.allclose(local.logits(v, x), by_mode[0]) for v in (task.initial_model, w))
        return local.loss(w, batch)

    local.train(w, loss=loss)
    assert modes[:2] == [True, False]


# normal, uniform, round


def test_draws_have_a_key_and_no_two_are_the_same():
    """By seed, round, client and model, whatever else was drawn."""
    task, w = make_task(), torch.zeros(500)
    drawn = {
        (seed, number, client): make_local(task, seed=seed, number=number, client=client).normal(w)
        for seed, number, client in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    }
    local = make_local(task)
    local.train(task.initial_model)
    close(local.normal(w), drawn[0, 0, 0], **SAME)
    view = local.with_batches(lambda batch: batch)
    more = [view.normal(w), local.normal(w), local.separate("other").normal(w), local.uniform(w)]
    values = [*drawn.values(), *more]
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    assert abs(float(torch.cat(values[:-1]).mean())) < 0.1
    assert abs(float(torch.cat(values[:-1]).std()) - 1) < 0.1
    assert 0 <= float(more[-1].min()) < 0.1
    assert 0.9 < float(more[-1].max()) < 1
    assert make_local(task, number=4).round == 4


# with_batches


def test_changed_batches_are_seen_everywhere():
    """By training, loss, gradient and batches; of two changes the later one comes last."""
    task = make_task()
    turned = lambda batch: batch._replace(y=(batch.y + 1) % CLASSES)  # noqa: E731
    local = make_local(task, client=3).with_batches(lambda b: turned(turned(b))).with_batches(turned)
    plain, x = make_local(task, client=3), task.initial_model
    for mine, theirs in zip(local.batches(), plain.batches(), strict=True):
        close(mine.y, theirs.y, **SAME)  # three turns are none
    close(local.train(x), plain.train(x), **SAME)
    close(local.gradient(x), plain.gradient(x), **SAME)
    close(local.loss(x), plain.loss(x), **SAME)
    once = make_local(task, client=3).with_batches(turned)
    assert once.loss(x) != plain.loss(x)
    assert not torch.equal(once.train(x), plain.train(x))


def test_a_change_of_batches_keeps_the_number_of_examples():
    local = make_local(make_task()).with_batches(lambda batch: batch._replace(x=batch.x[1:], y=batch.y[1:]))
    with pytest.raises(TypeError, match=r"local.with_batches: gave 2 examples; .* a Batch of 3"):
        next(local.batches())


# Strategies and wrappers as they were before these words


class Slower(ObjectiveWrapper):
    """Each gradient times `factor`; it knows two words."""

    def __init__(self, inner, factor):
        super().__init__(inner)
        self.factor = factor

    def train(self, start, *, loss=None, correct=None):
        def scaled(g, w):
            return self.factor * (correct(g, w) if correct else g)

        return super().train(start, loss=loss, correct=scaled)


@dataclass(frozen=True, kw_only=True)
class Damped(Wrapper):
    """Any strategy, with gradients times `factor`."""

    factor: float = 1.0

    def client_update(self, server, client, local):
        return super().client_update(server, client, Slower(local, self.factor))


@dataclass(frozen=True, kw_only=True)
class Twice(FedAvg):
    """FedAvg with clients that train twice; weighted by the number of their steps."""

    def client_update(self, server, client, local):
        x = server["model"]
        y = local.train(local.train(x))
        return Update({"delta": y - x}, weight=2 * local.num_steps)

    def max_weight(self, num_examples, num_steps):
        return 2 * num_steps

    def max_steps(self, num_steps, epoch_steps):
        return 2 * num_steps


@pytest.mark.parametrize("inner", ["fedprox", "scaffold"])
def test_a_wrapper_that_knows_two_words_works_with_strategies_of_these(inner):
    assert trace(make_simulation(Damped(inner=make_strategy(inner)))) == trace(make_simulation(inner))
    assert_agree(pair(Damped(inner=make_strategy(inner), factor=0.5)), rounds=1)


def test_a_wrapper_that_knows_two_words_refuses_the_others_in_a_line():
    with pytest.raises(ClientError, match=r"train\(\) got an unexpected keyword argument 'gradient'") as error:
        make_simulation(Damped(inner=Given())).round()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rule", ["gradient", "correct"])
def test_a_rule_that_writes_to_the_model_is_refused(rule):
    """Or the step would begin elsewhere, without a word."""

    def gradient(w, batch):
        found = local.gradient(w, batch)
        w.mul_(0.5)
        return found

    def correct(g, w):
        w.mul_(0.5)
        return g

    local = make_local(make_task())
    with pytest.raises(WrongReturnError, match=f"^local.train: {rule} wrote to w in place"):
        local.train(local.replica.task.initial_model, **{rule: {"gradient": gradient, "correct": correct}[rule]})
