import numpy as np
import pytest
import torch

from corollary.data import Dataset, Split
from corollary.dynamics.slab_data import slab_data
from corollary.evidence import Verdict
from corollary.evidence.study import in_memory
from corollary.studies.dynamics import simplicity_bias_networks
from corollary.studies.dynamics.simplicity_bias import SETUPS, SimplicityBias, best_threshold, in_gap
from corollary.studies.dynamics.simplicity_bias_networks import (
    Ensemble,
    convolutional,
    digit_pairs,
    mnist_cifar_pairs,
    perceptron,
)


@pytest.fixture(scope="module")
def kept():
    """The parts of a run at the smallest scale."""
    found = {}
    SimplicityBias(scale="smoke").run(lambda name, compute: found.setdefault(name, in_memory(name, compute)))
    return found


@pytest.fixture(scope="module")
def data(kept):
    return SimplicityBias(scale="smoke").run(lambda name, _: kept[name])


@pytest.fixture
def passing(data):
    """Desk results as the claims want them."""
    networks = {
        "data": ["LMS-5", "LMS-5", "LMS-5", "MS-(5,7)", "noisy LMS-7", "MS-7"],
        "seed": [0, 1, 2, 0, 0, 0],
        "updates": [2500] * 6,
        "accuracy": [1.0, 1.0, 1.0, 1.0, 0.949, 1.0],
        "without_accuracy": [0.5, 0.5, 0.5, 0.5, 0.5, np.nan],
        "without_auc": [0.5, 0.49, 0.51, 0.5, 0.5, np.nan],
        "without_ks": [0.5] * 6,
        "alone_accuracy": [1.0, 1.0, 1.0, 1.0, 0.948, np.nan],
        "alone_auc": [1.0, 1.0, 1.0, 1.0, 0.99, np.nan],
        "alone_ks": [0.01] * 6,
    }
    attacks = {
        "data": ["LMS-5"] * 4 + ["MS-(5,7)"] * 2,
        "budget": [0.1, 0.1, 0.5, 0.5, 0.1, 0.5],
        "seed": [0, 1, 0, 1, 0, 0],
        "share": [0.99, 0.99, 0.99, 0.99, 0.5, 0.5],
        "accuracy": [0.7, 0.7, 0.0, 0.0, 0.9, 0.9],
    }
    generator = {
        "slabs": [1, 3, 5, 7],
        "in_gaps": [0, 0, 0, 0],
        "accuracy": [0.95, 0.75, 0.6875, 0.625],
        "exact": [0.95, 0.75, 0.6875, 0.625],
        "round_trip": [1e-15] * 4,
    }
    ensemble = {"auc": [1.0], "without_auc": [0.5], "alone_auc": [1.0]}
    tables = {"networks": networks, "attacks": attacks, "generator": generator, "ensemble": ensemble}
    arrays = {name: {key: np.array(column) for key, column in table.items()} for name, table in tables.items()}
    return {**data, **arrays}


def changed(data, table, column, row, value):
    values = data[table][column].astype(float)
    values[row] = value
    return {**data, table: {**data[table], column: values}}


def test_smoke_measures_all_and_judges_nothing(data):
    claims = SimplicityBias(scale="smoke").claims(data)
    assert [claim.id for claim in claims] == ["C1", "C2", "C3", "C4", "C5"]
    assert {claim.verdict for claim in claims} == {Verdict.NOT_JUDGED}


@pytest.mark.parametrize(
    ("claim", "table", "column", "row", "value"),
    [
        ("C1", "networks", "without_auc", 1, 0.57),
        ("C1", "networks", "without_auc", 2, 0.44),
        ("C1", "networks", "alone_auc", 0, 0.98),
        ("C1", "networks", "accuracy", 2, 0.998),
        ("C2", "networks", "accuracy", 4, 0.97),
        ("C2", "networks", "accuracy", 4, 0.93),
        ("C2", "networks", "alone_accuracy", 4, 0.93),
        ("C2", "networks", "without_accuracy", 4, 0.57),
        ("C2", "networks", "accuracy", 5, 0.98),
        ("C3", "generator", "in_gaps", 2, 1),
        ("C3", "generator", "accuracy", 3, 0.6275),
        ("C3", "generator", "accuracy", 0, 0.9475),
        ("C3", "generator", "round_trip", 0, 1e-11),
        ("C4", "ensemble", "without_auc", 0, 0.58),
        ("C5", "attacks", "share", 3, 0.94),
        ("C5", "attacks", "accuracy", 2, 0.06),
        ("C5", "attacks", "accuracy", 0, 0.39),
        ("C5", "attacks", "accuracy", 1, 0.96),
    ],
)
def test_each_claim_can_fail(passing, claim, table, column, row, value):
    study = SimplicityBias(scale="desk")
    before = {found.id: found.verdict for found in study.claims(passing)}
    assert set(before.values()) == {Verdict.REPLICATED}
    after = {found.id: found.verdict for found in study.claims(changed(passing, table, column, row, value))}
    assert after[claim] is Verdict.NOT_REPLICATED
    assert all(after[other] == before[other] for other in after if other != claim)


def test_what_holds_at_every_scale(data):
    table = data["generator"]
    assert np.sum(table["in_gaps"]) == 0
    # 20,000 samples: standard error at most 0.0035, and the best threshold is chosen on them.
    assert np.abs(np.subtract(table["accuracy"], table["exact"])).max() < 0.015
    assert np.max(table["round_trip"]) <= 1e-12
    grid = data["boundary"]
    assert len(np.unique(grid["linear"])) ** 2 == len(grid["class_1"])
    assert set(data["networks"]["data"]) == set(SETUPS["smoke"])


def test_an_interrupted_run_resumes(kept, data):
    names = []

    def resumed(name, compute):
        names.append(name)
        return in_memory(name, compute) if name in ("MS-(5,7)", "generator") else kept[name]

    again = SimplicityBias(scale="smoke").run(resumed)
    assert names == list(kept)
    for table in ("networks", "attacks", "generator"):
        for name, column in data[table].items():
            assert np.array_equal(again[table][name], column, equal_nan=np.asarray(column).dtype.kind == "f")


def test_figures_draw(data):
    figures = SimplicityBias(scale="smoke").figures(data)
    assert len(figures) == 3
    assert all(figure.svg().startswith("<svg") for figure in figures)


def test_gaps_are_found_where_there_are_points_in_them():
    u = torch.tensor([0.0, 0.119, 0.121, 0.25, 0.319, 0.321, 0.559, 0.561, 0.759, 0.761, 1.0, 1.01])
    wanted = [False, False, True, True, True, False, False, True, True, False, False, True]
    assert in_gap(torch.cat([u, -u]).double(), 5, 0.1).tolist() == 2 * wanted
    drawn = slab_data(2000, linear=0, slabs={7: 3}, rotate=False, dtype=torch.float64)
    assert not in_gap(drawn.x, 7, 0.1).any()
    assert in_gap(drawn.x + 0.03, 7, 0.1).any()


def test_the_best_threshold_is_found_from_either_side():
    u = torch.tensor([0.3, -0.1, 0.5, 0.9, -0.7])
    assert best_threshold(u, torch.tensor([1, 0, 1, 1, 0])) == 1.0
    assert best_threshold(u, torch.tensor([0, 1, 0, 0, 1])) == 1.0
    assert best_threshold(u, torch.tensor([0, 1, 1, 0, 0])) == pytest.approx(0.6)
    assert best_threshold(u, torch.tensor([1, 1, 1, 1, 1])) == 1.0


def test_an_ensemble_is_the_mean_of_its_members():
    members = [perceptron(4, 3) for _ in range(3)]
    x = torch.randn(5, 4)
    wanted = sum(member(x) for member in members) / 3
    assert torch.allclose(Ensemble(members)(x), wanted, atol=1e-6)


def test_paired_digits_have_the_class_in_both_halves():
    train, test = digit_pairs(seed=3)
    assert train.x.shape[1:] == test.x.shape[1:] == (1, 16, 8)
    assert 200 < len(train.x) < 300
    assert set(train.y.tolist()) == {0, 1}
    assert torch.equal(train.blocks["top"], torch.arange(64))


def test_published_images_are_brought_to_one_size(monkeypatch):
    """On stand-ins of the right shapes, as the real ones are not at hand everywhere."""

    def standing_in(name):
        shape = (1, 28, 28) if name == "mnist" else (3, 32, 32)
        x = torch.rand(60, *shape, generator=torch.Generator().manual_seed(0))
        part = Split(x, torch.arange(60) % 10)
        return Dataset(name, part, part, "classification")

    monkeypatch.setattr(simplicity_bias_networks, "load", standing_in)
    train, test = mnist_cifar_pairs(seed=0)
    assert train.x.shape == test.x.shape == (12, 3, 64, 32)
    border = train.x[:, :, :32].clone()
    border[:, :, 2:30, 2:30] = 0
    assert not border.any()
    assert convolutional(3)(train.x.cpu()).shape == (12, 2)
