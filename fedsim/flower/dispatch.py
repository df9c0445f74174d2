"""One round on the nodes: orders go out, answers come back in any order and are added up as they come."""

import logging
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from math import inf
from time import monotonic, perf_counter, sleep
from typing import Literal, NamedTuple

import torch
from flwr.app import ArrayRecord

from fedsim.data import FederatedData
from fedsim.errors import NodeError, located
from fedsim.federated.aggregate import Aggregator, largest
from fedsim.federated.claims import Bounds, Claim, evaluation_claims, first_wrong, training_claims
from fedsim.federated.client import EvaluateClient, Survey, Train
from fedsim.federated.fold import Fold
from fedsim.federated.positions import entries
from fedsim.federated.runtime import Outcomes, Results
from fedsim.flower import wire
from fedsim.flower.internals import LinkError, Reply
from fedsim.flower.messages import Answer, Order
from fedsim.flower.run_connection import RunConnection
from fedsim.flower.transport import ROUNDED, Transport, decode, encode
from fedsim.types import TRAINED, Job, Report, State, Update, described, form_of

log = logging.getLogger(__name__)
POLL_SECONDS = 0.03, 0.2  # between two looks for answers, at least and at most
POLL_SHARE = 0.02  # of the time since the last answer, to wait for the next look
MAX_ANSWER_RATIO = 16  # times what a client is sent, and
MAX_ANSWER_EXTRA = 2**26  # bytes more, that it may answer
GRACE_SECONDS = 30.0  # that a SuperLink may be out of reach before there is another Flower run
MAX_INVITATIONS = 3  # in a round, to a node that says that it does not know the plan
MAX_VALUE = 2.0**63  # of an entry of its message; servers square it, in float32
MAX_SECONDS = 1e9  # that a node says it took
SUMS = {Survey: {*TRAINED}, Train: {*TRAINED}, EvaluateClient: {"loss", "examples", "correct"}}
TASKS: dict[type, Literal["survey", "train", "evaluate"]] = {
    Survey: "survey",
    Train: "train",
    EvaluateClient: "evaluate",
}


class Waiting(NamedTuple):
    """A client whose order has not been sent yet; both times are of time.monotonic."""

    job: Job
    until: float  # it waits for its node,
    at_most_until: float  # and while no other client has work
    why: str | None = None  # its node went away, if it did


@dataclass(frozen=True)
class Flight:
    """An order that has been sent and not answered."""

    job: Job
    node: int
    since: float  # by perf_counter


class Answered(NamedTuple):
    """The answer to a client's order, or the reason why there is none."""

    job: Job
    since: float  # by perf_counter
    outcome: Update | NodeError
    bytes: int = 0
    examples: int = 0  # of the client


def _arrays(state: State) -> ArrayRecord:
    return wire.arrays(encode(state, "exact")[0])


class Dispatch:
    """The jobs of one round; `server` is what clients are sent, or of which each is sent its own.

    A client whose node is not there waits for it, as long as nodes may take to come; where the work does not wait
    for absent clients, only if no other client has work.
    """

    def __init__(
        self,
        federation: RunConnection,
        work: Survey | Train | EvaluateClient,
        server: State,
        data: FederatedData,
        transport: Transport,
    ):
        self.federation, self.work, self.data, self.transport = federation, work, data, transport
        self.wait = federation.timing.wait if work.wait_for_absent else 0.0
        self.server = server
        self.dtype = server["model"].dtype  # of losses
        downloaded = work.download(server, Job(0, 0, None))  # in the form that it has for all
        self.form = None if isinstance(work, EvaluateClient) else work.form(downloaded)  # of messages
        self.most = MAX_ANSWER_EXTRA + MAX_ANSWER_RATIO * sum(value.nbytes for value in server.values())
        self.todo: list[Waiting] = []
        self.flights: dict[str, Flight] = {}  # by message
        self.invited = Counter[int]()  # how often, by client whose node did not know the plan
        self.reported = False  # whether anything is known of a client

    def run(self, jobs: Iterable[Job], aggregator: Aggregator) -> Results:
        """Reports as answers come, and at the end the sum of the messages."""
        fold = Fold(aggregator)
        with closing(self._answers(jobs)) as answers:
            for each in answers:
                report = self._report(fold, each)
                del each  # the message is in the sum
                yield aggregator.fold([]), [report]
        yield fold.partial, []

    def map(self, jobs: Iterable[Job]) -> Outcomes[Job]:
        """Each job and the client's answer, or the reason why there is none."""
        with closing(self._answers(jobs)) as answers:
            for each in answers:
                yield each.job, each.outcome

    def _report(self, fold: Fold, each: Answered) -> Report:
        report = fold.add(each.job, each.outcome, each.since)._replace(bytes_up=each.bytes)
        if report.error is None:
            self.data.sizes[each.job.client_id] = each.examples
        elif not isinstance(each.outcome, NodeError):
            report = report._replace(error=f"{self._name(each.job)}: {report.error}")
        return report

    def _answers(self, jobs: Iterable[Job]) -> Generator[Answered, None, None]:
        """The answer to each job's order, as they come."""
        self.federation.gather()
        self.data.sizes[:] = self.federation.roster.examples
        self.began = last = last_contact = monotonic()
        self._wait_for(jobs, self.wait)
        link_failed = False
        try:
            while self.todo or self.flights:
                try:
                    if link_failed:
                        self._again(self.flights)
                    found = False
                    for answered in self._step():
                        last, self.reported, found = monotonic(), True, True
                        yield answered
                        del answered
                    last_contact, link_failed = monotonic(), False
                except LinkError as error:
                    link_failed = True  # an answer may have been lost, and a node that has given it gives it again
                    if not error.again or monotonic() - last_contact > GRACE_SECONDS:
                        self.federation.reconnect(error, self._left())
                        last_contact = monotonic()
                    sleep(POLL_SECONDS[1])
                    continue
                if not found:
                    sleep(min(max(POLL_SHARE * (monotonic() - last), POLL_SECONDS[0]), POLL_SECONDS[1]))
        finally:
            self.federation.abandon(self.flights)

    def _step(self) -> Iterator[Answered]:
        """Send the orders that can be sent, and yield the answers that have come, one at a time.

        The clients whose nodes are not waited for come first, because there may then be too few for the others.
        """
        self.federation.look()
        yield from self._absent()
        self._send()
        replies = self.federation.link().receive(self.flights, most_bytes=self.most) if self.flights else []
        while replies:
            reply = replies.pop(0)
            if answered := self._answered(self.flights.pop(reply.to), reply):
                del reply
                yield answered
            del answered
        yield from self._unanswered()

    def _send(self) -> None:
        roster = self.federation.roster
        nodes = {each.job.client_id: roster.node(each.job.client_id) for each in self.todo}
        jobs = {node: each.job for each in self.todo if (node := nodes[each.job.client_id]) is not None}
        if not jobs or self._left() <= 0:
            return
        self.todo = [each for each in self.todo if nodes[each.job.client_id] is None]
        orders = {node: wire.record(self._order(job), server=self._sent(job)) for node, job in jobs.items()}
        try:
            ttl = self._left() + GRACE_SECONDS  # so that it is fedsim that says which client is late
            sent = self.federation.link().send(orders, "train", group=type(self.work).__name__, ttl=ttl)
        except LinkError:
            self._wait_for(jobs.values(), self.federation.timing.wait)
            raise
        began = perf_counter()
        self.flights |= {message: Flight(jobs[node], node, began) for message, node in sent.items()}

    def _sent(self, job: Job) -> ArrayRecord:
        """What the client of a job downloads."""
        own = self.work.download(self.server, job)
        return self.broadcast if own is self.server else _arrays(own)

    @cached_property
    def broadcast(self) -> ArrayRecord:
        """What all download, encoded once."""
        return _arrays(self.server)

    def _order(self, job: Job) -> Order:
        federation, work = self.federation, self.work
        version, mark = job.client["version"].tolist() if job.client else (0, 0)
        checkpoints = [job.round] if federation.checkpointed_rounds is None else federation.checkpointed_rounds
        rounds = self.transport in ROUNDED
        return Order(
            run=federation.run,
            plan=federation.plan_hash,
            task=TASKS[type(work)],
            round=max(job.round, 0),  # an evaluation may be before the first
            client=job.client_id,
            version=version,
            mark=mark,
            checkpoints=tuple(checkpoints),
            # Rounding errors of a training are sent with the next one, and those of a survey would be lost.
            transport="exact" if rounds and isinstance(work, Survey) else self.transport,
            batch_size=work.batch_size if isinstance(work, EvaluateClient) else 1,
            train_mode=isinstance(work, EvaluateClient) and work.train,
            server={},  # the broadcast
            cohort=work.cohort,
        )

    def _answered(self, flight: Flight, reply: Reply) -> Answered | None:
        """A client's answer; None if its order will be sent again."""
        if reply.content is None:
            why = reply.error or "gave no reason"
            if not reply.gone:
                return self._failed(flight, why)
            self._gone(flight, why)
            return None
        try:
            answer = wire.read(Answer, reply.content)
            if answer.lost:
                return self._lost(flight)
            if answer.error is not None:
                return self._failed(flight, answer.error)
            return self._checked(flight, answer)._replace(bytes=reply.bytes)
        except ValueError as error:
            return self._failed(flight, f"its answer {error}")
        except Exception as error:  # a stranger's bytes may end its client's part in a round, not the round
            return self._failed(flight, f"its answer cannot be used: {located(error)}")

    def _checked(self, flight: Flight, answer: Answer) -> Answered:
        """The update that a node answered; raises ValueError where it cannot be one."""
        job, trained = flight.job, isinstance(self.work, Train)
        message = decode(answer.message, self.most)
        if self.form is not None and (found := form_of(entries(message))) != self.form:
            raise ValueError(f"should have {described(self.form)}, by its strategy, and has {described(found)}")
        version, sums = job.round + 1 if trained and job.client else 0, answer.metrics
        kept = answer.version, answer.mark
        if kept[0] != version or not 0 <= kept[1] < 2**62:
            raise ValueError(f"keeps {str(kept)[:40]}, which cannot be")
        self._check_claims(flight, answer)
        for name, value in message.items():
            if value.is_floating_point() and MAX_VALUE < largest(value) < inf:
                raise ValueError(f"has {name}, which is too large: above {MAX_VALUE:.2g}")
        metrics = {name: torch.tensor(value, dtype=torch.double) for name, value in sums.items()}
        client = {"version": torch.tensor(kept)} if trained and job.client else {}
        return Answered(job, flight.since, Update(message, answer.weight, client, metrics), 0, answer.examples)

    def _check_claims(self, flight: Flight, answer: Answer) -> None:
        """Raise ValueError where a number cannot be true, by what the node agreed to when it joined."""
        agreed, work, sums = self.federation.roster.sizes[self._name(flight.job)], self.work, answer.metrics
        tested = isinstance(work, EvaluateClient)
        own = {*work.strategy.metrics} if isinstance(work, Train) else set[str]()
        whole = SUMS[type(work)] | own
        fewer = not isinstance(work, EvaluateClient) and work.may_withhold
        nothing_minimised = not tested and sums.keys() == own
        if not (sums.keys() <= whole if fewer else nothing_minimised or sums.keys() == whole):
            raise ValueError("has other metrics than its work gives")
        held, known = (sums["examples"], agreed.tested) if tested else (answer.examples, agreed.examples)
        if held != known:
            self.federation.roster.invite_again(flight.node)  # its data may have changed
            raise ValueError(f"has {str(held)[:20]} examples, and the node joined with {known}")
        claims = [Claim("seconds", answer.seconds, 0, MAX_SECONDS)]
        if isinstance(work, EvaluateClient):
            claims += evaluation_claims(sums, agreed.tested, self.dtype)
        else:
            claims += training_claims(answer.weight, sums, self._bounds(work, agreed.examples))
        if wrong := first_wrong(claims):
            raise ValueError(f"has {wrong}")

    def _bounds(self, work: Survey | Train, examples: int) -> Bounds:
        try:
            return work.bounds(examples, self.dtype)
        except Exception as error:  # of a strategy of the user's
            raise ValueError(f"cannot be checked: {located(error)}") from None

    def _gone(self, flight: Flight, why: str) -> None:
        """Let a client whose node went away wait for the node."""
        if self.wait:
            log.warning("nodes: %s: %s; waits up to %g s for it", self._name(flight.job), why, self.wait)
        self._wait_for([flight.job], self.wait, why)

    def _lost(self, flight: Flight) -> Answered | None:
        """Invite a node that does not know the plan once more."""
        client = flight.job.client_id
        self.invited[client] += 1
        if self.invited[client] > MAX_INVITATIONS:
            return self._failed(flight, "forgets the plan each time that it is sent")
        self.federation.roster.forget(flight.node)
        self._wait_for([flight.job], self.federation.timing.wait)
        return None

    def _absent(self) -> Iterator[Answered]:
        """Yield a failure for each client whose order will not be sent any more."""
        roster, late, now = self.federation.roster, self._left() <= 0, monotonic()
        there = {each.job.client_id for each in self.todo if roster.node(each.job.client_id) is not None}
        others = there or self.flights or self.reported
        for each in [*self.todo]:
            client = each.job.client_id
            refusal = None if client in there else roster.refusal(client)
            over = client not in there and now >= (each.until if others else each.at_most_until)
            if late or refusal or over:
                self.todo.remove(each)
                why = refusal or each.why or roster.absence(client)
                yield self._failed(Flight(each.job, 0, perf_counter()), why)

    def _unanswered(self) -> Iterator[Answered]:
        """Yield a failure for each client whose answer is not waited for any more."""
        timing, late = self.federation.timing, self._left() <= 0
        away = {m for m, flight in self.flights.items() if flight.node not in self.federation.roster.online}
        over = [*self.flights] if late else [*away]
        self.federation.abandon(over)
        for flight in [self.flights.pop(message) for message in over]:
            if late:
                yield self._failed(flight, f"has not answered within {timing.round_timeout:g} s")
            else:
                self._gone(flight, "its node is gone")

    def _failed(self, flight: Flight, why: str) -> Answered:
        return Answered(flight.job, flight.since, NodeError(f"{self._name(flight.job)}: {why}"))

    def _name(self, job: Job) -> str:
        return self.federation.roster.names[job.client_id]

    def _again(self, messages: Iterable[str]) -> None:
        """Send the orders of these messages once more."""
        self.federation.abandon([*messages])
        self._wait_for([self.flights.pop(message).job for message in [*messages]], self.federation.timing.wait)

    def _wait_for(self, jobs: Iterable[Job], seconds: float, why: str | None = None) -> None:
        """Queue jobs until their nodes are online, for at least so many seconds."""
        now = monotonic()
        self.todo += [Waiting(job, now + seconds, now + self.federation.timing.wait, why) for job in jobs]

    def _left(self) -> float:
        """Seconds until the round is over."""
        return self.began + self.federation.timing.round_timeout - monotonic()
