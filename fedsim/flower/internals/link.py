"""A Flower run that is driven from this process: messages to nodes, and their replies."""

import hashlib
import secrets
import warnings
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple, Self
from zipfile import ZipFile, is_zipfile

from flwr.app import Metadata, RecordDict
from flwr.app.error import Error
from flwr.app.message.message import make_message, remove_content_from_message
from flwr.cli.build import build_fab_from_disk
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import fab_to_proto, message_from_proto, message_to_proto
from flwr.proto.control_pb2 import StartRunRequest, StopRunRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    AcquireTaskResponse,
    GetNodesRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.serverapp import Grid
from flwr.supercore.constant import TASK_TOKEN_HEADER
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity

from fedsim.errors import one_line
from fedsim.flower.internals.connection import (
    LEAVE_TIMEOUT,
    RETRY_BRIEFLY,
    RETRY_LONG,
    Heartbeat,
    LinkError,
    Request,
    Response,
    RunEndedError,
    Superlink,
    TooLargeError,
    UnknownError,
    call,
    connect,
    guard,
)
from fedsim.flower.internals.network import ServerClock
from fedsim.flower.internals.objects import PARALLEL_OBJECTS, GoneError, IncomingMessage, packed, push

Kind = Literal["train", "query", "evaluate"]

HEARTBEAT_INTERVAL = 10.0  # seconds; the SuperLink fails a run after 60 without a heartbeat
RECEIVE_SECONDS = 2.0  # for one reply, before others get their turn: it may be of 100,000 objects
START_ATTEMPTS = 5  # runs to start before an error says that another process takes them
ENDED = "the SuperLink has ended this run: it was stopped, or the SuperLink was restarted"
NODE = Node(node_id=SUPERLINK_NODE_ID)  # the sender of the messages of a run's driver

ERROR_TEXTS = {
    ErrorCode.LOAD_CLIENT_APP_EXCEPTION: "the node could not load its app",
    ErrorCode.CLIENT_APP_RAISED_EXCEPTION: "the node's app raised an error",
    ErrorCode.MESSAGE_UNAVAILABLE: "the message expired, or the SuperLink lost it",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "the reply expired, or the SuperLink lost it",
    ErrorCode.NODE_UNAVAILABLE: "the node is gone",
    ErrorCode.MOD_FAILED_PRECONDITION: "the node's mods refused the message",
    ErrorCode.INVALID_FAB: "the node refused the app",
    ErrorCode.CLIENT_APP_CRASHED: "the node's app died",
}

GONE = {ErrorCode.NODE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE}


class Reply(NamedTuple):
    """The result of one message."""

    to: str  # the id of the message that it answers
    node: int
    content: RecordDict | None
    error: str | None  # one line
    bytes: int  # of the content, as it was transferred
    gone: bool = False  # the node was lost: it has not refused, and may be asked again


class Link:
    """A Flower run that this process drives: it sends messages to nodes and takes replies. Not thread-safe."""

    def __init__(self, runtime: RuntimeHttpClient, run_id: int, task_id: int, *, ours: bool):
        self.run_id = run_id
        self._runtime, self._task, self._ours = runtime, task_id, ours
        self._clock = ServerClock(runtime._client)
        self._pool = ThreadPoolExecutor(PARALLEL_OBJECTS, "link")
        self._nodes = dict[str, int]()  # the node that each message went to
        self._arriving = dict[str, IncomingMessage]()  # by the id of the message that it answers
        self._abandoned = set[str]()
        self._heartbeat = Heartbeat(self._beat, HEARTBEAT_INTERVAL) if ours else None
        self._closed = False

    @classmethod
    def open(cls, superlink: Superlink, app: Path | bytes) -> Self:
        """Start a run of `app` (its folder or its FAB) with this process as its ServerApp; raises LinkError."""
        fab = build_fab(app) if isinstance(app, Path) else app
        control = connect(ControlHttpClient, superlink, "flwr CLI")
        runtime = connect(RuntimeHttpClient, superlink, "flwr-serverapp")
        try:
            for _ in range(START_ATTEMPTS):
                if begun := _begin(control, runtime, fab):
                    return cls(runtime, *begun, ours=True)
        except BaseException:
            runtime.close()
            raise
        finally:
            control.close()
        runtime.close()
        raise LinkError(
            f"another process takes the runs of {superlink.address} before this one can drive them: "
            "start flower-superlink with --isolation process, and no flower-superexec"
        )

    @classmethod
    def inside(cls, grid: Grid) -> Self:
        """The run whose ServerApp has this grid, in its process."""
        runtime = getattr(grid, "_runtime_client", None)
        if not isinstance(runtime, RuntimeHttpClient):
            raise LinkError("Flower's own simulation has no SuperLink: run it with fedsim's runtimes instead")
        return cls(guard(runtime), grid.run.run_id, TaskIdentity.task_id, ours=False)

    def nodes(self) -> set[int]:
        """The ids of the nodes that are online."""
        return {
            node.node_id
            for node in self._call(self._runtime.GetNodes, GetNodesRequest(), retry_for=RETRY_BRIEFLY).nodes
        }

    def send(self, contents: Mapping[int, RecordDict], kind: Kind, *, group: str, ttl: float) -> dict[str, int]:
        """Send each node its content, and return the nodes by the messages' ids; raises LinkError.

        Arrays of an ArrayRecord that several contents share are hashed and uploaded once. If there is no reply
        within `ttl` seconds, the reply is an error.
        """
        if not contents:
            return {}
        messages = [
            make_message(
                Metadata(
                    run_id=self.run_id,
                    message_id="",
                    src_node_id=SUPERLINK_NODE_ID,
                    dst_node_id=node,
                    reply_to_message_id="",
                    group_id=f"{group}/{secrets.token_hex(16)}",  # so that no other node can guess the id
                    created_at=self._clock.now(),
                    ttl=ttl,
                    message_type=kind,
                    src_task_id=self._task,
                ),
                content,
            )
            for node, content in contents.items()
        ]
        trees, objects = packed(messages, self._pool)
        request = PushAppMessagesRequest(
            messages_list=[message_to_proto(remove_content_from_message(each)) for each in messages],
            message_object_trees=trees,
        )
        taken = self._call(self._runtime.PushMessages, request)
        sent = dict(zip(taken.message_ids, contents, strict=True))
        if "" in sent:
            raise LinkError("the SuperLink accepts no messages of this run")
        push(
            objects,
            taken.objects_to_push,
            lambda name, content: self._put(taken.session_id, name, content),
            self._pool,
        )
        self._nodes |= sent
        return sent

    def _put(self, session: str, name: str, content: bytes) -> None:
        request = PushObjectRequest(
            node=NODE, run_id=self.run_id, object_id=name, object_content=content, session_id=session
        )
        self._call(self._runtime.PushObject, request, retry_for=RETRY_LONG)

    def receive(self, waiting: Collection[str], *, most_bytes: int) -> list[Reply]:
        """The replies to messages of `waiting` that have arrived; raises LinkError.

        It does not wait. Call it often, and less often while nothing arrives: each call costs the SuperLink 2 ms.
        A reply of more than `most_bytes` is not read, and is returned as an error.
        """
        if not (asked := {*waiting, *self._abandoned} - self._arriving.keys()) and not self._arriving:
            return []
        replies = []
        if asked:
            pulled = self._call(self._runtime.PullMessages, PullAppMessagesRequest(message_ids=asked))
            for proto, tree in zip(pulled.messages_list, pulled.message_object_trees, strict=True):
                to, name = proto.metadata.reply_to_message_id, tree.object_id
                if to not in asked:
                    continue
                asked.discard(to)  # of two replies the first counts
                if to in self._abandoned:
                    self._abandoned.discard(to)
                    self._done(name)
                elif proto.HasField("error"):
                    failed = message_from_proto(proto).error
                    gone = failed.code in GONE and proto.metadata.src_node_id == SUPERLINK_NODE_ID
                    replies.append(self._reply(to, name, error=_error_text(failed))._replace(gone=gone))
                else:
                    try:
                        self._arriving[to] = IncomingMessage(tree, most_bytes)
                    except TooLargeError as error:
                        replies.append(self._reply(to, name, error=f"its reply is too large: {error}"))
        for to in [to for to in self._arriving if to in waiting]:
            try:
                reply = self._arrived(to)
            except LinkError:
                if replies:  # the SuperLink does not keep them; the error will come again
                    break
                raise
            if reply:
                replies.append(reply)
        return replies

    def _arrived(self, to: str) -> Reply | None:
        arrival = self._arriving[to]
        try:
            if not arrival.advance(self._get, self._pool, RECEIVE_SECONDS):
                return None
            message = arrival.message()
            if message.has_error():
                return self._reply(to, arrival.name, error=_error_text(message.error))
            return self._reply(to, arrival.name, message.content, arrival.bytes)
        except TooLargeError as error:
            return self._reply(to, arrival.name, error=f"its reply is too large: {error}")
        except GoneError:
            return self._reply(to, arrival.name, error="the node did not send all of its reply")._replace(
                gone=True
            )
        except ValueError as error:
            return self._reply(to, arrival.name, error=f"its reply cannot be read: {error}")

    def _reply(
        self, to: str, name: str, content: RecordDict | None = None, size: int = 0, *, error: str | None = None
    ) -> Reply:
        self._arriving.pop(to, None)
        self._done(name)
        return Reply(to, self._nodes.pop(to, 0), content, None if error is None else one_line(error), size)

    def _done(self, name: str) -> None:
        """Have the SuperLink delete a reply, without waiting for it."""
        request = ConfirmMessageReceivedRequest(node=NODE, run_id=self.run_id, message_object_id=name)
        self._pool.submit(
            lambda: self._call(self._runtime.ConfirmMessageReceived, request, retry_for=RETRY_BRIEFLY)
        )

    def _get(self, name: str) -> bytes | None:
        request = PullObjectRequest(node=NODE, run_id=self.run_id, object_id=name)
        found = self._call(self._runtime.PullObject, request, retry_for=RETRY_BRIEFLY)
        if not found.object_found:
            raise GoneError
        return found.object_content if found.object_available else None

    def abandon(self, messages: Collection[str]) -> None:
        """No longer wait for the replies to these; `receive` drops, unread, those that arrive late."""
        self._abandoned.update(messages)
        for to in messages:
            self._nodes.pop(to, None)
            if arrival := self._arriving.pop(to, None):
                self._abandoned.discard(to)
                self._done(arrival.name)

    def close(self, error: str | None = None) -> None:
        """Complete the run, or fail it with an error; it may be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._heartbeat:
            self._heartbeat.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._ours:
            status = "completed" if error is None else "failed"
            self._runtime._client.timeout = LEAVE_TIMEOUT
            try:
                with suppress(LinkError):  # it knows already, or cannot be reached
                    call(
                        self._runtime.PushTaskOutput,
                        PushTaskOutputRequest(sub_status=status, details=one_line(error or "")),
                    )
            finally:  # also after an interrupt: threads that still repeat a call then end
                self._runtime.close()

    def _beat(self) -> None:
        try:
            known = call(self._runtime.SendTaskHeartbeat, SendTaskHeartbeatRequest()).success
        except UnknownError:
            known = False
        if not known:
            raise RunEndedError(ENDED)

    def _call(self, method: Callable[[Request], Response], request: Request, *, retry_for: float = 0) -> Response:
        if self._closed:
            raise LinkError("the run is closed")
        if self._heartbeat:
            self._heartbeat.check()
        try:
            return call(method, request, retry_for=retry_for)
        except UnknownError:
            raise RunEndedError(ENDED) from None


def build_fab(folder: Path) -> bytes:
    """The FAB (Flower's archive) of the app in a folder."""
    with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):  # from a library that flwr uses
        return build_fab_from_disk(folder)


def _begin(control: ControlHttpClient, runtime: RuntimeHttpClient, fab: bytes) -> tuple[int, int] | None:
    """The ids of a new run and its task; None if another process took the task.

    An ordinary SuperLink starts ServerApps itself, through a SuperExec that asks for tasks once a second. This
    process asks at once, and only for tasks of its own app. Whoever has the task's token is the ServerApp.
    """
    fab = _unique(fab)
    name = hashlib.sha256(fab).hexdigest()
    began = call(control.StartRun, StartRunRequest(fab=fab_to_proto(Fab(name, fab, {}))))
    if not began.run_id:
        raise LinkError("the SuperLink refuses the app: it is too large")
    try:
        acquired = _acquire(runtime, name)
        if not acquired.token:
            call(control.StopRun, StopRunRequest(run_id=began.run_id))
            return None
        runtime._client.headers[TASK_TOKEN_HEADER] = acquired.token
        call(runtime.PullTaskInput, PullTaskInputRequest())
    except BaseException:
        with suppress(LinkError):
            call(control.StopRun, StopRunRequest(run_id=began.run_id))
        raise
    return began.run_id, acquired.task.task_id


def _acquire(runtime: RuntimeHttpClient, name: str) -> AcquireTaskResponse:
    try:
        return call(runtime.AcquireTask, AcquireTaskRequest(agentapp_fab_hashes=[name]))
    except UnknownError:
        raise LinkError(
            "the SuperLink requires a secret to drive runs: start it without --superexec-auth-secret-file"
        ) from None


def _unique(fab: bytes) -> bytes:
    """The same app with a hash of its own, which distinguishes its task from all others."""
    file = BytesIO(fab)
    if not is_zipfile(file):
        raise LinkError("the app is not a FAB")
    with ZipFile(file, "a") as opened:
        opened.comment = secrets.token_hex(16).encode()
    return file.getvalue()


def _error_text(error: Error) -> str:
    words = ERROR_TEXTS.get(error.code, f"Flower's error {error.code}")
    return f"{words}: {error.reason}" if error.reason else words
