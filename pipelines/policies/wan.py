"""Wan 2.1 text-to-video (arXiv 2503.20314), from a diffusers pipeline folder or hub id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.policies.family import (
    TIMESTEPS,
    Condition,
    Network,
    latent_size,
    linear_guidance,
    scheduler_sigmas,
    standardised,
    text_length,
    to_uint8,
)
from pipelines.policies.pipeline_policy import PipelinePolicy, load_policy
from pipelines.rewards.base import Media

LONGEST_TEXT = 512


@dataclass(frozen=True)
class Wan:
    """height, width: pixels. num_frames: 4 k + 1. max_sequence_length: tokens of the UMT5 encoder."""

    height: int
    width: int
    num_frames: int
    max_sequence_length: int
    name: str = "wan"
    pipeline_class: str = "WanPipeline"
    transformer_class: str = "WanTransformer3DModel"
    vae_class: str = "AutoencoderKLWan"
    text_parts: tuple[str, ...] = ("text_encoder", "tokenizer")
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")

    @property
    def encoding(self) -> tuple[Any, ...]:
        """The options that change what `encode` gives."""
        return (self.max_sequence_length,)

    def latent_shape(self, pipeline: Any) -> tuple[int, ...]:
        """(channels, frames, height, width)."""
        config, every = pipeline.transformer.config, pipeline.vae_scale_factor_temporal
        if self.num_frames < 1 or (self.num_frames - 1) % every:
            raise ValueError(f"policy.options.num_frames {self.num_frames} must be {every} k + 1, for example {8 * every + 1}")
        height = latent_size(self.height, pipeline.vae_scale_factor_spatial, config.patch_size[1], "height")
        width = latent_size(self.width, pipeline.vae_scale_factor_spatial, config.patch_size[2], "width")
        return (config.in_channels, (self.num_frames - 1) // every + 1, height, width)

    def encode(self, pipeline: Any, prompt: str, device: torch.device) -> Condition:
        """embeds (max_sequence_length, features): zeros after the text's own tokens, and the model attends to them."""
        embeds, _ = pipeline.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=device,
        )
        return {"embeds": embeds[0]}

    def longest(self, pipeline: Any) -> Condition:
        """As long as any prompt: UMT5 pads."""
        return {"embeds": torch.zeros(self.max_sequence_length, pipeline.transformer.config.text_dim, device="meta")}

    def predict(self, pipeline: Any, network: Network, latents: Tensor, sigmas: Tensor, condition: Condition) -> Tensor:
        """One call of the WanTransformer3DModel, which keeps its norms and its time embedding in float32."""
        predicted: Tensor = network(
            hidden_states=latents,
            timestep=(sigmas * TIMESTEPS).to(torch.float32),
            encoder_hidden_states=condition["embeds"],
            return_dict=False,
        )[0]
        return predicted

    def guide(self, unguided: Tensor, guided: Tensor, scale: float) -> Tensor:
        """Linear in the scale."""
        return linear_guidance(unguided, guided, scale)

    def sigmas(self, pipeline: Any, num_steps: int) -> NDArray[np.float64]:
        """The grid of FlowMatchEulerDiscreteScheduler with the shift of the pipeline's scheduler.

        The published folders name UniPC, a multistep solver on a grid of its own, which no Gaussian transition follows. So
        our ODE sampler is the pipeline's call once its scheduler is FlowMatchEulerDiscreteScheduler(shift=flow_shift).
        """
        from diffusers import FlowMatchEulerDiscreteScheduler

        if isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
            return scheduler_sigmas(pipeline.scheduler, num_steps)
        shift = pipeline.scheduler.config.flow_shift
        return scheduler_sigmas(FlowMatchEulerDiscreteScheduler(shift=shift), num_steps)

    def decode(self, pipeline: Any, latents: Tensor) -> list[Media]:
        """Videos (num_frames, height, width, 3) uint8."""
        decoded = pipeline.vae.decode(standardised(pipeline.vae, latents), return_dict=False)[0]
        return to_uint8(pipeline.video_processor.postprocess_video(decoded, output_type="np"))


def load(
    model: str,
    *,
    height: int = 240,
    width: int = 416,
    num_frames: int = 33,
    max_sequence_length: int = LONGEST_TEXT,
    **options: Any,
) -> PipelinePolicy:
    """Load a pipeline folder or hub id. height, width: pixels; by default they and the frames are Flow-GRPO's.

    options: of `load_policy`, which all families share. Raises ValueError when the model is not there or is no Wan pipeline,
    is of another design (Wan 2.2), or cannot draw that size or read that many tokens.
    """
    family = Wan(height, width, num_frames, text_length(max_sequence_length, LONGEST_TEXT))
    return load_policy(model, family, check=refuse_wan22, **options)


def refuse_wan22(parts: Mapping[str, Any]) -> None:
    """Raise ValueError when the model_index.json is that of a Wan 2.2."""
    if parts.get("boundary_ratio") is not None or parts.get("expand_timesteps") or any(parts.get("transformer_2") or ()):
        raise ValueError("a Wan 2.2 has two transformers or a time for each token: choose a Wan 2.1 text-to-video model")
