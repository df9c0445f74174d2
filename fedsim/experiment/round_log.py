"""rounds.jsonl: a line for each round, added by one process and by nobody else."""

import hashlib
import os
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Lt
from pydantic import ConfigDict, FiniteFloat, StringConstraints, create_model

from fedsim.base.files import File, naming, write
from fedsim.base.reading import in_words
from fedsim.errors import RoundError
from fedsim.federated.simulation import Round
from fedsim.report.runs import parse_record
from fedsim.types import METRIC_NAME

NAME = "rounds.jsonl"
SHA256 = re.compile("[0-9a-f]{64}")
MetricName = Annotated[str, StringConstraints(pattern=f"^{METRIC_NAME.pattern}$")]
BOUNDED: dict[Any, Any] = {
    int: Annotated[int, Ge(0), Lt(2**63)],
    float: Annotated[float, Ge(0), Lt(1e300)],
    dict[str, float]: dict[MetricName, FiniteFloat],
}
FIELDS: dict[str, Any] = {
    name: (BOUNDED.get(kind, kind), Round._field_defaults.get(name, ...))
    for name, kind in Round.__annotations__.items()
}
Client = Annotated[str, StringConstraints(pattern="^[0-9]{1,18}$")]
Line: Any = create_model(
    "Line",
    __config__=ConfigDict(extra="allow", strict=True),  # tests and hooks add to it
    evaluation_failed=(dict[Client, str], {}),
    **FIELDS,
)


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


def read_rounds(content: bytes, clients: int | None) -> Iterator[dict[str, Any]]:
    """The records in whole lines of rounds.jsonl; raises ValueError that names the first line that cannot be.

    `clients` is how many there are, where that is known.
    """
    clock = 0.0
    for number, line in enumerate(BytesIO(content), 1):  # one after the other: millions may be empty
        if not line.endswith(b"\n"):
            return
        try:
            record = Line.model_validate(parse_record(line[:-1])).model_dump(exclude_unset=True)
            _check_record(record, number, clients, clock)
        except ValueError as error:
            raise ValueError(f"line {number}: {in_words(error)}") from None
        clock = record["clock"]
        yield record


def _check_record(record: dict[str, Any], number: int, clients: int | None, clock: float) -> None:
    """Raise ValueError where a round does not follow the one before it, or is of clients that there are not."""
    cohort = record["cohort"]
    if record["round"] != number:
        raise ValueError(f"is of round {record['round']}")
    if len({*cohort}) < len(cohort) or not all(k >= 0 and (clients is None or k < clients) for k in cohort):
        raise ValueError("cohort has a client twice, or one that there is not")
    if not {*record["failed"], *record["absent"]} <= {*map(str, cohort)}:
        raise ValueError("failed or absent has a client that is not in cohort")
    if clients is not None and any(int(k) >= clients for k in record.get("evaluation_failed", ())):
        raise ValueError("evaluation_failed has a client that there is not")
    if not SHA256.fullmatch(record["fingerprint"]):
        raise ValueError("fingerprint is no SHA-256")
    if record["clock"] < clock:
        raise ValueError("clock goes back")
