"""A study: one published finding, replicated. Running and judging are apart: stored data can be judged again."""

import hashlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np

from corollary.base.seeds import Seeds
from corollary.evidence.claim import Claim, Kind, Scale, judged
from corollary.evidence.figure import Figure
from corollary.evidence.source import Source

Table: TypeAlias = Mapping[str, Sequence[Any] | np.ndarray]
"""Columns of equal length by name."""
Data: TypeAlias = Mapping[str, Table]
"""Everything a study measured: tables by name. Claims and figures are made from it alone."""
Parts: TypeAlias = Callable[[str, Callable[[], Mapping[str, Any]]], dict[str, Any]]
"""`parts(name, compute)` returns what `compute()` returned, now or in an earlier, interrupted run."""


def in_memory(name: str, compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Parts that are kept nowhere: every part is computed."""
    return storable(compute())


def storable(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part in the form it has after being stored and read: arrays, and plain numbers and strings."""
    arrays = {name: np.asarray(value) for name, value in part.items()}
    return {name: array.item() if array.ndim == 0 else array for name, array in arrays.items()}


def joined(tables: Sequence[Table]) -> dict[str, np.ndarray]:
    """Tables of the same columns, one below the other; a single number counts as one row."""
    return {name: np.concatenate([np.atleast_1d(table[name]) for table in tables]) for name in tables[0]}


def listed(values: Sequence[float] | np.ndarray, form: str = ".3f") -> str:
    """Numbers as a claim shows them, with commas between."""
    return ", ".join(f"{value:{form}}" for value in values)


@dataclass(frozen=True)
class Study(ABC):
    """A study's fields are its configuration: its command-line flags and the hash of its result folder."""

    scale: Scale = "desk"
    """smoke: every line runs, nothing is judged. desk: a laptop. paper: the paper's own sizes."""
    seed: int = 0
    """The integer that reproduces the run."""

    slug: ClassVar[str]
    title: ClassVar[str]
    room: ClassVar[str]
    sources: ClassVar[tuple[Source, ...]]

    @abstractmethod
    def run(self, parts: Parts = in_memory) -> Data:
        """Measure. Long work is cut into `parts(name, compute)`, each kept as soon as it is done."""

    @abstractmethod
    def claims(self, data: Data) -> tuple[Claim, ...]:
        """Judge the data by the criteria set beforehand."""

    @abstractmethod
    def figures(self, data: Data) -> tuple[Figure, ...]:
        """The pictures of the data."""

    @property
    def seeds(self) -> Seeds:
        """The study's random streams."""
        return Seeds(self.seed).child(self.slug)

    def pick(self, *, smoke: Any, desk: Any, paper: Any) -> Any:
        """The setting that goes with the scale."""
        return {"smoke": smoke, "desk": desk, "paper": paper}[self.scale]

    def claim(
        self,
        id: str,
        statement: str,
        *,
        kind: Kind,
        criterion: str,
        measured: str,
        holds: bool | np.bool_ | None,
        controls: tuple[str, ...] = (),
        note: str = "",
    ) -> Claim:
        """A claim with its verdict at this study's scale; `holds` is None where it was not measured."""
        holds = None if holds is None else bool(holds)
        verdict = judged(holds, kind, self.scale)
        return Claim(id, statement, kind, criterion, measured, verdict, tuple(controls), note)

    def configuration(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    def digest(self) -> str:
        """Twelve hexadecimal digits that name the configuration and the study's own code."""
        code = inspect.getsource(inspect.getmodule(type(self)) or type(self))
        key = json.dumps([self.slug, self.configuration(), code], sort_keys=True, default=str)
        return hashlib.sha256(key.encode()).hexdigest()[:12]
