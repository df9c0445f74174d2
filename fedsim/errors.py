"""The exceptions of fedsim, and functions that put an error into one line."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from sysconfig import get_path
from traceback import clear_frames, walk_tb

NO_STATE = "it must depend on its arguments alone, without a state or random numbers of its own"
STANDARD_LIBRARY = get_path("stdlib")
MAX_TEXT = 10_000  # characters of an error that are looked at; it may be a stranger's
NO_MEMORY = re.compile("can't allocate memory|not enough memory|out of memory")  # what torch says


class ConfigError(ValueError):
    """The user's input cannot be used. One line: which key or file, what was wrong, what is allowed."""


class ClientError(RuntimeError):
    """One client failed in one round; the cause is chained."""


class NodeError(RuntimeError):
    """A client on another machine failed; only the text of its error is known here."""


class RoundError(RuntimeError):
    """A round failed: too few clients answered, or their messages cannot be aggregated."""


class WrongReturnError(TypeError):
    """A user's code gave what it should not. One line: what it gave, and what is right."""


def is_interrupt(error: BaseException | None) -> bool:
    """Whether it is Ctrl-C, or what Python's `threading` makes of one that comes while a lock is taken again.

    That is a RuntimeError: the lock, which the interrupt kept from being taken, is then released.
    """
    lost = type(error) is RuntimeError and "release un" in str(error)
    return isinstance(error.__context__ if error and lost else error, KeyboardInterrupt)


class border:  # noqa: N801 - used as a function; an interrupt at the `with` would close a generator within it
    """Between fedsim and a user's code: whatever ends the code inside becomes one line that begins with `whose`.

    `fault` is ConfigError at the start and RoundError in a run. Errors of that kind pass as they are, for they say
    enough by themselves; so do a ClientError, an interrupt, and what `passes` accepts.
    """

    def __init__(
        self,
        whose: str,
        fault: type[ConfigError | RoundError],
        passes: Callable[[BaseException], bool] = lambda _: False,
    ):
        self.whose, self.fault, self.passes = whose, fault, passes

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, (self.fault, ClientError)) or is_interrupt(error):
            return
        if self.passes(error):
            return
        plain = isinstance(error, ConfigError | RoundError | WrongReturnError)
        text = f"{self.whose}: {one_line(error) if plain else located(error)}"
        # contextlib takes an error caused by a StopIteration for that StopIteration.
        raise self.fault(text) from (None if isinstance(error, StopIteration) else error)


def is_own(target: object) -> bool:
    """Whether a class, function or object is a user's own, and not fedsim's."""
    return not name_of(target).startswith("fedsim.")


def name_of(target: object) -> str:
    """The name of a function, class or object as a config would have it: "mine:schedule"."""
    while isinstance(target, partial):
        target = target.func
    named = target if hasattr(target, "__qualname__") else type(target)
    return f"{named.__module__}:{named.__qualname__}"


def how_to_install(extra: str) -> str:
    """The command that installs an extra of pyproject.toml; on the package index `fedsim` is another project."""
    return f"pip install -e '.[{extra}]' in fedsim's folder installs it"


def missing_extra(at: str, package: str, extra: str) -> ConfigError:
    """The error for a setting that needs a package which is not installed."""
    return ConfigError(f"{at} needs {package}, which is not installed; {how_to_install(extra)}")


def printable(text: object) -> str:
    """`text` with unprintable characters escaped, such as \\n, so that they cannot control a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def one_line(text: object) -> str:
    """`text` without line breaks, cut after 200 characters."""
    words = printable(" ".join(str(text)[:MAX_TEXT].split()))
    return words if len(words) <= 200 else f"{words[:197]}..."


def reason(error: Exception) -> str:
    """The type and text of an error, in one line."""
    return one_line(f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}")


def located(error: BaseException) -> str:
    """An error in a user's code in one line, with the file and line: "TypeError: ... (mine.py:12)".

    The line is the last one of the user's own, even where a library that it calls raised the error. Without one it
    is that of fedsim which raised the error, but not for a TypeError, which then comes of the call itself.
    """
    text, place = _text(error), _place(error)
    if isinstance(error, SyntaxError) and error.filename:
        text, place = error.msg, (error.filename, error.lineno or 0)
    where = f" ({Path(place[0]).name}:{place[1]})" if place else ""
    return one_line(f"{type(error).__name__}: {text}") + where


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # a fault of the error's own class
        return "an error without a text"


def _place(error: BaseException) -> tuple[str, int] | None:
    """File and line of what an error passed through, by the rule of `located`."""
    found, of_fedsim = None, False
    for frame, line in walk_tb(error.__traceback__):
        file, of_fedsim = frame.f_code.co_filename, str(frame.f_globals.get("__name__")).startswith("fedsim.")
        if not (file.startswith((STANDARD_LIBRARY, "<frozen", "<string")) or "site-packages" in file or of_fedsim):
            found = file, line
    if found is None and of_fedsim and not isinstance(error, TypeError):
        return file, line
    return found


def out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out, a GPU's too: by an error or by what caused it, for torch has no type of its own."""
    seen = set[int]()
    while error is not None and id(error) not in seen:
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and NO_MEMORY.search(str(error))):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def forget_variables(error: BaseException | None) -> None:
    """Clear the variables of all functions that an error passed through; file and line of each stay."""
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
