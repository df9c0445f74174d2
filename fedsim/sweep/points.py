"""The points of a sweep, run: as rows of a batch, as Ray tasks, or one after the other."""

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from fedsim.base.own_code import Rule, is_refused, own_code
from fedsim.base.reading import open_regular
from fedsim.data import Dataset, FederatedData
from fedsim.errors import ClientError, ConfigError, RoundError, located, one_line, reason
from fedsim.experiment.build import build, build_data, build_dataset
from fedsim.experiment.checkpoint import Checkpoints
from fedsim.experiment.config import Config, DataOptions, load
from fedsim.experiment.execute import execute
from fedsim.experiment.folder import CHECKPOINTS
from fedsim.experiment.hook import Hook
from fedsim.experiment.round_log import NAME as LOG
from fedsim.experiment.run import Run
from fedsim.experiment.start import Make, Started, new_run, resumed_run
from fedsim.federated.simulation import Simulation
from fedsim.runtimes.auto import Auto
from fedsim.sweep.batch import Batch, RowRuntime, train_together
from fedsim.sweep.folder import PointRun

POLL_SECONDS = 0.3  # between two looks at what tasks have done


class Display(Protocol):
    """Shows how a sweep goes."""

    def say(self, line: str) -> None:
        """Show a line that the user should read."""

    def at(self, name: str, rounds: int) -> None:
        """A point has done this many rounds."""

    def ended(self, name: str, failure: str | None) -> None:
        """A point has ended, by a failure or without."""


class ShowRounds(Hook):
    """Shows in the display how many rounds a point has done."""

    def __init__(self, display: Display, name: str):
        super().__init__()
        self.display, self.name = display, name

    def before_run(self, run: Run) -> None:
        self.display.at(self.name, len(run.records))

    def after_round(self, run: Run, record: dict[str, Any]) -> None:
        self.display.at(self.name, record["round"])


class Datasets:
    """Loads datasets, and keeps the last one for the points that use the same."""

    def __init__(self) -> None:
        self._kept: tuple[Any, Dataset] | None = None

    def __call__(self, config: Config) -> Dataset:
        key = {name: value for name, value in config.data.items() if name not in DataOptions.model_fields}
        if self._kept is None or self._kept[0] != key:
            self._kept = None  # so that memory never holds two
            self._kept = key, build_dataset(config)
        return self._kept[1]

    def divided(self, config: Config) -> FederatedData:
        """The dataset and who holds what; raises ConfigError."""
        return build_data(config, self(config))


def begin(point: PointRun, make: Make, display: Display | None = None, max_round: int | None = None) -> Started:
    """A new run of a point, or the one in its folder at its last checkpoint; raises ConfigError.

    With `max_round` at the last checkpoint of at most so many rounds.
    """
    if point.begun:
        run, hooks = resumed_run(point.folder, {}, make=make, max_round=max_round)
    else:
        run, hooks = new_run(point.config, point.folder, make=make)
    if display:
        for note in run.notes:
            display.say(f"{point.name}: {note}")
    return run, hooks


def in_turn(points: Sequence[PointRun], datasets: Datasets, display: Display) -> bool:
    """Run one after the other; False where an interrupt ended it."""

    def make(config: Config) -> Simulation:
        return build(config, datasets.divided(config))

    def run_one(point: PointRun) -> bool:
        run, hooks = begin(point, make, display)
        result = execute(run, [*hooks, ShowRounds(display, point.name)])
        for line in run.warnings:
            display.say(f"{point.name}: {line}")
        return not result.interrupted

    for point in points:
        try:
            if not run_one(point):
                return False
        except KeyboardInterrupt:
            return False
        except Exception as error:
            display.ended(point.name, failure_line(error))
        else:
            display.ended(point.name, None)
    return True


def as_rows(points: Sequence[PointRun], runtime: dict[str, Any], datasets: Datasets, display: Display) -> bool:
    """Run all together as rows of one batch; False where an interrupt ended them."""
    config = points[0].config
    batch = Batch(runtime, datasets.divided(config), chosen=runtime != points[0].runtime)
    begun, common = list[tuple[PointRun, Run, list[Hook]]](), _common_round(points)
    try:
        for point in points:
            try:
                begun.append((point, *begin(point, batch.make, display, common)))
            except Exception as error:
                display.ended(point.name, failure_line(error))
        for shared in batch.shared.values():  # one, unless networks have constants that differ
            names = {row: p.name for p, run, _ in begun if (row := _row_runtime(run)).shared is shared}
            runs = [
                partial(execute, run, [*hooks, ShowRounds(display, point.name)])
                for point, run, hooks in begun
                if _row_runtime(run) in names
            ]

            def ended(row: RowRuntime, names: dict[RowRuntime, str] = names) -> None:
                if row.error is not None or (row.result and not row.result.interrupted):
                    display.ended(names[row], None if row.error is None else failure_line(row.error))

            if not train_together(list(names), runs, ended):
                return False
    except KeyboardInterrupt:  # before it began
        return False
    finally:
        for _, run, _ in begun:
            if run.folder:
                run.folder.close()
    return True


def _common_round(points: Sequence[PointRun]) -> int | None:
    """The round after which all points go on, so that a batch has the rows again that it had before a kill.

    None, so that each goes on from its own last round, where these differ by more than a kill explains, as when
    one point has failed before.
    """
    rounds = [Checkpoints(point.folder / CHECKPOINTS).newest for point in points]
    return min(rounds) if max(rounds) - min(rounds) <= (points[0].config.checkpoint.every or 0) else None


def as_tasks(points: Sequence[PointRun], jobs: int, gpus: int, display: Display) -> bool:
    """Run `jobs` at a time as Ray tasks that share out cores and GPUs; False where an interrupt ended them."""
    import ray

    from fedsim.runtimes.ray.cluster import join

    ours, all_cores = not ray.is_initialized(), sorted(os.sched_getaffinity(0))
    share = gpus / jobs if jobs >= gpus else gpus // jobs
    free = [all_cores[slot::jobs] or [all_cores[slot % len(all_cores)]] for slot in range(jobs)]
    waiting, running = list(points), dict[Any, tuple[PointRun, list[int]]]()
    try:
        join(None)
        task = ray.remote(num_cpus=0, num_gpus=share, max_retries=0)(_task)  # cores are shared out here
        while waiting or running:
            while waiting and free:
                point, own = waiting.pop(0), free.pop(0)
                values, paths = point.config.model_dump(mode="json"), [os.path.abspath(path) for path in sys.path]
                rule = Rule.REFUSED if is_refused() else Rule.IMPORTED  # announced by this process
                running[task.remote(values, point.name, point.folder, own, os.getcwd(), paths, rule)] = point, own
            done, _ = ray.wait(list(running), timeout=POLL_SECONDS)
            for ref in done:
                point, own = running.pop(ref)
                free.append(own)
                display.ended(point.name, _failure(ref))
            for point, _own in running.values():
                display.at(point.name, rounds_done(point.folder))
    except KeyboardInterrupt:
        with suppress(KeyboardInterrupt):
            _stop(list(running))
        return False
    finally:
        if ours and ray.is_initialized():
            ray.shutdown()
    return True


def has_ray() -> bool:
    """Whether Ray is installed."""
    from importlib.util import find_spec

    return find_spec("ray") is not None


def rounds_done(folder: Path) -> int:
    """By the lines of rounds.jsonl."""
    try:
        with open_regular(folder / LOG) as log:
            return sum(block.count(b"\n") for block in iter(partial(log.read, 2**20), b""))
    except OSError:
        return 0


def failure_line(error: BaseException) -> str:
    """Why a point failed, in a line."""
    if isinstance(error, OSError) and error.filename:
        return one_line(f"{error.filename}: {error.strerror}")
    return one_line(error) if isinstance(error, ClientError | RoundError | ConfigError) else located(error)


def _row_runtime(run: Run) -> RowRuntime:
    runtime = run.simulation.runtime
    assert isinstance(runtime, RowRuntime)
    return runtime


def _task(
    values: dict[str, Any], name: str, folder: Path, own_cores: list[int], place: str, paths: list[str], rule: Rule
) -> str | None:
    """Run one point in a process of Ray's, on its own cores, with the driver's modules; returns why it failed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started the sweep with `&`
    signal.pthread_sigmask(
        signal.SIG_UNBLOCK, {signal.SIGINT}
    )  # Ray blocks it, and an interrupt that is pending comes now
    os.sched_setaffinity(0, own_cores)
    os.chdir(place)
    sys.path[:] = paths
    try:
        with own_code(rule):
            execute(*begin(PointRun(name, {}, load(values), folder), _simulation))
    except Exception as error:
        return failure_line(error)
    return None


def _simulation(config: Config) -> Simulation:
    """The simulation, with threads for `auto`: beside other points, measured times say nothing of a runtime."""
    simulation = build(config)
    if isinstance(simulation.runtime, Auto):
        simulation.runtime.restore_choice(
            {"name": "threads", "device": simulation.runtime.device}, simulation.work
        )
    return simulation


def _failure(ref: Any) -> str | None:
    """Why a task that has ended failed; None where it did not."""
    import ray

    try:
        failure: str | None = ray.get(ref)
    except ray.exceptions.RayError as error:  # the process died
        return reason(error)
    return failure


def _stop(running: list[Any]) -> None:
    """Interrupt tasks as Ctrl-C does, and wait until each has written its checkpoint."""
    import ray

    for ref in running:
        ray.cancel(ref)
    ray.wait(running, num_returns=len(running), timeout=None)
