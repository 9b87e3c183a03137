import numpy as np
import pytest

from corollary.base.errors import BadInput
from corollary.dynamics.catapult_record import find_catapults
from corollary.dynamics.quadratic_models import UVRecursion
from corollary.engine import TrainingRecord


def record_of(losses, name="train_loss", **columns):
    record = TrainingRecord()
    for step, loss in enumerate(losses):
        record.log(10 * step, **{name: loss}, **{key: values[step] for key, values in columns.items()})
    return record


def test_a_rise_and_return_is_one_catapult():
    found = find_catapults(record_of([4, 2, 1, 3, 9, 5, 0.5, 0.4], sharpness=[9, 8, 7, 6, 5, 4, 3, 2]))
    (one,) = found.found
    assert (one.start, one.peak, one.end, one.growth) == (20, 40, 60, 9)
    assert (one.curvature_before, one.curvature_after, one.flattened) == (7, 3, True)
    assert (found.loss, found.curvature, found.unreturned) == ("train_loss", "sharpness", 1)


def test_a_monotone_loss_has_none_and_a_small_rise_is_none():
    assert len(find_catapults(record_of([8, 4, 2, 1]))) == 0
    assert len(find_catapults(record_of([8, 4, 7, 1]))) == 0
    assert len(find_catapults(record_of([8, 4, 7, 1]), growth=1.5)) == 1


def test_a_rise_without_return_is_no_catapult():
    found = find_catapults(record_of([2, 1, 5, 40]))
    assert len(found) == 0
    assert found.unreturned == 40


def test_several_are_found_in_order():
    found = find_catapults(record_of([2, 9, 1, 7, 0.5, 0.4, 2, 0.1]))
    assert [(one.start, one.peak, one.end) for one in found.found] == [(0, 10, 20), (20, 30, 40), (50, 60, 70)]
    assert np.isnan(found.found[0].curvature_before)
    assert found.found[0].flattened is None


def test_the_catapult_of_the_theory_is_found_with_its_flattening():
    path = UVRecursion(512).run(0.8, 2.0, 1.4, 60)
    losses = 0.5 * path.outputs.square()
    record = TrainingRecord()
    for step, (loss, kernel) in enumerate(zip(losses, path.kernels, strict=True)):
        record.log(step, loss=loss, lambda_ntk=kernel)
    (one,) = find_catapults(record).found
    assert one.start == 0
    assert one.growth == pytest.approx(float(losses.max() / losses[0]))
    assert one.curvature_before * 1.4 > 2 > one.curvature_after * 1.4
    lazy = UVRecursion(512).run(0.8, 2.0, 0.9, 60)
    assert len(find_catapults(record_of(lazy.outputs.square().tolist()))) == 0


def test_curvature_may_be_measured_less_often():
    record = record_of([2, 9, 1])
    record.log(0, sharpness=5.0)
    record.log(25, sharpness=1.0)
    (one,) = find_catapults(record).found
    assert (one.curvature_before, one.curvature_after) == (5, 1)


def test_the_training_loss_is_searched_before_that_of_batches():
    record = record_of([3, 2, 1], loss=[1, 5, 0.5])
    assert len(find_catapults(record)) == 0
    assert len(find_catapults(record, loss="loss")) == 1


def test_the_figure_shades_what_was_found():
    figure = find_catapults(record_of([4, 1, 9, 0.5])).figure()
    assert figure.data["start"] == [10]
    assert figure.svg().startswith("<svg")


@pytest.mark.parametrize(
    ("record", "options", "says"),
    [
        (record_of([1, 2], name="accuracy"), {}, "none of train_loss, loss"),
        (record_of([1, 2]), {"loss": "missing"}, "no column 'missing'"),
        (record_of([1, 2]), {"growth": 1.0}, "above 1"),
        (record_of([1, -2]), {}, "losses of 0 or more"),
        (record_of([np.ones(3), np.ones(3)]), {}, "one network at a time"),
    ],
)
def test_what_cannot_be_searched_is_refused(record, options, says):
    with pytest.raises(BadInput, match=says):
        find_catapults(record, **options)
