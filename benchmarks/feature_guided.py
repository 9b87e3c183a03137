"""Batched feature-guided search against SafeCV's scheme, one query at a time: queries a second, and pixels changed.

SafeCV (github.com/matthewwicker/SafeCV) plays the same game and asks the network about one image at a time. Its
published code does not run any more (a line of DFMCS.py does not parse, and it imports parts of OpenCV and pomegranate
that are gone), so its scheme stands for it: the same search, one image after the other and one play at a time. Nothing
else differs; the ratio says what batches are worth, and nothing about the two programs' other costs.

Run: `python benchmarks/feature_guided.py`. Uses MNIST where COROLLARY_DATA has it, else digits in its format.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from corollary.data import data_folder, digits, load
from corollary.engine import fit
from corollary.verify.game_search import Budget, TestReport, feature_guided_searches
from corollary.verify.saliency import saliency_maps

IMAGES, SIMULATIONS = 40, 20


def pictures() -> tuple[str, Tensor, Tensor, Tensor]:
    """Name, training images and labels, test images, all 28 x 28."""
    folder = data_folder()
    if folder is not None and (folder / "mnist.npz").exists():
        data = load("mnist")
        assert data.train.y is not None
        assert data.test is not None
        return "mnist", data.train.x[:20_000], data.train.y[:20_000], data.test.x[:IMAGES]
    data = digits(image=True)
    assert data.train.y is not None
    assert data.test is not None
    train, test = (nn.functional.interpolate(x, size=28, mode="bilinear") for x in (data.train.x, data.test.x[:IMAGES]))
    return "digits", train, data.train.y, test


def network() -> nn.Module:
    """Two strided convolutions and a hidden layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(1568, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def timed(search: Callable[[], list[TestReport]]) -> tuple[float, float, float]:
    """Queries a second, median pixels changed and mean queries an image."""
    start = time.perf_counter()
    found = search()
    seconds = time.perf_counter() - start
    queries = sum(report.queries for report in found)
    pixels = float(torch.tensor([report.severity["L0"] for report in found]).median())
    return queries / seconds, pixels, queries / len(found)


def main() -> None:
    """Search the same images both ways, with the same number of simulations."""
    torch.set_num_threads(1)
    name, x, y, images = pictures()
    net = fit(network(), (x, y), epochs=3 if name == "mnist" else 30, batch_size=128).module
    maps = saliency_maps(images)
    budget = Budget(simulations=SIMULATIONS)

    def one_at_a_time() -> list[TestReport]:
        return [
            feature_guided_searches(net, image[None], features=[features], budget=budget, parallel=1)[0]
            for image, features in zip(images, maps, strict=True)
        ]

    slow = timed(one_at_a_time)
    print(f"{name}: {IMAGES} images, {SIMULATIONS} simulations each, one thread")
    print(f"one query at a time: {slow[0]:,.0f} queries/s, median L0 {slow[1]:.0f} after {slow[2]:,.0f} queries")
    for parallel in (1, 5):
        fast = timed(lambda p=parallel: feature_guided_searches(net, images, features=maps, budget=budget, parallel=p))
        print(
            f"all images at once, {parallel} play(s) a leaf: {fast[0]:,.0f} queries/s ({fast[0] / slow[0]:.1f} times), "
            f"median L0 {fast[1]:.0f} after {fast[2]:,.0f} queries"
        )


if __name__ == "__main__":
    main()
