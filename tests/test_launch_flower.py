"""What launch/ has for federations over Flower: scripts, with stand-ins for programs and for real, and units."""

import configparser
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import yaml
from small_run import CONFIG
from typer.main import get_command

from fedsim.bench.federation import free_port, listens
from fedsim.cli.commands import app

LAUNCH = Path(__file__).parent.parent / "launch"
SCRIPTS = [LAUNCH / name for name in ("flower_local.sh", "flower_ssh.sh", "flower_slurm.sbatch")]
UNITS = sorted((LAUNCH / "flower" / "systemd").iterdir())
BIN = Path(sys.executable).parent

FAKES = {  # they write down how they were called, and by which process
    "fedsim": r"""#!/bin/bash
echo "$$ fedsim $*" >>"$CALLS"
hang() { trap 'kill "$!" 2>/dev/null; exit 130' TERM HUP; sleep 100 & echo "$@"; wait; }
case $1 in
certificates)
    mkdir -p "$2/nodes"
    for ((i = 3; i <= $#; i++)); do
        next=$((i + 1))
        case ${!i} in
        --server) touch "$2"/{ca.crt,server.pem,server.key} ;;
        --node) touch "$2/nodes/${!next}" ;;
        --node=*) each=${!i} && touch "$2/nodes/${each#--node=}" ;;
        esac
    done ;;
partition)
    for each; do [[ $each != data.clients=* ]] || number=${each#*=}; done
    while [[ $1 != --shards ]]; do shift; done
    mkdir -p "$2"
    for ((k = 0; k < number; k++)); do printf 'name: client-%02d\n' $k >"$2/$k.yaml"; done ;;
node) [[ -z $NODE_FAILS ]] || { echo "fedsim: data: no such file" >&2; exit 2; }; hang ;;
serve | resume) [[ -z $HANG ]] || hang serving; echo serving; sleep "${LASTS:-0}"; exit "${STATUS:-0}" ;;
nodes) echo "a online" ;;
esac
""",
    "flower-superlink": rf"""#!{sys.executable}
import os, socket, sys, time
with open(os.environ["CALLS"], "a") as calls:
    calls.write(f"{{os.getpid()}} flower-superlink {{' '.join(sys.argv[1:])}}\n")
if os.environ.get("SUPERLINK_FAILS"):
    sys.exit(3)
opened = socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])))
time.sleep(100)
""",
    "flwr": '#!/bin/bash\necho "$$ flwr $*" >>"$CALLS"\n[[ -z $REFUSED ]] || { echo refused; exit 1; }\n',
    "ssh": r"""#!/bin/bash
[[ " $* " != *" -N "* ]] || { echo "$$ ssh $*" >>"$CALLS"; exec sleep 100; }
while [[ $1 == -* ]]; do shift 2; done
[[ -d $HOMES/$1 ]] || { echo "no such host" >&2; exit 255; }
export HOME=$HOMES/$1
exec bash -c "$2"
""",
    "scp": r"""#!/bin/bash
[[ $1 == *:* ]] && from=$HOMES/${1/://} || from=$1
[[ $2 == *:* ]] && to=$HOMES/${2/://} || to=$2
cp "$from" "$to"
""",
    "srun": '#!/bin/bash\nwhile [[ $1 == --* ]]; do echo "0 srun $1" >>"$CALLS"; shift; done\nexec "$@"\n',
    "scontrol": "#!/bin/bash\nprintf '%s\\n' $HOSTS\n",
    "hostname": "#!/bin/bash\necho 127.0.0.1\n",
}


def install(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(FAKES[name])
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a config, in which nothing is left at the end, nor any process that is ours."""
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "tmp").mkdir()
    for host in ("one", "two", "three"):
        (tmp_path / "homes" / host).mkdir(parents=True)
        (tmp_path / "homes" / host / "fedsim-node.yaml").write_text(f'name: "node-of-{host}"\nstate: x\n')
    variables = {
        "PORT": str(free_port()),
        "CALLS": str(tmp_path / "calls"),
        "TMPDIR": str(tmp_path / "tmp"),
        "HOMES": str(tmp_path / "homes"),
        "HOSTS": "one two three",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "[one-three]",
        "HANG": "",
        "NODE_FAILS": "",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in ("N", "STATE", "OUT", "STOCK", "WAIT", "FEDSIM", "ADDRESS", "BIND", "NODE", "SSH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    end = time.monotonic() + 20
    while left := [pid for pid, _ in calls() if alive(pid)]:
        assert time.monotonic() < end, left
        time.sleep(0.05)


@pytest.fixture
def faked(place, monkeypatch):
    """The same, with stand-ins for all programs."""
    monkeypatch.setenv("PATH", f"{install(place / 'bin', *FAKES)}:/usr/bin:/bin")
    monkeypatch.setenv("FEDSIM", str(place / "bin" / "fedsim"))
    return place


def calls(program=""):
    """(process, line) of each call of a program."""
    file = Path(os.environ["CALLS"])
    lines = [line.split(" ", 1) for line in file.read_text().splitlines()] if file.exists() else []
    return [(int(pid), line) for pid, line in lines if line.startswith(program)]


def alive(pid):
    with suppress(OSError):
        return pid and "zombie" not in Path(f"/proc/{pid}/status").read_text()
    return False


def call(*command, status=0, cwd=None):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=500, cwd=cwd)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_usage(script, place):
    call("bash", "-n", script)
    assert os.access(script, os.X_OK)
    said = call(script, status=2)
    assert said.startswith(f"{script.stem}: usage: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        (["no.yaml"], {}, "no.yaml: no such file"),
        (["c.yaml"], {"N": "0"}, "N: 0 should be"),
        (["c.yaml"], {"N": "many"}, "N: many should be"),
        (["c.yaml"], {"PORT": "x"}, "PORT: x should be"),
        (["c.yaml"], {"FEDSIM": "not-there"}, "no command not-there"),
        (["resume", "runs/x"], {}, "resume needs the STATE"),
        (["resume", "runs/x"], {"STATE": "."}, "has no shards"),
    ],
)
def test_what_one_laptop_cannot_do_is_one_line(faked, monkeypatch, arguments, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    said_in_a_line = call(LAUNCH / "flower_local.sh", *arguments, status=2)
    assert said in said_in_a_line
    assert said_in_a_line.count("\n") == 1
    assert not calls()


def test_a_port_that_is_taken(faked):
    with socket.create_server(("127.0.0.1", int(os.environ["PORT"]))):
        assert "is in use" in call(LAUNCH / "flower_local.sh", "c.yaml", status=2)


@pytest.mark.parametrize("status", [0, 1, 2])
def test_one_laptop_has_the_status_of_the_run_and_cleans_up(faked, monkeypatch, status):
    monkeypatch.setenv("STATUS", str(status))
    monkeypatch.setenv("N", "12")
    said = call(LAUNCH / "flower_local.sh", "c.yaml", "rounds=2", status=status)
    assert said.startswith("serving\n")
    (serve,) = calls("fedsim serve")
    names = [f"client-{k:02}" for k in range(12)]
    assert f"serve c.yaml rounds=2 --superlink 127.0.0.1:{os.environ['PORT']} --ca" in serve[1]
    assert f"--nodes {','.join(names)} " in serve[1]
    (superlink,) = calls("flower-superlink")
    for option in ("--host 127.0.0.1", "--enable-supernode-auth", "--ssl-keyfile", "--isolation process"):
        assert option in superlink[1]
    assert len(list((faked / "tmp").iterdir())) == (status != 0)  # logs of what went wrong are kept
    assert "data.clients=12" in calls("fedsim partition")[0][1]
    assert [line.split("/")[-1] for _, line in calls("flwr")] == [
        f"{name}.pub local --name {name}" for name in names
    ]


def test_each_node_has_a_shard_of_its_own(faked, monkeypatch):
    monkeypatch.setenv("STATE", "state")
    monkeypatch.setenv("LASTS", "1")
    call(LAUNCH / "flower_local.sh", "c.yaml")
    state = faked / "state"
    shards = [yaml.safe_load((state / "shards" / f"{k}.yaml").read_text()) for k in range(3)]
    assert all(shard["superlink"] == f"127.0.0.1:{os.environ['PORT']}" for shard in shards)
    told = {line for _, line in calls("fedsim node ")}
    assert told == {
        f"fedsim node {state}/shards/{k}.yaml --key {state}/keys/nodes/client-{k:02}" for k in range(3)
    }
    call(LAUNCH / "flower_local.sh", "resume", "runs/x")  # with what is there
    assert calls("fedsim resume")[0][1] == "fedsim resume runs/x"
    assert len(calls("fedsim certificates")) == len(calls("fedsim partition")) == 1


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_all_of_it(faked, monkeypatch, number, group):
    """The script alone gets it, and hands it on; or, as from timeout(1), each of its processes."""
    monkeypatch.setenv("HANG", "yes")
    command = [LAUNCH / "flower_local.sh", "c.yaml"]
    heard = partial(signal.signal, number, signal.SIG_DFL)  # also where nohup runs these tests
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heard
    ) as script:
        assert script.stdout.readline() == "serving\n"
        (os.killpg if group else os.kill)(script.pid, number)
        assert script.wait(120) == 130


def test_a_node_that_ends_is_told(faked, monkeypatch):
    monkeypatch.setenv("NODE_FAILS", "yes")
    monkeypatch.setenv("LASTS", "2")
    assert "client-01 has ended: fedsim: data: no such file\n" in call(LAUNCH / "flower_local.sh", "c.yaml")


def test_a_superlink_that_does_not_start(faked, monkeypatch):
    monkeypatch.setenv("SUPERLINK_FAILS", "yes")
    said = call(LAUNCH / "flower_local.sh", "c.yaml", status=1)
    assert said.startswith("flower_local: superlink did not start; see ")
    assert not calls("fedsim serve")


def test_a_key_that_is_refused(faked, monkeypatch):
    monkeypatch.setenv("REFUSED", "yes")
    said = call(LAUNCH / "flower_local.sh", "c.yaml", status=1)
    assert said.startswith("flower_local: client-00 could not be registered; see ")
    assert not calls("fedsim node")


@pytest.mark.parametrize("bind", [{}, {"BIND": "127.0.0.1", "ADDRESS": "127.0.0.1"}], ids=["tunnels", "bound"])
def test_machines_over_ssh(faked, monkeypatch, bind):
    """Three hosts, each with a home of its own. No port is open to others unless someone says so."""
    script = LAUNCH / "flower_ssh.sh"
    monkeypatch.setenv("STATE", str(faked / "state"))
    for name, value in bind.items():
        monkeypatch.setenv(name, value)
    warning = f"flower_ssh: whoever reaches 127.0.0.1:{os.environ['PORT']} can drive these nodes" if bind else ""
    assert "flower_ssh: four: has no fedsim-node.yaml" in call(script, "start", "one", "four", status=1)
    assert "no federation of port" in call(script, "stop", status=1)  # nothing was started
    try:
        said = call(script, "start", "one", "two", "three")
        assert said.startswith("nodes node-of-two node-of-three: flower_ssh.sh serve CONFIG\n")
        assert warning in said
        assert "--host 127.0.0.1 " in calls("flower-superlink")[0][1]
        port = os.environ["PORT"]
        forward = f"127.0.0.1:{port}:127.0.0.1:{port}"
        tunnels = [] if bind else [f"-L {forward} one", f"-R {forward} two", f"-R {forward} three"]
        assert [line.partition("=15 ")[2] for _, line in calls("ssh ")] == tunnels
        assert "is running already" in call(script, "start", "one", "two", status=1)
        there = f".cache/fedsim/flower-{os.environ['PORT']}"
        held = {
            host: {path.name for path in (faked / "homes" / host / there).iterdir() if path.suffix != ".log"}
            for host in ("one", "two", "three")
        }
        assert held == {
            "one": {"ca.crt", "server.pem", "server.key"},
            "two": {"ca.crt", "node-of-two"},
            "three": {"ca.crt", "node-of-three"},
        }
        for path in (faked / "homes").glob(f"*/{there}/*"):
            assert path.suffix == ".log" or not path.stat().st_mode & 0o077
        assert call(script, "status") == "a online\n"
        assert call(script, "serve", "c.yaml", "rounds=1") == "serving\n"
        assert "serve c.yaml rounds=1 --superlink 127.0.0.1:" in calls("fedsim serve")[0][1]
        assert "--nodes node-of-two,node-of-three --keys" in calls("fedsim serve")[0][1]
        (node, *_) = (pid for pid, line in calls("fedsim node ") if alive(pid))
        os.kill(node, signal.SIGTERM)
        while alive(node):
            time.sleep(0.05)
        assert "has ended; see" in call(script, "status")
    finally:
        call(script, "stop")
    assert "no federation of port" in call(script, "stop", status=1)
    monkeypatch.setenv("ADDRESS", "10.0.0.1")
    monkeypatch.delenv("BIND", raising=False)
    assert "ADDRESS: needs BIND" in call(script, "start", "one", "two", status=2)


def test_a_slurm_job(faked, monkeypatch):
    script = LAUNCH / "flower_slurm.sbatch"
    monkeypatch.setenv("STATE", str(faked / "state"))
    call(script, "serve", "c.yaml", "rounds=2", "--out", "runs/x")
    told = [line for _, line in calls("srun --nodelist")]
    assert [told.count(f"srun --nodelist={host}") for host in ("one", "two", "three")] == [2, 1, 1]
    assert (
        f"partition c.yaml rounds=2 data.clients=2 --shards {faked}/state/shards"
        in calls("fedsim partition")[0][1]
    )
    assert "serve c.yaml rounds=2 --out runs/x --superlink 127.0.0.1:" in calls("fedsim serve")[0][1]
    monkeypatch.setenv("STATUS", "1")
    call(script, "resume", "runs/x", status=1)
    assert "resume runs/x runtime.superlink=127.0.0.1:" in calls("fedsim resume")[0][1]
    assert "--renew --server 127.0.0.1" in calls("fedsim certificates")[1][1]
    monkeypatch.setenv("HOSTS", "one two")
    assert "should have 1 shards" in call(script, "resume", "runs/x", status=2)
    monkeypatch.setenv("HOSTS", "one")
    assert "needs at least two machines" in call(script, "serve", "c.yaml", status=2)


def test_a_slurm_job_whose_time_is_up(faked, monkeypatch):
    monkeypatch.setenv("STATE", str(faked / "state"))
    monkeypatch.setenv("HANG", "yes")
    command = [LAUNCH / "flower_slurm.sbatch", "serve", "c.yaml"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline() == "serving\n"
        job.send_signal(signal.SIGTERM)
        assert job.wait(30) == 130


class Unit(configparser.RawConfigParser):
    """A systemd unit; of a key that stands twice, all values in lines."""

    def __init__(self, path):
        super().__init__(strict=False, comment_prefixes=("#",), delimiters=("=",))
        self.optionxform = str
        text = path.read_text().replace("\\\n", " ")
        lines, seen = [], {}
        for line in text.splitlines():
            key, equals, value = line.partition("=")
            if equals and not line.startswith("#"):
                seen.setdefault(key, []).append(value)
                lines.append(f"{key} = " + "\n\t".join(seen[key]))
            else:
                lines.append(line)
        self.read_string("\n".join(lines))


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_units(path):
    unit = Unit(path)
    service = unit["Service"]
    assert unit["Install"]["WantedBy"] == "multi-user.target"
    hardening = "DynamicUser NoNewPrivileges RestrictSUIDSGID PrivateTmp LockPersonality ProtectKernelModules"
    assert all(service[key] == "yes" for key in hardening.split())
    assert service["ProtectSystem"] == "strict"
    assert service["Restart"] == "always"
    assert service["CapabilityBoundingSet"] == ""
    assert all(
        credential.split(":")[1].startswith("/etc/fedsim/") for credential in service["LoadCredential"].split()
    )
    if program := shutil.which("systemd-analyze"):
        done = subprocess.run([program, "verify", "--man=no", path], capture_output=True, text=True)
        assert [line for line in done.stderr.splitlines() if "is not executable" not in line] == []


def compose():
    return yaml.safe_load((LAUNCH / "flower" / "compose.yaml").read_text())


def test_containers():
    whole = compose()
    services = whole["services"]
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["user"].startswith("${FEDSIM_UID"), name
        secrets = {each if isinstance(each, str) else each["source"] for each in service["secrets"]}
        assert secrets <= whole["secrets"].keys(), name
        volumes = {each.split(":")[0] for each in service["volumes"] if not each.startswith(("$", "."))}
        assert volumes <= whole["volumes"].keys(), name
    assert [name for name, service in services.items() if "ports" in service] == ["superlink"]
    assert services["superlink"]["ports"] == ["8443:8443"]  # the gate's, which shares its network
    assert services["gate"]["network_mode"] == "service:superlink"
    assert "--host=127.0.0.1" in services["superlink"]["command"]
    assert [name for name, service in services.items() if "server.key" in str(service["secrets"])] == [
        "superlink",
        "gate",
    ]
    containerfile = (LAUNCH / "flower" / "Containerfile").read_text()
    assert re.search(r"^USER 10001", containerfile, re.MULTILINE)
    for source in re.findall(r"^COPY (.*) \S+$", containerfile, re.MULTILINE):
        assert all((LAUNCH.parent / name).exists() for name in source.split())


def started_superlinks():
    """The options of each SuperLink that anything here starts."""
    texts = [path.read_text().replace("\\\n", " ") for path in [*SCRIPTS, *UNITS, LAUNCH / "README.md"]]
    lines = [line for text in texts for line in re.findall(r"flower-superlink\"? (--[^\n]*)", text)]
    return [*lines, " ".join(compose()["services"]["superlink"]["command"])]


def test_flower_has_the_options_that_are_used():
    pytest.importorskip("flwr")
    known = set(re.findall(r"--[a-z-]+", call(BIN / "flower-superlink", "--help")))
    used = started_superlinks()
    assert len(used) >= 5
    for line in used:
        assert set(re.findall(r"--[a-z-]+", line)) <= known, line
        assert "--insecure" not in line
        assert "--enable-supernode-auth" in line
        assert "--disable-runtime-dependency-installation" in line


def test_idle_connections_end_before_the_superlink_ends_them():
    """Else a call may go out on one that is being closed."""
    pytest.importorskip("flwr")
    import uvicorn
    from flwr.superlink.cli import flower_superlink

    from fedsim.flower.internals.connection import KEEP_ALIVE

    theirs = uvicorn.Config(None).timeout_keep_alive
    source = Path(inspect.getsourcefile(flower_superlink)).read_text()
    assert "timeout_keep_alive" not in source  # it keeps uvicorn's
    gate = (LAUNCH / "flower" / "gate.conf").read_text()
    ours = re.search(r"upstream superlink \{[^}]*\bkeepalive_timeout (\d+)s;[^}]*\}", gate)
    assert int(ours[1]) < theirs
    assert theirs > KEEP_ALIVE


def test_fedsim_has_the_options_that_are_used():
    commands = {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in get_command(app).commands.items()
    }
    paths = [*SCRIPTS, *UNITS, LAUNCH / "README.md", LAUNCH / "flower" / "compose.yaml"]
    text = "\n".join(path.read_text().replace("\\\n", " ") for path in paths)
    used = re.findall(r"(?:\bfedsim\"? |\brounds )([a-z]+) ([^\n`|]*)", text)
    found = 0
    for name, rest in used:
        if name in commands:
            options = set(re.findall(r"(?<=[\s(])--[a-z]+", f" {rest}"))
            assert options <= commands[name] | {"--help"}, (name, rest)
            found += len(options)
    assert found > 10


def test_the_readme_names_what_is_there():
    text = (LAUNCH / "README.md").read_text()
    for path in re.findall(r"`(?:launch/)?((?:flower|ray)[\w./@-]*\.(?:sh|sbatch|yaml|conf|service))`", text):
        assert (LAUNCH / path).exists() or (LAUNCH / "flower" / path).exists(), path
    headings = re.findall(r"^##+ (.*)$", text, re.MULTILINE)
    for title, anchor in re.findall(r"\[([^]]+)\]\(#([^)]+)\)", text):
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in anchors, title
    for variable in re.findall(
        r"(?:explained in launch/README.md: ?\n?#? *)([A-Z ]+)$",
        "\n".join(path.read_text() for path in SCRIPTS),
        re.MULTILINE,
    ):
        for name in variable.split():
            assert f"`{name}`" in text, name


# For real, with processes of Flower's.


@pytest.fixture
def real(place, monkeypatch):
    pytest.importorskip("flwr")
    shims = install(place / "bin", "ssh", "scp", "srun", "scontrol", "hostname")
    monkeypatch.setenv("PATH", f"{shims}:{BIN}:{os.environ['PATH']}")
    monkeypatch.setenv("FEDSIM", str(BIN / "fedsim"))
    monkeypatch.setenv("FLWR_HOME", str(place / "flwr"))
    monkeypatch.setenv("WAIT", "120")
    return place


def fingerprint(run):
    return json.loads((run / "summary.json").read_text())["fingerprint"]


@pytest.mark.slow
def test_one_laptop_gives_what_the_simulation_gives(real, monkeypatch):
    monkeypatch.setenv("OUT", "many")
    call(LAUNCH / "flower_local.sh", "c.yaml", "rounds=2")
    call("fedsim", "run", "c.yaml", "rounds=2", "data.clients=3", "--out=one", "runtime=serial")
    assert fingerprint(real / "many") == fingerprint(real / "one")


@pytest.mark.slow
def test_one_laptop_by_flowers_own_programs(real, monkeypatch):
    settings = ["rounds=2", "evaluate.clients=false"]  # each message takes Flower six seconds
    monkeypatch.setenv("N", "2")
    monkeypatch.setenv("STOCK", "1")
    monkeypatch.setenv("OUT", "many")
    call(LAUNCH / "flower_local.sh", "c.yaml", *settings)
    call("fedsim", "run", "c.yaml", *settings, "data.clients=2", "--out=one", "runtime=serial")
    assert fingerprint(real / "many") == fingerprint(real / "one")
    assert ours(real) == []
    # The folder is there: the run fails, and `flwr run` by itself would end with 0.
    call(LAUNCH / "flower_local.sh", "c.yaml", *settings, status=1)


@pytest.mark.slow
def test_flowers_own_programs_are_ended(real, monkeypatch):
    """With all that they started themselves."""
    monkeypatch.setenv("N", "2")
    monkeypatch.setenv("STOCK", "1")
    with subprocess.Popen(
        [LAUNCH / "flower_local.sh", "c.yaml", "rounds=1000"], stdout=subprocess.DEVNULL
    ) as script:
        wait_until(lambda: any("flwr-clientapp" in line for line in ours(real)), 120)
        assert any("flwr-serverapp" in line for line in ours(real))
        script.send_signal(signal.SIGTERM)
        assert script.wait(60) == 130
    assert ours(real) == []


def ours(place):
    """Flower's and our processes that a test has started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            line = (process / "cmdline").read_text().replace("\0", " ")
            if (
                f"FLWR_HOME={place}/".encode() in (process / "environ").read_bytes()
                and int(process.name) != os.getpid()
            ):
                found += [line] * ("flwr" in line or "flower" in line or "fedsim" in line)
    return found


@pytest.mark.slow
def test_one_laptop_interrupted_and_resumed(real, monkeypatch):
    monkeypatch.setenv("OUT", "many")
    monkeypatch.setenv("STATE", "state")
    rounds = real / "many" / "rounds.jsonl"
    with subprocess.Popen([LAUNCH / "flower_local.sh", "c.yaml", "rounds=100000"]) as script:
        while script.poll() is None and not (rounds.exists() and len(rounds.read_text().splitlines()) >= 2):
            time.sleep(0.05)
        script.send_signal(signal.SIGINT)
        assert script.wait(120) == 130
    done = len(rounds.read_text().splitlines())
    config = real / "many" / "config.yaml"
    config.write_text(config.read_text().replace("rounds: 100000", f"rounds: {done + 2}"))
    call(LAUNCH / "flower_local.sh", "resume", "many")
    call("fedsim", "run", "c.yaml", f"rounds={done + 2}", "data.clients=3", "--out=one", "runtime=serial")
    assert fingerprint(real / "many") == fingerprint(real / "one")


@pytest.mark.slow
def test_machines_over_ssh_for_real(real, monkeypatch):
    script = LAUNCH / "flower_ssh.sh"
    monkeypatch.setenv("STATE", str(real / "state"))
    monkeypatch.setenv("BIND", "127.0.0.1")
    monkeypatch.setenv("ADDRESS", "127.0.0.1")
    call("fedsim", "partition", "c.yaml", "data.clients=2", "--shards", "shards")
    for k, host in enumerate(("two", "three")):
        home = real / "homes" / host
        shutil.move(real / "shards" / f"{k}.npz", home)
        text = (real / "shards" / f"{k}.yaml").read_text()
        (home / "fedsim-node.yaml").write_text(text + "state: states\n")
    try:
        call(script, "start", "one", "two", "three")
        call(script, "serve", "c.yaml", "rounds=2", "data.clients=2", "--out=many")
        assert "client-01" in call(script, "status")
    finally:
        call(script, "stop")
    call("fedsim", "run", "c.yaml", "rounds=2", "data.clients=2", "--out=one", "runtime=serial")
    assert fingerprint(real / "many") == fingerprint(real / "one")


@pytest.mark.slow
def test_one_laptop_behind_a_proxy_and_a_signal_to_its_whole_group(real, monkeypatch):
    """As timeout(1) sends it. The proxy is not there, and nobody asks for it."""
    monkeypatch.setenv("OUT", "many")
    monkeypatch.setenv("N", "2")
    for variable in ("http_proxy", "https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, "socks5h://127.0.0.1:9" if variable == "all_proxy" else "http://127.0.0.1:9")
    rounds = real / "many" / "rounds.jsonl"
    command = [LAUNCH / "flower_local.sh", "c.yaml", "rounds=100000"]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True) as script:
        while script.poll() is None and not (rounds.exists() and len(rounds.read_text().splitlines()) >= 2):
            time.sleep(0.05)
        os.killpg(script.pid, signal.SIGTERM)
        _, said = script.communicate(timeout=60)
    assert script.returncode == 130, said
    done = len(rounds.read_text().splitlines())
    assert f"interrupted after round {done} of 100000; fedsim resume many goes on\n" in said
    assert ours(real) == []


@pytest.mark.slow
def test_a_slurm_job_for_real(real):
    call(LAUNCH / "flower_slurm.sbatch", "serve", "c.yaml", "rounds=2", "--out=many")
    call("fedsim", "run", "c.yaml", "rounds=2", "data.clients=2", "--out=one", "runtime=serial")
    assert fingerprint(real / "many") == fingerprint(real / "one")


@pytest.mark.slow
def test_the_gate_lets_nodes_through_and_nothing_else(real, monkeypatch):
    """By nginx, where there is one: rounds with a node behind it, and nobody registers another through it."""
    nginx = shutil.which("nginx") or pytest.skip("there is no nginx")
    lab, inner, outer = real / "lab", int(os.environ["PORT"]), free_port()
    call("fedsim", "certificates", lab, "--server=127.0.0.1", "--node=client-00", "--node=other")
    call("fedsim", "partition", "c.yaml", "data.clients=1", "--shards", "shards")
    with (real / "shards" / "0.yaml").open("a") as file:
        file.write("state: states\n")
    text = (LAUNCH / "flower" / "gate.conf").read_text()
    (lab / "gate.conf").write_text(
        text.replace("127.0.0.1:8000", f"127.0.0.1:{inner}").replace("8443", str(outer))
    )
    (real / "run").mkdir()
    (real / "flwr").mkdir()
    (real / "flwr" / "config.toml").write_text(
        "".join(
            f'[superlink.{name}]\naddress = "127.0.0.1:{port}"\nroot-certificates = "{lab}/ca.crt"\n'
            for name, port in (("inside", inner), ("outside", outer))
        )
    )
    superlink = shlex.split(
        f"flower-superlink --port {inner} --isolation process --enable-supernode-auth"
        f" --disable-runtime-dependency-installation --ssl-ca-certfile {lab}/ca.crt"
        f" --ssl-certfile {lab}/server.pem --ssl-keyfile {lab}/server.key"
    )
    gate = [nginx, "-e", "stderr", "-p", real / "run", "-c", lab / "gate.conf", "-g", "daemon off;"]
    node = shlex.split(
        f"fedsim node shards/0.yaml --superlink=127.0.0.1:{outer} --ca={lab}/ca.crt --key={lab}/nodes/client-00"
    )
    started = [background(real / "superlink.log", *superlink), background(real / "gate.log", *gate)]
    try:
        for port in (inner, outer):
            wait_until(lambda port=port: listens(port))
        assert "403" in call("flwr", "supernode", "register", lab / "nodes" / "other.pub", "outside", status=1)
        started.append(background(real / "node.log", *node))
        wait_until(lambda: "is not registered" in (real / "node.log").read_text())
        call(
            "flwr", "supernode", "register", lab / "nodes" / "client-00.pub", "inside"
        )  # and it gets in by itself
        inside = [f"--superlink=127.0.0.1:{inner}", f"--ca={lab}/ca.crt", f"--keys={lab}/nodes"]
        call("fedsim", "serve", "c.yaml", "rounds=2", "--nodes=client-00", "--out=many", *inside)
        call("fedsim", "run", "c.yaml", "rounds=2", "data.clients=1", "--out=one", "runtime=serial")
        assert fingerprint(real / "many") == fingerprint(real / "one")
        for path in (
            "/v1/control/list-nodes",
            "/v1/runtime/acquire-task",
            "/v1/fleet/../control/list-nodes",
            "/v1/fleet/%2e%2e/control/list-nodes",
            "//v1/control/list-nodes",
            "/v1/fleet/pull-messages?/v1/control",
            "/health",
            "/docs",
        ):
            assert asked(outer, lab / "ca.crt", path) == 403, path
        assert asked(outer, lab / "ca.crt", "/v1/fleet/pull-messages") not in (200, 403)
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
            process.wait(60)


@pytest.mark.slow
def test_three_machines_as_the_readme_says(real):
    """Its commands as they stand, each machine a folder; without nginx the nodes go straight to the SuperLink."""
    server, hospitals = real / "homes" / "lab.example.org", ["hospital-a", "hospital-b"]
    inner = os.environ["PORT"]
    outer = str(free_port()) if shutil.which("nginx") else inner
    for host in (server.name, *hospitals):
        (server.parent / host).mkdir()
    (server / "configs").symlink_to(LAUNCH.parent / "configs")
    (server / "launch" / "flower").mkdir(parents=True)
    gate = (LAUNCH / "flower" / "gate.conf").read_text().replace("8000", inner).replace("8443", outer)
    (server / "launch" / "flower" / "gate.conf").write_text(gate)
    text = (LAUNCH / "README.md").read_text()
    text = text.replace("lab.example.org:8443", f"127.0.0.1:{outer}").replace("8000", inner)
    blocks = re.findall(r"```bash\n# on (\S+)\n(.*?)```", text, re.DOTALL)
    assert [host for host, _ in blocks].count(hospitals[0]) == 2
    call("fedsim", "partition", "configs/quickstart.yaml", "data.clients=2", "--shards=shards", cwd=server)
    for k, host in enumerate(hospitals):
        shutil.move(server / "shards" / f"{k}.npz", server.parent / host)
    said, started = [], []
    try:
        for host, block in blocks:
            for k, each in enumerate(hospitals if host == hospitals[0] else [host]):
                script = (
                    block.replace(hospitals[0], each).replace("0.npz", f"{k}.npz")
                    if each != server.name
                    else block
                )
                last = script.replace("\\\n", " ").strip().splitlines()[-1]
                home = server.parent / each
                if last.startswith("nginx") and outer == inner:
                    continue
                if last.startswith(("flower-superlink", "nginx", "fedsim node ")):
                    script = script.replace(last.split()[0] + " ", f"exec {last.split()[0]} ", 1)
                    started.append(background(home / "log", "bash", "-ec", script, cwd=home))
                    port = {"flower": inner, "nginx ": outer}.get(last[:6])
                    wait_until(lambda port=port: port is None or listens(int(port)))
                else:
                    said.append(call("bash", "-ec", script, cwd=home))
        assert all(name in said[-1] for name in hospitals)
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    call(
        "fedsim",
        "run",
        "configs/quickstart.yaml",
        "rounds=3",
        "cohort=all",
        "data.clients=2",
        "--out=one",
        "runtime=serial",
        cwd=server,
    )
    assert fingerprint(server / "runs" / "first") == fingerprint(server / "one")


def background(log, *command, cwd=None):
    with log.open("a") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, cwd=cwd)


def asked(port, ca, path):
    """The status of a POST of nothing, with the path as it is."""
    trust = ssl.create_default_context(cafile=ca)
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        trust.wrap_socket(plain, server_hostname="localhost") as opened,
    ):
        opened.sendall(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
        )
        return int(opened.recv(4096).split()[1])


def wait_until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)
