"""Utilities of classes and sequences, held against enumeration of every sequence of a small model."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.dynamics.utility import UtilityModel, nucleus, top_tokens
from corollary.engine import seeded
from corollary.studies.dynamics.utility_duality_networks import END, Translator

EOS = 2


class Random(nn.Module):
    """Logits of the next token that depend on the input and on every token of the prefix, drawn once."""

    def __init__(self, tokens=3, length=3, seed=0, scale=1.5):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = scale * torch.randn((tokens + 1) ** length * 4, tokens, generator=generator, dtype=torch.float64)
        self.tokens, self.length = tokens, length

    def forward(self, x, prefix):
        key, logits = x[:, 0].long() % 4, []
        for t in range(prefix.shape[1] + 1):
            logits.append(self.table[key])
            if t < prefix.shape[1]:
                key = (key * (self.tokens + 1) + prefix[:, t] + 1) % len(self.table)
        return torch.stack(logits, 1)


def every_sequence(length, tokens=3, eos=EOS):
    """All complete sequences, filled up with the end token."""
    others = [token for token in range(tokens) if token != eos]
    rows = [
        [*head, *[eos] * (length - len(head))]
        for count in range(length)
        for head in itertools.product(others, repeat=count)
    ]
    return torch.tensor(rows)


def by_hand(net, x, sequence):
    """Log-score of one sequence, token by token."""
    total = 0.0
    for t, token in enumerate(sequence.tolist()):
        prefix = sequence[:t][None]
        total += float(net(x, prefix)[0, -1].log_softmax(-1)[token])
        if token == EOS:
            return total
    return total


@pytest.fixture
def model():
    return UtilityModel(Random(), "sequence", eos=EOS, max_len=3)


X = torch.tensor([[0.0], [1.0], [2.0]])


def test_the_utility_is_the_sum_with_its_end_token(model):
    all_of_them = every_sequence(3)
    found = model.utility(X, all_of_them.expand(3, -1, -1))
    wanted = torch.tensor([[by_hand(model.model, x[None], y) for y in all_of_them] for x in X])
    torch.testing.assert_close(found.float(), wanted)
    torch.testing.assert_close(model.utility(X, all_of_them[:3]), found.diagonal())
    assert (found[:, 0] < 0).all()  # the empty sequence pays for its end


def test_a_wide_beam_is_exhaustive(model):
    """7 complete sequences: a beam of 10 finds all, in the order of their score, though they end at different times."""
    all_of_them = every_sequence(3)
    utility = model.utility(X, all_of_them.expand(3, -1, -1))
    candidates = model.candidates(X, 10)
    assert candidates.outputs.shape == (3, 7, 3)
    torch.testing.assert_close(candidates.utility, utility.sort(1, descending=True).values)
    assert torch.equal(candidates.outputs, all_of_them[utility.argsort(1, descending=True)])
    assert torch.equal(candidates.lengths, (candidates.outputs != EOS).sum(2) + 1)


def plain_beam(net, x, k, length):
    """Beam search over lists: ended hypotheses compete by the score they have."""
    beam = [((), 0.0, False)]
    for t in range(length):
        grown = []
        for tokens, score, ended in beam:
            if ended:
                grown.append((tokens, score, True))
                continue
            prefix = torch.tensor([tokens], dtype=torch.long).reshape(1, len(tokens))
            gained = net(x, prefix)[0, -1].log_softmax(-1)
            nexts = [EOS] if t == length - 1 else range(len(gained))
            grown += [((*tokens, token), score + float(gained[token]), token == EOS) for token in nexts]
        beam = sorted(grown, key=lambda one: -one[1])[:k]
    return beam


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_a_narrow_beam_is_the_plain_search(k, seed):
    net = Random(tokens=4, length=5, seed=seed)
    x = torch.tensor([[1.0], [3.0]])
    found = UtilityModel(net, "sequence", eos=EOS, max_len=5).candidates(x, k)
    for row in range(2):
        wanted = plain_beam(net, x[row : row + 1], k, 5)
        assert found.utility[row].tolist() == pytest.approx([score for _, score, _ in wanted])
        padded = [[*tokens, *[EOS] * (5 - len(tokens))] for tokens, _, _ in wanted]
        assert found.outputs[row].tolist() == padded


def test_without_an_end_all_sequences_are_of_one_length():
    model = UtilityModel(Random(), "sequence", max_len=3)
    candidates = model.candidates(X, 100)
    assert candidates.outputs.shape == (3, 27, 3)
    torch.testing.assert_close(candidates.utility.exp().sum(1), torch.ones(3, dtype=torch.float64))
    assert (candidates.lengths == 3).all()


def test_states_and_prefixes_are_the_same_model():
    net = seeded(lambda: Translator(8, 12), 0).double()
    source = torch.randint(12, (5, 6), generator=torch.Generator().manual_seed(0))
    source[2, 4:] = END

    class Prefixes(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, source, prefix):
            return self.net(source, prefix)

    ours, theirs = (UtilityModel(m, "sequence", eos=END, max_len=5).candidates(source, 4) for m in (net, Prefixes()))
    torch.testing.assert_close(ours.utility, theirs.utility)
    assert torch.equal(ours.outputs, theirs.outputs)


def test_small_batches_change_nothing(model):
    together = model.candidates(X, 4)
    alone = UtilityModel(model.model, "sequence", eos=EOS, max_len=3, batch_size=1).candidates(X, 4)
    torch.testing.assert_close(together.utility, alone.utility)
    assert torch.equal(together.outputs, alone.outputs)


@pytest.mark.parametrize("warp", [None, nucleus(0.7)])
def test_draws_follow_the_softmax(warp):
    model = UtilityModel(Random(length=4), "sequence", eos=EOS, max_len=4, warp=warp)
    draws = 20_000
    drawn = model.sample(X[:1], draws, torch.Generator().manual_seed(0))[0]
    all_of_them = every_sequence(3)  # those that end before the last place, where the end is forced
    padded = nn.functional.pad(all_of_them, (0, 1), value=EOS)
    p = model.log_probability(X[:1], padded[None])[0].exp()
    frequency = (drawn[:, None] == padded).all(-1).double().mean(0)
    error = (p * (1 - p) / draws).sqrt()
    assert ((frequency - p).abs() <= 4.5 * error + 1e-12).all()  # 7 frequencies within 4.5 standard errors


def test_classes():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, -1.0, 0.0]])
    model = UtilityModel(nn.Identity())
    candidates = model.candidates(logits, 5)
    assert candidates.outputs.tolist() == [[1, 2, 0], [0, 2, 1]]
    assert candidates.utility.tolist() == [[2, 1, 0], [3, 0, -1]]
    assert model.argmax(logits).tolist() == [1, 0]
    assert model.utility(logits, torch.tensor([2, 0])).tolist() == [1, 3]
    assert model.utility(logits, torch.tensor([[2, 0], [0, 1]])).tolist() == [[1, 0], [3, -1]]
    torch.testing.assert_close(
        model.log_probability(logits, torch.tensor([2, 0])), logits.log_softmax(1)[[0, 1], [2, 0]]
    )
    drawn = model.sample(logits, 4000, torch.Generator().manual_seed(0))
    assert float((drawn[0] == 1).double().mean()) == pytest.approx(float(logits[0].softmax(0)[1]), abs=0.035)


def test_a_nucleus_is_the_fewest_that_reach_the_share():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[torch.tensor([2, 0, 3, 1])]
    kept = {share: nucleus(share)(logits).isfinite().tolist() for share in (0.4, 0.6, 0.9, 1.0)}
    assert kept[0.4] == [False, True, False, False]
    assert kept[0.6] == [False, True, False, True]
    assert kept[0.9] == [True, True, False, True]
    assert all(kept[1.0])
    assert top_tokens(2)(logits).isfinite().tolist() == [False, True, False, True]


def test_token_agreement_counts_up_to_the_longer_end(model):
    a = torch.tensor([[0, 1, 2], [0, 2, 2], [2, 2, 2]])
    b = torch.tensor([[0, 1, 2], [0, 1, 2], [0, 1, 2]])
    assert model.token_agreement(a, b).tolist() == pytest.approx([1, 1 / 3 + 1 / 3, 1 / 3])
    assert model.same(a, b).tolist() == [1, 0, 0]


def test_whatever_follows_the_end_is_ignored(model):
    y = torch.tensor([[0, EOS, 1, -100], [1, 0, EOS, 5]])
    assert model.complete(y).tolist() == [[0, EOS, EOS], [1, 0, EOS]]
    assert torch.equal(model.utility(X[:2], y), model.utility(X[:2], model.complete(y)))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "sequence"}, "max_len"),
        ({"kind": "sequence", "max_len": 0}, "max_len"),
        ({"kind": "classifier", "eos": 1}, "of sequences"),
    ],
)
def test_settings_have_to_go_together(settings, says):
    with pytest.raises(BadInput, match=says):
        UtilityModel(nn.Identity(), **settings)


def test_an_unknown_kind_is_not_taken_for_a_classifier():
    with pytest.raises(BadInput, match="of kind"):  # the annotation is checked in tests only, so past it
        UtilityModel.__post_init__(SimpleNamespace(kind="regressor"))  # type: ignore[arg-type]


def test_bad_inputs(model):
    classes = UtilityModel(nn.Identity())
    for logits in (torch.tensor([[0.0, math.nan]]), torch.tensor([[0.0, math.inf]])):
        with pytest.raises(BadInput, match="NaN or infinite"):
            classes.candidates(logits, 2)
    with pytest.raises(BadInput, match="two or more outputs"):
        classes.candidates(torch.zeros(3, 1), 2)
    with pytest.raises(BadInput, match="k=0"):
        classes.candidates(torch.zeros(3, 2), 0)
    with pytest.raises(BadInput, match="indices 0 to 1"):
        classes.utility(torch.zeros(3, 2), torch.tensor([0, 1, 2]))
    with pytest.raises(BadInput, match="outputs for 2"):
        classes.utility(torch.zeros(3, 2), torch.tensor([0, 1]))
    with pytest.raises(BadInput, match="1 or 2 axes"):
        classes.utility(torch.zeros(3, 2), torch.zeros(3, 1, 1, dtype=torch.long))
    with pytest.raises(BadInput, match="does not end"):
        model.utility(X[:1], torch.tensor([[0, 1, 0]]))
    with pytest.raises(BadInput, match="has 3 tokens"):
        UtilityModel(Random(), "sequence", max_len=3).utility(X[:1], torch.tensor([[0, 1]]))
    with pytest.raises(BadInput, match="model\\(x, prefix\\)"):
        model.candidates({"x": X}, 2)
    with pytest.raises(BadInput, match="rules out every sequence"):
        model.warped(lambda u: u.masked_fill(torch.arange(3) == EOS, -math.inf)).candidates(X, 2)
    for share in (0.0, 1.1):
        with pytest.raises(BadInput, match="nucleus"):
            nucleus(share)
    with pytest.raises(BadInput, match="kept"):
        top_tokens(0)


def test_probabilities_are_warned_of():
    with pytest.warns(UserWarning, match="probabilities"):
        UtilityModel(nn.Softmax(1)).candidates(torch.randn(4, 3), 2)


def test_the_users_network_keeps_its_mode():
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.9)).train()
    x = torch.randn(4, 3)
    model = UtilityModel(net)
    assert torch.equal(model.candidates(x, 2).utility, model.candidates(x, 2).utility)
    assert net.training
