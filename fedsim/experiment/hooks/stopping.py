"""Hooks that end a run before its last round."""

from dataclasses import dataclass
from typing import Any, Literal

from fedsim.errors import ConfigError, RoundError
from fedsim.experiment.hook import Hook
from fedsim.experiment.run import Run
from fedsim.types import Count, NonNegative


@dataclass(kw_only=True)
class StopOnNonFinite(Hook):
    """Fails a run whose test loss is not finite; what clients send or the server makes is always checked."""

    priority: int = 10

    def before_run(self, run: Run) -> None:
        for record in run.records[-1:]:
            self.after_round(run, record)

    def after_round(self, run: Run, record: dict[str, Any]) -> None:
        if "test_loss" in record and record["test_loss"] is None:
            raise RoundError(f"round {record['round']}: test_loss is not finite; lower local.lr")


@dataclass(kw_only=True)
class EarlyStopping(Hook):
    """Ends a run after `patience` tests in a row that do not improve the best one by more than `min_delta`."""

    patience: Count = 10
    metric: Literal["test_loss", "test_accuracy", "client_accuracy_mean"] = "test_loss"
    min_delta: NonNegative = 0.0

    def before_run(self, run: Run) -> None:
        if self.metric == "client_accuracy_mean" and not run.config.evaluate.clients:
            raise ConfigError("hooks: early_stopping: client_accuracy_mean needs evaluate.clients=true")
        self._best, self._since = float("-inf"), 0
        for record in run.records:
            self.after_round(run, record)

    def after_round(self, run: Run, record: dict[str, Any]) -> None:
        if self.metric not in record:
            return
        sign = -1.0 if self.metric == "test_loss" else 1.0
        value = float("-inf") if record[self.metric] is None else sign * record[self.metric]  # None: not finite
        better = value > self._best + self.min_delta
        self._best, self._since = (value, 0) if better else (self._best, self._since + 1)
        if self._since >= self.patience:
            run.stop(f"{self.metric} has not improved on {sign * self._best:.4g} in {self._since} tests")
