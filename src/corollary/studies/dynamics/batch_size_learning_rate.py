"""The study `batch-size-learning-rate`: batch Hessians, the broadening law, largest learning rates, and a learner."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch

from corollary.data import Dataset
from corollary.dynamics.batch_curvature import GRANZIOL_2022, batch_curvature_curve
from corollary.dynamics.broadening import fit_broadening
from corollary.dynamics.fits import fit_power_law
from corollary.dynamics.largest_learning_rate import largest_stable_learning_rate
from corollary.dynamics.learning_rate_learner import PRODUCT_COST
from corollary.engine import adam, cross_entropy, fit, seeded, sgd
from corollary.evidence import Claim, Data, Figure, Parts, Source, Study
from corollary.evidence.study import in_memory
from corollary.linalg import SYMMETRIC, Operator, lanczos
from corollary.studies.dynamics import batch_size_learning_rate_pictures as drawings
from corollary.studies.dynamics.batch_size_learning_rate_learner import (
    MOMENTA,
    RATES,
    USUAL_MOMENTUM,
    Contest,
    compared,
    finals,
    joined,
    learned,
    scanned,
)
from corollary.studies.dynamics.batch_size_learning_rate_setup import (
    SPIKES,
    centred_digits,
    pictures,
    relu_network,
    restored,
    stored,
    tanh_network,
    vgg16,
    wigner_draw,
    wishart_draw,
)

GRIDS = {
    "sgd": tuple(2.0 ** (k / 2) for k in range(-10, 11)),
    "adam": tuple(2.0 ** (k / 2) for k in range(-20, 1)),
}
CURVE_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
RATE_SIZES = (2, 4, 8, 16, 32, 64, 128)
QUADRATURE_SIZE, DISTINCT, QUADRATURE_STEPS, MOMENTS = 200, 12, 15, 8
SMALL_BATCH = 128
SPENDING = ("products", "spent")
LEARNER_NOTE = (
    "The settings that win have momentum 0.98 or more, at rates beyond the edge of stability: they jump to weights "
    "where float32 knows no loss (the floor, 1e-8). The learner takes the mean size of an eigenvalue for its smallest "
    "curvature, which gives Polyak's momentum as 0.7 to 0.8. Its settings for all data (scale 0.5, memory 0.25) were "
    "chosen on other data before the first run, and kept; those for small batches are the defaults, which were made "
    "more cautious after the first run, in which small batches diverged. What the test part says is a control: the "
    "criterion was fixed on the training loss. It and the contest at the usual momentum were added after the first "
    "run; with 2 finalists instead of 4 the test part looked like a win of the learner."
)
CONTESTS = ("all", "small")
"""Whether a step of the learner sees all data or a small batch."""


@dataclass(frozen=True)
class BatchSizeLearningRate(Study):
    """How batch size sets the sharpness of a batch, and with it the largest learning rate."""

    rate_seeds: int = 3
    """Runs of each learning rate, all of which must train."""
    contest_seeds: int = 10
    """Paired runs of the learner and the tuned constant rate."""

    slug: ClassVar[str] = "batch-size-learning-rate"
    room: ClassVar[str] = "dynamics"
    title: ClassVar[str] = "Small batches are sharper, and the largest learning rate follows"
    sources: ClassVar[tuple[Source, ...]] = (GRANZIOL_2022,)

    def run(self, parts: Parts = in_memory) -> Data:
        """Measure batch Hessians, simulate the laws, search rates, check the quadrature, run the contest."""
        curve = parts("curve", self._curve)
        whole = {name: [curve.pop(name)] for name in ("full_largest", "full_smallest", "samples", "parameters")}
        runs, grid, last = ({}, {}, {})
        for name in CONTESTS:
            contest = self._contest(name)
            runs[name] = parts(f"learner {name}", lambda c=contest: learned(relu_network, self._digits, c))
            grid[name] = parts(f"constants {name}", lambda c=contest: scanned(relu_network, self._digits, c))
            scan = grid[name]
            last[name] = parts(
                f"finals {name}", lambda c=contest, scan=scan: finals(relu_network, self._digits, c, scan)
            )
        return {
            "curve": curve,
            "whole": whole,
            "laws": parts("laws", self._laws),
            "rates": {
                "batch_size": list(self._rate_sizes),
                **{name: parts(f"rates {name}", lambda name=name: self._rates(name))["rate"] for name in GRIDS},
            },
            "quadrature": parts("quadrature", self._quadrature),
            "runs": joined(runs),
            "grid": joined(grid),
            "finals": joined(last),
        }

    def claims(self, data: Data) -> tuple[Claim, ...]:
        """C1 to C5, from the stored tables alone."""
        return (
            self._broadening_claim(data),
            self._laws_claim(data),
            self._rates_claim(data),
            self._quadrature_claim(data),
            self._learner_claim(data),
        )

    def figures(self, data: Data) -> tuple[Figure, ...]:
        """The curve with its law, the simulated laws, the largest rates, and the race."""
        return drawings.figures(data)

    # -------------------------------------------------------------------------------------------------- measurements

    @cached_property
    def _data(self) -> Dataset:
        return pictures() if self.scale == "paper" else self._digits

    @cached_property
    def _digits(self) -> Dataset:
        return centred_digits()

    @property
    def _rate_sizes(self) -> tuple[int, ...]:
        return self.pick(smoke=(8, 32), desk=RATE_SIZES, paper=RATE_SIZES)

    def _curve(self) -> dict[str, Any]:
        x, y = self._data.train.x, self._data.train.y
        assert y is not None  # both sets have labels
        if paper := self.scale == "paper":
            net = seeded(vgg16, self.seeds.integer("weights")).to(x)
        else:
            net, x = seeded(tanh_network, self.seeds.integer("weights")), x.double()
        net = fit(
            net,
            (x, y),
            optimizer=lambda p: torch.optim.SGD(p, lr=0.01 if paper else 0.1, momentum=0.9),
            epochs=self.pick(smoke=1, desk=3, paper=25),
            batch_size=128 if paper else 64,
            seed=self.seeds.integer("batches"),
        ).module
        curve = batch_curvature_curve(
            net,
            cross_entropy,
            (x, y),
            self.pick(smoke=(8, 64), desk=CURVE_SIZES, paper=CURVE_SIZES),
            repeats=self.pick(smoke=2, desk=16, paper=16),
            seed=self.seeds.integer("curvature"),
        )
        return stored(curve)

    def _laws(self) -> dict[str, Any]:
        """Relative errors of planted eigenvalues and of the noise edge, for each draw."""
        size = self.pick(smoke=150, desk=1500, paper=6000)
        draws = self.pick(smoke=1, desk=5, paper=5)
        generator = self.seeds("laws")
        found = [(wigner_draw(size, generator), wishart_draw(2 * size // 3, generator)) for _ in range(draws)]
        wigner, wishart = (torch.stack(column) for column in zip(*found, strict=True))
        names = [f"spike_{spike:g}" for spike in SPIKES]
        return {
            **{name: wigner[:, i].numpy() for i, name in enumerate(names)},
            "wigner_edge": wigner[:, -1].numpy(),
            "wishart_spike": wishart[:, 0].numpy(),
            "wishart_edge": wishart[:, 1].numpy(),
        }

    def _rates(self, name: str) -> dict[str, Any]:
        y = self._data.train.y
        assert y is not None  # both sets have labels
        grid = self.pick(smoke=GRIDS[name][::5], desk=GRIDS[name], paper=GRIDS[name])
        found = largest_stable_learning_rate(
            vgg16 if self.scale == "paper" else relu_network,
            (self._data.train.x, y),
            self._rate_sizes,
            grid,
            optimizer=sgd() if name == "sgd" else adam(),
            steps=self.pick(smoke=5, desk=200, paper=2000),
            seeds=self.pick(smoke=1, desk=self.rate_seeds, paper=self.rate_seeds),
            success=1.0 if self.scale != "smoke" else 10.0,
            seed=self.seeds.integer("rates"),
        )
        return {"rate": np.where(found.bounded, found.largest, np.nan) if self.scale != "smoke" else found.largest}

    def _quadrature(self) -> dict[str, Any]:
        """Moments of a known spectrum from quadrature over a whole basis of probes, against the exact traces."""
        generator = self.seeds("quadrature")
        distinct = torch.linspace(-1.0, 3.0, DISTINCT, dtype=torch.float64)
        spectrum = distinct[torch.randint(DISTINCT, (QUADRATURE_SIZE,), generator=generator)]
        op = Operator(
            (QUADRATURE_SIZE, QUADRATURE_SIZE), lambda x: spectrum[:, None] * x, None, {SYMMETRIC}, torch.float64
        )
        noise = torch.randn(QUADRATURE_SIZE, QUADRATURE_SIZE, generator=generator, dtype=torch.float64)
        basis, _ = torch.linalg.qr(noise)
        nodes, vectors = lanczos(op, QUADRATURE_STEPS, basis).eigen()
        powers = torch.arange(1, MOMENTS + 1)
        found = (vectors[:, 0, :, None] ** 2 * nodes[..., None] ** powers).sum((0, 1))
        exact = (spectrum[:, None] ** powers).sum(0)
        return {"moment": powers.numpy(), "quadrature": found.numpy(), "exact": exact.numpy()}

    def _contest(self, batches: str) -> Contest:
        """The settings of a contest, with batches of all data or small ones."""
        count = self.pick(smoke=2, desk=self.contest_seeds, paper=self.contest_seeds)
        every = batches == "all"
        return Contest(
            tuple(self.seeds.integer(f"contest {i}") for i in range(count)),
            len(self._digits.train.x) if every else SMALL_BATCH,
            self.pick(smoke=12, desk=300 if every else 660, paper=3000),
            self.pick(smoke=RATES[4:8:2], desk=RATES, paper=RATES),
            self.pick(smoke=(0.5, 0.9), desk=MOMENTA, paper=MOMENTA),
            self.pick(smoke=1, desk=4, paper=8),
            {"scale": 0.5, "memory": 0.25} if every else {},
        )

    # -------------------------------------------------------------------------------------------------------- claims

    def _broadening_claim(self, data: Data) -> Claim:
        curve = restored(data["curve"], data["whole"])
        law = fit_broadening(curve)
        mean, low = curve.mean_largest.numpy(), curve.mean_smallest.numpy()
        growth, errors = mean[0] / curve.full_largest, law.relative_errors
        moment, _ = curve.moment_kappa()
        deeper = low[0] / curve.full_smallest
        return self.claim(
            "C1",
            "Extreme eigenvalues of batch Hessians exceed those of the Hessian of all data, and follow the broadening "
            "law with one constant.",
            kind="threshold",
            criterion="mean largest eigenvalue strictly decreasing in batch size; at batch 8 at least 3 times that of "
            "all data; smallest at batch 8 at most 3 times that of all data, both negative; error of the law at most "
            "0.15 on average, 0.30 at most",
            measured=f"largest {', '.join(f'{value:.3g}' for value in mean)} for batches of "
            f"{', '.join(map(str, curve.batch_sizes))}, all data {curve.full_largest:.3g}: {growth:.2f} times; "
            f"smallest {low[0]:.3g} against {curve.full_smallest:.3g}: {deeper:.1f} times; kappa {law.kappa:.3g}, "
            f"error {errors.mean():.3f} on average, {errors.max():.3f} at most",
            holds=bool((np.diff(mean) < 0).all())
            and growth >= 3
            and low[0] <= 3 * curve.full_smallest < 0
            and errors.mean() <= 0.15
            and errors.max() <= 0.30,
            controls=(
                f"kappa from the size of the noise alone, {moment:.3g}: {law.kappa / moment:.1f} times too small, "
                "since real noise has low rank",
            ),
        )

    def _laws_claim(self, data: Data) -> Claim:
        laws = data["laws"]
        spikes = np.array([laws[f"spike_{spike:g}"] for spike in SPIKES])
        edge, spike, wishart_edge = (
            float(np.abs(np.mean(laws[name]))) for name in ("wigner_edge", "wishart_spike", "wishart_edge")
        )
        worst, worst_mean = float(np.abs(spikes).max()), float(np.abs(spikes.mean(1)).max())
        return self.claim(
            "C2",
            "Spiked Wigner and Wishart laws: where noise puts planted eigenvalues, and where it ends.",
            kind="exact",
            criterion="8, 4, 2.5 and 1.5 in unit noise of size 1500: each within 6 % of the law, the mean of 5 draws "
            "within 2 %, the noise edge within 2 %; covariance of 1000 dimensions and 4000 samples, spike 5: mean of 5 "
            "draws within 3 %, edge within 2 %",
            measured=f"Wigner: worst draw {worst:.2%}, worst mean {worst_mean:.2%}, edge {edge:.2%}; Wishart: spike "
            f"{spike:.2%}, edge {wishart_edge:.2%}",
            holds=worst <= 0.06 and worst_mean <= 0.02 and edge <= 0.02 and spike <= 0.03 and wishart_edge <= 0.02,
        )

    def _rates_claim(self, data: Data) -> Claim:
        table = data["rates"]
        sizes, rates = np.asarray(table["batch_size"]), {name: np.asarray(table[name]) for name in GRIDS}
        small, slope, plateau = sizes <= 32, {"sgd": np.nan, "adam": np.nan, "adam, small": np.nan}, np.nan
        if all(np.isfinite(column).all() for column in rates.values()):
            slope = {
                "sgd": fit_power_law(sizes[small], rates["sgd"][small]).exponent,
                "adam": fit_power_law(sizes, rates["adam"]).exponent,
                "adam, small": fit_power_law(sizes[small], rates["adam"][small]).exponent,
            }
            plateau = rates["sgd"][sizes == 128].sum() / max(rates["sgd"][sizes == 64].sum(), 1e-300)
        shown = "; ".join(f"{name} " + ", ".join(f"{rate:.3g}" for rate in rates[name]) for name in GRIDS)
        return self.claim(
            "C3",
            "Adam's largest learning rate grows with the root of batch size; that of SGD faster at first, then not at "
            "all.",
            kind="trend",
            criterion="200 steps, training loss below 1 for all seeds: exponent of Adam over batches of 2 to 128 in "
            "[0.35, 0.65]; of SGD over 2 to 32 at least 0.60 and at least 0.1 above that of Adam; SGD at 128 over SGD "
            "at 64 at most 1.5",
            measured=f"exponents: Adam {slope['adam']:.2f} over all, SGD {slope['sgd']:.2f} over 2 to 32; SGD at 128 "
            f"over 64 {plateau:.2f}; largest rates for batches of {', '.join(map(str, sizes))}: {shown}",
            holds=0.35 <= slope["adam"] <= 0.65
            and slope["sgd"] >= 0.60
            and slope["sgd"] - slope["adam"] >= 0.1
            and plateau <= 1.5,
            controls=(f"exponent of Adam over 2 to 32 only: {slope['adam, small']:.2f}",),
            note="The full linear exponent of SGD, 1, is not reached at this scale.",
        )

    def _quadrature_claim(self, data: Data) -> Claim:
        table = data["quadrature"]
        error = float(np.abs(np.asarray(table["quadrature"]) / np.asarray(table["exact"]) - 1).max())
        return self.claim(
            "C4",
            "Stochastic Lanczos quadrature is exact for a known spectrum.",
            kind="exact",
            criterion="diagonal of 200 with 12 distinct values, 15 Lanczos steps, an orthonormal basis of probes: "
            "moments 1 to 8 equal the traces to 1e-8, relative",
            measured=f"largest relative error {error:.1e}",
            holds=error <= 1e-8,
        )

    def _learner_claim(self, data: Data) -> Claim:
        judged = compared(data, "all")
        usual = compared(data, "all", momentum=USUAL_MOMENTUM)
        accuracy, small = compared(data, "all", "accuracy"), compared(data, "small")
        mine = [np.asarray(data["runs"][name])[np.asarray(data["runs"]["batches"]) == "all"] for name in SPENDING]
        return self.claim(
            "C5",
            "A learner that reads learning rate and momentum off the batch Hessian beats a tuned constant rate.",
            kind="threshold",
            criterion="digits, 64-32-10 ReLU network, all training samples a step, 300 gradient evaluations, a "
            f"Hessian-vector product counted as {PRODUCT_COST:g} and its graph as 1: log10 of the final training loss "
            f"below that of the best of {len(RATES)} rates, a factor root 2 apart, times {len(MOMENTA)} momenta up to "
            "0.99, paired over 10 seeds, 95 % interval of the mean difference below 0",
            measured=judged.text,
            holds=judged.high < 0,
            controls=(
                f"against constant rates with the usual momentum: {usual.text}",
                f"against the constant that is best on the test part: {accuracy.text}",
                f"batches of {SMALL_BATCH}, 660 gradient evaluations: {small.text}",
                f"products are {float((mine[0] * PRODUCT_COST / mine[1]).mean()):.0%} of what the learner spends",
            ),
            note=LEARNER_NOTE,
        )
