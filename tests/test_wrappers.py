"""Wrappers see all that leaves a client, keep their states apart, and refuse what they cannot change."""

from contextlib import closing, contextmanager
from dataclasses import dataclass

import pytest
import torch
from conftest import _digests, close, make_simulation, make_strategy, make_task, trace, trace_on_ray
from lab import CONFIG as LAB
from lab import Lab, dropping
from small_run import CONFIG as SMALL
from test_vectorized import pair

import fedsim
from fedsim import CHANGE, ClientError, ConfigError, Entry, RoundError, Update, Wrapper, check_changes
from fedsim.experiment.build import build
from fedsim.experiment.config import load
from fedsim.federated.message import zero_message
from fedsim.federated.simulation import Failures
from fedsim.flower import wire
from fedsim.flower.messages import Answer
from fedsim.flower.transport import decode, encode
from fedsim.strategies import CATALOGUE
from fedsim.strategies.averaging.fedavg import FedAvg
from fedsim.strategies.drift.fedprox import FedProx
from fedsim.strategies.personal.personal import Personal
from fedsim.types import form_of


def double():
    return make_task(dtype=torch.float64)


# Two wrappers


@dataclass(frozen=True, kw_only=True)
class Clip(Wrapper):
    """All that a client sends, statistics included, scaled to a norm of at most `norm`."""

    norm: float

    buffers_as_changes = True

    def check(self, recipe, layout):
        check_changes(self.inner, "clip")
        super().check(recipe, layout)

    def outgoing(self, server, client, update, local):
        update = super().outgoing(server, client, update, local)
        norm = sum(value.double().square().sum() for value in update.message.values()).sqrt()
        factor = (self.norm / norm).clamp(max=1)
        return update._replace(message={n: (factor * v).to(v.dtype) for n, v in update.message.items()})


@dataclass(frozen=True, kw_only=True)
class TopK(Wrapper):
    """The `share` of the largest entries, of what is to be sent and what was left over."""

    share: float

    def check(self, recipe, layout):
        check_changes(self.inner, "topk")
        super().check(recipe, layout)

    def init_client(self, model, layout):
        left = {self.entry(name): torch.zeros_like(model) for name in self.sends}
        return super().init_client(model, layout) | left

    def outgoing(self, server, client, update, local):
        update = super().outgoing(server, client, update, local)
        sent, left = dict(update.message), {}
        for name in self.sends:
            whole = update.message[name] + client[self.entry(name)]
            largest = whole.abs().topk(max(1, int(self.share * len(whole)))).indices
            sent[name] = whole * torch.zeros_like(whole).scatter(0, largest, 1.0)
            left[self.entry(name)] = whole - sent[name]
        return update._replace(message=sent, client=update.client | left)


@dataclass(frozen=True, kw_only=True)
class Noisy(Wrapper):
    """Noise on all that a client sends; its loss stays at home."""

    deviation: float = 0.01

    buffers_as_changes = True

    def outgoing(self, server, client, update, local):
        update = super().outgoing(server, client, update, local)
        told = {name: value for name, value in update.metrics.items() if name == "steps"}
        sent = {name: v + self.deviation * local.normal(v) for name, v in update.message.items()}
        return update._replace(message=sent, weight=1.0, metrics=told)


NEST = Noisy(inner=Clip(norm=0.05, inner=TopK(share=0.3, inner=TopK(share=0.6, inner=FedAvg()))))
SOME = {"cohort": {"name": "uniform", "size": 4}}


def test_clipping_moves_model_and_statistics_by_no_more():
    simulation = make_simulation(Clip(inner=FedAvg(), norm=1e-6), task=double(), lr=1.0)
    before = simulation.server
    simulation.round()
    moved = torch.cat([simulation.server[name] - before[name] for name in ("model", "buffers")])
    assert 0 < moved.norm() <= 1e-6 * (1 + 1e-9)
    assert (simulation.server["buffers"] != before["buffers"]).any()


def test_clipping_to_more_than_there_is_changes_no_model():
    plain, clipped = (make_simulation(s, task=double()) for s in (FedAvg(), Clip(inner=FedAvg(), norm=1e9)))
    for _ in range(3):
        plain.round()
        clipped.round()
        close(clipped.server, plain.server)


def test_the_top_of_everything_is_everything():
    plain, top = (make_simulation(strategy, **SOME) for strategy in (FedAvg(), TopK(inner=FedAvg(), share=1.0)))
    assert [top.round().fingerprint for _ in range(3)] == [plain.round().fingerprint for _ in range(3)]


def test_nested_wrappers_of_one_kind_keep_their_states_apart():
    alone = {"name": "fixed", "clients": [2]}
    plain = make_simulation(FedAvg(), task=double(), cohort=alone)
    x = plain.server["model"]
    plain.round()
    delta = plain.server["model"] - x

    def top(v, share):
        return v * torch.zeros_like(v).scatter(0, v.abs().topk(int(share * len(v))).indices, 1.0)

    nested = TopK(share=0.25, inner=TopK(share=0.5, inner=FedAvg()))
    simulation = make_simulation(nested, task=double(), cohort=alone)
    simulation.round()
    first, kept = top(delta, 0.5), simulation.clients[2]
    close(kept[nested.inner.entry("delta")], delta - first)
    close(kept[nested.entry("delta")], first - top(first, 0.25))
    close(simulation.server["model"] - x, top(first, 0.25))
    assert len(kept) == 2


# Every runtime


@pytest.fixture(scope="module")
def expected():
    return trace(make_simulation(NEST, **SOME))


def test_a_nest_gives_one_digest_on_threads(expected):
    assert trace(make_simulation(NEST, runtime={"name": "threads", "workers": 3}, **SOME)) == expected
    assert [(record["train_loss"], record["steps"] > 0) for record in expected] == [(None, True)] * 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ray's, about its own processes
def test_a_nest_gives_one_digest_on_ray(expected):
    assert trace_on_ray(NEST, **SOME) == expected


@pytest.mark.parametrize("strategy", [NEST.inner, NEST], ids=["told", "withheld"])
def test_a_nest_agrees_in_a_batch_of_clients(strategy):
    for one, other in zip(*(_states(each) for each in pair(strategy)), strict=True):
        close(other, one)


def _states(simulation, rounds=2):
    for _ in range(rounds):
        done = simulation.round()
        yield [simulation.server, dict(simulation.clients.items()), done.train_loss or 0.0, done.steps]


def on_nodes(folder, monkeypatch, config, *names, **options):
    """A lab whose nodes allow these strategies, and a simulation on them."""
    lab = Lab(folder, monkeypatch)
    for node in lab.nodes.values():
        allow = node.settings.allow.model_copy(update={"strategies": [*names]})
        node.settings = node.settings.model_copy(update={"allow": allow})
    return lab, lab.simulation(config, **options)


def nest_config():
    names = [f"test_wrappers:{name}" for name in ("Noisy", "Clip", "TopK", "TopK")]
    options = [{}, {"norm": 0.05}, {"share": 0.3}, {"share": 0.6}]
    spec = "fedavg"
    for name, option in reversed([*zip(names, options, strict=True)]):
        spec = {"name": name, "inner": spec} | option
    return load(LAB | {"strategy": spec, "rounds": 2}), (*names, "fedavg")


def test_a_nest_gives_one_digest_on_nodes(tmp_path, monkeypatch):
    config, names = nest_config()
    lab, simulation = on_nodes(tmp_path, monkeypatch, config, *names)
    with closing(lab):
        found = [_told(simulation) for _ in range(2)]
    serial = build(config)
    assert found == [_told(serial) for _ in range(2)]


def _told(simulation):
    done = simulation.round()
    return done.train_loss, done.steps, _digests(simulation.server)


# What outgoing may do


def outgoing(change, name="Odd", base=Wrapper, **more):
    """A wrapper around FedAvg whose `outgoing` is `change(update, local)`."""

    def own(self, server, client, update, local):
        return change(update, local)

    kind = type(name, (base,), {"outgoing": own, "__module__": __name__} | more)
    return dataclass(frozen=True, kw_only=True)(kind)(inner=FedAvg())


def test_nothing_needs_to_be_told():
    silent = make_simulation(outgoing(lambda update, local: update._replace(metrics={})), **SOME)
    plain = make_simulation(FedAvg(), **SOME)
    for _ in range(2):
        done, told = silent.round(), plain.round()
        assert (done.train_loss, done.steps) == (None, 0)
        assert done.fingerprint == told.fingerprint


def test_a_loss_without_its_examples_is_no_mean():
    def half(update, local):
        return update._replace(metrics={n: v for n, v in update.metrics.items() if n != "examples"})

    assert make_simulation(outgoing(half)).round().train_loss is None


def test_weights_may_be_equal():
    equal = make_simulation(outgoing(lambda update, local: update._replace(weight=1.0)), task=double())
    other = make_simulation(make_strategy("fedopt", optimizer="sgd", server_lr=1.0), task=double())
    for _ in range(2):
        equal.round()
        other.round()
        close(equal.server["model"], other.server["model"])


WRONG = {
    "no update": (lambda u, local: u.message, r"Odd.outgoing: gave dict; it should give fedsim.Update"),
    "a metric": (
        lambda u, local: u._replace(metrics=u.metrics | {"more": torch.ones(())}),
        r"Odd.outgoing: gave the metrics 'more', which neither the update has nor",
    ),
    "a vector": (
        lambda u, local: u._replace(metrics={"loss": torch.ones(2)}),
        r"Odd.outgoing: gave the metric loss, which is not one number",
    ),
    "a loss": (
        lambda u, local: u._replace(metrics=u.metrics | {"loss": torch.tensor(torch.inf)}),
        "loss is not finite",
    ),
    "steps": (
        lambda u, local: u._replace(metrics=u.metrics | {"steps": u.metrics["steps"] + 0.5}),
        r"gave the steps .*; it should be a whole number",
    ),
    "a weight": (lambda u, local: u._replace(weight=1e9), r"gave the weight 1000000000; .*override max_weight"),
    "a state": (
        lambda u, local: u._replace(client={"e": torch.ones(1)}),
        r"its state is e float32 \(1,\), and was ",
    ),
    "infinity": (lambda u, local: u._replace(message={n: v / 0 for n, v in u.message.items()}), "is not finite"),
    "an entry": (
        lambda u, local: u._replace(message=u.message | {"more": torch.ones(1)}),
        r"Odd.sends: a client sent .*, more float32 \(1,\); declared is buffers float32 \(\d+,\), delta float32",
    ),
    "no statistics": (
        lambda u, local: u._replace(message={"delta": u.message["delta"]}),
        r"Odd.sends: a client sent delta float32 \(\d+,\); declared is buffers float32",
    ),
    "a training": (
        lambda u, local: (local.train(u.message["delta"]), u)[1],
        r"Odd.outgoing: trains, after the training",
    ),
}


@pytest.mark.parametrize("change", WRONG)
def test_what_leaves_a_client_is_checked(change):
    make, said = WRONG[change]
    with pytest.raises((ClientError, RoundError), match=said) as error:
        make_simulation(outgoing(make)).round()
    assert "\n" not in str(error.value)


def test_an_inner_wrapper_that_gives_no_update_is_named():
    odd = outgoing(lambda update, local: None, "Inner")
    with pytest.raises(ClientError, match=r"Inner.outgoing: gave NoneType"):
        make_simulation(Clip(inner=odd, norm=1.0)).round()


# Surveys


@dataclass(frozen=True, kw_only=True)
class Halved(Wrapper):
    """Half of what clients answer and send."""

    def outgoing(self, server, client, update, local):
        return halved(super().outgoing(server, client, update, local))

    def outgoing_survey(self, server, client, update, local):
        return halved(super().outgoing_survey(server, client, update, local))


def halved(update):
    return update._replace(message={n: v / 2 if n != "buffers" else v for n, v in update.message.items()})


def test_answers_to_a_survey_leave_through_the_wrapper_too():
    mime = make_strategy("mime", beta=0.0)
    plain, half = (make_simulation(s, task=double()) for s in (mime, Halved(inner=mime)))
    plain.round()
    half.round()
    close(half.server["c"], plain.server["c"] / 2)


@pytest.mark.parametrize("inner", ["mime", "fedlin"])
def test_a_wrapper_that_would_not_see_the_answers_is_refused(inner):
    with pytest.raises(ConfigError, match=r"Noisy defines outgoing, and \w+ also surveys its clients; it should"):
        make_simulation(Noisy(inner=make_strategy(inner)))


# Statistics as changes


@dataclass(frozen=True, kw_only=True)
class AsChanges(Wrapper):
    """Statistics travel as changes."""

    buffers_as_changes = True


@pytest.mark.parametrize("name", ["fedavg", "median", "fltrust", "scaffold"])
def test_statistics_sent_as_changes_are_the_same_statistics(name):
    plain, other = (
        make_simulation(s, task=double(), **SOME)
        for s in (make_strategy(name), AsChanges(inner=make_strategy(name)))
    )
    for _ in range(3):
        plain.round()
        other.round()
        close(other.server, plain.server)


def test_noise_makes_no_variance_negative():
    simulation = make_simulation(Noisy(inner=FedAvg(), deviation=10.0))
    simulation.round()
    buffers = simulation.task.buffer_layout.split(simulation.server["buffers"])
    variances = torch.cat([value.reshape(-1) for name, value in buffers.items() if name.endswith("running_var")])
    assert variances.min() == 0
    assert torch.cat([v.reshape(-1) for n, v in buffers.items() if n.endswith("running_mean")]).min() < 0


# Declared entries


@pytest.mark.parametrize("name", [*CATALOGUE])
def test_messages_of_the_catalogue_have_the_declared_form(name):
    """A client that sends another form fails, so that a round shows it; zeros have the same form."""
    simulation = make_simulation(name)
    assert simulation.strategy.sends is not None
    zeros = form_of(zero_message(simulation.strategy, simulation.server))
    simulation.round()
    assert [n for n, *_ in zeros if n != "buffers"] == sorted(simulation.strategy.sends)


def test_a_message_of_nobody_leaves_the_server_as_it_is():
    simulation = make_simulation("fedavg")
    simulation.round()
    for strategy in (simulation.strategy, AsChanges(inner=simulation.strategy)):
        zeros, buffers = zero_message(strategy, simulation.server), simulation.server["buffers"]
        assert not zeros["delta"].any()
        assert torch.equal(zeros["buffers"] + (buffers if strategy.buffers_as_changes else 0), buffers)


@dataclass(frozen=True, kw_only=True)
class Older(FedAvg):
    """A strategy from before there were declarations; it adds an entry to what FedAvg sends."""

    def client_update(self, server, client, local):
        update = super().client_update(server, client, local)
        return update._replace(message=update.message | {"one": torch.ones(())})


def test_a_declaration_is_about_the_client_update_beside_it():
    assert Older().sends is None
    assert FedProx().sends == {"delta": CHANGE}
    assert type("Named", (FedAvg,), {})().sends == {"delta": CHANGE}
    assert (
        trace(make_simulation(Older(), **SOME), 1)[0]["fingerprint"] == make_simulation(**SOME).round().fingerprint
    )
    with pytest.raises(ConfigError, match=r"Older does not declare what its clients send, in Older.sends"):
        zero_message(Older(), make_simulation(Older()).server)


def declared(sends, **more):
    kind = type("Odd", (FedAvg,), {"sends": sends, "__module__": __name__} | more)
    return dataclass(frozen=True, kw_only=True)(kind)()


@pytest.mark.parametrize(
    ("sends", "said"),
    [
        (
            {"delta": (3,)},
            r"strategy: Odd.sends is .*; it should be a dictionary of fedsim.Entry by name, or None",
        ),
        (["delta"], r"strategy: Odd.sends is \['delta'\]"),
        ({1: CHANGE}, r"Odd.sends has 1 as a name; names are strings"),
        ({"buffers": CHANGE}, r"Odd.sends has 'buffers', which is a reserved name"),
        ({"where.delta": CHANGE}, r"Odd.sends has 'where.delta', which is a reserved name"),
        ({"delta": Entry(like="c")}, r"Odd.sends: 'delta' is like 'c', which clients do not download"),
    ],
)
def test_a_declaration_that_cannot_be_is_one_line(sends, said):
    with pytest.raises(ConfigError, match=said) as error:
        make_simulation(declared(sends))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("drop", [False, True])
def test_a_client_that_sends_another_form_than_declared_is_told_both(drop):
    failures = Failures(policy="drop") if drop else None
    simulation = make_simulation(declared({"delta": Entry(shape=(3,))}), failures=failures)
    with pytest.raises(
        RoundError, match=r"a client sent .*delta float32 \(\d\d+,\); declared is .*delta float32 \(3,\)"
    ):
        simulation.round()


def test_entries_have_the_form_of_an_entry_of_the_server_or_their_own():
    simulation = make_simulation("afl")
    assert (
        zero_message(simulation.strategy, simulation.server)["losses"].shape == simulation.server["lambda"].shape
    )
    nova = make_simulation("fednova")
    assert zero_message(nova.strategy, nova.server)["work"].dtype == torch.float64


@pytest.mark.parametrize(
    ("inner", "said"),
    [
        ("fednova", r"strategy.inner: clip takes only changes of the model, and FedNova sends 'd', which is none"),
        ("scaffold", r"Scaffold sends 'delta_c', which is none"),
        ("feddyn", r"FedDyn sends 'delta', which is none"),
        ("mime", r"Mime also surveys its clients"),
        (Older(), r"Older does not declare what its clients send, in Older.sends"),
    ],
)
def test_a_wrapper_of_changes_refuses_strategies_that_send_others(inner, said):
    inner = make_strategy(inner) if isinstance(inner, str) else inner
    with pytest.raises(ConfigError, match=said):
        check_changes(inner, "clip")
    with pytest.raises(ConfigError):
        make_simulation(Clip(inner=inner, norm=1.0))


@pytest.mark.parametrize("liars", [1, 2])
def test_liars_do_not_decide_which_form_counts(tmp_path, monkeypatch, liars):
    """Neither most of the nodes, nor the first ones."""

    def without_one(name, content):
        if name not in [f"client-0{k}" for k in range(liars)]:
            return content
        answer = wire.read(Answer, content)
        message = {n: v for n, v in decode(answer.message).items() if n != "buffers"}
        return wire.record(answer._replace(message=encode(message, "exact")[0]))

    with closing(Lab(tmp_path, monkeypatch)) as here:
        simulation = here.simulation(dropping("fedavg"))
        here.spoil = without_one
        done = simulation.round()
    assert [*done.failed] == [str(k) for k in range(liars)]
    assert "should have buffers float32 (68,), delta float32" in done.failed["0"]


# Names


def test_entries_of_a_nest_have_names_of_their_own():
    names = [
        NEST.entry("e"),
        NEST.inner.entry("e"),
        NEST.inner.inner.entry("e"),
        NEST.inner.inner.inner.entry("e"),
    ]
    assert len({*names, "e"}) == 5
    assert TopK(share=0.6, inner=FedAvg()).entry("e") == names[3]  # whatever is around it


def test_personal_layers_and_an_entry_of_the_inner_strategy_do_not_meet():
    @dataclass(frozen=True, kw_only=True)
    class Keeps(FedAvg):
        sends = {"delta": CHANGE}

        def init_client(self, model, layout):
            return {"private": torch.zeros(2)}

        def client_update(self, server, client, local):
            delta = local.train(server["model"]) - server["model"]
            return Update({"delta": delta}, local.num_examples, {"private": client["private"] + 1})

    simulation = make_simulation(Personal(inner=Keeps(), layers=("fc*",)))
    simulation.round()
    assert torch.equal(simulation.clients[0]["private"], torch.ones(2))
    assert len(simulation.clients[0][simulation.strategy.entry("private")]) > 2


# States that an earlier version stored, in which `personal` kept its layers as `private`

PERSONAL = {"name": "personal", "layers": ["*1*"], "inner": "fedavg"}
WAY_OUT = r"; finish the run with the version of fedsim and the settings that began it, or start a new one$"


@contextmanager
def before(monkeypatch):
    """Names of entries are those of that version."""
    with monkeypatch.context() as earlier:
        earlier.setattr(Wrapper, "entry", lambda self, name: name)
        yield


def test_a_checkpoint_with_the_former_name_of_personal_layers_is_refused_with_the_way_out(tmp_path, monkeypatch):
    config = SMALL | {"strategy": PERSONAL, "rounds": 2, "hooks": []}
    with before(monkeypatch):
        folder = fedsim.run(config, out=tmp_path / "run").folder
    told = r"a client keeps private float32 \(\d+,\); by this config it would be wrapper0.private"
    with pytest.raises(ConfigError, match=told + ".*" + WAY_OUT) as error:
        fedsim.resume(folder, {"rounds": 3})
    assert "\n" not in str(error.value)


def test_a_node_with_the_former_name_of_personal_layers_says_the_way_out(tmp_path, monkeypatch):
    config = load(LAB | {"strategy": PERSONAL, "rounds": 2})
    lab, simulation = on_nodes(tmp_path, monkeypatch, config, "personal", "fedavg")
    with closing(lab):
        with before(monkeypatch):
            simulation.round()
        for node in lab.nodes.values():
            node.role = None  # as after a new start
        told = r"state 1 is private float32 \(\d+,\); by this config it would be wrapper0.private"
        with pytest.raises(ClientError, match=told + ".*" + WAY_OUT):
            simulation.round()
