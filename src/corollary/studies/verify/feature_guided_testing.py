"""The study `feature-guided-testing`: adversarial images found by a game on features, and what a finite grid proves."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from corollary.data import data_folder, digits, load
from corollary.engine import fit
from corollary.evidence import Claim, Data, Figure, Parts, Source, Study
from corollary.evidence.study import in_memory
from corollary.studies.verify.feature_guided_testing_pictures import pictures
from corollary.verify.black_box import PerImage
from corollary.verify.game_search import Budget, TestReport, feature_guided_searches
from corollary.verify.game_tree import KOCSIS_2006
from corollary.verify.grid_guarantee import grid_guarantee, grid_search
from corollary.verify.keypoints import LOWE
from corollary.verify.playouts import Opponent
from corollary.verify.saliency import WICKER_2018, FeatureMap, saliency_maps

OPPONENTS: tuple[Opponent, ...] = ("adversarial", "nature", "cooperative")
TAUS = (0.2, 0.1, 0.05)
RADIUS = 0.2
CHECKPOINTS = (20, 100, 400)
PIXELS = 6


@dataclass(frozen=True)
class FeatureGuidedTesting(Study):
    """Feature-guided black-box testing: queries and pixels against uniform choice, and two exact checks on grids."""

    images: Literal["auto", "mnist", "digits"] = "auto"
    """Images of F1. auto: MNIST where COROLLARY_DATA has its file, else digits brought to MNIST's format."""
    simulations: int = 2000
    """Simulations of each search that F2 compares with its exhausted grid."""

    slug: ClassVar[str] = "feature-guided-testing"
    room: ClassVar[str] = "verify"
    title: ClassVar[str] = "Feature-guided black-box safety testing of deep neural networks"
    sources: ClassVar[tuple[Source, ...]] = (WICKER_2018, LOWE, KOCSIS_2006)

    def run(self, parts: Parts = in_memory) -> Data:
        """Search with and without features, exhaust grids, bound distances, and play against three opponents."""
        names = self.pick(smoke=("digits",), desk=(self._pictures(),), paper=("mnist", "cifar10"))
        guided = [parts(f"searches on {name}", lambda n=name: self._guided(n)) for name in names]
        table = {column: np.concatenate([part[column] for part in guided]) for column in guided[0]}
        for name in [name for name in table if name.startswith("example_")]:
            table[name] = guided[0][name]  # one example is enough
        return {
            **_split(table, "searches", "longer", "example"),
            "exact": parts("grid minimum", self._exact),
            "guarantees": parts("guarantees", self._guarantees),
            **_split(parts("opponents", self._opponents), "opponents", "progress"),
        }

    def claims(self, data: Data) -> tuple[Claim, ...]:
        """F1 to F4 of the specification, from the stored tables alone."""
        return self._few_queries(data), self._global_minimum(data), self._sound(data), self._ordered(data)

    def figures(self, data: Data) -> tuple[Figure, ...]:
        """Success by queries, one image with what was changed, the guarantees, and the three opponents."""
        return pictures(data)

    def _pictures(self) -> str:
        if self.images != "auto":
            return self.images
        folder = data_folder()
        return "mnist" if folder is not None and (folder / "mnist.npz").exists() else "digits"

    def _guided(self, name: str) -> dict[str, Any]:
        """Searches guided by features and by none, a longer search, and a white-box attack, on one trained network."""
        data = _load(name, self.pick(smoke=200, desk=30_000, paper=60_000))
        net = _trained(data, self.pick(smoke=1, desk=data.epochs, paper=2 * data.epochs), self.seeds.integer(name))
        x = _correct(net, data, self.pick(smoke=4, desk=60, paper=1000))
        repeats = self.pick(smoke=1, desk=5, paper=5)
        maps = saliency_maps(x)
        uniform = [FeatureMap.uniform(x.shape[2], x.shape[3], x)] * len(x)
        rows: list[dict[str, Any]] = []
        for guidance, guides in (("features", maps), ("uniform", uniform)):
            found = feature_guided_searches(
                net,
                x.repeat(repeats, 1, 1, 1),
                features=guides * repeats,
                budget=Budget(simulations=1),
                parallel=1,
                seed=self.seeds.integer("searches"),
            )
            rows += [_row(name, guidance, number % len(x), report) for number, report in enumerate(found)]
        longer = feature_guided_searches(
            net,
            x,
            features=maps,
            budget=Budget(simulations=self.pick(smoke=2, desk=20, paper=100)),
            parallel=self.pick(smoke=2, desk=5, paper=5),
            seed=self.seeds.integer("longer searches"),
        )
        return {
            **{column: [row[column] for row in rows] for column in rows[0]},
            "longer_l0": [report.severity["L0"] for report in longer],
            "longer_queries": [report.queries for report in longer],
            "longer_white_box_l0": _white_box(net, x),
            "longer_pictures": [name] * len(longer),
            **_example(x, maps, longer),
        }

    def _exact(self) -> dict[str, Any]:
        """F2: the severity that cooperative play finds, and the least of the exhausted grid."""
        count = self.pick(smoke=3, desk=200, paper=1000)
        generator = self.seeds("random networks")
        network, x = _random_networks(count, generator)
        exact = [
            grid_search(
                lambda images, k=k: network(images, torch.full((len(images),), k)),
                x[k],
                torch.arange(PIXELS),
                0.25,
                1.0,
            )
            for k in range(count)
        ]
        found = feature_guided_searches(
            PerImage(network),
            x,
            norm=2,
            manipulation=0.25,
            radius=1.0,
            visit=1,
            features=[FeatureMap.uniform(x.shape[2], x.shape[3], x)] * count,
            budget=Budget(simulations=self.pick(smoke=20, desk=self.simulations, paper=self.simulations)),
            parallel=self.pick(smoke=10, desk=100, paper=100),
            seed=self.seeds.integer("play"),
        )
        return {
            "grid": [result.severity for result in exact],
            "search": [report.severity["L2"] for report in found],
            "points": [result.points for result in exact],
            "queries": [report.queries for report in found],
        }

    def _guarantees(self) -> dict[str, Any]:
        """F3: verdicts on linear classifiers whose distance is known."""
        draws = self.pick(smoke=3, desk=500, paper=5000)
        generator = self.seeds("linear classifiers")
        rows = []
        for number in range(draws):
            n = 3 + number % 3
            image = 0.4 + 0.2 * torch.rand(1, 1, n, generator=generator, dtype=torch.float64)
            slope = torch.randn(n, generator=generator, dtype=torch.float64)
            share = float(torch.rand((), generator=generator, dtype=torch.float64))
            for norm in (2.0, math.inf):
                rows += [_guarantee_row(image, slope, 2 * RADIUS * share, norm, tau) for tau in TAUS]
        return {column: [row[column] for row in rows] for column in rows[0]}

    def _opponents(self) -> dict[str, Any]:
        """F4: the same images against three second players, read after 20, 100 and 400 simulations."""
        data = _load("small digits", 200 if self.scale == "smoke" else 1400)
        net = _trained(data, self.pick(smoke=1, desk=30, paper=30), self.seeds.integer("small digits"))
        x = _correct(net, data, self.pick(smoke=3, desk=20, paper=200))
        checkpoints = self.pick(smoke=(5, 10, 20), desk=CHECKPOINTS, paper=CHECKPOINTS)
        progress = ("progress_opponent", "progress_simulations", "progress_severity")
        columns: dict[str, list[Any]] = {
            n: [] for n in ("opponent", "mean_reward", "value", "kept", "rises", *progress)
        }
        maps = saliency_maps(x)
        for opponent in OPPONENTS:
            reports = feature_guided_searches(
                net,
                x,
                features=maps,
                opponent=opponent,
                budget=Budget(simulations=checkpoints[-1]),
                parallel=self.pick(smoke=5, desk=10, paper=10),
                seed=self.seeds.integer("opponents"),
            )
            columns["opponent"] += [opponent] * len(x)
            columns["value"] += [report.value for report in reports]
            columns["mean_reward"] += [report.mean_reward for report in reports]
            columns["kept"] += [float((1 / report.plays).mean()) for report in reports]
            columns["rises"] += [int((report.trace[1:] > report.trace[:-1]).sum()) for report in reports]
            for simulations in checkpoints:
                columns["progress_opponent"] += [opponent] * len(x)
                columns["progress_simulations"] += [simulations] * len(x)
                columns["progress_severity"] += [float(r.trace[min(simulations, len(r.trace)) - 1]) for r in reports]
        return columns

    def _few_queries(self, data: Data) -> Claim:
        table = {name: np.asarray(column) for name, column in data["searches"].items()}
        first = table["pictures"][0]
        ours, theirs = (
            (table["guidance"] == guidance) & (table["pictures"] == first) for guidance in ("features", "uniform")
        )
        success = float(table["found"][ours].mean())
        queries = table["first_query"][ours].mean() / table["first_query"][theirs].mean()
        pixels = table["first_pixels"][ours].mean() / table["first_pixels"][theirs].mean()
        l0 = float(np.median(table["l0"][ours]))
        longer = {name: np.asarray(column) for name, column in data["longer"].items()}
        controls = [
            f"longer search on {name}: median L0 {np.median(longer['l0'][longer['pictures'] == name]):.1f} after "
            f"{np.median(longer['queries'][longer['pictures'] == name]):,.0f} queries; white-box greedy pixels: median "
            f"L0 {np.median(longer['white_box_l0'][longer['pictures'] == name]):.1f}"
            for name in dict.fromkeys(longer["pictures"].tolist())
        ]
        stand_in = ""
        if first == "digits":
            stand_in = "scikit-learn's digits, in MNIST's format, stand in for MNIST (mnist.npz in COROLLARY_DATA). "
        return self.claim(
            "F1",
            "Guided by features, adversarial images are found with few queries and few pixels.",
            kind="threshold",
            criterion="success 100 %; mean queries to the first adversarial image <= 0.88 x uniform; pixels before "
            "undoing <= 0.9 x uniform; median L0 after undoing <= 20",
            measured=f"{first}: success {success:.1%}; queries {table['first_query'][ours].mean():.1f} against "
            f"{table['first_query'][theirs].mean():.1f}, ratio {queries:.2f}; pixels "
            f"{table['first_pixels'][ours].mean():.1f} against {table['first_pixels'][theirs].mean():.1f}, ratio "
            f"{pixels:.2f}; median L0 {l0:.1f}; {int(ours.sum())} searches each",
            holds=success == 1 and queries <= 0.88 and pixels <= 0.9 and l0 <= 20,
            controls=tuple(controls),
            note=stand_in + "An attack that sees the gradients needs fewer pixels: features compete among black boxes.",
        )

    def _global_minimum(self, data: Data) -> Claim:
        grid, search = (np.asarray(data["exact"][name]) for name in ("grid", "search"))
        same = np.isclose(search, grid, rtol=0, atol=1e-9)
        below = int((search < grid - 1e-9).sum())
        return self.claim(
            "F2",
            "Cooperative play converges to the globally minimal adversarial image.",
            kind="threshold",
            criterion="severity equal to the exhausted grid's minimum in >= 95 % of 200 random networks after 2000 "
            "simulations (6 pixels, tau = 0.25, d = 1), never below it",
            measured=f"equal in {same.mean():.1%} of {len(grid)} networks ({int(np.isfinite(grid).sum())} of them with "
            f"an adversarial image in the ball), below in {below}",
            holds=same.mean() >= 0.95 and below == 0,
            controls=(
                f"mean points of the grid {np.mean(data['exact']['points']):,.0f}; mean queries of the search "
                f"{np.mean(data['exact']['queries']):,.0f}",
            ),
            note="Euclidean norm. So few pixels are tried out faster: the grid grows exponentially with their number, "
            "and the search does not.",
        )

    def _sound(self, data: Data) -> Claim:
        table = {name: np.asarray(column) for name, column in data["guarantees"].items()}
        exact, radius = table["exact"], table["covering_radius"]
        slack = 1e-9
        wrong = (table["verdict"] == "safe") & (exact <= RADIUS) | (table["verdict"] == "unsafe") & (exact > RADIUS)
        grid = table["grid"]
        reached = exact <= RADIUS
        outside = (grid < exact - slack) | (reached & (grid - 2 * radius > exact + slack))
        bounds = (table["lower"] > exact + slack) | (table["upper"] < exact - slack)
        shares = [
            [
                float((table["verdict"] != "undecided")[(table["norm"] == norm) & (table["tau"] == tau)].mean())
                for tau in TAUS
            ]
            for norm in (2.0, math.inf)
        ]
        rising = all(share[0] < share[1] < share[2] for share in shares)
        return self.claim(
            "F3",
            "With Lipschitz constants, a grid without adversarial images guarantees safety.",
            kind="exact",
            criterion="500 linear classifiers on 3 to 5 pixels, k = 2 and inf, tau = 0.2, 0.1, 0.05: 'safe' never "
            "contradicts the exact distance D*; D_grid - 2 R_tau <= D* <= D_grid in all; share decided rises as tau "
            "halves",
            measured=f"{len(exact):,} verdicts, {int(wrong.sum())} contradicted; D* outside the cell bounds in "
            f"{int(outside.sum())}, outside the proved bounds in {int(bounds.sum())}; decided for k = 2: "
            + ", ".join(f"{share:.1%}" for share in shares[0])
            + "; for k = inf: "
            + ", ".join(f"{share:.1%}" for share in shares[1]),
            holds=not wrong.any() and not outside.any() and not bounds.any() and rising,
        )

    def _ordered(self, data: Data) -> Claim:
        table = {name: np.asarray(column) for name, column in data["opponents"].items()}
        rewards = {n: [table[n][table["opponent"] == o] for o in OPPONENTS] for n in ("mean_reward", "value", "kept")}
        shares = {n: float(((v[0] <= v[1]) & (v[1] <= v[2])).mean()) for n, v in rewards.items()}
        means_of = {
            n: ", ".join(f"{o} {v.mean():.3f}" for o, v in zip(OPPONENTS, of, strict=True)) for n, of in rewards.items()
        }
        progress = {name: np.asarray(column) for name, column in data["progress"].items()}
        partner = progress["opponent"] == "cooperative"
        means = [
            float(progress["severity"][partner & (progress["simulations"] == n)].mean())
            for n in np.unique(progress["simulations"])
        ]
        rises = int(table["rises"].sum())
        return self.claim(
            "F4",
            "The best image gets nearer with search time; an adversarial second player leaves least, a cooperative one "
            "most.",
            kind="trend",
            criterion="20 digits, 20, 100 and 400 simulations: best severity never rises in a run; mean value "
            "adversarial <= nature <= cooperative in >= 90 % of images",
            measured=f"{rises} rises; mean best L0 {means[0]:.2f}, {means[1]:.2f}, {means[2]:.2f} with a cooperative "
            f"player; mean reward ordered in {shares['mean_reward']:.0%} of {len(rewards['value'][0])} images ("
            f"{means_of['mean_reward']})",
            holds=rises == 0 and shares["mean_reward"] >= 0.9,
            controls=(
                f"value, that of the best play where both players help: ordered in {shares['value']:.0%} "
                f"({means_of['value']})",
                f"mean reward before moves are undone: ordered in {shares['kept']:.0%} ({means_of['kept']})",
            ),
            note="Only a cooperative player undoes moves at the end of a play, and gives up a play that is already "
            "worse than the best (a reward of 0); without the undoing its plays are no nearer than nature's.",
        )


def _split(part: Mapping[str, Any], first: str, *others: str) -> dict[str, dict[str, Any]]:
    """Tables of one part: columns that begin with another table's name belong to it, the rest to the first."""
    tables: dict[str, dict[str, Any]] = {name: {} for name in (first, *others)}
    for column, values in part.items():
        owner = next((name for name in others if column.startswith(f"{name}_")), first)
        tables[owner][column.removeprefix(f"{owner}_")] = values
    return tables


class _Pictures(NamedTuple):
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    epochs: int


def _load(name: str, samples: int) -> _Pictures:
    """Images in [0, 1]; "digits" are brought to MNIST's format, 20 pixels high in the middle of 28."""
    data = digits(image=True) if "digits" in name else load(name)
    assert data.test is not None
    assert data.train.y is not None
    assert data.test.y is not None
    train, test = data.train.x[:samples], data.test.x[:5000]
    if name == "digits":
        train, test = (
            nn.functional.pad(nn.functional.interpolate(x, size=20, mode="bilinear", align_corners=False), (4, 4, 4, 4))
            for x in (train, test)
        )
    epochs = {"mnist": 3, "cifar10": 10}.get(name, 30)
    return _Pictures(train, data.train.y[:samples], test, data.test.y[:5000], epochs)


def _trained(data: _Pictures, epochs: int, seed: int) -> nn.Module:
    """Two strided convolutions of 16 and 32 channels and a hidden layer of 64."""
    channels, height, width = data.train_x.shape[1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(channels, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * math.ceil(height / 4) * math.ceil(width / 4), 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )
    training = fit(
        net,
        (data.train_x, data.train_y),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=2e-3),
        epochs=epochs,
        batch_size=min(128, len(data.train_x) // 20),
        seed=seed,
    )
    return training.module


def _correct(net: nn.Module, data: _Pictures, count: int) -> Tensor:
    """The first test images that the network classifies correctly."""
    with torch.no_grad():
        right = net(data.test_x).argmax(1) == data.test_y
    return data.test_x[right][:count]


def _row(name: str, guidance: str, image: int, report: TestReport) -> dict[str, Any]:
    return {
        "pictures": name,
        "guidance": guidance,
        "image": image,
        "found": int(report.found),
        "first_query": report.first_query or math.inf,
        "first_pixels": report.first_severity,
        "l0": report.severity["L0"],
        "queries": report.queries,
    }


def _white_box(net: nn.Module, x: Tensor, most: int = 60) -> list[float]:
    """Pixels that a greedy attack with gradients moves, one at a time, each to its far end; infinite without success.

    Each step takes the pixel whose move raises the largest wrong logit against the right one most, to first order.
    """
    target, adversarial = (x < 0.5).to(x), x.clone()
    with torch.no_grad():
        labels = net(x).argmax(1)
    pixels = torch.full((len(x),), math.inf)
    for step in range(1, most + 1):
        at = adversarial.clone().requires_grad_()
        logits = net(at)
        margin = logits.scatter(1, labels[:, None], -math.inf).amax(1) - logits.gather(1, labels[:, None])[:, 0]
        (slope,) = torch.autograd.grad(margin.sum(), at)
        gain = (slope * (target - adversarial)).sum(1).flatten(1)
        gain = gain.masked_fill((adversarial != x).any(1).flatten(1), -math.inf)
        chosen = torch.zeros_like(gain, dtype=torch.bool).scatter(1, gain.argmax(1, keepdim=True), True)
        adversarial = torch.where(chosen.reshape(len(x), 1, *x.shape[2:]), target, adversarial)
        with torch.no_grad():
            wrong = net(adversarial).argmax(1) != labels
        pixels = torch.where(wrong & pixels.isinf(), step, pixels)
        if pixels.isfinite().all():
            break
    return pixels.tolist()


def _example(x: Tensor, maps: list[FeatureMap], reports: list[TestReport]) -> dict[str, Any]:
    """The image that needed fewest pixels, a row a pixel."""
    number = int(np.argmin([report.severity["L0"] for report in reports]))
    found = reports[number].image
    height, width = x.shape[2:]
    return {
        "example_row": np.repeat(np.arange(height), width),
        "example_column": np.tile(np.arange(width), height),
        "example_original": x[number].mean(0).flatten().numpy(),
        "example_saliency": maps[number].map().flatten().numpy(),
        "example_adversarial": (x[number] if found is None else found).mean(0).flatten().numpy(),
    }


def _random_networks(count: int, generator: torch.Generator) -> tuple[Any, Tensor]:
    """Networks 6-16-2 with Gaussian weights, one for each of `count` images of 2 x 3 random pixels."""
    hidden = 16

    def normal(*shape: int, scale: float) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    first, shift = normal(count, hidden, PIXELS, scale=(2 / PIXELS) ** 0.5), normal(count, hidden, scale=0.5)
    second = normal(count, 2, hidden, scale=hidden**-0.5)
    x = torch.rand(count, 1, 2, 3, generator=generator, dtype=torch.float64)

    def network(images: Tensor, numbers: Tensor) -> Tensor:
        values = torch.relu(torch.einsum("rhi,ri->rh", first[numbers], images.flatten(1) - 0.5) + shift[numbers])
        return torch.einsum("roh,rh->ro", second[numbers], values)

    return network, x


def _guarantee_row(image: Tensor, slope: Tensor, distance: float, norm: float, tau: float) -> dict[str, Any]:
    """The verdict on a linear classifier whose class changes at `distance`, for a ball of radius `RADIUS`."""
    dual = float(torch.linalg.vector_norm(slope, ord=2 if norm == 2 else 1))

    def scores(images: Tensor) -> Tensor:
        first = (images - image).flatten(1) @ slope + distance * dual
        return torch.stack([first, torch.zeros_like(first)], 1)

    pixels = torch.arange(image.shape[2])
    constants = torch.tensor([dual, 0.0], dtype=torch.float64)
    shown = grid_guarantee(scores, constants, image, pixels, tau, RADIUS, norm)
    # A cell of the grid has diameter 2 R: one of its corners is adversarial if it holds an adversarial image at all.
    nearest = grid_search(scores, image, pixels, tau, RADIUS + 2 * shown.covering_radius, norm)
    return {
        "norm": norm,
        "tau": tau,
        "pixels": len(pixels),
        "exact": distance,
        "verdict": shown.verdict,
        "lower": shown.lower,
        "upper": shown.upper,
        "grid": nearest.severity,
        "covering_radius": shown.covering_radius,
    }
