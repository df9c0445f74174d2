"""What holds for every network, whatever its family: done to the finished one, by these keys of `model`."""

import re
from collections.abc import Iterator
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fedsim.base.catalogue import Options, Spec, matching, options_of, validated
from fedsim.errors import ConfigError
from fedsim.models import MODELS
from fedsim.models.weights import fill, head
from fedsim.types import Count, Decay

if TYPE_CHECKING:
    from torchvision.ops import StochasticDepth

NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
GROUPS = 32  # of a group norm, where they divide the channels (Wu & He 2018)


class Common(Options):
    """The options of all models.

    `norm` takes the place of every batch norm: `group` has `groups` groups, or up to 32 that divide the channels
    (Wu & He 2018, https://arxiv.org/abs/1803.08494), `layer` one group, `none` nothing. `dropout` is the rate of
    the network's dropout layers, or where it has none, of one before its last layer. `drop_path` skips residual
    branches, the last with this probability, the others in proportion to their depth (Huang et al. 2016,
    https://arxiv.org/abs/1603.09382). `zero_gamma` starts each residual branch at zero (Goyal et al. 2017,
    https://arxiv.org/abs/1706.02677).

    `init: he` draws convolutions from N(0, 2 / fan out) (He et al. 2015, https://arxiv.org/abs/1502.01852) and
    linear layers from Xavier's uniform distribution (Glorot & Bengio 2010); `xavier` draws both from the latter.
    `weights` is a safetensors file, `pretrained` a name of torchvision's, such as ResNet50_Weights.IMAGENET1K_V2;
    with `new_head` all is taken from them but the last linear layer. Parameters whose names match a pattern of
    `freeze` stay as they are, and a batch norm that is wholly frozen keeps its statistics, too.
    """

    norm: Literal["batch", "group", "layer", "none"] = "batch"
    groups: Count | None = None
    dropout: Decay | None = None
    drop_path: Decay | None = None
    zero_gamma: bool = False
    init: Literal["he", "xavier"] | None = None
    weights: Path | None = None
    pretrained: str | None = None
    new_head: bool = False
    freeze: list[str] = []


# Where a network starts and how it trains: nothing to one whose weights are given and only used.
TRAINING = ("weights", "pretrained", "new_head", "init", "zero_gamma", "freeze", "dropout", "drop_path")
TOO_LARGE = re.compile("can't allocate|out of memory|[Oo]verflow")


def resolve(spec: object, at: str = "") -> Spec:
    """A model's spec with its defaults filled in, those of all models too; raises ConfigError naming the key."""
    return MODELS.resolve(spec, at, also=Common)


def training(spec: Spec) -> Spec:
    """What a resolved spec says of where its network starts and how it trains, if it is not the default."""
    own = options_of(MODELS.load(spec["name"])).model_fields
    keys = [key for key in TRAINING if key not in own]
    return {key: spec[key] for key in keys if spec[key] != Common.model_fields[key].default}


def make(spec: object, shape: tuple[int, ...], classes: int, at: str = "model") -> nn.Module:
    """The network that a spec describes, for examples of `shape`; raises ConfigError."""
    whole = resolve(spec, at)
    own = options_of(MODELS.load(whole["name"])).model_fields  # an entry may have one of these names itself
    common = validated(Common, {key: whole.pop(key) for key in Common.model_fields if key not in own}, at)
    _check(common, at)
    name = f"{at}.name: {whole['name']}"
    try:
        network: nn.Module = MODELS.make(whole, nn.Module, shape, classes, at=at)
    except (RuntimeError, TypeError, MemoryError, OverflowError) as error:  # as torch has it: see TOO_LARGE
        if isinstance(error, RuntimeError | TypeError) and not TOO_LARGE.search(str(error)):
            raise
        raise ConfigError(f"{name} is, with these options, too large for this machine's memory") from error
    if common.norm != "batch":
        _renorm(network, common, at, name)
    if common.dropout is not None:
        _drop_values(network, common.dropout, name)
    if common.drop_path is not None:
        _drop_paths(network, common.drop_path, name)
    if common.init:
        _initialise(network, xavier=common.init == "xavier")
    if common.zero_gamma:
        _zero_gammas(network, name)
    for key, source in (("weights", common.weights), ("pretrained", common.pretrained)):
        if source is not None:
            fill(network, source, f"{at}.{key}", new_head=common.new_head, head_option=f"{at}.new_head")
    if common.freeze:
        _freeze(network, common.freeze, at)
    return network


def _check(common: Common, at: str) -> None:
    """Refuse what would do nothing."""
    loads = common.weights or common.pretrained is not None
    for key, idle, way_out in (
        ("groups", common.groups and common.norm != "group", "needs norm: group"),
        ("new_head", common.new_head and not loads, "needs weights or pretrained"),
        ("pretrained", common.weights and common.pretrained is not None, "stands beside weights; one of the two"),
        ("init", common.init and loads and not common.new_head, "does nothing beside weights or pretrained"),
        ("zero_gamma", common.zero_gamma and loads, "does nothing beside weights or pretrained"),
    ):
        if idle:
            raise ConfigError(f"{at}.{key}: {way_out}")


def _renorm(network: nn.Module, common: Common, at: str, name: str) -> None:
    """Put another norm in the place of each batch norm."""
    channels = {n: m.num_features for n, m in network.named_modules() if isinstance(m, _BatchNorm)}
    if not channels:
        raise ConfigError(f"{name} has no batch norm that {at}.norm: {common.norm} could replace")
    if common.groups and (odd := next((n for n, c in channels.items() if c % (common.groups or 1)), None)):
        fits = [g for g in range(1, 65) if gcd(*channels.values()) % g == 0]
        raise ConfigError(
            f"{at}.groups: {common.groups} does not divide the {channels[odd]} channels of {odd}; "
            f"{', '.join(map(str, fits))} divide all"
        )
    for path, count in channels.items():
        groups = 1 if common.norm == "layer" else common.groups or _groups(count)
        _replace(network, path, nn.Identity() if common.norm == "none" else nn.GroupNorm(groups, count))


def _groups(channels: int) -> int:
    """At most 32 that divide, of two channels or more: a group of one would be instance norm."""
    return max((g for g in range(1, min(GROUPS, channels // 2) + 1) if channels % g == 0), default=1)


class DroppedLinear(nn.Linear):
    """`linear` after a dropout of rate `p`, under the same names."""

    def __init__(self, linear: Any, p: float):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias, self.p = linear.weight, linear.bias, p

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.dropout(input, self.p, self.training))


def _drop_values(network: nn.Module, p: float, name: str) -> None:
    layers = [module for module in network.modules() if isinstance(module, nn.Dropout)]
    for layer in layers:
        layer.p = p
    if not layers:
        last = head(network)
        if last is None:
            raise ConfigError(f"{name} has no linear layer to put dropout before")
        _replace(network, last, DroppedLinear(network.get_submodule(last), p))


def _drop_paths(network: nn.Module, p: float, name: str) -> None:
    paths = [module for module in network.modules() if _skips(module)]
    if not paths:
        raise ConfigError(f"{name} has no residual branch that drop_path could skip")
    for depth, path in enumerate(paths, 1):
        path.p = p * depth / len(paths)


def _initialise(network: nn.Module, xavier: bool) -> None:
    for module in network.modules():
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            if isinstance(module, nn.Linear) or xavier:
                nn.init.xavier_uniform_(module.weight)
            else:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _zero_gammas(network: nn.Module, name: str) -> None:
    ends = list(_branch_ends(network))
    if not ends:
        raise ConfigError(f"{name} has no residual branch that ends in a norm, for zero_gamma to start at 0")
    for norm in ends:
        nn.init.zeros_(norm.weight)


def _branch_ends(network: nn.Module) -> Iterator[Any]:
    """The last norm of each residual branch: the last that its block has before its StochasticDepth."""
    for block in network.modules():
        if any(_skips(child) for child in block.children()):
            last = None
            for module in block.modules():
                if _skips(module):
                    break
                last = module if isinstance(module, NORMS) else last
            if last is not None:
                yield last


def _skips(module: nn.Module) -> TypeGuard["StochasticDepth"]:
    """Whether it is torchvision's StochasticDepth."""
    from torchvision.ops import StochasticDepth  # here, since torchvision takes a second to import

    return isinstance(module, StochasticDepth)


class FrozenBatchNorm(nn.Module):
    """A batch norm of any rank as it is in evaluation, under the same names; nothing changes it."""

    weight: Tensor
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: Any):
        super().__init__()
        self.eps = norm.eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(norm, name)
            self.register_buffer(name, None if value is None else value.detach())

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def _freeze(network: nn.Module, patterns: list[str], at: str) -> None:
    parameters = dict(network.named_parameters())
    for name in matching(parameters, patterns, f"{at}.freeze"):
        parameters[name].requires_grad = False
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError(f"{at}.freeze: leaves no parameter to train")
    norms = {name: m for name, m in network.named_modules() if isinstance(m, _BatchNorm)}
    for path, norm in norms.items():
        if norm.affine and norm.running_mean is not None and not any(p.requires_grad for p in norm.parameters()):
            _replace(network, path, FrozenBatchNorm(norm))


def _replace(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)
