"""Messages as Flower's wire has them: trees of objects, each named by the SHA-256 of its bytes.

Flower's own functions hash and copy each byte several times over, and wait a second for what is not there yet;
these hash and copy once, and move several objects side by side. The wire is the same.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.constant import HEAD_BODY_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_head_values_from_object_content,
    get_object_id,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflatable_class_registry

from fedsim.flower.internals.connection import Room, TooLargeError, within

CHUNK = 8 * 2**20  # bytes of an array in one object, and so in one request
WORKERS = 4  # objects that move side by side
DEPTH = 5  # message, record dict, array record, array, chunk
MOST_OBJECTS = 100_000  # of one message
WRAPPING = 2**20  # bytes that a message may have besides its content, at most
RECORDS = 2**23  # bytes that it may have besides its arrays' data; in memory they take some ten times as many

Objects = dict[str, bytes | InflatableObject]  # by id; as bytes where they are made already


class GoneError(Exception):
    """The SuperLink no longer has an object that belongs to a message."""


def packed(messages: Iterable[Message], pool: Executor) -> tuple[list[ObjectTree], Objects]:
    """Each message's tree of objects, and all the objects by their ids; sets the messages' ids.

    What several messages hold is there once.
    """
    objects = Objects()
    messages = list(messages)
    arrays = {
        id(array): array for message in messages if message.has_content() for array in _arrays(message.content)
    }
    for array in arrays.values():
        _split(array, objects, pool)
    with no_object_id_recompute():
        trees = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            trees.append(_tree(message.object_id, message, objects))
    return trees, objects


def _arrays(content: RecordDict) -> list[Array]:
    return [array for record in content.values() if isinstance(record, ArrayRecord) for array in record.values()]


def _split(array: Array, objects: Objects, pool: Executor) -> None:
    """Cut an array into chunks of our size, in the place where Flower keeps its own."""
    if "_chunks" in array.__dict__:  # it was sent before
        return
    data = memoryview(array.data)
    chunks = [ArrayChunk(data[start : start + CHUNK]) for start in range(0, len(data), CHUNK)]
    contents = list(pool.map(_deflated, chunks))
    array.__dict__["_chunks"] = [(name, chunk) for (name, _), chunk in zip(contents, chunks, strict=True)]
    objects.update(contents)


def _deflated(thing: InflatableObject) -> tuple[str, bytes]:
    content = thing.deflate()
    return get_object_id(content), content


def _tree(name: str, thing: InflatableObject, objects: Objects) -> ObjectTree:
    children = [_tree(child, each, objects) for child, each in (thing.children or {}).items()]
    objects.setdefault(name, thing)
    return ObjectTree(object_id=name, children=children)


def push(
    objects: Mapping[str, bytes | InflatableObject],
    wanted: Iterable[str],
    send: Callable[[str, bytes], None],
    pool: Executor,
) -> None:
    """Send the objects that the SuperLink wants, side by side; raises LinkError."""

    def one(name: str) -> None:
        thing = objects[name]
        send(name, thing if isinstance(thing, bytes) else thing.deflate())

    wants = set(wanted)
    list(pool.map(one, [name for name in objects if name in wants]))


class Arrival:
    """A message whose objects are on their way to us."""

    def __init__(self, tree: ObjectTree, most_bytes: int):
        names = list(dict.fromkeys(each.object_id for each in iterate_object_tree(tree)))
        if len(names) > MOST_OBJECTS:
            raise TooLargeError(f"{len(names)} objects; {MOST_OBJECTS} are allowed")
        self.bytes = 0  # of the objects that are here
        self.name, self._missing = tree.object_id, names
        self._contents = dict[str, bytes]()
        self._most, self._room = most_bytes, Room(most_bytes, min(1024 * len(names), WRAPPING))

    def advance(self, fetch: Callable[[str], bytes | None], pool: Executor) -> bool:
        """Take the objects that are there, and say whether all are.

        `fetch` gives None for what its sender has yet to send. Raises LinkError; GoneError; and TooLargeError,
        with what is too large unread.
        """

        def one(name: str) -> bytes | None:
            with within(self._room):
                return fetch(name)

        side_by_side = 1  # at first: asking in vain is not for free
        while self._missing:  # in the order in which they are sent
            window = self._missing[:side_by_side]
            side_by_side = WORKERS
            got = dict(zip(window, pool.map(one, window), strict=True))
            here = {name: content for name, content in got.items() if content is not None}
            self._contents |= here
            self.bytes += sum(map(len, here.values()))
            self._missing = [name for name in self._missing if name not in here]
            if len(here) < len(window):
                return False
        return True

    def message(self) -> Message:
        """The message; raises ValueError where its objects do not make one."""
        chunk = ArrayChunk.__qualname__.encode()
        records = sum(len(content) for content in self._contents.values() if not content.startswith(chunk))
        if records > RECORDS:
            raise TooLargeError(f"{records} bytes besides arrays; {RECORDS} are allowed")
        try:
            made = _inflated(self.name, self._contents, Room(self._most), DEPTH, {})
        except ValueError:
            raise
        except Exception as error:  # whatever Flower's parts make of bytes that anyone may have sent
            raise ValueError(f"{type(error).__name__}: {error}") from None
        if not isinstance(made, Message):
            raise ValueError(f"it is a {type(made).__name__}")
        made.metadata.__dict__["_message_id"] = self.name
        return made


def _inflated(
    name: str, contents: Mapping[str, bytes], room: Room, depth: int, made: dict[str, InflatableObject]
) -> InflatableObject:
    """An object, which is in `made` from then on: a few kilobytes could name one a billion times."""
    if name in made:
        return made[name]
    if not depth:
        raise ValueError(f"objects lie more than {DEPTH} deep")
    content = contents[name]
    kind, children, _ = get_object_head_values_from_object_content(content)
    if kind == Array.__qualname__:
        made[name] = _array(content, children, contents, room)
    else:
        inner = {child: _inflated(child, contents, room, depth - 1, made) for child in children}
        made[name] = inflatable_class_registry[kind].inflate(content, children=inner)
    return made[name]


def _array(content: bytes, children: list[str], contents: Mapping[str, bytes], room: Room) -> Array:
    """Flower's own takes each byte three times, and lets a few bytes name a chunk a million times."""
    told = json.loads(bytes(_body(content)))
    chunks = {child: _body(contents[child]) for child in children}
    for child in children:
        if get_object_head_values_from_object_content(contents[child])[0] != ArrayChunk.__qualname__:
            raise ValueError("an array of what are no chunks")
    parts = [chunks[children[place]] for place in told["arraychunk_ids"]]
    room.take(sum(map(len, parts)))
    return Array(dtype=told["dtype"], shape=tuple(told["shape"]), stype=told["stype"], data=b"".join(parts))


def _body(content: bytes) -> memoryview:
    return memoryview(content)[content.index(HEAD_BODY_DIVIDER) + len(HEAD_BODY_DIVIDER) :]
