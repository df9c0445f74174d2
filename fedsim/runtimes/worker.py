"""One worker: a network, the data and a device, and one client at a time on them."""

from time import perf_counter

import torch
from torch import Tensor

from fedsim.data import FederatedData
from fedsim.errors import ClientError, NodeError, RoundError, located, one_line
from fedsim.federated.aggregate import Aggregator, Partial
from fedsim.federated.client import Work, check_message
from fedsim.runtimes.cuda import new_stream, on_stream
from fedsim.training.replica import Replica
from fedsim.training.task import Task
from fedsim.types import Job, Report, State, Update


class Worker:
    """Runs clients in turn on a replica, and on a GPU a stream, of its own. Not for two threads at once."""

    def __init__(self, task: Task, data: FederatedData, device: torch.device, *, graphs: bool = False):
        self.stream = new_stream(device)
        self.replica, self.data = Replica(task, device, graphs=graphs), data

    def run(
        self,
        work: Work,
        server: State,
        job: Job,
        aggregator: Aggregator,
        tolerant: bool,
        start: Partial | None = None,
        *,
        yields: bool = False,
    ) -> tuple[Partial, Report]:
        """`start` and what one client adds to it, and its report; raises ClientError unless `tolerant`.

        Where it `yields`, a client that runs out of memory raises torch.OutOfMemoryError, and may be run again;
        `start` is then as it was.
        """
        with on_stream(self.stream):
            return self._run(work, server, job, aggregator, tolerant, start, yields)

    def _run(
        self,
        work: Work,
        server: State,
        job: Job,
        aggregator: Aggregator,
        tolerant: bool,
        start: Partial | None,
        yields: bool,
    ) -> tuple[Partial, Report]:
        began, device = perf_counter(), self.replica.device
        try:
            if job.client:  # a copy, so that what a client spoils is its own
                job = job._replace(client={name: _sent(value, device) for name, value in job.client.items()})
            versions = {name: value._version for name, value in (job.client or {}).items()}
            update = work(self.replica, self.data, server, job)
            if written := [name for name, v in versions.items() if (job.client or {})[name]._version != v]:
                raise RuntimeError(f"client[{written[0]!r}] was written in place; states are only read")
        except (Exception, SystemExit) as error:
            if yields and isinstance(error, torch.OutOfMemoryError):
                raise
            return aggregator.fold([], start), failed(job, error, tolerant, perf_counter() - began)
        return folded(update, job, aggregator, tolerant, start, began)


def folded(
    update: Update, job: Job, aggregator: Aggregator, tolerant: bool, start: Partial | None, began: float
) -> tuple[Partial, Report]:
    """`start` and one client's update on top, and its report; raises ClientError unless `tolerant`.

    `began` is when it did, by perf_counter.
    """
    try:
        metrics = {name: float(value) for name, value in update.metrics.items()}
        weight = float(update.weight)
        check_message(update)
        partial = aggregator.fold([(job.client_id, update.message, weight)], start)
    except RoundError:  # no single client's doing
        raise
    except torch.OutOfMemoryError as error:  # which may leave sums that have a part of the message
        where = f"round {job.round + 1}: out of memory where messages are added up"
        raise RoundError(f"{where}; lower runtime.workers") from error
    except Exception as error:
        return aggregator.fold([], start), failed(job, error, tolerant, perf_counter() - began)
    client = {name: _own(value.cpu()) for name, value in update.client.items()}
    size = sum(value.nbytes for value in update.message.values())
    return partial, Report(job.client_id, weight, metrics, client, perf_counter() - began, size)


def failed(job: Job, error: BaseException, tolerant: bool, seconds: float) -> Report:
    """Its report; raises ClientError unless `tolerant`."""
    told = isinstance(error, ArithmeticError | TimeoutError | NodeError)
    cause = one_line(error) if told else located(error)
    if tolerant:
        return Report(job.client_id, 0.0, {}, {}, seconds, 0, cause)
    diverged = isinstance(error, ArithmeticError | NodeError) and ("not finite" in cause or "too large" in cause)
    advice = "; lower local.lr, or set failures.policy=drop" if diverged else ""
    raise ClientError(f"round {job.round + 1}, client {job.client_id}: {cause}{advice}") from error


def _sent(value: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, for which nobody waits."""
    if device.type == "cuda" and not value.is_cuda:
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device, copy=True)


def _own(value: Tensor) -> Tensor:
    """Without the rest of the tensor that it is a view of."""
    return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
