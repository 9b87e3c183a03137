"""Training with a penalty on the scale: the flow of the paper, its fixed point, and the three normalisations."""

import numpy as np
import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.dynamics.rho import RhoModel
from corollary.dynamics.square_loss_training import square, train_square_loss
from corollary.engine import seeded


def perceptron(outputs: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, outputs, bias=False)).double()


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x[:, -1] = 1
    return x, torch.where(x[:, 0] + 0.5 * x[:, 1] > 0, 1.0, -1.0).double()


def flow(model: RhoModel, data, penalty: float) -> tuple[float, dict[str, torch.Tensor]]:
    """The paper's derivatives of the scale and the directions, written out with the Lagrange multiplier."""
    x, y = data
    directions = {name: v.detach().requires_grad_() for name, v in model.directions.items()}
    margins = y * torch.func.functional_call(model.net, directions, (x,))[:, 0]
    rho = model.rho.detach()
    misfit = (1 - rho * margins).detach()
    pull = torch.autograd.grad((misfit * margins).mean(), list(directions.values()))
    of_scale = 2 * ((misfit * margins).mean() - penalty * rho)
    multiplier = (misfit * margins).mean()
    moves = {name: 2 * rho * (g - multiplier * v) for (name, v), g in zip(directions.items(), pull, strict=True)}
    return of_scale.item(), {name: move.detach() for name, move in moves.items()}


@pytest.mark.parametrize("normalisation", ["lagrange", "weight"])
def test_a_small_step_follows_the_flow(normalisation, data):
    net, penalty, rate = seeded(perceptron, 0), 0.02, 1e-6
    before = RhoModel(net)
    after = train_square_loss(
        net, data, penalty=penalty, learning_rate=rate, steps=1, normalisation=normalisation, scale_speed=3.0
    ).models[0]
    of_scale, moves = flow(before, data, penalty)
    assert (after.rho - before.rho).item() / rate == pytest.approx(3 * of_scale, rel=1e-6)
    for name, move in moves.items():
        moved = (after.directions[name] - before.directions[name]) / rate
        # one step of size 1e-6 leaves the sphere by 1e-12 of it, which the division makes 1e-6
        torch.testing.assert_close(moved.detach(), move, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def trained(data):
    nets = [seeded(perceptron, 0)] * 2
    return train_square_loss(
        nets, data, penalty=[3e-2, 1e-2], learning_rate=0.05, steps=600, scale_speed=5.0, record_every=150
    )


def test_the_scale_ends_at_its_equilibrium(trained, data):
    for model, penalty in zip(trained.models, trained.penalties, strict=True):
        assert model.rho.item() == pytest.approx(model.equilibrium(*data, penalty), rel=2e-3)
    assert trained.models[1].rho > trained.models[0].rho


def test_the_record_says_what_the_models_say(trained, data):
    for i, model in enumerate(trained.models):
        margins = model.margins(*data)
        assert trained.record["rho"][-1, i] == pytest.approx(model.rho.item(), rel=1e-10)
        assert trained.record["margin_mean"][-1, i] == pytest.approx(float(margins.mean()), rel=1e-10)
        assert trained.record["margin_min"][-1, i] == pytest.approx(float(margins.min()), rel=1e-10)
        assert trained.record["margin_std"][-1, i] == pytest.approx(float(margins.std()), rel=1e-8)
        assert trained.record["equilibrium"][-1, i] == pytest.approx(model.equilibrium(*data, trained.penalties[i]))
    assert trained.record["loss"].shape == (5, 2)
    assert "scale" not in trained.record


def test_a_larger_penalty_gives_larger_margins(trained, data):
    assert float(trained.models[0].margins(*data).mean()) > float(trained.models[1].margins(*data).mean())


def test_the_directions_stay_on_the_sphere_only_where_they_are_renormalised(data):
    options = {"penalty": 1e-3, "learning_rate": 0.05, "steps": 50}
    lagrange = train_square_loss(seeded(perceptron, 0), data, normalisation="lagrange", **options).models[0]
    weight = train_square_loss(seeded(perceptron, 0), data, normalisation="weight", **options).models[0]
    assert all(p.norm().item() == pytest.approx(1, abs=1e-12) for p in lagrange.net.parameters())
    assert all(p.norm().item() > 1 + 1e-6 for p in weight.net.parameters())  # tangent steps can only lengthen


def test_plain_training_is_pytorch_with_twice_the_penalty_as_decay(data):
    net = seeded(perceptron, 0)
    found = train_square_loss(net, data, penalty=0.01, learning_rate=0.1, steps=20, normalisation="none").models[0]
    alone = seeded(perceptron, 0)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1, weight_decay=0.02)
    for _ in range(20):
        optimizer.zero_grad()
        (alone(data[0])[:, 0] - data[1]).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(found(data[0]), alone(data[0]), rtol=1e-10, atol=1e-12)


def test_plain_training_records_the_product_of_norms(data):
    run = train_square_loss(seeded(perceptron, 0), data, penalty=0.01, learning_rate=0.1, steps=5, normalisation="none")
    assert run.record["rho"][-1, 0] == pytest.approx(run.models[0].rho.item(), rel=1e-12)


def test_classes_train_like_their_one_hot_rows(data):
    y = (data[1] > 0).long()
    options = {"penalty": 1e-3, "learning_rate": 0.05, "steps": 10, "batch_size": 8}
    by_class = train_square_loss(seeded(perceptron, 0, 2), (data[0], y), **options).models[0]
    by_row = train_square_loss(
        seeded(perceptron, 0, 2), (data[0], nn.functional.one_hot(y, 2).double()), **options
    ).models[0]
    assert torch.equal(by_class.rho, by_row.rho)


def test_a_resumed_run_is_bit_equal(data, tmp_path):
    options = {"penalty": 1e-3, "learning_rate": 0.05, "batch_size": 8, "record_every": 5}
    whole = train_square_loss(seeded(perceptron, 0), data, steps=20, **options)
    path = tmp_path / "run"
    train_square_loss(seeded(perceptron, 0), data, steps=10, checkpoint=path, **options)
    resumed = train_square_loss(seeded(perceptron, 0), data, steps=20, checkpoint=path, **options)
    assert torch.equal(whole.models[0].rho, resumed.models[0].rho)
    assert np.array_equal(whole.record["rho"][-1], resumed.record["rho"][-1])


def test_the_network_given_is_not_written_to(data):
    net = seeded(perceptron, 0)
    train_square_loss(net, data, penalty=1e-3, learning_rate=0.1, steps=3)
    torch.testing.assert_close(net[0].weight, seeded(perceptron, 0)[0].weight, rtol=0, atol=0)


def test_the_loss_has_no_factor_of_one_half():
    assert float(square(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]]))) == 5.0


def test_the_figure_draws(trained):
    assert trained.figure().svg().startswith("<svg")


def test_what_cannot_be_trained_is_refused(data):
    options = {"penalty": 1e-3, "learning_rate": 0.1, "steps": 1}
    with pytest.raises(BadInput, match="bias"):
        train_square_loss(nn.Linear(4, 1).double(), data, **options)
    with pytest.raises(BadInput, match="layer '0'"):
        train_square_loss(
            nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 1, bias=False)).double(), data, **options
        )
    with pytest.raises(BadInput, match="-1 and 1"):
        train_square_loss(perceptron(), (data[0], (data[1] > 0).long()), **options)
    with pytest.raises(BadInput, match="at least 0"):
        train_square_loss(perceptron(), data, **{**options, "penalty": -1.0})
