"""Variance of the Laplacian, against closed forms and against the definition written out."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from pipelines.rewards.base import REWARDS
from pipelines.rewards.sharpness import laplacian_variance

H, W = 12, 16
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (H, W, 3)).astype(np.uint8)
CHECKERS = np.repeat((255 * (np.indices((H, W)).sum(0) % 2)).astype(np.uint8)[..., None], 3, -1)


def by_definition(frame: NDArray[np.uint8]) -> float:
    """Luma, mirrored about the border, its four neighbours less four times itself, pixel by pixel."""
    luma = 0.299 * frame[..., 0].astype(float) + 0.587 * frame[..., 1] + 0.114 * frame[..., 2]
    wide = np.pad(luma, 1, mode="reflect")
    laplacian = [
        wide[i - 1, j] + wide[i + 1, j] + wide[i, j - 1] + wide[i, j + 1] - 4 * wide[i, j]
        for i in range(1, len(wide) - 1)
        for j in range(1, wide.shape[1] - 1)
    ]
    return float(sum((x - sum(laplacian) / len(laplacian)) ** 2 for x in laplacian) / len(laplacian))


@pytest.mark.parametrize("frame", [NOISE, CHECKERS, NOISE[:1], NOISE[:2, :2]], ids=["noise", "checkers", "row", "2x2"])
def test_the_definition(frame: NDArray[np.uint8]) -> None:
    if len(frame) > 1:
        assert laplacian_variance(frame) == pytest.approx(by_definition(frame), rel=1e-12)
    else:  # NumPy does not mirror what has no inside
        assert laplacian_variance(frame) == pytest.approx(by_definition(np.repeat(frame, 3, 0)), rel=1e-12)


def test_a_flat_frame_is_not_sharp() -> None:
    assert laplacian_variance(np.full((H, W, 3), (200, 30, 77), np.uint8)) == pytest.approx(0, abs=1e-20)


def test_checkers_are_as_sharp_as_can_be() -> None:
    """All four neighbours are 255 away, at the border too: the Laplacian is +-4 * 255, half of each, mean 0."""
    assert laplacian_variance(CHECKERS) == pytest.approx((4 * 255) ** 2)
    assert laplacian_variance(NOISE) < (4 * 255) ** 2


def test_a_ramp_has_only_its_ends() -> None:
    """Slope s inside: 0. At either end both neighbours are s away to one side: +-2s in 2 of W columns, mean 0."""
    ramp = np.broadcast_to((7 * np.arange(W, dtype=np.uint8))[:, None], (H, W, 3))
    assert laplacian_variance(ramp) == pytest.approx(2 * (2 * 7) ** 2 / W)


@pytest.mark.parametrize(("channel", "weight"), [(0, 0.299), (1, 0.587), (2, 0.114)])
def test_green_counts_most(channel: int, weight: float) -> None:
    one = np.zeros_like(CHECKERS)
    one[..., channel] = CHECKERS[..., channel]
    assert laplacian_variance(one) == pytest.approx((4 * 255 * weight) ** 2)


def test_blur_lowers_it() -> None:
    blurred = [ndimage.gaussian_filter(NOISE, sigma, axes=(0, 1)) for sigma in (0, 0.5, 1, 2)]
    values = [laplacian_variance(frame) for frame in blurred]
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0] / 100


def test_built_by_name_for_images_and_videos() -> None:
    reward = REWARDS.build("sharpness")
    scores = reward.score([CHECKERS, np.stack([CHECKERS, np.zeros_like(CHECKERS)])], ["", ""], [{}, {}])
    assert [s.value for s in scores] == pytest.approx([1020**2, 1020**2 / 2])
    assert (reward.name, reward.version) == ("sharpness", "1")
