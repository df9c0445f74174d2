"""The work of a client: training and evaluation, the same functions in every runtime."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fedsim.base.catalogue import Spec
from fedsim.base.global_draws import global_states, keyed_globals, undisturbed_globals
from fedsim.base.modes import own_thread_modes
from fedsim.data import FederatedData
from fedsim.errors import ConfigError, RoundError, WrongReturnError, border, is_own, name_of
from fedsim.federated.aggregate import WEIGHTS, largest
from fedsim.federated.claims import Bounds, StepsMethod, first_wrong, training_bounds, training_claims
from fedsim.federated.federation import SAVED, Federation
from fedsim.federated.message import answer_form, check_declared, form_fault, message_form
from fedsim.federated.positions import WHERE, packed
from fedsim.federated.strategy import (
    Strategy,
    check_state,
    checked_outgoing,
    checked_update,
    defines,
    downloads,
    initial,
    personalises,
)
from fedsim.training.local import ClientObjective
from fedsim.training.objective import KeyedObjective, LocalObjective
from fedsim.training.recipe import Recipe
from fedsim.training.replica import Replica
from fedsim.training.task import Task
from fedsim.types import Form, Job, State, Stream, Update, described, form_of, random

RESERVED = ("buffers", "ema.model", "ema.buffers", *SAVED)  # what no strategy may have in the server's state
PRIVATE = "buffers."  # in a client's state, before the name of a buffer that `model.buffers` makes private

Result = TypeVar("Result")
Work = Callable[[Replica, FederatedData, State, Any], Update]  # the last argument is a Job or a EvaluationChunk


@dataclass(frozen=True)
class Train:
    """One client's training in one round. It sends and stores batch-norm statistics, so that strategies need not.

    With `wait_for_absent`, a runtime on several machines waits for clients that are not connected; otherwise these
    fail at once, unless no other client is left. `config` holds the settings from which this object was made, for
    a runtime that cannot send objects.
    """

    strategy: Strategy
    recipe: Recipe
    seed: int
    time_limit: float | None = None  # seconds
    wait_for_absent: bool = True
    config: Spec | None = field(default=None, compare=False, repr=False)
    cohort: tuple[int, ...] = ()  # the ids of those who are asked to do it, ascending
    is_downloaded: bool = False  # whether it is given what its client downloads, as on a node
    _bounds: dict[tuple[int, torch.dtype, str], Bounds] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )
    _downloaded: list[Form] = field(default_factory=list, init=False, compare=False, repr=False)  # by client 0

    def __call__(self, replica: Replica, data: FederatedData, server: State, job: Job) -> Update:
        server = self.download(server, job)
        local = self.objective(replica, data, server, job)
        draws = replica.draws if self.own_code else None
        update = self.client_update(server, job.client or {}, local, draws, where=f"{_where(job)}: ")
        local.check_time()
        self.check_update(update, job, len(data.rows(job.client_id)), server["model"].dtype)
        return update

    def download(self, server: State, job: Job) -> State:
        """What the client of a job downloads of the broadcast."""
        if self.is_downloaded or not downloads(self.strategy):
            return server
        if not self._downloaded:  # once for all clients
            self._downloaded.append(form_of(download(self.strategy, server, 0)))
        return download(self.strategy, server, job.client_id, self._downloaded[0])

    def objective(
        self, replica: Replica, data: FederatedData, server: State, job: Job, path: tuple[str, ...] = ()
    ) -> ClientObjective:
        """The client of a job; `path` is the part of the round, by which its random numbers differ."""
        client = job.client or {}
        home = client if self.strategy.buffers == "private" else server
        own = private_buffers(client, replica.task)
        return ClientObjective(
            replica, data, job, home["buffers"], self.recipe, self.seed, self.time_limit, own, path, self.cohort
        )

    def bounds(self, num_examples: int, dtype: torch.dtype, most: StepsMethod = "max_steps") -> Bounds:
        """What a client with so many examples may give beside its message; losses have that dtype."""
        key = num_examples, dtype, most  # the same for many clients
        if key not in self._bounds:
            self._bounds[key] = training_bounds(self.strategy, self.recipe, num_examples, dtype, most)
        return self._bounds[key]

    def check_update(self, update: Update, job: Job, num_examples: int, dtype: torch.dtype) -> None:
        """Raise if the update of a client cannot be used.

        ArithmeticError, if the state has another form than before, or a number is not finite; WrongReturnError, if
        a number can never be right; UndeclaredError, if it is larger than the strategy declares.
        """
        check_finite(update.client, job.client or {}, update.numbers()[1])
        whose, where = type(self.strategy).__name__, _where(job)
        with border(f"{where}: {whose}", UndeclaredError):
            bounds = self.bounds(num_examples, dtype)
        _check_claims(update, bounds, where, f"{whose}.client_update", "max_steps")

    @property
    def own_code(self) -> list[str]:
        """The names of what runs here and is the user's own."""
        recipe = self.recipe
        return own_code(self.strategy, recipe.label_loss, recipe.schedule, *recipe.augment)

    def client_update(
        self,
        server: State,
        client: State,
        local: LocalObjective,
        draws: TorchFunctionMode | None,
        where: str = "",
    ) -> Update:
        """The update of the strategy, which draws from `draws`, with metrics and batch-norm statistics.

        `where` is what a line begins with that says that it is not of the declared form.
        """
        made = _with_draws(partial(self.strategy.client_update, server, client), local, draws)
        update = checked_update(self.strategy, made)
        sums = {name: _double(value, server["model"]) for name, value in update.metrics.items()}
        update = update._replace(metrics=local.metrics | sums)
        if own := local.private_buffers:
            update = update._replace(client=update.client | _private_entries(own))
        if self.strategy.buffers == "average":
            buffers = local.buffers - server["buffers"] if self.strategy.buffers_as_changes else local.buffers
            update = update._replace(message=update.message | {"buffers": buffers})
        if self.strategy.buffers == "private":
            update = update._replace(client=update.client | {"buffers": local.buffers})
        update = _outgoing(self.strategy, "outgoing", server, client, update, local, draws)
        update = packed(update, server["model"])
        if fault := form_fault(update.message, self.form(server), f"{type(self.strategy).__name__}.sends"):
            raise UndeclaredError(where + fault)
        return update

    def form(self, server: State) -> Form | None:
        """The form of a message, of clients that are sent `server`; None if the strategy does not declare it."""
        return message_form(self.strategy, server)

    @property
    def may_withhold(self) -> bool:
        """Whether a message may come without some of its metrics."""
        return defines(self.strategy, "outgoing")


@dataclass(frozen=True)
class Survey:
    """One client's answer to what a strategy asks before the training of the same round."""

    train: Train

    def __call__(self, replica: Replica, data: FederatedData, server: State, job: Job) -> Update:
        strategy, dtype = self.train.strategy, server["model"].dtype
        server = self.download(server, job)
        local = self.train.objective(replica, data, server, job, ("survey",))
        client, draws = job.client or {}, replica.draws if self.own_code else None
        made = _with_draws(partial(strategy.survey, server, client), local, draws)
        update = checked_update(strategy, made, "survey")._replace(metrics=local.metrics)
        update = _outgoing(strategy, "outgoing_survey", server, client, update, local, draws)
        local.check_time()
        whose = f"{type(strategy).__name__}.survey"
        if "buffers" in update.message:
            raise WrongReturnError(f"{whose}: gave 'buffers', which is a reserved name")
        if update.client:
            raise WrongReturnError(f"{whose}: gave a client state; what a client keeps comes from client_update")
        check_finite({}, {}, update.numbers()[1])
        update = packed(update, server["model"])
        where = _where(job)
        if fault := form_fault(update.message, self.form(server), f"{type(strategy).__name__}.survey_sends"):
            raise UndeclaredError(f"{where}: {fault}")
        bounds = self.bounds(len(data.rows(job.client_id)), dtype)
        _check_claims(update, bounds, where, whose, "survey_steps")
        return update

    def form(self, server: State) -> Form | None:
        """As in Train."""
        return answer_form(self.train.strategy, server)

    @property
    def may_withhold(self) -> bool:
        """As in Train."""
        return defines(self.train.strategy, "outgoing_survey")

    def download(self, server: State, job: Job) -> State:
        """As in Train."""
        return self.train.download(server, job)

    def bounds(self, num_examples: int, dtype: torch.dtype) -> Bounds:
        """As in Train."""
        return self.train.bounds(num_examples, dtype, "survey_steps")

    @property
    def own_code(self) -> list[str]:
        """As in Train."""
        return self.train.own_code

    @property
    def wait_for_absent(self) -> bool:
        """As in Train."""
        return self.train.wait_for_absent

    @property
    def cohort(self) -> tuple[int, ...]:
        """As in Train."""
        return self.train.cohort


def _where(job: Job) -> str:
    return f"round {job.round + 1}, client {job.client_id}"


def _with_draws(
    ask: Callable[[LocalObjective], Result], local: LocalObjective, draws: TorchFunctionMode | None
) -> Result:
    """What a method of a strategy gives for a client; with `draws` it draws its random numbers from there."""
    if draws is None:
        return ask(local)
    with draws:
        return ask(KeyedObjective(local, draws))


def _outgoing(
    strategy: Strategy,
    method: Literal["outgoing", "outgoing_survey"],
    server: State,
    client: State,
    update: Update,
    local: LocalObjective,
    draws: TorchFunctionMode | None,
) -> Update:
    """What leaves the client of an update; raises WrongReturnError if it trains once more."""
    if not defines(strategy, method):
        return update
    update, sums = update._replace(metrics=dict(update.metrics)), dict(local.metrics)
    ask = partial(getattr(strategy, method), server, client, update)
    made = checked_outgoing(strategy, _with_draws(ask, local, draws), update, method)
    if any(sums.get(name) is not value for name, value in local.metrics.items()):
        raise WrongReturnError(f"{type(strategy).__name__}.{method}: trains, after the training")
    return made._replace(metrics={name: _double(value, server["model"]) for name, value in made.metrics.items()})


def _double(value: Tensor | float, like: Tensor) -> Tensor:
    """() in float64; a number is made on the device of `like`, since a copy from the host cannot be captured."""
    if isinstance(value, Tensor):
        return value.detach().reshape(()).double()
    return like.new_full((), value, dtype=torch.double)


def _check_claims(update: Update, bounds: Bounds, where: str, method: str, steps: str) -> None:
    """Raise if a number of an update is not in its bounds; `steps` is the method that declares the steps."""
    wrong = first_wrong(training_claims(*update.numbers(), bounds))
    if wrong is None:
        return
    if wrong.value <= wrong.most or wrong.value > WEIGHTS[1] or wrong.name == "loss":
        raise WrongReturnError(f"{method}: gave the {wrong}")
    more = "max_weight" if wrong.name == "weight" else f"{steps}; each mini-batch of local.gradient counts"
    raise UndeclaredError(f"{where}: {method}: gave the {wrong}; if more is right, override {more}")


def initial_server_state(
    strategy: Strategy, task: Task, federation: Federation, home: torch.device | None = None, seed: int = 0
) -> State:
    """The server's state before the first round: the strategy's entries and statistics. Raises ConfigError."""
    model = task.initial_model.to(home)
    with (
        keyed_globals(seed, Stream.SERVER),
        border(f"strategy: {type(strategy).__name__}.init_server", ConfigError),
    ):
        own = initial(strategy, "init_server", federation, model)
        check_state(own)
        if "model" not in own or form_of({"model": own["model"]}) != form_of({"model": model}):
            made, right = described(form_of(own)), described(form_of({"model": model}))
            raise WrongReturnError(f"gave {made}; it should give {right}, and what else the server keeps")
        own = {name: value.detach().to(model.device) for name, value in ordinary(own).items()}
    if taken := [name for name in own if name in RESERVED or name.startswith(WHERE)]:
        raise ConfigError(f"strategy: init_server made {taken[0]!r}, which is a reserved name")
    if not isinstance(sent := strategy.broadcast, tuple | list) or [name for name in sent if name not in own]:
        made = f"{type(strategy).__name__}.broadcast is {sent!r}"
        raise ConfigError(
            f"strategy: {made}; it should be a tuple of names that init_server made: {', '.join(own)}"
        )
    own |= {"buffers": task.initial_buffers.to(home)}
    with border("strategy", ConfigError):
        check_declared(strategy, download(strategy, broadcast(strategy, own), 0))
    return own


def broadcast(strategy: Strategy, server: State) -> State:
    """The entries of the server's state that clients need, or of which they download some; not copies."""
    names = [n for n in server if n not in RESERVED] if downloads(strategy) else strategy.broadcast
    return {name: server[name] for name in (*names, "buffers")}


def download(strategy: Strategy, server: State, client: int, right: Form | None = None) -> State:
    """What a client downloads of what `broadcast` gives, in the form `right` of client 0; raises CommonError."""
    if not downloads(strategy):
        return server
    with border(f"{type(strategy).__name__}.download for client {client}", CommonError):
        own = {name: value for name, value in server.items() if name not in RESERVED}
        found = strategy.download(own, client)
        check_state(found)
        if "model" not in found or form_of({"model": found["model"]}) != form_of({"model": server["model"]}):
            made, wanted = described(form_of(found)), described(form_of({"model": server["model"]}))
            raise WrongReturnError(f"gave {made}; it should give {wanted}, and what else clients need")
        if taken := [name for name in RESERVED if name in found]:
            raise WrongReturnError(f"gave {taken[0]!r}, which is a reserved name")
        found = found | {"buffers": server["buffers"]}
        if right is not None and form_of(found) != right:
            made = described(form_of(found))
            raise WrongReturnError(f"gave {made}; it should give {described(right)}, as for client 0")
    return found


def initial_client_state(strategy: Strategy, task: Task, seed: int = 0) -> State:
    """The state of a client before it takes part for the first time. Raises ConfigError."""
    with (
        keyed_globals(seed, Stream.NETWORK),
        border(f"strategy: {type(strategy).__name__}.init_client", ConfigError),
    ):
        own = initial(strategy, "init_client", task.initial_buffers, task.initial_model, task.layout)
        check_state(own)
        own = {name: value.detach().to(task.initial_model.device) for name, value in ordinary(own).items()}
    own |= _private_entries(task.initial_of("private"))
    return own | {"buffers": task.initial_buffers} if strategy.buffers == "private" else own


def private_buffers(client: State, task: Task) -> State:
    """The buffers in a client's state that `model.buffers` makes private, by name; none if it has no state yet."""
    return {n: client[PRIVATE + n] for n in task.initial_of("private") if PRIVATE + n in client}


def _private_entries(buffers: State) -> State:
    return {PRIVATE + name: value for name, value in buffers.items()}


def ordinary(state: State) -> State:
    """The state, with copies of tensors that were made under `torch.inference_mode`, which cannot be trained."""
    made = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.is_inference()}
    return state | {name: value.clone() for name, value in made.items()}


class CommonError(RoundError):
    """A fault in one client of what all clients share: it ends the round, whatever `failures.policy` says."""


class UndeclaredError(CommonError):
    """A strategy gave more than it declares. To leave out the clients where it does would bias the model."""


class SharedStateError(CommonError):
    """A client wrote to the server's state, which all clients share."""


@contextmanager
def states_are_only_read(server: State, client: State) -> Iterator[None]:
    """Raise if the code inside writes to a state in place: SharedStateError if it is the server's."""
    before = [[(name, value, value._version) for name, value in state.items()] for state in (server, client)]

    def written(tensors: list[tuple[str, Tensor, int]]) -> str | None:
        return next((name for name, value, version in tensors if value._version != version), None)

    try:
        yield
    finally:
        if name := written(before[0]):
            raise SharedStateError(f"client_update wrote server[{name!r}] in place; states are only read")
    if name := written(before[1]):
        raise RuntimeError(f"client[{name!r}] was written in place; states are only read")


class GlobalDrawsError(CommonError):
    """A client's numbers came from a generator that all clients share."""


def own_code(*parts: object) -> list[str]:
    """The names of those of these objects, and of strategies inside them, that are a user's own."""
    names = list[str]()
    for part in parts:
        while part is not None:
            names += [name_of(part)] if is_own(part) else []
            part = getattr(part, "inner", None)
    return names


def keyed_only(
    work: Work, task: Task, device: torch.device, run: Callable[[], Sequence[Update]]
) -> Sequence[Update]:
    """The updates of `run`; raises GlobalDrawsError if a user's code in it draws from global generators.

    Another thread may have moved a generator: if it moves again, two runs must agree, and not leave it in the same
    state, as seeding does.
    """
    if not (own := [*getattr(work, "own_code", ()), *task.own_code]):
        return run()
    tries = list[tuple[dict[str, object], Sequence[Update], dict[str, object]]]()
    for around in (nullcontext, undisturbed_globals, undisturbed_globals):
        with (
            around(),
            own_thread_modes(always=True),
        ):  # those that a user's code leaves behind are not the next client's
            before = global_states(device)
            updates = run()
            after = global_states(device)
        if after == before:
            return updates
        tries.append((before, updates, after))
    (_, earlier, left), (before, updates, after) = tries[1:]
    if all(map(equal, earlier, updates)) and not any(before[name] != after[name] == left[name] for name in before):
        return updates
    names = " and ".join(name for name in before if before[name] != after[name])
    raise GlobalDrawsError(
        f"{' or '.join(dict.fromkeys(own))} draws from {names}, or seeds it; all clients share it. "
        "In strategies and networks, torch.randn and most of torch's samplers are seeded by client; augmentations "
        "get a generator"
    )


def equal(a: Update, b: Update) -> bool:
    """Whether two updates agree to the bit."""
    mine, theirs = (u.message | u.client | u.metrics | {"": torch.as_tensor(u.weight)} for u in (a, b))
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def check_finite(state: State, before: State, sums: Mapping[str, float]) -> None:
    """Raise ArithmeticError if a client's state has another form than `before`, or a number is not finite."""
    if form_of(state) != form_of(before):
        raise ArithmeticError(f"its state is {described(form_of(state))}, and was {described(form_of(before))}")
    for name, value in state.items():
        if value.is_floating_point() and not isfinite(largest(value)):
            raise ArithmeticError(f"its state has {name}, which is not finite")
    for name, number in sums.items():
        if not isfinite(number):
            raise ArithmeticError(f"{name} is not finite")


@dataclass(frozen=True)
class EvaluateClient:
    """The client's own model on its held-out examples, or on its training examples if none are held out.

    With `train`, a last batch of one example joins the one before: batch norm needs two. The `training` is that of
    the rounds, for strategies whose clients train their own model.
    """

    training: Train
    batch_size: int
    train: bool = False
    wait_for_absent: bool = True  # as in Train

    @property
    def own_code(self) -> list[str]:
        """As in Train."""
        return self.training.own_code

    @property
    def cohort(self) -> tuple[int, ...]:
        """As in Train."""
        return self.training.cohort

    def download(self, server: State, job: Job) -> State:
        """As in Train."""
        return self.training.download(server, job)

    def __call__(self, replica: Replica, data: FederatedData, server: State, job: Job) -> Update:
        model, buffers, own = self._model(replica, data, self.download(server, job), job)
        batches = data.own_batches(job.client_id, self.batch_size, 1 + self.train)
        return _evaluate(replica, model, buffers, batches, self.train, own)

    def _model(
        self, replica: Replica, data: FederatedData, server: State, job: Job
    ) -> tuple[Tensor, Tensor, State]:
        """(P,) the client's own model, (Q,) its statistics, and its private buffers by name."""
        strategy, client = self.training.strategy, job.client or {}
        if personalises(strategy):
            job = job._replace(round=max(job.round, 0))  # it is -1 before the first one
            local = self.training.objective(replica, data, server, job, ("personalise",))
            ask = partial(strategy.personalise, server, client)
            found = _with_draws(ask, local, replica.draws if self.own_code else None)
            local.check_time()
            model, buffers = found if isinstance(found, tuple) and len(found) == 2 else (found, local.buffers)
            own, method = local.private_buffers, "personalise"
        else:
            key = self.training.seed, Stream.NETWORK, job.round + 1, job.client_id
            replica.draws.begin(int(random(*key).integers(2**63)))
            with replica.draws if self.own_code else nullcontext():
                model = strategy.client_model(server, client, replica.task.layout)
            buffers, own = client.get("buffers", server["buffers"]), private_buffers(client, replica.task)
            method = "client_model"
        for made, like in ((model, server["model"]), (buffers, server["buffers"])):
            if not (isinstance(made, Tensor) and made.shape == like.shape):
                gave = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
                right = f"it should give {tuple(like.shape)}"
                raise WrongReturnError(f"{type(strategy).__name__}.{method}: gave {gave}; {right}")
        return model, buffers, own


class EvaluationChunk(NamedTuple):
    """A part of the test set: rows `first` to `last` - 1."""

    first: int
    last: int


@dataclass(frozen=True)
class EvaluateGlobal:
    """The global model on one chunk of the test set."""

    train: bool = False

    def __call__(self, replica: Replica, data: FederatedData, server: State, chunk: EvaluationChunk) -> Update:
        batch = data.test_batch(torch.arange(*chunk))
        return _evaluate(replica, server["model"], server["buffers"], [batch], self.train, {})


def _evaluate(
    replica: Replica,
    model: Tensor,
    buffers: Tensor,
    batches: Iterable[tuple[Tensor, Tensor]],
    train: bool,
    private_buffers: State,
) -> Update:
    """Sums over examples, in eval mode, or with `train` in training mode; the message is empty."""
    replica.begin_client(buffers, seed=0, private=private_buffers)
    replica.load(model)
    loss, correct, examples = (model.new_zeros((), dtype=torch.double) for _ in range(3))
    with torch.no_grad():
        for x, y in batches:
            logits = replica.forward(x, train=train)[0].to(model.dtype)
            loss += replica.task.losses(logits, y).sum(dtype=torch.double)
            correct += (logits.argmax(-1) == y).sum()
            examples += len(y)
    return Update({}, 1.0, metrics={"loss": loss, "correct": correct, "examples": examples})
