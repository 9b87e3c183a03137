r"""Training on the square loss with a penalty on the scale $\rho$ and weights on the unit sphere, layer by layer.

The weights are held there by renormalising after each step (the Lagrange multiplier of $\lVert V_k \rVert = 1$), or
left to weight normalisation, where a gradient does not change the norm to first order. Both follow the same flow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.network import Batch, Params, batch_length, map_inputs
from corollary.dynamics.losses import half_square
from corollary.dynamics.rho import RhoModel, equilibrium, margins_of, refuse_other_degrees, target_rows
from corollary.engine import Members, Rule, TrainingRecord, population, sgd
from corollary.engine.arguments import PerMember, checked_data, per_member
from corollary.engine.record import Schedule
from corollary.engine.rules import Slots, along
from corollary.evidence import PALETTE, Figure

Normalisation = Literal["lagrange", "weight", "none"]


@dataclass(frozen=True)
class SquareLossRun:
    """Networks trained on the square loss.

    Attributes:
        models: the trained networks, as scale and directions.
        record: by step, `[members]` each: `loss` (without penalty), `rho`, `equilibrium` (the scale that would be
            stationary for the directions of that step), and `margin_mean`, `margin_std`, `margin_min` of the
            normalised margins over the training set.
        penalties: one per member.
    """

    models: tuple[RhoModel, ...]
    record: TrainingRecord
    penalties: tuple[float, ...]

    def figure(self) -> Figure:
        """The scale on its way to its equilibrium, and the spread of the margins."""
        columns: dict[str, Any] = {"step": self.record.steps}
        for i, penalty in enumerate(self.penalties):
            label = f"member {i}, penalty {penalty:g}"
            columns[f"rho, {label}"] = self.record["rho"][:, i]
            columns[f"equilibrium, {label}"] = self.record["equilibrium"][:, i]
            columns[f"spread, {label}"] = self.record["margin_std"][:, i] / self.record["margin_mean"][:, i]
        return Figure(
            "square-loss-scale",
            "The scale and its equilibrium",
            "Left: the product of the layers' norms, and (dashed) the value at which it would stand still for the "
            "directions of that step. Right: standard deviation over mean of the margins.",
            columns,
            _draw,
            size=(8.4, 3.6),
            panels=(1, 2),
        )


def train_square_loss(
    nets: nn.Module | Sequence[nn.Module],
    data: Batch,
    *,
    penalty: PerMember,
    learning_rate: PerMember,
    steps: int,
    batch_size: int | None = None,
    normalisation: Normalisation = "lagrange",
    scale_speed: float = 1.0,
    seed: int = 0,
    record_every: int | Schedule | None = None,
    checkpoint: Path | str | None = None,
) -> SquareLossRun:
    r"""Descent on $\frac1n \sum_i \lVert \rho f_V(x_i) - y_i \rVert^2 + \lambda \rho^2$ with $\lVert V_k \rVert = 1$.

    In the limit of small steps, for labels $y = \pm 1$ and margins $\bar f_i = y_i f_V(x_i)$,
    $\dot\rho = 2 [\overline{(1 - \rho \bar f) \bar f} - \lambda \rho]$ and
    $\dot V_k = 2 \rho\, \overline{(1 - \rho \bar f) (\partial \bar f / \partial V_k - \bar f V_k)}$.

    Args:
        nets: homogeneous networks (see `RhoModel`) of one architecture, trained side by side; they are copied.
        data: `(inputs, targets)`: labels -1 and 1 `[n]` for one output, class indices `[n]` for several, or rows.
        penalty: $\lambda$, one number or one per member. The loss is a mean: where a paper sums over the n samples, its
            $\lambda$ is n times this one.
        learning_rate: of the directions, one number or one per member.
        batch_size: samples a step; by default all of them.
        normalisation: "lagrange" renormalises the directions after each step; "weight" lets their norms drift, as
            weight normalisation does; "none" trains the plain weights, with the penalty
            $\lambda \sum_k \lVert W_k \rVert^2$: PyTorch's `weight_decay` of $2 \lambda$.
        scale_speed: factor on the learning rate of $\rho$.
        seed: of the batch order, the same for all members.
        record_every: when to measure; by default about 100 times.
        checkpoint: file to save to and resume from, bit-equal.
    Returns: the trained models and their record.
    Raises: BadInput, for a network that is not homogeneous, naming the layer; for targets of another form; for a
        negative penalty.
    Source: Xu et al. 2023, doi 10.34133/research.0024, training by Lagrange multipliers and by weight normalisation.
    """
    if normalisation not in get_args(Normalisation):
        raise BadInput(f"normalisation is one of {', '.join(get_args(Normalisation))}, got {normalisation!r}")
    inputs, targets = checked_data(data)
    given = [nets] if isinstance(nets, nn.Module) else list(nets)
    models = [RhoModel(net) for net in given]
    with torch.no_grad():
        for model in models:
            refuse_other_degrees(model, inputs)
        width = models[0].normalised(map_inputs(lambda tensor: tensor[:1], inputs)).shape[1]
    rows = target_rows(targets, targets.new_zeros(batch_length(inputs), width, dtype=models[0].rho.dtype))
    penalties = per_member(penalty, len(models), "penalty")
    if bool((penalties < 0).any()):
        raise BadInput(f"the penalty on the squared scale is at least 0, got {penalties.tolist()}")
    plain = normalisation == "none"
    trained = population(
        given if plain else models,
        (inputs, rows),
        seeds=[seed] * len(models),
        loss=square,
        optimizer=sgd() if plain else _descent(scale_speed, renormalise=normalisation == "lagrange"),
        learning_rate=learning_rate,
        weight_decay=2 * penalties,
        batch_size=batch_size,
        steps=steps,
        measures={"scale": lambda members: _scales(members, inputs, rows, penalties)},
        record_every=record_every,
        checkpoint=checkpoint,
    )
    found = [trained.member(i) for i in range(len(models))]
    return SquareLossRun(
        tuple(net if isinstance(net, RhoModel) else RhoModel(net) for net in found),
        _named(trained.record),
        tuple(penalties.tolist()),
    )


def square(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared distance to the targets, summed over outputs, the mean over samples: without the factor 1/2."""
    return 2 * half_square(outputs, targets)


def _descent(scale_speed: float, *, renormalise: bool) -> Rule:
    """Descent on scale and directions. The model divides by norms, so that the gradients are tangent already."""

    def change(
        params: Params, gradients: Params, slots: Slots, learning_rate: Tensor, weight_decay: Tensor, step: int
    ) -> dict[str, Tensor]:
        changes = {}
        for name, gradient in gradients.items():
            weight = params[name]
            if name == "rho":
                changes[name] = -scale_speed * learning_rate * (gradient + weight_decay * weight)
                continue
            moved = weight - along(learning_rate, gradient) * gradient
            if renormalise:
                moved = moved / along(torch.linalg.vector_norm(moved.flatten(1), dim=1), moved)
            changes[name] = moved - weight
        return changes

    return Rule(f"square loss(scale_speed={scale_speed}, renormalise={renormalise})", lambda params: {}, change)


_SCALES = ("rho", "equilibrium", "margin_mean", "margin_std", "margin_min")


def _scales(members: Members, inputs: Any, rows: Tensor, penalties: Tensor) -> Tensor:
    """`[members, len(_SCALES)]`."""
    outputs = members(inputs)
    outputs = outputs[..., None] if outputs.ndim == 2 else outputs
    rho = members.params["rho"] if "rho" in members.params else _norms(members).prod(dim=0)
    normalised = outputs / rho[:, None, None]
    margins = margins_of(normalised, rows)
    standing = equilibrium(normalised, rows, penalties.to(normalised))
    return torch.stack([rho, standing, margins.mean(1), margins.std(1), margins.amin(1)], dim=1)


def _norms(members: Members) -> Tensor:
    """Frobenius norms, `[weights, members]`."""
    return torch.stack([torch.linalg.vector_norm(stack.flatten(1), dim=1) for stack in members.params.values()])


def _named(record: TrainingRecord) -> TrainingRecord:
    """The record with a column for each of `_SCALES`."""
    named = TrainingRecord(record.meta)
    columns = {name: record[name] for name in record.columns if name != "scale"}
    columns |= {name: record["scale"][..., i] for i, name in enumerate(_SCALES)}
    for row, step in enumerate(record.steps.tolist()):
        named.log(step, **{name: values[row] for name, values in columns.items()})
    return named


def _draw(axes: Any, data: Mapping[str, Any]) -> None:
    left, right = axes
    labels = [name.removeprefix("rho, ") for name in data if name.startswith("rho, ")]
    for i, label in enumerate(labels):
        colour = PALETTE[i % len(PALETTE)]
        left.plot(data["step"], data[f"rho, {label}"], color=colour, label=label)
        left.plot(data["step"], data[f"equilibrium, {label}"], color=colour, ls="--", lw=1)
        right.plot(data["step"], np.abs(data[f"spread, {label}"]), color=colour, label=label)
    left.set(xlabel="step", ylabel="scale ρ", yscale="log")
    right.set(xlabel="step", ylabel="spread of margins (std / mean)", yscale="log")
    left.legend()
