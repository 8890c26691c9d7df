"""Reward of smooth motion in videos, without a model.

The idea is VBench's motion smoothness (arXiv 2311.17982): drop every other frame, interpolate it from its neighbours, and
compare. VBench interpolates with a learned model, which follows what moves; here it is the mean of the two neighbours. So
this measure sees flicker, jumps and cuts, but it also counts steady motion against a video, the more the faster it is
and the sharper what moves; use it to compare videos of like motion. A still video scores 1: see `min_motion`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.rewards.base import Media, Reward, Score
from pipelines.rewards.frames import frames

VERSION = "1"
"""Bump whenever a sample's score can change: stored scores name the version that made them."""


def smoothness(video: Media) -> float:
    """1 - mean |f_t - (f_{t-1} + f_{t+1}) / 2| / 255 over the odd t that have both neighbours, in [0, 1].

    video: (F, H, W, 3) uint8, F >= 3, frames counted from 0. The last frame of an even number is not judged.
    """
    twice = [np.abs(2 * video[t].astype(np.int16) - video[t - 1] - video[t + 1]).mean() for t in range(1, len(video) - 1, 2)]
    return float(1 - np.mean(twice) / 2 / 255)


def motion(video: Media) -> float:
    """Mean absolute difference of neighbouring frames / 255, in [0, 1]. video: (F, H, W, 3) uint8, F >= 2."""
    steps = [np.abs(after.astype(np.int16) - before).mean() for before, after in itertools.pairwise(video)]
    return float(np.mean(steps) / 255)


@dataclass(frozen=True)
class MotionSmoothness:
    """Scores videos (F, H, W, 3) uint8 of at least three frames."""

    name: str
    version: str
    min_motion: float

    def score(self, media: Sequence[Media], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[Score]:
        """One score per video, whatever was asked for. Raises ValueError for an image or a shorter video."""
        return [self._score(sample) for sample in media]

    def _score(self, sample: Media) -> Score:
        video = frames(sample)
        if len(video) < 3:
            what = "an image" if sample.ndim == 3 else f"a video of {len(video)} frames"
            raise ValueError(f"motion_smoothness judges videos of at least 3 frames, got {what}: choose another reward for it")
        moved, smooth = motion(video), smoothness(video)
        return Score(smooth if moved >= self.min_motion else 0.0, {"motion": moved, "smoothness": smooth})


def motion_smoothness(*, min_motion: float = 0) -> Reward:
    """Smoothness in [0, 1], but 0 for a video whose `motion` is below `min_motion`: else standing still would be best.

    min_motion: mean absolute difference of neighbouring frames / 255, in [0, 1]. Raises ValueError outside of it.
    """
    if not 0 <= min_motion <= 1:
        raise ValueError(f"min_motion is a share of the range of pixels, from 0 to 1, got {min_motion}")
    return MotionSmoothness("motion_smoothness", f"{VERSION}-min_motion{float(min_motion)}", min_motion)
