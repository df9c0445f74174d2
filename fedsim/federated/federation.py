"""What the server knows of its clients between two rounds: how much each holds, and how its last training went."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch

from fedsim.data.dataset import Floats, Ints
from fedsim.errors import ConfigError
from fedsim.types import Report, State


class Past(NamedTuple):
    """The last training of each client, by id. A round writes to it in place, so that it costs nothing by N."""

    last_round: Ints
    last_loss: Floats
    seconds: Floats

    @classmethod
    def none(cls, num_clients: int) -> "Past":
        """That of clients which have never trained."""
        return cls(np.full(num_clients, -1), np.full(num_clients, np.nan), np.full(num_clients, np.nan))

    def record(self, number: int, trained: Iterable[Report], seconds: Mapping[int, float]) -> None:
        """Remember round `number`, in which these clients trained."""
        for report in trained:
            client, sums = report.client_id, report.metrics
            self.last_round[client] = number
            self.last_loss[client] = sums.get("loss", np.nan) / (sums.get("examples") or np.nan)
            self.seconds[client] = seconds.get(client, np.nan)

    def saved(self) -> State:
        """The entries of those clients that have trained, for a checkpoint."""
        clients = np.flatnonzero(self.last_round >= 0)
        entries = [clients, *(values[clients] for values in self)]
        return dict(zip(SAVED, map(torch.from_numpy, entries), strict=True))

    def restore(self, saved: State) -> None:
        """Set the entries that were `saved`, where nothing is known; raises ValueError."""
        try:
            clients, *entries = (saved[name].numpy() for name in SAVED)
            if clients.size and clients.min() < 0:
                raise IndexError(f"there is no client {clients.min()}")
            if any(entry.shape != clients.shape for entry in entries):
                raise ValueError("its entries have different lengths")
            for values, entry in zip(self, entries, strict=True):
                values[clients] = entry
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"what it knows of the clients' last rounds cannot be read: {error}") from None


SAVED = ("past.clients", *(f"past.{name}" for name in Past._fields))


class Federation(NamedTuple):
    """The clients as the server knows them before a round: arrays (N,), by id, that cannot be written to."""

    num_clients: int  # N
    sizes: Ints  # n_k, the training examples; 0 for a node that has not joined yet
    last_round: Ints  # in which the client trained, from 0; -1 if it never has
    last_loss: Floats  # the mean loss of that training; NaN if it is not known
    seconds: Floats  # that it took on the virtual clock; NaN without `availability`

    @classmethod
    def of(cls, sizes: Ints, past: Past | None = None) -> "Federation":
        """The clients with these sizes and this past, by default none."""
        past = past or Past.none(len(sizes))
        found = cls(len(sizes), sizes.view(), past.last_round.view(), past.last_loss.view(), past.seconds.view())
        for view in found[1:]:
            view.flags.writeable = False
        return found

    @property
    def shares(self) -> Floats:
        """(N,) p_k = n_k / n; raises ConfigError while a client's number of examples is not known."""
        if not self.sizes.all():
            raise ConfigError(
                "federation.shares: a node tells how many examples it has when it joins, so p_k = n_k / n is not "
                "known yet; draw clients without it, as cohort=uniform does"
            )
        shares: Floats = self.sizes / self.sizes.sum()
        return shares
