"""The study `lipsdp-groupsort`: Lipschitz bounds by semidefinite programs for activations that sort or reflect."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from corollary.data import digits
from corollary.engine import adam, population
from corollary.evidence import PALETTE, Claim, Data, Figure, Parts, Source, Study
from corollary.evidence.study import in_memory
from corollary.verify.lipschitz.bound import FAZLYAB, PAULI, lipschitz_bound
from corollary.verify.lipschitz.lower import lipschitz_enumerate, lipschitz_lower
from corollary.verify.lipschitz.reading import system_of
from corollary.verify.sorting import GroupSort, Householder, MaxMin

TRAINED = ((64, 16, 10), (64, 16, 16, 10), (64, 16, 16, 16, 16, 10))
DEEP = tuple((64, *(width,) * depth, 10) for depth, width in ((7, 16), (7, 64), (17, 32), (17, 128)))
"""Depths and widths of the paper's larger networks; on digits, because its MNIST weights are not public."""
RANDOM = ((10, 16, 5), (10, 16, 16, 5), (8, 12, 12, 12, 4))
ALONE: tuple[tuple[str, Any], ...] = (
    ("MaxMin", "eliminate"),
    ("MaxMin", "residual-relu"),
    ("GroupSort(4)", "eliminate"),
    ("Householder", "eliminate"),
)
METHODS: tuple[Any, ...] = ("eliminate", "chain", "residual-relu", "product")
BATCH = 100
OUTPUT = 8
"""The output whose l-infinity bound is taken, as in the paper's table."""
LABELS = {
    "sample": "largest slope found",
    "eliminate": "eliminate",
    "group": "group",
    "chain": "chain",
    "residual-relu": "residual-relu",
    "product": "product of norms",
}


@dataclass(frozen=True)
class LipsdpGroupsort(Study):
    """Which Lipschitz bounds the constraints of GroupSort, MaxMin and Householder give, and how tight they are."""

    seeds_trained: int = 3
    """Networks trained on digits, of each architecture."""
    seeds_random: int = 5
    """Networks of Gaussian weights, of each architecture."""

    slug: ClassVar[str] = "lipsdp-groupsort"
    room: ClassVar[str] = "verify"
    title: ClassVar[str] = "Lipschitz bounds for activations that sort"
    sources: ClassVar[tuple[Source, ...]] = (PAULI, FAZLYAB)

    def run(self, parts: Parts = in_memory) -> Data:
        """Bound single activations, trained networks and random ones; enumerate the smallest, attack the trained."""
        trained = self.pick(smoke=1, desk=self.seeds_trained, paper=self.seeds_trained)
        drawn = self.pick(smoke=1, desk=self.seeds_random, paper=self.seeds_random)
        architectures = self.pick(smoke=TRAINED[:1], desk=TRAINED, paper=TRAINED + DEEP)
        nets = {s: parts(f"trained {_name(s)}", lambda s=s: self._train(s, trained)) for s in architectures}
        digits_rows = [
            parts(f"bounds {_name(sizes)} {seed}", lambda s=sizes, i=seed: self._trained(s, i, nets[s]))
            for sizes in architectures
            for seed in range(trained)
        ]
        random_rows = [
            parts(f"random {_name(sizes)} {seed}", lambda s=sizes, i=seed: self._random(s, i))
            for sizes in self.pick(smoke=RANDOM[:1], desk=RANDOM, paper=RANDOM)
            for seed in range(drawn)
        ]
        return {"alone": parts("alone", self._alone), "trained": _table(digits_rows), "random": _table(random_rows)}

    def claims(self, data: Data) -> tuple[Claim, ...]:
        """L1 to L5 of the specification, from the stored tables alone."""
        return (
            self._one_pair(data),
            self._order(data),
            self._equalities(data),
            self._nearly_exact(data),
            self._largest_entry(data),
        )

    def figures(self, data: Data) -> tuple[Figure, ...]:
        """The bounds of the trained networks by depth, and those of the random ones against the largest pattern."""
        return (
            Figure(
                "lipschitz-by-depth",
                "Lipschitz bounds of MaxMin networks on digits",
                "Each mark is a network: the largest slope found by sampling (the true constant lies above it) and "
                "certified upper bounds, by number of hidden layers. What the activation keeps, put in exactly "
                "(eliminate), stays nearest to what is found; with two ReLUs for each pair nothing is gained on the "
                "product of norms.",
                {name: np.asarray(data["trained"][name]) for name in ("hidden", "sample", *METHODS)},
                _draw_depth,
            ),
            Figure(
                "lipschitz-random",
                "Bounds of random networks by method",
                "Each bound by that of exact elimination, for Gaussian weights. Free multipliers of what is kept give "
                "the same (group); leaving the layers uncoupled (chain) costs up to a half.",
                {
                    name: np.asarray(data["random"][name])
                    for name in ("architecture", "eliminate", "group", *METHODS[1:])
                },
                _draw_random,
            ),
        )

    def _alone(self) -> dict[str, Any]:
        direction = torch.randn(3, generator=self.seeds("direction"), dtype=torch.float64)
        layers = {
            "MaxMin": (MaxMin(), 2),
            "GroupSort(4)": (GroupSort(4), 4),
            "Householder": (Householder(direction), 3),
        }
        bounds = []
        for name, method in ALONE:
            layer, width = layers[name]
            bounds.append(lipschitz_bound(_around(layer, width), method=method, tolerance=1e-8).value)
        return {"layer": [name for name, _ in ALONE], "method": [method for _, method in ALONE], "bound": bounds}

    def _train(self, sizes: Sequence[int], count: int) -> dict[str, Any]:
        """Weights of MaxMin classifiers of digits, [seed, ...] by parameter, and their test accuracies."""
        data = digits()
        assert data.test is not None
        assert data.train.y is not None
        assert data.test.y is not None
        trained = population(
            lambda: _network(sizes),
            (data.train.x, data.train.y),
            size=count,
            seeds=list(range(count)),
            optimizer=adam(),
            learning_rate=1e-2,
            batch_size=BATCH,
            epochs=self.pick(smoke=2, desk=30, paper=30),
        )
        scores = trained.evaluate((data.test.x, data.test.y))
        weights = {name: value.detach().numpy() for name, value in trained.params.items()}
        return {**weights, "accuracy": scores["accuracy"].numpy()}

    def _trained(self, sizes: Sequence[int], seed: int, weights: Mapping[str, Any]) -> dict[str, Any]:
        """All bounds of one trained network, and for one output the l-infinity bound with attacks on it."""
        net = _network(sizes).double()
        net.load_state_dict({name: torch.from_numpy(weights[name][seed]) for name in net.state_dict()})
        system = system_of(net)
        generator = self.seeds(f"slopes {_name(sizes)} {seed}")
        samples = self.pick(smoke=500, desk=20_000, paper=200_000)
        bounds = {method: lipschitz_bound(system, method=method) for method in METHODS}
        of_output = lipschitz_bound(system, "linf", output=OUTPUT)
        return {
            "architecture": _name(sizes),
            "hidden": len(sizes) - 2,
            "seed": seed,
            "accuracy": float(weights["accuracy"][seed]),
            "sample": lipschitz_lower(net, samples=samples, generator=generator),
            **{method: bound.value for method, bound in bounds.items()},
            "margin": bounds["eliminate"].lmi_min_eig,
            "linf": of_output.value,
            "linf_product": lipschitz_bound(system, "linf", "product", output=OUTPUT).value,
            "linf_pairs": self._pairs(net, generator),
            "linf_attacked": self._attacked(net, generator),
        }

    def _pairs(self, net: nn.Module, generator: torch.Generator) -> float:
        """The largest slope |f(x) - f(y)| / ||x - y|| in the largest entry, over pairs near and far."""
        count = self.pick(smoke=2000, desk=100_000, paper=100_000)
        x = 2 * torch.rand(count, 64, generator=generator, dtype=torch.float64) - 0.5
        steps = (2 * torch.rand(count, 64, generator=generator, dtype=torch.float64) - 1).sign()
        steps = steps * 10 ** (4 * torch.rand(count, 1, generator=generator, dtype=torch.float64) - 3)
        with torch.no_grad():
            return float(((net(x + steps) - net(x))[:, OUTPUT].abs() / steps.abs().amax(1)).max())

    def _attacked(self, net: nn.Module, generator: torch.Generator) -> float:
        """The same slope after projected sign-gradient ascent of f(x + d) - f(x), the largest entry of d held at r."""
        count, steps = self.pick(smoke=(50, 5), desk=(1000, 50), paper=(1000, 50))
        x = digits(torch.float64).train.x[:count]
        radius = 10 ** (3 * torch.rand(count, 1, generator=generator, dtype=torch.float64) - 2)
        moved = x + radius * (2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1)
        with torch.no_grad():
            before = net(x)[:, OUTPUT]
        for _ in range(steps):
            moved.requires_grad_()
            (gradient,) = torch.autograd.grad(net(moved)[:, OUTPUT].sum(), moved)
            moved = (moved.detach() + radius / 4 * gradient.sign()).clamp(x - radius, x + radius)
        with torch.no_grad():
            return float(((net(moved)[:, OUTPUT] - before).abs() / (moved - x).abs().amax(1)).max())

    def _random(self, sizes: Sequence[int], seed: int) -> dict[str, Any]:
        """All bounds of a network of Gaussian weights; its largest pattern, where there are few."""
        generator = self.seeds(f"weights {_name(sizes)} {seed}")
        net = _network(sizes).double()
        for layer in net:
            if isinstance(layer, nn.Linear):
                weight = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
                layer.load_state_dict({"weight": weight / layer.in_features**0.5, "bias": torch.zeros_like(layer.bias)})
        system = system_of(net)
        methods = (*METHODS, "group")
        bounds = {method: lipschitz_bound(system, method=method).value for method in methods}
        exact = lipschitz_enumerate(system) if len(sizes) == 3 else float("nan")
        return {"architecture": _name(sizes), "seed": seed, **bounds, "enumerate": exact}

    def _one_pair(self, data: Data) -> Claim:
        table = data["alone"]
        found = dict(zip(zip(table["layer"], table["method"], strict=True), map(float, table["bound"]), strict=True))
        wanted = {key: (2**0.5, 1e-5) if key[1] == "residual-relu" else (1.0, 1e-6) for key in ALONE}
        return self.claim(
            "L1",
            "The new constraints certify that an activation that sorts or reflects groups is 1-Lipschitz; written with "
            "two ReLUs, MaxMin gets sqrt(2).",
            kind="exact",
            criterion="one group, W = I: MaxMin, GroupSort(4), Householder of a random direction 1 +- 1e-6; MaxMin as "
            "two ReLUs 1.414214 +- 1e-5",
            measured="; ".join(f"{layer} ({method}) {bound:.8f}" for (layer, method), bound in found.items()),
            holds=all(abs(found[key] - value) <= slack for key, (value, slack) in wanted.items()),
        )

    def _order(self, data: Data) -> Claim:
        table = {name: np.asarray(column) for name, column in data["trained"].items()}
        share, hidden = table["eliminate"] / table["product"], table["hidden"]
        sound = bool((table["sample"] <= table["eliminate"] * (1 + 1e-5)).all())
        tighter = bool((table["eliminate"] < table["residual-relu"]).all())
        largest = {depth: float(share[hidden == depth].max()) for depth in np.unique(hidden).tolist()}
        return self.claim(
            "L2",
            "On MaxMin networks the new bound lies between the largest slope found and the encoding with two ReLUs, "
            "and far below the product of norms in depth.",
            kind="threshold",
            criterion="sample <= eliminate (1e-5 relative) and eliminate < residual-relu in every net; "
            "eliminate/product <= 0.95 for 2 hidden layers, <= 0.9 for 4",
            measured=f"sample <= eliminate in {'all' if sound else 'not all'}, eliminate < residual-relu in "
            f"{'all' if tighter else 'not all'} of {len(share)} nets; largest eliminate/product "
            + ", ".join(f"{value:.3f} for {depth} hidden" for depth, value in largest.items())
            + f"; sample/eliminate {float((table['sample'] / table['eliminate']).min()):.3f} to "
            f"{float((table['sample'] / table['eliminate']).max()):.3f}",
            holds=sound and tighter and largest.get(2, 0.0) <= 0.95 and largest.get(4, 0.0) <= 0.9,
            controls=(
                f"residual-relu/product: {float((table['residual-relu'] / table['product']).min()):.3f} to "
                f"{float((table['residual-relu'] / table['product']).max()):.3f}",
                f"test accuracy: {float(table['accuracy'].min()):.3f} to {float(table['accuracy'].max()):.3f}",
            ),
        )

    def _equalities(self, data: Data) -> Claim:
        table = data["random"]
        ours, free, chain = (np.asarray(table[name]) for name in ("eliminate", "group", "chain"))
        apart, ratio = np.abs(free / ours - 1), chain / ours
        return self.claim(
            "L3",
            "On random weights the multipliers of what is kept matter: without them (chain) the bound is worse. The "
            "paper saw no loss in its tests.",
            kind="threshold",
            criterion="Gaussian nets: eliminate and group agree to 1e-3 relative; mean chain/eliminate >= 1.08",
            measured=f"largest difference {float(apart.max()):.1e}; mean chain/eliminate {float(ratio.mean()):.3f} "
            f"({float(ratio.min()):.3f} to {float(ratio.max()):.3f}) over {len(ratio)} nets",
            holds=bool((apart <= 1e-3).all()) and float(ratio.mean()) >= 1.08,
        )

    def _nearly_exact(self, data: Data) -> Claim:
        table = {name: np.asarray(column) for name, column in data["random"].items()}
        small = np.isfinite(table["enumerate"])
        ratio = table["eliminate"][small] / table["enumerate"][small]
        controls = {name: table[name][small] / table["enumerate"][small] for name in ("residual-relu", "product")}
        return self.claim(
            "L4",
            "For one hidden layer the bound is (nearly) the Lipschitz constant.",
            kind="threshold",
            criterion="Gaussian nets (10, 16, 5): eliminate / largest of 256 patterns in [1 - 1e-6, 1.05] on every "
            "seed",
            measured=", ".join(f"{value:.4f}" for value in ratio),
            holds=bool(((ratio >= 1 - 1e-6) & (ratio <= 1.05)).all()),
            controls=tuple(
                f"{name}: {float(values.min()):.3f} to {float(values.max()):.3f}" for name, values in controls.items()
            ),
        )

    def _largest_entry(self, data: Data) -> Claim:
        table = {name: np.asarray(column) for name, column in data["trained"].items()}
        found = np.maximum(table["linf_pairs"], table["linf_attacked"])
        share = table["linf"] / table["linf_product"]
        return self.claim(
            "L5",
            "The l-infinity bound of one output holds, and is below the product of norms.",
            kind="exact",
            criterion="nets of L2, output 8: |f(x) - f(y)| <= value ||x - y|| in the largest entry for 1e5 pairs and "
            "for pairs found by projected gradient ascent; value < product",
            measured=f"largest slope found {float((found / table['linf']).max()):.3f} of the bound, in "
            f"{int((found > table['linf']).sum())} of {len(found)} nets above it; value/product "
            f"{float(share.min()):.2g} to {float(share.max()):.2g}",
            holds=bool((found <= table["linf"]).all() and (share < 1).all()),
        )


def _name(sizes: Sequence[int]) -> str:
    return "-".join(map(str, sizes))


def _network(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers with MaxMin between them."""
    layers: list[nn.Module] = []
    for width, after in itertools.pairwise(sizes):
        layers += [nn.Linear(width, after), MaxMin()]
    return nn.Sequential(*layers[:-1])


def _around(layer: nn.Module, width: int) -> nn.Sequential:
    """The layer between two identities."""
    ends = [nn.Linear(width, width, bias=False, dtype=torch.float64) for _ in range(2)]
    for end in ends:
        end.load_state_dict({"weight": torch.eye(width, dtype=torch.float64)})
    return nn.Sequential(ends[0], layer, ends[1])


def _table(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _draw_depth(axes: Any, data: Mapping[str, Any]) -> None:
    hidden = np.asarray(data["hidden"], dtype=float)
    names = ("sample", *METHODS)
    for i, (name, colour) in enumerate(zip(names, (PALETTE[6], *PALETTE), strict=False)):
        marker = "x" if name == "sample" else "o"
        axes.plot(hidden + 0.08 * (i - 2), data[name], marker, color=colour, label=LABELS[name], alpha=0.85)
    axes.set(yscale="log", xlabel="hidden layers", ylabel="l2 Lipschitz constant", xticks=np.unique(hidden))
    low, high = min(data["sample"]) / 1.3, 1.3 * max(np.max(data[name]) for name in METHODS)
    ticks = [step * 10**power for power in range(1, 6) for step in (1, 2, 5) if low <= step * 10**power <= high]
    axes.set_ylim(low, high)
    axes.minorticks_off()
    axes.set_yticks(ticks, [str(value) for value in ticks])
    axes.legend(loc="upper left")


def _draw_random(axes: Any, data: Mapping[str, Any]) -> None:
    names = list(dict.fromkeys(np.asarray(data["architecture"]).tolist()))
    place = np.array([names.index(name) for name in np.asarray(data["architecture"]).tolist()])
    for i, name in enumerate(("group", *METHODS[1:])):
        ratio = np.asarray(data[name]) / np.asarray(data["eliminate"])
        axes.plot(place + 0.12 * (i - 1.5), ratio, "o", color=PALETTE[i], label=LABELS[name], alpha=0.85)
    axes.axhline(1.0, linestyle="--", color=PALETTE[6])
    axes.set(yscale="log", ylabel="bound / bound by elimination", xlabel="layer sizes")
    axes.set_xticks(range(len(names)), names)
    axes.minorticks_off()
    axes.set_yticks([1, 1.5, 2, 3], ["1", "1.5", "2", "3"])
    axes.legend(loc="upper left")
