"""A whole run: rounds and evaluations, what they leave behind, and how it goes on after it was stopped."""

import resource
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Self

import numpy as np

from fedsim.checkpoint import changes, data_hash, versions
from fedsim.config import Config, build, build_hooks, load
from fedsim.errors import ConfigError
from fedsim.files import uninterrupted
from fedsim.folder import RunFolder, finite
from fedsim.hooks import Hook, Hooks
from fedsim.simulation import Round, Simulation

Record = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What summary.json and rounds.jsonl hold, and the folder with them, if one was asked for."""

    summary: Record
    rounds: list[Record]
    folder: Path | None
    interrupted: bool


@dataclass
class Run:
    """A run under way; hooks are shown it."""

    config: Config
    simulation: Simulation
    folder: RunFolder | None = None
    records: list[Record] = field(default_factory=list)  # the lines of rounds.jsonl
    before: float = 0.0  # seconds that it had taken when it was last stopped
    notes: list[str] = field(default_factory=list)  # what the user should know of how it began
    stopped: str | None = None  # why, where a hook ended it

    def __post_init__(self) -> None:
        self.began = perf_counter()

    @classmethod
    def resume(cls, path: Path, overrides: Mapping[str, Any], force: bool = False) -> Self:
        """A run that was stopped or killed, or is to be longer, at its last checkpoint that is whole.

        Raises ConfigError where settings changed that change the result, unless by `force`; and where another
        process is running it.
        """
        config = load(path / "config.yaml", overrides)
        folder = RunFolder(path)
        try:
            saved, notes = folder.checkpoints.latest(path)
            simulation = build(config)
            if saved is None:
                folder.checkpoints.start(simulation)
                return cls(config, simulation, folder, folder.go_on(config, None))
            checkpoint, server = saved
            notes += _compared(path, config, simulation, checkpoint, force)
            folder.checkpoints.restore(simulation, checkpoint, server)
            records = folder.go_on(config, checkpoint.log)
            return cls(config, simulation, folder, records, checkpoint.seconds, notes)
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
    loaded = load(config, overrides)
    simulation = build(loaded)
    folder = None if out is None else RunFolder.create(Path(out), loaded, simulation.data)
    if folder:
        folder.checkpoints.start(simulation)
    return execute(Run(loaded, simulation, folder), hooks)


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
    """Run to the end what was made or resumed.

    An interrupt (Ctrl-C) ends the run after the clients under way, and is told in the result. Whatever else ends
    it early is raised, and leaves the rounds before it.
    """
    told = Hooks([*build_hooks(run.config), *hooks])
    failure: BaseException | None = None
    try:
        told.begin(run)
        while not run.finished:
            _round(run, told)
    except BaseException as error:
        failure = error
    summary = _summary(run)
    try:
        for last in (partial(_finish, run, None if failure else summary), partial(told.end, run)):
            try:
                last()
            except (Exception, KeyboardInterrupt) as error:  # what ended the run is what the user wants to know
                failure = failure or error
    finally:
        if run.folder:
            run.folder.close()
    if failure and not isinstance(failure, KeyboardInterrupt):
        raise failure
    return Result(summary, run.records, run.folder.path if run.folder else None, failure is not None)


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
    try:
        if done.round == run.config.rounds or done.round % run.config.evaluate.every == 0:
            told.tell("before_evaluation", run, record)
            record |= _tests(run.config, run.simulation)
            told.tell("after_evaluation", run, record)
    except Exception:  # the round counts, whatever its test came to
        _log(run, record)
        raise
    _log(run, record)
    told.tell("after_round", run, run.records[-1])


def _log(run: Run, record: Record) -> None:
    record = finite(record)
    with uninterrupted():
        if run.folder:
            run.folder.round(record)
        run.records.append(record)


def _finish(run: Run, summary: Record | None) -> None:
    if run.folder:
        run.folder.finish(run.simulation.task.state_dict(run.simulation.server), summary)


def _tests(config: Config, simulation: Simulation) -> Record:
    test = simulation.evaluate(config.evaluate.batch_size)
    found = {"test_loss": test.loss, "test_accuracy": test.accuracy}
    if config.evaluate.clients:
        clients = simulation.evaluate_clients(batch_size=config.evaluate.batch_size)
        found |= spread([each.accuracy for each in clients.values()])
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
    return {
        "rounds": len(records),
        "test_accuracy": tested[-1]["test_accuracy"] if tested else None,
        "test_loss": tested[-1]["test_loss"] if tested else None,
        "best_test_accuracy": max((record["test_accuracy"] for record in tested), default=None),
        "fingerprint": run.simulation.fingerprint(),
        "stopped": run.stopped,
        "seconds": run.seconds,
        "client_steps_per_second": sum(r["steps"] for r in records) / training if records else 0.0,
        "bytes_up": sum(record["bytes_up"] for record in records),
        "bytes_down": sum(record["bytes_down"] for record in records),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _compared(path: Path, config: Config, simulation: Simulation, checkpoint: Any, force: bool) -> list[str]:
    """What changed since the checkpoint was made; raises ConfigError where that is not harmless."""
    if config.rounds < checkpoint.round:
        raise ConfigError(f"rounds: {config.rounds}, and {path} has done {checkpoint.round}")
    result, free = changes(checkpoint.config, config.model_dump(mode="json"))
    if data_hash(simulation.data) != checkpoint.data:
        result.append("data: other examples, or other owners of them, than when the run began")
    if result and not force:
        raise ConfigError(f"{'; '.join(result)}: this changes the result; --force goes on all the same")
    now = versions()
    free += [
        f"{name}: {now.get(name)}, and was {v}" for name, v in checkpoint.versions.items() if now.get(name) != v
    ]
    return [f"changed since the checkpoint: {change}" for change in [*result, *free]]
