"""What the README shows works as it stands."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import ray
import yaml
from typer.testing import CliRunner

from fedsim.cli.commands import app
from fedsim.experiment.config import resolve
from fedsim.flower.node import NodeSettings
from fedsim.listing import KINDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHORTER = {
    "run": ["rounds=2"],
    "bench": ["rounds=2", "--repeats", "1", "--sides", "fedsim serial"],
    "profile": ["--repeats", "1"],
    "sweep": ["--jobs", "1"],
}  # the same commands, in less time


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder in which the README's paths are right, and what is written is thrown away."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fedsim(line):
    _, *arguments = shlex.split(line, comments=True)
    return CliRunner().invoke(app, [*arguments, *SHORTER.get(arguments[0], [])], catch_exceptions=False)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of processes that Ray lets go of as it shuts down
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_commands(checkout):
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("fedsim ")]
    told = {shlex.split(line)[1] for line in lines}
    assert told == {"run", "resume", "partition", "compare", "list", "bench", "profile", "export", "sweep"}
    try:
        for line in lines:
            result = fedsim(line)
            assert result.exit_code == 0, (line, result.output)
    finally:
        ray.shutdown()  # which `auto` would try in other tests


def test_a_strategy_of_your_own(checkout, monkeypatch):
    code = next(block for block in blocks("python") if "my_strategy.py" in block)
    (checkout / "my_strategy.py").write_text(code)
    monkeypatch.delitem(sys.modules, "my_strategy", raising=False)  # another test's
    monkeypatch.syspath_prepend(checkout)
    line = next(line for block in blocks("bash") for line in block.splitlines() if "my_strategy" in line)
    assert len(code.splitlines()) <= 30
    assert fedsim(line.removeprefix("PYTHONPATH=. ")).exit_code == 0


def test_a_hook_of_your_own(checkout, monkeypatch):
    monkeypatch.delitem(sys.modules, "my_hooks", raising=False)  # another test's
    (checkout / "my_hooks.py").write_text(next(block for block in blocks("python") if "my_hooks.py" in block))
    monkeypatch.syspath_prepend(checkout)
    result = fedsim("fedsim run configs/quickstart.yaml 'hooks=[my_hooks:Notify]' local.epochs=9 --out run")
    assert "of run" in result.output


def test_the_python_examples(checkout):
    examples = [block for block in blocks("python") if "# my_" not in block]
    assert len(examples) == 2
    for code in examples:
        exec(code, {})


def test_the_config_is_valid():
    whole, *parts = map(yaml.safe_load, blocks("yaml"))
    for part in [{}, *parts]:
        NodeSettings.of(part) if "name" in part else resolve(whole | part)


def test_every_catalogue_entry_is_named():
    for catalogue in KINDS.values():
        for name in catalogue:
            assert re.search(rf"\b{name}\b", README), name
