"""Laws of trust: a bad, huge or crafted file is one clear line, never run, never unpickled."""

import contextlib
import gzip
import hashlib
import inspect
import io
import os
import pickle
import shutil
import signal
import struct
import sys
import tracemalloc
import urllib.request
import warnings
import zipfile
import zlib
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets

from fedsim.data import DATASETS, PARTITIONS, FederatedData
from fedsim.data.partition import label_counts
from fedsim.errors import ConfigError
from fedsim.experiment.build import build_data
from fedsim.experiment.config import load, read_yaml, resolve

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])
ARRAYS = {"x_train": PIXELS, "y_train": LABELS, "x_test": PIXELS[:2], "y_test": LABELS[:2]}
HUGE = 2**40  # bytes: more than fits, as a length that costs a file nothing
MODEST = 50e6  # bytes that a refusal may take
CONFIG = """\
rounds: 2
data: &data {name: synthetic, clients: 4, examples: 40, noise: 1e-1}
model: 2nn
strategy: {name: fedprox, mu: 0.1}
cohort: {name: uniform, fraction: 0.5}
local:
  lr: 0.1  # a number
  betas: [0.9, 0.99]
evaluate: {every: 1}
"""
fuzz = settings(max_examples=50)


@pytest.fixture(autouse=True)
def _in_time():
    """What hangs, fails."""

    def late(*_):
        pytest.fail("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 60)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def source(name, **options):
    return DATASETS.bind({"name": name, **options})()


def refused(message, read, *args, **options):
    """One line that has `message`."""
    with pytest.raises(ConfigError, match=message) as caught:
        read(*args, **options)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700


def refused_cheaply(message, read, *args, **options):
    """And little memory is taken on the way to it."""
    tracemalloc.start()
    try:
        refused(message, read, *args, **options)
        assert tracemalloc.get_traced_memory()[1] < MODEST
    finally:
        tracemalloc.stop()


def tame(read, *args, **options):
    """It is read, or refused in one line."""
    try:
        read(*args, **options)
    except ConfigError as error:
        message = str(error)
    else:
        message = ""
    assert message.isprintable()


def sparse(path, start=b""):
    """A file that says it is huge, and is, but of holes."""
    path.write_bytes(start)
    os.truncate(path, HUGE)
    return path


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


class Marker:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def marker(tmp_path):
    """A pickle that must not be read."""
    yield Marker(tmp_path / "unpickled")
    assert not (tmp_path / "unpickled").exists()


@st.composite
def damaged(draw, whole):
    """Bytes of a sound file, cut or with some changed; or any."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    cut = draw(st.integers(0, len(content)))
    return draw(
        st.sampled_from([bytes(content), whole[:cut], bytes(content[:cut]) + draw(st.binary(max_size=99))])
    )


# Configs


def aliases(first, each, depth=16):
    """Each line is made of 8 aliases of the line before."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{i}: &a{i} {each % ', '.join([f'*a{i - 1}'] * 8)}" for i in range(1, depth)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (aliases("[lol]", "[%s]"), "it holds more than 100000 values when its aliases are expanded"),
        (aliases("{k: 1}", "{<<: [%s]}"), "it holds more than 100000 values when its aliases are expanded"),
        (aliases("{k: 1}", "{? [%s] : 1}"), "it holds more than 100000 values when its aliases are expanded"),
        (f"a: &a {'x' * 50_000}\nb: [{'*a, ' * 50}]", "it holds more than 100000 values"),
        ("a: [" + "1," * 120_000 + "]", "it holds more than 100000 values"),
        ("a: " + "[" * 100_000, "it is nested more than 50 levels deep"),
        ("a: " + "[" * 51 + "]" * 51, "it is nested more than 50 levels deep"),
        ("a: " + "{a: " * 51 + "}" * 51, "it is nested more than 50 levels deep"),
        (
            "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [[[*a{i - 1}]]]\n" for i in range(1, 99)),
            "it is nested more than 50 levels deep",
        ),
        ("a: &a [1, *a]", "a value contains itself"),
        ("a: &a {b: {<<: *a}}", "a value contains itself"),
        ("? &a [*a]\n: 1", "a value contains itself"),
    ],
    ids=lambda value: value[:30],
)
def test_a_small_text_cannot_grow(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    refused(rf"\A{tmp_path}/c.yaml.*: is not YAML: {message}", load, tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("9" * 10**6, "a number has more than 1000 characters"),
        ("0x" + "f" * 10**6, "a number has more than 1000 characters"),
        ("1" + ":59" * 10**5, "a number has more than 1000 characters"),  # to base 60
        ("1" + ":59" * 200 + ".5", "is not a valid float"),
        ("!!int ''", "'' is not a valid int"),
        ("!!int [1]", "a list or mapping cannot be a value of type int"),
        ("!!int {=: 1}", "a list or mapping cannot be a value of type int"),
        ("!!float x", "could not convert"),
        ("!!bool maybe", "'maybe' is not a valid bool"),
        ("!!timestamp now", "'now' is not a valid timestamp"),
        ("!!map [1]", "expected a mapping node"),
        ("!!set x", "expected a mapping node"),
        ('"\\ud800"', "surrogates not allowed"),
        ('{"a\\nb": 1}', r"key 'a\\nb' contains characters that cannot be printed"),
        ('{"\\e[2J": 1}', "cannot be printed"),
        ("*" + "a" * 10**5, "undefined alias"),
        ("!" + "a" * 10**5 + " 1", "could not determine a constructor"),
    ],
    ids=lambda value: value[:30],
)
def test_a_value_that_is_not_what_it_says(tmp_path, value, message):
    path = tmp_path / "c.yaml"
    path.write_text(f"rounds: {value}")
    refused(rf"\A{path}: is not YAML: .*{message}", load, path)


@pytest.mark.parametrize(
    "tag", ["object/apply:os.system", "object/new:os.system", "object:os.system", "name:os.system", "module:os"]
)
def test_a_tag_of_python_is_refused_and_not_run(tmp_path, tag):
    path = tmp_path / "c.yaml"
    path.write_text(f"{CONFIG}seed: !!python/{tag} ['touch {tmp_path}/made']\n")
    refused("line 10: is not YAML: could not determine a constructor for the tag", load, path)
    assert not (tmp_path / "made").exists()


def test_a_config_of_any_length_is_refused_unread(tmp_path):
    refused("is larger than the 1048576 bytes that a config may have", load, sparse(tmp_path / "c.yaml"))
    refused("/dev/zero: cannot be read: Not a regular file", load, "/dev/zero")
    refused("pipe: cannot be read: Not a regular file", load, pipe(tmp_path / "pipe"))
    refused("cannot be read", load, "a\0b")
    refused("cannot be read: File name too long", load, "x" * 300)
    (tmp_path / "comments.yaml").write_text(f"{CONFIG}#{' ' * 10**6}")
    (tmp_path / "link.yaml").symlink_to(tmp_path / "comments.yaml")
    assert load(tmp_path / "link.yaml") == load(tmp_path / "comments.yaml")


def test_many_keys_take_no_longer_than_their_number(tmp_path):
    text = "".join(f"k{i}: 0\n" for i in range(20_000))
    (tmp_path / "c.yaml").write_text(text)
    assert len(read_yaml(tmp_path / "c.yaml")) == 20_000
    (tmp_path / "c.yaml").write_text(f"{text}k7: 1\n")
    refused("line 20001: is not YAML: key 'k7' appears twice", read_yaml, tmp_path / "c.yaml")


@fuzz
@given(damaged(CONFIG.encode()) | st.binary(max_size=200))
def test_a_damaged_config_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    path.write_bytes(content)
    tame(load, path)


# Arrays


def npy(array, **claims):
    """A .npy file, whose header may claim what it does not hold."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array) | claims)
    return file.getvalue() + array.tobytes()


def headed(text, version=(1, 0), length=None):
    """A .npy file of which only the header is there."""
    form = "<H" if version == (1, 0) else "<I"
    size = len(text) if length is None else length
    return np.lib.format.magic(*version) + struct.pack(form, size) + text.encode("latin1")


def pack(path, packing=zipfile.ZIP_DEFLATED, extra=(), **changes):
    """An .npz made by hand; a change is the bytes of a member, None none, and `extra` more members by name."""
    members = {f"{name}.npy": npy(array) for name, array in ARRAYS.items()}
    members |= {f"{name}.npy": content for name, content in changes.items()}
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w", packing) as archive:
        for name, content in (*members.items(), *extra):
            if content is not None:
                archive.writestr(name, content)
    return str(path)


def forge(path, name, field, value):
    """Change what the directory of an archive says about a member."""
    content = bytearray(Path(path).read_bytes())
    at = content.rindex(b"PK\1\2", 0, content.rindex(f"{name}.npy".encode()))
    place, form = {"flags": (8, "<H"), "packing": (10, "<H"), "length": (24, "<I")}[field]
    struct.pack_into(form, content, at + place, value)
    Path(path).write_bytes(content)
    return str(path)


LIES = {
    "much": (npy(LABELS, shape=(2**62,)), "is shorter than its header says"),
    "a little": (npy(LABELS, shape=(7,)), "is shorter than its header says"),
    "more than counts": (npy(LABELS, shape=(2**33,) * 40), "is shorter than its header says"),
    "less than none": (npy(LABELS, shape=(-6, -1)), "is shorter than its header says"),
    "wide": (npy(LABELS, descr="<U100000"), "allowed: numbers|is shorter than its header says"),
    "of no width": (npy(LABELS, descr="|S0", shape=(10**12,)), "allowed: numbers"),
    "nested": (npy(LABELS, descr=[("a", "<i8", (10**9, 10**9))]), "C int|allowed: numbers"),
    "objects": (npy(LABELS, descr="|O"), "allowed: numbers"),
    "a long header": (headed("{}", (2, 0), 2**32 - 1), "EOF|expected"),
    "a longer header": (headed("{" + " " * 20_000 + "}", (2, 0)), "EOF|expected|large"),
    "a deep header": (headed("(" * 9000), "its header cannot be read"),
    "a tall header": (headed("-" * 9000 + "1"), "its header cannot be read"),
    "no header": (headed("{'shape': (6,)}"), "correct keys"),
    "an empty header": (headed(""), "Cannot parse header"),
    "a later version": (np.lib.format.magic(3, 0) + bytes(99), "version"),
    "nothing": (b"", "magic string"),
    "a pickle": (pickle.dumps(LABELS), "magic string"),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("name", ["x_train", "y_test", "owner"])
def test_a_header_that_lies_is_found_out(tmp_path, lie, name):
    content, message = LIES[lie]
    refused_cheaply(message, source, "npz", path=pack(tmp_path / "a.npz", **{name: content}))
    with zipfile.ZipFile(pack(tmp_path / "b.npz", **{name: content})) as archive:
        archive.extractall(tmp_path / "folder")
    refused_cheaply(
        f"{name}.npy is not a readable plain array .*({message})", source, "npz", path=str(tmp_path / "folder")
    )


@pytest.mark.parametrize("save", [np.save, lambda file, array: file.write(pickle.dumps(array))])
@pytest.mark.parametrize("name", ["x_train", "owner"])
def test_arrays_are_not_unpickled(tmp_path, marker, save, name):
    file = io.BytesIO()
    save(file, np.array([marker] * 6))
    refused_cheaply("plain array", source, "npz", path=pack(tmp_path / "a.npz", **{name: file.getvalue()}))
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        archive.extractall(tmp_path / "folder")
    refused_cheaply("plain array", source, "npz", path=str(tmp_path / "folder"))
    (tmp_path / "p.npz").write_bytes(pickle.dumps(marker))
    refused_cheaply("plain array", source, "npz", path=str(tmp_path / "p.npz"))


def test_a_bomb_does_not_go_off(tmp_path, monkeypatch):
    zeros = np.zeros((400, 500, 500), np.uint8)
    path = pack(tmp_path / "a.npz", x_train=npy(zeros), x_test=npy(zeros[:2]), y_train=npy(np.zeros(400, int)))
    assert os.path.getsize(path) < 1e6
    monkeypatch.setattr("fedsim.base.machine.memory", lambda: 90 * 2**20)
    refused_cheaply(
        r"a.npz needs 0.1 GiB of memory, .* has 0.1 GiB; save the arrays as a folder", source, "npz", path=path
    )
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "folder")
    monkeypatch.setattr("fedsim.base.machine.memory", lambda: 10**6)
    assert source("npz", path=str(tmp_path / "folder"), channels="first").mapped


@pytest.mark.parametrize(
    ("shape", "dtype", "channels", "needed"),
    [
        ((10, 2, 3, 4), "u1", "first", 240),
        ((10, 2, 3, 4), "u1", "last", 480),
        ((10, 9), "f4", "last", 360),
        ((10, 9), "f8", "last", 1080),
        ((10, 9), "f2", "last", 540),
    ],
)
def test_what_is_needed_is_known_before_it_is_read(tmp_path, monkeypatch, shape, dtype, channels, needed):
    x, y = np.zeros(shape, dtype), np.zeros(len(shape), int)
    labels = 16 * (len(x) + 1)
    path = pack(
        tmp_path / "a.npz",
        x_train=npy(x),
        y_train=npy(np.zeros(len(x), int)),
        x_test=npy(x[:1]),
        y_test=npy(y[:1]),
    )
    monkeypatch.setattr("fedsim.base.machine.memory", lambda: needed + needed // 10 + labels)
    source("npz", path=path, channels=channels)
    monkeypatch.setattr("fedsim.base.machine.memory", lambda: needed + needed // 10 + labels - 1)
    refused_cheaply("needs", source, "npz", path=path, channels=channels)


def test_a_member_that_claims_more_than_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("fedsim.base.machine.memory", lambda: 2**30)
    lie = npy(PIXELS, shape=(2**31, 1))
    path = forge(pack(tmp_path / "a.npz", x_train=lie), "x_train", "length", 2**32 - 2)
    refused_cheaply("needs 2.0 GiB of memory", source, "npz", path=path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: pack(path, extra=[("x_train.npy", npy(PIXELS))]), "x_train appears twice"),
        (lambda path: pack(path, zipfile.ZIP_BZIP2), "x_train is compressed by a method"),
        (lambda path: pack(path, zipfile.ZIP_LZMA), "x_train is compressed by a method"),
        (lambda path: forge(pack(path), "y_train", "packing", 99), "y_train is compressed by a method"),
        (lambda path: forge(pack(path), "y_train", "flags", 1), "password required"),
        (lambda path: forge(pack(path), "y_train", "length", 99), "Bad CRC-32"),
        (lambda path: pack(path, x_train=None, extra=[("../x_train.npy", npy(PIXELS))]), "has no x_train"),
        (lambda path: pack(path, x_train=None, extra=[("/x_train.npy", npy(PIXELS))]), "has no x_train"),
        (lambda path: pack(path, x_train=None, extra=[("x_train", npy(PIXELS))]), "has no x_train"),
        (lambda path: pack(path, y_train=npy(LABELS << 40)), r"labels is 2199023255552; .* set data.classes"),
        (lambda path: str(pipe(path)), "Not a regular file"),
        (lambda path: str(sparse(path)), "not a zip file"),
        (lambda path: "/dev/zero", "Not a regular file"),
        (lambda path: "a\0b", "not an .npz"),
        (lambda path: "x" * 300, "File name too long"),
    ],
)  # fmt: skip
def test_a_crafted_archive_is_refused(tmp_path, change, message):
    refused_cheaply(message, source, "npz", path=change(tmp_path / "a.npz"))
    assert not list(tmp_path.parent.glob("*.npy"))


def test_more_in_an_archive_is_let_be(tmp_path, marker):
    path = pack(tmp_path / "a.npz", extra=[("../x_train.npy", b"x"), ("z.npy", pickle.dumps(marker))])
    assert len(source("npz", path=path).y_train) == 6


def test_a_header_that_python_2_wrote_is_read_without_a_word(tmp_path):
    old = npy(LABELS).replace(b"(6,)", b"(6L,)").replace(b" \n", b"\n")
    assert len(source("npz", path=pack(tmp_path / "a.npz", y_train=old)).y_train) == 6


def folder(path, **changes):
    path.mkdir(exist_ok=True)
    for name, array in ARRAYS.items():
        (path / f"{name}.npy").write_bytes(changes.get(name, npy(array)))
    return path


def test_a_folder_of_odd_files_is_refused(tmp_path):
    path = folder(tmp_path / "f")
    options = {"path": str(path)}
    (path / "owner.npy").symlink_to(path / "y_train.npy")
    assert source("npz", **options).owner.tolist() == LABELS.tolist()
    (path / "owner.npy").unlink()
    (path / "owner.npy").symlink_to(tmp_path / "nowhere")
    refused_cheaply("owner.npy is not a readable plain array .*No such file", source, "npz", **options)
    (path / "owner.npy").unlink()
    (path / "owner.npy").mkdir()
    refused_cheaply("owner.npy is not a readable plain array .*Is a directory", source, "npz", **options)
    (path / "owner.npy").rmdir()
    pipe(path / "y_train.npy")
    refused_cheaply("y_train.npy is not a readable plain array .*Not a regular file", source, "npz", **options)
    (path / "y_train.npy").unlink()
    sparse(path / "y_train.npy", headed("{}", (2, 0), 2**31))
    refused_cheaply("y_train.npy is not a readable", source, "npz", **options)
    sparse(path / "y_train.npy", npy(LABELS, shape=(2**36,)))
    refused_cheaply("f needs 1,024.0 GiB of memory", source, "npz", **options)
    folder(path, x_train=npy(PIXELS.astype("f4")).replace(b" \n", b"\n").replace(b"v\0", b"u\0"))
    refused_cheaply("x_train is not aligned for float32", source, "npz", **options)


def whole_npz():
    file = io.BytesIO()
    np.savez_compressed(file, **{name: array[:2] for name, array in ARRAYS.items()})
    return file.getvalue()


@fuzz
@given(damaged(whole_npz()) | st.binary(max_size=200))
def test_a_damaged_archive_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    path.write_bytes(content)
    tame(source, "npz", path=str(path))


@fuzz
@given(st.sampled_from(list(ARRAYS)), st.data())
def test_a_damaged_array_is_read_or_refused(tmp_path_factory, name, data):
    whole = npy(ARRAYS[name])
    path = folder(tmp_path_factory.getbasetemp() / "damaged", **{name: data.draw(damaged(whole) | st.binary())})
    tame(source, "npz", path=str(path))
    tame(source, "npz", path=pack(path.parent / "npy.npz", **{name: (path / f"{name}.npy").read_bytes()}))


# Images


@pytest.fixture
def images(tmp_path):
    """Two sound images, and a function that puts a third file beside them and reads all."""
    root = tmp_path / "images"
    for part in ("train", "test"):
        (root / part / "cat").mkdir(parents=True)
        Image.fromarray(PIXELS[0]).save(root / part / "cat/0.png")
    return root


def read_images(root, **options):
    return source("image_folder", root=str(root), **({"size": 4} | options))


def png(width, height, data=b"", *chunks):
    """A PNG made by hand, of any size it likes to claim."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def encoded(form, image=None, **options):
    file = io.BytesIO()
    (image or Image.fromarray(PIXELS[0])).save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", "UnidentifiedImageError"),
        (b"", "UnidentifiedImageError"),
        (encoded("PNG")[:-30], ""),
        (encoded("JPEG")[:-30], "truncated"),
        (encoded("PNG")[:20], ""),
        (png(60_000, 60_000), "DecompressionBombError"),
        (png(10_000, 10_000), "DecompressionBombWarning"),
        (png(2**31 - 1, 2**31 - 1), "DecompressionBombError"),
        (png(0, 5), ""),
        (png(5, 5, b"rubbish"), ""),
        (png(5, 5, zlib.compress(bytes(30)), (b"zTXt", b"k\0\0" + zlib.compress(bytes(10**7)))),
         "too large"),
        (b"II*\0" + struct.pack("<IHHHII", 8, 1, 256, 4, 2**31, 8), ""),
        (b"BM" + bytes(8) + struct.pack("<IIiiHH", 26, 40, 2**30, 2**30, 1, 24) + bytes(40), "Bomb"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_an_image_that_is_none_names_itself(images, content, message):
    (images / "train/cat/1.png").write_bytes(content)
    refused_cheaply(
        rf"\Adata\.root: {images}/train/cat/1.png is not a readable image .*{message}", read_images, images
    )


@pytest.mark.parametrize("ending", ["png", "jpg", "tif"])
def test_no_other_program_decodes(images, monkeypatch, ending):
    """Pillow goes by what a file holds, not by its name, and hands Encapsulated PostScript to Ghostscript."""
    ghost = images / "bin/gs"
    ghost.parent.mkdir()
    ghost.write_text(f"#!/bin/sh\ntouch {images}/haunted\n")
    ghost.chmod(0o755)
    monkeypatch.setenv("PATH", str(ghost.parent), prepend=os.pathsep)
    (images / f"train/cat/1.{ending}").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"
    )
    refused_cheaply(f"1.{ending} is not a readable image .*UnidentifiedImageError", read_images, images)
    assert not (images / "haunted").exists()


def test_a_file_that_is_no_file_names_itself(images, tmp_path):
    odd = pipe(images / "train/cat/1.png")
    refused_cheaply("1.png is not a readable image .*Not a regular file", read_images, images)
    odd.unlink()
    odd.symlink_to("/dev/zero")
    refused_cheaply("1.png is not a readable image .*Not a regular file", read_images, images)
    odd.unlink()
    odd.symlink_to(tmp_path / "nowhere")
    refused_cheaply("1.png is not a readable image .*No such file", read_images, images)
    refused_cheaply("1.png: No such file", read_images, images, cache=str(tmp_path / "cache"))
    odd.unlink()
    odd.symlink_to(images / "train/cat/0.png")
    assert len(read_images(images).y_train) == 2
    sparse(images / "train/cat/2.png")
    refused_cheaply("2.png is not a readable image", read_images, images)


@pytest.mark.parametrize("name", [b"\xff.png", b"a\nb.png", b"\x1b[2J.png"])
def test_a_name_is_printed_so_that_it_harms_no_terminal(images, tmp_path, name):
    path = os.path.join(os.fsencode(images), b"train/cat", name)
    Path(os.fsdecode(path)).write_bytes(encoded("PNG"))
    assert len(read_images(images, cache=str(tmp_path / "cache")).y_train) == 2
    Path(os.fsdecode(path)).write_bytes(b"")
    refused_cheaply("not a readable image", read_images, images)
    os.mkdir(os.path.join(os.fsencode(images), b"test", name))
    refused_cheaply("class folders that train/ lacks", read_images, images)


@pytest.mark.parametrize("target", [".", "..", "../../test"])
def test_links_in_circles_are_refused(images, target):
    for name in ("a", "b"):
        (images / "train/cat" / name).symlink_to(target)
    refused_cheaply("data.root: symbolic links lead to .* twice", read_images, images)


def test_a_tree_deeper_than_the_stack_is_refused(images):
    with contextlib.chdir(images / "train/cat"):
        for _ in range(300):
            os.mkdir("d")
            os.chdir("d")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 250)  # a tree as deep as the usual limit cannot be tidied away
    try:
        refused("data.root: .*recursion", read_images, images)
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (1, 1)])
def test_an_image_of_any_shape_is_read(images, size):
    Image.new("L", size, 77).save(images / "train/cat/1.png")
    assert read_images(images).x_train[1].unique().tolist() == [77]


def test_what_pillow_only_remarks_is_no_error(images):
    """Transparent palettes, and notes on how a picture was taken that cannot be read."""
    palette = Image.new("P", (9, 9))
    palette.putpalette(bytes(range(30)))
    palette.save(images / "train/cat/1.png", transparency=bytes([0, 99, 255]))
    (images / "train/cat/2.jpg").write_bytes(encoded("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"))
    assert len(read_images(images).y_train) == 3


@pytest.mark.parametrize("size", [60_000, 10**6, 2**31, 2**40])
@pytest.mark.parametrize("cache", [False, True])
def test_a_size_that_cannot_be_kept_is_refused_at_once(images, tmp_path, monkeypatch, size, cache):
    monkeypatch.setattr("fedsim.base.machine.memory", lambda: 2**33)
    options = {"size": size} | ({"cache": str(tmp_path / "cache")} if cache else {})
    message = "set a smaller size" if cache else "set a smaller size, or data.cache"
    refused_cheaply(
        rf"data\.size: 2 images of {size} x {size} pixels .* of memory.*{message}", read_images, images, **options
    )


def test_a_disk_that_is_full_is_told_before(images, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    message = "data.cache: the images need 0.0 GiB, but 0.0 GiB are free"
    refused_cheaply(message, read_images, images, cache=str(tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []
    for cache in ("a\0b", "x" * 300, "/dev/null/x"):
        refused_cheaply("data.cache: ", read_images, images, cache=cache)
    refused_cheaply("data.root: ", read_images, "a\0b", test_share=0.5)
    refused_cheaply("data.root: ", read_images, "x" * 300, test_share=0.5)


@settings(fuzz, max_examples=100)
@given(st.data())
def test_a_damaged_image_is_read_or_refused(tmp_path_factory, data):
    ending = data.draw(st.sampled_from(["png", "jpeg", "bmp", "ppm", "tiff", "webp", "gif"]))
    content = data.draw(damaged(encoded(ending)) | st.binary(max_size=200))
    root = tmp_path_factory.getbasetemp() / "damaged_images"
    for part in ("train", "test"):
        (root / part / "cat").mkdir(parents=True, exist_ok=True)
        (root / part / "cat/0.png").write_bytes(encoded("PNG") if part == "test" else content)
    tame(read_images, root)


# What torchvision reads


def idx(array, sizes=None, kind=8):
    sizes = array.shape if sizes is None else sizes
    return bytes([0, 0, kind, len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes) + array.astype("u1").tobytes()


IMAGES = RNG.integers(0, 256, (6, 28, 28))


def write_idx(root, **changes):
    raw = root / "MNIST/raw"
    raw.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        for name, array in (("images-idx3", IMAGES), ("labels-idx1", LABELS)):
            key = f"{part}_{name[:6]}"
            (raw / f"{part}-{name}-ubyte").write_bytes(changes.get(key, idx(array)))
    return raw


@pytest.mark.parametrize(
    "content",
    [
        idx(IMAGES, (2**31, 28, 28)),
        idx(IMAGES, (2**32 - 1,) * 3),
        idx(IMAGES, (5, 28, 28)),
        idx(IMAGES, (6,)),
        idx(IMAGES, (6, 28, 28), kind=14),
        idx(IMAGES, (6, 28, 28, 1)),
        idx(IMAGES, ()),
        idx(np.zeros((1, 56, 56))),
        idx(np.zeros((0, 28, 28))),
        b"\0\0\x08\xff",
        b"",
    ],
    ids=lambda value: value[:16].hex(),
)
def test_an_idx_file_that_lies_is_refused(tmp_path, content):
    raw = write_idx(tmp_path, train_images=content)
    message = rf"data\.root: files of {raw} are missing or broken .* set data\.download=true"
    refused_cheaply(message, source, "mnist", root=str(tmp_path))


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_an_idx_file_without_an_end_is_refused(tmp_path, name):
    raw = write_idx(tmp_path)
    dimensions = 3 if "3" in name else 1
    sizes = ((HUGE - 16) // 784, 28, 28) if dimensions == 3 else (2**31,)
    file = sparse(raw / name, idx(np.zeros(0), (2**31, *sizes[1:])))
    refused_cheaply(f"{name} has 1,024.0 GiB", source, "mnist", root=str(tmp_path))
    rows = 1_000_001
    file.write_bytes(idx(np.zeros(0), (rows, *sizes[1:])))
    os.truncate(file, 4 + 4 * dimensions + rows * (784 if dimensions == 3 else 1))
    refused_cheaply(f"{name} claims to hold 1000001", source, "mnist", root=str(tmp_path))
    pipe(file)
    refused_cheaply("Not a regular file", source, "mnist", root=str(tmp_path))
    refused_cheaply("Not a regular file", source, "mnist", root=str(tmp_path), download=True)


def test_what_is_half_fetched_is_not_unpacked(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise URLError("no network in a test")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    raw = write_idx(tmp_path)
    file = raw / "train-images-idx3-ubyte"
    Path(f"{file}.gz").write_bytes(gzip.compress(file.read_bytes())[:-9])
    file.unlink()
    refused_cheaply("Dataset not found", source, "mnist", root=str(tmp_path))
    refused_cheaply(
        "Error downloading train-images-idx3-ubyte.gz", source, "mnist", root=str(tmp_path), download=True
    )
    assert not file.exists()


def test_an_old_pickle_of_mnist_is_not_read(tmp_path, marker):
    write_idx(tmp_path)
    old = tmp_path / "MNIST/processed"
    old.mkdir()
    (old / "training.pt").write_bytes(pickle.dumps(marker))
    torch.save((torch.zeros(6, 28, 28, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64)), old / "test.pt")
    data = source("mnist", root=str(tmp_path))
    assert data.x_train.numpy().tolist() == IMAGES[:, None].tolist()
    assert data.y_test.tolist() == LABELS.tolist()


def benign(folder, name, **content):
    """A pickle as of CIFAR, and its name and checksum as torchvision keeps them."""
    (folder / name).write_bytes(pickle.dumps(content))
    return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]


@pytest.mark.parametrize(
    ("name", "kind", "labels"),
    [("cifar10", datasets.CIFAR10, "labels"), ("cifar100", datasets.CIFAR100, "fine_labels")],
)
def test_a_crafted_pickle_of_cifar_is_not_read(tmp_path, monkeypatch, marker, name, kind, labels):
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    for file, _ in [*kind.train_list, *kind.test_list, [kind.meta["filename"], ""]]:
        (folder / file).write_bytes(pickle.dumps(marker))
    refused_cheaply(f"files of {folder} are missing or broken .*corrupted", source, name, root=str(tmp_path))
    rows = {"data": np.zeros((6, 3072), np.uint8), labels: LABELS.tolist()}
    monkeypatch.setattr(kind, "train_list", [benign(folder, "train_rows", **rows)])
    refused_cheaply("corrupted", source, name, root=str(tmp_path))
    monkeypatch.setattr(kind, "test_list", [benign(folder, "test_rows", **rows)])
    refused_cheaply("metadata file not found or corrupted", source, name, root=str(tmp_path))
    meta = benign(folder, kind.meta["filename"], **{kind.meta["key"]: ["cat", "dog", "frog"]})
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": meta[1]})
    assert len(source(name, root=str(tmp_path)).y_train) == 6
    sparse(folder / "train_rows")
    refused_cheaply("train_rows has 1,024.0 GiB", source, name, root=str(tmp_path))
    pipe(folder / "train_rows")
    refused_cheaply("Not a regular file", source, name, root=str(tmp_path))


def test_a_crafted_mat_of_svhn_is_not_read(tmp_path, monkeypatch):
    sio = pytest.importorskip("scipy.io")
    monkeypatch.setattr(sio, "loadmat", lambda _: pytest.fail("it is read"))
    for file in ("train_32x32.mat", "test_32x32.mat"):
        sio.savemat(tmp_path / file, {"X": np.zeros((32, 32, 3, 6), np.uint8), "y": LABELS[:, None]})
    refused_cheaply("corrupted", source, "svhn", root=str(tmp_path))
    sparse(tmp_path / "train_32x32.mat")
    refused_cheaply("train_32x32.mat has 1,024.0 GiB", source, "svhn", root=str(tmp_path))


@fuzz
@given(st.sampled_from(["train_images", "train_labels", "t10k_labels"]), st.data())
def test_a_damaged_idx_file_is_read_or_refused(tmp_path_factory, name, data):
    whole = idx(IMAGES if "images" in name else LABELS)
    root = tmp_path_factory.getbasetemp()
    write_idx(root, **{name: data.draw(damaged(whole[:40]) | damaged(whole) | st.binary(max_size=50))})
    tame(source, "mnist", root=str(root))


def test_other_files_in_a_folder_of_torchvision_are_let_be(tmp_path):
    raw = write_idx(tmp_path)
    (raw / "old-ubyte").mkdir()
    pipe(raw / "notes")
    with contextlib.chdir(tmp_path):
        assert len(source("mnist", root=".").y_train) == 6


# Sizes that a config asks for


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"examples": 10**15}, "data: 1,000,000,000,001,000 examples .* of memory, .*; lower data.examples"),
        ({"test_examples": 10**15}, "; lower data.examples, data.test_examples"),
        ({"classes": 10**15}, "1,000,000,000,000,000 classes need"),
        ({"shape": [1, 10**6, 10**6]}, "or data.shape"),
        ({"clients": 10**15}, r"data\.clients: 10{15} is too many for 10000 examples"),
        ({"name": "synthetic_alpha_beta", "devices": 10**12}, r"data\.devices: 1,000,000,000,000 devices .* need"),
        ({"name": "synthetic_iid", "devices": 10**12}, r"data\.devices: .* need"),
    ],
)
def test_what_does_not_fit_into_memory_is_refused_before_it_is_made(data, message):
    config = {"rounds": 1, "model": "2nn", "strategy": "fedavg", "cohort": "all"}
    config["data"] = {"name": "synthetic", "clients": 2} | data
    refused_cheaply(message, build_data, resolve(config))


@pytest.mark.parametrize("spec", [{"name": "dirichlet", "alpha": 1.0}, {"name": "labels"}])
def test_a_table_of_clients_and_labels_is_refused_before_it_is_made(monkeypatch, spec):
    monkeypatch.setattr("fedsim.base.machine.memory", lambda: 10**7)
    data = source("synthetic", examples=2000, classes=2000, shape=[1, 1, 1])
    refused_cheaply(
        "data: a table of 1,000 clients and 2,000 labels needs", PARTITIONS.bind(spec), data, 1000, RNG
    )
    refused_cheaply("data: a table of", label_counts, LABELS, LABELS, 10**6, 10**6)


def test_clients_on_machines_of_their_own_are_bounded_too():
    data = source("synthetic", examples=2, test_examples=2)
    refused_cheaply(r"data\.clients: 1,000,000,000,000 clients need", FederatedData, data, None, clients=10**12)
    refused_cheaply("100 is too many for 2 examples", FederatedData, data, np.arange(2), clients=100)
