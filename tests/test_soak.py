"""A long run: nothing grows that has no reason to."""

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from small_run import IN_MEMORY

import fedsim
from fedsim.experiment.hook import Hook

ROUNDS = 3000
CONFIG = {
    "rounds": ROUNDS,
    "data": {"name": "digits", "clients": 50, "partition": {"name": "dirichlet", "alpha": 0.5}, "holdout": 0.2},
    "model": {"name": "cnn_bn", "widths": [4, 8]},
    "strategy": "scaffold",
    "cohort": {"name": "uniform", "fraction": 0.2},
    "local": {"lr": 0.05, "batch_size": 10},
    "evaluate": {"every": 50, "clients": True},
    "runtime": {"name": "threads", "device": "cpu"},
    "checkpoint": {"every": 1, "keep": 3},
    "client_store": {"memory": "100KiB"},  # for some of fifty clients
    "hooks": ["stop_on_non_finite", "tensorboard"],
}


@dataclass
class Watch(Hook):
    """What the process holds, and its folder of checkpoints, every so many rounds."""

    priority: int = field(default=200, init=False)  # once the checkpoint is there
    seen: list[dict[str, int]] = field(default_factory=list)

    def after_round(self, run, record):
        if record["round"] % 20 == 0:
            files = list((run.folder.path / "checkpoints").iterdir())
            self.seen.append(
                {
                    "memory": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
                    "threads": len(os.listdir("/proc/self/task")),
                    "handles": len(os.listdir("/proc/self/fd")),
                    "files": len(files),
                    "bytes": sum(path.stat().st_size for path in files),
                }
            )


@pytest.mark.slow
def test_thousands_of_rounds_hold_no_more_than_the_first(capsys):
    """Means of the first third, but for a start, and of the last; a record of each round may stay in memory."""
    pytest.importorskip("sklearn")
    watch = Watch()
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as name:
        result = fedsim.run(CONFIG, out=f"{name}/run", hooks=[watch])
    third = len(watch.seen) // 3
    first, last = (
        {name: sum(each[name] for each in part) / len(part) for name in part[0]}
        for part in (watch.seen[5:third], watch.seen[-third:])
    )
    with capsys.disabled():
        print(f"\nfirst {first}\nlast  {last}\n{result.summary['test_accuracy']:.1%}")
    assert last["memory"] < first["memory"] + 5000 * ROUNDS
    assert last["threads"] == first["threads"]
    assert last["handles"] == first["handles"]
    assert last["files"] < 1.1 * first["files"] + 1
    assert last["bytes"] < 1.1 * first["bytes"]
