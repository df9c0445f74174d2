"""FederatedData: one pair of tensors with all examples, and the row numbers of each client."""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import lt
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from fedsim.base.catalogue import Spec
from fedsim.base.machine import check_memory
from fedsim.data.augment import Augmentation, check_augmentations, checked_batch
from fedsim.data.dataset import Dataset, Flags, Ints, composed, holdout_mask
from fedsim.errors import NO_STATE, ConfigError, WrongReturnError, border, name_of, one_line, printable
from fedsim.types import Batch, Stream, random

TRIAL_EXAMPLES = 16  # on which a network is tried before a run
BYTES_PER_CLIENT = 2 * 3 * 8  # for the bounds of a client's two parts, while they are counted


class FederatedData:
    """A dataset and its division among N clients; raises ConfigError where a client would have no examples.

    Shapes: `owners` (n,), the client of each training example, from 0. A random `holdout` share of each client's
    examples, rounded down and never all of them, is held out from training for the client's own evaluation; which
    examples these are depends on `seed` and `owners` alone. Batches have the type `dtype` and are on the device
    that `to` was last called with. With `crop`, an example is the square of `crop` pixels a side at the centre of
    the image; augmentations see the whole image. `labels` (n,) are used for training; `true_labels` (n,), on the
    CPU, are the dataset's.

    `new_clients` of the `clients`, drawn at random, are kept out of training: N does not count them, and their ids
    are N, N + 1, ...

    Rows that `public` (n,) marks belong to the server and to no client. The argument `owners` then has one entry
    for each of the other rows, in their order; the attribute `owners` has all n, with -1 for the server's and
    -2, -3, ... for those of new clients. Where the argument is None, the clients are on machines of their own
    (`clients_are_remote`): of the training examples only the public ones are used, and `sizes` are 0 until the
    nodes report them.
    """

    def __init__(
        self,
        dataset: Dataset,
        owners: Ints | None,
        *,
        clients: int,
        new_clients: int = 0,
        holdout: float = 0.0,
        public: Flags | None = None,
        crop: int | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        public = np.zeros(len(dataset.y_train), dtype=np.bool_) if public is None else public
        check_memory(f"data.clients: {clients:,} clients need", BYTES_PER_CLIENT * clients, "lower it")
        self.clients_are_remote = owners is None
        self.owners: Ints = np.full(len(public), -1)
        part = np.full(len(public), 2 * clients)  # part 2N: the server's rows
        if owners is None:
            self._order = np.flatnonzero(public)
        else:
            if not 0 <= holdout < 1:
                raise ConfigError(f"data.holdout: {holdout} should be at least 0 and less than 1")
            if not (n := len(public) - int(public.sum())):
                raise ConfigError("data: there are no training examples for clients; at least one is needed")
            if clients > n:
                raise ConfigError(f"data.clients: {clients} is too many for {n} examples; allowed: 1 to {n}")
            with border("data.partition", ConfigError):
                owners = checked_owners(owners, n, clients)
            if new_clients:
                owners = _with_last(owners, clients, new_clients, random(seed, Stream.NEW_CLIENTS))
            first = clients - new_clients
            self.owners[~public] = np.where(owners < first, owners, first - 2 - owners)
            held_out = holdout_mask(owners, holdout, random(seed, Stream.HOLDOUT)) if holdout else 0
            part[~public] = 2 * owners + held_out  # part 2k: client k trains on it; part 2k + 1: it holds it out
            self._order = np.argsort(part, kind="stable")  # rows sorted by part, of which each is then a slice
        bounds = np.concatenate([[0], np.cumsum(np.bincount(part, minlength=2 * clients))])
        self._bounds = bounds[: 2 * clients + 1]  # part i is the slice from bounds[i] to bounds[i + 1]
        self.num_clients = clients - new_clients
        self.new_clients = range(self.num_clients, clients)  # ids
        self.server_id = clients  # with which `rows` gives the server's
        self.sizes: Ints = np.diff(self._bounds)[: 2 * self.num_clients : 2]  # (N,) n_k, without held-out examples
        self.client_names = _client_names(dataset, self.owners)  # none, or one for each client
        self.num_classes = dataset.classes
        self.class_names = tuple(printable(composed(name)) for name in dataset.class_names)
        self.mean, self.std, self.preparation = dataset.mean, dataset.std, one_line(dataset.preparation)
        self.num_test = len(dataset.y_test)
        self.whole_shape = tuple(dataset.x_train.shape[1:])
        self.shape, self.crop = _cropped_shape(self.whole_shape, crop), crop
        self.labels = self.true_labels = dataset.y_train
        self._x_train = dataset.x_train
        self._x_test, self._y_test = dataset.x_test, dataset.y_test
        self._scale, self._shift = _scale_and_shift(dataset, dtype)
        self.mapped = dataset.mapped  # the examples stay in a file, whatever the device
        self._dtype, self._device = dtype, torch.device("cpu")

    @property
    def elsewhere(self) -> bool:
        """The old name of `clients_are_remote`, for one release."""
        return self.clients_are_remote

    def rows(self, client: int) -> Ints:
        """(n_k,) the rows that `client` trains on, ascending; a view. Those of `server_id` are the server's."""
        if client == self.server_id:
            return self.public
        return self._order[self._bounds[2 * client] : self._bounds[2 * client + 1]]

    def held_out(self, client: int) -> Ints:
        """(h_k,) the rows that `client` holds out for its own evaluation, ascending; a view, possibly empty."""
        return self._order[self._bounds[2 * client + 1] : self._bounds[2 * client + 2]]

    @property
    def own_sizes(self) -> Ints:
        """The number of examples on which each client evaluates its own model, then those of new clients."""
        held_out = self._bounds[2::2] - self._bounds[1:-1:2]
        return np.where(held_out, held_out, np.diff(self._bounds)[::2])

    @property
    def public(self) -> Ints:
        """(p,) the rows of the server, ascending; a view, possibly empty."""
        return self._order[self._bounds[-1] :]

    def own_batches(self, client: int, batch_size: int, least: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches for `client` to evaluate its own model: its held-out rows, or if it has none, all its rows.

        A last batch of fewer than `least` examples joins the one before.
        """
        held_out = self.held_out(client)
        rows = torch.from_numpy(held_out if len(held_out) else self.rows(client))
        return map(self.batch, torch.split(rows, batch_sizes(len(rows), batch_size, least)))

    def sample(self, size: int, rng: np.random.Generator) -> Ints:
        """(size,) random rows that clients train on, without repetition; all of them where there are fewer."""
        ends = np.cumsum(self.sizes)
        places = rng.choice(ends[-1], min(size, int(ends[-1])), replace=False)
        client = np.searchsorted(ends, places, side="right")
        return self._order[self._bounds[2 * client + 1] - ends[client] + places]

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised training examples (B, ...) and labels (B,); `rows` (B,) int64, on any device."""
        return self._gather(self._centre(self._x_train), self.labels, rows)

    def training_batch(self, rows: Tensor, augment: Sequence[Augmentation], rng: np.random.Generator) -> Batch:
        """Like `batch`, but each of `augment` changes the examples in turn, with random numbers from `rng`."""
        if not augment:
            return Batch(*self.batch(rows))
        x = self._x_train.index_select(0, rows.to(self._x_train.device)).to(self._device, non_blocking=True)
        x, white = x.to(self._dtype), _white_value(self._x_train)
        x = x.div_(white) if white != 1 else x
        batch = Batch(x, self.labels.index_select(0, rows.to(self.labels.device)))
        size = (self.shape[1], self.shape[2]) if len(self.shape) == 3 else (1, 1)
        for change in augment:
            batch = checked_batch(change, change(batch, rng, size), len(rows), self._dtype)
        made, right, fixed = tuple(batch.x.shape[1:]), self.shape, 1 if len(self.shape) == 3 else None
        if made[:fixed] != right[:fixed] or len(made) != len(right) or any(map(lt, made, right)):
            raise WrongReturnError(
                f"{name_of(augment[-1])}: gave examples of shape {made}; they should be {right}"
            )
        x = self._centre(batch.x)
        if self._scale is not None and self._shift is not None:
            x = torch.mul(x, self._scale * white).sub_(self._shift)
        return batch._replace(x=x)

    def check_augmented(self, augment: Sequence[Augmentation]) -> None:
        """Raise ConfigError unless a batch of two examples can be made; nobody trains on it."""
        rows = self._order[:2]
        if augment and len(rows):
            with border("local.augment", ConfigError):
                one, again = (
                    self.training_batch(torch.from_numpy(rows), augment, np.random.default_rng(0))._asdict()
                    for _ in range(2)
                )
                if not all(value is None or torch.equal(value, again[name]) for name, value in one.items()):
                    raise WrongReturnError(f"two batches of the same examples differ; {NO_STATE}")

    def check_augment(self, specs: Sequence[Spec]) -> None:
        """Raise ConfigError where the resolved entries of `local.augment` do not fit these examples."""
        check_augmentations(specs, tuple(self._x_train.shape[1:]), self._x_train.dtype)

    def test_batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised test examples (B, ...) and their labels (B,)."""
        return self._gather(self._centre(self._x_test), self._y_test, rows)

    def trial_examples(self) -> Tensor:
        """(n, ...) some examples as clients get them: for training, or where there are none, for tests.

        They are spread over the clients, whose examples may be alike.
        """
        rows = self._spread_rows()
        return (self.batch if len(self._order) else self.test_batch)(rows)[0]

    def largest_value(self) -> float:
        """The largest magnitude in the same examples, as they are in the dataset."""
        x = self._x_train if len(self._order) else self._x_test
        return float(x.index_select(0, self._spread_rows().to(x.device)).abs().max())

    def _spread_rows(self) -> Tensor:
        """(n,) some rows of training examples, or where there are none, of test examples."""
        n = len(self._order) or self.num_test
        places = np.linspace(0, n - 1, min(TRIAL_EXAMPLES, n)).astype(np.int64)
        return torch.from_numpy(self._order[places] if len(self._order) else places)

    def examples(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Training examples as they are in the dataset, neither cropped nor normalised, and their `labels`."""
        return self._x_train.index_select(0, rows.to(self._x_train.device)), self.labels[rows]

    @property
    def test_set(self) -> tuple[Tensor, Tensor]:
        """All test examples as they are in the dataset, and their labels; a view."""
        return self._x_test, self._y_test

    def with_labels(self, labels: Tensor) -> Self:
        """The same division with other `labels` (n,) for training; `true_labels` stay as they are."""
        changed = copy.copy(self)
        changed.labels = labels
        return changed

    @property
    def white_value(self) -> float:
        """The value of an example that is 1 on the scale of `mean` and `std`."""
        return _white_value(self._x_train)

    @property
    def form(self) -> dict[str, Any]:
        """Shape and type of an example x, and the constants by channel of its normalisation x * scale - shift."""
        constants = {"scale": self._scale, "shift": self._shift}
        return {
            "shape": list(self.shape),
            "dtype": str(self._x_train.dtype).removeprefix("torch."),
            **{name: [] if value is None else value.flatten().tolist() for name, value in constants.items()},
        }

    def digest(self) -> str:
        """SHA-256 of owners, labels, and up to a thousand training and test examples, evenly spaced."""
        digest = hashlib.sha256(self.owners.astype("<i8").tobytes())
        for x, y in ((self._x_train, self.labels), (self._centre(self._x_test), self._y_test)):
            spaced = torch.linspace(0, len(y) - 1, min(len(y), 1000)).long()
            digest.update(y.cpu().numpy().astype("<i8").tobytes())
            digest.update(x[spaced.to(x.device)].cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> Self:
        """The same division with its tensors on `device`; examples of a mapped file stay in it."""
        moved = copy.copy(self)
        moved._device = torch.device(device)
        stays = {"true_labels"} | ({"_x_train", "_x_test"} if self.mapped else set())
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name not in stays:
                setattr(moved, name, value.to(device))
        return moved

    def _centre(self, x: Tensor) -> Tensor:
        """The centre of `x` (n, ...), cut to `shape`; a view."""
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
            x = torch.mul(x, self._scale)  # which also converts uint8 to float, in the same pass
        if self._shift is not None:
            x = x.sub_(self._shift)
        return x, y


class Shard(FederatedData):
    """The data of one machine, which knows one client: itself. Raises ConfigError without training examples.

    It evaluates its own model on the dataset's test examples. The number of `classes` and the normalisation
    x * `scale` - `shift`, each with no number, one, or one for each channel, are those of the federation, not the
    dataset's own. `crop` is as in `FederatedData`.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        classes: int,
        scale: Sequence[float] = (),
        shift: Sequence[float] = (),
        crop: int | None = None,
    ):
        n = len(dataset.y_train)
        if not n:
            raise ConfigError("data: has no training examples; a client needs at least one")
        super().__init__(dataset, np.zeros(n, dtype=np.int64), clients=1, crop=crop)
        if (highest := max(int(y.max()) for y in (dataset.y_train, dataset.y_test) if len(y))) >= classes:
            raise ConfigError(f"data: has labels up to {highest}; the federation has {classes} classes, from 0")
        channels = self.shape[0] if len(self.shape) == 3 else 1
        for name, values in (("scale", scale), ("shift", shift)):
            if len(values) not in {0, 1, channels}:
                needed = f"the federation's {name} is for {len(values)} channels"
                raise ConfigError(f"data: the examples here have {channels} channels; {needed}")
        self.num_classes = classes
        self._scale, self._shift = (
            _by_channel(torch.tensor(values)) if len(values) else None for values in (scale, shift)
        )

    def rows(self, client: int) -> Ints:
        """(n_k,) all rows, whatever the client's number."""
        return super().rows(0)

    def held_out(self, client: int) -> Ints:
        """(0,): no rows, because the test examples serve for evaluation."""
        return super().held_out(0)

    def own_batches(self, client: int, batch_size: int, least: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the test examples, or of the training examples if there are none."""
        if not self.num_test:
            return super().own_batches(client, batch_size, least)
        rows = torch.arange(self.num_test)
        return map(self.test_batch, torch.split(rows, batch_sizes(len(rows), batch_size, least)))


def _with_last(owners: Ints, clients: int, last: int, rng: np.random.Generator) -> Ints:
    """The same division; `last` clients, drawn at random, get the highest ids; the others keep their order."""
    chosen = np.zeros(clients, dtype=np.bool_)
    chosen[rng.choice(clients, last, replace=False)] = True
    ids: Ints = np.argsort(np.argsort(chosen, kind="stable"))
    return ids[owners]


def batch_sizes(examples: int, batch_size: int, least: int = 1) -> list[int]:
    """The sizes of the batches of so many examples; a rest of fewer than `least` joins the batch before it."""
    whole, rest = divmod(examples, batch_size)
    sizes = [batch_size] * whole
    if whole and rest < least:
        sizes[-1] += rest
    elif rest:
        sizes.append(rest)
    return sizes


def batch_count(examples: int, batch_size: int, least: int = 1) -> tuple[int, int]:
    """How many batches `batch_sizes` gives, and the largest size, without a list of them."""
    whole, rest = divmod(examples, batch_size)
    if not whole:
        return min(rest, 1), rest
    return whole + (rest >= max(least, 1)), batch_size + (rest if rest < least else 0)


def public_mask(dataset: Dataset, share: float | Literal["all"], seed: int) -> Flags:
    """(n,) True for the training examples that belong to the server: all, or a random `share`, rounded down."""
    n = len(dataset.y_train)
    if not share or share == "all":
        return np.full(n, bool(share))
    return holdout_mask(np.zeros(n, dtype=np.int64), share, random(seed, Stream.PUBLIC))


def without_rows(dataset: Dataset, mask: Flags) -> Dataset:
    """The dataset without the training examples that `mask` (n,) marks, as a partition needs it.

    Examples in a mapped file are not copied: `x_train` then has the right shape and type, but no values.
    """
    if not mask.any():
        return dataset
    kept, x, owner = torch.from_numpy(~mask), dataset.x_train, dataset.owner
    count, names = int(kept.sum()), dataset.owner_names
    if owner is not None:
        numbers, new = np.unique(owner[kept].numpy(), return_inverse=True)
        owner, names = torch.from_numpy(new), tuple(names[i] for i in numbers) if names else ()
    return replace(
        dataset,
        x_train=torch.empty(count, *x.shape[1:], dtype=x.dtype, device="meta") if dataset.mapped else x[kept],
        y_train=dataset.y_train[kept],
        owner=owner,
        owner_names=names,
    )


def _client_names(dataset: Dataset, owners: Ints) -> tuple[str, ...]:
    """The names of the clients of `owners` (n,), -1 for the server, where each is one owner of the dataset's."""
    rows = np.flatnonzero(owners >= 0)
    if dataset.owner is None or not dataset.owner_names or not len(rows):
        return ()
    clients, owner = owners[rows], dataset.owner.numpy()[rows]
    of_client = owner[np.unique(clients, return_index=True)[1]]
    return tuple(dataset.owner_names[i] for i in of_client) if (of_client[clients] == owner).all() else ()


def _white_value(x: Tensor) -> float:
    """The value of `x` that is 1 on the scale of `mean` and `std`: 255 for uint8, 1 for float32."""
    return 255.0 if x.dtype == torch.uint8 else 1.0


def _scale_and_shift(data: Dataset, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """The constants that write (x / white - mean) / std as x * scale - shift; None for one that does nothing."""
    white = _white_value(data.x_train)
    if not data.mean:
        return (torch.tensor(1 / white, dtype=dtype) if white != 1 else None), None
    mean, std = torch.tensor([data.mean, data.std], dtype=torch.float64)
    scale, shift = (1 / (white * std)).to(dtype), (mean / std).to(dtype)
    if not (scale.isfinite().all() and shift.isfinite().all()):
        raise ConfigError(
            f"data.std: {list(data.std)} is too small for data.mean, so (x - mean) / std is not finite"
        )
    return _by_channel(scale), _by_channel(shift)


def _by_channel(values: Tensor) -> Tensor:
    """`values` (C,) as (C, 1, 1), to broadcast over images; a single value as ()."""
    return values.view((len(values), 1, 1) if len(values) > 1 else ())


def _cropped_shape(shape: tuple[int, ...], crop: int | None) -> tuple[int, ...]:
    if crop is None:
        return shape
    if len(shape) != 3 or crop > min(shape[1:]):
        raise ConfigError(
            f"data.crop: {crop} needs images (channels, height, width) of at least {crop} pixels a side, "
            f"but the examples have shape {shape}"
        )
    return shape[0], crop, crop


def checked_owners(owners: Ints, n: int, clients: int) -> Ints:
    """(n,) int64 owners that a partition returned; raises WrongReturnError where a client has no examples."""
    if owners.shape != (n,) or owners.dtype.kind not in "iu":
        raise WrongReturnError(f"returned {owners.dtype} {owners.shape}; it should return int64 ({n},)")
    if owners.min() < 0 or owners.max() >= clients:
        made = f"owners from {owners.min()} to {owners.max()}"
        raise WrongReturnError(f"returned {made}; allowed: 0 to {clients - 1}")
    owners = owners.astype(np.int64, copy=False)
    if (empty := np.flatnonzero(np.bincount(owners, minlength=clients) == 0)).size:
        raise WrongReturnError(f"left client {empty[0]} of {clients} without examples; lower data.clients")
    return owners
