"""Inception V3: blocks of three or four parallel branches with different kernel sizes.

Szegedy et al., Rethinking the Inception Architecture for Computer Vision, CVPR 2016,
https://arxiv.org/abs/1512.00567, Table 1. The network is torchvision's, so that its weights fit if `aux` is true.

Differs: for small images, the first convolution has stride 1 and the stem has no pools, so that 32 pixels reach
the first block as 26 x 26 and end as 5 x 5. torchvision's `pretrained` weights expect pixels from -1 to 1; when
they are loaded, the first layer is changed for images with ImageNet's normalisation.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils._python_dispatch import any_torch_dispatch_mode_on_stack
from torchvision.models import inception

from fedsim.errors import ConfigError
from fedsim.models import Stem, image_shape, is_small, reference

Branch = Callable[[Tensor], Tensor]
# The smallest images in pixels a side, by whether the stem is the one for small images: they leave one pixel for
# the last block, and with an auxiliary head, whose pool and convolution are 5 wide, 17 pixels for that head.
SMALLEST = {True: 13, False: 75}
SMALLEST_AUX = {True: 41, False: 299}


@reference((3, 299, 299), 1000, 23_834_568)
def inception_v3(
    shape: tuple[int, ...],
    classes: int,
    /,
    *,
    aux: bool = False,
    parallel: bool = False,
    stem: Stem = "auto",
) -> nn.Module:
    """Inception V3 (Szegedy 2016): eleven blocks of parallel branches.

    With `aux` there is a second classifier after the eighth block, and 27,161,264 parameters in all. In training
    the network then returns a pair (logits, auxiliary logits), each (B, classes), and the engine adds 0.4 times
    the loss of the second.

    With `parallel` the branches of a block run at the same time and give the same bits: on CUDA in streams, on a
    CPU in threads, in the forward and the backward pass. With two busy cores the threads took 8 % more time at 96
    pixels and 4 % more at 128 (batches of 8, one intra-op thread, 69 steps of each in turn), so they help only
    where cores are idle. The branches run one after the other under activation checkpointing, and when the network
    is traced, exported, or its operations are counted.

    Raises ConfigError for anything but images of at least 75 pixels a side (with the small stem 13), or with `aux`
    299 (41).
    """
    small = is_small(image_shape(shape, "inception_v3", smallest=1), stem)
    channels, *sides = image_shape(shape, "inception_v3", SMALLEST[small])
    if aux and min(sides) < SMALLEST_AUX[small]:
        raise ConfigError(
            f"model.aux: the auxiliary head needs images of at least {SMALLEST_AUX[False]} pixels a side, or with "
            f"`stem: small` {SMALLEST_AUX[True]}; the examples have shape {shape}"
        )
    blocks = [inception.BasicConv2d, *(PARALLEL if parallel else SEQUENTIAL), inception.InceptionAux]
    network = inception.Inception3(classes, aux, inception_blocks=blocks, init_weights=True)
    first = nn.Conv2d(channels, 32, 3, stride=1 if small else 2, bias=False)
    nn.init.trunc_normal_(first.weight, std=0.1)  # as in torchvision
    network.Conv2d_1a_3x3.conv = first
    if small:
        network.maxpool1 = network.maxpool2 = nn.Identity()
    return network  # type: ignore[no-any-return]


class ParallelA(inception.InceptionA):  # type: ignore[misc]
    """The blocks at 35 x 35 pixels, for an image of 299."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        return concurrently(
            self,
            x,
            self.branch1x1,
            chain(self.branch5x5_1, self.branch5x5_2),
            chain(self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3),
            chain(average, self.branch_pool),
        )


class ParallelB(inception.InceptionB):  # type: ignore[misc]
    """The block that reduces 35 x 35 to 17 x 17 pixels (Figure 10)."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        return concurrently(
            self,
            x,
            self.branch3x3,
            chain(self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3),
            halve,
        )


class ParallelC(inception.InceptionC):  # type: ignore[misc]
    """The blocks at 17 x 17 pixels (Figure 6, with n = 7)."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        double = (self.branch7x7dbl_2, self.branch7x7dbl_3, self.branch7x7dbl_4, self.branch7x7dbl_5)
        return concurrently(
            self,
            x,
            self.branch1x1,
            chain(self.branch7x7_1, self.branch7x7_2, self.branch7x7_3),
            chain(self.branch7x7dbl_1, *double),
            chain(average, self.branch_pool),
        )


class ParallelD(inception.InceptionD):  # type: ignore[misc]
    """The block that reduces 17 x 17 to 8 x 8 pixels."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        return concurrently(
            self,
            x,
            chain(self.branch3x3_1, self.branch3x3_2),
            chain(self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3, self.branch7x7x3_4),
            halve,
        )


class ParallelE(inception.InceptionE):  # type: ignore[misc]
    """The blocks at 8 x 8 pixels, in which two branches fork (Figure 7)."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        return concurrently(
            self,
            x,
            self.branch1x1,
            chain(self.branch3x3_1, fork(self.branch3x3_2a, self.branch3x3_2b)),
            chain(self.branch3x3dbl_1, self.branch3x3dbl_2, fork(self.branch3x3dbl_3a, self.branch3x3dbl_3b)),
            chain(average, self.branch_pool),
        )


SEQUENTIAL = [
    inception.InceptionA,
    inception.InceptionB,
    inception.InceptionC,
    inception.InceptionD,
    inception.InceptionE,
]
PARALLEL = [ParallelA, ParallelB, ParallelC, ParallelD, ParallelE]

average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1)
halve = partial(F.max_pool2d, kernel_size=3, stride=2)


def chain(*layers: Branch) -> Branch:
    """The layers one after the other."""
    return lambda x: reduce(lambda y, layer: layer(y), layers, x)


def fork(*layers: Branch) -> Branch:
    """The layers on the same input, with their outputs concatenated by channel."""
    return lambda x: torch.cat([layer(x) for layer in layers], 1)


def concurrently(block: nn.Module, x: Tensor, *branches: Branch) -> list[Tensor]:
    """The outputs of the branches of a block for `x`, computed at the same time, with the same bits as in turn."""
    if _is_observed(x) or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return [branch(x) for branch in branches]
    if x.is_cuda:
        return _in_streams(branches, x)  # autograd runs the backward pass in the same streams
    parameters = [p for p in block.parameters() if p.requires_grad]
    if torch.is_grad_enabled() and (parameters or x.requires_grad):
        return list(ParallelBranches.apply(branches, x, *parameters))
    return _in_threads(lambda branch: branch(x), branches)


def _is_observed(x: Tensor) -> bool:
    """Whether something observes operations or saved tensors, and would miss those of other threads."""
    return (
        type(x) is not Tensor  # a proxy of torch.fx or torch.export
        or x.is_meta
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or any_torch_dispatch_mode_on_stack()  # such as FlopCounterMode
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # such as checkpoint's
    )


class ParallelBranches(torch.autograd.Function):
    """Runs branches in threads, in the backward pass too; autograd itself uses only one thread on a CPU."""

    @staticmethod
    def forward(ctx: Any, branches: Sequence[Branch], x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.inputs = [x.detach().requires_grad_(x.requires_grad) for _ in branches]
        ctx.parameters = parameters
        with torch.enable_grad():
            ctx.outputs = _in_threads(lambda branch, x: branch(x), branches, ctx.inputs)
        return tuple(output.detach() for output in ctx.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        def back(x: Tensor, output: Tensor, gradient: Tensor) -> tuple[Tensor | None, ...]:
            if not output.requires_grad:
                return (None,) * (1 + len(ctx.parameters))
            wanted = (x, *ctx.parameters) if x.requires_grad else ctx.parameters
            found = torch.autograd.grad(output, wanted, gradient, allow_unused=True)
            return found if x.requires_grad else (None, *found)

        found = _in_threads(back, ctx.inputs, ctx.outputs, gradients)
        return None, *map(_sum, zip(*found, strict=True))


def _sum(gradients: Sequence[Tensor | None]) -> Tensor | None:
    """The sum from the last branch to the first, the order in which autograd adds them in one thread."""
    found = [gradient for gradient in reversed(gradients) if gradient is not None]
    return reduce(torch.add, found) if found else None


def _in_threads(task: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
    """Like `map`, but each call runs in a thread of the pool, in this thread's autograd and autocast modes."""
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    dtype, autocast = torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")

    def run(*own: Any) -> Any:
        with (
            torch.inference_mode(inference),
            torch.set_grad_enabled(grad),
            torch.autocast("cpu", dtype, autocast),
        ):
            return task(*own)

    return list(_pool().map(run, *arguments))


@cache
def _pool() -> ThreadPoolExecutor:
    """A pool of one thread for each core; each has one intra-op thread, like the clients of a runtime."""
    return ThreadPoolExecutor(os.cpu_count(), "branch", initializer=partial(torch.set_num_threads, 1))


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def _in_streams(branches: Sequence[Branch], x: Tensor) -> list[Tensor]:
    here, outputs = torch.cuda.current_stream(x.device), []
    # High priority makes them other streams than the workers', in one of which a graph may be captured just now.
    streams = [torch.cuda.Stream(x.device, priority=-1) for _ in branches]  # type: ignore[no-untyped-call]
    for branch, stream in zip(branches, streams, strict=True):
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            outputs.append(branch(x))
        x.record_stream(stream)  # so that its memory is not reused while that stream may still read it
    for output, stream in zip(outputs, streams, strict=True):
        here.wait_stream(stream)
        output.record_stream(here)
    return outputs
