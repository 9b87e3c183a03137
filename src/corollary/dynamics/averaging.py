"""Averages of weights: over late epochs of one run, or over runs, whose hidden units must first be brought into order.

Exchanging hidden units changes the weights of a network and nothing that it computes, so two runs have their units in
different orders, and their plain average mixes units that have nothing to do with each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.base.network import Params
from corollary.base.seeds import Seeds
from corollary.evidence import Source

AINSWORTH_2023 = Source(
    key="ainsworth2023git",
    authors=("Samuel K. Ainsworth", "Jonathan Hayase", "Siddhartha Srinivasa"),
    title="Git re-basin: merging models modulo permutation symmetries",
    year=2023,
    arxiv="2209.04836",
    venue="ICLR",
)
IZMAILOV_2018 = Source(
    key="izmailov2018averaging",
    authors=("Pavel Izmailov", "Dmitrii Podoprikhin", "Timur Garipov", "Dmitry Vetrov", "Andrew Gordon Wilson"),
    title="Averaging weights leads to wider optima and better generalization",
    year=2018,
    arxiv="1803.05407",
    venue="UAI",
)


_STATISTICS = ("running_mean", "running_var")


@final
@dataclass(frozen=True)
class Layer:
    """A linear layer: its matrix, and the vectors with an entry for each of its units (bias, normalisation)."""

    matrix: str
    vectors: tuple[str, ...]


def average_weights(params_list: Sequence[Params], *, align: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """The mean of each parameter over runs of one architecture.

    Args:
        params_list: parameters (and buffers) by name of each run. Integer entries are those of the first.
        align: whether to exchange hidden units of each run first, so that its weights come as near to those of the
            first as weight matching gets them; for perceptrons, see `match_weights`.
        seed: of the order in which matching visits the layers.
    Returns: averaged values by name. Averages of running statistics are not the statistics of the averaged network:
        where there is batch normalisation, estimate them anew, see `with_batch_statistics`.
    Raises: BadInput, for no runs, or runs that differ in names or shapes; with `align`, for other than perceptrons.
    Source: over epochs, Izmailov et al. 2018, arXiv 1803.05407; aligned, Ainsworth et al. 2023, arXiv 2209.04836.
    """
    _refuse_different(params_list)
    first = params_list[0]
    if align:
        rest = [permuted(state, match_weights(first, state, seed=seed)) for state in params_list[1:]]
        params_list = [first, *rest]
    return {
        name: torch.stack([state[name].detach() for state in params_list]).mean(0)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in first.items()
    }


def match_weights(
    reference: Params, params: Params, *, seed: int = 0, sweeps: int = 100
) -> tuple[Int[Tensor, "_"], ...]:
    r"""For each hidden layer of a perceptron, the order of its units that brings its weights nearest to `reference`.

    Coordinate ascent on $\sum_l \langle W_l^A, P_l W_l^B P_{l-1}^\top \rangle + \langle b_l^A, P_l b_l^B \rangle$: with
    the other layers in place, the best $P_l$ is a linear assignment. Layers are visited in random order until nothing
    changes. What it finds is a local optimum.

    Args:
        reference, params: parameters by name of two chains of linear layers with elementwise functions and
            normalisation by unit between them, as `named_parameters` orders them.
    Returns: for each hidden layer the indices of units of `params`, `[units]`, in their new order: see `permuted`.
    Raises: BadInput, naming the parameter, for other architectures and for runs that differ in shape.
    Source: Ainsworth et al. 2023, arXiv 2209.04836, section 3.2, algorithm 1.
    """
    _refuse_different([reference, params])
    layers = _chain(reference)
    ours, theirs = ({name: t.detach().double().cpu() for name, t in state.items()} for state in (reference, params))
    orders = [torch.arange(len(theirs[layer.matrix])) for layer in layers]
    generator = Seeds(seed)("order of layers")
    for _ in range(sweeps):
        changed = False
        for place in torch.randperm(len(layers) - 1, generator=generator).tolist():
            order = torch.from_numpy(linear_sum_assignment(_affinity(layers, ours, theirs, orders, place), True)[1])
            gain = _gain(layers, ours, theirs, orders, place, order)
            if gain > 1e-12:
                orders[place], changed = order, True
        if not changed:
            break
    return tuple(orders[:-1])


def permuted(params: Params, orders: Sequence[Int[Tensor, "_"]]) -> dict[str, Tensor]:
    """The same network with the units of each hidden layer in another order: unit i is the old unit `order[i]`.

    Raises: BadInput, unless there is one order for each hidden layer of the perceptron.
    """
    layers = _chain(params)
    units, given = [len(params[layer.matrix]) for layer in layers[:-1]], [len(order) for order in orders]
    if units != given:
        raise BadInput(f"the network has hidden layers of {units} units; got orders of {given}")
    moved = dict(params)
    for layer, following, order in zip(layers[:-1], layers[1:], orders, strict=True):
        order = order.to(params[layer.matrix].device)
        for name in (layer.matrix, *layer.vectors):
            moved[name] = moved[name][order]
        moved[following.matrix] = moved[following.matrix][:, order]
    return moved


def _affinity(
    layers: Sequence[Layer], ours: Params, theirs: Params, orders: Sequence[Tensor], place: int
) -> Float[Tensor, "unit unit"]:
    """How much each of our units of a layer is like each of theirs, with the layers beside it in order."""
    layer, following = layers[place], layers[place + 1]
    incoming = theirs[layer.matrix]
    if place:
        incoming = incoming[:, orders[place - 1]]
    outgoing = theirs[following.matrix][orders[place + 1]]
    total = ours[layer.matrix] @ incoming.T + ours[following.matrix].T @ outgoing
    for name in layer.vectors:
        if not name.endswith(_STATISTICS):  # they are of the data, and a variance would outweigh all else
            total = total + torch.outer(ours[name], theirs[name])
    return total


def _gain(
    layers: Sequence[Layer], ours: Params, theirs: Params, orders: Sequence[Tensor], place: int, order: Tensor
) -> float:
    affinity = _affinity(layers, ours, theirs, orders, place)
    units = torch.arange(len(order))
    return float(affinity[units, order].sum() - affinity[units, orders[place]].sum())


def _chain(params: Params) -> list[Layer]:
    """The layers of a perceptron, read off the shapes of its parameters."""
    layers: list[Layer] = []
    for name, tensor in params.items():
        if tensor.ndim == 0:
            continue  # a count of batches
        if tensor.ndim == 2 and (not layers or tensor.shape[1] == len(params[layers[-1].matrix])):
            layers.append(Layer(name, ()))
        elif tensor.ndim == 1 and (owner := _owner(params, layers, name)) is not None:
            layers[owner] = Layer(layers[owner].matrix, (*layers[owner].vectors, name))
        else:
            raise BadInput(
                f"parameter {name!r} of shape {list(tensor.shape)} is not of a perceptron (linear layers one after "
                "another, normalisation by unit between them): units are matched in perceptrons only. Average without "
                "align, or align by a method for that architecture."
            )
    if len(layers) < 2:
        raise BadInput(f"there are no hidden units to match: {len(layers)} linear layers were found")
    return layers


def _owner(params: Params, layers: Sequence[Layer], name: str) -> int | None:
    """Whose units a vector belongs to: those of the vectors of its module, else of the last layer before it."""
    module = name.rpartition(".")[0]
    for place, layer in enumerate(layers):
        if any(known.rpartition(".")[0] == module for known in (layer.matrix, *layer.vectors)):
            return place if len(params[name]) == len(params[layer.matrix]) else None
    return len(layers) - 1 if layers and len(params[name]) == len(params[layers[-1].matrix]) else None


def _refuse_different(params_list: Sequence[Params]) -> None:
    if not params_list:
        raise BadInput("no weights were given to average: pass the parameters by name of at least one run")
    first = params_list[0]
    for place, state in enumerate(params_list):
        if set(state) != set(first):
            raise BadInput(
                f"run {place} and run 0 differ in their parameters: {', '.join(sorted(set(state) ^ set(first)))}"
            )
        for name, tensor in first.items():
            if state[name].shape != tensor.shape:
                raise BadInput(
                    f"{name!r} has shape {list(state[name].shape)} in run {place} and {list(tensor.shape)} in run 0: "
                    "only runs of one architecture and width can be averaged"
                )
