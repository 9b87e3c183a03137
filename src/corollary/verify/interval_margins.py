"""Interval bounds of a classifier's margins, differentiable by the parameters of the user's own module.

The label's rows are multiplied into the last weighted layer before absolute values are taken (elision): the bound of
$o_y - o_j$ is then that of one linear function of the last hidden layer, not a difference of two bounds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.graph import Graph, Node, capture
from corollary.graph.ops import Convolution, ConvolutionTransposed, Einsum, Input, Linear, MatMul
from corollary.verify.intervals import Interval, propagate
from corollary.verify.layout import pack, sample_shape, sample_size, unpack
from corollary.verify.transpose import transposed

WEIGHTED = (Linear, Convolution, ConvolutionTransposed, MatMul, Einsum)
"""The ops that mix entries by weights: rows are multiplied into the last of them and no further."""
FEW_CLASSES = 32
"""Up to so many classes, the rows of all labels are multiplied into the last layer once, not those of each sample."""
DataRange: TypeAlias = tuple[float | int, float | int] | None
"""The least and the greatest value of an input, or None where there is none."""


@final
@dataclass(frozen=True, eq=False)
class LastLayer:
    """The affine end of a network: its nodes, last first, up to the last weighted layer; and the node that it reads.

    Where the output is not affine in one node (a softmax, a sum of branches) there is no such layer: `nodes` is
    empty, and rows are functions of the output itself.
    """

    nodes: tuple[Node, ...]
    reads: Node
    moving: frozenset[Node]

    @classmethod
    def of(cls, graph: Graph) -> "LastLayer":
        """The last layer of the graph's output."""
        moving = graph.depends_on_inputs()
        found: list[Node] = []
        node = graph.outputs[0]
        while not isinstance(node.op, Input) and not (found and isinstance(found[-1].op, WEIGHTED)):
            positions = [i for i, source in enumerate(node.inputs) if source in moving]
            if len(positions) != 1 or not node.op.affine_in(frozenset(positions)):
                break
            found.append(node)
            node = node.inputs[positions[0]]
        if not any(isinstance(end.op, WEIGHTED) for end in found):
            return cls((), graph.outputs[0], moving)
        return cls(tuple(found), node, moving)

    @property
    def is_weighted(self) -> bool:
        """Whether there is a layer for rows to be multiplied into."""
        return bool(self.nodes)

    @property
    def constants(self) -> tuple[Node, ...]:
        """The nodes, weights among them, whose values `pull` needs."""
        return tuple(source for node in self.nodes for source in node.inputs if source not in self.moving)

    def pull(
        self, rows: Float[Tensor, "batch row output"], values: Mapping[Node, Any]
    ) -> Float[Tensor, "batch row entry"]:
        """Linear functions of the output as linear functions of `reads`, without their constant terms.

        Args: `values`: of the constants.
        """
        batch, count, _ = rows.shape
        output = self.nodes[0] if self.nodes else self.reads
        flowing = pack(output, rows.reshape(batch, count, *sample_shape(output)))
        constants = [values[node] for node in self.constants]
        if torch.is_grad_enabled() and any(value.requires_grad for value in constants):
            flowing = flowing.requires_grad_()  # so that derivatives that transpose an op are themselves differentiable
        for node in self.nodes:
            operands = [None if s in self.moving else _repeated(s, values[s], batch, count) for s in node.inputs]
            position = operands.index(None)
            (flowing,) = transposed(node, (position,), operands, flowing, batch * count)
        return unpack(self.reads, flowing, batch, count).flatten(2)


def _repeated(node: Node, value: Tensor, batch: int, count: int) -> Tensor:
    """A constant with `count` copies of each sample where it has a batch axis."""
    if all(isinstance(size, int) for size in node.shape):
        return value
    samples = unpack(node, value, batch, 1)
    return pack(node, samples.expand(batch, count, *samples.shape[2:]))


@final
class IntervalNetwork:
    """A network captured once, to be bounded often, by its module's own and present parameters.

    Args:
        model: a module with one output, or a graph, whose stored tensors are used.
        example: an input that a module is captured with.

    Raises: CannotCapture; BadInput, for a network of several inputs or outputs.
    """

    def __init__(self, model: nn.Module | Graph, example: Tensor | None = None):
        self.module = model if isinstance(model, nn.Module) else None
        if isinstance(model, Graph):
            self.graph = model
        elif example is None:
            raise BadInput("a module needs an example of its input to be captured with")
        else:
            self.graph = capture(model, example)
        if len(self.graph.outputs) != 1 or len(self.graph.inputs) != 1:
            raise BadInput(
                f"interval margins are of networks with one input and one output; this one has "
                f"{len(self.graph.inputs)} and {len(self.graph.outputs)}"
            )
        self.last = LastLayer.of(self.graph)

    @classmethod
    def of(cls, model: "Network", example: Tensor) -> "IntervalNetwork":
        """The network itself where it is one already, else captured with the example."""
        return model if isinstance(model, IntervalNetwork) else cls(model, example[:2])

    @property
    def output(self) -> Node:
        """The node whose value is bounded."""
        return self.graph.outputs[0]

    @property
    def classes(self) -> int:
        """Entries of one sample's output."""
        return sample_size(self.output)

    def stored(self) -> dict[str, Tensor]:
        """The tensors of the graph by name, those that are the module's as they are now."""
        if self.module is None:
            return dict(self.graph.tensors)
        live: dict[str, Tensor] = dict(self.module.named_parameters(remove_duplicate=False))
        live.update(self.module.named_buffers(remove_duplicate=False))
        return {name: live.get(name, tensor) for name, tensor in self.graph.tensors.items()}

    def bounds(
        self, lower: Float[Tensor, "batch *input"], upper: Float[Tensor, "batch *input"]
    ) -> tuple[Float[Tensor, "batch *output"], Float[Tensor, "batch *output"]]:
        """Interval bounds of the output over boxes."""
        found = propagate(self.graph, [Interval(lower, upper)], stored=self.stored())[self.output]
        assert isinstance(found, Interval)  # an output that no input reaches would not have been captured
        return found.lower, found.upper

    def margins(
        self,
        lower: Float[Tensor, "batch *input"],
        upper: Float[Tensor, "batch *input"],
        y: Int[Tensor, "batch"],
        *,
        overrides: Mapping[str, Tensor] | None = None,
    ) -> Float[Tensor, "batch class"]:
        r"""Lower bounds of $o_y - o_j$ over boxes, 0 at j = y: $(e_y - e_j) \mu - |(e_y - e_j) W_L|\, r$.

        Args: `overrides`: tensors to use instead of the module's, by the graph's names.
        """
        check_labels(y, self.classes)
        keep = {self.last.reads, *self.last.constants}
        stored = {**self.stored(), **(overrides or {})}
        values = propagate(self.graph, [Interval(lower, upper)], keep=keep, stored=stored)
        output, read = values[self.output], values[self.last.reads]
        assert isinstance(output, Interval)
        assert isinstance(read, Interval)
        center = unpack(self.output, output.center, len(lower), 1).flatten(1)
        radius = unpack(self.last.reads, read.radius, len(lower), 1).flatten(1)
        found = center.gather(1, y[:, None].long()) - center - self._reach(radius, values, y)
        return found.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)

    def _reach(self, radius: Tensor, values: Mapping[Node, Any], y: Tensor) -> Tensor:
        """How far each margin can move from its value at the center, (batch, class)."""
        everything = torch.arange(self.classes, device=y.device)
        shared = all(isinstance(size, int) for node in self.last.constants for size in node.shape)
        if shared and self.classes <= FEW_CLASSES:
            slopes = self.last.pull(label_rows(everything, self.classes).to(radius), values).abs()
            every = (radius @ slopes.flatten(0, 1).mT).unflatten(1, (self.classes, self.classes))
            return every[torch.arange(len(y), device=y.device), y]
        slopes = self.last.pull(label_rows(y, self.classes).to(radius), values).abs()
        return (slopes @ radius[..., None])[..., 0]


Network: TypeAlias = nn.Module | Graph | IntervalNetwork


def box_around(
    x: Float[Tensor, "batch *input"], eps: float | int | Tensor, data_range: DataRange = (0, 1)
) -> tuple[Float[Tensor, "batch *input"], Float[Tensor, "batch *input"]]:
    """The ends of all inputs within `eps` of `x` in every entry, cut to the range of the data.

    Args: `eps`: one number, or one for each sample (batch,).
    Raises: BadInput, for a negative or NaN eps, or inputs out of the range.
    """
    reach = torch.as_tensor(eps, dtype=x.dtype, device=x.device)
    if not bool((reach >= 0).all()):
        raise BadInput(f"eps is the half width of a box and must be 0 or more, got {eps}")
    if data_range is not None and not bool(((x >= data_range[0]) & (x <= data_range[1])).all()):
        ends = float(x.detach().min()), float(x.detach().max())
        raise BadInput(
            f"inputs run from {ends[0]:g} to {ends[1]:g}, out of data_range={data_range}: give the range that your "
            "inputs have, or data_range=None"
        )
    reach = reach.reshape(-1, *(1,) * (x.ndim - 1))
    lower, upper = x - reach, x + reach
    return (lower, upper) if data_range is None else (lower.clamp(min=data_range[0]), upper.clamp(max=data_range[1]))


def label_rows(labels: Int[Tensor, "batch"], classes: int) -> Float[Tensor, "batch class class"]:
    """Row j of a sample is $e_y - e_j$: the margin of its label y over class j, zero at j = y."""
    eye = torch.eye(classes, device=labels.device)
    return eye[labels.long()][:, None] - eye


def check_labels(labels: Int[Tensor, "batch"], classes: int) -> None:
    """Raises: BadInput, for a label that is none of the classes."""
    if bool(((labels < 0) | (labels >= classes)).any()):
        raise BadInput(f"labels run from {int(labels.min())} to {int(labels.max())}; the network has {classes} outputs")


def ibp_bounds(
    model: Network, lower: Float[Tensor, "batch *input"], upper: Float[Tensor, "batch *input"]
) -> tuple[Float[Tensor, "batch *output"], Float[Tensor, "batch *output"]]:
    r"""Interval bounds of a network's outputs over boxes: $c' = W c + b$, $r' = |W| r$, monotone functions on the ends.

    Differentiable by the ends and by the module's parameters. To bound one module often, pass an `IntervalNetwork`.

    Returns: lower and upper bounds, each in the shape of the output.
    Raises: CannotCapture, NoRule.
    Source: Gowal et al. 2018, arXiv 1810.12715, section 3.
    """
    return IntervalNetwork.of(model, lower).bounds(lower, upper)


def ibp_margins(
    model: Network,
    x: Float[Tensor, "batch *input"],
    y: Int[Tensor, "batch"],
    eps: float | int | Tensor,
    *,
    data_range: DataRange = (0, 1),
) -> Float[Tensor, "batch class"]:
    """Lower bounds of $o_y - o_j$ over all inputs within `eps`, 0 at j = y, with the last layer elided.

    All others positive: the class is certified. The cross-entropy of their negatives is the loss of interval training.
    Differentiable by the module's parameters. To bound one module often, pass an `IntervalNetwork`.

    Raises: CannotCapture; NoRule; BadInput, for a negative eps, labels or inputs out of range.
    Source: Gowal et al. 2018, arXiv 1810.12715, equations 8 to 10.
    """
    network = IntervalNetwork.of(model, x)
    lower, upper = box_around(x, eps, data_range)
    return network.margins(lower, upper, y)


def ibp_certified(
    model: Network,
    x: Float[Tensor, "batch *input"],
    y: Int[Tensor, "batch"],
    eps: float | int | Tensor,
    *,
    data_range: DataRange = (0, 1),
) -> Bool[Tensor, "batch"]:
    """Whether interval bounds prove that every input within `eps` is classified as `y`.

    Raises: as `ibp_margins`.
    """
    with torch.no_grad():
        margins = ibp_margins(model, x, y, eps, data_range=data_range)
    own = torch.arange(margins.shape[1], device=y.device) == y[:, None]
    return ((margins > 0) | own).all(1)
