"""Messages as Flower transfers them: trees of objects, each named by the SHA-256 of its bytes.

Flower's own functions hash and copy each byte several times, and wait a second for an object that is not there
yet; these hash and copy once, and transfer several objects in parallel. The wire format is the same.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from itertools import islice
from math import inf
from time import monotonic

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

from fedsim.flower.internals.connection import ByteLimit, TooLargeError, limited

CHUNK_BYTES = 8 * 2**20  # of an array in one object, and so in one request
PARALLEL_OBJECTS = 4  # that are transferred at the same time
MOST_DEPTH = 5  # of a tree: message, record dict, array record, array, chunk
MOST_OBJECTS = 100_000  # of one message
MOST_HEADER_BYTES = 2**20  # that the objects of a message may have besides their content
MOST_RECORD_BYTES = 2**23  # of a message besides its arrays' data; in memory they take about ten times as much

Objects = dict[str, bytes | InflatableObject]  # by id; as bytes if they are serialised already


class GoneError(Exception):
    """The SuperLink no longer has an object of a message."""


def packed(messages: Iterable[Message], pool: Executor) -> tuple[list[ObjectTree], Objects]:
    """Each message's tree of objects, and all objects by id; sets the messages' ids.

    An object that several messages share is in it once.
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
    """Cut an array into chunks of CHUNK_BYTES, stored in the attribute where Flower has its own."""
    if "_chunks" in array.__dict__:  # it was sent before
        return
    data = memoryview(array.data)
    chunks = [ArrayChunk(data[start : start + CHUNK_BYTES]) for start in range(0, len(data), CHUNK_BYTES)]
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
    """Send the objects that the SuperLink asks for, in parallel; raises LinkError."""

    def one(name: str) -> None:
        thing = objects[name]
        send(name, thing if isinstance(thing, bytes) else thing.deflate())

    wants = set(wanted)
    list(pool.map(one, [name for name in objects if name in wants]))


class IncomingMessage:
    """A message whose objects are being received."""

    def __init__(self, tree: ObjectTree, most_bytes: int):
        names = list(dict.fromkeys(each.object_id for each in iterate_object_tree(tree)))
        if len(names) > MOST_OBJECTS:
            raise TooLargeError(f"{len(names)} objects; allowed: up to {MOST_OBJECTS}")
        self.bytes = 0  # of the objects that have arrived
        self.name, self._missing = tree.object_id, deque(names)
        self._contents = dict[str, bytes]()
        self._most, self._limit = most_bytes, ByteLimit(most_bytes, min(1024 * len(names), MOST_HEADER_BYTES))

    def advance(self, fetch: Callable[[str], bytes | None], pool: Executor, seconds: float = inf) -> bool:
        """Fetch the objects that are available, and return whether the message is complete.

        `fetch` returns None for an object that has not been sent yet. After `seconds` it stops, and goes on in the
        next call. Raises LinkError, GoneError, and TooLargeError, without reading what is too large.
        """

        def one(name: str) -> bytes | None:
            with limited(self._limit):
                return fetch(name)

        parallel, began = 1, monotonic()  # one at first: asking for an object that is not there costs time
        while self._missing and monotonic() - began <= seconds:  # in the order in which they are sent
            window = [*islice(self._missing, parallel)]
            parallel = PARALLEL_OBJECTS
            got = dict(zip(window, pool.map(one, window), strict=True))
            here = {name: content for name, content in got.items() if content is not None}
            self._contents |= here
            self.bytes += sum(map(len, here.values()))
            for _ in window:
                self._missing.popleft()
            if later := [name for name in window if name not in here]:
                self._missing.extendleft(reversed(later))
                return False
        return not self._missing

    def message(self) -> Message:
        """The message; raises ValueError if its objects are not one."""
        chunk = ArrayChunk.__qualname__.encode()
        records = sum(len(content) for content in self._contents.values() if not content.startswith(chunk))
        if records > MOST_RECORD_BYTES:
            raise TooLargeError(f"{records} bytes besides arrays; allowed: up to {MOST_RECORD_BYTES}")
        try:
            made = _inflated(self.name, self._contents, ByteLimit(self._most), MOST_DEPTH, {})
        except ValueError:
            raise
        except Exception as error:  # whatever Flower's code raises for bytes from an untrusted sender
            raise ValueError(f"{type(error).__name__}: {error}") from None
        if not isinstance(made, Message):
            raise ValueError(f"it is a {type(made).__name__}, not a Message")
        made.metadata.__dict__["_message_id"] = self.name
        return made


def _inflated(
    name: str, contents: Mapping[str, bytes], limit: ByteLimit, depth: int, made: dict[str, InflatableObject]
) -> InflatableObject:
    """An object, made once and stored in `made`: a few kilobytes could refer to one object a billion times."""
    if name in made:
        return made[name]
    if not depth:
        raise ValueError(f"objects are nested more than {MOST_DEPTH} deep")
    content = contents[name]
    kind, children, _ = get_object_head_values_from_object_content(content)
    if kind == Array.__qualname__:
        made[name] = _array(content, children, contents, limit)
    else:
        inner = {child: _inflated(child, contents, limit, depth - 1, made) for child in children}
        made[name] = inflatable_class_registry[kind].inflate(content, children=inner)
    return made[name]


def _array(content: bytes, children: list[str], contents: Mapping[str, bytes], limit: ByteLimit) -> Array:
    """An array; Flower's own code copies it three times, and lets a few bytes repeat a chunk a million times."""
    head = json.loads(bytes(_body(content)))
    chunks = {child: _body(contents[child]) for child in children}
    for child in children:
        if get_object_head_values_from_object_content(contents[child])[0] != ArrayChunk.__qualname__:
            raise ValueError("an array whose parts are not chunks")
    parts = [chunks[children[place]] for place in head["arraychunk_ids"]]
    limit.take(sum(map(len, parts)))
    return Array(dtype=head["dtype"], shape=tuple(head["shape"]), stype=head["stype"], data=b"".join(parts))


def _body(content: bytes) -> memoryview:
    return memoryview(content)[content.index(HEAD_BODY_DIVIDER) + len(HEAD_BODY_DIVIDER) :]
