"""The base class of federated algorithms: hyper-parameters, and pure functions of states."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fedsim.training.layout import Layout
from fedsim.training.objective import LocalObjective
from fedsim.training.recipe import Recipe
from fedsim.types import RoundInfo, State, Update

Buffers = Literal["average", "private", "frozen", "recalibrated"]


@dataclass(frozen=True, kw_only=True)
class Strategy(ABC):
    """An algorithm: its part at one client and its part at the server. Its fields are hyper-parameters only.

    `broadcast` names the entries of the server's state that clients download. `buffers` says how batch-norm
    statistics are handled: the weighted `average` of the cohort, `private` to each client, `frozen` at their
    initial values, or `recalibrated` by the server for each new model. They are separate from the model, and the
    methods of a strategy do not handle them.
    """

    buffers: Buffers = "average"

    broadcast: ClassVar[tuple[str, ...]] = ("model",)

    def check(self, recipe: Recipe, layout: Layout) -> None:  # noqa: B027 - most strategies accept all settings
        """Raise ConfigError, with the setting's name, if recipe or network violate the algorithm's assumptions."""

    def init_server(self, model: Tensor) -> State:
        """The server's state before the first round; `model` is (P,)."""
        return {"model": model}

    def init_client(self, model: Tensor, layout: Layout) -> State:
        """A client's state before it first takes part; each `Update.client` must have the same form."""
        return {}

    @abstractmethod
    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        """One client in one round. It must not branch on the value of a tensor, nor write to a state in place."""

    @abstractmethod
    def server_update(self, server: State, mean: State, info: RoundInfo) -> State:
        """The entries of the server's state that change; `mean` is the weighted mean of the messages."""

    def client_model(self, server: State, client: State, layout: Layout) -> Tensor:
        """(P,) the model that a client uses for its own examples; personalised strategies override it."""
        return server["model"]


@dataclass(frozen=True, kw_only=True)
class Wrapper(Strategy):
    """A strategy around an inner one: passes all calls on to it; subclasses override some of them."""

    inner: Strategy

    buffers: ClassVar[Buffers] = property(lambda self: self.inner.buffers)  # type: ignore[misc, assignment]

    @property
    def broadcast(self) -> tuple[str, ...]:  # type: ignore[override]
        """The `broadcast` of the inner strategy."""
        return self.inner.broadcast

    def check(self, recipe: Recipe, layout: Layout) -> None:
        self.inner.check(recipe, layout)

    def init_server(self, model: Tensor) -> State:
        return self.inner.init_server(model)

    def init_client(self, model: Tensor, layout: Layout) -> State:
        return self.inner.init_client(model, layout)

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        return self.inner.client_update(server, client, local)

    def server_update(self, server: State, mean: State, info: RoundInfo) -> State:
        return self.inner.server_update(server, mean, info)

    def client_model(self, server: State, client: State, layout: Layout) -> Tensor:
        return self.inner.client_model(server, client, layout)
