"""A trial of a network before training: whether it fits the data, and whether all that it keeps is known."""

import copy
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedsim.base.devices import one_thread
from fedsim.base.global_draws import global_states, globals_kept
from fedsim.errors import ConfigError, located
from fedsim.training.draws import KeyedDraws

CPU = torch.device("cpu")
OWN_TENSORS = ("_parameters", "_buffers", "_modules")  # of a module's attributes, those that nn.Module knows
TRAINED_TYPES = (torch.float32, torch.float64)
STATE = "state that is neither a parameter nor a buffer, and that clients would share"


class Findings(NamedTuple):
    """What the trial of a network found."""

    draws: bool  # whether a pass draws random numbers
    moved: set[str]  # the buffers that a training pass changes
    reassigned: set[str]  # the buffers to which a pass assigns another tensor
    examples: Tensor  # (n, *shape), those of the trial


def copied(network: nn.Module) -> nn.Module:
    """A deep copy; tensors that were computed from parameters, as by the old weight_norm, are detached in it."""
    found = chain.from_iterable(tensors_in(_attributes(module)) for module in network.modules())
    return copy.deepcopy(network, {id(t): t.detach().clone() for _, t in found if not t.is_leaf})


def heads(output: Any) -> tuple[Tensor, ...]:
    """The outputs of all heads, the main head first; a head that is None is switched off."""
    return tuple(head for head in output if head is not None) if isinstance(output, tuple) else (output,)


def check_trained(parameters: dict[str, nn.Parameter]) -> None:
    """Raise ConfigError unless the trained parameters are dense, in memory and of one type that training keeps."""
    if not parameters:
        raise ConfigError("model: has no parameter that requires a gradient")
    first, parameter = next(iter(parameters.items()))
    for name, other in parameters.items():
        if other.dtype != parameter.dtype:
            types = f"{first} is {_type(parameter)} and {name} is {_type(other)}"
            raise ConfigError(f"model: {types}; trained parameters need one type, for example by .float()")
        if other._backward_hooks or getattr(other, "_post_accumulate_grad_hooks", None):
            raise ConfigError(f"model: {name} has a gradient hook, which copies lose; let forward do its work")
        if other.is_meta or other.layout != torch.strided:
            where = "on the meta device" if other.is_meta else "sparse"
            raise ConfigError(f"model: {name} is {where}; trained parameters are dense and have values")
    if parameter.dtype not in TRAINED_TYPES:
        raise ConfigError(
            f"model: {first} is {_type(parameter)}; trained parameters should be float32 or float64, for example "
            "by .float(); local.precision=bf16 computes in 16 bits"
        )


def probe(network: nn.Module, shape: tuple[int, ...], classes: int, examples: Tensor | None = None) -> Findings:
    """Try the network on a few `examples` (n, *shape) as clients get them, by default on random ones.

    Raises ConfigError if the network does not fit the data, if it draws from a generator that fedsim cannot
    replace, or if a pass depends on earlier passes by more than parameters and buffers. Neither the network nor a
    global generator is changed.
    """
    if examples is None:
        examples = torch.randn(16, *shape, generator=torch.Generator().manual_seed(0))
    check_trained({n: p for n, p in network.named_parameters() if p.requires_grad})
    if any(isinstance(m, torch.jit.ScriptModule) and [*m.buffers()] for m in network.modules()):
        raise ConfigError("model: is TorchScript with buffers; give the nn.Module that it was made from")
    try:
        with one_thread(), globals_kept:
            return _tried(network, examples[torch.arange(max(len(examples) // 2 * 2, 4)) % len(examples)], classes)
    except ConfigError:
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ConfigError(f"model: cannot take examples of shape {shape}: {located(error)}") from error


def _tried(network: nn.Module, examples: Tensor, classes: int) -> Findings:
    """Each of two copies must give the same whatever passes were before, of its own or of the other."""
    try:
        one, other = (_Copy(network, classes) for _ in range(2))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ConfigError(f"model: cannot be copied for clients that train at once: {located(error)}") from error
    a, b = torch.tensor_split(examples.to(one.dtype), 2)
    first, second = one.passes(a, original=network), other.passes(b, shifted=True)
    pairs = (second, one.passes(b, shifted=True)), (first, one.passes(a))
    if one.draws_globally:
        raise ConfigError(
            "model: draws from a global generator, which threads share; use nn.Dropout, F.dropout or "
            "torch.rand, which fedsim seeds by client; it cannot seed dropout inside attention, numpy or random"
        )
    for before, after in pairs:
        _check_equal(before, after)
    return Findings(one.draws.used, one.moved | other.moved, one.reassigned | other.reassigned, torch.cat([a, b]))


class _Passes(NamedTuple):
    """What a training and an evaluation pass give, and the tensors among the modules' attributes after these."""

    outputs: list[Tensor]  # of both, and the gradients and the buffers after the first
    attributes: dict[str, Tensor]


class _Copy:
    """A copy of the network; each pass starts from the same parameters and buffers, as clients do."""

    def __init__(self, network: nn.Module, classes: int):
        self.network, self.classes = copied(network).train(), classes
        self.draws = KeyedDraws(torch.Generator())
        self.parameters = dict(self.network.named_parameters())
        self.dtype = next(p.dtype for p in self.parameters.values() if p.requires_grad)
        self.buffers = [
            (name, owner, key, buffer)
            for path, owner in self.network.named_modules()
            for key, buffer in owner._buffers.items()
            if buffer is not None
            for name in [f"{path}.{key}".lstrip(".")]
        ]
        self.initial = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.initial |= {name: buffer.clone() for name, _, _, buffer in self.buffers}
        self.moved, self.reassigned = set[str](), set[str]()
        self.global_draws: dict[bool, list[bool]] = {True: [], False: []}  # by mode, whether each pass drew

    @property
    def draws_globally(self) -> bool:
        """Whether all passes of a mode moved a global generator; in a single one, another thread may have."""
        return any(map(all, self.global_draws.values()))

    def passes(self, x: Tensor, *, shifted: bool = False, original: nn.Module | None = None) -> _Passes:
        """A training and an evaluation pass at the initial parameters, or at `shifted` ones in the other order.

        So each kind of pass follows itself, at other parameters and examples. With the `original` network, it also
        checks which tensors get a gradient.
        """
        outputs = dict[bool, list[Tensor]]()
        for train in (False, True) if shifted else (True, False):
            before = global_states(CPU)
            with torch.set_grad_enabled(train):
                found = self._pass(x, train, shifted)
                if train and original:
                    self._check_leaves(found, original)
                gradients = self._gradients(found) if train else []
            self.global_draws[train].append(before != global_states(CPU))
            self._compare(train, shifted)
            buffers = [buffer.clone() for buffer in self.network.buffers()] if train else []
            outputs[train] = [head.detach().clone() for head in found] + gradients + buffers
        attributes = {
            f"{attribute} of {path or 'the network'}": tensor.detach().clone()
            for path, module in self.network.named_modules()
            for attribute, tensor in tensors_in(_attributes(module))
        }
        return _Passes(outputs[True] + outputs[False], attributes)

    def _check_leaves(self, outputs: tuple[Tensor, ...], original: nn.Module) -> None:
        """Raise ConfigError unless parameters of this copy get a gradient, and no tensor of others gets one."""
        if not outputs[0].requires_grad:
            raise ConfigError("model: its output has no gradient; does forward detach it, or run under no_grad?")
        own = {parameter.data_ptr() for parameter in self.parameters.values()}
        scripted = any(isinstance(module, torch.jit.ScriptModule) for module in self.network.modules())
        foreign = {t.data_ptr() for t in _leaves(outputs)} - own
        if foreign and not scripted:  # the leaves of a copy of TorchScript are said to be the original's
            names = (name for name, p in original.named_parameters() if p.data_ptr() in foreign)
            where = next((f", {name} of the original" for name in names), "")
            raise ConfigError(
                f"model: a copy computes with a tensor that requires a gradient and is not its parameter{where}; "
                "a lambda or hook may hold it, or a list that should be an nn.ModuleList or nn.ParameterList"
            )

    def _gradients(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """The gradients of the trained parameters that have one; raises ConfigError where one is sparse."""
        trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        total = sum(head.double().square().sum() for head in outputs)
        gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)  # type: ignore[arg-type]
        for name, gradient in zip(trained, gradients, strict=True):
            if gradient is not None and gradient.layout != torch.strided:
                raise ConfigError(f"model: {name} has a sparse gradient; use sparse=False")
        return [gradient for gradient in gradients if gradient is not None]

    def _pass(self, x: Tensor, train: bool, shifted: bool) -> tuple[Tensor, ...]:
        self._restore(shifted)
        if self.network.training != train:
            self.network.train(train)
        self.draws.generator.manual_seed(0)
        with self.draws:
            output = self.network(x)
        return self._checked(output, len(x), train)

    def _start(self, name: str, shifted: bool) -> Tensor:
        moves = shifted and self.parameters[name].requires_grad
        return self.initial[name] * 1.25 + 0.03 if moves else self.initial[name]

    def _restore(self, shifted: bool) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if parameter.requires_grad:
                    parameter.copy_(self._start(name, shifted))
            for name, owner, key, buffer in self.buffers:
                owner._buffers[key] = buffer
                buffer.copy_(self.initial[name])

    def _compare(self, train: bool, shifted: bool) -> None:
        """Find the buffers that a pass moved or reassigned; raise ConfigError for other changes."""
        now = dict(self.network.named_parameters())
        for name, parameter in self.parameters.items():
            if now.get(name) is not parameter or not _same(parameter, self._start(name, shifted)):
                raise ConfigError(f"model: a pass changes the parameter {name}; register_buffer keeps state")
        known = {(id(owner), key) for _, owner, key, _ in self.buffers}
        for module in self.network.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None and (id(module), key) not in known:
                    raise ConfigError(f"model: a pass makes the buffer {key}; make it in the constructor")
        for name, owner, key, kept in self.buffers:
            buffer, initial = owner._buffers.get(key), self.initial[name]
            if buffer is None or (buffer.shape, buffer.dtype) != (initial.shape, initial.dtype):
                raise ConfigError(f"model: a pass changes the shape or type of the buffer {name}; keep both")
            if buffer is not kept:
                self.reassigned.add(name)
            if train and not _same(buffer, initial):
                self.moved.add(name)

    def _checked(self, output: Any, count: int, train: bool) -> tuple[Tensor, ...]:
        """The outputs of all heads; raises ConfigError unless they are logits."""
        wanted = f"should give logits ({count}, {self.classes}) for {count} examples"
        outputs = heads(output)
        if not outputs or not all(isinstance(head, Tensor) for head in outputs):
            kinds = [type(head).__name__ for head in outputs]
            kind = type(output).__name__ if not isinstance(output, tuple) else f"a tuple of {', '.join(kinds)}"
            raise ConfigError(f"model: forward gives {kind}; it {wanted}, as one tensor")
        for head in outputs:
            if tuple(head.shape) != (count, self.classes):
                several, only = (
                    (f"{len(outputs)} tensors, one of them ", " only") if len(outputs) > 1 else ("", "")
                )
                raise ConfigError(
                    f"model: gives {several}{tuple(head.shape)} for {count} examples; "
                    f"{self.classes} classes need ({count}, {self.classes}){only}"
                )
            if not head.is_floating_point():
                raise ConfigError(f"model: gives {_type(head)}; it {wanted}, as floating-point numbers")
        if len(outputs) > 1 and not train:
            raise ConfigError(
                f"model: gives {len(outputs)} tensors also in eval mode; return the logits only (further tensors "
                "count as auxiliary heads, and only where eval mode gives one tensor)"
            )
        return outputs


def _check_equal(before: _Passes, after: _Passes) -> None:
    """Raise ConfigError unless two pairs of passes that started alike ended alike."""
    shared = before.attributes.keys() & after.attributes.keys()
    moved = [name for name in sorted(shared) if not _same(before.attributes[name], after.attributes[name])]
    if moved:
        raise ConfigError(f"model: attribute {moved[0]} is {STATE}; register_buffer makes it a part of the model")
    if len(before.outputs) != len(after.outputs) or not all(map(_same, before.outputs, after.outputs)):
        raise ConfigError(
            f"model: its output, gradient or buffers depend on earlier passes, by {STATE}: an attribute, a global "
            "variable, or one of a function such as a hook; register_buffer makes a tensor a part of the model"
        )


def tensors_in(value: Any, at: str = "", depth: int = 4) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dictionaries, lists and tuples, each with its place."""
    if isinstance(value, Tensor):
        yield at, value
    elif depth and isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in list(items):
            yield from tensors_in(part, f"{at}[{key!r}]" if at else str(key), depth - 1)


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in OWN_TENSORS}


def _leaves(outputs: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """The tensors to which a backward pass would give a gradient."""
    nodes, seen = [output.grad_fn for output in outputs], set[Any]()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            yield variable
        nodes += [following for following, _ in node.next_functions]


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal to the bit, up to the bits of NaN."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
