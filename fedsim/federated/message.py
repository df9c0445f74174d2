"""The form of what a client sends, where its strategy declares it."""

from collections.abc import Mapping

import torch

from fedsim.errors import ConfigError
from fedsim.federated.rows import Rows
from fedsim.federated.strategy import Strategy, surveys
from fedsim.types import Entry, State


def check_zeros(strategy: Strategy, server: State) -> None:
    """Raise ConfigError where a strategy cannot have a round without clients."""
    zero_message(strategy, server)
    if surveys(strategy) or isinstance(strategy.aggregator, Rows):
        name, needs = type(strategy).__name__, "a survey" if surveys(strategy) else "all messages"
        raise ConfigError(f"failures.min_clients: {name} needs {needs}, which zeros cannot stand for; set it to 1")


def zero_message(strategy: Strategy, server: State) -> State:
    """What nobody sends: zeros in the declared form, and the server's batch-norm statistics or no change of them.

    Raises ConfigError for a strategy that does not declare what it sends.
    """
    if strategy.sends is None:
        raise ConfigError(
            f"strategy: {type(strategy).__name__} does not declare what its clients send, in `sends`"
        )
    zeros = _zeros(strategy.sends, server)
    if strategy.buffers != "average":
        return zeros
    buffers = server["buffers"]
    return zeros | {"buffers": torch.zeros_like(buffers) if strategy.buffers_as_changes else buffers.clone()}


def _zeros(declared: Mapping[str, Entry], server: State) -> State:
    """Zeros in the form of each declared entry."""
    zeros = State()
    for name, entry in declared.items():
        like = server[entry.like]
        shape = like.shape if entry.shape is None else entry.shape
        zeros[name] = torch.zeros(shape, dtype=entry.dtype or like.dtype, device=like.device)
    return zeros
