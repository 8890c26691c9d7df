"""PickScore (Kirstain et al., arXiv 2305.01569, section 3): the logit of a CLIP that was fine-tuned on people's choices."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.rewards.base import Media, Reward
from pipelines.rewards.clip import load_clip
from pipelines.rewards.sampled import SampledReward, checked_count, versioned

VERSION = "1"
"""Bump whenever a sample's score can change: stored scores name the version that made them."""


def pickscore(
    *,
    model: str = "yuvalkirstain/PickScore_v1",
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    divisor: float = 26.0,
    frames: int = 4,
    dtype: str = "float32",
    device: str | None = None,
) -> Reward:
    """exp(logit_scale) cos / divisor; of a video, the mean over `frames` evenly spaced frames.

    The paper's score is that of divisor 1, about 20; 26 brings it near 1, as in Flow-GRPO. model, processor: hub ids or
    folders. Raises ValueError when they cannot be loaded, and for a divisor that is not positive.
    """
    if not divisor > 0:
        raise ValueError(f"reward.options.divisor must be above 0, got {divisor}")
    clip = load_clip(model, processor=processor, dtype=dtype, device=device)

    def judge(pictures: Sequence[Media], prompts: Sequence[str]) -> list[float]:
        return [clip.scale * cosine / divisor for cosine in clip.cosines(pictures, prompts)]

    version = versioned(VERSION, clip.digest, divisor, checked_count(frames))
    return SampledReward("pickscore", version, frames, judge)
