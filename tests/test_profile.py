"""What networks cost is what one can count by hand, and their speed is reported as it was measured."""

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from rich.cells import cell_len
from rich.console import Console
from torch import distributed, nn

import fedsim
from fedsim.cli import measurement
from fedsim.errors import ConfigError
from fedsim.export.cost import activation_bytes, cost, flops, short
from fedsim.export.timing import DTYPES, latency, measure, numbers, profiles
from fedsim.models import MODELS

PNG = b"\x89PNG\r\n\x1a\n"
CPU = torch.device("cpu")
TINY = ["cnn_bn", "widths=[2,3]", "--shape", "1,8,8", "--classes", "3", "--repeats", "3"]


@pytest.fixture
def fedsim_(tmp_path, monkeypatch, fedsim_):
    """Calls the command in a folder of its own; what it says fits 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measurement, "console", Console(soft_wrap=True, width=80))

    def call(*arguments):
        done = fedsim_(*arguments)
        assert max(map(cell_len, done.out.splitlines()), default=0) <= 80, done.out
        return done

    return call


def by_hand():
    """A convolution of stride 2, one in groups, one by channel, and a classifier, for 3 x 8 x 8."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),  # 4 x 4 outputs of 8 channels, each of 3 x 3 x 3
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, groups=2),  # each of 4 channels of 8
        nn.Conv2d(12, 12, 3, padding=1, groups=12),  # each of 1
        nn.Flatten(),
        nn.Linear(12 * 16, 5),
    )


MULTIPLY_ADDS = 16 * (8 * 27 + 12 * 4 * 9 + 12 * 9) + 12 * 16 * 5


# What a network costs


def test_flops_are_the_multiply_adds_that_one_counts_by_hand():
    assert flops(by_hand(), (3, 8, 8)) == MULTIPLY_ADDS


def test_parameters_and_flops_are_those_of_the_network_wherever_it_is():
    with torch.device("meta"):
        abstract = by_hand()
    parameters = 8 * 27 + 8 + 12 * 4 * 9 + 12 + 12 * 9 + 12 + 12 * 16 * 5 + 5
    assert cost(abstract, (3, 8, 8)) == cost(by_hand(), (3, 8, 8))
    assert cost(abstract, (3, 8, 8))[:2] == (parameters, MULTIPLY_ADDS)


@pytest.mark.parametrize(
    ("name", "published"),  # of torchvision's weights, `_ops`: 10^9 multiply-adds
    [("resnet50", 4.089), ("mobilenet_v2", 0.301), ("efficientnet_b0", 0.386)],
)
@pytest.mark.parametrize("source", ["torchvision", "the catalogue"])
def test_flops_are_the_published_ones(name, published, source):
    weights = torchvision.models.get_model_weights(name).DEFAULT
    assert weights.meta["_ops"] == published
    with torch.device("meta"):
        ours = source == "the catalogue"
        network = MODELS.bind(name)((3, 224, 224), 1000) if ours else torchvision.models.get_model(name)
    assert flops(network, (3, 224, 224)) / 1e9 == pytest.approx(published, rel=0.01)


def test_activations_are_the_bytes_that_one_counts_by_hand():
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.Sigmoid())
    assert activation_bytes(network, (4,)) == 4 * (
        4 + 3 + 2
    )  # x, what ReLU gives (kept twice), what sigmoid gives
    assert activation_bytes(network[:1], (4,)) == 4 * 4
    assert activation_bytes(nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True)), (4,)) == 4 * (4 + 3)


def test_what_is_frozen_keeps_nothing():
    network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    network[0].requires_grad_(False)
    assert activation_bytes(network, (4,)) == 4 * 3


def test_nothing_is_changed_or_drawn():
    network = nn.Sequential(by_hand()[0], nn.BatchNorm2d(8), nn.Dropout(0.5))
    before, state = {n: v.clone() for n, v in network.state_dict().items()}, torch.get_rng_state()
    cost(network.eval(), (3, 8, 8), torch.bfloat16)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not network.training


def test_training_in_half_precision_keeps_half():
    network = MODELS.bind("resnet18")((3, 32, 32), 10)
    full = activation_bytes(network, (3, 32, 32))
    half = activation_bytes(network, (3, 32, 32), torch.bfloat16)
    assert half / full == pytest.approx(0.5, abs=0.01)


def test_a_shape_that_does_not_fit_is_one_line():
    with pytest.raises(ConfigError, match=r"^model: cannot take examples of shape \(1, 8, 8\): [^\n]+$"):
        cost(by_hand(), (1, 8, 8))


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0.000"), (7, "7.00"), (999, "999"), (1000, "1.00 k"), (25_557_032, "25.6 M"), (4_089_184_256, "4.09 G")],
)
def test_large_numbers_are_short(number, words):
    assert short(number) == words


# How fast it is


def test_percentiles_are_those_of_the_passes():
    seconds = [n / 1000 for n in range(1, 102)]  # 1 to 101 ms
    found = latency(seconds[::-1], 32)
    assert found[:5] == pytest.approx((0.051, 0.051, 0.091, 0.096, 0.1))
    assert found.throughput == pytest.approx(32 / 0.051)
    assert latency([0.5], 3) == (0.5, 0.5, 0.5, 0.5, 0.5, 6.0)


def test_throughput_is_of_all_processes(monkeypatch):
    alone = latency([0.5, 1.5], 8)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 4)
    assert latency([0.5, 1.5], 8) == alone._replace(throughput=4 * alone.throughput)


class Spy(nn.Module):
    """Notes which network was given how many examples, of which type and layout."""

    def __init__(self, name, log):
        super().__init__()
        self.name, self.log, self.conv = name, log, nn.Conv2d(3, 2, 3)

    def forward(self, x):
        last = x.is_contiguous(memory_format=torch.channels_last)
        self.log.append((self.name, len(x), x.dtype, self.conv.weight.dtype, last, self.training))
        return self.conv(x)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_networks_and_batches_take_turns(precision, channels_last):
    log = []
    found = [SimpleNamespace(label=n, network=Spy(n, log), shape=(3, 8, 8), seconds={}) for n in "ab"]
    for subject in found:
        subject.network.__deepcopy__ = lambda memo: Spy("a copy", [])
    options = {"precision": precision, "channels_last": channels_last, "repeats": 3}
    measure(found, (2, 4), Console(file=io.StringIO()), device=CPU, **options)
    dtype = DTYPES[precision]
    turn = [(name, batch, dtype, dtype, channels_last, False) for name in "ab" for batch in (2, 4)]
    assert log == turn * 5  # two of them to warm up
    assert all(len(s) == 3 and min(s) > 0 for subject in found for s in subject.seconds.values())


def test_models_by_name_and_pattern_with_the_options_behind_them():
    found = profiles(["cnn_bn", "widths=[2,3]", "cnn*", "2nn"], [], (1, 8, 8), 3)
    assert [subject.label for subject in found] == ["cnn_bn widths=[2,3]", "cnn", "cnn_bn", "2nn"]
    assert found[0].network.conv2.out_channels == 3
    assert {subject.shape for subject in found} == {(1, 8, 8)}


def test_a_model_s_size_is_that_of_its_paper():
    (found,) = profiles(["cifar_cnn"], [])
    assert (found.shape, found.network.fc3.out_features) == ((3, 32, 32), 10)


def test_numbers():
    assert numbers("3,32,32", "--shape") == (3, 32, 32)
    for text in ("", "3,", "3,x", "0", "-1", "1.5"):
        with pytest.raises(ConfigError, match=r"^--shape: .* should be whole numbers >= 1"):
            numbers(text, "--shape")


# The command


def test_two_tables_a_picture_and_json(fedsim_):
    done = fedsim_("profile", *TINY, "2nn", "--batch", "1,4", "--out", "p.png")
    assert (done.status, done.err) == (0, "")
    assert Path("p.png").read_bytes().startswith(PNG)
    found = json.loads(fedsim_("profile", *TINY, "2nn", "--batch", "1,4", "--json").out)
    assert [model["model"] for model in found["models"]] == ["cnn_bn widths=[2,3]", "2nn"]
    for model in found["models"]:
        for measured in model["batches"]:
            seconds = measured["seconds"]
            assert measured["mean"] == pytest.approx(np.mean(seconds))
            assert measured["p90"] == pytest.approx(np.percentile(seconds, 90))
            assert measured["throughput"] == pytest.approx(measured["batch"] / np.mean(seconds))
    assert re.search(rf"2nn +1x8x8 +{re.escape(short(found['models'][1]['parameters']))} ", done.out)
    assert len(re.findall(r"^  2nn +[14] ", done.out, re.MULTILINE)) == 2
    assert re.search(r"milliseconds a batch; \d+ threads on \d+ CPU cores, fp32", done.out)


@pytest.mark.parametrize("options", [["--fused"], ["--channels-last"], ["--precision", "bf16"]], ids=" ".join)
def test_every_way_to_compute(fedsim_, options):
    assert fedsim_("profile", *TINY, "--batch", "2", *options).status == 0
    assert Path("profile.png").exists()


def test_a_run_has_an_accuracy(fedsim_):
    data = {"name": "synthetic", "examples": 40, "test_examples": 20, "classes": 4, "clients": 4}
    config = {
        "rounds": 1,
        "data": data,
        "model": "2nn",
        "strategy": "fedavg",
        "cohort": "all",
        "local": {"lr": 0.1},
    }
    run = fedsim.run(config | {"runtime": "serial", "hooks": []}, out="run")
    done = fedsim_("profile", "--runs", "run", "--batch", "2", "--repeats", "1", "--json")
    (found,) = json.loads(done.out)["models"]
    assert found["accuracy"] == run.summary["test_accuracy"]
    done = fedsim_("profile", "--runs", "run", "--batch", "2", "--repeats", "1")
    assert re.search(rf"run +\S+ .* {run.summary['test_accuracy']:.2%}", done.out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet81"], "profile: 'resnet81' is unknown; did you mean 'resnet18'?"),
        (["zzz*"], "profile: none of the models matches 'zzz*'; there are 2nn,"),
        ([], "profile: nothing to measure; give a MODEL such as resnet18, or a run with --runs"),
        (["a=1", "2nn"], "profile: 'a=1' should stand behind the MODEL whose option it is"),
        (["cnn_bn", "width=2"], "model.width: 'width' is unknown; did you mean 'widths'?"),
        (["2nn", "--shape", "3x4"], "--shape: '3x4' should be whole numbers >= 1"),
        (["2nn", "--batch", "0"], "--batch: '0' should be whole numbers >= 1"),
        (["cnn", "--shape", "3,4"], "model: cnn takes images"),
        (["2nn", "--device", "cud"], "--device: 'cud' is not on this machine; allowed: auto, cpu"),
        (["2nn", "--out", "no/a.png"], "--out: no/a.png cannot be written; is there such a folder?"),
        (["2nn", "--out", "."], "--out: . cannot be written"),
        (
            ["cnn", "--shape", "3,200000,200000"],
            "model: cannot be made for 10 classes and examples of shape (3, 2000",
        ),
        (["2nn", "--shape", "2", "--classes", "1" + "0" * 30], "neither may have more than 268,435,456"),
        (["2nn", "--batch", "9999999999"], "--batch: '9999999999' should be whole numbers >= 1, of at most nine"),
        (["--runs", "no"], "config.yaml: No such file or directory; is its folder that of a run?"),
        (
            ["fedsim.models.options:FrozenBatchNorm"],
            "FrozenBatchNorm has no size of its own; give --shape",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line(fedsim_, tmp_path, arguments, message):
    done = fedsim_("profile", *arguments)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_a_device_cannot_run_is_one_line():
    class Refuses(nn.Linear):
        def forward(self, x):
            if x.dtype == torch.float16:
                raise RuntimeError("no such kernel\nanywhere")
            return super().forward(x)

    found = [SimpleNamespace(label="it", network=Refuses(2, 2), shape=(2,), seconds={})]
    with pytest.raises(ConfigError, match=r"^profile: it cannot run on cpu: no such kernel anywhere$"):
        measure(found, (1,), Console(file=io.StringIO()), device=CPU, precision="fp16", repeats=1)


def test_a_batch_that_does_not_fit_is_one_line():
    found = profiles(["2nn"], [], (1, 8, 8), 3)
    with pytest.raises(ConfigError, match=r"^profile: 2nn cannot run on cpu: [^\n]+$"):
        measure(found, (10**12,), Console(file=io.StringIO()), device=CPU, repeats=1)


# The list


def test_models_are_listed_with_what_they_cost(fedsim_):
    done = fedsim_("list", "models", "resnext50*")
    assert re.search(r"resnext50_32x4d +3x224x224 +1000 +25,028,904 +4\.23 G", done.out)
    assert "FLOPs" not in fedsim_("list", "datasets", "mnist").out
