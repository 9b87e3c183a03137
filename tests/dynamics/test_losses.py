"""The half square loss: its value, its curvature, and shapes that do not fit."""

import pytest
import torch

from corollary.base.errors import BadInput
from corollary.dynamics.losses import half_square


def test_value_is_half_the_mean_squared_distance() -> None:
    assert half_square(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 4.0]])) == 21 / 4


def test_second_derivative_in_an_output_is_one_over_n() -> None:
    second = torch.func.hessian(lambda z: half_square(z, torch.zeros(4, dtype=z.dtype)))(torch.randn(4).double())
    torch.testing.assert_close(second, torch.eye(4).double() / 4)


def test_one_output_may_keep_its_axis() -> None:
    z, y = torch.randn(5, 1), torch.randn(5)
    torch.testing.assert_close(half_square(z, y), half_square(z[:, 0], y))


def test_classes_as_numbers_are_refused() -> None:
    with pytest.raises(BadInput, match="one-hot"):
        half_square(torch.zeros(3, 10), torch.zeros(3))
