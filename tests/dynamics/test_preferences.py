import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.dynamics.preferences import preference_decomposition, tabular_utilities, telescoping_frequency
from corollary.engine import seeded
from corollary.studies.dynamics.utility_duality_networks import NextToken, Translator


def test_a_linear_model_by_hand():
    """u = W x: the gradient of u(y) - u(y') is x in row y and -x in row y', of norm sqrt(2) |x|."""
    net = nn.Linear(3, 4, bias=False)
    x, y = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0])
    found = preference_decomposition(net, x, y)
    sigma = net.double()(x.double()).softmax(1)
    others = torch.arange(4) != y[:, None]
    assert found.residual < 1e-12
    torch.testing.assert_close(found.weights, sigma.detach() * others)
    torch.testing.assert_close(found.norms, 2**0.5 * x.double().norm(dim=1, keepdim=True) * others)


def test_weights_exclude_the_observed_output_and_sum_to_the_rest():
    net = seeded(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), 0)
    x, y = torch.randn(7, 6, generator=torch.Generator().manual_seed(1)), torch.arange(7) % 3
    found = preference_decomposition(net, x, y)
    own = net.double()(x.double()).softmax(1).gather(1, y[:, None])[:, 0]
    assert (found.weights.gather(1, y[:, None]) == 0).all()
    torch.testing.assert_close(found.weights.sum(1), 1 - own.detach())


def test_the_users_network_is_left_as_it_was():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = preference_decomposition(net, torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
    assert found.residual < 1e-12
    assert net.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_the_step_of_a_sequence_model():
    generator = torch.Generator().manual_seed(0)
    net = NextToken(seeded(lambda: Translator(8, 12), 0))
    source, prefix = (torch.randint(12, (6, length), generator=generator) for length in (4, 2))
    found = preference_decomposition(net, (source, prefix), torch.arange(6))
    assert found.residual < 1e-10
    assert found.weights.shape == (6, 13)


@pytest.mark.parametrize(("outputs", "y"), [((3, 4), [0, 1, 4]), ((3, 4), [0, 1, -1]), ((3, 4), [0, 1])])
def test_outputs_have_to_fit(outputs, y):
    with pytest.raises(BadInput, match="observed outputs"):
        preference_decomposition(nn.Linear(2, outputs[1]), torch.randn(outputs[0], 2), torch.tensor(y))


def observed(steps, seed=0):
    law = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    return torch.multinomial(law, steps, replacement=True, generator=torch.Generator().manual_seed(seed)), law


def test_the_duality_is_exact_for_tabular_utilities():
    seen, _ = observed(500)
    start = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = telescoping_frequency(tabular_utilities(start, seen, 0.3), seen, 0.3)
    assert found.residual.abs().max() < 1e-13
    torch.testing.assert_close(found.frequency, torch.bincount(seen, minlength=4).double() / 500)


def test_runs_are_independent():
    both = torch.stack([observed(50, 0)[0], observed(50, 1)[0]])
    starts = torch.zeros(2, 4, dtype=torch.float64)
    together = tabular_utilities(starts, both, 0.1)
    assert torch.equal(together[:, 1], tabular_utilities(starts[1], both[1], 0.1))
    assert telescoping_frequency(together, both, 0.1).residual.shape == (2, 4)


def test_the_fixed_point_is_the_law():
    """E[du] = rate (P - softmax(u)): averaged over the last steps, the softmax is the law within its noise."""
    seen, law = observed(20_000)
    path = tabular_utilities(torch.zeros(4, dtype=torch.float64), seen, 0.02)
    assert (path[5000:].softmax(-1).mean(0) - law).abs().max() < 0.02


def test_a_wrong_rate_leaves_a_residual():
    seen, _ = observed(100)
    path = tabular_utilities(torch.zeros(4, dtype=torch.float64), seen, 0.1)
    assert telescoping_frequency(path, seen, 0.2).residual.abs().max() > 1e-2


def test_telescoping_refuses_what_does_not_fit():
    seen, _ = observed(10)
    path = tabular_utilities(torch.zeros(4, dtype=torch.float64), seen, 0.1)
    with pytest.raises(BadInput, match="11 rows"):
        telescoping_frequency(path[:-1], seen, 0.1)
    with pytest.raises(BadInput, match="learning rate"):
        telescoping_frequency(path, seen, 0.0)
    with pytest.raises(BadInput, match="NaN"):
        telescoping_frequency(path * torch.nan, seen, 0.1)
    with pytest.raises(BadInput, match="indices 0 to 3"):
        tabular_utilities(torch.zeros(4), torch.tensor([4]), 0.1)
