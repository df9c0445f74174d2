"""Streams of workers on GPUs, and results that repeat there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def new_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A worker's, on a GPU, which from then on repeats its results."""
    if device.type != "cuda":
        return None
    repeat_on_gpus()
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """What is computed inside waits for the default stream, which has the broadcast, and is done at the end.

    After an error too, which frees memory that another stream may be given. Backward passes are in the calling
    thread, and not in one that all of a GPU's workers share. Not yet seen to run on a GPU.
    """
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.default_stream(stream.device))
    with torch.cuda.stream(stream), torch.autograd.set_multithreading_enabled(False):
        try:
            yield
        finally:
            stream.synchronize()


def repeat_on_gpus() -> None:
    """Have CUDA's libraries choose kernels that give the same bits each time; torch warns where there is none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Which that turns on, at the price of a kernel an allocation.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
