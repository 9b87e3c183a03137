"""Batch Hessians against dense ones; all data as a batch; noise of known size; bad input."""

import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.dynamics.batch_curvature import BatchCurvature, batch_curvature_curve
from corollary.dynamics.losses import half_square
from corollary.linalg import hessian


def problem(samples: int = 40) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 4, generator=generator, dtype=torch.float64)
    return net, x, torch.randint(3, (samples,), generator=generator)


def test_a_batch_of_all_data_is_all_data():
    net, x, y = problem()
    curve = batch_curvature_curve(net, nn.CrossEntropyLoss(), (x, y), [8, 40], repeats=3, steps=43)
    dense = torch.linalg.eigvalsh(hessian(net, nn.CrossEntropyLoss(), (x, y)).to_dense())
    assert curve.full_largest == pytest.approx(float(dense[-1]), rel=1e-6)
    assert curve.full_smallest == pytest.approx(float(dense[0]), rel=1e-5)
    # Lanczos stops at a residual of a thousandth: the error of an eigenvalue is of its square.
    assert curve.largest[1].numpy() == pytest.approx(float(dense[-1]), rel=1e-5)
    assert curve.smallest[1].numpy() == pytest.approx(float(dense[0]), rel=1e-4)
    assert float(curve.fluctuation[1].max()) < 1e-20
    assert bool((curve.largest[0] > dense[-1]).any())
    assert float(curve.smallest[0].min()) < float(dense[0])


def test_the_smallest_eigenvalue_is_the_negative_end_even_where_it_is_larger_in_size():
    def saddle(params, x):  # loss = w0^2 / 2 - 2 w1^2: power iteration would return the negative end
        return 0.5 * params["w"][0] ** 2 * x - 2 * params["w"][1] ** 2 * x

    x = torch.ones(8, dtype=torch.float64)
    params = {"w": torch.tensor([0.3, 0.2], dtype=torch.float64)}
    curve = batch_curvature_curve(saddle, lambda out, _: out.mean(), (x, x), [2], repeats=2, params=params)
    assert curve.full_largest == pytest.approx(1.0)
    assert curve.full_smallest == pytest.approx(-4.0)
    assert curve.largest.numpy() == pytest.approx(1.0)


def test_the_size_of_the_noise_of_a_linear_model():
    """f = w x with targets 0: the Hessian of a sample is x x', so that its fluctuation is known exactly."""
    samples, generator = 300, torch.Generator().manual_seed(3)
    x = torch.randn(samples, 6, generator=generator, dtype=torch.float64)
    net = nn.Linear(6, 1, bias=False).double()
    curve = batch_curvature_curve(
        net, half_square, (x, torch.zeros(samples, dtype=torch.float64)), [5, 30], repeats=40, probes=20, steps=4
    )
    outer = x[:, :, None] * x[:, None, :]
    exact = ((outer - outer.mean(0)) ** 2).sum((1, 2)).mean().div(6).sqrt()
    kappa, error = curve.moment_kappa()
    assert kappa == pytest.approx(float(exact), rel=0.08)
    assert 0 < error < 0.08 * kappa
    ggn = batch_curvature_curve(
        net, half_square, (x, torch.zeros(samples, dtype=torch.float64)), [5], kind="ggn", repeats=4
    )
    again = batch_curvature_curve(net, half_square, (x, torch.zeros(samples, dtype=torch.float64)), [5], repeats=4)
    assert ggn.largest.numpy() == pytest.approx(again.largest.numpy(), rel=1e-6)  # a linear model's Hessian is its GGN


def test_the_same_seed_gives_the_same_curve_and_pieces_change_nothing():
    net, x, y = problem()
    make = lambda **more: batch_curvature_curve(net, nn.CrossEntropyLoss(), (x, y), [16], repeats=2, **more)  # noqa: E731
    first, again, pieces, other = make(), make(), make(samples_at_once=6), make(seed=1)
    assert torch.equal(first.largest, again.largest)
    assert pieces.largest.numpy() == pytest.approx(first.largest.numpy(), rel=1e-8)
    assert not torch.equal(first.largest, other.largest)


def test_the_table_and_the_figure():
    net, x, y = problem()
    curve = batch_curvature_curve(net, nn.CrossEntropyLoss(), (x, y), [4, 16], repeats=3, probes=0)
    table = curve.table()
    assert table["largest"] == pytest.approx(curve.largest.mean(1).numpy())
    assert table["largest_error"][0] == pytest.approx(float(curve.largest[0].std() / 3**0.5))
    assert curve.figure().svg().startswith("<svg")
    with pytest.raises(BadInput, match="probes >= 1"):
        curve.moment_kappa()


def test_bad_input_is_refused_by_name():
    net, x, y = problem()
    loss = nn.CrossEntropyLoss()
    with pytest.raises(BadInput, match="between 1 and all 40"):
        batch_curvature_curve(net, loss, (x, y), [41])
    with pytest.raises(BadInput, match="no batch size"):
        batch_curvature_curve(net, loss, (x, y), [])
    with pytest.raises(BadInput, match="at least one batch"):
        batch_curvature_curve(net, loss, (x, y), [4], repeats=0)
    normalised = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    with pytest.raises(BadInput, match="'1' \\(BatchNorm1d\\)"):
        batch_curvature_curve(normalised.train(), loss, (x, y), [4])
    dropped = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    with pytest.raises(BadInput, match="'1' \\(Dropout\\)"):
        batch_curvature_curve(dropped.train(), loss, (x, y), [4])
    assert isinstance(batch_curvature_curve(dropped.eval(), loss, (x, y), [4], repeats=1), BatchCurvature)
    with pytest.raises(BadInput, match="mean over samples"):
        batch_curvature_curve(net, nn.CrossEntropyLoss(reduction="sum"), (x, y), [4])


def test_derivatives_that_are_not_symmetric_are_refused():
    class Wrong(torch.autograd.Function):
        """The square of each of two numbers, whose second derivative mixes them one way only."""

        @staticmethod
        def forward(ctx, w):
            ctx.save_for_backward(w)
            return (w**2).sum()

        @staticmethod
        def backward(ctx, slope):
            (w,) = ctx.saved_tensors
            return slope * (2 * w + torch.stack([w[1], 0 * w[1]]))

    def net(params, x):
        return Wrong.apply(params["w"]) * x

    ones = torch.ones(6, dtype=torch.float64)
    with pytest.raises(BadInput, match="contradict each other"):
        batch_curvature_curve(
            net, lambda out, _: out.mean(), (ones, ones), [2], params={"w": torch.ones(2, dtype=torch.float64)}
        )
