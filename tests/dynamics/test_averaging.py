from itertools import pairwise, permutations

import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.dynamics.averaging import average_weights, match_weights, permuted
from corollary.dynamics.states import state_of


def perceptron(seed=0, widths=(5, 8, 6, 3)):
    torch.manual_seed(seed)
    layers = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double().eval()


def normalised(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    for tensor in (net[1].weight.data, net[1].bias.data, net[1].running_mean, net[1].running_var):
        tensor.uniform_(0.5, 2.0)
    return net


def orders_of(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(size, generator=generator) for size in sizes]


def outputs(net, state, x):
    return torch.func.functional_call(net, dict(state), (x,)).detach()


def test_the_mean_of_weights():
    states = [state_of(perceptron(seed)) for seed in range(3)]
    mean = average_weights(states)
    assert all(torch.allclose(mean[name], (states[0][name] + states[1][name] + states[2][name]) / 3) for name in mean)
    counts = [state_of(normalised(seed)) for seed in range(2)]
    assert average_weights(counts)["1.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize(("make", "sizes"), [(perceptron, (8, 6)), (normalised, (8,))])
def test_units_in_another_order_compute_the_same(make, sizes):
    net, x = make(), torch.randn(7, 5, dtype=torch.float64)
    moved = permuted(state_of(net), orders_of(*sizes))
    assert not torch.equal(moved["0.weight"], state_of(net)["0.weight"])
    assert torch.allclose(outputs(net, moved, x), outputs(net, state_of(net), x), atol=1e-12)


@pytest.mark.parametrize(("make", "sizes"), [(perceptron, (8, 6)), (normalised, (8,))])
def test_matching_undoes_a_permutation(make, sizes):
    reference = state_of(make())
    shuffled = permuted(reference, orders_of(*sizes, seed=3))
    back = permuted(shuffled, match_weights(reference, shuffled))
    assert all(torch.equal(back[name], reference[name]) for name in reference)
    averaged = average_weights([reference, shuffled], align=True)
    assert all(torch.allclose(averaged[name], reference[name]) for name in reference)
    plain = average_weights([reference, shuffled])
    assert not torch.allclose(plain["0.weight"], reference["0.weight"])


def test_one_hidden_layer_is_matched_best_of_all_orders():
    """Brute force over the 24 orders of four units."""
    ours, theirs = (state_of(perceptron(seed, (3, 4, 2))) for seed in (0, 1))

    def closeness(order):
        moved = permuted(theirs, [torch.tensor(order)])
        return float(sum((ours[name] * moved[name]).sum() for name in ours))

    found = match_weights(ours, theirs)[0]
    assert closeness(found.tolist()) == pytest.approx(max(map(closeness, permutations(range(4)))), abs=1e-12)


def test_matching_never_takes_weights_further_apart():
    ours, theirs = (state_of(perceptron(seed)) for seed in (0, 1))
    moved = permuted(theirs, match_weights(ours, theirs))

    def distance(state):
        return sum(float((ours[name] - state[name]).square().sum()) for name in ours)

    assert distance(moved) < distance(theirs)


def test_buffers_may_come_after_all_parameters():
    """`state_of` lists them last, a state dict beside their layer: their owner is told by their module."""
    net = normalised()
    for state in (state_of(net), dict(net.state_dict())):
        moved = permuted(state, orders_of(8))
        assert torch.equal(moved["1.running_var"], state["1.running_var"][orders_of(8)[0]])


def test_what_cannot_be_averaged_or_matched_is_refused():
    state = state_of(perceptron())
    with pytest.raises(BadInput, match="no weights"):
        average_weights([])
    with pytest.raises(BadInput, match="only runs of one architecture"):
        average_weights([state, state_of(perceptron(widths=(5, 9, 6, 3)))])
    with pytest.raises(BadInput, match="differ in their parameters: extra"):
        average_weights([state, {**state, "extra": torch.ones(1)}])
    convolution = state_of(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)))
    with pytest.raises(BadInput, match=r"'0.weight' of shape \[2, 1, 3, 3\] is not of a perceptron"):
        average_weights([convolution, convolution], align=True)
    with pytest.raises(BadInput, match="no hidden units"):
        match_weights(state_of(nn.Linear(3, 2)), state_of(nn.Linear(3, 2)))
    with pytest.raises(BadInput, match=r"hidden layers of \[8, 6\] units; got orders of \[8\]"):
        permuted(state, orders_of(8))
