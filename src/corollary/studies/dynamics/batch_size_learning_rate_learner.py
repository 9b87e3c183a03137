"""The learner of learning rates against constant ones that were tuned, at equal numbers of gradient evaluations."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import t as student
from torch import nn

from corollary.base.errors import BadInput
from corollary.data import Dataset
from corollary.dynamics.learning_rate_learner import PRODUCT_COST, LearningRateLearner
from corollary.engine import batch_order, cross_entropy, evaluate, population, seeded, sgd
from corollary.evidence import Data, Table

MOMENTA = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
RATES = tuple(2.0 ** (k / 2) for k in range(-8, 7))
FLOOR = 1e-8
"""Losses in float32 end here."""


USUAL_MOMENTUM = 0.9


class Contest(NamedTuple):
    """What is trained: so many seeds, with batches of this size, for so many gradient evaluations.

    `learner`: its settings. `finalists`: constant settings that run on every seed, of those best on the first one.
    """

    seeds: tuple[int, ...]
    batch_size: int
    budget: int
    rates: tuple[float, ...]
    momenta: tuple[float, ...]
    finalists: int
    learner: Mapping[str, Any]


class Comparison(NamedTuple):
    """The mean paired difference, learner less constant, with its 95 % interval, and all of it in words."""

    mean: float
    low: float
    high: float
    text: str


def learned(make_net: Callable[[], nn.Module], data: Dataset, contest: Contest) -> dict[str, Any]:
    """One run of the learner for each seed."""
    rows = [_one(make_net, data, contest, seed) for seed in contest.seeds]
    names = ("log_loss", "accuracy", "products", "spent", "learning_rate", "momentum")
    return dict(zip(names, np.array(rows).T, strict=True))


def scanned(make_net: Callable[[], nn.Module], data: Dataset, contest: Contest) -> dict[str, Any]:
    """Every constant setting on the first seed."""
    grid = [(rate, momentum) for rate in contest.rates for momentum in contest.momenta]
    first = _constant(make_net, data, contest, grid, contest.seeds[:1])
    return {
        "learning_rate": [rate for rate, _ in grid],
        "momentum": [momentum for _, momentum in grid],
        **{name: column[:, 0] for name, column in first.items()},
    }


def finals(
    make_net: Callable[[], nn.Module], data: Dataset, contest: Contest, scan: Mapping[str, Any]
) -> dict[str, Any]:
    """The best constant settings on every seed: by loss, by loss at the usual momentum, and by test accuracy."""
    loss, momentum = np.asarray(scan["log_loss"]), np.asarray(scan["momentum"])
    usual = np.where(momentum == USUAL_MOMENTUM, loss, np.inf)
    orders = (np.lexsort((loss,)), np.lexsort((usual,)), np.lexsort((loss, -np.asarray(scan["accuracy"]))))
    chosen = sorted({int(i) for order in orders for i in order[: contest.finalists]})
    settings = [(float(scan["learning_rate"][i]), float(momentum[i])) for i in chosen]
    final = _constant(make_net, data, contest, settings, contest.seeds)
    count = len(contest.seeds)
    return {
        "learning_rate": np.repeat([rate for rate, _ in settings], count),
        "momentum": np.repeat([value for _, value in settings], count),
        **{name: column.reshape(-1) for name, column in final.items()},
    }


def joined(contests: Mapping[str, Mapping[str, Any]]) -> Table:
    """The same table of every contest, one under the other, with the name of the contest."""
    first = next(iter(contests.values()))
    columns = {name: np.concatenate([np.asarray(table[name]) for table in contests.values()]) for name in first}
    return {"batches": [name for name, table in contests.items() for _ in table["log_loss"]], **columns}


def compared(data: Data, batches: str, column: str = "log_loss", *, momentum: float | None = None) -> Comparison:
    """The learner against the constant setting that is best in `column` on average, of one momentum or of all."""
    ours = {name: np.asarray(values)[_rows(data["runs"], batches)] for name, values in data["runs"].items()}
    finalists = {name: np.asarray(values)[_rows(data["finals"], batches)] for name, values in data["finals"].items()}
    count = len(ours["log_loss"])
    mine = ours[column].astype(float)
    theirs = finalists[column].astype(float).reshape(-1, count)
    rates, momenta = (finalists[name].reshape(-1, count)[:, 0] for name in ("learning_rate", "momentum"))
    score = theirs.mean(1) if column == "log_loss" else -theirs.mean(1)
    best = int(np.where(True if momentum is None else momenta == momentum, score, np.inf).argmin())
    constant = f"rate {float(rates[best]):.3g}, momentum {float(momenta[best]):g}"
    what = "log10 training loss" if column == "log_loss" else "test accuracy"
    said = f"{what} {mine.mean():.3f} for the learner, {theirs[best].mean():.3f} for the constant {constant}"
    differences = mine - theirs[best]
    if not np.isfinite(differences).all():
        lost = int((~np.isfinite(mine)).sum())
        return Comparison(np.inf, np.nan, np.nan, f"{said}; {lost} of {count} runs of the learner diverged")
    mean = float(differences.mean())
    half = float(student.ppf(0.975, count - 1) * differences.std(ddof=1) / count**0.5)
    text = f"{said}; difference {mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]"
    return Comparison(mean, mean - half, mean + half, text)


def _rows(table: Mapping[str, Any], batches: str) -> np.ndarray:
    return np.asarray(table["batches"]) == batches


def _one(make_net: Callable[[], nn.Module], data: Dataset, contest: Contest, seed: int) -> tuple[float, ...]:
    x, y = data.train.x, data.train.y
    assert y is not None  # the digits have labels
    net = seeded(make_net, seed)
    optimizer = LearningRateLearner(net.parameters(), seed=seed, **contest.learner)
    look = PRODUCT_COST * optimizer.steps * optimizer.probes + 1
    spent, step = 0.0, 0
    per_epoch = -(-len(x) // contest.batch_size)
    try:
        while spent + 1 + look * optimizer.due <= contest.budget:
            order = _order(seed, step // per_epoch, len(x), contest.batch_size)
            rows = order[(step % per_epoch) * contest.batch_size :][: contest.batch_size]
            before = optimizer.extra_gradients
            optimizer.step(lambda rows=rows: cross_entropy(net(x[rows]), y[rows]))
            spent += 1 + optimizer.extra_gradients - before
            step += 1
    except BadInput:  # a loss that is not finite has no curvature: the run has diverged
        return (np.inf, 0.0, optimizer.products, spent, *optimizer.settings)
    return (*_scores(net, data), optimizer.products, spent, *optimizer.settings)


def _order(seed: int, epoch: int, samples: int, batch_size: int) -> torch.Tensor:
    """As in `population`: a batch of all samples sees them in order."""
    return torch.arange(samples) if batch_size >= samples else batch_order(seed, epoch, samples)


def _scores(net: nn.Module, data: Dataset) -> tuple[float, float]:
    assert data.train.y is not None  # the digits have labels and a test part
    assert data.test is not None
    assert data.test.y is not None
    loss = evaluate(net, (data.train.x, data.train.y))["loss"]
    log_loss = np.log10(max(loss, FLOOR)) if np.isfinite(loss) else np.inf
    return float(log_loss), evaluate(net, (data.test.x, data.test.y))["accuracy"]


def _constant(
    make_net: Callable[[], nn.Module],
    data: Dataset,
    contest: Contest,
    settings: Sequence[tuple[float, float]],
    seeds: Sequence[int],
) -> dict[str, np.ndarray]:
    """log10 of the final training loss and test accuracy, [settings, seeds]; infinite where a run diverged."""
    assert data.train.y is not None  # the digits have labels and a test part
    assert data.test is not None
    assert data.test.y is not None
    trained = population(
        make_net,
        (data.train.x, data.train.y),
        seeds=list(seeds) * len(settings),
        learning_rate=[rate for rate, _ in settings for _ in seeds],
        optimizer=sgd(torch.tensor([momentum for _, momentum in settings for _ in seeds])),
        batch_size=contest.batch_size,
        steps=contest.budget,
        record_every=contest.budget,
    )
    loss = trained.evaluate((data.train.x, data.train.y))["loss"].double().numpy()
    accuracy = trained.evaluate((data.test.x, data.test.y))["accuracy"].double().numpy()
    fine = np.array(trained.finished) & np.isfinite(loss)
    log_loss = np.where(fine, np.log10(np.maximum(np.where(fine, loss, 1.0), FLOOR)), np.inf)
    shape = (len(settings), len(seeds))
    return {"log_loss": log_loss.reshape(shape), "accuracy": accuracy.reshape(shape)}
