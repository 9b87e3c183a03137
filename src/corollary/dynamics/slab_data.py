"""Data with several features that each decide the label, some simple, some not: slabs, and images joined by label."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, TypeAlias, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.base.seeds import Seeds
from corollary.evidence import Source

SHAH_2020 = Source(
    key="shah2020pitfalls",
    authors=(
        "Harshay Shah",
        "Kaustav Tamuly",
        "Aditi Raghunathan",
        "Prateek Jain",
        "Praneeth Netrapalli",
    ),
    title="The Pitfalls of Simplicity Bias in Neural Networks",
    year=2020,
    arxiv="2006.07710",
)
HALF = Fraction(1, 2)
SLAB_LAW: dict[int, tuple[dict[int, Fraction], dict[int, Fraction]]] = {
    3: ({0: Fraction(1)}, {1: Fraction(1)}),
    5: ({0: Fraction(3, 4), 2: Fraction(1, 4)}, {1: Fraction(1)}),
    7: ({0: HALF, 2: HALF}, {1: Fraction(7, 8), 3: Fraction(1, 8)}),
}
"""For each number of slabs and each class, 0 then 1: probability by slab, counted from the centre, both sides together.

Even slabs hold class 0, odd ones class 1. The probabilities are such that no threshold on the coordinate does well.
"""
LINEAR = "linear"

Blocks: TypeAlias = Mapping[str, Int[Tensor, "_"]]
"""Groups of entries of a sample by name: indices into the flattened sample."""


class Recipe(NamedTuple):
    """The law of slab data: kinds of coordinates in order (1: linear, else the number of slabs), noise and margin."""

    kinds: tuple[int, ...]
    noise: float
    margin: float
    seeds: Seeds


@final
@dataclass(frozen=True)
class SlabData:
    """Samples whose coordinates, seen in the rows of `basis`, each decide the label by slabs.

    Attributes:
        x: samples $x = uQ$ of coordinates u.
        y: classes 0 and 1.
        basis: Q, orthogonal; the identity where the data is not rotated.
        blocks: coordinates of u by kind: `linear`, `5-slab`, ...
        recipe: what was drawn, to draw more.
    """

    x: Float[Tensor, "sample dimension"]
    y: Int[Tensor, "sample"]
    basis: Float[Tensor, "dimension dimension"]
    blocks: Blocks
    recipe: Recipe

    @property
    def coordinates(self) -> Float[Tensor, "sample dimension"]:
        """The samples before rotation, $u = xQ^T$."""
        return self.x @ self.basis.T

    def test(self, samples: int) -> "SlabData":
        """Fresh samples of the same law in the same basis, the same on every call."""
        return _drawn(self.recipe, samples, "test", self.basis)


def slab_data(
    samples: int,
    *,
    linear: int = 1,
    slabs: Mapping[int, int] | None = None,
    noise: float | int = 0.0,
    margin: float | int = 0.1,
    rotate: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> SlabData:
    r"""Draw data in [-1, 1]^d on which every coordinate alone predicts the class, more or less simply, then rotate it.

    Given the class y the coordinates are independent. A linear one is $(2y - 1)(M + (1 - M)U)$, with U uniform on
    [0, 1]; a k-slab one lies in one of k intervals of width $(2 - 2(k - 1)M) / k$ that alternate in class, with gaps of
    2M, drawn by `SLAB_LAW` and uniform inside. The one-dimensional rule behind it has 1 piece more than boundaries.

    Args:
        linear: number of linear coordinates.
        slabs: number of k-slab coordinates for each k of 3, 5 and 7; by default 49 of 5 slabs ("LMS-5").
        noise: share of the samples, exact up to rounding and drawn anew for each linear coordinate, that get a uniform
            value in [-M, M] there: a linear coordinate alone then predicts with accuracy 1 - noise / 2.
        margin: M, half the distance of the classes.
        rotate: apply a random rotation Q, so that no input is a coordinate by itself.
    Raises: BadInput, for no samples or no coordinates, an unknown number of slabs, noise outside [0, 1], or a margin
        that leaves no room for the slabs.
    Source: Shah et al. 2020, arXiv 2006.07710, section 3 and appendix B.
    """
    counts = {5: 49} if slabs is None else dict(slabs)
    if unknown := [kind for kind in counts if kind not in SLAB_LAW]:
        raise BadInput(f"coordinates have 3, 5 or 7 slabs, got {', '.join(map(str, unknown))}")
    if linear < 0 or any(count < 0 for count in counts.values()) or linear + sum(counts.values()) == 0:
        raise BadInput(f"slab data needs at least one coordinate, got {linear} linear and slabs {counts}")
    if not 0 <= noise <= 1:
        raise BadInput(f"noise is a share of the samples in [0, 1], got {noise}")
    widest = max((kind for kind, count in counts.items() if count), default=1)
    if not 0 < margin < 1 or margin * 2 * (widest - 1) >= 2:
        raise BadInput(
            f"a margin of {margin} leaves no width for {widest} slabs in [-1, 1]: it must be above 0 and below "
            f"{1 / max(1, widest - 1):.3g}"
        )
    seeds = Seeds(seed).child("slab data")
    kinds = (1,) * linear + tuple(itertools.chain.from_iterable([kind] * count for kind, count in counts.items()))
    recipe = Recipe(kinds, float(noise), float(margin), seeds)
    basis = torch.eye(len(kinds), dtype=dtype)
    if rotate:
        basis = _rotation(len(kinds), seeds("rotation")).to(dtype)
    return _drawn(recipe, samples, "train", basis.to(device))


def slab_linear_accuracy(slabs: int) -> Fraction:
    """The best accuracy of one threshold on a single coordinate of so many slabs, exactly.

    The accuracy of a threshold is linear in it inside a slab, so the best one lies in a gap (or at an end).
    Returns: 3/4, 11/16 and 5/8 for 3, 5 and 7 slabs, and 1 for one boundary (a linear coordinate, `slabs=1`).
    """
    if slabs == 1:
        return Fraction(1)
    if slabs not in SLAB_LAW:
        raise BadInput(f"coordinates have 1, 3, 5 or 7 slabs, got {slabs}")
    outermost = slabs // 2
    weights = [
        [
            SLAB_LAW[slabs][label].get(abs(place), Fraction(0)) / (1 if place == 0 else 2)
            for place in range(-outermost, outermost + 1)
        ]
        for label in (0, 1)
    ]
    below = [list(itertools.accumulate(row, initial=Fraction(0))) for row in weights]
    correct = [(zero + 1 - one) / 2 for zero, one in zip(*below, strict=True)]  # class 0 is said below the threshold
    return max(max(share, 1 - share) for share in correct)


class PairedImages(NamedTuple):
    """Images joined two by two, with the block of each part."""

    x: Tensor
    y: Int[Tensor, "sample"]
    blocks: Blocks


def concat_blocks(
    top: Tensor, top_labels: Int[Tensor, "_"], bottom: Tensor, bottom_labels: Int[Tensor, "_"], *, seed: int = 0
) -> PairedImages:
    """Join each image of one set with one of the same class of another set, the first above the second.

    Given the class the two halves are independent, so each alone decides the label as well as it did in its own set.

    Args:
        top, bottom: images `[n, channel, height, width]` of equal channels and widths; the numbers may differ.
        top_labels, bottom_labels: their classes, the same ones in both.
        seed: of the pairing and of the order.
    Returns: as many images of each class as the smaller set has, in random order, with the blocks `top` and `bottom`.
    Raises: BadInput, for images that do not fit each other, or different or single classes.
    Source: Shah et al. 2020, arXiv 2006.07710, the MNIST-CIFAR data.
    """
    parts = (top, bottom)
    if any(part.ndim != 4 for part in parts) or top.shape[1] != bottom.shape[1] or top.shape[3] != bottom.shape[3]:
        raise BadInput(
            f"images to be joined are [n, channel, height, width] of equal channels and widths, got {list(top.shape)} "
            f"and {list(bottom.shape)}: pad the narrower ones, or repeat a single channel"
        )
    labels = (top_labels, bottom_labels)
    if any(len(part) != len(y) for part, y in zip(parts, labels, strict=True)):
        raise BadInput(f"{len(top)} and {len(bottom)} images have {len(top_labels)} and {len(bottom_labels)} labels")
    classes = top_labels.unique().tolist()
    if classes != bottom_labels.unique().tolist() or len(classes) < 2:
        raise BadInput(
            f"the two sets need the same classes, at least two; got {classes} and {bottom_labels.unique().tolist()}"
        )
    generator = Seeds(seed)("pairing of images")
    rows = [_paired(labels, label, generator) for label in classes]
    first, second = (torch.cat(chosen) for chosen in zip(*rows, strict=True))
    order = torch.randperm(len(first), generator=generator)
    first, second = first[order].to(top.device), second[order].to(top.device)
    x = torch.cat([top[first], bottom[second].to(top)], dim=2)
    grid = torch.arange(x[0].numel(), device=x.device).reshape(x.shape[1:])
    height = top.shape[2]
    blocks = {"top": grid[:, :height].flatten(), "bottom": grid[:, height:].flatten()}
    return PairedImages(x, top_labels[first], blocks)


def _paired(labels: Sequence[Tensor], label: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows of both sets of one class, each in a random order, as many as the smaller one has."""
    own = [(y == label).nonzero()[:, 0].cpu() for y in labels]
    count = min(map(len, own))
    first, second = (rows[torch.randperm(len(rows), generator=generator)[:count]] for rows in own)
    return first, second


def _drawn(recipe: Recipe, samples: int, stream: str, basis: Tensor) -> SlabData:
    if samples < 1:
        raise BadInput(f"at least 1 sample is needed, got {samples}")
    dtype = basis.dtype
    y = torch.randint(2, (samples,), generator=recipe.seeds(f"{stream} classes"))
    u = torch.empty(samples, len(recipe.kinds), dtype=dtype)
    blocks: dict[str, Tensor] = {}
    for kind in dict.fromkeys(recipe.kinds):
        columns = torch.tensor([i for i, each in enumerate(recipe.kinds) if each == kind])
        generator = recipe.seeds(f"{stream} {kind}")
        draw = _linear if kind == 1 else _slabs
        u[:, columns] = draw(recipe, kind, y, len(columns), generator, dtype)
        blocks[LINEAR if kind == 1 else f"{kind}-slab"] = columns.to(basis.device)
    u, y = u.to(basis.device), y.to(basis.device)
    return SlabData(u @ basis, y, basis, blocks, recipe)


def _linear(recipe: Recipe, _: int, y: Tensor, columns: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    uniform = torch.rand(len(y), columns, generator=generator, dtype=dtype)
    values = (2 * y[:, None] - 1) * (recipe.margin + (1 - recipe.margin) * uniform)
    noisy = round(recipe.noise * len(y))
    if noisy:
        rows = torch.rand(len(y), columns, generator=generator).argsort(0)[:noisy]
        drowned = recipe.margin * (2 * torch.rand(noisy, columns, generator=generator, dtype=dtype) - 1)
        values.scatter_(0, rows, drowned)
    return values


def _slabs(
    recipe: Recipe, kind: int, y: Tensor, columns: int, generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    width = (2 - 2 * (kind - 1) * recipe.margin) / kind
    chances = torch.tensor(
        [[float(law.get(place, 0)) for place in range(kind // 2 + 1)] for law in SLAB_LAW[kind]], dtype=torch.float64
    )
    coins, inside, signs = (torch.rand(len(y), columns, generator=generator, dtype=dtype) for _ in range(3))
    ends = chances.cumsum(1).to(dtype)[y]
    place = torch.zeros_like(coins)
    for end in ends[:, :-1].T:
        place += coins >= end[:, None]
    # A centred slab is folded in two: its half width counts from 0, as that of the others from their inner end.
    near = ((place - 0.5) * width + 2 * place * recipe.margin).clamp(min=0)
    size = torch.where(place == 0, width / 2, width)
    return (near + size * inside) * torch.where(signs < 0.5, -1, 1)


def _rotation(dimension: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, uniform (Haar): QR of a Gaussian matrix with the signs of R's diagonal undone."""
    q, r = torch.linalg.qr(torch.randn(dimension, dimension, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()
