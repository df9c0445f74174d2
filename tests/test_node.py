"""Laws of nodes: they compute what a simulation does, whatever becomes of them, and obey their owner."""

import copy
import errno
import io
import json
import logging
import os
import re
import shutil
import sys
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from functools import cache
from pathlib import Path
from uuid import uuid4

import forks
import numpy as np
import pytest
import torch
import yaml
from conftest import cohort_for, trace
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from safetensors.torch import save_file

from fedsim.base.catalogue import options_of
from fedsim.base.files import untied_copies, write
from fedsim.data import DATASETS
from fedsim.data.federated import Shard
from fedsim.errors import ClientError, ConfigError, NodeError
from fedsim.experiment.build import build, build_data, build_server_data
from fedsim.experiment.config import load, parse_overrides
from fedsim.federated.client import EvaluateClient, Train
from fedsim.federated.fold import Fold, failure
from fedsim.federated.runtime import Runtime
from fedsim.flower.messages import Finished, Invitation, Order
from fedsim.flower.node import Node, NodeSettings
from fedsim.flower.node_process import FewLines
from fedsim.flower.plan import Allow, Plan, digest, initial_of, plan_of
from fedsim.flower.shards import client_name, write_shards
from fedsim.flower.state_files import StateFiles, StoredState, forget, needed, size, states
from fedsim.flower.transport import decode
from fedsim.runtimes.serial import Serial
from fedsim.strategies import CATALOGUE
from fedsim.types import Update

CONFIG = {
    "seed": 3,
    "rounds": 3,
    "data": {
        "name": "synthetic",
        "shape": [1, 8, 8],
        "examples": 60,
        "test_examples": 30,
        "classes": 3,
        "noise": 0.7,
        "clients": 3,
        "holdout": 0.2,
        "label_noise": {"rate": 0.2},
    },
    "model": {"name": "cnn_bn", "widths": [3, 4]},
    "strategy": "fedavg",
    "cohort": {"name": "uniform", "fraction": 0.7},
    "local": {"lr": 0.05, "batch_size": 4, "augment": ["flip", "random_crop"]},
    "runtime": {"name": "serial", "device": "cpu"},
}
NEEDED = {"inner": "scaffold", "layers": ["*.weight"], "size": 2}  # what options without a default get


class Nodes(Runtime):
    """A runtime in this process whose clients are nodes, each with its shard and its own folder."""

    home = torch.device("cpu")

    def __init__(self, folder, *, transport="exact", around=lambda nodes, order, work: work(order), more=None):
        self.folder, self.transport, self.around = folder, transport, around
        self.settings = {"state": str(folder / "state"), "device": "cpu"} | (more or {})
        self.run_id, self.nodes, self.checkpoints = uuid4().hex, {}, None

    def __call__(self, task, data):
        self.initial, self.data, self.local = initial_of(task), data, Serial(task, data, device="cpu")
        return self

    def check(self, work):
        self.plan = plan_of(work.config, self.data).json_text()

    def placeholder_state(self, initial):
        return {"version": torch.tensor([0, 0])} if initial or self.transport != "exact" else {}

    def node(self, client):
        if client not in self.nodes:
            settings = NodeSettings.read(self.folder / f"{client}.yaml", self.settings)
            self.nodes[client] = Node(settings)
        return self.nodes[client]

    def restart(self):
        for node in self.nodes.values():
            node.close()
        self.nodes = {}

    def answer(self, order):
        node = self.node(order.client)
        answer = node.work(order)
        if answer.lost:
            assert node.join(Invitation(self.run_id, self.plan, self.initial)).error is None
            answer = node.work(order)
        return answer

    def order(self, work, server, job):
        training = isinstance(work, Train)
        version, mark = job.client["version"].tolist() if job.client else (0, 0)
        return Order(
            run=self.run_id,
            plan=digest(self.plan),
            task="train" if training else "evaluate",
            round=max(job.round, 0),
            client=job.client_id,
            version=version,
            mark=mark,
            checkpoints=tuple([job.round] if self.checkpoints is None else self.checkpoints),
            transport=self.transport,
            batch_size=1 if training else work.batch_size,
            train_mode=False if training else work.train,
            server={name: value.clone() for name, value in server.items()},
        )

    def run(self, work, server, jobs, aggregator):
        fold = Fold(aggregator)
        for job, outcome in self.map(work, server, jobs):
            yield aggregator.fold([]), [fold.add(job, outcome, 0.0)]
        yield fold.partial, []

    def map(self, work, server, items):
        if not isinstance(work, Train | EvaluateClient):
            yield from self.local.map(work, server, items)
            return
        for job in items:
            order = self.order(work, server, job)
            answer = self.around(self, order, self.answer)
            if answer.error is not None:
                yield job, NodeError(answer.error)
                continue
            assert answer.version == (job.round + 1 if isinstance(work, Train) and job.client else 0)
            metrics = {name: torch.tensor(value, dtype=torch.double) for name, value in answer.metrics.items()}
            kept = {"version": torch.tensor([answer.version, answer.mark])} if answer.version else {}
            yield job, Update(decode(answer.message), answer.weight, kept, metrics)


FEW = {"krum": {"attackers": 0}}  # what it needs in cohorts as small as these


def config(strategy="fedavg", **settings):
    if strategy in FEW:
        settings = {"cohort": "all"} | settings
    fields = options_of(CATALOGUE.load(strategy)).model_fields
    needed = {key: value for key, value in NEEDED.items() if key in fields and fields[key].is_required()}
    cohort = cohort_for(strategy, CONFIG["cohort"])
    named = {"name": strategy} | FEW.get(strategy, {}) | needed
    return load(CONFIG | {"strategy": named, "cohort": cohort} | settings)


@cache
def truth(strategy):
    """What a simulation shows."""
    return shown(build(config(strategy)))


def shown(simulation):
    records = trace(simulation, 2)
    return [{name: value for name, value in record.items() if name != "clients"} for record in records]


@pytest.fixture
def shards(tmp_path):
    write_shards(build_data(config()), tmp_path / "shards")
    return tmp_path / "shards"


def simulated(runtime, strategy="fedavg", **settings):
    """The same federation on nodes; test data are the server's."""
    made = config(strategy, **settings)
    return build(made, build_data(made), runtime)


@pytest.mark.parametrize("strategy", [name for name in CATALOGUE if not CATALOGUE.load(name).uses_public])
def test_nodes_compute_what_a_simulation_does(shards, strategy):
    assert shown(simulated(Nodes(shards), strategy)) == truth(strategy)


@pytest.mark.parametrize("strategy", ["fedavg", "fedbn"])
def test_nodes_restarted_before_every_order_change_nothing(shards, strategy):
    def around(nodes, order, work):
        nodes.restart()
        return work(order)

    assert shown(simulated(Nodes(shards, around=around), strategy)) == truth(strategy)


def test_private_buffers_stay_on_the_nodes(shards):
    model = CONFIG["model"] | {"buffers": {"*running_mean": "private", "*running_var": "server"}}
    nodes = simulated(Nodes(shards), model=model)
    assert shown(nodes) == shown(build(config(model=model)))
    assert {name for state in nodes.clients.values() for name in state} == {"version"}


class KilledError(BaseException):
    """The node's process ends, as it stands on disk."""


class Faults:
    """Kills a node, or has its disk fail, before and within each change that an order makes to its files, in turn.

    The order is sent again, to another process where this one is gone, until it has got through.
    """

    def __init__(self, folder, monkeypatch, kill, every=1):
        self.folder, self.kill, self.every, self.at, self.count, self.happened = folder, kill, every, -1, 0, 0
        for name in ("fsync", "replace", "rename", "unlink", "mkdir"):
            monkeypatch.setattr(os, name, getattr(os, name))  # which puts it back
        monkeypatch.setattr(Path, "open", Path.open)
        forks._before_changes(self.change)

    def change(self, how, path):
        self.count += 1
        if self.count - 1 == self.at:
            self.happened += 1
            if self.kill:
                shutil.copytree(self.folder / "state", self.folder / "killed")
                raise KilledError
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([] if path is None else [str(path)]))

    def __call__(self, nodes, order, work):
        self.at = (order.round + order.client) % self.every
        while True:
            self.count = 0
            try:
                answer = work(order)
                if answer.error is None:
                    self.at = -1
                    return answer
                said = answer.error
            except KilledError:
                nodes.restart()
                shutil.rmtree(self.folder / "state")
                (self.folder / "killed").rename(self.folder / "state")
                said = ""
            except (AssertionError, ConfigError) as refused:  # to join, or to begin
                said = str(refused)
            assert self.kill or "No space left on device" in said
            assert self.kill or str(self.folder / "state") in said
            self.at += self.every


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "full"])
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_nodes_that_fail_at_any_change_to_their_files_change_nothing(shards, monkeypatch, kill, every):
    faults = Faults(shards, monkeypatch, kill, every)
    expected = truth("scaffold")
    nodes = Nodes(shards, around=faults)
    assert shown(simulated(nodes, "scaffold")) == expected
    print(f"{faults.happened} faults")
    assert faults.happened > 5
    for node in nodes.nodes.values():  # what is left is what another process goes on from
        (home,) = (path for path in node.state_files.folder.iterdir() if path.is_dir())
        assert not list(home.glob("*.draft"))


def test_repeated_and_late_orders_change_nothing(shards):
    before = {}

    def around(nodes, order, work):
        if late := before.get((order.client, order.task)):  # the last round's, once more, and after it this one's
            assert work(late).error is None
        first, again = work(order), work(order)
        assert first._replace(seconds=0.0) == again._replace(seconds=0.0)
        if order.task == "train":
            before[order.client, order.task] = order
        return again

    assert shown(simulated(Nodes(shards, around=around), "scaffold")) == truth("scaffold")


def test_what_was_not_counted_is_never_used(shards):
    """Every other answer comes too late: the same as where those clients fail."""

    class Late(Nodes):
        def answer(self, order):
            answer = super().answer(order)
            if order.task == "train" and (order.round + order.client) % 2:
                return answer._replace(error="late")
            return answer

    def failing(work, order):
        if order.task == "train" and (order.round + order.client) % 2:
            return work(order)._replace(error="late")
        return work(order)

    drop = {"failures": {"policy": "drop"}, "cohort": "all"}
    late = simulated(Late(shards), "scaffold", **drop)
    records = [late.round() for _ in range(4)]
    assert all(record.failed for record in records)
    reference = build(config("scaffold", **drop))
    run = reference.runtime.run

    def some(work, server, jobs, aggregator):
        kept = list(jobs)
        good = [job for job in kept if not (job.round + job.client_id) % 2]
        yield from run(work, server, good, aggregator)
        late = [failure(job, NodeError("late"), 0.0) for job in kept if (job.round + job.client_id) % 2]
        yield aggregator.fold([]), late

    reference.runtime.run = some
    assert [reference.round().fingerprint for _ in range(4)] == [record.fingerprint for record in records]


def test_a_rounded_transport_feeds_back_what_it_left(shards):
    """Also to clients that keep nothing else, from disk as from memory."""
    settings = {"model": {"name": "2nn"}}
    once = simulated(Nodes(shards, transport="bf16"), **settings)
    runtime = Nodes(shards, transport="bf16", around=lambda nodes, order, work: (nodes.restart(), work(order))[1])
    fingerprints = [once.round().fingerprint for _ in range(3)]
    once.runtime.restart()
    twice = simulated(runtime, **settings)
    assert [twice.round().fingerprint for _ in range(3)] == fingerprints
    exact = simulated(Nodes(shards), **settings)
    runtime.restart()
    assert exact.round().fingerprint != fingerprints[0]


@given(st.data())
def test_pruning_keeps_what_a_driver_could_go_back_to(data):
    """Against a driver with tickets and checkpoints, over rounds that count or come late, and rollbacks."""
    ticket, disk, checkpoints = 0, {0: ()}, {0: 0}  # round: ticket
    number = 0
    for _ in range(data.draw(st.integers(1, 30))):
        step = data.draw(st.sampled_from(["counts", "late", "checkpoint", "back"]))
        if step in ("counts", "late"):
            assert ticket in disk
            kept = needed(ticket, disk[ticket], sorted(checkpoints))
            disk[number + 1] = kept
            disk = {v: e for v, e in disk.items() if v == 0 or v >= ticket or v in kept}
            number += 1
            ticket = number if step == "counts" else ticket
        elif step == "checkpoint":
            checkpoints[number] = ticket
            for old in sorted(checkpoints)[: -data.draw(st.integers(1, 3))]:
                del checkpoints[old]
        else:
            number = data.draw(st.sampled_from(sorted(checkpoints)))
            ticket = checkpoints[number]
            checkpoints = {n: t for n, t in checkpoints.items() if n <= number}
        assert set(checkpoints.values()) <= disk.keys()


def test_a_state_that_is_not_what_it_was_is_refused(shards):
    nodes = Nodes(shards)
    simulation = simulated(nodes, "scaffold", cohort="all")
    simulation.round()
    nodes.restart()
    (path,) = (shards / "state" / client_name(1, 3)).glob("*/state-*")
    whole = path.read_bytes()
    for content, why in (
        (whole[:-4] + b"abcd", "is broken: its checksum is wrong"),
        (whole[:-1], "is broken"),
        (b"", "is broken"),
        (whole.replace(b'"client":"1"', b'"client":"2"'), "is broken"),
        (None, "is not here"),
    ):
        path.write_bytes(content) if content is not None else path.unlink()
        with pytest.raises(ClientError, match=f"state 1 of client 1 {why}"):
            simulation.round()
        nodes.restart()
    assert not path.parent.exists()  # there was nothing more to go on from
    path.parent.mkdir()
    path.write_bytes(whole)
    simulation.round()


def test_orders_that_cannot_be_are_refused(shards):
    nodes = Nodes(shards)
    simulation = simulated(nodes, "scaffold", cohort="all")
    orders = []
    nodes.around = lambda nodes, order, work: orders.append(order) or work(order)
    simulation.round()
    order, node = orders[0], nodes.node(0)
    server = order.server
    for changes, why in (
        ({"client": 1}, "in this run the node is client 0"),
        ({"client": -1}, "order.client"),
        ({"round": -1}, "order.round"),
        ({"round": 10**12}, "order.round"),
        ({"version": 1}, "order.version"),
        ({"batch_size": 0}, "order.batch_size"),
        ({"transport": "pickle"}, "order.transport"),
        ({"run": "../../elsewhere"}, "run: '../../elsewhere' is "),
        ({"server": {}}, "order.server: is nothing"),
        ({"server": server | {"more": server["c"]}}, "more float32"),
        ({"server": server | {"model": server["model"][:-1]}}, "order.server"),
        ({"server": server | {"model": server["model"].double()}}, "float64"),
    ):
        answer = node.work(order._replace(**changes))
        assert why in answer.error
        assert "\n" not in answer.error
        assert not answer.lost
    for changes in ({"plan": "0" * 64}, {"run": uuid4().hex}):
        assert node.work(order._replace(**changes)).lost
    assert node.work(order).error is None


MINE = """
import sys, torch
from fedsim import Update
from fedsim.strategies.averaging.fedavg import FedAvg

class Raises(FedAvg):
    def client_update(self, server, client, local):
        raise KeyError("one\\ntwo")
class Exits(FedAvg):
    def client_update(self, server, client, local):
        sys.exit(3)
class Writes(FedAvg):
    def client_update(self, server, client, local):
        server["model"].add_(1)
        return Update({}, 1.0)
class Sends(FedAvg):
    def client_update(self, server, client, local):
        return Update({"model": "all"}, 1.0)
class Keeps(FedAvg):
    def init_client(self, model, layout):
        return {"h": torch.zeros(2)}
    def client_update(self, server, client, local):
        return Update({}, 1.0, client={"h": client["h"] / 0})
class Interrupts(FedAvg):
    def client_update(self, server, client, local):
        raise KeyboardInterrupt
"""


@pytest.mark.parametrize(
    ("strategy", "why"),
    [
        ("Raises", r"KeyError: 'one\\ntwo' \(mine_that_fails.py:8\)"),
        ("Exits", r"SystemExit: 3 \(mine_that_fails.py:11\)"),
        ("Writes", r"client_update wrote server\['model'\] in place"),
        ("Sends", "gave str as 'model' in its message"),
        ("Keeps", "its state has h, which is not finite"),
        ("Interrupts", None),
    ],
)
def test_what_goes_wrong_in_a_strategy_is_one_line(shards, monkeypatch, strategy, why):
    (shards / "mine_that_fails.py").write_text(MINE)
    monkeypatch.syspath_prepend(shards)
    name = f"mine_that_fails:{strategy}"
    nodes = Nodes(shards, more={"allow.strategies": [name]})
    simulation = simulated(nodes, name)
    if why is None:
        with pytest.raises(KeyboardInterrupt):
            simulation.round()
        return
    with pytest.raises(ClientError, match=why) as caught:
        simulation.round()
    assert str(caught.value).isprintable()
    assert not list((shards / "state").glob("*/*/state-*"))


def test_one_process_at_a_time_has_a_node(shards):
    values = NodeSettings.read(shards / "0.yaml", {"state": str(shards / "state")})
    with Node(values), pytest.raises(ConfigError, match="another process uses it"):
        Node(values)
    Node(values).close()


def test_runs_that_nobody_asks_for_go(tmp_path):
    old, new = uuid4().hex, uuid4().hex
    keeping = StateFiles(tmp_path, 1.0)
    for run in (old, new):
        keeping.join(run, "{}", {"model": torch.ones(3)})
        keeping.store(run, 0, 1, StoredState({"c": torch.ones(2)}))
    keeping.close()
    os.utime(tmp_path / old, (0, 0))
    (tmp_path / "mine").mkdir()
    keeping = StateFiles(tmp_path, 1.0)
    assert {path.name for path in tmp_path.glob("[!.]*")} == {"mine", new}
    assert keeping.joined(old) is None
    plan, initial = keeping.joined(new)
    assert (plan, initial["model"].tolist()) == ("{}", [1, 1, 1])
    keeping.close()
    with pytest.raises(ValueError, match="is not the id of a run"):
        keeping.joined("../" + new)


def test_nothing_in_a_nodes_folder_leads_elsewhere(tmp_path):
    folder, other, run = tmp_path / "node", tmp_path / "other", uuid4().hex
    with closing(StateFiles(other, 1.0)) as keeping:
        keeping.join(run, "{}", {"model": torch.ones(3)})
    (other / ".lock").write_text("precious")
    with closing(StateFiles(folder, 1.0)) as keeping:
        (folder / run).symlink_to(other / run)
        for use in (keeping.joined, lambda run: keeping.join(run, "{}", {"model": torch.zeros(3)})):
            with pytest.raises(ConfigError, match="is a symbolic link"):
                use(run)
        (folder / run).unlink()
        (folder / run).mkdir()
        for name in ("plan.json", "initial.safetensors"):
            (folder / run / name).symlink_to(other / run / name)
        assert keeping.joined(run) is None
        keeping.join(run, "{}", {"model": torch.zeros(3)})
    (folder / ".lock").unlink()
    (folder / ".lock").symlink_to(other / ".lock")
    with pytest.raises(ConfigError, match=r"node/\.lock: is no lock, but another file or a link"):
        StateFiles(folder, 1.0)
    assert (other / ".lock").read_text() == "precious"
    (other / ".lock").unlink()
    with closing(StateFiles(other, 1.0)) as keeping:
        assert keeping.joined(run)[1]["model"].tolist() == [1, 1, 1]


def test_a_process_that_never_ends_forgets_runs_too(tmp_path):
    old, new = uuid4().hex, uuid4().hex
    keeping = StateFiles(tmp_path, 1.0)
    keeping.join(old, "{}", {})
    os.utime(tmp_path / old, (0, 0))
    keeping.join(new, "{}", {})
    assert {path.name for path in tmp_path.glob("[!.]*")} == {new}
    keeping.close()


# What a node keeps


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_so_many_new_runs_begin_in_a_day_whatever_is_restarted_or_deleted(tmp_path, monkeypatch):
    first, second, third = "1" * 32, "2" * 32, "3" * 32
    with closing(StateFiles(tmp_path, 1.0, max_new_runs=2)) as keeping:
        for run in (first, second, first):  # a known run is not new
            keeping.join(run, "{}", {})
        with pytest.raises(ConfigError, match=r"allow\.max_new_runs: 2 .* up to 2 a day"):
            keeping.join(third, "{}", {})
        forget(tmp_path, first)
    with closing(StateFiles(tmp_path, 1.0, max_new_runs=2)) as keeping:
        with pytest.raises(ConfigError, match="max_new_runs"):
            keeping.join(third, "{}", {})
        assert names(tmp_path) == [".lock", ".new-runs.json", second]
        for day in ("1999-01-01", "2999-01-01"):  # the clock went on, or back
            monkeypatch.setattr("fedsim.flower.state_files._today", lambda day=day: day)
            keeping.admit(third)
        (tmp_path / ".new-runs.json").write_text("{")
        keeping.join(third, "{}", {})


def test_files_never_take_more_than_the_owner_allows(shards, monkeypatch):
    """However long the lists of checkpoints are; what is refused leaves all as it was, and the run goes on."""
    nodes = Nodes(shards, more={"allow.max_disk": 60_000, "allow.max_states": 20})
    simulation, most = simulated(nodes, "scaffold", cohort="all"), [0]

    def measured(path, content):
        write(path, content)
        most.append(size(path.parent) + len(content))  # as if the draft were still there

    monkeypatch.setattr("fedsim.flower.state_files.write", measured)
    nodes.checkpoints = []
    for number in range(20):
        nodes.checkpoints.append(number)
        before = {path: names(path) for path in (shards / "state").glob("*/*") if path.is_dir()}
        try:
            simulation.round()
        except ClientError as error:
            why = str(error)
            break
    assert re.search(r"allow\.max_disk: 4,096 bytes do not fit beside 5\d,\d\d\d of its runs; allowed", why)
    assert {path: names(path) for path in before} == before
    assert 50_000 < max(most) <= 60_000
    nodes.checkpoints = [number]
    simulation.round()
    nodes.checkpoints = [*range(21)]
    with pytest.raises(ClientError, match=r"allow\.max_states: 21 checkpoints; .* up to 20"):
        simulation.round()


def test_a_plan_that_does_not_fit_leaves_the_one_before_it(tmp_path):
    """One of the same size takes its place, in a full folder too."""
    run, plan, sent = "1" * 32, "{}", {"model": torch.ones(2000)}
    with closing(StateFiles(tmp_path, 1.0, max_disk=20_480)) as keeping:  # a folder, a plan, and 8,000 numbers
        keeping.join(run, plan, sent)
        with pytest.raises(ConfigError, match=r"allow\.max_disk"):
            keeping.join(run, "[]", {"model": torch.ones(5000)})
        assert keeping.joined(run)[0] == plan
        keeping.join(run, "[]", {"model": torch.zeros(2000)})
        assert keeping.joined(run)[0] == "[]"


def test_states_that_never_count_do_not_pile_up(shards):
    nodes = Nodes(shards)
    orders = []
    nodes.around = lambda nodes, order, work: orders.append(order) or work(order)
    simulated(nodes, "scaffold", cohort="all").round()
    order = orders[0]
    for number in range(1, 40):
        assert nodes.node(0).work(order._replace(round=number, checkpoints=())).error is None
    found = states(nodes.node(0).state_files.folder / order.run)
    assert sorted(found) == [1, *range(32, 41)] or sorted(found) == [*range(32, 41)]


def test_a_full_disk_is_a_reason_and_leaves_nothing_half(shards, monkeypatch):
    """At whichever of the writes it is full."""
    nodes, left = Nodes(shards), [0]
    simulation = simulated(nodes, "scaffold", cohort="all")
    simulation.runtime.check(simulation.work)
    node, invitation = nodes.node(0), Invitation(nodes.run_id, nodes.plan, nodes.initial)

    def sync(file):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", sync)
    for left[0] in range(6):
        assert "No space left on device" in node.join(invitation).error
        assert not set(names(node.state_files.folder)) - {".lock", ".new-runs.json"}
    left[0] = 100
    simulation.round()
    before, left[0] = names(node.state_files.folder / nodes.run_id), 0
    with pytest.raises(ClientError, match="No space left on device"):
        simulation.round()
    assert names(node.state_files.folder / nodes.run_id) == before
    left[0] = 100
    expected = build(config("scaffold", cohort="all"))
    assert [expected.round() for _ in range(2)][-1].fingerprint == simulation.round().fingerprint


def test_what_a_killed_process_left_is_deleted(tmp_path):
    run = uuid4().hex
    with closing(StateFiles(tmp_path, 1.0)) as keeping:
        keeping.join(run, "{}", {})
    (tmp_path / run / "state-000000001.safetensors.draft").write_bytes(b"half")
    (tmp_path / f".{uuid4().hex}.draft").mkdir()
    (tmp_path / ".new-runs.json.draft").write_bytes(b"half")
    StateFiles(tmp_path, 1.0).close()
    assert names(tmp_path) == [".lock", ".new-runs.json", run]
    assert names(tmp_path / run) == ["initial.safetensors", "plan.json"]


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (
            "all",
            ["finished", "initial.safetensors", "plan.json", *[f"state-{v:09}.safetensors" for v in (1, 2, 3)]],
        ),
        ("last", ["finished", "plan.json", "state-000000003.safetensors"]),
        ("nothing", None),
    ],
)
def test_a_node_keeps_of_a_finished_run_what_its_owner_wants(shards, keep, left):
    nodes = Nodes(shards, more={"keep": keep})
    simulation = simulated(nodes, "scaffold", cohort="all")
    nodes.checkpoints = [1, 2, 3]
    [simulation.round() for _ in range(3)]
    node = nodes.node(0)
    home = node.state_files.folder / nodes.run_id
    for run in (uuid4().hex, "../elsewhere"):
        node.finish(Finished(run, 0))
    assert len(names(home)) == 5
    for version in (3, 0):  # whatever a server says, the last state stays
        assert node.finish(Finished(nodes.run_id, version)) is None
        assert (names(home) if home.exists() else None) == left
    if keep == "nothing":
        for invited in (False, True):  # as where the run is made longer
            if invited:
                assert node.join(Invitation(nodes.run_id, nodes.plan, nodes.initial)).error is None
            with pytest.raises(ClientError, match="state 3 of client 0 is not here"):
                simulation.round()
            assert not home.exists()
        return
    expected = build(config("scaffold", cohort="all"))
    [expected.round() for _ in range(3)]
    assert simulation.round().fingerprint == expected.round().fingerprint
    assert not (home / "finished").exists()


def test_the_owner_lists_and_deletes_runs_while_the_node_works(shards, fedsim_, tmp_path):
    nodes = Nodes(shards)
    simulation = simulated(nodes, "scaffold", cohort="all")
    nodes.run_id = "ab" + "1" * 30
    simulation.round()
    path, other = shards / "own.yaml", "ab" + "2" * 30
    values = yaml.safe_load((shards / "0.yaml").read_text())
    path.write_text(yaml.safe_dump(values | {"state": str(shards / "state"), "data": "digits"}))
    assert nodes.node(0).join(Invitation(other, nodes.plan, nodes.initial)).error is None
    nodes.node(0).finish(Finished(other, 0))
    listed = fedsim_("node", path, "--runs")
    assert (listed.status, listed.err) == (0, "")
    rows = [line.split() for line in listed.out.splitlines() if line.split()[:1] and "ab" in line[:5]]
    assert [(row[0], row[-1]) for row in rows] == [("ab111111", "no"), ("ab222222", "yes")]
    assert max(map(len, listed.out.splitlines())) <= 80
    found = {run["run"]: run for run in json.loads(fedsim_("node", path, "--runs", "--json").out)["runs"]}
    about = found[nodes.run_id]
    assert (about["strategy"], about["model"], about["round"]) == ("scaffold", "cnn_bn", 1)
    assert about["bytes"] == size(nodes.node(0).state_files.folder / nodes.run_id)
    assert (found[other]["round"], found[other]["finished"], about["finished"]) == (None, True, False)
    for prefix, why in (
        ("ab", "2 runs begin with 'ab': ab1"),
        ("c", "no run"),
        ("", "should be"),
        ("*", "should be"),
    ):
        wrong = fedsim_("node", path, "--forget", prefix)
        assert (wrong.status, wrong.err.count("\n")) == (2, 1)
        assert why in wrong.err
    for prefix in ("ab1", "ab2"):
        gone = fedsim_("node", path, "--forget", prefix)
        assert (gone.status, gone.out[:10]) == (0, f"forgot {prefix}")
    assert json.loads(fedsim_("node", path, "--runs", "--json").out)["runs"] == []
    with pytest.raises(ClientError, match="state 1 of client 0 is not here"):
        simulation.round()
    assert json.loads(fedsim_("node", path, "--runs", "--json").out)["runs"] == []


def test_a_check_shows_what_a_node_would_offer_and_leaves_nothing(shards, fedsim_, tmp_path):
    """Also while the node works, whose folder it does not need for itself."""
    values = yaml.safe_load((shards / "0.yaml").read_text()) | {"state": str(shards / "state"), "device": "cpu"}
    values |= {"allow": {"strategies": ["fedavg"]}, "insecure": True}
    path = shards / "own.yaml"
    path.write_text(yaml.safe_dump(values))
    before = names(shards)
    shown = fedsim_("node", path, "--check")
    assert (shown.status, shown.err) == (0, "")
    assert max(map(len, shown.out.splitlines())) <= 80
    data = build_data(config())
    n, tested = int(data.sizes[0]), int(data.own_sizes[0])
    for what in (
        f"{n} to train on, {tested} others for tests; uint8 [1, 8, 8]",
        "strategies +fedavg",
        "plain HTTP",
    ):
        assert re.search(what.replace("[", r"\["), shown.out)
    assert names(shards) == before
    nodes = Nodes(shards)
    simulated(nodes, cohort="all").round()
    found = json.loads(fedsim_("node", path, "--check", "--json").out)
    assert (found["examples"], found["tested"], found["classes"], found["runs"]) == (n, tested, 3, 1)
    assert found["allow"]["strategies"] == ["fedavg"]
    assert found["disk_used"] == size(nodes.node(0).state_files.folder / nodes.run_id)
    without = {name: value for name, value in values["data"].items() if name not in ("mean", "std")}
    path.write_text(yaml.safe_dump(values | {"data": without}))
    assert json.loads(fedsim_("node", path, "--check", "--json").out)["mean"] is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"name": "npz", "path": "none.npz"}}, "data.path: "),
        ({"data": "no-such"}, "data.name: "),
        ({"allow": {"strategies": ["no-such"]}}, "allow.strategies"),
        ({"allow": {"strategies": ["no_such_module:Mine"]}}, "allow.strategies"),
        ({"state": "0.npz/x"}, "state: "),
        ({"key": "none"}, ".*none: No such file"),
        ({"key": "/dev/zero"}, "/dev/zero: Not a regular file"),
        ({"ca": "0.yaml"}, "ca: .*0.yaml: is not a certificate"),
        ({"ca": "/dev/zero"}, "ca: /dev/zero: Not a regular file"),
        ({"device": "no-such"}, "device: "),
        ({"superlink": "lab", "ca": None}, "superlink: 'lab' should be HOST:PORT"),
    ],
    ids=str,
)
def test_a_check_says_in_a_line_why_a_node_could_not_start(shards, fedsim_, changes, said):
    values = yaml.safe_load((shards / "0.yaml").read_text()) | {"state": "state"} | changes
    (shards / "own.yaml").write_text(yaml.safe_dump(values))
    before = names(shards)
    wrong = fedsim_("node", shards / "own.yaml", "--check")
    assert (wrong.status, wrong.out, wrong.err.count("\n")) == (2, "", 1)
    assert re.match(f"fedsim: {said}", wrong.err), wrong.err
    assert names(shards) == before


def test_paths_are_relative_to_where_they_are_given(tmp_path, monkeypatch):
    """In a file to its folder, and in what replaces it to that of the process."""
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    values = {"name": "a", "data": {"name": "npz", "path": "a.npz"}, "ca": "c.crt", "key": "~/k", "state": "s"}
    (tmp_path / "x" / "n.yaml").write_text(yaml.safe_dump(values))

    def read(**given):
        found = NodeSettings.read(Path("x/n.yaml"), given)
        return [
            Path(path).absolute().relative_to(tmp_path)
            for path in (found.data["path"], found.ca, found.key, found.state)
        ]

    assert read() == [Path("x/a.npz"), Path("x/c.crt"), Path("me/k"), Path("x/s")]
    given = read(**{"data.path": "b.npz", "ca": "d/c.crt", "key": "~/j", "state": "t"})
    assert given == [Path("b.npz"), Path("d/c.crt"), Path("me/j"), Path("t")]
    assert read(data={"name": "npz", "path": "b.npz"})[0] == Path("b.npz")
    with pytest.raises(ConfigError, match="ca: ~no-such-user/c: there is no such home folder"):
        read(ca="~no-such-user/c")


def test_a_node_logs_so_many_lines_a_minute(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("fedsim.flower.node_process.monotonic", lambda: now[0])
    few = FewLines()
    record = logging.makeLogRecord({"msg": "%s", "args": ("refused",)})
    assert sum(few.filter(record) for _ in range(10_000)) == 600
    now[0] = 61.0
    assert few.filter(record)
    assert record.getMessage() == "refused (9400 lines left out)"


# Plans


@pytest.mark.parametrize(
    "settings",
    [
        {"model": {"name": "cnn_bn", "widths": [3, 4], "freeze": ["*1*"]}},
        {"model": {"name": "cnn_bn", "widths": [3, 4], "dropout": 0.3, "norm": "group"}},
        {"local": {"lr": 0.1, "distillation": {"teacher": "TEACHER", "model": {"name": "2nn"}}}},
        {"local": {"lr": 0.1, "distillation": {"teacher": "global"}, "channels_last": True}},
        {
            "local": {
                "lr": 0.1,
                "loss": {"name": "hinge", "margin": 2},
                "class_weights": [1, 2, 3],
                "oversample": False,
            }
        },
    ],
    ids=["frozen", "group", "teacher", "distilled", "weighted"],
)
def test_a_plan_has_all_that_clients_depend_on(shards, tmp_path, settings):
    if settings.get("local", {}).get("distillation", {}).get("model"):
        teacher = build(load(CONFIG | {"model": {"name": "2nn"}, "seed": 9})).task
        file = tmp_path / "teacher.safetensors"
        save_file(untied_copies(teacher.network.state_dict()), file)
        settings = json.loads(json.dumps(settings).replace("TEACHER", str(file)))
    simulation = build(config(**settings))
    nodes = Nodes(shards)
    deployed = simulated(nodes, **settings)
    assert str(tmp_path) not in nodes.plan
    assert [deployed.round().fingerprint for _ in range(2)] == [simulation.round().fingerprint for _ in range(2)]


def test_weights_from_a_file_are_sent_and_the_file_is_not_named(shards, tmp_path):
    file = tmp_path / "w.safetensors"
    save_file(untied_copies(build(load(CONFIG | {"seed": 9})).task.network.state_dict()), file)
    spec = {"model": {"name": "cnn_bn", "widths": [3, 4], "weights": str(file), "freeze": ["*1*"]}}
    simulation, nodes = build(config(**spec)), Nodes(shards)
    deployed = simulated(nodes, **spec)
    file.unlink()
    assert deployed.round().fingerprint == simulation.round().fingerprint
    assert str(tmp_path) not in nodes.plan


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=1))
def test_a_plan_keeps_every_bit_and_has_one_text(scale):
    form = {"shape": [1, 8, 8], "dtype": "float32", "classes": 3, "scale": scale, "shift": []}
    plan = Plan.read(json.dumps(PLAN | {"examples": form}))
    again = Plan.read(plan.json_text())
    assert again.json_text() == plan.json_text()
    assert torch.equal(torch.tensor(again.examples.scale), torch.tensor(scale))


PLAN = json.loads(plan_of(load(CONFIG).model_dump(mode="json"), build_data(load(CONFIG))).json_text())
NAMES = st.sampled_from(["os:system", "builtins:eval", "fedavg", "cnn_bn", "this:that", "", "a:b:c"])
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | NAMES | st.just(10**400),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "inner", "weights", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


def paths(values, before=()):
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield (*before, key)
        if isinstance(value, dict | list):
            yield from paths(value, (*before, key))


PATHS = list(paths(PLAN))


@cache
def initial():
    return initial_of(build(load(CONFIG)).task)


def changed(path, value, new_key=None):
    plan = copy.deepcopy(PLAN)
    place = plan
    for key in path[:-1]:
        place = place[key]
    if new_key is not None and isinstance(place, dict):
        place[new_key] = value
    else:
        place[path[-1]] = value
    return plan


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    folder = tmp_path_factory.mktemp("node")
    write_shards(build_data(load(CONFIG)), folder / "shards")
    with Node(
        NodeSettings.read(folder / "shards/0.yaml", {"state": str(folder), "device": "cpu", "allow": TIGHT})
    ) as made:
        yield made


TIGHT = {
    "max_new_runs": 1000,
    "max_epochs": 5,
    "max_steps": 9,
    "max_batch_size": 8,
    "max_parameters": 10_000,
    "max_bytes": "1MiB",
}


def refused(node, plan, why="", tensors=None):
    text = plan if isinstance(plan, str) else json.dumps(plan)
    joined = node.join(Invitation(uuid4().hex, text, initial() if tensors is None else tensors))
    assert joined.error is not None
    assert why in joined.error
    assert joined.error.isprintable()
    assert len(joined.error) <= 200


@settings(max_examples=100)
@given(st.sampled_from(PATHS), JUNK, st.none() | st.sampled_from(["inner", "weights", "pretrained", "name"]))
def test_a_hostile_plan_is_refused_in_a_line(node, path, value, new_key):
    modules = set(sys.modules)
    joined = node.join(Invitation(uuid4().hex, json.dumps(changed(path, value, new_key)), initial()))
    assert joined.error is None or (joined.error.isprintable() and len(joined.error) <= 200)
    assert not {"this", "that", "a"} & (set(sys.modules) - modules)


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        (("strategy", "name"), "os:system", "strategy.name: on this node 'os:system' is unknown; allowed: fedavg"),
        (
            ("strategy",),
            {"name": "personal", "inner": {"name": "os:system"}, "layers": ["*"]},
            "strategy.inner.name",
        ),
        (("strategy",), {"name": "personal", "inner": "os:system", "layers": ["*"]}, "strategy.inner: should be"),
        (("strategy",), {"name": "fedavg", "inner": {"name": "os:system"}}, "strategy.inner.name"),
        (("strategy",), "fedavg", 'plan.strategy: "fedavg" should be a mapping'),
        (("model", "name"), "torchvision.models:resnet18", "model.name"),
        (("model", "name"), "resnt18", "did you mean 'resnet18'"),
        (("model", "weights"), "/etc/passwd", "model.weights: should be left out"),
        (("model", "pretrained"), "ResNet18_Weights.DEFAULT", "model.pretrained: should be left out"),
        (("model", "widths"), [10**6, 10**6], "allowed on this node: up to 10,000"),
        (("model", "widths"), [10**15, 10**15], "model"),
        (("local", "loss"), {"name": "os:system"}, "local.loss.name"),
        (("local", "schedule"), {"name": "os:system"}, "local.schedule.name"),
        (("local", "schedule"), None, "local.schedule"),
        (("local", "augment"), [{"name": "os:system"}], "local.augment[0].name"),
        (("local", "augment"), {"name": "flip"}, "local.augment: should be a list"),
        (
            ("local", "augment"),
            [{"name": "cutout", "holes": 10**9}],
            "local.augment[0].holes: is 1,000,000,000; allowed",
        ),
        (("local", "distillation"), {"model": {"name": "os:system"}}, "local.distillation.model.name"),
        (("local", "distillation"), {"model": "os:system"}, "local.distillation.model"),
        (
            ("local", "distillation"),
            {"teacher": "/etc/passwd", "model": {"name": "2nn"}},
            "a plan may not open files",
        ),
        (("local", "epochs"), 6, "local.epochs: is 6; allowed on this node: up to 5"),
        (("local", "epochs"), 10**30, "local.epochs"),
        (("local", "steps"), 10, "local.steps: is 10; allowed on this node"),
        (("local", "batch_size"), 9, "local.batch_size: is 9; allowed on this node"),
        (("local", "lr"), -1, "local.lr: -1 should be a number > 0"),
        (("local", "class_weights"), [1.0], "local.class_weights: has 1 numbers"),
        (("local", "momentum"), "x" * 10**3, "local.momentum"),
        (
            ("examples", "shape"),
            [3, 8, 8],
            "data: examples have shape [1, 8, 8], and the",
        ),
        (("examples", "dtype"), "float32", "data: examples have dtype uint8"),
        (("examples", "classes"), 2, "data: has labels up to 2; the federation has 2 classes"),
        (("examples", "crop"), 9, "data.crop"),
        (("examples", "scale"), [1.0, 2.0], "2 channels"),
        (("format",), 2, "plan.format: 2 should be 1"),
        (("seed",), -1, "plan.seed"),
        (("time_limit",), 0, "plan.time_limit"),
        (("max_examples",), 0, "plan.max_examples"),
        (("max_examples",), 1, "failures.max_examples: this node has "),
    ],
)
def test_a_plan_that_is_not_allowed_names_the_key(node, path, value, why):
    modules = set(sys.modules)
    plan = changed(path, value)
    refused(node, plan, why)
    assert not {name for name in set(sys.modules) - modules if not name.startswith(("fedsim", "torch"))}


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "{", "NaN", '{"seed": NaN}', '{"a":' * 10**4 + "1" + "}" * 10**4, "[" * 10**5,
        "1" * 10**6, json.dumps({"x": "y" * 2**21}), '{"a\\nb": 1}', '"\\ud800"', "\ud800", "{}",
        json.dumps(PLAN)[:-1],
    ],
    ids=range(15),
)  # fmt: skip
def test_what_is_no_plan_is_refused(node, text):
    refused(node, text, "")


def test_a_node_refuses_a_batch_of_one_that_its_network_cannot_take(node, monkeypatch):
    monkeypatch.setattr("fedsim.training.small_batches._why_not_one", lambda task, x: "of this test")
    n = len(node.dataset.y_train)
    plan = changed(("local", "batch_size"), next(b for b in range(2, 9) if n % b == 1))
    refused(
        node, plan, "of one example to this client, and the network needs two; set local.drop_last=true or local."
    )


def test_initial_tensors_have_to_fit(node):
    good = initial()
    model = good["model"]
    for tensors, why in (
        ({}, "model: has 207 parameters, and only 0 numbers were sent with the plan"),
        ({"model": good["model"]}, "buffers was not sent"),
        (good | {"model": model[:-1]}, "was sent, but the plan's network has model float32"),
        (good | {"model": model.double()}, "initial: model float64"),
        (good | {"model": model.long()}, "initial: model int64"),
        (good | {"model": torch.full_like(model, torch.nan)}, "not finite"),
        (good | {"constant.x": model}, "constant.x was sent, but the plan's network has no such tensor"),
        (good | {"more": torch.zeros(2**19)}, "bytes; allowed on this node"),
    ):
        refused(node, PLAN, why, tensors)


def test_only_what_is_listed_is_imported(node, tmp_path, monkeypatch):
    (tmp_path / "mine_of_the_node.py").write_text(
        "from fedsim.strategies.averaging.fedavg import FedAvg\nclass Mine(FedAvg):\n    'Mine.'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    name = "mine_of_the_node:Mine"
    plan = PLAN | {"strategy": PLAN["strategy"] | {"name": name}}
    refused(node, plan, "strategy.name")
    assert "mine_of_the_node" not in sys.modules
    allow = Allow(strategies=[name], models=["cnn_bn"])
    listing = Node(node.settings.model_copy(update={"allow": allow, "name": "other"}))
    assert listing.join(Invitation(uuid4().hex, json.dumps(plan), initial())).error is None
    refused(listing, PLAN, "strategy.name: on this node 'fedavg' is unknown; allowed: mine_of_the_node:Mine")
    whole = {"data": CONFIG["data"], "model": PLAN["model"], "strategy": name}
    sent = plan_of(load(CONFIG | whole).model_dump(mode="json"), build_data(load(CONFIG)))
    assert sent.own.keys() == {"mine_of_the_node"}
    assert listing.join(Invitation(uuid4().hex, sent.json_text(), initial())).error is None
    with (tmp_path / "mine_of_the_node.py").open("a") as file:
        file.write("# changed\n")
    refused(
        listing,
        json.loads(sent.json_text()),
        "strategy.name: the file of mine_of_the_node differs from the server's",
    )
    listing.close()
    unknown = Allow(strategies=["not_there_at_all:Mine"])
    with pytest.raises(ConfigError, match=r"allow\.strategies: there is no module 'not_there_at_all'"):
        Node(node.settings.model_copy(update={"allow": unknown, "name": "third"}))


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"name": "../x"}, "name: '../x' should be 1 to 64 letters"),
        ({"name": ""}, "name"),
        ({"allow": {"models": ["resnt18"]}}, "allow.models: 'resnt18' is unknown; did you mean 'resnet18'"),
        ({"allow": {"max_epochs": 0}}, "allow.max_epochs: 0 should be a whole number >= 1"),
        ({"allow": {"max_bytes": "much"}}, "allow.max_bytes"),
        ({"data": {"name": "npz"}}, "data.path: missing"),
        ({"devise": "cpu"}, "devise: 'devise' is unknown; did you mean 'device'"),
        ({"forget_after": -1}, "forget_after"),
    ],
)
def test_settings_that_cannot_be_name_the_key(values, why):
    with pytest.raises(ConfigError, match=re.escape(why)):
        NodeSettings.of({"name": "a", "data": {"name": "npz", "path": "x"}} | values)


# Data


def test_a_node_joins_and_answers_with_what_it_holds(shards):
    nodes = Nodes(shards)
    simulation = simulated(nodes, cohort="all")
    data, said = build_data(config()), []
    nodes.around = lambda nodes, order, answer: said.append(found := answer(order)) or found
    simulation.round()
    assert [answer.examples for answer in said] == data.sizes.tolist()
    joined = [nodes.node(k).join(Invitation(uuid4().hex, nodes.plan, nodes.initial)) for k in range(3)]
    assert [(each.examples, each.tested) for each in joined] == [*zip(data.sizes, data.own_sizes, strict=True)]


def test_shards_are_what_clients_hold(shards):
    data = build_data(config())
    for client in range(3):
        found = dict(np.load(shards / f"{client}.npz"))
        rows, held = data.rows(client), data.held_out(client)
        assert (found["y_train"] == data.labels[rows].numpy()).all()
        assert (found["y_test"] == data.labels[held].numpy()).all()
        assert (torch.from_numpy(found["x_test"]) == data.examples(torch.from_numpy(held))[0]).all()
    names = [client_name(k, 1000) for k in range(1000)]
    assert sorted(names) == names
    assert client_name(3, 12) == "client-03"
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        write_shards(data, shards)


@pytest.mark.parametrize("mapped", [False, True])
def test_shards_of_larger_images_are_whole_and_cut_as_set(tmp_path, mapped):
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (30, 3, 7, 9), dtype=np.uint8),
        "y_train": np.arange(30) % 3,
        "x_test": rng.integers(0, 256, (6, 3, 7, 9), dtype=np.uint8),
        "y_test": np.arange(6) % 3,
    }
    source = tmp_path / "arrays"
    if mapped:
        source.mkdir()
        for name, array in arrays.items():
            np.save(source / f"{name}.npy", array)
    else:
        source = tmp_path / "a.npz"
        np.savez(source, **arrays)
    about = {"mean": [0.1, 0.2, 0.3], "std": [0.3, 0.2, 0.1]}
    npz = {"name": "npz", "path": str(source), "channels": "first"}
    settings = {"data": npz | about | {"clients": 3, "crop": 5, "holdout": 0.3, "public": 0.2}}
    made = config(**settings)
    data = build_data(made)
    write_shards(data, tmp_path / "shards")
    simulation, nodes = build(made), Nodes(tmp_path / "shards")
    deployed = simulated(nodes, **settings)
    assert deployed.round().fingerprint == simulation.round().fingerprint
    assert deployed.evaluate_clients() == simulation.evaluate_clients()
    servers = dict(np.load(tmp_path / "shards" / "server.npz"))
    assert (servers["x_test"] == arrays["x_test"]).all()
    assert (servers["x_train"] == arrays["x_train"][data.public]).all()


def test_a_shard_takes_its_form_from_the_federation():
    data = DATASETS.bind({"name": "synthetic", "examples": 20, "classes": 3})()
    shard = Shard(data, classes=5, scale=(2.0,), shift=(1.0,))
    x, _ = shard.batch(torch.arange(20))
    assert torch.equal(x, data.x_train * 2.0 - 1)
    assert (shard.num_classes, len(shard.rows(7)), len(shard.held_out(7))) == (5, 20, 0)
    own = list(shard.own_batches(7, 100))
    assert torch.equal(torch.cat([y for _, y in own]), data.y_test)
    alone = Shard(replace(data, x_test=data.x_test[:0], y_test=data.y_test[:0]), classes=3)
    assert torch.equal(torch.cat([y for _, y in alone.own_batches(7, 6)]), data.y_train)
    with pytest.raises(ConfigError, match="no training examples"):
        Shard(replace(data, x_train=data.x_train[:0], y_train=data.y_train[:0]), classes=3)


def test_the_command_writes_shards_and_says_how_to_serve_them(tmp_path, fedsim_):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    arguments = ("partition", tmp_path / "c.yaml", "--out", tmp_path / "p.png", "--shards", tmp_path / "shards")
    done = fedsim_(*arguments)
    assert done.status == 0
    (line,) = [line for line in done.out.splitlines() if line.startswith("server:")]
    override = re.search("'(data=.*)'", line)[1]
    served = load(CONFIG, parse_overrides([override]))
    assert build_server_data(served).form == build_data(config()).form
    again = fedsim_(*arguments)
    assert (again.status, again.err.count("\n")) == (2, 1)
    assert "nothing is overwritten" in again.err


# The list of nodes


def test_a_list_of_nodes_is_80_columns_wide_and_keeps_its_times():
    pytest.importorskip("flwr")
    from fedsim.flower.node_list import Known, nodes_table

    today = datetime.now().astimezone().replace(hour=14, minute=2, second=11, microsecond=0)
    long, versions = "a-hospital-with-a-long-name-" * 4, {"fedsim": "0.2.0", "torch": "2.9.1+cu128"}
    nodes = [
        Known(long, "here", today.isoformat(), 123_456_789, versions, 2**63),
        Known("b[red]", "offline", today.isoformat(), None, {}, 1),
        Known("c", "offline", "2026-01-02T03:04:05", 7, {}, 2),
        Known(None, "registered", None, None, {}, 2**63 + 1),
        Known("d", "silent", today.isoformat(), None, {}, 4),
        Known("e", "offline", "no time", None, {}, 5),
    ]
    times = ["now", "14:02:11", "2026-01-02 03:04", "never", "now, no answer", "unknown"]
    for other in ([], [Known("f", "here", today.isoformat(), 8, versions | {"torch": "2.10.0+cu130"}, 6)]):
        console = Console(file=io.StringIO(), width=80)
        console.print(nodes_table([*nodes, *other]))
        shown = console.file.getvalue()
        assert max(map(cell_len, shown.splitlines())) <= 80
        assert all(re.search(rf"  {re.escape(time)}  ", shown) for time in times)
        assert "b[red]" in shown
        assert "123,456,789" in shown
        assert ("all that answered: fedsim 0.2.0, torch 2.9.1+cu128" in shown) == (not other)
        assert "examples" in shown
    assert len(nodes_table([node._replace(examples=None) for node in nodes]).columns) == 2
    why = f"refused its last invitation: data.classes: [red] {'long ' * 40}end"
    console = Console(file=io.StringIO(), width=80, soft_wrap=True)
    console.print(nodes_table([nodes[2]._replace(reason=why), nodes[3]._replace(reason="x\x1b")]))
    text = console.file.getvalue()
    assert max(map(cell_len, text.splitlines())) <= 80
    assert f"c: {why}" in " ".join(text.split())
    assert "unnamed, Flower's 9223372036854775809: x\\x1b" in text


def test_a_node_that_refused_says_so_until_it_joins(shards):
    pytest.importorskip("flwr")
    from fedsim.flower import wire
    from fedsim.flower.messages import Hello, Joined
    from fedsim.flower.node_process import respond

    nodes = Nodes(shards)
    simulated(nodes)
    node = nodes.node(0)

    def said():
        joined = wire.read(Joined, respond(node, wire.record(Hello())))
        assert joined.error is None  # for it may well take part in another run
        return joined.notes

    assert said() == ()
    why = node.join(Invitation(uuid4().hex, "{", nodes.initial)).error
    assert said() == (f"refused its last invitation: {why}",)
    assert node.join(Invitation(uuid4().hex, nodes.plan, nodes.initial)).error is None
    assert said() == ()
