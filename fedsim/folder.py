"""The folder of a run: what it is, what it did round by round, and what came out."""

import json
from glob import escape
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from torch import Tensor

from fedsim.config import Config
from fedsim.data import FederatedData
from fedsim.data.partition import content_hash, label_counts
from fedsim.errors import ConfigError

SCALARS = {  # in TensorBoard's words
    "train_loss": "loss/train",
    "test_loss": "loss/test",
    "test_accuracy": "accuracy/test",
    "client_accuracy_mean": "accuracy/clients",
    "client_accuracy_worst_decile": "accuracy/clients_worst_decile",
    "seconds": "seconds/round",
}
LISTED = 1000  # clients up to which partition.json counts each one's labels


class RunFolder:
    """Writes config.yaml and partition.json at once, a line of rounds.jsonl a round, and the rest at the end.

    The folder is new, and empty.
    """

    def __init__(self, path: Path, config: Config, data: FederatedData):
        self.path = path
        (path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        (path / "partition.json").write_text(json.dumps(describe(data), indent=1))
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._events = SummaryWriter(str(path / "tensorboard"))
        self._rounds = (path / "rounds.jsonl").open("w", buffering=1)

    def round(self, record: dict[str, Any]) -> None:
        """A line, and the same as TensorBoard events."""
        self._rounds.write(json.dumps(record) + "\n")
        for key, tag in SCALARS.items():
            if record.get(key) is not None:
                self._events.add_scalar(tag, record[key], record["round"])

    def close(self, model: dict[str, Tensor], summary: dict[str, Any] | None) -> None:
        """The global model, a picture, and where the run reached its end, summary.json."""
        self._rounds.close()
        self._events.close()
        if summary is not None:
            (self.path / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        apart = {name: value.clone().contiguous() for name, value in model.items()}  # not tied
        save_file(apart, self.path / "model.safetensors")
        from fedsim.plot import curves
        from fedsim.report import read_run

        curves([read_run(self.path)], self.path / "curves.png")


def make(path: Path) -> Path:
    """A new folder; raises ConfigError where there is one, for a run is never overwritten."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(f"{path}: exists, and a run is never overwritten; name another folder") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be made: {error.strerror}") from None
    return path


def make_next(stem: str) -> Path:
    """A new folder runs/STEM-N, N above those of all that are there, whoever else is making one."""
    while True:
        names = [path.name.removeprefix(f"{stem}-") for path in Path("runs").glob(f"{escape(stem)}-*")]
        number = max((int(name) for name in names if name.isdecimal()), default=0) + 1
        path = Path("runs") / f"{stem}-{number}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue  # another run was first
        except OSError as error:
            raise ConfigError(f"{path}: cannot be made: {error.strerror}; name a folder with --out") from None
        return path


def describe(data: FederatedData) -> dict[str, Any]:
    """Who holds how much: a content hash, sizes, and labels by client where there are few clients."""
    sizes = data.sizes
    labels = label_counts(data.labels.cpu().numpy(), data.owners, data.num_clients, data.num_classes)
    return {
        "hash": content_hash(data.owners),
        "clients": data.num_clients,
        "examples": len(data.owners),
        "classes": data.num_classes,
        "training_examples": {
            "smallest": int(sizes.min()),
            "mean": float(sizes.mean()),
            "largest": int(sizes.max()),
        },
        "labels_by_client": labels.tolist() if data.num_clients <= LISTED else None,
    }
