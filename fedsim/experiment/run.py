"""A whole run: rounds and evaluations, what they leave behind, and how it goes on after it was stopped."""

import resource
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Self

import numpy as np

from fedsim.base.catalogue import Spec
from fedsim.base.files import uninterrupted
from fedsim.errors import ConfigError
from fedsim.experiment.build import build, build_hooks
from fedsim.experiment.checkpoint import Checkpoint, changes, versions
from fedsim.experiment.config import Config, load
from fedsim.experiment.folder import RunFolder, finite
from fedsim.experiment.hooks import Hook, Hooks
from fedsim.federated.simulation import Round, Simulation
from fedsim.runtimes import RUNTIMES
from fedsim.runtimes.auto import is_exact, spec_text

Record = dict[str, Any]
Make = Callable[[Config], Simulation]


@dataclass(frozen=True)
class Result:
    """What summary.json and rounds.jsonl hold, and the folder with them, if one was asked for."""

    summary: Record
    rounds: list[Record]
    folder: Path | None
    interrupted: bool


@dataclass
class Run:
    """A run under way; hooks are spec_text it."""

    config: Config
    simulation: Simulation
    folder: RunFolder | None = None
    hooks: list[Hook] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)  # the lines of rounds.jsonl
    before: float = 0.0  # seconds that it had taken when it was last stopped
    notes: list[str] = field(default_factory=list)  # what the user should know of how it began
    stopped: str | None = None  # why, where a hook ended it
    failure: BaseException | None = None  # what ended it early, if not a hook
    summary: Record = field(default_factory=dict)  # when it has ended

    def __post_init__(self) -> None:
        self.began = perf_counter()

    @classmethod
    def start(
        cls, config: Config, folder: Path | None = None, stem: str | None = None, *, make: Make = build
    ) -> Self:
        """A new run: in a new `folder`, or a new runs/STEM-N, or without one. Raises ConfigError."""
        simulation, hooks = make(config), build_hooks(config)
        if folder is None and stem is None:
            return cls(config, simulation, None, hooks)
        made = (
            RunFolder.create(folder, config, simulation.data)
            if folder
            else RunFolder.number(stem or "", config, simulation.data)
        )
        made.checkpoints.start(simulation)
        return cls(config, simulation, made, hooks)

    @classmethod
    def resume(
        cls,
        path: Path,
        overrides: Mapping[str, Any],
        force: bool = False,
        *,
        make: Make = build,
        most: int | None = None,
    ) -> Self:
        """A run that was stopped or killed, or is to be longer, at its last checkpoint, of `most` rounds if given.

        Raises ConfigError where settings changed that change the result, unless by `force`; and where another
        process is running it.
        """
        if not (path / "config.yaml").is_file():
            raise ConfigError(f"{path}: is no folder of a run; it has no config.yaml")
        config, was = load(path / "config.yaml", overrides), load(path / "config.yaml")
        folder = RunFolder(path)
        try:
            saved, notes = folder.checkpoints.latest(path, most)
            if saved is None and (path / "summary.json").exists():
                raise ConfigError(f"{path}: has no checkpoints, and is finished")
            simulation, hooks = make(config), build_hooks(config)
            if saved is None:
                notes += _changed(was.model_dump(mode="json"), config, [], force)
                notes += ["no checkpoint: starts with round 1"] if folder.begun else []
                folder.checkpoints.start(simulation)
                folder.go_on(config, simulation.data, None)
                return cls(config, simulation, folder, hooks, notes=notes)
            checkpoint, server = saved
            if config.rounds < checkpoint.round:
                raise ConfigError(f"rounds: {config.rounds}, and {path} has done {checkpoint.round}")
            others = ["data or model: other examples, owners, frozen weights or teacher"]
            others = [] if simulation.digest() == checkpoint.data else others
            changed = _changed(checkpoint.config, config, others, force)
            folder.checkpoints.restore(simulation, checkpoint, server)
            other = _other_runtime(checkpoint, simulation, RUNTIMES.resolve(config.runtime))
            records = folder.go_on(config, simulation.data, checkpoint.log)
            notes += [*changed, *other, *_other_versions(checkpoint.versions)]
            own_length = config.local["schedule"].get("rounds")
            length = own_length + config.local["warmup"] if own_length else config.rounds
            if checkpoint.config["rounds"] < config.rounds > length:
                notes += [f"local.schedule is over after {length} rounds; what follows has its last learning rate"]
            same_end = all(getattr(config, key) == checkpoint.config.get(key) for key in ("rounds", "hooks"))
            stopped = checkpoint.stopped if same_end else None
            return cls(config, simulation, folder, hooks, records, checkpoint.seconds, notes, stopped)
        except BaseException:
            folder.close()
            raise

    @property
    def unlogged(self) -> Round | None:
        """The last round's result, if it has no record yet."""
        return self.simulation.last if self.simulation.number > len(self.records) else None

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.stopped is not None or len(self.records) >= self.config.rounds

    @property
    def seconds(self) -> float:
        """That it has taken."""
        return self.before + perf_counter() - self.began

    def stop(self, why: str) -> None:
        """End after the round that is under way."""
        self.stopped = self.stopped or why


def run(
    config: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    hooks: Iterable[Hook] = (),
) -> Result:
    """Run an experiment: a YAML file or its mapping, with dotted overrides such as {"strategy.mu": 0.1}.

    `out` names a new folder for what the run leaves behind; without it nothing is written. `hooks` are told of the
    run besides those that the config names. Raises ConfigError for wrong settings, ClientError or RoundError for a
    run that failed.
    """
    return execute(Run.start(load(config, overrides), None if out is None else Path(out)), hooks)


def resume(
    folder: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
    hooks: Iterable[Hook] = (),
) -> Result:
    """Go on with a run that was stopped or killed, as if it had not been; {"rounds": 200} makes it longer.

    Overrides that would change the result are refused, unless by `force`. Raises what `run` raises, and
    ConfigError where the folder holds no run or another process is running it.
    """
    resumed = Run.resume(Path(folder), overrides or {}, force)
    try:
        for note in resumed.notes:
            warnings.warn(note, stacklevel=2)
    except Warning:  # some have them raised
        if resumed.folder:
            resumed.folder.close()
        raise
    return execute(resumed, hooks)


def execute(run: Run, hooks: Iterable[Hook] = ()) -> Result:
    """Run to the end what was started or resumed.

    An interrupt (Ctrl-C) ends the run after the clients under way, and is told in the result; a second one waits
    until all is written. Whatever else ends it early is raised, and leaves the rounds before it.
    """
    told = Hooks([])
    try:
        told = Hooks([*run.hooks, *hooks])
        told.begin(run)
        while not run.finished:
            _round(run, told)
    except BaseException as error:
        run.failure = error
    try:
        with suppress(KeyboardInterrupt), uninterrupted():
            run.summary = _summary(run)
            told.end(run)
    except Exception as error:
        if run.failure is None or isinstance(run.failure, KeyboardInterrupt):
            run.failure = error
    finally:
        if run.folder:
            run.folder.close()
        run.simulation.runtime.close()
    if run.failure and not isinstance(run.failure, KeyboardInterrupt):
        raise run.failure
    folder = run.folder.path if run.folder else None
    return Result(run.summary, run.records, folder, interrupted=run.failure is not None)


def _round(run: Run, told: Hooks) -> None:
    """One round and its test; or after a resume, the test of a round that had none yet."""
    if not run.unlogged:
        told.tell("before_round", run)
        run.simulation.round(
            lambda report: told.tell("after_client", run, report),
            lambda client: told.tell("before_client", run, client),
        )
    done = run.simulation.last
    assert done is not None
    record = done._asdict()
    if done.round == run.config.rounds or done.round % run.config.evaluate.every == 0:
        told.tell("before_evaluation", run, record)
        record |= _tests(run.config, run.simulation)
        told.tell("after_evaluation", run, record)
    record = finite(record)
    with uninterrupted():
        if run.folder:
            run.folder.round(record)
        run.records.append(record)
    told.tell("after_round", run, record)


def _tests(config: Config, simulation: Simulation) -> Record:
    size, train = config.evaluate.batch_size, config.evaluate.mode == "train"
    test = simulation.evaluate(size, train=train)
    found = {"test_loss": test.loss, "test_accuracy": test.accuracy}
    if simulation.ema:
        mean = simulation.evaluate(size, simulation.ema, train=train)
        found |= {"ema_test_loss": mean.loss, "ema_test_accuracy": mean.accuracy}
    if config.evaluate.clients:
        clients = simulation.evaluate_clients(batch_size=size, train=train)
        found |= spread([each.accuracy for each in clients.values()]) if clients else {}
    return found


def spread(accuracies: list[float]) -> dict[str, float]:
    """Over clients, each counting once: the mean, the standard deviation, and the mean of the worst tenth."""
    ordered = np.sort(accuracies)
    worst = ordered[: max(len(ordered) // 10, 1)]
    return {
        "client_accuracy_mean": float(ordered.mean()),
        "client_accuracy_std": float(ordered.std()),
        "client_accuracy_worst_decile": float(worst.mean()),
    }


def _summary(run: Run) -> Record:
    records = run.records
    tested = [record for record in records if "test_accuracy" in record]
    training = sum(record["seconds"] for record in records)
    last = tested[-1] if tested else {}
    ema = {"ema_test_accuracy": last.get("ema_test_accuracy")} if run.simulation.ema else {}
    return {
        "rounds": len(records),
        "test_accuracy": last.get("test_accuracy"),
        "test_loss": last.get("test_loss"),
        **ema,
        "best_test_accuracy": max((record["test_accuracy"] for record in tested), default=None),
        "fingerprint": run.simulation.fingerprint(),
        "stopped": run.stopped,
        "seconds": run.seconds,
        "client_steps_per_second": sum(r["steps"] for r in records) / training if records else 0.0,
        "bytes_up": sum(record["bytes_up"] for record in records),
        "bytes_down": sum(record["bytes_down"] for record in records),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _changed(before: Mapping[str, Any], config: Config, others: list[str], force: bool) -> list[str]:
    """In words, what is not as it was; raises ConfigError where it changes the result, unless by `force`."""
    result, free = changes(before, config.model_dump(mode="json"))
    result += others
    if result and not force:
        raise ConfigError(f"{'; '.join(result)}: this changes the result; --force goes on all the same")
    return [f"changed: {change}" for change in [*result, *free]]


def _other_runtime(checkpoint: Checkpoint, simulation: Simulation, now: Spec) -> list[str]:
    """Have a runtime go on as it had chosen to; in words, what is another now, and rounds in another way.

    Raises ConfigError where the clients are others, who do not have what theirs have kept.
    """
    runtime, before = simulation.runtime, checkpoint.runtime or checkpoint.config["runtime"]
    now = runtime.choice or now
    agree = "results agree as floating point does"
    if checkpoint.runtime:
        try:
            if runtime.restore_choice(checkpoint.runtime, simulation.work):
                return []
        except ConfigError as error:
            if simulation.data.clients_are_remote:
                raise
            return [f"changed: {error}; it was {spec_text(before)}, and is chosen anew; {agree}"]
    same = before == now or (is_exact(before) and is_exact(now))
    return [] if same else [f"changed: runtime: {spec_text(now)}, and was {spec_text(before)}; {agree}"]


def _other_versions(before: Mapping[str, str]) -> list[str]:
    now = versions()
    return [
        f"changed: {name} {now.get(name)}, and was {was}; results agree as floating point does"
        for name, was in before.items()
        if now.get(name) != was
    ]
