"""The study `perfect-minima-deepening`: zero training error says nothing, since layers can be added that only fit."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from corollary.data import digits
from corollary.engine import fit, seeded
from corollary.evidence import PALETTE, Claim, Data, Figure, Parts, Source, Study, joined
from corollary.evidence.study import in_memory
from corollary.geometry.bumps import LIN_WANG_ZHOU
from corollary.geometry.deepening import DeepenedNet, deepen, patched_targets
from corollary.geometry.minima import hat_regression, minima_spectrum, weierstrass

SMOOTHNESS = 0.5
"""r, the Hoelder order of the target; the rate is n^(-2r/(2r+1)) = n^(-1/2)."""
NOISE = 0.5
GOOD = {400: 0.12, 1600: 0.07}
"""Largest errors of the good minimum at the sample sizes at which bad ones are judged."""
SHARES = (0.001, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)
"""Half-widths of the cubes of P4, in halves of the separations."""
STEEP = 0.005
"""The ramps of P4 in half-widths, so that cubes of nearly the whole separation stay apart."""
PATCHED = 50


@dataclass(frozen=True)
class PerfectMinimaDeepening(Study):
    """Networks deepened to fit all data: the good stay good, the bad stay bad, and there is everything in between."""

    repeats: int = 20
    """Data sets drawn at each sample size."""

    slug: ClassVar[str] = "perfect-minima-deepening"
    room: ClassVar[str] = "geometry"
    title: ClassVar[str] = "Zero training error by deepening, without losing or gaining generalization"
    sources: ClassVar[tuple[Source, ...]] = (LIN_WANG_ZHOU,)

    def run(self, parts: Parts = in_memory) -> Data:
        """Rates over the sample size, exact checks, the continuum of minima, and a patched network."""
        rates = [parts(f"rate {n}", lambda n=n: self._rates(n)) for n in self._sizes]
        exact = [parts(f"exact {d}", lambda d=d: self._exact(d)) for d in (1, 2, 5)]
        return {
            "rates": joined(rates),
            "exact": joined(exact),
            "continuum": parts("continuum", self._continuum),
            "patch": parts("patch", self._patch),
            "picture": parts("picture", self._picture),
        }

    def claims(self, data: Data) -> tuple[Claim, ...]:
        """P1 to P5 of the specification, from the stored tables alone."""
        return (
            self._perfect(data),
            self._identities(data),
            self._bad(data),
            self._everything(data),
            self._patches(data),
        )

    def figures(self, data: Data) -> tuple[Figure, ...]:
        """Rates of good and bad minima, the continuum, and one deepened network close up."""
        rates = data["rates"]
        return (
            Figure(
                "perfect-and-bad-minima",
                "All of these fit their data exactly",
                f"Left: mean squared error against the true function, over {self._repeats} data sets, of the "
                "least-squares fit, of the same fit deepened to zero training error, of 0 deepened, and of the nearest "
                "target (1-NN); grey: slope -1/2. Right: deepened networks of 400 samples by the width of their cubes, "
                "as a share of half the separation; dashed: the fit before deepening.",
                {
                    **{name: np.asarray(rates[name]) for name in ("n", "base", "deepened", "bad", "nearest")},
                    **{name: np.asarray(data["continuum"][name]) for name in ("share", "error", "base_error")},
                },
                _draw_minima,
                size=(8.4, 3.8),
                panels=(1, 2),
            ),
            Figure(
                "deepened-network",
                "A perfect minimum close up",
                "A least-squares fit of 100 noisy samples (0.4 to 0.6 shown), and the same network deepened with local "
                "cubes: it passes through every sample, and leaves the fit off them.",
                {name: np.asarray(column) for name, column in data["picture"].items()},
                _draw_picture,
            ),
        )

    # ------------------------------------------------------------------------------------------------------- settings

    @property
    def _sizes(self) -> tuple[int, ...]:
        sizes = tuple(100 * 2**i for i in range(7))
        return self.pick(smoke=(100, 400), desk=sizes, paper=(*sizes, 12_800, 25_600))

    @property
    def _repeats(self) -> int:
        return self.pick(smoke=2, desk=self.repeats, paper=5 * self.repeats)

    def _sample(self, n: int, repeat: int, test: int) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy training data, and test inputs that are even with a random offset in each cell."""
        generator = self.seeds(f"data set {repeat} of {n}")
        x = torch.rand(n, generator=generator, dtype=torch.float64)
        y = weierstrass(x, SMOOTHNESS) + NOISE * torch.randn(n, generator=generator, dtype=torch.float64)
        cells = torch.arange(test, dtype=torch.float64) + torch.rand(test, generator=generator, dtype=torch.float64)
        return x, y, (cells / test)[:, None]

    # -------------------------------------------------------------------------------------------------- measurements

    def _rates(self, n: int) -> dict[str, Any]:
        """Errors of the fit, deepened or not, of 0 deepened and of the nearest target: means over data sets."""
        rows = []
        for repeat in range(self._repeats):
            x, y, x_test = self._sample(n, repeat, 4000)
            bases = {"fit": _fit(x, y), "zero": torch.zeros_like}
            table = minima_spectrum(bases, x[:, None], y, x_test, _target)
            near = y[(x_test - x).abs().argmin(1)]
            rows.append(
                {
                    "base": table["base_test_error"][0],
                    "deepened": table["test_error"][0],
                    "bad": table["test_error"][1],
                    "train": max(table["train_error"]),
                    "nearest": float((near - _target(x_test)[:, 0]).square().mean()),
                }
            )
        means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0] if name != "train"}
        return {"n": [n], **{k: [v] for k, v in means.items()}, "train": [max(row["train"] for row in rows)]}

    def _exact(self, d: int) -> dict[str, Any]:
        """Interpolation, locality and the size of the change, against a random network on random points of the cube."""
        generator = self.seeds(f"exact in {d} dimensions")
        x = torch.rand(100, d, generator=generator, dtype=torch.float64)
        y = torch.randn(100, generator=generator, dtype=torch.float64)
        base = seeded(lambda: _mlp(d, 1), self.seeds.integer(f"base in {d} dimensions") % 2**31)
        net = deepen(base, x, y)
        reach = net.radii + net.ramps
        # Half of the points next to the cubes, where a wrong support would show.
        near = net.centres[torch.arange(5000) % 100]
        ring = reach[0] * (1 + 2 * torch.rand(5000, 1, generator=generator, dtype=torch.float64))
        side = torch.rand(5000, d, generator=generator, dtype=torch.float64) * 2 - 1
        side = side / side.abs().amax(1, keepdim=True)
        queries = torch.cat([torch.rand(60_000, d, generator=generator, dtype=torch.float64), near + ring * side])
        outside = _distance(queries, net.centres) >= reach[0]
        chosen = queries[outside][-10_000:]
        with torch.no_grad():
            moved = float((net(chosen) - net.base(chosen)).abs().max())
        measured, spread = _measured_change(net, generator)
        residuals = net.heights.square().sum()
        return {
            "d": [d],
            "interpolation": [net.certificate.interpolation_error],
            "outside": [len(chosen)],
            "moved": [moved],
            "change": [measured],
            "spread": [spread],
            "formula": [net.certificate.l2_change**2],
            "lower": [float(residuals * (2 * net.radii[0]) ** d)],
            "upper": [float(residuals * (2 * reach[0]) ** d)],
        }

    def _continuum(self) -> dict[str, Any]:
        """Local cubes from nothing to nearly the whole separation."""
        shares = self.pick(smoke=SHARES[::4], desk=SHARES, paper=SHARES)
        errors, train, base = np.zeros(len(shares)), np.zeros(len(shares)), 0.0
        for repeat in range(self._repeats):
            x, y, x_test = self._sample(400, repeat, 20_000)
            fitted, truth = _fit(x, y), _target(x_test)
            apart = _distance(x[:, None], x[:, None], others=True)
            with torch.no_grad():
                base += float((fitted(x_test) - truth).square().mean()) / self._repeats
                for i, share in enumerate(shares):
                    net = deepen(fitted, x[:, None], y, radius=share * apart / 2, ramp=STEEP)
                    errors[i] += float((net(x_test) - truth).square().mean()) / self._repeats
                    train[i] = max(train[i], net.certificate.interpolation_error)
        return {"share": list(shares), "error": errors, "train": train, "base_error": [base] * len(shares)}

    def _patch(self) -> dict[str, Any]:
        """Patch 50 errors of a trained network on the digits, by deepening and by fine-tuning until they are right."""
        data, epochs = digits(), self.pick(smoke=1, desk=5, paper=5)
        train, test = data.train, data.test
        assert train.y is not None  # the digits have labels and a test part
        assert test is not None
        net = fit(
            seeded(lambda: _mlp(64, 10), self.seeds.integer("patched network") % 2**31),
            (train.x, train.y),
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
            epochs=epochs,
            batch_size=64,
            seed=self.seeds.integer("batches") % 2**31,
        ).module
        with torch.no_grad():
            outputs = net(train.x)
        wrong = (outputs.argmax(1) != train.y).nonzero().flatten()[:PATCHED]
        x, labels = train.x[wrong], train.y[wrong]
        patched = deepen(net, x, patched_targets(outputs[wrong].double(), labels))
        others = torch.ones(len(train.x), dtype=torch.bool)
        others[wrong] = False
        rest = torch.cat([train.x[others], test.x])
        everything = torch.cat([train.x, test.x])
        tuned, steps = _fine_tuned(net, x, labels)
        with torch.no_grad():
            before = net(rest).argmax(1)
            gap = float((patched.to_mlp()(everything) - patched(everything)).abs().max())
            return {
                "points": [len(wrong)],
                "accuracy": [float((outputs.argmax(1) == train.y).double().mean())],
                "corrected": [int((patched(x).argmax(1) == labels).sum())],
                "others": [len(rest)],
                "changed": [int((patched(rest).argmax(1) != before).sum())],
                "mlp_gap": [gap],
                "tuned_corrected": [int((tuned(x).argmax(1) == labels).sum())],
                "tuned_changed": [int((tuned(rest).argmax(1) != before).sum())],
                "tuned_steps": [steps],
            }

    def _picture(self) -> dict[str, Any]:
        x, y, _ = self._sample(100, 0, 1)
        net = deepen(_fit(x, y), x[:, None], y, radius="local", ramp=0.25)
        inside = ((x > 0.4) & (x < 0.6)).nonzero().flatten()
        grid = torch.cat([torch.linspace(0.4, 0.6, 4000, dtype=torch.float64), x[inside]]).sort().values
        nearest = torch.searchsorted(x[inside].sort().values, grid).clamp(max=len(inside) - 1)
        order = x[inside].argsort()
        with torch.no_grad():
            return {
                "x": grid.numpy(),
                "fit": net.base(grid[:, None])[:, 0].numpy(),
                "deepened": net(grid[:, None])[:, 0].numpy(),
                "truth": _target(grid[:, None])[:, 0].numpy(),
                "sample_x": x[inside][order][nearest].numpy(),
                "sample_y": y[inside][order][nearest].numpy(),
            }

    # --------------------------------------------------------------------------------------------------------- claims

    def _perfect(self, data: Data) -> Claim:
        n, base, deepened, train, nearest = _columns(data["rates"], "n", "base", "deepened", "train", "nearest")
        slope = float(np.polyfit(np.log(n), np.log(deepened), 1)[0])
        worst = float((deepened / base).max())
        return self.claim(
            "P1",
            "There are networks of zero training error that generalize at the almost optimal rate n^(-2r/(2r+d)).",
            kind="trend",
            criterion="r = 1/2, d = 1, n = 100..6400, 20 data sets each: slope of log mean test error of the deepened "
            "fit on log n in [-0.62, -0.42]; deepened / fit <= 1.03 at every n; largest training error <= 1e-8",
            measured=f"slope {slope:.3f}; largest ratio {worst:.4f}; largest training error {train.max():.1g}",
            holds=-0.62 <= slope <= -0.42 and worst <= 1.03 and float(train.max()) <= 1e-8,
            controls=(
                f"nearest target (1-NN), which also fits all data: {nearest[0]:.3f} at n = {n[0]} to {nearest[-1]:.3f} "
                f"at n = {n[-1]} (noise variance {NOISE**2:g})",
            ),
        )

    def _identities(self, data: Data) -> Claim:
        d, hit, outside, moved, change, spread, formula, lower, upper = _columns(data["exact"], *data["exact"])
        line = d == 1
        gap = float(np.abs(change[line] / formula[line] - 1)[0])
        between = (lower <= change) & (change <= upper)
        return self.claim(
            "P2",
            "Deepening interpolates, changes nothing off its cubes, and its change has a known size.",
            kind="exact",
            criterion="d = 1, 2, 5, n = 100: |g(x_i) - y_i| <= 1e-9; g = f at 10^4 points outside; d = 1: squared "
            "change equal to sum res^2 (2 r + 2 tau / 3) up to 1e-8 by quadrature; d = 2, 5: between its bounds",
            measured=f"|g(x_i) - y_i| <= {hit.max():.1g}; outside |g - f| <= {moved.max():.1g} at "
            f"{int(outside.min()):,} points; d = 1: relative difference {gap:.1g}; "
            + ", ".join(
                f"d = {int(k)}: {a:.3g} <= {b:.4g} <= {c:.3g}"
                for k, a, b, c in zip(d[~line], lower[~line], change[~line], upper[~line], strict=True)
            ),
            holds=bool(
                hit.max() <= 1e-9
                and moved.max() == 0
                and outside.min() == 10_000
                and gap <= 1e-8
                and between[~line].all()
            ),
            controls=tuple(
                f"d = {int(k)}: sampled {c:.5g} ± {s:.1g}, closed form {f:.5g}"
                for k, c, s, f in zip(d[~line], change[~line], spread[~line], formula[~line], strict=True)
            ),
        )

    def _bad(self, data: Data) -> Claim:
        n, bad, deepened, train = _columns(data["rates"], "n", "bad", "deepened", "train")
        at = {size: int(np.flatnonzero(n == size)[0]) for size in GOOD if (n == size).any()}
        return self.claim(
            "P3",
            "On the same data there are networks of zero training error that have learned nothing.",
            kind="threshold",
            criterion="0 deepened, n = 400 and 1600: training error <= 1e-8 and test error >= 0.9, while the deepened "
            "fit has <= 0.12 and <= 0.07",
            measured="; ".join(f"n = {size}: {bad[i]:.3f} against {deepened[i]:.3f}" for size, i in at.items())
            + f"; training error <= {train[list(at.values())].max():.1g}",
            holds=all(train[i] <= 1e-8 and bad[i] >= 0.9 and deepened[i] <= GOOD[size] for size, i in at.items()),
        )

    def _everything(self, data: Data) -> Claim:
        share, error, train, base = _columns(data["continuum"], "share", "error", "train", "base_error")
        rise = float(error[-1] - base[-1])
        return self.claim(
            "P4",
            "Networks of zero training error form a continuum, with every quality in between.",
            kind="trend",
            criterion="n = 400, half-widths of 1e-3 to 0.99 of half the separations: training error <= 1e-8 for all; "
            "test error strictly increasing; at 0.99 at least 0.05 above the fit's",
            measured=f"{len(share)} widths, training error <= {train.max():.1g}; test error from {error[0]:.4f} to "
            f"{error[-1]:.4f}, {'strictly' if (np.diff(error) > 0).all() else 'not'} increasing; {rise:.3f} above the "
            "fit's",
            holds=bool(train.max() <= 1e-8 and (np.diff(error) > 0).all() and rise >= 0.05),
        )

    def _patches(self, data: Data) -> Claim:
        row = {name: np.asarray(column)[0] for name, column in data["patch"].items()}
        return self.claim(
            "P5",
            "Deepening patches a trained network on a list of points, and changes no other prediction.",
            kind="exact",
            criterion="MLP 64-64 after 5 epochs on the digits: 50 misclassified points all corrected; predictions on "
            "all other training and test samples identical; to_mlp() agrees to 1e-6",
            measured=f"{row['corrected']} of {row['points']} corrected; {row['changed']} of {row['others']:,} other "
            f"predictions changed; to_mlp() differs by {row['mlp_gap']:.1g}",
            holds=bool(row["points"] == row["corrected"] == PATCHED and row["changed"] == 0 and row["mlp_gap"] <= 1e-6),
            controls=(
                f"fine-tuning on these points alone until all are right ({row['tuned_steps']} steps of Adam, "
                f"{row['tuned_corrected']} right): {row['tuned_changed']} other predictions changed",
            ),
        )


def _target(x: Tensor) -> Tensor:
    return weierstrass(x, SMOOTHNESS)


def _fit(x: Tensor, y: Tensor) -> nn.Module:
    """Least squares over piecewise-linear functions of round(n^(1/(2r+1))) pieces."""
    pieces = round(len(x) ** (1 / (2 * SMOOTHNESS + 1)))
    return hat_regression(x, y, torch.linspace(0, 1, pieces + 1, dtype=torch.float64))


def _mlp(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs))


def _distance(x: Tensor, centres: Tensor, others: bool = False) -> Tensor:
    """The distance of each point from the nearest centre (from the nearest other one) in the maximum norm."""
    parts = [torch.cdist(part, centres, p=math.inf) for part in x.split(2**22 // len(centres))]
    return torch.cat([part.topk(2, largest=False).values[:, 1] if others else part.amin(1) for part in parts])


def _measured_change(net: DeepenedNet, generator: torch.Generator) -> tuple[float, float]:
    """The squared L2 norm of g - f, as the network computes it, and its standard error.

    In one dimension by Simpson's rule on each linear piece, which is exact for the square of a linear function; else
    from random points of the cubes.
    """
    reach, d = net.radii + net.ramps, net.centres.shape[1]
    if d == 1:
        signs = torch.tensor([-1.0, 1.0], dtype=torch.float64)
        pieces = [(signs[i] * reach, signs[i] * net.radii) for i in range(2)] + [(-net.radii, net.radii)]
        total = 0.0
        for a, b in pieces:
            nodes = net.centres + torch.stack([a, (a + b) / 2, b], dim=1)
            with torch.no_grad():
                change = (net(nodes.reshape(-1, 1)) - net.base(nodes.reshape(-1, 1))).reshape(nodes.shape).square()
            total += float(((b - a).abs() / 6 * (change[:, 0] + 4 * change[:, 1] + change[:, 2])).sum())
        return total, 0.0
    draws = 2000
    offsets = torch.rand(draws, len(reach), d, generator=generator, dtype=torch.float64) * 2 - 1
    x = net.centres + reach[:, None] * offsets
    with torch.no_grad():
        change = (net(x.flatten(0, 1)) - net.base(x.flatten(0, 1))).reshape(draws, len(reach)).square()
    each = change @ (2 * reach) ** d
    return float(each.mean()), float(each.std()) / draws**0.5


def _fine_tuned(net: nn.Module, x: Tensor, labels: Tensor) -> tuple[nn.Module, int]:
    """The network trained on these points alone, until all are classified right."""
    tuned = fit(
        net,
        (x, labels),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        steps=1000,
        record_every=1,
        stop_when=lambda measured: float(measured["accuracy"]) == 1,
    )
    return tuned.module, tuned.step


def _columns(table: Mapping[str, Any], *names: str) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(table[name]) for name in names)


def _draw_minima(axes: Any, data: Mapping[str, Any]) -> None:
    left, right = axes
    n = data["n"]
    left.plot(n, data["base"], color=PALETTE[2], lw=5, alpha=0.4, label="fit")  # the deepened one lies on it
    for name, label, colour, style in (
        ("bad", "0, deepened", 1, "s-"),
        ("nearest", "nearest target", 4, "^-"),
        ("deepened", "fit, deepened", 0, "o-"),
    ):
        left.plot(n, data[name], style, color=PALETTE[colour], label=label)
    left.plot(n, 0.6 * data["base"][-1] * (n / n[-1]) ** -0.5, color=PALETTE[6], lw=1, label="slope -1/2")
    left.set(xscale="log", yscale="log", xlabel="samples n", ylabel="squared error against the true function")
    left.legend(fontsize=7)
    right.plot(data["share"], data["error"], "o-", color=PALETTE[0], label="deepened, zero training error")
    right.axhline(data["base_error"][0], color=PALETTE[2], ls="--", lw=1, label="fit")
    right.set(xlabel="half-width / half the separation", ylabel="squared error", ylim=(0, None))
    right.legend()


def _draw_picture(axes: Any, data: Mapping[str, Any]) -> None:
    axes.plot(data["x"], data["truth"], color=PALETTE[6], lw=0.5, alpha=0.7, label="true function")
    axes.plot(data["x"], data["deepened"], color=PALETTE[0], lw=1, label="deepened")
    axes.plot(data["x"], data["fit"], color=PALETTE[2], lw=1.6, ls="--", label="least-squares fit")
    axes.plot(data["sample_x"], data["sample_y"], "o", color=PALETTE[1], ms=4, label="samples")
    axes.set(xlabel="x", ylabel="y")
    axes.legend()
