"""Measures how fast a runtime trains a few clients for a few steps; the results are discarded."""

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter

import torch

from fedsim.data import FederatedData
from fedsim.federated.aggregate import Aggregator
from fedsim.federated.client import Train
from fedsim.federated.runtime import Runtime
from fedsim.types import Job, State

TOTAL_SECONDS = 2.0  # about, for all runtimes together
SECONDS_PER_RUNTIME = 0.01, 0.25  # lower and upper bound; between them, the time of two clients
TIMED_PASSES = 3  # the fastest counts, since noise only makes a pass slower
MIN_RELATIVE_SPEED = 1 / 4  # of the best so far; slower runtimes are not timed further


class Calibration:
    """The first clients of a cohort, `jobs`, with which one runtime after the other is timed.

    Each client takes as many of its steps as there is time for. Messages and states are discarded. A client that
    fails counts no steps here; it fails again in the real round, which reports it.
    """

    def __init__(
        self, work: Train, data: FederatedData, server: State, jobs: Sequence[Job], aggregator: Aggregator
    ):
        self.work, self.server, self.jobs, self.aggregator = work, server, jobs, aggregator
        self.max_steps = max(work.recipe.num_steps(int(data.sizes[job.client_id])) for job in jobs)
        self.step = 0.0  # seconds of one step, with the overhead of a client
        self.seconds = SECONDS_PER_RUNTIME[1]  # for one runtime
        self.best = 0.0  # highest rate with one step a client
        self.began = perf_counter()

    @property
    def over(self) -> bool:
        """Whether `TOTAL_SECONDS` have passed."""
        return perf_counter() - self.began > TOTAL_SECONDS

    def reference(self, runtime: Runtime) -> float:
        """The rate of serial, which comes first; it also sets the time for each runtime."""
        self._pass(runtime, 1, 1)
        done, self.step = self._pass(runtime, 1, 1)
        self.seconds = min(max(2 * self.max_steps * self.step, SECONDS_PER_RUNTIME[0]), SECONDS_PER_RUNTIME[1])
        return done / self.step if self.step > self.seconds else self.rate(runtime)

    def rate(self, runtime: Runtime, chunk: int = 1) -> float:
        """Client steps a second after a warm-up; only an estimate if it is far from the best.

        A worker takes `chunk` clients at a time.
        """
        began = perf_counter()
        self._pass(runtime, self._clients(runtime.workers * chunk), 1)
        clients = self._clients(runtime.workers * chunk)  # more if the runtime has added workers
        steps = 1
        done, seconds = self._pass(runtime, clients, steps)
        rate, self.best = done / seconds, max(self.best, done / seconds)
        too_slow = rate < MIN_RELATIVE_SPEED * self.best
        while steps < self.max_steps and seconds < self.seconds / 4 and not (too_slow or self.over):
            steps = min(self.max_steps, max(steps + 1, int(steps * self.seconds / (2 * seconds))))
            done, seconds = self._pass(runtime, clients, steps)
            rate = done / seconds
        for _ in range(TIMED_PASSES - 1):
            if too_slow or self.over or perf_counter() - began > self.seconds:
                break
            done, seconds = self._pass(runtime, clients, steps)
            rate = max(rate, done / seconds)
        return rate

    def _clients(self, side_by_side: int) -> int:
        """How many clients to train: twice as many as run in parallel, unless that is many or would take long."""
        twice = min(2 * side_by_side, 16) if self.step < SECONDS_PER_RUNTIME[1] / 4 else 1
        return min(len(self.jobs), max(side_by_side, twice))

    def _pass(self, runtime: Runtime, clients: int, steps: int) -> tuple[float, float]:
        """The number of steps that `clients` clients took, and the seconds."""
        recipe = self.work.recipe
        if steps < self.max_steps:
            recipe = replace(recipe, epochs=1, steps=steps)
        work = replace(self.work, recipe=recipe, time_limit=None)
        began, done = perf_counter(), 0.0
        for _, reports in runtime.run(work, self.server, self.jobs[:clients], self.aggregator):
            done += sum(report.metrics.get("steps", 1.0) for report in reports if report.error is None)
        return done, perf_counter() - began


def release(device: torch.device) -> None:
    """Free the GPU memory of runtimes that no longer exist."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
