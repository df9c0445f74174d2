"""Flower apps: an app here is only a pyproject.toml that points into the installed package."""

import re
import shlex
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from fedsim.base.files import create
from fedsim.base.reading import MAX_YAML_BYTES, parse
from fedsim.errors import ConfigError, printable
from fedsim.experiment.config import Config, load, overridden, parse_overrides
from fedsim.flower import FLWR
from fedsim.runtimes import RUNTIMES

TEMPLATE = """\
[project]
name = "{name}"
version = "1.0.0"
description = "A federation of fedsim"
license = "Apache-2.0"
dependencies = ["{flwr}"]

[tool.flwr.app]
publisher = "fedsim"

[tool.flwr.app.components]
serverapp = "{server}"
clientapp = "{client}"

[tool.flwr.app.config]
"""

# `flwr run DIR -c 'KEY="VALUE"'` accepts only keys that are in this file.
CONFIG = """\
settings = "" # overrides of the experiment, such as "local.lr=0.1 rounds=5"
name = {name} # of the run's folder: runs/NAME-1 and so on, in the folder where the SuperLink was started
out = "" # or a new folder for the run, on the SuperLink's machine
resume = "" # or the folder of a run to resume there; its experiment is used, with these settings
experiment = {experiment}
"""

MOST_NAME_CHARACTERS = 32  # of an app, a rule of Flower's


def project(
    name: str, server: str = "fedsim.flower.server_app:app", client: str = "fedsim.flower.client_app:app"
) -> str:
    """The pyproject.toml of an app, up to the keys of its config."""
    return TEMPLATE.format(name=name, flwr=FLWR, server=server, client=client)


def write_app(folder: Path, name: str, experiment: Mapping[str, Any]) -> Path:
    """Write an app that runs an experiment, given as a config's values, to a new folder; raises ConfigError."""
    path = folder / "pyproject.toml"
    text = _toml(yaml.safe_dump(dict(experiment), sort_keys=False))
    content = project(_app_name(name)) + CONFIG.format(name=_toml(name), experiment=text)
    try:
        create(folder, {path.name: content.encode()})
    except OSError as error:
        raise ConfigError(f"--out: {printable(folder)}: cannot be created: {error.strerror}") from None
    return path


def checked(values: Mapping[str, Any]) -> Config:
    """The config of an app's experiment; raises ConfigError."""
    config = load(values)
    if (name := RUNTIMES.resolve(config.runtime)["name"]) != "flower":
        raise ConfigError(f"runtime.name: is {name}, but should be flower in a Flower app")
    return config


def values_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `experiment` of an app's config, with its `settings` applied; raises ConfigError."""
    text = str(config.get("experiment", ""))
    if len(text) > MAX_YAML_BYTES:
        raise ConfigError(f"experiment: has {len(text)} characters; allowed: up to {MAX_YAML_BYTES}")
    values = parse(text, "experiment")
    if not isinstance(values, dict):
        raise ConfigError("experiment: should hold a mapping of settings, as `fedsim app` writes it")
    return overridden(values, overrides_of(config))


def overrides_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `settings` of an app's config; raises ConfigError."""
    text = str(config.get("settings", ""))
    try:
        return parse_overrides(shlex.split(text))
    except ConfigError:
        raise
    except ValueError as error:  # of unmatched quotes
        raise ConfigError(f"settings: {printable(text)!r}: {error}") from None


@cache
def flower_app() -> bytes:
    """A FAB (Flower's archive of an app) of fedsim's app, for runs that another process drives."""
    from fedsim.flower.internals import build_fab

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pyproject.toml").write_text(project("fedsim-app"))
        return build_fab(Path(folder))


def _toml(text: str) -> str:
    """A text in TOML; several lines stay lines, so that people can read and change them."""
    escaped = "".join(_character(c) for c in text)
    return f'"""\n{escaped}"""' if "\n" in text else f'"{escaped}"'


def _character(c: str) -> str:
    if c in '"\\':
        return f"\\{c}"
    return c if c.isprintable() or c == "\n" else f"\\U{ord(c):08x}"


def _app_name(name: str) -> str:
    """A name that Flower allows: letters, digits and hyphens, a letter first."""
    words = re.sub(r"[^a-zA-Z0-9]+", "-", name).strip("-")
    return (words if words[:1].isalpha() else f"fedsim-{words}")[:MOST_NAME_CHARACTERS].strip("-")
