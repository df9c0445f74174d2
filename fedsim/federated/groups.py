"""A mean for each group of clients, for algorithms with several models: clusters, or the edges of a hierarchy."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.errors import RoundError
from fedsim.federated.aggregate import Sum, add, checked, mean_of, most_common_form, other_forms
from fedsim.federated.positions import BUFFERS, GROUP, WHERE, entries
from fedsim.types import Form, State, form_of

MAX_GROUPS = 2**16
ALL = -1  # in the place of a group: the sum of all clients' statistics
Grouped = dict[Form, dict[int, Sum]]


@dataclass(frozen=True)
class GroupMeans:
    """The `WeightedMean` of each group, as exact: entries of the result are (G, ...), for the groups 0 to G - 1.

    A client says by `Update(..., group=...)` which is its own. A group that no client gave has zeros, and the
    weight 0 in `info.group_weights`. Batch-norm statistics have one mean over all clients.
    """

    groups: int  # G

    def fold(self, updates: Iterable[tuple[int, State, float]], start: Grouped | None = None) -> Grouped:
        total = {} if start is None else start
        for client, message, weight in updates:
            group = self._group(message)
            own = {name: value for name, value in message.items() if name not in (GROUP, BUFFERS)}
            statistics = {name: value for name, value in message.items() if name == BUFFERS}
            # All clients are in the first sum: it refuses one too many before any sum has changed.
            parts = {ALL: checked(client, statistics, weight), group: checked(client, own, weight)}
            _merge(total.setdefault(form_of(entries(message)), {}), parts)
        return total

    def merge(self, a: Grouped, b: Grouped) -> Grouped:
        for form, theirs in b.items():
            _merge(a.setdefault(form, {}), theirs)
        return a

    def mismatched(self, total: Grouped) -> dict[int, str]:
        return other_forms(_clients(total))

    def result(self, total: Grouped) -> State:
        form = most_common_form(_clients(total))
        sums = total.get(form, {ALL: Sum()})
        if not sums[ALL].weight:
            raise RoundError("no client's message has a weight above 0")
        own = tuple(entry for entry in form if entry[0] != BUFFERS)
        weights = [float(sums[g].weight) if g in sums else 0.0 for g in range(self.groups)]
        means = {g: mean_of(sums[g], own) for g, weight in enumerate(weights) if weight}
        names = {name: value for mean in means.values() for name, value in mean.items()}

        def rows(name: str, like: Tensor) -> list[Tensor]:
            """Of an empty group zeros; and where all of a group cover all, its weight."""
            missing = weights if name.startswith(WHERE) else [0.0] * self.groups
            return [means.get(g, {}).get(name, torch.full_like(like, missing[g])) for g in range(self.groups)]

        found = {name: torch.stack(rows(name, like)) for name, like in names.items()}
        found |= mean_of(sums[ALL], tuple(entry for entry in form if entry[0] == BUFFERS))
        return found | {GROUP: torch.tensor(weights, dtype=torch.float64)}

    def _group(self, message: State) -> int:
        """The group of a message; raises ArithmeticError if it has none that there is."""
        group = message.get(GROUP)
        if group is None or (group.shape, group.dtype) != ((), torch.int64) or not 0 <= int(group) < self.groups:
            made = "no group" if group is None else f"the group {str(group.tolist())[:40]}"
            raise ArithmeticError(f"gives {made}; it should be a whole number from 0 to {self.groups - 1}")
        return int(group)


def _merge(sums: dict[int, Sum], more: dict[int, Sum]) -> None:
    for group, each in more.items():
        add(sums.setdefault(group, Sum()), each)


def _clients(total: Grouped) -> dict[Form, list[int]]:
    return {form: sums[ALL].clients for form, sums in total.items()}
