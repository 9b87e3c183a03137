"""Extreme eigenvalues of the Hessian of a batch against the size of the batch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast, final

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.network import Batch, Loss, Params, batch_length, batches, map_inputs, refuse_non_finite
from corollary.base.progress import track
from corollary.base.seeds import Seeds
from corollary.evidence import PALETTE, Figure, Source, Table
from corollary.linalg import Operator, eigenpairs, ggn, hessian
from corollary.linalg.problem import Network

GRANZIOL_2022 = Source(
    "granziol2022learning",
    ("Diego Granziol", "Stefan Zohren", "Stephen Roberts"),
    "Learning Rates as a Function of Batch Size: A Random Matrix Theory Approach to Neural Network Training",
    2022,
    arxiv="2006.09092",
    venue="Journal of Machine Learning Research 23(173)",
)
CurvatureKind: TypeAlias = Literal["hessian", "ggn"]
_OPERATORS = {"hessian": hessian, "ggn": ggn}
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
TOLERANCE = 1e-3
"""Of residuals over the largest eigenvalue: the error of an eigenvalue goes with their square."""


def effective_batch(batch_size: ArrayLike, samples: int) -> np.ndarray:
    r"""$b = B / (1 - B/N)$: the batch drawn with replacement that has as much noise; infinite for all N samples.

    Raises: BadInput, if a batch size is not between 1 and the number of samples.
    """
    sizes = np.asarray(batch_size, dtype=np.float64)
    if not (np.all(sizes >= 1) and np.all(sizes <= samples)):
        raise BadInput(f"a batch holds between 1 and all {samples} samples; got batch size {batch_size}")
    left = 1 - sizes / samples
    return np.divide(sizes, left, out=np.full(sizes.shape, np.inf), where=left > 0)


@final
@dataclass(frozen=True)
class BatchCurvature:
    r"""Extreme eigenvalues of batch Hessians (or Gauss-Newton matrices), for several batches of each size.

    Args:
        batch_sizes: k sizes, ascending. largest, smallest: $\lambda_{\max}$ and $\lambda_{\min}$ of each batch.
        fluctuation: $\|H_B - H\|_F^2$ of each batch, by Hutchinson's estimate; NaN where it was not asked for.
        residuals: the larger residual norm of the two eigenpairs of each batch.
        full_largest, full_smallest: over all `samples`. parameters: P.
    """

    batch_sizes: tuple[int, ...]
    largest: Float[Tensor, "k repeats"]
    smallest: Float[Tensor, "k repeats"]
    fluctuation: Float[Tensor, "k repeats"]
    residuals: Float[Tensor, "k repeats"]
    full_largest: float
    full_smallest: float
    samples: int
    parameters: int
    kind: CurvatureKind

    @property
    def mean_largest(self) -> Float[Tensor, "k"]:
        """Mean largest eigenvalue at each size."""
        return self.largest.mean(1)

    @property
    def mean_smallest(self) -> Float[Tensor, "k"]:
        """Mean smallest eigenvalue at each size."""
        return self.smallest.mean(1)

    def moment_kappa(self) -> tuple[float, float]:
        r"""$\kappa$ from the size of the noise, $\kappa^2 = \frac{1}{P} \frac1N \sum_i \|H_i - H\|_F^2$, and its error.

        Exact for noise of independent entries. Real noise has low rank, which pushes eigenvalues further than its
        size says: this value lies below the fitted one. The error is one standard error over batches.

        Raises: BadInput, if the curve was measured with `probes=0`, or from batches of all data only.
        """
        effective = torch.from_numpy(effective_batch(np.asarray(self.batch_sizes), self.samples))
        kept = torch.isfinite(effective)
        # Without replacement, the noise of a batch is (N - B) / (N - 1) of that with it, and b counts (N - B) / N.
        correction = (self.samples - 1) / self.samples
        squares = correction * effective[kept, None] * self.fluctuation[kept].double().cpu() / self.parameters
        if squares.numel() == 0 or not bool(torch.isfinite(squares).all()):
            raise BadInput("the size of the noise was not measured: use probes >= 1 and batches smaller than all data")
        kappa = float(squares.mean().sqrt())
        error = float(squares.std()) / squares.numel() ** 0.5 if squares.numel() > 1 else float("nan")
        return kappa, error / (2 * kappa) if kappa > 0 else 0.0

    def table(self) -> Table:
        """Columns by batch size: means of both extremes, and their standard errors over batches."""
        count = self.largest.shape[1]
        spread = {"largest": self.largest, "smallest": self.smallest}
        errors = {
            f"{name}_error": (values.std(1) / count**0.5 if count > 1 else torch.full_like(values[:, 0], torch.nan))
            for name, values in spread.items()
        }
        return {
            "batch_size": np.asarray(self.batch_sizes),
            "largest": self.mean_largest.cpu().numpy(),
            "largest_error": errors["largest_error"].cpu().numpy(),
            "smallest": self.mean_smallest.cpu().numpy(),
            "smallest_error": errors["smallest_error"].cpu().numpy(),
        }

    def figure(self) -> Figure:
        """Both extremes against batch size, with those of all data."""
        data = {**self.table(), "full_largest": [self.full_largest], "full_smallest": [self.full_smallest]}
        what = "Hessian" if self.kind == "hessian" else "Gauss-Newton matrix"
        return Figure(
            "batch-extremes",
            f"Extreme eigenvalues of the {what} of a batch",
            f"Mean over {self.largest.shape[1]} batches of each size, with standard errors; dashed: all "
            f"{self.samples} samples. Smaller batches have sharper extremes, at both ends.",
            data,
            _draw_extremes,
        )


def batch_curvature_curve(
    net: Network,
    loss: Loss,
    data: Batch,
    batch_sizes: Sequence[int],
    *,
    kind: CurvatureKind = "hessian",
    repeats: int = 8,
    steps: int = 25,
    probes: int = 4,
    seed: int = 0,
    params: Params | None = None,
    samples_at_once: int = 4096,
) -> BatchCurvature:
    r"""Largest and smallest eigenvalue of the Hessian of random batches, for several batch sizes, by Lanczos.

    Batches are drawn without replacement. The value of one batch has a skewed law below 16 samples: at least 8 batches
    of each size make a mean worth having.

    Args:
        net: a module in evaluation mode, or a function (params, inputs) -> outputs with `params`.
        loss: (outputs, targets) -> the mean over samples.
        data: (inputs, targets), all samples.
        batch_sizes: each between 1 and the number of samples.
        kind: the Hessian, or the Gauss-Newton matrix.
        repeats: batches of each size. steps: at most so many Hessian-vector products for both extremes of a batch.
        probes: random vectors for the size of the noise, one more product each; 0 leaves it out.
        samples_at_once: larger batches are differentiated in pieces, so that memory is that of one piece.
    Returns: the curve, with the values over all data beside it.
    Raises: BadInput, for a batch size that the data does not have, layers that couple samples or are random (by name),
        derivatives that are not symmetric, and everything else `hessian` refuses.
    Source: Granziol, Zohren and Roberts 2022, arXiv 2006.09092; Lanczos with full reorthogonalisation.
    """
    samples = batch_length(data[0])
    sizes = tuple(sorted(set(batch_sizes)))
    _refuse_bad_sizes(sizes, samples, repeats, probes)
    refuse_random_layers(net)
    build = _OPERATORS[kind]
    everything = cast(list[Batch], batches(data, samples_at_once))
    # Checked once on all data, not for each batch: determinism, a mean over samples, symmetry.
    full = build(net, loss, everything, params=params)
    generator = Seeds(seed)("batch curvature")
    signs = 2.0 * torch.randint(2, (full.shape[0], probes), generator=generator) - 1
    signs = signs.to(full.device, full.dtype)
    # Extremes of all data are measured once, and every curve ends in them: more steps.
    reference = _extremes(full, 4 * steps, generator)
    image = full @ signs if probes else signs
    rows = []
    for size, batch in _random_batches(data, sizes, repeats, generator):
        parts = batch if size <= samples_at_once else cast(list[Batch], batches(batch, samples_at_once))
        op = build(net, loss, parts, params=params, check=False)
        noise = float((op @ signs - image).square().sum(0).mean()) if probes else float("nan")
        rows.append((*_extremes(op, steps, generator), noise))
    largest, smallest, residuals, fluctuation = (
        torch.tensor(column, dtype=torch.float64).reshape(len(sizes), repeats) for column in zip(*rows, strict=True)
    )
    return BatchCurvature(
        sizes, largest, smallest, fluctuation, residuals, *reference[:2], samples, full.shape[0], kind
    )


def refuse_random_layers(net: Network) -> None:
    """Raises: BadInput, naming a layer that draws random numbers in the mode it is in."""
    for name, module in net.named_modules() if isinstance(net, nn.Module) else ():
        if isinstance(module, _DROPOUTS) and module.training and module.p > 0:
            raise BadInput(
                f"layer {name!r} ({type(module).__name__}) is in training mode, so each product would see another "
                "network. Call net.eval() first."
            )


def _random_batches(
    data: Batch, sizes: Sequence[int], repeats: int, generator: torch.Generator
) -> Iterator[tuple[int, Batch]]:
    """`repeats` batches of each size, drawn without replacement."""
    inputs, targets = data
    samples = len(targets)
    wanted = [size for size in sizes for _ in range(repeats)]
    for size in track(wanted, "batches whose curvature is measured", len(wanted)):
        rows = torch.randperm(samples, generator=generator)[:size].to(targets.device)
        yield size, (map_inputs(lambda t, rows=rows: t[rows], inputs), targets[rows])


def _extremes(op: Operator, steps: int, generator: torch.Generator) -> tuple[float, float, float]:
    """The largest and the smallest eigenvalue, and the larger of their residuals."""
    if op.shape[0] == 1:
        value = float(op.to_dense())
        return value, value, 0.0
    pairs = eigenpairs(op, 2, "both", tolerance=TOLERANCE, steps=steps, generator=generator)
    refuse_non_finite(pairs.values, "the Hessian's extreme eigenvalues")
    return float(pairs.values[0]), float(pairs.values[1]), float(pairs.residuals.max())


def _refuse_bad_sizes(sizes: tuple[int, ...], samples: int, repeats: int, probes: int) -> None:
    if not sizes:
        raise BadInput("no batch size was given; give at least one between 1 and the number of samples")
    effective_batch(np.asarray(sizes), samples)
    if repeats < 1 or probes < 0:
        raise BadInput(f"at least one batch of each size and no negative number of probes; got {repeats}, {probes}")


def _draw_extremes(axes: Any, data: Mapping[str, Any]) -> None:
    for name, colour, text in (("largest", PALETTE[1], "largest"), ("smallest", PALETTE[0], "smallest")):
        axes.errorbar(data["batch_size"], data[name], data[f"{name}_error"], fmt="o-", color=colour, label=text)
        axes.axhline(float(data[f"full_{name}"][0]), color=colour, linestyle="--", linewidth=1)
    axes.set(xlabel="batch size", ylabel="eigenvalue", xscale="log")
    axes.legend()
