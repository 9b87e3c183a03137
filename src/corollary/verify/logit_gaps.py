r"""Gaps between the largest logits, and the smallest perturbation that closes one, to first order.

With logits sorted, $h_{(1)} \ge h_{(2)} \ge \dots$, the gap to the j-th largest is $\Delta_j = h_{(1)} - h_{(j)}$.
Close to zero its distribution is the same in every network: $P(\Delta_j < t) \sim t^{j-1}$.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.base.network import refuse_non_finite
from corollary.base.progress import track
from corollary.evidence import Source
from corollary.verify.classifier import Classifier, attackable, logits_of
from corollary.verify.reach import Norm, order_of

if TYPE_CHECKING:
    from scipy.stats.distributions import rv_frozen

CUBUK_2017 = Source(
    key="cubuk2017intriguing",
    authors=("Ekin D. Cubuk", "Barret Zoph", "Samuel S. Schoenholz", "Quoc V. Le"),
    title="Intriguing properties of adversarial examples",
    year=2017,
    arxiv="1711.02846",
)
GAPS = (2, 3, 4)
FEWEST_BELOW = 10
"""Samples that must lie below the lowest quantile of a fit; with fewer, their number alone is a third uncertain."""
GRADIENT_ENTRIES = 2**24
"""Numbers in the gradients held at once: 64 MiB in float32."""


def sorted_gaps(logits: Float[Tensor, "sample class"], j: Sequence[int] = GAPS) -> Float[Tensor, "sample gap"]:
    r"""$\Delta_j = h_{(1)} - h_{(j)}$ of given logits; `j` counts from 1, the largest.

    Raises: BadInput, for fewer than two classes, logits that are not finite, or a `j` that is not in 2..classes.
    """
    if logits.shape[1] < 2:
        raise BadInput(f"a gap between logits needs two classes or more, got {logits.shape[1]}")
    refuse_non_finite(logits, "the logits")
    if not j or min(j) < 2 or max(j) > logits.shape[1]:
        raise BadInput(f"gaps are numbered j = 2..{logits.shape[1]} for {logits.shape[1]} classes, got {tuple(j)}")
    top = logits.topk(max(j), dim=1).values
    return top[:, :1] - top[:, [number - 1 for number in j]]


def logit_gaps(
    model: Classifier, x: Float[Tensor, "sample *input"], j: Sequence[int] = GAPS, *, batch: int = 4096
) -> Float[Tensor, "sample gap"]:
    r"""Gaps $\Delta_j(x) = h_{(1)}(x) - h_{(j)}(x)$ between the largest logit and the j-th largest.

    Args:
        model: inputs -> logits; a module is called in evaluation mode.
        j: which gaps; 1 would be the largest logit itself.
        batch: inputs at a time.
    Returns: one column for each of `j`.
    Raises: BadInput, for fewer than two classes, logits that are not finite, or a `j` that is not in 2..classes.
    Source: Cubuk et al. 2017, arXiv 1711.02846, section 3.
    """
    with attackable(model), torch.no_grad():
        return sorted_gaps(torch.cat([logits_of(model, some) for some in x.split(batch)]), j)


def gap_exponents(
    values: Float[Tensor, "sample gap"], quantiles: Sequence[float] = (0.005, 0.02, 0.08)
) -> Float[Tensor, "gap"]:
    r"""For each column the exponent a of $P(\Delta < t) \sim t^a$, from the given quantiles.

    It is the least-squares slope of $\log q$ on $\log t_q$, where a share q of the samples lies at or below $t_q$; a
    column with a quantile at zero (tied logits) has exponent 0. It serves as well for critical radii, whose exponent
    is that of the adversarial error.

    Args: `quantiles`: two or more; for 1,797 samples take (0.02, 0.05, 0.15).
    Returns: float64. For gaps 2, 3, 4 of logits that behave like independent draws: 1, 2, 3.
    Raises: BadInput, for values below zero, or if fewer than 10 samples lie below the lowest quantile.
    Source: Cubuk et al. 2017, arXiv 1711.02846, figure 4.
    """
    shares = torch.tensor(sorted(set(quantiles)), dtype=torch.float64)
    if len(shares) < 2 or not 0 < shares[0] < shares[-1] <= 1:
        raise BadInput(f"an exponent needs two quantiles or more in (0, 1], got {tuple(quantiles)}")
    if len(values) * float(shares[0]) < FEWEST_BELOW:
        raise BadInput(
            f"of {len(values)} samples fewer than {FEWEST_BELOW} lie below the quantile {float(shares[0]):g}: "
            f"give more samples, or quantiles from {min(1.0, FEWEST_BELOW / max(len(values), 1)):.2g} on"
        )
    if not bool((values >= 0).all()):
        raise BadInput("gaps and radii are zero or more; these hold negative numbers or NaN")
    places = (shares * len(values)).ceil().long() - 1
    at = values.double().cpu().sort(dim=0).values[places]
    if at.isinf().any():
        raise BadInput(f"the quantile {float(shares[-1]):g} is infinite: too many samples have a gradient of zero")
    tied = (at == 0).any(0)
    across = at.where(at > 0, 1).log()
    across, up = across - across.mean(0), (shares.log() - shares.log().mean())[:, None]
    return torch.where(tied, 0, (across * up).sum(0) / across.square().sum(0))


def tie_fraction(gaps: Float[Tensor, "sample gap"]) -> Float[Tensor, "gap"]:
    """Share of samples whose gap is exactly zero, for each column: mass that quantised or dead networks have there."""
    return (gaps == 0).double().mean(0)


def uniform_gap_distribution(classes: int, j: int) -> "rv_frozen":
    r"""The exact distribution of $\Delta_j$ for `classes` independent uniform logits on [0, 1]: Beta(j-1, K-j+2).

    Returns: a frozen distribution of scipy (`.cdf`, `.pdf`, `.mean()`).
    Raises: BadInput, unless 2 <= j <= classes.
    Source: spacings of uniform order statistics; compared with networks by Cubuk et al. 2017, arXiv 1711.02846, fig. 4.
    """
    if not 2 <= j <= classes:
        raise BadInput(f"gaps are numbered j = 2..K for K classes, got j = {j} and K = {classes}")
    from scipy.stats import beta

    frozen: Any = beta(j - 1, classes - j + 2)
    return frozen


def critical_epsilon(
    model: Classifier,
    x: Float[Tensor, "sample *input"],
    norm: Norm = "linf",
    labels: Int[Tensor, "sample"] | None = None,
    *,
    batch: int = 512,
) -> Float[Tensor, "sample"]:
    r"""The smallest perturbation that changes the answer, to first order, for each input.

    $\epsilon^*(x) = \min_{j \ne c} \frac{h_c - h_j}{\lVert \nabla_x (h_c - h_j) \rVert_q}$ with $q = 1$ for
    perturbations bounded in the largest entry ("linf") and $q = 2$ for those bounded in Euclidean norm ("l2"). For a
    network that is affine in its input it is exact. It takes K backward passes, vectorised.

    Args:
        labels: the class c; by default the predicted one.
        batch: inputs at a time.
    Returns: radii; 0 where the answer is not c to begin with, infinite where no other class has a gradient.
    Raises: BadInput, for fewer than two classes or logits that are not finite.
    Source: Cubuk et al. 2017, arXiv 1711.02846, section 3 (linear response).
    """
    dual = 1 if math.isinf(order_of(norm)) else 2
    found = []
    with attackable(model):
        for start in track(range(0, len(x), batch), "critical perturbations"):
            some = x[start : start + batch]
            found.append(_critical(model, some, None if labels is None else labels[start : start + batch], dual))
    return torch.cat(found)


def _critical(model: Classifier, x: Tensor, labels: Tensor | None, dual: int) -> Tensor:
    point = x.detach().requires_grad_()
    logits = logits_of(model, point)
    own = logits.argmax(1) if labels is None else labels
    values = logits.detach()
    gaps = values.gather(1, own[:, None]) - values
    classes = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
    rows = max(1, GRADIENT_ENTRIES // max(1, x.numel()))
    norms = [
        _gradients(logits, point, classes[own] - some[:, None]).flatten(2).norm(p=dual, dim=2)
        for some in classes.split(rows)
    ]
    norm = torch.cat(norms).T
    radius = torch.where(gaps <= 0, 0, torch.where(norm > 0, gaps / norm, math.inf))
    return radius.scatter(1, own[:, None], math.inf).amin(1)


def _gradients(logits: Tensor, point: Tensor, rows: Tensor) -> Tensor:
    """Gradients (row, sample, *input) of the sums of `rows` (row, sample, class) times logits, by each sample."""
    if not logits.requires_grad:
        return torch.zeros((len(rows), *point.shape), dtype=point.dtype, device=point.device)
    try:
        return torch.autograd.grad(logits, point, rows, retain_graph=True, is_grads_batched=True)[0]
    except RuntimeError:  # a backward pass of the user's that PyTorch cannot vectorise still runs row by row
        return torch.stack([torch.autograd.grad(logits, point, row, retain_graph=True)[0] for row in rows])
