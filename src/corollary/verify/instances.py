"""Files of instances, each a network with a property, and files of results: what became of them, a row each."""

import csv
import io
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import final

from corollary.base.errors import BadInput

TIMEOUT = 60.0
"""Seconds for an instance whose row gives none."""
PUBLISHED = {"unsat": "unsat", "holds": "unsat", "sat": "sat", "violated": "sat"}
"""Verdicts of others that decide, in the words of VNN-COMP old and new."""


@final
@dataclass(frozen=True)
class Instance:
    """A network with a property.

    Args:
        onnx, vnnlib: paths, relative to the file of instances; for `onnx` also path/to/file.py:factory.
        timeout: seconds.
        suite: a name to count it under.
        published: the verdict of others, "" where none is known.
        problem: what is wrong with its row; it ends as an error then.
    """

    onnx: str
    vnnlib: str
    timeout: float = TIMEOUT
    suite: str = ""
    published: str = ""
    problem: str = ""

    def __post_init__(self) -> None:
        if not (self.timeout > 0 and math.isfinite(self.timeout)):
            raise BadInput(f"the time limit of an instance must be a positive number of seconds, got {self.timeout:g}")


@final
@dataclass(frozen=True)
class Row:
    """What became of an instance: a line of the results.

    Args:
        verdict: "unsat", "sat", "unknown", "timeout" or "error".
        agreement: "agrees" or "contradicts" where it and the published verdict decide, else "".
        reason: why nothing was decided.
    """

    suite: str
    onnx: str
    vnnlib: str
    verdict: str
    seconds: float
    domains: int
    published: str
    agreement: str
    reason: str

    @classmethod
    def of(cls, instance: Instance, verdict: str, reason: str = "", *, seconds: float = 0.0, domains: int = 0) -> "Row":
        """The row of an instance that ended so."""
        published = PUBLISHED.get(instance.published.strip().lower())
        decided = verdict in ("sat", "unsat") and published is not None
        return cls(
            suite=instance.suite,
            onnx=instance.onnx,
            vnnlib=instance.vnnlib,
            verdict=verdict,
            seconds=round(seconds, 3),
            domains=domains,
            published=instance.published,
            agreement=("agrees" if verdict == published else "contradicts") if decided else "",
            reason=" ".join(reason.split()),
        )


def read_instances(path: str | Path) -> list[Instance]:
    """The instances of a CSV file.

    Its first line may name columns: onnx, vnnlib and, where there are such, suite, timeout_s (or timeout) and verdict;
    others are passed over. Without names every line is onnx,vnnlib,timeout, as in VNN-COMP. Without a suite it is the
    name of the file's folder. A row that is not understood becomes an instance that says what is wrong with it.

    Raises: BadInput, if the file cannot be read, or has no rows.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [(number, [cell.strip() for cell in line]) for number, line in enumerate(csv.reader(file), 1)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(
            f"cannot read the instances in {path}: {getattr(error, 'strerror', None) or error}. Wanted a CSV file with "
            "rows onnx,vnnlib,timeout, or columns named onnx, vnnlib, timeout_s, suite, verdict"
        ) from error
    lines = [(number, cells) for number, cells in lines if any(cells)]
    names = ["onnx", "vnnlib", "timeout_s"]
    if lines and {"onnx", "vnnlib"} <= set(lines[0][1]):
        names = ["timeout_s" if name == "timeout" else name for name in lines.pop(0)[1]]
    if not lines:
        raise BadInput(f"{path} has no instances: wanted rows onnx,vnnlib,timeout")
    return [_instance(names, cells, number, path.absolute().parent.name) for number, cells in lines]


def _instance(names: list[str], cells: list[str], number: int, folder: str) -> Instance:
    row = dict(zip(names, cells, strict=False))
    suite = row.get("suite", folder)
    instance = Instance(row.get("onnx", ""), row.get("vnnlib", ""), TIMEOUT, suite, row.get("verdict", ""))
    shown = f"line {number}, {','.join(cells)[:80]!r}"
    if len(cells) != len(names) or not instance.onnx or not instance.vnnlib:
        return replace(instance, problem=f"{shown}, has {len(cells)} cells; wanted {len(names)}: {','.join(names)}")
    try:
        seconds = float(row.get("timeout_s") or TIMEOUT)
    except ValueError:
        seconds = math.nan
    if not (seconds > 0 and math.isfinite(seconds)):
        return replace(instance, problem=f"{shown}: the time limit {row['timeout_s']!r} is no positive number")
    return replace(instance, timeout=seconds)


class ResultsFile:
    """The file of results: what it holds already, and rows appended to it one by one.

    Args: `path`: None keeps nothing.
    Raises: BadInput, if the file is there and is none.
    """

    names = tuple(field.name for field in fields(Row))

    def __init__(self, path: Path | None):
        self.path = path
        self.held: dict[tuple[str, str, str], list[Row]] = {}
        if path is not None:
            self._open(path)

    def _open(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]  # an interrupt may have left half a line
        header = ",".join(self.names).encode()
        if not whole and header.startswith(content):
            path.write_bytes(b"")
            self._write(self.names)
            return
        try:
            if whole.splitlines()[:1] != [header]:
                raise ValueError("other columns")
            lines = list(csv.DictReader(io.StringIO(whole.decode())))
            rows = [
                Row(**{**line, "seconds": float(line["seconds"]), "domains": int(line["domains"])}) for line in lines
            ]
        except (UnicodeDecodeError, csv.Error, KeyError, TypeError, ValueError) as error:
            raise BadInput(
                f"{path} is there already, and holds no results of a batch (columns {', '.join(self.names)}): give "
                "another file, or remove it"
            ) from error
        if whole != content:
            path.write_bytes(whole)
        for row in rows:
            self.held.setdefault((row.suite, row.onnx, row.vnnlib), []).append(row)

    def take(self, instance: Instance) -> Row | None:
        """The row of an earlier run, each only once."""
        rows = self.held.get((instance.suite, instance.onnx, instance.vnnlib))
        return rows.pop(0) if rows else None

    def append(self, row: Row) -> None:
        """Add a row; it is on disk when this returns."""
        self._write(tuple(asdict(row).values()))

    def _write(self, cells: Sequence[object]) -> None:
        if self.path is None:
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(cells)
            file.flush()
            os.fsync(file.fileno())
