import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.dynamics.states import stacked, state_of


def net(seed=0, width=4):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2)).eval()


def test_a_stack_computes_what_its_runs_compute_and_leaves_them_alone():
    nets = [net(seed) for seed in range(3)]
    nets[1][1].running_mean.fill_(0.7)  # buffers are of the run, not of the model
    before = {name: tensor.clone() for name, tensor in state_of(nets[0]).items()}
    x = torch.randn(5, 3)
    members = stacked(nets[0], [state_of(one) for one in nets], x)
    with torch.no_grad():
        torch.testing.assert_close(members(x), torch.stack([one(x) for one in nets]))
    assert all(torch.equal(before[name], tensor) for name, tensor in state_of(nets[0]).items())


def test_buffers_that_a_run_does_not_have_are_those_of_the_model():
    model, other = net(0), net(1)
    model[1].running_mean.fill_(0.7)
    members = stacked(model, [dict(other.named_parameters())])
    assert float(members.buffers["1.running_mean"][0, 0]) == pytest.approx(0.7)


def test_what_does_not_fit_is_named():
    good = state_of(net())
    with pytest.raises(BadInput, match=r"no parameter '3\.bias'"):
        stacked(net(), [good, {name: t for name, t in good.items() if name != "3.bias"}])
    with pytest.raises(BadInput, match=r"'0.weight' of run 1 has shape \[5, 3\]"):
        stacked(net(), [good, state_of(net(width=5))])
    with pytest.raises(BadInput, match="no runs"):
        stacked(net(), [])
    with pytest.raises(BadInput, match="no parameters"):
        stacked(nn.ReLU(), [{}])


def test_a_forward_pass_that_cannot_be_batched_is_refused():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.weight if bool(self.weight.sum() > 0) else x

    with pytest.raises(BadInput, match="cannot be batched"):
        stacked(Branching(), [state_of(Branching())], torch.ones(2, 3))
