"""The perceptron on data that thins out at its boundary: where the exponents of SGD noise can be computed by hand."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.base.progress import track
from corollary.base.seeds import Seeds
from corollary.engine.arguments import PerMember, per_member
from corollary.engine.sampling import distinct_rows
from corollary.evidence import Source

SCLOCCHI_2023 = Source(
    key="sclocchi2023dissecting",
    authors=("Antonio Sclocchi", "Mario Geiger", "Matthieu Wyart"),
    title="Dissecting the effects of SGD noise in distinct regimes of deep learning",
    year=2023,
    arxiv="2301.13703",
    venue="ICML",
)
BLOCK = 64
"""Steps whose samples are drawn and looked at together."""


@dataclass(frozen=True)
class PerceptronRun:
    r"""Perceptrons after their last update, one entry per member.

    Attributes:
        weights: $w(t) - w(0)$, `[members, dimension]`; the predictor depends on nothing else.
        w1: the informative weight.
        w_perp: norm of all the others, which carry only noise.
        steps: the first step at which every training point is fitted; `max_steps` for a member that never got there.
        time: steps times the step size $dt = T B$: a change of temperature enters both.
        finished: whether every training point is fitted.
    """

    weights: Float64[Tensor, "member dimension"]
    steps: Int64[Tensor, "member"]
    time: Float64[Tensor, "member"]
    finished: Bool[Tensor, "member"]

    @property
    def w1(self) -> Float64[Tensor, "member"]:
        """The informative weight of each member."""
        return self.weights[:, 0]

    @property
    def w_perp(self) -> Float64[Tensor, "member"]:
        """Norm of the uninformative weights of each member."""
        return self.weights[:, 1:].norm(dim=1)

    @property
    def signal_to_noise(self) -> Float64[Tensor, "member"]:
        r"""$w_1 / \lVert w_\perp \rVert$."""
        return self.w1 / self.w_perp


def depleted_sign_data(
    points: int, dimension: int, chi: float = 0.0, seed: int = 0
) -> tuple[Float64[Tensor, "points dimension"], Float64[Tensor, "points"]]:
    r"""Points with labels $y = \operatorname{sign}(x_1)$, where the density of $|x_1|$ falls to 0 as $|x_1|^\chi$.

    $x_1^2 / 2$ has a gamma distribution of shape $(\chi + 1) / 2$, the sign is random, and the other coordinates are
    standard normal; at $\chi = 0$ all are. Among P points the smallest $|x_1|$ is of order $P^{-1 / (1 + \chi)}$.

    Returns: inputs and labels -1, +1, in float64.
    Raises: BadInput, if there are no points, fewer than 2 coordinates, or `chi` is not above -1.
    Source: Sclocchi, Geiger and Wyart 2023, arXiv 2301.13703, perceptron model.
    """
    if points < 1 or dimension < 2:
        raise BadInput(f"1 point or more in 2 dimensions or more are wanted, got {points} in {dimension}")
    if not (chi > -1 and math.isfinite(chi)):
        raise BadInput(f"a density |x|^chi at 0 needs a finite chi > -1, got {chi}")
    generator = np.random.default_rng(Seeds(seed).integer("depleted sign data"))
    x = generator.standard_normal((points, dimension))
    y = np.where(generator.random(points) < 0.5, -1.0, 1.0)
    x[:, 0] = y * np.sqrt(2 * generator.gamma((chi + 1) / 2, 1.0, points))
    return torch.from_numpy(x), torch.from_numpy(y)


def perceptron_noise(
    points: int,
    temperature: PerMember = 1.0,
    *,
    chi: float = 0.0,
    dimension: int = 64,
    batch_size: int = 4,
    alpha: float = math.inf,
    seeds: int | Sequence[int] = 0,
    max_steps: int = 10_000_000,
) -> PerceptronRun:
    r"""SGD on the hinge loss for $f(x) = w \cdot x / \sqrt d$ until every point is fitted, for all members at once.

    Each step draws B distinct points and adds $T \sum_i y_i x_i / \sqrt d$ over those with $\alpha y_i F(x_i) < 1$,
    where $F = f - f_0$. At $\alpha = \infty$, the limit of zero margin, those are the points with $y_i F(x_i) \le 0$,
    and weights scale with the temperature exactly: $w(t; T) = T w(t; 1)$. Here $T = dt / B$, without the width that a
    network divides by.

    Steps that draw only fitted points change nothing, so those before a member's next update are passed over at once;
    a member ends at its last update, found by a look at all points when a block of steps has brought none.

    Args:
        points: P, training points of each member.
        temperature: T, one per member.
        chi, dimension: of the data, see `depleted_sign_data`.
        alpha: scale of the output; infinite for zero margin.
        seeds: one per member, of its data and its batches; equal seeds give paired runs.
        max_steps: a member that has not fitted its points by then is returned unfinished.
    Raises: BadInput, for a batch larger than the training set, or a temperature, scale or number out of its range.
    Source: Sclocchi, Geiger and Wyart 2023, arXiv 2301.13703: $w_1 \sim T P^{1/(1+\chi)}$,
        $t^* \sim T P^{1 + 2/(1+\chi)}$.
    """
    seeds = [seeds] if isinstance(seeds, int) else list(seeds)
    count = len(seeds) if len(seeds) > 1 else torch.as_tensor(temperature).numel()
    seeds = seeds * count if len(seeds) == 1 else seeds
    rate = per_member(temperature, count, "temperature")
    if not 1 <= batch_size <= points:
        raise BadInput(f"a batch holds 1 to {points} distinct points (all of them), got batch_size={batch_size}")
    if not (bool((rate > 0).all()) and alpha > 0 and max_steps >= 1):
        raise BadInput(
            f"temperature and alpha are positive and max_steps at least 1, got {rate.tolist()}, {alpha}, {max_steps}"
        )
    return _Perceptrons(points, dimension, chi, rate, 1 / alpha, batch_size, seeds).run(max_steps)


class _Perceptrons:
    """The members and how far each has got. Members of one seed share their points and their batches."""

    def __init__(
        self,
        points: int,
        dimension: int,
        chi: float,
        rate: Tensor,
        margin: float,
        batch_size: int,
        seeds: Sequence[int],
    ):
        different = list(dict.fromkeys(seeds))
        drawn = [depleted_sign_data(points, dimension, chi, seed) for seed in different]
        self.signed = torch.stack([x * y[:, None] for x, y in drawn]) / math.sqrt(dimension)
        self.which = torch.tensor([different.index(seed) for seed in seeds])
        self.generators = [Seeds(seed)("perceptron batches") for seed in different]
        self.rate, self.margin, self.batch_size = rate, margin, batch_size
        self.weights = torch.zeros(len(seeds), dimension, dtype=torch.float64)
        self.last_update = torch.full((len(seeds),), -1)
        self.finished = torch.zeros(len(seeds), dtype=torch.bool)
        self.window_length = 1

    def run(self, max_steps: int) -> PerceptronRun:
        """Step in blocks until all have finished."""
        unknown = torch.ones_like(self.finished)  # whose weights have changed since all points were looked at
        for start in track(range(0, max_steps, BLOCK), "steps of perceptrons"):
            alive = (~self.finished).nonzero().flatten()
            if not len(alive):
                break
            updated = self._block(alive, start, min(BLOCK, max_steps - start))
            unknown[alive[updated]] = True
            self._look(alive[~updated & unknown[alive]], unknown)
        self._look((~self.finished & unknown).nonzero().flatten(), unknown)
        steps = torch.where(self.finished, self.last_update + 1, max_steps)
        return PerceptronRun(self.weights, steps, steps * self.rate * self.batch_size, self.finished)

    def _pushes(self, agreement: Tensor) -> Tensor:
        """Which points still push: at zero margin also those on the boundary, as all are at the start."""
        return (agreement < self.margin) | (agreement == 0)

    def _block(self, alive: Tensor, start: int, length: int) -> Tensor:
        """All updates of `length` steps; says which members made any."""
        points, which = self.signed.shape[1], self.which[alive]
        drawn = {
            seed: distinct_rows(points, self.batch_size, length, self.generators[seed]) for seed in set(which.tolist())
        }
        rows = self.signed[which[:, None, None], torch.stack([drawn[seed] for seed in which.tolist()])]
        updates = sum(
            self._window(alive, rows[:, first : first + self.window_length], start + first)
            for first in range(0, length, self.window_length)
        )
        # About as many steps as lie between two updates: fewer are too many windows, more are looked at in vain.
        self.window_length = min(BLOCK, max(1, length * len(alive) // (1 + updates)))
        return self.last_update[alive] >= start

    def _window(self, alive: Tensor, rows: Tensor, start: int) -> int:
        """The updates of some steps, one at a time for each member; says how many of all members there were."""
        weights, rate, last = self.weights[alive], self.rate[alive, None], self.last_update[alive]
        steps, member, position = torch.arange(rows.shape[1]), torch.arange(len(alive)), torch.zeros_like(alive)
        updates = 0
        while True:
            pushing = self._pushes(torch.einsum("mlbd,md->mlb", rows, weights))
            waiting = pushing.any(2) & (steps >= position[:, None])
            updating = waiting.any(1)
            if not bool(updating.any()):
                break
            updates += int(updating.sum())
            first = waiting.int().argmax(1)
            push = (rows[member, first] * pushing[member, first, :, None]).sum(1)
            weights = torch.where(updating[:, None], weights + rate * push, weights)
            last = torch.where(updating, start + first, last)
            position = torch.where(updating, first + 1, rows.shape[1])
        self.weights[alive], self.last_update[alive] = weights, last
        return updates

    def _look(self, members: Tensor, unknown: Tensor) -> None:
        """Ask of all their training points whether these members have fitted them."""
        for member in members.tolist():  # one at a time: the points of all would be copied together
            agreement = self.signed[self.which[member]] @ self.weights[member]
            self.finished[member] = not bool(self._pushes(agreement).any())
        unknown[members] = False
