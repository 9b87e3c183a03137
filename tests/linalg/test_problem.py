"""What is refused at the door, what is said, and what happens when memory runs out."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, TensorDataset

from cases import mlp
from corollary.base.errors import BadInput, NotDeterministic
from corollary.linalg import ggn, hessian, jacobian
from corollary.linalg.linearise import ColumnChunks
from corollary.linalg.problem import Problem

X, Y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def net() -> nn.Sequential:
    return mlp(4, 5, 3)


class Shuffled:
    """A loader that shuffles at each pass."""

    def __iter__(self):
        order = torch.randperm(12)
        return iter([(X[order[:6]], Y[order[:6]]), (X[order[6:]], Y[order[6:]])])


class Shrinking:
    """A loader with a batch less at each pass."""

    def __init__(self):
        self.left = 5

    def __iter__(self):
        self.left -= 1
        return iter([(X, Y)] * self.left)


def test_dropout_and_batch_order_are_found():
    dropping = nn.Sequential(nn.Linear(4, 50), nn.Dropout(), nn.Linear(50, 3))
    with pytest.raises(NotDeterministic, match=r"batch 0: the network is random \(dropout on\?"):
        hessian(dropping, cross_entropy, (X, Y))
    hessian(dropping.eval(), cross_entropy, (X, Y))
    with pytest.raises(NotDeterministic, match="the data changes order"):
        hessian(net(), cross_entropy, Shuffled())
    with pytest.raises(NotDeterministic, match="batches, the other more"):
        hessian(net(), cross_entropy, Shrinking())
    hessian(net(), cross_entropy, Shuffled(), check=False)


def test_a_data_loader_is_a_stream():
    loader = DataLoader(TensorDataset(X, Y), batch_size=5)
    model, v = net(), torch.randn(43)
    torch.testing.assert_close(
        hessian(model, cross_entropy, loader) @ v, hessian(model, cross_entropy, (X, Y)) @ v, rtol=1e-4, atol=1e-6
    )


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.layer(x), self.layer(x)])


class Detached(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).detach()


def mixed() -> nn.Module:
    model = net()
    model[2].double()
    return model


@pytest.mark.parametrize(
    ("make", "loss", "data", "says"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), cross_entropy, (X, Y), "'1'.*in training mode"),
        (
            lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval(),
            cross_entropy,
            (X, Y),
            "keeps no running statistics",
        ),
        (net, nn.CrossEntropyLoss(reduction="sum"), (X, Y), "mean over samples, but on each sample taken twice"),
        (net, nn.CrossEntropyLoss(reduction="none"), (X, Y), r"shape \[12\]; it must return one number"),
        (mixed, cross_entropy, (X, Y), "share dtype and device.*'0.weight'.*'2.weight'"),
        (Twice, cross_entropy, (X, Y), "a row for each of the 12 samples"),
        (lambda: Detached(4, 3), cross_entropy, (X, Y), "do not depend on its parameters"),
        (net, cross_entropy, [], "the data is empty"),
        (net, cross_entropy, iter([(X, Y)]), "can be read once only"),
        (net, cross_entropy, (X * torch.nan, Y), "NaN or infinite"),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.Hardsigmoid()), mse_loss, (X, X[:, :3]), "hardsigmoid"),
        (lambda: weight_norm(nn.Linear(4, 3)), mse_loss, (X, X[:, :3]), "contradict each other"),
    ],
    ids=range(12),
)
def test_what_cannot_be_differentiated_is_refused_with_advice(make, loss, data, says: str):
    torch.manual_seed(0)
    with pytest.raises(BadInput, match=says):
        hessian(make(), loss, data)


def test_a_loss_without_targets_is_refused():
    with pytest.raises(BadInput, match="a loss needs targets"):
        Problem.of(net(), X, cross_entropy)


def test_a_jacobian_without_second_derivatives_is_refused():
    with pytest.raises(BadInput, match="no second derivative"):
        jacobian(nn.Sequential(nn.Linear(4, 3), nn.Hardsigmoid()), X)


def test_gauss_newton_of_weight_norm_is_right_where_its_hessian_is_not():
    layer = weight_norm(nn.Linear(4, 3)).double()
    x = X.double()
    j = jacobian(layer, x).to_dense()
    g = ggn(layer, lambda f, y: 0.5 * (f - y).square().sum(1).mean(), (x, x[:, :3])).to_dense()
    torch.testing.assert_close(g, j.T @ j / 12)


def test_running_out_of_memory_narrows_the_pass_and_says_so():
    tried: list[int] = []

    def product(rows: torch.Tensor) -> torch.Tensor:
        tried.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return 2 * rows

    rows = torch.randn(10, 4)
    chunks = ColumnChunks(8)
    with pytest.warns(ResourceWarning, match="columns in one pass; going on with"):
        doubled = chunks(product, rows)
    assert torch.equal(doubled, 2 * rows)
    assert tried == [8, 4, 2, 2, 2, 2, 2]
    assert chunks.width == 2


def test_running_out_of_memory_with_one_vector_asks_for_smaller_batches():
    def product(rows: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(BadInput, match="smaller batches"):
        ColumnChunks(1)(product, torch.ones(2, 2))


def test_an_operation_without_a_batching_rule_goes_one_by_one():
    def product(rows: torch.Tensor) -> torch.Tensor:
        if len(rows) > 1:
            raise RuntimeError("no batching rule")
        return 2 * rows

    chunks = ColumnChunks(None)
    assert torch.equal(chunks(product, torch.ones(3, 2)), 2 * torch.ones(3, 2))
    assert chunks.width == 1


def test_samples_fitted_to_the_last_digit_do_not_make_a_hessian_wrong():
    """Their own Hessians are rounding errors; the others of the batch show that it is symmetric."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).float()
    x = torch.randn(12, 4)
    with torch.no_grad():
        net[2].weight *= 30
        y = net(x).argmax(1)
        confident = net(x).softmax(1).amax(1).argsort(descending=True)
    x, y = x[confident], y[confident]
    with pytest.raises(BadInput, match="contradict"):
        hessian(net, nn.functional.cross_entropy, (x[:2], y[:2]))
    assert hessian(net, nn.functional.cross_entropy, (x, y)).shape == (67, 67)
