"""The benchmark is fair: the plain loop trains as fedsim's clients do, to the last step."""

import io
import json
import os
import re
import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median

import pytest
import torch
from covering import in_turn as turns
from covering import sampled
from rich.cells import cell_len
from rich.console import Console

from fedsim.base.machine import cores
from fedsim.bench import STUDIES, bench, federation, programs, scaling
from fedsim.bench.figures import picture, show
from fedsim.bench.inputs import FEDSIM, TORCHVISION, Cutout, input_line, pipeline
from fedsim.bench.own_process import own_process
from fedsim.bench.plain import PlainLoop
from fedsim.bench.programs import PEERS, check_peers, program
from fedsim.bench.sides import AUGMENTED, NO_STEPS, SERIAL, chosen, sides_of
from fedsim.bench.simulations import FP32, Idle, simulated, steps_of
from fedsim.bench.turns import in_turn, timed, times_as_fast
from fedsim.data import AUGMENTATIONS
from fedsim.errors import ConfigError, RoundError
from fedsim.experiment.build import build
from fedsim.experiment.config import load, resolve
from fedsim.federated.aggregate import WeightedMean
from fedsim.training.local import ClientObjective
from fedsim.training.replica import Replica
from fedsim.types import Job

CONFIG = {
    "rounds": 1,
    "data": {
        "name": "synthetic",
        "examples": 66,
        "test_examples": 8,
        "classes": 3,
        "clients": 3,
        "partition": {"name": "dirichlet", "alpha": 1.0},
    },
    "model": "2nn",
    "strategy": "fedavg",
    "cohort": {"name": "fixed", "clients": [1]},
    "local": {"lr": 0.05, "batch_size": 5},
    "runtime": "serial",
}


LOCALS = {
    "epochs": {"epochs": 3},
    "steps": {"steps": 7},
    "full batch": {"batch_size": "full", "epochs": 2},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01},
    "nesterov": {"momentum": 0.9, "nesterov": True, "epochs": 2},
    "clipping": {"clip_norm": 0.1},
    "adam": {"optimizer": "adam", "lr": 0.01, "weight_decay": 0.1},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1, "betas": [0.8, 0.9]},
    "schedule": {"warmup": 3, "schedule": {"name": "step", "every": 2}},
}
MODELS = ["2nn", "cnn_bn"]


@pytest.mark.parametrize(("local", "model"), sampled(turns(LOCALS, MODELS), LOCALS, MODELS))
def test_one_client_ends_where_the_plain_loop_does(local, model):
    settings = {f"local.{key}": value for key, value in LOCALS[local].items()}
    simulation = build(load(CONFIG, {"model": model} | settings))
    loop = PlainLoop(simulation)
    simulation.round()
    loop.train(1)
    ours, theirs = simulation.task.state_dict(simulation.server), loop.net.state_dict()
    for name in (name for name, tensor in theirs.items() if tensor.is_floating_point()):  # no counter of batches
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(theirs[name], loop.initial[name]) for name in theirs if name.endswith("weight"))


def test_the_plain_loop_starts_each_client_anew():
    simulation = build(load(CONFIG, {"cohort": "all"}))
    loop = PlainLoop(simulation)
    loop.train(2)
    alone = {name: value.clone() for name, value in loop.net.state_dict().items()}
    loop([0, 1, 2])
    assert all(torch.equal(alone[name], value) for name, value in loop.net.state_dict().items())


IMAGES = {"data.shape": [3, 8, 8], "data.examples": 12, "model": "2nn", "cohort": "all", "local.epochs": 2}
STILL = {  # options that leave nothing to chance
    "random_crop": {"padding": 0},
    "flip": {"p": 1},
    "rotation": {"degrees": 0},
    "color_jitter": {"brightness": 0, "contrast": 0, "saturation": 0},
    "cutout": {"holes": 1, "length": 16},
    "random_resized_crop": {"scale": [1, 1], "ratio": [1, 1]},
    "mixup": {"p": 0},
    "cutmix": {"p": 0},
}


@pytest.mark.parametrize("name", list(AUGMENTATIONS))
def test_both_pipelines_make_the_same_batches_of_the_same_rows(name):
    config = load(CONFIG, IMAGES | {"local.augment": [{"name": name, **STILL[name]}]})
    simulation = build(config)
    images, batches, collate = pipeline(config, simulation)
    replica, buffers = Replica(simulation.task), simulation.task.initial_buffers
    theirs = iter(batches)
    for client in simulation.sample():
        job = Job(client, 0, None)
        for ours in ClientObjective(replica, simulation.data, job, buffers, simulation.recipe).batches():
            x, y = collate([images[i] for i in next(theirs)])
            torch.testing.assert_close(x, ours.x, rtol=0, atol=1e-5)
            assert torch.equal(y, ours.y)
    assert next(theirs, None) is None


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_a_mixed_batch_of_torchvision_has_mixed_labels(name):
    config = load(CONFIG, IMAGES | {"local.augment": [name]})
    images, batches, collate = pipeline(config, build(config))
    _, y = collate([images[i] for i in batches[0]])
    assert y.shape == (len(batches[0]), 3)
    torch.testing.assert_close(y.sum(1), torch.ones(len(y)))


def test_torchvisions_side_cuts_squares_out_of_a_copy():
    torch.manual_seed(0)
    image = torch.ones(2, 9, 7)
    for _ in range(50):
        cut = Cutout(holes=1, length=3)(image)
        hidden = (cut[0] == 0).nonzero()
        height, width = (hidden.amax(0) - hidden.amin(0) + 1).tolist()
        assert {height, width} <= {2, 3}  # 2 at the edge
        assert len(hidden) == height * width
        assert torch.equal(cut[0], cut[1])
    assert image.min() == 1


def printed(found, config):
    """What is printed, as one text; no line of it is longer than a terminal's."""
    shown = io.StringIO()
    for each in found if isinstance(found, list) else [found]:
        show(each, config, Console(file=shown, width=80))
    assert max(map(cell_len, shown.getvalue().splitlines())) <= 80
    return " ".join(shown.getvalue().split())


def test_every_side_is_timed_and_printed(tmp_path):
    shown, out = io.StringIO(), tmp_path / "bench.json"
    augment = ["color_jitter", "random_crop", "flip", "rotation", "cutout"]
    settings = {"local.augment": augment, "local.oversample": True, "strategy": "scaffold"}
    config = load(CONFIG, IMAGES | settings)
    local = ["plain*", "fedsim serial", "fedsim threads*", "augmented*", "a checkpoint*"]
    (sides,) = bench(config, 2, Console(file=shown, width=80), out, sides=local)
    found, text = json.loads(out.read_text()), printed(sides, config)
    assert " ".join(shown.getvalue().split()) == text
    assert found.keys() == {"date", "machine", "device", "versions", "config", "found"}
    assert found["machine"].keys() == {"cpu", "cores", "memory_bytes", "gpus", "load"}
    assert found["versions"].keys() >= {"python", "fedsim", "torch"}
    assert resolve(found["config"]) == config
    rows = {row["side"]: row for row in found["found"]["sides"]["rows"]}
    simulation = build(config)
    assert found["found"]["sides"]["steps"] == simulation.round().steps
    wanted = [name for name in sides_of(config, simulation) if not name.startswith(("fedsim v", "fedsim r"))]
    assert list(rows) == wanted
    assert all(len(row["passes"]) == 2 and min(row["passes"]) > 0 for row in rows.values())
    assert all(row["seconds"] == median(row["passes"]) for row in rows.values())
    assert rows["fedsim threads"]["steps_per_second"] * rows["fedsim threads"]["seconds"] == pytest.approx(
        simulation.last.steps
    )
    assert all(row["spread"]["ratio"][0] <= row["ratio"] <= row["spread"]["ratio"][1] for row in trained(rows))
    assert "left out on all sides: local.oversample left out on all sides but the augmented ones" in text
    line = r" augmented batch: \d+\.\d\d ms, \d+\.\d% of a client step; by torchvision \d+\.\d\d ms "
    assert re.search(line, text)
    assert re.search(r"a checkpoint takes \d+\.\d% of a round", text)


def trained(rows):
    return [row for name, row in rows.items() if name not in NO_STEPS]


def test_input_pipelines_are_sides_where_images_are_augmented():
    def sides(settings):
        config = load(CONFIG, {"runtime.device": "cpu"} | settings)
        return sides_of(config, build(config)).keys()

    assert sides({"local.augment": ["flip"]}) == sides({}) | {AUGMENTED, FEDSIM, TORCHVISION}
    assert sides({"local.augment": ["fedsim.data.augment:flip"]}) == sides({}) | {AUGMENTED, FEDSIM}
    vectors = {"data": {"name": "synthetic_iid", "clients": 30}}
    assert sides(vectors | {"local.augment": ["mixup"]}) == sides(vectors)


def test_sides_are_chosen_by_pattern():
    config = load(CONFIG, {"runtime.device": "cpu"})
    sides = sides_of(config, build(config))
    assert list(chosen(sides, ["*serial", "plain*process"])) == ["plain loop, one process", SERIAL]
    assert list(chosen(sides, [])) == list(sides)
    with pytest.raises(ConfigError, match=r"--sides: 'serial' matches none of: plain loop, one process; "):
        chosen(sides, ["serial"])


def test_ratios_are_medians_of_turns_with_their_spread():
    seconds = {"a": [1.0, 2.0, 9.0], "b": [2.0, 8.0, 9.0]}
    assert times_as_fast(seconds, "a", "b") == (2.0, 1.0, 4.0)
    assert times_as_fast(seconds, "a", "a") == (1.0, 1.0, 1.0)


def test_sides_take_turns_and_the_first_turn_does_not_count():
    order = []
    sides = {name: partial(order.append, name) for name in "abc"}
    seconds = in_turn(sides, 2, Console(file=io.StringIO()))
    assert order == ["a", "b", "c"] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2, "c": 2}


@contextmanager
def refused():
    raise ConfigError("not here")
    yield


def test_a_case_that_is_refused_becomes_a_note_unless_all_are():
    notes, console = [], Console(file=io.StringIO())
    seconds, last = timed({"a": refused(), "b": nullcontext(lambda: 5)}, 2, console, notes)
    assert (list(seconds), last, notes) == (["b"], {"b": 5}, ["left out: a: not here"])
    with pytest.raises(ConfigError, match=r"\Aa: not here\Z"):
        timed({"a": refused(), "b": refused()}, 2, console, [])
    with pytest.raises(ConfigError, match=r"\Anot here\Z"):
        timed({"a": refused()}, 2, console)


def test_idle_clients_leave_the_model_alone():
    config = load(CONFIG)
    simulation = simulated(config, "serial")
    simulation.strategy = Idle()
    before = simulation.fingerprint()
    assert simulation.round().steps == 0
    assert simulation.fingerprint() == before


# In a process of its own


@contextmanager
def counting(start):
    calls = count(start)

    def side():
        if next(calls) == 2:
            raise ConfigError("enough: two")

    yield side


@contextmanager
def dying():
    yield partial(os._exit, 3)


def test_a_side_in_its_own_process_gives_its_memory_and_its_errors():
    with own_process(counting, 1) as side:
        assert side() > 10_000_000
        with pytest.raises(ConfigError, match=r"\Aenough: two\Z"):
            side()


@pytest.mark.slow
def test_a_side_whose_process_dies_is_an_error():
    with pytest.raises(RoundError, match="ended by itself"), own_process(dying) as side:
        side()
    with pytest.raises(RoundError, match="TypeError"), own_process(counting):
        pass


# Peers


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """Has a peer's program be some lines of Python."""

    def program_is(code):
        (tmp_path / "stub.py").write_text(code)
        monkeypatch.setattr(programs.peers, "__path__", [str(tmp_path)])
        monkeypatch.setitem(PEERS, "flower", PEERS["flower"]._replace(program="stub.py"))

    return program_is


def test_a_peer_runs_a_round_for_each_line(stub):
    lines = "for i, _ in enumerate(sys.stdin): print('done', i, flush=True)"
    stub(f"import sys\nprint('noise')\nprint('ready', flush=True)\n{lines}")
    with program("flower", simulated(load(CONFIG), "serial", FP32)) as side:
        assert [side(), side()] == [0.0, 1.0]


def test_a_peer_that_ends_says_why(stub):
    stub("import sys\nprint('ready', flush=True)\nsys.stdin.readline()\nraise ValueError('no such node')")
    simulation = simulated(load(CONFIG), "serial", FP32)
    with (
        pytest.raises(RoundError, match="Flower simulation ended: ValueError: no such node"),
        program("flower", simulation) as side,
    ):
        side()


def test_a_peer_that_is_not_there_is_one_line(monkeypatch):
    with pytest.raises(
        ConfigError, match=r"\A--peers: 'flwr' is unknown; did you mean 'flower'\? allowed: flower, pfl\Z"
    ):
        check_peers(["flwr"])
    monkeypatch.setitem(PEERS, "pfl", PEERS["pfl"]._replace(package="no_such_package"))
    with pytest.raises(
        ConfigError,
        match=r"\A--peers: pfl needs no_such_package 0\.6, and no_such_package is missing; pip install",
    ):
        check_peers(["pfl"])
    monkeypatch.setitem(PEERS, "pfl", PEERS["pfl"]._replace(package="torch", versions=("0.6",)))
    with pytest.raises(ConfigError, match=r"and torch is \d"):
        check_peers(["pfl"])


@pytest.mark.slow
def test_flower_takes_the_same_steps():
    pytest.importorskip("flwr")
    config = load(CONFIG, {"cohort": {"name": "fixed", "clients": [0, 2]}, "local.epochs": 2})
    simulation = simulated(config, "serial", FP32)
    with program("flower", simulation) as side:
        theirs = [side(), side()]
    assert simulation.round().steps == steps_of(simulation)
    ours = sum(float(value.sum()) for value in simulation.task.state_dict(simulation.server).values())
    assert theirs == pytest.approx([ours, ours], rel=1e-4)


# Studies


def study(name, settings, repeats=1):
    config = load(CONFIG, {"runtime.device": "cpu"} | settings)
    found = STUDIES[name](config, repeats, Console(file=io.StringIO()))
    text = printed(found, config)
    assert all(column.heading in text for column in found.columns)
    json.dumps(found.rows)
    return found


MANY = {
    "data.examples": 1000,
    "data.clients": 1000,
    "data.partition": "iid",
    "cohort": {"name": "uniform", "size": 2},
}


@pytest.fixture
def here(monkeypatch):
    """Has the cases of studies run in this process."""

    @contextmanager
    def in_this_process(make, *given):
        with make(*given) as side:
            yield lambda: side() or 10**8

    monkeypatch.setattr(scaling, "own_process", in_this_process)


@pytest.mark.parametrize("processes", ["one", pytest.param("each", marks=pytest.mark.slow)])
def test_population_has_as_many_examples_in_each_case(tmp_path, request, processes):
    if processes == "one":
        request.getfixturevalue("here")
    found = study("population", MANY | {"local.batch_size": 1, "local.steps": 2})
    assert [row["clients"] for row in found.rows] == [100, 1000]
    assert found.rows[1]["ratio"] == found.rows[1]["memory_ratio"] == 1.0
    assert found.rows[0]["memory_ratio"] == found.rows[0]["memory_mb"] / found.rows[1]["memory_mb"]
    picture([found], tmp_path / "population.png")
    assert (tmp_path / "population.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("here")
def test_cohorts_grow_tenfold():
    found = study("cohort", MANY | {"data.clients": 100})
    assert [row["cohort"] for row in found.rows] == [10, 100]
    for row in found.rows:
        assert row["ms_per_client"] * row["cohort"] == pytest.approx(1000 * median(row["passes"]))


def test_aggregation_counts_the_bytes_of_messages():
    found = study("aggregation", {"cohort": "all"})
    size = 4 * len(build(load(CONFIG)).server["model"]) * 3
    assert found.extra["bytes"] == size
    for row in found.rows:
        assert row["gb_per_second"] == pytest.approx(size / median(row["passes"]) / 1e9)
    assert {row["share"] for row in found.rows if row["what"] == "memory copy"} == {1.0}


@pytest.mark.slow
def test_idle_clients_in_each_runtime():
    found = study("idle", {"cohort": "all"})
    assert {"fedsim serial", "fedsim threads", "Flower simulation"} <= {row["runtime"] for row in found.rows}
    for row in found.rows:
        assert row["ms_per_client"] * 3 == pytest.approx(1000 * median(row["passes"]))


@pytest.mark.slow
def test_actors_double():
    pytest.importorskip("ray")
    found = study("actors", {"cohort": "all"})
    numbers = [row["actors"] for row in found.rows]
    assert numbers == [2**i for i in range(len(numbers))]
    assert numbers[-1] <= cores() < 2 * numbers[-1]
    assert found.rows[0]["efficiency"] == 1.0


@pytest.mark.slow
def test_startup_ends_with_the_first_round():
    pytest.importorskip("flwr")
    found = study("startup", {"cohort": "all"})
    assert [row["side"] for row in found.rows] == ["fedsim run", "Flower simulation"]
    assert all(row["seconds"] == row["passes"][0] > 0 for row in found.rows)


# Federations


@pytest.fixture
def still(monkeypatch):
    """Has the parts of idle nodes in this process, too."""
    monkeypatch.syspath_prepend(federation.APPS)
    yield {"model": {"name": "still:vector", "parameters": 1000}, "strategy": "still:Still", "cohort": "all"}
    sys.modules.pop("still", None)


class Noted(WeightedMean):
    """Remembers what was sent."""

    def __init__(self):
        self.sent = set()

    def fold(self, updates, start=None):
        updates = list(updates)
        self.sent |= {message["delta"].numpy().tobytes() for _, message, _ in updates}
        return super().fold(updates, start)


def test_idle_nodes_send_what_nobody_sent_before(still):
    simulation, models = build(load(CONFIG, still)), set()
    simulation.aggregator = Noted()
    for _ in range(3):
        models.add(simulation.fingerprint())
        simulation.round()
    assert simulation.server["model"].shape == (1000,)
    assert len(models) == 3
    assert len(simulation.aggregator.sent) == 9


def test_a_federations_process_that_fails_says_why(tmp_path):
    pytest.importorskip("flwr")
    nodes = federation.LoopbackFederation(tmp_path, stock=True)
    with pytest.raises(RoundError, match=r" -c failed: no such app\Z"):
        nodes._finish("x", [sys.executable, "-c", "raise SystemExit('no such app')"])


@pytest.mark.slow
def test_federations_of_idle_nodes(monkeypatch):
    pytest.importorskip("flwr")
    monkeypatch.setattr(federation, "SIZES", (1000,))
    found = study("flower", {})
    sides = [federation.FAST, federation.PLAIN, federation.STOCK, federation.ALONE]
    assert [row["side"] for row in found.rows] == sides
    fast, plain, *flwr = (row["seconds"] for row in found.rows)
    assert max(fast, plain) < min(flwr)


# Wrong options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"studies": ["actor"]}, "--study: 'actor' is unknown; did you mean 'actors'?"),
        ({"studies": ["cohort"], "sides": ["*"]}, "--sides: cannot be combined with --study"),
        ({"peers": ["flowr"]}, "--peers: 'flowr' is unknown"),
        ({"sides": ["x"]}, "--sides: 'x' matches none"),
        ({"drawing": Path("sides.png")}, "--picture needs a study; name one with --study"),
        ({"drawing": Path("no/such/folder.png")}, "--picture: no/such/folder.png cannot be written"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_at_the_start(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        bench(load(CONFIG), 1, Console(file=io.StringIO()), **options)


def test_shares_and_milliseconds_are_medians_of_turns():
    seconds = {FEDSIM: [1.0, 2.0, 9.0], TORCHVISION: [4.0, 6.0, 5.0], "serial": [10.0, 10.0, 18.0]}
    line = "augmented batch: 20.00 ms, 20.0% of a client step; by torchvision 50.00 ms"
    assert input_line(seconds, "serial", 100) == line


def test_the_line_says_that_torchvision_has_no_such_thing():
    assert input_line({FEDSIM: [1.0], "serial": [5.0]}, "serial", 1000).endswith("; torchvision lacks an entry")
