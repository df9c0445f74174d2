"""rounds.jsonl: a line for each round, added by one process and by nobody else."""

import hashlib
import os
from pathlib import Path

from fedsim.base.files import File, naming, write
from fedsim.errors import RoundError

NAME = "rounds.jsonl"


class RoundLog:
    """rounds.jsonl of a run under way; it begins with the lines of earlier rounds, as a new file.

    A checkpoint names its length and hash. So lines that somebody else adds, cuts or replaces are an error at
    once, and not only when the run is resumed.
    """

    def __init__(self, folder: Path, content: bytes = b""):
        self.path = folder / NAME
        write(self.path, content)  # not in place: another name of the old file, as in a backup, keeps it as it is
        self._file = self.path.open("ab", buffering=0)
        self._bytes, self._digest = len(content), hashlib.sha256(content)  # of whole lines
        self._length = len(content)  # with a line of which a full disk took a part

    def add(self, line: bytes) -> None:
        """Add a line; raises OSError, and RoundError where the file is not as this process left it."""
        self._check()
        rest = line
        with naming(self.path):
            while rest:  # a full disk takes a part of it, and fails at the next write only
                taken = self._file.write(rest)
                self._length += taken
                rest = rest[taken:]
        self._bytes += len(line)
        self._digest.update(line)

    def saved(self) -> File:
        """Its length and hash so far, which is on disk then; raises RoundError as `add` does."""
        self._check()
        with naming(self.path):
            os.fsync(self._file.fileno())
        return File(NAME, self._bytes, self._digest.hexdigest())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _check(self) -> None:
        found = os.fstat(self._file.fileno())
        try:
            there = os.path.samestat(os.lstat(self.path), found)
        except OSError:
            there = False
        if not there:
            what = "was deleted or replaced"
        elif found.st_size != self._length:
            what = f"has {found.st_size} bytes, not the {self._length} that this run has written"
        else:
            return
        way = "a resume needs its lines up to a checkpoint as they were"
        raise RoundError(f"{self.path}: {what}; somebody else has changed it; {way}")
