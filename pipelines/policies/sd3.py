"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206), from a diffusers pipeline folder or hub id; also the embedded policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.embedded import PIPELINE_DIR
from pipelines.policies.family import (
    TIMESTEPS,
    Condition,
    Network,
    decoded_images,
    latent_size,
    linear_guidance,
    scheduler_sigmas,
)
from pipelines.policies.pipeline_policy import PipelinePolicy, load_policy
from pipelines.rewards.base import Media

CLIP_TOKENS = 77


@dataclass(frozen=True)
class SD3:
    """height, width: pixels; None: the model's own size. max_sequence_length: tokens of the T5 encoder. clip_tokens: of the
    CLIP encoders, for `longest` alone."""

    height: int | None
    width: int | None
    max_sequence_length: int
    clip_tokens: int = CLIP_TOKENS
    name: str = "sd3"
    pipeline_class: str = "StableDiffusion3Pipeline"
    transformer_class: str = "SD3Transformer2DModel"
    vae_class: str = "AutoencoderKL"
    text_parts: tuple[str, ...] = (
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
    )
    lora_targets: tuple[str, ...] = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )

    @property
    def encoding(self) -> tuple[Any, ...]:
        """The options that change what `encode` gives."""
        return (self.max_sequence_length,)

    def latent_shape(self, pipeline: Any) -> tuple[int, ...]:
        """(channels, height, width)."""
        config, factor = pipeline.transformer.config, pipeline.vae_scale_factor
        sides = [
            config.sample_size if pixels is None else latent_size(pixels, factor, config.patch_size, what)
            for pixels, what in ((self.height, "height"), (self.width, "width"))
        ]
        return (config.in_channels, *sides)

    def encode(self, pipeline: Any, prompt: str, device: torch.device) -> Condition:
        """embeds (tokens, features) of CLIP and T5, pooled (features,)."""
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompt,
            None,
            None,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"embeds": embeds[0], "pooled": pooled[0]}

    def longest(self, pipeline: Any) -> Condition:
        """All tokens of CLIP and T5."""
        config = pipeline.transformer.config
        return {
            "embeds": torch.zeros(self.clip_tokens + self.max_sequence_length, config.joint_attention_dim, device="meta"),
            "pooled": torch.zeros(config.pooled_projection_dim, device="meta"),
        }

    def predict(self, pipeline: Any, network: Network, latents: Tensor, sigmas: Tensor, condition: Condition) -> Tensor:
        """One call of the SD3Transformer2DModel."""
        predicted: Tensor = network(
            hidden_states=latents,
            timestep=(sigmas * TIMESTEPS).to(torch.float32),
            encoder_hidden_states=condition["embeds"],
            pooled_projections=condition["pooled"],
            return_dict=False,
        )[0]
        return predicted

    def guide(self, unguided: Tensor, guided: Tensor, scale: float) -> Tensor:
        """Linear in the scale."""
        return linear_guidance(unguided, guided, scale)

    def sigmas(self, pipeline: Any, num_steps: int) -> NDArray[np.float64]:
        """The scheduler's grid, of a constant shift."""
        return scheduler_sigmas(pipeline.scheduler, num_steps)

    def decode(self, pipeline: Any, latents: Tensor) -> list[Media]:
        """Images (height, width, 3) uint8."""
        return decoded_images(pipeline, latents)


def load(
    model: str, *, height: int | None = None, width: int | None = None, max_sequence_length: int = 256, **options: Any
) -> PipelinePolicy:
    """Load a pipeline folder or hub id; `embedded` is the tiny pipeline shipped in this package.

    options: of `load_policy`, which all families share. Raises ValueError when the model is not there or is no SD3 pipeline.
    """
    if model == "embedded":  # it has no T5 encoder, and none of its padding
        from pipelines.embedded.text import MAX_TOKENS

        return load_policy(model, SD3(height, width, 0, MAX_TOKENS), folder=str(PIPELINE_DIR), **options)
    return load_policy(model, SD3(height, width, max_sequence_length), **options)
