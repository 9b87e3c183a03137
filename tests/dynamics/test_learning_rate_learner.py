"""Polyak's settings from known spectra, and the optimizer in loops of a user's own."""

import copy
import math

import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.dynamics.learning_rate_learner import PRODUCT_COST, LearningRateLearner, heavy_ball_from_spectrum
from corollary.linalg import SYMMETRIC, Operator, SpectralDensity, spectral_density


def density(*values: float) -> SpectralDensity:
    diagonal = torch.tensor(values, dtype=torch.float64)
    op = Operator((len(values), len(values)), lambda x: diagonal[:, None] * x, None, {SYMMETRIC})
    return spectral_density(op, steps=len(values), probes=400, generator=torch.Generator().manual_seed(0))


def quadratic(curvatures: torch.Tensor) -> tuple[nn.Parameter, object]:
    weights = nn.Parameter(torch.ones_like(curvatures))
    return weights, lambda: 0.5 * (curvatures * weights**2).sum()


def test_polyak_on_a_quadratic_converges_at_the_root_of_the_momentum():
    largest, smallest = 9.0, 1.0
    known = density(largest, *[smallest] * 3)
    found = heavy_ball_from_spectrum(known, weight_decay=0.0)
    mean = known.mean(torch.abs).value
    above = math.sqrt(largest) + math.sqrt(mean)
    assert found.learning_rate == pytest.approx((2 / above) ** 2)
    assert found.momentum == pytest.approx(((math.sqrt(largest) - math.sqrt(mean)) / above) ** 2)
    # With a mean curvature below the smallest one the settings are the optimal ones of [decay, largest + decay].
    decayed = heavy_ball_from_spectrum(density(8.0, 1e-9, 1e-9, 1e-9), weight_decay=4.0)
    assert decayed.learning_rate == pytest.approx((2 / (math.sqrt(12) + 2)) ** 2)
    assert decayed.momentum == pytest.approx(((math.sqrt(12) - 2) / (math.sqrt(12) + 2)) ** 2)
    curvatures = torch.tensor([4.0, 12.0], dtype=torch.float64)
    w, v = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for _ in range(200):
        v = decayed.momentum * v + curvatures * w
        w = w - decayed.learning_rate * v
    rate = math.exp(math.log(float(w.norm())) / 200)
    assert rate == pytest.approx(math.sqrt(decayed.momentum), rel=0.04)  # a double root adds a factor of t to the power


def test_equal_curvatures_need_one_step():
    settings = heavy_ball_from_spectrum(density(5.0, 5.0, 5.0))
    assert settings == pytest.approx((1 / 5.0, 0.0), abs=1e-12)


def test_settings_do_not_depend_on_the_sign_and_zero_curvature_is_refused():
    assert heavy_ball_from_spectrum(density(-4.0, -4.0)) == heavy_ball_from_spectrum(density(4.0, 4.0))
    with pytest.raises(BadInput, match="curvature above 0"):
        heavy_ball_from_spectrum(density(0.0, 0.0))
    with pytest.raises(BadInput, match="weight decay"):
        heavy_ball_from_spectrum(density(1.0, 1.0), weight_decay=-1.0)


def test_a_loop_with_a_closure_solves_a_quadratic():
    weights, loss = quadratic(torch.tensor([9.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    optimizer = LearningRateLearner([weights], every=1000, steps=4, probes=8, scale=1.0)
    for _ in range(150):
        optimizer.step(loss)
    assert float(weights.detach().norm()) < 1e-12
    assert optimizer.products == 16  # two distinct curvatures: each probe ends after two steps
    assert optimizer.extra_gradients == PRODUCT_COST * 16 + 1


def test_a_loop_with_an_own_backward_pass_is_the_same():
    curvatures = torch.tensor([3.0, 0.5], dtype=torch.float64)
    first, loss = quadratic(curvatures)
    second, own = quadratic(curvatures)
    one, two = LearningRateLearner([first], every=5), LearningRateLearner([second], every=5)
    for _ in range(12):
        returned = one.step(loss)
        if two.due:
            two.refresh(own)
        two.zero_grad()
        value = own()
        value.backward()
        assert two.step() is None
        assert torch.equal(returned, value.detach())
    assert torch.equal(first, second)
    assert one.settings == two.settings


def test_with_its_settings_held_it_is_pytorchs_sgd():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    x, y = torch.randn(7, 3), torch.randn(7, 2)
    learner = LearningRateLearner(ours.parameters(), every=100, weight_decay=0.01)
    learner.refresh(lambda: nn.functional.mse_loss(ours(x), y))
    plain = torch.optim.SGD(
        theirs.parameters(), lr=learner.settings.learning_rate, momentum=learner.settings.momentum, weight_decay=0.01
    )
    for _ in range(5):
        learner.step(lambda: nn.functional.mse_loss(ours(x), y))
        plain.zero_grad()
        nn.functional.mse_loss(theirs(x), y).backward()
        plain.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_where_curvature_rises_the_rate_falls_at_once_and_the_other_way_slowly():
    scale = torch.tensor(1.0, dtype=torch.float64)
    weights = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = LearningRateLearner([weights], steps=3, scale=1.0, memory=0.5)

    def loss() -> torch.Tensor:
        return 0.5 * scale * (weights**2).sum()

    assert optimizer.refresh(loss).learning_rate == pytest.approx(1.0)
    scale *= 16
    assert optimizer.refresh(loss).learning_rate == pytest.approx(1 / 16)
    scale /= 16
    assert optimizer.refresh(loss).learning_rate == pytest.approx(1 / 4)  # half way, in logarithms
    scale *= 0
    kept = optimizer.settings
    assert optimizer.refresh(loss) == kept  # nothing to learn from a flat loss


def test_dropout_is_the_same_in_all_products_and_batch_statistics_are_allowed():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 3))
    x, y = torch.randn(32, 6), torch.randint(3, (32,))
    optimizer = LearningRateLearner(net.parameters(), every=3)
    losses = [float(optimizer.step(lambda: nn.functional.cross_entropy(net(x), y))) for _ in range(40)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert optimizer.settings.learning_rate > 0


def test_a_state_dict_carries_everything():
    curvatures = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)
    first, loss = quadratic(curvatures)
    optimizer = LearningRateLearner([first], every=4, steps=2)
    for _ in range(6):
        optimizer.step(loss)
    second, own = quadratic(curvatures)
    with torch.no_grad():
        second.copy_(first)
    resumed = LearningRateLearner([second], every=4, steps=2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # PyTorch would share the momentum buffers
    for _ in range(6):
        optimizer.step(loss)
        resumed.step(own)
    assert torch.equal(first, second)
    assert resumed.products == optimizer.products


def test_groups_share_one_rate_and_frozen_parameters_stay():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    net[0].bias.requires_grad_(False)
    kept = net[0].bias.clone()
    optimizer = LearningRateLearner([{"params": net[0].parameters()}, {"params": net[2].parameters()}])
    x, y = torch.randn(9, 3), torch.randint(2, (9,))
    optimizer.step(lambda: nn.functional.cross_entropy(net(x), y))
    assert optimizer.param_groups[0]["lr"] == optimizer.param_groups[1]["lr"] > 0
    assert torch.equal(net[0].bias, kept)


def test_misuse_is_explained():
    weights, loss = quadratic(torch.ones(2))
    with pytest.raises(BadInput, match="no learning rate yet"):
        LearningRateLearner([weights]).step()
    with pytest.raises(BadInput, match="at least 1"):
        LearningRateLearner([weights], every=0)
    with pytest.raises(BadInput, match="memory"):
        LearningRateLearner([weights], memory=1.0)

    def conventional() -> torch.Tensor:
        value = loss()
        value.backward()
        return value

    with pytest.raises(BadInput, match="called backward itself"):
        LearningRateLearner([weights]).step(conventional)
    learner = LearningRateLearner([weights])
    learner.refresh(loss)
    with pytest.raises(BadInput, match="called backward itself"):
        learner.step(conventional)
    with pytest.raises(BadInput, match="do not depend"):
        LearningRateLearner([weights]).refresh(lambda: torch.ones(()))
    with pytest.raises(BadInput, match="one number"):
        LearningRateLearner([weights]).refresh(lambda: weights**2)
