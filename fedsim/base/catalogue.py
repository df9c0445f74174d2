"""Names for callables: what `{name: ..., option: ...}` in a config means.

A catalogue maps a name to "module:attribute", imported when first asked for. The keyword-only parameters
of the callable are the options a config may set: annotations are the rules, defaults the defaults. Its
positional parameters are given by the engine. An option called `inner` is an entry of the same catalogue.
"""

import difflib
import importlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from pydantic import BaseModel, ByteSize, ConfigDict, ValidationError, create_model
from pydantic.fields import FieldInfo

from fedsim.base.files import uninterrupted
from fedsim.errors import ConfigError

Spec = dict[str, Any]  # {"name": ..., **options}
Schema = TypeVar("Schema", bound=BaseModel)
Made = TypeVar("Made")

WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    dict: "a mapping",
    Path: "a path",
    ByteSize: "a size such as 2GiB",
    NoneType: "null",
    Any: "anything",
}
MOST_NAMES = 300  # characters of a list of names that are allowed
SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


class Catalogue:
    """The entries of one folder, and whatever else `package.module:attribute` reaches."""

    def __init__(self, kind: str, package: str, entries: Mapping[str, str]):
        self.kind, self.package, self.entries = kind, package, dict(entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def load(self, name: str, at: str = "") -> Callable[..., Any]:
        """The callable behind `name`; raises ConfigError with the nearest valid name."""
        at = at or f"{self.kind}.name"
        module, _, attribute = self.entries.get(name, name).partition(":")
        if name in self.entries:
            return _attribute(importlib.import_module(f"{self.package}.{module}"), attribute, at)
        if not (attribute and all(part.isidentifier() for part in module.split("."))):
            raise ConfigError(f"{at}: {unknown(name, self.entries)}, or your own package.module:attribute")
        try:
            return _attribute(importlib.import_module(module), attribute, at)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                raise  # the user's module is there, and imports one that is not
            raise ConfigError(f"{at}: no module {module!r}; is its folder on PYTHONPATH?") from error

    def resolve(self, spec: object, at: str = "", also: type["Options"] | None = None) -> Spec:
        """`spec`, or a bare name, with its defaults filled in; raises ConfigError naming the key.

        `also` has options that stand in the same mapping; where the entry has one of that name, it is the entry's.
        """
        at = at or self.kind
        spec = {"name": spec} if isinstance(spec, str) else spec
        if not isinstance(spec, Mapping):
            raise ConfigError(f"{at}: {_shown(spec)} should be a mapping such as {{name: {next(iter(self))}}}")
        if not isinstance(spec.get("name"), str):
            raise ConfigError(f"{at}.name: missing; allowed: {', '.join(self)}")
        options = {key: value for key, value in spec.items() if key != "name"}
        if "inner" in options:
            options["inner"] = self.resolve(options["inner"], f"{at}.inner")
        schema = options_of(self.load(spec["name"], f"{at}.name"))
        if also:
            schema = _schema((schema, also))
        return {"name": spec["name"]} | validated(schema, options, at).model_dump(mode="json")

    def bind(self, spec: object, at: str = "") -> Callable[..., Any]:
        """The callable of `spec` with its options set; the engine gives the positional arguments."""
        options = self.resolve(spec, at)
        target = self.load(options.pop("name"))
        settings = dict(iter(validated(options_of(target), options, at)))  # iter: an option may be called keys
        if "inner" in settings:
            settings["inner"] = self.bind(settings["inner"])()
        return partial(target, **settings)

    def make(self, spec: object, gives: type[Made], *given: object, at: str = "") -> Made:
        """What the callable of `spec` returns; raises ConfigError where it is of another kind."""
        at, make = f"{at or self.kind}.name: {self.resolve(spec, at)['name']}", self.bind(spec, at)
        try:
            inspect.signature(make).bind(*given)
        except TypeError as error:
            raise ConfigError(f"{at} cannot be called as a {gives.__name__} is made: {error}") from None
        made = make(*given)
        if not isinstance(made, gives):
            raise ConfigError(f"{at} gives a {type(made).__name__}; it should give a {gives.__name__}")
        return made

    def summary(self, name: str) -> str:
        """The first line of the entry's docstring."""
        return (inspect.getdoc(self.load(name)) or "").partition("\n")[0]


class Options(BaseModel):
    """A schema that refuses unknown keys and numbers that are none."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True, frozen=True)


@cache
def options_of(target: Callable[..., Any]) -> type[Options]:
    """The schema of a callable's keyword-only parameters."""
    annotated: Any = vars(target).get("__init__", target) if isinstance(target, type) else target
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:
        raise ConfigError(
            f"{target.__name__}: cannot be configured, for it does not tell its parameters"
        ) from None
    hints = get_type_hints(annotated, include_extras=True)
    fields: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[name] = (Spec | str if name == "inner" else hints.get(name, Any), default)
    return _schema((Options,), **fields)


def _schema(bases: tuple[type[Options], ...], **fields: Any) -> type[Options]:
    """A schema with these fields besides those of its bases.

    Signals wait until it is built: pydantic's core would make a SchemaError of a KeyboardInterrupt.
    """
    with uninterrupted():
        return create_model("Options", __base__=bases, **fields)


def validated(schema: type[Schema], values: Mapping[str, Any], at: str = "") -> Schema:
    """`values` as `schema` has it; raises ConfigError with the first key that is wrong.

    By way of JSON, whose strict mode is what a YAML file needs: no number from a text, no count from a
    truth value, but a tuple from a list and a path from a text.
    """
    try:
        text = json.dumps(values, default=lambda v: v.item() if isinstance(v, np.generic) else str(v))
    except (TypeError, ValueError, RecursionError) as error:  # a date as a key, or an alias of what it is in
        raise ConfigError(f"{at or 'config'}: {error}") from None
    try:
        return schema.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise ConfigError(_one_line(error, schema, values, at)) from None


def unknown(name: str, allowed: Iterable[str]) -> str:
    """Says that `name` is none of `allowed`, and which it may have meant."""
    names = list(allowed)
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    all_names = ", ".join(names)
    if len(all_names) > MOST_NAMES:
        first = all_names[:MOST_NAMES].rpartition(", ")[0]
        all_names = f"{first}, ... ({len(names)} in all, `fedsim list` shows them)"
    return f"{name!r} is unknown; {hint}allowed: {all_names or 'none'}"


def matching(names: Iterable[str], patterns: Iterable[str], at: str) -> set[str]:
    """Those of `names` that fit one of `patterns`, such as fc*; raises ConfigError where a pattern fits none."""
    names, found = list(names), set[str]()
    for pattern in patterns:
        if not (fits := {name for name in names if fnmatchcase(name, pattern)}):
            shown = names if len(names) <= 6 else [*names[:3], "...", *names[-2:]]
            raise ConfigError(f"{at}: {pattern!r} matches none of {', '.join(shown)}")
        found |= fits
    return found


def _attribute(module: Any, attribute: str, at: str) -> Callable[..., Any]:
    found = getattr(module, attribute, None)
    if not callable(found):
        raise ConfigError(f"{at}: {module.__name__} has no callable {attribute!r}")
    return found  # type: ignore[no-any-return]


def allowed(field: FieldInfo) -> str:
    """What a field of a schema takes, in words: "a whole number >= 1, or full"."""
    return _words(field.annotation, field.metadata)


def _words(kind: Any, bounds: Iterable[Any] = ()) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _words(parts[0], parts[1:])
    if origin in (Union, UnionType):
        return ", or ".join(map(_words, parts))
    if origin is Literal:
        return " or ".join(filter(None, [", ".join(map(str, parts[:-1])), str(parts[-1])]))
    if origin in (list, tuple):
        length = "" if origin is list or parts[-1] is ... else f" of {len(parts)}"
        return f"a list{length}, each {' or '.join(dict.fromkeys(_words(p) for p in parts if p is not ...))}"
    base = WORDS.get(origin or kind) or ("a mapping" if _is_schema(kind) else getattr(kind, "__name__", str(kind)))
    limits = [f"{sign} {getattr(b, name)}" for b in bounds for name, sign in SIGNS.items() if hasattr(b, name)]
    return " ".join(filter(None, [base, " and ".join(limits)]))


def _is_schema(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _schema_in(kind: Any) -> Any:
    """The schema of what is one or null, for it has keys below it."""
    return next((part for part in get_args(kind) if _is_schema(part)), kind)


def _one_line(error: ValidationError, schema: Any, values: Any, at: str) -> str:
    """The first thing that is wrong; but first of all an unknown key, which another may be missing for."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    key, kind, field = at, schema, FieldInfo()
    for part in map(str, first["loc"]):
        if not _is_schema(kind):
            break  # inside a value, which is told as a whole
        key, fields = f"{key}.{part}".lstrip("."), kind.model_fields
        if part not in fields:
            return f"{key}: {unknown(part, fields)}"
        field = fields[part]
        if part not in values:
            return f"{key}: missing; it should be {allowed(field)}"
        kind, values = _schema_in(field.annotation), values[part]
    if first["type"] == "value_error":  # a validator's own words
        return f"{key}: {first['ctx']['error']}"
    finite = "finite, " if first["type"] == "finite_number" else ""
    return f"{key}: {_shown(values)} should be {finite}{allowed(field)}"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
