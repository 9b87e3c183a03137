"""What the study `opposing-signals` measures on two-layer linear networks: flow, spikes, planted outliers."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from corollary.dynamics.losses import half_square
from corollary.dynamics.opposing_linear import OpposingLinearModel, opposing_data
from corollary.engine import Fit, Moment, fit
from corollary.linalg import hessian

ALPHAS, SIGNALS = (10.0, 50.0), (1.0, 2.0, 4.0)
EULER = 1e-4
START = {"c0": 0.3, "b0": (0.05, 0.2)}
SPIKE_ALPHA, RATES = 20.0, (0.05, 0.12, 0.15)
PLANTED_ALPHA, PLANTED_SHARE, PLANTED_RATE = 400.0, 0.02, 0.02
PLANTED_SIGNAL = [5**-0.5] * 5
"""Five weights of norm 1."""


def flow(steps: int) -> dict[str, Any]:
    """Euler's method of step 1e-4, which is gradient descent at that rate; the exact flow stands beside it.

    The path is looked at every ten steps, so that an early minimum is not missed, and kept at 200 times.
    """
    alpha, signal = torch.cartesian_prod(torch.tensor(ALPHAS), torch.tensor(SIGNALS)).T
    model = OpposingLinearModel(alpha, signal[:, None], **START)
    path = model.gradient_descent(EULER, steps, every=10)
    exact = model.flow([EULER * steps])
    kept = np.unique(np.append(0, np.geomspace(1, len(path.times) - 1, 200).round())).astype(int)
    columns = {
        "path/time": (EULER * path.times)[kept, None].expand(-1, len(model.c)),
        "path/alpha": model.alpha.expand(len(kept), -1),
        "path/signal": model.beta[:, 0].expand(len(kept), -1),
        "path/sharpness": path.sharpness[kept],
        "limit/alpha": model.alpha,
        "limit/signal": model.beta[:, 0],
        "limit/limit": model.sharpness_limit(),
        "limit/start": path.sharpness[0],
        "limit/lowest": path.sharpness.amin(dim=0),
        "limit/end": path.sharpness[-1],
        "limit/exact_end": exact.sharpness[-1],
        "limit/drift": (path.conserved - path.conserved[0]).abs().amax(dim=0),
    }
    return {name: column.reshape(-1).numpy() for name, column in columns.items()}


def spikes(steps: int) -> dict[str, Any]:
    """Gradient descent at three rates: sharpness, loss, and the difference between the losses of the two groups."""
    rates = torch.tensor(RATES, dtype=torch.float64)
    path = OpposingLinearModel([SPIKE_ALPHA] * len(RATES), 1.0, **START).gradient_descent(rates, steps)
    plus, minus = path.group_losses
    columns = {
        "rate": rates.expand_as(path.c),
        "step": path.times[:, None].expand_as(path.c),
        "sharpness": path.sharpness,
        "loss": path.loss,
        "difference": plus - minus,
    }
    return {name: column.reshape(-1).numpy() for name, column in columns.items()}


def planted(samples: int, steps: int, generator: torch.Generator) -> dict[str, Any]:
    """Sharpness by steps with the opposing coordinate and with zeros in its place, and what is expected along it."""
    x, y, carriers = opposing_data(samples, PLANTED_SIGNAL, PLANTED_ALPHA, fraction=PLANTED_SHARE, generator=generator)
    carried, without = (_descended(inputs, y, steps).record for inputs in (x, torch.cat([x[:, :-1], 0 * x[:, -1:]], 1)))
    return {
        "step": carried.steps,
        "with": carried["sharpness"],
        "without": without["sharpness"],
        "predicted": float(carriers.double().mean()) * PLANTED_ALPHA * carried["c"] ** 2,
    }


def _descended(x: Tensor, y: Tensor, steps: int) -> Fit:
    def curvature(moment: Moment) -> dict[str, Tensor]:
        dense = hessian(moment.module, half_square, (x, y), check=False).to_dense()
        return {"sharpness": torch.linalg.eigvalsh(dense)[-1], "c": moment.module.get_parameter("1.weight")[0, 0]}

    return fit(
        OpposingLinearModel(PLANTED_ALPHA, PLANTED_SIGNAL, 0.3, (0.05, 0.05)).network(),
        (x, y),
        loss=half_square,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=PLANTED_RATE),
        steps=steps,
        callbacks=(curvature,),
        record_every=max(1, steps // 40),
    )


class Spike(NamedTuple):
    """What a path does after its sharpness crosses 2 / learning rate; `crossing` is None if it never does."""

    crossing: int | None
    low: float
    peak: float
    largest: float
    end: float
    loss: float
    alternation: float

    @classmethod
    def of(cls, path: Mapping[str, np.ndarray], rate: float) -> "Spike":
        """The path of one rate, its columns by name in the order of the steps."""
        over = np.flatnonzero(path["sharpness"] > 2 / rate)
        first = int(over[0]) if len(over) else None
        after = path["loss"][first or 0 :]
        top = int(after.argmax())
        sign = np.sign(path["difference"])
        return cls(
            crossing=first,
            low=float(after[: top + 1].min()),
            peak=float(after[top]),
            largest=float(path["sharpness"].max()),
            end=float(path["sharpness"][-1]),
            loss=float(path["loss"][-1]),
            alternation=float(np.mean(sign[1:] * sign[:-1] < 0)),
        )

    def recovers(self, rate: float) -> bool:
        """Whether the loss rose a hundredfold after the crossing, then fell below 1e-8 on the stable side."""
        spiked = self.crossing is not None and self.peak >= 100 * self.low
        return spiked and self.end < 2 / rate and self.loss < 1e-8
