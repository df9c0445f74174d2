"""Several runs as rows of one vectorized batch, in lock-step.

Each run goes through its rounds as ever, in a thread of its own, with a `Member` for a runtime. Only one thread
goes on at a time, as coroutines do: a member hands over what is to be computed and waits, and when all have, the
main thread trains all their cohorts in one call. So hooks, files and torch see no concurrency, and Ctrl-C reaches
the main thread, which has every run end with a checkpoint.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from threading import Semaphore, Thread
from typing import Any, NamedTuple

from fedsim.base.catalogue import Spec
from fedsim.base.devices import one_thread
from fedsim.base.files import uninterrupted
from fedsim.data import FederatedData
from fedsim.experiment.build import build
from fedsim.experiment.config import Config
from fedsim.experiment.run import Result
from fedsim.federated.aggregate import Aggregator
from fedsim.federated.client import Train, Work
from fedsim.federated.runtime import Call, Item, Results, Runtime
from fedsim.federated.simulation import Simulation
from fedsim.runtimes import RUNTIMES
from fedsim.training.task import Task
from fedsim.types import Job, State, Update, hash_into

OUTSIDE = (  # of the settings, those that Simulation and experiment see to, whatever trains the clients
    *("seed", "rounds", "cohort", "availability", "evaluate", "checkpoint", "client_store"),
    *("recalibrate", "ema", "hooks"),
)


class Mapping(NamedTuple):
    """The arguments of one `Runtime.map`."""

    work: Work
    server: State
    items: list[Any]


class Member(Runtime):
    """The runtime of one of several runs that share another; the run's thread, too."""

    exact = False

    def __init__(self, shared: Runtime, choice: Spec | None):
        self.shared, self.home, self._choice = shared, shared.home, choice
        self.wanted: Call | Mapping | None = None
        self.result: Result | None = None
        self.error: BaseException | None = None
        self._answer: list[Any] | BaseException | None = None
        self._go, self._back = Semaphore(0), Semaphore(0)

    @property
    def workers(self) -> int:
        return self.shared.workers

    @property
    def choice(self) -> Spec | None:
        return self._choice

    def check(self, work: Train) -> None:
        self.shared.check(work)

    def run(self, work: Work, server: State, jobs: Iterable[Job], aggregator: Aggregator) -> Results:
        yield from self._ask(Call(work, server, list(jobs), aggregator))

    def map(
        self, work: Work, server: State, items: Iterable[Item]
    ) -> Iterator[tuple[Item, Update | BaseException]]:
        yield from self._ask(Mapping(work, server, list(items)))

    def start(self, execute: Callable[[], Result]) -> None:
        """Let the run go until it wants something computed, or has ended."""

        def lead() -> None:
            self._go.acquire()
            try:
                self.result = execute()
            except BaseException as error:
                self.error = error
            finally:
                self.wanted = None
                self._back.release()

        Thread(target=lead, daemon=True).start()
        self.answer(None)

    def answer(self, answer: list[Any] | BaseException | None) -> None:
        """Give the run what it waits for, or raise that in it, and let it go on until it wants the next."""
        self._answer = answer
        with uninterrupted():
            self._go.release()
            self._back.acquire()

    def _ask(self, wanted: Call | Mapping) -> list[Any]:
        self.wanted = wanted
        self._back.release()
        self._go.acquire()
        answer, self._answer = self._answer, None
        if isinstance(answer, BaseException):
            raise answer
        return answer or []


def train_together(
    members: Sequence[Member], executions: Sequence[Callable[[], Result]], ended: Callable[[Member], None]
) -> bool:
    """Run all to their ends, telling of each that has; False where an interrupt ended them before."""

    def answer(member: Member, found: list[Any] | BaseException) -> None:
        member.answer(found)
        if not member.wanted:
            ended(member)

    try:
        for member, execute in zip(members, executions, strict=True):
            member.start(execute)
            if not member.wanted:
                ended(member)
        while waiting := [(member, member.wanted) for member in members if member.wanted]:
            mappings = [(member, wanted) for member, wanted in waiting if isinstance(wanted, Mapping)]
            for member, mapping in mappings:
                answer(member, _map(member.shared, mapping))
            if not mappings:
                found = _run(members[0].shared, [wanted for _, wanted in waiting if isinstance(wanted, Call)])
                for (member, _), each in zip(waiting, found, strict=True):
                    answer(member, each)
    except KeyboardInterrupt:
        with suppress(KeyboardInterrupt), uninterrupted():
            for member in members:
                while member.wanted:
                    member.answer(KeyboardInterrupt())
        return False
    return True


def _map(shared: Runtime, mapping: Mapping) -> list[Any] | Exception:
    try:
        return list(shared.map(*mapping))
    except Exception as error:
        return error


def _run(shared: Runtime, calls: Sequence[Call]) -> Sequence[list[Any] | Exception]:
    """One answer a member. A client that fails is reported, and fails its own run alone."""
    try:
        with one_thread():
            return shared.run_many(calls)
    except Exception as error:
        return [error] * len(calls)


def program(config: Config) -> str:
    """What two configs have in common whose clients can be rows of one batch."""
    values: dict[str, Any] = {k: v for k, v in config.model_dump(mode="json").items() if k not in OUTSIDE}
    seed = config.data["partition_seed"]  # of the partition, which a batch has one of
    values["data"] = config.data | {"partition_seed": config.seed if seed is None else seed}
    values["local"] = {key: value for key, value in config.local.items() if key != "lr"}
    return json.dumps(values, sort_keys=True)


class Batch:
    """Makes simulations that share a runtime, the data and its division.

    `runtime` is one of RUNTIMES, and was `chosen` where the config names another, `auto`.
    """

    def __init__(self, runtime: Spec, data: FederatedData, chosen: bool):
        self.runtime, self.data, self.chosen = runtime, data, chosen
        self.shared = dict[str, Runtime]()  # by the constants of its networks

    def make(self, config: Config) -> Simulation:
        """The simulation of a point, with a `Member` for a runtime; raises ConfigError."""
        return build(config, self.data, self._member)

    def _member(self, task: Task, data: FederatedData) -> Member:
        hash_into(constants := hashlib.sha256(), task.constants())
        key = constants.hexdigest()
        if key not in self.shared:
            self.shared[key] = RUNTIMES.bind(self.runtime)(task, data)
        return Member(self.shared[key], RUNTIMES.resolve(self.runtime) if self.chosen else None)
