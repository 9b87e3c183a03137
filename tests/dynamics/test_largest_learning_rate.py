"""The largest rate that trains, where it is known: a quadratic loss diverges above 2 over its curvature."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.dynamics.largest_learning_rate import LargestRates, largest_stable_learning_rate
from corollary.dynamics.losses import half_square
from corollary.engine import adam

GRID = [2.0 ** (k / 2) for k in range(-6, 7)]


def line() -> nn.Module:
    return nn.Linear(1, 1, bias=False)


def data(samples: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(samples, 1), torch.zeros(samples, 1)


def search(**more) -> LargestRates:
    return largest_stable_learning_rate(line, data(), [4, 16], GRID, loss=half_square, success=1e-3, **more)


def test_a_quadratic_diverges_above_two_over_its_curvature():
    """The curvature is 1 for every batch; 2 itself neither shrinks nor grows the error."""
    found = search(steps=60)
    assert found.largest.tolist() == pytest.approx([2**0.5, 2**0.5])
    assert found.bounded == (True, True)
    assert found.exponent().exponent == pytest.approx(0, abs=1e-9)
    assert found.figure().svg().startswith("<svg")
    assert list(found.table()) == ["batch_size", "largest_rate", "bounded"]


def test_every_seed_must_succeed_and_a_grid_that_ends_too_soon_is_told():
    losses = torch.tensor([[[0.1, 0.1], [0.1, 2.0], [5.0, 5.0]], [[0.1, 0.1], [0.1, 0.1], [0.1, 0.1]]])
    rates = LargestRates((2, 4), (0.1, 0.2, 0.4), losses, 1.0, "sgd", 10)
    assert rates.largest.tolist() == [0.1, 0.4]
    assert rates.bounded == (True, False)
    with pytest.raises(BadInput, match="widen"):
        rates.exponent()
    none = LargestRates((2,), (0.1, 0.2), torch.full((1, 2, 1), math.inf), 1.0, "sgd", 10)
    assert math.isnan(none.largest[0])
    assert none.bounded == (False,)


def test_adam_and_the_same_seed_twice(tmp_path):
    first = search(steps=30, optimizer=adam(), folder=tmp_path, seeds=3)
    again = search(steps=30, optimizer=adam(), seeds=3)
    resumed = search(steps=30, optimizer=adam(), folder=tmp_path, seeds=3)
    assert first.optimizer == "adam"
    assert torch.equal(first.losses, again.losses)
    assert torch.equal(first.losses, resumed.losses)
    assert len(list(tmp_path.iterdir())) == 2
    assert first.losses.shape == (2, len(GRID), 3)
    assert not np.isnan(first.largest).any()


def test_bad_input_is_refused():
    for bad, match in (
        ({"batch_sizes": [17]}, "between 1 and all 16"),
        ({"learning_rates": [0.0]}, "positive"),
        ({"learning_rates": []}, "positive"),
        ({"seeds": 0}, "at least one seed"),
    ):
        settings = {"batch_sizes": [4], "learning_rates": [0.1], "steps": 2, "loss": half_square, **bad}
        with pytest.raises(BadInput, match=match):
            largest_stable_learning_rate(line, data(), **settings)
