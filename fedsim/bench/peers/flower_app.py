"""Federated averaging in Flower's simulation, written as its users write it.

`python flower_app.py WORKLOAD ACTORS DEVICE` answers `ready`, then runs a round for each line that it reads, and
answers `done` with the sum of the new weights. Each client of the workload is a node; an actor, with a core or a
share of the GPU, keeps network and data from one message to the next; Flower's own FedAvg aggregates.
"""

import logging
import os
import sys
from pathlib import Path

from client_loop import read, train
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation


def client_app(path: Path, device: str) -> ClientApp:
    """Trains the client of the node's partition."""
    app = ClientApp()

    @app.train()
    def train_client(message: Message, context: Context) -> Message:
        workload = read(path, device)
        client = workload["clients"][int(context.node_config["partition-id"])]
        arrays = message.content.array_records["arrays"]
        if not workload.get("idle"):
            train(workload, client, arrays.to_torch_state_dict())
            arrays = ArrayRecord(workload["network"].state_dict())
        metrics = MetricRecord({"num-examples": len(client["y"])})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


def main(path: Path, actors: int, device: str) -> None:
    """Serve rounds until the input ends."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what the libraries print is no answer
        logging.getLogger("flwr").setLevel(logging.ERROR)
        workload = read(path, "cpu")
        nodes = len(workload["clients"])
        server_app = ServerApp()

        @server_app.main()
        def rounds(grid: Grid, context: Context) -> None:
            initial = ArrayRecord(workload["network"].state_dict())
            strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
            print("ready", file=answers, flush=True)
            for _ in sys.stdin:
                arrays = strategy.start(grid, initial, num_rounds=1).arrays
                total = sum(float(value.sum()) for value in arrays.to_torch_state_dict().values())
                print("done", total, file=answers, flush=True)

        share = 0.0 if device == "cpu" else 1 / actors
        run_simulation(
            server_app,
            client_app(path, device),
            num_supernodes=nodes,
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": share},
                "init_args": {
                    "address": "local",
                    "num_cpus": actors,
                    "log_to_driver": False,
                    "logging_level": "ERROR",
                },
            },
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
