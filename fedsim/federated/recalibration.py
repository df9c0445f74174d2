"""Batch-norm statistics that the server makes anew after each round, for the model that it has just made.

Averages of what clients saw, each at a model of its own and on labels of its own, are not the statistics of the
new global model. One forward pass over some examples gives those: Wu & Johnson, Rethinking "Batch" in BatchNorm,
2021, section 3, https://arxiv.org/abs/2105.07576. HeteroFL does it once, after training, by asking one client
after the other: Diao et al., ICLR 2021, https://arxiv.org/abs/2010.01264.

Differs: after every round; and of a batch's variances the unbiased one is taken, as torch's batch norm does.
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
from fedsim.training.replica import Replica
from fedsim.training.task import Task
from fedsim.types import Job, State, Stream, Update, random

Few = Annotated[int, Ge(2)]  # one example has no variance


@dataclass(frozen=True, kw_only=True)
class Recalibrate:
    """Which examples `strategy.buffers: recalibrated` makes batch-norm statistics of, after each round.

    Up to `examples` of them, drawn anew each round, in batches of `batch_size`; a smaller rest is left out, for it
    would count as much as a whole batch. Source `public` are the examples that the server has, `data.public`;
    `clients` are all clients' training examples, which a simulation can look at and a real server cannot.
    """

    examples: Few = 1000
    batch_size: Few = 100
    source: Literal["public", "clients"] = "public"


@dataclass(frozen=True)
class Recalibration:
    """A work of one job, in fp32: its message is `buffers` (Q,), the statistics of the global model.

    They are the means, over batches, of each batch's mean and of its unbiased variance, n / (n - 1) times that of
    its n values: torch's cumulative average, `momentum=None`. Dropout draws as in training.
    """

    settings: Recalibrate
    seed: int

    def __call__(self, replica: Replica, data: FederatedData, server: State, job: Job) -> Update:
        stream = random(self.seed, Stream.RECALIBRATE, job.round)
        rows, most = self._rows(data, stream), self.settings.batch_size
        whole = len(rows) - len(rows) % min(most, len(rows))
        replica.begin_client(server["buffers"], int(stream.integers(2**63)))
        replica.load(server["model"])
        with torch.no_grad(), _cumulative(replica.network):
            for part in torch.split(rows[:whole], most):
                replica.forward(data.batch(part)[0], train=True)
        return Update({"buffers": replica.buffers.clone()}, 1.0)

    def _rows(self, data: FederatedData, stream: np.random.Generator) -> Tensor:
        most = self.settings.examples
        if self.settings.source == "clients":
            return torch.from_numpy(data.sample(most, stream))
        return torch.from_numpy(stream.permutation(data.public)[:most])


def check_recalibration(settings: Recalibrate | None, buffers: str, task: Task, data: FederatedData) -> None:
    """Raise ConfigError where `strategy.buffers` and `recalibrate` do not go together, with network or data."""
    if settings is None:
        if buffers == "recalibrated":
            raise ConfigError("strategy.buffers: recalibrated needs settings, such as recalibrate.source=public")
        return
    if buffers != "recalibrated":
        raise ConfigError(f"recalibrate: belongs to strategy.buffers recalibrated, and that is {buffers}")
    if not len(task.initial_buffers):
        raise ConfigError("strategy.buffers: recalibrated needs batch-norm statistics; the network has none")
    norms = _batch_norms(task.network)
    for name in task.buffer_layout.shapes:
        if name.rpartition(".")[0] not in norms:
            raise ConfigError(f"strategy.buffers: recalibrated knows batch norm, and {name} is not of one")
    if settings.source == "public" and len(data.public) < 2:
        raise ConfigError(
            f"recalibrate.source: public, and the server has {len(data.public)} examples of its own; "
            "raise data.public, or let the source be clients"
        )


@contextmanager
def _cumulative(network: nn.Module) -> Iterator[None]:
    """Statistics that start anew, and count each batch as much as those before it."""
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
    """Those that keep statistics, by name."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
