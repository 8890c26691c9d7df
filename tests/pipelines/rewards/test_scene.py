"""The two scene rewards: one judgement, two views."""

import json

import numpy as np
import pytest

from pipelines.embedded import scenes
from pipelines.rewards import scene as scene_reward
from pipelines.rewards.base import Reward


@pytest.mark.parametrize(("reward", "name"), [(scene_reward.strict(), "scene_strict"), (scene_reward.soft(), "scene_soft")])
def test_scores_right_and_almost_right(reward: Reward, name: str) -> None:
    assert reward.name == name
    assert reward.version
    rng = np.random.default_rng(0)
    prompts = scenes.prompts("held_out")[::4]
    specs = [scenes.Spec.parse(p.metadata) for p in prompts]
    texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
    right = reward.score([scenes.render(scenes.sample_scene(s, rng)) for s in specs], texts, metadata)
    wrong = reward.score([scenes.render(scenes.near_miss(s, rng)) for s in specs], texts, metadata)
    assert all(score.value == 1.0 and score.detail["strict"] == 1 for score in right)
    assert all(score.value == score.detail[name.removeprefix("scene_")] < 1.0 for score in wrong)
    for score, prompt in zip(right + wrong, prompts * 2, strict=True):
        assert score.detail["kind"] == prompt.metadata["kind"]
        assert isinstance(score.value, float)
        json.dumps(dict(score.detail))


def test_no_pictures_no_scores() -> None:
    assert scene_reward.strict().score([], [], []) == []
