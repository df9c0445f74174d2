"""What a node does: it joins runs that its owner allows, and trains and evaluates on its own examples.

It computes with the very same functions as a simulation's workers. Nothing here knows how messages travel.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from operator import lt
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Self, get_args

import numpy as np
import torch
from pydantic import AfterValidator

from fedsim.base.catalogue import Options, Spec, options_of, validated
from fedsim.base.devices import devices, one_thread
from fedsim.base.files import expanded
from fedsim.base.reading import read_yaml
from fedsim.data import AUGMENTATIONS, DATASETS, Dataset, FederatedData
from fedsim.data.federated import Shard
from fedsim.errors import ConfigError, RoundError, located, one_line
from fedsim.experiment.checkpoint import versions
from fedsim.experiment.config import overridden
from fedsim.federated.aggregate import largest
from fedsim.federated.client import (
    EvaluateClient,
    Survey,
    Train,
    broadcast,
    download,
    initial_client_state,
    initial_server_state,
)
from fedsim.federated.federation import Federation
from fedsim.federated.fold import cause, compact
from fedsim.federated.message import check_stored
from fedsim.federated.positions import check_positions
from fedsim.flower.meaning import check_meaning, notes_on
from fedsim.flower.messages import NAME, Answer, Finished, Invitation, Joined, Order, failure
from fedsim.flower.plan import Allow, Examples, Parts, Plan, digest, parts_of
from fedsim.flower.state_files import RUN, Keep, StateFiles, StoredState, needed
from fedsim.flower.transport import ROUNDED, TRANSPORTS, encode
from fedsim.runtimes.worker import Worker
from fedsim.training.precision import check_precision
from fedsim.training.small_batches import clients_to_leave_out
from fedsim.types import Form, Job, Positive, State, described, form_of

MAX_ROUNDS = 10**9 - 1


def _name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError(f"{name[:70]!r} should be 1 to 64 letters, digits and -._, a letter or digit first")
    return name


class NodeSettings(Options):
    """The settings in a NODE.yaml: the node's name, its data, and what it allows others.

    `name` is what the federation knows it by; `data` names a dataset, whose training examples it trains on, and
    on whose test examples, if there are any, it evaluates its own model. `state` is where its client's states are
    kept, by default under $XDG_STATE_HOME or ~/.local/state; a run's go `forget_after` days after its last
    message. When a run has reached its end, the node keeps what `keep` says: only its plan and the `last` state,
    from which the run can still be made longer, `all`, or `nothing`. Paths are relative to the file's folder.

    `superlink` is host:port of Flower's SuperLink, `ca` a file with the certificate of its authority, `key` the
    private key that the node signs with; `insecure` is plain HTTP.
    """

    name: Annotated[str, AfterValidator(_name)]
    data: Spec | str
    state: Path | None = None
    device: str = "auto"
    allow: Allow = Allow()
    keep: Keep = "last"
    forget_after: Positive = 90.0  # days
    superlink: str = "127.0.0.1:8000"
    ca: Path | None = None
    key: Path | None = None
    insecure: bool = False

    @classmethod
    def read(cls, path: Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """The settings of a file, with `overrides` by dotted keys; raises ConfigError.

        Paths in the file are relative to its folder, and those in `overrides` to that of this process.
        """
        overrides = overrides or {}
        return cls.of(overridden(read_yaml(path), overrides), path.parent, overrides)

    @classmethod
    def of(cls, values: Mapping[str, Any], folder: Path = Path(), given: Collection[str] = ()) -> Self:
        """The settings of a mapping; raises ConfigError.

        Paths are relative to `folder`, those of the dotted keys in `given` to the folder of this process.
        """
        settings = validated(cls, values)

        def at(key: str, path: Path) -> Path:
            own = any(f"{key}.".startswith(f"{each}.") for each in given)
            return (Path() if own else folder) / expanded(path, key)

        data = DATASETS.resolve(settings.data)
        fields = options_of(DATASETS.load(data["name"])).model_fields
        paths = {n for n, field in fields.items() if Path in (field.annotation, *get_args(field.annotation))}
        own = settings.data if isinstance(settings.data, dict) else {"name": settings.data}  # without defaults
        data = own | {name: str(at(f"data.{name}", Path(data[name]))) for name in paths if data[name] is not None}
        places = {name: at(name, path) for name in ("state", "ca", "key") if (path := getattr(settings, name))}
        return settings.model_copy(update={"data": data, **places})

    @property
    def home(self) -> Path:
        """The folder of the node's own states; raises ConfigError where there is no home folder for it."""
        if self.state:
            return self.state / self.name
        default = Path(os.environ.get("XDG_STATE_HOME") or expanded(Path("~/.local/state"), "state"))
        return default / "fedsim" / self.name


def opened(settings: NodeSettings) -> tuple[torch.device, Dataset]:
    """A node's device and data; raises ConfigError where its settings cannot be used."""
    settings.allow.check_importable()
    device, dataset = devices(settings.device, "device")[0], DATASETS.make(settings.data, Dataset)
    dataset.check_parts("train")
    return device, dataset


@dataclass
class Role:
    """A node's part in a run: `initial_client` is the state it starts from, `sent` the form of orders."""

    run: str
    plan: str  # its digest
    parts: Parts
    train: Train
    worker: Worker
    initial_client: State
    sent: Form
    notes: tuple[str, ...] = ()  # on its data, for both sides
    client: int | None = None  # its id, from the first order on
    last: tuple[int, StoredState] | None = None  # version, and what is on disk
    done: tuple[Order, Answer] | None = None  # the last training


class Node:
    """A node between two messages; raises ConfigError where its settings cannot be used.

    It waits up to `lock_wait` seconds for another process that uses its folder. Not for two threads at once.
    """

    def __init__(self, settings: NodeSettings, lock_wait: float = 0.0):
        self.settings = settings
        self.device, self.dataset = opened(settings)
        self.state_files = StateFiles(
            settings.home,
            settings.forget_after,
            lock_wait,
            max_disk=settings.allow.max_disk,
            max_new_runs=settings.allow.max_new_runs,
        )
        self.role: Role | None = None  # of the run that it worked for last
        self.refusal: str | None = None  # why it does not take part in the run that it was invited to last

    def close(self) -> None:
        """Unlock the folder, so that another process can be this node."""
        self.state_files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def join(self, invitation: Invitation) -> Joined:
        """Join a run and save that; the answer says why where the node does not."""
        run, plan, initial = invitation
        self.role = None  # two networks may not fit into memory, and the last is on disk
        try:
            if not RUN.fullmatch(run):
                raise ConfigError(f"run: {run[:40]!r} is no run's id")
            self.state_files.admit(run)
            with one_thread():
                role = self._role(run, plan, initial)
            self.state_files.join(run, plan, initial)
        except Exception as error:
            self.refusal = _error_line(error)
            return Joined(self.settings.name, versions(), self.refusal)
        self.role, self.refusal = role, None
        n = len(self.dataset.y_train)
        return Joined(self.settings.name, versions(), None, n, len(self.dataset.y_test) or n, role.notes)

    def work(self, order: Order) -> Answer:
        """Train or evaluate; the answer says why where that fails. Raises only what ends the process."""
        began = perf_counter()
        try:
            with one_thread():
                return self._work(order, began)
        except Exception as error:
            return failure(_error_line(error), seconds=perf_counter() - began)

    def finish(self, finished: Finished) -> str | None:
        """Forget what the owner does not keep of a run that has ended; returns why, where that fails."""
        if self.role and self.role.run == finished.run:
            self.role = None
        try:
            self.state_files.finish(finished.run, finished.version, self.settings.keep)
        except (OSError, ValueError) as error:
            return _error_line(error)
        return None

    def _work(self, order: Order, began: float) -> Answer:
        role = self._known(order)
        if role is None:
            if order.version:  # an invitation would not bring back a state that is not here
                self.state_files.load(order.run, order.client, order.version, order.mark)
            return failure("does not know the plan", lost=True)
        self._check(order, role)
        if role.done and _same(order, role.done[0]):  # of which the answer was lost on its way
            return role.done[1]
        role.done = None
        self.state_files.touch(order.run)
        kept = self._stored_state(order, role)
        role.client = order.client
        training = order.task == "train"
        stores = training and (role.initial_client or order.transport in ROUNDED)
        if stores:
            kept = self._make_room(order, kept)
        train = replace(role.train, cohort=order.cohort)
        work: Survey | Train | EvaluateClient = train if training else Survey(train)
        if order.task == "evaluate":
            work = EvaluateClient(train, order.batch_size, order.train_mode)
        server = {name: value.to(self.device) for name, value in order.server.items()}
        job = Job(order.client, order.round, _below("client", kept.state))
        update = role.worker.run(work, server, job)
        if isinstance(update, BaseException):
            return failure(cause(update), seconds=perf_counter() - began)
        metrics = {name: float(value) for name, value in update.metrics.items()}
        message = {name: compact(value.detach()) for name, value in update.message.items()}
        check_positions(message)  # encoded, wrong ones would be others
        encoded, left = encode(message, order.transport, _below("residual", kept.state))
        examples = 0 if order.task == "evaluate" else len(self.dataset.y_train)
        answer = Answer(encoded, float(update.weight), metrics, examples, 0, 0, perf_counter() - began)
        if not training:
            return answer
        if stores:
            client = _above("client", {name: compact(value) for name, value in update.client.items()})
            kept = self._store(order, role, kept._replace(state=client | _above("residual", left)))
            answer = answer._replace(version=order.round + 1, mark=kept.mark)
        answer = answer._replace(seconds=perf_counter() - began)
        role.done = order._replace(checkpoints=()), answer
        return answer

    def _known(self, order: Order) -> Role | None:
        """The node's part in the order's run, if it has joined with this plan; raises ConfigError."""
        if not RUN.fullmatch(order.run):
            raise ConfigError(f"run: {order.run[:40]!r} is no run's id")
        here = self.role is not None and (self.role.run, self.role.plan) == (order.run, order.plan)
        if not (here and self.state_files.has(order.run)):  # its owner may have deleted it
            joined = self.state_files.joined(order.run)
            if joined is None or digest(joined[0]) != order.plan:
                return None
            self.role = None
            self.role = self._role(order.run, *joined)
        return self.role

    def _role(self, run: str, text: str, initial: State) -> Role:
        """The node's part under a plan; raises ConfigError if it is not allowed, or does not fit the data."""
        allow, plan = self.settings.allow, Plan.read(text)
        allow.check_names(plan)
        allow.check_bytes(initial)
        if (n := len(self.dataset.y_train)) > (plan.max_examples or n):
            most = f"allowed in this run: up to {plan.max_examples}"
            raise ConfigError(f"failures.max_examples: this node has {n} training examples; {most}")
        data = self.shard(plan.examples)
        allow.check_numbers(plan, initial)
        parts = parts_of(plan, initial, data.trial_examples())
        data.check_augment([AUGMENTATIONS.resolve(spec) for spec in plan.local["augment"]])
        check_precision(parts.recipe.precision, self.device)
        task, strategy, recipe = parts
        clients_to_leave_out(task, data, recipe)
        federation = Federation.of(np.zeros(plan.clients, dtype=np.int64))
        made = initial_server_state(strategy, task, federation)
        sent = form_of(download(strategy, broadcast(strategy, made), 0))
        train = Train(strategy, recipe, plan.seed, plan.time_limit, is_downloaded=True)
        worker = Worker(task, data.to(self.device), self.device, graphs=True)
        state, notes = initial_client_state(strategy, task, plan.seed), tuple(notes_on(data, plan.examples))
        return Role(run, digest(text), parts, train, worker, state, sent, notes)

    def shard(self, form: Examples) -> Shard:
        """The node's examples in the federation's form; raises ConfigError where they do not fit."""
        shard = Shard(self.dataset, classes=form.classes, scale=form.scale, shift=form.shift, crop=form.crop)
        everyone = np.zeros(len(self.dataset.y_train), dtype=np.int64)
        own = FederatedData(self.dataset, everyone, clients=1, crop=form.crop)
        check_meaning(own, form, self.settings.data if isinstance(self.settings.data, dict) else {})
        return shard

    def _check(self, order: Order, role: Role) -> None:
        """Raise ValueError if an order cannot belong to this run."""
        evaluates = order.task == "evaluate"
        most = self.settings.allow.max_batch_size
        for name, value, low, high in (
            ("round", order.round, 0, MAX_ROUNDS - 1),
            ("client", order.client, 0, 2**31),
            ("version", order.version, 0, order.round + evaluates),
            ("batch_size", order.batch_size, 1, most),
        ):
            if not low <= value <= high:
                raise ValueError(f"order.{name}: {str(value)[:20]} should be from {low} to {high}")
        cohort = order.cohort
        if cohort and not (
            cohort[0] >= 0 and all(map(lt, cohort, cohort[1:])) and order.client in cohort and cohort[-1] <= 2**31
        ):
            raise ValueError("order.cohort: should be ids of clients, this one's among them, ascending")
        if order.transport not in TRANSPORTS:
            raise ValueError(f"order.transport: {order.transport[:20]!r} is none of {', '.join(TRANSPORTS)}")
        if role.client not in (None, order.client):
            raise ValueError(f"order.client: {order.client}, and in this run the node is client {role.client}")
        self.settings.allow.check_bytes(order.server)
        if (found := form_of(order.server)) != role.sent:
            raise ValueError(f"order.server: is {described(found)}, and should be {described(role.sent)}")
        for name, tensor in order.server.items():
            if tensor.is_floating_point() and not isfinite(largest(tensor)):
                raise ValueError(f"order.server: {name} has values that are not finite")

    def _stored_state(self, order: Order, role: Role) -> StoredState:
        """The stored state that the order names; raises ValueError if the node does not have it unchanged."""
        if order.version == 0:
            return StoredState(_above("client", role.initial_client))
        if role.last is None or (role.last[0], role.last[1].mark) != (order.version, order.mark):
            role.last = None
            try:
                kept = self.state_files.load(order.run, order.client, order.version, order.mark)
            except ValueError:
                self.state_files.forget_stateless(order.run)
                raise
            found = form_of(_below("client", kept.state))
            check_stored(f"state {order.version} is", found, form_of(role.initial_client))
            role.last = order.version, kept
        return role.last[1]

    def _make_room(self, order: Order, kept: StoredState) -> StoredState:
        """Delete the states that no checkpoint of the run needs; raises ConfigError where a new one does not fit.

        Returns what is kept, with the earlier versions that are still needed.
        """
        most = self.settings.allow.max_states
        if (asked := len(order.checkpoints)) > most:
            raise ConfigError(f"allow.max_states: {asked:,} checkpoints; allowed on this node: up to {most:,}")
        earlier = needed(order.version, kept.earlier, order.checkpoints)
        self.state_files.prune(order.run, order.version, {*earlier, order.round + 1})
        self.state_files.check_room(order.run, sum(value.nbytes for value in kept.state.values()))
        return kept._replace(earlier=earlier)

    def _store(self, order: Order, role: Role, kept: StoredState) -> StoredState:
        kept = self.state_files.store(order.run, order.client, order.round + 1, kept)
        role.last = order.round + 1, kept
        return kept


def _same(order: Order, other: Order) -> bool:
    """Whether two orders are for the same work."""
    if order._replace(server={}, checkpoints=()) != other._replace(server={}, checkpoints=()):
        return False
    return all(torch.equal(value, other.server[name]) for name, value in order.server.items())


def _error_line(error: Exception) -> str:
    """The error in one line; if it is not one of fedsim's checks, with file and line."""
    if isinstance(error, OSError) and error.filename:
        return one_line(f"{error.filename}: {error.strerror}")
    return (
        one_line(error)
        if isinstance(error, ArithmeticError | ValueError | OSError | RoundError)
        else located(error)
    )


def _above(part: str, state: State) -> State:
    return {f"{part}.{name}": value for name, value in state.items()}


def _below(part: str, state: State) -> State:
    return {n.removeprefix(f"{part}."): value for n, value in state.items() if n.startswith(f"{part}.")}
