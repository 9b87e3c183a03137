"""The study `representation-geometry`: tanh layers take the geometry of the targets, ReLU layers keep the inputs'."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corollary.engine import Population, Rule, adam, population, sgd
from corollary.evidence import Claim, Data, Figure, Parts, Source, Study, joined
from corollary.evidence.study import in_memory
from corollary.geometry.alignment import ALLEMAN_2024, KORNBLITH_2019, kernel_alignment, linear_kernel
from corollary.geometry.disentanglement import BERNARDI_2020, ccgp, parallelism
from corollary.geometry.geometry_tasks import (
    AbstractClusters,
    NudgedXOR,
    RandomKernelTask,
    UnstructuredClusters,
    gradient_field,
    weight_trajectories,
)
from corollary.studies.geometry.representation_geometry_pictures import HALF_SIDE, NOISE, only, study_figures, where

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {
    "relu": F.relu,
    "relu capped at 2": lambda x: x.clamp(0, 2),
    "relu capped at 1.5": lambda x: x.clamp(0, 1.5),
    "relu capped at 1": lambda x: x.clamp(0, 1),
    "relu(x + 1)": lambda x: F.relu(x + 1),
    "relu(x + 0.5)": lambda x: F.relu(x + 0.5),
    "relu(x - 0.5)": lambda x: F.relu(x - 0.5),
    "relu(x - 1)": lambda x: F.relu(x - 1),
    "hard tanh": F.hardtanh,
    "tanh": torch.tanh,
}
ABLATED = ("relu capped at 2", "relu capped at 1", "hard tanh")
SEPARABILITIES = (0.0, 0.25, 0.5, 0.75, 1.0)
DIMENSION = 99
PLANE = 12
"""Places a side of the square of weights in which the gradient is drawn."""


class OneHiddenLayer(nn.Module):
    """$J \\phi(W x + b) + b_2$ with J balanced, ±1/sqrt(width); J and $b_2$ are trained only where asked for."""

    def __init__(self, width: int, phi: Activation, trained_readout: bool):
        super().__init__()
        self.hidden = nn.Linear(DIMENSION, width)  # W and b uniform in ±1/sqrt(d)
        signs = torch.where(torch.arange(width) % 2 == 0, 1.0, -1.0)
        self.readout = nn.Parameter(signs / width**0.5, requires_grad=trained_readout)
        self.offset = nn.Parameter(torch.zeros(()), requires_grad=trained_readout)
        self.phi = phi

    def responses(self, x: Tensor) -> Tensor:
        """The hidden layer."""
        return self.phi(self.hidden(x))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n]."""
        return self.responses(x) @ self.readout + self.offset


@dataclass(frozen=True)
class RepresentationGeometry(Study):
    """Input and target alignment, parallelism and CCGP of small networks, by nonlinearity and task."""

    width: int = 128
    """Hidden units."""

    slug: ClassVar[str] = "representation-geometry"
    room: ClassVar[str] = "geometry"
    title: ClassVar[str] = "Nonlinearity decides whether hidden geometry follows inputs or targets"
    sources: ClassVar[tuple[Source, ...]] = (ALLEMAN_2024, BERNARDI_2020, KORNBLITH_2019)

    def run(self, parts: Parts = in_memory) -> Data:
        """Train on unstructured inputs and on nudged XOR with every nonlinearity; check the closed forms."""
        clusters = [
            parts(f"unstructured {name}", partial(self._unstructured, name, seeds))
            for name, seeds in self._nonlinearities.items()
        ]
        nudged = [
            parts(f"nudged {name} noise {noise}", partial(self._nudged, name, noise))
            for name in ("relu", "tanh")
            for noise in self.pick(smoke=(NOISE,), desk=(NOISE,), paper=(0.25, NOISE, 1.0, 1.5))
        ]
        pure = [parts(f"pure {name}", partial(self._pure, name)) for name in ("relu", "tanh")]
        return {
            "unstructured": joined([_without(part, "path_") for part in clusters]),
            "xor": joined([*nudged, *pure]),
            "closed_forms": parts("closed forms", _closed_forms),
            "trajectories": joined([only(part, "path_") for part in clusters if "path_step" in part]),
            "field": joined([parts(f"field {name}", partial(self._field, name)) for name in ("relu", "tanh")]),
        }

    def claims(self, data: Data) -> tuple[Claim, ...]:
        """R1 to R5 of the specification, from the stored tables alone."""
        return (
            self._follows(data),
            self._disentangled(data),
            self._separability(data),
            self._exact(data),
            self._saturation(data),
        )

    def figures(self, data: Data) -> tuple[Figure, ...]:
        """Both alignments by nonlinearity, over separability, and the weights in the plane of the class axes."""
        return study_figures(data)

    # ------------------------------------------------------------------------------------------------------- settings

    @property
    def _nonlinearities(self) -> dict[str, int]:
        """Name -> seeds."""
        if self.scale == "paper":
            return dict.fromkeys(ACTIVATIONS, 20)
        most, few = self.pick(smoke=(2, 1), desk=(5, 2), paper=(20, 20))
        return {"relu": most, **dict.fromkeys(ABLATED, few), "tanh": most}

    @property
    def _hidden(self) -> int:
        return min(self.width, 16) if self.scale == "smoke" else self.width

    @property
    def _samples(self) -> int:
        return self.pick(smoke=200, desk=2000, paper=5000)

    def _unstructured(self, name: str, seeds: int) -> dict[str, Any]:
        tasks = [self._clusters(seed) for seed in range(seeds)]
        total = self._epochs_unstructured * -(-self._samples // 200)
        drawn = name in ("relu", "tanh")
        steps = sorted({round(total * share**2) for share in np.linspace(0, 1, 25)}) if drawn else []
        population = self._population(name, tasks, NOISE, self._epochs_unstructured, sgd(), 1e-2, False, steps)
        trained = [_one_hidden_layer(population.member(i)) for i in range(seeds)]
        kernels = [linear_kernel(_responses(net, task)) for net, task in zip(trained, tasks, strict=True)]
        pooled = torch.stack(kernels).mean(0)
        averages = [torch.stack([task.kernels()[which] for task in tasks]).mean(0) for which in (0, 1)]
        rows = [self._measured(net, task, NOISE) for net, task in zip(trained, tasks, strict=True)]
        return {
            "nonlinearity": [name] * seeds,
            "seed": list(range(seeds)),
            **_table(rows),
            "pooled_input_alignment": [float(kernel_alignment(pooled, averages[0]))] * seeds,
            "pooled_target_alignment": [float(kernel_alignment(pooled, averages[1]))] * seeds,
            **(_paths(name, population, tasks[0]) if drawn else {}),
        }

    @property
    def _epochs_unstructured(self) -> int:
        return self.pick(smoke=3, desk=300, paper=1000)

    def _clusters(self, seed: int) -> UnstructuredClusters:
        return UnstructuredClusters(DIMENSION, seed=self.seeds.integer(f"clusters {seed}"))

    def _nudged(self, name: str, noise: float) -> dict[str, Any]:
        levels = self.pick(smoke=(0.5,), desk=(0.25, 0.5, 1.0), paper=SEPARABILITIES[1:])
        return self._xor(name, noise, levels, self.pick(smoke=3, desk=200, paper=1000), sgd(), 1e-2, False)

    def _pure(self, name: str) -> dict[str, Any]:
        return self._xor(name, NOISE, (0.0,), self.pick(smoke=3, desk=200, paper=1000), adam(), 1e-3, True)

    def _xor(
        self, name: str, noise: float, levels: Sequence[float], epochs: int, rule: Rule, rate: float, readout: bool
    ) -> dict[str, Any]:
        seeds = range(self.pick(smoke=1, desk=3, paper=10))
        runs = [(level, seed) for level in levels for seed in seeds]
        tasks = [NudgedXOR(level, DIMENSION, self.seeds.integer(f"xor {seed}")) for level, seed in runs]
        trained = self._population(name, tasks, noise, epochs, rule, rate, readout)
        nets = [_one_hidden_layer(trained.member(i)) for i in range(len(tasks))]
        rows = [self._measured(net, task, noise) for net, task in zip(nets, tasks, strict=True)]
        return {
            "nonlinearity": [name] * len(runs),
            "separability": [level for level, _ in runs],
            "noise": [noise] * len(runs),
            "seed": [seed for _, seed in runs],
            **_table(rows),
        }

    def _population(
        self, name: str, tasks: Sequence[AbstractClusters], noise: float, epochs: int, rule: Rule, rate: float,
        readout: bool, snapshots: Sequence[int] = (),
    ) -> Population:  # fmt: skip
        """A network for each task, each trained on samples of its own."""
        n = self._samples
        drawn = [task.sample(n, noise, self.seeds(f"samples {i}")) for i, task in enumerate(tasks)]
        data = torch.cat([s.x for s in drawn]).float(), torch.cat([s.y[:, 0] for s in drawn]).float()
        return population(
            lambda: OneHiddenLayer(self._hidden, ACTIVATIONS[name], readout),
            data,
            seeds=[self.seeds.integer(f"network {i}") for i in range(len(tasks))],
            subsets=[torch.arange(i * n, (i + 1) * n) for i in range(len(tasks))],
            loss=F.binary_cross_entropy_with_logits,
            optimizer=rule,
            learning_rate=rate,
            batch_size=200,
            epochs=epochs,
            snapshots=snapshots,
        )

    def _measured(self, net: OneHiddenLayer, task: AbstractClusters, noise: float) -> dict[str, float]:
        """All that is claimed of one network: geometry on the noise-free centres, CCGP and scores on fresh samples."""
        z = _responses(net, task)
        K_x, K_y = task.kernels()
        c_zx, c_zy = (float(kernel_alignment(linear_kernel(z), K)) for K in (K_x, K_y))
        x, y, cond = task.sample(self.pick(smoke=80, desk=800, paper=2000), noise, self.seeds("fresh samples"))
        with torch.no_grad():
            logits, responses = net(x.float()), net.responses(x.float())
        return {
            "input_alignment": c_zx,
            "target_alignment": c_zy,
            "task_alignment": task.alignment(),
            "parallelism": parallelism(z, task.labels[:, 0]),
            "ccgp": ccgp(responses, cond, y[:, 0]),
            "accuracy": float(((logits > 0) == (y[:, 0] > 0)).double().mean()),
            "loss": float(F.binary_cross_entropy_with_logits(logits, y[:, 0].float())),
            "violation": _violation(c_zx, c_zy, task.alignment()),
            "invariance": _invariance(z, K_y, c_zy),
        }

    def _field(self, name: str) -> dict[str, Any]:
        line = torch.linspace(-HALF_SIDE, HALF_SIDE, PLANE, dtype=torch.float64)
        grid = torch.cartesian_prod(line, line)
        field = gradient_field(self._clusters(0), ACTIVATIONS[name], grid, noise=NOISE)
        return {
            "nonlinearity": [name] * len(grid),
            **{f"at_{axis}": grid[:, i].numpy() for i, axis in enumerate(("inter", "intra"))},
            **{f"to_{axis}": field[:, i].numpy() for i, axis in enumerate(("inter", "intra"))},
        }

    # --------------------------------------------------------------------------------------------------------- claims

    def _follows(self, data: Data) -> Claim:
        table = data["unstructured"]
        relu, tanh = (where(table, nonlinearity=name) for name in ("relu", "tanh"))
        return self.claim(
            "R1",
            "On unstructured inputs a tanh layer aligns with the targets and a ReLU layer with the inputs.",
            kind="threshold",
            criterion="every seed: target alignment tanh >= 0.97, ReLU <= 0.85; input alignment ReLU >= 0.90, tanh "
            "<= 0.72; accuracy 1.0",
            measured="; ".join(
                f"{name}: target {_span(rows['target_alignment'])}, input {_span(rows['input_alignment'])}, accuracy "
                f"at least {rows['accuracy'].min():.4f}"
                for name, rows in (("tanh", tanh), ("ReLU", relu))
            ),
            holds=bool(
                (tanh["target_alignment"] >= 0.97).all()
                and (relu["target_alignment"] <= 0.85).all()
                and (relu["input_alignment"] >= 0.90).all()
                and (tanh["input_alignment"] <= 0.72).all()
                and (tanh["accuracy"] == 1).all()
                and (relu["accuracy"] == 1).all()
            ),
            controls=tuple(
                f"kernels averaged over nets, {name}: target {rows['pooled_target_alignment'][0]:.3f}, input "
                f"{rows['pooled_input_alignment'][0]:.3f}; per net {_mean_sd(rows['target_alignment'])} and "
                f"{_mean_sd(rows['input_alignment'])}; mean loss {rows['loss'].mean():.2g}"
                for name, rows in (("tanh", tanh), ("ReLU", relu))
            ),
            note=_by_draw(data, "target_alignment", 0.85),
        )

    def _disentangled(self, data: Data) -> Claim:
        par = {name: where(data["unstructured"], nonlinearity=name)["parallelism"] for name in ("tanh", "relu")}
        rows = {name: where(data["xor"], nonlinearity=name, separability=0.5, noise=NOISE)["ccgp"] for name in par}
        return self.claim(
            "R2",
            "Tanh representations are more disentangled: higher parallelism, and generalisation across conditions.",
            kind="threshold",
            criterion="parallelism on unstructured inputs: tanh >= 0.75, ReLU <= 0.35; CCGP on nudged XOR at 0.5: tanh "
            ">= 0.95, ReLU <= 0.25; every seed",
            measured=f"parallelism tanh {_span(par['tanh'])}, ReLU {_span(par['relu'])}; CCGP tanh "
            f"{_span(rows['tanh'])}, ReLU {_span(rows['relu'])}",
            holds=bool(
                (par["tanh"] >= 0.75).all()
                and (par["relu"] <= 0.35).all()
                and (rows["tanh"] >= 0.95).all()
                and (rows["relu"] <= 0.25).all()
            ),
            note=_by_draw(data, "parallelism", 0.35),
        )

    def _separability(self, data: Data) -> Claim:
        levels, gaps = _gaps(data)
        accuracy = where(data["xor"], noise=NOISE)["accuracy"]
        return self.claim(
            "R3",
            "Tanh layers align more with the targets at every separability above 0, and not for pure XOR.",
            kind="threshold",
            criterion="mean target alignment, tanh less ReLU: >= 0.15 at separability 0.25, 0.5, 1; <= 0 at 0",
            measured=", ".join(f"{gap:+.2f} at {level:g}" for level, gap in zip(levels, gaps, strict=True)),
            holds=bool((gaps[levels > 0] >= 0.15).all() and (gaps[levels == 0] <= 0).all()),
            controls=(f"accuracy of all networks at least {accuracy.min():.3f}",),
        )

    def _exact(self, data: Data) -> Claim:
        table = data["closed_forms"]
        formula = float(np.abs(np.asarray(table["measured"]) - np.asarray(table["formula"])).max())
        trained = [data[name] for name in ("unstructured", "xor")]
        violation = max(float(np.max(part["violation"])) for part in trained)
        invariance = max(float(np.max(part["invariance"])) for part in trained)
        count = sum(len(part["seed"]) for part in trained)
        return self.claim(
            "R4",
            "Task alignments have closed forms, and three alignments obey the triangle inequality of angles.",
            kind="exact",
            criterion="c_xy equals sqrt(k/(n-1)) for n = 8, 16, 32, k = 1, b, and D^2/sqrt(2 + D^4) for D in {0, 0.25, "
            "0.5, 0.75, 1}, to 1e-12; triangle inequality never violated beyond 1e-9; alignment invariant to rotation, "
            "isotropic scale and translation of Z to 1e-10",
            measured=f"largest difference from the formulas {formula:.1e}; {count} trained layers: largest violation "
            f"{violation:.1e}, largest change under the three transformations together {invariance:.1e}",
            holds=formula <= 1e-12 and violation <= 1e-9 and invariance <= 1e-10,
        )

    def _saturation(self, data: Data) -> Claim:
        target = {
            name: where(data["unstructured"], nonlinearity=name)["target_alignment"][:2]
            for name in ("relu", *ABLATED, "tanh")
        }
        bounds = {
            "relu": (0.0, 0.85),
            "relu capped at 2": (0.0, 0.85),
            "relu capped at 1": (0.92, 1.0),
            "hard tanh": (0.96, 1.0),
            "tanh": (0.96, 1.0),
        }
        return self.claim(
            "R5",
            "It is saturation on both sides that gives a layer the geometry of its targets.",
            kind="threshold",
            criterion="target alignment, seeds 0 and 1: ReLU and ReLU capped at 2 <= 0.85; capped at 1 >= 0.92; hard "
            "tanh and tanh >= 0.96",
            measured="; ".join(f"{name} {_span(values)}" for name, values in target.items()),
            holds=all(
                bool(((values >= bounds[name][0]) & (values <= bounds[name][1] + 1e-9)).all())
                for name, values in target.items()
            ),
        )


def _one_hidden_layer(module: nn.Module) -> OneHiddenLayer:
    assert isinstance(module, OneHiddenLayer)  # the population was made of these
    return module


def _responses(net: OneHiddenLayer, task: AbstractClusters) -> Tensor:
    """Hidden responses to the noise-free centres, in float64."""
    with torch.no_grad():
        return net.responses(task.centres.float()).double()


def _paths(name: str, trained: Population, task: AbstractClusters) -> dict[str, Any]:
    """Weights of 24 units of the first network along the class axes, by step."""
    steps = list(trained.snapshots)
    weights = torch.stack([trained.snapshots[step].params["hidden.weight"][0] for step in steps])
    paths = weight_trajectories(weights[:, :48:2], task.axes())  # even units have a positive readout
    t, units, _ = paths.shape
    return {
        "path_nonlinearity": [name] * (t * units),
        "path_step": np.repeat(steps, units),
        "path_unit": np.tile(np.arange(units), t),
        "path_inter": paths[..., 0].flatten().numpy(),
        "path_intra": paths[..., 1].flatten().numpy(),
    }


def _violation(c_zx: float, c_zy: float, c_xy: float) -> float:
    """By how much the three angles break the triangle inequality, in radians."""
    zx, zy, xy = np.arccos(np.clip([c_zx, c_zy, c_xy], -1, 1))
    return float(max(0.0, zy - xy - zx, xy - zx - zy, zx - xy - zy))


def _invariance(z: Tensor, K_y: Tensor, before: float) -> float:
    """How far rotating, scaling and shifting the responses moves their alignment."""
    generator = torch.Generator().manual_seed(0)
    width = z.shape[1]
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=z.dtype)).Q
    moved = 3.7 * z @ rotation + torch.randn(width, generator=generator, dtype=z.dtype)
    return abs(float(kernel_alignment(moved @ moved.T, K_y)) - before)


def _closed_forms() -> dict[str, Any]:
    isotropic = [RandomKernelTask(n, k) for n in (8, 16, 32) for k in (1, n.bit_length() - 1)]
    nudged = [NudgedXOR(level, DIMENSION) for level in SEPARABILITIES]
    return {
        "task": [f"isotropic, n = {task.clusters}, k = {task.targets}" for task in isotropic]
        + [f"nudged XOR at {task.separability:g}" for task in nudged],
        "measured": [task.alignment() for task in (*isotropic, *nudged)],
        "formula": [(task.targets / (task.clusters - 1)) ** 0.5 for task in isotropic]
        + [level**2 / (2 + level**4) ** 0.5 for level in SEPARABILITIES],
    }


def _gaps(data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Separabilities, and mean target alignment of tanh less that of ReLU at each."""
    levels = np.unique(np.asarray(data["xor"]["separability"], dtype=float))
    tanh, relu = (
        np.array(
            [
                where(data["xor"], nonlinearity=name, separability=level, noise=NOISE)["target_alignment"].mean()
                for level in levels
            ]
        )
        for name in ("tanh", "relu")
    )
    return levels, tanh - relu


def _by_draw(data: Data, name: str, bound: float) -> str:
    """Which draws of the clusters take ReLU networks over their bound, by task alignment; empty if none does."""
    relu = where(data["unstructured"], nonlinearity="relu")
    over = relu[name] > bound
    if not over.any():
        return ""
    within = relu["task_alignment"][~over]
    return (
        f"ReLU networks are over {bound} on {over.sum()} of {len(over)} draws of the clusters, of task alignment "
        f"{_span(relu['task_alignment'][over])}; those within it have {_span(within) if len(within) else 'none'}. "
        "Random centres are not quite isotropic (0.577), and this number rises with the task alignment of the draw."
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _without(part: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name: column for name, column in part.items() if not name.startswith(prefix)}


def _span(values: np.ndarray) -> str:
    return f"{values.min():.3f}-{values.max():.3f}"


def _mean_sd(values: np.ndarray) -> str:
    return f"{values.mean():.3f} ± {values.std(ddof=1) if len(values) > 1 else 0:.3f}"
