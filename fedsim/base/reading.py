"""Reads untrusted files, such as configs, as data of a bounded size; errors are one line.

Nothing that is read here is executed or unpickled. A file that the user names may be a symbolic link. What lies in
a folder that may come from elsewhere, such as a run's, may not: a link there could lead anywhere.
"""

import errno
import json
import os
import re
import stat
from collections.abc import Hashable
from io import BufferedReader
from math import isfinite
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fedsim.errors import ConfigError, one_line, printable

MAX_KEY_BYTES = 2**20  # of a certificate, or of a key
MAX_YAML_BYTES = 2**20
MAX_YAML_VALUES = 100_000  # in one file, with its aliases expanded
MAX_YAML_DEPTH = 50
MAX_NUMBER_LENGTH = 1000  # characters; reading a number of base 60 takes time that grows with the square of them
MAX_JSON_VALUES = 2**21  # in one text; each takes up to 60 bytes of memory or more
MAX_INTEGER_LENGTH = 300  # digits in JSON; a float holds 308
CHARACTERS_PER_VALUE = 16  # a string counts as one value more for each so many characters
TOO_DEEP = f"it is nested more than {MAX_YAML_DEPTH} levels deep"
MERGE_TAG = "tag:yaml.org,2002:merge"  # the tag of the key <<


def open_regular(path: str | Path, *, links: bool = False) -> BufferedReader:
    """Open a file to read its bytes; a symbolic link is followed with `links` only.

    Raises OSError for anything but a regular file: reading a pipe may block, and a device may never end.
    """

    def opener(name: str, flags: int) -> int:
        flags |= os.O_NONBLOCK  # or it would wait for the other end of a pipe
        try:
            file = os.open(name, flags if links else flags | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno == errno.ELOOP and os.path.islink(name) and not links:
                error.strerror = "Is a symbolic link"
            raise
        kind = os.fstat(file).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # open() itself refuses a folder
            os.close(file)
            raise OSError(0, "Not a regular file", name)
        return file

    return open(path, "rb", opener=opener)


def read_regular(path: str | Path, most: int, *, links: bool = False) -> bytes:
    """The content of a regular file of at most `most` bytes; raises OSError, for a longer one too."""
    with open_regular(path, links=links) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"is larger than {most} bytes", str(path))
        return file.read(size)  # a file that grows now is read as it was


def read_key(path: str | Path) -> bytes:
    """The content of a file with a certificate or a key; raises OSError, as `read_regular`."""
    return read_regular(path, MAX_KEY_BYTES, links=True)


def read_yaml(path: Path, *, links: bool = True) -> dict[str, Any]:
    """The mapping in a YAML file; raises ConfigError naming the file and the line."""
    at = printable(path)
    try:
        with open_regular(path, links=links) as file:
            content = file.read(MAX_YAML_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: the name contains a zero byte
        raise ConfigError(f"{at}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > MAX_YAML_BYTES:
        raise ConfigError(f"{at}: is larger than the {MAX_YAML_BYTES} bytes that a config may have")
    try:
        values = parse(content.decode("utf-8"), at)
    except UnicodeDecodeError:
        raise ConfigError(f"{at}: is not text in UTF-8") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{at}: should hold a mapping of settings, such as `rounds: 100`")
    return values


def parse_json(content: bytes | str) -> Any:
    """The value of JSON in plain Python values; raises ValueError, in one line.

    Refuses numbers that are not finite or that no float can hold, a depth that YAML may not have either, and too
    many values; they are counted by the characters around them, before memory is taken.
    """
    marks = (",", "[", "{") if isinstance(content, str) else (b",", b"[", b"{")
    if sum(map(content.count, marks)) > MAX_JSON_VALUES:  # type: ignore[arg-type]
        raise ValueError(f"it holds more than {MAX_JSON_VALUES} values")
    try:
        value = json.loads(content, parse_constant=_no_number, parse_int=_integer, parse_float=_finite)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    level: list[Any] = [value]
    for _ in range(MAX_YAML_DEPTH + 1):
        inner = [
            each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)
        ]
        level = [part for parts in inner for part in parts]
    if level:
        raise ValueError(TOO_DEEP)
    return value


def first_fault(error: ValidationError) -> str:
    """The first thing that is wrong with what pydantic was given, and where."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def in_words(error: Exception) -> str:
    """What is wrong with something that was read, in a line."""
    if isinstance(error, ValidationError):
        return one_line(first_fault(error))
    kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
    return kind + one_line(getattr(error, "strerror", None) or error)


def _no_number(text: str) -> float:
    raise ValueError(f"{text[:30]} is no number that JSON has")


def _integer(text: str) -> int:
    if len(text) > MAX_INTEGER_LENGTH:
        raise ValueError(f"{text[:30]}... has more than {MAX_INTEGER_LENGTH} digits")
    return int(text)


def _finite(text: str) -> float:
    return value if isfinite(value := float(text)) else _no_number(text)


def parse(text: str, at: str) -> Any:
    """The value of the YAML `text`, made of plain Python values only; raises ConfigError that begins with `at`."""
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark and "\n" in text.strip() else ""
        raise ConfigError(f"{at}{line}: is not YAML: {one_line(error.problem)}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{at}: is not YAML: {one_line(str(error).splitlines()[0])}") from None
    except RecursionError:
        raise ConfigError(f"{at}: is not YAML: {TOO_DEEP}") from None


class Loader(yaml.SafeLoader):
    """A safe loader that bounds the size, refuses repeated keys, and reads 1e-3 as a number as YAML 1.2 does."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self.size = 0  # values read so far, with aliases expanded
        self.extents = dict[yaml.Node, tuple[int, int]]()  # the size and depth of each node read so far

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse a file that is too large or too deep when its aliases are expanded."""
        alias, before = self.check_event(yaml.AliasEvent), self.size
        node: Any = super().compose_node(parent, index)
        if alias and node not in self.extents:
            raise _refused("a value contains itself", node)
        if alias:
            self.size += self.extents[node][0]
        else:
            self.size += 1 + (len(node.value) // CHARACTERS_PER_VALUE if isinstance(node, yaml.ScalarNode) else 0)
            depth = 1 + max((self.extents[part][1] for part in _children(node)), default=0)
            self.extents[node] = self.size - before, depth
            if depth > MAX_YAML_DEPTH:
                raise _refused(TOO_DEEP, node)
        if self.size > MAX_YAML_VALUES:
            raise _refused(f"it holds more than {MAX_YAML_VALUES} values when its aliases are expanded", node)
        return node  # type: ignore[no-any-return]

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Name the line of a value that does not fit its tag, which SafeLoader does not check."""
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # its text is good enough, such as that of a wrong date
            raise _refused(str(error), node) from None
        except (ArithmeticError, AttributeError, LookupError, TypeError):
            raise _refused(f"{str(node.value)[:60]!r} is not a valid {_type(node)}", node) from None

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        """Refuse a number that takes long to read, a zero byte, and a list or mapping for a single value."""
        if not isinstance(node, yaml.ScalarNode):
            raise _refused(f"a list or mapping cannot be a value of type {_type(node)}", node)
        if _type(node) in ("int", "float") and len(node.value) > MAX_NUMBER_LENGTH:
            raise _refused(f"a number has more than {MAX_NUMBER_LENGTH} characters", node)
        if "\0" in node.value:  # no path, address or name may have one
            raise _refused("a value contains a zero byte", node)
        node.value.encode()  # raises ValueError for a lone surrogate, which UTF-8 cannot encode
        return super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse repeated keys, of which SafeLoader silently keeps the last."""
        keys = set[Any]()
        for key in _keys(node):
            value = self.construct_object(key, deep=True)
            if not isinstance(value, Hashable):
                break  # SafeLoader refuses it
            if not isinstance(value, str | int | float | None):  # such as a date
                raise _refused(f"a key is a {type(value).__name__}; keys should be text", key)
            if value in keys:
                raise _refused(f"key {value!r} appears twice", key)
            if isinstance(value, str) and not value.isprintable():
                raise _refused(f"key {value!r} contains characters that cannot be printed", key)
            keys.add(value)
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _keys(node: yaml.Node) -> list[yaml.Node]:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return [key for key, _ in pairs if key.tag != MERGE_TAG]


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _type(node: yaml.Node) -> str:
    """The name of its type, such as int."""
    return node.tag.rpartition(":")[2]


def _refused(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
