"""Time of a learning-rate sweep as one population against a plain PyTorch loop of runs, and how far they differ.

Catapults: 10 rates x 5 seeds of two-layer ReLU networks 20-64-1 and 20-512-1 on 10 samples, full batches, the loss of
every step kept. Benign oscillation: 10 rates x 5 seeds of the two-layer patch network (d = 400, m = 8), batches of one,
the residual of every step kept. Both sides see the same data, initial weights, rates and order of samples. CPU time of
one thread. Run: `python benchmarks/catapult_sweep.py`.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from corollary.base.seeds import Seeds
from corollary.dynamics.catapult import catapult_sweep
from corollary.dynamics.feature_noise import FeatureNoiseData, PatchSquaredReLU
from corollary.dynamics.losses import half_square
from corollary.dynamics.oscillation import benign_oscillation_sweep
from corollary.dynamics.quadratic_models import HomogeneousNet, sphere_points
from corollary.engine import batch_order, seeded

SEEDS = 5
CATAPULTS = tuple(np.linspace(0.5, 3.6, 10).tolist())
OSCILLATIONS = tuple(np.linspace(0.2, 1.6, 10).tolist())


def one_run(net: nn.Module, x: Tensor, y: Tensor, rate: float, order: list[slice | list[int]]) -> list[float]:
    """What one would write without a population: `torch.optim.SGD`, keeping the root of twice the loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=rate)
    losses = []
    for rows in order:
        optimizer.zero_grad()
        loss = half_square(net(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        losses.append((2 * float(loss.detach())) ** 0.5)
    return losses


def catapults(steps: int, width: int) -> tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]:
    """The sweep as one population, and as a loop."""
    x = sphere_points(10, 20, Seeds(0)("points"))
    y = torch.tensor([1.0, -1.0] * 5, dtype=torch.float64)
    make = partial(HomogeneousNet, 20, width)
    sweep = partial(catapult_sweep, make, x, y, CATAPULTS, steps=steps, seeds=SEEDS)
    rates = sweep(steps=0).learning_rate

    def together() -> np.ndarray:
        return np.sqrt(2 * sweep().record["loss"][:-1])

    def alone() -> np.ndarray:
        nets = [seeded(make, Seeds(0).integer(f"run {k % SEEDS}")) for k in range(len(rates))]
        whole: list[slice | list[int]] = [slice(None)] * steps
        return np.array([one_run(net, x, y, rate, whole) for net, rate in zip(nets, rates, strict=True)]).T

    return together, alone


def oscillations(steps: int) -> tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]:
    """The sweep as one population, and as a loop."""
    sweep = partial(benign_oscillation_sweep, OSCILLATIONS, seeds=SEEDS, steps=steps)

    def together() -> np.ndarray:
        return np.abs(sweep().record["residual"][:steps])

    def alone() -> np.ndarray:
        found = []
        for multiple in OSCILLATIONS:
            for index in range(SEEDS):
                stream = Seeds(0).child(f"run {index}")
                data = FeatureNoiseData(400, 100, seed=stream.integer("data"))
                net = PatchSquaredReLU(400, 8, stream.integer("weights"))
                epochs = [batch_order(stream.integer("order"), epoch, 100) for epoch in range(-(-steps // 100))]
                order: Any = [[row] for row in torch.cat(epochs)[:steps].tolist()]
                found.append(one_run(net, data.train.x, data.train.y, multiple * net.edge(1.0), order))
        return np.array(found).T

    return together, alone


def compare(name: str, together: Callable[[], np.ndarray], alone: Callable[[], np.ndarray]) -> None:
    """Print CPU seconds of both, their ratio, and the largest difference of any two values relative to the largest."""
    times, values = [], []
    for run in (together, alone):
        start = time.process_time()
        values.append(run())
        times.append(time.process_time() - start)
    # The runs oscillate and some are chaotic: rounding grows with the steps, so the first ones are compared.
    early = [value[:50] for value in values]
    difference = float(np.abs(early[0] - early[1]).max() / np.abs(early[1]).max())
    print(
        f"{name}: population {times[0]:.2f} s, loop {times[1]:.2f} s, ratio {times[1] / times[0]:.1f}, "
        f"largest relative difference over 50 steps {difference:.1e}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 50 networks, {arguments.steps} steps, one thread, CPU time, float64")
    for width in (64, 512):
        compare(f"catapults, width {width}", *catapults(arguments.steps, width))
    compare("benign oscillation", *oscillations(arguments.steps))
