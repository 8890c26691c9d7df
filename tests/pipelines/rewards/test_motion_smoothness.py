"""Smoothness of videos whose frames are flat or move by hand-made steps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.rewards.base import REWARDS, Media
from pipelines.rewards.motion_smoothness import motion_smoothness

LEVELS = st.lists(st.integers(0, 255), min_size=3, max_size=9)


def flat(*levels: int) -> Media:
    """A video of flat frames (F, 4, 6, 3)."""
    return np.broadcast_to(np.array(levels, np.uint8)[:, None, None, None], (len(levels), 4, 6, 3))


def judged(video: Media, min_motion: float = 0) -> tuple[float, float, float]:
    score = motion_smoothness(min_motion=min_motion).score([video], [""], [{}])[0]
    assert set(score.detail) == {"motion", "smoothness"}
    return score.value, score.detail["smoothness"], score.detail["motion"]


@pytest.mark.parametrize(
    ("levels", "smooth", "moved"),
    [
        ((9, 9, 9), 1, 0),
        ((0, 10, 20, 30, 40), 1, 10 / 255),  # linear in time: exactly what is interpolated
        ((0, 255, 0), 0, 1),
        ((255, 0, 255, 0, 255), 0, 1),
        ((0, 51, 0), 1 - 51 / 255, 51 / 255),
        ((0, 0, 51), 1 - 25.5 / 255, 25.5 / 255),
        ((10, 10, 10, 255), 1, 245 / 3 / 255),  # the last frame of an even number has no right neighbour
        ((0, 0, 0, 102, 0), 1 - 51 / 255, 51 / 255),  # mean over the judged frames 1 (perfect) and 3 (off by 102)
    ],
)
def test_flat_frames_by_hand(levels: tuple[int, ...], smooth: float, moved: float) -> None:
    assert judged(flat(*levels)) == pytest.approx((smooth, smooth, moved))


@given(levels=LEVELS)
def test_the_definition(levels: list[int]) -> None:
    odd = range(1, len(levels) - 1, 2)
    smooth = 1 - sum(abs(levels[t] - (levels[t - 1] + levels[t + 1]) / 2) for t in odd) / len(odd) / 255
    steps = [abs(levels[t + 1] - levels[t]) for t in range(len(levels) - 1)]
    assert judged(flat(*levels)) == pytest.approx((smooth, smooth, sum(steps) / len(steps) / 255))
    assert 0 <= smooth <= 1


def test_it_is_the_mean_over_pixels() -> None:
    """A bright line moves one of 8 columns a frame: 255 missing where it is, 127.5 too many where it was and will be."""
    video = np.zeros((5, 4, 8, 3), np.uint8)
    for t, frame in enumerate(video):
        frame[:, t] = 255
    assert judged(video) == pytest.approx((1 - (255 + 2 * 127.5) / 8 / 255, 1 - 2 / 8, 2 / 8))


def test_flicker_costs() -> None:
    still = np.random.default_rng(0).integers(64, 192, (1, 8, 8, 3)).astype(np.uint8).repeat(9, 0)
    flickering = [judged(still + (np.arange(9) % 2 * depth).astype(np.uint8)[:, None, None, None])[0] for depth in (0, 5, 60)]
    assert flickering == pytest.approx([1, 1 - 5 / 255, 1 - 60 / 255])


def test_standing_still_can_be_ruled_out() -> None:
    still, slow = flat(9, 9, 9, 9, 9), flat(0, 1, 2, 3, 4)
    assert judged(still) == (1, 1, 0)
    assert judged(still, min_motion=0.001) == (0, 1, 0)
    assert judged(slow, min_motion=1 / 255) == pytest.approx((1, 1, 1 / 255))
    assert judged(slow, min_motion=0.01) == pytest.approx((0, 1, 1 / 255))


@pytest.mark.parametrize(
    ("sample", "what"),
    [(flat(1, 2, 3)[0], "an image"), (flat(1, 2), "a video of 2 frames"), (flat(1), "a video of 1 frames")],
)
def test_what_does_not_move(sample: Media, what: str) -> None:
    with pytest.raises(ValueError, match=f"motion_smoothness judges videos of at least 3 frames, got {what}: choose another"):
        REWARDS.build("motion_smoothness").score([flat(1, 2, 3), sample], ["", ""], [{}, {}])


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_min_motion_is_a_share(share: float) -> None:
    with pytest.raises(ValueError, match=f"min_motion is a share of the range of pixels, from 0 to 1, got {share}"):
        REWARDS.build("motion_smoothness", min_motion=share)


def test_built_by_name_with_its_option_in_the_version() -> None:
    reward = REWARDS.build("motion_smoothness")
    assert (reward.name, reward.version) == ("motion_smoothness", "1-min_motion0.0")
    assert REWARDS.build("motion_smoothness", min_motion=0).version == reward.version
    assert REWARDS.build("motion_smoothness", min_motion=0.02).version == "1-min_motion0.02"
