"""Federations on real machines, over Flower: what servers and nodes say to each other, keep and allow."""

from importlib.util import find_spec

from fedsim.errors import ConfigError


def needs_flwr(at: str) -> None:
    """Raise ConfigError where flwr is not installed."""
    if find_spec("flwr") is None:
        raise ConfigError(f"{at}: needs flwr; pip install 'fedsim[flower]'")
