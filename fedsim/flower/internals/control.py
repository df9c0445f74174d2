"""What `flwr supernode` does: list the nodes that a SuperLink knows, register and unregister their keys."""

from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, uses_nist_ec_curve

from fedsim.base.reading import read_key
from fedsim.errors import ConfigError
from fedsim.flower.internals.connection import Request, Response, Superlink, call, connect


class Listed(NamedTuple):
    """A node as the SuperLink knows it."""

    node: int
    status: str  # registered | online | offline
    since: str  # when it got this status, in ISO 8601
    online_until: str | None  # when it counts as offline without another heartbeat, in ISO 8601
    key: bytes  # its public key in PEM format
    name: str


def _ask(
    superlink: Superlink, method: Callable[[ControlHttpClient, Request], Response], request: Request
) -> Response:
    with closing(connect(ControlHttpClient, superlink, "flwr CLI")) as client:
        return call(lambda asked: method(client, asked), request)


def listed(superlink: Superlink) -> list[Listed]:
    """The nodes that are registered at a SuperLink; raises LinkError."""
    found = _ask(superlink, ControlHttpClient.ListNodes, ListNodesRequest()).nodes_info
    return [
        Listed(
            each.node_id,
            each.status,
            {"online": each.last_activated_at, "offline": each.last_deactivated_at}.get(each.status)
            or each.registered_at,
            _iso(each.online_until) if each.HasField("online_until") else None,
            each.public_key,
            each.name,
        )
        for each in found
        if each.status != "unregistered"
    ]


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def register(superlink: Superlink, public_key: Path, name: str = "") -> int:
    """Let the node with this public key join, and return its id; raises ConfigError, LinkError."""
    request = RegisterNodeRequest(public_key=public_key_bytes(public_key), name=name or None)
    return _ask(superlink, ControlHttpClient.RegisterNode, request).node_id


def unregister(superlink: Superlink, node: int) -> None:
    """No longer let a node join; raises LinkError."""
    _ask(superlink, ControlHttpClient.UnregisterNode, UnregisterNodeRequest(node_id=node))


def public_key_bytes(path: Path) -> bytes:
    """An OpenSSH public key in PEM format, as a SuperLink stores it; raises ConfigError."""
    try:
        key = load_ssh_public_key(read_key(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path}: is not an OpenSSH public key: {error}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not uses_nist_ec_curve(key):
        raise ConfigError(f"{path}: is not a key on a NIST curve; `ssh-keygen -t ecdsa -b 384` makes one")
    return public_key_to_bytes(key)
