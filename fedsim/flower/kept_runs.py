"""What a node keeps, for its owner: `fedsim node NODE.yaml --runs` and `--forget`, also while the node works."""

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from pydantic import ByteSize
from rich import box
from rich.table import Table
from rich.text import Text

from fedsim.base.reading import parse_json
from fedsim.errors import ConfigError, one_line
from fedsim.flower import state_files
from fedsim.report.runs import WIDTH

PREFIX = re.compile(r"[0-9a-f]{1,32}")
LEAST_SHOWN = 8  # characters of a run's id
MOST_NAME = 40  # characters of a strategy or model, which the server has named


class KeptRun(NamedTuple):
    """A run that the node has joined. Times are of time.time."""

    run: str
    joined: float | None  # with its plan of now; None, as the two names, if the plan is absent or damaged
    strategy: str | None
    model: str | None
    round: int | None  # after which the client's newest state was stored; None if it has none
    bytes: int  # on the disk
    finished: bool
    last_message: float

    def shown(self) -> dict[str, object]:
        """For JSON, with times as text."""
        times = {"joined": self.joined and _time(self.joined), "last_message": _time(self.last_message)}
        return self._asdict() | times


def kept_runs(folder: Path) -> Iterator[KeptRun]:
    """The runs in a node's folder, the last message last; raises ConfigError."""
    for _, run in sorted((_last(folder / run), run) for run in _runs(folder)):
        try:
            yield _kept_run(folder / run)
        except FileNotFoundError:  # it was deleted just now
            continue
        except OSError as error:
            raise _unreadable(folder, error) from None


def kept_table(runs: Sequence[KeptRun], max_disk: int) -> Table:
    """A row for each run, 80 columns wide."""
    shown = Table(width=WIDTH, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, caption_justify="left")
    used = size_text(sum(run.bytes for run in runs))
    shown.caption = f"{used} of {size_text(max_disk)}, which allow.max_disk allows"
    for name in ("run", "joined", "last message"):
        shown.add_column(name, no_wrap=True)
    shown.add_column("trains")
    for name in ("round", "size", "ended"):
        shown.add_column(name, justify="right", no_wrap=True)
    for run, short in zip(runs, short_ids([run.run for run in runs]), strict=True):
        times = [_local(run.joined)[:10] if run.joined else "unknown", _local(run.last_message)]
        trains = f"{run.strategy}, {run.model}" if run.strategy else "unknown"
        rest = ["" if run.round is None else str(run.round), size_text(run.bytes), "yes" if run.finished else "no"]
        shown.add_row(*map(Text, (short, *times, trains, *rest)))  # not as markup: servers choose the names
    return shown


def size_text(length: int) -> str:
    """Such as 12.0MiB."""
    return ByteSize(length).human_readable()


def forget(folder: Path, prefix: str) -> KeptRun:
    """Delete the run whose id begins so, and return what there was; raises ConfigError unless that is one run."""
    if not PREFIX.fullmatch(prefix):
        raise ConfigError(f"--forget: {prefix[:40]!r} should be the id of a run, or its first characters")
    found = [run for run in _runs(folder) if run.startswith(prefix)]
    if not found:
        raise ConfigError(f"--forget: no run of this node begins with {prefix!r}; --runs lists them")
    if len(found) > 1:
        raise ConfigError(f"--forget: {len(found)} runs begin with {prefix!r}: {', '.join(short_ids(found)[:3])}")
    try:
        kept = _kept_run(folder / found[0])
        state_files.forget(folder, found[0])
    except OSError as error:
        raise _unreadable(folder, error) from None
    return kept


def short_ids(runs: list[str]) -> list[str]:
    """The first characters of ids, as many as tell them apart."""
    length = next(n for n in range(LEAST_SHOWN, 33) if n == 32 or len({run[:n] for run in runs}) == len(runs))
    return [run[:length] for run in runs]


def _runs(folder: Path) -> list[str]:
    try:
        return state_files.runs(folder)
    except FileNotFoundError:  # it has joined none yet
        return []
    except OSError as error:
        raise _unreadable(folder, error) from None


def _kept_run(home: Path) -> KeptRun:
    newest = max(state_files.states(home), default=None)
    finished = (home / state_files.FINISHED).exists()
    return KeptRun(home.name, *_agreed(home), newest, state_files.size(home), finished, _last(home))


def _agreed(home: Path) -> tuple[float | None, str | None, str | None]:
    """When the node joined, and the names of strategy and model."""
    try:
        plan = parse_json(state_files.read_plan(home))
        strategy, model = (one_line(plan[part]["name"])[:MOST_NAME] for part in ("strategy", "model"))
        return (home / state_files.PLAN).stat().st_mtime, strategy, model
    except (OSError, ValueError, LookupError, TypeError):
        return None, None, None


def _last(home: Path) -> float:
    return home.stat().st_mtime


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _local(seconds: float) -> str:
    """By this machine's clock and place."""
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"


def _unreadable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"state: {error.filename or folder}: {error.strerror}")
