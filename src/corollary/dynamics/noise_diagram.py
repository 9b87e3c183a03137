"""Where SGD noise matters: networks trained to fit every point, over temperature, output scale and training set."""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.nn import functional

from corollary.base.errors import BadInput
from corollary.base.network import Batch, as_function, evaluating
from corollary.base.seeds import Seeds
from corollary.dynamics.noise_table import PhaseTable
from corollary.engine import Members, Outcome, Population, population, seeded
from corollary.engine.arguments import checked_data

SAMPLES_AT_ONCE = 512
BLOCK_BYTES = 2**28
"""Size of the Jacobians that are held at a time."""
_BY_BATCH_OR_CHANCE = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
)


def sgd_temperature(learning_rate: float, batch_size: int, *, width: int = 1, momentum: float = 0.0) -> float:
    r"""The temperature of SGD noise, $T = \eta / (h B)$; heavy-ball momentum $\mu$ makes it $\eta / ((1 - \mu) h B)$.

    Args: `width`: h, for networks that divide their output by their width, whose learning rates grow with it; 1 for
        the usual parametrisation and for the perceptron. Say which when temperatures are compared.
    Source: Sclocchi, Geiger and Wyart 2023, arXiv 2301.13703.
    """
    if not (learning_rate > 0 and batch_size >= 1 and width >= 1 and 0 <= momentum < 1):
        raise BadInput(
            "a temperature needs a positive learning rate, a batch and a width of at least 1 and momentum in [0, 1), "
            f"got {learning_rate}, {batch_size}, {width}, {momentum}"
        )
    return learning_rate / ((1 - momentum) * width * batch_size)


def hinge(outputs: Tensor, targets: Tensor) -> Tensor:
    r"""$\frac1n \sum_i \sum_k \max(0, 1 - y_{ik} F_k(x_i))$: the mean over samples, zero once every point is fitted.

    Args:
        outputs: `[n]`, `[n, 1]` or `[n, outputs]`.
        targets: -1 and 1, `[n]` or, one against the rest, `[n, outputs]`.
    """
    flat = outputs.squeeze(-1) if outputs.ndim == targets.ndim + 1 and outputs.shape[-1] == 1 else outputs
    if flat.shape != targets.shape:
        raise BadInput(f"outputs {list(outputs.shape)} do not fit targets {list(targets.shape)} of -1 and 1")
    return (1 - flat * targets).clamp(min=0).sum() / len(targets)


class MeanFieldPerceptron(nn.Module):
    r"""A fully connected network with weights from N(0, 1) and no biases: $x \leftarrow \mathrm{relu}(W x / \sqrt{n})$.

    n is the fan-in of a layer; the last one divides by its fan-in itself, so that its one output, `[samples]`, is a
    mean over the hidden units. Temperatures of this network take its hidden width as `width`.

    Args:
        inputs, hidden: widths, `depth` hidden layers.
    Source: the architecture of Sclocchi, Geiger and Wyart 2023, arXiv 2301.13703.
    """

    def __init__(self, inputs: int, hidden: int, depth: int, dtype: torch.dtype = torch.float64):
        super().__init__()
        widths = (inputs, *[hidden] * depth, 1)
        self.weights = nn.ParameterList(torch.randn(b, a, dtype=dtype) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs, one a sample."""
        *hidden, last = self.weights  # a slice of a ParameterList would hold new parameters, cut off from these
        for weight in hidden:
            x = functional.relu(functional.linear(x, weight, None) / math.sqrt(weight.shape[1]))
        return (functional.linear(x, last, None) / last.shape[1]).squeeze(-1)


class CenteredModel(nn.Module):
    r"""$\alpha (f(w, x) - f(w_0, x))$: a network whose output starts at zero, $w_0$ being its weights when wrapped.

    The scale $\alpha$ sets the regime: the larger, the less the weights need to move to fit (lazy training); the
    smaller, the more they do (feature learning).

    Args:
        model: any network; it is copied, never written to. What depends on the batch or on chance has no $f(w_0, x)$.
        scale: $\alpha$.
        inputs: samples whose $f(w_0, x)$ is kept, so that a pass costs one network and not two. `forward` then takes
            their row numbers as well, and works for these samples alone.
    Raises: BadInput, for batch normalisation or dropout, naming the layer.
    Source: Chizat, Oyallon and Bach 2019, arXiv 1812.07956, section 1.1; Sclocchi et al. 2023, arXiv 2301.13703.
    """

    scale: Tensor
    start_outputs: Tensor | None

    def __init__(self, model: nn.Module, scale: float = 1.0, inputs: Tensor | None = None):
        super().__init__()
        _refuse_chance(model)
        if not scale > 0:
            raise BadInput(f"the scale of the output is positive, got {scale}")
        self.model = deepcopy(model)
        like = next(self.model.parameters())
        self.register_buffer("scale", torch.tensor(float(scale), dtype=like.dtype, device=like.device))
        self.start = None if inputs is not None else deepcopy(model).requires_grad_(False)
        known = None if inputs is None else _outputs(self.model, inputs)
        self.register_buffer("start_outputs", known)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Outputs for samples `x`; `rows` are their numbers among the known inputs, where those were given."""
        if rows is None and self.start is not None:
            before = self.start(x)
        elif rows is not None and self.start_outputs is not None:
            before = self.start_outputs[rows]
        else:
            raise BadInput(
                "give row numbers with the samples exactly if CenteredModel was given its inputs: rows were "
                f"{'not ' if rows is None else ''}given, the inputs were {'not ' if self.start is not None else ''}"
            )
        return self.scale * (self.model(x) - before)


def noise_phase_diagram(
    make_model: Callable[[], nn.Module],
    data: Batch,
    alphas: Sequence[float],
    temperatures: Sequence[float],
    *,
    points: int | Sequence[int] | None = None,
    batch_size: int = 16,
    width: int = 1,
    repeats: int = 2,
    max_steps: int = 3000,
    check_every: int = 25,
    kernel_points: int = 32,
    seed: int = 0,
    folder: Path | str | None = None,
) -> PhaseTable:
    r"""Train a network in every cell, $w \leftarrow w + \frac{dt}{B} \sum_i y_i \nabla F(x_i)$, until all is fitted.

    The sum goes over the points with $\alpha y_i F(x_i) < 1$ of a batch of B distinct ones, drawn anew each step;
    $F = f - f_0$ and $dt = T h B$: the hinge loss over $\alpha$. A network stops when a look at all its training
    points, every `check_every` steps, finds each fitted. Networks of one repeat share their initial weights, their
    training points and their batches; each row of cells (one size, one scale) is one population.

    Args:
        make_model: draws the initial weights with PyTorch's default generator; in the dtype of the data.
        data: inputs `[n, ...]` and labels -1, +1, `[n]`, or `[n, outputs]` for one against the rest.
        alphas: scales of the output.
        temperatures: T.
        points: sizes of the training sets, drawn without replacement from the data for each repeat; what is left is
            for testing. By default all points train and there is no test error.
        batch_size: B.
        width: h, see `sgd_temperature`.
        max_steps: a network that is not done by then is returned unfinished.
        kernel_points: samples on which the tangent kernel is compared with that of the start; 0 for no comparison.
        folder: keeps one checkpoint for each row of cells, so that a diagram that was interrupted goes on: networks
            that were done are read, not trained again, and the result is the same to the bit.
    Raises: BadInput, for a batch larger than a training set, labels other than -1 and 1, a grid that is not positive,
        or scales too large for the dtype (alpha F is a difference of outputs: at 2^15 it needs float64).
    Source: Sclocchi, Geiger and Wyart 2023, arXiv 2301.13703.
    """
    x, y = _checked(data, alphas, temperatures)
    sizes = [len(x)] if points is None else [points] if isinstance(points, int) else list(points)
    if not (sizes and all(batch_size <= size <= len(x) for size in sizes) and batch_size >= 1 and repeats >= 1):
        raise BadInput(
            f"training sets of {sizes} points are wanted, with batches of {batch_size} distinct ones, {repeats} times: "
            f"a batch holds 1 to all points of a training set, which has at most the {len(x)} there are"
        )
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    starts = [seeded(make_model, Seeds(seed).integer(f"repeat {repeat}")) for repeat in range(repeats)]
    settings = _Settings(batch_size, width, max_steps, check_every, kernel_points, Seeds(seed))
    rows = [
        _row_of_cells(starts, (x, y), size, alpha, temperatures, settings, None if folder is None else Path(folder))
        for size in sizes
        for alpha in alphas
    ]
    joined = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    return PhaseTable(**joined, width=width, batch_size=batch_size)


@dataclass(frozen=True)
class _Settings:
    batch_size: int
    width: int
    max_steps: int
    check_every: int
    kernel_points: int
    seeds: Seeds


def _row_of_cells(
    starts: Sequence[nn.Module],
    data: tuple[Tensor, Tensor],
    size: int,
    alpha: float,
    temperatures: Sequence[float],
    settings: _Settings,
    folder: Path | None,
) -> dict[str, np.ndarray]:
    """All temperatures and repeats of one training-set size and one scale, as one population."""
    x, y = data
    numbers = torch.arange(len(x), device=x.device)
    temperature = torch.tensor(temperatures, dtype=torch.float64).repeat_interleave(len(starts))
    repeat = np.tile(np.arange(len(starts)), len(temperatures))
    train = [
        torch.randperm(len(x), generator=settings.seeds(f"points of repeat {number}"))[:size]
        for number in range(len(starts))
    ]
    step_size = temperature * settings.width * settings.batch_size
    centred = [CenteredModel(start, alpha, x) for start in starts]
    name = f"noise-{size}-points-scale-{float(alpha)!r}.checkpoint"
    trained = population(
        [centred[number] for number in repeat],
        ((x, numbers), y),
        seeds=[settings.seeds.integer(f"batches of repeat {number}") for number in repeat],
        subsets=[train[number] for number in repeat],
        loss=hinge,
        learning_rate=step_size / alpha,  # the model carries a factor alpha, the paper's loss 1 / alpha
        batch_size=settings.batch_size,
        order="fresh",
        steps=settings.max_steps,
        record_every=settings.check_every,
        measure_train=True,
        stop_when=_all_fitted,
        checkpoint=None if folder is None else folder / name,
    )
    steps = np.array([outcome.step for outcome in trained.outcomes])
    kernel = _kernel_change(centred, trained, repeat, x[: settings.kernel_points], numbers)
    return {
        "points": np.full(len(repeat), size),
        "alpha": np.full(len(repeat), float(alpha)),
        "temperature": temperature.numpy(),
        "repeat": repeat,
        "steps": steps,
        "time": steps * step_size.numpy(),
        "test_error": _test_error(trained, data, train, repeat),
        "weight_change": _weight_change(centred, trained, repeat),
        "kernel_change": kernel,
        "finished": np.array([outcome.outcome is Outcome.STOPPED for outcome in trained.outcomes]),
        "diverged": np.array([outcome.outcome is Outcome.DIVERGED for outcome in trained.outcomes]),
    }


def _all_fitted(measured: Mapping[str, Tensor]) -> Tensor:
    return measured["train_loss"] == 0


def _weight_change(centred: Sequence[CenteredModel], trained: Population, repeat: np.ndarray) -> np.ndarray:
    starts = _initial_stacks(centred)
    moved, norm = torch.zeros(len(trained), dtype=torch.float64), torch.zeros(len(trained), dtype=torch.float64)
    for name, after in trained.params.items():
        start = starts[name][torch.from_numpy(repeat)]
        moved += (after - start).cpu().double().flatten(1).square().sum(1)
        norm += start.cpu().double().flatten(1).square().sum(1)
    return (moved / norm).sqrt().numpy()


def _initial_stacks(centred: Sequence[CenteredModel]) -> dict[str, Tensor]:
    named = [{name: p.detach() for name, p in model.named_parameters() if p.requires_grad} for model in centred]
    return {name: torch.stack([parameters[name] for parameters in named]) for name in named[0]}


def _test_error(
    trained: Population, data: tuple[Tensor, Tensor], train: Sequence[Tensor], repeat: np.ndarray
) -> np.ndarray:
    """Share of wrong answers on all samples that a network did not train on."""
    x, y = data
    held_out = torch.ones(len(train), len(x), dtype=torch.bool)
    for number, rows in enumerate(train):
        held_out[number, rows] = False
    wrong = torch.cat(
        [
            _wrong(trained.final((x[rows], rows)), y[rows])
            for rows in torch.arange(len(x), device=x.device).split(SAMPLES_AT_ONCE)
        ],
        dim=1,
    ).cpu()
    held_out = held_out[torch.from_numpy(repeat)]
    counts = held_out.sum(1).double()
    return ((wrong & held_out).sum(1) / counts).numpy()  # 0 / 0 is the NaN of those without a test set


def _wrong(outputs: Tensor, targets: Tensor) -> Tensor:
    """`[members, samples]`; an output of 0 is wrong, as it decides nothing."""
    if targets.ndim > 1 and targets.shape[-1] > 1:
        return outputs.argmax(-1) != targets.argmax(-1)
    return ~(outputs.flatten(1) * targets.flatten() > 0)


def _kernel_change(
    centred: Sequence[CenteredModel], trained: Population, repeat: np.ndarray, x: Tensor, numbers: Tensor
) -> np.ndarray:
    if not len(x):
        return np.full(len(trained), math.nan)
    inputs = (x, numbers[: len(x)])
    chosen = torch.from_numpy(repeat)
    starts = _initial_stacks(centred)
    first = [int(np.flatnonzero(repeat == number)[0]) for number in range(len(centred))]
    buffers = {name: buffer[first] for name, buffer in trained.buffers.items()}
    before = _tangent_kernels(trained.final.with_values(starts, buffers), inputs)[chosen]
    after = _tangent_kernels(trained.final, inputs)
    return ((after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)).cpu().double().numpy()


def _tangent_kernels(members: Members, inputs: tuple[Tensor, Tensor]) -> Float[Tensor, "member row row"]:
    r"""$J J^\top$ of every member on the same samples."""
    net = as_function(members.architectures[0])
    entries = sum(stack[0].numel() for stack in members.params.values())
    at_once = max(1, BLOCK_BYTES // (8 * len(inputs[0]) * entries))

    def kernel(params: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        found: Any = jacrev(lambda p: net({**buffers, **p}, inputs).flatten())(params)
        jacobian = torch.cat([part.flatten(1) for part in found.values()], dim=1)
        return jacobian @ jacobian.mT

    with evaluating(members.architectures[0]):
        return vmap(kernel, chunk_size=at_once)(members.params, members.buffers)


def _outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part) for part in inputs.split(SAMPLES_AT_ONCE)])


def _checked(data: Batch, alphas: Sequence[float], temperatures: Sequence[float]) -> tuple[Tensor, Tensor]:
    x, y = checked_data(data)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise BadInput("the inputs are wanted as one tensor of real numbers [n, ...]")
    if not bool((y.abs() == 1).all()):
        raise BadInput(f"labels are wanted as -1 and 1, got values such as {y.unique()[:4].tolist()}")
    grid = [*alphas, *temperatures]
    if not (len(alphas) and len(temperatures) and all(value > 0 and math.isfinite(value) for value in grid)):
        raise BadInput(f"scales and temperatures are wanted positive and finite, got {alphas} and {temperatures}")
    if max(alphas) * torch.finfo(x.dtype).eps > 1e-3:
        raise BadInput(
            f"at a scale of {max(alphas):g} the network moves so little that {x.dtype} loses alpha (f - f_0) in "
            "rounding: give inputs and networks in float64"
        )
    return x, y.to(x.dtype)


def _refuse_chance(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, _BY_BATCH_OR_CHANCE):
            raise BadInput(
                f"layer {name!r} ({type(layer).__name__}) makes an output depend on the batch or on chance, so that "
                "there is no f(w_0, x) to subtract: use a network without it"
            )
