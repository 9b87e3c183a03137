import math

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from sklearn.metrics import roc_auc_score
from torch import nn

from corollary.base.errors import BadInput
from corollary.dynamics.reliance import (
    area_under_curve,
    kolmogorov_smirnov,
    log_odds,
    perturbation_share,
    randomized_metrics,
    reliance_profile,
    shuffled,
)
from corollary.dynamics.slab_data import slab_data


class Fixed(nn.Module):
    """Any function of the flattened sample as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x.flatten(1))


def two(logit):
    """Two logits from one."""
    return torch.stack([-logit, logit], 1) / 2


@pytest.fixture(scope="module")
def data():
    """A linear coordinate and nine slabs, rotated."""
    return slab_data(4000, slabs={5: 9}, seed=0, dtype=torch.float64)


@pytest.fixture(scope="module")
def by_hand(data):
    """The linear model that looks at coordinate 0 alone."""
    return Fixed(lambda x: two(x @ data.basis[0]))


def test_a_model_of_one_coordinate_relies_on_it_alone(data, by_hand):
    profile = reliance_profile(by_hand, data.x, data.y, data.blocks, basis=data.basis)
    linear, slabs = profile.metrics["linear"], profile.metrics["5-slab"]
    assert linear.accuracy == linear.auc == 1.0
    assert linear.without.auc == pytest.approx(0.5, abs=0.03)  # standard error 0.009 a permutation
    assert linear.reliance == pytest.approx(1, abs=0.06)
    assert linear.alone.auc == 1.0
    assert linear.alone.ks < 0.001  # rotating back rounds, and may swap neighbours of the 4000 values
    assert linear.without.ks == pytest.approx(0.5, abs=0.03)  # half of the samples get a value of the other class
    assert slabs.reliance == pytest.approx(0, abs=1e-12)
    assert slabs.without.auc == linear.alone.auc
    assert slabs.alone.auc == linear.without.auc
    assert profile.most_used == "linear"


def test_without_the_basis_a_mixture_is_shuffled(data, by_hand):
    """The trap: shuffling an input of rotated data leaves most of the linear coordinate in place."""
    block = data.blocks["linear"]
    wrong = randomized_metrics(by_hand, data.x, data.y, block)
    assert wrong.without.auc > 0.8


def test_a_block_moves_together_and_the_rest_stays():
    x = torch.arange(24.0).reshape(4, 2, 3)
    order = torch.tensor([2, 0, 3, 1])
    moved = shuffled(x, torch.tensor([1, 4]), order)
    assert torch.equal(moved.flatten(1)[:, [1, 4]], x.flatten(1)[order][:, [1, 4]])
    assert torch.equal(moved.flatten(1)[:, [0, 2, 3, 5]], x.flatten(1)[:, [0, 2, 3, 5]])
    assert torch.equal(x, torch.arange(24.0).reshape(4, 2, 3))
    several = shuffled(x, torch.tensor([1, 4]), torch.stack([order, order.flip(0)]))
    assert torch.equal(several[0], moved)
    assert torch.equal(several[1], shuffled(x, torch.tensor([1, 4]), order.flip(0)))


def test_one_permutation_keeps_what_a_block_says_together():
    """The product of two signs decides; each by itself says nothing, so shuffling one of them or both is the same."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = Fixed(lambda x: two(x[:, 0] * x[:, 1]))
    found = reliance_profile(model, x, y, {"pair": torch.tensor([0, 1]), "rest": torch.tensor([2])})
    assert found.metrics["pair"].without.auc == pytest.approx(0.5, abs=0.03)
    assert found.metrics["pair"].alone.auc == 1.0  # would be 0.5, were the two shuffled apart
    assert found.metrics["rest"].reliance == 0


def test_coordinates_are_shuffled_in_the_basis(data):
    order = torch.randperm(len(data.x))
    moved = shuffled(data.x, data.blocks["linear"], order, basis=data.basis)
    u = moved @ data.basis.T
    assert u[:, 1:] == pytest.approx(data.coordinates[:, 1:], abs=1e-12)
    assert u[:, 0] == pytest.approx(data.coordinates[order, 0], abs=1e-12)


def test_scores_are_those_of_other_libraries():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(600, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    y = (x @ weight + torch.randn(600, 4, generator=generator, dtype=torch.float64)).argmax(1)
    found = randomized_metrics(Fixed(lambda x: x @ weight), x, y, torch.tensor([0, 2]), repeats=3, seed=5)
    odds = log_odds(x @ weight)
    wanted = np.mean([roc_auc_score(y.numpy() == k, odds[:, k].numpy()) for k in range(4)])
    assert found.auc == pytest.approx(wanted, abs=1e-12)
    assert found.accuracy == pytest.approx(float(((x @ weight).argmax(1) == y).double().mean()))


def test_area_under_curve_counts_ties_half():
    scores = np.round(np.random.default_rng(0).normal(size=(3, 80)), 1)
    positive = np.random.default_rng(1).random((3, 80)) < 0.3
    found = area_under_curve(scores, positive)
    brute = [
        np.mean([(a > b) + 0.5 * (a == b) for a in row[chosen] for b in row[~chosen]])
        for row, chosen in zip(scores, positive, strict=True)
    ]
    assert found == pytest.approx(brute, abs=1e-12)
    assert found == pytest.approx([roc_auc_score(p, s) for p, s in zip(positive, scores, strict=True)], abs=1e-12)


def test_kolmogorov_smirnov_is_scipys():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, generator=generator).round(decimals=1) for n in (70, 40))
    rows = torch.stack([a, a + 0.4, a.flip(0)])
    wanted = [ks_2samp(row.numpy(), b.numpy()).statistic for row in rows]
    assert kolmogorov_smirnov(rows, b).tolist() == pytest.approx(wanted, abs=1e-12)
    assert float(kolmogorov_smirnov(a, a)) == 0


def test_log_odds_are_those_of_the_softmax():
    logits = torch.randn(50, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    p = logits.softmax(1)
    assert log_odds(logits) == pytest.approx((p / (1 - p)).log(), rel=1e-10)
    assert log_odds(logits[:, :2])[:, 1] == pytest.approx(logits[:, 1] - logits[:, 0], rel=1e-12)
    one = torch.tensor([0.3, -2.0])
    assert torch.equal(log_odds(one), log_odds(one[:, None]))
    assert log_odds(one)[:, 1] == pytest.approx(one)


def test_log_odds_have_no_ties_where_the_softmax_is_saturated():
    """The trap: float32 probabilities are exactly 1 here, and an AUC of them would be of ties."""
    logits = torch.tensor([[0.0, 40.0, 1.0], [0.0, 50.0, 1.0], [0.0, 60.0, 1.0]])
    assert (logits.softmax(1)[:, 1] == 1).all()
    assert log_odds(logits)[:, 1] == pytest.approx(logits[:, 1] - math.log(1 + math.e), rel=1e-6)
    assert len(log_odds(logits)[:, 1].unique()) == 3
    assert torch.isfinite(log_odds(logits)).all()


def test_log_odds_have_a_slope_where_the_softmax_has_none():
    logits = torch.tensor([[0.0, 200.0]], requires_grad=True)
    (slope,) = torch.autograd.grad(log_odds(logits)[0, 1], logits)
    assert slope.tolist() == [[-1.0, 1.0]]


def test_errors_are_over_permutations_and_seeds_repeat(data, by_hand):
    options = {"basis": data.basis, "seed": 3}
    block = data.blocks["linear"]
    first, again = (randomized_metrics(by_hand, data.x, data.y, block, **options) for _ in range(2))
    assert first == again
    assert first.without.auc_error == pytest.approx(0.009 / math.sqrt(5), rel=0.8)
    assert first.alone.auc_error == 0
    other = randomized_metrics(by_hand, data.x, data.y, block, **{**options, "seed": 4})
    assert other.without != first.without
    single = randomized_metrics(by_hand, data.x, data.y, block, repeats=1, **options)
    assert math.isnan(single.without.auc_error)


def test_repeats_that_run_together_are_those_that_run_apart(data, by_hand, monkeypatch):
    options = {"basis": data.basis, "repeats": 3}
    found = []
    for rows in (4000, 8000, 100_000):  # one, two and three permutations at a time
        monkeypatch.setattr("corollary.dynamics.reliance.ROWS_AT_ONCE", rows)
        found.append(randomized_metrics(by_hand, data.x, data.y, data.blocks["5-slab"], **options))
    assert found[0] == found[1] == found[2]


def test_integers_one_logit_and_modes_are_handled():
    tokens = torch.randint(5, (200, 4), generator=torch.Generator().manual_seed(0))
    y = (tokens[:, 0] > 2).long()
    net = nn.Sequential(nn.Dropout(0.9), Fixed(lambda x: x[:, 0].double() - 2.5)).train()
    found = randomized_metrics(net, tokens, y, torch.tensor([0]))
    assert found.accuracy == 1.0
    assert found.alone.accuracy == 1.0
    assert net.training
    assert net[0].training


def test_the_table_and_the_picture(data, by_hand):
    profile = reliance_profile(by_hand, data.x, data.y, data.blocks, basis=data.basis, repeats=2)
    table = profile.table()
    assert table["block"] == ["linear", "5-slab"]
    assert {len(column) for column in table.values()} == {2}
    assert table["without_auc"][0] == profile.metrics["linear"].without.auc
    figure = profile.figure(most=1)
    assert figure.data["block"].tolist() == ["linear"]
    assert "most used of 2 blocks" in figure.caption
    assert figure.svg().startswith("<svg")


def test_perturbations_of_a_linear_model_lie_along_its_weights(data, by_hand):
    block = data.blocks["linear"]
    found = perturbation_share(by_hand, data.x, data.y, block, radius=1.5, basis=data.basis)
    assert found == (pytest.approx(1.0, abs=1e-9), 0.0, 1.0)
    gentle = perturbation_share(by_hand, data.x, data.y, block, radius=0.2, basis=data.basis)
    # Correct are those at a distance of more than 0.2 from the boundary: (1 - 0.2) / (1 - 0.1) of them.
    assert gentle.accuracy == pytest.approx(0.8 / 0.9, abs=0.03)
    tilted = Fixed(lambda x: two(x @ (3 * data.basis[0] + 4 * data.basis[5])))
    assert perturbation_share(tilted, data.x, data.y, block, radius=1.0, basis=data.basis).share == pytest.approx(0.6)


def test_attacks_stay_in_their_ball_and_curved_models_are_followed():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 1, 2, 2, generator=generator)
    y = (x.flatten(1).sum(1) > 0).long()
    seen = []

    def model(flat):
        seen.append(flat.detach())
        return two(flat.sum(1) + flat[:, 0] ** 3)

    perturbation_share(Fixed(model), x, y, torch.tensor([0]), radius=0.3, steps=10, step_size=0.2)
    lengths = (seen[-1] - x.flatten(1)).norm(dim=1)
    assert float(lengths.max()) <= 0.3 + 1e-6
    assert float(lengths.min()) > 0.25  # steps longer than needed reach the edge


def test_samples_without_a_slope_are_left_out():
    x = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [2.0, 1.0], [-2.0, 1.0]])
    model = Fixed(lambda x: two(x[:, 0].relu() - 0.5))
    found = perturbation_share(model, x, torch.tensor([0, 1, 1, 0]), torch.tensor([0]), radius=0.1)
    assert found.moved == 0.5
    assert found.share == 1.0
    with pytest.raises(BadInput, match="no slope"):
        perturbation_share(
            Fixed(lambda x: two(0 * x[:, 0])), x, torch.tensor([0, 1, 1, 0]), torch.tensor([0]), radius=1
        )


LINEAR = Fixed(lambda x: two(x[:, 0]))
X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 0, 1, 0, 1])
BLOCK = torch.tensor([0])


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda: reliance_profile(LINEAR, X, Y, {"a": torch.tensor([0, 1]), "b": torch.tensor([1])}), "entry 1 is in"),
        (lambda: randomized_metrics(LINEAR, X, Y, torch.tensor([1, 1])), "entry 1 is in block 'block' and again"),
        (lambda: randomized_metrics(LINEAR, X, Y, torch.tensor([3])), "needs entries of 0 to 2"),
        (lambda: randomized_metrics(LINEAR, X, Y, torch.tensor([], dtype=torch.long)), "at least one; got"),
        (lambda: reliance_profile(LINEAR, X, Y, {}), "no blocks"),
        (lambda: randomized_metrics(LINEAR, X, 0 * Y, BLOCK), "all 6 labels are 0"),
        (lambda: randomized_metrics(LINEAR, X, 2 * Y, BLOCK), "classes 0 to 1"),
        (lambda: randomized_metrics(LINEAR, X, Y[:5], BLOCK), "6 samples need one class number each"),
        (lambda: randomized_metrics(LINEAR, X, Y.float(), BLOCK), "got torch.float32"),
        (lambda: randomized_metrics(LINEAR, X, Y, BLOCK, repeats=0), "at least 1 permutation"),
        (lambda: randomized_metrics(LINEAR, X, Y, BLOCK, basis=torch.ones(3, 3)), "not orthogonal"),
        (lambda: randomized_metrics(LINEAR, X, Y, BLOCK, basis=torch.eye(2)), r"is \[3, 3\]"),
        (lambda: randomized_metrics(Fixed(lambda x: x[:, :, None]), X, Y, BLOCK), r"returns \[sample, class\]"),
        (lambda: randomized_metrics(Fixed(lambda x: two(x[:, 0] / 0)), X, Y, BLOCK), "NaN or infinite"),
        (lambda: perturbation_share(LINEAR, X, Y, BLOCK, radius=0), "above 0, got 0"),
        (lambda: perturbation_share(LINEAR, X, Y, BLOCK, radius=1, steps=0), "above 0, got 1, 0"),
        (lambda: perturbation_share(LINEAR, X, Y, BLOCK, radius=1, step_size=-1.0), "step_size above 0"),
    ],
)
def test_what_has_no_meaning_is_refused(run, words):
    with pytest.raises(BadInput, match=words):
        run()


def test_blocks_may_be_plain_lists():
    x, y = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 2
    net = torch.nn.Linear(4, 2)
    listed, tensor = (randomized_metrics(net, x, y, block) for block in ([0, 3], torch.tensor([0, 3])))
    assert listed == tensor
