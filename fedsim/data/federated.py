"""Who holds what: one pair of tensors for all, and row numbers for each client."""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from fedsim.base.catalogue import Spec
from fedsim.data.augment import Augmentation, check
from fedsim.data.dataset import Dataset, Flags, Ints, hold_back
from fedsim.errors import ConfigError
from fedsim.types import Batch, Stream, random


class FederatedData:
    """A dataset and its division among N clients; raises ConfigError where a client would have nothing.

    Shapes: `owners` (n,), the client of each training example, from 0. A random `holdout` share of each
    client's examples, rounded down and never all of them, is kept from training for its own evaluation; which
    ones depends on `seed` and `owners` alone. Batches come in `dtype`, on the device that `to` last named.
    With `crop`, examples are the square of so many pixels in the centre of an image; augmentations see all of it.
    `labels` (n,) are those in use, `true_labels` (n,) the dataset's, on the host.

    Rows marked in `public` (n,) are the server's and no client's: `owners` then names the clients of the others,
    in their order, and afterwards has -1 for the server. Where `owners` is None the clients are `elsewhere`, on
    machines of their own: of the training examples only the public ones count, and `sizes` are 0 until told.
    """

    def __init__(
        self,
        dataset: Dataset,
        owners: Ints | None,
        *,
        clients: int,
        holdout: float = 0.0,
        public: Flags | None = None,
        crop: int | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        public = np.zeros(len(dataset.y_train), dtype=np.bool_) if public is None else public
        self.elsewhere = owners is None
        part = np.full(len(public), 2 * clients)  # the server's is the last
        if owners is not None:
            _check(owners, len(public) - int(public.sum()), clients, holdout)
            held = hold_back(owners, holdout, random(seed, Stream.HOLDOUT)) if holdout else 0
            part[~public] = 2 * owners + held  # what client k trains on is part 2k, what it holds back part 2k + 1
        self._order = np.argsort(part, kind="stable") if owners is not None else np.flatnonzero(public)
        bounds = np.concatenate([[0], np.cumsum(np.bincount(part, minlength=2 * clients))])
        self._bounds = bounds[: 2 * clients + 1]
        self.sizes: Ints = self._bounds[1::2] - self._bounds[:-1:2]  # (N,) held-out examples not counted
        self.owners: Ints = np.full(len(public), -1)
        if owners is not None:
            self.owners[~public] = owners
        self.num_clients = clients
        self.num_classes = dataset.classes
        self.num_test = len(dataset.y_test)
        self.shape, self.crop = _shape(tuple(dataset.x_train.shape[1:]), crop), crop
        self.labels = self.true_labels = dataset.y_train
        self._x_train = dataset.x_train
        self._x_test, self._y_test = dataset.x_test, dataset.y_test
        self._scale, self._shift = _normalisation(dataset, dtype)
        self.mapped = dataset.mapped  # examples lie in a file, and not on the device
        self._dtype, self._device = dtype, torch.device("cpu")

    def rows(self, client: int) -> Ints:
        """(n_k,) the rows that `client` trains on, ascending; a view."""
        return self._order[self._bounds[2 * client] : self._bounds[2 * client + 1]]

    def held_out(self, client: int) -> Ints:
        """(h_k,) the rows that `client` keeps for its own evaluation, ascending; a view, maybe empty."""
        return self._order[self._bounds[2 * client + 1] : self._bounds[2 * client + 2]]

    @property
    def public(self) -> Ints:
        """(p,) the server's own rows, ascending; a view, maybe empty."""
        return self._order[self._bounds[-1] :]

    def own_batches(self, client: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What `client` evaluates its own model on: the rows it holds out, or where there are none, all it has."""
        held = self.held_out(client)
        rows = torch.from_numpy(held if len(held) else self.rows(client))
        return map(self.batch, torch.split(rows, batch_size))

    def sample(self, size: int, rng: np.random.Generator) -> Ints:
        """Random rows that clients train on, each at most once: (size,), or all of them where there are fewer."""
        ends = np.cumsum(self.sizes)
        places = rng.choice(ends[-1], min(size, int(ends[-1])), replace=False)
        client = np.searchsorted(ends, places, side="right")
        return self._order[self._bounds[2 * client + 1] - ends[client] + places]

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised training examples (B, ...) and labels (B,); `rows` (B,) int64, on any device."""
        return self._gather(self._centre(self._x_train), self.labels, rows)

    def training_batch(self, rows: Tensor, augment: Sequence[Augmentation], rng: np.random.Generator) -> Batch:
        """The same, with the examples changed by each of `augment` in turn, which draw from `rng`."""
        if not augment:
            return Batch(*self.batch(rows))
        x = self._x_train.index_select(0, rows.to(self._x_train.device)).to(self._device, non_blocking=True)
        x, white = x.to(self._dtype), _white(self._x_train)
        x = x.div_(white) if white != 1 else x
        batch = Batch(x, self.labels.index_select(0, rows.to(self.labels.device)))
        size = (self.shape[1], self.shape[2]) if len(self.shape) == 3 else (1, 1)
        for change in augment:
            batch = change(batch, rng, size)
        x = self._centre(batch.x)
        if self._scale is not None and self._shift is not None:
            x = torch.mul(x, self._scale * white).sub_(self._shift)
        return batch._replace(x=x)

    def check_augment(self, specs: Sequence[Spec]) -> None:
        """Raise ConfigError where the resolved entries of `local.augment` do not fit these examples."""
        check(specs, tuple(self._x_train.shape[1:]), self._x_train.dtype)

    def test_batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The same of the test set."""
        return self._gather(self._centre(self._x_test), self._y_test, rows)

    def examples(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Training examples as the dataset has them, whole and not normalised, and their labels in use."""
        return self._x_train.index_select(0, rows.to(self._x_train.device)), self.labels[rows]

    @property
    def test_set(self) -> tuple[Tensor, Tensor]:
        """The same of all the test examples; a view."""
        return self._x_test, self._y_test

    def with_labels(self, labels: Tensor) -> Self:
        """The same division with other `labels` (n,) for training; `true_labels` stay what they were."""
        changed = copy.copy(self)
        changed.labels = labels
        return changed

    @property
    def form(self) -> dict[str, Any]:
        """What an example is before a batch makes it x * scale - shift: shape, type, and these two by channel."""
        constants = {"scale": self._scale, "shift": self._shift}
        return {
            "shape": list(self.shape),
            "dtype": str(self._x_train.dtype).removeprefix("torch."),
            **{name: [] if value is None else value.flatten().tolist() for name, value in constants.items()},
        }

    def digest(self) -> str:
        """SHA-256 of labels, of who owns what, and of up to a thousand examples spread over all."""
        digest = hashlib.sha256(self.owners.astype("<i8").tobytes())
        for x, y in ((self._x_train, self.labels), (self._centre(self._x_test), self._y_test)):
            spread = torch.linspace(0, len(y) - 1, min(len(y), 1000)).long()
            digest.update(y.cpu().numpy().astype("<i8").tobytes())
            digest.update(x[spread.to(x.device)].cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> Self:
        """The same division with its tensors on `device`; mapped examples stay where they are."""
        moved = copy.copy(self)
        moved._device = torch.device(device)
        stays = {"true_labels"} | ({"_x_train", "_x_test"} if self.mapped else set())
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name not in stays:
                setattr(moved, name, value.to(device))
        return moved

    def _centre(self, x: Tensor) -> Tensor:
        """A view of `x` (n, ...) that has the examples' `shape`."""
        for axis, side in enumerate(self.shape, 1):
            if x.shape[axis] != side:
                x = x.narrow(axis, round((x.shape[axis] - side) / 2), side)
        return x

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


class Shard(FederatedData):
    """What one machine holds, whichever client it is; raises ConfigError where it has nothing to train on.

    The test examples are its own, too: it evaluates its own model on them. The network's `shape` and `classes` and
    the constants of x * `scale` - `shift`, none, one or one a channel, are those of the federation, and not the
    dataset's own; with `crop`, images are cut as `FederatedData` has it.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        classes: int,
        scale: Sequence[float] = (),
        shift: Sequence[float] = (),
        crop: int | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        n = len(dataset.y_train)
        if not n:
            raise ConfigError("data: has no training examples, and a client needs some")
        super().__init__(dataset, np.zeros(n, dtype=np.int64), clients=1, crop=crop, dtype=dtype)
        if (most := max(int(y.max()) for y in (dataset.y_train, dataset.y_test) if len(y))) >= classes:
            raise ConfigError(f"data: has labels up to {most}; the federation has {classes} classes")
        channels = self.shape[0] if len(self.shape) == 3 else 1
        for name, values in (("scale", scale), ("shift", shift)):
            if len(values) not in {0, 1, channels}:
                raise ConfigError(f"data: the federation's {name} has {len(values)} channels; here are {channels}")
        self.num_classes = classes
        self._scale, self._shift = _by_channel(scale, dtype), _by_channel(shift, dtype)

    def rows(self, client: int) -> Ints:
        """(n_k,) all."""
        return super().rows(0)

    def held_out(self, client: int) -> Ints:
        """(0,): what is held out is the test set."""
        return super().held_out(0)

    def own_batches(self, client: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The test examples, or where there are none, those for training."""
        if not self.num_test:
            return super().own_batches(client, batch_size)
        return map(self.test_batch, torch.split(torch.arange(self.num_test), batch_size))


def set_apart(dataset: Dataset, share: float | Literal["all"], seed: int) -> Flags:
    """(n,) which training examples are the server's: all, or a random `share`, rounded down."""
    n = len(dataset.y_train)
    if not share or share == "all":
        return np.full(n, bool(share))
    return hold_back(np.zeros(n, dtype=np.int64), share, random(seed, Stream.PUBLIC))


def without(dataset: Dataset, rows: Flags) -> Dataset:
    """The dataset without some of its training examples (n,), for a partition of the others.

    Where the examples are mapped they are not copied: of `x_train` there is then only the form.
    """
    if not rows.any():
        return dataset
    kept, x, owner = torch.from_numpy(~rows), dataset.x_train, dataset.owner
    left = int(kept.sum())
    return replace(
        dataset,
        x_train=torch.empty(left, *x.shape[1:], dtype=x.dtype, device="meta") if dataset.mapped else x[kept],
        y_train=dataset.y_train[kept],
        owner=None if owner is None else torch.from_numpy(np.unique(owner[kept].numpy(), return_inverse=True)[1]),
    )


def _white(x: Tensor) -> float:
    """What is 1 on the scale of means: 255 where `x` is uint8."""
    return 255.0 if x.dtype == torch.uint8 else 1.0


def _normalisation(data: Dataset, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """(x / unit - mean) / std as x * scale - shift, each (C, 1, 1), or () where one number serves all."""
    unit = _white(data.x_train)
    if not data.mean:
        return (torch.tensor(1 / unit, dtype=dtype) if unit != 1 else None), None
    mean, std = torch.tensor([data.mean, data.std], dtype=torch.float64)
    form = (len(mean), 1, 1) if len(mean) > 1 else ()
    return (1 / (unit * std)).to(dtype).view(form), (mean / std).to(dtype).view(form)


def _by_channel(values: Sequence[float], dtype: torch.dtype) -> Tensor | None:
    """(C, 1, 1), or () where one number serves all."""
    if not len(values):
        return None
    return torch.tensor(values, dtype=dtype).view((len(values), 1, 1) if len(values) > 1 else ())


def _shape(shape: tuple[int, ...], crop: int | None) -> tuple[int, ...]:
    if crop is None:
        return shape
    if len(shape) != 3 or crop > min(shape[1:]):
        fits = "images, (channels, height, width), with at least as many pixels a side"
        raise ConfigError(f"data.crop: {crop} should be cut from {fits}; these examples are {shape}")
    return shape[0], crop, crop


def _check(owners: Ints, n: int, clients: int, holdout: float) -> None:
    if not 0 <= holdout < 1:
        raise ConfigError(f"data.holdout: {holdout} should be at least 0 and less than 1")
    if not n:
        raise ConfigError("data: leaves clients no training examples")
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
