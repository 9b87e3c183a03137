"""Black-box safety testing: the nearest adversarial image, sought by a game on features and Monte Carlo tree search."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from corollary.base.errors import BadInput
from corollary.verify.black_box import Outputs, Predict, black_box
from corollary.verify.game_tree import GameTree, Node, Player
from corollary.verify.keypoints import Detector
from corollary.verify.manipulations import Manipulation, Norm, PixelGrid, refuse_norm, severity
from corollary.verify.playouts import Opponent, Playouts
from corollary.verify.saliency import FeatureMap, refuse_unlike_images, saliency_maps

SECOND_PLAYER: dict[Opponent, Player] = {"cooperative": "maximise", "adversarial": "minimise", "nature": "chance"}


@dataclass(frozen=True)
class Budget:
    """When a search ends, by image: after so many queries, simulations, or seconds of all together; whichever is first.

    Raises: BadInput, if nothing is limited, or by less than nothing.
    """

    queries: int | None = None
    seconds: int | float | None = None
    simulations: int | None = None

    def __post_init__(self) -> None:
        limits = [limit for limit in (self.queries, self.seconds, self.simulations) if limit is not None]
        if not limits or min(limits) <= 0:
            raise BadInput(f"a budget limits queries, seconds or simulations by a number above 0, got {self}")


@dataclass(frozen=True, eq=False)
class TestReport:
    """What a search found on one image.

    Args:
        image: the nearest adversarial image found, (channel, height, width); None if there is none.
        severity: its distance by norm ("L0" counts pixels); infinite if there is none, 0 for an input that was
            misclassified before anything was changed.
        label: class that the image has; `predicted`: the class of `image`.
        queries: images whose class was asked, the original included.
        first_query: how many it had taken when the first adversarial image was seen, None if there was none;
            `first_severity`: that image's distance in the norm of the search.
        trace: least severity after each simulation, (simulation,).
        plays: severity at which each simulation ended, before moves were undone; infinite where it failed.
        mean_reward: of the simulations, 1 / severity each; 0 for a play that failed or was given up.
        value: of the game, estimated. Players who help each other can have the best play seen: 1 / least severity.
            Against the others: the mean reward, whose choices tend to the best.
        features: the saliency that guided the search.
    """

    __test__: ClassVar[bool] = False  # the name begins like a test's

    image: Float[Tensor, "channel height width"] | None
    severity: dict[str, float]
    label: int
    predicted: int | None
    queries: int
    first_query: int | None
    first_severity: float
    trace: Float[Tensor, "simulation"]
    plays: Float[Tensor, "simulation"]
    mean_reward: float
    value: float
    features: FeatureMap

    @property
    def found(self) -> bool:
        """Whether there is an adversarial image (or the input was one)."""
        return self.image is not None


def feature_guided_search(
    predict: Predict, image: Float[Tensor, "channel height width"], label: int | None = None, **options: Any
) -> TestReport:
    """Look for the adversarial image nearest to `image`, seeing only what `predict` returns.

    Args: `label`: class of the image, by default the predicted one. `options`: see `feature_guided_searches`.
    Source: Wicker et al. 2018, arXiv 1710.07859, sections 4 and 5.
    """
    labels = None if label is None else torch.tensor([label], device=image.device)
    return feature_guided_searches(predict, image[None], labels, **options)[0]


def feature_guided_searches(
    predict: Predict,
    images: Float[Tensor, "image channel height width"],
    labels: Int64[Tensor, "image"] | None = None,
    *,
    norm: Norm = 0,
    budget: Budget | None = None,
    manipulation: Manipulation = "max",
    opponent: Opponent = "cooperative",
    visit: int = 6,
    radius: float = math.inf,
    features: Sequence[FeatureMap] | Detector = "dog",
    outputs: Outputs = "auto",
    parallel: int = 8,
    exploration: float = 1.0,
    seed: int = 0,
) -> list[TestReport]:
    r"""`feature_guided_search` on several images of one size, all asked about in the same batches.

    Two players build the adversarial image by turns: the first picks a feature of the image, the second up to `visit`
    pixels of it and which way they move. A play ends with a wrong class, beyond `radius`, or without moves; it earns
    the first player 1 / severity if the class is wrong, else 0. Each simulation starts at a new leaf of the tree. With
    a cooperative second player, moves that the wrong class does not need are undone at its end, and the value is one
    over the least severity that moves can reach.

    Args:
        predict: images (row, channel, height, width) -> probabilities or logits (row, class); or a `PerImage`.
        images: in [0, 1].
        labels: classes, by default the predicted ones.
        norm: k of the severity ||a - a'||_k: 0 (pixels), 1, 2 or inf.
        budget: by default 100 simulations an image. Its last batch of plays may take some queries more than allowed.
        manipulation: "max" (each channel to the farther of 0 and 1), "white", or a step tau.
        opponent: the second player: "cooperative", "adversarial" (minimises), or "nature" (draws by the features).
        visit: pixels of a move.
        radius: severity d beyond which an image does not count.
        features: a detector's name or function (see `saliency_map`), or a `FeatureMap` of each image.
        parallel: simulations from each leaf, played together.
        exploration: c of the upper confidence bound.
    Returns: a report for each image. An image that is misclassified already has severity 0 and is not searched.
    Raises: BadInput, for images outside [0, 1], and for options out of range.
    Source: Wicker et al. 2018, arXiv 1710.07859, sections 4 and 5.
    """
    budget = budget or Budget(simulations=100)
    started = time.monotonic()
    _check(images, norm, opponent, visit, radius, parallel)
    grid = PixelGrid.of(images, manipulation)
    maps = _maps(images, features)
    with black_box(predict, outputs) as box:
        if labels is None:
            labels = box.scores(images, torch.arange(len(images), device=images.device)).argmax(1)
        log_mass, weights = _padded(maps)
        playouts = Playouts(
            box,
            grid,
            labels,
            log_mass,
            weights,
            norm,
            radius,
            visit,
            opponent,
            torch.Generator(images.device).manual_seed(seed),
            query_limit=budget.queries or math.inf,
            deadline=started + (budget.seconds or math.inf),
        )
        search = _Search(playouts, [len(m.weights) for m in maps], parallel, exploration, seed)
        search.run(budget.simulations or math.inf)
        return [_report(search, number, maps[number]) for number in range(len(images))]


class _Position(NamedTuple):
    """Where a game is: the levels of the pixels, the log-odds of the original class there, and the feature that the
    second player is to move (-1: the first player is to choose one)."""

    levels: Int64[Tensor, "pixel"]
    log_odds: float
    feature: int


@dataclass(eq=False)
class _Best:
    """What the search of one image has so far."""

    severity: float = math.inf
    levels: Tensor | None = None
    trace: list[float] = field(default_factory=list)
    plays: list[float] = field(default_factory=list)


class _Search:
    """A tree for each image; each round adds a leaf to each and plays from all of them together."""

    def __init__(self, playouts: Playouts, features: list[int], parallel: int, exploration: float, seed: int):
        self.playouts, self.features, self.parallel = playouts, features, parallel
        self.predicted = playouts.original_scores.argmax(1)
        random = np.random.default_rng(seed)
        start = torch.zeros_like(playouts.grid.highest[0])
        self.trees = [
            GameTree(Node(_Position(start, odds, -1), "maximise", count), random, exploration)
            for odds, count in zip(playouts.original_log_odds.tolist(), features, strict=True)
        ]
        self.best = [_Best() for _ in features]

    def run(self, simulations: float) -> None:
        """Rounds until every image has spent its budget or its game is played out."""
        while images := [i for i in range(len(self.trees)) if self._is_open(i, simulations)]:
            paths = [self.trees[i].select() for i in images]
            self._expand(images, paths)
            counts = [
                1 if path[-1].terminal is not None else int(min(self.parallel, simulations - len(self.best[i].trace)))
                for i, path in zip(images, paths, strict=True)
            ]
            self._simulate(images, paths, counts)

    def _is_open(self, image: int, simulations: float) -> bool:
        numbers = torch.tensor([image], device=self.predicted.device)
        right = bool(self.predicted[image] == self.playouts.labels[image])
        root = self.trees[image].root
        goes_on = root.terminal is None and not root.is_closed and len(self.best[image].trace) < simulations
        return right and goes_on and bool(self.playouts.may_ask(numbers))

    def _expand(self, images: list[int], paths: list[list[Node[_Position]]]) -> None:
        """Give the last node of each path that is not terminal a child, and add it to the path."""
        moving = []
        for place, (image, path) in enumerate(zip(images, paths, strict=True)):
            end = path[-1]
            if end.terminal is not None:
                continue
            if end.state.feature >= 0:
                moving.append(place)
                continue
            feature = self._untried_feature(image, end)
            second = SECOND_PLAYER[self.playouts.opponent]
            child = Node(end.state._replace(feature=feature), second, math.inf, move=feature)
            paths[place] = self.trees[image].expand(path, child)
        if moving:
            self._move([images[i] for i in moving], moving, paths)

    def _untried_feature(self, image: int, node: Node[_Position]) -> int:
        weights = self.playouts.weights[image, : self.features[image]].double().cpu().numpy() + 1e-12
        weights[[int(str(child.move)) for child in node.children]] = 0.0
        return int(self.trees[image].generator.choice(len(weights), p=weights / weights.sum()))

    def _move(self, images: list[int], places: list[int], paths: list[list[Node[_Position]]]) -> None:
        """The second player's moves, all drawn and asked about together."""
        ends = [paths[place][-1].state for place in places]
        numbers = torch.tensor(images, device=self.predicted.device)
        levels = torch.stack([state.levels for state in ends])
        features = torch.tensor([state.feature for state in ends], device=numbers.device)
        after = self.playouts.draw(levels, numbers, features)
        answer = self.playouts.ask(after, numbers)
        stuck = (after == levels).all(1)
        for row, (image, place) in enumerate(zip(images, places, strict=True)):
            child = Node(_Position(after[row], float(answer.log_odds[row]), -1), "maximise", self.features[image])
            if bool(answer.is_adversarial[row]):
                own = slice(row, row + 1)
                child.terminal = 1 / self._keep(image, *self._settled(after[own], numbers[own], answer.severity[own]))
            elif bool(stuck[row] | answer.is_outside[row]):
                child.terminal = 0.0
            paths[place] = self.trees[image].expand(paths[place], child)

    def _simulate(self, images: list[int], paths: list[list[Node[_Position]]], counts: list[int]) -> None:
        """Play from every leaf, its count of times; keep the best images and credit the rewards to the paths."""
        open_places = [place for place, path in enumerate(paths) if path[-1].terminal is None]
        severities = self._play(
            [images[place] for place in open_places],
            [paths[place][-1].state for place in open_places],
            [counts[place] for place in open_places],
        )
        for place, (image, path) in enumerate(zip(images, paths, strict=True)):
            end, best = path[-1], self.best[image]
            if end.terminal is not None:
                rewards = [end.terminal]
                best.plays.append(1 / end.terminal if end.terminal else math.inf)
            else:
                pruned, unpruned = severities[open_places.index(place)]
                rewards = [1 / value for value in pruned]
                best.plays += unpruned
            least = [1 / reward if reward else math.inf for reward in rewards]
            known = best.trace[-1] if best.trace else math.inf
            best.trace += np.minimum.accumulate([known, *least])[1:].tolist()
            self.trees[image].backup(path, rewards)

    def _play(
        self, images: list[int], leaves: list[_Position], counts: list[int]
    ) -> list[tuple[list[float], list[float]]]:
        """Severities of the plays from each leaf, after and before moves were undone."""
        if not leaves:
            return []
        times = torch.tensor(counts, device=self.predicted.device)
        numbers = torch.tensor(images, device=times.device).repeat_interleave(times)
        levels = torch.stack([leaf.levels for leaf in leaves]).repeat_interleave(times, 0)
        features = torch.tensor([leaf.feature for leaf in leaves], device=times.device).repeat_interleave(times)
        odds = torch.tensor([leaf.log_odds for leaf in leaves], dtype=torch.float64, device=times.device)
        levels, won = self.playouts.play(levels, numbers, features, odds.repeat_interleave(times))
        unpruned = torch.full_like(won, math.inf, dtype=torch.float64)
        rows = won.nonzero()[:, 0]
        unpruned[rows] = self._distance(levels[rows], numbers[rows])
        pruned = unpruned.clone()
        levels[rows], pruned[rows] = self._settled(levels[rows], numbers[rows], unpruned[rows])
        parts = zip(levels.split(counts), pruned.split(counts), unpruned.split(counts), images, strict=True)
        found = []
        for some, after, before, image in parts:
            self._keep(image, some, after)
            found.append((after.tolist(), before.tolist()))
        return found

    def _settled(self, levels: Tensor, numbers: Tensor, distance: Tensor) -> tuple[Tensor, Float[Tensor, "row"]]:
        """Adversarial levels as they count, with their severities: a cooperative player undoes what is not needed."""
        if self.playouts.opponent != "cooperative" or len(levels) == 0:
            return levels, distance
        self.playouts.ceiling = self.playouts.ceiling.scatter_reduce(0, numbers, distance, "amin")
        levels = self.playouts.prune(levels, numbers)
        return levels, self._distance(levels, numbers)

    def _keep(self, image: int, levels: Int64[Tensor, "row pixel"], severities: Float[Tensor, "row"]) -> float:
        """Remember the nearest of some adversarial levels; returns its severity."""
        least, best = severities.min(0), self.best[image]
        if float(least.values) < best.severity:
            best.severity, best.levels = float(least.values), levels[least.indices]
        return float(least.values)

    def _distance(self, levels: Tensor, numbers: Tensor) -> Float[Tensor, "row"]:
        grid = self.playouts.grid
        return severity(grid.at(levels, numbers), grid.images[numbers], self.playouts.norm).double()


def _report(search: _Search, number: int, features: FeatureMap) -> TestReport:
    playouts, best = search.playouts, search.best[number]
    original = playouts.grid.images[number]
    predicted, label = int(search.predicted[number]), int(playouts.labels[number])
    found = original if predicted != label else None
    if best.levels is not None:
        own = torch.tensor([number], device=original.device)
        images = playouts.grid.at(best.levels[None], own)
        predicted, found = int(playouts.box.scores(images, own).argmax(1)[0]), images[0]
    first = int(playouts.first_query[number])
    misclassified, root = found is original, search.trees[number].root
    return TestReport(
        image=found,
        severity={
            name: math.inf if found is None else float(severity(found[None], original[None], norm)[0])
            for name, norm in (("L0", 0), ("L1", 1), ("L2", 2), ("Linf", math.inf))
        },
        label=label,
        predicted=None if found is None else predicted,
        queries=int(playouts.queries[number]),
        first_query=1 if misclassified else first or None,
        first_severity=0.0 if misclassified else float(playouts.first_severity[number]),
        trace=torch.tensor(best.trace, dtype=torch.float64),
        plays=torch.tensor(best.plays, dtype=torch.float64),
        mean_reward=math.inf if misclassified else root.mean,
        value=math.inf if misclassified else root.best if playouts.opponent == "cooperative" else root.mean,
        features=features,
    )


def _check(images: Tensor, norm: Norm, opponent: Opponent, visit: int, radius: float, parallel: int) -> None:
    refuse_unlike_images(images)
    refuse_norm(norm)
    if opponent not in SECOND_PLAYER:
        raise BadInput(f"the opponent is one of {', '.join(SECOND_PLAYER)}, got {opponent!r}")
    if visit < 1 or parallel < 1 or not radius > 0:
        raise BadInput(f"wanted visit >= 1, parallel >= 1 and radius > 0, got {visit}, {parallel} and {radius}")


def _maps(images: Tensor, features: Sequence[FeatureMap] | Detector) -> list[FeatureMap]:
    """Feature maps as given, or by a detector. Raises: BadInput, if those given do not fit the images."""
    if isinstance(features, str) or callable(features):
        return saliency_maps(images, cast(Detector, features))
    maps = list(cast(Sequence[FeatureMap], features))
    shapes = {tuple(m.components.shape[1:]) for m in maps}
    if len(maps) != len(images) or shapes != {tuple(images.shape[2:])}:
        raise BadInput(
            f"{len(maps)} feature maps of {sorted(shapes)} pixels were given for {len(images)} images of "
            f"{tuple(images.shape[2:])}: one of the same size is needed for each"
        )
    return maps


def _padded(maps: list[FeatureMap]) -> tuple[Float[Tensor, "image feature pixel"], Float[Tensor, "image feature"]]:
    """Log masses and weights of all images; features that an image lacks weigh nothing."""
    components = [m.components.flatten(1).double() for m in maps]
    # A pixel far from every feature has a mass that rounds to zero, and can be reached all the same.
    log_mass = torch.nn.utils.rnn.pad_sequence([c.clamp(min=1e-300).log() for c in components], batch_first=True)
    return log_mass, torch.nn.utils.rnn.pad_sequence([m.weights.double() for m in maps], batch_first=True)
