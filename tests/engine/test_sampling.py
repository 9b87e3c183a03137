"""Batches visit each member's samples as an epoch should, and labels are flipped exactly as often as asked."""

import math

import pytest
import torch

from corollary.base.errors import BadInput
from corollary.engine import batch_order, flip_labels, sampling
from corollary.engine.sampling import Batches, distinct_rows


def member_batches(batches: Batches, member: int, steps: range) -> list[list[int]]:
    seen = []
    for step in steps:
        rows, weights = batches(step)
        own = rows[member] if weights is None else rows[member][weights[member] > 0]
        seen.append(own.tolist())
    return seen


def make(sizes=(3, 5), lengths=(10, 7), order="shuffle", drop_last=False) -> Batches:
    return Batches([4, 9], [torch.arange(n) + 100 for n in lengths], sizes, order, drop_last)


@pytest.mark.parametrize("block", [1, 30, 4_000_000], ids=["a step", "less than an epoch", "an epoch"])
@pytest.mark.parametrize("drop_last", [False, True])
def test_every_epoch_is_the_members_own_order_cut_into_batches(block, drop_last, monkeypatch):
    monkeypatch.setattr(sampling, "_BLOCK_ENTRIES", block)
    batches = make(drop_last=drop_last)
    for member, (seed, length, size) in enumerate([(4, 10, 3), (9, 7, 5)]):
        per_epoch = batches.steps_per_epoch[member]
        assert per_epoch == (length // size if drop_last else -(-length // size))
        for epoch in range(4):
            seen = member_batches(batches, member, range(epoch * per_epoch, (epoch + 1) * per_epoch))
            flat = [index - 100 for batch in seen for index in batch]
            assert flat == batch_order(seed, epoch, length)[: len(flat)].tolist()
            assert [len(batch) for batch in seen[:-1]] == [size] * (per_epoch - 1)
            assert len(flat) == (per_epoch * size if drop_last else length)


def test_weights_make_a_mean_over_the_members_own_samples():
    batches = make()
    for step in (3, 0, 11):  # out of order as well
        rows, weights = batches(step)
        torch.testing.assert_close(weights.sum(1), torch.ones(2, dtype=torch.float64))
        assert bool(((rows >= 100) & (rows < torch.tensor([[110], [107]]))).all())  # the filling is the members' own


def test_equal_sizes_need_no_weights_and_whole_sets_no_order():
    batches = make(sizes=(4, 4), lengths=(10, 10))
    assert batches.uniform
    assert [batches(step)[0].shape[1] for step in range(3)] == [4, 4, 2]
    assert all(batches(step)[1] is None for step in range(6))
    whole = make(sizes=(99, 99), lengths=(10, 10))
    assert whole.full
    assert whole(17)[0].tolist() == [list(range(100, 110))] * 2


def test_orders():
    assert batch_order(1, 0, 5, "fixed").tolist() == [0, 1, 2, 3, 4]
    assert sorted(batch_order(1, 3, 50).tolist()) == list(range(50))
    assert batch_order(1, 3, 50).tolist() == batch_order(1, 3, 50).tolist()
    assert batch_order(1, 3, 50).tolist() != batch_order(1, 4, 50).tolist() != batch_order(2, 4, 50).tolist()
    drawn = batch_order(1, 0, 20_000, "replacement")
    distinct = len(drawn.unique()) / 20_000  # 1 - 1/e of the samples appear in a bootstrap
    assert distinct == pytest.approx(1 - torch.exp(torch.tensor(-1.0)).item(), abs=0.01)


@pytest.mark.parametrize("size", [2, 5], ids=["drawn again where double", "sorted"])
def test_fresh_batches_hold_distinct_samples_each_set_equally_often(size):
    rows = distinct_rows(6, size, 60_000, torch.Generator().manual_seed(0))
    assert rows.shape == (60_000, size)
    codes = (2 ** rows.sort(1).values).sum(1)
    found, counts = codes.unique(return_counts=True)
    sets = math.comb(6, size)
    assert len(found) == sets  # a repeated sample would give a code of another set
    deviations = (counts - 60_000 / sets) / (60_000 / sets * (1 - 1 / sets)) ** 0.5
    assert float(deviations.abs().max()) < 4


def test_fresh_batches_are_a_function_of_seed_and_epoch_and_repeat_samples_between_batches():
    batches = make(sizes=(3, 5), order="fresh")
    assert batches.steps_per_epoch == (3, 1)  # whole batches only
    seen = member_batches(batches, 0, range(6))
    first = batch_order(4, 0, 10, "fresh", 3).view(3, 3) + 100
    second = batch_order(4, 1, 10, "fresh", 3).view(3, 3) + 100
    assert seen == [*first.tolist(), *second.tolist()]
    assert all(len(set(batch)) == 3 for batch in seen)
    assert len({index for batch in seen[:3] for index in batch}) < 9  # an epoch of "shuffle" would show nine
    assert batch_order(4, 0, 10, "fresh", 3).tolist() == batch_order(4, 0, 10, "fresh", 3).tolist()


@pytest.mark.parametrize("order", ["fresh", "shuffle"])
def test_one_batch_an_epoch_is_not_the_whole_set(order):
    batches = make(sizes=(7, 7), lengths=(10, 10), order=order, drop_last=True)
    assert batches.steps_per_epoch == (1, 1)
    assert not batches.full
    assert batches(0)[0].shape == (2, 7)
    assert batches(0)[0].tolist() != batches(1)[0].tolist()


@pytest.mark.parametrize("size", [None, 0, 11])
def test_fresh_batches_of_an_impossible_size_are_refused(size):
    with pytest.raises(BadInput, match="distinct samples were asked of 10"):
        batch_order(0, 0, 10, "fresh", size)


@pytest.mark.parametrize("labels", [torch.arange(60) % 4, (torch.arange(60) % 2).double() * 2 - 1], ids=["four", "±1"])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_exactly_the_fraction_of_labels_becomes_another_class(labels, fraction):
    flipped = flip_labels(labels, fraction, torch.Generator().manual_seed(0))
    assert int((flipped != labels).sum()) == round(60 * fraction)
    assert set(flipped.tolist()) <= set(labels.tolist())
    assert flipped.dtype == labels.dtype


def test_the_new_class_is_uniform_over_the_others():
    labels = torch.cat([torch.arange(5), torch.zeros(40_000, dtype=torch.long)])
    counts = flip_labels(labels, 1.0, torch.Generator().manual_seed(0))[5:].bincount(minlength=5)
    assert counts[0] == 0
    assert torch.allclose(counts[1:] / 40_000, torch.full((4,), 0.25), atol=0.01)  # four standard errors


@pytest.mark.parametrize(
    "labels", [torch.zeros(5).long(), torch.rand(5), torch.zeros(5, 2).long()], ids=["one class", "real", "matrix"]
)
def test_what_are_not_labels_cannot_be_flipped(labels):
    with pytest.raises(BadInput, match="label noise needs class labels"):
        flip_labels(labels, 0.5, torch.Generator())
