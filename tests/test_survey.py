"""What comes before and after the training of a round, by the word of a strategy.

An exchange with the cohort (`survey`, `surveyed`, `select`), the server's own training (`info.public`), and the
training of clients' own models (`personalise`).
"""

from dataclasses import dataclass

import pytest
import torch
from conftest import SIZES, make_data, make_simulation, make_strategy, make_task
from torch import nn

from fedsim import ConfigError, Update
from fedsim.errors import ClientError, RoundError
from fedsim.federated.availability import Availability
from fedsim.federated.simulation import Failures
from fedsim.strategies.averaging.fedavg import FedAvg
from fedsim.strategies.averaging.fedsgd import FedSGD
from fedsim.strategies.drift.fedlin import FedLin
from fedsim.strategies.drift.mime import Mime
from fedsim.strategies.robust.fltrust import FLTrust, trusted
from fedsim.training.local import ClientObjective
from fedsim.training.recipe import Distillation, NoisyLabels
from fedsim.training.replica import Replica
from fedsim.types import Job

EQUAL = (6, 6, 6, 6)


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3))


def on_equal_clients(strategy, rounds=3, **recipe):
    """The model (P,) after some rounds, in float64, where all clients have as many examples."""
    task = make_task(mlp, dtype=torch.float64)
    data = make_data(EQUAL, dtype=torch.float64)
    simulation = make_simulation(strategy, task=task, data=data, **recipe)
    for _ in range(rounds):
        simulation.round()
    return simulation.server["model"]


@dataclass(frozen=True, kw_only=True)
class Asks(FedAvg):
    """FedAvg whose survey computes, draws and trains, to no avail."""

    def survey(self, server, client, local):
        x = server["model"]
        local.gradient(x)
        y = local.train(x + torch.randn_like(x) + local.normal(x))
        return Update({"delta": y - x}, weight=local.num_examples)

    def survey_steps(self, num_steps, epoch_steps):
        return num_steps + epoch_steps


@dataclass(frozen=True, kw_only=True)
class Selects(FedAvg):
    """FedAvg of the clients whose id is in `chosen`; the server keeps the mean loss that it asked for."""

    chosen: tuple[int, ...] = (1, 3)

    def init_server(self, model):
        return {"model": model, "loss": model.new_zeros(())}

    def survey(self, server, client, local):
        return Update({"loss": local.loss(server["model"])}, weight=1.0)

    def surveyed(self, server, mean, info):
        return {"loss": mean["loss"]}

    def select(self, server, mean, info):
        assert server["loss"] == mean["loss"]
        return [*self.chosen]


@pytest.mark.parametrize("runtime", ["serial", {"name": "threads", "workers": 3}])
def test_a_survey_does_not_disturb_the_training(runtime):
    """Neither its draws, nor its batch-norm statistics: the same bits as without it."""
    plain, asked = (make_simulation(strategy, runtime=runtime) for strategy in (FedAvg(), Asks()))
    for _ in range(2):
        before, after = plain.round(), asked.round()
        assert (after.fingerprint, after.train_loss) == (before.fingerprint, before.train_loss)
        assert after.steps > 2 * before.steps


def test_those_who_are_selected_train():
    simulation, other = (
        make_simulation(Selects()),
        make_simulation(FedAvg(), cohort={"name": "fixed", "clients": [1, 3]}),
    )
    done, expected = simulation.round(), other.round()
    assert (done.fingerprint, done.train_loss) == (expected.fingerprint, expected.train_loss)
    assert done.cohort == [0, 1, 2, 3, 4, 5]
    assert done.absent == dict.fromkeys("0245", "not selected after the survey")
    sent = sum(value.nbytes for name, value in simulation.server.items() if name in ("model", "buffers"))
    assert done.bytes_down == (6 + 2) * sent
    assert done.bytes_up == 6 * 4 + expected.bytes_up
    losses = [simulation.server["loss"]]
    assert 0 < losses[0] < 10


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ((), "gave \\[\\]"),
        ((1, 1), "an id occurs twice"),
        ((9,), "ids from 0 to 5"),
        ((0, 2), "client 2, which has not"),
    ],
)
def test_a_selection_that_cannot_be_ends_the_round(chosen, message):
    cohort = {"name": "fixed", "clients": [0, 1]}
    with pytest.raises(RoundError, match=rf"^round 1: Selects\.select: .*{message}"):
        make_simulation(Selects(chosen=chosen), cohort=cohort).round()


def test_too_few_who_are_selected_end_the_round():
    failures = Failures(min_clients=3)
    with pytest.raises(RoundError, match=r"^round 1: 2 clients were selected, and failures\.min_clients is 3"):
        make_simulation(Selects(), failures=failures).round()


@dataclass(frozen=True, kw_only=True)
class Fails(Asks):
    """Whose client 2 fails in the survey, or gives what it should not."""

    how: str = "raise"

    def survey(self, server, client, local):
        if local.client_id != 2:
            return super().survey(server, client, local)
        if self.how == "raise":
            raise OSError("no sensor")
        if self.how == "nan":
            return Update({"delta": server["model"] * torch.nan}, 1.0)
        if self.how == "state":
            return Update({"delta": server["model"]}, 1.0, client={"e": server["model"]})
        server["model"].add_(1)
        return super().survey(server, client, local)


@pytest.mark.parametrize("how", ["raise", "nan", "state"])
def test_who_fails_in_the_survey_does_not_train(how):
    others = {"name": "fixed", "clients": [0, 1, 3, 4, 5]}
    dropped = make_simulation(Fails(how=how), failures=Failures(policy="drop")).round()
    expected = make_simulation(FedAvg(), cohort=others).round()
    assert dropped.fingerprint == expected.fingerprint
    assert [*dropped.failed] == ["2"]
    with pytest.raises(ClientError, match=r"^round 1, client 2: "):
        make_simulation(Fails(how=how)).round()


def test_a_survey_that_writes_to_the_servers_state_ends_the_round():
    with pytest.raises(RoundError, match=r"wrote server\['model'\]"):
        make_simulation(Fails(how="write"), failures=Failures(policy="drop")).round()


def test_more_steps_than_a_survey_declares_end_the_round():
    @dataclass(frozen=True, kw_only=True)
    class Undeclared(Asks):
        def survey_steps(self, num_steps, epoch_steps):
            return 0

    with pytest.raises(RoundError, match=r"Undeclared\.survey: gave the steps .* override survey_steps"):
        make_simulation(Undeclared()).round()


def test_the_virtual_clock_counts_a_survey():
    data = make_data()
    clocks = []
    for strategy in (FedAvg(), Asks()):
        simulation = make_simulation(strategy, data=data)
        simulation.availability = Availability(step_seconds=1.0)
        clocks.append(simulation.round().clock)
    assert clocks == [4, 4 + 4 + 4]  # of the client of 13 examples: one epoch, and in the survey two more


# Algorithms that survey


def test_mime_of_full_batches_without_momentum_is_fedlin():
    recipe = {"batch_size": "full", "epochs": 4, "lr": 0.2}
    assert torch.allclose(
        on_equal_clients(Mime(beta=0.0), **recipe), on_equal_clients(FedLin(), **recipe), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("strategy", [Mime(beta=0.0), FedLin()])
def test_one_step_of_the_full_batch_is_fedsgd(strategy):
    recipe = {"batch_size": "full", "epochs": 1, "lr": 0.2}
    expected = on_equal_clients(FedSGD(), **recipe)
    assert torch.allclose(on_equal_clients(strategy, **recipe), expected, rtol=0, atol=1e-12)


def test_fedlin_goes_where_the_mean_gradient_vanishes():
    """FedAvg with many local steps does not: its fixed point is another one."""

    def linear():
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))

    task, data = make_task(linear, dtype=torch.float64), make_data(EQUAL, dtype=torch.float64)
    norms = []
    for strategy in (FedLin(), FedAvg()):
        recipe = {"batch_size": "full", "epochs": 10, "lr": 0.2, "weight_decay": 0.1}
        simulation = make_simulation(strategy, task=task, data=data, **recipe)
        for _ in range(80):
            simulation.round()
        w = simulation.server["model"].requires_grad_()
        x, y = data.batch(torch.arange(sum(EQUAL)))
        loss = nn.functional.cross_entropy(torch.func.functional_call(task.network, task.layout.split(w), x), y)
        norms.append((torch.autograd.grad(loss, w)[0] + 0.1 * w.detach()).norm().item())
    assert norms[0] < 1e-6 < 1e-3 < norms[1], norms


def test_mime_is_its_algorithm():
    """Two rounds by hand, on clients whose batches are all their examples."""
    beta, lr, steps = 0.9, 0.1, 3
    task, data = make_task(mlp, dtype=torch.float64), make_data(EQUAL, dtype=torch.float64)

    def gradient(w, client):
        w = w.detach().clone().requires_grad_()
        x, y = data.batch(torch.from_numpy(data.rows(client)))
        output = torch.func.functional_call(task.network, task.layout.split(w), x)
        return torch.autograd.grad(nn.functional.cross_entropy(output, y), w)[0]

    x, s = task.initial_model.clone(), torch.zeros_like(task.initial_model)
    for _ in range(2):
        own, ends = [gradient(x, k) for k in range(4)], []
        c = sum(own) / 4
        for k in range(4):
            y = x.clone()
            for _ in range(steps):
                y -= lr * ((1 - beta) * (gradient(y, k) - own[k] + c) + beta * s)
            ends.append(y)
        x, s = sum(ends) / 4, (1 - beta) * c + beta * s
    made = on_equal_clients(Mime(beta=beta), rounds=2, batch_size="full", epochs=steps, lr=lr)
    assert torch.allclose(made, x, rtol=0, atol=1e-12)


def test_one_client_alone_is_corrected_by_nothing():
    """Also with dropout and batch norm: the gradients of the survey and of the training have the same masks."""
    models = []
    for each in (FedLin(), FedAvg()):
        simulation = make_simulation(
            each, task=make_task(dtype=torch.float64), data=make_data((9,), dtype=torch.float64), batch_size="full"
        )
        simulation.round()
        models.append(simulation.server["model"])
    assert torch.allclose(*models, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "recipe", "at"),
    [
        ("mime", {"momentum": 0.9}, "momentum"),
        ("mime", {"precision": "fp16"}, "precision"),
        ("fedlin", {"precision": "fp16"}, "precision"),
        ("mime", {"distillation": Distillation()}, "distillation"),
        ("mime", {"noisy_labels": NoisyLabels()}, "noisy_labels"),
    ],
)
def test_settings_that_a_correction_cannot_have_are_refused(name, recipe, at):
    with pytest.raises(ConfigError, match=rf"^local\.{at}: {name}:? "):
        make_simulation(name, **recipe)


@pytest.mark.parametrize(
    ("inner", "why"),
    [
        ("fedlin", "surveys the global model"),
        (f"{__name__}:Asks", "surveys the global model"),
        ("fltrust", "trains the global model on the server"),
        ("words:Groups", "trains several global models"),
    ],
)
def test_personal_layers_are_not_around_what_needs_the_whole_global_model(inner, why):
    with pytest.raises(ConfigError, match=rf"^strategy\.inner: \w+ {why}"):
        make_simulation(make_strategy("personal", inner=inner))


def test_a_selection_without_a_survey_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class Silent(FedAvg):
        def select(self, server, mean, info):
            return [0]

    with pytest.raises(ConfigError, match="Silent defines select, and no survey"):
        make_simulation(Silent())


def test_answers_to_a_survey_do_not_touch_statistics():
    @dataclass(frozen=True, kw_only=True)
    class Sly(FedAvg):
        def survey(self, server, client, local):
            return Update({"buffers": local.buffers + 7}, 1.0)

    with pytest.raises(ClientError, match=r"Sly\.survey: gave 'buffers', which is a reserved name"):
        make_simulation(Sly()).round()


# The server's own examples


def test_fltrust_is_its_rule():
    """Equation 4 of the paper, on vectors whose cosines are known."""
    own = torch.tensor([2.0, 0.0], dtype=torch.float64)
    updates = torch.tensor([[3.0, 0.0], [-5.0, 0.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    half = 0.5**0.5  # the cosine of the third, whose length becomes 2
    expected = torch.tensor([2 + half * 2 * half, half * 2 * half], dtype=torch.float64) / (1 + half)
    assert torch.allclose(trusted(updates, own), expected, rtol=1e-12)
    assert not trusted(-updates[:1], own).any()
    assert not trusted(updates, torch.zeros_like(own)).any()
    tiny = torch.tensor([[1e-44, 0.0], [1.0, 0.0]])  # its share is too large for float32
    assert torch.allclose(trusted(tiny, own.float()), own.float(), rtol=1e-3)


def test_the_server_trains_on_its_own_examples():
    """With one client, whose update is only scaled: by hand."""
    data = make_data((9,), public=6)
    simulation = make_simulation("fltrust", data=data)
    x, reports = simulation.server["model"].clone(), []
    job = Job(1, 0, None)  # client N is the server
    local = ClientObjective(Replica(simulation.task), data, job, simulation.server["buffers"], simulation.recipe)
    assert int(local.num_examples) == 6
    simulation.round(reports.append)
    own = ClientObjective(
        Replica(simulation.task), data, job, simulation.task.initial_buffers, simulation.recipe, path=("public",)
    )
    length = (own.train(x) - x).norm()
    assert torch.allclose((simulation.server["model"] - x).norm(), length, rtol=1e-5)


def test_without_examples_of_its_own_the_start_is_refused():
    with pytest.raises(ConfigError, match=r"^data\.public: FLTrust needs examples of the server's own"):
        make_simulation("fltrust", data=make_data())


def test_an_error_of_the_servers_half_names_it():
    @dataclass(frozen=True, kw_only=True)
    class Wrong(FLTrust):
        def server_update(self, server, rows, info):
            return {"model": info.public.train(server["model"])[:3]}

    with pytest.raises(RoundError, match=r"^round 1: Wrong\.server_update: gave model float32 \(3,\)"):
        make_simulation(Wrong()).round()


def test_a_hostile_majority_moves_fltrust_by_no_more_than_its_own_length():
    @dataclass(frozen=True, kw_only=True)
    class Hostile(FLTrust):
        def client_update(self, server, client, local):
            update = super().client_update(server, client, local)
            factor = torch.where(torch.as_tensor(local.client_id) < 4, -1e6, 1.0)
            return update._replace(message={"delta": update.message["delta"] * factor})

    honest, hostile = make_simulation(FLTrust(), lr=0.01), make_simulation(Hostile(), lr=0.01)
    x = honest.server["model"].clone()
    honest.round(), hostile.round()
    assert (hostile.server["model"] - x).norm() < 3 * (honest.server["model"] - x).norm()


# A model of one's own that is trained for the evaluation


@dataclass(frozen=True, kw_only=True)
class Tuned(FedAvg):
    """FedAvg, whose clients train before they evaluate."""

    epochs: int = 3

    def personalise(self, server, client, local):
        tuned = local.separate("tuned", epochs=self.epochs)
        return tuned.train(server["model"]), tuned.buffers


@pytest.mark.parametrize("runtime", ["serial", {"name": "threads", "workers": 3}])
def test_a_client_may_train_the_model_that_it_evaluates(runtime):
    plain, tuned = (make_simulation(strategy, runtime=runtime, lr=0.1) for strategy in (FedAvg(), Tuned()))
    assert (plain.round().fingerprint, plain.round().fingerprint) == (
        tuned.round().fingerprint,
        tuned.round().fingerprint,
    )
    before, after = plain.evaluate_clients(), tuned.evaluate_clients()
    assert sum(each.loss for each in after.values()) < sum(each.loss for each in before.values())
    assert tuned.evaluate_clients() == after
    reference = make_simulation(Tuned(), lr=0.1)
    reference.round(), reference.round()
    assert reference.evaluate_clients() == after
    assert plain.fingerprint() == tuned.fingerprint()


def test_before_the_first_round_too():
    assert len(make_simulation(Tuned()).evaluate_clients()) == len(SIZES)


def test_clients_with_personal_layers_are_chosen_by_the_losses_of_their_own_models():
    """Not by those of the global one, whose last layers never train."""
    strategy = make_strategy("personal", layers=["fc*"], inner={"name": "power_of_choice", "size": 2})
    simulation = make_simulation(strategy)
    for _ in range(3):
        simulation.round()
    own = {k: each.loss for k, each in simulation.evaluate_clients().items()}
    done = simulation.round()
    trained = [client for client in done.cohort if str(client) not in done.absent]
    assert set(trained) == {*sorted(own, key=lambda k: -own[k])[:2]}


def test_personal_layers_are_not_around_such_a_strategy():
    with pytest.raises(ConfigError, match=r"strategy\.inner: Tuned has personal models of its own"):
        make_simulation(make_strategy("personal", inner=f"{__name__}:Tuned"))
