"""Laws of data sets and batches: a client gets what its files hold, and an error names the bad file."""

import gzip
import io
import os
import re
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import center_crop, resize

from fedsim.base.machine import memory
from fedsim.data import DATASETS, Dataset, FederatedData
from fedsim.data.image_file import EXTENSIONS, FORMATS, read_image
from fedsim.errors import ConfigError
from fedsim.experiment.build import build_data
from fedsim.experiment.config import resolve
from fedsim.experiment.folder import describe

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)  # (n, height, width, C)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def load(name, **options):
    return DATASETS.bind({"name": name, **options})()


def refused(message, name, **options):
    """Loading the data set raises a ConfigError of one line that matches `message`."""
    with pytest.raises(ConfigError, match=message) as caught:
        load(name, **options)
    assert "\n" not in str(caught.value)


def arrays(**changes):
    return {"x_train": PIXELS, "y_train": LABELS, "x_test": PIXELS[:2], "y_test": LABELS[:2]} | changes


def write_npz(path, **changes):
    np.savez(path, **{k: v for k, v in arrays(**changes).items() if v is not None})
    return str(path)


def write_folder(path, **changes):
    path.mkdir(exist_ok=True)
    for name, array in arrays(**changes).items():
        if array is not None:
            np.save(path / f"{name}.npy", array)
    return str(path)


def federated(data, **options):
    n = len(data.y_train)
    return FederatedData(data, np.zeros(n, dtype=np.int64), clients=1, **options)


# Batches


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("mean", "std"),
    [((), ()), ((0.4,), (0.2,)), ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))],
    ids=["none", "one", "each"],
)
def test_a_batch_is_the_normalised_rows(dtype, mean, std):
    x = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).contiguous()
    y = torch.from_numpy(LABELS)
    data = federated(Dataset(x, y, x[:5], y[:5], 3, mean, std), dtype=dtype)
    rows = torch.tensor([4, 0, 4])
    m, s = (torch.tensor(v or [e], dtype=torch.float64).view(-1, 1, 1) for v, e in ((mean, 0.0), (std, 1.0)))
    got, labels = data.batch(rows)
    assert got.dtype == dtype
    torch.testing.assert_close(got, ((x[rows].double() / 255 - m) / s).to(dtype))
    assert torch.equal(labels, y[rows])
    assert (data.num_test, data.shape, data.num_classes) == (5, (3, 5, 4), 3)
    torch.testing.assert_close(data.test_batch(rows)[0], got)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1e-300), (1e300, 1.0)])
def test_a_normalisation_that_is_not_finite_is_refused(mean, std):
    x, y = torch.zeros(6, 2), torch.from_numpy(LABELS)
    with pytest.raises(ConfigError, match=r"^data\.std: .* is not finite"):
        federated(Dataset(x, y, x, y, 3, (mean,), (std,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float_examples_are_not_changed_and_never_aliased(dtype):
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
    data = federated(Dataset(x, torch.from_numpy(LABELS), x, torch.from_numpy(LABELS), 3), dtype=dtype)
    for batch in (data.batch, data.test_batch):
        got = batch(torch.arange(6))[0]
        assert torch.equal(got, x.to(dtype))
        got.zero_()
    assert x.count_nonzero() == x.numel()


def test_data_moved_to_a_device_shares_the_row_numbers():
    x, y = torch.from_numpy(PIXELS).permute(0, 3, 1, 2), torch.from_numpy(LABELS)
    data = federated(Dataset(x, y, x, y, 3), holdout=0.5)
    moved = data.to("meta")
    assert moved.rows(0).base is data.rows(0).base
    assert moved.batch(torch.arange(2))[0].device.type == "meta"
    assert data.batch(torch.arange(2))[0].device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("mapped", [False, True])
def test_a_batch_is_the_same_on_a_gpu(tmp_path, mapped):
    source = write_folder(tmp_path / "f") if mapped else write_npz(tmp_path / "a.npz")
    data = federated(load("npz", path=source, mean=[0.5], std=[0.5]))
    x, y = data.to("cuda").batch(torch.tensor([3, 1]))
    assert x.is_cuda
    assert y.is_cuda
    torch.testing.assert_close(x.cpu(), data.batch(torch.tensor([3, 1]))[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": torch.zeros(6, 5, 4, dtype=torch.uint8)}, r"x_train is uint8 \(6, 5, 4\); allowed"),
        ({"x_train": torch.zeros(6, 2, dtype=torch.float64)}, "x_train is float64"),
        ({"x_train": torch.zeros(0, 2)}, "at least one example"),
        ({"x_train": torch.full((6, 2), torch.nan)}, "not finite"),
        ({"x_test": torch.zeros(2, 3)}, "should have the same type and shape"),
        (
            {"y_train": torch.zeros(5, dtype=torch.int64)},
            r"y_train is int64 \(5,\); it should be int64 \(6,\)",
        ),
        ({"y_train": torch.zeros(6)}, "y_train is float32"),
        ({"y_test": torch.tensor([0, 3])}, "y_test has numbers from 0 to 3; allowed: 0 to 2"),
        ({"y_train": torch.full((6,), -1)}, "from -1"),
        ({"owner": torch.zeros(2, dtype=torch.int64)}, "owner is int64"),
        ({"mean": (0.5,)}, "1 and 0 numbers"),
        ({"mean": (0.5, 0.5), "std": (1.0, 1.0)}, "each of the 1 channels"),
        ({"mean": (0.5,), "std": (0.0,)}, r"data\.std"),
    ],
)
def test_a_dataset_that_does_not_fit_together_is_refused(changes, message):
    y = torch.from_numpy(LABELS)
    fields = {
        "x_train": torch.zeros(6, 2),
        "y_train": y,
        "x_test": torch.zeros(2, 2),
        "y_test": y[:2],
        "classes": 3,
    }
    with pytest.raises(ConfigError, match=message):
        Dataset(**fields | changes)


# npz: the user's own arrays


@pytest.mark.parametrize("write", [write_npz, write_folder])
def test_images_become_channels_first(tmp_path, write):
    expected = torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).copy())
    last = load("npz", path=write(tmp_path / "last.npz"))
    assert torch.equal(last.x_train, expected)
    assert (last.classes, last.mapped) == (3, write is write_folder)
    first = {"x_train": expected.numpy(), "x_test": expected[:2].numpy()}
    assert torch.equal(
        load("npz", path=write(tmp_path / "first.npz", **first), channels="first").x_train, expected
    )
    grey = {"x_train": PIXELS[..., 0], "x_test": PIXELS[:2, ..., 0]}
    assert torch.equal(load("npz", path=write(tmp_path / "grey.npz", **grey)).x_train, expected[:, :1])


def test_other_arrays_are_not_changed(tmp_path):
    features = RNG.normal(size=(6, 7))
    file = write_npz(tmp_path / "a.npz", x_train=features, x_test=features[:2], owner=np.array([0, 0, 1, 1, 2, 2]))
    data = load("npz", path=file, classes=5)
    assert torch.equal(data.x_train, torch.from_numpy(features).float())
    assert data.owner.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.classes == 5


@pytest.mark.parametrize("write", [write_npz, write_folder])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "has no y_test"),
        ({"x_train": None, "y_test": None}, "has no x_train and no y_test"),
        ({"y_train": LABELS[:-1]}, r"y_train is int64 \(5,\)"),
        ({"y_train": LABELS[:, None]}, r"y_train is int64 \(6, 1\)"),
        ({"y_train": LABELS.astype(float)}, "y_train is float64; allowed: whole numbers"),
        ({"y_train": LABELS - 1}, "from -1 to 1"),
        ({"x_test": PIXELS[:2, :3]}, "should have the same type and shape"),
        ({"x_test": PIXELS[:2].astype(np.float32)}, "should have the same type and shape"),
        ({"x_train": PIXELS.astype(np.int64)}, "x_train is int64; allowed: uint8 or float32"),
        ({"x_train": np.array(["a"] * 6)}, "x_train is <U1"),
        ({"x_train": PIXELS[:0], "y_train": LABELS[:0]}, "at least one example|not a readable plain array"),
        ({"x_train": PIXELS[:, 0, 0]}, r"uint8 \(6, 3\); allowed: uint8 of 4 dimensions"),
        ({"y_test": np.array([0, {}], dtype=object)}, "ValueError"),
        ({"owner": np.array([0, 0, 1, 1, 2, -1])}, "owner has numbers from -1; allowed"),
        ({"owner": np.array(list("abcde"))}, r"owner is int64 \(5,\)"),
        ({"owner": np.array([list("abcdef")])}, r"owner is <U1 \(1, 6\); allowed: whole numbers or text"),
        ({"owner": np.array(list("abcdef"), "S1")}, "owner is [|]S1; allowed: numbers or text"),
        ({"owner": np.array([0.0] * 6)}, "owner is float64"),
        (
            {"x_train": PIXELS.transpose(0, 3, 1, 2)},
            r"x_train has images of shape \(3, 5, 4\)|should have the same",
        ),
        ({"x_train": np.array(1.0)}, r"x_train is float64 \(\); it should hold at least one"),
        ({"y_train": np.array(1)}, r"y_train is int64 \(\)"),
        ({"y_train": LABELS.astype(bool)}, "y_train is bool; allowed: whole numbers"),
        ({"y_train": np.eye(3, dtype=int)[LABELS]}, r"y_train is int64 \(6, 3\); it should be int64 \(6,\)"),
        ({"x_train": PIXELS.astype(np.uint16)}, "x_train is uint16; allowed: uint8 or float32"),
        ({"x_train": PIXELS.astype(bool)}, "x_train is bool; allowed: uint8 or float32"),
        ({"x_train": PIXELS.astype(complex)}, "x_train is complex128; allowed: numbers"),
        ({"x_train": PIXELS.astype("M8[s]")}, r"x_train is datetime64\[s\]; allowed: numbers"),
    ],
)
def test_arrays_that_do_not_fit_name_their_file(tmp_path, write, changes, message):
    path = write(tmp_path / "mine.npz", **changes)
    refused(re.escape(path) + ".*(" + message + ")", "npz", path=path)


def features(values, dtype=np.float64):
    return {"x_train": np.array([values] * 6, dtype), "x_test": np.array([values] * 2, dtype)}


@pytest.mark.parametrize(
    ("values", "dtype", "change"),
    [
        ([0.5, 2.0**24], np.float64, None),
        ([0.1, 1e-3], np.float16, None),
        ([0.5, 1.7e9 + 50], np.float64, "50"),  # seconds since 1970
        ([1e-50, 0.5], np.float64, "1e-50"),
    ],
)
def test_rounding_to_float32_is_told(tmp_path, caplog, values, dtype, change):
    data = load("npz", path=write_npz(tmp_path / "a.npz", **features(values, dtype)))
    assert torch.equal(data.x_test[0], torch.tensor(np.array(values, dtype)).float())
    told = [f"data.path: x_{part} is float64 and becomes float32, by which its numbers change by up to {change}"
            for part in ("train", "test")]  # fmt: skip
    assert caplog.messages == (told if change else [])


def test_numbers_that_float32_cannot_hold_are_refused(tmp_path):
    path = write_npz(tmp_path / "a.npz", **features([0.5, 1e39]))
    refused(f"{path}: x_train is float64, and has numbers that are too large", "npz", path=path)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("write", [write_npz, write_folder])
def test_the_order_in_memory_does_not_matter(tmp_path, write, order):
    x = np.asarray(PIXELS, order=order)
    data = load("npz", path=write(tmp_path / "a.npz", x_train=x, y_train=LABELS.astype(">i2")))
    assert data.x_train.numpy().tolist() == PIXELS.transpose(0, 3, 1, 2).tolist()
    assert data.y_train.tolist() == LABELS.tolist()
    big = {name: array.astype(">f4") for name, array in features([1.5, 2.5]).items()}
    assert load("npz", path=write_npz(tmp_path / "b.npz", **big)).x_test[0].tolist() == [1.5, 2.5]


def test_channels_that_come_first_are_not_taken_for_the_width(tmp_path):
    first = {"x_train": np.zeros((6, 3, 8, 8), np.uint8), "x_test": np.zeros((2, 3, 8, 8), np.uint8)}
    path = write_npz(tmp_path / "a.npz", **first)
    refused(r"shape \(3, 8, 8\); set data.channels to first, or to last if they have 8", "npz", path=path)
    assert load("npz", path=path, channels="first").x_train.shape == (6, 3, 8, 8)
    assert load("npz", path=path, channels="last").x_train.shape == (6, 8, 3, 8)


@pytest.mark.parametrize("write", [write_npz, write_folder])
@pytest.mark.parametrize(
    ("owner", "numbers", "names"),
    [
        (["Bonn", "Bonn", "Aix", "Aix", "Bonn", "\x1b[2J"], [2, 2, 1, 1, 2, 0], ("\\x1b[2J", "Aix", "Bonn")),
        ([700, 700, 9, 9, 700, 9], [1, 1, 0, 0, 1, 0], ("9", "700")),
        ([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2], ()),
    ],
)
def test_owners_may_have_any_names(tmp_path, write, owner, numbers, names):
    data = load("npz", path=write(tmp_path / "a.npz", owner=np.array(owner)))
    assert (data.owner.tolist(), data.owner_names) == (numbers, names)


@pytest.mark.parametrize("write", [write_npz, write_folder])
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_machine_needs_only_the_training_or_the_test_arrays(tmp_path, write, part):
    other = {"train": "test", "test": "train"}[part]
    path = write(tmp_path / "mine.npz", **{f"x_{other}": None, f"y_{other}": None})
    data = load("npz", path=path)
    there, missing = getattr(data, f"x_{part}"), getattr(data, f"x_{other}")
    assert (len(there), len(missing)) == (len(arrays()[f"x_{part}"]), 0)
    assert (there.shape[1:], there.dtype) == (missing.shape[1:], missing.dtype)
    data.check_parts(part)
    word = {"train": "training", "test": "test"}[other]
    for refuse in (
        lambda: data.check_parts("train", "test"),
        lambda: build_data(resolve({"rounds": 1, "model": "2nn", "strategy": "fedavg", "cohort": "all",
                                    "data": {"name": "npz", "path": path, "clients": 1}})),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"data: has no {word} examples"):
            refuse()


def test_broken_files_name_themselves(tmp_path):
    whole = Path(write_npz(tmp_path / "whole.npz")).read_bytes()
    for name, content in (
        ("cut", whole[:-200]),
        ("text", b"hello"),
        ("empty", b""),
        ("zip", gzip.compress(whole)),
    ):
        file = tmp_path / f"{name}.npz"
        file.write_bytes(content)
        refused(f"{file} is not an .npz file of plain arrays", "npz", path=str(file))
    flipped = bytearray(whole)
    flipped[400] ^= 255
    (tmp_path / "flipped.npz").write_bytes(flipped)
    refused("flipped.npz is not an .npz", "npz", path=str(tmp_path / "flipped.npz"))
    np.save(tmp_path / "single.npy", PIXELS)
    refused("single.npy is not an .npz", "npz", path=str(tmp_path / "single.npy"))
    refused("absent.npz: no such file", "npz", path=str(tmp_path / "absent.npz"))
    folder = Path(write_folder(tmp_path / "folder"))
    (folder / "x_test.npy").write_bytes((folder / "x_test.npy").read_bytes()[:-1])
    refused("x_test.npy is not a readable plain array", "npz", path=str(folder))
    write_folder(folder, x_test=PIXELS[:2].astype(np.float64))
    refused("x_test is float64; allowed", "npz", path=str(folder))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_a_mapped_folder_may_be_larger_than_memory(tmp_path):
    def resident():
        return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024

    n = memory() // (256 * 256 * 3) * 2
    folder = Path(
        write_folder(tmp_path / "big", y_train=np.arange(n) % 3, x_test=np.zeros((2, 256, 256, 3), np.uint8))
    )
    shape = (n, 256, 256, 3)
    np.lib.format.open_memmap(folder / "x_train.npy", mode="w+", dtype=np.uint8, shape=shape)[-1] = 255  # sparse
    before = resident()
    data = load("npz", path=str(folder), mean=[0.5], std=[0.5])
    batch, _ = federated(data).batch(torch.tensor([0, n - 1]))
    assert torch.equal(batch, torch.tensor([-1.0, 1.0])[:, None, None, None].expand_as(batch))
    assert resident() - before < 100e6
    (folder / "x_train.npy").unlink()


# Data sets of torchvision


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx(folder, train="train", test="t10k", first=0, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    images = RNG.integers(0, 256, (6, 28, 28))
    for part, n in ((train, 6), (test, 3)):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(images[:n]))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(LABELS[:n] + first))
    return images


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_idx_files_are_read_as_they_are(tmp_path, name, folder):
    images = write_idx(tmp_path / folder / "raw")
    data = load(name, root=str(tmp_path))
    np.testing.assert_array_equal(data.x_train[:, 0], images)
    np.testing.assert_array_equal(data.y_test, LABELS[:3])


@pytest.mark.parametrize(("split", "first", "classes"), [("balanced", 0, 47), ("letters", 1, 26)])
def test_emnist_is_upright_and_numbered_from_0(tmp_path, split, first, classes):
    files = {"train": f"emnist-{split}-train", "test": f"emnist-{split}-test"}
    images = write_idx(tmp_path / "EMNIST" / "raw", first=first, **files)
    data = load("emnist", split=split, root=str(tmp_path))
    np.testing.assert_array_equal(data.x_train[:, 0], images.transpose(0, 2, 1))
    np.testing.assert_array_equal(data.y_train, LABELS)
    assert data.classes == classes
    assert data.class_names[10] == {"balanced": "A", "letters": "k"}[split]


def test_broken_idx_files_name_their_folder(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    message = rf"data\.root: files of {folder} are missing or broken .* data\.download=true"
    for file, change in (
        ("train-images-idx3-ubyte", lambda whole: whole[:-5]),
        ("train-images-idx3-ubyte", lambda whole: whole[:7]),
        ("t10k-labels-idx1-ubyte", lambda whole: b""),
        ("train-labels-idx1-ubyte", lambda whole: idx(LABELS[:-1])),
        ("train-labels-idx1-ubyte", lambda whole: idx(LABELS + 9)),
    ):
        write_idx(folder)
        (folder / file).write_bytes(change((folder / file).read_bytes()))
        refused(message, "mnist", root=str(tmp_path))
    (folder / "t10k-images-idx3-ubyte").unlink()
    refused(message, "mnist", root=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "folder"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python"), ("svhn", "")]
)
def test_missing_and_broken_files_say_how_to_get_them(tmp_path, name, folder):
    if name == "svhn":
        pytest.importorskip("scipy")
    message = rf"data\.root: files of {tmp_path / folder} are missing or broken .*data\.download=true"
    refused(message, name, root=str(tmp_path))
    (tmp_path / folder).mkdir(exist_ok=True)
    for file in ("data_batch_1", "train", "train_32x32.mat"):
        (tmp_path / folder / file).write_bytes(b"not a dataset")
    refused(message, name, root=str(tmp_path))


@pytest.mark.skipif("FEDSIM_DATA" not in os.environ, reason="FEDSIM_DATA names no folder with MNIST")
def test_mnist_is_centred_and_scaled():
    data = federated(load("mnist", root=os.environ["FEDSIM_DATA"]))
    assert (len(data.labels), data.num_test) == (60_000, 10_000)
    x, _ = data.batch(torch.arange(60_000))
    assert x.mean() == pytest.approx(0, abs=1e-3)
    assert x.std() == pytest.approx(1, abs=1e-3)


# Data sets without files


def test_digits_are_split_by_class_and_key():
    pytest.importorskip("sklearn")
    data, same, other = load("digits"), load("digits"), load("digits", seed=1)
    assert torch.equal(data.x_test, same.x_test)
    assert data.x_test.shape == other.x_test.shape
    assert not torch.equal(data.x_test, other.x_test)
    assert len(data.y_train) + len(data.y_test) == 1797
    train, test = data.y_train.bincount(), data.y_test.bincount()
    assert torch.equal(test, (train + test) // 5)
    assert data.x_train.amax() == 255
    x, _ = federated(data).batch(torch.arange(len(data.y_train)))
    assert x.mean() == pytest.approx(0, abs=0.02)
    assert x.std() == pytest.approx(1, abs=0.02)


def test_synthetic_images_are_one_picture_a_class_plus_noise():
    clean = load("synthetic", examples=200, classes=4, shape=[2, 6, 6], noise=0.0)
    noisy = load("synthetic", examples=200, classes=4, shape=[2, 6, 6], noise=0.05)
    assert len(clean.x_train.unique(dim=0)) == 4
    assert clean.y_train.bincount().tolist() == [50] * 4
    inside = (clean.x_train > 64) & (clean.x_train < 191)  # where noise is not clipped
    noise = (noisy.x_train.double() - clean.x_train.double())[inside] / 255
    assert noise.mean() == pytest.approx(0, abs=0.002)
    assert noise.std() == pytest.approx(0.05, rel=0.03)
    assert torch.equal(
        noisy.x_train, load("synthetic", examples=200, classes=4, shape=[2, 6, 6], noise=0.05).x_train
    )
    refused(r"data\.shape", "synthetic", shape=[1, 4])


def test_synthetic_alpha_beta_has_the_moments_of_the_paper():
    data = load("synthetic_alpha_beta", alpha=0.0, beta=3.0, devices=300)
    sizes = data.owner.bincount()
    means = torch.stack([x.mean(0) for x in data.x_train.split(sizes.tolist())])  # v_k, nearly
    assert means.mean(1).std() == pytest.approx(3.0, rel=0.15)  # B_k ~ N(0, beta)
    assert (means - means.mean(1, keepdim=True)).std() == pytest.approx(1.0, rel=0.03)  # v_k ~ N(B_k, 1)
    spread = (data.x_train - means[data.owner]).var(0)
    torch.testing.assert_close(spread, torch.arange(1, 61) ** -1.2, rtol=0.1, atol=0)
    assert sizes.min() >= 45
    assert len(data.y_test) == pytest.approx(len(data.y_train) / 9, rel=0.05)
    assert len(data.y_train.unique()) == 10


def test_synthetic_iid_devices_are_alike():
    data = load("synthetic_iid", devices=50)
    solution = torch.linalg.lstsq(data.x_train, torch.nn.functional.one_hot(data.y_train, 10).float()).solution
    assert ((data.x_test @ solution).argmax(1) == data.y_test).float().mean() > 0.5  # one linear model fits all
    sizes = data.owner.bincount().tolist()
    assert max(x.mean(0).abs().mean() for x in data.x_train.split(sizes)) < 0.1


# Image files: each is 1 x 1, of one pixel


def saved(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def picture(mode, pixel, form, palette=None, **options):
    image = Image.new(mode, (1, 1), pixel)
    if palette:
        image.putpalette(palette)
    return saved(image, form, **options)


def deep(dtype, value, form, **options):
    return saved(Image.fromarray(np.array([[value]], dtype)), form, **options)


def tiff(*values, bits=16, photometric=2, extra=()):
    """A TIFF that Pillow reads but does not write; `bits` a channel, packed as big-endian."""
    packed = sum(v << bits * i for i, v in enumerate(reversed(values)))
    data = (packed << -bits * len(values) % 8).to_bytes(-(-bits * len(values) // 8))
    tags = {256: 1, 257: 1, 258: 200 if len(values) > 2 else bits * 65537, 259: 1, 262: photometric, 273: 300,
            277: len(values), 278: 1, 279: len(data), **dict(extra)}  # fmt: skip
    entries = [struct.pack("<HHII", k, 3, len(values) if k == 258 else 1, v) for k, v in sorted(tags.items())]
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + bytes(4)
    return head.ljust(200, b"\0") + struct.pack(f"<{len(values)}H", *[bits] * len(values)).ljust(100, b"\0") + data


def little(v):
    """`v` as its two bytes lie in a little-endian file, read as big-endian."""
    return (v & 255) << 8 | v >> 8


TWO_COLOURS = [10, 20, 30, 200, 100, 50]
NO_RANGE = "pixels, and the file does not say what is black and what is white; set data.grey_range"
PICTURES = {
    "1": (picture("1", 1, "PNG"), (255, 255, 255)),
    "L": (picture("L", 77, "JPEG"), (77, 77, 77)),
    "LA": (picture("LA", (0, 51), "PNG"), (204, 204, 204)),
    "La": (tiff(0, 51, bits=8, photometric=1, extra={338: 1}), (204, 204, 204)),
    "P": (picture("P", 1, "PNG", TWO_COLOURS), (200, 100, 50)),
    "P, transparent": (picture("P", 1, "GIF", TWO_COLOURS, transparency=1), (255, 255, 255)),
    "PA": (picture("PA", (1, 0), "TIFF", TWO_COLOURS), (255, 255, 255)),
    "RGB": (picture("RGB", (1, 2, 3), "BMP"), (1, 2, 3)),
    "RGB, transparent": (picture("RGB", (1, 2, 3), "PNG", transparency=(1, 2, 3)), (255, 255, 255)),
    "RGBA": (picture("RGBA", (255, 0, 0, 51), "WEBP", lossless=True), (255, 204, 204)),
    "RGBA, opaque": (picture("RGBA", (1, 2, 3, 255), "PNG"), (1, 2, 3)),
    "RGBa": (tiff(51, 0, 0, 51, bits=8, extra={338: 1}), (255, 204, 204)),
    "RGBX": (tiff(1, 2, 3, 0, bits=8, extra={338: 0}), (1, 2, 3)),
    "CMYK": (picture("CMYK", (0, 255, 255, 0), "JPEG"), (255, 0, 0)),
    "YCbCr": (picture("YCbCr", (150, 128, 128), "TIFF"), (150, 150, 150)),
    "LAB": (picture("LAB", (0, 128, 128), "TIFF"), (0, 0, 0)),
    "I;16": (deep(np.uint16, 257 * 7 + 128, "PNG"), (7, 7, 7)),
    "I;16, rounded up": (deep(np.uint16, 257 * 7 + 129, "TIFF"), (8, 8, 8)),
    "I;16B": (saved(Image.frombytes("I;16B", (1, 1), b"\7\7"), "TIFF"), (7, 7, 7)),
    "I;16, transparent": (deep(np.uint16, 1000, "PNG", transparency=1000), (255, 255, 255)),
    "I;16, white is 0": (deep(np.uint16, 257 * 7, "TIFF", tiffinfo={262: 0}), (248, 248, 248)),
    "12 bits": (tiff(4095, bits=12, photometric=1), (255, 255, 255)),
    "PGM of 12 bits": (b"P5 1 1 4095\n\x0f\xff", (255, 255, 255)),
    "RGB of 16 bits": (tiff(*map(little, (257, 514, 65535))), (1, 2, 255)),
    "RGBA of 16 bits": (tiff(*map(little, (65535, 0, 0, 257 * 51)), extra={338: 2}), (255, 204, 204)),
    "I": (deep(np.int32, 7, "TIFF"), f"has signed or 32-bit {NO_RANGE}"),
    "I of 16 bits": (deep(np.int16, -7, "TIFF"), f"has signed or 32-bit {NO_RANGE}"),
    "F": (deep(np.float32, 0.5, "TIFF"), f"has floating-point {NO_RANGE}"),
    "PFM": (deep(np.float32, 0.5, "PPM"), f"has floating-point {NO_RANGE}"),
    "several pages": (
        picture("L", 0, "TIFF", save_all=True, append_images=[Image.new("L", (1, 1))]),
        "has several",
    ),
    "another format": (picture("RGB", 0, "JPEG2000"), "is not a readable image"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_of_any_mode_is_8_bit_colour_on_white_or_refused(tmp_path, name):
    content, expected = PICTURES[name]
    (tmp_path / "a.png").write_bytes(content)
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=re.escape(f"data.root: {tmp_path / 'a.png'} {expected}")):
            read_image(tmp_path / "a.png", 1)
    else:
        got = read_image(tmp_path / "a.png", 1).ravel().astype(int)
        assert np.abs(got - expected).max() <= (name == "LAB")  # whose conversion is not exact


@pytest.mark.parametrize(
    ("content", "ends", "grey"),
    [
        (deep(np.float32, 0.5, "TIFF"), (0, 1), 128),
        (deep(np.int16, -1000, "TIFF"), (-1000, 1000), 0),
        (deep(np.int16, 2000, "TIFF"), (-1000, 1000), 255),
        (deep(np.int32, 2**30 + 3, "TIFF"), (2**30, 2**30 + 255), 3),
        (deep(np.uint16, 4095, "PNG"), (0, 4095), 255),
        (deep(np.uint16, 0, "PNG"), (4095, 0), 255),
        (picture("L", 9, "PNG"), (0, 4095), 9),  # 8 bits need no range
    ],
)
def test_grey_range_gives_black_and_white(tmp_path, content, ends, grey):
    (tmp_path / "a").write_bytes(content)
    assert read_image(tmp_path / "a", 1, ends).ravel().tolist() == [grey] * 3


def test_pixels_that_are_no_numbers_are_refused(tmp_path):
    (tmp_path / "a").write_bytes(deep(np.float32, np.nan, "TIFF"))
    with pytest.raises(ConfigError, match="/a has pixels that are not finite numbers"):
        read_image(tmp_path / "a", 1, (0, 1))
    refused(r"data\.grey_range: \[1.0, 1.0\] should be", "image_folder", root=str(tmp_path), grey_range=[1, 1])


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "MPO"])
def test_of_several_pictures_the_first_counts(tmp_path, form):
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("white", "black"))
    first.save(tmp_path / "a", form, save_all=True, append_images=[second])
    assert read_image(tmp_path / "a", 8).min() == 255


UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).T,
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_pictures_are_turned_upright(tmp_path, form, orientation):
    stored = np.arange(9, dtype=np.uint8).reshape(3, 3) * 20
    exif = Image.Exif()
    exif[274] = orientation
    more = {"lossless": True} if form == "WEBP" else {}
    Image.fromarray(stored).save(tmp_path / "a", form, exif=exif, **more)
    np.testing.assert_array_equal(read_image(tmp_path / "a", 3)[0], UPRIGHT[orientation](stored))


def test_exif_data_that_cannot_be_read_turns_nothing(tmp_path):
    Image.new("L", (3, 3), 9).save(tmp_path / "a", "PNG", exif=b"no EXIF data")
    assert read_image(tmp_path / "a", 3).max() == 9


def test_extensions_are_those_of_the_formats():
    registered = {end for end, form in Image.registered_extensions().items() if form in {*FORMATS, "MPO"}}
    assert set(EXTENSIONS) == registered


# Folders of images


def write_images(root, splits=("train", "test"), count=4):
    for split in splits:
        for label, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = RNG.integers(0, 100, (20 + i, 40, 3), dtype=np.uint8) + np.uint8(100 * label)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return str(root)


def test_images_are_resized_and_cropped(tmp_path):
    data = load("image_folder", root=write_images(tmp_path), size=10)
    assert data.x_train.shape == (8, 3, 10, 10)
    assert data.y_train.tolist() == [0] * 4 + [1] * 4
    assert data.x_train[data.y_train == 1].amin() >= 100
    with Image.open(tmp_path / "train/cat/0.png") as image:
        expected = np.asarray(center_crop(resize(image, 10), 10)).transpose(2, 0, 1)
    assert np.abs(data.x_train[0].numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize("shape", [(30, 40), (50, 37), (33, 50), (5, 3), (100, 33), (3, 900)])
@pytest.mark.parametrize(("size", "crop"), [(16, None), (25, None), (32, 28)])
def test_images_are_those_of_torchvisions_resize_and_center_crop(tmp_path, shape, size, crop):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        image.save(tmp_path / split / "cat" / "0.png")
    data = federated(load("image_folder", root=str(tmp_path), size=size, mean=[], std=[]), crop=crop)
    expected = np.asarray(center_crop(resize(image, size), crop or size)).transpose(2, 0, 1)
    for batch in (data.batch, data.test_batch):
        got = batch(torch.arange(1))[0][0].numpy() * 255
        assert np.abs(got - expected).max() < 1.01  # Pillow also rounds after its first pass


def test_one_folder_is_split_by_key(tmp_path):
    root = write_images(tmp_path, [""], count=10)
    data, same, other = (load("image_folder", root=root, size=8, test_share=0.3, seed=s) for s in (0, 0, 1))
    assert data.y_test.tolist() == [0] * 3 + [1] * 3
    assert torch.equal(data.x_test, same.x_test)
    assert not torch.equal(data.x_test, other.x_test)


def test_a_cache_holds_the_same_images_and_follows_the_files(tmp_path):
    root, cache = write_images(tmp_path / "images"), tmp_path / "cache"
    plain, first = (
        load("image_folder", root=root, size=8),
        load("image_folder", root=root, size=8, cache=str(cache)),
    )
    assert first.mapped
    assert torch.equal(plain.x_train, first.x_train)
    (made,) = cache.iterdir()
    stamp = made.stat().st_mtime_ns
    load("image_folder", root=root, size=8, cache=str(cache))
    assert made.stat().st_mtime_ns == stamp
    Image.new("RGB", (9, 9)).save(tmp_path / "images/train/cat/0.png")
    assert load("image_folder", root=root, size=8, cache=str(cache)).x_train[0].count_nonzero() == 0


def test_a_broken_image_names_itself_and_leaves_no_cache(tmp_path):
    root, cache = write_images(tmp_path / "images"), tmp_path / "cache"
    broken = tmp_path / "images/train/dog/2.png"
    broken.write_bytes(broken.read_bytes()[:300])
    refused(rf"data\.root: {broken} is not a readable image", "image_folder", root=root, size=8, cache=str(cache))
    assert list(cache.iterdir()) == []


def test_a_decompression_bomb_is_an_error_whatever_the_warning_filters(tmp_path, monkeypatch):
    root = write_images(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused("DecompressionBomb", "image_folder", root=root, size=8)


def test_folders_that_do_not_fit_are_refused(tmp_path):
    root = write_images(tmp_path / "both")
    refused(
        r"data\.test_share: .* has train/ and test/, so it should be left out",
        "image_folder",
        root=root,
        test_share=0.5,
    )
    refused(r"data\.test_share: .* should be set", "image_folder", root=write_images(tmp_path / "one", [""]))
    refused("has train/ but not test/", "image_folder", root=write_images(tmp_path / "half", ["train"]))
    refused(r"data\.root", "image_folder", root=str(tmp_path / "absent"), test_share=0.5)
    refused("has no test images", "image_folder", root=str(tmp_path / "one"), test_share=0.1)
    (tmp_path / "both/test/bird").mkdir()
    refused("class folders that train/ lacks: bird", "image_folder", root=root)
    (tmp_path / "both/train/bird").mkdir()
    refused("no images of the classes bird", "image_folder", root=root)


@pytest.mark.parametrize("cached", [False, True])
def test_a_machine_may_lack_some_classes_and_one_of_the_folders(tmp_path, cached):
    root = write_images(tmp_path / "images", ["train"])
    more = {"root": root, "size": 8} | ({"cache": str(tmp_path / "cache")} if cached else {})
    data = load("image_folder", classes=["bird", "dog", "cat"], **more)
    assert (data.y_train.tolist(), data.classes) == ([1] * 4 + [2] * 4, 3)
    assert (data.x_test.shape, data.mapped) == ((0, 3, 8, 8), cached)
    (tmp_path / "images/train").rename(tmp_path / "images/test")
    data = load("image_folder", classes=["bird", "dog", "cat"], **more)
    assert (len(data.y_train), data.y_test.tolist()) == (0, [1] * 4 + [2] * 4)
    refused("data.classes: should also name these folders of .*: cat", "image_folder", classes=["dog"], **more)
    refused("data.classes: dog appears twice", "image_folder", classes=["dog", "cat", "dog"], **more)
    (tmp_path / "none/train").mkdir(parents=True)
    (tmp_path / "none/train/cat").mkdir()
    refused("has no images", "image_folder", root=str(tmp_path / "none"), classes=["cat"])


# Who owns which image


def write_tree(root, *paths):
    """A small image at each of the paths."""
    for i, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), i).save(root / path)
    return str(root)


def owned(data):
    """The owner's name, the label and the grey of each training image."""
    names = [data.owner_names[i] for i in data.owner]
    return sorted(zip(names, data.y_train.tolist(), data.x_train[:, 0, 0, 0].tolist(), strict=True))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("level", "path"),
    [(0, "{site}/{part}/{name}/0.png"), (1, "{part}/{site}/{name}/0.png"), (2, "{part}/{name}/{site}/0.png")],
)
def test_a_level_of_the_tree_names_the_owners(tmp_path, level, path, cached):
    trees = [(site, part, name) for site in ("b", "a") for part in ("train", "test") for name in ("cat", "dog")]
    paths = [path.format(site=site, part=part, name=name) for site, part, name in trees]
    options = {"root": write_tree(tmp_path / "tree", *paths), "size": 2}
    options |= {"cache": str(tmp_path / "cache")} if cached else {}
    for _ in range(1 + cached):  # made, and then read
        data = load("image_folder", owner=level, **options)
        assert owned(data) == [("a", 0, 4), ("a", 1, 5), ("b", 0, 0), ("b", 1, 1)]
        assert (data.y_test.tolist(), data.owner_names) == ([0, 0, 1, 1], ("a", "b"))
    way_out = f"set data.owner: {level} if a is an owner" if level < 2 else "or 2 if a is one, or data.classes"
    refused(f"such as (a|b|cat), have no image of their own, .*{way_out}", "image_folder", **options)


def test_owners_come_from_a_pattern_or_a_list(tmp_path):
    paths = [f"{part}/{name}/p{i}_{j}.png" for part in ("train", "test") for name in ("cat", "dog")
             for i in (7, 12) for j in (0, 1)]  # fmt: skip
    root, table = write_tree(tmp_path / "tree", *paths), tmp_path / "owners.csv"
    expected = sorted(
        (f"p{i}", label, 4 * label + 2 * k + j) for label in (0, 1) for k, i in enumerate((7, 12)) for j in (0, 1)
    )
    assert owned(load("image_folder", root=root, size=2, owner=r"(p\d+)_")) == expected
    assert owned(load("image_folder", root=root, size=2, owner=r"p\d+")) == expected
    rows = [f"x,{re.search('p[0-9]+', path)[0]},./{path}" for path in paths]
    table.write_text("\n".join(["\ufeffage,owner,file", *rows]))
    assert owned(load("image_folder", root=root, size=2, owner_list=str(table))) == expected
    for content, message in (
        ("file;owner\n", "column names"),
        ("", "column names"),
        ("\n".join(["age,owner,file", *rows[1:]]), "has no owner for train/cat/p7_0.png"),
        ("\n".join(["age,owner,file", *rows, f"x,other,{paths[0]}"]), "line 18, has another owner"),
        (f"file,owner\n{paths[0]}\n", "line 2, has no owner"),
        ("file,owner\n\"a", "cannot be read as a CSV file"),
        ("file,owner\n\xff", "cannot be read as a CSV file"),
    ):  # fmt: skip
        table.write_text(content, encoding="latin1")
        refused(rf"data\.owner_list: {table}.*{message}", "image_folder", root=root, size=2, owner_list=str(table))
    refused(r"data\.owner_list: .*No such file", "image_folder", root=root, owner_list=str(tmp_path / "none"))
    refused(r"data\.owner_list: data\.owner is set", "image_folder", root=root, owner=1, owner_list=str(table))
    refused(r"data\.owner: \(p is not a regular", "image_folder", root=root, owner="(p")
    refused(r"data\.owner: p7 finds no owner in train/cat/p12_0", "image_folder", root=root, owner="p7")
    refused(r"data\.owner: level 0 of .* is train/", "image_folder", root=root, owner=0)
    refused(r"data\.owner: .*/cat/p12_0.png lies too high .* level 2", "image_folder", root=root, owner=2)


def test_a_test_share_takes_of_each_class_of_each_owner(tmp_path):
    root = write_tree(
        tmp_path, *(f"{site}/{name}/{i}.png" for site in "abc" for name in ("cat", "dog") for i in range(4))
    )
    refused(
        r"such as a, have no image .*; set data\.owner: 0 if a is an owner, or 1 if cat is one",
        "image_folder",
        root=root,
        test_share=0.25,
    )
    data = load("image_folder", root=root, size=2, test_share=0.25, owner=0)
    assert [(name, label) for name, label, _ in owned(data)] == [
        (s, y) for s in "abc" for y in (0, 1) for _ in range(3)
    ]
    assert data.y_test.tolist() == [0] * 3 + [1] * 3


SITES = ("site a", "site b")


def test_owners_become_clients_with_names(tmp_path):
    places = [f"{site}/{part}/{name}" for site in SITES for part in ("train", "test") for name in ("cat", "dog")]
    root = write_tree(tmp_path / "tree", *(f"{place}/{i}.png" for place in places for i in range(4)))
    data = {"name": "image_folder", "root": root, "size": 8, "owner": 0, "clients": 2, "partition": "natural"}
    config = {"rounds": 1, "model": "2nn", "strategy": "fedavg", "cohort": "all", "data": data}
    built = build_data(resolve(config | {"data": data | {"public": 0.3}}))
    assert built.client_names == SITES
    assert describe(built)["client_names"] == [*SITES]
    assert "client_names" not in describe(build_data(resolve(config | {"data": data | {"partition": "iid"}})))
    with pytest.raises(ConfigError, match=r"^data\.clients: 3 should be 2, .* \(site a, site b\)$"):
        build_data(resolve(config | {"data": data | {"clients": 3}}))


def test_files_that_are_left_out_are_told(tmp_path, caplog):
    root = write_tree(
        tmp_path, *(f"{part}/cat/{i}.PNG" for part in ("train", "test") for i in (0, 1)), "train/0.png"
    )
    (tmp_path / "train/cat/0.dcm").touch()
    (tmp_path / "train/cat/.hidden").touch()
    (tmp_path / "train/.hidden").mkdir()
    (tmp_path / "val").mkdir()
    assert len(load("image_folder", root=root, size=2, grey_range=[0, 4095]).y_train) == 2
    first, second, _ = caplog.messages
    assert first.endswith(": 1 .dcm, 1 images outside class folders, 1 folders beside train/ and test/")
    assert second.startswith("data.root: no pixel of 2 images is brighter than 1 of 255; set data.grey_range")


def test_a_cache_follows_the_order_of_the_classes(tmp_path):
    root, cache = write_images(tmp_path / "images"), str(tmp_path / "cache")
    for classes in (["cat", "dog"], ["dog", "cat"]):
        data = load("image_folder", root=root, size=8, cache=cache, classes=classes)
        assert (data.x_train[data.y_train == classes.index("dog")] >= 100).all()


def test_every_data_set_has_a_summary():
    for name in DATASETS:
        assert 20 < len(DATASETS.summary(name)) < 110
