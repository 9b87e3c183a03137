"""The study `local-linear-singular-values`: what skip connections do to the singular values that shape the loss."""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corollary.data import digits
from corollary.engine import adam, population, seeded
from corollary.evidence import Claim, Data, Figure, Parts, Source, Study, joined
from corollary.evidence.study import in_memory
from corollary.geometry.loss_quadratic import loss_quadratic
from corollary.geometry.perturbation import RIEDI, perturbation_bounds, residual_condition_bound, singular_value_path
from corollary.geometry.singular_values import condition_numbers, local_singular_values, numeric_rank
from corollary.studies.geometry.local_linear_pictures import bound_figure, depth_figure, of_run, trained_figure

EDELMAN = Source(
    key="edelman1988eigenvalues",
    authors=("Alan Edelman",),
    title="Eigenvalues and condition numbers of random matrices",
    year=1988,
    doi="10.1137/0609045",
    venue="SIAM Journal on Matrix Analysis and Applications",
)

RHOS = (0.0, 0.5, 1.0)
DEPTHS = (1, 2, 4, 8, 16)
SIGMAS = (0.1, 0.25, 0.4)
NEGATIVE_SLOPE = {"relu": 0.0, "leaky": 0.1, "abs": -1.0}
FACTS = {  # what is compared, and the largest violation or difference that rounding may make
    "P1 shift by rho": 1e-10,
    "P2 slopes": 1e-6,
    "P3 absolute value": 1e-10,
    "P4 leaky": 1e-10,
    "P5 relu": 1e-10,
    "P6 residual": 1e-10,
    "P7 dense": 1e-10,
}
SLOPE_STEP = 1e-7  # central differences are off by step^2 / gap^2 (gaps above 1e-4) and by rounding, 1e-16 / step
MIDDLE = 32
"""S5 compares the largest singular value with this one: half of the 64 directions."""


class SkipLayer(nn.Module):
    """z' = relu(W z + b) + rho z."""

    rho: Tensor

    def __init__(self, width: int, rho: float):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.register_buffer("rho", torch.tensor(rho))

    def forward(self, z: Tensor) -> Tensor:
        return F.relu(self.linear(z)) + self.rho * z


def skip_layers(width: int, rho: float, count: int) -> nn.Sequential:
    """That many layers of one width."""
    return nn.Sequential(*(SkipLayer(width, rho) for _ in range(count)))


def classifier(rho: float) -> nn.Sequential:
    """A linear layer, five hidden layers of width 64, and a readout of ten classes."""
    parts = {"first": nn.Linear(64, 64), "hidden": skip_layers(64, rho, 5), "readout": nn.Linear(64, 10)}
    return nn.Sequential(OrderedDict(parts))


@dataclass(frozen=True)
class LocalLinearSingularValues(Study):
    """Singular values of local linear maps with and without skip connections, at random and trained on digits."""

    epochs: int = 20
    """Epochs of training in S5; train losses are compared after 5."""
    points: int = 50
    """Test samples at which the trained networks' local maps are decomposed."""

    slug: ClassVar[str] = "local-linear-singular-values"
    room: ClassVar[str] = "geometry"
    title: ClassVar[str] = "Why skip connections make the loss better conditioned"
    sources: ClassVar[tuple[Source, ...]] = (RIEDI, EDELMAN)

    def run(self, parts: Parts = in_memory) -> Data:
        """Random composites by depth, the exact quadratic, the perturbation facts, random layers, trained networks."""
        by_rho = [parts(f"depth rho {rho:g}", lambda r=rho: self._depth(r)) for rho in RHOS]
        random = [parts(f"residual {name}", lambda n=name: self._residual(n)) for name in NEGATIVE_SLOPE]
        trained = parts("trained networks", self._trained)
        return {
            "depth": joined(by_rho),
            "quadratic": parts("loss quadratic", self._quadratic),
            "facts": parts("perturbation facts", self._facts),
            "residual_layers": joined(random),
            "plain_layers": parts("plain layers", self._plain),
            "gaussian": parts("gaussian matrices", self._gaussian),
            "trained": {name: trained[name] for name in ("rho", "seed", "ratio", "rank")},
            "spectra": {name: trained[f"spectrum_{name}"] for name in ("rho", "seed", "index", "value")},
            "training": {name: trained[f"training_{name}"] for name in ("rho", "seed", "epoch", "train_loss")},
        }

    def claims(self, data: Data) -> tuple[Claim, ...]:
        """S1 to S5 of the specification, from the stored tables alone."""
        return (self._s1(data), self._s2(data), self._s3(data), self._s4(data), self._s5(data))

    def figures(self, data: Data) -> tuple[Figure, ...]:
        """Condition numbers by depth, residual layers against their bound, and trained spectra."""
        return depth_figure(data), bound_figure(data), trained_figure(data)

    # ---------------------------------------------------------------------------------------------- measuring

    def _depth(self, rho: float) -> dict[str, Any]:
        draws, n = self.pick(smoke=4, desk=20, paper=200), 64
        generator = self.seeds("composites")  # the same weights and inputs for every rho
        spread = 0.5 / math.sqrt(n) * math.sqrt(3)  # uniform on [-spread, spread] has standard deviation 0.5 / sqrt n
        weights = spread * (2 * torch.rand(draws, max(DEPTHS), n, n, generator=generator, dtype=torch.float64) - 1)
        z = torch.randn(draws, n, generator=generator, dtype=torch.float64)
        identity = torch.eye(n, dtype=torch.float64)
        M, found = identity.expand(draws, n, n), []
        for p in range(1, max(DEPTHS) + 1):
            W = weights[:, p - 1]
            layer = _slopes(W, z, 0.1)[:, :, None] * W + rho * identity
            M, z = layer @ M, torch.einsum("kij,kj->ki", layer, z)
            if p in DEPTHS:
                found.append(condition_numbers(torch.linalg.svdvals(M), tol=0.0).log10())
        return {
            "rho": np.full(draws * len(DEPTHS), rho),
            "layers": np.repeat(DEPTHS, draws),
            "draw": np.tile(np.arange(draws), len(DEPTHS)),
            "log10_condition": torch.cat(found),
        }

    def _quadratic(self) -> dict[str, Any]:
        rows = []
        for draw in range(self.pick(smoke=1, desk=5, paper=20)):
            seeds = self.seeds.child(f"quadratic {draw}")
            net = seeded(skip_layers, seeds.integer("network"), 8, 1.0, 3).double().requires_grad_(False)
            x, y = torch.randn(2, 5, 8, generator=seeds("batch"), dtype=torch.float64)
            rows += [_quadratic_errors(net, f"{layer}.linear", x, y) for layer in range(3)]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _facts(self) -> dict[str, Any]:
        draws = self.pick(smoke=10, desk=200, paper=2000)
        worst = _fact_errors(64, draws, self.seeds("perturbation"))
        return {"fact": list(FACTS), "worst": [worst[name] for name in FACTS], "draws": [draws] * len(FACTS)}

    def _residual(self, activation: str) -> dict[str, Any]:
        draws, n = self.pick(smoke=10, desk=100, paper=1000), 128
        generator, identity = self.seeds(f"residual {activation}"), torch.eye(n, dtype=torch.float64)
        found = []
        for sigma in SIGMAS:
            DW = _random_layer(draws, n, sigma, NEGATIVE_SLOPE[activation], generator)
            found.append(condition_numbers(torch.linalg.svdvals(DW + identity)))
        return {
            "activation": np.repeat(activation, draws * len(SIGMAS)),
            "sigma": np.repeat(SIGMAS, draws),
            "condition": torch.cat(found),
        }

    def _plain(self) -> dict[str, Any]:
        draws = self.pick(smoke=10, desk=100, paper=1000)
        DW = _random_layer(draws, 128, 1.0, 0.1, self.seeds("plain"))
        return {"condition": condition_numbers(torch.linalg.svdvals(DW), tol=0.0)}

    def _gaussian(self) -> dict[str, Any]:
        draws = self.pick(smoke=30, desk=300, paper=3000)
        W = torch.randn(draws, 100, 100, generator=self.seeds("gaussian"), dtype=torch.float64)
        return {"log_condition": condition_numbers(torch.linalg.svdvals(W), tol=0.0).log()}

    def _trained(self) -> dict[str, Any]:
        data = digits()
        assert data.train.y is not None and data.test is not None  # noqa: PT018  # digits are labelled and split
        epochs, count = self.pick(smoke=6, desk=self.epochs, paper=self.epochs), self.pick(smoke=1, desk=3, paper=10)
        seeds = [self.seeds.integer(f"network {i}") for i in range(count)]
        pairs = [(rho, i) for rho in (0.0, 1.0) for i in range(count)]
        per_epoch = -(-len(data.train.x) // 64)
        trained = population(
            [seeded(classifier, seeds[i], rho) for rho, i in pairs],
            (data.train.x, data.train.y),
            seeds=[seeds[i] for _, i in pairs],  # a pair has the same initial weights and the same batches
            optimizer=adam(),
            learning_rate=1e-3,
            batch_size=64,
            epochs=epochs,
            measure_train=True,
            record_every=per_epoch,
        )
        losses = trained.record["train_loss"].T  # [members, measurements]
        steps = np.asarray(trained.record.steps)
        spectra = [self._spectrum(trained.member(k), data.test.x) for k in range(len(pairs))]
        rhos, which = np.array([rho for rho, _ in pairs]), np.array([i for _, i in pairs])
        points, index = len(spectra[0]), np.arange(1, spectra[0].shape[1] + 1)
        relative = [(s / s[:, :1]).median(dim=0).values for s in spectra]
        return {
            "rho": np.repeat(rhos, points),
            "seed": np.repeat(which, points),
            "ratio": torch.cat([s[:, 0] / s[:, MIDDLE - 1] for s in spectra]),
            "rank": torch.cat([numeric_rank(s) for s in spectra]),
            "spectrum_rho": np.repeat(rhos, len(index)),
            "spectrum_seed": np.repeat(which, len(index)),
            "spectrum_index": np.tile(index, len(pairs)),
            "spectrum_value": torch.cat(relative),
            "training_rho": np.repeat(rhos, len(steps)),
            "training_seed": np.repeat(which, len(steps)),
            "training_epoch": np.tile(steps / per_epoch, len(pairs)),
            "training_train_loss": losses.reshape(-1),
        }

    def _spectrum(self, net: nn.Module, x: Tensor) -> Tensor:
        return local_singular_values(net, x[: self.points], at="first", to="hidden")

    # ------------------------------------------------------------------------------------------------ judging

    def _s1(self, data: Data) -> Claim:
        table = data["depth"]
        rho, layers, value = (np.asarray(table[name]) for name in ("rho", "layers", "log10_condition"))
        median = {(r, p): float(np.median(value[(rho == r) & (layers == p)])) for r in RHOS for p in DEPTHS}
        plain, half, full = (median[r, 8] for r in RHOS)
        ordered = all(median[1.0, p] < median[0.5, p] < median[0.0, p] for p in DEPTHS)
        return self.claim(
            "S1",
            "With depth, skip connections keep the condition number of the composite map small.",
            kind="threshold",
            criterion="median log10 condition number of 8 random leaky layers (width 64): rho = 1 at most 2.0, "
            "rho = 0.5 in [2.5, 5], rho = 0 at least 12; and rho = 1 < 0.5 < 0 at every depth 1, 2, 4, 8, 16",
            measured=f"{full:.2f}, {half:.2f}, {plain:.2f}; {'ordered' if ordered else 'not ordered'} at every depth",
            holds=full <= 2.0 and 2.5 <= half <= 5 and plain >= 12 and ordered,
            note="Computed in float64, where condition numbers saturate near 10^16: the plain value is a lower bound.",
        )

    def _s2(self, data: Data) -> Claim:
        table = data["quadratic"]
        hessian, inside = float(np.max(table["hessian_error"])), float(np.max(table["inside"]))
        outside = float(np.min(table["outside"]))
        return self.claim(
            "S2",
            "Inside a region the squared loss is exactly quadratic in a layer's weights, with the Hessian by formula.",
            kind="exact",
            criterion="largest difference to the automatic Hessian at most 1e-10, and of loss and quadratic up to the "
            "radius at most 1e-10; more than 1e-8 at 10 times the radius across a planted switch",
            measured=f"{hessian:.1e}; {inside:.1e} inside; at least {outside:.1e} beyond",
            holds=hessian <= 1e-10 and inside <= 1e-10 and outside > 1e-8,
        )

    def _s3(self, data: Data) -> Claim:
        worst = dict(zip(data["facts"]["fact"], np.asarray(data["facts"]["worst"]).tolist(), strict=True))
        return self.claim(
            "S3",
            "Adding a multiple of the identity and scaling rows move singular values within the stated bounds.",
            kind="exact",
            criterion="64 x 64, random W, D and rho: no bound of P1, P4, P5, P6 violated by more than 1e-10; P3 and P7 "
            "equal to 1e-10; slopes P2 within 1e-6 of central differences",
            measured="; ".join(f"{name}: {worst[name]:.1e}" for name in FACTS) + f"; {data['facts']['draws'][0]} draws",
            holds=all(worst[name] <= allowed for name, allowed in FACTS.items()),
        )

    def _s4(self, data: Data) -> Claim:
        table = data["residual_layers"]
        sigma, condition = np.asarray(table["sigma"]), np.asarray(table["condition"])
        below = condition <= 1.05 * (1 + 2 * sigma) / (1 - 2 * sigma)
        groups = [(np.asarray(table["activation"]) == name) & (sigma == s) for name in NEGATIVE_SLOPE for s in SIGMAS]
        share = min(float(below[group].mean()) for group in groups)
        plain = float(np.median(np.asarray(data["plain_layers"]["condition"])))
        excess = float(np.mean(np.asarray(data["gaussian"]["log_condition"]))) - math.log(100)
        return self.claim(
            "S4",
            "Random residual layers have condition number at most (1 + 2 sigma) / (1 - 2 sigma); plain ones do not.",
            kind="threshold",
            criterion="width 128, sigma 0.1, 0.25, 0.4, ReLU, leaky, absolute value: at least 99 % of draws below 1.05 "
            "times the bound for each; median of plain leaky layers at least 200; mean log condition of a Gaussian "
            "matrix less log n within 1.537 +- 0.25 (n = 100)",
            measured=f"at least {share:.1%} below; plain median {plain:.0f}; {excess:.3f}",
            holds=share >= 0.99 and plain >= 200 and abs(excess - 1.537) <= 0.25,
        )

    def _s5(self, data: Data) -> Claim:
        table, training = data["trained"], data["training"]
        seeds = sorted(set(np.asarray(table["seed"]).tolist()))
        ratio = {(r, i): float(np.median(of_run(table, "ratio", r, i))) for r in (0.0, 1.0) for i in seeds}
        loss = {
            (r, i): float(of_run(training, "train_loss", r, i)[of_run(training, "epoch", r, i) == 5][0])
            for r in (0.0, 1.0)
            for i in seeds
        }
        lowest = min(int(of_run(table, "rank", 1.0, i).min()) for i in seeds)
        highest = max(int(of_run(table, "rank", 0.0, i).max()) for i in seeds)
        worse = min(ratio[0.0, i] / ratio[1.0, i] for i in seeds)
        largest = max(ratio[1.0, i] for i in seeds)
        faster = max(loss[1.0, i] / loss[0.0, i] for i in seeds)
        return self.claim(
            "S5",
            "On data, a trained plain network is far worse conditioned than the same network with skips, and slower.",
            kind="threshold",
            criterion="digits, every seed: median s_1/s_32 of the plain network at least 50 times the residual one's, "
            "which is at most 100; numeric rank (1e-12) 64 with skips and at most 48 without, at every point; train "
            "loss after 5 epochs with skips at most half of that without",
            measured=f"s_1/s_32 at least {worse:.1e} times as large; residual at most {largest:.1f}; rank at least "
            f"{lowest} with skips, at most {highest} without; loss ratio at most {faster:.2f} ({len(seeds)} seeds)",
            holds=worse >= 50 and largest <= 100 and lowest == 64 and highest <= 48 and faster <= 0.5,
            controls=tuple(
                f"seed {i}: s_1/s_32 plain {ratio[0.0, i]:.1e}, residual {ratio[1.0, i]:.1f}; "
                f"train loss {loss[0.0, i]:.3f}, {loss[1.0, i]:.3f}"
                for i in seeds
            ),
            note="The paper trains convolutional networks on CIFAR.",
        )


# ------------------------------------------------------------------------------------------------ random matrices


def _slopes(W: Tensor, z: Tensor, negative: float) -> Tensor:
    return torch.where(torch.einsum("kij,kj->ki", W, z) > 0, 1.0, negative).to(W)


def _random_layer(draws: int, n: int, sigma: float, negative: float, generator: torch.Generator) -> Tensor:
    """D W for Gaussian weights of standard deviation sigma / sqrt(n), with the slopes at a Gaussian input."""
    W = sigma / math.sqrt(n) * torch.randn(draws, n, n, generator=generator, dtype=torch.float64)
    z = torch.randn(draws, n, generator=generator, dtype=torch.float64)
    return _slopes(W, z, negative)[:, :, None] * W


def _fact_errors(n: int, draws: int, generator: torch.Generator) -> dict[str, float]:
    """The largest violation of, or difference from, each perturbation fact; negative where nothing comes near."""
    W = torch.randn(draws, n, n, generator=generator, dtype=torch.float64) / math.sqrt(n)
    signs = torch.rand(draws, n, generator=generator, dtype=torch.float64) < 0.5
    rho = 2 * torch.rand(draws, generator=generator, dtype=torch.float64) - 1
    identity = torch.eye(n, dtype=torch.float64)
    D = {name: torch.where(signs, 1.0, negative).to(W) for name, negative in NEGATIVE_SLOPE.items()}
    s = torch.linalg.svdvals(W)

    def outside(values: Tensor, bounds: tuple[Tensor, Tensor]) -> float:
        return float(torch.maximum(bounds[0] - values, values - bounds[1]).max())

    def scaled(name: str) -> Tensor:
        return D[name][:, :, None] * W

    shifted = torch.linalg.svdvals(W + rho[:, None, None] * identity)
    relu = torch.linalg.svdvals(scaled("relu"))
    dead = (~signs).sum(1, keepdim=True)
    vanishing = torch.where(torch.arange(n) >= n - dead, relu, 0.0).max()
    # P6 needs a branch of norm q below 1; its condition number is compared as well.
    branch = scaled("leaky") / torch.linalg.matrix_norm(scaled("leaky"), 2)[:, None, None] * rho.abs()[:, None, None]
    q, block = rho.abs(), torch.linalg.svdvals(branch + identity)
    condition = block[:, 0] / block[:, -1] / residual_condition_bound(q) - 1
    dense = torch.linalg.svdvals(torch.cat([scaled("leaky"), identity.expand(draws, n, n)], dim=1))
    within = torch.sqrt(1 + torch.linalg.svdvals(scaled("leaky")) ** 2)
    return {
        "P1 shift by rho": float(((shifted - s).abs() - rho.abs()[:, None]).max()),
        "P2 slopes": _slope_error(W, D["leaky"], rho),
        "P3 absolute value": float((torch.linalg.svdvals(scaled("abs")) - s).abs().max()),
        "P4 leaky": outside(torch.linalg.svdvals(scaled("leaky")), perturbation_bounds(W, 0.0, D["leaky"], "plain")),
        "P5 relu": max(outside(relu, perturbation_bounds(W, 0.0, D["relu"], "plain")), float(vanishing)),
        "P6 residual": max(outside(block, (1 - q[:, None], 1 + q[:, None])), float(condition.max())),
        "P7 dense": float((dense - within).abs().max()),
    }


def _slope_error(W: Tensor, D: Tensor, rho: Tensor) -> float:
    """Largest difference of u'v and a central difference over the draws, each at its own rho."""
    scaled = D[:, :, None] * W + rho[:, None, None] * torch.eye(W.shape[-1], dtype=W.dtype)
    path = singular_value_path(scaled, torch.tensor([-SLOPE_STEP, 0.0, SLOPE_STEP], dtype=W.dtype))
    differences = (path.values[:, 2] - path.values[:, 0]) / (2 * SLOPE_STEP)
    return float((differences - path.slopes[:, 1]).abs().nan_to_num(0.0).max())


def _quadratic_errors(net: nn.Module, layer: str, x: Tensor, y: Tensor) -> dict[str, float]:
    found = loss_quadratic(net, layer, x, y)
    W = found.weight

    def loss(weight: Tensor) -> Tensor:
        outputs = torch.func.functional_call(net, {f"{layer}.weight": weight}, (x,))
        return (outputs - y).square().sum() / len(x)

    H, gradient, size = found.hessian(), torch.func.grad(loss)(W).flatten(), W.numel()
    automatic = torch.autograd.functional.hessian(loss, W).reshape(size, size)
    # Planted: moves the first unit of the first sample through zero at step 1 at the latest.
    z = found.layer_input[0]
    V = torch.zeros_like(W)
    V[0] = -net.get_submodule(layer)(z)[0] * z / z.square().sum()
    radius = found.radius(V)

    def difference(step: Tensor) -> float:
        flat = step.flatten()
        return float((loss(W) + gradient @ flat + flat @ H @ flat / 2 - loss(W + step)).abs())

    return {
        "hessian_error": float((H - automatic).abs().max()),
        "radius": radius,
        "inside": max(difference(t * radius * V) for t in (0.25, 0.5, 1 - 1e-9)),
        "outside": difference(10 * radius * V),
    }
