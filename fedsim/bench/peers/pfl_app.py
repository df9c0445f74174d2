"""Federated averaging in pfl-research 0.6, as its users write it; made from pfl's source, and not yet run.

`python pfl_app.py WORKLOAD CORES DEVICE` answers `ready`, then runs a round for each line that it reads, and
answers `done` with the sum of the new weights. One process, as pfl runs without a launcher, with all cores or the
GPU.
"""

import os
import sys
from collections.abc import Iterator
from functools import partial
from itertools import cycle
from pathlib import Path

import torch
from client_loop import Client, read
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor
from torch.nn import functional as F

NEVER = 10**9  # rounds between two evaluations; the first round has one, and does not count


class Steps(Dataset):  # type: ignore[misc]
    """A user's examples in the batches that all sides take; pfl by itself would not reshuffle them."""

    def __init__(self, client: Client):
        super().__init__((client["x"], client["y"]))
        self.client = client

    def iter(self, batch_size: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of all steps, whatever the size asked for."""
        x, y = self.client["x"], self.client["y"]
        return ((x[rows], y[rows]) for rows in self.client["steps"])


def main(path: Path, cores: int, device: str) -> None:
    """Serve rounds until the input ends."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what the libraries print is no answer
        workload = read(path, device)
        torch.set_num_threads(cores)
        network, clients = workload["network"], workload["clients"]
        initial = {name: value.clone() for name, value in network.state_dict().items()}
        options = {name: value for name, value in workload["options"].items() if name != "lr"}

        def loss(x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(network(x), y)

        def metrics(x: Tensor, y: Tensor) -> dict[str, Weighted]:
            return {"loss": Weighted(float(loss(x, y)) * len(y), len(y))}

        network.loss, network.metrics = loss, metrics
        users, turn = [Steps(client) for client in clients], cycle(range(len(clients)))
        data = FederatedDataset(lambda user: users[user], lambda: next(turn))
        backend = SimulatedBackend(data, data, [WeightByDatapoints()])
        server = torch.optim.SGD(network.parameters(), 1.0)
        model = PyTorchModel(network, partial(workload["optimizer"], **options), server)
        train = NNTrainHyperParams(
            local_batch_size=None,
            local_num_epochs=1,
            local_learning_rate=workload["options"]["lr"],
            local_max_grad_norm=workload["clip_norm"],
        )
        algorithm = FederatedAveraging()
        print("ready", file=answers, flush=True)
        for number, _ in enumerate(sys.stdin, 1):
            network.load_state_dict(initial)
            params = NNAlgorithmParams(
                central_num_iterations=number,
                evaluation_frequency=NEVER,
                train_cohort_size=len(clients),
                val_cohort_size=None,
            )
            algorithm.run(params, backend, model, train, NNEvalHyperParams(local_batch_size=None))
            print("done", sum(float(v.sum()) for v in network.state_dict().values()), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
