"""Reward of colour: the metric M3 of Hasler & Süsstrunk, "Measuring colourfulness in natural images" (SPIE 5007, 2003).

On their photographs 0 was called not colourful, 33 moderately, 59 quite, 109 extremely colourful. Garish noise goes beyond.
"""

from __future__ import annotations

import numpy as np

from pipelines.rewards.base import Media, Reward
from pipelines.rewards.frames import FrameReward

VERSION = "1"
"""Bump whenever a sample's score can change: stored scores name the version that made them."""


def m3(frame: Media) -> float:
    """sigma + 0.3 mu of a frame (H, W, 3) uint8, over the opponent colours rg = R - G and yb = (R + G) / 2 - B.

    sigma and mu are the lengths of the vectors (sigma_rg, sigma_yb) and (mu_rg, mu_yb): standard deviations and means
    over all pixels.
    """
    red, green, blue = np.moveaxis(frame.astype(np.float64), -1, 0)
    opponent = np.stack([red - green, (red + green) / 2 - blue])
    sigma, mu = opponent.std(axis=(1, 2)), opponent.mean(axis=(1, 2))
    return float(np.hypot(*sigma) + 0.3 * np.hypot(*mu))


def colourfulness() -> Reward:
    """M3, 0 for a grey frame; of a video, the mean over its frames."""
    return FrameReward("colourfulness", VERSION, m3)
