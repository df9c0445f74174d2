"""The plan of an experiment that nodes receive, what a node allows, and the objects that it builds from a plan.

A plan is names and numbers: all of it is checked against what the node allows before any of its names is looked
up, so that no plan makes a node import, open or fetch anything that its owner did not list.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from annotated_types import Ge, Le
from pydantic import AfterValidator, ByteSize
from pydantic_core import from_json
from torch import Tensor

from fedsim.base.catalogue import Catalogue, Options, Spec, unknown, validated
from fedsim.base.reading import MAX_YAML_BYTES
from fedsim.data import AUGMENTATIONS, FederatedData
from fedsim.errors import ConfigError, located, one_line
from fedsim.experiment.build import build_recipe, build_task
from fedsim.experiment.config import recipe_options
from fedsim.federated.strategy import Strategy
from fedsim.models import MODELS
from fedsim.models import options as models
from fedsim.strategies import CATALOGUE as STRATEGIES
from fedsim.training.losses import LOSSES
from fedsim.training.recipe import Recipe
from fedsim.training.schedules import SCHEDULES
from fedsim.training.task import Task
from fedsim.types import Count, NonNegative, Positive, Seed, State, described, form_of

FILES = (
    "weights",
    "pretrained",
    "new_head",
)  # options of a model that are left out of a plan: the initial weights are sent
MAX_LENGTH = 1000  # characters of a text in a plan, and entries of a list or mapping, except a list of numbers
MAX_CLIENTS = 2**20  # of a federation: a server may keep a number for each
MAX_NAME_LENGTH = 200  # characters of a class's name, and
MAX_NAMES_LENGTH = 2**16  # of all names together
SENT = "sent"  # replaces the file of a teacher, whose weights are sent


def _words(text: str) -> str:
    if len(text) > MAX_NAME_LENGTH or not text.isprintable():
        raise ValueError(f"{one_line(repr(text[:40]))} should be up to {MAX_NAME_LENGTH} printable characters")
    return text


def _moderate(spec: Spec) -> Spec:
    """Refuses what is long, except lists of numbers: each pattern of names and each augmentation costs time."""
    values: list[Any] = [spec]
    while values:
        value = values.pop()
        if isinstance(value, list) and all(isinstance(each, int | float) for each in value):
            continue
        if isinstance(value, str | list | dict) and len(value) > MAX_LENGTH:
            what = "characters" if isinstance(value, str) else "entries"
            raise ValueError(f"has {len(value):,} {what} in one place; allowed: {MAX_LENGTH:,}")
        if isinstance(value, list | dict):
            values += [*value, *value.values()] if isinstance(value, dict) else value
    return spec


Words = Annotated[str, AfterValidator(_words)]
Moderate = Annotated[Spec, AfterValidator(_moderate)]


class Examples(Options):
    """The form of examples. Batches are x * scale - shift, with no, one, or one value per channel of each.

    What comes after `crop` says what labels and numbers mean, as far as the server knows it.
    """

    shape: tuple[Count, ...]  # of the network's input
    dtype: Literal["uint8", "float32"]
    classes: Count
    scale: tuple[float, ...] = ()
    shift: tuple[float, ...] = ()
    crop: Count | None = None
    class_names: tuple[Words, ...] | Words = ()  # or `names_digest` of them
    whole_shape: tuple[Count, ...] = ()  # before the crop
    preparation: Words = ""  # how files became numbers
    largest: NonNegative | None = None  # magnitude in some examples, before they are normalised


class Plan(Options):
    """The parts of a resolved config that clients depend on, as nodes receive them."""

    format: Literal[1] = 1
    seed: Seed
    clients: Annotated[int, Ge(1), Le(MAX_CLIENTS)] = 1  # N
    model: Moderate
    strategy: Moderate
    local: Moderate
    time_limit: Positive | None = None  # seconds that a client may take
    max_examples: Count | None = None  # n_k of a node that may join
    examples: Examples
    own: dict[str, str] = {}  # SHA-256 of the files of modules that are not fedsim's

    def json_text(self) -> str:
        """JSON; equal plans have equal texts."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def read(cls, text: str) -> Self:
        """A plan from an untrusted text; raises ConfigError."""
        if len(text) > MAX_YAML_BYTES:
            raise ConfigError(f"plan: has {len(text)} characters; allowed: up to {MAX_YAML_BYTES}")
        try:
            values = from_json(text, allow_inf_nan=False)
        except ValueError as error:
            raise ConfigError(f"plan: is not JSON: {one_line(error)}") from None
        if not isinstance(values, dict):
            raise ConfigError("plan: should be a mapping")
        return validated(cls, values, "plan")


def plan_of(config: Mapping[str, Any], data: FederatedData) -> Plan:
    """The plan of a resolved config's `seed`, `model`, `strategy`, `local` and `failures`, for these examples.

    It names no files: their contents are sent.
    """
    distillation = config["local"]["distillation"]
    if distillation and distillation["teacher"] != "global":
        distillation = distillation | {"teacher": SENT}
    plan = {
        "seed": config["seed"],
        "clients": data.num_clients,
        "model": {key: value for key, value in config["model"].items() if key not in FILES},
        "strategy": config["strategy"],
        "local": config["local"] | {"distillation": distillation},
        "time_limit": config["failures"]["time_limit"],
        "max_examples": config["failures"]["max_examples"],
        "examples": data.form
        | {
            "classes": data.num_classes,
            "crop": data.crop,
            "class_names": _sent_names(data.class_names),
            "whole_shape": data.whole_shape,
            "preparation": data.preparation,
            "largest": data.largest_value(),
        },
    }
    made = validated(Plan, plan, "plan")
    return made.model_copy(update={"own": {module: source(module) for _, module in _modules(made)}})


def _sent_names(names: tuple[str, ...]) -> tuple[str, ...] | str:
    """The class names, or where they are long, their digest."""
    short = max(map(len, names), default=0) <= MAX_NAME_LENGTH and sum(map(len, names)) <= MAX_NAMES_LENGTH
    return names if short else names_digest(names)


def names_digest(names: tuple[str, ...]) -> str:
    """SHA-256 of the names of classes."""
    return digest(json.dumps(names))


def source(module: str) -> str:
    """SHA-256 of a module's file, to compare it between two machines; empty if there is no such module."""
    found = find_spec(module)
    return hashlib.sha256(Path(found.origin).read_bytes()).hexdigest() if found and found.origin else ""


def digest(text: str) -> str:
    """SHA-256 of a plan's text, which identifies it in orders."""
    return hashlib.sha256(text.encode()).hexdigest()


def initial_of(task: Task) -> State:
    """The tensors that a node needs besides a plan: `model` (P,), `buffers` (Q,), and each `constant.NAME`."""
    fixed = {f"constant.{name}": value.detach() for name, value in task.constants().items()}
    return {"model": task.initial_model, "buffers": task.initial_buffers} | fixed


class Parts(NamedTuple):
    """The objects that a plan names."""

    task: Task
    strategy: Strategy
    recipe: Recipe


def parts_of(plan: Plan, initial: State, examples: Tensor | None = None) -> Parts:
    """The objects of a plan that is allowed, with the tensors that were sent with it; raises ConfigError.

    The network is tried on `examples` (n, ...) of the node, by default on random ones.
    """
    try:
        recipe = build_recipe(plan.local)
        shape, classes = plan.examples.shape, plan.examples.classes
        recipe.check(classes)
        task = build_task(plan.model, recipe, plan.seed, shape, classes, examples, sent=True)
        strategy = STRATEGIES.make(plan.strategy, Strategy)
        _receive(task, initial)
        strategy.check(recipe, task.layout)
    except ConfigError:
        raise
    except Exception as error:  # whatever a network or strategy raises for a plan's numbers
        raise ConfigError(f"plan: cannot be built here: {located(error)}") from error
    return Parts(task, strategy, recipe)


def _receive(task: Task, initial: State) -> None:
    """Give the task the server's initial tensors; raises ConfigError unless all fit."""
    own = initial_of(task)
    for name, value in own.items():
        if name not in initial:
            raise ConfigError(f"initial: {name} was not sent")
        there, here = (described(form_of({name: tensor})) for tensor in (initial[name], value))
        if there != here:
            raise ConfigError(f"initial: {there} was sent, but the plan's network has {here}")
        if value.is_floating_point() and not initial[name].isfinite().all():
            raise ConfigError(f"initial: {name} has values that are not finite")
    if strange := sorted(initial.keys() - own.keys()):
        raise ConfigError(f"initial: {strange[0]} was sent, but the plan's network has no such tensor")
    task.initial_model, task.initial_buffers = initial["model"].clone(), initial["buffers"].clone()
    with torch.no_grad():
        for name, value in task.constants().items():  # the networks' own
            value.copy_(initial[f"constant.{name}"])


def _known(catalogue: Catalogue) -> AfterValidator:
    """Refuses names that are neither in the catalogue nor of a module."""

    def check(names: list[str]) -> list[str]:
        for name in names:
            if name not in catalogue and ":" not in name:
                raise ValueError(f"{unknown(name, catalogue)}, or your own package.module:attribute")
        return names

    return AfterValidator(check)


class Allow(Options):
    """What a node allows. Null allows every entry that comes with fedsim; modules of others must be listed.

    `max_parameters` bounds a network's parameters and buffers, and separately a teacher's; `max_bytes` a message;
    `max_augmentation` each whole number in an augmentation. `max_disk` bounds the files of all runs together,
    `max_new_runs` the runs that begin in a day (with 0 the node takes part only in those that it has joined),
    `max_states` the checkpoints that a run may have the node keep states for. The others bound options of `local`.
    """

    strategies: Annotated[list[str], _known(STRATEGIES)] | None = None
    models: Annotated[list[str], _known(MODELS)] | None = None
    losses: Annotated[list[str], _known(LOSSES)] | None = None
    schedules: Annotated[list[str], _known(SCHEDULES)] | None = None
    augmentations: Annotated[list[str], _known(AUGMENTATIONS)] | None = None
    max_epochs: Count = 1000
    max_steps: Count = 1_000_000
    max_batch_size: Count = 2**16
    max_augmentation: Count = 1000
    max_parameters: Count = 2_000_000_000
    max_bytes: Annotated[ByteSize, Ge(1)] = ByteSize(16 * 2**30)
    max_disk: Annotated[ByteSize, Ge(1)] = ByteSize(32 * 2**30)
    max_new_runs: Annotated[int, Ge(0)] = 100  # a day, by UTC
    max_states: Count = 1000

    def check_names(self, plan: Plan) -> None:
        """Raise ConfigError where a plan names what is not allowed; nothing is imported for it."""
        lists = {catalogue: getattr(self, name) for name, catalogue in self._lists()}
        for at, spec, catalogue in _named(plan):
            _check_name(at, spec, catalogue, lists[catalogue])
        for at, spec in _networks(plan):
            if opened := [key for key in FILES if spec.get(key) not in (None, False)]:
                raise ConfigError(
                    f"{at}.{opened[0]}: should be left out: a plan may not open files, weights are sent"
                )
        distillation = plan.local.get("distillation")
        if distillation and distillation.get("teacher") not in ("global", SENT):
            raise ConfigError(f"local.distillation.teacher: allowed: global, {SENT}; a plan may not open files")
        for at, module in _modules(plan):
            if plan.own.get(module) not in (None, source(module)):
                raise ConfigError(
                    f"{at}: the file of {module} differs from the server's; copy the same file to both machines"
                )

    def check_importable(self) -> None:
        """Raise ConfigError if a listed module cannot be imported, or has no such entry."""
        for name, catalogue in self._lists():
            for entry in getattr(self, name) or ():
                catalogue.load(entry, f"allow.{name}")

    @staticmethod
    def _lists() -> list[tuple[str, Catalogue]]:
        return [
            ("strategies", STRATEGIES),
            ("models", MODELS),
            ("losses", LOSSES),
            ("schedules", SCHEDULES),
            ("augmentations", AUGMENTATIONS),
        ]

    def check_numbers(self, plan: Plan, sent: State) -> None:
        """Raise ConfigError if a plan, whose names are allowed, has numbers that are not.

        `sent` has the weights that come with it; a larger network is not built.
        """
        options: Any = recipe_options(plan.local)
        for name in ("epochs", "steps", "batch_size"):
            value, most = getattr(options, name), getattr(self, f"max_{name}")
            if isinstance(value, int) and value > most:
                raise ConfigError(f"local.{name}: is {value:,}; allowed on this node: up to {most:,}")
        for i, spec in enumerate(plan.local["augment"]):
            for name, value in spec.items():
                if isinstance(value, int) and value > self.max_augmentation:
                    most = f"allowed on this node: up to {self.max_augmentation:,}"
                    raise ConfigError(f"local.augment[{i}].{name}: is {value:,}; {most}")
        most = sum(value.numel() for value in sent.values())
        for at, spec in _networks(plan):
            self._check_size(at, spec, plan.examples, most)

    def check_bytes(self, state: State) -> None:
        """Raise ConfigError if a message is too large."""
        if (size := sum(value.nbytes for value in state.values())) > self.max_bytes:
            raise ConfigError(f"message: has {size:,} bytes; allowed on this node: up to {self.max_bytes:,}")

    def _check_size(self, at: str, spec: Spec, examples: Examples, sent: int) -> None:
        """Raise ConfigError if a network is too large, before memory is allocated for it."""
        try:
            with torch.device("meta"):
                network = models.make(spec, examples.shape, examples.classes, at)
        except ConfigError:
            raise
        except Exception as error:
            if (
                ":" in spec["name"]
            ):  # a listed model of the owner's, which may compute with its weights when it is built
                return
            raise ConfigError(f"{at}: cannot be built here: {located(error)}") from error
        tensors: Iterator[Tensor] = chain(network.parameters(), network.buffers())
        if (size := sum(tensor.numel() for tensor in tensors)) > self.max_parameters:
            most = f"allowed on this node: up to {self.max_parameters:,}"
            raise ConfigError(f"{at}: has {size:,} parameters; {most}")
        if (size := sum(value.numel() for value in network.parameters())) > sent:
            raise ConfigError(f"{at}: has {size:,} parameters, and only {sent:,} numbers were sent with the plan")


def _named(plan: Plan) -> Iterator[tuple[str, Any, Catalogue]]:
    """Each place in a plan that names an entry of a catalogue, with the entry and the catalogue."""
    local = plan.local
    yield "strategy", plan.strategy, STRATEGIES
    for at, spec in _networks(plan):
        yield at, spec, MODELS
    yield "local.schedule", local.get("schedule"), SCHEDULES
    yield "local.loss", local.get("loss"), LOSSES
    augment = local.get("augment")
    if not isinstance(augment, list):
        raise ConfigError("local.augment: should be a list")
    for i, spec in enumerate(augment):
        yield f"local.augment[{i}]", spec, AUGMENTATIONS


def _modules(plan: Plan) -> Iterator[tuple[str, str]]:
    """The modules besides fedsim's that a plan, whose names are allowed, imports, and where it names them."""
    for at, spec, _ in _named(plan):
        while spec:
            module, colon, _ = spec["name"].partition(":")
            if colon:
                yield f"{at}.name", module
            at, spec = f"{at}.inner", spec.get("inner")


def _networks(plan: Plan) -> Iterator[tuple[str, Any]]:
    """Each place in a plan that has a model, with the model."""
    yield "model", plan.model
    distillation = plan.local.get("distillation")
    if distillation is not None and not isinstance(distillation, dict):
        raise ConfigError("local.distillation: should be a mapping")
    if distillation and distillation.get("model") is not None:
        yield "local.distillation.model", distillation["model"]


def _check_name(at: str, spec: Any, catalogue: Catalogue, names: list[str] | None) -> None:
    if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
        raise ConfigError(f"{at}: should be a mapping with a name, such as {{name: {next(iter(catalogue))}}}")
    allowed = list(catalogue) if names is None else names
    if spec["name"] not in allowed:
        raise ConfigError(f"{at}.name: on this node {unknown(spec['name'][:80], allowed)}")
    if "inner" in spec:
        _check_name(f"{at}.inner", spec["inner"], catalogue, names)
