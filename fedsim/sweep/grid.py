"""The grid of a sweep: which settings take which values, and a readable name for each combination."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, Self

from fedsim.base.reading import parse
from fedsim.errors import ConfigError

MAX_POINTS = 10_000
MAX_KEYS = 100  # of several values each
MAX_NAME_LENGTH = 160  # characters; a point's name is a folder's
RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
OPENING, CLOSING, QUOTES = "[{(", "]})", "\"'"

Point = dict[str, Any]  # a value for each swept key, dotted


@dataclass(frozen=True)
class Grid:
    """All combinations of `axes`, each a dotted key with its values, over the overrides `fixed`."""

    axes: dict[str, list[Any]]
    fixed: dict[str, Any]

    @property
    def points(self) -> list[Point]:
        """The combinations, the last key's values changing fastest."""
        return [dict(zip(self.axes, values, strict=True)) for values in product(*self.axes.values())]

    @property
    def names(self) -> list[str]:
        """A name for each point, such as lr=0.1,seed=2, that is good for a folder; no two are the same."""
        short = short_keys(self.axes)
        axes = [[_part(short[key], value) for value in values] for key, values in self.axes.items()]
        shown = [",".join(parts).strip("-.")[:MAX_NAME_LENGTH] for parts in product(*axes)]
        if len(set(shown)) < len(shown):
            shown = [f"{number}-{name}" for number, name in enumerate(shown, 1)]
        return shown

    def checked(self) -> Self:
        """Itself; raises ConfigError where it has too many points, or keys."""
        if len(self.axes) > MAX_KEYS:
            raise ConfigError(f"sweep: {len(self.axes):,} keys have several values; allowed: {MAX_KEYS}")
        if (size := prod(map(len, self.axes.values()))) > MAX_POINTS:
            raise ConfigError(f"sweep: {size:,} points; at most {MAX_POINTS:,} are allowed")
        return self


def parse_grid(pairs: Sequence[str]) -> Grid:
    """`["local.lr=0.05,0.1", "seed=0..4"]`; a key with one value is an override. Raises ConfigError.

    Values are YAML; a comma inside brackets or quotes is part of a value, and 0..4 means the numbers from 0 to 4.
    """
    axes, fixed = dict[str, list[Any]](), dict[str, Any]()
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not (all(key.split(".")) and equals):
            raise ConfigError(f"{pair!r} should be KEY=VALUE or KEY=V1,V2,..., such as local.lr=0.05,0.1")
        if key in axes or key in fixed:
            raise ConfigError(f"{key}: is given twice; give all its values at once, as {key}=V1,V2")
        values = [value for part in _separated(text) for value in _values(part, key, alone=part == text)]
        if len(values) == 1:
            fixed[key] = values[0]
        else:
            axes[key] = values
    for key, values in axes.items():
        if again := [shown for shown, times in Counter(map(_shown, values)).items() if times > 1]:
            raise ConfigError(f"{key}: {again[0]} is given twice")
    _check_overlap([*axes, *fixed], axes)
    if not axes:
        raise ConfigError("sweep: no key has several values, such as local.lr=0.05,0.1; fedsim run does one run")
    return Grid(axes, fixed).checked()


def short_keys(keys: Sequence[str] | Mapping[str, Any]) -> dict[str, str]:
    """Each dotted key with as many of its last parts as distinguish it from the others."""
    parts = {key: key.split(".") for key in keys}

    def short(key: str) -> str:
        for count in range(1, len(parts[key])):
            tail = parts[key][-count:]
            if all(other[-count:] != tail for name, other in parts.items() if name != key):
                return ".".join(tail)
        return key

    return {key: short(key) for key in keys}


def shown_value(value: Any) -> str:
    """A value in a table or a name: a text as it is, anything else as YAML in one line."""
    return value if isinstance(value, str) else _shown(value)


def _separated(text: str) -> list[str]:
    """The parts between the commas that are outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if letter == "," and not depth and not quote:
            parts.append("")
            continue
        parts[-1] += letter
        if quote:
            quote = "" if letter == quote else quote
        elif letter in QUOTES and (depth or not parts[-1][:-1].strip()):  # within a word it is an apostrophe
            quote = letter
        depth += (letter in OPENING) - (letter in CLOSING) if not quote else 0
    return parts


def _values(part: str, key: str, alone: bool) -> list[Any]:
    if not part.strip():
        where = "after =; null is one" if alone else "between commas"
        raise ConfigError(f"{key}: a value is missing {where}")
    if ends := RANGE.fullmatch(part.strip()):
        first, last = map(int, ends.groups())
        if not first <= last < first + MAX_POINTS:
            raise ConfigError(f"{key}: {part.strip()} should go up, and hold at most {MAX_POINTS:,} numbers")
        return list(range(first, last + 1))
    return [parse(part, f"{key}: {part!r}")]


def _check_overlap(keys: Sequence[str], axes: Mapping[str, Any]) -> None:
    """Refuse a key below a swept one: strategy=a,b with strategy.mu=0,1 is ambiguous."""
    for key in keys:
        for above in axes:
            if key in axes and key.startswith(f"{above}."):
                way = f"sweep one of them, or give {above} mappings as values"
                raise ConfigError(f"{key}: {above} is swept too; {way}")


def _part(key: str, value: Any) -> str:
    """What a point's name says of one key; cut, for a value may be as long as a file."""
    return re.sub(r"[^\w.,=+\[\]:-]+", "-", f"{key}={shown_value(value)}")[: MAX_NAME_LENGTH + 1]


def _shown(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False).replace('"', "")
