"""The pool of open domains."""

import torch

from corollary.verify.domains import Pool


def test_the_worst_come_out_first_with_their_own_rows():
    pool = Pool()
    pool.put(torch.tensor([3.0, 1.0, 2.0]), a=torch.tensor([[30], [10], [20]]))
    assert len(pool) == 3
    assert pool.worst == 1.0
    taken = pool.take(2)
    assert sorted(zip(taken["priority"].tolist(), taken["a"][:, 0].tolist(), strict=True)) == [(1.0, 10), (2.0, 20)]
    assert len(pool) == 1
    assert pool.take(5)["a"].tolist() == [[30]]
    assert pool.worst == torch.inf


def test_slots_are_used_again_and_short_rows_filled_with_zeros():
    pool = Pool()
    for number in range(600):
        pool.put(torch.tensor([float(number)]), a=torch.full((1, 1 + number % 3), number + 1))
        if number % 2:
            assert pool.take(1)["priority"].tolist() == [float((number - 1) // 2)]
    assert len(pool) == 300
    taken = pool.take(300)
    for priority, row in zip(taken["priority"].tolist(), taken["a"].tolist(), strict=True):
        width = 1 + int(priority) % 3
        assert row == [int(priority) + 1] * width + [0] * (3 - width)
