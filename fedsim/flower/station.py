"""`fedsim node`: one long-lived process that keeps network, data and device between messages."""

import logging
import re
from contextlib import closing
from pathlib import Path
from time import monotonic, sleep
from typing import NoReturn

from flwr.app import Message, RecordDict

from fedsim.errors import ConfigError
from fedsim.experiment.checkpoint import versions
from fedsim.flower import wire
from fedsim.flower.internals import LinkError, Member, Superlink
from fedsim.flower.messages import Answer, Hello, Invitation, Joined, Order, failure
from fedsim.flower.node import Node

log = logging.getLogger(__name__)
POLL = 0.03, 0.5  # seconds between two looks for messages, at least and at most
SHARE = 0.01  # of the time since the last message, to wait for the next look
PLAN = 2**23  # bytes of a message besides its tensors
RETRY = 1.0  # seconds between two attempts to connect
AWAY = 1.0  # seconds for which a process shows that the last one with its key is gone


def respond(node: Node, content: RecordDict) -> RecordDict:
    """The node's answer to a message; raises ValueError, in one line, for one that is none of fedsim's."""
    kind = wire.kind(content)
    if kind == Hello.__name__:
        return wire.record(Joined(node.settings.name, versions()))
    if kind == Invitation.__name__:
        joined = node.join(wire.read(Invitation, content))
        log.info("%s", f"refused: {joined.error}" if joined.error else "joined a run")
        return wire.record(joined)
    try:
        order = wire.read(Order, content)
    except ValueError as error:
        return wire.record(failure(f"order {error}"))
    answer = node.work(order)
    log.info("%s", described(order, answer))
    return wire.record(answer)


def described(order: Order, answer: Answer) -> str:
    """What a node did, in a line."""
    done = answer.error or ("does not know the run" if answer.lost else f"{answer.examples} examples")
    return f"round {order.round + 1}: {order.task}: {done}, {answer.seconds:.2f} s"


def serve(node: Node, superlink: Superlink, key: Path | None) -> NoReturn:
    """Answer messages until interrupted, whatever becomes of the SuperLink.

    Raises ConfigError where it refuses the node at the start, and for good.
    """
    said, known = "", False
    while True:
        try:
            if key and not known:  # else nobody may notice that what the last process was at is lost
                Member.open(superlink, key).close()
                sleep(AWAY)
            with closing(Member.open(superlink, key)) as member:
                log.info("connected to %s", superlink.address)
                said, known = "", True
                _answer(node, member)
        except LinkError as error:
            if not error.again and not known:
                raise ConfigError(f"superlink {superlink.address}: {error}") from error
            if (now := re.sub(r"\d+", "", str(error))) != said:  # seconds count down in it
                log.warning("%s: %s; tries again until it succeeds", superlink.address, error)
                said = now
            sleep(RETRY)


def _answer(node: Node, member: Member) -> NoReturn:
    """Answer messages until the SuperLink does not know the node any more; raises LinkError."""
    last = monotonic()
    while True:
        try:
            message = member.receive(most_bytes=node.settings.allow.max_bytes + PLAN)
            if message is None:
                sleep(min(max(SHARE * (monotonic() - last), POLL[0]), POLL[1]))
                continue
            try:
                content: RecordDict | str = respond(node, message.content)
            except ValueError as error:
                content = str(error)
            _deliver(member, message, content)
            last = monotonic()
        except LinkError as error:
            if not error.again:
                raise
            sleep(RETRY)


def _deliver(member: Member, message: Message, content: RecordDict | str) -> None:
    """Answer, however long the SuperLink is out of reach; raises LinkError where it does not want to hear it."""
    while True:
        try:
            member.answer(message, content)
            return
        except LinkError as error:
            if not error.again:
                raise
            sleep(RETRY)
