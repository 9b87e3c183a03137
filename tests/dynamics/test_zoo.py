import json
import math

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.dynamics.zoo import Cell, Recipe, load_zoo, train_zoo
from corollary.engine import Outcome, cross_entropy, fit

RECIPE = Recipe(epochs=3, kept_epochs=(1,))


def perceptron(width):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3)).double()


def normalised(width):
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3)).double()


def mixing(width):
    return nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 3)).double()


@pytest.fixture
def data():
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def equal(one, other):
    return all(
        torch.equal(p, q)
        for cell in one.cells
        for epoch in one.cells[cell].kept
        for p, q in zip(
            one.cells[cell].kept[epoch].params.values(), other.cells[cell].kept[epoch].params.values(), strict=True
        )
    )


class Counting:
    """Cross-entropy that counts its calls, and ends like a killed process after some of them."""

    def __init__(self, limit=math.inf):
        self.calls, self.limit = 0, limit

    def __call__(self, outputs, targets):
        self.calls += 1
        if self.calls > self.limit:
            raise SystemExit("killed")
        return cross_entropy(outputs, targets)


def test_a_zoo_is_a_grid_of_one_recipe(data):
    zoo = train_zoo(perceptron, data, [2, 5], [8, 30], seeds=2, recipe=RECIPE)
    assert zoo.widths == (2, 5)
    assert zoo.batch_sizes == (8, 30)
    assert zoo.module(5, 8, 1)[0].weight.shape == (5, 4)
    for cell, trained in zoo.cells.items():
        steps = 3 * math.ceil(30 / cell.batch_size)  # equal epochs: small batches make more steps
        assert {ending.step for ending in trained.outcomes} == {steps}
        assert {ending.outcome for ending in trained.outcomes} == {Outcome.FINISHED}
        assert sorted(trained.kept) == [1, 3]
        assert trained.record["loss"].shape == (4, 2)
        assert trained.record["learning_rate"].max() <= 0.05


def test_every_network_has_a_start_and_batches_of_its_own(data):
    zoo = train_zoo(perceptron, data, [2, 5], [8, 30], seeds=2, recipe=RECIPE)
    seeds = [seed for trained in zoo.cells.values() for seed in trained.seeds]
    assert len(set(seeds)) == 8


def test_padded_or_not_networks_are_those_trained_alone(data):
    padded = train_zoo(perceptron, data, [2, 5], [8], seeds=2, recipe=RECIPE)
    alone = train_zoo(perceptron, data, [2, 5], [8], seeds=2, recipe=RECIPE, padded=False)
    for cell, trained in padded.cells.items():
        for name, stack in trained.members.params.items():
            assert torch.allclose(stack, alone.cells[cell].members.params[name], atol=1e-10)


def test_a_network_is_what_an_ordinary_loop_trains(data):
    """The recipe in PyTorch's own terms, on full batches."""
    zoo = train_zoo(perceptron, data, [4], [30], seeds=1, recipe=Recipe(epochs=10, warmup=0.3))
    start = train_zoo(perceptron, data, [4], [30], seeds=1, recipe=Recipe(epochs=10, kept_epochs=(0,)))
    net = start.cells[Cell(4, 30)].kept[0].module(0)
    factors = [(s + 1) / 3 if s < 3 else 0.5 * (1 + math.cos(math.pi * (s - 3) / 7)) for s in range(10)]
    expected = fit(
        net,
        data,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4),
        schedule=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: factors[min(step, 9)]),
        schedule_every="step",
        batch_size=30,
        epochs=10,
    ).module
    for p, q in zip(zoo.module(4, 30).parameters(), expected.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-12)


def test_equal_seeds_are_equal_to_the_bit_and_others_are_not(data):
    one, two = (train_zoo(perceptron, data, [2, 3], [8], seeds=2, recipe=RECIPE, seed=4) for _ in range(2))
    assert equal(one, two)
    assert not equal(one, train_zoo(perceptron, data, [2, 3], [8], seeds=2, recipe=RECIPE, seed=5))


def test_batch_normalisation_pads_and_mixing_layers_train_cell_by_cell(data):
    zoo = train_zoo(normalised, data, [2, 5], [8], seeds=2, recipe=RECIPE)
    alone = train_zoo(normalised, data, [2, 5], [8], seeds=2, recipe=RECIPE, padded=False)
    running = [z.cells[Cell(2, 8)].members.buffers["1.running_mean"] for z in (zoo, alone)]
    assert torch.allclose(*running, atol=1e-10)
    with pytest.raises(BadInput, match="mixes units"):
        train_zoo(mixing, data, [2, 5], [8], recipe=RECIPE)
    assert train_zoo(mixing, data, [2, 5], [8], seeds=1, recipe=RECIPE, padded=False).widths == (2, 5)


def test_diverged_networks_are_an_outcome(data):
    zoo = train_zoo(perceptron, data, [3], [8], seeds=2, recipe=Recipe(epochs=30, learning_rate=1e200))
    trained = zoo.cells[Cell(3, 8)]
    assert trained.finished == ()
    assert {ending.outcome for ending in trained.outcomes} == {Outcome.DIVERGED}


@pytest.mark.parametrize("padded", [True, False])
def test_a_killed_run_goes_on_without_training_twice(data, tmp_path, padded):
    widths, batches = [2, 3], [10, 15, 30]
    options = {"seeds": 2, "recipe": Recipe(epochs=2), "padded": padded}
    whole = Counting()
    expected = train_zoo(perceptron, data, widths, batches, loss=whole, **options)
    killed = Counting(limit=whole.calls // 2)
    with pytest.raises(SystemExit):
        train_zoo(perceptron, data, widths, batches, loss=killed, folder=tmp_path, **options)
    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert 0 < len(written) < 6
    rest = Counting()
    resumed = train_zoo(perceptron, data, widths, batches, loss=rest, folder=tmp_path, **options)
    assert equal(expected, resumed)
    assert all((tmp_path / name).stat().st_mtime_ns == time for name, time in written.items())
    # The forward pass that was interrupted is made again, and what was measured last in a program that goes on.
    assert killed.limit + rest.calls <= whole.calls + 3
    assert not list(tmp_path.glob("*.training"))
    nothing = Counting()
    train_zoo(perceptron, data, widths, batches, loss=nothing, folder=tmp_path, **options)
    assert nothing.calls == 0


def test_killed_between_two_cells_of_a_program(data, tmp_path, monkeypatch):
    """Training is over, one cell is written, the other is not: nothing is trained again."""
    from corollary.dynamics import zoo as module

    write, written = module._write, []

    def once(*arguments):
        if written:
            raise SystemExit("killed")
        written.append(write(*arguments))

    monkeypatch.setattr(module, "_write", once)
    with pytest.raises(SystemExit):
        train_zoo(perceptron, data, [2, 3], [8], loss=Counting(), seeds=2, recipe=RECIPE, folder=tmp_path)
    monkeypatch.undo()
    rest = Counting()
    resumed = train_zoo(perceptron, data, [2, 3], [8], loss=rest, seeds=2, recipe=RECIPE, folder=tmp_path)
    assert rest.calls <= 3  # the last weights are measured, no update is made
    assert equal(resumed, train_zoo(perceptron, data, [2, 3], [8], loss=Counting(), seeds=2, recipe=RECIPE))


def test_a_grid_can_grow(data, tmp_path):
    train_zoo(perceptron, data, [2], [8], seeds=2, recipe=RECIPE, folder=tmp_path)
    before = (tmp_path / "width-2-batch-8.safetensors").stat().st_mtime_ns
    grown = train_zoo(perceptron, data, [2, 3], [8, 30], seeds=2, recipe=RECIPE, folder=tmp_path)
    assert len(grown.cells) == 4
    assert (tmp_path / "width-2-batch-8.safetensors").stat().st_mtime_ns == before


def test_another_zoo_in_the_folder_is_refused(data, tmp_path):
    train_zoo(perceptron, data, [2], [8], seeds=1, recipe=RECIPE, folder=tmp_path)
    for change in ({"seed": 1}, {"recipe": Recipe(epochs=4)}, {"seeds": 2}):
        options = {"seeds": 1, "recipe": RECIPE, **change}
        with pytest.raises(BadInput, match="belongs to a zoo of other data"):
            train_zoo(perceptron, data, [2], [8], folder=tmp_path, **options)
    with pytest.raises(BadInput, match="belongs to a zoo of other data"):
        train_zoo(normalised, data, [2], [8], seeds=1, recipe=RECIPE, folder=tmp_path)


def test_files_are_read_with_safetensors_alone(data, tmp_path):
    zoo = train_zoo(normalised, data, [2, 3], [8], seeds=2, recipe=RECIPE)
    assert zoo.save(tmp_path) == tmp_path
    tensors = safetensors.torch.load_file(tmp_path / "width-3-batch-8.safetensors")
    state = {key.removeprefix("1/3/"): value for key, value in tensors.items() if key.startswith("1/3/")}
    net = normalised(3)
    net.load_state_dict(state)
    net.eval()
    with torch.no_grad():
        assert torch.equal(net(data[0]), zoo.module(3, 8, 1)(data[0]))
    described = json.loads((tmp_path / "width-3-batch-8.json").read_text())
    assert (described["width"], described["batch_size"], described["recipe"]["epochs"]) == (3, 8, 3)
    with safetensors.safe_open(tmp_path / "width-3-batch-8.safetensors", "pt") as file:
        assert json.loads(file.metadata()["zoo"]) == described


def test_what_was_saved_is_loaded(data, tmp_path):
    zoo = train_zoo(normalised, data, [2, 3], [8, 30], seeds=2, recipe=RECIPE)
    loaded = load_zoo(zoo.save(tmp_path), normalised)
    assert equal(zoo, loaded)
    assert loaded.recipe == zoo.recipe
    for cell, trained in zoo.cells.items():
        assert loaded.cells[cell].seeds == trained.seeds
        assert loaded.cells[cell].outcomes == trained.outcomes
        assert np.array_equal(loaded.cells[cell].record["loss"], trained.record["loss"])


def test_what_cannot_be_loaded_is_said(data, tmp_path):
    with pytest.raises(BadInput, match="no zoo in"):
        load_zoo(tmp_path, perceptron)
    train_zoo(perceptron, data, [2], [8], seeds=1, recipe=RECIPE).save(tmp_path)
    with pytest.raises(BadInput, match="does not fit the network"):
        load_zoo(tmp_path, normalised)
    train_zoo(perceptron, data, [2], [30], seeds=1, recipe=Recipe(epochs=1)).save(tmp_path)
    with pytest.raises(BadInput, match="2 recipes"):
        load_zoo(tmp_path, perceptron)


def test_bad_axes_are_refused(data):
    with pytest.raises(BadInput, match="needs widths"):
        train_zoo(perceptron, data, [], [8])
    with pytest.raises(BadInput, match="needs batch_sizes"):
        train_zoo(perceptron, data, [2], [8, 8])
    with pytest.raises(BadInput, match="at least 1 network"):
        train_zoo(perceptron, data, [2], [8], seeds=0)
    with pytest.raises(BadInput, match=r"after epochs \[9\]"):
        train_zoo(perceptron, data, [2], [8], recipe=Recipe(epochs=3, kept_epochs=(9,)))
