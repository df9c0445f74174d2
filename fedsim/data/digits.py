"""The 8 x 8 digits that come with scikit-learn: real images that need no download."""

import string

import numpy as np
import torch

from fedsim.data.dataset import Dataset, Fraction, holdout_mask
from fedsim.errors import missing_extra
from fedsim.types import Seed, Stream, random


def digits(*, test_share: Fraction = 0.2, seed: Seed = 0) -> Dataset:
    """Handwritten digits, 1,797 grey images of 8 x 8, 10 classes; comes with scikit-learn.

    The test set is a random `test_share` of each class, which depends on `seed` alone. The 17 grey levels of the
    original are scaled to 0..255.
    Source: Alpaydin and Kaynak, UCI Optical Recognition of Handwritten Digits, 1998.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise missing_extra("data.name: digits", "scikit-learn", "digits") from error
    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(np.rint(images * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    y = torch.from_numpy(labels.astype(np.int64))
    test = torch.from_numpy(holdout_mask(y.numpy(), test_share, random(seed, Stream.DATASET)))
    return Dataset(
        x[~test],
        y[~test],
        x[test],
        y[test],
        classes=10,
        mean=(0.305,),
        std=(0.376,),
        class_names=tuple(string.digits),
    )
