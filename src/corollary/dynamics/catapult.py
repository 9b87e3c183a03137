"""The catapult phase: networks trained at multiples of the inverse top eigenvalue of their tangent kernel."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import jacrev, vmap

from corollary.base.errors import BadInput
from corollary.base.network import Inputs, Params, as_function, batch_length, map_inputs
from corollary.base.seeds import Seeds
from corollary.dynamics.losses import half_square
from corollary.engine import Members, Outcome, Population, TrainingRecord, population, seeded, stack
from corollary.evidence import PALETTE, Figure, Table

MULTIPLES = (0.5, 1.0, 1.8, 2.5, 3.5, 4.2, 6.0)
GROWN = 1.05
"""A loss that never rises above this multiple of its start has not grown."""
DEAD = 1e-9
"""The tangent kernel over its start below which nothing moves the network any more."""
DIVERGED = 1e6
"""Outputs above this times the root of the number of weights diverge: the peak of a catapult grows with the width."""
KERNEL_BYTES = 2**28
"""Size of the Jacobians of members that are formed together."""
RECTIFIERS = (nn.ReLU, nn.LeakyReLU, nn.ReLU6)
PHASES = ("lazy", "catapult", "unsettled", "dead", "divergent")


class Activity(NamedTuple):
    """Shares, for each member: of (unit, sample) pairs that are active, and of units that are active on no sample."""

    active: Float[Tensor, "member"]
    dead: Float[Tensor, "member"]


@final
@dataclass(frozen=True)
class CatapultTable:
    """What became of each run, one entry a (multiple, seed), multiples outermost.

    Of the state at the end of a divergent run nothing is said: NaN.

    Attributes:
        multiple: the learning rate times the initial top eigenvalue; seed: index of the initial weights.
        learning_rate, initial_kernel: the two factors.
        phase: "lazy" (the loss never grew), "catapult" (it grew and ended below its start), "unsettled" (it grew and
            stands above its start still), "dead" (the tangent kernel vanished), "divergent".
        peak, final: the largest and the last loss over the first; of a divergent run, before it was stopped.
        edge: the learning rate times the last top eigenvalue: below 2 where a run has settled.
        kernel_ratio: the last top eigenvalue over the first.
        active, dead: shares of active (unit, sample) pairs and of units active nowhere, at the end; NaN for networks
            without ReLU layers.
        norm_change: of the squared weight norm, relative; NaN for models that start at zero.
        record: loss, weight norm, ... at every step.
    """

    multiple: np.ndarray
    seed: np.ndarray
    learning_rate: np.ndarray
    initial_kernel: np.ndarray
    phase: np.ndarray
    peak: np.ndarray
    final: np.ndarray
    edge: np.ndarray
    kernel_ratio: np.ndarray
    active: np.ndarray
    dead: np.ndarray
    norm_change: np.ndarray
    record: TrainingRecord

    def __len__(self) -> int:
        return len(self.multiple)

    def table(self) -> Table:
        """The columns by name, without the record."""
        return {name: column for name, column in vars(self).items() if name != "record"}

    def figure(self) -> Figure:
        """Left: the loss of the first seed at each multiple. Right: the share of runs in each phase."""
        first = self.seed == self.seed[0]
        losses = self.record["loss"][:, first]
        data: dict[str, Any] = {"step": self.record.steps}
        for multiple, column in zip(self.multiple[first], losses.T, strict=True):
            data[f"loss at {multiple:g}"] = column / losses[0, 0]
        levels = np.unique(self.multiple)
        data["multiple"] = levels
        for phase in PHASES:
            data[phase] = [float((self.phase[self.multiple == level] == phase).mean()) for level in levels]
        return Figure(
            "catapult-sweep",
            "Phases of the learning rate",
            "Left: loss over its start, first seed, one line a multiple of the inverse top eigenvalue of the tangent "
            "kernel. Right: the share of seeds in each phase, by multiple; the theory's window is 2 to 4.",
            data,
            _draw,
            size=(8.4, 3.6),
            panels=(1, 2),
        )


def stacked_ntk_lambda(members: Members, x: Inputs) -> Float[Tensor, "member"]:
    """The top eigenvalue of J J' / n of every member, all outputs of all samples, from Jacobians in blocks.

    For networks and data so small that a kernel of samples times outputs can be formed; else `ntk_lambda` of one.
    """
    function = as_function(deepcopy(members.architectures[0]).eval())
    n = batch_length(x)

    def top(params: Params, buffers: Params) -> Tensor:
        def of_sample(alone: Inputs) -> dict[str, Tensor]:
            one = map_inputs(lambda tensor: tensor[None], alone)
            return jacrev(lambda p: function({**buffers, **p}, one).reshape(-1))(params)

        rows = torch.cat([j.flatten(2) for j in vmap(of_sample)(x).values()], dim=2).flatten(0, 1)
        return rows @ rows.mT / n

    weights = sum(prod(p.shape[1:]) for p in members.params.values())
    itemsize = next(iter(members.params.values())).element_size()
    at_once = max(1, KERNEL_BYTES // (n * weights * itemsize))
    kernels = vmap(top, chunk_size=at_once)(members.params, members.buffers)
    return torch.linalg.eigvalsh(kernels)[:, -1]


def stacked_activity(members: Members, x: Inputs) -> Activity:
    """How active the ReLU layers of every member are on `x`; NaN for networks that have none (as modules)."""
    net = deepcopy(members.architectures[0]).eval()
    seen: list[Tensor] = []
    for layer in net.modules():
        if isinstance(layer, RECTIFIERS):
            layer.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0] > 0).flatten(1)))
    function = as_function(net)

    def shares(params: Params, buffers: Params) -> tuple[Tensor, Tensor]:
        seen.clear()
        outputs = function({**buffers, **params}, x)
        if not seen:
            missing = outputs.new_full((), torch.nan)
            return missing, missing
        positive = torch.cat(seen, dim=1)
        return positive.to(outputs.dtype).mean(), (~positive.any(0)).to(outputs.dtype).mean()

    with torch.no_grad():
        return Activity(*vmap(shares)(members.params, members.buffers))


def catapult_sweep(
    make_model: Callable[[], nn.Module],
    x: Inputs,
    y: Tensor,
    multiples: Sequence[int | float] = MULTIPLES,
    *,
    steps: int = 1500,
    seeds: int = 3,
    seed: int = 0,
    measures: Mapping[str, Callable[[Members], Tensor]] | None = None,
    checkpoint: Path | str | None = None,
) -> CatapultTable:
    r"""Gradient descent on `half_square` at rates $c / \lambda_0$, for each multiple c and several initial weights.

    $\lambda_0$ is each network's own top eigenvalue of the tangent kernel. All runs are one population. The network's
    parametrisation is its own: only products of rates and eigenvalues matter.

    Args:
        make_model: makes a network with PyTorch's default generator, with one or several outputs.
        x, y: inputs of n samples, and targets shaped like the outputs.
        multiples: c; the theory expects catapults between 2 and 4.
        steps: updates of each run.
        seeds: initial weights for each multiple, the same for all multiples.
        seed: from which they are drawn.
        measures: further columns at every step, as in `population`.
        checkpoint: file to save to and to resume from.
    Returns: what became of each run.
    Raises: BadInput, for no data, no multiples, a rate that is not positive, a kernel that is zero, or a loss that is
        zero at the start, where instability cannot be seen.
    Source: Meltzer et al. 2023, arXiv:2301.07737; Lewkowycz et al. 2020, arXiv:2003.02218.
    """
    if batch_length(x) == 0:
        raise BadInput("a sweep needs data: x holds no samples")
    if not multiples or min(multiples) <= 0 or seeds < 1:
        raise BadInput(f"a sweep needs positive multiples and 1 or more seeds, got {list(multiples)}, seeds={seeds}")
    numbers = [Seeds(seed).integer(f"run {index}") for index in range(seeds)]
    starts = [seeded(make_model, number) for number in numbers]
    start = stack(starts, map_inputs(lambda tensor: tensor[:4], x))
    kernel = stacked_ntk_lambda(start, x)
    _refuse_still(start, kernel, x, y)
    tops = kernel.to(torch.float64).cpu().numpy()
    multiple = np.repeat(np.asarray(multiples, dtype=np.float64), seeds)
    which = np.tile(np.arange(seeds), len(multiples))
    weights = sum(p.numel() for p in starts[0].parameters())
    done = population(
        [starts[index] for index in which],
        (x, y),
        seeds=[numbers[index] for index in which],
        loss=half_square,
        learning_rate=multiple / tops[which],
        steps=steps,
        record_every=1,
        measures=measures,
        diverged_above=0.5 * DIVERGED**2 * weights,
        checkpoint=checkpoint,
    )
    return _judged(done, x, multiple, which, tops[which])


def _judged(done: Population, x: Inputs, multiple: np.ndarray, which: np.ndarray, tops: np.ndarray) -> CatapultTable:
    diverged = np.array([outcome is Outcome.DIVERGED for outcome, _ in done.outcomes])

    def known(values: np.ndarray | Tensor) -> np.ndarray:
        found = values.to(torch.float64).cpu().numpy() if isinstance(values, Tensor) else values
        return np.where(diverged, np.nan, found)

    losses, squared = done.record["loss"], done.record["weight_norm"] ** 2
    peak, final = np.nanmax(losses, axis=0) / losses[0], done.record.last("loss") / losses[0]
    ratio = known(stacked_ntk_lambda(done.final, x)) / tops
    activity = stacked_activity(done.final, x)
    change = done.record.last("weight_norm") ** 2 - squared[0]
    return CatapultTable(
        multiple=multiple,
        seed=which,
        learning_rate=multiple / tops,
        initial_kernel=tops,
        phase=phases(peak, final, ratio, diverged),
        peak=peak,
        final=final,
        edge=multiple * ratio,
        kernel_ratio=ratio,
        active=known(activity.active),
        dead=known(activity.dead),
        norm_change=known(np.divide(change, squared[0], out=np.full_like(change, np.nan), where=squared[0] > 0)),
        record=done.record,
    )


def phases(peak: np.ndarray, final: np.ndarray, kernel_ratio: np.ndarray, diverged: np.ndarray) -> np.ndarray:
    """The phase of each run, as text, see `CatapultTable`.

    Args:
        peak, final: largest and last loss over the first, `[runs]`.
        kernel_ratio: last top eigenvalue of the tangent kernel over the first, `[runs]`.
        diverged: which runs were stopped as divergent, `[runs]`.
    """
    conditions = [diverged, kernel_ratio <= DEAD, peak <= GROWN, final <= 1]
    return np.select(conditions, ["divergent", "dead", "lazy", "catapult"], "unsettled")


def _refuse_still(start: Members, kernel: Tensor, x: Inputs, y: Tensor) -> None:
    """Refuse members that gradient descent does not move, or whose instability nothing sets off."""
    if not bool((kernel > 0).all()):
        raise BadInput(
            f"the tangent kernel is zero for {int((kernel <= 0).sum())} of {len(kernel)} initial networks (all units "
            "dead?): no learning rate moves them"
        )
    losses = start.evaluate((x, y), half_square)["loss"]
    if not bool((losses > 0).all()):
        raise BadInput(
            "the loss is exactly zero at the start: gradient descent stays there at any rate, however unstable. Give "
            "targets other than the outputs, or initial weights that do not cancel."
        )


def _draw(panels: Any, data: Mapping[str, Any]) -> None:
    left, right = panels
    names = [name for name in data if name.startswith("loss at ")]
    for index, name in enumerate(names):
        left.plot(data["step"], data[name], color=PALETTE[index % len(PALETTE)], label=name.removeprefix("loss at "))
    left.set(xlabel="step", ylabel="loss over its start", xscale="symlog", yscale="log", ylim=(1e-12, 1e6))
    left.legend(title="multiple", ncols=2)
    levels = [f"{level:g}" for level in data["multiple"]]
    below = np.zeros(len(levels))
    for color, phase in zip((0, 4, 3, 6, 1), PHASES, strict=True):
        share = np.asarray(data[phase])
        if share.any():
            right.bar(levels, share, bottom=below, color=PALETTE[color], label=phase)
        below = below + share
    right.set(xlabel="learning rate times initial top eigenvalue", ylabel="share of runs")
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
