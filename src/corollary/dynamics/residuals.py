"""Residuals over a training run: whether they oscillate around zero, and where they drift; one sample's exact path."""

from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import jvp

from corollary.base.errors import BadInput
from corollary.base.network import as_function, parameters_of
from corollary.engine import TrainingRecord


@final
class ResidualDrift(NamedTuple):
    """Signed residuals of samples over a run.

    Fields:
        steps: of the measurements, `[time]`.
        residuals: 1 - y f: positive where the output falls short of its label, `[time, samples]`.
        cumulative: their sums up to each measurement, `[time, samples]`: what a weak feature grows by, to first order.
        sign_changes: the share of neighbouring measurements between which the residual changes sign, `[samples]`:
            near 1 where outputs jump from one side of the label to the other at every measurement.
    """

    steps: np.ndarray
    residuals: np.ndarray
    cumulative: np.ndarray
    sign_changes: np.ndarray


class Projection(NamedTuple):
    """One sample's path: projections `[steps + 1, units]` on the two features, outputs `[steps + 1]`."""

    strong: Float[Tensor, "step unit"]
    weak: Float[Tensor, "step unit"]
    outputs: Float[Tensor, "step"]


def residual_drift(record: TrainingRecord, targets: Tensor | None = None, column: str | None = None) -> ResidualDrift:
    """Sums and sign changes of the residuals that a record holds.

    Args:
        record: with a column `residual` (1 - y f) `[samples]`, or `output` `[samples]` or `[samples, classes]`.
        targets: for outputs: labels -1 and 1 `[samples]`, or with several outputs class numbers (the residual is then
            one minus the output of the right class).
        column: another name for that column.
    Raises: BadInput, for a record without such a column, or targets that are missing or do not fit it.
    Source: Lu et al. 2023, arXiv:2310.17074, the accumulated residual of the oscillating phase.
    """
    name = column or next((usual for usual in ("residual", "output") if usual in record), "")
    if not name:
        raise BadInput(
            f"the record has no per-sample outputs: log a column 'output' [samples] (or 'residual', 1 - y f) while "
            f"training. It has: {', '.join(record.columns) or 'none'}."
        )
    steps, values = record.measured(name)
    if name == "residual" or (targets is None and column is not None):
        residuals = values
    else:
        residuals = 1 - _right(values, targets)
    if residuals.ndim != 2:
        raise BadInput(
            f"the column {name!r} holds values of shape {residuals.shape[1:]}; one number a sample is wanted"
        )
    return ResidualDrift(steps, residuals, np.nancumsum(residuals, axis=0), _share_of_changes(np.sign(residuals)))


def loss_reversals(record: TrainingRecord, column: str = "per_sample_loss") -> np.ndarray:
    """The share of neighbouring changes of each sample's loss that go opposite ways, `[samples]`.

    1 is an oscillation of period two, 2/3 what independent noise gives, 0 a monotone loss. For losses whose residual
    has one sign only, such as cross-entropy.

    Raises: BadInput, for a record without that column, of one number a step, or of fewer than three measurements.
    """
    _, losses = record.measured(column)
    if losses.ndim != 2 or len(losses) < 3:
        raise BadInput(
            f"reversals need three or more measurements of a column [samples], {column!r} holds {len(losses)} of shape "
            f"{losses.shape[1:]}"
        )
    return _share_of_changes(np.sign(np.diff(losses, axis=0)))


def feature_alignment(net: nn.Module, x: Tensor, targets: Tensor, direction: Tensor) -> Float[Tensor, "sample"]:
    r"""How much each sample's margin rises along a feature: the derivative of $y f(x)$, or of the right class's output.

    Args:
        net: a module of one tensor, with one output a sample (labels -1 and 1) or several (class numbers).
        x: inputs `[samples, ...]`.
        direction: the feature, of the shape of one input (or one that broadcasts to it).
    Raises: BadInput, for targets that do not fit the outputs.
    """
    function, params = as_function(net), parameters_of(net, trainable_only=False)
    outputs, slopes, *_ = jvp(lambda inputs: function(params, inputs), (x,), (direction.to(x).expand_as(x),))
    slopes = slopes.detach()
    if slopes.ndim == 2 and slopes.shape[1] > 1:
        return slopes.gather(1, _classes(targets, outputs.shape[0], outputs.shape[1])[:, None])[:, 0]
    return slopes.reshape(len(x)) * _plus_minus(targets, len(x)).to(slopes)


def single_sample_projection(
    width: int,
    strong: int | float,
    weak: int | float,
    learning_rate: int | float,
    z_strong: Float[Tensor, "_"],
    z_weak: Float[Tensor, "_"],
    steps: int,
    *,
    signs: Float[Tensor, "_"] | None = None,
) -> Projection:
    r"""SGD of a `PatchSquaredReLU` on the one sample (v, u) of label 1, in the projections of its units alone.

    $z \leftarrow z + j \frac{2 \eta}{m} \lVert \cdot \rVert^2 (1 - f_t) \max(z, 0)$ for both features, with
    $f = \frac1m \sum_r j_r (\max(z_u, 0)^2 + \max(z_v, 0)^2)$: exact, also where a unit dies on the way.

    Args:
        width: m, units of each sign.
        strong, weak: norms U and V of the features.
        z_strong, z_weak: projections of the units at the start; both signs, or those that are active.
        signs: j of each unit, by default 1.
    Raises: BadInput, for projections of different numbers of units.
    Source: Lu et al. 2023, arXiv:2310.17074, section 3.
    """
    j = torch.ones_like(z_strong) if signs is None else signs
    if not z_strong.shape == z_weak.shape == j.shape:
        raise BadInput(
            f"one projection on each feature and one sign are wanted for every unit, got {list(z_strong.shape)}, "
            f"{list(z_weak.shape)} and {list(j.shape)}"
        )
    z = torch.stack([z_strong, z_weak])
    rates = (2 * learning_rate / width) * torch.tensor([strong, weak], dtype=z.dtype)[:, None] ** 2 * j
    path, outputs = [z], []
    for _ in range(steps + 1):
        active = path[-1].relu()
        outputs.append((j * active.square()).sum() / width)
        path.append(path[-1] + rates * (1 - outputs[-1]) * active)
    found = torch.stack(path[:-1])
    return Projection(found[:, 0], found[:, 1], torch.stack(outputs))


def _right(outputs: np.ndarray, targets: Tensor | None) -> np.ndarray:
    """The margin y f, or the output of the right class, `[time, samples]`."""
    if targets is None:
        raise BadInput("outputs alone have no residual: pass targets, labels of -1 and 1 or class numbers")
    if outputs.ndim == 3 and outputs.shape[2] > 1:
        classes = _classes(targets, outputs.shape[1], outputs.shape[2]).cpu().numpy()
        return np.take_along_axis(outputs, classes[None, :, None], axis=2)[:, :, 0]
    return outputs.reshape(len(outputs), -1) * _plus_minus(targets, outputs[0].size).cpu().numpy()


def _classes(targets: Tensor, samples: int, classes: int) -> Tensor:
    whole = targets.shape == (samples,) and not targets.is_floating_point()
    if not whole or int(targets.min()) < 0 or int(targets.max()) >= classes:
        raise BadInput(
            f"{classes} outputs a sample go with {samples} class numbers 0 to {classes - 1}, got targets of shape "
            f"{list(targets.shape)}, {targets.dtype}"
        )
    return targets.long()


def _plus_minus(targets: Tensor, samples: int) -> Tensor:
    if targets.numel() != samples or not bool((targets.abs() == 1).all()):
        raise BadInput(
            f"one output a sample goes with {samples} labels of -1 and 1, got targets of shape {list(targets.shape)}, "
            f"from {float(targets.min()):g} to {float(targets.max()):g}"
        )
    return targets.reshape(samples)


def _share_of_changes(signs: np.ndarray) -> np.ndarray:
    """Of neighbouring values that are known and not zero, the share whose signs differ, `[samples]`."""
    products = signs[1:] * signs[:-1]
    known = np.isfinite(products) & (products != 0)
    counts = known.sum(axis=0)
    return np.divide((known & (products < 0)).sum(axis=0), counts, out=np.full(counts.shape, np.nan), where=counts > 0)
