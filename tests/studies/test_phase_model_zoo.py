import numpy as np
import pytest
import torch

from corollary.dynamics.zoo import Recipe, train_zoo
from corollary.evidence import Verdict
from corollary.evidence.study import in_memory
from corollary.studies.dynamics.phase_model_zoo import SETUPS, PhaseModelZoo
from corollary.studies.dynamics.phase_model_zoo_networks import digits_or_images, perceptron, resnet18
from stored import changed


@pytest.fixture(scope="module")
def kept():
    """The parts of a run at the smallest scale."""
    found = {}
    PhaseModelZoo(scale="smoke").run(lambda name, compute: found.setdefault(name, in_memory(name, compute)))
    return found


@pytest.fixture(scope="module")
def data(kept):
    return PhaseModelZoo(scale="smoke").run(lambda name, _: kept[name])


PHASES = {  # by width, for batch sizes 8, 32, 128, 512
    2: ("I", "I", "II", "II"),
    4: ("I", "III", "II", "II"),
    8: ("III", "III", "III", "II"),
    16: ("III", "IV-A", "III", "II"),
    32: ("IV-A", "IV-B", "IV-B", "II"),
    64: ("IV-B", "IV-B", "IV-B", "IV-B"),
}
ACCURACY = {"I": 0.4, "II": 0.5, "III": 0.93, "IV-A": 0.95, "IV-B": 0.97}


@pytest.fixture
def passing(data):
    """A desk run as the claims want it."""
    setup = SETUPS["desk"]
    cells = [(w, b) for b in setup.batch_sizes for w in setup.widths]
    labels = [PHASES[w][setup.batch_sizes.index(b)] for w, b in cells]
    sharp = {8: 0.2, 32: 1.0, 128: 6.0, 512: 13.0}
    curve = {2: -0.2, 4: -0.2, 8: -0.06, 16: -0.028, 32: -0.02, 64: -0.01}
    table = {
        "width": [w for w, _ in cells],
        "batch_size": [b for _, b in cells],
        "diverged": [0] * 24,
        "phase": labels,
        "test_accuracy": [ACCURACY[label] for label in labels],
        "lambda_max": [sharp[b] for _, b in cells],
        "trace": [5 * sharp[b] for _, b in cells],
        "mc": [curve[w] for w, _ in cells],
        "mc_deviation": [0.01] * 24,
        "straight_mc": [curve[w] - 0.3 for w, _ in cells],
        "cka": [0.9] * 24,
        "cka_deviation": [0.01] * 24,
        "train_error": [0.0] * 24,
        "averaged_runs": [0.2] * 24,
        "averaged_aligned": [0.8] * 24,
        "averaged_epochs": [0.9] * 24,
    }
    return {"zoo": {name: np.array(column) for name, column in table.items()}, "identities": data["identities"]}


def test_smoke_measures_all_and_judges_nothing(data):
    claims = PhaseModelZoo(scale="smoke").claims(data)
    assert [claim.id for claim in claims] == ["C1", "C2", "C3", "C4", "C5"]
    assert {claim.verdict for claim in claims} == {Verdict.NOT_JUDGED}


@pytest.mark.parametrize(
    ("ids", "table", "column", "rows", "value"),
    [
        ("C1", "zoo", "phase", {"width": 8, "batch_size": 8}, "IV-B"),
        ("C2", "zoo", "test_accuracy", {"phase": "IV-A"}, 0.976),
        ("C2", "zoo", "test_accuracy", {"phase": "III"}, 0.961),
        ("C2", "zoo", "test_accuracy", {"phase": "II"}, 0.8),
        ("C2", "zoo", "test_accuracy", {"phase": "I"}, 0.8),
        ("C2", "zoo", "test_accuracy", {"width": 8, "batch_size": 8}, 0.98),
        ("C3", "zoo", "lambda_max", {"width": 64, "batch_size": 512}, -2.0),
        ("C3", "zoo", "lambda_max", {"batch_size": 8}, 0.99 * 13 / 9.8),
        ("C4", "zoo", "mc", {"width": 4, "batch_size": 32}, -0.09),
        ("C4", "zoo", "mc", {"width": 64, "batch_size": 32}, -0.021),
        ("C4", "zoo", "straight_mc", {"width": 16, "batch_size": 32}, -0.24),
        ("C4", "zoo", "straight_mc", slice(0, 5), 0.5),
        ("C5", "identities", "ends", 0, 1e-16),
        ("C5", "identities", "same_ends", 0, 1e-9),
        ("C5", "identities", "rotated_cka", 0, 1e-9),
        ("C5", "identities", "outside_cka", 0, 1e-9),
        ("C5", "identities", "largest", 0, 1.1e-6),
        ("C5", "identities", "trace_errors", 0, 3.1),
        ("C5", "identities", "masked", 0, 1.1e-10),
    ],
)
def test_each_claim_can_fail(passing, ids, table, column, rows, value):
    study = PhaseModelZoo(scale="desk")
    before = {claim.id: claim.verdict for claim in study.claims(passing)}
    assert set(before.values()) == {Verdict.REPLICATED}
    after = {claim.id: claim.verdict for claim in study.claims(changed(passing, table, column, rows, value))}
    assert after[ids] is Verdict.NOT_REPLICATED
    assert all(after[other] == before[other] for other in after if other != ids)


@pytest.mark.parametrize("missing", list(ACCURACY))
def test_all_five_phases_are_wanted(passing, missing):
    study = PhaseModelZoo(scale="desk")
    merged = changed(passing, "zoo", "phase", {"phase": missing}, "II" if missing != "II" else "I")
    assert study.claims(merged)[0].verdict is Verdict.NOT_REPLICATED


def test_what_holds_at_every_scale(data):
    identities = {name: np.asarray(column) for name, column in data["identities"].items()}
    assert identities["ends"].max() == 0
    assert identities["masked"].max() <= 1e-10
    assert identities["largest"].max() <= 1e-6
    zoo = data["zoo"]
    assert len(zoo["width"]) == len(SETUPS["smoke"].widths) * len(SETUPS["smoke"].batch_sizes)
    assert ((np.asarray(zoo["averaged_epochs"]) >= 0) & (np.asarray(zoo["averaged_epochs"]) <= 1)).all()


def test_the_planned_grid():
    setup = SETUPS["desk"]
    assert (setup.widths, setup.batch_sizes, setup.seeds) == ((2, 4, 8, 16, 32, 64), (8, 32, 128, 512), 3)
    assert (setup.recipe.epochs, setup.recipe.learning_rate, setup.recipe.weight_decay) == (30, 0.05, 5e-4)
    assert setup.thresholds == (0.10, 0.03, 0.85)
    train, test = digits_or_images(False)
    assert (len(train[1]), len(test[1])) == (1000, 797)


def test_an_interrupted_run_resumes(kept, data):
    names = []

    def resumed(name, compute):
        names.append(name)
        return kept[name]

    again = PhaseModelZoo(scale="smoke").run(resumed)
    assert names == list(kept)
    assert len(kept) == len(SETUPS["smoke"].batch_sizes) + 1  # each row of the grid is a part of its own
    for name, column in data["zoo"].items():
        assert np.array_equal(np.asarray(again["zoo"][name]), np.asarray(column), equal_nan=name != "phase")


def test_networks_start_from_he_uniform_weights():
    torch.manual_seed(0)
    net = perceptron(400).requires_grad_(False)
    assert float(net[2].weight.std()) == pytest.approx((2 / 400) ** 0.5, rel=0.02)
    assert float(net[2].weight.abs().max()) <= (6 / 400) ** 0.5
    assert all(float(net[i].bias.abs().max()) == 0 for i in (0, 2, 4))


def test_the_papers_network_trains_in_a_zoo():
    net = resnet18(2)
    assert sum(isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (3, 3) for layer in net.modules()) == 17
    full = sum(p.numel() for p in resnet18(64).parameters())
    assert full == 11_173_962 - 10  # He et al.'s, for small images, without the last layer's biases
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    zoo = train_zoo(resnet18, (x, torch.tensor([0, 1, 2, 3])), [1], [2], seeds=2, recipe=Recipe(1), padded=False)
    assert zoo.module(1, 2)(x).shape == (4, 10)
