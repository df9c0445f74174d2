"""A run's network as a file for use elsewhere: `fedsim export`.

The network is the global model in evaluation, and batch norms are folded into its convolutions (fusion.py). A
file says what it is: under the key `fedsim` of its metadata (of a .pt2, in the file fedsim.json) lies JSON with
the model, the classes, the shape of an example and the constants that normalise it. Fused weights fit
`fused(network)`.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedsim.base.files import check_writable, write
from fedsim.errors import ConfigError, one_line
from fedsim.export.formats import FORMATS, NAMES, NEEDS, Format, RunFile
from fedsim.export.fusion import fused
from fedsim.export.trained import Example, load_trained

TOLERANCE = 1e-4  # of a file's outputs, as a share of the largest


class Exported(NamedTuple):
    """A file, and by how much its outputs differ from the network's, as a share of the largest, if it was run."""

    path: Path
    bytes: int
    shape: tuple[int, ...]  # of an example
    difference: float | None


class Normalised(nn.Module):
    """A network that takes raw examples (B, *shape)."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, example: Example):
        super().__init__()
        self.network = network
        self.register_buffer("scale", _by_channel(example.scale or (1.0,)))
        self.register_buffer("shift", _by_channel(example.shift or (0.0,)))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x * self.scale - self.shift)  # type: ignore[no-any-return]


def export(
    run: Path,
    format: Format = "onnx",
    out: Path | None = None,
    *,
    fuse: bool = True,
    normalise: bool = False,
    ema: bool = False,
    batch: int | None = None,
    check: bool = True,
) -> Exported:
    """Write a run's network in evaluation to `out`, a new file; or to NAMES[format] in the run's folder.

    It is fused unless `fuse` is false. It takes examples as the network does, or with `normalise` raw ones; any
    number of them, or `batch`. With `check` the file is run, an ONNX file by ONNX Runtime if that is installed,
    and is not written where its outputs are others. Raises ConfigError.
    """
    for module, why in NEEDS[format].items():
        if find_spec(module) is None:
            raise ConfigError(f"--format: {format} needs {module}; {why}")
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: is no folder of a run; it has no config.yaml")
    out = out or run / NAMES[format]
    if out.exists():
        raise ConfigError(f"--out: {out} exists; name another file")
    check_writable(out, "--out")
    plain, config, example, classes = load_trained(run, ema=ema)
    network: nn.Module = fused(plain, example.shape) if fuse else plain
    if normalise:
        if not (example.scale or example.shift):
            raise ConfigError("--normalise: this run's examples are not normalised")
        plain, network = Normalised(plain, example), Normalised(network, example)
    about = {
        "model": config.model,
        "classes": classes,
        "fused": fuse,
        "normalised": normalise,  # what it takes is raw
        "example": example.model_dump(mode="json"),
    }
    try:
        x = example.random(batch or 2, normalise)
        content, runs = FORMATS[format](network, x, batch is None, json.dumps(about))
        difference = None
        if check and runs is not None and (format != "onnx" or find_spec("onnxruntime")):
            sizes = [batch] if batch else [1, 3]
            difference = max(_difference(plain, runs, example.random(size, normalise)) for size in sizes)
    except RuntimeError as error:  # too little memory
        raise ConfigError(
            f"model: cannot be exported for examples of shape {example.shape}: {one_line(error)}"
        ) from error
    if difference is not None and not difference <= TOLERANCE:
        what = f"outputs of the {format} file differ by {difference:.1e} of the largest"
        raise ConfigError(f"--check: {what}; --no-check writes it all the same")
    return Exported(out, write(out, content).bytes, example.shape, difference)


def _by_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1) if len(values) > 1 else torch.tensor(values[0])


def _difference(network: nn.Module, runs: RunFile, x: Tensor) -> float:
    with torch.no_grad():
        wanted, got = network(x), runs(x)
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
