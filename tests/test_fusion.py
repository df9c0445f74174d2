"""A fused network gives what the network gives, and has fewer layers wherever that is safe."""

import copy
import operator
from collections import Counter, OrderedDict

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth
from torchvision.transforms import CenterCrop

from fedsim.errors import ConfigError
from fedsim.export.fusion import NORMS, fused
from fedsim.models import MODELS
from fedsim.models.options import FrozenBatchNorm, make

SHAPE = (4, 6, 6)


def randomised(network, seed=0):
    """Batch norms with statistics and scales as after training, none of them trivial."""
    draw = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if type(module) in NORMS and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3, generator=draw)
            module.running_var.uniform_(0.5, 2, generator=draw)
            if module.weight is not None:
                module.weight.data.uniform_(0.5, 1.5, generator=draw)
                module.bias.data.normal_(0, 0.3, generator=draw)
    return network


def count(network):
    """How many layers there are of each type."""
    return Counter(type(module) for module in network.modules())


def same(network, shape=SHAPE, given=None):
    """Fuses, holds the result to the network's outputs, and returns it."""
    before, training = {n: v.clone() for n, v in network.state_dict().items()}, network.training
    result = fused(network, given)
    assert network.training == training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    own = {value.data_ptr() for value in network.state_dict().values() if value.numel()}
    assert not [n for n, p in result.named_parameters() if p.data_ptr() in own or p.requires_grad]
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = copy.deepcopy(network).eval()(x.clone())
        assert wanted.abs().max() > 0
        assert (result(x.clone()) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    return result


class Net(nn.Module):
    """Layers by name, and what they do."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.does = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.does(self, x)


def conv(size=3, groups=1, bias=True, out=4, **options):
    return nn.Conv2d(4, out, size, padding=size // 2, groups=groups, bias=bias, **options)


# What there is


@pytest.mark.parametrize(
    ("name", "size", "left"),
    [
        ("resnet18", 32, 0),
        ("inception_v3", 75, 0),
        *(
            pytest.param(*case, marks=pytest.mark.slow)  # as in the catalogue, or heavy
            for case in (
                ("resnet50", 32, 0),
                ("mobilenet_v2", 32, 0),
                ("densenet121", 32, 62),  # the others come before a ReLU, not behind a convolution
                ("shufflenet_v2_x0_5", 32, 0),
                ("efficientnet_b0", 32, 0),
                ("vgg11_bn", 32, 0),
            )
        ),
    ],
)
def test_torchvision_s_networks(name, size, left):
    options = {"aux_logits": False, "init_weights": False} if name == "inception_v3" else {}
    network = randomised(torchvision.models.get_model(name, num_classes=5, **options))
    assert count(same(network, (3, size, size)))[nn.BatchNorm2d] == left


@pytest.mark.parametrize("name", [n for n in MODELS if MODELS.load(n).reference.parameters < 8e6])
def test_the_catalogue_s_networks(name):
    (channels, *sides), classes, _ = MODELS.load(name).reference
    shape = (channels, *(min(side, 32) for side in sides))
    network = randomised(make(name, shape, classes))
    before, after = count(network), count(same(network, shape, shape))
    assert after[nn.BatchNorm2d] == (62 if name == "densenet121" else 0) <= before[nn.BatchNorm2d]
    assert not after[nn.Dropout]
    assert not after[StochasticDepth]


# Random networks: whatever is done to whichever of the values so far, in place or not


STEPS = {
    "conv": lambda: conv(),
    "grouped": lambda: conv(groups=2, bias=False),
    "1x1": lambda: conv(1),
    "1x1 without bias": lambda: conv(1, bias=False),
    "norm": lambda: nn.BatchNorm2d(4),
    "no statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "frozen": lambda: FrozenBatchNorm(nn.BatchNorm2d(4)),
    "plain": lambda: nn.BatchNorm2d(4, affine=False),
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "dropout": nn.Dropout,
    "path": lambda: StochasticDepth(0.5, "row"),
    "view": lambda: nn.Unflatten(1, (2, 2)),
    "relu_": lambda: F.relu_,
    "relu(inplace)": lambda: lambda x: F.relu(x, inplace=True),
    "method": lambda: lambda x: x.mul_(0.9),
    "+=": lambda: lambda x: x.__iadd__(0.1),
    "+": lambda: torch.add,
    "again": lambda: None,
}
steps = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 2), st.integers(0, 5)), max_size=14)


class Random(nn.Module):
    """Each step reads one of the last values; the output is the sum of all."""

    def __init__(self, program):
        super().__init__()
        self.program, self.layers, self.functions = program, nn.ModuleDict(), {}
        for number, (step, _, _) in enumerate(program):
            made = STEPS[step]()
            if isinstance(made, nn.Module):
                self.layers[str(number)] = made
            else:
                self.functions[number] = made

    def forward(self, x):
        values = [x]
        for number, (step, back, other) in enumerate(self.program):
            read = values[max(len(values) - 1 - back, 0)]
            if step == "again":
                layers = [layer for layer in self.layers.values() if not isinstance(layer, nn.Unflatten)]
                values.append(layers[other % len(layers)](read) if layers else read)
            elif step == "+":
                values.append(read + values[other % len(values)])
            elif step == "view":
                values.append(self.layers[str(number)](read).flatten(1, 2))
            else:
                values.append(
                    (self.layers[str(number)] if str(number) in self.layers else self.functions[number])(read)
                )
        return torch.cat(values, 1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(steps)
def test_random_networks(program):
    torch.manual_seed(0)
    same(randomised(Random(program)))


# What is folded


@pytest.mark.parametrize("norm", [STEPS[name]() for name in ("norm", "plain", "frozen")])
@pytest.mark.parametrize(
    "layer", [conv(), conv(bias=False), conv(groups=4), conv(5, stride=2, padding_mode="reflect")]
)
def test_a_norm_goes_into_the_convolution_before_it(layer, norm):
    result = same(randomised(nn.Sequential(layer, norm, nn.ReLU())))
    assert [type(m) for m in result.children()] == [nn.Conv2d, nn.ReLU]


@pytest.mark.parametrize(
    ("kind", "norm", "shape"), [(nn.Conv1d, nn.BatchNorm1d, (4, 9)), (nn.Conv3d, nn.BatchNorm3d, (4, 3, 3, 3))]
)
def test_in_one_and_three_dimensions(kind, norm, shape):
    for made in (norm(5), FrozenBatchNorm(norm(5))):
        assert not count(same(randomised(nn.Sequential(kind(4, 5, 3), made)), shape))[type(made)]


def test_a_norm_goes_into_the_linear_layer_before_it_where_the_shape_is_known():
    network = randomised(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)))
    assert count(same(network, (6,), (6,)))[nn.BatchNorm1d] == 0
    assert count(same(network, (6,)))[nn.BatchNorm1d] == 1
    assert count(same(network, (4, 6), (4, 6)))[nn.BatchNorm1d] == 1  # it is over the four rows


def test_through_dropout_and_identities():
    network = nn.Sequential(conv(), nn.Identity(), nn.Dropout(0.5), nn.BatchNorm2d(4))
    assert [type(m) for m in same(randomised(network)).children()] == [nn.Conv2d]


def test_in_half_precision_the_fold_is_rounded_once():
    network = randomised(nn.Sequential(conv(), nn.BatchNorm2d(4))).bfloat16()
    exact = fused(copy.deepcopy(network).double())
    for name, value in fused(network).named_parameters():
        assert torch.equal(value, exact.get_parameter(name).bfloat16())


# What is left alone


class Read(nn.Module):
    """A convolution whose weights its parent reads."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.conv.weight.mean()


def tied():
    network = nn.Sequential(conv(), nn.BatchNorm2d(4), conv(), nn.BatchNorm2d(4))
    network[2].weight = network[0].weight
    return network


def hooked():
    network = nn.Sequential(conv(), nn.BatchNorm2d(4))
    network[0].register_forward_hook(lambda module, inputs, output: output * 2)
    return network


def after_use(net, x):
    y = net.conv(x)
    return net.norm(y) + y


LEFT = {
    "an output that is used elsewhere": lambda: Net(after_use, conv=conv(), norm=nn.BatchNorm2d(4)),
    "a convolution that runs twice": lambda: Net(
        lambda net, x: net.norm(net.conv(net.conv(x))), conv=conv(), norm=nn.BatchNorm2d(4)
    ),
    "a norm that runs twice": lambda: Net(
        lambda net, x: net.norm(net.b(net.norm(net.a(x)))), a=conv(), b=conv(), norm=nn.BatchNorm2d(4)
    ),
    "weights that are read": Read,
    "a hook": hooked,
    "a parametrised weight": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(conv()), nn.BatchNorm2d(4)
    ),
    "no statistics": lambda: nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False)),
    "something in between": lambda: nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(4)),
    "functions": lambda: Net(
        lambda net, x: F.batch_norm(net.conv(x), net.norm.running_mean, net.norm.running_var),
        conv=conv(),
        norm=nn.BatchNorm2d(4),
    ),
    "a transposed convolution": lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4)),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_would_not_be_safe_is_left_alone(name):
    network = randomised(LEFT[name]())
    layers, left = count(network), count(same(network))
    assert left[nn.BatchNorm2d] == (0 if name == "functions" else layers[nn.BatchNorm2d])


def test_tied_weights_part():
    result = same(randomised(tied()))
    assert not count(result)[nn.BatchNorm2d]
    assert not torch.equal(result.get_parameter("0.weight"), result.get_parameter("2.weight"))


# 1x1 convolutions side by side


def branches(between, first=None, **second):
    def forward(net, x):
        x = net.stem(x)
        a = net.a(x)
        between(net, x, a)
        return torch.cat([a.flatten(1), net.b(x).flatten(1)], 1)

    return Net(
        forward,
        stem=conv(),
        a=first or conv(1, out=3),
        b=conv(**{"size": 1, "out": 5} | second),
        relu=nn.ReLU(inplace=True),
    )


def test_convolutions_of_one_input_become_one():
    result = same(branches(lambda net, x, a: None))
    _, layer = (m for m in result.modules() if isinstance(m, nn.Conv2d))
    assert (layer.in_channels, layer.out_channels) == (4, 8)


def test_with_their_norms_and_what_comes_behind_them():
    def forward(net, x):
        a = F.relu(net.norm_a(net.a(x)), inplace=True)
        b = F.relu(net.norm_b(net.b(x)), inplace=True)
        return torch.cat([net.c(a), b, F.avg_pool2d(x, 3, 1, 1)], 1)

    layers = {"a": conv(1, bias=False), "b": conv(1, bias=False, out=2), "c": conv()}
    network = Net(forward, norm_a=nn.BatchNorm2d(4), norm_b=nn.BatchNorm2d(2), **layers)
    assert count(same(randomised(network)))[nn.Conv2d] == 2


@pytest.mark.parametrize(
    "network",
    [
        branches(lambda net, x, a: F.relu_(x)),
        branches(lambda net, x, a: x.mul_(2)),
        branches(lambda net, x, a: net.relu(x)),
        branches(lambda net, x, a: operator.iadd(x, 1)),
        branches(lambda net, x, a: torch.add(x, 1, out=x)),
        branches(lambda net, x, a: x.view(-1).clamp_(max=0.5)),
        branches(lambda net, x, a: None, size=3),
        branches(lambda net, x, a: None, stride=2),
        branches(lambda net, x, a: None, groups=2, out=4),
        branches(lambda net, x, a: None, bias=False),
    ],
    ids=["relu_", "mul_", "ReLU(inplace)", "+=", "out=", "a view", "3x3", "stride", "groups", "bias"],
)
def test_others_stay_two(network):
    assert count(same(network))[nn.Conv2d] == 3  # with the stem


def test_inception_s_branches():
    network = torchvision.models.inception_v3(aux_logits=False, init_weights=False).eval()
    ones = lambda net: sum(m.kernel_size == (1, 1) for m in net.modules() if isinstance(m, nn.Conv2d))  # noqa: E731
    assert ones(network) - ones(fused(network)) == 3 * 2 + 4 * 2 + 2 * 2 + 1  # A has 3 side by side, C 3, E 3, D 2


# What cannot be followed


def test_a_layer_that_looks_at_its_input_is_kept_whole():
    network = nn.Sequential(OrderedDict(crop=CenterCrop(4), conv=conv(), norm=nn.BatchNorm2d(4)))
    assert [type(m) for m in same(randomised(network)).children()] == [CenterCrop, nn.Conv2d]


def test_a_network_that_looks_at_its_input_is_refused_in_one_line():
    network = Net(lambda net, x: net.conv(x) if x.sum() > 0 else x, conv=conv())
    with pytest.raises(ConfigError, match=r"^model: cannot be fused, as it cannot be traced: [^\n]+$"):
        fused(network)


def test_a_shape_that_does_not_fit_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"^model: cannot take examples of shape \(3, 6, 6\): [^\n]+$"):
        fused(nn.Sequential(conv()), (3, 6, 6))
