"""Plain functions as rewards: which import paths are functions that score, their names, versions and numbers."""

from __future__ import annotations

import hashlib
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opgrpo_data.ids import canonical_json
from pipelines.rewards.base import Reward, Score, build_reward
from pipelines.rewards.function import scores_by_itself
from pipelines.rewards.judge import judge
from tests.pipelines import bad_rewards, plain_rewards

HERE = "tests.pipelines.plain_rewards"
PICTURES = [np.full((2, 2, 3), level, np.uint8) for level in (0, 51, 255)]


def hashed(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def built(function: str, **options: Any) -> Reward:
    return build_reward(f"{HERE}:{function}", options)


def test_a_function_needs_no_registration() -> None:
    reward = built("warmth")
    assert reward.name == "warmth"
    assert reward.version == hashed(Path(plain_rewards.__file__).read_bytes())
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 255
    video = np.stack([red, red, np.zeros_like(red)])
    assert reward.score([red, video, PICTURES[1]], [""] * 3, [{}] * 3) == [Score(1.0, {}), Score(2 / 3, {}), Score(0.0, {})]


def test_options_go_into_each_call_and_into_the_version() -> None:
    plain, scaled = built("named"), built("named", scale=2.0)
    assert plain.version == "7"
    assert scaled.version == f"7-{hashed(canonical_json({'scale': 2.0}).encode())}"
    values = [[score.value for score in reward.score(PICTURES, [""] * 3, [{}] * 3)] for reward in (plain, scaled)]
    assert values[0] == pytest.approx([0.0, 0.2, 1.0])
    assert values[1] == pytest.approx([0.0, 0.4, 2.0])
    assert all(type(value) is float for value in values[0])


def test_scores_pass_as_they_are() -> None:
    assert built("detailed").score(PICTURES[:1], ["night"], [{}]) == [Score(0.0, {"prompt": "night"})]


def test_an_edit_of_the_file_is_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    text = "def half(media, prompts, metadata):\n    return [0.5 for _ in media]\n"
    versions = []
    for number, edited in enumerate((text, text + "# as good as before\n", text)):
        (tmp_path / f"edited_{number}.py").write_text(edited)
        versions.append(build_reward(f"edited_{number}:half", {}).version)
    assert versions == [hashed(text.encode()), hashed((text + "# as good as before\n").encode()), hashed(text.encode())]


def test_a_function_without_a_file_must_name_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("from_nowhere", None))
    exec("def half(media, prompts, metadata):\n    return [0.5 for _ in media]\n", module.__dict__)
    monkeypatch.setitem(sys.modules, "from_nowhere", module)
    with pytest.raises(ValueError, match=r"the reward function half has no source file .* give it an attribute version"):
        build_reward("from_nowhere:half", {})
    module.half.version = "1"
    assert build_reward("from_nowhere:half", {}).version == "1"


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (
            "warmth",
            {"scale": 2},
            r"warmth cannot be called with options {'scale': 2}: got an unexpected keyword argument 'scale'",
        ),
        ("warmth", {"prompts": 2}, "warmth cannot be called with options .*: multiple values for argument 'prompts'"),
        ("unversioned", {}, "the attribute version of unversioned is 3: make it a text"),
    ],
)
def test_what_is_refused_at_once(function: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(function, **options)


def test_what_is_no_number_is_an_error_of_the_sample() -> None:
    judged = judge(built("textual"), PICTURES[:2], ["", ""], [{}, {}])
    assert [one.error for one in judged] == ["TypeError: the reward returned '1.0' for a sample: return a number"] * 2


def test_factories_stay_factories() -> None:
    def short(media: Any, prompts: Any) -> None: ...

    def shuffled(prompts: Any, media: Any, metadata: Any) -> None: ...

    def unread(media: Any, _prompts: Any, _metadata: Any, scale: float = 1) -> None: ...

    factories = [plain_rewards.three_options, plain_rewards.traced, bad_rewards.moody, bad_rewards.Moody, short, shuffled]
    assert not any(scores_by_itself(found) for found in factories)
    assert scores_by_itself(unread)
    assert scores_by_itself(plain_rewards.warmth)
    assert built("three_options", url="u", model="m", size=3).name == "u-m-3"
