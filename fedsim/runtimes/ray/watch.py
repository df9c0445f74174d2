"""A watch over the processes of Ray that this process cannot do without.

Where the raylet (the process of Ray on this machine) has ended, or the head has been silent for a minute, Ray's
library ends this process: at once, without an exception and without handlers of exits. A thread notices it sooner,
and says why.
"""

import os
import select
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any

import ray

RAY_PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"  # of Ray itself, for the head
PATIENCE = 0.75 * float(os.environ.get(RAY_PATIENCE, 60))  # seconds that the head may be silent
LOOK = 3.0  # seconds between two questions to the head
STATUS = 1  # of a process that ends here, as where Ray ends it


def watch(head_answers: Callable[[], bool]) -> None:
    """From now on, and as long as Ray is joined, end this process with one line where Ray would end it."""
    node: Any = ray._private.worker.global_worker.node
    raylet = socket.socket(socket.AF_UNIX)
    with suppress(OSError):  # it has ended already
        raylet.connect(node.raylet_socket_name)
    threading.Thread(target=watching, args=(raylet, head_answers), name="watch-ray", daemon=True).start()


def watching(raylet: socket.socket, head_answers: Callable[[], bool]) -> None:
    """Wait until the connection to the raylet ends or the head has long been silent, then end this process."""
    seen = monotonic()
    with raylet:
        while monotonic() < seen + PATIENCE:
            if select.select([raylet], [], [], LOOK)[0]:  # the end of the connection: it sends nothing here
                return _end("Ray's process on this machine, the raylet, has ended")
            if not ray.is_initialized():
                return None
            if head_answers():
                seen = monotonic()
    return _end(f"the head of the Ray cluster has not answered for {PATIENCE:.0f} s")


def _end(reason: str) -> None:
    if ray.is_initialized():  # otherwise this process has left the cluster, or ended its own
        with suppress(OSError):
            os.write(2, f"fedsim: runtime: {reason}; a resume goes on after the last checkpoint\n".encode())
        os._exit(STATUS)
