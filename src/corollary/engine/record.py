"""Measurements over the steps of a run: columns aligned on step, for one network or every member of a population."""

import csv
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.base.files import atomic_write

Schedule: TypeAlias = Callable[[int], bool]
"""step -> whether to measure at that step."""
Value: TypeAlias = int | float | Tensor | np.ndarray | np.generic

STANDARD_NAMES = (
    "loss",
    "accuracy",
    "test_loss",
    "test_accuracy",
    "learning_rate",
    "gradient_norm",
    "weight_norm",
    "distance",
)
"""Names every part of the library uses for these measurements; any other name may be logged beside them."""


def every(steps: int) -> Schedule:
    """Measure at steps 0, `steps`, 2 `steps`, ..."""
    if steps < 1:
        raise BadInput(f"a schedule measures every 1, 2, ... steps, got every {steps}")
    return lambda step: step % steps == 0


def schedule(kind: Literal["log", "linear"], *, per_decade: int = 10, spacing: int = 1) -> Schedule:
    """When to measure: `"log"` at step 0 and at round(10^(k / `per_decade`)), `"linear"` every `spacing` steps."""
    if kind == "linear":
        return every(spacing)
    if per_decade < 1:
        raise BadInput(f"a logarithmic schedule needs at least 1 step in each decade, got per_decade={per_decade}")

    def is_due(step: int) -> bool:
        if step < 1:
            return step == 0
        nearest = round(per_decade * np.log10(step))  # rounding to integers can collide: neighbours are asked too
        return any(round(10 ** (k / per_decade)) == step for k in (nearest - 1, nearest, nearest + 1))

    return is_due


@final
class TrainingRecord:
    """What was measured, by step: `record["loss"]` is an array `[steps, ...]`, missing values are NaN.

    A column holds one number for each step, or an array of one fixed shape: `[members]` from a population, `[samples]`
    for losses of single samples. Logging twice at one step adds to that step.

    Args: `meta`: facts about the run (seed, optimizer, ...), stored with the record.
    Example:
        >>> record = TrainingRecord()
        >>> record.log(0, loss=2.0)
        >>> record.log(10, loss=1.0, test_accuracy=0.5)
        >>> record.steps.tolist(), record["loss"].tolist()
        ([0, 10], [2.0, 1.0])
    """

    def __init__(self, meta: Mapping[str, Any] | None = None):
        self.meta: dict[str, Any] = dict(meta or {})
        self._rows: dict[int, dict[str, np.ndarray]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._shelf = _Shelf()

    def log(self, step: int, **values: Value) -> None:
        """Add measurements made at `step`.

        Raises: BadInput, if a value's shape differs from its column's.
        """
        arrays = {name: _as_array(value) for name, value in values.items()}
        for name, array in arrays.items():
            shape = self._shapes.setdefault(name, array.shape)
            if array.shape != shape:
                raise BadInput(
                    f"column {name!r} holds values of shape {shape}, got {array.shape} at step {step}: "
                    "log values of another shape under another name"
                )
        kept = {name: self._shelf.keep(array) for name, array in arrays.items()}
        self._rows.setdefault(step, {}).update(kept)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __repr__(self) -> str:
        return f"TrainingRecord({len(self)} steps, columns: {', '.join(self.columns) or 'none'})"

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of what was measured, in the order of their first appearance."""
        return tuple(self._shapes)

    @property
    def steps(self) -> np.ndarray:
        """The steps at which anything was measured, ascending, `[steps]`."""
        return np.array(sorted(self._rows), dtype=np.int64)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._shapes:
            raise BadInput(f"there is no column {name!r} in this record. It has: {', '.join(self.columns) or 'none'}.")
        missing = np.full(self._shapes[name], np.nan)
        return np.stack([self._rows[step].get(name, missing) for step in sorted(self._rows)])

    def measured(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """`(steps, values)` of one column, without the steps at which nothing of it was measured."""
        values = self[name]
        present = ~np.isnan(values).reshape(len(values), -1).all(axis=1)
        return self.steps[present], values[present]

    def last(self, name: str) -> np.ndarray:
        """The last value of a column that is not missing: for each member its own last one."""
        values = self[name]
        present = ~np.isnan(values)
        index = len(values) - 1 - np.argmax(present[::-1], axis=0)
        return np.take_along_axis(values, index[None], axis=0)[0]

    def mean(self, name: str) -> np.ndarray:
        """Mean over everything but the step, leaving out what is missing (stopped or diverged members), `[steps]`."""
        values = self[name].reshape(len(self), -1)
        counts = (~np.isnan(values)).sum(axis=1)
        totals = np.nansum(values, axis=1)
        return np.divide(totals, counts, out=np.full(len(values), np.nan), where=counts > 0)

    def member(self, index: int) -> "TrainingRecord":
        """The record of one member: element `index` of every column that has a members axis."""
        single = TrainingRecord(self.meta)
        for step, row in self._rows.items():
            single.log(step, **{name: array if array.ndim == 0 else array[index] for name, array in row.items()})
        return single

    def to_table(self) -> dict[str, np.ndarray]:
        """Flat columns of equal length, `step` first; a column of arrays becomes `name[0]`, `name[1]`, ..."""
        table: dict[str, np.ndarray] = {"step": self.steps}
        for name, shape in self._shapes.items():
            values = self[name]
            for index in np.ndindex(*shape):
                table[f"{name}[{','.join(map(str, index))}]" if shape else name] = values[(slice(None), *index)]
        return table

    def to_csv(self, path: Path | str | None = None) -> str:
        """The table as text, missing values empty; also written to `path` where given."""
        table = self.to_table()
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(table)
        for row in zip(*(column.tolist() for column in table.values()), strict=True):
            writer.writerow(["" if value != value else value for value in row])
        if path is not None:
            atomic_write(Path(path), text.getvalue())
        return text.getvalue()

    def save(self, path: Path | str) -> Path:
        """Write a compressed `.npz`: every column in float64, and `meta` as JSON text."""
        buffer = io.BytesIO()
        columns = {f"column/{name}": self[name] for name in self.columns}
        np.savez_compressed(buffer, steps=self.steps, meta=np.array(json.dumps(self.meta, default=str)), **columns)  # type: ignore[arg-type]  # the stub takes `allow_pickle` for one of the columns
        return atomic_write(Path(path), buffer.getvalue())

    @classmethod
    def load(cls, path: Path | str) -> "TrainingRecord":
        """Read what `save` wrote; nothing in the file is executed.

        Raises: BadInput, if the file is missing or holds anything else.
        """
        try:
            with np.load(Path(path), allow_pickle=False) as file:
                record = cls(json.loads(str(file["meta"])))
                columns = {key.removeprefix("column/"): file[key] for key in file.files if key.startswith("column/")}
                record._fill(file["steps"].tolist(), columns)
        except (OSError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise BadInput(
                f"{path} cannot be read as a training record ({type(error).__name__}: {error}); "
                "wanted an .npz file that TrainingRecord.save wrote"
            ) from error
        return record

    def as_plain(self) -> dict[str, Any]:
        """The record as plain values, for a checkpoint; `from_plain` is the inverse."""
        return {
            "meta": json.dumps(self.meta, default=str),
            "steps": self.steps,
            "columns": {name: self[name] for name in self.columns},
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "TrainingRecord":
        """The record that `as_plain` described."""
        record = cls(json.loads(plain["meta"]))
        record._fill(plain["steps"].tolist(), plain["columns"])
        return record

    def _fill(self, steps: list[int], columns: Mapping[str, np.ndarray]) -> None:
        for row, step in enumerate(steps):
            self.log(step, **{name: values[row] for name, values in columns.items()})


@final
class _Shelf:
    """Copies of many small arrays, in few large ones.

    Small blocks of memory that stay, each allocated between the large ones of a training step that go, would split the
    free memory: no block of the last step would fit the next, and the process would grow by such a block every step.
    """

    def __init__(self) -> None:
        self._block, self._used = np.empty(0), 0

    def keep(self, array: np.ndarray) -> np.ndarray:
        """A copy of `array`."""
        if self._used + array.size > len(self._block):
            self._block = np.empty(max(array.size, 64, min(2 * len(self._block), 2**16)))
            self._used = 0
        copy = self._block[self._used : self._used + array.size].reshape(array.shape)
        copy[...] = array
        self._used += array.size
        return copy


def _as_array(value: Value) -> np.ndarray:
    array = value.detach().cpu().to(torch.float64).numpy() if isinstance(value, Tensor) else value
    return np.asarray(array, dtype=np.float64)
