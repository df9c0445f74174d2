"""Flower's own FedAdam, with fedsim's nodes as its clients; pyproject.toml says what they do."""

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAdam
from safetensors.torch import save_file

from fedsim.flower.app import values_of
from fedsim.flower.flower_strategies import tell_finished
from fedsim.models import options as models

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train the experiment's model, and write it to a file."""
    config = context.run_config
    shape = tuple(int(side) for side in config["shape"].split(","))
    network = models.make(values_of(config)["model"], shape, config["classes"])
    result = FedAdam(eta=0.01).start(grid, ArrayRecord(network.state_dict()), num_rounds=config["rounds"])
    tell_finished(grid, context.run_id)  # so that nodes keep of the run only what their owners want
    save_file(result.arrays.to_torch_state_dict(), config["out"])
