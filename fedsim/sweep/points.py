"""The points of a sweep, run: as rows of a batch, as Ray tasks, or one after the other."""

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from fedsim.data import Dataset, FederatedData
from fedsim.errors import ClientError, ConfigError, RoundError, located, one_line, reason
from fedsim.experiment.build import build, build_data, build_dataset
from fedsim.experiment.checkpoint import Checkpoints
from fedsim.experiment.config import Config, Federation, load
from fedsim.experiment.folder import CHECKPOINTS
from fedsim.experiment.hooks import Hook
from fedsim.experiment.run import Make, Run, execute
from fedsim.federated.simulation import Simulation
from fedsim.runtimes.auto import Auto
from fedsim.sweep.batch import Batch, Member, train_together
from fedsim.sweep.folder import PointRun

POLL = 0.3  # seconds between two looks at what tasks have done


class Display(Protocol):
    """Is told how a sweep goes."""

    def say(self, line: str) -> None:
        """Something that the user should know."""

    def at(self, name: str, rounds: int) -> None:
        """A point has done so many rounds."""

    def ended(self, name: str, failure: str | None) -> None:
        """A point has ended, by a failure or without."""


class Tell(Hook):
    """Tells the display of each round."""

    def __init__(self, display: Display, name: str):
        super().__init__()
        self.display, self.name = display, name

    def before_run(self, run: Run) -> None:
        self.display.at(self.name, len(run.records))

    def after_round(self, run: Run, record: dict[str, Any]) -> None:
        self.display.at(self.name, record["round"])


class Datasets:
    """One copy of a dataset for all points that have the same; the last one is kept."""

    def __init__(self) -> None:
        self._kept: tuple[Any, Dataset] | None = None

    def __call__(self, config: Config) -> Dataset:
        key = {name: value for name, value in config.data.items() if name not in Federation.model_fields}
        if self._kept is None or self._kept[0] != key:
            self._kept = None  # before there are two
            self._kept = key, build_dataset(config)
        return self._kept[1]

    def divided(self, config: Config) -> FederatedData:
        """The dataset and who holds what; raises ConfigError."""
        return build_data(config, self(config))


def begin(point: PointRun, make: Make, display: Display | None = None, most: int | None = None) -> Run:
    """A point's run, at its last checkpoint, of `most` rounds if given, if it was begun; raises ConfigError."""
    if not point.begun:
        return Run.start(point.config, point.folder, make=make)
    run = Run.resume(point.folder, {}, make=make, most=most)
    if display:
        for note in run.notes:
            display.say(f"{point.name}: {note}")
    return run


def in_turn(points: Sequence[PointRun], datasets: Datasets, display: Display) -> bool:
    """Run one after the other; False where an interrupt ended it."""

    def make(config: Config) -> Simulation:
        return build(config, datasets.divided(config))

    for point in points:
        try:  # without a name for the run, under which it would live on while the next one is made
            if execute(begin(point, make, display), [Tell(display, point.name)]).interrupted:
                return False
        except KeyboardInterrupt:
            return False
        except Exception as error:
            display.ended(point.name, told(error))
        else:
            display.ended(point.name, None)
    return True


def as_rows(points: Sequence[PointRun], runtime: dict[str, Any], datasets: Datasets, display: Display) -> bool:
    """Run all together as rows of one batch; False where an interrupt ended them."""
    config = points[0].config
    batch = Batch(runtime, datasets.divided(config), chosen=runtime != points[0].runtime)
    begun, together = list[tuple[PointRun, Run]](), _together(points)
    try:
        for point in points:
            try:
                begun.append((point, begin(point, batch.make, display, together)))
            except Exception as error:
                display.ended(point.name, told(error))
        for shared in batch.shared.values():  # one, unless networks have constants that differ
            names = {m: p.name for p, r in begun if (m := _member(r)).shared is shared}
            runs = [partial(execute, run, [Tell(display, p.name)]) for p, run in begun if _member(run) in names]

            def ended(member: Member, names: dict[Member, str] = names) -> None:
                if member.error is not None or (member.result and not member.result.interrupted):
                    display.ended(names[member], None if member.error is None else told(member.error))

            if not train_together(list(names), runs, ended):
                return False
    except KeyboardInterrupt:  # before it began
        return False
    finally:
        for _, run in begun:
            if run.folder:
                run.folder.close()
    return True


def _together(points: Sequence[PointRun]) -> int | None:
    """The round that all go on from, so that rows have the neighbours that they had when they were killed.

    None, each from its own, where they are further apart than a kill leaves them, as after one had failed.
    """
    rounds = [Checkpoints(point.folder / CHECKPOINTS).newest for point in points]
    return min(rounds) if max(rounds) - min(rounds) <= (points[0].config.checkpoint["every"] or 0) else None


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
                running[task.remote(values, point.name, point.folder, own, os.getcwd(), paths)] = point, own
            done, _ = ray.wait(list(running), timeout=POLL)
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
    log = folder / "rounds.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def told(error: BaseException) -> str:
    """Why a point failed, in a line."""
    if isinstance(error, OSError) and error.filename:
        return one_line(f"{error.filename}: {error.strerror}")
    return one_line(error) if isinstance(error, ClientError | RoundError | ConfigError) else located(error)


def _member(run: Run) -> Member:
    member = run.simulation.runtime
    assert isinstance(member, Member)
    return member


def _task(
    values: dict[str, Any], name: str, folder: Path, own_cores: list[int], place: str, paths: list[str]
) -> str | None:
    """In a process of Ray's: one point, on so many cores, with the driver's modules; returns why it failed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started us behind a `&`
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # by which an interrupt that had to wait is sent
    os.sched_setaffinity(0, own_cores)
    os.chdir(place)
    sys.path[:] = paths
    try:
        execute(begin(PointRun(name, {}, load(values), folder), _simulation))
    except Exception as error:
        return told(error)
    return None


def _simulation(config: Config) -> Simulation:
    """With `auto` made threads: what others do on this machine at the time says nothing of a runtime's speed."""
    simulation = build(config)
    if isinstance(simulation.runtime, Auto):
        simulation.runtime.restore_choice(
            {"name": "threads", "device": simulation.runtime.device}, simulation.work
        )
    return simulation


def _failure(ref: Any) -> str | None:
    """Of a task that has ended: why, if not well."""
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
