"""Clients on machines of their own, over Flower: nodes that hold their data and keep their states themselves."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedsim.base.catalogue import Spec
from fedsim.data import FederatedData
from fedsim.errors import ConfigError, one_line
from fedsim.federated.aggregate import Aggregator
from fedsim.federated.claims import MAX_EXAMPLES
from fedsim.federated.client import EvaluateClient, Survey, Train, Work
from fedsim.federated.runtime import Outcomes, Results, Runtime
from fedsim.flower import needs_flwr
from fedsim.flower.plan import initial_of, plan_of
from fedsim.flower.transport import ROUNDED, Transport
from fedsim.runtimes.threads import Threads
from fedsim.training.task import Task
from fedsim.types import Job, Positive, State

if TYPE_CHECKING:
    from fedsim.flower.dispatch import Dispatch


class Flower(Runtime):
    """Clients on nodes of a Flower federation, each with its own data; the server has only what tests need.

    `superlink` is HOST:PORT of Flower's SuperLink, `ca` the certificate of its authority; `insecure` is plain
    HTTP instead. The clients are the nodes named in `nodes`, in the order of their names, or the first
    data.clients that come; they have `wait` seconds for it. With `keys`, a folder of NAME.pub, a name belongs to
    the owner of its key.
    A client fails that has not answered `round_timeout` seconds after its round began. One whose node is gone has
    `wait` seconds to come back, and is asked again; under failures.policy=drop only if there is no other.

    `transport` is how updates travel: exact, lossless (the same bits in fewer bytes), bf16 or int8; these two
    round, with error feedback, and want `exact: false`. `link` is for a process that Flower has started.
    """

    elsewhere = True

    def __init__(
        self,
        task: Task,
        data: FederatedData,
        link: Callable[[], Any] | None = None,
        /,
        *,
        superlink: str = "127.0.0.1:8000",
        ca: Path | None = None,
        insecure: bool = False,
        nodes: list[str] | None = None,
        keys: Path | None = None,
        wait: Positive = 300.0,
        round_timeout: Positive = 3600.0,
        transport: Transport = "exact",
        exact: bool = True,
        device: str = "auto",
    ):
        needs_flwr("runtime.name: flower")
        from fedsim.flower.run_connection import RunConnection, Timing, address_of

        if exact and transport in ROUNDED:
            raise ConfigError(f"runtime.transport: {transport} rounds updates; it wants runtime.exact=false, too")
        if link and keys:
            raise ConfigError("runtime.keys: Flower shows a ServerApp no keys; leave it out, or use fedsim serve")
        self.task, self.data, self.transport, self.exact = task, data, transport, transport not in ROUNDED
        self.local = Threads(task, data, device=device)  # for tests
        self.home = self.local.home
        self.federation = RunConnection(
            None if link else address_of(superlink, ca, insecure),
            nodes,
            keys,
            data.num_clients,
            Timing(wait, round_timeout),
            link,
        )

    def check(self, work: Train) -> None:
        if work.config is None:
            raise ConfigError("runtime: flower sends names and numbers to nodes, and needs a config that has them")
        self.federation.plan = plan_of(work.config, self.data).json_text()
        self.federation.initial = initial_of(self.task)
        self.federation.roster.max_examples = work.config["failures"]["max_examples"] or MAX_EXAMPLES

    def placeholder_state(self, initial: State) -> State:
        """The version of the state that a node keeps; nothing if clients keep no state."""
        return {"version": torch.zeros(2, dtype=torch.int64)} if initial or not self.exact else {}

    def checkpointed_rounds(self, rounds: list[int]) -> None:
        self.federation.checkpointed_rounds = rounds

    @property
    def choice(self) -> Spec | None:
        """The nodes that take part, once they are known."""
        return self.federation.checkpoint_entry(self.data.sizes.tolist())

    def restore_choice(self, choice: Spec, work: Train) -> bool:
        """Go on with the nodes of a checkpoint; raises ConfigError."""
        if choice.get("name") != "flower":
            raise ConfigError("runtime: flower has nodes of its own")
        sizes: Any = choice["sizes"]
        if len(sizes) != len(self.data.sizes):
            raise ConfigError(f"data.clients: {len(self.data.sizes)}, and the run has {len(sizes)} nodes")
        if strange := [n for n in sizes if type(n) is not int or not 0 <= n <= MAX_EXAMPLES]:
            raise ConfigError(f"checkpoint: {one_line(strange[0])} is no number of examples of a node")
        self.federation.restore(choice["run"], choice["nodes"], sizes)
        self.data.sizes[:] = sizes
        return True

    def run_finished(self, clients: Mapping[int, State]) -> None:
        """Tell the nodes, which then keep of the run what their owners want."""
        names = self.federation.roster.names
        self.federation.tell_finished({names[k]: int(state["version"][0]) for k, state in clients.items()})

    def close(self) -> None:
        """End the Flower run; the next round starts another."""
        self.federation.close()

    def run(self, work: Work, server: State, jobs: Iterable[Job], aggregator: Aggregator) -> Results:
        if not isinstance(work, Survey | Train):
            return self.local.run(work, server, jobs, aggregator)
        return self._dispatch(work, server).run(jobs, aggregator)

    def map(self, work: Work, server: State, items: Iterable[Any]) -> Outcomes[Any]:
        if not isinstance(work, Train | EvaluateClient):  # of the server's own examples
            return self.local.map(work, server, items)
        return self._dispatch(work, server).map(items)

    def _dispatch(self, work: Survey | Train | EvaluateClient, server: State) -> "Dispatch":
        from fedsim.flower.dispatch import Dispatch

        return Dispatch(self.federation, work, server, self.data, self.transport)
