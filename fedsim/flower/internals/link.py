"""A Flower run that is driven from this process: messages to nodes, and their replies."""

import hashlib
import secrets
import time
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
    BRIEF,
    LONG,
    LinkError,
    Pulse,
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
from fedsim.flower.internals.objects import WORKERS, Arrival, GoneError, packed, push

Kind = Literal["train", "query", "evaluate"]

HEARTBEAT = 10.0  # seconds; the SuperLink fails a run that it has not heard of for 60
RACES = 5  # runs that are begun before we say that others take them
ENDED = "the SuperLink has ended our run: it was stopped, or the SuperLink was restarted"
NODE = Node(node_id=SUPERLINK_NODE_ID)  # as which the driver of a run speaks

FAULTS = {
    ErrorCode.LOAD_CLIENT_APP_EXCEPTION: "the node could not load its app",
    ErrorCode.CLIENT_APP_RAISED_EXCEPTION: "the node's app raised",
    ErrorCode.MESSAGE_UNAVAILABLE: "the message expired, or the SuperLink lost it",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "the reply expired, or the SuperLink lost it",
    ErrorCode.NODE_UNAVAILABLE: "the node is gone",
    ErrorCode.MOD_FAILED_PRECONDITION: "the node's mods refuse the message",
    ErrorCode.INVALID_FAB: "the node refuses the app",
    ErrorCode.CLIENT_APP_CRASHED: "the node's app died",
}

GONE = {ErrorCode.NODE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE}


class Reply(NamedTuple):
    """What came of one message."""

    to: str  # the id of the message that it answers
    node: int
    content: RecordDict | None
    error: str | None  # one line
    bytes: int  # of the content, as it was on the wire
    gone: bool = False  # the node went away: it has not refused, and may be asked again


class Link:
    """A Flower run of ours: sends messages to nodes and takes their replies. Not for two threads at once."""

    def __init__(self, runtime: RuntimeHttpClient, run_id: int, task_id: int, *, ours: bool):
        self.run_id = run_id
        self._runtime, self._task, self._ours = runtime, task_id, ours
        self._pool = ThreadPoolExecutor(WORKERS, "link")
        self._nodes = dict[str, int]()  # whom each message went to
        self._arriving = dict[str, Arrival]()  # by the id of the message that it answers
        self._abandoned = set[str]()
        self._pulse = Pulse(self._beat, HEARTBEAT) if ours else None
        self._closed = False

    @classmethod
    def open(cls, superlink: Superlink, app: Path | bytes) -> Self:
        """Begin a run of `app` (its folder or its FAB), and be its ServerApp; raises LinkError."""
        fab = build_fab(app) if isinstance(app, Path) else app
        control = connect(ControlHttpClient, superlink, "flwr CLI")
        runtime = connect(RuntimeHttpClient, superlink, "flwr-serverapp")
        try:
            for _ in range(RACES):
                if begun := _begin(control, runtime, fab):
                    return cls(runtime, *begun, ours=True)
        except BaseException:
            runtime.close()
            raise
        finally:
            control.close()
        runtime.close()
        raise LinkError(
            f"another process takes the runs of {superlink.address} before we can drive them: "
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
            node.node_id for node in self._call(self._runtime.GetNodes, GetNodesRequest(), patience=BRIEF).nodes
        }

    def send(self, contents: Mapping[int, RecordDict], kind: Kind, *, group: str, ttl: float) -> dict[str, int]:
        """Send each node its content, and give the messages' ids with their nodes; raises LinkError.

        Arrays are hashed and uploaded once if several contents hold the same ArrayRecord. A message whose reply
        has not come within `ttl` seconds is answered with an error.
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
                    created_at=time.time(),
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
            raise LinkError("the SuperLink takes no message of this run")
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
        self._call(self._runtime.PushObject, request, patience=LONG)

    def receive(self, waiting: Collection[str], *, most_bytes: int) -> list[Reply]:
        """The replies that are here by now, to some of the messages `waiting`; raises LinkError.

        It waits for nothing: call it again soon, and less often while nothing comes, for each question costs the
        SuperLink 2 ms. A reply with more than `most_bytes` is not read, and comes as an error.
        """
        if not (asked := {*waiting, *self._abandoned} - self._arriving.keys()) and not self._arriving:
            return []
        replies = []
        if asked:
            pulled = self._call(self._runtime.PullMessages, PullAppMessagesRequest(message_ids=asked))
            for proto, tree in zip(pulled.messages_list, pulled.message_object_trees, strict=True):
                to, name = proto.metadata.reply_to_message_id, tree.object_id
                if to in self._abandoned:
                    self._abandoned.discard(to)
                    self._done(name)
                elif to in asked:
                    if proto.HasField("error"):
                        replies.append(self._failed(to, name, message_from_proto(proto).error))
                    else:
                        try:
                            self._arriving[to] = Arrival(tree, most_bytes)
                        except TooLargeError as error:
                            replies.append(self._reply(to, name, error=f"its reply is too large: {error}"))
        for to in [to for to in self._arriving if to in waiting]:
            try:
                reply = self._arrived(to)
            except LinkError:
                if replies:  # which would be lost: the SuperLink forgets them. The error comes again
                    break
                raise
            if reply:
                replies.append(reply)
        return replies

    def _arrived(self, to: str) -> Reply | None:
        arrival = self._arriving[to]
        try:
            if not arrival.advance(self._get, self._pool):
                return None
            message = arrival.message()
            if message.has_error():
                return self._failed(to, arrival.name, message.error)
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

    def _failed(self, to: str, name: str, error: Error) -> Reply:
        return self._reply(to, name, error=_fault(error))._replace(gone=error.code in GONE)

    def _done(self, name: str) -> None:
        """Let the SuperLink forget a reply; nobody waits for that."""
        request = ConfirmMessageReceivedRequest(node=NODE, run_id=self.run_id, message_object_id=name)
        self._pool.submit(lambda: self._call(self._runtime.ConfirmMessageReceived, request, patience=BRIEF))

    def _get(self, name: str) -> bytes | None:
        request = PullObjectRequest(node=NODE, run_id=self.run_id, object_id=name)
        found = self._call(self._runtime.PullObject, request, patience=BRIEF)
        if not found.object_found:
            raise GoneError
        return found.object_content if found.object_available else None

    def abandon(self, messages: Collection[str]) -> None:
        """Wait no more for the replies to these: one that comes late is dropped, unread, by the next `receive`."""
        self._abandoned.update(messages)
        for to in messages:
            self._nodes.pop(to, None)
            if arrival := self._arriving.pop(to, None):
                self._abandoned.discard(to)
                self._done(arrival.name)

    def close(self, error: str | None = None) -> None:
        """Complete the run, or fail it for a reason; it may be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._pulse:
            self._pulse.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._ours:
            status = "completed" if error is None else "failed"
            with suppress(LinkError):  # it has heard already, or cannot hear
                call(
                    self._runtime.PushTaskOutput,
                    PushTaskOutputRequest(sub_status=status, details=one_line(error or "")),
                )
            self._runtime.close()

    def _beat(self) -> None:
        try:
            known = call(self._runtime.SendTaskHeartbeat, SendTaskHeartbeatRequest()).success
        except UnknownError:
            known = False
        if not known:
            raise RunEndedError(ENDED)

    def _call(self, method: Callable[[Request], Response], request: Request, *, patience: float = 0) -> Response:
        if self._closed:
            raise LinkError("the run is closed")
        if self._pulse:
            self._pulse.check()
        try:
            return call(method, request, patience=patience)
        except UnknownError:
            raise RunEndedError(ENDED) from None


def build_fab(folder: Path) -> bytes:
    """The FAB of the app in a folder: what Flower sends of it."""
    with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):  # of a library that flwr uses
        return build_fab_from_disk(folder)


def _begin(control: ControlHttpClient, runtime: RuntimeHttpClient, fab: bytes) -> tuple[int, int] | None:
    """A run of our own and its task, by their ids; None where another process took the task.

    An ordinary SuperLink starts ServerApps itself, through a SuperExec that asks for tasks once a second: we ask
    at once, and only for what runs our very app. Whoever has the task's token is the run's ServerApp.
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
            "the SuperLink gives runs to those who know its secret: start it without --superexec-auth-secret-file"
        ) from None


def _unique(fab: bytes) -> bytes:
    """The same app under a hash of its own, by which its task is told from all others."""
    file = BytesIO(fab)
    if not is_zipfile(file):
        raise LinkError("the app is no FAB")
    with ZipFile(file, "a") as opened:
        opened.comment = secrets.token_hex(16).encode()
    return file.getvalue()


def _fault(error: Error) -> str:
    words = FAULTS.get(error.code, f"Flower's error {error.code}")
    return f"{words}: {error.reason}" if error.reason else words
