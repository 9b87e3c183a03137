"""What `certify` is told and what it answers."""

import html
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from corollary.verify.branch_and_bound import Branching
from corollary.verify.counterexample import Counterexample

Status = Literal["unsat", "sat", "unknown", "timeout"]
Split = Literal["auto", "inputs", "neurons", "none"]


@dataclass(frozen=True)
class CertifyConfig:
    """How `certify` works.

    Args:
        split: what branch and bound splits; "auto": the inputs where at most `few_inputs` of them vary.
        iterations: optimiser steps for the first bounds.
        branching: of the search on neurons.
        dtype: of the bounds; None: float32 (with a wider margin), and float64 where its rounding would decide.
        attack: seconds for the search for counterexamples before any bound, and again for what the first bounds leave
            open; each at most a twentieth, then a tenth, of the time limit.
        seed: of all random draws.
    """

    split: Split = "auto"
    few_inputs: int = 20
    iterations: int = 20
    branching: Branching = field(default_factory=Branching)
    dtype: torch.dtype | None = None
    attack: tuple[float, float] = (1.0, 8.0)
    seed: int = 0


@dataclass(eq=False)
class Verdict:
    """What became of a property.

    Args:
        status: "unsat": proved, no counterexample exists; "sat": one was found, and replayed on the network as given;
            "timeout"; "unknown": the method could decide nothing, `reason` says why.
        counterexample: where "sat".
        worst: the smallest margin that was left open; None where nothing was bounded.
        domains: regions and domains bounded.
        seconds: by phase.
        log: what was done, in words.
    """

    status: Status
    counterexample: Counterexample | None = None
    reason: str = ""
    worst: float | None = None
    domains: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """What `corollary certify --json` prints of it; the counterexample flat, as the VNN-LIB variables number it."""
        found = self.counterexample
        return {
            "verdict": self.status,
            "reason": self.reason,
            "counterexample": found and {"x": found.x.flatten().tolist(), "y": found.y.flatten().tolist()},
            "smallest_open_margin": None if self.worst is None or not math.isfinite(self.worst) else self.worst,
            "domains": self.domains,
            "seconds": {phase: round(spent, 3) for phase, spent in self.seconds.items()},
            "log": self.log,
        }

    def _repr_html_(self) -> str:
        lines = "\n".join([*self.log, self.reason] if self.reason else self.log)
        return f"<p><b>{self.status}</b>, {self.domains} domains</p><pre>{html.escape(lines)}</pre>"
