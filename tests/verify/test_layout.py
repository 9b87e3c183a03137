"""Where samples lie: entries of one sample are taken together however the network folds them into an axis."""

import pytest
import torch

from corollary.base.errors import NoRule
from corollary.graph import Graph, Node, values
from corollary.graph import ops as O
from corollary.graph.builder import Builder
from corollary.verify.layout import Place, Rows, pack, place, sample_shape, samples_first, unpack

N = O.BatchSize()


def chain(shape: tuple[int, ...], *ops: O.Op) -> Graph:
    builder = Builder("built in a test")
    node = builder.input("x", (N, *shape), torch.float64)
    for op in ops:
        node = builder.emit(op, node)
    return builder.finish([node])


CHAINS: list[tuple[tuple[int, ...], tuple[O.Op, ...], Place]] = [
    ((3, 4), (), Place(0)),
    ((3, 4), (O.Permute((1, 0, 2)),), Place(1)),
    ((3, 4), (O.Reshape((O.BatchSize(3), 4)),), Place(0, 1, 3)),
    ((3, 4), (O.Permute((1, 0, 2)), O.Reshape((O.BatchSize(3), 4))), Place(0, 3, 1)),
    ((3, 4), (O.Permute((1, 0, 2)), O.Reshape((O.BatchSize(6), 2)), O.Tanh()), Place(0, 3, 2)),
    ((3, 4), (O.Permute((1, 2, 0)), O.Reshape((3, O.BatchSize(4)))), Place(1, 4, 1)),
    ((3, 4), (O.Permute((1, 0, 2)), O.Reshape((O.BatchSize(3), 4)), O.Reshape((3, N, 4))), Place(1)),
    ((3,), (O.Select(1, 2),), Place(0)),
]


@pytest.mark.parametrize(("shape", "ops", "expected"), CHAINS)
def test_each_sample_keeps_its_own_entries(shape: tuple[int, ...], ops: tuple[O.Op, ...], expected: Place):
    graph = chain(shape, *ops)
    node = graph.outputs[0]
    assert place(node) == expected
    # the value of sample i is i everywhere, so a misplaced entry shows
    x = torch.arange(6, dtype=torch.float64).reshape(6, *(1,) * len(shape)).expand(6, *shape)
    found = unpack(node, values(graph, (x,), [node])[node], 2, 3)
    assert found.shape == (2, 3, *sample_shape(node))
    wanted = x.flatten(1)[:, 0]
    for op in ops:
        wanted = torch.tanh(wanted) if isinstance(op, O.Tanh) else wanted
    assert torch.equal(found.flatten(2), wanted.reshape(2, 3, 1).expand_as(found.flatten(2)))


@pytest.mark.parametrize(("shape", "ops", "expected"), CHAINS)
def test_packing_undoes_unpacking(shape: tuple[int, ...], ops: tuple[O.Op, ...], expected: Place):
    graph = chain(shape, *ops)
    node = graph.outputs[0]
    value = values(graph, (torch.randn(6, *shape, dtype=torch.float64),), [node])[node]
    assert torch.equal(pack(node, unpack(node, value, 2, 3)), value)
    assert samples_first(node) == (expected.axis == 0 and expected.blocks == 1)


def test_rows_are_widened_sample_by_sample():
    node = chain((3, 4), O.Permute((1, 0, 2))).outputs[0]
    rows = torch.randn(1, 2, 3, 4)
    wide = Rows(pack(node, rows), 1, 2).widened(node, 5)
    assert torch.equal(wide.unpacked(node), rows.expand(5, 2, 3, 4))


@pytest.mark.parametrize("ops", [(O.Sum((0,)),), (O.Reshape((4, N, 3)), O.Reshape((N, 4, 3)))])
def test_values_that_mix_samples_are_refused(ops: tuple[O.Op, ...]):
    node: Node = chain((3, 4), *ops).outputs[0] if len(ops) == 1 else chain((3, 4), *ops).nodes[1]
    with pytest.raises(NoRule, match="samples"):
        place(node)


def test_an_axis_that_is_cut_along_the_samples_is_refused():
    def cut(x: Node, builder: Builder) -> Node:
        folded = builder.emit(O.Reshape((O.BatchSize(3), 4)), x)
        return builder.emit(O.Flip((0,)), folded)

    builder = Builder("built in a test")
    node = cut(builder.input("x", (N, 3, 4), torch.float64), builder)
    with pytest.raises(NoRule, match="which entries"):
        place(node)
