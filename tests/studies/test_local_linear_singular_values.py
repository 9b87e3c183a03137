"""The study `local-linear-singular-values`: each claim can fail, and compared networks start and train alike."""

import pytest
import torch

from corollary.engine import seeded
from corollary.evidence import Verdict
from corollary.evidence.study import in_memory
from corollary.studies.geometry.local_linear_singular_values import LocalLinearSingularValues, classifier, skip_layers
from stored import changed


@pytest.fixture(scope="module")
def data():
    return LocalLinearSingularValues(scale="smoke").run()


def test_smoke_measures_all_and_judges_nothing(data):
    claims = LocalLinearSingularValues(scale="smoke").claims(data)
    assert [claim.id for claim in claims] == ["S1", "S2", "S3", "S4", "S5"]
    assert {claim.verdict for claim in claims} == {Verdict.NOT_JUDGED}


@pytest.mark.parametrize(
    ("id", "table", "column", "row", "value"),
    [
        ("S1", "depth", "log10_condition", slice(0, 20), 0.1),
        ("S2", "quadratic", "hessian_error", 0, 1e-9),
        ("S2", "quadratic", "inside", 1, 1e-9),
        ("S2", "quadratic", "outside", 2, 1e-9),
        ("S3", "facts", "worst", 0, 1e-9),
        ("S3", "facts", "worst", 6, 1e-9),
        ("S4", "residual_layers", "condition", 3, 100.0),
        ("S4", "plain_layers", "condition", slice(None), 100.0),
        ("S4", "gaussian", "log_condition", slice(None), 7.0),
        ("S5", "trained", "ratio", slice(None), 20.0),
        ("S5", "trained", "rank", -1, 63),
        ("S5", "trained", "rank", 0, 49),
        ("S5", "training", "train_loss", slice(None), 1.0),
    ],
)
def test_each_claim_can_fail(data, id, table, column, row, value):
    study = LocalLinearSingularValues(scale="desk")
    before = {claim.id: claim.verdict for claim in study.claims(data)}
    assert before[id] is Verdict.REPLICATED
    after = {claim.id: claim.verdict for claim in study.claims(changed(data, table, column, row, value))}
    assert after[id] is Verdict.NOT_REPLICATED
    assert all(after[other] == before[other] for other in after if other != id)


def test_compared_networks_differ_in_the_skip_alone():
    plain, residual = (seeded(classifier, 3, rho) for rho in (0.0, 1.0))
    for name, value in plain.named_parameters():
        assert torch.equal(value, residual.get_parameter(name))
    z = torch.randn(4, 64)
    torch.testing.assert_close(residual.hidden[0](z) - plain.hidden[0](z), z)


def test_layers_compute_what_they_say():
    net, z = skip_layers(5, 0.5, 1), torch.randn(3, 5)
    expected = torch.relu(z @ net[0].linear.weight.T + net[0].linear.bias) + 0.5 * z
    torch.testing.assert_close(net(z), expected)


def test_an_interrupted_run_resumes():
    computed = []

    def counting(name, compute):
        computed.append(name)
        if len(computed) == 4:
            raise KeyboardInterrupt
        return in_memory(name, compute)

    with pytest.raises(KeyboardInterrupt):
        LocalLinearSingularValues(scale="smoke").run(counting)
    assert len(set(computed)) == 4  # each part has a name of its own to be kept under
