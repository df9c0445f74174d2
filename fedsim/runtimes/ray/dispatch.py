"""One `run` or `map` on the actors: it distributes the items, and repeats those whose actor dies."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from time import monotonic
from typing import Any, NamedTuple

import ray

from fedsim.errors import NodeError, RoundError
from fedsim.federated.fold import failure
from fedsim.federated.runtime import Outcomes, Results
from fedsim.runtimes.ray.actor import Answer, Order
from fedsim.runtimes.ray.cluster import first_line
from fedsim.runtimes.ray.packing import Packed, pack, unpack
from fedsim.runtimes.ray.pool import POLL_SECONDS, Pool, Ref, Slot, answer, warn
from fedsim.types import Job, Report

MAX_DEATHS = 3  # of actors while they run one item; then the item counts as failed
SHORT_ITEM_SECONDS = 0.05  # for shorter items, an actor has a second one queued, so as not to wait for the driver
LARGE_STATE_BYTES = 2**14  # larger states of clients are put into Ray's store, which spills to disk
ORDER_NUMBERS = count()  # the numbers of orders


class SentItem(NamedTuple):
    """An item as it is sent to an actor."""

    place: int  # index among all items
    item: Any  # a Job without the client's state, or another item
    client: Packed | Ref | None  # the client's state


@dataclass
class ActorItems:
    """The items of an order at one actor: those it has to run, in order, and those in its sum."""

    pending: deque[tuple[Ref, SentItem]] = field(default_factory=deque)
    summed: list[SentItem] = field(default_factory=list)


class Dispatch:
    """One call of `run` or `map`.

    The death of an actor does not change the result. An actor's sum reaches the driver after the last client, or
    never: if the actor dies before, each client in the sum runs again on another actor. So each client is in
    exactly one sum that arrives. Its message is the same again, since it starts from the same state, and its
    random numbers depend on (seed, round, client). Sums are exact, so it does not matter which sum it is in. Only
    the first report of each client is passed on.
    """

    def __init__(self, pool: Pool, order: Order, items: Iterable[Any]):
        self.number, self.pool, self.order = next(ORDER_NUMBERS), pool, order
        self.packed = ray.put(pack(order))
        self.items, self.all_taken = iter(enumerate(items)), False
        self.to_repeat: deque[SentItem] = deque()  # items whose actor died
        self.by_actor: dict[Slot, ActorItems] = {}
        self.answered: set[int] = set()  # by place
        self.deaths: Counter[int] = Counter()  # of actors, by the place of the only item that they had
        self.one_died = False  # from then on each actor has one item, so that a death is that item's
        self.queue_length = 1  # items at one actor, at most

    def run(self) -> Results:
        """Reports as clients finish, and at the end the actors' sums."""
        assert self.order.aggregator
        try:
            while True:
                for report in self._answers():
                    yield self.order.aggregator.fold([]), [report]
                if not self.by_actor:
                    break
                for slot, ref in {slot: slot.actor.finish.remote(self.number) for slot in self.by_actor}.items():
                    try:
                        partial = unpack(answer(ref), own=True)
                        del self.by_actor[slot]
                        yield partial, []
                    except ray.exceptions.RayError as error:
                        self._replace_dead(slot, error)  # its clients run again
        finally:
            self._close()

    def map(self) -> Outcomes[Any]:
        """Each item with the result of the work, or with the error it raised."""
        try:
            yield from self._answers()
        finally:
            self._close()

    def _answers(self) -> Iterator[Any]:
        """Reports, or items and updates, until no item is left to do."""
        while True:
            self._hand_out()
            if not (self.to_repeat or not self.all_taken or any(f.pending for f in self.by_actor.values())):
                return
            yield from self._next_answers()

    def _hand_out(self) -> None:
        """Send items until each ready actor has `queue_length` of them, or none are left."""
        for depth in range(self.queue_length):
            for slot in self.pool.ready():
                if slot not in self.by_actor or len(self.by_actor[slot].pending) <= depth:
                    if not (sent := self._next()):
                        return
                    self._send(slot, sent)

    def _next(self) -> SentItem | None:
        if self.to_repeat:
            return self.to_repeat.popleft()
        if not (upcoming := next(self.items, None)):
            self.all_taken = True
            return None
        place, item = upcoming
        if not isinstance(item, Job):
            return SentItem(place, item, None)
        state = pack(item.client) if item.client else None
        large = state and sum(value.nbytes for value in (item.client or {}).values()) > LARGE_STATE_BYTES
        return SentItem(place, item._replace(client=None), ray.put(state) if large else state)

    def _send(self, slot: Slot, sent: SentItem) -> None:
        if slot not in self.by_actor:
            slot.actor.begin.remote(self.number, self.packed)
            self.by_actor[slot] = ActorItems()
        ref = slot.actor.work.remote(self.number, sent.item, sent.client)
        self.by_actor[slot].pending.append((ref, sent))

    def _next_answers(self) -> list[Any]:
        """Wait for an answer; returns all new answers that have arrived."""
        busy = {items.pending[0][0]: slot for slot, items in self.by_actor.items() if items.pending}
        starting = {slot.opening: slot for slot in self.pool.starting()}
        refs = [*busy, *starting]
        if not refs:
            raise RoundError("no Ray actor is left that can run clients")
        done, waiting = ray.wait(refs, timeout=POLL_SECONDS)
        if done and waiting:
            done += ray.wait(waiting, num_returns=len(waiting), timeout=0)[0]
        for ref in done:
            if ref in starting and (failed := self.pool.opened(starting[ref])):
                warn(f"a Ray actor cannot be used; {failed.error()}")
        self.pool.check_waiting()
        answers = [self._answer(busy[ref]) for ref in done if ref in busy]
        return [each for each in answers if each is not None]

    def _answer(self, slot: Slot) -> Any:
        """The answer for the actor's first item, or None if the item has an answer already."""
        items = self.by_actor[slot]
        ref, sent = items.pending[0]
        try:
            result: Answer = answer(ref)
        except ray.exceptions.RayError as error:
            return self._replace_dead(slot, error)
        items.pending.popleft()
        self.pool.alive = monotonic()
        self.queue_length = 1 if self.one_died or result.seconds > SHORT_ITEM_SECONDS else 2
        raised = result.failure.error() if result.failure else None
        if result.report is None:
            return self._if_first(sent, (sent.item, raised or unpack(result.update, own=True)))  # type: ignore[arg-type]
        report = result.report._replace(
            client=unpack(result.client, own=True) if result.client else {}, exception=raised
        )
        if not report.error:
            items.summed.append(sent)
        return self._if_first(sent, report)

    def _if_first(self, sent: SentItem, answered: Any) -> Any:
        """The answer, or None if the item has been answered already; then it ran again, with the same result."""
        if sent.place not in self.answered:
            self.answered.add(sent.place)
            return answered
        if isinstance(answered, Report) and answered.error:
            raise RoundError(
                f"round {sent.item.round + 1}: client {answered.client_id} answered, then its Ray actor died, "
                f"and its second run failed: {answered.error}"
            )
        return None

    def _replace_dead(self, slot: Slot, error: Exception) -> Any:
        """Replace a dead actor and repeat its items; returns an answer if its first item counts as failed."""
        items = self.by_actor.pop(slot)
        self.pool.replace(slot)
        self.one_died, self.queue_length = True, 1
        waiting = [sent for _, sent in items.pending]
        self.to_repeat.extend(items.summed)
        self.to_repeat.extendleft(reversed(waiting))  # first: one of them may kill the next actor, too
        if len(waiting) == 1:  # of two, the first may have been done, and its answer lost
            (sent,) = waiting
            self.deaths[sent.place] += 1
            if self.deaths[sent.place] >= MAX_DEATHS:
                self.to_repeat.popleft()
                return self._failed_item(sent, error)
        number = len(waiting) + len(items.summed)
        warn(f"{slot.name} died, and {number} clients run again ({first_line(error)})")
        return None

    def _failed_item(self, sent: SentItem, error: Exception) -> Any:
        """The answer for an item whose actors died too often."""
        why = NodeError(f"its Ray actor died {MAX_DEATHS} times ({first_line(error)})")
        why.__cause__ = error
        return self._if_first(sent, failure(sent.item, why, 0.0) if self.order.aggregator else (sent.item, why))

    def _close(self) -> None:
        """Cancel waiting items and delete the actors' sums; answers of running items are dropped."""
        for slot, items in self.by_actor.items():
            for ref, _ in list(items.pending)[1:]:
                ray.cancel(ref)
            slot.actor.forget.remote(self.number)
