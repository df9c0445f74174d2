"""What a sweep shows while it runs: on a terminal a bar of all its rounds, elsewhere a line for each point."""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedsim.experiment.progress import Notes
from fedsim.report.runs import read_run
from fedsim.sweep.folder import PointRun


class Plain:
    """Shows a line for each point that ends, and one for how points are run; `failures` says why points failed."""

    def __init__(self, console: Console, points: Sequence[PointRun]):
        self.console, self.points = console, {point.name: point for point in points}
        self.failures = dict[str, str]()
        self.rounds = {point.name: point.config.rounds if point.finished else 0 for point in points}
        self.over = sum(point.finished for point in points)
        self.notes = Notes(console)  # such as which runtime a point chose

    def __enter__(self) -> Self:
        self.notes.begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.notes.end()

    def say(self, line: str) -> None:
        """Show a line."""
        self.console.out(line, highlight=False)

    def at(self, name: str, rounds: int) -> None:
        """A point has done this many rounds."""
        self.rounds[name] = rounds

    def ended(self, name: str, failure: str | None) -> None:
        """A point has ended, by a failure or without."""
        self.over += 1
        count = f"{self.over:>{len(str(len(self.points)))}}/{len(self.points)}"
        if failure is None:
            self.rounds[name] = self.points[name].config.rounds
            self.say(f"{count}  {name}  {self._figures(name)}")
        else:
            self.failures[name] = failure
            self.say(f"{count}  {name}  failed: {failure}")

    def _figures(self, name: str) -> str:
        run = read_run(self.points[name].folder)
        _, accuracies = run.curve("test_accuracy")
        accuracy = f"test_accuracy {accuracies[-1]:.2%}  " if accuracies else ""
        return f"{accuracy}{len(run.rounds)} rounds  {sum(row['seconds'] for row in run.rounds):.1f} s"


class Bar(Plain):
    """The same lines above a bar of the rounds of all points, with the time left."""

    def __enter__(self) -> Self:
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=18),
            MofNCompleteColumn(),
            TextColumn("rounds"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
        )
        total = sum(point.config.rounds for point in self.points.values())
        self.bar = self.bars.add_task("", total=total)
        self._show()
        self.bars.start()
        return super().__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        self.bars.stop()

    def at(self, name: str, rounds: int) -> None:
        super().at(name, rounds)
        self._show()

    def ended(self, name: str, failure: str | None) -> None:
        super().ended(name, failure)
        self._show()

    def _show(self) -> None:
        what = f"{self.over} of {len(self.points)} points"
        self.bars.update(self.bar, completed=sum(self.rounds.values()), description=what)
