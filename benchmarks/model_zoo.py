"""A zoo as a population against one model after another; its metrics beside PyHessian 0.1 and dnn-mode-connectivity.

Training: the desk zoo of the study `phase-model-zoo` (6 widths, 4 batch sizes, 3 seeds, 72 perceptrons on 1000 digits,
30 epochs) as `train_zoo` trains it, against plain PyTorch loops over the same networks: one that indexes tensors, the
quickest there is, one with a DataLoader, as training scripts are written, and one process for each model, which also
pays for starting. CPU time of one thread; loops train one network of each cell, processes one of each row of the grid,
and both are scaled up.

Curvature: largest eigenvalue and trace of the Hessian of trained networks, beside the dense Hessian and PyHessian,
by the defaults of both, and the trace with 2,000 probes from each.

Paths: the Bezier curve of one pair, beside the CurveNet of github.com/timgaripov/dnn-mode-connectivity, which is no
package: clone it, and pass its folder.

Run: `OMP_NUM_THREADS=1 python benchmarks/model_zoo.py [--curves dnn-mode-connectivity]` (a few minutes).
"""

import argparse
import contextlib
import io
import math
import resource
import subprocess
import sys
import time
import warnings
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from corollary.base.seeds import Seeds
from corollary.dynamics.landscape import curvature
from corollary.dynamics.mode_connectivity import PathValues, mode_connectivity
from corollary.dynamics.states import state_of
from corollary.dynamics.zoo import Recipe, train_zoo
from corollary.engine import batch_order, warmup_cosine
from corollary.linalg import hessian
from corollary.studies.dynamics.phase_model_zoo_networks import digits_or_images, perceptron

WIDTHS, BATCHES, SEEDS = (2, 4, 8, 16, 32, 64), (8, 32, 128, 512), 3
RECIPE = Recipe()
PROBES = 2000
Pair = tuple[Tensor, Tensor]


def train_one(width: int, batch_size: int, data: Pair, loader: bool) -> nn.Module:
    """One network in plain PyTorch."""
    net, (x, y) = perceptron(width), data
    steps = RECIPE.epochs * math.ceil(len(y) / batch_size)
    optimizer = torch.optim.SGD(
        net.parameters(), RECIPE.learning_rate, momentum=RECIPE.momentum, weight_decay=RECIPE.weight_decay
    )
    factor = warmup_cosine(steps, RECIPE.warmup)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(factor(step)))
    batches = DataLoader(TensorDataset(x, y), batch_size, shuffle=True) if loader else None
    for _ in range(RECIPE.epochs):
        rows = torch.randperm(len(y)).split(batch_size)
        for inputs, targets in batches or ((x[i], y[i]) for i in rows):
            optimizer.zero_grad()
            F.cross_entropy(net(inputs), targets).backward()
            optimizer.step()
            schedule.step()
    return net


def seconds_of_processes(width: int, batch_size: int) -> float:
    """CPU seconds of a process that trains one network with a DataLoader."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, __file__, "--one", str(width), str(batch_size)], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compare_training(data: Pair) -> None:
    """Models for each CPU minute, row by row of the grid and in all."""
    kinds = ("population", "loop over tensors", "loop with DataLoader", "process for each model")
    totals = dict.fromkeys(kinds, 0.0)
    models = len(WIDTHS) * SEEDS
    for batch in BATCHES:
        row = {}
        start = time.process_time()
        train_zoo(perceptron, data, WIDTHS, [batch], seeds=SEEDS, recipe=RECIPE)
        row[kinds[0]] = time.process_time() - start
        for kind, loader in ((kinds[1], False), (kinds[2], True)):
            start = time.process_time()
            for width in WIDTHS:
                train_one(width, batch, data, loader)
            row[kind] = (time.process_time() - start) * SEEDS
        row[kinds[3]] = seconds_of_processes(16, batch) * models
        print(f"batch {batch}: " + ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in row.items()))
        totals = {kind: totals[kind] + row[kind] for kind in kinds}
    rates = {kind: models * len(BATCHES) / seconds * 60 for kind, seconds in totals.items()}
    for kind, rate in rates.items():
        print(f"{kind}: {rate:.0f} models in a CPU minute, ratio {rates[kinds[0]] / rate:.1f}")


def compare_curvature(data: Pair) -> None:
    """Values of both beside the dense Hessian, and CPU times."""
    zoo = train_zoo(perceptron, data, [4, 8], [32, 128], seeds=1, recipe=RECIPE)
    for cell, trained in zoo.cells.items():
        net = trained.members.module(0).double()
        x, y = data[0].double(), data[1]
        exact = torch.linalg.eigvalsh(hessian(net, F.cross_entropy, (x, y), check=False).to_dense())
        largest, trace = float(exact[-1]), float(exact.sum())
        start = time.process_time()
        ours = curvature(net, F.cross_entropy, (x, y))
        seconds = time.process_time() - start
        longer = curvature(net, F.cross_entropy, (x, y), probes=PROBES).trace
        print(
            f"{cell.name}: dense {largest:.6g}, {trace:.6g}; ours off by {abs(ours.largest / largest - 1):.1e} and "
            f"{(ours.trace - trace) / ours.trace_error:+.1f} standard errors of {ours.trace_error / trace:.1%}, "
            f"{seconds:.2f} s, {longer / trace - 1:+.2%} with {PROBES} probes; "
            + peer_curvature(net, (x, y), largest, trace)
        )


def peer_curvature(net: nn.Module, data: Pair, largest: float, trace: float) -> str:
    """What PyHessian says of the same network, by its defaults."""
    try:
        peer = import_module("pyhessian")
    except ImportError:
        return "PyHessian is not installed"
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        start = time.process_time()
        told = peer.hessian(net, F.cross_entropy, data=data, cuda=False)
        top = told.eigenvalues()[0][0]
        estimates = told.trace()
        seconds = time.process_time() - start
        longer = told.trace(maxIter=PROBES, tol=0.0)
    return (
        f"PyHessian off by {abs(top / largest - 1):.1e} and {sum(estimates) / len(estimates) / trace - 1:+.1%} "
        f"({len(estimates)} probes), {seconds:.2f} s, {sum(longer) / len(longer) / trace - 1:+.2%} with {PROBES} probes"
    )


def compare_paths(data: Pair, folder: str) -> None:
    """Barriers of one pair on curves trained by both, on the same batches and positions."""
    sys.path.insert(0, folder)
    curves = import_module("curves")

    class Curved(nn.Module):
        def __init__(self, classes: int, fix_points: list[bool]):
            super().__init__()
            self.layers = nn.ModuleList(
                curves.Linear(a, b, fix_points=fix_points) for a, b in ((64, 16), (16, 16), (16, classes))
            )

        def forward(self, x: Tensor, coefficients: Tensor) -> Tensor:
            for layer in self.layers[:-1]:
                x = torch.relu(layer(x, coefficients))
            return self.layers[-1](x, coefficients)

    zoo = train_zoo(perceptron, data, [16], [32], seeds=2, recipe=RECIPE)
    ends = [zoo.module(16, 32, index) for index in (0, 1)]
    start = time.process_time()
    ours = mode_connectivity(ends[0], state_of(ends[0]), state_of(ends[1]), data)
    seconds = time.process_time() - start

    peer = curves.CurveNet(10, curves.Bezier, Curved, num_bends=3)
    for net, index in zip(ends, (0, 2), strict=True):
        peer.import_base_parameters(net, index)
    peer.init_linear()
    start = time.process_time()
    seeds, steps, size, n = Seeds(0), 150, 128, len(data[1])
    optimizer = torch.optim.SGD([p for p in peer.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    positions = torch.rand(steps, generator=seeds("positions on the curve"), dtype=torch.float64).tolist()
    for step, t in enumerate(positions):
        epoch, place = divmod(step, math.ceil(n / size))
        order = batch_order(seeds.integer("batches of the curve"), epoch, n)
        rows = order[place * size : (place + 1) * size]
        optimizer.zero_grad()
        F.cross_entropy(peer(data[0][rows], torch.tensor([t])), data[1][rows]).backward()
        optimizer.step()
    with torch.no_grad():
        outputs = [peer(data[0], torch.tensor([t], dtype=torch.float32)) for t in ours.curve.t.tolist()]
    errors = torch.stack([(one.argmax(1) != data[1]).double().mean() for one in outputs])
    losses = torch.stack([F.cross_entropy(one, data[1]) for one in outputs])
    theirs = PathValues(ours.curve.t, losses, errors)
    print(
        f"paths: mode connectivity {ours.mc:+.4f} (ours), {theirs.connectivity()[0]:+.4f} (dnn-mode-connectivity); "
        f"largest difference of a loss on the curve {float((losses - ours.curve.loss).abs().max()):.1e}; both paths "
        f"{seconds:.2f} s (ours), the curve alone {time.process_time() - start:.2f} s (theirs)"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", help="folder of a clone of dnn-mode-connectivity")
    parser.add_argument(
        "--one", nargs=2, type=int, metavar=("WIDTH", "BATCH"), help="train one network, and say nothing"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train, _ = digits_or_images(False)
    if arguments.one:
        train_one(arguments.one[0], arguments.one[1], train, loader=True)
        sys.exit()
    print(f"torch {torch.__version__}, one thread, CPU time")
    compare_training(train)
    compare_curvature(train)
    if arguments.curves:
        compare_paths(train, arguments.curves)
