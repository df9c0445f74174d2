"""A round of Flower by itself: an app of a few lines, as its users write it, that loads neither torch nor fedsim.

The server sends an array, each client sends it back times a small number, and the server takes the mean.
"""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

client = ClientApp()
server = ServerApp()


@client.train()
def shrink(message: Message, context: Context) -> Message:
    """Send back what nobody has sent before: Flower stores content by its hash."""
    (weights,) = message.content.array_records["arrays"].to_numpy_ndarrays()
    weights = weights * np.float32(np.random.default_rng().uniform(0.9, 1.0))
    return Message(RecordDict({"arrays": ArrayRecord([weights])}), reply_to=message)


@server.main()
def rounds(grid: Grid, context: Context) -> None:
    """Write the seconds of each round to the file `out`."""
    parameters, number, nodes = (int(context.run_config[name]) for name in ("parameters", "rounds", "nodes"))
    weights, seconds = np.random.default_rng(0).normal(size=parameters).astype(np.float32), list[float]()
    while len(ids := list(grid.get_node_ids())) < nodes:
        time.sleep(0.1)
    for _ in range(number):
        began = time.perf_counter()
        content = RecordDict({"arrays": ArrayRecord([weights])})
        replies = grid.send_and_receive([Message(content, dst_node_id=node, message_type="train") for node in ids])
        answers = [reply.content.array_records["arrays"].to_numpy_ndarrays()[0] for reply in replies]
        weights = np.mean(answers, axis=0)
        seconds.append(time.perf_counter() - began)
    Path(str(context.run_config["out"])).write_text(json.dumps(seconds))
