"""A whole run: rounds and evaluations, and what they leave behind."""

import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from fedsim.config import Config, build, load
from fedsim.folder import RunFolder, make
from fedsim.simulation import Simulation
from fedsim.types import Report

Record = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What summary.json and rounds.jsonl hold, and the folder with them, if one was asked for."""

    summary: Record
    rounds: list[Record]
    folder: Path | None
    interrupted: bool


class Watcher(Protocol):
    """Is told of a run as it goes."""

    def client(self, report: Report) -> None:
        """A client finished."""

    def round(self, record: Record) -> None:
        """A round finished; the record is a line of rounds.jsonl."""


class Silent:
    """Watches, and says nothing."""

    def client(self, report: Report) -> None: ...
    def round(self, record: Record) -> None: ...


def run(
    config: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
) -> Result:
    """Run an experiment: a YAML file or its mapping, with dotted overrides such as {"strategy.mu": 0.1}.

    `out` names a new folder for what the run leaves behind; without it nothing is written. Raises ConfigError
    for wrong settings, ClientError or RoundError for a run that failed.
    """
    loaded = load(config, overrides)
    simulation = build(loaded)
    return execute(loaded, simulation, None if out is None else make(Path(out)))


def execute(config: Config, simulation: Simulation, out: Path | None, watcher: Watcher | None = None) -> Result:
    """Run what was built, and leave what came out in `out`, a new and empty folder.

    An interrupt (Ctrl-C) ends the run after the clients under way, and is told in the result. Whatever else ends
    it early is raised, and leaves the rounds before it.
    """
    watcher = watcher or Silent()
    folder = RunFolder(out, config, simulation.data) if out is not None else None
    start, records, finished = perf_counter(), list[Record](), False
    try:
        while simulation.number < config.rounds:
            done = simulation.round(watcher.client)
            last = done.round == config.rounds
            record = done._asdict()
            try:
                if last or done.round % config.evaluate.every == 0:
                    record |= _tests(config, simulation)
            finally:  # the round counts, whatever its test came to
                records.append(record)
                if folder:
                    folder.round(record)
                watcher.round(record)
        finished = True
    except KeyboardInterrupt:
        pass
    finally:
        summary = _summary(records, simulation, perf_counter() - start)
        if folder:
            folder.close(simulation.task.state_dict(simulation.server), summary if finished else None)
    return Result(summary, records, out, interrupted=not finished)


def _tests(config: Config, simulation: Simulation) -> Record:
    test = simulation.evaluate(config.evaluate.batch_size)
    found = {"test_loss": test.loss, "test_accuracy": test.accuracy}
    if config.evaluate.clients:
        clients = simulation.evaluate_clients(batch_size=config.evaluate.batch_size)
        found |= spread([each.accuracy for each in clients.values()])
    return found


def spread(accuracies: list[float]) -> dict[str, float]:
    """Over clients, each counting once: the mean, the standard deviation, and the mean of the worst tenth."""
    ordered = np.sort(accuracies)
    worst = ordered[: max(len(ordered) // 10, 1)]
    return {
        "client_accuracy_mean": float(ordered.mean()),
        "client_accuracy_std": float(ordered.std()),
        "client_accuracy_worst_decile": float(worst.mean()),
    }


def _summary(records: list[Record], simulation: Simulation, seconds: float) -> Record:
    tested = [record for record in records if "test_accuracy" in record]
    training = sum(record["seconds"] for record in records)
    return {
        "rounds": simulation.number,
        "test_accuracy": tested[-1]["test_accuracy"] if tested else None,
        "test_loss": tested[-1]["test_loss"] if tested else None,
        "best_test_accuracy": max((record["test_accuracy"] for record in tested), default=None),
        "fingerprint": simulation.fingerprint(),
        "seconds": seconds,
        "client_steps_per_second": sum(r["steps"] for r in records) / training if records else 0.0,
        "bytes_up": sum(record["bytes_up"] for record in records),
        "bytes_down": sum(record["bytes_down"] for record in records),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
