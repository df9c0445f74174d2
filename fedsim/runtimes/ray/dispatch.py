"""One `run` or `map` on the actors: which item is where, and what becomes of those whose actor dies."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from time import monotonic
from typing import Any, NamedTuple

import ray

from fedsim.errors import NodeError, RoundError
from fedsim.federated.fold import failure
from fedsim.federated.runtime import Results
from fedsim.runtimes.ray.actor import Answer, Order
from fedsim.runtimes.ray.cluster import first_line
from fedsim.runtimes.ray.packing import Packed, pack, unpack
from fedsim.runtimes.ray.pool import POLL_SECONDS, Pool, Ref, Slot, answer, warn
from fedsim.types import Job, Report, Update

MAX_DEATHS = 3  # of actors with one item, after which the item is thought to be the cause
SHORT = (
    0.05  # seconds: where an item takes less, an actor has one waiting, so that it need not wait for the driver
)
LARGE = 2**14  # bytes of a client's state, from which on it waits in Ray's store, which spills to disk
NUMBERS = count()  # of orders


class Sent(NamedTuple):
    """An item as an actor takes it."""

    place: int  # among all items
    item: Any  # a Job without the client's state, or another item
    client: Packed | Ref | None  # the client's state


@dataclass
class Flight:
    """What one actor has of an order: items under way, in their order, and those in its sum."""

    under_way: deque[tuple[Ref, Sent]] = field(default_factory=deque)
    summed: list[Sent] = field(default_factory=list)


class Dispatch:
    """One call of `run` or `map`.

    Deaths do not change the result. An actor's sum reaches the driver whole, after the last client, or never: if
    the actor dies first, each client in it runs again, elsewhere, so that each is in exactly one sum that arrives.
    It sends the same message again, for it starts from the same state, and its randomness has a key: seed, round,
    client. And sums are exact, so it does not matter which one it is in. Only its first report is passed on.
    """

    def __init__(self, pool: Pool, order: Order, items: Iterable[Any]):
        self.number, self.pool, self.order = next(NUMBERS), pool, order
        self.packed = ray.put(pack(order))
        self.items, self.all_taken = iter(enumerate(items)), False
        self.again: deque[Sent] = deque()  # whose actor died
        self.flights: dict[Slot, Flight] = {}
        self.answered: set[int] = set()  # places
        self.deaths: Counter[int] = Counter()  # of actors, by the place of the item that was running
        self.ahead = 1  # items that an actor has at most

    def run(self) -> Results:
        """Reports as clients finish, and at the end the actors' sums."""
        assert self.order.aggregator
        try:
            while True:
                for report in self._answers():
                    yield self.order.aggregator.fold([]), [report]
                if not self.flights:
                    break
                for slot, ref in {slot: slot.actor.finish.remote(self.number) for slot in self.flights}.items():
                    try:
                        partial = unpack(answer(ref), own=True)
                        del self.flights[slot]
                        yield partial, []
                    except ray.exceptions.RayError as error:
                        self._died(slot, error)  # its clients run again
        finally:
            self._close()

    def map(self) -> Iterator[tuple[Any, Update | BaseException]]:
        """Each item and what the work gave for it, or the error it ended with."""
        try:
            yield from self._answers()
        finally:
            self._close()

    def _answers(self) -> Iterator[Any]:
        """Reports, or items and updates, until no item is left to do."""
        while True:
            self._hand_out()
            if not (self.again or not self.all_taken or any(f.under_way for f in self.flights.values())):
                return
            yield from self._next_answers()

    def _hand_out(self) -> None:
        """Have `ahead` items with each actor that is ready, as long as there are any."""
        for depth in range(self.ahead):
            for slot in self.pool.ready():
                if slot not in self.flights or len(self.flights[slot].under_way) <= depth:
                    if not (sent := self._next()):
                        return
                    self._send(slot, sent)

    def _next(self) -> Sent | None:
        if self.again:
            return self.again.popleft()
        if not (upcoming := next(self.items, None)):
            self.all_taken = True
            return None
        place, item = upcoming
        if not isinstance(item, Job):
            return Sent(place, item, None)
        state = pack(item.client) if item.client else None
        large = state and sum(value.nbytes for value in (item.client or {}).values()) > LARGE
        return Sent(place, item._replace(client=None), ray.put(state) if large else state)

    def _send(self, slot: Slot, sent: Sent) -> None:
        if slot not in self.flights:
            slot.actor.begin.remote(self.number, self.packed)
            self.flights[slot] = Flight()
        ref = slot.actor.work.remote(self.number, sent.item, sent.client)
        self.flights[slot].under_way.append((ref, sent))

    def _next_answers(self) -> list[Any]:
        """Wait for an answer, and take all that are there; those that are new."""
        busy = {flight.under_way[0][0]: slot for slot, flight in self.flights.items() if flight.under_way}
        starting = {slot.opening: slot for slot in self.pool.starting()}
        refs = [*busy, *starting]
        if not refs:
            raise RoundError("no Ray actor is left that can do the work")
        done, waiting = ray.wait(refs, timeout=POLL_SECONDS)
        if done and waiting:
            done += ray.wait(waiting, num_returns=len(waiting), timeout=0)[0]
        for ref in done:
            if ref in starting and (failed := self.pool.opened(starting[ref])):
                warn(f"does without a Ray actor; {failed.error()}")
        self.pool.check_waiting()
        found = [self._answer(busy[ref]) for ref in done if ref in busy]
        return [each for each in found if each is not None]

    def _answer(self, slot: Slot) -> Any:
        """What the actor's first item gave, if that is new."""
        flight = self.flights[slot]
        ref, sent = flight.under_way[0]
        try:
            said: Answer = answer(ref)
        except ray.exceptions.RayError as error:
            return self._died(slot, error)
        flight.under_way.popleft()
        self.pool.alive = monotonic()
        raised = said.failure.error() if said.failure else None
        if said.report is None:
            return self._new(sent, (sent.item, raised or unpack(said.update, own=True)))  # type: ignore[arg-type]
        report = said.report._replace(
            client=unpack(said.client, own=True) if said.client else {}, exception=raised
        )
        self.ahead = 1 if report.seconds > SHORT else 2
        if not report.error:
            flight.summed.append(sent)
        return self._new(sent, report)

    def _new(self, sent: Sent, found: Any) -> Any:
        """What was found, unless the item has an answer already: then it ran again, to the same end."""
        if sent.place not in self.answered:
            self.answered.add(sent.place)
            return found
        if isinstance(found, Report) and found.error:
            raise RoundError(
                f"round {sent.item.round + 1}: client {found.client_id} answered, its Ray actor died, and when it "
                f"was run again it failed: {found.error}"
            )
        return None

    def _died(self, slot: Slot, error: Exception) -> Any:
        """Replace an actor and have its items run again; an answer for the one under way if it did that often."""
        flight = self.flights.pop(slot)
        self.pool.replace(slot)
        waiting = [sent for _, sent in flight.under_way]
        self.again.extend(flight.summed)
        self.again.extendleft(reversed(waiting))  # what kills an actor should not do it when that has done much
        if waiting:
            first = waiting[0]
            self.deaths[first.place] += 1
            if self.deaths[first.place] >= MAX_DEATHS:
                self.again.popleft()
                return self._deadly(first, error)
        again = len(waiting) + len(flight.summed)
        warn(f"{slot.name} died, and {again} clients run again ({first_line(error)})")
        return None

    def _deadly(self, sent: Sent, error: Exception) -> Any:
        """The answer for an item that ends its actors."""
        why = NodeError(f"its Ray actor died {MAX_DEATHS} times ({first_line(error)})")
        why.__cause__ = error
        return self._new(sent, failure(sent.item, why, 0.0) if self.order.aggregator else (sent.item, why))

    def _close(self) -> None:
        """Leave no item to start, and no sum behind; those under way end, and their answers are dropped."""
        for slot, flight in self.flights.items():
            for ref, _ in list(flight.under_way)[1:]:
                ray.cancel(ref)
            slot.actor.forget.remote(self.number)
