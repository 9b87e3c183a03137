import copy

import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.data import digits
from corollary.verify.certified_training import METHODS, CertifiedTrainer, WarmUp
from corollary.verify.interval_margins import ibp_certified, ibp_margins


@pytest.fixture(scope="module")
def data():
    found = digits()
    return (found.train.x[:600], found.train.y[:600]), (found.test.x[:200], found.test.y[:200])


def net(width=32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def trained(data, method, eps=0.05, **options):
    trainer = CertifiedTrainer(net(), method, eps=eps, warm_up=WarmUp(1, 5))
    return trainer.fit(data, epochs=8, batch_size=100, learning_rate=1e-2, **options)


def certified(module, data, eps=0.05):
    return float(ibp_certified(module, *data, eps).double().mean())


def test_interval_training_certifies_and_standard_training_does_not(data):
    train, test = data
    found = {method: certified(trained(train, method).module, test) for method in METHODS}
    assert found["ibp"] > 0.4
    assert found["standard"] < found["ibp"] - 0.1
    assert found["sabr"] > found["pgd"]


@pytest.mark.parametrize("kind", ["linear", "smooth"])
def test_warm_up_rises_from_zero_to_one(kind):
    warm_up = WarmUp(2, 10, kind)
    times = torch.linspace(0, 12, 2401, dtype=torch.float64).tolist()
    values = torch.tensor([warm_up(time) for time in times], dtype=torch.float64)
    assert values[0] == values[400] == 0
    assert values[-1] == warm_up(10) == 1
    rise = values.diff()
    assert bool((rise >= 0).all())
    assert float(rise.max()) < 0.002 if kind == "smooth" else float(rise.max()) < 0.0007  # no jump


def test_the_smooth_warm_up_has_no_break_in_slope():
    warm_up = WarmUp(0, 1)
    h = 1e-5
    before, after = (warm_up(0.25) - warm_up(0.25 - h)) / h, (warm_up(0.25 + h) - warm_up(0.25)) / h
    assert before == pytest.approx(after, rel=1e-3)
    assert warm_up(0.1) / warm_up(0.2) == pytest.approx(1 / 16)
    # from the tangent on it is straight: a (m^4 + 4 m^3 (s - m)) with a = 1 / (m^4 + 4 m^3 (1 - m)), m = 1/4
    assert warm_up(0.5) == pytest.approx((0.25 + 4 * 0.25) / (0.25 + 4 * 0.75))


def test_without_warm_up_the_radius_is_full_at_once():
    assert WarmUp()(0) == 1
    assert WarmUp(3, 3)(2.9) == 0
    assert WarmUp(3, 3)(3) == 1


def test_the_objective_of_intervals_is_the_bounded_margin(data):
    (x, y), _ = data
    model = net()
    objective = CertifiedTrainer(model, "ibp", eps=0.1).objective(x)
    assert torch.allclose(objective(x, y), -ibp_margins(model, x, y, 0.1), atol=1e-6)
    assert torch.equal(objective.eval()(x, y), model(x))
    assert int(objective.step) == 1


def test_small_boxes_lie_inside_the_large_one(data):
    (x, y), _ = data
    model = net()
    whole = CertifiedTrainer(model, "sabr", eps=0.1, small_box=1).objective(x)
    assert torch.allclose(whole(x, y), -ibp_margins(model, x, y, 0.1), atol=1e-6)
    small = CertifiedTrainer(model, "sabr", eps=0.1, small_box=0.2).objective(x)(x, y)
    # bounds over a part of the box lie within those over the box, and over those at the attacked point
    assert bool((small <= -ibp_margins(model, x, y, 0.1) + 1e-5).all())
    attacked = CertifiedTrainer(model, "pgd", eps=0.08).objective(x)(x, y)
    assert bool((small >= attacked - attacked.gather(1, y[:, None]) - 1e-5).all())


def test_a_copy_follows_its_own_weights(data):
    (x, y), _ = data
    objective = CertifiedTrainer(net(), "ibp", eps=0.1).objective(x)
    other = copy.deepcopy(objective)
    with torch.no_grad():
        other.net[0].weight.mul_(2.0)
    assert torch.allclose(other(x, y), -ibp_margins(other.net, x, y, 0.1), atol=1e-5)
    assert not torch.allclose(other(x, y), objective(x, y))


def test_the_users_network_is_not_written_to(data):
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    CertifiedTrainer(model, "sabr", eps=0.05).fit(data[0], epochs=1, batch_size=100)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize("method", METHODS)
def test_equal_seeds_give_equal_networks_and_batches_may_come_from_a_list(data, method):
    (x, y), _ = data
    batches = list(zip(x.split(200), y.split(200), strict=True))
    runs = [CertifiedTrainer(net(), method, eps=0.05).fit(batches, epochs=2).module for _ in range(2)]
    other = CertifiedTrainer(net(), method, eps=0.05).fit((x, y), epochs=2, batch_size=200, seed=3).module
    assert torch.equal(runs[0][0].weight, runs[1][0].weight)
    assert not torch.equal(runs[0][0].weight, other[0].weight)


def test_an_interrupted_run_resumes_at_its_radius(data, tmp_path):
    trainer = CertifiedTrainer(net(), "ibp", eps=0.1, warm_up=WarmUp(0, 4))
    whole = trainer.fit(data[0], epochs=4, batch_size=100)
    trainer.fit(data[0], epochs=2, batch_size=100, checkpoint=tmp_path / "run")
    resumed = trainer.fit(data[0], epochs=4, batch_size=100, checkpoint=tmp_path / "run")
    assert torch.equal(whole.module[0].weight, resumed.module[0].weight)


def test_milestones_lower_the_learning_rate(data):
    done = CertifiedTrainer(net(), "standard", eps=0.0).fit(
        data[0], epochs=4, batch_size=100, learning_rate=0.01, milestones=(1, 3), decay=0.1, validation=data[1]
    )
    rates = done.record["learning_rate"]
    assert sorted({round(float(rate), 8) for rate in rates}) == pytest.approx([1e-4, 1e-3, 1e-2])
    assert float(done.record["test_accuracy"][-1]) > 0.3
    assert isinstance(done.best, nn.Sequential)


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)
        self.head = nn.Linear(108, 10)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).flatten(1))


def test_batch_normalisation_has_one_statistic_for_the_whole_box(data):
    (x, y), _ = data
    x = x.reshape(-1, 1, 8, 8)
    torch.manual_seed(0)
    model = Normalised()
    objective = CertifiedTrainer(model, "ibp", eps=0.0).objective(x)
    found = objective(x, y)
    with torch.no_grad():
        outputs = copy.deepcopy(model).train()(x)
    # at radius 0 the bounds are the network with the statistics of this batch
    assert torch.allclose(found, outputs - outputs.gather(1, y[:, None]), atol=1e-5)
    assert not torch.equal(model.norm.running_mean, torch.zeros(3))
    found.square().mean().backward()
    assert model.conv.weight.grad is not None
    done = CertifiedTrainer(model, "ibp", eps=0.02).fit((x, y), epochs=3, batch_size=100, learning_rate=1e-2)
    assert float(ibp_certified(done.module, x, y, 0.02).double().mean()) > 0.3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eps": -0.1}, "0 or more, got -0.1"),
        ({"eps": 0.1, "small_box": 0}, "above 0 and at most 1; got 0"),
        ({"eps": 0.1, "attack_steps": 0}, "1 step or more"),
    ],
)
def test_what_is_refused(options, words):
    with pytest.raises(BadInput, match=words):
        CertifiedTrainer(net(), "sabr", **options)


def test_more_that_is_refused(data):
    with pytest.raises(BadInput, match="later stop"):
        WarmUp(3, 2)
    with pytest.raises(BadInput, match="one tensor"):
        CertifiedTrainer(net(), eps=0.1).fit(((data[0][0], data[0][0]), data[0][1]), epochs=1)
