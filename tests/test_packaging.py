"""What is installed is what stands in the checkout, and no more is needed to use it."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.version import Version

import fedsim
import fedsim.strategies

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
OPTIONAL = ["flwr", "onnx", "onnxruntime", "onnxscript", "ray", "scipy", "sklearn", "tensorrt"]


def packages_on_disk() -> dict[str, Path]:
    folders = {file.parent for file in (ROOT / "fedsim").rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts): folder for folder in folders}
    return packages | {"fedsim.strategies": ROOT / "strategies"}


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
    version = PYPROJECT["project"]["version"]
    assert str(Version(version)) == version


def test_strategies_have_one_name(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ImportError, match=r"import fedsim\.strategies"):
        importlib.import_module("strategies")


@pytest.mark.parametrize("name", list(fedsim.strategies.CATALOGUE))
def test_every_strategy_of_the_catalogue_is_there(name):
    assert fedsim.strategies.CATALOGUE.load(name).__module__.startswith("fedsim.strategies.")


def test_every_strategy_file_imports():
    for file in (ROOT / "strategies").glob("[!_]*.py"):
        importlib.import_module(f"fedsim.strategies.{file.stem}")


def test_the_core_needs_no_extra(tmp_path):
    script = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL}))  # importing one of these now fails
import fedsim, fedsim.cli.commands
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
