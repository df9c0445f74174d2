"""Checkpoints as a run goes."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedsim.experiment.hooks import Hook
from fedsim.types import Count

if TYPE_CHECKING:
    from fedsim.experiment.run import Run


@dataclass(kw_only=True)
class Checkpointing(Hook):
    """Saves every so many rounds, or with null only at the end, and in any case when a run ends or is stopped.

    The newest `keep` checkpoints stay in `checkpoints/` of the run's folder.
    """

    every: Count | None = 1
    keep: Count = 3
    priority: int = field(default=100, init=False)  # when the others have done what they do

    def before_run(self, run: "Run") -> None:
        self._data = run.simulation.digest()
        self._saved: tuple[object, ...] | None = None
        if run.notes:  # of what changed, which is not to be asked again
            self._save(run)

    def after_round(self, run: "Run", record: dict[str, Any]) -> None:
        if self.every and record["round"] % self.every == 0:
            self._save(run)

    def after_run(self, run: "Run") -> None:
        if self._saved != self._state(run):
            self._save(run)

    def _save(self, run: "Run") -> None:
        if run.folder is None:
            return
        run.folder.checkpoints.save(
            run.simulation,
            run.folder.log(),
            self.keep,
            config=run.config.model_dump(mode="json"),
            data=self._data,
            last=run.unlogged._asdict() if run.unlogged else None,
            stopped=run.stopped,
            seconds=run.seconds,
        )
        self._saved = self._state(run)

    @staticmethod
    def _state(run: "Run") -> tuple[object, ...]:
        return run.simulation.number, run.unlogged is None, run.stopped
