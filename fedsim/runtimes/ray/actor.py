"""One process of the `ray` runtime: a worker, and for each run under way the sum of what its clients sent."""

import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from ray import cloudpickle

from fedsim.errors import ConfigError, one_line
from fedsim.federated.aggregate import Aggregator, Partial
from fedsim.federated.client import Train, Work
from fedsim.runtimes.ray.packing import Packed, pack, unpack
from fedsim.runtimes.worker import Worker
from fedsim.training.precision import check_precision
from fedsim.types import Job, Report, State

P = ParamSpec("P")
R = TypeVar("R")


class Failure(NamedTuple):
    """An exception on its way to the driver, which raises it from its cause."""

    content: bytes

    def error(self) -> BaseException:
        """The exception, with its cause and where it came from."""
        error, cause, where = pickle.loads(self.content)
        error.__cause__ = cause
        (cause or error).add_note(where)
        return error  # type: ignore[no-any-return]


class Answer(NamedTuple):
    """What one client's run gave besides the sum."""

    report: Report  # without what the client keeps
    kept: Packed | None
    written: list[str]  # entries of the server's state that were written to


class Order(NamedTuple):
    """What the clients of one run have in common."""

    work: Work
    server: State
    aggregator: Aggregator
    tolerant: bool


@dataclass
class Run:
    """A run under way, and what this process has summed of it."""

    order: Order
    versions: dict[str, int]  # of the server's entries
    partial: Partial = None


def told(method: "Callable[Concatenate[Actor, P], R]") -> "Callable[Concatenate[Actor, P], R | Failure]":
    """The method with exceptions as values: Ray would wrap them, and so lose their cause."""

    @wraps(method)
    def telling(self: "Actor", /, *arguments: P.args, **named: P.kwargs) -> R | Failure:
        try:
            return method(self, *arguments, **named)
        except Exception as error:
            return _failure(error)

    return telling


class Actor:
    """Runs the clients that it is sent, one at a time, on one intra-op thread or on the GPU that Ray gives it."""

    def __init__(self) -> None:
        self.runs: dict[int, Run | Failure] = {}

    @told
    def open(self, packed: Packed, paths: list[str], folder: str, gpu: bool) -> tuple[int, str]:
        """Take network and data, with the driver's import path; returns process id and machine."""
        sys.path += [path for path in paths if path not in sys.path]
        with suppress(OSError):  # the driver's folder may not be there
            os.chdir(folder)
        torch.set_num_threads(1)
        self.device = torch.device("cuda", 0) if gpu else torch.device("cpu")
        if gpu and not torch.cuda.is_available():
            raise ConfigError(f"runtime.gpus: Ray has a GPU on {socket.gethostname()} and PyTorch sees none there")
        task, data = _imported(packed)
        self.worker = Worker(task, data.to(self.device), self.device)
        return os.getpid(), socket.gethostname()

    @told
    def check(self, packed: Packed) -> None:
        """Raise ConfigError for what cannot be imported here, and for a precision that the device lacks."""
        work: Train = _imported(packed)
        check_precision(work.recipe.precision, self.device)

    def begin(self, number: int, packed: Packed) -> None:
        """Start a run; what is wrong with its order is said to its clients."""
        try:
            order: Order = _imported(packed)
            server = {name: value.to(self.device) for name, value in order.server.items()}
            versions = {name: value._version for name, value in server.items()}
            self.runs[number] = Run(order._replace(server=server), versions)
        except Exception as error:
            self.runs[number] = _failure(error)

    @told
    def client(self, number: int, client_id: int, round: int, state: Packed | None) -> Answer | Failure:
        """Run one client, and add what it sends to the run's sum."""
        run = self.runs[number]
        if isinstance(run, Failure):
            return run
        job, order = Job(client_id, round, unpack(state) if state else {}), run.order
        run.partial, report = self.worker.run(
            order.work, order.server, job, order.aggregator, order.tolerant, run.partial
        )
        written = [name for name, value in order.server.items() if value._version != run.versions[name]]
        kept = pack(report.client) if report.client else None
        return Answer(report._replace(client={}), kept, written)

    @told
    def finish(self, number: int) -> Packed | Failure:
        """End a run; returns the sum of what its clients sent."""
        run = self.runs.pop(number)
        return run if isinstance(run, Failure) else pack(run.partial)

    def forget(self, number: int) -> None:
        """End a run of which nobody wants the sum."""
        self.runs.pop(number, None)


def _imported(packed: Packed) -> Any:
    """What was packed; raises ConfigError where a user's module is not to be found."""
    try:
        return unpack(packed)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"runtime: a Ray actor on {socket.gethostname()} cannot import what it should run "
            f"({one_line(error)}); is the module's folder on PYTHONPATH there?"
        ) from error


def _failure(error: Exception) -> Failure:
    where = f"in a Ray actor on {socket.gethostname()}:\n{''.join(traceback.format_exception(error))}"
    cause = error.__cause__ and _portable(error.__cause__)
    return Failure(cloudpickle.dumps((_portable(error), cause, where)))


def _portable(error: BaseException) -> BaseException:
    """The exception, or where it cannot be pickled and made again, its text."""
    try:
        pickle.loads(cloudpickle.dumps(error))
    except Exception:
        return RuntimeError(one_line(f"{type(error).__name__}: {error}"))
    return error
