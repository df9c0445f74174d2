"""What becomes of each buffer that a training pass changes, such as the statistics of a batch norm.

| buffer | what becomes of it |
| --- | --- |
| statistics of torch's norms | `average` |
| vectors of torch's spectral norms | `weights`: made from the weights wherever a model is loaded |
| a running mean over examples, which is found by acting | `average` |
| any other | `average`, `server` or `private`, as `model.buffers` says; refused without it |

`average`: one of the statistics, which are averaged with the model, or handled as `strategy.buffers` says.
`server`: each client starts from the server's value, which is the initial one, and what it makes of it is dropped.
`private`: each client keeps its own. The counters of torch's norms are not in the table: each client starts from
their initial values.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.utils._pytree import tree_flatten, tree_map

from fedsim.base.catalogue import matching
from fedsim.errors import ConfigError
from fedsim.training.draws import KeyedDraws
from fedsim.training.probe import copied
from fedsim.types import BufferWord, State

Handling = BufferWord | Literal["weights"]

STATISTICS, COUNTER = ("running_mean", "running_var"), "num_batches_tracked"  # of torch's norms
POWER_ITERATIONS = 2.0**24  # so many leave an error of about 1e-7 in the norm, whatever the singular values
TOLERANCE = 1e-4  # relative; far above rounding, and below the difference of a variance from the mean of two
LARGEST_FACTOR = 1 - 1e-5  # of a running mean; a counter has 1


def buffer_handling(
    network: nn.Module, moved: Iterable[str], examples: Tensor, words: Mapping[str, BufferWord]
) -> dict[str, Handling]:
    """What becomes of the buffers of `network`, of which a training pass changed those in `moved`, by name.

    `words` is `model.buffers`. Raises ConfigError where it does not say what is needed.
    """
    buffers, power = dict(network.named_buffers()), power_vectors(network)
    norms = {name for name, module in network.named_modules() if isinstance(module, _NormBase)}
    moved = [name for name in moved if name not in power]
    active = {name.rpartition(".")[0] for name in moved}
    statistics, others = dict[str, Handling](), list[str]()
    for name in buffers:
        path, _, own = name.rpartition(".")
        if path in norms & active and own in STATISTICS:
            statistics[name] = "average"
        elif name in moved and not (path in norms and own == COUNTER):
            others.append(name)
    statistics |= dict.fromkeys(running_means(network, others, examples) if others else (), "average")
    said = _said(words, {name: buffers[name] for name in buffers if name in statistics or name in others})
    if unsaid := [name for name in others if name not in statistics and name not in said]:
        floating = any(buffers[name].is_floating_point() for name in unsaid)
        raise ConfigError(
            f"model.buffers: training changes {_named(unsaid, buffers)}, which cannot be averaged unasked; say "
            f"{'average, ' if floating else ''}server (begins anew for each client) or private (each client keeps "
            f"its own) of each, such as {{{unsaid[0]}: server}}"
        )
    handling: dict[str, Handling] = {**statistics, **said}
    return {name: handling[name] for name in buffers if name in handling} | dict.fromkeys(power, "weights")


def _said(words: Mapping[str, BufferWord], buffers: Mapping[str, Tensor]) -> dict[str, BufferWord]:
    """What `model.buffers` says of each buffer; raises ConfigError."""
    said = dict[str, BufferWord]()
    if words and not buffers:
        raise ConfigError("model.buffers: training changes no buffer of this network that it could be said of")
    for pattern, word in words.items():
        for name in matching(buffers, [pattern], "model.buffers"):
            if said.setdefault(name, word) != word:
                raise ConfigError(f"model.buffers: says both {said[name]} and {word} of {name}")
            if word == "average" and not buffers[name].is_floating_point():
                kind = _named([name], buffers)
                raise ConfigError(f"model.buffers: {kind} cannot be averaged; say server or private")
    return said


def _named(names: list[str], buffers: Mapping[str, Tensor]) -> str:
    shown = [f"{name} ({str(buffers[name].dtype).removeprefix('torch.')})" for name in names]
    return ", ".join(shown if len(shown) <= 6 else [*shown[:5], f"and {len(shown) - 5} more"])


# Spectral norms (Miyato et al., ICLR 2018, https://arxiv.org/abs/1802.05957) divide a weight W by u' W v, where u
# and v come from one power iteration a training pass. Means of such vectors are not such vectors.


def power_vectors(network: nn.Module) -> State:
    """The vectors u and v of all spectral norms, by the names of the buffers: a function of the weights."""
    return {
        name: vector
        for names, matrix in _spectral_norms(network)
        for name, vector in zip(names, leading_vectors(matrix), strict=True)
    }


def leading_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """u (m,) and v (n,) of a matrix (m, n) after 2^24 power iterations from a fixed vector.

    They are computed from the eigenvalues of the smaller of W W' and W' W. Unlike singular vectors they hardly
    change with rounding where several singular values are largest, such as after an orthogonal initialisation.
    """
    wide = torch.nan_to_num(matrix.double(), 0.0, 0.0, 0.0)  # not finite only if the loss is not either
    tall = wide.shape[0] > wide.shape[1]
    a = wide.mT if tall else wide
    values, vectors = torch.linalg.eigh(a @ a.mT)
    start = torch.arange(len(a), dtype=a.dtype, device=a.device).square().cos()
    share = (values / values[-1].clamp(min=torch.finfo(a.dtype).tiny)).clamp(min=0) ** POWER_ITERATIONS
    first = F.normalize(vectors @ (share * (vectors.mT @ start)), dim=0)
    second = F.normalize(a.mT @ first, dim=0)
    u, v = (second, first) if tall else (first, second)
    return u.to(matrix.dtype), v.to(matrix.dtype)


class PowerVectors:
    """Sets the vectors of a network's spectral norms to those of its weights; remembers the last ones."""

    def __init__(self, network: nn.Module):
        self.network, buffers = network, dict(network.named_buffers())
        self.names = [names for names, _ in _spectral_norms(network)]  # of u and v
        self._pairs = [[buffers[name] for name in names] for names in self.names]
        self._last: list[tuple[Tensor, tuple[Tensor, Tensor]] | None] = [None] * len(self.names)

    def refresh(self) -> None:
        """Set them, after a change of the weights: clients of a round start from the same."""
        if not self.names:
            return
        for i, (_, matrix) in enumerate(_spectral_norms(self.network)):
            last = self._last[i]
            if last is None or not torch.equal(last[0], matrix):
                last = self._last[i] = matrix.clone(), leading_vectors(matrix)
            for buffer, vector in zip(self._pairs[i], last[1], strict=True):
                buffer.copy_(vector)

    def at(self, weights: State) -> State:
        """Those of other weights, by name; the network does not change. Also under `vmap`."""
        if not self.names:
            return {}
        found: State = functional_call(
            _Function(self.network), {f"network.{n}": w for n, w in weights.items()}, ()
        )
        return found


class _Function(nn.Module):
    """`power_vectors` as a module, for `functional_call`."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self) -> State:
        return power_vectors(self.network)


def _spectral_norms(network: nn.Module) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """The names of the vectors, and the weight as a matrix, of each spectral norm of torch's, of both kinds."""
    for path, module in network.named_modules():
        at = f"{path}." if path else ""
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                weight = getattr(module, f"{hook.name}_orig").detach()
                yield (f"{at}{hook.name}_u", f"{at}{hook.name}_v"), hook.reshape_weight_to_matrix(weight)
        if isinstance(module, ParametrizationList) and any(isinstance(step, _SpectralNorm) for step in module):
            names = ["original"] if module.is_tensor else [f"original{i}" for i in range(module.ntensors)]
            weights = [getattr(module, name).detach() for name in names]
            for i, step in enumerate(module):
                if not isinstance(step, _SpectralNorm):
                    weights = [step(*weights).detach()]
                elif weights[0].ndim > 1:  # a vector is divided by its length
                    matrix = step._reshape_weight_to_matrix(weights[0])
                    yield (f"{at}{i}._u", f"{at}{i}._v"), matrix
                    weights = [weights[0] / torch.linalg.matrix_norm(matrix, 2)] if i + 1 < len(module) else []


def running_means(network: nn.Module, names: Iterable[str], examples: Tensor) -> set[str]:
    """Those of the buffers `names` that are running means over examples: a b + (mean over the batch), 0 <= a < 1.

    The module that changes them, or the nearest one around it that is called, is called by itself: on its first
    inputs for `examples`, on each half of these, and after a change of all its buffers among `names`.
    """
    inputs, groups, found = _first_inputs(network, examples), defaultdict[str, list[str]](list), set[str]()
    for name in names:
        path = name.rpartition(".")[0]
        while path not in inputs:
            path = path.rpartition(".")[0]
        groups[path].append(name.removeprefix(f"{path}.") if path else name)
    for path, group in groups.items():
        module = network.get_submodule(path)
        for wide in (True, False):
            try:
                means = _means_among(module, group, inputs[path], wide)
            except Exception:
                continue
            found |= {f"{path}.{name}" if path else name for name in means}
            break
    return found


Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # arguments and keyword arguments


def _first_inputs(network: nn.Module, examples: Tensor) -> dict[str, Inputs]:
    """The inputs of each module's first call in a training pass, by its name."""
    network, inputs = copied(network).train(), dict[str, Inputs]()
    for name, module in network.named_modules():
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: inputs.setdefault(name, tree_map(_copied, (args, kwargs))) and None,
            with_kwargs=True,
        )
    _call(network, ((examples,), {}))
    return inputs


def _means_among(module: nn.Module, names: list[str], inputs: Inputs, wide: bool) -> set[str]:
    """Those of the buffers that are running means over the examples in `inputs`; raises what the module raises."""
    if wide:
        module, inputs = copied(module).double(), tree_map(_wide, inputs)
    start = {name: buffer for name, buffer in module.named_buffers() if name in names}

    def after(inputs: Inputs, start: State) -> State:
        network = copied(module).train()
        for name, value in start.items():
            path, _, own = name.rpartition(".")
            network.get_submodule(path)._buffers[own] = value.clone()
        _call(network, inputs)
        return {name: buffer.double() for name, buffer in network.named_buffers() if name in start}

    half = _rows(inputs) // 2
    inputs = _part(inputs, slice(2 * half))
    halves = [after(_part(inputs, part), start) for part in (slice(half), slice(half, None))]
    whole = after(inputs, start)
    noise = torch.Generator().manual_seed(0)
    shifted = [{n: _shifted(value, whole[n], noise) for n, value in start.items()} for _ in range(2)]
    results = [(by, after(inputs, by)) for by in shifted]

    def is_running_mean(name: str) -> bool:
        a, b = (half[name] for half in halves)
        spread = (a - b).abs().max()
        if not start[name].is_floating_point() or not spread > TOLERANCE * torch.maximum(a.abs(), b.abs()).max():
            return False
        factors = list[Tensor]()
        for by, result in results:
            shift, change = by[name].double() - start[name].double(), result[name] - whole[name]
            factors.append((change * shift).sum() / shift.square().sum())
            if not (change - factors[-1] * shift).abs().max() <= TOLERANCE * shift.abs().max():
                return False
        one, other = map(float, factors)
        in_range = min(one, other) > -TOLERANCE and max(one, other) < LARGEST_FACTOR
        is_mean = (whole[name] - (a + b) / 2).abs().max() <= TOLERANCE * spread
        return in_range and abs(one - other) < TOLERANCE and bool(is_mean)

    return {name for name in names if is_running_mean(name)}


def _call(module: nn.Module, inputs: Inputs) -> None:
    with KeyedDraws(torch.Generator().manual_seed(0)), torch.no_grad():
        module(*inputs[0], **inputs[1])


def _rows(inputs: Inputs) -> int:
    """The number of rows of the first tensor."""
    return next(len(leaf) for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor) and leaf.dim())


def _part(inputs: Inputs, rows: slice) -> Inputs:
    """Some rows of all tensors that have as many rows as the first one."""
    number = _rows(inputs)

    def part(leaf: Any) -> Any:
        return leaf[rows] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == number else leaf

    parts: Inputs = tree_map(part, inputs)
    return parts


def _shifted(value: Tensor, after: Tensor, noise: torch.Generator) -> Tensor:
    """The value of a buffer, changed by about its own size at random."""
    if not value.is_floating_point():
        return value.logical_not() if value.dtype == torch.bool else value + 3
    size = 1 + torch.maximum(value.double().abs(), after.abs()).max()
    return value + (size * torch.randn(value.shape, dtype=torch.double, generator=noise)).to(value)


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _wide(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
