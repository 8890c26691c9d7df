"""The aesthetic predictor against its formula, on features of the raw model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.rewards.base import Reward, build_reward
from tests.pipelines.rewards import tiny
from tests.pipelines.rewards.test_clip import raw_features

IMAGES = tiny.pictures(4)
SIZES = (8, 6, 5, 4, 3, 1)


def _built(folder: Path, head: Path, **options: object) -> Reward:
    return build_reward("aesthetic", {"model": str(folder), "head": str(head), "device": "cpu", **options})


def test_the_formula(clip_folder: Path, tmp_path: Path) -> None:
    head = tmp_path / "head.safetensors"
    golden = tiny.head_value(tiny.save_head(head, SIZES), raw_features(clip_folder, IMAGES, [[54, 55]])[0])
    reward = _built(clip_folder, head, frames=2)
    values = [score.value for score in reward.score([*IMAGES, IMAGES], ["whatever"] * 5, [{}] * 5)]
    np.testing.assert_allclose(values[:4], golden, atol=1e-4)
    assert values[4] == pytest.approx((golden[1] + golden[3]) / 2, abs=1e-4)
    assert np.ptp(golden) > 0.1
    assert _built(clip_folder, head).version != reward.version


def test_another_head_is_another_version(clip_folder: Path, tmp_path: Path) -> None:
    heads = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for seed, head in enumerate(heads):
        tiny.save_head(head, SIZES, seed)
    first, second = (_built(clip_folder, head).version for head in heads)
    assert first != second


def test_a_head_for_another_clip(clip_folder: Path, tmp_path: Path) -> None:
    tiny.save_head(tmp_path / "head.safetensors", (768, 1))
    with pytest.raises(ValueError, match=r"is of another model: layers\.0 is \(1, 768\) and \(1,\), its input has 8 numbers"):
        _built(clip_folder, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=r"reward 'aesthetic' cannot be built with options .* missing 1 required .*'head'"):
        build_reward("aesthetic", {"model": str(clip_folder)})
