"""Runtimes, which run clients; each is a `fedsim.federated.runtime.Runtime`."""

from fedsim.base.catalogue import Catalogue, Spec
from fedsim.errors import ConfigError
from fedsim.federated.runtime import Runtime

RUNTIMES = Catalogue(
    "runtime",
    "fedsim",
    {
        "auto": "runtimes.auto:Auto",
        "serial": "runtimes.serial:Serial",
        "threads": "runtimes.threads:Threads",
        "vectorized": "runtimes.vectorized:Vectorized",
        "ray": "runtimes.ray:Ray",
        "flower": "flower.runtime:Flower",
    },
)


def runtime_class(spec: Spec | str) -> type[Runtime]:
    """The class that a config's `runtime` names; raises ConfigError."""
    name = RUNTIMES.resolve(spec)["name"]
    found = RUNTIMES.load(name)
    if not (isinstance(found, type) and issubclass(found, Runtime)):
        raise ConfigError(f"runtime.name: {name} should be a class derived from fedsim.federated.runtime.Runtime")
    return found
