"""The study `benign-oscillation`: rates just above the edge of stability teach SGD what small ones never learn."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from corollary.data import digits
from corollary.dynamics.feature_noise import (
    LU_2023,
    FeatureNoiseData,
    FeatureNoiseSamples,
    PatchSquaredReLU,
    plant_feature,
)
from corollary.dynamics.fits import fit_linear
from corollary.dynamics.losses import half_square
from corollary.dynamics.oscillation import DELTA, DIVERGED, OscillationTable, benign_oscillation_sweep
from corollary.dynamics.residuals import single_sample_projection
from corollary.engine import Outcome, population
from corollary.evidence import Claim, Data, Figure, Parts, Source, Study
from corollary.evidence.study import in_memory
from corollary.studies.dynamics import benign_oscillation_pictures as pictures

SMALL, LARGE = (0.1, 0.3, 1.0), (1.2, 1.4, 1.6)
NEAR = (0.8, 0.9, 1.0, 1.05, 1.1, 1.2)
STRONG = (1.0, 1.4)
"""Norms of the strong feature for which the transition is looked for."""
CROSSING = 0.85
SINGLE = 1.3
"""Rate of the one-sample run over its edge."""
PAIRS = ((0, 1), (3, 5))
REAL = (0.3, 1.2, 1.4)
"""Rates over the edge at which digits with a planted bar are learned."""
DRAWN = 1200
"""Steps of the one-sample run that are kept for the picture."""


@dataclass(frozen=True)
class BenignOscillation(Study):
    """Small rates learn the strong feature and stop; oscillating ones go on to learn the weak one."""

    runs: int = 5
    """Data sets and initial weights for each learning rate."""

    slug: ClassVar[str] = "benign-oscillation"
    room: ClassVar[str] = "dynamics"
    title: ClassVar[str] = "Benign oscillation: large learning rates learn weak features"
    sources: ClassVar[tuple[Source, ...]] = (LU_2023,)

    def run(self, parts: Parts = in_memory) -> Data:
        """Sweep the rate at two strengths of the strong feature, let it decay early, and follow one sample."""
        sweeps = [parts(f"strong {strong:g}", partial(self._sweep, strong)) for strong in STRONG]
        single = parts("single", self._single)
        kept = {name: column for name, column in sweeps[0].items() if name.startswith("margin ")}
        return {
            "runs": {name: np.concatenate([sweep[name] for sweep in sweeps]) for name in sweeps[0] if name not in kept},
            "margins": {name.removeprefix("margin "): column for name, column in kept.items()},
            "decayed": parts("decayed", self._decayed),
            "more": parts("more", self._more),
            "digits": parts("digits", self._digits),
            "units": {name.removeprefix("unit "): c for name, c in single.items() if name.startswith("unit ")},
            "path": {name.removeprefix("path "): c for name, c in single.items() if name.startswith("path ")},
            "single": {name: [c] for name, c in single.items() if not name.startswith(("unit ", "path "))},
        }

    def claims(self, data: Data) -> tuple[Claim, ...]:
        """C1 to C4 of the specification, from the stored tables alone."""
        return (self._weak_learned(data), self._transition(data), self._identity(data), self._needed(data))

    def figures(self, data: Data) -> tuple[Figure, ...]:
        """Accuracy and oscillation by rate, the weak feature over the steps, and one sample's path."""
        return pictures.figures(data)

    # ---------------------------------------------------------------------------------------------------------- runs

    @property
    def _steps(self) -> int:
        return self.pick(smoke=200, desk=4000, paper=20000)

    def _options(self) -> dict[str, Any]:
        sizes = self.pick(
            smoke={"seeds": 2, "dimension": 40, "samples": 20, "test_samples": 50},
            desk={"seeds": self.runs},
            paper={"seeds": self.runs, "dimension": 2000, "samples": 500, "width": 16, "test_samples": 2000},
        )
        return {"steps": self._steps, "seed": self.seeds.integer("runs"), **sizes}

    def _sweep(self, strong: float) -> dict[str, Any]:
        """Every rate that a claim asks for at this strength of the strong feature."""
        multiples = sorted({*SMALL, *LARGE, *NEAR, 1.8}) if strong == STRONG[0] else NEAR
        found = benign_oscillation_sweep(multiples, strong=strong, **self._options())
        return {"strong": [strong] * len(found), **found.table(), **_mean_margins(found)}

    def _decayed(self) -> dict[str, Any]:
        """The rate 1.2 falling to a fifth of the edge after a twentieth of the steps."""
        return dict(benign_oscillation_sweep((1.2,), decay=(self._steps // 20, 0.2), **self._options()).table())

    def _more(self) -> dict[str, Any]:
        """More data sets and initial weights at the edge itself, where accuracy scatters."""
        options = {**self._options(), "seeds": self.pick(smoke=2, desk=40, paper=40)}
        return dict(benign_oscillation_sweep((1.0,), **{**options, "seed": self.seeds.integer("more")}).table())

    def _digits(self) -> dict[str, Any]:
        """Pairs of digits as the weak feature, a planted bright bar as the strong one, accuracy without the bar."""
        rows: list[tuple[Any, ...]] = []
        seeds = self.pick(smoke=1, desk=3, paper=10)
        for pair in PAIRS:
            train, test = self._with_bar(pair)
            nets = [
                PatchSquaredReLU(64, 8, self.seeds.integer(f"digits {seed}")) for _ in REAL for seed in range(seeds)
            ]
            rates = np.repeat(REAL, seeds)
            found = population(
                nets,
                (train.x, train.y),
                loss=half_square,
                learning_rate=rates * nets[0].edge(1.0),
                batch_size=1,
                steps=self._steps,
                seeds=list(range(seeds)) * len(REAL),
                diverged_above=0.5 * DIVERGED**2,
            )
            outputs = [found.final(part.x) * part.y for part in (train, test)]
            shares = [(margins > 0).double().mean(1).tolist() for margins in outputs]
            diverged = [outcome is Outcome.DIVERGED for outcome, _ in found.outcomes]
            rows += [
                (f"{pair[0]} against {pair[1]}", *row) for row in zip(rates.tolist(), *shares, diverged, strict=True)
            ]
        names = ("pair", "multiple", "train_accuracy", "weak_accuracy", "diverged")
        return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))

    def _with_bar(self, pair: tuple[int, int]) -> tuple[FeatureNoiseSamples, FeatureNoiseSamples]:
        """100 training samples of two digits, four fifths of them with a bar; and test samples without it."""
        data, bar = digits(torch.float64), torch.zeros(8, 8, dtype=torch.float64)
        bar[:, 0] = 8**-0.5
        assert data.train.y is not None  # the digits have labels
        assert data.test is not None
        mean = data.train.x[torch.isin(data.train.y, torch.tensor(pair))].mean(0)
        made = []
        for part, rho, most in ((data.train, 0.2, 100), (data.test, 1.0, None)):
            assert part.y is not None
            rows = torch.isin(part.y, torch.tensor(pair))
            x, y = (part.x[rows] - mean)[:most], torch.where(part.y[rows] == pair[1], 1.0, -1.0).double()[:most]
            made.append(plant_feature(x, y, bar, self.seeds(f"bar {pair} {rho}"), rho=rho))
        return made[0], made[1]

    def _single(self) -> dict[str, Any]:
        """One sample by automatic differentiation of the network, against the identity and the recursion."""
        steps = self.pick(smoke=100, desk=2000, paper=10000)
        dimension, width = 400, 8
        data = FeatureNoiseData(dimension, 1, seed=self.seeds.integer("single data"))
        net = PatchSquaredReLU(dimension, width, self.seeds.integer("single weights"))
        one = data.of_labels(torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.bool), self.seeds("unused"))
        rate = SINGLE * net.edge(float(data.strong.norm()))
        features = torch.stack([data.strong, data.weak])
        projections, outputs = [], []
        for _ in range(steps):
            value = net(one.x)
            projections.append(net.weight.detach() @ features.T)
            outputs.append(value.detach())
            (gradient,) = torch.autograd.grad(half_square(value, one.y), [net.weight])
            with torch.no_grad():
                net.weight.sub_(rate * gradient)
        projections.append(net.weight.detach() @ features.T)
        return _compared(torch.stack(projections), torch.cat(outputs), rate, data, width)

    # -------------------------------------------------------------------------------------------------------- claims

    def _weak_learned(self, data: Data) -> Claim:
        rows = _where(data["runs"], strong=STRONG[0])
        weak = {level: _mean(rows, "weak_accuracy", level) for level in (*SMALL, *LARGE)}
        accuracy = rows["train_accuracy"][~rows["diverged"].astype(bool)]
        beyond = rows["diverged"][rows["multiple"] == 1.8]
        more = np.asarray(data["more"]["weak_accuracy"])
        return self.claim(
            "C1",
            "Oscillating SGD classifies samples that have only the weak feature; small rates do not, though both fit "
            "all training samples.",
            kind="threshold",
            criterion="mean accuracy on weak samples <= 0.72 at 0.1, 0.3 and 1.0 of the edge, >= 0.97 at 1.2, 1.4 and "
            "1.6; training accuracy 1 in every run that did not diverge",
            measured=", ".join(f"{value:.3f} at {level:g}" for level, value in weak.items())
            + f"; training accuracy from {accuracy.min(initial=1.0):g} over {len(accuracy)} runs",
            holds=all(weak[level] <= 0.72 for level in SMALL)
            and all(weak[level] >= 0.97 for level in LARGE)
            and bool((accuracy == 1).all()),
            controls=(
                f"at 1.8 of the edge {int(beyond.sum())} of {len(beyond)} runs diverge",
                f"at the edge itself, {len(more)} other seeds: {more.mean():.3f} +- "
                f"{more.std() / math.sqrt(len(more)):.3f} (standard error), from {more.min():.2f} to {more.max():.2f}",
                *_of_digits(data["digits"]),
            ),
            note="At the edge itself accuracy differs much from seed to seed, and the mean of five can fall on either "
            "side of 0.72 by chance; more seeds stand beside them.",
        )

    def _transition(self, data: Data) -> Claim:
        said, calm, wild, crossings = [], [], [], []
        for strong in STRONG:
            rows = _where(data["runs"], strong=strong)
            oscillation = {level: _mean(rows, "oscillation", level) for level in NEAR}
            accuracy = [_mean(rows, "weak_accuracy", level) for level in NEAR]
            crossings.append(_crossing(NEAR, accuracy, CROSSING))
            calm.append(max(value for level, value in oscillation.items() if level <= 0.9))
            wild.append(oscillation[1.2])
            said.append(
                f"U = {strong:g}: {calm[-1]:.3f} up to 0.9, {wild[-1]:.3f} at 1.2, crossing at {crossings[-1]:.3f} "
                f"(accuracy {', '.join(f'{value:.2f}' for value in accuracy)} at {', '.join(map(str, NEAR))})"
            )
        return self.claim(
            "C2",
            "The transition sits at the edge of stability of the strong feature, m / 2U^2.",
            kind="threshold",
            criterion="U = 1 and 1.4: mean share of oscillating steps <= 0.02 at 0.8 and 0.9 of the edge, >= 0.10 at "
            "1.2; mean accuracy on weak samples crosses 0.85 in (1.0, 1.25]",
            measured="; ".join(said),
            holds=all(value <= 0.02 for value in calm)
            and all(value >= 0.10 for value in wild)
            and all(1.0 < value <= 1.25 for value in crossings),
        )

    def _identity(self, data: Data) -> Claim:
        units, single = data["units"], {name: column[0] for name, column in data["single"].items()}
        worst = float(np.max(units["error"], initial=0.0))
        return self.claim(
            "C3",
            "On one sample a unit's weak projection grows by exactly the product of 1 + 2 eta V^2 (1 - f_t) / m, and "
            "oscillation makes the residuals 1 - f_t add up.",
            kind="exact",
            criterion="one sample, 1.3 of the edge, 2000 steps: log growth of every active unit equals its sum to "
            "1e-9; sum of residuals > 0, its slope over the oscillating steps > 0",
            measured=f"largest error {worst:.1e} over {len(units['error'])} active units; sum {single['sum']:.4g}, "
            f"slope {single['slope']:.3g} a step over {int(single['oscillating'])} oscillating steps",
            holds=worst <= 1e-9 and len(units["error"]) > 0 and single["sum"] > 0 and single["slope"] > 0,
            controls=(
                f"the recursion in projections against the network: largest difference of outputs "
                f"{single['recursion_error']:.1e}",
            ),
        )

    def _needed(self, data: Data) -> Claim:
        constant = _mean(_where(data["runs"], strong=STRONG[0]), "weak_accuracy", 1.2)
        decayed = float(np.mean(data["decayed"]["weak_accuracy"]))
        fitted = float(np.min(data["decayed"]["train_accuracy"]))
        return self.claim(
            "C4",
            "It takes oscillation, not just large early steps: a rate that decays early loses the gain.",
            kind="threshold",
            criterion="rate 1.2 of the edge, 0.2 from step 200 of 4000 on: mean accuracy on weak samples <= 0.85 and "
            "at least 0.12 below the constant rate",
            measured=f"{decayed:.3f} with decay, {constant:.3f} without",
            holds=decayed <= 0.85 and constant - decayed >= 0.12,
            controls=(f"training accuracy with decay: from {fitted:g}",),
        )


def _of_digits(table: Mapping[str, Any]) -> list[str]:
    """Accuracy on digits without the planted bar, one sentence a pair."""
    said = []
    for pair in dict.fromkeys(np.asarray(table["pair"]).tolist()):
        rows = _where(table, pair=pair)
        levels = []
        for level in REAL:
            alive = (rows["multiple"] == level) & ~rows["diverged"].astype(bool)
            mean = f"{rows['weak_accuracy'][alive].mean():.2f}" if alive.any() else "all diverged"
            levels.append(f"{mean} at {level:g}")
        said.append(f"digits {pair} with a planted bar, accuracy without it: {', '.join(levels)}")
    return said


def _compared(
    projections: torch.Tensor, outputs: torch.Tensor, rate: float, data: FeatureNoiseData, width: int
) -> dict[str, Any]:
    """The run `[steps + 1, 2, m, 2]` of one sample against the identity, unit by unit, and the recursion."""
    strong, weak = float(data.strong.norm()), float(data.weak.norm())
    residual = 1 - outputs
    z = projections.flatten(1, 2)
    signs = torch.tensor([1.0, -1.0], dtype=z.dtype).repeat_interleave(width)
    active = (z[..., 1] > 0).all(0)
    growth = torch.log1p(signs[active] * (2 * rate * weak**2 / width) * residual[:, None]).sum(0)
    seen = torch.log(z[-1, active, 1] / z[0, active, 1])
    recursion = single_sample_projection(
        width, strong, weak, rate, z[0, :, 0], z[0, :, 1], len(outputs) - 1, signs=signs
    )
    off = torch.nonzero(residual.abs() > DELTA)[:, 0]
    first = int(torch.nonzero(outputs >= 1)[0, 0]) if bool((outputs >= 1).any()) else 0
    window = slice(first, int(off[-1]) + 1)
    total = residual.cumsum(0)
    steps = np.arange(len(outputs), dtype=np.float64)
    slope = fit_linear({"step": steps[window]}, total.numpy()[window]).coefficients["step"]
    shown = slice(0, DRAWN)
    return {
        "unit error": (seen - growth).abs().numpy(),
        "unit growth": seen.numpy(),
        "path step": steps[shown],
        "path output": outputs.numpy()[shown],
        "path sum": total.numpy()[shown],
        "path weak": (signs * z[:-1, :, 1].relu().square()).sum(1).numpy()[shown] / width,
        "sum": float(total[-1]),
        "slope": slope,
        "oscillating": window.stop - window.start,
        "recursion_error": float((recursion.outputs - outputs).abs().max()),
    }


def _mean_margins(found: OscillationTable) -> dict[str, Any]:
    """The margin of the weak feature over the steps, mean over seeds, one row a (multiple, measurement)."""
    steps, margins = found.record.measured("weak_margin")
    levels = [level for level in np.unique(found.multiple) if not found.diverged[found.multiple == level].any()]
    means = [margins[:, found.multiple == level].mean(axis=1) for level in levels]
    return {
        "margin multiple": np.repeat(levels, len(steps)),
        "margin step": np.tile(steps, len(levels)),
        "margin weak": np.concatenate(means),
    }


def _where(table: Mapping[str, Any], **wanted: Any) -> dict[str, np.ndarray]:
    """The rows of a table with these values."""
    chosen = np.logical_and.reduce([np.asarray(table[name]) == value for name, value in wanted.items()])
    return {name: np.asarray(column)[chosen] for name, column in table.items()}


def _mean(rows: Mapping[str, np.ndarray], name: str, multiple: float) -> float:
    """The mean over all runs at a multiple; NaN, which fails every criterion, where one diverged."""
    return float(np.mean(rows[name][rows["multiple"] == multiple]))


def _crossing(levels: Sequence[float], values: Sequence[float], wanted: float) -> float:
    """Where the broken line through the points first reaches a value; NaN if it does not, or starts above it."""
    for left, right, low, high in zip(levels, levels[1:], values, values[1:], strict=False):
        if low < wanted <= high:
            return left + (right - left) * (wanted - low) / (high - low)
    return float("nan")
