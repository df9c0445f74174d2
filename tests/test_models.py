import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from covering import sampled
from torch import nn

from fedsim.errors import ConfigError
from fedsim.models import MODELS

SMALLEST = {"2nn": (1,), "cnn": (1, 4, 4), "cifar_cnn": (1, 4, 4), "pfl_cnn": (1, 6, 6), "cnn_bn": (1, 4, 4)}


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


SIZES = {name: MODELS.load(name).reference.parameters for name in MODELS}
FAMILIES = {entry.partition(":")[0] for entry in MODELS.entries.values()}
LIGHTEST = {min((n for n, e in MODELS.entries.items() if e.startswith(f"{f}:")), key=SIZES.get) for f in FAMILIES}


HEAVY = {name for name, count in SIZES.items() if count > 15_000_000} - LIGHTEST  # than others of its family


def build(name: str, shape: tuple[int, ...], classes: int, device: str = "cpu", **settings: object) -> nn.Module:
    with torch.device(device):
        network: nn.Module = MODELS.bind({"name": name} | settings)(shape, classes)
    return network


@pytest.mark.parametrize("name", list(MODELS))
def test_networks_have_the_parameters_that_their_papers_say(name: str) -> None:
    shape, classes, count = MODELS.load(name).reference
    network = build(name, shape, classes, "meta")
    assert parameters(network) == count
    assert network(torch.empty(2, *shape, device="meta")).shape == (2, classes)


def test_the_references_are_the_papers() -> None:
    told = {
        "2nn": 199_210,  # McMahan 2017, section 3
        "cnn": 1_663_370,
        "resnet50": 25_557_032,
        "resnext101_32x4d": 44_177_704,
        "mobilenet_v1": 4_231_976,
        "mobilenet_v2": 3_504_872,
        "mobilenet_v3_small": 2_542_856,
        "mobilenet_v3_large": 5_483_032,
        "shufflenet_v2": 2_278_604,
        "alexnet": 61_100_840,
        "vgg16": 138_357_544,
        "densenet121": 7_978_856,
    }
    scaled = (5_288_548, 7_794_184, 9_109_994, 12_233_232, 19_341_616, 30_389_784, 43_040_704, 66_347_960)
    told |= {f"efficientnet_b{phi}": count for phi, count in enumerate(scaled)}
    assert {name: MODELS.load(name).reference.parameters for name in told} == told
    for name, millions in {"se_resnext101_32x4d": 48.96, "se_resnet50": 28.09}.items():
        assert MODELS.load(name).reference.parameters == pytest.approx(millions * 1e6, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 224, 224)], ids=str)
@pytest.mark.parametrize("name", list(MODELS))
def test_every_entry_takes_every_size_of_image(name: str, shape: tuple[int, ...], train: bool) -> None:
    network = build(name, shape, 10, "meta").train(train)
    assert network(torch.empty(2, *shape, device="meta")).shape == (2, 10)


@pytest.mark.parametrize("name", sampled({(name,) for name in MODELS if name not in HEAVY}, MODELS))
def test_every_entry_learns_from_small_images(name: str) -> None:
    shape = (1, 28, 28)
    network, x = build(name, shape, 3).train(), torch.randn(2, *shape)
    loss = nn.functional.cross_entropy(network(x), torch.tensor([0, 2]))
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients)
    with torch.no_grad():
        assert network.eval()(x).isfinite().all()


@pytest.mark.parametrize("name", list(SMALLEST))
@pytest.mark.parametrize("grown", [0, 1, 5])
@pytest.mark.parametrize("train", [False, True])
def test_small_networks_take_every_image_from_their_smallest_on(name: str, grown: int, train: bool) -> None:
    channels, *sides = SMALLEST[name]
    shape = (channels + grown, *(side + grown + i for i, side in enumerate(sides)))
    assert build(name, shape, 3).train(train)(torch.randn(2, *shape)).shape == (2, 3)


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"2nn"}))
@pytest.mark.parametrize("shape", [(), (784,), (28, 28), (1, 0, 28), (1, 28, 0), (1, 1, 28, 28)])
def test_a_wrong_shape_or_too_small_an_image_is_refused_in_one_line(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"^model: .* takes images \(channels, height, width\) .*$"):
        MODELS.bind({"name": name})(shape, 10)


def test_every_model_has_a_summary() -> None:
    for name in MODELS:
        assert 20 < len(MODELS.summary(name)) <= 80


def test_layers_are_addressed_by_name() -> None:
    names = [name for name, _ in MODELS.bind({"name": "cnn_bn"})((1, 8, 8), 2).named_parameters()]
    layers = ["conv1", "bn1", "conv2", "bn2", "fc"]
    assert names == [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]


def test_options_reach_the_network() -> None:
    dropouts = MODELS.bind({"name": "pfl_cnn", "dropout1": 0.0, "dropout2": 0.9})((1, 8, 8), 2)
    assert [layer.p for layer in dropouts if isinstance(layer, nn.Dropout)] == [0.0, 0.9]
    slim = MODELS.bind({"name": "cnn_bn", "widths": [2, 3]})((1, 8, 8), 2)
    assert (slim.bn1.num_features, slim.bn2.num_features) == (2, 3)


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "pfl_cnn", "dropout1": 1.0},
        {"name": "pfl_cnn", "dropout": 0.5},
        {"name": "cnn_bn", "widths": [16]},
        {"name": "cnn_bn", "widths": [16, 0]},
        {"name": "cnnn"},
    ],
)
def test_wrong_options_are_refused(spec: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"^model\."):
        MODELS.bind(spec)


def test_a_resolved_spec_resolves_to_itself() -> None:
    for name in MODELS:
        resolved = MODELS.resolve({"name": name})
        assert MODELS.resolve(resolved) == resolved


def test_a_users_own_factory_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_networks.py").write_text(
        "from math import prod\n"
        "from torch import nn\n"
        "def linear(shape: tuple[int, ...], classes: int, /, *, bias: bool = True) -> nn.Module:\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(prod(shape), classes, bias=bias))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    factory = MODELS.bind({"name": "users_networks:linear", "bias": False})
    assert parameters(factory((3, 2, 2), 5)) == 60


@pytest.mark.parametrize("name", list(MODELS))
def test_the_engine_gives_the_positional_arguments_and_configs_the_rest(name: str) -> None:
    factory: Callable[..., nn.Module] = MODELS.load(name)
    kinds = [p.kind for p in inspect.signature(factory).parameters.values()]
    assert kinds[:2] == [inspect.Parameter.POSITIONAL_ONLY] * 2
    assert set(kinds[2:]) <= {inspect.Parameter.KEYWORD_ONLY}
