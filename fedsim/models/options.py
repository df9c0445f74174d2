"""The options that all networks share: keys of `model` that are applied to the finished network."""

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from fedsim.base.catalogue import Options, Spec, matching, validated
from fedsim.errors import ConfigError, located
from fedsim.models import MODELS
from fedsim.models.weights import last_linear, load_weights
from fedsim.types import BufferWord, Count, Decay

if TYPE_CHECKING:
    from torchvision.ops import StochasticDepth

NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
MAX_GROUPS = 32  # the default of a group norm, where it divides the channels (Wu & He 2018)


class CommonOptions(Options):
    """The options of all models.

    `norm` replaces every batch norm: `group` by a group norm of `groups` groups, or by default of up to 32 that
    divide the channels (Wu & He 2018, https://arxiv.org/abs/1803.08494); `layer` by a group norm of one group;
    `none` by nothing. `dropout` is the rate of the network's dropout layers; a network without any gets one before
    its last layer. `drop_path` skips the last residual branch with this probability, and earlier ones with a
    probability in proportion to their depth (Huang et al. 2016, https://arxiv.org/abs/1603.09382). `zero_gamma`
    initialises the last norm of each residual branch to zero (Goyal et al. 2017,
    https://arxiv.org/abs/1706.02677).

    `init: he` draws convolutions from N(0, 2 / fan out) (He et al. 2015, https://arxiv.org/abs/1502.01852) and
    linear layers from Xavier's uniform distribution (Glorot & Bengio 2010); `xavier` draws both from the latter.
    `weights` is a safetensors file; `pretrained` is the name of weights in torchvision, such as
    ResNet50_Weights.IMAGENET1K_V2. With `new_head` the last linear layer is not loaded from them. Parameters whose
    names match a pattern of `freeze` are not trained, and a batch norm whose parameters are all frozen keeps its
    statistics, too.

    `buffers` says by patterns of names what becomes of buffers that training changes: `average` makes them
    statistics as those of batch norm; with `server` each client starts from the initial values, and what it makes
    of them is dropped; with `private` each client keeps its own. `head` is the name of the layer whose input is
    the features that some strategies use; null is the last linear layer that runs.
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
    buffers: dict[str, BufferWord] = {}
    head: str | None = None


# Options of initialisation and training, which do nothing for a network that is loaded and not trained.
TRAINING_OPTIONS = (
    *(
        "weights",
        "pretrained",
        "new_head",
        "init",
        "zero_gamma",
        "freeze",
        "dropout",
        "drop_path",
        "buffers",
        "head",
    ),
)
OUT_OF_MEMORY = re.compile("can't allocate|out of memory|[Oo]verflow")


def resolve(spec: object, at: str = "") -> Spec:
    """A model's spec with the defaults of its own and the common options; raises ConfigError naming the key."""
    return MODELS.resolve(spec, at, also=CommonOptions)


def training_options(spec: Spec) -> Spec:
    """The options of initialisation and training in a resolved spec that differ from their defaults."""
    own = MODELS.options(spec["name"]).model_fields
    keys = [key for key in TRAINING_OPTIONS if key not in own]
    return {key: spec[key] for key in keys if spec[key] != CommonOptions.model_fields[key].default}


def buffer_words(spec: object) -> dict[str, BufferWord]:
    """The common option `buffers` of a spec, which may be a bare name; raises ConfigError."""
    words: dict[str, BufferWord] = _common(spec, "buffers")
    return words


def head(spec: object) -> str | None:
    """The common option `head` of a spec, as `buffer_words`; raises ConfigError."""
    name: str | None = _common(spec, "head")
    return name


def _common(spec: object, name: str) -> Any:
    """A common option of a spec, or its default where the network has an option of its own by this name."""
    resolved = resolve(spec)
    own = name in MODELS.options(resolved["name"]).model_fields
    return CommonOptions.model_fields[name].default if own else resolved[name]


def make(spec: object, shape: tuple[int, ...], classes: int, at: str = "model") -> nn.Module:
    """The network that a spec describes, for examples of `shape`; raises ConfigError."""
    resolved = resolve(spec, at)
    own = MODELS.options(resolved["name"]).model_fields  # an entry may have an option of the same name
    keys = [key for key in CommonOptions.model_fields if key not in own]
    common = validated(CommonOptions, {key: resolved.pop(key) for key in keys}, at)
    _check_combination(common, at)
    name = f"{at}.name: {resolved['name']}"
    try:
        network: nn.Module = MODELS.make(resolved, nn.Module, shape, classes, at=at)
    except (RuntimeError, TypeError, MemoryError, OverflowError) as error:
        # PyTorch raises RuntimeError or TypeError for too large a tensor, and only their text tells.
        if isinstance(error, RuntimeError | TypeError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        raise ConfigError(f"{name} with these options is too large for this machine's memory") from error
    _initialise_lazy_layers(network, shape, at)
    if common.norm != "batch":
        _replace_batch_norms(network, common, at, name)
    if common.dropout is not None:
        _set_dropout(network, common.dropout, name)
    if common.drop_path is not None:
        _set_drop_path(network, common.drop_path, name)
    if common.init:
        _initialise(network, xavier=common.init == "xavier")
    if common.zero_gamma:
        _zero_last_norms(network, name)
    for key, source in (("weights", common.weights), ("pretrained", common.pretrained)):
        if source is not None:
            load_weights(network, source, f"{at}.{key}", new_head=common.new_head, head_option=f"{at}.new_head")
    if common.freeze:
        _freeze(network, common.freeze, at)
    return network


def _initialise_lazy_layers(network: nn.Module, shape: tuple[int, ...], at: str) -> None:
    """Give lazy layers their parameters, by a pass in eval mode; raises ConfigError."""
    if not _lazy_tensors(network):
        return
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(2, *shape))
    except (Exception, SystemExit) as error:
        if torch.get_default_device().type == "meta":  # on which not every network can compute
            raise
        raise ConfigError(f"{at}: cannot take examples of shape {shape}: {located(error)}") from error
    network.train()
    if lazy := _lazy_tensors(network):
        raise ConfigError(f"{at}: the lazy {lazy[0]} takes no part in a pass in eval mode; give its layer sizes")


def _lazy_tensors(network: nn.Module) -> list[str]:
    """The names of parameters and buffers whose shapes are not known yet."""
    named = chain(network.named_parameters(), network.named_buffers())
    return [name for name, value in named if is_lazy(value)]


def _check_combination(common: CommonOptions, at: str) -> None:
    """Raise ConfigError for an option that does nothing beside the others."""
    loads = common.weights or common.pretrained is not None
    for key, wrong, why in (
        ("groups", common.groups and common.norm != "group", "needs norm: group"),
        ("new_head", common.new_head and not loads, "needs weights or pretrained"),
        ("pretrained", common.weights and common.pretrained is not None, "cannot be set together with weights"),
        ("init", common.init and loads and not common.new_head, "has no effect with weights or pretrained"),
        ("zero_gamma", common.zero_gamma and loads, "has no effect with weights or pretrained"),
    ):
        if wrong:
            raise ConfigError(f"{at}.{key}: {why}")


def _replace_batch_norms(network: nn.Module, common: CommonOptions, at: str, name: str) -> None:
    channels = {n: m.num_features for n, m in network.named_modules() if isinstance(m, _BatchNorm)}
    if not channels:
        raise ConfigError(f"{name} has no batch norm, which {at}.norm: {common.norm} would replace")
    if common.groups:
        _check_groups(common.groups, channels, at)
    for path, count in channels.items():
        groups = 1 if common.norm == "layer" else common.groups or _default_groups(count)
        _replace(network, path, nn.Identity() if common.norm == "none" else nn.GroupNorm(groups, count))


def _check_groups(groups: int, channels: Mapping[str, int], at: str) -> None:
    """Raise ConfigError unless `groups` divides the `channels` of every norm."""
    indivisible = [name for name, count in channels.items() if count % groups]
    if indivisible:
        allowed = [g for g in range(1, 65) if gcd(*channels.values()) % g == 0]
        raise ConfigError(
            f"{at}.groups: {groups} does not divide the {channels[indivisible[0]]} channels of {indivisible[0]}; "
            f"allowed: {', '.join(map(str, allowed))}"
        )


def _default_groups(channels: int) -> int:
    """The largest divisor of `channels` up to 32 that leaves two channels or more in a group.

    With one channel in a group, a group norm would be an instance norm.
    """
    return max((g for g in range(1, min(MAX_GROUPS, channels // 2) + 1) if channels % g == 0), default=1)


class DroppedLinear(nn.Linear):
    """`linear` after a dropout of rate `p`; its parameters keep their names."""

    def __init__(self, linear: Any, p: float):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias, self.p = linear.weight, linear.bias, p

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.dropout(input, self.p, self.training))


def _set_dropout(network: nn.Module, p: float, name: str) -> None:
    layers = [module for module in network.modules() if isinstance(module, nn.Dropout)]
    for layer in layers:
        layer.p = p
    if not layers:
        last = last_linear(network)
        if last is None:
            raise ConfigError(f"{name} has neither a dropout layer nor a linear layer, one of which dropout needs")
        _replace(network, last, DroppedLinear(network.get_submodule(last), p))


def _set_drop_path(network: nn.Module, p: float, name: str) -> None:
    branches = [module for module in network.modules() if _is_stochastic_depth(module)]
    if not branches:
        raise ConfigError(f"{name} has no residual branches, which drop_path needs")
    for depth, branch in enumerate(branches, 1):
        branch.p = p * depth / len(branches)


def _initialise(network: nn.Module, xavier: bool) -> None:
    for module in network.modules():
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            if isinstance(module, nn.Linear) or xavier:
                nn.init.xavier_uniform_(module.weight)
            else:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _zero_last_norms(network: nn.Module, name: str) -> None:
    norms = list(_last_norms(network))
    if not norms:
        raise ConfigError(f"{name} has no residual branches that end in a norm, which zero_gamma needs")
    for norm in norms:
        nn.init.zeros_(norm.weight)


def _last_norms(network: nn.Module) -> Iterator[Any]:
    """The last norm of each residual branch, which is the last one before the StochasticDepth of its block."""
    for block in network.modules():
        if any(_is_stochastic_depth(child) for child in block.children()):
            last = None
            for module in block.modules():
                if _is_stochastic_depth(module):
                    break
                last = module if isinstance(module, NORMS) else last
            if last is not None:
                yield last


def _is_stochastic_depth(module: nn.Module) -> TypeGuard["StochasticDepth"]:
    from torchvision.ops import StochasticDepth  # here, since torchvision takes a second to import

    return isinstance(module, StochasticDepth)


class FrozenBatchNorm(nn.Module):
    """A batch norm of any rank, always in evaluation mode; its tensors keep their names and never change."""

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
        raise ConfigError(f"{at}.freeze: freezes all parameters; at least one should be trained")
    norms = {name: m for name, m in network.named_modules() if isinstance(m, _BatchNorm)}
    for path, norm in norms.items():
        if norm.affine and norm.running_mean is not None and not any(p.requires_grad for p in norm.parameters()):
            _replace(network, path, FrozenBatchNorm(norm))


def _replace(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)
