"""Several runs of one architecture, by their parameters and buffers, as one stack of networks."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.network import Inputs, Params
from corollary.engine import Members


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of `module` by name, detached: what a run of its architecture is told by."""
    return {name: tensor.detach() for name, tensor in (*module.named_parameters(), *module.named_buffers())}


def stacked(model: nn.Module, states: Sequence[Params], example: Inputs | None = None) -> Members:
    """The networks with the architecture of `model` and these parameters and buffers, `[members, ...]`.

    Args:
        model: gives the forward pass; never written to. All its parameters are taken as trainable.
        states: one for each network: its parameters by name. Buffers that a state does not have are those of `model`.
        example: a few inputs to run the stack on, which shows whether it can be batched.
    Raises: BadInput, naming the parameter, if one is missing or differs in shape from the model's; for no states; if
        the forward pass cannot be batched over networks.
    """
    if not states:
        raise BadInput("no runs were given: at least one state, a mapping from parameter names to tensors, is needed")
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    if not parameters:
        raise BadInput("the network has no parameters: there is nothing that differs between its runs")
    for place, state in enumerate(states):
        if missing := [name for name in parameters if name not in state]:
            raise BadInput(
                f"run {place} has no parameter {missing[0]!r} (it has: {', '.join(state) or 'none'}): "
                "all runs must be of the architecture of the model"
            )
        for name, tensor in (*parameters.items(), *buffers.items()):
            if name in state and state[name].shape != tensor.shape:
                raise BadInput(
                    f"{name!r} of run {place} has shape {list(state[name].shape)}, that of the model "
                    f"{list(tensor.shape)}: all runs must be of one architecture and width"
                )
    like = next(iter(parameters.values()))
    together = {
        name: torch.stack([state.get(name, tensor).detach().to(like.device, tensor.dtype) for state in states])
        for name, tensor in (*parameters.items(), *buffers.items())
    }
    members = Members(
        [deepcopy(model)] * len(states),
        {name: together[name] for name in parameters},
        {name: together[name] for name in buffers},
    )
    if example is not None:
        try:
            members(example)
        except RuntimeError as error:
            raise BadInput(
                f"the network's forward pass cannot be batched over networks by torch.func.vmap: {error}"
            ) from error
    return members
