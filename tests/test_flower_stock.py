"""Flower's own programs run fedsim: `flwr run`, SuperNodes, and strategies of Flower's with fedsim's clients."""

import json
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock, Timeout

pytest.importorskip("flwr")
from flowers import Federation, tail, until
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from fedsim.errors import ConfigError
from fedsim.experiment.build import build
from fedsim.experiment.config import load
from fedsim.experiment.execute import run
from fedsim.flower import wire
from fedsim.flower.app import checked, values_of, write_app
from fedsim.flower.client_app import app
from fedsim.flower.flower_strategies import tell_finished
from fedsim.flower.messages import Answer, Finished, Invitation, Joined, Order
from fedsim.flower.plan import digest, initial_of, plan_of
from fedsim.flower.server_app import begin
from fedsim.flower.shards import write_shards

CONFIG = {
    "seed": 3,
    "rounds": 2,
    "data": {"name": "synthetic", "examples": 60, "test_examples": 30, "classes": 3, "clients": 2, "noise": 0.7},
    "model": {"name": "cnn_bn", "widths": [3, 4]},
    "strategy": "scaffold",
    "cohort": "all",
    "local": {"lr": 0.05, "batch_size": 4},
    "runtime": "serial",
    "hooks": [],
}
EXAMPLE = Path(__file__).parent.parent / "launch" / "flower" / "foreign"
RUN = "0123456789abcdef" * 2


@pytest.fixture(scope="module")
def simulation():
    """What the federations below are compared with, at its start."""
    return build(load(CONFIG | {"strategy": "fedavg"}))


@pytest.fixture(scope="module")
def shards(tmp_path_factory, simulation):
    folder = tmp_path_factory.mktemp("data") / "shards"
    write_shards(simulation.data, folder)
    return folder


def settings(shards, k):
    """Of a node that holds client k's examples, normalised as in the simulation."""
    own = yaml.safe_load((shards / f"{k}.yaml").read_text())["data"]
    return {"data": own | {"path": str(shards / own["path"]), "mean": [0.5], "std": [0.5]}}


def context(path, number=0, **run_config):
    node_config = {"config": str(path), "partition-id": number}
    return Context(
        run_id=1, node_id=7, node_config=node_config, state=RecordDict(), run_config=run_config, series_id=1
    )


@pytest.fixture
def node(shards, tmp_path):
    """Writes the settings of node k, with others besides, and gives their path."""

    def write(k, **others):
        own = settings(shards, k) | {"name": f"node-{k}", "state": str(tmp_path)} | others
        path = tmp_path / f"node-{k}.yaml"
        path.write_text(yaml.safe_dump(own))
        return path

    return write


@pytest.fixture(autouse=True)
def _as_in_a_process_of_flowers(monkeypatch):
    """Where a message may be made."""
    for name, value in (("_run_id", 1), ("_task_id", 1), ("_node_id", 1)):
        monkeypatch.setattr(TaskIdentity, name, value)


def ask(content, kind, about):
    """What the ClientApp answers, in this process."""
    return app(Message(content, dst_node_id=7, message_type=kind), about)


def test_a_client_app_joins_and_works_with_no_memory_but_the_disk(node, simulation):
    plan = plan_of(simulation.config, simulation.data).json_text()
    path, server = node(1), simulation.server
    invitation = Invitation(RUN, plan, initial_of(simulation.task))
    joined = wire.read(Joined, ask(wire.record(invitation), "query", context(path)).content)
    assert (joined.name, joined.error) == ("node-1", None)
    sent = {"model": server["model"], "buffers": server["buffers"]}
    order = Order(RUN, digest(plan), "train", 0, 1, 0, 0, (), "exact", 1, False, sent)
    answers = [ask(wire.record(order), "train", context(path)).content for _ in range(2)]
    first, second = (wire.read(Answer, content) for content in answers)
    assert first.error is None
    assert first.message == second.message
    assert first.examples == len(simulation.data.rows(1))
    ended = Finished(RUN, 0)
    assert wire.read(Finished, ask(wire.record(ended), "query", context(path)).content) == ended
    assert sorted(each.name for each in path.parent.glob(f"node-1/{RUN}/*")) == ["finished", "plan.json"]


def test_what_a_client_app_cannot_do_is_its_answer(node, simulation, tmp_path):
    plan = plan_of(simulation.config, simulation.data).json_text()
    invitation = wire.record(Invitation(RUN, plan, initial_of(simulation.task)))
    refused = ask(invitation, "query", context(tmp_path / "none.yaml"))
    assert "none.yaml" in wire.read(Joined, refused.content).error
    forbidden = ask(invitation, "query", context(node(0, allow={"strategies": ["fedprox"]})))
    assert "strategy.name" in wire.read(Joined, forbidden.content).error
    order = wire.record(Order(RUN, "0" * 64, "train", 0, 1, 0, 0, (), "exact", 1, False, {}))
    assert wire.read(Answer, ask(order, "train", context(node(0))).content).lost
    assert "none.yaml" in wire.read(Answer, ask(order, "train", context(tmp_path / "none.yaml")).content).error
    for kind in ("query", "train", "evaluate"):
        assert ask(RecordDict(), kind, context(node(0), experiment="model: cnn_bn")).has_error()


def test_a_node_needs_no_file(shards, tmp_path, simulation):
    own = settings(shards, 0)["data"]
    config = {"name": "solo", "state": str(tmp_path), "data.name": "npz", "data.path": own["path"]}
    config |= {"data.channels": "first", "data.classes": 3, "num-partitions": 2}
    about = Context(run_id=1, node_id=7, node_config=config, state=RecordDict(), run_config={})
    plan = plan_of(simulation.config, simulation.data).json_text()
    invitation = wire.record(Invitation(RUN, plan, initial_of(simulation.task)))
    joined = wire.read(Joined, ask(invitation, "query", about).content)
    assert (joined.name, joined.error) == ("solo", None)


class Here(Grid):
    """A Flower grid whose nodes are ClientApps in this process."""

    def __init__(self, contexts):
        self.contexts = dict(enumerate(contexts, 1))

    def get_node_ids(self):
        return [*self.contexts]

    def send_and_receive(self, messages, *, timeout=None):
        return [app(message, self.contexts[message.metadata.dst_node_id]) for message in messages]

    set_run = run = create_message = push_messages = pull_messages = None


def test_flowers_fedavg_over_fedsims_clients_is_fedavg(node):
    config = CONFIG | {"strategy": "fedavg"}
    ours = build(load(config))
    start = ArrayRecord(ours.task.state_dict(ours.server))
    contexts = [context(node(k), k, experiment=yaml.safe_dump(config)) for k in range(2)]
    result = FedAvg().start(Here(contexts), start, num_rounds=2, timeout=60)
    for _ in range(2):
        ours.round()
    model = result.arrays.to_torch_state_dict()
    wanted = ours.task.state_dict(ours.server)
    assert model.keys() == wanted.keys()
    for name, value in wanted.items():
        if value.is_floating_point():
            torch.testing.assert_close(model[name], value, rtol=1e-5, atol=1e-6, check_dtype=False)
    assert 0 <= result.evaluate_metrics_clientapp[2]["accuracy"] <= 1


def test_flowers_strategies_take_the_mean_of_a_strategys_own_metrics(node):
    config = yaml.safe_dump(CONFIG | {"strategy": {"name": "test_metrics:Own", "values": [1.0, 4.0]}})
    allow = {"strategies": ["test_metrics:Own"]}
    contexts = [context(node(k, allow=allow), k, experiment=config) for k in range(2)]
    ours = build(load(CONFIG))
    start = ArrayRecord(ours.task.state_dict(ours.server))
    found = FedAvg().start(Here(contexts), start, num_rounds=1, timeout=60).train_metrics_clientapp[1]
    assert found["own"] == pytest.approx(np.average([1.0, 4.0], weights=ours.data.sizes))
    assert found["train_loss"] > 0


def test_a_run_of_a_flower_strategy_tells_its_nodes_that_it_has_ended(node):
    """And no other run: they keep of it what their owners want."""
    config = CONFIG | {"strategy": "fedavg"}
    kept = [node(0), node(1, keep="nothing")]
    grid = Here([context(path, k, experiment=yaml.safe_dump(config)) for k, path in enumerate(kept)])
    start = ArrayRecord((ours := build(load(config))).task.state_dict(ours.server))
    FedAvg().start(grid, start, num_rounds=1, timeout=60)

    def left():
        return [sorted(each.name for each in path.parent.glob(f"{path.stem}/*/*")) for path in kept]

    tell_finished(grid, 2)
    assert left() == [["initial.safetensors", "plan.json"]] * 2
    tell_finished(grid, 1)
    assert left() == [["finished", "plan.json"], []]


@pytest.mark.parametrize(
    ("experiment", "allow", "word"),
    [
        ({"model": {"name": "cnn_bn", "widths": [3, 4]}, "strategy": "scaffold"}, {}, "clients keep states"),
        (
            {"model": {"name": "cnn_bn", "widths": [3, 4]}, "strategy": "median"},
            {},
            "strategy: median needs more than",
        ),
        ({"model": "cnn_bn"}, {"models": ["cnn"]}, "model.name"),
        ({"model": "os:system"}, {}, "model.name"),
        ({"model": "cnn_bn", "local": {"epochs": 2000}}, {}, "local.epochs"),
        ({"model": {"name": "cnn_bn", "widths": [3, 5]}}, {}, "numbers were sent"),
        ({"model": {"name": "cnn_bn", "widths": [3, 2]}}, {}, "arrays"),
        ({"model": {"name": "cnn_bn", "widths": [3, 4]}}, {"max_bytes": 100}, "bytes"),
        ({"rounds": 2}, {}, "model"),
        ({"model": "cnn_bn", "local": {"loss": "nonsense"}}, {}, "local.loss"),
        ({"model": "cnn_bn", "local": {"augment": [{"name": "os:system"}]}}, {}, "local.augment"),
        ({"model": "cnn_bn", "examples": {"classes": 0}}, {}, "examples.classes"),
        ({"model": "cnn_bn", "examples": {"shape": [1]}}, {}, "examples.shape"),
    ],
)
def test_a_node_does_for_flowers_strategies_only_what_it_allows(node, simulation, experiment, allow, word):
    arrays = ArrayRecord(simulation.task.state_dict(simulation.server))
    message = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1})})
    reply = ask(message, "train", context(node(0, allow=allow), experiment=yaml.safe_dump(experiment)))
    assert word in reply.error.reason
    assert "\n" not in reply.error.reason


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"proximal-mu": 0.1}, "config.proximal-mu"),
        ({"server-round": 0}, "server-round"),
        ({"server-round": "1"}, "whole"),
    ],
)
def test_what_a_strategy_asks_besides_is_not_ignored(node, simulation, config, word):
    arrays = ArrayRecord(simulation.task.state_dict(simulation.server))
    message = RecordDict({"arrays": arrays, "config": ConfigRecord(config)})
    reply = ask(message, "train", context(node(0), experiment=yaml.safe_dump(CONFIG | {"strategy": "fedavg"})))
    assert word in reply.error.reason


def test_arrays_are_never_unpickled(node, simulation):
    arrays = ArrayRecord(simulation.task.state_dict(simulation.server))
    evil = np.array([print], dtype=object)
    first = next(iter(arrays))
    arrays[first].data = _saved(evil)
    message = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1})})
    reply = ask(message, "train", context(node(0), experiment=yaml.safe_dump(CONFIG | {"strategy": "fedavg"})))
    assert "arrays: cannot be read" in reply.error.reason


def _saved(array):
    from io import BytesIO

    file = BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def test_an_app_says_what_the_config_says(tmp_path):
    odd = CONFIG | {"runtime": "flower", "data": CONFIG["data"] | {"name": 'a"""\\ \x7f\u00e9\U0001f600\n"'}}
    path = write_app(tmp_path / "app", 'my "run" é', odd)
    written = tomllib.loads(path.read_text())
    assert values_of(written["tool"]["flwr"]["app"]["config"]) == odd
    assert written["project"]["name"] == "my-run"
    assert written["tool"]["flwr"]["app"]["config"]["name"] == 'my "run" é'
    assert all(isinstance(value, str) for value in written["tool"]["flwr"]["app"]["config"].values())
    with pytest.raises(ConfigError, match="--out"):
        write_app(tmp_path / "app", "again", odd)


def test_the_command_writes_an_app_whose_clients_are_nodes(fedsim_, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    done = fedsim_("app", path, "rounds=5", "--out", tmp_path / "app")
    assert done.status == 0, done.err
    config = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    made = checked(values_of(config | {"settings": "local.lr=0.5 'strategy={name: fedprox, mu: 0.1}'"}))
    assert (made.rounds, made.local["lr"], made.strategy["mu"], made.runtime["name"]) == (5, 0.5, 0.1, "flower")
    for settings in (["runtime=serial"], ["strategy.nonsense=1"]):
        failed = fedsim_("app", path, *settings, "--out", tmp_path / "other")
        assert failed.status == 2
        assert failed.err.count("\n") == 1
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"experiment": "rounds: [", "settings": ""}, "experiment"),
        ({"experiment": "- a"}, "experiment"),
        ({"experiment": "rounds: 1", "settings": "rounds"}, "KEY=VALUE"),
        ({"experiment": "rounds: 1", "settings": "rounds='1"}, "settings"),
        ({"experiment": yaml.safe_dump(CONFIG)}, "runtime.name"),
        ({"out": "a", "resume": "b"}, "set only one of them"),
        ({"resume": "/nowhere"}, "no folder of a run"),
    ],
)
def test_a_wrong_app_config_is_one_line(config, word):
    with pytest.raises(ConfigError, match=word) as caught:
        begin(config, build)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def federation(tmp_path_factory, shards):
    """A SuperLink with TLS and registered keys, and two SuperNodes."""
    with Federation(tmp_path_factory.mktemp("flower") / "lab", auth=True, isolation="subprocess") as lab:
        nodes = [lab.node(f"node-{k}", settings(shards, k), stock=True) for k in range(2)]
        for process in nodes:
            until(lambda process=process: "SuperNode ID" in tail(process), "SuperNode", process=process)
        yield lab


@pytest.fixture(scope="module")
def app_folder(tmp_path_factory):
    """An app of the experiment."""
    return write_app(tmp_path_factory.mktemp("app") / "app", "tiny", CONFIG | {"runtime": "flower"}).parent


def flwr_run(federation, folder, *config):
    """`flwr run` to its end: what it printed, and how Flower says it ended."""
    said = federation.flwr("run", folder, "lab", "--stream", *(part for each in config for part in ("-c", each)))
    runs = json.loads(federation.flwr("ls", "lab", "--format", "json"))["runs"]
    return said, max(runs, key=lambda run: run["pending-at"])


def rounds(folder):
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def compared(records):
    return [(r["fingerprint"], r["train_loss"], r["test_accuracy"]) for r in records]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_flwr_run_gives_the_simulations_model_round_by_round(federation, app_folder, tmp_path, strategy):
    said, ended = flwr_run(federation, app_folder, f'settings="strategy={strategy}" out="{tmp_path / "run"}"')
    assert ended["status"] == "finished:completed", said
    assert "round 2/2" in said
    assert compared(rounds(tmp_path / "run")) == compared(run(CONFIG | {"strategy": strategy}).rounds)


@pytest.mark.slow
def test_a_run_that_was_stopped_and_one_whose_superlink_was_killed_go_on(federation, app_folder, tmp_path):
    folder, more = tmp_path / "run", 'settings="rounds=4 checkpoint.every=1"'

    def at(number, config):
        """Begin, and be there after so many rounds; gives Flower's number of the run."""
        said = federation.flwr("run", app_folder, "lab", "-c", config)
        until(lambda: (folder / "rounds.jsonl").exists() and len(rounds(folder)) >= number, "a round", 180)
        return said.split()[-1]

    federation.flwr("stop", at(1, f'{more} out="{folder}"'), "lab")
    until(lambda: free(folder), "the ServerApp to end")
    at(2, f'{more} resume="{folder}"')
    federation.restart_superlink()
    said, ended = flwr_run(federation, app_folder, f'{more} resume="{folder}"')
    assert ended["status"] == "finished:completed", said
    assert compared(rounds(folder)) == compared(run(CONFIG | {"rounds": 4}).rounds)


def free(folder):
    """Whether no process is running it."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            return True
    except Timeout:
        return False


@pytest.mark.slow
def test_a_wrong_setting_fails_the_run_with_one_clear_line(federation, app_folder):
    said, ended = flwr_run(federation, app_folder, 'settings="strategy.nonsense=1"')
    assert ended["status"] == "finished:failed"
    assert "strategy.nonsense" in ended["status-details"]
    assert "strategy.nonsense" in said


@pytest.mark.slow
def test_what_a_node_refuses_is_a_failure_in_flowers_strategies(federation, tmp_path):
    wrong = f'rounds=1 classes=3 out="{tmp_path / "model"}" experiment="model: 2nn"'
    said, _ = flwr_run(federation, EXAMPLE, wrong)
    assert "Received 0 results and 2 failures" in said
    assert "arrays:" in said


@pytest.mark.slow
def test_flowers_fedadam_trains_with_fedsims_nodes(federation, tmp_path):
    shutil.copytree(EXAMPLE, tmp_path / "foreign")
    ended_runs = "*.state/*/*/finished"
    before = {*federation.folder.glob(ended_runs)}
    shape = ",".join(map(str, build(load(CONFIG)).data.shape))
    experiment = "model: {name: cnn_bn, widths: [3, 4]}"
    said, ended = flwr_run(
        federation,
        tmp_path / "foreign",
        f'rounds=2 shape="{shape}" classes=3 out="{tmp_path / "model.safetensors"}" experiment="{experiment}"',
    )
    assert ended["status"] == "finished:completed", said
    assert "Received 2 results and 0 failures" in said
    assert (tmp_path / "model.safetensors").exists()
    assert len({*federation.folder.glob(ended_runs)} - before) == 2
