"""Several runs as rows of one vectorized batch, in lock-step.

Each run goes through its rounds as usual, in a thread of its own, with a `RowRuntime` as its runtime. Only one
thread runs at a time, as coroutines do: a `RowRuntime` hands over what is to be computed and waits, and when all
have done so, the main thread trains all their cohorts in one call. So hooks, files and torch see no concurrency.
Ctrl-C reaches the main thread, which ends every run with a checkpoint.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from threading import Semaphore, Thread
from typing import Any, NamedTuple

from fedsim.base.catalogue import Spec
from fedsim.base.devices import one_thread
from fedsim.base.files import uninterrupted
from fedsim.data import FederatedData
from fedsim.experiment.build import build
from fedsim.experiment.config import Config
from fedsim.experiment.execute import Result
from fedsim.federated.aggregate import Aggregator
from fedsim.federated.client import Train, Work
from fedsim.federated.runtime import Call, Item, Outcomes, Results, Runtime
from fedsim.federated.simulation import Simulation
from fedsim.runtimes import RUNTIMES
from fedsim.training.task import Task
from fedsim.types import Job, State, hash_into

SERVER_SETTINGS = (  # that Simulation and experiment handle, whatever trains the clients
    *("seed", "rounds", "cohort", "availability", "evaluate", "checkpoint", "client_store"),
    *("recalibrate", "ema", "hooks"),
)


class MapCall(NamedTuple):
    """The arguments of one `Runtime.map`."""

    work: Work
    server: State
    items: list[Any]


class RowRuntime(Runtime):
    """The runtime of one of the runs that share another one, and the thread in which that run goes on."""

    exact = False

    def __init__(self, shared: Runtime, choice: Spec | None):
        self.shared, self.home, self._choice = shared, shared.home, choice
        self.request: Call | MapCall | None = None
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

    def map(self, work: Work, server: State, items: Iterable[Item]) -> Outcomes[Item]:
        yield from self._ask(MapCall(work, server, list(items)))

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

    def answer(self, answer: list[Any] | BaseException | None) -> None:
        """Return the answer in the waiting run, or raise it there, and let the run go on to its next request."""
        self._answer = answer
        with uninterrupted():
            self._go.release()
            self._back.acquire()

    def _ask(self, request: Call | MapCall) -> list[Any]:
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

    def answer(row: RowRuntime, found: list[Any] | BaseException) -> None:
        row.answer(found)
        if not row.request:
            ended(row)

    try:
        for row, execute in zip(rows, executions, strict=True):
            row.start(execute)
            if not row.request:
                ended(row)
        while waiting := [(row, row.request) for row in rows if row.request]:
            map_calls = [(row, request) for row, request in waiting if isinstance(request, MapCall)]
            for row, map_call in map_calls:
                answer(row, _map(row.shared, map_call))
            if not map_calls:
                found = _run(rows[0].shared, [request for _, request in waiting if isinstance(request, Call)])
                for (row, _), each in zip(waiting, found, strict=True):
                    answer(row, each)
    except KeyboardInterrupt:
        with suppress(KeyboardInterrupt), uninterrupted():
            for row in rows:
                while row.request:
                    row.answer(KeyboardInterrupt())
        return False
    return True


def _map(shared: Runtime, map_call: MapCall) -> list[Any] | Exception:
    try:
        return list(shared.map(*map_call))
    except Exception as error:
        return error


def _run(shared: Runtime, calls: Sequence[Call]) -> Sequence[list[Any] | Exception]:
    """An answer for each call; a client's failure is in its report, and so fails its own run only."""
    try:
        with one_thread():
            return shared.run_many(calls)
    except Exception as error:
        return [error] * len(calls)


def batch_key(config: Config) -> str:
    """The settings in which configs must agree for their clients to be rows of one batch."""
    values: dict[str, Any] = {k: v for k, v in config.model_dump(mode="json").items() if k not in SERVER_SETTINGS}
    seed = config.data["partition_seed"]  # a batch has one partition
    values["new_clients"] = config.evaluate.new_clients
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
        """The simulation of a point, with a `RowRuntime` for a runtime; raises ConfigError."""
        return build(config, self.data, self._row_runtime)

    def _row_runtime(self, task: Task, data: FederatedData) -> RowRuntime:
        hash_into(constants := hashlib.sha256(), task.constants())
        key = constants.hexdigest()
        if key not in self.shared:
            self.shared[key] = RUNTIMES.bind(self.runtime)(task, data)
        return RowRuntime(self.shared[key], RUNTIMES.resolve(self.runtime) if self.chosen else None)
