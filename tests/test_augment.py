"""Laws of augmentation: torchvision's images from the same random numbers, keyed, in range, never in place."""

from itertools import permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from fedsim.data import AUGMENTATIONS, Dataset, FederatedData
from fedsim.data.augment import CROP_TRIES, _crop_boxes
from fedsim.errors import ConfigError
from fedsim.types import Batch

GEOMETRY = ["random_crop", "flip", "rotation", "cutout", "random_resized_crop"]
PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (64, 3, 12, 9), dtype=np.uint8))
quick = settings(max_examples=25)


def images(n=64, channels=3, height=12, width=9, dtype=torch.float64):
    x = torch.from_numpy(np.random.default_rng(1).random((n, channels, height, width))).to(dtype)
    return Batch(x, torch.arange(n))  # a label names its image


def augmented(name, batch, size=None, key=0, **options):
    entry = AUGMENTATIONS.bind({"name": name} | options)
    return entry(batch, np.random.default_rng(key), size or tuple(batch.x.shape[2:]))


def federated(x=PIXELS, *, mean=(0.2, 0.5, 0.7), std=(0.1, 0.2, 0.3), **options):
    y = torch.arange(len(x)) % 3
    return FederatedData(Dataset(x, y, x, y, 3, mean, std), np.zeros(len(x), np.int64), clients=1, **options)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


# Each operation is torchvision's, image by image


@pytest.mark.parametrize("size", [(12, 9), (8, 5), (13, 9)])
@pytest.mark.parametrize("padding", [1, 2])
def test_a_random_crop_is_any_window_of_the_padded_image(size, padding):
    batch = images(n=600)
    got = augmented("random_crop", batch, size, padding=padding).x
    padded = tv.pad(batch.x, [padding] * 4)
    places = list(product(range(12 + 2 * padding - size[0] + 1), range(9 + 2 * padding - size[1] + 1)))
    is_window = torch.stack([(tv.crop(padded, *place, *size) == got).flatten(1).all(1) for place in places])
    assert (is_window.sum(0) == 1).all()  # exactly one window for each image
    counts = is_window.sum(1)
    assert abs(counts - 600 / len(places)).max() < 5 * (600 / len(places)) ** 0.5


def test_an_image_is_flipped_with_probability_p():
    batch = images(n=4000, height=2, width=3)
    for p in (0.0, 0.3, 1.0):
        got = augmented("flip", batch, p=p).x
        flipped = (got == tv.horizontal_flip(batch.x)).flatten(1).all(1)
        assert torch.equal(got[~flipped], batch.x[~flipped])
        assert abs(flipped.double().mean() - p) <= 5 * (p * (1 - p) / 4000) ** 0.5


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("degrees", [10.0, 170.0])
@pytest.mark.parametrize("shape", [(12, 9), (8, 8)])
def test_a_rotation_is_torchvisions(interpolation, degrees, shape):
    batch = images(n=16, height=shape[0], width=shape[1])
    got = augmented("rotation", batch, degrees=degrees, interpolation=interpolation).x
    angles = np.random.default_rng(0).uniform(-degrees, degrees, 16)
    mode = InterpolationMode(interpolation)
    expected = [tv.rotate(x, angle, mode) for x, angle in zip(batch.x, angles, strict=True)]
    close(got, torch.stack(expected))


JITTER = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]


@pytest.mark.parametrize(
    ("channels", "widths"),
    [
        (3, (0.8, 0.8, 0.8, 0.0)),
        (3, (0.4, 1.5, 0.3, 0.5)),
        (3, (0.0, 0.0, 0.0, 0.3)),
        (3, (0.0, 0.5, 0.0, 0.0)),
        (1, (0.6, 0.6, 0.0, 0.0)),
        (3, (0.0, 0.0, 0.0, 0.0)),
    ],
)
def test_a_colour_jitter_is_torchvisions_in_each_images_order(channels, widths):
    batch, names = images(n=40, channels=channels), ("brightness", "contrast", "saturation", "hue")
    batch.x[::4] = batch.x[::4].round()  # some channels are equal
    got = augmented("color_jitter", batch, **dict(zip(names, widths, strict=True))).x
    rng, spread = np.random.default_rng(0), np.array(widths[:3])
    low = np.maximum(0, 1 - spread)
    factors = np.column_stack([rng.uniform(low, 1 + spread, (40, 3)), rng.uniform(-widths[3], widths[3], 40)])
    used = [i for i, width in enumerate(widths) if width]
    orders = rng.permuted(np.tile(used, (40, 1)), axis=1)
    if len(used) == 3:
        assert {tuple(order) for order in orders.tolist()} == set(permutations(used))
    for image, own, order, result in zip(batch.x, factors, orders.astype(int), got, strict=True):
        for i in order:
            image = JITTER[i](image, own[i])
        close(result, image)


@pytest.mark.parametrize(("holes", "length"), [(5, 4), (1, 3), (2, 30)])
def test_cutout_blackens_squares_about_points_of_the_image(holes, length):
    batch = images(n=20)
    got = augmented("cutout", batch, holes=holes, length=length).x
    centres = np.random.default_rng(0).integers(0, (12, 9), (20, holes, 2))
    for image, points, result in zip(batch.x, centres, got, strict=True):
        expected = image.clone()
        for y, x in points - length // 2:
            expected[:, max(y, 0) : y + length, max(x, 0) : x + length] = 0
        assert torch.equal(result, expected)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(12, 9), (5, 4), (20, 30)])
def test_a_random_resized_crop_is_torchvisions(antialias, size):
    batch = images(n=24)
    got = augmented("random_resized_crop", batch, size, antialias=antialias).x
    boxes = _crop_boxes(np.random.default_rng(0), 24, (12, 9), (0.08, 1.0), (3 / 4, 4 / 3))
    for image, box, result in zip(batch.x, np.stack(boxes, 1).tolist(), got, strict=True):
        close(result, tv.resized_crop(image, *box, list(size), InterpolationMode.BILINEAR, antialias=antialias))


@pytest.mark.parametrize(
    ("size", "scale", "ratio", "fall"),
    [
        ((32, 32), (0.08, 1.0), (3 / 4, 4 / 3), False),
        ((30, 7), (0.5, 1.0), (0.5, 1.5), True),
        ((7, 30), (0.5, 1.0), (0.5, 1.5), True),
        ((6, 5), (0.001, 0.002), (1.0, 1.0), True),
        ((6, 6), (1.0, 1.0), (0.5, 0.9), True),
        ((6, 6), (1.0, 1.0), (1.1, 2.0), True),
        ((9, 6), (1.0, 1.0), (0.1, 0.2), True),
    ],
)
def test_boxes_are_drawn_as_torchvision_draws_them(size, scale, ratio, fall):
    (height, width), n = size, 200
    rng = np.random.default_rng(0)
    share, aspect = rng.uniform(*scale, (CROP_TRIES, n)), np.exp(rng.uniform(*np.log(ratio), (CROP_TRIES, n)))
    fallbacks = 0
    boxes = _crop_boxes(np.random.default_rng(0), n, size, scale, ratio)
    for i, (top, left, h, w) in enumerate(np.stack(boxes, 1)):
        for area, ratio_now in zip(height * width * share[:, i], aspect[:, i], strict=True):
            a, b = round(np.sqrt(area / ratio_now)), round(np.sqrt(area * ratio_now))
            if 0 < a <= height and 0 < b <= width:
                break
        else:  # the largest box at the centre that `ratio` allows
            fallbacks += 1
            a, b = height, width
            if width / height < ratio[0]:
                a = round(width / ratio[0])
            elif width / height > ratio[1]:
                b = round(height * ratio[1])
            assert (top, left) == ((height - a) // 2, (width - b) // 2)
        assert (h, w) == (a, b)
        assert 0 <= top <= height - h
        assert 0 <= left <= width - w
    assert (fallbacks > 0) == fall


@quick
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)).map(sorted),
)
def test_a_box_lies_inside_the_image_for_all_options(size, scale, ratio):
    top, left, h, w = _crop_boxes(np.random.default_rng(0), 50, size, tuple(scale), tuple(ratio))
    for start, length, side in ((top, h, size[0]), (left, w, size[1])):
        assert (start >= 0).all()
        assert (start + length <= side).all()
    assert (w >= 1).all() or ratio[1] * size[0] < 1
    assert (h >= 1).all() or size[1] / ratio[0] < 1


# Mixing


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_mixes_with_a_permutation_and_conserves_the_sum(alpha):
    batch = images()
    for key in range(10):
        mixed = augmented("mixup", batch, key=key, alpha=alpha)
        assert torch.equal(mixed.mixed_labels.sort().values, batch.y)
        assert torch.equal(mixed.y, batch.y)
        assert mixed.mix_weight.unique().numel() == 1
        share = mixed.mix_weight.view(-1, 1, 1, 1)
        torch.testing.assert_close(mixed.x, share * batch.x + (1 - share) * batch.x[mixed.mixed_labels])
        torch.testing.assert_close(mixed.x.sum(0), batch.x.sum(0))


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_cutmix_has_a_box_of_another_image_and_the_weight_is_the_area_outside(alpha):
    batch = images()
    for key in range(10):
        mixed = augmented("cutmix", batch, key=key, alpha=alpha)
        assert torch.equal(mixed.mixed_labels.sort().values, batch.y)
        own, others = mixed.x == batch.x, mixed.x == batch.x[mixed.mixed_labels]
        assert (own | others).all()
        torch.testing.assert_close(mixed.x.sum(0), batch.x.sum(0))
        moved = ~own[mixed.mixed_labels != batch.y]
        assert (moved == moved[:1, :1]).all()  # one box, through all channels
        rows, columns = moved[0, 0].any(1), moved[0, 0].any(0)
        assert torch.equal(moved[0, 0], rows[:, None] & columns)
        for side in (rows, columns):
            places = side.nonzero()
            assert len(places) == 0 or places[-1] - places[0] + 1 == len(places)
        torch.testing.assert_close(mixed.mix_weight, 1 - moved[0, 0].double().mean().expand(64))


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_lambda_is_beta_and_a_batch_is_mixed_with_probability_p(name):
    batch = images(n=2, channels=1, height=32, width=32)
    shares = [augmented(name, batch, key=key, alpha=2.0, p=0.6).mix_weight[0] for key in range(800)]
    left = torch.stack(shares)
    unmixed = augmented(name, batch, p=0.0)
    assert unmixed.x is batch.x
    assert torch.equal(unmixed.mixed_labels, batch.y)
    assert torch.equal(unmixed.mix_weight, torch.ones(2, dtype=torch.float64))
    mixed = left[left < 1]
    assert abs(len(mixed) / 800 - 0.6) < 0.09
    if name == "mixup":  # Beta(2, 2): mean 1/2, variance 1/20
        assert abs(mixed.mean() - 0.5) < 0.05
        assert abs(mixed.var() - 0.05) < 0.01


def test_a_batch_is_mixed_once():
    with pytest.raises(ConfigError, match=r"local\.augment: two entries mix"):
        augmented("cutmix", augmented("mixup", images()))


def test_mixup_takes_examples_of_any_shape():
    batch = Batch(torch.rand(6, 5), torch.arange(6))
    mixed = augmented("mixup", batch, size=(6, 5))
    torch.testing.assert_close(mixed.x.sum(0), batch.x.sum(0))


# All of them


@pytest.mark.parametrize("name", list(AUGMENTATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_key_decides_and_nothing_is_changed_in_place(name, dtype):
    batch = images(dtype=dtype)
    before = batch.x.clone()
    first, again, other = (augmented(name, batch, key=key) for key in (3, 3, 4))
    assert first.x.dtype == dtype
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.x, other.x)
    assert torch.equal(batch.x, before)
    assert torch.equal(first.y, batch.y)
    if name in GEOMETRY or name == "color_jitter":
        assert first.mixed_labels is first.mix_weight is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", list(AUGMENTATIONS))
def test_a_gpu_has_the_same_numbers(name):
    batch = images()
    there = Batch(batch.x.cuda(), batch.y.cuda())
    here, got = augmented(name, batch), augmented(name, there)
    close(got.x.cpu(), here.x)
    if here.mixed_labels is not None:
        assert torch.equal(got.mixed_labels.cpu(), here.mixed_labels)


@quick
@given(
    st.sampled_from([name for name in AUGMENTATIONS if name != "color_jitter"]),
    st.sampled_from([1, 3, 4]),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 5),
    st.integers(0, 9),
)
def test_values_stay_from_0_to_1(name, channels, height, width, n, key):
    got = augmented(name, images(n, channels, height, width, torch.float32), key=key)
    assert got.x.shape == (n, channels, height, width)
    assert got.x.min() >= 0
    assert got.x.max() <= 1 + 1e-6


@quick
@given(*[st.floats(0, 3)] * 3, st.floats(0, 0.5), st.sampled_from([1, 3]), st.integers(0, 9))
def test_colours_stay_from_0_to_1(brightness, contrast, saturation, hue, channels, key):
    options = {"brightness": brightness, "contrast": contrast} | (
        {"saturation": saturation, "hue": hue} if channels == 3 else {"saturation": 0, "hue": 0}
    )
    got = augmented("color_jitter", images(4, channels, 5, 3, torch.float32), key=key, **options).x
    assert got.min() >= 0
    assert got.max() <= 1


@quick
@given(st.floats(0, 3), st.integers(0, 99))
def test_a_factor_is_uniform_about_1_and_not_negative(width, key):
    dark = Batch(torch.full((50, 1, 1, 1), 0.25, dtype=torch.float64), torch.zeros(50))
    factor = augmented("color_jitter", dark, key=key, brightness=width, contrast=0, saturation=0).x / 0.25
    assert factor.min() >= max(0, 1 - width) - 1e-9
    assert factor.max() <= 1 + width + 1e-9


# Batches of a dataset


def bound(*specs):
    return [AUGMENTATIONS.bind(spec) for spec in specs]


def test_without_augmentation_a_training_batch_is_the_batch():
    data, rows = federated(), torch.tensor([5, 0, 5])
    got = data.training_batch(rows, [], np.random.default_rng(0))
    assert all(torch.equal(a, b) for a, b in zip(got[:2], data.batch(rows), strict=True))
    assert not any(part is not None for part in got[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("mean", "std"), [((), ()), ((0.4,), (0.2,)), ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))])
def test_augmentation_comes_before_normalisation_and_keeps_the_dataset(dtype, mean, std):
    data, rows, before = federated(mean=mean, std=std, dtype=dtype), torch.tensor([5, 0, 5]), PIXELS.clone()
    still, jitter = bound({"name": "flip", "p": 0}), bound("color_jitter", "random_crop")
    got = data.training_batch(rows, still, np.random.default_rng(0))
    assert got.x.dtype == dtype
    close(got.x, data.batch(rows)[0])
    assert torch.equal(got.y, data.labels[rows])
    batch, rng = Batch(PIXELS[rows].to(dtype) / 255, data.labels[rows]), np.random.default_rng(0)
    for change in jitter:
        batch = change(batch, rng, (12, 9))
    m, s = (torch.tensor(v or [e], dtype=dtype).view(-1, 1, 1) for v, e in ((mean, 0.0), (std, 1.0)))
    close(data.training_batch(rows, jitter, np.random.default_rng(0)).x, (batch.x - m) / s)
    assert torch.equal(PIXELS, before)


@pytest.mark.parametrize("name", ["random_crop", "flip", "rotation", "cutout", "random_resized_crop", "mixup"])
def test_float_images_keep_their_units_and_their_dataset(name):
    x = 7 * torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    before, data = x.clone(), federated(x, mean=(), std=())
    data.check_augment([AUGMENTATIONS.resolve(name)])
    got = data.training_batch(torch.arange(8), bound(name), np.random.default_rng(0)).x
    batch = AUGMENTATIONS.bind(name)(Batch(x, torch.arange(8)), np.random.default_rng(0), (6, 6))
    assert torch.equal(got, batch.x)
    assert got.abs().max() > 1
    assert torch.equal(x, before)


@pytest.mark.parametrize("crop", [4, 5, 9])
@pytest.mark.parametrize("x", [PIXELS, PIXELS.float()], ids=["uint8", "float32"])
def test_a_crop_is_the_centre_where_no_augmentation_has_made_one(x, crop):
    whole, data, rows = federated(x), federated(x, crop=crop), torch.tensor([3, 1])
    assert data.shape == (3, crop, crop)
    for batch in ("batch", "test_batch"):
        expected = tv.center_crop(getattr(whole, batch)(rows)[0], [crop, crop])
        torch.testing.assert_close(getattr(data, batch)(rows)[0], expected)
        torch.testing.assert_close(getattr(data.to("cpu"), batch)(rows)[0], expected)
    flipped = data.training_batch(rows, bound({"name": "flip", "p": 1}), np.random.default_rng(0)).x
    close(flipped, tv.center_crop(tv.horizontal_flip(whole.batch(rows)[0]), [crop, crop]))
    for name in ("random_crop", "random_resized_crop"):
        assert data.training_batch(rows, bound(name), np.random.default_rng(0)).x.shape == (2, 3, crop, crop)


@pytest.mark.parametrize("x", [PIXELS, torch.zeros(4, 10)], ids=["images", "vectors"])
def test_a_crop_larger_than_the_images_is_refused(x):
    with pytest.raises(ConfigError, match=r"^data\.crop: 10 needs images .* but the examples have shape \("):
        federated(x, mean=(), std=(), crop=10)


GREY = PIXELS[:, :1]


@pytest.mark.parametrize(
    ("x", "specs", "message"),
    [
        (PIXELS, ["mixup", "flip"], r"local\.augment\[0\]: mixup mixes .* should be last"),
        (PIXELS, ["flip", "cutmix", "mixup"], r"local\.augment\[1\]: cutmix mixes .* only one entry may mix"),
        (torch.zeros(4, 5), ["mixup", "mixup"], r"local\.augment\[0\]: mixup mixes"),
        (torch.zeros(4, 5), ["flip"], r"local\.augment\[0\]: flip takes images .* shape \(5,\)"),
        (torch.zeros(4, 5), ["cutmix"], r"local\.augment\[0\]: cutmix takes images"),
        (PIXELS.float(), ["flip", "color_jitter"], r"local\.augment\[1\]: color_jitter takes uint8 images"),
        (PIXELS[:, :2], ["color_jitter"], "1 or 3 channels; the images have 2"),
        (GREY, ["color_jitter"], "neither saturation nor hue; set both to 0"),
        (GREY, [{"name": "color_jitter", "saturation": 0, "hue": 0.1}], "set both to 0"),
    ],
)
def test_a_list_that_does_not_fit_the_examples_is_refused(x, specs, message):
    with pytest.raises(ConfigError, match=message) as caught:
        federated(x, mean=(), std=()).check_augment([AUGMENTATIONS.resolve(spec) for spec in specs])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("x", "specs"),
    [
        (PIXELS, list(AUGMENTATIONS)[:-1]),
        (GREY, [{"name": "color_jitter", "saturation": 0}, "cutmix"]),
        (torch.zeros(4, 5), ["mixup"]),
    ],
)
def test_a_list_that_fits_is_not_refused(x, specs):
    federated(x, mean=(), std=()).check_augment([AUGMENTATIONS.resolve(spec) for spec in specs])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "random_resized_crop", "scale": [0.9, 0.1]}, r"local\.augment\.scale: \[0\.9, 0\.1\] should be"),
        ({"name": "random_resized_crop", "ratio": [0, 1]}, r"local\.augment\.ratio"),
        ({"name": "random_crop", "padding": -1}, r"local\.augment\.padding: -1 should be a whole number >= 0"),
        ({"name": "flip", "p": 1.5}, r"local\.augment\.p: 1\.5"),
        ({"name": "color_jitter", "hue": 0.6}, r"local\.augment\.hue: 0\.6"),
        ({"name": "mixup", "alpha": 0}, r"local\.augment\.alpha: 0 should be a number > 0"),
        ({"name": "rotation", "interpolation": "cubic"}, r"nearest or bilinear"),
    ],
)
def test_options_out_of_range_are_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        AUGMENTATIONS.resolve(spec)


def test_every_augmentation_has_a_summary():
    for name in AUGMENTATIONS:
        assert 20 < len(AUGMENTATIONS.summary(name)) < 115
