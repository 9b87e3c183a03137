import math

import pytest
import torch

from corollary.base.errors import BadInput
from corollary.data import digits
from corollary.dynamics.feature_noise import FeatureNoiseData, PatchSquaredReLU, plant_feature
from corollary.dynamics.losses import half_square
from corollary.linalg import hessian


@pytest.fixture
def data():
    return FeatureNoiseData(50, 4000, strong=1.5, weak=0.3, rho=0.2, noise=2.0, seed=1)


def test_patches_are_the_features_times_the_label(data):
    x, y, is_weak = data.train
    assert torch.equal(x[:, 0], torch.outer(y, data.weak))
    assert torch.equal(x[~is_weak, 1], torch.outer(y, data.strong)[~is_weak])
    assert (float(data.strong.norm()), float(data.weak.norm())) == pytest.approx((1.5, 0.3))


def test_noise_tells_nothing_of_either_feature(data):
    noise = data.train.x[data.train.is_weak, 1]
    assert float((noise @ torch.stack([data.strong, data.weak]).T).abs().max()) < 1e-14
    # 48 of 50 directions are left; a mean over n = 800 norms squared scatters by 4 * sqrt(2 / (48 n))
    assert float(noise.square().sum(1).mean()) == pytest.approx(4 * 48 / 50, abs=5 * 4 * math.sqrt(2 / (48 * 800)))


def test_shares_of_labels_and_weak_samples_are_as_asked(data):
    n = len(data.train.y)
    assert abs(float(data.train.y.mean())) < 5 / math.sqrt(n)
    assert float(data.train.is_weak.double().mean()) == pytest.approx(0.2, abs=5 * math.sqrt(0.16 / n))


def test_the_weak_test_set_has_no_strong_feature_and_stays_the_same(data):
    test = data.weak_test(30)
    assert bool(test.is_weak.all())
    assert float((test.x[:, 1] @ data.strong).abs().max()) < 1e-14
    assert torch.equal(test.x, data.weak_test(30).x)
    assert not torch.equal(test.x[:, 1], data.train.x[:30, 1])


def test_own_vectors_serve_as_features():
    u, v = torch.zeros(4), torch.zeros(4)
    u[:2], v[:2] = torch.tensor([2.0, 2.0]), torch.tensor([0.5, -0.5])
    data = FeatureNoiseData(4, 10, strong=u, weak=v)
    assert torch.equal(data.strong, u.double())
    assert torch.allclose(data.train.x[:, 0], torch.outer(data.train.y, v.double()))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"strong": torch.ones(5), "weak": torch.eye(5)[0]}, "orthogonal"),
        ({"strong": torch.ones(4)}, "vector \\[5\\]"),
        ({"weak": 0.0}, "positive, finite norm"),
        ({"rho": 1.0}, "rho=1.0"),
        ({"rho": -0.1}, "rho=-0.1"),
        ({"noise": -1.0}, "noise"),
        ({"dimension": 2}, "dimension=2"),
        ({"samples": 0}, "samples=0"),
    ],
)
def test_data_that_would_not_be_the_model_are_refused(options, says):
    with pytest.raises(BadInput, match=says):
        FeatureNoiseData(**{"dimension": 5, "samples": 3, **options})


def test_labels_other_than_signs_are_refused(data):
    with pytest.raises(BadInput, match="the first is 0"):
        data.of_labels(torch.tensor([1.0, 0.0]), torch.zeros(2, dtype=torch.bool), torch.Generator())
    with pytest.raises(BadInput, match="1 or more"):
        data.weak_test(0)


def test_outputs_are_the_two_sign_blocks_written_out():
    net = PatchSquaredReLU(6, 3, seed=2)
    x = torch.randn(5, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = torch.zeros(5, dtype=torch.float64)
    for j, sign in enumerate((1, -1)):
        for r in range(3):
            for p in range(2):
                wanted += sign * (x[:, p] @ net.weight[j, r].detach()).clamp(min=0) ** 2 / 3
    assert torch.allclose(net(x), wanted)


def test_the_edge_is_two_over_the_curvature_of_a_fitted_strong_feature():
    """One unit carries f = 1 through the strong feature alone: the Hessian's top eigenvalue is 4 U^2 / m."""
    strong, width = 1.3, 4
    data = FeatureNoiseData(6, 1, strong=strong)
    net = PatchSquaredReLU(6, width)
    with torch.no_grad():
        net.weight.zero_()
        net.weight[0, 0] = math.sqrt(width) * data.strong / strong**2
    one = data.of_labels(torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.bool), torch.Generator())
    assert float(net(one.x).detach()) == pytest.approx(1)
    top = float(torch.linalg.eigvalsh(hessian(net, half_square, (one.x, one.y)).to_dense())[-1])
    assert top == pytest.approx(4 * strong**2 / width)
    assert net.edge(strong) == pytest.approx(2 / top)


def test_weights_start_at_variance_one_over_the_dimension():
    weight = PatchSquaredReLU(400, 50).weight.detach()
    assert float(weight.var()) * 400 == pytest.approx(1, abs=5 * math.sqrt(2 / weight.numel()))


def test_networks_without_units_are_refused():
    with pytest.raises(BadInput, match="width=0"):
        PatchSquaredReLU(4, 0)


def test_a_feature_is_planted_in_real_data():
    train = digits(torch.float64).train
    x, y = train.x[train.y < 2], train.y[train.y < 2].double() * 2 - 1
    bar = torch.zeros(8, 8, dtype=torch.float64)
    bar[:, 0] = 0.5
    found = plant_feature(x, y, bar, torch.Generator().manual_seed(0), weak=0.1)
    assert found.x.shape == (len(x), 2, 64)
    assert torch.allclose(found.x[:, 0].norm(dim=1), torch.full((len(x),), 0.1, dtype=torch.float64))
    assert torch.equal(found.x[~found.is_weak, 1], torch.outer(y, bar.flatten())[~found.is_weak])
    assert float((found.x[found.is_weak, 1] @ bar.flatten()).abs().max()) < 1e-14
    bare = plant_feature(x, y, bar, torch.Generator().manual_seed(0), rho=1.0)
    assert bool(bare.is_weak.all())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"y": torch.zeros(3)}, "labels are -1 and 1"),
        ({"feature": torch.ones(5)}, "4 numbers"),
        ({"feature": torch.zeros(4)}, "nonzero"),
        ({"rho": 1.5}, "rho=1.5"),
    ],
)
def test_what_cannot_be_planted_is_refused(changes, says):
    given = {"x": torch.ones(3, 4), "y": torch.ones(3), "feature": torch.ones(4), **changes}
    with pytest.raises(BadInput, match=says):
        plant_feature(generator=torch.Generator(), **given)
