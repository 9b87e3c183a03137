"""Is this minimum stable at this learning rate and batch size? The sharpness of a network against what SGD allows."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.base.network import Loss, Params, batches
from corollary.dynamics.curvature_rows import CurvatureRows
from corollary.dynamics.mean_square import TABLE_RANK, SecondMoment
from corollary.dynamics.stability_limits import GradientMoments
from corollary.evidence import PALETTE, Figure, Source
from corollary.linalg import ggn, lanczos
from corollary.linalg.problem import Data, Network

WU_SU_2023 = Source(
    "wu2023implicit",
    ("Lei Wu", "Weijie J. Su"),
    "The Implicit Regularization of Dynamical Stability in Stochastic Gradient Descent",
    2023,
    arxiv="2305.17490",
    venue="International Conference on Machine Learning",
)
MULAYOFF_2023 = Source(
    "mulayoff2023exact",
    ("Rotem Mulayoff", "Tomer Michaeli"),
    "Exact Mean Square Linear Stability Analysis for SGD",
    2023,
    arxiv="2306.07850",
)
EXACT_WORK = 2**24
"""All directions are kept where rows (samples times directions) times rank squared is no more: up to 256 rows."""
LEADING = 40
"""Directions in which the threshold is computed beyond that, found by as many products with G."""
AT_ONCE = 4096
"""Samples whose graph is held for such a product."""
ROUNDING = 1e-9
"""By how much, relative, a learning rate may pass its limit and count as at it."""


class Limits(NamedTuple):
    """Stable up to `sufficient`, unstable above `mean_square`, not known between them; no gap where all is exact."""

    sufficient: float
    mean_square: float


@final
@dataclass(frozen=True, eq=False)
class StabilityReport:
    r"""What a network's curvature allows SGD: $G = \frac1n \sum_i J_i^\top h_i J_i$ against the learning rate.

    Attributes:
        learning_rate: as given; None leaves `stable` open.
        moments: trace, largest eigenvalue, Frobenius norm and fourth moments of the gradients.
        recursion: of the second moment, for thresholds at other batch sizes.
        exact: whether `recursion` has all directions; else it has the leading ones, `mean_square_limit` is an upper
            bound, and the largest eigenvalue and the Frobenius norm are from below.
        alignment: $\mu = \operatorname{tr}(\Sigma G) / (2 L \lVert G \rVert_F^2)$ with $\Sigma$ the second moment of
            the gradients: how far their noise lies along the sharp directions. Where it is at least mu, loss stability
            allows $\lVert G \rVert_F \le \sqrt{B / \mu} / \eta$. NaN where not `exact`, or all residuals are zero.
        train_loss: on the data given. interpolating: whether it is below the tolerance, so that G is the Hessian.
        notes: what a reader of the numbers should know.
    """

    learning_rate: float | None
    batch_size: int
    replacement: bool
    momentum: float
    parameters: int
    moments: GradientMoments
    recursion: SecondMoment = field(repr=False)
    exact: bool
    alignment: float
    train_loss: float
    interpolating: bool
    notes: tuple[str, ...]

    @property
    def trace(self) -> float:
        """Of G."""
        return self.moments.trace

    @property
    def largest_eigenvalue(self) -> float:
        """Of G."""
        return self.moments.largest_eigenvalue

    @property
    def frobenius(self) -> float:
        """Norm of G."""
        return self.moments.frobenius

    @property
    def gradient_descent_limit(self) -> float:
        """The learning rate up to which gradient descent is stable here: with momentum, the heavy ball's edge."""
        return self.moments.gradient_descent(momentum=self.momentum)

    @property
    def trace_limit(self) -> float:
        """The learning rate that the trace forbids to pass: a necessary condition, and never a sufficient one."""
        return self.moments.trace_limit(self.batch_size, replacement=self.replacement, momentum=self.momentum)

    @property
    def mean_square_limit(self) -> float:
        """The learning rate up to which SGD is stable in mean square; an upper bound of it where not `exact`."""
        return self._own_limits.mean_square

    @cached_property
    def _own_limits(self) -> Limits:
        return self.limits(self.batch_size)

    def limits(self, batch_size: int) -> Limits:
        """Below the first SGD is stable at that batch size, above the second it is not.

        Raises: BadInput, for a batch size below 1 or above the number of samples.
        """
        options: Any = {"replacement": self.replacement, "momentum": self.momentum}
        threshold = self.recursion.threshold(batch_size, **options)
        if self.exact:
            return Limits(threshold, threshold)
        upper = min(threshold, self.moments.identity_limit(batch_size, **options))
        return Limits(min(upper, self.moments.sufficient_limit(batch_size, **options)), upper)

    @property
    def stable(self) -> bool | None:
        """Whether SGD stays here at its learning rate, to first order; None where the bounds leave it open."""
        if self.learning_rate is None:
            return None
        lower, upper = self._own_limits
        if self.learning_rate > upper * (1 + ROUNDING):
            return False
        return True if self.learning_rate <= lower * (1 + ROUNDING) else None

    def figure(self) -> Figure:
        """The sharpness numbers over what the learning rate allows, and the thresholds at each batch size."""
        n = self.moments.samples
        bits = n.bit_length()
        sizes = sorted({*(2**k for k in range(0, bits, 1 + bits // 10)), self.batch_size, n})
        limits = [self.limits(size) for size in sizes]
        options: Any = {"replacement": self.replacement, "momentum": self.momentum}
        columns: dict[str, Any] = {
            "batch_size": sizes,
            "sufficient": [found.sufficient for found in limits],
            "mean_square": [found.mean_square for found in limits],
            "trace": [self.moments.trace_limit(size, **options) for size in sizes],
            "gradient_descent": [self.gradient_descent_limit] * len(sizes),
            "number": ["trace", "largest\neigenvalue", "mean square"],
            "limit": [self.trace_limit, self.gradient_descent_limit, self.mean_square_limit],
            "learning_rate": [math.nan if self.learning_rate is None else self.learning_rate],
            "at_batch_size": [self.batch_size],
        }
        return Figure(
            "stability",
            "Learning rates at which this minimum is stable",
            "Left: the learning rate over what each measure of sharpness allows; above 1 SGD leaves this minimum. "
            "Right: the threshold at each batch size, from the limit that the trace sets to small batches to that of "
            "gradient descent; above the line the linearised dynamics blow up.",
            columns,
            _draw,
            size=(8.6, 3.6),
            panels=(1, 2),
        )


def stability_report(
    net: Network,
    loss: Loss,
    data: Data,
    learning_rate: int | float | None,
    batch_size: int,
    *,
    momentum: int | float = 0.0,
    replacement: bool = True,
    params: Params | None = None,
    chunk: int = 256,
    interpolation_tolerance: float = 1e-3,
    exact: bool | None = None,
) -> StabilityReport:
    r"""Trace, largest eigenvalue and Frobenius norm of G at these weights, and the learning rates that they allow.

    The Hessian of an interpolating minimum is G. Of half the squared distance (`half_square`) G is that of the paper;
    a mean without the half has twice its curvature and half its thresholds. For cross-entropy the loss's own Hessian
    in the outputs is taken in: G is the generalised Gauss-Newton matrix.

    Args:
        net: a module, or a function (params, inputs) -> outputs with `params=`.
        loss: (outputs, targets) -> the mean over samples, convex in the outputs.
        data: the training data, (inputs, targets) or a re-iterable of such batches: the thresholds are of its samples.
        learning_rate: at these weights; after a decay, the last one. None: only the limits are wanted.
        batch_size: samples a step, at most n.
        momentum: of the heavy ball, as in PyTorch's SGD.
        replacement: whether a batch may hold a sample twice; epochs of shuffled batches are without.
        params: the parameters trained; by default the module's trainable ones.
        chunk: rows of per-sample gradients at a time.
        interpolation_tolerance: training loss up to which G counts as the Hessian.
        exact: whether to keep all directions, so that all numbers are exact; by default where they are few. Else the
            threshold is bounded from both sides.
    Raises: BadInput, for parameters that are not finite, a batch size, rate or momentum out of its range, batch
        normalisation in training mode, and data or losses of another kind; NotDeterministic, if two passes disagree.
    Source: Wu and Su 2023, arXiv:2305.17490; the threshold: Mulayoff and Michaeli 2023, arXiv:2306.07850; alignment:
        Wu, Wang and Su 2022, arXiv:2207.02628.
    """
    if learning_rate is not None and not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise BadInput(f"the learning rate must be above 0 and finite, got {learning_rate}; None where it is not known")
    rows = CurvatureRows.of(net, loss, data, params=params, chunk=chunk)
    if exact is None:
        count = rows.samples * rows.directions
        rank = min(count, rows.parameters)
        exact = rank <= TABLE_RANK or count * rank**2 <= EXACT_WORK
    local, recursion = _all_directions(rows) if exact else _leading_directions(rows, net, loss, data, params)
    moments = _moments(local, recursion, rows)
    # At the door of what follows: refuses batch sizes and momentum out of their range.
    moments.trace_limit(batch_size, replacement=replacement, momentum=momentum)
    return StabilityReport(
        None if learning_rate is None else float(learning_rate),
        batch_size,
        replacement,
        float(momentum),
        rows.parameters,
        moments,
        recursion,
        exact,
        _alignment(recursion, rows.residuals(loss)) if exact else math.nan,
        rows.train_loss,
        rows.train_loss <= interpolation_tolerance,
        _notes(rows, exact, interpolation_tolerance),
    )


def fisher_trace(net: Network, loss: Loss, data: Data, *, params: Params | None = None, chunk: int = 256) -> float:
    r"""$\operatorname{tr} G$, exactly: the mean over samples of the squared norms of their rows, which are streamed.

    One backward pass for each sample and output. Arguments and errors as for `stability_report`.
    """
    norms = CurvatureRows.of(net, loss, data, params=params, chunk=chunk).square_norms()
    return float(norms.double().mean())


def fisher_kernel(
    net: Network, loss: Loss, data: Data, *, params: Params | None = None, chunk: int = 256
) -> Float[Tensor, "rows rows"]:
    r"""The kernel $\frac1n g_i \cdot g_j$ of all rows, which has the nonzero spectrum of G; sample by sample.

    For half squares and one output [n, n]; for C outputs [n C, n C], and for cross-entropy [n (C - 1), n (C - 1)],
    its Hessian in the outputs having that rank. Arguments and errors as for `stability_report`.
    """
    rows = CurvatureRows.of(net, loss, data, params=params, chunk=chunk)
    return rows.gram() / rows.samples


def _all_directions(rows: CurvatureRows) -> tuple[Tensor, SecondMoment]:
    """Each sample's own inner products [n, directions, directions], and the recursion on the range of G."""
    n, directions = rows.samples, rows.directions
    if n * directions > rows.parameters:
        gradients = torch.cat(list(rows)).double()
        return gradients @ gradients.mT, SecondMoment.of_rows(gradients)
    gram = rows.gram().double()
    own = gram.reshape(n, directions, n, directions).diagonal(dim1=0, dim2=2)
    return own.permute(2, 0, 1), SecondMoment.of_gram(gram, directions)


def _leading_directions(
    rows: CurvatureRows, net: Network, loss: Loss, data: Data, params: Params | None
) -> tuple[Tensor, SecondMoment]:
    """The same on the Krylov space of G, which holds its leading eigenvectors."""
    curvature = ggn(net, loss, batches(data, AT_ONCE), params=params, check=False)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(rows.parameters, 1, generator=generator, dtype=curvature.dtype).to(curvature.device)
    # A product first: what lies outside the range of G is of no use.
    basis = lanczos(curvature, LEADING, curvature @ start).basis[0].T
    own, projected = [], []
    for block in rows:
        own.append((block @ block.mT).double())
        projected.append((block @ basis).double())
    return torch.cat(own), SecondMoment.of_rows(torch.cat(projected))


def _moments(local: Float[Tensor, "samples row row"], recursion: SecondMoment, rows: CurvatureRows) -> GradientMoments:
    eigenvalues = recursion.eigenvalues
    return GradientMoments(
        samples=rows.samples,
        directions=rows.directions,
        trace=float(local.diagonal(dim1=1, dim2=2).sum(dim=1).mean()),
        largest_eigenvalue=float(eigenvalues[0]) if len(eigenvalues) else 0.0,
        frobenius=float(eigenvalues.norm()),
        fourth_moment=float(local.square().sum(dim=(1, 2)).mean()),
        largest_sample=float(torch.linalg.eigvalsh(local)[:, -1].max()),
    )


def _alignment(recursion: SecondMoment, residuals: Float[Tensor, "samples directions"]) -> float:
    gradients = (recursion.rows * residuals[..., None]).sum(dim=1)
    noise = (gradients.square() @ recursion.eigenvalues).mean()
    scale = residuals.square().sum(dim=1).mean() * recursion.eigenvalues.square().sum()
    return float(noise / scale) if float(scale) > 0 else math.nan


def _notes(rows: CurvatureRows, exact: bool, tolerance: float) -> tuple[str, ...]:
    notes = []
    if rows.train_loss > tolerance:
        notes.append(
            f"The training loss {rows.train_loss:.3g} is above {tolerance:g}: these weights do not interpolate, and "
            "the Hessian differs from G by the curvature of the residuals. The thresholds are those of G."
        )
    if not rows.quadratic:
        notes.append(
            "The loss is not a square: G is the generalised Gauss-Newton matrix, with the loss's own Hessian (softmax, "
            "for cross-entropy) at the outputs as they are. It interpolates only at infinity, where G vanishes."
        )
    if not exact:
        notes.append(
            f"The mean-square threshold is an upper bound, from {LEADING} leading directions of "
            f"{min(rows.samples * rows.directions, rows.parameters):,} and from the trace of all."
        )
    return tuple(notes)


def _draw(axes: Any, data: Mapping[str, Any]) -> None:
    left, right = axes
    rate, sizes = float(np.asarray(data["learning_rate"])[0]), np.asarray(data["batch_size"])
    limits = np.asarray(data["limit"], dtype=float)
    places = np.arange(len(limits))
    if math.isnan(rate):
        left.bar(places, limits, width=0.6, color=PALETTE[0])
        left.set(ylabel="largest learning rate allowed", yscale="log")
    else:
        ratios = rate / limits
        left.bar(places, ratios - 1, bottom=1, width=0.6, color=[PALETTE[int(ratio > 1)] for ratio in ratios])
        left.axhline(1, color=PALETTE[6], lw=1.2, ls="--", label="edge of stability")
        for place, ratio in zip(places, ratios, strict=True):
            left.annotate(f"{ratio:.2g}", (place, ratio), ha="center", va="bottom" if ratio > 1 else "top", fontsize=8)
        left.set(ylabel="learning rate over what is allowed", yscale="log")
        left.set_ylim(min(0.3, ratios.min() / 4), max(3.0, 4 * ratios.max()))
        left.legend()
    left.set_xticks(places, list(data["number"]))
    left.set(xlabel="measure of sharpness")
    right.plot(sizes, data["trace"], color=PALETTE[6], ls="--", lw=1, label="limit by the trace")
    right.plot(sizes, data["gradient_descent"], color=PALETTE[6], ls=":", lw=1.2, label="gradient descent")
    right.fill_between(sizes, data["sufficient"], data["mean_square"], color=PALETTE[0], alpha=0.2, lw=0)
    right.plot(sizes, data["mean_square"], "o-", color=PALETTE[0], label="mean-square threshold")
    if not math.isnan(rate):
        right.plot(data["at_batch_size"], [rate], "D", color=PALETTE[1], label="this training")
    right.set(xscale="log", yscale="log", xlabel="batch size", ylabel="learning rate")
    right.legend()
