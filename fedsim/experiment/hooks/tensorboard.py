"""Rounds as TensorBoard events."""

from dataclasses import dataclass
from pathlib import Path
from socket import gethostname
from time import time
from typing import Any

from fedsim.base.files import make_folder, naming, remove
from fedsim.experiment.hook import Hook
from fedsim.experiment.run import Run

SCALARS = {  # the names in TensorBoard
    "train_loss": "loss/train",
    "test_loss": "loss/test",
    "test_accuracy": "accuracy/test",
    "ema_test_loss": "loss/ema",
    "ema_test_accuracy": "accuracy/ema",
    "client_accuracy_mean": "accuracy/clients",
    "client_accuracy_worst_decile": "accuracy/clients_worst_decile",
    "seconds": "seconds/round",
}


@dataclass(kw_only=True)
class TensorBoard(Hook):
    """Writes losses, accuracies, seconds and the strategy's metrics by round into the run's folder `tensorboard/`.

    The events repeat rounds.jsonl, and are written anew when a run is resumed. So one that cannot be written stops
    the run before its last round, as a full disk does, and afterwards is only told.
    """

    def before_run(self, run: Run) -> None:
        self._file = None
        if run.folder is None:
            return
        folder = run.folder.path / "tensorboard"
        make_folder(folder)
        for old in folder.glob("events.out.tfevents.*"):
            remove(old)
        self._file = (folder / f"events.out.tfevents.{int(time())}.{gethostname()}").open("xb")
        self._write(wall_time=time(), file_version="brain.Event:2")
        ago = sum(record["seconds"] for record in run.records)
        for record in run.records:
            ago -= record["seconds"]
            self._add(record, time() - ago)

    def after_round(self, run: Run, record: dict[str, Any]) -> None:
        try:
            self._add(record, time())
        except OSError as error:
            if not run.finished:
                raise
            run.warn(f"{error.filename}: {error.strerror}")

    def after_run(self, run: Run) -> None:
        if self._file:
            try:
                self._file.close()
            except OSError as error:
                run.warn(f"{self._file.name}: {error.strerror}")

    def _add(self, record: dict[str, Any], when: float) -> None:
        values = [
            {"tag": tag, "simple_value": record[k]} for k, tag in SCALARS.items() if record.get(k) is not None
        ]
        values += [{"tag": name, "simple_value": value} for name, value in record.get("metrics", {}).items()]
        self._write(wall_time=when, step=record["round"], summary={"value": values})

    def _write(self, **event: Any) -> None:
        """Write an event in this thread (SummaryWriter takes another), so that a full disk fails the run."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        if self._file:
            with naming(Path(self._file.name)):
                RecordWriter(self._file).write(Event(**event).SerializeToString())
                self._file.flush()
