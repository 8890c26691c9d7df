"""Rewards of file size: how small, or how large, a JPEG a sample makes.

Black et al., "Training Diffusion Models with Reinforcement Learning" (DDPO, arXiv 2305.13301), section 5.1; Flow-GRPO has
them too. Nobody wants such pictures, but these rewards need no model and make no mistakes: they tell whether training works.
"""

from __future__ import annotations

import io

from PIL import Image

from pipelines.rewards.base import Media, Reward
from pipelines.rewards.frames import FrameReward

VERSION = "1"
"""Bump whenever a sample's score can change: stored scores name the version that made them."""

QUALITY = 95


def kilobytes(frame: Media) -> float:
    """Size of a frame (H, W, 3) uint8 as a JPEG of quality 95 by Pillow's defaults, in kB (1000 bytes)."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=QUALITY)
    return buffer.tell() / 1000


def compressibility() -> Reward:
    """Minus the kB of the JPEG; of a video, the mean over its frames.

    Flow-GRPO divides this by 500, which group-normalised advantages do not see.
    """
    return FrameReward("jpeg_compressibility", VERSION, lambda frame: -kilobytes(frame))


def incompressibility() -> Reward:
    """The kB of the JPEG; of a video, the mean over its frames."""
    return FrameReward("jpeg_incompressibility", VERSION, kilobytes)
