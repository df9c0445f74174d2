"""The scripts in launch/, with several Ray nodes on this machine in the place of several machines."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from small_run import CONFIG, rounds_done

pytest.importorskip("ray")
pytestmark = pytest.mark.slow  # each starts three nodes

LAUNCH = Path(__file__).parent.parent / "launch"
BIN = Path(sys.executable).parent
# Nodes that share a machine must not share ports.
OPTIONS = "--min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 --object-store-memory=100000000"
SHIMS = {
    "ssh": '#!/bin/bash\nwhile [[ $1 == -* ]]; do shift 2; done\necho "$1" >>"$CALLS"\nexec bash -c "$2"\n',
    "srun": '#!/bin/bash\nwhile [[ $1 == --* ]]; do echo "$1" >>"$CALLS"; shift; done\nexec "$@"\n',
    # One after the other: several that start at once on one machine would take the same sockets.
    "ray": f"""#!/bin/bash
if [[ $1 == start ]]; then
    before=0
    until mkdir "$RAY_TMPDIR/$before" 2>/dev/null; do before=$((before + 1)); done
    until [[ $({BIN}/ray status --address="127.0.0.1:$PORT" 2>&1 | grep -c '^ 1 node_') -ge $before ]]; do :; done
fi
exec {BIN}/ray "$@"
""",
    "scontrol": "#!/bin/bash\nprintf '%s\\n' $HOSTS\n",
}


@pytest.fixture
def place(monkeypatch):
    """A folder with a config; ssh and Slurm lead to this machine; nothing may be left at its end."""
    folder = Path(tempfile.mkdtemp(prefix="fs"))  # sockets lie there, and their paths must be short
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    for name, script in SHIMS.items():
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    (folder / "t").mkdir()
    (folder / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    variables = {
        "PATH": f"{folder}:{BIN}:{os.environ['PATH']}",
        "PORT": port,
        "CALLS": str(folder / "calls"),
        "STATE": str(folder / "state"),
        "RAY_TMPDIR": str(folder / "t"),
        "RAY_START_OPTIONS": f"--num-cpus=1 {OPTIONS}",
        "HEAD": "127.0.0.1",
        "HOSTS": "one two three",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "[one-three]",
        "WAIT": "300",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(folder)
    yield folder
    end = time.monotonic() + 120
    while left := nodes(folder):
        assert time.monotonic() < end, left
        time.sleep(0.1)
    shutil.rmtree(folder)


def nodes(folder):
    """Processes of Ray whose files are there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            line = (process / "cmdline").read_text().replace("\0", " ")
            found += [line] * (f"{folder}/" in line and ("raylet" in line or "gcs_server" in line))
    return found


def call(*command, status=0):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=500)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def fingerprint(run):
    return json.loads((run / "summary.json").read_text())["fingerprint"]


def test_a_cluster_over_ssh(place):
    script = LAUNCH / "ray_cluster.sh"
    try:
        said = call(script, "start", "one", "two")
        assert (place / "calls").read_text() == "one\ntwo\n"
        address = f"127.0.0.1:{os.environ['PORT']}"
        assert said == f"3 machines: fedsim run CONFIG runtime=ray runtime.address={address}\n"
        assert "3.0 CPU" in call(script, "status")
        assert "a cluster of port" in call(script, "start", status=1)
        call("fedsim", "run", "c.yaml", "--out=many", "runtime=ray", f"runtime.address={address}")
        call("fedsim", "resume", "many", "rounds=5", "runtime=ray", "runtime.address=auto")
    finally:
        call(script, "stop")
    assert "no cluster of port" in call(script, "stop", status=1)
    call("fedsim", "run", "c.yaml", "--out=one", "rounds=5", "runtime=serial")
    assert fingerprint(place / "many") == fingerprint(place / "one")


def test_points_of_a_sweep_follow_each_other_on_a_cluster_of_this_machine_alone(place):
    """Each with all of it, whichever of its names the address has."""
    script, address = LAUNCH / "ray_cluster.sh", f"localhost:{os.environ['PORT']}"
    try:
        assert call(script, "start").startswith("1 machine: fedsim run ")
        ray = ["runtime=ray", f"runtime.address={address}"]
        call("fedsim", "sweep", "c.yaml", "local.lr=0.1,0.2", "rounds=2", *ray, "--out=points")
        assert len(list((place / "points").glob("**/summary.json"))) == 2
    finally:
        call(script, "stop")
    said = call("fedsim", "run", "c.yaml", "--out=late", "runtime=ray", f"runtime.address={address}", status=2)
    assert said.startswith(f"fedsim: runtime.address: {address} cannot be reached (")
    assert said.count("\n") == 1


def test_a_slurm_job(place, monkeypatch):
    script = LAUNCH / "ray_slurm.sbatch"
    monkeypatch.setenv("RAY_START_OPTIONS", OPTIONS)
    call(script, "run", "c.yaml", "--out=many", "rounds=2")
    calls = (place / "calls").read_text()
    assert all(f"--nodelist={host}\n" in calls for host in ("one", "two", "three"))
    call("fedsim", "run", "c.yaml", "--out=one", "rounds=2", "runtime=serial")
    assert fingerprint(place / "many") == fingerprint(place / "one")
    assert "usage: sbatch" in call(script, status=2)


def test_a_slurm_job_whose_time_is_up_leaves_a_checkpoint(place, monkeypatch):
    """It gets SIGTERM, as --signal=B says: the script alone, which has to hand it on."""
    monkeypatch.setenv("HOSTS", "one")
    monkeypatch.setenv("RAY_START_OPTIONS", OPTIONS)
    command = [LAUNCH / "ray_slurm.sbatch", "run", "c.yaml", "--out=many", "rounds=10000"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as job:
        while rounds_done(place / "many") < 3 and job.poll() is None:
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        _, said = job.communicate(timeout=100)
    assert job.returncode == 130, said
    rounds = f"rounds={rounds_done(place / 'many') + 2}"
    call("fedsim", "resume", "many", rounds, "runtime=serial")
    call("fedsim", "run", "c.yaml", "--out=one", rounds, "runtime=serial")
    assert fingerprint(place / "many") == fingerprint(place / "one")


def test_help_says_what_it_can_do(place):
    assert "start [HOST ...] | status | stop" in call(LAUNCH / "ray_cluster.sh", status=1)
