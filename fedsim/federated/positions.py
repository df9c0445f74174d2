"""Messages that cover only some positions of an entry.

`Update.where` says which. In the message that is added up, `where.NAME` is a mask, 1 where the entry NAME is
covered, and the entry is 0 elsewhere. The sums of both are exact, and their quotient is the mean of each position.
A message without a mask covers all; so messages with and without one are of one form.
"""

import torch
from torch import Tensor

from fedsim.types import State, Update

WHERE = "where."  # in a message, before the name of an entry: its mask, uint8
GROUP = "group"  # in a message: the client's group, int64 ()
BUFFERS = "buffers"  # in a message: batch-norm statistics
MASK_TYPES = torch.bool, torch.uint8
INTEGERS = torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8
MOST_INDEXED = 2**31  # entries of a tensor whose positions fit into int32


def is_reserved(name: str) -> bool:
    """Whether only fedsim gives an entry of a message this name, from the fields of an `Update`."""
    return name == GROUP or name.startswith(WHERE)


def entries(message: State) -> State:
    """The entries of a message that a strategy has sent, and its statistics."""
    return {name: value for name, value in message.items() if not is_reserved(name)}


def fault_of(update: Update) -> str | None:
    """What is wrong with the form of an update's group and positions, or None; values are not looked at."""
    if taken := [name for name in update.message if is_reserved(name)]:
        return f"gave {taken[0]!r} in its message; Update has the arguments group and where"
    group = update.group
    whole = (
        group.dtype in INTEGERS and not group.shape
        if isinstance(group, Tensor)
        else type(group) is int and group.bit_length() < 64
    )
    if not (whole or group is None):
        made = f"{group.dtype} {tuple(group.shape)}" if isinstance(group, Tensor) else repr(group)
        return f"gave {made} as its group; it should be a whole number, or an int64 tensor ()"
    for name, places in update.where.items():
        if name not in update.message or name == BUFFERS:
            return f"gave {name!r} in where; names there are those of its message, except of statistics"
        shape, whole = update.message[name].shape, places.dtype == torch.int64
        if places.shape != shape or (whole and len(shape) != 1) or places.dtype not in (*MASK_TYPES, torch.int64):
            made = f"{places.dtype} {tuple(places.shape)} for {tuple(shape)}"
            right = "it should be a mask (bool) in the shape of the entry, or the positions int64 (m,) of m values"
            return f"gave {made} as where[{name!r}]; {right}"
    return None


def masked(update: Update, like: Tensor) -> Update:
    """The same update with masks for index sets, and entries that are 0 where they are not covered.

    Index sets are positions of a vector of the form of `like` (P,), the model. It does not wait for values, nor
    branch on them: `check_positions` refuses the masks that it makes of wrong index sets.
    """
    message, where = dict(update.message), dict(update.where)
    for name, given in update.where.items():
        places = given.to(message[name].device)
        if places.dtype == torch.int64:
            where[name], message[name] = _scattered(places, message[name], like)
        else:
            where[name] = places.to(torch.uint8)
            message[name] = torch.where(places > 0, message[name], 0)
    return update._replace(message=message, where=where)


def _scattered(places: Tensor, values: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The mask (P,) of an index set (m,), of which 2 says that it is none; and the values at its positions."""
    length = like.numel()
    ends = places.new_full((1,), -1), places.new_full((1,), length)
    distinct = torch.cat([ends[0], places.sort().values, ends[1]]).diff().gt(0).all()
    places = places.clamp(0, length - 1)
    mask = torch.zeros_like(like, dtype=torch.uint8).scatter(0, places, torch.ones_like(places, dtype=torch.uint8))
    return torch.where(distinct, mask, 2), torch.zeros_like(like, dtype=values.dtype).scatter(0, places, values)


def packed(update: Update, like: Tensor) -> Update:
    """The update as it is added up and sent: its group and positions are entries of the message."""
    update = masked(update, like)
    more = {WHERE + name: mask for name, mask in update.where.items()}
    if update.group is not None:
        # On the device of the model: a copy from the host cannot be captured.
        more[GROUP] = like.new_zeros((), dtype=torch.int64) + update.group
    return update._replace(message=update.message | more, group=None, where={})


def check_positions(message: State) -> None:
    """Raise ArithmeticError unless each mask of a message is one of its entries, which statistics have not."""
    for name, mask in message.items():
        if not name.startswith(WHERE):
            continue
        entry = None if name == WHERE + BUFFERS else message.get(name.removeprefix(WHERE))
        if entry is None or (mask.shape, mask.dtype) != (entry.shape, torch.uint8):
            raise ArithmeticError(f"{name} is {mask.dtype} {tuple(mask.shape)}, which is no mask of an entry")
        if mask.numel() and int(mask.max()) > 1:
            raise ArithmeticError(f"{name} has a position twice, or one outside of 0 to {mask.numel() - 1}")


def sent_bytes(message: State) -> int:
    """The bytes of a message that are sent: of an entry the covered values, and which they are."""
    size = 0
    for name, value in message.items():
        if name.startswith(WHERE):
            continue
        if (mask := message.get(WHERE + name)) is None:
            size += value.nbytes
        else:
            covered = int(mask.count_nonzero())
            size += covered * value.itemsize + min(mask_sizes(mask.numel(), covered).values())
    return size


def mask_sizes(entries: int, covered: int) -> dict[str, int]:
    """The bytes of a mask by how it is encoded: a bit for each entry, or an int32 for each covered one."""
    sizes = {"bits": -(-entries // 8)}
    return sizes | {"indices": 4 * covered} if entries <= MOST_INDEXED else sizes
