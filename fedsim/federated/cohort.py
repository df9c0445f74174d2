"""How the clients of a round are chosen."""

from typing import Any, Protocol

import numpy as np
from torch import Tensor

from fedsim.base.catalogue import Catalogue
from fedsim.errors import ConfigError, WrongReturnError, one_line
from fedsim.federated.federation import Federation
from fedsim.types import Count, Share


class Cohort(Protocol):
    """The ids of the clients of one round, ascending, drawn from the round's own stream.

    A function with a further parameter `federation` is also given what is known of the clients, a Federation.
    """

    def __call__(self, num_clients: int, stream: np.random.Generator, /) -> list[int]: ...


def uniform(
    num_clients: int,
    stream: np.random.Generator,
    /,
    *,
    fraction: Share | None = None,
    size: Count | None = None,
) -> list[int]:
    """A random `fraction` C of all clients, m = max(round(C N), 1), or `size` clients; without replacement."""
    if (fraction is None) == (size is None):
        raise ConfigError("cohort: set either cohort.fraction or cohort.size")
    m = size or max(round((fraction or 0) * num_clients), 1)
    if m > num_clients:
        raise ConfigError(f"cohort.size: {m} is more than the {num_clients} clients that train")
    return sorted(stream.choice(num_clients, m, replace=False).tolist())


def everyone(num_clients: int, stream: np.random.Generator, /) -> list[int]:
    """All clients, in every round."""
    return list(range(num_clients))


def fixed(num_clients: int, stream: np.random.Generator, /, *, clients: list[int]) -> list[int]:
    """The same `clients` in every round; ids count from 0."""
    if not clients or len(set(clients)) < len(clients) or min(clients) < 0 or max(clients) >= num_clients:
        raise ConfigError(f"cohort.clients: {clients} must be different ids from 0 to {num_clients - 1}")
    return sorted(clients)


def by_examples(
    num_clients: int, stream: np.random.Generator, /, federation: Federation, *, size: Count
) -> list[int]:
    """`size` clients, drawn one after the other with probabilities p_k = n_k / n; without replacement."""
    return sorted(_drawn_by_examples(num_clients, stream, federation, size, "size"))


def largest_loss(
    num_clients: int, stream: np.random.Generator, /, federation: Federation, *, candidates: Count, size: Count
) -> list[int]:
    """Of `candidates` clients, drawn as `by_examples`, the `size` ones whose last training had the largest loss.

    This is rpow-d of Cho et al., Client Selection in Federated Learning, 2020, https://arxiv.org/abs/2010.01243.
    A client whose loss is not known, as it has not trained yet, comes first.
    """
    if size > candidates:
        raise ConfigError(f"cohort.size: {size} is more than cohort.candidates: {candidates}")
    drawn = _drawn_by_examples(num_clients, stream, federation, candidates, "candidates")
    unknown = np.isnan(federation.last_loss)
    if (silent := unknown & (federation.last_round >= 0)).any():
        whose = f"client {int(silent.argmax())} has trained, and its strategy tells no loss"
        raise ConfigError(f"largest_loss goes by the losses of trainings; {whose}")
    known = np.where(unknown, np.inf, federation.last_loss)[drawn]
    order = np.argsort(-known, kind="stable")  # of equal ones, the first drawn
    return sorted(drawn[i] for i in order[:size])


def poisson(num_clients: int, stream: np.random.Generator, /, *, rate: Share) -> list[int]:
    """Each client with the probability `rate`, whoever else takes part; a round may have no clients."""
    return np.flatnonzero(stream.random(num_clients) < rate).tolist()


def _drawn_by_examples(
    num_clients: int, stream: np.random.Generator, federation: Federation, size: int, option: str
) -> list[int]:
    """The ids in the order in which they were drawn."""
    if size > num_clients:
        raise ConfigError(f"cohort.{option}: {size} is more than the {num_clients} clients that train")
    drawn: list[int] = stream.choice(num_clients, size, replace=False, p=federation.shares).tolist()
    return drawn


def may_be_empty(cohort: Cohort) -> bool:
    """Whether it is one of the catalogue that may draw no clients."""
    return getattr(cohort, "func", cohort) is poisson


def ids(drawn: object, num_clients: int, *, empty: bool = False) -> list[int]:
    """What a cohort drew as a list of ids: whole numbers of Python, numpy or torch. Raises WrongReturnError.

    It may be `empty` only where that is said.
    """
    found: Any = drawn.tolist() if isinstance(drawn, np.ndarray | Tensor) else drawn
    found = sorted(found) if isinstance(found, set | frozenset) else found
    if empty and isinstance(found, list | tuple | range) and not found:
        return []
    if not (
        isinstance(found, list | tuple | range)
        and found
        and all(isinstance(k, int | np.integer) and not isinstance(k, bool) for k in found)
        and min(found) >= 0
        and max(found) < num_clients
    ):
        way = "" if empty or not isinstance(found, list) or found else ", or none with failures.min_clients: 0"
        right = f"it must return a list of one or more ids from 0 to {num_clients - 1}{way}"
        raise WrongReturnError(f"gave {one_line(repr(drawn))}; {right}")
    if len(set(found)) < len(found):
        raise WrongReturnError(f"gave {one_line(repr(drawn))}, in which an id occurs twice")
    return [int(k) for k in found]


COHORTS = Catalogue(
    "cohort",
    "fedsim.federated",
    {
        "uniform": "cohort:uniform",
        "all": "cohort:everyone",
        "fixed": "cohort:fixed",
        "by_examples": "cohort:by_examples",
        "largest_loss": "cohort:largest_loss",
        "poisson": "cohort:poisson",
    },
)
