"""A federation in one process: real nodes, the driver's real rounds, and between them a wire that does its worst.

The wire stands in the place of `fedsim.flower.internals.Link`. Time passes only where somebody waits, and what
goes wrong is drawn from a seed.
"""

import os
import random
from contextlib import ExitStack
from dataclasses import dataclass
from uuid import uuid4

import torch
from flwr.app import ConfigRecord, RecordDict

from fedsim.experiment.build import build, build_data, build_server_data
from fedsim.experiment.config import load
from fedsim.flower import dispatch, roster, run_connection, wire
from fedsim.flower.internals import LinkError, Reply
from fedsim.flower.messages import Answer, Joined, Order
from fedsim.flower.node import Node, NodeSettings
from fedsim.flower.node_process import respond
from fedsim.flower.runtime import Flower
from fedsim.flower.shards import write_shards
from fedsim.flower.transport import Coded, decode, encode

CONFIG = {
    "seed": 3,
    "rounds": 4,
    "data": {
        "name": "synthetic",
        "shape": [1, 8, 8],
        "examples": 45,
        "test_examples": 20,
        "classes": 3,
        "noise": 0.7,
        "clients": 3,
        "holdout": 0.2,
    },
    "model": {"name": "cnn_bn", "widths": [4, 30], "dropout": 0.3},
    "strategy": "fedavg",
    "cohort": "all",
    "local": {"lr": 0.05, "batch_size": 4},
    "runtime": {"name": "serial", "device": "cpu"},
}
LOST = 1e9  # seconds


def shown(done):
    """What a round shows of what was learned."""
    record = done if isinstance(done, dict) else done._asdict()
    return {name: value for name, value in record.items() if name not in ("seconds", "bytes_up")}


class Clock:
    """Seconds that pass where somebody waits."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        for module in (dispatch, run_connection, roster):
            monkeypatch.setattr(module, "monotonic", lambda: self.now)
            if hasattr(module, "sleep"):
                monkeypatch.setattr(module, "sleep", self.sleep)

    def sleep(self, seconds):
        self.now += seconds


@dataclass
class Letter:
    """A message on the wire, and the reply to it when there is one."""

    node: int
    content: RecordDict
    due: float
    expires: float
    reply: Reply | None = None


class Lab:
    """Nodes with their shards in `folder`, and a wire to them.

    `faults` has probabilities: of a call that it raises LinkError (`link`) or ends the run (`end`); of a look that
    a node leaves, to come back with another id (`leave`); of a letter that it comes twice (`double`), too late
    (`slow`) or never (`lost`), that its node has forgotten the plan (`forget`) or that the answer is spoiled
    (`spoil`).
    """

    def __init__(self, folder, monkeypatch, seed=0, **faults):
        self.clock, self.random, self.faults = Clock(monkeypatch), random.Random(seed), faults
        monkeypatch.setattr(os, "fsync", lambda file: None)  # the machine itself does not fail
        self.folder, self.letters = folder, dict[str, Letter]()
        if not (folder / "shards").exists():
            write_shards(build_data(load(CONFIG)), folder / "shards")
        self.stack = ExitStack()
        self.nodes = {}
        for k in range(CONFIG["data"]["clients"]):
            settings = NodeSettings.read(folder / "shards" / f"{k}.yaml", {"state": str(folder / "state")})
            self.nodes[settings.name] = self.stack.enter_context(Node(settings))
        self.ids = {self._id(): name for name in self.nodes}  # of those that are there
        self.back = dict[str, float]()  # when others will be

    def close(self):
        self.stack.close()

    def simulation(self, config, **options):
        """Of a resolved config, on these nodes."""
        return build(
            config,
            build_server_data(config),
            lambda task, data: Flower(task, data, lambda: Wire(self), **{"round_timeout": 900.0} | options),
        )

    def happens(self, fault):
        return self.random.random() < self.faults.get(fault, 0)

    def leaves(self, node, seconds):
        """Have a node gone for a while; what was sent to it is answered with an error, or never."""
        self.back[self.ids.pop(node)] = self.clock.now + seconds
        for to, letter in self.letters.items():
            if letter.node == node and letter.reply is None:
                letter.due = LOST
                if self.random.random() < 0.5:
                    letter.reply = Reply(to, node, None, "the node is gone", 0, gone=True)

    def tick(self):
        """A moment passes, and what is due happens."""
        self.clock.now += 0.002
        now = self.clock.now
        for name in [name for name, when in self.back.items() if when <= now]:
            del self.back[name]
            self.ids[self._id()] = name
            if self.happens("forget"):
                self.forgets(name)
        for node in list(self.ids):
            if self.happens("leave"):
                self.leaves(node, self.random.choice([0.0, 0.3, 20.0]))
        due = [to for to, letter in self.letters.items() if letter.due <= now and letter.reply is None]
        for to in self.random.sample(due, len(due)):
            letter = self.letters[to]
            if letter.node in self.ids:
                letter.reply = self._replied(to, letter, self.ids[letter.node])

    def forgets(self, name):
        """Have a node lose the plan, in memory and on disk, but not its client's states."""
        self.nodes[name].role = None
        for path in self.nodes[name].state_files.folder.glob("*/plan.json"):
            path.unlink()

    def spoil(self, name, content):
        """What becomes of a node's answer."""
        return self.random.choice(list(SPOILS.values()))(content) if self.happens("spoil") else content

    def _id(self):
        return self.random.randrange(2**63)

    def _replied(self, to, letter, name):
        if self.happens("forget"):
            self.forgets(name)
        content = respond(self.nodes[name], letter.content)
        if wire.kind(letter.content) == Order.__name__:
            if self.happens("double"):
                content = respond(self.nodes[name], letter.content)
            if not wire.read(Answer, content).lost:
                content = self.spoil(name, content)
        if isinstance(content, str):
            return Reply(to, letter.node, None, content, 0)
        return Reply(to, letter.node, content, None, 100)


class Wire:
    """The Link to a lab."""

    def __init__(self, lab):
        self.lab, self.ended, self.mine = lab, False, set()
        if lab.happens("link"):
            raise LinkError("no connection to the SuperLink", again=True)

    def _call(self):
        self.lab.tick()
        self.ended |= self.lab.happens("end")
        if self.ended:
            raise LinkError("the SuperLink has ended this run")
        if self.lab.happens("link"):
            raise LinkError("no connection to the SuperLink", again=True)

    def nodes(self):
        self._call()
        return set(self.lab.ids)

    def send(self, contents, kind, *, group, ttl):
        assert ttl > 0
        lab, sent = self.lab, {}
        self._call()
        for node, content in contents.items():
            delay = LOST if kind == "train" and lab.happens("lost") else lab.random.uniform(0, 3)
            delay = 2000.0 if kind == "train" and lab.happens("slow") else delay
            letter = Letter(node, content, lab.clock.now + delay, lab.clock.now + ttl)
            to = uuid4().hex
            lab.letters[to], sent[to] = letter, node
            self._call()  # fails in the middle, too
        self.mine |= sent.keys()
        return sent

    def receive(self, waiting, *, most_bytes):
        self._call()
        replies = []
        for to in set(waiting) & self.mine:
            letter = self.lab.letters[to]
            if letter.expires < self.lab.clock.now:
                replies.append(Reply(to, letter.node, None, "the message expired", 0, gone=True))
            elif letter.node not in self.lab.ids and letter.reply is None and letter.due < LOST:
                replies.append(Reply(to, letter.node, None, "the node is gone", 0, gone=True))
            elif letter.reply:
                replies.append(letter.reply)
        self.mine -= {reply.to for reply in replies}
        for reply in replies:  # nobody asks again
            del self.lab.letters[reply.to]
        return self.lab.random.sample(replies, len(replies))

    def abandon(self, messages):
        self.mine -= {*messages}

    def close(self, error=None):
        self.ended = True


# What nodes that are broken, or of somebody else, could answer.


def _changed(**changes):
    return lambda content: wire.record(wire.read(Answer, content)._replace(**changes))


def _coded(change):
    def spoil(content):
        answer = wire.read(Answer, content)
        return wire.record(answer._replace(message={n: change(c) for n, c in answer.message.items()}))

    return spoil


def _message(**tensors):
    return lambda content: wire.record(wire.read(Answer, content)._replace(message=encode(tensors, "exact")[0]))


def _times(factor):
    def spoil(content):
        answer = wire.read(Answer, content)
        message = {n: v * factor if v.is_floating_point() else v for n, v in decode(answer.message).items()}
        return wire.record(answer._replace(message=encode(message, "exact")[0]))

    return spoil


def _text(content):
    content.config_records[wire.KEY]["json"] = '{"weight": "many"}'
    return content


SPOILS = {
    "an error": lambda content: "the node's app died",
    "another kind": lambda content: wire.record(Joined("me", {}, None)),
    "nothing": lambda content: RecordDict(),
    "no JSON": _text,
    "JSON of bytes": lambda content: RecordDict({wire.KEY: ConfigRecord({"kind": b"Answer", "json": b"\xff"})}),
    "numbers": lambda content: RecordDict({wire.KEY: ConfigRecord({"kind": 1, "json": [2]})}),
    "no tensors": lambda content: RecordDict({wire.KEY: content.config_records[wire.KEY]}),
    "a failure": _changed(error="KeyError: 'x' (mine.py:3)"),
    "another state": _changed(version=99),
    "a negative state": _changed(version=-1),
    "no examples": _changed(examples=0),
    "too many examples": _changed(examples=10**30),
    "examples beyond any float": _changed(examples=10**400),
    "a strange mark": _changed(mark=-1),
    "a long mark": _changed(mark=2**70),
    "a sum beyond any float": _changed(metrics={"loss": 1.7e308, "examples": 1.0, "steps": 1.0}),
    "more than all others": _times(1e20),
    "no weight": _changed(weight=float("nan")),
    "less weight": _changed(weight=-5.0),
    "all weight": _changed(weight=float("inf")),
    "a strange metric": _changed(metrics={"loss": float("inf"), "examples": 1.0, "steps": 1.0}),
    "fewer metrics": _changed(metrics={"examples": 3.0}),
    "other metrics": _changed(metrics={"loss": 1.0, "examples": 1.0, "steps": 1.0, "more": 1.0}),
    "no examples in metrics": _changed(metrics={"loss": 1.0, "examples": 0.0, "steps": -1.0}),
    "not finite": _message(model=torch.full((5,), float("nan"))),
    "another shape": _message(model=torch.ones(5)),
    "another type": _message(model=torch.ones(5, dtype=torch.int64)),
    "fewer bytes": _coded(lambda coded: coded._replace(data=coded.data[:-1])),
    "no such type": _coded(lambda coded: coded._replace(dtype="object")),
    "no such coding": _coded(lambda coded: coded._replace(coding="pickle")),
    "too large": _coded(lambda coded: Coded("float32", (2**28,), "lossless", b"\0" * 2**21)),
    "a negative shape": _coded(lambda coded: coded._replace(shape=(-1,))),
}
