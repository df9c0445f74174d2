"""Which nodes have joined a run. Clients are identified by the names that nodes give, not by Flower's node ids."""

import logging
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from fedsim.base.files import expanded
from fedsim.errors import ConfigError, RoundError, one_line
from fedsim.experiment.checkpoint import versions
from fedsim.federated.claims import MAX_EXAMPLES
from fedsim.flower import wire
from fedsim.flower.messages import NAME, Hello, Invitation, Joined

if TYPE_CHECKING:
    from fedsim.flower.internals import Link, Reply

log = logging.getLogger(__name__)
ASK_AGAIN_AFTER = 60.0  # seconds; a node that has not answered, or has refused, is then asked again
MOST_ANSWER_BYTES = 2**20
COMPARED = "fedsim", "torch"  # packages; with another version of one, results may differ in the last bits
MAX_NOTES = 8  # of a node that are logged
WAITING = "has not answered yet"
MOST_SHOWN = 20  # names, or reasons, in one line


class Seen(NamedTuple):
    """What is known of a node that is online."""

    since: float  # when it was last asked or answered, by monotonic
    name: str = ""  # that the node gives itself; empty before it has answered
    why: str = WAITING  # the reason why it does not take part; empty if it does


class Sizes(NamedTuple):
    """The numbers of examples that a node agreed to when it joined."""

    examples: int  # n_k
    tested: int  # on which it evaluates its own model; 0 if only n_k is known, from a checkpoint


class Asked(NamedTuple):
    """A question that a node has not answered yet."""

    node: int
    invited: bool  # whether it was invited, or else only asked for its name


class Roster:
    """The nodes of a run, by name; it finds and invites them over the link that is in use.

    `names` is empty until it is known which nodes take part. Client k is then the k-th name, and no other node
    receives the plan. A node that joins agrees to its numbers of examples. `keys` maps names to public keys: a
    node may use one of these names only if it has that key, and no other name at all. `key_of` returns the keys of
    the connected nodes, by node id.
    """

    def __init__(
        self, keys: dict[str, bytes] | None = None, key_of: Callable[[], dict[int, bytes]] = dict[int, bytes]
    ):
        self.keys, self._key_of = keys, key_of
        self.names: list[str] = []
        self.joined: dict[str, int] = {}  # node ids, by name
        self.sizes: dict[str, Sizes] = {}  # by name, of all that have joined so far
        self.max_examples = MAX_EXAMPLES  # n_k of a node that may join
        self.online: set[int] = set()
        self._seen: dict[int, Seen] = {}  # by node
        self._told = set[str]()  # names of nodes whose notes were logged
        self._asked: dict[str, Asked] = {}  # by message
        self._link: Link | None = None

    def look(self, link: "Link", invitation: Invitation) -> None:
        """Ask new nodes for their names, invite those that should take part, read their answers; does not wait."""
        if link is not self._link:  # in another Flower run node ids may mean other nodes
            self._link, self.joined, self._asked, self._seen = link, {}, {}, {}
        self.online, now = link.nodes(), monotonic()
        self._seen = {
            node: seen
            for node, seen in self._seen.items()
            if node in self.online and not (seen.why and now - seen.since > ASK_AGAIN_AFTER)
        }
        left = {message for message, asked in self._asked.items() if asked.node not in self._seen}
        link.abandon(left)
        self._asked = {message: asked for message, asked in self._asked.items() if message not in left}
        self.joined = {name: node for name, node in self.joined.items() if node in self.online}
        self._ask(link, self.online - self._seen.keys(), None if self.named else invitation)
        keys = self._key_of() if self.keys is not None and self._asked else {}  # may raise: before replies
        wanted = set[int]()
        for reply in link.receive(self._asked, most_bytes=MOST_ANSWER_BYTES) if self._asked else []:
            asked = self._asked.pop(reply.to)
            if reply.gone:
                self._seen.pop(asked.node, None)
                continue
            name, sizes, why = self._heard(asked, reply, keys)
            self._seen[asked.node] = Seen(now, name, why if asked.invited else why or WAITING)
            if not why and asked.invited:
                self._join(name, asked.node, sizes)
            elif not why:
                wanted.add(asked.node)
        self._ask(link, wanted, invitation)

    @property
    def named(self) -> bool:
        """Whether it is known which nodes take part."""
        return bool(self.names)

    @property
    def complete(self) -> bool:
        """Whether all of the run's nodes have joined."""
        return self.joined.keys() >= {*self.names}

    @property
    def examples(self) -> list[int]:
        """n_k of each client; 0 while its node has not joined."""
        return [self.sizes[name].examples if name in self.sizes else 0 for name in self.names]

    def too_few_accept(self, clients: int) -> bool:
        """Whether every connected node has answered and fewer than needed accept, so that waiting cannot help."""
        if self.named:
            return not self.complete and all(self.refusal(k) for k in self._missing())
        answered = [seen for seen in self._seen.values() if seen.why != WAITING]
        return len(answered) == len(self._seen) >= clients > len(self.joined)

    def fix_names(self, clients: int) -> None:
        """Make the nodes that have joined the run's nodes; raises RoundError unless they are exactly `clients`."""
        if len(self.joined) < clients:
            raise RoundError(f"nodes: too few have joined: {self.shown(clients)}")
        if len(self.joined) > clients:
            there = ", ".join(_some(self.joined))
            raise RoundError(
                f"nodes: more than {clients} have joined: {there}; runtime.nodes should list those that take part"
            )
        self.names = sorted(self.joined)
        log.info("nodes: %s take part", ", ".join(self.names))

    def shown(self, clients: int) -> str:
        """In words, which nodes have joined, which are expected, and why others have not joined."""
        there = ", ".join(_some(self.joined)) or "none"
        answered = [seen for seen in self._seen.values() if seen.why != WAITING]
        reasons = _some({f"{seen.name}: {seen.why}" for seen in answered if seen.name and seen.why})
        reasons += _some({seen.why for seen in answered if not seen.name})
        if waiting := sum(seen.why == WAITING for seen in self._seen.values()):
            reasons.append(f"{waiting} connected, but without an answer so far")
        return f"{there} of {', '.join(self.names) or clients}" + "".join(f"; {one_line(why)}" for why in reasons)

    def node(self, client: int) -> int | None:
        """The id of a client's node, if it has joined."""
        return self.joined.get(self.names[client])

    def invite_again(self, node: int) -> None:
        """Have a node that has joined agree anew to its numbers of examples; until then the old ones hold."""
        if node in self._seen and not self._seen[node].why:  # no question is on its way to it
            del self._seen[node]

    def forget(self, node: int) -> None:
        """Have a node invited again, because it no longer has the plan."""
        self._seen.pop(node, None)
        self.joined = {name: other for name, other in self.joined.items() if other != node}

    def refusal(self, client: int) -> str | None:
        """The reason that a client's node gave for not taking part, if it gave one."""
        found = (seen.why for seen in self._seen.values() if seen.name == self.names[client])
        return next((why for why in found if why not in ("", WAITING)), None)

    def absence(self, client: int) -> str:
        """In words, why a client's node could not be sent its order; with the names of nodes that may be meant."""
        if self.node(client) is not None:
            return "has joined, but too late to be sent its order"
        others = _some({seen.name for seen in self._seen.values() if seen.name and seen.name not in self.names})
        more = f"; connected, but not part of this run: {', '.join(others)}" if others else ""
        if silent := sum(seen.why == WAITING for seen in self._seen.values()):
            return f"has not joined; {silent} connected, but without an answer so far{more}"
        return f"is not connected{more}"

    def _missing(self) -> list[int]:
        return [k for k, name in enumerate(self.names) if name not in self.joined]

    def _ask(self, link: "Link", nodes: Iterable[int], invitation: Invitation | None) -> None:
        """Send nodes an invitation, or ask for their names."""
        if not (new := [*nodes]):
            return
        content, now = wire.record(invitation or Hello()), monotonic()
        sent = link.send(dict.fromkeys(new, content), "query", group="join", ttl=ASK_AGAIN_AFTER)
        self._asked |= {message: Asked(node, invitation is not None) for message, node in sent.items()}
        self._seen |= {node: Seen(now, self._seen[node].name if node in self._seen else "") for node in new}

    def _heard(self, asked: Asked, reply: "Reply", keys: dict[int, bytes]) -> tuple[str, Sizes, str]:
        """A node's name and sizes, and the reason why it cannot take part, which is empty if it can."""
        node, name, sizes = asked.node, "", Sizes(0, 0)
        if reply.error is not None or reply.content is None:
            return name, sizes, f"node {node}: {reply.error}"
        try:
            joined = wire.read(Joined, reply.content)
        except ValueError as wrong:
            return name, sizes, f"node {node}: {wrong}"
        if not NAME.fullmatch(joined.name):  # nor has a node that could not read its settings
            return name, sizes, f"node {node}: {joined.error or f'its name {joined.name[:70]!r} is none'}"
        name, sizes = joined.name, Sizes(joined.examples, joined.tested)
        if self.keys is not None and (name not in self.keys or keys.get(node) != self.keys[name]):
            return "", sizes, f"a node uses the name {name} without having the key that belongs to this name"
        if self.named and name not in self.names:
            return name, sizes, "is not one of this run's nodes"
        if joined.error is not None:
            return name, sizes, one_line(joined.error)
        if not asked.invited:
            return name, sizes, ""
        if why := self._unusable(sizes):
            return name, sizes, why
        self._compare(name, joined.versions)
        self._tell(name, joined.notes)
        return name, sizes, ""

    def _unusable(self, sizes: Sizes) -> str | None:
        """Why a node with these numbers of examples may not join, if it may not."""
        for number, what, most, which in (
            (sizes.examples, "examples", self.max_examples, " (failures.max_examples)"),
            (sizes.tested, "examples to test on", MAX_EXAMPLES, ""),
        ):
            if not 1 <= number <= most:
                return f"has {str(number)[:20]} {what}; allowed: 1 to {most}{which if most < MAX_EXAMPLES else ''}"
        return None

    def _compare(self, name: str, theirs: dict[str, str]) -> None:
        """Warn of versions with which results may differ in the last bits."""
        for package in COMPARED if name not in self.joined else ():
            if (there := theirs.get(package)) != (here := versions()[package]):
                text = "nodes: %s has %s %s, the server has %s; results may differ by rounding errors"
                log.warning(text, name, package, one_line(there), here)

    def _tell(self, name: str, notes: tuple[str, ...]) -> None:
        """Log what a node has to say, the first time that it joins."""
        for note in notes[:MAX_NOTES] if name not in self._told else ():
            log.warning("nodes: %s: %s", name, one_line(note))
        self._told.add(name)

    def _join(self, name: str, node: int, sizes: Sizes) -> None:
        before = self.sizes.get(name)
        if before is None:
            log.info("nodes: %s has joined with %d examples", name, sizes.examples)
        elif sizes.examples != before.examples:
            log.warning("nodes: %s now has %d examples, and had %d", name, sizes.examples, before.examples)
        self.sizes[name] = sizes
        if self.joined.get(name, node) != node:
            log.warning("nodes: %s has joined a second time; its first connection is no longer used", name)
        self.joined = {other: there for other, there in self.joined.items() if there != node} | {name: node}


def _some(words: Collection[str]) -> list[str]:
    """The first of them in order, and how many more there are: strangers may be many."""
    first, more = sorted(words)[:MOST_SHOWN], len(words) - MOST_SHOWN
    return first if more <= 0 else [*first, f"{more} more"]


def read_keys(folder: Path) -> dict[str, bytes]:
    """The public keys of a folder's NAME.pub files, by name; raises ConfigError."""
    from fedsim.flower.internals import public_key_bytes

    files = sorted(expanded(folder, "runtime.keys").glob("*.pub"))
    found = {path.stem: public_key_bytes(path) for path in files}
    if not found:
        raise ConfigError(f"runtime.keys: {folder}: has no file NAME.pub")
    return found
