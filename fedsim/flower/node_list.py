"""The nodes that a SuperLink knows, for `fedsim nodes`; those that are online are asked for their names."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from datetime import datetime
from textwrap import fill
from time import monotonic, sleep
from typing import NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from fedsim.errors import ConfigError, one_line, printable
from fedsim.flower import wire
from fedsim.flower.app import flower_app
from fedsim.flower.internals import Link, LinkError, Listed, Superlink, listed
from fedsim.flower.messages import Hello, Joined
from fedsim.flower.roster import COMPARED, MAX_NOTES
from fedsim.report.runs import WIDTH

ANSWER_TIME = 12.0  # seconds that nodes have to answer: Flower's SuperNodes take six, or more while they work
POLL = 0.05  # seconds between two looks for answers


class Known(NamedTuple):
    """What is known of a node."""

    name: str | None
    state: str  # here: it has answered; silent: it is online, and works or is no fedsim node; offline; registered
    last_seen: str | None  # ISO 8601; None where it never was
    examples: int | None
    versions: dict[str, str]
    number: int  # Flower's
    reason: str | None = None  # why it does not take part in the run that it was invited to last, or cannot start


def known_nodes(superlink: Superlink, sizes: Mapping[str, int]) -> Iterator[Known]:
    """The nodes by name; `sizes` has the numbers of examples that are known. Raises ConfigError."""
    try:
        known = {node.node: node for node in listed(superlink)}
        answers = _asked(superlink)
    except LinkError as error:
        raise ConfigError(f"superlink {superlink.address}: {error}") from error
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    for number, node in sorted(known.items(), key=lambda pair: (_name(answers, pair[1]), pair[0])):
        joined, name = answers.get(number), _name(answers, node)
        state = ("here" if joined else "silent") if node.status == "online" else node.status
        seen = {"here": now, "registered": None}.get(state, node.online_until or node.since)
        versions = {each: one_line(joined.versions.get(each, "?")) for each in COMPARED} if joined else {}
        examples, reason = sizes.get(name) or None, _reason(joined) if joined else None
        yield Known(name or None, state, seen, examples, versions, number, reason)


def nodes_table(nodes: Sequence[Known]) -> Table:
    """A row for each node, 80 columns wide; where all have the same versions, these stand below.

    Without a run no numbers of examples are known, and there is no column for them. Reasons of nodes stand below.
    """
    shown = [", ".join(f"{each} {version}" for each, version in node.versions.items()) for node in nodes]
    found = {versions for versions in shown if versions}
    table = Table(width=WIDTH, box=box.SIMPLE_HEAD, caption_justify="left")
    table.add_column("node", ratio=1, overflow="fold")
    table.add_column("last seen", no_wrap=True)
    if sized := any(node.examples is not None for node in nodes):
        table.add_column("examples", justify="right", no_wrap=True)
    if len(found) > 1:
        table.add_column("versions", max_width=32, overflow="fold")
    below = [f"all that answered: {printable(*found)}"] if len(found) == 1 else []
    below += [f"{_shown_name(node)}: {printable(node.reason)}" for node in nodes if node.reason]
    # A caption that is too wide is cut.
    table.caption = Text("\n".join(fill(line, WIDTH, subsequent_indent="  ") for line in below))
    for node, versions in zip(nodes, shown, strict=True):
        name = _shown_name(node)
        examples = "unknown" if node.examples is None else f"{node.examples:,}"
        row = name, last_seen(node), *([examples] if sized else []), *([versions] if len(found) > 1 else [])
        table.add_row(*(Text(printable(cell)) for cell in row))  # not as markup: nodes choose their names
    return table


def last_seen(node: Known) -> str:
    """When a node was seen, in a few words and by this machine's clock."""
    if node.state in ("here", "silent"):
        return "now" if node.state == "here" else "now, no answer"
    if node.last_seen is None:
        return "never"
    try:
        time = datetime.fromisoformat(node.last_seen).astimezone()
    except (ValueError, OverflowError):
        return "unknown"
    return f"{time:%H:%M:%S}" if time.date() == datetime.now().date() else f"{time:%Y-%m-%d %H:%M}"


def _shown_name(node: Known) -> str:
    return printable(node.name or f"unnamed, Flower's {node.number}")


def _reason(joined: Joined) -> str | None:
    """What a node says of itself, besides its name: it has answered no invitation, so that is what is wrong."""
    said = [text for text in (joined.error, *joined.notes[:MAX_NOTES]) if text]
    return "; ".join(map(one_line, said)) or None


def _name(answers: Mapping[int, Joined], node: Listed) -> str:
    joined = answers.get(node.node)
    return one_line(joined.name) if joined else one_line(node.name)


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
