"""The mean-square threshold against simulated trajectories, and the exact trace against Hutchinson's of two peers.

Run: `OMP_NUM_THREADS=1 python benchmarks/mean_square_threshold.py` (needs `pip install 'corollary[peers]'`; a minute).
No library computes the threshold, so it is compared with 10,000 linearised trajectories: the second moment must fall at
0.9 of it and grow at 1.1. The trace of the Gauss-Newton matrix of a network of 10,000 parameters on 5,000 samples with
half squares is compared with curvlinops' and PyHessian's estimates, each from as many products as bring its standard
error to 2 %, whose number is found beforehand and is not timed. Processor time, one thread.
"""

import contextlib
import io
import math
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from curvlinops import GGNLinearOperator
from curvlinops.trace.hutchinson import hutchinson_trace
from pyhessian import hessian
from torch import Tensor, nn

from corollary.dynamics.losses import half_square
from corollary.dynamics.mean_square import mean_square_threshold
from corollary.dynamics.stability import fisher_trace, stability_report
from corollary.linalg import eigenpairs, ggn

TRAJECTORIES, STEPS, LATE = 10_000, 120, 40
SAMPLES, OUTPUTS = 5000, 1
WANTED = 0.02
REPEATS = 3


def timed(question: Callable[[], Any], repeats: int = 1) -> tuple[Any, float]:
    """The answer, and the processor time of the shortest of some runs."""
    best, answer = math.inf, None
    for _ in range(repeats):
        start = time.process_time()
        answer = question()
        best = min(best, time.process_time() - start)
    return answer, best


def growth(rows: Tensor, rate: float, batch_size: int, momentum: float, seed: int) -> float:
    """The factor by which the mean of the squared distance grows a step, at last, over simulated trajectories.

    That mean is soon carried by trajectories too rare to be among any number of independent ones. So after each step
    the trajectories are drawn anew in proportion to their squared distance, which is then set to 1: the mean factor of
    a step is unbiased for the second moment, and the rare ones are kept.
    """
    generator = torch.Generator().manual_seed(seed)
    n, p = rows.shape
    state = torch.randn(TRAJECTORIES, 2, p, generator=generator, dtype=rows.dtype)
    total = 0.0
    for step in range(STEPS):
        state = state / state.flatten(1).norm(dim=1)[:, None, None]
        now, before = state.unbind(dim=1)
        batch = rows[torch.randint(n, (TRAJECTORIES, batch_size), generator=generator)]
        slope = torch.einsum("tbp,tb->tp", batch, torch.einsum("tbp,tp->tb", batch, now)) / batch_size
        state = torch.stack([now + momentum * (now - before) - rate * slope, now], dim=1)
        weights = state.flatten(1).square().sum(dim=1)
        if step >= LATE:
            total += float(weights.mean().log())
        state = state[torch.multinomial(weights, TRAJECTORIES, replacement=True, generator=generator)]
    return math.exp(total / (STEPS - LATE))


def simulate() -> None:
    """Print on which side of 1 the simulated factor lies, below and above the threshold."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    right = total = 0
    for batch_size in (1, 2, 5):
        for momentum in (0.0, 0.5):
            rate, seconds = timed(lambda b=batch_size, m=momentum: mean_square_threshold(rows, b, momentum=m))
            (below, above), brute = timed(
                lambda b=batch_size, m=momentum, r=rate: [growth(rows, s * r, b, m, seed=1) for s in (0.9, 1.1)]
            )
            right += below < 1 < above
            total += 1
            print(
                f"batch {batch_size}, momentum {momentum}: threshold {rate:.4f}; growth a step {below:.4f} at 0.9 and "
                f"{above:.4f} at 1.1 of it; {brute / seconds:,.0f} times faster than two simulations"
            )
    print(f"signs agree in {right} of {total}")


def trained_network() -> tuple[nn.Module, Tensor, Tensor]:
    """About 10,000 parameters, some steps into fitting a smooth function."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 88), nn.Tanh(), nn.Linear(88, 78), nn.Tanh(), nn.Linear(78, OUTPUTS))
    x = torch.randn(SAMPLES, 32)
    y = torch.sin(x @ torch.randn(32, OUTPUTS) / 4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        half_square(net(x), y).backward()
        optimizer.step()
    return net.eval(), x, y


def curvlinops_trace(net: nn.Module, x: Tensor, y: Tensor, products: int) -> float:
    """Hutchinson's estimate; its sum-reduced squares carry a factor of two."""
    params = [p for p in net.parameters() if p.requires_grad]
    G = GGNLinearOperator(net, nn.MSELoss(reduction="mean"), params, [(x, y)], check_deterministic=False)
    return float(hutchinson_trace(G, products)) * OUTPUTS / 2


def pyhessian_trace(net: nn.Module, x: Tensor, y: Tensor, products: int) -> float:
    """Hutchinson's estimate of the trace of the Hessian, which is near that of G where the residuals are small."""
    with contextlib.redirect_stdout(io.StringIO()):
        return float(np.mean(hessian(net, half_square, data=(x, y), cuda=False).trace(maxIter=products, tol=0)))


def traces() -> None:
    """Print traces, their differences and the ratios of time."""
    net, x, y = trained_network()
    fisher_trace(net, half_square, (x[:100], y[:100]))  # the first pass sets things up
    trace, seconds = timed(lambda: fisher_trace(net, half_square, (x, y)), REPEATS)
    G = ggn(net, half_square, (x, y))
    frobenius = float(eigenpairs(G, 30, tolerance=1e-3).values.norm())
    products = max(2, int(2 * (frobenius / trace / WANTED) ** 2) + 1)
    count = sum(p.numel() for p in net.parameters())
    print(f"{count:,} parameters, {SAMPLES:,} samples: exact trace {trace:.5f} in {seconds:.2f} s")
    print(f"Hutchinson needs {products} products for a standard error of {WANTED:.0%}")
    report, spent = timed(lambda: stability_report(net, half_square, (x, y), None, 1, exact=False))
    with contextlib.redirect_stdout(io.StringIO()):
        top, peer_spent = timed(lambda: hessian(net, half_square, data=(x, y), cuda=False).eigenvalues(tol=1e-3)[0][0])
    print(
        f"largest eigenvalue {report.largest_eigenvalue:.5f}, PyHessian {top:.5f} of the Hessian: apart by "
        f"{abs(top / report.largest_eigenvalue - 1):.2%}; its power iteration {peer_spent:.2f} s, the whole report, "
        f"thresholds and all, {spent:.2f} s"
    )
    for name, package, peer in (
        ("curvlinops", "curvlinops-for-pytorch", curvlinops_trace),
        ("PyHessian", "PyHessian", pyhessian_trace),
    ):
        torch.manual_seed(1)
        estimate, spent = timed(lambda peer=peer: peer(net, x, y, products), REPEATS)
        print(
            f"{name} {version(package)}: {estimate:.5f}, off by {abs(estimate / trace - 1):.2%}, in {spent:.2f} s: "
            f"{spent / seconds:.1f} times the time"
        )


def main() -> None:
    """Both comparisons."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    simulate()
    traces()


if __name__ == "__main__":
    main()
