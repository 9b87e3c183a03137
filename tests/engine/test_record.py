"""Columns are aligned on step, what is missing is NaN and spoils no mean, and a record survives the disk."""

import csv
import math

import numpy as np
import pytest
import torch

from corollary.base.errors import BadInput
from corollary.engine import TrainingRecord, every, schedule


@pytest.fixture
def record() -> TrainingRecord:
    record = TrainingRecord({"seed": 3})
    record.log(10, loss=torch.tensor([1.0, math.nan]), learning_rate=0.1)
    record.log(0, loss=np.array([2.0, 4.0]))
    record.log(10, distance=7)
    return record


def test_columns_are_aligned_on_step(record):
    assert record.steps.tolist() == [0, 10]
    assert record.columns == ("loss", "learning_rate", "distance")
    np.testing.assert_array_equal(record["loss"], [[2.0, 4.0], [1.0, math.nan]])
    np.testing.assert_array_equal(record["learning_rate"], [math.nan, 0.1])
    assert len(record) == 2
    assert "loss" in record
    assert "accuracy" not in record


def test_what_is_missing_spoils_no_mean(record):
    assert record.mean("loss").tolist() == [3.0, 1.0]
    assert record.last("loss").tolist() == [1.0, 4.0]
    record.log(20, loss=np.array([math.nan, math.nan]))
    assert math.isnan(record.mean("loss")[-1])
    steps, values = record.measured("distance")
    assert (steps.tolist(), values.tolist()) == ([10], [7.0])


def test_one_members_record(record):
    second = record.member(1)
    np.testing.assert_array_equal(second["loss"], [4.0, math.nan])
    np.testing.assert_array_equal(second["learning_rate"], record["learning_rate"])


def test_a_record_survives_the_disk(record, tmp_path):
    for back in (TrainingRecord.load(record.save(tmp_path / "r.npz")), TrainingRecord.from_plain(record.as_plain())):
        assert back.columns == record.columns
        assert back.meta == {"seed": 3}
        assert back.steps.tolist() == record.steps.tolist()
        for name in record.columns:
            np.testing.assert_array_equal(back[name], record[name])
    empty = TrainingRecord()
    assert len(TrainingRecord.load(empty.save(tmp_path / "empty.npz"))) == 0


def test_the_table_as_text(record, tmp_path):
    text = record.to_csv(tmp_path / "r.csv")
    rows = list(csv.reader(text.splitlines()))
    assert rows[0] == ["step", "loss[0]", "loss[1]", "learning_rate", "distance"]
    assert rows[1:] == [["0", "2.0", "4.0", "", ""], ["10", "1.0", "", "0.1", "7.0"]]
    assert (tmp_path / "r.csv").read_text() == text


def test_a_column_keeps_its_shape(record):
    with pytest.raises(BadInput, match=r"column 'loss' holds values of shape \(2,\), got \(3,\) at step 30"):
        record.log(30, loss=np.zeros(3))
    with pytest.raises(BadInput, match="there is no column 'los' in this record"):
        record["los"]


def test_schedules():
    assert [step for step in range(10) if every(4)(step)] == [0, 4, 8]
    assert [step for step in range(7) if schedule("linear", spacing=3)(step)] == [0, 3, 6]
    is_due = schedule("log", per_decade=4)
    expected = sorted({0} | {round(10 ** (k / 4)) for k in range(17)})
    assert [step for step in range(10_001) if is_due(step)] == expected
    for bad in (lambda: every(0), lambda: schedule("log", per_decade=0)):
        with pytest.raises(BadInput):
            bad()


def test_what_is_logged_is_a_copy_and_many_small_values_share_few_blocks():
    record, value = TrainingRecord(), np.arange(3.0)
    for step in range(3000):
        record.log(step, loss=value, rate=float(step))
        value += 1
    assert record["loss"][10].tolist() == [10, 11, 12]
    assert record["rate"][-1] == 2999
    # A block of its own for each value would pin the memory between the large temporaries of a training step.
    blocks = {id(array.base) for row in record._rows.values() for array in row.values()}
    assert len(blocks) < 20
