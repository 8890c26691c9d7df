"""Outlines: the published models have the sizes that their cards tell, and a folder's outline is the folder's model."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from pipelines.embedded import PIPELINE_DIR
from pipelines.policies.base import POLICIES
from pipelines.policies.outline import PUBLISHED
from pipelines.policies.pipeline_policy import PipelinePolicy
from pipelines.policies.sd3 import load

# Parameters of transformer and autoencoder, in billions, as the weights at the hub have them; the shape of a latent.
SIZES: dict[str, tuple[str, float, float, tuple[int, ...]]] = {
    "stabilityai/stable-diffusion-3.5-medium": ("sd3", 2.243, 0.0838, (16, 128, 128)),
    "stabilityai/stable-diffusion-3.5-large": ("sd3", 8.057, 0.0838, (16, 128, 128)),
    "black-forest-labs/FLUX.1-dev": ("flux", 11.901, 0.0838, (16, 64, 64)),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": ("wan", 1.419, 0.1269, (16, 9, 30, 52)),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": ("wan", 14.289, 0.1269, (16, 9, 30, 52)),
    "Qwen/Qwen-Image": ("qwen_image", 20.430, 0.1269, (16, 64, 64)),
}


def _outline(family: str, model: str, **options: Any) -> PipelinePolicy:
    policy = POLICIES.build(family, model=model, outline=True, **options)
    assert isinstance(policy, PipelinePolicy)
    return policy


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("model", SIZES)
def test_published_models_have_their_published_sizes(model: str) -> None:
    family, transformer, autoencoder, latent_shape = SIZES[model]
    policy = _outline(family, model, dtype="bfloat16")
    assert _count(policy.trainable) / 1e9 == pytest.approx(transformer, rel=1e-3)
    assert _count(policy.pipeline.vae) / 1e9 == pytest.approx(autoencoder, rel=1e-2)
    assert policy.latent_shape == latent_shape
    assert {parameter.device.type for parameter in policy.trainable.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in policy.trainable.parameters()} == {torch.bfloat16}


def test_all_published_models_are_tried() -> None:
    assert SIZES.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16", "lora": {"rank": 3}}])
def test_the_outline_of_a_folder_is_its_model(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(PIPELINE_DIR, folder, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*", "text_encoder*"))
    loaded = load("embedded", device="cpu", **options)
    for outline in (_outline("sd3", "embedded", **options), _outline("sd3", str(folder), **options)):
        assert outline.latent_shape == loaded.latent_shape
        for ours, theirs in ((outline.trainable, loaded.trainable), (outline.pipeline.vae, loaded.pipeline.vae)):
            found = {name: (p.shape, p.dtype, p.requires_grad) for name, p in ours.named_parameters()}
            assert found == {name: (p.shape, p.dtype, p.requires_grad) for name, p in theirs.named_parameters()}


@pytest.mark.parametrize("damage", ["no folder", "no transformer", "no JSON", "no such class option"])
def test_a_configuration_that_cannot_be_read(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "model"
    if damage != "no folder":
        shutil.copytree(PIPELINE_DIR, folder)
    if damage == "no transformer":
        shutil.rmtree(folder / "transformer")
    if damage in ("no JSON", "no such class option"):
        (folder / "transformer" / "config.json").write_text("{" if damage == "no JSON" else '{"num_layers": "four"}')
    with pytest.raises(ValueError, match=f"^cannot read the configuration of '{re.escape(str(folder))}', transformer: [^\n]+$"):
        _outline("sd3", str(folder))
