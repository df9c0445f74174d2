"""The pool of actors of a runtime: it starts them, waits for their places, and replaces dead ones."""

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

MAX_FAILED_STARTS = 3  # of actors in a row; then no more are started
POLL_SECONDS = 1.0  # between two checks of actors that do not start
WARN_AFTER_SECONDS = 10.0  # without a place in the cluster for an actor
MAX_WAIT_SECONDS = 180.0  # for a first actor: its place in the cluster, and its imports on a busy machine
POOLS = weakref.WeakSet["Pool"]()  # of this process


@dataclass(eq=False)
class Slot:
    """An actor, as the driver knows it."""

    actor: Any
    opening: Ref  # None when the actor has network and data
    since: float
    name: str = "an actor that was starting"
    warned: bool = False  # whether a warning was given that it has no place


class Pool:
    """`wanted` actors with network and data, or as many as the cluster has a place for.

    They end at once when the pool is closed or garbage-collected, even if other objects hold handles to them.
    """

    def __init__(self, task: Task, data: FederatedData, wanted: int, cpus: float, gpus: float):
        made: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)(Actor)
        self._actor = made.options(enable_task_events=False, scheduling_strategy="SPREAD")
        self._gpu, self._content = gpus > 0, ray.put(pack((task, data), files=True))
        self._failed_starts = 0  # actors in a row that died while they started
        self.wanted, self.alive = wanted, monotonic()  # `alive`: the time of the last answer
        self.slots: list[Slot] = []
        weakref.finalize(self, _end, self.slots).atexit = False  # at exit, Ray ends them
        try:
            self.open()
        except RoundError as error:
            raise ConfigError(f"runtime.actors: {error}") from error

    def open(self) -> None:
        """Start the actors, unless they run; raises RoundError if the cluster has no place for any."""
        if self.slots:
            return
        if POOLS:  # the actors of an unreachable pool run until it is collected
            gc.collect()
        self._failed_starts, self.alive = 0, monotonic()
        POOLS.add(self)
        try:
            for _ in range(self.wanted):
                self._add()
            self._wait_for_actors()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the actors; `open` starts new ones."""
        _end(self.slots)
        POOLS.discard(self)

    def ready(self) -> list[Slot]:
        """The actors that can run clients."""
        return [slot for slot in self.slots if not slot.opening]

    def starting(self) -> list[Slot]:
        """The actors without a place, or without network and data."""
        return [slot for slot in self.slots if slot.opening]

    def check(self, work: Train) -> None:
        """Let all actors check the work; raises ConfigError."""
        self.open()
        self._wait_for_actors()
        packed = pack(work)
        for ref in [slot.actor.check.remote(packed) for slot in self.ready()]:
            try:
                answer(ref)
            except ray.exceptions.RayError:  # the actor died; the next run replaces it
                continue

    def opened(self, slot: Slot) -> Failure | None:
        """Mark an actor that has answered as ready; returns its failure if it cannot run clients."""
        self.alive = monotonic()
        try:
            opened = ray.get(slot.opening)
        except ray.exceptions.RayError as error:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                many = f"{MAX_FAILED_STARTS} Ray actors died while they started"
                raise RoundError(f"{many}; {first_line(error)}") from error
            self.replace(slot)
            return None
        if isinstance(opened, Failure):
            self.slots.remove(slot)
            return opened
        process, machine = opened
        slot.opening, slot.name, self._failed_starts = None, f"the actor on {machine}, process {process},", 0
        return None

    def replace(self, slot: Slot) -> None:
        """Replace an actor that died by a new one on any machine, unless that has been done."""
        if slot in self.slots:
            self.slots.remove(slot)
            ray.kill(slot.actor)  # it may be alive but unreachable
            self._add()

    def check_waiting(self) -> None:
        """Warn about actors without a place in the cluster; raise RoundError if there is no other actor."""
        waiting, ready = self._overdue(), len(self.ready())
        if not ready and monotonic() - max([self.alive, *(slot.since for slot in self.slots)]) > MAX_WAIT_SECONDS:
            others = sum(len(pool.slots) for pool in POOLS if pool is not self)
            held = f"; {counted(others, 'actor')} of this process's other runs use it" if others else ""
            raise RoundError(f"no Ray actor is left, and the cluster, {resources()}, has no place for one{held}")
        if ready and not all(slot.warned for slot in waiting):
            for slot in waiting:
                slot.warned = True
            warn(
                f"continuing with {ready} of {self.wanted} Ray actors; the cluster, {resources()}, "
                "has no place for the others yet"
            )

    def _wait_for_actors(self) -> None:
        """Wait for starting actors, as long as they have a place."""
        while starting := self.starting():
            ready, _ = ray.wait([slot.opening for slot in starting], timeout=POLL_SECONDS)
            for slot in starting:
                if slot.opening in ready and (failure := self.opened(slot)):
                    raise failure.error()
            self.check_waiting()
            if self.ready() and len(self._overdue()) == len(self.starting()):
                break

    def _overdue(self) -> list[Slot]:
        """Actors that are still without a place, long after the last answer of another actor."""
        return [slot for slot in self.starting() if monotonic() - max(slot.since, self.alive) > WARN_AFTER_SECONDS]

    def _add(self) -> None:
        actor = self._actor.remote()
        paths = [os.path.abspath(path) for path in sys.path]
        opening = actor.open.remote(self._content, paths, os.getcwd(), self._gpu)
        self.slots.append(Slot(actor, opening, monotonic()))


def _end(slots: list[Slot]) -> None:
    """Kill the actors; that their cluster has ended is no error."""
    for slot in slots:
        with suppress(ray.exceptions.RayError, ValueError):
            ray.kill(slot.actor)
    slots.clear()


def answer(ref: Ref) -> Any:
    """The return value of an actor; raises the exception it raised, or a RayError if it died."""
    try:
        returned = ray.get(ref)
    except ray.exceptions.RayTaskError as error:  # not an error of a client
        raise RoundError(f"a Ray actor failed: {one_line(error.cause)}") from error
    if isinstance(returned, Failure):
        raise returned.error()
    return returned


def warn(text: str) -> None:
    """Warn about a problem that does not end the run."""
    warnings.warn(f"runtime: {text}", RuntimeWarning, stacklevel=3)
