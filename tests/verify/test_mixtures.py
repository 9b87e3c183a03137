"""Margins of conjunctions by means of rows, against fine grids of shares and points."""

import torch

from corollary.verify.mixtures import mixed_margins
from corollary.verify.queries import Queries
from corollary.verify.sets import Box


def asked(rows: int, disjunct: list[int]) -> Queries:
    n = 6
    generator = torch.Generator().manual_seed(rows)
    middle = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    number = torch.tensor(disjunct)[None].expand(n, rows)
    opened = torch.ones(n, max(disjunct) + 1, dtype=torch.bool)
    box = Box(middle - 0.3, middle + 0.7)
    return Queries(box, torch.zeros(n, rows, 1).double(), torch.zeros(n, rows).double(), number, opened)


def test_two_rows_of_which_only_the_mean_is_positive():
    """x + 0.1 and -x + 0.1 on [-1, 1]: each reaches -0.9, their mean is 0.1 everywhere."""
    box = Box(torch.tensor([[-1.0]]).double(), torch.tensor([[1.0]]).double())
    rows = torch.zeros(1, 2, 1).double()
    queries = Queries(box, rows, rows[..., 0], torch.tensor([[0, 0]]), torch.tensor([[True]]))
    slopes, lower = torch.tensor([[[1.0], [-1.0]]]).double(), torch.tensor([[-0.9, -0.9]]).double()
    assert torch.allclose(mixed_margins(queries, slopes, lower), torch.tensor([[0.1]]).double())


def test_margins_are_below_the_best_mean_and_never_below_the_best_row():
    queries = asked(5, [0, 0, 0, 1, 1])
    generator = torch.Generator().manual_seed(0)
    slopes = torch.randn(6, 5, 2, generator=generator, dtype=torch.float64)
    level = torch.randn(6, 5, generator=generator, dtype=torch.float64)  # at the middle of the box
    assert isinstance(queries.region, Box)
    radius = queries.region.radius
    lower = level - (slopes.abs() * radius[:, None]).sum(2)
    margins = mixed_margins(queries, slopes, lower)
    assert bool((margins >= queries.margins(lower) - 1e-12).all())
    # no unsafe point may be cut off: where all rows of a disjunct are at most zero somewhere, its margin is, too
    share = torch.cartesian_prod(*2 * [torch.linspace(-1, 1, 81, dtype=torch.float64)])
    offsets = share[None] * radius[:, None]  # (6, points, 2)
    rows = level[:, None] + torch.einsum("nri,npi->npr", slopes, offsets)
    for number, chosen in enumerate(([0, 1, 2], [3, 4])):
        met = (rows[..., chosen].amax(2) <= 0).any(1)
        assert bool((margins[met, number] <= 1e-12).all())
        assert bool((margins[:, number] <= rows[..., chosen].amax(2).amin(1) + 1e-12).all())


def test_infinite_bounds_leave_the_others():
    queries = asked(2, [0, 0])
    slopes = torch.ones(6, 2, 2, dtype=torch.float64)
    lower = torch.tensor([[-torch.inf, -1.0]], dtype=torch.float64).expand(6, 2)
    assert torch.equal(mixed_margins(queries, slopes, lower), torch.full((6, 1), -1.0, dtype=torch.float64))
