"""Who is there: nodes say their names when they join, and clients are known by them, not by Flower's numbers."""

import logging
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from fedsim.errors import ConfigError, RoundError, one_line
from fedsim.flower import wire
from fedsim.flower.messages import Invitation, Joined

if TYPE_CHECKING:
    from flwr.app import RecordDict

    from fedsim.flower.internals import Link

log = logging.getLogger(__name__)
PATIENCE = 300.0  # seconds that a node has to accept an invitation
MOST_BYTES = 2**20  # of an answer to one
WAITING = "has not answered yet"


class Roster:
    """The nodes of a run, by name; they are found and invited over the link that is in use.

    `names` has the clients' in their order, by which client k is the k-th, once they are settled. `keys` has the
    public keys by name, where only their owners may bear these names; `key_of` tells a node's.
    """

    def __init__(
        self, keys: dict[str, bytes] | None = None, key_of: Callable[[], dict[int, bytes]] = dict[int, bytes]
    ):
        self.keys, self._key_of = keys, key_of
        self.names: list[str] = []
        self.joined: dict[str, int] = {}  # node ids, by name
        self.told: dict[str, Joined] = {}  # what each said, by name
        self.online: set[int] = set()
        self._invited: dict[str, tuple[int, float]] = {}  # by message, the node and when
        self._asked: dict[int, str] = {}  # nodes, and why one does not take part
        self._link: Link | None = None

    def look(self, link: "Link", invitation: Invitation) -> None:
        """Invite who is new, and hear who accepted; never waits."""
        if link is not self._link:  # node ids may have changed their meaning
            self._link, self.joined, self._invited, self._asked = link, {}, {}, {}
        self.online = link.nodes()
        self._asked = {node: why for node, why in self._asked.items() if node in self.online}
        self.joined = {name: node for name, node in self.joined.items() if node in self.online}
        if new := self.online - self._asked.keys():
            content = wire.record(invitation)
            sent = link.send(dict.fromkeys(new, content), "query", group="join", ttl=PATIENCE)
            self._invited |= {message: (node, monotonic()) for message, node in sent.items()}
            self._asked |= dict.fromkeys(new, WAITING)
        keys = self._key_of() if self.keys is not None and self._invited else {}  # which may raise: before replies
        for reply in link.receive(self._invited, most_bytes=MOST_BYTES) if self._invited else []:
            node, _ = self._invited.pop(reply.to)
            if reply.gone:
                self._asked.pop(node, None)
            else:
                self._asked[node] = self._accept(node, reply.error, reply.content, keys)
        for message, (node, since) in list(self._invited.items()):
            if monotonic() - since > PATIENCE:  # it may have come to itself: ask again
                del self._invited[message]
                self._asked.pop(node, None)

    @property
    def complete(self) -> bool:
        """Whether all of the run's nodes have joined."""
        return self.joined.keys() >= {*self.names}

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
        return f"{there} of {', '.join(self.names) or clients}{self._why()}"

    def node(self, client: int) -> int | None:
        """The node that a client is now, if it is there."""
        return self.joined.get(self.names[client])

    def forget(self, node: int) -> None:
        """Have a node invited again, which has lost what it was told."""
        self._asked.pop(node, None)
        self.joined = {name: other for name, other in self.joined.items() if other != node}

    def why(self, client: int) -> str:
        """In words, why a client's node is not there."""
        return f"{self.names[client]} is not connected{self._why()}"

    def _why(self) -> str:
        """What is known of nodes that are connected and do not take part."""
        asked = [why for node, why in self._asked.items() if node in self.online]
        reasons = sorted({*asked} - {"", WAITING})
        if waiting := asked.count(WAITING):
            reasons.append(f"{waiting} connected, and not answered yet")
        return f"; {one_line('; '.join(reasons))}" if reasons else ""

    def _accept(
        self, node: int, error: str | None, content: "RecordDict | None", keys: dict[int, bytes]
    ) -> str:
        """Have it among those that joined; or why not."""
        if error is not None or content is None:
            return f"node {node}: {error}"
        try:
            joined = wire.read(Joined, content)
        except ValueError as wrong:
            return f"node {node}: {wrong}"
        name = one_line(joined.name)
        if joined.error is not None:
            return f"{name}: {one_line(joined.error)}"
        if self.names and name not in self.names:
            return f"{name} is none of this run's nodes"
        if self.keys is not None and (name not in self.keys or keys.get(node) != self.keys[name]):
            return f"{name}: its key is not the one that is kept for this name"
        if name in self.joined:
            log.warning("nodes: %s has joined a second time, and its first connection no longer counts", name)
        self.joined = {other: there for other, there in self.joined.items() if there != node} | {name: node}
        self.told[name] = joined
        return ""


def read_keys(folder: Path) -> dict[str, bytes]:
    """The public keys in NAME.pub files; raises ConfigError."""
    from fedsim.flower.internals import public_key_bytes

    found = {path.stem: public_key_bytes(path) for path in sorted(folder.glob("*.pub"))}
    if not found:
        raise ConfigError(f"runtime.keys: {folder}: has no file NAME.pub")
    return found
