"""The files model.safetensors and ema.safetensors: a network's tensors, and how they make up the vectors of a run.

Beside the tensors lies their order, so that the fingerprint of a run can be computed from the file alone, and a
SHA-256 of all of it, as a fingerprint does not cover what no run changes.
"""

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from fedsim.base.files import untied_copies
from fedsim.base.reading import parse_json
from fedsim.errors import one_line
from fedsim.training.layout import Layout, Order
from fedsim.types import State, described, form_of, hash_into

HEADER_LENGTH = 8  # bytes that say how long a safetensors header is


class About(BaseModel):
    """What is said of the tensors."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: list[str]
    buffers: list[str]
    channels_last: bool
    sha256: str


def content(tensors: State, order: Order) -> bytes:
    """The bytes of such a file."""
    own = untied_copies(tensors)
    about = order._asdict() | {"sha256": _digest(own, order)}
    return save(own, {"fedsim": json.dumps(about)})


def vectors(content: bytes) -> State | None:
    """`model` (P,) and `buffers` (Q,) of such a file; raises ValueError where the file is not whole.

    None where the file does not have all of them: it is of an older version, or the network leaves buffers out of
    its state_dict.
    """
    try:
        tensors = load(content)
        end = HEADER_LENGTH + int.from_bytes(content[:HEADER_LENGTH], "little")
        header = parse_json(content[HEADER_LENGTH:end])
        said: Any = (header.get("__metadata__") or {}).get("fedsim")
        if said is None:
            return None
        about = About.model_validate_json(said)
    except (SafetensorError, KeyError, ValidationError) as error:  # KeyError: a type that torch does not have
        raise ValueError(f"is not a file of a model: {one_line(error)}") from None
    order = Order(about.model, about.buffers, about.channels_last)
    names = [*order.model, *order.buffers]
    if len({*names}) < len(names) or about.sha256 != _digest(tensors, order):
        raise ValueError("has changed since it was written")
    if not tensors.keys() >= {*names}:
        return None
    return {
        "model": _vector(tensors, order.model, order.channels_last),
        "buffers": _vector(tensors, order.buffers, False),
    }


def _vector(tensors: State, names: list[str], channels_last: bool) -> Any:
    own = {name: tensors[name] for name in names}  # the first says of which type the vector is
    return Layout({name: value.shape for name, value in own.items()}, channels_last).flatten(own)


def _digest(tensors: State, order: Order) -> str:
    said = json.dumps(order._asdict(), sort_keys=True)
    digest = hashlib.sha256(f"{said} {described(form_of(tensors))}".encode())
    hash_into(digest, tensors)
    return digest.hexdigest()
