import math

import numpy as np
import pytest
import torch

from corollary.base.errors import BadInput
from corollary.dynamics.opposing_groups import (
    LossHistory,
    extremes,
    find_opposing_groups,
    group_size,
    plant_opposing,
    turning_share,
)
from corollary.engine import TrainingRecord


def swinging(steps=12, samples=40, size=5):
    """Samples 0 to 4 swing up first, 5 to 9 down first, the others fall slowly: all known by construction."""
    t = torch.arange(steps, dtype=torch.float64)
    losses = torch.full((steps, samples), 1.0, dtype=torch.float64) - 0.001 * t[:, None]
    sign = (-1.0) ** t
    swing = torch.linspace(1.0, 2.0, size, dtype=torch.float64)
    losses[:, :size] += 5 - swing * sign[:, None]
    losses[:, size : 2 * size] += 5 + swing * sign[:, None]
    return losses


def test_the_two_groups_are_found_and_ordered():
    rising, falling, step = find_opposing_groups(swinging(), 0)
    assert rising.tolist() == [4, 3, 2, 1, 0]
    assert falling.tolist() == [9, 8, 7, 6, 5]
    assert step == 0
    rising, falling, _ = find_opposing_groups(swinging(), 1)
    assert rising.tolist() == [9, 8, 7, 6, 5]  # one step on they have changed places


def test_without_a_step_the_largest_rise_is_taken_else_the_largest_change():
    losses = swinging()
    losses[8:] += 0.1
    losses[3:] += 0.01
    assert find_opposing_groups(losses).step == 7
    smooth = torch.linspace(1, 0, 12, dtype=torch.float64)[:, None].repeat(1, 40)
    smooth[5:] -= 0.3
    assert find_opposing_groups(smooth).step == 4


def test_what_the_losses_say():
    reading = LossHistory.of(swinging()).read(fraction=0.1, window=60)
    assert not reading.at_rises  # the swings cancel and the rest falls
    assert reading.alternation == 1.0
    assert reading.alternation_of_all == pytest.approx(10 / 40)
    assert math.isnan(reading.persistence)
    losses = swinging()
    losses += 0.002 * torch.arange(12)[:, None]  # now the mean rises at each step
    reading = LossHistory.of(losses).read(fraction=0.1, window=6)
    assert reading.at_rises
    assert reading.events == (5, 6, 7, 8, 9, 10)
    assert reading.persistence == 1.0  # the same ten samples at each, with their parts exchanged


def test_concentration_against_brute_force():
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(3, 100, generator=generator, dtype=torch.float64)
    losses[2] = losses[1]  # no change at all: the first step is the event
    reading = LossHistory.of(losses).read(window=2)
    change = (losses[1] - losses[0]).abs().sort(descending=True).values
    steps = [0] if losses[1].mean() <= losses[0].mean() else reading.events
    assert reading.events[0] == steps[0] == 0
    assert reading.concentration == pytest.approx(float(change[:2].sum() / change.sum()))


def test_turning_share_counts_sign_changes_of_consecutive_steps_only():
    changes = torch.tensor([[1.0, 1.0, 0.0], [-1.0, 1.0, 1.0], [1.0, torch.nan, -1.0], [-1.0, 1.0, 1.0]])
    share = turning_share(changes, torch.ones(4, dtype=torch.bool))
    assert share.tolist() == pytest.approx([1.0, 0.0, 2 / 3])  # zero is no turn; what is missing is left out
    gap = turning_share(changes, torch.tensor([True, True, False, True]))
    assert gap[0] == 1.0
    assert gap[2] == 0.0


def test_a_record_is_read_and_survives_saving(tmp_path):
    record = TrainingRecord()
    for step, row in enumerate(swinging()):
        record.log(10 + step, per_sample_loss=row, loss=row.mean())
    again = TrainingRecord.load(record.save(tmp_path / "record.npz"))
    groups = find_opposing_groups(again, 11)
    assert groups.rising.tolist() == [9, 8, 7, 6, 5]
    assert find_opposing_groups(again.measured("per_sample_loss")[1], 1).rising.tolist() == groups.rising.tolist()


def test_steps_of_a_record_that_are_not_consecutive_make_no_change():
    record = TrainingRecord()
    for step, row in zip((0, 1, 2, 10, 11, 12), swinging(steps=6), strict=True):
        record.log(step, per_sample_loss=row)
    history = LossHistory.of(record)
    assert history.adjacent.tolist() == [True, True, False, True, True]
    with pytest.raises(BadInput, match="steps 2 and 3"):
        history.groups(2)
    sparse = TrainingRecord()
    for step, row in enumerate(swinging()):
        sparse.log(10 * step, per_sample_loss=row)
    with pytest.raises(BadInput, match="record every step"):
        LossHistory.of(sparse)


def test_mini_batches_with_indices_are_put_in_place():
    losses = swinging(samples=60)
    generator = torch.Generator().manual_seed(1)
    indices = torch.stack([torch.randperm(60, generator=generator)[:50] for _ in range(12)])
    batches = losses.gather(1, indices)
    history = LossHistory.of(batches, sample_index=indices)
    present = ~history.losses.isnan()
    assert int(present.sum()) == 12 * 50
    assert torch.equal(history.losses[present], losses[present])
    changes = history.changes[0]
    found = find_opposing_groups(batches, 0, sample_index=indices)
    assert bool((changes[found.rising] >= changes[~changes.isnan()].sort().values[-5]).all())
    record = TrainingRecord()
    for step in range(12):
        record.log(step, per_sample_loss=batches[step], sample_index=indices[step])
    assert torch.equal(find_opposing_groups(record, 0).rising, found.rising)
    ragged = [losses[step, : 40 + step] for step in range(12)]
    placed = LossHistory.of(ragged, sample_index=[torch.arange(40 + step) for step in range(12)])
    assert placed.losses.shape == (12, 51)
    reading = history.read(window=12)
    assert 0 <= reading.alternation <= 1


@pytest.mark.parametrize(
    ("losses", "options", "words"),
    [
        (torch.ones(2, 20), {}, "3 or more recorded steps, got 2"),
        (torch.ones(5, 9), {}, "need 10 samples, got 9"),
        ([torch.ones(20), torch.ones(19), torch.ones(20)], {}, "sample_index="),
        (torch.ones(4, 20).index_fill(1, torch.tensor([3]), torch.nan), {}, "missing entries"),
        (torch.full((4, 20), torch.inf), {}, "infinite"),
        (torch.ones(4, 20, 2), {}, "row has shape"),
        (torch.ones(4, 20), {"sample_index": torch.ones(4, 19).long()}, "one index for each loss"),
        (torch.ones(4, 20), {"sample_index": -torch.ones(4, 20).long()}, "0 or more"),
    ],
)
def test_what_cannot_be_read_is_refused(losses, options, words):
    with pytest.raises(BadInput, match=words):
        LossHistory.of(losses, **options)


def test_sizes_of_groups():
    assert group_size(1000) == 10
    assert group_size(100) == 5
    assert group_size(11, 0.5) == 5
    for fraction in (0.0, 0.6):
        with pytest.raises(BadInput, match="fraction"):
            group_size(100, fraction)
    with pytest.raises(BadInput, match="window"):
        LossHistory.of(swinging()).read(window=1)
    with pytest.raises(BadInput, match="measured at both"):
        extremes(torch.full((1, 20), torch.nan), 5)


def test_a_record_without_single_losses_says_what_it_has():
    record = TrainingRecord()
    record.log(0, loss=1.0)
    with pytest.raises(BadInput, match="per_sample_loss"):
        find_opposing_groups(record)


def test_planting():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 3, 4, generator=generator), torch.arange(60) % 3
    direction = torch.zeros(3, 4)
    direction[1, 2] = -0.1
    planted, mask = plant_opposing(x, y, (0, 2), direction, 7.0, 5, seed=3)
    assert int(mask.sum()) == 10
    assert np.bincount(y[mask].numpy()).tolist() == [5, 0, 5]
    assert torch.equal(planted[~mask], x[~mask])
    assert torch.allclose((planted - x)[mask][:, 1, 2], torch.tensor(-7.0))
    assert torch.equal(plant_opposing(x, y, (0, 2), direction, 7.0, 5, seed=3)[1], mask)
    assert not torch.equal(plant_opposing(x, y, (0, 2), direction, 7.0, 5, seed=4)[1], mask)
    for options, words in (
        ({"classes": (1, 1)}, "two different"),
        ({"count": 21}, "20 samples"),
        ({"direction": torch.zeros(3, 4)}, "nonzero"),
        ({"direction": torch.ones(12)}, "nonzero"),
    ):
        arguments = {"classes": (0, 2), "direction": direction, "amplitude": 7.0, "count": 5, "seed": 3, **options}
        with pytest.raises(BadInput, match=words):
            plant_opposing(x, y, **arguments)
