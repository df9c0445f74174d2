"""A long run: nothing grows that has no reason to, wherever its clients run.

`python tests/test_soak.py RUNTIME [ROUNDS]` prints what serial, threads, vectorized, ray or flower holds.
"""

import logging
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from time import process_time

import pytest
from flowers import descendants
from small_run import IN_MEMORY

import fedsim
from fedsim.experiment.config import load
from fedsim.experiment.execute import execute
from fedsim.experiment.hook import Hook
from fedsim.experiment.start import new_run

ROUNDS = 2000
CONFIG = {
    "data": {"name": "digits", "clients": 50, "partition": {"name": "dirichlet", "alpha": 0.5}, "holdout": 0.2},
    "model": {"name": "cnn_bn", "widths": [4, 8]},
    "cohort": {"name": "uniform", "fraction": 0.2},
    "local": {"lr": 0.05, "batch_size": 10},
    "client_store": {"memory": "100KiB"},  # for some of fifty clients
}
LONG = {
    "strategy": "scaffold",
    "evaluate": {"every": 50, "clients": True},
    "checkpoint": {"every": 1, "keep": 3},
    "hooks": ["stop_on_non_finite", "tensorboard"],
}
RUNTIMES = {
    "serial": {"device": "cpu"},
    "threads": {"device": "cpu"},
    "vectorized": {"device": "cpu"},
    "ray": {"actors": 2, "cpus": 0.2},
}
FAULTS = {"link": 0.01, "end": 0.001, "leave": 0.001, "double": 0.1, "forget": 0.01}  # of the flower lab's wire
FOREVER = {"wait": 1e6, "round_timeout": 1e6}


@dataclass
class Watch(Hook):
    """What the process holds, and its folder, in every tenth of a hundred rounds."""

    priority: int = field(default=200, init=False)  # once the checkpoint is there
    seen: list[dict[str, float]] = field(default_factory=list)
    before: float = field(default_factory=process_time)

    def after_round(self, run, record):
        if record["round"] % 10 == 0:
            here = run.folder.path
            files = list((here / "checkpoints").iterdir())
            below = descendants(os.getpid())
            seen = {
                "memory": resident("self"),
                "others": sum(map(resident, below)),  # processes of Ray
                "threads": len(os.listdir("/proc/self/task")),
                "handles": len(os.listdir("/proc/self/fd")),
                "processes": len(below),
                "files": len(files),
                "bytes": sum(path.stat().st_size for path in files),
                "log": sum(path.stat().st_size for path in [here / "rounds.jsonl", *here.glob("tensorboard/*")]),
                "seconds": sum(each["seconds"] for each in run.records[-10:]) / 10,
                "cpu": (process_time() - self.before) / 10,  # seconds of a round, checkpoint and all
            }
            self.before = process_time()
            self.seen.append({"round": record["round"]} | seen)

    def around(self, rounds):
        """Means of what was seen within a hundred rounds of this one, but for the last ones."""
        near = [each for each in self.seen if rounds - 100 < each["round"] <= rounds]
        return {name: sum(each[name] for each in near) / len(near) for name in near[0]}


def resident(process):
    """Bytes of memory that a process holds of its own; 0 where it has ended."""
    try:
        pages, shared = map(int, Path("/proc", str(process), "statm").read_text().split()[1:3])
    except OSError:
        return 0
    return (pages - shared) * os.sysconf("SC_PAGE_SIZE")


def soak(runtime, rounds, folder):
    """Run it; returns what was seen, and the result."""
    watch, long = Watch(), LONG | {"rounds": rounds}
    if runtime != "flower":
        config = CONFIG | long | {"runtime": {"name": runtime} | RUNTIMES[runtime]}
        return watch, fedsim.run(config, out=folder / "run", hooks=[watch])
    import lab

    with pytest.MonkeyPatch.context() as patch:
        logging.disable(logging.ERROR)  # pytest keeps each line
        here = lab.Lab(folder / "lab", patch, **FAULTS)
        try:
            config = load(lab.CONFIG | long)
            run, hooks = new_run(config, folder / "run", make=lambda made: here.simulation(made, **FOREVER))
            return watch, execute(run, [*hooks, watch])
        finally:
            here.close()
            logging.disable(logging.NOTSET)


def shown(watch, rounds):
    """Both ends of a run, as rows."""
    first, last = watch.around(200), watch.around(rounds)
    ends = [f"{name:>9} {first[name]:16,.3f} {last[name]:16,.3f}" for name in first]
    return "\n".join(ends)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", [*RUNTIMES, "flower"])
def test_thousands_of_rounds_hold_no_more_than_the_first(runtime, capsys):
    """But for a record of each round, which may stay in memory: 5 kB, or 10 kB with three nodes in the process."""
    most = (10_000 if runtime == "flower" else 5000) * ROUNDS
    pytest.importorskip("sklearn" if runtime != "flower" else "flwr")
    pytest.importorskip("ray" if runtime == "ray" else "sklearn")
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as name:
        watch, result = soak(runtime, ROUNDS, Path(name))
    first, last = watch.around(200), watch.around(ROUNDS)
    with capsys.disabled():
        print(f"\n{runtime}: {result.summary['test_accuracy']:.1%}\n{shown(watch, ROUNDS)}")
    assert last["memory"] < first["memory"] + most
    assert last["others"] < first["others"] + most
    for name in ("threads", "handles", "processes", "files"):
        assert last[name] < 1.1 * first[name] + 1, name
    assert last["bytes"] < 1.1 * first["bytes"]
    assert last["log"] < first["log"] + 1000 * ROUNDS
    assert last["cpu"] < 2 * first["cpu"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as place:
        number = int(sys.argv[2]) if len(sys.argv) > 2 else ROUNDS
        print(shown(soak(sys.argv[1], number, Path(place))[0], number))
