"""Wrong labels, made on purpose, to see who copes with them."""

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

    A wrong label is any other class, all equally likely (`symmetric`), or always the next one, 0 after the last
    (`pair`): Han et al. 2018, Co-teaching, arXiv 1804.06872. What becomes of a noisy client's labels depends on
    `seed`, the client and its own rows alone; with a higher rate, or more noisy clients, what was wrong is wrong
    again. The partition is made with true labels. Held-out rows and the server's own keep theirs: an evaluation
    on wrong ones says little.
    Differs: in some papers a wrong label may by chance be the true one. Their rate r is r (1 - 1 / K) here, with
    K classes.
    """

    rate: Annotated[float, Ge(0), Le(1)]
    kind: Literal["symmetric", "pair"] = "symmetric"
    clients: Share = 1.0

    def applied(self, data: FederatedData, seed: int) -> FederatedData:
        """`data` with wrong labels; raises ConfigError where there is but one class."""
        classes = data.num_classes
        if classes < 2:
            raise ConfigError("data.label_noise: this data has 1 class; a label that can be wrong needs 2")
        labels = data.labels.cpu().numpy().copy()
        some = max(1, round(self.clients * data.num_clients))
        noisy = random(seed, Stream.NOISE, 0, 1).permutation(data.num_clients)[:some]
        for client in noisy.tolist():
            rng, rows = random(seed, Stream.NOISE, client), data.rows(client)
            wrong = rng.random(len(rows)) < self.rate
            step = rng.integers(1, classes, len(rows)) if self.kind == "symmetric" else 1
            labels[rows] = (labels[rows] + step * wrong) % classes
        return data.with_labels(torch.from_numpy(labels).to(data.labels.device))
