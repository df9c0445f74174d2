"""Personal models: what stays as it is, what moves, and what the evaluation trains."""

import pytest
import torch
from conftest import conv_net, make_data, make_simulation, make_strategy, make_task

from fedsim import ConfigError

RUNTIMES = ["serial", {"name": "threads", "workers": 2}]


def after(strategy, rounds=2, **settings):
    simulation = make_simulation(strategy, lr=0.1, **settings)
    for _ in range(rounds):
        simulation.round()
    return simulation


def head_of(simulation):
    return simulation.task.layout.mask(simulation.task.layout.head.__contains__)


@pytest.mark.parametrize("name", ["fedbabu", "fedrep"])
def test_the_head_of_the_global_model_never_moves_and_the_body_does(name):
    simulation = after(name)
    moved = simulation.server["model"] != simulation.task.initial_model
    head = head_of(simulation)
    assert head.any()
    assert not moved[head].any()
    assert moved[~head].float().mean() > 0.9


def test_weight_decay_and_momentum_do_not_move_a_head_that_does_not_train():
    simulation = after("fedbabu", weight_decay=0.5, momentum=0.9)
    moved = simulation.server["model"] != simulation.task.initial_model
    assert not moved[head_of(simulation)].any()


def test_fine_tuning_is_the_inner_strategys_run_but_for_its_evaluation():
    plain, tuned = after("fedprox"), after(make_strategy("finetune", inner="fedprox", epochs=3))
    assert plain.fingerprint() == tuned.fingerprint()
    losses = [sum(each.loss for each in s.evaluate_clients().values()) for s in (plain, tuned)]
    assert losses[1] < losses[0]
    assert plain.fingerprint() == tuned.fingerprint()


def test_a_client_of_fedrep_keeps_its_head_and_trains_it_longer_than_the_body():
    one, more = (after(make_strategy("fedrep", head_epochs=epochs)) for epochs in (1, 8))
    initial = one.task.initial_model[head_of(one)]
    distances = [(s.clients.get(3, {})["private"] - initial).norm() for s in (one, more)]
    assert 0 < distances[0] < distances[1]


@pytest.mark.parametrize("name", ["fedbabu", "fedrep"])
def test_a_network_without_a_head_of_its_own_is_refused(name):
    task = make_task(lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)))
    with pytest.raises(ConfigError, match=rf"^model\.head: {name} needs a head"):
        make_simulation(name, task=task)


@pytest.mark.parametrize("name", ["fedbabu", "fedrep", "finetune"])
def test_own_models_do_better_than_the_global_one(name):
    """On clients whose labels differ."""
    data = make_data([30, 40, 50], noise=0.3)
    simulation = make_simulation(name, task=make_task(lambda: conv_net(dropout=0.1)), data=data, lr=0.1)
    before = sum(each.loss for each in simulation.evaluate_clients().values())
    for _ in range(10):
        simulation.round()
    assert sum(each.loss for each in simulation.evaluate_clients().values()) < before / 2
