"""A connection to a SuperLink: its address, calls with retries and limits, and heartbeats."""

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
from fedsim.flower.internals.network import (
    PLAIN_ANSWERS,
    certificate_hint,
    clock_words,
    proxy_for,
    refused_for_its_clock,
    route,
    speaks_tls,
)

TIMEOUT = httpx.Timeout(20, connect=5)  # seconds without a byte
KEEP_ALIVE = 3.0  # seconds that an idle connection is kept, less than the 5 after which a SuperLink ends it
LEAVE_TIMEOUT = 3.0  # seconds that leaving may take
RETRY_BRIEFLY, RETRY_LONG = 1.0, 60.0  # seconds for which a call that is safe to repeat is tried again
RETRY_PAUSE = 0.25  # seconds between two attempts
NEEDS_TLS = "the server at this address speaks TLS: give `ca`, the certificate of its authority, not `insecure`"
MOST_PLAIN_BYTES = 2**26  # of an answer that is not an object

Client = TypeVar("Client", bound=ProtobufClient)
Request = TypeVar("Request")
Response = TypeVar("Response")


NOT_SENT = httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError  # nothing of a request


class LinkError(ConnectionError):
    """The SuperLink cannot be reached, refuses the call, or has ended the run; in one line.

    `again` says whether the same call on the same object may succeed later; `unanswered` whether the SuperLink may
    have done what was asked, and its answer is lost.
    """

    def __init__(self, message: str, *, again: bool = False, unanswered: bool = False):
        super().__init__(one_line(message))
        self.again, self.unanswered = again, unanswered


class RunEndedError(LinkError):
    """The run has ended, whoever ended it."""


class RefusedError(LinkError):
    """The SuperLink has understood the call and refuses it."""


class UnknownError(LinkError):
    """The SuperLink does not know the caller, or no longer knows it."""


class TooLargeError(ValueError):
    """An answer is larger than allowed, and was not read."""


@dataclass(frozen=True)
class Superlink:
    """A SuperLink's address and certificate authority."""

    address: str  # host:port
    ca: bytes | None  # the authority's certificate in PEM format; None for plain HTTP


class ByteLimit:
    """A limit of `most` bytes that several threads share; `headers` more are allowed, unmentioned in errors."""

    def __init__(self, most: int, headers: int = 0):
        self._most, self._left, self._lock = most, most + headers, threading.Lock()

    def take(self, count: int) -> None:
        """Count these bytes; raises TooLargeError if they exceed the limit."""
        with self._lock:
            if count > self._left:
                raise TooLargeError(f"more than {self._most} bytes")
            self._left -= count


_limit = threading.local()


@contextmanager
def limited(limit: ByteLimit) -> Iterator[None]:
    """Count the answers to this thread's calls towards `limit`, before they are read."""
    _limit.limit = limit
    try:
        yield
    finally:
        del _limit.limit


def _check_size(response: httpx.Response) -> None:
    """Called by httpx when it has the headers, before it reads the body."""
    length = response.headers.get("content-length", "")
    if not length.isdecimal() or response.headers.get("content-encoding", "identity") != "identity":
        if response.is_error:  # as proxies send them: its text is not read
            bare = httpx.Response(response.status_code, headers=response.headers, request=response.request)
            raise httpx.HTTPStatusError("", request=response.request, response=bare)
        raise TooLargeError("an answer of unknown size")
    getattr(_limit, "limit", ByteLimit(MOST_PLAIN_BYTES)).take(int(length))
    _limit.taken = int(length)


def guard(client: Client) -> Client:
    """Have the client refuse answers that are too large before it reads them, and follow no redirects."""
    client._client.headers["accept-encoding"] = "identity"
    client._client.event_hooks = {"response": [_check_size]}
    client._client.follow_redirects = False
    return client


def connect(
    kind: type[Client],
    superlink: Superlink,
    component: str,
    interceptors: Sequence[ProtobufClientInterceptor] = (),
) -> Client:
    """A client for one of the SuperLink's services; `component` is Flower's name of the caller."""
    for name in ("flwr", "httpx"):  # they log much; errors come as exceptions
        logging.getLogger(name).setLevel(logging.ERROR)
    # Not by its constructor, which takes the environment's proxies for loopback, too.
    client = kind.__new__(kind)
    vars(client).update(
        _base_url=f"{'http' if superlink.ca is None else 'https'}://{superlink.address}",
        _interceptors=tuple(interceptors),
        _retry_invoker=None,
        _client=_http_client(superlink),
    )
    # not by RuntimeVersionHttpInterceptor, which ends the process if versions differ
    client._client.headers.update(dict(RuntimeVersionMetadata.from_local_component(component).as_metadata()))
    return guard(client)


def _http_client(superlink: Superlink) -> httpx.Client:
    trust: ssl.SSLContext | bool = False
    if superlink.ca is not None:
        trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            trust.load_verify_locations(cadata=superlink.ca.decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            raise LinkError(f"certificate authority of {superlink.address}: {error}") from None
    try:
        proxy = proxy_for(httpx.URL(f"{'http' if superlink.ca is None else 'https'}://{superlink.address}"))
    except httpx.InvalidURL as error:
        raise LinkError(f"the SuperLink's address: {error}") from None
    except ValueError as error:
        raise LinkError(str(error)) from None
    limits = httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=KEEP_ALIVE)
    try:
        return httpx.Client(
            verify=trust, proxy=proxy and httpx.Proxy(proxy.url), trust_env=False, timeout=TIMEOUT, limits=limits
        )
    except ImportError:
        raise LinkError(f"{proxy}: for a SOCKS proxy, pip install 'httpx[socks]'") from None


def call(method: Callable[[Request], Response], request: Request, *, retry_for: float = 0) -> Response:
    """The SuperLink's answer; raises LinkError.

    `retry_for` is for calls that are safe to repeat: the seconds for which they are repeated if that may help.
    """
    end = time.monotonic() + retry_for
    while True:
        try:
            return _call(method, request)
        except LinkError as error:
            if not error.again or time.monotonic() >= end:
                raise
            time.sleep(RETRY_PAUSE)


def _call(method: Callable[[Request], Response], request: Request) -> Response:
    _limit.taken = 0
    try:
        return method(request)
    except httpx.HTTPStatusError as error:
        raise _refused(error.response) from None
    except RunNotRunningException:
        raise RunEndedError("the SuperLink has ended this run") from None
    except httpx.TransportError as error:
        if hasattr(_limit, "limit"):  # an answer that broke off does not count
            _limit.limit.take(-_limit.taken)
        broken = _broken(error)
        broken.unanswered = not isinstance(error, NOT_SENT)
        raise broken from None
    except TooLargeError as error:
        if hasattr(_limit, "limit"):  # the caller's limit
            raise
        raise LinkError(f"the SuperLink's answer is refused: {error}") from None
    except httpx.InvalidURL as error:
        raise LinkError(f"the SuperLink's address: {error}") from None
    except ValueError as error:  # from flwr, if the answer is not protobuf
        raise LinkError(f"the server at this address is not a SuperLink: {error}") from None


def _broken(error: httpx.TransportError) -> LinkError:
    """What a connection that failed means."""
    words, url = str(error) or type(error).__name__, error.request.url
    if isinstance(error, httpx.TimeoutException | httpx.ProxyError) or "EOF" in words:  # during a TLS handshake
        return LinkError(f"no connection to the SuperLink: {words}{route(url)}", again=True)
    if any(sign in words for sign in PLAIN_ANSWERS):
        return LinkError(
            "the server at this address speaks plain HTTP, and no TLS: if that is meant, set `insecure`, "
            f"not `ca`{route(url)}"
        )
    if any(word in words.lower() for word in ("certificate", "ssl", "tls")):
        clock = "expired" in words or "not yet valid" in words  # it may be set right, or the certificate renewed
        hint = certificate_hint(words) + route(url)  # which may put its own certificate in place
        return LinkError(f"no connection to the SuperLink: {words}{hint}", again=clock)
    if url.scheme == "http" and isinstance(error, httpx.RemoteProtocolError | httpx.ReadError) and speaks_tls(url):
        return LinkError(NEEDS_TLS)
    return LinkError(f"no connection to the SuperLink: {words}{route(url)}", again=True)


def _refused(response: httpx.Response) -> LinkError:
    url = response.request.url
    via = route(url) if url.scheme == "http" else ""  # within TLS a proxy cannot answer
    known = FlowerError.from_json(response.text)
    if known and known.code == ApiErrorCode.RUNTIME_VERSION_INCOMPATIBLE:
        theirs = re.search(r"SuperLink version (\S+)", known.public_details or "")
        return RefusedError(
            f"flwr {package_version} is installed here, and the SuperLink has {theirs[1] if theirs else 'other'}; "
            "to start and drive runs, install the minor version that it has"
        )
    words = f"{known.message} {known.public_details or ''}" if known else response.reason_phrase
    text = f"the SuperLink refuses: {words.strip()} (status {response.status_code}){via}"
    if response.status_code == httpx.codes.BAD_REQUEST and url.scheme == "http" and not known and speaks_tls(url):
        return LinkError(NEEDS_TLS)  # as nginx answers
    if response.status_code == httpx.codes.FORBIDDEN:
        return RunEndedError(f"the SuperLink has ended this run: {words.strip()}{via}")
    if response.status_code == httpx.codes.UNAUTHORIZED:
        if ahead := refused_for_its_clock(response):
            return LinkError(f"{clock_words(ahead)}; nodes sign the time: set it right", again=True)
        return UnknownError(f"{text}: it does not know this caller, or no longer")
    return RefusedError(text, again=response.status_code >= 500)


class Heartbeat:
    """Calls `beat` every so many seconds, in a thread of its own; `lost` is the error that ended this."""

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
        """Raise the LinkError that ended the heartbeats, if there is one."""
        if self.lost is not None:
            raise self.lost

    def stop(self) -> None:
        """End the thread; it may be called twice."""
        self._stopped.set()
        self._thread.join(timeout=1)
