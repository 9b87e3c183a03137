"""Plans for large batches: their numbers, their schedules, and the five ways to train."""

import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.dynamics.large_batch import (
    SETTINGS,
    LargeBatchPlan,
    adapt_regime,
    generalisation_gap,
    scale_learning_rate,
)


def test_rules_of_the_learning_rate():
    assert scale_learning_rate(0.1, 256, 16) == pytest.approx(0.4)
    assert scale_learning_rate(0.1, 256, 16, "linear") == pytest.approx(1.6)
    assert scale_learning_rate(0.1, 16, 64) == pytest.approx(0.05)


def test_the_root_keeps_the_covariance_of_an_update():
    """The mean of B independent gradients, times a rate that grows as the root of B, has one variance for all B."""
    gradients = torch.randn(4096, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def variance(batch: int) -> float:
        steps = scale_learning_rate(0.1, batch, 4) * gradients[:, :batch].mean(1)
        return float(steps.var())

    assert variance(64) == pytest.approx(variance(4), rel=0.02)


def test_a_regime_is_stretched():
    assert adapt_regime({0: 0.1, 81: 0.01}, 2048 / 128) == {0: 0.1, 1296: 0.01}
    assert adapt_regime({10: "drop"}, 1.5) == {20: "drop"}


def test_a_plan_makes_as_many_updates():
    plan = LargeBatchPlan(base_batch=128, base_learning_rate=0.1, base_epochs=200, batch=2048)
    assert (plan.ratio, plan.learning_rate, plan.epochs, plan.virtual_batch) == (16, pytest.approx(0.4), 3200, 128)
    assert plan.epochs * 50_000 / 2048 >= 200 * 50_000 / 128


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def test_five_ways_to_train():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 2, generator=generator)
    table = generalisation_gap(make, (x, (x[:, 0] > 0).long()), 4, 16, 2, [0, 1], train_samples=80)
    assert table["setting"] == [name for name in SETTINGS for _ in range(2)]
    assert table["updates"][::2] == [40, 10, 10, 10, 40]
    assert all(0.5 < accuracy <= 1 for accuracy in table["accuracy"][:2])


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: scale_learning_rate(0.1, 0, 4), "at least 1"),
        (lambda: scale_learning_rate(0.0, 4, 4), "above 0"),
        (lambda: adapt_regime({}, 0.5), "at least 1"),
        (lambda: LargeBatchPlan(8, 0.1, 10, 4), "larger batch"),
        (
            lambda: generalisation_gap(make, (torch.zeros(9, 2), torch.zeros(9).long()), 4, 4, 1, [0], train_samples=8),
            "small < large",
        ),
    ],
)
def test_bad_input(call, word):
    with pytest.raises(BadInput, match=word):
        call()
