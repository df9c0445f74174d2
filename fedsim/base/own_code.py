"""Names `package.module:attribute`, by which a config imports code that does not come with fedsim.

In a program they are the program's own, and are imported without a word. Where a config may be someone else's, as
in the command, a rule says what becomes of them. It holds in all threads of the process, which share the work of a
command; `unread` holds in its own thread alone, and before any rule.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum, auto
from importlib.machinery import ModuleSpec

from fedsim.errors import ConfigError, printable


class Rule(Enum):
    """What becomes of such a name."""

    IMPORTED = auto()
    ANNOUNCED = auto()  # imported, after a line on standard error
    REFUSED = auto()


class _Current:
    """The rule of this process, and the modules that were announced."""

    rule = Rule.IMPORTED
    announced = frozenset[str]()


_unread = ContextVar("_unread", default=False)


@contextmanager
def own_code(rule: Rule) -> Iterator[None]:
    """Have this rule within the block."""
    before = _Current.rule, _Current.announced
    _Current.rule, _Current.announced = rule, frozenset()
    try:
        yield
    finally:
        _Current.rule, _Current.announced = before


@contextmanager
def unread() -> Iterator[None]:
    """Have no such name looked up within the block, in this thread: any options may stand beside it."""
    token = _unread.set(True)
    try:
        yield
    finally:
        _unread.reset(token)


def is_unread() -> bool:
    """Whether such a name is not looked up."""
    return _unread.get()


def before_import(module: str, name: str, at: str) -> None:
    """Apply the rule to `name`, for which `module` would be imported; raises ConfigError where it is refused."""
    refuse_code(f"{name} is code that does not come with fedsim", at)
    if _Current.rule is not Rule.ANNOUNCED or f"{module}.".startswith("fedsim."):
        return
    if module not in _Current.announced:
        _Current.announced |= {module}
        if (files := files_of(module)) is not None:
            line = f"{at}: imports {module}, which is not fedsim's: {', '.join(files) or 'a folder without code'}"
            print(f"fedsim: {printable(line)}", file=sys.stderr, flush=True)


def is_refused() -> bool:
    """Whether what would run such code is refused."""
    return _Current.rule is Rule.REFUSED or is_unread()


def refuse_code(why: str, at: str) -> None:
    """Raise ConfigError where the rule refuses what would run code that does not come with fedsim."""
    if is_refused():
        raise ConfigError(f"{at}: {why}, and such code is refused")


def files_of(module: str) -> list[str] | None:
    """The files that the import of a module runs: those of the packages around it, and its own.

    None where there is no such module. They are found without running any; those that a package adds when it runs
    are not known.
    """
    files, name, path = list[str](), "", None
    for part in module.split("."):
        name = f"{name}.{part}".lstrip(".")
        found = _found(name, path)
        if found is None:
            return files if path else None
        if found.origin:
            files.append(found.origin)
        path = found.submodule_search_locations
        if path is None:
            break
    return files


def _found(name: str, path: list[str] | None) -> ModuleSpec | None:
    """As `importlib.util.find_spec`, which would import the package around it."""
    for finder in sys.meta_path:
        if found := finder.find_spec(name, path, None):
            return found
    return None
