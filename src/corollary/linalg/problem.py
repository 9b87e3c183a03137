"""(network, data) made ready for differentiation: checked at the door, parameters copied, batches counted."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Generic, Literal, TypeAlias, TypedDict, TypeVar, cast, final

import torch
from torch import Tensor, nn

from corollary.base.errors import BadInput, NotDeterministic
from corollary.base.network import (
    Batch,
    Inputs,
    Loss,
    NetFunction,
    Params,
    as_function,
    batch_length,
    batches,
    map_inputs,
    parameters_of,
    refuse_non_finite,
)
from corollary.base.progress import track
from corollary.linalg.linearise import (
    ColumnChunks,
    LossGradient,
    NetworkJacobian,
    refuse_wrong_adjoint,
    scalar,
    twice_differentiable,
)
from corollary.linalg.operator import Operator
from corollary.linalg.space import by_layer

Data: TypeAlias = Batch | Iterable[Batch]
"""One pair (inputs, targets), or a re-iterable of such pairs."""
Chunk: TypeAlias = int | Literal["auto"]
Network: TypeAlias = nn.Module | NetFunction
Layerwise: TypeAlias = Literal["layer"]
T = TypeVar("T")

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Options(TypedDict, total=False):
    """Options of every operator of a network."""

    params: Params | None
    """The parameters to differentiate by; by default the module's trainable ones, a tied one counted once."""
    chunk: Chunk
    """Columns in one batched pass; "auto" keeps intermediate values small and backs off when memory runs out."""
    check: bool
    """By default two passes over the data are compared first, and the loss is seen to be a mean over samples."""


@final
class PerBatch(Generic[T]):
    """What `build` makes of each batch, with the batch's length: kept where the data is one batch, else made anew in
    each pass, so that a stream never holds more than one batch's graph."""

    def __init__(self, data: Iterable[Batch], build: Callable[[int, Inputs, Tensor], T]):
        self._data, self._build = data, build
        self._kept: list[tuple[T, int]] | None = None

    def __iter__(self) -> Iterator[tuple[T, int]]:
        if self._kept is not None:
            return iter(self._kept)
        if isinstance(self._data, list) and len(self._data) == 1:
            self._kept = list(self._pass())
            return iter(self._kept)
        return self._pass()

    def _pass(self) -> Iterator[tuple[T, int]]:
        for index, (inputs, targets) in enumerate(track(self._data, "batches of a product")):
            yield self._build(index, inputs, targets), batch_length(inputs)


@final
@dataclass(frozen=True)
class Problem:
    """A network as a function of `leaves` (its parameters, copied and differentiable), and its data."""

    net: NetFunction
    leaves: dict[str, Tensor]
    data: Iterable[Batch]
    chunks: ColumnChunks
    check: bool

    @classmethod
    def of(
        cls,
        net: Network,
        data: Data | Inputs,
        loss: Loss | None = None,
        *,
        params: Params | None = None,
        chunk: Chunk = "auto",
        check: bool = True,
    ) -> "Problem":
        """The problem, checked.

        Raises: BadInput, for parameters of mixed kind, batch normalisation in training mode, empty data, outputs that
            are not finite, or a loss that is not a mean over samples; NotDeterministic, if two passes disagree.
        """
        if loss is not None and isinstance(data, Tensor | Mapping):
            raise BadInput(f"a loss needs targets: pass data=(inputs, targets); got a {type(data).__name__} alone")
        _refuse_coupled_samples(net)
        leaves = {name: p.clone().requires_grad_() for name, p in parameters_of(net, params).items()}
        _refuse_mixed(leaves)
        chunks = ColumnChunks(None if chunk == "auto" else chunk)
        problem = cls(_function(net, leaves), leaves, _as_batches(data), chunks, check)
        first = next(iter(problem.data), None)
        if first is None:
            raise BadInput("the data is empty: at least one batch is needed")
        problem.chunks.measure(problem.net, leaves, first[0])
        if check:
            problem.refuse_unrepeatable()
            if loss is not None:
                problem.refuse_other_than_mean(loss)
        return problem

    @property
    def kind(self) -> tuple[torch.dtype, torch.device]:
        """dtype and device of the parameters."""
        return self._like.dtype, self._like.device

    @property
    def size(self) -> int:
        """Number of parameters differentiated by."""
        return sum(tensor.numel() for tensor in self.leaves.values())

    @property
    def _like(self) -> Tensor:
        return next(iter(self.leaves.values()))

    @torch.no_grad()
    def outputs(self, inputs: Inputs) -> Tensor:
        """The network's outputs, without a graph.

        Raises: BadInput, if they are not one tensor with a row for each sample.
        """
        outputs = self.net(self.leaves, inputs)
        n = batch_length(inputs)
        if not isinstance(outputs, Tensor) or outputs.ndim == 0 or len(outputs) != n:
            got = f"shape {list(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise BadInput(f"the network must return one tensor with a row for each of the {n} samples; got {got}")
        return outputs

    def output_shapes(self) -> list[torch.Size]:
        """The shape of the outputs on each batch (one pass)."""
        return [self.outputs(inputs).shape for inputs, _ in self.data]

    def refuse_unrepeatable(self) -> None:
        """Two passes over the data, side by side.

        Raises: NotDeterministic, if inputs, targets or outputs differ anywhere.
        """
        for i, (a, b) in enumerate(zip_longest(self.data, self.data)):
            if a is None or b is None:
                raise NotDeterministic(f"one pass over the data has {i} batches, the other more: is it a generator?")
            first, second = self.outputs(a[0]), self.outputs(b[0])
            refuse_non_finite(first, f"the network's output on batch {i}")
            if not _close(a[1], b[1]) or not _close(first, second):
                same_data = torch.equal(a[1], b[1]) and _same_inputs(a[0], b[0])
                cause = "the network is random (dropout on? call net.eval())" if same_data else "the data changes order"
                raise NotDeterministic(
                    f"two passes over the data disagree on batch {i}: {cause}. A product averages over several passes, "
                    "so each must see the same. (Pass check=False if you know better.)"
                )

    def sample(self) -> Batch:
        """The first two samples, for quick checks."""
        inputs, targets = next(iter(self.data))
        return map_inputs(lambda tensor: tensor[:2], inputs), targets[:2]

    def linearised(self, inputs: Inputs) -> NetworkJacobian:
        """The Jacobian on one batch."""
        return NetworkJacobian(self.net, self.leaves, inputs)

    def refuse_wrong_jacobian(self) -> None:
        """Products with the Jacobian and with its transpose, compared on two samples if `check` is on.

        Raises: BadInput, if they disagree.
        """
        if self.check:
            jacobian, names = self.linearised(self.sample()[0]), list(self.leaves)
            push, pull = (
                lambda rows, f=f: self.chunks(partial(f, names), rows) for f in (jacobian.push, jacobian.pull)
            )
            refuse_wrong_adjoint(push, pull, (jacobian.outputs.numel(), self.size), self._like, "the Jacobian")

    def refuse_wrong_hessian(self, loss: Loss) -> None:
        """The symmetry of the Hessian, if `check` is on: on two samples, and where these fail on the first batch.

        The loss of a sample that is fitted to the last digit has a Hessian of rounding errors, which are not symmetric.

        Raises: BadInput, if it is not symmetric.
        """
        if not self.check:
            return
        try:
            self._refuse_wrong_hessian(loss, self.sample())
        except BadInput:
            self._refuse_wrong_hessian(loss, next(iter(self.data)))

    def _refuse_wrong_hessian(self, loss: Loss, batch: Batch) -> None:
        product = partial(LossGradient(self.net, loss, self.leaves, *batch).hessian, list(self.leaves))
        whole = partial(self.chunks, product)
        refuse_wrong_adjoint(whole, whole, (self.size, self.size), self._like, "the Hessian")

    def refuse_other_than_mean(self, loss: Loss) -> None:
        """Twice the same samples must have the same loss.

        Raises: BadInput, if doubling the first batch changes the loss, as it does when it sums over samples.
        """
        inputs, targets = next(iter(self.data))
        outputs = self.outputs(inputs)
        once = scalar(loss(outputs, targets))
        twice = scalar(loss(torch.cat([outputs, outputs]), torch.cat([targets, targets])))
        if not _close(once.detach(), twice.detach()):
            raise BadInput(
                f"the loss must be a mean over samples, but on each sample taken twice it goes from {float(once):.6g} "
                f"to {float(twice):.6g}. (In PyTorch's losses: reduction='mean'.)"
            )


def grouped(
    problem: Problem, make: Callable[[list[str]], Operator], group_by: Layerwise | None
) -> Operator | dict[str, Operator]:
    """`make` of all parameter names, or of each layer's."""
    if group_by is None:
        return make(list(problem.leaves))
    return {layer: make(names) for layer, names in by_layer(problem.leaves).items()}


def _as_batches(data: Data | Inputs) -> Iterable[Batch]:
    if isinstance(data, Tensor | Mapping):
        inputs = cast(Inputs, data)  # no targets are needed: zeros stand for them, which two passes find equal
        return [(inputs, torch.zeros(batch_length(inputs)))]
    return batches(cast(Data, data))


def _function(net: Network, leaves: Mapping[str, Tensor]) -> NetFunction:
    if not isinstance(net, nn.Module):
        return twice_differentiable(net)
    # Parameters that are not differentiated are copied too: an operator is of the network as it was when it was built.
    frozen = {name: p.detach().clone() for name, p in net.named_parameters() if name not in leaves}
    function = as_function(net)
    recurrent = any(isinstance(module, nn.RNNBase) for module in net.modules())
    return twice_differentiable(lambda params, x: function({**frozen, **params}, x), recurrent=recurrent)


def _refuse_coupled_samples(net: Network) -> None:
    for name, module in net.named_modules() if isinstance(net, nn.Module) else ():
        if isinstance(module, _BATCH_NORMS) and (module.training or module.running_mean is None):
            why = "is in training mode" if module.training else "keeps no running statistics"
            raise BadInput(
                f"layer {name!r} ({type(module).__name__}) {why}, so it normalises by the batch and samples depend on "
                "each other: a mean over samples is not defined. Call net.eval() first (with running statistics)."
            )


def _refuse_mixed(leaves: Mapping[str, Tensor]) -> None:
    kinds: dict[tuple[torch.dtype, torch.device], str] = {}
    for name, tensor in leaves.items():
        kinds.setdefault((tensor.dtype, tensor.device), name)
    if len(kinds) > 1:
        listed = ", ".join(f"{dtype} on {device} ({name!r})" for (dtype, device), name in kinds.items())
        raise BadInput(f"the parameters must share dtype and device to form one vector; got {listed}. Use net.to(...).")


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to what a parallel sum may reorder."""
    if a.shape != b.shape:
        return False
    if not a.is_floating_point() or a.numel() == 0:
        return torch.equal(a, b)
    return bool((a - b).abs().max() <= torch.finfo(a.dtype).eps ** 0.5 * a.abs().max())


def _same_inputs(a: Inputs, b: Inputs) -> bool:
    pairs: Sequence[tuple[Tensor, Tensor]] = list(zip(_tensors(a), _tensors(b), strict=True))
    return all(torch.equal(x, y) for x, y in pairs)


def _tensors(inputs: Inputs) -> list[Tensor]:
    found: list[Tensor] = []
    map_inputs(lambda tensor: (found.append(tensor), tensor)[1], inputs)
    return found
