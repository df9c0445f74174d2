"""The longest clients first: by what is known of them, with the same results, at no cost that grows."""

from heapq import heapreplace
from itertools import product

import pytest
from conftest import SIZES, make_simulation, trace
from hypothesis import given
from hypothesis import strategies as st

from fedsim import RoundError
from fedsim.federated.pace import MAX_REMEMBERED_CLIENTS, Pace
from fedsim.federated.simulation import Failures


def pace_of(**seconds):
    """Of clients that took so long a step: `c3=0.5`."""
    pace = Pace()
    for client, each in seconds.items():
        pace.measured(int(client[1:]), 10, 10 * each)
    return pace


def handed_out(simulation):
    clients = []
    simulation.round(before_client=clients.append)
    return clients


def makespan(seconds, workers):
    """Of clients in this order, each to the worker that is free first."""
    free = [0.0] * workers
    for each in seconds:
        heapreplace(free, free[0] + each)
    return max(free)


def test_before_anything_is_measured_steps_count_and_lower_ids_go_first():
    assert Pace().order({0: 3, 1: 5, 2: 5, 3: 8}) == [3, 1, 2, 0]


def test_measured_seconds_count_for_as_many_steps_as_there_are_now():
    pace = pace_of(c0=1.0, c1=3.0)
    assert pace.order({0: 10, 1: 10}) == [1, 0]
    assert pace.order({0: 31, 1: 10}) == [0, 1]


def test_the_last_measurement_counts():
    pace = pace_of(c0=1.0, c1=3.0)
    pace.measured(0, 1, 4.0)
    assert pace.order({0: 1, 1: 1}) == [0, 1]


def test_who_was_never_measured_is_thought_to_be_as_fast_as_all_were_on_average():
    pace = pace_of(c0=1.0, c1=3.0)
    assert pace.order({0: 10, 1: 10, 2: 10}) == [1, 2, 0]


def test_of_a_large_population_those_measured_last_are_remembered():
    pace = Pace()
    for client in range(3 * MAX_REMEMBERED_CLIENTS):
        pace.measured(client, 1, 1.0)
    pace.measured(0, 1, 5.0)
    assert len(pace._seconds_per_step) == MAX_REMEMBERED_CLIENTS
    assert pace.order({0: 1, 1: 1, 3 * MAX_REMEMBERED_CLIENTS - 1: 1})[0] == 0


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 3))
def test_the_order_takes_at_most_four_thirds_of_the_best_there_is(steps, workers):
    """Graham 1969: less 1/(3m)."""
    order = Pace().order(dict(enumerate(steps)))
    assert sorted(order) == list(range(len(steps)))
    deals = product(range(workers), repeat=len(steps))
    best = min(
        max(sum(s for s, to in zip(steps, deal, strict=True) if to == w) for w in range(workers)) for deal in deals
    )
    bound = best * (4 / 3 - 1 / (3 * workers))
    assert makespan([steps[client] for client in order], workers) <= bound + 1e-9


def test_several_workers_are_handed_the_longest_first_and_one_by_id():
    assert SIZES == (3, 8, 5, 13, 2, 6)
    assert handed_out(make_simulation(batch_size=1)) == [0, 1, 2, 3, 4, 5]
    assert handed_out(make_simulation(batch_size=1, runtime={"name": "threads", "workers": 1})) == list(range(6))
    simulation = make_simulation(batch_size=1, runtime={"name": "threads", "workers": 2})
    assert handed_out(simulation) == [3, 1, 5, 2, 0, 4]
    simulation.pace = pace_of(c0=9.0, c1=1.0, c2=1.0, c3=1.0, c4=1.0, c5=1.0)
    assert handed_out(simulation) == [0, 3, 1, 5, 2, 4]


def test_results_equal_to_rounding_only_depend_on_no_clock():
    simulation = make_simulation(batch_size=1, runtime={"name": "threads", "workers": 2})
    simulation.runtime.exact = False
    assert handed_out(simulation) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_the_order_changes_no_bit(strategy, monkeypatch):
    usual = trace(make_simulation(strategy))
    simulation = make_simulation(strategy, runtime={"name": "threads", "workers": 2})
    assert trace(simulation) == usual
    monkeypatch.setattr(Pace, "order", lambda self, steps: sorted(steps, reverse=True))
    assert trace(make_simulation(strategy, runtime={"name": "threads", "workers": 2})) == usual


def test_who_fails_is_not_measured():
    """It took as long as it took to fail."""
    simulation = make_simulation(failures=Failures(policy="drop", time_limit=1e-9, min_clients=1))
    with pytest.raises(RoundError, match=r"failures\.min_clients"):
        simulation.round()
    assert simulation.pace._seconds_per_step == {}
