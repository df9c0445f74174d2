"""The wire format: a message as a Flower record, with names and numbers as JSON and tensors as plain bytes.

Nothing is unpickled. What arrives is checked before it is used: the JSON against the fields of the message, the
bytes of a tensor against its shape and type.
"""

from collections import OrderedDict
from typing import Any, TypeVar, get_type_hints

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from fedsim.base.reading import MAX_YAML_BYTES, first_fault
from fedsim.errors import located, one_line
from fedsim.flower.messages import FORMAT, Answer, Finished, Hello, Invitation, Joined, Order
from fedsim.flower.transport import Coded, Encoded, decode, encode
from fedsim.types import State

Message = TypeVar("Message", Hello, Invitation, Joined, Order, Answer, Finished)

KEY = f"fedsim.{FORMAT}"  # name of the record that has the JSON
STYPE = "fedsim."  # then the coding of a tensor: the `stype` of a Flower array
MOST_ARRAYS = 10_000
MOST_CHARACTERS: dict[Any, int] = {  # of the JSON: each wrong field takes time
    **dict.fromkeys((Hello, Joined, Answer, Finished), 2**18),
    Invitation: 8 * MAX_YAML_BYTES,  # whose plan is escaped
    Order: 2**22,
}


def _schema(kind: Any) -> type[BaseModel]:
    """A pydantic model of a message's fields without tensors."""
    fields: dict[str, Any] = {n: (h, ...) for n, h in get_type_hints(kind).items() if n not in TENSORS[kind]}
    config = ConfigDict(extra="forbid", strict=True, ser_json_inf_nan="constants")
    return create_model(kind.__name__, __config__=config, **fields)


KINDS: tuple[Any, ...] = (Hello, Invitation, Joined, Order, Answer, Finished)
TENSORS = {kind: {n: h for n, h in get_type_hints(kind).items() if h in (State, Encoded)} for kind in KINDS}
SCHEMAS = {kind: _schema(kind) for kind in KINDS}


def record(message: Hello | Invitation | Joined | Order | Answer | Finished, **records: ArrayRecord) -> RecordDict:
    """A message as a Flower record. `records` has fields that are encoded already, and are not encoded again."""
    numbers, states = {}, dict[str, ArrayRecord]()
    for name, value in message._asdict().items():
        if name in TENSORS[type(message)]:
            states[name] = records[name] if name in records else arrays(_encoded(type(message), name, value))
        else:
            numbers[name] = value
    text = SCHEMAS[type(message)](**numbers).model_dump_json()
    return RecordDict({KEY: ConfigRecord({"kind": type(message).__name__, "json": text}), **states})


def read(kind: type[Message], content: RecordDict) -> Message:
    """A Flower record as a message of that kind; raises ValueError, in one line, if it is not one."""
    try:
        about = content.config_records[KEY]
        if about["kind"] != kind.__name__:
            raise ValueError(f"is {about['kind']!r:.40} and should be {kind.__name__}")
        if strange := content.keys() - {KEY, *TENSORS[kind]}:
            raise ValueError(f"has {min(strange)!r:.40}, which no {kind.__name__} has")
        if len(text := str(about["json"])) > MOST_CHARACTERS[kind]:
            raise ValueError(f"has {len(text)} characters of JSON; allowed: {MOST_CHARACTERS[kind]}")
        found: dict[str, Any] = dict(SCHEMAS[kind].model_validate_json(text))
        found |= {name: _decoded(kind, name, content.array_records[name]) for name in TENSORS[kind]}
    except KeyError as error:
        raise ValueError(f"has no {error.args[0]!r:.40}; it is not from fedsim, or from another version") from None
    except ValidationError as error:
        raise ValueError(one_line(first_fault(error))) from None
    except ValueError:
        raise
    except Exception as error:  # whatever bytes from an untrusted sender make Flower's code, or ours, raise
        raise ValueError(f"cannot be read: {located(error)}") from None
    return kind(**found)


def kind(content: RecordDict) -> str:
    """The name of the kind of message in a record; raises ValueError if the record is not from fedsim."""
    if KEY not in content.config_records:
        raise ValueError(f"has no {KEY!r}; it is not from fedsim, or from another version")
    return str(content.config_records[KEY].get("kind", ""))


def arrays(values: Encoded) -> ArrayRecord:
    """Encoded tensors as a Flower record."""
    return ArrayRecord(OrderedDict((name, _array(value)) for name, value in sorted(values.items())))


def encoded(values: ArrayRecord) -> Encoded:
    """The reverse of `arrays`; raises ValueError if there are too many."""
    if len(values) > MOST_ARRAYS:
        raise ValueError(f"has {len(values)} tensors; allowed: {MOST_ARRAYS}")
    return {
        name: Coded(a.dtype, tuple(a.shape), a.stype.removeprefix(STYPE), a.data) for name, a in values.items()
    }


def _array(value: Coded) -> Array:
    return Array(dtype=value.dtype, shape=value.shape, stype=STYPE + value.coding, data=value.data)


def _encoded(kind: type, name: str, value: Any) -> Encoded:
    return encode(value, "exact")[0] if TENSORS[kind][name] == State else value


def _decoded(kind: type, name: str, values: ArrayRecord) -> State | Encoded:
    found = encoded(values)
    if TENSORS[kind][name] == Encoded:
        return found
    return decode(found, sum(len(each.data) for each in found.values()))  # decoding does not enlarge them
