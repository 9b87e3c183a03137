"""The study `utility-duality`: networks rank outputs well, give poor probabilities, and can be given better ones."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from corollary.dynamics.decisions import decision_report, ordinal_agreement, reliability
from corollary.dynamics.preferences import preference_decomposition, tabular_utilities, telescoping_frequency
from corollary.dynamics.utility import HUANG_2023, UtilityModel, Warp, nucleus
from corollary.dynamics.utility_probability import (
    GUO_2017,
    MCFADDEN_1974,
    TRANSFORMS,
    Fitted,
    Transform,
    fit_utility_probability,
)
from corollary.engine import cross_entropy, fit, seeded
from corollary.evidence import Claim, Data, Figure, Parts, Source, Study, listed
from corollary.evidence.study import in_memory
from corollary.studies.dynamics import utility_duality_pictures as pictures
from corollary.studies.dynamics.utility_duality_networks import (
    END,
    VOCABULARY,
    Chain,
    NextToken,
    Pairs,
    Translator,
    noisy_digits,
    perceptron,
    teacher_forced,
    token_loss,
    translations,
    zipf_grammar,
)

BEAM = 10
NOISE = 0.1
MAPS: dict[str, Warp] = {
    "0.3 u": lambda u: 0.3 * u,
    "u": lambda u: u,
    "3 u": lambda u: 3 * u,
    "u + u^3 / 10": lambda u: u + u**3 / 10,
}
"""Strictly increasing maps of utilities; the first three by their factors in `FACTORS`."""
FACTORS = {"0.3 u": 0.3, "u": 1.0, "3 u": 3.0}
LAW, RATE = (0.5, 0.3, 0.15, 0.05), 0.1
LIKELY = 50
"""Sequences of the grammar whose order is compared: the most likely ones."""


class Setup(NamedTuple):
    """Sizes at one scale; `samples` lists those of the grammar, the first of which is judged."""

    pairs: int
    lengths: tuple[int, int]
    epochs: int
    hidden: int
    tested: int
    draws: int
    digits_epochs: int
    points: int
    steps: int
    grammars: int
    samples: tuple[int, ...]
    grammar_epochs: int


SETUPS = {
    "smoke": Setup(512, (2, 3), 12, 32, 24, 3, 3, 4, 50, 2, (40,), 2),
    "desk": Setup(4000, (4, 8), 20, 96, 200, 50, 100, 50, 1000, 3, (300, 1000), 60),
    "paper": Setup(20000, (4, 8), 25, 96, 2000, 50, 100, 50, 1000, 10, (300, 1000, 3000), 60),
}


@dataclass(frozen=True)
class UtilityDuality(Study):
    """Softmax networks as ordinal utilities: what training prefers, what survives distortion, what decisions gain."""

    slug: ClassVar[str] = "utility-duality"
    room: ClassVar[str] = "dynamics"
    title: ClassVar[str] = "Utilities learned by maximum likelihood, and probabilities made of them"
    sources: ClassVar[tuple[Source, ...]] = (HUANG_2023, MCFADDEN_1974, GUO_2017)

    @property
    def setup(self) -> Setup:
        """Sizes of this scale."""
        return SETUPS[self.scale]

    def run(self, parts: Parts = in_memory) -> Data:
        """Train a translation, a classifier of digits and models of small grammars; count along a tabular utility."""
        translation = parts("translation", self._translation)
        classifier = parts("digits", self._digits)
        setup = self.setup
        names = [(samples, seed) for samples in setup.samples for seed in range(setup.grammars)]
        grammars = [parts(f"grammar {n} {seed}", lambda n=n, seed=seed: self._grammar(n, seed)) for n, seed in names]
        summaries = ("samples", "seed", "tau", "variation")
        return {
            **{name: _under(translation, name) for name in ("report", "translation")},
            **{name: _under(classifier, name) for name in ("maps", "reliability")},
            "identity": {
                "network": ["digits perceptron", "translation decoder step"],
                "residual": [classifier["residual"], translation["residual"]],
            },
            "telescoping": parts("telescoping", self._telescoping),
            "grammar": {name: [one[name] for one in grammars] for name in summaries},
            "likely": {name: grammars[0][name] for name in ("utility", "log_probability")},
        }

    def claims(self, data: Data) -> tuple[Claim, ...]:
        """C1 to C5 of the specification, from the stored tables alone."""
        return (
            self._decision_claim(data),
            self._identity_claim(data),
            self._order_claim(data),
            self._telescoping_claim(data),
            self._ranking_claim(data),
        )

    def figures(self, data: Data) -> tuple[Figure, ...]:
        """What a draw is worth, what monotone maps change, the two sides of the duality, and order against law."""
        return pictures.figures(data)

    # ------------------------------------------------------------------------------------------------------ measuring

    def _translation(self) -> dict[str, Any]:
        """The tables `report` and `translation`, and the `residual` of the decoder's step."""
        setup = self.setup
        permutation = torch.randperm(VOCABULARY, generator=self.seeds("permutation"))

        def drawn(count: int, stream: str) -> Pairs:
            return translations(count, setup.lengths, NOISE, permutation, self.seeds(stream))

        train, heldout, test = drawn(setup.pairs, "pairs"), drawn(setup.tested, "heldout"), drawn(setup.tested, "test")
        prefix, targets = teacher_forced(train.noisy)
        net = fit(
            seeded(lambda: Translator(hidden=setup.hidden), self.seeds.integer("translator")),
            ((train.source, prefix), targets),
            loss=token_loss,
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=2e-3),
            epochs=setup.epochs,
            batch_size=64,
            seed=self.seeds.integer("translation batches"),
            record_every=10**6,
        ).module
        # Room for one token too many, and the end: so the end of the longest ones is not forced.
        utility = UtilityModel(net, "sequence", eos=END, max_len=setup.lengths[1] + 2)
        own: dict[str, Transform] = {"truncation": _truncated, "nucleus 0.9": _nucleus}
        fitted = {
            name: fit_utility_probability(utility, (heldout.source, heldout.noisy), transform, BEAM)
            for name, transform in {**{name: name for name in TRANSFORMS}, **own}.items()
        }
        report = decision_report(
            fitted, (test.source, test.target), draws=setup.draws, seed=self.seeds.integer("draws") % 2**31
        )
        choice = fitted["choice"]
        best = utility.argmax(test.source, BEAM)
        changed = 1 - utility.same(choice.argmax(test.source), best).mean()
        exact = {"ancestral": utility, "nucleus": utility.warped(nucleus(0.9))}
        found = {
            "beta": choice.parameters["beta"],
            "observed": choice.observed,
            "dropped": choice.dropped,
            "temperature": fitted["temperature"].parameters["beta"],
            "beam_match": float(utility.same(best, utility.complete(test.target)).mean()),
            "changed": float(changed),
            **{name: float(u.log_probability(test.source, test.target).exp().mean()) for name, u in exact.items()},
        }
        points = slice(0, setup.points)
        after = setup.lengths[0] - 1  # tokens that every target has, and one to predict
        inputs = (test.source[points], test.noisy[points, :after])
        residual = preference_decomposition(NextToken(net), inputs, test.noisy[points, after]).residual
        return {
            **{f"report/{name}": column for name, column in report.items()},
            **{f"translation/{name}": [value] for name, value in found.items()},
            "residual": residual,
        }

    def _digits(self) -> dict[str, Any]:
        """The tables `maps` and `reliability`, and the `residual` of the identity."""
        setup = self.setup
        sets = noisy_digits(1000, NOISE, self.seeds("label noise"))
        net = fit(
            seeded(perceptron, self.seeds.integer("perceptron")),
            sets["train"],
            loss=cross_entropy,
            epochs=setup.digits_epochs,
            batch_size=64,
            seed=self.seeds.integer("digits batches"),
            record_every=10**6,
        ).module
        x, y = sets["test"]
        plain = UtilityModel(net).candidates(x, 3).outputs
        rows, curves = [], []
        for name, mapped in MAPS.items():
            utility = UtilityModel(nn.Sequential(net, _Mapped(mapped)))
            best = utility.candidates(x, 3).outputs
            row = {
                "map": name,
                "argmax_changed": int((best[:, 0] != plain[:, 0]).sum()),
                "top3_changed": int((best.sort(1).values != plain.sort(1).values).any(1).sum()),
            }
            for transform in ("softmax", "temperature"):
                probability = fit_utility_probability(utility, sets["heldout"], transform, 10)
                candidates, p = probability.prob(x)
                curve = reliability(p[:, 0].clamp(max=1), candidates.outputs[:, 0] == y)
                assert probability.fitted.model is not None  # both are a softmax over all classes
                row[f"{transform}_nll"] = -float(probability.fitted.model.log_probability(x, y).mean())
                row[f"{transform}_ece"] = curve.error
                row["beta"] = probability.parameters.get("beta", 1.0)
                curves += [(name, transform, *values) for values in zip(*curve, strict=True)]
            rows.append(row)
        points = slice(0, setup.points)
        names = ("map", "transform", "confidence", "accuracy", "count")
        return {
            **{f"maps/{name}": [row[name] for row in rows] for name in rows[0]},
            **{f"reliability/{name}": list(c) for name, c in zip(names, zip(*curves, strict=True), strict=True)},
            "residual": preference_decomposition(net, x[points], y[points]).residual,
        }

    def _telescoping(self) -> dict[str, Any]:
        """Both sides of the duality after each number of steps, one row a step and class."""
        law = torch.tensor(LAW, dtype=torch.float64)
        observed = torch.multinomial(law, self.setup.steps, replacement=True, generator=self.seeds("observed"))
        path = tabular_utilities(torch.zeros(len(LAW), dtype=torch.float64), observed, RATE)
        found = telescoping_frequency(path, observed, RATE)
        steps = np.unique(np.geomspace(1, len(observed), 60).astype(int))
        sides = [telescoping_frequency(path[: t + 1], observed[:t], RATE) for t in steps]
        columns = {name: [getattr(side, name).tolist() for side in sides] for name in found._fields}
        return {
            "step": np.repeat(steps, len(LAW)),
            "output": np.tile(np.arange(len(LAW)), len(steps)),
            **{name: np.array(values).flatten() for name, values in columns.items()},
        }

    def _grammar(self, samples: int, seed: int) -> dict[str, Any]:
        sequences, law = zipf_grammar(self.seeds(f"grammar {seed}"))
        drawn = torch.multinomial(law, samples, replacement=True, generator=self.seeds(f"sentences {seed}"))
        nothing = torch.zeros(samples, 1)
        targets = sequences[drawn]
        net = fit(
            seeded(Chain, self.seeds.integer(f"chain {seed}")),
            ((nothing, targets[:, :-1]), targets),
            loss=token_loss,
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
            epochs=self.setup.grammar_epochs,
            batch_size=32,
            seed=self.seeds.integer(f"grammar batches {seed}"),
            record_every=10**6,
        ).module
        utility = UtilityModel(net, "sequence", max_len=sequences.shape[1]).utility(nothing[:1], sequences[None])[0]
        likely = law.topk(LIKELY).indices
        return {
            "samples": samples,
            "seed": seed,
            "tau": ordinal_agreement(utility[likely].numpy(), law[likely].numpy()),
            "variation": float((utility.double().softmax(0) - law).abs().sum() / 2),
            "utility": utility[likely].tolist(),
            "log_probability": law[likely].log().tolist(),
        }

    # --------------------------------------------------------------------------------------------------------- claims

    def _decision_claim(self, data: Data) -> Claim:
        found = _single(data["translation"])
        match, tokens = (
            {
                name: _cell(data["report"], name, "sample", quality)
                for name in dict.fromkeys(data["report"]["transform"])
            }
            for quality in ("exact match", "token accuracy")
        )
        gains = (match["choice"] - match["softmax"], tokens["choice"] - tokens["softmax"])
        risk = {name: _cell(data["report"], name, "mbr", "token accuracy") for name in ("choice", "softmax")}
        return self.claim(
            "C1",
            "Decision rules that need probabilities gain much from probabilities made of the network's utilities; the "
            "best output stays what it was.",
            kind="threshold",
            criterion="toy translation, one draw: exact match, choice - ancestral >= 0.10; token accuracy, the same "
            "difference >= 0.03; exact match of the beam >= 0.95, and no output of the beam changed",
            measured=f"exact match {match['softmax']:.3f} to {match['choice']:.3f} (gain {gains[0]:.3f}), token "
            f"accuracy {tokens['softmax']:.3f} to {tokens['choice']:.3f} (gain {gains[1]:.3f}); beam "
            f"{found['beam_match']:.3f}, share changed {found['changed']:.3f}",
            holds=gains[0] >= 0.10 and gains[1] >= 0.03 and found["beam_match"] >= 0.95 and found["changed"] == 0,
            controls=(
                "exact match of one draw: " + ", ".join(f"{name} {value:.3f}" for name, value in match.items()),
                f"the same without draws: ancestral {found['ancestral']:.3f}, nucleus {found['nucleus']:.3f}",
                "token accuracy of the least Bayes risk: "
                + ", ".join(f"{name} {value:.4f}" for name, value in risk.items()),
                f"choice: beta {found['beta']:.3f}, {int(found['observed'])} held-out outputs among the candidates, "
                f"{int(found['dropped'])} dropped; temperature: beta {found['temperature']:.3f}",
            ),
            note="The paper shows this on machine translation, with a transform that could not be checked here. "
            f"Truncation to the {BEAM} best with beta = 1, or a nucleus, gives part of the gain. In "
            "benchmarks/decision_rules.py a narrower nucleus (0.7) gives more than the fitted choice; its draws hardly "
            "differ from the best output. At desk scale least Bayes risk gains nothing over the beam.",
        )

    def _identity_claim(self, data: Data) -> Claim:
        table = data["identity"]
        pairs = list(zip(table["network"], table["residual"], strict=True))
        return self.claim(
            "C2",
            "The gradient of the log-likelihood is the softmax-weighted sum of gradients of pairwise preferences.",
            kind="exact",
            criterion="50 points each, float64: largest relative error <= 1e-10",
            measured=", ".join(f"{name} {value:.1e}" for name, value in pairs),
            holds=all(value <= 1e-10 for _, value in pairs),
        )

    def _order_claim(self, data: Data) -> Claim:
        table = data["maps"]
        rows = {name: {c: values[i] for c, values in table.items()} for i, name in enumerate(table["map"])}
        moved = {name: float(rows[name]["softmax_nll"] - rows["u"]["softmax_nll"]) for name in MAPS}
        errors = {
            name: abs(float(rows[name]["beta"]) * factor / float(rows["u"]["beta"]) - 1)
            for name, factor in FACTORS.items()
        }
        same = all(row["argmax_changed"] == 0 and row["top3_changed"] == 0 for row in rows.values())
        return self.claim(
            "C3",
            "The order of outputs survives a strictly increasing map of utilities; probabilities do not.",
            kind="threshold",
            criterion="digits, 10 % label noise, factors 0.3, 1, 3 and a cubic map: argmax and top-3 sets identical; "
            "NLL changed by >= 0.05 at 0.3 and 3; fitted temperature times the factor within 2 %",
            measured=f"sets {'identical' if same else 'changed'}; NLL "
            + ", ".join(f"{name}: {float(row['softmax_nll']):.3f}" for name, row in rows.items())
            + "; beta times factor "
            + ", ".join(f"{float(rows[name]['beta']) * factor:.4f}" for name, factor in FACTORS.items()),
            holds=same
            and all(abs(moved[name]) >= 0.05 for name in ("0.3 u", "3 u"))
            and all(error <= 0.02 for error in errors.values()),
            controls=(
                "NLL after the fitted temperature: "
                + ", ".join(f"{name}: {float(row['temperature_nll']):.3f}" for name, row in rows.items()),
            ),
        )

    def _telescoping_claim(self, data: Data) -> Claim:
        table = data["telescoping"]
        residual = float(np.abs(table["residual"]).max())
        last = np.asarray(table["step"]) == np.max(table["step"])
        return self.claim(
            "C4",
            "How often an output was observed is its average softmax along training plus its utility gained.",
            kind="exact",
            criterion="tabular utility of 4 outputs, learning rate 0.1, 1000 steps: residual <= 1e-12",
            measured=f"largest residual {residual:.1e}, at any of {len(np.unique(table['step']))} numbers of steps",
            holds=residual <= 1e-12,
            controls=(f"largest utility gained per unit step: {np.abs(np.asarray(table['drift'])[last]).max():.4f}",),
            note="Derived here from the update of a tabular utility; not a formula of the paper.",
        )

    def _ranking_claim(self, data: Data) -> Claim:
        table = {name: np.asarray(column) for name, column in data["grammar"].items()}
        sizes = list(dict.fromkeys(table["samples"].tolist()))
        means = {n: [float(table[name][table["samples"] == n].mean()) for name in ("tau", "variation")] for n in sizes}
        tau, variation = means[sizes[0]]
        own = table["samples"] == sizes[0]
        return self.claim(
            "C5",
            "A network ranks outputs well while its probabilities are still far from the law of the data.",
            kind="threshold",
            criterion="300 sentences of a grammar, means of 3 seeds: Kendall tau over the 50 most likely sequences "
            ">= 0.55, total variation >= 0.14",
            measured=f"tau {tau:.3f} ({listed(table['tau'][own])}), total variation {variation:.3f} "
            f"({listed(table['variation'][own])})",
            holds=tau >= 0.55 and variation >= 0.14,
            controls=tuple(
                f"{n} sentences: tau {means[n][0]:.3f}, total variation {means[n][1]:.3f}" for n in sizes[1:]
            ),
            note="Batches of 32; the specification leaves the batch size open.",
        )


class _Mapped(nn.Module):
    def __init__(self, mapped: Callable[[Tensor], Tensor]):
        super().__init__()
        self.mapped = mapped

    def forward(self, u: Tensor) -> Tensor:
        return self.mapped(u)


def _truncated(heldout: Any, fit_length: bool) -> Fitted:
    """The network's own probabilities, cut to the candidates and brought to sum one."""
    return Fitted({"beta": 1.0}, share=lambda candidates: candidates.utility.softmax(1))


def _nucleus(heldout: Any, fit_length: bool) -> Fitted:
    return Fitted({"share": 0.9}, model=heldout.utility.warped(nucleus(0.9)))


def _under(part: Mapping[str, Any], table: str) -> dict[str, Any]:
    """The columns of one of the tables that a part holds under joined names."""
    return {name.removeprefix(f"{table}/"): column for name, column in part.items() if name.startswith(f"{table}/")}


def _single(table: Mapping[str, Sequence[Any] | np.ndarray]) -> dict[str, float]:
    return {name: float(np.asarray(column).item()) for name, column in table.items()}


def _cell(report: Mapping[str, Sequence[Any] | np.ndarray], transform: str, rule: str, quality: str) -> float:
    own = (np.asarray(report["transform"]) == transform) & (np.asarray(report["rule"]) == rule)
    return float(np.asarray(report[quality])[own].item())
