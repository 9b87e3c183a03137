import itertools
import math

import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.verify.grid_guarantee import covering_radius, grid_guarantee, grid_search


def network(inputs, seed, classes=3):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, classes)).double()


def image_of(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(image, slope, margin):
    def predict(rows):
        first = (rows - image).flatten(1) @ slope + margin
        return torch.stack([first, torch.zeros_like(first)], 1)

    return predict


def brute_force(net, image, pixels, tau, d, norm):
    """Distances of all adversarial images, each built by hand."""
    label = int(net(image[None]).argmax())
    channels, _, width = image.shape
    places = [(c, int(p) // width, int(p) % width) for c in range(channels) for p in pixels]
    choices = []
    for place in places:
        start = float(image[place])
        values = {min(max(start + k * tau, 0.0), 1.0) for k in range(-20, 21)}
        choices.append(sorted(values))
    distances, count = [], 0
    for values in itertools.product(*choices):
        other = image.clone()
        for place, value in zip(places, values, strict=True):
            other[place] = value
        change = (other - image).abs()
        distance = {
            0: float((change > 1e-12).any(0).sum()),
            1: float(change.sum()),
            2: float(change.square().sum().sqrt()),
            math.inf: float(change.max()),
        }[norm]
        if distance <= d + 1e-9:
            count += 1
            if int(net(other[None]).argmax()) != label:
                distances.append(distance)
    return min(distances, default=math.inf), count


@pytest.mark.parametrize(("norm", "d"), [(0, 1.0), (1, 0.6), (2, 0.5), (math.inf, 0.35)])
@pytest.mark.parametrize("seed", [1, 2])
def test_every_point_is_asked_about(norm, d, seed):
    net, image = network(12, seed), image_of(2, 2, 3)
    pixels = torch.tensor([4, 1])
    found = grid_search(net, image, pixels, 0.3, d, norm)
    severity, points = brute_force(net, image, pixels, 0.3, d, norm)
    assert found.points == points
    assert found.severity == pytest.approx(severity)
    if found.image is not None:
        assert int(net(found.image[None]).argmax()) == found.predicted != found.label
        fixed = [p for p in range(6) if p not in (1, 4)]
        assert torch.equal(found.image.flatten(1)[:, fixed], image.flatten(1)[:, fixed])


def test_the_points_of_a_small_grid():
    middle = torch.full((1, 1, 2), 0.5, dtype=torch.float64)
    predict = linear(middle, torch.zeros(2, dtype=torch.float64), 1.0)
    counts = {norm: grid_search(predict, middle, torch.arange(2), 0.1, 0.2, norm).points for norm in (1, 2, math.inf)}
    assert counts == {1: 13, 2: 13, math.inf: 25}


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_the_covering_radius_is_reached_at_the_middle_of_a_cell(norm):
    middle = torch.full((4,), 0.05, dtype=torch.float64)
    assert covering_radius(0.1, 4, norm) == pytest.approx(float(torch.linalg.vector_norm(middle, ord=norm)))


@pytest.mark.parametrize("norm", [2, math.inf])
def test_verdicts_on_linear_classifiers_agree_with_the_distance(norm):
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for number in range(60):
        n = 2 + number % 3
        image = 0.4 + 0.2 * torch.rand(1, 1, n, generator=generator, dtype=torch.float64)
        slope = torch.randn(n, generator=generator, dtype=torch.float64)
        distance = float(0.4 * torch.rand((), generator=generator))
        dual = float(torch.linalg.vector_norm(slope, ord=2 if norm == 2 else 1))
        predict, constants = linear(image, slope, distance * dual), torch.tensor([dual, 0.0])
        shown = grid_guarantee(predict, constants.double(), image, torch.arange(n), 0.05, 0.23, norm)
        seen.add(shown.verdict)
        assert (shown.verdict != "safe") or distance > 0.23
        assert (shown.verdict != "unsafe") or distance <= 0.23
        assert shown.lower <= distance + 1e-9
        assert distance <= shown.upper + 1e-9
        # Points that cannot be cleared have lost at most the margin of one covering radius.
        assert shown.lower >= min(distance, 0.23) - 2 * shown.covering_radius - 1e-9
    assert seen == {"safe", "unsafe", "undecided"}


def test_points_just_outside_the_ball_are_checked_too():
    # The class changes at 0.81, within the radius 0.32 of 0.5. On the grid 0.3, 0.5, 0.7 the margin at 0.7 lasts for
    # more than the covering radius of 0.1; only the point 0.9, outside of the ball, is near enough to 0.82 to tell.
    image = torch.full((1, 1, 1), 0.5, dtype=torch.float64)
    predict = linear(image, torch.tensor([-1.0], dtype=torch.float64), 0.31)
    shown = grid_guarantee(predict, torch.tensor([1.0, 0.0]), image, torch.tensor([0]), 0.2, 0.32, math.inf)
    assert shown.verdict == "undecided"
    assert shown.lower == pytest.approx(0.3)  # 0.9 is 0.4 away, less the covering radius
    assert math.isinf(shown.upper)


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_what_is_called_safe_withstands_random_attack(norm):
    generator = torch.Generator().manual_seed(1)
    pixels, d = torch.tensor([0, 3]), 0.15
    safe = 0
    for seed in range(12):
        net, image = network(4, seed), image_of(1, 2, 2, seed=seed)
        first, second = net[1].weight[:, pixels], net[3].weight
        dual = {1: math.inf, 2: 2, math.inf: 1}[norm]
        # |N_j(x) - N_j(y)| <= sum_h |second_jh| |first_h (x - y)| since tanh is 1-Lipschitz.
        constants = second.abs() @ torch.linalg.vector_norm(first, ord=dual, dim=1)
        shown = grid_guarantee(net, constants.detach(), image, pixels, 0.02, d, norm)
        step = torch.randn(2000, 2, generator=generator, dtype=torch.float64)
        step = d * torch.rand(2000, 1, generator=generator) ** 0.5 * step
        step = step / torch.linalg.vector_norm(step, ord=norm, dim=1, keepdim=True).clamp(min=d)
        step = torch.where(torch.linalg.vector_norm(step, ord=norm, dim=1, keepdim=True) <= d, step, d * step)
        rows = image.repeat(2000, 1, 1, 1).flatten(1)
        rows[:, pixels] = (rows[:, pixels] + step).clamp(0, 1)
        with torch.no_grad():
            wrong = net(rows.reshape(-1, 1, 2, 2)).argmax(1) != net(image[None]).argmax(1)
        safe += shown.verdict == "safe"
        assert not (wrong.any() and shown.verdict == "safe")
        if wrong.any():
            nearest = torch.linalg.vector_norm((rows[wrong] - image.flatten()), ord=norm, dim=1).min()
            assert shown.lower <= float(nearest) + 1e-9
    assert safe > 0


def test_the_witness_lies_in_the_ball():
    image = torch.full((1, 1, 3), 0.5, dtype=torch.float64)
    predict = linear(image, torch.ones(3, dtype=torch.float64), 0.25)
    shown = grid_guarantee(predict, 3**0.5, image, torch.arange(3), 0.1, 0.3, 2)
    assert shown.verdict == "unsafe"
    assert int(predict(shown.witness[None]).argmax()) == shown.predicted == 1
    assert float((shown.witness - image).norm()) == pytest.approx(shown.upper)
    assert shown.lower <= 0.25 / 3**0.5 <= shown.upper <= 0.3


def test_a_misclassified_image_is_unsafe_at_distance_zero():
    image = torch.full((1, 1, 2), 0.5, dtype=torch.float64)
    predict = linear(image, torch.ones(2, dtype=torch.float64), 1.0)
    shown = grid_guarantee(predict, 1.0, image, torch.arange(2), 0.1, 0.2, 2, label=1)
    assert (shown.verdict, shown.upper, shown.lower) == ("unsafe", 0.0, 0.0)


def test_a_grid_too_coarse_for_its_margin_says_which_step_it_takes():
    image = torch.full((1, 1, 3), 0.5, dtype=torch.float64)
    predict = linear(image, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), 0.4)
    constants = torch.tensor([10.0, 0.0])  # far from tight: the margin of 0.4 is lost within 0.04
    shown = grid_guarantee(predict, constants, image, torch.arange(3), 0.1, 0.2, 2)
    assert shown.verdict == "undecided"
    assert shown.tau_needed == pytest.approx(2 * 0.04 / 3**0.5)
    assert f"a step below {shown.tau_needed:.3g}" in shown.reason


def test_constants_of_zero_prove_nothing_at_a_tie():
    image = torch.full((1, 1, 2), 0.5, dtype=torch.float64)
    shown = grid_guarantee(lambda rows: torch.zeros(len(rows), 2), 0.0, image, torch.arange(2), 0.1, 0.2, 2)
    assert shown.verdict == "undecided"


def test_a_whole_picture_is_refused_with_the_count():
    image = torch.zeros(1, 28, 28)
    with pytest.raises(BadInput, match=r"784 coordinates has .* points.*5,000,000.*within 1.4 of it.*most salient"):
        grid_guarantee(lambda rows: rows.flatten(1)[:, :2], 1.0, image, torch.arange(784), 0.1, 0.2, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pixels": torch.tensor([0, 0])}, "different numbers"),
        ({"pixels": torch.tensor([4])}, "0 to 3"),
        ({"tau": 0.0}, "a step tau"),
        ({"d": 0.0}, "d is a finite number above 0"),
        ({"norm": 0}, "norm is one of"),
        ({"lipschitz": torch.ones(5)}, "Lipschitz constant"),
        ({"lipschitz": -1.0}, "Lipschitz constant"),
        ({"image": torch.full((1, 2, 2), 2.0)}, "lie outside"),
    ],
)
def test_what_cannot_be_used_is_refused(changes, words):
    options = {"lipschitz": 1.0, "image": torch.full((1, 2, 2), 0.5), "pixels": torch.tensor([0, 1])}
    options |= {"tau": 0.1, "d": 0.2, "norm": 2}
    with pytest.raises(BadInput, match=words):
        grid_guarantee(lambda rows: rows.flatten(1)[:, :3] + torch.tensor([1.0, 0.0, 0.0]), **{**options, **changes})
