"""Laws of the numbers beside a message: what strategies declare is kept, and who does not keep it is refused."""

import logging
import re
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import SIZES, make_data, make_simulation, make_strategy, trace
from hypothesis import given
from hypothesis import strategies as st
from lab import CONFIG, Lab, shown

from fedsim import ClientError, ConfigError, Recipe, RoundError, Wrapper
from fedsim.data.federated import batch_count, batch_sizes
from fedsim.experiment.build import build
from fedsim.experiment.config import load
from fedsim.federated.simulation import Failures
from fedsim.flower import wire
from fedsim.flower.messages import Answer, Invitation, Joined
from fedsim.flower.roster import Roster
from fedsim.runtimes.serial import Serial
from fedsim.strategies import CATALOGUE

DROP = Failures(policy="drop")
STRATEGIES = [*CATALOGUE, "personal of scaffold"]
RECIPES = [{"drop_last": True}, {"min_batch": 3}, {"batch_size": "full"}, {"batch_size": 3, "drop_last": True}]
LONGER = [{"steps": 1}, {"steps": 1, "drop_last": True}, {"epochs": 2, "min_batch": 3}]  # or shorter


def strategy_of(name):
    outer, _, inner = name.partition(" of ")
    return make_strategy(outer, **({"inner": inner} if inner else {}))


# What strategies declare


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_gives_what_it_declares(name):
    """Not less, either: so that the bound is as narrow as it can be."""
    for recipe in RECIPES + (LONGER if "sgd" not in name else []):
        strategy, reports = strategy_of(name), []
        simulation = make_simulation(strategy, **recipe)
        simulation.round(reports.append)
        assert reports
        for report in reports:
            bounds = simulation.work.bounds(SIZES[report.client_id], torch.float32)
            assert (report.weight, report.metrics["steps"]) == (bounds.weight, bounds.steps)


@given(st.integers(0, 100), st.integers(1, 30), st.integers(1, 30))
def test_batches_are_counted_without_a_list(examples, size, least):
    sizes = batch_sizes(examples, size, least)
    assert batch_count(examples, size, least) == (len(sizes), max(sizes, default=0))
    assert Recipe(batch_size=1).num_steps(2**60) == 2**60  # as somebody may claim


@dataclass(frozen=True, kw_only=True)
class Heavy(Wrapper):
    """Clients of more than 3 examples count for more than theirs."""

    def client_update(self, server, client, local):
        update = super().client_update(server, client, local)
        return update._replace(weight=update.weight * local.num_examples / 3)


class Declared(Heavy):
    def max_weight(self, num_examples, num_steps):
        return super().max_weight(num_examples, num_steps) * num_examples / 3


@dataclass(frozen=True, kw_only=True)
class Twice(Wrapper):
    """Trains from where it ended."""

    def client_update(self, server, client, local):
        local.train(server["model"])
        return super().client_update(server, client, local)


class DeclaredTwice(Twice):
    def max_steps(self, num_steps, epoch_steps):
        return 2 * num_steps


@dataclass(frozen=True, kw_only=True)
class Looks(Wrapper):
    """Takes the gradient of F_k first."""

    def client_update(self, server, client, local):
        local.gradient(server["model"])
        return super().client_update(server, client, local)


class DeclaredLooks(Looks):
    def max_steps(self, num_steps, epoch_steps):
        return num_steps + epoch_steps


STEPS = r"if more is right, override max_steps; each mini-batch of local\.gradient counts"


@pytest.mark.parametrize("failures", [Failures(), DROP], ids=["raise", "drop"])
@pytest.mark.parametrize("runtime", ["serial", {"name": "threads", "workers": 2}, "vectorized"], ids=str)
@pytest.mark.parametrize(
    ("one", "declared", "said"),
    [
        (Heavy, Declared, r"Heavy\.client_update: gave the weight 5\.3.* from 0 to 4; .* override max_weight"),
        (Twice, DeclaredTwice, rf"Twice\.client_update: gave the steps 2; .* from 0 to 1; {STEPS}"),
        (Looks, DeclaredLooks, rf"Looks\.client_update: gave the steps 2; .* from 0 to 1; {STEPS}"),
    ],
)
def test_who_gives_more_than_declared_is_told_what_to_override(runtime, failures, one, declared, said):
    """Also with `drop`: without the clients that count for more than 3, the model would be another one."""

    def made(strategy):
        settings = {"runtime": runtime, "failures": failures, "data": make_data((3, 4))}
        return make_simulation(strategy(inner=make_strategy("fedavg")), batch_size=4, **settings)

    with pytest.raises(RoundError, match=f"^round 1, client [01]: {said}$"):
        made(one).round()
    assert not made(declared).round().failed


@dataclass(frozen=True, kw_only=True)
class Unsure(Wrapper):
    def max_weight(self, num_examples, num_steps):
        return num_examples if num_examples > 3 else None


def test_what_is_no_bound_of_some_clients_ends_the_round():
    said = "^round 1, client 0: Unsure: max_weight gave None for 3 examples; it should give a number"
    with pytest.raises(RoundError, match=said):
        make_simulation(Unsure(inner=make_strategy("fedavg")), data=make_data((3, 4)), failures=DROP).round()


@pytest.mark.parametrize("value", [None, -1, float("nan"), float("inf"), 1e300, "n"], ids=str)
@pytest.mark.parametrize("method", ["max_weight", "max_steps"])
def test_what_is_no_bound_is_refused_at_the_start(monkeypatch, method, value):
    strategy = make_strategy("fedavg")
    monkeypatch.setattr(type(strategy), method, lambda self, *numbers: value)
    with pytest.raises(ConfigError, match=re.escape(f"strategy: FedAvg: {method} gave {value!r} for ")):
        make_simulation(strategy)


def test_a_runtime_of_ones_own_reports_numbers_that_can_be_added():
    class Boasts(Serial):
        def run(self, *arguments):
            for partial, reports in super().run(*arguments):
                yield partial, [report._replace(metrics=report.metrics | {"loss": 1.7e308}) for report in reports]

    simulation = make_simulation()
    simulation.runtime = Boasts(simulation.task, simulation.data)
    with pytest.raises(RoundError, match=r"runtime: Boasts\.run: gave .*1\.7e\+308"):
        simulation.round()


# A client's number of examples


def test_clients_of_too_many_examples_are_named_or_left_out():
    said = r"^failures\.max_examples: 7, but clients 1, 3 have more, up to 13; .* failures\.policy=drop$"
    with pytest.raises(ConfigError, match=said):
        make_simulation(failures=Failures(max_examples=7))
    with pytest.raises(ConfigError, match=r"^failures\.max_examples: 12, but client 3 has more"):
        make_simulation(failures=Failures(max_examples=12))
    left = make_simulation(failures=replace(DROP, max_examples=7))
    done = left.round()
    assert done.failed == {
        str(k): f"has {n} examples, and failures.max_examples is 7" for k, n in ((1, 8), (3, 13))
    }
    others = make_simulation(cohort={"name": "fixed", "clients": [0, 2, 4, 5]})
    assert done.fingerprint == others.round().fingerprint
    assert trace(make_simulation(failures=Failures(max_examples=13)), 1) == trace(make_simulation(), 1)


class Room:
    """A link to nodes that join with these numbers of examples, by name."""

    def __init__(self, **nodes):
        self.nodes_ = {i: [name, *numbers] for i, (name, numbers) in enumerate(nodes.items())}

    def nodes(self):
        return set(self.nodes_)

    def send(self, contents, kind, **how):
        return {str(node): node for node in contents}

    def abandon(self, messages):
        pass

    def receive(self, waiting, *, most_bytes):
        from fedsim.flower.internals import Reply

        for to in [*waiting]:
            name, examples, tested = self.nodes_[int(to)]
            content = wire.record(Joined(name, {}, examples=examples, tested=tested))
            yield Reply(to, int(to), content, None, 0)


def looked(roster, room):
    for _ in range(3):
        roster.look(room, Invitation("", "", {}))
    return roster


def test_a_node_agrees_to_its_examples_when_it_joins(caplog):
    roster, room = (
        Roster(),
        Room(a=(20, 5), b=(30, 30), c=(0, 1), d=(-1, 1), e=(1, 0), f=(2**41, 1), g=(1, 10**40)),
    )
    assert looked(roster, room).joined == {"a": 0, "b": 1}
    for name, why in (
        ("c", "has 0 examples; allowed: 1 to 1099511627776"),
        ("d", "has -1 examples; allowed: 1 to "),
        ("e", "has 0 examples to test on; allowed: 1 to 1099511627776"),
        ("f", "has 2199023255552 examples; allowed: 1 to "),
        ("g", "has 10000000000000000000 examples to test on"),
    ):
        assert f"{name}: {why}" in roster.shown(2)
    roster.fix_names(2)
    assert roster.examples == [20, 30]
    room.nodes_ = {7: ["a", 25, 5]}
    assert looked(roster, room).examples == [25, 30]
    assert "nodes: a now has 25 examples, and had 20" in caplog.text


def test_the_server_bounds_the_examples_of_a_node():
    roster, room = Roster(), Room(a=(20, 5), b=(21, 5))
    roster.max_examples = 20
    assert looked(roster, room).joined == {"a": 0}
    assert "b: has 21 examples; allowed: 1 to 20 (failures.max_examples)" in roster.shown(2)


def test_a_node_of_too_many_examples_is_told_so(lab, caplog):
    """In its own log, with both numbers; the server says the same."""
    caplog.set_level(logging.INFO)
    assert not lab.simulation(load(CONFIG | {"failures": {"max_examples": 12}}), wait=100.0).round().failed
    lab.clock.sleep(100.0)
    said = "failures.max_examples: this node has 12 training examples; allowed in this run: up to 11"
    with pytest.raises(RoundError, match=f"too few have joined: .*client-02: {said}"):
        lab.simulation(load(CONFIG | {"failures": {"max_examples": 11}}), wait=100.0).round()
    assert caplog.text.count(f"refused: {said}") == 3


@pytest.mark.parametrize("name", ["", " a", "a\n", "a" * 65, "\x1b[2J", "../a", "ä"])
def test_a_name_that_is_none_does_not_join(name):
    roster, room = Roster(), Room(x=(20, 5))
    room.nodes_[0][0] = name
    assert looked(roster, room).joined == {}
    assert roster.shown(1).isprintable()


# What a node answers


@pytest.fixture
def lab(tmp_path, monkeypatch):
    made = Lab(tmp_path, monkeypatch)
    yield made
    made.close()


TRAINED = {  # what is changed in the answer of a node with 12 examples, in batches of 4
    "weight 12.5; it should be from 0 to 12": {"weight": 12.5},
    "weight 1e+300; it should be from 0 to 12": {"weight": 1e300},
    "weight 1.7e+308": {"weight": 1.7e308},
    "weight nan": {"weight": float("nan")},
    "weight inf": {"weight": float("inf")},
    "weight -1": {"weight": -1.0},
    "13 examples, and the node joined with 12": {"examples": 13},
    "1099511627776 examples": {"examples": 2**40},
    "0 examples": {"examples": 0},
    "steps 4; it should be a whole number from 0 to 3": {"steps": 4.0},
    "steps 1e+300": {"steps": 1e300},
    "steps -7.5": {"steps": -7.5},
    "steps 2.5": {"steps": 2.5},
    "examples 13; it should be a whole number from 1 to 12": {"seen": 13.0},
    "examples 0": {"seen": 0.0},
    "loss 1e+300; it should be from -4.08338": {"loss": 1e300},
    "loss -1e+300": {"loss": -1e300},
    "loss nan": {"loss": float("nan")},
    "seconds inf": {"seconds": float("inf")},
    "seconds -1": {"seconds": -1.0},
    "other metrics": {"more": 1.0},
}
EVALUATED = {
    "4.0 examples, and the node joined with 3": {"seen": 4.0},
    "1e+300 examples": {"seen": 1e300},
    "correct 4; it should be a whole number from 0 to 3": {"correct": 4.0},
    "correct -1": {"correct": -1.0},
    "correct 0.5": {"correct": 0.5},
    "loss 1e+300": {"loss": 1e300},
    "loss -inf": {"loss": float("-inf")},
    "other metrics": {"more": 1.0},
}


def changed(content, changes):
    answer = wire.read(Answer, content)
    own = {name: value for name, value in changes.items() if name in Answer._fields}
    sums = {"examples" if name == "seen" else name: value for name, value in changes.items() if name not in own}
    return wire.record(answer._replace(metrics=answer.metrics | sums, **own))


def refused(lab, cases, where, ask):
    """Ask again and again, with one lie of a node after the other, each of which is refused with its reason."""
    honest = lab.spoil
    for why, changes in cases.items():
        lab.spoil = lambda name, content, how=changes: changed(content, how) if name == "client-01" else content
        with pytest.raises(ClientError, match=f"{where}client 1: client-01: its answer has ") as caught:
            ask()
        assert f"its answer has {why}" in str(caught.value)
    lab.spoil = honest


def test_a_training_that_cannot_be_is_refused_with_its_reason(lab):
    """The round that failed is run again, and nodes give the answers that they have: each trains once or twice."""
    simulation = lab.simulation(load(CONFIG), wait=100.0)
    assert (len(simulation.data.sizes), set(simulation.data.sizes)) == (3, {0})
    refused(lab, TRAINED, "round 1, ", simulation.round)
    assert shown(simulation.round()) == shown(build(load(CONFIG)).round())


def test_a_training_that_is_refused_is_as_if_its_client_had_not_been_there(lab):
    simulation = lab.simulation(load(CONFIG | {"failures": {"policy": "drop"}}), wait=100.0)
    lab.spoil = lambda name, content: changed(content, {"weight": 1e300}) if name == "client-01" else content
    records = [simulation.round() for _ in range(2)]
    others = build(load(CONFIG | {"cohort": {"name": "fixed", "clients": [0, 2]}}))
    assert [record.fingerprint for record in records] == [others.round().fingerprint for _ in records]
    assert all((record.failed.keys(), record.steps) == ({"1"}, 6) for record in records)


def test_an_evaluation_that_cannot_be_is_refused_with_its_reason(lab):
    simulation = lab.simulation(load(CONFIG), wait=100.0)
    expected = simulation.evaluate_clients()
    refused(lab, EVALUATED, "", simulation.evaluate_clients)
    assert simulation.evaluate_clients() == expected


def test_all_sizes_are_known_when_all_nodes_have_joined(lab):
    """So that a mean over the population needs no round of all clients first."""
    strategy = {"name": "fedavg", "average": "population"}
    config = load(CONFIG | {"strategy": strategy, "cohort": {"name": "uniform", "size": 2}})
    simulation, expected = lab.simulation(config, wait=100.0), build(config)
    assert [shown(simulation.round()) for _ in range(3)] == [shown(expected.round()) for _ in range(3)]


def test_a_node_whose_data_change_agrees_anew(lab, caplog):
    caplog.set_level(logging.INFO)
    simulation = lab.simulation(load(CONFIG | {"failures": {"policy": "drop"}}), wait=100.0)
    simulation.round()
    node, before = lab.nodes["client-01"], simulation.data.sizes[1]
    node.dataset = replace(node.dataset, x_train=node.dataset.x_train[:9], y_train=node.dataset.y_train[:9])
    why = f"client-01: its answer has 9 examples, and the node joined with {before}"
    assert simulation.round().failed == {"1": why}
    assert simulation.data.sizes[1] == before
    lab.clock.sleep(10.0)
    assert [simulation.round().failed.keys() for _ in range(3)][-1] == set()
    assert simulation.data.sizes[1] == 9
    assert f"nodes: client-01 now has 9 examples, and had {before}" in caplog.text
