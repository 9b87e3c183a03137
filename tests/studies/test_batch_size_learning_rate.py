"""The study `batch-size-learning-rate` judges what it should, from stored tables alone."""

import numpy as np

from corollary.evidence import Verdict
from corollary.studies.dynamics.batch_size_learning_rate import BatchSizeLearningRate
from corollary.studies.dynamics.batch_size_learning_rate_learner import compared


def contest(differences: list[float]) -> dict[str, dict[str, list]]:
    """Two constant settings, of which the second is better by loss and the first by accuracy."""
    count = len(differences)
    runs = {"batches": ["all"] * count, "log_loss": [-3.0 + d for d in differences], "accuracy": [0.9] * count}
    finals = {
        "batches": ["all"] * 2 * count,
        "learning_rate": [0.5] * count + [0.1] * count,
        "momentum": [0.9] * count + [0.95] * count,
        "log_loss": [-2.0] * count + [-3.0] * count,
        "accuracy": [0.95] * count + [0.8] * count,
    }
    return {"runs": runs, "finals": finals}


def test_the_contest_is_paired_and_needs_its_whole_interval_below_zero():
    differences = [-0.3, -0.2, -0.25, -0.35]
    won = compared(contest(differences), "all")
    assert won.high < 0
    assert np.isclose(won.mean, -0.275)
    # Student's t for 3 degrees of freedom, 3.182, times the standard error.
    assert np.isclose(won.high - won.mean, 3.1824 * np.std(differences, ddof=1) / 2, rtol=1e-4)
    assert "rate 0.1, momentum 0.95" in won.text
    assert not compared(contest([-0.5, 0.2, -0.1, 0.3]), "all").high < 0
    diverged = compared(contest([-0.5, np.inf, -0.1, -0.3]), "all")
    assert not diverged.high < 0
    assert "1 of 4 runs of the learner diverged" in diverged.text


def test_the_opponent_is_the_best_of_its_kind():
    data = contest([-0.3, -0.2, -0.25, -0.35])
    assert np.isclose(compared(data, "all", momentum=0.9).mean, -1.275)
    by_accuracy = compared(data, "all", "accuracy")
    assert np.isclose(by_accuracy.mean, -0.05)
    assert "rate 0.5" in by_accuracy.text


def test_smoke_has_all_claims_and_resumes_from_its_parts():
    study = BatchSizeLearningRate(scale="smoke")
    kept: dict[str, dict] = {}

    def parts(name, compute):
        kept[name] = dict(compute())
        return dict(kept[name])

    data = study.run(parts)
    assert [claim.id for claim in study.claims(data)] == ["C1", "C2", "C3", "C4", "C5"]
    assert all(claim.verdict is Verdict.NOT_JUDGED for claim in study.claims(data))

    def resumed(name, compute):
        return dict(kept[name])

    again = study.run(resumed)
    assert [c.measured for c in study.claims(again)] == [c.measured for c in study.claims(data)]
