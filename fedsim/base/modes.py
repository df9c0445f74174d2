"""PyTorch's modes and flags: inside fedsim they are those of a new process, and afterwards those of the caller.

All of these change results. Some belong to a thread, such as autocast, and some to the process, such as the type
of new tensors. Anomaly detection changes no result, and is left as it is.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch._C import _len_torch_function_stack
from torch.overrides import _pop_mode, _push_mode
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack


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


class _Process:
    """The flags of the process, for the time in which any thread is inside fedsim."""

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.own = [value for _, _, value in FLAGS]
        self.callers = list[object]()

    @contextmanager
    def flags(self) -> Iterator[None]:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.callers = self.values()
                self.set(self.own)
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1
                if not self.inside:
                    self.set(self.callers)

    def keep(self, values: dict[str, object]) -> None:
        with self.lock:
            self.own = [values.get(name, own) for (_, name, _), own in zip(FLAGS, self.own, strict=True)]
            now = self.values()
            self.set([values.get(name, value) for (_, name, _), value in zip(FLAGS, now, strict=True)])

    def values(self) -> list[object]:
        return [getattr(owner, name) for owner, name, _ in FLAGS]

    def set(self, values: list[object]) -> None:
        for (owner, name, _), value in zip(FLAGS, values, strict=True):
            setattr(owner, name, value)


_process = _Process()


@contextmanager
def own_modes() -> Iterator[None]:
    """Run the code inside with the flags and modes of a new process; then restore those of the caller.

    While one thread is inside, another that enters finds the flags set, and the last one out restores them.
    """
    with _process.flags(), own_thread_modes():
        yield


@contextmanager
def own_thread_modes() -> Iterator[None]:
    """The part of `own_modes` that belongs to a thread, such as gradients, autocast and the default device."""
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
    _process.keep(values)
