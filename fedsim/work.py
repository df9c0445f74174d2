"""What a client does: the same functions in every runtime."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.data import FederatedData
from fedsim.local import LocalObjective, Recipe
from fedsim.strategy import Strategy
from fedsim.task import Replica
from fedsim.types import Job, State, Update

Work = Callable[[Replica, FederatedData, State, Job], Update]


@dataclass(frozen=True)
class Train:
    """One round of training. Batch-norm statistics travel here, so that strategies need not mention them."""

    strategy: Strategy
    recipe: Recipe
    seed: int

    def __call__(self, replica: Replica, data: FederatedData, server: State, job: Job) -> Update:
        client = job.client or {}
        home = client if self.strategy.buffers == "private" else server
        local = LocalObjective(replica, data, job, home["buffers"], self.recipe, self.seed)
        update = self.strategy.client_update(server, client, local)
        buffers = {"buffers": local.buffers}
        if self.strategy.buffers == "average":
            return update._replace(message=update.message | buffers, metrics=local.metrics)
        if self.strategy.buffers == "private":
            return update._replace(client=update.client | buffers, metrics=local.metrics)
        return update._replace(metrics=local.metrics)


@dataclass(frozen=True)
class EvaluateClient:
    """The client's own model on its own examples: those held out, or where there are none, all of its own."""

    strategy: Strategy
    batch_size: int

    def __call__(self, replica: Replica, data: FederatedData, server: State, job: Job) -> Update:
        client = job.client or {}
        model = self.strategy.client_model(server, client, replica.task.layout)
        held = data.held_out(job.client_id)
        rows = torch.from_numpy(held if len(held) else data.rows(job.client_id))
        batches = (data.batch(part) for part in torch.split(rows, self.batch_size))
        return _evaluate(replica, model, client.get("buffers", server["buffers"]), batches)


@dataclass(frozen=True)
class EvaluateGlobal:
    """The global model on one chunk of the test set: job k has the k-th `batch_size` examples."""

    batch_size: int

    def __call__(self, replica: Replica, data: FederatedData, server: State, job: Job) -> Update:
        first = job.client_id * self.batch_size
        rows = torch.arange(first, min(first + self.batch_size, data.num_test))
        return _evaluate(replica, server["model"], server["buffers"], [data.test_batch(rows)])


def _evaluate(
    replica: Replica, model: Tensor, buffers: Tensor, batches: Iterable[tuple[Tensor, Tensor]]
) -> Update:
    """Sums over examples, in eval mode; the message is empty."""
    replica.enter(buffers, seed=0)
    replica.load(model)
    loss, correct, examples = buffers.new_zeros(()), buffers.new_zeros(()), 0
    with torch.no_grad():
        for x, y in batches:
            logits = replica.logits(replica.w, x, train=False)
            loss += replica.task.losses(logits, y).sum()
            correct += (logits.argmax(-1) == y).sum()
            examples += len(y)
    return Update({}, 1.0, metrics={"loss": loss, "correct": correct, "examples": torch.tensor(examples)})
