"""The nodes that a SuperLink knows, for `fedsim nodes`; those that are online are asked for their names."""

from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from time import monotonic, sleep

from fedsim.errors import ConfigError, one_line
from fedsim.flower import wire
from fedsim.flower.app import flower_app
from fedsim.flower.internals import Link, LinkError, Listed, Superlink, listed
from fedsim.flower.messages import Hello, Joined
from fedsim.flower.roster import COMPARED

ANSWER_TIME = 12.0  # seconds that nodes have to answer: Flower's SuperNodes take six, or more while they work
POLL = 0.05  # seconds between two looks for answers


def node_rows(superlink: Superlink, sizes: Mapping[str, int]) -> Iterator[tuple[str, ...]]:
    """A row for each node: name, when last seen, number of examples, versions, node id; raises ConfigError.

    `sizes` has the numbers of examples that are known, by name.
    """
    try:
        known = {node.node: node for node in listed(superlink)}
        answers = _asked(superlink)
    except LinkError as error:
        raise ConfigError(f"superlink {superlink.address}: {error}") from error
    for number, node in sorted(known.items(), key=lambda pair: (_name(answers, pair[1]), pair[0])):
        joined = answers.get(number)
        name, versions = _name(answers, node), joined.versions if joined else {}
        shown = ", ".join(f"{each} {one_line(versions.get(each, '?'))}" for each in COMPARED) if joined else ""
        examples = f"{sizes[name]:,}" if sizes.get(name) else "unknown"
        yield name or "unknown", _seen(node, joined), examples, shown, str(number)


def _name(answers: Mapping[int, Joined], node: Listed) -> str:
    joined = answers.get(node.node)
    return one_line(joined.name) if joined else one_line(node.name)


def _seen(node: Listed, joined: Joined | None) -> str:
    if node.status == "online":
        return "now" if joined else "working, or not a fedsim node"
    return f"{node.status}, {node.online_until or node.since}"


def _asked(superlink: Superlink) -> dict[int, Joined]:
    """The answers of the nodes that are online, by node id."""
    answers = dict[int, Joined]()
    with closing(Link.open(superlink, flower_app())) as link:
        content = wire.record(Hello())
        waiting = link.send(dict.fromkeys(link.nodes(), content), "query", group="census", ttl=ANSWER_TIME)
        deadline = monotonic() + ANSWER_TIME
        while waiting and monotonic() < deadline:
            for reply in link.receive(waiting, most_bytes=2**20):
                node = waiting.pop(reply.to)
                with suppress(ValueError):  # not a fedsim node
                    if reply.content is not None:
                        answers[node] = wire.read(Joined, reply.content)
            sleep(POLL)
    return answers
