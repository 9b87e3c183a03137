"""NC1 to NC4 and stable rank against plain references: values, and the ratio of times.

The reference for neural collapse is written out here in the manner of the script that goes with Papyan, Han and Donoho
2020: one pass over the batches for the class means, one for the covariances in full, then a truncated decomposition.
The stable rank is compared with WeightWatcher where it is installed (`pip install weightwatcher`), else with its
definition from two norms.

Run: `python benchmarks/collapse_metrics.py`. The aims are values equal to 1e-6 and a time no longer than that of the
reference.
"""

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import svds
from torch import Tensor, nn

from corollary.dynamics.collapse import collapse_of
from corollary.dynamics.ranks import rank_profile

BATCH, ROUNDS = 128, 3
SIZES = ((2000, 64, 10), (5000, 256, 10), (5000, 512, 100))
"""Samples, features, classes."""


def reference(h: Tensor, y: Tensor, weight: Tensor, predictions: Tensor) -> dict[str, float]:
    """The metrics from sums over batches, with the within-class covariance as a matrix."""
    count, width = int(y.max()) + 1, h.shape[1]
    total, number = torch.zeros(count, width, dtype=h.dtype), torch.zeros(count, dtype=h.dtype)
    for part, labels in zip(h.split(BATCH), y.split(BATCH), strict=True):
        for label in labels.unique().tolist():
            total[label] += part[labels == label].sum(0)
            number[label] += int((labels == label).sum())
    means = total / number[:, None]
    within, misses = torch.zeros(width, width, dtype=h.dtype), 0
    for part, labels, said in zip(h.split(BATCH), y.split(BATCH), predictions.split(BATCH), strict=True):
        for label in labels.unique().tolist():
            own = labels == label
            away = part[own] - means[label]
            within += torch.einsum("ni,nj->ij", away, away)
            distances = torch.linalg.vector_norm(part[own][:, None] - means[None], dim=2)
            misses += int((distances.argmin(1) != said[own]).sum())
    within /= len(h)
    centred = means - means.mean(0)
    decomposed: Any = svds((centred.T @ centred / count).numpy(), k=count - 1)
    vectors, values, _ = decomposed
    norms = centred.norm(dim=1)
    gram = (centred / norms[:, None]) @ (centred / norms[:, None]).T + 1 / (count - 1)
    gram.fill_diagonal_(0)
    return {
        "nc1": float(np.trace(within.numpy() @ vectors @ np.diag(1 / values) @ vectors.T)) / count,
        "nc2_angle": float(gram.abs().sum()) / (count * (count - 1)),
        "nc2_norm": float(norms.std() / norms.mean()),
        "nc3": float((weight / weight.norm() - centred / centred.norm()).norm() ** 2),
        "nc4": misses / len(h),
    }


def shortest(run: Callable[[], Any]) -> tuple[Any, float]:
    """The value, and the seconds of the fastest of several calls."""
    times, value = [], None
    for _ in range(ROUNDS):
        start = time.perf_counter()
        value = run()
        times.append(time.perf_counter() - start)
    return value, min(times)


def collapse() -> None:
    """Neural collapse of noisy clusters."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for samples, width, classes in SIZES:
        y = torch.randint(classes, (samples,), generator=generator)
        h = draw(classes, width)[y] + 1.5 * draw(samples, width)
        weight = draw(classes, width)
        predictions = (h @ weight.T).argmax(1)
        ours, seconds = shortest(
            lambda h=h, y=y, weight=weight, said=predictions: collapse_of(h, y, weight=weight, predictions=said)
        )
        plain, plain_seconds = shortest(lambda h=h, y=y, weight=weight, said=predictions: reference(h, y, weight, said))
        gap = max(abs(getattr(ours, name) - value) / max(abs(value), 1e-12) for name, value in plain.items())
        print(
            f"{samples} x {width}, {classes} classes: NC1 {ours.nc1:.6f}, largest relative difference {gap:.1e} (aim: "
            f"1e-6); ours {seconds * 1e3:.1f} ms, reference {plain_seconds * 1e3:.1f} ms, ratio "
            f"{seconds / plain_seconds:.3f} (aim: at most 1)"
        )


def stable_rank() -> None:
    """Stable rank of a perceptron's layers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 200), nn.ReLU(), nn.Linear(200, 100))
    ours, seconds = shortest(lambda: rank_profile(net).table()["stable"])
    if find_spec("weightwatcher"):
        import weightwatcher

        details, peer_seconds = shortest(lambda: weightwatcher.WeightWatcher(model=net).analyze(min_evals=1))
        values, peer = details["stable_rank"].tolist(), f"WeightWatcher {weightwatcher.__version__}"
    else:

        def definition() -> list[float]:
            weights = [layer.weight.detach().double() for layer in net if isinstance(layer, nn.Linear)]
            return [float((w.norm() / torch.linalg.matrix_norm(w, 2)) ** 2) for w in weights]

        (values, peer_seconds), peer = shortest(definition), "the definition (WeightWatcher is not installed)"
    gap = max(abs(a / b - 1) for a, b in zip(ours, values, strict=True))
    print(
        f"stable rank of 3 layers: largest relative difference from {peer} {gap:.1e} (aim: 1e-6); ours "
        f"{seconds * 1e3:.1f} ms with all ranks, there {peer_seconds * 1e3:.1f} ms, ratio {seconds / peer_seconds:.2f}"
    )


def main() -> None:
    """Both comparisons on one thread."""
    torch.set_num_threads(1)
    collapse()
    stable_rank()


if __name__ == "__main__":
    main()
