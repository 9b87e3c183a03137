"""Grokking: when a network fits its training set, when it generalises, and how linear its function is by then."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.network import Inputs, batch_length, call, evaluating, map_inputs, refuse_non_finite
from corollary.engine import TrainingRecord
from corollary.evidence import PALETTE, Figure, Source

XU_2024 = Source(
    key="xu2024benign",
    authors=("Zhiwei Xu", "Yutong Wang", "Spencer Frei", "Gal Vardi", "Wei Hu"),
    title="Benign Overfitting and Grokking in ReLU Networks for XOR Cluster Data",
    year=2024,
    arxiv="2310.02541",
)
ROWS_AT_ONCE = 4096
"""Samples that are evaluated together, to bound memory."""


class GrokkingDelay(NamedTuple):
    """When a run fitted its training set, and when it generalised.

    Fields:
        fit: the first step with the training accuracy asked for; NaN if it never came.
        generalise: the first step with the test accuracy asked for; NaN if it never came.
    """

    fit: float
    generalise: float

    @property
    def delay(self) -> float:
        """Steps from the fit to the generalisation: above 0 is grokking, NaN if one of the two never came."""
        return self.generalise - self.fit


@dataclass(frozen=True)
class GrokRecord:
    """A run on XOR clusters, step by step.

    Attributes:
        record: columns `loss`, `train_accuracy` (labels as given, noise included), `clean_accuracy` (the same samples,
            true labels), `test_accuracy`, `odd_fraction`, `surrogate_agreement` (share of test points on which the sign
            is that of the linear classifier of the first step) and `alignment` [sign, mean]: mean over the neurons of
            that output sign of |cos| between weights and cluster mean.
        train_outputs, test_outputs: what the network gave at each step.
        network: after the last step.
    """

    record: TrainingRecord
    train_outputs: Float[Tensor, "step sample"]
    test_outputs: Float[Tensor, "step test"]
    network: nn.Module

    def figure(self) -> Figure:
        """Accuracies, and the odd fraction with the alignments, over the steps."""
        table = self.record.to_table()
        return Figure(
            "grokking",
            "Fitted at once, generalised later",
            "Left: accuracy on the training labels, noise included, and on clean test points. Right: the odd, that is "
            "linear, fraction of the function, and the alignment of neurons with the cluster means of their class.",
            {name: column[1:] for name, column in table.items()},
            _draw_record,
            size=(8.6, 3.6),
            panels=(1, 2),
        )


def grokking_delay(
    record: TrainingRecord,
    *,
    fit: float | int = 1.0,
    generalise: float | int = 0.95,
    train: str | None = None,
    test: str = "test_accuracy",
) -> GrokkingDelay:
    """The first steps at which a run fits its training set and generalises.

    Args:
        record: of one network, with accuracies on training and test data; only measured steps are seen.
        fit: training accuracy that counts as fitted.
        generalise: test accuracy that counts as generalised.
        train: column of the training accuracy; by default `train_accuracy`, else `accuracy` (of the step's batch).
        test: column of the test accuracy.
    Raises: BadInput, if a column is missing or holds several members, or an accuracy asked for is outside (0, 1].
    """
    for name, wanted in (("fit", fit), ("generalise", generalise)):
        if not 0 < wanted <= 1:
            raise BadInput(f"{name} is an accuracy in (0, 1], got {wanted}")
    train = train or ("train_accuracy" if "train_accuracy" in record.columns else "accuracy")
    return GrokkingDelay(_first(record, train, fit), _first(record, test, generalise))


def odd_fraction(net: nn.Module, x: Inputs) -> float:
    r"""Share of the odd part in a function: $\sum \lVert\tfrac12 (f(x) - f(-x))\rVert^2 / \sum \lVert f(x)\rVert^2$.

    In a two-layer ReLU network without biases the odd part is the linear part, $\tfrac12 \sum_j a_j w_j^T x$, so this
    is the fraction of the function that is linear: near 1 when small initial weights have made one step, and lower once
    features are learned. On a finite sample the odd and the even part are not orthogonal, so that it may slightly
    exceed 1; over inputs whose distribution is symmetric it lies in [0, 1].

    Args:
        net: any module; evaluated in evaluation mode.
        x: inputs, negated sample by sample.
    Raises: BadInput, if there are no inputs, or the outputs are not finite or zero throughout.
    Source: Xu et al. 2024, arXiv 2310.02541, the linear classifier of the first step.
    """
    forward, mirrored = outputs_of(net, x), outputs_of(net, map_inputs(torch.neg, x))
    total = float(forward.double().square().sum())
    if total == 0:
        raise BadInput("the network's outputs are zero on all inputs: no part of them is odd or even")
    return float((forward.double() - mirrored.double()).square().sum()) / (4 * total)


class AffineShare(NamedTuple):
    """How much of a function an affine map of the inputs explains, on samples that the map was not fitted to.

    Fields:
        r2: share of the variance over samples, all outputs together; below 0 where the map is worse than the mean.
        outputs, fitted: what the network gives on the held-out samples, and what the affine map gives.
    """

    r2: float
    outputs: Float[Tensor, "sample output"]
    fitted: Float[Tensor, "sample output"]


def affine_share(
    x: Float[Tensor, "fit *input"],
    outputs: Float[Tensor, "fit *output"],
    held_out_x: Float[Tensor, "sample *input"],
    held_out_outputs: Float[Tensor, "sample *output"],
) -> AffineShare:
    r"""How affine a function is on data: $R^2$ on held-out samples of the least-squares map $x \mapsto Ax + b$.

    Unlike `odd_fraction` it asks nothing of the network, and looks at the data only, not at its mirror image.
    Returns: the share, which the best affine map can only exceed, by about (inputs / samples of the fit).
    Raises: BadInput, if there are not at least twice as many samples to fit as inputs, or the outputs do not vary.
    """
    inputs, values = (tensor.detach().flatten(1).cpu().double() for tensor in (x, outputs[:, None].flatten(1)))
    if len(inputs) < 2 * inputs.shape[1]:
        raise BadInput(
            f"an affine map of {inputs.shape[1]} inputs is fitted to twice as many samples, got {len(inputs)}"
        )
    held_out = held_out_x.detach().flatten(1).cpu().double()
    wanted = held_out_outputs.detach()[:, None].flatten(1).cpu().double()
    mean_x, mean_y = inputs.mean(0), values.mean(0)
    # Constant inputs make the system singular; this driver then takes the smallest solution.
    slope = torch.linalg.lstsq(inputs - mean_x, values - mean_y, driver="gelsd").solution
    fitted = mean_y + (held_out - mean_x) @ slope
    spread = float((wanted - wanted.mean(0)).square().sum())
    if spread == 0:
        raise BadInput("the outputs are the same on all held-out samples: there is nothing to explain")
    return AffineShare(1 - float((wanted - fitted).square().sum()) / spread, wanted, fitted)


def outputs_of(net: nn.Module, x: Inputs) -> Tensor:
    """Outputs of `net` in evaluation mode, without gradients, some thousand samples at a time.

    Raises: BadInput, if there are no inputs or the outputs are not finite.
    """
    samples = batch_length(x)
    if samples == 0:
        raise BadInput("there are no inputs: at least one sample is needed")
    with torch.no_grad(), evaluating(net):
        parts = [
            call(net, map_inputs(lambda tensor, start=start: tensor[start : start + ROWS_AT_ONCE], x))
            for start in range(0, samples, ROWS_AT_ONCE)
        ]
    outputs = torch.cat(parts)
    refuse_non_finite(outputs, "the network's outputs")
    return outputs


def _first(record: TrainingRecord, name: str, wanted: float | int) -> float:
    steps, values = record.measured(name)
    if values.ndim != 1:
        raise BadInput(
            f"column {name!r} holds {list(values.shape[1:])} values a step: ask for one network at a time, "
            "record.member(i) of a population's record"
        )
    # A mean over samples in float32 misses 1 by rounding.
    reached = np.flatnonzero(values >= wanted - 1e-6)
    return float(steps[reached[0]]) if len(reached) else math.nan


def _draw_record(axes: Any, data: Mapping[str, Any]) -> None:
    left, right = axes
    left.plot(data["step"], data["train_accuracy"], color=PALETTE[0], label="training, noisy labels")
    left.plot(data["step"], data["clean_accuracy"], color=PALETTE[5], label="training, true labels")
    left.plot(data["step"], data["test_accuracy"], color=PALETTE[1], label="test")
    left.set(xscale="log", xlabel="step", ylabel="accuracy", ylim=(0.3, 1.03))
    left.legend(loc="lower right")
    right.plot(data["step"], data["odd_fraction"], color=PALETTE[2], label="odd fraction")
    right.plot(data["step"], data["alignment[0,0]"], color=PALETTE[3], label="alignment, positive neurons, mean 1")
    right.plot(data["step"], data["alignment[1,1]"], color=PALETTE[4], label="alignment, negative neurons, mean 2")
    right.set(xscale="log", xlabel="step", ylabel="share", ylim=(0, 1.1))
    right.legend(loc="upper right")
