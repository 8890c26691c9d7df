"""Reward of focus: the variance of the Laplacian.

Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy: a comparative study" (ICPR 2000). It rises with every
edge, and with noise just as well: a picture of noise is the sharpest there is.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from pipelines.rewards.base import Media, Reward
from pipelines.rewards.frames import FrameReward

VERSION = "1"
"""Bump whenever a sample's score can change: stored scores name the version that made them."""

LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of R, G and B (ITU-R BT.601)."""


def laplacian_variance(frame: Media) -> float:
    """Variance over all pixels of the Laplacian of the luma, 0..255, of a frame (H, W, 3) uint8.

    The kernel is (0 1 0; 1 -4 1; 0 1 0). Beyond the border the frame is mirrored about its outermost pixels, as OpenCV does.
    """
    return float(ndimage.laplace(frame @ LUMA, mode="mirror").var())


def sharpness() -> Reward:
    """Variance of the Laplacian, 0 for a flat frame; of a video, the mean over its frames."""
    return FrameReward("sharpness", VERSION, laplacian_variance)
