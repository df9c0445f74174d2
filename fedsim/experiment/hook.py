"""Hooks: what happens around a run, its rounds, clients and evaluations, besides the learning itself."""

import json
from collections.abc import Coroutine, Generator, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from fedsim.base.catalogue import check_methods
from fedsim.errors import ConfigError, RoundError, WrongReturnError, border
from fedsim.experiment.folder import finite
from fedsim.experiment.run import Run
from fedsim.types import Report

CHECKPOINT_PRIORITY = 100  # hooks from this priority on are called after a checkpoint is written


@dataclass
class Hook:
    """Overrides the methods for the events that it needs.

    Hooks are called in the order of their `priority`, the lowest first, and at the end of the run in the reverse
    order. The checkpoint of a round is written after the hooks with a priority below 100 were called.

    A hook may read everything in `run`. It may end the run by `run.stop(why)` or by raising RoundError, and must
    change nothing else. After a resume `run.records` holds the earlier rounds, and a hook should compute its own
    state from them. For a round in which the run was stopped or killed, a hook may be called again, or for some
    events only. Hooks are called in the main thread, or where a sweep trains several runs as one batch, in the
    run's own thread while the other runs wait.
    """

    _: KW_ONLY
    priority: int = 50

    def before_run(self, run: Run) -> None:
        """Before the first round, or before the first after a resume."""

    def before_round(self, run: Run) -> None:
        """Round `run.simulation.number` + 1 begins."""

    def before_client(self, run: Run, client: int) -> None:
        """A client is handed to the runtime, which may start it later."""

    def after_client(self, run: Run, report: Report) -> None:
        """A client finished, or was dropped."""

    def before_evaluation(self, run: Run, record: dict[str, Any]) -> None:
        """The global model is about to be tested; the record has what is known of the round."""

    def after_evaluation(self, run: Run, record: dict[str, Any]) -> None:
        """It was tested, and the record has the figures; a hook may add numbers of its own, and change none."""

    def after_round(self, run: Run, record: dict[str, Any]) -> None:
        """The round is over, and its record is a line of rounds.jsonl and the last in `run.records`."""

    def after_run(self, run: Run) -> None:
        """The run ended, was stopped or failed, after this hook's `before_run` returned."""


def check_hooks(hooks: Iterable[Hook]) -> list[Hook]:
    """The hooks as a list; raises ConfigError where one is no Hook, or has a method that cannot be called."""
    try:
        hooks = list(hooks)
    except TypeError:
        raise ConfigError(f"hooks: {hooks!r} should be a list of hooks") from None
    for hook in hooks:
        if isinstance(hook, type) and issubclass(hook, Hook):
            raise ConfigError(f"hooks: {hook.__name__} is a class; give an instance, {hook.__name__}()")
        if not isinstance(hook, Hook):
            raise ConfigError(f"hooks: {hook!r} is no Hook")
        check_methods(hook, Hook, "hooks")
        if not isinstance(hook.priority, int):
            raise ConfigError(
                f"hooks: {type(hook).__name__}.priority is {hook.priority!r}; it should be a whole number"
            )
    return hooks


def call_hook(hook: Hook, event: str, *arguments: Any) -> None:
    """Call a hook's method; raises RoundError with its place in the hook's code where it fails."""

    def says_enough(error: BaseException) -> bool:
        names_a_file = isinstance(error, OSError) and bool(error.filename)
        return names_a_file or (isinstance(error, ConfigError) and event == "before_run")

    with border(f"hook {type(hook).__name__}, {event}", RoundError, says_enough):
        given = getattr(hook, event)(*arguments)
        if isinstance(given, Mapping | Coroutine | Generator):  # meant as a new record, or not run at all
            raise WrongReturnError(f"gave {type(given).__name__}, which nobody reads; a hook gives nothing")


def call_hooks(hooks: Iterable[Hook], event: str, *arguments: Any) -> None:
    """Call this method of each hook."""
    for hook in hooks:
        call_hook(hook, event, *arguments)


def show_record(hooks: Iterable[Hook], event: str, run: Run, record: dict[str, Any], *, add: bool = True) -> None:
    """Call this method of each hook with a record, to which it may only `add` fields, if even that.

    Raises RoundError where a hook does something else with it; the record is then as it was.
    """
    fixed = copied(record)
    for hook in hooks:
        at, wrong = f"hook {type(hook).__name__}, {event}", list[str]()
        try:
            call_hook(hook, event, run, record)
        finally:
            wrong += [name for name in fixed if not (name in record and _same(record[name], fixed[name]))]
            wrong += [] if add else [name for name in record if name not in fixed]
            if wrong:
                record.clear()
                record.update(fixed)
        if wrong:
            may = "may add fields, and change none" if add else "may no longer change it, for it is written"
            raise RoundError(f"{at}: changed {wrong[0]!r} of the record; a hook {may}")
        added = {name: value for name, value in record.items() if name not in fixed}
        if unfit := [name for name, value in added.items() if not (isinstance(name, str) and _fits_json(value))]:
            raise RoundError(f"{at}: added {unfit[0]!r}, which rounds.jsonl cannot hold; add numbers with names")


def _fits_json(value: Any) -> bool:
    try:
        json.dumps(finite({"": value}), allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def copied(record: dict[str, Any]) -> dict[str, Any]:
    """A copy of a record, with copies of its lists and mappings."""
    return {name: value.copy() if isinstance(value, list | dict) else value for name, value in record.items()}


def _same(value: Any, before: Any) -> bool:
    return value is before or (type(value) is type(before) and value == before)
