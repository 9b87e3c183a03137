r"""Neural collapse: how far a classifier's last features have contracted to their class means, and these to a simplex.

Features h are the input of the last affine layer, $\mu_c$ their class means, $\mu_G$ the mean of the class means (each
class counts the same, however many samples it has), M the matrix with rows $\mu_c - \mu_G$.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.network import refuse_non_finite
from corollary.dynamics.last_layer import LastLayer, last_layer_on
from corollary.evidence import Figure, Source
from corollary.graph import Graph
from corollary.linalg.problem import Data

PAPYAN_2020 = Source(
    "papyan2020prevalence",
    ("Vardan Papyan", "X. Y. Han", "David L. Donoho"),
    "Prevalence of neural collapse during the terminal phase of deep learning training",
    2020,
    arxiv="2008.08186",
    doi="10.1073/pnas.2015509117",
    venue="Proceedings of the National Academy of Sciences",
)
CUTOFF = 1e-6
"""Directions between classes of a smaller variance, relative to the largest, are left out of the pseudo-inverse."""


@dataclass(frozen=True)
class NeuralCollapse:
    r"""The four signs of neural collapse; all are 0 at full collapse.

    Attributes:
        nc1: variability within classes over that between them, $\operatorname{tr}(\Sigma_W \Sigma_B^\dagger) / C$.
        nc2_angle: mean of $|\cos(\mu_c - \mu_G, \mu_{c'} - \mu_G) + 1 / (C - 1)|$ over pairs of classes.
        nc2_norm: standard deviation over mean of $\lVert \mu_c - \mu_G \rVert$ (with $C - 1$ degrees of freedom).
        nc3: $\lVert W / \lVert W \rVert_F - M / \lVert M \rVert_F \rVert_F^2$ with the last layer's weights, at most 4;
            None where that layer has no row for each class.
        nc4: share of samples that the network and the nearest class mean put into different classes; None without
            predictions.
        classes: the labels, in the order of `means`.
        means: M, the class means less their mean, `[class, feature]`.
        rank: number of directions in which class means differ, at most C - 1.
        samples: how many were used.
        layer: whose input the features are.
    """

    nc1: float
    nc2_angle: float
    nc2_norm: float
    nc3: float | None
    nc4: float | None
    classes: tuple[int, ...]
    means: Float[Tensor, "class feature"]
    rank: int
    samples: int
    layer: str = ""

    @property
    def cosines(self) -> Float[Tensor, "class class"]:
        """Cosines between centred class means: -1 / (C - 1) off the diagonal at full collapse."""
        unit = _unit_rows(self.means)
        return unit @ unit.T

    def figure(self) -> Figure:
        """The cosine matrix of the class means."""
        count = len(self.classes)
        row, column = torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij")
        return Figure(
            "class-mean-cosines",
            "Angles between class means",
            f"Cosine between the class means of the last features, less their mean. At full collapse every pair of "
            f"classes has {-1 / (count - 1):.3f}: as far apart as {count} directions can be.",
            {
                "class_row": [self.classes[i] for i in row.flatten().tolist()],
                "class_column": [self.classes[i] for i in column.flatten().tolist()],
                "cosine": self.cosines.flatten().cpu().numpy(),
            },
            _draw_cosines,
            size=(4.8, 4.0),
        )


def neural_collapse(
    net: nn.Module | Graph, data: Data, *, layer: str | None = None, batch_size: int = 1024
) -> NeuralCollapse:
    """NC1 to NC4 of any classifier, in evaluation mode. They describe the data the network was trained on.

    Args:
        net: returns a score for each class `[n, classes]`, or one score whose sign decides `[n]` or `[n, 1]`. A module
            is captured once to find its last layer, unless `layer` names it, and is not written to.
        data: `(inputs, labels)`, or a re-iterable of such batches; labels are integers `[n]` (two different numbers
            for one score, the larger one where it is positive) or one-hot rows.
        layer: name of the module whose input are the features; by default the last affine layer of the program.
        batch_size: samples in one pass.
    Raises: BadInput, for a class with fewer than two samples, fewer than two classes, class means that coincide, a
        program without a last affine layer, or an unknown layer; CannotCapture, if the program cannot be captured and
        no layer is named.
    Source: Papyan, Han and Donoho 2020, arXiv 2008.08186; under the square loss, Xu et al. 2023.
    """
    found = last_layer_on(net, data, layer=layer, batch_size=batch_size)
    return _of_last_layer(found)


def collapse_of(
    features: Float[Tensor, "sample feature"],
    labels: Int64[Tensor, "label"],
    *,
    weight: Float[Tensor, "row column"] | None = None,
    predictions: Int64[Tensor, "prediction"] | None = None,
) -> NeuralCollapse:
    """NC1 to NC4 of given features, in float64.

    Args:
        labels: any integers, one a sample; each class needs two samples.
        weight: a row of the last layer for each class, in the order of the sorted labels; without it there is no NC3.
        predictions: the labels that the network gives, one a sample; without them there is no NC4.
    Raises: BadInput, as `neural_collapse` does, and for lengths or widths that disagree.
    """
    _check(features, labels, weight, predictions)
    h = features.double()
    classes, index, counts = labels.unique(return_inverse=True, return_counts=True)
    if len(classes) < 2 or bool((counts < 2).any()):
        few = {int(c): int(n) for c, n in zip(classes, counts, strict=True) if n < 2}
        raise BadInput(
            f"neural collapse compares at least 2 classes of at least 2 samples, got {len(classes)} classes"
            + (f", of which these have too few samples (class: samples): {few}" if few else "")
        )
    means = torch.zeros(len(classes), h.shape[1], dtype=h.dtype, device=h.device).index_add_(0, index, h)
    means /= counts[:, None]
    centred = means - means.mean(dim=0)
    _, spread, directions = torch.linalg.svd(centred, full_matrices=False)
    if not float(spread[0]) > 1e-12 * float(h.abs().max()):
        raise BadInput("the class means coincide: the features do not tell the classes apart, not even on average")
    kept = spread.square() > CUTOFF * spread[0].square()
    # Sigma_B has the eigenvalues spread^2 / C along the directions, so the trace over C is a mean of squares.
    within = (h - means[index]) @ directions[kept].T / spread[kept]
    norms = torch.linalg.vector_norm(centred, dim=1)
    return NeuralCollapse(
        nc1=float(within.square().sum(dim=1).mean()),
        nc2_angle=_angle(centred),
        nc2_norm=float(norms.std() / norms.mean()),
        nc3=None if weight is None else _alignment(weight.double(), centred),
        nc4=None if predictions is None else _disagreement(h, means, classes, predictions),
        classes=tuple(classes.tolist()),
        means=centred,
        rank=int(kept.sum()),
        samples=len(h),
    )


def _of_last_layer(found: LastLayer) -> NeuralCollapse:
    classes = found.labels.unique()
    weight = found.weight
    if weight is not None and len(weight) == 1 and len(classes) == 2:
        weight = torch.cat([-weight, weight])  # one score is the difference of the scores of two classes
    if weight is not None and len(weight) != len(classes):
        weight = None
    measured = collapse_of(found.features, found.labels, weight=weight, predictions=found.predictions)
    return NeuralCollapse(**{**vars(measured), "layer": found.name})


def _check(features: Tensor, labels: Tensor, weight: Tensor | None, predictions: Tensor | None) -> None:
    refuse_non_finite(features, "the features")
    if len(labels) != len(features) or (predictions is not None and len(predictions) != len(features)):
        raise BadInput(f"{len(features)} features need as many labels and predictions, got {len(labels)} labels")
    if weight is not None and weight.shape != (len(labels.unique()), features.shape[1]):
        raise BadInput(
            f"the last layer's weights are wanted as one row a class, [{len(labels.unique())}, {features.shape[1]}], "
            f"got {list(weight.shape)}"
        )


def _unit_rows(rows: Tensor) -> Tensor:
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


def _angle(centred: Tensor) -> float:
    unit, count = _unit_rows(centred), len(centred)
    deviation = (unit @ unit.T + 1 / (count - 1)).abs()
    return float((deviation.sum() - deviation.diagonal().sum()) / (count * (count - 1)))


def _alignment(weight: Tensor, centred: Tensor) -> float:
    return float((weight / weight.norm() - centred / centred.norm()).square().sum())


def _disagreement(h: Tensor, means: Tensor, classes: Tensor, predictions: Tensor) -> float:
    nearest = torch.cat([torch.cdist(part, means).argmin(dim=1) for part in h.split(8192)])
    return float((classes[nearest] != predictions).double().mean())


def _draw_cosines(axes: Any, data: Mapping[str, Any]) -> None:
    names = list(dict.fromkeys(data["class_row"]))
    matrix = data["cosine"].reshape(len(names), len(names))
    image = axes.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r")
    axes.grid(visible=False)
    axes.set(xlabel="class", ylabel="class")
    if len(names) <= 20:
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(names)), names)
    axes.figure.colorbar(image, ax=axes, label="cosine of class means")
