"""Federations whose machines are network namespaces of Linux: a server, and nodes on links of their own."""

import os
import random
import socket
import subprocess
import threading
import time
from contextlib import suppress

import pytest
from flowers import BIN, Federation, tail

PREFIX = f"fs{os.getpid() % 100_000}"


def ip(*arguments):
    """The command; AssertionError where it fails."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


def needs_namespaces():
    """Skip where this process may not make them."""
    try:
        done = subprocess.run(["ip", "netns", "add", f"{PREFIX}t"], capture_output=True, text=True, check=False)
        if not done.returncode:
            ip("netns", "delete", f"{PREFIX}t")
    except FileNotFoundError:
        pytest.skip("network namespaces: the command `ip` is not there")
    if done.returncode:
        pytest.skip(f"network namespaces: {done.stderr.strip()}")


class Hosts(Federation):
    """The SuperLink and whatever is not a node's is on `server`, each node on a machine of its name.

    Machine k has a link to the server, 10.k.0.2 to 10.k.0.1. The server's address for all is 10.0.0.1.
    """

    SERVER = "10.0.0.1"

    def __init__(self, folder, nodes, **options):
        self.names = {name: f"{PREFIX}n{k}" for k, name in enumerate(nodes, 1)}
        self.server = f"{PREFIX}s"
        super().__init__(folder, host=self.SERVER, **options)

    def __enter__(self):
        try:
            ip("netns", "add", self.server)
            ip("-n", self.server, "link", "set", "lo", "up")
            ip("-n", self.server, "address", "add", f"{self.SERVER}/32", "dev", "lo")
            for k, machine in enumerate(self.names.values(), 1):
                ip("netns", "add", machine)
                ip("-n", machine, "link", "set", "lo", "up")
                peer = ["peer", "name", machine, "netns", self.server]
                ip("-n", machine, "link", "add", "veth0", "type", "veth", *peer)
                ip("-n", machine, "link", "set", "veth0", "up")
                ip("-n", self.server, "link", "set", machine, "up")
                ip("-n", machine, "address", "add", f"10.{k}.0.2/24", "dev", "veth0")
                ip("-n", self.server, "address", "add", f"10.{k}.0.1/24", "dev", machine)
                ip("-n", machine, "route", "add", "default", "via", f"10.{k}.0.1")
            return super().__enter__()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_):
        super().__exit__()
        for machine in [self.server, *self.names.values()]:
            with suppress(AssertionError):  # it was not made yet
                ip("netns", "delete", machine)

    def start(self, name, *command):
        return super().start(name, "ip", "netns", "exec", self.names.get(name, self.server), *command)

    def register(self, public_key):
        command = self.start("register", BIN / "flwr", "supernode", "register", public_key, "lab")
        assert command.wait(60) == 0, tail(command)
        self.processes.remove(command)

    def listens(self):
        probe = f"exec 3<>/dev/tcp/{self.SERVER}/{self.port}"
        inside = ["ip", "netns", "exec", self.server, "bash", "-c", probe]
        return subprocess.run(inside, capture_output=True, check=False).returncode == 0

    def link(self, name, up):
        """Cut the link of a node's machine, or heal it."""
        ip("-n", self.server, "link", "set", self.names[name], "up" if up else "down")

    def worsen(self, *how):
        """Have what the server sends delayed or lost, such as delay 50ms loss 2%; skips without netem."""
        for machine in self.names.values():
            device = ["tc", "-n", self.server, "qdisc", "replace", "dev", machine, "root", "netem", *how]
            done = subprocess.run(device, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"netem: {done.stderr.strip()}")


class Gate:
    """A way to a port of this machine that delays what passes, and cuts connections.

    For where Linux has no netem: `delay` is in seconds, each way; `cut` the chance of a cut each time that
    something passes, of which a part still does. `due` is how many connections are to be cut inside of a model:
    each as soon as more than LARGE bytes come at once, after some of them. All may be set anew.
    """

    LARGE = 4000  # bytes: a model, or a part of it, and no heartbeat, look or handshake

    def __init__(self, port, delay=0.0, cut=0.0, seed=0):
        self.to, self.delay, self.cut, self.random = port, delay, cut, random.Random(seed)
        self.passed, self.cuts = 0, 0
        self.due, self.inside = 0, 0
        self._choosing = threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            here, _ = self._listening.accept()
            try:
                there = socket.create_connection(("127.0.0.1", self.to))
            except OSError:
                here.close()
                continue
            pair = here, there
            for one, other in (pair, pair[::-1]):
                threading.Thread(target=self._pass, args=(one, other, pair), daemon=True).start()

    def _pass(self, one, other, pair):
        with suppress(OSError):
            while content := one.recv(2**16):
                time.sleep(self.delay)
                length = self._passes(len(content))
                other.sendall(content[:length])
                if length < len(content):
                    break
                self.passed += 1
        self._end(pair)

    def _passes(self, length):
        """How many of the bytes; the connection is cut after them if these are not all."""
        with self._choosing:
            if self.due and length > self.LARGE:
                self.due, self.inside, self.cuts = self.due - 1, self.inside + 1, self.cuts + 1
                return self.random.randrange(1, length)
            if self.random.random() < self.cut:
                self.cuts += 1
                return self.random.randrange(length)
            return length

    def _end(self, pair):
        for end in pair:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
