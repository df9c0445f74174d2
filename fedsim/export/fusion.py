"""A network rewritten for inference: the same outputs from fewer operations.

In evaluation a batch norm is y = a x + b for each channel, with a = gamma / sqrt(var + eps) and b = beta - a mean.
A convolution in front of it takes it in, with weights a W and bias a c + b (Jacob et al., Quantization and
Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, CVPR 2018, section 3.2,
https://arxiv.org/abs/1712.05877), and so does a linear layer. 1x1 convolutions of one input become one, of which
each reader takes its channels (Jia et al., TASO, SOSP 2019, https://doi.org/10.1145/3341301.3359630).

In PyTorch the ReLU behind it stays a step of its own; ONNX Runtime, TensorRT and torch.compile join the two.
"""

import copy
import operator
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import StochasticDepth

from fedsim.errors import ConfigError, one_line
from fedsim.models.options import FrozenBatchNorm

# Exact types: a subclass may compute something else.
LAYERS: dict[type, set[type]] = {  # and the norms that they take in
    nn.Conv1d: {nn.BatchNorm1d, nn.SyncBatchNorm, FrozenBatchNorm},
    nn.Conv2d: {nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm},
    nn.Conv3d: {nn.BatchNorm3d, nn.SyncBatchNorm, FrozenBatchNorm},
    nn.Linear: {nn.BatchNorm1d, nn.SyncBatchNorm, FrozenBatchNorm},
}
NORMS = set[type]().union(*LAYERS.values())
IDLE = {nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, StochasticDepth}
IN_PLACE = [operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod]
IN_PLACE += [operator.ipow, operator.iand, operator.ior, operator.ixor, operator.imatmul]


def fused(network: nn.Module, shape: tuple[int, ...] | None = None) -> fx.GraphModule:
    """A copy of `network` that computes what it computes in evaluation, with fewer operations.

    Batch norms, frozen ones too, are folded into the convolution or linear layer in front of them, parallel 1x1
    convolutions merged, dropout and the like removed. A layer stays as it is where something else reads its output
    or weights, where it runs twice, and where it has hooks. So does a linear layer unless `shape`, that of one
    example, is given: the rank of its output tells whether the norm is over its features. Outputs are the same
    but for rounding; parameters take no gradients, and none are shared with `network`.

    Raises ConfigError where torch.fx cannot follow the network, or `shape` does not fit.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)
    try:
        graph = _Tracer().trace(network)
    except Exception as error:  # whatever a forward pass does to a stand-in for its input
        raise ConfigError(f"model: cannot be fused, as it cannot be traced: {one_line(error)}") from error
    module = fx.GraphModule(network, graph)
    _drop_idle(module)
    if shape is not None:
        _note_shapes(module, shape)
    _fold(module)
    _merge(module)
    graph.lint()
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def _recorded(write: Any) -> Any:
    return lambda self, other: self.tracer.create_proxy("call_function", write, (self, other), {})


def _recording(proxy: type[fx.Proxy]) -> type[fx.Proxy]:
    for write in IN_PLACE:
        setattr(proxy, f"__{write.__name__}__", _recorded(write))
    return proxy


@_recording
class _Proxy(fx.Proxy):
    """Records `x += y` as what it is: torch.fx has x + y in its place, which other readers of x do not see."""


class _Tracer(fx.Tracer):
    """Goes into what has parts; what has none holds no pair, and may do what cannot be traced."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or next(m.children(), None) is None

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def _drop_idle(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if node.op == "call_module" and type(module.get_submodule(node.target)) in IDLE and node.args:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


def _note_shapes(module: fx.GraphModule, shape: tuple[int, ...]) -> None:
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    try:
        with torch.no_grad():
            module(example := like.new_zeros(2, *shape))  # first, as ShapeProp prints what goes wrong
            ShapeProp(module).propagate(example)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ConfigError(f"model: cannot take examples of shape {shape}: {one_line(error)}") from error


def _fold(module: fx.GraphModule) -> None:
    """Batch norms into the layers in front of them."""
    once = _run_once(module)
    for node in list(module.graph.nodes):
        if node not in once or type(norm := once[node]) not in NORMS or norm.running_mean is None:
            continue
        before = node.args[0]
        layer = once.get(before)
        if type(norm) not in LAYERS.get(type(layer), ()) or len(before.users) > 1:
            continue
        if isinstance(layer, nn.Linear) and not ("tensor_meta" in before.meta and _rank(before) == 2):
            continue
        _put(module, before, _folded(layer, norm))
        node.replace_all_uses_with(before)
        module.graph.erase_node(node)


def _merge(module: fx.GraphModule) -> None:
    """1x1 convolutions that read the same input, where nothing could have written to it in between."""
    alike = defaultdict[object, list[fx.Node]](list)
    for node, layer in _run_once(module).items():
        if type(layer) in LAYERS and type(layer) is not nn.Linear and {layer.groups, *layer.kernel_size} == {1}:
            form = type(layer), layer.stride, str(layer.padding), layer.padding_mode, layer.bias is None
            alike[node.args[0], *form].append(node)
    for number, nodes in enumerate(group for group in alike.values() if len(group) > 1):
        order = list(module.graph.nodes)
        if any(_writes(module, node) for node in order[order.index(nodes[0]) : order.index(nodes[-1])]):
            continue
        layers: list[Any] = [module.get_submodule(str(node.target)) for node in nodes]
        merged = copy.deepcopy(layers[0])
        merged.out_channels = sum(layer.out_channels for layer in layers)
        merged.weight = _constant(torch.cat([layer.weight for layer in layers]))
        if merged.bias is not None:
            merged.bias = _constant(torch.cat([layer.bias for layer in layers]))
        module.add_submodule(name := f"merged{number}", merged)
        with module.graph.inserting_before(nodes[0]):
            whole, start = module.graph.call_module(name, nodes[0].args), 0
        for node, layer in zip(nodes, layers, strict=True):
            with module.graph.inserting_before(node):
                part = module.graph.call_function(torch.narrow, (whole, 1, start, layer.out_channels))
            node.replace_all_uses_with(part)
            module.graph.erase_node(node)
            start += layer.out_channels


def _run_once(module: fx.GraphModule) -> dict[Any, Any]:
    """The modules that may be rewritten, by the node that calls them: there is one, and nobody looks inside."""
    nodes = module.graph.nodes
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    inside = {node.target.rpartition(".")[0] for node in nodes if node.op == "get_attr"}
    found = {
        node: module.get_submodule(node.target)
        for node in nodes
        if node.op == "call_module" and calls[node.target] == 1 and node.target not in inside
    }
    return {
        node: m
        for node, m in found.items()
        if not (m._forward_hooks or m._forward_pre_hooks or node.kwargs) and isinstance(node.args[0], fx.Node)
    }


def _writes(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether it may write to a tensor that others read: one that a layer has made for it alone is none."""
    if node.op == "call_module":
        called = module.get_submodule(str(node.target))
        writes = getattr(called, "inplace", not type(called).__module__.startswith("torch."))
    elif node.op == "call_function":
        flags = node.kwargs.get("inplace") or any(value is True for value in node.args)
        name = getattr(node.target, "__name__", "_")
        writes = flags or "out" in node.kwargs or node.target in IN_PLACE or name.endswith("_")
    else:
        writes = node.op == "call_method" and str(node.target).endswith("_")
    return bool(writes) and not all(_own(module, read) for read in node.all_input_nodes)


def _own(module: fx.GraphModule, node: fx.Node) -> bool:
    made = node.op == "call_module" and type(module.get_submodule(str(node.target))) in {*LAYERS, *NORMS}
    return made and len(node.users) == 1


def _folded(layer: Any, norm: Any) -> nn.Module:
    """The layer with the norm taken in; in double precision on the way, so that the weights are rounded once."""
    numbers = layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias
    w, b, mean, var, gamma, beta = (None if value is None else value.double() for value in numbers)
    weight, bias = fuse_conv_bn_weights(w, b, mean, var, norm.eps, gamma, beta)  # type: ignore[arg-type]
    whole = copy.deepcopy(layer)
    whole.weight, whole.bias = _constant(weight.to(layer.weight)), _constant(bias.to(layer.weight))
    return whole  # type: ignore[no-any-return]


def _constant(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach(), requires_grad=False)


def _rank(node: fx.Node) -> int:
    return len(node.meta["tensor_meta"].shape)


def _put(module: fx.GraphModule, node: fx.Node, layer: nn.Module) -> None:
    parent, _, name = str(node.target).rpartition(".")
    setattr(module.get_submodule(parent), name, layer)
