"""The folders of runs read back, and compared in a table."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import ceil, inf
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from fedsim.base.reading import parse, parse_json, read_regular
from fedsim.errors import ConfigError, one_line, printable

WIDTH = 80  # columns of a terminal
MAX_DIFFERENCES = 8  # that a caption lists
ABSENT = "-"
NUMBER_KEYS = ("round", "seconds", "bytes_up", "bytes_down")  # in every line of rounds.jsonl
CURVE_KEYS = (  # numbers, or null, where they are there
    *("train_loss", "test_loss", "test_accuracy", "ema_test_loss", "ema_test_accuracy"),
    *("client_accuracy_mean", "client_accuracy_worst_decile"),
)
MAX_NUMBER = 1e300  # a sum of many is finite, too
MAX_BYTES = 2**30  # of a file

Best = Callable[[Iterable[float]], float]  # max or min
Column = tuple[str, str, Best, list[float | None]]  # header, format, and the value of each run, if it has one


@dataclass(frozen=True)
class RunRecord:
    """What the folder of a run holds."""

    folder: Path  # absolute
    config: dict[str, Any]  # resolved
    rounds: list[dict[str, Any]]  # the lines of rounds.jsonl
    summary: dict[str, Any] | None  # None where the run has not finished

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.name

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """The rounds, from 1, in which `key` was measured, and what it was."""
        measured = [row for row in self.rounds if row.get(key) is not None]
        return [row["round"] for row in measured], [row[key] for row in measured]


def read_run(folder: Path | str) -> RunRecord:
    """Read the folder of a run, finished or not.

    A last line of rounds.jsonl that is incomplete, as after a kill, is left out.
    Raises ConfigError naming the file that is missing or broken.
    """
    folder = Path(folder).resolve()
    if (folder / "sweep.yaml").is_file():
        points = sorted(path.parent for path in folder.glob("*/config.yaml"))
        such = f", such as {' '.join(str(point) for point in points[:2])}" if points else ""
        raise ConfigError(
            f"{folder}: is a sweep, whose own table is in results.csv; name folders of runs in it{such}"
        )
    summary = folder / "summary.json"
    config = _mapping(folder / "config.yaml", lambda raw: parse(raw.decode(), "not YAML"))
    return RunRecord(
        folder=folder,
        config=config,
        rounds=_rounds(folder / "rounds.jsonl", config.get("rounds")),
        summary=_mapping(summary, parse_json) if summary.exists() else None,
    )


def parse_record(line: bytes) -> dict[str, Any]:
    """A line of rounds.jsonl; raises ValueError where the numbers that all lines have are none."""
    record = parse_json(line)
    if not isinstance(record, dict) or not all(_is_number(record.get(key)) for key in NUMBER_KEYS):
        raise ValueError(f"should hold the numbers {', '.join(NUMBER_KEYS)}")
    for key in NUMBER_KEYS:
        if record[key] < 0:
            raise ValueError(f"{key} is {record[key]:.4g}")
    for key in CURVE_KEYS:
        if not (record.get(key) is None or _is_number(record[key])):
            raise ValueError(f"{key} should be a number, or null")
    metrics = record.get("metrics", {})
    if not (isinstance(metrics, dict) and all(_is_number(value, inf) for value in metrics.values())):
        raise ValueError("metrics should be numbers by name")
    return record


def _is_number(value: object, most: float = MAX_NUMBER) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < most


def rounds_to(accuracy: float, rounds: Sequence[int], accuracies: Sequence[float]) -> float | None:
    """How many rounds it took to reach `accuracy`; None if it never was.

    As McMahan et al. 2017 count them, section 3: the curve is made monotone (best so far), and the crossing
    interpolated linearly between the evaluated rounds around it; a curve that starts above crosses at once.
    """
    before, best = 0, -inf
    for number, value in zip(rounds, accuracies, strict=True):
        if value >= accuracy:
            share = (accuracy - best) / (value - best) if best > -inf else 1.0
            return before + (number - before) * share
        before, best = number, max(best, value)
    return None


def compare(runs: Sequence[RunRecord], target: float | None = None) -> Table:
    """A table with a row for each run, 80 columns wide, the best of each column bold; below, where configs differ.

    With a `target` accuracy, from 0 to 1: the rounds until it was reached, and the megabytes (10^6 bytes, up
    and down) that they took. Without: the megabytes of the whole run.
    """
    curves = [run.curve("test_accuracy") for run in runs]
    columns: list[Column] = [
        ("best\naccuracy", "{:.2%}", max, [max(values, default=None) for _, values in curves]),
        ("last\naccuracy", "{:.2%}", max, [values[-1] if values else None for _, values in curves]),
    ]
    if target is None:
        columns += [("MB", "{:,.1f}", min, [_megabytes(run, inf) for run in runs])]
    else:
        reached = [rounds_to(target, *curve) for curve in curves]
        spent = [None if at is None else _megabytes(run, ceil(at)) for run, at in zip(runs, reached, strict=True)]
        columns += [
            (f"rounds\nto {100 * target:g}%", "{:,.1f}", min, reached),
            (f"MB\nto {100 * target:g}%", "{:,.1f}", min, spent),
        ]
    columns += [("seconds", "{:,.0f}", min, [sum(row["seconds"] for row in run.rounds) for run in runs])]

    table = Table(width=WIDTH, box=box.SIMPLE, caption=_caption(runs), caption_justify="left")
    table.add_column("run", ratio=1, overflow="fold")
    table.add_column("rounds", justify="right", no_wrap=True)
    cells = []
    for header, form, best, values in columns:
        table.add_column(header, justify="right", no_wrap=True)
        cells.append(_cells(form, best, values))
    for label, run, *row in zip(labels(runs), runs, *cells, strict=True):
        table.add_row(Text(label), Text(_progress(run)), *row)
    return table


def document(runs: Sequence[RunRecord], target: float | None = None) -> dict[str, Any]:
    """What the table says, as JSON has it, and the last round's `metrics`; null where there are no figures."""
    rows = list[dict[str, Any]]()
    for label, run in zip(labels(runs), runs, strict=True):
        numbers, accuracies = run.curve("test_accuracy")
        reached = None if target is None else rounds_to(target, numbers, accuracies)
        rows.append(
            {
                "run": label,
                "folder": str(run.folder),
                "finished": run.summary is not None,
                "rounds": run.rounds[-1]["round"] if run.rounds else 0,
                "planned": run.config.get("rounds"),
                "best_test_accuracy": max(accuracies, default=None),
                "test_accuracy": accuracies[-1] if accuracies else None,
                "bytes": _bytes(run, inf),
                "seconds": sum(row["seconds"] for row in run.rounds),
                "metrics": run.rounds[-1].get("metrics", {}) if run.rounds else {},
                "rounds_to_target": reached,
                "bytes_to_target": None if reached is None else _bytes(run, ceil(reached)),
            }
        )
    differing = {key: [_at(run.config, key) for run in runs] for key in differences(runs)}
    return {"target": target, "runs": rows, "differences": differing}


def labels(runs: Sequence[RunRecord]) -> list[str]:
    """A name for each run: that of its folder, with as many parent folders as distinguish it from the others."""
    folders = [run.folder.parts for run in runs]
    return [printable(_label(own, [other for other in folders if other != own])) for own in folders]


def differences(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """The config keys, dotted, in which the runs differ, and each run's value there.

    Where a component has another name, its options are not compared.
    """
    configs = [dict(_flat(run.config)) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    values = {key: [config.get(key, ABSENT) for config in configs] for key in keys}
    found = {key: each for key, each in values.items() if len(set(each)) > 1}
    renamed = tuple(key.removesuffix("name") for key in found if key.endswith(".name"))
    return {key: each for key, each in found.items() if key.endswith(".name") or not key.startswith(renamed)}


def shortened(text: str, length: int) -> str:
    """`text` with at most `length` letters; where it is longer, an ellipsis replaces its middle."""
    kept = (length - 1) // 2
    return text if len(text) <= length else f"{text[: length - 1 - kept]}…{text[-kept:]}"


def _cells(form: str, best: Best, values: Sequence[float | None]) -> list[Text]:
    winner = best(known) if (known := [value for value in values if value is not None]) else None
    return [
        Text(ABSENT) if value is None else Text(form.format(value), "bold" if value == winner else "")
        for value in values
    ]


def _megabytes(run: RunRecord, until: float) -> float:
    return float(_bytes(run, until)) / 1e6


def _bytes(run: RunRecord, until: float) -> float:
    """Up and down, in the rounds until that one."""
    moved: Iterator[float] = (row["bytes_up"] + row["bytes_down"] for row in run.rounds if row["round"] <= until)
    return sum(moved)


def _progress(run: RunRecord) -> str:
    done = run.rounds[-1]["round"] if run.rounds else 0
    return f"{done}" if run.summary is not None else printable(f"{done} of {run.config.get('rounds', '?')}")


def _caption(runs: Sequence[RunRecord]) -> Text | None:
    if len(runs) < 2:
        return None
    lines = [f"{key}: {', '.join(shortened(v, 24) for v in values)}" for key, values in differences(runs).items()]
    more = [f"and {len(lines) - MAX_DIFFERENCES} more"] if len(lines) > MAX_DIFFERENCES else []
    shown = ["configs differ in", *map(printable, lines[:MAX_DIFFERENCES]), *more]
    return Text("\n".join(shown) if lines else "configs are the same")


def _label(own: tuple[str, ...], others: Sequence[tuple[str, ...]]) -> str:
    depths = range(1, len(own))
    depth = next((d for d in depths if all(other[-d:] != own[-d:] for other in others)), len(own))
    return "/".join(own[-depth:])


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str)


def _at(config: Any, key: str) -> Any:
    """What stands at a dotted key; None where nothing does."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def _mapping(path: Path, parsed: Callable[[bytes], Any]) -> dict[str, Any]:
    raw = _read(path)
    try:
        content = parsed(raw)
    except ValueError as error:
        raise ConfigError(f"{path}: broken: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: broken: not a mapping")
    return content


def _rounds(path: Path, most: object) -> list[dict[str, Any]]:
    content = _read(path)
    if isinstance(most, int) and (count := content.count(b"\n")) > most:
        raise ConfigError(f"{path}: broken: {count} lines, and the run's config.yaml has {most} rounds")
    *lines, tail = content.split(b"\n")
    with suppress(ValueError):  # an incomplete line; one that lacks only its newline is whole
        parse_json(tail)
        lines.append(tail)
    return [_round(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _round(line: bytes, at: str) -> dict[str, Any]:
    try:
        return parse_record(line)
    except ValueError as error:
        raise ConfigError(f"{at}: broken: {one_line(error)}") from None


def _read(path: Path) -> bytes:
    try:
        return read_regular(path, MAX_BYTES)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; is its folder that of a run?") from error
