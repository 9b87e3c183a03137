"""A cell of the diagram is plain SGD on the centred network; a killed diagram goes on where it was."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.base.seeds import Seeds
from corollary.dynamics.noise_diagram import (
    CenteredModel,
    MeanFieldPerceptron,
    hinge,
    noise_phase_diagram,
    sgd_temperature,
)
from corollary.engine import batch_order, seeded
from corollary.linalg import ntk_matrix

SCALE, WIDTH, BATCH, POINTS, CHECK, MOST, SEED = 64.0, 8, 4, 16, 5, 120, 1
TEMPERATURES = (0.1, 0.3)
SCALES = (SCALE, 2 * SCALE)


class Counted(MeanFieldPerceptron):
    """Counts passes in training mode (one for all members of a population), and may fail at one of them."""

    passes = 0
    fail_at: int | None = None

    def __init__(self):
        super().__init__(5, WIDTH, 2)

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            type(self).passes += 1
            if type(self).passes == type(self).fail_at:
                raise RuntimeError("the lights went out")
        return super().forward(x)


def parity(n=50, seed=0):
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, torch.sign(x[:, 0] + 0.3 * x[:, 1])


def diagram(alphas=(SCALE,), temperatures=TEMPERATURES, data=None, make=Counted, **options):
    settings = {"points": POINTS, "batch_size": BATCH, "width": WIDTH, "repeats": 2, "seed": SEED}
    settings |= {"max_steps": MOST, "check_every": CHECK}
    return noise_phase_diagram(make, parity() if data is None else data, alphas, temperatures, **(settings | options))


@pytest.fixture(autouse=True)
def fresh_counter():
    Counted.passes, Counted.fail_at = 0, None


def alone(repeat: int, temperature: float, alpha: float, max_steps: int = MOST):
    """One cell by a plain loop: `(start, network, training rows, steps, finished)`."""
    x, y = parity()
    seeds = Seeds(SEED)
    start = seeded(Counted, seeds.integer(f"repeat {repeat}"))
    net = CenteredModel(start, alpha)
    rows = torch.randperm(50, generator=seeds(f"points of repeat {repeat}"))[:POINTS]
    order_seed = seeds.integer(f"batches of repeat {repeat}")
    step_size = temperature * WIDTH * BATCH
    for step in range(max_steps + 1):
        if step % CHECK == 0 or step == max_steps:
            with torch.no_grad():
                if bool((y[rows] * net(x[rows]) >= 1).all()):
                    return start, net, rows, step, True
        if step == max_steps:
            return start, net, rows, step, False
        epoch, place = divmod(step, POINTS // BATCH)
        order = batch_order(order_seed, epoch, POINTS, "fresh", BATCH)
        batch = rows[order[place * BATCH : (place + 1) * BATCH]]
        difference = net(x[batch]) / alpha
        pushing = (alpha * y[batch] * difference < 1).double()
        total = (pushing * y[batch] * difference).sum()
        gradients = torch.autograd.grad(total, list(net.model.parameters()))
        with torch.no_grad():
            for weight, gradient in zip(net.model.parameters(), gradients, strict=True):
                weight += step_size / BATCH * gradient
    raise AssertionError("the loop returns")


def test_each_cell_is_plain_sgd_on_the_points_not_yet_fitted():
    x, y = parity()
    table = diagram()
    assert len(set(table.steps.tolist())) > 1  # they end at their own times
    for row in range(len(table)):
        start, net, rows, steps, finished = alone(int(table.repeat[row]), float(table.temperature[row]), SCALE)
        before, after = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (start, net.model))
        assert int(table.steps[row]) == steps
        assert bool(table.finished[row]) is finished
        assert table.time[row] == pytest.approx(steps * table.temperature[row] * WIDTH * BATCH, rel=1e-15)
        assert table.weight_change[row] == pytest.approx(float((after - before).norm() / before.norm()), abs=1e-10)
        held_out = torch.tensor(sorted(set(range(50)) - set(rows.tolist())))
        with torch.no_grad():
            wrong = (y[held_out] * net(x[held_out]) <= 0).double().mean()
        assert table.test_error[row] == pytest.approx(float(wrong), abs=1e-12)
        kernels = [ntk_matrix(model, x[:32]) for model in (start, net.model)]  # the factor alpha^2 cancels
        change = float((kernels[1] - kernels[0]).norm() / kernels[0].norm())
        assert table.kernel_change[row] == pytest.approx(change, abs=1e-10)


def test_the_stop_asks_all_points_and_what_has_not_finished_says_so():
    table = diagram(max_steps=2)
    assert not table.finished.any()
    assert table.steps.tolist() == [2] * 4
    assert not table.diverged.any()


def test_a_first_step_does_not_know_the_scale_nor_how_width_and_temperature_share_a_product():
    first = diagram(alphas=(0.5, 1.0, 2.0**15), temperatures=(0.1,), max_steps=1)
    by_scale = first.weight_change.reshape(3, 2)
    assert np.allclose(by_scale, by_scale[0], rtol=1e-9, atol=0)  # every point pushes at the start
    other = diagram(temperatures=[t * WIDTH for t in TEMPERATURES], width=1)
    one = diagram()
    assert np.allclose(other.weight_change, one.weight_change, rtol=1e-12, atol=0)
    assert np.allclose(other.time, one.time, rtol=1e-12, atol=0)
    assert (one.width, other.width) == (WIDTH, 1)  # and the table records which


def test_a_linear_model_has_a_kernel_that_does_not_change():
    table = diagram(make=lambda: nn.Linear(5, 1, bias=False).double(), alphas=(1.0,))
    assert float(np.max(table.kernel_change)) < 1e-14
    assert float(np.min(table.weight_change)) > 1e-3


def test_one_against_the_rest_and_a_diagram_without_a_test_set():
    x, _ = parity()
    labels = torch.randint(3, (50,), generator=torch.Generator().manual_seed(1))
    rows = 2 * nn.functional.one_hot(labels, 3).double() - 1
    table = diagram(
        data=(x, rows), make=lambda: nn.Linear(5, 3).double(), alphas=(1.0,), points=None, kernel_points=0, max_steps=20
    )
    assert np.isnan(table.test_error).all()
    assert np.isnan(table.kernel_change).all()
    assert set(table.points.tolist()) == {50}
    some = diagram(data=(x, rows), make=lambda: nn.Linear(5, 3).double(), alphas=(1.0,), max_steps=100)
    assert float(some.test_error.max()) <= 1
    assert float(some.test_error.min()) >= 0


def test_a_step_too_large_is_told_from_one_that_is_slow():
    class Cubed(nn.Linear):
        def forward(self, x):
            return super().forward(x) ** 9

    table = diagram(make=lambda: Cubed(5, 1).double(), alphas=(1.0,), temperatures=(1e30,), max_steps=100)
    assert table.diverged.all()
    assert not table.finished.any()


# ---------------------------------------------------------------------------------------------- interrupted diagrams


def assert_same(one, other):
    for name, column in one.columns.items():
        assert np.array_equal(column, other.columns[name], equal_nan=True), name


def test_equal_seeds_are_equal_to_the_bit_and_others_are_not():
    one, again, other = diagram(), diagram(), diagram(seed=4)
    assert_same(one, again)
    assert not np.array_equal(one.weight_change, other.weight_change)


def passes_of(whole, scale) -> int:
    """Passes in training of a row whose networks all finish: its steps, and the one that finds the last one done."""
    row = whole.where(whole.alpha == scale)
    assert row.finished.all()
    return int(row.steps.max()) + 1


@pytest.mark.parametrize("row", [0, 1], ids=["in the first row", "in the second row"])
def test_a_diagram_that_was_stopped_goes_on_without_repeating_a_step(row, tmp_path):
    whole = diagram(alphas=SCALES)
    passes = Counted.passes
    assert passes == sum(passes_of(whole, scale) for scale in SCALES)
    Counted.passes, Counted.fail_at = 0, 10 + row * passes_of(whole, SCALE)
    with pytest.raises(RuntimeError, match="the lights went out"):
        diagram(alphas=SCALES, folder=tmp_path)
    made = Counted.passes - 1  # the pass that failed made no step
    Counted.passes, Counted.fail_at = 0, None
    assert_same(diagram(alphas=SCALES, folder=tmp_path), whole)
    assert Counted.passes == passes - made
    Counted.passes = 0
    assert_same(diagram(alphas=SCALES, folder=tmp_path), whole)
    assert Counted.passes == 0  # all of it is read
    with pytest.raises(BadInput, match="belongs to another run"):
        diagram(alphas=SCALES, folder=tmp_path, seed=4)


KILLED = """
import torch
torch.set_num_threads(1)
from dynamics.test_noise_diagram import SCALE, diagram
diagram(alphas=(SCALE, 2.0**-6), max_steps=10**6, folder={folder!r})
"""


@pytest.mark.slow
def test_a_diagram_that_was_killed_keeps_the_rows_that_were_done(tmp_path):
    """SIGKILL leaves no time to save: what is on disk is the row that was done. The second would go on for long."""
    folder = tmp_path / "killed"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", KILLED.format(folder=str(folder))], env=environment)
    deadline = time.monotonic() + 300
    while not (kept := list(folder.glob("*.checkpoint"))) and time.monotonic() < deadline:
        assert process.poll() is None, "the diagram ended before it could be killed"
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert len(kept) == 1
    settings = {"alphas": (SCALE, 2.0**-6), "max_steps": MOST}
    whole = diagram(**settings)
    passes = Counted.passes
    Counted.passes = 0
    assert_same(diagram(**settings, folder=folder), whole)
    assert Counted.passes == passes - passes_of(whole, SCALE)


# -------------------------------------------------------------------------------------------------- what it is made of


def test_hinge_is_zero_exactly_where_all_is_fitted():
    y = torch.tensor([1.0, -1.0, 1.0])
    assert float(hinge(torch.tensor([2.0, -1.0, 1.0]), y)) == 0
    assert float(hinge(torch.tensor([[0.5], [0.0], [3.0]]), y)) == pytest.approx((0.5 + 1) / 3)
    rows = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert float(hinge(torch.zeros(2, 2), rows)) == 2  # summed over outputs, mean over samples
    with pytest.raises(BadInput, match="do not fit targets"):
        hinge(torch.zeros(3, 2), y)


def test_temperature_is_rate_over_batch_width_and_what_momentum_leaves():
    assert sgd_temperature(0.1, 20) == pytest.approx(0.005)
    assert sgd_temperature(64.0, 16, width=64) == pytest.approx(1 / 16)
    assert sgd_temperature(0.1, 20, momentum=0.9) == pytest.approx(0.05)
    for wrong in ((0.0, 1, 1, 0.0), (0.1, 0, 1, 0.0), (0.1, 1, 0, 0.0), (0.1, 1, 1, 1.0)):
        with pytest.raises(BadInput, match="positive learning rate"):
            sgd_temperature(*wrong[:2], width=wrong[2], momentum=wrong[3])


@pytest.mark.parametrize("known", [False, True], ids=["two passes", "kept outputs"])
def test_the_centred_model_starts_at_zero_and_keeps_its_start(known):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    before = {name: p.clone() for name, p in net.state_dict().items()}
    x, _ = parity()
    centred = CenteredModel(net, 3.0, x if known else None)
    rows = torch.arange(50)
    assert not bool(centred(x, rows if known else None).any())
    with torch.no_grad():
        for p in centred.parameters():
            if p.requires_grad:
                p += 0.1
    with torch.no_grad():
        expected = 3 * (centred.model(x) - net(x))
        torch.testing.assert_close(centred(x, rows if known else None), expected, rtol=0, atol=1e-14)
        some = torch.tensor([4, 0, 9])
        torch.testing.assert_close(centred(x[some], some if known else None), expected[some], rtol=0, atol=1e-14)
    assert all(torch.equal(before[name], p) for name, p in net.state_dict().items())  # the user's own is as it was


def test_the_mean_field_network_is_written_out():
    torch.manual_seed(0)
    net = MeanFieldPerceptron(5, 7, 2)
    a, b, c = (w.detach() for w in net.parameters())
    x, _ = parity(3)
    expected = ((x @ a.T / 5**0.5).relu() @ b.T / 7**0.5).relu() @ c.T / 7
    torch.testing.assert_close(net(x), expected[:, 0], rtol=0, atol=1e-14)
    gradients = torch.autograd.grad(net(x).sum(), list(net.parameters()))
    assert all(bool(g.any()) for g in gradients)  # every layer trains
    wide = MeanFieldPerceptron(5, 4000, 1)
    assert float(wide.weights[0].detach().std()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("layer", "name"), [(nn.BatchNorm1d(7), "1 .*BatchNorm1d"), (nn.Dropout(0.5), "1 .*Dropout")], ids=["norm", "drop"]
)
def test_what_depends_on_batch_or_chance_has_no_start_to_subtract(layer, name):
    with pytest.raises(BadInput, match=f"layer '{name[0]}'{name[1:]}"):
        CenteredModel(nn.Sequential(nn.Linear(5, 7), layer))


def test_the_centred_model_refuses_what_it_cannot_answer():
    x, _ = parity()
    net = nn.Linear(5, 1).double()
    with pytest.raises(BadInput, match="rows were given, the inputs were not"):
        CenteredModel(net)(x, torch.arange(50))
    with pytest.raises(BadInput, match="rows were not given"):
        CenteredModel(net, inputs=x)(x)
    with pytest.raises(BadInput, match="scale of the output is positive, got 0"):
        CenteredModel(net, 0.0)


X, Y = parity()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 17}, "a batch holds 1 to all points"),
        ({"points": 51}, "at most the 50 there are"),
        ({"repeats": 0}, "a batch holds"),
        ({"data": (X, Y.clamp(min=0))}, r"labels are wanted as -1 and 1, got values such as \[0"),
        ({"data": ((X, X), Y)}, "one tensor of real numbers"),
        ({"temperatures": (0.0,)}, "positive and finite"),
        ({"alphas": ()}, "positive and finite"),
        ({"alphas": (math.inf,)}, "positive and finite"),
        ({"data": (X.float(), Y), "alphas": (2.0**15,)}, "at a scale of 32768 .* give inputs and networks in float64"),
    ],
)
def test_a_diagram_that_cannot_be_is_refused(changes, message):
    with pytest.raises(BadInput, match=message):
        diagram(**changes)


def test_single_precision_serves_where_the_scale_allows():
    x, y = parity()
    table = diagram(data=(x.float(), y), make=lambda: MeanFieldPerceptron(5, WIDTH, 2, torch.float32))
    exact = diagram(make=lambda: MeanFieldPerceptron(5, WIDTH, 2, torch.float32).double())
    assert table.steps.tolist() == exact.steps.tolist()
    assert table.weight_change == pytest.approx(exact.weight_change, rel=1e-3)  # 64 eps over a hundred steps
