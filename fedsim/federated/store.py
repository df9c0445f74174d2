"""What clients keep between rounds: absent until first sampled, in memory up to a limit, then on disk.

On disk lie segments, files of several clients' states that are never changed once written, as in a log-structured
file system (Rosenblum & Ousterhout 1992): a checkpoint writes the clients that changed since the last one, and
names the segments that hold the rest. A segment of which less than half still counts is written anew; one that
neither counts nor belongs to a checkpoint is deleted.
"""

import re
import shutil
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ByteSize
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedsim.base.files import File, uninterrupted, untied_copies, write
from fedsim.errors import RoundError
from fedsim.types import State

SEGMENT = 64 * 2**20  # bytes, about: what is written at a time, and held twice in memory for it
CLIENTS = 256  # in a segment, for its list of contents is read with each
MEMORY = ByteSize(2 * 2**30)
NAME = re.compile(r"clients-\d{6,}\.safetensors")


@dataclass
class Segment:
    """A file on disk, the clients in it, and of how many it has the latest state."""

    file: File
    clients: list[int]
    live: int
    stray: bool = False  # has a state that was discarded, and would be back after `restore`


class ClientStore(Mapping[int, State]):
    """The state of each client that has one, by its id.

    What a round computes is staged, and counts when it is committed. `memory` bounds what is held in memory;
    beyond it states go to `folder`, or to a temporary one. Not for two threads at once.
    """

    def __init__(self, folder: Path | None = None, /, *, memory: ByteSize = MEMORY):
        self.folder, self.memory = folder, memory
        self.pinned: set[str] = set()  # segments that belong to checkpoints
        self._segments: dict[str, Segment] = {}  # in the order in which they were written
        self._place: dict[int, str] = {}  # the segment with a client's state, where that has not changed since
        self._changed: dict[int, State] = {}
        self._clean: OrderedDict[int, State] = OrderedDict()  # on disk too; the last used last
        self._staged: dict[int, State] = {}
        self._staged_place: dict[int, str] = {}
        self._bytes = 0  # in memory
        self._written = 0  # segments

    def __getitem__(self, client: int) -> State:
        if client in self._changed:
            return self._changed[client]
        if client in self._clean:
            self._clean.move_to_end(client)
            return self._clean[client]
        ((_, state),) = self._read(self._place[client], [client])
        self._clean[client] = state
        self._bytes += _size(state)
        self._fit()
        return state

    def __iter__(self) -> Iterator[int]:
        return iter([*self._place, *self._changed])  # a list: a read may move a state from one to the other

    def __len__(self) -> int:
        return len(self._place) + len(self._changed)

    def __contains__(self, client: object) -> bool:
        return client in self._changed or client in self._place

    def stage(self, client: int, state: State) -> None:
        """Keep what a client will have if the round counts."""
        if not state:  # which a segment could not tell from none
            raise ValueError(f"client {client}: no entries to keep")
        self.discard(client)
        self._staged[client] = dict(sorted(state.items()))  # in one order, whether read from disk or not
        self._bytes += _size(state)
        self._fit()

    def discard(self, client: int | None = None) -> None:
        """Forget what was staged, by one client or by all."""
        for each in [*self._staged, *self._staged_place] if client is None else [client]:
            self._staged_place.pop(each, None)
            self._bytes -= _size(self._staged.pop(each, {}))

    def commit(self) -> None:
        """What was staged is what clients have now."""
        with uninterrupted():
            for client in (*self._staged, *self._staged_place):
                self._forget(client)
            self._changed |= self._staged
            for client, name in self._staged_place.items():
                self._place[client] = name
                self._segments[name].live += 1
            for name in dict.fromkeys(self._staged_place.values()):
                segment = self._segments[name] = self._segments.pop(name)  # newer than any written meanwhile
                segment.stray = segment.live < len(segment.clients)
            self._staged, self._staged_place = {}, {}

    def tidy(self) -> None:
        """Write anew what is left of segments that are mostly outdated, and delete those that nobody needs."""
        for name, segment in list(self._segments.items()):
            if 0 < 2 * segment.live < len(segment.clients):
                self._renew(name)
        needed = self.pinned | set(self._staged_place.values())
        for name in [n for n, segment in self._segments.items() if not segment.live and n not in needed]:
            (self._home() / name).unlink(missing_ok=True)
            del self._segments[name]

    def flush(self) -> list[File]:
        """Write what changed; returns the files that hold every client's state, the older first."""
        for name in [name for name, segment in self._segments.items() if segment.stray]:
            self._renew(name)
        while self._changed:
            part = self._spill(self._changed, self._place)
            with uninterrupted():
                self._clean |= part
                self._bytes += sum(map(_size, part.values()))
            self._fit()
        return [segment.file for segment in self._segments.values() if segment.live]

    def restore(self, files: Iterable[File]) -> None:
        """Have the states that `flush` returned these files for; raises ValueError where they are no segments.

        Other segments in the folder, but for those that are pinned, are of a process that was killed: they go.
        """
        for file in files:
            keys = self._keys(file.name)
            clients = sorted({int(key.partition(".")[0]) for key in keys})
            for client in clients:
                self._forget(client)
                self._place[client] = file.name
            self._segments[file.name] = Segment(file, clients, len(clients))
        found = [path for path in self._home().iterdir() if NAME.fullmatch(path.name)]
        for path in found:
            if path.name in self.pinned:  # also by another checkpoint only: it goes when that one does
                self._segments.setdefault(path.name, Segment(File(path.name, 0, ""), [], 0))
            elif path.name not in self._segments:
                path.unlink()
        self._written = 1 + max((int(path.stem.rpartition("-")[2]) for path in found), default=-1)

    def _renew(self, name: str) -> None:
        """Have what counts of a segment written anew."""
        live = [client for client in self._segments[name].clients if self._place.get(client) == name]
        for client, read in self._read(name, live) if live else ():
            state = self._clean.get(client, read)
            with uninterrupted():
                self._forget(client)
                self._changed[client] = state
                self._bytes += _size(state)
            self._fit()

    def _fit(self) -> None:
        """Let go of what is on disk too, the least used first; then write what changed, and what is staged."""
        while self._bytes > self.memory:
            if self._clean:
                self._bytes -= _size(self._clean.popitem(last=False)[1])
            elif self._changed:
                self._spill(self._changed, self._place)
            elif self._staged:
                self._spill(self._staged, self._staged_place)
            else:
                break

    def _spill(self, layer: dict[int, State], place: dict[int, str]) -> dict[int, State]:
        """Move the first of a layer to a new segment."""
        part, size = dict[int, State](), 0
        for client, state in layer.items():
            part[client] = state
            size += _size(state)
            if size >= SEGMENT or len(part) == CLIENTS:
                break
        name = f"clients-{self._written:06}.safetensors"
        tensors = {f"{client}.{entry}": value for client, state in part.items() for entry, value in state.items()}
        try:
            content = save(untied_copies(tensors))
        except KeyError as error:  # a type that safetensors does not know
            raise RoundError(f"{error} cannot be written to disk, and so no client can keep it") from error
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
        for layer in (self._changed, self._clean):
            self._bytes -= _size(layer.pop(client, {}))
        if name := self._place.pop(client, None):
            self._segments[name].live -= 1

    def _read(self, name: str, clients: list[int]) -> Iterator[tuple[int, State]]:
        """What a segment has of some clients, one at a time."""
        at = f"state of client {clients[0]}"
        try:
            with safe_open(self._home() / name, "pt") as segment:
                entries: dict[int, list[str]] = {client: [] for client in clients}
                for key in sorted(segment.keys()):
                    client, _, entry = key.partition(".")
                    entries.get(int(client), []).append(entry)
                for client, names in entries.items():
                    at = f"state of client {client}"
                    if not names:
                        raise SafetensorError("is not in it")
                    with uninterrupted():  # of an interrupt in its middle torch makes an error of its own
                        state = {entry: segment.get_tensor(f"{client}.{entry}").clone() for entry in names}
                    yield client, state
        except (OSError, ValueError, SafetensorError) as error:
            raise RoundError(f"{self._home() / name}: {at}: {error}") from error

    def _keys(self, name: str) -> list[str]:
        try:
            with safe_open(self._home() / name, "pt") as segment:
                return list(segment.keys())
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{name}: {error}") from error

    def _home(self) -> Path:
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="fedsim-clients-"))
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        return self.folder


def _size(state: State) -> int:
    return sum(value.nbytes for value in state.values())
