"""What was found in a folder: its parts, a verdict in a line, and a table."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich import box
from rich.table import Table
from rich.text import Text

from fedsim.errors import printable
from fedsim.report.runs import WIDTH

RunState = Literal["finished", "interrupted", "killed", "running"]  # interrupted: ended early, with all saved


@dataclass(frozen=True)
class Part:
    """A file or folder of a run: what it holds, or what is wrong with it."""

    name: str
    state: Literal["whole", "missing", "broken", "left over", "not checked"]
    about: str = ""


@dataclass(frozen=True)
class Checked:
    """A folder as it was found."""

    folder: Path
    state: RunState
    parts: list[Part]

    @property
    def faults(self) -> list[Part]:
        """What is broken, or missing where it should be."""
        return [part for part in self.parts if part.state in ("missing", "broken")]

    @property
    def verdict(self) -> str:
        """All of it in a line."""
        if not (faults := [f"{part.name} is {part.state}" for part in self.faults]):
            return f"whole: {self.extent}, {self.state}{self.way_on}"
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        return f"broken: {'; '.join(faults[:3])}{more}{self.way_on}"

    @property
    def extent(self) -> str:
        """How much there is, in words."""
        return f"{len(self.parts)} parts"

    @property
    def way_on(self) -> str:
        """How it can go on, in words."""
        return ""


@dataclass(frozen=True)
class CheckedRun(Checked):
    """A run's folder as it was found."""

    rounds: int
    planned: int | None  # rounds, by the config
    resumable: list[int]  # the rounds after which it can go on, the last one first

    @property
    def extent(self) -> str:
        of = "" if self.state == "finished" or self.planned is None else f" of {self.planned}"
        return f"{self.rounds}{of} rounds"

    @property
    def way_on(self) -> str:
        if self.state == "running":
            return ""
        if not self.resumable:
            return "; has no whole checkpoint"
        return f"; can be resumed after round {self.resumable[0]}"


def parts_table(found: Checked) -> Table:
    """A row for each part, 80 columns wide."""
    table = Table(width=WIDTH, box=box.SIMPLE_HEAD)
    table.add_column("part", max_width=WIDTH // 2, overflow="fold")
    table.add_column("state", no_wrap=True)
    table.add_column("what", ratio=1, overflow="fold")
    for part in found.parts:
        bold = "bold" if part in found.faults else ""
        table.add_row(Text(printable(part.name)), Text(part.state, bold), Text(printable(part.about)))
    return table
