"""Peers as sides: programs that load no fedsim, and run the same round for each line they are sent."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from os import environ
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import NamedTuple

import torch

from fedsim.base.catalogue import unknown
from fedsim.base.machine import cores
from fedsim.bench import peers
from fedsim.bench.parts import Side
from fedsim.bench.plain import subject
from fedsim.errors import ConfigError, RoundError, one_line
from fedsim.federated.simulation import Simulation

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # else Ray's workers give way to all other processes
}
ACTORS_PER_GPU = 4
PATIENCE = 30  # seconds for a program to end by itself


class Peer(NamedTuple):
    """Another simulator: what tables call it, its program, what that is written for, and how to get it."""

    label: str
    program: str
    package: str
    versions: tuple[str, ...]
    also: tuple[str, ...]
    install: str


PEERS = {
    "flower": Peer(
        "Flower simulation",
        "flower_app.py",
        "flwr",
        ("1.41.", "1.42."),
        ("ray",),
        "pip install 'flwr[simulation]>=1.41,<1.43' brings it",
    ),
    "pfl": Peer(
        "pfl simulation", "pfl_app.py", "pfl", ("0.6.",), (), "pip install 'pfl[pytorch]==0.6.*' brings it"
    ),
}


def check_peers(names: Sequence[str], at: str = "--peers") -> None:
    """Raise ConfigError where one is no peer, or is not installed, or in another version."""
    for name in names:
        if name not in PEERS:
            raise ConfigError(f"{at}: {unknown(name, PEERS)}")
        peer = PEERS[name]
        try:
            found = version(peer.package)
        except PackageNotFoundError:
            found = "missing"
        lacking = [package for package in peer.also if find_spec(package) is None]
        if lacking or not f"{found}.".startswith(peer.versions):
            allowed = " or ".join(each.rstrip(".") for each in peer.versions)
            needs = " and ".join([f"{peer.package} {allowed}", *peer.also])
            has = ", ".join([f"{peer.package} is {found}", *(f"{package} is missing" for package in lacking)])
            raise ConfigError(f"{at}: {name} needs {needs}, and {has}; {peer.install}")


@contextmanager
def program(name: str, simulation: Simulation, idle: bool = False) -> Iterator[Side]:
    """The simulation's first round by the peer of that name; a pass returns the sum of the new weights.

    Clients compute in fp32, as the plain loops do; `idle` ones send back what they got. Raises RoundError.
    """
    with TemporaryDirectory(prefix="fedsim-bench-") as folder:
        prepared = command(name, simulation, Path(folder), idle)
        with Program(PEERS[name].label, prepared) as running:
            running.answer("ready")

            def side() -> float:
                running.ask()
                return float(running.answer("done"))

            yield side


def command(name: str, simulation: Simulation, folder: Path, idle: bool = False) -> list[str]:
    """The command line of a peer's program, for a subject that is written to `folder`."""
    path, home = folder / "subject.pt", simulation.runtime.home
    torch.save(subject(simulation) | {"idle": idle}, path)
    workers = cores() if home.type == "cpu" else min(cores(), ACTORS_PER_GPU)
    file = Path(peers.__path__[0]) / PEERS[name].program
    return [sys.executable, str(file), str(path), str(workers), home.type]


class Program:
    """A process that answers lines with lines; what else it prints is kept, for when it fails."""

    def __init__(self, label: str, command: Sequence[str]):
        self.label, self.errors = label, TemporaryFile()  # noqa: SIM115 - closed on exit
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**environ, **ENVIRONMENT},
        )
        assert self.process.stdin
        assert self.process.stdout
        self.input, self.output = self.process.stdin, self.process.stdout

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        """Let it end, and see that it does."""
        with suppress(BrokenPipeError):
            self.input.close()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.output.close()
        self.errors.close()

    def ask(self) -> None:
        """Have it run a round."""
        try:
            self.input.write("round\n")
            self.input.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def answer(self, expected: str) -> str:
        """What it says after the `expected` word; raises RoundError where it ended instead."""
        for line in self.output:
            word, _, rest = line.strip().partition(" ")
            if word == expected:
                return rest
        raise self._ended()

    def stop(self) -> None:
        """Have it end now, whatever it was doing."""
        self.process.terminate()

    def _ended(self) -> RoundError:
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
        return RoundError(f"{self.label} ended: {one_line(lines[-1])}")
