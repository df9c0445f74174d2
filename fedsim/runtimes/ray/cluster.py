"""The cluster that this process is part of: how it joins one, and what that one holds."""

import logging
import os
import re
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from math import floor
from typing import Any

from fedsim.base.machine import cores
from fedsim.errors import ConfigError, missing_extra, one_line

try:
    import ray
except ModuleNotFoundError as error:
    raise missing_extra("runtime.name: ray", "Ray", "ray") from error

WAIT = 4.0  # seconds in which a cluster has to answer
START = "launch/ray_cluster.sh start starts a cluster, and null is a local Ray"
# An empty call of gRPC, which Ray's head speaks: HTTP/2 (RFC 9113, 3.4 and 4.1), its headers as in RFC 7541, 6.
HEADERS = b"\x83\x86\x04\x02/-\x01\x01-\x0f\x10\x10application/grpc\x00\x02te\x08trailers"
CALL = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    + bytes([0, 0, len(HEADERS), 1, 5, 0, 0, 0, 1])
    + HEADERS
)


def join(address: str | None) -> None:
    """Have this process part of a Ray: null is any, or else a local one of its own. Raises ConfigError."""
    if ray.is_initialized():
        joined = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", joined) and _located(address) != joined:
            raise ConfigError(f"runtime.address: {address}, and this process has joined {joined} already")
        return
    if address:
        address = _reach(address)
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
    each = {kind: (counted(has.get(kind, 0), kind), free.get(kind, 0)) for kind in ("CPU", "GPU")}
    return " and ".join(f"{held} ({left:g} free)" for held, left in each.values())


def counted(number: float, what: str) -> str:
    """In words: "1 CPU", "2 CPUs"."""
    return f"{number:g} {what}" + ("" if number == 1 else "s")


def first_line(error: Exception) -> str:
    """Of the many that Ray says."""
    return one_line(str(error).strip().partition("\n")[0])


def _reach(address: str) -> str:
    """The address as host:port. Raises ConfigError where no Ray answers; Ray itself would try for minutes."""
    found = _located(address)
    try:
        host, _, port = found.rpartition(":")
        with socket.create_connection((host.strip("[]"), int(port)), timeout=WAIT) as connection:
            if not os.environ.get("RAY_USE_TLS"):
                _call(connection)
    except OSError as error:
        by = "RAY_ADDRESS" if os.environ.get("RAY_ADDRESS") else "the last Ray of this machine"
        what = f"auto: {found}, {by}," if address == "auto" else address
        raise ConfigError(f"runtime.address: {what} cannot be reached ({one_line(error)}); {START}") from error
    return found


def _call(connection: socket.socket) -> None:
    """Raise OSError where no gRPC server answers, as Ray's head would: that there is no such method."""
    connection.sendall(CALL)
    with connection.makefile("rb") as answer:
        while len(head := answer.read(9)) == 9 and head[3] in (1, 4, 6, 8):  # headers, settings, ping, window
            content = answer.read(int.from_bytes(head[:3], "big"))
            if head[3] == 1:  # which begin with the status, 200, after sizes of tables
                if content.lstrip(bytes(range(0x20, 0x40))).startswith(b"\x88"):
                    return
                break
    raise ConnectionError("what listens there is no Ray")


def _located(address: str) -> str:
    """host:port, where Ray would look for a cluster; raises ConfigError."""
    named = os.environ.get("RAY_ADDRESS") if address == "auto" else address
    if named and not re.fullmatch(r"[^/]+:\d+", named):
        key = "RAY_ADDRESS" if address == "auto" else "runtime.address"
        raise ConfigError(f"{key}: {named!r} should be null, auto, or host:port such as 10.0.0.1:6379")
    try:
        return str(ray._private.services.canonicalize_bootstrap_address(address))
    except OSError as error:  # there is none
        raise ConfigError(f"runtime.address: {address}: no Ray is found on this machine; {START}") from error


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
