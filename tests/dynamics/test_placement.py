import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.data import digits
from corollary.dynamics.phases import Phase
from corollary.dynamics.placement import place_model, retrained
from corollary.dynamics.states import state_of
from corollary.evidence import Training

SHORT = Training("sgd", learning_rate=0.1, batch_size=32, momentum=0.9, epochs=8)
CURVES = {"steps": 20, "points": 5}


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 10))


@pytest.fixture(scope="module")
def data():
    found = digits().subset(500, torch.Generator().manual_seed(0))
    return (found.train.x, found.train.y), (found.test.x, found.test.y)


@pytest.fixture(scope="module")
def runs(data):
    return retrained(net(), data[0], 3, SHORT)


def test_other_runs_are_trained_from_other_weights(data, runs):
    assert not torch.equal(runs[0]["0.weight"], runs[1]["0.weight"])
    assert runs[0]["1.running_mean"].abs().max() > 0
    short = Training("sgd", learning_rate=0.1, batch_size=128, epochs=1)
    one, two = (retrained(net(), data[0], 2, short) for _ in range(2))
    assert all(torch.equal(p[name], q[name]) for p, q in zip(one, two, strict=True) for name in p)


def test_a_trained_network_is_placed_among_its_runs(data, runs):
    model = net()
    model.load_state_dict(runs[0])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()  # measured in evaluation mode all the same, and given back as it was
    found = place_model(model, *data, others=runs[1:], **CURVES)
    assert found.phase in (Phase.IV_A, Phase.IV_B)
    assert found.train_error < 0.1
    assert found.test_accuracy > 0.85
    assert len(found.comparison.paths) == 2
    assert found.curvature.largest > 0
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert found.figure().svg().startswith("<svg")


def test_a_network_at_its_start_is_trained_too_little(data):
    found = place_model(net(), *data, others=1, training=Training("adam", 1e-2, 128, epochs=3), **CURVES)
    assert found.train_error > 0.5
    assert found.phase in (Phase.I, Phase.II)


def test_what_cannot_be_placed_is_said(data):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(64))
            self.last = nn.Linear(64, 10)

        def forward(self, x):
            return self.last(x * self.scale)

    with pytest.raises(BadInput, match=r"layer '' \(Scaled\) has parameters and no reset_parameters"):
        place_model(Scaled(), *data, others=1)
    with pytest.raises(BadInput, match="at least one other"):
        place_model(net(), *data, others=0)
    with pytest.raises(BadInput, match="at least one other"):
        place_model(net(), *data, others=[])
    quantities = [(x, torch.randn(len(x), 10)) for x, _ in data]
    with pytest.raises(BadInput, match="must be classes"):
        place_model(net(), *quantities, others=[state_of(net(1))], loss=nn.functional.mse_loss)
