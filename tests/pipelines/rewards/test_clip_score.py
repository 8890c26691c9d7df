"""CLIPScore against its formula, on features of the raw model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.rewards.base import build_reward
from tests.pipelines.rewards import tiny
from tests.pipelines.rewards.test_clip import A_RED_CAT, raw_features

RED = [54, 53, 55]
IMAGES = tiny.pictures(6)


def test_the_formula(clip_folder: Path) -> None:
    reward = build_reward("clip_score", {"model": str(clip_folder), "device": "cpu"})
    seen, read = raw_features(clip_folder, IMAGES, [A_RED_CAT, RED])
    cosines = (seen * read[[0, 1] * 3]).sum(-1)
    golden = 2.5 * np.maximum(cosines, 0)
    assert (cosines < 0).any()  # else the maximum is not tested
    assert (cosines > 0.1).any()
    scores = reward.score(list(IMAGES), ["a red cat", "red"] * 3, [{}] * 6)
    np.testing.assert_allclose([score.value for score in scores], golden, atol=1e-5)
    assert all(score.detail == {"frames": [score.value]} for score in scores)


def test_a_video_is_the_mean_of_its_frames(clip_folder: Path) -> None:
    reward = build_reward("clip_score", {"model": str(clip_folder), "frames": 2, "device": "cpu"})
    alone = [score.value for score in reward.score(list(IMAGES), ["red"] * 6, [{}] * 6)]
    video, image = reward.score([IMAGES, IMAGES[0]], ["red", "red"], [{}, {}])
    assert video.value == pytest.approx((alone[1] + alone[4]) / 2, abs=1e-5)  # middles of two halves of six
    assert image.value == pytest.approx(alone[0], abs=1e-5)
    assert len(video.detail["frames"]) == 2


def test_the_prefix_stands_before_every_prompt(clip_folder: Path) -> None:
    options = {"model": str(clip_folder), "device": "cpu"}
    prefixed, plain = build_reward("clip_score", {**options, "prefix": "a red "}), build_reward("clip_score", options)
    images = list(IMAGES[:3])
    ours = [score.value for score in prefixed.score(images, ["cat"] * 3, [{}] * 3)]
    assert ours == [score.value for score in plain.score(images, ["a red cat"] * 3, [{}] * 3)]


def test_versions_name_model_and_options(clip_folder: Path, tmp_path: Path) -> None:
    other = tiny.save_clip(tmp_path / "other", seed=1)
    named: list[dict[str, Any]] = [{}, {"prefix": "a "}, {"frames": 2}, {"dtype": "bfloat16"}, {"model": str(other)}]
    versions = {build_reward("clip_score", {"model": str(clip_folder), "device": "cpu", **one}).version for one in named}
    assert len(versions) == len(named)
