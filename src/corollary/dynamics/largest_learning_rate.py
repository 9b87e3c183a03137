"""The largest learning rate that trains, against batch size: found by training, all rates and seeds at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.network import Batch, Loss, batch_length
from corollary.base.seeds import Seeds
from corollary.dynamics.fits import PowerLaw, fit_power_law
from corollary.engine import Rule, cross_entropy, population, sgd
from corollary.evidence import PALETTE, Figure, Table


@final
@dataclass(frozen=True)
class LargestRates:
    """Training losses after so many steps, for every batch size, learning rate and seed, and what succeeded.

    Args:
        batch_sizes, learning_rates: ascending. losses: over all training data; infinite where training diverged.
        success: a run succeeds with a final loss below this. steps: updates of each run.
    """

    batch_sizes: tuple[int, ...]
    learning_rates: tuple[float, ...]
    losses: Float[Tensor, "batch rate seed"]
    success: float
    optimizer: str
    steps: int

    @property
    def largest(self) -> Float[np.ndarray, "batch"]:
        """The largest rate of the grid with which every seed succeeds; NaN where there is none."""
        works = (self.losses < self.success).all(2).cpu().numpy()
        rates = np.where(works, np.asarray(self.learning_rates), -np.inf).max(1)
        return np.where(np.isfinite(rates), rates, np.nan)

    @property
    def bounded(self) -> tuple[bool, ...]:
        """For each batch size whether the grid goes beyond the largest rate: else the true one may be larger."""
        return tuple(bool(rate < self.learning_rates[-1]) for rate in self.largest)

    def exponent(self, smallest: int = 1, largest: int | None = None) -> PowerLaw:
        """The power law of the largest rate in batch size, over sizes between the two given.

        Raises: BadInput, for fewer than two sizes, or where no rate of the grid succeeds or the largest one does.
        """
        last = max(self.batch_sizes) if largest is None else largest
        chosen = [i for i, size in enumerate(self.batch_sizes) if smallest <= size <= last]
        rates, sizes = self.largest[chosen], [self.batch_sizes[i] for i in chosen]
        if outside := [size for i, size in zip(chosen, sizes, strict=True) if not self.bounded[i]]:
            raise BadInput(
                f"the largest rate at batch sizes {outside} lies outside the grid from {self.learning_rates[0]:.3g} to "
                f"{self.learning_rates[-1]:.3g}: widen it"
            )
        return fit_power_law(sizes, rates)

    def table(self) -> Table:
        """A row for each batch size: the largest rate, and whether the grid goes beyond it."""
        return {
            "batch_size": np.asarray(self.batch_sizes),
            "largest_rate": self.largest,
            "bounded": np.asarray(self.bounded),
        }

    def figure(self) -> Figure:
        """Which rates train at which batch size, with the boundary."""
        share = (self.losses < self.success).double().mean(2).cpu().numpy()
        sizes, rates = np.meshgrid(self.batch_sizes, self.learning_rates, indexing="ij")
        return Figure(
            "largest-learning-rate",
            f"Learning rates that train, {self.optimizer}",
            f"Share of seeds whose training loss is below {self.success:g} after {self.steps} steps; the line joins "
            "the largest rates with which all succeed.",
            {
                "batch_size": sizes.reshape(-1),
                "learning_rate": rates.reshape(-1),
                "share": share.reshape(-1),
                "boundary_batch_size": np.asarray(self.batch_sizes),
                "boundary": self.largest,
            },
            _draw,
        )


def largest_stable_learning_rate(
    make_net: Callable[[], nn.Module],
    data: Batch,
    batch_sizes: Sequence[int],
    learning_rates: Sequence[float],
    *,
    optimizer: Rule | None = None,
    loss: Loss = cross_entropy,
    steps: int = 200,
    seeds: int = 2,
    success: float = 1.0,
    seed: int = 0,
    folder: Path | None = None,
) -> LargestRates:
    r"""Train with every learning rate at every batch size, and see which runs end with a loss below `success`.

    All rates and seeds of one batch size are one population. A seed has the same initial weights everywhere, and the
    same batches at every rate.

    Args:
        make_net: makes a network with PyTorch's default generator.
        data: (inputs, targets), all training samples.
        learning_rates: the grid; steps of a factor $\sqrt 2$ resolve a boundary well.
        optimizer: an update rule, `sgd(...)` (the default) or `adam(...)`.
        steps: updates of every run, the same at every batch size.
        seeds: runs of each setting, all of which must succeed.
        success: the loss over all training data below which a run has succeeded.
        folder: where to save each batch size's runs at intervals, so that a killed search resumes, bit-equal.
    Raises: BadInput, for a batch size that the data does not have, a grid that is empty or not positive, or what
        `population` refuses.
    Source: the searches in Granziol, Zohren and Roberts 2022, arXiv 2006.09092.
    """
    rule = sgd() if optimizer is None else optimizer
    rates, sizes = tuple(sorted(set(learning_rates))), tuple(sorted(set(batch_sizes)))
    samples = batch_length(data[0])
    if not rates or not rates[0] > 0:
        raise BadInput(f"the grid of learning rates needs positive numbers; got {learning_rates}")
    if not sizes or not 1 <= sizes[0] <= sizes[-1] <= samples:
        raise BadInput(f"a batch holds between 1 and all {samples} samples; got batch sizes {list(batch_sizes)}")
    if seeds < 1:
        raise BadInput(f"each setting needs at least one seed; got seeds={seeds}")
    each = [Seeds(seed).integer(f"largest learning rate {i}") for i in range(seeds)]
    found = []
    for size in sizes:
        trained = population(
            make_net,
            data,
            seeds=each * len(rates),
            learning_rate=[rate for rate in rates for _ in each],
            optimizer=rule,
            loss=loss,
            batch_size=size,
            steps=steps,
            record_every=steps,
            checkpoint=None if folder is None else folder / f"{rule.name.split('(')[0]} batch {size}.pt",
        )
        finished = torch.tensor(trained.finished)
        final = trained.evaluate(data)["loss"].double().cpu()
        final = torch.where(finished & torch.isfinite(final), final, torch.inf)
        found.append(final.reshape(len(rates), seeds))
    return LargestRates(sizes, rates, torch.stack(found), success, rule.name.split("(")[0], steps)


def _draw(axes: Any, data: Any) -> None:
    points = axes.scatter(
        data["batch_size"], data["learning_rate"], c=data["share"], s=16, cmap="cividis", vmin=0, vmax=1, marker="s"
    )
    axes.figure.colorbar(points, ax=axes, label="share of seeds that train")
    axes.plot(
        data["boundary_batch_size"], data["boundary"], "o-", color=PALETTE[1], label="largest with which all train"
    )
    axes.set(xlabel="batch size", ylabel="learning rate", xscale="log", yscale="log")
    axes.legend()
