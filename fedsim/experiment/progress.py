"""What a run shows while it goes: a bar on a terminal, a plain line a round elsewhere."""

import logging
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedsim.experiment.hook import Hook
from fedsim.experiment.run import Run
from fedsim.types import Report


class Notes(logging.Handler):
    """Prints what fedsim logs, such as which runtime it chose, an informative line once only."""

    def __init__(self, console: Console):
        super().__init__()
        self.console, self.log = console, logging.getLogger("fedsim")
        self.shown = set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        # All points of a sweep may log the same line; a warning is shown each time.
        if line not in self.shown or record.levelno > logging.INFO:
            self.shown.add(line)
            self.console.out(line, highlight=False)

    def begin(self) -> None:
        """Print from now on."""
        self.level_before = self.log.level
        self.log.addHandler(self)
        self.log.setLevel(logging.INFO)

    def end(self) -> None:
        """Stop printing, and set the level of the log back."""
        self.log.setLevel(self.level_before)
        self.log.removeHandler(self)


class Plain(Hook):
    """Prints a line for each round, in plain text that fits a log file."""

    def __init__(self, console: Console):
        super().__init__()
        self.console, self.dropped = console, set[int]()
        self.notes = Notes(console)

    def before_run(self, run: Run) -> None:
        self.notes.begin()

    def after_client(self, run: Run, report: Report) -> None:
        if report.error:
            self.drop(report.client_id, report.error)

    def after_round(self, run: Run, record: dict[str, Any]) -> None:
        self.drop_others(record)
        total = run.config.rounds
        self.console.out(
            f"round {record['round']:>{len(str(total))}}/{total}  {figures(record)}  {record['seconds']:.2f} s",
            highlight=False,
        )

    def drop(self, client: int, cause: str) -> None:
        """Print that a client was dropped."""
        self.console.out(f"client {client} dropped: {cause}", highlight=False)
        self.dropped.add(client)

    def drop_others(self, record: dict[str, Any]) -> None:
        """The same for clients whose message did not match the others', and for those that were not evaluated."""
        for client, cause in record["failed"].items():
            if int(client) not in self.dropped:
                self.drop(int(client), cause)
        for client, cause in record.get("evaluation_failed", {}).items():
            self.console.out(f"client {client} not evaluated: {cause}", highlight=False)
        self.dropped.clear()

    def after_run(self, run: Run) -> None:
        self.notes.end()


class Bar(Plain):
    """Shows a bar of rounds with the time left, and a bar of the clients in this round."""

    def before_run(self, run: Run) -> None:
        super().before_run(run)
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=18),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
        )
        done, cohort = len(run.records), len(run.simulation.sample())
        self.by_round = self.bars.add_task("rounds ", total=run.config.rounds, completed=done, figures="")
        self.by_client = self.bars.add_task("clients", total=cohort, figures="")
        self.bars.start()

    def before_round(self, run: Run) -> None:
        self.bars.reset(self.by_client, total=len(run.simulation.sample()))

    def after_client(self, run: Run, report: Report) -> None:
        super().after_client(run, report)
        self.bars.advance(self.by_client)

    def after_round(self, run: Run, record: dict[str, Any]) -> None:
        self.drop_others(record)
        self.bars.update(self.by_round, advance=1, figures=figures(record, short=True))

    def after_run(self, run: Run) -> None:
        self.bars.stop()
        super().after_run(run)


def figures(record: dict[str, Any], short: bool = False) -> str:
    """The losses and accuracies that were measured, and the strategy's metrics, in words."""
    loss = "-" if record["train_loss"] is None else f"{record['train_loss']:.4f}"
    if short:
        accuracy = f" {record['test_accuracy']:.2%}" if "test_accuracy" in record else ""
        return f"loss {loss}{accuracy}"
    parts = [f"train_loss {loss}"]
    if record["absent"]:
        parts += [f"absent {len(record['absent'])} of {len(record['cohort'])}"]
    if "test_accuracy" in record:
        test_loss = "-" if record["test_loss"] is None else f"{record['test_loss']:.4f}"
        parts += [f"test_loss {test_loss}", f"test_accuracy {record['test_accuracy']:.2%}"]
    if "client_accuracy_mean" in record:
        parts += [f"client_accuracy {record['client_accuracy_mean']:.2%}"]
    parts += [f"{name} {value:.4g}" for name, value in record.get("metrics", {}).items()]
    return "  ".join(parts)
