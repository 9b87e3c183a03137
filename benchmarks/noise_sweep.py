"""Time of a sweep of SGD temperatures as one population against one run after the other, and whether they agree.

16 temperatures and 5 seeds, each run until it fits every point, in float64: perceptrons (256 points, chi = 0, zero
margin), and lazy networks (64-h-h-1, output scale 2^15, batches of 16) on the parity of 256 digits. A single run is a
plain PyTorch loop: a perceptron adds the wrong points of its batch, a network differentiates the hinge loss on it (the
outputs at the start are kept), and all points are looked at every 25 steps. Both see the same initial weights, points
and batches. A population makes as many steps as its longest member, so the ratio is largest where members end together
and a step of one network is too small to keep a core busy. CPU time of one thread.
Run: `python benchmarks/noise_sweep.py`.
"""

import argparse
import math
import time
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from corollary.base.seeds import Seeds
from corollary.dynamics.noise_diagram import CenteredModel, MeanFieldPerceptron, hinge, noise_phase_diagram
from corollary.dynamics.noise_perceptron import BLOCK, depleted_sign_data, perceptron_noise
from corollary.engine import batch_order, seeded
from corollary.engine.sampling import distinct_rows
from corollary.studies.dynamics.sgd_noise_regimes import LAZY, parity_digits

BATCH, CHECK = 16, 25
TEMPERATURES = [2.0**exponent for exponent in np.linspace(-9, -1.5, 16)]
DIMENSION, DRAWN = 64, 4


def make_net(hidden: int) -> nn.Module:
    """The network of the sweep."""
    return MeanFieldPerceptron(64, hidden, 2)


def single_network(
    data: tuple[Tensor, Tensor], hidden: int, repeat: int, temperature: float, points: int, most: int
) -> tuple[float, int]:
    """One run as one would write it: `(relative weight change, steps)`."""
    x, y = data
    seeds = Seeds(0)
    rows = torch.randperm(len(x), generator=seeds(f"points of repeat {repeat}"))[:points]
    x, y = x[rows], y[rows]
    start = seeded(make_net, seeds.integer(f"repeat {repeat}"), hidden)
    net = CenteredModel(start, LAZY, x).model
    with torch.no_grad():
        at_start = net(x)
    optimizer = torch.optim.SGD(net.parameters(), lr=temperature * hidden * BATCH / LAZY)
    order_seed, per_epoch = seeds.integer(f"batches of repeat {repeat}"), points // BATCH
    order, step = torch.empty(0), 0
    for step in range(most + 1):
        if step % CHECK == 0 or step == most:
            with torch.no_grad():
                if bool((LAZY * (net(x) - at_start) * y >= 1).all()):
                    break
        if step == most:
            break
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            order = batch_order(order_seed, epoch, points, "fresh", BATCH)
        batch = order[place * BATCH : (place + 1) * BATCH]
        optimizer.zero_grad()
        hinge(LAZY * (net(x[batch]) - at_start[batch]), y[batch]).backward()
        optimizer.step()
    before, after = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (start, net))
    return float((after - before).norm() / before.norm()), step


def single_perceptron(seed: int, temperature: float, points: int) -> Tensor:
    """One run as one would write it: the weights at the end."""
    x, y = depleted_sign_data(points, DIMENSION, 0.0, seed)
    signed = x * y[:, None] / math.sqrt(DIMENSION)
    generator = Seeds(seed)("perceptron batches")
    weights, step = torch.zeros(DIMENSION, dtype=torch.float64), 0
    drawn = torch.empty(0)
    while step % CHECK or bool((signed @ weights <= 0).any()):
        if step % BLOCK == 0:
            drawn = distinct_rows(points, DRAWN, BLOCK, generator)
        rows = signed[drawn[step % BLOCK]]
        weights += temperature * ((rows @ weights <= 0).to(rows.dtype) @ rows)
        step += 1
    return weights


def networks(hidden: int, repeats: int, points: int, most: int) -> dict[str, float]:
    """CPU seconds of both for networks, and the largest difference of what they measured."""
    data = parity_digits()
    begin = time.process_time()
    table = noise_phase_diagram(
        partial(make_net, hidden),
        data,
        [LAZY],
        TEMPERATURES,
        points=points,
        batch_size=BATCH,
        width=hidden,
        repeats=repeats,
        max_steps=most,
        check_every=CHECK,
        kernel_points=0,
    )
    together = time.process_time() - begin
    begin = time.process_time()
    alone = [
        single_network(data, hidden, int(repeat), float(temperature), points, most)
        for repeat, temperature in zip(table.repeat, table.temperature, strict=True)
    ]
    loop = time.process_time() - begin
    change, steps = (np.array(column) for column in zip(*alone, strict=True))
    difference = float(np.max(np.abs(change - table.weight_change) / change)) + int((steps != table.steps).sum())
    return {
        "steps": int(steps.sum()),
        "longest": int(steps.max()),
        "loop": loop,
        "population": together,
        "difference": difference,
    }


def perceptrons(repeats: int, points: int) -> dict[str, float]:
    """The same for perceptrons."""
    cells = [(seed, temperature) for seed in range(repeats) for temperature in TEMPERATURES]
    seeds, temperatures = (list(column) for column in zip(*cells, strict=True))
    begin = time.process_time()
    run = perceptron_noise(points, temperatures, dimension=DIMENSION, batch_size=DRAWN, seeds=seeds)
    together = time.process_time() - begin
    begin = time.process_time()
    alone = torch.stack([single_perceptron(seed, temperature, points) for seed, temperature in cells])
    loop = time.process_time() - begin
    difference = float(((alone - run.weights).norm(dim=1) / alone.norm(dim=1)).max())
    return {
        "steps": int(run.steps.sum()),
        "longest": int(run.steps.max()),
        "loop": loop,
        "population": together,
        "difference": difference,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--points", type=int, default=256)
    parser.add_argument("--most", type=int, default=1000)
    parser.add_argument("--times", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    single_network(parity_digits(), 8, 0, 0.01, 32, 5)  # the first optimizer imports what it needs
    print(f"torch {torch.__version__}, {16 * arguments.repeats} runs, float64, one thread, CPU time")
    cases = {"perceptrons": partial(perceptrons, arguments.repeats, arguments.points)}
    for hidden in (16, 32, 64):
        cases[f"networks 64-{hidden}-{hidden}-1"] = partial(
            networks, hidden, arguments.repeats, arguments.points, arguments.most
        )
    for name, case in cases.items():
        rows = [case() for _ in range(arguments.times)]
        loop, together = (min(row[key] for row in rows) for key in ("loop", "population"))
        print(
            f"{name}: {rows[0]['steps']} steps in all, {rows[0]['longest']} of the longest, loop {loop:.2f} s, "
            f"population {together:.2f} s (shortest of {len(rows)}), ratio {loop / together:.1f}, largest relative "
            f"difference {rows[0]['difference']:.1e}"
        )
