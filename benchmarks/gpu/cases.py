"""The models that are measured: all families in miniature, or one SD3 of 2.2 B random parameters; and their configurations."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from opgrpo_data.store import Store
from pipelines.config import RunConfig, build_config
from pipelines.policies.base import POLICIES
from pipelines.policies.conditions import ConditionStore
from pipelines.policies.loading import quiet_libraries
from pipelines.policies.outline import PUBLISHED
from pipelines.policies.pipeline_policy import PipelinePolicy
from tests.pipelines.policies import tiny

TINY_OPTIONS = {"height": 16, "width": 24, "max_sequence_length": 16, "dtype": "float32", "lora": {"rank": 4, "alpha": 8}}
LARGE_OPTIONS = {
    "height": 512,
    "width": 512,
    "max_sequence_length": 128,
    "dtype": "bfloat16",
    "guidance_scale": 4.5,
    "lora": {"rank": 32, "alpha": 64},
    "gradient_checkpointing": True,
}
TINY: Mapping[str, Any] = {
    "rollout": {"prompts_per_iteration": 2, "group_size": 4, "num_steps": 4, "batch_size": 8},
    "train": {"window": 3, "pairs_per_pass": 8},
}
LARGE: Mapping[str, Any] = {
    "rollout": {"prompts_per_iteration": 4, "group_size": 8, "num_steps": 10, "batch_size": 16, "storage_dtype": "float16"},
    "train": {"window": 5, "pairs_per_pass": 16},
}


@dataclass(frozen=True)
class Case:
    """A model and a run of it. build: writes its folder."""

    name: str
    family: str
    build: Callable[[Path], Any]
    options: Mapping[str, Any]
    settings: Mapping[str, Any]

    def config(self, folder: Path, device: str) -> RunConfig:
        """Two iterations: the first warms up. On-policy, so that both do equal work."""
        prompts = folder / "prompts.jsonl"
        count = self.settings["rollout"]["prompts_per_iteration"]
        prompts.write_text("".join(json.dumps({"text": f"{index + 1} red circles"}) + "\n" for index in range(count)))
        document = {
            "name": self.name,
            "algorithm": "flow_grpo",
            "iterations": 2,
            "policy": {"family": self.family, "model": str(folder / "model"), "options": {**self.options, "device": device}},
            "prompts": {"source": str(prompts)},
            "reward": {"name": "jpeg_compressibility"},
        }
        return build_config({**document, **self.settings}, self.name)


def cases(size: str) -> Iterator[Case]:
    """The models of a size."""
    if size == "2b":
        yield Case("sd3-2b", "sd3", large_sd3, LARGE_OPTIONS, LARGE)
        return
    yield Case("tiny-sd3", "sd3", tiny.tiny_sd3, TINY_OPTIONS | {"guidance_scale": 4.5}, TINY)
    yield Case("tiny-flux", "flux", tiny.tiny_flux, TINY_OPTIONS, TINY)
    yield Case("tiny-wan", "wan", tiny.tiny_wan, TINY_OPTIONS | {"width": 32, "num_frames": 5, "guidance_scale": 4.5}, TINY)
    yield Case("tiny-qwen-image", "qwen_image", tiny.tiny_qwen_image, TINY_OPTIONS | {"guidance_scale": 4.0}, TINY)


def large_sd3(folder: Path) -> None:
    """Transformer and autoencoder of Stable Diffusion 3.5 medium with random weights; no text encoders."""
    quiet_libraries()
    shapes = PUBLISHED["stabilityai/stable-diffusion-3.5-medium"]
    text = dict.fromkeys([f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")])
    vae = {**shapes["vae"], "scaling_factor": 1.5305, "shift_factor": 0.0609}
    diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(**shapes["transformer"]).to(torch.bfloat16),
        vae=diffusers.AutoencoderKL(**vae),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        **text,
    ).save_pretrained(folder)


def random_conditions(store: Store, config: RunConfig) -> None:
    """Fill a store with what the missing text encoders of the large model would have made of the prompts."""
    policy = POLICIES.build(config.policy.family, model=config.policy.model, **{**config.policy.options, "device": "cpu"})
    assert isinstance(policy, PipelinePolicy)
    texts = [json.loads(line)["text"] for line in Path(config.prompts.source).read_text().splitlines()]
    shapes = {name: tensor.shape for name, tensor in policy.architecture.longest(policy.pipeline).items()}
    generator = torch.Generator().manual_seed(0)
    ConditionStore(store.directory, policy.encoder_id).add(
        {
            text: {name: torch.randn(shape, generator=generator).to(policy.dtype) for name, shape in shapes.items()}
            for text in [policy.negative_prompt, *texts]
        }
    )
