import numpy as np
import pytest
import torch

from corollary.data import digits
from corollary.evidence import Verdict
from corollary.evidence.battery import check_study
from corollary.evidence.study import in_memory
from corollary.studies.dynamics.utility_duality import SETUPS, UtilityDuality
from corollary.studies.dynamics.utility_duality_networks import (
    END,
    IGNORED,
    Translator,
    noisy_digits,
    teacher_forced,
    translations,
    zipf_grammar,
)


@pytest.fixture(scope="module")
def kept():
    """The parts of a run at the smallest scale."""
    found = {}
    UtilityDuality(scale="smoke").run(lambda name, compute: found.setdefault(name, in_memory(name, compute)))
    return found


@pytest.fixture
def passing(kept):
    """What the smallest scale measured, with the numbers that claims are made of as the claims want them."""
    data = UtilityDuality(scale="smoke").run(lambda name, _: kept[name])
    report = {name: np.array(column) for name, column in data["report"].items()}
    drawn = report["rule"] == "sample"
    for transform, match, tokens in (("choice", 0.85, 0.97), ("softmax", 0.57, 0.91)):
        own = drawn & (report["transform"] == transform)
        report["exact match"][own], report["token accuracy"][own] = match, tokens
    translation = {**data["translation"], "beam_match": np.array([0.99]), "changed": np.array([0.0])}
    maps = {**data["maps"], "softmax_nll": np.array([0.9, 1.4, 4.2, 5.0]), "beta": np.array([1.25, 0.375, 0.125, 0.1])}
    columns = {"samples": [300, 300, 1000, 1000], "seed": [0, 1, 0, 1], "tau": [0.6, 0.7, 0.7, 0.8]}
    grammar = {**columns, "variation": [0.2, 0.18, 0.12, 0.11]}
    return {**data, "report": report, "translation": translation, "maps": maps, "grammar": grammar}


def changed(data, table, column, row, value):
    stored = {name: np.array(kept, copy=True) for name, kept in data[table].items()}
    if isinstance(row, tuple):
        row = (stored["transform"] == row[0]) & (stored["rule"] == row[1])
    stored[column][row] = value
    return {**data, table: stored}


def test_battery():
    check_study(UtilityDuality)


@pytest.mark.parametrize(
    ("claim", "table", "column", "row", "value"),
    [
        ("C1", "report", "exact match", ("choice", "sample"), 0.66),
        ("C1", "report", "token accuracy", ("choice", "sample"), 0.93),
        ("C1", "translation", "beam_match", 0, 0.94),
        ("C1", "translation", "changed", 0, 0.005),
        ("C2", "identity", "residual", 0, 2e-10),
        ("C2", "identity", "residual", 1, 2e-10),
        ("C3", "maps", "argmax_changed", 3, 1),
        ("C3", "maps", "top3_changed", 0, 1),
        ("C3", "maps", "softmax_nll", 0, 1.38),
        ("C3", "maps", "softmax_nll", 2, 1.44),
        ("C3", "maps", "beta", 2, 0.128),
        ("C4", "telescoping", "residual", 5, 2e-12),
        ("C5", "grammar", "tau", 0, 0.35),
        ("C5", "grammar", "variation", 1, 0.05),
    ],
)
def test_each_claim_can_fail(passing, claim, table, column, row, value):
    study = UtilityDuality(scale="desk")
    before = {each.id: each.verdict for each in study.claims(passing)}
    assert set(before.values()) == {Verdict.REPLICATED}
    after = {each.id: each.verdict for each in study.claims(changed(passing, table, column, row, value))}
    assert after[claim] is Verdict.NOT_REPLICATED
    assert all(after[other] == before[other] for other in after if other != claim)


def test_only_the_planned_size_of_the_grammar_is_judged(passing):
    claims = UtilityDuality(scale="desk").claims(changed(passing, "grammar", "tau", 3, 0.0))
    assert {claim.verdict for claim in claims} == {Verdict.REPLICATED}


def test_what_holds_at_every_scale(kept):
    assert kept["translation"]["residual"] < 1e-10
    assert kept["digits"]["residual"] < 1e-10
    assert kept["translation"]["translation/changed"].item() == 0
    assert not kept["digits"]["maps/argmax_changed"].any()
    assert not kept["digits"]["maps/top3_changed"].any()
    assert np.abs(kept["telescoping"]["residual"]).max() < 1e-12


def test_an_interrupted_run_resumes(kept):
    setup, names = SETUPS["smoke"], []

    def resumed(name, compute):
        names.append(name)
        return in_memory(name, compute) if name == "grammar 40 1" else kept[name]

    again = UtilityDuality(scale="smoke").run(resumed)
    assert len(names) == 3 + setup.grammars * len(setup.samples)
    assert again["grammar"]["tau"][1] == kept["grammar 40 1"]["tau"]


def test_translations_are_reversed_and_noisy():
    permutation = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    pairs = translations(2000, (4, 8), 0.1, permutation, torch.Generator().manual_seed(0))
    lengths = (pairs.source != END).sum(1)
    assert set(lengths.tolist()) == {4, 5, 6, 7, 8}
    row = pairs.source[0, : lengths[0]]
    assert torch.equal(pairs.target[0, : lengths[0]], permutation[row.flip(0)])
    assert ((pairs.target == END) == (pairs.noisy == END)).all()
    inside = pairs.target != END
    share = float((pairs.target != pairs.noisy)[inside].double().mean())
    assert share == pytest.approx(0.1 * 11 / 12, abs=0.01)  # 12,000 tokens: standard error 0.003


def test_teachers_tokens():
    prefix, targets = teacher_forced(torch.tensor([[3, 5, END, END]]))
    assert prefix.tolist() == [[3, 5, END]]
    assert targets.tolist() == [[3, 5, END, IGNORED]]


def test_fill_of_the_source_changes_nothing():
    net = Translator(8, 12).double()
    source, prefix = torch.tensor([[3, 1, 4]]), torch.tensor([[1, 5]])
    longer = torch.nn.functional.pad(source, (0, 4), value=END)
    torch.testing.assert_close(net(source, prefix), net(longer, prefix))


def test_the_grammar_is_a_law_of_zipf_rows():
    sequences, law = zipf_grammar(torch.Generator().manual_seed(0))
    assert sequences.shape == (216, 3)
    assert float(law.sum()) == pytest.approx(1)
    first = torch.stack([law[sequences[:, 0] == symbol].sum() for symbol in range(6)]).sort(descending=True).values
    torch.testing.assert_close(first / first[0], torch.arange(1, 7, dtype=torch.float64) ** -1.5)


def test_labels_are_noisy_in_every_part():
    sets, data = noisy_digits(1000, 0.1, torch.Generator().manual_seed(0)), digits()
    y = torch.cat([sets["train"][1], sets["heldout"][1]])
    assert data.test is not None
    assert int((y != data.train.y).sum()) == 140
    assert int((sets["test"][1] != data.test.y).sum()) == 40
    assert len(sets["train"][1]) == 1000
