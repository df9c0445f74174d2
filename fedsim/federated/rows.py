"""All messages of a round at once, for algorithms that need more than their mean."""

from collections.abc import Iterable
from operator import itemgetter

import torch
from torch import Tensor

from fedsim.errors import RoundError
from fedsim.federated.aggregate import WeightedMean, check_count, magnitudes, most_common_form, other_forms
from fedsim.federated.fold import compact
from fedsim.federated.positions import WHERE, entries
from fedsim.types import Form, State, form_of

Kept = dict[Form, list[tuple[int, State]]]  # clients and their messages, by form


class Rows:
    """Keeps all messages: each entry of the result is (C, ...), a row for each client, in the order of their ids.

    It refuses what `WeightedMean` refuses. The weights are in `RoundInfo.weights`; a message of weight 0 is a row.
    Of an entry of which messages cover only some positions, rows are 0 elsewhere; `where.NAME` has their masks.
    Memory grows with the cohort: the server's machine holds all messages, and twice that while it makes the rows.
    """

    def fold(self, updates: Iterable[tuple[int, State, float]], start: Kept | None = None) -> Kept:
        total = {} if start is None else start
        for client, message, weight in updates:
            magnitudes(message, weight)
            kept = {name: compact(value) for name, value in message.items()}
            total = self.merge(total, {form_of(entries(kept)): [(client, kept)]})
        return total

    def merge(self, a: Kept, b: Kept) -> Kept:
        for form, theirs in b.items():
            check_count(len(a.get(form, ())) + len(theirs))
            a.setdefault(form, []).extend(theirs)
        return a

    def mismatched(self, total: Kept) -> dict[int, str]:
        return other_forms(_clients(total))

    def result(self, total: Kept) -> State:
        form = most_common_form(_clients(total))
        messages = [message for _, message in sorted(total.get(form, []), key=itemgetter(0))]
        if not messages:
            raise RoundError("no client has sent a message")
        rows = {name: torch.stack([message[name] for message in messages]) for name, _, _ in form}
        for name in {name for message in messages for name in message if name.startswith(WHERE)}:
            all_ = torch.ones_like(messages[0][name.removeprefix(WHERE)], dtype=torch.uint8)
            rows[name] = torch.stack([message.get(name, all_) for message in messages])
        return rows


def _clients(total: Kept) -> dict[Form, list[int]]:
    return {form: [client for client, _ in kept] for form, kept in total.items()}


def mean_of_rows(rows: Tensor, weights: Tensor) -> Tensor:
    """(...) the mean of rows (C, ...) with these weights (C,), as exact as a `WeightedMean`; raises RoundError."""
    mean, pairs = WeightedMean(), zip(rows, weights.tolist(), strict=True)
    return mean.result(mean.fold((number, {"": row}, weight) for number, (row, weight) in enumerate(pairs)))[""]
