"""Per-sample gradients against one backward pass for each sample."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.testing import assert_close

from cases import NETS, Case
from corollary.base.errors import BadInput, NotDeterministic
from corollary.base.network import Inputs, call, map_inputs
from corollary.linalg import (
    empirical_fisher,
    gradient_gram,
    per_sample,
    per_sample_gradients,
    per_sample_square_norms,
)

BY_NAME = {case.name: case for case in NETS}
NAMES = ("mlp", "residual-cnn", "depthwise", "transposed", "tied", "einsum", "embedding", "group-norm", "lstm", "vit")


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over samples of the sum over outputs: works for outputs of any shape."""
    return (outputs - targets).square().sum() / len(targets)


def ready(case: Case, n: int = 5) -> tuple[nn.Module, Inputs, Tensor, Tensor]:
    """A network, its data, and its gradients from a backward pass for each sample."""
    net, inputs = case.network(), case.inputs(n)
    targets = torch.randn(call(net, inputs).shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    params = list(net.parameters())
    rows = []
    for i in range(n):
        one = map_inputs(lambda tensor, i=i: tensor[i : i + 1], inputs)
        loss = squares(call(net, one), targets[i : i + 1])
        gradients = torch.autograd.grad(loss, params, materialize_grads=True)
        rows.append(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    return net, inputs, targets, torch.stack(rows)


@pytest.mark.parametrize("name", NAMES)
def test_rows_norms_and_inner_products(name: str):
    net, inputs, targets, dense = ready(BY_NAME[name])
    tolerance = {"rtol": 1e-9, "atol": 1e-9 * float(dense.abs().max()) ** 2}
    stream = [
        (map_inputs(lambda t: t[:3], inputs), targets[:3]),
        (map_inputs(lambda t: t[3:], inputs), targets[3:]),
    ]
    for data, chunk in (((inputs, targets), 256), ((inputs, targets), 2), (stream, 256)):
        blocks = list(per_sample_gradients(net, squares, data, chunk=chunk))
        assert max(len(block) for block in blocks) <= chunk
        assert_close(torch.cat(blocks), dense, **tolerance)
        norms = per_sample_square_norms(net, squares, data, chunk=chunk)
        assert_close(norms, dense.square().sum(1), **tolerance)
        assert_close(gradient_gram(net, squares, data, chunk=chunk), dense @ dense.T, **tolerance)


def test_blocks_stay_within_their_bytes_and_give_the_same(monkeypatch: pytest.MonkeyPatch):
    net, inputs, targets, dense = ready(BY_NAME["mlp"], n=7)
    monkeypatch.setattr(per_sample, "BLOCK_BYTES", 3 * 8 * dense.shape[1])
    blocks = list(per_sample_gradients(net, squares, (inputs, targets)))
    assert [len(block) for block in blocks] == [3, 3, 1]
    assert_close(torch.cat(blocks), dense)
    assert_close(gradient_gram(net, squares, (inputs, targets), chunk=2), dense @ dense.T)


def test_a_linear_model_in_closed_form():
    """For squares of a scalar linear model, the gradient is 2 e_i (x_i, 1), so the norm is 4 e_i^2 (|x_i|^2 + 1)."""
    net = nn.Linear(3, 1).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    residual = (net(x) - y).detach()
    expected = 4 * residual.square().squeeze(1) * (x.square().sum(1) + 1)
    assert_close(per_sample_square_norms(net, mse_loss, (x, y)), expected)


def test_classes_and_a_function_with_parameters():
    """Cross-entropy with integer classes; the mean of the rows is the gradient, their second moment the Fisher."""
    net = BY_NAME["mlp"].network()
    x, y = BY_NAME["mlp"].inputs(6), torch.tensor([0, 1, 2, 0, 1, 2])
    rows = torch.cat(list(per_sample_gradients(net, cross_entropy, (x, y))))
    mean = torch.autograd.grad(cross_entropy(call(net, x), y), list(net.parameters()))
    assert_close(rows.mean(0), torch.cat([gradient.reshape(-1) for gradient in mean]))
    assert_close(rows.T @ rows / 6, empirical_fisher(net, cross_entropy, (x, y)).to_dense())
    last = {name: p for name, p in net.named_parameters() if name.startswith("4.")}
    some = torch.cat(list(per_sample_gradients(net, cross_entropy, (x, y), params=last)))
    assert_close(some, rows[:, -some.shape[1] :])


def test_the_network_is_left_as_it_was_and_types_follow_it():
    net = BY_NAME["mlp"].network(torch.float32)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    x, y = BY_NAME["mlp"].inputs(4, torch.float32), torch.tensor([0, 1, 2, 0])
    rows = torch.cat(list(per_sample_gradients(net, cross_entropy, (x, y))))
    assert rows.dtype == torch.float32
    assert not rows.requires_grad
    assert all(p.grad is None for p in net.parameters())
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_batch_normalisation_in_training_mode_is_refused_by_name():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    data = (torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64))
    with pytest.raises(BadInput, match=r"layer '1' \(BatchNorm1d\) is in training mode"):
        per_sample_gradients(net, mse_loss, data)
    assert per_sample_square_norms(net.eval(), mse_loss, data).shape == (5,)


def test_refused_before_the_first_block():
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1)).double()
    data = (torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64))
    with pytest.raises(NotDeterministic, match="dropout"):
        per_sample_gradients(net, mse_loss, data)
    with pytest.raises(BadInput, match="at least one sample; got chunk=0"):
        per_sample_gradients(net.eval(), mse_loss, data, chunk=0)
    with pytest.raises(BadInput, match="mean over samples"):
        gradient_gram(net, lambda outputs, targets: (outputs - targets).square().sum(), data)
