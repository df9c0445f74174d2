"""A whole run: rounds and tests, the hooks around them, checkpoints as it goes, and its results at the end."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from fedsim.base.files import uninterrupted
from fedsim.base.modes import own_modes
from fedsim.errors import ConfigError, RoundError, is_interrupt, located
from fedsim.experiment.config import load
from fedsim.experiment.figures import evaluate, evaluate_new_clients, summarize
from fedsim.experiment.folder import finite
from fedsim.experiment.hook import (
    CHECKPOINT_PRIORITY,
    Hook,
    call_hook,
    call_hooks,
    check_hooks,
    copied,
    show_record,
)
from fedsim.experiment.run import Record, Run
from fedsim.experiment.start import new_run, resumed_run
from fedsim.federated.runtime import close, tell_finished


@dataclass(frozen=True)
class Result:
    """What summary.json and rounds.jsonl hold, and the folder with them, if one was asked for."""

    summary: Record
    rounds: list[Record]
    folder: Path | None
    interrupted: bool


@own_modes()
def run(
    config: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    hooks: Iterable[Hook] = (),
) -> Result:
    """Run an experiment: a YAML file or its mapping, with dotted overrides such as {"strategy.mu": 0.1}.

    `out` names a new folder for what the run leaves behind; without it nothing is written. `hooks` are called
    besides those that the config names. Raises ConfigError for wrong settings, ClientError or RoundError for a run
    that failed.
    """
    hooks = check_hooks(hooks)
    started, named = new_run(load(config, overrides), None if out is None else Path(out))
    result = execute(_warned(started), [*named, *hooks])
    _tell(started.warnings)
    return result


@own_modes()
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
    hooks = check_hooks(hooks)
    started, named = resumed_run(Path(folder), overrides or {}, force)
    result = execute(_warned(started), [*named, *hooks])
    _tell(started.warnings)
    return result


def _warned(run: Run) -> Run:
    """The run, after a warning for each of its notes."""
    try:
        for note in run.notes:
            warnings.warn(note, stacklevel=4)  # below the decorator
    except Warning:  # where the caller has warnings raised as errors
        if run.folder:
            run.folder.close()
        raise
    return run


def _tell(lines: Iterable[str]) -> None:
    for line in lines:
        warnings.warn(line, RuntimeWarning, stacklevel=4)


@own_modes()
def execute(run: Run, hooks: Iterable[Hook] = ()) -> Result:
    """Run to its end what `new_run` or `resumed_run` started.

    An interrupt (Ctrl-C) ends the run after the clients under way, and the result says so; a second one waits
    until all is written. Whatever else ends the run early is raised, and leaves the rounds before it.
    """
    hooks = sorted(hooks, key=lambda hook: hook.priority)
    early = [hook for hook in hooks if hook.priority < CHECKPOINT_PRIORITY]
    late = hooks[len(early) :]
    checkpoint = Checkpointer(run)
    endings = list[Callable[[], None]]()  # of all that has begun, called in reverse order
    try:
        for hook in early:
            call_hook(hook, "before_run", run)
            endings.append(partial(call_hook, hook, "after_run", run))
        endings.append(partial(_save_results, run))
        if run.notes:  # with the changed settings, so that the next resume need not be forced again
            checkpoint.save()
        endings.append(checkpoint.save)
        for hook in late:
            call_hook(hook, "before_run", run)
            endings.append(partial(call_hook, hook, "after_run", run))
        while not run.finished:
            record = _round(run, hooks)
            show_record(early, "after_round", run, record, add=False)
            checkpoint.after_round()
            show_record(late, "after_round", run, record, add=False)
        if run.simulation.data.new_clients:
            run.new_clients = finite(evaluate_new_clients(run.simulation, run.config.evaluate))
    except BaseException as error:
        run.failure = KeyboardInterrupt() if is_interrupt(error) else error
    try:
        with suppress(KeyboardInterrupt), uninterrupted():
            run.summary = summarize(run)
            _end(endings)
        if run.finished and run.failure is None:
            with suppress(KeyboardInterrupt):  # all is saved
                tell_finished(run.simulation.runtime, run.simulation.clients)
    except Exception as error:
        if run.failure is None or isinstance(run.failure, KeyboardInterrupt):
            run.failure = error
    finally:
        if run.folder:
            run.folder.close()
        try:
            close(run.simulation.runtime)
        except RoundError as error:
            run.failure = run.failure or error
    if run.failure and not isinstance(run.failure, KeyboardInterrupt):
        raise run.failure
    folder = run.folder.path if run.folder else None
    return Result(run.summary, run.records, folder, interrupted=run.failure is not None)


def _round(run: Run, hooks: list[Hook]) -> Record:
    """One round and its test, or after a resume the test of a round that had none yet; returns its record."""
    if not run.unlogged:
        call_hooks(hooks, "before_round", run)
        run.simulation.round(
            lambda report: call_hooks(hooks, "after_client", run, report),
            lambda client: call_hooks(hooks, "before_client", run, client),
        )
    done = run.simulation.last
    assert done is not None
    record = copied(done.record())
    if done.stopped or done.round == run.config.rounds or done.round % run.config.evaluate.every == 0:
        show_record(hooks, "before_evaluation", run, record)
        record |= evaluate(run.simulation, run.config.evaluate)
        show_record(hooks, "after_evaluation", run, record)
    record = finite(record)
    with uninterrupted():
        if run.folder:
            run.folder.round(record)
        run.records.append(record)
    if done.stopped:
        run.stop(done.stopped)
    return record


class Checkpointer:
    """Writes the checkpoints of one run, if it has a folder, and none twice."""

    def __init__(self, run: Run):
        self.run, self.settings = run, run.config.checkpoint
        self.saved: tuple[object, ...] | None = None  # what the last checkpoint knows

    @cached_property
    def data(self) -> str:
        """The hash of data and constants, which takes a while and is the same in all checkpoints."""
        return self.run.simulation.digest()

    def after_round(self) -> None:
        """Save where the last round's checkpoint is due."""
        if self.settings.every and self.run.records[-1]["round"] % self.settings.every == 0:
            self.save()

    def save(self) -> None:
        """Save unless the last checkpoint knows all; raises OSError."""
        run = self.run
        now = run.simulation.number, run.unlogged is None, run.stopped
        if run.folder is None or now == self.saved:
            return
        with _saving("checkpoint"):
            run.folder.checkpoints.save(
                run.simulation,
                run.folder.log(),
                self.settings.keep,
                config=run.config.model_dump(mode="json"),
                data=self.data,
                partition=run.folder.partition,
                last=run.unlogged.record() if run.unlogged else None,
                stopped=run.stopped,
                seconds=run.seconds,
            )
        self.saved = now


def _save_results(run: Run) -> None:
    """The global model and its running mean, and where the run reached its end, summary.json."""
    if run.folder:
        task, server, ema = run.simulation.task, run.simulation.server, run.simulation.ema
        with _saving("results"):
            means = None if ema is None else task.state_dict(ema)
            run.folder.finish(task.state_dict(server), means, task.order, None if run.failure else run.summary)


@contextmanager
def _saving(what: str) -> Iterator[None]:
    """Raise RoundError for what cannot be written because of what it is; OSError, of the disk, stays."""
    try:
        yield
    except (OSError, ConfigError, RoundError):
        raise
    except Exception as error:
        raise RoundError(f"{what}: cannot be written: {located(error)}") from error


def _end(endings: list[Callable[[], None]]) -> None:
    """Call all of them, the last one first, and raise the first error.

    An interrupt ends one of them only, for the others have something to save.
    """
    errors = list[BaseException]()
    for ending in reversed(endings):
        try:
            ending()
        except (Exception, KeyboardInterrupt) as error:
            errors.append(error)
    if errors:
        raise errors[0]
