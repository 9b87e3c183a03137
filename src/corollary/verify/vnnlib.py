"""Properties from VNN-LIB files: s-expressions over the inputs X_i and outputs Y_j of a network.

Source: the VNN-LIB standard, version 1 (Demarchi, Guidotti, Pulina, Tacchella 2023; vnnlib.org), as the files of the
competitions of neural network verification (VNN-COMP 2020 to 2024) use it.
"""

import gzip
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeAlias

import numpy as np
import torch

from corollary.base.errors import BadInput
from corollary.verify.sets import Box
from corollary.verify.specification import Case, Halfspaces, Specification

TOKEN = re.compile(r";[^\n]*|[()]|[^\s();]+")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
VARIABLE = re.compile(r"([XY])_(\d+)")
DEEPEST = 200
"""Parentheses inside parentheses: real files have five."""
MOST_CLAUSES = 200_000
"""Conjunctions after distribution; the largest known file, nn4sys/lindex_60000, has 120,000."""
NO_MEANING = ("set-logic", "set-info", "set-option", "check-sat", "get-model", "exit")
"""Commands of SMT-LIB to a solver, which say nothing about the network."""
UNDERSTOOD = (
    "Understood are (declare-const X_0 Real), and (assert F) where F is (and F ...), (or F ...) or a comparison "
    "(<= A B), (>= A B), (= A B) of expressions in numbers, X_i, Y_j, +, - and, with numbers, * and /."
)


class Atom(NamedTuple):
    """A word: a name or a number, and which token of the text it is."""

    text: str
    token: int


class Form(NamedTuple):
    """A parenthesis, and which token of the text opens it."""

    parts: list["Expression"]
    token: int


Expression: TypeAlias = Atom | Form


class Bound(NamedTuple):
    """X_i <= value, or X_i >= value."""

    index: int
    is_upper: bool
    value: float
    token: int


class Row(NamedTuple):
    """The sum of coefficient * Y_j, over the pairs (j, coefficient), is at most `offset`."""

    terms: tuple[tuple[int, float], ...]
    offset: float


Literal: TypeAlias = Bound | Row
Clause: TypeAlias = Sequence[Literal]
"""Literals that hold together. A list of clauses is their union; no clause at all is the constant `false`."""


def read_vnnlib(source: str | Path, inputs: int | None = None, outputs: int | None = None) -> Specification:
    """The property in a VNN-LIB file (`.vnnlib`, `.vnnlib.gz`) or text, with flat inputs, in float64.

    All asserts hold together; `and` and `or` are distributed, and the conjunctions that share an input box become one
    case. A conjunction that no input can satisfy is left out. Decimal numbers are read as the nearest float64.

    Args:
        source: a path, or the text itself (recognised by its opening parenthesis or comment).
        inputs, outputs: how many the network has, where known; the property must declare as many.
    Raises: BadInput, with the line: for a form that is not understood, a strict comparison, inputs related to each
        other or to outputs, an input without a bound, or bounds that no input satisfies.
    """
    text, name = _text(source)
    reader = _Reader(text, name)
    asserts = [reader.command(form) for form in reader.forms()]
    counts = reader.declared("X", "inputs", inputs), reader.declared("Y", "outputs", outputs)
    parts = [form for form in asserts if form is not None]
    amount = math.prod(reader.count(form) for form in parts)
    if amount > MOST_CLAUSES:
        raise BadInput(
            f"{name} has {amount} conjunctions when its `and` and `or` are distributed, and up to {MOST_CLAUSES} are "
            "read: split the property"
        )
    base, clauses = _distribute([reader.clauses(form) for form in parts])
    return _specification(reader, base, clauses, *counts)


def _text(source: str | Path) -> tuple[str, str]:
    """The text, and what to call it in messages."""
    if isinstance(source, str) and (not source.strip() or source.lstrip()[0] in "(;"):
        return source, "the property"
    path = Path(source)
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode(), path.name
    except FileNotFoundError as error:
        raise BadInput(f"there is no file {path}; wanted a property, .vnnlib or .vnnlib.gz") from error
    except (OSError, EOFError) as error:
        raise BadInput(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not a text file in UTF-8, as a property in VNN-LIB is: {error}") from error


@dataclass
class _Reader:
    """One text on its way to clauses; `variables` grows with the declarations."""

    text: str
    name: str

    def __post_init__(self) -> None:
        self.variables: dict[str, tuple[str, int]] = {}

    def error(self, where: Expression | int, complaint: str) -> BadInput:
        """The complaint with the line that it is about."""
        token = where if isinstance(where, int) else where.token
        # Only the token's number is kept while reading: places in the text would double the time.
        start = next(itertools.islice(TOKEN.finditer(self.text), token, None)).start()
        line = self.text.count("\n", 0, start) + 1
        shown = self.text[start:].partition("\n")[0].strip()
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return BadInput(f"{self.name}, line {line}: {complaint}\n    {shown}")

    def forms(self) -> list[Form]:
        """The parentheses of the outermost level."""
        stack: list[list[Expression]] = [[]]
        opened: list[int] = []
        for number, token in enumerate(TOKEN.findall(self.text)):
            if token == "(":
                stack.append([])
                opened.append(number)
                if len(opened) > DEEPEST:
                    raise self.error(number, f"more than {DEEPEST} parentheses inside each other")
            elif token == ")":
                if not opened:
                    raise self.error(number, "this parenthesis closes nothing")
                parts = stack.pop()
                stack[-1].append(Form(parts, opened.pop()))
            elif token[0] != ";":
                if not opened:
                    raise self.error(number, f"a word outside of parentheses. {UNDERSTOOD}")
                stack[-1].append(Atom(token, number))
        if opened:
            raise self.error(opened[-1], "this parenthesis is never closed")
        return [part for part in stack[0] if isinstance(part, Form)]

    def command(self, form: Form) -> Expression | None:
        """Enter a declaration, or return what is asserted."""
        head, rest = self._head(form)
        if head == "assert":
            if len(rest) != 1:
                raise self.error(form, f"assert takes one formula, got {len(rest)}. {UNDERSTOOD}")
            return rest[0]
        if head in ("declare-const", "declare-fun"):
            self._declare(form, head, rest)
        elif head not in NO_MEANING:
            raise self.error(form, f"{head!r} is not understood. {UNDERSTOOD}")
        return None

    def _head(self, form: Form) -> tuple[str, list[Expression]]:
        if not form.parts or not isinstance(form.parts[0], Atom):
            raise self.error(form, f"a parenthesis must begin with what it does. {UNDERSTOOD}")
        return form.parts[0].text, form.parts[1:]

    def _declare(self, form: Form, head: str, rest: list[Expression]) -> None:
        words = [part.text if isinstance(part, Atom) else "()" if not part.parts else "(...)" for part in rest]
        shape = ["Real"] if head == "declare-const" else ["()", "Real"]
        match = VARIABLE.fullmatch(words[0]) if words else None
        if match is None or words[1:] != shape:
            raise self.error(
                form, "inputs are declared as (declare-const X_0 Real), outputs as (declare-const Y_0 Real)"
            )
        if words[0] in self.variables:
            raise self.error(form, f"{words[0]} is declared twice")
        self.variables[words[0]] = (match[1], int(match[2]))

    def declared(self, letter: str, what: str, wanted: int | None) -> int:
        """How many variables of a letter there are, if they are 0, 1, 2, ... and as many as wanted."""
        indices = {index for kind, index in self.variables.values() if kind == letter}
        missing = next((index for index in range(len(indices)) if index not in indices), None)
        if missing is not None or not indices:
            raise BadInput(
                f"{self.name} declares {len(indices)} {what}" + (f", but no {letter}_{missing}" if indices else "")
            )
        if wanted is not None and wanted != len(indices):
            raise BadInput(
                f"{self.name} declares {len(indices)} {what} and the network has {wanted}: do they belong together?"
            )
        return len(indices)

    def count(self, formula: Expression) -> int:
        """Number of clauses of a formula, before any is formed."""
        if isinstance(formula, Atom):
            return 1
        head, rest = self._head(formula)
        if head == "or":
            return sum(map(self.count, rest))
        return math.prod(map(self.count, rest)) if head == "and" else 1

    def clauses(self, formula: Expression) -> list[Clause]:
        """A formula in disjunctive normal form."""
        if isinstance(formula, Atom):
            raise self.error(formula, f"a formula stands in parentheses. {UNDERSTOOD}")
        head, rest = self._head(formula)
        if head == "or":
            return [clause for part in rest for clause in self.clauses(part)]
        if head == "and":
            base, clauses = _distribute([self.clauses(part) for part in rest])
            return [[*base, *clause] for clause in clauses]
        if head in ("<", ">"):
            raise self.error(
                formula,
                f"strict comparisons are not read, because the sets of a property are closed: write {head}= "
                "(if that has no counterexample, neither has this)",
            )
        if head not in ("<=", ">=", "="):
            raise self.error(formula, f"{head!r} is not understood in a formula. {UNDERSTOOD}")
        if len(rest) < 2:
            raise self.error(formula, f"a comparison takes two expressions, got {len(rest)}")
        sides = [self.linear(part) for part in rest]
        literals: list[Literal] = []
        for left, right in itertools.pairwise(sides):
            for low, high in {"<=": [(left, right)], ">=": [(right, left)]}.get(head, [(left, right), (right, left)]):
                literal = self._literal(formula, low, high)
                if literal is False:
                    return []
                if literal is not True:
                    literals.append(literal)
        return [literals]

    def _literal(self, formula: Form, low: "_Linear", high: "_Linear") -> Literal | bool:
        """low <= high, as a bound, a row, or a truth about numbers."""
        terms = {name: low[0].get(name, 0.0) - high[0].get(name, 0.0) for name in {**low[0], **high[0]}}
        found = [(*self.variables[name], coefficient) for name, coefficient in terms.items() if coefficient != 0.0]
        offset = high[1] - low[1]
        if not all(map(math.isfinite, (offset, *terms.values()))):
            raise self.error(formula, "these numbers leave the range of float64")
        if not found:
            return offset >= 0
        if all(kind == "Y" for kind, _, _ in found):
            return Row(tuple((index, coefficient) for _, index, coefficient in found), offset)
        if len(found) > 1:
            raise self.error(
                formula, "an input is related to another variable: inputs must form a box, X_i against numbers"
            )
        _, index, coefficient = found[0]
        return Bound(index, coefficient > 0, offset / coefficient, formula.token)

    def linear(self, expression: Expression) -> "_Linear":
        """An expression as a sum of coefficient * variable, and a constant."""
        if isinstance(expression, Atom):
            if expression.text in self.variables:
                return {expression.text: 1.0}, 0.0
            if NUMBER.fullmatch(expression.text):
                return {}, float(expression.text)
            known = VARIABLE.fullmatch(expression.text)
            raise self.error(
                expression, f"{expression.text} is " + ("not declared" if known else "no number or variable")
            )
        head, rest = self._head(expression)
        sides = [self.linear(part) for part in rest]
        if head == "+" and sides:
            return _sum(sides)
        if head == "-" and sides:
            return _sum(
                [sides[0], *(_scaled(side, -1.0) for side in sides[1:])] if sides[1:] else [_scaled(sides[0], -1.0)]
            )
        if head == "*" and sides:
            varying = [side for side in sides if side[0]]
            if len(varying) > 1:
                raise self.error(expression, "a product of variables is not linear")
            return _scaled(varying[0] if varying else ({}, 1.0), math.prod(side[1] for side in sides if not side[0]))
        if head == "/" and len(sides) == 2 and not sides[1][0] and sides[1][1] != 0.0:
            return {name: value / sides[1][1] for name, value in sides[0][0].items()}, sides[0][1] / sides[1][1]
        raise self.error(expression, f"this use of {head!r} is not understood in an expression. {UNDERSTOOD}")


_Linear: TypeAlias = tuple[dict[str, float], float]
"""Coefficients by the names of variables, and the constant."""


def _sum(sides: Iterable[_Linear]) -> _Linear:
    terms: dict[str, float] = {}
    constant = 0.0
    for coefficients, number in sides:
        constant += number
        for name, value in coefficients.items():
            terms[name] = terms.get(name, 0.0) + value
    return terms, constant


def _scaled(side: _Linear, factor: float) -> _Linear:
    return {name: factor * value for name, value in side[0].items()}, factor * side[1]


def _distribute(parts: Sequence[Sequence[Clause]]) -> tuple[list[Literal], list[Clause]]:
    """The conjunction of unions: the literals of all parts that have one clause, and the clauses of the others."""
    base = [literal for part in parts if len(part) == 1 for literal in part[0]]
    choices = itertools.product(*(part for part in parts if len(part) != 1))
    return base, [list(itertools.chain.from_iterable(choice)) for choice in choices]


def _specification(
    reader: _Reader, base: Clause, clauses: Sequence[Clause], inputs: int, outputs: int
) -> Specification:
    """The cases: clauses grouped by their boxes, each box intersected with the one that all share."""
    shared = _box(base, np.full(inputs, -np.inf), np.full(inputs, np.inf))
    rows = [literal for literal in base if isinstance(literal, Row)]
    found: dict[bytes, tuple[np.ndarray, np.ndarray, list[Halfspaces]]] = {}
    for clause in clauses:
        lower, upper = _box(clause, *shared)
        if bool((lower > upper).any()):
            continue
        _refuse_unbounded(reader, lower, upper)
        key = lower.tobytes() + upper.tobytes()
        found.setdefault(key, (lower, upper, []))[2].append(_halfspaces([*rows, *clause], outputs))
    if not found:
        _refuse_empty(reader, [*base, *(clauses[0] if clauses else ())], shared)
    return Specification(
        tuple(
            Case(Box(torch.from_numpy(lower)[None], torch.from_numpy(upper)[None]), tuple(unsafe))
            for lower, upper, unsafe in found.values()
        )
    )


def _box(clause: Clause, lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The given box, cut by the bounds of a clause."""
    lower, upper = lower.copy(), upper.copy()
    for literal in clause:
        if isinstance(literal, Bound):
            value = literal.value + 0.0  # -0.0 becomes 0.0, so that equal boxes have equal bytes
            if literal.is_upper:
                upper[literal.index] = min(upper[literal.index], value)
            else:
                lower[literal.index] = max(lower[literal.index], value)
    return lower, upper


def _halfspaces(clause: Clause, outputs: int) -> Halfspaces:
    rows = [literal for literal in clause if isinstance(literal, Row)]
    matrix = np.zeros((len(rows), outputs))
    for i, row in enumerate(rows):
        for j, coefficient in row.terms:
            matrix[i, j] = coefficient
    return Halfspaces(torch.from_numpy(matrix), torch.tensor([row.offset for row in rows], dtype=torch.float64))


def _refuse_unbounded(reader: _Reader, lower: np.ndarray, upper: np.ndarray) -> None:
    for side, ends in (("lower", lower), ("upper", upper)):
        missing = np.flatnonzero(np.isinf(ends))
        if len(missing):
            more = f" (nor {len(missing) - 1} other inputs)" if len(missing) > 1 else ""
            raise BadInput(
                f"{reader.name} gives X_{missing[0]} no {side} bound{more} in at least one of its conjunctions; every "
                "input needs both bounds, equal ones if it is fixed"
            )


def _refuse_empty(reader: _Reader, clause: Clause, shared: tuple[np.ndarray, np.ndarray]) -> NoReturn:
    """Say why no input satisfies a clause."""
    lower, upper = _box(clause, *shared)
    crossed = np.flatnonzero(lower > upper)
    if not len(crossed):
        raise BadInput(
            f"{reader.name} asserts what is never true (an empty `or`, or numbers compared): nothing to verify"
        )
    worst = int(crossed[0])
    last = max(literal.token for literal in clause if isinstance(literal, Bound) and literal.index == worst)
    raise reader.error(
        last,
        f"no input satisfies the property: X_{worst} would have to be at least {lower[worst]:g} and at most "
        f"{upper[worst]:g}",
    )
