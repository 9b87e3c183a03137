"""The entropy term by closed forms, and what training with it does."""

import math

import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.data import digits
from corollary.engine import cross_entropy
from corollary.verify.entropy_regularization import EntropyRegularised, entropy_penalty, fit_with_low_entropy
from corollary.verify.logit_gaps import logit_gaps


def test_entropy_of_known_distributions():
    assert float(entropy_penalty(torch.zeros(3, 10))) == pytest.approx(math.log(10))
    p = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]], dtype=torch.float64)
    # Mean over the samples; logits shifted by a constant give the same probabilities.
    assert float(entropy_penalty(p.clamp(min=1e-300).log() + 7)) == pytest.approx(1.5 * math.log(2) / 2)


def test_entropy_and_gradient_are_finite_for_sure_answers():
    logits = torch.tensor([[1e5, -1e5, 0.0]], requires_grad=True)
    value = entropy_penalty(logits)
    value.backward()
    assert float(value.detach()) == 0
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_the_gradient_is_that_of_the_formula():
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(entropy_penalty(logits), logits)
    p = logits.softmax(1)
    own = -(p * p.log()).sum(1, keepdim=True)
    assert torch.allclose(gradient, -p * (p.log() + own) / 4)


def test_the_loss_is_cross_entropy_plus_a_multiple():
    logits, y = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    assert EntropyRegularised(0.0)(logits, y) == cross_entropy(logits, y)
    assert EntropyRegularised(2.5)(logits, y) == pytest.approx(
        float(cross_entropy(logits, y) + 2.5 * entropy_penalty(logits))
    )


def test_a_positive_strength_lowers_entropy_and_widens_gaps():
    data = digits()
    assert data.train.y is not None
    x, y = data.train.x[:600], data.train.y[:600]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    ends = [fit_with_low_entropy(net, (x, y), strength=s, plain_epochs=6, epochs=6, batch_size=32) for s in (0.0, 5.0)]
    entropy = [float(entropy_penalty(end.module(x)).detach()) for end in ends]
    gap = [float(logit_gaps(end.module, x, (2,)).median()) for end in ends]
    assert entropy[1] < 0.6 * entropy[0]
    assert gap[1] > 1.3 * gap[0]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_phases_are_counted_and_a_negative_strength_is_refused():
    x, y = torch.randn(32, 4), torch.arange(32) % 2
    net = nn.Linear(4, 2)
    assert fit_with_low_entropy(net, (x, y), plain_epochs=0, epochs=3, batch_size=16).step == 6
    with pytest.raises(BadInput, match="the confidence penalty"):
        fit_with_low_entropy(net, (x, y), strength=-1.0)
