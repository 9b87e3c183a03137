"""The study `opposing-signals`: a few samples with opposing gradients, at the edge of stability and in closed form."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from corollary.data import Split, digits, load
from corollary.dynamics.losses import half_square
from corollary.dynamics.opposing import OpposingReport, OpposingSignals
from corollary.dynamics.opposing_gradients import opposition
from corollary.dynamics.opposing_groups import ROSENFELD_2024, extremes
from corollary.engine import Members, population
from corollary.evidence import Claim, Data, Figure, Parts, Source, Study, listed
from corollary.evidence.study import in_memory
from corollary.linalg import sharpness
from corollary.studies.dynamics import opposing_signals_model as model
from corollary.studies.dynamics import opposing_signals_pictures as pictures
from corollary.studies.dynamics.opposing_signals_model import ALPHAS, RATES, SIGNALS, Spike

COHEN_2021 = Source(
    "cohen2021gradient",
    ("Jeremy M. Cohen", "Simran Kaur", "Yuanzhi Li", "J. Zico Kolter", "Ameet Talwalkar"),
    "Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability",
    2021,
    arxiv="2103.00065",
    venue="ICLR",
)


class Setup(NamedTuple):
    """Sizes at one scale: of gradient descent on images, and of the linear model.

    `rates`: the learning rates that reach the edge of stability within `steps`, and that do not.
    """

    samples: int
    width: int
    rates: tuple[float, float]
    steps: int
    window: int
    averaged: int
    seeds: int
    flow_steps: int
    descent_steps: int
    planted_samples: int
    planted_steps: int


SETUPS = {
    "smoke": Setup(120, 16, (0.5, 0.15), 40, 12, 20, 1, 2000, 100, 200, 200),
    "desk": Setup(1000, 64, (0.5, 0.15), 600, 60, 200, 3, 200_000, 400, 2000, 4000),
    "paper": Setup(5000, 64, (0.05, 0.01), 2000, 60, 200, 3, 200_000, 400, 2000, 4000),
}
SHARPNESS_EVERY = 10


@dataclass(frozen=True)
class OpposingSignalsStudy(Study):
    """Groups of samples with opposing gradients: found in training, planted, and solved in a two-layer linear model."""

    edge_rate: float | None = None
    """Learning rate of full-batch gradient descent that reaches the edge of stability; by default the scale's own."""
    smooth_rate: float | None = None
    """Learning rate that does not; by default the scale's own."""

    slug: ClassVar[str] = "opposing-signals"
    room: ClassVar[str] = "dynamics"
    title: ClassVar[str] = "Outliers with opposing signals have an outsized effect on neural network optimization"
    sources: ClassVar[tuple[Source, ...]] = (ROSENFELD_2024, COHEN_2021)

    def run(self, parts: Parts = in_memory) -> Data:
        """Watch gradient descent at both rates, follow flow and descent of the linear model, and plant outliers."""
        setup = SETUPS[self.scale]
        watched = [parts(f"descent, seed {i}", lambda i=i: self._descent(i)) for i in range(setup.seeds)]
        return {
            **_tables(watched),
            **_tables([parts("flow", lambda: model.flow(setup.flow_steps))]),
            "spikes": parts("spikes", lambda: model.spikes(setup.descent_steps)),
            "planted": parts("planted", self._planted),
        }

    def claims(self, data: Data) -> tuple[Claim, ...]:
        """C1 to C4 of the specification and the comparison with samples of high loss, from the stored tables alone."""
        return (
            self._groups_claim(data),
            self._limit_claim(data),
            self._spike_claim(data),
            self._planting_claim(data),
            self._selection_claim(data),
        )

    def figures(self, data: Data) -> tuple[Figure, ...]:
        """Losses of the groups, the linear model's sharpness and spikes, and what planting does."""
        return pictures.figures(data)

    @property
    def _rates(self) -> tuple[float, float]:
        """The learning rates at and below the edge."""
        edge, smooth = SETUPS[self.scale].rates
        edge = edge if self.edge_rate is None else self.edge_rate
        return edge, smooth if self.smooth_rate is None else self.smooth_rate

    # ---------------------------------------------------------------------------------------------- gradient descent

    def _descent(self, seed: int) -> dict[str, Any]:
        """Both rates from the same weights; the last steps are watched."""
        setup = SETUPS[self.scale]
        x, y = self._images()
        watched = range(setup.steps - setup.window - 1, setup.steps + 1)
        sharp = range(setup.steps - setup.averaged, setup.steps + 1, SHARPNESS_EVERY)
        rates = self._rates
        trained = population(
            lambda: self._network().to(x.device),
            (x, y),
            seeds=[self.seeds.integer(f"weights {seed}")] * 2,
            loss=half_square,
            learning_rate=rates,
            steps=setup.steps,
            record_every=setup.steps,
            snapshots=sorted({*watched, *sharp}),
        )
        kept: dict[str, list[Any]] = {}
        for member, rate in enumerate(rates):
            net = trained.member(member)
            weights = {step: _member(stack, member) for step, stack in trained.snapshots.items()}
            signals = OpposingSignals(net, half_square, (x, y), learning_rate=rate, seed=seed)
            for step in watched:
                signals.observe(step, weights[step])
            report = signals.report(window=setup.window)
            ratios = self._ratios(net, (x, y), {step: weights[step] for step in sharp}, rate)
            others = _other_cosines(net, (x, y), signals, report, weights)
            row = {"seed": seed, "rate": rate, "edge": float(np.mean(ratios)), **_row(report), **others}
            _extend(kept, "runs", {name: [value] for name, value in row.items()})
            _extend(kept, "traces", _labelled(report.traces, seed, rate))
            _extend(kept, "edges", _labelled({"step": np.array(sharp), "ratio": np.array(ratios)}, seed, rate))
        return kept

    def _images(self) -> tuple[Tensor, Tensor]:
        """Standardised inputs with one-hot targets: digits, or CIFAR-10 on a GPU where there is one."""
        data = load("cifar10", dtype=torch.float32) if self.scale == "paper" else digits()
        assert data.train.y is not None  # both sets have labels
        samples = SETUPS[self.scale].samples
        part = dataclasses.replace(data, train=Split(data.train.x[:samples], data.train.y[:samples]), test=None)
        x, y = part.standardised().train
        assert y is not None  # it had labels
        device = "cuda" if self.scale == "paper" and torch.cuda.is_available() else "cpu"
        return x.to(device), nn.functional.one_hot(y, 10).to(device, x.dtype)

    def _network(self) -> nn.Module:
        width = SETUPS[self.scale].width
        if self.scale == "paper":
            return convolutional(width)
        return nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))

    def _ratios(
        self, net: nn.Module, data: tuple[Tensor, Tensor], weights: Mapping[int, dict[str, Tensor]], rate: float
    ) -> list[float]:
        """The learning rate times half the sharpness, each Lanczos run started from the last one's vector."""
        ratios, start = [], None
        generator = self.seeds("Lanczos")
        for params in weights.values():
            top = sharpness(net, half_square, data, params=params, start=start, generator=generator, tolerance=1e-3)
            ratios.append(rate * top.value / 2)
            start = top.vector
        return ratios

    def _planted(self) -> dict[str, Any]:
        setup = SETUPS[self.scale]
        return model.planted(setup.planted_samples, setup.planted_steps, self.seeds("planted samples"))

    # -------------------------------------------------------------------------------------------------------- claims

    def _groups_claim(self, data: Data) -> Claim:
        rate, smooth_rate = self._rates
        edge, smooth = _where(data["runs"], rate=rate), _where(data["runs"], rate=smooth_rate)
        cosines = edge["opposition"]
        return self.claim(
            "C1",
            "At the edge of stability the samples whose losses change most form two groups with opposing gradients "
            "whose losses alternate; below it they do not alternate.",
            kind="threshold",
            criterion=f"learning rate {rate:g}: learning rate times sharpness over 2, mean of the last 200 "
            "steps, in [0.9, 1.15] and alternation >= 0.90 for every seed; cosine of the groups' mean gradients "
            f"<= -0.15 for every seed, <= -0.25 in the mean; learning rate {smooth_rate:g}: alternation <= 0.05",
            measured=f"learning rate {rate:g}: edge {listed(edge['edge'])}, alternation "
            f"{listed(edge['alternation'])}, cosine {listed(cosines)}, mean {np.mean(cosines):.3f}; learning rate "
            f"{smooth_rate:g}: alternation {listed(smooth['alternation'])}",
            holds=bool(
                ((edge["edge"] >= 0.9) & (edge["edge"] <= 1.15) & (edge["alternation"] >= 0.9)).all()
                and (cosines <= -0.15).all()
                and np.mean(cosines) <= -0.25
                and (smooth["alternation"] <= 0.05).all()
            ),
            controls=(
                f"random groups, learning rate {rate:g}: cosine {listed(edge['random_opposition'])}; all "
                f"samples: alternation {listed(edge['alternation_of_all'])}",
                f"the groups' cosine after the change: {listed(edge['opposition_after'])}",
                f"learning rate {smooth_rate:g}: edge {listed(smooth['edge'])}, cosine "
                f"{listed(smooth['opposition'])}, random {listed(smooth['random_opposition'])}",
                f"top 2 % of the samples make {listed(edge['concentration'])} of all changes; groups persist with "
                f"overlap {listed(edge['persistence'])} from rise to rise",
                "curvature along the top eigenvector over the sharpness, rising, falling and random group: "
                + "; ".join(listed(edge[name] / edge["curvature"]) for name in ("rising", "falling", "random")),
            ),
        )

    def _limit_claim(self, data: Data) -> Claim:
        table = {name: np.asarray(column) for name, column in data["limit"].items()}
        error, exact = (float(np.abs(table[name] / table["limit"] - 1).max()) for name in ("end", "exact_end"))
        drift = float((table["drift"] / table["signal"]).max())
        ratios = table["limit"][table["signal"] == SIGNALS[2]] / table["limit"][table["signal"] == SIGNALS[1]]
        falls = (1 - table["lowest"] / table["start"])[table["alpha"] == ALPHAS[1]]
        return self.claim(
            "C2",
            "Under gradient flow the sharpness first falls while the opposing weight decays, then rises to a closed "
            "form that grows linearly with the strength of the signal.",
            kind="exact",
            criterion="Euler steps of 1e-4 to time 20, alpha 10 and 50, |beta| 1, 2, 4: end within 1e-4 of the limit; "
            "conserved quantity drifts by <= 1e-3 of |beta|; limits at |beta| 4 and 2 in ratio 2 within 2 %; for alpha "
            "50 the sharpness first falls by >= 4 %",
            measured=f"largest relative error {error:.2g}; largest drift {drift:.2g}; ratios {listed(ratios, '.4f')}; "
            f"falls by {listed(100 * falls, '.1f')} % at |beta| 1, 2, 4",
            holds=error <= 1e-4
            and drift <= 1e-3
            and bool((np.abs(ratios / 2 - 1) <= 0.02).all())
            and falls.min() >= 0.04,
            controls=(f"the flow integrated to 1e-10 in place of Euler's steps: largest error {exact:.2g}",),
            note="The lowest sharpness is looked for every 10 Euler steps; a first run looked every 1,000 and missed "
            "the early minimum of |beta| 4.",
        )

    def _spike_claim(self, data: Data) -> Claim:
        found = {rate: Spike.of(_where(data["spikes"], rate=rate), rate) for rate in RATES}
        low, middle, high = (found[rate] for rate in RATES)
        return self.claim(
            "C3",
            "Gradient descent past the edge alternates between the groups, spikes, and stabilises itself.",
            kind="threshold",
            criterion="alpha 20, |beta| 1, 400 steps; learning rate 0.05: sharpness stays below 2 / rate, alternation "
            "<= 0.05; 0.12 and 0.15: sharpness crosses 2 / rate, the loss peaks after it at >= 100 times its lowest "
            "since, ends with sharpness below 2 / rate and loss < 1e-8; 0.12: alternation >= 0.8",
            measured=f"0.05: largest sharpness {low.largest:.2f} of {2 / RATES[0]:.1f}, alternation "
            f"{low.alternation:.2f}; "
            + "; ".join(
                f"{rate:g}: crosses at step {spike.crossing}, loss {spike.low:.2g} then {spike.peak:.3g}, ends at "
                f"sharpness {spike.end:.2f} of {2 / rate:.2f} and loss {spike.loss:.1g}, alternation "
                f"{spike.alternation:.2f}"
                for rate, spike in ((RATES[1], middle), (RATES[2], high))
            ),
            holds=low.largest < 2 / RATES[0]
            and low.alternation <= 0.05
            and middle.recovers(RATES[1])
            and high.recovers(RATES[2])
            and middle.alternation >= 0.8,
        )

    def _planting_claim(self, data: Data) -> Claim:
        planted = {name: np.asarray(column) for name, column in data["planted"].items()}
        ratio = float(planted["with"][-1] / planted["without"][-1])
        error = float(abs(planted["with"][-1] / planted["predicted"][-1] - 1))
        return self.claim(
            "C4",
            "Opposing outliers raise the sharpness where training ends, to their share times their variance times c^2.",
            kind="threshold",
            criterion="2,000 samples, 2 % with an opposing coordinate of variance 400, 4,000 steps: top eigenvalue of "
            "the Hessian >= 3 times that without the coordinate, and within 5 % of share x alpha x c^2",
            measured=f"{planted['with'][-1]:.3f} with, {planted['without'][-1]:.3f} without: ratio {ratio:.2f}; "
            f"predicted {planted['predicted'][-1]:.3f}, off by {100 * error:.2f} %",
            holds=ratio >= 3 and error <= 0.05,
            note="The coordinate's signs are half and half. A first run drew them freely and got 27 of one, 13 of the "
            "other: its weight then does not end at 0, and the top eigenvalue was 9.77, 11.8 % above the formula.",
        )

    def _selection_claim(self, data: Data) -> Claim:
        rate, _ = self._rates
        edge = _where(data["runs"], rate=rate)
        gains = edge["high_loss_opposition"] - edge["opposition"]
        return self.claim(
            "C5",
            "Groups found by change of loss oppose each other more than the samples of highest loss do.",
            kind="threshold",
            criterion=f"learning rate {rate:g}, same steps: for every seed a cosine lower by >= 0.1 than "
            "that of the k samples of highest loss and the k after them",
            measured=f"cosine {listed(edge['opposition'])} against {listed(edge['high_loss_opposition'])}: lower by "
            f"{listed(gains)}",
            holds=bool((gains >= 0.1).all()),
        )


def convolutional(width: int) -> nn.Sequential:
    """VGG-11 without normalisation, for images [3, 32, 32]; `width` is the number of channels of its first layer."""
    layers: list[nn.Module] = []
    before = 3
    for factor, pool in ((1, True), (2, True), (4, False), (4, True), (8, False), (8, True), (8, False), (8, True)):
        layers += [nn.Conv2d(before, factor * width, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pool else []
        before = factor * width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before, 10))


def _member(stack: Members, index: int) -> dict[str, Tensor]:
    return {name: tensor[index] for name, tensor in stack.params.items()}


def _other_cosines(
    net: nn.Module,
    data: tuple[Tensor, Tensor],
    signals: OpposingSignals,
    report: OpposingReport,
    weights: Mapping[int, dict[str, Tensor]],
) -> dict[str, float]:
    """Of the same events: the groups' cosine after the change, and that of the samples of highest loss before it."""
    history, k = signals.history, len(report.reading.groups.rising)
    after, high = [], []
    for step in report.reading.events:
        pair = int((history.steps == step).nonzero()[0, 0])
        rising, falling = extremes(history.changes[pair : pair + 1], k)
        after.append(opposition(net, half_square, data, rising[0], falling[0], params=weights[step + 1]))
        ranked = history.losses[pair].topk(2 * k).indices
        high.append(opposition(net, half_square, data, ranked[:k], ranked[k:], params=weights[step]))
    return {"opposition_after": float(np.mean(after)), "high_loss_opposition": float(np.mean(high))}


def _row(report: OpposingReport) -> dict[str, float]:
    reading, curvature = report.reading, report.curvature
    return {
        "opposition": report.opposition,
        "random_opposition": report.random_opposition,
        "alternation": reading.alternation,
        "alternation_of_all": reading.alternation_of_all,
        "concentration": reading.concentration,
        "persistence": reading.persistence,
        "events": len(reading.events),
        "curvature": curvature.all,
        "rising": curvature.rising,
        "falling": curvature.falling,
        "random": curvature.random,
    }


def _labelled(columns: Mapping[str, np.ndarray], seed: int, rate: float) -> dict[str, list[Any]]:
    length = len(next(iter(columns.values())))
    return {"seed": [seed] * length, "rate": [rate] * length, **{name: list(col) for name, col in columns.items()}}


def _extend(kept: dict[str, list[Any]], table: str, columns: Mapping[str, list[Any]]) -> None:
    for name, column in columns.items():
        kept.setdefault(f"{table}/{name}", []).extend(column)


def _tables(watched: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    """The parts of all seeds, joined, as tables by the name before the stroke."""
    tables: dict[str, dict[str, np.ndarray]] = {}
    for key in watched[0]:
        table, _, name = key.partition("/")
        tables.setdefault(table, {})[name] = np.concatenate([np.asarray(part[key]) for part in watched])
    return tables


def _where(table: Mapping[str, Any], **wanted: float) -> dict[str, np.ndarray]:
    columns = {name: np.asarray(column) for name, column in table.items()}
    rows = np.logical_and.reduce([columns[name] == value for name, value in wanted.items()])
    return {name: column[rows] for name, column in columns.items()}
