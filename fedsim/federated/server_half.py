"""The server's half of a round: what a strategy makes of the messages, and the checks on what it gives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedsim.base.global_draws import keyed_globals
from fedsim.data import FederatedData
from fedsim.errors import ConfigError, RoundError, WrongReturnError, border
from fedsim.federated.aggregate import Aggregator, largest
from fedsim.federated.client import RESERVED, Train, ordinary
from fedsim.federated.cohort import ids
from fedsim.federated.federation import Federation
from fedsim.federated.positions import GROUP, WHERE, is_reserved
from fedsim.federated.rows import Rows
from fedsim.federated.strategy import Strategy, check_state
from fedsim.training.local import ClientObjective
from fedsim.training.objective import LocalObjective
from fedsim.training.replica import Replica
from fedsim.types import (
    Job,
    Records,
    RoundInfo,
    State,
    Stream,
    Update,
    described,
    form_of,
    same_values,
    torch_generator,
)

Method = Literal["server_update", "surveyed", "select"]
KEYS: dict[str, tuple[int, ...]] = {"server_update": (), "surveyed": (1,), "select": (2,)}  # of random numbers
AGGREGATE = "aggregate."  # before the names of its entries, beside those of the server's state
STOPPED = "stopped"  # of what a job gives, the reason as text in UTF-8


class Facts(NamedTuple):
    """What is known of a round, or of the survey before it."""

    number: int
    weights: dict[int, float]  # of the clients that have answered
    num_clients: int
    cohort_examples: int
    total_examples: int | None
    federation: Federation
    metrics: Mapping[str, float] = {}  # sums of the strategy's own

    def info(
        self,
        seed: int,
        method: Method,
        records: Records,
        aggregate: State,
        public: LocalObjective | None = None,
    ) -> tuple[RoundInfo, State]:
        """The same for a strategy, and what it gets of the aggregate besides."""
        noise = torch_generator(seed, Stream.SERVER, self.number, *KEYS[method])
        weights = torch.tensor([*self.weights.values()], dtype=torch.float64)
        about = self.number, [*self.weights], self.num_clients, noise, self.cohort_examples, self.total_examples
        info = RoundInfo(*about, weights, public, self.federation, self.metrics, records)
        if GROUP in aggregate:
            info = info._replace(group_weights=aggregate[GROUP])
        where = {n.removeprefix(WHERE): value for n, value in aggregate.items() if n.startswith(WHERE)}
        covered = {name: value if value.is_floating_point() else value.bool() for name, value in where.items()}
        own = {name: value for name, value in aggregate.items() if not is_reserved(name)}
        return info._replace(covered=covered), own


@dataclass(frozen=True)
class ServerHalf:
    """One method of a strategy at the server, in one round.

    It is also a work for one job, which has a network: the server's own examples are then `info.public`. What the
    strategy records is then in the job's result, for `take_records`.
    """

    method: Method
    train: Train
    facts: Facts
    records: Records = field(default_factory=Records)  # of the round

    def __call__(self, replica: Replica, data: FederatedData, server: State, job: Job) -> Update:
        """The entries that change; `server` has those of the aggregate, too, with AGGREGATE before their names."""
        aggregate = {n.removeprefix(AGGREGATE): value for n, value in server.items() if n.startswith(AGGREGATE)}
        own = {name: value for name, value in server.items() if not name.startswith(AGGREGATE)}
        train, buffers = self.train, own["buffers"]
        local = ClientObjective(replica, data, job, buffers, train.recipe, train.seed, path=("public",))
        half = replace(self, records=replace(self.records, numbers={**self.records.numbers}))
        changed, records = half.changed(own, aggregate, local), half.records
        numbers = {name: torch.tensor(value, dtype=torch.double) for name, value in records.numbers.items()}
        reason = torch.tensor([*(records.stopped or "").encode()], dtype=torch.uint8)  # an Update has only tensors
        return Update(changed, 1.0, {STOPPED: reason}, numbers)

    def take_records(self, made: Update) -> None:
        """Take over what a job has recorded."""
        self.records.numbers |= made.numbers()[1]
        self.records.stopped = bytes(made.client[STOPPED].tolist()).decode() or None

    def changed(self, server: State, aggregate: State, public: LocalObjective | None = None) -> State:
        """The entries of the server's state that change; raises RoundError."""
        rows = aggregate.get("buffers")  # of statistics
        seed, strategy = self.train.seed, self.train.strategy
        info, aggregate = self.facts.info(seed, self.method, self.records, aggregate, public)
        own = {name: value for name, value in server.items() if name not in RESERVED}
        copy = {name: value.clone() for name, value in own.items()}  # which the strategy may write to
        with self._border(self.method):
            with keyed_globals(seed, Stream.SERVER, self.facts.number, *KEYS[self.method]):
                update = getattr(strategy, self.method)(copy, aggregate, info)
            check_state(update)
            _check_update(update, own)
            kept = {name: value for name, value in copy.items() if name not in update}
            if lost := [
                name for name, value in kept.items() if not (name in own and same_values(value, own[name]))
            ]:
                raise WrongReturnError(
                    f"changed server[{lost[0]!r}] and did not return it; return {{{lost[0]!r}: ...}}"
                )
            made = {name: value.detach().to(own[name].device) for name, value in ordinary(update).items()}
        return made if rows is None else made | self._buffers(rows, info, server)

    def selected(self, server: State, aggregate: State) -> list[int]:
        """The ids of the clients that train; raises RoundError."""
        info, aggregate = self.facts.info(self.train.seed, self.method, self.records, aggregate)
        own = {name: value.clone() for name, value in server.items() if name not in RESERVED}
        with self._border("select"):
            with keyed_globals(self.train.seed, Stream.SERVER, self.facts.number, *KEYS["select"]):
                chosen = self.train.strategy.select(own, aggregate, info)
            chosen = ids(chosen, self.facts.num_clients)
            if strange := {*chosen} - self.facts.weights.keys():
                raise WrongReturnError(f"gave client {min(strange)}, which has not answered the survey")
        return sorted(chosen)

    def _buffers(self, rows: Tensor, info: RoundInfo, server: State) -> State:
        """The statistics that the strategy makes of the clients' rows (C, Q)."""
        with self._border("server_buffers"):
            with keyed_globals(self.train.seed, Stream.SERVER, self.facts.number):
                made = {"buffers": self.train.strategy.server_buffers(rows, info)}
            check_state(made)
            if form_of(made) != (right := form_of({"buffers": server["buffers"]})):
                raise WrongReturnError(f"gave {described(form_of(made))}; it should give {described(right)}")
            if not isfinite(largest(made["buffers"])):
                raise WrongReturnError("gave statistics that are not finite")
            return {name: value.detach().to(server["buffers"].device) for name, value in ordinary(made).items()}

    def _border(self, method: str) -> border:
        return border(f"round {self.facts.number + 1}: {type(self.train.strategy).__name__}.{method}", RoundError)


def split_statistics(aggregate: State, aggregator: Aggregator) -> tuple[State, State]:
    """What the strategy gets of an aggregate, and the mean of the statistics, if there is one.

    Of rows it gets the statistics, too.
    """
    if isinstance(aggregator, Rows) or "buffers" not in aggregate:
        return aggregate, {}
    return {n: v for n, v in aggregate.items() if n != "buffers"}, {"buffers": aggregate["buffers"]}


def check_rows(aggregate: State, clients: Sequence[int], runtime: str) -> None:
    """Raise WrongReturnError where a runtime gave messages of more or fewer clients than it reported."""
    if wrong := {len(value) for value in aggregate.values()} - {len(clients)}:
        ran = f"runtime: {runtime}.run gave messages of {min(wrong)} clients"
        raise WrongReturnError(f"{ran}, and reports on {len(clients)}")


def check_public(strategy: Strategy, data: FederatedData) -> None:
    """Raise ConfigError where a strategy needs examples of the server's own, and there are none."""
    if strategy.uses_public and not len(data.public):
        name = type(strategy).__name__
        raise ConfigError(
            f"data.public: {name} needs examples of the server's own; set it to a share, such as 0.01"
        )


def _check_update(update: State, own: State) -> None:
    """Raise WrongReturnError if an update has unknown entries, another form, or a model that is not finite."""
    if unknown := [name for name in update if name not in own]:
        made = ", ".join(own)
        raise WrongReturnError(f"gave {unknown[0]!r}, which init_server did not make; it made {made}")
    if form_of(update) != form_of({name: own[name] for name in update}):
        made = described(form_of({name: own[name] for name in update}))
        raise WrongReturnError(f"gave {described(form_of(update))}, and init_server made {made}")
    if "model" in update and not isfinite(largest(update["model"])):
        raise WrongReturnError("gave a model that is not finite")
