"""Files of others, read as what they are: data, of a size that fits, or one line that says what is wrong.

Nothing read here is run or unpickled, and nothing is believed before it is checked against the file's length.
"""

import os
import re
import stat
from collections.abc import Hashable
from io import BufferedReader
from pathlib import Path
from typing import Any

import yaml

from fedsim.errors import ConfigError, one_line, printable

MOST_BYTES = 2**20  # of a YAML file
MOST_VALUES = 100_000  # in one, with all that its aliases stand for
TEXT = 16  # characters that count as a value more
MOST_DEEP = 50
TOO_DEEP = f"it is nested more than {MOST_DEEP} deep"
LONGEST_NUMBER = 1000  # characters; numbers to base 60 take time that grows with the square
MERGE = "tag:yaml.org,2002:merge"  # of the key <<


def open_regular(path: str | Path) -> BufferedReader:
    """Open to read; raises OSError for what is no regular file, as a pipe may hang and a device never ends."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a folder has an error of its own
        raise OSError(0, "Not a regular file", str(path))
    return open(path, "rb")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a file; raises ConfigError naming file and line."""
    at = printable(path)
    try:
        with open_regular(path) as file:
            content = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # the latter: a name with a zero in it
        raise ConfigError(f"{at}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > MOST_BYTES:
        raise ConfigError(f"{at}: is larger than a config may be, {MOST_BYTES} bytes")
    try:
        values = parse(content.decode("utf-8"), at)
    except UnicodeDecodeError:
        raise ConfigError(f"{at}: is not a text in UTF-8") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{at}: should hold a mapping of settings, such as `rounds: 100`")
    return values


def parse(text: str, at: str) -> Any:
    """What `text` says in YAML, built of plain values only; raises ConfigError that begins with `at`."""
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
    """Safe YAML, of bounded size, in which 1e-3 is a number, as in YAML 1.2, and a key may stand once."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self.size = 0  # in values, with all that aliases stand for
        self.extents = dict[yaml.Node, tuple[int, int]]()  # size and depth of what is read already

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse what grows when its aliases are written out."""
        alias, before = self.check_event(yaml.AliasEvent), self.size
        node: Any = super().compose_node(parent, index)
        if alias and node not in self.extents:
            raise _refused("a value contains itself", node)
        if alias:
            self.size += self.extents[node][0]
        else:
            self.size += 1 + (len(node.value) // TEXT if isinstance(node, yaml.ScalarNode) else 0)
            depth = 1 + max((self.extents[part][1] for part in _below(node)), default=0)
            self.extents[node] = self.size - before, depth
            if depth > MOST_DEEP:
                raise _refused(TOO_DEEP, node)
        if self.size > MOST_VALUES:
            raise _refused(f"it holds more than {MOST_VALUES} values, aliases written out", node)
        return node  # type: ignore[no-any-return]

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Name the line where SafeLoader trusts a tag to fit its value."""
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # in words, such as those of a date
            raise _refused(str(error), node) from None
        except (ArithmeticError, AttributeError, LookupError, TypeError):
            raise _refused(f"{str(node.value)[:60]!r} is no {_kind(node)}", node) from None

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        """Refuse a number that takes long to read, and YAML 1.1's mapping that stands for a text."""
        if not isinstance(node, yaml.ScalarNode):
            raise _refused(f"a list or mapping is no {_kind(node)}", node)
        if _kind(node) in ("int", "float") and len(node.value) > LONGEST_NUMBER:
            raise _refused(f"a number has more than {LONGEST_NUMBER} characters", node)
        node.value.encode()  # raises ValueError for half a character, which no file can hold
        return super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse what a plain loader would silently let the last one win."""
        keys = set[Any]()
        for key in _keys(node):
            value = self.construct_object(key, deep=True)
            if not isinstance(value, Hashable):
                break  # the plain loader refuses it
            if value in keys:
                raise _refused(f"key {value!r} stands twice", key)
            if isinstance(value, str) and not value.isprintable():
                raise _refused(f"key {value!r} cannot be printed", key)
            keys.add(value)
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _keys(node: yaml.Node) -> list[yaml.Node]:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return [key for key, _ in pairs if key.tag != MERGE]


def _below(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _kind(node: yaml.Node) -> str:
    return node.tag.rpartition(":")[2]


def _refused(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
