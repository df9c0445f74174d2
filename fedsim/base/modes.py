"""PyTorch's modes and flags: inside fedsim they are those of a new process, and afterwards those of the caller.

All of these change results. Some belong to a thread, such as autocast, and some to the process, such as the type
of new tensors. Anomaly detection changes no result, and is left as it is.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch._C import _len_torch_function_stack
from torch.overrides import _pop_mode, _push_mode
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from fedsim.base.global_draws import Shared, globals_kept

ERRORS = {"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn"}  # numpy's, in a new process


def _matmul_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # if it contradicts the `fp32_precision` of a backend, which is what counts
        return "highest"


class _Settings:
    """What torch gives two functions for, as attributes."""

    dtype = property(lambda self: torch.get_default_dtype(), lambda self, value: torch.set_default_dtype(value))
    matmul = property(
        lambda self: _matmul_precision(), lambda self, value: torch.set_float32_matmul_precision(value)
    )
    determinism = property(
        lambda self: torch.get_deterministic_debug_mode(),
        lambda self, value: torch.set_deterministic_debug_mode(value),
    )


backends: Any = torch.backends
# The flags of a process, and their values in a new one. `matmul` sets others, and a backend those of its parts.
FLAGS: list[tuple[Any, str, object]] = [
    (_Settings(), "dtype", torch.float32),
    (_Settings(), "matmul", "highest"),
    (_Settings(), "determinism", 0),
    (torch.utils.deterministic, "fill_uninitialized_memory", True),
    (backends, "fp32_precision", "none"),
    (backends.cudnn, "fp32_precision", "none"),
    (backends.mkldnn, "fp32_precision", "none"),
    (backends.cuda.matmul, "fp32_precision", "none"),
    (backends.cudnn.conv, "fp32_precision", "tf32"),
    (backends.cudnn.rnn, "fp32_precision", "tf32"),
    (backends.mkldnn.matmul, "fp32_precision", "none"),
    (backends.mkldnn.conv, "fp32_precision", "none"),
    (backends.mkldnn.rnn, "fp32_precision", "none"),
    (backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", True),
    (backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", True),
    (backends.cuda.matmul, "allow_fp16_accumulation", False),
    (backends.cudnn, "enabled", True),
    (backends.cudnn, "benchmark", False),
    (backends.cudnn, "deterministic", False),
    (backends.mkldnn, "enabled", True),
    (backends.opt_einsum, "enabled", backends.opt_einsum.is_available()),
]


class _Flags:
    """The flags of the process: those that fedsim sets, by place in FLAGS."""

    def __init__(self) -> None:
        self.own = [value for _, _, value in FLAGS]

    @contextmanager
    def set_own(self) -> Iterator[None]:
        callers = self.values()
        self.set(self.own)
        try:
            yield
        finally:
            self.set(callers)

    def keep(self, kept: dict[str, object]) -> None:
        self.own = [kept.get(name, own) for (_, name, _), own in zip(FLAGS, self.own, strict=True)]
        self.set([kept.get(name, now) for (_, name, _), now in zip(FLAGS, self.values(), strict=True)])

    def values(self) -> list[object]:
        return [getattr(owner, name) for owner, name, _ in FLAGS]

    def set(self, values: list[object]) -> None:
        for (owner, name, _), value in zip(FLAGS, values, strict=True):
            setattr(owner, name, value)


_flags = _Flags()
_own_flags = Shared(_flags.set_own)


@contextmanager
def own_modes() -> Iterator[None]:
    """Run the code inside with the flags and modes of a new process.

    Then restore those of the caller, and the global random generators. While one thread is inside, another that
    enters finds the flags set, and the last one out restores them.
    """
    with _own_flags, globals_kept, own_thread_modes():
        yield


@contextmanager
def own_thread_modes() -> Iterator[None]:
    """The part of `own_modes` that belongs to a thread, such as gradients, autocast and the default device."""
    others = _callers_modes()
    if not others:
        yield
        return
    with ExitStack() as entered:
        for mode in others:
            entered.enter_context(mode())
        yield


def _callers_modes() -> list[Callable[[], AbstractContextManager[Any]]]:
    """The contexts that are needed to undo the modes of this thread; to ask is much faster than to enter them."""
    needed: dict[Callable[[], AbstractContextManager[Any]], bool] = {
        without_function_modes: _len_torch_function_stack() > 0,
        _disable_current_modes: bool(_get_current_dispatch_mode_stack()),
        partial(torch.inference_mode, False): torch.is_inference_mode_enabled(),
        torch.enable_grad: not torch.is_grad_enabled() or torch.is_inference_mode_enabled(),
        partial(torch.autocast, "cpu", enabled=False): torch.is_autocast_enabled("cpu"),
        partial(torch.autocast, "cuda", enabled=False): torch.is_autocast_enabled("cuda"),
        _warnings_of_numpy: np.geterr() != ERRORS,
        _denormals_kept: flushes_denormals(),
    }
    return [context for context, used in needed.items() if used]


def _warnings_of_numpy() -> np.errstate:
    return np.errstate(divide="warn", over="warn", under="ignore", invalid="warn")


@contextmanager
def _denormals_kept() -> Iterator[None]:
    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        torch.set_flush_denormal(True)


@contextmanager
def without_function_modes() -> Iterator[None]:
    """Run the code inside without the TorchFunctionModes that are active in this thread, each of which costs time.

    The default device of torch is one of them.
    """
    modes = [_pop_mode() for _ in range(_len_torch_function_stack())]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)  # type: ignore[no-untyped-call]


def flushes_denormals() -> bool:
    """Whether this thread's processor takes numbers below 1e-308 for zero; torch has no function that tells."""
    return sys.float_info.min / 2 == 0


def keep_flags(**values: object) -> None:
    """Set flags of FLAGS, by their names, now and wherever fedsim runs in this process from now on."""
    _flags.keep(values)
