"""The study `grokking-xor`: one step fits noisy labels at the accuracy of chance, some forty steps generalise."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from corollary.dynamics.grokking import XU_2024, grokking_delay
from corollary.dynamics.xor_clusters import TwoLayerReLU, first_step, grok_xor, logistic, xor_clusters
from corollary.evidence import PALETTE, Claim, Data, Figure, Parts, Source, Study, listed
from corollary.evidence.study import in_memory

LARGE_SCALE = 0.02
"""Initial scale of the group "large": the first step hardly moves such weights."""
CURVES = ("train_accuracy", "clean_accuracy", "test_accuracy", "odd_fraction", "surrogate_agreement")


@dataclass(frozen=True)
class GrokkingXor(Study):
    """Benign overfitting and grokking of a two-layer ReLU network on XOR clusters with flipped labels."""

    samples: int = 200
    """Training samples."""
    square_norm: float = 500.0
    """Squared length of the cluster means."""
    noise: float = 0.1
    """Probability of a flipped training label."""
    learning_rate: float = 0.01
    """Of full-batch gradient descent."""
    initial_scale: float = 1e-6
    """Standard deviation of the first-layer weights at the start."""

    slug: ClassVar[str] = "grokking-xor"
    room: ClassVar[str] = "dynamics"
    title: ClassVar[str] = "Fitted in one step, generalised later: grokking on XOR clusters"
    sources: ClassVar[tuple[Source, ...]] = (XU_2024,)

    def run(self, parts: Parts = in_memory) -> Data:
        """Train from small and from large weights, and check the first step and the Gram space against references."""
        groups = self.pick(
            smoke={"small": (0, 2), "large": (0, 1), "balanced": (0, 1), "further": (2, 3)},
            desk={"small": (0, 5), "large": (0, 3), "balanced": (0, 5), "further": (5, 25)},
            paper={"small": (0, 5), "large": (0, 3), "balanced": (0, 5), "further": (5, 50)},
        )
        runs = [
            parts(f"{group} {i}", lambda group=group, i=i: self._grokked(group, i))
            for group, seeds in groups.items()
            for i in range(*seeds)
        ]
        return {
            "runs": {name: np.concatenate([run[name] for run in runs]) for name in runs[0]},
            "first_step": _row(parts("first step", self._first_step)),
            "gram": _row(parts("gram", self._gram)),
        }

    def claims(self, data: Data) -> tuple[Claim, ...]:
        """C1 to C5 of the specification, from the stored tables alone."""
        return (
            self._grokking(data),
            self._first_step_claim(data),
            self._linear_at_first(data),
            self._small_start(data),
            self._gram_claim(data),
        )

    def figures(self, data: Data) -> tuple[Figure, ...]:
        """Accuracies from small and large weights, and what becomes of the linear part and of the neurons."""
        runs = {name: np.asarray(column) for name, column in data["runs"].items()}
        seen = runs["step"] >= 1
        columns = {name: column[seen] for name, column in runs.items()}
        return (
            Figure(
                "grokking-accuracy",
                "Fitted in one step, generalised later",
                "Accuracy on the training labels, flipped ones included, and on clean test points, a line for each "
                f"seed. Left: initial weights of scale {self.initial_scale:g}. Right: of scale {LARGE_SCALE:g}, where "
                "the network fits too, and never generalises.",
                {name: columns[name] for name in ("step", "seed", "group", "train_accuracy", "test_accuracy")},
                _draw_accuracy,
                size=(8.6, 3.6),
                panels=(1, 2),
            ),
            Figure(
                "grokking-mechanism",
                "From a linear classifier to features",
                "From small weights, a line for each seed. Left: the odd, that is linear, fraction of the function, "
                "and how often its sign is that of the linear classifier. Right: mean |cos| of the angle between "
                "neurons and cluster means; each neuron turns to the mean of the class it votes for.",
                {name: column[columns["group"] == "small"] for name, column in columns.items()},
                _draw_mechanism,
                size=(8.6, 3.6),
                panels=(1, 2),
            ),
        )

    # -------------------------------------------------------------------------------------------------- measurements

    def _grokked(self, group: str, index: int) -> dict[str, Any]:
        dimension = self.pick(smoke=4000, desk=20_000, paper=40_000)
        width = self.pick(smoke=32, desk=128, paper=1024)
        data = xor_clusters(
            self.pick(smoke=60, desk=self.samples, paper=self.samples),
            dimension,
            square_norm=self.square_norm,
            noise=self.noise,
            balanced=group == "balanced",
            seed=self.seeds.integer(f"data {index}"),
        )
        scale = LARGE_SCALE if group == "large" else self.initial_scale
        net = TwoLayerReLU(dimension, width, initial_scale=scale, seed=self.seeds.integer(f"weights {index}"))
        record = grok_xor(
            data,
            net,
            learning_rate=self.learning_rate,
            steps=self.pick(smoke=10, desk=40, paper=200),
            test_samples=self.pick(smoke=100, desk=1000, paper=5000),
        ).record
        alignment = record["alignment"]
        steps, delay = len(record), grokking_delay(record)
        return {
            "group": np.full(steps, group),
            "seed": np.full(steps, index),
            "smallest_cluster": np.full(steps, int(torch.bincount(data.cluster, minlength=4).min())),
            "step": record.steps,
            **{name: record[name] for name in CURVES},
            "own_alignment": (alignment[:, 0, 0] + alignment[:, 1, 1]) / 2,
            "other_alignment": (alignment[:, 0, 1] + alignment[:, 1, 0]) / 2,
            "fit_step": np.full(steps, delay.fit),
            "generalise_step": np.full(steps, delay.generalise),
        }

    def _first_step(self) -> dict[str, Any]:
        """One step by automatic differentiation against the closed form, in float64 from weights of scale 1e-9."""
        data = xor_clusters(50, 2000, seed=self.seeds.integer("first step"), dtype=torch.float64)
        net = TwoLayerReLU(2000, 32, initial_scale=1e-9, seed=self.seeds.integer("first weights"), dtype=torch.float64)
        (gradient,) = torch.autograd.grad(logistic(net(data.x), data.y), net.weight)
        start = net.weight.detach()
        stepped = start - self.learning_rate * gradient
        closed = first_step(start, net.signs, data.x, data.y, self.learning_rate)
        return {
            "relative_error": float((stepped - closed).norm() / closed.norm()),
            "start_over_step": float(start.norm() / closed.norm()),
        }

    def _gram(self) -> dict[str, Any]:
        """The same run in Gram space and with the weights themselves, in float64."""
        data = xor_clusters(60, 500, seed=self.seeds.integer("gram"), dtype=torch.float64)
        net = TwoLayerReLU(500, 20, seed=self.seeds.integer("gram weights"), dtype=torch.float64)
        gram, direct = (
            grok_xor(data, net, learning_rate=self.learning_rate, steps=20, test_samples=200, gram=gram)
            for gram in (True, False)
        )
        return {
            "train_difference": _relative(gram.train_outputs, direct.train_outputs),
            "test_difference": _relative(gram.test_outputs, direct.test_outputs),
            "weight_difference": _relative(*(run.network.get_parameter("weight") for run in (gram, direct))),
        }

    # -------------------------------------------------------------------------------------------------------- claims

    def _grokking(self, data: Data) -> Claim:
        first, last = _at(data, "small", 1), _at(data, "small", None)
        test = last["test_accuracy"]
        return self.claim(
            "C1",
            "After one step the network fits all noisy labels and tests at chance; later it tests near the optimum and "
            "still fits them.",
            kind="threshold",
            criterion="5 seeds. Step 1: accuracy on noisy labels >= 0.99 and test accuracy in [0.40, 0.60] for every "
            "seed. Step 40: accuracy on noisy labels >= 0.995 for every seed, median test accuracy >= 0.97, at least 3 "
            "of 5 seeds >= 0.95",
            measured=f"step 1: training {listed(first['train_accuracy'])}, test {listed(first['test_accuracy'])}; "
            f"step {int(last['step'][0])}: training {listed(last['train_accuracy'])}, test {listed(test)}, median "
            f"{np.median(test):.3f}",
            holds=bool((first["train_accuracy"] >= 0.99).all())
            and bool(((first["test_accuracy"] >= 0.4) & (first["test_accuracy"] <= 0.6)).all())
            and bool((last["train_accuracy"] >= 0.995).all())
            and bool(np.median(test) >= 0.97)
            and int((test >= 0.95).sum()) >= 0.6 * len(test),
            controls=(
                f"accuracy of the same training samples on their true labels: step 1 "
                f"{listed(first['clean_accuracy'])}, at the end {listed(last['clean_accuracy'])}",
                f"first step with a test accuracy of 0.95: {listed(last['generalise_step'], '.0f')}",
            ),
        )

    def _first_step_claim(self, data: Data) -> Claim:
        error = float(np.asarray(data["first_step"]["relative_error"])[0])
        start = float(np.asarray(data["first_step"]["start_over_step"])[0])
        return self.claim(
            "C2",
            "From vanishing weights, the first step adds to each neuron half the mean of the samples it is active on, "
            "times their labels and its sign.",
            kind="exact",
            criterion="n = 50, p = 2000, m = 32, initial scale 1e-9, float64: relative error of the weights after one "
            "step against the closed form <= 1e-6",
            measured=f"relative error {error:.1e}",
            holds=error <= 1e-6,
            controls=(f"initial weights over weights after the step: {start:.1e}",),
        )

    def _linear_at_first(self, data: Data) -> Claim:
        first, last = _at(data, "small", 1), _at(data, "small", None)
        agreement, late = first["surrogate_agreement"], last["odd_fraction"]
        return self.claim(
            "C3",
            "After one step the network is almost a linear classifier; later it is not.",
            kind="threshold",
            criterion="5 seeds, test points. Step 1: odd fraction >= 0.90 in every seed; sign that of the linear "
            "classifier on >= 80 % of points in every seed and on >= 88 % in the mean. Step 40: odd fraction <= 0.35 "
            "in the mean and <= 0.20 in the median",
            measured=f"step 1: odd fraction {listed(first['odd_fraction'])}, agreement {listed(agreement)} (mean "
            f"{agreement.mean():.3f}); step {int(last['step'][0])}: odd fraction {listed(late)} (mean "
            f"{late.mean():.3f}, median {np.median(late):.3f})",
            holds=bool((first["odd_fraction"] >= 0.9).all())
            and bool((agreement >= 0.8).all())
            and bool(agreement.mean() >= 0.88)
            and bool(late.mean() <= 0.35)
            and bool(np.median(late) <= 0.2),
            controls=(
                "mean |cos| of neurons with the mean of their own class, and of the other, at the end: "
                f"{listed(last['own_alignment'])}; {listed(last['other_alignment'])}",
                self._late_odd_fraction(data, "further", "further draws of data and weights"),
                self._late_odd_fraction(data, "balanced", "the same seeds with as many samples of each cluster"),
            ),
            note="How far the odd fraction falls goes with how evenly the clusters were drawn: over all draws its "
            f"correlation with the size of the smallest cluster is {self._imbalance(data):.2f}. A cluster that few "
            "samples show is learned late, and until then the function stays partly linear there.",
        )

    def _late_odd_fraction(self, data: Data, group: str, words: str) -> str:
        last = _at(data, group, None)
        odd, test = last["odd_fraction"], last["test_accuracy"]
        return (
            f"{words} ({len(odd)}): odd fraction at the end {odd.mean():.3f} in the mean, {np.median(odd):.3f} in the "
            f"median; test accuracy {np.median(test):.3f} in the median, {test.min():.3f} at the lowest"
        )

    def _imbalance(self, data: Data) -> float:
        groups = [_at(data, group, None) for group in ("small", "further")]
        smallest, odd = (
            np.concatenate([rows[name] for rows in groups]) for name in ("smallest_cluster", "odd_fraction")
        )
        return float(np.corrcoef(smallest, odd)[0, 1])

    def _small_start(self, data: Data) -> Claim:
        last, small = _at(data, "large", None), _at(data, "small", None)
        return self.claim(
            "C4",
            "Grokking here needs a small initialisation: from large weights the network fits the noisy labels and does "
            "not generalise.",
            kind="threshold",
            criterion="initial scale 0.02, 40 steps, 3 seeds: test accuracy <= 0.60 in every seed, accuracy on noisy "
            "labels >= 0.98",
            measured=f"training {listed(last['train_accuracy'])}, test {listed(last['test_accuracy'])}",
            holds=bool((last["test_accuracy"] <= 0.6).all()) and bool((last["train_accuracy"] >= 0.98).all()),
            controls=(
                f"test accuracy of the same seeds from scale {self.initial_scale:g}: "
                f"{listed(small['test_accuracy'][: len(last['test_accuracy'])])}",
            ),
        )

    def _gram_claim(self, data: Data) -> Claim:
        found = {name: float(np.asarray(column)[0]) for name, column in data["gram"].items()}
        return self.claim(
            "C5",
            "Training in the span of the samples, by their inner products alone, is training the weights.",
            kind="exact",
            criterion="n = 60, p = 500, m = 20, 20 steps, float64: largest difference of the outputs, over the largest "
            "output, <= 1e-9 on training and test points",
            measured=f"training {found['train_difference']:.1e}, test {found['test_difference']:.1e}",
            holds=max(found["train_difference"], found["test_difference"]) <= 1e-9,
            controls=(f"weights at the end: {found['weight_difference']:.1e}",),
        )


def _at(data: Data, group: str, step: int | None) -> dict[str, np.ndarray]:
    """The rows of one group of runs at one step (None: the last), one for each seed."""
    runs = {name: np.asarray(column) for name, column in data["runs"].items()}
    chosen = (runs["group"] == group) & (runs["step"] == (runs["step"].max() if step is None else step))
    return {name: column[chosen] for name, column in runs.items()}


def _row(values: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {name: [value] for name, value in values.items()}


def _relative(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).detach().abs().max() / second.detach().abs().max())


def _by_seed(data: Mapping[str, Any], chosen: np.ndarray) -> list[np.ndarray]:
    seeds = np.asarray(data["seed"])
    return [chosen & (seeds == seed) for seed in np.unique(seeds[chosen])]


def _lines(axes: Any, data: Mapping[str, Any], rows: list[np.ndarray], name: str, color: str, label: str) -> None:
    for i, row in enumerate(rows):
        axes.plot(data["step"][row], data[name][row], color=color, alpha=0.7, label=label if i == 0 else None)


def _draw_accuracy(axes: Any, data: Mapping[str, Any]) -> None:
    groups = {"small": "small initial weights", "large": "large initial weights"}
    for panel, (group, title) in zip(axes, groups.items(), strict=True):
        rows = _by_seed(data, data["group"] == group)
        _lines(panel, data, rows, "train_accuracy", PALETTE[0], "training, noisy labels")
        _lines(panel, data, rows, "test_accuracy", PALETTE[1], "test, true labels")
        panel.axhline(0.5, color=PALETTE[6], linestyle=":", label="chance")
        panel.set(xscale="log", xlabel="step", ylabel="accuracy", ylim=(0.3, 1.03))
        panel.set_title(title)
    axes[0].legend(loc="lower right")


def _draw_mechanism(axes: Any, data: Mapping[str, Any]) -> None:
    left, right = axes
    rows = _by_seed(data, np.ones(len(data["step"]), dtype=bool))
    _lines(left, data, rows, "odd_fraction", PALETTE[2], "odd fraction")
    _lines(left, data, rows, "surrogate_agreement", PALETTE[3], "agreement with the linear classifier")
    left.set(xscale="log", xlabel="step", ylabel="share", ylim=(0, 1.05))
    left.legend(loc="lower left")
    _lines(right, data, rows, "own_alignment", PALETTE[0], "mean of the neuron's own class")
    _lines(right, data, rows, "other_alignment", PALETTE[1], "mean of the other class")
    right.set(xscale="log", xlabel="step", ylabel="mean |cos| with the cluster mean", ylim=(0, None))
    right.legend()
