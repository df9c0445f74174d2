"""What becomes of the buffers that training changes: statistics, power-iteration vectors, and all others."""

import copy

import pytest
import torch
from conftest import CLASSES, SHAPE, close, make_data, make_local, make_simulation, make_strategy, make_task, trace
from torch import nn
from torch.func import vmap
from torch.nn import functional as F
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import fedsim
from fedsim import ConfigError, Task
from fedsim.federated.recalibration import Recalibrate
from fedsim.training.buffers import leading_vectors

D = 16
THREADS = {"name": "threads", "workers": 3}
DATA = make_data((3, 8, 6, 12, 2, 7))  # no batch of 4 leaves one example over


class Net(nn.Module):
    """A small network that calls `move(self, x)` in training, and has the given buffers."""

    def __init__(self, move, use=lambda self, x: x, **buffers):
        super().__init__()
        self.move, self.use = move, use
        for name, value in buffers.items():
            self.register_buffer(name, torch.as_tensor(value))
        self.fc = nn.Sequential(nn.Linear(D, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, CLASSES))

    def forward(self, x):
        x = x.flatten(1)
        if self.training:
            with torch.no_grad():
                self.move(self, x)
        return self.fc(self.use(self, x))


def running_mean(self, x):
    self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)


def reassigned_mean(self, x):
    self.mean = 0.9 * self.mean + 0.1 * x.mean(0)


def running_norm(self, x):
    running_mean(self, x)
    self.var.lerp_(x.var(0), 0.1)
    self.count += 1


def cumulative_mean(self, x):
    self.count += 1
    self.mean += (x.mean(0) - self.mean) / self.count


def codebook(self, x):
    nearest = F.one_hot(torch.cdist(x, self.codes).argmin(1), 4).to(x)
    self.size.lerp_(nearest.sum(0), 0.01)
    self.total.lerp_(nearest.T @ x, 0.01)
    self.codes.copy_(self.total / (self.size + 1e-5).unsqueeze(1))


def quantile(self, x):
    self.q += 0.1 * (0.9 - (x < self.q).to(x).mean(0))


def counter(self, x):
    self.n += 1


def balance(self, x):
    self.load.lerp_(x[:, :4].softmax(1).mean(0), 0.1)
    self.bias += 0.01 * (0.25 - self.load).sign()


def zeros(*shape):
    return torch.zeros(shape)


MEANS = [  # what moves, and what is a running mean over examples
    (running_mean, {"mean": zeros(D)}, {"mean"}),
    (reassigned_mean, {"mean": zeros(D)}, {"mean"}),
    (lambda self, x: self.mean.copy_(x.square().mean()), {"mean": 1.0}, {"mean"}),
    (lambda self, x: self.mean.lerp_(x.float().mean(0).to(x), 0.1), {"mean": zeros(D)}, {"mean"}),
    (running_norm, {"mean": zeros(D), "var": zeros(D), "count": 0}, {"mean"}),
    (lambda self, x: self.var.lerp_(x.var(), 0.1), {"var": 1.0}, set()),
    (cumulative_mean, {"mean": zeros(D), "count": 0}, set()),
    (codebook, {"codes": torch.eye(4, D), "size": torch.ones(4), "total": torch.eye(4, D)}, set()),
    (quantile, {"q": zeros(D)}, set()),
    (lambda self, x: self.top.copy_(torch.maximum(self.top, x.amax(0))), {"top": zeros(D)}, set()),
    (counter, {"n": 0}, set()),
    (counter, {"n": 0.0}, set()),
    (lambda self, x: self.ready.fill_(True), {"ready": False}, set()),
    (lambda self, x: self.temperature.mul_(0.99), {"temperature": 1.0}, set()),
    (balance, {"load": zeros(4), "bias": zeros(4)}, {"load"}),
]


@pytest.mark.parametrize(("move", "buffers", "means"), MEANS)
def test_only_running_means_over_examples_are_averaged_unasked(move, buffers, means):
    others = buffers.keys() - means
    if others:
        with pytest.raises(ConfigError, match=r"\Amodel\.buffers: .*server .* or private .*\Z") as caught:
            Task(Net(move, **buffers), SHAPE, CLASSES)
        assert all((f" {name} (" in str(caught.value)) == (name in others) for name in buffers)
    task = Task(Net(move, **buffers), SHAPE, CLASSES, buffers=dict.fromkeys(others, "server"))
    assert task.handling == {
        **dict.fromkeys(means, "average"),
        **dict.fromkeys(others, "server"),
        "fc.1.running_mean": "average",
        "fc.1.running_var": "average",
    }


def test_statistics_of_norms_are_those_that_torch_keeps():
    for norm, kept in [
        (nn.BatchNorm2d(1, momentum=None, affine=False), True),
        (nn.SyncBatchNorm(1), True),
        (nn.InstanceNorm2d(1, track_running_stats=True), True),
        (nn.BatchNorm2d(1, track_running_stats=False), False),
        (nn.InstanceNorm2d(1), False),
    ]:
        task = Task(nn.Sequential(norm, nn.Flatten(), nn.Linear(D, CLASSES)), SHAPE, CLASSES)
        assert task.handling == (dict.fromkeys(["0.running_mean", "0.running_var"], "average") if kept else {})


# Spectral norms


def spectral_net(norm=spectral_norm):
    """As a discriminator: a convolution, one along another axis, batch norm, and a linear layer."""
    layers = norm(nn.Conv2d(1, 3, 2)), nn.ReLU(), norm(nn.ConvTranspose2d(3, 2, 2)), nn.BatchNorm2d(2), nn.ReLU()
    return nn.Sequential(*layers, nn.Flatten(), norm(nn.Linear(2 * D, 6)), nn.ReLU(), nn.Linear(6, CLASSES))


def deep_net():
    """A spectral norm behind another parametrisation, and one of orthogonal rows: all singular values are 1."""
    rows = nn.Linear(8, 6)
    nn.init.orthogonal_(rows.weight)
    first = spectral_norm(weight_norm(nn.Linear(D, 8)))
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), spectral_norm(rows), orthogonal(nn.Linear(6, CLASSES)))


def norms_of(network):
    """The largest singular value of each weight that a spectral norm divides, after an evaluation pass."""
    network.eval()(torch.zeros(1, *SHAPE))
    for layer in network.modules():
        if hasattr(layer, "weight_orig") or "spectral" in str(getattr(layer, "parametrizations", "")).lower():
            w = layer.weight.detach()
            axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
            yield float(torch.linalg.matrix_norm(w.movedim(axis, 0).flatten(1).double(), 2))


def loss_of(network, data, client=None):
    """On the test set or on a client's own examples, by plain PyTorch."""
    if client is None:
        x, y = data.test_batch(torch.arange(data.num_test))
    else:
        x, y = map(torch.cat, zip(*data.own_batches(client, 4), strict=True))
    with torch.no_grad():
        return float(F.cross_entropy(network.eval()(x), y))


@pytest.mark.parametrize("norm", [spectral_norm, old_spectral_norm])
def test_spectral_norms_are_those_of_the_weights_wherever_a_model_is_loaded(norm):
    """By plain PyTorch: of the global model, its running mean, and each client's own model; as saved, too."""
    simulation = make_simulation("fedbn", task=make_task(lambda: spectral_net(norm)), data=DATA, ema=0.5)
    for _ in range(2):
        simulation.round()
    task, data = simulation.task, simulation.data
    assert list(task.buffer_layout.shapes) == ["3.running_mean", "3.running_var"]
    for server in (simulation.server, simulation.ema):
        network = spectral_net(norm)
        network.load_state_dict(task.state_dict(server))
        torch.testing.assert_close(list(norms_of(network)), [1.0] * 3, rtol=1e-6, atol=0)
        assert simulation.evaluate(server=server).loss == pytest.approx(loss_of(network, data), rel=1e-5)
    own = simulation.evaluate_clients([1])[1]
    client = simulation.clients[1]
    model = simulation.strategy.client_model(simulation.server, client, task.layout)
    network.load_state_dict(task.state_dict({"model": model, "buffers": client["buffers"]}))
    assert own.loss == pytest.approx(loss_of(network, data, 1), rel=1e-5)


def test_spectral_norms_behind_other_parametrisations_and_of_equal_singular_values():
    task = make_task(deep_net)
    network = deep_net()
    network.load_state_dict(task.state_dict({"model": task.initial_model, "buffers": task.initial_buffers}))
    torch.testing.assert_close(list(norms_of(network)), [1.0] * 2, rtol=1e-6, atol=0)


def test_leading_vectors():
    """Of matrices wide, tall, nearly of equal singular values, tiny and zero; of many at once the same."""
    noise = torch.Generator().manual_seed(0)
    wide = torch.randn(5, 9, 30, generator=noise)
    wide[1] = torch.linalg.qr(wide[1].T)[0].T
    wide[2] = wide[1] * (1 + 1e-4 * torch.rand(9, 1, generator=noise))
    wide[3] *= 1e-12
    wide[4] = 0
    for matrices in (wide, wide.mT):
        u, v = vmap(leading_vectors)(matrices)
        norms = torch.linalg.matrix_norm(matrices.double(), 2)
        found = torch.einsum("cm,cmn,cn->c", u.double(), matrices.double(), v.double())
        torch.testing.assert_close(found, norms, rtol=1e-6, atol=0)
        torch.testing.assert_close([float(u[:4].norm(dim=1).sub(1).abs().max())], [0.0], rtol=0, atol=1e-6)
        for matrix, *pair in zip(matrices, u, v, strict=True):
            torch.testing.assert_close(list(leading_vectors(matrix)), pair)


def test_a_client_moves_the_vectors_by_the_rule_of_torch():
    """Two steps of SGD are those of torch, from vectors that fit the weights."""
    task, data = make_task(spectral_net), make_data()
    local = make_local(task, data, client=3, epochs=1, steps=2)
    trained = local.train(task.initial_model)
    network = spectral_net().train()
    network.load_state_dict(task.state_dict({"model": task.initial_model, "buffers": task.initial_buffers}))
    for batch in make_local(task, data, client=3, epochs=1, steps=2).batches():
        gradients = torch.autograd.grad(F.cross_entropy(network(batch.x), batch.y), [*network.parameters()])
        with torch.no_grad():
            for p, g in zip(network.parameters(), gradients, strict=True):
                p -= 0.05 * g
    torch.testing.assert_close(trained, task.layout.flatten(dict(network.named_parameters())))


# All together, in every runtime


def everything():
    """Buffers of each kind: the output depends on all of them."""

    def move(self, x):
        running_mean(self, x)
        self.top.copy_(torch.maximum(self.top, x.amax(0)))
        self.usage.lerp_(x.square().var(0), 0.1)
        self.steps += 1

    def use(self, x):
        return (x - self.mean) / (1 + self.top.abs() + self.usage) * (1 + 0.1 * self.steps)

    net = Net(move, use, mean=zeros(D), top=zeros(D), usage=zeros(D), steps=0)
    net.fc[0] = spectral_norm(net.fc[0])
    return net


WORDS = {"t*p": "server", "usage": "private", "steps": "private"}


def make_everything(words=WORDS, dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Task(everything().to(dtype), SHAPE, CLASSES, buffers=words)


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "fedbn"])
def test_runtimes_agree(strategy):
    some = {"name": "uniform", "size": 4}
    serial, threads = (
        trace(make_simulation(strategy, task=make_everything(), data=DATA, cohort=some, runtime=runtime, ema=0.5))
        for runtime in ("serial", THREADS)
    )
    assert serial == threads


def everything_in_place():
    net = everything()
    net.move = lambda self, x: (running_mean(self, x), counter(self, x), self.top.copy_(self.top.square()))
    net.use = lambda self, x: (x - self.mean) * self.top * (1 + 0.1 * self.n)
    net.register_buffer("n", torch.tensor(0))
    net.top += 0.9
    return net


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_vectorized_agrees(strategy):
    """Where the batches of all clients are full: a running mean would count padding."""
    words, runs = {"n": "private", "top": "server"}, []
    data = make_data((4, 8, 12), dtype=torch.float64)
    for runtime in ("serial", "vectorized"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            task = Task(everything_in_place().double(), SHAPE, CLASSES, buffers=words)
        run = make_simulation(strategy, task=task, data=data, runtime=runtime, epochs=2)
        for _ in range(2):
            run.round()
        runs.append(run)
    serial, vectorized = runs
    close(vectorized.server, serial.server)
    for k, state in serial.clients.items():
        close(vectorized.clients[k], state)
    close(vectorized.evaluate().loss, serial.evaluate().loss)


def test_distillation_from_the_start_uses_its_vectors():
    """The teacher's loss at the start is that of plain PyTorch, also after the client's own vectors have moved."""
    task = make_task(spectral_net, dtype=torch.float64)
    local = make_local(task, client=1)
    local.train(task.initial_model)
    network = spectral_net().double()
    network.load_state_dict(task.state_dict({"model": task.initial_model, "buffers": local.buffers}))
    x = torch.randn(4, *SHAPE, dtype=torch.float64)
    close(local.logits(task.initial_model, x, train=False), network.eval()(x))


# The words


def counted(word):
    torch.manual_seed(0)
    task = Task(Net(counter, lambda self, x: x * self.n, n=1.0), SHAPE, CLASSES, buffers={"n": word})
    return make_simulation(task=task, data=DATA, epochs=1)


def test_private_buffers_stay_with_each_client_from_round_to_round():
    run = counted("private")
    steps = {k: run.recipe.num_steps(int(n)) for k, n in enumerate(run.data.sizes)}
    for number in (1, 2):
        run.round()
        assert {k: float(s["buffers.n"]) for k, s in run.clients.items()} == {
            k: 1 + number * taken for k, taken in steps.items()
        }
    assert run.server.keys() == {"model", "buffers"}
    assert "n" not in run.task.buffer_layout.shapes
    task, network = run.task, copy.deepcopy(run.task.network).eval()
    for client, own in ((None, 1.0), (2, float(run.clients[2]["buffers.n"]))):
        network.load_state_dict(task.state_dict(run.server))
        assert float(network.n) == 1.0
        network.n.fill_(own)
        found = run.evaluate() if client is None else run.evaluate_clients([client])[client]
        assert found.loss == pytest.approx(loss_of(network, run.data, client), rel=1e-5)


def test_of_server_buffers_each_client_starts_from_the_first_value():
    runs = [counted("server"), counted("private")]
    for run in runs:
        run.round()
    assert torch.equal(runs[0].server["model"], runs[1].server["model"])
    assert not runs[0].clients
    for run in runs:
        run.round()
    assert not torch.equal(runs[0].server["model"], runs[1].server["model"])
    assert float(runs[0].task.state_dict(runs[0].server)["n"]) == 1.0


def test_averaged_buffers_are_the_weighted_mean():
    run = counted("average")
    run.round()
    n = torch.from_numpy(run.data.sizes).double()
    own = torch.tensor([1.0 + run.recipe.num_steps(int(each)) for each in run.data.sizes], dtype=torch.double)
    mean = run.task.buffer_layout.split(run.server["buffers"])["n"]
    torch.testing.assert_close(float(mean), float((n * own).sum() / n.sum()), rtol=1e-6, atol=0)
    assert float(run.task.state_dict(run.server)["n"]) == float(mean)


def test_a_word_may_be_said_of_statistics_too():
    task = Task(Net(running_mean, mean=zeros(D)), SHAPE, CLASSES, buffers={"mean": "private", "*g_*": "server"})
    assert task.handling == {"mean": "private", "fc.1.running_mean": "server", "fc.1.running_var": "server"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"m*": "server"}, "training changes n (int64)"),
        ({"n": "server", "x*": "server"}, "'x*' matches none of mean, n, "),
        ({"n": "average"}, "n (int64) cannot be averaged; say server or private"),
        ({"n": "server", "[mn]": "private"}, "says both server and private of n"),
        ({"n": "server", "*num_batches_tracked": "private"}, "'*num_batches_tracked' matches none of"),
    ],
)
def test_words_that_do_not_fit(words, said):
    net = Net(lambda self, x: (running_mean(self, x), counter(self, x)), mean=zeros(D), n=0)
    with pytest.raises(ConfigError) as caught:
        Task(net, SHAPE, CLASSES, buffers=words)
    assert str(caught.value).startswith("model.buffers: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_vectors_of_spectral_norms_need_no_word_and_take_none():
    with pytest.raises(ConfigError, match=r"\Amodel\.buffers: .*no buffer"):
        Task(deep_net(), SHAPE, CLASSES, buffers={"*_u": "server"})


def test_recalibration_takes_spectral_norms_beside_batch_norm():
    strategy = make_strategy("fedavg", buffers="recalibrated")
    settings, data = Recalibrate(examples=8, batch_size=8), make_data(public=8)
    run = make_simulation(strategy, task=make_task(spectral_net), data=data, recalibrate=settings)
    run.round()
    network = spectral_net().train()
    network.load_state_dict(run.task.state_dict(run.server))
    network[3].momentum = None
    network[3].reset_running_stats()
    network(data.batch(torch.from_numpy(data.public))[0])
    torch.testing.assert_close(
        run.server["buffers"], run.task.buffer_layout.flatten(dict(network.named_buffers()))
    )


def test_one_strategy_for_statistics_of_ones_own_is_not_recalibration():
    task = Task(Net(running_mean, mean=zeros(D)), SHAPE, CLASSES)
    strategy = make_strategy("fedavg", buffers="recalibrated")
    with pytest.raises(ConfigError, match="supports only statistics of batch norm, and mean is none"):
        make_simulation(strategy, task=task, data=make_data(public=8), recalibrate=Recalibrate())


OWN = """
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

class Net(nn.Module):
    def __init__(self, d, c):
        super().__init__()
        self.register_buffer("n", torch.tensor(0))
        self.fc = nn.Sequential(nn.Flatten(), spectral_norm(nn.Linear(d, 8)), nn.BatchNorm1d(8), nn.Linear(8, c))
    def forward(self, x):
        if self.training:
            self.n += 1
        return self.fc(x) * (1 + 0.01 * self.n)

def net(shape, classes):
    return Net(shape[0] * shape[1] * shape[2], classes)
"""


def test_in_a_config_and_after_a_resume(tmp_path, monkeypatch):
    (tmp_path / "counting.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    config = {
        "rounds": 3,
        "data": {"name": "synthetic", "clients": 12, "partition": "iid"},
        "model": "counting:net",
        "strategy": "fedavg",
        "cohort": {"name": "uniform", "size": 6},
        "local": {"steps": 2, "lr": 0.1},
        "runtime": "serial",
        "ema": 0.5,
        "evaluate": {"clients": True},
        "hooks": [],
    }
    with pytest.raises(ConfigError, match=r"\Amodel\.buffers: training changes n \(int64\)"):
        fedsim.run(config)
    with pytest.raises(ConfigError, match=r"\Amodel\.buffers: .* each value average, server or private"):
        fedsim.run(config, {"model.buffers": {"n": "keep"}})
    private = {"model.buffers": {"n": "private"}}
    whole = fedsim.run(config, private, tmp_path / "whole")
    fedsim.run(config, private | {"rounds": 2}, tmp_path / "part")
    with pytest.raises(ConfigError, match=r'buffers\.n: "server", and was "private".*changes the result'):
        fedsim.resume(tmp_path / "part", {"rounds": 3, "model.buffers": {"n": "server"}})
    with pytest.warns(UserWarning, match="rounds: 3, and was 2"):
        resumed = fedsim.resume(tmp_path / "part", {"rounds": 3})
    assert [r["fingerprint"] for r in resumed.rounds] == [r["fingerprint"] for r in whole.rounds]
    assert resumed.summary["ema_test_accuracy"] == whole.summary["ema_test_accuracy"]
    assert resumed.rounds[-1]["client_accuracy_mean"] == whole.rounds[-1]["client_accuracy_mean"]
    files = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "part")]
    assert files[0] == files[1]
