from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from corollary.base.errors import BadInput
from corollary.dynamics.slab_data import SLAB_LAW, concat_blocks, slab_data, slab_linear_accuracy

DOUBLE = {"dtype": torch.float64}


@pytest.fixture(scope="module")
def drawn():
    """One coordinate of each kind, not rotated."""
    return slab_data(40_000, slabs={3: 1, 5: 1, 7: 1}, noise=0.2, rotate=False, seed=1, **DOUBLE)


def slab_of(u, slabs, margin=0.1):
    """The slab each value lies in, counted from the centre, by the intervals of the definition."""
    width = (2 - 2 * (slabs - 1) * margin) / slabs
    place = torch.full(u.shape, -1)
    for j in range(slabs // 2 + 1):
        low, high = (
            (0.0, width / 2) if j == 0 else ((j - 0.5) * width + 2 * j * margin, (j + 0.5) * width + 2 * j * margin)
        )
        place[(u.abs() >= low - 1e-12) & (u.abs() <= high + 1e-12)] = j
    return place


@pytest.mark.parametrize(("column", "slabs"), [(1, 3), (2, 5), (3, 7)])
def test_slabs_have_their_law_and_nothing_lies_between(drawn, column, slabs):
    u = drawn.x[:, column]
    place = slab_of(u, slabs)
    assert (place >= 0).all()
    assert torch.equal(place % 2, drawn.y)
    for label in (0, 1):
        own = place[drawn.y == label]
        for j, wanted in SLAB_LAW[slabs][label].items():
            # 20,000 samples a class: standard error at most 0.0035, five of them.
            assert float((own == j).double().mean()) == pytest.approx(float(wanted), abs=0.018)
    assert float((u > 0).double().mean()) == pytest.approx(0.5, abs=0.013)


def test_values_are_uniform_inside_a_slab(drawn):
    u = drawn.x[:, 2]
    width = (2 - 8 * 0.1) / 5
    for low, inside in ((0.0, u.abs()[u.abs() < width / 2 + 0.01]), (0.5 * width + 0.2, u[(u > 0.2) & (u < 0.6)])):
        spread = (inside - low) / (width / 2 if low == 0 else width)
        assert float(spread.mean()) == pytest.approx(0.5, abs=0.015)
        assert float(spread.var()) == pytest.approx(1 / 12, abs=0.005)
        assert 0 <= float(spread.min()) < 0.01
        assert 0.99 < float(spread.max()) <= 1 + 1e-12


def test_the_linear_coordinate_and_its_noise(drawn):
    u = drawn.x[:, 0]
    noisy = u.abs() < 0.1
    assert int(noisy.sum()) == 8000  # exactly a fifth
    assert ((u > 0) == (drawn.y == 1))[~noisy].all()
    # Noise is a value, not a flipped label: half of the noisy ones still have the right sign.
    assert float(((u > 0) == (drawn.y == 1)).double().mean()) == pytest.approx(1 - 0.2 / 2, abs=0.013)
    assert float(u[noisy].var()) == pytest.approx(0.1**2 / 3, rel=0.05)
    assert float(u.abs().max()) <= 1


def test_coordinates_are_independent_given_the_class(drawn):
    for label in (0, 1):
        correlation = torch.corrcoef(drawn.x[drawn.y == label].abs().T)
        assert float((correlation - torch.eye(4)).abs().max()) < 0.036  # five standard errors


def test_threshold_accuracies_are_the_closed_forms():
    assert [slab_linear_accuracy(k) for k in (1, 3, 5, 7)] == [1, Fraction(3, 4), Fraction(11, 16), Fraction(5, 8)]


@pytest.mark.parametrize("slabs", [3, 5, 7])
def test_threshold_accuracies_are_the_best_over_all_thresholds(slabs):
    """By brute force on the law itself: a mass at each quarter of each slab, thresholds between all neighbours."""
    masses = []
    for label in (0, 1):
        for place, chance in SLAB_LAW[slabs][label].items():
            sides = (0,) if place == 0 else (-place, place)
            masses += [(10 * side + quarter, label, chance / len(sides) / 4) for side in sides for quarter in range(4)]
    masses.sort()
    best = Fraction(0)
    for low, high in pairwise([(-99, 0, 0), *masses, (99, 0, 0)]):
        cut = Fraction(low[0] + high[0], 2)
        right = sum(chance for value, label, chance in masses if (value > cut) == (label == 1)) / 2
        best = max(best, right, 1 - right)
    assert slab_linear_accuracy(slabs) == best


def test_rotation_hides_the_coordinates_and_gives_them_back():
    plain = slab_data(200, slabs={5: 9}, rotate=False, seed=4, **DOUBLE)
    turned = slab_data(200, slabs={5: 9}, seed=4, **DOUBLE)
    assert torch.equal(plain.y, turned.y)
    assert turned.coordinates == pytest.approx(plain.x, abs=1e-12)
    assert turned.basis @ turned.basis.T == pytest.approx(torch.eye(10).double(), abs=1e-12)
    assert float((turned.x - plain.x).abs().max()) > 0.1
    assert torch.equal(plain.basis, torch.eye(10).double())


def test_blocks_name_every_coordinate_once():
    data = slab_data(10, linear=2, slabs={7: 3, 5: 1})
    assert {name: block.tolist() for name, block in data.blocks.items()} == {
        "linear": [0, 1],
        "7-slab": [2, 3, 4],
        "5-slab": [5],
    }
    assert "linear" not in slab_data(10, linear=0, slabs={5: 2}).blocks
    assert "7-slab" not in slab_data(10, slabs={5: 2, 7: 0}).blocks


def test_test_samples_are_fresh_and_share_the_basis():
    data = slab_data(50, slabs={5: 4}, seed=2)
    test = data.test(60)
    assert test.x.shape == (60, 5)
    assert torch.equal(test.basis, data.basis)
    assert not torch.isin(test.x, data.x).any()
    assert torch.equal(test.x, data.test(60).x)
    assert torch.equal(slab_data(50, slabs={5: 4}, seed=2).x, data.x)
    assert data.x.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"slabs": {4: 1}}, "3, 5 or 7 slabs, got 4"),
        ({"slabs": {}, "linear": 0}, "at least one coordinate"),
        ({"linear": -1}, "at least one coordinate"),
        ({"noise": 1.5}, r"in \[0, 1\], got 1.5"),
        ({"slabs": {7: 1}, "margin": 1 / 6}, "leaves no width for 7 slabs"),
        ({"slabs": {5: 1}, "margin": 0.25}, "leaves no width for 5 slabs"),
        ({"margin": 0}, "leaves no width"),
        ({"samples": 0}, "at least 1 sample"),
    ],
)
def test_data_that_cannot_be_drawn_is_refused(options, words):
    with pytest.raises(BadInput, match=words):
        slab_data(**{"samples": 10, **options})


def test_unknown_slabs_have_no_closed_form():
    with pytest.raises(BadInput, match="got 9"):
        slab_linear_accuracy(9)


def images(n, height, value):
    """Images that carry their class and number."""
    labels = torch.arange(n) % 2
    x = torch.zeros(n, 1, height, 3)
    x[:, 0, :, 0] = value
    x[:, 0, :, 1] = labels[:, None]
    x[:, 0, :, 2] = torch.arange(n)[:, None]
    return x, labels


def test_images_are_joined_within_their_class():
    pairs = concat_blocks(*images(20, 2, 7.0), *images(30, 4, 9.0), seed=1)
    assert pairs.x.shape == (20, 1, 6, 3)
    top, bottom = pairs.x[:, 0, 0], pairs.x[:, 0, -1]
    assert top[:, 0].unique().tolist() == [7.0]
    assert bottom[:, 0].unique().tolist() == [9.0]
    assert torch.equal(top[:, 1].long(), pairs.y)
    assert torch.equal(bottom[:, 1].long(), pairs.y)
    assert sorted(top[:, 2].tolist()) == list(range(20))  # each image once
    assert len(bottom[:, 2].unique()) == 20
    assert pairs.y[:10].unique().tolist() == [0, 1]  # not sorted by class
    flat = pairs.x.flatten(1)
    assert torch.equal(flat[:, pairs.blocks["top"]], pairs.x[:, :, :2].flatten(1))
    assert torch.equal(flat[:, pairs.blocks["bottom"]], pairs.x[:, :, 2:].flatten(1))
    again = concat_blocks(*images(20, 2, 7.0), *images(30, 4, 9.0), seed=1)
    assert torch.equal(again.x, pairs.x)


def test_images_that_do_not_fit_are_refused():
    x, y = images(6, 2, 1.0)
    with pytest.raises(BadInput, match="pad the narrower"):
        concat_blocks(x, y, x[..., :2], y)
    with pytest.raises(BadInput, match="6 and 6 images have 6 and 5 labels"):
        concat_blocks(x, y, x, y[:5])
    with pytest.raises(BadInput, match="the same classes"):
        concat_blocks(x, y, x, y + 1)
    with pytest.raises(BadInput, match="at least two"):
        concat_blocks(x, 0 * y, x, 0 * y)
