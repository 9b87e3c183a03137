"""Outputs of a trained network as an ordinal utility: the score of any output, and the best outputs by score."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.network import Inputs, batch_length, call, evaluating, map_inputs, refuse_non_finite
from corollary.evidence import Source

HUANG_2023 = Source(
    "huang2023utility",
    ("Bojun Huang", "Fei Yuan"),
    "Utility-Probability Duality of Neural Networks",
    2023,
    arxiv="2305.14859",
)

Warp: TypeAlias = Callable[[Tensor], Tensor]
"""Logits `[*, outputs]` of one choice to logits of the same shape; minus infinity rules an output out."""
ROUNDING = 1e-4
"""How far rows of float32 probabilities may be from summing to 1."""


class Candidates(NamedTuple):
    """The best outputs of each input, best first.

    Fields:
        outputs: classes `[n, k]`, or token sequences `[n, k, max_len]`, filled up with the end token.
        utility: `[n, k]`; minus infinity only where a warp rules an output out.
        lengths: `[n, k]`: 1 for a class, tokens with the end token for a sequence.
    """

    outputs: Tensor
    utility: Tensor
    lengths: Tensor


def nucleus(share: float) -> Warp:
    """Keep the fewest outputs whose probabilities reach `share`, as in nucleus sampling.

    Raises: BadInput, unless 0 < share <= 1.
    Source: Holtzman et al. 2020.
    """
    if not 0 < share <= 1:
        raise BadInput(f"a nucleus holds a share of the probability in (0, 1], got {share}")

    def warp(logits: Tensor) -> Tensor:
        ordered, place = logits.softmax(-1).sort(dim=-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= share  # those before it have reached the share already
        return logits.masked_fill(beyond.gather(-1, place.argsort(-1)), -torch.inf)

    return warp


def top_tokens(count: int) -> Warp:
    """Keep the `count` outputs of largest logit, as in top-k sampling. Raises: BadInput, if `count` < 1."""
    if count < 1:
        raise BadInput(f"at least one output has to be kept, got {count}")

    def warp(logits: Tensor) -> Tensor:
        least = logits.topk(min(count, logits.shape[-1])).values[..., -1:]
        return logits.masked_fill(logits < least, -torch.inf)

    return warp


@final
@dataclass(frozen=True)
class UtilityModel:
    r"""A network read as a utility $u(x, y)$, of which only the order of the outputs $y$ is taken at its word.

    A classifier's utility is the logit of the class. A sequence's is its total log-score
    $\sum_t \log \mathrm{softmax}_t$, that of the end token included (without it, short prefixes would win).

    A sequence model is any module called as `model(x, prefix)` with token indices `prefix` `[n, t]`, t = 0, 1, ...,
    that returns the logits `[n, t + 1, tokens]` of the tokens after 0, 1, ..., t of them. A module that can go on from
    a state is faster with two methods: `start(x) -> (logits [n, tokens], state)` and
    `step(tokens [n], state) -> (logits, state)`, the state being tensors whose first axis is the sample, in tuples.

    Args:
        model: returns logits; it is run in evaluation mode and not written to.
        kind: "classifier", logits `[n, classes]`, or "sequence".
        eos: the token that ends a sequence; without it all sequences have `max_len` tokens.
        max_len: tokens of the longest sequence, the end token included.
        warp: changes the logits of each choice first, `nucleus(0.9)` for instance.
        batch_size: inputs in one pass.
    Raises: BadInput, for settings that do not go together; when used, for logits of another shape or not finite.
    Source: Huang and Yuan 2023 (the reading as a utility).
    """

    model: nn.Module
    kind: Literal["classifier", "sequence"] = "classifier"
    eos: int | None = None
    max_len: int | None = None
    warp: Warp | None = None
    batch_size: int = 512

    def __post_init__(self) -> None:
        if self.kind not in ("classifier", "sequence"):
            raise BadInput(f'a utility model is of kind "classifier" or "sequence", got {self.kind!r}')
        if self.kind == "classifier" and (self.eos is not None or self.max_len is not None):
            raise BadInput('eos and max_len are of sequences; give kind="sequence" with them')
        if self.kind == "sequence" and (self.max_len is None or self.max_len < 1):
            raise BadInput(f"a sequence model needs max_len >= 1, the tokens of the longest one, got {self.max_len}")

    def warped(self, warp: Warp | None) -> "UtilityModel":
        """The same network with another change of its logits."""
        return replace(self, warp=warp)

    @torch.no_grad()
    def utility(self, x: Inputs, y: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
        """u(x, y), `[n]` or `[n, k]`, for classes of that shape or for sequences `[n, length]` or `[n, k, length]`.

        Raises: BadInput, for outputs out of range, or a sequence without its end token.
        """
        flat = self._columns(y)
        found = torch.cat([self._utility(part, rows) for part, rows in self._parts(x, flat)])
        return found[:, 0] if y.ndim < flat.ndim else found

    @torch.no_grad()
    def log_probability(self, x: Inputs, y: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The logarithm of the softmax over all outputs, shaped as `utility` is; for sequences it is the utility."""
        if self.kind == "sequence":
            return self.utility(x, y)
        total = torch.cat([self._logits(part).logsumexp(-1) for part, _ in self._parts(x)])
        return self.utility(x, y) - (total if y.ndim == 1 else total[:, None])

    @torch.no_grad()
    def candidates(self, x: Inputs, k: int) -> Candidates:
        """The k outputs of largest utility: all sorted for a classifier, by beam search of width k for sequences.

        A sequence that has ended keeps its place in the beam as long as its score does. All that are returned are
        complete, and there are fewer than k where there are fewer outputs.
        """
        if k < 1:
            raise BadInput(f"at least one candidate has to be asked for, got k={k}")
        best = self._beam if self.kind == "sequence" else self._best_classes
        parts = [best(part, k) for part, _ in self._parts(x)]
        return Candidates(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def argmax(self, x: Inputs, k: int = 10) -> Int[Tensor, "..."]:
        """The output of largest utility: classes `[n]`, or sequences `[n, max_len]` from a beam of width `k`."""
        return self.candidates(x, k if self.kind == "sequence" else 1).outputs[:, 0]

    @torch.no_grad()
    def sample(self, x: Inputs, draws: int, generator: torch.Generator | None = None) -> Int[Tensor, "n draws *tokens"]:
        """Outputs drawn from the softmax, token by token for sequences (one that has not ended by `max_len` is cut).

        Args: `generator`: on the device of the logits.
        """
        draw = self._drawn_sequences if self.kind == "sequence" else self._drawn_classes
        return torch.cat([draw(part, draws, generator) for part, _ in self._parts(x)])

    def complete(self, y: Int[Tensor, "*rows length"]) -> Int[Tensor, "*rows max_len"]:
        """Sequences cut or filled to `max_len` tokens, with the end token from the first one on.

        Raises: BadInput, for a sequence that does not end within `max_len` tokens.
        """
        assert self.max_len is not None  # checked at the door
        if self.eos is None:
            if y.shape[-1] != self.max_len:
                raise BadInput(f"without an end token every sequence has {self.max_len} tokens, got {y.shape[-1]}")
            return y
        ended = (y == self.eos).cumsum(-1) > 0
        if not bool(ended[..., : self.max_len].any(-1).all()):
            raise BadInput(f"a sequence does not end with the token {self.eos} within max_len={self.max_len} tokens")
        kept = y.masked_fill(ended, self.eos)[..., : self.max_len]
        return nn.functional.pad(kept, (0, self.max_len - kept.shape[-1]), value=self.eos)

    def same(self, a: Int[Tensor, "..."], b: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
        """1 where two outputs are equal, else 0; leading axes broadcast, sequences complete."""
        equal = a == b
        return (equal.all(-1) if self.kind == "sequence" else equal).double()

    def token_agreement(self, a: Int[Tensor, "..."], b: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Share of equal tokens, the end token included, up to the end of the longer sequence."""
        ahead = torch.maximum(self._lengths(a), self._lengths(b))
        counted = torch.arange(a.shape[-1], device=a.device) < ahead[..., None]
        return ((a == b) & counted).sum(-1).double() / ahead

    # -------------------------------------------------------------------------------------------------------- classes

    def _logits(self, x: Inputs) -> Float[Tensor, "n classes"]:
        with evaluating(self.model):
            logits = _checked(call(self.model, x), "returned", probabilities=True)
        return logits if self.warp is None else self.warp(logits)

    def _best_classes(self, x: Inputs, k: int) -> Candidates:
        logits = self._logits(x)
        utility, classes = logits.topk(min(k, logits.shape[1]))
        return Candidates(classes, utility, torch.ones_like(classes))

    def _drawn_classes(self, x: Inputs, draws: int, generator: torch.Generator | None) -> Tensor:
        return torch.multinomial(self._logits(x).softmax(-1), draws, replacement=True, generator=generator)

    # ------------------------------------------------------------------------------------------------------ sequences

    def _start(self, x: Inputs) -> tuple[Tensor, Any]:
        """Logits of the first token, and a state; the module's own, or its input and an empty prefix."""
        model: Any = self.model
        if hasattr(model, "start"):
            logits, state = model.start(x)
        else:
            if not isinstance(x, (Tensor, tuple)):
                raise BadInput("a sequence model is called as model(x, prefix): give x as a tensor or a tuple of them")
            first = x if isinstance(x, tuple) else (x,)
            state = (*first, torch.empty(batch_length(x), 0, dtype=torch.long, device=first[0].device))
            logits = model(*state)[:, -1]
        return _checked(logits, "started with", probabilities=True), state

    def _step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        model: Any = self.model
        if hasattr(model, "step"):
            logits, state = model.step(tokens, state)
        else:
            state = (*state[:-1], torch.cat([state[-1], tokens[:, None]], 1))
            logits = model(*state)[:, -1]
        return _checked(logits, "went on with"), state

    def _scores(self, logits: Tensor) -> Tensor:
        return (logits if self.warp is None else self.warp(logits)).log_softmax(-1)

    def _utility(self, x: Inputs, y: Tensor) -> Tensor:
        if self.kind == "classifier":
            logits = self._logits(x)
            _refuse_outside(y, logits.shape[1])
            return logits.gather(1, y)
        with evaluating(self.model):
            logits, state = self._start(x)
            _refuse_outside(y, logits.shape[1])
            rows = torch.arange(len(y), device=y.device).repeat_interleave(y.shape[1])
            logits, state = logits[rows], _rows(state, rows)
            tokens, live = y.flatten(0, 1), torch.ones(len(rows), dtype=torch.bool, device=y.device)
            total = logits.new_zeros(len(rows))
            for t in range(tokens.shape[1]):
                gained = self._scores(logits).gather(1, tokens[:, t : t + 1])[:, 0]
                total = total + torch.where(live, gained, 0)
                live = live & (tokens[:, t] != (-1 if self.eos is None else self.eos))
                if not bool(live.any()):
                    break
                if t + 1 < tokens.shape[1]:
                    logits, state = self._step(tokens[:, t], state)
        return total.reshape(y.shape[:2])

    def _beam(self, x: Inputs, k: int) -> Candidates:
        assert self.max_len is not None  # checked at the door
        with evaluating(self.model):
            logits, state = self._start(x)
            n, count = logits.shape
            score = logits.new_zeros(n, 1)
            tokens = torch.empty(n, 1, 0, dtype=torch.long, device=logits.device)
            ended = torch.zeros(n, 1, dtype=torch.bool, device=logits.device)
            for t in range(self.max_len):
                gained = self._forced(self._scores(logits).reshape(n, -1, count), ended, t)
                total = (score[..., None] + gained).flatten(1)
                score, place = total.topk(min(k, total.shape[1]))
                parent, token = place // count, place % count
                tokens = torch.cat([_of_parent(tokens, parent), token[..., None]], dim=2)
                ended = ended.gather(1, parent) | (token == (-1 if self.eos is None else self.eos))
                if t + 1 == self.max_len or bool((ended | score.isneginf()).all()):
                    break
                rows = torch.arange(n, device=parent.device)[:, None] * gained.shape[1] + parent
                logits, state = self._step(token.flatten(), _rows(state, rows.flatten()))
        found = ~score.isneginf().all(0)
        if not bool(found.any()):
            raise BadInput("the warp rules out every sequence that ends within max_len tokens")
        outputs = tokens[:, found]
        if self.eos is not None:
            outputs = nn.functional.pad(outputs, (0, self.max_len - outputs.shape[2]), value=self.eos)
        return Candidates(outputs, score[:, found], self._lengths(outputs))

    def _forced(self, gained: Tensor, ended: Bool[Tensor, "n beam"], t: int) -> Tensor:
        """Scores of next tokens, where an ended hypothesis stays as it is and the last token can only be the end."""
        if self.eos is None:
            return gained
        assert self.max_len is not None  # checked at the door
        other = torch.arange(gained.shape[-1], device=gained.device) != self.eos
        stay = torch.zeros_like(gained).masked_fill(other, -torch.inf)
        if t + 1 == self.max_len:
            gained = gained.masked_fill(other, -torch.inf)
        return torch.where(ended[..., None], stay, gained)

    def _drawn_sequences(self, x: Inputs, draws: int, generator: torch.Generator | None) -> Tensor:
        assert self.max_len is not None  # checked at the door
        with evaluating(self.model):
            logits, state = self._start(x)
            rows = torch.arange(len(logits), device=logits.device).repeat_interleave(draws)
            logits, state = logits[rows], _rows(state, rows)
            drawn: list[Tensor] = []
            ended = torch.zeros(len(rows), 1, dtype=torch.bool, device=logits.device)
            for t in range(self.max_len):
                if self.eos is not None and t + 1 == self.max_len:
                    drawn.append(torch.full_like(rows, self.eos))
                    break
                chances = self._forced(self._scores(logits)[:, None], ended, t)[:, 0].exp()
                drawn.append(torch.multinomial(chances, 1, generator=generator)[:, 0])
                if self.eos is not None:
                    ended = ended | (drawn[-1] == self.eos)[:, None]
                if t + 1 < self.max_len:
                    logits, state = self._step(drawn[-1], state)
        return torch.stack(drawn, 1).reshape(-1, draws, self.max_len)

    # -------------------------------------------------------------------------------------------------------- in both

    def _columns(self, y: Tensor) -> Tensor:
        """Outputs with an axis of candidates: `[n, k]`, or `[n, k, max_len]` for sequences, complete."""
        axes = 2 if self.kind == "sequence" else 1
        if y.ndim not in (axes, axes + 1):
            raise BadInput(f"outputs of a {self.kind} have {axes} or {axes + 1} axes, got shape {tuple(y.shape)}")
        y = self.complete(y) if self.kind == "sequence" else y
        return y if y.ndim == axes + 1 else y[:, None]

    def _lengths(self, outputs: Tensor) -> Tensor:
        if self.eos is None:
            return torch.full(outputs.shape[:-1], outputs.shape[-1], device=outputs.device)
        return (outputs != self.eos).sum(-1) + 1

    def _parts(self, x: Inputs, y: Tensor | None = None) -> Iterator[tuple[Inputs, Tensor]]:
        n = batch_length(x)
        if n == 0 or (y is not None and len(y) != n):
            raise BadInput(f"{n} inputs were given" + ("" if y is None else f" with outputs for {len(y)}"))
        for i in range(0, n, self.batch_size):
            part = slice(i, i + self.batch_size)
            yield map_inputs(lambda tensor, part=part: tensor[part], x), torch.empty(0) if y is None else y[part]


def _checked(logits: Any, did: str, *, probabilities: bool = False) -> Tensor:
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise BadInput(f"the model {did} {shape}: a utility needs logits [samples, outputs] of two or more outputs")
    refuse_non_finite(logits, "the utility")
    sums_to_one = bool((logits >= 0).all()) and bool(((logits.sum(-1) - 1).abs() < ROUNDING).all())
    if probabilities and sums_to_one:
        warnings.warn(
            "the rows of the model's output are >= 0 and sum to 1: probabilities, it seems, where a utility takes "
            "logits. Take their logarithm, or leave the softmax out of the model.",
            stacklevel=2,
        )
    return logits


def _refuse_outside(y: Tensor, count: int) -> None:
    if bool(((y < 0) | (y >= count)).any()):
        raise BadInput(f"outputs are indices 0 to {count - 1}, got {int(y.min())} to {int(y.max())}")


def _rows(state: Any, rows: Tensor) -> Any:
    """Rows of every tensor of a state."""
    if isinstance(state, Tensor):
        return state[rows]
    return None if state is None else tuple(_rows(part, rows) for part in state)


def _of_parent(tokens: Tensor, parent: Tensor) -> Tensor:
    return tokens.gather(1, parent[..., None].expand(-1, -1, tokens.shape[2]))
