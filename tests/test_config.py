"""Bad settings are one line that names the key, the value and what is allowed; good ones mean one thing."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.base.catalogue import Catalogue, allowed, options_of
from fedsim.errors import ConfigError
from fedsim.experiment.build import build
from fedsim.experiment.config import SCHEMAS, load, parse_overrides, read_yaml, resolve
from fedsim.experiment.execute import execute
from fedsim.experiment.run import Run
from fedsim.listing import KINDS

ROOT = Path(__file__).parent.parent
NAN, INF = float("nan"), float("inf")
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
TINY = {
    "rounds": 2,
    "data": {"name": "synthetic", "examples": 40, "test_examples": 20, "classes": 4, "clients": 4},
    "model": "2nn",
    "strategy": "fedavg",
    "cohort": {"name": "uniform", "fraction": 0.5},
    "local": {"lr": 0.1},
    "runtime": "serial",
}
NOISE = ("pydantic", "typing", "class ", "annotat", "None", "True", "Traceback", "validation", "valid ", "\n")


def refusal(overrides, base=TINY):
    with pytest.raises(ConfigError) as caught:
        build(load(base, overrides))
    message = str(caught.value)
    assert not [word for word in NOISE if word in message], message
    assert len(message) < 450, message
    return message


def uniform(**options):
    return {"cohort": {"name": "uniform", **options}}


def partition(**options):
    return {"data.partition": options}


# What a setting may be


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # of another kind
        ({"local.epochs": True}, "local.epochs: true should be a whole number >= 1"),
        ({"local.epochs": None}, "local.epochs: null should be a whole number >= 1"),
        ({"local.lr": "abc"}, 'local.lr: "abc" should be a number > 0'),
        ({"local.lr": [0.1]}, "local.lr: [0.1] should be a number > 0"),
        ({"local.lr": True}, "local.lr: true should be a number > 0"),
        ({"rounds": 1.5}, "rounds: 1.5 should be a whole number >= 1"),
        ({"rounds": "3"}, 'rounds: "3" should be a whole number >= 1'),
        ({"rounds": list(range(999))}, "rounds: [0, 1, 2,"),
        ({"seed": 0.5}, "seed: 0.5 should be a whole number >= 0"),
        ({"local.betas": [0.9] * 3}, "local.betas: [0.9, 0.9, 0.9] should be a list of 2, each a number"),
        ({"local.betas": [0.9, "x"]}, 'local.betas: [0.9, "x"] should be a list of 2'),
        ({"local.betas": 0.9}, "local.betas: 0.9 should be a list of 2"),
        ({"local.nesterov": 1}, "local.nesterov: 1 should be true or false"),
        ({"local.optimizer": "adm"}, 'local.optimizer: "adm" should be sgd, adam, adamw or lars'),
        ({"local.batch_size": "ful"}, 'local.batch_size: "ful" should be a whole number >= 1, or full'),
        ({"local.precision": "fp8"}, 'local.precision: "fp8" should be fp32, bf16 or fp16'),
        ({"data.shape": [1, 8]}, "data.shape: [1, 8] should be a list of 3, each a whole number >= 1"),
        ({"data": {"name": "npz", "clients": 2, "path": 3}}, "data.path: 3 should be a path"),
        ({"evaluate.clients": "maybe"}, 'evaluate.clients: "maybe" should be true or false'),
        ({"failures.policy": "ignore"}, 'failures.policy: "ignore" should be raise or drop'),
        ({"runtime": {"name": "threads", "workers": "many"}}, 'runtime.workers: "many" should be'),
        ({"local": None}, "local: null should be a mapping"),
        ({"local": [1]}, "local: [1] should be a mapping"),
        ({"evaluate": 3}, "evaluate: 3 should be a mapping"),
        ({"failures": "drop"}, 'failures: "drop" should be a mapping'),
        ({"data": 3}, "data: 3 should be a mapping"),
        ({"cohort": 3}, "cohort: 3 should be a mapping, or a string"),
        ({"strategy": ["fedavg"]}, 'strategy: ["fedavg"] should be a mapping, or a string'),
        ({"data.partition": 3}, "data.partition: 3 should be a mapping, or a string"),
        ({"local.schedule": 3}, "local.schedule: 3 should be a mapping such as {name: constant}"),
        # impossible
        ({"rounds": 0}, "rounds: 0 should be a whole number >= 1"),
        ({"seed": -1}, "seed: -1 should be a whole number >= 0"),
        (uniform(fraction=0), "cohort.fraction: 0 should be a number > 0 and <= 1"),
        (uniform(fraction=2), "cohort.fraction: 2 should be a number > 0 and <= 1"),
        (uniform(fraction=-1), "cohort.fraction: -1 should be a number > 0 and <= 1"),
        (uniform(size=0), "cohort.size: 0 should be a whole number >= 1"),
        (uniform(size=5), "cohort.size: 5 is more than the 4 clients that train"),
        (uniform(), "cohort: set either cohort.fraction or cohort.size"),
        (uniform(size=2, fraction=0.5), "cohort: set either cohort.fraction or cohort.size"),
        ({"cohort": {"name": "fixed", "clients": [0, 4]}}, "cohort.clients: [0, 4] must be different ids"),
        ({"data.clients": 0}, "data.clients: 0 should be a whole number >= 1"),
        ({"data.clients": 41}, "data.clients: 41 is too many for 40 examples; allowed: 1 to 40"),
        ({"data.holdout": 1}, "data.holdout: 1 should be a number >= 0 and < 1"),
        ({"local.batch_size": 0}, "local.batch_size: 0 should be a whole number >= 1, or full"),
        ({"local.steps": 0}, "local.steps: 0 should be a whole number >= 1, or null"),
        ({"local.lr": 0}, "local.lr: 0 should be a number > 0"),
        ({"local.lr": NAN}, "local.lr: NaN should be finite, a number > 0"),
        ({"local.lr": INF}, "local.lr: Infinity should be finite, a number > 0"),
        ({"local.momentum": 1}, "local.momentum: 1 should be a number >= 0 and < 1"),
        ({"local.momentum": -0.1}, "local.momentum: -0.1 should be a number >= 0 and < 1"),
        ({"local.schedule": {"name": "exponential", "factor": INF}}, "local.schedule.factor: Infinity should be"),
        ({"strategy": {"name": "fedprox", "mu": -1}}, "strategy.mu: -1 should be a number >= 0"),
        ({"strategy": {"name": "fedprox", "mu": NAN}}, "strategy.mu: NaN should be finite, a number >= 0"),
        ({"evaluate.every": 0}, "evaluate.every: 0 should be a whole number >= 1"),
        (partition(name="shards", per_client=20), "data.partition.per_client: 20 shards for each of 4 clients"),
        (partition(name="labels", per_client=5), "data.partition.per_client: 5 of 4 labels for each of 4 clients"),
        (partition(name="dirichlet", alpha=0), "data.partition.alpha: 0 should be a number > 0"),
        (partition(name="natural"), "data.partition.name: natural needs a data set that gives the owner of"),
        ({"model": "cnn", "data.shape": [1, 3, 3]}, "model: cnn takes images"),
        # beyond what a machine has
        ({"runtime": {"name": "threads", "workers": 10**9}}, "runtime.workers: 1000000000; allowed: up to 4096"),
        ({"runtime": {"name": "vectorized", "workers": 10**9}}, "runtime.workers: 1000000000; allowed: up to"),
        ({"rounds": 10**30}, "rounds: 1000000000000000000000000000000 should be smaller than 2^63"),
        ({"availability.step_seconds": 1e308}, "availability.step_seconds: 1e+308 is more than 1e+12"),
        # missing
        ({"cohort": {"fraction": 0.1}}, "cohort.name: missing; allowed: uniform,"),
        ({"data": {"clients": 3}}, "data.name: missing; allowed: digits,"),
        ({"data": {"name": "synthetic"}}, "data.clients: missing; it should be a whole number >= 1"),
        (partition(name="dirichlet"), "data.partition.alpha: missing; it should be a number > 0"),
        ({"local.schedule": "step"}, "local.schedule.every: missing; it should be a whole number >= 1"),
        ({"strategy": "fedsim.federated.strategy:Wrapper"}, "strategy.inner: missing; it should be a mapping"),
        # in contradiction
        ({"local.nesterov": True}, "local.nesterov: needs sgd with local.momentum above 0"),
        ({"local.momentum": 0.9, "local.optimizer": "adam"}, "local.momentum: belongs to sgd; adam has"),
        ({"local.epochs": 2, "local.steps": 2}, "local.epochs: 2 and local.steps 2: set only one of the two"),
        ({"strategy": "scaffold", "local.momentum": 0.9}, "local.momentum: scaffold"),
        ({"strategy": "scaffold", "local.optimizer": "adam"}, "local.optimizer: scaffold"),
        ({"strategy": "fedbn"}, "strategy.private: the network trains no parameter of a norm"),
        # not here
        ({"runtime.device": "cuda:99"}, "runtime.device: 'cuda:99' is not on this machine; allowed: auto, cpu"),
        ({"data": {"name": "npz", "clients": 2, "path": "no/such"}}, "data.path: no/such: no such file or folder"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_value_is_refused_in_words(overrides, message):
    assert refusal(overrides).startswith(message)


def test_a_key_that_must_be_there_is_missed():
    for key in ("rounds", "data", "model", "strategy", "cohort"):
        without = {k: v for k, v in TINY.items() if k != key}
        assert refusal({}, without).startswith(f"{key}: missing; it should be a ")
    assert refusal({}, {k: v for k, v in TINY.items() if k not in ("data", "cohort")}) == (
        "data: missing; it should be a mapping, such as {name: digits, clients: 10}; "
        "cohort: missing; it should be a mapping, or a string, such as {name: uniform, fraction: 0.1}"
    )


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lr", "'local.lr'"),
        ("alpha", "'data.partition.alpha'"),
        ("data.alpha", "'data.partition.alpha'"),
        ("momentm", "'local.momentum'"),
        ("data.batch_size", "'local.batch_size'"),
        ("strategy.rho", "'strategy.rho of fedsam'"),
        ("local.temperature", "'local.distillation.temperature'"),
    ],
)
def test_a_key_at_another_level_is_told(key, meant):
    base = TINY | {"data": TINY["data"] | {"partition": {"name": "dirichlet", "alpha": 1.0}}}
    assert f"is unknown; did you mean {meant}? allowed: " in refusal({key: 1}, base)


def test_an_unknown_key_names_all_that_are_known():
    for parent, target in SCHEMAS.items():
        if parent and not parent.startswith(("data.", "local.")):
            message = refusal({f"{parent}.no_such_key": 1})
            assert not [key for key in options_of(target).model_fields if key not in message]
    assert all(key in refusal({"local.schedul": 1}) for key in ("schedule", "loss", "augment"))


def test_another_data_set_keeps_what_all_data_sets_have():
    config = load(TINY, {"data": "digits", "data.holdout": 0.5})
    assert (config.data["name"], config.data["clients"], config.data["holdout"]) == ("digits", 4, 0.5)


def test_missing_files_come_with_the_way_to_get_them():
    with pytest.raises(
        ConfigError, match=r"\Adata.root: files of no/such/MNIST/raw .* set data.download=true.*\Z"
    ):
        build(load(TINY, {"data": {"name": "mnist", "clients": 2, "root": "no/such"}}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    assert refusal({"runtime.device": "cuda"}).endswith("'cuda' is not on this machine; allowed: auto, cpu")


# What a name may be


@pytest.mark.parametrize(
    ("overrides", "key", "meant"),
    [
        ({"round": 2}, "round", "rounds"),
        ({"local.momentun": 0.9}, "local.momentun", "momentum"),
        ({"data.classess": 4}, "data.classess", "classes"),
        ({"data.client": 4}, "data.client", "clients"),
        ({"evaluate.evry": 1}, "evaluate.evry", "every"),
        ({"failures.min_client": 1}, "failures.min_client", "min_clients"),
        ({"cohort.fracton": 1}, "cohort.fracton", "fraction"),
        ({"runtime.divice": 1}, "runtime.divice", "device"),
        (partition(name="dirichlet", alpa=1), "data.partition.alpa", "alpha"),
        ({"strategy": {"name": "fedprox", "m": 1}}, "strategy.m", "mu"),
        ({"local.schedule": {"name": "step", "evry": 1}}, "local.schedule.evry", "every"),
        ({"data.name": "synthetc"}, "data.name", "synthetic"),
        (partition(name="dirichlt"), "data.partition.name", "dirichlet"),
        ({"model": "cifr_cnn"}, "model.name", "cifar_cnn"),
        ({"strategy": "fedagv"}, "strategy.name", "fedavg"),
        (
            {"strategy": {"name": "fedsim.federated.strategy:Wrapper", "inner": "fedpox"}},
            "strategy.inner.name",
            "fedprox",
        ),
        ({"cohort": "unifrom"}, "cohort.name", "uniform"),
        ({"runtime": "thread"}, "runtime.name", "threads"),
        ({"local.schedule": "cosin"}, "local.schedule.name", "cosine"),
    ],
    ids=str,
)
def test_a_name_that_is_nearly_right_is_told(overrides, key, meant):
    message = refusal(overrides)
    assert message.startswith(f"{key}: ")
    assert f"is unknown; did you mean {meant!r}? allowed: " in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model": "zzz"}, "model.name: 'zzz' is unknown; allowed: 2nn, "),
        ({"model": {"name": "2nn", "width": 3}}, "model.width: 'width' is unknown; allowed: norm, groups, "),
        ({"model": ""}, "model.name: '' is unknown"),
        ({"model": ":Net"}, "model.name: ':Net' is unknown"),
        ({"model": ".net:Net"}, "model.name: '.net:Net' is unknown"),
        ({"model": "json:"}, "model.name: 'json:' is unknown"),
        ({"model": "no_such_module:Net"}, "model.name: there is no module 'no_such_module'; is its folder on"),
        ({"model": "json.no_such:Net"}, "model.name: there is no module 'json.no_such'"),
        ({"model": "json:Net"}, "model.name: json has no callable 'Net'"),
        ({"model": "json:__name__"}, "model.name: json has no callable '__name__'"),
        ({"model": "json:loads"}, "model.name: json:loads does not take the arguments with which"),
        ({"model": "fedsim.models:image_shape"}, "model.name: fedsim.models:image_shape does not take the"),
        (
            {"strategy": "fedsim:Recipe"},
            "strategy.name: fedsim:Recipe returned an object of type Recipe; it should return a Strategy",
        ),
        ({"data": {"name": "fedsim:Recipe", "clients": 2}}, "data.name: fedsim:Recipe returned an object of"),
    ],
    ids=str,
)
def test_a_name_of_your_own_that_leads_nowhere(overrides, message):
    assert refusal(overrides).startswith(message)


# What an annotation takes


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_says_what_it_takes(kind):
    for entry in KINDS[kind]:
        for name, field in options_of(KINDS[kind].load(entry)).model_fields.items():
            words = allowed(field)
            assert words
            assert not [word for word in (*NOISE, "[", "Union") if word in words], (entry, name, words)


def test_a_validator_of_your_own_speaks_for_itself(tmp_path, monkeypatch):
    (tmp_path / "mine_checked.py").write_text(
        "from typing import Annotated\n"
        "from pydantic import AfterValidator\n"
        "def even(n: int) -> int:\n"
        "    if n % 2: raise ValueError(f'{n} should be even')\n"
        "    return n\n"
        "def net(shape, classes, /, *, width: Annotated[int, AfterValidator(even)]): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert refusal({"model": {"name": "mine_checked:net", "width": 3}}) == "model.width: 3 should be even"


# YAML


@given(FLOATS, st.sampled_from(["{!r}", "{:e}", "{:.0E}", "{:+.3e}"]))
def test_a_number_in_any_notation_is_a_number(number, notation):
    text = notation.format(number)
    assert parse_overrides([f"x={text}"]) == {"x": float(text)}


@pytest.mark.parametrize(("text", "number"), [("1e-3", 1e-3), ("1E5", 1e5), (".5e3", 500.0), ("-2.e+2", -200.0)])
def test_an_exponent_needs_no_point(text, number):
    assert parse_overrides([f"x={text}"]) == {"x": number}


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | FLOATS
    | st.text(st.characters(codec="ascii", exclude_characters="\0"))
)


@given(st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text("abc"), inner), max_leaves=5))
def test_an_override_is_yaml_and_so_is_json(value):
    assert parse_overrides([f"a.b={json.dumps(value)}"]) == {"a.b": value}


def test_an_override_may_hold_an_equals_sign_and_nothing():
    assert parse_overrides(["a=b=c", "d="]) == {"a": "b=c", "d": None}


@pytest.mark.parametrize("pair", ["rounds", "=3", "", ".=1", "local.=1", ".lr=1", "local..lr=1"])
def test_an_override_without_a_key_is_refused(pair):
    with pytest.raises(ConfigError, match="should be KEY=VALUE, such as"):
        parse_overrides([pair])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "should hold a mapping of settings"),
        (b"# nothing\n", "should hold a mapping of settings"),
        (b"- rounds\n- 3\n", "should hold a mapping of settings"),
        (b"rounds\n", "should hold a mapping of settings"),
        (b"\xff\xfe\x00\x01", "is not text in UTF-8"),
        (b"\x89PNG\r\n\x1a\n", "is not text in UTF-8"),
        (b"a\x00b: 1", "is not YAML: unacceptable character"),
        (b'name: "a\\0b"', "is not YAML: a value contains a zero byte"),
        (b"rounds: 3\nseed: 0\nrounds: 4\n", "line 3: is not YAML: key 'rounds' appears twice"),
        (b"local: {lr: 1, lr: 1}\n", "is not YAML: key 'lr' appears twice"),
        (b"rounds: 3\nlocal: {lr: 0.1\n", "line 3: is not YAML: expected ',' or '}'"),
        (b"rounds: 3\n\tseed: 1\n", "line 2: is not YAML: found character '\\t'"),
        (b"rounds: !!int many\n", "is not YAML: invalid literal"),
        (b"rounds: 2020-13-45\n", "is not YAML: month must be in 1..12"),
        (b"[1]: 2\n", "is not YAML: found unhashable key"),
        (b"rounds: " + b"[" * 5000, "is not YAML: "),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_file_that_is_no_config(tmp_path, content, message):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_and_a_folder(tmp_path):
    for path, why in ((tmp_path / "no.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError) as caught:
            load(path)
        assert str(caught.value) == f"{path}: cannot be read: {why}"


@pytest.mark.parametrize(
    "content", ["2020-01-01: 3", "hooks: [{2020-01-01: 3}]", "rounds: &a [*a]", "rounds: &a {b: *a}"]
)
def test_yaml_that_json_cannot_hold_is_refused_all_the_same(tmp_path, content):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"\A[^\n]+\Z"):
        load(tmp_path / "c.yaml")


@settings(max_examples=100)
@given(st.text(st.sampled_from("ab:1 -{}[]\n&*!?|>'\"#%@,<.\t=~")))
def test_any_text_is_a_mapping_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text)
    try:
        found, message = read_yaml(path), ""
    except ConfigError as error:
        found, message = {}, str(error)
    assert isinstance(found, dict)
    assert "\n" not in message


def test_an_anchor_may_be_merged(tmp_path):
    (tmp_path / "c.yaml").write_text("a: &a {x: 1, y: 1}\nb: {<<: *a, y: 2}\n")
    assert read_yaml(tmp_path / "c.yaml")["b"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    "tag",
    ["apply:pathlib.Path.touch", "object/apply:os.mkdir", "object/new:os.mkdir", "name:os.mkdir", "module:os"],
)
def test_a_tag_runs_nothing(tmp_path, monkeypatch, tag):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="could not determine a constructor for the tag"):
        parse_overrides([f"x=!!python/{tag} [made]"])
    assert not Path("made").exists()


# Overrides


def test_an_override_reaches_into_a_bare_name():
    config = load(TINY | {"strategy": "fedprox"}, {"strategy.mu": 0.5})
    expected = {"name": "fedprox", "mu": 0.5, "server_lr": 1.0, "average": "cohort", "weights": "examples"}
    assert config.strategy == expected | {"buffers": "average"}


def test_an_override_reaches_where_nothing_was():
    assert load(TINY, {"evaluate.every": 7, "local.schedule.name": "cosine"}).evaluate.every == 7


@pytest.mark.parametrize("key", ["rounds.x", "data.clients.x", "local.lr.x.y"])
def test_an_override_below_a_number_is_refused(key):
    head = key.split(".x")[0].split(".")[-1]
    assert refusal({key: 1}).startswith(f"{key}: {head} is ")


def test_numbers_of_numpy_are_numbers():
    config = load(TINY, {"data.clients": np.int64(3), "local.lr": np.float32(0.5), "local.nesterov": np.bool_(0)})
    assert (config.data["clients"], config.local["lr"]) == (3, 0.5)


def test_a_mapping_is_not_changed_by_its_overrides():
    before = json.dumps(TINY)
    load(TINY, {"local.lr": 5.0, "data.partition": "iid", "cohort.fraction": 1})
    assert json.dumps(TINY) == before


def test_a_schedule_lasts_as_long_as_the_run():
    assert load(TINY, {"local.schedule": "cosine"}).local["schedule"] == {"name": "cosine", "rounds": 2}
    timed = load(TINY, {"local.schedule": {"name": "cosine", "rounds": 9}, "local.warmup": 1})
    assert timed.local["schedule"] == {"name": "cosine", "rounds": 9}


# Resolved once is resolved

OPTIONS = {
    "strategy": [
        "fedavg",
        {"name": "fedadam", "tau": 0.01, "buffers": "frozen"},
        "scaffold",
        {"name": "personal", "layers": ["fc*"], "inner": "fedprox"},
    ],
    "model": [
        "cnn",
        {"name": "cnn_bn", "widths": [2, 3]},
        {"name": "resnet18", "norm": "group", "freeze": ["fc*"]},
    ],
    "cohort": ["all", {"name": "fixed", "clients": [3, 1]}, {"name": "uniform", "size": 3}],
    "data.partition": ["iid", {"name": "dirichlet", "alpha": 0.3}, {"name": "shards"}],
    "data": [{"name": "mnist", "clients": 7, "root": "elsewhere"}, {"name": "npz", "clients": 1, "path": "x.npz"}],
    "local.schedule": ["cosine", {"name": "step", "every": 3}],
    "local.betas": [[0.5, 0.6]],
    "local.batch_size": ["full", 3],
    "local.warmup": [1],
    "local.augment": [["flip", {"name": "random_crop", "padding": 2}], [{"name": "cutout", "holes": 2}]],
    "local.loss": ["hinge", {"name": "cross_entropy", "smoothing": 0.1, "spread": "others"}],
    "local.distillation": [{}, {"temperature": 2.0, "model": {"name": "cnn_bn", "norm": "group"}}],
    "local.noisy_labels": [None, {"start": 2}],
    "local.class_weights": ["balanced", [1.0, 2.0]],
    "local.optimizer": ["lars", "sgd"],
    "data.label_noise": [{"rate": 0.2, "kind": "pair"}],
    "data.public": [0.1],
    "recalibrate": [{"source": "public"}],
    "ema": [0.9],
}


@given(st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in OPTIONS.items()}))
def test_a_resolved_config_resolves_to_itself(overrides):
    config = load(TINY, overrides)
    dumped = config.model_dump(mode="json")
    assert resolve(dumped) == config
    assert resolve(yaml.safe_load(yaml.safe_dump(dumped))) == config


# Configs that come along

SHAPES = {  # of the datasets that are not made up, for stand-ins that need no files
    "mnist": ([1, 28, 28], 10),
    "fashion_mnist": ([1, 28, 28], 10),
    "emnist": ([1, 28, 28], 62),
    "cifar10": ([3, 32, 32], 10),
    "cifar100": ([3, 32, 32], 100),
    "svhn": ([3, 32, 32], 10),
    "digits": ([1, 8, 8], 10),
    "npz": ([3, 16, 16], 10),
}
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def tiny(config):
    """Overrides under which a shipped config takes a moment: 4 clients, 30 made-up examples each, one epoch."""
    data, part = config.data, config.data["partition"]
    size = min(data.get("size", 32), 32)  # of an image folder
    shape, classes = SHAPES.get(data["name"], ([3, size, size], 10))
    overrides = {"rounds": 1, "cohort": {"name": "uniform", "size": 2}, "local.epochs": 1, "local.steps": None}
    if config.local["steps"] and config.local["batch_size"] != "full":
        overrides |= {"local.batch_size": min(config.local["batch_size"], 10)}
    if config.cohort["name"] == "all":  # as some strategies need
        overrides |= {"cohort": "all"}
    if "size" in config.strategy:
        overrides |= {"strategy.size": 1}
    if "attackers" in config.strategy:
        overrides |= {"strategy.attackers": 0, "strategy.choose": 1, "cohort": "all"}
    if data["name"].startswith("synthetic_"):  # small already, and with clients of its own
        return overrides | {"data.devices": 4, "data.clients": 4}
    stand_in = {"name": "synthetic", "examples": 120, "test_examples": 20, "shape": shape, "classes": classes}
    if part["name"] == "labels":
        part = part | {"per_client": classes}
    shared = {"clients": 4, "partition": "iid" if part["name"] == "natural" else part}
    shared |= {"holdout": data["holdout"], "public": data["public"] and 0.1}
    return overrides | {"data": stand_in | shared}


def test_there_are_configs():
    assert CONFIGS


NAMES = [path.relative_to(ROOT / "configs").as_posix() for path in CONFIGS]
HEAVY = {"imagenet_resnet50.yaml", "cifar10_resnet18.yaml"}  # minutes, of images and networks that stay large


@pytest.mark.parametrize("name", NAMES)
def test_every_config_loads(name):
    config = load(ROOT / "configs" / name)
    assert resolve(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in HEAVY else []) for n in NAMES])
def test_every_config_runs_when_made_tiny(name):
    path = ROOT / "configs" / name
    config = load(path)
    small = load(path, tiny(config) | {"runtime": "serial"})
    result = execute(Run(small, build(small)))
    assert len(result.rounds) == 1
    assert 0 <= result.summary["test_accuracy"] <= 1


def test_catalogues_name_what_is_there():
    for kind, catalogue in KINDS.items():
        assert isinstance(catalogue, Catalogue)
        for name in catalogue:
            assert callable(catalogue.load(name)), (kind, name)


def test_an_interrupt_while_a_schema_is_built_stays_an_interrupt():
    """Whenever a clock finds pydantic at work: its core would make a SchemaError of it."""

    def tick(number, frame):
        if "/pydantic/" in frame.f_code.co_filename:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGALRM, tick)
    try:
        interrupted = 0
        for turn in range(60):
            options_of.cache_clear()
            signal.setitimer(signal.ITIMER_REAL, 5e-4 * (turn + 1), 1e-4)
            try:
                resolve(TINY)
            except KeyboardInterrupt:
                interrupted += 1
            else:
                break  # pydantic has done its work before the clock finds it
        assert interrupted
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert resolve(TINY) == load(TINY)
