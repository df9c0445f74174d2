"""Federations on real machines, over Flower: what servers and nodes say to each other, keep and allow."""

from importlib.util import find_spec

from fedsim.errors import missing_extra


def needs_flwr(at: str) -> None:
    """Raise ConfigError where flwr is not installed."""
    if find_spec("flwr") is None:
        raise missing_extra(at, "flwr", "flower")
