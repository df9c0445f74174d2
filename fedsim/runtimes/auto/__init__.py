"""Chooses the fastest runtime for a network, its clients and this machine by timing the candidates."""

import logging
import warnings
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import NamedTuple

from fedsim.base.catalogue import Spec
from fedsim.base.devices import devices
from fedsim.base.machine import cores
from fedsim.data import FederatedData
from fedsim.errors import ConfigError, printable, reason
from fedsim.federated.aggregate import Aggregator
from fedsim.federated.client import Train, Work
from fedsim.federated.runtime import Item, Outcomes, Results, Runtime
from fedsim.runtimes import RUNTIMES, runtime_class
from fedsim.runtimes.auto import choices
from fedsim.runtimes.auto.calibration import TOTAL_SECONDS, Calibration, release
from fedsim.runtimes.auto.candidates import candidate_specs, num_clients_to_time, ray_is_there
from fedsim.runtimes.auto.choices import Choice
from fedsim.training.task import Task
from fedsim.types import Job, State

log = logging.getLogger(__name__)  # reports the choice and its reason
MIN_SPEEDUP_IF_NOT_EXACT = 1.5  # over the fastest exact runtime, since timing noise should not affect results
ROUNDED_NOTICE = "runtime: results equal serial's up to rounding; runtime.exact=true excludes this"


class TimedRuntime(NamedTuple):
    """A candidate and its measured speed."""

    spec: Spec
    rate: float  # client steps a second
    exact: bool


class Auto(Runtime):
    """The fastest of the other runtimes: it is timed on the first clients for about two seconds, and remembered.

    A runtime whose results equal those of serial only up to rounding is chosen if it is at least 1.5 times as fast
    as the others, and never with `exact`. `choice` is the chosen runtime, as in a config. The choice is made for
    the first cohort of two clients or more; until then, threads run the clients.
    """

    def __init__(self, task: Task, data: FederatedData, /, *, exact: bool = False, device: str = "auto"):
        self.home = devices(device)[0]
        self.task, self.device, self.only_exact = task, device, exact
        self.data, self.resident = data, data.to(self.home)
        self.exact = exact  # while nothing is chosen, whether it must be
        self._choice: Spec | None = None
        self.runtime = self._build({"name": "threads", "device": device})

    @property
    def workers(self) -> int:
        """The workers of the chosen runtime."""
        return self.runtime.workers

    @property
    def choice(self) -> Spec | None:
        return self._choice

    def check(self, work: Train) -> None:
        self.runtime.check(work)

    def close(self) -> None:
        self.runtime.close()

    def restore_choice(self, choice: Spec, work: Train) -> bool:
        name = choice.get("name")
        if name not in [*RUNTIMES] or name == "auto":  # a name in a file must not import anything else
            raise ConfigError(f"runtime.name: {name!r} is not a runtime that can be chosen")
        if name == "ray" and not ray_is_there():
            raise ConfigError(
                "runtime: ray was chosen; this process has joined no cluster, and RAY_ADDRESS is not set"
            )
        try:
            runtime = self._build(choice)
            runtime.check(work)
        except ConfigError:
            raise
        except Exception as error:  # for example, the cluster no longer exists
            raise ConfigError(f"runtime: {name} cannot be used: {reason(error)}") from error
        if runtime.home != self.home:
            raise ConfigError(f"runtime.device: {runtime.home}, and the server's state is on {self.home}")
        if self.only_exact and not runtime.exact:
            raise ConfigError(f"runtime.exact: {name} equals serial only up to rounding")
        self.runtime, self._choice, self.exact = runtime, RUNTIMES.resolve(choice), runtime.exact
        return True

    def run(self, work: Work, server: State, jobs: Iterable[Job], aggregator: Aggregator) -> Results:
        if self._choice is None and isinstance(work, Train):
            jobs = iter(jobs)
            first_jobs = list(islice(jobs, num_clients_to_time(self.device)))
            if len(first_jobs) > 1:
                self._choose(work, server, first_jobs, aggregator)
            jobs = chain(first_jobs, jobs)
        yield from self.runtime.run(work, server, jobs, aggregator)

    def map(self, work: Work, server: State, items: Iterable[Item]) -> Outcomes[Item]:
        return self.runtime.map(work, server, items)

    def _choose(self, work: Train, server: State, first_jobs: list[Job], aggregator: Aggregator) -> None:
        """Use the remembered choice for this key, or the fastest runtime on the first clients; log the choice."""
        specs = candidate_specs(self.device, len(first_jobs), exact=self.only_exact)
        key = choices.key(work, self.task, self.data, len(first_jobs), specs, self.home)
        if (cached := choices.recall(key)) and self._try_restore(cached.runtime, work):
            self._log_choice(cached, " (cached)")
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # real rounds repeat the warnings
            choice = self._fastest(specs, Calibration(work, self.data, server, first_jobs, aggregator))
        if choice and self._try_restore(choice.runtime, work):
            self._log_choice(choice)
            if choice.timed:
                choices.remember(key, choice)

    def _fastest(self, specs: list[Spec], calibration: Calibration) -> Choice | None:
        """The fastest runtime, with the speeds of all; None if the first one, the reference, fails."""
        reference, *others = specs
        try:
            serial = self._build(reference)
            rates = [TimedRuntime(reference, calibration.reference(serial), exact=True)]
            del serial  # frees its memory before the next one is built
        except Exception:  # the error is raised again when the cohort is trained
            return None
        if calibration.step > TOTAL_SECONDS / 4:
            return self._untimed(calibration.step)
        for spec in others:
            release(self.home)
            if calibration.over:
                break
            try:
                rates.append(self._time(spec, calibration))
            except Exception as error:  # it refuses the work, or runs out of memory
                log.debug("runtime: not %s: %s", spec_text(spec), reason(error))
        fastest = max((timed for timed in rates if timed.exact), key=lambda timed: timed.rate)
        rounded = max((timed for timed in rates if not timed.exact), key=lambda timed: timed.rate, default=fastest)
        if not fastest.rate:
            return None  # all clients failed
        if rounded.rate >= MIN_SPEEDUP_IF_NOT_EXACT * fastest.rate:
            fastest = rounded
        return Choice(runtime=RUNTIMES.resolve(fastest.spec), why=_speeds(fastest, rates))

    def _time(self, spec: Spec, calibration: Calibration) -> TimedRuntime:
        """Time a runtime; raises if it cannot do the work, or if timing it would take long."""
        runtime = self._build(spec)
        runtime.check(calibration.work)
        if runtime.home != self.home:
            raise ConfigError(f"runtime.device: {runtime.home}, and the server's state is on {self.home}")
        chunk = spec.get("chunk", 1)
        if self.home.type == "cpu" and calibration.step * chunk * runtime.workers / cores() > TOTAL_SECONDS:
            raise TimeoutError("it would take long to time it")
        return TimedRuntime(spec, calibration.rate(runtime, chunk), runtime.exact)

    def _untimed(self, seconds: float) -> Choice:
        spec = RUNTIMES.resolve({"name": "threads", "device": self.device})
        return Choice(runtime=spec, why=f"not timed, for one step takes {seconds:.1f} s", timed=False)

    def _try_restore(self, spec: Spec, work: Train) -> bool:
        try:
            return self.restore_choice(spec, work)
        except ConfigError:
            return False

    def _build(self, spec: Spec) -> Runtime:
        data = self.data if spec["name"] == "ray" else self.resident  # which sends the data to other processes
        runtime: Runtime = RUNTIMES.bind(spec)(self.task, data)
        return runtime

    def _log_choice(self, choice: Choice, cached: str = "") -> None:
        log.info("runtime: %s%s: %s", spec_text(choice.runtime), cached, printable(choice.why))
        if not self.runtime.exact:
            log.info(ROUNDED_NOTICE)


def spec_text(spec: Spec) -> str:
    """A runtime as text, such as "threads, 2 workers"."""
    sizes = {"chunk": "chunks of {}", "actors": "{} actors", "workers": "{} workers"}
    known = [words.format(spec[key]) for key, words in sizes.items() if isinstance(spec.get(key), int)]
    return ", ".join([str(spec.get("name")), *known[:1]])


def is_exact(spec: Spec) -> bool:
    """Whether a runtime's results equal those of serial to the bit; a user's own runtime counts as exact."""
    return spec.get("name") not in [*RUNTIMES] or runtime_class(spec).exact


def _speeds(fastest: TimedRuntime, rates: Sequence[TimedRuntime]) -> str:
    """The speed of the fastest, and the best speed of each other runtime, as text."""
    others: dict[str, float] = {}
    for spec, rate, _ in rates:
        if spec["name"] != fastest.spec["name"]:
            others[spec["name"]] = max(rate, others.get(spec["name"], 0.0))
    listed = ", ".join(f"{name} {rate:,.0f}" for name, rate in others.items())
    return f"{fastest.rate:,.0f} client steps/s" + (f" ({listed})" if listed else "")
