"""PyTorch's modes and flags: inside fedsim they are those of a new process, and afterwards those of the caller.

All of these change results. Some belong to a thread, such as autocast, and some to the process, such as the type
of new tensors. Anomaly detection changes no result, and is left as it is.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
            if getattr(owner, name) != value:
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
def own_thread_modes(*, always: bool = False) -> Iterator[None]:
    """The part of `own_modes` that belongs to a thread, such as gradients, autocast and the default device.

    With `always`, also what the code inside has left behind is undone where the thread was as a new one.
    """
    if not always and _thread_is_new():
        yield
        return
    with ExitStack() as entered:
        enter: Callable[[Any], Any] = entered.enter_context
        enter(without_function_modes())
        if _get_current_dispatch_mode_stack():
            enter(_disable_current_modes())
        enter(torch.inference_mode(False))
        enter(torch.enable_grad())
        enter(torch.autocast("cpu", enabled=False))
        enter(torch.autocast("cuda", enabled=False))
        enter(np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"))
        if flushes_denormals():
            torch.set_flush_denormal(False)
            entered.callback(torch.set_flush_denormal, True)
        yield


def _thread_is_new() -> bool:
    """Whether this thread's modes are those of a new one; to ask takes a tenth of the time of entering them."""
    return (
        not _len_torch_function_stack()
        and not _get_current_dispatch_mode_stack()
        and not torch.is_inference_mode_enabled()
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.is_autocast_enabled("cuda")
        and np.geterr() == ERRORS
        and not flushes_denormals()
    )


class without_function_modes:  # noqa: N801 - used as a function; `contextmanager` would take twice the time
    """Run the code inside without the TorchFunctionModes that are active in this thread, each of which costs time.

    The default device of torch is one of them.
    """

    def __enter__(self) -> None:
        self.modes = [_pop_mode() for _ in range(_len_torch_function_stack())]  # type: ignore[no-untyped-call]

    def __exit__(self, *error: object) -> None:
        for mode in reversed(self.modes):
            _push_mode(mode)  # type: ignore[no-untyped-call]


def flushes_denormals() -> bool:
    """Whether this thread's processor takes numbers below 1e-308 for zero; torch has no function that tells."""
    return sys.float_info.min / 2 == 0


def keep_flags(**values: object) -> None:
    """Set flags of FLAGS, by their names, now and wherever fedsim runs in this process from now on."""
    _flags.keep(values)
