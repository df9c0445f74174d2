"""The states of clients between rounds: in memory up to a limit, then on disk.

A client has a state from the first round on in which it takes part. On disk are segments, files with the states of
several clients that never change, as in a log-structured file system (Rosenblum & Ousterhout 1992). A checkpoint
writes the clients that have changed since the last one, and names the segments with the other clients. If less
than half of a segment is current, its current states are rewritten; a segment without any is deleted, unless a
checkpoint needs it.
"""

import os
import re
import shutil
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ByteSize
from safetensors import SafetensorError
from safetensors.torch import save

from fedsim.base.files import File, open_tensors, remove, uninterrupted, untied_copies, write
from fedsim.errors import RoundError
from fedsim.types import State

SEGMENT_BYTES = 64 * 2**20  # about; a segment takes twice as much memory while it is written
MAX_CLIENTS_PER_SEGMENT = 256  # each read of a segment reads its table of contents, too
DEFAULT_MEMORY = ByteSize(2 * 2**30)
CLIENT = re.compile(r"0|[1-9][0-9]{0,17}")  # an id
SEGMENT_NAME = re.compile(r"clients-[0-9]{6,}\.safetensors")


@dataclass
class Segment:
    """A file on disk, the clients in it, and the number of clients whose current state it has."""

    file: File
    clients: list[int]
    live: int
    has_discarded: bool = False  # has a discarded state, which `restore` would bring back


class ClientStore(Mapping[int, State]):
    """The state of each client that has one, by its id.

    The states that a round computes are staged, and become current when they are committed. States beyond `memory`
    bytes are written to `folder`, by default a temporary one. Not for use by two threads at once.
    """

    def __init__(self, folder: Path | None = None, /, *, memory: ByteSize = DEFAULT_MEMORY):
        self.folder, self.memory = folder, memory
        self.pinned: set[str] = set()  # segments that belong to checkpoints
        self._segments: dict[str, Segment] = {}  # in the order in which they were written
        self._place: dict[int, str] = {}  # by client, the segment with its current state
        self._changed: dict[int, State] = {}
        self._cached: OrderedDict[int, State] = OrderedDict()  # copies of states on disk; the last used last
        self._staged: dict[int, State] = {}
        self._staged_place: dict[int, str] = {}
        self._bytes = 0  # of all states in memory
        self._written = 0  # segments

    def __getitem__(self, client: int) -> State:
        if client in self._changed:
            return self._changed[client]
        if client in self._cached:
            self._cached.move_to_end(client)
            return self._cached[client]
        ((_, state),) = self._read(self._place[client], [client])
        self._cached[client] = state
        self._bytes += _size(state)
        self._free_memory()
        return state

    def __iter__(self) -> Iterator[int]:
        return iter([*self._place, *self._changed])  # a list, since reading may move a state from one to the other

    def __len__(self) -> int:
        return len(self._place) + len(self._changed)

    def __contains__(self, client: object) -> bool:
        return client in self._changed or client in self._place

    def stage(self, client: int, state: State) -> None:
        """Keep the state that a client will have if the round is committed."""
        if not state:  # a segment cannot represent a state without entries
            raise ValueError(f"client {client}: the state has no entries")
        self.discard(client)
        self._staged[client] = dict(sorted(state.items()))  # in the same order as after reading from disk
        self._bytes += _size(state)
        self._free_memory()

    def discard(self, client: int | None = None) -> None:
        """Drop the staged state of one client, or of all clients."""
        for each in [*self._staged, *self._staged_place] if client is None else [client]:
            self._staged_place.pop(each, None)
            self._bytes -= _size(self._staged.pop(each, {}))

    def commit(self) -> None:
        """Make the staged states current."""
        with uninterrupted():
            for client in (*self._staged, *self._staged_place):
                self._forget(client)
            self._changed |= self._staged
            for client, name in self._staged_place.items():
                self._place[client] = name
                self._segments[name].live += 1
            for name in dict.fromkeys(self._staged_place.values()):
                segment = self._segments[name] = self._segments.pop(name)  # the newest of all segments
                segment.has_discarded = segment.live < len(segment.clients)
            self._staged, self._staged_place = {}, {}

    def tidy(self) -> None:
        """Rewrite the current states of segments that are mostly outdated, and delete segments without use."""
        for name, segment in list(self._segments.items()):
            if 0 < 2 * segment.live < len(segment.clients):
                self._rewrite(name)
        needed = self.pinned | set(self._staged_place.values())
        for name in [n for n, segment in self._segments.items() if not segment.live and n not in needed]:
            remove(self._home() / name)
            del self._segments[name]

    def flush(self) -> list[File]:
        """Write all changed states; returns the files with the states of all clients, the older files first.

        Raises RoundError where someone has deleted one of them.
        """
        for name in [name for name, segment in self._segments.items() if segment.has_discarded]:
            self._rewrite(name)
        while self._changed:
            part = self._write_segment(self._changed, self._place)
            with uninterrupted():
                self._cached |= part
                self._bytes += sum(map(_size, part.values()))
            self._free_memory()
        files = [segment.file for segment in self._segments.values() if segment.live]
        there = set(os.listdir(self._home())) if files else set[str]()
        if gone := [file.name for file in files if file.name not in there]:
            raise RoundError(f"{self._home() / gone[0]}: clients' states are gone; someone has deleted the file")
        return files

    def restore(self, files: Iterable[File]) -> None:
        """Read the states from files that `flush` returned; raises ValueError if one is not a segment.

        Other segments in the folder come from a process that was killed, and are deleted unless they are pinned.
        """
        for file in files:
            keys = self._keys(file.name)
            clients = sorted({_client_of(key) for key in keys})
            if len(clients) > MAX_CLIENTS_PER_SEGMENT:
                raise ValueError(f"{file.name} has the states of {len(clients)} clients, too many for one file")
            for client in clients:
                self._forget(client)
                self._place[client] = file.name
            self._segments[file.name] = Segment(file, clients, len(clients))
        found = [path for path in self._home().iterdir() if SEGMENT_NAME.fullmatch(path.name)]
        for path in found:
            if path.name in self.pinned:  # if only another checkpoint needs it, it is deleted with that
                self._segments.setdefault(path.name, Segment(File(path.name, 0, ""), [], 0))
            elif path.name not in self._segments:
                remove(path)
        self._written = 1 + max((int(path.stem.rpartition("-")[2]) for path in found), default=-1)

    def _rewrite(self, name: str) -> None:
        """Mark the current states of a segment as changed, so that they are written again."""
        live = [client for client in self._segments[name].clients if self._place.get(client) == name]
        for client, read in self._read(name, live) if live else ():
            state = self._cached.get(client, read)
            with uninterrupted():
                self._forget(client)
                self._changed[client] = state
                self._bytes += _size(state)
            self._free_memory()

    def _free_memory(self) -> None:
        """Drop copies of states on disk, the least recently used first; then write changed and staged states."""
        while self._bytes > self.memory:
            if self._cached:
                self._bytes -= _size(self._cached.popitem(last=False)[1])
            elif self._changed:
                self._write_segment(self._changed, self._place)
            elif self._staged:
                self._write_segment(self._staged, self._staged_place)
            else:
                break

    def _write_segment(self, layer: dict[int, State], place: dict[int, str]) -> dict[int, State]:
        """Move the first states of `layer` to a new segment."""
        part, size = dict[int, State](), 0
        for client, state in layer.items():
            part[client] = state
            size += _size(state)
            if size >= SEGMENT_BYTES or len(part) == MAX_CLIENTS_PER_SEGMENT:
                break
        name = f"clients-{self._written:06}.safetensors"
        tensors = {f"{client}.{entry}": value for client, state in part.items() for entry, value in state.items()}
        try:
            content = save(untied_copies(tensors))
        except KeyError as error:  # a type that safetensors does not support
            raise RoundError(
                f"{error} cannot be written to disk, so a client's state cannot contain it"
            ) from error
        file = write(self._home() / name, content, sync_name=False)
        with uninterrupted():
            self._written += 1
            self._segments[name] = Segment(file, list(part), len(part) if place is self._place else 0)
            for client in part:
                place[client] = name
                del layer[client]
            self._bytes -= size
        return part

    def _forget(self, client: int) -> None:
        for layer in (self._changed, self._cached):
            self._bytes -= _size(layer.pop(client, {}))
        if name := self._place.pop(client, None):
            self._segments[name].live -= 1

    def _read(self, name: str, clients: list[int]) -> Iterator[tuple[int, State]]:
        """The states of some clients in a segment, one at a time."""
        at = f"state of client {clients[0]}"
        try:
            with open_tensors(self._home() / name) as segment:
                entries: dict[int, list[str]] = {client: [] for client in clients}
                for key in sorted(segment.keys()):
                    client, _, entry = key.partition(".")
                    entries.get(int(client), []).append(entry)
                for client, names in entries.items():
                    at = f"state of client {client}"
                    if not names:
                        raise SafetensorError("is not in it")
                    with uninterrupted():  # torch turns an interrupt here into an error of its own
                        state = {entry: segment.get_tensor(f"{client}.{entry}").clone() for entry in names}
                    yield client, state
        except (OSError, ValueError, SafetensorError) as error:
            raise RoundError(f"{self._home() / name}: {at}: {error}") from error

    def _keys(self, name: str) -> list[str]:
        try:
            with open_tensors(self._home() / name) as segment:
                return list(segment.keys())
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{name}: {error}") from error

    def _home(self) -> Path:
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="fedsim-clients-"))
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        return self.folder


def _client_of(key: str) -> int:
    """The client's id in the name of a tensor in a segment, such as 7.c; raises ValueError where there is none."""
    client = key.partition(".")[0]
    if not CLIENT.fullmatch(client):
        raise ValueError(f"{key[:60]!r} is no entry of a client")
    return int(client)


def _size(state: State) -> int:
    return sum(value.nbytes for value in state.values())
