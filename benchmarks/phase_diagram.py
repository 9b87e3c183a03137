"""Time of a 16 x 16 phase diagram, learning rate by initial scale, as one population and as one network after another.

256 perceptrons 64-32-10 on the digits, batches of 32, 1000 steps of SGD. The loop is the usual one of PyTorch: indexed
batches, cross-entropy, `torch.optim.SGD`. It is timed on 8 of the 256 cells, spread over the diagram, and its time is
scaled to 256. Both see the same initial weights and batches; the weights of those cells are compared. CPU time of one
thread, everything included. Run: `python benchmarks/phase_diagram.py`.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corollary.data import digits
from corollary.engine import batch_order, population, seeded

SIDE, BATCH, SAMPLED = 16, 32, 8
CLASSES, PIXELS, HIDDEN = 10, 64, 32


def make_net(dtype: torch.dtype) -> nn.Module:
    """The network of every cell."""
    return nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)).to(dtype)


def train_alone(
    data: tuple[Tensor, Tensor], seed: int, rate: float, scale: float, steps: int, dtype: torch.dtype
) -> nn.Module:
    """What one would write for one cell."""
    inputs, targets = data
    net = seeded(make_net, seed, dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= scale
    optimizer = torch.optim.SGD(net.parameters(), lr=rate)
    per_epoch = -(-len(inputs) // BATCH)
    order = torch.empty(0)
    for step in range(steps):
        epoch, position = divmod(step, per_epoch)
        if position == 0:
            order = batch_order(seed, epoch, len(inputs))
        rows = order[position * BATCH : (position + 1) * BATCH]
        optimizer.zero_grad()
        F.cross_entropy(net(inputs[rows]), targets[rows]).backward()
        optimizer.step()
    return net


def compare(dtype: torch.dtype, steps: int) -> dict[str, float]:
    """CPU seconds of both, the loop's scaled from the sample, and the largest difference between two weights."""
    inputs, targets = digits(dtype).train
    assert targets is not None  # the digits have labels
    rates = torch.logspace(-2, 0, SIDE, dtype=torch.float64).repeat_interleave(SIDE)
    scales = torch.logspace(-0.5, 0.5, SIDE, dtype=torch.float64).repeat(SIDE)
    cells = SIDE * SIDE
    begin = time.process_time()
    together = population(
        [seeded(make_net, seed, dtype) for seed in range(cells)],
        (inputs, targets),
        seeds=range(cells),
        learning_rate=rates,
        initial_scale=scales,
        batch_size=BATCH,
        steps=steps,
        record_every=steps,
    )
    batched = time.process_time() - begin
    chosen = range(SIDE // 2, cells, cells // SAMPLED + 1)
    begin = time.process_time()
    alone = {
        cell: train_alone((inputs, targets), cell, float(rates[cell]), float(scales[cell]), steps, dtype)
        for cell in chosen
    }
    loop = (time.process_time() - begin) * cells / len(chosen)
    difference = max(
        float((parameter.detach() - together.params[name][cell]).abs().max())
        for cell, net in alone.items()
        for name, parameter in net.named_parameters()
    )
    return {"cells timed": len(chosen), "loop": loop, "population": batched, "difference": difference}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    compare(torch.float32, 3)  # the first optimizer imports what it needs
    print(f"torch {torch.__version__}, {SIDE * SIDE} networks, {arguments.steps} steps, one thread, CPU time")
    for dtype in (torch.float32, torch.float64):
        rows = [compare(dtype, arguments.steps) for _ in range(arguments.repeats)]
        for row in rows:
            print(
                f"{dtype}: loop {row['loop']:.1f} s (scaled from {row['cells timed']:.0f} cells), population "
                f"{row['population']:.2f} s, ratio {row['loop'] / row['population']:.1f}, largest difference "
                f"{row['difference']:.1e}"
            )
        best = min(row["loop"] for row in rows) / min(row["population"] for row in rows)
        print(f"{dtype}: ratio of the shortest times {best:.1f}")
