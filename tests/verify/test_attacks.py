"""Attacks on networks where the worst perturbation is known."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import kstest
from torch import nn

from corollary.base.errors import BadInput
from corollary.verify.attacks import (
    ascent_direction,
    fgsm,
    least_likely,
    pgd,
    step_least_likely,
    transfer,
)
from corollary.verify.classifier import log_odds_against, margin, predictions
from corollary.verify.reach import Reach
from corollary.verify.sets import Ball

NORMS = [math.inf, 2]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(classes: int = 2, width: int = 6, seed: int = 0) -> nn.Linear:
    net = nn.Linear(width, classes).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator(seed), dtype=torch.float64))
    return net


def perceptron(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 4)).double()


def inputs(n: int = 30, width: int = 6) -> torch.Tensor:
    return torch.rand(n, width, generator=generator(1), dtype=torch.float64)


def distance(change: torch.Tensor, norm: float) -> torch.Tensor:
    return change.flatten(1).norm(p=norm, dim=1)


@pytest.mark.parametrize("loss", ["cross-entropy", "margin"])
@pytest.mark.parametrize("norm", NORMS)
def test_one_step_on_two_linear_classes_is_the_worst_perturbation(loss, norm):
    net, x = linear(), inputs()
    y = predictions(net, x)
    radius = torch.linspace(0, 1, len(x), dtype=torch.float64)
    w = net.weight.detach()
    away = (w[1 - y] - w[y]) if len(y) else w
    with torch.no_grad():
        before = margin(net(x), y)
        after = margin(net(fgsm(net, x, y, radius, loss=loss, norm=norm)), y)
    dual = 1 if math.isinf(norm) else 2  # the best that any perturbation of that radius can do
    assert torch.allclose(after, before + radius * away.norm(p=dual, dim=1), atol=1e-12)


def test_log_odds_climb_as_the_cross_entropy_does():
    net, x = perceptron(), inputs()
    y = predictions(net, x)
    logits = net(x)
    assert torch.allclose(F.softplus(log_odds_against(logits, y)), F.cross_entropy(logits, y, reduction="none"))
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(net(point), y, reduction="sum"), point)
    assert torch.equal(ascent_direction(net, x, y), gradient.sign())
    unit = gradient / gradient.norm(dim=1, keepdim=True)
    assert torch.allclose(ascent_direction(net, x, y, norm=2), unit, atol=1e-12)


def test_a_sure_network_has_a_direction_where_its_cross_entropy_has_none():
    net, x = linear(classes=3).float(), inputs().float()

    def sure(inputs: torch.Tensor) -> torch.Tensor:
        return 1e4 * net(inputs)

    y = predictions(net, x)
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(sure(point), y, reduction="sum"), point)
    assert (gradient == 0).all(1).any()  # the float32 trap
    assert (ascent_direction(sure, x, y) != 0).all()
    assert torch.equal(ascent_direction(sure, x, y, loss="margin"), ascent_direction(net, x, y, loss="margin"))


def test_entries_without_a_gradient_stay():
    net = linear()
    with torch.no_grad():
        net.weight[:, 2] = 0
    x = inputs()
    moved = fgsm(net, x, predictions(net, x), 0.1) - x
    assert (moved[:, 2] == 0).all()
    assert torch.allclose(moved[:, [0, 1, 3, 4, 5]].abs(), torch.tensor(0.1, dtype=torch.float64))
    dead = pgd(lambda z: net(z) * 0, x, torch.zeros(len(x), dtype=torch.long), 0.1, norm=2)
    assert torch.equal(dead, x)


def test_the_step_to_the_least_likely_class_raises_it_most():
    net, x = linear(classes=5), inputs()
    y = least_likely(net, x)
    assert torch.equal(y, net(x).argmin(1))
    assert torch.equal(step_least_likely(net, x, 0.1), fgsm(net, x, y, 0.1, targeted=True))
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(net(point), y, reduction="sum"), point)
    assert torch.equal(step_least_likely(net, x, 0.1), x - 0.1 * gradient.sign())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("clip", [None, (0, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_attack_stays_in_its_ball_and_range(norm, clip, dtype):
    net, x = perceptron().to(dtype), inputs().to(dtype)
    y = predictions(net, x)
    radius = torch.rand(len(x), generator=generator(3), dtype=dtype)
    found = [
        fgsm(net, x, y, radius, norm=norm, clip=clip),
        step_least_likely(net, x, radius, norm=norm, clip=clip),
        pgd(net, x, y, radius, restarts=3, step=radius, norm=norm, clip=clip, generator=generator()),
        pgd(net, x, y, radius, restarts=2, keep="last", norm=norm, clip=clip, generator=generator()),
    ]
    rounding = 8 * torch.finfo(dtype).eps
    for adversarial in found:
        assert adversarial.dtype == dtype
        assert (distance(adversarial - x, norm) <= radius * (1 + rounding) + rounding).all()
        assert clip is None or ((adversarial >= 0) & (adversarial <= 1)).all()
        assert (distance(adversarial - x, norm) > 0).any()


@pytest.mark.parametrize("norm", NORMS)
def test_projected_gradient_finds_the_worst_point_of_a_linear_network(norm):
    net, x = linear(), inputs()
    y = predictions(net, x)
    w = net.weight.detach()
    exact = margin(net(x), y) + 0.3 * (w[1 - y] - w[y]).norm(p=1 if math.isinf(norm) else 2, dim=1)
    found = pgd(net, x, y, 0.3, loss="margin", norm=norm)
    assert torch.allclose(margin(net(found), y), exact, atol=1e-9)


def test_range_by_tensor_and_exact_worst_corner():
    net, x = linear(), inputs()
    y = predictions(net, x)
    low, high = torch.zeros(6, dtype=torch.float64), torch.linspace(1, 2, 6, dtype=torch.float64)
    w = net.weight.detach()
    away = w[1 - y] - w[y]
    corner = torch.where(away > 0, torch.minimum(x + 0.4, high), torch.maximum(x - 0.4, low))
    assert torch.allclose(pgd(net, x, y, 0.4, loss="margin", clip=(low, high)), corner, atol=1e-12)


def test_more_starts_never_lose():
    net, x = perceptron(), inputs()
    y = predictions(net, x)
    one, many = (
        margin(net(pgd(net, x, y, 0.5, steps=5, restarts=n, loss="margin", generator=generator())), y) for n in (1, 8)
    )
    assert (many >= one).all()
    assert (many > one).any()


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_are_uniform_in_the_ball(norm):
    n, d = 20_000, 3
    center = torch.zeros(n, d, dtype=torch.float64)
    points = Reach(Ball(center, 2.0, norm), None).draw(generator())
    share = (distance(points, norm) / 2) ** d  # uniform on [0, 1], if points are uniform in the ball
    assert kstest(share.numpy(), "uniform").statistic < 2 / math.sqrt(n)
    assert (points.mean(0).abs() < 5 * 2 / math.sqrt(3 * n)).all()


def test_the_best_point_visited_is_at_least_the_last_and_the_first():
    net, x = perceptron(), inputs()
    y = predictions(net, x)
    best, last = (pgd(net, x, y, 0.3, step=0.29, loss="margin", keep=keep) for keep in ("best", "last"))
    assert (margin(net(best), y) >= margin(net(last), y)).all()
    assert (margin(net(best), y) >= margin(net(x), y)).all()


def test_stopping_early_fools_the_same_inputs():
    net, x = perceptron(), inputs(200)
    y = predictions(net, x)
    patient, hasty = (pgd(net, x, y, 0.2, loss="margin", stop_early=early) for early in (False, True))
    fooled = predictions(net, patient) != y
    assert fooled.any()
    assert not fooled.all()
    assert torch.equal(predictions(net, hasty) != y, fooled)
    assert (margin(net(hasty), y) <= margin(net(patient), y) + 1e-12).all()


def test_a_target_is_reached():
    net, x = linear(classes=4), inputs()
    targets = (predictions(net, x) + 1) % 4
    found = pgd(net, x, targets, 50.0, loss="margin", targeted=True)
    assert torch.equal(predictions(net, found), targets)


def test_transfer_between_networks():
    first, second, x = linear(seed=0), linear(seed=5), inputs(200)
    y = predictions(first, x)
    itself = transfer(first, first, x, y, 0.3, attack=fgsm)
    assert itself.eligible.all()
    assert torch.equal(itself.fooled_source, itself.fooled_target)
    other = transfer(first, second, x, y, 0.3, loss="margin", clip=(0, 1))
    assert torch.equal(other.adversarial, pgd(first, x, y, 0.3, loss="margin", clip=(0, 1)))
    both = (predictions(first, x) == y) & (predictions(second, x) == y)
    assert torch.equal(other.eligible, both)
    share = (predictions(second, other.adversarial) != y)[both].double().mean()
    assert other.target_rate == pytest.approx(float(share))
    assert other.target_rate < other.source_rate


def test_nothing_is_written_to_the_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    net(inputs())
    net[1].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = inputs()
    with torch.no_grad():
        first = pgd(net, x, torch.zeros(len(x), dtype=torch.long), 0.1)
        again = pgd(net, x, torch.zeros(len(x), dtype=torch.long), 0.1)
    assert torch.equal(first, again)  # the dropout was off
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [module.training for module in net] == [True, False, True, True, True]
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not first.requires_grad


ZEROS = torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda net, x: fgsm(net, x + 2, ZEROS, 0.1, clip=(0, 1)), "out of the range clip="),
        (lambda net, x: fgsm.__wrapped__(net, x, ZEROS[:3], 0.1), "4 inputs but 3 labels"),
        (lambda net, x: fgsm(net, x, ZEROS + 7, 0.1), "label 7 is not one of the model's 2 classes"),
        (lambda net, x: fgsm(net, x, ZEROS, -0.1), "radius >= 0"),
        (lambda net, x: fgsm(net, x, ZEROS, math.inf), "a radius is not finite"),
        (lambda net, x: fgsm(net, x, ZEROS, torch.ones(3)), "one for each of 4 samples"),
        (lambda net, x: fgsm(net, x, ZEROS, 0.1, norm=1), "infinity .* or 2"),
        (lambda net, x: fgsm(net, x * math.nan, ZEROS, 0.1), "24 NaN"),
        (lambda net, x: fgsm(net, x[:0], ZEROS[:0], 0.1), "x is empty"),
        (lambda net, x: fgsm(lambda z: net(z) / 0, x, ZEROS, 0.1), "the model's logits has"),
        (lambda net, x: fgsm(lambda z: net(z)[:, :1], x, ZEROS, 0.1), r"returned \[4, 1\]"),
        (lambda net, x: fgsm(lambda z: net(z).detach(), x, ZEROS, 0.1), "carry no gradient"),
        (lambda net, x: pgd(net, x, ZEROS, 0.1, restarts=2), "2 starts need a generator"),
        (lambda net, x: pgd(net, x, ZEROS, 0.1, steps=0), "one step and one start or more"),
    ],
)
def test_misuse_is_explained(call, text):
    with pytest.raises(BadInput, match=text):
        call(linear(), inputs(4))
