"""PickScore against its formula, on features of the raw model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.rewards.base import Reward, build_reward
from tests.pipelines.rewards import tiny
from tests.pipelines.rewards.test_clip import A_RED_CAT, raw_features

IMAGES = tiny.pictures(4)


def _built(folder: Path, **options: object) -> Reward:
    return build_reward("pickscore", {"model": str(folder), "processor": str(folder), "device": "cpu", **options})


@pytest.mark.parametrize(("options", "divisor"), [({}, 26.0), ({"divisor": 1.0}, 1.0)])
def test_the_formula(clip_folder: Path, options: dict[str, float], divisor: float) -> None:
    """The tiny model's logit scale is 3."""
    seen, read = raw_features(clip_folder, IMAGES, [A_RED_CAT])
    golden = np.exp(3.0) * (seen @ read[0]) / divisor
    scores = _built(clip_folder, **options).score(list(IMAGES), ["a red cat"] * 4, [{}] * 4)
    np.testing.assert_allclose([score.value for score in scores], golden, rtol=1e-4)
    assert np.ptp(golden) > 0.1 * abs(golden).max()


def test_a_video_is_the_mean_of_its_frames(clip_folder: Path) -> None:
    reward = _built(clip_folder, frames=4)
    alone = [score.value for score in reward.score(list(IMAGES), ["red"] * 4, [{}] * 4)]
    assert reward.score([IMAGES], ["red"], [{}])[0].value == pytest.approx(np.mean(alone), abs=1e-5)


def test_the_divisor_is_in_the_version_and_positive(clip_folder: Path) -> None:
    assert _built(clip_folder).version != _built(clip_folder, divisor=1.0).version
    with pytest.raises(ValueError, match=r"reward\.options\.divisor must be above 0, got 0"):
        _built(clip_folder, divisor=0)
