"""A test before each run, on two clients, whether strategy, network and recipe can be batched."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.data import FederatedData
from fedsim.errors import ConfigError, RoundError, located
from fedsim.federated.client import PRIVATE, Train, broadcast, initial_client_state, initial_server_state
from fedsim.federated.federation import Federation
from fedsim.runtimes.vectorized.compute import Client, updates
from fedsim.training.batched.layers import RaggedError
from fedsim.training.batched.objective import Network
from fedsim.training.buffers import Handling
from fedsim.training.recipe import Recipe
from fedsim.training.replica import Replica
from fedsim.training.task import Task
from fedsim.types import Job, State, Update

COMPARED_ENTRIES = {"loss", "buffers"}  # and private buffers
MAX_ROWS = 16  # of a client in a trial with padding
MAX_TRIALS = 3  # with very similar examples, batch norm amplifies rounding errors in some trials
TOLERANCE = {"fp32": 1e-4, "bf16": 0.2, "fp16": 0.2}  # of the norm; other random numbers differ by more


def check_options(work: Train) -> None:
    """Raise ConfigError for options that a batch of clients does not support."""
    recipe = work.recipe
    for wanted, why in (
        (recipe.precision == "fp16", "local.precision: fp16 needs a loss scale for each client; use bf16 or fp32"),
        (
            recipe.accumulate > 1,
            "local.accumulate: pieces differ from client to client; lower runtime.chunk",
        ),
        (recipe.noisy_labels, "local.noisy_labels: each client fits its own mixture"),
        (recipe.activation_checkpointing, "local.activation_checkpointing: lower runtime.chunk instead"),
        (work.time_limit, "failures.time_limit: all clients of a batch finish together"),
    ):
        if wanted:
            raise ConfigError(f"{why}; runtime vectorized does not support it, threads does")


def check_batchable(network: Network, data: FederatedData, work: Train) -> None:
    """Train two clients of unequal size, alone and as a batch; raise ConfigError if the batch fails or differs.

    It compares loss and statistics of the first step, since later values may be ill-conditioned. An error that
    also occurs without batching is ignored here; the run reports it.
    """
    federation = Federation.of(data.sizes)
    made = initial_server_state(work.strategy, network.task, federation, network.device, work.seed)
    server = broadcast(work.strategy, made)
    network, clients = _reporting_all(network), _unequal(data, work.recipe)
    if len({size for n in np.unique(data.sizes) for size in work.recipe.batch_sizes(int(n))}) > 1:
        # Some batches will have padding.
        data = _few_rows(data, work.recipe, clients)
    work = replace(work, cohort=tuple(sorted({*clients})))
    one_step, two_steps = (replace(work, recipe=replace(work.recipe, epochs=1, steps=steps)) for steps in (1, 2))
    for number in range(MAX_TRIALS):
        differing = _compare(network, data, one_step, server, clients, number)
        if not differing:
            _compare(network, data, two_steps, server, clients, number)
            return
    raise ConfigError(
        f"runtime.name: vectorized computes another {differing} than a client alone: the model, the loss or the "
        "strategy mixes the examples of a batch, which may be padded, or draws random numbers, in a way that "
        "vectorized does not support; use threads"
    )


def _reporting_all(network: Network) -> Network:
    """The network with all buffers private that the server would not see."""
    network, network.task = copy.copy(network), copy.copy(network.task)
    handling: dict[str, Handling] = {
        name: "private" if kept == "server" else kept for name, kept in network.task.handling.items()
    }
    network.task.handling = handling
    return network


def _compare(
    network: Network, data: FederatedData, work: Train, server: State, clients: Sequence[int], number: int
) -> str | None:
    """The name of an entry that differs in round `number`, or None."""
    initial = initial_client_state(work.strategy, network.task, work.seed)
    state = {name: value.to(network.device) for name, value in initial.items()}
    jobs = [Job(client, number, state) for client in clients]
    batch = [Client(work, work.download(server, job), job) for job in jobs]
    try:
        replica = Replica(network.task, network.device)
        alone = [work(replica, data, server, client.job) for client in batch]
    except KeyboardInterrupt:
        raise
    except BaseException:
        return None
    try:
        together = _batched_updates(network, data, batch)
    except (ConfigError, RoundError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise ConfigError(
            f"runtime.name: vectorized cannot batch this strategy and model: {_why(error)}; use threads"
        ) from error
    differences = (
        _difference(a, b, TOLERANCE[work.recipe.precision]) for a, b in zip(alone, together, strict=True)
    )
    return next(filter(None, differences), None)


def _unequal(data: FederatedData, recipe: Recipe) -> tuple[int, int]:
    """Two small clients, with batches of unequal sizes if there are such clients.

    Those with one example come last: batch norm cannot train on it, and the trial would say nothing.
    """
    order = np.lexsort((data.sizes, data.sizes == 1))
    sizes = data.sizes[order]
    unequal = recipe.batch_size_of(int(sizes[0])) < recipe.batch_size_of(int(sizes.max()))
    other = int(np.argmax(sizes > sizes[0])) if unequal else min(1, len(order) - 1)
    return int(order[0]), int(order[other])


def _few_rows(data: FederatedData, recipe: Recipe, clients: tuple[int, int]) -> FederatedData:
    """The data with so few rows of these two that already their first batches are of unequal size."""
    most = min(recipe.batch_size_of(int(data.sizes[clients[1]])), MAX_ROWS)
    limits = {clients[0]: max(most // 2 + 1, 2), clients[1]: most}  # of twice as many, the mean would be the same
    few = copy.copy(data)
    setattr(few, "rows", lambda client: data.rows(client)[: limits[client]])  # noqa: B010 - a method of this object
    return few


def _why(error: BaseException) -> str:
    """Why code cannot be batched, in a line; torch says in several ways that it wants the value of a tensor."""
    if any(words in str(error) for words in (".item()", "data-dependent control flow")):
        plain = RuntimeError("it asks for the value of a tensor, by float(), .item() or `if`")
        return located(plain.with_traceback(error.__traceback__))
    return located(error)


def _batched_updates(network: Network, data: FederatedData, batch: Sequence[Client]) -> list[Update]:
    try:
        return updates(network, data, batch)
    except RaggedError:
        return [update for client in batch for update in updates(network, data, [client])]


def _difference(alone: Update, batched: Update, tolerance: float) -> str | None:
    """The name of an entry that differs by more than `tolerance` times its norm, or None."""
    mine, theirs = (State(u.message | u.client | u.metrics) for u in (alone, batched))
    for name in sorted(name for name in mine if name in COMPARED_ENTRIES or name.startswith(PRIVATE)):
        a, b = (values[name].detach().double().cpu() for values in (mine, theirs))
        if bool(torch.isfinite(a).all()) and float((a - b).norm()) > tolerance * float(a.norm()) + 1e-6:
            return name
    return None


def bytes_per_client(task: Task, work: Train, im2col: bool, batch: int) -> int:
    """About the memory of a client in a batch: vectors (P,) and the activations of `batch` examples."""
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
    copies = work.recipe.make_optimizer(task.layout).copies
    vectors = 8 + 2 * (copies > 1) + 1 + copies  # weights and state once more, where some clients sit steps out
    return vectors * replica.flat.nbytes + batch * (2 * activations + workspace)
