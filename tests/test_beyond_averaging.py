"""Laws of what federated learning does to a network besides averaging its weights.

Batch-norm statistics and where they live, examples of the server's own, personal layers, a running mean of the
global model.
"""

import io
import json
from copy import deepcopy
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np
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
from rich.console import Console
from safetensors.torch import load_file
from small_run import CONFIG, left
from torch import nn

import fedsim
from fedsim import ConfigError, RoundError, Wrapper
from fedsim.data import PARTITIONS, Dataset, FederatedData
from fedsim.data.federated import public_mask, without_rows
from fedsim.data.partition import content_hash
from fedsim.data.picture import draw, label_table
from fedsim.experiment.build import build, build_data
from fedsim.experiment.config import load
from fedsim.experiment.folder import describe
from fedsim.experiment.start import resumed_run
from fedsim.federated.recalibration import Recalibrate
from fedsim.types import Stream, random

BUFFERS = ["average", "private", "frozen", "recalibrated"]
SOME = {"name": "uniform", "size": 4}
THREADS = {"name": "threads", "workers": 3}
PUBLIC = 11


def federation(strategy="fedavg", *, buffers="average", recalibrate=None, data=None, **settings):
    """Of a strategy with these buffers, or of one that has its own; the server has examples."""
    if isinstance(strategy, str):
        inner = {"inner": {"name": "fedadam", "buffers": buffers}}
        strategy = make_strategy(strategy, **inner if strategy == "personal" else {"buffers": buffers})
    if strategy.buffers == "recalibrated":
        recalibrate = recalibrate or Recalibrate(examples=9, batch_size=4)
    return make_simulation(strategy, recalibrate=recalibrate, data=data or make_data(public=PUBLIC), **settings)


def refused(make, *words):
    """In one line that says all of this."""
    with pytest.raises(ConfigError) as caught:
        make()
    for each in words:
        assert each in str(caught.value)
    assert "\n" not in str(caught.value)


# What becomes of batch-norm statistics


PAIRS = [(strategy, buffers) for strategy in ("fedavg", "scaffold", "fedbn", "personal") for buffers in BUFFERS]
OWN = [("fedbn", "recalibrated"), ("personal", "recalibrated")]  # statistics of a model that no client has


@pytest.mark.parametrize(("strategy", "buffers"), sorted(set(PAIRS) - set(OWN)))
def test_runtimes_agree(strategy, buffers):
    serial, threads = (
        trace(federation(strategy, buffers=buffers, cohort=SOME, runtime=runtime, ema=0.5))
        for runtime in ("serial", THREADS)
    )
    assert serial == threads


@pytest.mark.parametrize(("strategy", "buffers"), OWN)
def test_statistics_of_the_global_model_do_not_fit_personal_ones(strategy, buffers):
    refused(lambda: federation(strategy, buffers=buffers), "strategy.buffers: recalibrated", "private or average")


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "fedbn"])
def test_weights_do_not_depend_on_statistics(strategy):
    """For training normalises with those of the batch."""
    runs = [federation(strategy, buffers=b, cohort=SOME) for b in BUFFERS if (strategy, b) not in OWN]
    for _ in range(3):
        for run in runs:
            run.round()
        assert len({run.server["model"].numpy().tobytes() for run in runs}) == 1


def test_who_has_statistics():
    runs = {buffers: federation(buffers=buffers) for buffers in BUFFERS}
    done = {buffers: run.round() for buffers, run in runs.items()}
    start, q = runs["average"].task.initial_buffers, runs["average"].task.initial_buffers.nbytes
    moved = {buffers for buffers, run in runs.items() if not torch.equal(run.server["buffers"], start)}
    assert moved == {"average", "recalibrated"}
    assert {b for b, run in runs.items() if run.clients} == {"private"}
    up = {buffers: each.bytes_up for buffers, each in done.items()}
    assert up["private"] == up["frozen"] == up["recalibrated"] == up["average"] - q * len(SIZES)


def test_a_wrapper_has_the_inner_strategys():
    wrapped = Wrapper(inner=make_strategy("fedavg", buffers="frozen"))
    assert wrapped.buffers == "frozen"
    assert trace(make_simulation(wrapped)) == trace(make_simulation(make_strategy("fedavg", buffers="frozen")))
    refused(lambda: make_strategy("personal", buffers="frozen"), "strategy.buffers: 'buffers' is unknown")


def settings_of(buffers):
    """Of a run that has all of it at once."""
    settings = {
        "strategy": {"name": "scaffold", "buffers": buffers},
        "data": CONFIG["data"] | {"public": 0.2},
        "evaluate": {"every": 1, "clients": True},
        "ema": 0.7,
        "hooks": ["tensorboard"],
    }
    if buffers == "recalibrated":
        settings |= {"recalibrate": {"examples": 10, "batch_size": 5}}
    return CONFIG | settings


@pytest.mark.parametrize("buffers", BUFFERS)
def test_a_run_that_is_resumed_ends_as_if_it_had_never_stopped(tmp_path, buffers):
    config = settings_of(buffers)
    fedsim.run(config, out=tmp_path / "whole")
    fedsim.run(config, {"rounds": 2}, out=tmp_path / "resumed")
    with pytest.warns(UserWarning, match="rounds: 4, and was 2"):
        fedsim.resume(tmp_path / "resumed", {"rounds": 4})
    assert left(tmp_path / "resumed") == left(tmp_path / "whole")
    mean, again = (tmp_path / name / "ema.safetensors" for name in ("whole", "resumed"))
    assert mean.read_bytes() == again.read_bytes()


# Recalibrated statistics


def examples_of(simulation, rows):
    return simulation.data.batch(torch.from_numpy(rows))[0]


@pytest.mark.parametrize("source", ["public", "clients"])
@pytest.mark.parametrize(("examples", "batch_size", "used"), [(8, 4, 8), (10, 4, 8), (3, 4, 3), (99, 11, None)])
def test_recalibrated_statistics_are_means_over_batches(source, examples, batch_size, used):
    """Of means, and of variances by n - 1, whatever the statistics were before."""
    task = make_task(dtype=torch.float64)
    data = make_data(public=PUBLIC, dtype=torch.float64)
    settings = Recalibrate(examples=examples, batch_size=batch_size, source=source)
    simulation = federation(buffers="recalibrated", task=task, data=data, recalibrate=settings)
    simulation.round()
    simulation.server["buffers"] = torch.full_like(simulation.server["buffers"], 1e6)
    simulation.round()

    stream = random(0, Stream.RECALIBRATE, 1)  # of the second round
    if source == "public":
        rows = stream.permutation(data.public)[:examples]
        assert len(rows) == min(examples, PUBLIC)
    else:
        rows = data.sample(examples, stream)
        assert len(rows) == min(examples, sum(SIZES))
    used = used or len(rows) - len(rows) % batch_size
    parameters = task.layout.split(simulation.server["model"])
    means, variances = [], []
    for part in torch.split(examples_of(simulation, rows)[:used], batch_size):
        values = torch.conv2d(part, parameters["conv1.weight"], parameters["conv1.bias"], padding=1)
        means.append(values.mean((0, 2, 3)))
        variances.append(values.var((0, 2, 3), correction=1))
    found = task.buffer_layout.split(simulation.server["buffers"])
    close(found["bn1.running_mean"], torch.stack(means).mean(0))
    close(found["bn1.running_var"], torch.stack(variances).mean(0))


def test_recalibration_is_torchs_cumulative_average_to_the_bit():
    task = make_task(lambda: conv_net(dropout=0, bn_momentum=None))
    simulation = federation(buffers="recalibrated", task=task)
    simulation.round()
    rows = random(0, Stream.RECALIBRATE, 0).permutation(simulation.data.public)[:8]
    network = deepcopy(task.network)
    network.load_state_dict(task.state_dict(simulation.server))
    network.bn1.reset_running_stats()
    network.train()
    with torch.no_grad():
        for part in torch.split(examples_of(simulation, rows), 4):
            network(part)
    found = task.buffer_layout.split(simulation.server["buffers"])
    assert torch.equal(found["bn1.running_mean"], network.bn1.running_mean)
    assert torch.equal(found["bn1.running_var"], network.bn1.running_var)


def test_recalibration_leaves_a_network_its_momentum():
    simulation = federation(buffers="recalibrated", task=make_task(lambda: conv_net(bn_momentum=0.3)))
    simulation.round()
    assert simulation.runtime.worker.replica.network.bn1.momentum == 0.3


def test_recalibration_that_fails_fails_the_round(monkeypatch):
    def fails(replica, data, server, job):
        raise ValueError("no batch")

    simulation = federation(buffers="recalibrated")
    monkeypatch.setattr("fedsim.federated.simulation.Recalibration", lambda *settings: fails)
    with pytest.raises(RoundError, match=r"round 1: recalibrate: ValueError: no batch"):
        simulation.round()
    assert simulation.number == 0


def plain_net():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def instance_net():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2, track_running_stats=True), nn.Flatten(), nn.Linear(8, CLASSES)
    )


def test_what_cannot_be_recalibrated_is_refused():
    recalibrated = make_strategy("fedavg", buffers="recalibrated")
    public, clients = Recalibrate(), Recalibrate(source="clients")
    needs = "strategy.buffers: recalibrated needs settings, such as recalibrate.source=public"
    refused(lambda: make_simulation(recalibrated), needs)
    refused(lambda: make_simulation(recalibrate=public), "recalibrate: belongs to", "and that is average")
    refused(
        lambda: make_simulation(recalibrated, recalibrate=public),
        *("recalibrate.source: public", "has 0 examples", "raise data.public"),
    )
    for network, words in (
        (plain_net, "the network has none"),
        (instance_net, "only statistics of batch norm, and 1.running_mean is none"),
    ):
        task = make_task(network)
        refused(lambda t=task: make_simulation(recalibrated, task=t, recalibrate=clients), "recalibrated", words)
    base = settings_of("recalibrated")
    for key, value in (("examples", 1), ("batch_size", 1), ("source", "server")):
        refused(lambda k=key, v=value: load(base, {f"recalibrate.{k}": v}), f"recalibrate.{key}: ")
    refused(lambda: build(load(base, {"data.public": 0.0})), "recalibrate.source: public")
    refused(lambda: build(load(CONFIG, {"recalibrate.examples": 10})), "recalibrate: belongs to")


@pytest.mark.parametrize("buffers", ["private", "frozen"])
def test_no_statistics_are_private_or_frozen_too(buffers):
    """A sweep over normalisations need not know which of them keep any."""
    runs = [federation(buffers=b, task=make_task(plain_net)) for b in (buffers, "average")]
    assert trace(runs[0], rounds=1)[0]["fingerprint"] == trace(runs[1], rounds=1)[0]["fingerprint"]


# Examples of the server's own


def dataset(n=200, **more):
    """Whose x tells the row."""
    x, y = torch.arange(n).float()[:, None], torch.arange(n) % CLASSES
    return Dataset(x, y, x[:5], y[:5], CLASSES, **more)


def divided(data, share, clients=4, partition="iid", seed=0):
    public = public_mask(data, share, seed)
    rest, stream = without_rows(data, public), random(seed, Stream.PARTITION)
    owners = PARTITIONS.make(partition, np.ndarray, rest, clients, stream)
    return FederatedData(data, owners, clients=clients, holdout=0.25, public=public, seed=seed)


@pytest.mark.parametrize("partition", ["iid", "shards", {"name": "dirichlet", "alpha": 0.5}])
def test_every_example_is_the_servers_or_one_clients(partition):
    data = divided(dataset(), 0.3, partition=partition)
    assert len(data.public) == 60
    parts = [data.public, *(rows for k in range(4) for rows in (data.rows(k), data.held_out(k)))]
    assert sorted(np.concatenate(parts)) == list(range(200))
    for k in range(4):
        mine = np.sort(np.concatenate([data.rows(k), data.held_out(k)]))
        np.testing.assert_array_equal(mine, np.flatnonzero(data.owners == k))
        x, y = data.batch(torch.from_numpy(data.rows(k)))
        assert x[:, 0].tolist() == data.rows(k).tolist()
        assert y.tolist() == (data.rows(k) % CLASSES).tolist()
    assert (data.owners[data.public] == -1).all()


def test_the_others_are_partitioned_as_if_they_were_all():
    whole = dataset()
    public = public_mask(whole, 0.3, seed=5)
    kept = torch.from_numpy(~public)
    alone = Dataset(whole.x_train[kept], whole.y_train[kept], whole.x_test, whole.y_test, CLASSES)
    spec = {"name": "dirichlet", "alpha": 0.5}
    expected = PARTITIONS.make(spec, np.ndarray, alone, 4, random(5, Stream.PARTITION))
    np.testing.assert_array_equal(divided(whole, 0.3, partition=spec, seed=5).owners[~public], expected)
    assert not np.array_equal(public, public_mask(whole, 0.3, seed=6))
    assert without_rows(whole, public_mask(whole, 0.0, seed=5)) is whole


def test_natural_clients_keep_their_names_apart_from_gaps():
    data = divided(dataset(owner=torch.arange(200) % 50 + 100), 0.2, clients=50, partition="natural")
    others = data.owners >= 0
    assert (data.owners[others] == np.flatnonzero(others) % 50).all()


def test_mapped_examples_are_not_copied():
    data = dataset(mapped=True)
    federated = divided(data, 0.3)
    assert without_rows(data, public_mask(data, 0.3, seed=0)).x_train.is_meta
    assert federated._x_train is data.x_train
    rows = torch.from_numpy(federated.public.copy())
    assert federated.batch(rows)[0][:, 0].tolist() == rows.tolist()


def test_a_sample_is_of_what_clients_train_on():
    data = divided(dataset(), 0.3)
    everything = np.sort(np.concatenate([data.rows(k) for k in range(4)]))
    np.testing.assert_array_equal(np.sort(data.sample(1000, random(0, Stream.RECALIBRATE))), everything)
    drawn = np.concatenate([data.sample(30, random(0, Stream.RECALIBRATE, i)) for i in range(60)])
    assert all(len(set(part)) == 30 for part in drawn.reshape(60, 30))
    assert set(drawn) == set(everything)


def test_what_is_told_of_a_partition_leaves_the_server_out(tmp_path):
    data, without_any = divided(dataset(), 0.3), divided(dataset(), 0.0)
    told = describe(data)
    assert (told["examples"], told["public"], np.sum(told["labels_by_client"])) == (200, 60, 140)
    assert told["hash"] == content_hash(data.owners) != describe(without_any)["hash"]
    assert data.digest() != without_any.digest()
    console = Console(width=80, file=io.StringIO())
    console.print(label_table(data))
    assert "4 clients, 140 examples" in console.file.getvalue()
    draw(data.labels.numpy(), data.owners, CLASSES, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_a_config_sets_examples_apart():
    config = load(CONFIG, {"data.public": 0.25})
    data = build_data(config)
    assert (len(data.public), len(data.owners)) == (15, 60)
    np.testing.assert_array_equal(data.public, build_data(config).public)
    for share in (1.0, -0.1):
        refused(lambda s=share: load(CONFIG, {"data.public": s}), "data.public: ", "a number >= 0 and < 1")


# Personal layers


@dataclass(frozen=True, kw_only=True)
class Doubled(Wrapper):
    """Sends twice each message."""

    def client_update(self, server, client, local):
        update = super().client_update(server, client, local)
        return update._replace(message={name: value * 2 for name, value in update.message.items()})


INNER = [
    "fedavg",
    "fedprox",
    "scaffold",
    "fedadam",
    "fedyogi",
    "fedadagrad",
    {"name": "power_of_choice", "size": 3},
]


@pytest.mark.parametrize("layers", [["fc*"], ["conv1.*", "bn1.bias"]], ids=["last", "first"])
@pytest.mark.parametrize("inner", INNER, ids=str)
def test_the_server_sees_no_change_of_personal_layers(inner, layers):
    simulation = make_simulation(make_strategy("personal", layers=layers, inner=inner), cohort=SOME)
    personal = simulation.task.layout.mask(lambda name: any(fnmatchcase(name, pattern) for pattern in layers))
    start = {name: value.clone() for name, value in simulation.server.items()}
    for _ in range(3):
        simulation.round()
    for name, value in simulation.server.items():
        if value.shape == personal.shape and name != "v":  # of which FedAdam's decay changes all
            assert torch.equal(value[personal], start[name][personal])
            assert (value != start[name])[~personal].any()
    kept = [state[simulation.strategy.entry("private")] for state in simulation.clients.values()]
    assert {len(each) for each in kept} == {int(personal.sum())}
    assert all(not torch.equal(a, b) for i, a in enumerate(kept) for b in kept[:i])
    assert all(not state["c"][personal].any() for state in simulation.clients.values() if "c" in state)


def test_a_client_uses_shared_and_personal_layers_together():
    simulation = make_simulation("personal")
    simulation.round()
    fc = simulation.task.layout.mask(lambda name: name.startswith("fc"))
    state, task = simulation.clients[3], simulation.task
    own = simulation.strategy.client_model(simulation.server, state, task.layout)
    assert torch.equal(own[fc], state[simulation.strategy.entry("private")])
    assert torch.equal(own[~fc], simulation.server["model"][~fc])
    server = simulation.server | {"model": own}
    found = make_simulation("fedavg", task=task)
    found.server = server
    assert simulation.evaluate_clients([3]) == found.evaluate_clients([3])


@pytest.mark.parametrize("inner", ["fedavg", "fedprox"])
def test_for_one_client_personal_layers_change_nothing(inner):
    task, data = make_task(dtype=torch.float64), make_data([20], dtype=torch.float64)
    plain = make_simulation(make_strategy(inner), task=task, data=data)
    own = make_simulation(make_strategy("personal", inner=inner), task=task, data=data)
    for _ in range(3):
        plain.round()
        own.round()
        model = own.strategy.client_model(own.server, own.clients[0], task.layout)
        close(model, plain.server["model"])


def test_fedbn_is_fedavg_with_personal_norms_and_statistics():
    inner = {"name": "fedavg", "buffers": "private"}
    personal = make_strategy("personal", layers=["bn1.*"], inner=inner)
    one, other = (trace(make_simulation(strategy, cohort=SOME)) for strategy in (personal, "fedbn"))
    assert by_short_names(one) == by_short_names(other)


def by_short_names(records):
    """What `trace` gives, with entries of clients' states without the number of their wrapper."""
    for record in records:
        states = record["clients"].items()
        record["clients"] = {k: {n.rpartition(".")[2]: v for n, v in state.items()} for k, state in states}
    return records


def test_wrappers_go_inside_and_outside():
    inside = make_strategy("personal")
    inside = replace(inside, inner=Doubled(inner=inside.inner))
    outside = Doubled(inner=make_strategy("personal"))
    one, other = (trace(make_simulation(strategy)) for strategy in (inside, outside))
    assert by_short_names(one) == by_short_names(other)


def test_what_has_no_personal_layers_is_refused():
    def made(**settings):
        return lambda: make_simulation(make_strategy("personal", **settings))

    refused(made(layers=["head*"]), "strategy.layers: 'head*' matches none of conv1.weight", "fc.bias")
    refused(made(layers=["*"]), "strategy.layers: ['*'] must match some of", "not all")
    refused(made(layers=[]), "strategy.layers: [] must match some of")
    refused(made(inner="fedsgd"), "strategy.inner: fedsgd trains no layers at the client")
    refused(made(inner="fedbn"), "strategy.inner: FedBN has personal models of its own")
    refused(made(inner={"name": "personal", "layers": ["fc*"], "inner": "fedavg"}), "Personal has personal models")
    refused(made(inner={"name": "scaffold"}, layers=["fc*"], extra=1), "strategy.extra")


# A running mean of the global model


@pytest.mark.parametrize("buffers", BUFFERS)
def test_the_running_mean_is_by_its_formula(buffers):
    data = make_data(public=PUBLIC, dtype=torch.float64)
    simulation = federation(buffers=buffers, task=make_task(dtype=torch.float64), data=data, ema=0.7)
    mean = {name: simulation.server[name].clone() for name in ("model", "buffers")}
    for _ in range(3):
        simulation.round()
        mean = {name: 0.7 * value + (1 - 0.7) * simulation.server[name] for name, value in mean.items()}
        assert all(torch.equal(simulation.ema[name], value) for name, value in mean.items())


def test_a_mean_that_forgets_at_once_is_the_model():
    simulation = make_simulation(ema=0.0)
    simulation.round()
    assert simulation.evaluate(7, simulation.ema) == simulation.evaluate(7)


def test_a_mean_changes_nothing_else():
    def shown(**settings):
        found = trace(make_simulation("scaffold", cohort=SOME, **settings))
        for each in found:
            each["server"] = {name: value for name, value in each["server"].items() if "ema" not in name}
        return found

    assert shown(ema=0.9) == shown()


def test_a_round_given_up_leaves_the_mean():
    config = load(CONFIG, {"ema": 0.5, "availability": {"drop": 1.0}})
    simulation = build(config)
    before = simulation.ema["model"].clone()
    assert simulation.round().absent
    assert torch.equal(simulation.ema["model"], before)


@dataclass(frozen=True, kw_only=True)
class Takes(Wrapper):
    """A name that is not its own, from the start or later."""

    name: str
    later: bool = False

    def init_server(self, model):
        return super().init_server(model) | ({} if self.later else {self.name: model})

    def server_update(self, server, mean, info):
        assert not {"buffers", "ema.model", "ema.buffers"} & set(server)
        return super().server_update(server, mean, info) | {self.name: server["model"]}


@pytest.mark.parametrize("name", ["buffers", "ema.model", "ema.buffers"])
def test_no_strategy_has_these_names(name):
    taken = Takes(inner=make_strategy("fedavg"), name=name)
    refused(lambda: make_simulation(taken), f"init_server made {name!r}")
    with pytest.raises(RoundError, match=f"server_update: gave '{name}', which init_server did not make"):
        make_simulation(replace(taken, later=True), ema=0.5).round()


def test_a_run_tells_and_keeps_the_mean(tmp_path):
    result = fedsim.run(settings_of("average"), out=tmp_path / "run")
    simulation = build(load(result.folder / "config.yaml"))
    for record in result.rounds:
        simulation.round()
        found = simulation.evaluate(500, simulation.ema)
        assert (record["ema_test_loss"], record["ema_test_accuracy"]) == (found.loss, found.accuracy)
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary["ema_test_accuracy"] == result.rounds[-1]["ema_test_accuracy"]
    network = deepcopy(simulation.task.network)
    network.load_state_dict(load_file(result.folder / "ema.safetensors"))
    assert torch.equal(nn.utils.parameters_to_vector(network.parameters()).detach(), simulation.ema["model"])
    means = simulation.task.buffer_layout.split(simulation.ema["buffers"])
    assert torch.equal(network.bn1.running_mean, means["bn1.running_mean"])
    for ema in (0.9, None):
        refused(
            lambda d=ema: resumed_run(tmp_path / "run", {"rounds": 5, "ema": d}), "ema: ", "changes the result"
        )


def test_without_a_mean_there_is_no_word_of_it(tmp_path):
    result = fedsim.run(CONFIG, {"rounds": 1}, out=tmp_path / "run")
    assert not [key for key in (*result.rounds[0], *result.summary) if "ema" in key]
    assert not (tmp_path / "run/ema.safetensors").exists()
    for decay in (1.0, -0.5, "x"):
        refused(lambda d=decay: load(CONFIG, {"ema": d}), "ema: ", "a number >= 0 and < 1")


# On real images


def test_statistics_on_digits_of_few_labels_a_client():
    """After a few short rounds of FedAvg; the margins are wide for all seeds that were tried."""
    settings = {
        "rounds": 12,
        "data": {"name": "digits", "clients": 20, "partition": {"name": "dirichlet", "alpha": 0.1}, "public": 0.1},
        "model": "cnn_bn",
        "strategy": "fedavg",
        "cohort": {"name": "uniform", "fraction": 0.5},
        "local": {"steps": 2, "batch_size": 16, "lr": 0.1},
        "runtime": "serial",
    }
    loss, own = {}, {}
    for name, changed in {
        "average": {},
        "private": {"strategy.buffers": "private"},
        "frozen": {"strategy.buffers": "frozen"},
        "recalibrated": {"strategy.buffers": "recalibrated", "recalibrate": {}},
        "group norm": {"model.norm": "group"},
    }.items():
        simulation = build(load(settings, changed))
        after = [simulation.round() and simulation.evaluate().loss for _ in range(12)]
        loss[name] = np.mean(after[-4:])
        own[name] = np.mean([each.loss for each in simulation.evaluate_clients().values()])
    assert loss["recalibrated"] < loss["average"] < loss["group norm"] < loss["frozen"]
    assert loss["private"] == loss["frozen"]  # of the global model, which has the initial statistics in both
    assert own["private"] < own["frozen"]
