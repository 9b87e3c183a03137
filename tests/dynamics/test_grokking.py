import math

import numpy as np
import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.dynamics.grokking import affine_share, grokking_delay, odd_fraction, outputs_of
from corollary.engine import TrainingRecord, fit, population


def record_of(**columns):
    record = TrainingRecord()
    for row, values in enumerate(zip(*columns.values(), strict=True)):
        record.log(10 * row, **dict(zip(columns, values, strict=True)))
    return record


def test_delay_is_between_the_first_steps_that_reach():
    record = record_of(train_accuracy=[0.5, 1.0, 0.9, 1.0, 1.0], test_accuracy=[0.5, 0.5, 0.6, 0.94, 0.96])
    found = grokking_delay(record)
    assert found == (10, 40)
    assert found.delay == 30
    assert grokking_delay(record, fit=0.9, generalise=0.6) == (10, 20)


def test_delay_is_not_a_number_where_one_of_the_two_never_came():
    record = record_of(train_accuracy=[0.5, 1.0], test_accuracy=[0.5, 0.9])
    found = grokking_delay(record)
    assert found.fit == 10
    assert math.isnan(found.generalise)
    assert math.isnan(found.delay)


def test_delay_skips_steps_at_which_nothing_was_measured():
    record = TrainingRecord()
    record.log(0, train_accuracy=0.3)
    record.log(5, train_accuracy=1.0, test_accuracy=0.2)
    record.log(9, test_accuracy=1.0)
    assert grokking_delay(record) == (5, 9)


def test_delay_of_records_that_the_library_makes():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    data = (x, (x[:, 0] > 0).long())
    single = fit(nn.Linear(3, 2), data, steps=60, validation=data, record_every=10, optimizer=_fast_adam)
    found = grokking_delay(single.record, fit=0.9, generalise=0.9)
    assert found.delay == 0  # it is tested on the training set
    assert found.fit > 0
    several = population(lambda: nn.Linear(3, 2), data, size=2, steps=20, validation=data, record_every=10)
    with pytest.raises(BadInput, match="one network at a time"):
        grokking_delay(several.record)
    assert grokking_delay(several.record.member(0), fit=0.1, generalise=0.1) == (0, 0)


def _fast_adam(parameters):
    return torch.optim.Adam(parameters, lr=0.1)


def test_rounding_of_a_float32_mean_does_not_hide_a_fit():
    assert grokking_delay(record_of(train_accuracy=[np.float32(1) - 1e-7], test_accuracy=[1.0])).fit == 0


@pytest.mark.parametrize(
    ("columns", "options", "words"),
    [
        ({"train_accuracy": [1.0]}, {}, "no column 'test_accuracy'"),
        ({"test_accuracy": [1.0]}, {}, "no column 'accuracy'"),
        ({"train_accuracy": [1.0], "test_accuracy": [1.0]}, {"fit": 0}, r"fit is an accuracy in \(0, 1\]"),
        ({"train_accuracy": [1.0], "test_accuracy": [1.0]}, {"generalise": 1.1}, "generalise is an accuracy"),
    ],
)
def test_records_without_what_it_takes_are_refused(columns, options, words):
    with pytest.raises(BadInput, match=words):
        grokking_delay(record_of(**columns), **options)


class Cubic(nn.Module):
    """Odd and even parts by hand."""

    def __init__(self, odd, even):
        super().__init__()
        self.odd, self.even = odd, even

    def forward(self, x):
        return self.odd * x**3 + self.even * x**2


def test_odd_fraction_of_functions_whose_parts_are_known():
    x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]], dtype=torch.float64)  # symmetric: the parts are orthogonal
    assert odd_fraction(Cubic(3.0, 0.0), x) == pytest.approx(1, abs=1e-12)
    assert odd_fraction(Cubic(0.0, 3.0), x) == pytest.approx(0, abs=1e-12)
    odd, even = float((x**6).sum()), float((2 * x**2).square().sum())
    assert odd_fraction(Cubic(1.0, 2.0), x) == pytest.approx(odd / (odd + even), abs=1e-12)


def test_odd_part_of_a_two_layer_relu_network_is_its_linear_part():
    generator = torch.Generator().manual_seed(0)
    weight, signs = torch.randn(7, 4, generator=generator).double(), torch.randn(7, generator=generator).double()
    net = nn.Sequential(nn.Linear(4, 7, bias=False), nn.ReLU(), nn.Linear(7, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(weight)
        net[2].weight.copy_(signs[None])
    x = torch.randn(50, 4, generator=generator).double()
    linear = x @ weight.T @ signs / 2
    wanted = float(linear.square().sum() / net(x).detach().square().sum())
    assert odd_fraction(net, x) == pytest.approx(wanted, rel=1e-12)


def test_outputs_are_those_of_evaluation_mode_and_the_module_keeps_its_own():
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train()
    x = torch.randn(9000, 3)
    assert torch.allclose(outputs_of(net, x), net[0](x).detach(), atol=1e-6)  # 3 batches
    assert net.training
    assert net[1].training


def test_outputs_that_mean_nothing_are_refused():
    with pytest.raises(BadInput, match="zero on all inputs"):
        odd_fraction(Cubic(0.0, 0.0), torch.ones(3, 1))
    with pytest.raises(BadInput, match="NaN or infinite"):
        odd_fraction(Cubic(math.nan, 0.0), torch.ones(3, 1))
    with pytest.raises(BadInput, match="at least one sample"):
        odd_fraction(Cubic(1.0, 0.0), torch.ones(0, 1))


def test_affine_share_of_an_affine_function_is_one_and_of_a_square_is_none():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 5, generator=generator, dtype=torch.float64)
    x[:, 2] = 1.0  # a constant input
    fit_x, held_out = x[:200], x[200:]
    slope = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    exact = affine_share(fit_x, fit_x @ slope + 1, held_out, held_out @ slope + 1)
    assert exact.r2 == pytest.approx(1, abs=1e-10)
    assert torch.allclose(exact.fitted, exact.outputs)
    square = affine_share(fit_x, fit_x[:, 0] ** 2, held_out, held_out[:, 0] ** 2)
    assert square.r2 < 0.1  # uncorrelated with the inputs: only noise of the fit, which counts against it


def test_affine_share_of_a_mixture_is_its_share_of_the_variance():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40_000, 2, generator=generator, dtype=torch.float64)
    outputs = x[:, 0] + x[:, 0] ** 2  # variances 1 and 2, uncorrelated
    found = affine_share(x[:20_000], outputs[:20_000], x[20_000:], outputs[20_000:])
    assert found.r2 == pytest.approx(1 / 3, abs=0.02)  # standard error below 0.01 at 20,000 samples


def test_affine_share_refuses_what_cannot_be_fitted():
    x = torch.randn(9, 5)
    with pytest.raises(BadInput, match="twice as many samples, got 9"):
        affine_share(x, x, x, x)
    x = torch.randn(20, 5)
    with pytest.raises(BadInput, match="nothing to explain"):
        affine_share(x, x, x, torch.ones(20, 5))
