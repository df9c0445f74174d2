"""One run on the actors: which client is where, and what becomes of those whose actor dies."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from time import monotonic
from typing import NamedTuple

import ray
import torch

from fedsim.errors import ClientError, RoundError
from fedsim.federated.aggregate import Partial
from fedsim.runtimes.ray.actor import Answer, Order
from fedsim.runtimes.ray.cluster import first_line
from fedsim.runtimes.ray.packing import Packed, pack, unpack
from fedsim.runtimes.ray.pool import TICK, Pool, Ref, Seat, answer, warn
from fedsim.types import Job, Report

DEATHS = 3  # of its actor, after which a client is thought to be the cause
SLOW = 0.05  # seconds: while clients take less, an actor has one waiting, so that it need not wait for the driver
LARGE = 2**14  # bytes of a client's state, from which on it waits in Ray's store, which spills to disk
NUMBERS = count()  # of runs


class Sent(NamedTuple):
    """A job as an actor takes it."""

    client: int
    round: int
    state: Packed | Ref | None


@dataclass
class Flight:
    """What one actor has of a run: clients under way, in their order, and those in its sum."""

    under_way: deque[tuple[Ref, Sent]] = field(default_factory=deque)
    summed: list[Sent] = field(default_factory=list)


class Dispatch:
    """One call of `run`.

    Deaths do not change the result. An actor's sum reaches the driver whole, after the last client, or never: if
    the actor dies first, each client in it runs again, elsewhere, so that each is in exactly one sum that arrives.
    It sends the same message again, for it starts from the same state, and its randomness has a key: seed, round,
    client. And sums are exact, so it does not matter which one it is in. Only its first report is passed on.
    """

    def __init__(self, pool: Pool, order: Order, jobs: Iterable[Job]):
        self.number, self.pool, self.order = next(NUMBERS), pool, order
        self.packed = ray.put(pack(order))
        self.jobs, self.all_taken = iter(jobs), False
        self.again: deque[Sent] = deque()  # whose actor died
        self.flights: dict[Seat, Flight] = {}
        self.reported: set[int] = set()
        self.deaths: Counter[int] = Counter()  # of actors, by the client that was running
        self.ahead = 1  # clients that an actor has at most

    def results(self) -> Iterator[tuple[Partial, list[Report]]]:
        """What `run` yields: reports as clients finish, and at the end the actors' sums."""
        try:
            while True:
                self._hand_out()
                if self.again or not self.all_taken or any(f.under_way for f in self.flights.values()):
                    yield self.order.aggregator.fold([]), self._reports()
                elif self.flights:
                    for partial in self._sums():
                        yield partial, []
                else:
                    break
        finally:
            self._close()

    def _hand_out(self) -> None:
        """Have `ahead` clients with each actor that is ready, as long as there are any."""
        for depth in range(self.ahead):
            for seat in self.pool.ready():
                if seat not in self.flights or len(self.flights[seat].under_way) <= depth:
                    if not (sent := self._next()):
                        return
                    self._send(seat, sent)

    def _next(self) -> Sent | None:
        if self.again:
            return self.again.popleft()
        if not (job := next(self.jobs, None)):
            self.all_taken = True
            return None
        state = pack(job.client) if job.client else None
        large = state and sum(value.nbytes for value in (job.client or {}).values()) > LARGE
        return Sent(job.client_id, job.round, ray.put(state) if large else state)

    def _send(self, seat: Seat, sent: Sent) -> None:
        if seat not in self.flights:
            seat.actor.begin.remote(self.number, self.packed)
            self.flights[seat] = Flight()
        self.flights[seat].under_way.append((seat.actor.client.remote(self.number, *sent), sent))

    def _reports(self) -> list[Report]:
        """Wait for an answer, and take all that are there; reports that are new."""
        busy = {flight.under_way[0][0]: seat for seat, flight in self.flights.items() if flight.under_way}
        starting = {seat.opening: seat for seat in self.pool.starting()}
        refs = [*busy, *starting]
        if not refs:
            raise RoundError("no Ray actor is left that can do the work")
        done, waiting = ray.wait(refs, timeout=TICK)
        if done and waiting:
            done += ray.wait(waiting, num_returns=len(waiting), timeout=0)[0]
        for ref in done:
            if ref in starting and (failure := self.pool.opened(starting[ref])):
                warn(f"does without a Ray actor; {failure.error()}")
        self.pool.patience()
        reports = [self._report(busy[ref]) for ref in done if ref in busy]
        return [report for report in reports if report]

    def _report(self, seat: Seat) -> Report | None:
        """What the actor's first client has to say, if that is new."""
        flight = self.flights[seat]
        ref, sent = flight.under_way[0]
        try:
            said: Answer = answer(ref)
        except ray.exceptions.RayError as error:
            return self._died(seat, error)
        flight.under_way.popleft()
        report = said.report._replace(client=unpack(said.kept, own=True) if said.kept else {})
        for name in said.written:  # what a client wrote to counts as written here
            torch.autograd.graph.increment_version(self.order.server[name])
        self.pool.alive, self.ahead = monotonic(), 1 if report.seconds > SLOW else 2
        if not report.error:
            flight.summed.append(sent)
        return self._new(sent, report)

    def _new(self, sent: Sent, report: Report) -> Report | None:
        """The report, unless its client has one already: then it ran again, and must have come to the same end."""
        if sent.client not in self.reported:
            self.reported.add(sent.client)
            return report
        if report.error:
            raise RoundError(
                f"round {sent.round + 1}: client {sent.client} answered, its Ray actor died, and when it was run "
                f"again it failed: {report.error}"
            )
        return None

    def _died(self, seat: Seat, error: Exception) -> Report | None:
        """Replace an actor and have its clients run again; a report on the one under way if it did that often."""
        flight = self.flights.pop(seat)
        self.pool.replace(seat)
        waiting = [sent for _, sent in flight.under_way]
        self.again.extend(flight.summed)
        self.again.extendleft(reversed(waiting))  # what kills an actor should not do it when that has done much
        if waiting:
            first = waiting[0]
            self.deaths[first.client] += 1
            if self.deaths[first.client] >= DEATHS:
                self.again.popleft()
                return self._deadly(first, error)
        again = len(waiting) + len(flight.summed)
        warn(f"{seat.name} died, and {again} clients run again ({first_line(error)})")
        return None

    def _deadly(self, sent: Sent, error: Exception) -> Report | None:
        """A report on a client that ends its actors; raises ClientError unless the run is tolerant."""
        cause = f"its Ray actor died {DEATHS} times ({first_line(error)})"
        if not self.order.tolerant:
            raise ClientError(f"round {sent.round + 1}, client {sent.client}: {cause}") from error
        return self._new(sent, Report(sent.client, 0.0, {}, {}, 0.0, 0, cause))

    def _sums(self) -> list[Partial]:
        """Of the actors; those of one that dies are left to run again."""
        sums = []
        for seat, ref in {seat: seat.actor.finish.remote(self.number) for seat in self.flights}.items():
            try:
                sums.append(unpack(answer(ref), own=True))
                del self.flights[seat]
            except ray.exceptions.RayError as error:
                self._died(seat, error)
        return sums

    def _close(self) -> None:
        """Leave no client to start, and no sum behind; those under way come to their end, which nobody minds."""
        for seat, flight in self.flights.items():
            for ref, _ in list(flight.under_way)[1:]:
                ray.cancel(ref)
            seat.actor.forget.remote(self.number)
