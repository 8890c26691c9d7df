"""Which frames of a video are judged, and how their values become one."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opgrpo_data.io import checked_name
from pipelines.rewards.base import Media
from pipelines.rewards.sampled import SampledReward, by_sample, by_size, checked_count, chosen, versioned

VIDEO = np.zeros((10, 2, 3, 3), np.uint8) + np.arange(10, dtype=np.uint8)[:, None, None, None]


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [5]), (2, [2, 7]), (4, [1, 3, 6, 8]), (10, [*range(10)]), (99, [*range(10)])]
)
def test_frames_are_the_middles_of_equal_parts(count: int, expected: list[int]) -> None:
    pictures, owners = chosen([VIDEO], count)
    assert [int(picture[0, 0, 0]) for picture in pictures] == expected
    assert owners == [0] * len(expected)


@given(length=st.integers(1, 40), count=st.integers(1, 50))
def test_frames_are_distinct_in_order_and_as_many_as_there_can_be(length: int, count: int) -> None:
    video = np.zeros((length, 1, 1, 3), np.uint8) + np.arange(length, dtype=np.uint8)[:, None, None, None]
    seen = [int(picture[0, 0, 0]) for picture in chosen([video], count)[0]]
    assert seen == sorted(set(seen))
    assert len(seen) == min(length, count)


def test_samples_of_every_kind_in_one_batch() -> None:
    pictures, owners = chosen([VIDEO[3], VIDEO, VIDEO[:1]], 2)
    assert [int(picture[0, 0, 0]) for picture in pictures] == [3, 2, 7, 0]
    assert owners == [0, 1, 1, 2]
    assert by_sample("abcd", owners, 3) == [["a"], ["b", "c"], ["d"]]


def test_a_sampled_reward_is_the_mean_over_its_frames() -> None:
    asked: list[str] = []

    def judge(pictures: Sequence[Media], prompts: Sequence[str]) -> list[float]:
        asked.extend(prompts)
        return [float(picture.mean()) for picture in pictures]

    reward = SampledReward("mean", "1", 2, judge)
    scores = reward.score([VIDEO[3], VIDEO], ["one", "two"], [{}, {}])
    assert asked == ["one", "two", "two"]
    assert [score.value for score in scores] == [3.0, 4.5]
    assert [score.detail for score in scores] == [{"frames": [3.0]}, {"frames": [2.0, 7.0]}]
    assert reward.score([], [], []) == []


def test_pictures_are_stacked_by_size() -> None:
    small, wide = VIDEO[0], np.ones((2, 4, 3), np.uint8)
    stacks = list(by_size([small, wide, small + 2]))
    assert [indices for indices, _ in stacks] == [[0, 2], [1]]
    np.testing.assert_array_equal(stacks[0][1], np.stack([small, small + 2]))
    assert list(by_size([])) == []


def test_versions_name_their_parts() -> None:
    versions = [versioned("1", "a", 2), versioned("2", "a", 2), versioned("1", "a", 3), versioned("1", {"a": None})]
    assert len(set(versions)) == 4
    assert versions[0] == versioned("1", "a", 2)
    assert re.fullmatch(r"1-[0-9a-f]{12}", versions[0])
    assert all(checked_name(version, "version") == version for version in versions)


def test_no_frames_are_refused() -> None:
    assert checked_count(1) == 1
    with pytest.raises(
        ValueError, match=r"reward\.options\.frames is how many frames of a video are judged, at least 1, got 0"
    ):
        checked_count(0)
