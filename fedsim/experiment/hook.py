"""Hooks: what happens around a run, its rounds, clients and evaluations, besides the learning itself."""

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Any

from fedsim.errors import ClientError, ConfigError, RoundError, located
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
        """It was tested, and the record has the figures; a hook may add numbers of its own."""

    def after_round(self, run: Run, record: dict[str, Any]) -> None:
        """The round is over, and its record is a line of rounds.jsonl and the last in `run.records`."""

    def after_run(self, run: Run) -> None:
        """The run ended, was stopped or failed, after this hook's `before_run` returned."""


def check_hooks(hooks: Iterable[Hook]) -> list[Hook]:
    """The hooks as a list; raises ConfigError where one is no Hook."""
    hooks = list(hooks)
    for hook in hooks:
        if isinstance(hook, type) and issubclass(hook, Hook):
            raise ConfigError(f"hooks: {hook.__name__} is a class; give an instance, {hook.__name__}()")
        if not isinstance(hook, Hook):
            raise ConfigError(f"hooks: {hook!r} is no Hook")
    return hooks


def call_hook(hook: Hook, event: str, *arguments: Any) -> None:
    """Call a hook's method; raises RoundError with its place in the hook's code where it fails."""
    try:
        getattr(hook, event)(*arguments)
    except (ConfigError, ClientError, RoundError):
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, OSError) and error.filename:  # names the file and the reason already
            raise
        raise RoundError(f"hook {type(hook).__name__}, {event}: {located(error)}") from error


def call_hooks(hooks: Iterable[Hook], event: str, *arguments: Any) -> None:
    """Call this method of each hook."""
    for hook in hooks:
        call_hook(hook, event, *arguments)
