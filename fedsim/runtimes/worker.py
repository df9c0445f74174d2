"""One worker: a network, the data and a device, and one client at a time on them."""

from typing import Any

import torch
from torch import Tensor

from fedsim.data import FederatedData
from fedsim.errors import RoundError
from fedsim.federated.client import Work, states_are_only_read
from fedsim.runtimes.cuda import new_stream, on_stream
from fedsim.training.replica import Replica
from fedsim.training.task import Task
from fedsim.types import Job, State, Update


class Worker:
    """Runs clients in turn on a replica, and on a GPU a stream, of its own. Not for two threads at once."""

    def __init__(self, task: Task, data: FederatedData, device: torch.device, *, graphs: bool = False):
        self.stream = new_stream(device)
        self.replica, self.data = Replica(task, device, graphs=graphs), data

    def run(self, work: Work, server: State, item: Any) -> Update | BaseException:
        """What `work` gives for a Job or another item, or the error it ended with; raises RoundError."""
        with on_stream(self.stream):
            try:
                client = dict[str, Tensor]()
                if isinstance(item, Job) and item.client:  # a copy, so that what a client spoils is its own
                    client = {name: _sent(value, self.replica.device) for name, value in item.client.items()}
                    item = item._replace(client=client)
                with states_are_only_read(server, client):
                    return work(self.replica, self.data, server, item)
            except RoundError:
                raise
            except (Exception, SystemExit) as error:
                return error


def _sent(value: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, for which nobody waits."""
    if device.type == "cuda" and not value.is_cuda:
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device, copy=True)
