"""The base class of federated algorithms: hyper-parameters, and pure functions of states."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from fedsim.base.catalogue import asks, check_methods
from fedsim.errors import ConfigError, WrongReturnError, one_line
from fedsim.federated.aggregate import Aggregator, WeightedMean
from fedsim.federated.federation import Federation
from fedsim.federated.groups import MAX_GROUPS, GroupMeans
from fedsim.federated.positions import BUFFERS, fault_of, is_reserved
from fedsim.federated.rows import mean_of_rows
from fedsim.training.layout import Layout
from fedsim.training.objective import LocalObjective
from fedsim.training.recipe import Recipe
from fedsim.types import METRIC_NAMES, Entry, RoundInfo, State, Update, is_metric_name, is_number

Buffers = Literal["average", "private", "frozen", "recalibrated"]
DECLARED = {"client_update": "sends", "survey": "survey_sends"}  # what is declared of what a method sends
FURTHER = {"init_server": "federation", "init_client": "buffers"}  # a parameter that a method may have besides


@dataclass(frozen=True, kw_only=True)
class Strategy(ABC):
    """An algorithm: its part at one client and its part at the server. Its fields are hyper-parameters only.

    `broadcast` names the entries of the server's state that clients download. `buffers` says how batch-norm
    statistics are handled: the weighted `average` of the cohort, `private` to each client, `frozen` at their
    initial values, or `recalibrated` by the server for each new model. They are separate from the model, and the
    methods of a strategy do not handle them.

    `aggregator` says what the server gets of the messages: their weighted mean, with `GroupMeans(G)` that of each
    of G groups, or with `Rows()` all of them.
    `survey_aggregator` is the same for the answers to `survey`. `min_clients` is the number of clients whose
    messages each round needs, or `all`; with 0, a round without any gets zeros of the form that `sends` declares,
    as the mean. With `uses_public`, `info.public` is an objective over the server's own examples.

    `sends` declares the entries of a client's message, and `survey_sends` those of its answer to `survey`;
    messages of another form are then refused. A subclass with a `client_update` of its own has a `sends` of its
    own, or none. With `buffers_as_changes`, batch-norm statistics are sent as changes of the server's.

    `metrics` names the numbers that each `client_update` gives as `Update.metrics`; their sums over the cohort are
    `info.metrics`, and are kept in rounds.jsonl.
    """

    buffers: Buffers = "average"

    broadcast: ClassVar[tuple[str, ...]] = ("model",)
    aggregator: ClassVar[Aggregator] = WeightedMean()
    survey_aggregator: ClassVar[Aggregator] = WeightedMean()
    uses_public: ClassVar[bool] = False
    min_clients: ClassVar[int | Literal["all"]] = 1
    sends: ClassVar[Mapping[str, Entry] | None] = None
    survey_sends: ClassVar[Mapping[str, Entry] | None] = None
    buffers_as_changes: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        for method, declaration in DECLARED.items():
            if method in vars(cls) and declaration not in vars(cls):
                setattr(cls, declaration, None)  # what it inherits is about another method
        if "server_update" in vars(cls) and "min_clients" not in vars(cls) and cls.min_clients == 0:
            cls.min_clients = 1  # zeros may be wrong for it

    def check(self, recipe: Recipe, layout: Layout) -> None:  # noqa: B027 - most strategies accept all settings
        """Raise ConfigError, with the setting's name, if recipe or network violate the algorithm's assumptions."""

    def init_server(self, model: Tensor) -> State:
        """The server's state before the first round; `model` is (P,).

        With a further parameter `federation`, it is also given what is known of the clients then: N and their
        sizes, which are 0 for nodes, since they join later.
        """
        return {"model": model}

    def init_client(self, model: Tensor, layout: Layout) -> State:
        """A client's state before it first takes part; each `Update.client` must have the same form.

        With a further parameter `buffers`, it is also given (Q,) the initial batch-norm statistics.
        """
        return {}

    def download(self, server: State, client_id: int) -> State:
        """What a client is sent of the server's state, in a form that is the same for all; `broadcast` by default.

        It has `model` (P,), and may have names of its own. It must depend on its arguments alone.
        """
        return {name: server[name] for name in self.broadcast}

    @abstractmethod
    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        """One client in one round. It must not branch on the value of a tensor, nor write to a state in place."""

    @abstractmethod
    def server_update(self, server: State, mean: State, info: RoundInfo) -> State:
        """The entries of the server's state that change; `mean` is the weighted mean of the messages.

        With `Rows`, each entry has a row for each client instead, (C, ...), in the order of `info.cohort`, and
        `buffers` (C, Q) are their batch-norm statistics, if these are averaged.
        """

    def server_buffers(self, rows: Tensor, info: RoundInfo) -> Tensor:
        """With `Rows`, (Q,) the server's new batch-norm statistics of the clients' (C, Q), if these are averaged.

        By default their weighted mean: a rule that is to withstand hostile clients overrides it.
        """
        return mean_of_rows(rows, info.weights)

    def survey(self, server: State, client: State, local: LocalObjective) -> Update:
        """What the server asks each client of the cohort before the training of the same round.

        By default there is no such exchange. It changes no state of a client. Its random numbers and batch-norm
        statistics are its own, so that the training does not depend on it.
        """
        return Update({}, weight=0.0)

    def surveyed(self, server: State, mean: State, info: RoundInfo) -> State:
        """The entries of the server's state that change before the training; `mean` is that of the answers."""
        return {}

    def outgoing(self, server: State, client: State, update: Update, local: LocalObjective) -> Update:
        """What leaves a client: its whole update, with batch-norm statistics as `message["buffers"]` and metrics.

        It is the last thing that happens to it, for wrappers that change or withhold a part. Metrics may be left
        out, and none added; nothing is trained here. `client` is the state before the round, `update.client` the
        new one.
        """
        return update

    def outgoing_survey(self, server: State, client: State, update: Update, local: LocalObjective) -> Update:
        """As `outgoing`, for the answer to a survey."""
        return update

    def select(self, server: State, mean: State, info: RoundInfo) -> list[int]:
        """The ids of those clients of `info.cohort`, which have answered the survey, that train."""
        return info.cohort

    def client_model(self, server: State, client: State, layout: Layout) -> Tensor:
        """(P,) the model that a client uses for its own examples; personalised strategies override it."""
        return server["model"]

    def personalise(self, server: State, client: State, local: LocalObjective) -> Tensor | tuple[Tensor, Tensor]:
        """As `client_model`, where it is trained for the evaluation; on the client's training examples only.

        (P,) the model, or that and (Q,) its batch-norm statistics, by default those of `local`. It changes no
        state, and has random numbers of its own. The learning rate is that of the last round.
        """
        return self.client_model(server, client, local.layout)

    def max_weight(self, num_examples: int, num_steps: int) -> float:
        """The largest weight of an update from a client of n_k examples and K_k steps; n_k by default.

        A client whose update has a larger one fails: no client counts for more than the algorithm says.
        """
        return num_examples

    def max_steps(self, num_steps: int, epoch_steps: int) -> int:
        """The most mini-batch gradients that a client computes in a round; K_k by default.

        `train` takes `num_steps` (K_k), and `gradient` of all examples `epoch_steps`. A strategy that trains twice
        gives 2 * num_steps, and one that also computes the gradient of F_k num_steps + epoch_steps.
        """
        return num_steps

    def survey_steps(self, num_steps: int, epoch_steps: int) -> int:
        """As `max_steps`, for a survey; they take as long on the virtual clock. 0 by default."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Wrapper(Strategy):
    """A strategy around an inner one: passes all calls on to it; subclasses override some of them."""

    inner: Strategy

    buffers: ClassVar[Buffers] = property(lambda self: self.inner.buffers)  # type: ignore[misc, assignment]

    @property
    def broadcast(self) -> tuple[str, ...]:  # type: ignore[override]
        """The `broadcast` of the inner strategy."""
        return self.inner.broadcast

    @property
    def aggregator(self) -> Aggregator:  # type: ignore[override]
        """The `aggregator` of the inner strategy."""
        return self.inner.aggregator

    @property
    def survey_aggregator(self) -> Aggregator:  # type: ignore[override]
        """The `survey_aggregator` of the inner strategy."""
        return self.inner.survey_aggregator

    @property
    def uses_public(self) -> bool:  # type: ignore[override]
        """The `uses_public` of the inner strategy."""
        return self.inner.uses_public

    @property
    def min_clients(self) -> int | Literal["all"]:  # type: ignore[override]
        """The `min_clients` of the inner strategy."""
        return self.inner.min_clients

    @property
    def sends(self) -> Mapping[str, Entry] | None:  # type: ignore[override]
        """The `sends` of the inner strategy."""
        return self.inner.sends

    @property
    def survey_sends(self) -> Mapping[str, Entry] | None:  # type: ignore[override]
        """The `survey_sends` of the inner strategy."""
        return self.inner.survey_sends

    @property
    def buffers_as_changes(self) -> bool:  # type: ignore[override]
        """The `buffers_as_changes` of the inner strategy."""
        return self.inner.buffers_as_changes

    @property
    def metrics(self) -> tuple[str, ...]:  # type: ignore[override]
        """The `metrics` of the inner strategy; one that adds some gives `(*self.inner.metrics, ...)`."""
        return self.inner.metrics

    def check(self, recipe: Recipe, layout: Layout) -> None:
        self.inner.check(recipe, layout)

    def init_server(self, model: Tensor, federation: Federation | None = None) -> State:
        return initial(self.inner, "init_server", federation, model)

    def init_client(self, model: Tensor, layout: Layout, buffers: Tensor | None = None) -> State:
        return initial(self.inner, "init_client", buffers, model, layout)

    def download(self, server: State, client_id: int) -> State:
        return self.inner.download(server, client_id)

    def client_update(self, server: State, client: State, local: LocalObjective) -> Update:
        return checked_update(self.inner, self.inner.client_update(server, client, local))

    def server_update(self, server: State, mean: State, info: RoundInfo) -> State:
        return self.inner.server_update(server, mean, info)

    def survey(self, server: State, client: State, local: LocalObjective) -> Update:
        return checked_update(self.inner, self.inner.survey(server, client, local), "survey")

    def surveyed(self, server: State, mean: State, info: RoundInfo) -> State:
        return self.inner.surveyed(server, mean, info)

    def outgoing(self, server: State, client: State, update: Update, local: LocalObjective) -> Update:
        return checked_outgoing(self.inner, self.inner.outgoing(server, client, update, local), update)

    def outgoing_survey(self, server: State, client: State, update: Update, local: LocalObjective) -> Update:
        made = self.inner.outgoing_survey(server, client, update, local)
        return checked_outgoing(self.inner, made, update, "outgoing_survey")

    def select(self, server: State, mean: State, info: RoundInfo) -> list[int]:
        return self.inner.select(server, mean, info)

    def server_buffers(self, rows: Tensor, info: RoundInfo) -> Tensor:
        return self.inner.server_buffers(rows, info)

    def client_model(self, server: State, client: State, layout: Layout) -> Tensor:
        return self.inner.client_model(server, client, layout)

    def personalise(self, server: State, client: State, local: LocalObjective) -> Tensor | tuple[Tensor, Tensor]:
        if type(self).client_model is Wrapper.client_model:
            return self.inner.personalise(server, client, local)
        return self.client_model(server, client, local.layout)

    def max_weight(self, num_examples: int, num_steps: int) -> float:
        return self.inner.max_weight(num_examples, num_steps)

    def max_steps(self, num_steps: int, epoch_steps: int) -> int:
        return self.inner.max_steps(num_steps, epoch_steps)

    def survey_steps(self, num_steps: int, epoch_steps: int) -> int:
        return self.inner.survey_steps(num_steps, epoch_steps)

    def entry(self, name: str) -> str:
        """The full name of an entry of this wrapper's own, in the state of a client or the server or in a message.

        The wrappers around and inside of this one have other names, so that equal ones do not share an entry.
        """
        inside, inner = 0, self.inner
        while isinstance(inner, Wrapper):
            inside, inner = inside + 1, inner.inner
        return f"wrapper{inside}.{name}"


def initial(strategy: Strategy, method: Literal["init_server", "init_client"], more: Any, *given: Any) -> State:
    """What a method gives that has these arguments, and `more` where it asks for that.

    Raises ConfigError where a wrapper has not passed it on.
    """
    init: Callable[..., State] = getattr(strategy, method)
    if not asks(init, name := FURTHER[method]):
        return init(*given)
    if more is None and not isinstance(strategy, Wrapper):
        whose = f"{type(strategy).__name__}.{method}"
        raise ConfigError(f"strategy: {whose} needs {name}, which the strategy around it got and did not pass on")
    return init(*given, **{name: more})


def surveys(strategy: Strategy) -> bool:
    """Whether there is an exchange before the training.

    A wrapper that does nothing with the answers only passes the survey of the inner strategy on.
    """
    if not isinstance(strategy, Wrapper):
        return defines(strategy, "survey")
    uses_answers = any(_itself_defines(strategy, method) for method in ("surveyed", "select"))
    return surveys(strategy.inner) or (uses_answers and _itself_defines(strategy, "survey"))


def personalises(strategy: Strategy) -> bool:
    """Whether clients train the model that they use themselves."""
    return defines(strategy, "personalise")


def downloads(strategy: Strategy) -> bool:
    """Whether what a client is sent depends on the client."""
    return defines(strategy, "download")


def defines(strategy: Strategy, method: str) -> bool:
    """Whether the strategy, or one in it, defines this method."""
    return _itself_defines(strategy, method) or (isinstance(strategy, Wrapper) and defines(strategy.inner, method))


def _itself_defines(strategy: Strategy, method: str) -> bool:
    return getattr(type(strategy), method) not in (getattr(Strategy, method), getattr(Wrapper, method))


def check_strategy(strategy: object) -> None:
    """Raise ConfigError unless it is a Strategy, whose methods, and those of its inner ones, can be called."""
    if not isinstance(strategy, Strategy):
        raise ConfigError(f"strategy: {strategy!r} is no Strategy")
    check_methods(strategy, Strategy, "strategy", FURTHER)
    if strategy.buffers not in get_args(Buffers):
        allowed = ", ".join(get_args(Buffers))
        raise ConfigError(f"strategy.buffers: {strategy.buffers!r} is unknown; allowed: {allowed}")
    for name in ("aggregator", "survey_aggregator"):
        if isinstance(kind := getattr(strategy, name), type) or not isinstance(kind, Aggregator):
            raise ConfigError(f"strategy.{name}: {kind!r} is no aggregator; fedsim.Rows() is one")
        if isinstance(kind, GroupMeans) and not (type(kind.groups) is int and 1 <= kind.groups <= MAX_GROUPS):
            raise ConfigError(f"strategy.{name}: {kind!r} should have from 1 to {MAX_GROUPS} groups")
    for name in DECLARED.values():
        _check_declaration(strategy, name)
    for name in () if surveys(strategy) else ("surveyed", "select"):
        if defines(strategy, name):
            raise ConfigError(
                f"strategy: {type(strategy).__name__} defines {name}, and no survey that comes before"
            )
    if (least := strategy.min_clients) != "all" and (type(least) is not int or least < 0):
        raise ConfigError(f"strategy.min_clients: {least!r} should be a whole number >= 0, or all")
    names = strategy.metrics
    if not (isinstance(names, tuple | list) and all(map(is_metric_name, names)) and len({*names}) == len(names)):
        right = f"a tuple of different names, each of {METRIC_NAMES}"
        raise ConfigError(f"strategy.metrics: {one_line(repr(names))} should be {right}")
    if isinstance(strategy, Wrapper):
        check_strategy(strategy.inner)
        _check_outgoing(strategy)


def _check_outgoing(wrapper: Wrapper) -> None:
    """Raise ConfigError if a wrapper sees what clients send, and not what they answer to a survey."""
    sees = [_itself_defines(wrapper, method) for method in ("outgoing", "outgoing_survey")]
    if sees == [True, False] and surveys(wrapper.inner):
        name, inner = type(wrapper).__name__, type(wrapper.inner).__name__
        misses = f"{name} defines outgoing, and {inner} also surveys its clients"
        raise ConfigError(f"strategy: {misses}; it should define outgoing_survey, for their answers")


def _check_declaration(strategy: Strategy, name: str) -> None:
    """Raise ConfigError unless what a strategy declares of its messages is nothing, or entries by name."""
    declared, whose = getattr(strategy, name), f"strategy: {type(strategy).__name__}.{name}"
    if declared is None:
        return
    if not isinstance(declared, Mapping) or not all(type(entry) is Entry for entry in declared.values()):
        raise ConfigError(f"{whose} is {declared!r}; it should be a dictionary of fedsim.Entry by name, or None")
    for entry in declared:
        if not isinstance(entry, str):
            raise ConfigError(f"{whose} has {entry!r} as a name; names are strings")
        if entry == BUFFERS or is_reserved(entry):
            raise ConfigError(f"{whose} has {entry!r}, which is a reserved name")


def check_state(state: object, noun: str = "state", whose: str = "") -> None:
    """Raise WrongReturnError unless it is a dictionary of named tensors."""
    if not isinstance(state, dict):
        made = type(state).__name__
        raise WrongReturnError(f"{whose}gave {made} as its {noun}; it should be a dictionary of named tensors")
    for name, value in state.items():
        if not isinstance(name, str):
            raise WrongReturnError(f"{whose}gave {name!r} as a name in its {noun}; names are strings")
        if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided:
            made = str(value.layout) if type(value) is Tensor else type(value).__name__
            way = "value.to_dense()" if type(value) is Tensor else "torch.as_tensor(value)"
            right = f"it should be a dense tensor, such as {way}"
            raise WrongReturnError(f"{whose}gave {made} as {name!r} in its {noun}; {right}")


def checked_update(strategy: Strategy, update: object, method: str = "client_update") -> Update:
    """The update that a method of the strategy gave; raises WrongReturnError where it is none."""
    whose = f"{type(strategy).__name__}.{method}: "
    checked = _checked_parts(update, whose)
    declared = {*strategy.metrics} if method == "client_update" else set[str]()
    given = checked.metrics.keys()
    if given != declared and not (given < declared and defines(strategy, "outgoing")):  # which may give the others
        made = f"{whose}gave the metrics {one_line(repr([*given]))}"
        raise WrongReturnError(f"{made}; {type(strategy).__name__}.metrics declares {[*strategy.metrics]}")
    return checked


def checked_outgoing(strategy: Strategy, made: object, update: Update, method: str = "outgoing") -> Update:
    """What a method of the strategy made of an update; raises WrongReturnError unless it is an update like it."""
    whose = f"{type(strategy).__name__}.{method}: "
    checked = _checked_parts(made, whose)
    may_add = strategy.metrics if method == "outgoing" else ()
    if invented := checked.metrics.keys() - update.metrics.keys() - {*may_add}:
        raise WrongReturnError(
            f"{whose}gave the metrics {min(invented)!r}, which neither the update has nor `metrics` declares"
        )
    return checked


def _checked_parts(update: object, whose: str) -> Update:
    if not isinstance(update, Update):
        made = type(update).__name__
        raise WrongReturnError(f"{whose}gave {made}; it should give fedsim.Update(message, weight)")
    check_state(update.message, "message", whose)
    check_state(update.client, "client state", whose)
    check_state(update.where, "where", whose)
    if fault := fault_of(update):
        raise WrongReturnError(f"{whose}{fault}")
    weight = update.weight
    if not is_number(weight):
        made = f"of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else repr(weight)
        raise WrongReturnError(
            f"{whose}gave the weight {made}; it should be one number, such as local.num_examples"
        )
    if not isinstance(update.metrics, dict) or not all(isinstance(name, str) for name in update.metrics):
        raise WrongReturnError(f"{whose}gave the metrics {one_line(repr(update.metrics))}; names are strings")
    if wrong := [name for name, value in update.metrics.items() if not is_number(value)]:
        raise WrongReturnError(f"{whose}gave the metric {wrong[0]}, which is not one number")
    return update
