"""CUDA streams of workers, and reproducible results on GPUs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedsim.base.modes import keep_flags


def new_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream for a worker on a GPU, whose results are reproducible from then on; None on a CPU."""
    if device.type != "cuda":
        return None
    make_gpus_deterministic()
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Run the code inside on `stream`: after the default stream, which holds the broadcast, and until it is done.

    It waits for the end after an error, too, because memory that is freed may go to another stream. Backward
    passes run in the calling thread, not in the thread that all workers of a GPU share. Not yet tested on a GPU.
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


def make_gpus_deterministic() -> None:
    """Make CUDA's libraries use deterministic kernels; torch warns if an operation has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # The last one would cost one kernel for each allocation.
    keep_flags(benchmark=False, determinism=1, fill_uninitialized_memory=False)
