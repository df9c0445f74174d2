"""One round on the nodes: orders go out, answers come back in any order and are added up as they come."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import isfinite
from time import monotonic, perf_counter, sleep

import torch

from fedsim.aggregate import Aggregator, Partial
from fedsim.data import FederatedData
from fedsim.errors import NodeError
from fedsim.flower import wire
from fedsim.flower.federation import Federation
from fedsim.flower.internals import LinkError, Reply
from fedsim.flower.messages import Answer, Order
from fedsim.flower.transport import Transport, decode, encode
from fedsim.runtimes.worker import failed, folded
from fedsim.types import Job, Report, State, Update
from fedsim.work import EvaluateClient, Train

POLL = 0.01, 0.2  # seconds between two looks for answers, at least and at most
SHARE = 0.02  # of the time since the last answer, to wait for the next look
MOST = 16  # times what a client is sent, and
LEAST = 2**26  # bytes more, that it may answer
GRACE = 30.0  # seconds that a SuperLink may be out of reach before there is another Flower run
INVITED = 3  # times in a round that a node may say that it does not know the plan
EXAMPLES = 2**40  # that a client may have
SUMS = {Train: {"loss", "examples", "steps"}, EvaluateClient: {"loss", "examples", "correct"}}


@dataclass(frozen=True)
class Flight:
    """A client's order that is under way."""

    job: Job
    node: int
    since: float  # by perf_counter


class Dispatch:
    """The jobs of one round; `server` is what clients are sent, `tolerant` whether the round goes on without some.

    A client whose node is not there waits for it, as long as nodes may take to come; in a tolerant round only
    where no other client has work. Raises ClientError where it does not tolerate a failure.
    """

    def __init__(
        self,
        federation: Federation,
        work: Train | EvaluateClient,
        server: State,
        aggregator: Aggregator,
        data: FederatedData,
        transport: Transport,
        *,
        tolerant: bool,
    ):
        self.federation, self.work, self.server, self.aggregator = federation, work, server, aggregator
        self.data, self.transport, self.tolerant = data, transport, tolerant
        self.broadcast = wire.arrays(encode(server, "exact")[0])  # once, whoever gets it
        self.most = LEAST + MOST * sum(value.nbytes for value in server.values())
        self.total = aggregator.fold([])
        self.todo: list[tuple[Job, float]] = []  # and until when they wait for their nodes
        self.flights: dict[str, Flight] = {}  # by message
        self.invited = Counter[int]()  # clients, whose nodes had lost the plan
        self.placed = False

    def results(self, jobs: Iterable[Job]) -> Iterator[tuple[Partial, list[Report]]]:
        """Reports as answers come, and the sum of what they brought at the end."""
        self.federation.gather()
        self.began = last = heard = monotonic()
        self._wait_for(jobs, 0.0 if self.tolerant else self.federation.timing.wait)
        try:
            while self.todo or self.flights:
                try:
                    reports, heard = self._step(), monotonic()
                except LinkError as error:
                    if not error.again or monotonic() - heard > GRACE:
                        self.federation.reconnect(error)
                        self._again(self.flights)
                    sleep(POLL[1])
                    continue
                if reports:
                    last = monotonic()
                    yield self.aggregator.fold([]), reports
                else:
                    sleep(min(max(SHARE * (monotonic() - last), POLL[0]), POLL[1]))
        finally:
            self.federation.abandon(self.flights)
        yield self.total, []

    def _step(self) -> list[Report]:
        """Send what can be sent, and take what has come."""
        self.federation.look()
        self._send()
        replies = self.federation.link().receive(self.flights, most_bytes=self.most) if self.flights else []
        reports = [self._answered(self.flights.pop(reply.to), reply) for reply in replies]
        return [report for report in [*reports, *self._given_up()] if report]

    def _send(self) -> None:
        roster = self.federation.roster
        nodes = {job.client_id: roster.node(job.client_id) for job, _ in self.todo}
        jobs = {node: job for job, _ in self.todo if (node := nodes[job.client_id]) is not None}
        if not jobs or self._left() <= 0:
            return
        self.todo = [(job, until) for job, until in self.todo if nodes[job.client_id] is None]
        orders = {node: wire.record(self._order(job), server=self.broadcast) for node, job in jobs.items()}
        try:
            sent = self.federation.link().send(orders, "train", group=type(self.work).__name__, ttl=self._left())
        except LinkError:
            self._wait_for(jobs.values(), self.federation.timing.wait)
            raise
        began = perf_counter()
        self.flights |= {message: Flight(jobs[node], node, began) for message, node in sent.items()}
        self.placed = True

    def _order(self, job: Job) -> Order:
        federation, work = self.federation, self.work
        checkpoints = [job.round] if federation.settled is None else federation.settled
        training = isinstance(work, Train)
        return Order(
            run=federation.run,
            plan=federation.plan_hash,
            task="train" if training else "evaluate",
            round=max(job.round, 0),  # an evaluation may be before the first
            client=job.client_id,
            version=int(job.client["version"]) if job.client else 0,
            checkpoints=tuple(checkpoints),
            transport=self.transport,
            batch_size=1 if isinstance(work, Train) else work.batch_size,
            train_mode=False if isinstance(work, Train) else work.train,
            server={},  # the broadcast
        )

    def _answered(self, flight: Flight, reply: Reply) -> Report | None:
        """The report on a client that has answered, unless it is asked again."""
        if reply.content is None:
            return (self._gone if reply.gone else self._failed)(flight, reply.error or "gave no reason")
        try:
            answer = wire.read(Answer, reply.content)
            if answer.lost:
                return self._lost(flight)
            if answer.error is not None:
                return self._failed(flight, answer.error)
            return self._folded(flight, answer)._replace(bytes_up=reply.bytes)
        except ValueError as error:
            return self._failed(flight, f"its answer {error}")

    def _folded(self, flight: Flight, answer: Answer) -> Report:
        """Add a message to the sum; raises ValueError where the answer cannot be one."""
        job, trained = flight.job, isinstance(self.work, Train)
        message = decode(answer.message, self.most)
        version, sums = job.round + 1 if trained and job.client else 0, answer.metrics
        if not 1 <= answer.examples <= EXAMPLES or answer.version != version:
            raise ValueError(f"has {answer.examples:.9g} examples and state {answer.version}, which cannot be")
        if strange := [name for name, value in sums.items() if not isfinite(value)]:
            raise ValueError(f"has {strange[0]}, which is not finite")
        if (sums or not trained) and (sums.keys() != SUMS[type(self.work)] or sums["examples"] < 1):
            raise ValueError("has other metrics than its work gives")  # none where nothing was minimised
        metrics = {name: torch.tensor(value, dtype=torch.double) for name, value in sums.items()}
        update = Update(message, answer.weight, {}, metrics)
        self.total, report = folded(update, job, self.aggregator, self.tolerant, self.total, flight.since)
        if report.error is not None:
            return report._replace(error=f"{self._name(job)}: {report.error}")
        if not trained:
            return report
        self.data.sizes[job.client_id] = answer.examples
        return report._replace(client={"version": torch.tensor(answer.version)} if job.client else {})

    def _gone(self, flight: Flight, why: str) -> Report | None:
        """Of a client whose node went away: it fails, or where that is not tolerated, waits for it."""
        if self.tolerant:
            return self._failed(flight, why)
        self._wait_for([flight.job], self.federation.timing.wait)
        return None

    def _lost(self, flight: Flight) -> Report | None:
        """Have a node that does not know the plan invited once more."""
        client = flight.job.client_id
        self.invited[client] += 1
        if self.invited[client] > INVITED:
            return self._failed(flight, "forgets the plan as often as it is told")
        self.federation.roster.forget(flight.node)
        self._wait_for([flight.job], self.federation.timing.wait)
        return None

    def _given_up(self) -> Iterator[Report | None]:
        """Reports on clients that will not answer any more."""
        timing, roster = self.federation.timing, self.federation.roster
        late = self._left() <= 0
        away = {m for m, flight in self.flights.items() if flight.node not in roster.online}
        over = [*self.flights] if late else [*away]
        self.federation.abandon(over)
        for flight in [self.flights.pop(message) for message in over]:
            if late:
                yield self._failed(flight, f"has not answered within {timing.round_timeout:g} s")
            else:
                yield self._gone(flight, "its node is gone")
        begun = self.placed or monotonic() > self.began + timing.wait
        for job, until in [*self.todo]:
            if late or (begun and monotonic() > until):
                self.todo.remove((job, until))
                yield self._failed(Flight(job, 0, perf_counter()), roster.why(job.client_id))

    def _failed(self, flight: Flight, why: str) -> Report:
        """A report; raises ClientError unless the round is tolerant."""
        cause = NodeError(f"{self._name(flight.job)}: {why}")
        return failed(flight.job, cause, self.tolerant, perf_counter() - flight.since)

    def _name(self, job: Job) -> str:
        return self.federation.roster.names[job.client_id]

    def _again(self, messages: Iterable[str]) -> None:
        """Have these clients' orders sent once more."""
        self._wait_for([self.flights.pop(message).job for message in [*messages]], self.federation.timing.wait)

    def _wait_for(self, jobs: Iterable[Job], seconds: float) -> None:
        """Have orders sent once their nodes are there, and for so many seconds at least."""
        self.todo += [(job, monotonic() + seconds) for job in jobs]

    def _left(self) -> float:
        """Seconds until the round is over."""
        return self.began + self.federation.timing.round_timeout - monotonic()
