"""The runtimes that are timed on a device, with their numbers of workers and chunk sizes."""

import os
import sys
from math import ceil
from typing import Any

from fedsim.base.catalogue import Spec
from fedsim.base.devices import devices
from fedsim.base.machine import cores
from fedsim.runtimes import RUNTIMES

CHUNKS = {"cpu": (4, 16), "cuda": (32, 128)}  # chunk sizes of vectorized: a small and a large one
MAX_TIMED_CLIENTS = 256  # of a cohort


def num_clients_to_time(device: str) -> int:
    """How many clients of a cohort to time: enough to keep each candidate busy, at most MAX_TIMED_CLIENTS."""
    return min(MAX_TIMED_CLIENTS, max(CHUNKS[devices(device)[0].type]) * _cores_or_gpus(device))


def candidate_specs(device: str, clients: int, *, exact: bool) -> list[Spec]:
    """The reference, and then the runtimes that may be faster for cohorts of `clients` or more, most likely first.

    `exact` leaves out runtimes that are not exact. Ray is included if there is a cluster to join; none is started.
    """
    threads = [{"name": "threads", "workers": workers, "device": device} for workers in _workers(device, clients)]
    specs: list[Spec] = [{"name": "serial", "device": device}, *threads[:1]]
    kind, num_workers = devices(device)[0].type, _cores_or_gpus(device)
    if "vectorized" in RUNTIMES.entries and not exact:
        few, many = CHUNKS[kind]
        many = min(many, ceil(clients / num_workers))
        # A fixed number of workers, not `auto`: the last bits depend on which clients share a chunk.
        vectorized = {"name": "vectorized", "workers": num_workers, "device": device}
        specs += [vectorized | {"chunk": chunk} for chunk in ((many, few) if 2 * few <= many else (many,))]
    specs += threads[1:]
    if "ray" in RUNTIMES.entries and kind == "cpu" and ray_is_there():
        specs.append({"name": "ray", "address": None if _has_joined() else os.environ["RAY_ADDRESS"]})
    return specs


def ray_is_there() -> bool:
    """Whether this process has joined a Ray cluster, or the environment names one."""
    return _has_joined() or bool(os.environ.get("RAY_ADDRESS"))


def _has_joined() -> bool:
    ray: Any = sys.modules.get("ray")
    return bool(ray and ray.is_initialized())


def _cores_or_gpus(device: str) -> int:
    """The number of cores, or of GPUs."""
    available = devices(device)
    return cores() if available[0].type == "cpu" else len(available)


def _workers(device: str, clients: int) -> list[int | str]:
    """Numbers of workers for threads, most likely first; on a GPU first `auto`, as many as fit in memory."""
    if devices(device)[0].type == "cuda":
        return ["auto", *(workers for workers in (4, 2) if workers < clients)]
    fewer = (workers for workers in (cores() // 2, cores() // 4) if 1 < workers < clients)
    return [cores(), *fewer] if cores() > 1 else []
