"""One draw, one network, one set of candidates: the conditional logit against temperature, nucleus and top-k.

The network translates the toy language of the study `utility-duality` (10 % of the training tokens replaced at random).
What one draw is worth is exact where it can be: the probability of the reference. Temperature scaling is that of Guo et
al. 2017 on each token, fitted on the same held-out pairs; nucleus and top-k change each token's choices. Least Bayes
risk is among the ten candidates of the beam, under each probability.

Run: `python benchmarks/decision_rules.py` (about three minutes). The aims: "choice" no worse than temperature scaling
and better than the nucleus of 0.9 in the expected exact match of one draw.
"""

import time

import torch

from corollary.dynamics.decisions import decision_report
from corollary.dynamics.utility import UtilityModel, Warp, nucleus, top_tokens
from corollary.dynamics.utility_probability import Fitted, Heldout, Transform, fit_utility_probability
from corollary.engine import fit, seeded
from corollary.studies.dynamics.utility_duality_networks import (
    END,
    VOCABULARY,
    Translator,
    teacher_forced,
    token_loss,
    translations,
)

SEEDS, PAIRS, EPOCHS, TESTED, DRAWS = 4, 4000, 20, 200, 20
WARPS: dict[str, Warp] = {
    "nucleus 0.9": nucleus(0.9),
    "nucleus 0.7": nucleus(0.7),
    "top-3": top_tokens(3),
    "top-2": top_tokens(2),
    "greedy (top-1)": top_tokens(1),
}


def warped(warp: Warp) -> Transform:
    """The softmax of the warped network as a transform: there is nothing to fit."""

    def transform(heldout: Heldout, fit_length: bool) -> Fitted:
        return Fitted({}, model=heldout.utility.warped(warp))

    return transform


def run(seed: int) -> dict[str, float]:
    """Trains a network, prints the table of its decisions, and returns the exact match of a draw by name."""
    generator = torch.Generator().manual_seed(seed)
    permutation = torch.randperm(VOCABULARY, generator=generator)
    train, heldout, test = (translations(n, (4, 8), 0.1, permutation, generator) for n in (PAIRS, TESTED, TESTED))
    prefix, targets = teacher_forced(train.noisy)
    net = fit(
        seeded(Translator, seed),
        ((train.source, prefix), targets),
        loss=token_loss,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=2e-3),
        epochs=EPOCHS,
        batch_size=64,
        seed=seed,
    ).module
    utility = UtilityModel(net, "sequence", eos=END, max_len=10)
    names: dict[str, str | Transform] = {name: name for name in ("choice", "isotonic", "temperature", "softmax")}
    start = time.process_time()
    fitted = {
        name: fit_utility_probability(utility, (heldout.source, heldout.noisy), transform)
        for name, transform in {**names, **{name: warped(warp) for name, warp in WARPS.items()}}.items()
    }
    table = decision_report(fitted, (test.source, test.target), ("sample", "mbr"), draws=DRAWS, seed=seed)
    seconds = time.process_time() - start
    reference = utility.complete(test.target)
    best = float(utility.same(utility.argmax(test.source), reference).mean())
    print(f"seed {seed}: best of the beam {best:.3f}; {seconds:.1f} s for all fits and decisions")
    print(f"{'probability':16} {'draw: match':>12} {'tokens':>8} {'risk: match':>12} {'tokens':>8}")
    matches = {}
    for i, name in enumerate(fitted):
        exact = fitted[name].fitted.model
        match, tokens = (table[quality][2 * i] for quality in ("exact match", "token accuracy"))
        if exact is not None:  # the chance of the reference itself, without draws
            match = float(exact.log_probability(test.source, reference).exp().mean())
        risk = [table[quality][2 * i + 1] for quality in ("exact match", "token accuracy")]
        print(f"{name:16} {match:12.3f} {tokens:8.3f} {risk[0]:12.3f} {risk[1]:8.4f}")
        matches[name] = match
    return matches


def main() -> None:
    """The table for each seed, and whether the aims are met."""
    torch.set_num_threads(1)
    for seed in range(SEEDS):
        matches = run(seed)
        for peer in ("temperature", "nucleus 0.9"):
            met = "met" if matches["choice"] >= matches[peer] else "missed"
            print(f"choice - {peer}: {matches['choice'] - matches[peer]:+.3f} ({met})")


if __name__ == "__main__":
    main()
