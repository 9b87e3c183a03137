"""Networks written out: the same function, in ops that bounds understand."""

import csv
import gzip
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cases import NETS, Case, captured, tensors_of
from corollary.base.errors import NoRule
from corollary.graph import Graph, Node, capture, evaluate, values
from corollary.graph import ops as O
from corollary.graph.builder import Builder
from corollary.graph.evaluate import difference
from corollary.graph.onnx import read_onnx
from corollary.verify.intervals import Interval, propagate
from corollary.verify.primitives import is_primitive, primitives
from corollary.verify.primitives.sorting import comparators

REFUSED = {"embedding", "foreign"}
WRITTEN = [case for case in NETS if case.name not in REFUSED]
N = O.BatchSize()


def only_primitive(graph: Graph) -> bool:
    moving = graph.depends_on_inputs()
    return all(
        is_primitive(node.op, frozenset(i for i, source in enumerate(node.inputs) if source in moving))
        for node in graph.computing()
        if node in moving
    )


def check_ranges(graph: Graph, ranges: dict, inputs) -> None:
    for node, x in values(graph, inputs, list(ranges)).items():
        low, high = ranges.get(node, (-np.inf, np.inf))
        assert float(x.min()) >= low - 1e-12
        assert float(x.max()) <= high + 1e-12


@pytest.mark.parametrize("case", WRITTEN, ids=str)
def test_the_same_function_in_primitive_ops(case: Case):
    graph = captured(case)[1]
    inputs = case.inputs(3)
    written, ranges = primitives(graph)
    assert only_primitive(written)
    assert not written.parameter_names
    assert set(ranges) <= set(written.nodes)
    assert difference(graph, evaluate(written, inputs), evaluate(graph, inputs), tolerance=1e-10) is None
    check_ranges(written, ranges, inputs)


@pytest.mark.parametrize("case", WRITTEN, ids=str)
def test_what_is_written_out_has_sound_intervals_too(case: Case):
    written, _ = primitives(captured(case)[1])
    boxes = [Interval(x - 0.02, x + 0.03) for x in tensors_of(case.inputs(2)) for x in [torch.cat([x] * 100)]]
    generator = torch.Generator().manual_seed(2)
    points = tuple(
        box.lower + (box.upper - box.lower) * torch.rand(box.shape, generator=generator, dtype=torch.float64)
        for box in boxes
    )
    bounds = propagate(written, boxes)
    for node, x in values(written, points, ()).items():
        box = bounds[node]
        assert isinstance(box, Interval)
        assert bool((box.lower <= x + 1e-9 * (1 + x.abs())).all())
        assert bool((box.upper >= x - 1e-9 * (1 + x.abs())).all())


def graph_of(build: Callable[..., Node], *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Graph:
    """A graph of inputs (batch, *shape) and what `build` makes of them."""
    builder = Builder("built in a test")
    inputs = [builder.input(f"x{i}", (N, *shape), dtype) for i, shape in enumerate(shapes)]
    return builder.finish([build(builder, *inputs)])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(graph: Graph, *inputs: Tensor, tolerance: float = 1e-12) -> Graph:
    written, ranges = primitives(graph)
    assert only_primitive(written)
    torch.testing.assert_close(evaluate(written, inputs), evaluate(graph, inputs), rtol=tolerance, atol=tolerance)
    check_ranges(written, ranges, inputs)
    return written


def kinds(graph: Graph) -> list[str]:
    return [type(node.op).__name__ for node in graph.computing()]


ONE_INPUT: tuple[O.Op, ...] = (
    O.Softmax(1),
    O.LogSoftmax(2),
    O.LogSumExp((1, 2), True),
    O.Norm((1,)),
    O.Min((2,)),
    O.Sort(1),
    O.Sort(2, True),
    O.AdaptiveMaxPool((2, 3)),
    O.AdaptiveMaxPool((4, 3)),
    O.AdaptiveMaxPool((3, 2)),
    O.GroupNorm(2),
    O.LayerNorm((4, 6)),
    O.Power(-2.0),
    O.Power(1.0),
    O.Cast(torch.float64),
    O.Reshape((N, 4, 6)),
    O.Permute((0, -2, -1)),
)


@pytest.mark.parametrize("op", ONE_INPUT, ids=str)
def test_ops_of_one_input(op: O.Op):
    check(graph_of(lambda builder, x: builder.emit(op, x), (4, 6)), draw(3, 4, 6))


ENTRYWISE: tuple[O.Op, ...] = (O.Divide(), O.Maximum(), O.Minimum(), O.Multiply(), O.Compare(">"))
EQUATIONS = ("bij,bij->b", "bij,bkj->bik", "bij,bkl->bil", "bij,bij->bji", "bij,bik->bikj", "bij,ckj->bkci")


@pytest.mark.parametrize("op", [*ENTRYWISE, *map(O.Einsum, EQUATIONS)], ids=str)
def test_ops_of_two_unknowns(op: O.Op):
    def build(builder: Builder, x: Node, y: Node) -> Node:
        return builder.emit(O.Cast(torch.float64), builder.emit(op, x, y))

    check(graph_of(build, (4, 6), (4, 6)), draw(3, 4, 6), draw(3, 4, 6, seed=5))


@pytest.mark.parametrize("op", ENTRYWISE, ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_ops_of_an_unknown_and_a_constant(op: O.Op, first: bool):
    def build(builder: Builder, x: Node) -> Node:
        stored = builder.constant("stored", draw(4, 1, seed=4))
        found = builder.emit(op, *((stored, x) if first else (x, stored)))
        return builder.emit(O.Cast(torch.float64), found)

    check(graph_of(build, (4, 6)), draw(3, 4, 6))


@pytest.mark.parametrize("relation", ["<", "<=", ">", ">=", "==", "!="])
def test_comparisons_become_numbers(relation):
    def build(builder: Builder, x: Node) -> Node:
        condition = builder.emit(O.Compare(relation), x, builder.scalar(0.0, torch.float64))
        return builder.emit(O.Where(), condition, builder.emit(O.Exp(), x), builder.scalar(-3.0, torch.float64))

    check(graph_of(build, (5,)), torch.tensor([[-1.0, -1e-300, 0.0, 1e-300, 2.0]], dtype=torch.float64))


def test_a_choice_by_a_constant_keeps_infinities_apart():
    seen = torch.tensor([True, False, True])

    def build(builder: Builder, x: Node) -> Node:
        masked = builder.emit(
            O.Where(), builder.constant("seen", seen), x, builder.constant("far", torch.tensor(-torch.inf).double())
        )
        return builder.emit(O.Softmax(1), masked)

    written = check(graph_of(build, (3,)), draw(4, 3))
    assert all(tensor.isfinite().all() for tensor in written.tensors.values())
    box = propagate(written, [Interval(draw(4, 3) - 1, draw(4, 3) + 1)])[written.outputs[0]]
    assert isinstance(box, Interval)
    assert not box.upper[:, 1].any()


def test_copies_are_left_out_and_equal_nodes_merged():
    def build(builder: Builder, x: Node) -> Node:
        a = builder.emit(O.ReLU(), builder.emit(O.Identity(), x))
        b = builder.emit(O.ReLU(), builder.emit(O.Cast(torch.float64), x))
        square = builder.emit(O.Multiply(), a, b)
        turned = builder.emit(O.Permute((0, 2, 1)), builder.emit(O.Permute((0, 2, 1)), square))
        flat = builder.emit(O.Reshape((N, 12)), builder.emit(O.Reshape((N, 3, 4)), turned))
        return builder.emit(O.Expand((N, 12)), flat)

    assert kinds(check(graph_of(build, (2, 6)), draw(3, 2, 6))) == ["ReLU", "Power", "Reshape"]


def test_constants_are_computed_and_their_nodes_are_gone():
    net = next(case for case in NETS if case.name == "normalised-weights")
    written, _ = primitives(captured(net)[1])
    moving = written.depends_on_inputs()
    assert all(node in moving for node in written.computing())


def test_normalisation_is_folded_into_the_layer_before_it():
    layers = [nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(2, 4, 3, bias=False), nn.ConvTranspose2d(2, 4, 3)]
    for layer in layers:
        net = nn.Sequential(layer, nn.BatchNorm2d(4)).double()
        net(draw(8, 2, 5, 5))  # statistics of its own
        graph = capture(net.eval(), draw(2, 2, 5, 5))
        assert len(check(graph, draw(3, 2, 5, 5)).computing()) == 1
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    net(draw(8, 3))
    assert kinds(check(capture(net.eval(), draw(2, 3)), draw(3, 3))) == ["Linear"]
    split = nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)).double()
    split(draw(8, 4, 5, 5))
    graph = capture(split.eval(), draw(2, 4, 5, 5))
    assert kinds(check(graph, draw(3, 4, 5, 5))) == ["ConvolutionTransposed", "Multiply", "Add"]


def test_a_layer_that_others_read_keeps_its_weights():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return self.norm(y) + y

    net = Both().double().eval()
    written = check(capture(net, draw(2, 1, 4, 4)), draw(3, 1, 4, 4))
    assert kinds(written).count("Convolution") == 1


def test_nodes_keep_layer_and_source():
    net = nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1)).double()
    written, _ = primitives(capture(net, draw(2, 3)))
    assert {node.layer for node in written.computing()} == {"0", "1"}
    assert [node.name for node in written.computing()][1].startswith("softmax/")


@pytest.mark.parametrize("n", range(1, 17))
def test_sorting_networks_sort_every_order_of_zeros_and_ones(n: int):
    # A network of comparators that sorts all sequences of zeros and ones sorts everything (Knuth 1973, theorem Z).
    rows = (torch.arange(2**n)[:, None] >> torch.arange(n)) & 1
    for layer in comparators(n):
        assert len({i for pair in layer for i in pair}) == 2 * len(layer)
        for i, j in layer:
            rows[:, i], rows[:, j] = torch.minimum(rows[:, i], rows[:, j]), torch.maximum(rows[:, i], rows[:, j])
    assert bool((rows.diff(dim=1) >= 0).all())


def test_a_pair_is_sorted_by_one_relu():
    written = check(graph_of(lambda builder, x: builder.emit(O.Sort(2), x), (3, 2)), draw(4, 3, 2))
    assert kinds(written).count("ReLU") == 1


def test_what_cannot_be_written_out_is_refused_by_name():
    for name, message in (("foreign", r"Torch\(.*node .*networks.py"), ("embedding", "Gather")):
        case = next(case for case in NETS if case.name == name)
        with pytest.raises(NoRule, match=message):
            primitives(captured(case)[1])
    with pytest.raises(NoRule, match="sorts 17 entries, and at most 16"):
        primitives(graph_of(lambda builder, x: builder.emit(O.Sort(1), x), (17,)))
    with pytest.raises(NoRule, match="products without repeated labels"):
        primitives(graph_of(lambda builder, x, y: builder.emit(O.Einsum("bii,bij->bj"), x, y), (3, 3), (3, 2)))


def points_in_box(path: Path, count: int) -> Tensor:
    """Inputs from the first box of a property."""
    text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
    ends: dict[str, dict[int, float]] = {"<=": {}, ">=": {}}
    for relation, index, number in re.findall(r"\((<=|>=)\s+X_(\d+)\s+([-+\d.eE]+)\)", text):
        ends[relation].setdefault(int(index), float(number))
    upper, lower = (np.array([side[i] for i in range(len(side))]) for side in (ends["<="], ends[">="]))
    return torch.from_numpy(lower + (upper - lower) * np.random.default_rng(0).uniform(size=(count, len(lower))))


@pytest.mark.slow
def test_every_network_of_the_competitions(real_data: Path):
    with (real_data / "vnn/instances.csv").open() as file:
        properties = {row["onnx"]: row["vnnlib"] for row in csv.DictReader(file)}
    for network, property_file in properties.items():
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            graph = read_onnx(real_data / "vnn" / network, dtype=dtype, check=False)
            x = points_in_box(real_data / "vnn" / property_file, 3).reshape(3, *graph.inputs[0].shape[1:]).to(dtype)
            written, _ = primitives(graph)
            assert only_primitive(written), network
            wanted = evaluate(graph, x)
            assert difference(graph, evaluate(written, x), wanted, tolerance=tolerance) is None, network
            for program in (graph, written):
                box = propagate(program, [Interval(x - 1e-3, x + 1e-3)])[program.outputs[0]]
                assert isinstance(box, Interval)
                slack = (1e-9 if dtype == torch.float64 else 1e-5) * (1 + wanted.abs())
                assert bool(((box.lower <= wanted + slack) & (wanted - slack <= box.upper)).all()), network
