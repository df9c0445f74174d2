"""A run's connection to its nodes: opened when it is needed, and opened again after the SuperLink was lost."""

import logging
import ssl
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from time import monotonic, sleep
from uuid import uuid4

from fedsim.base.catalogue import Spec
from fedsim.base.files import expanded
from fedsim.base.reading import read_key
from fedsim.errors import ConfigError, RoundError
from fedsim.flower import wire
from fedsim.flower.app import flower_app
from fedsim.flower.internals import Link, LinkError, Superlink, listed
from fedsim.flower.messages import FINISHED_WAIT, Finished, Invitation
from fedsim.flower.plan import digest
from fedsim.flower.roster import Roster, Sizes, read_keys
from fedsim.types import State

log = logging.getLogger(__name__)
LOOK_PAUSE = 0.1  # seconds between two looks for nodes, while nothing else is done
RETRY_PAUSE = 1.0  # seconds between two attempts to connect
SILENT_WAIT = 2.0  # seconds; a longer wait is logged
LOOK_PAUSE_TRAINING = 0.5  # the same while clients train
FINISHED_PAUSE = 0.05  # seconds between two looks for their answers
MOST_FINISHED_BYTES = 2**16  # of an answer to it


@dataclass(frozen=True)
class Timing:
    """Limits in seconds: for nodes to join, and for clients to answer in a round."""

    wait: float
    round_timeout: float


def address_of(superlink: str, ca: Path | None, insecure: bool, at: str = "runtime.") -> Superlink:
    """A SuperLink's address and authority, as set; raises ConfigError if they are wrong or incomplete."""
    host, _, port = superlink.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"{at}superlink: {superlink!r} should be HOST:PORT, such as lab.example.org:8000")
    if insecure == (ca is not None):
        raise ConfigError(
            f"{at}ca: either {at}ca (the certificate of the SuperLink's authority) or {at}insecure (plain HTTP); "
            f"{'both are set' if insecure else 'neither is set'}"
        )
    if ca is None:
        return Superlink(superlink, None)
    path = expanded(ca, f"{at}ca")
    try:
        content = read_key(path)
        ssl.create_default_context(cadata=content.decode("ascii"))
    except (ssl.SSLError, ValueError):  # the first is an OSError, too
        raise ConfigError(f"{at}ca: {ca}: is not a certificate in PEM format") from None
    except OSError as error:
        raise ConfigError(f"{at}ca: {ca}: {error.strerror}") from None
    return Superlink(superlink, content)


class RunConnection:
    """The nodes of a run, and the link to them.

    `run` is the run's id, under which nodes keep their clients' states. `checkpointed_rounds` are the numbers of
    rounds after which there are checkpoints; None if the run writes none.
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
            raise ConfigError(f"runtime.nodes: has {len({*nodes})} different names, but data.clients is {clients}")
        self.roster.names = sorted(nodes or [])
        if unknown := [name for name in self.roster.names if keys and name not in (self.roster.keys or {})]:
            raise ConfigError(f"runtime.keys: {keys} has no {unknown[0]}.pub")
        self.run = uuid4().hex
        self.checkpointed_rounds: list[int] | None = None
        self.plan, self.initial = "", State()  # what nodes receive of the experiment
        self._link: Link | None = None
        self._looked, self._gathered = 0.0, False

    def link(self) -> Link:
        """The open link, opened if necessary; raises LinkError if that fails."""
        if self._link is None:
            if self._given:
                self._link = self._given()
            elif self.superlink:
                self._link = Link.open(self.superlink, flower_app())
            else:
                raise LinkError("no SuperLink is set")
        return self._link

    def _keys(self) -> dict[int, bytes]:
        """The nodes' public keys."""
        return {node.node: node.key for node in listed(self.superlink)} if self.superlink else {}

    def look(self, every: float = LOOK_PAUSE_TRAINING) -> None:
        """Look for nodes, if the last look was at least `every` seconds ago; raises LinkError."""
        if monotonic() - self._looked >= every:
            self._looked = monotonic()
            self.roster.look(self.link(), Invitation(self.run, self.plan, self.initial))

    def gather(self) -> None:
        """Wait for the run's nodes when it begins or goes on; raises RoundError if there are too few."""
        self._looked = 0.0  # nodes may have left since the last round
        if self._gathered:
            return
        roster = self.roster
        self._await(
            lambda: roster.too_few_accept(self.clients) or (roster.complete if roster.named else self._enough)
        )
        if not roster.named:
            roster.fix_names(self.clients)
        elif not roster.complete:
            log.warning("nodes: not all have joined; the run goes on with %s", roster.shown(self.clients))
        self._gathered = True

    @property
    def _enough(self) -> bool:
        return len(self.roster.joined) >= self.clients

    def reconnect(self, error: LinkError, seconds: float) -> None:
        """Open another link and wait for the nodes that had joined; raises RoundError if no link can be opened.

        It waits at most `seconds`, and at most `timing.wait`.
        """
        log.warning("superlink: %s; connecting again", error)
        before = self.roster.joined.keys()
        self._drop(str(error))
        self._await(lambda: before <= self.roster.joined.keys(), seconds)

    def _await(self, reached: Callable[[], bool], seconds: float = inf) -> None:
        """Look for nodes until `reached` is true or time is up; raises RoundError if there is no link."""
        began, logged, address = (
            monotonic(),
            "",
            self.superlink.address if self.superlink else "of this ServerApp",
        )
        seconds = min(seconds, self.timing.wait)
        while True:
            now = f"nodes: {self.roster.shown(self.clients)}"
            try:
                self.look(LOOK_PAUSE)
                if reached() or monotonic() - began > seconds:
                    return
            except LinkError as error:
                fresh = self._link is None  # then it was not an old one that broke
                self._drop(str(error))
                now = f"superlink {address}: {error}"
                if (fresh and not error.again) or monotonic() - began > seconds:
                    raise RoundError(now) from error
                sleep(RETRY_PAUSE)
            if now != logged and monotonic() - began > SILENT_WAIT:
                log.info("%s; waiting up to %g s", now, seconds)
                logged = now
            sleep(LOOK_PAUSE)

    def abandon(self, messages: Iterable[str]) -> None:
        """Drop answers to these messages that arrive late."""
        if self._link is not None:
            self._link.abandon([*messages])

    def tell_finished(self, versions: Mapping[str, int]) -> None:
        """Tell the nodes that are there that the run has reached its end, with the versions of their states.

        Nodes that are away are not waited for, and find no message when they come back.
        """
        if self._link is None:
            return
        link, joined, until = self._link, self.roster.joined, monotonic() + FINISHED_WAIT
        contents = {node: wire.record(Finished(self.run, versions.get(n, 0))) for n, node in joined.items()}
        with suppress(LinkError):
            waiting = {*link.send(contents, "query", group="finished", ttl=FINISHED_WAIT)}
            while waiting and monotonic() < until:
                sleep(FINISHED_PAUSE)
                waiting -= {reply.to for reply in link.receive(waiting, most_bytes=MOST_FINISHED_BYTES)}

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

    def checkpoint_entry(self, sizes: list[int]) -> Spec | None:
        """What a checkpoint stores of the nodes; None while it is not known which nodes take part."""
        names = self.roster.names
        return {"name": "flower", "run": self.run, "nodes": names, "sizes": sizes} if names else None

    def restore(self, run: str, names: list[str], sizes: list[int]) -> None:
        """Go on with a run, its nodes and their n_k; raises ConfigError if other nodes are set."""
        if self.roster.names not in ([], names):
            raise ConfigError(
                f"runtime.nodes: is {', '.join(self.roster.names)}, but the run has {', '.join(names)}"
            )
        self.run, self.roster.names = run, names
        self.roster.sizes = {name: Sizes(n, 0) for name, n in zip(names, sizes, strict=True) if n}
