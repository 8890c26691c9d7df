"""What tells one model family from another, and the few formulas that several of them share.

A family is one frozen dataclass in one file: its fields are the options that only it has. `PipelinePolicy` does the rest for
all of them: loading, conditions, guidance, adapters, precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.rewards.base import Media

Condition = Mapping[str, Tensor]
"""An encoded prompt: named tensors, (tokens, features) or the like; of B prompts each has a leading dimension B."""
Network = Callable[..., Any]
"""The transformer, perhaps with other weights than its own."""

TIMESTEPS = 1000  # flow-matching models of diffusers count time as 1000 sigma


class Family(Protocol):
    """One model family. Methods take the diffusers pipeline they work on; they keep nothing."""

    @property
    def name(self) -> str:
        """As `policy.family` names it."""
        ...

    @property
    def pipeline_class(self) -> str:
        """The class of diffusers that loads it."""
        ...

    @property
    def transformer_class(self) -> str: ...

    @property
    def vae_class(self) -> str: ...

    @property
    def text_parts(self) -> tuple[str, ...]:
        """Components that only `encode` needs: they are loaded when a prompt has to be encoded, and let go."""
        ...

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Modules that an adapter changes by default, by the end of their names."""
        ...

    @property
    def encoding(self) -> tuple[Any, ...]:
        """The options that change what `encode` gives."""
        ...

    def latent_shape(self, pipeline: Any) -> tuple[int, ...]:
        """Of one trajectory's latent. Raises ValueError for a size that the model cannot draw."""
        ...

    def encode(self, pipeline: Any, prompt: str, device: torch.device) -> Condition:
        """The condition of one prompt, without a batch dimension. The pipeline has its text parts here.

        Tensors of prompts of different lengths are padded with zeros in a batch: a family whose lengths vary gives a mask.
        """
        ...

    def longest(self, pipeline: Any) -> Condition:
        """What `encode` gives of the longest prompt, on the meta device where the network computes with it."""
        ...

    def predict(self, pipeline: Any, network: Network, latents: Tensor, sigmas: Tensor, condition: Condition) -> Tensor:
        """One call of the network: latents (N, *latent_shape) in its dtype, sigmas (N,) float64 to velocities alike."""
        ...

    def guide(self, unguided: Tensor, guided: Tensor, scale: float) -> Tensor:
        """Velocities under the negative prompt and under the prompt to the guided one, as the pipeline does it."""
        ...

    def sigmas(self, pipeline: Any, num_steps: int) -> NDArray[np.float64]:
        """The pipeline's grid, (num_steps + 1,), so that our ODE sampler is the pipeline's call."""
        ...

    def decode(self, pipeline: Any, latents: Tensor) -> list[Media]:
        """Latents (B, *latent_shape) in the autoencoder's dtype and on its device to media."""
        ...


def linear_guidance(unguided: Tensor, guided: Tensor, scale: float) -> Tensor:
    """v = v_negative + scale (v_prompt - v_negative) (classifier-free guidance, arXiv 2207.12598)."""
    return unguided + scale * (guided - unguided)


def scheduler_sigmas(scheduler: Any, num_steps: int, **settings: Any) -> NDArray[np.float64]:
    """The grid of a flow-matching scheduler, (num_steps + 1,) float64. settings: of its `set_timesteps`."""
    count = {} if "sigmas" in settings else {"num_inference_steps": num_steps}
    scheduler.set_timesteps(**count, **settings)
    grid = np.asarray(scheduler.sigmas.cpu(), np.float64)
    # Some shifts miss 1 in the last digit: above it no sampler begins, and just below it the noise of flow_sde explodes.
    if abs(grid[0] - 1) < 1e-6:
        grid[0] = 1.0
    return grid


def shifted_sigmas(scheduler: Any, num_steps: int, tokens: int) -> NDArray[np.float64]:
    """The grid of pipelines that shift it by the number of image tokens (FLUX, Qwen-Image): as their calls compute it."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    known = (("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", 1.15))
    shift = calculate_shift(tokens, *(scheduler.config.get(name, default) for name, default in known))
    return scheduler_sigmas(scheduler, num_steps, sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=shift)


def rounded_time(sigmas: Tensor, dtype: torch.dtype) -> Tensor:
    """The time input of FLUX and Qwen-Image, (N,): the timestep is rounded to the model's dtype and then divided by 1000."""
    return (sigmas * TIMESTEPS).to(torch.float32).to(dtype) / TIMESTEPS


def pack(latents: Tensor) -> Tensor:
    """(N, C, H, W) to tokens of 2x2 patches, (N, H W / 4, 4 C): the order of FLUX and Qwen-Image."""
    count, channels, height, width = latents.shape
    patches = latents.reshape(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(count, height * width // 4, channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`: (N, H W / 4, 4 C) to (N, C, H, W)."""
    count, _, features = tokens.shape
    patches = tokens.reshape(count, height // 2, width // 2, features // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(count, features // 4, height, width)


def latent_size(pixels: int, factor: int, multiple: int, what: str) -> int:
    """Latent height or width of so many pixels. Raises ValueError when the model cannot draw it."""
    if not isinstance(pixels, int) or pixels < factor * multiple or pixels % (factor * multiple):
        raise ValueError(f"policy.options.{what} {pixels} must be a multiple of {factor * multiple}")
    return pixels // factor


def packed_latent_shape(pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
    """(channels, height, width) of latents that a network sees as 2x2 patches; height and width given in pixels."""
    sides = ((height, "height"), (width, "width"))
    rows, columns = (latent_size(pixels, pipeline.vae_scale_factor, 2, what) for pixels, what in sides)
    return (pipeline.transformer.config.in_channels // 4, rows, columns)


def text_length(tokens: int, most: int) -> int:
    """max_sequence_length, if the model can read as many tokens. Raises ValueError when it cannot."""
    if not 1 <= tokens <= most:
        raise ValueError(f"policy.options.max_sequence_length {tokens} must be from 1 to {most}")
    return tokens


def standardised(vae: Any, latents: Tensor) -> Tensor:
    """Latents (B, C, F, H, W) of unit variance to those that the autoencoders of Wan and Qwen-Image decode."""
    mean, std = (torch.tensor(vae.config[name]).to(latents).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return latents / (1.0 / std) + mean


def decoded_images(pipeline: Any, latents: Tensor) -> list[Media]:
    """Latents (B, C, H, W) to images, as the pipelines of SD3 and FLUX do it."""
    vae = pipeline.vae
    scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
    return to_uint8(pipeline.image_processor.postprocess(vae.decode(scaled, return_dict=False)[0], output_type="np"))


def to_uint8(images: NDArray[np.float32]) -> list[Media]:
    """Images or videos (B, ..., 3) float in [0, 1] to media."""
    return list((images * 255).round().astype(np.uint8))
