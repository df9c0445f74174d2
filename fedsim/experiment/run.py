"""A run under way: what hooks are shown."""

from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from fedsim.experiment.config import Config
from fedsim.experiment.folder import RunFolder
from fedsim.federated.simulation import Round, Simulation

Record = dict[str, Any]  # a line of rounds.jsonl


@dataclass
class Run:
    """A run under way; hooks look at it."""

    config: Config
    simulation: Simulation
    folder: RunFolder | None = None
    records: list[Record] = field(default_factory=list)  # the lines of rounds.jsonl
    earlier_seconds: float = 0.0  # that it took before it was last stopped
    notes: list[str] = field(default_factory=list)  # what the user should know before it goes on
    stopped: str | None = None  # why, where a hook or the strategy ended it
    failure: BaseException | None = None  # what else ended it early
    new_clients: Record = field(default_factory=dict)  # the evaluation of those kept out of training, at the end
    summary: Record = field(default_factory=dict)  # when it has ended
    warnings: list[str] = field(default_factory=list)  # what is missing though its results are whole

    def __post_init__(self) -> None:
        self.start_time = perf_counter()

    @property
    def before(self) -> float:
        """The old name of `earlier_seconds`, for one release."""
        return self.earlier_seconds

    @property
    def began(self) -> float:
        """The old name of `start_time`, for one release."""
        return self.start_time

    @property
    def unlogged(self) -> Round | None:
        """The last round's result, if it has no record yet."""
        return self.simulation.last if self.simulation.number > len(self.records) else None

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.unlogged is None and (self.stopped is not None or len(self.records) >= self.config.rounds)

    @property
    def seconds(self) -> float:
        """How long it has taken, before it was resumed included."""
        return self.earlier_seconds + perf_counter() - self.start_time

    def warn(self, what: str) -> None:
        """Tell, when the run has ended, that something beside its results could not be done."""
        self.warnings.append(what)

    def stop(self, why: str) -> None:
        """End the run after the round that is under way."""
        self.stopped = self.stopped or why
