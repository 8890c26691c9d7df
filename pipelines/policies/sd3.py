"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206), from a diffusers pipeline folder or hub id; also the embedded policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipelines.embedded import PIPELINE_DIR
from pipelines.rewards.base import Media

TIMESTEPS = 1000  # the model's time input is 1000 sigma
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Condition:
    """Encoded prompts. embeds: (B, tokens, features); pooled: (B, features)."""

    embeds: Tensor
    pooled: Tensor


@dataclass
class SD3Policy:
    """A StableDiffusion3Pipeline as a policy. The transformer is the policy; everything else is frozen."""

    pipeline: Any
    base_model: str
    guidance_scale: float
    max_sequence_length: int
    device: torch.device
    family: str = "sd3"
    _encoded: dict[str, Condition] = field(default_factory=dict, repr=False)

    @property
    def trainable(self) -> nn.Module:
        """The SD3Transformer2DModel."""
        module: nn.Module = self.pipeline.transformer
        return module

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(channels, height, width) at the model's own sample size."""
        config = self.pipeline.transformer.config
        return (config.in_channels, config.sample_size, config.sample_size)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """Run the text encoders, once per distinct prompt.

        One prompt at a time: in a batch its encoding would depend, in the last digit, on its neighbours, and a run that
        resumes meets its prompts in another company than one that was never interrupted.
        """
        for prompt in sorted({prompt for prompt in prompts if prompt not in self._encoded}):
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                prompt,
                None,
                None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )
            self._encoded[prompt] = Condition(embeds[0], pooled[0])
        chosen = [self._encoded[prompt] for prompt in prompts]
        return Condition(torch.stack([c.embeds for c in chosen]), torch.stack([c.pooled for c in chosen]))

    def velocity(self, latents: Tensor, sigmas: Tensor, condition: Condition, module: nn.Module | None = None) -> Tensor:
        """One batched transformer call; with guidance v = v_empty + scale (v_prompt - v_empty), as the pipeline does."""
        timesteps = (sigmas * TIMESTEPS).to(torch.float32)
        if self.guidance_scale > 1:
            empty = self.encode([""] * len(latents))
            latents, timesteps = torch.cat([latents] * 2), torch.cat([timesteps] * 2)
            condition = Condition(torch.cat([empty.embeds, condition.embeds]), torch.cat([empty.pooled, condition.pooled]))
        predicted: Tensor = (module or self.trainable)(
            hidden_states=latents.to(self.pipeline.transformer.dtype),
            timestep=timesteps,
            encoder_hidden_states=condition.embeds,
            pooled_projections=condition.pooled,
            return_dict=False,
        )[0]
        if self.guidance_scale > 1:
            unguided, guided = predicted.chunk(2)
            predicted = unguided + self.guidance_scale * (guided - unguided)
        return predicted.to(torch.float32)

    def sigmas(self, num_steps: int) -> NDArray[np.float64]:
        """The pipeline scheduler's own grid, so that our ODE sampler is the pipeline's call."""
        self.pipeline.scheduler.set_timesteps(num_steps)
        return np.asarray(self.pipeline.scheduler.sigmas.cpu(), np.float64)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Media]:
        """VAE decoding: (B, C, H, W) to B images (height, width, 3) uint8."""
        vae = self.pipeline.vae
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        images = self.pipeline.image_processor.postprocess(vae.decode(scaled, return_dict=False)[0], output_type="np")
        return list((images * 255).round().astype(np.uint8))


def load(
    model: str,
    *,
    dtype: str = "float32",
    guidance_scale: float = 1.0,
    max_sequence_length: int = 256,
    device: str | None = None,
) -> SD3Policy:
    """Load a pipeline folder or hub id; `embedded` is the tiny pipeline shipped in this package.

    dtype: of weights and activations. device: None takes CUDA where there is one. Raises ValueError when the model is not
    there or is no SD3 pipeline.
    """
    _quiet_libraries()
    from diffusers import StableDiffusion3Pipeline

    if dtype not in DTYPES:
        raise ValueError(f"policy.options.dtype {dtype!r}: choose one of {sorted(DTYPES)}")
    source = str(PIPELINE_DIR) if model == "embedded" else model
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise ValueError(f"policy.options.device {device!r} cannot be used: {' '.join(str(error).split())}") from error
    if model == "embedded":
        max_sequence_length = 0  # it has no T5 encoder, and none of its padding
    try:
        parts = StableDiffusion3Pipeline.load_config(source)
        if parts.get("_class_name") != StableDiffusion3Pipeline.__name__:
            raise ValueError(f"it is a {parts.get('_class_name')}, which policy.family sd3 cannot load")
        # diffusers wants components that a pipeline was saved without (often the T5 encoder) named again as absent.
        absent = {name: None for name, part in parts.items() if isinstance(part, list) and part[0] is None}
        pipeline = StableDiffusion3Pipeline.from_pretrained(source, dtype=DTYPES[dtype], use_safetensors=True, **absent)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"cannot load the SD3 pipeline {model!r}: {' '.join(str(error).split())}") from error
    pipeline.to(target)
    for module in (m for m in pipeline.components.values() if isinstance(m, nn.Module)):
        module.requires_grad_(module is pipeline.transformer).eval()
    return SD3Policy(pipeline, model, guidance_scale, max_sequence_length, target)


def _quiet_libraries() -> None:
    """Silence the bars and notices of transformers and diffusers, which would bury ours: before diffusers is imported."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
