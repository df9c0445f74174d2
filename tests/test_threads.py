"""Laws of the threads runtime: memory that runs out, graphs and faster kernels change nothing but time."""

import threading
from contextlib import nullcontext
from dataclasses import dataclass
from time import sleep

import pytest
import torch
from conftest import make_data, make_simulation, make_strategy, make_task, trace
from torch import nn

from fedsim import ClientError, Recipe, RoundError, Wrapper
from fedsim.federated.simulation import Failures
from fedsim.training.graphs import STEPS_BEFORE_CAPTURE, WARM_UP_STEPS, Graph, Steps
from fedsim.training.local import ClientObjective
from fedsim.training.pooling import pool_faster
from fedsim.training.replica import Replica
from fedsim.types import Job

WORKERS = 4


class Memory:
    """Of a machine with room for so many clients at a time."""

    def __init__(self, room):
        self.room, self.lock, self.inside = room, threading.Lock(), 0

    def __enter__(self):
        with self.lock:
            if self.inside >= self.room:
                raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 MiB")
            self.inside += 1
        sleep(0.005)  # in which the others come

    def __exit__(self, *error):
        with self.lock:
            self.inside -= 1


@dataclass(frozen=True, kw_only=True)
class Hungry(Wrapper):
    """Has trained once when it looks for memory."""

    memory: Memory

    def client_update(self, server, client, local):
        local.train(server["model"])
        with self.memory:
            return super().client_update(server, client, local)

    def max_steps(self, num_steps, epoch_steps):
        return 2 * num_steps


def hungry(room, runtime="serial", name="fedavg", **settings):
    runtime = {"name": "threads", "workers": WORKERS} if runtime == "threads" else runtime
    return make_simulation(Hungry(inner=make_strategy(name), memory=Memory(room)), runtime=runtime, **settings)


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "fedbn"])
def test_without_memory_for_all_there_are_fewer_workers_and_the_same_model(name):
    simulation = hungry(2, "threads", name)
    assert simulation.runtime.workers == WORKERS
    with pytest.warns(RuntimeWarning) as caught:
        found = trace(simulation)
    assert found == trace(hungry(1, name=name))
    assert simulation.runtime.workers == 2
    (warning,) = caught
    assert str(warning.message) == (
        "runtime.workers: out of memory with 4 workers, continuing with 2; "
        "CUDA out of memory. Tried to allocate 20.00 MiB"
    )


def test_a_client_that_fits_nowhere_fails():
    simulation = hungry(0, "threads")
    with pytest.warns(RuntimeWarning) as caught, pytest.raises(ClientError, match="OutOfMemoryError: CUDA out of"):
        simulation.round()
    assert simulation.runtime.workers == 1
    assert len(caught) == 2  # 4 workers, 2, 1
    with pytest.raises(RoundError, match=r"0 of \d+ clients are left"):
        hungry(0, failures=Failures(policy="drop")).round()


def test_where_memory_is_enough_nothing_is_said():
    simulation = hungry(WORKERS, "threads")
    simulation.round()
    assert simulation.runtime.workers == WORKERS


class Replayed:
    """Stands in for a CUDA graph, with an error in what it gives."""

    def __init__(self, replica, step, rows, error):
        self.replica, self.step, self.rows, self.error, self.replays = replica, step, rows, error, 0

    def replay(self):
        self.replays += 1
        self.step(self.rows)
        self.replica.flat.add_(self.error)


@pytest.mark.parametrize("failing", [None, "gives other numbers", "cannot be captured: not here"])
def test_what_is_tried_before_a_step_is_captured_leaves_no_trace(monkeypatch, failing):
    """Momentum, dropout and batch norm go on as if there were no graphs."""
    task, data, graphs = make_task(), make_data([8, 8, 9]), []
    recipe = Recipe(lr=0.05, batch_size=4, epochs=STEPS_BEFORE_CAPTURE, momentum=0.9)

    def capture(steps, rows, step):
        graph = Graph(Replayed(steps.replica, step, rows.clone(), 0.01 * (failing is not None)), rows.clone())
        graphs.append(graph.graph)
        graph.graph.rows = graph.rows
        for _ in range(WARM_UP_STEPS):
            step(graph.rows)
        if failing and failing.startswith("cannot"):
            raise RuntimeError("not here")
        return graph

    def trained(replica):
        found = []
        for client in (0, 1, 2, 0):
            local = ClientObjective(replica, data, Job(client, 0, {}), task.initial_buffers, recipe)
            found += [local.train(task.initial_model), local.buffers, *local.metrics.values()]
        return [value.numpy().tobytes() for value in found]

    expected, replica = trained(Replica(task)), Replica(task)
    monkeypatch.setattr(Steps, "_capture", capture)
    replica.graphs = True
    with pytest.warns(RuntimeWarning, match=failing) if failing else nullcontext():
        assert trained(replica) == expected
    assert len(graphs) == 1
    assert graphs[0].replays == (
        0 if failing == "cannot be captured: not here" else 1 if failing else 7 * STEPS_BEFORE_CAPTURE
    )


@pytest.mark.parametrize("settings", [{"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}], ids=str)
def test_the_faster_pooling_has_the_same_bits(settings):
    x = torch.randn(4, 32, 13, 14, generator=torch.Generator().manual_seed(0)).relu()  # with many equal zeros
    found = []
    for change in (lambda network: None, pool_faster):
        network, leaf = nn.Sequential(nn.MaxPool2d(**settings, ceil_mode=True)), x.clone().requires_grad_()
        change(network)
        y = network(leaf)
        assert (change is pool_faster) == ("MaxPool" not in y.grad_fn.name())
        y.square().sum().backward()
        found.append((y.detach(), leaf.grad))
    (y, g), (faster_y, faster_g) = found
    assert torch.equal(y, faster_y)
    assert torch.equal(g, faster_g)
