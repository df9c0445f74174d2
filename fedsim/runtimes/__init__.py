"""Runtimes, which run clients; each is a `fedsim.federated.runtime.Runtime`."""

from fedsim.base.catalogue import Catalogue

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
