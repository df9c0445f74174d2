"""The laws, on a Ray cluster: one seed, one model, whoever dies; nothing stays behind."""

import gc
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, reduce
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from conftest import SIZES, cohort_for, make_data, make_simulation, make_strategy, make_task, trace
from covering import sampled
from flowers import descendants
from small_run import CONFIG, records, rounds_done, write
from test_failures import (
    DROP,
    ODD,
    Dawdles,
    InPlace,
    InPlaceAtHome,
    Odd,
    Sends,
    faulty,
    left_no_trace,
    state,
    without,
)
from test_laws import RECIPES, SAMPLE

from fedsim import ClientError, ConfigError, RoundError, Wrapper
from fedsim.data import FederatedData
from fedsim.data.npz import npz
from fedsim.experiment.config import load
from fedsim.experiment.execute import execute
from fedsim.experiment.run import Run
from fedsim.experiment.start import new_run
from fedsim.federated.aggregate import MESSAGES_AT_ONCE, WeightedMean
from fedsim.federated.client import Train
from fedsim.federated.recalibration import Recalibrate
from fedsim.federated.simulation import Failures
from fedsim.strategies import CATALOGUE
from fedsim.types import Job

ray = pytest.importorskip("ray")
grpc = pytest.importorskip("grpc")
from fedsim.runtimes.ray import Ray, watch  # noqa: E402
from fedsim.runtimes.ray.cluster import join  # noqa: E402
from fedsim.runtimes.ray.packing import pack, unpack  # noqa: E402

TASK, DATA = make_task(), make_data()
PAGE = os.sysconf("SC_PAGE_SIZE")
LOOPBACK = "127.0.0.2"  # Ray takes another address of this machine for 127.0.0.1
SMALL = 0.2  # of a CPU, for many actors on few


@pytest.fixture(scope="module", autouse=True)
def _local():
    """One Ray for all tests, which the first of them starts; with two cores, wherever it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsim.runtimes.ray.cluster.cores", lambda: 2)
        patch.setattr(
            "fedsim.runtimes.ray.pool.WARN_AFTER_SECONDS", 300.0
        )  # actors are slow to start where much else runs
        patch.setattr("fedsim.runtimes.ray.pool.MAX_WAIT_SECONDS", 300.0)
        yield
    actors.cache_clear()
    crowded.cache_clear()
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # of Ray, about its own processes
        ray.shutdown()
        gc.collect()


@cache
def actors(count):
    """A runtime of so many actors, whose network and data all tests share."""
    return Ray(TASK, DATA, actors=count, cpus=SMALL)


def simulate(strategy="fedavg", count=2, **settings):
    return make_simulation(strategy, task=TASK, data=DATA, runtime=actors(count), **settings)


@cache
def serial(strategy, rounds=3, **settings):
    return trace(make_simulation(strategy, **settings), rounds)


# One seed, one model


@pytest.fixture(scope="module", params=[name for name in CATALOGUE if not CATALOGUE.load(name).uses_public])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def reference(name):
    return trace(make_simulation(name, cohort=cohort_for(name, SAMPLE)))


COUNTS = (1, 2, 4)


def test_actors_agree_with_serial(name, reference):
    count = COUNTS[list(CATALOGUE).index(name) % 2]  # of the fewer, as each actor takes seconds to start
    assert trace(simulate(name, count, cohort=cohort_for(name, SAMPLE))) == reference


def test_a_server_that_trains_does_so_on_an_actor():
    data = make_data(public=4)
    there = trace(make_simulation("fltrust", data=data, runtime=Ray(TASK, data, actors=1, cpus=SMALL)))
    assert there == trace(make_simulation("fltrust", data=data))


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
def test_any_number_of_actors_agrees_with_serial(name, reference, count):
    assert trace(simulate(name, count, cohort=cohort_for(name, SAMPLE))) == reference


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "channels_last"])  # another network's
def test_actors_agree_on_every_recipe(recipe):
    here, there = (
        trace(make_simulation("fedbn", cohort=SAMPLE, task=TASK, data=DATA, runtime=runtime, **RECIPES[recipe]))
        for runtime in ("serial", actors(2))
    )
    assert here == there


CROWD = make_data([3] * 40, public=12)


@cache
def crowded():
    """Two actors with the data of more clients."""
    return Ray(TASK, CROWD, actors=2, cpus=SMALL)


def test_more_clients_than_any_cap():
    """And with at most two under way for each actor, so that clients' states do not pile up."""
    simulation = make_simulation("scaffold", task=TASK, data=CROWD, runtime=crowded())
    handed, reported, most = [0], [0], [0]

    def out(client):
        handed[0] += 1
        most[0] = max(most[0], handed[0] - reported[0])

    def back(report):
        reported[0] += 1

    done = simulation.round(back, out)
    assert done.fingerprint == make_simulation("scaffold", task=TASK, data=CROWD).round().fingerprint
    assert most[0] <= 4


def test_recalibration_runs_on_actors_too():
    averaged = make_strategy("fedavg", buffers="recalibrated")
    settings = {"task": TASK, "data": CROWD, "recalibrate": Recalibrate()}
    made = [make_simulation(averaged, runtime=runtime, **settings) for runtime in ("serial", crowded())]
    assert trace(made[0]) == trace(made[1])


def test_what_reaches_the_driver_grows_with_actors_and_not_with_the_cohort(monkeypatch):
    received = [0]

    def counted(packed, *, own=False):
        received[0] += sum(array.nbytes for array in packed[1])
        return unpack(packed, own=own)

    monkeypatch.setattr("fedsim.runtimes.ray.dispatch.unpack", counted)
    make_simulation("fedavg", task=TASK, data=CROWD, runtime=crowded()).round()
    numbers = len(TASK.initial_model) + len(TASK.initial_buffers)
    assert 0 < received[0] <= 2 * numbers * (2 * 8 + (MESSAGES_AT_ONCE - 1) * 4)  # two in float64, and what waits


def test_a_partial_sum_travels_with_all_its_bins():
    values = 1e30, 1.0, -1e30, 3e-20
    sent = [(k, {"w": torch.tensor([value, 1.0])}, 1.0 + k % 2) for k, value in enumerate(values)]
    mean = WeightedMean()
    parts = [unpack(pack(mean.fold(part)), own=True) for part in (sent[:2], [], sent[2:])]
    assert torch.equal(mean.result(reduce(mean.merge, parts))["w"], mean.result(mean.fold(sent))["w"])


# Failures


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "fedbn"])
def test_who_is_dropped_leaves_no_trace(name):
    dropped = trace(simulate(faulty(1, 4, name=name), failures=DROP), rounds=2)
    causes = left_no_trace(dropped, without(name), 1, 4)
    assert all("no space left (test_failures.py:" in cause for cause in causes)


def test_a_failure_names_its_client_and_has_its_cause_and_the_round_can_be_run_again():
    strategy = faulty()
    simulation = simulate(strategy)
    expected = trace(make_simulation("scaffold"))
    assert trace(simulation, rounds=1) == expected[:1]
    before = state(simulation)
    strategy.bad.add(3)
    with pytest.raises(ClientError, match=r"^round 2, client 3: OSError: no space left \(test_failures") as caught:
        simulation.round()
    assert isinstance(caught.value.__cause__, OSError)
    assert "client_update" in caught.value.__cause__.__notes__[0]
    assert state(simulation) == before
    strategy.bad.clear()
    assert trace(simulation, rounds=2) == expected[1:]


class TwoWordsError(Exception):
    """Cannot be made again from its arguments, as a pickle would."""

    def __init__(self, a, b):
        super().__init__(f"{a} {b}")


@dataclass(frozen=True, kw_only=True)
class Raises(Wrapper):
    """Client 2 fails in a way of its own."""

    def client_update(self, server, client, local):
        if local.client_id == 2:
            raise TwoWordsError("so", "what")
        return super().client_update(server, client, local)


def test_an_exception_that_cannot_travel_is_told():
    with pytest.raises(ClientError, match=r"^round 1, client 2: TwoWordsError: so what \(test_ray.py:") as caught:
        simulate(Raises(inner=make_strategy("fedavg"))).round()
    assert str(caught.value.__cause__) == "TwoWordsError: so what"


@pytest.mark.parametrize(
    ("strategy", "error", "said"),
    [
        (InPlace(inner=make_strategy("fedavg")), RoundError, r"wrote server\['model'\] in place"),
        (InPlaceAtHome(inner=make_strategy("scaffold")), ClientError, r"client\['c'\] was written in place"),
        (
            Sends(inner=make_strategy("fedavg"), name=1),
            ClientError,
            "round 1, client 2: .*gave 1 as a name in its message",
        ),
        (Odd(inner=make_strategy("scaffold"), change=ODD["shorter"], bad={4, 2}), ClientError, "client 2: sent "),
    ],
)
def test_wrong_clients_are_told_as_elsewhere(strategy, error, said):
    simulation = simulate(strategy)
    with pytest.raises(error, match=said):
        simulation.round()
    assert trace(simulate("scaffold"), rounds=1) == serial("scaffold", 1)


@pytest.mark.parametrize("change", ["shorter", "doubles"])
def test_odd_messages_leave_no_trace(change):
    odd = Odd(inner=make_strategy("scaffold"), change=ODD[change], bad={1, 4})
    left_no_trace(trace(simulate(odd, failures=DROP), rounds=2), without("scaffold"), 1, 4)


def test_who_is_over_its_time_limit_is_dropped():
    slow = Dawdles(sleep=sleep_a_little, where="at its end", bad={2})
    failed = simulate(slow, failures=Failures(policy="drop", time_limit=1.0)).round().failed
    assert failed == {"2": "was over its time limit of 1 s"}


def sleep_a_little(seconds):
    time.sleep(seconds / 40)


def test_a_run_that_is_left_early_leaves_the_actors_clean():
    """Nothing that its clients sent is in the next sum, and of those that were waiting most do not run."""
    simulation, mean = simulate("fedavg"), WeightedMean()
    work = Train(simulation.strategy, simulation.recipe, 0)
    server = {name: simulation.server[name] for name in ("model", "buffers")}
    for answers in (1, 3):
        run = actors(2).run(work, server, (Job(k, 0, {}) for k in range(6)), mean)
        for _ in range(answers):
            next(run)
        run.close()
    assert trace(simulation) == serial("fedavg")


def test_a_run_inside_another_does_not_show():
    simulation = simulate("fedavg")
    losses = []
    simulation.round(lambda report: losses.append(simulation.evaluate().loss))
    assert simulation.fingerprint() == serial("fedavg", 1)[0]["fingerprint"]
    assert len(set(losses)) == 1


# Deaths


@dataclass(frozen=True, kw_only=True)
class Deadly(Wrapper):
    """Some clients end their process, each as often as it may."""

    bad: set[int]
    folder: Path
    times: int = 1

    def client_update(self, server, client, local):
        if local.client_id in self.bad:
            died = len(list(self.folder.glob(f"{local.client_id}-*")))
            if died < self.times:
                (self.folder / f"{local.client_id}-{died}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().client_update(server, client, local)


@pytest.mark.parametrize(
    ("count", "bad"),
    [pytest.param(1, {3}, marks=pytest.mark.slow), (2, {3}), pytest.param(2, {2, 5}, marks=pytest.mark.slow)],
)
def test_clients_of_an_actor_that_died_run_again(tmp_path, count, bad):
    """With the same model, and each reported once."""
    strategy = Deadly(inner=make_strategy("scaffold"), bad=bad, folder=tmp_path)
    simulation, reports = simulate(strategy, count), []
    with pytest.warns(RuntimeWarning, match=r"the actor on .*, process \d+, died, and \d clients run again"):
        first = simulation.round(reports.append)
    assert sorted(report.client_id for report in reports) == list(range(len(SIZES)))
    expected = serial("scaffold")
    assert first.fingerprint == expected[0]["fingerprint"]
    assert trace(simulation, rounds=2) == expected[1:]


def test_an_actor_that_dies_with_its_sum_is_made_up_for():
    """When all clients have reported, and while the next round is not yet begun."""
    simulation, reports = simulate("scaffold"), []

    def after(report):
        reports.append(report.client_id)
        if len(reports) == len(SIZES):
            kill(processes(simulation.runtime)[0])

    with pytest.warns(RuntimeWarning, match="died, and"):
        simulation.round(after)
    assert sorted(reports) == list(range(len(SIZES)))
    kill(processes(simulation.runtime)[0])
    with pytest.warns(RuntimeWarning, match="died, and"):
        simulation.round()
    assert trace(simulation, rounds=1) == serial("scaffold")[2:]


@pytest.mark.filterwarnings("ignore:runtime. the actor on .* died")  # with two clients it is not known whose fault
@pytest.mark.parametrize("deaths", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_client_that_kills_every_actor_is_the_failure(deaths, tmp_path, monkeypatch):
    monkeypatch.setattr("fedsim.runtimes.ray.dispatch.MAX_DEATHS", deaths)
    strategy = Deadly(inner=make_strategy("scaffold"), bad={3}, folder=tmp_path, times=9)
    simulation = simulate(strategy, failures=DROP)
    done = simulation.round()
    assert done.failed.keys() == {"3"}
    assert done.failed["3"].startswith(f"its Ray actor died {deaths} time")
    others = {"name": "fixed", "clients": [0, 1, 2, 4, 5]}
    assert done.fingerprint == make_simulation("scaffold", cohort=others).round().fingerprint


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:runtime. the actor on .* died")
def test_a_client_that_kills_every_actor_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("fedsim.runtimes.ray.dispatch.MAX_DEATHS", 1)
    simulation = simulate(Deadly(inner=make_strategy("scaffold"), bad={3}, folder=tmp_path, times=9))
    with pytest.raises(ClientError, match=r"^round 1, client 3: its Ray actor died 1"):
        simulation.round()
    assert simulation.number == 0


NODES = """
import sys, warnings
sys.path[:0] = [{tests!r}]
from ray.cluster_utils import Cluster
from conftest import make_data, make_simulation, make_task
from fedsim.runtimes.ray import Ray

cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 1, "include_dashboard": False}})
away = cluster.add_node(num_cpus=1)
task, data, reports = make_task(), make_data([3] * 20), []
runtime = Ray(task, data, actors=2, address=cluster.address)
simulation = make_simulation("scaffold", task=task, data=data, runtime=runtime)
simulation.round()

def after(report):
    reports.append(report.client_id)
    if len(reports) == 9:
        cluster.remove_node(away, allow_graceful=False)

with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    simulation.round(after)
assert sorted(reports) == list(range(20)), reports
assert any("clients run again" in str(w.message) for w in said), [str(w.message) for w in said]
simulation.round()
expected = make_simulation("scaffold", task=task, data=data)
for _ in range(3):
    expected.round()
assert simulation.fingerprint() == expected.fingerprint()
"""


@pytest.mark.slow
def test_a_node_that_is_lost_is_made_up_for():
    script = NODES.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_run_that_was_killed_under_ray_goes_on_under_serial(tmp_path, fedsim_, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, rounds=40)
    command = [sys.executable, "-P", "-c", "from fedsim.cli import main; main()", "run", "c.yaml", "--out=killed"]
    command += ["runtime=ray", "runtime.actors=2", f"runtime.cpus={SMALL}"]
    mark = f"FEDSIM_TEST={tmp_path}"
    with subprocess.Popen(
        ["env", mark, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as driver:
        while rounds_done(tmp_path / "killed") < 3 and driver.poll() is None:
            time.sleep(0.01)
        below = marked(mark)
        driver.kill()
        said = driver.stderr.read()
    assert driver.returncode == -signal.SIGKILL, said
    assert fedsim_("resume", "killed", "runtime=serial").status == 0
    assert fedsim_("run", "c.yaml", "--out=whole").status == 0
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    assert len(below) > 4
    soon(lambda: not marked(mark))  # Ray ends with the process that started it


@pytest.mark.slow
@pytest.mark.parametrize("process", ["raylet", "gcs_server"])
def test_a_driver_whose_ray_dies_ends_in_one_line_and_its_resume_as_if_nothing_had_been(
    process, tmp_path, fedsim_, monkeypatch
):
    """Of its own: Ray would end it without a word, or with lines of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "20")
    write(tmp_path, rounds=300)
    command = [sys.executable, "-P", "-c", "from fedsim.cli import main; main()", "run", "c.yaml", "--out=left"]
    command += ["runtime=ray", "runtime.actors=2", f"runtime.cpus={SMALL}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as driver:
        while rounds_done(tmp_path / "left") < 2 and driver.poll() is None:
            time.sleep(0.01)
        (pid,) = [
            pid for pid in descendants(driver.pid) if Path(f"/proc/{pid}/comm").read_text() == f"{process}\n"
        ]
        os.kill(pid, signal.SIGKILL)
        said = driver.stderr.read()
    assert driver.returncode == 1, said
    assert re.fullmatch("fedsim: runtime: .*(raylet|head).*; a resume goes on after the last checkpoint\n", said)
    assert 2 <= rounds_done(tmp_path / "left") < 300
    assert fedsim_("resume", "left", "runtime=serial").status == 0
    assert fedsim_("run", "c.yaml", "--out=whole").status == 0
    assert records(tmp_path / "left") == records(tmp_path / "whole")


@pytest.mark.parametrize(("lost", "said"), [("raylet", "the raylet, has ended"), ("head", "the head .* for 0 s")])
def test_a_process_that_ray_would_end_says_why(lost, said, monkeypatch, capfd):
    status = []
    monkeypatch.setattr("os._exit", status.append)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr(watch, "LOOK", 0.01)
    monkeypatch.setattr(watch, "PATIENCE", 0.1)
    here, there = socket.socketpair()
    with there:
        if lost == "raylet":
            there.close()
        watch.watching(here, lambda: lost != "head")
    assert status == [1]
    assert re.fullmatch(
        f"fedsim: runtime: .*{said}; a resume goes on after the last checkpoint\n", capfd.readouterr().err
    )


def test_a_process_that_has_left_its_cluster_is_not_ended(monkeypatch, capfd):
    monkeypatch.setattr("os._exit", pytest.fail)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    here, there = socket.socketpair()
    there.close()
    watch.watching(here, lambda: False)
    assert capfd.readouterr().err == ""


def marked(mark):
    """Processes with this in their environment, but for Ray's agents, which take a minute to miss their parent."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "comm").read_text().strip())
    return [command for command in found if not command.startswith(("ray::Dashboard", "ray::RuntimeEnv"))]


def soon(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# What the cluster cannot do


def test_a_strategy_beside_the_config_reaches_the_actors(tmp_path, monkeypatch):
    """Where its folder was on the path when they started; and who cannot import it says so at the start."""
    (tmp_path / "my_strategy.py").write_text(
        "from fedsim.strategies.averaging.fedavg import FedAvg\n\n\nclass Mine(FedAvg):\n    pass\n"
    )
    actors(2)
    monkeypatch.syspath_prepend(tmp_path)
    strategy = make_strategy("my_strategy:Mine")
    with pytest.raises(ConfigError, match=r"cannot import .*No module named 'my_strategy'\); is .* on PYTHONPATH"):
        simulate(strategy)
    runtime = Ray(TASK, DATA, actors=1, cpus=SMALL)
    assert trace(make_simulation(strategy, task=TASK, data=DATA, runtime=runtime)) == serial("fedavg")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"actors": 1000},
            r"^runtime\.actors: 1000, each with 1 CPU; the cluster, \d+ CPUs \(.* free\) and 0 GPUs .*, has room",
        ),
        ({"gpus": 0.5}, r"^runtime\.actors: auto, each with 1 CPU and 0\.5 GPUs; the cluster, .*room for 0$"),
        ({"cpus": 1.5}, r"^runtime\.cpus: 1\.5 must be a whole number, or less than 1"),
        ({"address": "10.0.0.1:1"}, r"^runtime\.address: 10\.0\.0\.1:1, and this process has joined "),
    ],
)
def test_what_the_cluster_cannot_do_is_said_in_one_line(options, said):
    actors(2)
    with pytest.raises(ConfigError, match=said) as caught:
        Ray(TASK, DATA, **options)
    assert "\n" not in str(caught.value)


PLACES = ["address", "variable", "file"]
SILENT, HTTP = b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:1", "127.0.0.1:1 cannot be reached"),
        ("ray://host:1", "'ray://host:1' should be null, auto, or host:port"),
        ("auto", r"^runtime\.address: auto: no Ray is found on this machine; launch/ray_cluster\.sh start "),
    ],
)
def test_a_cluster_that_is_not_there_is_said_in_one_line(address, said, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", cache(set))
    monkeypatch.setattr("ray._private.utils.read_ray_address", lambda *_: None)
    with pytest.raises(ConfigError, match=said):
        Ray(TASK, DATA, address=address)


@pytest.mark.parametrize(
    ("by", "said"),
    sampled(
        [("address", SILENT), ("variable", HTTP), ("file", HTTP)], ["address", "variable", "file"], [SILENT, HTTP]
    ),
)
def test_a_cluster_that_does_not_answer_is_said_soon(by, said, monkeypatch):
    """Where a program listens that is not Ray: by its address, RAY_ADDRESS, or what a dead Ray left."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr("fedsim.runtimes.ray.cluster.WAIT", 0.2)
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", cache(set))
    with socket.create_server((LOOPBACK, 0)) as server, ThreadPoolExecutor() as beside:
        address, told = f"{LOOPBACK}:{server.getsockname()[1]}", Event()
        monkeypatch.setattr("ray._private.utils.read_ray_address", lambda *_: address)
        monkeypatch.setenv("RAY_ADDRESS", address if by == "variable" else "")

        def serve():
            with suppress(ConnectionError), server.accept()[0] as connection:
                connection.sendall(said)
                told.wait(60)  # gRPC itself would hold a silent connection for 20 s

        serving = beside.submit(serve)
        why = {
            "address": rf"^runtime\.address: {address} cannot be",
            "variable": r"auto: .*, RAY_ADDRESS, cannot be",
            "file": r"^runtime\.address: auto: .*, the last Ray of this machine, cannot be",
        }[by] + (r" reached \(.*http1.*\)" if said else r" reached \(no answer in 0\.2 s\)")
        with pytest.raises(ConfigError, match=why):
            Ray(TASK, DATA, address=address if by == "address" else "auto")
        told.set()
        serving.result()


@pytest.fixture
def gives_up(monkeypatch):
    """Has this process be part of no Ray, and `ray.init` raise what it is called with."""

    def init(address, **_):
        raise Exception(f"called with {address}")  # as Ray itself does

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)


@pytest.mark.usefixtures("gives_up")
def test_a_cluster_with_tls_is_asked_with_tls(monkeypatch, tmp_path):
    certificates = pytest.importorskip("fedsim.flower.certificates")
    certificates.make(tmp_path / "keys", [LOOPBACK])
    files = {"CA_CERT": "ca.crt", "SERVER_KEY": "server.key", "SERVER_CERT": "server.pem"}
    _, *pair = ((tmp_path / "keys" / file).read_bytes() for file in files.values())
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port(f"{LOOPBACK}:0", grpc.ssl_server_credentials([pair]))
    address = f"{LOOPBACK}:{port}"
    server.start()
    try:
        with pytest.raises(ConfigError, match="cannot be reached"):
            join(address)
        monkeypatch.setenv("RAY_USE_TLS", "1")
        with pytest.raises(ConfigError, match="RAY_USE_TLS needs RAY_TLS_CA_CERT, the path of a PEM file"):
            join(address)
        for name, file in files.items():
            monkeypatch.setenv(f"RAY_TLS_{name}", str(tmp_path / "keys" / file))
        with pytest.raises(ConfigError, match=f"called with {address}"):
            join(address)
        monkeypatch.setenv("RAY_TLS_CA_CERT", "no.crt")
        with pytest.raises(ConfigError, match=r"RAY_TLS_CA_CERT: no\.crt cannot be read: No such file"):
            join(address)
    finally:
        server.stop(None).wait()


def test_a_process_joins_a_cluster_again_by_the_same_address():
    """Though Ray has another name for this machine."""
    actors(2)
    joined = ray.get_runtime_context().gcs_address
    join(joined)
    join(f"127.0.0.1:{joined.rpartition(':')[2]}")


@pytest.mark.slow
def test_it_goes_on_with_the_actors_that_have_a_place(monkeypatch):
    actors.cache_clear()
    crowded.cache_clear()
    actors(2)
    monkeypatch.setattr("fedsim.runtimes.ray.pool.WARN_AFTER_SECONDS", 3.0)
    with pytest.warns(RuntimeWarning, match=r"continuing with \d of 4 Ray actors; the cluster, 2 CPUs \("):
        runtime = Ray(TASK, DATA, actors=4, cpus=0.5)
    assert trace(make_simulation("fedavg", task=TASK, data=DATA, runtime=runtime)) == serial("fedavg")
    monkeypatch.setattr("fedsim.runtimes.ray.pool.MAX_WAIT_SECONDS", 1.0)
    with pytest.raises(
        ConfigError, match=r"^runtime\.actors: no Ray actor is left, and the cluster, .*has no place"
    ):
        Ray(TASK, DATA, actors=1, cpus=0.5)


@pytest.mark.parametrize("missing", ["ray", "grpc"])
def test_ray_that_is_not_installed_is_an_extra(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "fedsim.runtimes.ray.cluster")
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[ray\]'"):
        Ray(TASK, DATA)


# Nothing stays behind


def processes(runtime):
    """Their folders in /proc."""
    return [Path("/proc", seat.name.split("process ")[1].strip(",")) for seat in runtime.pool.ready()]


@pytest.mark.slow
def test_experiments_one_after_the_other_each_have_the_whole_cluster():
    """A run that ended has no actors, whoever still holds it; and its runtime takes others when it is needed."""
    actors.cache_clear()
    crowded.cache_clear()
    join(None)
    runs = list[Run]()
    for rounds in (1, 2):
        config = load(CONFIG, {"rounds": rounds, "hooks": [], "runtime": {"name": "ray"}})
        runs.append(new_run(config)[0])
        assert execute(runs[-1]).summary["rounds"] == rounds
        assert runs[-1].simulation.runtime.workers == 2
        assert not runs[-1].simulation.runtime.pool.slots
    assert runs[0].simulation.round().fingerprint == runs[1].records[1]["fingerprint"]
    runs[0].simulation.runtime.close()


def test_actors_of_a_run_that_failed_end_though_its_exception_is_kept():
    config = load(CONFIG, {"hooks": [], "runtime": {"name": "ray", "cpus": SMALL, "actors": 1}})
    run, _ = new_run(config)
    (process,) = processes(run.simulation.runtime)
    object.__setattr__(run.simulation, "strategy", None)
    with pytest.raises(RoundError) as kept:
        execute(run)
    assert kept.value.__traceback__
    soon(lambda: not process.exists())


@pytest.mark.slow
def test_actors_end_with_their_runtime_in_the_middle_of_a_client(tmp_path):
    strategy = Waits(inner=make_strategy("fedavg"), folder=tmp_path)
    runtime = Ray(TASK, DATA, actors=1, cpus=SMALL)
    simulation = make_simulation(strategy, task=TASK, data=DATA, runtime=runtime)
    (process,) = processes(runtime)
    run = runtime.run(simulation.work, simulation.server, [Job(0, 0, {})], WeightedMean())
    next(run)
    soon(lambda: list(tmp_path.iterdir()))
    del runtime, simulation, run
    gc.collect()
    soon(lambda: not process.exists())


@dataclass(frozen=True, kw_only=True)
class Waits(Wrapper):
    """Its clients do not end."""

    folder: Path

    def client_update(self, server, client, local):
        (self.folder / "here").touch()
        time.sleep(1000)


def kill(process):
    os.kill(int(process.name), signal.SIGKILL)
    soon(lambda: not process.exists())


def soak(rounds):
    """Memory of driver, actors and Ray's store before and after so many rounds, in bytes."""
    simulation = simulate("scaffold", cohort=SAMPLE)

    def memory():
        gc.collect()
        mine = [Path("/proc/self"), *processes(simulation.runtime)]
        return np.array([*(int((each / "statm").read_text().split()[1]) * PAGE for each in mine), stored()])

    def run(number):
        for _ in range(number):
            simulation.round()
            simulation.evaluate()

    run(30)
    memory()
    before = memory()
    run(rounds)
    return before, memory()


def stored():
    """Bytes in Ray's store."""
    from ray._private.internal_api import memory_summary

    (line,) = (
        x
        for x in memory_summary(ray.get_runtime_context().gcs_address, stats_only=True).splitlines()
        if x.startswith("Plasma memory usage")
    )
    return int(line.split()[3]) * 2**20


@pytest.mark.parametrize("rounds", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_memory_stays_what_it_is_over_many_rounds(rounds):
    before, after = soak(rounds)
    assert (after - before).max() < 8e6, (before, after)


def test_mapped_examples_stay_in_their_file_and_actors_end_with_their_simulation(tmp_path):
    """Actors map the same file, and none of it goes to Ray's store."""
    rng, n = np.random.default_rng(0), 30
    for part in ("train", "test"):
        np.save(tmp_path / f"x_{part}.npy", rng.integers(0, 256, (n, 4, 4, 1), dtype=np.uint8))
        np.save(tmp_path / f"y_{part}.npy", np.arange(n) % 3)
    data = FederatedData(npz(path=tmp_path), np.arange(n) % 4, clients=4)
    assert str(tmp_path / "x_train.npy").encode() in pack(data, files=True)[0]
    simulation = make_simulation("fedavg", task=TASK, data=data, runtime=Ray(TASK, data, actors=1, cpus=SMALL))
    assert trace(simulation) == trace(make_simulation("fedavg", task=TASK, data=data))
    (process,) = processes(simulation.runtime)
    assert str(tmp_path / "x_train.npy") in (process / "maps").read_text()
    del simulation
    gc.collect()
    soon(lambda: not process.exists())
    packed = pack(data, files=True)
    (tmp_path / "x_train.npy").unlink()
    with pytest.raises(ConfigError, match=r"^data: .*x_train\.npy does not exist; mapped examples must have"):
        unpack(packed)


TENSORS = {
    "bf16": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "empty": torch.empty(0, 3),
    "number": torch.tensor(3.5, dtype=torch.float64),
    "transposed": torch.arange(6.0).view(2, 3).T,
    "part": torch.arange(1000.0)[10:20:3],
    "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "flags": torch.tensor([True, False]),
    "parameter": torch.nn.Parameter(torch.ones(3)),
    "sparse": torch.eye(3).to_sparse(),
}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS)
def test_a_tensor_travels(tensor, own):
    found = unpack(pack(tensor), own=own)
    assert type(found) is type(tensor)
    torch.testing.assert_close(found, tensor, rtol=0, atol=0)
    assert found.is_sparse or found.stride() == tensor.stride() or tensor.numel() < 10


def test_views_of_one_tensor_travel_as_such():
    whole = torch.arange(10.0)
    packed = pack({"whole": whole, "half": whole[:5]})
    assert sum(array.nbytes for array in packed[1]) == whole.nbytes
    found = unpack(packed, own=True)
    found["whole"].zero_()
    assert not found["half"].any()
