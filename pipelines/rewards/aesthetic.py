"""LAION's aesthetic predictor V2 (github.com/christophschuhmann/improved-aesthetic-predictor): people's marks, 1 to 10.

A linear head on the normalised image features of CLIP ViT-L/14. Flow-GRPO takes its output as it is, and so do we; DDPO
(arXiv 2305.13301) does too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipelines.rewards.base import Media, Reward
from pipelines.rewards.clip import load_clip
from pipelines.rewards.linear_head import load_head
from pipelines.rewards.sampled import SampledReward, checked_count, versioned

VERSION = "1"
"""Bump whenever a sample's score can change: stored scores name the version that made them."""


def aesthetic(
    *,
    head: str,
    model: str = "openai/clip-vit-large-patch14",
    frames: int = 4,
    dtype: str = "float32",
    device: str | None = None,
) -> Reward:
    """The predicted mark, about 1 to 10, whatever was asked for; of a video, the mean over `frames` evenly spaced frames.

    head: the predictor's weights as a .safetensors file, layers.0, .2, .4, .6 and .7 as in the published
    sac+logos+ava1-l14-linearMSE.pth, which has to be converted once. model: hub id or folder of the CLIPModel that the head was
    trained on. Raises ValueError when one of them cannot be loaded, or they do not fit.
    """
    clip = load_clip(model, dtype=dtype, device=device)
    mark = load_head(head, clip.width, clip.loaded.device)

    @torch.inference_mode()
    def judge(pictures: Sequence[Media], _prompts: Sequence[str]) -> list[float]:
        return mark(clip.image_features(pictures))

    version = versioned(VERSION, clip.digest, mark.digest, checked_count(frames))
    return SampledReward("aesthetic", version, frames, judge)
