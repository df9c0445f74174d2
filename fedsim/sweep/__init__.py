"""A grid of settings over one config: points that can be rows of one batch are trained together, others apart."""

import json
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import torch
from rich.console import Console

from fedsim.base.catalogue import Spec
from fedsim.base.files import write
from fedsim.base.machine import cores
from fedsim.base.reading import read_yaml
from fedsim.errors import ConfigError, how_to_install, printable, reason
from fedsim.experiment.build import build, build_hooks
from fedsim.runtimes import runtime_class
from fedsim.runtimes.serial import Serial
from fedsim.sweep.batch import SERVER_SETTINGS, batch_key
from fedsim.sweep.display import Bar, Plain
from fedsim.sweep.folder import PointRun, Sweep, new_folder
from fedsim.sweep.grid import parse_grid
from fedsim.sweep.points import Datasets, as_rows, as_tasks, has_ray, in_turn
from fedsim.sweep.results import Results

MAX_BATCH_POINTS = 64  # with a cohort each, more rows add to the memory and little to the speed
Ended = tuple[int, Results | None]  # the exit status, and the results unless it was interrupted
NO_RAY = f"Ray is not installed; {how_to_install('ray')}"


def sweep(
    config: Path,
    pairs: Sequence[str],
    out: Path | None,
    target: float | None,
    jobs: int | None,
    console: Console,
) -> Ended:
    """Run a grid, or go on with it where `out` holds the same one.

    Raises ConfigError before anything is written.
    """
    if target is not None and not 0 < target < 1:
        raise ConfigError(f"--target: {target} should be between 0 and 1, such as 0.99")
    grid = parse_grid(pairs)
    return _run(Sweep(out or new_folder(config.stem), read_yaml(config), grid, target), jobs, console)


def resume(folder: Path, console: Console) -> Ended:
    """Go on with the sweep in a folder; raises ConfigError."""
    return _run(Sweep.read(folder), None, console)


def _run(what: Sweep, jobs: int | None, console: Console) -> Ended:
    if jobs and jobs > 1 and not has_ray():
        raise ConfigError(f"--jobs: {jobs} points at a time are Ray tasks; {NO_RAY}")
    datasets = Datasets()
    points = what.points
    _check(points, datasets)
    what.save()
    lock = what.lock()
    try:
        left = [point for point in points if not point.finished]
        if skipped := len(points) - len(left):
            console.out(f"{skipped} of {len(points)} points are finished already", highlight=False)
        with (Bar if console.is_terminal else Plain)(console, points) as display:
            done = _go(left, datasets, jobs, display)
        if not done:
            finished = sum(point.finished for point in points)
            line = f"interrupted with {finished} of {len(points)} points done; fedsim resume {what.folder} goes on"
            print(f"fedsim: {printable(line)}", file=sys.stderr)
            return 130, None
        results = Results.of(what, display.failures)
        results.save()
        drawn = _save_picture(results)
    finally:
        lock.release()
    for table in results.tables():
        console.print(table)
    if drawn:
        console.out(f"picture: {what.folder / 'sweep.png'}")
    console.out(f"results: {what.folder}")
    return 1 if len(display.failures) == len(points) else 0, results


def _save_picture(results: Results) -> bool:
    """Write sweep.png into the sweep's folder; False, and a line that says why, where that cannot be."""
    from fedsim.sweep.picture import draw  # matplotlib, which the processes of points need not import

    picture, path = BytesIO(), results.sweep.folder / "sweep.png"
    try:
        draw(results, picture)
        write(path, picture.getvalue())
    except Exception as error:
        line = f"{path}: cannot be written: {reason(error)}; the other results are whole"
        print(f"fedsim: {printable(line)}", file=sys.stderr)
        return False
    return True


def _check(points: Sequence[PointRun], datasets: Datasets) -> None:
    """Build one point of each kind, so that wrong settings are refused before anything runs."""
    seen = set[str]()
    for point in points:
        about = {
            key: value for key, value in point.config.model_dump(mode="json").items() if key in SERVER_SETTINGS
        }
        kind = json.dumps([batch_key(point.config), about | {"seed": None}])
        if point.begun:
            point.check_config()
        if kind not in seen and not point.begun:
            seen.add(kind)
            try:
                own = None if "device" in point.runtime else Serial  # others would start processes
                build(point.config, datasets.divided(point.config), own)
                build_hooks(point.config)
            except ConfigError as error:
                raise ConfigError(f"{point.name}: {error}") from None


def _go(points: Sequence[PointRun], datasets: Datasets, jobs: int | None, display: Plain) -> bool:
    """Run what is left; False where an interrupt ended it."""
    groups = dict[str, list[PointRun]]()
    for point in points:
        groups.setdefault(batch_key(point.config), []).append(point)
    batches = [group for group in groups.values() if len(group) > 1 and _batch_runtime(group[0])]
    for part in (
        group[i : i + MAX_BATCH_POINTS] for group in batches for i in range(0, len(group), MAX_BATCH_POINTS)
    ):
        display.say(f"{len(part)} points as rows of one vectorized batch: {part[0].name} to {part[-1].name}")
        if not as_rows(part, _batch_runtime(part[0]) or {}, datasets, display):
            return False
    rest = [point for point in points if not any(point in group for group in batches)]
    if not rest:
        return True
    at_once, how = _side_by_side(rest, jobs)
    display.say(f"{len(rest)} {'point' if len(rest) == 1 else 'points'} {how}: {_why_no_rows(rest[0])}")
    if at_once > 1:
        return as_tasks(rest, at_once, _gpus(rest), display)
    return in_turn(rest, datasets, display)


def _batch_runtime(point: PointRun) -> Spec | None:
    """What trains points as rows of one batch: their runtime if it can, and vectorized for `auto` on a GPU."""
    runtime = point.runtime
    if runtime_class(runtime).batches_runs:
        return runtime
    if runtime["name"] == "auto" and not runtime["exact"] and _on_gpu(str(runtime["device"])):
        return {"name": "vectorized", "device": runtime["device"]}
    return None


def _on_gpu(device: str) -> bool:
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def _gpus(points: Sequence[PointRun]) -> int:
    """How many GPUs the points can share."""
    wanted = any(_on_gpu(str(point.runtime.get("device", "auto"))) for point in points)
    return torch.cuda.device_count() if wanted else 0


def _side_by_side(points: Sequence[PointRun], jobs: int | None) -> tuple[int, str]:
    """How many points run at once, and how, in words."""
    at_once = min(len(points), jobs or _gpus(points) or cores())
    if at_once == 1:
        return 1, "one after the other"
    if any(point.runtime["name"] == "ray" for point in points):
        return 1, "one after the other, since runtime ray uses the whole cluster"
    if not has_ray():
        return 1, f"one after the other, since {NO_RAY}"
    return at_once, f"as Ray tasks, {at_once} at a time"


def _why_no_rows(point: PointRun) -> str:
    """Why a point is not trained as a row of a batch."""
    runtime = point.runtime
    if _batch_runtime(point):
        return "no two differ in seed and local.lr only, on one partition"
    if runtime["name"] != "auto":
        return f"runtime {runtime['name']} trains each by itself"
    return f"{'runtime.exact' if runtime['exact'] else 'without a GPU runtime auto'} trains each by itself"
