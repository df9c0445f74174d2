"""Recalibration: after each round the server computes the batch-norm statistics of the new global model.

Each client computes its statistics with its own model and its own labels, so their average is not the statistics
of the new global model. These come from one forward pass over some examples: Wu & Johnson, Rethinking "Batch" in
BatchNorm, 2021, section 3, https://arxiv.org/abs/2105.07576. HeteroFL does the same once, after training, on one
client after the other: Diao et al., ICLR 2021, https://arxiv.org/abs/2010.01264.

Differs: after every round, and with the unbiased variance of each batch, as in torch's batch norm.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsim.data import FederatedData
from fedsim.errors import ConfigError
from fedsim.training.buffers import STATISTICS
from fedsim.training.replica import Replica
from fedsim.training.task import Task
from fedsim.types import Job, State, Stream, Update, random

Few = Annotated[int, Ge(2)]  # one example has no variance


@dataclass(frozen=True, kw_only=True)
class Recalibrate:
    """The examples from which `strategy.buffers: recalibrated` computes batch-norm statistics after each round.

    Up to `examples` of them are drawn anew in each round, in batches of `batch_size`. A smaller last batch is left
    out, because it would have the weight of a full one. The source `public` is the server's own examples,
    `data.public`; `clients` is the training examples of all clients, which only a simulation can access.
    """

    examples: Few = 1000
    batch_size: Few = 100
    source: Literal["public", "clients"] = "public"


@dataclass(frozen=True)
class Recalibration:
    """A work for one job, in fp32: its message is `buffers` (Q,), the statistics of the global model.

    They are averages over batches of the mean and the unbiased variance of each batch, which is torch's cumulative
    average, `momentum=None`. Dropout is active, as in training.
    """

    settings: Recalibrate
    seed: int

    def __call__(self, replica: Replica, data: FederatedData, server: State, job: Job) -> Update:
        stream = random(self.seed, Stream.RECALIBRATE, job.round)
        rows, batch_size = self._rows(data, stream), self.settings.batch_size
        whole = len(rows) - len(rows) % min(batch_size, len(rows))
        replica.begin_client(server["buffers"], int(stream.integers(2**63)))
        replica.load(server["model"])
        with torch.no_grad(), _cumulative(replica.network):
            for part in torch.split(rows[:whole], batch_size):
                replica.forward(data.batch(part)[0], train=True)
        return Update({"buffers": replica.buffers.clone()}, 1.0)

    def _rows(self, data: FederatedData, stream: np.random.Generator) -> Tensor:
        examples = self.settings.examples
        if self.settings.source == "clients":
            return torch.from_numpy(data.sample(examples, stream))
        return torch.from_numpy(stream.permutation(data.public)[:examples])


def check_recalibration(settings: Recalibrate | None, buffers: str, task: Task, data: FederatedData) -> None:
    """Raise ConfigError if `strategy.buffers` and `recalibrate` contradict each other, the network or the data."""
    if settings is None:
        if buffers == "recalibrated":
            raise ConfigError("strategy.buffers: recalibrated needs settings, such as recalibrate.source=public")
        return
    if buffers != "recalibrated":
        raise ConfigError(f"recalibrate: belongs to strategy.buffers=recalibrated, and that is {buffers}")
    if not len(task.initial_buffers):
        raise ConfigError("strategy.buffers: recalibrated needs batch-norm statistics; the network has none")
    norms = _batch_norms(task.network)
    for name in task.buffer_layout.shapes:
        path, _, own = name.rpartition(".")
        if path not in norms or own not in STATISTICS:
            raise ConfigError(
                f"strategy.buffers: recalibrated supports only statistics of batch norm, and {name} is none"
            )
    if settings.source == "public" and len(data.public) < 2:
        raise ConfigError(
            f"recalibrate.source: public, and the server has {len(data.public)} examples of its own; "
            "raise data.public, or set recalibrate.source=clients"
        )


@contextmanager
def _cumulative(network: nn.Module) -> Iterator[None]:
    """Batch norm resets its statistics, and averages all batches with equal weights."""
    norms = _batch_norms(network).values()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None
        norm.num_batches_tracked.zero_()
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _batch_norms(network: nn.Module) -> dict[str, Any]:
    """The batch-norm layers with running statistics, by name."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
