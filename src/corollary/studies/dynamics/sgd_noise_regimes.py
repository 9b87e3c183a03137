"""The study `sgd-noise-regimes`: the temperature at which SGD noise begins to matter falls with the training set."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from corollary.data import digits, load
from corollary.dynamics.fits import LinearFit, fit_linear, fit_power_law
from corollary.dynamics.noise_diagram import MeanFieldPerceptron, noise_phase_diagram
from corollary.dynamics.noise_perceptron import SCLOCCHI_2023, perceptron_noise
from corollary.dynamics.noise_table import PhaseTable, characteristic_temperature
from corollary.evidence import Claim, Data, Figure, Parts, Source, Study, Table, joined
from corollary.evidence.study import in_memory
from corollary.studies.dynamics import sgd_noise_regimes_pictures as pictures

CHIS = (0.0, 1.0, 3.0)
SCALED = (0.25, 1.0, 4.0)
"""Temperatures whose trajectories are compared; the one that is 1 is the reference."""
LAZY = 2.0**15
THRESHOLD = 0.1
"""Relative weight change that marks the characteristic temperature."""


class Setup(NamedTuple):
    """Sizes at one scale; the power laws are fitted to temperatures up to `scaling_below`."""

    perceptron_points: Mapping[float, tuple[int, ...]]
    perceptron_seeds: int
    hidden: int
    depth: int
    points: tuple[int, ...]
    scaling_below: float
    temperatures: tuple[float, ...]
    repeats: int
    max_steps: int
    batch_size: int
    phase_alphas: tuple[float, ...]
    phase_temperatures: tuple[float, ...]
    phase_points: int
    phase_steps: int


def _powers(*exponents: float) -> tuple[float, ...]:
    return tuple(2.0**exponent for exponent in exponents)


SETUPS = {
    "smoke": Setup(
        perceptron_points={0.0: (32, 64), 1.0: (32, 64), 3.0: (64, 128)},
        perceptron_seeds=2,
        hidden=16,
        depth=2,
        points=(32, 64),
        scaling_below=2.0**-3,
        temperatures=_powers(-6, -3, -1),
        repeats=2,
        max_steps=150,
        batch_size=8,
        phase_alphas=(1.0, 2.0**15),
        phase_temperatures=_powers(-5, -3),
        phase_points=32,
        phase_steps=75,
    ),
    "desk": Setup(
        perceptron_points={
            0.0: (128, 256, 512, 1024),
            1.0: (256, 512, 1024, 2048, 4096),
            3.0: (256, 512, 1024, 2048, 4096, 8192, 16384),
        },
        perceptron_seeds=6,
        hidden=64,
        depth=2,
        points=(128, 256, 512, 1024),
        scaling_below=2.0**-3,
        temperatures=_powers(-9, -7, -5, -3, -2, -1.5, -1),
        repeats=2,
        max_steps=3000,
        batch_size=16,
        phase_alphas=_powers(-6, -4, -2, 0, 2, 4, 8, 15),
        phase_temperatures=_powers(-9, -8, -7, -6, -5, -4, -3, -2),
        phase_points=256,
        phase_steps=1000,
    ),
    "paper": Setup(
        perceptron_points={
            0.0: (128, 256, 512, 1024, 2048),
            1.0: (256, 512, 1024, 2048, 4096, 8192, 16384),
            3.0: (256, 1024, 4096, 16384, 65536),
        },
        perceptron_seeds=20,
        hidden=128,
        depth=5,
        points=(1024, 2048, 4096, 8192, 16384),
        scaling_below=2.0**-3,
        temperatures=_powers(*range(-13, 3)),
        repeats=5,
        max_steps=300_000,
        batch_size=16,
        phase_alphas=_powers(*range(-10, 16)),
        phase_temperatures=_powers(*range(-13, 3)),
        phase_points=1024,
        phase_steps=100_000,
    ),
}


@dataclass(frozen=True)
class SgdNoiseRegimes(Study):
    """Temperature of SGD against the size of the training set: a perceptron with exact exponents, and networks."""

    dimension: int = 64
    """Of the perceptron's inputs."""

    slug: ClassVar[str] = "sgd-noise-regimes"
    room: ClassVar[str] = "dynamics"
    title: ClassVar[str] = "When SGD noise matters: temperature, training-set size, lazy and feature regimes"
    sources: ClassVar[tuple[Source, ...]] = (SCLOCCHI_2023,)

    def run(self, parts: Parts = in_memory) -> Data:
        """Perceptrons by depletion and size; networks by size and temperature; a map over scale and temperature."""
        setup = SETUPS[self.scale]
        perceptrons = [parts(f"perceptron chi {chi:g}", partial(self._perceptrons, chi)) for chi in CHIS]
        networks = [parts(f"networks {size}", partial(self._networks, size)) for size in setup.points]
        return {
            "perceptron": joined(perceptrons),
            "scaling": parts("scaling", self._scaling),
            "networks": joined(networks),
            "phase": parts("phase", self._phase),
        }

    def claims(self, data: Data) -> tuple[Claim, ...]:
        """C1 to C4 of the specification, from the stored tables alone."""
        return (
            self._exponent_claim(data["perceptron"]),
            self._scaling_claim(data["scaling"]),
            self._network_claim(data["networks"]),
            self._characteristic_claim(data["networks"]),
        )

    def figures(self, data: Data) -> tuple[Figure, ...]:
        """The perceptron's exponents, the networks' power laws, and the map of the regimes."""
        return (
            pictures.perceptron_figure(data["perceptron"]),
            pictures.network_figure(data["networks"], THRESHOLD),
            _as_table(data["phase"], SETUPS[self.scale]).figure(),
        )

    # ------------------------------------------------------------------------------------------------- measuring

    def _perceptrons(self, chi: float) -> dict[str, Any]:
        setup = SETUPS[self.scale]
        seeds = [self.seeds.integer(f"perceptron {number}") for number in range(setup.perceptron_seeds)]
        rows = []
        for size in setup.perceptron_points[chi]:
            run = perceptron_noise(size, 1.0, chi=chi, dimension=self.dimension, batch_size=4, seeds=seeds)
            rows += [
                (chi, size, number, *values)
                for number, values in enumerate(
                    zip(run.w1.tolist(), run.w_perp.tolist(), run.time.tolist(), run.finished.tolist(), strict=True)
                )
            ]
        return _columns(("chi", "points", "seed", "w1", "w_perp", "time", "finished"), rows)

    def _scaling(self) -> dict[str, Any]:
        """Trajectories of one batch sequence after 200 steps, or when all points are fitted."""
        seed = self.seeds.integer("scaling")
        sizes = (128, 1024)
        rows = []
        for size in sizes:
            run = perceptron_noise(size, SCALED, dimension=self.dimension, seeds=[seed] * len(SCALED), max_steps=200)
            reference = run.weights[SCALED.index(1.0)]
            gaps = (run.weights - torch.tensor(SCALED).double()[:, None] * reference).norm(dim=1) / reference.norm()
            rows += [(size, t, gap, steps) for t, gap, steps in zip(SCALED, gaps.tolist(), run.steps, strict=True)]
        return _columns(("points", "temperature", "gap", "steps"), rows)

    def _networks(self, size: int) -> dict[str, np.ndarray]:
        setup = SETUPS[self.scale]
        return self._diagram([LAZY], setup.temperatures, size, setup.repeats, setup.max_steps, "networks").columns

    def _phase(self) -> dict[str, np.ndarray]:
        setup = SETUPS[self.scale]
        temperatures, size, steps = setup.phase_temperatures, setup.phase_points, setup.phase_steps
        return self._diagram(setup.phase_alphas, temperatures, size, 1, steps, "phase").columns

    def _diagram(
        self,
        alphas: Sequence[float],
        temperatures: Sequence[float],
        size: int,
        repeats: int,
        max_steps: int,
        stream: str,
    ) -> PhaseTable:
        setup = SETUPS[self.scale]
        x, y = parity_images() if self.scale == "paper" else parity_digits()
        return noise_phase_diagram(
            _maker(x, setup),
            (x, y),
            alphas,
            temperatures,
            points=size,
            batch_size=setup.batch_size,
            width=setup.hidden,
            repeats=repeats,
            max_steps=max_steps,
            seed=self.seeds.integer(stream),
        )

    # ---------------------------------------------------------------------------------------------------- claims

    def _exponent_claim(self, table: Table) -> Claim:
        done = np.asarray(table["finished"], dtype=bool)
        ratio = np.divide(table["w1"], table["w_perp"])
        observables = {"w1/|w_perp|": ratio, "w1": np.asarray(table["w1"]), "t*": np.asarray(table["time"])}
        measured, holds = [], []
        for chi in CHIS:
            here = done & (np.asarray(table["chi"]) == chi)
            fits = {
                name: fit_power_law(np.asarray(table["points"])[here], values[here])
                for name, values in observables.items()
            }
            wanted, slow = 1 / (1 + chi), 1 + 2 / (1 + chi)
            measured.append(
                f"chi {chi:g}: "
                + ", ".join(f"{name} {f.exponent:.3f} [{f.low:.2f}, {f.high:.2f}]" for name, f in fits.items())
                + f" (predicted {wanted:.3g}, {wanted:.3g}, {slow:.3g})"
            )
            holds += [
                abs(fits["w1/|w_perp|"].exponent - wanted) <= 0.12,
                abs(fits["w1"].exponent - wanted) <= 0.15,
                0.65 <= fits["t*"].exponent / slow <= 1.15,
            ]
        return self.claim(
            "C1",
            "In a perceptron the signal must outgrow the noise to fit the last points: the ratio of informative to "
            "uninformative weights grows as the number of points to the power 1/(1 + chi), training time to the power "
            "1 + 2/(1 + chi).",
            kind="trend",
            criterion="chi = 0, 1, 3: exponent of w1/|w_perp| in P within 0.12 of 1, 0.5, 0.25; of w1 within 0.15 of "
            "the same; of t* between 0.65 and 1.15 of 3, 2, 1.5",
            measured="; ".join(measured) + f"; {int((~done).sum())} of {len(done)} runs unfinished",
            holds=all(holds),
        )

    def _scaling_claim(self, table: Table) -> Claim:
        excess = np.divide(table["gap"], table["temperature"])
        return self.claim(
            "C2",
            "At zero margin the temperature only scales the trajectory: w(T) = T w(1) for the same batches.",
            kind="exact",
            criterion="same batches, T = 0.25, 1, 4: |w(T) - T w(1)| / |w(1)| <= 1e-12 T after 200 steps",
            measured=f"largest gap over T: {float(np.max(excess)):.1e}, after {int(np.max(table['steps']))} steps",
            holds=bool((excess <= 1e-12).all()),
        )

    def _network_claim(self, table: Table) -> Claim:
        done, low = self._used(table)
        change, time = (_joint_fit(table, name, done & low) for name in ("weight_change", "time"))
        delta, gamma = change.coefficients["T"], change.coefficients["P"]
        late = time.coefficients
        return self.claim(
            "C3",
            "In a lazy network the weights move further the hotter SGD and the more points there are to fit, and "
            "training takes longer with both.",
            kind="threshold",
            criterion="relative weight change ~ T^delta P^gamma with delta in [0.7, 1.2], gamma in [0.12, 0.60]; t* "
            "with exponents in T in [0.6, 1.4], in P in [0.5, 2.0]; R^2 of both joint fits >= 0.90",
            measured=f"delta {delta:.3f}, gamma {gamma:.3f} (R^2 {change.r2:.3f}); t* T^{late['T']:.2f} "
            f"P^{late['P']:.2f} (R^2 {time.r2:.3f}); {int((done & low).sum())} of {int(low.sum())} networks finished",
            holds=0.7 <= delta <= 1.2
            and 0.12 <= gamma <= 0.60
            and 0.6 <= late["T"] <= 1.4
            and 0.5 <= late["P"] <= 2.0
            and min(change.r2, time.r2) >= 0.90,
        )

    def _characteristic_claim(self, table: Table) -> Claim:
        done, low = self._used(table)
        found = characteristic_temperature(_as_table(table, SETUPS[self.scale]), threshold=THRESHOLD)
        known = {size: value for size, value in found.items() if not math.isnan(value)}
        fit = fit_power_law(list(known), list(known.values())) if len(known) > 1 else None
        change = _joint_fit(table, "weight_change", done & low).coefficients
        return self.claim(
            "C4",
            "The temperature at which noise begins to change the network falls with the training set as a power law.",
            kind="trend",
            criterion="T_c(P) where the geometric mean of the relative weight change reaches 0.1: slope of log T_c in "
            "log P in [-0.75, -0.10]",
            measured=("no slope" if fit is None else f"slope {fit.exponent:.3f} (R^2 {fit.r2:.2f})")
            + "; T_c "
            + ", ".join(f"{value:.3g} at {size} points" for size, value in found.items()),
            holds=fit is not None and len(known) == len(found) and -0.75 <= fit.exponent <= -0.10,
            controls=(
                f"slope predicted by the power laws of the weight change: {-change['P'] / change['T']:.3f}",
                f"{int((~done).sum())} of {len(done)} networks unfinished and left out",
            ),
        )

    def _used(self, table: Table) -> tuple[np.ndarray, np.ndarray]:
        """Which networks finished, and which are at the temperatures of the power laws."""
        low = np.asarray(table["temperature"]) <= SETUPS[self.scale].scaling_below
        return np.asarray(table["finished"], dtype=bool), low


def parity_digits() -> tuple[Tensor, Tensor]:
    """All digits with labels 1 (even) and -1 (odd), pixels standardised by their one mean and deviation."""
    data = digits(torch.float64)
    assert data.test is not None  # the digits have a test part, and labels in both
    assert data.train.y is not None
    assert data.test.y is not None
    return _parity(torch.cat([data.train.x, data.test.x]), torch.cat([data.train.y, data.test.y]))


def parity_images() -> tuple[Tensor, Tensor]:
    """The same of MNIST's training images, on a GPU where there is one."""
    data = load("mnist", dtype=torch.float64)
    assert data.train.y is not None  # MNIST has labels
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return _parity(data.train.x.flatten(1).to(device), data.train.y.to(device))


def _parity(x: Tensor, digit: Tensor) -> tuple[Tensor, Tensor]:
    return (x - x.mean()) / x.std(), 1.0 - 2.0 * (digit % 2).to(x.dtype)


def _maker(x: Tensor, setup: Setup) -> Callable[[], MeanFieldPerceptron]:
    return lambda: MeanFieldPerceptron(x.shape[1], setup.hidden, setup.depth, x.dtype).to(x.device)


def _joint_fit(table: Table, observable: str, used: np.ndarray) -> LinearFit:
    logs = {name: np.log(np.asarray(table[name], dtype=float)[used]) for name in ("temperature", "points", observable)}
    return fit_linear({"T": logs["temperature"], "P": logs["points"]}, logs[observable])


def _as_table(table: Table, setup: Setup) -> PhaseTable:
    columns = {name: np.asarray(column) for name, column in table.items()}
    return PhaseTable(**columns, width=setup.hidden, batch_size=setup.batch_size)


def _columns(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, np.ndarray]:
    return {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
