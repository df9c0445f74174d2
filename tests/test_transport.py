"""Tensors arrive as they were, or as near as their transport says; bytes of others are believed in nothing."""

import json
import zlib
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.experiment.build import build
from fedsim.experiment.config import load
from fedsim.federated.aggregate import WeightedMean
from fedsim.flower.transport import BLOCK, DTYPES, ROUNDED, TRANSPORTS, Coded, decode, encode

UNIT = {"bf16": 2**-7, "int8": 1 / 127}  # between neighbours, to the largest entry of a block, at most


@st.composite
def tensors(draw, dtypes=tuple(DTYPES)):
    """Any bits: NaNs with payloads, -0.0, infinities, subnormals. Any shape, of views, and of nothing."""
    dtype = DTYPES[draw(st.sampled_from(dtypes))]
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    shape = [draw(st.integers(0, 3000))] if draw(st.booleans()) else shape
    size = int(np.prod(shape, dtype=int)) * dtype.itemsize
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    data = rng.integers(0, draw(st.sampled_from([1, 2, 3, 256])), size, dtype=np.uint8)
    data = data % 2 if dtype == torch.bool else data
    tensor = (torch.from_numpy(data).view(dtype) if size else torch.empty(0, dtype=dtype)).reshape(shape)
    return tensor.mT if tensor.ndim > 1 and draw(st.booleans()) else tensor


def bits(tensor):
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def same(a, b):
    return a.keys() == b.keys() and all(bits(a[name]) == bits(b[name]) for name in a)


@given(
    state=st.dictionaries(st.text(max_size=5), tensors(), max_size=3), transport=st.sampled_from(TRANSPORTS[:2])
)
@settings(max_examples=60)
def test_every_bit_arrives(state, transport):
    encoded, residual = encode(state, transport)
    assert same(decode(encoded), state)
    assert residual == {}


@given(tensor=tensors(tuple(name for name in DTYPES if name != "float32")), transport=st.sampled_from(ROUNDED))
@settings(max_examples=50)
def test_what_is_not_rounded_arrives_whole(tensor, transport):
    state = {
        "other": tensor,
        "few": torch.full((BLOCK - 1,), 0.1),
        "scalar": torch.tensor(torch.pi),
        "buffers": torch.rand(2 * BLOCK),
    }
    encoded, residual = encode(state, transport)
    assert same(decode(encoded), state)
    assert residual == {}


@pytest.mark.parametrize("transport", ROUNDED)
@given(entries=st.integers(BLOCK, 4 * BLOCK), scale=st.sampled_from([0.0, 1e-44, 1e-30, 1.0, 1e30]))
@settings(max_examples=40)
def test_rounding_loses_half_a_unit_at_most_and_the_residual_has_it(transport, entries, scale):
    m = scale * torch.randn(entries, generator=torch.Generator().manual_seed(entries))
    encoded, residual = encode({"m": m}, transport)
    q, e = decode(encoded)["m"], residual["m"]
    bound = max(UNIT[transport] * float(m.abs().max()) / 2, 1e-40)
    assert float((q - m).abs().max()) <= 1.01 * bound
    torch.testing.assert_close(q.double() + e.double(), m.double(), rtol=1e-6, atol=0)


def test_bf16_is_to_nearest_even():
    one = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF], "<u4")  # halfway, halfway, above, below
    encoded, _ = encode({"m": torch.from_numpy(np.resize(one, BLOCK).view("<f4").copy())}, "bf16")
    assert np.frombuffer(encoded["m"].data, "<u2")[:4].tolist() == [0x3F80, 0x3F82, 0x3F81, 0x3F80]


def test_bytes_are_as_few_as_said():
    m = torch.randn(10 * BLOCK + 1)
    size = {name: len(encode({"m": m}, name)[0]["m"].data) for name in TRANSPORTS}
    assert size["exact"] == 4 * len(m)
    assert size["lossless"] < 0.9 * size["exact"]  # exponents lie together
    assert size["bf16"] == 2 * len(m)
    assert size["int8"] == len(m) + 4 * 11
    zeros, _ = encode({"m": torch.zeros(10**6)}, "lossless")
    assert len(zeros["m"].data) < 10**4
    noise, _ = encode({"m": torch.randint(0, 256, (10**5,), dtype=torch.uint8)}, "lossless")
    assert noise["m"].coding == "exact"


@pytest.mark.parametrize("transport", ROUNDED)
def test_the_mean_of_what_was_sent_tends_to_the_message_as_1_by_t(transport):
    m, e = torch.randn(3 * BLOCK, generator=torch.Generator().manual_seed(0)), {}
    unit, total = UNIT[transport] * float(m.abs().max()), torch.zeros(3 * BLOCK, dtype=torch.float64)
    for t in range(1, 201):
        encoded, e = encode({"m": m}, transport, e)
        total += decode(encoded)["m"]
        assert float((total / t - m).abs().max()) <= unit / t + 1e-6  # what float32 adds up to
        assert float(e["m"].abs().max()) <= unit


@pytest.mark.parametrize("transport", ROUNDED)
def test_a_residual_does_not_grow(transport):
    """It is at most half a unit of m + e, so never more than u / (1 - u) of the largest message."""
    generator, e, largest = torch.Generator().manual_seed(0), {}, 0.0
    for t in range(300):
        m = torch.randn(2 * BLOCK, generator=generator) * (10 if t % 7 == 0 else 0.1)
        largest = max(largest, float(m.abs().max()))
        _, e = encode({"m": m}, transport, e)
        assert float(e["m"].abs().max()) <= UNIT[transport] * largest


@pytest.mark.parametrize("transport", ROUNDED)
def test_the_same_message_and_residual_send_the_same(transport):
    m, e = torch.randn(2 * BLOCK), {"m": torch.randn(2 * BLOCK) / 100}
    before = e["m"].clone()
    (a, left), (b, again) = encode({"m": m}, transport, e), encode({"m": m}, transport, e)
    assert a == b
    assert same(left, again)
    assert torch.equal(e["m"], before)


class Travelled(WeightedMean):
    """Messages fold as they arrive, with a residual for each client."""

    def __init__(self, transport):
        self.transport, self.residuals = transport, {}

    def fold(self, updates, start=None):
        return super().fold([self.travel(*update) for update in updates], start)

    def travel(self, client, message, weight):
        encoded, self.residuals[client] = encode(message, self.transport, self.residuals.get(client))
        return client, decode(encoded), weight


def test_training_ends_where_it_would():
    data = {"name": "synthetic", "examples": 300, "test_examples": 200, "classes": 4, "clients": 5, "noise": 0.5}
    local = {"lr": 0.1, "batch_size": 10, "epochs": 1}
    config = load(
        {"rounds": 12, "data": data, "model": "2nn", "strategy": "scaffold", "cohort": "all", "local": local}
    )
    found = {}
    for transport in TRANSPORTS:
        simulation = build(config)
        simulation.aggregator = Travelled(transport)
        for _ in range(config.rounds):
            simulation.round()
        found[transport] = simulation.fingerprint(), simulation.evaluate().accuracy, simulation.server["model"]
    assert found["lossless"][0] == found["exact"][0]
    assert found["exact"][1] > 0.95
    for transport in ROUNDED:
        assert found[transport][0] != found["exact"][0]
        assert found[transport][1] == pytest.approx(found["exact"][1], abs=0.02)
        apart = (found[transport][2] - found["exact"][2]).norm() / found["exact"][2].norm()
        assert apart < 2e-3


# What cannot be sent


@pytest.mark.parametrize("transport", ROUNDED)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_rounding_refuses_what_is_not_finite(transport, wrong):
    m = torch.zeros(BLOCK)
    m[7] = wrong
    with pytest.raises(ArithmeticError, match=r"\Am is not finite\Z"):
        encode({"m": m}, transport)
    with pytest.raises(ArithmeticError, match=r"\Am is not finite\Z"):
        encode({"m": torch.zeros(BLOCK)}, transport, {"m": m})


def test_rounding_never_makes_infinity():
    m = torch.full((BLOCK,), torch.finfo(torch.float32).max)
    with pytest.raises(ArithmeticError, match=r"\Am is too large for bf16\Z"):
        encode({"m": m}, "bf16")
    with pytest.raises(ArithmeticError, match=r"\Am is too large for int8\Z"):
        encode({"m": m}, "int8")


def test_wrong_wishes_are_refused():
    with pytest.raises(
        ValueError, match=r"\Atransport: 'bf61' is unknown; did you mean 'bf16'\? allowed: exact, "
    ):
        encode({}, "bf61")
    with pytest.raises(ValueError, match=r"\Am: complex64 cannot be sent; allowed: bool, "):
        encode({"m": torch.zeros(2, dtype=torch.complex64)}, "exact")
    with pytest.raises(ValueError, match=r"\Am: has shape \(1024,\), but its residual has \(2048,\)"):
        encode({"m": torch.zeros(BLOCK)}, "int8", {"m": torch.zeros(2 * BLOCK)})


# Bytes of others

ZEROS = zlib.compress(bytes(2**20), 9)  # a thousandth of what it inflates to


def planes(*parts, lengths=None):
    return np.array(lengths or [len(part) for part in parts], "<u8").tobytes() + b"".join(parts)


@pytest.mark.parametrize(
    ("coded", "message"),
    [
        (Coded("object", (1,), "exact", bytes(8)), "type 'object' is unknown"),
        (Coded("float32\n", (1,), "exact", bytes(4)), r"type 'float32\\n' is unknown"),
        (Coded("float32", (1,), "pickle", bytes(4)), "coding 'pickle' is unknown"),
        (Coded("float32", (2,), "exact", bytes(4)), r"4 bytes do not fit float32 \(2,\) as exact"),
        (Coded("float32", (2**40,), "exact", bytes(4)), "4 bytes do not fit"),
        (Coded("float32", (2**40,), "bf16", bytes(4)), "4 bytes do not fit"),
        (Coded("float32", (2**40,), "int8", bytes(4)), "4 bytes do not fit"),
        (Coded("float32", (2**40,), "lossless", planes(ZEROS, ZEROS, ZEROS, ZEROS)), "bytes do not fit"),
        (Coded("float32", (-1,), "exact", b""), "is not a shape"),
        (Coded("float32", (-1, -4), "exact", bytes(16)), "is not a shape"),
        (Coded("float32", (0, 2**62), "exact", b""), "is not a shape"),
        (Coded("float32", (2.0,), "exact", bytes(8)), "is not a shape"),
        (Coded("float32", (True,), "exact", bytes(4)), "is not a shape"),
        (Coded("float32", (1,) * 65, "exact", bytes(4)), "is not a shape"),
        (Coded("float64", (1024,), "bf16", bytes(2048)), "float64 cannot be sent as bf16"),
        (Coded("int8", (1024,), "int8", bytes(1028)), "int8 cannot be sent as int8"),
        (Coded("bool", (2,), "exact", b"\x01\x02"), "bool has values other"),
        (Coded("bool", (2,), "lossless", planes(b"\x01\x02")), "bool has values other"),
        (Coded("float32", (1,), "int8", np.float32(-1).tobytes() + b"\x01"), "a scale is negative or not finite"),
        (Coded("float32", (1,), "int8", np.float32("nan").tobytes() + b"\x01"), "a scale is negative or not"),
        (Coded("uint8", (8,), "lossless", b"short"), "the lengths of the planes are missing"),
        (Coded("uint8", (8,), "lossless", planes(bytes(9))), "the lengths of the planes are wrong"),
        (
            Coded("uint8", (8,), "lossless", planes(bytes(8), lengths=[2**64 - 1])),
            "the lengths of the planes are wrong",
        ),
        (
            Coded("int16", (8,), "lossless", planes(b"", bytes(8), lengths=[2**64 - 1, 9])),
            "lengths of the planes are wrong",
        ),
        (Coded("uint8", (99,), "lossless", planes(b"no zlib")), "a plane cannot be decompressed: Error -3"),
        (
            Coded("uint8", (99,), "lossless", planes(zlib.compress(bytes(98)))),
            "the wrong length after decompression",
        ),
        (
            Coded("uint8", (99,), "lossless", planes(zlib.compress(bytes(99))[:-1])),
            "the wrong length after decompression",
        ),
        (
            Coded("uint8", (99,), "lossless", planes(zlib.compress(bytes(99)) + b"x")),
            "the wrong length after decompression",
        ),
        (Coded("uint8", (2000,), "lossless", planes(ZEROS)), "the wrong length after decompression"),
    ],
    ids=lambda value: f"{value.dtype} {value.coding}" if isinstance(value, Coded) else value[:20],
)
def test_hostile_bytes_are_one_line(coded, message):
    with pytest.raises(ValueError, match=rf"\Am: .*{message}") as caught:
        decode({"m": coded})
    assert str(caught.value).isprintable()


def test_a_bomb_takes_no_memory_that_it_was_not_given():
    bomb = {"m": Coded("uint8", (2**20,), "lossless", planes(ZEROS))}
    assert not decode(bomb)["m"].any()
    with pytest.raises(ValueError, match="the message is larger than 1000 bytes"):
        decode(bomb, most=1000)


def decodes_or_says_why(coded):
    tensor = None
    with suppress(ValueError):
        tensor = decode({"m": coded})["m"]
    assert tensor is None or (tensor.dtype, tensor.shape) == (DTYPES[coded.dtype], coded.shape)


@given(
    dtype=st.sampled_from([*DTYPES, "object"]),
    shape=st.lists(st.integers(-2, 3000), max_size=3),
    coding=st.sampled_from([*TRANSPORTS, "x"]),
    data=st.binary(max_size=200),
)
@settings(max_examples=80)
def test_any_bytes_are_a_tensor_or_an_error(dtype, shape, coding, data):
    decodes_or_says_why(Coded(dtype, tuple(shape), coding, data))


@given(
    tensor=tensors(),
    transport=st.sampled_from(TRANSPORTS),
    at=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
@settings(max_examples=60)
def test_a_changed_bit_is_a_tensor_of_that_shape_or_an_error(tensor, transport, at, bit):
    state = {"m": tensor.nan_to_num(0, 0, 0) if tensor.is_floating_point() else tensor}
    coded = encode(state, transport)[0]["m"]
    if coded.data:
        data = bytearray(coded.data)
        data[int(at * len(data))] ^= 1 << bit
        decodes_or_says_why(coded._replace(data=bytes(data)))


def test_what_travels_besides_bytes_is_names_and_numbers():
    encoded, _ = encode({"m": torch.ones(2 * BLOCK)}, "int8")
    assert json.loads(json.dumps(encoded["m"][:3])) == ["float32", [2 * BLOCK], "int8"]
