"""The form of what a client sends, where its strategy declares it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.errors import ConfigError
from fedsim.federated.aggregate import WeightedMean
from fedsim.federated.groups import GroupMeans
from fedsim.federated.positions import BUFFERS, GROUP, entries
from fedsim.federated.strategy import Strategy, surveys
from fedsim.training.layout import Layout
from fedsim.types import Entry, Form, State, described, form_of

STATISTICS = Entry(like="buffers")


def message_form(strategy: Strategy, server: State) -> Form | None:
    """The form of a client's message, with batch-norm statistics if they are averaged; None if not declared."""
    if strategy.sends is None:
        return None
    return _form({**strategy.sends, **({"buffers": STATISTICS} if strategy.buffers == "average" else {})}, server)


def answer_form(strategy: Strategy, server: State) -> Form | None:
    """The form of a client's answer to a survey; None if not declared."""
    return None if strategy.survey_sends is None else _form(strategy.survey_sends, server)


def _form(declared: Mapping[str, Entry], server: State) -> Form:
    shapes = {n: server[e.like].shape if e.shape is None else torch.Size(e.shape) for n, e in declared.items()}
    return tuple((n, shapes[n], e.dtype or server[e.like].dtype) for n, e in sorted(declared.items()))


def form_fault(message: State, declared: Form | None, whose: str) -> str | None:
    """What is wrong where a message has another form than `whose` declares."""
    if declared is None or (found := form_of(entries(message))) == declared:
        return None
    return f"{whose}: a client sent {described(found)}; declared is {described(declared)}"


def check_declared(strategy: Strategy, downloaded: State) -> None:
    """Raise ConfigError if an entry is declared like one that clients do not download."""
    for name in ("sends", "survey_sends"):
        for entry, about in (getattr(strategy, name) or {}).items():
            if about.like not in downloaded:
                like = f"is like {about.like!r}, which clients do not download"
                raise ConfigError(f"strategy: {type(strategy).__name__}.{name}: {entry!r} {like}")


def moved_statistics(buffers: Tensor, change: Tensor, layout: Layout) -> Tensor:
    """(Q,) batch-norm statistics after a change. A variance does not fall below 0, as by noise it might."""
    moved, variances = buffers + change, layout.mask(lambda name: name.endswith("running_var"))
    return torch.where(variances.to(moved.device), moved.clamp(min=0), moved)


def check_zeros(strategy: Strategy, server: State) -> None:
    """Raise ConfigError where a strategy cannot have a round without clients."""
    zero_message(strategy, server)
    if surveys(strategy) or not isinstance(strategy.aggregator, WeightedMean | GroupMeans):
        name, needs = type(strategy).__name__, "a survey" if surveys(strategy) else "more than means"
        way = "set it to 1, and let cohorts have clients"
        raise ConfigError(f"failures.min_clients: {name} needs {needs}, which zeros cannot stand for; {way}")


def zero_message(strategy: Strategy, server: State) -> State:
    """What nobody sends: zeros in the declared form, and the server's batch-norm statistics or no change of them.

    Raises ConfigError for a strategy that does not declare what it sends.
    """
    form = message_form(strategy, server)
    if form is None:
        whose = type(strategy).__name__
        raise ConfigError(f"strategy: {whose} does not declare what its clients send, in {whose}.sends")
    device = server["model"].device
    zeros = {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape, dtype in form}
    if isinstance(strategy.aggregator, GroupMeans):
        groups = strategy.aggregator.groups
        zeros = {n: v if n == BUFFERS else v.new_zeros(groups, *v.shape) for n, v in zeros.items()}
        zeros[GROUP] = torch.zeros(groups, dtype=torch.float64)
    as_values = "buffers" in zeros and not strategy.buffers_as_changes
    return zeros | {"buffers": server["buffers"]} if as_values else zeros


def check_changes(strategy: Strategy, whose: str) -> None:
    """Raise ConfigError unless all that the clients of a strategy send are changes of the model.

    For the `check` of a wrapper, `whose` in the message, that scales what its inner strategy sends, or adds noise.
    """
    name, why = type(strategy).__name__, None
    if strategy.sends is None:
        why = f"{name} does not declare what its clients send, in {name}.sends"
    elif others := [entry for entry, about in strategy.sends.items() if not about.change]:
        why = f"{name} sends {others[0]!r}, which is none"
    elif surveys(strategy):
        why = f"{name} also surveys its clients"
    if why:
        raise ConfigError(f"strategy.inner: {whose} takes only changes of the model, and {why}")


def check_stored(what: str, found: Form, made: Form) -> None:
    """Raise ValueError unless a stored state has the form that this version of fedsim makes, by this config."""
    if found != made:
        way = "finish the run with the version of fedsim and the settings that began it, or start a new one"
        raise ValueError(f"{what} {described(found)}; by this config it would be {described(made)}; {way}")
