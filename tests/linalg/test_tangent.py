"""Jacobian and tangent kernel against dense ones."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from cases import NETS, Case
from corollary.base.network import batch_length, call, map_inputs
from corollary.linalg import jacobian, ntk, ntk_matrix, tangent

BY_NAME = {case.name: case for case in NETS}
CASES = [BY_NAME[name] for name in ("mlp", "transposed", "tied", "einsum", "embedding", "group-norm", "lstm", "vit")]


def ready(case: Case):
    """A network, its data as one pair and as a stream, and its dense Jacobian from a backward pass for each output."""
    net, inputs = case.network(), case.inputs(5)
    outputs = call(net, inputs)
    params = list(net.parameters())
    rows = [torch.autograd.grad(o, params, retain_graph=True, materialize_grads=True) for o in outputs.reshape(-1)]
    dense = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    y = torch.zeros(5)
    stream = [(map_inputs(lambda t: t[:3], inputs), y[:3]), (map_inputs(lambda t: t[3:], inputs), y[3:])]
    return net, (inputs, y), stream, dense


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_jacobian_and_its_transpose(case: Case):
    net, data, stream, dense = ready(case)
    tolerance = {"rtol": 1e-9, "atol": 1e-9 * float(dense.abs().max())}
    columns = torch.randn(dense.shape[1], 3, dtype=torch.float64)
    rows = torch.randn(dense.shape[0], 3, dtype=torch.float64)
    for operator in (jacobian(net, data), jacobian(net, stream)):
        assert operator.shape == dense.shape
        assert_close(operator @ columns, dense @ columns, **tolerance)
        assert_close(operator.T @ rows, dense.T @ rows, **tolerance)
    blocks = jacobian(net, data, group_by="layer")
    assert_close(sum(b.to_dense().square().sum() for b in blocks.values()), dense.square().sum())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_is_the_gram_matrix_of_the_jacobian(case: Case, monkeypatch: pytest.MonkeyPatch):
    net, data, stream, dense = ready(case)
    gram, n = dense @ dense.T, batch_length(data[0])
    outputs = len(dense) // n
    trace = torch.einsum("icjc->ij", gram.reshape(n, outputs, n, outputs))
    tolerance = {"rtol": 1e-9, "atol": 1e-9 * float(gram.abs().max())}
    kernel = ntk(net, stream)
    assert kernel.positive
    assert_close(kernel.to_dense(), gram, **tolerance)
    assert_close(ntk(net, data, outputs="trace").to_dense(), trace, **tolerance)
    assert_close(sum(k.to_dense() for k in ntk(net, data, group_by="layer").values()), gram, **tolerance)
    for block_bytes in (tangent.BLOCK_BYTES, 2 * 8 * dense.shape[1] * outputs):  # all in one block; blocks of two
        monkeypatch.setattr(tangent, "BLOCK_BYTES", block_bytes)
        assert_close(ntk_matrix(net, data), gram, **tolerance)
        assert_close(ntk_matrix(net, stream, outputs="trace"), trace, **tolerance)


def test_the_kernel_of_a_linear_model_is_that_of_its_inputs():
    net = nn.Linear(3, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = torch.kron(x @ x.T + 1, torch.eye(2, dtype=torch.float64))
    assert_close(ntk(net, x).to_dense(), expected)
    assert_close(ntk_matrix(net, {"input": x}), expected)


def test_inputs_alone_are_enough():
    net = BY_NAME["mlp"].network()
    x = BY_NAME["mlp"].inputs(4)
    assert isinstance(x, Tensor)
    assert_close(jacobian(net, x).to_dense(), jacobian(net, (x, torch.zeros(4))).to_dense())


def test_inputs_alone_do_not_read_memory_that_nobody_wrote():
    torch.use_deterministic_algorithms(True)  # memory that is not written to is then full of NaN
    try:
        kernel = ntk_matrix(nn.Linear(3, 1).double(), torch.ones(4, 3, dtype=torch.float64))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(kernel, torch.full((4, 4), 4.0, dtype=torch.float64))
