"""The exceptions of fedsim, and functions that put an error into one line."""

import re
from pathlib import Path
from traceback import clear_frames, extract_tb

NO_MEMORY = re.compile("can't allocate memory|not enough memory|out of memory")  # what torch says


class ConfigError(ValueError):
    """The user's input cannot be used. One line: which key or file, what was wrong, what is allowed."""


class ClientError(RuntimeError):
    """One client failed in one round; the cause is chained."""


class NodeError(RuntimeError):
    """A client on another machine failed; only the text of its error is known here."""


class RoundError(RuntimeError):
    """A round failed: too few clients answered, or their messages cannot be aggregated."""


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
    words = printable(" ".join(str(text).split()))
    return words if len(words) <= 200 else f"{words[:197]}..."


def reason(error: Exception) -> str:
    """The type and text of an error, in one line."""
    return one_line(f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}")


def located(error: BaseException) -> str:
    """An error in a user's code in one line, with the file and line: "TypeError: ... (mine.py:12)"."""
    frames = extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    where = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    return one_line(f"{type(error).__name__}: {error}") + where


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
