"""Where PyTorch computes: the devices, and the number of threads within one operation."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedsim.errors import ConfigError


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit PyTorch to one intra-op thread, so that CPU results do not depend on the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def devices(name: str, at: str = "runtime.device") -> list[torch.device]:
    """The devices of `runtime.device`: with `auto` every GPU, or the CPU where there is none; else the one named.

    Raises ConfigError, which begins with the key `at`, for a device that this machine does not have.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return [torch.device("cuda", i) for i in range(gpus)] or [torch.device("cpu")]
    allowed = ["auto", "cpu", *(["cuda"] if gpus else []), *(f"cuda:{i}" for i in range(gpus))]
    if name not in allowed:
        raise ConfigError(f"{at}: {name!r} is not on this machine; allowed: {', '.join(allowed)}")
    return [torch.device("cuda", 0) if name == "cuda" else torch.device(name)]
