"""A study of federations on real machines: what a round costs before any client takes a step.

All processes are here, and speak over loopback, with TLS and with keys as they would from machine to machine; one
side goes without, to show what these cost.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import monotonic, sleep
from typing import Self

import yaml
from rich.console import Console

from fedsim.bench import apps
from fedsim.bench.figures import Column, Result
from fedsim.bench.programs import ENVIRONMENT
from fedsim.bench.turns import compared, reported
from fedsim.errors import RoundError, one_line
from fedsim.experiment.config import Config
from fedsim.flower import needs_flwr
from fedsim.flower.app import project

SIZES = 1_663_370, 25_000_000  # parameters, as float32: McMahan's CNN, and about a ResNet-50
NODES = "a", "b"
ROUNDS = 4  # of a run; the first, in which nodes join and networks are made, does not count
FAST, PLAIN = "fedsim serve and node", "the same in plain HTTP"
STOCK, ALONE = "fedsim's app in Flower", "Flower alone"
APPS = Path(apps.__path__[0])
MAX_SECONDS = 600  # of a run
APP_CONFIG = """\
out = ""
parameters = 0
rounds = 0
nodes = 0
"""
EXAMPLES = {"name": "synthetic", "examples": 4, "test_examples": 2, "classes": 2, "shape": [1, 1, 1]}


def flower(config: Config, repeats: int, console: Console) -> Result:
    """Rounds of two idle nodes: driven by `fedsim serve`, by `flwr run`, and by an app without fedsim.

    Nothing of the config counts: the networks have as many parameters as SIZES says, and do not train.
    """
    needs_flwr("--study flower")
    with TemporaryDirectory(prefix="fedsim-bench-") as temporary, ExitStack() as stack:
        fast, plain, stock = (
            stack.enter_context(
                LoopbackFederation(Path(temporary) / name, stock=name == "stock", tls=name != "plain")
            )
            for name in ("fast", "plain", "stock")
        )
        runs = {FAST: fast.serve, PLAIN: plain.serve, STOCK: stock.run_app, ALONE: stock.run_without_fedsim}
        sides = {(size, name): partial(_median_round, run, size) for size in SIZES for name, run in runs.items()}
        seconds = reported(sides, repeats, console, warm_up=0)
    return Result(
        "flower",
        f"seconds a round of {len(NODES)} idle nodes, on loopback",
        [
            Column("side", "side"),
            Column("parameters", "parameters", ",d"),
            *(Column(key, key, ".2f") for key in ("seconds", "least", "most")),
            Column("ratio", "ratio", ".1f"),
        ],
        [
            {"parameters": size, "side": name} | compared(seconds, (size, name), (size, ALONE))
            for size, name in seconds
        ],
        f"a turn is a run, the median of its rounds after the first; ratio: times as fast as '{ALONE}'",
    )


def _median_round(run: Callable[[int], list[float]], size: int) -> float:
    return median(run(size)[1:])


class LoopbackFederation:
    """A SuperLink and two nodes, `stock` Flower's own or fedsim's; each ends with the `with` block.

    What they write is in `folder`. Raises RoundError with the last line of what ended.
    """

    def __init__(self, folder: Path, *, stock: bool, tls: bool = True):
        self.folder, self.stock, self.keys = folder, stock, folder / "keys"
        self.tls = tls  # and keys
        self.address = f"127.0.0.1:{free_port()}"
        self.started = list[subprocess.Popen[bytes]]()
        self.runs = count()
        path = [str(APPS), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = os.environ | ENVIRONMENT
        self.environment |= {"FLWR_HOME": str(folder / "flwr"), "PYTHONPATH": os.pathsep.join(path)}
        self.environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End all of them, and what they started."""
        for process in reversed(self.started):
            process.terminate()
        for process in reversed(self.started):
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def serve(self, size: int) -> list[float]:
        """Seconds of each round of a run by `fedsim serve`."""
        out, written = self._run(size)
        trust = ["--ca", str(self.keys / "ca.crt")] if self.tls else ["--insecure"]
        address = ["--superlink", self.address, *trust]
        self._finish("serve", ["fedsim", "serve", str(written), *address, "--out", str(out)])
        return self._rounds(out, "serve", FAST)

    def run_app(self, size: int) -> list[float]:
        """The same by `flwr run` of the app that `fedsim app` writes."""
        out, written = self._run(size)
        app = out.with_name(f"{out.name}-app")
        self._finish("app", ["fedsim", "app", str(written), "--out", str(app)])
        self._finish("run", ["flwr", "run", str(app), "lab", "--stream", "-c", f'out="{out}"'])
        return self._rounds(out, "run", STOCK)

    def run_without_fedsim(self, size: int) -> list[float]:
        """The same by `flwr run` of an app that has nothing of fedsim."""
        out = self.folder / f"run-{next(self.runs)}"
        app = out.with_name(f"{out.name}-app")
        app.mkdir()
        shutil.copy(APPS / "flower_alone.py", app)
        (app / "pyproject.toml").write_text(
            project("flower-alone", "flower_alone:server", "flower_alone:client") + APP_CONFIG
        )
        given = f'out="{out}" parameters={size} rounds={ROUNDS} nodes={len(NODES)}'
        self._finish("alone", ["flwr", "run", str(app), "lab", "--stream", "-c", given])
        if not out.exists():
            raise self._failed("alone", ALONE)
        return [float(each) for each in json.loads(out.read_text())]

    def _start(self) -> None:
        from fedsim.flower.certificates import make
        from fedsim.flower.internals import Superlink, register

        make(self.keys, ["127.0.0.1"], NODES)
        ca, port = self.keys / "ca.crt", self.address.rpartition(":")[2]
        flwr = self.folder / "flwr"
        flwr.mkdir()
        lab = f'address = "{self.address}"\nroot-certificates = "{ca}"'
        (flwr / "config.toml").write_text(f'[superlink]\ndefault = "lab"\n[superlink.lab]\n{lab}\n')
        pair = ["--ssl-certfile", str(self.keys / "server.pem"), "--ssl-keyfile", str(self.keys / "server.key")]
        tls = ["--ssl-ca-certfile", str(ca), *pair, "--enable-supernode-auth"]
        trust = tls if self.tls else ["--insecure"]
        isolation = [] if self.stock else ["--isolation", "process"]
        here = ["--host", "127.0.0.1", "--port", port, "--disable-runtime-dependency-installation"]
        superlink = self._begin("superlink", ["flower-superlink", *here, *trust, *isolation])
        deadline = monotonic() + MAX_SECONDS
        while not listens(int(port)):
            if superlink.poll() is not None or monotonic() > deadline:
                raise self._failed("superlink", "flower-superlink")
            sleep(0.05)
        for name in NODES:
            key = self.keys / "nodes" / name
            if self.tls:
                register(Superlink(self.address, ca.read_bytes()), key.with_name(f"{name}.pub"))
            settings = {
                "name": name,
                "data": EXAMPLES,
                "state": str(self.folder / "states"),
                "device": "cpu",
                "allow": {"strategies": ["still:Still"], "models": ["still:vector"]},
                "superlink": self.address,
                **({"ca": str(ca), "key": str(key)} if self.tls else {"insecure": True}),
            }
            path = self.folder / f"{name}.yaml"
            path.write_text(yaml.safe_dump(settings))
            if self.stock:
                local = ["--port", str(free_port()), "--node-config", f'config="{path}"']
                where = ["--superlink", self.address, "--root-certificates", str(ca)]
                self._begin(name, ["flower-supernode", *where, "--auth-supernode-private-key", str(key), *local])
            else:
                self._begin(name, ["fedsim", "node", str(path)])

    def _run(self, size: int) -> tuple[Path, Path]:
        """A new run's folder, which is not there yet, and its config."""
        out = self.folder / f"run-{next(self.runs)}"
        written = out.with_name(f"{out.name}.yaml")
        config = {
            "rounds": ROUNDS,
            "data": EXAMPLES | {"clients": len(NODES)},
            "model": {"name": "still:vector", "parameters": size},
            "strategy": "still:Still",
            "cohort": "all",
            "local": {"batch_size": 1, "lr": 0.1},
            "evaluate": {"every": ROUNDS},
            "runtime": {"name": "flower", "nodes": list(NODES), "device": "cpu"},
            "hooks": [],
        }
        written.write_text(yaml.safe_dump(config))
        return out, written

    def _begin(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """A process in a session of its own, whose output goes to NAME.log."""
        path = shutil.which(command[0], path=self.environment["PATH"]) or command[0]
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [path, *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=self.folder,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def _finish(self, name: str, command: Sequence[str]) -> None:
        """Run a command to its end."""
        process = self._begin(name, command)
        with suppress(subprocess.TimeoutExpired):
            process.wait(MAX_SECONDS)
        if process.returncode != 0:
            raise self._failed(name, " ".join(command[:2]))
        self.started.remove(process)

    def _rounds(self, out: Path, name: str, label: str) -> list[float]:
        """Seconds of each round of a run, which Flower may have let fail without saying so."""
        log = out / "rounds.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        if len(lines) < ROUNDS:
            raise self._failed(name, label)
        return [float(json.loads(line)["seconds"]) for line in lines]

    def _failed(self, name: str, label: str) -> RoundError:
        lines = (self.folder / f"{name}.log").read_text(errors="replace").strip().splitlines()
        said = [line for line in lines if "Error: " in line] or lines or ["it printed nothing"]
        return RoundError(f"{label} failed: {one_line(said[-1])}")


def free_port() -> int:
    """A port of the loopback interface on which nothing listens at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def listens(port: int) -> bool:
    """Whether a program listens on that port of the loopback interface."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
