import math

import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.verify import game_search
from corollary.verify.black_box import PerImage, black_box
from corollary.verify.game_search import Budget, feature_guided_search, feature_guided_searches
from corollary.verify.grid_guarantee import grid_search
from corollary.verify.manipulations import PixelGrid
from corollary.verify.playouts import PATIENCE, Playouts
from corollary.verify.saliency import FeatureMap


def random(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear(image, slope, margin):
    """A classifier with log-odds `margin` at `image` and slope `slope`."""

    def predict(rows):
        first = (rows - image).flatten(1) @ slope.flatten() + margin
        return torch.stack([first, torch.zeros_like(first)], 1)

    return predict


def smooth(classes=3, pixels=64, seed=0, dtype=torch.float64):
    """A random network with two hidden layers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = (nn.Linear(pixels, 24), nn.Tanh(), nn.Linear(24, classes))
        net = nn.Sequential(nn.Flatten(), *sizes).to(dtype)
    with torch.no_grad():
        net[3].weight.mul_(4)
    return net


def test_finds_the_fewest_pixels_of_a_linear_classifier():
    image, slope = random(1, 8, 8), random(64, seed=1) - 0.5
    target = (image < 0.5).double()
    # Moving a pixel to its far end lowers the margin by so much: the best k pixels are the k largest.
    gains = (-(target - image).flatten() * slope).sort(descending=True).values
    margin = float(gains[:4].sum()) + 1e-3  # four pixels just fail, five do it
    report = feature_guided_search(linear(image, slope, margin), image, budget=Budget(simulations=400), seed=3)
    assert report.severity["L0"] == 5
    assert (report.label, report.predicted) == (0, 1)


def test_the_report_is_true():
    net, image = smooth(), random(1, 8, 8, seed=5)
    asked = 0

    def predict(rows):
        nonlocal asked
        asked += len(rows)
        return net(rows)

    report = feature_guided_search(predict, image, norm=1, budget=Budget(simulations=30))
    assert report.found
    assert asked == report.queries + 2  # the label was looked up before, and the best image's class after
    assert int(net(report.image[None]).argmax()) == report.predicted != report.label == int(net(image[None]).argmax())
    assert 0 <= float(report.image.min()) <= float(report.image.max()) <= 1
    change = (report.image - image).abs()
    wanted = {
        "L0": int((change > 0).sum()),
        "L1": float(change.sum()),
        "L2": float(change.square().sum().sqrt()),
        "Linf": float(change.max()),
    }
    assert report.severity == pytest.approx(wanted)
    assert len(report.trace) == len(report.plays) == 30
    assert bool((report.trace.diff() <= 0).all())
    assert float(report.trace[-1]) == pytest.approx(report.severity["L1"])
    assert report.value == pytest.approx(1 / report.severity["L1"])
    assert 1 < report.first_query <= report.queries
    assert report.first_severity >= report.severity["L1"]


def test_the_same_seed_gives_the_same_search():
    net, images = smooth(), random(3, 1, 8, 8)
    runs = [feature_guided_searches(net, images, budget=Budget(simulations=16), seed=seed) for seed in (1, 1, 2)]
    traces = [torch.stack([report.trace for report in run]) for run in runs]
    assert torch.equal(traces[0], traces[1])
    assert not torch.equal(traces[0], traces[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_and_probabilities_lead_to_the_same_search(dtype):
    net, image = smooth(dtype=dtype), random(1, 8, 8, dtype=dtype)
    logits = feature_guided_search(net, image, budget=Budget(simulations=8))
    probabilities = feature_guided_search(lambda rows: net(rows).softmax(1), image, budget=Budget(simulations=8))
    assert torch.equal(logits.trace, probabilities.trace)
    assert logits.queries == probabilities.queries


def test_a_saturated_softmax_is_searched_all_the_same():
    net, image = smooth(dtype=torch.float32), random(1, 8, 8, dtype=torch.float32)
    # Every probability of the label is 1 to the last bit; the others can still be told apart.
    sharp = feature_guided_search(lambda rows: (60 * net(rows)).softmax(1), image, budget=Budget(simulations=8))
    assert float((60 * net(image[None])).softmax(1).max().detach()) == 1.0
    plain = feature_guided_search(net, image, budget=Budget(simulations=8))
    assert sharp.found
    assert sharp.severity["L0"] <= 2 * plain.severity["L0"]
    assert sharp.first_query <= 2 * plain.first_query


def playouts(predict, images, **changes):
    size = images[0, 0].numel()
    options = {
        "grid": PixelGrid.of(images, "max"),
        "labels": torch.zeros(len(images), dtype=torch.int64),
        "log_mass": torch.full((len(images), 1, size), -math.log(size), dtype=torch.float64),
        "weights": torch.ones(len(images), 1, dtype=torch.float64),
        "norm": 0,
        "radius": math.inf,
        "visit": 6,
        "opponent": "cooperative",
        "generator": torch.Generator().manual_seed(0),
    }
    return Playouts(predict, **{**options, **changes})


def start(images, plays):
    numbers = torch.arange(len(images)).repeat(plays)
    levels = torch.zeros(len(numbers), images[0, 0].numel(), dtype=torch.int64)
    return levels, numbers, torch.full_like(numbers, -1)


@pytest.mark.parametrize("manipulation", ["max", 0.3])
def test_a_rejected_move_is_undone_exactly(manipulation):
    images = random(2, 3, 6, 6)
    # Every move makes the label more certain, so that each of them is taken back.
    distance = lambda rows, numbers: (rows - images[numbers]).abs().flatten(1).sum(1) + 1  # noqa: E731
    predict = PerImage(lambda rows, numbers: torch.stack([distance(rows, numbers), 0 * distance(rows, numbers)], 1))
    with black_box(predict) as box:
        game = playouts(box, images, grid=PixelGrid.of(images, manipulation))
        levels, numbers, features = start(images, 3)
        after, won = game.play(levels, numbers, features, game.original_log_odds[numbers])
    assert torch.equal(game.grid.at(after, numbers), images[numbers])
    assert not won.any()
    assert game.queries.tolist() == [1 + 3 * PATIENCE] * 2


def test_a_move_draws_new_pixels_by_the_feature():
    images = random(1, 1, 4, 4)
    mass = torch.tensor([0.9, 0.1] + [0.0] * 14, dtype=torch.float64)
    with black_box(linear(images[0], torch.ones(16).double(), 1.0)) as box:
        game = playouts(box, images, log_mass=mass.clamp(min=1e-300).log()[None, None], visit=1)
        levels, numbers, _ = start(images, 4000)
        drawn = game.draw(levels, numbers, torch.zeros_like(numbers))
        again = game.draw(drawn, numbers, torch.zeros_like(numbers))
    assert bool((drawn.sum(1) == 1).all())
    assert float(drawn[:, 0].double().mean()) == pytest.approx(0.9, abs=4 * (0.09 / 4000) ** 0.5)
    assert bool((again.sum(1) == 2).all())  # the second is never the first again
    assert bool((again[:, :2] == 1).all())


def test_levels_never_leave_their_ends():
    images = random(1, 1, 3, 3)
    with black_box(linear(images[0], torch.ones(9).double(), 1.0)) as box:
        game = playouts(box, images, grid=PixelGrid.of(images, 0.4), visit=4)
        levels, numbers, features = start(images, 50)
        for _ in range(30):
            levels = game.draw(levels, numbers, features + 1)
            assert bool((levels <= game.grid.highest).all())
            assert bool((levels >= game.grid.lowest).all())


@pytest.mark.parametrize("size", [6, 12])  # plays of few moves, and of so many that they are undone by the ten first
def test_undoing_keeps_the_wrong_class_and_needs_every_pixel(size):
    images = random(2, 1, size, size)
    slope = -(0.5 + random(size * size, seed=2)) * ((images[0] < 0.5).double() * 2 - 1).flatten()
    # On the first image every move lowers the margin, so that what is left after undoing is all needed.
    predict = linear(images[0], slope, 0.1 * size * size)
    with black_box(predict) as box:
        game = playouts(box, images[:1])
        levels, numbers, _ = start(images[:1], 5)
        pruned = game.prune(levels + 1, numbers)
        assert bool(game.ask(pruned, numbers).is_adversarial.all())
        assert bool((pruned.sum(1) < size * size).all())
        for row in range(5):
            places = pruned[row].nonzero()[:, 0]
            fewer = pruned[row].repeat(len(places), 1).scatter(1, places[:, None], 0)
            assert not game.ask(fewer, numbers[:1].expand(len(places))).is_adversarial.any()


@pytest.mark.parametrize(
    ("norm", "tau", "radius"), [(0, 1.0, 4), (1, 0.25, 0.8), (2, 0.25, 0.8), (math.inf, 0.25, 0.8)]
)
def test_partners_find_the_grid_minimum(norm, tau, radius):
    images = random(6, 1, 2, 2)
    nets = [smooth(classes=2, pixels=4, seed=seed) for seed in range(6)]
    predict = PerImage(lambda rows, numbers: torch.stack([net(rows) for net in nets])[numbers, torch.arange(len(rows))])
    found = feature_guided_searches(
        predict,
        images,
        norm=norm,
        manipulation=tau,
        radius=radius,
        visit=1,
        features=[FeatureMap.uniform(2, 2, images)] * 6,
        budget=Budget(simulations=200),
        parallel=20,
    )
    name = {0: "L0", 1: "L1", 2: "L2", math.inf: "Linf"}[norm]
    exact = [grid_search(nets[k], images[k], torch.arange(4), tau, radius, norm).severity for k in range(6)]
    assert any(math.isfinite(value) for value in exact)
    assert [report.severity[name] for report in found] == pytest.approx(exact, abs=1e-9)


def test_opponents_are_ordered():
    net, images = smooth(), random(4, 1, 8, 8)
    values = [
        torch.tensor(
            [r.mean_reward for r in feature_guided_searches(net, images, opponent=o, budget=Budget(simulations=80))]
        )
        for o in ("adversarial", "nature", "cooperative")
    ]
    assert bool((values[0] <= values[1]).all())
    assert bool((values[1] <= values[2]).all())


def test_only_a_partner_undoes_moves():
    net, image = smooth(), random(1, 8, 8)
    for opponent in ("adversarial", "nature"):
        report = feature_guided_search(net, image, opponent=opponent, budget=Budget(simulations=20))
        assert float(report.plays.min()) == report.severity["L0"]
        assert report.value == report.mean_reward == pytest.approx(float((1 / report.plays).mean()))


def test_an_input_that_is_wrong_already_has_severity_zero():
    net, image = smooth(), random(1, 8, 8)
    label = (int(net(image[None]).argmax()) + 1) % 3
    report = feature_guided_search(net, image, label, budget=Budget(simulations=20))
    assert set(report.severity.values()) == {0.0}
    assert torch.equal(report.image, image)
    assert report.queries == report.first_query == 1
    assert (report.label, report.value, len(report.trace)) == (label, math.inf, 0)


def test_what_is_not_found_is_said():
    image = random(1, 8, 8)
    report = feature_guided_search(linear(image, torch.zeros(64).double(), 1.0), image, budget=Budget(simulations=4))
    assert not report.found
    assert report.predicted is report.image is report.first_query is None
    assert set(report.severity.values()) == {math.inf}
    assert report.value == 0.0


def test_images_beyond_the_radius_do_not_count():
    image, slope = random(1, 8, 8), random(64, seed=1) - 0.5
    gains = (-((image < 0.5).double() - image).flatten() * slope).sort(descending=True).values
    predict = linear(image, slope, float(gains[:4].sum()) + 1e-3)
    for opponent in ("cooperative", "adversarial", "nature"):
        report = feature_guided_search(
            predict, image, radius=4, visit=1, opponent=opponent, budget=Budget(simulations=30)
        )
        assert not report.found


def test_budgets_end_the_search():
    net, images = smooth(), random(3, 1, 8, 8)
    for report in feature_guided_searches(net, images, budget=Budget(queries=60), parallel=4):
        assert 60 <= report.queries < 64
    for report in feature_guided_searches(net, images, budget=Budget(simulations=7), parallel=4):
        assert len(report.trace) == 7
    timed = feature_guided_searches(net, images, budget=Budget(seconds=1e-9))
    assert [report.queries for report in timed] == [1, 1, 1]


def test_pixels_are_counted_and_not_channels():
    image = random(3, 6, 6)
    report = feature_guided_search(smooth(pixels=108), image, budget=Budget(simulations=20))
    changed = (report.image != image).any(0)
    assert report.severity["L0"] == int(changed.sum()) < int((report.image != image).sum())


def test_the_module_is_left_as_it_was():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Dropout(0.5)).double().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    reports = [feature_guided_search(net, random(1, 8, 8), budget=Budget(simulations=4)) for _ in range(2)]
    assert net.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert torch.equal(reports[0].trace, reports[1].trace)  # no dropout while searching


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": torch.full((1, 8, 8), 255.0)}, "lie outside"),
        ({"norm": 3}, "norm is one of"),
        ({"visit": 0}, "visit >= 1"),
        ({"radius": -1.0}, "radius > 0"),
        ({"features": []}, "0 feature maps"),
        ({"predict": lambda rows: rows.flatten(1)[:, :1]}, "two classes or more"),
        ({"predict": lambda rows: rows.flatten(1) * math.nan}, "returned NaN"),
    ],
)
def test_what_cannot_be_used_is_refused(changes, words):
    options = {"predict": smooth(), "image": random(1, 8, 8), **changes}
    with pytest.raises(BadInput, match=words):
        feature_guided_search(options.pop("predict"), options.pop("image"), **options)


@pytest.mark.parametrize("limits", [{}, {"queries": 0}, {"seconds": -1.0}])
def test_a_budget_limits_something(limits):
    with pytest.raises(BadInput, match="a budget limits"):
        Budget(**limits)


def test_the_report_is_no_test():
    assert game_search.TestReport.__test__ is False
