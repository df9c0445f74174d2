"""Laws of the losses: their formulas by hand, torch's own where it has one, and what each reduces to."""

from functools import partial

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F

from fedsim.errors import ConfigError
from fedsim.training.losses import (
    LOSSES,
    balanced_weights,
    bootstrapped,
    cross_entropy,
    distilled,
    hinge,
    mixed,
    oversampled,
)
from fedsim.types import Batch, Stream, random

B, K = 7, 5
SPECS = (
    {"name": "cross_entropy"},
    {"name": "cross_entropy", "smoothing": 0.1},
    {"name": "cross_entropy", "smoothing": 0.1, "spread": "others"},
    {"name": "hinge"},
    {"name": "hinge", "margin": 0.3, "rivals": "strongest"},
)
close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


def scores(key=0, classes=K):
    return torch.randn(B, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(key))


def labels(classes=K):
    return torch.arange(B) * 3 % classes


def against(q, logits):
    """-sum_k q_k log p_k, with p written out."""
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    return -(q * p.log()).sum(1)


def a_batch(**values):
    return Batch(torch.zeros(B), labels(), **values)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_loss_is_one_number_per_example_whatever_the_others_are(spec):
    loss, logits, y = LOSSES.bind(spec), scores(), labels()
    whole = loss(logits, y)
    assert whole.shape == (B,)
    assert (whole >= 0).all()
    for i in range(B):
        close(loss(logits[i : i + 1], y[i : i + 1])[0], whole[i])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_loss_s_gradient_is_that_of_differences(spec):
    loss, logits = LOSSES.bind(spec), scores().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, labels()), logits)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_losses_of_many_clients_at_once_are_those_of_each(spec):
    """Under vmap, as where clients are computed together: nothing branches on a tensor's value."""
    loss, logits, y = LOSSES.bind(spec), torch.stack([scores(k) for k in range(3)]), labels().expand(3, B)
    extra = {"mixed_labels": y.flip(1), "mix_weight": torch.rand(3, B), "label_error_prob": torch.rand(3, B)}

    def all_of(logits, y, mixed_labels, mix_weight, label_error_prob):
        batch = Batch(y, y, mixed_labels, mix_weight, label_error_prob)
        own = mixed(loss, logits, batch), bootstrapped(loss, logits, batch)
        return *own, distilled(own[0], logits, logits.flip(0), 2.0, 0.3)

    together = torch.func.vmap(all_of)(logits, y, *extra.values())
    for k in range(3):
        for found, expected in zip(
            together, all_of(logits[k], y[k], *(v[k] for v in extra.values())), strict=True
        ):
            close(found[k], expected)


def test_cross_entropy_without_smoothing_is_torch_s_to_the_bit():
    logits, y = scores().float(), labels()
    for spread in ("all", "others"):
        assert torch.equal(cross_entropy(logits, y, spread=spread), F.cross_entropy(logits, y, reduction="none"))


@pytest.mark.parametrize("eps", [0.1, 0.95])
def test_smoothing_spreads_over_all_classes_or_over_the_others(eps):
    logits, y = scores(), labels()
    one_hot = F.one_hot(y, K).double()
    over_all = (1 - eps) * one_hot + eps / K
    close(cross_entropy(logits, y, smoothing=eps), against(over_all, logits))
    close(
        cross_entropy(logits, y, smoothing=eps), F.cross_entropy(logits, y, reduction="none", label_smoothing=eps)
    )
    over_others = (1 - eps) * one_hot + eps / (K - 1) * (1 - one_hot)
    close(cross_entropy(logits, y, smoothing=eps, spread="others"), against(over_others, logits))


def test_the_two_ways_to_smooth_are_one_with_another_eps():
    """eps over K classes leaves eps (K - 1) / K to the others."""
    logits, y = scores(), labels()
    close(
        cross_entropy(logits, y, smoothing=0.2 * (K - 1) / K, spread="others"),
        cross_entropy(logits, y, smoothing=0.2),
    )


def test_smoothing_over_the_others_holds_for_two_classes_and_for_one():
    logits, y = scores(classes=2), labels(2)
    flipped = against(F.one_hot(1 - y, 2).double(), logits)
    expected = 0.4 * against(F.one_hot(y, 2).double(), logits) + 0.6 * flipped
    close(cross_entropy(logits, y, smoothing=0.6, spread="others"), expected)
    close(cross_entropy(logits[:, :1], y * 0, smoothing=0.6, spread="others"), torch.zeros(B).double())


@pytest.mark.parametrize("margin", [1.0, 0.3])
def test_hinge_against_all_is_torch_s_multi_margin_loss(margin):
    logits, y = scores(), labels()
    close(hinge(logits, y, margin=margin), F.multi_margin_loss(logits, y, margin=margin, reduction="none"))


def test_hinge_by_hand():
    logits = torch.tensor([[2.0, 1.5, 0.5, 2.25], [5.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    y = torch.tensor([0, 0])  # slacks 0.5, none, 1.25; and none at all
    close(hinge(logits, y), torch.tensor([1.75 / 4, 0.0]).double())
    close(hinge(logits, y, rivals="strongest"), torch.tensor([1.25, 0.0]).double())
    close(hinge(logits, y, margin=0.5, rivals="strongest"), torch.tensor([0.75, 0.0]).double())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "cross_entropy", "smoothing": 1.0}, "local.loss.smoothing: 1.0 should be a number >= 0 and < 1"),
        ({"name": "cross_entropy", "spread": "some"}, 'local.loss.spread: "some" should be all or others'),
        ({"name": "hinge", "margin": 0.0}, "local.loss.margin: 0.0 should be a number > 0"),
        ({"name": "hinges"}, "local.loss.name: 'hinges' is unknown; did you mean 'hinge'?"),
    ],
    ids=str,
)
def test_a_wrong_option_is_one_line(spec, message):
    with pytest.raises(ConfigError) as error:
        LOSSES.resolve(spec)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_the_loss_of_a_mixture_is_the_cross_entropy_with_the_mixed_target():
    logits, other, share = scores(), labels().flip(0), torch.linspace(0, 1, B, dtype=torch.float64)
    target = share[:, None] * F.one_hot(labels(), K) + (1 - share)[:, None] * F.one_hot(other, K)
    close(mixed(cross_entropy, logits, a_batch(mixed_labels=other, mix_weight=share)), against(target, logits))


def test_bootstrapping_moves_the_target_to_what_the_network_says():
    logits, doubt = scores(), torch.linspace(0, 1, B, dtype=torch.float64)
    target = (1 - doubt)[:, None] * F.one_hot(labels(), K) + doubt[:, None] * F.one_hot(logits.argmax(1), K)
    found = bootstrapped(cross_entropy, logits, a_batch(label_error_prob=doubt))
    close(found, against(target, logits))
    assert found[-1] == cross_entropy(logits, logits.argmax(1))[-1]  # a sure mistake: its label has no say


def test_without_mixture_and_without_doubt_the_loss_is_itself_to_the_bit():
    logits, plain = scores(), cross_entropy(scores(), labels())
    none, all_of_it = torch.zeros(B).double(), torch.ones(B).double()
    for loss_of, batch in (
        (mixed, a_batch()),
        (mixed, a_batch(mixed_labels=labels().flip(0), mix_weight=all_of_it)),
        (bootstrapped, a_batch()),
        (bootstrapped, a_batch(label_error_prob=none)),
    ):
        assert torch.equal(loss_of(cross_entropy, logits, batch), plain)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_distillation_is_the_divergence_times_the_square_of_the_temperature(alpha):
    student, teacher, losses, t = scores(0), scores(1), torch.arange(B).double(), 3.0
    q, p = (teacher / t).softmax(1), (student / t).softmax(1)
    divergence = (q * (q.log() - p.log())).sum(1)
    close(distilled(losses, student, teacher, t, alpha), (1 - alpha) * losses + alpha * t**2 * divergence)


def test_a_student_that_agrees_learns_nothing_from_its_teacher():
    student = scores().requires_grad_()
    distilled(torch.zeros(B), student, scores() + 5, 2.0, 1.0).sum().backward()  # softmax forgets the 5
    close(student.grad, torch.zeros(B, K).double())


def test_the_teacher_gets_no_gradient_and_the_student_s_is_q_minus_p():
    """T^2 KL has the gradient T (p - q), which for high T is that of matching logits: (s - t) / K if centred."""
    student, teacher, t = scores(0).requires_grad_(), scores(1).requires_grad_(), 2.0
    distilled(torch.zeros(B), student, teacher, t, 1.0).sum().backward()
    assert teacher.grad is None
    close(student.grad, t * ((student / t).softmax(1) - (teacher / t).softmax(1)).detach())


def test_class_weights_are_scikit_learn_s_and_1_for_who_is_not_there():
    y = torch.tensor([3, 0, 0, 0, 3, 4])
    weights = balanced_weights(y, 6)
    close(weights, torch.tensor([6 / 9, 1, 1, 6 / 6, 6 / 3, 1]))
    balanced = compute_class_weight("balanced", classes=np.array([0, 3, 4]), y=y.numpy())
    close(weights[[0, 3, 4]], torch.from_numpy(balanced).float())


def test_with_class_weights_every_class_has_the_same_say_and_the_mean_weight_is_1():
    y = torch.tensor([0] * 50 + [1] * 7 + [2])
    each = balanced_weights(y, 3)[y]
    assert each.sum().item() == pytest.approx(len(y))
    shares = torch.zeros(3).index_add(0, y, each)
    torch.testing.assert_close(shares, torch.full((3,), len(y) / 3))
    assert torch.equal(balanced_weights(torch.arange(12) % 4, 4), torch.ones(4))


def test_oversampling_draws_every_class_present_and_every_example_of_it_alike():
    y = random(0, Stream.DATASET).permutation(np.repeat([5, 1, 8], [900, 90, 10]))
    drawn = np.concatenate([oversampled(y, random(0, Stream.BATCHES, k)) for k in range(30)])
    assert len(drawn) == 30 * len(y)
    n = len(drawn)
    for label in (1, 5, 8):
        assert abs((y[drawn] == label).sum() - n / 3) < 5 * (n * 2 / 9) ** 0.5
        times = np.bincount(drawn, minlength=len(y))[y == label]
        expected = n / 3 / (y == label).sum()
        assert (abs(times - expected) < 6 * expected**0.5 + 1).all()


def test_oversampling_depends_on_its_key_alone():
    y = np.array([0, 0, 0, 0, 1])
    first, again = (oversampled(y, random(3, Stream.BATCHES, 1, 2)) for _ in range(2))
    assert (first == again).all()
    assert not (first == oversampled(y, random(3, Stream.BATCHES, 1, 3))).all()
    assert (oversampled(np.array([7]), random(0, Stream.BATCHES)) == [0]).all()
