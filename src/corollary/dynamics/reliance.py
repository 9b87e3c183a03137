"""What a classifier relies on: accuracy, AUC and logits after a group of features is shuffled across samples.

Shuffling a block S moves its entries together from one sample to another, by one permutation of the samples, and leaves
the other entries and the label in place. What is lost says how much the network uses S; shuffling all but S says how
far it gets with S alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.network import evaluating, refuse_non_finite
from corollary.base.seeds import Seeds
from corollary.dynamics.grokking import ROWS_AT_ONCE, outputs_of
from corollary.evidence import PALETTE, Figure


class Randomized(NamedTuple):
    """Means over permutations, each with its standard error.

    Fields:
        accuracy, auc: as on the samples themselves.
        ks: Kolmogorov-Smirnov distance of the true class's log-odds from those on the samples themselves.
    """

    accuracy: float
    accuracy_error: float
    auc: float
    auc_error: float
    ks: float
    ks_error: float


Block: TypeAlias = Tensor | Sequence[int]
"""Indices into the flattened sample."""


@final
@dataclass(frozen=True)
class RandomizedMetrics:
    """What is left of a classifier when a block of features is shuffled, and when all others are.

    Attributes:
        accuracy, auc: on the samples themselves. The AUC is that of each class against the rest, by its log-odds, mean
            over the classes (for two classes: by the difference of the logits).
        without: with the block shuffled.
        alone: with everything but the block shuffled.
    """

    accuracy: float
    auc: float
    without: Randomized
    alone: Randomized

    @property
    def reliance(self) -> float:
        """Twice the AUC lost with the block: 0 where it is not used, 1 where nothing else is."""
        return 2 * (self.auc - self.without.auc)


@final
@dataclass(frozen=True)
class RelianceProfile:
    """`RandomizedMetrics` of several blocks, by name."""

    metrics: Mapping[str, RandomizedMetrics]
    classes: int
    samples: int
    repeats: int

    @property
    def most_used(self) -> str:
        """The block with the largest reliance."""
        return max(self.metrics, key=lambda name: self.metrics[name].reliance)

    def table(self) -> dict[str, list[Any]]:
        """One row a block: its name, reliance, and every number of `without_...` and `alone_...`."""
        rows = [
            {
                "block": name,
                "reliance": found.reliance,
                "accuracy": found.accuracy,
                "auc": found.auc,
                **{f"without_{key}": value for key, value in found.without._asdict().items()},
                **{f"alone_{key}": value for key, value in found.alone._asdict().items()},
            }
            for name, found in self.metrics.items()
        ]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def figure(self, most: int = 24) -> Figure:
        """Accuracy without each block and with it alone, the `most` used blocks first."""
        table = self.table()
        order = np.argsort(-np.asarray(table["reliance"]), kind="stable")[:most]
        others = len(self.metrics) - len(order)
        data: dict[str, Any] = {name: np.asarray(column)[order] for name, column in table.items()}
        return Figure(
            "reliance",
            "Accuracy without a block of features, and with it alone",
            f"Each block is shuffled across {self.samples:,} samples, then everything else is; bars are means over "
            f"{self.repeats} permutations, with standard errors. A block that matters has a short first bar; one that "
            "is enough by itself has a long second bar. Lines: accuracy as it is, and chance."
            + (f" The {len(order)} most used of {len(self.metrics)} blocks." if others else ""),
            {**data, "chance": np.full(len(order), 1 / self.classes)},
            _draw_profile,
            size=(max(4.6, 1.6 + 0.36 * len(order)), 4.0),
        )


def randomized_metrics(
    model: nn.Module,
    x: Float[Tensor, "sample *input"] | Int[Tensor, "sample *input"],
    y: Tensor,
    block: Block,
    *,
    basis: Tensor | None = None,
    repeats: int = 5,
    seed: int = 0,
) -> RandomizedMetrics:
    """Accuracy, AUC and logits of a classifier with one block of features shuffled, and with all others shuffled.

    Args:
        model: samples -> logits `[sample, class]`, or one logit a sample for two classes; evaluated in evaluation mode.
        x: samples of any shape.
        y: their classes 0, 1, ..., `[sample]`.
        block: indices into the flattened sample.
        basis: Q, orthogonal, where features are coordinates u of x = uQ: the block is then of coordinates.
        repeats: permutations.
        seed: of the permutations; equal seeds give equal permutations for all blocks, so comparisons are paired.
    Raises: BadInput, for a block that is empty, repeats an entry or leaves the sample; for labels of a single class or
        without an output; for a basis that is not orthogonal; for outputs that are not finite.
    Source: Shah et al. 2020, arXiv 2006.07710, section 3 (randomised accuracy, AUC and logits).
    """
    return reliance_profile(model, x, y, {"block": block}, basis=basis, repeats=repeats, seed=seed).metrics["block"]


def reliance_profile(
    model: nn.Module,
    x: Float[Tensor, "sample *input"] | Int[Tensor, "sample *input"],
    y: Tensor,
    blocks: Mapping[str, Block],
    *,
    basis: Tensor | None = None,
    repeats: int = 5,
    seed: int = 0,
) -> RelianceProfile:
    """`randomized_metrics` of several blocks, with the same permutations.

    Args: `blocks`: indices into the flattened sample by name; they need not cover it. The others are as there.
    Raises: BadInput, if two blocks share an entry, and as there.
    """
    groups = _disjoint(blocks, x)
    _refuse_basis(basis, x)
    if repeats < 1:
        raise BadInput(f"at least 1 permutation is needed, got repeats={repeats}")
    judge = _Judge.of(outputs_of(model, x), y)
    generator = Seeds(seed)("permutations")
    orders = torch.stack([torch.randperm(len(x), generator=generator) for _ in range(repeats)]).to(x.device)
    at_once = orders.split(max(1, ROWS_AT_ONCE // len(x)))

    def scores(part: Tensor) -> Randomized:
        found = []
        for some in at_once:
            outputs = outputs_of(model, shuffled(x, part, some, basis=basis).flatten(0, 1))
            found.append(judge.scores(log_odds(outputs).double().unflatten(0, some.shape)))
        return _mean(np.concatenate(found))

    accuracy, auc, _ = judge.scores(judge.standard[None])[0].tolist()
    found = {
        name: RandomizedMetrics(accuracy, auc, scores(block), scores(_complement(block, x[0].numel())))
        for name, block in groups.items()
    }
    return RelianceProfile(found, judge.standard.shape[1], len(x), repeats)


def shuffled(
    x: Float[Tensor, "sample *input"] | Int[Tensor, "sample *input"],
    block: Int[Tensor, "_"],
    order: Int[Tensor, "*repeat sample"],
    *,
    basis: Tensor | None = None,
) -> Tensor:
    """`x` with the block of sample `order[i]` in sample i, all its entries together; once for each of several orders.

    Args: `block`, `basis`: as for `randomized_metrics`; coordinates are shuffled in the basis and rotated back again.
    """
    flat = x.flatten(1) if basis is None else x.flatten(1) @ basis.T
    moved = flat.expand(*order.shape[:-1], *flat.shape).clone()
    moved[..., block] = flat[:, block][order]
    return (moved if basis is None else moved @ basis).reshape(*order.shape, *x.shape[1:])


class PerturbationShare(NamedTuple):
    """An attack, and where it went.

    Fields:
        share: mean over samples of the length of the perturbation inside the block, over its whole length.
        accuracy: of the classifier under the attack.
        moved: share of the samples that the attack moved at all; the others have no slope, and no part in `share`.
    """

    share: float
    accuracy: float
    moved: float


def perturbation_share(
    model: nn.Module,
    x: Float[Tensor, "sample *input"],
    y: Tensor,
    block: Block,
    *,
    radius: float | int,
    basis: Tensor | None = None,
    steps: int = 20,
    step_size: float | int | None = None,
) -> PerturbationShare:
    r"""How much of an adversarial perturbation lies in a block of features: $\lVert P_S\rVert_2 / \lVert P\rVert_2$.

    The attack climbs the log-odds against the true class by normalised gradient steps of the L2 ball, from its centre;
    those have a slope left where the softmax has none.

    Args:
        model, x, y, block, basis: as for `randomized_metrics`.
        radius: of the ball, in the units of the inputs.
        steps, step_size: of the attack; by default steps of a tenth of the radius.
    Raises: BadInput, for a radius or steps that are not above 0, if no sample has a slope, and as there.
    Source: Shah et al. 2020, arXiv 2006.07710, section on adversarial perturbations.
    """
    entries = _disjoint({"block": block}, x)["block"]
    _refuse_basis(basis, x)
    if not radius > 0 or steps < 1 or (step_size is not None and not step_size > 0):
        raise BadInput(f"an attack needs radius, steps and step_size above 0, got {radius}, {steps} and {step_size}")
    _Judge.of(outputs_of(model, x), y)  # refuses what cannot be judged
    parts = [
        _attacked(model, some, labels, float(radius), steps, float(step_size or radius / 10))
        for some, labels in zip(x.split(4096), y.split(4096), strict=True)
    ]
    perturbation = torch.cat(parts)
    hits = log_odds(outputs_of(model, x + perturbation)).argmax(1) == y
    flat = perturbation.flatten(1) if basis is None else perturbation.flatten(1) @ basis.T
    lengths = flat.norm(dim=1)
    moved = lengths > 0
    if not bool(moved.any()):
        raise BadInput("the classifier has no slope at any sample, so the attack goes nowhere")
    share = flat[moved][:, entries].norm(dim=1) / lengths[moved]
    return PerturbationShare(float(share.mean()), float(hits.double().mean()), float(moved.double().mean()))


def log_odds(outputs: Tensor) -> Float[Tensor, "sample class"]:
    r"""$z_k - \log\sum_{j \ne k} e^{z_j}$ for each class: what the softmax says, without its saturation.

    Args: `outputs`: logits `[sample, class]`; `[sample]` or `[sample, 1]` is the logit of class 1 of two.
    Raises: BadInput, for outputs of another shape.
    """
    if outputs.ndim == 1 or (outputs.ndim == 2 and outputs.shape[1] == 1):
        return torch.stack([-outputs.flatten(), outputs.flatten()], dim=1)
    if outputs.ndim != 2:
        raise BadInput(f"a classifier returns [sample, class], got {list(outputs.shape)}")
    # 1 - p is a difference of equals where p is near 1: only the largest logit, whose rivals are summed by themselves.
    rest = outputs.logsumexp(1, keepdim=True) + torch.log1p(-outputs.softmax(1).clamp(max=0.75))
    top = outputs.argmax(1, keepdim=True)
    rivals = outputs.scatter(1, top, -math.inf).logsumexp(1, keepdim=True)
    return outputs - rest.scatter(1, top, rivals)


def area_under_curve(
    scores: Float[np.ndarray, "*row sample"], positive: Bool[np.ndarray, "*row sample"]
) -> Float[np.ndarray, "*row"]:
    """Probability that a positive sample scores above a negative one, ties counting half, for each row.

    Source: the rank sum of Mann and Whitney 1947.
    """
    ranks = np.where(positive, rankdata(scores, axis=-1), 0).sum(-1)
    count = positive.sum(-1)
    return (ranks - count * (count + 1) / 2) / (count * (scores.shape[-1] - count))


def kolmogorov_smirnov(a: Float[Tensor, "*row first"], b: Float[Tensor, "second"]) -> Float[Tensor, "*row"]:
    """Largest distance between the distribution functions of two samples, of each row of the first and the second."""
    points = torch.cat([a, b.expand(*a.shape[:-1], -1)], dim=-1)
    first, second = (
        torch.searchsorted(part.sort().values.contiguous(), points, right=True).double() / part.shape[-1]
        for part in (a, b)
    )
    return (first - second).abs().amax(-1)


@final
@dataclass(frozen=True)
class _Judge:
    """Scores of log-odds by the labels of the samples."""

    y: Tensor
    standard: Tensor

    @classmethod
    def of(cls, outputs: Tensor, y: Tensor) -> "_Judge":
        standard = log_odds(outputs).double()
        if y.ndim != 1 or len(y) != len(outputs) or y.is_floating_point():
            raise BadInput(f"{len(outputs)} samples need one class number each, got {y.dtype} of shape {list(y.shape)}")
        classes = y.unique()
        if len(classes) < 2:
            raise BadInput(f"all {len(y)} labels are {int(classes[0])}: there is nothing to tell apart")
        if int(classes[0]) < 0 or int(classes[-1]) >= standard.shape[1]:
            raise BadInput(
                f"labels run from {int(classes[0])} to {int(classes[-1])}, but the classifier has classes 0 to "
                f"{standard.shape[1] - 1}"
            )
        return cls(y, standard)

    def scores(self, values: Float[Tensor, "repeat sample class"]) -> Float[np.ndarray, "repeat score"]:
        """Accuracy, AUC, and distance from the standard log-odds, for each repeat."""
        accuracy = (values.argmax(-1) == self.y).double().mean(1)
        present = self.y.unique()
        positive = (self.y == present[:, None]).cpu().numpy()
        by_class = values.mT[:, present].cpu().numpy()
        auc = area_under_curve(by_class, np.broadcast_to(positive, by_class.shape)).mean(1)
        own = values.gather(2, self.y.expand(len(values), -1)[:, :, None])[:, :, 0]
        before = self.standard.gather(1, self.y[:, None])[:, 0]
        return np.stack([accuracy.cpu().numpy(), auc, kolmogorov_smirnov(own, before).cpu().numpy()], axis=1)


def _mean(scores: Float[np.ndarray, "repeat score"]) -> Randomized:
    count = len(scores)
    errors = scores.std(0, ddof=1) / math.sqrt(count) if count > 1 else np.full(scores.shape[1], math.nan)
    return Randomized(*(float(value) for pair in zip(scores.mean(0), errors, strict=True) for value in pair))


def _attacked(model: nn.Module, x: Tensor, y: Tensor, radius: float, steps: int, step_size: float) -> Tensor:
    """The perturbation after projected gradient ascent in the L2 ball."""
    perturbation = torch.zeros_like(x)
    rows = (-1, *[1] * (x.ndim - 1))
    with torch.enable_grad(), evaluating(model):
        for _ in range(steps):
            point = (x + perturbation).detach().requires_grad_()
            against = -log_odds(model(point)).gather(1, y[:, None]).sum()
            (slope,) = torch.autograd.grad(against, point)
            length = slope.flatten(1).norm(dim=1)
            step = torch.where(length > 0, step_size / length, 0)
            perturbation = perturbation + step.view(rows) * slope
            reach = perturbation.flatten(1).norm(dim=1)
            perturbation = perturbation * (radius / reach.clamp(min=radius)).view(rows)
    return perturbation


def _complement(block: Tensor, entries: int) -> Tensor:
    rest = torch.ones(entries, dtype=torch.bool, device=block.device)
    rest[block] = False
    return rest.nonzero()[:, 0]


def _disjoint(blocks: Mapping[str, Block], x: Tensor) -> dict[str, Tensor]:
    """The blocks as tensors of indices, if they are blocks of different entries."""
    if not blocks:
        raise BadInput("no blocks were given: at least one group of features is needed")
    owner: dict[int, str] = {}
    entries = x[0].numel()
    found = {name: torch.as_tensor(block, dtype=torch.long, device=x.device) for name, block in blocks.items()}
    for name, block in found.items():
        if block.numel() == 0 or int(block.min()) < 0 or int(block.max()) >= entries:
            raise BadInput(
                f"block {name!r} needs entries of 0 to {entries - 1}, at least one; got {block.tolist()[:10]}"
            )
        for entry in block.tolist():
            if entry in owner:
                raise BadInput(f"entry {entry} is in block {owner[entry]!r} and again in block {name!r}")
            owner[entry] = name
    return found


def _refuse_basis(basis: Tensor | None, x: Tensor) -> None:
    if basis is None:
        return
    entries = x[0].numel()
    if basis.shape != (entries, entries) or not x.is_floating_point():
        raise BadInput(f"a basis for {x.dtype} samples of {entries} entries is [{entries}, {entries}], real numbers")
    refuse_non_finite(basis, "the basis")
    error = float((basis @ basis.T - torch.eye(entries).to(basis)).abs().max())
    if error > 1e3 * torch.finfo(basis.dtype).eps:
        raise BadInput(f"the basis is not orthogonal: its rows miss it by {error:.2g}. Take Q of a QR decomposition")


def _draw_profile(axes: Any, data: Mapping[str, Any]) -> None:
    places = np.arange(len(data["block"]))
    for i, (kind, label) in enumerate((("without", "block shuffled"), ("alone", "all others shuffled"))):
        axes.bar(
            places + 0.4 * i - 0.2,
            data[f"{kind}_accuracy"],
            yerr=np.nan_to_num(data[f"{kind}_accuracy_error"]),
            width=0.38,
            color=PALETTE[1 - i],
            error_kw={"elinewidth": 0.8},
            label=label,
        )
    axes.axhline(data["accuracy"][0], color=PALETTE[6], linewidth=1, label="nothing shuffled")
    axes.axhline(data["chance"][0], color=PALETTE[6], linewidth=1, linestyle=":", label="chance")
    axes.set(ylabel="accuracy", ylim=(0, 1.03))
    axes.set_xticks(places, data["block"], rotation=0 if max(map(len, data["block"])) < 4 else 60)
    axes.grid(visible=False, axis="x")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4)
