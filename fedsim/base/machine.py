"""The machine: cores, devices, memory."""

import os
import platform
from contextlib import suppress


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_name() -> str:
    """The processor's model, such as AMD EPYC."""
    with suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    return f"{platform.machine()} {platform.processor()}"


def memory() -> int:
    """What this machine has, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gigabytes(count: int) -> str:
    """A number of bytes, in words."""
    return f"{count / 2**30:,.1f} GiB"
