"""The command: what it prints, where, and how it exits."""

import io
import json
import re
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from rich.cells import cell_len
from rich.console import Console
from typer.main import get_command

from fedsim.base.catalogue import options_of
from fedsim.base.version import VERSION
from fedsim.cli import runs
from fedsim.cli.commands import COMMANDS, app
from fedsim.experiment.progress import Bar
from fedsim.listing import KINDS

COMMAND = [sys.executable, "-P", "-c", "from fedsim.cli import main; main()"]
PNG = b"\x89PNG\r\n\x1a\n"
CONFIG = {
    "rounds": 3,
    "data": {"name": "synthetic", "examples": 40, "test_examples": 20, "classes": 4, "clients": 4},
    "model": "2nn",
    "strategy": "fedavg",
    "cohort": {"name": "uniform", "fraction": 0.5},
    "local": {"lr": 0.1},
    "evaluate": {"every": 2},
    "runtime": "serial",
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a config in it, and nothing else."""
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


@pytest.fixture
def fedsim_(place, fedsim_):
    """Calls the command in a folder with a config."""
    return fedsim_


def narrow(text):
    assert max(map(cell_len, text.splitlines())) <= 80, text
    return text


# Wrong input: status 2, one line, nothing left behind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "no.yaml"], "no.yaml: cannot be read: No such file or directory"),
        (["run", "."], ".: cannot be read: Is a directory"),
        (["run", "c.yaml", "rounds"], "'rounds' should be KEY=VALUE, such as local.lr=0.1"),
        (["run", "c.yaml", "rounds.x=1"], "rounds.x: rounds is 3, which has no keys below it"),
        (["run", "c.yaml", "local.lr=[1"], "local.lr: '[1': is not YAML: "),
        (["run", "c.yaml", "local.lr=abc"], 'local.lr: "abc" should be a number > 0'),
        (["run", "c.yaml", "local.lr="], "local.lr: null should be a number > 0"),
        (["run", "c.yaml", "local.epoch=2"], "local.epoch: 'epoch' is unknown; did you mean 'epochs'?"),
        (["run", "c.yaml", "strategy=scaffold", "local.momentum=0.9"], "local.momentum: scaffold"),
        (["run", "c.yaml", "--out", "c.yaml"], "c.yaml: exists, and a run is never overwritten"),
        (["run", "c.yaml", "--out", "c.yaml/sub/run"], "c.yaml/sub/run: cannot be made: Not a directory"),
        (["run", "c.yaml", "--out", "."], ".: exists, and a run is never overwritten"),
        (["partition", "c.yaml", "data.clients=99"], "data.clients: 99 is too many for 40 examples"),
        (["compare", "no-run"], "config.yaml: No such file or directory; is its folder that of a run?"),
        (["compare", ".", "--target", "99"], "--target: 99.0 should be between 0 and 1, such as 0.99"),
        (["list", "modles"], "list: 'modles' is unknown; did you mean 'models'?"),
        (["list", "models", "zzz*"], "list: none of the models matches 'zzz*'; there are 2nn,"),
        (["bench", "c.yaml", "rounds=0"], "rounds: 0 should be a whole number >= 1"),
        (["bench", "c.yaml", "--out", "c.yaml"], "--out: c.yaml exists; name another file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line(fedsim_, place, arguments, message):
    done = fedsim_(*arguments)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("fedsim: ")
    assert message in done.err
    assert done.err.count("\n") == 1
    assert [path.name for path in place.iterdir()] == ["c.yaml"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(fedsim_):
    done = fedsim_("run", "c.yaml", "runtime.device=cuda")
    assert (done.status, done.err) == (
        2,
        "fedsim: runtime.device: 'cuda' is not on this machine; allowed: auto, cpu\n",
    )


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that even root may not write to")
def test_a_place_that_is_read_only(fedsim_):
    done = fedsim_("run", "c.yaml", "--out", "/proc/run")
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("fedsim: /proc/run: cannot be made: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], "'rnu' is unknown; did you mean 'run'? allowed: run, serve,"),
        (["--verson"], "--verson: is no option of fedsim; did you mean --version?\n"),
        (["run"], "CONFIG: missing; fedsim run --help shows what there is\n"),
        (["compare"], "RUN...: missing; fedsim compare --help"),
        (["run", "c.yaml", "--outt", "x"], "--outt: is no option of fedsim run; did you mean --out?\n"),
        (["run", "c.yaml", "--out"], "--out: needs a value"),
        (["run", "c.yaml", "--rounds", "3"], "--rounds: is no option of fedsim run; a setting is given as rounds"),
        (["run", "c.yaml", "--rounds=3"], "--rounds: is no option of fedsim run; a setting is given as rounds=3"),
        (["run", "c.yaml", "--local.lr=1"], "--local.lr: is no option of fedsim run; a setting is given as loc"),
        (["run", "c.yaml", "--lr", "0.1"], "--lr: is no option of fedsim run; a setting is given as local.lr=0.1"),
        (["bench", "c.yaml", "--repeats", "0"], "--repeats: 0 is not in the range x>=1; fedsim bench --help"),
        (["list", "strategies", "a", "b"], "Got unexpected extra argument (b); fedsim list --help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_wrong_usage_is_one_line(fedsim_, place, arguments, message):
    done = fedsim_(*arguments)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith(f"fedsim: {message}")
    assert done.err.count("\n") == 1
    assert [path.name for path in place.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_each_argument_and_option_is(fedsim_, name):
    parameters = get_command(app).commands[name].params
    assert all(parameter.help for parameter in parameters)
    shown = " ".join(re.sub(r"[│\s]+", " ", fedsim_(name, "--help").out).split())
    for parameter in parameters:
        assert parameter.help[:20] in shown


def test_the_version_is_one_line_with_those_of_what_results_depend_on(fedsim_, monkeypatch):
    def installed(package):
        if package == "ray":
            raise PackageNotFoundError
        return "7"

    monkeypatch.setattr("fedsim.cli.commands.version", installed)
    done = fedsim_("--version")
    python = ".".join(map(str, sys.version_info[:3]))
    assert (done.status, done.out, done.err) == (0, f"fedsim {VERSION} (Python {python}, torch 7, flwr 7)\n", "")


def test_the_version_is_told_without_importing_what_takes_seconds():
    script = """
import atexit, sys
atexit.register(lambda: print(sorted({"torch", "flwr", "ray", "numpy", "pydantic"} & {*sys.modules})))
from fedsim.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[1]) == (0, "[]")


def test_no_command_shows_what_there_is(fedsim_):
    done = fedsim_()
    assert done.status == 2
    assert "Usage: fedsim" in done.out
    assert done.err == ""


def test_wrong_input_in_a_process_of_its_own(place):
    done = subprocess.run([*COMMAND, "run", "c.yaml", "model=no_such:Net"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"fedsim: \S+: [^\n]+\n", done.stderr)
    assert [path.name for path in place.iterdir()] == ["c.yaml"]


# Interrupts: status 130, one line

INTERRUPTED_IMPORT = """
import signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            signal.raise_signal(signal.{number})

sys.meta_path.insert(0, Finder())
from fedsim.cli import main
main()
"""


@pytest.mark.parametrize(
    ("module", "number"),
    [
        ("typer", "SIGINT"),
        ("fedsim.errors", "SIGTERM"),
        ("pydantic", "SIGINT"),
        ("numpy._core.multiarray", "SIGINT"),
        ("torch._C", "SIGTERM"),
        ("fedsim.experiment.start", "SIGINT"),
    ],
)
def test_an_interrupt_while_modules_are_imported(place, module, number):
    """As the command starts, from its first import on."""
    script = INTERRUPTED_IMPORT.format(module=module, number=number)
    done = subprocess.run([sys.executable, "-c", script, "run", "c.yaml"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "fedsim: interrupted\n")
    assert [path.name for path in place.iterdir()] == ["c.yaml"]


def test_an_interrupt_of_a_command_that_works(fedsim_, monkeypatch):
    def interrupted(*_):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("fedsim.data.picture.draw", interrupted)
    done = fedsim_("partition", "c.yaml")
    assert (done.status, done.err) == (130, "fedsim: interrupted\n")


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_while_python_ends_changes_nothing(number):
    """All is done and said by then."""
    script = f"""
import os, signal
class Late:
    def __del__(self):
        os.kill(os.getpid(), signal.{number})
late = Late()
from fedsim.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# A run


def test_a_run_on_no_terminal_is_a_plain_line_a_round(fedsim_):
    done = fedsim_("run", "c.yaml", "--out", "deep/er/run")
    lines = done.out.splitlines()
    assert (done.status, done.err) == (0, "")
    assert "\x1b" not in done.out
    assert re.fullmatch(r"round 1/3  train_loss \d\.\d{4}  \d+\.\d\d s", lines[0])
    tested = r"  test_loss \d\.\d{4}  test_accuracy \d+\.\d\d%  \d+\.\d\d s"
    assert re.fullmatch(r"round 2/3  train_loss \d\.\d{4}" + tested, lines[1])
    assert re.fullmatch(r"round 3/3  train_loss \d\.\d{4}" + tested, lines[2])
    assert re.match(
        r"test accuracy \d+\.\d\d% \(best \d+\.\d\d%\) after 3 rounds, [\d,]+ client steps a", lines[3]
    )
    assert lines[4:] == ["picture: deep/er/run/curves.png", "results: deep/er/run"]
    assert Path("deep/er/run/curves.png").read_bytes().startswith(PNG)


def test_runs_are_numbered(fedsim_):
    for number in (1, 2):
        assert fedsim_("run", "c.yaml", "rounds=1").out.endswith(f"results: runs/c-{number}\n")
    assert sorted(path.name for path in Path("runs").iterdir()) == ["c-1", "c-2"]


def test_a_run_on_a_terminal_has_a_bar(fedsim_, monkeypatch):
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=80, soft_wrap=True, _environ={})
    monkeypatch.setattr(runs, "console", console)
    assert fedsim_("run", "c.yaml").status == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).replace("\r", "\n")
    assert re.search(r"rounds  ━+ 3/3 .* loss \d\.\d{4} \d+\.\d\d%", narrow(shown))
    assert re.search(r"clients ━+ 2/2", shown)
    assert "results: runs/c-1" in shown


def test_a_bar_is_narrow_even_when_its_numbers_are_wide():
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=80, soft_wrap=True, _environ={})
    simulation = SimpleNamespace(sample=lambda: range(100_000))
    run = SimpleNamespace(config=SimpleNamespace(rounds=100_000), simulation=simulation, records=range(99_998))
    bar = Bar(console)
    bar.before_run(run)
    bar.after_round(run, {"round": 99_999, "train_loss": 12345.678, "test_accuracy": 1.0, "failed": {}})
    bar.after_run(run)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).replace("\r", "\n")
    assert "loss 12345.6780 100.00%" in narrow(shown)
    assert "…" not in shown


def test_a_run_that_fails_exits_with_1_and_one_line(fedsim_):
    done = fedsim_("run", "c.yaml", "local.lr=1e30", "local.steps=3", "--out", "run")
    assert done.status == 1
    assert re.fullmatch(r"fedsim: round 1, client \d: [^\n]+\n", done.err)
    assert Path("run/rounds.jsonl").read_text() == ""
    assert not Path("run/summary.json").exists()


# What there is


@pytest.mark.parametrize("kind", KINDS)
def test_every_entry_is_listed_with_a_line_about_it(fedsim_, kind):
    done = fedsim_("list", kind)
    assert done.status == 0
    rows = dict(re.findall(r"^  (\S+) {2,}(\S.*)$", narrow(done.out), re.MULTILINE))
    for entry in KINDS[kind]:
        summary = KINDS[kind].summary(entry)
        assert summary.endswith(".")
        assert summary.startswith(rows[entry].strip())


def test_everything_is_listed(fedsim_):
    done = fedsim_("list")
    assert all(f" {entry} " in narrow(done.out) for catalogue in KINDS.values() for entry in catalogue)


def test_a_pattern_picks(fedsim_):
    done = fedsim_("list", "models", "*cnn*")
    assert done.status == 0
    assert {name for name in KINDS["models"] if f" {name} " in done.out} == {
        "cnn",
        "cifar_cnn",
        "pfl_cnn",
        "cnn_bn",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_one_entry_shows_its_options(fedsim_, kind):
    for entry in list(KINDS[kind])[:: 7 if kind == "models" else 1]:  # whose costs take a moment each
        shown = narrow(fedsim_("list", kind, entry).out)
        assert not [noise for noise in ("typing", "Union", "<class", "Ge(", "None", "PosixPath") if noise in shown]
        for option in options_of(KINDS[kind].load(entry)).model_fields:
            assert f" {option} " in shown


def test_a_file_of_settings_shows_the_keys_that_it_may_have(fedsim_):
    """As does the name that stands for it in the documentation; what the file sets is not looked at."""
    Path("hospital-a.yaml").write_text("name: hospital-a\ndata: {name: nothing:there}\n")
    for file, entry in (("hospital-a.yaml", "NODE.yaml"), ("c.yaml", "CONFIG.yaml")):
        shown = fedsim_("list", "settings", file)
        assert (shown.status, shown.out) == (0, fedsim_("list", "settings", entry).out)
        assert json.loads(fedsim_("list", "settings", file, "--json").out)["settings"][0]["name"] == entry
    no_file = fedsim_("list", "settings", "hospital-b.yaml")
    assert (no_file.status, no_file.err) == (
        2,
        "fedsim: hospital-b.yaml: cannot be read: No such file or directory\n",
    )


def test_an_option_is_told_in_words(fedsim_):
    words = " ".join(fedsim_("list", "runtimes", "threads").out.split())
    assert "workers auto a whole number >= 1, or auto" in words
    words = " ".join(fedsim_("list", "partitions", "dirichlet").out.split())
    assert "alpha required a number > 0 balanced false true or false min_size 1 a whole number >= 1" in words


# Who holds what, and which run was better


def test_a_partition_is_a_table_and_a_picture(fedsim_):
    done = fedsim_("partition", "c.yaml", "data.clients=30")
    assert done.status == 0
    assert "30 clients, 40 examples, 4 labels" in narrow(done.out)
    assert re.search(r"hash: +[0-9a-f]{64}\npicture: c-partition.png", done.out)
    assert Path("c-partition.png").read_bytes().startswith(PNG)


def test_the_hash_of_a_partition_is_the_run_s(fedsim_):
    fedsim_("run", "c.yaml", "seed=5", "rounds=1", "--out", "run")
    assert (
        json.loads(Path("run/partition.json").read_text())["hash"] in fedsim_("partition", "c.yaml", "seed=5").out
    )


def test_two_runs_side_by_side(fedsim_):
    fedsim_("run", "c.yaml", "--out", "plain")
    fedsim_("run", "c.yaml", "strategy=fedprox", "strategy.mu=0.5", "--out", "prox")
    done = fedsim_("compare", "plain", "prox", "--target", "0.3", "--out", "both.png")
    assert done.status == 0
    shown = narrow(done.out)
    assert "plain" in shown
    assert "prox" in shown
    assert "strategy.name: fedavg, fedprox" in shown
    assert Path("both.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("command", [["partition", "c.yaml"], ["compare", "run"]])
@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("c.yaml/x.png", "c.yaml/x.png cannot be written; is there such a folder?"),
        ("nowhere/x.png", "nowhere/x.png cannot be written; is there such a folder?"),
        ("x.yaml", "x.yaml should end with .png; pictures are PNG files"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_the_work(fedsim_, command, out, message):
    done = fedsim_(*command, "--out", out)
    assert (done.status, done.out, done.err) == (2, "", f"fedsim: --out: {message}\n")


@pytest.mark.parametrize("name", ["curves.png", "tensorboard"])
def test_a_finished_run_whose_picture_cannot_be_written_is_done(fedsim_, monkeypatch, name):
    """Its results are whole; a line says what is missing."""
    no_space = OSError(28, "No space left on device", name)

    def full(*_, **__):
        raise no_space

    if name == "curves.png":
        monkeypatch.setattr("fedsim.report.plot.curves", full)
    else:
        monkeypatch.setattr(
            "fedsim.experiment.hooks.tensorboard.TensorBoard._add",
            lambda self, record, when: full() if record["round"] == 3 else None,
        )
    done = fedsim_("run", "c.yaml", "--out", "run")
    assert (done.status, done.err.count("\n")) == (0, 1)
    assert re.match(rf"fedsim: \S*{name}\S*: .*No space left on device; the other results are whole", done.err)
    assert json.loads(Path("run/summary.json").read_text())["rounds"] == 3


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9")])
@pytest.mark.parametrize(
    "where", ["fedsim.experiment.build.build_dataset", "fedsim.training.local.ClientObjective.train"]
)
def test_no_memory_is_one_line_with_a_way_out(fedsim_, monkeypatch, error, where):
    """As it starts, or in a client."""

    def full(*_, **__):
        raise error

    monkeypatch.setattr(where, full)
    done = fedsim_("run", "c.yaml")
    assert (done.status, done.err.count("\n")) == (1, 1)
    assert "lower local.batch_size" in done.err


def test_a_sweep_is_no_run(fedsim_):
    Path("s/lr=1").mkdir(parents=True)
    for name in ("s/sweep.yaml", "s/lr=1/config.yaml"):
        Path(name).touch()
    done = fedsim_("compare", "s")
    assert done.status == 2
    assert "/s: is a sweep, whose own table is in results.csv; name folders of runs in it" in done.err


def test_an_entry_of_your_own_is_listed_with_its_options(fedsim_, place, monkeypatch):
    monkeypatch.syspath_prepend(place)
    Path("my_own.py").write_text('def net(shape, classes, /, *, width: int = 7):\n    """A net of mine."""\n')
    done = fedsim_("list", "models", "my_own:net")
    assert done.status == 0
    assert "A net of mine." in done.out
    assert re.search(r"width +7 +a whole number", done.out)
    done = fedsim_("list", "models", "my_own:no")
    assert (done.status, done.err) == (2, "fedsim: model.name: my_own has no callable 'no'\n")


# JSON


def test_json_is_all_of_standard_output(fedsim_):
    fedsim_("run", "c.yaml")
    fedsim_("run", "c.yaml", "rounds=2", "strategy=fedprox")
    runs = ["runs/c-1", "runs/c-2"]
    commands = {
        "compare": [*runs, "--target", "0.01"],
        "list": ["strategies", "fedprox"],
        "partition": ["c.yaml"],
        "bench": ["c.yaml", "--repeats", "1", "--sides", "*serial*"],
        "check": [runs[0]],
    }
    found = {}
    for command, arguments in commands.items():
        done = fedsim_(command, *arguments, "--json")
        assert done.status == 0
        found[command] = json.loads(done.out)
    first, second = found["compare"]["runs"]
    assert (first["run"], first["rounds"], second["rounds"], first["finished"]) == ("c-1", 3, 2, True)
    summary = json.loads(Path("runs/c-1/summary.json").read_text())
    assert first["bytes"] == summary["bytes_up"] + summary["bytes_down"]
    assert first["best_test_accuracy"] == summary["best_test_accuracy"]
    assert found["compare"]["differences"]["rounds"] == [3, 2]
    mu = next(option for option in found["list"]["strategies"][0]["options"] if option["name"] == "mu")
    assert mu == {"name": "mu", "required": False, "default": 0.01, "allowed": "a number >= 0"}
    assert json.loads(Path("runs/c-1/partition.json").read_text()).items() <= found["partition"].items()
    assert any("serial" in row["side"] for table in found["bench"]["found"].values() for row in table["rows"])
