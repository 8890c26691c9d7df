"""CLIPScore (Hessel et al., arXiv 2104.08718, equation 1): 2.5 max(cos(picture, text), 0)."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.rewards.base import Media, Reward
from pipelines.rewards.clip import load_clip
from pipelines.rewards.sampled import SampledReward, checked_count, versioned

VERSION = "1"
"""Bump whenever a sample's score can change: stored scores name the version that made them."""

WEIGHT = 2.5


def clip_score(
    *,
    model: str = "openai/clip-vit-large-patch14",
    prefix: str = "",
    frames: int = 4,
    dtype: str = "float32",
    device: str | None = None,
) -> Reward:
    """2.5 max(cos, 0), in [0, 2.5]; of a video, the mean over `frames` evenly spaced frames.

    model: hub id or folder of a CLIPModel; the paper took ViT-B/32. prefix: stands before every prompt; the paper says
    "A photo depicts " for captions. Raises ValueError when the model cannot be loaded.
    """
    clip = load_clip(model, dtype=dtype, device=device)

    def judge(pictures: Sequence[Media], prompts: Sequence[str]) -> list[float]:
        return [WEIGHT * max(cosine, 0.0) for cosine in clip.cosines(pictures, [prefix + prompt for prompt in prompts])]

    version = versioned(VERSION, clip.digest, prefix, checked_count(frames))
    return SampledReward("clip_score", version, frames, judge)
