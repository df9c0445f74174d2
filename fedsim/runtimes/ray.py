"""Clients in the processes of a Ray cluster: one machine or many, with the same result as in one process.

Network and data go to each machine once, and all its actors map them. An actor adds up what its clients send and
hands over one sum at the end of the run: what reaches the driver grows with the actors, not with the cohort.
"""

import logging
import os
import signal
import socket
import sys
import threading
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from itertools import count
from math import floor
from time import monotonic
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import torch
from annotated_types import Ge, Gt, Le

from fedsim.aggregate import Aggregator, Partial
from fedsim.data import FederatedData
from fedsim.errors import ClientError, ConfigError, RoundError, one_line
from fedsim.runtimes.packing import Packed, pack, unpack
from fedsim.runtimes.ray_actor import Actor, Answer, Failure, Order
from fedsim.runtimes.worker import cores
from fedsim.task import Task
from fedsim.types import Count, Job, Report, State
from fedsim.work import Train, Work

Answered = TypeVar("Answered")
Ref = Any  # a ray.ObjectRef

DEATHS = 3  # of its actor, after which a client is thought to be the cause; and of actors that start
SLOW = 0.05  # seconds: while clients take less, an actor has one waiting, so that it need not wait for the driver
LARGE = 2**14  # bytes of a client's state, from which on it waits in Ray's store, which spills to disk
TICK = 1.0  # seconds between two looks at actors that do not start
NOTICE, PATIENCE = (
    10.0,
    60.0,
)  # seconds until an actor without a place is told of, and until none at all is an error
NUMBERS = count()  # of runs


class Ray:
    """Clients side by side in a Ray cluster's processes, one machine or many.

    `address` null is the Ray that this process has joined, or a local one that ends with it; `auto` is the cluster
    on this machine, host:port any other. Each actor takes `cpus`, or a share of a GPU if `gpus` is above 0; `auto`
    is as many as the cluster holds. An actor or a machine that dies is replaced, and its clients of the round run
    again; a client that kills three is said to fail. Raises ConfigError where the cluster cannot do that.
    """

    exact = True

    def __init__(
        self,
        task: Task,
        data: FederatedData,
        /,
        *,
        actors: Count | Literal["auto"] = "auto",
        address: str | None = None,
        cpus: Annotated[float, Gt(0)] = 1.0,
        gpus: Annotated[float, Ge(0), Le(1)] = 0.0,
    ):
        self.home = torch.device("cpu")
        if cpus > 1 and cpus % 1:
            raise ConfigError(f"runtime.cpus: {cpus:g} should be whole, or less than 1, for Ray to count it")
        _join(address)
        room = _room(cpus, gpus)
        self.workers = room if actors == "auto" else actors
        if not 1 <= self.workers <= room:
            needs = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
            raise ConfigError(
                f"runtime.actors: {actors}, each with {needs}; the cluster, {_resources()}, has room for {room}"
            )
        self._pool = _Pool(task, data, self.workers, cpus, gpus)

    def check(self, work: Train) -> None:
        self._pool.check(work)

    def run(
        self,
        work: Work,
        server: State,
        jobs: Iterable[Job],
        aggregator: Aggregator,
        *,
        tolerant: bool = False,
    ) -> Iterator[tuple[Partial, list[Report]]]:
        call = _Call(self._pool, Order(work, server, aggregator, tolerant), iter(jobs))
        try:
            while call.goes_on():
                partials, reports = call.step()
                yield aggregator.fold([]), reports
                for partial in partials:
                    yield partial, []
        finally:
            call.close()


@dataclass(eq=False)
class _Seat:
    """An actor, as the driver knows it."""

    actor: Any
    opening: Ref | None  # until it has network and data
    since: float
    name: str = "an actor that was starting"
    told: bool = False  # that it found no place


class _Pool:
    """The actors; those that die are replaced."""

    def __init__(self, task: Task, data: FederatedData, wanted: int, cpus: float, gpus: float):
        ray = _ray()
        made = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, "max_task_retries": 0}
        self._make = ray.remote(Actor).options(**made, enable_task_events=False, scheduling_strategy="SPREAD")
        self._gpu, self._content = gpus > 0, ray.put(pack((task, data), files=True))
        self._unlucky = 0  # actors in a row that died while they started
        self.wanted, self.alive = wanted, monotonic()  # when one last showed that it is
        self.seats: list[_Seat] = []
        for _ in range(wanted):
            self._add()
        try:
            self._settle()
        except BaseException as error:
            for seat in self.seats:
                _ray().kill(seat.actor)
            if isinstance(error, RoundError):
                raise ConfigError(f"runtime.actors: {error}") from error
            raise

    def _settle(self) -> None:
        """Wait for those that start, as long as they come."""
        while starting := self.starting():
            ready, _ = _ray().wait([seat.opening for seat in starting], timeout=TICK)
            for seat in starting:
                if seat.opening in ready and isinstance(opened := self.opened(seat), Failure):
                    raise opened.error()
            self.patience()
            if self.ready() and len(self._overdue()) == len(self.starting()):
                break

    def ready(self) -> list[_Seat]:
        """Those that can take clients."""
        return [seat for seat in self.seats if not seat.opening]

    def starting(self) -> list[_Seat]:
        """Those that have no place yet, or not network and data."""
        return [seat for seat in self.seats if seat.opening]

    def check(self, work: Train) -> None:
        """Have all actors check it."""
        self._settle()
        packed = pack(work)
        for ref in [seat.actor.check.remote(packed) for seat in self.ready()]:
            try:
                _answer(ref)
            except _ray().exceptions.RayError:  # it died, and the next run replaces it
                continue

    def opened(self, seat: _Seat) -> Failure | None:
        """Have an actor that has answered among those that are ready; its failure if it cannot do the work."""
        ray = _ray()
        self.alive = monotonic()
        try:
            answer = ray.get(seat.opening)
        except ray.exceptions.RayError as error:
            self._unlucky += 1
            if self._unlucky >= DEATHS:
                raise RoundError(f"{DEATHS} Ray actors died while they started; {_said(error)}") from error
            self.replace(seat)
            return None
        if isinstance(answer, Failure):
            self.seats.remove(seat)
            return answer
        seat.opening, seat.name, self._unlucky = None, f"the actor on {answer[1]}, process {answer[0]},", 0
        return None

    def replace(self, seat: _Seat) -> None:
        """Have another actor, anywhere, for one that died; whoever notices first does it."""
        ray = _ray()
        if seat in self.seats:
            self.seats.remove(seat)
            ray.kill(seat.actor)  # which may only be out of reach
            self._add()

    def patience(self) -> None:
        """Tell of actors without a place, and raise RoundError where there is no other."""
        waiting, ready = self._overdue(), len(self.ready())
        if not ready and monotonic() - max(self.alive, *(s.since for s in self.seats), 0) > PATIENCE:
            raise RoundError(f"no Ray actor is left, and the cluster, {_resources()}, has no place for one")
        if ready and not all(seat.told for seat in waiting):
            for seat in waiting:
                seat.told = True
            warnings.warn(
                f"runtime: goes on with {ready} of {self.wanted} Ray actors; the cluster, {_resources()}, "
                "has no place for the others yet",
                RuntimeWarning,
                stacklevel=2,
            )

    def _overdue(self) -> list[_Seat]:
        """Actors that should have a place by now, since others came up."""
        return [seat for seat in self.starting() if monotonic() - max(seat.since, self.alive) > NOTICE]

    def _add(self) -> None:
        actor = self._make.remote()
        paths = [os.path.abspath(path) for path in sys.path]
        opening = actor.open.remote(self._content, paths, os.getcwd(), self._gpu)
        self.seats.append(_Seat(actor, opening, monotonic()))


class _Sent(NamedTuple):
    """A job as an actor takes it."""

    client: int
    round: int
    state: Packed | Ref | None


@dataclass
class _Flight:
    """What one actor has of a run: clients under way, in their order, and those in its sum."""

    under_way: deque[tuple[Ref, _Sent]] = field(default_factory=deque)
    summed: list[_Sent] = field(default_factory=list)


class _Call:
    """One call of `run`: which client is where."""

    def __init__(self, pool: _Pool, order: Order, jobs: Iterator[Job]):
        ray = _ray()
        self.number, self.pool, self.jobs = next(NUMBERS), pool, jobs
        self.server, self.tolerant = order.server, order.tolerant
        self.order = ray.put(pack(order))
        self.again: deque[_Sent] = deque()  # whose actor died
        self.flights: dict[_Seat, _Flight] = {}
        self.reported: set[int] = set()
        self.deaths: Counter[int] = Counter()  # of actors, by the client that was running
        self.ahead = 1  # clients that an actor has at most

    def goes_on(self) -> bool:
        """Hand out clients to who is free; False where all is done."""
        for depth in range(1, self.ahead + 1):
            for seat in self.pool.ready():
                if seat not in self.flights or len(self.flights[seat].under_way) < depth:
                    if not (sent := self._next()):
                        return bool(self.flights)
                    self._send(seat, sent)
        return True

    def step(self) -> tuple[list[Partial], list[Report]]:
        """Wait for some answers; sums where no client is left."""
        ray = _ray()
        busy = {flight.under_way[0][0]: seat for seat, flight in self.flights.items() if flight.under_way}
        starting = {seat.opening: seat for seat in self.pool.starting()}
        if not busy and (self.pool.ready() or not starting) and not self.again and self.flights:
            return self._sums(), []
        refs = [*busy, *starting]
        if not refs:
            raise RoundError("no Ray actor is left that can do the work")
        done, waiting = ray.wait(refs, timeout=TICK)
        if done and waiting:
            done += ray.wait(waiting, num_returns=len(waiting), timeout=0)[0]
        for ref in done:
            if ref in starting and isinstance(failed := self.pool.opened(starting[ref]), Failure):
                warnings.warn(f"runtime: does without a Ray actor; {failed.error()}", RuntimeWarning, stacklevel=3)
        self.pool.patience()
        return [], [report for ref in done if ref in busy for report in self._reports(busy[ref])]

    def close(self) -> None:
        """Leave no client to start, and no sum behind; those under way come to their end, which nobody minds."""
        ray = _ray()
        for seat, flight in self.flights.items():
            for ref, _ in list(flight.under_way)[:0:-1]:
                ray.cancel(ref)
            seat.actor.forget.remote(self.number)

    def _next(self) -> _Sent | None:
        ray = _ray()
        if self.again:
            return self.again.popleft()
        if not (job := next(self.jobs, None)):
            return None
        state = pack(job.client) if job.client else None
        large = state and sum(value.nbytes for value in (job.client or {}).values()) > LARGE
        return _Sent(job.client_id, job.round, ray.put(state) if large else state)

    def _send(self, seat: _Seat, sent: _Sent) -> None:
        if seat not in self.flights:
            seat.actor.begin.remote(self.number, self.order)
            self.flights[seat] = _Flight()
        self.flights[seat].under_way.append((seat.actor.client.remote(self.number, *sent), sent))

    def _reports(self, seat: _Seat) -> list[Report]:
        """What the actor's first client has to say, if that is new."""
        flight = self.flights[seat]
        ref, sent = flight.under_way[0]
        try:
            answer: Answer = _answer(ref)
        except _ray().exceptions.RayError as error:
            return self._died(seat, error)
        flight.under_way.popleft()
        report = answer.report._replace(client=unpack(answer.kept, own=True) if answer.kept else {})
        for name in answer.written:  # what a client wrote to counts as written here
            torch.autograd.graph.increment_version(self.server[name])
        self.pool.alive, self.ahead = monotonic(), 1 if report.seconds > SLOW else 2
        if not report.error:
            flight.summed.append(sent)
        return self._new(sent, report)

    def _new(self, sent: _Sent, report: Report) -> list[Report]:
        """The report, unless its client has one already: then it ran again, and must have come to the same end."""
        if sent.client not in self.reported:
            self.reported.add(sent.client)
            return [report]
        if report.error:
            raise RoundError(
                f"round {sent.round + 1}: client {sent.client} answered, its Ray actor died, and when it was run "
                f"again it failed: {report.error}"
            )
        return []

    def _died(self, seat: _Seat, error: Exception) -> list[Report]:
        """Replace an actor and have its clients run again; a report on the one under way if it did that often."""
        flight = self.flights.pop(seat)
        self.pool.replace(seat)
        waiting = [sent for _, sent in flight.under_way]
        self.again.extend(flight.summed)
        self.again.extendleft(reversed(waiting))  # what kills an actor should not do it when that has done much
        if not waiting:
            return self._tell(seat, flight, error)
        first = waiting[0]
        self.deaths[first.client] += 1
        if self.deaths[first.client] < DEATHS:
            return self._tell(seat, flight, error)
        self.again.popleft()
        cause = f"its Ray actor died {DEATHS} times ({_said(error)})"
        if not self.tolerant:
            raise ClientError(f"round {first.round + 1}, client {first.client}: {cause}") from error
        return self._new(first, Report(first.client, 0.0, {}, {}, 0.0, 0, cause))

    def _tell(self, seat: _Seat, flight: _Flight, error: Exception) -> list[Report]:
        again = len(flight.under_way) + len(flight.summed)
        warnings.warn(
            f"runtime: {seat.name} died, and {again} clients run again ({_said(error)})",
            RuntimeWarning,
            stacklevel=5,
        )
        return []

    def _sums(self) -> list[Partial]:
        """Of the actors, as long as none of them dies."""
        sums = []
        refs = {seat: seat.actor.finish.remote(self.number) for seat in self.flights}
        for seat, ref in refs.items():
            try:
                sums.append(unpack(_answer(ref), own=True))
                del self.flights[seat]
            except _ray().exceptions.RayError as error:
                self._died(seat, error)
        return sums


def _answer(ref: Ref) -> Any:
    """What an actor returned; raises what it raised, or a RayError where it is gone."""
    ray = _ray()
    try:
        answer = ray.get(ref)
    except _ray().exceptions.RayTaskError as error:  # not of a client
        raise RoundError(f"a Ray actor failed: {one_line(error.cause)}") from error
    if isinstance(answer, Failure):
        raise answer.error()
    return answer


def _said(error: Exception) -> str:
    """The first line of Ray's many."""
    return one_line(str(error).strip().partition("\n")[0])


def _resources() -> str:
    ray = _ray()
    has, free = ray.cluster_resources(), ray.available_resources()
    return " and ".join(f"{has.get(kind, 0):g} {kind}s ({free.get(kind, 0):g} free)" for kind in ("CPU", "GPU"))


def _room(cpus: float, gpus: float) -> int:
    """How many actors of that size all machines hold."""
    ray = _ray()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    return sum(min(floor(node.get(kind, 0) / each + 1e-9) for kind, each in wanted.items()) for node in nodes)


def _ray() -> Any:
    """Ray, which takes its time to be imported; raises ConfigError where it is not installed."""
    try:
        return import_module("ray")
    except ModuleNotFoundError as error:
        raise ConfigError("runtime.name: ray needs Ray; pip install 'fedsim[ray]' brings it") from error


def _join(address: str | None) -> None:
    """Have this process part of a Ray; raises ConfigError."""
    ray = _ray()
    if ray.is_initialized():
        joined = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", joined):
            raise ConfigError(f"runtime.address: {address}, and this process has joined {joined} already")
        return
    if address not in (None, "auto"):
        _reach(address)
    own: dict[str, Any] = {} if address else {"num_cpus": cores(), "include_dashboard": False}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with _as_it_was():
        try:
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"runtime.address: {address or 'null'}: Ray cannot be had; {_said(error)}"
            ) from error


def _reach(address: str) -> None:
    """Raise ConfigError where nobody listens; Ray itself would take minutes to say so."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and "/" not in host):
        raise ConfigError(f"runtime.address: {address!r} should be null, auto, or host:port such as 10.0.0.1:6379")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise ConfigError(f"runtime.address: {address} cannot be reached ({one_line(error)})") from error


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Keep what Ray takes when it starts: the handler of SIGTERM, and warnings about files that it left open."""
    mine = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=ResourceWarning)
        warnings.filterwarnings("ignore", "Tip: In future versions of Ray", FutureWarning)
        try:
            yield
        finally:
            if mine:
                signal.signal(signal.SIGTERM, handler)
