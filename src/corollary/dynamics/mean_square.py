r"""The learning rate up to which the linearised recursion of SGD does not blow up in mean square, exactly.

At an interpolating minimum a step is $\delta' = (I - \eta A)\delta$ with $A = \frac1B \sum_{i \in batch} g_i g_i^\top$,
so that the second moment $M = E[\delta\delta^\top]$ follows
$$T(M) = M - \eta\, C(M) + \eta^2 D(M), \quad C(M) = GM + MG, \quad
D(M) = \frac cn \sum_i H_i M H_i + (1 - c)\, G M G,$$
with $H_i = g_i g_i^\top$, $G$ their mean, and $c = 1/B$, or $(n - B) / (B(n - 1))$ for batches without replacement.
$T$ is self-adjoint and keeps positive matrices positive, so its largest eigenvalue is its spectral radius, and that is
at most 1 just for $\eta \le \eta^* = 1 / \lambda_{\max}(C^{-1/2} D\, C^{-1/2})$ on the range of $G$.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import cast, final

import torch
from jaxtyping import Bool, Float
from scipy.optimize import brentq
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.base.network import refuse_non_finite
from corollary.linalg import SYMMETRIC, Operator, eigenpairs

TOLERANCE = 1e-9
"""Of the residual of the leading eigenpair, relative: its eigenvalue is exact to about the square over the gap."""
STEPS = 300
TABLE_RANK = 48
"""Fourth moments are kept as a table up to this rank: 48^4 numbers are 42 MB."""
PIECE = 2**24
"""Numbers that are held at a time while that table is summed."""


@final
@dataclass(frozen=True, eq=False)
class SecondMoment:
    r"""The recursion of the second moment around a minimum, in the eigenbasis of $G$ on its range.

    Args:
        rows: the gradients $g_i$, [n, outputs, r], float64; r is the rank of $G$.
        eigenvalues: the nonzero ones of $G$, [r], in decreasing order.
    """

    rows: Float[Tensor, "samples outputs rank"]
    eigenvalues: Float[Tensor, "rank"]

    @classmethod
    def of_rows(cls, rows: Float[Tensor, "samples *outputs parameters"]) -> "SecondMoment":
        """Of gradients as rows, one a sample or one for each output of a sample.

        Rows that were projected to a subspace (by orthonormal columns) give a recursion whose threshold is an upper
        bound on that of the rows themselves: it is tested on fewer matrices M.

        Raises: BadInput, for rows that are not finite, or empty.
        """
        _refuse_empty(rows)
        outputs = math.prod(rows.shape[1:-1])
        left, values, _ = torch.linalg.svd(rows.reshape(-1, rows.shape[-1]).double(), full_matrices=False)
        kept = _kept(values.square(), rows.dtype)
        return cls._of(left[:, kept] * values[kept], values[kept].square(), outputs)

    @classmethod
    def of_gram(cls, gram: Float[Tensor, "rows rows"], outputs: int = 1) -> "SecondMoment":
        """Of the inner products $g_i \\cdot g_j$ of all rows: `outputs` rows after each other belong to one sample.

        Raises: BadInput, for inner products that are not finite, or whose number is no multiple of `outputs`.
        """
        _refuse_empty(gram)
        if len(gram) % outputs:
            raise BadInput(f"{len(gram)} rows cannot be {outputs} for each sample: give outputs= as they were made")
        values, vectors = torch.linalg.eigh(gram.double())
        kept = _kept(values, gram.dtype).nonzero()[:, 0].flip(0)
        return cls._of(vectors[:, kept] * values[kept].sqrt(), values[kept], outputs)

    @classmethod
    def _of(cls, rows: Tensor, squares: Tensor, outputs: int) -> "SecondMoment":
        n = len(rows) // outputs
        return cls(rows.reshape(n, outputs, rows.shape[-1]), squares / n)

    @property
    def samples(self) -> int:
        """n."""
        return len(self.rows)

    @property
    def rank(self) -> int:
        """Of $G$."""
        return len(self.eigenvalues)

    def threshold(self, batch_size: int, *, replacement: bool = True, momentum: int | float = 0.0) -> float:
        r"""$\eta^*$; infinite where all gradients are zero.

        With heavy-ball momentum $\beta$ the moments of two successive steps are stationary where
        $\eta\,(D - \frac{\beta}{1 - \beta^2} Q) M = (1 - \beta)\, C M$, with
        $Q(M) = G^2 M + M G^2 - 2 \beta\, G M G$: the same problem with another right-hand side.

        Raises: BadInput, for a batch size below 1 or above n, or momentum outside [0, 1).
        """
        share = noise_share(self.samples, batch_size, replacement=replacement)
        refuse_momentum(momentum)
        if not self.rank:
            return math.inf
        values = self.eigenvalues
        root = self._pairs().sqrt()
        squares = values.square()
        carried = squares[:, None] + squares - 2 * momentum * torch.outer(values, values)
        damped = momentum / (1 - momentum**2) * carried / root.square()
        scaled = self._operator(lambda M: self._noise(M / root, share) / root - damped * M)
        # In the coordinates C^{1/2} M the identity is this root. The leading eigenvector comes from a positive matrix,
        # whose product with it is positive: the two are not orthogonal.
        start = torch.diag_embed(root.diagonal())
        return (1 - momentum) / _largest(scaled, start)

    def growth(self, learning_rate: float, batch_size: int, *, replacement: bool = True) -> float:
        r"""The spectral radius of $T$ on the range of $G$: the factor of the second moment's growth a step, at last.

        Raises: BadInput, for a batch size below 1 or above n.
        """
        share = noise_share(self.samples, batch_size, replacement=replacement)
        if not self.rank:
            return 1.0
        slope = 1 - learning_rate * self._pairs()
        recursion = self._operator(lambda M: slope * M + learning_rate**2 * self._noise(M, share))
        return _largest(recursion, torch.eye(self.rank, dtype=self.rows.dtype, device=self.rows.device))

    def _pairs(self) -> Float[Tensor, "rank rank"]:
        """The eigenvalues of C: sums of two eigenvalues of G."""
        return self.eigenvalues[:, None] + self.eigenvalues

    def _noise(self, M: Float[Tensor, "*k rank rank"], share: float) -> Float[Tensor, "*k rank rank"]:
        """D(M), for c = `share`."""
        drift = torch.outer(self.eigenvalues, self.eigenvalues) * M
        return share * self._mean_of_samples(M) + (1 - share) * drift if share else drift

    def _mean_of_samples(self, M: Float[Tensor, "*k rank rank"]) -> Float[Tensor, "*k rank rank"]:
        r"""$\frac1n \sum_i H_i M H_i$."""
        if self._fourth_moments is not None:
            return (M.flatten(-2) @ self._fourth_moments).unflatten(-1, M.shape[-2:])
        n, outputs, r = self.rows.shape
        flat = self.rows.reshape(n * outputs, r)
        inner = (flat @ M).unflatten(-2, (n, outputs)) @ self.rows.mT
        return flat.T @ (inner @ self.rows).flatten(-3, -2) / n

    @cached_property
    def _fourth_moments(self) -> Float[Tensor, "pairs pairs"] | None:
        """The mean of $H_i \\otimes H_i$ as a map on flat M, where it is small and no larger than the rows."""
        n, outputs, r = self.rows.shape
        if r > TABLE_RANK or r * r > n * outputs:
            return None
        above = torch.triu_indices(r, r, device=self.rows.device)
        place = torch.empty(r, r, dtype=torch.long, device=self.rows.device)
        place[above[0], above[1]] = place[above[1], above[0]] = torch.arange(above.shape[1], device=self.rows.device)
        total = self.rows.new_zeros(above.shape[1], above.shape[1])
        for some in self.rows.split(max(1, PIECE // (r * r))):
            entries = (some.mT @ some)[:, above[0], above[1]]
            total.addmm_(entries.T, entries)
        # The mean of H_ab H_cd, laid out from (b, c) to (a, d): H M H sums over b and c.
        return (
            (total / n)[place.flatten()][:, place.flatten()].reshape(r, r, r, r).permute(1, 2, 0, 3).reshape(r * r, -1)
        )

    def _operator(self, apply: Callable[[Tensor], Tensor]) -> Operator:
        """A self-adjoint map of matrices as an operator on flat vectors."""
        r = self.rank

        def matmat(columns: Tensor) -> Tensor:
            return apply(columns.T.reshape(-1, r, r)).reshape(-1, r * r).T

        return Operator((r * r, r * r), matmat, None, {SYMMETRIC}, self.rows.dtype, self.rows.device)


def mean_square_threshold(
    rows: Float[Tensor, "samples *outputs parameters"],
    batch_size: int,
    *,
    replacement: bool = True,
    momentum: int | float = 0.0,
) -> float:
    r"""The largest learning rate at which SGD stays at an interpolating minimum, in mean square and to first order.

    Args:
        rows: $g_i$, the gradient of the model's output at sample i with respect to the parameters (not of the loss,
            which is zero there), [n, parameters]; for several outputs [n, outputs, parameters]. They are those of the
            loss $\frac1{2n} \sum_i \lVert f(x_i) - y_i \rVert^2$: scaled by a, the loss has rows scaled by $\sqrt a$.
        batch_size: samples a step, at most n.
        replacement: whether a batch may hold a sample twice; without, `batch_size` n is gradient descent.
        momentum: of the heavy ball, as in PyTorch's SGD.
    Returns: $\eta^*$ in float64; infinite where all gradients are zero. For gradient descent with momentum $\beta$
        it is $2 (1 + \beta) / \lambda_{\max}(G)$.
    Raises: BadInput, for a batch size below 1 or above n, momentum outside [0, 1), and rows that are empty or not
        finite.
    Source: Mulayoff and Michaeli 2023, arXiv:2306.07850 (the threshold without momentum); linear stability in mean
        square as in Wu and Su 2023, arXiv:2305.17490.
    """
    return SecondMoment.of_rows(rows).threshold(batch_size, replacement=replacement, momentum=momentum)


def gaussian_mean_square_threshold(eigenvalues: Float[Tensor, "parameters"], batch_size: int) -> float:
    r"""$\eta^*$ for gradients drawn afresh from a Gaussian whose covariance has these eigenvalues, in closed form.

    The root of $\sum_j \eta\lambda_j / (2 - (1 + 1/B)\,\eta\lambda_j) = B$ below the first pole.

    Raises: BadInput, for a batch size below 1, or eigenvalues that are negative, not finite, or all zero.
    Source: fourth moments of a Gaussian (Isserlis 1918) in the recursion of the second moment.
    """
    values = eigenvalues.double()
    if batch_size < 1:
        raise BadInput(f"a batch holds at least 1 sample, got batch_size={batch_size}")
    if values.numel() == 0 or not bool(torch.isfinite(values).all() and (values >= 0).all() and (values > 0).any()):
        raise BadInput("a covariance has finite eigenvalues, none below 0 and not all 0")
    grown = 1 + 1 / batch_size

    def excess(rate: float) -> float:
        return float((rate * values / (2 - grown * rate * values)).sum()) - batch_size

    pole = 2 / (grown * float(values.max()))
    return cast(float, brentq(excess, 0.0, pole * (1 - 1e-15), xtol=1e-15 * pole))


def noise_share(samples: int, batch_size: int, *, replacement: bool) -> float:
    r"""c, the share of a batch's second moment that is not that of its mean: 1 at batch size 1, 0 for gradient descent.

    Raises: BadInput, for a batch size below 1 or above the number of samples.
    """
    if not 1 <= batch_size <= samples:
        raise BadInput(f"a batch holds between 1 and all {samples} samples, got batch_size={batch_size}")
    if replacement:
        return 1 / batch_size
    return (samples - batch_size) / (batch_size * (samples - 1)) if samples > 1 else 0.0


def refuse_momentum(momentum: int | float) -> None:
    """Raises: BadInput, for momentum outside [0, 1)."""
    if not 0 <= momentum < 1:
        raise BadInput(f"momentum lies in [0, 1), got {momentum}")


def _largest(operator: Operator, start: Float[Tensor, "rank rank"]) -> float:
    # A generator of its own: should the iteration have to start afresh, it is from the same vector every time.
    generator = torch.Generator().manual_seed(0)
    found = eigenpairs(operator, tolerance=TOLERANCE, steps=STEPS, start=start.flatten(), generator=generator)
    return float(found.values[0])


def _kept(squares: Float[Tensor, "values"], dtype: torch.dtype) -> Bool[Tensor, "values"]:
    """Which eigenvalues of G are not rounding. A wrong choice does no harm: it adds or leaves out a negligible one."""
    return squares > 10 * torch.finfo(dtype).eps * squares.max()


def _refuse_empty(given: Tensor) -> None:
    if given.numel() == 0:
        raise BadInput(f"a threshold needs gradients of at least one sample, got shape {list(given.shape)}")
    refuse_non_finite(given, "what was given for the gradients")
