"""The options that all networks share."""

import copy
import math
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import make_simulation
from safetensors.torch import save_file
from torch import nn
from torchvision import models
from torchvision.ops import StochasticDepth

from fedsim import Task
from fedsim.errors import ConfigError
from fedsim.models import options
from fedsim.training.draws import KeyedDraws

SHAPE, CLASSES = (3, 32, 32), 10
X = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))


def make(name="resnet18", shape=SHAPE, classes=CLASSES, **settings):
    torch.manual_seed(0)
    return options.make({"name": name} | settings, shape, classes)


def kinds(network, kind):
    return [module for module in network.modules() if isinstance(module, kind)]


# Norms


@pytest.mark.parametrize(
    ("norm", "kind"), [("group", nn.GroupNorm), ("layer", nn.GroupNorm), ("none", nn.Identity)]
)
@pytest.mark.parametrize("name", ["cnn_bn", "resnet18", "mobilenet_v2", "efficientnet_b0"])
def test_norm_takes_the_place_of_every_batch_norm(name, norm, kind):
    with torch.device("meta"):
        network, batch_norms = make(name, norm=norm), len(kinds(make(name), nn.BatchNorm2d))
    assert not kinds(network, nn.BatchNorm2d)
    assert not list(network.buffers())
    assert len(kinds(network, kind)) >= batch_norms
    if norm == "layer":
        assert {m.num_groups for m in kinds(network, nn.GroupNorm)} == {1}


@pytest.mark.parametrize("norm", ["group", "layer", "none"])
def test_without_batch_norm_a_task_has_no_buffers(norm):
    assert not len(Task(make("cnn_bn", norm=norm), SHAPE, CLASSES).initial_buffers)


def test_groups_are_at_most_32_and_hold_two_channels_or_more():
    for norm in kinds(make("efficientnet_b0", norm="group"), nn.GroupNorm):
        assert norm.num_channels % norm.num_groups == 0
        assert norm.num_groups == 1 or norm.num_channels // norm.num_groups >= 2
    assert {n.num_groups for n in kinds(make("resnet18", norm="group"), nn.GroupNorm)} == {32}  # Wu & He 2018


def test_a_group_norm_of_one_group_is_layer_norm_over_channels_and_pixels():
    network = make("cnn_bn", norm="layer")
    x = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(network.bn1(x), nn.functional.layer_norm(x, x.shape[1:]))


# Dropout and stochastic depth


@pytest.mark.parametrize("name", ["cnn", "resnet18", "densenet121", "shufflenet_v2", "pfl_cnn", "vgg11"])
def test_dropout_is_keyed_and_off_in_eval_mode(name):
    network, plain = make(name, dropout=0.5), make(name)
    assert list(network.state_dict()) == list(plain.state_dict())  # the layers keep their names
    plain.load_state_dict(network.state_dict())
    torch.testing.assert_close(network.eval()(X), plain.eval()(X), rtol=0, atol=0)
    for module in network.modules():
        if isinstance(module, nn.Dropout | options.DroppedLinear):
            module.train()
    draws = []
    for seed in (1, 1, 2):
        with KeyedDraws(torch.Generator().manual_seed(seed)):
            draws.append(network(X))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_drop_path_rises_with_depth_to_its_rate():
    rates = [m.p for m in kinds(make("resnet18", drop_path=0.4), StochasticDepth)]
    assert rates == pytest.approx([0.4 * i / 8 for i in range(1, 9)])  # Huang 2016: p_l = l / L p_L


def test_a_skipped_branch_leaves_the_shortcut():
    block = make("resnet18", drop_path=1 - 1e-9).layer4[1]
    with KeyedDraws(torch.Generator().manual_seed(0)):
        x = torch.randn(3, 512, 4, 4)
        torch.testing.assert_close(block.train()(x), x.relu())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "se_resnet50", "mobilenet_v2", "efficientnet_b0"])
def test_zero_gamma_makes_each_residual_branch_start_at_zero(name):
    network = make(name, zero_gamma=True)
    zero = {n for n, p in network.named_parameters() if p.dim() == 1 and n.endswith("weight") and not p.any()}
    assert len(zero) == len(kinds(network, StochasticDepth)) > 5
    if name.startswith("resnet"):
        last = "bn2.weight" if name == "resnet18" else "bn3.weight"
        assert all(n.endswith(last) for n in zero)


# Initialisation, weights, freezing


def test_he_draws_by_fan_out_and_xavier_by_both():
    network = make("resnet18", init="he")
    for conv in kinds(network, nn.Conv2d):
        fan_out = conv.out_channels * math.prod(conv.kernel_size)
        assert float(conv.weight.detach().std()) == pytest.approx(math.sqrt(2 / fan_out), rel=0.1)
    bound = math.sqrt(6 / (network.fc.in_features + network.fc.out_features))
    assert bound * 0.95 < float(network.fc.weight.detach().abs().max()) <= bound
    conv = make("resnet18", init="xavier").layer1[0].conv1
    assert float(conv.weight.detach().abs().max()) == pytest.approx(math.sqrt(6 / (2 * 64 * 9)), rel=0.02)


def test_weights_come_from_a_file(tmp_path):
    source = make("cnn_bn")
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    torch.manual_seed(5)
    loaded = options.make({"name": "cnn_bn", "weights": str(tmp_path / "w.safetensors")}, SHAPE, CLASSES)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), loaded.parameters(), strict=True))


def test_a_new_head_is_all_that_is_not_loaded(tmp_path):
    source = make("resnet18", classes=7)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    file = str(tmp_path / "w.safetensors")
    with pytest.raises(
        ConfigError, match=r"fc.weight has shape \(7, 512\), but .* \(10, 512\); model.new_head=true"
    ):
        make("resnet18", weights=file)
    network = make("resnet18", weights=file, new_head=True)
    assert network.fc.weight.shape == (10, 512)
    assert torch.equal(network.conv1.weight, source.conv1.weight)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """torchvision's folder of downloads: `hub(weights, tensors)` puts a file there."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()

    def put(weights, tensors):
        torch.save(tensors, tmp_path / "checkpoints" / Path(weights.url).name)
        return f"{type(weights).__name__}.{weights.name}"

    return put


def test_pretrained_weights_are_torchvisions(hub):
    there = models.mobilenet_v3_small()
    name = hub(models.MobileNet_V3_Small_Weights.IMAGENET1K_V1, there.state_dict())
    with pytest.raises(ConfigError, match=r"classifier.3.weight has shape \(1000, 1024\), .* model.new_head=true"):
        make("mobilenet_v3_small", pretrained=name)
    network = make("mobilenet_v3_small", pretrained=name, new_head=True)
    assert torch.equal(network.features[0][0].weight, there.features[0][0].weight)


def test_densenets_files_have_names_of_their_own(hub):
    there = models.densenet121(num_classes=CLASSES)
    norms = [m for m in there.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.running_mean.normal_()
    old = {re.sub(r"(norm|conv)([12])\.", r"\1.\2.", n): v for n, v in there.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    name = hub(models.DenseNet121_Weights.IMAGENET1K_V1, old)
    network = make("densenet121", (3, 64, 64), stem="imagenet", pretrained=name)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(network.eval()(x), there.eval()(x))


def test_inception_takes_images_normalised_as_imagenets(hub):
    there = models.inception_v3(num_classes=CLASSES, transform_input=True, init_weights=False)
    there.Conv2d_1a_3x3.bn.running_mean.normal_()
    name = hub(models.Inception_V3_Weights.IMAGENET1K_V1, there.state_dict())
    network = make("inception_v3", (3, 299, 299), aux=True, pretrained=name)
    x = torch.randn(1, 3, 299, 299)
    with torch.no_grad():
        expected = there.Conv2d_1a_3x3.eval()(there._transform_input(x))
        torch.testing.assert_close(network.Conv2d_1a_3x3.eval()(x), expected, rtol=1e-4, atol=1e-4)
    others = {n for n, v in there.state_dict().items() if not torch.equal(network.state_dict()[n], v)}
    assert others == {"Conv2d_1a_3x3.conv.weight", "Conv2d_1a_3x3.bn.running_mean"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_may_be_of_another_precision(dtype, tmp_path):
    source = {name: value.to(dtype) for name, value in make("cnn").state_dict().items()}
    save_file(source, tmp_path / "w.safetensors")
    network = make("cnn", weights=str(tmp_path / "w.safetensors"))
    assert all(torch.equal(value, source[name].float()) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(10, dtype=torch.int64), "fc2.bias is int64, but in the network it is float32"),
        (torch.ones(10, dtype=torch.bool), "fc2.bias is bool, but in the network it is float32"),
        (torch.ones(10, dtype=torch.complex64), "fc2.bias is complex64, but in the network it is float32"),
        (torch.full((10,), torch.nan), "fc2.bias has values that are not finite as float32"),
        (torch.full((10,), 1e300, dtype=torch.float64), "fc2.bias has values that are not finite as float32"),
    ],
)
def test_weights_of_a_wrong_type_or_not_finite_are_refused(value, message, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(make("cnn").state_dict() | {"fc2.bias": value}, path)
    with pytest.raises(ConfigError) as error:
        make("cnn", weights=str(path))
    assert str(error.value) == f"model.weights: {path}: {message}"


def test_a_frozen_layer_is_a_constant_and_keeps_its_statistics():
    network = make("resnet18", freeze=["conv1.*", "bn1.*", "layer1.*"])
    assert isinstance(network.bn1, options.FrozenBatchNorm)
    task = Task(network, SHAPE, CLASSES)
    assert not any(name.startswith(("conv1", "bn1", "layer1")) for name in task.layout.shapes)
    assert not any(name.startswith(("bn1", "layer1")) for name in task.buffer_layout.shapes)
    assert "layer2.0.conv1.weight" in task.layout.shapes
    assert "layer2.0.bn1.running_mean" in task.buffer_layout.shapes


def normed(shape, classes, /):
    """A network of three kinds of batch norm for images of any rank, 5 pixels a side, with trained statistics."""
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(shape) - 2]
    norms = {"affine": norm(2), "plain": norm(2, affine=False), "momentary": norm(2, track_running_stats=False)}
    for layer in (norms["affine"], norms["plain"]):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return nn.Sequential(OrderedDict(**norms, flat=nn.Flatten(), fc=nn.Linear(math.prod(shape), classes)))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_frozen_norm_of_any_rank_keeps_its_statistics(rank):
    x = torch.randn(4, 2, *[5] * rank)
    name = f"{__name__}:normed"
    free, frozen = (make(name, x.shape[1:], freeze=freeze) for freeze in ([], ["affine.*", "momentary.*"]))
    assert isinstance(frozen.affine, options.FrozenBatchNorm)
    for other in ("plain", "momentary"):  # one has no parameters, the other no statistics
        assert type(frozen.get_submodule(other)) is type(free.get_submodule(other))
    assert torch.equal(frozen.eval()(x), free.eval()(x))
    before = copy.deepcopy(frozen.affine.state_dict())
    assert list(before) == ["weight", "bias", "running_mean", "running_var"]
    frozen.train()(x)
    assert all(torch.equal(before[name], value) for name, value in frozen.affine.state_dict().items())
    assert torch.equal(frozen.affine(x), free.affine(x))  # `free` is in evaluation mode
    torch.testing.assert_close(torch.vmap(lambda x: frozen.affine(x[None])[0])(x), free.affine(x))


def test_what_is_frozen_stays_in_a_run():
    data_shape, classes = (1, 4, 4), 3
    task = Task(
        options.make({"name": "cnn_bn", "freeze": ["conv1*", "bn1*"]}, data_shape, classes), data_shape, classes
    )
    simulation = make_simulation(task=task)
    before = {n: v.clone() for n, v in task.state_dict(simulation.server).items()}
    simulation.round()
    after = task.state_dict(simulation.server)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved
    assert not any(name.startswith(("conv1", "bn1")) for name in moved)


# Errors of one line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "cnn", "norm": "group"},
            "model.name: cnn has no batch norm, which model.norm: group would replace",
        ),
        (
            {"name": "cnn_bn", "norm": "group", "groups": 5},
            "5 does not divide the 16 channels of bn1; allowed: 1, 2, 4, 8, 16",
        ),
        ({"name": "cnn_bn", "groups": 4}, "model.groups: needs norm: group"),
        ({"name": "cnn", "drop_path": 0.1}, "cnn has no residual branches, which drop_path needs"),
        ({"name": "cnn", "zero_gamma": True}, "cnn has no residual branches that end in a norm"),
        ({"name": "cnn", "new_head": True}, "model.new_head: needs weights or pretrained"),
        (
            {"name": "cnn", "freeze": ["conv9*"]},
            "'conv9*' matches none of conv1.weight, conv1.bias, conv2.weight, ...",
        ),
        ({"name": "cnn", "freeze": ["*"]}, "model.freeze: freezes all parameters"),
        (
            {"name": "cnn", "pretrained": "gpt"},
            "gpt is not the name of weights in torchvision, such as ResNet50_Weights",
        ),
        *(
            (
                {"name": "cnn", "pretrained": name},
                f"model.pretrained: {name} is not the name of weights in torchvision",
            )
            for name in ("ResNet18_Weights.NOPE", "get_weight.x", "")
        ),
        *(
            (
                settings,
                f"model.name: {settings['name']} with these options is too large for this machine's memory",
            )
            for settings in (
                {"name": "mobilenet_v1", "width": 1e14},  # refused by the allocator
                {"name": "shufflenet_v1", "width": 1e17},  # too large to be counted in bytes
                {"name": "mobilenet_v3_small", "width": 1e30},  # in 64 bits
                {"name": "mobilenet_v2", "width": 1.7e308},  # or as a float
            )
        ),
        ({"name": "cnn", "weights": "none.safetensors"}, "none.safetensors: cannot be read: No such file"),
        ({"name": "cnn", "weights": "x", "init": "he"}, "model.init: has no effect with weights"),
        ({"name": "cnn", "norm": "instance"}, 'model.norm: "instance" should be batch, group, layer or none'),
        ({"name": "cnn", "dropout": 1.0}, "model.dropout: 1.0 should be a number >= 0 and < 1"),
    ],
)
def test_wrong_options_are_refused_in_one_line(settings, message):
    with pytest.raises(ConfigError) as error:
        options.make(settings, SHAPE, CLASSES)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory."), TypeError("a bug")])
def test_lack_of_memory_is_a_config_error_and_other_errors_stay(monkeypatch, error):
    def fails(*arguments, at):
        raise error

    monkeypatch.setattr(options.MODELS, "make", fails)
    with pytest.raises((ConfigError, TypeError), match=r"too large|^a bug$") as caught:
        make("cnn")
    assert isinstance(caught.value, TypeError) == isinstance(error, TypeError)


def test_an_error_of_a_weights_file_names_the_tensor(tmp_path):
    save_file({"fc.weight": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=r"w.safetensors: has no tensor conv1.weight, which the network needs"):
        make("cnn_bn", weights=str(tmp_path / "w.safetensors"))
    Path(tmp_path / "bad").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ConfigError, match=r"bad: is not a safetensors file"):
        make("cnn_bn", weights=str(tmp_path / "bad"))
