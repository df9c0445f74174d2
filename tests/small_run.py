"""A small run that knows all that a checkpoint holds, what it leaves in forms that compare, and how it goes on."""

import json
import os
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor

import yaml
from safetensors.torch import load_file
from tensorboard.compat.proto.event_pb2 import Event

IN_MEMORY = (
    "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
)  # a folder, for what is written thousands of times
DATA = {"name": "synthetic", "examples": 60, "test_examples": 30, "classes": 3, "clients": 5, "holdout": 0.3}
CONFIG = {
    "seed": 3,
    "rounds": 4,
    "data": DATA | {"noise": 0.7},
    "model": {"name": "cnn_bn", "widths": [3, 4]},
    "strategy": "scaffold",
    "cohort": {"name": "uniform", "fraction": 0.4},
    "local": {"lr": 0.05, "batch_size": 4},
    "evaluate": {"every": 2, "clients": True},
    "runtime": "serial",
    "checkpoint": {"every": 1, "keep": 2},
    "client_store": {"memory": "4KiB"},  # of which four clients' states make up more
    "hooks": ["stop_on_non_finite", "tensorboard"],
}
MEASURED = {"seconds", "client_steps_per_second", "peak_memory_bytes", "seconds/round"}


def write(folder, **settings):
    """Have c.yaml there."""
    (folder / "c.yaml").write_text(yaml.safe_dump(CONFIG | settings))


def left(run):
    """All that a finished run says and keeps, in a form that compares."""
    return {
        "files": sorted(path.name for path in run.iterdir()),
        "config": (run / "config.yaml").read_text(),
        "partition": (run / "partition.json").read_text(),
        "rounds": records(run),
        "summary": timeless(json.loads((run / "summary.json").read_text())),
        "model": (run / "model.safetensors").read_bytes(),
        "events": events(run / "tensorboard"),
        "state": state(run),
    }


def records(run):
    return [timeless(json.loads(line)) for line in (run / "rounds.jsonl").read_text().splitlines()]


def timeless(record):
    """In order, for a file has one."""
    return [(key, None if key in MEASURED else value) for key, value in record.items()]


def events(folder):
    """Every scalar in order: tag, round and value. There is one file, and it has an end."""
    (file,) = folder.iterdir()
    content, found = memoryview(file.read_bytes()), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(bytes(content[12 : 12 + length]))
        content = content[12 + length + 4 :]
        found += [
            (value.tag, event.step, None if value.tag in MEASURED else value.simple_value)
            for value in event.summary.value
        ]
    return found


def state(run):
    """Of the newest checkpoint the server's state and each client's, as bytes; and nothing else lies there."""
    folder = run / "checkpoints"
    names = sorted(path.name for path in folder.iterdir())
    numbers = [int(name[:6]) for name in names if name.endswith(".json")]
    needed, found = set(), {}
    for number in numbers:
        checkpoint = json.loads((folder / f"{number:06}.json").read_text())["checkpoint"]
        needed |= {f"{number:06}.json", checkpoint["server"]["name"], *(f["name"] for f in checkpoint["clients"])}
        found = {f"server.{k}": v for k, v in load_file(folder / checkpoint["server"]["name"]).items()}
        for file in checkpoint["clients"]:  # of a client in several, the last counts
            tensors = load_file(folder / file["name"])
            clients = {key.partition(".")[0] for key in tensors}
            found = {k: v for k, v in found.items() if k.partition(".")[0] not in clients} | tensors
    assert set(names) == needed
    values = {key: (str(value.dtype), tuple(value.shape), value.numpy().tobytes()) for key, value in found.items()}
    return dict(sorted(values.items()))


def rounds_done(run):
    """By the newest checkpoint."""
    return max((int(path.stem) for path in (run / "checkpoints").glob("*.json")), default=0)


def rounds_logged(run):
    log = run / "rounds.jsonl"
    return len(log.read_bytes().splitlines()) if log.exists() else 0


def contents(folder):
    """Every file with its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# What stops, and goes on

QUIET = ("", "fedsim: no checkpoint: starts with round 1\n")


def whole(forks, folder, *settings, name="whole"):
    """What a run never stopped leaves."""
    done = forks.run("run", "c.yaml", *settings, f"--out={name}", cwd=folder)
    assert (done.status, done.err) == (0, ""), str(done)
    return left(folder / name)


def resumed(forks, folder, name, *settings, warned=False):
    """What is left once a run was resumed and went to its end, with no word of complaint unless `warned`."""
    done = forks.run("resume", name, *settings, cwd=folder)
    assert done.status == 0, str(done)
    assert warned or done.err in QUIET, str(done)
    return left(folder / name)


def same(forks, folder, moments, expected, *settings, warned=False):
    """Each of these folders of a stopped run, resumed, comes to what is expected."""

    def end(moment):
        return resumed(forks, folder, moment, *settings, warned=warned)

    with ThreadPoolExecutor(3) as pool:
        for moment, found in zip(moments, pool.map(end, moments), strict=True):
            assert found == expected, moment
            shutil.rmtree(moment)


def refused(done, *said):
    """It ended with status 2 and one line that says all of this."""
    assert done.status == 2, str(done)
    assert done.err.startswith("fedsim: "), str(done)
    assert done.err.count("\n") == 1, str(done)
    for each in said:
        assert each in done.err


def snapshots(folder):
    """Folders as a kill would leave them, before and within each change to a file, in order."""
    return sorted((folder / "at").iterdir())
