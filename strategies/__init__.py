"""Federated algorithms: one file each, with the client's and the server's part."""

if __name__ == "strategies":  # two names for one file would make two classes of everything in it
    raise ImportError("import fedsim.strategies; a bare `import strategies` finds the checkout by accident")

from fedsim import Catalogue

CATALOGUE = Catalogue(
    "strategy",
    "fedsim.strategies",
    {
        "fedavg": "averaging.fedavg:FedAvg",
        "fednova": "averaging.fednova:FedNova",
        "fedsgd": "averaging.fedsgd:FedSGD",
        "fedprox": "drift.fedprox:FedProx",
        "scaffold": "drift.scaffold:Scaffold",
        "feddyn": "drift.feddyn:FedDyn",
        "feddc": "drift.feddc:FedDC",
        "fedsam": "drift.fedsam:FedSAM",
        "moon": "drift.moon:Moon",
        "mimelite": "drift.mimelite:MimeLite",
        "mime": "drift.mime:Mime",
        "fedlin": "drift.fedlin:FedLin",
        "fedadam": "adaptive.fedadam:FedAdam",
        "fedyogi": "adaptive.fedadam:FedYogi",
        "fedadagrad": "adaptive.fedadam:FedAdagrad",
        "fedavgm": "adaptive.fedavgm:FedAvgM",
        "fedopt": "adaptive.fedopt:FedOpt",
        "qfedavg": "fair.qfedavg:QFedAvg",
        "afl": "fair.afl:AFL",
        "power_of_choice": "selection.power_of_choice:PowerOfChoice",
        "median": "robust.median:Median",
        "fltrust": "robust.fltrust:FLTrust",
        "krum": "robust.krum:Krum",
        "fedbn": "personal.fedbn:FedBN",
        "fedrep": "personal.fedrep:FedRep",
        "fedbabu": "personal.fedbabu:FedBABU",
        "finetune": "personal.finetune:FineTune",
        "personal": "personal.personal:Personal",
    },
)
