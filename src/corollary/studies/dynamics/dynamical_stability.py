"""The study `dynamical-stability`: which minima SGD can stay at, and what that says of how they generalise."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from corollary.base.network import Inputs, Params, first_tensor
from corollary.dynamics.diagonal_linear import balance, diagonal_curvature, train_diagonal
from corollary.dynamics.losses import half_square
from corollary.dynamics.mean_square import SecondMoment, gaussian_mean_square_threshold, mean_square_threshold
from corollary.dynamics.relu_trace import relu_trace_closed_form
from corollary.dynamics.stability import MULAYOFF_2023, WU_SU_2023, fisher_trace
from corollary.evidence import Claim, Data, Figure, Parts, Source, Study, joined, listed
from corollary.evidence.study import in_memory
from corollary.studies.dynamics import dynamical_stability_pictures as pictures

CLIP = 50.0
CONVERGED = 1e-8
METHODS: dict[str, int | None] = {"SGD": 1, "GD": None}
"""Batch size of each; None is all samples."""
UNBALANCED = 8.0
"""The ratio r of the trace to its least value from which the unbalanced runs start."""
UNBALANCED_RATE = 0.03
RELU_SIZES = ((5, 3), (16, 8), (40, 20))
"""Hidden units and inputs."""


class Setup(NamedTuple):
    """Sizes at one scale."""

    inputs: int
    samples: int
    test: int
    rates: tuple[float, ...]
    seeds: int
    steps: Mapping[str, int]
    unbalanced_steps: Mapping[str, int]
    pieces: int
    draws: int


RATES = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032)
SETUPS = {
    "smoke": Setup(40, 12, 50, (0.008, 0.032), 1, {"SGD": 4000, "GD": 500}, {"SGD": 600, "GD": 80}, 2, 30),
    "desk": Setup(200, 60, 1000, RATES, 3, {"SGD": 60_000, "GD": 6_000}, {"SGD": 40_000, "GD": 5_000}, 20, 200),
    # Five times as many inputs make the trace five times as large at the start: the rates are a fifth.
    "paper": Setup(
        1000,
        300,
        1000,
        tuple(rate / 5 for rate in RATES),
        3,
        {"SGD": 300_000, "GD": 30_000},
        {"SGD": 200_000, "GD": 25_000},
        20,
        200,
    ),
}


@dataclass(frozen=True)
class DynamicalStability(Study):
    """Minima that SGD finds are flat in their trace, as stability asks; those of gradient descent need not be."""

    slug: ClassVar[str] = "dynamical-stability"
    room: ClassVar[str] = "dynamics"
    title: ClassVar[str] = "The implicit regularization of dynamical stability in stochastic gradient descent"
    sources: ClassVar[tuple[Source, ...]] = (WU_SU_2023, MULAYOFF_2023)

    @property
    def setup(self) -> Setup:
        """Sizes at this scale."""
        return SETUPS[self.scale]

    def run(self, parts: Parts = in_memory) -> Data:
        """Train diagonal networks by SGD and by gradient descent, and check the closed forms."""
        runs = [parts(f"runs {method}", lambda method=method: self._runs(method)) for method in METHODS]
        balanced = [parts(f"balance {method}", lambda method=method: self._balancing(method)) for method in METHODS]
        return {
            "runs": joined(runs),
            "balance": joined(balanced),
            "thresholds": parts("thresholds", self._thresholds),
            "traces": parts("traces", self._traces),
            "relu": parts("relu", self._relu),
        }

    def claims(self, data: Data) -> tuple[Claim, ...]:
        """C1 to C5 of the specification, from the stored tables alone."""
        return (
            self._trace_claim(data),
            self._test_error_claim(data),
            self._threshold_claim(data),
            self._balance_claim(data),
            self._relu_claim(data),
        )

    def figures(self, data: Data) -> tuple[Figure, ...]:
        """Sharpness and test error by learning rate, and the layers' balance over training."""
        return pictures.figures(data)

    # ------------------------------------------------------------------------------------------------ measuring

    def _samples(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training and test samples of a sparse linear map, on uniform inputs of variance 1."""
        d, n = self.setup.inputs, self.setup.samples
        drawn = torch.rand(n + self.setup.test, d, generator=self.seeds("inputs"), dtype=torch.float64)
        x = (2 * drawn - 1) * 3**0.5
        y = x[:, :3].sum(dim=1)
        return x[:n], y[:n], x[n:], y[n:]

    def _runs(self, method: str) -> dict[str, Any]:
        """All learning rates and seeds by one method; both methods start from the same weights."""
        setup = self.setup
        x, y, test_x, test_y = self._samples()
        start = torch.randn(setup.seeds, 2, setup.inputs, generator=self.seeds("weights"), dtype=torch.float64)
        rates = torch.tensor(setup.rates, dtype=torch.float64).repeat(setup.seeds)
        done = train_diagonal(
            start.repeat_interleave(len(setup.rates), dim=0),
            x,
            y,
            rates,
            steps=setup.steps[method],
            batch_size=METHODS[method],
            seed=self.seeds.integer("batches"),
            gradient_clip=CLIP,
        )
        curvature = diagonal_curvature(done.factors, x)
        return {
            "method": [method] * len(rates),
            "learning_rate": rates,
            "seed": np.repeat(np.arange(setup.seeds), len(setup.rates)),
            "train_loss": done.train_loss,
            "trace": curvature.trace,
            "largest_eigenvalue": curvature.largest_eigenvalue,
            "threshold": [_threshold(factors, x) for factors in done.factors],
            "test_error": done.test_error(test_x, test_y),
        }

    def _balancing(self, method: str) -> dict[str, Any]:
        """From unbalanced layers, in pieces between which the balance is read."""
        setup = self.setup
        x, y, *_ = self._samples()
        generator = self.seeds("unbalanced weights")
        a = 0.1**0.5 * torch.randn(setup.seeds, setup.inputs, generator=generator, dtype=torch.float64)
        signs = 2 * torch.randint(2, a.shape, generator=generator) - 1
        factors = torch.stack([a, signs * (UNBALANCED + (UNBALANCED**2 - 1) ** 0.5) * a], dim=1)
        each = setup.unbalanced_steps[method] // setup.pieces
        rate = UNBALANCED_RATE * setup.rates[-1] / RATES[-1]
        table: dict[str, list[Any]] = {name: [] for name in ("method", "seed", "step", "balance", "error", "loss")}
        error = torch.zeros(setup.seeds, dtype=torch.float64)
        loss = torch.full_like(error, torch.nan)
        for piece in range(setup.pieces + 1):
            table["method"] += [method] * setup.seeds
            table["seed"] += range(setup.seeds)
            table["step"] += [piece * each] * setup.seeds
            table["balance"] += balance(factors).tolist()
            table["error"] += error.tolist()
            table["loss"] += loss.tolist()
            if piece == setup.pieces:
                break
            done = train_diagonal(
                factors,
                x,
                y,
                torch.full((setup.seeds,), rate),
                steps=each,
                batch_size=METHODS[method],
                seed=self.seeds.integer(f"unbalanced batches {piece}"),
                gradient_clip=CLIP,
            )
            factors, loss, error = done.factors, done.train_loss, torch.maximum(error, done.identity_error)
        return table

    def _thresholds(self) -> dict[str, Any]:
        """Exact thresholds against the dense second-moment recursion, and against closed forms."""
        generator = self.seeds("gradients")
        g = torch.randn(20, 6, generator=generator, dtype=torch.float64)
        rows: list[tuple[str, int, float, bool]] = []
        for batch_size, replacement in ((1, True), (2, True), (2, False), (3, False)):
            rate = mean_square_threshold(g, batch_size, replacement=replacement)
            radius = [_brute_force_growth(g, s * rate, batch_size, replacement) for s in (1.0, 0.99, 1.01)]
            rows.append(("growth", batch_size, abs(radius[0] - 1), radius[1] < 1 < radius[2]))
        orthogonal = 1.7 * torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
        for batch_size in (1, 2, 4):
            closed = 2 * batch_size / float(orthogonal.square().sum() / 8)
            rate = mean_square_threshold(orthogonal, batch_size, replacement=False)
            rows.append(("orthogonal", batch_size, abs(rate / closed - 1), True))
        edge = 2 / float(torch.linalg.eigvalsh(g.T @ g / 20)[-1])
        rows.append(("gradient descent", 20, abs(mean_square_threshold(g, 20, replacement=False) / edge - 1), True))
        for batch_size in (1, 2, 4):
            rows.append(("Gaussian", batch_size, _gaussian_gap(batch_size), True))
        for batch_size in (1, 3, 20):
            rate = mean_square_threshold(g, batch_size, replacement=False, momentum=0.9)
            if batch_size == 20:
                rows.append(("heavy ball", 20, abs(rate / (1.9 * edge) - 1), True))
            else:
                growth = _brute_force_growth(g, rate, batch_size, False, momentum=0.9)
                rows.append(("heavy ball", batch_size, abs(growth - 1), True))
        names = ("check", "batch_size", "gap", "sides")
        return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))

    def _traces(self) -> dict[str, Any]:
        """The trace over what stability allows, for random gradients at their own threshold."""
        generator = self.seeds("traces")
        shares, sharp = [], []
        for _ in range(self.setup.draws):
            n, p, batch_size = (
                int(torch.randint(*span, (), generator=generator)) for span in ((6, 30), (2, 12), (1, 6))
            )
            g = torch.randn(n, p, generator=generator, dtype=torch.float64)
            g = g * torch.randn(n, 1, generator=generator, dtype=torch.float64).exp()
            rate = mean_square_threshold(g, batch_size)
            shares.append(rate * float(g.square().sum() / n) / (2 * batch_size))
            sharp.append(rate * float(torch.linalg.eigvalsh(g.T @ g / n)[-1]) / 2)
        return {"trace_share": shares, "eigenvalue_share": sharp}

    def _relu(self) -> dict[str, Any]:
        """The exact trace at points of an orthogonal frame, which have the second moments of the sphere."""
        generator = self.seeds("two-layer networks")
        table: dict[str, list[float]] = {name: [] for name in ("units", "inputs", "trace", "closed_form")}
        for units, d in RELU_SIZES:
            frame = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
            points = d**0.5 * torch.cat([frame, -frame])
            params = {
                "first": torch.randn(units, d, generator=generator, dtype=torch.float64),
                "second": torch.randn(units, generator=generator, dtype=torch.float64),
            }
            targets = torch.zeros(2 * d, dtype=torch.float64)
            trace = fisher_trace(_two_layers, half_square, (points, targets), params=params)
            row = (units, d, trace, relu_trace_closed_form(params["first"], params["second"]))
            for column, value in zip(table.values(), row, strict=True):
                column.append(float(value))
        return table

    # ------------------------------------------------------------------------------------------------ judging

    def _trace_claim(self, data: Data) -> Claim:
        runs = {name: np.asarray(column) for name, column in data["runs"].items()}
        share = runs["learning_rate"] * runs["trace"] / 2
        sharp = runs["learning_rate"] * runs["largest_eigenvalue"] / 2
        converged = runs["train_loss"] < CONVERGED
        sgd = converged & (runs["method"] == "SGD")
        gd = converged & (runs["method"] == "GD") & (runs["learning_rate"] == runs["learning_rate"].max())
        worst = share[sgd].max(initial=0.0)
        median = float(np.median(share[gd])) if gd.any() else np.nan
        sharpest = sharp[gd].max(initial=0.0)
        exact = runs["learning_rate"] / runs["threshold"]
        lowest, highest = exact[sgd].min(initial=np.inf), exact[sgd].max(initial=0.0)
        of_gd = float(np.median(exact[gd])) if gd.any() else np.nan
        return self.claim(
            "C1",
            "Minima found by SGD obey tr G <= 2 / learning rate; those of gradient descent, from the same weights, do "
            "not.",
            kind="threshold",
            criterion="every SGD run with train loss < 1e-8: learning rate x tr G / 2 <= 1.01; GD runs at the largest "
            "rate (loss < 1e-8): median >= 3, and learning rate x largest eigenvalue / 2 <= 1.01",
            measured=f"{int(sgd.sum())} of {int((runs['method'] == 'SGD').sum())} SGD runs converged, largest "
            f"{worst:.3f}; {int(gd.sum())} GD runs at {runs['learning_rate'].max():g}: median {median:.2f}, eigenvalue "
            f"{sharpest:.3f}",
            holds=bool(sgd.any() and gd.any()) and worst <= 1.01 and median >= 3 and sharpest <= 1.01,
            controls=(
                f"learning rate over the exact mean-square threshold of batch size 1: SGD {lowest:.2f} to "
                f"{highest:.2f}, GD at the largest rate {of_gd:.1f}",
            ),
        )

    def _test_error_claim(self, data: Data) -> Claim:
        runs = {name: np.asarray(column) for name, column in data["runs"].items()}
        rates = np.unique(runs["learning_rate"])

        def mean(method: str, rate: float) -> float:
            return float(runs["test_error"][(runs["method"] == method) & (runs["learning_rate"] == rate)].mean())

        large, small = rates[-1], rates[min(1, len(rates) - 2)]
        ratio = mean("GD", large) / mean("SGD", large)
        fall = mean("SGD", large) / mean("SGD", small)
        return self.claim(
            "C2",
            "A larger learning rate makes SGD generalise better; gradient descent does not change.",
            kind="threshold",
            criterion="mean test error at the largest rate: GD / SGD >= 10; SGD there <= 0.1 x its value at the second "
            "smallest rate (0.002)",
            measured=f"GD / SGD {ratio:.1f}; SGD {mean('SGD', large):.3g} at {large:g}, {fall:.4f} x its value at "
            f"{small:g}",
            holds=ratio >= 10 and fall <= 0.1,
            controls=(f"GD: {mean('GD', large) / mean('GD', small):.3f} x its value at {small:g}",),
        )

    def _threshold_claim(self, data: Data) -> Claim:
        table = {name: np.asarray(column) for name, column in data["thresholds"].items()}
        share = np.asarray(data["traces"]["trace_share"])
        gaps = {name: float(table["gap"][table["check"] == name].max()) for name in dict.fromkeys(table["check"])}
        sides = bool(table["sides"].all())
        judged = ("growth", "orthogonal", "gradient descent")
        return self.claim(
            "C3",
            "The threshold of mean-square stability is exact, and reduces to the closed forms.",
            kind="exact",
            criterion="spectral radius of the dense recursion at the threshold within 1e-10 of 1, below 1 at 0.99 and "
            "above at 1.01 of it; orthogonal gradients 2B / tr G and full batches 2 / largest eigenvalue, to 1e-10 "
            "relative; tr G <= 2B / threshold in 200 random draws",
            measured=f"radius off by {gaps['growth']:.1e}, sides {'right' if sides else 'wrong'}; orthogonal "
            f"{gaps['orthogonal']:.1e}; full batches {gaps['gradient descent']:.1e}; trace bound holds in "
            f"{int((share <= 1 + 1e-10).sum())} of {len(share)} (largest share {share.max():.3f})",
            holds=all(gaps[name] <= 1e-10 for name in judged) and sides and bool((share <= 1 + 1e-10).all()),
            controls=(
                f"closed form for Gaussian gradients: off by {gaps['Gaussian']:.1e}",
                f"heavy-ball momentum 0.9, against its own dense recursion: off by {gaps['heavy ball']:.1e}",
                f"2 / tr G is not sufficient: {int((share < 1 - 1e-10).sum())} of {len(share)} thresholds lie below "
                "their trace bound",
            ),
        )

    def _balance_claim(self, data: Data) -> Claim:
        table = {name: np.asarray(column) for name, column in data["balance"].items()}
        last = {
            method: table["balance"][(table["method"] == method) & (table["step"] == table["step"][of].max())]
            for method in METHODS
            if (of := table["method"] == method).any()
        }
        worst, ratio = float(last["SGD"].max()), float((last["GD"] / last["SGD"]).min())
        error = float(table["error"].max())
        return self.claim(
            "C4",
            "SGD balances the two layers, gradient descent does not.",
            kind="threshold",
            criterion="from r = 8: every seed of SGD ends at r <= 4, and GD / SGD >= 3; a'^2 - b'^2 = (a^2 - b^2)(1 - "
            "(step)^2) over the whole run to 1e-9",
            measured=f"r of SGD {listed(last['SGD'], '.2f')}, of GD {listed(last['GD'], '.2f')}, smallest ratio "
            f"{ratio:.2f}; identity off by {error:.1e}",
            holds=worst <= 4 and ratio >= 3 and error <= 1e-9,
            note="Gradients are clipped at 50, as in C1: a first run without it diverged by both methods.",
        )

    def _relu_claim(self, data: Data) -> Claim:
        table = data["relu"]
        gap = np.abs(np.divide(table["trace"], table["closed_form"]) - 1)
        return self.claim(
            "C5",
            "The trace of a two-layer ReLU network is half the sum of |w|^2 + d a^2.",
            kind="exact",
            criterion="points of an orthogonal frame and their negatives, random weights, float64: relative error <= "
            "1e-12",
            measured=f"largest relative error {gap.max():.1e} of {len(gap)} networks",
            holds=bool((gap <= 1e-12).all()),
        )


def _two_layers(params: Params, x: Inputs) -> Tensor:
    return torch.relu(first_tensor(x) @ params["first"].T) @ params["second"]


def _threshold(factors: Tensor, x: Tensor) -> float:
    """The exact threshold at batch size 1 of a trained network; NaN where it diverged."""
    rows = torch.cat([x * factors[1], x * factors[0]], dim=1)
    if not bool(torch.isfinite(rows).all()):
        return float("nan")
    return SecondMoment.of_gram(rows @ rows.T).threshold(1)


def _brute_force_growth(
    g: Tensor, learning_rate: float, batch_size: int, replacement: bool, momentum: float = 0.0
) -> float:
    """Spectral radius of the mean over all batches of the Kronecker square of one linearised step."""
    n, p = g.shape
    picks = (
        itertools.product(range(n), repeat=batch_size) if replacement else itertools.combinations(range(n), batch_size)
    )
    batch = g[torch.tensor(list(picks))]
    eye = torch.eye(p, dtype=g.dtype)
    step = (1 + momentum) * eye - learning_rate * batch.mT @ batch / batch_size
    if momentum:
        above = torch.cat([step, (-momentum * eye).expand_as(step)], dim=2)
        below = torch.cat([eye, torch.zeros_like(eye)], dim=1).expand(len(step), -1, -1)
        step = torch.cat([above, below], dim=1)
    flat = step.flatten(1)
    side = step.shape[1]
    second = (flat.T @ flat / len(flat)).reshape(side, side, side, side).transpose(1, 2).reshape(side**2, side**2)
    return float(torch.linalg.eigvals(second).abs().max())


def _gaussian_gap(batch_size: int) -> float:
    """Against the closed form: a grid whose fourth moments are those of a Gaussian."""
    eigenvalues = torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64)
    points = torch.tensor([0, 0, 0, 0, 3**0.5, -(3**0.5)], dtype=torch.float64)
    rows = torch.cartesian_prod(points, points, points) * eigenvalues.sqrt()
    return abs(mean_square_threshold(rows, batch_size) / gaussian_mean_square_threshold(eigenvalues, batch_size) - 1)
