"""Laws of data sets and batches: a client gets what its files hold, and an error names the bad file."""

import gzip
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import center_crop, resize

from fedsim.base.machine import memory
from fedsim.data import DATASETS, Dataset, FederatedData
from fedsim.errors import ConfigError
from fedsim.experiment.build import build_data
from fedsim.experiment.config import resolve

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
        ({"owner": np.array([0, 0, 1, 1, 2, 6])}, "owner has numbers from 0 to 6"),
    ],
)
def test_arrays_that_do_not_fit_name_their_file(tmp_path, write, changes, message):
    path = write(tmp_path / "mine.npz", **changes)
    refused(re.escape(path) + ".*(" + message + ")", "npz", path=path)


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


def test_every_data_set_has_a_summary():
    for name in DATASETS:
        assert 20 < len(DATASETS.summary(name)) < 110
