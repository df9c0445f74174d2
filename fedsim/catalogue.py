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
from functools import cache, partial
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from fedsim.errors import ConfigError

Spec = dict[str, Any]  # {"name": ..., **options}
Schema = TypeVar("Schema", bound=BaseModel)


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
        if not attribute:
            raise ConfigError(f"{at}: {unknown(name, self.entries)}, or your own package.module:attribute")
        try:
            return _attribute(importlib.import_module(module), attribute, at)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                raise  # the user's module is there, and imports one that is not
            raise ConfigError(f"{at}: no module {module!r}; is its folder on PYTHONPATH?") from error

    def resolve(self, spec: object, at: str = "") -> Spec:
        """`spec`, or a bare name, with its defaults filled in; raises ConfigError naming the key."""
        at = at or self.kind
        spec = {"name": spec} if isinstance(spec, str) else spec
        if not isinstance(spec, Mapping):
            raise ConfigError(f"{at}: {spec!r} should be a mapping such as {{name: {next(iter(self))}}}")
        if not isinstance(spec.get("name"), str):
            raise ConfigError(f"{at}.name: missing; allowed: {', '.join(self)}")
        options = {key: value for key, value in spec.items() if key != "name"}
        if "inner" in options:
            options["inner"] = self.resolve(options["inner"], f"{at}.inner")
        schema = options_of(self.load(spec["name"], f"{at}.name"))
        return {"name": spec["name"]} | validated(schema, options, at).model_dump(mode="json")

    def bind(self, spec: object, at: str = "") -> Callable[..., Any]:
        """The callable of `spec` with its options set; the engine gives the positional arguments."""
        options = self.resolve(spec, at)
        target = self.load(options.pop("name"))
        settings = dict(validated(options_of(target), options, at))
        if "inner" in settings:
            settings["inner"] = self.bind(settings["inner"])()
        return partial(target, **settings)

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
    hints = get_type_hints(annotated, include_extras=True)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[name] = (Spec if name == "inner" else hints.get(name, Any), default)
    return create_model("Options", __base__=Options, **fields)


def validated(schema: type[Schema], values: Mapping[str, Any], at: str = "") -> Schema:
    """`values` as `schema` has it; raises ConfigError with the first key that is wrong.

    By way of JSON, whose strict mode is what a YAML file needs: no number from a text, no count from a
    truth value, but a tuple from a list and a path from a text.
    """
    try:
        return schema.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(_one_line(error, schema, values, at)) from None


def unknown(name: str, allowed: Iterable[str]) -> str:
    """Says that `name` is none of `allowed`, and which it may have meant."""
    names = list(allowed)
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"{name!r} is unknown; {hint}allowed: {', '.join(names) or 'none'}"


def _attribute(module: Any, attribute: str, at: str) -> Callable[..., Any]:
    found = getattr(module, attribute, None)
    if not callable(found):
        raise ConfigError(f"{at}: {module.__name__} has no callable {attribute!r}")
    return found  # type: ignore[no-any-return]


def _one_line(error: ValidationError, schema: type[BaseModel], values: Mapping[str, Any], at: str) -> str:
    first, *others = error.errors()
    path, value = _locate(first["loc"], values)
    key = ".".join([at, *path] if at else path)
    if first["type"] == "extra_forbidden":
        return f"{key}: {unknown(path[-1], _fields(schema, path[:-1]))}"
    if first["type"] == "missing":
        return f"{'.'.join([key, str(first['loc'][-1])])}: missing"
    wanted = [first["msg"]] + [e["msg"] for e in others if _locate(e["loc"], values)[0] == path]
    rules = (message.removeprefix("Input ").removeprefix("Value error, ") for message in wanted)
    return f"{key}: {value!r} {', or '.join(rules)}"


def _locate(loc: tuple[int | str, ...], values: Any) -> tuple[list[str], Any]:
    """The part of an error's location that stands in the input, and the value there."""
    path: list[str] = []
    for part in loc:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            break  # the name of a branch of a union, or of a key that is missing
        path.append(str(part))
    return path, values


def _fields(schema: Any, path: list[str]) -> list[str]:
    for part in path:
        schema = schema.model_fields[part].annotation
    return list(schema.model_fields)
