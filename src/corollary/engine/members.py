"""Networks of one architecture, stacked: each parameter has a leading members axis, and one call runs them all."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy, deepcopy
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode

from corollary.base.errors import BadInput
from corollary.base.network import Batch, Inputs, Loss, Params, call, evaluating, map_inputs
from corollary.engine.scores import accuracy_of, cross_entropy, hits

ROWS_AT_ONCE = 65_536
"""Samples times members that are evaluated together, to bound memory."""


@final
class Members:
    """`n` networks as one: `members(x)` gives all their outputs, `members.module(i)` one of them as a plain module.

    Networks may differ in width: each is padded with zeros to the largest shape of every parameter, and
    `masks` (1 on a member's own entries, 0 on the padding) keeps the padding at zero while training. A padded unit
    receives 0 and sends 0 on, so outputs and gradients are those of the small network, whatever the elementwise
    activation; a layer that mixes units of different number (LayerNorm, attention) breaks this and is refused.

    Attributes:
        params: trainable parameters by name, `[members, ...]`.
        buffers: everything else the forward pass reads (batch statistics, frozen parameters), `[members, ...]`.
        masks: for each parameter, or None where all members have the same shapes.
        architectures: one module per member, for its structure and shapes; its values are not used.
    """

    def __init__(
        self,
        architectures: Sequence[nn.Module],
        params: dict[str, Tensor],
        buffers: dict[str, Tensor],
        masks: dict[str, Tensor] | None = None,
    ):
        self.architectures, self.params, self.buffers, self.masks = tuple(architectures), params, buffers, masks
        widest = max(self.architectures, key=lambda module: sum(p.numel() for p in module.parameters()))
        # Only its forward pass is used: every tensor it reads is replaced.
        self._training, self._evaluating = deepcopy(widest).train(), deepcopy(widest).eval()

    def __len__(self) -> int:
        return len(self.architectures)

    def with_values(self, params: dict[str, Tensor], buffers: dict[str, Tensor]) -> "Members":
        """The same architectures with other parameters and buffers."""
        other = copy(self)
        other.params, other.buffers = params, buffers
        return other

    def select(self, rows: Tensor) -> "Members":
        """The members of these numbers, `[selected]`, with copies of their values."""
        other = copy(self)
        other.architectures = tuple(self.architectures[row] for row in rows.tolist())
        other.params, other.buffers, other.masks = (
            None if stacks is None else {name: stack.index_select(0, rows) for name, stack in stacks.items()}
            for stacks in (self.params, self.buffers, self.masks)
        )
        return other

    def module(self, index: int) -> nn.Module:
        """Member `index` as a module of its own, in evaluation mode."""
        module = deepcopy(self.architectures[index])
        trained, kept = _split(module)
        with torch.no_grad():
            for target, stack in ((trained, self.params), (kept, self.buffers)):
                for name, tensor in target.items():
                    tensor.copy_(stack[name][index][_corner(tensor)])
        return module.eval()

    def __call__(self, inputs: Inputs) -> Tensor:
        """Outputs of every member for the same inputs, in evaluation mode, `[members, samples, ...]`."""
        with torch.no_grad():
            return vmap(self._evaluate, in_dims=(0, 0, None))(self.params, self.buffers, inputs)

    def evaluate(
        self, data: Batch, loss: Loss = cross_entropy, *, own: bool = False, weights: Tensor | None = None
    ) -> dict[str, Float[Tensor, "member"]]:
        """`{"loss": [members], "accuracy": [members]}`, in evaluation mode; no accuracy where targets are not classes.

        Args:
            data: `(inputs, targets)`, shared by all members, or with a leading members axis where `own`.
            loss: mean over samples.
            own: whether each member has data of its own.
            weights: of each member's own samples, `[members, samples]`, summing to 1; by default they count the same.
        """
        inputs, targets = data
        samples = targets.shape[1] if own else len(targets)
        size = max(1, ROWS_AT_ONCE // len(self))
        totals: dict[str, Tensor] = {}
        for start in range(0, samples, size):
            here = (slice(None), slice(start, start + size)) if own else slice(start, start + size)
            x, y = map_inputs(lambda t, here=here: t[here], inputs), targets[here]
            w = None if weights is None else weights[here]
            share = 1.0 if weights is not None else min(size, samples - start) / samples
            for name, value in self._scores(x, y, w, loss, own).items():
                totals[name] = totals.get(name, 0) + share * value
        return totals

    def _scores(self, x: Inputs, y: Tensor, w: Tensor | None, loss: Loss, own: bool) -> dict[str, Tensor]:
        def one(params: Params, buffers: Params, x: Inputs, y: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor]:
            outputs = self._evaluate(params, buffers, x)
            return _weighted(loss, outputs, y, w), outputs

        axis = 0 if own else None
        with torch.no_grad():
            vmapped = vmap(one, in_dims=(0, 0, axis, axis, None if w is None else 0))
            losses, outputs = vmapped(self.params, self.buffers, x, y, w)
        correct = hits(outputs, y if own else y.expand(len(self), *y.shape))
        if correct is None:
            return {"loss": losses}
        return {"loss": losses, "accuracy": accuracy_of(correct, w)}

    def forward_train(
        self, inputs: Inputs, targets: Tensor, weights: Tensor | None, loss: Loss, own: tuple[bool, bool]
    ) -> tuple[Float[Tensor, "member"], Tensor, dict[str, Tensor]]:
        """Losses, outputs `[members, samples, ...]` and updated buffers of a pass in training mode.

        Args:
            inputs, targets: with a leading members axis where `own` (of inputs, of targets) says so, else shared.
            weights: of samples, as in `evaluate`.
            loss: mean over samples.
        """
        axes = (0, 0, 0 if own[0] else None, 0 if own[1] else None, None if weights is None else 0)

        def one(
            params: Params, buffers: Params, x: Inputs, y: Tensor, w: Tensor | None
        ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            updated = {name: buffer.clone() for name, buffer in buffers.items()}  # batch statistics change in place
            outputs = _functional(self._training, params, updated, x)
            return _weighted(loss, outputs, y, w), outputs, updated

        return vmap(one, in_dims=axes, randomness="different")(self.params, self.buffers, inputs, targets, weights)

    def _evaluate(self, params: Params, buffers: Params, inputs: Inputs) -> Tensor:
        return _functional(self._evaluating, params, buffers, inputs)


def stack(modules: Sequence[nn.Module], example: Inputs) -> Members:
    """Stack `modules`, which may differ in width, and prove on `example` that the stack computes what they compute.

    Args:
        modules: of one architecture; they are copied, never written to.
        example: a few inputs, to compare on, in evaluation mode.
    Raises: BadInput, if names or numbers of axes of the parameters differ, if dtypes are mixed, if the forward pass
        cannot be batched over members, or if padding to a common width changes what a member computes.
    """
    split = [_split(module) for module in modules]
    params, masks = _stacked([trained for trained, _ in split])
    buffers, _ = _stacked([kept for _, kept in split])
    if not params:
        raise BadInput("the networks have no trainable parameters (requires_grad is False on all, or there are none)")
    if len(dtypes := {tensor.dtype for tensor in params.values()}) > 1:
        raise BadInput(f"the networks mix parameters of {', '.join(map(str, dtypes))}: convert them with net.to(dtype)")
    padded = any(not bool(mask.all()) for mask in masks.values())
    members = Members([deepcopy(module) for module in modules], params, buffers, masks if padded else None)
    try:
        outputs = members(example)
    except RuntimeError as error:
        raise BadInput(
            f"the network's forward pass cannot be batched over members by torch.func.vmap: {error}\n"
            "Train such networks one by one, with corollary.engine.fit under parallel_map."
        ) from error
    if padded:
        _refuse_changed(modules, outputs, example)
    return members


def _refuse_changed(modules: Sequence[nn.Module], outputs: Tensor, example: Inputs) -> None:
    tolerance = 100 * torch.finfo(outputs.dtype).eps
    for index, module in enumerate(modules):
        with torch.no_grad(), evaluating(deepcopy(module)) as alone:
            expected = call(alone, example)
        if not torch.allclose(outputs[index], expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
            raise BadInput(
                f"padding member {index} with zeros to the width of the widest changes its outputs by up to "
                f"{float((outputs[index] - expected).abs().max()):.2g}: a layer mixes units (LayerNorm, attention). "
                "Train one population for each width instead."
            )


def _split(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Trainable parameters, and everything else a forward pass reads."""
    trained: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    return trained, {**frozen, **dict(module.named_buffers())}


def _stacked(members: Sequence[Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`(stack, masks)` by name: each tensor in the leading corner of the largest shape, zeros around it."""
    stacks: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    if any(set(tensors) != set(members[0]) for tensors in members):
        raise BadInput("the networks of a population need parameters of the same names: members differ in architecture")
    for name, first in members[0].items():
        shapes = [tuple(tensors[name].shape) for tensors in members]
        if len({len(shape) for shape in shapes}) > 1:
            raise BadInput(f"parameter {name!r} has shapes {sorted(set(shapes))}: members may differ in width only")
        stacks[name] = first.new_zeros(len(members), *(max(sizes) for sizes in zip(*shapes, strict=True)))
        masks[name] = torch.zeros_like(stacks[name], dtype=torch.bool)
        for index, tensors in enumerate(members):
            corner = (index, *_corner(tensors[name]))
            stacks[name][corner] = tensors[name].detach()
            masks[name][corner] = True
    return stacks, masks


def _corner(tensor: Tensor) -> tuple[slice, ...]:
    return tuple(slice(size) for size in tensor.shape)


def _functional(module: nn.Module, params: Params, buffers: Params, inputs: Inputs) -> Tensor:
    values = {**buffers, **params}
    with _TransposedLinear():
        if isinstance(inputs, Tensor):
            return functional_call(module, values, (inputs,))
        if isinstance(inputs, Mapping):
            return functional_call(module, values, (), dict(inputs))
        return functional_call(module, values, tuple(inputs))


@final
class _TransposedLinear(TorchFunctionMode):
    """Linear layers with fewer outputs than samples as (W x^T)^T: the same numbers, sooner.

    A batched product with few columns takes up to four times as long as its transpose, forward and backward: x W^T has
    as many as outputs (ten classes), W x^T as many as samples.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is F.linear and len(args) == 3 and not kwargs and args[0].ndim == 2:
            inputs, weight, bias = args
            if inputs.shape[0] > weight.shape[0]:
                product = (weight @ inputs.mT).mT
                return product if bias is None else product + bias
        return function(*args, **(kwargs or {}))


def _weighted(loss: Loss, outputs: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """The loss, or with weights the weighted sum of the losses of single samples."""
    if weights is None:
        return loss(outputs, targets)
    losses = vmap(lambda output, target: loss(output[None], target[None]))(outputs, targets)
    return (losses * weights.to(losses.dtype)).sum()
