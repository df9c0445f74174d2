"""Runs disturbed again and again, at instants drawn from a seed: federations of real processes, and Ray's.

Whatever happens, a run ends with the rounds of one that nothing disturbed; or in one line, and its resume does.
`python tests/test_disturbed.py flower FIRST LAST`, or `ray`, says how each of these seeds ended.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import yaml
from flowers import Federation, descendants, tail, until
from hosts import Gate
from lab import CONFIG
from small_run import records, rounds_logged, write
from test_flower_faults import SUSPECT, World

import fedsim
from fedsim.experiment.build import build_data
from fedsim.experiment.config import load
from fedsim.flower.shards import client_name, write_shards

pytestmark = pytest.mark.slow

ROUNDS = 12
SMALL = 0.2  # of a CPU, for an actor
LIMIT = 300  # seconds that a round may take once nothing disturbs it any more
CLOCK = """
import datetime, sys, time
off, now = float(sys.argv.pop(1)), time.time
time.time = lambda: now() + off
class Wrong(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(seconds=off)
datetime.datetime = Wrong
from fedsim.cli import main
main()
"""


def one_line(status, said):
    """How a command ended that did not end well: by our hand, or in one line; AssertionError if in another way."""
    assert "Traceback" not in said, said
    if status in (-signal.SIGKILL, -signal.SIGTERM):  # the latter where it had not begun
        return "killed"
    assert status in (1, 130), f"status {status}: {said}"
    lines = [line for line in said.splitlines() if line.startswith("fedsim: ")]
    assert said.splitlines()[-1:] == lines[-1:], said
    assert status == 130 or len(lines) == 1, said
    return "interrupted" if status == 130 else lines[0]


class Deployment(World):
    """Three nodes, a SuperLink and a driver, with a gate before each of them but the SuperLink."""

    def __init__(self, folder, stack, *, auth):
        (folder / "suspect.py").write_text(SUSPECT)
        write_shards(build_data(load(CONFIG)), folder / "shards")
        federation = stack.enter_context(Federation(folder / "federation", tls=auth, auth=auth))
        names = [client_name(k, 3) for k in range(3)]
        super().__init__(federation, folder, folder / "shards", ROUNDS, names)
        self.auth, self.gates = auth, [Gate(federation.port) for _ in range(4)]  # the last is the driver's
        federation.address = self._at(3)
        stack.callback(self.close)
        self.all_nodes()

    def _at(self, gate):
        return f"127.0.0.1:{self.gates[gate].port}"

    def node(self, k, **settings):
        return super().node(k, superlink=self._at(k), **settings)

    def disturbed(self, seed):
        """Run with disturbances of this seed; returns what was done, and how drivers ended before the last."""
        self.random, self.out, self.id = random.Random(seed), self.folder / f"run-{seed}", f"seed-{seed}"
        kinds = [name for name in dir(self) if name.startswith("do_")]
        done, ends = [], []
        due = sorted(self.random.randrange(-1, ROUNDS) for _ in range(self.random.randint(1, 5)))  # rounds
        self.settings = [f"checkpoint.every={self.random.choice([1, 1, 3])}"]
        if self.auth and self.random.random() < 0.5:
            self.settings += ["--keys", self.federation.keys / "nodes"]
        self.driver = self.serve(*self.settings)
        while True:
            last, lines = time.monotonic(), len(self.lines())
            while self.driver.poll() is None and not (due and lines >= due[0]):
                time.sleep(0.1)
                if lines < (now := len(self.lines())):
                    last, lines = time.monotonic(), now
                assert time.monotonic() < last + LIMIT, f"hangs: {tail(self.driver)}"
            if self.driver.poll() is None:
                time.sleep(self.random.uniform(0, 3 if due.pop(0) < 0 else 1))
                kind = self.random.choice(kinds)
                began = time.monotonic()
                what = getattr(self, kind)() or ""
                done.append(f"{kind[3:]} {what}{time.monotonic() - began:.1f} s, round {len(self.lines())}")
                self.nodes_are_there()
                continue
            said = tail(self.driver, 10**6)
            Path(self.driver.log).rename(f"{self.driver.log}.{len(ends)}")
            self.federation.stop(self.driver)
            if self.driver.returncode == 0:
                assert "Traceback" not in said, said
                self.same_end()
                return done, ends
            ends.append(one_line(self.driver.returncode, said))
            assert len(ends) < 20, ends
            known = (self.out / "config.yaml").exists()
            self.driver = self.resume() if known else self.serve(*self.settings)

    def cut_inside(self):
        """How many connections were cut inside of a model so far."""
        return sum(gate.inside for gate in self.gates)

    def nodes_are_there(self):
        for k, process in self.nodes.items():
            assert "Traceback" not in tail(process, 10**5), tail(process)
            assert process.poll() is None, f"node {k} ended: {tail(process)}"

    # What may happen

    def _some(self, short=3.0, long=25.0):
        """Seconds: a few, or more than a heartbeat lasts."""
        return self.random.choice([self.random.uniform(0.1, short), self.random.uniform(short, long)])

    def _pause(self, process):
        family = [process.pid, *descendants(process.pid)]
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in family:
                if Path(f"/proc/{pid}").exists():
                    os.kill(pid, number)
            if number == signal.SIGSTOP:
                time.sleep(self._some())

    def do_stop_superlink(self):
        self._pause(self.federation.superlink)

    def do_kill_superlink(self):
        self.federation.stop(self.federation.superlink)
        lost = not self.auth and self.random.random() < 0.3  # with keys they would have to be registered again
        if lost:
            (self.federation.folder / "superlink.db").unlink()
        time.sleep(self._some(2, 8))
        self.federation.restart_superlink()
        return "without its database " if lost else ""

    def do_stop_node(self):
        self._pause(self.nodes[self.random.randrange(3)])

    def do_kill_node(self):
        self._again(self.random.randrange(3), kill=True)

    def do_end_node(self):
        self._again(self.random.randrange(3), kill=False)

    def do_wrong_clock(self):
        k, off = self.random.randrange(3), self.random.choice([-3600, 3600])
        self.federation.stop(self.nodes[k], kill=False)
        node = self.federation.folder / f"{self.names[k]}.yaml"
        self.nodes[k] = self.federation.start(self.names[k], sys.executable, "-c", CLOCK, off, "node", node)
        time.sleep(self._some(8))
        if self.nodes[k].poll() is not None:  # it may refuse, in a line
            print(one_line(self.nodes[k].returncode and 1, tail(self.nodes[k])))
        self._again(k, kill=True)
        return f"{off} s "

    def _again(self, k, *, kill):
        self.federation.stop(self.nodes[k], kill=kill)
        time.sleep(self._some(1, 5))
        self.node(k)

    def do_stop_driver(self):
        self._pause(self.driver)

    def do_kill_driver(self):
        os.kill(self.driver.pid, signal.SIGKILL)
        self.driver.wait()

    def do_interrupt_driver(self):
        self.driver.terminate()
        self.driver.wait(60)

    def do_cut(self):
        """Inside of models; now and then for some seconds elsewhere, too."""
        which = self.random.randrange(4)
        gate, inside, all_cuts = self.gates[which], self.gates[which].inside, self.gates[which].cuts
        gate.due = self.random.randint(1, 3)
        if self.random.random() < 0.5:
            gate.cut = self.random.uniform(0.02, 0.4)
            time.sleep(self._some(3, 10))
            gate.cut = 0.0
        number = len(self.lines())

        def over():
            return not gate.due or len(self.lines()) > number + 1 or self.driver.poll() is not None

        until(over, f"models that pass gate {which}", LIMIT)
        gate.due = 0
        return f"{gate.cuts - all_cuts} times at {which}, {gate.inside - inside} inside of a model, "

    def do_delay(self):
        which = self.random.randrange(4)
        self.gates[which].delay = self._some()
        time.sleep(self.random.uniform(0.1, 2))
        delay, self.gates[which].delay = self.gates[which].delay, 0.0
        return f"{delay:.1f} s at {which} "


BLOCK = 5  # seeds in a row have one federation, with keys or without


@pytest.mark.parametrize("block", [0, 1])
def test_a_federation_that_is_disturbed_has_the_same_end(block, tmp_path):
    with ExitStack() as stack:
        deployment = Deployment(tmp_path, stack, auth=block % 2 == 0)
        for seed in range(BLOCK * block, BLOCK * (block + 1)):
            print(f"seed {seed}: {deployment.disturbed(seed)}")


def flower(first, last):
    """Try these seeds: a tally."""
    kinds, ended, inside = Counter(), Counter(), 0
    deployment, stack = None, ExitStack()
    with tempfile.TemporaryDirectory() as place:
        for seed in range(first, last):
            if deployment is None or seed % BLOCK == 0:
                stack.close()
                (folder := Path(place, str(seed))).mkdir()
                deployment = Deployment(folder, stack, auth=seed // BLOCK % 2 == 0)
            began, before = time.monotonic(), deployment.cut_inside()
            try:
                done, ends = deployment.disturbed(seed)
                inside += deployment.cut_inside() - before
                kinds.update(each.split()[0] for each in done)
                how = "same end" if not ends else "same end after a resume"
                print(f"seed {seed}: {time.monotonic() - began:.0f} s: {done} {ends}", flush=True)
            except Exception as error:
                how = f"FAILED {type(error).__name__}"
                print(f"seed {seed}: {type(error).__name__}: {str(error)[-3000:]}", flush=True)
                deployment = None
            ended[how] += 1
        stack.close()
    print(dict(ended), dict(kinds), f"{inside} cuts inside of a model")


# Ray

RUN = [sys.executable, "-P", "-c", "from fedsim.cli import main; main()"]
ON_RAY = ["runtime=ray", "runtime.actors=2", f"runtime.cpus={SMALL}"]
RAY_ROUNDS = 40
OF_RAY = ("ray::Actor", "gcs_server", "raylet")


def lose_cluster(seed, folder):
    """A run on a local cluster, whose processes are killed or stopped; returns what was done, and how it ended."""
    rng, done, ends = random.Random(seed), [], []
    write(folder, rounds=RAY_ROUNDS)
    new, again = [*RUN, "run", "c.yaml", "--out=run", *ON_RAY], [*RUN, "resume", "run"]
    due = sorted(rng.randrange(-1, RAY_ROUNDS) for _ in range(rng.randint(1, 4)))  # rounds
    while True:
        known = (folder / "run" / "config.yaml").exists()
        with (folder / "err").open("wb") as err:
            driver = subprocess.Popen(again if known else new, cwd=folder, stdout=subprocess.DEVNULL, stderr=err)
        try:
            last, before = time.monotonic(), rounds_logged(folder / "run")
            while driver.poll() is None:
                time.sleep(0.02)
                if before < (now := rounds_logged(folder / "run")):
                    last, before = time.monotonic(), now
                assert time.monotonic() < last + LIMIT, f"hangs: {(folder / 'err').read_text()}"
                if due and before >= due[0]:
                    time.sleep(rng.uniform(0, 15 if due.pop(0) < 0 else 1))
                    done.append(f"{_lose(rng, driver)}, round {rounds_logged(folder / 'run')}")
        finally:
            family = descendants(driver.pid)
            driver.kill()
            driver.wait()
            for pid in family:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        said = (folder / "err").read_text()
        if driver.returncode == 0:
            assert "Traceback" not in said, said
            return done, ends
        ends.append(one_line(driver.returncode, said))
        assert len(ends) < 10, ends


def _lose(rng, driver):
    """Kill or stop one of a driver's processes, or the driver."""
    kind, below = rng.choice([*OF_RAY, "driver"]), {}
    for pid in descendants(driver.pid):
        with suppress(OSError):
            below.setdefault(Path(f"/proc/{pid}/comm").read_text().strip(), []).append(pid)
    pids = [pid for name, some in below.items() if name.startswith(kind) for pid in some]
    pid = driver.pid if kind == "driver" else rng.choice(pids or [0])
    if pid and rng.random() < 0.3:
        seconds = rng.uniform(0.1, 8)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        return f"stop {kind} {seconds:.1f} s"
    if pid:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return f"kill {kind}" if pid else f"no {kind}"


def on_ray(seed, folder):
    """The same, compared with a run in one process."""
    found = lose_cluster(seed, folder)
    config = yaml.safe_load((folder / "c.yaml").read_text())
    fedsim.run(config, out=folder / "whole")
    assert records(folder / "run") == records(folder / "whole"), found
    return found


@pytest.mark.parametrize("seed", range(4))
def test_a_cluster_that_loses_processes_has_the_same_end(seed, tmp_path):
    pytest.importorskip("ray")
    print(f"seed {seed}: {on_ray(seed, tmp_path)}")


def ray(first, last):
    """Try these seeds: a tally."""
    kinds, ended = Counter(), Counter()
    for seed in range(first, last):
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as place:
            try:
                done, ends = on_ray(seed, Path(place))
                kinds.update(" ".join(each.partition(",")[0].split()[:2]) for each in done)
                how = "same end" if not ends else "same end after a resume"
                print(f"seed {seed}: {time.monotonic() - began:.0f} s: {done} {ends}", flush=True)
            except Exception as error:
                how = f"FAILED {type(error).__name__}"
                print(f"seed {seed}: {type(error).__name__}: {str(error)[-3000:]}", flush=True)
            ended[how] += 1
    print(dict(ended), dict(kinds))


if __name__ == "__main__":
    {"flower": flower, "ray": ray}[sys.argv[1]](*map(int, sys.argv[2:4]))
