"""What is installed is what stands in the checkout, and no more is needed to use it."""

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import fedsim
import fedsim.strategies
from fedsim.base.version import VERSION

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
OPTIONAL = ["cryptography", "flwr", "onnx", "onnxruntime", "onnxscript", "ray", "scipy", "sklearn", "tensorrt"]
OF_EXTRAS = ("fedsim.flower.", "fedsim.runtimes.ray.", "fedsim.bench.apps.", "fedsim.bench.peers.")


def packages_on_disk() -> dict[str, Path]:
    folders = {file.parent for top in ("fedsim", "strategies") for file in (ROOT / top).rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts): folder for folder in folders}
    return {name.replace("strategies", "fedsim.strategies", 1): folder for name, folder in packages.items()}


def test_the_tests_test_this_checkout():
    # Run from one checkout with another installed, `fedsim` may come from here and its strategies from there.
    assert [Path(p) for p in fedsim.__path__] == [ROOT / "fedsim"]
    assert [Path(p) for p in fedsim.strategies.__path__] == [ROOT / "strategies"]


def test_every_package_is_installed():
    assert sorted(SETUPTOOLS["packages"]) == sorted(packages_on_disk())


def test_every_package_is_one_to_import():
    missing = [name for name, folder in packages_on_disk().items() if not (folder / "__init__.py").exists()]
    assert missing == []


def test_every_other_file_is_installed():
    declared = {
        file
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for file in packages_on_disk()[package].glob(pattern)
    }
    present = {
        file
        for top in ("fedsim", "strategies")
        for file in (ROOT / top).rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc") and not file.name.startswith(".")
    }
    assert declared == present


def test_the_version_is_one_that_pip_orders():
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "fedsim.base.version.VERSION"}
    assert str(Version(VERSION)) == VERSION


def test_nobody_is_told_to_install_another_fedsim():
    """On the package index that name belongs to another project; this one's extras name its own distribution."""
    name = PYPROJECT["project"]["name"]
    assert name != "fedsim"
    for extra in PYPROJECT["project"]["optional-dependencies"].values():
        assert not [needed for needed in extra if Requirement(needed).name == "fedsim"]
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for path in map(ROOT.joinpath, filter(None, files.stdout.split("\0"))):
        text = path.read_bytes() if path.exists() else b""
        assert not re.search(rb"pip3? install\s+(-\S+\s+)*['\"]?fedsim\b", text), path


def test_a_missing_extra_is_told_as_an_extra_that_there_is():
    """The names that fedsim and launch/ give are those of pyproject.toml."""
    extras = PYPROJECT["project"]["optional-dependencies"].keys()
    paths = [path for top in ("fedsim", "launch", "docs") for path in (ROOT / top).rglob("*.*")]
    texts = [path.read_text() for path in paths if path.suffix in (".py", ".sh", ".md")]
    named = {name for text in texts for name in re.findall(r"pip install -e '\.\[([a-z]+)\]'", text)}
    named |= {name for text in texts for name in re.findall(r"how_to_install\([\"'](\w+)", text)}
    named |= {name for text in texts for name in re.findall(r"missing_extra\(.*, \"(\w+)\"\)", text)}
    assert named >= {"digits", "export", "flower", "peers", "ray", "svhn"}
    assert named <= extras


def test_strategies_have_one_name(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ImportError, match=r"import fedsim\.strategies"):
        importlib.import_module("strategies")


@pytest.mark.parametrize("name", list(fedsim.strategies.CATALOGUE))
def test_every_strategy_of_the_catalogue_is_there(name):
    assert fedsim.strategies.CATALOGUE.load(name).__module__.startswith("fedsim.strategies.")


def test_every_strategy_file_imports():
    for file in (ROOT / "strategies").glob("*/[!_]*.py"):
        importlib.import_module(f"fedsim.strategies.{file.parent.name}.{file.stem}")


def modules_on_disk() -> list[str]:
    files = [(name, file) for name, folder in packages_on_disk().items() for file in folder.glob("*.py")]
    return sorted(name if file.stem == "__init__" else f"{name}.{file.stem}" for name, file in files)


def test_the_core_needs_no_extra(tmp_path):
    """Every module can be imported where no extra is installed, but for those that exist for one."""
    core = [name for name in modules_on_disk() if not name.startswith(OF_EXTRAS)]
    assert {"fedsim.cli", "fedsim.flower", "fedsim.runtimes.ray", "fedsim.strategies.averaging.fedavg"} <= {*core}
    script = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({OPTIONAL}))  # importing one of these now fails
for name in {core}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
