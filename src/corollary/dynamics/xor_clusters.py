"""XOR clusters and the two-layer ReLU network that groks them: data, first step, and training in Gram space.

Gradient descent leaves the weights of the first layer in $W_0 + \\mathrm{span}(x_1, \\dots, x_n)$. So the coefficients
$\\Gamma$ in $W = W_0 + \\Gamma X$, with the inner products of the samples, are all that training needs: a step costs
$O(m n^2)$ for m neurons and n samples, whatever the dimension.
"""

import abc
import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.network import Loss, refuse_non_finite
from corollary.base.seeds import Seeds
from corollary.dynamics.grokking import GrokRecord
from corollary.engine import TrainingRecord

CLUSTER_LABELS = (1.0, 1.0, -1.0, -1.0)
"""Labels of the clusters at +mean 1, -mean 1, +mean 2, -mean 2."""


@final
@dataclass(frozen=True)
class XORClusters:
    """Samples of four Gaussian clusters in XOR position.

    Attributes:
        x: samples.
        y: labels -1 and 1 to train on, some of them flipped.
        clean: the labels before that.
        cluster: 0 and 1 at plus and minus the first mean (label 1), 2 and 3 at the second (label -1).
        means: the two orthogonal means.
        seeds: where the draws come from.
    """

    x: Float[Tensor, "sample dimension"]
    y: Float[Tensor, "sample"]
    clean: Float[Tensor, "sample"]
    cluster: Int[Tensor, "sample"]
    means: Float[Tensor, "2 dimension"]
    seeds: Seeds

    def test(self, samples: int) -> tuple[Float[Tensor, "test dimension"], Float[Tensor, "test"]]:
        """Fresh samples with their true labels, the same on every call."""
        if samples < 1:
            raise BadInput(f"at least 1 test sample is needed, got {samples}")
        cluster = _clusters(samples, False, self.seeds("test clusters"), self.x.device)
        return _drawn(cluster, self.means, self.seeds("test samples")), _labels(cluster, self.means)


def xor_clusters(
    samples: int,
    dimension: int,
    *,
    square_norm: float | int = 500.0,
    noise: float | int = 0.1,
    balanced: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> XORClusters:
    r"""Draw XOR cluster data: $x = \pm\mu_k + \xi$ with $\xi \sim N(0, I_p)$, label 1 for k = 1 and -1 for k = 2.

    The means lie along the first two axes: everything else being isotropic, any two orthogonal ones are as good.

    Args:
        samples: n, to train on.
        dimension: p.
        square_norm: $\lVert\mu_1\rVert^2 = \lVert\mu_2\rVert^2$. One step of gradient descent fits noisy labels where p
            is well above $\sqrt{n}\,\lVert\mu\rVert^2$.
        noise: probability that a label is flipped, each by its own coin.
        balanced: as many samples of each cluster, up to one, instead of drawing clusters at random.
    Raises: BadInput, for fewer than 1 sample or 2 dimensions, means of no length, or noise outside [0, 0.5).
    Source: Xu et al. 2024, arXiv 2310.02541, section on the data distribution.
    """
    if samples < 1 or dimension < 2:
        raise BadInput(f"XOR clusters need samples >= 1 and dimension >= 2, got {samples} and {dimension}")
    if not square_norm > 0:
        raise BadInput(f"square_norm, the squared length of the cluster means, must be above 0, got {square_norm}")
    if not 0 <= noise < 0.5:
        raise BadInput(f"noise is the probability of a flipped label, in [0, 0.5), got {noise}")
    seeds = Seeds(seed).child("xor clusters")
    means = torch.zeros(2, dimension, dtype=dtype, device=device)
    means[0, 0] = means[1, 1] = math.sqrt(square_norm)
    cluster = _clusters(samples, balanced, seeds("clusters"), means.device)
    clean = _labels(cluster, means)
    flipped = (torch.rand(samples, generator=seeds("flips"), dtype=torch.float64) < noise).to(means.device)
    x = _drawn(cluster, means, seeds("samples"))
    return XORClusters(x, torch.where(flipped, -clean, clean), clean, cluster, means, seeds)


@final
class TwoLayerReLU(nn.Module):
    r"""$f(x) = \sum_j a_j\,\mathrm{relu}(w_j^T x)$, fixed $a_j = \pm 1/\sqrt m$ and $w_j \sim N(0, \omega^2 I)$.

    Args:
        dimension: of the inputs.
        width: m, the number of neurons; each sign is a fair coin.
        initial_scale: $\omega$. Not 0: at a weight of exactly 0 no neuron is active and none ever moves.
    Raises: BadInput, for sizes below 1 or a scale that is not above 0.
    """

    signs: Tensor

    def __init__(
        self,
        dimension: int,
        width: int,
        *,
        initial_scale: float | int = 1e-6,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if dimension < 1 or width < 1:
            raise BadInput(f"the network needs dimension >= 1 and width >= 1, got {dimension} and {width}")
        if not initial_scale > 0:
            raise BadInput(
                f"initial_scale must be above 0, got {initial_scale}: at weights of 0 every neuron is at the kink of "
                "the ReLU, where none is active. Give a small number, such as 1e-6"
            )
        seeds = Seeds(seed).child("two-layer network")
        weight = torch.randn(width, dimension, generator=seeds("weights"), dtype=dtype)
        self.weight = nn.Parameter(initial_scale * weight)
        coins = torch.randint(2, (width,), generator=seeds("signs"))
        self.register_buffer("signs", (2 * coins - 1).to(dtype) / math.sqrt(width))

    def with_weight(self, weight: Float[Tensor, "neuron dimension"]) -> "TwoLayerReLU":
        """The same network with other first-layer weights."""
        other = deepcopy(self)
        other.weight = nn.Parameter(weight)
        return other

    def forward(self, x: Float[Tensor, "sample dimension"]) -> Float[Tensor, "sample"]:
        """One output a sample; its sign is the class."""
        return F.relu(x @ self.weight.T) @ self.signs


def logistic(outputs: Float[Tensor, "sample"], targets: Float[Tensor, "sample"]) -> Float[Tensor, ""]:
    r"""$\frac1n \sum_i \log(1 + e^{-y_i f(x_i)})$ for labels -1 and 1."""
    return F.softplus(-targets * outputs).mean()


def first_step(
    weight: Float[Tensor, "neuron dimension"],
    signs: Float[Tensor, "neuron"],
    x: Float[Tensor, "sample dimension"],
    y: Float[Tensor, "sample"],
    learning_rate: float | int,
) -> Float[Tensor, "neuron dimension"]:
    r"""Weights after one step of gradient descent from a vanishing initialisation, in closed form.

    $w_j^1 = w_j^0 + \frac{\alpha a_j}{2n} \sum_i y_i\, 1[w_j^{0T} x_i > 0]\, x_i$: outputs are 0, where the slope of
    the logistic loss is -1/2.
    Source: Xu et al. 2024, arXiv 2310.02541, proof sketch.
    """
    active = (weight @ x.T > 0).to(x)
    return weight + learning_rate / (2 * len(x)) * signs[:, None] * ((active * y) @ x)


def linear_surrogate(
    x: Float[Tensor, "sample dimension"], y: Float[Tensor, "sample"], points: Float[Tensor, "point dimension"]
) -> Float[Tensor, "point"]:
    r"""The linear classifier that the network is close to after one step, $\frac1n \sum_i y_i x_i^T x$ at points x."""
    return points @ (y @ x) / len(x)


class AbstractWeights(abc.ABC):
    """First-layer weights W as training sees them: by what they give on samples and on probes.

    Probes are points that are watched and not trained on.
    """

    @abc.abstractmethod
    def on_samples(self) -> Float[Tensor, "neuron sample"]:
        """Pre-activations $w_j^T x_i$ of the samples."""

    @abc.abstractmethod
    def on_probes(self) -> Float[Tensor, "neuron probe"]:
        """Pre-activations of the probes."""

    @abc.abstractmethod
    def square_norms(self) -> Float[Tensor, "neuron"]:
        r"""$\lVert w_j\rVert^2$."""

    @abc.abstractmethod
    def add(self, coefficients: Float[Tensor, "neuron sample"]) -> None:
        """Add so many times each sample to the weights of each neuron."""

    @abc.abstractmethod
    def dense(self) -> Float[Tensor, "neuron dimension"]:
        """The weights themselves."""


@final
class DirectWeights(AbstractWeights):
    """The weights as they stand: a step costs O(m n p)."""

    def __init__(self, weight: Tensor, x: Tensor, probes: Tensor):
        self._weight, self._x, self._points = weight.clone(), x, probes

    def on_samples(self) -> Tensor:
        return self._weight @ self._x.T

    def on_probes(self) -> Tensor:
        return self._weight @ self._points.T

    def square_norms(self) -> Tensor:
        return self._weight.square().sum(1)

    def add(self, coefficients: Tensor) -> None:
        self._weight += coefficients @ self._x

    def dense(self) -> Tensor:
        return self._weight.clone()


@final
class GramWeights(AbstractWeights):
    """The weights by their coefficients over the samples: a step costs O(m n^2), and O(m n) more for each probe."""

    def __init__(self, weight: Tensor, x: Tensor, probes: Tensor):
        self._start, self._x = weight, x
        self._gram, self._cross = x @ x.T, x @ probes.T
        self._start_samples, self._start_probes = weight @ x.T, weight @ probes.T
        self._start_squares = weight.square().sum(1)
        self._coefficients = weight.new_zeros(len(weight), len(x))

    def on_samples(self) -> Tensor:
        return torch.addmm(self._start_samples, self._coefficients, self._gram)

    def on_probes(self) -> Tensor:
        return torch.addmm(self._start_probes, self._coefficients, self._cross)

    def square_norms(self) -> Tensor:
        # |w_0 + c X|^2 = |w_0|^2 + c . (w_0 X' + w X')
        return self._start_squares + (self._coefficients * (self._start_samples + self.on_samples())).sum(1)

    def add(self, coefficients: Tensor) -> None:
        self._coefficients += coefficients

    def dense(self) -> Tensor:
        return torch.addmm(self._start, self._coefficients, self._x)


def descent(
    net: TwoLayerReLU,
    x: Float[Tensor, "sample dimension"],
    y: Float[Tensor, "sample"],
    probes: Float[Tensor, "probe dimension"],
    *,
    learning_rate: float | int,
    steps: int,
    loss: Loss = logistic,
    gram: bool = True,
) -> Iterator[AbstractWeights]:
    r"""Full-batch gradient descent on the first layer of `net`, seen at steps 0, 1, ..., `steps`.

    $W \leftarrow W - \alpha \nabla L$ with $\partial L / \partial w_j = a_j \sum_i \frac{\partial L}{\partial f_i}
    1[w_j^T x_i > 0]\, x_i$, of any samples and any loss of the outputs.

    Args:
        net: where to start; not written to.
        x, y: samples, and what `loss` compares the outputs with.
        probes: points to watch.
        loss: (outputs [sample], y) -> mean over samples.
        gram: work with inner products of the samples (`GramWeights`), which is faster when there are more dimensions
            than samples; otherwise with the weights. Both give the same, up to rounding.
    Yields: the weights, `steps` + 1 times; the object is the same each time and goes on with the iteration.
    Raises: BadInput, for samples that do not fit each other or the network, or are not finite, or fewer than 0 steps.
    """
    _refuse_unfit(net, x, y, probes, learning_rate, steps)
    start = net.weight.detach()
    weights = GramWeights(start, x, probes) if gram else DirectWeights(start, x, probes)
    return _steps(weights, net.signs, y, learning_rate, steps, loss)


def grok_xor(
    data: XORClusters,
    net: TwoLayerReLU,
    *,
    learning_rate: float | int = 0.01,
    steps: int = 40,
    test_samples: int = 1000,
    gram: bool = True,
) -> GrokRecord:
    """Train `net` on XOR clusters by gradient descent on the logistic loss, and record what grokking is made of.

    Args:
        data: the samples; clean test points are drawn from the same clusters.
        net: where to start; not written to.
        learning_rate: above about 0.1 the first step fits so well that later ones hardly move, and the network
            generalises late or never.
        test_samples: clean points for the test accuracy and the odd fraction.
        gram: see `descent`.
    Returns: every step, from 0 on, and the trained network.
    Raises: BadInput, if the network has another dimension than the data, and as `descent`.
    Source: Xu et al. 2024, arXiv 2310.02541.
    """
    test_x, test_y = data.test(test_samples)
    probes = torch.cat([test_x, data.means])
    surrogate = linear_surrogate(data.x, data.y, test_x).sign()
    record = TrainingRecord({"learning_rate": learning_rate, "gram": gram, "loss": "logistic"})
    train_outputs, test_outputs = [], []
    dense = net.weight.detach()
    path = descent(net, data.x, data.y, probes, learning_rate=learning_rate, steps=steps, gram=gram)
    for step, weights in enumerate(path):
        on_test, on_means = weights.on_probes().split([test_samples, 2], dim=1)
        train, test = net.signs @ weights.on_samples().relu(), net.signs @ on_test.relu()
        odd = net.signs @ on_test / 2
        cosines = on_means.abs() / (weights.square_norms().sqrt()[:, None] * data.means.norm(dim=1))
        record.log(
            step,
            loss=logistic(train, data.y),
            train_accuracy=_accuracy(train, data.y),
            clean_accuracy=_accuracy(train, data.clean),
            test_accuracy=_accuracy(test, test_y),
            odd_fraction=odd.double().square().sum() / test.double().square().sum(),
            surrogate_agreement=_accuracy(test, surrogate),
            alignment=torch.stack([cosines[net.signs > 0].mean(0), cosines[net.signs < 0].mean(0)]),
        )
        train_outputs.append(train)
        test_outputs.append(test)
        if step == steps:
            dense = weights.dense()
    return GrokRecord(record, torch.stack(train_outputs), torch.stack(test_outputs), net.with_weight(dense))


def _steps(
    weights: AbstractWeights, signs: Tensor, y: Tensor, learning_rate: float | int, steps: int, loss: Loss
) -> Iterator[AbstractWeights]:
    yield weights
    for _ in range(steps):
        on_samples = weights.on_samples()
        with torch.enable_grad():
            outputs = (signs @ on_samples.relu()).requires_grad_()
            (slope,) = torch.autograd.grad(loss(outputs, y), outputs)
        weights.add((on_samples > 0) * (-learning_rate * signs[:, None] * slope))
        yield weights


def _refuse_unfit(
    net: TwoLayerReLU, x: Tensor, y: Tensor, probes: Tensor, learning_rate: float | int, steps: int
) -> None:
    dimension = net.weight.shape[1]
    if x.shape[1] != dimension or probes.shape[1] != dimension or len(x) != len(y) or len(x) == 0:
        raise BadInput(
            f"the network takes {dimension} inputs and needs as many labels as samples, at least one; got samples "
            f"{list(x.shape)}, labels {list(y.shape)}, probes {list(probes.shape)}"
        )
    if x.dtype != net.weight.dtype:
        raise BadInput(f"the samples are {x.dtype}, the network {net.weight.dtype}: convert one of them")
    if not learning_rate > 0 or steps < 0:
        raise BadInput(f"learning_rate must be above 0 and steps at least 0, got {learning_rate} and {steps}")
    refuse_non_finite(x, "x")
    refuse_non_finite(y, "y")


def _accuracy(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs * labels > 0).double().mean()


def _clusters(samples: int, balanced: bool, generator: torch.Generator, device: torch.device) -> Tensor:
    if balanced:
        return (torch.randperm(samples, generator=generator) % 4).to(device)
    return torch.randint(4, (samples,), generator=generator).to(device)


def _labels(cluster: Tensor, means: Tensor) -> Tensor:
    return means.new_tensor(CLUSTER_LABELS)[cluster]


def _drawn(cluster: Tensor, means: Tensor, generator: torch.Generator) -> Tensor:
    x = torch.randn(len(cluster), means.shape[1], generator=generator, dtype=means.dtype).to(means.device)
    centres = torch.stack([means[0], -means[0], means[1], -means[1]])
    return x.add_(centres[cluster])
