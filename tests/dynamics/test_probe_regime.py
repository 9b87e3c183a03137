"""The probe "regime": plans by hand, the law of a record, and what is said where something is missing."""

import numpy as np
import pytest
from torch import nn

from corollary.base.errors import CannotCapture, NothingMeasured
from corollary.base.seeds import Seeds
from corollary.data import digits
from corollary.dynamics.probe_regime import regime
from corollary.engine import TrainingRecord
from corollary.evidence import Budget, Subject, Training
from corollary.evidence.battery import check_probe


def subject(**known) -> Subject:
    net = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10)).eval()
    reason = CannotCapture("not needed")
    return Subject("net", net, reason, digits(), nn.functional.cross_entropy, Seeds(0), Budget(5), **known)


def record() -> TrainingRecord:
    found = TrainingRecord()
    for step in np.unique(np.geomspace(1, 1000, 40).round()):
        found.log(int(step), distance=1 + 0.5 * np.log(step))
    return found


TRAINED = Training("sgd", learning_rate=0.1, batch_size=32, epochs=30)


def test_the_plan_and_the_law():
    given = subject(training=TRAINED, record=record())
    check_probe(regime, given)
    values = {m.name: m.value for m in regime.run(given).measurements}
    assert values["learning rate for batches of 512"] == pytest.approx(0.4)
    assert values["epochs for batches of 512"] == 480
    assert values["logarithmic law of the distance"] == pytest.approx(1, abs=1e-12)
    assert values["distance from the start"] == pytest.approx(1 + 0.5 * np.log(1000))


def test_what_is_missing_is_named():
    notes = " ".join(regime.run(subject(training=TRAINED)).notes)
    assert "--record" in notes
    assert "ghostify(net, virtual_batch=32)" in notes
    assert "--batch-size" in " ".join(regime.run(subject(record=record())).notes)
    with pytest.raises(NothingMeasured, match="--learning-rate"):
        regime.run(subject())


def test_no_batch_beyond_half_of_the_data_is_proposed():
    found = regime.run(subject(training=Training("sgd", 0.1, 300)))
    assert [m.name for m in found.measurements] == ["learning rate for batches of 600"]
    with pytest.raises(NothingMeasured):
        regime.run(subject(training=Training("sgd", 0.1, 1000)))
