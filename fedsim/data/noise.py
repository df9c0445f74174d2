"""Label noise: wrong training labels, made on purpose to compare how robust algorithms are."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le

from fedsim.data.federated import FederatedData
from fedsim.errors import ConfigError
from fedsim.types import Share, Stream, random


@dataclass(frozen=True, kw_only=True)
class LabelNoise:
    """Labels that are wrong with probability `rate`, at a random share `clients` of all clients.

    With `symmetric` noise a wrong label is any other class, all equally likely; with `pair` noise it is the next
    class, and 0 after the last (Han et al. 2018, Co-teaching, arXiv 1804.06872). Which labels of a noisy client
    become wrong depends on `seed`, the client and its own rows alone; a higher rate, or more noisy clients, adds
    wrong labels to those of a lower one. Only rows that clients train on are changed, after the partition is made:
    held-out rows and those of the server keep their true labels, so that evaluation stays meaningful.
    Differs: in some papers a wrong label may by chance be the true one. Their rate r is r (1 - 1 / K) here, with
    K classes.
    """

    rate: Annotated[float, Ge(0), Le(1)]
    kind: Literal["symmetric", "pair"] = "symmetric"
    clients: Share = 1.0

    def applied(self, data: FederatedData, seed: int) -> FederatedData:
        """`data` with wrong labels; raises ConfigError where there is only one class."""
        classes = data.num_classes
        if classes < 2:
            raise ConfigError("data.label_noise: this data has 1 class; label noise needs at least 2")
        labels = data.labels.cpu().numpy().copy()
        num_noisy = max(1, round(self.clients * data.num_clients))
        noisy = random(seed, Stream.NOISE, 0, 1).permutation(data.num_clients)[:num_noisy]
        for client in noisy.tolist():
            rng, rows = random(seed, Stream.NOISE, client), data.rows(client)
            wrong = rng.random(len(rows)) < self.rate
            step = rng.integers(1, classes, len(rows)) if self.kind == "symmetric" else 1
            labels[rows] = (labels[rows] + step * wrong) % classes
        return data.with_labels(torch.from_numpy(labels).to(data.labels.device))
