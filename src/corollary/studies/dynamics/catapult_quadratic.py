"""The study `catapult-quadratic`: catapults between 2 and 4 over the top eigenvalue of the tangent kernel."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from corollary.data import digits
from corollary.dynamics.catapult import CatapultTable, catapult_sweep
from corollary.dynamics.quadratic_models import (
    LEWKOWYCZ_2020,
    MELTZER_2023,
    ZHU_2022,
    HomogeneousNet,
    PureQuadratic,
    QuadraticModel,
    UVRecursion,
    homogeneous_state,
    sphere_points,
)
from corollary.evidence import Claim, Data, Figure, Parts, Source, Study
from corollary.evidence.study import in_memory
from corollary.studies.dynamics import catapult_quadratic_pictures as pictures
from corollary.studies.dynamics.catapult_quadratic_measures import (
    TanhNet,
    first_paths,
    forces,
    pure_forms,
    rises_of_norm,
    top_eigenvalue,
    two_layers,
)

UV = (0.5, 1.5, 1.9, 2.1, 2.5, 3.0, 3.5, 3.9, 4.1, 4.5)
RELU = (1.0, 1.8, 2.5, 3.5)
SPARSE = (1.0, 2.5, 3.5, 4.2)
TAYLOR = (1.5, 2.5, 3.0)
SLOPES = {"ReLU": 0.0, "leaky ReLU": 0.1, "linear": 1.0}
PURE = "pure quadratic"
CATAPULTS = (2.5, 3.5)
BEYOND = 4.2
TARGETS = (0.0, 1.0)
"""Targets of the one sample on which the recursion is held against the network."""


@dataclass(frozen=True)
class CatapultQuadratic(Study):
    """Which learning rates catapult, what the weight norm does meanwhile, and what is left active afterwards."""

    runs: int = 3
    """Initial weights for each learning rate (five for the Taylor models)."""

    slug: ClassVar[str] = "catapult-quadratic"
    room: ClassVar[str] = "dynamics"
    title: ClassVar[str] = "Catapults: learning rates above the stable one, and how training survives them"
    sources: ClassVar[tuple[Source, ...]] = (MELTZER_2023, LEWKOWYCZ_2020, ZHU_2022)

    def run(self, parts: Parts = in_memory) -> Data:
        """Sweep the rate of uv, ReLU and Taylor models; check the recursion and the identity at every step."""
        uv = parts("uv", self._uv)
        relu = [parts(f"relu {kind}", partial(self._relu, kind)) for kind in ("zero", "signs")]
        identities = [parts(f"identity {model}", partial(self._identity, model)) for model in (*SLOPES, PURE)]
        recursion = [parts(f"recursion {target:g}", partial(self._recursion, target)) for target in TARGETS]
        return {
            "uv": {name: column for name, column in uv.items() if not name.startswith("path ")},
            "paths": {name.removeprefix("path "): c for name, c in uv.items() if name.startswith("path ")},
            "relu": {name: np.concatenate([part[name] for part in relu]) for name in relu[0]},
            "recursion": _rows(recursion),
            "identity": _rows(identities),
            "sparsity": parts("sparsity", self._sparsity),
            "beyond": parts("beyond", self._beyond),
            "starts": parts("starts", self._starts),
            "taylor": parts("taylor", self._taylor),
            "digits": parts("digits", self._digits),
        }

    def claims(self, data: Data) -> tuple[Claim, ...]:
        """C1 to C5 of the specification, from the stored tables alone."""
        return (
            self._window(data),
            self._exactness(data),
            self._weight_norm(data),
            self._sparser(data),
            self._taylor_claim(data),
        )

    def figures(self, data: Data) -> tuple[Figure, ...]:
        """Loss and curvature on the way, phases by rate, and activity by rate."""
        return pictures.figures(data)

    # ---------------------------------------------------------------------------------------------------------- runs

    def _sweep(self, make: Callable[[], nn.Module], x: Tensor, y: Tensor, multiples: Sequence[float], **options: Any):
        options = {"seeds": self.runs, "seed": self.seeds.integer("initial weights"), **options}
        return catapult_sweep(make, x, y, multiples, **options)

    def _points(self, name: str, samples: int, inputs: int) -> tuple[Tensor, Tensor]:
        """Inputs on a sphere, and fair signs."""
        generator = self.seeds(name)
        x = sphere_points(samples, inputs, generator)
        return x, torch.randint(2, (samples,), generator=generator).double() * 2 - 1

    def _uv(self) -> dict[str, Any]:
        width = self.pick(smoke=64, desk=512, paper=4096)
        x, y = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        found = self._sweep(
            partial(HomogeneousNet, 1, width, 1.0),
            x,
            y,
            UV,
            steps=self.pick(smoke=60, desk=3000, paper=3000),
            measures={"lambda_ntk": partial(top_eigenvalue, x=x, slope=1.0)},
        )
        return {
            **_columns(found),
            "output": np.sqrt(2 * found.record.last("loss")),
            **rises_of_norm(found),
            **first_paths(found),
        }

    def _relu(self, kind: str) -> dict[str, Any]:
        samples, inputs, width = self.pick(smoke=(4, 5, 64), desk=(10, 20, 512), paper=(10, 20, 4096))
        x, signs = self._points("two layers", samples, inputs)
        found = self._sweep(
            partial(HomogeneousNet, inputs, width),
            x,
            signs if kind == "signs" else torch.zeros_like(signs),
            RELU,
            steps=self.pick(smoke=30, desk=1500, paper=1500),
            measures={"lambda_ntk": partial(top_eigenvalue, x=x, slope=0.0)},
        )
        return {"labels": [kind] * len(found), **_columns(found), **rises_of_norm(found)}

    def _recursion(self, target: float) -> dict[str, Any]:
        """Largest relative errors of the two variables over 50 steps, where the output is below 1000.

        An output that has converged to zero is a sum of terms that cancel and has no correct digits in any program:
        its error is relative to the output at the start, where that is larger.
        """
        x, y = torch.ones(1, 1, dtype=torch.float64), torch.full((1,), target, dtype=torch.float64)
        width = self.pick(smoke=64, desk=512, paper=4096)
        measures = {
            "output": lambda members: homogeneous_state(members.params, x, 1.0).outputs[:, 0],
            "lambda_ntk": partial(top_eigenvalue, x=x, slope=1.0),
        }
        found = self._sweep(partial(HomogeneousNet, 1, width, 1.0), x, y, UV, steps=50, measures=measures)
        outputs, kernels = found.record["output"], found.record["lambda_ntk"]
        path = UVRecursion(width, target).run(
            torch.tensor(outputs[0]), torch.tensor(kernels[0]), torch.tensor(found.learning_rate), 50
        )
        small = (np.abs(outputs) < 1e3) & np.isfinite(outputs)
        errors = [
            float(
                np.max(np.abs(exact.numpy() - seen) / np.maximum(np.abs(seen), np.abs(seen[0])), where=small, initial=0)
            )
            for exact, seen in zip(path, (outputs, kernels), strict=True)
        ]
        return {"target": target, "compared": int(small.sum()), "output_error": errors[0], "kernel_error": errors[1]}

    def _identity(self, model: str) -> dict[str, Any]:
        """Every step of catapult runs: the change of the squared norm against the identity, over the squared norm."""
        samples, inputs, width = self.pick(smoke=(4, 5, 64), desk=(10, 20, 512), paper=(10, 20, 4096))
        steps = self.pick(smoke=20, desk=200, paper=200)
        x, y = self._points("identity", samples, inputs)
        make: Callable[[], nn.Module]
        if model == PURE:  # forms are independent of each other, and many of them share out the growth: two are enough
            make = partial(PureQuadratic, 2, self.pick(smoke=40, desk=200, paper=1000), seed=self.seed)
            x, y, state = torch.arange(2), y[:2], pure_forms
        else:
            make, state = partial(HomogeneousNet, inputs, width, SLOPES[model]), partial(two_layers, x, SLOPES[model])
        found = self._sweep(make, x, y, CATAPULTS, steps=steps, measures=forces(state, y))
        squared, rate = found.record["weight_norm"] ** 2, found.learning_rate
        pull, push = (found.record[name][:-1] for name in ("pull", "push"))
        wanted = -4 * rate * pull + rate**2 * push
        errors = np.abs(squared[1:] - squared[:-1] - wanted) / squared[:-1]
        return {
            "model": model,
            "steps": int(np.isfinite(errors).sum()),
            "error": float(np.nanmax(errors)),
            "largest_change": float(np.nanmax(np.abs(wanted) / squared[:-1])),
            "peak": float(found.peak.min()),
        }

    def _sparsity(self) -> dict[str, Any]:
        samples, inputs, width = self.pick(smoke=(8, 8, 64), desk=(64, 64, 1024), paper=(128, 64, 8192))
        x, y = self._points("activity", samples, inputs)
        steps = self.pick(smoke=10, desk=1500, paper=1500)
        return _columns(self._sweep(partial(HomogeneousNet, inputs, width), x, y, SPARSE, steps=steps))

    def _beyond(self) -> dict[str, Any]:
        """More initial weights at the rate above the window: how many of them survive it."""
        samples, inputs, width = self.pick(smoke=(8, 8, 64), desk=(64, 64, 1024), paper=(128, 64, 8192))
        x, y = self._points("activity", samples, inputs)
        seeds, steps = self.pick(smoke=1, desk=8, paper=20), self.pick(smoke=10, desk=500, paper=500)
        make = partial(HomogeneousNet, inputs, width)
        return _columns(self._sweep(make, x, y, (BEYOND,), steps=steps, seeds=seeds))

    def _starts(self) -> dict[str, Any]:
        """The peak at multiple 2.1 by the exact recursion, against the output at the start."""
        outputs = torch.linspace(0.05, 3, 60, dtype=torch.float64)
        width = self.pick(smoke=64, desk=512, paper=4096)
        path = UVRecursion(width).run(outputs, 2.0, 2.1 / 2, 500).outputs
        return {"output": outputs.numpy(), "peak": (path.abs().amax(0) / outputs).square().numpy()}

    def _taylor(self) -> dict[str, Any]:
        x, y = self._points("taylor", 8, 10)
        width = self.pick(smoke=16, desk=256, paper=2048)

        def make() -> nn.Module:
            return QuadraticModel(TanhNet(10, width))

        seeds, steps = self.pick(smoke=1, desk=5, paper=5), self.pick(smoke=5, desk=250, paper=250)
        return _columns(self._sweep(make, x, y, TAYLOR, seeds=seeds, steps=steps))

    def _digits(self) -> dict[str, Any]:
        """Zeros against ones in 20 principal components: the same sweep on real data."""
        samples, width = self.pick(smoke=(8, 32), desk=(40, 512), paper=(200, 4096))
        data = digits(torch.float64).train
        assert data.y is not None  # the digits have labels
        binary = data.y < 2
        x, y = data.x[binary].flatten(1), data.y[binary].double() * 2 - 1
        centred = x - x.mean(0)
        components = torch.linalg.svd(centred, full_matrices=False).Vh[:20]
        projected = centred[:samples] @ components.mT
        projected = projected * math.sqrt(20) / projected.norm(dim=1, keepdim=True)
        steps = self.pick(smoke=5, desk=600, paper=1500)
        return _columns(self._sweep(partial(HomogeneousNet, 20, width), projected, y[:samples], SPARSE, steps=steps))

    # -------------------------------------------------------------------------------------------------------- claims

    def _window(self, data: Data) -> Claim:
        uv, relu = (_arrays(data[name]) for name in ("uv", "relu"))
        lazy, diverging = uv["multiple"] < 2, uv["multiple"] > 4
        inside = ~lazy & ~diverging
        kept = np.abs(uv["kernel_ratio"] - 1)
        fast, slow = relu["multiple"] > 2, relu["multiple"] < 2
        real, starts = _arrays(data["digits"]), _arrays(data["starts"])
        enough = float(starts["output"][starts["peak"] >= 3].max(initial=0.0))
        return self.claim(
            "C1",
            "Gradient descent catapults for rates between 2 and 4 over the top eigenvalue of the tangent kernel, and "
            "not outside.",
            kind="threshold",
            criterion="uv networks: multiples below 2: peak loss ratio <= 1, top eigenvalue within 0.15 of its start; "
            "2.1 to 3.9: |z| < 1e-6, peak >= 3, rate times final eigenvalue < 2; 4.1 and 4.5: |z| > 1e6. Two-layer "
            "ReLU, zero and +-1 labels: 2.5 and 3.5: final loss ratio <= 1e-6, peak >= 3, rate times final eigenvalue "
            "< 2; 1 and 1.8: peak <= 1.05",
            measured=f"uv below 2: peak {uv['peak'][lazy].max():.3g}, eigenvalue off by up to {kept[lazy].max():.3f}; "
            f"2.1 to 3.9: |z| up to {uv['output'][inside].max():.1e}, peak from {uv['peak'][inside].min():.3g}, rate "
            f"times eigenvalue up to {uv['edge'][inside].max():.3f}; above 4: "
            f"{_count(uv['phase'][diverging] == 'divergent')} passed 1e6. ReLU at 2.5 and 3.5: final up to "
            f"{relu['final'][fast].max():.1e}, peak from {relu['peak'][fast].min():.3g}, rate times eigenvalue up to "
            f"{relu['edge'][fast].max():.3f}; at 1 and 1.8: peak up to {relu['peak'][slow].max():.4g}",
            holds=bool((uv["peak"][lazy] <= 1).all() and (kept[lazy] <= 0.15).all())
            and bool((uv["output"][inside] < 1e-6).all() and (uv["peak"][inside] >= 3).all())
            and bool((uv["edge"][inside] < 2).all() and (uv["phase"][diverging] == "divergent").all())
            and bool((relu["final"][fast] <= 1e-6).all() and (relu["peak"][fast] >= 3).all())
            and bool((relu["edge"][fast] < 2).all() and (relu["peak"][slow] <= 1.05).all()),
            controls=(
                "zeros against ones of the digits, 20 principal components, the same ReLU network: "
                + "; ".join(
                    f"{level:g}: {', '.join(sorted(set(real['phase'][real['multiple'] == level].tolist())))}"
                    for level in np.unique(real["multiple"])
                ),
                "uv peaks at 2.1: " + ", ".join(f"{peak:.3g}" for peak in uv["peak"][uv["multiple"] == 2.1]),
                f"by the exact recursion the peak at 2.1 is 3 or more where |z| starts at {enough:.2f} or less, as "
                f"{math.erf(enough / math.sqrt(2)):.0%} of initial weights have it",
            ),
            note="All phases are as claimed. Peaks are relative to the loss at the start, and just above the threshold "
            "(2.1) they are small enough for the number 3 to depend on the output that a seed happens to start from.",
        )

    def _exactness(self, data: Data) -> Claim:
        recursion, identity = (_arrays(data[name]) for name in ("recursion", "identity"))
        worst = max(recursion["output_error"].max(), recursion["kernel_error"].max())
        return self.claim(
            "C2",
            "The uv network is two variables, and the weight norm of degree-2 networks changes by an exact identity.",
            kind="exact",
            criterion="recursion against the network over 50 steps, while |z| < 1e3: relative error <= 1e-10; norm "
            "identity of ReLU, leaky ReLU, linear and pure quadratic models at every step of catapult runs: error <= "
            "1e-12 of the squared norm",
            measured=f"recursion: {worst:.1e} over {int(recursion['compared'].sum()):,} values, targets 0 and 1; "
            "identity: "
            + "; ".join(
                f"{model} {error:.1e} over {int(steps):,} steps (peaks from {peak:.3g})"
                for model, error, steps, peak in zip(
                    identity["model"], identity["error"], identity["steps"], identity["peak"], strict=True
                )
            ),
            holds=bool(worst <= 1e-10) and bool((identity["error"] <= 1e-12).all()),
            controls=(f"largest change of the squared norm in one step: {identity['largest_change'].max():.2g} of it",),
            note="Outputs are compared relative to the larger of their size and that at the start: what has converged "
            "to zero is a sum of terms that cancel. The identity is followed at multiples 2.5 and 3.5, the pure "
            "quadratic model with 2 samples: a first run, at 2.5 with 10, saw no catapult of that model.",
        )

    def _weight_norm(self, data: Data) -> Claim:
        uv, relu = (_arrays(data[name]) for name in ("uv", "relu"))
        zero = relu["labels"] == "zero"
        rises = int(uv["rises"].sum() + relu["rises"][zero].sum())
        steps = int(uv["judged"].sum() + relu["judged"][zero].sum())
        above = int(uv["rises_above"].sum() + relu["rises_above"][zero].sum())
        return self.claim(
            "C3",
            "With zero labels the weight norm never rises at a step where rate times top eigenvalue is below 4.",
            kind="exact",
            criterion="zero violations in all such steps of the runs of C1 with zero labels (tolerance 1e-9 relative)",
            measured=f"{rises} violations in {steps:,} steps",
            holds=rises == 0 and steps > 0,
            controls=(f"steps at or above 4 where the norm rose: {above}",),
        )

    def _sparser(self, data: Data) -> Claim:
        table = _arrays(data["sparsity"])
        survived = table["phase"] != "divergent"
        rows = [survived & (table["multiple"] == level) for level in SPARSE]
        active, dead = (np.array([_mean(table[name][row]) for row in rows]) for name in ("active", "dead"))
        spread = max(float(np.ptp(table["active"][row])) if row.any() else 0.0 for row in rows)
        short = table["final"] > 1e-4
        more = _arrays(data["beyond"])["phase"]
        return self.claim(
            "C4",
            "The activation map of ReLU networks gets sparser with the learning rate.",
            kind="trend",
            criterion="active share, mean over seeds: >= 0.48 at multiple 1, <= 0.47 at 2.5, <= 0.35 at 3.5, <= 0.33 "
            "at 4.2, non-increasing up to 0.02; every run reaches a loss ratio <= 1e-4",
            measured=", ".join(f"{share:.3f} at {level:g}" for share, level in zip(active, SPARSE, strict=True))
            + f" (runs that did not diverge); above 1e-4: {_count(short)} runs"
            + "".join(
                f", one at {level:g} ({phase})"
                for level, phase in zip(table["multiple"][short], table["phase"][short], strict=True)
            ),
            holds=bool((active - [1, 0.47, 0.35, 0.33] <= 0).all())
            and bool(active[0] >= 0.48 and (np.diff(active) <= 0.02).all() and not short.any()),
            controls=(
                f"largest difference between seeds: {spread:.3f}",
                "units that are active on no sample: "
                + ", ".join(f"{share:.3f} at {level:g}" for share, level in zip(dead, SPARSE, strict=True)),
                f"{len(more)} initial weights at {BEYOND:g}: {_count(more == 'divergent')} diverge",
            ),
            note=f"The multiple {BEYOND:g} lies beyond the window in which convergence is proved: some initial weights "
            "survive it, with the sparsest activations of all, and some diverge.",
        )

    def _taylor_claim(self, data: Data) -> Claim:
        table = _arrays(data["taylor"])
        fast = table["multiple"] > 2
        grown = int((table["peak"][fast] >= 1.5).sum())
        slow = float(table["peak"][~fast].max())
        return self.claim(
            "C5",
            "The second-order Taylor model of a tanh network catapults too.",
            kind="threshold",
            criterion="multiple 1.5: peak <= 1.05; 2.5 and 3: every run ends with a loss ratio <= 1e-4 and rate times "
            "top eigenvalue < 2; peak >= 1.5 in at least 6 of the 10 runs",
            measured=f"peak {slow:.4g} at 1.5; at 2.5 and 3: final up to {table['final'][fast].max():.1e}, rate times "
            f"eigenvalue up to {table['edge'][fast].max():.3f}, peak >= 1.5 in {grown} of {int(fast.sum())}",
            holds=slow <= 1.05
            and bool((table["final"][fast] <= 1e-4).all() and (table["edge"][fast] < 2).all())
            and grown >= 6,
            controls=(
                "peaks: "
                + "; ".join(
                    f"{level:g}: {', '.join(f'{p:.3g}' for p in table['peak'][table['multiple'] == level])}"
                    for level in np.unique(table["multiple"])
                ),
            ),
        )


def _columns(found: CatapultTable) -> dict[str, Any]:
    return dict(found.table())


def _rows(parts: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {name: [part[name] for part in parts] for name in parts[0]}


def _arrays(table: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(column) for name, column in table.items()}


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _count(flags: np.ndarray) -> str:
    return f"{int(flags.sum())} of {len(flags)}"
