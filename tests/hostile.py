"""A node that lies: the kinds of wrong answers that it gives, one a round, and what the server says of each.

As a program, `hostile.py NODE.yaml`, it is a node that does. It holds its examples and trains as all others do.
"""

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.error import Error
from flwr.app.message.arraychunk import ArrayChunk
from flwr.app.message.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.supercore.inflatable.inflatable_object import get_object_id

from fedsim.flower import node_process, wire
from fedsim.flower.internals.objects import packed, push
from fedsim.flower.messages import Answer, Joined, Order, failure
from fedsim.flower.transport import BLOCK, Coded, decode, encode


class Lie(NamedTuple):
    """What a node answers instead of an honest `RecordDict`, and a pattern of the server's reason to refuse it."""

    told: Callable[[RecordDict], RecordDict | str]
    reason: str


def _changed(**changes):
    return lambda content: wire.record(wire.read(Answer, content)._replace(**changes))


def _more(**metrics):
    """With these metrics besides, or instead of, the right ones."""

    def told(content):
        answer = wire.read(Answer, content)
        return wire.record(answer._replace(metrics=answer.metrics | metrics))

    return told


def _state(change):
    """With another message, of `change` of the right one."""

    def told(content):
        answer = wire.read(Answer, content)
        return wire.record(answer._replace(message=encode(change(decode(answer.message)), "exact")[0]))

    return told


def _each(change):
    """With a `change` of each tensor of the message."""
    return _state(lambda message: {name: change(value) for name, value in message.items()})


def _coded(change):
    """With a `change` of each encoded tensor of the message."""

    def told(content):
        answer = wire.read(Answer, content)
        return wire.record(answer._replace(message={n: change(c) for n, c in answer.message.items()}))

    return told


def _text(change):
    """With other JSON."""

    def told(content):
        content.config_records[wire.KEY]["json"] = change(content.config_records[wire.KEY]["json"])
        return content

    return told


def _record(**values):
    return lambda content: RecordDict({wire.KEY: ConfigRecord(values)})


def _renamed(content):
    return RecordDict({"fedsim.1": content.config_records[wire.KEY], "message": content.array_records["message"]})


def _crowd(count):
    """So many tensors, which are one on the wire."""

    def told(content):
        one = Array("float32", (1,), "fedsim.exact", bytes(4))
        return RecordDict(
            {
                wire.KEY: content.config_records[wire.KEY],
                "message": ArrayRecord({f"t{i}": one for i in range(count)}),
            }
        )

    return told


def _covers(mask):
    """With this mask for its first tensor, which has all values."""

    def told(content):
        answer = wire.read(Answer, content)
        return wire.record(answer._replace(message=answer.message | {f"where.{min(answer.message)}": mask}))

    return told


def _int8(scale):
    def change(coded):
        scales = torch.tensor([scale]).numpy().tobytes()
        return Coded("float32", (BLOCK,), "int8", scales + b"\1" * BLOCK)

    return _coded(change)


def _planes(entries, lengths, data):
    """Of a tensor whose planes unfold to something else."""
    head = torch.tensor(lengths, dtype=torch.int64).numpy().tobytes()
    return _coded(lambda coded: Coded("float32", (entries,), "lossless", head + data))


NOISE = "\x1b[2J\r\n\0 round 1: all is well"
FORM = r"should have .*, by its strategy, and has "
NUMBERS = {  # bounds follow from what is known of the client
    "no weight": Lie(_changed(weight=float("nan")), "weight"),
    "all weight": Lie(_changed(weight=float("inf")), "weight"),
    "less weight": Lie(_changed(weight=-1.0), "weight"),
    "more weight than its share": Lie(_changed(weight=1e9), "weight"),
    "a weight that freezes all": Lie(_changed(weight=1e300), "weight"),
    "the largest weight": Lie(_changed(weight=1.7e308), "weight"),
    "the smallest weight": Lie(_changed(weight=5e-324), "weight"),
    "the largest weight of nothing": Lie(
        lambda content: _changed(weight=1.7e308)(_each(torch.zeros_like)(content)), "weight"
    ),
    "no examples": Lie(_changed(examples=0), "examples"),
    "negative examples": Lie(_changed(examples=-1), "examples"),
    "too many examples": Lie(_changed(examples=2**40), "examples"),
    "other examples than agreed": Lie(_changed(examples=13), "examples"),
    "examples beyond any float": Lie(_changed(examples=10**400), "examples"),
    "endless steps": Lie(_more(steps=1e300), "steps"),
    "negative steps": Lie(_more(steps=-7.5), "steps"),
    "half a step": Lie(_more(steps=2.5), "steps"),
    "more steps than it was told": Lie(_more(steps=1e6), "steps"),
    "a loss without end": Lie(_more(loss=float("inf")), "loss"),
    "a loss beyond any sum": Lie(_more(loss=1.7e308), "loss"),
    "a large loss": Lie(_more(loss=1e300), "loss"),
    "no loss": Lie(_more(loss=float("nan")), "loss"),
    "more examples than there were": Lie(_more(examples=1e9), "examples"),
    "no examples in metrics": Lie(_more(examples=0.0), "metrics|examples"),
    "half an example": Lie(_more(examples=0.5), "metrics|examples"),
    "time that runs back": Lie(_changed(seconds=-1.0), "seconds"),
    "no time": Lie(_changed(seconds=float("nan")), "seconds"),
}
FORMS = {
    "an error": Lie(lambda content: "the node's app died", "the node's app died"),
    "a long error": Lie(lambda content: NOISE * 2**15, r"round 1: all is well.*\.\.\.$"),
    "a failure": Lie(lambda content: wire.record(failure("OSError: no space left")), "OSError: no space left$"),
    "a long failure": Lie(
        lambda content: wire.record(failure(NOISE * 2**12)), r"\\x1b\[2J \\x00 round 1: all is well.*\.\.\.$"
    ),
    "a failure of a megabyte": Lie(lambda content: wire.record(failure(NOISE * 2**15)), "characters of JSON"),
    "lost for ever": Lie(lambda content: wire.record(failure("?", lost=True)), "forgets the plan|has not joined"),
    "another kind": Lie(lambda content: wire.record(Joined("me", {}, None)), "is 'Joined' and should be Answer"),
    "an unknown kind": Lie(_record(kind="Pardon", json="{}"), "is 'Pardon' and should be Answer"),
    "another format": Lie(_renamed, "it is not from fedsim, or from another version"),
    "nothing": Lie(lambda content: RecordDict(), "it is not from fedsim, or from another version"),
    "numbers for words": Lie(_record(kind=1, json=[2]), "is 1 and should be Answer"),
    "no tensors": Lie(lambda c: RecordDict({wire.KEY: c.config_records[wire.KEY]}), "has no 'message'"),
    "more records": Lie(
        lambda c: RecordDict({**c, "a" * 10**5: ConfigRecord({})}), "has 'aaa.*, which no Answer has"
    ),
    "no JSON": Lie(_text(lambda text: "weight: many"), "[Ii]nvalid JSON"),
    "JSON of bytes": Lie(_record(kind="Answer", json=b"\xff"), "[Ii]nvalid JSON"),
    "deep JSON": Lie(_text(lambda text: '{"metrics":' + "[" * 10**5), "[Ii]nvalid JSON"),
    "deep JSON that ends": Lie(
        _text(lambda text: '{"metrics":' + '{"a":' * 150 + "1" + "}" * 151),
        "[Ii]nvalid JSON|required|metrics",
    ),
    "a long number": Lie(
        _text(lambda text: text.replace('"version":', '"version":1' + "0" * 10**5)), "JSON|version"
    ),
    "numbers as words": Lie(_text(lambda text: text.replace('"version":', '"version":"1","mark":')), "version: "),
    "more fields": Lie(_text(lambda text: '{"admin":true,' + text[1:]), "admin: "),
    "fewer fields": Lie(_text(lambda text: "{}"), "weight: Field required"),
    "wrong fields without end": Lie(
        _text(lambda text: "{" + ",".join(f'"a{i}":0' for i in range(10**5)) + "}"), "characters of JSON"
    ),
    "many wrong fields": Lie(
        _text(lambda text: "{" + ",".join(f'"a{i}":0' for i in range(2 * 10**4)) + "}"), ": "
    ),
    "another state": Lie(_changed(version=99), "keeps"),
    "a negative state": Lie(_changed(version=-1), "keeps"),
    "a strange mark": Lie(_changed(mark=-1), "keeps"),
    "a long mark": Lie(_changed(mark=2**70), "keeps"),
    "other metrics": Lie(_more(more=1.0), "metrics"),
    "fewer metrics": Lie(_changed(metrics={"examples": 3.0}), "metrics"),
    "a metric of another work": Lie(_more(correct=3.0), "metrics"),
    "a metric with a long name": Lie(_more(**{NOISE * 2**12: 1.0}), "metrics|characters of JSON"),
}
TENSORS = {
    "not a number": Lie(_each(lambda value: value * float("nan")), "is not finite"),
    "infinite": Lie(_each(lambda value: value + float("inf")), "is not finite"),
    "huge": Lie(_each(lambda value: value * 0 + 1e38), "too large"),
    "large": Lie(_each(lambda value: value * 0 + 1e30), "too large"),
    "doubles": Lie(_each(lambda value: value.double()), FORM),
    "halves": Lie(_each(lambda value: value.half()), FORM),
    "whole numbers": Lie(_each(lambda value: value.long()), FORM),
    "another shape": Lie(_each(lambda value: value[:-1]), FORM),
    "a matrix": Lie(_each(lambda value: value[None]), FORM),
    "one is missing": Lie(_state(lambda message: dict([*message.items()][1:])), FORM),
    "one is too many": Lie(_state(lambda message: message | {"more": torch.ones(1)}), FORM),
    "one has another name": Lie(_state(lambda m: {"x" + name: value for name, value in m.items()}), FORM),
    "no tensor": Lie(_state(lambda message: {}), FORM),
    "empty tensors": Lie(_each(lambda value: value[:0]), FORM),
    "a name of a megabyte": Lie(_state(lambda message: message | {"n" * 2**20: torch.ones(1)}), FORM),
    "a name that controls": Lie(_state(lambda message: message | {NOISE: torch.ones(1)}), FORM),
    "ten thousand tensors": Lie(_crowd(10_000), FORM),
    "more than ten thousand": Lie(_crowd(10_001), "has 10001 tensors; allowed: 10000"),
    "fewer bytes": Lie(_coded(lambda coded: coded._replace(data=coded.data[:-1])), "bytes do not fit|planes"),
    "more bytes": Lie(_coded(lambda coded: coded._replace(data=coded.data + b"\0")), "bytes do not fit|planes"),
    "an unknown type": Lie(_coded(lambda coded: coded._replace(dtype="object")), "dtype 'object' is unknown"),
    "a long type": Lie(_coded(lambda coded: coded._replace(dtype=NOISE * 2**10)), "dtype '"),
    "an unknown coding": Lie(_coded(lambda coded: coded._replace(coding="pickle")), "coding 'pickle' is unknown"),
    "a negative shape": Lie(_coded(lambda coded: coded._replace(shape=(-1,))), "is not a shape"),
    "a shape without end": Lie(_coded(lambda coded: coded._replace(shape=(2**62, 2**62))), "is not a shape"),
    "a shape that overflows": Lie(
        _coded(lambda coded: Coded("int8", (2**64 + 1,), "exact", b"")), "is not a shape"
    ),
    "too many axes": Lie(_coded(lambda coded: coded._replace(shape=(1,) * 65)), r"\(1, 1, 1, "),
    "truth in twos": Lie(_coded(lambda coded: Coded("bool", (1,), "exact", b"\2")), "bool has values other"),
    "a bomb": Lie(_coded(lambda coded: Coded("float32", (2**28,), "lossless", bytes(2**21))), "larger than"),
    "planes that end early": Lie(_planes(8, [1, 1, 1, 1], b"abcd"), "plane"),
    "planes of another length": Lie(_planes(8, [-1, 1, 1, 1], b"abcd"), "lengths of the planes"),
    "a group": Lie(_state(lambda m: m | {"group": torch.tensor(2**62)}), "gives a group"),
    "a mask of nothing": Lie(
        _state(lambda m: m | {"where.x": torch.ones(9).byte()}), "as many values as positions"
    ),
    "a mask of too few": Lie(_covers(Coded("uint8", (9,), "bits", b"\1\0")), "as many values as positions"),
    "a mask of floats": Lie(_covers(Coded("float32", (8,), "bits", b"\1")), "float32 is no mask"),
    "positions of a bomb": Lie(_covers(Coded("uint8", (2**40,), "indices", bytes(4))), "larger than"),
    "positions without end": Lie(_covers(Coded("uint8", (2**62,), "indices", bytes(4))), "is not a shape"),
    "positions that fall": Lie(_covers(Coded("uint8", (9,), "indices", b"\2\0\0\0" * 2)), "should ascend"),
    "positions outside": Lie(_covers(Coded("uint8", (2,), "indices", b"\2\0\0\0")), "should ascend"),
    "a scale that is no number": Lie(_int8(float("nan")), "a scale is negative or not finite"),
    "a negative scale": Lie(_int8(-1.0), "a scale is negative or not finite"),
    "a scale beyond all": Lie(_int8(3e38), f"too large|not finite|{FORM}"),
}
METRICS = {  # of a strategy that has one of its own, `own`
    "a metric without end": Lie(_more(own=float("inf")), "own inf; it should be"),
    "a metric that is no number": Lie(_more(own=float("nan")), "own nan; it should be"),
    "a metric beyond any sum": Lie(_more(own=-1.7e308), r"own -1\.7e\+308; it should be"),
    "a metric that is not the strategy's": Lie(_more(owned=1.0), "other metrics"),
    "only a metric of its own kind": Lie(_changed(metrics={"own": 1.0, "steps": 1.0}), "other metrics"),
}
LIES = FORMS | TENSORS | NUMBERS


# What only a node on a wire can do. Each has the node's link, the order, the honest answer, and what went before.


def post(link, message, content=None, *, error=None, to=None, whole=True):
    """Answer with content or one of Flower's errors, whatever they are; `to` is the id of what it answers."""
    reply = Message(content, reply_to=message) if error is None else Message(error, reply_to=message)
    if to is not None:
        reply.metadata.__dict__["_reply_to_message_id"] = to
    trees, objects = packed([reply], link._pool)
    taken = link._client.PushMessages(
        PushMessagesRequest(
            node=link._node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=trees,
            clientapp_runtime_list=[0.0],
        )
    )
    if whole:
        put = partial(link._put, message.metadata.run_id, taken.session_id)
        push(objects, taken.objects_to_push, put, link._pool)


def _gone(link, message, content, before):
    """Say in the SuperLink's place that the node is gone."""
    post(link, message, error=Error(5, "gone"))


def _no_such_error(link, message, content, before):
    post(link, message, error=Error(-(2**31), NOISE * 2**12))


def _twice(link, message, content, before):
    post(link, message, RecordDict())
    post(link, message, content)


def _for_others(link, message, content, before):
    """Answer the order before once more, one that nobody sent, and its own with the answer of the round before."""
    old, answered = before
    post(link, old, answered)
    post(link, message, content, to="0" * 64)
    post(link, message, answered)


def _large(link, message, content, before):
    post(link, message, _state(lambda sent: sent | {"more": torch.randn(17 * 2**20)})(content))


def _unfolds(link, message, content, before):
    """A few bytes on the wire that are a gigabyte: one piece of an array, over and over."""
    chunk = ArrayChunk(bytes(2**23))
    arrays = ArrayRecord({"a": Array("uint8", (2**30,), "fedsim.exact", b"")})
    arrays["a"].__dict__["_chunks"] = [(get_object_id(chunk.deflate()), chunk)] * 128
    post(link, message, RecordDict({wire.KEY: content.config_records[wire.KEY], "message": arrays}))


def _in_part(link, message, content, before):
    post(link, message, content, whole=False)


def _late(link, message, content, before):
    time.sleep(LATE)
    post(link, message, content)


def _dies(link, message, content, before):
    os._exit(9)


TIMEOUT, LATE = 10.0, 11.0  # seconds of a round, and more
TRICKS = {
    "gone, it says": Lie(_gone, "the node is gone: gone"),
    "an unknown error": Lie(_no_such_error, "error -2147483648: .*all is well"),
    "two answers": Lie(_twice, "it is not from fedsim"),
    "answers for others": Lie(_for_others, "keeps"),
    "a large answer": Lie(_large, "too large: more than|has not answered within"),
    "an answer that unfolds": Lie(_unfolds, "too large: more than|cannot be read"),
    "an answer in part": Lie(_in_part, "has not answered within"),
    "a late answer": Lie(_late, "has not answered within"),
    "death": Lie(_dies, "has not answered within|gone"),
}


ON_A_WIRE = dict([*LIES.items()][::2]) | TRICKS


class Liar:
    """Tells one lie in each round in which its client is asked; `told` has their names by round, from 0."""

    def __init__(self, names):
        self.left, self.told = [*names], dict[int, str]()

    def lie(self, number):
        """The name of the round's lie; empty when all are told."""
        if number not in self.told and self.left:
            self.told[number] = self.left.pop(0)
        return self.told.get(number, "")


def main(path):
    """A node that tells one lie in each of its rounds, and prints which; when it dies it comes back."""
    from fedsim.flower.node import Node, NodeSettings
    from fedsim.flower.run_connection import address_of

    settings, honest, liar = NodeSettings.read(Path(path)), node_process.respond, Liar(ON_A_WIRE)
    before, trick, as_it_is = [], [], node_process._deliver

    def respond(node, content):
        answer = honest(node, content)
        trick.clear()
        new = len(liar.told)
        name = liar.lie(wire.read(Order, content).round) if wire.kind(content) == Order.__name__ else ""
        if len(liar.told) > new:
            print(f"round {[*liar.told][-1] + 1} lie: {name}", flush=True)
        if name in LIES:
            answer = LIES[name].told(answer)
            if isinstance(answer, str):
                raise ValueError(answer)
        elif name:
            trick.append(TRICKS[name].told)
        return answer

    def deliver(link, message, content, lost):
        if trick:
            trick[0](link, message, content, before)
        else:
            as_it_is(link, message, content, lost)
        before[:] = message, content

    node_process.respond, node_process._deliver = respond, deliver
    while pid := os.fork():
        print("ended with", os.waitpid(pid, 0)[1], flush=True)
        liar.left.clear()
    with Node(settings) as node:
        node_process.serve(node, address_of(settings.superlink, settings.ca, settings.insecure), settings.key)


if __name__ == "__main__":
    main(*sys.argv[1:])
