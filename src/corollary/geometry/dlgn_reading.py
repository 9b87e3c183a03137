"""A trained DLGN in words: which path decides most, and where it is open, as inequalities a person can read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from corollary.base.network import call, evaluating
from corollary.geometry.dlgn import DLGN
from corollary.geometry.path_kernel import dominant_path, path_region

TERMS = 4
"""Terms of an inequality that are written out."""


@torch.no_grad()
def gated_part(module: nn.Module, x: Tensor) -> tuple[str, DLGN, Float[Tensor, "n d"]] | None:
    """The first DLGN in a network: its name there, itself and what it reads; None if there is none it reaches.

    The network runs in evaluation mode and is left as it was.
    """
    seen: dict[str, Tensor] = {}
    inside = {name: part for name, part in module.named_modules() if isinstance(part, DLGN)}

    def listen(name: str, part: DLGN) -> Any:
        def keep(_: nn.Module, given: tuple[Any, ...]) -> None:
            seen.setdefault(name, given[0].detach())

        return part.register_forward_pre_hook(keep)

    handles = [listen(name, part) for name, part in inside.items()]
    try:
        with evaluating(module):
            if inside:
                call(module, x)
    finally:
        for handle in handles:
            handle.remove()
    return next(((name, inside[name], given) for name, given in seen.items()), None)


@final
@dataclass(frozen=True, eq=False)
class StrongestPath:
    """The path that is dominant for the most samples.

    Args:
        units: one of each layer.
        output: the output it is read for, the one that the most samples are given.
        samples: number of samples that are given that output; `rows` are those of them for which it is dominant.
        values: what it adds to the output at each of `rows`.
    """

    units: tuple[int, ...]
    output: int
    samples: int
    rows: Int64[Tensor, "row"]
    values: Float[Tensor, "row"]


@torch.no_grad()
def strongest_path(model: DLGN, x: Float[Tensor, "n d"]) -> StrongestPath | None:
    """Of the dominant paths of the samples with the most frequent output the most frequent; None if none is open."""
    outputs = model(x, hard=True)
    winner = outputs.argmax(1)
    output = int(winner.bincount().argmax())
    mine = (winner == output).nonzero()[:, 0]
    paths = dominant_path(model, x[mine], output=output)
    there = (paths.units >= 0).all(1)
    if not there.any():
        return None
    distinct, place, count = paths.units[there].unique(dim=0, return_inverse=True, return_counts=True)
    best = int(count.argmax())
    rows = mine[there][place == best]
    values = paths.value[there][place == best]
    return StrongestPath(tuple(distinct[best].tolist()), output, len(mine), rows, values)


def path_inequalities(model: DLGN, path: Sequence[int], names: Sequence[str] | None = None) -> tuple[str, ...]:
    """Where a path is open, one inequality a layer, with normals of length 1 and the largest terms first.

    Args: `names`: of the features; x0, x1, .. by default.
    """
    C, c = path_region(model, path)
    length = C.norm(dim=1).clamp_min(torch.finfo(C.dtype).tiny)
    names = names or [f"x{i}" for i in range(C.shape[1])]
    return tuple(
        inequality(normal, float(bound), names) for normal, bound in zip(-C / length[:, None], -c / length, strict=True)
    )


def inequality(normal: Float[Tensor, "d"], bound: float, names: Sequence[str]) -> str:
    """`normal . x >= bound` as text: the largest terms, and the number and norm of those that are left out."""
    order = normal.abs().argsort(descending=True, stable=True).tolist()
    written = [i for i in order[:TERMS] if float(normal[i]) != 0]
    text = ""
    for i in written:
        value = float(normal[i])
        sign = (" − " if value < 0 else " + ") if text else ("−" if value < 0 else "")
        text += f"{sign}{abs(value):.2f} {names[i]}"
    rest = normal[order[TERMS:]]
    if float(rest.norm()) > 0:
        text += f" + ({len(rest)} terms of norm {float(rest.norm()):.2f})"
    return f"{text or '0'} ≥ {bound:.2f}".replace("-", "−")
