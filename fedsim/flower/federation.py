"""A run's connection to its nodes: made when it is needed, and made anew where the SuperLink went away."""

import logging
import ssl
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from time import monotonic, sleep
from uuid import uuid4

from fedsim.base.catalogue import Spec
from fedsim.errors import ConfigError, RoundError
from fedsim.flower.app import flower_app
from fedsim.flower.internals import Link, LinkError, Superlink, listed
from fedsim.flower.messages import Invitation
from fedsim.flower.plan import digest
from fedsim.flower.roster import Roster, read_keys
from fedsim.types import State

log = logging.getLogger(__name__)
TICK = 0.1  # seconds between two looks for nodes, while nothing else is done
RETRY = 1.0  # seconds between two attempts to connect
QUIET = 2.0  # seconds for which waiting needs no word
LOOK = 0.5  # seconds between two looks for nodes, while clients train


@dataclass(frozen=True)
class Timing:
    """In seconds: how long nodes have to come, and clients to answer."""

    wait: float
    round_timeout: float


def address_of(superlink: str, ca: Path | None, insecure: bool, at: str = "runtime.") -> Superlink:
    """Where a SuperLink is; raises ConfigError where that is not said clearly."""
    host, _, port = superlink.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"{at}superlink: {superlink!r} should be HOST:PORT, such as lab.example.org:8000")
    if insecure == (ca is not None):
        raise ConfigError(
            f"{at}ca: the certificate of the SuperLink's authority; or {at}insecure, plain HTTP without one; "
            f"{'one of the two' if insecure else 'neither is set'}"
        )
    if ca is None:
        return Superlink(superlink, None)
    try:
        content = ca.expanduser().read_bytes()
        ssl.create_default_context(cadata=content.decode("ascii"))
    except (ssl.SSLError, ValueError):  # the first is an OSError, too
        raise ConfigError(f"{at}ca: {ca}: is no certificate in PEM") from None
    except OSError as error:
        raise ConfigError(f"{at}ca: {ca}: {error.strerror}") from None
    return Superlink(superlink, content)


class Federation:
    """The nodes of a run, and the link to them.

    `run` is the run's id, under which nodes keep their clients' states; `settled` has the rounds after which there
    are checkpoints, or None where the run keeps none.
    """

    def __init__(
        self,
        superlink: Superlink | None,
        nodes: list[str] | None,
        keys: Path | None,
        clients: int,
        timing: Timing,
        link: Callable[[], Link] | None = None,
    ):
        self.superlink, self.clients, self.timing = superlink, clients, timing
        self._given = link
        self.roster = Roster(None if keys is None else read_keys(keys), self._keys)
        if nodes is not None and (len(nodes) != clients or len({*nodes}) != clients):
            raise ConfigError(f"runtime.nodes: {len({*nodes})} different names, and data.clients is {clients}")
        self.roster.names = sorted(nodes or [])
        if unknown := [name for name in self.roster.names if keys and name not in (self.roster.keys or {})]:
            raise ConfigError(f"runtime.keys: {keys} has no {unknown[0]}.pub")
        self.run = uuid4().hex
        self.settled: list[int] | None = None
        self.plan, self.initial = "", State()  # what nodes are told of the experiment
        self._link: Link | None = None
        self._looked, self._gathered = 0.0, False

    def link(self) -> Link:
        """The link in use; raises LinkError where there is none to be had."""
        if self._link is None:
            if self._given:
                self._link = self._given()
            elif self.superlink:
                self._link = Link.open(self.superlink, flower_app())
            else:
                raise LinkError("there is no SuperLink")
        return self._link

    def _keys(self) -> dict[int, bytes]:
        """The nodes' public keys."""
        return {node.node: node.key for node in listed(self.superlink)} if self.superlink else {}

    def look(self, every: float = LOOK) -> None:
        """Look for nodes, if the last look is so long ago; raises LinkError."""
        if monotonic() - self._looked >= every:
            self._looked = monotonic()
            self.roster.look(self.link(), Invitation(self.run, self.plan, self.initial))

    def gather(self) -> None:
        """Wait for the run's nodes, when it begins or goes on; raises RoundError where they are not enough."""
        self._looked = 0.0  # who was there in the last round may have gone since
        if self._gathered:
            return
        roster = self.roster
        self._await(lambda: roster.hopeless(self.clients) or (roster.complete if roster.named else self._enough))
        if not roster.named:
            roster.settle(self.clients)
        elif not roster.complete:
            log.warning("nodes: goes on with %s", roster.shown(self.clients))
        self._gathered = True

    @property
    def _enough(self) -> bool:
        return len(self.roster.joined) >= self.clients

    def reconnect(self, error: LinkError, seconds: float) -> None:
        """Have another link, and the nodes that were there; raises RoundError where none is to be had.

        For so many seconds at most, and as long as nodes may take to come.
        """
        log.warning("superlink: %s; connects anew", error)
        there = self.roster.joined.keys()
        self._drop(str(error))
        self._await(lambda: there <= self.roster.joined.keys(), seconds)

    def _await(self, there: Callable[[], bool], seconds: float = inf) -> None:
        """Look for nodes until who should be there is, or time is up; raises RoundError without a link."""
        began, said, address = monotonic(), "", self.superlink.address if self.superlink else "that started this"
        seconds = min(seconds, self.timing.wait)
        while True:
            now = f"nodes: {self.roster.shown(self.clients)}"
            try:
                self.look(TICK)
                if there() or monotonic() - began > seconds:
                    return
            except LinkError as error:
                fresh = self._link is None  # then it was not an old one that broke
                self._drop(str(error))
                now = f"superlink {address}: {error}"
                if (fresh and not error.again) or monotonic() - began > seconds:
                    raise RoundError(now) from error
                sleep(RETRY)
            if now != said and monotonic() - began > QUIET:
                log.info("%s; waits up to %g s", now, seconds)
                said = now
            sleep(TICK)

    def abandon(self, messages: Iterable[str]) -> None:
        """Let late answers to these be dropped."""
        if self._link is not None:
            self._link.abandon([*messages])

    def close(self) -> None:
        """End the Flower run; the next round begins another."""
        self._drop(None)
        self._gathered = False

    def _drop(self, error: str | None) -> None:
        if self._link is not None:
            with suppress(LinkError):
                self._link.close(error)
            self._link = None
        self._looked = 0.0

    @property
    def plan_hash(self) -> str:
        """SHA-256 of the plan."""
        return digest(self.plan)

    def choice(self, sizes: list[int]) -> Spec | None:
        """What a checkpoint has to know, once it is known who takes part."""
        names = self.roster.names
        return {"name": "flower", "run": self.run, "nodes": names, "sizes": sizes} if names else None

    def take(self, run: str, names: list[str]) -> None:
        """Go on with a run and its nodes; raises ConfigError where others are wanted."""
        if self.roster.names not in ([], names):
            raise ConfigError(f"runtime.nodes: {', '.join(self.roster.names)}, and the run has {', '.join(names)}")
        self.run, self.roster.names = run, names
