"""The four families as their tests see them: a tiny pipeline each, our policy on it, and diffusers' own call of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from pipelines.policies import flux, qwen_image, sd3, wan
from pipelines.policies.pipeline_policy import PipelinePolicy
from pipelines.rewards.base import Media
from tests.pipelines.policies import tiny

TEXTS = ("a red circle", "two blue squares left of a red square", "one green diamond")
"""Of different lengths in every tokenizer."""
NEGATIVE = "a blurry square"


@dataclass(frozen=True)
class Case:
    """A family and its tiny pipeline.

    options: of our `load`, also the pipeline's call has them. called: by other names there. scale: what its call names our
    guidance_scale. vectors: whether its latents are packed.
    """

    name: str
    build: Callable[[Path], Path]
    load: Callable[..., PipelinePolicy]
    options: Mapping[str, Any]
    scale: str
    called: Mapping[str, Any]
    packed: bool = False

    def policy(self, folder: Path, **options: Any) -> PipelinePolicy:
        """Ours, on this folder."""
        return self.load(str(folder), **({"device": "cpu"} | dict(self.options) | options))

    def theirs(self, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
        """The whole pipeline as anyone loads it; the scheduler of Wan's published folders gives way, as wan.py says."""
        absent = {} if (folder / "text_encoder_3").exists() or not self.name.startswith("sd3") else {"text_encoder_3": None}
        absent |= {"tokenizer_3": None} if absent else {}
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype, **absent)
        if self.name == "wan":
            pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def call(self, pipeline: Any, texts: Sequence[str], start: Tensor, scale: float, num_steps: int, **more: Any) -> Any:
        """Diffusers' own sampling from `start` (B, *latent_shape) to whatever its call returns."""
        guided = {"negative_prompt": [NEGATIVE] * len(texts)} if scale > 1 else {}
        latents = pipeline._pack_latents(start, *start.shape) if self.packed else start
        options = dict(self.options) | dict(self.called) | guided | {self.scale: scale} | more
        return pipeline(list(texts), latents=latents, num_inference_steps=num_steps, **options)

    def path(self, pipeline: Any, texts: Sequence[str], start: Tensor, scale: float, num_steps: int) -> list[Tensor]:
        """The latents (B, *latent_shape) after each of its steps."""
        found: list[Tensor] = []

        def collect(_: Any, step: int, timestep: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
            found.append(values["latents"].clone())
            return {}

        self.call(pipeline, texts, start, scale, num_steps, output_type="latent", callback_on_step_end=collect)
        if not self.packed:
            return found
        sides = [self.options["height"], self.options["width"], pipeline.vae_scale_factor]
        return [pipeline._unpack_latents(latents, *sides).reshape(start.shape) for latents in found]

    def samples(self, pipeline: Any, texts: Sequence[str], start: Tensor, scale: float, num_steps: int) -> list[Media]:
        """What its call shows: images, or videos."""
        output = self.call(pipeline, texts, start, scale, num_steps, output_type="np")
        return list((output[0] * 255).round().astype(np.uint8))

    def encode(self, pipeline: Any, text: str) -> dict[str, Tensor]:
        """What its own encode_prompt makes of one prompt, by our names."""
        length = {"max_sequence_length": self.options["max_sequence_length"]}
        if self.name.startswith("sd3"):
            found = pipeline.encode_prompt(text, None, None, do_classifier_free_guidance=False, **length)
            return {"embeds": found[0][0], "pooled": found[2][0]}
        if self.name == "flux":
            found = pipeline.encode_prompt(text, **length)
            return {"embeds": found[0][0], "pooled": found[1][0]}
        if self.name == "wan":
            return {"embeds": pipeline.encode_prompt(text, do_classifier_free_guidance=False, **length)[0][0]}
        embeds, mask = pipeline.encode_prompt(text, **length)
        assert mask is None
        return {"embeds": embeds[0], "mask": torch.ones(embeds.shape[1], dtype=torch.int64)}


SIDES = {"height": 16, "width": 24, "max_sequence_length": 16}
CASES = {
    "sd3": Case("sd3", tiny.tiny_sd3, sd3.load, SIDES, "guidance_scale", {}),
    "sd3_without_t5": Case("sd3_without_t5", partial(tiny.tiny_sd3, with_t5=False), sd3.load, SIDES, "guidance_scale", {}),
    "flux": Case("flux", tiny.tiny_flux, flux.load, SIDES, "true_cfg_scale", {"guidance_scale": 3.5}, packed=True),
    "wan": Case("wan", tiny.tiny_wan, wan.load, SIDES | {"width": 32, "num_frames": 5}, "guidance_scale", {}),
    "qwen_image": Case("qwen_image", tiny.tiny_qwen_image, qwen_image.load, SIDES, "true_cfg_scale", {}, packed=True),
}
