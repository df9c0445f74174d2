"""The figures of a run: what the test after a round measures, and what summary.json says."""

import resource
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedsim.experiment.config import Evaluate
from fedsim.experiment.run import Record, Run
from fedsim.federated.simulation import Simulation


def evaluate(simulation: Simulation, settings: Evaluate) -> Record:
    """Loss and accuracy of the global model, of its running mean if there is one, and over clients if wanted."""
    size, train = settings.batch_size, settings.mode == "train"
    test = simulation.evaluate(size, train=train)
    found: Record = {"test_loss": test.loss, "test_accuracy": test.accuracy}
    if simulation.ema:
        mean = simulation.evaluate(size, simulation.ema, train=train)
        found |= {"ema_test_loss": mean.loss, "ema_test_accuracy": mean.accuracy}
    if settings.clients:
        failed = dict[int, str]()
        clients = simulation.evaluate_clients(batch_size=size, train=train, after_failure=failed.__setitem__)
        found |= spread([each.accuracy for each in clients.values()]) if clients else {}
        found["evaluation_failed"] = {str(client): why for client, why in sorted(failed.items())}
    return found


def evaluate_new_clients(simulation: Simulation, settings: Evaluate) -> Record:
    """Over the clients that were kept out of training: loss and accuracy of their own models."""
    failed = dict[int, str]()
    found = simulation.evaluate_clients(
        simulation.data.new_clients,
        settings.batch_size,
        train=settings.mode == "train",
        after_failure=failed.__setitem__,
    )
    losses = [each.loss for each in found.values()]
    return {
        "new_clients": len(simulation.data.new_clients),
        "new_client_loss_mean": float(np.mean(losses)) if losses else None,
        **(spread([each.accuracy for each in found.values()], "new_client") if found else {}),
        "new_clients_failed": {str(client): why for client, why in sorted(failed.items())},
    }


def spread(accuracies: list[float], whose: str = "client") -> dict[str, float]:
    """Over clients, each counting once: the mean, the standard deviation, and the mean of the worst tenth."""
    ordered = np.sort(accuracies)
    worst = ordered[: max(len(ordered) // 10, 1)]
    return {
        f"{whose}_accuracy_mean": float(ordered.mean()),
        f"{whose}_accuracy_std": float(ordered.std()),
        f"{whose}_accuracy_worst_decile": float(worst.mean()),
    }


def repeated(records: Sequence[Record], *, ema: bool) -> Record:
    """The figures of summary.json that follow from the lines of rounds.jsonl."""
    tested = [record for record in records if "test_accuracy" in record]
    training = sum(record["seconds"] for record in records)
    last = tested[-1] if tested else {}
    return {
        "rounds": len(records),
        "test_accuracy": last.get("test_accuracy"),
        "test_loss": last.get("test_loss"),
        **({"ema_test_accuracy": last.get("ema_test_accuracy")} if ema else {}),
        "best_test_accuracy": max((record["test_accuracy"] for record in tested), default=None),
        "client_steps_per_second": sum(r["steps"] for r in records) / training if training else 0.0,
        "bytes_up": sum(record["bytes_up"] for record in records),
        "bytes_down": sum(record["bytes_down"] for record in records),
    }


def summarize(run: Run) -> dict[str, Any]:
    """What summary.json says of a run."""
    return repeated(run.records, ema=bool(run.simulation.ema)) | {
        "fingerprint": run.simulation.fingerprint(),
        "stopped": run.stopped,
        "seconds": run.seconds,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **run.new_clients,
    }
