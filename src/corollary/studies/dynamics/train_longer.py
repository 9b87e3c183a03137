"""The study `train-longer`: the generalisation gap of large batches closes step by step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from corollary.data import digits, load
from corollary.dynamics.ghost_batch_norm import HOFFER_2017, GhostBatchNorm1d, GhostBatchNorm2d
from corollary.dynamics.large_batch import SETTINGS, generalisation_gap
from corollary.dynamics.weight_diffusion import fit_diffusion, weight_distance
from corollary.engine import population, schedule, sgd
from corollary.evidence import PALETTE, Claim, Data, Figure, Parts, Source, Study, joined, listed
from corollary.evidence.study import in_memory

LABELS = {
    "small": "small batches",
    "large": "large batches",
    "scaled rate": "+ rate by √R",
    "ghost batches": "+ ghost batches",
    "adapted regime": "+ as many updates",
}
CHEAP = SETTINGS[1:4]
"""The settings that make few updates."""
RATE = 0.05
"""Constant learning rate of the runs whose distance is measured."""
CLIP = 5.0
COMPARED_AT = 100
"""Updates after which distances of different batch sizes are compared."""


@dataclass(frozen=True)
class TrainLonger(Study):
    """Large batches generalise as well as small ones, given the learning rate, ghost statistics and updates."""

    small: int = 16
    """Small batch, and size of the ghost batches."""
    large: int = 256
    """Large batch."""

    slug: ClassVar[str] = "train-longer"
    room: ClassVar[str] = "dynamics"
    title: ClassVar[str] = "Train longer, generalise better"
    sources: ClassVar[tuple[Source, ...]] = (HOFFER_2017,)

    def run(self, parts: Parts = in_memory) -> Data:
        """Train in five ways; follow distances from the start; compare the layer with PyTorch's own."""
        seeds, more = self.pick(smoke=(2, 2), desk=(8, 40), paper=(5, 0))
        gaps = [parts(f"gap {name}", lambda name=name: self._gap(name, range(seeds))) for name in SETTINGS]
        further = [
            parts(f"further {name}", lambda name=name: self._gap(name, range(seeds, seeds + more)))
            for name in (CHEAP if more else ())
        ]
        kinds = [("constant", self.small), *((kind, b) for kind in ("scaled", "fixed") for b in self._batches())]
        paths = [
            parts(f"distance {kind} {batch}", lambda kind=kind, batch=batch: self._path(kind, batch))
            for kind, batch in kinds
        ]
        return {
            "gap": joined(gaps),
            "further": joined(further) if further else {"setting": [], "seed": [], "accuracy": [], "updates": []},
            "distance": joined(paths),
            "exactness": joined([parts("exactness", _exactness)]),
        }

    def claims(self, data: Data) -> tuple[Claim, ...]:
        """C1 to C4 of the specification, from the stored tables alone."""
        return self._closed(data), self._logarithm(data), self._together(data), self._exact(data)

    def figures(self, data: Data) -> tuple[Figure, ...]:
        """Accuracy of the five ways to train, and distances over updates."""
        return (
            Figure(
                "generalisation-gap",
                "The gap closes step by step",
                f"Test accuracy with batches of {self.small} and of {self.large}; each step keeps those before it. "
                "A dot is one network; the same seed has the same split and initial weights. The bar is the mean.",
                data["gap"],
                _draw_gap,
            ),
            Figure(
                "weight-distance",
                "Weights wander as the logarithm of time",
                f"Distance of the weights from their start, the mean of the seeds. Left: batches of {self.small} at a "
                "constant learning rate, with the fitted logarithm. Right: other batch sizes, at one learning rate "
                "(dashed) and at one that grows as the root of the batch (solid), where the curves come together.",
                data["distance"],
                _draw_distance,
                size=(8.6, 3.6),
                panels=(1, 2),
            ),
        )

    # -------------------------------------------------------------------------------------------------- measurements

    def _batches(self) -> tuple[int, ...]:
        return (self.small, 4 * self.small, 16 * self.small)

    def _samples(self) -> tuple[Tensor, Tensor, int]:
        """All samples, standardised by their mean and deviation, their classes, and how many a seed trains on."""
        data = self.pick(smoke=digits, desk=digits, paper=lambda: load("mnist"))()
        both = [part for part in (data.train, data.test) if part is not None and part.y is not None]
        x = torch.cat([part.x for part in both]).flatten(1)
        y = torch.cat([part.y for part in both if part.y is not None])
        return (x - x.mean()) / x.std(), y, self.pick(smoke=300, desk=1000, paper=60_000)

    def _network(self, inputs: int) -> nn.Module:
        """A perceptron with batch normalisation before each ReLU."""
        width, depth = self.pick(smoke=(16, 1), desk=(128, 3), paper=(512, 5))
        sizes = [inputs, *[width] * depth]
        hidden = [
            layer
            for before, after in pairwise(sizes)
            for layer in (nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU())
        ]
        return nn.Sequential(*hidden, nn.Linear(width, 10))

    def _gap(self, setting: str, runs: Sequence[int]) -> dict[str, Any]:
        x, y, train_samples = self._samples()
        seeds = [self.seeds.integer(f"gap {i}") for i in runs]
        table = generalisation_gap(
            lambda: self._network(x.shape[1]),
            (x, y),
            self.small,
            self.large,
            self.pick(smoke=1, desk=8, paper=50),
            seeds,
            train_samples=train_samples,
            settings=[setting],
        )
        return {**table, "seed": np.asarray(runs)}

    def _path(self, kind: str, batch: int) -> dict[str, Any]:
        """Distances of all seeds for one batch size; the rate grows as the root of the batch where `scaled`."""
        x, y, train_samples = self._samples()
        seeds = [self.seeds.integer(f"distance {i}") for i in range(3)]
        constant = kind == "constant"
        epochs = self.pick(smoke=1, desk=20, paper=20)
        steps = epochs * math.ceil(train_samples / batch) if constant else self.pick(smoke=110, desk=320, paper=320)
        due = schedule("log", per_decade=20)
        trained = population(
            lambda: self._network(x.shape[1]),
            (x[:train_samples], y[:train_samples]),
            seeds=seeds,
            optimizer=sgd(0.9),
            learning_rate=RATE * (math.sqrt(batch / self.small) if kind == "scaled" else 1.0),
            gradient_clip=CLIP,
            batch_size=batch,
            steps=steps,
            record_every=lambda step: due(step) or step == COMPARED_AT,
        )
        found = [weight_distance(trained.record, member) for member in range(len(seeds))]
        count = len(found[0].updates)
        return {
            "kind": np.full(count * len(seeds), kind),
            "batch": np.full(count * len(seeds), batch),
            "seed": np.repeat(np.arange(len(seeds)), count),
            "updates": np.concatenate([path.updates for path in found]),
            "distance": np.concatenate([path.distance for path in found]),
        }

    # -------------------------------------------------------------------------------------------------------- claims

    def _closed(self, data: Data) -> Claim:
        by_name, further = (
            {name: np.asarray(data[table]["accuracy"])[np.asarray(data[table]["setting"]) == name] for name in names}
            for table, names in (("gap", SETTINGS), ("further", CHEAP))
        )
        small, large, scaled, ghost, adapted = (float(by_name[name].mean()) for name in SETTINGS)
        errors = [by_name[name].std(ddof=1) / math.sqrt(len(by_name[name])) for name in SETTINGS]
        return self.claim(
            "C1",
            "Large batches generalise worse at equal epochs; the rate by √R, ghost batches and as many updates close "
            "the gap step by step.",
            kind="threshold",
            criterion="mean test accuracy: small - large >= 0.005; (+rate) >= large + 0.001; (+ghosts) >= (+rate) + "
            "0.001; (+updates) >= small - 0.002",
            measured=", ".join(
                f"{LABELS[name]} {value:.4f} ± {error:.4f}"
                for name, value, error in zip(SETTINGS, (small, large, scaled, ghost, adapted), errors, strict=True)
            ),
            holds=small - large >= 0.005
            and scaled >= large + 0.001
            and ghost >= scaled + 0.001
            and adapted >= small - 0.002,
            controls=(
                f"{len(further['large'])} further seeds of the cheap settings, differences paired by seed: + rate "
                f"{_difference(further['scaled rate'], further['large'])}, + ghosts "
                f"{_difference(further['ghost batches'], further['scaled rate'])}",
            ),
        )

    def _logarithm(self, data: Data) -> Claim:
        fits = [fit_diffusion(*path) for path in _paths(data, "constant", self.small)]
        logs, roots = np.array([fit.r2_log for fit in fits]), np.array([fit.r2_root for fit in fits])
        return self.claim(
            "C2",
            "At a constant learning rate the distance from the start grows as log t, better than as √t.",
            kind="threshold",
            criterion="from update 5: R² of the logarithm >= 0.97 in each of 3 seeds, and above that of the root by "
            ">= 0.05 in the mean",
            measured=f"R² log {listed(logs)}, root {listed(roots)}",
            holds=bool((logs >= 0.97).all()) and bool((logs - roots).mean() >= 0.05),
            controls=(
                f"a power law explains {listed(np.array([fit.r2_power for fit in fits]))} with exponents "
                f"{listed(np.array([fit.exponent for fit in fits]))}",
            ),
        )

    def _together(self, data: Data) -> Claim:
        def means(kind: str) -> np.ndarray:
            return np.array(
                [
                    np.mean([path[1][path[0] == COMPARED_AT] for path in _paths(data, kind, batch)])
                    for batch in self._batches()
                ]
            )

        scaled, fixed = means("scaled"), means("fixed")
        return self.claim(
            "C3",
            "With a learning rate that grows as the root of the batch, distances of all batch sizes come together.",
            kind="threshold",
            criterion=f"batches {', '.join(map(str, self._batches()))}, mean distance at update {COMPARED_AT}: largest "
            "over smallest <= 1.5 with scaling, >= 1.7 without",
            measured=f"{scaled.max() / scaled.min():.2f} with ({listed(scaled, '.1f')}), "
            f"{fixed.max() / fixed.min():.2f} without ({listed(fixed, '.1f')})",
            holds=bool(scaled.max() / scaled.min() <= 1.5) and bool(fixed.max() / fixed.min() >= 1.7),
        )

    def _exact(self, data: Data) -> Claim:
        table = data["exactness"]
        worst = {str(name): float(value) for name, value in zip(table["case"], table["difference"], strict=True)}
        return self.claim(
            "C4",
            "Ghost batch normalisation is batch normalisation of the virtual batches, one after the other.",
            kind="exact",
            criterion="random tensors in one and two dimensions, float64: outputs, gradients and running statistics "
            "equal PyTorch's to 1e-12, for one virtual batch and for several, in training and in evaluation",
            measured=", ".join(f"{name} {value:.1e}" for name, value in worst.items()),
            holds=max(worst.values()) <= 1e-12,
        )


def _exactness() -> dict[str, Any]:
    """Largest differences from calls of PyTorch's layer in sequence, by case."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, ghost, plain, shape in (
        ("1d", GhostBatchNorm1d, nn.BatchNorm1d, (24, 6)),
        ("2d", GhostBatchNorm2d, nn.BatchNorm2d, (24, 6, 3, 5)),
    ):
        for virtual_batch in (24, 8, 7):
            x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
            ours, theirs = ghost(6, virtual_batch).double(), plain(6).double()
            outputs = ours(x), torch.cat([theirs(part) for part in x.split(virtual_batch)])
            weight = torch.randn(shape, generator=generator, dtype=torch.float64)
            pairs = [outputs, (ours.running_mean, theirs.running_mean), (ours.running_var, theirs.running_var)]
            gradients = [
                torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()])
                for y, layer in zip(outputs, (ours, theirs), strict=True)
            ]
            pairs += list(zip(*gradients, strict=True))
            found[f"{name}, virtual batch {virtual_batch}"] = max(float((a - b).detach().abs().max()) for a, b in pairs)
            with torch.no_grad():
                found[f"{name}, evaluation after {virtual_batch}"] = float(
                    (ours.eval()(x) - theirs.eval()(x)).abs().max()
                )
    return {"case": np.array(list(found)), "difference": np.array(list(found.values()))}


def _paths(data: Mapping[str, Any], kind: str, batch: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Updates and distances, for each seed."""
    table = {name: np.asarray(column) for name, column in data["distance"].items()}
    chosen = (table["kind"] == kind) & (table["batch"] == batch)
    return [
        (table["updates"][chosen & (table["seed"] == seed)], table["distance"][chosen & (table["seed"] == seed)])
        for seed in np.unique(table["seed"][chosen])
    ]


def _difference(first: np.ndarray, second: np.ndarray) -> str:
    if len(first) < 2:
        return "not run"
    apart = first - second
    return f"{apart.mean():+.4f} ± {apart.std(ddof=1) / math.sqrt(len(apart)):.4f}"


def _draw_gap(axes: Any, data: Mapping[str, Any]) -> None:
    settings, accuracy, seeds = (np.asarray(data[name]) for name in ("setting", "accuracy", "seed"))
    for place, name in enumerate(SETTINGS):
        values = accuracy[settings == name]
        spread = (seeds[settings == name] - seeds.mean()) / (4 * max(1, len(values)))
        axes.plot(
            place + spread, values, "o", color=PALETTE[0], markersize=4, label="one network" if place == 0 else None
        )
        axes.plot(
            [place - 0.25, place + 0.25],
            [values.mean()] * 2,
            color=PALETTE[1],
            linewidth=3,
            label="mean" if place == 0 else None,
        )
    axes.set_xticks(range(len(SETTINGS)), ["\n".join(LABELS[name].rsplit(" ", 1)) for name in SETTINGS])
    axes.set(ylabel="test accuracy")
    axes.legend()


def _draw_distance(axes: Any, data: Mapping[str, Any]) -> None:
    left, right = axes
    kinds, batches = np.asarray(data["kind"]), np.asarray(data["batch"])
    paths = _paths({"distance": data}, "constant", int(batches[kinds == "constant"][0]))
    updates, distance = paths[0][0], np.mean([path[1] for path in paths], axis=0)
    left.plot(updates, distance, "o", color=PALETTE[0], markersize=3.5, label="measured")
    if (updates >= 5).sum() >= 4:
        fit = fit_diffusion(updates, distance)
        left.plot(updates, fit.at(updates), color=PALETTE[1], label=f"logarithm, R² {fit.r2_log:.3f}")
    left.legend()
    for i, batch in enumerate(np.unique(batches[kinds == "scaled"])):
        for kind, style in (("scaled", "-"), ("fixed", "--")):
            paths = _paths({"distance": data}, kind, int(batch))
            right.plot(
                paths[0][0],
                np.mean([path[1] for path in paths], axis=0),
                style,
                color=PALETTE[i],
                label=f"batches of {batch}" if kind == "scaled" else None,
            )
    right.legend()
    for panel in axes:
        panel.set(xscale="log", xlabel="updates", ylabel="distance from the start")
