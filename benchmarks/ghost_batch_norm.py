"""Ghost batch normalisation against the common form: split the batch, normalise each part, put them together.

Forward and backward pass, one thread, CPU time, the shortest of several runs. The other form is that of TabNet's and
timm's layers: `torch.chunk` and one BatchNorm1d. Aim: at least 3 times as fast at 4,096 samples, virtual batches of 64
and 512 features. Run: `python benchmarks/ghost_batch_norm.py`.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from corollary.dynamics.ghost_batch_norm import GhostBatchNorm1d

CASES = ((4096, 64, 512), (4096, 16, 128), (1024, 64, 64), (256, 16, 128))
"""Samples, virtual batch, features."""
ROUNDS = 30


class Chunked(nn.Module):
    """One BatchNorm1d applied to the parts of a batch."""

    def __init__(self, features: int, virtual_batch: int):
        super().__init__()
        self.norm, self.virtual_batch = nn.BatchNorm1d(features), virtual_batch

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.norm(part) for part in x.chunk(-(-len(x) // self.virtual_batch))])


def shortest(layer: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> float:
    """CPU seconds of one forward and backward pass."""
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        layer(x).backward(weight)
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    """Print one line a case."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("samples  virtual batch  features  largest difference  ours ms  chunks ms  times as fast")
    for samples, virtual_batch, features in CASES:
        x, weight = torch.randn(samples, features, requires_grad=True), torch.randn(samples, features)
        ours, chunked = GhostBatchNorm1d(features, virtual_batch), Chunked(features, virtual_batch)
        difference = float((ours(x) - chunked(x)).detach().abs().max())
        a, b = (1e3 * shortest(layer, x, weight) for layer in (ours, chunked))
        print(f"{samples:7} {virtual_batch:14} {features:9} {difference:19.1e} {a:8.2f} {b:10.2f} {b / a:14.2f}")


if __name__ == "__main__":
    main()
