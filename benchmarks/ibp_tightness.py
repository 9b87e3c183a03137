"""Local tightness against the paper's own code, and interval bounds against auto_LiRPA, on the same networks.

The paper's `compute_tightness` finds signs by K backward passes and evaluates each row by a forward pass of its own;
ours multiplies the gradients of K batched backward passes by the radii. Aims: tightness equal to 1e-5, at least as
fast; interval bounds equal to 1e-6. One thread, float32, both without setting up (for us, capture).

What the peers need:
    the paper's code: a clone of github.com/eth-sri/ibp-propagation-tightness, given as --official; run in this Python
    auto_LiRPA: a Python with torch and auto_LiRPA (written for 0.7.1), given as --lirpa-python
Without one of them its comparison is left out. Run: `python benchmarks/ibp_tightness.py --help`.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

BATCH, EPS, CLASSES = 128, 0.1, 10


def perceptron() -> nn.Sequential:
    """784-256-256-10."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, CLASSES)
    )


def convolutional() -> nn.Sequential:
    """Two convolutions, a hidden layer and a head on 28 x 28 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 49, 100),
        nn.ReLU(),
        nn.Linear(100, CLASSES),
    )


NETWORKS: dict[str, Callable[[], nn.Sequential]] = {"784-256-256-10": perceptron, "CNN3": convolutional}


def timed(work: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """The answer, and the median of the processor's seconds, after one pass to warm up."""
    answer = work()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return answer, statistics.median(seconds)


# ---------------------------------------------------------------------------------------------------------------- peers


def official_tightness(net: nn.Sequential, x: Tensor, y: Tensor, clone: str, repeats: int) -> tuple[Tensor, float]:
    """The paper's `compute_tightness`, mode "local"."""
    sys.path.insert(0, clone)
    # They read data sets and the command line's networks, which are not needed here, nor is what they import.
    for name, used in (("loaders", "get_loaders"), ("PARC_networks", "get_network"), ("utils", "seed_everything")):
        sys.modules[name] = types.ModuleType(name)
        setattr(sys.modules[name], used, None)
    from AIDomains.abstract_layers import Sequential
    from PI_functions import compute_tightness

    theirs = Sequential.from_concrete_network(net, x.shape[1:])
    return timed(lambda: compute_tightness(theirs, x, y, EPS, relu_adjust="local").detach(), repeats)


def lirpa_bounds(path: Path, repeats: int) -> None:
    """What runs in the process of auto_LiRPA: read networks and inputs, write bounds and seconds."""
    from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm

    given = torch.load(path)
    net = NETWORKS[given["network"]]()
    net.load_state_dict(given["weights"])
    x, low, high = given["x"], given["lower"], given["upper"]
    bounded = BoundedModule(net, x)
    region = BoundedTensor(x, PerturbationLpNorm(norm=float("inf"), x_L=low, x_U=high))
    with torch.no_grad():
        (lower, upper), seconds = timed(lambda: bounded.compute_bounds(x=(region,), method="IBP"), repeats)
    torch.save({"lower": lower, "upper": upper, "seconds": seconds}, path)


def asked_of_lirpa(
    name: str, net: nn.Sequential, x: Tensor, ends: tuple[Tensor, Tensor], python: str, repeats: int
) -> dict:
    """Run `lirpa_bounds` in its own Python.

    Raises: SystemExit, with what it printed, if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.pt"
        case = {"network": name, "weights": net.state_dict(), "x": x, "lower": ends[0], "upper": ends[1]}
        torch.save(case, path)
        command = [python, "-W", "ignore", __file__, "--worker", str(path), "--repeats", str(repeats)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"auto_LiRPA failed:\n{done.stderr[-2000:]}")
        return torch.load(path)


# ----------------------------------------------------------------------------------------------------------- comparison


def compare(name: str, official: str, lirpa: str, repeats: int) -> None:
    """All on one network."""
    from corollary.verify.interval_margins import IntervalNetwork, box_around, ibp_bounds
    from corollary.verify.tightness import propagation_tightness

    torch.manual_seed(0)
    net = NETWORKS[name]().eval()
    x, y = torch.rand(BATCH, 1, 28, 28), torch.randint(CLASSES, (BATCH,))
    network = IntervalNetwork(net, x[:2])

    def ours() -> Tensor:
        return propagation_tightness(network, x, EPS, y, dtype=torch.float32)

    found, seconds = timed(ours, repeats)
    print(f"{name}: mean tightness {float(found.mean()):.4f}, {1e3 * seconds:.1f} ms for {BATCH} samples")
    if official:
        theirs, peer_seconds = official_tightness(net, x, y, official, repeats)
        gap = float((theirs - found).abs().max())
        print(
            f"    the paper's code: {1e3 * peer_seconds:.1f} ms, {peer_seconds / seconds:.2f} times as long (aim: 1 or "
            f"more); largest difference {gap:.1e} (aim: 1e-5)"
        )
    if lirpa:
        ends = box_around(x, EPS)
        with torch.no_grad():
            (lower, upper), seconds = timed(lambda: ibp_bounds(network, *ends), repeats)
        peer = asked_of_lirpa(name, net, x, ends, lirpa, repeats)
        gap = max(float((lower - peer["lower"]).abs().max()), float((upper - peer["upper"]).abs().max()))
        largest = float(torch.maximum(lower.abs(), upper.abs()).max())
        print(
            f"    auto_LiRPA: interval bounds differ by {gap / largest:.1e} of the largest (aim: 1e-6); ours "
            f"{1e3 * seconds:.2f} ms, theirs {1e3 * peer['seconds']:.2f} ms, ratio {peer['seconds'] / seconds:.2f}"
        )


def main() -> None:
    """Read the command line and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", default="", help="folder of a clone of the paper's repository")
    parser.add_argument("--lirpa-python", default="", help="Python interpreter that has auto_LiRPA")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--worker", metavar="FILE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        lirpa_bounds(Path(arguments.worker), arguments.repeats)
        return
    print(f"torch {torch.__version__}, one thread, processor's seconds, median of {arguments.repeats}")
    for name in NETWORKS:
        compare(name, arguments.official, arguments.lirpa_python, arguments.repeats)


if __name__ == "__main__":
    main()
