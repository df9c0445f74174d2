"""Where clients run. A runtime is one method: clients in, partial aggregates and reports out, in any order."""

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

from fedsim.base.catalogue import Catalogue
from fedsim.federated.aggregate import Aggregator, Partial
from fedsim.federated.client import Train, Work
from fedsim.types import Job, Report, State

RUNTIMES = Catalogue(
    "runtime",
    "fedsim",
    {
        "auto": "runtimes.auto:Auto",
        "serial": "runtimes.serial:Serial",
        "threads": "runtimes.threads:Threads",
        "vectorized": "runtimes.vectorized:Vectorized",
        "ray": "runtimes.ray:Ray",
        "flower": "flower.runtime:Flower",
    },
)


class Runtime(Protocol):
    """Runs clients one at a time or side by side; what they compute does not depend on it.

    `home` is the device on which the server's state is kept, `workers` how many clients run side by side, and
    `exact` whether the results equal serial's to the bit, and not only to rounding. One that starts processes also
    has a `close()`, which ends them; its next run starts others. Where clients keep their states themselves, there
    is a `ticket(initial)`, what the server keeps instead, and a `settled(rounds)`, told after which rounds there
    are checkpoints that a run may go back to.
    """

    home: torch.device

    @property
    def exact(self) -> bool: ...

    @property
    def workers(self) -> int: ...

    def check(self, work: Train) -> None:
        """Raise ConfigError, naming the setting, where the runtime cannot train like that."""

    def run(
        self,
        work: Work,
        server: State,
        jobs: Iterable[Job],
        aggregator: Aggregator,
        *,
        tolerant: bool = False,
    ) -> Iterator[tuple[Partial, list[Report]]]:
        """Yield as clients finish: partial aggregates, to be merged, and a report for each client.

        A client that fails raises ClientError; where the run is `tolerant`, it is reported with its `error`
        instead, and its message is left out.
        """


def kept(runtime: Runtime, initial_client: State) -> State:
    """What the server keeps for a client that has not taken part: its state, or where it has that, a ticket."""
    ticket = getattr(runtime, "ticket", None)
    return ticket(initial_client) if ticket else initial_client


def settled(runtime: Runtime, rounds: list[int]) -> None:
    """Tell a runtime after which rounds there are checkpoints."""
    if tell := getattr(runtime, "settled", None):
        tell(rounds)


def close(runtime: Runtime) -> None:
    """End the processes of a runtime that has any."""
    if end := getattr(runtime, "close", None):
        end()
