"""Mode connectivity: is there a path of low error between two trained networks, curved or straight?

Runs are given by their parameters, and any number of pairs of one architecture is trained as one batched program.
Batch normalisation has no statistics of its own between two networks: they are estimated anew at each point.
"""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.network import Batch, Loss, Params, batch_length, map_inputs
from corollary.base.progress import track
from corollary.base.seeds import Seeds
from corollary.dynamics.states import stacked
from corollary.engine import Members, batch_order, cross_entropy, sgd
from corollary.engine.arguments import checked_data
from corollary.engine.members import ROWS_AT_ONCE
from corollary.engine.rules import along
from corollary.engine.training import stacked_norm
from corollary.evidence import PALETTE, Figure, Source

GARIPOV_2018 = Source(
    key="garipov2018loss",
    authors=("Timur Garipov", "Pavel Izmailov", "Dmitrii Podoprikhin", "Dmitry Vetrov", "Andrew Gordon Wilson"),
    title="Loss surfaces, mode connectivity, and fast ensembling of DNNs",
    year=2018,
    arxiv="1802.10026",
    venue="NeurIPS",
)
Metric: TypeAlias = Literal["error", "loss"]
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@final
@dataclass(frozen=True)
class PathValues:
    """Loss and error (share of samples classified wrongly; NaN where targets are not classes) along a path, `[point]`.

    `t` runs from 0, the first network, to 1, the second.
    """

    t: Float[Tensor, "point"]
    loss: Float[Tensor, "point"]
    error: Float[Tensor, "point"]

    def connectivity(self, metric: Metric = "error") -> tuple[float, float]:
        r"""`(mc, t*)`: $mc = \frac12 (E_0 + E_1) - E(t^*)$, $t^*$ where E is farthest from the mean of its ends.

        Negative: a barrier as high as -mc. Positive: the path holds better networks than its ends, which are not
        trained to the end. Near 0: the two are connected.
        Source: Yang et al. 2021, arXiv 2107.11228, the definition of mode connectivity.
        """
        values = (self.error if metric == "error" else self.loss).double()
        gaps = (values[0] + values[-1]) / 2 - values
        place = int(gaps.abs().argmax())
        return float(gaps[place]), float(self.t[place])


@final
@dataclass(frozen=True)
class ModeConnectivity:
    """A pair of networks and the paths between them.

    Attributes:
        curve: values along the trained curve; `straight`: along the straight line.
        midpoint: the trained control point of the curve, parameters by name.
        metric: what `mc`, `t_star` and `straight_mc` are of.
    """

    curve: PathValues
    straight: PathValues
    midpoint: dict[str, Tensor]
    metric: Metric

    @property
    def mc(self) -> float:
        """Mode connectivity of the trained curve: negative for a barrier, see `PathValues.connectivity`."""
        return self.curve.connectivity(self.metric)[0]

    @property
    def t_star(self) -> float:
        """Where on the curve the metric is farthest from the mean of the ends."""
        return self.curve.connectivity(self.metric)[1]

    @property
    def straight_mc(self) -> float:
        """The same of the straight line."""
        return self.straight.connectivity(self.metric)[0]

    def figure(self) -> Figure:
        """The metric along both paths."""
        return path_figure([self])


def path_figure(pairs: Sequence[ModeConnectivity], name: str = "mode-connectivity") -> Figure:
    """The metric along the curved and the straight path of each pair."""
    metric = pairs[0].metric
    return Figure(
        name,
        "From one trained network to another",
        f"Training {metric} on the way from one run to another: along the straight line between their weights, and "
        "along a quadratic Bezier curve trained to stay low. A hump that stays is a barrier.",
        path_columns(pairs),
        lambda axes, data: draw_paths(axes, data, metric),
        size=(5.6, 3.6),
    )


def path_columns(pairs: Sequence[ModeConnectivity]) -> dict[str, Any]:
    """What `draw_paths` draws: `t`, then `curve <i>` and `straight <i>` for each pair."""
    columns: dict[str, Any] = {"t": pairs[0].curve.t.tolist()}
    for index, pair in enumerate(pairs):
        columns[f"curve {index}"] = getattr(pair.curve, pair.metric).tolist()
        columns[f"straight {index}"] = getattr(pair.straight, pair.metric).tolist()
    return columns


def draw_paths(axes: Any, data: Mapping[str, Any], metric: Metric) -> None:
    """Both paths of every pair."""
    kinds = {"curve": ("o-", PALETTE[0], "trained curve"), "straight": ("s--", PALETTE[1], "straight line")}
    for name, values in data.items():
        kind, _, index = name.partition(" ")
        if kind in kinds:
            style, colour, label = kinds[kind]
            axes.plot(data["t"], values, style, color=colour, alpha=0.8, label=label if index == "0" else None)
    axes.set(xlabel="position t on the path", ylabel=f"training {metric}")
    axes.set_ylim(bottom=0)
    axes.legend()


def mode_connectivity(
    model: nn.Module, params_a: Params, params_b: Params, data: Batch, **settings: Any
) -> ModeConnectivity:
    """The paths between two runs of `model`; settings as for `mode_connectivities`, which takes many pairs at once."""
    return mode_connectivities(model, [(params_a, params_b)], data, **settings)[0]


def mode_connectivities(
    model: nn.Module,
    pairs: Sequence[tuple[Params, Params]],
    data: Batch,
    *,
    loss: Loss = cross_entropy,
    steps: int = 150,
    learning_rate: float = 0.05,
    momentum: float = 0.9,
    batch_size: int = 128,
    points: int = 11,
    metric: Metric = "error",
    sample: Batch | None = None,
    seed: int = 0,
) -> tuple[ModeConnectivity, ...]:
    r"""Train $\gamma(t) = (1-t)^2 w_a + 2t(1-t) w_m + t^2 w_b$ for low $E_{t \sim U(0,1)} L(\gamma(t))$, pair by pair.

    All pairs are trained together, on the same batches and the same t, so that a pair gives what it would give alone.
    The control point starts midway between its ends, which stay as they are. Dropout is off along the curve; statistics
    of batch normalisation are those of the batch in training, and of all of `sample` where the curve is evaluated;
    other buffers, such as the statistics frozen in an exported program, are on the straight line between the ends. A
    pair whose gradient is not finite makes no step there.

    Args:
        model: the architecture; never written to.
        pairs: parameters by name (buffers may be among them) of two runs each.
        data: training data `(inputs, targets)` for the curve.
        loss: mean over samples.
        steps: of stochastic gradient descent on the control point; 0 leaves it midway.
        points: where the paths are evaluated, evenly from 0 to 1, ends included.
        metric: what mode connectivity is told of: the share of errors, or the loss.
        sample: training data that the paths are evaluated on, by default `data`.
        seed: of the batches and of t.
    Raises: BadInput, if a run lacks a parameter or has another shape; for fewer than 3 points or bad settings; for the
        metric "error" where targets are not classes.
    Source: Garipov et al. 2018, arXiv 1802.10026, equation 2 with the Bezier curve.
    """
    _refuse_settings(steps, learning_rate, batch_size, points, metric)
    inputs, _ = checked_data(data, "the data for the curve")
    example = map_inputs(lambda tensor: tensor[:4], inputs)
    first, second = (stacked(model, [pair[end] for pair in pairs], example) for end in (0, 1))
    members, seen = _for_curves(first), data if sample is None else checked_data(sample, "the data for the values")
    with torch.random.fork_rng(devices=()):  # a forward pass may draw noise that is no module
        torch.manual_seed(Seeds(seed).integer("noise on the curve"))
        recipe = (steps, learning_rate, momentum, batch_size)
        middle = _trained_bends(members, second, data, loss, recipe, Seeds(seed))
        places = torch.linspace(0, 1, points, dtype=torch.float64)
        buffers = [_straight(first.buffers, second.buffers, float(t)) for t in places]
        on_curve = [bezier(first.params, middle, second.params, float(t)) for t in places]
        on_line = [_straight(first.params, second.params, float(t)) for t in places]
        curve, line = (_along(members, seen, loss, params, buffers) for params in (on_curve, on_line))
    if metric == "error" and bool(curve[1].isnan().any()):
        raise BadInput(
            "the targets are not classes, so there is no error to tell mode connectivity by: pass metric='loss'"
        )
    return tuple(
        ModeConnectivity(
            PathValues(places, curve[0][:, index], curve[1][:, index]),
            PathValues(places, line[0][:, index], line[1][:, index]),
            {name: tensor[index] for name, tensor in middle.items()},
            metric,
        )
        for index in range(len(pairs))
    )


def bezier(first: Params, middle: Params, second: Params, t: float) -> dict[str, Tensor]:
    r"""$(1-t)^2 w_a + 2t(1-t) w_m + t^2 w_b$, parameter by parameter; at 0 and 1 it is its end to the bit."""
    if t in (0.0, 1.0):
        return dict(second if t else first)
    return {
        name: (1 - t) ** 2 * tensor + 2 * t * (1 - t) * middle[name] + t**2 * second[name]
        for name, tensor in first.items()
    }


def with_batch_statistics(members: Members, data: Batch) -> Members:
    """The networks with the statistics of their batch normalisation layers estimated anew on `data`.

    What must be done for parameters that were not trained but composed: points of a path, averages. The data passes in
    a few large pieces in training mode, dropout off; mean and variance are averaged over pieces. Networks without such
    layers come back as they are.
    Source: as for weight averages, Izmailov et al. 2018, arXiv 1803.05407.
    """
    names = _statistics(members.architectures[0])
    if not names:
        return members
    inputs, targets = data
    samples = batch_length(inputs)
    pieces = torch.arange(samples, device=targets.device).tensor_split(
        math.ceil(samples / max(2, ROWS_AT_ONCE // len(members)))
    )
    together = _for_curves(members)
    totals = {name: torch.zeros_like(members.buffers[name]) for name in names}
    with torch.no_grad():
        for rows in pieces:
            x, y = map_inputs(lambda tensor, rows=rows: tensor[rows], inputs), targets[rows]
            _, _, seen = together.forward_train(x, y, None, _no_loss, (False, False))
            for name in names:
                totals[name] += seen[name] * (len(rows) / samples)
    return members.with_values(members.params, {**members.buffers, **totals})


def _no_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.new_zeros(())


def _statistics(module: nn.Module) -> list[str]:
    """Names of the running means and variances."""
    layers = ((name, layer) for name, layer in module.named_modules() if isinstance(layer, _BATCH_NORMS))
    prefixes = [f"{name}." if name else "" for name, layer in layers if layer.track_running_stats]
    return [prefix + part for prefix in prefixes for part in ("running_mean", "running_var")]


def _for_curves(members: Members) -> Members:
    """The same networks without dropout, and with batch statistics that forget at once."""
    module = deepcopy(members.architectures[0])
    for layer in module.modules():
        if isinstance(layer, _DROPOUTS):
            layer.p = 0.0
        if isinstance(layer, _BATCH_NORMS):
            layer.momentum = 1.0
    return Members([module] * len(members), members.params, members.buffers)


def _trained_bends(
    members: Members, others: Members, data: Batch, loss: Loss, recipe: tuple[int, float, float, int], seeds: Seeds
) -> dict[str, Tensor]:
    """Control points of the curves from `members` to `others`, trained by stochastic gradient descent."""
    ends = others.params
    steps, learning_rate, momentum, batch_size = recipe
    inputs, targets = data
    samples = batch_length(inputs)
    size = min(batch_size, samples)
    per_epoch = math.ceil(samples / size)
    positions = torch.rand(steps, generator=seeds("positions on the curve"), dtype=torch.float64).tolist()
    middle = {name: (tensor + ends[name]) / 2 for name, tensor in members.params.items()}
    rule = sgd(momentum)
    slots = rule.init(middle)
    rate, decay = (torch.full((len(members),), value).to(targets.device) for value in (learning_rate, 0.0))
    order = torch.empty(0)
    for step, t in track(enumerate(positions), "training curves between networks", steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            order = batch_order(seeds.integer("batches of the curve"), epoch, samples).to(targets.device)
        rows = order[place * size : (place + 1) * size]
        x, y = map_inputs(lambda tensor, rows=rows: tensor[rows], inputs), targets[rows]
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in middle.items()}
        buffers = _straight(members.buffers, others.buffers, t)
        here = members.with_values(bezier(members.params, leaves, ends, t), buffers)
        losses, _, _ = here.forward_train(x, y, None, loss, (False, False))
        found = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
        gradients = {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(leaves, found, strict=True)}
        fine = torch.isfinite(stacked_norm(gradients))
        gradients = {name: torch.where(along(fine, g), g, 0) for name, g in gradients.items()}
        changes = rule.change(middle, gradients, slots, rate, decay, step)
        middle = {name: tensor + changes[name] for name, tensor in middle.items()}
    return middle


def _straight(first: Params, second: Params, t: float) -> dict[str, Tensor]:
    """The straight line at t; integers, which are no place on it, are those of its beginning."""
    return {
        name: (1 - t) * tensor + t * second[name] if tensor.is_floating_point() else tensor
        for name, tensor in first.items()
    }


def _along(
    members: Members, data: Batch, loss: Loss, params: Sequence[dict[str, Tensor]], buffers: Sequence[dict[str, Tensor]]
) -> tuple[Tensor, Tensor]:
    """`(losses, errors)` on `data`, `[point, pair]` each."""
    losses, errors = [], []
    for values in track(list(zip(params, buffers, strict=True)), "values along a path"):
        found = with_batch_statistics(members.with_values(*values), data).evaluate(data, loss)
        losses.append(found["loss"])
        errors.append(1 - found["accuracy"] if "accuracy" in found else torch.full_like(found["loss"], math.nan))
    return torch.stack(losses), torch.stack(errors)


def _refuse_settings(steps: int, learning_rate: float, batch_size: int, points: int, metric: str) -> None:
    if points < 3:
        raise BadInput(f"a path is evaluated at 3 or more points (two are its ends), got points={points}")
    if steps < 0 or batch_size < 1 or not learning_rate > 0:
        raise BadInput(
            f"a curve is trained with steps >= 0, batch_size >= 1 and learning_rate > 0, got {steps}, {batch_size} "
            f"and {learning_rate}"
        )
    if metric not in ("error", "loss"):
        raise BadInput(f"mode connectivity is told by the metric 'error' or 'loss', got {metric!r}")
