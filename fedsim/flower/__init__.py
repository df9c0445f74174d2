"""Federations on real machines, over Flower: what servers and nodes say to each other, keep and allow."""

from importlib.metadata import PackageNotFoundError, version

from fedsim.errors import ConfigError, missing_extra

FLWR = "flwr>=1.41,<1.43"  # the versions whose internals are known; also an extra in pyproject.toml
KNOWN = ("1.41", "1.42")


def needs_flwr(at: str) -> None:
    """Raise ConfigError where flwr is not installed, or not in a version that fedsim works with."""
    try:
        found = version("flwr")
    except PackageNotFoundError:
        raise missing_extra(at, "flwr", "flower") from None
    if ".".join(found.split(".")[:2]) not in KNOWN:
        raise ConfigError(f"{at}: needs flwr {' or '.join(KNOWN)}, and {found} is installed; pip install '{FLWR}'")
