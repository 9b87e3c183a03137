"""Laws of diffusion: exact ones are recognised, and records are read."""

import numpy as np
import pytest
import torch

from corollary.base.errors import BadInput
from corollary.dynamics.weight_diffusion import fit_diffusion, weight_distance
from corollary.engine import TrainingRecord

T = np.unique(np.geomspace(1, 2000, 40).round())


def test_a_logarithm_is_recognised():
    fit = fit_diffusion(T, 2 + 0.7 * np.log(T), skip=1)
    assert (fit.slope, fit.intercept, fit.r2_log) == pytest.approx((0.7, 2, 1), abs=1e-12)
    assert fit.r2_root < 0.9
    assert fit.at([1.0, np.e]) == pytest.approx([2, 2.7], abs=1e-12)


def test_ordinary_diffusion_is_a_root_and_a_power_of_one_half():
    fit = fit_diffusion(T, 3 * np.sqrt(T), skip=1)
    assert (fit.r2_root, fit.r2_power, fit.exponent) == pytest.approx((1, 1, 0.5), abs=1e-9)
    assert fit.r2_log < 0.95


def test_the_first_updates_are_left_out():
    distance = np.where(T < 5, 100.0, 2 + np.log(T))
    assert fit_diffusion(T, distance).r2_log == pytest.approx(1, abs=1e-12)
    assert fit_diffusion(T, distance, skip=1).r2_log < 0.9


def test_records_of_one_network_and_of_several():
    one, several = TrainingRecord(), TrainingRecord()
    for step in range(4):
        one.log(step, distance=float(step))
        several.log(step, distance=torch.tensor([step, 2.0 * step]))
    assert weight_distance(one).updates.tolist() == [1, 2, 3]
    assert weight_distance(several, member=1).distance.tolist() == [2, 4, 6]
    with pytest.raises(BadInput, match="2 networks"):
        weight_distance(several)


def test_too_little_is_refused():
    with pytest.raises(BadInput, match="at least 4"):
        fit_diffusion([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6])
