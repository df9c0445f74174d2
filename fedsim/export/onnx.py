"""A run's network for use elsewhere: ONNX, torch.export, TensorRT, or fused weights.

The network is the global model in evaluation, and batch norms are folded into its convolutions (fusion.py). A
file says what it is: under the key `fedsim` of its metadata (of a .pt2, in the file fedsim.json) lies JSON with
the model, the classes, the shape of an example and the constants that normalise it. Fused weights fit
`fused(network)`.

TensorRT comes by way of ONNX. Its few lines follow NVIDIA's manual, and have not been run:
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/python-api-docs.html
"""

import copy
import io
import json
import os
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from fedsim.base.files import untied_copies, write
from fedsim.base.machine import gigabytes, memory
from fedsim.base.reading import open_regular
from fedsim.errors import ConfigError, how_to_install, one_line
from fedsim.experiment.config import Config
from fedsim.experiment.config import load as load_config
from fedsim.export.fusion import fused
from fedsim.models.options import make
from fedsim.types import Count

Format = Literal["onnx", "torch", "safetensors", "tensorrt"]
Run = Callable[[Tensor], Tensor]  # a file, on examples

NAMES: dict[Format, str] = {  # in the run's folder
    "onnx": "export.onnx",
    "torch": "export.pt2",
    "safetensors": "export.safetensors",
    "tensorrt": "export.engine",
}
MOST = 2**28  # numbers in an example, and classes
TOLERANCE = 1e-4  # of a file's outputs, as a share of the largest
BATCHES = 1, 32, 256  # of a TensorRT engine: the smallest, the most likely, the largest


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


class Told(BaseModel):
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


def trained(run: Path, *, ema: bool = False) -> Trained:
    """The network of a run's folder, or with `ema` its running mean; no data is read. Raises ConfigError."""
    config, told = load_config(run / "config.yaml"), _told(run)
    spec = config.model if isinstance(config.model, Mapping) else {"name": config.model}
    with torch.random.fork_rng(devices=[]):
        network = made(_bare(spec), told.example.shape, told.classes)
    path = run / ("ema.safetensors" if ema else "model.safetensors")
    if ema and not path.exists():
        raise ConfigError(f"--ema: {run} has no {path.name}, as runs have whose config sets `ema`")
    try:
        open_regular(path).close()
        with safe_open(path, framework="pt") as file:
            network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (SafetensorError, RuntimeError) as error:
        raise ConfigError(f"{path}: does not hold the weights of the run's network: {one_line(error)}") from None
    return Trained(network.eval(), config, told.example, told.classes)


def made(spec: Mapping[str, object], shape: tuple[int, ...], classes: int) -> nn.Module:
    """The network that a spec describes; raises ConfigError also where this machine cannot hold it."""
    at = f"model: cannot be made for {one_line(classes)} classes and examples of shape {one_line(shape)}"
    if max(prod(shape), classes) > MOST:
        raise ConfigError(f"{at}: neither may have more than {MOST:,}")
    with suppress(RuntimeError, TypeError), torch.device("meta"):  # on which not every factory can do its work
        needed = sum(value.nbytes for value in make(_bare(spec), shape, classes).state_dict().values())
        if needed > memory() // 2:
            raise ConfigError(f"{at}: it has {gigabytes(needed)}, more than half of this machine's memory")
    try:
        return make(spec, shape, classes)
    except (RuntimeError, MemoryError) as error:
        raise ConfigError(f"{at}: {one_line(error)}") from error


def writable(path: Path, at: str) -> None:
    """Raises ConfigError that begins with `at` where no file can be written: told before the work, not after."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{at}: {path} cannot be written; is there such a folder?")


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
    writable(out, "--out")
    plain, config, example, classes = trained(run, ema=ema)
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


def trtexec(path: Path, shape: tuple[int, ...], batch: int | None = None) -> str:
    """NVIDIA's command that makes a TensorRT engine of an ONNX file."""
    words = ["trtexec", f"--onnx={path}", f"--saveEngine={path.with_suffix('.engine')}"]
    if batch is None:
        sizes = zip(("min", "opt", "max"), BATCHES, strict=True)
        words += [f"--{name}Shapes=x:{'x'.join(map(str, (size, *shape)))}" for name, size in sizes]
    return shlex.join(words)


def _onnx(network: nn.Module, x: Tensor, dynamic: bool, about: str) -> tuple[bytes, Run]:
    program = torch.onnx.export(
        _program(network, x, dynamic),
        dynamo=True,
        verbose=False,
        input_names=["x"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},) if dynamic else None,
    )
    assert program is not None
    program.model.metadata_props["fedsim"] = about
    content: bytes = program.model_proto.SerializeToString()

    def run(x: Tensor) -> Tensor:
        from onnxruntime import InferenceSession

        session = InferenceSession(content, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    return content, run


def _torch(network: nn.Module, x: Tensor, dynamic: bool, about: str) -> tuple[bytes, Run]:
    file = io.BytesIO()
    torch.export.save(_program(network, x, dynamic), file, extra_files={"fedsim.json": about})
    return file.getvalue(), lambda x: torch.export.load(io.BytesIO(file.getvalue())).module()(x)


def _safetensors(network: nn.Module, x: Tensor, dynamic: bool, about: str) -> tuple[bytes, Run]:
    content = save(untied_copies(network.state_dict()), {"fedsim": about})

    def run(x: Tensor) -> Tensor:
        other = copy.deepcopy(network)
        other.load_state_dict(load(content))
        return other(x)  # type: ignore[no-any-return]

    return content, run


def _tensorrt(network: nn.Module, x: Tensor, dynamic: bool, about: str) -> tuple[bytes, None]:
    content, _ = _onnx(network, x, dynamic, about)
    import tensorrt as trt

    builder = trt.Builder(log := trt.Logger(trt.Logger.WARNING))
    parser = trt.OnnxParser(built := builder.create_network(0), log)
    if not parser.parse(content):
        raise ConfigError(f"--format: tensorrt cannot read the network: {one_line(parser.get_error(0))}")
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    if dynamic:
        profile.set_shape("x", *((size, *x.shape[1:]) for size in BATCHES))
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(built, config)
    if engine is None:
        raise ConfigError("--format: tensorrt cannot build the network; trtexec --verbose says why")
    return bytes(engine), None


FORMATS: dict[Format, Callable[[nn.Module, Tensor, bool, str], tuple[bytes, Run | None]]] = {
    "onnx": _onnx,
    "torch": _torch,
    "safetensors": _safetensors,
    "tensorrt": _tensorrt,
}
EXTRA = how_to_install("export")
NEEDS: dict[Format, dict[str, str]] = {
    "onnx": {"onnx": EXTRA, "onnxscript": EXTRA},
    "torch": {},
    "safetensors": {},
    "tensorrt": {
        "tensorrt": "pip install tensorrt installs it, or export onnx and run NVIDIA's trtexec",
        "onnx": EXTRA,
        "onnxscript": EXTRA,
    },
}


def _program(network: nn.Module, x: Tensor, dynamic: bool) -> torch.export.ExportedProgram:
    try:
        shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
        return torch.export.export(network, (x,), dynamic_shapes=shapes)
    except Exception as error:  # whatever a forward pass does to a stand-in for its input
        fixed = ", or not with any number of examples: try --batch 1" if dynamic else ""
        raise ConfigError(f"model: cannot be exported{fixed}: {one_line(error)}") from error


def _bare(spec: Mapping[str, object]) -> dict[str, object]:
    """Without weights from elsewhere: where a network began does not matter to what it is."""
    return {key: value for key, value in spec.items() if key not in ("weights", "pretrained", "new_head")}


def _by_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1) if len(values) > 1 else torch.tensor(values[0])


def _difference(network: nn.Module, runs: Run, x: Tensor) -> float:
    with torch.no_grad():
        wanted, got = network(x), runs(x)
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


def _told(run: Path) -> Told:
    path = run / "partition.json"
    try:
        with open_regular(path) as file:
            return Told.model_validate_json(file.read())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; is its folder that of a run?") from None
    except ValueError:
        raise ConfigError(f"{path}: does not say what an example is; fedsim resume {run} writes it anew") from None
