"""One worker: a network, the data and a device, and one client at a time on them."""

import os
import platform
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from time import perf_counter
from typing import TypeVar

import torch
from torch import Tensor

from fedsim.aggregate import Aggregator, Partial
from fedsim.data import FederatedData
from fedsim.errors import ClientError, ConfigError, NodeError, RoundError, located, one_line
from fedsim.task import Replica, Task
from fedsim.types import Job, Report, State, Update
from fedsim.work import Work, check_message

Item = TypeVar("Item")
Result = TypeVar("Result")


class Worker:
    """Runs clients in turn on a replica, and on a GPU a stream, of its own. Not for two threads at once."""

    def __init__(self, task: Task, data: FederatedData, device: torch.device, *, graphs: bool = False):
        self.stream = new_stream(device)
        self.replica, self.data = Replica(task, device, graphs=graphs), data

    def run(
        self,
        work: Work,
        server: State,
        job: Job,
        aggregator: Aggregator,
        tolerant: bool,
        start: Partial | None = None,
        *,
        yields: bool = False,
    ) -> tuple[Partial, Report]:
        """`start` and what one client adds to it, and its report; raises ClientError unless `tolerant`.

        Where it `yields`, a client that runs out of memory raises torch.OutOfMemoryError, and may be run again;
        `start` is then as it was.
        """
        with on_stream(self.stream):
            return self._run(work, server, job, aggregator, tolerant, start, yields)

    def _run(
        self,
        work: Work,
        server: State,
        job: Job,
        aggregator: Aggregator,
        tolerant: bool,
        start: Partial | None,
        yields: bool,
    ) -> tuple[Partial, Report]:
        began, device = perf_counter(), self.replica.device
        try:
            if job.client:  # a copy, so that what a client spoils is its own
                job = job._replace(client={name: _sent(value, device) for name, value in job.client.items()})
            versions = {name: value._version for name, value in (job.client or {}).items()}
            update = work(self.replica, self.data, server, job)
            if written := [name for name, v in versions.items() if (job.client or {})[name]._version != v]:
                raise RuntimeError(f"client[{written[0]!r}] was written in place; states are only read")
        except (Exception, SystemExit) as error:
            if yields and isinstance(error, torch.OutOfMemoryError):
                raise
            return aggregator.fold([], start), failed(job, error, tolerant, perf_counter() - began)
        return folded(update, job, aggregator, tolerant, start, began)


def folded(
    update: Update, job: Job, aggregator: Aggregator, tolerant: bool, start: Partial | None, began: float
) -> tuple[Partial, Report]:
    """`start` and one client's update on top, and its report; raises ClientError unless `tolerant`.

    `began` is when it did, by perf_counter.
    """
    try:
        metrics = {name: float(value) for name, value in update.metrics.items()}
        weight = float(update.weight)
        check_message(update)
        partial = aggregator.fold([(job.client_id, update.message, weight)], start)
    except RoundError:  # no single client's doing
        raise
    except torch.OutOfMemoryError as error:  # which may leave sums that have a part of the message
        where = f"round {job.round + 1}: out of memory where messages are added up"
        raise RoundError(f"{where}; lower runtime.workers") from error
    except Exception as error:
        return aggregator.fold([], start), failed(job, error, tolerant, perf_counter() - began)
    client = {name: _own(value.cpu()) for name, value in update.client.items()}
    size = sum(value.nbytes for value in update.message.values())
    return partial, Report(job.client_id, weight, metrics, client, perf_counter() - began, size)


def failed(job: Job, error: BaseException, tolerant: bool, seconds: float) -> Report:
    """Its report; raises ClientError unless `tolerant`."""
    told = isinstance(error, ArithmeticError | TimeoutError | NodeError)
    cause = one_line(error) if told else located(error)
    if tolerant:
        return Report(job.client_id, 0.0, {}, {}, seconds, 0, cause)
    diverged = isinstance(error, ArithmeticError | NodeError) and ("not finite" in cause or "too large" in cause)
    advice = "; lower local.lr, or set failures.policy=drop" if diverged else ""
    raise ClientError(f"round {job.round + 1}, client {job.client_id}: {cause}{advice}") from error


def new_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A worker's, on a GPU, which from then on repeats its results."""
    if device.type != "cuda":
        return None
    repeat_on_gpus()
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """What is computed inside waits for the default stream, which has the broadcast, and is done at the end.

    After an error too, which frees memory that another stream may be given. Backward passes are in the calling
    thread, and not in one that all of a GPU's workers share. Not yet seen to run on a GPU.
    """
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.default_stream(stream.device))
    with torch.cuda.stream(stream), torch.autograd.set_multithreading_enabled(False):
        try:
            yield
        finally:
            stream.synchronize()


def repeat_on_gpus() -> None:
    """Have CUDA's libraries choose kernels that give the same bits each time; torch warns where there is none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Which that turns on, at the price of a kernel an allocation.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _sent(value: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, for which nobody waits."""
    if device.type == "cuda" and not value.is_cuda:
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device, copy=True)


def _own(value: Tensor) -> Tensor:
    """Without the rest of the tensor that it is a view of."""
    return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value


def in_window(
    pool: ThreadPoolExecutor,
    call: Callable[[Item], Result],
    items: Iterable[Item],
    most: Callable[[], int],
    stop: Callable[[], None] = lambda: None,
) -> Generator[list[Result], None, None]:
    """What `call` gives for each item, as it comes: a bounded window, so that what is finished does not pile up.

    About `most()` are under way or waiting. After an error or an interrupt it asks those to `stop`, starts no
    more, and waits for those under way.
    """
    running, upcoming = set[Future[Result]](), iter(items)
    try:
        while True:
            for item in upcoming:
                running.add(pool.submit(call, item))
                if len(running) >= most():
                    break
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield [future.result() for future in done]
    finally:
        stop()
        for future in running:
            future.cancel()
        wait(running)


@contextmanager
def one_thread() -> Iterator[None]:
    """One intra-op thread, in which CPU results do not depend on the machine's number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_name() -> str:
    """The processor's model, such as AMD EPYC."""
    with suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    return f"{platform.machine()} {platform.processor()}"


def devices(name: str, at: str = "runtime.device") -> list[torch.device]:
    """`auto` is every GPU, or the CPU; otherwise the device of that name. Raises ConfigError naming `at`."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return [torch.device("cuda", i) for i in range(gpus)] or [torch.device("cpu")]
    allowed = ["auto", "cpu", *(["cuda"] if gpus else []), *(f"cuda:{i}" for i in range(gpus))]
    if name not in allowed:
        raise ConfigError(f"{at}: {name!r} is not on this machine; allowed: {', '.join(allowed)}")
    return [torch.device("cuda", 0) if name == "cuda" else torch.device(name)]
