"""Clients that are kept out of training, and evaluate their own models when the run has ended."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from lab import CONFIG as LAB
from small_run import CONFIG, left
from torch.nn import functional as F

import fedsim
from fedsim import ConfigError
from fedsim.data import FederatedData
from fedsim.experiment.build import build, build_data, build_dataset, build_server_data
from fedsim.experiment.config import load, num_new_clients
from fedsim.experiment.execute import execute
from fedsim.experiment.start import resumed_run
from fedsim.strategies.averaging.fedavg import FedAvg

DATA = CONFIG["data"] | {"holdout": 0.0}
SETTINGS = CONFIG | {"data": DATA, "strategy": "fedavg", "rounds": 2, "hooks": []}
NEW = {"evaluate": {"every": 2, "new_clients": 0.4}}  # 2 of 5


def others_alone(config):
    """The same run of the training clients, in whose data the others are not."""
    data, dataset = build_data(config), build_dataset(config)
    new = data.owners < -1
    alone = FederatedData(dataset, data.owners[~new], clients=data.num_clients, public=new, seed=config.seed)
    return build(config, alone)


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "afl", "feddyn"])
def test_the_others_train_as_if_new_clients_were_not_there(strategy):
    cohort = "all" if strategy == "afl" else {"name": "uniform", "fraction": 0.7}
    config = load(SETTINGS | NEW | {"strategy": strategy, "cohort": cohort})
    simulation, alone = build(config), others_alone(config)
    assert simulation.data.num_clients == 3
    for _ in range(2):
        assert simulation.round()._replace(seconds=0) == alone.round()._replace(seconds=0)
    assert simulation.federation.num_clients == len(simulation.federation.sizes) == 3


def test_the_servers_own_examples_are_still_its_own():
    config = load(SETTINGS | NEW | {"strategy": "fltrust", "data": DATA | {"public": 0.2}})
    simulation = build(config)
    data = simulation.data
    assert len(data.public) == 12
    parts = [data.rows(k) for k in range(5)] + [data.public]
    assert sorted(np.concatenate(parts).tolist()) == list(range(60))
    simulation.round()


def test_their_numbers_are_those_of_the_global_model_on_their_examples(tmp_path):
    result = fedsim.run(SETTINGS | NEW, out=tmp_path / "run")
    simulation = build(load(SETTINGS | NEW))
    for _ in range(2):
        simulation.round()
    task, server, data, accuracies, losses = simulation.task, simulation.server, simulation.data, [], []
    network = task.network.eval()
    weights = task.layout.split(server["model"]) | task.buffer_layout.split(server["buffers"])
    for k in (3, 4):
        x, y = data.batch(torch.from_numpy(data.rows(k)))
        logits = torch.func.functional_call(network, weights, x)
        accuracies.append((logits.argmax(1) == y).double().mean().item())
        losses.append(F.cross_entropy(logits, y).item())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary == result.summary
    assert summary["new_clients"] == 2
    assert summary["new_clients_failed"] == {}
    assert summary["new_client_accuracy_mean"] == pytest.approx(np.mean(accuracies))
    assert summary["new_client_accuracy_worst_decile"] == pytest.approx(min(accuracies))
    assert summary["new_client_loss_mean"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_new_clients_train_a_model_of_their_own_from_the_initial_state():
    plain = fedsim.run(SETTINGS | NEW).summary
    tuned = fedsim.run(SETTINGS | NEW | {"strategy": {"name": "finetune", "inner": "fedavg"}}).summary
    assert tuned["fingerprint"] == plain["fingerprint"]
    assert tuned["new_client_loss_mean"] < plain["new_client_loss_mean"]


def test_a_run_that_stopped_ends_with_the_same_numbers_and_is_whole(tmp_path, fedsim_):
    settings = CONFIG | {"evaluate": {"every": 2, "new_clients": 0.2}}
    fedsim.run(settings, out=tmp_path / "whole")
    fedsim.run(settings | {"rounds": 2}, out=tmp_path / "stopped")
    execute(*resumed_run(tmp_path / "stopped", {"rounds": 4}))
    assert left(tmp_path / "stopped") == left(tmp_path / "whole")
    checked = fedsim_("check", tmp_path / "whole")
    assert checked.status == 0, checked.out + checked.err


def test_another_share_is_another_training_and_not_accepted_by_a_resume(tmp_path):
    fedsim.run(SETTINGS | NEW, out=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"evaluate\.new_clients: 0\.2, and was 0\.4.*this changes the result"):
        resumed_run(tmp_path / "run", {"rounds": 3, "evaluate.new_clients": 0.2})
    run, _ = resumed_run(tmp_path / "run", {"rounds": 3, "evaluate.every": 1})
    run.folder.close()


def test_who_is_new_depends_on_the_seed_of_the_partition_alone():
    def owners(**settings):
        return build_data(load(SETTINGS | NEW | settings)).owners.tolist()

    kept = [owners(seed=seed, data=DATA | {"partition_seed": 5}) for seed in (1, 2)]
    assert kept[0] == kept[1]
    assert len({tuple(owners(seed=seed)) for seed in range(4)}) == 4


@pytest.mark.parametrize(("share", "clients", "expected"), [(0.1, 5, 1), (0.99, 5, 4), (0.5, 2, 1), (0, 5, 0)])
def test_at_least_one_is_new_and_one_is_left(share, clients, expected):
    config = load(SETTINGS | {"data": DATA | {"clients": clients}, "evaluate": {"new_clients": share}})
    assert num_new_clients(config) == expected == len(build_data(config).new_clients)


def test_what_cannot_be_is_refused_in_a_line():
    with pytest.raises(ConfigError, match=r"^evaluate\.new_clients: of 1 client none can be kept"):
        build(load(SETTINGS | NEW | {"data": DATA | {"clients": 1}, "cohort": "all"}))
    with pytest.raises(ConfigError, match=r"^evaluate\.new_clients: 1 should be"):
        load(SETTINGS | {"evaluate": {"new_clients": 1}})
    with pytest.raises(ConfigError, match=r"^evaluate\.new_clients: nodes join by themselves"):
        build_server_data(load(LAB | NEW))


def test_the_partition_shows_those_who_train(tmp_path, monkeypatch, fedsim_):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.json").write_text(json.dumps(SETTINGS | NEW))
    shown = fedsim_("partition", "c.json")
    assert shown.status == 0, shown.err
    assert "3 clients, 36 examples" in shown.out
    assert "new clients: 2 more, with 24 examples" in shown.out


@dataclass(frozen=True, kw_only=True)
class OfEach(FedAvg):
    """Has something for each client of the training."""

    def init_server(self, model, federation):
        return {"model": model, "own": model.new_zeros(federation.num_clients)}

    def download(self, server, client_id):
        return {"model": server["model"], "own": server["own"][client_id]}


def test_what_new_clients_cannot_download_is_refused_at_the_start():
    config = CONFIG | {"strategy": {"name": f"{__name__}:OfEach"}, "evaluate": {"new_clients": 0.4}}
    with pytest.raises(ConfigError, match=r"^evaluate\.new_clients: OfEach\.download for client \d: IndexError"):
        build(load(config))
