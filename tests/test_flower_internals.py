"""What fedsim takes from inside flwr is as it was, and carries messages between a Link and NodeLinks."""

import ast
import hashlib
import inspect
import json
import re
import socket
import subprocess
import sys
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

pytest.importorskip("flwr")

import httpx
from flowers import Federation, until
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.error import Error
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.constant import TASK_TOKEN_HEADER
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.inflatable import inflatable_object, inflatable_utils
from flwr.supercore.run import Run
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid
from flwr.supernode import node_auth_http_interceptor as signing
from hostile import post
from lab import CONFIG

from fedsim.errors import ConfigError
from fedsim.flower import FLWR, internals, needs_flwr
from fedsim.flower.certificates import make
from fedsim.flower.internals import (
    Link,
    LinkError,
    NodeLink,
    Superlink,
    connection,
    listed,
    network,
    public_key_bytes,
    register,
    unregister,
)
from fedsim.flower.internals import link as driving
from fedsim.flower.internals import objects as wire
from fedsim.flower.internals.connection import TooLargeError, connect

ROOT = Path(__file__).parent.parent
ROOM = 2**20  # bytes that a message may have here
APP = {
    "pyproject.toml": """
[project]
name = "empty"
version = "1.0.0"
dependencies = ["flwr>=1.41.0"]
[tool.flwr.app]
publisher = "fedsim"
[tool.flwr.app.components]
serverapp = "empty:app"
clientapp = "empty:app"
""",
    "empty.py": "from flwr.serverapp import ServerApp\n\napp = ServerApp()\n",
}

# --- the contract ------------------------------------------------------------------------------------------------

CALLS = [  # (module, name, parameters that we pass, or rely on being there)
    ("flwr.app", "Array", "dtype shape stype data"),
    ("flwr.app", "Message", "content error reply_to"),
    ("flwr.app.error", "Error", "code reason"),
    ("flwr.app.message.arraychunk", "ArrayChunk", "data"),
    ("flwr.app.message.message", "make_message", "metadata content error"),
    ("flwr.app.message.message", "remove_content_from_message", "message"),
    (
        "flwr.app.metadata",
        "Metadata",
        "run_id message_id src_node_id dst_node_id reply_to_message_id group_id created_at ttl message_type "
        "src_task_id",
    ),
    ("flwr.cli.build", "build_fab_from_disk", "app"),
    ("flwr.common.serde", "fab_to_proto", "fab"),
    ("flwr.common.serde", "message_from_proto", "message_proto"),
    ("flwr.common.serde", "message_to_proto", "message"),
    ("flwr.supercore.fab", "Fab", "hash_str content verifications"),
    ("flwr.supercore.error", "FlowerError.from_json", "value"),
    ("flwr.supercore.inflatable.inflatable_object", "InflatableObject.deflate", ""),
    ("flwr.supercore.inflatable.inflatable_object", "InflatableObject.inflate", "object_content children"),
    (
        "flwr.supercore.inflatable.inflatable_object",
        "get_object_head_values_from_object_content",
        "object_content",
    ),
    ("flwr.supercore.inflatable.inflatable_object", "get_object_id", "object_content"),
    ("flwr.supercore.inflatable.inflatable_object", "iterate_object_tree", "tree"),
    ("flwr.supercore.inflatable.inflatable_object", "no_object_id_recompute", ""),
    ("flwr.supercore.primitives.asymmetric", "generate_key_pairs", ""),
    ("flwr.supercore.primitives.asymmetric", "public_key_to_bytes", "public_key"),
    ("flwr.supercore.primitives.asymmetric", "uses_nist_ec_curve", "public_key"),
    (
        "flwr.supercore.protobuf.client",
        "ProtobufClient.from_server_address",
        "server_address insecure root_certificates interceptors retry_invoker",
    ),
    (
        "flwr.supercore.runtime_version_compatibility",
        "RuntimeVersionMetadata.from_local_component",
        "component_name",
    ),
    ("flwr.supercore.runtime_version_compatibility", "RuntimeVersionMetadata.as_metadata", ""),
    ("flwr.supernode.node_auth_http_interceptor", "NodeAuthHttpInterceptor", "private_key public_key"),
    ("flwr.supercore.control.control_http_client", "ControlHttpClient.StartRun", "request"),
    ("flwr.supercore.control.control_http_client", "ControlHttpClient.StopRun", "request"),
    ("flwr.supercore.control.control_http_client", "ControlHttpClient.ListNodes", "request"),
    ("flwr.supercore.control.control_http_client", "ControlHttpClient.RegisterNode", "request"),
    ("flwr.supercore.control.control_http_client", "ControlHttpClient.UnregisterNode", "request"),
    ("flwr.supercore.runtime", "RuntimeHttpClient.AcquireTask", "request"),
    ("flwr.supercore.runtime", "RuntimeHttpClient.PullTaskInput", "request"),
    ("flwr.supercore.runtime", "RuntimeHttpClient.PushTaskOutput", "request"),
    ("flwr.supercore.runtime", "RuntimeHttpClient.SendTaskHeartbeat", "request"),
    ("flwr.supercore.runtime", "RuntimeHttpClient.GetNodes", "request"),
    ("flwr.supercore.runtime", "RuntimeHttpClient.PushMessages", "request"),
    ("flwr.supercore.runtime", "RuntimeHttpClient.PullMessages", "request"),
    ("flwr.supercore.runtime", "RuntimeHttpClient.PushObject", "request"),
    ("flwr.supercore.runtime", "RuntimeHttpClient.PullObject", "request"),
    ("flwr.supercore.runtime", "RuntimeHttpClient.ConfirmMessageReceived", "request"),
    ("flwr.supernode.fleet_http_client", "FleetHttpClient.RegisterNode", "request"),
    ("flwr.supernode.fleet_http_client", "FleetHttpClient.ActivateNode", "request"),
    ("flwr.supernode.fleet_http_client", "FleetHttpClient.DeactivateNode", "request"),
    ("flwr.supernode.fleet_http_client", "FleetHttpClient.UnregisterNode", "request"),
    ("flwr.supernode.fleet_http_client", "FleetHttpClient.SendNodeHeartbeat", "request"),
    ("flwr.supernode.fleet_http_client", "FleetHttpClient.PullMessages", "request"),
    ("flwr.supernode.fleet_http_client", "FleetHttpClient.PushMessages", "request"),
    ("flwr.supernode.fleet_http_client", "FleetHttpClient.PushObject", "request"),
    ("flwr.supernode.fleet_http_client", "FleetHttpClient.PullObject", "request"),
    ("flwr.supernode.fleet_http_client", "FleetHttpClient.ConfirmMessageReceived", "request"),
]
FIELDS = [  # of what goes over the wire: (module, message, fields)
    ("control_pb2", "StartRunRequest", "fab"),
    ("control_pb2", "StartRunResponse", "run_id"),
    ("control_pb2", "StopRunRequest", "run_id"),
    ("control_pb2", "ListNodesResponse", "nodes_info"),
    ("control_pb2", "RegisterNodeRequest", "public_key name"),
    ("control_pb2", "UnregisterNodeRequest", "node_id"),
    ("fleet_pb2", "RegisterNodeFleetRequest", "public_key"),
    ("fleet_pb2", "ActivateNodeRequest", "public_key heartbeat_interval"),
    ("fleet_pb2", "ActivateNodeResponse", "node_id"),
    ("fleet_pb2", "DeactivateNodeRequest", "node_id"),
    ("fleet_pb2", "UnregisterNodeFleetRequest", "node_id"),
    ("fleet_pb2", "PullMessagesRequest", "node"),
    ("fleet_pb2", "PullMessagesResponse", "messages_list message_object_trees"),
    ("fleet_pb2", "PushMessagesRequest", "node messages_list message_object_trees clientapp_runtime_list"),
    ("fleet_pb2", "PushMessagesResponse", "objects_to_push session_id"),
    ("heartbeat_pb2", "SendNodeHeartbeatRequest", "node heartbeat_interval"),
    ("heartbeat_pb2", "SendNodeHeartbeatResponse", "success"),
    ("message_pb2", "Message", "metadata error"),
    ("message_pb2", "ObjectTree", "object_id children"),
    ("message_pb2", "PullObjectRequest", "node run_id object_id"),
    ("message_pb2", "PullObjectResponse", "object_found object_available object_content"),
    ("message_pb2", "PushObjectRequest", "node run_id object_id object_content session_id"),
    ("message_pb2", "ConfirmMessageReceivedRequest", "node run_id message_object_id"),
    ("node_pb2", "Node", "node_id"),
    (
        "node_pb2",
        "NodeInfo",
        "node_id status registered_at last_activated_at last_deactivated_at online_until public_key name",
    ),
    ("runtime_pb2", "AcquireTaskRequest", "agentapp_fab_hashes"),
    ("runtime_pb2", "AcquireTaskResponse", "task token"),
    ("runtime_pb2", "GetNodesResponse", "nodes"),
    ("runtime_pb2", "PushAppMessagesRequest", "messages_list message_object_trees"),
    ("runtime_pb2", "PushAppMessagesResponse", "message_ids objects_to_push session_id"),
    ("runtime_pb2", "PullAppMessagesRequest", "message_ids"),
    ("runtime_pb2", "PullAppMessagesResponse", "messages_list message_object_trees"),
    ("runtime_pb2", "PushTaskOutputRequest", "sub_status details"),
    ("runtime_pb2", "SendTaskHeartbeatResponse", "success"),
    ("task_pb2", "Task", "task_id"),
]
VALUES = [  # (module, name, value)
    ("flwr.common.constant", "SUPERLINK_NODE_ID", 1),
    ("flwr.common.constant", "HEARTBEAT_MIN_INTERVAL", 10),
    ("flwr.common.constant", "HEARTBEAT_PATIENCE", 2),
    ("flwr.common.constant", "SYSTEM_TIME_TOLERANCE", 5),
    ("flwr.common.constant", "TIMESTAMP_TOLERANCE", 300),
    ("flwr.supercore.error", "ApiErrorCode.RUNTIME_VERSION_INCOMPATIBLE", 1001),
    ("flwr.supercore.constant", "TASK_TOKEN_HEADER", "flwr-task-token"),
    ("flwr.supercore.constant", "HEAD_BODY_DIVIDER", b"\0"),
]
CODES = "LOAD_CLIENT_APP_EXCEPTION CLIENT_APP_RAISED_EXCEPTION MESSAGE_UNAVAILABLE REPLY_MESSAGE_UNAVAILABLE \
NODE_UNAVAILABLE MOD_FAILED_PRECONDITION INVALID_FAB CLIENT_APP_CRASHED"


def found(module, name):
    """What a module has under a dotted name, or a failure that says what is gone."""
    try:
        thing = import_module(module)
        for part in name.split("."):
            thing = getattr(thing, part)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"flwr {version('flwr')} has no {module}.{name}: {error}")
    return thing


def test_the_installed_flwr_is_one_whose_internals_are_known():
    needs_flwr("test")


@pytest.mark.parametrize("installed", ["1.40.2", "1.43.0", "1.4.1", "2.41.0", None])
def test_another_flwr_is_refused_in_one_line(monkeypatch, tmp_path, fedsim_, installed):
    def faked(package):
        if installed is None:
            raise PackageNotFoundError(package)
        return installed

    monkeypatch.setattr("fedsim.flower.version", faked)
    monkeypatch.delitem(sys.modules, "fedsim.flower.internals")
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(yaml.safe_dump(CONFIG | {"runtime": {"name": "flower", "insecure": True}}))
    said = "needs flwr, which is not installed; pip install -e '.[flower]'"
    if installed:
        said = f"needs flwr 1.41 or 1.42, and {installed} is installed; pip install 'flwr>=1.41,<1.43'"
    for command in (
        ["run", "c.yaml"],
        ["serve", "c.yaml", "--insecure"],
        ["node", "c.yaml"],
        ["nodes", "--insecure"],
    ):
        done = fedsim_(*command)
        assert (done.status, done.err.count("\n")) == (2, 1), done.err
        assert said in done.err
    with pytest.raises(ConfigError, match=r"flower:? needs flwr"):
        import_module("fedsim.flower.internals")


@pytest.mark.parametrize("release", ["1.41.0", "1.41.7", "1.42.0", "1.42.1"])
def test_releases_whose_internals_are_known_are_taken(monkeypatch, release):
    monkeypatch.setattr("fedsim.flower.version", lambda package: release)
    needs_flwr("test")


def test_the_extras_allow_the_same_versions():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert FLWR in extras["flower"]
    assert FLWR.replace("flwr", "flwr[simulation]") in extras["peers"]


@pytest.mark.parametrize(("module", "name", "parameters"), CALLS, ids=lambda each: str(each)[:60])
def test_what_is_called_takes_what_it_took(module, name, parameters):
    has = inspect.signature(found(module, name)).parameters
    assert set(parameters.split()) <= set(has), f"{module}.{name} takes {list(has)} now"
    added = [
        p.name for p in has.values() if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    assert set(added) <= {*parameters.split(), "self"}, f"{module}.{name} wants {added} now"


@pytest.mark.parametrize(("module", "name", "fields"), FIELDS)
def test_what_goes_over_the_wire_has_the_fields_it_had(module, name, fields):
    has = found(f"flwr.proto.{module}", name).DESCRIPTOR.fields_by_name
    assert set(fields.split()) <= set(has), f"{name} has {list(has)} now"


@pytest.mark.parametrize(("module", "name", "value"), VALUES)
def test_constants_are_what_they_were(module, name, value):
    assert found(module, name) == value


def test_a_client_is_made_of_what_it_was_made_of():
    """`connect` makes one without its constructor."""
    superlink = Superlink("127.0.0.1:1", None)
    theirs = ControlHttpClient.from_server_address(superlink.address, True, None, ())
    with closing(connect(ControlHttpClient, superlink, "flwr CLI")) as ours, closing(theirs):
        assert vars(ours) | {"_client": None} == vars(theirs) | {"_client": None}
        assert type(ours._client) is type(theirs._client)


def test_each_of_flowers_errors_is_put_in_words():
    codes = {
        name: code for name, code in vars(found("flwr.common.constant", "ErrorCode")).items() if name.isupper()
    }
    assert {*CODES.split(), "UNKNOWN"} == set(codes)
    assert {codes[name] for name in CODES.split()} == set(driving.ERROR_TEXTS)


def test_the_kinds_of_objects_are_those_it_had():
    known = {"ArrayChunk", "Array", "ArrayRecord", "ConfigRecord", "Message", "MetricRecord", "RecordDict"}
    assert set(inflatable_utils.inflatable_class_registry) == known


@pytest.mark.parametrize("missing", ["flwr", "flwr.supernode.fleet_http_client"])
def test_a_flwr_that_lacks_something_is_refused_with_what_to_install(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; import fedsim.flower.internals"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    said = ended.stderr.splitlines()[-1]
    assert said.startswith("fedsim.errors.ConfigError: flower: flwr is incomplete: ")
    assert said.endswith(f"; pip install --force-reinstall '{FLWR}'")


def test_no_other_file_reaches_inside_flwr():
    """Of the whole program: also lazily, and one public module by way of another."""
    public = {"flwr.app", "flwr.serverapp", "flwr.clientapp", "flwr.serverapp.strategy", "flwr.simulation"}
    inside = Path(internals.__file__).parent
    taken = dict[str, set[str]]()
    for file in [each for folder in ("fedsim", "strategies", "launch") for each in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            taken.setdefault(str(file.relative_to(ROOT)), set()).update(
                name for name in names if name.split(".")[0] == "flwr"
            )
    of_internals = {file for file in taken if (ROOT / file).parent == inside}
    assert {name for file in of_internals for name in taken[file]} - public  # it finds what there is
    assert taken["fedsim/flower/client_app.py"] == {"flwr.app", "flwr.clientapp"}
    assert {
        file: names - public for file, names in taken.items() if file not in of_internals and names - public
    } == {}


# --- objects -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(2) as made:
        yield made


def note(content, node=7):
    """A message of a run to a node."""
    return make_message(Metadata(1, "", 1, node, "", "g", time.time(), 60.0, "train", 3), content)


def content(size=1000, seed=0):
    """A record of an array of `size` float32, twice, and of some settings."""
    model = Array(np.random.default_rng(seed).standard_normal(size, dtype=np.float32))
    return RecordDict(
        {"arrays": ArrayRecord({"x": model, "y": model}), "config": ConfigRecord({"name": "é", "n": 3})}
    )


def values(record):
    return {name: array.numpy() for name, array in record["arrays"].items()}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def made_bytes(objects):
    return {name: each if isinstance(each, bytes) else each.deflate() for name, each in objects.items()}


@pytest.mark.parametrize("size", [0, 1, 1000])
def test_packing_equals_flowers_own(pool, monkeypatch, size):
    monkeypatch.setattr(wire, "CHUNK_BYTES", 1500)
    monkeypatch.setattr("flwr.app.message.array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 1500)
    message = note(content(size))
    theirs = make_message(message.metadata, content(size))
    (tree,), objects = wire.packed([message], pool)
    assert tree == inflatable_object.get_object_tree(theirs)
    their_objects = {
        name: each.deflate() for name, each in inflatable_object.get_all_nested_objects(theirs).items()
    }
    assert made_bytes(objects) == their_objects
    again = inflatable_utils.inflate_object_from_contents(tree.object_id, dict(their_objects))
    assert same(values(again.content), values(message.content))


def arrived(tree, contents, most=ROOM, pool=None):
    arrival = wire.IncomingMessage(tree, most)
    with ThreadPoolExecutor(1) as own:
        assert arrival.advance(contents.get, pool or own)
    return arrival.message()


@pytest.mark.parametrize("size", [0, 1, 1000])
def test_unpacking_equals_flowers_own(size):
    theirs = note(content(size))
    tree = inflatable_object.get_object_tree(theirs)
    objects = {name: each.deflate() for name, each in inflatable_object.get_all_nested_objects(theirs).items()}
    message = arrived(tree, objects)
    assert same(values(message.content), values(theirs.content))
    assert dict(message.content["config"]) == {"name": "é", "n": 3}
    assert message.metadata.message_id == tree.object_id
    assert message.metadata.dst_node_id == 7


def test_what_several_messages_share_is_packed_once(pool):
    shared = content()
    trees, objects = wire.packed([note(shared, node) for node in (7, 8, 9)], pool)
    assert len(trees) == 3
    assert sum(isinstance(each, Message) for each in objects.values()) == 3
    assert sum(isinstance(each, bytes) for each in objects.values()) == 1  # the array's only chunk
    assert len(objects) == 3 + 1 + 2 + 1 + 1  # messages, record dict, two records, array, chunk


def bomb(message, monkeypatch):
    """An array whose few bytes name its chunk again and again, under the ids that it then has."""
    array = message.content["arrays"]["x"]
    (name, _), *_ = array.slice_array()
    head = {"dtype": "uint8", "shape": [8], "stype": "numpy.ndarray", "arraychunk_ids": [0] * 10_000}
    monkeypatch.setattr(
        type(array),
        "deflate",
        lambda self: inflatable_object.add_header_to_object_body(json.dumps(head).encode(), self),
    )
    return name


def test_an_array_that_unfolds_beyond_the_room_is_refused(pool, monkeypatch):
    message = note(content())
    with monkeypatch.context() as patch:
        bomb(message, patch)
        (tree,), objects = wire.packed([message], pool)
        objects = made_bytes(objects)
    with pytest.raises(TooLargeError):
        arrived(tree, objects)


def test_records_are_small_where_arrays_may_be_large(pool):
    for size, fits in ((wire.MOST_RECORD_BYTES // 2, True), (wire.MOST_RECORD_BYTES, False)):
        (tree,), objects = wire.packed([note(RecordDict({"config": ConfigRecord({"blob": bytes(size)})}))], pool)
        if fits:
            assert len(arrived(tree, made_bytes(objects), 2**30).content["config"]["blob"]) == size
        else:
            with pytest.raises(TooLargeError, match="besides arrays"):
                arrived(tree, made_bytes(objects), 2**30)


def test_a_tree_that_is_too_wide_or_deep_is_refused():
    wide = ObjectTree(object_id="0", children=[ObjectTree(object_id=str(n)) for n in range(wire.MOST_OBJECTS + 1)])
    with pytest.raises(TooLargeError):
        wire.IncomingMessage(wide, ROOM)
    names = [f"{n:064x}" for n in range(wire.MOST_DEPTH + 1)]
    contents = {
        name: f"RecordDict {below} 0\0".encode() for name, below in zip(names, [*names[1:], ""], strict=True)
    }
    flat = ObjectTree(object_id=names[0], children=[ObjectTree(object_id=name) for name in names[1:]])
    with pytest.raises(ValueError, match="deep"):
        arrived(flat, contents)


def test_a_message_of_many_objects_arrives_a_part_at_a_time(pool):
    """Each object once, and one that is not there yet is asked for again."""
    names = [str(n) for n in range(3000)]
    tree = ObjectTree(object_id="0", children=[ObjectTree(object_id=name) for name in names[1:]])
    message, asked, missing = wire.IncomingMessage(tree, ROOM), [], {"7", "2000"}

    def fetch(name):
        asked.append(name)
        if name in missing:
            missing.remove(name)
            return None
        return b"1"

    parts = 1
    while not message.advance(fetch, pool, 0.005):
        parts += 1
    assert 3 < parts < 3000
    assert sorted(asked) == sorted([*names, "7", "2000"])
    assert message.bytes == 3000
    assert sorted(message._contents) == sorted(names)


def test_objects_that_name_each_other_many_times_are_made_once():
    def record(children):
        text = f"RecordDict {','.join(children)} 2\0{{}}".encode()
        return hashlib.sha256(text).hexdigest(), text

    leaf = ConfigRecord({"x": 1}).deflate()
    name, contents = hashlib.sha256(leaf).hexdigest(), {}
    contents[name] = leaf
    for _ in range(3):
        name, text = record([name] * 5000)
        contents[name] = text
    flat = ObjectTree(object_id=name, children=[ObjectTree(object_id=each) for each in contents if each != name])
    with pytest.raises(ValueError):  # noqa: PT011 - in milliseconds; each by itself would take hours
        arrived(flat, contents)


def test_what_breaks_off_takes_no_room():
    def cut(_):
        connection._check_size(httpx.Response(200, headers={"content-length": "80"}))
        raise httpx.ReadError("cut", request=httpx.Request("POST", "http://127.0.0.1:1"))

    room = connection.ByteLimit(100)
    with connection.limited(room):
        for _ in range(3):
            with pytest.raises(LinkError, match="cut") as caught:
                connection.call(cut, None)
            assert caught.value.again
    room.take(100)
    with pytest.raises(TooLargeError):
        room.take(1)


@pytest.mark.parametrize(
    "headers", [{}, {"content-length": "9", "content-encoding": "gzip"}, {"content-length": "-1"}]
)
def test_an_answer_that_does_not_tell_its_size_is_not_read(headers):
    def unsized(_):
        connection._check_size(httpx.Response(200, headers=headers))

    with pytest.raises(LinkError, match="size"):
        connection.call(unsized, None)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda name, text: b"",
        lambda name, text: text[: len(text) // 2],
        lambda name, text: text.replace(b"Array", b"Thing"),
        lambda name, text: text.replace(b"{", b"["),
        lambda name, text: text.replace(name[:8].encode(), b"00000000"),
        lambda name, text: b"RecordDict  2\0{}",
        lambda name, text: b"Message  1\0\xff",
    ],
)
def test_objects_that_make_no_message_are_a_value_error(pool, spoil):
    message = note(content())
    (tree,), objects = wire.packed([message], pool)
    for name, text in made_bytes(objects).items():
        child = (ObjectTree.FromString(tree.SerializeToString()).children or [tree])[0].object_id
        spoiled = spoil(child, text)
        if spoiled != text:
            try:
                got = arrived(tree, made_bytes(objects) | {name: spoiled})
            except ValueError:
                continue
            assert isinstance(got.content, RecordDict)  # what it spoiled is data, or means nothing


# --- a SuperLink, with TLS and registered nodes -----------------------------------------------------------------


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """An ordinary SuperLink, which starts ServerApps itself where nobody is before it."""
    with Federation(tmp_path_factory.mktemp("federation"), auth=True, isolation="subprocess") as made:
        make(made.keys, nodes=["a", "b", "c"])
        for name in "ab":
            register(at(made), public(made, name))
        yield made


def at(federation):
    return Superlink(federation.address, federation.ca and federation.ca.read_bytes())


def public(federation, name):
    return federation.keys / "nodes" / f"{name}.pub"


def key(federation, name):
    return federation.keys / "nodes" / name


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    for name, text in APP.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def link(federation, app):
    with closing(Link.open(at(federation), app)) as opened:
        yield opened


@contextmanager
def serving(superlink, key, answer):
    """A node, in a thread, that gives `answer(message)` to each message."""
    member, stop = NodeLink.open(superlink, key), threading.Event()

    def serve():
        while not stop.wait(0.02):
            if message := member.receive(most_bytes=ROOM):
                member.answer(message, answer(message))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield member
    finally:
        stop.set()
        thread.join()
        member.close()


def collect(link, waiting, most_bytes=ROOM, seconds=120):
    """All the replies, by node."""
    replies, deadline, waiting = {}, time.monotonic() + seconds, set(waiting)
    while waiting and time.monotonic() < deadline:
        for reply in link.receive(waiting, most_bytes=most_bytes):
            waiting.remove(reply.to)
            replies[reply.node] = reply
        time.sleep(0.02)
    assert not waiting, "no answer"
    return replies


def echo(message):
    return message.content


def test_tensors_go_there_and_back_and_are_uploaded_once(federation, link, monkeypatch):
    uploads = []
    put = link._put
    monkeypatch.setattr(
        link, "_put", lambda session, name, part: (uploads.append(len(part)), put(session, name, part))
    )
    shared = content(50_000)  # 200 kB
    with (
        serving(at(federation), key(federation, "a"), echo) as a,
        serving(at(federation), key(federation, "b"), echo) as b,
    ):
        nodes = {a.node_id, b.node_id}
        assert link.nodes() == nodes
        for _ in range(2):
            sent = link.send(dict.fromkeys(nodes, shared), "train", group="1", ttl=60)
            assert set(sent.values()) == nodes
            replies = collect(link, sent)
            assert set(replies) == nodes
            for reply in replies.values():
                assert reply.error is None
                assert same(values(reply.content), values(shared))
                assert dict(reply.content["config"]) == {"name": "é", "n": 3}
                assert 200_000 < reply.bytes < 210_000
    assert sum(uploads) < 2 * 210_000  # for two sendings to two nodes
    assert link.send({}, "train", group="1", ttl=60) == {}
    assert link.receive([], most_bytes=ROOM) == []


def test_an_error_is_one_line(federation, link):
    with serving(at(federation), key(federation, "a"), lambda message: "no\nmemory") as member:
        sent = link.send({member.node_id: content()}, "evaluate", group="", ttl=60)
        (reply,) = collect(link, sent).values()
    assert reply == (next(iter(sent)), member.node_id, None, "the node's app raised an error: no memory", 0, False)


def test_what_is_too_large_is_not_read(federation, link):
    with serving(at(federation), key(federation, "a"), echo) as member:
        small, large = content(1000), content(ROOM)
        (reply,) = collect(link, link.send({member.node_id: large}, "train", group="", ttl=60)).values()
        assert reply.error == f"the node's app raised an error: the message is too large: more than {ROOM} bytes"
        (reply,) = collect(
            link, link.send({member.node_id: small}, "train", group="", ttl=60), most_bytes=500
        ).values()
        assert (reply.content, reply.error) == (None, "its reply is too large: more than 500 bytes")
        (reply,) = collect(link, link.send({member.node_id: small}, "train", group="", ttl=60)).values()
        assert reply.error is None  # and both go on


def test_who_is_gone_or_late_is_an_error(federation, link):
    with serving(at(federation), key(federation, "a"), echo) as member:
        pass
    (reply,) = collect(link, link.send({member.node_id: content()}, "train", group="", ttl=60)).values()
    assert (reply.node, reply.gone) == (member.node_id, True)
    assert reply.error.startswith("the node is gone")
    with closing(NodeLink.open(at(federation), key(federation, "a"))) as silent:
        (reply,) = collect(link, link.send({silent.node_id: content()}, "train", group="", ttl=0.3)).values()
        assert "expired" in reply.error


def test_a_message_in_an_answer_that_was_cut_off_is_told_to_its_sender(federation, link, monkeypatch):
    """The SuperLink gives it once: the node leaves and joins again, so that it is sent again."""

    def cut(pull, request):
        pull(request)
        raise httpx.ReadError("cut", request=httpx.Request("POST", "https://127.0.0.1:1"))

    with closing(NodeLink.open(at(federation), key(federation, "a"))) as member:
        sent = link.send({member.node_id: content()}, "train", group="", ttl=60)
        with monkeypatch.context() as patch:
            patch.setattr(member._client, "PullMessages", partial(cut, member._client.PullMessages))
            with pytest.raises(LinkError) as caught:
                member.receive(most_bytes=ROOM)
        assert caught.value.again
        with pytest.raises(LinkError, match="cut off, and a message may be lost") as caught:
            member.receive(most_bytes=ROOM)
        assert not caught.value.again
    (reply,) = collect(link, sent).values()
    assert (reply.node, reply.gone) == (member.node_id, True)


def test_a_node_that_could_not_reach_the_superlink_stays(federation, monkeypatch):
    def refuse(request):
        raise httpx.ConnectError("refused", request=httpx.Request("POST", "https://127.0.0.1:1"))

    with closing(NodeLink.open(at(federation), key(federation, "a"))) as member:
        with monkeypatch.context() as patch:
            patch.setattr(member._client, "PullMessages", refuse)
            with pytest.raises(LinkError):
                member.receive(most_bytes=ROOM)
        assert member.receive(most_bytes=ROOM) is None


def test_a_reply_that_nobody_waits_for_is_dropped(federation, link):
    with closing(NodeLink.open(at(federation), key(federation, "a"))) as member:
        (late,) = link.send({member.node_id: content()}, "train", group="", ttl=60)
        message = until(lambda: member.receive(most_bytes=ROOM), "message")
        link.abandon([late])
        assert member.answer(message, content())
        until(lambda: link.receive([], most_bytes=ROOM) == [] and not link._abandoned, "reply")
        (other,) = link.send({member.node_id: content()}, "train", group="", ttl=60)
        assert member.answer(until(lambda: member.receive(most_bytes=ROOM), "message"), content())
        assert collect(link, [other])[member.node_id].error is None


def test_a_node_answers_its_own_messages_once(federation, link):
    """And cannot say, as the SuperLink does, that it is gone, so that it would be asked again."""
    with (
        closing(NodeLink.open(at(federation), key(federation, "a"))) as a,
        closing(NodeLink.open(at(federation), key(federation, "b"))) as b,
    ):
        sent = link.send({a.node_id: content(), b.node_id: content()}, "train", group="", ttl=60)
        mine, theirs = (until(lambda m=m: m.receive(most_bytes=ROOM), "message") for m in (a, b))
        post(a, mine, error=Error(5, "gone"))
        post(a, mine, content(), whole=False)
        post(a, mine, content(), to=theirs.metadata.message_id, whole=False)
        assert b.answer(theirs, content(seed=2))
        replies = collect(link, sent)
        assert replies[a.node_id][2:] == (None, "the node is gone: gone", 0, False)
        assert same(values(replies[b.node_id].content), values(content(seed=2)))


def test_a_superlink_that_repeats_itself_is_heard_once():
    def reply(to, of):
        about = Metadata(1, "", of, 1, to, "", time.time(), 60.0, "train", 3)
        return message_to_proto(make_message(about, error=Error(5, "lost")))

    heard = [("a", 1), ("a", 7), ("late", 7), ("late", 7), ("b", 7), ("unasked", 7)]
    superlink = SimpleNamespace(
        _client=httpx.Client(),
        PullMessages=lambda request: PullAppMessagesResponse(
            messages_list=[reply(*each) for each in heard], message_object_trees=[ObjectTree() for _ in heard]
        ),
        ConfirmMessageReceived=lambda request: None,
    )
    with closing(Link(superlink, 1, 3, ours=False)) as link:
        link.abandon(["late"])
        replies = link.receive(["a", "b"], most_bytes=ROOM)
        assert [(each.to, each.gone) for each in replies] == [("a", True), ("b", False)]
        assert (link._abandoned, link._arriving) == (set(), {})


def test_only_registered_keys_join_and_one_at_a_time(federation, tmp_path):
    superlink = at(federation)
    with pytest.raises(LinkError, match="not registered") as caught:
        NodeLink.open(superlink, key(federation, "c"))
    assert not caught.value.again
    with pytest.raises(LinkError, match="must be registered"):
        NodeLink.open(superlink, None)
    node = register(superlink, public(federation, "c"), "ward c")
    (known,) = [each for each in listed(superlink) if each.node == node]
    assert known[:2] == (node, "registered")
    assert (known.key, known.name) == (public_key_bytes(public(federation, "c")), "ward c")
    with closing(NodeLink.open(superlink, key(federation, "c"))) as member:
        assert member.node_id == node
        (known,) = [each for each in listed(superlink) if each.node == node]
        assert known.status == "online"
        assert (
            timedelta(0) < datetime.fromisoformat(known.online_until) - datetime.now(UTC) <= timedelta(seconds=20)
        )
        with pytest.raises(LinkError, match=r"still counts as connected.*up to \d+ s") as caught:
            NodeLink.open(superlink, key(federation, "c"))
        assert caught.value.again
        unregister(superlink, node)
        assert node not in {each.node for each in listed(superlink)}
        with pytest.raises(LinkError, match="does not know this caller") as caught:
            member.receive(most_bytes=ROOM)
        assert not caught.value.again
    (tmp_path / "key").write_text("secret")
    with pytest.raises(ConfigError, match="not a private key"):
        NodeLink.open(superlink, tmp_path / "key")
    with pytest.raises(ConfigError, match="not an OpenSSH public key"):
        register(superlink, tmp_path / "key")


def test_no_connection_is_one_line_that_says_whether_to_try_again(federation, app):
    other = federation.folder / "other"
    make(other, ["127.0.0.1"])
    address = federation.address
    for superlink, words, again in [
        (Superlink(address, (other / "ca.crt").read_bytes()), "certificate verify failed", False),
        (Superlink(address, b"no PEM"), "certificate authority", False),
        (Superlink(address, None), "speaks TLS: give `ca`", False),
        (Superlink("127.0.0.1:9", at(federation).ca), "refused", True),
    ]:
        for attempt in (lambda at: Link.open(at, app), lambda at: NodeLink.open(at, key(federation, "a")), listed):
            with pytest.raises(LinkError, match=words) as caught:
                attempt(superlink)
            assert "\n" not in str(caught.value)
            assert caught.value.again is again


def test_only_who_drives_a_run_needs_the_superlinks_version(federation, app, monkeypatch):
    local = RuntimeVersionMetadata.from_local_component
    monkeypatch.setattr(
        RuntimeVersionMetadata, "from_local_component", lambda name: local(name, package_version_value="1.43.0")
    )
    assert isinstance(listed(at(federation)), list)
    NodeLink.open(at(federation), key(federation, "a")).close()
    with pytest.raises(LinkError, match=rf"and the SuperLink has {version('flwr')}; .*install") as caught:
        Link.open(at(federation), app)
    assert not caught.value.again


def test_a_run_that_another_process_takes_is_an_error_with_the_way_out(federation, app, monkeypatch):
    with pytest.raises(LinkError, match="not a FAB"):
        Link.open(at(federation), b"zip")
    acquire = driving.RuntimeHttpClient.AcquireTask

    def beaten(client, request):
        acquire(client, request)  # another process asks first
        return acquire(client, request)

    monkeypatch.setattr(driving.RuntimeHttpClient, "AcquireTask", beaten)
    with pytest.raises(LinkError, match="--isolation process"):
        Link.open(at(federation), app)


def test_a_run_that_has_ended_is_an_error_for_both(federation, app):
    with closing(NodeLink.open(at(federation), key(federation, "a"))) as member:
        with closing(Link.open(at(federation), app)) as link:
            link.send({member.node_id: content()}, "train", group="", ttl=60)
            message = until(lambda: member.receive(most_bytes=ROOM), "message")
            with closing(connect(ControlHttpClient, at(federation), "flwr CLI")) as control:  # as `flwr stop` does
                control.StopRun(driving.StopRunRequest(run_id=link.run_id))
            assert not member.answer(message, content())
            for attempt in (link.nodes, link._beat):
                with pytest.raises(LinkError, match="ended this run") as caught:
                    attempt()
                assert not caught.value.again
        link.close("again")  # says nothing new
        with pytest.raises(LinkError, match="closed"):
            link.nodes()
        assert member.receive(most_bytes=ROOM) is None


def test_the_grid_of_a_server_app_is_a_link_too(federation, link, monkeypatch):
    token = link._runtime._client.headers[TASK_TOKEN_HEADER]
    grid = HttpGrid(federation.address, False, at(federation).ca, token=token)
    grid.set_run(Run.create_empty(link.run_id))
    monkeypatch.setattr(TaskIdentity, "_task_id", link._task)
    inside = Link.inside(grid)
    with serving(at(federation), key(federation, "a"), echo) as member:
        assert inside.nodes() == {member.node_id}
        shared = content()
        (reply,) = collect(inside, inside.send({member.node_id: shared}, "query", group="", ttl=60)).values()
        assert same(values(reply.content), values(shared))
    inside.close("nothing that it could fail")
    grid.close()
    assert isinstance(link.nodes(), set)  # its run goes on


class Proxy(ThreadingHTTPServer):
    """A proxy that knows CONNECT: one way into networks with a firewall around them."""

    daemon_threads = True

    def __init__(self):
        self.asked = list[str]()
        super().__init__(("127.0.0.1", 0), ProxyHandler)

    def handle_error(self, request, client_address):
        pass  # the tunnel was closed


class ProxyHandler(BaseHTTPRequestHandler):
    def do_CONNECT(self):
        self.server.asked.append(self.path)
        host, _, port = self.path.rpartition(":")
        if host == "forbidden.example.org":
            self.send_error(403)
            return
        with socket.create_connection((host, int(port))) as there:
            self.send_response(200)
            self.end_headers()
            thread = threading.Thread(target=self.copy, args=(self.connection, there), daemon=True)
            thread.start()
            self.copy(there, self.connection)
            thread.join()

    def copy(self, one, other):
        with suppress(OSError):
            while content := one.recv(2**16):
                other.sendall(content)
            other.shutdown(socket.SHUT_WR)

    def do_POST(self):
        self.send_error(502)

    def log_message(self, *_):
        pass


@contextmanager
def listening(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def no_proxies(monkeypatch):
    for scheme in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{scheme}_proxy", raising=False)
        monkeypatch.delenv(f"{scheme.upper()}_PROXY", raising=False)


@pytest.mark.usefixtures("no_proxies")
@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5h://127.0.0.1:9", "what:ever"])
def test_loopback_is_reached_whatever_proxies_are_set(federation, monkeypatch, proxy):
    for variable in ("http_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, proxy)
    assert isinstance(listed(at(federation)), list)


@pytest.mark.usefixtures("no_proxies")
def test_a_proxy_that_is_the_cause_is_named_without_its_password(federation, monkeypatch):
    secret, lab = "me:secret@127.0.0.1", "lab.example.org:8443"
    with listening(Proxy()) as proxy:
        port = proxy.server_port
        for variable, address, superlink, words in [
            (
                "https_proxy",
                f"http://{secret}:9",
                lab,
                "refused; .*proxy http://127.0.0.1:9 of https_proxy, and",
            ),
            (
                "ALL_PROXY",
                f"http://{secret}:9",
                lab,
                "refused; .*proxy http://127.0.0.1:9 of ALL_PROXY, and",
            ),
            ("https_proxy", f"127.0.0.1:{port}", "forbidden.example.org:8443", "403 .*of https_proxy"),
            ("https_proxy", f"socks5://{secret}:9", lab, "of https_proxy.* SOCKS "),
            ("https_proxy", f"gopher://{secret}:9", lab, "https_proxy: is not the address of a proxy"),
            ("http_proxy", f"http://{secret}:{port}", "lab.example.org:8000", "status 502.*of http_proxy"),
        ]:
            with monkeypatch.context() as patch:
                patch.setenv(variable, address)
                with pytest.raises(LinkError, match=words) as caught:
                    listed(Superlink(superlink, None if variable == "http_proxy" else at(federation).ca))
                assert "secret" not in str(caught.value)
    monkeypatch.setenv("https_proxy", f"http://{secret}:9")
    monkeypatch.setenv("no_proxy", "10.0.0.1,.example.org")
    assert network.proxy_for(httpx.URL("https://lab.example.org:8443")) is None


@pytest.mark.usefixtures("no_proxies")
def test_a_proxy_lets_tls_through(federation, app, monkeypatch):
    """By CONNECT, as companies have them; for once it is asked for loopback, too."""
    monkeypatch.setattr(network, "_is_loopback", lambda host: False)
    with listening(Proxy()) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.server_port}")
        with (
            closing(Link.open(at(federation), app)) as link,
            serving(at(federation), key(federation, "a"), echo) as member,
        ):
            sent = link.send({member.node_id: content(50_000)}, "train", group="", ttl=60)
            assert collect(link, sent)[member.node_id].error is None
        assert {*proxy.asked} == {federation.address}


@pytest.mark.parametrize("ahead", [3600, 7, -3600])
def test_a_node_whose_clock_is_wrong_is_told_by_how_much_and_joins_when_it_is_right(
    federation, monkeypatch, ahead
):
    with monkeypatch.context() as patch:
        patch.setattr(signing, "now", lambda: datetime.now(UTC) + timedelta(seconds=ahead))
        patch.setattr(network.time, "time", lambda real=time.time: real() + ahead)
        with pytest.raises(LinkError) as caught:
            NodeLink.open(at(federation), key(federation, "a"))
    words = re.fullmatch(
        r"this machine's clock is ([\d,]+) s (ahead of|behind) the SuperLink's; nodes sign the time: set it right",
        str(caught.value),
    )
    assert abs(int(words[1].replace(",", "")) - abs(ahead)) <= 2
    assert (words[2] == "behind") == (ahead < 0)
    assert caught.value.again
    NodeLink.open(at(federation), key(federation, "a")).close()


@pytest.mark.parametrize("ahead", [3600, -3600])
def test_messages_live_by_the_superlinks_time(federation, link, monkeypatch, caplog, ahead):
    """Not by the driver's or the node's, which may be wrong."""
    with serving(at(federation), key(federation, "a"), echo) as member:
        monkeypatch.setattr(network.time, "time", lambda real=time.time: real() + ahead)
        assert link.nodes() == {member.node_id}
        (reply,) = collect(link, link.send({member.node_id: content()}, "query", group="", ttl=5)).values()
        assert reply.error is None
    assert f"s {'ahead of' if ahead > 0 else 'behind'} the SuperLink's; messages carry" in caplog.text


def test_only_fast_answers_and_no_errors_tell_the_time(monkeypatch, caplog):
    now = 2e9

    def answer(request):
        nonlocal now
        behind, takes, status = request.extensions["answer"]
        date = formatdate(now - behind, usegmt=True)
        now += takes
        return httpx.Response(status, headers={"date": date})

    def ahead(*answers):
        """By how much the clock corrects this machine's, after each of these answers."""
        with httpx.Client(transport=httpx.MockTransport(answer)) as client:
            clock = network.ServerClock(client)
            for each in answers:
                client.get("http://here", extensions={"answer": each})
                yield now - clock.now()

    monkeypatch.setattr(network, "time", SimpleNamespace(time=lambda: now, monotonic=lambda: now))
    assert [*ahead((0, 30, 200), (3600, 1, 503), (0, 1, 200), (0, 60, 200))] == [0, 0, 0, 0]
    assert not caplog.records
    for hour in (3600, -3600):
        for found in ahead((hour, 1, 200), (hour, 20, 200), (0, 1, 502), (hour, 9, 200)):
            assert abs(found - hour) <= 1
    assert len(caplog.records) == 2


class Stub(BaseHTTPRequestHandler):
    """Answers each call as `server.answer` says."""

    def do_POST(self):
        self.server.asked.append(self.path)
        status, headers, body = self.server.answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_servers_that_are_no_superlink_are_one_line_and_lead_nowhere_else(federation):
    stub = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    stub.asked = []
    address = f"127.0.0.1:{stub.server_port}"
    with listening(stub):
        elsewhere = {"location": f"http://{address}/elsewhere", "content-length": "0"}
        for answer, words, again in [
            ((307, elsewhere, b""), r"refuses: .*\(status 307\)", False),  # with the body, to wherever it says
            ((200, {"content-length": "5"}, b"hello"), "not a SuperLink", False),
            ((503, {}, b"<p>" * 100), r"\(status 503\)", True),  # of unknown size
        ]:
            stub.answer = answer
            with pytest.raises(LinkError, match=words) as caught:
                listed(Superlink(address, None))
            assert caught.value.again is again
        with pytest.raises(LinkError, match="speaks plain HTTP, and no TLS") as caught:
            listed(Superlink(address, at(federation).ca))
        assert not caught.value.again
    assert len(stub.asked) == 3


# --- slow -------------------------------------------------------------------------------------------------------

MEMBER = """
import sys
from pathlib import Path
from fedsim.flower.internals import NodeLink, Superlink
address, ca, key = sys.argv[1:]
member = NodeLink.open(Superlink(address, Path(ca).read_bytes()), Path(key))
while True:
    member.receive(most_bytes=0)
"""


@pytest.mark.slow  # heartbeats lapse after 20 s
def test_a_dead_node_is_noticed_and_its_key_may_come_back(federation, link):
    process = federation.start(
        "dies", sys.executable, "-c", MEMBER, federation.address, federation.ca, key(federation, "b")
    )
    node = until(lambda: next(iter(link.nodes()), None), "node", process=process)
    sent = link.send({node: content(10)}, "train", group="", ttl=600)
    federation.stop(process)
    died = time.monotonic()
    with pytest.raises(LinkError, match="still counts") as caught:
        NodeLink.open(at(federation), key(federation, "b"))
    assert caught.value.again
    (reply,) = collect(link, sent, seconds=30).values()
    assert reply.gone or "too large" in reply.error
    assert time.monotonic() - died < 25

    def back():
        with suppress(LinkError):
            return NodeLink.open(at(federation), key(federation, "b"))

    with closing(until(back, "return", seconds=25)) as member:
        assert member.node_id == node
        assert link.nodes() == {node}


@pytest.mark.slow  # three starts of a SuperLink
@pytest.mark.parametrize("auth", [True, False])
def test_a_superlink_that_restarts_is_waited_for(tmp_path, app, auth):
    with Federation(tmp_path, tls=auth, auth=auth) as federation:
        mine = None
        if auth:
            make(federation.keys, nodes=["a"])
            register(at(federation), public(federation, "a"))
            mine = key(federation, "a")
        with (
            closing(NodeLink.open(at(federation), mine)) as member,
            closing(Link.open(at(federation), app)) as link,
        ):
            assert link.nodes() == {member.node_id}
            federation.stop(federation.superlink)
            for attempt in (lambda: member.receive(most_bytes=ROOM), link.nodes):
                with pytest.raises(LinkError, match="no connection") as caught:
                    attempt()
                assert caught.value.again
            federation.restart_superlink()
            assert until(lambda: member.receive(most_bytes=ROOM) is None, "SuperLink")
            assert link.nodes() == {member.node_id}  # what it knew is in its database
            (sent,) = link.send({member.node_id: content()}, "train", group="", ttl=60)
            message = until(lambda: member.receive(most_bytes=ROOM), "message")
            assert member.answer(message, message.content)
            assert collect(link, [sent])[member.node_id].error is None
            federation.stop(federation.superlink)
            (federation.folder / "superlink.db").unlink()
            federation.restart_superlink()
            for attempt in (lambda: member.receive(most_bytes=ROOM), link.nodes):
                with pytest.raises(LinkError, match=r"no longer|ended this run") as caught:
                    attempt()
                assert not caught.value.again


@pytest.mark.slow  # starts two dozen runs
def test_an_ordinary_superlink_lets_us_drive(federation, app):
    for _ in range(25):
        with closing(Link.open(at(federation), app)) as link:
            link.nodes()
