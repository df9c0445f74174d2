"""Where PyTorch computes: devices, and threads within an operation."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedsim.errors import ConfigError


@contextmanager
def one_thread() -> Iterator[None]:
    """One intra-op thread, in which CPU results do not depend on the machine's number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def devices(name: str, at: str = "runtime.device") -> list[torch.device]:
    """`auto` is every GPU, or the CPU; otherwise the device of that name. Raises ConfigError naming `at`."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return [torch.device("cuda", i) for i in range(gpus)] or [torch.device("cpu")]
    allowed = ["auto", "cpu", *(["cuda"] if gpus else []), *(f"cuda:{i}" for i in range(gpus))]
    if name not in allowed:
        raise ConfigError(f"{at}: {name!r} is not on this machine; allowed: {', '.join(allowed)}")
    return [torch.device("cuda", 0) if name == "cuda" else torch.device(name)]
