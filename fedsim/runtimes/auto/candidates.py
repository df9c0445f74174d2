"""Which runtimes are worth a try on a device, with how many workers and chunks of which size."""

import os
import sys
from math import ceil
from typing import Any

from fedsim.base.catalogue import Spec
from fedsim.base.devices import devices
from fedsim.base.machine import cores
from fedsim.runtimes import RUNTIMES

CHUNKS = {"cpu": (4, 16), "cuda": (32, 128)}  # clients that a vectorized worker trains as one: few and many
MOST = 256  # clients of a cohort that are looked at


def enough(device: str) -> int:
    """Clients of a cohort that keep any candidate busy, or that many as are looked at."""
    return min(MOST, max(CHUNKS[devices(device)[0].type]) * _units(device))


def candidate_specs(device: str, clients: int, *, exact: bool) -> list[Spec]:
    """The reference, and then what may be faster for cohorts of so many `clients` or more, by likelihood.

    Of `exact` ones, or of all. Ray is among them where the user has a cluster: one is joined, and never started.
    """
    threads = [{"name": "threads", "workers": workers, "device": device} for workers in _workers(device, clients)]
    found: list[Spec] = [{"name": "serial", "device": device}, *threads[:1]]
    kind, units = devices(device)[0].type, _units(device)
    if "vectorized" in RUNTIMES.entries and not exact:
        few, many = CHUNKS[kind]
        many = min(many, ceil(clients / units))
        # A number of workers and not `auto`, for who is whose neighbour shows in the last bits.
        vectorized = {"name": "vectorized", "workers": units, "device": device}
        found += [vectorized | {"chunk": chunk} for chunk in ((many, few) if 2 * few <= many else (many,))]
    found += threads[1:]
    if "ray" in RUNTIMES.entries and kind == "cpu" and ray_is_there():
        found.append({"name": "ray", "address": None if _has_joined() else os.environ["RAY_ADDRESS"]})
    return found


def ray_is_there() -> bool:
    """Whether this process has joined a Ray cluster, or the environment names one."""
    return _has_joined() or bool(os.environ.get("RAY_ADDRESS"))


def _has_joined() -> bool:
    ray: Any = sys.modules.get("ray")
    return bool(ray and ray.is_initialized())


def _units(device: str) -> int:
    """Cores, or GPUs."""
    found = devices(device)
    return cores() if found[0].type == "cpu" else len(found)


def _workers(device: str, clients: int) -> list[int | str]:
    """Of threads, the most likely first; on a GPU that is as many as fit in its memory."""
    if devices(device)[0].type == "cuda":
        return ["auto", *(workers for workers in (4, 2) if workers < clients)]
    fewer = (workers for workers in (cores() // 2, cores() // 4) if 1 < workers < clients)
    return [cores(), *fewer] if cores() > 1 else []
