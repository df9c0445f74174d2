"""The floating-point types in which a device can train."""

import torch

from fedsim.errors import ConfigError

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(precision: str, device: torch.device) -> None:
    """Raise ConfigError if the device cannot train in this precision."""
    if precision in AUTOCAST and not _trains_in(AUTOCAST[precision], device):
        fits = [name for name, dtype in AUTOCAST.items() if name != precision and _trains_in(dtype, device)]
        raise ConfigError(f"local.precision: {device} lacks {precision}; allowed: {', '.join(['fp32', *fits])}")


def _trains_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a convolution's forward and backward pass work there, and not by emulation."""
    if device.type == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(False):
        return False
    w = torch.zeros(1, 1, 3, 3, device=device, requires_grad=True)
    try:
        with torch.autocast(device.type, dtype):
            torch.conv2d(torch.zeros(1, 1, 3, 3, device=device), w).sum().backward()  # type: ignore[no-untyped-call]
    except (RuntimeError, NotImplementedError):
        return False
    return True
