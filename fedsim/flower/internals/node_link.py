"""A node's connection to a SuperLink, as a SuperNode has it: this process takes messages and answers them."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key
from flwr.app import Message, RecordDict
from flwr.app.error import Error
from flwr.app.message.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_MIN_INTERVAL, HEARTBEAT_PATIENCE, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
    UnregisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedsim.base.reading import read_key
from fedsim.errors import ConfigError, one_line
from fedsim.flower.internals.connection import (
    LEAVE_TIMEOUT,
    RETRY_BRIEFLY,
    RETRY_LONG,
    Heartbeat,
    LinkError,
    RefusedError,
    Request,
    Response,
    RunEndedError,
    Superlink,
    TooLargeError,
    call,
    connect,
)
from fedsim.flower.internals.control import listed
from fedsim.flower.internals.network import ServerClock
from fedsim.flower.internals.objects import PARALLEL_OBJECTS, GoneError, IncomingMessage, packed, push

HEARTBEAT_INTERVAL = HEARTBEAT_MIN_INTERVAL  # seconds; the shortest that a SuperLink accepts


class NodeLink:
    """A node's connection, with one message at a time. Not thread-safe.

    If the SuperLink cannot be reached for a while, `receive` and `answer` raise LinkError with `again` and may be
    called again. Without `again` the SuperLink no longer knows the node: close the connection and open another.
    """

    def __init__(self, client: FleetHttpClient, node_id: int, *, registered: bool):
        self.node_id = node_id
        self._client, self._node, self._registered = client, Node(node_id=node_id), registered
        self._clock = ServerClock(client._client)
        self._pool = ThreadPoolExecutor(PARALLEL_OBJECTS, "node")
        self._arriving: tuple[Message, IncomingMessage] | None = None
        self._began = time.perf_counter()
        self._heartbeat = Heartbeat(self._beat, 0.6 * HEARTBEAT_INTERVAL)
        self._closed = False
        self._unanswered = False  # whether an answer that may have held a message was lost

    @classmethod
    def open(cls, superlink: Superlink, key: Path | None) -> Self:
        """Join the federation; raises LinkError, and ConfigError if `key` is not a key.

        `key` is the file of a private EC key in OpenSSH or PEM format. Without a key the node registers itself,
        which a SuperLink with --enable-supernode-auth refuses.
        """
        private, public = key_pair(key)
        pem = public_key_to_bytes(public)
        client = connect(FleetHttpClient, superlink, "SuperNode", [NodeAuthHttpInterceptor(private, public)])
        try:
            if key is None:
                call(client.RegisterNode, RegisterNodeFleetRequest(public_key=pem))
            request = ActivateNodeRequest(public_key=pem, heartbeat_interval=HEARTBEAT_INTERVAL)
            try:
                node_id = call(client.ActivateNode, request).node_id
            except LinkError as error:
                raise _inactive(superlink, pem, error) from None
        except BaseException:
            client.close()
            raise
        return cls(client, node_id, registered=key is None)

    def receive(self, *, most_bytes: int) -> Message | None:
        """A message, if there is one that has arrived completely; raises LinkError.

        It does not wait. Call it often, and less often while nothing arrives: each call costs the SuperLink 2 ms.
        A message of more than `most_bytes` is not read, and is answered with an error.
        """
        if self._arriving is None:
            pulled = self._pull()
            if not pulled.messages_list:
                return None
            self._began = time.perf_counter()
            head, tree = message_from_proto(pulled.messages_list[0]), pulled.message_object_trees[0]
            try:
                self._arriving = head, IncomingMessage(tree, most_bytes)
            except TooLargeError as error:
                self._refuse(head, f"the message is too large: {error}")
                return None
        head, arrival = self._arriving
        try:
            if not arrival.advance(lambda name: self._get(head, name), self._pool):
                return None
            message = arrival.message()
        except LinkError as error:
            if isinstance(error, RunEndedError):
                self._arriving = None
                return None
            raise
        except TooLargeError as error:
            self._refuse(head, f"the message is too large: {error}")
        except GoneError:
            self._refuse(head, "the SuperLink no longer has the message")
        except ValueError as error:
            self._refuse(head, f"the message cannot be read: {error}")
        else:
            self._arriving = None
            self._done(head)
            return message
        return None

    def _pull(self) -> PullMessagesResponse:
        """The next message's head; raises LinkError.

        The SuperLink gives a message once. If its answer was lost, a message may have been in it, whose sender
        would wait for as long as a round may take. So the node has to leave and join again, which tells the sender
        that the message was not answered. It waits until the SuperLink can be reached and hears of it.
        """
        if self._unanswered:
            self._beat()
            raise LinkError("an answer of the SuperLink was cut off, and a message may be lost; joining again")
        try:
            return self._call(self._client.PullMessages, PullMessagesRequest(node=self._node))
        except LinkError as error:
            self._unanswered = error.unanswered
            raise

    def _refuse(self, head: Message, reason: str) -> None:
        self._arriving = None
        self.answer(head, reason)
        self._done(head)

    def _get(self, head: Message, name: str) -> bytes | None:
        request = PullObjectRequest(node=self._node, run_id=head.metadata.run_id, object_id=name)
        found = self._call(self._client.PullObject, request, retry_for=RETRY_BRIEFLY)
        if not found.object_found:
            raise GoneError
        return found.object_content if found.object_available else None

    def _done(self, head: Message) -> None:
        """Have the SuperLink delete a message, without waiting for it."""
        request = ConfirmMessageReceivedRequest(
            node=self._node, run_id=head.metadata.run_id, message_object_id=head.metadata.message_id
        )
        self._pool.submit(
            lambda: self._call(self._client.ConfirmMessageReceived, request, retry_for=RETRY_BRIEFLY)
        )

    def answer(self, message: Message, content: RecordDict | str) -> bool:
        """Answer a message with content, or with the text of an error; raises LinkError.

        It tries for up to a minute if the SuperLink cannot be reached. False means that the message's run has
        ended, and the answer is not needed.
        """
        if isinstance(content, str):
            error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, one_line(content))
            reply = Message(error, reply_to=message)
        else:
            reply = Message(content, reply_to=message)
        asked = message.metadata
        reply.metadata.created_at = self._clock.now()
        reply.metadata.ttl = asked.created_at + asked.ttl - reply.metadata.created_at  # both expire at once
        run = message.metadata.run_id
        trees, objects = packed([reply], self._pool)
        request = PushMessagesRequest(
            node=self._node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=trees,
            clientapp_runtime_list=[time.perf_counter() - self._began],
        )
        try:
            taken = self._call(self._client.PushMessages, request, retry_for=RETRY_LONG)
            push(
                objects,
                taken.objects_to_push,
                lambda name, part: self._put(run, taken.session_id, name, part),
                self._pool,
            )
        except RunEndedError:
            return False
        return True

    def _put(self, run: int, session: str, name: str, content: bytes) -> None:
        request = PushObjectRequest(
            node=self._node, run_id=run, object_id=name, object_content=content, session_id=session
        )
        self._call(self._client.PushObject, request, retry_for=RETRY_LONG)

    def _beat(self) -> None:
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_INTERVAL)
        if not call(self._client.SendNodeHeartbeat, request).success:
            raise LinkError("the SuperLink no longer knows this node")

    def _call(self, method: Callable[[Request], Response], request: Request, *, retry_for: float = 0) -> Response:
        self._heartbeat.check()
        return call(method, request, retry_for=retry_for)

    def close(self) -> None:
        """Leave the federation; it may be called twice."""
        if self._closed:
            return
        self._closed = True
        self._heartbeat.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._client._client.timeout = LEAVE_TIMEOUT
        try:
            with suppress(LinkError):  # the SuperLink will miss the heartbeats
                call(self._client.DeactivateNode, DeactivateNodeRequest(node_id=self.node_id))
                if self._registered:
                    call(self._client.UnregisterNode, UnregisterNodeFleetRequest(node_id=self.node_id))
        finally:
            self._client.close()


def key_pair(key: Path | None) -> tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey]:
    """The keys of a node, new ones where it has no file; raises ConfigError."""
    if key is None:
        return generate_key_pairs()
    try:
        content = read_key(key)
        load = load_ssh_private_key if b"OPENSSH" in content else load_pem_private_key
        private = load(content, None)
    except OSError as error:
        raise ConfigError(f"{key}: {error.strerror}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it has a password
        raise ConfigError(f"{key}: is not a private key without password: {error}") from None
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{key}: is not an EC key; `ssh-keygen -t ecdsa -b 384` makes one")
    return private, private.public_key()


def _inactive(superlink: Superlink, pem: bytes, error: LinkError) -> LinkError:
    """The reason why a node may not join; the SuperLink gives the same error for several."""
    if error.again or not isinstance(error, RefusedError):
        return error
    try:
        known = next((each for each in listed(superlink) if each.key == pem), None)
    except LinkError:  # for example behind a gate that lets only nodes through: then it cannot be found out
        why = "its key is not registered, or a node with this key counts as connected until its heartbeat expires"
        return LinkError(f"{error}; {why}", again=True)
    if known is None:
        return LinkError("this node's key is not registered; `flwr supernode register` does that")
    until = datetime.fromisoformat(known.online_until) if known.online_until else datetime.now(UTC)
    rest = (until - datetime.now(UTC)).total_seconds()
    rest = min(max(rest, 0), HEARTBEAT_PATIENCE * HEARTBEAT_INTERVAL)  # it may have expired, and clocks differ
    return LinkError(
        f"a node with this key still counts as connected: its last heartbeat expires in up to {rest:.0f} s",
        again=True,
    )
