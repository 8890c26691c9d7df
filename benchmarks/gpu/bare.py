"""The same work without us: the pipeline's own sampling in the same batches, the transformer's passes over the same pairs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pipelines import sampler
from pipelines.config import RunConfig
from pipelines.policies.pipeline_policy import PipelinePolicy

# Our names of a condition's tensors -> what the pipelines' calls name them.
CALLED = {"embeds": "prompt_embeds", "pooled": "pooled_prompt_embeds", "mask": "prompt_embeds_mask"}
SCALE = {"sd3": "guidance_scale", "wan": "guidance_scale", "flux": "true_cfg_scale", "qwen_image": "true_cfg_scale"}


def synchronised(device: torch.device) -> float:
    """Seconds now, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(work: Callable[[], None], device: torch.device) -> float:
    """Seconds of the second call: the first warms up."""
    work()
    began = synchronised(device)
    work()
    return synchronised(device) - began


def diffusers_seconds(policy: PipelinePolicy, config: RunConfig, texts: list[str]) -> float:
    """The pipeline's own call from conditions to latents, and its autoencoder, on as many samples in as large batches."""
    rollout = config.rollout
    batches = [texts[i : i + rollout.batch_size] for i in range(0, len(texts), rollout.batch_size)]
    policy.pipeline.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def sample() -> None:
        for batch in batches:
            policy.pipeline(**_called(policy, batch), num_inference_steps=rollout.num_steps, output_type="latent")
            policy.decode(sampler.batch_noise(range(len(batch)), -1, policy.latent_shape, policy.device))

    return timed(sample, policy.device)


def _called(policy: PipelinePolicy, texts: list[str]) -> dict[str, Any]:
    condition = policy.encode(texts)
    negative, positive = _halves(condition) if policy.guided else ({}, condition)
    sizes = {name: getattr(policy.architecture, name, None) for name in ("height", "width", "num_frames")}
    return {
        **{CALLED[name]: tensor for name, tensor in positive.items()},
        **{f"negative_{CALLED[name]}": tensor for name, tensor in negative.items()},
        **{name: size for name, size in sizes.items() if size is not None},
        SCALE[policy.family]: policy.guidance_scale,
    }


def _halves(condition: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    pairs = {name: tensor.chunk(2) for name, tensor in condition.items()}
    return {name: first for name, (first, _) in pairs.items()}, {name: second for name, (_, second) in pairs.items()}


def pytorch_seconds(policy: PipelinePolicy, config: RunConfig, texts: list[str]) -> float:
    """Forward and backward passes of the transformer over as many (trajectory, step) pairs in as large passes."""
    train = config.train
    steps = min(train.window or config.rollout.num_steps, config.rollout.num_steps)
    pairs = [text for text in texts for _ in range(steps)]
    size = train.pairs_per_pass or len(pairs)
    batches = [pairs[i : i + size] for i in range(0, len(pairs), size)]

    def passes() -> None:
        for batch in batches:
            condition = policy.encode(batch)
            count = len(batch) * (2 if policy.guided else 1)
            latents = sampler.batch_noise(range(count), -1, policy.latent_shape, policy.device).to(policy.dtype)
            sigmas = torch.full((count,), 0.5, dtype=torch.float64, device=policy.device)
            predicted = policy.architecture.predict(policy.pipeline, policy.trainable, latents, sigmas, condition)
            torch.autograd.backward(predicted.float().square().mean())
        policy.trainable.zero_grad()

    return timed(passes, policy.device)
