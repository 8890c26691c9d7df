"""AuraFlow (blog.fal.ai/auraflow) as a policy, from a diffusers pipeline folder or hub id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.policies.family import Condition, Network, latent_size, linear_guidance, scheduler_sigmas, to_uint8
from pipelines.policies.pipeline_policy import PipelinePolicy, load_policy
from pipelines.rewards.base import Media


@dataclass(frozen=True)
class AuraFlow:
    """height, width: pixels. max_sequence_length: tokens of the UMT5 encoder."""

    height: int
    width: int
    max_sequence_length: int
    name: str = "aura_flow"
    pipeline_class: str = "AuraFlowPipeline"
    transformer_class: str = "AuraFlowTransformer2DModel"
    vae_class: str = "AutoencoderKL"
    text_parts: tuple[str, ...] = ("text_encoder", "tokenizer")
    lora_targets: tuple[str, ...] = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")

    @property
    def encoding(self) -> tuple[Any, ...]:
        """The options that change what `encode` gives: they name the conditions in the store."""
        return (self.max_sequence_length,)

    def latent_shape(self, pipeline: Any) -> tuple[int, ...]:
        """(channels, height, width). Raises ValueError for a size that the model cannot draw."""
        config, factor = pipeline.transformer.config, pipeline.vae_scale_factor
        height = latent_size(self.height, factor, config.patch_size, "height")
        width = latent_size(self.width, factor, config.patch_size, "width")
        return (config.in_channels, height, width)

    def encode(self, pipeline: Any, prompt: str, device: torch.device) -> Condition:
        """embeds (max_sequence_length, features): zeros after the text's own tokens, and the model attends to them."""
        embeds, *_ = pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, device=device, max_sequence_length=self.max_sequence_length
        )
        return {"embeds": embeds[0]}

    def longest(self, pipeline: Any) -> Condition:
        """As long as any prompt: UMT5 pads."""
        features = pipeline.transformer.config.joint_attention_dim
        return {"embeds": torch.zeros(self.max_sequence_length, features, device="meta")}

    def predict(self, pipeline: Any, network: Network, latents: Tensor, sigmas: Tensor, condition: Condition) -> Tensor:
        """One call of the AuraFlowTransformer2DModel. It predicts noise less image, and its time is sigma itself."""
        predicted: Tensor = network(
            hidden_states=latents,
            encoder_hidden_states=condition["embeds"],
            timestep=sigmas.to(latents.dtype),
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
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
        return to_uint8(pipeline.image_processor.postprocess(decoded, output_type="np"))


def load(
    model: str, *, height: int = 1024, width: int = 1024, max_sequence_length: int = 256, **options: Any
) -> PipelinePolicy:
    """Load a pipeline folder or hub id. options: of `load_policy`, which all families share.

    Raises ValueError when the model is not there, is no AuraFlow pipeline, or cannot draw that size.
    """
    return load_policy(model, AuraFlow(height, width, max_sequence_length), **options)
