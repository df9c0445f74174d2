"""Fingerprints after three rounds, by PyTorch version and processor, and the runs that they are of.

`python tests/recorded.py` computes them here and adds them to recorded.json: before a change that should leave
every result as it is, on a machine that has none yet. With `--check` it compares instead.
"""

import hashlib
import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from fedsim import ConfigError
from fedsim.experiment.build import build
from fedsim.experiment.config import load
from fedsim.strategies.averaging.fedavg import FedAvg
from fedsim.types import hash_into

FILE = Path(__file__).with_suffix(".json")
CONFIGS = Path(__file__).parent.parent / "configs"
ROUNDS = 3
RUNTIMES = {
    "serial": {"name": "serial", "device": "cpu"},
    "threads": {"name": "threads", "device": "cpu", "workers": 2},
    "vectorized": {"name": "vectorized", "device": "cpu", "workers": 1, "chunk": 4},
}
SYNTHETIC = {
    "seed": 1,
    "data": {
        "name": "synthetic",
        "shape": [1, 8, 8],
        "examples": 90,
        "test_examples": 20,
        "classes": 3,
        "noise": 0.7,
        "clients": 6,
        "partition": {"name": "dirichlet", "alpha": 1.0},
    },
    "model": {"name": "cnn_bn", "widths": [4, 8]},
    "strategy": "fedavg",
    "cohort": {"name": "uniform", "fraction": 0.7},
    "local": {"lr": 0.05, "batch_size": 4},
}
DROPOUT = {"model": {"name": "cnn_bn", "widths": [4, 8], "dropout": 0.3}}


@dataclass(frozen=True, kw_only=True)
class Failing(FedAvg):
    """One client fails in each round in which it takes part."""

    def client_update(self, server, client, local):
        update = super().client_update(server, client, local)
        return update._replace(message={"delta": update.message["delta"] / (local.client_id - 2)})


def _local(**settings):
    return {"local": {"lr": 0.05, "batch_size": 4} | settings}


VARIANTS = {  # what each changes in SYNTHETIC
    "plain": {},
    "adam": _local(optimizer="adam", lr=0.01),
    "adam decay": _local(optimizer="adam", lr=0.01, weight_decay=0.01),
    "adamw": _local(optimizer="adamw", lr=0.01, weight_decay=0.1, decay="weights"),
    "lars": _local(optimizer="lars", momentum=0.9, weight_decay=0.001, trust=0.02),
    "lars decay weights": _local(optimizer="lars", weight_decay=0.01, decay="weights", trust=0.02),
    "momentum": _local(momentum=0.9),
    "momentum decay": _local(momentum=0.9, weight_decay=0.01),
    "decay": _local(weight_decay=0.01),
    "decay weights": _local(weight_decay=0.05, decay="weights"),
    "nesterov": _local(momentum=0.9, nesterov=True),
    "nesterov decay": _local(momentum=0.9, nesterov=True, weight_decay=0.01),
    "clipping": _local(clip_norm=0.5),
    "accumulation": _local(batch_size=8, accumulate=3),
    "full batch": _local(batch_size="full", epochs=2),
    "steps": _local(steps=5),
    "bf16": _local(precision="bf16"),
    "bf16 decay weights": _local(precision="bf16", weight_decay=0.01, decay="weights"),
    "bf16 adam": _local(precision="bf16", optimizer="adam", lr=0.01),
    "fp16": _local(precision="fp16"),
    "fp16 overflow": _local(precision="fp16", loss_scale=2.0**40),
    "augmentation": _local(augment=["flip", {"name": "random_crop", "padding": 1}]),
    "mixup": _local(augment=[{"name": "mixup"}]),
    "distillation": _local(distillation={"temperature": 2.0}),
    "noisy labels": _local(noisy_labels={"start": 2}, epochs=2),
    "class weights": _local(class_weights="balanced"),
    "oversampling": _local(oversample=True),
    "lr every step": _local(lr_every="step", warmup=1, schedule="cosine"),
    "label smoothing": _local(loss={"name": "cross_entropy", "smoothing": 0.1}),
    "channels last": _local(channels_last=True),
    "activation checkpointing": _local(activation_checkpointing=True)
    | {"model": {"name": "mobilenet_v2", "norm": "group"}},
    "dropout": DROPOUT,
    "dropout full batch": DROPOUT | _local(batch_size="full"),
    "a client that fails": {"strategy": {"name": "recorded:Failing"}, "failures": {"policy": "drop"}},
    "scaffold": {"strategy": "scaffold"},
    "fedprox": {"strategy": {"name": "fedprox", "mu": 0.1}},
    "fedprox clipped bf16": {"strategy": {"name": "fedprox", "mu": 0.1}} | _local(clip_norm=0.5, precision="bf16"),
    "fedsgd": {"strategy": "fedsgd"},
    "fedsgd bf16": {"strategy": "fedsgd"} | _local(precision="bf16"),
    "fedadam": {"strategy": "fedadam"},
    "fedbn": {"strategy": "fedbn"},
    "personal": {"strategy": {"name": "personal", "layers": ["*fc*"], "inner": "fedprox"}},
    "personal scaffold": {"strategy": {"name": "personal", "layers": ["*fc*"], "inner": "scaffold"}},
    "private statistics": {"strategy": {"name": "fedavg", "buffers": "private"}},
    "recalibrated, ema": {
        "strategy": {"name": "fedavg", "buffers": "recalibrated"},
        "recalibrate": {"source": "clients"},
        "ema": 0.9,
    },
    "population average": {"strategy": {"name": "fedavg", "average": "population"}},
    "availability": {"availability": {"drop": 0.3, "jitter": 0.5}, "failures": {"policy": "drop"}},
}


def runs():
    """The config of each run but for its runtime, by name."""
    shipped = [CONFIGS / "quickstart.yaml", *sorted((CONFIGS / "digits").glob("*.yaml"))]
    named = {str(path.relative_to(CONFIGS)): yaml.safe_load(path.read_text()) for path in shipped}
    return named | {name: SYNTHETIC | changed for name, changed in VARIANTS.items()}


def outcome(config, runtime):
    """The fingerprint after three rounds, of the network and all that the server has; or why there is none."""
    own = {key: value for key, value in config.items() if key not in ("rounds", "runtime", "hooks")}
    try:
        simulation = build(load(own | {"rounds": ROUNDS, "runtime": RUNTIMES[runtime]}))
        for _ in range(ROUNDS):
            done = simulation.round()
    except ConfigError:
        return "refused"
    digest = hashlib.sha256(repr((done.failed and [*done.failed], done.steps, done.cohort)).encode())
    hash_into(digest, simulation.server)
    for client, state in sorted(simulation.clients.items()):
        digest.update(str(client).encode())
        hash_into(digest, state)
    return digest.hexdigest()[:24]


def place():
    """What fingerprints depend on besides the code: PyTorch and the processor."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        cpu = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "CPU")
    return f"torch {torch.__version__}, {cpu}, {torch.backends.cpu.get_cpu_capability()}"


def recorded():
    """What was found here before, by run and runtime; empty where nothing was."""
    return json.loads(FILE.read_text()).get(place(), {}) if FILE.exists() else {}


def main():
    sys.path.insert(0, str(Path(__file__).parent))
    warnings.simplefilter("ignore")
    before, wrong, found = recorded(), 0, {}
    for name, config in runs().items():
        for runtime in RUNTIMES:
            key = f"{name} | {runtime}"
            found[key] = outcome(config, runtime)
            if "--check" in sys.argv and found[key] != before.get(key):
                wrong += 1
                print(f"{key}: {found[key]}, and was {before.get(key)}", flush=True)
    if "--check" in sys.argv:
        sys.exit(f"{wrong} of {len(found)} differ" if wrong else 0)
    everywhere = json.loads(FILE.read_text()) if FILE.exists() else {}
    FILE.write_text(json.dumps(everywhere | {place(): found}, indent=1, sort_keys=True) + "\n")
    print(f"{len(found)} fingerprints of {place()} are in {FILE}")


if __name__ == "__main__":
    main()
