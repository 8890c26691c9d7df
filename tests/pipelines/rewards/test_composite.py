"""The weighted sum of rewards: its values by hand, its version, and whose failure is whose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.rewards.base import Media, Reward, Score, build_reward
from pipelines.rewards.composite import Composite, Part
from pipelines.rewards.judge import judge
from tests.pipelines.bad_rewards import Mood, digest

HERE = "tests.pipelines.plain_rewards"
MOODY = "tests.pipelines.bad_rewards:moody"
GREY = [np.full((4, 4, 3), level, np.uint8) for level in (51, 102, 255)]
RED = np.zeros((4, 4, 3), np.uint8)
RED[..., 0] = 255


def composite(*parts: dict[str, Any]) -> Reward:
    return build_reward("composite", {"parts": list(parts)})


WARM: dict[str, Any] = {"name": f"{HERE}:warmth", "weight": 0.3}
BRIGHT: dict[str, Any] = {"name": f"{HERE}:named", "weight": 2, "options": {"scale": 0.5}}


def test_golden_sum() -> None:
    """RED: warmth 1, half its brightness 1/6: 0.3 + 2/6. Grey 51: warmth 0, 0.1: 0.2."""
    reward = composite(WARM, BRIGHT)
    scores = reward.score([RED, GREY[0]], ["a", "b"], [{}, {}])
    assert [score.value for score in scores] == pytest.approx([0.3 + 1 / 3, 0.2])
    assert scores[0].detail == {
        "parts": {"warmth": 1.0, "named": pytest.approx(1 / 6)},
        "weights": {"warmth": 0.3, "named": 2.0},
        "details": {"warmth": {}, "named": {}},
    }
    assert reward.score([], [], []) == []


def test_parts_keep_their_details(mood: Mood) -> None:
    (score,) = composite({"name": MOODY, "weight": 1}).score(GREY[:1], ["a"], [{}])
    assert score.detail["details"] == {"moody": {"height": 4}}


def test_version_covers_names_versions_weights_and_order(mood: Mood) -> None:
    moody = {"name": MOODY, "weight": 1}
    versions = [composite(*parts).version for parts in ([WARM, moody], [moody, WARM], [WARM, {**moody, "weight": 1.5}], [WARM])]
    mood.version = "2"
    versions.append(composite(WARM, moody).version)
    assert len(set(versions)) == 5
    mood.version = "1"
    assert composite(WARM, {**moody, "weight": 1.0}).version == versions[0]


def test_all_parts_get_the_batch_once(mood: Mood) -> None:
    composite({"name": MOODY, "weight": 1}, WARM).score(GREY, [""] * 3, [{}] * 3)
    assert mood.batches == [3]


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("raises", "part moody: RuntimeError: the reward server is down"),
        ("nan", "part moody: the value is nan, not a finite number"),
    ],
)
def test_a_part_that_fails_on_a_sample_costs_only_that_sample(mood: Mood, kind: str, why: str) -> None:
    mood.kind, mood.pictures = kind, {digest(GREY[1])}
    judged = judge(composite(WARM, {"name": MOODY, "weight": 1}), GREY, [""] * 3, [{}] * 3)
    assert [one.error for one in judged] == [None, why, None]
    assert [one.value for one in judged] == [pytest.approx(0.2), None, pytest.approx(1.0)]


class Fixed:
    """Gives every sample the same value."""

    version = "1"

    def __init__(self, name: str, value: float) -> None:
        self.name = name
        self.value = value

    def score(self, media: Sequence[Media], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[Score]:
        """One score per sample."""
        return [Score(self.value, {}) for _ in media]


def test_a_sum_that_is_no_number_is_a_failure() -> None:
    reward = Composite((Part(Fixed("a", 1e308), 1e10), Part(Fixed("b", 1.0), 1.0)))
    (judged,) = judge(reward, [RED], [""], [{}])
    assert judged.error == f"the value is {math.inf}, not a finite number"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "composite needs a list of parts"),
        ("warmth", "composite needs a list of parts.*got 'warmth'"),
        ([{"name": "scene_soft"}], "a part has a name, a weight, and perhaps options, got {'name': 'scene_soft'}"),
        ([{**WARM, "wieght": 1}], "a part has a name, a weight, and perhaps options"),
        (["scene_soft"], "a part has a name, a weight, and perhaps options, got 'scene_soft'"),
        ([{**WARM, "weight": "1"}], "the weight of part .*warmth must be a finite number, got '1'"),
        ([{**WARM, "weight": True}], "must be a finite number, got True"),
        ([{**WARM, "weight": math.nan}], "must be a finite number, got nan"),
        ([WARM, WARM], "several rewards are called warmth: their values could not be told apart"),
        ([{"name": "composite", "weight": 1, "options": {"parts": [WARM]}}], "a part cannot be a composite"),
        ([{"name": f"{HERE}:traced", "weight": 1, "options": {"name": "composite", "folder": "."}}], "called composite"),
        ([{"name": "beauty", "weight": 1}], "unknown reward 'beauty'"),
        ([{**WARM, "options": {"x": 1}}], "warmth cannot be called with options"),
    ],
)
def test_what_is_no_composite(parts: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        build_reward("composite", {"parts": parts})
