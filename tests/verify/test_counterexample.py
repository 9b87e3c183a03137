"""Counterexamples on file and run again: digits kept, regions never left, the original program asked."""

import gzip
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.verify.counterexample import Counterexample, OnnxProgram, replay, settled
from corollary.verify.sets import Ball, Box
from corollary.verify.specification import Case, Halfspaces, Specification, contains

F64 = torch.float64


def at_most(box: Box | Ball, value: float, outputs: int = 1) -> Specification:
    """Unsafe: y_0 <= value."""
    matrix = torch.zeros(1, outputs, dtype=F64)
    matrix[0, 0] = 1
    return Specification((Case(box, (Halfspaces(matrix, torch.tensor([value], dtype=F64)),)),))


def unit_box(*shape: int) -> Box:
    return Box(torch.zeros(1, *shape, dtype=F64), torch.ones(1, *shape, dtype=F64))


# ---- on file


def test_a_written_counterexample_is_read_bit_by_bit(tmp_path: Path):
    x = torch.tensor([[[0.1, -1e-300], [1 / 3, 12345678901234567.0]]], dtype=F64)
    y = torch.tensor([[math.pi, -0.0]], dtype=F64)
    found = Counterexample.read(Counterexample(x, y).write(tmp_path / "c.counterexample"))
    assert torch.equal(found.x, x.flatten(1))
    assert torch.equal(found.y, y)


def test_the_text_is_that_of_the_competition():
    text = Counterexample(torch.tensor([[0.5, 2.0]], dtype=F64), torch.tensor([[-1.25]])).text()
    assert text == "((X_0 0.5)\n (X_1 2.0)\n (Y_0 -1.25))\n"


def test_a_verdict_may_stand_above(tmp_path: Path):
    (tmp_path / "r").write_text("sat\n((X_0 1e-3)\n(X_1 2)\n(Y_0 3))")
    assert Counterexample.read(tmp_path / "r").x.tolist() == [[1e-3, 2.0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [("unsat", "assigns 0 X"), ("((X_1 3))", "assigns 1 X, not X_0 and on"), ("((X_0 many))", "what is no number")],
)
def test_other_texts_are_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / "r").write_text(text)
    with pytest.raises(BadInput, match=message):
        Counterexample.read(tmp_path / "r")
    with pytest.raises(BadInput, match="cannot read"):
        Counterexample.read(tmp_path / "absent")


# ---- points that stay in their regions


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, F64])
def test_a_settled_point_is_in_its_box_and_is_a_number_of_the_dtype(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    lower = torch.randn(1, 500, generator=generator, dtype=F64)
    box = Box(lower, lower + 0.1)
    for x in (box.lower, box.upper, box.center, box.upper + 1e-7):
        point = settled(box, x, dtype)
        assert contains(box, point)
        assert torch.equal(point.to(dtype).double(), point)
        assert float((point - x).abs().max()) <= 1e-7 + 4 * torch.finfo(dtype).eps  # entries are below 4


def test_a_fixed_input_that_the_dtype_cannot_hold_stays_exact():
    box = Box(torch.tensor([[0.1, 0.0]], dtype=F64), torch.tensor([[0.1, 1.0]], dtype=F64))
    point = settled(box, torch.tensor([0.1, 0.3]), torch.float32)
    assert point[0, 0] == 0.1
    assert point[0, 1] == torch.tensor(0.3).double()
    assert contains(box, point)


@pytest.mark.parametrize("norm", [1.0, 2.0, 3.0])
def test_a_settled_point_is_in_its_ball(norm: float):
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        center = torch.randn(1, 2, 3, generator=generator, dtype=F64)
        direction = torch.randn(1, 2, 3, generator=generator, dtype=F64)
        edge = center + 0.5 * direction / torch.linalg.vector_norm(direction, norm)
        ball = Ball(center, 0.5, norm)
        point = settled(ball, edge + 1e-8, torch.float32)
        assert contains(ball, point)
        torch.testing.assert_close(point, edge, rtol=0, atol=1e-4)


# ---- replay on a module


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.scale * x).flatten(1).sum(1, keepdim=True)


def test_a_replayed_point_is_reported_with_the_output_of_the_network():
    module = Sum().train()
    specification = at_most(unit_box(1, 2), 0.5)
    found = replay(module, specification, torch.tensor([0.25, 0.125]))
    assert found is not None
    assert found.x.tolist() == [[[0.25, 0.125]]]
    assert found.y.tolist() == [[0.375]]  # dropout is off
    assert module.drop.training  # and on again
    assert specification.violated(found.x, found.y)


def test_what_violates_nothing_or_lies_outside_is_no_counterexample():
    specification = at_most(unit_box(1, 2), 0.5)
    assert replay(Sum(), specification, torch.tensor([0.5, 0.25])) is None
    assert replay(Sum(), specification, torch.tensor([-0.5, 0.25])) is None


def test_a_point_just_outside_by_rounding_is_moved_in():
    third = torch.tensor(1 / 3, dtype=F64)
    box = Box(torch.zeros(1, 1, dtype=F64), third.reshape(1, 1))
    rounded_up = third.float()
    assert rounded_up.double() > third
    found = replay(Sum(), at_most(box, 0.5), rounded_up)
    assert found is not None
    assert contains(box, found.x)


def test_each_case_is_judged_by_its_own_unsafe_set():
    first, second = at_most(unit_box(1), -1.0).cases[0], at_most(unit_box(1), 0.5).cases[0]
    assert replay(Sum(), Specification((first, second)), torch.tensor([0.25])) is not None
    assert replay(Sum(), Specification((first,)), torch.tensor([0.25])) is None


# ---- replay on the original file


def written(path: Path, inputs: dict[str, list[Any]], kind: str = "FLOAT") -> Path:
    """A file that computes (sum of all entries, -7)."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, dtype = onnx.helper, getattr(onnx.TensorProto, kind)
    make = helper.make_node
    nodes = [
        *(make("ReduceSum", [name], [f"sum_{name}"], keepdims=0) for name in inputs),
        *(make("Reshape", [f"sum_{name}", "one"], [f"flat_{name}"]) for name in inputs),
        make("Concat", [f"flat_{name}" for name in inputs], ["parts"], axis=0),
        make("ReduceSum", ["parts"], ["total"], keepdims=1),
        make("Concat", ["total", "seven"], ["y"], axis=0),
    ]
    graph = helper.make_graph(
        nodes,
        "sums",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", dtype, [2])],
        [
            helper.make_tensor("one", onnx.TensorProto.INT64, [1], [1]),
            helper.make_tensor("seven", dtype, [1], [-7]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    content = model.SerializeToString()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("shape", [[4], [1, 4], [1, 2, 2], ["batch", 2, 2], ["a", "b", 4]], ids=str)
@pytest.mark.parametrize("name", ["net.onnx", "net.onnx.gz"])
def test_the_file_is_run_in_its_own_layout(tmp_path: Path, shape: list[Any], name: str):
    path = written(tmp_path / name, {"x": shape})
    found = replay(path, at_most(unit_box(4), 0.5, outputs=2), torch.tensor([0.1, 0.05, 0.2, 0.05]))
    assert found is not None
    assert found.x.shape == (1, 4)
    torch.testing.assert_close(found.y, torch.tensor([[0.4, -7.0]]))
    assert replay(str(path), at_most(unit_box(4), 0.5, outputs=2), torch.full((4,), 0.2)) is None


def test_several_inputs_take_their_entries_in_order(tmp_path: Path):
    program = OnnxProgram(written(tmp_path / "net.onnx", {"a": [1, 2], "b": [3]}, "DOUBLE"))
    assert program.dtype == F64
    assert program(torch.arange(5.0)).tolist() == [[10.0, -7.0]]
    with pytest.raises(BadInput, match=r"net\.onnx takes 5 inputs, and the sample has 4"):
        program(torch.zeros(4))


def test_the_file_runs_on_a_point_of_its_own_dtype_inside_the_box(tmp_path: Path):
    path = written(tmp_path / "net.onnx", {"x": [1, 1]})
    tenth = torch.tensor([[0.1]], dtype=F64)  # no float32: the nearest is above
    found = replay(path, at_most(Box(tenth - 0.05, tenth), 1.0, outputs=2), tenth)
    assert found is not None
    assert float(found.x) < 0.1
    assert float(found.x) == float(found.x.float())


def test_files_that_cannot_be_run_are_refused(tmp_path: Path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "bad.onnx").write_bytes(b"not a network")
    with pytest.raises(BadInput, match=r"onnxruntime cannot run .*bad\.onnx"):
        OnnxProgram(tmp_path / "bad.onnx")
    with pytest.raises(BadInput, match=r"takes inputs of type tensor\(int64\); wanted one floating-point type"):
        OnnxProgram(written(tmp_path / "whole.onnx", {"x": [1, 2]}, "INT64"))
