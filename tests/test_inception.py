import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torchvision import models as torchvision_models

from fedsim.errors import ConfigError
from fedsim.export.cost import activation_bytes, cost, flops
from fedsim.export.fusion import fused
from fedsim.models import MODELS, inception
from fedsim.training.recompute import Recompute

TINY = (3, 16, 16)  # small enough that the last block has one pixel


def make(shape: tuple[int, ...], classes: int = 3, **options: object) -> nn.Module:
    return MODELS.bind({"name": "inception_v3", **options})(shape, classes)


@cache
def _pair() -> tuple[nn.Module, nn.Module]:
    one, other = make(TINY), make(TINY, parallel=True)
    other.load_state_dict(one.state_dict())
    return one, other


def pair() -> tuple[nn.Module, nn.Module]:
    """Two networks of the same weights: branches one after the other, and at the same time."""
    return copy.deepcopy(_pair())


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, *TINY)


def step(network: nn.Module, x: Tensor) -> None:
    torch.manual_seed(0)  # the seed of its dropout
    F.cross_entropy(network(x), torch.arange(len(x), device=x.device)).backward()


def state(network: nn.Module) -> Iterator[Tensor]:
    """Gradients and batch-norm statistics."""
    yield from (p.grad for p in network.parameters() if p.grad is not None)
    yield from network.buffers()


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(state(one), state(other), strict=True))


def test_it_has_the_parameters_it_is_known_for() -> None:
    shape, classes, count = MODELS.load("inception_v3").reference
    with torch.device("meta"):
        assert (parameters(make(shape, classes)), parameters(make(shape, classes, aux=True))) == (
            count,
            27_161_264,
        )


def test_torchvisions_weights_fit_and_give_the_same() -> None:
    theirs = torchvision_models.Inception3(init_weights=False).eval()
    ours = make((3, 299, 299), 1000, aux=True, parallel=True).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 80, 80)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize(("shape", "parallel"), [((1, 28, 28), True), ((3, 32, 32), False)])
def test_small_images_train_and_evaluate(shape: tuple[int, ...], parallel: bool) -> None:
    network, x = make(shape, parallel=parallel), torch.randn(2, *shape)
    step(network, x)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    logits = network.eval()(x)
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()


@pytest.mark.parametrize(("side", "last"), [(28, 4), (32, 5), (224, 5), (299, 8)])
def test_the_last_block_sees(side: int, last: int) -> None:
    sides = []
    with torch.device("meta"):
        network = make((3, side, side))
        network.Mixed_7c.register_forward_hook(lambda _, __, out: sides.append(out.shape[-1]))
        network(torch.empty(2, 3, side, side))
    assert sides == [last]


@pytest.mark.parametrize(("stem", "smallest"), [("imagenet", 75), ("small", 13)])
def test_the_smallest_image_is_the_smallest_that_works(stem: str, smallest: int) -> None:
    with torch.device("meta"):
        network = make((3, smallest, smallest), stem=stem)
        assert network(torch.empty(2, 3, smallest, smallest)).shape == (2, 3)
        with pytest.raises(RuntimeError):
            network(torch.empty(2, 3, smallest - 1, smallest))
    with pytest.raises(
        ConfigError, match=rf"^model: inception_v3 takes images .* at least {smallest} pixels a side"
    ):
        make((3, smallest, smallest - 1), stem=stem)


@pytest.mark.parametrize(("stem", "smallest"), [("imagenet", 299), ("small", 41)])
def test_the_smallest_image_for_the_auxiliary_head_is_the_smallest_that_works(stem: str, smallest: int) -> None:
    with torch.device("meta"):
        network = make((3, smallest, smallest), stem=stem, aux=True)
        assert [logits.shape for logits in network(torch.empty(2, 3, smallest, smallest))] == [(2, 3)] * 2
        with pytest.raises(RuntimeError):
            network(torch.empty(2, 3, smallest - 1, smallest))
    with pytest.raises(ConfigError, match=r"^model\.aux: .* at least 299 pixels .* `stem: small` 41; .*$"):
        make((3, smallest, smallest - 1), stem=stem, aux=True)


def test_the_auxiliary_head_is_used_in_training_only() -> None:
    network, x = make((1, 41, 41), aux=True), torch.randn(2, 1, 41, 41)
    seen: list[Tensor] = []
    network.AuxLogits.register_forward_hook(lambda _, __, logits: seen.append(logits))
    logits, aux_logits = network(x)
    assert logits.shape == (2, 3)
    assert aux_logits is seen[0]
    assert isinstance(network.eval()(x), Tensor)
    assert len(seen) == 1


def test_the_classifier_is_the_last_linear_layer() -> None:
    with torch.device("meta"):
        linear = [name for name, m in make((3, 64, 64), aux=True).named_modules() if isinstance(m, nn.Linear)]
    assert linear == ["AuxLogits.fc", "fc"]


def test_weights_start_as_torchvision_draws_them() -> None:
    first = make((3, 16, 16)).Conv2d_1a_3x3.conv.weight
    assert first.std().item() == pytest.approx(0.1, rel=0.1)


def test_parallel_branches_give_the_bits_of_one_after_the_other(x: Tensor) -> None:
    one, other = pair()
    for network in (one, other):
        for _ in range(2):
            step(network, x)
    assert same(one, other)
    assert torch.equal(one.eval()(x), other.eval()(x))
    with torch.no_grad():
        assert torch.equal(one(x), other(x))
    with torch.inference_mode():
        assert other(x).is_inference()


def test_the_input_has_its_gradient_too(x: Tensor) -> None:
    one, other = pair()
    images = [x.clone().requires_grad_() for _ in range(2)]
    for network, own in zip((one, other), images, strict=True):
        step(network, own)
    assert torch.equal(images[0].grad, images[1].grad)


@pytest.mark.parametrize(
    "frozen", [("Conv2d", "Mixed_5"), ("Conv2d", "Mixed_5", "Mixed_6", "Mixed_7"), ("Mixed_6b",)]
)
def test_frozen_layers_get_no_gradients(frozen: tuple[str, ...], x: Tensor) -> None:
    one, other = pair()
    for network in (one, other):
        for name, parameter in network.named_parameters():
            parameter.requires_grad = not name.startswith(frozen)
        step(network, x)
    assert same(one, other)
    assert all((p.grad is None) != p.requires_grad for p in other.parameters())


def test_branches_use_the_callers_autocast(x: Tensor) -> None:
    one, other = pair()
    for network in (one, other):
        with torch.autocast("cpu", torch.bfloat16):
            step(network, x)
            assert network.Mixed_5b(torch.randn(1, 192, 5, 5)).dtype == torch.bfloat16
    assert same(one, other)


def test_functional_weights_get_gradients(x: Tensor) -> None:
    one, other = (network.eval() for network in pair())
    w = torch.ones((), requires_grad=True)
    outputs = [functional_call(n, {k: w * p for k, p in n.named_parameters()}, (x,)) for n in (one, other)]
    mine, others = (torch.autograd.grad(logits.sum(), w)[0] for logits in outputs)
    assert torch.equal(mine, others)


def test_clients_in_threads_share_the_pool(x: Tensor) -> None:
    def train(network: nn.Module) -> nn.Module:
        torch.set_num_threads(1)
        for own in (x, 2 * x):
            F.cross_entropy(network(own), torch.arange(2)).backward()
        return network

    networks = [copy.deepcopy(pair()[1]) for _ in range(3)]
    for network in networks:
        network.dropout.p = 0.0
    with ThreadPoolExecutor(2) as pool:
        first, *others = pool.map(train, networks)
    assert all(same(first, other) for other in others)


def test_a_second_derivative_is_refused(x: Tensor) -> None:
    _, other = pair()
    loss = other(x).sum()
    gradient = torch.autograd.grad(loss, other.Mixed_5b.branch1x1.conv.weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_an_error_in_a_branch_reaches_the_caller(x: Tensor) -> None:
    _, other = pair()
    other.Mixed_6b.branch7x7_2 = nn.Conv2d(1, 1, 1)
    with pytest.raises(RuntimeError, match="channels"):
        other(x)


# Branches run one after the other where something observes this thread only


@pytest.fixture
def in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("computed in threads")

    monkeypatch.setattr(inception, "_in_threads", refused)


def test_threads_are_used_where_nothing_observes(x: Tensor, in_turn: None) -> None:
    with pytest.raises(AssertionError, match="computed in threads"):
        pair()[1](x)


def test_it_costs_as_much_as_without_parallel(in_turn: None) -> None:
    one, other = pair()
    assert cost(other, TINY) == cost(one, TINY)
    assert flops(other, TINY) == cost(one, TINY).flops  # on the CPU, too
    assert activation_bytes(other, TINY, torch.bfloat16) == activation_bytes(one, TINY, torch.bfloat16)


def test_it_is_traced_as_without_parallel(x: Tensor, in_turn: None) -> None:
    one, other = (network.eval() for network in pair())
    wanted = one(x)
    assert torch.equal(fused(other, TINY)(x), fused(one, TINY)(x))
    assert torch.equal(torch.export.export(other, (x,)).module()(x), wanted)


def test_checkpointed_blocks_are_recomputed(x: Tensor, in_turn: None) -> None:
    one, other = pair()
    for network in (one, other):
        recompute = Recompute(network, torch.Generator().manual_seed(0))
        recompute.on = True
        step(network, x)
    assert same(one, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_streams_give_the_same_as_without_parallel(x: Tensor) -> None:
    one, other = (network.cuda() for network in pair())
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=False):
        for network in (one, other):
            for _ in range(3):
                step(network, x.cuda())
    for a, b in zip(state(one), state(other), strict=True):
        torch.testing.assert_close(a, b)
