"""Several runs as rows of one vectorized batch, in lock-step.

Each run goes through its rounds as usual, in a thread of its own, with a `RowRuntime` as its runtime. Only one
thread runs at a time, as coroutines do: a `RowRuntime` hands over what is to be computed and waits, and when all
have done so, the main thread trains all their cohorts in one call. So hooks, files and torch see no concurrency.
Ctrl-C reaches the main thread, which ends every run with a checkpoint.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from threading import Semaphore, Thread
from typing import Any, NamedTuple, Protocol

from fedsim.base.catalogue import Spec
from fedsim.base.devices import one_thread
from fedsim.base.files import uninterrupted
from fedsim.data import FederatedData
from fedsim.errors import ClientError
from fedsim.experiment.build import build
from fedsim.experiment.config import Config
from fedsim.experiment.execute import Result
from fedsim.federated.aggregate import Aggregator, Partial
from fedsim.federated.client import Train, Work
from fedsim.federated.simulation import Simulation
from fedsim.runtimes import RUNTIMES, Runtime
from fedsim.runtimes.vectorized import Call
from fedsim.training.task import Task
from fedsim.types import Job, Report, State, hash_into

Results = list[tuple[Partial, list[Report]]]
SERVER_SETTINGS = (  # that Simulation and experiment handle, whatever trains the clients
    *("seed", "rounds", "cohort", "availability", "evaluate", "checkpoint", "client_store"),
    *("recalibrate", "ema", "hooks"),
)


class Request(NamedTuple):
    """What a run wants computed: the arguments of `Runtime.run`."""

    work: Work
    server: State
    jobs: list[Job]
    aggregator: Aggregator
    tolerant: bool


class Shared(Runtime, Protocol):
    """A runtime that trains the cohorts of several runs at once."""

    def run_many(self, calls: Sequence[Call]) -> list[Results]:
        """Of each call what `run` yields; calls that differ only in seed, server and recipe.lr make one batch."""


class RowRuntime:
    """The runtime of one of the runs that share another one, and the thread in which that run goes on."""

    exact = False

    def __init__(self, shared: Shared, choice: Spec | None):
        self.shared, self.home = shared, shared.home
        self.choice = choice  # for the checkpoint
        self.request: Request | None = None
        self.result: Result | None = None
        self.error: BaseException | None = None
        self._answer: Results | BaseException | None = None
        self._go, self._back = Semaphore(0), Semaphore(0)

    @property
    def workers(self) -> int:
        """As the shared runtime."""
        return self.shared.workers

    def check(self, work: Train) -> None:
        self.shared.check(work)

    def run(
        self,
        work: Work,
        server: State,
        jobs: Iterable[Job],
        aggregator: Aggregator,
        *,
        tolerant: bool = False,
    ) -> Iterator[tuple[Partial, list[Report]]]:
        request = Request(work, server, list(jobs), aggregator, tolerant)
        for partial, reports in self._ask(request):
            for report in reports if isinstance(work, Train) and not tolerant else ():
                if report.error is not None:
                    number = request.jobs[0].round + 1
                    raise ClientError(f"round {number}, client {report.client_id}: {report.error}")
            yield partial, reports

    def start(self, execute: Callable[[], Result]) -> None:
        """Let the run go on until it requests something, or has ended."""

        def lead() -> None:
            self._go.acquire()
            try:
                self.result = execute()
            except BaseException as error:
                self.error = error
            finally:
                self.request = None
                self._back.release()

        Thread(target=lead, daemon=True).start()
        self.answer(None)

    def answer(self, answer: Results | BaseException | None) -> None:
        """Return the answer in the waiting run, or raise it there, and let the run go on to its next request."""
        self._answer = answer
        with uninterrupted():
            self._go.release()
            self._back.acquire()

    def _ask(self, request: Request) -> Results:
        self.request = request
        self._back.release()
        self._go.acquire()
        answer, self._answer = self._answer, None
        if isinstance(answer, BaseException):
            raise answer
        return answer or []


def train_together(
    rows: Sequence[RowRuntime], executions: Sequence[Callable[[], Result]], ended: Callable[[RowRuntime], None]
) -> bool:
    """Run all to their ends, calling `ended` for each; False where an interrupt ended them before."""

    def answer(row: RowRuntime, found: Results | BaseException) -> None:
        row.answer(found)
        if not row.request:
            ended(row)

    try:
        for row, execute in zip(rows, executions, strict=True):
            row.start(execute)
            if not row.request:
                ended(row)
        while waiting := [(row, row.request) for row in rows if row.request]:
            tests = [(row, request) for row, request in waiting if not isinstance(request.work, Train)]
            for row, request in tests:
                answer(row, _test(row.shared, request))
            if not tests:
                found = _train(rows[0].shared, [request for _, request in waiting])
                for (row, _), each in zip(waiting, found, strict=True):
                    answer(row, each)
    except KeyboardInterrupt:
        with suppress(KeyboardInterrupt), uninterrupted():
            for row in rows:
                while row.request:
                    row.answer(KeyboardInterrupt())
        return False
    return True


def _test(shared: Shared, request: Request) -> Results | Exception:
    try:
        return list(shared.run(*request[:-1], tolerant=request.tolerant))
    except Exception as error:
        return error


def _train(shared: Shared, all_requests: Sequence[Request]) -> Sequence[Results | Exception]:
    """An answer for each request; a client's failure is in its report, and so fails its own run only."""
    calls = [
        Call(request.work, *request[1:-1], tolerant=True)
        for request in all_requests
        if isinstance(request.work, Train)
    ]
    try:
        with one_thread():
            return shared.run_many(calls)
    except Exception as error:
        return [error] * len(all_requests)


def batch_key(config: Config) -> str:
    """The settings in which configs must agree for their clients to be rows of one batch."""
    values: dict[str, Any] = {k: v for k, v in config.model_dump(mode="json").items() if k not in SERVER_SETTINGS}
    seed = config.data["partition_seed"]  # a batch has one partition
    values["data"] = config.data | {"partition_seed": config.seed if seed is None else seed}
    values["local"] = {key: value for key, value in config.local.items() if key != "lr"}
    return json.dumps(values, sort_keys=True)


class Batch:
    """Makes simulations that share a runtime, the data and its division.

    `runtime` is one of RUNTIMES, and was `chosen` where the config names another, `auto`.
    """

    def __init__(self, runtime: Spec, data: FederatedData, chosen: bool):
        self.runtime, self.data, self.chosen = runtime, data, chosen
        self.shared = dict[str, Shared]()  # by the constants of its networks

    def make(self, config: Config) -> Simulation:
        """The simulation of a point, with a `RowRuntime` for a runtime; raises ConfigError."""
        return build(config, self.data, self._row_runtime)

    def _row_runtime(self, task: Task, data: FederatedData) -> RowRuntime:
        hash_into(constants := hashlib.sha256(), task.constants())
        key = constants.hexdigest()
        if key not in self.shared:
            self.shared[key] = RUNTIMES.bind(self.runtime)(task, data)
        return RowRuntime(self.shared[key], RUNTIMES.resolve(self.runtime) if self.chosen else None)
