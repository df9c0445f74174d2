"""One process of the `ray` runtime: a worker, and for each running `run` the sum of its clients' messages."""

import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from time import perf_counter
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from ray import cloudpickle

from fedsim.errors import ConfigError, one_line
from fedsim.federated.aggregate import Aggregator
from fedsim.federated.client import Train, Work
from fedsim.federated.fold import Fold
from fedsim.runtimes.ray.packing import Packed, pack, unpack
from fedsim.runtimes.worker import Worker
from fedsim.training.precision import check_precision
from fedsim.types import Job, Report, State

P = ParamSpec("P")
R = TypeVar("R")


class Failure(NamedTuple):
    """A pickled exception for the driver, with its cause."""

    content: bytes

    def error(self) -> BaseException:
        """The exception, with its cause and a note on where it was raised."""
        error, cause, where = pickle.loads(self.content)
        error.__cause__ = cause
        (cause or error).add_note(where)
        return error  # type: ignore[no-any-return]


class Answer(NamedTuple):
    """The result of one item: a report if messages are added up, or else the update."""

    seconds: float
    report: Report | None  # without the client's state and exception
    client: Packed | None  # the client's state
    update: Packed | None
    failure: Failure | None


class Order(NamedTuple):
    """The data that all items of one `run` or `map` share; `map` has no aggregator."""

    work: Work
    server: State
    aggregator: Aggregator | None


@dataclass
class Execution:
    """An order that is being executed, and the sum of the messages of this process's clients."""

    order: Order
    fold: Fold | None


def failures_returned(
    method: "Callable[Concatenate[Actor, P], R]",
) -> "Callable[Concatenate[Actor, P], R | Failure]":
    """The method, which returns exceptions instead of raising them: Ray would wrap them and lose their cause."""

    @wraps(method)
    def returning(self: "Actor", /, *arguments: P.args, **named: P.kwargs) -> R | Failure:
        try:
            return method(self, *arguments, **named)
        except Exception as error:
            return _failure(error)

    return returning


class Actor:
    """Runs clients one at a time, with one intra-op thread or on the GPU that Ray assigns to it."""

    def __init__(self) -> None:
        self.executions: dict[int, Execution | Failure] = {}

    @failures_returned
    def open(self, packed: Packed, paths: list[str], folder: str, gpu: bool) -> tuple[int, str]:
        """Load network and data, and use the driver's import path; returns process id and host name."""
        sys.path += [path for path in paths if path not in sys.path]
        with suppress(OSError):  # the driver's folder may not exist here
            os.chdir(folder)
        torch.set_num_threads(1)
        self.device = torch.device("cuda", 0) if gpu else torch.device("cpu")
        if gpu and not torch.cuda.is_available():
            raise ConfigError(
                f"runtime.gpus: Ray has a GPU on {socket.gethostname()}, but PyTorch finds none there"
            )
        task, data = _imported(packed)
        self.worker = Worker(task, data.to(self.device), self.device)
        return os.getpid(), socket.gethostname()

    @failures_returned
    def check(self, packed: Packed) -> None:
        """Raise ConfigError if modules cannot be imported here, or the device cannot train in the precision."""
        work: Train = _imported(packed)
        check_precision(work.recipe.precision, self.device)

    def begin(self, number: int, packed: Packed) -> None:
        """Start an order; if it cannot be unpacked, each of its items returns that error."""
        try:
            order: Order = _imported(packed)
            server = {name: value.to(self.device) for name, value in order.server.items()}
            fold = Fold(order.aggregator) if order.aggregator else None
            self.executions[number] = Execution(order._replace(server=server), fold)
        except Exception as error:
            self.executions[number] = _failure(error)

    @failures_returned
    def work(self, number: int, item: Any, client: Packed | None) -> Answer | Failure:
        """Run one item, and add its message to the sum."""
        execution = self.executions[number]
        if isinstance(execution, Failure):
            return execution
        if isinstance(item, Job):
            item = item._replace(client=unpack(client) if client else {})
        began, order = perf_counter(), execution.order
        outcome = self.worker.run(order.work, order.server, item)
        if execution.fold is None:
            if isinstance(outcome, BaseException):
                return Answer(perf_counter() - began, None, None, None, _failure(outcome))
            return Answer(perf_counter() - began, None, None, pack(outcome), None)
        report = execution.fold.add(item, outcome, began)
        failure = _failure(report.exception) if report.exception else None
        client = pack(report.client) if report.client else None
        return Answer(report.seconds, report._replace(client={}, exception=None), client, None, failure)

    @failures_returned
    def finish(self, number: int) -> Packed | Failure:
        """End a `run`; returns the sum of its clients' messages."""
        execution = self.executions.pop(number)
        if isinstance(execution, Failure):
            return execution
        assert execution.fold
        return pack(execution.fold.partial)

    def forget(self, number: int) -> None:
        """End an order without its sum."""
        self.executions.pop(number, None)


def _imported(packed: Packed) -> Any:
    """The unpacked object; raises ConfigError if a user's module cannot be found."""
    try:
        return unpack(packed)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"runtime: a Ray actor on {socket.gethostname()} cannot import the code it should run "
            f"({one_line(error)}); is the module's folder on PYTHONPATH there?"
        ) from error


def _failure(error: BaseException) -> Failure:
    where = f"in a Ray actor on {socket.gethostname()}:\n{''.join(traceback.format_exception(error))}"
    cause = error.__cause__ and _portable(error.__cause__)
    return Failure(cloudpickle.dumps((_portable(error), cause, where)))


def _portable(error: BaseException) -> BaseException:
    """The exception, or one with the same text if it cannot be pickled and unpickled."""
    try:
        pickle.loads(cloudpickle.dumps(error))
    except Exception:
        return RuntimeError(one_line(f"{type(error).__name__}: {error}"))
    return error
