import math

import numpy as np
import pytest

from corollary.base.errors import BadInput
from corollary.dynamics.phases import Phase, Thresholds, label_phases, largest_gap, phase_map, phase_of


@pytest.mark.parametrize(
    ("error", "mc", "cka", "phase"),
    [
        (0.5, -0.2, 0.1, Phase.I),
        (0.5, 0.01, 0.1, Phase.I),  # neither a barrier nor better networks on the way
        (0.5, 0.2, math.nan, Phase.II),
        (0.05, -0.2, 0.99, Phase.III),
        (0.05, -0.03, 0.84, Phase.IV_A),  # on the threshold: connected
        (0.05, 0.2, 0.85, Phase.IV_B),
        (0.10, 0.0, 0.9, Phase.IV_B),  # on the threshold: low
    ],
)
def test_the_rule(error, mc, cka, phase):
    assert phase_of(error, mc, cka) is phase


def test_a_barrier_is_negative():
    """Sign: with a barrier a fitting network is under-sized, with better networks on the way it is connected."""
    assert phase_of(0.0, -0.1, 0.9) is Phase.III
    assert phase_of(0.0, 0.1, 0.9) is Phase.IV_B


def test_thresholds_are_arguments():
    strict = Thresholds(error=0.01, connectivity=0.001, similarity=0.99)
    assert phase_of(0.05, 0.002, 0.9, strict) is Phase.II
    assert phase_of(0.005, -0.002, 0.9, strict) is Phase.III
    assert phase_of(0.005, 0.0, 0.98, strict) is Phase.IV_A


def test_what_is_no_training_error_or_has_no_similarity_is_refused():
    with pytest.raises(BadInput, match="share of training errors"):
        phase_of(2.3, 0.0, 0.9)  # a loss
    with pytest.raises(BadInput, match="share of training errors"):
        phase_of(0.1, math.nan, 0.9)
    with pytest.raises(BadInput, match="parts into A and B"):
        phase_of(0.0, 0.0, math.nan)
    with pytest.raises(BadInput, match="parts into A and B"):
        phase_of(0.0, 0.0, 0.9, Thresholds(similarity=None))


def test_the_largest_gap():
    assert largest_gap([0.9, 0.5, 0.95, 0.55]) == pytest.approx((0.55 + 0.9) / 2)
    assert largest_gap([0.7]) == -math.inf
    assert largest_gap([]) == -math.inf


def test_rows_of_a_table():
    table = {
        "train_error": [0.5, 0.5, 0.0, 0.0, 0.0, 0.8],
        "mc": [0.2, -0.2, -0.2, 0.0, 0.0, math.nan],
        "cka": [math.nan, 0.1, 0.9, 0.6, 0.7, math.nan],
    }
    assert label_phases(table) == ["II", "I", "III", "IV-A", "IV-A", "I"]  # the last one diverged
    assert label_phases(table, Thresholds(similarity=None)) == ["II", "I", "III", "IV-A", "IV-B", "I"]


def test_labels_and_the_map():
    assert [phase.label for phase in Phase] == ["I", "II", "III", "IV-A", "IV-B"]
    assert all(phase.value.startswith(f"{phase.label}: ") for phase in Phase)
    table = {"width": [2, 4, 2], "batch_size": [8, 8, 32], "phase": ["I", "IV-B", "II"]}
    figure = phase_map({**table, "test_accuracy": np.array([0.1, 0.9, 0.2])})
    assert figure.svg().startswith("<svg")
    assert figure.csv().splitlines()[2] == "4,8,IV-B,0.9"
