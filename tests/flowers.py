"""Federations of real processes on loopback: a SuperLink and nodes, on free ports, and none left behind."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import yaml

from fedsim.bench.federation import free_port, listens

BIN = Path(sys.executable).parent
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "OMP_NUM_THREADS": "1",
    "NO_COLOR": "1",
    "COLUMNS": "200",
    "PYTHONUNBUFFERED": "1",
}
START_TIMEOUT = 600  # seconds that a process may take to start, on a busy machine


def until(there, what, seconds=START_TIMEOUT, process=None):
    """Wait for a condition and give its value; AssertionError where it does not come, or the process ends."""
    deadline = time.monotonic() + seconds
    while not (found := there()):
        ended = process is not None and process.poll() is not None
        assert not ended, f"{what}: the process ended with {process.returncode}\n{tail(process)}"
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s\n{tail(process) if process else ''}"
        time.sleep(0.05)
    return found


def tail(process, characters=4000):
    """The end of what a process of ours has printed."""
    return Path(process.log).read_text(errors="replace")[-characters:]


class Federation:
    """A SuperLink and its nodes, ended with the `with` block; all they write is in `folder`.

    `isolation` is process for what drives rounds itself (fedsim serve), subprocess for `flwr run`. With `auth`
    only nodes whose key was registered may join. `env` has FLWR_HOME, where the SuperLink is known as "lab".
    `host` is the address at which it listens.
    """

    def __init__(self, folder, *, tls=True, auth=False, isolation="process", host="127.0.0.1"):
        self.folder, self.auth, self.isolation = Path(folder), auth, isolation
        self.host, self.port = host, free_port()
        self.address = f"{host}:{self.port}"
        self.keys = self.folder / "keys"
        self.ca = self.keys / "ca.crt" if tls else None
        self.env = os.environ | QUIET | {"FLWR_HOME": str(self.folder / "flwr")}
        self.env["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        self.processes = []
        if tls or auth:
            from fedsim.flower.certificates import make

            make(self.keys, [host])
        (self.folder / "flwr").mkdir(parents=True)
        trust = f'root-certificates = "{self.ca}"' if self.ca else "insecure = true"
        (self.folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "lab"\n\n[superlink.lab]\naddress = "{self.address}"\n{trust}\n'
        )

    def __enter__(self):
        try:
            self.restart_superlink()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for process in reversed(self.processes):
            self.stop(process)

    def start(self, name, *command):
        """A process in a session of its own, whose output goes to NAME.log."""
        log = self.folder / f"{name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.env,
                cwd=self.folder,
                start_new_session=True,
            )
        process.log = str(log)
        self.processes.append(process)
        return process

    def stop(self, process, kill=True):
        """End it with all that it started: at once, or with SIGTERM and ten seconds of patience."""
        family = [process.pid, *descendants(process.pid)]
        if not kill and process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
        for pid in family if process.poll() is None or kill else family[1:]:
            if pid != process.pid or process.poll() is None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.wait(10)
        if process in self.processes:
            self.processes.remove(process)

    def restart_superlink(self):
        """Kill it if it is there, and have it at the same address, with the same database."""
        if hasattr(self, "superlink"):
            self.stop(self.superlink)
        trust = ["--insecure"]
        if self.ca:
            trust = ["--ssl-ca-certfile", self.ca, "--ssl-certfile", self.keys / "server.pem"]
            trust += ["--ssl-keyfile", self.keys / "server.key"]
        self.superlink = self.start(
            "superlink",
            *(BIN / "flower-superlink", "--host", self.host, "--port", self.port, "--isolation", self.isolation),
            *("--disable-runtime-dependency-installation", "--database", self.folder / "superlink.db", *trust),
            *(["--enable-supernode-auth"] if self.auth else []),
        )
        until(self.listens, "SuperLink", process=self.superlink)
        return self.superlink

    def listens(self):
        """Whether the SuperLink takes connections."""
        return listens(self.port)

    def key(self, name):
        """The private key of a node, made and registered."""
        from fedsim.flower.certificates import make

        if not (self.keys / "nodes" / name).exists():
            make(self.keys, [], [name])
            self.register(self.keys / "nodes" / f"{name}.pub")
        return self.keys / "nodes" / name

    def register(self, public_key):
        """Let a node with this key join; gives its id."""
        from fedsim.flower.internals import Superlink, register

        return register(Superlink(self.address, self.ca.read_bytes() if self.ca else None), Path(public_key))

    def node(self, name, settings, stock=False, key=None, program=(BIN / "fedsim", "node")):
        """A node with these settings in NAME.yaml, besides name, state, SuperLink and key, which are added.

        With `auth` it gets a registered key, unless one is given. Another of the same name is the same one again.
        """
        key = key or (self.key(name) if self.auth else None)
        trust = {"ca": str(self.ca)} if self.ca else {"insecure": True}
        common = {"name": name, "state": str(self.folder / f"{name}.state"), "superlink": self.address, **trust}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(common | ({"key": str(key)} if key else {}) | settings))
        if not stock:
            return self.start(name, *program, path)
        return self.supernode(name, f'config="{path}"', key)

    def supernode(self, name, node_config, key=None):
        """Flower's own node, with this --node-config."""
        trust = ["--root-certificates", self.ca] if self.ca else ["--insecure"]
        return self.start(
            name,
            *(BIN / "flower-supernode", "--superlink", self.address, "--port", free_port(), *trust),
            *(["--auth-supernode-private-key", key] if key else []),
            *("--node-config", node_config),
        )

    def flwr(self, *arguments, seconds=300):
        """One of Flower's own commands, to its end: what it printed."""
        done = subprocess.run(
            [str(BIN / "flwr"), *map(str, arguments)],
            env=self.env,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout


def descendants(pid):
    """The processes that a process started, and those that they did; also in other sessions."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):  # it has ended
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]
