"""The study `ibp-tightness`: how loose interval bounds are, at random weights and after training of four kinds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from corollary.engine import seeded
from corollary.evidence import Claim, Data, Figure, Parts, Source, Study
from corollary.evidence.study import in_memory
from corollary.graph import capture
from corollary.studies.verify import ibp_tightness_pictures as pictures
from corollary.studies.verify.ibp_tightness_networks import (
    convolutional,
    flipped,
    gaussian,
    images_or_digits,
    perceptron,
)
from corollary.verify.attacks import pgd
from corollary.verify.certified_training import GOWAL_2018, METHODS, MUELLER_2023, CertifiedTrainer, Method, WarmUp
from corollary.verify.classifier import predictions
from corollary.verify.ibp_initialisation import (
    MAO_2024,
    SHI_2021,
    has_conflicting_signs,
    init_tightness,
    is_propagation_invariant,
    product_radii,
    reconstruction_tightness,
)
from corollary.verify.interval_margins import IntervalNetwork, ibp_certified
from corollary.verify.tightness import propagation_radii, propagation_tightness

LINEAR = ((50, 30, 20), (50, 100, 20), (40, 30, 30, 30, 10))
HIDDEN = (30, 60, 120, 240, 480)
"""Widths between 50 inputs and 20 outputs from which the power of the width is read."""
RELU = (100, 256, 10)
EMBEDDINGS = ((100, 30), (1000, 10), (1000, 40))
SIGNED = ((5, 6, 4), (4, 5, 5, 3), (6, 4, 7, 5, 3))
EXACT = 1e-12
WIDTH, EPS = 128, 0.1


class Case(NamedTuple):
    """One network to train."""

    method: Method
    eps: float
    width: int
    seed: int


class Setup(NamedTuple):
    """How networks are trained at one scale."""

    epochs: int
    learning_rate: float
    warm_up: WarmUp
    milestones: tuple[int, ...]
    seeds: int
    radius_seeds: int
    width_seeds: int
    eps: tuple[float, ...]
    widths: tuple[int, ...]


SETUPS = {
    "smoke": Setup(2, 2e-3, WarmUp(0, 1, "linear"), (), 1, 1, 1, (0.03, EPS), (16, 64)),
    "desk": Setup(30, 2e-3, WarmUp(2, 17, "linear"), (), 3, 2, 5, (0.01, 0.03, EPS, 0.2), (16, 64, 256)),
    "paper": Setup(70, 5e-4, WarmUp(0, 20), (50, 60), 3, 2, 5, (0.01, 0.03, EPS, 0.2), (16, 64, 256)),
}


PLANNED_SEEDS = 2
"""Seeds on which the claim about widths is judged; the others are its control."""


@dataclass(frozen=True)
class IbpTightness(Study):
    """Tightness of interval bounds: what random weights give, when it is 1, and what training does to it."""

    small_box: float = 0.3
    """The box that SABR bounds, over the whole one."""

    slug: ClassVar[str] = "ibp-tightness"
    room: ClassVar[str] = "verify"
    title: ClassVar[str] = "Interval bounds get tight where training asks them to be"
    sources: ClassVar[tuple[Source, ...]] = (MAO_2024, GOWAL_2018, MUELLER_2023, SHI_2021)

    def run(self, parts: Parts = in_memory) -> Data:
        """Draw weights, check signs, and train by four methods, at several radii and widths."""
        runs = [parts(_name(case), lambda case=case: self._trained(case)) for case in self._runs()]
        return {
            "initialisation": parts("initialisation", self._initialisation),
            "widths": parts("widths", self._widths),
            "relu": parts("relu", self._relu),
            "embedding": parts("embedding", self._embedding),
            "signs": parts("signs", self._signs),
            "runs": {name: [run[name] for run in runs] for name in runs[0]},
        }

    def claims(self, data: Data) -> tuple[Claim, ...]:
        """I1 to I5 of the specification, from the stored tables alone."""
        return (
            self._training_claim(data),
            self._initialisation_claim(data),
            self._embedding_claim(data),
            self._exactness_claim(data),
            self._regularisation_claim(data),
        )

    def figures(self, data: Data) -> tuple[Figure, ...]:
        """Tightness by method, at initialisation, and against radius and width."""
        return pictures.figures(data)

    # ------------------------------------------------------------------------------------------------ random weights

    def _initialisation(self) -> dict[str, Any]:
        draws = self.pick(smoke=40, desk=400, paper=4000)
        rows = []
        for widths in LINEAR:
            radii = product_radii(gaussian(widths, draws, self.seeds(f"linear {widths}")))
            rows.append((_written(widths), _ratio(*radii), float(radii.tightness.mean()), init_tightness(widths)))
        return _columns(("network", "ratio_of_means", "mean_ratio", "predicted"), rows)

    def _widths(self) -> dict[str, Any]:
        draws = self.pick(smoke=10, desk=100, paper=1000)
        rows = []
        for hidden in HIDDEN:
            widths = (50, hidden, 20)
            radii = product_radii(gaussian(widths, draws, self.seeds(f"linear {widths}")))
            rows.append((hidden, _ratio(*radii), init_tightness(widths)))
        return _columns(("hidden", "ratio_of_means", "predicted"), rows)

    def _relu(self) -> dict[str, Any]:
        """Local tightness with and without ReLU units for the same weights, at a Gaussian input a draw."""
        draws = self.pick(smoke=4, desk=60, paper=600)
        generator = self.seeds("relu")
        net = nn.Sequential(
            nn.Linear(RELU[0], RELU[1], bias=False), nn.ReLU(), nn.Linear(RELU[1], RELU[2], bias=False)
        ).double()
        graph = capture(net, torch.zeros(2, RELU[0], dtype=torch.float64))
        found: dict[str, list[Tensor]] = {"local": [], "linear": []}
        weights = gaussian(RELU, draws, generator)
        inputs = torch.randn(draws, 1, RELU[0], generator=generator, dtype=torch.float64)
        for first, second, x in zip(*weights, inputs, strict=True):
            drawn = replace(graph, tensors={**graph.tensors, "0.weight": first, "2.weight": second})
            for mode in ("local", "linear"):
                radii = propagation_radii(drawn, x, 1.0, mode=mode, data_range=None)
                found[mode].append(torch.stack([radii.optimal.sum(), radii.interval.sum()]))
        totals = {mode: torch.stack(parts).sum(0) for mode, parts in found.items()}
        rows = [(mode, float(total[0] / total[1])) for mode, total in totals.items()]
        return _columns(("mode", "tightness"), rows)

    def _embedding(self) -> dict[str, Any]:
        draws = self.pick(smoke=2, desk=10, paper=100)
        rows = []
        for dimension, k in EMBEDDINGS:
            generator = self.seeds(f"embedding {dimension} {k}")
            basis, _ = torch.linalg.qr(torch.randn(draws, dimension, k, generator=generator, dtype=torch.float64))
            radii = product_radii([basis.mT, basis])
            ends = (float(radii.interval.mean()), float(radii.optimal.mean()))
            rows.append((dimension, k, *ends, ends[1] / ends[0], reconstruction_tightness(k)))
        return _columns(("dimension", "k", "interval", "optimal", "tightness", "predicted"), rows)

    def _signs(self) -> dict[str, Any]:
        """Distance of the tightness from 1 over many networks, and how often the check on signs agrees with it."""
        draws = self.pick(smoke=30, desk=1000, paper=10000)
        generator = self.seeds("signs")
        groups: dict[str, list[list[Tensor]]] = {"nonnegative": [], "consistent signs": [], "negative minor": []}
        for widths in SIGNED:
            weights = [w.abs() for w in gaussian(widths, draws, generator)]
            groups["nonnegative"].append(weights)
            groups["consistent signs"].append(flipped(weights, widths, generator))
        conflicting = gaussian((4, 5, 3), 2 * draws, generator)
        wanted = has_conflicting_signs(conflicting[1] @ conflicting[0]).nonzero()[:draws, 0]
        groups["negative minor"].append([weight[wanted] for weight in conflicting])
        zeros = [torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.eye(2)]
        groups["zeros among the weights"] = [[weight.double()[None] for weight in zeros]]
        rows = []
        for name, nets in groups.items():
            gaps = torch.cat([1 - product_radii(weights).tightness.amin(-1) for weights in nets])
            said = [is_propagation_invariant(one) for weights in nets for one in zip(*weights, strict=True)]
            agree = int((torch.tensor(said) == (gaps <= EXACT)).sum())
            rows.append((name, len(gaps), float(gaps.abs().max()), float(gaps.min()), agree))
        return _columns(("group", "networks", "largest_gap", "smallest_gap", "agree"), rows)

    # ------------------------------------------------------------------------------------------------------ training

    def _runs(self) -> list[Case]:
        """The networks to train; the ones in common of several comparisons are trained once."""
        setup = SETUPS[self.scale]
        wanted = [Case(method, EPS, WIDTH, seed) for method in METHODS for seed in range(setup.seeds)]
        wanted += [Case("ibp", eps, WIDTH, seed) for eps in setup.eps for seed in range(setup.radius_seeds)]
        wanted += [Case("ibp", EPS, width, seed) for width in setup.widths for seed in range(setup.width_seeds)]
        return list(dict.fromkeys(wanted))

    def _trained(self, case: Case) -> dict[str, Any]:
        method, eps, width, seed = case
        setup = SETUPS[self.scale]
        images = self.scale == "paper"
        x, y, test_x, test_y = images_or_digits(images)
        start = seeded(convolutional if images else perceptron, self.seeds.integer(f"weights {seed}"), width)
        trainer = CertifiedTrainer(start.to(x.device), method, eps=eps, warm_up=setup.warm_up, small_box=self.small_box)
        net = trainer.fit(
            (x, y),
            epochs=setup.epochs,
            batch_size=128,
            learning_rate=setup.learning_rate,
            milestones=setup.milestones,
            seed=self.seeds.integer(f"batches {seed}"),
        ).module
        network = IntervalNetwork(net, test_x[:2])
        tau = propagation_tightness(network, test_x, eps, test_y)
        attacked = pgd(net, test_x, test_y, eps, clip=(0, 1))
        return {
            **case._asdict(),
            "tightness": float(tau.nanmean()),
            "undefined": int(tau.isnan().sum()),
            "certified": float(ibp_certified(network, test_x, test_y, eps).double().mean()),
            "robust": float((predictions(net, attacked) == test_y).double().mean()),
            "accuracy": float((predictions(net, test_x) == test_y).double().mean()),
        }

    # -------------------------------------------------------------------------------------------------------- claims

    def _training_claim(self, data: Data) -> Claim:
        runs = {m: _where(data["runs"], method=m, eps=EPS, width=WIDTH) for m in METHODS}
        tau = {m: float(np.mean(run["tightness"])) for m, run in runs.items()}
        certified = {m: float(np.mean(run["certified"])) for m, run in runs.items()}
        robust = {m: float(np.mean(run["robust"])) for m, run in runs.items()}
        clean = {m: float(np.mean(run["accuracy"])) for m, run in runs.items()}
        undefined = sum(int(np.sum(run["undefined"])) for run in runs.values())
        return self.claim(
            "I1",
            "Interval training makes interval bounds tight; adversarial and standard training do not.",
            kind="threshold",
            criterion="radius 0.1, means over seeds: tightness IBP >= 0.6, SABR between PGD and IBP, standard <= 0.25, "
            "PGD <= 0.2; certified accuracy IBP >= 0.5, PGD = 0 +- 0.02",
            measured="tightness "
            + ", ".join(f"{m} {value:.3f}" for m, value in tau.items())
            + "; certified accuracy "
            + ", ".join(f"{m} {value:.3f}" for m, value in certified.items())
            + f"; {undefined} tightnesses undefined (no unit active)",
            holds=tau["ibp"] >= 0.6
            and tau["pgd"] < tau["sabr"] < tau["ibp"]
            and tau["standard"] <= 0.25
            and tau["pgd"] <= 0.2
            and certified["ibp"] >= 0.5
            and certified["pgd"] <= 0.02,
            controls=(
                "accuracy under attack (20 steps), which is not certified: "
                + ", ".join(f"{m} {value:.3f}" for m, value in robust.items()),
                "clean accuracy: " + ", ".join(f"{m} {value:.3f}" for m, value in clean.items()),
            ),
        )

    def _initialisation_claim(self, data: Data) -> Claim:
        table, widths, relu = data["initialisation"], data["widths"], data["relu"]
        errors = np.abs(np.divide(table["ratio_of_means"], table["predicted"]) - 1)
        slope = float(np.polyfit(np.log(widths["hidden"]), np.log(widths["ratio_of_means"]), 1)[0])
        by_mode = dict(zip(relu["mode"], relu["tightness"], strict=True))
        gain = float(by_mode["local"] / by_mode["linear"])
        return self.claim(
            "I2",
            "At Gaussian weights the tightness is a product of one factor a hidden layer, each about one over the root "
            "of the width; ReLU units in one hidden layer raise it by the root of 2.",
            kind="exact",
            criterion="deep linear networks (50,30,20), (50,100,20), (40,30,30,30,10): ratio of mean radii within 3 % "
            "of the closed form; slope of log tightness in log width -0.5 +- 0.03; ReLU over linear, 100-256-10, "
            "1.414 +- 0.05",
            measured="; ".join(
                f"{name}: {found:.4f} (closed form {wanted:.4f})"
                for name, found, wanted in zip(
                    table["network"], table["ratio_of_means"], table["predicted"], strict=True
                )
            )
            + f"; slope {slope:.3f} over widths {widths['hidden'][0]} to {widths['hidden'][-1]}; ReLU over linear "
            f"{gain:.3f}",
            holds=bool((errors <= 0.03).all()) and abs(slope + 0.5) <= 0.03 and abs(gain - 1.414) <= 0.05,
            controls=(
                "mean of the ratios, close but not equal: "
                + ", ".join(f"{value:.4f}" for value in table["mean_ratio"]),
            ),
        )

    def _embedding_claim(self, data: Data) -> Claim:
        table = data["embedding"]
        dimension, k = np.asarray(table["dimension"]), np.asarray(table["k"])
        interval, tau = np.asarray(table["interval"]) / k, np.asarray(table["tightness"])
        wide = dimension == 1000
        errors = np.abs(tau / np.asarray(table["predicted"]) - 1)
        return self.claim(
            "I3",
            "Data embedded in a k-dimensional subspace costs interval bounds a radius that grows like k, where the "
            "smallest box grows like the root of k.",
            kind="exact",
            criterion="interval radius over k = 0.637 +- 0.015; tightness at dimension 1000 within 4 % of "
            "sqrt(pi / 2k); at (100, 30) 0.2034 +- 0.003",
            measured="; ".join(
                f"({d}, {n}): radius/k {r:.4f}, tightness {t:.4f}"
                for d, n, r, t in zip(dimension, k, interval, tau, strict=True)
            ),
            holds=bool((np.abs(interval - 0.637) <= 0.015).all())
            and bool((errors[wide] <= 0.04).all())
            and bool((np.abs(tau[~wide] - 0.2034) <= 0.003).all()),
        )

    def _exactness_claim(self, data: Data) -> Claim:
        table = data["signs"]
        largest = dict(zip(table["group"], np.asarray(table["largest_gap"]), strict=True))
        smallest = dict(zip(table["group"], np.asarray(table["smallest_gap"]), strict=True))
        loose = "negative minor"
        return self.claim(
            "I4",
            "Interval bounds of a linear network are exact just where all paths between two entries have one sign.",
            kind="exact",
            criterion="tightness 1 to 1e-12 with nonnegative weights, with signs flipped consistently, and for I times "
            "[[1,1],[1,-1]]; below 1 in all networks with a negative 2 x 2 minor",
            measured="; ".join(
                f"{name} ({count:,}): 1 - tightness "
                + (f">= {smallest[name]:.3g}" if name == loose else f"<= {largest[name]:.1e}")
                for name, count in zip(table["group"], table["networks"], strict=True)
            ),
            holds=all(gap <= EXACT for name, gap in largest.items() if name != loose) and smallest[loose] > EXACT,
            controls=(
                f"the check on signs agrees with the radii in {int(np.sum(table['agree'])):,} of "
                f"{int(np.sum(table['networks'])):,}",
            ),
        )

    def _regularisation_claim(self, data: Data) -> Claim:
        setup = SETUPS[self.scale]
        by_eps = [_where(data["runs"], method="ibp", eps=eps, width=WIDTH) for eps in setup.eps]
        by_width = [_where(data["runs"], method="ibp", eps=EPS, width=width) for width in setup.widths]
        tau = np.array([_mean_of(run, "tightness", setup.radius_seeds) for run in by_eps])
        certified = np.array([_mean_of(run, "certified", PLANNED_SEEDS) for run in by_width])
        every = np.array([_mean_of(run, "certified", setup.width_seeds) for run in by_width])
        spread = max(float(np.std(run["certified"], ddof=1)) if len(run["seed"]) > 1 else 0.0 for run in by_width)
        least = np.array([0.08, 0.05])[: len(setup.widths) - 1]
        return self.claim(
            "I5",
            "Training for a larger radius gives tighter bounds, and wider networks certify more.",
            kind="trend",
            criterion="IBP, width 128: tightness strictly increasing over radii 0.01, 0.03, 0.1, 0.2; radius 0.1: "
            "certified accuracy at least 0.08 higher from width 16 to 64 and 0.05 higher from 64 to 256",
            measured="tightness "
            + ", ".join(f"{value:.3f} (radius {eps:g})" for eps, value in zip(setup.eps, tau, strict=True))
            + "; certified accuracy "
            + ", ".join(f"{value:.3f} (width {width})" for width, value in zip(setup.widths, certified, strict=True)),
            holds=bool((np.diff(tau) > 0).all()) and bool((np.diff(certified) >= least).all()),
            controls=(
                f"over {setup.width_seeds} seeds: {', '.join(f'{value:.3f}' for value in every)}, by "
                f"which the criterion {'holds' if (np.diff(every) >= least).all() else 'fails'}; standard deviation "
                f"between seeds up to {spread:.3f}",
            ),
            note="Judged on the two seeds that were planned. Their means scatter as much as the differences that are "
            "judged, so more seeds stand beside them.",
        )


def _ratio(optimal: Tensor, interval: Tensor) -> float:
    return float(optimal.mean() / interval.mean())


def _name(case: Case) -> str:
    return f"{case.method} radius {case.eps:g} width {case.width} seed {case.seed}"


def _written(widths: Sequence[int]) -> str:
    return f"({','.join(map(str, widths))})"


def _columns(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, list[Any]]:
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


def _mean_of(runs: Mapping[str, np.ndarray], name: str, seeds: int) -> float:
    """The mean of a column over the first so many seeds."""
    return float(np.mean(runs[name][runs["seed"] < seeds]))


def _where(table: Mapping[str, Any], **wanted: Any) -> dict[str, np.ndarray]:
    """The rows of a table with these values."""
    chosen = np.logical_and.reduce([np.asarray(table[name]) == value for name, value in wanted.items()])
    return {name: np.asarray(column)[chosen] for name, column in table.items()}
