"""Stable Diffusion 3 as a policy: loading, encoding, guidance and dtypes, on the embedded and on a locally built pipeline."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from pipelines import sampler, weights
from pipelines.embedded import ABSENT, PIPELINE_DIR
from pipelines.policies.pipeline_policy import PipelinePolicy
from pipelines.policies.sd3 import load
from pipelines.trajectories import draw_fresh
from tests.pipelines.helpers import grid_of, members_of, small

TEXTS = ["a red circle", "two blue squares", "a red circle left of a blue square"]


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another SD3 pipeline folder: 6x6 latents in 2x2 patches, shift 3, random weights, no T5 encoder."""
    torch.manual_seed(0)
    pipeline = StableDiffusion3Pipeline.from_pretrained(PIPELINE_DIR, **ABSENT)
    config = {**pipeline.transformer.config, "sample_size": 6, "patch_size": 2, "num_layers": 2, "pos_embed_max_size": 6}
    pipeline.register_modules(
        transformer=SD3Transformer2DModel(**{key: value for key, value in config.items() if not key.startswith("_")}),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    folder = tmp_path_factory.mktemp("model") / "sd3"
    pipeline.save_pretrained(folder)
    return folder


def _velocity(policy: PipelinePolicy, texts: Sequence[str], **kwargs: Any) -> torch.Tensor:
    latents = sampler.batch_noise(range(len(texts)), -1, policy.latent_shape, policy.device)
    sigmas = torch.linspace(0.1, 1, len(texts), dtype=torch.float64)
    with torch.no_grad():
        return policy.velocity(latents, sigmas, policy.encode(texts), **kwargs)


def test_only_the_transformer_is_trainable(policy: PipelinePolicy) -> None:
    for name, module in policy.pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            assert not module.training
            assert {p.requires_grad for p in module.parameters()} == {name == "transformer"}
    assert policy.base_model == "embedded"
    assert policy.family == "sd3"


def test_latent_shape_and_grid(policy: PipelinePolicy, other_model: Path) -> None:
    assert policy.latent_shape == (8, 3, 3)
    other = load(str(other_model), device="cpu")
    assert other.latent_shape == (8, 6, 6)
    assert other.base_model == str(other_model)
    assert _velocity(other, TEXTS).shape == (3, 8, 6, 6)
    for one in (policy, other):
        grid = one.sigmas(7)
        assert grid.dtype == np.float64
        assert (len(grid), grid[0], grid[-1]) == (8, 1.0, 0.0)
        assert (np.diff(grid) < 0).all()
        assert np.array_equal(one.sigmas(7), grid)
    assert not np.allclose(other.sigmas(7), policy.sigmas(7))


def test_another_models_ode_is_its_pipelines_call(other_model: Path) -> None:
    """Here the absent T5 encoder counts: its 256 tokens are zeros, which the pipeline's own call attends to."""
    policy = load(str(other_model), device="cpu", guidance_scale=3.0)
    start = sampler.batch_noise([5], -1, policy.latent_shape, policy.device)
    theirs = StableDiffusion3Pipeline.from_pretrained(other_model, **ABSENT)
    theirs.set_progress_bar_config(disable=True)
    golden = theirs(TEXTS[1], latents=start.clone(), num_inference_steps=4, guidance_scale=3.0, output_type="latent").images
    grid = sampler.transitions("ode", policy.sigmas(4), 0.0)
    condition = policy.encode(TEXTS[1:2])
    path = sampler.draw(lambda x, sigma: policy.velocity(x, sigma, condition), start, grid, [5], "float32")
    assert float((path.latents[:, -1] - golden).abs().max()) <= 1e-5


def test_prompts_are_encoded_once_and_one_at_a_time(policy: PipelinePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    text_pipeline = policy.text_pipeline()
    encode_prompt = text_pipeline.encode_prompt

    def counted(prompt: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(prompt)
        return encode_prompt(prompt, *args, **kwargs)

    monkeypatch.setattr(text_pipeline, "encode_prompt", counted)
    once = policy.encode([TEXTS[1], TEXTS[0], TEXTS[1]])
    assert sorted(asked) == sorted(TEXTS[:2])
    again = policy.encode([TEXTS[0], TEXTS[2]])
    assert sorted(asked) == sorted(TEXTS)
    assert torch.equal(once["embeds"][0], once["embeds"][2])
    assert torch.equal(once["embeds"][1], again["embeds"][0])
    assert torch.equal(once["pooled"][1], again["pooled"][0])
    assert not torch.equal(once["pooled"][0], once["pooled"][1])
    assert once["embeds"].shape[0] == 3
    assert not once["embeds"].requires_grad


def test_encoding_is_the_pipelines_own(policy: PipelinePolicy) -> None:
    condition = policy.encode(TEXTS)
    embeds, _, pooled, _ = policy.text_pipeline().encode_prompt(
        TEXTS, None, None, do_classifier_free_guidance=False, max_sequence_length=0
    )
    torch.testing.assert_close(condition["embeds"], embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(condition["pooled"], pooled, rtol=0, atol=1e-5)


def test_guidance_is_linear_between_empty_and_prompt(policy: PipelinePolicy) -> None:
    empty, guided = _velocity(policy, ["", "", ""]), _velocity(policy, TEXTS)
    for scale in (1.0, 4.5):
        scaled = dataclasses.replace(policy, guidance_scale=scale)
        torch.testing.assert_close(_velocity(scaled, TEXTS), empty + scale * (guided - empty), rtol=0, atol=1e-4)


def test_velocity_is_differentiable_in_the_trainable_module_alone(policy: PipelinePolicy) -> None:
    latents = sampler.batch_noise([1], -1, policy.latent_shape, policy.device)
    velocity = policy.velocity(latents, torch.tensor([0.5]).double(), policy.encode(TEXTS[:1]))
    torch.autograd.backward(velocity.square().sum())
    parameters = weights.trainable(policy.trainable)
    moved = {name for name, parameter in parameters.items() if parameter.grad is not None and bool(parameter.grad.any())}
    assert len(moved) > len(parameters) * 0.9
    policy.trainable.zero_grad()


def test_other_weights_may_stand_in(policy: PipelinePolicy) -> None:
    reference = {name: tensor.detach().clone() for name, tensor in weights.trainable(policy.trainable).items()}
    before = _velocity(policy, TEXTS)
    with torch.no_grad():
        for parameter in policy.trainable.parameters():
            parameter.mul_(1.1)
    assert torch.equal(_velocity(policy, TEXTS, weights=reference), before)
    assert not torch.equal(_velocity(policy, TEXTS), before)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.2), ("float16", 0.02)])
def test_lower_precision_runs_and_is_near(dtype: str, tolerance: float, policy: PipelinePolicy) -> None:
    low = load("embedded", dtype=dtype, device="cpu")
    assert {str(p.dtype) for p in low.trainable.parameters()} == {f"torch.{dtype}"}
    velocity = _velocity(low, TEXTS)
    assert velocity.dtype == torch.float32
    assert float((velocity - _velocity(policy, TEXTS)).abs().max()) < tolerance
    config = small(rollout={"storage_dtype": "bfloat16"})
    drawn = draw_fresh(low, members_of(config), grid_of(low, config), "bfloat16")
    assert drawn.latents.dtype == torch.float32
    assert bool(torch.isfinite(drawn.behaviour_logprob).all())
    pictures = low.decode(drawn.latents[:, -1])
    assert {(picture.shape, str(picture.dtype)) for picture in pictures} == {((24, 24, 3), "uint8")}
    assert len(weights.policy_id(weights.trainable(low.trainable))) == 24


def test_decode_is_the_pipelines_own(policy: PipelinePolicy) -> None:
    latents = sampler.batch_noise([1, 2, 3], -1, policy.latent_shape, policy.device)
    vae = policy.pipeline.vae
    with torch.no_grad():
        decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    golden = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.stack(policy.decode(latents)), golden)


# -- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["missing", "empty", "not JSON", "a list", "no transformer", "torn weights"])
def test_a_folder_that_is_no_pipeline(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "model"
    if kind in ("no transformer", "torn weights"):
        shutil.copytree(PIPELINE_DIR, folder)
        file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        if kind == "torn weights":
            file.write_bytes(file.read_bytes()[:5000])
        else:
            shutil.rmtree(file.parent)
    elif kind != "missing":
        folder.mkdir()
        if kind != "empty":
            (folder / "model_index.json").write_text({"not JSON": "{", "a list": "[]"}[kind])
    with pytest.raises(ValueError, match=f"cannot load the StableDiffusion3Pipeline '{folder}': ") as caught:
        load(str(folder), device="cpu")
    assert "\n" not in str(caught.value)


def test_a_pipeline_of_another_family(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(PIPELINE_DIR / "scheduler", folder / "scheduler")
    index = {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="cannot load the StableDiffusion3Pipeline"):
        load(str(folder), device="cpu")


def test_options_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match=r"policy.options.dtype 'int8': choose one of \['bfloat16', 'float16', 'float32'\]"):
        load("embedded", dtype="int8")
    with pytest.raises(ValueError, match=r"policy\.options\.device 'abacus' cannot be used: "):
        load("embedded", device="abacus")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"policy\.options\.device 'cuda' cannot be used: "):
        load("embedded", device="cuda")


def test_the_embedded_folder_is_an_ordinary_pipeline(policy: PipelinePolicy) -> None:
    theirs = StableDiffusion3Pipeline.from_pretrained(PIPELINE_DIR, **ABSENT)
    expected = weights.policy_id(dict(theirs.transformer.named_parameters()))
    assert weights.policy_id(weights.trainable(policy.trainable)) == expected
