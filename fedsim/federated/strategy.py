"""A federated algorithm: pure functions of states, and the hyper-parameters they share."""

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
    """Both halves of an algorithm, written for one client. Fields are hyper-parameters; all else is in states.

    `broadcast` names the server's entries that clients download. `buffers` says what becomes of batch-norm
    statistics: the weighted `average` of the cohort's, `private` to each client, `frozen` at the initial ones,
    or `recalibrated`, made anew by the server for each new model. They travel apart from the model, and no method
    here meets them.
    """

    buffers: Buffers = "average"

    broadcast: ClassVar[tuple[str, ...]] = ("model",)

    def check(self, recipe: Recipe, layout: Layout) -> None:  # noqa: B027 - most have nothing to refuse
        """Raise ConfigError, naming the setting, where recipe or network break the algorithm's derivation."""

    def init_server(self, model: Tensor) -> State:
        """What the server holds before the first round; `model` is (P,)."""
        return {"model": model}

    def init_client(self, model: Tensor, layout: Layout) -> State:
        """What a client holds before it first takes part; the same names as every `Update.client`."""
        return {}

    @abstractmethod
    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        """One client, one round. No branch on a tensor's value; states are read, never written."""

    @abstractmethod
    def server_update(self, server: State, mean: State, info: RoundInfo) -> State:
        """The server's entries that change, given the weighted mean of the messages, entry by entry."""

    def client_model(self, server: State, client: State, layout: Layout) -> Tensor:
        """(P,) the model a client uses for itself; personalised strategies override it."""
        return server["model"]


@dataclass(frozen=True, kw_only=True)
class Wrapper(Strategy):
    """Changes what another strategy sends or receives, and passes on the rest."""

    inner: Strategy

    buffers: ClassVar[Buffers] = property(lambda self: self.inner.buffers)  # type: ignore[misc, assignment]

    @property
    def broadcast(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of the inner strategy."""
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
