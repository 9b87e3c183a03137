"""Benign oscillation: many runs of SGD on feature-noise data, at rates below and above the edge of stability."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.base.seeds import Seeds
from corollary.dynamics.feature_noise import FeatureNoiseData, FeatureNoiseSamples, PatchSquaredReLU
from corollary.engine import Process, TrainingRecord, batch_order, fingerprint, run
from corollary.engine.sampling import Order
from corollary.evidence import PALETTE, Figure, Table

MULTIPLES = (0.1, 0.3, 1.0, 1.2, 1.4, 1.6, 1.8)
DIVERGED = 1e6
"""An output above this is not an oscillation any more."""
DELTA = 0.1
"""An output this far from its label, or farther, counts as oscillating."""
SETTLED = 0.25
"""The first part of the steps, which is not counted."""
EVERY = 20
"""Steps between two measurements of what each feature contributes."""

State: TypeAlias = dict[str, Tensor]


@final
@dataclass(frozen=True)
class OscillationTable:
    """What became of each run, one entry a (multiple, seed), multiples outermost.

    Attributes:
        multiple: of the edge of stability, and seed: index of data, weights and order of samples.
        learning_rate: at the start.
        train_accuracy, weak_accuracy: on the run's training set, and on test samples without the strong feature.
        oscillation: after the first quarter, the share of steps on samples with the strong feature at which the output
            was more than `DELTA` from its label.
        drift: the sum of the residuals 1 - y f over those steps.
        weak_margin, strong_margin: what each feature alone contributes to y f at the end, mean over both labels.
        diverged: whether an output passed `DIVERGED`; everything else is NaN then.
        record: at every step `residual` (of that step's sample) and `on_strong`; now and then the margins.
    """

    multiple: np.ndarray
    seed: np.ndarray
    learning_rate: np.ndarray
    train_accuracy: np.ndarray
    weak_accuracy: np.ndarray
    oscillation: np.ndarray
    drift: np.ndarray
    weak_margin: np.ndarray
    strong_margin: np.ndarray
    diverged: np.ndarray
    record: TrainingRecord

    def __len__(self) -> int:
        return len(self.multiple)

    def table(self) -> Table:
        """The columns by name, without the record."""
        return {name: column for name, column in vars(self).items() if name != "record"}

    def figure(self) -> Figure:
        """Left: accuracy on weak samples and share of oscillating steps by rate. Right: the weak margin over steps."""
        levels = np.unique(self.multiple)
        groups = [self.multiple == level for level in levels]
        steps, margins = self.record.measured("weak_margin")
        data: dict[str, Any] = {
            "multiple": levels,
            "weak_accuracy": [_known_mean(self.weak_accuracy[rows]) for rows in groups],
            "oscillation": [_known_mean(self.oscillation[rows]) for rows in groups],
            "step": steps,
        }
        for level, rows in zip(levels, groups, strict=True):
            alive = rows & ~self.diverged
            if alive.any():
                data[f"weak margin at {level:g}"] = margins[:, alive].mean(axis=1)
        return Figure(
            "oscillation-sweep",
            "Oscillation and the weak feature",
            "Means over seeds. Left: accuracy on samples without the strong feature, and the share of steps at which "
            "outputs are off their labels, by learning rate over the edge of stability. Right: what the weak feature "
            "alone contributes to the margin, over the steps.",
            data,
            _draw,
            size=(8.4, 3.6),
            panels=(1, 2),
        )


def benign_oscillation_sweep(
    multiples: Sequence[int | float] = MULTIPLES,
    *,
    seeds: int = 5,
    steps: int = 4000,
    dimension: int = 400,
    samples: int = 100,
    width: int = 8,
    strong: int | float = 1.0,
    weak: int | float = 0.2,
    rho: int | float = 0.2,
    noise: int | float = 1.0,
    decay: tuple[int, int | float] | None = None,
    order: Order = "shuffle",
    test_samples: int = 500,
    seed: int = 0,
    checkpoint: Path | str | None = None,
) -> OscillationTable:
    r"""SGD with batches of one on $\frac12 (f - y)^2$, at multiples of the edge $m / 2U^2$, for several seeds.

    All runs are one population; their updates are written out, $w_{j,r} \leftarrow w_{j,r} - \eta (f - y) \frac{2}{m} j
    \sum_p \max(\langle w_{j,r}, x^{(p)} \rangle, 0)\, x^{(p)}$. Runs of one seed share data, initial weights and the
    order of samples, whatever their rate.

    Args:
        multiples: learning rates over the edge of stability of the strong feature.
        steps: updates of each run.
        dimension, samples, strong, weak, rho, noise: of `FeatureNoiseData`.
        width: m of `PatchSquaredReLU`.
        decay: (step, multiple) from which step on all runs take another rate; a control.
        order: how epochs visit samples, see `engine.batch_order`.
        test_samples: of the set without the strong feature.
        checkpoint: file to save to and to resume from, bit-equal.
    Raises: BadInput, for no or non-positive multiples, no seeds, a decay that is none, or as `FeatureNoiseData`.
    Source: Lu et al. 2023, arXiv:2310.17074.
    """
    if not multiples or min(multiples) <= 0 or seeds < 1:
        raise BadInput(f"a sweep needs positive multiples and 1 or more seeds, got {list(multiples)}, seeds={seeds}")
    if decay is not None and not (decay[0] >= 0 and decay[1] > 0):
        raise BadInput(f"a decay is (step, multiple) from a step of 0 on to a positive multiple, got {decay}")
    streams = [Seeds(seed).child(f"run {index}") for index in range(seeds)]
    options: dict[str, Any] = {"strong": strong, "weak": weak, "rho": rho, "noise": noise}
    sets = [FeatureNoiseData(dimension, samples, seed=stream.integer("data"), **options) for stream in streams]
    nets = [PatchSquaredReLU(dimension, width, stream.integer("weights")) for stream in streams]
    epochs = -(-steps // samples)
    numbers = [stream.integer("order") for stream in streams]
    orders = torch.stack(
        [
            torch.cat([batch_order(n, e, samples, order) for e in range(epochs)] or [torch.zeros(0).long()])
            for n in numbers
        ]
    )
    multiple = np.repeat(np.asarray(multiples, dtype=np.float64), seeds)
    which = torch.arange(seeds).repeat(len(multiples))
    edge = nets[0].edge(strong)
    runs = _Runs(
        torch.stack([data.train.x for data in sets]),
        torch.stack([data.train.y for data in sets]),
        torch.stack([data.train.is_weak for data in sets]),
        orders,
        which,
        torch.stack([torch.stack([data.strong, data.weak]) for data in sets]),
        torch.as_tensor(multiple) * edge,
        None if decay is None else (decay[0], decay[1] * edge),
    )
    weights = torch.stack([net.weight.detach() for net in nets])[which].flatten(1, 2)
    done = run(
        Process(lambda: {"step": torch.tensor(0), "weights": weights.clone(), **runs.fresh()}, runs.step, runs.finish),
        steps=steps,
        checkpoint=checkpoint,
        identity="" if checkpoint is None else runs.identity(weights, numbers, order),
        meta={"members": len(multiple), "edge": edge},
        doing=f"training {len(multiple)} networks",
    )
    tests = [data.weak_test(test_samples) for data in sets]
    return _judged(runs, done.state, done.record, multiple, steps, tests)


@final
@dataclass(frozen=True)
class _Runs:
    """Everything fixed about a population of runs; its members hold `[members, 2 units, dimension]` weights.

    Attributes:
        x, y, is_weak: the training set of each seed. orders: sample by seed and step. which: the seed of each member.
        features: the strong and the weak feature of each seed, `[seeds, 2, dimension]`.
        rate: of each member. decay: (step, rate for all).
    """

    x: Float[Tensor, "seed sample patch dimension"]
    y: Float[Tensor, "seed sample"]
    is_weak: Tensor
    orders: Int[Tensor, "seed step"]
    which: Int[Tensor, "member"]
    features: Float[Tensor, "seed feature dimension"]
    rate: Float[Tensor, "member"]
    decay: tuple[int, float] | None

    def identity(self, weights: Tensor, seeds: Sequence[int], order: Order) -> str:
        """A fingerprint of all that decides what the steps do, except how many there are."""
        data = (self.x, self.y, self.is_weak, self.features)
        return fingerprint(weights, *data, self.which, self.rate, self.decay, tuple(seeds), order)

    def fresh(self) -> State:
        """Who is alive at the start: everyone."""
        return {"alive": torch.ones(len(self.which), dtype=torch.bool)}

    def step(self, state: State) -> tuple[State, dict[str, Tensor]]:
        """One update of every member that has not diverged, and the residual before it."""
        step, weights = int(state["step"]), state["weights"]
        index = self.orders[self.which, step]
        x, y = self.x[self.which, index], self.y[self.which, index]
        outputs, pull = patch_outputs(weights, x)
        state["alive"] &= outputs.abs() <= DIVERGED  # false for NaN too
        rate = self.rate if self.decay is None or step < self.decay[0] else torch.full_like(self.rate, self.decay[1])
        factor = torch.where(state["alive"], rate * (y - outputs), 0.0)
        # A member that has diverged may hold infinities, and zero times those is no zero.
        pull = torch.where(state["alive"][:, None, None], pull * factor[:, None, None], 0.0)
        weights.baddbmm_(pull, x)
        state["step"] = state["step"] + 1
        residual = torch.where(state["alive"], 1 - y * outputs, torch.nan)
        info = {"residual": residual, "on_strong": (~self.is_weak[self.which, index]).to(y)}
        return state, {**info, **self.margins(state)} if step % EVERY == 0 else info

    def margins(self, state: State) -> dict[str, Tensor]:
        """What the strong and the weak feature alone contribute to y f, mean over both labels, by member."""
        features = self.features[self.which]
        both = [
            sign * patch_outputs(state["weights"], sign * features[:, [k]])[0] / 2 for k in (0, 1) for sign in (1, -1)
        ]
        alive = state["alive"]
        strong, weak = both[0] + both[1], both[2] + both[3]
        return {
            "strong_margin": torch.where(alive, strong, torch.nan),
            "weak_margin": torch.where(alive, weak, torch.nan),
        }

    def finish(self, state: State) -> dict[str, Tensor]:
        """The margins of the last weights."""
        return self.margins(state)


def patch_outputs(
    weights: Float[Tensor, "member unit dimension"], x: Float[Tensor, "member patch dimension"]
) -> tuple[Float[Tensor, "member"], Float[Tensor, "member unit patch"]]:
    """Outputs of patch networks on one sample each, and the gradients of the outputs by the units' projections.

    Args: `weights`: the units of sign 1, then as many of sign -1.
    """
    width = weights.shape[1] // 2
    signs = torch.ones(2 * width, 1, dtype=weights.dtype, device=weights.device)
    signs[width:] = -1
    active = (weights @ x.mT).relu()
    return (signs * active.square()).sum((1, 2)) / width, 2 / width * signs * active


def _judged(
    runs: _Runs,
    state: State,
    record: TrainingRecord,
    multiple: np.ndarray,
    steps: int,
    tests: Sequence[FeatureNoiseSamples],
) -> OscillationTable:
    diverged = (~state["alive"]).numpy()

    def known(values: np.ndarray) -> np.ndarray:
        return np.where(diverged, np.nan, values)

    accuracies = partial(_accuracies, state["weights"])
    residuals = record["residual"][:steps]
    counted = (record["on_strong"][:steps] == 1) & (np.arange(steps) >= SETTLED * steps)[:, None]
    times = counted.sum(axis=0)
    off = (counted & (np.abs(residuals) > DELTA)).sum(axis=0)
    share = np.divide(off, times, out=np.full(times.shape, np.nan), where=times > 0)
    return OscillationTable(
        multiple=multiple,
        seed=runs.which.numpy(),
        learning_rate=runs.rate.numpy(),
        train_accuracy=known(accuracies(runs.x, runs.y)),
        weak_accuracy=known(accuracies(torch.stack([test.x for test in tests]), torch.stack([t.y for t in tests]))),
        oscillation=known(share),
        drift=known(np.where(counted, residuals, 0).sum(axis=0)),
        weak_margin=record["weak_margin"][-1],
        strong_margin=record["strong_margin"][-1],
        diverged=diverged,
        record=record,
    )


def _accuracies(weights: Tensor, x: Tensor, y: Tensor) -> np.ndarray:
    """The share of samples of its own seed that each member gets right, `[members]`."""
    width, seeds = weights.shape[1] // 2, len(x)
    # Members stand multiples outermost, so that those of one seed share a product with its samples.
    by_seed = weights.unflatten(0, (-1, seeds)).transpose(0, 1)
    correct = []
    for nets, samples, labels in zip(by_seed, x, y, strict=True):
        squares = torch.einsum("mud,spd->msup", nets, samples).relu().square().sum(3)
        outputs = squares[..., :width].sum(2) - squares[..., width:].sum(2)
        correct.append((outputs * labels > 0).double().mean(1))
    return torch.stack(correct, dim=1).flatten().numpy()


def _known_mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _draw(panels: Any, data: Mapping[str, Any]) -> None:
    left, right = panels
    left.plot(data["multiple"], data["weak_accuracy"], marker="o", color=PALETTE[0], label="accuracy, weak samples")
    left.plot(data["multiple"], data["oscillation"], marker="s", color=PALETTE[1], label="oscillating steps")
    left.axvline(1, color=PALETTE[6], lw=1, ls="--", label="edge of stability")
    left.set(xlabel="learning rate over the edge", ylabel="share", ylim=(-0.03, 1.03))
    left.legend()
    names = [name for name in data if name.startswith("weak margin at ")]
    for index, name in enumerate(names):
        label = name.removeprefix("weak margin at ")
        line = "-" if index < len(PALETTE) else "--"
        right.plot(data["step"], data[name], color=PALETTE[index % len(PALETTE)], ls=line, label=label)
    right.set(xlabel="step", ylabel="margin from the weak feature alone")
    if names:
        right.legend(title="multiple", loc="upper left", bbox_to_anchor=(1, 1))
