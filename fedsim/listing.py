"""What a config can name, from the catalogues themselves.

`fedsim list` prints it; `python -m fedsim.listing DIR` writes it to DIR/options.md, a page of the documentation.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from inspect import getdoc
from pathlib import Path
from textwrap import fill, indent
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import nn

from fedsim.base.catalogue import Catalogue, Options, allowed, options_of, unknown
from fedsim.base.reading import read_yaml
from fedsim.data import AUGMENTATIONS, DATASETS, PARTITIONS
from fedsim.errors import ConfigError
from fedsim.experiment.hooks import HOOKS
from fedsim.export.cost import flops, short, size
from fedsim.federated.cohort import COHORTS
from fedsim.models import MODELS
from fedsim.runtimes import RUNTIMES
from fedsim.strategies import CATALOGUE as STRATEGIES
from fedsim.training.losses import LOSSES
from fedsim.training.schedules import SCHEDULES

SETTINGS = Catalogue(  # the mappings of a config that are no entry of a catalogue
    "KEY",
    "fedsim",
    {
        "CONFIG.yaml": "experiment.config:Config",
        "local": "training.recipe:Recipe",
        "local.distillation": "training.recipe:Distillation",
        "local.noisy_labels": "training.recipe:NoisyLabels",
        "model": "models.options:CommonOptions",
        "data": "experiment.config:DataOptions",
        "data.label_noise": "data.noise:LabelNoise",
        "evaluate": "experiment.config:Evaluate",
        "recalibrate": "federated.recalibration:Recalibrate",
        "failures": "federated.simulation:Failures",
        "availability": "federated.availability:Availability",
        "checkpoint": "experiment.config:Checkpointing",
        "client_store": "federated.store:ClientStore",
        "NODE.yaml": "flower.node:NodeSettings",
        "allow": "flower.plan:Allow",
    },
)
KINDS: dict[str, Catalogue] = {
    "strategies": STRATEGIES,
    "models": MODELS,
    "datasets": DATASETS,
    "partitions": PARTITIONS,
    "cohorts": COHORTS,
    "schedules": SCHEDULES,
    "losses": LOSSES,
    "augmentations": AUGMENTATIONS,
    "runtimes": RUNTIMES,
    "hooks": HOOKS,
    "settings": SETTINGS,
}
PAGE = """# All options

Written by `make docs` from the program's own definitions; a test says when the page is out of date.
`fedsim list KIND NAME` shows the same in a terminal. *required* means that there is no default.
"""


def listing(kind: str | None, pattern: str) -> Iterator[Table | str]:
    """A table a kind, a line an entry; for a single entry what it is, and its options. Raises ConfigError."""
    for name, catalogue, matches in _matching(kind, pattern):
        table = Table(name, _use(catalogue), width=80, box=box.SIMPLE_HEAD)
        for entry in matches:
            table.add_row(entry, catalogue.summary(entry))
        yield table
        if catalogue is MODELS and pattern != "*" and ":" not in pattern:  # of all it would take long
            yield _costs(matches)
        if len(matches) == 1:
            if more := _paragraphs(catalogue, matches[0]):
                yield "\n\n".join(map(_wrapped, more)) + "\n"
            yield _options(catalogue, matches[0])


def document(kind: str | None, pattern: str) -> dict[str, Any]:
    """The same of all entries with their options, as JSON has it; raises ConfigError."""
    return {
        name: [
            {
                "name": entry,
                "about": catalogue.summary(entry),
                "options": [
                    {
                        "name": option,
                        "required": field.is_required(),
                        "default": None if field.is_required() else _plain(field.default),
                        "allowed": allowed(field),
                    }
                    for option, field in options_of(catalogue.load(entry)).model_fields.items()
                ],
            }
            for entry in matches
        ]
        for name, catalogue, matches in _matching(kind, pattern)
    }


def _matching(kind: str | None, pattern: str) -> Iterator[tuple[str, Catalogue, list[str]]]:
    """The entries of each kind that match; raises ConfigError."""
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"list: {unknown(kind, KINDS)}")
    for name in [kind] if kind else KINDS:
        catalogue = KINDS[name]
        own = [pattern] if ":" in pattern and kind is not None else []  # package.module:Name
        matches = own or [entry for entry in catalogue if fnmatch(entry, pattern)]
        if not matches and catalogue is SETTINGS and Path(pattern).suffix in (".yaml", ".yml"):
            matches = ["NODE.yaml" if "name" in read_yaml(Path(pattern)) else "CONFIG.yaml"]  # the file's own keys
        if not matches:
            raise ConfigError(f"list: none of the {name} matches {pattern!r}; there are {', '.join(catalogue)}")
        yield name, catalogue, matches


def page() -> str:
    """The listing of everything as Markdown; entries with the same text and options share a table."""
    parts = [PAGE]
    for kind, catalogue in KINDS.items():
        parts.append(f"## {kind}\n\n`{_use(catalogue)}`\n\n{_entries(catalogue)}")
        alike: dict[str, list[str]] = {}
        for entry in catalogue:
            text = "\n\n".join(_unwrapped(each) for each in _paragraphs(catalogue, entry))
            rows = [[f"`{option}`", *about] for option, *about in _rows(catalogue, entry)]
            table = _markdown(["option", "default", "allowed"], rows) if rows else ""
            alike.setdefault(f"{text}\n\n{table}".strip(), []).append(entry)
        parts += [f"### {', '.join(entries)}\n\n{about}\n" for about, entries in alike.items() if about]
    return "\n".join(parts)


def _use(catalogue: Catalogue) -> str:
    return "KEY: {option: ...}" if catalogue is SETTINGS else f"{catalogue.kind}: {{name: ...}}"


def _paragraphs(catalogue: Catalogue, entry: str) -> list[str]:
    """Those of the entry's docstring after its first line."""
    _, _, more = (getdoc(catalogue.load(entry)) or "").partition("\n")
    return more.strip("\n").split("\n\n") if more.strip() else []


def _entries(catalogue: Catalogue) -> str:
    about = [[f"`{entry}`", catalogue.summary(entry)] for entry in catalogue]
    if catalogue is not MODELS:
        return _markdown(["name", "what it is"], about)
    for row, entry in zip(about, catalogue, strict=True):
        shape, classes, parameters = catalogue.load(entry).reference  # type: ignore[attr-defined]
        row += [size(shape), str(classes), f"{parameters:,}"]
    return _markdown(["name", "what it is", "examples", "classes", "parameters"], about)


def _markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    cells = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in cells)


def _unwrapped(paragraph: str) -> str:
    """On one line; what has indented lines is shown as it is."""
    return f"```\n{paragraph}\n```" if "\n " in paragraph else " ".join(paragraph.split())


def _wrapped(paragraph: str) -> str:
    """For 80 columns; one with indented lines keeps its lines."""
    if "\n " in paragraph:
        return indent(paragraph, "  ")
    return fill(paragraph, 78, initial_indent="  ", subsequent_indent="  ")


def _costs(entries: list[str]) -> Table:
    """What models cost at the size that they were published for."""
    table = Table("model", "examples", "classes", "parameters", "FLOPs", width=80, box=box.SIMPLE_HEAD)
    table.caption = "FLOPs: multiply-adds of one example"
    for entry in entries:
        shape, classes, parameters = MODELS.load(entry).reference  # type: ignore[attr-defined]
        with torch.device("meta"):
            network = MODELS.make(entry, nn.Module, shape, classes)
        table.add_row(entry, size(shape), str(classes), f"{parameters:,}", short(flops(network, shape)))
    return table


def _options(catalogue: Catalogue, entry: str) -> Table:
    table = Table("option", "default", "allowed", width=80, box=box.SIMPLE_HEAD)
    for row in _rows(catalogue, entry):
        table.add_row(*row)
    if catalogue is MODELS:
        table.caption = "and the options of all models: fedsim list settings model"
    if catalogue is SETTINGS and entry == "local":
        table.caption = (
            "and schedule, loss, augment: fedsim list schedules, losses, augmentations\n"
            "of distillation and noisy_labels: fedsim list settings local.distillation"
        )
    return table


def _rows(catalogue: Catalogue, entry: str) -> Iterator[tuple[str, str, str]]:
    """Name, default and allowed values of each option."""
    for name, field in options_of(catalogue.load(entry)).model_fields.items():
        yield name, "required" if field.is_required() else _shown(field.default), allowed(field)


def _shown(default: object) -> str:
    """As a config would have it."""
    plain = _plain(default)
    return plain if isinstance(plain, str) else json.dumps(plain, default=str)


def _plain(default: object) -> object:
    """A default in values that JSON has."""
    if isinstance(default, Options):  # whose options have defaults of their own
        return {}
    return str(default) if isinstance(default, Path) else default


if __name__ == "__main__":
    (Path(sys.argv[1]) / "options.md").write_text(page())
