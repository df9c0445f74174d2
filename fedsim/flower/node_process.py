"""`fedsim node`: one long-lived process that keeps network, data and device in memory between messages."""

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
from fedsim.flower.internals import LinkError, NodeLink, Superlink
from fedsim.flower.messages import Answer, Finished, Hello, Invitation, Joined, Order, failure
from fedsim.flower.node import Node

log = logging.getLogger(__name__)
POLL = 0.03, 0.5  # seconds between two looks for messages, at least and at most
SHARE = 0.01  # of the time since the last message, to wait for the next look
MOST_TEXT_BYTES = 2**23  # of a message besides its tensors
MOST_LINES = 600  # that the node logs in a minute; a round is two
MINUTE = 60.0  # seconds
RETRY_PAUSE = 1.0  # seconds between two attempts to connect
LEAVE_PAUSE = 1.0  # seconds between leaving and joining again, long enough for the server to notice


def respond(node: Node, content: RecordDict) -> RecordDict:
    """The node's answer to a message; raises ValueError, in one line, if the message is not one of fedsim's."""
    kind = wire.kind(content)
    if kind == Hello.__name__:
        notes = (f"refused its last invitation: {node.refusal}",) if node.refusal else ()
        return wire.record(Joined(node.settings.name, versions(), notes=notes))
    if kind == Invitation.__name__:
        joined = node.join(wire.read(Invitation, content))
        log.info("%s", f"refused: {joined.error}" if joined.error else "joined a run")
        for note in joined.notes:
            log.warning("%s", note)
        return wire.record(joined)
    if kind == Finished.__name__:
        finished = wire.read(Finished, content)
        why = node.finish(finished)
        log.info("%s", f"cannot delete a run that has ended: {why}" if why else "a run has reached its end")
        return wire.record(finished)
    try:
        order = wire.read(Order, content)
    except ValueError as error:
        return wire.record(failure(f"order {error}"))
    answer = node.work(order)
    log.info("%s", described(order, answer))
    return wire.record(answer)


class FewLines(logging.Filter):
    """Passes MOST_LINES a minute on, and tells how many it has left out: no sender of messages fills the log."""

    def __init__(self) -> None:
        super().__init__()
        self.began, self.lines = monotonic(), 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is passed on."""
        if monotonic() - self.began >= MINUTE:
            if self.lines > MOST_LINES:
                record.msg, record.args = f"{record.getMessage()} ({self.lines - MOST_LINES} lines left out)", None
            self.began, self.lines = monotonic(), 0
        self.lines += 1
        return self.lines <= MOST_LINES


def described(order: Order, answer: Answer) -> str:
    """What a node did for an order, in a line."""
    done = answer.error or ("does not have the plan" if answer.lost else f"{answer.examples} examples")
    return f"round {order.round + 1}: {order.task}: {done}, {answer.seconds:.2f} s"


def serve(node: Node, superlink: Superlink, key: Path | None) -> NoReturn:
    """Answer messages until interrupted; connects again whenever the connection to the SuperLink is lost.

    Raises ConfigError if the SuperLink refuses the node at the start, and trying again cannot help.
    """
    known, lost = False, Lost(superlink)
    while True:
        try:
            if key and not known:  # shows the server that an earlier process, and what it worked at, is gone
                NodeLink.open(superlink, key).close()
                sleep(LEAVE_PAUSE)
            with closing(NodeLink.open(superlink, key)) as link:
                log.info("connected to %s", superlink.address)
                known, lost = True, Lost(superlink)
                _answer(node, link, lost)
        except LinkError as error:
            if not error.again and not known:
                raise ConfigError(f"superlink {superlink.address}: {error}") from error
            lost.tell(error)
            sleep(RETRY_PAUSE)


class Lost:
    """Logs why there is no connection: each reason once, until there is one again."""

    def __init__(self, superlink: Superlink):
        self._address, self._told = superlink.address, ""

    def tell(self, error: LinkError) -> None:
        """Log this reason, unless it was the last one."""
        if (reason := re.sub(r"[\d,.]+", "", str(error))) != self._told:  # without numbers: seconds count down
            log.warning("%s: %s; trying again", self._address, error)
            self._told = reason

    def over(self) -> None:
        """An answer has come; log so if the opposite was logged."""
        if self._told:
            log.info("%s answers", self._address)
            self._told = ""


def _answer(node: Node, link: NodeLink, lost: Lost) -> NoReturn:
    """Answer messages until the SuperLink no longer knows the node; then raises LinkError."""
    last = monotonic()
    while True:
        try:
            message = link.receive(most_bytes=node.settings.allow.max_bytes + MOST_TEXT_BYTES)
            lost.over()
            if message is None:
                sleep(min(max(SHARE * (monotonic() - last), POLL[0]), POLL[1]))
                continue
            try:
                content: RecordDict | str = respond(node, message.content)
            except ValueError as error:
                content = str(error)
            _deliver(link, message, content, lost)
            last = monotonic()
        except LinkError as error:
            if not error.again:
                raise
            lost.tell(error)
            sleep(RETRY_PAUSE)


def _deliver(link: NodeLink, message: Message, content: RecordDict | str, lost: Lost) -> None:
    """Send an answer, trying again while the SuperLink cannot be reached; raises LinkError if it is refused."""
    while True:
        try:
            link.answer(message, content)
            return
        except LinkError as error:
            if not error.again:
                raise
            lost.tell(error)
            sleep(RETRY_PAUSE)
