"""Who is there: nodes say their names when they join, and clients are known by them, not by Flower's numbers."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from fedsim.errors import ConfigError, RoundError, one_line
from fedsim.experiment.checkpoint import versions
from fedsim.flower import wire
from fedsim.flower.messages import Hello, Invitation, Joined

if TYPE_CHECKING:
    from fedsim.flower.internals import Link, Reply

log = logging.getLogger(__name__)
PATIENCE = 60.0  # seconds after which a node that has not answered, or refused, is asked again
MOST_BYTES = 2**20  # of an answer
MATTER = "fedsim", "torch"  # of which another version may give other bits
WAITING = "has not answered yet"


class Seen(NamedTuple):
    """What is known of a node that is online."""

    since: float
    name: str = ""  # as it says
    why: str = WAITING  # it does not take part; empty where it does


class Asked(NamedTuple):
    """A question that is under way."""

    node: int
    since: float
    invited: bool  # and not only asked for its name


class Roster:
    """The nodes of a run, by name; they are found and invited over the link that is in use.

    `names` has the clients' in their order, by which client k is the k-th, once they are settled; then nobody else
    is told what the run is. `keys` has the public keys by name, where only their owners may bear these names;
    `key_of` tells a node's.
    """

    def __init__(
        self, keys: dict[str, bytes] | None = None, key_of: Callable[[], dict[int, bytes]] = dict[int, bytes]
    ):
        self.keys, self._key_of = keys, key_of
        self.names: list[str] = []
        self.joined: dict[str, int] = {}  # node ids, by name
        self.online: set[int] = set()
        self._seen: dict[int, Seen] = {}  # by node
        self._asked: dict[str, Asked] = {}  # by message
        self._link: Link | None = None

    def look(self, link: "Link", invitation: Invitation) -> None:
        """Ask who is new, invite who is wanted, and hear who accepted; never waits."""
        if link is not self._link:  # node ids may have changed their meaning
            self._link, self.joined, self._asked, self._seen = link, {}, {}, {}
        self.online, now = link.nodes(), monotonic()
        self._seen = {
            node: seen
            for node, seen in self._seen.items()
            if node in self.online and not (seen.why and now - seen.since > PATIENCE)
        }
        self._asked = {message: asked for message, asked in self._asked.items() if asked.node in self._seen}
        self.joined = {name: node for name, node in self.joined.items() if node in self.online}
        self._ask(link, self.online - self._seen.keys(), None if self.named else invitation)
        keys = self._key_of() if self.keys is not None and self._asked else {}  # which may raise: before replies
        wanted = set[int]()
        for reply in link.receive(self._asked, most_bytes=MOST_BYTES) if self._asked else []:
            asked = self._asked.pop(reply.to)
            if reply.gone:
                self._seen.pop(asked.node, None)
                continue
            name, why = self._heard(asked.node, reply, keys)
            self._seen[asked.node] = Seen(now, name, why if asked.invited else why or WAITING)
            if not why and asked.invited:
                self._join(name, asked.node)
            elif not why:
                wanted.add(asked.node)
        self._ask(link, wanted, invitation)

    @property
    def named(self) -> bool:
        """Whether it is known who takes part."""
        return bool(self.names)

    @property
    def complete(self) -> bool:
        """Whether all of the run's nodes have joined."""
        return self.joined.keys() >= {*self.names}

    def hopeless(self, clients: int) -> bool:
        """Whether all have answered who could, and too few accept."""
        if self.named:
            return not self.complete and all(self.refusal(k) for k in self._missing())
        answered = [seen for seen in self._seen.values() if seen.why != WAITING]
        return len(answered) == len(self._seen) >= clients > len(self.joined)

    def settle(self, clients: int) -> None:
        """Have those that joined be the run's nodes; raises RoundError where they are not so many."""
        if len(self.joined) < clients:
            raise RoundError(f"nodes: there are {self.shown(clients)}")
        if len(self.joined) > clients:
            there = ", ".join(sorted(self.joined))
            raise RoundError(f"nodes: {there} are more than {clients}; name those that take part in runtime.nodes")
        self.names = sorted(self.joined)
        log.info("nodes: %s", ", ".join(self.names))

    def shown(self, clients: int) -> str:
        """In words, who is there, of whom, and why others are not."""
        there = ", ".join(sorted(self.joined)) or "none"
        reasons = sorted({f"{seen.name}: {seen.why}" for seen in self._seen.values() if seen.name and seen.why})
        reasons += sorted({seen.why for seen in self._seen.values() if not seen.name and seen.why != WAITING})
        if waiting := sum(seen.why == WAITING for seen in self._seen.values()):
            reasons.append(f"{waiting} more to answer")
        return f"{there} of {', '.join(self.names) or clients}" + "".join(f"; {one_line(why)}" for why in reasons)

    def node(self, client: int) -> int | None:
        """The node that a client is now, if it is there."""
        return self.joined.get(self.names[client])

    def forget(self, node: int) -> None:
        """Have a node invited again, which has lost what it was told."""
        self._seen.pop(node, None)
        self.joined = {name: other for name, other in self.joined.items() if other != node}

    def refusal(self, client: int) -> str | None:
        """Why the node of a client does not take part, if it has said so."""
        found = (seen.why for seen in self._seen.values() if seen.name == self.names[client])
        return next((why for why in found if why not in ("", WAITING)), None)

    def absence(self) -> str:
        """In words, that a node is not there, and who is that might be meant."""
        others = sorted(seen.name for seen in self._seen.values() if seen.name and seen.name not in self.names)
        more = f"; connected, and none of this run's: {', '.join(others)}" if others else ""
        return f"is not connected{more}"

    def _missing(self) -> list[int]:
        return [k for k, name in enumerate(self.names) if name not in self.joined]

    def _ask(self, link: "Link", nodes: Iterable[int], invitation: Invitation | None) -> None:
        """Send nodes an invitation, or ask who they are."""
        if not (new := [*nodes]):
            return
        content, now = wire.record(invitation or Hello()), monotonic()
        sent = link.send(dict.fromkeys(new, content), "query", group="join", ttl=PATIENCE)
        self._asked |= {message: Asked(node, now, invitation is not None) for message, node in sent.items()}
        self._seen |= {node: Seen(now, self._seen[node].name if node in self._seen else "") for node in new}

    def _heard(self, node: int, reply: "Reply", keys: dict[int, bytes]) -> tuple[str, str]:
        """What a node calls itself, and why it cannot take part."""
        if reply.error is not None or reply.content is None:
            return "", f"node {node}: {reply.error}"
        try:
            joined = wire.read(Joined, reply.content)
        except ValueError as wrong:
            return "", f"node {node}: {wrong}"
        name = one_line(joined.name)
        if self.keys is not None and (name not in self.keys or keys.get(node) != self.keys[name]):
            return "", f"a node calls itself {name}, and has another key than the one that is kept for this name"
        if self.named and name not in self.names:
            return name, "is none of this run's nodes"
        if joined.error is not None:
            return name, one_line(joined.error)
        self._compare(name, joined.versions)
        return name, ""

    def _compare(self, name: str, theirs: dict[str, str]) -> None:
        """Tell of versions that may give other bits."""
        for package in MATTER if name not in self.joined else ():
            if (there := theirs.get(package)) != (here := versions()[package]):
                text = "nodes: %s has %s %s, and the server %s; results agree as floating point does"
                log.warning(text, name, package, one_line(there), here)

    def _join(self, name: str, node: int) -> None:
        if self.joined.get(name, node) != node:
            log.warning("nodes: %s has joined a second time, and its first connection no longer counts", name)
        self.joined = {other: there for other, there in self.joined.items() if there != node} | {name: node}


def read_keys(folder: Path) -> dict[str, bytes]:
    """The public keys in NAME.pub files; raises ConfigError."""
    from fedsim.flower.internals import public_key_bytes

    found = {path.stem: public_key_bytes(path) for path in sorted(folder.glob("*.pub"))}
    if not found:
        raise ConfigError(f"runtime.keys: {folder}: has no file NAME.pub")
    return found
