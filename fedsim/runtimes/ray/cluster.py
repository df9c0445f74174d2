"""The Ray cluster of this process: how it joins one, and which resources that has."""

import logging
import os
import re
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from math import floor
from typing import Any

from fedsim.base.machine import cores
from fedsim.base.own_code import refuse_code
from fedsim.base.reading import read_key
from fedsim.errors import ConfigError, missing_extra, one_line

try:
    import grpc
    import ray

    from fedsim.runtimes.ray.watch import watch
except ModuleNotFoundError as error:
    raise missing_extra("runtime.name: ray", "Ray", "ray") from error

WAIT = 4.0  # seconds within which a cluster must answer
START = "launch/ray_cluster.sh start starts a cluster, and null starts a local one"


def join(address: str | None) -> None:
    """Join the cluster at `address`; None is this process's own, or a new local one. Raises ConfigError."""
    if ray.is_initialized():
        joined = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", joined) and _located(address) != joined:
            raise ConfigError(f"runtime.address: {address}, and this process has joined {joined} already")
        return
    if address:
        refuse_code(f"what a cluster at {address} answers may hold code", "runtime.address")
        address = _reach(address)
    own: dict[str, Any] = {} if address else {"num_cpus": cores(), "include_dashboard": False}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with _restored():
        try:
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
        except Exception as error:  # Ray raises this class itself where its processes do not start in time
            raise ConfigError(
                f"runtime.address: {address or 'null'}: Ray cannot be started or joined: {first_line(error)}"
            ) from error
    head = ray.get_runtime_context().gcs_address
    watch(lambda: _silence(head) is None)


def room(cpus: float, gpus: float) -> int:
    """How many actors of that size fit on all machines."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    return sum(min(floor(node.get(kind, 0) / each + 1e-9) for kind, each in wanted.items()) for node in nodes)


def resources() -> str:
    """CPUs and GPUs of all machines, in words."""
    has, free = ray.cluster_resources(), ray.available_resources()
    each = {kind: (counted(has.get(kind, 0), kind), free.get(kind, 0)) for kind in ("CPU", "GPU")}
    return " and ".join(f"{held} ({left:g} free)" for held, left in each.values())


def counted(number: float, what: str) -> str:
    """In words: "1 CPU", "2 CPUs"."""
    return f"{number:g} {what}" + ("" if number == 1 else "s")


def first_line(error: Exception) -> str:
    """The first line of an error message of Ray, which may have many."""
    return one_line(str(error).strip().partition("\n")[0])


def _reach(address: str) -> str:
    """The address as host:port. Raises ConfigError where no Ray answers, for which Ray would wait for minutes."""
    found = _located(address)
    if reason := _silence(found):
        by = "RAY_ADDRESS" if os.environ.get("RAY_ADDRESS") else "the last Ray of this machine"
        what = f"auto: {found}, {by}," if address == "auto" else address
        raise ConfigError(f"runtime.address: {what} cannot be reached ({reason}); {START}")
    return found


def _silence(address: str) -> str | None:
    """Why no Ray answers at host:port, or None where one does."""
    try:
        with _channel(address) as channel:
            channel.unary_unary("/fedsim/Ask")(b"", timeout=WAIT)
    except grpc.RpcError as error:  # a gRPC server answers at least that it has no such method
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"no answer in {WAIT:g} s"
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            return one_line(error.details().rpartition("last error: ")[2])
    return None


def _channel(address: str) -> grpc.Channel:
    """With TLS where Ray's own environment variables say so; raises ConfigError."""
    options = [("grpc.enable_http_proxy", 0)]  # nor does Ray use one
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return grpc.insecure_channel(address, options)
    authority, key, certificate = map(_pem, ("RAY_TLS_CA_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_SERVER_CERT"))
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(authority, key, certificate), options)


def _pem(variable: str) -> bytes:
    path = os.environ.get(variable)
    if not path:
        raise ConfigError(f"RAY_USE_TLS needs {variable}, the path of a PEM file")
    try:
        return read_key(path)
    except OSError as error:
        raise ConfigError(f"{variable}: {path} cannot be read: {error.strerror}") from None


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
def _restored() -> Iterator[None]:
    """Restore the handler of SIGTERM that Ray replaces, and hide warnings about files that it leaves open."""
    handler = signal.getsignal(signal.SIGTERM)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=ResourceWarning)
        warnings.filterwarnings("ignore", "Tip: In future versions of Ray", FutureWarning)
        try:
            yield
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)
