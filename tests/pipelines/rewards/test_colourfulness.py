"""M3 against the paper's formulas, worked out by hand for one and two colours."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.rewards.base import REWARDS, Media
from pipelines.rewards.colourfulness import m3

COLOURS = st.tuples(*[st.integers(0, 255)] * 3)


def painted(*columns: tuple[int, int, int]) -> Media:
    """A picture of four rows, one colour a column."""
    return np.broadcast_to(np.array(columns, np.uint8), (4, len(columns), 3))


@given(level=st.integers(0, 255))
def test_grey_has_no_colour(level: int) -> None:
    assert m3(painted((level,) * 3)) == 0


@given(levels=st.lists(st.integers(0, 255), min_size=1, max_size=8))
def test_grey_of_many_levels_has_no_colour(levels: list[int]) -> None:
    assert m3(painted(*[(level,) * 3 for level in levels])) == 0


@given(colour=COLOURS)
def test_one_colour_has_only_a_mean(colour: tuple[int, int, int]) -> None:
    red, green, blue = colour
    assert m3(painted(colour)) == pytest.approx(0.3 * math.sqrt((red - green) ** 2 + ((red + green) / 2 - blue) ** 2))


@given(one=COLOURS, two=COLOURS, share=st.integers(0, 5))
def test_two_colours(one: tuple[int, int, int], two: tuple[int, int, int], share: int) -> None:
    """A share p of one colour: mean p a + (1 - p) b, variance p (1 - p) (a - b)^2, for either opponent colour."""
    p = share / 5
    opponents = [(r - g, (r + g) / 2 - b) for r, g, b in (one, two)]
    means = [p * a + (1 - p) * b for a, b in zip(*opponents, strict=True)]
    variances = [p * (1 - p) * (a - b) ** 2 for a, b in zip(*opponents, strict=True)]
    expected = math.sqrt(sum(variances)) + 0.3 * math.sqrt(sum(mean**2 for mean in means))
    assert m3(painted(*[one] * share, *[two] * (5 - share))) == pytest.approx(expected, abs=1e-9)


def test_red_and_green_by_hand() -> None:
    """rg is +-255: sigma 255, mean 0. yb is 127.5 everywhere: sigma 0, mean 127.5. M3 = 255 + 0.3 * 127.5."""
    assert m3(painted((255, 0, 0), (0, 255, 0))) == pytest.approx(293.25)


def test_washing_out_lowers_it_in_proportion() -> None:
    vivid = np.random.default_rng(0).integers(0, 64, (8, 8, 3)).astype(np.uint8) * 4
    assert m3(vivid // 4) == pytest.approx(m3(vivid) / 4)


def test_built_by_name_for_images_and_videos() -> None:
    reward = REWARDS.build("colourfulness")
    picture = np.ascontiguousarray(painted((255, 0, 0), (0, 255, 0)))
    scores = reward.score([picture, np.stack([picture, np.zeros_like(picture)])], ["", ""], [{}, {}])
    assert [s.value for s in scores] == pytest.approx([293.25, 293.25 / 2])
    assert (reward.name, reward.version) == ("colourfulness", "1")
