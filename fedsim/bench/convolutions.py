"""How fast the ways of `runtime.conv` are, layer by layer: `python -m fedsim.bench.convolutions [DEVICE]`.

A forward and a backward pass of C clients' convolutions, each with weights of its own, B = 10, in float32.
"""

import sys
from collections.abc import Iterator
from time import perf_counter, process_time
from typing import NamedTuple, get_args

import torch
from torch import Tensor
from torch.func import grad, vmap

from fedsim.training.batched.layers import ConvMethod, conv2d

BATCH = 10


class Layer(NamedTuple):
    """A square convolution over square images that keeps their size."""

    name: str
    channels: int
    out: int
    kernel: int
    side: int
    groups: int = 1


LAYERS = (
    Layer("McMahan conv1", 1, 32, 5, 28),
    Layer("McMahan conv2", 32, 64, 5, 14),
    Layer("ResNet 3x3", 64, 64, 3, 32),
    Layer("ResNet 1x1", 64, 256, 1, 16),
    Layer("depthwise 3x3", 96, 96, 3, 16, 96),
)
COHORTS = {"cpu": (4, 10), "cuda": (10, 50, 100)}


def milliseconds(layer: Layer, clients: int, method: ConvMethod, device: torch.device, repeats: int = 5) -> float:
    """The shortest of some passes, forward and backward, for all clients together; on a CPU, of its own time."""
    weight = torch.randn(
        clients, layer.out, layer.channels // layer.groups, layer.kernel, layer.kernel, device=device
    )
    x = torch.randn(clients, BATCH, layer.channels, layer.side, layer.side, device=device)

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        conv = torch.conv2d if method == "grouped" else conv2d
        return conv(x, weight, None, 1, layer.kernel // 2, 1, layer.groups).square().sum()

    both = vmap(grad(loss, argnums=(0, 1)))
    clock, times = process_time if device.type == "cpu" else perf_counter, []
    for _ in range(repeats + 1):
        _wait(device)
        began = clock()
        both(weight, x)
        _wait(device)
        times.append(clock() - began)
    return 1000 * min(times[1:])


def table(device: torch.device) -> Iterator[str]:
    """Its lines."""
    methods: tuple[ConvMethod, ...] = get_args(ConvMethod)
    yield f"{'layer':16} {'clients':>7} " + " ".join(f"{method:>9}" for method in methods) + "  ms"
    for layer in LAYERS:
        for clients in COHORTS[device.type]:
            times = [milliseconds(layer, clients, method, device) for method in methods]
            yield f"{layer.name:16} {clients:7} " + " ".join(f"{time:9.2f}" for time in times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    torch.set_num_threads(1)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    for line in table(torch.device(sys.argv[1] if len(sys.argv) > 1 else default)):
        print(line, flush=True)
