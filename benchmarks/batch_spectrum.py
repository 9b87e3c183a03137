"""Moments of a Hessian's spectrum, time and memory, against PyHessian 0.1 and curvlinops 3.0.1; and a range test.

Run: `OMP_NUM_THREADS=1 python benchmarks/batch_spectrum.py` (needs `pip install 'corollary[peers]'`; some minutes).

Moments: a 64-32-10 tanh network (2,410 parameters) after three epochs on the digits, float32; moments 1 to 4 of the
spectrum against those of the exact Hessian in float64, at the same number of Hessian-vector products for everyone, as
root mean square relative errors over seeds. PyHessian runs twice: as it is by default (one long Lanczos run), and with
its products spread over many probes, the better use of it for moments. curvlinops is given the ends of the spectrum.

Memory: what one Hessian-vector product needs beyond the network and its data, over what a gradient needs; each in a
process of its own. Range test: the rate picked by training with growing rates, and by one Lanczos run.
"""

import argparse
import math
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from corollary.base.seeds import Seeds
from corollary.data import digits
from corollary.dynamics.hessian_spectrum import outliers_and_bulk
from corollary.dynamics.largest_learning_rate import largest_stable_learning_rate
from corollary.engine import batch_order, cross_entropy, fit, seeded
from corollary.linalg import eigenpairs, hessian

MOMENTS = (1, 2, 3, 4)
PRODUCTS = 100
Method = Callable[[nn.Module, Tensor, Tensor, int], list[float]]
"""(network, inputs, targets, seed) -> moments 1 to 4"""


def tanh_network() -> nn.Module:
    """The network whose spectrum is measured."""
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """The network some steps into training on centred digits."""
    data = digits()
    assert data.train.y is not None  # the digits have labels
    x, y = data.train.x - data.train.x.mean(0), data.train.y
    net = fit(
        seeded(tanh_network, 0),
        (x, y),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        epochs=3,
        batch_size=64,
    ).module
    return net, x, y


def ours(net: nn.Module, x: Tensor, y: Tensor, seed: int) -> list[float]:
    """Outliers one by one, then few steps with many probes of what they leave."""
    generator = torch.Generator().manual_seed(seed)
    op = hessian(net, nn.functional.cross_entropy, (x, y), check=False)
    found = outliers_and_bulk(op, 10, steps=3, probes=15, search_steps=40, tolerance=1e-3, generator=generator)
    if found.products > PRODUCTS:
        raise AssertionError(f"{found.products} products; the race is over {PRODUCTS}")
    return [found.moment(p).value for p in MOMENTS]


def pyhessian(steps: int) -> Method:
    """PyHessian's stochastic Lanczos quadrature with so many steps a probe."""
    from pyhessian import hessian as PyHessian

    def old_eig(matrix: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
        """`torch.eig`, which PyHessian calls and PyTorch no longer has."""
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack([values, torch.zeros_like(values)], dim=1), vectors

    torch.eig = old_eig  # type: ignore[attr-defined]  # restores what PyHessian 0.1 was written for

    def method(net: nn.Module, x: Tensor, y: Tensor, seed: int) -> list[float]:
        torch.manual_seed(seed)
        their = PyHessian(net, nn.functional.cross_entropy, data=(x, y), cuda=False)
        nodes, weights = their.density(iter=steps, n_v=PRODUCTS // steps)
        values, shares = np.asarray(nodes, dtype=float), np.asarray(weights, dtype=float)
        net.zero_grad(set_to_none=True)
        return [float((shares * values**p).sum(1).mean()) for p in MOMENTS]

    return method


def curvlinops(edges: tuple[float, float]) -> Method:
    """curvlinops' smoothed density, integrated."""
    from curvlinops import HessianLinearOperator, lanczos_approximate_spectrum

    def method(net: nn.Module, x: Tensor, y: Tensor, seed: int) -> list[float]:
        torch.manual_seed(seed)
        params = list(net.parameters())
        their = HessianLinearOperator(net, nn.CrossEntropyLoss(), params, [(x, y)], check_deterministic=False)
        grid, density = lanczos_approximate_spectrum(their, PRODUCTS // 2, num_repeats=2, boundaries=edges)
        grid, density = grid.double(), density.double()
        return [float(torch.trapezoid(density * grid**p, grid)) for p in MOMENTS]

    return method


def moments(seeds: int) -> None:
    """Errors and times of everyone."""
    net, x, y = problem()
    exact_op = hessian(seeded(tanh_network, 0).double(), nn.functional.cross_entropy, (x.double(), y),
                       params={name: p.detach().double() for name, p in net.named_parameters()})  # fmt: skip
    spectrum = torch.linalg.eigvalsh(exact_op.to_dense())
    exact = np.array([float((spectrum**p).mean()) for p in MOMENTS])
    print(f"{len(spectrum)} parameters, eigenvalues {spectrum[0]:.4g} to {spectrum[-1]:.4g}; {PRODUCTS} products each")
    edges = (float(spectrum[0]), float(spectrum[-1]))
    methods: dict[str, Method] = {
        "corollary": ours,
        f"PyHessian {version('PyHessian')}, 1 probe of 100 steps": pyhessian(PRODUCTS),
        f"PyHessian {version('PyHessian')}, 20 probes of 5 steps": pyhessian(5),
        f"curvlinops {version('curvlinops-for-pytorch')}, 2 probes of 50 steps": curvlinops(edges),
    }
    mine: tuple[np.ndarray, float] | None = None
    for name, method in methods.items():
        method(net, x, y, 0)  # the first run pays for what is loaded
        start = time.process_time()
        found = np.array([method(net, x, y, seed) for seed in range(1, seeds + 1)])
        seconds = (time.process_time() - start) / seeds
        errors = np.sqrt(((found / exact - 1) ** 2).mean(0))
        mine = mine or (errors, seconds)  # ours comes first
        ratios = ", ".join(f"{a / b:.3f}" for a, b in zip(mine[0], errors, strict=True))
        print(f"{name:45s} {seconds:6.3f} s; errors " + ", ".join(f"{error:.2%}" for error in errors))
        print(f"{'':45s} ours over theirs: errors {ratios}; time {mine[1] / seconds:.2f}")


def memory_of(what: str) -> float:
    """Peak resident megabytes beyond network and data, of a gradient or of a Hessian-vector product (in a child)."""
    command = [sys.executable, __file__, "--memory-of", what]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_memory(what: str) -> None:
    """Print the rise of the peak."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    x, y = torch.randn(20000, 784), torch.randint(10, (20000,))
    op = hessian(net, cross_entropy, (x[:64], y[:64])) if what == "product" else None  # loads what is needed
    before = peak()
    if op is None:
        torch.autograd.grad(cross_entropy(net(x), y), list(net.parameters()))
    else:
        _ = hessian(net, cross_entropy, (x, y), check=False) @ torch.ones(op.shape[0])
    print(peak() - before)


def peak() -> float:
    """Peak resident mebibytes of this process (Linux; getrusage would start from the peak of the parent)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError("/proc/self/status has no VmHWM: this measurement needs Linux")
    return int(found.group(1)) / 1024


def memory() -> None:
    """Of a product against a gradient."""
    gradient, product = memory_of("gradient"), memory_of("product")
    print(f"memory, 784-512-512-10 on 20,000 samples: gradient {gradient:.0f} MiB, Hessian-vector product "
          f"{product:.0f} MiB, ratio {product / gradient:.2f}")  # fmt: skip


def relu_network() -> nn.Module:
    """The network a learning rate is sought for."""
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def range_test(batch_size: int = 64, steps: int = 100, low: float = 1e-4, high: float = 32.0) -> None:
    """A rate from training with exponentially growing rates, and from one Lanczos run on a batch."""
    _, x, y = problem()
    seed = Seeds(0).integer("range test")
    net = seeded(relu_network, seed)
    start, rows = seeded(relu_network, seed), batch_order(seed, 0, len(x))[:batch_size]
    smoothed, curve, rates = 0.0, [], np.geomspace(low, high, steps)
    for step, rate in enumerate(rates):
        epoch, place = divmod(step, len(x) // batch_size)
        picked = batch_order(seed, epoch, len(x))[place * batch_size :][:batch_size]
        loss = cross_entropy(net(x[picked]), y[picked])
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for p, g in zip(net.parameters(), gradients, strict=True):
                p -= float(rate) * g
        smoothed = 0.9 * smoothed + 0.1 * float(loss.detach())
        curve.append(smoothed / (1 - 0.9 ** (step + 1)))
        if not math.isfinite(curve[-1]) or curve[-1] > 4 * min(curve):
            break
    slopes = np.gradient(np.array(curve), np.log(rates[: len(curve)]))
    steepest, blown = float(rates[int(np.nanargmin(slopes))]), float(rates[len(curve) - 1])
    op = hessian(start, cross_entropy, (x[rows], y[rows]))
    top = eigenpairs(op, 1, tolerance=1e-2, generator=torch.Generator().manual_seed(0))
    grid = [2.0 ** (k / 2) for k in range(-6, 11)]
    trained = largest_stable_learning_rate(relu_network, (x, y), [batch_size], grid, seeds=3)
    print(f"batch {batch_size}: range test picks {steepest:.3g} (loss explodes at {blown:.3g}) with {len(curve)} "
          f"gradients; 2 / eigenvalue gives {2 / float(top.values):.3g} with {top.products} products (about "
          f"{2 * top.products + 1} gradients); the largest rate that trains is {float(trained.largest[0]):.3g}, found "
          f"with {3 * len(grid) * trained.steps} gradients")  # fmt: skip


def main() -> None:
    """All three."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--memory-of", choices=("gradient", "product"), default=None, help="used by the script itself")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        measure_memory(options.memory_of)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        moments(options.seeds)
    memory()
    range_test()


if __name__ == "__main__":
    main()
