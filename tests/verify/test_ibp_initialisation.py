import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from corollary.base.errors import BadInput
from corollary.verify.ibp_initialisation import (
    has_conflicting_signs,
    ibp_init_,
    init_tightness,
    is_propagation_invariant,
    product_radii,
    reconstruction_tightness,
)


def gaussian(*widths, draws=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(draws, after, before, generator=generator, dtype=torch.float64)
        for before, after in pairwise(widths)
    ]


def test_closed_form_at_width_one_and_two():
    assert init_tightness((3, 1, 3)) == pytest.approx(1.0)  # one path an entry
    # width 2: E sqrt(a^2 + b^2) over E (|a| + |b|) of normal a, b, which is sqrt(pi / 2) over 2 sqrt(2 / pi)
    assert init_tightness((3, 2, 3)) == pytest.approx(math.pi / 4)
    assert init_tightness((3, 5)) == 1.0


def test_closed_form_is_the_ratio_of_means():
    radii = product_radii(gaussian(20, 15, 12, 10, draws=3000))
    found = float(radii.optimal.mean() / radii.interval.mean())
    assert found == pytest.approx(init_tightness((20, 15, 12, 10)), rel=0.01)  # a standard error of 0.2 %


def test_limits_in_width_and_depth():
    assert init_tightness((9, 10**6, 9)) * math.sqrt(2e6 / math.pi) == pytest.approx(1.0, abs=1e-6)
    assert init_tightness((9, 30, 30, 30, 9)) == pytest.approx(init_tightness((9, 30, 9)) ** 3)


def test_radii_are_those_of_the_vertices():
    first, second = (weight[0] for weight in gaussian(4, 5, 3))
    eps = torch.tensor([0.5, 1.0, 0.0, 2.0], dtype=torch.float64)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4).double()
    reached = (signs * eps) @ (second @ first).T
    radii = product_radii([first, second], eps)
    assert torch.allclose(radii.optimal, reached.amax(0))
    hidden = first.abs() @ eps
    assert torch.allclose(radii.interval, second.abs() @ hidden)
    assert bool((radii.tightness < 1).any())


def test_reconstruction_tends_to_its_closed_form():
    errors = []
    for dimension in (50, 200, 800):
        basis = torch.linalg.qr(gaussian(20, dimension, draws=8)[0])[0]
        radii = product_radii([basis.mT, basis])
        errors.append(abs(float(radii.optimal.mean() / radii.interval.mean()) / reconstruction_tightness(20) - 1))
    assert errors[2] < 0.02
    assert errors[0] > 2 * errors[2]


def flip(weights, seed=0):
    generator = torch.Generator().manual_seed(seed)
    widths = [weights[0].shape[1], *(weight.shape[0] for weight in weights)]
    signs = [2.0 * torch.randint(2, (width,), generator=generator) - 1 for width in widths]
    return [b[:, None] * w * a for w, a, b in zip(weights, signs, signs[1:], strict=False)]


def test_invariance_is_what_the_radii_say():
    random = [weight[0] for weight in gaussian(4, 5, 3)]
    positive = [weight.abs() for weight in random]
    zeros = [torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), torch.eye(2, dtype=torch.float64)]
    crossing = [zeros[0], torch.ones(1, 2, dtype=torch.float64)]
    for weights, wanted in (
        (random, False),
        (positive, True),
        (flip(positive), True),
        (zeros, True),
        (crossing, False),
    ):
        assert is_propagation_invariant(weights) == wanted
        tau = product_radii(weights).tightness
        assert bool((tau >= 1 - 1e-12).all()) == wanted


def test_small_weights_count_as_zero_within_the_tolerance():
    nearly = [torch.tensor([[1.0, 1e-9], [1.0, -1.0]]), torch.tensor([[1.0, 1.0]])]
    assert not is_propagation_invariant(nearly)
    assert is_propagation_invariant(nearly, tol=1e-6)


def test_a_negative_minor_is_found_by_looking_at_all():
    products = torch.randint(-1, 2, (200, 3, 4), generator=torch.Generator().manual_seed(0)).double()
    signs = products.sign()
    wanted = torch.zeros(200, dtype=torch.bool)
    for i in range(3):
        for k in range(i):
            for j in range(4):
                for m in range(j):
                    wanted |= signs[:, i, j] * signs[:, i, m] * signs[:, k, j] * signs[:, k, m] < 0
    assert torch.equal(has_conflicting_signs(products), wanted)
    assert 20 < int(wanted.sum()) < 200


def radius_growth(net, channels):
    radius = torch.ones(1, *channels)
    for layer in net:
        if isinstance(layer, nn.ReLU):
            radius = radius / 2  # of many units half are active
        else:
            with torch.no_grad():
                layer.weight.abs_()
                layer.bias.zero_()
            radius = layer(radius)
    return float(radius.detach().mean())


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (nn.Sequential(nn.Linear(400, 500), nn.ReLU(), nn.Linear(500, 600), nn.ReLU()), (400,)),
        (nn.Sequential(nn.Conv2d(40, 60, 3, padding=1, padding_mode="circular", groups=2), nn.ReLU()), (40, 6, 6)),
        (nn.Sequential(nn.ConvTranspose2d(40, 60, 2, stride=1), nn.ReLU()), (40, 30, 30)),
    ],
    ids=["linear", "grouped convolution", "transposed convolution"],
)
def test_initialisation_keeps_the_radius(net, shape):
    assert ibp_init_(net, torch.Generator().manual_seed(0)) is net
    assert radius_growth(net, shape) == pytest.approx(1.0, rel=0.08)  # the border of the transposed one has less


def test_what_is_refused():
    with pytest.raises(BadInput, match="W_2 takes 3 inputs, W_1 has 5"):
        product_radii([torch.ones(5, 4), torch.ones(2, 3)])
    with pytest.raises(BadInput, match="none was given"):
        product_radii([])
    with pytest.raises(BadInput, match="two widths"):
        init_tightness((3,))
    with pytest.raises(BadInput, match="1 dimension or more"):
        reconstruction_tightness(0)
    with pytest.raises(BadInput, match="0 or more; got -1"):
        is_propagation_invariant([torch.ones(1, 1)], tol=-1.0)
    with pytest.raises(BadInput, match="no linear or convolutional layer"):
        ibp_init_(nn.ReLU())
    with pytest.raises(BadInput, match="before parametrising"):
        ibp_init_(weight_norm(nn.Linear(2, 2)))
