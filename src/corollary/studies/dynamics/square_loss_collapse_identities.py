"""What must hold to rounding in the study `square-loss-collapse`, measured on small networks in float64."""

import torch
from torch import Tensor, nn

from corollary.dynamics.noise_floor import NoiseFloor, sgd_noise_floor
from corollary.dynamics.ranks import unrolled_decay
from corollary.dynamics.rho import RhoModel
from corollary.dynamics.square_loss_training import square
from corollary.engine import Moment, fit, seeded
from corollary.linalg.per_sample import per_sample_gradients
from corollary.studies.dynamics.square_loss_collapse_setup import SETUPS, one_hot, smooth_perceptron, two_layers

EXACT = (
    "decay unrolled",
    "second singular value of a sample's gradient",
    "singular value beyond the batch size",
    "derivative along a layer",
)
"""The relative errors that are 0 in exact arithmetic."""


BATCH = 16


def identities(seed: int) -> dict[str, list[float]]:
    """`EXACT` by name, and the fields of `NoiseFloor` at a stationary point of the loss with decay."""
    x, y = SETUPS["smoke"].classes()
    x, rows = x.double(), one_hot(y).double()
    net = seeded(two_layers, seed).double()
    errors = (_unrolled_error(net, x, rows), *_gradient_ranks(net, x, rows), _derivative_error(seed))
    floor = _converged(seeded(smooth_perceptron, seed).double(), x, rows)
    return {name: [value] for name, value in (*zip(EXACT, errors, strict=True), *floor._asdict().items())}


def _derivative_error(seed: int) -> float:
    """Largest difference of a margin and its gradient by one layer's direction along that direction, relative."""
    model = RhoModel(seeded(SETUPS["desk"].homogeneous, seed).double())
    pixels, labels = SETUPS["smoke"].two_classes()
    margins = model.margins(pixels, labels)
    directions = {name: direction.detach() for name, direction in model.directions.items()}
    shapes = [direction.numel() for direction in directions.values()]
    blocks = per_sample_gradients(model.net, _mean_margin, (pixels, labels), params=directions)
    gradients = torch.cat(list(blocks)).split(shapes, dim=1)
    along = [each @ direction.flatten() for each, direction in zip(gradients, directions.values(), strict=True)]
    return float((torch.stack(along) - margins).abs().max() / margins.abs().max())


def _mean_margin(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs[:, 0] * labels).mean()


def _unrolled_error(net: nn.Module, x: Tensor, rows: Tensor) -> float:
    """Largest relative difference of a run of SGD with decay and the closed form of its gradients."""
    rate, decay, steps = 0.05, 1e-2, 100
    kept: list[dict[str, Tensor]] = []

    def keep(moment: Moment) -> None:
        kept.append({name: p.grad.clone() for name, p in moment.module.named_parameters() if p.grad is not None})

    done = fit(
        net,
        (x, rows),
        loss=square,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=rate, weight_decay=decay),
        steps=steps,
        batch_size=BATCH,
        callbacks=(keep,),
        record_every=1,
    )
    gaps = []
    for name, initial in net.named_parameters():
        gradients = torch.stack([each[name] for each in kept[:steps]])
        unrolled = unrolled_decay(initial.detach(), gradients, learning_rate=rate, weight_decay=decay)
        final = done.module.get_parameter(name).detach()
        gaps.append(float((unrolled - final).norm() / final.norm()))
    return max(gaps)


def _gradient_ranks(net: nn.Module, x: Tensor, rows: Tensor) -> tuple[float, float]:
    """Second over first singular value of single samples' gradients; in batches, the value beyond the bound on rank."""
    samples = next(iter(per_sample_gradients(net, square, (x[: 4 * BATCH], rows[: 4 * BATCH]))))
    shapes = [parameter.shape for parameter in net.parameters()]
    single, several = [], []
    for shape, columns in zip(shapes, samples.split([shape.numel() for shape in shapes], dim=1), strict=True):
        if len(shape) != 2:
            continue
        gradients = columns.reshape(len(samples), *shape)
        values = torch.linalg.svdvals(gradients)
        single.append(float((values[:, 1] / values[:, 0]).max()))
        if min(shape) > BATCH:
            values = torch.linalg.svdvals(gradients.unflatten(0, (-1, BATCH)).mean(dim=1))
            several.append(float((values[:, BATCH] / values[:, 0]).max()))
    return max(single), max(several)


def _converged(net: nn.Module, x: Tensor, rows: Tensor) -> NoiseFloor:
    """Second moment and floor of the per-sample gradients where the full-batch loss with decay is stationary."""
    decay, few = 0.05, (x[:100], rows[:100])
    parameters = list(net.parameters())
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=3000,
        max_eval=6000,
        history_size=100,
        tolerance_grad=1e-8,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def value() -> Tensor:
        optimizer.zero_grad()
        loss = square(net(few[0]), few[1]) + decay / 2 * torch.stack([p.square().sum() for p in parameters]).sum()
        loss.backward()
        return loss

    optimizer.step(value)  # type: ignore[arg-type]  # the stub wants a closure of floats, LBFGS calls float() itself
    return sgd_noise_floor(net, square, few, decay)
