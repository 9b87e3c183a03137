"""The quadratic constraint of GroupSort and Householder as matrices, for matrix inequalities of one's own."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from corollary.base.errors import BadInput


class Multipliers(NamedTuple):
    r"""The matrices of $\begin{pmatrix} z \\ w \end{pmatrix}^\top \begin{pmatrix} T - 2S & P + S \\ P + S & -T - 2P
    \end{pmatrix} \begin{pmatrix} z \\ w \end{pmatrix} \ge 0$, each (entry, entry)."""

    T: Float[Tensor, "entry entry"]
    P: Float[Tensor, "entry entry"]
    S: Float[Tensor, "entry entry"]

    def matrix(self) -> Float[Tensor, "both both"]:
        """The whole matrix, (2 entries, 2 entries)."""
        t, p, s = self
        return torch.cat([torch.cat([t - 2 * s, p + s], dim=1), torch.cat([p + s, -t - 2 * p], dim=1)])


def activation_qc(
    kind: Literal["groupsort", "maxmin", "householder"], N: int, g: int, v: Float[Tensor, "size"] | None = None
) -> Callable[..., Multipliers]:
    r"""The constraint between two inputs z and outputs w of N groups of g consecutive entries, as a function.

    The function takes (lam, gam, nu, tau), each (N,), and gives $T = \mathrm{diag}(\lambda) \otimes I +
    \mathrm{diag}(\gamma) \otimes J$, $P = \mathrm{diag}(\nu) \otimes J$, $S = \mathrm{diag}(\tau) \otimes J$ with
    $J = 1 1^\top$ for sorts and $I - v v^\top$ for reflections. The form is $\sum_i \lambda_i (\|z_i\|^2 - \|w_i\|^2)$
    on the graph of the activation, whatever gam, nu and tau are: one lam for each group, never for each entry.

    Args: `v`: the direction of a Householder activation, (g,); taken at length 1.
    Raises: BadInput, for a kind, group size or direction that do not fit; from the function, for a negative lam.
    Source: Pauli et al. 2024, arXiv 2401.14033, lemmas 1 and 2.
    """
    if kind not in ("groupsort", "maxmin", "householder") or (kind == "maxmin" and g != 2):
        raise BadInput(f"activation_qc knows groupsort, maxmin (g = 2) and householder, got {kind!r} with g = {g}")
    if (kind == "householder") != (v is not None) or (v is not None and v.shape != (g,)):
        raise BadInput(f"a direction v of shape ({g},) goes with kind 'householder', and with no other")
    one = torch.eye(g, dtype=torch.float64)
    kept = (
        torch.ones_like(one)
        if v is None
        else one - torch.outer(v.double(), v.double()) / float(v.double() @ v.double())
    )

    def multipliers(lam: Tensor, gam: Tensor, nu: Tensor, tau: Tensor) -> Multipliers:
        if any(part.shape != (N,) for part in (lam, gam, nu, tau)) or bool((lam < 0).any()):
            raise BadInput(f"lam, gam, nu and tau need one number for each of {N} groups, lam none below zero")
        lam, gam, nu, tau = (torch.diag(part.double()) for part in (lam, gam, nu, tau))
        return Multipliers(torch.kron(lam, one) + torch.kron(gam, kept), torch.kron(nu, kept), torch.kron(tau, kept))

    return multipliers
