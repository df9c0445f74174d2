import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fedsim.errors import ConfigError
from fedsim.models import MODELS

SMALLEST = {"2nn": (1,), "cnn": (1, 4, 4), "cifar_cnn": (1, 4, 4), "pfl_cnn": (1, 6, 6), "cnn_bn": (1, 4, 4)}
IMAGES = sorted(set(SMALLEST) - {"2nn"})


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("2nn", (1, 28, 28), 199_210),  # McMahan 2017, section 3
        ("cnn", (1, 28, 28), 1_663_370),  # McMahan 2017, section 3
        ("cifar_cnn", (3, 32, 32), 1_068_298),  # McMahan 2017: about 10^6
        ("pfl_cnn", (3, 32, 32), 1_626_442),
        ("cnn_bn", (1, 28, 28), 20_586),
    ],
)
def test_networks_have_the_parameters_their_papers_say(name: str, shape: tuple[int, ...], count: int) -> None:
    assert parameters(MODELS.bind({"name": name})(shape, 10)) == count


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("grown", [0, 1, 5])
@pytest.mark.parametrize("train", [False, True])
def test_every_entry_builds_from_its_smallest_shape_up(name: str, grown: int, train: bool) -> None:
    channels, *sides = SMALLEST[name]
    shape = (channels + grown, *(side + grown + i for i, side in enumerate(sides)))
    network = MODELS.bind({"name": name})(shape, 3).train(train)
    assert network(torch.randn(2, *shape)).shape == (2, 3)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("shape", [(), (784,), (28, 28), (1, 3, 28), (1, 28, 3), (1, 1, 28, 28)])
def test_what_is_no_image_or_too_small_is_refused_in_one_line(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=rf"^model: {name} takes images, \(channels, height, width\) .*$"):
        MODELS.bind({"name": name})(shape, 10)


def test_every_entry_tells_fedsim_list_what_it_is() -> None:
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
