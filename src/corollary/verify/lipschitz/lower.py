"""Lower bounds of a Lipschitz constant: the largest slope found, and for small networks the largest there is."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.network import call, evaluating
from corollary.base.progress import track
from corollary.graph import Graph
from corollary.verify.lipschitz.constraints import Norm
from corollary.verify.lipschitz.reading import input_shape, system_of
from corollary.verify.lipschitz.system import System

CHUNK = 4096
ROUNDS, KEPT, TRIED = 20, 32, 32
"""Of the local search: rounds, the points that are kept after each, and the points tried around each of these."""
MOST_PATTERNS = 1 << 17


def lipschitz_lower(
    model: nn.Module,
    norm: Norm = "l2",
    samples: int = 200_000,
    refine: bool = True,
    *,
    output: int | None = None,
    example: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> float:
    r"""The largest slope that was found: the largest norm of the Jacobian at random inputs.

    Inputs are Gaussian, with lengths over four orders of magnitude, because biases matter near zero only. A network
    that is differentiable almost everywhere has its Lipschitz constant as the supremum of these norms, so that any of
    them is a lower bound; at a kink the derivative that PyTorch takes is that of a neighbouring piece.

    Args:
        samples: inputs drawn. refine: then search around the best of them, at ever smaller distances.
        output: for "linf", the output that is meant; by default the one of the largest slope.
        example: an input batch, where the input's shape is not that of the first linear layer.
        generator: of the draws; by default one that starts from 0.
    Returns: for "l2" the largest singular value; for "linf" the largest absolute row sum.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    shape, like = input_shape(model, example), next(model.parameters(), torch.zeros(()))
    best, points = torch.zeros(0, dtype=torch.float64), torch.zeros(0, *shape, dtype=like.dtype)
    with evaluating(model):
        for size in track(_sizes(samples, CHUNK), "slopes at random inputs"):
            x = _spread(torch.randn(size, *shape, generator=generator, dtype=torch.float64), 1e-2, 1e2, generator)
            best, points = _best(best, points, *_slopes(model, x.to(like.dtype), norm, output))
        for round in track(range(ROUNDS if refine else 0), "slopes around the largest"):
            steps = torch.randn(len(points) * TRIED, *shape, generator=generator, dtype=torch.float64)
            reach = points.flatten(1).norm(dim=1).repeat_interleave(TRIED) / math.sqrt(points[0].numel())
            steps = _spread(steps, 1e-3 * 0.8**round, 1.0 * 0.8**round, generator)
            steps = steps * reach.reshape(-1, *(1,) * len(shape)).to(steps)
            x = points.repeat_interleave(TRIED, dim=0) + steps.to(points)
            best, points = _best(best, points, *_slopes(model, x, norm, output))
    return float(best[0])


def lipschitz_enumerate(
    model: nn.Module | Graph | System, max_groups: int = 12, *, example: Tensor | None = None
) -> float:
    r"""The largest norm over all patterns of a piecewise-linear network, $\max \|W_L D_{L-1} \cdots D_1 W_1\|_2$.

    The l2 Lipschitz constant itself where every pattern is reached by some input, and else between it and the bounds.

    Raises: BadInput, for more than `max_groups` groups, for one that is not piecewise linear or of too many patterns.
    """
    system = system_of(model, example)
    choices = []
    for index, unit in enumerate(system.units):
        selections = unit.nonlinearity.selections
        if selections is None or system.is_implicit(index):
            raise BadInput(f"{unit.nonlinearity.name} has no finite list of linear pieces to go through")
        choices.append((selections, unit.nonlinearity.encoding("eliminate").push.shape[1] // selections.shape[1]))
    groups = sum(count for _, count in choices)
    radix = torch.cat([torch.full((count,), len(selections)) for selections, count in choices])
    patterns = math.prod(radix.tolist())
    if groups > max_groups or patterns > MOST_PATTERNS:
        raise BadInput(
            f"{groups} groups have {patterns} patterns; at most {max_groups} groups (max_groups) and {MOST_PATTERNS} "
            "patterns are gone through. Use lipschitz_bound and lipschitz_lower."
        )
    places = torch.cat([radix.new_ones(1), radix.cumprod(0)[:-1]])
    largest = 0.0
    for start in range(0, patterns, 512):
        pattern = torch.arange(start, min(start + 512, patterns))[:, None] // places % radix
        largest = max(largest, float(_of_patterns(system, choices, pattern).max()))
    return system.scale * largest


def _of_patterns(system: System, choices: list[tuple[Tensor, int]], pattern: Tensor) -> Float[Tensor, "pattern"]:
    batch, used = len(pattern), 0
    sources = torch.eye(system.inputs, dtype=torch.float64).expand(batch, -1, -1)
    for unit, (selections, count) in zip(system.units, choices, strict=True):
        encoding = unit.nonlinearity.encoding("eliminate")
        read = unit.map[:, : sources.shape[1]] @ sources
        gauge = encoding.from_input[: encoding.push.shape[1]] @ read
        chosen = selections[pattern[:, used : used + count]]
        free = (chosen @ gauge.unflatten(1, (count, -1))).flatten(1, 2)
        sources = torch.cat([sources, encoding.center @ read + encoding.push @ free], dim=1)
        used += count
    return torch.linalg.matrix_norm(system.output @ sources, 2)


def _slopes(model: nn.Module, x: Tensor, norm: Norm, output: int | None) -> tuple[Tensor, Tensor]:
    """The Jacobian's norm at each input, and the inputs."""
    with torch.enable_grad():
        x = x.requires_grad_()
        outputs = call(model, x).flatten(1).sum(0)
        wanted = range(len(outputs)) if output is None else [output]
        rows = [torch.autograd.grad(outputs[k], x, retain_graph=True)[0].flatten(1) for k in wanted]
    jacobian = torch.stack(rows, dim=1).double()
    if norm == "linf":
        return jacobian.abs().sum(2).amax(1), x.detach()
    gram = jacobian @ jacobian.mT if jacobian.shape[1] <= jacobian.shape[2] else jacobian.mT @ jacobian
    return torch.linalg.eigvalsh(gram)[:, -1].clamp(min=0).sqrt(), x.detach()


def _best(values: Tensor, points: Tensor, more: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """The largest values of both, with their points."""
    values, points = torch.cat([values, more]), torch.cat([points, at])
    order = values.topk(min(KEPT, len(values))).indices
    return values[order], points[order]


def _spread(draws: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Draws, each times a factor whose logarithm is uniform."""
    power = torch.rand(len(draws), generator=generator, dtype=draws.dtype) * math.log(high / low) + math.log(low)
    return draws * power.exp().reshape(-1, *(1,) * (draws.ndim - 1))


def _sizes(total: int, chunk: int) -> list[int]:
    return [min(chunk, total - start) for start in range(0, total, chunk)]
