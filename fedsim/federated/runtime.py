"""The interface between the simulation and the runtimes, which run clients."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch

from fedsim.base.catalogue import Spec, check_methods
from fedsim.errors import ConfigError, RoundError, WrongReturnError, border, is_own, one_line
from fedsim.federated.aggregate import Aggregator, Partial
from fedsim.federated.claims import MAX_LOSS
from fedsim.federated.client import Train, Work
from fedsim.training.precision import check_precision
from fedsim.types import Job, Outcome, Report, State, Update

Item = TypeVar("Item")
Results = Generator[tuple[Partial, list[Report]], None, None]
Outcomes = Generator[tuple[Item, Outcome], None, None]


class Call(NamedTuple):
    """The arguments of one `Runtime.run`."""

    work: Work
    server: State
    jobs: Sequence[Job]
    aggregator: Aggregator


class Runtime(ABC):
    """Runs clients, one at a time or in parallel; their results do not depend on the runtime.

    A runtime computes and reports. If a client fails it reports the error; the simulation decides what follows.
    """

    elsewhere: ClassVar[bool] = False  # whether data and states of clients stay on other machines
    batches_runs: ClassVar[bool] = False  # whether `run_many` trains clients of several runs in one batch

    home: torch.device  # where the server's state is
    exact: bool = True  # whether results equal those of serial to the bit, not only up to rounding

    @property
    def workers(self) -> int:
        """How many clients run in parallel."""
        return 1

    def check(self, work: Train) -> None:
        """Raise ConfigError, with the name of the setting, if the runtime cannot do this training."""
        check_precision(work.recipe.precision, self.home)

    @abstractmethod
    def run(self, work: Work, server: State, jobs: Iterable[Job], aggregator: Aggregator) -> Results:
        """Yield partial sums to merge, and a report on each client, as clients finish, in any order.

        Raises RoundError for an error that is not the fault of a single client.
        """

    @abstractmethod
    def map(self, work: Work, server: State, items: Iterable[Item]) -> Outcomes[Item]:
        """The result of `work` for each item, or the error it raised; in any order. Nothing is added up."""

    def run_many(self, calls: Sequence[Call]) -> list[list[tuple[Partial, list[Report]]]]:
        """The list of what `run` yields, for each call."""
        return [list(self.run(*call)) for call in calls]

    def close(self) -> None:  # noqa: B027 - most runtimes start no processes
        """End the processes that the runtime has started; the next run starts new ones."""

    @property
    def choice(self) -> Spec | None:
        """The runtime that was chosen, for checkpoints; None if there is nothing to choose, or no choice yet."""
        return None

    def restore_choice(self, choice: Spec, work: Train) -> bool:
        """Use the `choice` of a checkpoint; returns whether it is used. Raises ConfigError if it cannot be."""
        return False

    def placeholder_state(self, initial: State) -> State:
        """The state of a client that has not taken part: `initial`, or a placeholder if clients keep states."""
        return initial

    def checkpointed_rounds(self, rounds: list[int]) -> None:  # noqa: B027 - most runtimes need no action
        """Called with the rounds of all checkpoints, to which the run may go back."""


def check_runtime(runtime: object) -> None:
    """Raise ConfigError unless it is a Runtime that has a home, whose methods can be called."""
    name = type(runtime).__name__
    if not isinstance(runtime, Runtime):
        raise ConfigError(f"runtime: {runtime!r} is no Runtime")
    check_methods(runtime, Runtime, "runtime")
    if not isinstance(getattr(runtime, "home", None), torch.device):
        raise ConfigError(f'runtime: {name} has no home; its __init__ should set self.home = torch.device("cpu")')


def results(runtime: Runtime, *arguments: Any) -> Results:
    """What `run` of a runtime yields; faults of a user's own runtime become RoundErrors."""
    return _pairs(runtime, "run", arguments, lambda reports: all(map(_can_be_added, reports)))


def _can_be_added(report: object) -> bool:
    """Whether it is a Report with sums of which there is a sum."""
    return isinstance(report, Report) and all(abs(value) <= MAX_LOSS for value in report.metrics.values())


def outcomes(runtime: Runtime, *arguments: Any) -> Generator[tuple[Any, Outcome], None, None]:
    """What `map` of a runtime yields; faults of a user's own runtime become RoundErrors."""
    return _pairs(runtime, "map", arguments, lambda outcome: isinstance(outcome, Update | BaseException))


def _pairs(
    runtime: Runtime, method: str, arguments: tuple[Any, ...], right: Callable[[Any], bool]
) -> Generator[tuple[Any, Any], None, None]:
    own, whose = is_own(runtime), _whose(runtime, method)
    end: Any = object()
    with border(whose, RoundError, lambda error: not own):
        pairs: Iterator[Any] = iter(getattr(runtime, method)(*arguments))
    with closing(pairs) if isinstance(pairs, Generator) else nullcontext():
        while True:
            with border(whose, RoundError, lambda error: not own):
                pair = next(pairs, end)
                if pair is end:
                    return
                if own and not (isinstance(pair, tuple) and len(pair) == 2 and right(pair[1])):
                    raise WrongReturnError(
                        f"gave {one_line(repr(pair))}; fedsim's serial shows what it should yield"
                    )
            yield pair


def close(runtime: Runtime) -> None:
    """End the processes of a runtime; faults of a user's own runtime become RoundErrors."""
    with border(_whose(runtime, "close"), RoundError, lambda error: not is_own(runtime)):
        runtime.close()


def check_once(runtime: Runtime, method: str, what: str, done: Sequence[int], asked: Sequence[int]) -> None:
    """Raise RoundError unless a runtime has run each item that it was asked to, and none twice."""
    missing, more = Counter(asked) - Counter(done), Counter(done) - Counter(asked)
    if missing or more:
        item = min(missing or more)
        how = "left out" if missing else "ran too often" if item in asked else "ran, unasked,"
        raise RoundError(f"{_whose(runtime, method)} {how} {what} {item}; it should run each once")


def _whose(runtime: Runtime, method: str) -> str:
    return f"runtime: {type(runtime).__name__}.{method}"
