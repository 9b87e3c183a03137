"""Networks and data of the study `utility-duality`: a toy translation, a grammar that can be enumerated, digits."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corollary.data import digits
from corollary.engine import flip_labels

VOCABULARY = 12
END = VOCABULARY
"""The end token of a translation; also fills up source sequences."""
SYMBOLS, CHAIN_LENGTH = 6, 3
IGNORED = -100


class Pairs(NamedTuple):
    """Source sequences `[n, longest]`, their true and their noisy translations `[n, longest + 1]`, all filled up with
    the end token."""

    source: Tensor
    target: Tensor
    noisy: Tensor


def translations(
    count: int, lengths: tuple[int, int], noise: float, permutation: Tensor, generator: torch.Generator
) -> Pairs:
    """Sequences of uniform length and tokens, reversed and mapped by a permutation; then tokens replaced at random."""
    shortest, longest = lengths
    length = torch.randint(shortest, longest + 1, (count, 1), generator=generator)
    place = torch.arange(longest).expand(count, -1)
    drawn = torch.randint(VOCABULARY, (count, longest), generator=generator)
    source = drawn.masked_fill(place >= length, END)
    turned = drawn.gather(1, (length - 1 - place).clamp(min=0))
    target = permutation[turned].masked_fill(place >= length, END)
    replaced = torch.rand(count, longest, generator=generator) < noise
    other = torch.randint(VOCABULARY, (count, longest), generator=generator)
    noisy = torch.where(replaced & (place < length), other, target)
    return Pairs(source, F.pad(target, (0, 1), value=END), F.pad(noisy, (0, 1), value=END))


class Translator(nn.Module):
    """A bidirectional GRU encoder and a GRU decoder with dot attention."""

    def __init__(self, embedding: int = 32, hidden: int = 96):
        super().__init__()
        self.source = nn.Embedding(VOCABULARY + 1, embedding)
        self.target = nn.Embedding(VOCABULARY + 2, embedding)  # the last one begins every sequence
        self.forwards = nn.GRU(embedding, hidden, batch_first=True)
        self.backwards = nn.GRU(embedding, hidden, batch_first=True)
        self.keys = nn.Linear(2 * hidden, hidden)
        self.bridge = nn.Linear(2 * hidden, hidden)
        self.decoder = nn.GRU(embedding, hidden, batch_first=True)
        self.mixed = nn.Linear(2 * hidden, hidden)
        self.out = nn.Linear(hidden, VOCABULARY + 1)

    def forward(self, source: Tensor, prefix: Tensor) -> Tensor:
        """Logits `[n, t + 1, tokens]` after 0 to t tokens of `prefix`."""
        keys, outside, hidden = self._encoded(source)
        begin = prefix.new_full((len(prefix), 1), VOCABULARY + 1)
        states, _ = self.decoder(self.target(torch.cat([begin, prefix], 1)), hidden)
        return self._read(states, keys, outside)

    def start(self, source: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Logits of the first token, and what the decoder goes on from."""
        keys, outside, hidden = self._encoded(source)
        return self.step(source.new_full((len(source),), VOCABULARY + 1), (keys, outside, hidden[0]))

    def step(
        self, tokens: Tensor, state: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Logits of the token after `tokens`."""
        keys, outside, hidden = state
        states, last = self.decoder(self.target(tokens[:, None]), hidden[None].contiguous())
        return self._read(states, keys, outside)[:, 0], (keys, outside, last[0])

    def _encoded(self, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys `[n, length, hidden]`, the mask of what lies outside the source, and the decoder's first state."""
        outside = source == END
        place = torch.arange(source.shape[1], device=source.device).expand_as(source)
        turn = torch.where(outside, place, (~outside).sum(1, keepdim=True) - 1 - place)[..., None]
        embedded = self.source(source)
        ahead, _ = self.forwards(embedded)
        # Turned around within its own length, so that the fill comes last in both directions.
        back, _ = self.backwards(embedded.gather(1, turn.expand_as(embedded)))
        memory = torch.cat([ahead, back.gather(1, turn.expand_as(back))], 2)
        return self.keys(memory), outside, torch.tanh(self.bridge(memory[:, 0]))[None]

    def _read(self, states: Tensor, keys: Tensor, outside: Tensor) -> Tensor:
        scores = (states @ keys.mT).masked_fill(outside[:, None], -torch.inf)
        context = scores.softmax(-1) @ keys
        return self.out(torch.tanh(self.mixed(torch.cat([states, context], 2))))


class NextToken(nn.Module):
    """The step of a sequence model as a classifier of the next token."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, source: Tensor, prefix: Tensor) -> Tensor:
        """Logits `[n, tokens]`."""
        return self.model(source, prefix)[:, -1]


def teacher_forced(target: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens that go in, and tokens to predict: all up to the first end token, the rest is not counted."""
    ends = (target == END).cumsum(1)
    return target[:, :-1], target.masked_fill(ends > 1, IGNORED)


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the tokens that count."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


class Chain(nn.Module):
    """A GRU over sequences of one distribution; its input only says how many."""

    def __init__(self, hidden: int = 64):
        super().__init__()
        self.tokens = nn.Embedding(SYMBOLS + 1, hidden)  # the last one begins every sequence
        self.recurrent = nn.GRU(hidden, hidden, batch_first=True)
        self.out = nn.Linear(hidden, SYMBOLS)

    def forward(self, _: Tensor, prefix: Tensor) -> Tensor:
        """Logits `[n, t + 1, symbols]` after 0 to t symbols of `prefix`."""
        begin = prefix.new_full((len(prefix), 1), SYMBOLS)
        states, _ = self.recurrent(self.tokens(torch.cat([begin, prefix], 1)))
        return self.out(states)


def zipf_grammar(generator: torch.Generator, power: float = 1.5) -> tuple[Tensor, Tensor]:
    """All sequences `[216, 3]` over six symbols, and their probabilities under a Markov chain with Zipf-like rows.

    The first symbol and each row of transitions have the probabilities 1 / rank^power in a random order of symbols.
    """
    law = torch.arange(1, SYMBOLS + 1, dtype=torch.float64) ** -power
    rows = torch.stack([(law / law.sum())[torch.randperm(SYMBOLS, generator=generator)] for _ in range(SYMBOLS + 1)])
    sequences = torch.cartesian_prod(*[torch.arange(SYMBOLS)] * CHAIN_LENGTH)
    probability = rows[SYMBOLS][sequences[:, 0]] * rows[sequences[:, :-1], sequences[:, 1:]].prod(1)
    return sequences, probability


def noisy_digits(train: int, noise: float, generator: torch.Generator) -> dict[str, tuple[Tensor, Tensor]]:
    """Digits (x, y) with labels changed: `train`, `heldout` (the rest of the training part) and `test`."""
    data = digits(dtype=torch.float64)
    assert data.test is not None
    assert data.train.y is not None
    assert data.test.y is not None
    noisy, noisy_test = (flip_labels(y, noise, generator) for y in (data.train.y, data.test.y))
    return {
        "train": (data.train.x[:train], noisy[:train]),
        "heldout": (data.train.x[train:], noisy[train:]),
        "test": (data.test.x, noisy_test),
    }


def perceptron() -> nn.Module:
    """64-128-10, in float64."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).double()
