"""Data sets, their partition among clients, and the batches that reach a device."""

from fedsim.base.catalogue import Catalogue
from fedsim.data.dataset import Dataset
from fedsim.data.federated import FederatedData

__all__ = ["AUGMENTATIONS", "DATASETS", "PARTITIONS", "Dataset", "FederatedData"]

DATASETS = Catalogue(
    "data",
    "fedsim.data",
    {
        "digits": "digits:digits",
        "mnist": "vision:mnist",
        "fashion_mnist": "vision:fashion_mnist",
        "emnist": "vision:emnist",
        "cifar10": "vision:cifar10",
        "cifar100": "vision:cifar100",
        "svhn": "vision:svhn",
        "npz": "npz:npz",
        "image_folder": "image_folder:image_folder",
        "synthetic": "synthetic:synthetic",
        "synthetic_alpha_beta": "synthetic:synthetic_alpha_beta",
        "synthetic_iid": "synthetic:synthetic_iid",
    },
)

PARTITIONS = Catalogue(
    "data.partition",
    "fedsim.data",
    {
        "iid": "partition:iid",
        "shards": "partition:shards",
        "dirichlet": "partition:dirichlet",
        "quantity": "partition:quantity",
        "labels": "partition:labels",
        "natural": "partition:natural",
    },
)

AUGMENTATIONS = Catalogue(
    "local.augment",
    "fedsim.data",
    {
        "random_crop": "augment:random_crop",
        "flip": "augment:flip",
        "rotation": "augment:rotation",
        "color_jitter": "augment:color_jitter",
        "cutout": "augment:cutout",
        "random_resized_crop": "augment:random_resized_crop",
        "mixup": "augment:mixup",
        "cutmix": "augment:cutmix",
    },
)
