"""A federation in one process: real nodes, the driver's real rounds, and between them a wire that does its worst.

The wire stands in the place of `fedsim.flower.internals.Link`. Time passes only where somebody waits, and what
goes wrong is drawn from a seed.
"""

import os
import random
from contextlib import ExitStack
from dataclasses import dataclass
from uuid import uuid4

import hostile
from flwr.app import RecordDict

from fedsim.errors import NodeError
from fedsim.experiment.build import build, build_data, build_server_data
from fedsim.experiment.config import load
from fedsim.federated.fold import failure
from fedsim.flower import dispatch, roster, run_connection, wire
from fedsim.flower.internals import LinkError, Reply
from fedsim.flower.messages import Answer, Order
from fedsim.flower.node import Node, NodeSettings
from fedsim.flower.node_process import respond
from fedsim.flower.runtime import Flower
from fedsim.flower.shards import write_shards

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
LIES = [*hostile.LIES.values()]


def shown(done):
    """What a round shows of what was learned."""
    record = done if isinstance(done, dict) else done.record()
    return {name: value for name, value in record.items() if name not in ("seconds", "bytes_up")}


def played(simulation, rounds=CONFIG["rounds"]):
    return [shown(simulation.round()) for _ in range(rounds)]


def without(simulation, missing):
    """The same simulation in which exactly these fail: reasons by client, round by round."""
    run = simulation.runtime.run

    def some(work, server, jobs, aggregator):
        jobs = list(jobs)
        reasons = {job.client_id: missing[job.round].get(str(job.client_id)) for job in jobs}
        yield from run(work, server, [job for job in jobs if not reasons[job.client_id]], aggregator)
        absent = [job for job in jobs if reasons[job.client_id]]
        failed = {job.client_id: failure(job, NodeError(reasons[job.client_id]), 0.0) for job in absent}
        yield aggregator.fold([]), [report._replace(error=reasons[k]) for k, report in failed.items()]

    simulation.runtime.run = some
    return simulation


def dropping(strategy, **settings):
    return load(CONFIG | {"strategy": strategy, "failures": {"policy": "drop"}} | settings)


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
    wanted: bool = True  # whether somebody may still ask for the reply


class Lab:
    """Nodes with their shards in `folder`, and a wire to them.

    `faults` has probabilities: of a call that it raises LinkError (`link`) or ends the run (`end`); of a look that
    a node leaves, to come back with another id (`leave`); of a letter that it comes twice (`double`), too late
    (`slow`) or never (`lost`), that its node has forgotten the plan (`forget`) or that the answer is spoiled
    (`spoil`).
    """

    def __init__(self, folder, monkeypatch, seed=0, data=CONFIG["data"], **faults):
        self.clock, self.random, self.faults = Clock(monkeypatch), random.Random(seed), faults
        monkeypatch.setattr(os, "fsync", lambda file: None)  # the machine itself does not fail
        self.folder, self.letters = folder, dict[str, Letter]()
        if not (folder / "shards").exists():
            write_shards(build_data(load(CONFIG | {"data": data})), folder / "shards")
        self.stack = ExitStack()
        self.nodes = {}
        for k in range(CONFIG["data"]["clients"]):
            settings = NodeSettings.read(folder / "shards" / f"{k}.yaml", {"state": str(folder / "state")})
            self.nodes[settings.name] = self.stack.enter_context(Node(settings))
        self.ids = {self._id(): name for name in self.nodes}  # of those that are there
        self.back = dict[str, float]()  # when others will be

    def close(self):
        self.stack.close()

    def allowing(self, strategy):
        """Itself, with nodes whose owners allow this strategy."""
        for node in self.nodes.values():
            allow = node.settings.allow.model_copy(update={"strategies": [strategy]})
            node.settings = node.settings.model_copy(update={"allow": allow})
        return self

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
                self.drop([] if letter.wanted else [to])

    def drop(self, letters):
        """Forget these letters, once the nodes have answered them, or never will."""
        for to in {*letters} & self.letters.keys():
            self.letters[to].wanted = False
            if self.letters[to].reply or self.letters[to].due == LOST:
                del self.letters[to]

    def forgets(self, name):
        """Have a node lose the plan, in memory and on disk, but not its client's states."""
        self.nodes[name].role = None
        for path in self.nodes[name].state_files.folder.glob("*/plan.json"):
            path.unlink()

    def spoil(self, name, content):
        """What becomes of a node's answer."""
        return self.random.choice(LIES).told(content) if self.happens("spoil") else content

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
        self.lab.drop(self.mine & {*messages})
        self.mine -= {*messages}

    def close(self, error=None):
        self.ended = True
        self.lab.drop(self.mine)
