"""Where clients run, as the simulation sees it."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import ClassVar, NamedTuple, TypeVar

import torch

from fedsim.base.catalogue import Spec
from fedsim.federated.aggregate import Aggregator, Partial
from fedsim.federated.client import Train, Work
from fedsim.training.precision import check_precision
from fedsim.types import Job, Report, State, Update

Item = TypeVar("Item")
Results = Generator[tuple[Partial, list[Report]], None, None]


class Call(NamedTuple):
    """The arguments of one `Runtime.run`."""

    work: Work
    server: State
    jobs: Sequence[Job]
    aggregator: Aggregator


class Runtime(ABC):
    """Runs clients one at a time or side by side; what they compute does not depend on it.

    A runtime computes and reports, and decides nothing: a client that fails is reported with its error.
    """

    elsewhere: ClassVar[bool] = False  # whether clients hold their data, and keep their states, on other machines
    batches_runs: ClassVar[bool] = False  # whether `run_many` trains the clients of several runs as one batch

    home: torch.device  # of the server's state
    exact: bool = True  # whether results equal serial's to the bit, and not only to rounding

    @property
    def workers(self) -> int:
        """How many clients run side by side."""
        return 1

    def check(self, work: Train) -> None:
        """Raise ConfigError, naming the setting, where the runtime cannot train like that."""
        check_precision(work.recipe.precision, self.home)

    @abstractmethod
    def run(self, work: Work, server: State, jobs: Iterable[Job], aggregator: Aggregator) -> Results:
        """Yield, as clients finish and in any order, partial sums to merge and a report on each client.

        Raises RoundError for what is no single client's doing.
        """

    @abstractmethod
    def map(
        self, work: Work, server: State, items: Iterable[Item]
    ) -> Iterator[tuple[Item, Update | BaseException]]:
        """What `work` gives for each item, or the error it ended with; in any order, and nothing is added up."""

    def run_many(self, calls: Sequence[Call]) -> list[list[tuple[Partial, list[Report]]]]:
        """What `run` yields for each call."""
        return [list(self.run(*call)) for call in calls]

    def close(self) -> None:  # noqa: B027 - most have none
        """End the processes that the runtime has started; its next run starts others."""

    @property
    def choice(self) -> Spec | None:
        """What a checkpoint has to know to go on in the same way, once it is known."""
        return None

    def restore_choice(self, choice: Spec, work: Train) -> bool:
        """Whether the runtime goes on as `choice` of a checkpoint says; raises ConfigError where it cannot."""
        return False

    def placeholder_state(self, initial: State) -> State:
        """What the server keeps for a client that has not taken part: its `initial` state, if it keeps states."""
        return initial

    def checkpointed_rounds(self, rounds: list[int]) -> None:  # noqa: B027 - most need not
        """Know after which rounds there are checkpoints, to which the run may go back."""
