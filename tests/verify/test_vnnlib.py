"""The reader of properties, against an evaluator that knows nothing but the meaning of each operator."""

import csv
import gzip
import operator
import random
import re
from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corollary.base.errors import BadInput
from corollary.verify.sets import Box
from corollary.verify.specification import Specification
from corollary.verify.vnnlib import read_vnnlib

COMPARE = {"<=": operator.le, ">=": operator.ge, "=": operator.eq}


def nested(text: str) -> list[Any]:
    """The text as nested lists of words."""
    stack: list[list[Any]] = [[]]
    for token in re.findall(r"[()]|[^\s()]+", re.sub(r";.*", "", text)):
        if token == "(":
            stack.append([])
        elif token == ")":
            stack[-2].append(stack.pop())
        else:
            stack[-1].append(token)
    return stack[0]


def value(form: Any, x: Sequence[float], y: Sequence[float]) -> Any:
    """A formula's truth or an expression's number at a point."""
    if isinstance(form, str):
        return float(form) if form[0] not in "XY" else (x if form[0] == "X" else y)[int(form[2:])]
    head, *rest = form[0], *(value(part, x, y) for part in form[1:])
    if head in ("and", "or"):
        return all(rest) if head == "and" else any(rest)
    if head in COMPARE:
        return all(COMPARE[head](a, b) for a, b in pairwise(rest))
    if head == "-" and len(rest) == 1:
        return -rest[0]
    return reduce({"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}[head], rest)


def holds(forms: list[Any], x: Sequence[float], y: Sequence[float]) -> bool:
    return all(value(form[1], x, y) for form in forms if form[0] == "assert")


def declared(inputs: int, outputs: int) -> str:
    names = [f"X_{i}" for i in range(inputs)] + [f"Y_{j}" for j in range(outputs)]
    return "".join(f"(declare-const {name} Real)\n" for name in names)


def bounds(*ends: tuple[float, float]) -> str:
    return "".join(f"(assert (>= X_{i} {low}))(assert (<= X_{i} {high}))\n" for i, (low, high) in enumerate(ends))


# ---- random properties, on a grid of halves: all arithmetic is exact, and points fall on boundaries often


def random_formula(draw: random.Random, inputs: int, outputs: int, depth: int) -> str:
    if depth and draw.random() < 0.7:
        parts = " ".join(random_formula(draw, inputs, outputs, depth - 1) for _ in range(draw.randint(0, 3)))
        return f"({draw.choice(['and', 'or'])} {parts})"
    relation, number = draw.choice(["<=", ">=", "<=", ">=", "="]), draw.randint(-4, 4) / 2
    if draw.random() < 0.4:
        sides = [f"X_{draw.randrange(inputs)}", str(number)]
    else:
        sides = [random_expression(draw, outputs, 2), draw.choice([str(number), f"Y_{draw.randrange(outputs)}"])]
    draw.shuffle(sides)
    return f"({relation} {sides[0]} {sides[1]})"


def random_expression(draw: random.Random, outputs: int, depth: int) -> str:
    if not depth or draw.random() < 0.4:
        return draw.choice([f"Y_{draw.randrange(outputs)}", str(draw.randint(-4, 4) / 2)])
    inner = random_expression(draw, outputs, depth - 1)
    other = random_expression(draw, outputs, depth - 1)
    return draw.choice(
        [f"(+ {inner} {other})", f"(- {inner} {other})", f"(- {inner})", f"(* -2 {inner})", f"(/ {inner} 2)"]
    )


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**9))
def test_random_properties_mean_what_their_operators_mean(seed: int):
    draw = random.Random(seed)
    inputs, outputs = draw.randint(1, 3), draw.randint(1, 3)
    text = declared(inputs, outputs) + bounds(*[(-1.5, 1.5)] * inputs)
    text += "".join(
        f"(assert {random_formula(draw, inputs, outputs, 3)}) ; comment ) (\n" for _ in range(draw.randint(1, 3))
    )
    forms = nested(text)
    try:
        specification, refusal = read_vnnlib(text), ""
    except BadInput as error:
        specification, refusal = None, str(error)
    assert specification is not None or re.search("no input satisfies|never true", refusal), text
    for _ in range(30):
        x = [draw.randint(-4, 4) / 2 for _ in range(inputs)]
        y = [draw.randint(-6, 6) / 2 for _ in range(outputs)]
        found = specification is not None and specification.violated(torch.tensor(x), torch.tensor(y))
        assert found == holds(forms, x, y), (text, x, y)


def test_random_properties_are_neither_always_true_nor_always_false():
    outcomes = set()
    for seed in range(40):
        draw = random.Random(seed)
        forms = nested(declared(2, 2) + f"(assert {random_formula(draw, 2, 2, 3)})")
        outcomes |= {holds(forms, [draw.randint(-2, 2) / 2] * 2, [draw.randint(-2, 2) / 2] * 2) for _ in range(5)}
    assert outcomes == {True, False}


# ---- forms


def test_conjunctions_that_share_a_box_become_one_case():
    text = declared(1, 2) + (
        "(assert (or (and (>= X_0 0) (<= X_0 1) (<= Y_0 0)) (and (>= X_0 0) (<= X_0 1) (>= Y_0 2) (<= Y_1 Y_0))"
        " (and (>= X_0 3) (<= X_0 4) (>= Y_1 7))))"
    )
    specification = read_vnnlib(text)
    assert [len(case.unsafe) for case in specification.cases] == [2, 1]
    assert [[*zip(p.matrix.tolist(), p.offset.tolist(), strict=True)] for p in specification.cases[0].unsafe] == [
        [([1.0, 0.0], 0.0)],
        [([-1.0, 0.0], -2.0), ([-1.0, 1.0], 0.0)],
    ]


def test_numbers_keep_their_digits_and_sides_may_be_swapped():
    text = declared(2, 1) + (
        "(assert (<= -0.12345678901234567 X_0))(assert (>= 1e-3 X_0 ))(assert (<= 0.5 X_1 .75))"
        "(assert (>= (+ (* 3 Y_0) 1) (- 2)))"
    )
    (case,) = read_vnnlib(text, 2, 1).cases
    assert isinstance(case.region, Box)
    assert case.region.lower.tolist() == [[-0.12345678901234567, 0.5]]
    assert case.region.upper.tolist() == [[1e-3, 0.75]]
    assert case.rows.tolist() == [[-3.0]]
    assert case.offsets.tolist() == [3.0]


def test_bounds_are_intersected_and_impossible_conjunctions_left_out():
    text = (
        declared(1, 1)
        + bounds((0.0, 1.0))
        + ("(assert (or (<= X_0 0.25) (>= X_0 0.75)))(assert (or (>= X_0 0.5) (<= X_0 0.5)))(assert (<= Y_0 0))")
    )
    boxes = [case.region for case in read_vnnlib(text).cases]
    ends = sorted((float(b.lower), float(b.upper)) for b in boxes if isinstance(b, Box))
    assert ends == [(0.0, 0.25), (0.75, 1.0)]


def test_a_property_may_bound_no_output():
    assert read_vnnlib(declared(1, 1) + bounds((0.0, 1.0))).violated(torch.tensor([0.5]), torch.tensor([3.0]))


def test_files_are_read_plain_and_compressed(tmp_path: Path):
    text = "; a property\n(set-logic QF_LRA)\n(declare-fun X_0 () Real)\n(declare-const Y_0 Real)\n" + bounds(
        (0.0, 1.0)
    )
    (tmp_path / "a.vnnlib").write_text(text)
    (tmp_path / "a.vnnlib.gz").write_bytes(gzip.compress(text.encode()))
    for source in (text, str(tmp_path / "a.vnnlib"), tmp_path / "a.vnnlib.gz"):
        assert read_vnnlib(source, 1, 1).input_shape == (1,)


GOOD = declared(2, 2) + bounds((0.0, 1.0), (0.0, 1.0))
FAULTS = {
    "(assert (< Y_0 1))": r"line 6: strict comparisons are not read.*write <=",
    "(assert (not (<= Y_0 1)))": r"line 6: 'not' is not understood in a formula\. Understood are",
    "(assert (<= X_0 X_1))": r"line 6: an input is related to another variable: inputs must form a box",
    "(assert (<= Y_0 X_1))": r"line 6: an input is related",
    "(assert (<= Y_2 1))": r"line 6: Y_2 is not declared",
    "(assert (<= Z 1))": r"line 6: Z is no number or variable",
    "(assert (<= Y_0 1_0))": r"line 6: 1_0 is no number",
    "(assert (<= Y_0 nan))": r"line 6: nan is no number",
    "(assert (<= Y_0 1e999))": r"line 6: these numbers leave the range of float64",
    "(assert (<= (* Y_0 Y_1) 1))": r"line 6: a product of variables is not linear",
    "(assert (<= (/ Y_0 0) 1))": r"line 6: this use of '/' is not understood",
    "(assert (<= (max Y_0 Y_1) 1))": r"line 6: this use of 'max' is not understood",
    "(assert (<= Y_0))": r"line 6: a comparison takes two expressions, got 1",
    "(assert Y_0)": r"line 6: a formula stands in parentheses",
    "(assert)": r"line 6: assert takes one formula, got 0",
    "(assert ((<= Y_0 1)))": r"line 6: a parenthesis must begin with what it does",
    "(assert (<= Y_0 1)": r"line 6: this parenthesis is never closed",
    "(assert (<= Y_0 1)))": r"line 6: this parenthesis closes nothing",
    "assert": r"line 6: a word outside of parentheses",
    "\n(declare-network N)": r"line 7: 'declare-network' is not understood",
    "(declare-const Z Real)": r"line 6: inputs are declared as \(declare-const X_0 Real\)",
    "(declare-const X_0 Int)": r"line 6: inputs are declared as",
    "(declare-const X_0 Real)": r"line 6: X_0 is declared twice",
    "(declare-const X_7 Real)": r"declares 3 inputs, but no X_2",
    "(declare-const X_2 Real)": r"gives X_2 no lower bound",
    "(declare-const X_2 Real)(declare-const X_3 Real)(assert (>= X_2 0))(assert (>= X_3 0))": (
        r"gives X_2 no upper bound \(nor 1 other"
    ),
    "(assert (<= X_1 -0.5))": r"line 6: no input satisfies .*: X_1 would have to be at least 0 and at most -0\.5",
    "(assert (or))": r"asserts what is never true",
    "(assert (<= 2 1))": r"asserts what is never true",
    "(" * 300 + ")" * 300: r"more than 200 parentheses inside each other",
    "(assert (or (<= Y_0 1) (<= Y_1 1)))"
    * 20: r"has 1048576 conjunctions .* up to 200000 are read: split the property",
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.items(), ids=[text[:40] for text in FAULTS])
def test_what_is_not_understood_is_refused_with_its_line(fault: str, message: str):
    lines = GOOD.count("\n")
    text = "\n" * (5 - lines) + GOOD + fault if lines < 5 else GOOD.replace("\n", " ", lines - 5) + fault
    with pytest.raises(BadInput, match="(?s)" + message):
        read_vnnlib(text)


def test_refusals_show_the_text_of_the_line():
    with pytest.raises(BadInput) as refusal:
        read_vnnlib(GOOD + "(assert (or (<= Y_0 1)\n   (>= Y_0 (sin Y_1)) ))\n")
    assert str(refusal.value).endswith("\n    (sin Y_1)) ))")


def test_counts_must_be_those_of_the_network():
    with pytest.raises(BadInput, match="the property declares 2 inputs and the network has 5: do they belong together"):
        read_vnnlib(GOOD, inputs=5)
    with pytest.raises(BadInput, match="declares 2 outputs and the network has 3"):
        read_vnnlib(GOOD, inputs=2, outputs=3)
    with pytest.raises(BadInput, match="declares 0 inputs"):
        read_vnnlib("(declare-const Y_0 Real)")


def test_files_that_cannot_be_read_are_named(tmp_path: Path):
    with pytest.raises(BadInput, match=r"there is no file .*nowhere\.vnnlib"):
        read_vnnlib(tmp_path / "nowhere.vnnlib")
    (tmp_path / "bad.vnnlib.gz").write_bytes(b"no gzip")
    with pytest.raises(BadInput, match=r"cannot read .*bad\.vnnlib\.gz"):
        read_vnnlib(tmp_path / "bad.vnnlib.gz")
    (tmp_path / "bad.vnnlib").write_bytes(b"\xff\xfe(")
    with pytest.raises(BadInput, match="is not a text file in UTF-8"):
        read_vnnlib(tmp_path / "bad.vnnlib")


# ---- real files


def points_near(specification: Specification, draw: random.Random) -> tuple[list[float], list[float]]:
    """A point in (or just outside) a region, and an output with entries on and around the numbers of the property."""
    case = draw.choice(specification.cases)
    assert isinstance(case.region, Box)
    lower, upper = case.region.lower.flatten(), case.region.upper.flatten()
    share = torch.tensor([draw.choice([0.0, 1.0, draw.random()]) for _ in range(len(lower))], dtype=torch.float64)
    x = torch.minimum(lower + share * (upper - lower), upper).tolist()
    if draw.random() < 0.2:
        x[draw.randrange(len(x))] += draw.choice([-1, 1]) * 1e-3
    rows = draw.choice(case.unsafe)
    center = torch.linalg.lstsq(rows.matrix, rows.offset[:, None], driver="gelsd").solution.flatten()
    spread = draw.choice([0.0, 1e-3, 1.0, 100.0])
    y = [float(c) + draw.gauss(0, 1) * spread for c in center]
    return x, y


@pytest.mark.slow
def test_real_properties_mean_what_their_operators_mean(real_data: Path):
    folder = real_data / "vnn"
    if not (folder / "instances.csv").exists():
        pytest.skip(f"{folder} has no instances.csv")
    with (folder / "instances.csv").open() as file:
        sizes = {row["vnnlib"]: (int(row["inputs"]), int(row["outputs"])) for row in csv.DictReader(file)}
    draw = random.Random(0)
    outcomes = {True: 0, False: 0}
    for name, (inputs, outputs) in sizes.items():
        specification = read_vnnlib(folder / name, inputs, outputs)
        forms = nested((folder / name).read_text())
        for _ in range(3):
            x, y = points_near(specification, draw)
            truth = holds(forms, x, y)
            point, output = (torch.tensor(values, dtype=torch.float64) for values in (x, y))
            assert specification.violated(point, output) == truth, name
            outcomes[truth] += 1
    assert min(outcomes.values()) > 100
