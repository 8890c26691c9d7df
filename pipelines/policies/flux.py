"""FLUX.1 of Black Forest Labs, from a diffusers pipeline folder or hub id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.policies.family import (
    Condition,
    Network,
    decoded_images,
    linear_guidance,
    pack,
    packed_latent_shape,
    rounded_time,
    shifted_sigmas,
    text_length,
    unpack,
)
from pipelines.policies.pipeline_policy import PipelinePolicy, load_policy
from pipelines.rewards.base import Media

LONGEST_TEXT = 512


@dataclass(frozen=True)
class Flux:
    """height, width: pixels. max_sequence_length: tokens of the T5 encoder.

    distilled_guidance: the scale that a guidance-distilled model (FLUX.1-dev) takes as an input; others ignore it. It costs
    nothing. The policy's guidance_scale is what the pipeline calls true_cfg_scale: a second call for the negative prompt.
    """

    height: int
    width: int
    max_sequence_length: int
    distilled_guidance: float
    name: str = "flux"
    pipeline_class: str = "FluxPipeline"
    transformer_class: str = "FluxTransformer2DModel"
    vae_class: str = "AutoencoderKL"
    text_parts: tuple[str, ...] = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    lora_targets: tuple[str, ...] = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )

    @property
    def encoding(self) -> tuple[Any, ...]:
        """The options that change what `encode` gives."""
        return (self.max_sequence_length,)

    def latent_shape(self, pipeline: Any) -> tuple[int, ...]:
        """(channels, height, width), not packed."""
        return packed_latent_shape(pipeline, self.height, self.width)

    def encode(self, pipeline: Any, prompt: str, device: torch.device) -> Condition:
        """embeds (max_sequence_length, features) of T5, pooled (features,) of CLIP."""
        embeds, pooled, _ = pipeline.encode_prompt(prompt, device=device, max_sequence_length=self.max_sequence_length)
        return {"embeds": embeds[0], "pooled": pooled[0]}

    def longest(self, pipeline: Any) -> Condition:
        """As long as any prompt: T5 pads."""
        config = pipeline.transformer.config
        return {
            "embeds": torch.zeros(self.max_sequence_length, config.joint_attention_dim, device="meta"),
            "pooled": torch.zeros(config.pooled_projection_dim, device="meta"),
        }

    def predict(self, pipeline: Any, network: Network, latents: Tensor, sigmas: Tensor, condition: Condition) -> Tensor:
        """One call of the FluxTransformer2DModel, which sees 2x2 patches."""
        height, width = latents.shape[-2:]
        distilled = pipeline.transformer.config.guidance_embeds
        predicted = network(
            hidden_states=pack(latents),
            timestep=rounded_time(sigmas, latents.dtype),
            guidance=torch.full_like(sigmas, self.distilled_guidance, dtype=torch.float32) if distilled else None,
            encoder_hidden_states=condition["embeds"],
            pooled_projections=condition["pooled"],
            txt_ids=latents.new_zeros(condition["embeds"].shape[1], 3),
            img_ids=image_ids(height // 2, width // 2).to(latents),
            return_dict=False,
        )[0]
        return unpack(predicted, height, width)

    def guide(self, unguided: Tensor, guided: Tensor, scale: float) -> Tensor:
        """Linear in the scale."""
        return linear_guidance(unguided, guided, scale)

    def sigmas(self, pipeline: Any, num_steps: int) -> NDArray[np.float64]:
        """The scheduler's grid, shifted by the number of image tokens."""
        _, height, width = self.latent_shape(pipeline)
        return shifted_sigmas(pipeline.scheduler, num_steps, height * width // 4)

    def decode(self, pipeline: Any, latents: Tensor) -> list[Media]:
        """Images (height, width, 3) uint8."""
        return decoded_images(pipeline, latents)


def image_ids(rows: int, columns: int) -> Tensor:
    """Where each patch lies, (rows columns, 3) float32: 0, row, column."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], -1).reshape(-1, 3).to(torch.float32)


def load(
    model: str,
    *,
    height: int = 512,
    width: int = 512,
    max_sequence_length: int = LONGEST_TEXT,
    distilled_guidance: float = 3.5,
    **options: Any,
) -> PipelinePolicy:
    """Load a pipeline folder or hub id. height, width: pixels, by default Flow-GRPO's (arXiv 2505.05470).

    options: of `load_policy`, which all families share. Raises ValueError when the model is not there or is no FLUX pipeline,
    or cannot draw that size or read that many tokens.
    """
    tokens = text_length(max_sequence_length, LONGEST_TEXT)
    return load_policy(model, Flux(height, width, tokens, distilled_guidance), **options)
