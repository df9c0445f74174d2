"""Synthetic data: images for quick trials, and the federations of the FedProx paper."""

from math import prod

import numpy as np
import torch

from fedsim.base.machine import check_memory
from fedsim.data.dataset import Dataset, Floats, holdout_mask
from fedsim.types import Count, NonNegative, Seed, Stream, random

PIXELS_PER_BLOCK = 2**22  # pixels drawn at once, so that the memory for noise does not grow with the data
LABEL_BYTES = 2 * 8  # of a label and its row number
FEATURES, CLASSES = 60, 10
MIN_EXAMPLES = 50  # of a device


def synthetic(
    *,
    examples: Count = 10_000,
    test_examples: Count = 1_000,
    classes: Count = 10,
    shape: tuple[Count, Count, Count] = (1, 8, 8),
    noise: NonNegative = 0.2,
    seed: Seed = 0,
) -> Dataset:
    """Images of one random picture for each class plus noise: any number, of any shape, made quickly.

    `shape` is (C, height, width). The pixels of the pictures are uniform in 0..1, and `noise` is the standard
    deviation of the Gaussian noise added to them. The label of example i is i modulo `classes`.
    """
    pixels_each, count = prod(shape), examples + test_examples
    check_memory(
        f"data: {count:,} examples of {pixels_each:,} pixels and {classes:,} classes need",
        count * (pixels_each + LABEL_BYTES) + 4 * classes * pixels_each,
        "lower data.examples, data.test_examples, data.classes or data.shape",
    )
    rng = random(seed, Stream.DATASET)
    pictures = rng.random((classes, *shape), dtype=np.float32)
    y = np.arange(examples + test_examples) % classes
    x = np.empty((len(y), *shape), dtype=np.uint8)
    step = max(1, PIXELS_PER_BLOCK // pixels_each)
    for start in range(0, len(y), step):
        block = slice(start, start + step)
        pixels = rng.standard_normal(x[block].shape, dtype=np.float32)
        pixels *= noise
        pixels += pictures[y[block]]
        x[block] = np.rint(pixels.clip(0, 1, out=pixels) * 255)
    x_all, y_all = torch.from_numpy(x), torch.from_numpy(y)
    return Dataset(
        x_all[:examples],
        y_all[:examples],
        x_all[examples:],
        y_all[examples:],
        classes,
        mean=(0.5,),
        std=(0.5,),
    )


def synthetic_alpha_beta(
    *,
    alpha: NonNegative = 1.0,
    beta: NonNegative = 1.0,
    devices: Count = 30,
    seed: Seed = 0,
) -> Dataset:
    """Synthetic(alpha, beta): 60 features, 10 classes, heterogeneous natural clients (arXiv 1812.06127).

    Li et al. 2020, section 5.1, after Shamir et al. 2014. Device k: y = argmax(W_k x + b_k), entries of W_k
    and b_k ~ N(u_k, 1), u_k ~ N(0, alpha); x ~ N(v_k, Sigma), Sigma_jj = j^-1.2, entries of v_k ~ N(B_k, 1),
    B_k ~ N(0, beta). As in the authors' code, alpha and beta are standard deviations, a device has
    50 + lognormal(4, 2) examples, and a tenth of them are for testing. With `partition: {name: natural}` each
    device is a client.
    """
    _check_devices(devices, MIN_EXAMPLES * devices)
    rng = random(seed, Stream.DATASET)
    u, big_b = rng.normal(0, alpha, devices), rng.normal(0, beta, devices)
    v = rng.normal(big_b[:, None], 1, (devices, FEATURES))
    weights = rng.normal(u[:, None, None], 1, (devices, CLASSES, FEATURES))
    biases = rng.normal(u[:, None], 1, (devices, CLASSES))
    return _devices(v, weights, biases, rng)


def synthetic_iid(*, devices: Count = 30, seed: Seed = 0) -> Dataset:
    """Synthetic-IID: like synthetic_alpha_beta, but all devices have one model and one distribution of x.

    Li et al. 2020, section 5.1: entries of W and b ~ N(0, 1), x ~ N(0, Sigma).
    """
    _check_devices(devices, MIN_EXAMPLES * devices)
    rng = random(seed, Stream.DATASET)
    weights, biases = rng.normal(size=(CLASSES, FEATURES)), rng.normal(size=CLASSES)
    v = np.zeros((devices, FEATURES))
    return _devices(v, np.broadcast_to(weights, (devices, *weights.shape)), np.tile(biases, (devices, 1)), rng)


def _check_devices(devices: int, examples: int) -> None:
    """Raise ConfigError where `devices`, each with a model, and all their `examples` do not fit into memory."""
    needed = 8 * (devices * (CLASSES + 1) * (FEATURES + 1) + examples * (2 * FEATURES + 4))
    check_memory(f"data.devices: {devices:,} devices with {examples:,} examples or more need", needed, "lower it")


def _devices(v: Floats, weights: Floats, biases: Floats, rng: np.random.Generator) -> Dataset:
    """Draws the examples of each device. Shapes: v (N, 60), weights (N, 10, 60), biases (N, 10)."""
    sizes = MIN_EXAMPLES + rng.lognormal(4, 2, len(v)).astype(np.int64)
    _check_devices(len(v), int(sizes.sum()))
    owner = np.repeat(np.arange(len(v)), sizes)
    x = rng.normal(v[owner], np.arange(1, FEATURES + 1) ** -0.6)  # the square root of Sigma_jj
    parts = np.split(x, np.cumsum(sizes)[:-1])
    y = np.concatenate([(part @ w.T + b).argmax(1) for part, w, b in zip(parts, weights, biases, strict=True)])
    test = holdout_mask(owner, 0.1, rng)
    x_train, y_train, owner_train = (torch.from_numpy(a[~test]) for a in (x, y, owner))
    return Dataset(
        x_train.float(),
        y_train,
        torch.from_numpy(x[test]).float(),
        torch.from_numpy(y[test]),
        CLASSES,
        owner=owner_train,
    )
