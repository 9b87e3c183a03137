"""A classifier of which only the outputs are seen: what it is asked, and how sure its answers are of a class."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.network import evaluating
from corollary.verify.classifier import log_odds_against

Outputs: TypeAlias = Literal["auto", "probabilities", "logits"]
LARGEST = 2**24
"""Entries of the images that are given to the network at a time."""


@final
@dataclass(frozen=True, eq=False)
class PerImage:
    """A network of its own for each image: `predict(images, numbers)`, of which `numbers` (row,) says whose row it is.

    Many networks can so be tested in the batches of one search.
    """

    predict: Callable[[Tensor, Tensor], Tensor]


Predict: TypeAlias = nn.Module | Callable[[Tensor], Tensor] | PerImage
"""Images (row, *image) -> probabilities or logits (row, class)."""


class BlackBox:
    """Asks a network for its outputs, in batches of a bearable size, and reads them.

    Args:
        outputs: what the network returns; "auto" takes the rows of the first answer that are distributions for
            probabilities, and anything else for logits (or log-probabilities, which are logits too).
    """

    def __init__(self, predict: Predict, outputs: Outputs = "auto"):
        if outputs not in ("auto", "probabilities", "logits"):
            raise BadInput(f"outputs are 'auto', 'probabilities' or 'logits', got {outputs!r}")
        self.predict = predict
        self.kind: Outputs = outputs

    def scores(self, images: Float[Tensor, "row ..."], numbers: Int64[Tensor, "row"]) -> Float[Tensor, "row class"]:
        """The outputs, as they come.

        Raises: BadInput, if they are not (row, class) with two classes or more, or hold NaN.
        """
        size = max(1, LARGEST // max(1, images[0].numel()))
        parts = [
            self._ask(images[first : first + size], numbers[first : first + size])
            for first in range(0, len(images), size)
        ]
        scores = torch.cat(parts)
        if self.kind == "auto":
            distributions = (scores >= 0).all() and ((scores.sum(1) - 1).abs() < 1e-3).all()
            self.kind = "probabilities" if distributions else "logits"
        return scores

    def log_odds(self, scores: Float[Tensor, "row class"], labels: Int64[Tensor, "row"]) -> Float[Tensor, "row"]:
        r"""$\log p_c - \log \sum_{j \neq c} p_j$ of each row's class, in float64.

        It rises with $p_c$ and does not stop at 1: a softmax of 0.9999999 and one of 1 - 1e-20 are still told apart.
        """
        logits = scores.double()
        if self.kind == "probabilities":
            logits = logits.clamp(min=torch.finfo(torch.float32).tiny).log()
        return -log_odds_against(logits, labels)

    def _ask(self, images: Tensor, numbers: Tensor) -> Float[Tensor, "row class"]:
        outputs = self.predict.predict(images, numbers) if isinstance(self.predict, PerImage) else self.predict(images)
        if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != len(images) or outputs.shape[1] < 2:
            shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise BadInput(
                f"predict was given {len(images)} images and returned {shape}; wanted ({len(images)}, classes) with "
                "two classes or more. For one score s, return the two logits (0, s)"
            )
        if outputs.isnan().any():
            raise BadInput(f"predict returned NaN for {int(outputs.isnan().any(1).sum())} of {len(images)} images")
        return outputs


@contextmanager
def black_box(predict: Predict, outputs: Outputs = "auto") -> Iterator[BlackBox]:
    """`predict` as a `BlackBox`, without gradients; a module is in evaluation mode inside the block."""
    with torch.no_grad():
        if isinstance(predict, nn.Module):
            with evaluating(predict):
                yield BlackBox(predict, outputs)
        else:
            yield BlackBox(predict, outputs)
