import pytest
import torch
from torch import nn

from corollary.base.errors import CannotCapture, NothingMeasured
from corollary.base.seeds import Seeds
from corollary.data import Dataset, Split, digits
from corollary.dynamics.probe_reliance import default_blocks, reliance
from corollary.dynamics.reliance import reliance_profile
from corollary.engine import fit
from corollary.evidence import Budget, Subject
from corollary.evidence.battery import check_probe


@pytest.fixture(scope="module")
def net():
    data = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    adam = {"optimizer": lambda parameters: torch.optim.Adam(parameters, lr=5e-3)}
    return fit(start, (data.train.x, data.train.y), epochs=6, batch_size=64, **adam).module


def subject(net, data, seconds=30.0):
    loss = nn.functional.cross_entropy
    return Subject("net", net, CannotCapture("not asked for"), data, loss, Seeds(0), Budget(seconds))


def measured(finding):
    return {measurement.name: measurement for measurement in finding.measurements}


def table(n=120, d=5, classes=2, **options):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    return Dataset("table", Split(x, (x[:, 1] > 0).long() % classes), None, "classification", **options)


class Column(nn.Module):
    """Looks at one column."""

    def __init__(self, column=1):
        super().__init__()
        self.column = column

    def forward(self, x):
        return torch.stack([-x[:, self.column], x[:, self.column]], 1)


def test_keeps_the_promises_of_a_probe(net):
    check_probe(reliance, subject(net, digits()))


def test_what_it_says(net):
    data = digits()
    finding = reliance.run(subject(net, data))
    found = measured(finding)
    lost = found["accuracy lost with the most used block"]
    assert lost.headline
    assert 0.02 < lost.value < 1
    assert lost.coverage is not None
    assert (lost.coverage.measured, lost.coverage.of) == (397, 397)
    columns = finding.figures[0].data
    assert len(columns["block"]) == 16
    assert columns["reliance"][0] == max(columns["reliance"])
    assert columns["chance"][0] == pytest.approx(0.1)
    assert found["reliance on that block"].value == pytest.approx(columns["reliance"][0])
    again = measured(reliance.run(subject(net, data)))
    assert again["reliance on that block"].value == found["reliance on that block"].value


def test_a_network_of_one_column_is_caught():
    finding = reliance.run(subject(Column(), table(feature_names=tuple("abcde"))))
    found = measured(finding)
    assert "'b'" in found["accuracy lost with the most used block"].meaning
    assert found["accuracy lost with the most used block"].value == pytest.approx(0.5, abs=0.1)
    assert found["reliance on that block"].value == pytest.approx(1, abs=0.2)
    assert found["AUC from that block alone"].value == 1
    assert found["blocks relied on"].value == pytest.approx(1)


def test_numbers_are_those_of_the_library(net):
    data = digits(image=True)
    case = subject(nn.Sequential(nn.Flatten(), net), data)
    finding = reliance.run(case)
    x, y = case.sample(2000)
    order = torch.randperm(len(x), generator=case.seeds("samples"))
    blocks = default_blocks((1, 8, 8)).blocks
    profile = reliance_profile(
        case.module, x[order], y[order], blocks, repeats=5, seed=case.seeds.integer("permutations")
    )
    best = profile.metrics[profile.most_used]
    assert measured(finding)["reliance on that block"].value == best.reliance


def test_without_labels_the_networks_own_answers_stand_in(net):
    data = digits()
    bare = Dataset("bare", Split(data.train.x), Split(data.test.x), "unlabelled")
    finding = reliance.run(subject(net, bare))
    assert any("own answers" in note for note in finding.notes)
    assert finding.figures[0].data["accuracy"][0] == 1.0


def test_a_short_budget_measures_less_and_says_so(net):
    finding = reliance.run(subject(net, digits(), seconds=0.001))
    coverage = measured(finding)["reliance on that block"].coverage
    assert coverage is not None
    assert coverage.measured == 50


def test_data_sorted_by_class_is_mixed_before_it_is_cut():
    data = table(400)
    order = data.train.y.argsort()
    sorted_data = Dataset("sorted", Split(data.train.x[order], data.train.y[order]), None, "classification")
    finding = reliance.run(subject(Column(), sorted_data, seconds=0.001))
    assert measured(finding)["reliance on that block"].value == pytest.approx(1, abs=0.3)


def test_what_has_no_classes_is_declined():
    x = torch.randn(20, 3)
    case = subject(nn.Linear(3, 1), Dataset("r", Split(x, x[:, :1]), None, "regression"))
    with pytest.raises(NothingMeasured, match="quantities"):
        reliance.run(case)
    with pytest.raises(NothingMeasured, match="all 120 samples are of class 0"):
        reliance.run(subject(Column(), table(classes=1)))


def test_images_are_cut_into_a_grid_over_all_channels():
    blocks = default_blocks((3, 9, 8)).blocks
    assert len(blocks) == 16
    everything = torch.cat(list(blocks.values()))
    assert everything.sort().values.tolist() == list(range(3 * 72))
    image = torch.zeros(3 * 72)
    image[blocks["row 1, column 2"]] = 1
    wanted = torch.zeros(3, 9, 8)
    wanted[:, :3, 2:4] = 1
    assert torch.equal(image.reshape(3, 9, 8), wanted)


def test_flat_samples_are_images_where_their_names_or_their_number_say_so():
    named = default_blocks((64,), tuple(f"pixel_{i}_{j}" for i in range(8) for j in range(8)))
    assert list(named.blocks) == list(default_blocks((8, 8)).blocks)
    assert "8 x 8" in named.notes[0]
    assert len(default_blocks((784,)).blocks) == 16
    oblong = default_blocks((20,), tuple(f"p{i}x{j}" for i in range(4) for j in range(5)))
    assert len(oblong.blocks) == 16


def test_columns_are_blocks_by_name_and_joined_where_there_are_many():
    assert list(default_blocks((3,), ("age", "size", "mass")).blocks) == ["age", "size", "mass"]
    assert list(default_blocks((2,)).blocks) == ["entry 0", "entry 1"]
    mixed = default_blocks((64,), tuple(f"gene_{i}" for i in range(64)))  # one number is no place
    assert len(mixed.blocks) == 64
    assert not mixed.notes
    joined = default_blocks((300,))
    assert len(joined.blocks) == 64
    assert torch.cat(list(joined.blocks.values())).tolist() == list(range(300))
    assert next(iter(joined.blocks)) == "entry 0 to entry 4"
    assert "joined" in joined.notes[0]
    thin = default_blocks((2, 100))  # too thin for a grid
    assert len(thin.blocks) == 64
