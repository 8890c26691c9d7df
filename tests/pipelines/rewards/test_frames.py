"""Images and videos alike become frames; anything else is refused."""

import numpy as np
import pytest

from pipelines.rewards.base import Media
from pipelines.rewards.frames import FrameReward, frames

VIDEO = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3)).astype(np.uint8)


def test_an_image_is_its_only_frame() -> None:
    assert frames(VIDEO) is VIDEO
    np.testing.assert_array_equal(frames(VIDEO[0]), VIDEO[:1])


@pytest.mark.parametrize(
    "sample",
    [
        VIDEO[0, 0],
        VIDEO[None],
        VIDEO[0].astype(np.float32),
        VIDEO[0, :, :, :1],
        np.moveaxis(VIDEO[0], -1, 0),
        VIDEO[:0],
        VIDEO[0, :0],
    ],
    ids=["row", "batch", "floats", "grey", "channels first", "no frame", "no pixel"],
)
def test_what_is_no_sample(sample: Media) -> None:
    with pytest.raises(ValueError, match=r"a sample is an image \(H, W, 3\) or a video \(F, H, W, 3\) of uint8, got \("):
        frames(sample)


def test_a_frame_reward_is_the_mean_over_frames() -> None:
    reward = FrameReward("brightness", "1", lambda frame: float(frame.mean()))
    scores = reward.score([VIDEO, VIDEO[2]], ["", ""], [{}, {}])
    assert [s.value for s in scores] == pytest.approx([VIDEO.mean(), VIDEO[2].mean()])
    assert scores[0].detail == {"frames": [float(frame.mean()) for frame in VIDEO]}
    assert scores[1].detail == {"frames": [scores[1].value]}
    assert reward.score([], [], []) == []
