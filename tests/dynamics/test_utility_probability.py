import math

import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.dynamics.utility import UtilityModel, nucleus
from corollary.dynamics.utility_probability import TRANSFORMS, Fitted, fit_utility_probability

LOGITS = UtilityModel(nn.Identity())
"""A classifier whose inputs are its logits."""


def drawn(n=4000, classes=5, beta=1.0, seed=0):
    """Logits, and classes drawn from the softmax of beta times them."""
    generator = torch.Generator().manual_seed(seed)
    u = 2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return u, torch.multinomial((beta * u).softmax(1), 1, generator=generator)[:, 0]


class Lengths(nn.Module):
    """Sequences 0...0 2 of up to 3 zeros, whose log-scores are given by the input, up to a constant."""

    def forward(self, x, prefix):
        logits = torch.full((len(x), prefix.shape[1] + 1, 3), -30.0, dtype=torch.float64)
        for t in range(prefix.shape[1] + 1):
            logits[:, t, 0] = x[:, 0]
            logits[:, t, 2] = 0.0
        return logits


SEQUENCES = UtilityModel(Lengths(), "sequence", eos=2, max_len=4)


@pytest.mark.parametrize("transform", ["choice", "temperature"])
@pytest.mark.parametrize("beta", [0.4, 2.5])
def test_beta_is_recovered(transform, beta):
    """4000 draws fix beta to a few percent; over all classes both transforms are the same likelihood."""
    found = fit_utility_probability(LOGITS, drawn(beta=beta), transform, k=5).parameters["beta"]
    assert found == pytest.approx(beta, rel=0.06)


def test_over_all_classes_choice_is_temperature():
    data = drawn(beta=0.6)
    choice, temperature = (fit_utility_probability(LOGITS, data, name, k=5) for name in ("choice", "temperature"))
    assert choice.parameters["beta"] == pytest.approx(temperature.parameters["beta"], rel=1e-6)
    torch.testing.assert_close(choice.prob(data[0])[1], temperature.prob(data[0])[1], rtol=1e-6, atol=1e-9)


def test_beta_is_where_the_likelihood_is_stationary():
    """Mean utility of the observed equals the mean expected utility: the score equation of a conditional logit."""
    u, y = drawn(beta=0.7)
    p = fit_utility_probability(LOGITS, (u, y), k=5)
    candidates, share = p.prob(u)
    expected = (share * candidates.utility).sum(1).mean()
    assert float(expected) == pytest.approx(float(u.gather(1, y[:, None]).mean()), abs=1e-6)


def test_beta_scales_against_the_utilities():
    """kappa u is given beta / kappa: the same probabilities."""
    u, y = drawn(beta=0.7)
    plain = fit_utility_probability(LOGITS, (u, y), k=3)
    for kappa in (1e-3, 0.3, 50.0):
        scaled = fit_utility_probability(LOGITS, (kappa * u, y), k=3)
        assert scaled.parameters["beta"] * kappa == pytest.approx(plain.parameters["beta"], rel=1e-5)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_best_class_stays(transform):
    u, y = drawn()
    p = fit_utility_probability(LOGITS, (u, y), transform, k=4)
    assert torch.equal(p.argmax(u), u.argmax(1))
    candidates, share = p.prob(u)
    assert (share[:, :-1] >= share[:, 1:] - 1e-12).all()  # order kept all the way down
    assert torch.equal(candidates.outputs, u.topk(4).indices)


def test_softmax_is_over_all_classes():
    u, y = drawn(n=100)
    _, p = fit_utility_probability(LOGITS, (u, y), "softmax", k=2).prob(u)
    torch.testing.assert_close(p, u.softmax(1).topk(2).values)


@pytest.mark.parametrize("transform", ["choice", "isotonic", "length"])
def test_probabilities_of_candidates_sum_to_one(transform):
    u, y = drawn(n=300)
    _, p = fit_utility_probability(LOGITS, (u, y), transform, k=3).prob(u)
    torch.testing.assert_close(p.sum(1), torch.ones(300, dtype=torch.float64))
    assert (p > 0).all()


def test_isotonic_is_the_frequency_in_each_pool():
    """Two margins: the best of a pair is right 3 times of 4 at the wide one, 2 of 4 at the narrow one."""
    wide, narrow = [3.0, 0.0], [1.0, 0.0]
    u = torch.tensor([wide] * 4 + [narrow] * 4, dtype=torch.float64)
    y = torch.tensor([0, 0, 0, 1, 0, 0, 1, 1])
    p = fit_utility_probability(LOGITS, (u, y), "isotonic", k=2)
    torch.testing.assert_close(p.prob(u)[1][0], torch.tensor([0.75, 0.25], dtype=torch.float64))
    torch.testing.assert_close(p.prob(u)[1][-1], torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert p.argmax(u).tolist() == [0] * 8  # of equal ones that of larger utility


def test_outputs_outside_of_the_candidates_are_dropped_and_counted():
    u = torch.tensor([[3.0, 2.0, 1.0]] * 5)
    found = fit_utility_probability(LOGITS, (u, torch.tensor([0, 0, 1, 2, 2])), k=2)
    assert (found.observed, found.dropped) == (3, 2)
    # of those inside 2 of 3 are the best: log odds log 2 at a difference of 1
    assert found.parameters["beta"] == pytest.approx(math.log(2), rel=1e-5)


def test_clean_references_give_a_larger_beta():
    u, y = drawn(beta=0.7)
    noisy = fit_utility_probability(LOGITS, (u, y), k=5).parameters["beta"]
    clean = fit_utility_probability(LOGITS, (u, u.argmax(1)), k=5).parameters["beta"]
    assert clean > 10 * noisy


def test_the_power_of_the_length_is_recovered():
    """Sequences drawn with probability proportional to exp(u / length^0.5)."""
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.rand(3000, 1, generator=generator, dtype=torch.float64) - 1.5
    candidates = SEQUENCES.candidates(x, 4)
    assert (candidates.utility[:, :4] > -40).all()
    law = (2 * candidates.utility / candidates.lengths**0.5).softmax(1)
    place = torch.multinomial(law, 1, generator=generator)
    y = candidates.outputs.gather(1, place[..., None].expand(-1, -1, 4))[:, 0]
    found = fit_utility_probability(SEQUENCES, (x, y), "choice", k=4, fit_length=True)
    assert found.parameters["beta"] == pytest.approx(2, rel=0.15)
    assert found.parameters["gamma"] == pytest.approx(0.5, abs=0.15)
    plain = fit_utility_probability(SEQUENCES, (x, y), "choice", k=4)
    assert plain.parameters["gamma"] == 0
    assert torch.equal(plain.argmax(x), SEQUENCES.argmax(x, 4))


def test_the_temperature_of_sequences_is_of_each_token():
    x = torch.linspace(-1, 1, 400, dtype=torch.float64)[:, None]
    long = UtilityModel(Lengths(), "sequence", eos=2, max_len=14)  # so that the end is hardly ever forced
    y = long.warped(lambda logits: 0.5 * logits).sample(x, 20, torch.Generator().manual_seed(0)).flatten(0, 1)
    found = fit_utility_probability(long, (x.repeat_interleave(20, 0), y), "temperature", k=4)
    assert found.parameters["beta"] == pytest.approx(0.5, rel=0.15)
    assert not found.closed


@pytest.mark.parametrize("transform", ["choice", "softmax"])
def test_draws_follow_the_probabilities(transform):
    u, y = drawn()
    p = fit_utility_probability(LOGITS, (u, y), transform, k=5)
    sample = p.sample(u[:3], 20_000, torch.Generator().manual_seed(0))
    candidates, share = p.prob(u[:3])
    frequency = (sample[:, :, None] == candidates.outputs[:, None]).double().mean(1)
    assert (frequency - share).abs().max() < 4.5 * 0.5 / 20_000**0.5


def test_least_risk_by_hand():
    """Three sequences of probability .4, .3, .3: the last two agree in a token, so one of them is chosen."""
    outputs = torch.tensor([[[0, 0, 2], [1, 0, 2], [1, 1, 2]]])
    own = Fitted({}, share=lambda c: torch.tensor([[0.4, 0.3, 0.3]], dtype=torch.float64))
    model = UtilityModel(Three(), "sequence", eos=2, max_len=3)
    candidates = model.candidates(torch.zeros(1, 1), 3)
    assert torch.equal(candidates.outputs, outputs)
    found = fit_utility_probability(model, (torch.zeros(1, 1), outputs[0, :1]), lambda heldout, _: own, k=3)
    assert found.transform == "own"
    assert found.argmax(torch.zeros(1, 1)).tolist() == [[0, 0, 2]]
    assert found.mbr(torch.zeros(1, 1)).tolist() == [[1, 0, 2]]
    assert found.mbr(torch.zeros(1, 1), model.same).tolist() == [[0, 0, 2]]  # for equality it is the most probable


class Three(nn.Module):
    """Log-scores 3 > 2 > 1 for the sequences 0 0 end, 1 0 end, 1 1 end, and nearly none for others."""

    def forward(self, x, prefix):
        first = torch.tensor([3.0, math.log(math.e**2 + math.e), -30.0])
        after = {0: torch.tensor([0.0, -30.0, -30.0]), 1: torch.tensor([2.0, 1.0, -30.0])}
        rows = [first.expand(len(prefix), 3)]
        if prefix.shape[1] > 0:
            rows.append(torch.stack([after.get(int(token), torch.zeros(3)) for token in prefix[:, 0]]))
        rows += [torch.tensor([-30.0, -30.0, 0.0]).expand(len(prefix), 3)] * (prefix.shape[1] - 1)
        return torch.stack(rows, 1)


def test_bad_inputs():
    u, y = drawn(n=20)
    with pytest.raises(BadInput, match="k=1"):
        fit_utility_probability(LOGITS, (u, y), k=1)
    with pytest.raises(BadInput, match="no transform"):
        fit_utility_probability(LOGITS, (u, y), "platt")
    with pytest.raises(BadInput, match="none of 20"):
        fit_utility_probability(LOGITS, (u, u.argmin(1)), k=2)
    with pytest.raises(BadInput, match="NaN or infinite"):
        fit_utility_probability(LOGITS, (u * math.inf, y))
    with pytest.raises(BadInput, match="without a warp"):
        fit_utility_probability(LOGITS.warped(nucleus(0.9)), (u, y))
    with pytest.raises(BadInput, match="held-out classes are 0 to 4"):
        fit_utility_probability(LOGITS, (u, torch.where(torch.arange(20) == 3, 7, y)), "temperature", k=5)
