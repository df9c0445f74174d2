"""Laws of the border between fedsim and a user's callables: a fault is one line with its key, object and place.

Each kind of object that a config can name meets the same list of bad ones; each method of a strategy, hook and
runtime meets it, too.
"""

import re

import numpy as np
import pytest
import torch
from conftest import SIZES, make_simulation, trace

import fedsim
from fedsim import ClientError, ConfigError, Hook, RoundError, Wrapper
from fedsim.data import Dataset
from fedsim.federated.simulation import Failures
from fedsim.runtimes.serial import Serial
from fedsim.strategies.averaging.fedavg import FedAvg

CONFIG = {
    "rounds": 2,
    "data": {
        "name": "synthetic",
        "shape": [1, 4, 4],
        "examples": 12,
        "test_examples": 4,
        "classes": 3,
        "clients": 2,
    },
    "model": "2nn",
    "strategy": "fedavg",
    "cohort": "all",
    "runtime": "serial",
    "hooks": [],
}
KINDS = {  # by key, the setting that names an entry
    "data": lambda name: {"data": {"name": name, "clients": 2}},
    "data.partition": lambda name: {"data.partition": name},
    "model": lambda name: {"model": name},
    "strategy": lambda name: {"strategy": name},
    "strategy.inner": lambda name: {"strategy": {"name": "personal", "layers": ["*"], "inner": name}},
    "cohort": lambda name: {"cohort": name},
    "runtime": lambda name: {"runtime": name},
    "local.schedule": lambda name: {"local.schedule": name},
    "local.loss": lambda name: {"local.loss": name},
    "local.augment": lambda name: {"local.augment": [name]},
    "hooks": lambda name: {"hooks": [name]},
}
kinds = pytest.mark.parametrize("kind", KINDS)


class Silent(Exception):  # noqa: N818
    """Its text is a fault, too."""

    def __str__(self):
        raise KeyError


class Base(BaseException):
    pass


def raises(kind, *text):
    def fail(*_):
        raise kind(*text)

    return fail


RAISES = {
    "error": raises(ValueError, "no\nluck"),
    "exit": raises(SystemExit, 3),
    "base": raises(Base, "x"),
    "generator": raises(GeneratorExit),
    "silent": raises(Silent),
    "config": raises(ConfigError, "some key: why"),
    "round": raises(RoundError, "why"),
}
GIVES = {
    "text": "text",
    "number": -1,
    "nan": float("nan"),
    "mask": [True, False],
    "array": np.zeros((2, 2)),
    "tensor": torch.zeros(2, 2),
    "dictionary": {"model": np.zeros(3)},
    "unnamed": {1: torch.zeros(3)},
    "object": object(),
}
BAD = {name: (lambda *_, value=value: value) for name, value in GIVES.items()} | RAISES
NONE = {"none": lambda *_: None}
bad = pytest.mark.parametrize("what", [*NONE, *BAD])


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of the user's own."""
    monkeypatch.syspath_prepend(tmp_path)
    return lambda name, text: (tmp_path / f"{name}.py").write_text(text)


def refused(settings):
    with pytest.raises(ConfigError) as caught:
        fedsim.run(CONFIG, settings)
    said = str(caught.value)
    assert "\n" not in said
    return said


def told(said, what):
    """A line about a bad object says where it raised, or names the type that it gave."""
    return "\n" not in said and (what not in ("error", "exit", "base", "silent") or "(test_border.py:" in said)


BROKEN = {
    "import": ("\nimport no_such_thing", r"ModuleNotFoundError: No module named 'no_such_thing' \(broken\.py:2\)"),
    "syntax": ("\n\ndef f(:", r"SyntaxError: .* \(broken\.py:3\)"),
    "name": ("x = y", r"NameError: name 'y' is not defined \(broken\.py:1\)"),
    "exit": ("raise SystemExit(0)", r"SystemExit: 0 \(broken\.py:1\)"),
    "base": ("class E(BaseException): ...\nraise E('x')", r"E: x \(broken\.py:2\)"),
    "annotation": ("def f(*_, a: 'Nope' = 3): ...", "NameError: name 'Nope' is not defined"),
    "default": ("def f(*_, a=object()): ...", "option a: Unable to serialize.*"),
    "option": ("def f(*_, name='x'): ...", None),
    "keyword": ("def f(*, a): ...", None),
}


@kinds
@pytest.mark.parametrize(("text", "said"), BROKEN.values(), ids=BROKEN)
def test_a_module_that_is_broken(kind, text, said, module):
    module("broken", text)
    key = {"local.augment": r"local\.augment\[0\]", "hooks": r"hooks\[0\]"}.get(kind, kind)
    found = refused(KINDS[kind]("broken:f"))
    pattern = (
        rf"{key}(\.name|\.a)?: (broken:f.*|missing; .*)" if said is None else rf"{key}\.name: broken:f: {said}"
    )
    assert re.fullmatch(pattern, found), found


@kinds
@bad
def test_every_kind_meets_every_bad_object(kind, what, monkeypatch):
    monkeypatch.setitem(globals(), "made", {**NONE, **BAD}[what])
    said = refused(KINDS[kind](f"{__name__}:made"))
    assert re.match(re.escape(kind) + r"(\[0\])?(\.name)?: ", said) or what == "config", said
    assert told(said, what) or kind == "runtime", said  # which is a class, and is not called


def whole_round(strategy):
    simulation = make_simulation(strategy)
    simulation.round()
    simulation.evaluate_clients()


METHODS = {
    "check": ConfigError,
    "init_server": ConfigError,
    "init_client": ConfigError,
    "client_update": ClientError,
    "server_update": RoundError,
    "client_model": ClientError,
}


@pytest.mark.parametrize("method", METHODS)
@bad
def test_every_method_of_a_strategy_meets_every_bad_object(method, what):
    if method == "check" and what not in RAISES:
        return  # what it gives is not used
    strategy = type("Mine", (FedAvg,), {method: staticmethod({**NONE, **BAD}[what])})()
    with pytest.raises((ConfigError, ClientError, RoundError)) as caught:
        whole_round(strategy)
    said = str(caught.value)
    assert isinstance(caught.value, METHODS[method]) or what in ("config", "round"), said
    assert told(said, what), said
    if METHODS[method] is ConfigError and what != "config":
        assert said.startswith(f"strategy: Mine.{method}: ")
    elif METHODS[method] is RoundError and what != "round":
        assert said.startswith(f"round 1: Mine.{method}: ")
    elif METHODS[method] is ClientError:
        assert re.match(r"round 1, client 0: ", said)
        assert what in RAISES or f"Mine.{method}: gave" in said


@pytest.mark.parametrize("method", ["run", "map", "check", "close", "__init__"])
@bad
def test_every_method_of_a_runtime_meets_every_bad_object(method, what, monkeypatch):
    if method in ("check", "close", "__init__") and what not in RAISES:
        return
    mine = type("Mine", (Serial,), {method: staticmethod({**NONE, **BAD}[what]), "__module__": __name__})
    monkeypatch.setitem(globals(), "made", mine)
    fault = ConfigError if method in ("check", "__init__") else RoundError
    with pytest.raises((ConfigError, RoundError)) as caught:
        fedsim.run(CONFIG, {"runtime": f"{__name__}:made"})
    said = str(caught.value)
    assert isinstance(caught.value, fault) or what in ("config", "round"), said
    assert what in ("config", "round") or re.match(
        rf"runtime(\.name)?: ({__name__}:made|Mine\.{method}): ", said
    ), said
    assert told(said, what), said


EVENTS = ["before_run", "before_round", "before_client", "after_client", "before_evaluation", "after_evaluation"]


@pytest.mark.parametrize("event", [*EVENTS, "after_round", "after_run"])
@pytest.mark.parametrize("what", [*RAISES, "dictionary"])
def test_every_method_of_a_hook_meets_every_bad_object(event, what):
    hook = type("Mine", (Hook,), {event: staticmethod(BAD[what])})()
    with pytest.raises((ConfigError, RoundError)) as caught:
        fedsim.run(CONFIG, {"rounds": 1}, hooks=[hook])
    said = str(caught.value)
    assert what in ("config", "round") or said.startswith(f"hook Mine, {event}: "), said
    assert told(said, what), said


class Notes(Hook):
    def after_runs(self, run): ...


class Late(Hook):
    def after_round(self, run): ...


class Misnamed(FedAvg):
    def init_sever(self, model): ...


class Misread(FedAvg):
    brodcast = ("model", "c")


class Short(FedAvg):
    def client_update(self, server, client): ...


class Helped(FedAvg):
    def client_update(self, server, client, local, scale=1.0):
        return super().client_update(server, client, local)

    def client_updates(self): ...

    def _init_sever(self): ...


def test_a_method_that_is_misspelt_or_takes_other_arguments_is_refused_at_the_start():
    for hook, said in (
        (Notes(), "Notes.after_runs is never"),
        (Late(), "Late.after_round does not take the argu"),
    ):
        with pytest.raises(ConfigError, match=f"^hooks: {said}"):
            fedsim.run(CONFIG, hooks=[hook])
    wrapped = Wrapper(inner=Short())
    for strategy, said in (
        (Misnamed(), r"Misnamed\.init_sever is never called; did you mean 'init_server'\?"),
        (Misread(), r"Misread\.brodcast is never read; did you mean 'broadcast'\?"),
        (Short(), r"Short\.client_update does not take the arguments \(server, client, local\): too many"),
        (wrapped, r"Short\.client_update does not take"),
        (Short, ".* is no Strategy"),
        (FedAvg(buffers="avarage"), "'avarage' is unknown; allowed: average, private, frozen, recalibrated"),
    ):
        with pytest.raises(ConfigError, match=rf"^strategy(\.buffers)?: {said}"):
            make_simulation(strategy)
    assert make_simulation(Helped()).round().failed == {}


COHORTS = {
    "numpy integers": [np.int64(4), np.int32(1)],
    "array": np.array([4, 1]),
    "tensor": torch.tensor([4, 1]),
    "tuple": (4, 1),
    "set": {4, 1},
    "range": range(1, 5, 3),
}


@pytest.mark.parametrize("drawn", COHORTS.values(), ids=COHORTS)
def test_ids_may_come_in_any_form_that_is_clear(drawn):
    simulation = make_simulation()
    simulation.cohort = lambda *_: drawn
    assert sorted(simulation.sample()) == [1, 4]
    assert all(type(client) is int for client in simulation.sample())


@pytest.mark.parametrize(
    "drawn", [[], [6], [-1], [1, 1], [1.0], [True], "01", {1: 2}, np.int64(1), None], ids=repr
)
def test_ids_that_are_not_clear_are_refused_and_in_a_run_the_round_fails(drawn):
    simulation = make_simulation()
    simulation.cohort = lambda *_: drawn
    with pytest.raises(ConfigError, match=r"^cohort: test_border:.*: gave "):
        simulation.sample()
    with pytest.raises(RoundError, match=r"^round 1: cohort: test_border:.*: gave "):
        simulation.round()


def ends(time):
    return 1.0 if time < 1 else float("nan")


def test_a_schedule_that_ends_in_nan_is_refused_at_the_start_and_fails_its_round():
    said = r"local\.schedule: test_border:ends: the schedule gave nan in round 2"
    with pytest.raises(ConfigError, match=f"^{said}"):
        fedsim.run(CONFIG, {"local.schedule": f"{__name__}:ends"})
    simulation = make_simulation(schedule=ends)
    simulation.round()
    with pytest.raises(RoundError, match=f"^round 2: {said}"):
        simulation.round()


# What is written in place


class Lost(FedAvg):
    def server_update(self, server, mean, info):
        server["model"].data.add_(mean["delta"])
        return {}


class Rebound(FedAvg):
    def server_update(self, server, mean, info):
        server["moment"] = mean["delta"]
        return {"model": server["model"] + mean["delta"]}


class Kept(FedAvg):
    def server_update(self, server, mean, info):
        return {"model": server["model"].add_(mean["delta"])}


def test_what_a_server_update_changes_it_must_return():
    for strategy, name in ((Lost(), "model"), (Rebound(), "moment")):
        said = rf"^round 1: \w+\.server_update: changed server\['{name}'\] and did not return it"
        with pytest.raises(RoundError, match=said):
            make_simulation(strategy).round()
    assert trace(make_simulation(Kept()), 2) == trace(make_simulation("fedavg"), 2)


class Writes(FedAvg):
    def client_update(self, server, client, local):
        server["model"].numpy()[0] += 1
        return super().client_update(server, client, local)


@pytest.mark.parametrize("runtime", ["serial", {"name": "threads", "workers": 3}], ids=str)
@pytest.mark.parametrize("policy", ["raise", "drop"])
def test_no_way_of_writing_to_what_clients_share_goes_unnoticed(runtime, policy):
    with pytest.raises((RoundError, ClientError), match=r"round 1.*(server\['model'\] in place|numpy)"):
        make_simulation(Writes(), runtime=runtime, failures=Failures(policy=policy)).round()


class Graph(FedAvg):
    """Everything that it gives has a gradient."""

    def init_server(self, model):
        return {"model": model.clone().requires_grad_()}

    def client_update(self, server, client, local):
        weight = (local.num_examples * 1.0).requires_grad_()
        return super().client_update(server, client, local)._replace(weight=weight)

    def server_update(self, server, mean, info):
        return {"model": (server["model"] + mean["delta"]).requires_grad_()}


def test_gradients_of_states_are_left_behind():
    assert trace(make_simulation(Graph())) == trace(make_simulation("fedavg"))


# A runtime of one's own


class Forgetful(Serial):
    """Leaves out some clients, or runs them again."""

    change = staticmethod(list)

    def run(self, work, server, jobs, aggregator):
        return super().run(work, server, self.change(list(jobs)), aggregator)

    def map(self, work, server, items):
        return super().map(work, server, self.change(list(items)))


@pytest.mark.parametrize(
    ("change", "said"), [(lambda c: c[1:], "left out client 0"), (lambda c: [*c, c[2]], "ran too often client 2")]
)
def test_a_runtime_runs_each_client_once(change, said, monkeypatch):
    monkeypatch.setattr(Forgetful, "change", staticmethod(change))
    simulation = make_simulation()
    simulation.runtime = Forgetful(simulation.task, simulation.data)
    with pytest.raises(RoundError, match=rf"^runtime: Forgetful\.run {said}"):
        simulation.round()
    assert simulation.number == 0
    with pytest.raises(RoundError, match=rf"^runtime: Forgetful\.map {said}"):
        simulation.evaluate_clients(range(len(SIZES)))
    with pytest.raises(RoundError, match=r"^runtime: Forgetful\.map (left out examples from 0|ran too often)"):
        simulation.evaluate(batch_size=5)


def test_a_runtime_needs_a_home():
    simulation = make_simulation()
    homeless = type("Homeless", (Serial,), {})(simulation.task, simulation.data)
    del homeless.home
    with pytest.raises(ConfigError, match=r"^runtime: Homeless has no home; its __init__ should set self\.home"):
        make_simulation(runtime=homeless)


@pytest.mark.parametrize("error", [ConfigError, RoundError, Base, GeneratorExit])
def test_in_vectorized_too_no_error_of_a_client_is_anything_else(error):
    class Mine(FedAvg):
        def client_update(self, server, client, local):
            raise error("x")

    with pytest.raises(ClientError, match=r"^round 1, client \d: \w+: x \(test_border\.py:\d+\)$"):
        make_simulation(Mine(), runtime="vectorized").round()


# The record


RECORD = {
    "deleted": lambda record: record.pop("cohort"),
    "changed": lambda record: record.update(fingerprint="x"),
    "retyped": lambda record: record.update(round=1.0),
    "inside": lambda record: record["cohort"].append(3),
    "cleared": lambda record: record.clear(),
}


@pytest.mark.parametrize("event", ["before_evaluation", "after_evaluation", "after_round"])
@pytest.mark.parametrize("change", RECORD.values(), ids=RECORD)
def test_a_hook_changes_no_field_of_a_record_and_the_run_can_be_resumed(event, change, tmp_path):
    def tampers(self, run, record):
        change(record)

    with pytest.raises(RoundError, match=rf"^hook Mine, {event}: changed '\w+' of the record; a hook may "):
        fedsim.run(CONFIG, out=tmp_path / "run", hooks=[type("Mine", (Hook,), {event: tampers})()])
    plain, rest = fedsim.run(CONFIG), fedsim.resume(tmp_path / "run")
    timeless = [[record | {"seconds": 0} for record in run.rounds] for run in (plain, rest)]
    assert timeless[0] == timeless[1]


class Adds(Hook):
    def before_evaluation(self, run, record):
        record["lr"] = np.float32(0.5)

    def after_evaluation(self, run, record):
        record["mine"] = torch.tensor(2)


class AddsLate(Hook):
    def after_round(self, run, record):
        record["mine"] = 2


def test_a_hook_may_add_fields_until_the_record_is_written():
    assert [(record["lr"], record["mine"]) for record in fedsim.run(CONFIG, hooks=[Adds()]).rounds] == [
        (0.5, 2)
    ] * 2
    with pytest.raises(RoundError, match=r"changed 'mine' of the record; a hook may no longer change it"):
        fedsim.run(CONFIG, hooks=[AddsLate()])
    for name, value in ((1, 2), ("a", {1, 2}), ("b", torch.zeros(2)), ("c", [float("nan")])):
        hook = type("Mine", (Hook,), {"after_evaluation": lambda self, run, r, n=name, v=value: r.update({n: v})})
        with pytest.raises(
            RoundError, match=rf"^hook Mine, after_evaluation: added {name!r}, which rounds\.jsonl"
        ):
            fedsim.run(CONFIG, hooks=[hook()])


# Data


def good():
    x, y = torch.rand(12, 1, 4, 4), torch.arange(12) % 3
    return {"x_train": x, "y_train": y, "x_test": x[:4], "y_test": y[:4], "classes": 3}


DATA = {
    "numpy": ({"x_train": np.zeros((12, 1, 4, 4))}, r"x_train is of type ndarray; it should be a tensor"),
    "none": ({"y_test": None}, r"y_test is of type NoneType"),
    "lengths": ({"y_train": torch.zeros(11, dtype=torch.int64)}, r"y_train is int64 \(11,\)"),
    "float labels": ({"y_train": torch.zeros(12)}, r"y_train is float32 \(12,\)"),
    "range": ({"y_train": torch.arange(12)}, r"y_train has numbers from 0 to 11; allowed: 0 to 2"),
    "nan": ({"x_train": torch.full((12, 1, 4, 4), float("nan"))}, "x_train has values that are not finite"),
    "classes": ({"classes": 3.0}, r"classes is 3\.0; it should be a whole number"),
    "mean": ({"mean": 0.5, "std": 0.5}, r"mean is 0\.5; it should be a tuple"),
    "owner": ({"owner": [0] * 12}, "owner is of type list"),
}


@pytest.mark.parametrize(("wrong", "said"), DATA.values(), ids=DATA)
def test_a_dataset_of_the_users_own_is_checked(wrong, said, monkeypatch):
    made = lambda: Dataset(**good() | wrong)  # noqa: E731 - its name is that of the config
    monkeypatch.setitem(globals(), "made", made)
    assert re.match(rf"data\.name: test_border:made: {said}", refused(KINDS["data"](f"{__name__}:made")))


OWNERS = {
    "short": (np.zeros(11, dtype=np.int64), r"returned int64 \(11,\); it should return int64 \(12,\)"),
    "floats": (np.zeros(12), r"returned float64 \(12,\)"),
    "negative": (np.full(12, -1), "returned owners from -1 to -1; allowed: 0 to 1"),
    "beyond": (np.arange(12), "returned owners from 0 to 11"),
    "empty": (np.zeros(12, dtype=np.int64), "left client 1 of 2 without examples"),
}


@pytest.mark.parametrize(("owners", "said"), OWNERS.values(), ids=OWNERS)
def test_a_partition_of_the_users_own_is_checked(owners, said, monkeypatch):
    monkeypatch.setitem(globals(), "made", lambda *_: owners)
    assert re.match(
        rf"data\.partition\.name: test_border:made: {said}", refused(KINDS["data.partition"](f"{__name__}:made"))
    )


def own_data(*, clients: int, crop: int = 4):
    assert (clients, crop) == (2, 4)
    return Dataset(**good())


def test_a_dataset_may_have_options_that_all_datasets_have():
    fedsim.run(CONFIG, {"data": {"name": f"{__name__}:own_data", "clients": 2, "crop": 4}})


def scalar(logits, y):
    return torch.nn.functional.cross_entropy(logits, y)


def constant(logits, y):
    return torch.ones(len(y))


def smaller(batch, rng, size):
    return batch._replace(x=batch.x[:, :, 1:])


def doubles(batch, rng, size):
    return batch._replace(x=batch.x.double())


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("local.loss", "scalar", r"gave a tensor \(\); it should give \(3,\)"),
        ("local.loss", "constant", r"gave a tensor \(3,\); it should give \(3,\) for 3 examples, with a gradient"),
        ("local.augment", "smaller", r"gave examples of shape \(1, 3, 4\); they should be \(1, 4, 4\)"),
        ("local.augment", "doubles", r"gave batch\.x as torch\.float64"),
    ],
)
def test_losses_and_augmentations_give_the_right_shapes(kind, name, said):
    assert re.match(rf"{kind}: test_border:{name}: {said}", refused(KINDS[kind](f"{__name__}:{name}")))
