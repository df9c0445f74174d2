"""What stands between this machine and a SuperLink, in words: proxies, TLS or plain HTTP, two clocks."""

import logging
import os
import socket
import ssl
import time
from contextlib import suppress
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import NamedTuple
from urllib.request import getproxies, proxy_bypass

import httpx
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE

log = logging.getLogger(__name__)
PROBE_TIMEOUT = 2.0  # seconds that a server has to answer when it is asked whether it speaks TLS
ANSWERS_COMPARED = 8  # of which the fastest says what time it is there (as in NTP: RFC 5905, section 10)
DATE_PRECISION = 2.0  # seconds; a server's Date has whole ones, and is a moment old when it arrives
PLAIN_ANSWERS = "WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"  # OpenSSL's words for what is not TLS


class EnvironmentProxy(NamedTuple):
    """A proxy, and the variable of the environment that sets it."""

    variable: str
    url: httpx.URL

    def __str__(self) -> str:
        return f"the proxy {self.url.copy_with(userinfo=b'')} of {self.variable}"  # userinfo is a secret


def proxy_for(url: httpx.URL) -> EnvironmentProxy | None:
    """The proxy by which this address is reached, if the environment sets one; loopback is never behind one.

    Raises ValueError, with the variable's name, if it is not the address of a proxy.
    """
    if _is_loopback(url.host) or proxy_bypass(url.netloc.decode()):
        return None
    proxies = getproxies()
    scheme = url.scheme if proxies.get(url.scheme) else "all"
    if not (address := proxies.get(scheme)):
        return None
    names = f"{scheme}_proxy", f"{scheme.upper()}_PROXY"
    variable = next((name for name in names if os.environ.get(name)), "the system's settings")
    try:
        found = httpx.URL(address if "://" in address else f"http://{address}")
        httpx.Proxy(found)
    except (httpx.InvalidURL, ValueError) as error:
        raise ValueError(f"{variable}: is not the address of a proxy: {error}") from None
    return EnvironmentProxy(variable, found)


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"


def route(url: httpx.URL) -> str:
    """The end of an error message: the proxy that may be its cause; nothing if there is none."""
    proxy = proxy_for(url)
    return f"; it was called through {proxy}, and no_proxy={url.host} avoids that" if proxy else ""


def speaks_tls(url: httpx.URL) -> bool:
    """Whether the server there answers a TLS handshake, whoever it is."""
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    with suppress(OSError):
        plain = socket.create_connection((url.host, url.port or 80), timeout=PROBE_TIMEOUT)
        with plain, trusting.wrap_socket(plain):
            return True
    return False


def certificate_hint(words: str) -> str:
    """What to look at after a TLS error."""
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    if "not yet valid" in words:
        return f"; is this machine's clock right? It shows {now}"
    if "expired" in words:
        return f"; this machine's clock shows {now}; if that is right, `fedsim certificates --renew` makes another"
    return "; is `ca` the certificate of this SuperLink's authority?"


def clock_ahead(answer: httpx.Response, delay: float = 0.0) -> float:
    """By how many seconds this machine's clock is ahead of that of the server whose answer has just arrived.

    0 if they differ by less than a Date (RFC 9110, section 6.6.1) shows that came `delay` seconds after the
    request, or the answer has none.
    """
    try:
        date = parsedate_to_datetime(answer.headers.get("date", "")).timestamp()
    except (ValueError, OverflowError):
        return 0.0
    ahead = time.time() - delay / 2 - date - 0.5
    return ahead if abs(ahead) >= DATE_PRECISION + delay / 2 else 0.0


def clock_words(ahead: float) -> str:
    """The difference of two clocks, in words."""
    return f"this machine's clock is {abs(ahead):,.0f} s {'ahead of' if ahead > 0 else 'behind'} the SuperLink's"


def refused_for_its_clock(answer: httpx.Response) -> float:
    """`clock_ahead`, if that is why a SuperLink refuses a signature (they sign the time); 0 otherwise."""
    ahead = clock_ahead(answer)
    accepted = -TIMESTAMP_TOLERANCE <= ahead <= SYSTEM_TIME_TOLERANCE - 1
    return 0.0 if accepted or TIMESTAMP_HEADER not in answer.request.headers else ahead


class ServerClock:
    """The time by a server's clock, as its answers show it: by that, messages expire.

    Errors do not count, as those of a proxy may come with another clock's time.
    """

    def __init__(self, client: httpx.Client):
        self._ahead, self._told = 0.0, False
        self._seen: list[tuple[float, float]] = []  # delay, and by how much ahead this clock then seemed
        client.event_hooks["request"].append(self._begin)
        client.event_hooks["response"].append(self._look)

    def _begin(self, request: httpx.Request) -> None:
        request.extensions["began"] = time.monotonic()

    def _look(self, answer: httpx.Response) -> None:
        if not answer.is_success or "date" not in answer.headers:
            return
        delay = time.monotonic() - answer.request.extensions["began"]
        self._seen = [*self._seen, (delay, clock_ahead(answer, delay))][
            -ANSWERS_COMPARED:
        ]  # other threads look, too
        _, self._ahead = min(self._seen)
        if abs(self._ahead) >= SYSTEM_TIME_TOLERANCE and not self._told:
            self._told = True
            log.warning("%s; messages carry the SuperLink's time", clock_words(self._ahead))

    def now(self) -> float:
        """Seconds since 1970."""
        return time.time() - self._ahead
