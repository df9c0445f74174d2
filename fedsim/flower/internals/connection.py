"""A connection to a SuperLink: where it is, how it is called, and how it hears that we live."""

import logging
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import httpx
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.protobuf.client import ProtobufClient, ProtobufClientInterceptor
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from flwr.supercore.version import package_version

from fedsim.errors import one_line

TIMEOUT = httpx.Timeout(20, connect=5)  # seconds without a byte
BRIEF, LONG = 1.0, 60.0  # seconds for which a call that may be made twice is tried again
PAUSE = 0.25  # seconds between
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


class RefusedError(LinkError):
    """The SuperLink has understood, and does not want to."""


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
    """How many bytes may still be taken, by several threads together; `wrapping` more than what is told."""

    def __init__(self, most: int, wrapping: int = 0):
        self._most, self._left, self._lock = most, most + wrapping, threading.Lock()

    def take(self, count: int) -> None:
        """Raises TooLargeError where there is no room for so many."""
        with self._lock:
            if count > self._left:
                raise TooLargeError(f"more than {self._most} bytes")
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
        raise TooLargeError("what does not tell its size")
    getattr(_within, "room", Room(PLAIN)).take(int(length))
    _within.taken = int(length)


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


def call(method: Callable[[Request], Response], request: Request, *, patience: float = 0) -> Response:
    """What the SuperLink answers; raises LinkError.

    What may be said twice has `patience`: the seconds for which it is said again where that may help.
    """
    end = time.monotonic() + patience
    while True:
        try:
            return _call(method, request)
        except LinkError as error:
            if not error.again or time.monotonic() >= end:
                raise
            time.sleep(PAUSE)


def _call(method: Callable[[Request], Response], request: Request) -> Response:
    _within.taken = 0
    try:
        return method(request)
    except httpx.HTTPStatusError as error:
        raise _refused(error.response) from None
    except RunNotRunningException:
        raise RunEndedError("the SuperLink has ended our run") from None
    except httpx.TransportError as error:
        if hasattr(_within, "room"):  # what broke off takes none
            _within.room.take(-_within.taken)
        words = str(error) or type(error).__name__
        cut = isinstance(error, httpx.TimeoutException) or "EOF" in words  # in the middle of a handshake
        trust = not cut and any(word in words.lower() for word in ("certificate", "ssl", "tls"))
        hint = "; is `ca` the certificate of this SuperLink's authority?" if trust else ""
        raise LinkError(f"no connection to the SuperLink: {words}{hint}", again=not trust) from None
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
    if known and known.code == ApiErrorCode.RUNTIME_VERSION_INCOMPATIBLE:
        theirs = re.search(r"SuperLink version (\S+)", known.public_details or "")
        return RefusedError(
            f"flwr {package_version} is installed here, and the SuperLink has {theirs[1] if theirs else 'another'}; "
            "to start and drive runs, install the minor version that it has"
        )
    words = f"{known.message} {known.public_details or ''}" if known else response.reason_phrase
    told = f"the SuperLink refuses: {words.strip()} (status {response.status_code})"
    if response.status_code == httpx.codes.FORBIDDEN:
        return RunEndedError(f"the SuperLink has ended our run: {words.strip()}")
    if response.status_code == httpx.codes.UNAUTHORIZED:
        return UnknownError(f"{told}: it does not know us, or no longer")
    return RefusedError(told, again=response.status_code >= 500)


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
