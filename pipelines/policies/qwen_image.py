"""Qwen-Image (arXiv 2508.02324), from a diffusers pipeline folder or hub id."""

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
    linear_guidance,
    pack,
    packed_latent_shape,
    rounded_time,
    shifted_sigmas,
    standardised,
    text_length,
    to_uint8,
    unpack,
)
from pipelines.policies.pipeline_policy import PipelinePolicy, load_policy
from pipelines.rewards.base import Media

LONGEST_TEXT = 1024


@dataclass(frozen=True)
class QwenImage:
    """height, width: pixels. max_sequence_length: tokens of a prompt that count."""

    height: int
    width: int
    max_sequence_length: int
    name: str = "qwen_image"
    pipeline_class: str = "QwenImagePipeline"
    transformer_class: str = "QwenImageTransformer2DModel"
    vae_class: str = "AutoencoderKLQwenImage"
    text_parts: tuple[str, ...] = ("text_encoder", "tokenizer")
    lora_targets: tuple[str, ...] = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )

    @property
    def encoding(self) -> tuple[Any, ...]:
        """The options that change what `encode` gives."""
        return (self.max_sequence_length,)

    def latent_shape(self, pipeline: Any) -> tuple[int, ...]:
        """(channels, height, width), not packed: the one frame is left out."""
        return packed_latent_shape(pipeline, self.height, self.width)

    def encode(self, pipeline: Any, prompt: str, device: torch.device) -> Condition:
        """embeds (tokens, features) of the prompt's own tokens, as many as it has; mask (tokens,) int64, ones."""
        embeds, _ = pipeline.encode_prompt(prompt, device=device, max_sequence_length=self.max_sequence_length)
        return {"embeds": embeds[0], "mask": torch.ones(len(embeds[0]), dtype=torch.int64, device=embeds.device)}

    def longest(self, pipeline: Any) -> Condition:
        """A prompt that is cut."""
        features = pipeline.transformer.config.joint_attention_dim
        mask = torch.ones(self.max_sequence_length, dtype=torch.int64)  # read on the host, so not on the meta device
        return {"embeds": torch.zeros(self.max_sequence_length, features, device="meta"), "mask": mask}

    def predict(self, pipeline: Any, network: Network, latents: Tensor, sigmas: Tensor, condition: Condition) -> Tensor:
        """One call of the QwenImageTransformer2DModel, which sees 2x2 patches. Without padding it takes no mask."""
        count, _, height, width = latents.shape
        mask = condition["mask"]
        predicted = network(
            hidden_states=pack(latents),
            timestep=rounded_time(sigmas, latents.dtype),
            encoder_hidden_states=condition["embeds"],
            encoder_hidden_states_mask=None if bool(mask.all()) else mask,
            img_shapes=[[(1, height // 2, width // 2)]] * count,
            return_dict=False,
        )[0]
        return unpack(predicted, height, width)

    def guide(self, unguided: Tensor, guided: Tensor, scale: float) -> Tensor:
        """Linear in the scale, then each 2x2 patch gets back the norm that it has without guidance."""
        height, width = guided.shape[-2:]
        conditional, combined = pack(guided), pack(linear_guidance(unguided, guided, scale))
        norm, too_large = (torch.norm(patches, dim=-1, keepdim=True) for patches in (conditional, combined))
        return unpack(combined * (norm / too_large), height, width)

    def sigmas(self, pipeline: Any, num_steps: int) -> NDArray[np.float64]:
        """The scheduler's grid, shifted by the number of image tokens."""
        _, height, width = self.latent_shape(pipeline)
        return shifted_sigmas(pipeline.scheduler, num_steps, height * width // 4)

    def decode(self, pipeline: Any, latents: Tensor) -> list[Media]:
        """Images (height, width, 3) uint8: a video autoencoder's only frame."""
        decoded = pipeline.vae.decode(standardised(pipeline.vae, latents[:, :, None]), return_dict=False)[0][:, :, 0]
        return to_uint8(pipeline.image_processor.postprocess(decoded, output_type="np"))


def load(
    model: str,
    *,
    height: int = 512,
    width: int = 512,
    max_sequence_length: int = 512,
    negative_prompt: str = " ",
    **options: Any,
) -> PipelinePolicy:
    """Load a pipeline folder or hub id. height, width: pixels, by default Flow-GRPO's (arXiv 2505.05470).

    negative_prompt: of guidance, by default the model's own empty one. options: of `load_policy`, which all families share.
    Raises ValueError when the model is not there or is no Qwen-Image pipeline, or cannot draw that size or read that many
    tokens.
    """
    family = QwenImage(height, width, text_length(max_sequence_length, LONGEST_TEXT))
    return load_policy(model, family, negative_prompt=negative_prompt, **options)
