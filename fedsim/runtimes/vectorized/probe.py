"""Whether strategy, network and recipe can be batched, tried on two clients before a run starts."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.data import FederatedData
from fedsim.errors import ConfigError, located
from fedsim.federated.client import Train, download, initial_client_state, initial_server_state
from fedsim.runtimes.vectorized.compute import Client, updates
from fedsim.training.batched.objective import Network, RaggedError
from fedsim.training.recipe import Recipe
from fedsim.training.replica import Replica
from fedsim.training.task import Task
from fedsim.types import Job, State, Update

COMPARED = {"loss", "buffers"}
TRIALS = 3  # two examples may be so alike that batch norm makes much of rounding; not in all of them
NEAR = {"fp32": 0.02, "bf16": 0.2, "fp16": 0.2}  # as a share of the norm; what is drawn otherwise differs by more


def check_options(work: Train) -> None:
    """Raise ConfigError for what a batch of clients cannot have."""
    recipe = work.recipe
    for wanted, why in (
        (recipe.precision == "fp16", "local.precision: fp16 has a loss scale for each client; use bf16 or fp32"),
        (recipe.accumulate > 1, "local.accumulate: clients' batches differ in their pieces; lower runtime.chunk"),
        (recipe.noisy_labels, "local.noisy_labels: each client fits a mixture of its own"),
        (recipe.activation_checkpointing, "local.activation_checkpointing: lower runtime.chunk instead"),
        (work.time_limit, "failures.time_limit: the clients of a batch end together"),
    ):
        if wanted:
            raise ConfigError(f"{why}; not in runtime vectorized; threads has it")


def check_batchable(network: Network, data: FederatedData, work: Train) -> None:
    """Train two clients of unequal size, alone and as a batch; raise ConfigError where that fails or differs.

    Compared are loss and statistics of the first step: what follows from it may be ill-conditioned. What fails
    alone too is left to the run to tell.
    """
    server = download(work.strategy, initial_server_state(work.strategy, network.task, network.device))
    clients = _unequal(data, work.recipe)
    one, two = (replace(work, recipe=replace(work.recipe, epochs=1, steps=steps)) for steps in (1, 2))
    for number in range(TRIALS):
        far = _tried(network, data, one, server, clients, number)
        if not far:
            _tried(network, data, two, server, clients, number)
            return
    raise ConfigError(
        f"runtime.name: vectorized gives another {far} than a client alone: the model mixes the examples "
        "of a batch, or draws random numbers, in a way it does not know; threads trains it"
    )


def _tried(
    network: Network, data: FederatedData, work: Train, server: State, clients: Sequence[int], number: int
) -> str | None:
    """In that round, the name of what differs, if something does."""
    initial = initial_client_state(work.strategy, network.task)
    state = {name: value.to(network.device) for name, value in initial.items()}
    batch = [Client(work, server, Job(client, number, state)) for client in clients]
    try:
        replica = Replica(network.task, network.device)
        alone = [work(replica, data, server, client.job) for client in batch]
    except Exception:
        return None
    try:
        together = _together(network, data, batch)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"runtime.name: vectorized cannot batch this strategy and model: {located(error)}; threads trains it"
        ) from error
    far = (_far(a, b, NEAR[work.recipe.precision]) for a, b in zip(alone, together, strict=True))
    return next(filter(None, far), None)


def _unequal(data: FederatedData, recipe: Recipe) -> tuple[int, int]:
    """Two small clients, whose batches are of unequal size where there are such clients."""
    order = np.argsort(data.sizes, kind="stable")
    sizes = data.sizes[order]
    unequal = recipe.batch_size_of(int(sizes[0])) < recipe.batch_size_of(int(sizes[-1]))
    other = int(np.argmax(sizes > sizes[0])) if unequal else min(1, len(order) - 1)
    return int(order[0]), int(order[other])


def _together(network: Network, data: FederatedData, batch: Sequence[Client]) -> list[Update]:
    try:
        return updates(network, data, batch)
    except RaggedError:
        return [update for client in batch for update in updates(network, data, [client])]


def _far(one: Update, batched: Update, share: float) -> str | None:
    """The name of what differs by more than that share of its norm."""
    mine, theirs = (update.message | update.client | update.metrics for update in (one, batched))
    for name in COMPARED & mine.keys():
        a, b = (values[name].detach().double().cpu() for values in (mine, theirs))
        if bool(torch.isfinite(a).all()) and float((a - b).norm()) > share * float(a.norm()) + 1e-6:
            return name
    return None


def bytes_per_client(task: Task, work: Train, im2col: bool, batch: int) -> int:
    """About what a client takes in a batch: vectors (P,) and the activations of `batch` examples."""
    saved = dict[int, int]()

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    replica = Replica(task)
    columns = list[int]()

    def unfolded(module: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        kernel = module.kernel_size[0] * module.kernel_size[1]
        columns.append(inputs[0].shape[1] * kernel * output.shape[2] * output.shape[3] * output.itemsize)

    hooks = [m.register_forward_hook(unfolded) for m in replica.network.modules() if type(m) is nn.Conv2d]
    x = replica.flat.new_zeros(2, *task.shape)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        replica.forward(x, train=True)
    for hook in hooks:
        hook.remove()
    own = {t.untyped_storage().data_ptr() for t in (replica.flat, replica.buffers)}
    activations = sum(size for pointer, size in saved.items() if pointer not in own) // len(x)
    workspace = 2 * max(columns, default=0) if im2col else 0
    vectors = 8 + 2 * (work.recipe.optimizer in ("adam", "adamw"))
    return vectors * replica.flat.nbytes + batch * (2 * activations + workspace)
