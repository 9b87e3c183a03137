import math

import pytest
import torch

from corollary.base.errors import BadInput
from corollary.data import digits
from corollary.verify.keypoints import KeyPoints, difference_of_gaussians, sift
from corollary.verify.saliency import FeatureMap, saliency_map, saliency_maps


def blob(height: int, width: int, row: float, column: float, spread: float) -> torch.Tensor:
    """A Gaussian spot of height one on black."""
    rows, columns = torch.arange(height)[:, None] - row, torch.arange(width) - column
    return torch.exp(-(rows**2 + columns**2) / (2 * spread**2))


def one_point(x: float, y: float, size: float):
    """A detector that always finds the same key point."""

    def detect(images):
        one = torch.ones(len(images), dtype=images.dtype)
        return KeyPoints(torch.arange(len(images)), x * one, y * one, size * one, 0.5 * one)

    return detect


@pytest.mark.parametrize("detector", ["dog", "sift"])
def test_the_map_peaks_at_a_spot_off_the_diagonal(detector):
    if detector == "sift":
        pytest.importorskip("cv2")
    image = torch.zeros(1, 28, 28)
    image[0, 6:9, 19:22] = 1.0
    found = saliency_map(image, detector)
    assert divmod(int(found.map().argmax()), 28) == (7, 20)
    # The middle of the spot is the centre of pixel (7, 20); a tenth of a pixel is one and a half of the enlarged ones.
    assert found.points[0, :2].tolist() == pytest.approx([20.0, 7.0], abs=0.1)


def test_a_blob_twice_as_wide_gives_a_key_point_twice_as_large():
    sizes = []
    for spread in (4.0, 8.0):
        points = difference_of_gaussians(blob(128, 96, 70.3, 40.6, spread)[None])
        largest = int(points.response.argmax())
        assert float(points.y[largest]) == pytest.approx(70.3, abs=0.2)
        assert float(points.x[largest]) == pytest.approx(40.6, abs=0.2)
        sizes.append(float(points.size[largest]))
    # An octave apart the computation repeats on every second pixel; the blur the input has already makes 1 % of it.
    assert sizes[1] / sizes[0] == pytest.approx(2.0, abs=0.06)
    # G_{k s} - G_s answers a spot of spread w most at s = w / sqrt(k), k = 2^(1/3); its size is twice that.
    assert sizes[1] == pytest.approx(2 * 8.0 / 2 ** (1 / 6), rel=0.05)


def test_an_edge_and_a_flat_image_have_no_key_points():
    edge = torch.zeros(1, 28, 28)
    edge[..., 14:] = 1.0
    for image in (edge, torch.full((1, 28, 28), 0.3)):
        found = saliency_map(image)
        assert found.components.shape == (1, 28, 28)
        assert len(found.points) == 0
        assert torch.equal(found.map(), torch.full((28, 28), 1 / 784))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distributions_sum_to_one(dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12  # hundreds of terms, rounded each
    for found in saliency_maps(digits(dtype, image=True).test.x[:5]):
        assert found.components.dtype == dtype
        torch.testing.assert_close(found.components.sum((1, 2)), torch.ones(len(found.weights), dtype=dtype))
        assert float(found.weights.sum()) == pytest.approx(1.0, abs=tolerance)
        assert float(found.map().sum()) == pytest.approx(1.0, abs=tolerance)
        assert bool((found.weights.diff() <= 0).all())


def test_one_key_point_gives_its_gaussian():
    # In enlarged pixels the point lies at (67, 37) and spreads by 15 + 15: 4 and 2 pixels of the image, and 2.
    found = saliency_map(torch.rand(1, 8, 8, dtype=torch.float64), one_point(67.0, 37.0, 15.0))
    wanted = blob(8, 8, 2.0, 4.0, 2.0).double()
    torch.testing.assert_close(found.components[0], wanted / wanted.sum(), rtol=1e-6, atol=0)
    assert found.points[0].tolist() == pytest.approx([4.0, 2.0, 1.0, 0.5])
    assert int(found.top(1)[0]) == 2 * 8 + 4


def test_an_image_that_is_not_small_is_not_enlarged():
    found = saliency_map(torch.rand(1, 50, 60, dtype=torch.float64), one_point(40.0, 10.0, 5.0), sigma=0.0)
    wanted = blob(50, 60, 10.0, 40.0, 5.0).double()
    torch.testing.assert_close(found.map(), wanted / wanted.sum(), rtol=1e-6, atol=1e-12)


def test_rows_and_columns_are_treated_alike():
    image = digits(torch.float64, image=True).test.x[3, 0]
    torch.testing.assert_close(saliency_map(image.T).map(), saliency_map(image).map().T, rtol=1e-6, atol=1e-9)


def test_images_together_are_as_alone():
    images = digits(torch.float64, image=True).test.x[:4]
    for together, image in zip(saliency_maps(images), images, strict=True):
        alone = saliency_map(image)
        torch.testing.assert_close(together.map(), alone.map())
        torch.testing.assert_close(together.points, alone.points)


def test_only_the_strongest_are_kept():
    image = digits(image=True).test.x[0]
    every, two = saliency_map(image), saliency_map(image, most=2)
    assert len(every.weights) > 2
    torch.testing.assert_close(two.points, every.points[:2])
    assert float(two.weights.sum()) == pytest.approx(1.0)


def test_colours_weigh_by_luminance():
    grey = blob(20, 20, 8.0, 12.0, 2.0)
    green = torch.stack([0 * grey, grey, 0 * grey])
    torch.testing.assert_close(saliency_map(green).map(), saliency_map(0.587 * grey).map(), rtol=1e-4, atol=1e-7)


def test_top_and_uniform():
    uniform = FeatureMap.uniform(3, 4, torch.zeros(1))
    assert uniform.map().sum() == pytest.approx(1.0)
    assert sorted(uniform.top(100).tolist()) == list(range(12))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.full((1, 8, 8), 1.5), "lie outside"),
        (torch.full((1, 8, 8), math.nan), "lie outside"),
        (torch.zeros(1, 8, 8, dtype=torch.float16)[..., :0], "images are"),
    ],
)
def test_what_is_no_image_is_refused(image, words):
    with pytest.raises(BadInput, match=words):
        saliency_map(image)


@pytest.mark.peer
def test_agrees_with_opencv():
    pytest.importorskip("cv2")
    images = torch.nn.functional.interpolate(digits(image=True).test.x[:30], scale_factor=15, mode="bilinear")[:, 0]
    ours, theirs = difference_of_gaussians(images), sift(images)
    near = 0
    for number in range(len(theirs.image)):
        rows = ours.image == theirs.image[number]
        distance = torch.hypot(ours.x[rows] - theirs.x[number], ours.y[rows] - theirs.y[number])
        near += bool((distance < 4).any())  # pixels of 120; OpenCV doubles the image first
    assert near >= 0.9 * len(theirs.image)
