"""Names for callables: what `{name: ..., option: ...}` in a config means.

A catalogue maps each name to "module:attribute", which is imported when it is first needed. The options that a
config may set are the keyword-only parameters of that callable: their annotations say which values are allowed,
and their defaults are the defaults of the config. The engine passes the positional parameters. An option called
`inner` is itself an entry of the same catalogue.

Everywhere below, `at` is the path of the key in the config, such as data.partition; error messages begin with it.
"""

import difflib
import importlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from inspect import isfunction
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from pydantic import BaseModel, ByteSize, ConfigDict, ValidationError, create_model, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticSerializationError

from fedsim.base.files import uninterrupted
from fedsim.base.own_code import before_import, is_unread
from fedsim.errors import ConfigError, WrongReturnError, border, is_own, name_of, one_line

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Spec = dict[str, Any]  # {"name": ..., **options}
Schema = TypeVar("Schema", bound=BaseModel)
Product = TypeVar("Product")

TYPE_NAMES = {  # as error messages and `fedsim list` call them
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    dict: "a mapping",
    Path: "a path",
    ByteSize: "a size such as 2GiB",
    NoneType: "null",
    Any: "anything",
}
BOUND_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
MAX_NAMES_LENGTH = 300  # characters of a list of a catalogue's names in an error message; keys are all listed
MAX_VALUE_LENGTH = 60  # characters of a wrong value in an error message


class UnknownKeyError(ConfigError):
    """A key that does not exist. `parent` is the key above it, "" at the top; `allowed` are the keys there."""

    def __init__(self, parent: str, name: str, allowed: Iterable[str]):
        self.parent, self.name, self.allowed = parent, name, [*allowed]
        super().__init__(self.message(nearest(name, self.allowed)))

    def message(self, meant: Sequence[str]) -> str:
        """The error in one line, where the user may have meant one of these keys."""
        key = f"{self.parent}.{self.name}".lstrip(".")
        return f"{key}: {self.name!r} is unknown; {_question(meant)}allowed: {', '.join(self.allowed) or 'none'}"


class Catalogue:
    """The named entries of one package; `package.module:attribute` reaches any other callable.

    `kind` is the config key that names an entry, such as data.partition.
    """

    def __init__(self, kind: str, package: str, entries: Mapping[str, str]):
        self.kind, self.package, self.entries = kind, package, dict(entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def load(self, name: str, at: str = "") -> Callable[..., Any]:
        """The callable that `name` stands for; raises ConfigError with the nearest valid name."""
        at = at or f"{self.kind}.name"
        module, _, attribute = self.entries.get(name, name).partition(":")
        if name in self.entries:
            return _attribute(importlib.import_module(f"{self.package}.{module}"), attribute, at)
        if not (attribute and all(part.isidentifier() for part in module.split("."))):
            raise ConfigError(f"{at}: {unknown(name, self.entries)}, or your own package.module:attribute")
        before_import(module, name, at)
        with border(f"{at}: {name}", ConfigError):
            try:
                return _attribute(importlib.import_module(module), attribute, at)
            except ModuleNotFoundError as error:
                if not f"{module}.".startswith(f"{error.name}."):
                    raise  # the user's module exists, but imports one that does not
                way = "is its folder on PYTHONPATH? In that folder: PYTHONPATH=. fedsim ..."
                if module.endswith(".py"):
                    way = f"write {module.removesuffix('.py')}:{attribute}"
                raise ConfigError(f"{at}: there is no module {module!r}; {way}") from error

    def options(self, name: str, at: str = "") -> "type[Options]":
        """The schema of an entry's options; raises ConfigError, as annotations and defaults may be the user's."""
        at = at or f"{self.kind}.name"
        if is_unread() and ":" in name:
            return AnyOptions
        target = self.load(name, at)
        with border(f"{at}: {name}", ConfigError):
            return options_of(target)

    def resolve(self, spec: object, at: str = "", also: type["Options"] | None = None) -> Spec:
        """`spec`, which may be a bare name, with all defaults filled in; raises ConfigError naming the wrong key.

        `also` is a schema of further options in the same mapping. Where the entry has an option of the same name,
        the entry's own rules apply.
        """
        at = at or self.kind
        spec = {"name": spec} if isinstance(spec, str) else spec
        if not isinstance(spec, Mapping):
            example = f"{{name: {next(iter(self))}}}"
            raise ConfigError(f"{at}: {_json_excerpt(spec)} should be a mapping such as {example}")
        if "name" not in spec:
            raise ConfigError(f"{at}.name: missing; allowed: {', '.join(self)}")
        if not isinstance(spec["name"], str):
            raise ConfigError(
                f"{at}.name: {_json_excerpt(spec['name'])} should be a string; allowed: {', '.join(self)}"
            )
        options = dict(spec)
        if "inner" in options:
            options["inner"] = self.resolve(options["inner"], f"{at}.inner")
        own = self.options(spec["name"], f"{at}.name")
        if "name" in own.model_fields:
            taken = "has an option called name, which no config can set; rename it"
            raise ConfigError(f"{at}.name: {spec['name']} {taken}")
        bases = (own, also) if also else (own,)
        if own is AnyOptions:  # the last base says whether unknown keys are allowed
            bases = bases[::-1]
        schema = _schema(bases, name=(str, ...))  # so that errors list `name`, too
        values = validated(schema, options, at)
        with border(f"{at}.name: {spec['name']}", ConfigError):
            return {"name": spec["name"]} | _written(values)

    def bind(self, spec: object, at: str = "", product: type = object) -> Callable[..., Any]:
        """The callable of `spec` with its options set; the engine will pass the positional arguments.

        It makes a `product`, and so does the entry that its option `inner` names.
        """
        at = at or self.kind
        options = self.resolve(spec, at)
        target = self.load(options.pop("name"), f"{at}.name")
        schema = options_of(target)
        settings = dict(iter(validated(schema, options, at)))  # iter: an option may be called keys
        if "inner" in settings:
            settings["inner"] = self.make(settings["inner"], product, at=f"{at}.inner")
        return partial(target, **settings)

    def make(self, spec: object, expected: type[Product], *arguments: object, at: str = "") -> Product:
        """Calls `bind(spec)` with `arguments`; raises ConfigError unless the result is of the type `expected`."""
        make, name = self.bind(spec, at, expected), self.resolve(spec, at)["name"]
        at = f"{at or self.kind}.name: {name}"
        try:
            inspect.signature(make).bind(*arguments)
        except TypeError as error:
            raise ConfigError(
                f"{at} does not take the arguments with which fedsim makes a {expected.__name__}: {error}"
            ) from None
        key = at.partition(".")[0]
        with border(at, ConfigError, lambda error: name in self.entries):
            try:
                product = make(*arguments)
            except ConfigError as error:
                if name in self.entries or str(error).startswith(key):
                    raise
                raise ConfigError(f"{at}: {error}") from error
        if not isinstance(product, expected):
            returned = f"an object of type {type(product).__name__}"
            raise ConfigError(f"{at} returned {returned}; it should return a {expected.__name__}")
        return product

    def summary(self, name: str) -> str:
        """The first line of the entry's docstring."""
        return (inspect.getdoc(self.load(name)) or "").partition("\n")[0]


class Options(BaseModel):
    """A schema that refuses unknown keys, infinity, NaN, and whole numbers of more than 64 bits."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True, frozen=True)

    @field_validator("*")
    @classmethod
    def _has_64_bits(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError(f"{_json_excerpt(value)} should be smaller than 2^63")
        return value


class AnyOptions(Options):
    """The schema of an entry that is not looked up."""

    model_config = ConfigDict(extra="allow")


@cache
def options_of(target: Callable[..., Any]) -> type[Options]:
    """The schema of a callable's keyword-only parameters."""
    annotated: Any = target
    while isinstance(annotated, partial):
        annotated = annotated.func
    if isinstance(annotated, type):
        annotated = vars(annotated).get("__init__", annotated)
    elif not inspect.isroutine(annotated):  # an object that can be called
        annotated = type(annotated).__call__
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:
        raise ConfigError(
            f"{name_of(target)}: cannot be configured, because Python cannot inspect its parameters"
        ) from None
    hints = get_type_hints(annotated, include_extras=True)
    fields: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[name] = (Spec | str if name == "inner" else hints.get(name, Any), default)
    return _schema((Options,), **fields)


@cache
def combined(*schemas: type[Options]) -> type[Options]:
    """A schema with the options of all; of two options with one name, the first one's rules apply."""
    return _schema(schemas)


def _schema(bases: tuple[type[Options], ...], **fields: Any) -> type[Options]:
    """A schema with these fields besides those of its bases.

    Signals wait until it is built: pydantic's core would make a SchemaError of a KeyboardInterrupt.
    """
    with uninterrupted():
        return create_model("Options", __base__=bases, **fields)


def validated(schema: type[Schema], values: Mapping[str, Any], at: str = "") -> Schema:
    """An instance of `schema` made from `values`; raises ConfigError naming the first wrong key.

    `values` are validated as JSON, because pydantic's strict mode for JSON has the rules that a YAML file needs:
    a string is no number and a boolean no integer, but a list becomes a tuple and a string a path.
    """
    try:
        text = json.dumps(values, default=lambda v: v.item() if isinstance(v, np.generic) else str(v))
    except (TypeError, ValueError, RecursionError) as error:  # a key is a date, or a value contains itself
        raise ConfigError(f"{at or 'config'}: {error}") from None
    try:
        return schema.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise _first_error(error, schema, values, at) from None


def _written(options: Options) -> Spec:
    """Options as a config holds them; raises WrongReturnError naming one that it cannot hold."""
    try:
        return options.model_dump(mode="json")
    except PydanticSerializationError:
        for name, _ in options:
            try:
                options.model_dump(mode="json", include={name})
            except PydanticSerializationError as error:
                variable = f"declare a variable of the class as `{name}: ClassVar = ...`"
                raise WrongReturnError(f"option {name}: {one_line(error)}; {variable}") from None
        raise


def nearest(name: str, allowed: Iterable[str], similar: float = 0.6) -> list[str]:
    """The one of `allowed` that `name` may be a misspelling of, or none; at least `similar` of it is the same."""
    return difflib.get_close_matches(name, [*allowed], n=1, cutoff=similar)


def check_methods(thing: object, base: type, at: str, more: Mapping[str, str] = {}) -> None:
    """Raise ConfigError where a user's class misspells a method or class variable of `base`.

    Or where it takes other arguments in a method. `more` names, by method, one that it may take besides.
    """
    kind, methods = type(thing), _public_methods(base)
    own = {name: method for name in methods if is_own(method := getattr(thing, name))}
    for name, method in own.items():
        _, *arguments = inspect.signature(methods[name]).parameters
        besides = {more[name]: None} if name in more and asks(method, more[name]) else {}
        try:
            inspect.signature(method).bind(*arguments, **besides)
        except TypeError as error:
            taken = f"{kind.__name__}.{name} does not take the arguments ({', '.join(arguments)})"
            raise ConfigError(f"{at}: {taken}: {error}") from None
    for part in filter(is_own, kind.__mro__):
        for name in vars(part) if issubclass(part, base) else ():
            near = nearest(name, methods.keys() - vars(part).keys(), 0.85)
            if near and name in _public_methods(part) and not hasattr(base, name):
                wrong = f"{part.__name__}.{name} is never called; did you mean {near[0]!r}?"
                way = "begin the name of a method of your own with _"
                raise ConfigError(f"{at}: {wrong} The methods are {', '.join(methods)}; {way}")
            near = nearest(name, _class_variables(base) - vars(part).keys(), 0.85)
            if near and name in _class_variables(part) and not hasattr(base, name):
                raise ConfigError(f"{at}: {part.__name__}.{name} is never read; did you mean {near[0]!r}?")


def asks(function: Callable[..., object], parameter: str) -> bool:
    """Whether a function has this parameter, and so is given it."""
    return parameter in inspect.signature(function).parameters


def _public_methods(kind: type) -> dict[str, Callable[..., Any]]:
    return {name: value for name, value in vars(kind).items() if isfunction(value) and name[0] != "_"}


def _class_variables(kind: type) -> set[str]:
    """The names of the variables of the class itself, which are no options."""
    options = {option.name for option in fields(kind)} if is_dataclass(kind) else set[str]()
    plain = {name for name, value in vars(kind).items() if not callable(value)}
    return {name for name in (*plain, *vars(kind).get("__annotations__", {})) if name[0] != "_"} - options


def unknown(name: str, allowed: Iterable[str]) -> str:
    """The message that `name` is not among `allowed`, with the nearest allowed name."""
    names = list(allowed)
    all_names = ", ".join(names)
    if len(all_names) > MAX_NAMES_LENGTH:
        first = all_names[:MAX_NAMES_LENGTH].rpartition(", ")[0]
        all_names = f"{first}, ... ({len(names)} in all, `fedsim list` shows them)"
    return f"{name!r} is unknown; {_question(nearest(name, names))}allowed: {all_names or 'none'}"


def matching(names: Iterable[str], patterns: Iterable[str], at: str) -> set[str]:
    """The `names` that match one of `patterns`, such as fc*; raises ConfigError where a pattern matches none."""
    names, found = list(names), set[str]()
    for pattern in patterns:
        if not (matches := {name for name in names if fnmatchcase(name, pattern)}):
            shown = names if len(names) <= 6 else [*names[:3], "...", *names[-2:]]
            raise ConfigError(f"{at}: {pattern!r} matches none of {', '.join(shown)}")
        found |= matches
    return found


def _attribute(module: Any, attribute: str, at: str) -> Callable[..., Any]:
    found = getattr(module, attribute, None)
    if not callable(found):
        raise ConfigError(f"{at}: {module.__name__} has no callable {attribute!r}")
    return found  # type: ignore[no-any-return]


def allowed(field: FieldInfo) -> str:
    """The allowed values of a schema's field, in words: "a whole number >= 1, or full"."""
    return _describe(field.annotation, field.metadata)


def _describe(kind: Any, bounds: Iterable[Any] = ()) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _describe(parts[0], parts[1:])
    if origin in (Union, UnionType):
        return ", or ".join(map(_describe, parts))
    if origin is Literal:
        return " or ".join(filter(None, [", ".join(map(str, parts[:-1])), str(parts[-1])]))
    if origin in (list, tuple):
        length = "" if origin is list or parts[-1] is ... else f" of {len(parts)}"
        return f"a list{length}, each {' or '.join(dict.fromkeys(_describe(p) for p in parts if p is not ...))}"
    if origin is dict and parts[1] is not Any:
        return f"a mapping, each value {_describe(parts[1])}"
    class_name = "a mapping" if _is_schema(kind) else getattr(kind, "__name__", str(kind))
    base = TYPE_NAMES.get(origin or kind) or class_name
    limits = [f"{sign} {getattr(b, key)}" for b in bounds for key, sign in BOUND_SIGNS.items() if hasattr(b, key)]
    return " ".join(filter(None, [base, " and ".join(limits)]))


def _is_schema(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _schema_in(kind: Any) -> Any:
    """The schema in an annotation such as `Schema | None`; any other annotation as it is."""
    return next((part for part in get_args(kind) if _is_schema(part)), kind)


def _first_error(error: ValidationError, schema: Any, values: Any, at: str) -> ConfigError:
    """The first error in one line, or all keys that are missing.

    Unknown keys come first, as a misspelt key explains why another is missing.
    """
    errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    found = [_described_error(each, schema, values, at) for each in errors]
    missing = [str(each) for each, about in zip(found, errors, strict=True) if about["type"] == "missing"]
    return ConfigError("; ".join(missing)) if errors[0]["type"] == "missing" else found[0]


def _described_error(error: "ErrorDetails", schema: Any, values: Any, at: str) -> ConfigError:
    key, kind, field = at, schema, FieldInfo()
    for part in map(str, error["loc"]):
        if not _is_schema(kind):
            break  # the error is inside a list or mapping, which is shown as a whole
        parent, key, fields = key, f"{key}.{part}".lstrip("."), kind.model_fields
        if part not in fields:
            return UnknownKeyError(parent, part, fields)
        field = fields[part]
        if part not in values:
            example = f", such as {field.examples[0]}" if field.examples else ""
            return ConfigError(f"{key}: missing; it should be {allowed(field)}{example}")
        kind, values = _schema_in(field.annotation), values[part]
    if error["type"] == "value_error":  # the message of a validator of our own
        return ConfigError(f"{key}: {error['ctx']['error']}")
    finite = "finite, " if error["type"] == "finite_number" else ""
    return ConfigError(f"{key}: {_json_excerpt(values)} should be {finite}{allowed(field)}")


def _question(meant: Sequence[str]) -> str:
    return f"did you mean {' or '.join(map(repr, meant))}? " if meant else ""


def _json_excerpt(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[: MAX_VALUE_LENGTH - 3]}..."
