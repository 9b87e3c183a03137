import pytest
import torch

from corollary.base.errors import BadInput
from corollary.dynamics.similarity import linear_cka


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_kernels(a, b):
    """The definition with n x n kernels and the centring matrix."""
    n = len(a)
    h = torch.eye(n, dtype=torch.float64) - 1 / n
    k, l = h @ a @ a.T @ h, h @ b @ b.T @ h
    return float((k * l).sum() / (k.norm() * l.norm()))


def test_equals_the_definition_by_kernels():
    a, b = draw(30, 5), draw(30, 7, seed=1) + 3
    assert float(linear_cka(a, b)) == pytest.approx(by_kernels(a, b), abs=1e-12)


def test_rotation_shift_and_scale_do_not_matter():
    a = draw(20, 4)
    q = torch.linalg.qr(draw(4, 4, seed=1)).Q
    assert float(linear_cka(a, 5 * a @ q + 2)) == pytest.approx(1, abs=1e-12)
    assert float(linear_cka(a, a @ draw(4, 4, seed=2))) < 0.99  # other linear maps do


def test_orthogonal_features_have_none_and_pairs_are_batched():
    a, b = draw(4, 50, 3), draw(4, 50, 2, seed=1)
    values = linear_cka(a, b)
    assert values.shape == (4,)
    assert ((values >= 0) & (values <= 1)).all()
    assert torch.allclose(values, torch.stack([linear_cka(x, y) for x, y in zip(a, b, strict=True)]))
    basis = torch.linalg.qr(torch.cat([torch.ones(50, 1, dtype=torch.float64), draw(50, 4)], dim=1)).Q
    assert float(linear_cka(basis[:, 1:3], basis[:, 3:])) == pytest.approx(0, abs=1e-12)


def test_small_and_large_outputs_keep_their_digits():
    a, b = draw(30, 5), draw(30, 5, seed=1)
    assert float(linear_cka(1e-90 * a, 1e90 * b)) == pytest.approx(float(linear_cka(a, b)), abs=1e-12)
    assert float(linear_cka(a.float(), b.float())) == pytest.approx(float(linear_cka(a, b)), abs=1e-6)


def test_constant_outputs_have_no_similarity():
    assert linear_cka(draw(10, 3), torch.full((10, 2), 0.1)).isnan()


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(BadInput, match="same two or more samples"):
        linear_cka(draw(10, 3), draw(9, 3))
    with pytest.raises(BadInput, match="same two or more samples"):
        linear_cka(draw(1, 3), draw(1, 3))
    with pytest.raises(BadInput, match="second network's outputs"):
        linear_cka(draw(3, 2), torch.full((3, 2), torch.nan))
