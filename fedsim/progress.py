"""What a run shows while it goes: a bar on a terminal, a plain line a round elsewhere."""

from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedsim.types import Report


class Plain:
    """One line a round, and nothing that a log file would not keep."""

    def __init__(self, console: Console, rounds: int):
        self.console, self.rounds = console, rounds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def client(self, report: Report) -> None:
        if report.error:
            self.console.out(f"client {report.client_id} dropped: {report.error}", highlight=False)

    def round(self, record: dict[str, Any]) -> None:
        width = len(str(self.rounds))
        self.console.out(
            f"round {record['round']:>{width}}/{self.rounds}  {figures(record)}  {record['seconds']:.2f} s",
            highlight=False,
        )


class Bar(Plain):
    """A bar of rounds with the time left, and one of the clients in this round."""

    def __init__(self, console: Console, rounds: int, cohort: int):
        super().__init__(console, rounds)
        self.cohort = cohort
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=18),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[figures]}"),
            console=console,
        )
        self.by_round = self.bars.add_task("rounds ", total=rounds, figures="")
        self.by_client = self.bars.add_task("clients", total=cohort, figures="")

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bars.stop()

    def client(self, report: Report) -> None:
        super().client(report)
        self.bars.advance(self.by_client)

    def round(self, record: dict[str, Any]) -> None:
        self.bars.update(self.by_round, advance=1, figures=figures(record, short=True))
        if record["round"] < self.rounds:
            self.bars.reset(self.by_client, total=self.cohort)


def figures(record: dict[str, Any], short: bool = False) -> str:
    """Losses and accuracy, those that were measured."""
    loss = "-" if record["train_loss"] is None else f"{record['train_loss']:.4f}"
    if short:
        accuracy = f" {record['test_accuracy']:.2%}" if "test_accuracy" in record else ""
        return f"loss {loss}{accuracy}"
    parts = [f"train_loss {loss}"]
    if "test_accuracy" in record:
        parts += [f"test_loss {record['test_loss']:.4f}", f"test_accuracy {record['test_accuracy']:.2%}"]
    if "client_accuracy_mean" in record:
        parts += [f"client_accuracy {record['client_accuracy_mean']:.2%}"]
    return "  ".join(parts)
