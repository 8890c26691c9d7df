"""Samples as frames, and rewards that look at one frame at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.rewards.base import Media, Score


def frames(sample: Media) -> Media:
    """The frames (F, H, W, 3) of a video, or of an image, which is its own only frame.

    Raises ValueError when the sample is neither an image (H, W, 3) uint8 nor a video (F, H, W, 3) uint8, or is empty.
    """
    if sample.ndim not in (3, 4) or sample.shape[-1] != 3 or sample.dtype != np.uint8 or not sample.size:
        raise ValueError(
            f"a sample is an image (H, W, 3) or a video (F, H, W, 3) of uint8, got {sample.shape} of {sample.dtype}: "
            f"mend what wrote the media"
        )
    return sample if sample.ndim == 4 else sample[None]


@dataclass(frozen=True)
class FrameReward:
    """The mean over a sample's frames of `measure`, which takes one frame (H, W, 3) uint8."""

    name: str
    version: str
    measure: Callable[[Media], float]

    def score(self, media: Sequence[Media], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[Score]:
        """One score per sample, whatever was asked for; the detail holds the value of every frame."""
        measured = [[self.measure(frame) for frame in frames(sample)] for sample in media]
        return [Score(float(np.mean(values)), {"frames": values}) for values in measured]
