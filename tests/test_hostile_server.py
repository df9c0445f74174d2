"""A server that lies: whatever it orders, a node answers with a reason in one line, and is none the worse for it.

Nothing that it names is imported or opened, the node's files stay as they were, and the next honest order has the
answer that it has without.
"""

import copy
import json
import sys
from math import inf, nan
from uuid import uuid4

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

import fedsim
from fedsim.experiment.build import build, build_data
from fedsim.experiment.config import load
from fedsim.flower import wire
from fedsim.flower.messages import Answer, Hello, Invitation, Joined, Order
from fedsim.flower.node import Node, NodeSettings
from fedsim.flower.node_process import respond
from fedsim.flower.plan import digest, initial_of, plan_of
from fedsim.flower.shards import write_shards

CONFIG = {
    "seed": 3,
    "rounds": 3,
    "data": {"name": "synthetic", "examples": 12, "test_examples": 6, "classes": 3, "clients": 1},
    "model": {"name": "cnn_bn", "widths": [3, 4]},
    "strategy": "scaffold",
    "cohort": "all",
    "local": {"lr": 0.05, "batch_size": 4},
    "runtime": {"name": "serial", "device": "cpu"},
}
STRATEGIES = ["scaffold", "personal"]  # that the node allows
LOUD = (  # what Python's audit hooks are told of; not of looking into a folder
    *("open", "import", "pickle.", "socket.", "subprocess.", "shutil.", "ctypes.dlopen"),
    *("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.remove", "os.rename", "os.mkdir", "os.symlink"),
)
INSTALLED = (*filter(None, sys.path), *fedsim.__path__, "fedsim.")


class World:
    """A node that has joined a run of an honest server and trained a round, and the honest order of the next."""

    def __init__(self, folder):
        data = build_data(load(CONFIG))
        write_shards(data, folder / "shards")
        simulation = build(load(CONFIG), data)
        self.plan, self.initial = plan_of(simulation.config, data).json_text(), initial_of(simulation.task)
        self.run, self.home = uuid4().hex, folder / "state"
        limits = {"max_epochs": 5, "max_bytes": "1MiB", "max_augmentation": 10, "strategies": STRATEGIES}
        settings = {"state": str(self.home), "device": "cpu", "allow": limits}
        self.node = Node(NodeSettings.read(folder / "shards" / "0.yaml", settings))
        assert self.node.join(Invitation(self.run, self.plan, self.initial)).error is None
        server = {name: simulation.server[name] for name in ("model", "c", "buffers")}
        first = Order(self.run, digest(self.plan), "train", 0, 0, 0, 0, (1,), "exact", 1, False, server)
        answer = self.node.work(first)
        assert answer.error is None
        self.order = first._replace(round=1, version=1, mark=answer.mark)
        self.honest = self.answer()
        self.heard, self.listens = list[str](), False
        sys.addaudithook(self.hear)

    def hear(self, event, arguments):
        """Audit hooks stay for as long as the process lives."""
        own = arguments and str(arguments[0]).startswith((str(self.home), *INSTALLED))
        if self.listens and event.startswith(LOUD) and not own:
            self.heard.append(f"{event} {arguments[:1]}"[:300])

    def answer(self):
        """To the honest order, computed anew."""
        if self.node.role is not None:  # it would answer what it has answered before
            self.node.role.done = None
        answer = wire.read(Answer, respond(self.node, wire.record(self.order)))
        assert answer.error is None, answer.error
        return answer._replace(seconds=0.0)

    def files(self):
        """The content of the files of the run: of tensors and what is said of them in any order."""
        folder = self.home / self.node.settings.name / self.run
        return {path.name: content(path.read_bytes()) for path in folder.iterdir()}

    def reason(self, content):
        """Why the node does not do what is asked."""
        try:
            self.heard, self.listens = [], True
            reply = respond(self.node, content)
        except ValueError as error:
            return str(error)
        finally:
            self.listens = False
        kind = Joined if wire.kind(content) == Invitation.__name__ else Answer
        found = wire.read(kind, reply)
        return "does not know the plan" if kind is Answer and found.lost else found.error

    def order_of(self, **changes):
        """The honest order with other numbers, whatever these are; None leaves one out."""
        return changed(wire.record(self.order), changes)

    def invitation(self, plan=None, initial=None, **changes):
        """The honest invitation to a new run, with another plan, other tensors or other names."""
        content = wire.record(Invitation(uuid4().hex, self.plan, self.initial))
        if initial is not None:
            content = RecordDict({wire.KEY: content.config_records[wire.KEY], "initial": initial(self.initial)})
        return changed(content, {} if plan is None else {"plan": plan}, **changes)

    def plan_with(self, path, value):
        """The text of the honest plan with another value at a path; an ellipsis leaves it out."""
        plan = json.loads(self.plan)
        place = plan
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        return json.dumps(plan)


def content(file):
    if file.startswith(b"{"):
        return file
    start = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:start]), file[start:]


def changed(content, changes, text=None, kind=None):
    about = content.config_records[wire.KEY]
    numbers = json.loads(about["json"]) | changes
    left = {name: value for name, value in numbers.items() if value is not None}
    record = ConfigRecord({"kind": kind or about["kind"], "json": json.dumps(left) if text is None else text})
    return RecordDict({wire.KEY: record, **content.array_records})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = World(tmp_path_factory.mktemp("hostile"))
    yield made
    made.node.close()


def refuses(world, content, why):
    before = world.files()
    reason = world.reason(content)
    assert reason is not None
    assert why in reason
    assert reason.isprintable()
    assert len(reason) < 300
    assert not world.heard
    assert world.files() == before
    assert world.answer() == world.honest
    assert world.files() == before


ORDERS = [
    ({"round": -1}, "order.round: -1 should be from 0"),
    ({"round": 10**9}, "order.round"),
    ({"round": 2**63}, "order.round"),
    ({"round": 10**300}, "order.round"),
    ({"round": 1e300}, "round: "),
    ({"round": nan}, "round: "),
    ({"round": inf}, "round: "),
    ({"round": "1"}, "round: "),
    ({"round": True}, "round: "),
    ({"round": [1]}, "round: "),
    ({"round": None}, "round: Field required"),
    ({"round": 0}, "order.version"),  # back to a round from which this state cannot be
    ({"client": 1}, "in this run the node is client 0"),
    ({"client": -1}, "order.client"),
    ({"client": 2**70}, "order.client"),
    ({"version": 2, "mark": 5}, "order.version"),
    ({"version": -1}, "order.version"),
    ({"version": 1, "mark": 5}, "was replaced when its round was repeated"),
    ({"version": 1, "mark": -(2**70)}, "was replaced"),
    ({"round": 9, "version": 7}, "state 7 of client 0 is not here"),
    *(({"cohort": ids}, "order.cohort: should be ids") for ids in [(1,), (0, 0), (0, 2, 1), (-1, 0), (0, 2**40)]),
    ({"batch_size": 0, "task": "evaluate"}, "order.batch_size"),
    ({"batch_size": 2**40, "task": "evaluate"}, "order.batch_size"),
    ({"transport": "pickle"}, "transport: "),
    ({"transport": "../exact"}, "transport: "),
    ({"task": "exec"}, "task: "),
    ({"train_mode": "yes"}, "train_mode: "),
    ({"round": 9, "checkpoints": [1] * 100_001}, "allow.max_states: 100,001 checkpoints; allowed on this node"),
    ({"checkpoints": ["a"]}, "checkpoints.0: "),
    ({"checkpoints": {"a": 1}}, "checkpoints: "),
    ({"run": "../../elsewhere"}, "run: '../../elsewhere' is no run's id"),
    ({"run": "/etc/passwd\x00"}, "is no run's id"),
    ({"run": "\u0660" * 32}, "is no run's id"),
    ({"run": "a" * 32 + "\n"}, "is no run's id"),
    ({"run": "\x1b[31m" * 10**5}, "is no run's id"),
    ({"run": "0" * 32, "version": 0, "mark": 0}, "does not know the plan"),
    ({"run": "0" * 32}, "state 1 of client 0 is not here"),
    ({"plan": "0" * 64}, "does not know the plan"),
    ({"plan": "\n" * 10**5}, "does not know the plan"),
    ({"import": "os"}, "import: Extra inputs"),
    ({"evil\n\x1b": 1}, "evil"),
]


@pytest.mark.parametrize(("changes", "why"), ORDERS, ids=range(len(ORDERS)))
def test_orders(world, changes, why):
    refuses(world, world.order_of(**changes), why)


def tensor(value, **changes):
    """A tensor as it travels, with something else in the place of the truth."""
    about = {"dtype": "float32", "shape": tuple(value.shape), "stype": "fedsim.exact"}
    about |= {"data": value.numpy().tobytes()}
    return Array(**about | changes)


TENSORS = [  # in the place of the model of an order
    ({"dtype": "float64"}, "do not fit float64"),
    ({"dtype": "object"}, "dtype 'object' is unknown"),
    ({"dtype": "complex64"}, "dtype 'complex64' is unknown"),
    ({"shape": (-1,)}, "is not a shape of a tensor"),
    ({"shape": (2**62,)}, "is not a shape of a tensor"),
    ({"shape": (1,) * 100}, "is not a shape of a tensor"),
    ({"shape": ()}, "do not fit float32"),
    ({"shape": (0,), "data": b""}, "order.server: is"),
    ({"data": b""}, "0 bytes do not fit"),
    ({"stype": "numpy.ndarray"}, "coding 'numpy.ndarray' is unknown"),
    ({"stype": "fedsim.pickle"}, "coding 'pickle' is unknown"),
    ({"stype": "fedsim.lossless", "data": b"\x80\x04cos\nsystem\n."}, "model: "),
    ({"stype": "fedsim.int8"}, "do not fit float32"),
    ({"shape": (2**20,), "stype": "fedsim.lossless", "data": b"\xff" * 2**13}, "model: "),
]


@pytest.mark.parametrize(("changes", "why"), TENSORS, ids=range(len(TENSORS)))
def test_tensors(world, changes, why):
    content = wire.record(world.order)
    content.array_records["server"]["model"] = tensor(world.order.server["model"], **changes)
    refuses(world, content, why)


STATES = [  # what an order's server state becomes
    (lambda server: server | {"model": server["model"] * nan}, "model has values that are not finite"),
    (lambda server: server | {"c": server["c"] + inf}, "c has values that are not finite"),
    (lambda server: {k: v for k, v in server.items() if k != "buffers"}, "order.server: is"),
    (lambda server: server | {"c": server["c"][:0]}, "order.server: is"),
    (lambda server: server | {"\x1b[31m../x\n": server["c"]}, "order.server: is"),
    (lambda server: {f"t{i}": server["c"][:1] for i in range(1000)}, "order.server: is"),
    (lambda server: server | {"model": torch.zeros(2**19)}, "allowed on this node: up to 1,048,576"),
    (lambda server: {}, "order.server: is nothing"),
]


@pytest.mark.parametrize(("change", "why"), STATES, ids=range(len(STATES)))
def test_states(world, change, why):
    refuses(world, wire.record(world.order._replace(server=change(world.order.server))), why)


DEEP = '{"a":' * 10**5 + "1" + "}" * 10**5
FOREIGN = [  # what is no message, or is not what it says
    (lambda world: RecordDict(), "it is not from fedsim, or from another version"),
    (lambda world: RecordDict({"fedsim.99": ConfigRecord({"kind": "Order", "json": "{}"})}), "another version"),
    (lambda world: RecordDict({wire.KEY: ConfigRecord({"json": "{}"})}), "has no 'kind'"),
    (lambda world: RecordDict({wire.KEY: ConfigRecord({"kind": "Order"})}), "has no 'json'"),
    (lambda world: RecordDict({wire.KEY: ConfigRecord({"kind": "Order", "json": b"\x80\x04."})}), "order "),
    (lambda world: RecordDict({wire.KEY: ConfigRecord({"kind": [1.0] * 10**5, "json": "{}"})}), "should be Order"),
    (lambda world: RecordDict({wire.KEY: wire.record(world.order).config_records[wire.KEY]}), "has no 'server'"),
    (lambda world: changed(wire.record(world.order), {}, kind="Import"), "is 'Import' and should be Order"),
    (lambda world: changed(wire.record(world.order), {}, kind="Or\nder\x1b"), "should be Order"),
    (lambda world: changed(wire.record(world.order), {}, kind="Answer"), "is 'Answer' and should be Order"),
    (
        lambda world: changed(wire.record(world.order), {}, kind="Invitation"),
        "has 'server', which no Invitation has",
    ),
    (lambda world: changed(wire.record(world.order), {}, DEEP), "order "),
    (lambda world: changed(wire.record(world.order), {}, "[" * 10**6), "order "),
    (lambda world: changed(wire.record(world.order), {}, '{"round": ' + "9" * 10**5 + "}"), "order "),
    (lambda world: changed(wire.record(world.order), {}, "\ud800"), "order "),
]


@pytest.mark.parametrize(("make", "why"), FOREIGN, ids=range(len(FOREIGN)))
def test_what_is_no_order(world, make, why):
    refuses(world, make(world), why)


PLANS = [
    (("format",), 99, "plan.format: 99 should be 1"),
    (("seed",), 2**64, "plan.seed"),
    (("clients",), 2**30, "plan.clients: 1073741824 should be a whole number >= 1 and <= 1048576"),
    (("clients",), 0, "plan.clients: 0 should be"),
    (("time_limit",), inf, "plan: "),
    (("time_limit",), -1e300, "plan.time_limit"),
    (("evil\x1b\n",), 1, "plan.evil"),
    (("strategy", "name"), "os:system", "strategy.name: on this node 'os:system' is unknown"),
    (("strategy", "name"), "../strategy", "strategy.name"),
    (("strategy", "name"), "fedavg", "on this node 'fedavg' is unknown; allowed: scaffold, personal"),
    (("strategy", "name"), "scaffold\x00\x1b", "strategy.name"),
    (("strategy",), {"name": "personal", "layers": ["*"], "inner": {"name": "os:system"}}, "strategy.inner.name"),
    (("strategy",), {"name": "personal", "layers": ["[" * 50_000]}, "plan.strategy: has 50,000 characters in one"),
    (("strategy",), {"name": "personal", "layers": ["*"] * 50_000}, "plan.strategy: has 50,000 entries in one"),
    (("model", "widths"), [10_000, 10_000], "model: has 900,270,003 parameters, and only 221 numbers were sent"),
    (("model", "widths"), [2**62, 2**62], "model"),
    (("model", "widths"), [-3, 4], "model.widths"),
    (("model", "weights"), "/etc/passwd", "model.weights: should be left out"),
    (("model", "pretrained"), "../x", "model.pretrained: should be left out"),
    (("model", "name"), "torch.hub:load", "model.name"),
    (("local", "lr"), inf, "plan: "),
    (("local", "lr"), 1e300, "local.lr"),
    (("local", "lr"), -0.1, "local.lr"),
    (("local", "epochs"), 6, "local.epochs: is 6; allowed on this node: up to 5"),
    (("local", "batch_size"), 2**40, "local.batch_size"),
    (("local", "loss"), {"name": "builtins:eval"}, "local.loss.name"),
    (("local", "schedule"), {"name": "subprocess:run"}, "local.schedule.name"),
    (("local", "augment"), [{"name": "flip"}] * 20_000, "plan.local: has 20,000 entries in one place"),
    (("local", "augment"), [{"name": "cutout", "holes": 11}], "local.augment[0].holes: is 11"),
    (("local", "augment"), [{"name": "cutout", "size": -1}], "local.augment"),
    (("local", "distillation"), {"teacher": "/etc/passwd"}, "a plan may not open files"),
    (("local", "distillation"), {"teacher": "sent", "model": {"name": "2nn"}}, "numbers were sent with the plan"),
    (("local", "class_weights"), [1.0] * 10**5, "local.class_weights: has 100000 numbers; there are 3 classes"),
    (("examples", "shape"), [2**40] * 3, "data: examples have shape"),
    (("examples", "shape"), [0], "plan.examples.shape"),
    (("examples", "shape"), [], "data: examples have shape [1, 8, 8], and the federation's []"),
    (("examples", "classes"), 2**40, "data.classes: 3 here, and 1099511627776 in the federation"),
    (("examples", "scale"), [0.0], "data.mean: "),
    (("examples", "shift"), [nan], "plan: "),
    (("examples", "crop"), 2**40, "data.crop"),
    (("examples", "class_names"), ["a\u202eb"] * 3, "should be up to 200 printable characters"),
    (("examples", "class_names"), ["a" * 10**5] * 3, "should be up to 200 printable characters"),
    (("examples", "preparation"), "\x1b[2J", "plan.examples.preparation"),
]


@pytest.mark.parametrize(("path", "value", "why"), PLANS, ids=range(len(PLANS)))
def test_plans(world, path, value, why):
    refuses(world, world.invitation(world.plan_with(path, value)), why)


def but(**changes):
    """The right tensors of an invitation with these changes: a tensor, a factor, or None to leave one out."""

    def made(right):
        factors = {name: right[name] * value for name, value in changes.items() if isinstance(value, float)}
        states = {name: value for name, value in (right | changes | factors).items() if value is not None}
        return wire.arrays(wire.encode(states, "exact")[0])

    return made


ONE = torch.zeros(1)
INVITATIONS = [
    ({"run": "../../elsewhere"}, "run: '../../elsewhere' is no run's id"),
    ({"run": "A" * 32}, "is no run's id"),
    ({"run": 7}, "run: "),
    ({"plan": "null"}, "plan: should be a mapping"),
    ({"plan": '{"seed": NaN}'}, "plan: is not JSON"),
    ({"plan": DEEP}, "plan: is not JSON"),
    ({"plan": "x" * 2**21}, "plan: has 2097152 characters"),
    ({"plan": ["a"]}, "plan: "),
    ({"initial": but(model=None)}, "model: has 207 parameters, and only 14 numbers were sent"),
    ({"initial": but(buffers=None)}, "initial: buffers was not sent"),
    ({"initial": but(buffers=torch.zeros(0))}, "initial: buffers float32 (0,) was sent"),
    ({"initial": but(model=nan)}, "initial: model has values that are not finite"),
    ({"initial": but(**{"constant.model": ONE})}, "constant.model was sent, but the plan's network has no such"),
    ({"initial": but(**{"../\x1b": ONE})}, "was sent, but the plan's network has no such tensor"),
    ({"initial": but(more=torch.zeros(2**19))}, "allowed on this node: up to 1,048,576"),
    ({"initial": but(**{f"t{i}": ONE for i in range(10_000)})}, "tensors; allowed: 10000"),
    ({"initial": lambda right: ArrayRecord({"model": tensor(ONE, dtype="object")})}, "'object' is unknown"),
]


@pytest.mark.parametrize(("changes", "why"), INVITATIONS, ids=range(len(INVITATIONS)))
def test_invitations(world, changes, why):
    plan, initial = changes.get("plan"), changes.get("initial")
    run = {"run": changes["run"]} if "run" in changes else {}
    content = world.invitation(plan, initial)
    refuses(world, changed(content, run), why)


def test_a_node_that_was_restarted_is_the_client_that_it_was(world):
    world.node.role = None
    assert "belongs to client 0" in world.reason(world.order_of(client=1))
    answer = wire.read(Answer, respond(world.node, wire.record(world.order)))
    assert answer._replace(seconds=0.0) == world.honest


def test_what_is_asked_a_hundred_times_is_done_once(world, monkeypatch):
    before, runs = world.answer(), []
    monkeypatch.setattr(world.node.role.worker, "run", lambda *work: runs.append(work))
    content = wire.record(world.order)
    for _ in range(100):
        assert wire.read(Answer, respond(world.node, content))._replace(seconds=0.0) == before
        assert wire.read(Joined, respond(world.node, wire.record(Hello()))).name == world.node.settings.name
    assert not runs


def test_another_plan_for_a_run_that_is_there_leaves_the_clients_states(world):
    """As a resumed run may have one. The server can have the old plan again, and goes on as before."""
    before = world.files()
    other = json.loads(copy.copy(world.plan))
    other["local"]["lr"] = 0.5
    for plan in (json.dumps(other), world.plan):
        joined = wire.read(Joined, respond(world.node, wire.record(Invitation(world.run, plan, world.initial))))
        assert joined.error is None
    assert world.files() == before
    assert world.answer() == world.honest
