"""Who holds what: one pair of tensors for all, and row numbers for each client."""

import copy
import hashlib
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fedsim.data.dataset import Dataset, Ints, hold_back
from fedsim.errors import ConfigError
from fedsim.types import Stream, random


class FederatedData:
    """A dataset and its division among N clients; raises ConfigError where a client would have nothing.

    Shapes: `owners` (n,), the client of each training example, from 0. A random `holdout` share of each
    client's examples, rounded down and never all of them, is kept from training for its own evaluation; which
    ones depends on `seed` and `owners` alone. Batches come in `dtype`, on the device that `to` last named.
    """

    def __init__(
        self,
        dataset: Dataset,
        owners: Ints,
        *,
        clients: int,
        holdout: float = 0.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        _check(owners, len(dataset.y_train), clients, holdout)
        held = hold_back(owners, holdout, random(seed, Stream.HOLDOUT))
        part = 2 * owners + held  # what client k trains on is part 2k, what it holds back part 2k + 1
        self._order = np.argsort(part, kind="stable")
        self._bounds = np.concatenate([[0], np.cumsum(np.bincount(part, minlength=2 * clients))])
        self.sizes: Ints = self._bounds[1::2] - self._bounds[:-1:2]  # (N,) held-out examples not counted
        self.owners = owners
        self.num_clients = clients
        self.num_classes = dataset.classes
        self.num_test = len(dataset.y_test)
        self.shape = tuple(dataset.x_train.shape[1:])
        self.labels = dataset.y_train
        self._x_train = dataset.x_train
        self._x_test, self._y_test = dataset.x_test, dataset.y_test
        self._scale, self._shift = _normalisation(dataset, dtype)
        self._mapped, self._dtype, self._device = dataset.mapped, dtype, torch.device("cpu")

    def rows(self, client: int) -> Ints:
        """(n_k,) the rows that `client` trains on, ascending; a view."""
        return self._order[self._bounds[2 * client] : self._bounds[2 * client + 1]]

    def held_out(self, client: int) -> Ints:
        """(h_k,) the rows that `client` keeps for its own evaluation, ascending; a view, maybe empty."""
        return self._order[self._bounds[2 * client + 1] : self._bounds[2 * client + 2]]

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised training examples (B, ...) and labels (B,); `rows` (B,) int64, on any device."""
        return self._gather(self._x_train, self.labels, rows)

    def test_batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The same of the test set."""
        return self._gather(self._x_test, self._y_test, rows)

    def digest(self) -> str:
        """SHA-256 of labels, of who owns what, and of up to a thousand examples spread over all."""
        digest = hashlib.sha256(self.owners.astype("<i8").tobytes())
        for x, y in ((self._x_train, self.labels), (self._x_test, self._y_test)):
            spread = torch.linspace(0, len(y) - 1, min(len(y), 1000)).long()
            digest.update(y.cpu().numpy().astype("<i8").tobytes())
            digest.update(x[spread.to(x.device)].cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> Self:
        """The same division with its tensors on `device`; mapped examples stay where they are."""
        moved = copy.copy(self)
        moved._device = torch.device(device)
        stays = {"_x_train", "_x_test"} if self._mapped else set()
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name not in stays:
                setattr(moved, name, value.to(device))
        return moved

    def _gather(self, x: Tensor, y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        x = x.index_select(0, rows.to(x.device)).to(self._device, non_blocking=True)
        y = y.index_select(0, rows.to(y.device))
        if x.is_floating_point():
            x = x.to(self._dtype)
        if self._scale is not None:
            x = torch.mul(x, self._scale)  # which makes uint8 a float in the same pass
        if self._shift is not None:
            x = x.sub_(self._shift)
        return x, y


def _normalisation(data: Dataset, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """(x / unit - mean) / std as x * scale - shift, each (C, 1, 1), or () where one number serves all."""
    unit = 255.0 if data.x_train.dtype == torch.uint8 else 1.0
    if not data.mean:
        return (torch.tensor(1 / unit, dtype=dtype) if unit != 1 else None), None
    mean, std = torch.tensor([data.mean, data.std], dtype=torch.float64)
    form = (len(mean), 1, 1) if len(mean) > 1 else ()
    return (1 / (unit * std)).to(dtype).view(form), (mean / std).to(dtype).view(form)


def _check(owners: Ints, n: int, clients: int, holdout: float) -> None:
    if not 0 <= holdout < 1:
        raise ConfigError(f"data.holdout: {holdout} should be at least 0 and less than 1")
    if owners.shape != (n,) or owners.dtype != np.int64:
        raise ConfigError(f"data.partition: gave {owners.dtype} {owners.shape}; it should give int64 ({n},)")
    if owners.min() < 0 or owners.max() >= clients:
        raise ConfigError(
            f"data.partition: gave owners from {owners.min()} to {owners.max()}; allowed: 0 to {clients - 1}"
        )
    if (empty := np.flatnonzero(np.bincount(owners, minlength=clients) == 0)).size:
        raise ConfigError(
            f"data.partition: left client {empty[0]} of {clients} without examples; lower data.clients"
        )
