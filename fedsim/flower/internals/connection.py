"""A connection to a SuperLink: where it is, how it is called, and how it hears that we live."""

import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import httpx
from flwr.supercore.error import FlowerError
from flwr.supercore.protobuf.client import ProtobufClient, ProtobufClientInterceptor
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata

from fedsim.errors import one_line

TIMEOUT = httpx.Timeout(20, connect=5)  # seconds without a byte
TRIES, PAUSE = 3, 0.2  # of a call that may be made twice; seconds between
PLAIN = 2**26  # bytes of an answer that holds no object

Client = TypeVar("Client", bound=ProtobufClient)
Request = TypeVar("Request")
Response = TypeVar("Response")


class LinkError(ConnectionError):
    """The SuperLink cannot be reached, refuses, or has ended our run; one line.

    `again` says whether the same call may succeed later, on the same object.
    """

    def __init__(self, message: str, *, again: bool = False):
        super().__init__(one_line(message))
        self.again = again


class RunEndedError(LinkError):
    """The run is over, whoever ended it."""


class UnknownError(LinkError):
    """The SuperLink does not know who calls, or no longer."""


class TooLargeError(ValueError):
    """An answer is larger than there is room for; it was not read."""


@dataclass(frozen=True)
class Superlink:
    """Where a SuperLink is, and how to reach it."""

    address: str  # host:port
    ca: bytes | None  # PEM of the certificate authority; None is plain HTTP


class Room:
    """How many bytes may still be taken, by several threads together."""

    def __init__(self, most: int):
        self._left, self._lock = most, threading.Lock()

    def take(self, count: int) -> None:
        """Raises TooLargeError where there is no room for so many."""
        with self._lock:
            if count > self._left:
                raise TooLargeError(f"{count} bytes where {self._left} are left")
            self._left -= count


_within = threading.local()


@contextmanager
def within(room: Room) -> Iterator[None]:
    """Count what this thread's calls are answered towards `room`, before it is read."""
    _within.room = room
    try:
        yield
    finally:
        del _within.room


def _check_size(response: httpx.Response) -> None:
    """Called by httpx when it has the headers, and before it reads the rest."""
    length = response.headers.get("content-length", "")
    if not length.isdecimal() or response.headers.get("content-encoding", "identity") != "identity":
        raise TooLargeError("an answer that does not tell its size")
    getattr(_within, "room", Room(PLAIN)).take(int(length))


def guard(client: Client) -> Client:
    """Let the client refuse what is too large before it reads it."""
    client._client.headers["accept-encoding"] = "identity"
    client._client.event_hooks = {"response": [_check_size]}
    return client


def connect(
    kind: type[Client],
    superlink: Superlink,
    component: str,
    interceptors: Sequence[ProtobufClientInterceptor] = (),
) -> Client:
    """A client for one of the SuperLink's services; `component` is what Flower calls who uses it."""
    for name in ("flwr", "httpx"):  # chatty: what matters comes as an exception
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        client = kind.from_server_address(superlink.address, superlink.ca is None, superlink.ca, interceptors)
    except (ssl.SSLError, ValueError) as error:
        raise LinkError(f"certificate authority of {superlink.address}: {error}") from None
    client._client.timeout = TIMEOUT
    # not its RuntimeVersionHttpInterceptor, which ends the process where versions differ
    client._client.headers.update(dict(RuntimeVersionMetadata.from_local_component(component).as_metadata()))
    return guard(client)


def call(method: Callable[[Request], Response], request: Request, *, tries: int = 1) -> Response:
    """What the SuperLink answers; raises LinkError. `tries` above 1 is for what may safely be said twice."""
    for left in reversed(range(tries)):
        try:
            return _call(method, request)
        except LinkError as error:
            if not error.again or not left:
                raise
            time.sleep(PAUSE)
    raise AssertionError("not reached")


def _call(method: Callable[[Request], Response], request: Request) -> Response:
    try:
        return method(request)
    except httpx.HTTPStatusError as error:
        raise _refused(error.response) from None
    except RunNotRunningException:
        raise RunEndedError("the SuperLink has ended our run") from None
    except httpx.TransportError as error:
        words = str(error) or type(error).__name__
        trust = any(word in words.lower() for word in ("certificate", "ssl", "tls"))
        raise LinkError(f"no connection to the SuperLink: {words}", again=not trust) from None
    except TooLargeError as error:
        if hasattr(_within, "room"):  # it is the caller who has no room
            raise
        raise LinkError(f"the SuperLink answers with {error}") from None
    except httpx.InvalidURL as error:
        raise LinkError(f"the SuperLink's address: {error}") from None
    except ValueError as error:  # flwr's, for what is no protobuf
        raise LinkError(f"what answers is not a SuperLink: {error}") from None


def _refused(response: httpx.Response) -> LinkError:
    known = FlowerError.from_json(response.text)
    words = f"{known.message} {known.public_details or ''}" if known else response.reason_phrase
    told = f"the SuperLink refuses: {words.strip()} (status {response.status_code})"
    if response.status_code == httpx.codes.FORBIDDEN:
        return RunEndedError(f"the SuperLink has ended our run: {words.strip()}")
    if response.status_code == httpx.codes.UNAUTHORIZED:
        return UnknownError(f"{told}: it does not know us, or no longer")
    return LinkError(told, again=response.status_code >= 500)


class Pace:
    """How often to ask what is new: soon while something happens, and ever less often while nothing does.

    Each wait is a twentieth of the time since something last happened. So asking takes little from a SuperLink
    that has other things to do (each question costs it 2 ms), and an answer is late by 5 % of the time it took.
    """

    def __init__(self, least: float = 0.01, most: float = 1.0):
        self._least, self._most, self._last = least, most, time.monotonic()

    def happened(self) -> None:
        """Something came, or was sent."""
        self._last = time.monotonic()

    def seconds(self) -> float:
        """How long to wait before asking again."""
        return min(max((time.monotonic() - self._last) / 20, self._least), self._most)


class Pulse:
    """Says every so many seconds, in a thread of its own, that we live; `lost` is why nobody wants to hear it."""

    def __init__(self, beat: Callable[[], None], every: float):
        self.lost: LinkError | None = None
        self._beat, self._every = beat, every
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")
        self._thread.start()

    def _run(self) -> None:
        pause = self._every
        while not self._stopped.wait(pause):
            try:
                self._beat()
                pause = self._every
            except LinkError as error:
                if not error.again:
                    self.lost = error
                    return
                pause = 1.0

    def check(self) -> None:
        """Raise LinkError where it was told that it need not go on."""
        if self.lost is not None:
            raise self.lost

    def stop(self) -> None:
        """End the thread; it may be called twice."""
        self._stopped.set()
        self._thread.join(timeout=1)
