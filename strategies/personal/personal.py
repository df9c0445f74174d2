"""Personal layers: some layers stay at each client, and any strategy trains the others.

With the last layers personal it is FedPer: Arivazhagan et al., Federated Learning with Personalization Layers,
2019, https://arxiv.org/abs/1912.00818. With the first ones it is LG-FedAvg: Liang et al., Think Locally, Act
Globally, 2020, https://arxiv.org/abs/2001.01523.

Differs: personal layers start from the initial model; in LG-FedAvg they start from a jointly trained model.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from fedsim import (
    Buffers,
    ConfigError,
    GroupMeans,
    Layout,
    LocalObjective,
    ObjectiveWrapper,
    Recipe,
    State,
    StepRules,
    Strategy,
    Update,
    Wrapper,
    matching,
)
from fedsim.federated.positions import masked
from fedsim.federated.strategy import downloads, initial, surveys

from ..averaging.fedsgd import FedSGD

PERSONAL = "client_model", "personalise"  # methods of a strategy with models of clients
ClientUpdate = Callable[[State, State, LocalObjective], Update]  # as Strategy.client_update


@dataclass(frozen=True, kw_only=True)
class Personal(Wrapper):
    """Personal layers in any strategy: the parameters in `layers` stay at each client (Arivazhagan 2019).

    `layers` are patterns such as `fc*`, for names such as fc.weight. These layers never change in the global
    model, so evaluate each client's own model, with `evaluate.clients`. The `buffers` of the inner strategy decide
    about batch-norm statistics.
    """

    layers: tuple[str, ...]

    sends = Wrapper.sends

    def check(self, recipe: Recipe, layout: Layout) -> None:
        if not 0 < len(self.entries(layout)) < sum(layout.sizes):
            whole = f"the network's {len(layout.shapes)} parameters"
            raise ConfigError(f"strategy.layers: {list(self.layers)} must match some of {whole}, not all")
        refuse_recalibrated(self.buffers)
        for each in _with_inner(self.inner):
            if isinstance(each, FedSGD):
                raise ConfigError("strategy.inner: fedsgd trains no layers at the client; use fedavg")
            if why := _needs_whole_model(each):
                raise ConfigError(f"strategy.inner: {type(each).__name__} {why}, without the personal layers")
            own = type(each).client_model, type(each).personalise
            if not {*own} <= {getattr(kind, m) for kind in (Strategy, Wrapper) for m in PERSONAL}:
                raise ConfigError(f"strategy.inner: {type(each).__name__} has personal models of its own")
        ones = torch.ones(sum(layout.sizes))
        states = initial(self.inner, "init_client", ones.new_zeros(0), ones, layout)
        if any(value.shape == ones.shape and value.any() for value in states.values()):
            raise ConfigError("strategy.inner: its clients store whole models, without the personal layers")
        super().check(recipe, layout)

    def init_client(self, model: Tensor, layout: Layout, buffers: Tensor | None = None) -> State:
        return super().init_client(model, layout, buffers) | {self.entry("private"): model[self.entries(layout)]}

    def client_model(self, server: State, client: State, layout: Layout) -> Tensor:
        return own_model(server, client, self.entries(layout), self.entry("private"))

    def survey(self, server: State, client: State, local: LocalObjective) -> Update:
        own = self.client_model(server, client, local.layout)
        return super().survey(server | {"model": own}, client, local)

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        entries, name = self.entries(local.layout), self.entry("private")
        return update_with_private(entries, self.inner.client_update, server, client, local, name)

    def entries(self, layout: Layout) -> Tensor:
        """The positions of the personal entries in the model."""
        mask = layout.mask(matching(layout.shapes, self.layers, "strategy.layers").__contains__)
        return mask.nonzero().squeeze(1)


def _needs_whole_model(strategy: Strategy) -> str | None:
    """What a strategy does with the global model alone, if it does."""
    sent = strategy.survey_sends
    if surveys(strategy) and (sent is None or any(e.shape is None and e.like == "model" for e in sent.values())):
        return "surveys the global model"
    if strategy.uses_public:
        return "trains the global model on the server"
    if downloads(strategy) or isinstance(strategy.aggregator, GroupMeans):
        return "trains several global models"
    return None


def refuse_recalibrated(buffers: Buffers) -> None:
    """Raise ConfigError for recalibrated statistics: the server does not have the clients' models."""
    if buffers == "recalibrated":
        raise ConfigError(
            "strategy.buffers: recalibrated computes statistics of the global model, but clients have layers of "
            "their own; use private or average"
        )


def own_model(server: State, client: State, entries: Tensor, name: str = "private") -> Tensor:
    """(P,) the global model with what the client keeps under `name` at the positions `entries`."""
    return server["model"].index_copy(0, entries.to(server["model"].device), client[name])


def update_with_private(
    entries: Tensor,
    client_update: ClientUpdate,
    server: State,
    client: State,
    local: LocalObjective,
    name: str = "private",
) -> Update:
    """Call `client_update` with the client's own model; its trained values at `entries` are kept under `name`.

    The message covers them in no vector (P,), so they are not sent, and the server sees no change there. In those
    of the state they are set to 0: control variates have no effect.
    """
    x = own_model(server, client, entries, name)
    entries, recording = entries.to(x.device), RecordingObjective(local)
    update = client_update(server | {"model": x}, client, recording)
    if len(recording.last_iterates) != 1:
        raise RuntimeError(
            f"personal layers need one call of local.train a round, not {len(recording.last_iterates)}"
        )

    kept = {n: v.index_fill(0, entries, 0) if v.shape == x.shape else v for n, v in update.client.items()}
    private = {name: recording.last_iterates[0][entries]}
    return without(entries, update, x)._replace(client=kept | private)


def without(entries: Tensor, update: Update, x: Tensor) -> Update:
    """The update, whose message does not cover the positions `entries` in vectors of the form of the model `x`."""
    update, ones = masked(update, x), torch.ones_like(x, dtype=torch.uint8)
    vectors = [name for name, value in update.message.items() if value.shape == x.shape]
    where = {name: update.where.get(name, ones).index_fill(0, entries, 0) for name in vectors}
    return masked(update._replace(where=update.where | where), x)


class RecordingObjective(ObjectiveWrapper):
    """An objective that records the last iterate of each training."""

    def __init__(self, inner: LocalObjective):
        super().__init__(inner)
        self.last_iterates: list[Tensor] = []  # each (P,)

    def train(self, start: Tensor, **rules: Unpack[StepRules]) -> Tensor:
        self.last_iterates.append(super().train(start, **rules))
        return self.last_iterates[-1]


def _with_inner(strategy: Strategy) -> Iterator[Strategy]:
    yield strategy
    if isinstance(strategy, Wrapper):
        yield from _with_inner(strategy.inner)
