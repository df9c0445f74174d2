"""The round loop: sample a cohort, train, aggregate, update. Only `Simulation` changes from round to round."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import fsum, isfinite
from time import perf_counter
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from annotated_types import Ge

from fedsim.base.catalogue import Spec, asks
from fedsim.base.devices import one_thread
from fedsim.base.files import uninterrupted
from fedsim.base.global_draws import keyed_globals
from fedsim.base.modes import own_modes
from fedsim.data import FederatedData
from fedsim.data.dataset import Ints
from fedsim.data.federated import batch_sizes
from fedsim.errors import (
    NO_STATE,
    ClientError,
    ConfigError,
    NodeError,
    RoundError,
    WrongReturnError,
    border,
    forget_variables,
    is_own,
    name_of,
)
from fedsim.federated.aggregate import Aggregator, largest
from fedsim.federated.availability import Attempt, Availability
from fedsim.federated.claims import clients_above, training_bounds
from fedsim.federated.client import (
    EvaluateClient,
    EvaluateGlobal,
    EvaluationChunk,
    Survey,
    Train,
    broadcast,
    download,
    initial_client_state,
    initial_server_state,
)
from fedsim.federated.cohort import Cohort, ids, may_be_empty
from fedsim.federated.federation import Federation, Past
from fedsim.federated.fold import cause
from fedsim.federated.groups import GroupMeans
from fedsim.federated.message import check_zeros, moved_statistics, zero_message
from fedsim.federated.pace import Pace
from fedsim.federated.recalibration import Recalibrate, Recalibration, check_recalibration
from fedsim.federated.rows import Rows
from fedsim.federated.runtime import Runtime, check_once, check_runtime, outcomes, results
from fedsim.federated.server_half import (
    AGGREGATE,
    Facts,
    Method,
    ServerHalf,
    check_public,
    check_rows,
    split_statistics,
)
from fedsim.federated.store import ClientStore
from fedsim.federated.strategy import Strategy, check_strategy, surveys
from fedsim.training.recipe import Recipe
from fedsim.training.small_batches import clients_to_leave_out
from fedsim.training.task import Task
from fedsim.types import (
    Count,
    Job,
    Positive,
    Records,
    Report,
    State,
    Stream,
    Update,
    hash_into,
    random,
    same_values,
)


@dataclass(frozen=True, kw_only=True)
class Failures:
    """What happens if a client fails: `raise` stops the run, `drop` continues without it.

    A round needs answers from `min_clients` clients, and with `drop` it fails as soon as fewer are left. With 0 it
    may have none, as `cohort: poisson` can draw none; their mean is then 0. A client fails if it raises an
    exception, if its message or state is not finite or has other tensors than those of most clients, or if it
    takes longer than `time_limit` seconds, which is checked before each batch and at the end.

    No client may hold more than `max_examples` training examples, by which most strategies weight it. A node with
    more cannot join; in a simulation such clients end the start of the run, or with `drop` are left out.
    """

    policy: Literal["raise", "drop"] = "raise"
    min_clients: Annotated[int, Ge(0)] = 1
    time_limit: Positive | None = None
    max_examples: Count | None = None


class Round(NamedTuple):
    """The result of a round."""

    round: int  # from 1
    cohort: list[int]
    train_loss: float | None  # mean of the minimised loss over all mini-batches of all clients
    fingerprint: str  # SHA-256 of the global model's bytes
    seconds: float
    steps: int  # of all clients
    bytes_up: int
    bytes_down: int
    failed: dict[str, str]  # the reason, by client
    absent: dict[str, str]  # the reason, by client, for those that `availability` removed
    clock: float  # virtual seconds since the start of the first round; 0 without availability
    metrics: dict[str, float] = {}  # the strategy's own: sums over clients, and what the server recorded
    stopped: str | None = None  # why the strategy ends the run after this round

    def record(self) -> dict[str, Any]:
        """The fields by name, as rounds.jsonl has them: metrics and stopped only where there are any."""
        return {name: v for name, v in self._asdict().items() if v or name not in self._field_defaults}


Metrics = dict[str, float]  # sums over examples
MOST_CAUSES = 20  # that the error of a round names


class Evaluation(NamedTuple):
    """Means over examples."""

    loss: float
    accuracy: float  # from 0 to 1


class Answers(NamedTuple):
    """What clients have answered: in a survey, or in a training."""

    aggregate: State
    reports: list[Report]  # by client
    failed: dict[int, str]  # the reason, by client


class Trained(NamedTuple):
    """What a round has changed, up to where it is."""

    server: State
    reports: list[Report] = []
    failed: dict[int, str] = {}
    absent: dict[int, str] = {}  # who answered the survey, and did not train
    surveyed: list[Report] = []
    bytes_down: int = 0  # after the survey


class Simulation:
    """The state of a federation between two rounds: only `server`, `clients`, `past`, `number` and `clock` change.

    `server` is the strategy's state, the batch-norm statistics and, with `ema`, a running mean of both model and
    statistics: it starts at the initial ones, and after each update ema = d ema + (1 - d) model (Tarvainen &
    Valpola 2017, https://arxiv.org/abs/1703.01780). Clients do not train from it. `clients` are the states of all
    clients that have taken part, and `past` is what is known of their last trainings; `number` is the number of
    the next round, from 0; `clock` counts virtual seconds. Nothing else is needed to continue, since random
    numbers depend on a key: (seed, use, round, client). `last` is the result of the last round. `pace` remembers
    the times of clients, so that several workers start with the slowest.
    """

    @own_modes()
    def __init__(
        self,
        strategy: Strategy,
        task: Task,
        data: FederatedData,
        runtime: Runtime,
        cohort: Cohort,
        recipe: Recipe,
        *,
        aggregator: Aggregator | None = None,
        failures: Failures = Failures(),
        availability: Availability | None = None,
        clients: ClientStore | None = None,
        recalibrate: Recalibrate | None = None,
        ema: float | None = None,
        seed: int = 0,
        config: Spec | None = None,
    ):
        check_strategy(strategy)
        check_runtime(runtime)
        recipe.check(data.num_classes)
        data.check_augmented(recipe.augment)
        with border(f"strategy: {type(strategy).__name__}.check", ConfigError):
            strategy.check(recipe, task.layout)
        with border(f"strategy: {type(strategy).__name__}", ConfigError):
            for most in ("max_steps", "survey_steps"):
                training_bounds(strategy, recipe, max(int(data.sizes.max()), 1), task.initial_model.dtype, most)
        if availability:
            if data.clients_are_remote:
                raise ConfigError(
                    "availability: is only simulated, and these clients run on real machines; leave it out"
                )
            availability.check(data.num_clients)
        check_recalibration(recalibrate, strategy.buffers, task, data)
        check_public(strategy, data)
        drop = failures.policy == "drop"
        self.left_out = clients_to_leave_out(task, data, recipe, drop=drop)  # and why
        self.left_out |= clients_above(failures.max_examples, data, drop=drop)
        self.strategy, self.task, self.data, self.runtime, self.cohort = strategy, task, data, runtime, cohort
        self.recipe, self.failures, self.availability, self.seed = recipe, failures, availability, seed
        self.config = config
        with border(f"runtime: {type(runtime).__name__}.check", ConfigError, lambda _: not is_own(runtime)):
            runtime.check(self.work)
        self.aggregator = strategy.aggregator if aggregator is None else aggregator
        needed = type(strategy.aggregator)
        if needed in (Rows, GroupMeans) and not isinstance(self.aggregator, needed):
            given = f"{type(strategy).__name__} needs {needed.__name__}, and was given {type(aggregator).__name__}"
            raise ConfigError(f"aggregator: {given}; leave it out")
        self.recalibrate, self.decay = recalibrate, ema
        self.past = Past.none(data.num_clients)
        self.server: State = initial_server_state(strategy, task, self.federation, runtime.home, seed)
        if data.new_clients:
            with border("evaluate.new_clients", ConfigError):
                self.work.download(broadcast(strategy, self.server), Job(data.num_clients, 0, None))
        if ema is not None:
            self.server |= {f"ema.{name}": self.server[name] for name in ("model", "buffers")}
        self.initial_client = runtime.placeholder_state(initial_client_state(strategy, task, seed))
        self.clients = clients if clients is not None else ClientStore()
        self.pace = Pace()
        self.number, self.clock = 0, 0.0
        self.last: Round | None = None
        self._check_cohort()

    @property
    def newcomer(self) -> State:
        """The old name of `initial_client`, for one release."""
        return self.initial_client

    @property
    def federation(self) -> Federation:
        """What is known of the clients before the next round."""
        return Federation.of(self.data.sizes, self.past)

    @property
    def work(self) -> Train:
        """The training of each client of a cohort."""
        wait = self.failures.policy == "raise"
        return Train(self.strategy, self.recipe, self.seed, self.failures.time_limit, wait, self.config)

    def sample(self) -> list[int]:
        """The cohort of the next round. Raises ConfigError."""
        with border(f"cohort: {name_of(self.cohort)}", ConfigError):
            chosen = self._drawn()
            if is_own(self.cohort) and self._drawn() != chosen:
                raise WrongReturnError(f"gave two cohorts for one round; {NO_STATE}")
            return chosen

    def _check_cohort(self) -> None:
        """Raise ConfigError if no cohort can be drawn, or if one may be too small."""
        size = 0 if may_be_empty(self.cohort) else len(self.sample())
        has = f"has {size} clients" if size else "may have no clients"
        if (least := self.failures.min_clients) > size:
            way = "" if size else "; set it to 0 if the mean is then to be 0"
            raise ConfigError(f"failures.min_clients: {least}, and a cohort {has}{way}")
        if self._needs[0] > size:
            larger = "make the cohort larger, or change the strategy's options"
            way = larger if size else "one for which a mean of zeros is right declares `min_clients: ClassVar = 0`"
            raise ConfigError(f"strategy: {self._needs[1]}, and a cohort {has}; {way}")
        if not self._needs[0]:
            check_zeros(self.strategy, self._first_download(self.server))

    def _drawn(self) -> list[int]:
        more = {"federation": self.federation} if asks(self.cohort, "federation") else {}
        with keyed_globals(self.seed, Stream.COHORT, self.number):
            drawn = self.cohort(self.data.num_clients, random(self.seed, Stream.COHORT, self.number), **more)
        return ids(drawn, self.data.num_clients, empty=not self._needs[0])

    @own_modes()
    def round(
        self,
        after_client: Callable[[Report], None] = lambda report: None,
        before_client: Callable[[int], None] = lambda client: None,
    ) -> Round:
        """Run one round, and call `before_client` and `after_client` when a client starts or finishes.

        Raises ClientError or RoundError; the simulation is then unchanged.
        """
        start = perf_counter()
        with border(f"round {self.number + 1}", RoundError):
            goal = self.sample()
            self.recipe.check_schedule(self.number)
        selected, attempt = self._attempt(goal)
        trained, records = Trained(self.server), Records()
        try:
            if len(attempt.reporting) >= self._needs[0]:
                with one_thread():
                    trained = self._train(selected, attempt.reporting, records, after_client, before_client)
            server, reports, failed = trained.server, trained.reports, trained.failed
            counted = [report for report in reports if report.client_id not in failed]
            metrics = [report.metrics for report in counted]
            sums, losses = _sums(metrics), _sums(m for m in metrics if {"loss", "examples"} <= m.keys())
            asked = _sums(report.metrics for report in trained.surveyed)
            done = Round(
                round=self.number + 1,
                cohort=selected,
                train_loss=losses["loss"] / losses["examples"] if losses.get("examples") else None,
                fingerprint=fingerprint_of(server),
                seconds=perf_counter() - start,
                steps=int(sums.get("steps", 0) + asked.get("steps", 0)),
                bytes_up=sum(r.bytes_up for r in [*reports, *trained.surveyed]),
                bytes_down=self._size(self.server) * len(selected) + trained.bytes_down,
                failed={str(client): cause for client, cause in failed.items()},
                absent={str(client): cause for client, cause in sorted((attempt.absent | trained.absent).items())},
                clock=self.clock + attempt.seconds,
                metrics={n: sums[n] for n in self.strategy.metrics if n in sums} | records.numbers,
                stopped=records.stopped,
            )
            with uninterrupted():
                self.clients.commit()
                self.past.record(self.number, counted, attempt.client_seconds)
                self.server, self.number, self.clock, self.last = server, done.round, done.clock, done
        except BaseException:
            self.clients.discard()
            raise
        self.clients.tidy()
        return done

    @property
    def ema(self) -> State | None:
        """The running mean of the global model: `model` (P,) and `buffers` (Q,); None without the option `ema`."""
        if self.decay is None:
            return None
        return {name: self.server[f"ema.{name}"] for name in ("model", "buffers")}

    @own_modes()
    def evaluate(self, batch_size: int = 500, server: State | None = None, *, train: bool = False) -> Evaluation:
        """Evaluate the global model on the whole test set, in eval mode; all runtimes give the same numbers.

        `server` may be another `model` (P,) with its `buffers` (Q,), such as `ema`. With `train`, batch norm uses
        the statistics of each batch, and dropout is active; a last batch of one example joins the one before.
        """
        server = self.server if server is None else server
        sizes = batch_sizes(self.data.num_test, batch_size, 1 + train)
        chunks = [EvaluationChunk(*bounds) for bounds in pairwise(accumulate(sizes, initial=0))]
        found, done = list[Metrics](), list[int]()
        with closing(outcomes(self.runtime, EvaluateGlobal(train), server, chunks)) as tested:
            for chunk, outcome in tested:
                if isinstance(outcome, BaseException):
                    where = f"test after round {self.number}, examples {chunk.first} to {chunk.last - 1}"
                    raise RoundError(f"{where}: {cause(outcome)}") from outcome
                found.append({name: float(value) for name, value in outcome.metrics.items()})
                done.append(chunk.first)
        check_once(self.runtime, "map", "examples from", done, [chunk.first for chunk in chunks])
        return _mean(_sums(found))

    @own_modes()
    def evaluate_clients(
        self,
        clients: Iterable[int] | None = None,
        batch_size: int = 500,
        *,
        train: bool = False,
        after_failure: Callable[[int, str], None] = lambda client, why: None,
    ) -> dict[int, Evaluation]:
        """Evaluate the own model of each client, or of the given `clients`, on its own examples; by client.

        These are its held-out examples, or its training examples if none are held out. With failures.policy=drop,
        clients that fail are left out, and `after_failure` is called with each of them and the reason.
        """
        chosen = range(self.data.num_clients) if clients is None else list(clients)
        drop = self.failures.policy == "drop"
        work = EvaluateClient(self.work, batch_size, train, wait_for_absent=not drop)
        sums, done = dict[int, Metrics](), list[int]()
        jobs = (self._job(k, self.number - 1) for k in chosen)
        with closing(outcomes(self.runtime, work, self._download(self.server), jobs)) as tested:
            for job, outcome in tested:
                done.append(job.client_id)
                if not isinstance(outcome, BaseException):
                    sums[job.client_id] = {name: float(value) for name, value in outcome.metrics.items()}
                elif not drop:
                    raise self._client_error(job.round, job.client_id, cause(outcome), outcome) from outcome
                else:
                    after_failure(job.client_id, cause(outcome))
        check_once(self.runtime, "map", "client", done, chosen)
        return {client: _mean(sums[client]) for client in chosen if client in sums}

    def digest(self) -> str:
        """SHA-256 of the data and the networks' constants, on which a run depends besides settings and state."""
        constants = self.task.constants()
        if not constants:
            return self.data.digest()
        digest = hashlib.sha256(self.data.digest().encode())
        hash_into(digest, constants)
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 of the global model's bytes, batch-norm statistics included."""
        return fingerprint_of(self.server)

    @property
    def _needs(self) -> tuple[int, str]:
        """The least number of clients whose messages a round needs, and what says so."""
        wanted, needed = self.failures.min_clients, self.strategy.min_clients
        needed, says = (self.data.num_clients, "all clients") if needed == "all" else (needed, str(needed))
        if needed > wanted:
            return needed, f"{type(self.strategy).__name__} needs {says}"
        return wanted, f"failures.min_clients is {wanted}"

    def _download(self, server: State) -> State:
        """The entries of the server's state that clients need, as copies."""
        return {name: value.clone() for name, value in broadcast(self.strategy, server).items()}

    def _size(self, server: State) -> int:
        """How many bytes a client downloads, which are as many for each."""
        return sum(value.nbytes for value in self._first_download(server).values())

    def _first_download(self, server: State) -> State:
        """What client 0 downloads, in the form that it has for all; not copies."""
        return download(self.strategy, broadcast(self.strategy, server), 0)

    def _attempt(self, cohort: list[int]) -> tuple[list[int], Attempt]:
        """The selected clients, and which of them report."""
        if not self.availability:
            return cohort, Attempt(cohort, {}, 0.0)
        about = self.seed, self.number
        selected = self.availability.select(cohort, self.data.num_clients, *about)
        attempt = self.availability.attempt(selected, self._all_steps(selected), len(cohort), *about)
        least, says = self._needs
        if attempt.absent and len(attempt.reporting) < least:
            few = f"round given up: {len(attempt.reporting)} left, and {says}"
            absent = attempt.absent | dict.fromkeys(attempt.reporting, few)
            attempt = attempt._replace(reporting=[], absent=dict(sorted(absent.items())))
        return selected, attempt

    def _train(
        self,
        selected: list[int],
        reporting: list[int],
        records: Records,
        after_client: Callable[[Report], None],
        before_client: Callable[[int], None],
    ) -> "Trained":
        """What a round has changed; clients' new states are staged."""
        failed = {client: self.left_out[client] for client in reporting if client in self.left_out}
        cohort = [client for client in reporting if client not in failed]
        asked = [client for client in selected if client not in self.left_out]
        self._check_min_clients(len(cohort), failed)
        before = Trained(self.server, failed=failed)
        if surveys(self.strategy):
            before = self._survey(asked, cohort, failed, records)
            asked = cohort = [client for client in cohort if client not in before.failed | before.absent]
        called = before_client, after_client
        work = replace(self.work, cohort=tuple(asked))
        found = self._answers(work, before.server, cohort, before.failed, self.aggregator, *called)
        server = self._after("server_update", before.server, found, self.aggregator, records)
        server = self._with_ema_and_recalibration(server)
        return before._replace(server=server, reports=found.reports, failed=found.failed)

    def _survey(self, asked: list[int], cohort: list[int], failed: dict[int, str], records: Records) -> "Trained":
        """What the survey has changed, and which clients do not train."""
        aggregator = self.strategy.survey_aggregator
        work = Survey(replace(self.work, cohort=tuple(asked)))
        found = self._answers(work, self.server, cohort, failed, aggregator)
        server = self._after("surveyed", self.server, found, aggregator, records)
        chosen = self._half("select", found, records).selected(server, found.aggregate)
        least, says = self._needs
        if len(chosen) < least:
            raise RoundError(f"round {self.number + 1}: {len(chosen)} clients were selected, and {says}")
        others = [client for client in cohort if client not in found.failed and client not in {*chosen}]
        absent = dict.fromkeys(others, "not selected after the survey")
        return Trained(server, [], found.failed, absent, found.reports, self._size(server) * len(chosen))

    def _answers(
        self,
        work: Train | Survey,
        server: State,
        cohort: list[int],
        failed: dict[int, str],
        aggregator: Aggregator,
        before_client: Callable[[int], None] = lambda client: None,
        after_client: Callable[[Report], None] = lambda report: None,
    ) -> "Answers":
        """What the clients of a cohort have answered; `failed` are those that will not be asked."""
        if not cohort:
            return Answers(zero_message(self.strategy, self._first_download(server)), [], failed)
        total, reports, asked = aggregator.fold([]), list[Report](), len(cohort) + len(failed)
        sent, failed = self._download(server), dict(failed)
        # Results that are equal only up to rounding may depend on the order, so this must not depend on time.
        by_pace = self.runtime.workers > 1 and self.runtime.exact and isinstance(work, Train)
        steps = self._steps(cohort) if by_pace else {}
        order = self.pace.order(steps) if by_pace else cohort

        def jobs() -> Iterator[Job]:
            for client in order:
                before_client(client)
                yield self._job(client)

        with closing(results(self.runtime, work, sent, jobs(), aggregator)) as running:
            for partial, finished in running:
                total = aggregator.merge(total, partial)
                for report in finished:
                    self._raise_if_failed(report)
                    forget_variables(report.exception)  # of a client that is dropped
                    if report.error is not None:
                        failed[report.client_id] = report.error
                    if report.client:
                        self.clients.stage(report.client_id, report.client)
                    if report.error is None and by_pace:
                        self.pace.measured(report.client_id, steps[report.client_id], report.seconds)
                    reports.append(report._replace(client={}, exception=None))
                    after_client(report)
                self._check_min_clients(asked - len(failed), failed)
        reports.sort(key=lambda report: report.client_id)
        check_once(self.runtime, "run", "client", [report.client_id for report in reports], cohort)
        if written := [name for name, value in sent.items() if not same_values(value, server[name])]:
            method = "client_update" if isinstance(work, Train) else "survey"
            wrote = f"{method} wrote server[{written[0]!r}] in place, through .data or .numpy()"
            raise RoundError(f"round {self.number + 1}: {wrote}; states are only read")
        mismatched = aggregator.mismatched(total)
        if mismatched and self.failures.policy == "raise":
            client, why = min(mismatched.items())
            raise ClientError(f"round {self.number + 1}, client {client}: {why}")
        for client in mismatched:
            self.clients.discard(client)
        failed = dict(sorted((failed | mismatched).items()))
        self._check_min_clients(asked - len(failed), failed)
        try:
            if len(failed) == asked:
                return Answers(zero_message(self.strategy, self._first_download(server)), reports, failed)
            return Answers(aggregator.result(total), reports, failed)
        except RoundError as error:
            raise RoundError(f"round {self.number + 1}: {error}") from error

    def _raise_if_failed(self, report: Report) -> None:
        """Raise ClientError if a client failed and `failures.policy` is `raise`."""
        if report.error is not None and self.failures.policy == "raise":
            error = self._client_error(self.number, report.client_id, report.error, report.exception)
            raise error from report.exception

    def _client_error(self, number: int, client: int, why: str, error: BaseException | None) -> ClientError:
        advice = ""
        if isinstance(error, ArithmeticError | NodeError) and "not finite" in why:
            # Messages are checked in order: where statistics are the first that is not finite, the model is.
            cure = "scale the data" if "buffers is not finite" in why else "lower local.lr"
            advice = f"; {cure}, or set failures.policy=drop"
        return ClientError(f"round {number + 1}, client {client}: {why}{advice}")

    def _steps(self, clients: list[int]) -> dict[int, int]:
        """K_k, the number of steps of each client."""
        sizes = self.data.sizes[clients].tolist()
        return {k: self.recipe.num_steps(n) for k, n in zip(clients, sizes, strict=True)}

    def _all_steps(self, clients: list[int]) -> Ints:
        """(C,) the steps of each client, with those of its answer to a survey."""
        epoch = self.recipe.with_all_examples.epoch_of
        sizes = self.data.sizes[clients].tolist()
        return np.array(
            [
                steps + self.strategy.survey_steps(steps, epoch(n)[0])
                for n, steps in zip(sizes, self._steps(clients).values(), strict=True)
            ]
        )

    def _half(self, method: Method, found: "Answers", records: Records) -> ServerHalf:
        """A method of the strategy at the server, after the answers of some clients."""
        counted = [r for r in found.reports if r.client_id not in found.failed]
        weights = {r.client_id: r.weight for r in counted}
        names = self.strategy.metrics if method == "server_update" else ()
        metrics = {name: fsum(r.metrics.get(name, 0.0) for r in counted) for name in names}
        sizes = self.data.sizes
        total_examples = int(sizes.sum()) if sizes.all() else None
        cohort_examples = int(sizes[[*weights]].sum())
        about = self.number, weights, self.data.num_clients, cohort_examples, total_examples, self.federation
        return ServerHalf(method, self.work, Facts(*about, metrics=metrics), records)

    def _after(
        self, method: Method, server: State, found: "Answers", aggregator: Aggregator, records: Records
    ) -> State:
        """The server's state after a method of the strategy."""
        half = self._half(method, found, records)
        aggregate = {name: value.to(self.runtime.home) for name, value in found.aggregate.items()}
        if isinstance(aggregator, Rows):
            with border(f"round {self.number + 1}", RoundError):
                check_rows(aggregate, [*half.facts.weights], type(self.runtime).__name__)
        if method == "surveyed" and "buffers" in aggregate:
            raise RoundError(f"round {self.number + 1}: answers to the survey have 'buffers', a reserved name")
        aggregate, buffers = split_statistics(aggregate, aggregator)
        if not self.strategy.uses_public:
            return self._with_changes(server, half.changed(server, aggregate) | buffers)
        sent = {name: value for name, value in server.items() if name not in ("ema.model", "ema.buffers")}
        sent |= {f"{AGGREGATE}{name}": value for name, value in aggregate.items()}
        made = self._one_job(half, sent, f"{type(self.strategy).__name__}.{half.method}")
        half.take_records(made)
        return self._with_changes(server, made.message | buffers)

    def _with_changes(self, server: State, changed: State) -> State:
        """The server's state with entries that have changed, where statistics may be given as their change."""
        if self.strategy.buffers_as_changes and "buffers" in changed:
            buffers = moved_statistics(server["buffers"], changed["buffers"], self.task.buffer_layout)
            changed = changed | {"buffers": buffers}
        return server | changed

    def _one_job(self, work: ServerHalf | Recalibration, server: State, whose: str) -> Update:
        """The result of a work for one job, which is none of a client's; raises RoundError."""
        job = Job(self.data.server_id, self.number, None)
        made = [outcome for _, outcome in outcomes(self.runtime, work, server, [job])]
        check_once(self.runtime, "map", "item", [0] * len(made), [0])
        [outcome] = made
        if isinstance(outcome, RoundError):
            raise outcome
        if isinstance(outcome, BaseException):
            raise RoundError(f"round {self.number + 1}: {whose}: {cause(outcome)}") from outcome
        message = {name: value.to(self.runtime.home) for name, value in outcome.message.items()}
        return outcome._replace(message=message)

    def _with_ema_and_recalibration(self, server: State) -> State:
        """The server's state with recalibrated statistics and an updated running mean, if these are on."""
        if self.recalibrate:
            server = server | self._recalibrated(server, self.recalibrate)
        if mean := self.ema:
            d = self.decay or 0.0
            server = server | {f"ema.{name}": d * mean[name] + (1 - d) * server[name] for name in mean}
        return server

    def _recalibrated(self, server: State, settings: Recalibrate) -> State:
        made = self._one_job(Recalibration(settings, self.seed), server, "recalibrate").message
        if not isfinite(largest(made["buffers"])):
            raise RoundError(f"round {self.number + 1}: recalibrate: buffers is not finite")
        return made

    def _job(self, client: int, number: int | None = None) -> Job:
        number = self.number if number is None else number
        return Job(client, number, self.clients.get(client, self.initial_client))

    def _check_min_clients(self, left: int, failed: dict[int, str]) -> None:
        """Raise RoundError where so few clients have answered or still can that the round will not count."""
        least, says = self._needs
        if left < least:
            causes = "".join(f"; client {k}: {why}" for k, why in sorted(failed.items())[:MOST_CAUSES])
            more = f"; and {len(failed) - MOST_CAUSES} more" if len(failed) > MOST_CAUSES else ""
            few = f"{left} of {left + len(failed)} clients are left, and {says}"
            raise RoundError(f"round {self.number + 1}: {few}{causes}{more}")


def fingerprint_of(server: State) -> str:
    """SHA-256 of the bytes of `model` (P,) and `buffers` (Q,)."""
    digest = hashlib.sha256()
    for name in ("model", "buffers"):
        digest.update(server[name].cpu().numpy().data)
    return digest.hexdigest()


def _mean(sums: dict[str, float]) -> Evaluation:
    return Evaluation(sums["loss"] / sums["examples"], sums["correct"] / sums["examples"])


def _sums(metrics: Iterable[Metrics]) -> Metrics:
    """Exact sums, which depend neither on the order nor on the number of workers."""
    metrics = list(metrics)
    return {name: fsum(m[name] for m in metrics if name in m) for name in {name for m in metrics for name in m}}
