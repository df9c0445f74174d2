"""Batches of one example, on which a network with batch norm cannot train: found before a run, by trying."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedsim.data import FederatedData
from fedsim.data.federated import Shard, batch_sizes
from fedsim.errors import ConfigError, one_line
from fedsim.training.recipe import Recipe
from fedsim.training.replica import Replica
from fedsim.training.task import Task

NAMED = 3  # clients in a message


def clients_to_leave_out(task: Task, data: FederatedData, recipe: Recipe, *, drop: bool = False) -> dict[int, str]:
    """The clients of one example where the network needs two, and why; only with `drop`.

    Raises ConfigError for such clients without `drop`, and for any other client that has a batch of one example.
    Clients whose sizes are not known (0) are left to their own machines.
    """
    sizes = [int(n) for n in np.unique(data.sizes) if n]
    short = [n for n in sizes if 1 in recipe.batch_sizes(n)[: recipe.num_steps(n)]]
    if not short:
        return {}
    x, _ = data.batch(torch.from_numpy(np.resize(np.flatnonzero(data.owners >= 0), 2)))
    if (cause := _why_not_one(task, x)) is None:
        return {}
    if recipe.batch_size == 1:
        raise ConfigError(
            f"local.batch_size: 1, and the network needs two examples; set it to 2 or more ({cause})"
        )
    if several := [n for n in short if n > 1]:
        whose = f"{recipe.batch_size} leaves a last batch of one example to {_holders(data, several)}"
        way_out = "set local.drop_last=true or local.min_batch=2"
        raise ConfigError(f"local.batch_size: {whose}, and the network needs two; {way_out} ({cause})")
    if isinstance(data, Shard):
        raise ConfigError(f"data: holds one example, and the network needs two; add more ({cause})")
    if not drop:
        raise ConfigError(
            f"data.partition: gives one example to {_holders(data, [1])}, and the network needs two; "
            f"change that, or leave such clients out by failures.policy=drop ({cause})"
        )
    why = f"has one example, and the network needs two ({cause})"
    return dict.fromkeys(np.flatnonzero(data.sizes == 1).tolist(), why)


def check_evaluation(task: Task, data: FederatedData, batch_size: int, *, clients: bool) -> None:
    """Raise ConfigError if a test in training mode has a batch of one example that the network cannot take.

    With `clients`, also for a client's test of its own model.
    """
    sizes = {data.num_test, *np.unique(data.own_sizes).tolist()} if clients else {data.num_test}
    if not any(1 in batch_sizes(n, batch_size, 2) for n in sizes):
        return
    x, _ = data.test_batch(torch.arange(2) % data.num_test)
    if cause := _why_not_one(task, x):
        needs = "and in training mode the network needs two"
        if batch_size == 1:
            raise ConfigError(f"evaluate.batch_size: 1 example, {needs}; set it to 2 or more ({cause})")
        whose = "the test set" if data.num_test == 1 else "a client"
        raise ConfigError(f"evaluate.mode: {whose} has one example, {needs}; set evaluate.mode=eval ({cause})")


def _why_not_one(task: Task, x: Tensor) -> str | None:
    """Why a training pass cannot take the first of `x` (2, ...) alone; None if it can, or cannot take both."""
    replica = Replica(task)
    return None if _why_not(replica, x) else _why_not(replica, x[:1])


def _why_not(replica: Replica, x: Tensor) -> str | None:
    try:
        with torch.no_grad():
            logits = replica.forward(x, train=True)[0]
    except Exception as error:
        return one_line(error)
    if tuple(logits.shape) != (len(x), replica.task.classes):
        return f"gives {tuple(logits.shape)} for it"
    return None if bool(logits.isfinite().all()) else "gives values that are not finite"


def named(clients: Sequence[int]) -> str:
    """Such as "clients 0, 4, 7 and 12 more"."""
    more = f" and {len(clients) - NAMED} more" if len(clients) > NAMED else ""
    return f"client{'s' * (len(clients) > 1)} {', '.join(map(str, clients[:NAMED]))}{more}"


def _holders(data: FederatedData, sizes: Sequence[int]) -> str:
    """The clients with so many examples; a machine that knows one client does not know its number."""
    return "this client" if isinstance(data, Shard) else named(np.flatnonzero(np.isin(data.sizes, sizes)).tolist())
