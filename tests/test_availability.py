"""Laws of availability: who is away leaves no trace, a fate is one's own, and the clock is right by hand."""

import json
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil

import numpy as np
import pytest
from conftest import PARTIAL, SIZES, make_simulation, make_strategy, trace
from covering import in_turn, sampled
from hypothesis import given, settings
from hypothesis import strategies as st

import fedsim
from fedsim import ClientError, ConfigError, RoundError, Wrapper
from fedsim.federated.availability import Availability
from fedsim.federated.simulation import Failures

N = len(SIZES)
STEPS = np.array([1, 2, 2, 4, 1, 2])  # of one epoch over SIZES in batches of 4
RUNTIMES = ["serial", *({"name": "threads", "workers": workers} for workers in (1, 3))]
SAMPLE = {"name": "uniform", "size": 3}
ROUGH = {  # everything happens
    "drop": 0.3,
    "step_seconds": 0.5,
    "stragglers": 0.3,
    "slowdown": 3.0,
    "jitter": 0.5,
    "deadline": 1.5,
    "over_selection": 1.6,
}


def make(availability=None, strategy="fedavg", **settings):
    """A simulation with an availability, or without one."""
    simulation = make_simulation(strategy, **settings)
    simulation.availability = None if availability is None else Availability(**availability)
    return simulation


def fixed(*clients):
    return {"name": "fixed", "clients": list(clients)}


def attempt(availability, selected, goal=None, *, steps=STEPS, seed=0, number=0):
    """Of clients with these steps, all of them."""
    goal = goal or len(selected)
    return availability.attempt(list(selected), steps[list(selected)], goal, seed, number)


# One client: its fate is its own


def fates(availability, clients, *, steps=STEPS, seed=0, number=0):
    """Seconds until each reports, or None where it drops out: each asked alone, and without a deadline."""
    patient = Availability(**{name: value for name, value in vars(availability).items() if name != "deadline"})
    alone = {k: attempt(patient, [k], steps=steps, seed=seed, number=number) for k in clients}
    return {k: found.seconds if found.reporting else None for k, found in alone.items()}


chances = st.floats(0, 0.9)
availabilities = st.builds(
    Availability,
    drop=chances | st.lists(chances, min_size=N, max_size=N),
    step_seconds=st.sampled_from([0.1, 0.5, 1.0]),
    stragglers=st.sampled_from([0.0, 0.3, 1.0]),
    slowdown=st.sampled_from([1.0, 2.0, 10.0]),
    jitter=st.sampled_from([0.0, 0.0, 0.5]),
    deadline=st.none() | st.sampled_from([0.1, 0.2, 0.4, 1.0, 2.0, 4.0]),
)
some = st.sets(st.integers(0, N - 1), min_size=1).map(sorted)


@given(availabilities, some, st.integers(1, N), st.integers(0, 2**40), st.integers(0, 1000))
def test_the_first_that_are_in_time_report_and_the_others_are_told_why(availability, selected, goal, seed, number):
    """Worked out from each client's own fate: by time, of the same time by id, until there are enough."""
    goal = min(goal, len(selected))
    found = attempt(availability, selected, goal, seed=seed, number=number)
    limit = availability.deadline or float("inf")
    fate = fates(availability, selected, seed=seed, number=number)
    there = sorted((s, k) for k, s in fate.items() if s is not None)
    in_time = [(s, k) for s, k in there if s <= limit * 1.0000001]

    assert found.reporting == sorted(k for _, k in in_time[:goal])
    assert list(found.absent) == sorted(set(selected) - set(found.reporting))
    assert {k for k, why in found.absent.items() if why == "dropped out"} == {k for k in fate if fate[k] is None}
    late = {k for k, why in found.absent.items() if why.startswith(f"missed the deadline of {limit:g} s: ")}
    assert late == {k for s, k in there} - {k for s, k in in_time}
    spare = {k for k, why in found.absent.items() if why == f"not needed: {goal} had reported"}
    assert spare == {k for _, k in in_time[goal:]}

    if len(found.reporting) == goal:
        assert found.seconds == in_time[goal - 1][0]
    elif availability.deadline:
        assert found.seconds == availability.deadline
    else:
        assert found.seconds == max((s for s, _ in there), default=0.0)


@given(availabilities, st.integers(0, 2**40), st.integers(0, 1000))
def test_a_fate_depends_on_seed_and_round_alone(availability, seed, number):
    """The same client among all, and in a list of its own chance."""
    everyone = fates(availability, range(N), seed=seed, number=number)
    drop = availability.drop if isinstance(availability.drop, list) else [availability.drop] * N
    listed = Availability(**vars(availability) | {"drop": drop})
    assert fates(listed, range(N), seed=seed, number=number) == everyone
    for client, fate in everyone.items():
        assert fates(listed, sorted({client, 0, N - 1}), seed=seed, number=number)[client] == fate


def test_chances_converge():
    """Within 5 standard deviations: of all clients of one round, and of one client over rounds."""
    many = 2000
    for drop in (0.05, 0.3, 0.9):
        away = len(attempt(Availability(drop=drop), range(many), steps=np.ones(many, int)).absent)
        assert abs(away - many * drop) < 5 * (many * drop * (1 - drop)) ** 0.5
    drop = [0.0, 0.05, 0.3, 0.5, 0.9, 0.99]
    rounds = [attempt(Availability(drop=drop), range(N), number=number).absent for number in range(many)]
    for client, p in enumerate(drop):
        away = sum(client in absent for absent in rounds)
        assert abs(away - many * p) <= 5 * (many * p * (1 - p)) ** 0.5


def test_clients_drop_out_independently():
    """Of two clients, four combinations, each as often as chances multiply."""
    rounds = [attempt(Availability(drop=0.4), [1, 2], number=number).absent for number in range(2000)]
    both = sum(len(absent) == 2 for absent in rounds)
    assert abs(both - 2000 * 0.16) < 5 * (2000 * 0.16 * 0.84) ** 0.5


def test_stragglers_are_the_same_in_every_round_and_slower_by_the_factor():
    many, steps = 2000, np.arange(1, 2001)
    availability = Availability(stragglers=0.25, slowdown=7.0, step_seconds=0.5)
    seconds = [fates(availability, range(many), steps=steps, number=number) for number in range(2)]
    assert seconds[0] == seconds[1]
    slower = [seconds[0][k] / (0.5 * steps[k]) for k in range(many)]
    assert set(slower) == {1.0, 7.0}
    assert abs(slower.count(7.0) - many / 4) < 5 * (many * 0.25 * 0.75) ** 0.5
    others = fates(availability, range(many), steps=steps, seed=1)
    assert others != seconds[0]


def test_jitter_is_normal_in_the_logarithm_and_new_in_every_round():
    many = 2000
    seconds = [fates(Availability(jitter=0.4), range(many), steps=np.ones(many, int), number=n) for n in (0, 1)]
    assert all(seconds[0][k] != seconds[1][k] for k in range(many))
    logs = np.log(np.array(list(seconds[0].values())) / 0.1) / 0.4
    assert abs(logs.mean()) < 5 / many**0.5
    assert abs(logs.std() - 1) < 5 / (2 * many) ** 0.5


def test_no_two_draws_share_a_stream(monkeypatch):
    """Who is slow, who is selected on top, who drops out and by how much one is late: in the first round too."""
    streams = []

    def watched(*key):
        stream = fedsim.types.random(*key)
        streams.append(str(stream.bit_generator.state["state"]))
        return stream

    monkeypatch.setattr("fedsim.federated.availability.random", watched)
    availability = Availability(**ROUGH)
    for number in range(3):
        availability.select([0, 1, 2], N, 0, number)
        attempt(availability, range(N), number=number)
    assert len(set(streams)) == 3 * 3 + 1  # the stragglers' is the same in every round


# Selection


@given(
    st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=1))),
    st.integers(100, 1000).map(lambda percent: percent / 100) | st.sampled_from([1.0, 1.3, 1e6, 1e308]),
    st.integers(0, 2**40),
    st.integers(0, 1000),
)
def test_over_selection_adds_others_to_the_cohort(drawn, factor, seed, number):
    """As many as the factor says, in its decimals: 1.1 times 100 are 110."""
    num_clients, cohort = drawn
    selected = Availability(over_selection=factor).select(sorted(cohort), num_clients, seed, number)
    assert len(selected) == min(ceil(Fraction(str(factor)) * len(cohort)), num_clients)
    assert selected == sorted(set(selected))
    assert cohort <= set(selected) <= set(range(num_clients))
    assert all(type(client) is int for client in selected)


def test_1_1_times_100_are_110():
    assert len(Availability(over_selection=1.1).select(list(range(100)), 1000, 0, 0)) == 110


def test_everyone_else_is_as_likely_to_be_selected_on_top():
    availability, rounds = Availability(over_selection=2.0), 2000
    times = np.zeros(10)
    for number in range(rounds):
        times[availability.select([0, 5], 10, 0, number)] += 1
    assert times[[0, 5]].tolist() == [rounds, rounds]
    assert np.all(np.abs(np.delete(times, [0, 5]) - rounds / 4) < 5 * (rounds * 3 / 16) ** 0.5)


# Rounds


@pytest.mark.parametrize("runtime", RUNTIMES, ids=str)
@pytest.mark.parametrize("name", ["fedavg", "scaffold", "fedbn"])
def test_the_defaults_change_nothing_but_the_clock(name, runtime):
    with_, without = (trace(make(a, name, cohort=SAMPLE, runtime=runtime)) for a in ({}, None))
    assert [record.pop("clock") > 0 for record in with_] == [True] * 3
    assert [record.pop("clock") for record in without] == [0.0] * 3
    assert with_ == without


@pytest.mark.parametrize(
    ("name", "runtime"), sampled(in_turn(PARTIAL, RUNTIMES[1:]), PARTIAL, RUNTIMES[1:]), ids=str
)
def test_one_seed_is_one_fate_in_every_runtime(name, runtime):
    expected, there = (trace(make(ROUGH, name, cohort=SAMPLE, runtime=r)) for r in ("serial", runtime))
    assert there == expected
    assert any(record["absent"] for record in expected)
    assert trace(make(ROUGH, name, cohort=SAMPLE, seed=1)) != expected


@pytest.mark.parametrize("name", PARTIAL)
def test_who_is_absent_leaves_no_trace(name):
    """Every round is that of a fixed cohort of those who reported; one that was given up is none."""
    simulation, reference = make(ROUGH, name, cohort=SAMPLE), make(None, name)
    for _ in range(6):
        (record,) = trace(simulation, rounds=1)
        selected = "not selected after the survey"  # of those who answered
        absent = {client for client, why in record.pop("absent").items() if why != selected}
        reporting = [client for client in record.pop("cohort") if str(client) not in absent]
        del record["clock"], record["bytes_down"]
        if not reporting:
            reference.number += 1
            continue
        reference.cohort = lambda num_clients, stream, clients=reporting: clients
        (expected,) = trace(reference, rounds=1)
        assert record == {key: expected[key] for key in record}


def test_all_who_were_selected_download_and_those_who_report_upload():
    simulation = make({"over_selection": 3.0}, cohort=fixed(1, 2))
    alone = make(cohort=fixed(1)).round()
    done = simulation.round()
    assert done.cohort == list(range(N))
    assert done.bytes_down == N * alone.bytes_down
    assert done.bytes_up == 2 * alone.bytes_up


def test_only_who_reports_is_run():
    told, reports = [], []
    done = make({"over_selection": 6.0}, cohort=fixed(3)).round(reports.append, told.append)
    assert told == [report.client_id for report in reports] == [0]
    assert done.absent == {str(client): "not needed: 1 had reported" for client in range(1, N)}


# The clock, by hand: a client takes half a second a step, and STEPS steps


BY_HAND = {
    "everyone": ({}, range(N), {}, 2.0),
    "one": ({}, [0], {}, 0.5),
    "a deadline": ({"deadline": 1.2}, range(N), {"3": "missed the deadline of 1.2 s: 2 s"}, 1.2),
    "to the second": ({"deadline": 2.0}, range(N), {}, 2.0),
    "a deadline that all meet": ({"deadline": 50.0}, range(N), {}, 2.0),
    "one that some do not need": (
        {"deadline": 0.7, "over_selection": 6.0},
        [3],
        {
            "1": "missed the deadline of 0.7 s: 1 s",
            "2": "missed the deadline of 0.7 s: 1 s",
            "3": "missed the deadline of 0.7 s: 2 s",
            "4": "not needed: 1 had reported",
            "5": "missed the deadline of 0.7 s: 1 s",
        },
        0.5,
    ),
    "of the same time the lower": (
        {"over_selection": 1.5},
        [0, 1, 2, 3],
        {"3": "not needed: 4 had reported", "5": "not needed: 4 had reported"},
        1.0,
    ),
    "all slow": ({"stragglers": 1.0, "slowdown": 2.5}, range(N), {}, 5.0),
}


@pytest.mark.parametrize(("settings", "cohort", "absent", "seconds"), BY_HAND.values(), ids=BY_HAND)
def test_the_clock_worked_out_by_hand(settings, cohort, absent, seconds):
    simulation = make({"step_seconds": 0.5} | settings, cohort=fixed(*cohort))
    for number in (1, 2, 3):
        done = simulation.round()
        assert done.absent == absent
        assert done.clock == simulation.clock == pytest.approx(number * seconds, rel=1e-12)


def test_as_many_steps_as_the_recipe_has():
    """Not as many as examples: by epochs, by steps, and with a full batch one an epoch."""
    for recipe, steps in [({"epochs": 3}, 3 * 4), ({"steps": 7}, 7), ({"batch_size": "full", "epochs": 2}, 2)]:
        assert make({"step_seconds": 1.0}, **recipe).round().clock == steps


def test_a_deadline_means_its_decimals():
    """3 steps of 0.1 s are a little above 0.3 in binary, and in time."""
    assert make({"deadline": 0.3}, steps=3).round().absent == {}


def test_without_jitter_nobody_is_faster_by_chance():
    drop = {"drop": 0.5, "step_seconds": 1.0}
    clocks = np.diff([0.0, *(record["clock"] for record in trace(make(drop, cohort=SAMPLE), rounds=12))])
    assert set(clocks) <= {0.0, 1.0, 2.0, 4.0}


@settings(max_examples=15)
@given(availabilities, st.integers(0, 99))
def test_the_clock_adds_up_and_never_goes_back(availability, seed):
    simulation = make({}, seed=seed, cohort=SAMPLE, batch_size=4)
    simulation.availability, clock = availability, 0.0
    for number in range(3):
        cohort = simulation.sample()
        found = attempt(availability, cohort, seed=seed, number=number)
        done = simulation.round()
        assert done.clock == clock + found.seconds >= clock
        assert done.absent == {str(client): why for client, why in found.absent.items()}
        clock = done.clock


# Too few


@pytest.mark.parametrize("policy", ["raise", "drop"])
def test_a_round_that_too_few_could_join_is_given_up_and_the_run_goes_on(policy):
    """The model and what clients keep stay; the time and the downloads are spent; and it is said why."""
    rounds = 12
    simulation = make(
        {"drop": 0.5, "deadline": 1.5, "step_seconds": 0.5},
        "scaffold",
        failures=Failures(policy=policy, min_clients=4),
    )
    given_up, before = [], {"server": None, "clients": {}, "clock": 0.0}
    for record in trace(simulation, rounds):
        assert record["bytes_down"] == 2 * N * 4 * simulation.task.initial_model.numel() + N * 24
        given_up.append(N - len(record["absent"]) < 4)
        if given_up[-1]:
            assert (record["steps"], record["bytes_up"], record["train_loss"]) == (0, 0, None)
            assert record["clients"] == before["clients"]
            assert before["server"] in (None, record["server"])
            assert len(record["absent"]) == N
            told = {cause for cause in record["absent"].values() if not cause.startswith("round given up: ")}
            assert told <= {"dropped out", "missed the deadline of 1.5 s: 2 s"}
        else:
            assert record["server"] != before["server"]
            assert record["bytes_up"] > 0
        assert record["failed"] == {}
        assert record["clock"] > before["clock"]
        before = record
    assert set(given_up) == {True, False}
    assert simulation.number == rounds


def test_nobody_in_time_is_a_round_given_up():
    simulation = make({"deadline": 1e-3}, cohort=SAMPLE)
    start = simulation.fingerprint()
    for number in (1, 2):
        done = simulation.round()
        assert (done.round, done.fingerprint, len(done.absent)) == (number, start, 3)
        assert done.clock == pytest.approx(number * 1e-3)


def test_just_enough_are_enough():
    """The floor is met at min_clients, and missed at one less; the slowest client is late."""
    for floor, trains in ((5, True), (6, False)):
        simulation = make({"step_seconds": 0.5, "deadline": 1.0}, failures=Failures(min_clients=floor))
        start = simulation.fingerprint()
        assert (simulation.round().fingerprint != start) == trains


@dataclass(frozen=True, kw_only=True)
class Faulty(Wrapper):
    bad: set[int] = field(default_factory=set)

    def client_update(self, server, client, local):
        if local.client_id in self.bad:
            raise OSError("no space left")
        return super().client_update(server, client, local)


LATE = {"step_seconds": 0.5, "deadline": 1.0}  # client 3 is


@pytest.mark.parametrize("runtime", RUNTIMES, ids=str)
def test_who_is_absent_cannot_fail(runtime):
    strategy = Faulty(inner=make_strategy("fedavg"), bad={3})
    assert make(LATE, strategy, runtime=runtime).round().absent.keys() == {"3"}
    with pytest.raises(ClientError, match="client 3"):
        make({}, strategy, runtime=runtime).round()


@pytest.mark.parametrize("runtime", RUNTIMES, ids=str)
def test_who_reports_and_fails_counts_no_more_than_who_is_absent(runtime):
    """Five report and one of those fails: four are enough, or else too few, which is as if nothing had been."""
    strategy = Faulty(inner=make_strategy("scaffold"), bad={1})
    simulation = make(LATE, strategy, runtime=runtime, failures=Failures(policy="drop", min_clients=4))
    done = simulation.round()
    assert (done.absent.keys(), done.failed.keys()) == ({"3"}, {"1"})
    assert done.fingerprint == make(None, "scaffold", cohort=fixed(0, 2, 4, 5)).round().fingerprint
    before = simulation.number, simulation.clock, simulation.fingerprint(), dict(simulation.clients)
    strategy.bad.add(0)
    with pytest.raises(
        RoundError, match=r"round 2: 3 of 5 clients are left, and failures\.min_clients is 4; client 0: "
    ):
        simulation.round()
    assert (simulation.number, simulation.clock, simulation.fingerprint(), dict(simulation.clients)) == before


# Runs


CONFIG = {
    "rounds": 6,
    "data": {"name": "synthetic", "examples": 60, "test_examples": 12, "clients": 5},
    "model": {"name": "cnn_bn", "widths": [2, 2]},
    "strategy": "scaffold",
    "cohort": {"name": "uniform", "size": 3},
    "runtime": "serial",
    "availability": ROUGH | {"deadline": 2.0},
    "hooks": [],
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return fedsim.run(CONFIG, out=tmp_path_factory.mktemp("runs") / "done")


def shown(rounds):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in rounds]


def test_the_log_says_who_was_away_why_and_until_when(done):
    rounds = [json.loads(line) for line in (done.folder / "rounds.jsonl").read_text().splitlines()]
    assert rounds == done.rounds
    assert any(record["absent"] for record in rounds)
    for record in rounds:
        assert {int(client) for client in record["absent"]} < set(record["cohort"])
        assert all(isinstance(why, str) for why in record["absent"].values())
    assert sorted(record["clock"] for record in rounds) == [record["clock"] for record in rounds]


def test_a_run_that_was_stopped_goes_on_with_its_clock_and_its_fates(done, tmp_path):
    fedsim.run(CONFIG, {"rounds": 3}, out=tmp_path / "run")
    with pytest.warns(UserWarning, match="rounds: 6, and was 3"):
        resumed = fedsim.resume(tmp_path / "run", {"rounds": 6})
    assert shown(resumed.rounds) == shown(done.rounds)
    assert resumed.summary["fingerprint"] == done.summary["fingerprint"]


def test_a_resumed_run_keeps_its_availability(done):
    with pytest.raises(ConfigError, match=r"availability\.drop: 0\.1, and was 0\.3: this changes the result"):
        fedsim.resume(done.folder, {"rounds": 7, "availability.drop": 0.1})


def test_a_config_that_a_run_left_takes_an_availability(done, tmp_path):
    """Though that says availability: null."""
    fedsim.run(CONFIG, {"rounds": 1, "availability": None}, out=tmp_path / "run")
    again = fedsim.run(tmp_path / "run/config.yaml", {"availability.deadline": 1e-3})
    assert len(again.rounds[0]["absent"]) == 3


WRONG = {
    "availability.drop": [
        (1.5, r"1\.5 should be a number >= 0 and <= 1, or a list, each a number >= 0 and <= 1"),
        (-0.1, r"-0\.1 should be a number >= 0"),
        ("often", '"often" should be a number'),
        ([0.1, 0.2], r"has 2 entries, and 5 clients train"),
        ([], r"has 0 entries, and 5 clients train"),
        ([0.1, 0.2, 0.3, 0.4, 1.5], r"\[0\.1, 0\.2, 0\.3, 0\.4, 1\.5\] should be a number"),
    ],
    "availability.deadline": [(0, r"0 should be a number > 0, or null"), (-1, "-1 should be a number > 0")],
    "availability.step_seconds": [(0, "0 should be a number > 0")],
    "availability.stragglers": [(1.1, r"1\.1 should be a number >= 0 and <= 1")],
    "availability.slowdown": [(0.5, r"0\.5 should be a number >= 1")],
    "availability.jitter": [(-1, "-1 should be a number >= 0")],
    "availability.over_selection": [(0.9, r"0\.9 should be a number >= 1"), (float("inf"), "should be finite")],
    "availability.dead_line": [(1, "'dead_line' is unknown; did you mean 'deadline'")],
    "availability": [(True, "true should be a mapping, or null"), ("x", '"x" should be a mapping, or null')],
}


@pytest.mark.parametrize(
    ("key", "value", "said"), [(key, *case) for key, cases in WRONG.items() for case in cases], ids=str
)
def test_a_wrong_setting_is_one_line_that_names_it_and_leaves_no_folder(key, value, said, tmp_path):
    with pytest.raises(ConfigError, match=rf"^{key}: .*{said}") as caught:
        fedsim.run(CONFIG, {key: value}, out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
