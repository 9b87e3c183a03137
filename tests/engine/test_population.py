"""Every member of a population is the run it would be alone, and what befalls one leaves the others as they were."""

import math
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.seeds import Seeds
from corollary.engine import Outcome, adam, batch_order, decay_every, flip_labels, population, seeded, sgd

DTYPE = torch.float64
CLOSE = {"rtol": 0.0, "atol": 1e-10}  # 60 steps of float64 rounding stay below 1e-12; anything wrong is above 1e-4


def mlp(width: int = 7) -> nn.Module:
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3)).to(DTYPE)


def normed() -> nn.Module:
    # No bias before the normalisation: its gradient is 0 up to rounding, and Adam would blow that rounding up.
    return nn.Sequential(nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)).to(DTYPE)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5, dtype=DTYPE)
        self.again = self.inner
        self.outer = nn.Linear(5, 3, dtype=DTYPE)
        self.outer.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.again(torch.tanh(self.inner(x))))


class Slope(nn.Module):
    """Output w x: with the loss below, a quadratic of curvature mean(x^2) in w."""

    def __init__(self, start: float = 1.5) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start, dtype=DTYPE))

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean() / 2


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(37, 5, generator=generator, dtype=DTYPE)
    return x, (x @ torch.randn(5, 3, generator=generator, dtype=DTYPE)).argmax(1)


def plain_loop(
    net: nn.Module,
    data: tuple[Tensor, Tensor],
    make_optimizer,
    *,
    seed: int,
    batch: int,
    steps: int,
    clip: float | None = None,
) -> nn.Module:
    """The loop one writes by hand, with torch.optim; it shares the batch order with the library, and nothing else."""
    net = deepcopy(net).train()
    optimizer = make_optimizer(net.parameters())
    x, y = data
    per_epoch = math.ceil(len(x) / batch)
    for step in range(steps):
        epoch, position = divmod(step, per_epoch)
        rows = batch_order(seed, epoch, len(x))[position * batch : (position + 1) * batch]
        optimizer.zero_grad()
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
    return net


def assert_same_values(one: nn.Module, other: nn.Module, **tolerance: float) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


SLOPES = torch.tensor([1.0, 3.0], dtype=DTYPE)  # curvature mean(x^2) = 5


def test_gradient_descent_on_a_quadratic_is_its_closed_form():
    rates = torch.tensor([0.05, 0.1, 0.2, 0.3, 0.39], dtype=DTYPE)
    trained = population(
        [Slope()] * 5, (SLOPES, torch.zeros(2, dtype=DTYPE)), loss=half_square, learning_rate=rates, steps=40
    )
    torch.testing.assert_close(trained.params["w"], 1.5 * (1 - 5 * rates) ** 40, rtol=1e-11, atol=1e-15)
    steps = torch.as_tensor(trained.record.steps)[:, None]
    expected = 2.5 * (1.5 * (1 - 5 * rates) ** steps) ** 2
    torch.testing.assert_close(torch.as_tensor(trained.record["loss"]), expected, rtol=1e-10, atol=1e-15)


def test_divergence_is_exactly_above_two_over_the_curvature_and_is_an_outcome():
    rates = torch.tensor([0.39, 0.395, 0.405, 0.41], dtype=DTYPE)  # 2 / 5 = 0.4
    trained = population(
        [Slope()] * 4,
        (SLOPES, torch.zeros(2, dtype=DTYPE)),
        loss=half_square,
        learning_rate=rates,
        steps=300,
        diverged_above=1e6,
    )
    assert [outcome for outcome, _ in trained.outcomes] == [Outcome.FINISHED] * 2 + [Outcome.DIVERGED] * 2
    for (_, step), rate in zip(trained.outcomes[2:], rates[2:].tolist(), strict=True):
        first = math.log(1e6 / (2.5 * 1.5**2)) / (2 * math.log(5 * rate - 1))  # loss_t = loss_0 (5 rate - 1)^(2t)
        assert step == math.ceil(first)
    assert trained.finished == (True, True, False, False)


OPTIMIZERS = {
    "sgd": (sgd(), lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.01), 0.05),
    "momentum": (sgd(0.9), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01), 0.05),
    "nesterov": (
        sgd(0.8, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8, nesterov=True, weight_decay=0.01),
        0.05,
    ),
    "adam": (adam((0.8, 0.99)), lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.99), weight_decay=0.01), 0.01),
    "adamw": (adam(decoupled=True), lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.01), 0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("make", [mlp, normed, Tied], ids=["mlp", "batch norm", "tied, partly frozen"])
def test_a_member_is_the_plain_loop_with_torch_optim(name, make, data):
    rule, optimizer, rate = OPTIMIZERS[name]
    seeds = [5, 11, 6]
    rates = torch.tensor([0.5 * rate, rate, 2 * rate], dtype=DTYPE)
    options = {"optimizer": rule, "weight_decay": 0.01, "batch_size": 8, "steps": 33}
    trained = population(make, data, seeds=seeds, learning_rate=rates, **options)
    net = seeded(make, 11)
    alone = plain_loop(net, data, optimizer, seed=11, batch=8, steps=33)
    assert_same_values(trained.member(1), alone, rtol=0, atol=1e-12)  # same operations: rounding only
    single = population(make, data, seeds=[11], learning_rate=rate, **options)
    assert_same_values(trained.member(1), single.member(0), **CLOSE)


def test_convolutions_with_batch_norm_keep_exact_running_statistics(data):
    def make() -> nn.Module:
        layers = [nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 3)]
        return nn.Sequential(*layers).to(DTYPE)

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(37, 1, 3, 5, generator=generator, dtype=DTYPE)[..., :3]
    sets = (torch.cat([images, images], dim=-1)[..., :3], data[1])
    trained = population(make, sets, seeds=[1, 2], learning_rate=0.1, batch_size=9, steps=12, optimizer=sgd(0.9))
    alone = plain_loop(
        seeded(make, 2), sets, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), seed=2, batch=9, steps=12
    )
    assert_same_values(trained.member(1), alone, **CLOSE)


def test_batch_sizes_of_their_own(data):
    sizes = [4, 37, 10]
    trained = population(mlp, data, seeds=[1, 2, 3], batch_size=sizes, epochs=2, learning_rate=0.1)
    assert [step for _, step in trained.outcomes] == [20, 2, 8]
    for index, size in enumerate(sizes):
        net = seeded(mlp, index + 1)
        sgd_alone = plain_loop(net, data, lambda p: torch.optim.SGD(p, lr=0.1), seed=index + 1, batch=37, steps=0)
        if size < 37:  # a whole batch is not shuffled: then the loop below would sum in another order only
            steps = trained.outcomes[index].step
            sgd_alone = plain_loop(
                net, data, lambda p: torch.optim.SGD(p, lr=0.1), seed=index + 1, batch=size, steps=steps
            )
            assert_same_values(trained.member(index), sgd_alone, **CLOSE)
    full = population(mlp, data, seeds=[2], steps=2, learning_rate=0.1)
    assert_same_values(trained.member(1), full.member(0), **CLOSE)


def test_label_noise_is_exact_and_of_the_members_own(data):
    fractions = [0.0, 0.25, 1.0]
    trained = population(mlp, data, seeds=[1, 2, 3], label_noise=fractions, batch_size=8, steps=15)
    for index, fraction in enumerate(fractions):
        changed = trained.training_set(index)[1] != data[1]
        assert int(changed.sum()) == round(37 * fraction)
    noisy = flip_labels(data[1], 0.25, Seeds(2)("label noise"))
    alone = plain_loop(
        seeded(mlp, 2), (data[0], noisy), lambda p: torch.optim.SGD(p, lr=0.1), seed=2, batch=8, steps=15
    )
    assert_same_values(trained.member(1), alone, **CLOSE)


def test_subsets_train_on_their_samples_only(data):
    few = torch.tensor([4, 9, 2, 30, 31])
    subsets = [few, torch.arange(37)]
    trained = population(
        mlp, data, seeds=[1, 2], subsets=subsets, batch_size=3, steps=14, measure_train=True, label_noise=[0.4, 0.0]
    )
    noisy = flip_labels(data[1][few.sort().values], 0.4, Seeds(1)("label noise"))
    labels = data[1].clone()
    labels[few.sort().values] = noisy
    sets = (data[0][few], labels[few])
    alone = plain_loop(seeded(mlp, 1), sets, lambda p: torch.optim.SGD(p, lr=0.1), seed=1, batch=3, steps=14)
    assert_same_values(trained.member(0), alone, **CLOSE)
    x, y = trained.training_set(0)
    assert torch.equal(x, sets[0])
    assert torch.equal(y, sets[1])
    expected = F.cross_entropy(trained.member(0)(x), y).item()
    assert trained.record.last("train_loss")[0] == pytest.approx(expected, abs=1e-12)
    assert trained.record.last("train_accuracy")[0] == float((trained.member(0)(x).argmax(1) == y).double().mean())


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid], ids=["zero at zero", "one half at zero"])
def test_widths_are_the_small_nets_exactly(activation, data):
    def make(width: int) -> nn.Module:
        layers = [nn.Linear(5, width), nn.BatchNorm1d(width), activation(), nn.Linear(width, width), activation()]
        return nn.Sequential(*layers, nn.Linear(width, 3)).to(DTYPE)

    widths = [2, 9, 4]
    options = {"learning_rate": 0.02, "optimizer": adam(), "batch_size": 8, "steps": 25, "weight_decay": 0.01}
    together = population(make, data, seeds=[1, 2, 3], width=widths, validation=data, **options)
    for index, width in enumerate(widths):
        alone = population([seeded(make, index + 1, width)], data, seeds=[index + 1], validation=data, **options)
        assert_same_values(together.member(index), alone.member(0), **CLOSE)
        for name in together.record.columns:
            torch.testing.assert_close(
                torch.as_tensor(together.record[name][:, index]), torch.as_tensor(alone.record[name][:, 0]), **CLOSE
            )
    assert together.params["3.weight"].shape == (3, 9, 9)


def test_a_network_that_mixes_units_cannot_be_padded(data):
    def make(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(5, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, 3)).to(DTYPE)

    with pytest.raises(BadInput, match="member 0 with zeros to the width of the widest changes its outputs"):
        population(make, data, seeds=[1, 2], width=[3, 5], steps=1)


def test_a_member_that_diverges_leaves_the_others_bit_equal(data):
    def make() -> nn.Module:  # hidden units and outgoing weights both near 1e200: their product overflows
        return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).to(DTYPE)

    options = {"seeds": [1, 2, 3], "optimizer": sgd(0.9), "batch_size": 8, "steps": 20, "record_every": 5}
    with_bad = population(make, data, learning_rate=[0.1, 1e200, 0.2], **options)
    all_good = population(make, data, learning_rate=[0.1, 0.1, 0.2], **options)
    assert [outcome for outcome, _ in with_bad.outcomes] == [Outcome.FINISHED, Outcome.DIVERGED, Outcome.FINISHED]
    for index in (0, 2):
        assert_same_values(with_bad.member(index), all_good.member(index), rtol=0, atol=0)
    losses = with_bad.record["loss"]
    assert math.isnan(losses[-1, 1])
    assert with_bad.record.mean("loss")[-1] == pytest.approx((losses[-1, 0] + losses[-1, 2]) / 2)


def test_snapshots_and_the_record_are_of_the_weights_after_that_many_updates(data):
    trained = population(mlp, data, seeds=[1, 2], batch_size=8, steps=12, snapshots=[0, 7, 12], record_every=1)
    for step in (0, 7, 12):
        alone = plain_loop(seeded(mlp, 2), data, lambda p: torch.optim.SGD(p, lr=0.1), seed=2, batch=8, steps=step)
        assert_same_values(trained.snapshots[step].module(1), alone, **CLOSE)
    start, end = seeded(mlp, 2), trained.member(1)
    distance = sum((p - q).square().sum() for p, q in zip(start.parameters(), end.parameters(), strict=True)).sqrt()
    norm = sum(p.square().sum() for p in end.parameters()).sqrt()
    assert trained.record["distance"][-1, 1] == pytest.approx(distance.item(), abs=1e-12)
    assert trained.record["weight_norm"][-1, 1] == pytest.approx(norm.item(), abs=1e-12)
    assert trained.record["distance"][0, 1] == 0
    rows = batch_order(2, 0, 37)[:8]
    loss = F.cross_entropy(start(data[0][rows]), data[1][rows])
    gradient = torch.autograd.grad(loss, list(start.parameters()))
    assert trained.record["loss"][0, 1] == pytest.approx(loss.item(), abs=1e-12)
    assert trained.record["gradient_norm"][0, 1] == pytest.approx(
        sum(g.square().sum() for g in gradient).sqrt().item(), abs=1e-12
    )


def test_snapshots_after_everyone_has_ended_are_of_the_weights_they_ended_with(data):
    trained = population(
        mlp, data, seeds=[1], steps=50, record_every=1, snapshots=[5, 40, 50], stop_when=lambda v: v["loss"] < 1e9
    )
    assert trained.outcomes[0] == (Outcome.STOPPED, 0)
    for step in (5, 40, 50):
        assert_same_values(trained.snapshots[step].module(0), trained.member(0), rtol=0, atol=0)


def test_the_schedule_multiplies_the_learning_rate(data):
    trained = population(
        mlp, data, seeds=[4, 5], learning_rate=[0.1, 0.2], schedule=decay_every(5, 0.5), steps=11, record_every=1
    )
    expected = [[rate * 0.5 ** (step // 5) for rate in (0.1, 0.2)] for step in range(12)]
    torch.testing.assert_close(torch.as_tensor(trained.record["learning_rate"]), torch.tensor(expected, dtype=DTYPE))


def test_gradient_clipping_is_per_member(data):
    trained = population(
        mlp, data, seeds=[1, 2], batch_size=8, steps=10, learning_rate=0.3, gradient_clip=0.2, initial_scale=3.0
    )
    net = seeded(mlp, 2)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3.0)
    alone = plain_loop(net, data, lambda p: torch.optim.SGD(p, lr=0.3), seed=2, batch=8, steps=10, clip=0.2)
    assert_same_values(trained.member(1), alone, **CLOSE)


def test_patience_stops_each_member_at_its_own_step_and_keeps_its_best_weights(data):
    generator = torch.Generator().manual_seed(1)
    held_out = (torch.randn(50, 5, generator=generator, dtype=DTYPE), torch.randint(3, (50,), generator=generator))
    options = {"optimizer": adam(), "record_every": 1, "patience": 4, "steps": 200, "batch_size": 8}
    rates = [0.03, 0.3]
    trained = population(mlp, data, seeds=[1, 2], learning_rate=rates, validation=held_out, **options)
    losses = trained.record["test_loss"]
    for index in (0, 1):
        outcome, step = trained.outcomes[index]
        best = losses[: step + 1, index].argmin()
        assert outcome is Outcome.STOPPED
        assert step == best + 4
        assert all(math.isnan(value) for value in losses[step + 1 :, index])
        assert trained.best.evaluate(held_out)["loss"][index] == pytest.approx(losses[best, index], abs=1e-12)
        alone = population(mlp, data, seeds=[index + 1], learning_rate=rates[index], validation=held_out, **options)
        assert_same_values(trained.member(index), alone.member(0), **CLOSE)
    assert trained.outcomes[0].step != trained.outcomes[1].step


def test_stop_when_is_asked_with_the_measured_columns(data):
    trained = population(
        mlp, data, seeds=[1, 2, 3], learning_rate=[0.5, 1.0, 1e-9], optimizer=sgd(0.9), steps=400, record_every=10,
        measures={"largest": lambda members: members.params["0.weight"].abs().flatten(1).amax(1)},
        stop_when=lambda values: values["accuracy"] == 1,
    )  # fmt: skip
    assert [outcome for outcome, _ in trained.outcomes] == [Outcome.STOPPED, Outcome.STOPPED, Outcome.FINISHED]
    assert trained.record.last("accuracy")[:2].tolist() == [1.0, 1.0]
    largest = trained.member(1).get_parameter("0.weight").abs().max().item()
    assert trained.record.last("largest")[1] == pytest.approx(largest)


LEFT_OUT = {
    "label noise": {"label_noise": 0.2, "batch_size": 4},
    "widths": {"width": [3, 7, 7, 5, 4, 7], "batch_size": 4},
    "batch sizes of their own": {"batch_size": [2, 4, 4, 8, 4, 4]},
    "subsets": {"subsets": [torch.arange(5 + i, 30) for i in range(6)], "batch_size": 5},
    "batch norm": {"nets": normed, "batch_size": 5},
    "gradient descent": {},
    "gradient descent, label noise": {"label_noise": 0.2},
    "momentum of their own and decay": {
        "optimizer": sgd(torch.tensor([0.0, 0.9, 0.5, 0.1, 0.2, 0.3], dtype=DTYPE)),
        "weight_decay": 0.1,
        "batch_size": 4,
    },
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_members_that_have_ended_are_left_out_and_nobody_notices(name, data, tmp_path):
    """Four of six stop at step 4: from then on the other two are computed alone, as they would be without them."""
    options = {"seeds": range(6), "learning_rate": 0.1, "record_every": 2, "measure_train": True, "validation": data}
    options |= {"nets": mlp, "data": data} | LEFT_OUT[name]
    stops = torch.tensor([True, False, True, True, False, True])

    def stopping(values):
        return stops & (values["distance"] > 0) & (values["made"] >= 4)

    def stepped(members):
        stepped.calls += 1
        return torch.full((len(members),), 2.0 * (stepped.calls - 1))

    stepped.calls = 0
    ended = population(steps=13, stop_when=stopping, measures={"made": stepped}, **options)
    assert [outcome.step for outcome in ended.outcomes] == [13 if not stop else 4 for stop in stops]
    everyone = population(steps=13, **options)
    early = population(steps=4, **options)
    for index, stop in enumerate(stops.tolist()):
        assert_same_values(ended.member(index), (early if stop else everyone).member(index), **CLOSE)
    for column in ("loss", "accuracy", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "gradient_norm"):
        kept, whole = ended.record[column], everyone.record[column]
        assert np.allclose(kept[:, ~stops.numpy()], whole[:, ~stops.numpy()], rtol=0, atol=1e-10), column
        assert np.isnan(kept[3:, stops.numpy()]).all(), column


def test_a_run_with_ended_members_resumes_to_the_bit(data, tmp_path):
    options = {
        "seeds": range(4),
        "learning_rate": torch.tensor([1e9, 1e9, 0.1, 0.1]),
        "batch_size": 4,
        "record_every": 1,
    }
    deep = partial(population, lambda: nn.Sequential(mlp(), nn.Linear(3, 3).to(DTYPE)), data, **options)
    whole = deep(steps=20, diverged_above=1e3)
    assert [outcome.outcome for outcome in whole.outcomes] == 2 * [Outcome.DIVERGED] + 2 * [Outcome.FINISHED]
    for steps in (7, 20):
        parts = deep(steps=steps, diverged_above=1e3, checkpoint=tmp_path / "run")
    for name, stack in whole.params.items():
        assert torch.equal(stack, parts.params[name])
    assert np.array_equal(whole.record["loss"], parts.record["loss"], equal_nan=True)


def test_selected_members_are_those(data):
    trained = population(mlp, data, size=4, width=[3, 7, 5, 7], steps=2).final
    some = trained.select(torch.tensor([2, 0]))
    assert len(some) == 2
    torch.testing.assert_close(some(data[0]), trained(data[0])[[2, 0]], **CLOSE)
    assert_same_values(some.module(1), trained.module(0), **CLOSE)
    before = trained.params["0.weight"].clone()
    some.params["0.weight"].zero_()
    assert torch.equal(trained.params["0.weight"], before)


def test_dropout_masks_differ_between_members_and_repeat_with_the_seeds(data):
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 50), nn.Dropout(0.5), nn.Linear(50, 3)).to(DTYPE)

    net = make()
    first = population([net] * 2, data, seeds=[7, 7], steps=3)
    again = population([net] * 2, data, seeds=[7, 7], steps=3)
    assert not torch.equal(first.params["0.weight"][0], first.params["0.weight"][1])
    assert torch.equal(first.params["0.weight"], again.params["0.weight"])


@pytest.mark.parametrize("interrupted_at", [3, 14])
def test_an_interrupted_run_resumes_to_the_bit(interrupted_at, data, tmp_path):
    def make() -> nn.Module:
        layers = [nn.Linear(5, 9), nn.BatchNorm1d(9), nn.Dropout(0.3), nn.Linear(9, 3)]
        return nn.Sequential(*layers).to(DTYPE)

    def measure(members) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == interrupted_at:
            raise KeyboardInterrupt
        return members.params["0.bias"].sum(1)

    options = {
        "seeds": [1, 2], "optimizer": adam(), "learning_rate": 0.01, "batch_size": 8, "steps": 20, "record_every": 1,
        "validation": data, "snapshots": [2, 10], "measures": {"sum": measure},
    }  # fmt: skip
    calls = -1000
    whole = population(make, data, **options)
    calls = 0
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        population(make, data, checkpoint=tmp_path / "run.pt", **options)
    assert torch.equal(torch.get_rng_state(), before)
    made = calls
    resumed = population(make, data, checkpoint=tmp_path / "run.pt", **options)
    assert calls == made + 21 - (interrupted_at - 1)  # nothing was measured twice, and the rest once
    assert_same_values(whole.member(1), resumed.member(1), rtol=0, atol=0)
    assert_same_values(whole.best.module(0), resumed.best.module(0), rtol=0, atol=0)
    assert_same_values(whole.snapshots[2].module(0), resumed.snapshots[2].module(0), rtol=0, atol=0)
    for name in whole.record.columns:
        np.testing.assert_array_equal(whole.record[name], resumed.record[name])
    with pytest.raises(BadInput, match="belongs to another run"):
        population(make, data, checkpoint=tmp_path / "run.pt", **{**options, "learning_rate": 0.02})


def test_a_time_budget_is_an_outcome_and_the_run_goes_on_later(data, tmp_path):
    options = {"seeds": [1, 2], "steps": 30, "checkpoint": tmp_path / "run.pt"}
    first = population(mlp, data, seconds=0.0, **options)
    assert [outcome for outcome, _ in first.outcomes] == [Outcome.OUT_OF_TIME] * 2
    rest = population(mlp, data, **options)
    assert rest.steps == 30
    assert_same_values(rest.member(1), population(mlp, data, seeds=[1, 2], steps=30).member(1), rtol=0, atol=0)


def test_inputs_may_be_a_tuple_or_a_mapping(data):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(2, 3, dtype=DTYPE), nn.Linear(3, 3, dtype=DTYPE)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.left(a) + self.right(b)

    x, y = data
    options = {"seeds": [1, 2], "batch_size": 8, "steps": 9, "validation": None}
    by_place = population(Two, ((x[:, :2], x[:, 2:]), y), **options)
    by_name = population(Two, ({"b": x[:, 2:], "a": x[:, :2]}, y), **options)
    assert_same_values(by_place.member(1), by_name.member(1), rtol=0, atol=0)


def test_equal_seeds_pair_members_and_one_integer_gives_independent_ones(data):
    paired = population(mlp, data, seeds=[9, 9], learning_rate=[0.1, 0.1], batch_size=8, steps=5)
    assert torch.equal(paired.params["0.weight"][0], paired.params["0.weight"][1])
    derived = population(mlp, data, size=2, seeds=4, batch_size=8, steps=5)
    assert not torch.equal(derived.params["0.weight"][0], derived.params["0.weight"][1])
    again = population(mlp, data, size=1, seeds=[derived.seeds[1]], batch_size=8, steps=5)
    assert_same_values(derived.member(1), again.member(0), **CLOSE)


def test_the_modules_given_are_never_written_to(data):
    nets = [normed().eval(), normed().eval()]
    before = [deepcopy(net.state_dict()) for net in nets]
    population(nets, data, batch_size=8, steps=5)
    for net, values in zip(nets, before, strict=True):
        assert not net.training
        assert all(torch.equal(value, values[name]) for name, value in net.state_dict().items())


def test_one_against_the_rest_counts_signs_of_each_sample(data):
    x, labels = data
    rows = 2 * F.one_hot(labels, 3).to(DTYPE) - 1
    subsets = [torch.arange(10), torch.arange(10, 37)]
    done = population(
        mlp, (x, rows), size=2, loss=F.mse_loss, subsets=subsets, batch_size=4, steps=3, measure_train=True
    )
    for index, subset in enumerate(subsets):
        with torch.no_grad():
            signs = (done.member(index)(x[subset]) * rows[subset] > 0).to(DTYPE).mean()
        assert done.record.last("train_accuracy")[index] == pytest.approx(float(signs), abs=1e-12)
        assert done.record["accuracy"].shape == (len(done.record), 2)


def test_evaluation_is_each_members_own_in_evaluation_mode(data):
    trained = population(normed, data, seeds=[1, 2], batch_size=8, steps=6)
    scores = trained.evaluate(data)
    for index in (0, 1):
        outputs = trained.member(index)(data[0])
        assert float(scores["loss"][index]) == pytest.approx(F.cross_entropy(outputs, data[1]).item(), abs=1e-12)
        assert float(scores["accuracy"][index]) == float((outputs.argmax(1) == data[1]).double().mean())


BAD = {
    "empty": ({"data": (torch.empty(0, 5, dtype=DTYPE), torch.empty(0))}, "the training data is empty"),
    "lengths": ({"data": (torch.zeros(3, 5, dtype=DTYPE), torch.zeros(4))}, "3 inputs and 4 targets"),
    "not finite": ({"data": (torch.full((3, 5), math.nan, dtype=DTYPE), torch.zeros(3))}, "15 NaN or infinite values"),
    "dtype": ({"data": (torch.zeros(3, 5), torch.zeros(3).long())}, "the inputs are torch.float32"),
    "rates": ({"learning_rate": torch.tensor([0.1, 0.2, 0.3])}, "seeds says 2, learning_rate says 3"),
    "size": ({"size": 3}, "size says 3, seeds says 2"),
    "rate": ({"learning_rate": math.inf}, "learning_rate has 1 NaN or infinite values"),
    "matrix": ({"learning_rate": torch.ones(2, 2)}, r"learning_rate has shape \(2, 2\)"),
    "steps": ({"steps": None}, "give either steps or epochs"),
    "both": ({"epochs": 3}, "give either steps or epochs"),
    "negative": ({"steps": -1}, "a run makes 0 or more steps"),
    "batch": ({"batch_size": 0}, "a batch has at least 1 sample"),
    "noise": ({"label_noise": 1.5}, r"a fraction of labels in \[0, 1\], got 1.5"),
    "subset": ({"subsets": [torch.tensor([40]), torch.tensor([0])]}, "the subset of member 0"),
    "no subset": ({"subsets": [torch.tensor([1]), torch.tensor([], dtype=torch.long)]}, "the subset of member 1"),
    "snapshot": ({"snapshots": [99]}, r"snapshots are asked for at steps \[99\]"),
    "width": ({"nets": [mlp(), mlp()], "width": [3, 4]}, "these modules have their widths already"),
    "others": ({"nets": [mlp(), Tied()]}, "members differ in architecture"),
    "frozen": ({"nets": [mlp().requires_grad_(False)] * 2}, "no trainable parameters"),
    "batch norm": ({"nets": normed, "batch_size": [4, 8]}, "layer '1' normalises over the batch"),
}


@pytest.mark.parametrize("case", BAD)
def test_misuse_is_told_at_the_door(case, data):
    changed, text = BAD[case]
    arguments = {"nets": mlp, "data": data, "seeds": [1, 2], "steps": 2} | changed
    with pytest.raises(BadInput, match=text):
        population(arguments.pop("nets"), arguments.pop("data"), **arguments)


def test_nothing_that_says_how_many(data):
    with pytest.raises(BadInput, match="nothing says how many members there are"):
        population(mlp, data, steps=1)


def test_a_forward_pass_that_branches_on_values_is_refused_with_advice(data):
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3, dtype=DTYPE)

        def forward(self, x: Tensor) -> Tensor:
            out = self.layer(x)
            return out if out.sum() > 0 else -out

    with pytest.raises(BadInput, match="cannot be batched over members"):
        population(Branching, data, seeds=[1, 2], steps=1)
