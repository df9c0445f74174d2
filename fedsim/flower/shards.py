"""A federated dataset as files, one for each client, so that each machine gets only its own."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from fedsim.base.files import sync_folder
from fedsim.data import Dataset, FederatedData
from fedsim.errors import ConfigError, printable

Arrays = dict[str, Any]


def write_shards(data: FederatedData, folder: Path) -> list[Path]:
    """Write k.npz and k.yaml for each client k, and server.npz; returns their paths. Raises ConfigError.

    A client's file has its training examples, with the labels in use, and those it holds out as x_test; the
    server's has the test set, and public examples, if there are any, as x_train; each has the names of classes, if
    they are known. A k.yaml is a NODE.yaml. The folder must be new or empty, and is complete or absent afterwards.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--shards: {printable(folder)} exists, and nothing is overwritten; name another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as draft:
            about = {"class_names": np.array(data.class_names)} if data.class_names else {}
            names = [_write(Path(draft), name, arrays | about) for name, arrays in _shards(data)]
            names += [_settings(Path(draft), k, data) for k in range(data.num_clients)]
            made = Path(draft) / "shards"
            made.mkdir()
            for name in names:
                (Path(draft) / name).rename(made / name)
            made.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise ConfigError(f"--shards: {printable(folder)}: cannot be written: {error.strerror}") from None
    return [folder / name for name in names]


def server_data(data: FederatedData, dataset: Dataset, folder: Path) -> str:
    """The `data` of a config for the server of the clients in `folder`, as YAML in one line."""
    spec: dict[str, Any] = {"name": "npz", "path": str(folder / "server.npz"), "channels": "first"}
    spec |= {"classes": data.num_classes, "clients": data.num_clients}
    spec |= _normalisation(dataset)
    spec |= {"crop": data.crop} if data.crop else {}
    spec |= {"public": "all"} if len(data.public) else {}
    return yaml.safe_dump(spec, sort_keys=False, default_flow_style=True, width=10**6).strip()


def client_name(client: int, clients: int) -> str:
    """client-00 to client-99, with so many digits that sorted names are in the order of the clients."""
    return f"client-{client:0{max(2, len(str(clients - 1)))}}"


def _shards(data: FederatedData) -> Iterator[tuple[str, Arrays]]:
    """One at a time, because all together may be larger than memory."""
    for client in range(data.num_clients):
        arrays = _pair(data, "train", data.rows(client))
        held = data.held_out(client)
        yield f"{client}.npz", arrays | (_pair(data, "test", held) if len(held) else {})
    public = data.public
    x, y = data.test_set
    test = {"x_test": x.cpu().numpy(), "y_test": y.cpu().numpy()}
    yield "server.npz", (_pair(data, "train", public) if len(public) else {}) | test


def _pair(data: FederatedData, part: str, rows: np.ndarray[Any, Any]) -> Arrays:
    x, y = data.examples(torch.from_numpy(rows))
    return {f"x_{part}": x.cpu().numpy(), f"y_{part}": y.cpu().numpy()}


def _write(folder: Path, name: str, arrays: Arrays) -> str:
    with (folder / name).open("wb") as file:
        np.savez(file, **arrays)
    return name


def _normalisation(data: Dataset | FederatedData) -> dict[str, list[float]]:
    return {"mean": list(data.mean), "std": list(data.std)} if data.mean else {}


def _settings(folder: Path, client: int, data: FederatedData) -> str:
    source: dict[str, Any] = {"name": "npz", "path": f"{client}.npz", "channels": "first"}
    source |= {"classes": data.num_classes} | _normalisation(data)
    values = {"name": client_name(client, data.num_clients), "data": source}
    (folder / f"{client}.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return f"{client}.yaml"
