"""The network of a run's folder; no data is read."""

from collections.abc import Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from torch import Tensor, nn

from fedsim.base.files import open_tensors
from fedsim.base.machine import gigabytes, memory
from fedsim.base.reading import read_regular
from fedsim.errors import ConfigError, one_line
from fedsim.experiment.config import Config
from fedsim.experiment.config import load as load_config
from fedsim.experiment.folder import read_config
from fedsim.models.options import make
from fedsim.report.runs import MAX_BYTES
from fedsim.types import Count

MAX_NUMBERS = 2**28  # in an example, and of classes


class Example(BaseModel):
    """What a run's examples are before they reach its network, as x * scale - shift."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True)
    shape: tuple[Count, ...]
    dtype: Literal["uint8", "float32"]
    scale: tuple[float, ...]
    shift: tuple[float, ...]

    def random(self, batch: int, raw: bool) -> Tensor:
        """(B, *shape) to try a network on: raw, or as the network takes them."""
        generator = torch.Generator().manual_seed(batch)
        if raw and self.dtype == "uint8":
            return torch.randint(256, (batch, *self.shape), dtype=torch.uint8, generator=generator)
        return torch.randn(batch, *self.shape, generator=generator)


class PartitionRecord(BaseModel):
    """The part of partition.json that a network depends on."""

    model_config = ConfigDict(strict=True)
    classes: Count
    example: Example


class Trained(NamedTuple):
    """What a run's folder holds of its network."""

    network: nn.Module
    config: Config
    example: Example
    classes: int


def load_trained(run: Path, *, ema: bool = False) -> Trained:
    """The network of a run's folder, or with `ema` its running mean; no data is read. Raises ConfigError."""
    config, record = load_config(read_config(run)), _partition_record(run)
    spec = config.model if isinstance(config.model, Mapping) else {"name": config.model}
    with torch.random.fork_rng(devices=[]):
        network = make_network(_bare(spec), record.example.shape, record.classes)
    path = run / ("ema.safetensors" if ema else "model.safetensors")
    if ema and not path.exists():
        raise ConfigError(f"--ema: {run} has no {path.name}, as runs have whose config sets `ema`")
    try:
        with open_tensors(path) as file:
            network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (SafetensorError, RuntimeError) as error:
        raise ConfigError(f"{path}: does not hold the weights of the run's network: {one_line(error)}") from None
    return Trained(network.eval(), config, record.example, record.classes)


def make_network(spec: Mapping[str, object], shape: tuple[int, ...], classes: int) -> nn.Module:
    """The network that a spec describes; raises ConfigError also where this machine cannot hold it."""
    at = f"model: cannot be made for {one_line(classes)} classes and examples of shape {one_line(shape)}"
    if max(prod(shape), classes) > MAX_NUMBERS:
        raise ConfigError(f"{at}: neither may have more than {MAX_NUMBERS:,}")
    with suppress(RuntimeError, TypeError), torch.device("meta"):  # on which not every factory can do its work
        needed = sum(value.nbytes for value in make(_bare(spec), shape, classes).state_dict().values())
        if needed > memory() // 2:
            raise ConfigError(f"{at}: it has {gigabytes(needed)}, more than half of this machine's memory")
    try:
        return make(spec, shape, classes)
    except (RuntimeError, MemoryError) as error:
        raise ConfigError(f"{at}: {one_line(error)}") from error


def _bare(spec: Mapping[str, object]) -> dict[str, object]:
    """Without weights from elsewhere: where a network began does not matter to what it is."""
    return {key: value for key, value in spec.items() if key not in ("weights", "pretrained", "new_head")}


def _partition_record(run: Path) -> PartitionRecord:
    path = run / "partition.json"
    try:
        return PartitionRecord.model_validate_json(read_regular(path, MAX_BYTES))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; is its folder that of a run?") from None
    except ValueError:
        raise ConfigError(f"{path}: does not describe an example; fedsim resume {run} writes it again") from None
