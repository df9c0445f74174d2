"""What a config can name, from the catalogues themselves."""

import json
from collections.abc import Iterator
from fnmatch import fnmatch
from inspect import getdoc
from textwrap import fill, indent

import torch
from rich import box
from rich.table import Table
from torch import nn

from fedsim.base.catalogue import Catalogue, Options, allowed, options_of, unknown
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
        "local": "training.recipe:Recipe",
        "local.distillation": "training.recipe:Distillation",
        "local.noisy_labels": "training.recipe:NoisyLabels",
        "model": "models.options:Common",
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


def listing(kind: str | None, pattern: str) -> Iterator[Table | str]:
    """A table a kind, a line an entry; for a single entry what it is, and its options. Raises ConfigError."""
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"list: {unknown(kind, KINDS)}")
    for name in [kind] if kind else KINDS:
        catalogue = KINDS[name]
        matches = [entry for entry in catalogue if fnmatch(entry, pattern)]
        if not matches:
            raise ConfigError(f"list: none of the {name} matches {pattern!r}; there are {', '.join(catalogue)}")
        use = "KEY: {option: ...}" if catalogue is SETTINGS else f"{catalogue.kind}: {{name: ...}}"
        table = Table(name, use, width=80, box=box.SIMPLE_HEAD)
        for entry in matches:
            table.add_row(entry, catalogue.summary(entry))
        yield table
        if catalogue is MODELS and pattern != "*":  # of all it would take long
            yield _costs(matches)
        if len(matches) == 1:
            _, _, more = (getdoc(catalogue.load(matches[0])) or "").partition("\n")
            if more:
                yield "\n\n".join(map(_wrapped, more.strip().split("\n\n"))) + "\n"
            yield _options(catalogue, matches[0])


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
    for name, field in options_of(catalogue.load(entry)).model_fields.items():
        table.add_row(name, "required" if field.is_required() else _shown(field.default), allowed(field))
    if catalogue is MODELS:
        table.caption = "and the options of all models: fedsim list settings model"
    if catalogue is SETTINGS and entry == "local":
        table.caption = (
            "and schedule, loss, augment: fedsim list schedules, losses, augmentations\n"
            "of distillation and noisy_labels: fedsim list settings local.distillation"
        )
    return table


def _shown(default: object) -> str:
    """As a config would have it."""
    plain = {} if isinstance(default, Options) else default  # whose options have defaults of their own
    return plain if isinstance(plain, str) else json.dumps(plain, default=str)
