"""How fast a runtime trains clients: a few of them, a few steps each, timed; nothing of it is kept."""

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter

import torch

from fedsim.data import FederatedData
from fedsim.federated.aggregate import Aggregator
from fedsim.federated.client import Train
from fedsim.federated.runtime import Runtime
from fedsim.types import Job, State

SECONDS = 2.0  # about, for all candidates together
SHARE = 0.01, 0.25  # seconds, about, for one of them: at least, and at most; between, what two clients take
PASSES = 3  # of which the fastest counts, for noise only slows
HOPELESS = 1 / 4  # of the best so far: not worth a closer look


class Calibration:
    """The first clients of a cohort, `jobs`, on which one runtime after the other is timed.

    Each client takes as many of its steps as there is time for. What clients send and keep is thrown away, and
    one that fails takes no steps: it fails again, and is told of, when it counts.
    """

    def __init__(
        self, work: Train, data: FederatedData, server: State, jobs: Sequence[Job], aggregator: Aggregator
    ):
        self.work, self.server, self.jobs, self.aggregator = work, server, jobs, aggregator
        self.most = max(work.recipe.num_steps(int(data.sizes[job.client_id])) for job in jobs)
        self.step = 0.0  # seconds that the first client takes for one and all that comes with it
        self.share = SHARE[1]  # of the time, for one runtime
        self.best = 0.0  # of rates at one step a client
        self.began = perf_counter()

    @property
    def over(self) -> bool:
        """Whether the time for it is."""
        return perf_counter() - self.began > SECONDS

    def reference(self, runtime: Runtime) -> float:
        """The rate of the first runtime, which is serial; the others' depends on how long a step takes it."""
        self._pass(runtime, 1, 1)
        done, self.step = self._pass(runtime, 1, 1)
        self.share = min(max(2 * self.most * self.step, SHARE[0]), SHARE[1])
        return done / self.step if self.step > self.share else self.rate(runtime)

    def rate(self, runtime: Runtime, chunk: int = 1) -> float:
        """Client steps a second, once warm; roughly where one step each shows that it is far from the best.

        A worker takes `chunk` clients at a time.
        """
        began = perf_counter()
        self._pass(runtime, self._clients(runtime.workers * chunk), 1)
        clients = self._clients(runtime.workers * chunk)  # more where it found that more workers fit
        steps = 1
        done, seconds = self._pass(runtime, clients, steps)
        rate, self.best = done / seconds, max(self.best, done / seconds)
        hopeless = rate < HOPELESS * self.best
        while steps < self.most and seconds < self.share / 4 and not (hopeless or self.over):
            steps = min(self.most, max(steps + 1, int(steps * self.share / (2 * seconds))))
            done, seconds = self._pass(runtime, clients, steps)
            rate = done / seconds
        for _ in range(PASSES - 1):
            if hopeless or self.over or perf_counter() - began > self.share:
                break
            done, seconds = self._pass(runtime, clients, steps)
            rate = max(rate, done / seconds)
        return rate

    def _clients(self, side_by_side: int) -> int:
        """How many keep it busy: twice as many as run at once, unless that is many or would take long."""
        twice = min(2 * side_by_side, 16) if self.step < SHARE[1] / 4 else 1
        return min(len(self.jobs), max(side_by_side, twice))

    def _pass(self, runtime: Runtime, clients: int, steps: int) -> tuple[float, float]:
        """The steps that so many clients took, and the seconds."""
        recipe = self.work.recipe
        if steps < self.most:
            recipe = replace(recipe, epochs=1, steps=steps)
        work = replace(self.work, recipe=recipe, time_limit=None)
        began, done = perf_counter(), 0.0
        for _, reports in runtime.run(work, self.server, self.jobs[:clients], self.aggregator):
            done += sum(report.metrics.get("steps", 1.0) for report in reports if report.error is None)
        return done, perf_counter() - began


def release(device: torch.device) -> None:
    """Give back the memory of runtimes that are gone."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
