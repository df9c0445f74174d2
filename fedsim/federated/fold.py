"""How all runtimes process an update: an aggregator takes its message, and the simulation a report."""

from time import perf_counter

import torch
from torch import Tensor

from fedsim.errors import NodeError, RoundError, WrongReturnError, located, one_line
from fedsim.federated.aggregate import Aggregator
from fedsim.federated.positions import sent_bytes
from fedsim.types import Job, Outcome, Report, Update


class Fold:
    """Gives the messages of clients to the aggregator, one at a time; `partial` is what it has made of them."""

    def __init__(self, aggregator: Aggregator):
        self.aggregator, self.partial = aggregator, aggregator.fold([])

    def add(self, job: Job, outcome: Outcome, began: float) -> Report:
        """The report on a client that `began` at this value of perf_counter; a failed client adds nothing.

        Raises RoundError for an error that is not the fault of a single client.
        """
        if isinstance(outcome, BaseException):
            return failure(job, outcome, perf_counter() - began)
        try:
            return self._added(job, outcome, began)
        except RoundError:
            raise
        except torch.OutOfMemoryError as error:  # the sums may now contain a part of the message
            where = f"round {job.round + 1}: out of memory while adding up messages"
            raise RoundError(f"{where}; lower runtime.workers") from error
        except Exception as error:
            return failure(job, error, perf_counter() - began)

    def _added(self, job: Job, update: Update, began: float) -> Report:
        weight, metrics = update.numbers()
        client = {name: compact(value) for name, value in update.client.items()}
        size = sent_bytes(update.message)
        self.partial = self.aggregator.fold([(job.client_id, update.message, weight)], self.partial)
        return Report(job.client_id, weight, metrics, client, perf_counter() - began, size)


def failure(job: Job, error: BaseException, seconds: float) -> Report:
    """The report on a client that failed."""
    return Report(job.client_id, 0.0, {}, {}, seconds, 0, cause(error), error)


def cause(error: BaseException) -> str:
    """Why a client failed, in one line; for an error in a user's code with its file and line."""
    plain = isinstance(error, ArithmeticError | TimeoutError | NodeError | WrongReturnError)
    return one_line(error) if plain else located(error)


def compact(value: Tensor) -> Tensor:
    """The tensor on the host, without a gradient; a view of a larger tensor becomes a copy."""
    value = value.detach().cpu()
    return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
