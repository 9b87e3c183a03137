"""Random plays of the game on features, many at a time, and the undoing of what a play did not need."""

import math
import time
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from corollary.verify.black_box import BlackBox
from corollary.verify.manipulations import Norm, PixelGrid, severity

Opponent: TypeAlias = Literal["cooperative", "adversarial", "nature"]
ALTERNATIVES = 4
"""Sets of pixels that an adversarial opponent chooses the worst of."""
PATIENCE = 25
"""Moves undone in a row after which a play is given up."""
LEARNING = 25
"""Share of a reward that a feature's weight learns by, inverted; SafeCV's constant."""
SATURATED = 1e-6
"""Where the original is this sure of its class, falls of its probability cannot be told apart."""
CHUNK, MANY = 10, 100
"""Moves undone at a time, in plays of more moves than `MANY`, before they are undone one by one."""


class Answer(NamedTuple):
    """What is known of images at some levels.

    Fields:
        log_odds: of the original class, infinite where it was not asked.
        is_adversarial: another class wins, within the radius.
        severity: distance from the original.
        is_outside: beyond the radius.
    """

    log_odds: Float[Tensor, "row"]
    is_adversarial: Bool[Tensor, "row"]
    severity: Float[Tensor, "row"]
    is_outside: Bool[Tensor, "row"]


@dataclass(eq=False)
class Playouts:
    """Plays on several images, a row each; a play is asked about together with all others.

    Args:
        log_mass: log of each feature's distribution over pixels, (image, feature, pixel).
        weights: of the features, (image, feature); learnt from play to play.
        query_limit, deadline: when no more questions are asked.
    Attributes:
        queries: images of which the class was asked, by image.
        first_query, first_severity: the query that first brought an adversarial image (0: none yet), and its severity.
        ceiling: least severity at which a play has ended adversarial, before anything was undone.
    """

    box: BlackBox
    grid: PixelGrid
    labels: Int64[Tensor, "image"]
    log_mass: Float[Tensor, "image feature pixel"]
    weights: Float[Tensor, "image feature"]
    norm: Norm
    radius: float
    visit: int
    opponent: Opponent
    generator: torch.Generator
    query_limit: float = math.inf
    deadline: float = math.inf

    def __post_init__(self) -> None:
        count = len(self.labels)
        numbers = torch.arange(count, device=self.labels.device)
        scores = self.box.scores(self.grid.images, numbers)
        self.original_scores = scores
        self.original_log_odds = self.box.log_odds(scores, self.labels)
        self.queries = torch.ones_like(self.labels)
        self.first_query = torch.zeros_like(self.labels)
        self.first_severity = torch.full_like(self.original_log_odds, math.inf)
        self.ceiling = torch.full_like(self.original_log_odds, math.inf)

    def ask(self, levels: Int64[Tensor, "row pixel"], numbers: Int64[Tensor, "row"]) -> Answer:
        """Build the images at `levels` and ask for the class of those within the radius."""
        images = self.grid.at(levels, numbers)
        distance = severity(images, self.grid.images[numbers], self.norm).double()
        # A step of tau and back again differs from tau by rounding, which must not put an image outside.
        outside = distance > self.radius * (1 + 1e-6)
        inside = (~outside).nonzero()[:, 0]
        log_odds, wrong = torch.full_like(distance, math.inf), torch.zeros_like(outside)
        if len(inside):
            scores = self.box.scores(images[inside], numbers[inside])
            labels = self.labels[numbers[inside]]
            log_odds[inside] = self.box.log_odds(scores, labels)
            wrong[inside] = scores.argmax(1) != labels
            self._count(numbers[inside], wrong[inside], distance[inside])
        return Answer(log_odds, wrong, distance, outside)

    def draw(
        self, levels: Int64[Tensor, "row pixel"], numbers: Int64[Tensor, "row"], features: Int64[Tensor, "row"]
    ) -> Int64[Tensor, "row pixel"]:
        """Levels after one move of the second player: `visit` pixels drawn from the feature, all moved one way."""
        up, down = levels < self.grid.highest[numbers], levels > self.grid.lowest[numbers]
        if self.grid.is_one_way:
            sign = torch.ones_like(numbers)
        else:
            sign = 2 * torch.randint(2, numbers.shape, generator=self.generator, device=numbers.device) - 1
            sign = torch.where((sign > 0) & ~up.any(1), -1, torch.where((sign < 0) & ~down.any(1), 1, sign))
        noise = torch.rand(levels.shape, generator=self.generator, device=levels.device, dtype=torch.float64)
        # The largest of log p - log(-log u) are a sample without replacement (Gumbel's trick).
        keys = self.log_mass[numbers, features] - (-noise.clamp(1e-300).log()).log()
        keys = keys.masked_fill(~torch.where(sign[:, None] > 0, up, down), -torch.inf)
        best = keys.topk(min(self.visit, levels.shape[1]), dim=1)
        return levels.scatter_add(1, best.indices, sign[:, None] * best.values.isfinite())

    def play(
        self,
        levels: Int64[Tensor, "row pixel"],
        numbers: Int64[Tensor, "row"],
        features: Int64[Tensor, "row"],
        log_odds: Float[Tensor, "row"],
    ) -> tuple[Int64[Tensor, "row pixel"], Bool[Tensor, "row"]]:
        """Play on from `levels` to the end of each play ("depth-first Monte Carlo").

        The first player draws a feature by the weights, the second moves pixels of it. A cooperative second player
        takes a move back if the probability of the original class did not fall by it.
        Args:
            features: the feature already chosen in each row, or -1 where the first player is to choose.
            log_odds: of the original class, at `levels`.
        Returns: the levels at the end, and which plays have ended adversarial.
        """
        levels, features, odds = levels.clone(), features.clone(), log_odds.clone()
        weights = self.weights[numbers]
        won = torch.zeros_like(numbers, dtype=torch.bool)
        undone = torch.zeros_like(numbers)
        rows = torch.arange(len(numbers), device=numbers.device)
        while len(rows := rows[self.may_ask(numbers[rows])]):
            drawn = torch.multinomial(weights[rows], 1, generator=self.generator)[:, 0]
            chosen = torch.where(features[rows] >= 0, features[rows], drawn)
            features[rows] = -1
            after, answer = self._reply(levels[rows], numbers[rows], chosen)
            fall = self._fall(numbers[rows], answer)
            weights[rows] = _learnt(weights[rows], chosen, fall)
            keep = answer.is_adversarial | (answer.log_odds < odds[rows]) | (self.opponent != "cooperative")
            odds[rows] = torch.where(keep, answer.log_odds, odds[rows])
            over = answer.is_adversarial | (after == levels[rows]).all(1) | self._is_lost(numbers[rows], answer)
            levels[rows] = torch.where(keep[:, None], after, levels[rows])
            won[rows] = answer.is_adversarial
            undone[rows] = torch.where(keep, 0, undone[rows] + 1)
            rows = rows[~over & (undone[rows] < PATIENCE)]
        places = numbers[:, None].expand_as(weights)
        self.weights = self.weights.scatter_reduce(0, places, weights, "mean", include_self=False)
        return levels, won

    def prune(self, levels: Int64[Tensor, "row pixel"], numbers: Int64[Tensor, "row"]) -> Int64[Tensor, "row pixel"]:
        """Undo the moves of adversarial plays in random order, each unless the image would lose its wrong class."""
        if len(levels) and int(levels.abs().sum(1).max()) > MANY:
            levels = self._undo(levels, numbers, CHUNK)
        return self._undo(levels, numbers, 1)

    def _undo(self, levels: Tensor, numbers: Tensor, chunk: int) -> Int64[Tensor, "row pixel"]:
        order = self._random_moves(levels)
        for start in range(0, order.shape[1], chunk):
            moves = order[:, start : start + chunk]
            steps = torch.zeros_like(levels).scatter_add(1, moves.clamp(min=0), (moves >= 0).long())
            shorter = levels.sign() * (levels.abs() - steps).clamp(min=0)
            rows = ((shorter != levels).any(1) & self.may_ask(numbers)).nonzero()[:, 0]
            if len(rows):
                answer = self.ask(shorter[rows], numbers[rows])
                levels = levels.index_copy(
                    0, rows, torch.where(answer.is_adversarial[:, None], shorter[rows], levels[rows])
                )
        return levels

    def _random_moves(self, levels: Int64[Tensor, "row pixel"]) -> Int64[Tensor, "row move"]:
        """The pixels of each row, once a step that they were moved, in random order; -1 fills short rows."""
        counts = levels.abs()
        most, length = (int(counts.max()), int(counts.sum(1).max())) if len(levels) else (0, 0)
        is_move = torch.arange(most, device=levels.device) < counts[:, :, None]
        keys = torch.rand(is_move.shape, generator=self.generator, device=levels.device)
        order = keys.masked_fill(~is_move, 2.0).flatten(1).argsort(1)[:, :length]
        there = is_move.flatten(1).gather(1, order)
        return torch.where(there, order // max(most, 1), -1)

    def _reply(self, levels: Tensor, numbers: Tensor, features: Tensor) -> tuple[Int64[Tensor, "row pixel"], Answer]:
        """The second player's move: the one drawn, or for an adversary the worst for the first player of several."""
        if self.opponent != "adversarial":
            after = self.draw(levels, numbers, features)
            return after, self.ask(after, numbers)
        many = [part.repeat_interleave(ALTERNATIVES, 0) for part in (levels, numbers, features)]
        after = self.draw(*many)
        answer = self.ask(after, many[1])
        worst = answer.log_odds.reshape(-1, ALTERNATIVES).argmax(1)
        worst = worst + ALTERNATIVES * torch.arange(len(worst), device=worst.device)
        return after[worst], Answer(*(part[worst] for part in answer))

    def _is_lost(self, numbers: Tensor, answer: Answer) -> Bool[Tensor, "row"]:
        """Plays without hope: outside the ball (a cooperative player steps back), or worse than the best known."""
        if self.opponent == "cooperative":
            return ~answer.is_outside & (answer.severity > self.ceiling[numbers])
        return answer.is_outside

    def _fall(self, numbers: Tensor, answer: Answer) -> Float[Tensor, "row"]:
        """How far the original class has fallen, from the original image on: in probability, or as a share of its
        log-odds where the probability is so close to one that its falls would be lost in rounding.
        """
        before, after = self.original_log_odds[numbers], answer.log_odds
        fall = torch.sigmoid(before) - torch.sigmoid(after)
        share = ((before - after) / before.abs().clamp(min=1.0)).clamp(min=-1.0)
        fall = torch.where(torch.sigmoid(-before) < SATURATED, share, fall)
        return fall.masked_fill(answer.is_outside, 0.0)

    def may_ask(self, numbers: Int64[Tensor, "row"]) -> Bool[Tensor, "row"]:
        """Which images have queries left; none of them after the deadline."""
        if time.monotonic() > self.deadline:
            return torch.zeros_like(numbers, dtype=torch.bool)
        return self.queries[numbers] < self.query_limit

    def _count(self, numbers: Tensor, wrong: Bool[Tensor, "row"], distance: Float[Tensor, "row"]) -> None:
        """Count the questions; remember the query and the severity of the first success on each image."""
        self.queries = self.queries.index_add(0, numbers, torch.ones_like(numbers))
        hits = numbers[wrong]
        new = self.first_query[hits] == 0
        if new.any():
            first = hits[new]
            self.first_query[first] = self.queries[first]
            self.first_severity.scatter_reduce_(0, first, distance[wrong][new], "amin")


def _learnt(
    weights: Float[Tensor, "row feature"], chosen: Int64[Tensor, "row"], reward: Float[Tensor, "row"]
) -> Float[Tensor, "row feature"]:
    """Weights after the chosen features have earned `reward`: none below zero, summing to one."""
    after = weights.scatter_add(1, chosen[:, None], reward[:, None] / LEARNING).clamp(min=0.0)
    total = after.sum(1, keepdim=True)
    return torch.where(total > 0, after / total, weights)
