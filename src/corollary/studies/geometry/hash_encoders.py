"""The study `hash-encoders`: activation codes of ReLU networks are nearly collision-free, and tell the classes."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.stats import rankdata
from torch import nn

from corollary.data import Dataset, Split, digits, load
from corollary.engine import seeded
from corollary.evidence import PALETTE, Claim, Data, Figure, Parts, Source, Study, Table, joined
from corollary.evidence.study import in_memory
from corollary.geometry.affine import local_affine
from corollary.geometry.hash_report import HE_2021, phase_chart, reference_mlp
from corollary.geometry.polytope import region_polytope

ALL_METHODS = ("kmeans", "knn", "logistic")
MNIST_WIDTHS = (3, 7, *range(10, 80, 5), 80, 90, 100)
MNIST_EPOCHS = (0, 1, 3, 6, 10, 20, 30, *range(40, 201, 20))
MNIST_SAMPLES = (10, 30, 60, 100, 300, 600, 1000, 3000, 6000, 10_000, 40_000)
MNIST_TRAIN = 48_000
"""Four fifths of the training set: the paper sets the rest aside for validation."""
PAIR_LAYERS = (6, 24, 24, 3)
"""Inputs, two hidden layers and outputs of the random network of H6."""


@dataclass(frozen=True)
class HashEncoders(Study):
    """Redundancy and categorization of activation codes over model size, training time and sample size."""

    widest: int = 100
    """Hidden units of the network that is called wide enough."""

    slug: ClassVar[str] = "hash-encoders"
    room: ClassVar[str] = "geometry"
    title: ClassVar[str] = "Neural networks behave as hash encoders"
    sources: ClassVar[tuple[Source, ...]] = (HE_2021,)

    def run(self, parts: Parts = in_memory) -> Data:
        """Train along each of the three axes and score the codes; compare affine maps inside random regions."""
        data = self._data()
        full, last = len(data.train.x), self._epochs[-1]
        sizes = [
            parts(f"size {width}", partial(self._chart, data, [width], [0, last], [full], self._methods(width)))
            for width in self._widths
        ]
        times = [
            parts(f"time {width}", partial(self._chart, data, [width], self._epochs, [full]))
            for width in self._moderate
        ]
        samples = [
            parts(f"samples {n}", partial(self._chart, data, [self._moderate[0]], [last], [n]))
            for n in (*self._samples, full)
        ]
        return {
            "size": joined(sizes),
            "time": joined(times),
            "samples": joined(samples),
            "regions": parts("regions", self._pairs),
            "setting": {"training_samples": [full], "test_samples": [len(data.test.x) if data.test else 0]},
        }

    def claims(self, data: Data) -> tuple[Claim, ...]:
        """H1 to H6 of the specification, from the stored tables alone."""
        return (
            self._determinism(data),
            self._categorization(data),
            self._model_size(data),
            self._training_time(data),
            self._sample_size(data),
            self._affine(data),
        )

    def figures(self, data: Data) -> tuple[Figure, ...]:
        """One for each axis: redundancy on the left, accuracies on the right."""
        bound = f"The dotted line is the least redundancy that so many bits allow, {_training_samples(data):,} samples."
        dots = f"Dots are single networks, lines means over {len(self._seeds)} seeds."
        size = dict(data["size"])
        size["bound"] = np.maximum(0, 1 - 2.0 ** np.asarray(size["size"]) / _training_samples(data))
        width = self._moderate[0]
        return (
            _figure("size", "Model size", size, "size", f"{dots} {bound} Dashed: the same networks before training."),
            _figure(
                "time",
                "Training time",
                data["time"],
                "epoch",
                f"{dots} Width {' and '.join(map(str, self._moderate))}.",
            ),
            _figure(
                "samples",
                "Sample size",
                data["samples"],
                "samples",
                f"{dots} Width {width}; every sample is repeated to the length of the whole set, so that all networks "
                "make as many steps. Redundancy in training is over the distinct samples: its denominator grows to the "
                "right, and with it the chance of equal codes.",
            ),
        )

    # ------------------------------------------------------------------------------------------------------- settings

    @property
    def _widths(self) -> tuple[int, ...]:
        widths = self.pick(smoke=(3, 10), desk=(3, 7, 10, 20, 40, 60), paper=MNIST_WIDTHS)
        return (*(width for width in widths if width < self.widest), self.widest)

    @property
    def _moderate(self) -> tuple[int, ...]:
        return self.pick(smoke=(10,), desk=(40,), paper=(40, 50, 60))

    @property
    def _epochs(self) -> tuple[int, ...]:
        return self.pick(smoke=(0, 2), desk=(0, 1, 3, 10, 60), paper=MNIST_EPOCHS)

    @property
    def _samples(self) -> tuple[int, ...]:
        return self.pick(smoke=(30,), desk=(30, 100, 300), paper=MNIST_SAMPLES)

    @property
    def _seeds(self) -> tuple[int, ...]:
        count = self.pick(smoke=1, desk=3, paper=10)
        return tuple(self.seeds.integer(f"network {i}") for i in range(count))

    def _methods(self, width: int) -> tuple[str, ...]:
        """All three where H2 asks for them: the others cost more than the training."""
        return ALL_METHODS if width == self.widest or self.scale == "paper" else ("knn",)

    def _data(self) -> Dataset:
        """Digits, or MNIST at the paper's scale, as vectors of pixels in [0, 1]."""
        if self.scale != "paper":
            data = digits()
            return data.subset(300, self.seeds("smoke subset")) if self.scale == "smoke" else data
        data = load("mnist")
        assert data.train.y is not None  # MNIST has labels
        assert data.test is not None  # and a test part
        train = Split(data.train.x[:MNIST_TRAIN].flatten(1), data.train.y[:MNIST_TRAIN])
        data = dataclasses.replace(data, train=train, test=Split(data.test.x.flatten(1), data.test.y))
        return data.to(device="cuda") if torch.cuda.is_available() else data

    def _chart(
        self, data: Dataset, sizes: Sequence[int], epochs: Sequence[int], samples: Sequence[int],
        methods: tuple[str, ...] = ("knn",),
    ) -> dict[str, np.ndarray]:  # fmt: skip
        make = reference_mlp(data.train.x.shape[1], len(data.classes or ()))
        chart = phase_chart(make, data, sizes, epochs, samples, self._seeds, methods=methods)
        table = chart.table()
        unscored = {name: np.full(len(table["size"]), np.nan) for name in ALL_METHODS if name not in methods}
        return {**table, **unscored}

    def _pairs(self) -> dict[str, Any]:
        """Affine maps at pairs of points inside one region, and at pairs of unrelated points."""
        count = self.pick(smoke=20, desk=200, paper=200)
        net = seeded(_random_network, self.seeds.integer("network of H6")).double()
        x = torch.randn(count, PAIR_LAYERS[0], generator=self.seeds("points of H6"), dtype=torch.float64)
        polytopes = region_polytope(net, x)
        z = polytopes.sample(1, self.seeds("pairs of H6"))[:, 0]
        here, there = local_affine(net, x), local_affine(net, z)

        def gap(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
            return (a - b).flatten(1).abs().amax(dim=1).numpy()

        with torch.no_grad():
            outputs = net(x)
        return {
            "distance": (z - x).norm(dim=1).numpy(),
            "inside": polytopes.contains(z).numpy(),
            "matrix_difference": gap(here.A, there.A),
            "offset_difference": gap(here.b, there.b),
            "unrelated_difference": gap(here.A, here.A.roll(1, dims=0)),
            "value_error": gap(here.apply(x), outputs),
        }

    # --------------------------------------------------------------------------------------------------------- claims

    def _determinism(self, data: Data) -> Claim:
        trained, before = self._wide(data, self._epochs[-1]), self._wide(data, 0)
        train, test = trained["redundancy_train"], trained["redundancy_test"]
        return self.claim(
            "H1",
            "In a wide enough trained network nearly every training and test example has a code of its own.",
            kind="threshold",
            criterion=f"width {self.widest}, every seed: redundancy ratio at most 0.002 in training and 0.005 in test",
            measured=f"largest over {len(train)} seeds: {train.max():.4f} in training, {test.max():.4f} in test",
            holds=bool(train.max() <= 0.002 and test.max() <= 0.005),
            controls=(
                f"before training: {before['redundancy_train'].max():.4f}, {before['redundancy_test'].max():.4f}",
            ),
        )

    def _categorization(self, data: Data) -> Claim:
        trained, before = self._wide(data, self._epochs[-1]), self._wide(data, 0)
        mean = {name: float(trained[name].mean()) for name in (*ALL_METHODS, "accuracy")}
        near = min(mean["knn"], mean["logistic"]) >= mean["accuracy"] - 0.05
        return self.claim(
            "H2",
            "The codes alone classify nearly as well as the network.",
            kind="threshold",
            criterion="means over seeds: K-NN at least 0.94, logistic regression at least 0.95, both within 0.05 of "
            "the network's test accuracy; K-means (training) at least 0.75",
            measured=f"K-NN {mean['knn']:.3f}, logistic regression {mean['logistic']:.3f}, network "
            f"{mean['accuracy']:.3f}; K-means {mean['kmeans']:.3f}",
            holds=near and mean["knn"] >= 0.94 and mean["logistic"] >= 0.95 and mean["kmeans"] >= 0.75,
            controls=(
                f"codes before training: K-NN {before['knn'].mean():.3f}, logistic regression "
                f"{before['logistic'].mean():.3f}, K-means {before['kmeans'].mean():.3f}",
            ),
        )

    def _model_size(self, data: Data) -> Claim:
        n = _training_samples(data)
        table = _rows(data["size"], epoch=self._epochs[-1])
        widths = np.unique(table["size"])
        knn = np.array([table["knn"][table["size"] == width].mean() for width in widths])
        rank = float(np.corrcoef(rankdata(widths), rankdata(knn))[0, 1])  # Spearman's correlation
        gain = float(knn[-1] - knn[0])
        redundancy = {int(width): table["redundancy_train"][table["size"] == width] for width in widths}
        bound = 1 - 2.0 ** widths.clip(max=1000) / n
        bounded = all(
            bool((redundancy[int(width)] >= least - 1e-12).all()) for width, least in zip(widths, bound, strict=True)
        )
        if (
            self.scale == "paper"
        ):  # ten bits cannot separate MNIST: the interval set for the digits has no meaning there
            middle, wanted = redundancy[self.widest].max() <= 0.02, f"at width {self.widest} at most 0.02"
        else:
            ten, forty = redundancy[10], redundancy.get(40, np.array([np.nan]))
            middle = bool(((ten >= 0.5) & (ten <= 0.9)).all() and (forty <= 0.02).all())
            wanted = "at width 10 from 0.5 to 0.9, at width 40 at most 0.02"
        return self.claim(
            "H3",
            "Model size dominates: redundancy falls and categorization rises with width.",
            kind="trend",
            criterion=f"for every seed, redundancy in training: never below 1 - 2^width / {n} (exact), {wanted}; means "
            "over seeds: Spearman correlation of width and K-NN at least 0.9, K-NN at the widest at least 0.35 above "
            "the narrowest",
            measured="redundancy "
            + ", ".join(f"{values.mean():.4f} (width {width})" for width, values in redundancy.items())
            + f"; bound {'kept' if bounded else 'broken'}; correlation {rank:.3f}; K-NN gain {gain:.3f}",
            holds=bounded and bool(middle) and rank >= 0.9 and gain >= 0.35,
        )

    def _training_time(self, data: Data) -> Claim:
        last = self._epochs[-1]
        table = _rows(data["time"], size=self._moderate[0])
        first_rows, last_rows = _rows(table, epoch=0), _rows(table, epoch=last)
        gain = float(last_rows["knn"].mean() - first_rows["knn"].mean())
        before, after = float(first_rows["redundancy_train"].mean()), float(last_rows["redundancy_train"].mean())
        return self.claim(
            "H4",
            "Training improves categorization and, at moderate width, hashing.",
            kind="trend",
            criterion=f"width {self._moderate[0]}, means over seeds: K-NN after {last} epochs at least 0.10 above that "
            "before training; redundancy in training before at least 5 times that after",
            measured=f"K-NN {first_rows['knn'].mean():.3f} before, {last_rows['knn'].mean():.3f} after; redundancy "
            f"{before:.4f} before, {after:.4f} after",
            holds=gain >= 0.10 and before >= 5 * after,
        )

    def _sample_size(self, data: Data) -> Claim:
        table = {name: np.asarray(column) for name, column in data["samples"].items()}
        counts = np.unique(table["samples"])
        knn = np.array([table["knn"][table["samples"] == n].mean() for n in counts])
        return self.claim(
            "H5",
            "More training samples improve categorization, at the same number of steps.",
            kind="trend",
            criterion="mean K-NN over seeds strictly increasing in the number of samples, and at least 0.35 higher "
            "for the most than for the fewest",
            measured=", ".join(f"{value:.3f} ({n:,} samples)" for n, value in zip(counts, knn, strict=True)),
            holds=bool((np.diff(knn) > 0).all() and knn[-1] - knn[0] >= 0.35),
        )

    def _affine(self, data: Data) -> Claim:
        table = {name: np.asarray(column) for name, column in data["regions"].items()}
        worst = max(float(table["matrix_difference"].max()), float(table["offset_difference"].max()))
        value = float(table["value_error"].max())
        return self.claim(
            "H6",
            "Inputs of equal code share one affine map.",
            kind="exact",
            criterion="pairs of points inside one region of a random network of two hidden layers: largest difference "
            "of (A, b) at most 1e-10, and f(x) = A x + b to 1e-10",
            measured=f"{len(table['distance'])} pairs, {np.median(table['distance']):.2f} apart in the median: "
            f"difference {worst:.1e}, value error {value:.1e}",
            holds=bool(table["inside"].all()) and worst <= 1e-10 and value <= 1e-10,
            controls=(f"unrelated points: A differs by {np.median(table['unrelated_difference']):.2f} in the median",),
        )

    def _wide(self, data: Data, epoch: int) -> dict[str, np.ndarray]:
        return _rows(data["size"], size=self.widest, epoch=epoch)


def _random_network() -> nn.Module:
    """The network of H6, with PyTorch's initial weights."""
    a, b, c, d = PAIR_LAYERS
    return nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c), nn.ReLU(), nn.Linear(c, d))


def _rows(table: Table, **wanted: int) -> dict[str, np.ndarray]:
    """The rows in which the named columns have these values."""
    columns = {name: np.asarray(column) for name, column in table.items()}
    chosen = np.all([columns[name] == value for name, value in wanted.items()], axis=0)
    return {name: column[chosen] for name, column in columns.items()}


def _training_samples(data: Data) -> int:
    return int(np.asarray(data["setting"]["training_samples"])[0])


def _figure(name: str, title: str, table: Table, along: str, caption: str) -> Figure:
    return Figure(
        f"codes-{name}",
        f"{title}: redundancy and categorization",
        f"Left: share of samples that are not needed to have every code. Right: test accuracy. {caption}",
        {"x": np.asarray(table[along]), **{name: np.asarray(column) for name, column in table.items()}},
        partial(_draw, label={"size": "hidden units", "epoch": "epochs", "samples": "training samples"}[along]),
        size=(8.4, 3.6),
        panels=(1, 2),
    )


def _draw(axes: Any, data: Mapping[str, Any], *, label: str) -> None:
    left, right = axes
    x, epoch = np.asarray(data["x"]), np.asarray(data["epoch"])
    trained = np.ones(len(x), dtype=bool) if label == "epochs" else epoch == epoch.max()
    if "bound" in data:
        order = np.argsort(x)
        left.plot(
            x[order],
            np.asarray(data["bound"])[order],
            color=PALETTE[6],
            linestyle=":",
            label="least possible (training)",
        )
    for panel, series in (
        (left, {"redundancy_train": "training samples", "redundancy_test": "test samples"}),
        (right, {"accuracy": "network", "knn": "K-NN on codes"}),
    ):
        for colour, (name, text) in zip(PALETTE, series.items(), strict=False):
            values = np.asarray(data[name])
            panel.plot(x[trained], values[trained], "o", color=colour, markersize=3, alpha=0.5)
            panel.plot(*_means(x[trained], values[trained]), color=colour, label=text)
            if not trained.all() and name != "accuracy":
                panel.plot(*_means(x[~trained], values[~trained]), color=colour, linestyle="--", linewidth=1)
        panel.set_xscale("symlog" if label == "epochs" else "log")
        panel.set_xlabel(label)
        panel.set_ylim(-0.02, 1.02)
        panel.legend()
    highest = max(0.05, *(float(np.max(data[name])) for name in ("redundancy_train", "redundancy_test")))
    left.set_ylim(-0.02 * highest, 1.05 * highest)
    left.set_ylabel("redundancy ratio")
    right.set_ylabel("accuracy")


def _means(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean of y at each x."""
    ticks = np.unique(x)
    return ticks, np.array([y[x == tick].mean() for tick in ticks])
