"""A worker: it has a network, the data and a device, and runs one client at a time."""

from typing import Any

import torch
from torch import Tensor

from fedsim.data import FederatedData
from fedsim.errors import forget_variables
from fedsim.federated.client import CommonError, Work, keyed_only, states_are_only_read
from fedsim.runtimes.cuda import new_stream, on_stream
from fedsim.training.replica import Replica
from fedsim.training.task import Task
from fedsim.types import Job, Outcome, State, Update


class Worker:
    """Runs clients in turn, on its own replica, and on a GPU in its own stream. Not for two threads at once."""

    def __init__(self, task: Task, data: FederatedData, device: torch.device, *, graphs: bool = False):
        self.stream = new_stream(device)
        self.replica, self.data = Replica(task, device, graphs=graphs), data

    def run(self, work: Work, server: State, item: Any) -> Outcome:
        """The result of `work` for a Job or another item, or the error it raised. Raises CommonError."""
        with on_stream(self.stream):
            try:
                client = dict[str, Tensor]()
                if isinstance(item, Job) and item.client:  # a copy, in case the client writes to it
                    client = {name: _copied_to(value, self.replica.device) for name, value in item.client.items()}
                    item = item._replace(client=client)
                with states_are_only_read(server, client):
                    task, device = self.replica.task, self.replica.device
                    return keyed_only(work, task, device, lambda: [self._update(work, server, item)])[0]
            except (CommonError, KeyboardInterrupt):
                raise
            except torch.OutOfMemoryError as error:
                forget_variables(error)  # which hold the memory
                return error
            except BaseException as error:
                return error

    def _update(self, work: Work, server: State, item: Any) -> Update:
        return work(self.replica, self.data, dict(server), item)  # clients share the tensors, not the dictionary


def _copied_to(value: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; the copy to a GPU does not block."""
    if device.type == "cuda" and not value.is_cuda:
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device, copy=True)
