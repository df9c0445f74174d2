"""Facts about this machine: cores, processor, memory."""

import os
import platform
from contextlib import suppress

from fedsim.errors import ConfigError


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_name() -> str:
    """The processor's model, such as "AMD EPYC"."""
    with suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    return f"{platform.machine()} {platform.processor()}"


def memory() -> int:
    """The physical memory of this machine, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(what: str, needed: int, way_out: str) -> None:
    """Raise ConfigError where `what`, which begins with a config key, needs more bytes than this machine has."""
    if needed > memory():
        raise ConfigError(
            f"{what} {gigabytes(needed)} of memory, but this machine has {gigabytes(memory())}; {way_out}"
        )


def gigabytes(count: int) -> str:
    """`count` bytes as text, such as "1.5 GiB"."""
    return f"{count / 2**30:,.1f} GiB"
