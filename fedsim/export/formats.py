"""The formats of `fedsim export`: ONNX, torch.export, fused weights, TensorRT.

TensorRT comes by way of ONNX. Its few lines follow NVIDIA's manual, and have not been run:
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/python-api-docs.html
"""

import copy
import io
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from fedsim.base.files import untied_copies
from fedsim.errors import ConfigError, how_to_install, one_line

Format = Literal["onnx", "torch", "safetensors", "tensorrt"]
RunFile = Callable[[Tensor], Tensor]  # (B, *shape) to the outputs of a file

NAMES: dict[Format, str] = {  # in the run's folder
    "onnx": "export.onnx",
    "torch": "export.pt2",
    "safetensors": "export.safetensors",
    "tensorrt": "export.engine",
}
BATCHES = 1, 32, 256  # of a TensorRT engine: the smallest, the most likely, the largest


def trtexec(path: Path, shape: tuple[int, ...], batch: int | None = None) -> str:
    """NVIDIA's command that makes a TensorRT engine of an ONNX file."""
    words = ["trtexec", f"--onnx={path}", f"--saveEngine={path.with_suffix('.engine')}"]
    if batch is None:
        sizes = zip(("min", "opt", "max"), BATCHES, strict=True)
        words += [f"--{name}Shapes=x:{'x'.join(map(str, (size, *shape)))}" for name, size in sizes]
    return shlex.join(words)


def _onnx(network: nn.Module, x: Tensor, dynamic: bool, about: str) -> tuple[bytes, RunFile]:
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


def _torch(network: nn.Module, x: Tensor, dynamic: bool, about: str) -> tuple[bytes, RunFile]:
    file = io.BytesIO()
    torch.export.save(_program(network, x, dynamic), file, extra_files={"fedsim.json": about})
    return file.getvalue(), lambda x: torch.export.load(io.BytesIO(file.getvalue())).module()(x)


def _safetensors(network: nn.Module, x: Tensor, dynamic: bool, about: str) -> tuple[bytes, RunFile]:
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


FORMATS: dict[Format, Callable[[nn.Module, Tensor, bool, str], tuple[bytes, RunFile | None]]] = {
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
