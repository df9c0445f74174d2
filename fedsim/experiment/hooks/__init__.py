"""Hooks: what happens around a run, its rounds, clients and evaluations, besides the learning itself."""

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from fedsim.base.catalogue import Catalogue
from fedsim.errors import ClientError, ConfigError, RoundError, located
from fedsim.types import Report

if TYPE_CHECKING:
    from fedsim.experiment.run import Run

HOOKS = Catalogue(
    "hooks",
    "fedsim.experiment.hooks",
    {
        "stop_on_non_finite": "stopping:StopOnNonFinite",
        "early_stopping": "stopping:EarlyStopping",
        "tensorboard": "tensorboard:TensorBoard",
        "curves": "curves:Curves",
    },
)


@dataclass
class Hook:
    """Overrides what it wants to be told; hooks of lower `priority` are told first, but last of the run's end.

    A hook looks at `run`, may end it by `run.stop(why)` or by raising RoundError, and changes nothing else. After
    a resume `run.records` holds the rounds before it, so what a hook knows it had best work out from there; of a
    round in which a run was stopped or killed it may be told again, or not to the end. All is told in the main
    thread, or where a sweep trains several runs as one batch, in the run's own, while no other goes on.
    """

    _: KW_ONLY
    priority: int = 50

    def before_run(self, run: "Run") -> None:
        """Before the first round, or before the first after a resume."""

    def before_round(self, run: "Run") -> None:
        """Round `run.simulation.number` + 1 begins."""

    def before_client(self, run: "Run", client: int) -> None:
        """A client is handed to the runtime, which may let it wait."""

    def after_client(self, run: "Run", report: Report) -> None:
        """A client finished, or was dropped."""

    def before_evaluation(self, run: "Run", record: dict[str, Any]) -> None:
        """The global model is about to be tested; the record has what is known of the round."""

    def after_evaluation(self, run: "Run", record: dict[str, Any]) -> None:
        """It was tested, and the record has the figures; numbers of one's own may be added."""

    def after_round(self, run: "Run", record: dict[str, Any]) -> None:
        """The round is over, and the record, a line of rounds.jsonl, the last in `run.records`."""

    def after_run(self, run: "Run") -> None:
        """The run ended or was stopped, in whatever way, after `before_run` came through."""


class Hooks:
    """The hooks of a run in their order: by priority, and of the same in that in which they were named."""

    def __init__(self, hooks: Iterable[Hook]):
        hooks = list(hooks)
        if strange := [hook for hook in hooks if not isinstance(hook, Hook)]:
            raise ConfigError(f"hooks: {strange[0]!r} is no Hook; a class of one is to be called")
        self.hooks = sorted(hooks, key=lambda hook: hook.priority)
        self.begun: list[Hook] = []

    def begin(self, run: "Run") -> None:
        """Tell all hooks that the run begins."""
        for hook in self.hooks:
            _tell(hook, "before_run", run)
            self.begun.append(hook)

    def tell(self, event: str, *about: Any) -> None:
        """Tell all hooks."""
        for hook in self.hooks:
            _tell(hook, event, *about)

    def end(self, run: "Run") -> None:
        """Tell those that the run's beginning was told; all of them, and the first that fails is raised then.

        An interrupt ends one of them, and not what the others have to save.
        """
        errors = list[BaseException]()
        for hook in reversed(self.begun):
            try:
                _tell(hook, "after_run", run)
            except (Exception, KeyboardInterrupt) as error:
                errors.append(error)
        self.begun = []
        if errors:
            raise errors[0]


def _tell(hook: Hook, event: str, *about: Any) -> None:
    try:
        getattr(hook, event)(*about)
    except (ConfigError, ClientError, RoundError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename:  # which says enough: a file, and what it suffered from
            raise
        raise RoundError(f"hook {type(hook).__name__}, {event}: {located(error)}") from error
