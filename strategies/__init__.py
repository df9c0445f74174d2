"""Federated algorithms: one file each, with the client's and the server's part."""

if __name__ == "strategies":  # two names for one file would make two classes of everything in it
    raise ImportError("import fedsim.strategies; a bare `import strategies` finds the checkout by accident")

from fedsim import Catalogue

CATALOGUE = Catalogue(
    "strategy",
    "fedsim.strategies",
    {
        "fedavg": "fedavg:FedAvg",
        "fedsgd": "fedsgd:FedSGD",
        "fedprox": "fedprox:FedProx",
        "scaffold": "scaffold:Scaffold",
        "fedadam": "fedadam:FedAdam",
        "fedyogi": "fedadam:FedYogi",
        "fedadagrad": "fedadam:FedAdagrad",
        "fedbn": "fedbn:FedBN",
        "personal": "personal:Personal",
    },
)
