"""What a sweep's folder holds: `fedsim check` of each of its runs."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fedsim.base.files import DRAFT, is_locked
from fedsim.errors import one_line
from fedsim.experiment.check import check_run
from fedsim.experiment.check_checkpoints import Progress
from fedsim.experiment.check_files import entries
from fedsim.experiment.checked import Checked, Part, RunState
from fedsim.sweep.folder import FILE, Sweep

RESULTS = ("sweep.json", "results.csv")  # written when all points have run


def check_sweep(folder: Path, progress: Progress) -> Checked:
    """Look at a sweep's folder: sweep.yaml, a part for each of its points, and its results."""
    running = is_locked(folder)
    finished = not running and os.path.lexists(folder / RESULTS[0])
    state: RunState = "running" if running else "finished" if finished else "interrupted"
    return Checked(folder, state, list(_parts(folder, running, finished, progress)))


def _parts(folder: Path, running: bool, finished: bool, progress: Progress) -> Iterator[Part]:
    try:
        sweep = Sweep.read(folder)
    except ValueError as error:  # a ConfigError, too
        yield Part(FILE, "broken", one_line(error))
        return
    names = sweep.grid.names
    yield Part(FILE, "whole", f"{len(names)} points", {"points": len(names)})
    for name in names:
        if os.path.islink(folder / name) or not os.path.lexists(folder / name / "config.yaml"):
            yield Part(name, "missing") if finished else Part(name, "not checked", "not begun")
            continue
        found = check_run(folder / name, progress)
        numbers = {"rounds": found.rounds} | ({} if found.planned is None else {"planned": found.planned})
        about = found.verdict.partition(": ")[2]
        yield Part(name, "broken" if found.faults else "whole", about, numbers)
        for part in [] if found.faults else found.spares:
            yield replace(part, name=f"{name}/{part.name}")
    for name in RESULTS if finished else ():
        path = folder / name
        whole = path.is_file() and not path.is_symlink()
        yield Part(name, "whole") if whole else Part(name, "missing")
    for name in sorted(entries(folder)) if not running else ():
        if name.endswith(DRAFT):
            yield Part(name, "left over", "of a process that was killed")
