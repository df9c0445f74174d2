"""Personal layers: some stay with each client, the others are learned together, by any strategy.

With the last layers personal it is FedPer: Arivazhagan et al., Federated Learning with Personalization Layers,
2019, https://arxiv.org/abs/1912.00818. With the first ones it is LG-FedAvg: Liang et al., Think Locally, Act
Globally, 2020, https://arxiv.org/abs/2001.01523.

Differs: personal layers start as the initial model has them. LG-FedAvg takes those of a model trained together.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim import (
    Buffers,
    ConfigError,
    Correction,
    Layout,
    LocalObjective,
    Loss,
    ObjectiveWrapper,
    Recipe,
    State,
    Strategy,
    Update,
    Wrapper,
    matching,
)

from .fedsgd import FedSGD

Half = Callable[[State, State, LocalObjective], Update]  # the client's


@dataclass(frozen=True, kw_only=True)
class Personal(Wrapper):
    """Personal layers in any strategy: parameters named as in `layers` never leave the client (Arivazhagan 2019).

    `layers` are patterns such as `fc*`, for names such as fc.weight. The server sees no change there, and the
    global model keeps its initial ones: what counts is each client's own model, `evaluate.clients`. Batch-norm
    statistics go as the inner strategy's `buffers` has it.
    """

    layers: tuple[str, ...]

    def check(self, recipe: Recipe, layout: Layout) -> None:
        if not 0 < len(self.entries(layout)) < sum(layout.sizes):
            whole = f"the network's {len(layout.shapes)} parameters"
            raise ConfigError(f"strategy.layers: {list(self.layers)} should name some of {whole}, not all")
        refuse_recalibrated(self.buffers)
        for each in _with_inner(self.inner):
            if isinstance(each, FedSGD):
                raise ConfigError("strategy.inner: fedsgd trains no layer at the client; fedavg does")
            if type(each).client_model not in (Strategy.client_model, Wrapper.client_model):
                raise ConfigError(f"strategy.inner: {type(each).__name__} has personal models of its own")
        ones = torch.ones(sum(layout.sizes))
        if any(v.shape == ones.shape and v.any() for v in self.inner.init_client(ones, layout).values()):
            raise ConfigError("strategy.inner: keeps whole models, which personal layers would not be in")
        super().check(recipe, layout)

    def init_client(self, model: Tensor, layout: Layout) -> State:
        return super().init_client(model, layout) | {"private": model[self.entries(layout)]}

    def client_model(self, server: State, client: State, layout: Layout) -> Tensor:
        return own_model(server, client, self.entries(layout))

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        return keeping(self.entries(local.layout), self.inner.client_update, server, client, local)

    def entries(self, layout: Layout) -> Tensor:
        """The personal entries of the model, as positions."""
        mask = layout.mask(matching(layout.shapes, self.layers, "strategy.layers").__contains__)
        return mask.nonzero().squeeze(1)


def refuse_recalibrated(buffers: Buffers) -> None:
    """Raise ConfigError: the server cannot make statistics of models that only clients have."""
    if buffers == "recalibrated":
        raise ConfigError(
            "strategy.buffers: recalibrated are the statistics of the global model, and clients have layers of "
            "their own; private or average fits"
        )


def own_model(server: State, client: State, entries: Tensor) -> Tensor:
    """(P,) the global model with the client's `private` entries, at these positions."""
    return server["model"].index_copy(0, entries.to(server["model"].device), client["private"])


def keeping(entries: Tensor, half: Half, server: State, client: State, local: LocalObjective) -> Update:
    """What `half` does, from the client's own model on; it keeps what training makes of these entries.

    In all else that is (P,), sent or kept, they are 0: the server sees no change, control variates do nothing.
    """
    x = own_model(server, client, entries)
    entries, recording = entries.to(x.device), RecordingObjective(local)
    update = half(server | {"model": x}, client, recording)
    if len(recording.ends) != 1:
        raise RuntimeError(f"personal layers need one local.train a round, and there were {len(recording.ends)}")

    def shared(state: State) -> State:
        return {n: v.index_fill(0, entries, 0) if v.shape == x.shape else v for n, v in state.items()}

    private = {"private": recording.ends[0][entries]}
    return update._replace(message=shared(update.message), client=shared(update.client) | private)


class RecordingObjective(ObjectiveWrapper):
    """An objective that remembers where each training ended."""

    def __init__(self, inner: LocalObjective):
        super().__init__(inner)
        self.ends: list[Tensor] = []  # each (P,)

    def train(self, start: Tensor, *, loss: Loss | None = None, correct: Correction | None = None) -> Tensor:
        self.ends.append(super().train(start, loss=loss, correct=correct))
        return self.ends[-1]


def _with_inner(strategy: Strategy) -> Iterator[Strategy]:
    yield strategy
    if isinstance(strategy, Wrapper):
        yield from _with_inner(strategy.inner)
