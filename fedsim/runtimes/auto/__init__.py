"""The fastest runtime for this network, these clients and this machine, found by trying them."""

import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple

from fedsim.base.catalogue import Spec
from fedsim.base.devices import devices
from fedsim.base.machine import cores
from fedsim.data import FederatedData
from fedsim.errors import ConfigError, printable, reason
from fedsim.federated.aggregate import Aggregator
from fedsim.federated.client import Train, Work
from fedsim.federated.runtime import Item, Results, Runtime
from fedsim.runtimes import RUNTIMES, runtime_class
from fedsim.runtimes.auto import choices
from fedsim.runtimes.auto.calibration import SECONDS, Calibration, release
from fedsim.runtimes.auto.candidates import candidate_specs, enough, ray_is_there
from fedsim.runtimes.auto.choices import Choice
from fedsim.training.task import Task
from fedsim.types import Job, State, Update

log = logging.getLogger(__name__)  # where it says what it chose, and why
GAIN = 1.5  # by which what is equal to rounding must beat what is equal to the bit, so that noise chooses no bits
ROUNDED = "runtime: results equal serial's to rounding; runtime.exact=true rules that out"


class Timed(NamedTuple):
    """A candidate and how fast it was."""

    spec: Spec
    rate: float  # client steps a second
    exact: bool


class Auto(Runtime):
    """The fastest of the other runtimes, timed on the first clients for a second or two, and remembered.

    One whose results equal serial's only to rounding is taken where it is 1.5 times as fast as the others, with
    `exact` not at all. `choice` is what was taken, as a config would name it; before the first cohort of two
    clients or more there is none, and threads run what there is to run.
    """

    def __init__(self, task: Task, data: FederatedData, /, *, exact: bool = False, device: str = "auto"):
        self.home = devices(device)[0]
        self.task, self.device, self.only_exact = task, device, exact
        self.data, self.resident = data, data.to(self.home)
        self.exact = exact  # or would have to be, where nothing is chosen yet
        self._choice: Spec | None = None
        self.runtime = self._build({"name": "threads", "device": device})

    @property
    def workers(self) -> int:
        """Of what it runs."""
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
        if name not in [*RUNTIMES] or name == "auto":  # nor is anything else imported that a file may name
            raise ConfigError(f"runtime.name: {name!r} is none that can be chosen")
        if name == "ray" and not ray_is_there():
            raise ConfigError("runtime: ray was chosen; this process has joined none, and RAY_ADDRESS names none")
        try:
            runtime = self._build(choice)
            runtime.check(work)
        except ConfigError:
            raise
        except Exception as error:  # such as of a cluster that is gone
            raise ConfigError(f"runtime: {name} cannot be had: {reason(error)}") from error
        if runtime.home != self.home:
            raise ConfigError(f"runtime.device: {runtime.home}, and the server's state is on {self.home}")
        if self.only_exact and not runtime.exact:
            raise ConfigError(f"runtime.exact: {name} equals serial to rounding only")
        self.runtime, self._choice, self.exact = runtime, RUNTIMES.resolve(choice), runtime.exact
        return True

    def run(self, work: Work, server: State, jobs: Iterable[Job], aggregator: Aggregator) -> Results:
        if self._choice is None and isinstance(work, Train):
            jobs = iter(jobs)
            first = list(islice(jobs, enough(self.device)))
            if len(first) > 1:
                self._choose(work, server, first, aggregator)
            jobs = chain(first, jobs)
        yield from self.runtime.run(work, server, jobs, aggregator)

    def map(
        self, work: Work, server: State, items: Iterable[Item]
    ) -> Iterator[tuple[Item, Update | BaseException]]:
        return self.runtime.map(work, server, items)

    def _choose(self, work: Train, server: State, first: list[Job], aggregator: Aggregator) -> None:
        """Take what was chosen before for the like of it, or the fastest on the `first` clients, and say so."""
        among = candidate_specs(self.device, len(first), exact=self.only_exact)
        key = choices.key(work, self.task, self.data, len(first), among, self.home)
        if (known := choices.recall(key)) and self._restored(known.runtime, work):
            self._say(known, " (cached)")
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again, where they count
            found = self._fastest(among, Calibration(work, self.data, server, first, aggregator))
        if found and self._restored(found.runtime, work):
            self._say(found)
            if found.timed:
                choices.remember(key, found)

    def _fastest(self, among: list[Spec], on: Calibration) -> Choice | None:
        """The fastest, and the others' speeds; None where the first of them, the reference, cannot do the work."""
        reference, *others = among
        try:
            serial = self._build(reference)
            rates = [Timed(reference, on.reference(serial), exact=True)]
            del serial  # before the next is there, for its memory
        except Exception:  # which comes again where the cohort is trained
            return None
        if on.step > SECONDS / 4:
            return self._untimed(on.step)
        for spec in others:
            release(self.home)
            if on.over:
                break
            try:
                rates.append(self._timed(spec, on))
            except Exception as error:  # it refuses the work, or has not the memory for it
                log.debug("runtime: not %s: %s", shown(spec), reason(error))
        fastest = max((timed for timed in rates if timed.exact), key=lambda timed: timed.rate)
        rounded = max((timed for timed in rates if not timed.exact), key=lambda timed: timed.rate, default=fastest)
        if not fastest.rate:
            return None  # no client came through
        if rounded.rate >= GAIN * fastest.rate:
            fastest = rounded
        return Choice(runtime=RUNTIMES.resolve(fastest.spec), why=_why(fastest, rates))

    def _timed(self, spec: Spec, on: Calibration) -> Timed:
        """Raises where it cannot be, or would take long to find out."""
        runtime = self._build(spec)
        runtime.check(on.work)
        if runtime.home != self.home:
            raise ConfigError(f"runtime.device: {runtime.home}, and the server's state is on {self.home}")
        chunk = spec.get("chunk", 1)
        if self.home.type == "cpu" and on.step * chunk * runtime.workers / cores() > SECONDS:
            raise TimeoutError("it would take long to time it")
        return Timed(spec, on.rate(runtime, chunk), runtime.exact)

    def _untimed(self, seconds: float) -> Choice:
        spec = RUNTIMES.resolve({"name": "threads", "device": self.device})
        return Choice(runtime=spec, why=f"not timed, for one step takes {seconds:.1f} s", timed=False)

    def _restored(self, spec: Spec, work: Train) -> bool:
        try:
            return self.restore_choice(spec, work)
        except ConfigError:
            return False

    def _build(self, spec: Spec) -> Runtime:
        data = self.data if spec["name"] == "ray" else self.resident  # it sends them to other processes
        runtime: Runtime = RUNTIMES.bind(spec)(self.task, data)
        return runtime

    def _say(self, choice: Choice, cached: str = "") -> None:
        log.info("runtime: %s%s: %s", shown(choice.runtime), cached, printable(choice.why))
        if not self.runtime.exact:
            log.info(ROUNDED)


def shown(spec: Spec) -> str:
    """A runtime in words: "threads, 2 workers"."""
    sizes = {"chunk": "chunks of {}", "actors": "{} actors", "workers": "{} workers"}
    known = [words.format(spec[key]) for key, words in sizes.items() if isinstance(spec.get(key), int)]
    return ", ".join([str(spec.get("name")), *known[:1]])


def is_exact(spec: Spec) -> bool:
    """Whether a runtime's results equal serial's to the bit; one of the user's own is taken for it."""
    return spec.get("name") not in [*RUNTIMES] or runtime_class(spec).exact


def _why(fastest: Timed, rates: Sequence[Timed]) -> str:
    """Its speed, and for each other runtime the best that it came to."""
    others: dict[str, float] = {}
    for spec, rate, _ in rates:
        if spec["name"] != fastest.spec["name"]:
            others[spec["name"]] = max(rate, others.get(spec["name"], 0.0))
    listed = ", ".join(f"{name} {rate:,.0f}" for name, rate in others.items())
    return f"{fastest.rate:,.0f} client steps/s" + (f" ({listed})" if listed else "")
