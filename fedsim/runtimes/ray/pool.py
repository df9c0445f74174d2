"""The actors of a runtime: they start, some late or never; those that die are replaced."""

import gc
import os
import sys
import warnings
import weakref
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

import ray

from fedsim.data import FederatedData
from fedsim.errors import ConfigError, RoundError, one_line
from fedsim.federated.client import Train
from fedsim.runtimes.ray.actor import Actor, Failure
from fedsim.runtimes.ray.cluster import counted, first_line, resources
from fedsim.runtimes.ray.packing import pack
from fedsim.training.task import Task

Ref = Any  # a ray.ObjectRef

DEATHS = 3  # in a row, of actors that start, after which no more are tried
TICK = 1.0  # seconds between two looks at actors that do not start
NOTICE = 10.0  # seconds until an actor without a place is told of
PATIENCE = 60.0  # seconds until it is an error that none has a place
POOLS = weakref.WeakSet["Pool"]()  # of this process


@dataclass(eq=False)
class Seat:
    """An actor, as the driver knows it."""

    actor: Any
    opening: Ref  # None once it has network and data
    since: float
    name: str = "an actor that was starting"
    told: bool = False  # that it found no place


class Pool:
    """So many actors with network and data, as far as the cluster has a place for them.

    They end when the pool is closed, or is gone: at once, whatever else has a handle of theirs.
    """

    def __init__(self, task: Task, data: FederatedData, wanted: int, cpus: float, gpus: float):
        made: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)(Actor)
        self._actor = made.options(enable_task_events=False, scheduling_strategy="SPREAD")
        self._gpu, self._content = gpus > 0, ray.put(pack((task, data), files=True))
        self._unlucky = 0  # actors in a row that died while they started
        self.wanted, self.alive = wanted, monotonic()  # when one last showed that it is
        self.seats: list[Seat] = []
        weakref.finalize(self, _end, self.seats).atexit = False  # Ray ends them there
        try:
            self.open()
        except RoundError as error:
            raise ConfigError(f"runtime.actors: {error}") from error

    def open(self) -> None:
        """Have the actors start, if none are there; raises RoundError where the cluster has no place for any."""
        if self.seats:
            return
        if POOLS:  # one that is garbage still has its actors
            gc.collect()
        self._unlucky, self.alive = 0, monotonic()
        POOLS.add(self)
        try:
            for _ in range(self.wanted):
                self._add()
            self._settle()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the actors; whoever opens it again has others."""
        _end(self.seats)
        POOLS.discard(self)

    def ready(self) -> list[Seat]:
        """Those that can take clients."""
        return [seat for seat in self.seats if not seat.opening]

    def starting(self) -> list[Seat]:
        """Those that have no place yet, or not network and data."""
        return [seat for seat in self.seats if seat.opening]

    def check(self, work: Train) -> None:
        """Have all actors check it; raises ConfigError."""
        self.open()
        self._settle()
        packed = pack(work)
        for ref in [seat.actor.check.remote(packed) for seat in self.ready()]:
            try:
                answer(ref)
            except ray.exceptions.RayError:  # it died, and the next run replaces it
                continue

    def opened(self, seat: Seat) -> Failure | None:
        """Have an actor that has answered among those that are ready; its failure if it cannot do the work."""
        self.alive = monotonic()
        try:
            opened = ray.get(seat.opening)
        except ray.exceptions.RayError as error:
            self._unlucky += 1
            if self._unlucky >= DEATHS:
                raise RoundError(f"{DEATHS} Ray actors died while they started; {first_line(error)}") from error
            self.replace(seat)
            return None
        if isinstance(opened, Failure):
            self.seats.remove(seat)
            return opened
        process, machine = opened
        seat.opening, seat.name, self._unlucky = None, f"the actor on {machine}, process {process},", 0
        return None

    def replace(self, seat: Seat) -> None:
        """Have another actor, anywhere, for one that died; whoever notices first does it."""
        if seat in self.seats:
            self.seats.remove(seat)
            ray.kill(seat.actor)  # which may only be out of reach
            self._add()

    def patience(self) -> None:
        """Tell of actors without a place, and raise RoundError where there is no other."""
        waiting, ready = self._overdue(), len(self.ready())
        if not ready and monotonic() - max([self.alive, *(seat.since for seat in self.seats)]) > PATIENCE:
            others = sum(len(pool.seats) for pool in POOLS if pool is not self)
            held = f"; {counted(others, 'actor')} of this process's other runs are on it" if others else ""
            raise RoundError(f"no Ray actor is left, and the cluster, {resources()}, has no place for one{held}")
        if ready and not all(seat.told for seat in waiting):
            for seat in waiting:
                seat.told = True
            warn(
                f"goes on with {ready} of {self.wanted} Ray actors; the cluster, {resources()}, "
                "has no place for the others yet"
            )

    def _settle(self) -> None:
        """Wait for those that start, as long as they come."""
        while starting := self.starting():
            ready, _ = ray.wait([seat.opening for seat in starting], timeout=TICK)
            for seat in starting:
                if seat.opening in ready and (failure := self.opened(seat)):
                    raise failure.error()
            self.patience()
            if self.ready() and len(self._overdue()) == len(self.starting()):
                break

    def _overdue(self) -> list[Seat]:
        """Actors that should have a place by now, since others came up."""
        return [seat for seat in self.starting() if monotonic() - max(seat.since, self.alive) > NOTICE]

    def _add(self) -> None:
        actor = self._actor.remote()
        paths = [os.path.abspath(path) for path in sys.path]
        opening = actor.open.remote(self._content, paths, os.getcwd(), self._gpu)
        self.seats.append(Seat(actor, opening, monotonic()))


def _end(seats: list[Seat]) -> None:
    """Kill actors, and have none; the Ray that had them may be gone."""
    for seat in seats:
        with suppress(ray.exceptions.RayError, ValueError):
            ray.kill(seat.actor)
    seats.clear()


def answer(ref: Ref) -> Any:
    """What an actor returned; raises what it raised, or a RayError where it is gone."""
    try:
        returned = ray.get(ref)
    except ray.exceptions.RayTaskError as error:  # not of a client
        raise RoundError(f"a Ray actor failed: {one_line(error.cause)}") from error
    if isinstance(returned, Failure):
        raise returned.error()
    return returned


def warn(text: str) -> None:
    """Say what the run goes on after."""
    warnings.warn(f"runtime: {text}", RuntimeWarning, stacklevel=3)
