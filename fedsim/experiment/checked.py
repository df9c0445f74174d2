"""What was found in a folder: its parts, a verdict in a line, what to do next, and a table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich import box
from rich.table import Table
from rich.text import Text

from fedsim.errors import printable
from fedsim.experiment.folder import CHECKPOINTS, CONFIG, EMA, MODEL, PARTITION, SUMMARY
from fedsim.report.runs import WIDTH

Numbers = Mapping[str, int]
RunState = Literal["finished", "interrupted", "killed", "running"]  # interrupted: ended early, with all saved
PartState = Literal["whole", "missing", "broken", "unusable", "left over", "not checked", "not written"]
MAX_NAMED = 3  # faults that a line names
PICTURE, EVENTS = "curves.png", "tensorboard/"  # of hooks
OTHER_STRATEGY = "other settings of the strategy, and --force, make it longer"
REWRITTEN = PARTITION, MODEL, EMA, PICTURE, EVENTS, SUMMARY  # by each resume, even if all rounds are done


@dataclass(frozen=True)
class Part:
    """A file or folder of a run: what it holds, or what is wrong with it."""

    name: str
    state: PartState
    about: str = ""
    numbers: Numbers = field(default_factory=dict)  # those in `about`
    spare: bool = False  # whether the run does without it

    @property
    def damaged(self) -> bool:
        """Whether it is not as it was written. What could only not be compared with such a part is not."""
        return self.state in ("missing", "broken")


@dataclass(frozen=True)
class Checked:
    """A folder as it was found."""

    folder: Path
    state: RunState
    parts: list[Part]

    @property
    def faults(self) -> list[Part]:
        """What is damaged and needed."""
        return [part for part in self.parts if part.damaged and not part.spare]

    @property
    def spares(self) -> list[Part]:
        """What is damaged, and the run does without."""
        return [part for part in self.parts if part.damaged and part.spare]

    @property
    def verdict(self) -> str:
        """All of it in a line."""
        if self.faults:
            return f"broken: {_listed(self.faults)}"
        if self.spares:
            return f"usable: {self.extent}, {self.state}; {_listed(self.spares)}, and not needed"
        return f"whole: {self.extent}, {self.state}"

    @property
    def extent(self) -> str:
        """How much there is, in words."""
        return f"{len(self.parts)} parts"

    @property
    def next(self) -> str:
        """What a person should do now, in a line."""
        if self.faults:
            first = self.folder / self.faults[0].name
            if (first / CONFIG).exists():
                return f"fedsim check {first} says more"
            copy = f"copy {first.name} again from where the sweep was"
            return copy if first.suffix == ".yaml" else f"{copy}; or fedsim resume {self.folder}"
        return "nothing" if self.state in ("finished", "running") else f"fedsim resume {self.folder} goes on"


@dataclass(frozen=True)
class CheckedRun(Checked):
    """A run's folder as it was found."""

    rounds: int
    planned: int | None  # rounds, by the config
    over: bool  # whether there are no rounds left: they are done, or a hook ended the run
    resumable: list[int]  # the rounds after which `fedsim resume` can go on, the last one first
    ended_by_strategy: bool = False

    @property
    def extent(self) -> str:
        of = "" if self.state == "finished" or self.planned is None else f" of {self.planned}"
        return f"{self.rounds}{of} rounds"

    @property
    def next(self) -> str:
        if self.state == "running":
            return "nothing; it is running"
        names, way = [part.name for part in self.faults], self._way_on()
        if not names:
            return f"nothing is needed; {way}" if self.state == "finished" else way
        more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        return f"copy {', '.join(names[:MAX_NAMED])}{more} again from where the run was; without that, {way}"

    def _way_on(self) -> str:
        """What a resume does, in words."""
        resume, done = f"fedsim resume {self.folder}", self.resumable[:1]
        if any(part.name == CONFIG for part in self.faults):
            return "it cannot be resumed as it is"
        if not (done or any(part.name.startswith(CHECKPOINTS) for part in self.parts)) and self.state == "killed":
            return f"{resume} starts with round 1"
        if not done:
            again = "" if self.state == "finished" else f"; fedsim run {self.folder / CONFIG} trains again"
            return f"it cannot be resumed: no checkpoint can be used{again}"
        if done[0] < self.rounds or not self.over:
            return f"{resume} continues after round {done[0]}"
        if rewritten := [part.name for part in self.parts if part.damaged and part.name in REWRITTEN]:
            return f"{resume} writes {', '.join(rewritten)} anew"
        if self.state != "finished":
            return f"{resume} writes its summary"
        return OTHER_STRATEGY if self.ended_by_strategy else f"{resume} rounds=N makes it longer"


def _listed(parts: list[Part]) -> str:
    """What is wrong with parts, in words."""
    more = f"; and {len(parts) - MAX_NAMED} more" if len(parts) > MAX_NAMED else ""
    return "; ".join(f"{part.name} is {part.state}" for part in parts[:MAX_NAMED]) + more


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
