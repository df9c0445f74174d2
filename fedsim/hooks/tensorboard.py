"""Rounds as TensorBoard events."""

from dataclasses import dataclass
from time import time
from typing import TYPE_CHECKING, Any

from fedsim.hooks import Hook

if TYPE_CHECKING:
    from fedsim.experiment import Run

SCALARS = {  # in TensorBoard's words
    "train_loss": "loss/train",
    "test_loss": "loss/test",
    "test_accuracy": "accuracy/test",
    "client_accuracy_mean": "accuracy/clients",
    "client_accuracy_worst_decile": "accuracy/clients_worst_decile",
    "seconds": "seconds/round",
}


@dataclass(kw_only=True)
class TensorBoard(Hook):
    """Losses, accuracies and seconds by round, in `tensorboard/` of the run's folder.

    The events are those of rounds.jsonl, written anew when a run is resumed.
    """

    def before_run(self, run: "Run") -> None:
        self._writer = None
        if run.folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        folder = run.folder.path / "tensorboard"
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = SummaryWriter(str(folder))
        ago = sum(record["seconds"] for record in run.records)
        for record in run.records:
            ago -= record["seconds"]
            self._add(record, time() - ago)
        self._writer.flush()

    def after_round(self, run: "Run", record: dict[str, Any]) -> None:
        self._add(record, time())

    def after_run(self, run: "Run") -> None:
        if self._writer:
            self._writer.close()

    def _add(self, record: dict[str, Any], when: float) -> None:
        for key, tag in SCALARS.items():
            if self._writer and record.get(key) is not None:
                self._writer.add_scalar(tag, record[key], record["round"], when)
