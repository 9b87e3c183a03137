"""Interval, CROWN and alpha-CROWN bounds against auto_LiRPA, on the same weights and inputs.

784-256-256-256-10 perceptrons (ReLU, sigmoid, tanh, GELU) and a small convolutional network on 1 x 28 x 28 pixels, 32
samples, boxes of radius 0.02, one thread, float32, without setting up. Prints the mean width of the output bounds and
the CPU time of each, and the ratios. Aims: no wider; at most 0.6 of the time for CROWN and 0.5 for alpha-CROWN.
A network that the peer declines is bounded by ours alone.

The peer runs in a Python of its own, with torch and auto_LiRPA (written for 0.7.1):
`python benchmarks/linear_bounds.py --lirpa-python PATH [--iterations 20] [--networks relu conv ...]`
"""

import argparse
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

BATCH, RADIUS = 32, 0.02


def perceptron(activation: Callable[[], nn.Module]) -> nn.Sequential:
    """784-256-256-256-10."""
    hidden = [layer for a, b in pairwise((784, 256, 256, 256)) for layer in (nn.Linear(a, b), activation())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(256, 10))


def networks() -> dict[str, nn.Sequential]:
    """The networks by name, with the initial weights of seed 0."""
    torch.manual_seed(0)
    return {
        "relu": perceptron(nn.ReLU),
        "conv": nn.Sequential(
            nn.Conv2d(1, 16, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 49, 100),
            nn.ReLU(),
            nn.Linear(100, 10),
        ),
        "sigmoid": perceptron(nn.Sigmoid),
        "tanh": perceptron(nn.Tanh),
        "gelu": perceptron(nn.GELU),
    }


def timed(call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Best CPU time of several calls, and what the last returned."""
    best, found = float("inf"), None
    for _ in range(repeats):
        start = time.process_time()
        found = call()
        best = min(best, time.process_time() - start)
    return best, found


PEER = """
import sys, time, torch
from auto_LiRPA import BoundedModule, BoundedTensor
from auto_LiRPA.perturbations import PerturbationLpNorm
torch.set_num_threads(1)
sys.path.insert(0, {folder!r})
import linear_bounds as here
saved = torch.load({weights!r}, weights_only=True)
net = here.networks()[{name!r}]
net.load_state_dict(saved["net"])
x = saved["x"]
model = BoundedModule(net, x, bound_opts={{"optimize_bound_args": {{"iteration": {iterations}}}}})
box = BoundedTensor(x, PerturbationLpNorm(norm=float("inf"), eps=here.RADIUS))
rows = []
for method, repeats in (("IBP", 3), ("CROWN", 3), ("CROWN-Optimized", 1)):
    if {iterations} or method != "CROWN-Optimized":
        seconds, (lower, upper) = here.timed(lambda: model.compute_bounds(x=(box,), method=method), repeats)
        rows.append((method, seconds, float((upper - lower).mean())))
print("RESULT", rows)
"""


def peer(python: str, name: str, net: nn.Module, x: torch.Tensor, iterations: int) -> list[tuple[str, float, float]]:
    """What auto_LiRPA gives: method, seconds, mean width."""
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder) / "weights.pt")
        torch.save({"net": net.state_dict(), "x": x}, weights)
        script = PEER.format(folder=str(Path(__file__).parent), weights=weights, name=name, iterations=iterations)
        done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
    if line is None:
        print(f"the peer declines {name}: {done.stderr.strip().splitlines()[-1]}")
        return []
    return eval(line.removeprefix("RESULT "), {"__builtins__": {}})


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lirpa-python")
    parser.add_argument("--iterations", type=int, default=20, help="of alpha-CROWN; 0 leaves it out")
    parser.add_argument("--networks", nargs="*", default=list(networks()))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    from corollary.verify import BoundedGraph, Box

    x = torch.rand(BATCH, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    print("network  method        ours s   width     peer s   width     time    width")
    for name in arguments.networks:
        net = networks()[name]
        graph = BoundedGraph(net, x)
        box = Box(x - RADIUS, x + RADIUS)
        peers = []
        if arguments.lirpa_python:
            peers = peer(arguments.lirpa_python, name, net, x, arguments.iterations)
        for i, (method, repeats) in enumerate((("interval", 3), ("crown", 3), ("alpha-crown", 1))):
            if method == "alpha-crown" and not arguments.iterations:
                continue
            call = partial(graph.bounds, box, method=method, iterations=arguments.iterations)
            with torch.no_grad():
                seconds, (lower, upper) = timed(call, repeats)
            width = float((upper - lower).mean())
            line = f"{name:8} {method:12} {seconds:7.3f} {width:9.5f}"
            if peers:
                _, theirs, their_width = peers[i]
                line += f"  {theirs:7.3f} {their_width:9.5f}  {seconds / theirs:6.2f}  {width / their_width:7.4f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
