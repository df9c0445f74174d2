"""What becomes of each client's update: a sum that all runtimes make in the same way, and a report."""

from time import perf_counter

import torch
from torch import Tensor

from fedsim.errors import NodeError, RoundError, located, one_line
from fedsim.federated.aggregate import Aggregator
from fedsim.federated.client import check_message
from fedsim.types import Job, Report, Update


class Fold:
    """Adds up what clients send, one at a time, and forgets it; `partial` is the sum so far."""

    def __init__(self, aggregator: Aggregator):
        self.aggregator, self.partial = aggregator, aggregator.fold([])

    def add(self, job: Job, outcome: Update | BaseException, began: float) -> Report:
        """The report on a client that `began` at that perf_counter; what failed adds nothing.

        Raises RoundError for what is no single client's doing.
        """
        if not isinstance(outcome, BaseException):
            try:
                return self._added(job, outcome, began)
            except RoundError:
                raise
            except torch.OutOfMemoryError as error:  # which may leave sums that have a part of the message
                where = f"round {job.round + 1}: out of memory where messages are added up"
                raise RoundError(f"{where}; lower runtime.workers") from error
            except Exception as error:
                outcome = error
        return failure(job, outcome, perf_counter() - began)

    def _added(self, job: Job, update: Update, began: float) -> Report:
        metrics = {name: float(value) for name, value in update.metrics.items()}
        weight = float(update.weight)
        check_message(update)
        self.partial = self.aggregator.fold([(job.client_id, update.message, weight)], self.partial)
        client = {name: compact(value) for name, value in update.client.items()}
        size = sum(value.nbytes for value in update.message.values())
        return Report(job.client_id, weight, metrics, client, perf_counter() - began, size)


def failure(job: Job, error: BaseException, seconds: float) -> Report:
    """The report on a client that failed."""
    return Report(job.client_id, 0.0, {}, {}, seconds, 0, cause(error), error)


def cause(error: BaseException) -> str:
    """In a line, why a client failed; where an error is not fedsim's own, with the place in the code."""
    own = isinstance(error, ArithmeticError | TimeoutError | NodeError)
    return one_line(error) if own else located(error)


def compact(value: Tensor) -> Tensor:
    """The tensor on the host, without the rest of a tensor that it is a view of."""
    value = value.cpu()
    return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
