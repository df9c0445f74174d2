"""The cluster that this process is part of: how it joins one, and what that one holds."""

import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from math import floor
from typing import Any

from fedsim.errors import ConfigError, one_line
from fedsim.runtimes.worker import cores

try:
    import ray
except ModuleNotFoundError as error:
    raise ConfigError("runtime.name: ray needs Ray; pip install 'fedsim[ray]' brings it") from error


def join(address: str | None) -> None:
    """Have this process part of a Ray: null is any, or else a local one of its own. Raises ConfigError."""
    if ray.is_initialized():
        joined = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", joined):
            raise ConfigError(f"runtime.address: {address}, and this process has joined {joined} already")
        return
    if address not in (None, "auto"):
        _reach(address)
    own: dict[str, Any] = {} if address else {"num_cpus": cores(), "include_dashboard": False}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with _as_it_was():
        try:
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"runtime.address: {address or 'null'}: Ray cannot be had; {first_line(error)}"
            ) from error


def room(cpus: float, gpus: float) -> int:
    """How many actors of that size all machines hold."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    return sum(min(floor(node.get(kind, 0) / each + 1e-9) for kind, each in wanted.items()) for node in nodes)


def resources() -> str:
    """What all machines hold, in words."""
    has, free = ray.cluster_resources(), ray.available_resources()
    return " and ".join(f"{has.get(kind, 0):g} {kind}s ({free.get(kind, 0):g} free)" for kind in ("CPU", "GPU"))


def first_line(error: Exception) -> str:
    """Of the many that Ray says."""
    return one_line(str(error).strip().partition("\n")[0])


def _reach(address: str) -> None:
    """Raise ConfigError where nobody listens; Ray itself would take minutes to say so."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and "/" not in host):
        raise ConfigError(f"runtime.address: {address!r} should be null, auto, or host:port such as 10.0.0.1:6379")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise ConfigError(f"runtime.address: {address} cannot be reached ({one_line(error)})") from error


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Keep what Ray takes when it starts: the handler of SIGTERM, and warnings about files that it left open."""
    handler = signal.getsignal(signal.SIGTERM)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=ResourceWarning)
        warnings.filterwarnings("ignore", "Tip: In future versions of Ray", FutureWarning)
        try:
            yield
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)
