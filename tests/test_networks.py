"""Users' networks: what works as in plain PyTorch, and what is refused before any round, in one line."""

import random

import numpy as np
import pytest
import torch
from conftest import CLASSES, SHAPE, make_data, make_simulation, make_strategy, make_task
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from fedsim import ConfigError
from fedsim.models import options as models
from fedsim.training.objective import exact
from fedsim.training.probe import copied
from fedsim.training.task import Task


class Net(nn.Module):
    """One layer; subclasses keep something beside it."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, CLASSES)
        self.init()

    def init(self):
        pass

    def forward(self, x):
        return self.fc(x.flatten(1))


class InPlace(Net):
    """Scales a hidden layer by a statistic of it, which it updates after its use."""

    def init(self):
        self.hidden = nn.Linear(16, 16)
        self.register_buffer("scale", torch.ones(16))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        h = self.hidden(x.flatten(1))
        out = self.fc(h * self.scale.clone() + self.steps)
        if self.training:
            self.update(h.detach().abs().mean(0))
        return out

    def update(self, new):
        self.scale.mul_(0.9).add_(0.1 * new)
        self.steps.add_(1)


class Reassigned(InPlace):
    def update(self, new):
        self.scale = 0.9 * self.scale + 0.1 * new
        self.steps = self.steps + 1


COUNTED = {"*steps": "server"}
RUNTIMES = [
    "serial",
    {"name": "threads", "workers": 2},
    {"name": "threads", "workers": 3},
    {"name": "vectorized", "workers": 1, "chunk": 4},
]


@pytest.mark.parametrize("runtime", RUNTIMES, ids=str)
def test_a_buffer_may_be_reassigned(runtime):
    """As with a network that writes into it: the model, its statistics, the tests and the state_dict."""
    data, results = make_data((8,) * 6) if "vectorized" in str(runtime) else make_data(), []  # without padding
    for network in (InPlace, Reassigned):
        simulation = make_simulation(
            task=make_task(network, buffers=COUNTED), data=data, runtime=runtime, lr=0.1, epochs=2, accumulate=1
        )
        simulation.round()
        simulation.round()
        assert not torch.equal(simulation.server["buffers"], simulation.task.initial_buffers)
        state = simulation.task.state_dict(simulation.server)
        results.append((simulation.fingerprint(), simulation.evaluate(), state["scale"]))
    assert results[0][:2] == results[1][:2]
    assert torch.equal(results[0][2], results[1][2])


def test_a_reassigned_buffer_survives_snapshots():
    def fingerprint(network):
        simulation = make_simulation("scaffold", task=make_task(network, buffers=COUNTED), lr=0.1, accumulate=2)
        simulation.round()
        return simulation.fingerprint()

    assert fingerprint(InPlace) == fingerprint(Reassigned)


class Block(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner()

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("network", [InPlace, Reassigned])
def test_a_block_is_recomputed_with_the_buffers_of_its_first_pass(network):
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        task = Task(Block(network), SHAPE, CLASSES, recompute=recompute, buffers=COUNTED)
        simulation = make_simulation(task=task, lr=0.1, activation_checkpointing=recompute)
        simulation.round()
        found.append(simulation.fingerprint())
    assert found[0] == found[1]


class Attribute(Net):
    def init(self):
        self.mean = torch.zeros(16)

    def forward(self, x):
        x = x.flatten(1)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.fc(x - self.mean)


class LastBatch(Attribute):
    """Evaluation depends on the last batch of training."""

    def forward(self, x):
        x = x.flatten(1)
        self.mean = x.mean(0) if self.training else self.mean
        return self.fc(x - self.mean)


class Recurrent(Net):
    def init(self):
        self.rnn, self.h = nn.GRU(16, 16), None

    def forward(self, x):
        y, h = self.rnn(x.flatten(1)[None], self.h)
        self.h = h.detach()
        return self.fc(y[0])


class Counter(Net):
    def init(self):
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * 0.99**self.calls


class Cache(Net):
    """Evaluates with weights that it copied once."""

    def init(self):
        self.copy = None

    def forward(self, x):
        if self.training:
            self.copy = None
            return super().forward(x)
        if self.copy is None:
            self.copy = self.fc.weight.detach().clone()
        return x.flatten(1) @ self.copy.T


def hooked():
    network, kept = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES)), {"mean": 0.0}

    def hook(module, inputs, output):
        kept["mean"] = 0.9 * kept["mean"] + 0.1 * output.detach().mean(0)
        return output - kept["mean"]

    network.register_forward_hook(hook)
    return network


class Lambda(Net):
    def init(self):
        self.forward_ = lambda x: self.fc(x)

    def forward(self, x):
        return self.forward_(x.flatten(1))


class Listed(Net):
    def init(self):
        self.layers = [nn.Linear(16, 16)]

    def forward(self, x):
        return self.fc(self.layers[0](x.flatten(1)))


class Initialises(Net):
    def init(self):
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x):
        self.scale.data.copy_(x.flatten(1).std(0))
        return self.fc(x.flatten(1) * self.scale)


def output(change):
    """A network class whose output is changed."""
    return type("Changed", (Net,), {"forward": lambda self, x: change(Net.forward(self, x))})


class TwoInputs(Net):
    def forward(self, image, age):
        return self.fc(image.flatten(1)) + age


class Sparse(Net):
    def init(self):
        self.embedding = nn.Embedding(9, 16, sparse=True)

    def forward(self, x):
        return self.fc(self.embedding(x.flatten(1).abs().long()).mean(1))


def mixed():
    network = Net()
    network.scale = nn.Parameter(torch.ones(3, dtype=torch.float16))
    return network


def locked():
    network = Net()
    network.generator = (i for i in range(3))
    return network


REFUSED = {
    "an attribute": (Attribute, "attribute mean of the network"),
    "the last batch": (LastBatch, "depend on earlier passes"),
    "a stateful RNN": (Recurrent, "attribute h of the network"),
    "a number": (Counter, "depend on earlier passes"),
    "cached weights": (Cache, "depend on earlier passes"),
    "a hook": (hooked, "depend on earlier passes"),
    "a lambda": (Lambda, "fc.weight of the original"),
    "a list of layers": (Listed, "nn.ModuleList"),
    "a parameter set in forward": (Initialises, "changes the parameter scale"),
    "two tensors": (output(lambda z: (z, z.softmax(1))), "return the logits only"),
    "a dictionary": (output(lambda z: {"logits": z}), "forward gives dict"),
    "a list": (output(lambda z: [z]), "forward gives list"),
    "nothing": (output(lambda z: None), "forward gives NoneType"),
    "numpy": (output(lambda z: z.detach().numpy()), "forward gives ndarray"),
    "complex": (output(lambda z: z.to(torch.complex64)), "complex64"),
    "integers": (output(lambda z: z.long()), "int64"),
    "no gradient": (output(lambda z: z.detach()), "no gradient"),
    "two inputs": (TwoInputs, "'age'"),
    "a sparse gradient": (Sparse, "embedding.weight has a sparse gradient"),
    "two types": (mixed, "scale is float16 and fc.weight is float32"),
    "bfloat16": (lambda: Net().bfloat16(), "fc.weight is bfloat16"),
    "meta": (lambda: Net().to("meta"), "meta device"),
    "frozen": (lambda: Net().requires_grad_(False), "no parameter that requires a gradient"),
    "no copy": (locked, "cannot be copied"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_round_and_without_a_trace(case):
    make, message = REFUSED[case]
    network = make()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    with pytest.raises(ConfigError, match=rf"^model: [^\n]*{message}[^\n]*$"):
        Task(network, SHAPE, CLASSES, examples=torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(1)))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert torch.is_grad_enabled()


class Records(Net):
    """Attributes that depend only on the last pass, or on shapes, are no state."""

    def init(self):
        self.attention = self.mask = None

    def forward(self, x):
        self.mask = torch.ones(16) if self.mask is None else self.mask
        self.attention = (x.flatten(1) * self.mask).softmax(1)
        return self.fc(self.attention)


class Adapter(Net):
    def init(self):
        self.base = nn.Linear(16, 16).bfloat16().requires_grad_(False)

    def forward(self, x):
        return self.fc(self.base(x.flatten(1).bfloat16()).float())


def weight_norm():
    return nn.Sequential(nn.Flatten(), nn.utils.weight_norm(nn.Linear(16, CLASSES)))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("network", [Records, Adapter, weight_norm, lambda: Net().double()])
def test_one_client_is_plain_pytorch(network):
    task = Task(network(), SHAPE, CLASSES)  # make_task would cast it
    simulation = make_simulation(task=task, data=make_data([12]), lr=0.1, batch_size="full")
    own = copied(task.network).train()
    trained = [p for p in own.parameters() if p.requires_grad]
    x, y = make_data([12]).batch(torch.arange(12))
    F.cross_entropy(own(x.to(trained[0].dtype)), y).backward()
    torch.optim.SGD(trained, lr=0.1).step()
    simulation.round()
    assert_close(simulation.server["model"], torch.cat([p.detach().flatten() for p in trained]))
    assert simulation.evaluate().loss > 0
    simulation.digest()


def test_an_auxiliary_head_is_one_in_training_only():
    class Heads(Net):
        def forward(self, x):
            z = super().forward(x)
            return (z, z, None) if self.training else z

    local = make_simulation(task=make_task(Heads)).round()
    assert local.train_loss == pytest.approx(
        1.4 * make_simulation(task=make_task(Net)).round().train_loss, rel=0.5
    )


def test_tokens_are_tried_with_real_examples():
    class Words(Net):
        def init(self):
            self.embedding = nn.Embedding(50, 16)

        def forward(self, x):
            return self.fc(self.embedding(x.flatten(1).long()).mean(1))

    tokens = torch.arange(5 * 16).view(5, *SHAPE).float() % 50
    Task(Words(), SHAPE, CLASSES, examples=tokens)
    with pytest.raises(ConfigError, match=r"^model: cannot take examples"):
        Task(Words(), SHAPE, CLASSES, examples=tokens + 30)


def test_lazy_layers_get_their_parameters_when_they_are_made(tmp_path, monkeypatch):
    (tmp_path / "lazy_nets.py").write_text(
        "from torch import nn\n"
        "def net(shape, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    networks = []
    for _ in range(2):
        torch.manual_seed(0)
        networks.append(models.make({"name": "lazy_nets:net", "freeze": ["1.*"]}, SHAPE, CLASSES))
    shapes = [tuple(p.shape) for p in networks[0].parameters()]
    assert shapes == [(8, 16), (8,), (8,), (8,), (CLASSES, 8), (CLASSES,)]
    for a, b in zip(*(network.state_dict().values() for network in networks), strict=True):
        assert torch.equal(a, b)
    assert networks[0].training
    assert not networks[0][1].weight.requires_grad


def test_counts_and_sums_are_exact():
    like = torch.zeros(())
    assert exact(2**24, like).dtype == torch.float32  # as ever
    assert int(exact([5, 2**25 + 1], like)[1]) == 2**25 + 1
    simulation = make_simulation(make_strategy("fedavg"))
    metrics = simulation.runtime.worker.run(simulation.work, simulation.server, simulation._job(0)).metrics
    assert {value.dtype for value in metrics.values()} == {torch.float64}
