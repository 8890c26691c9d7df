"""Wan: videos, a first-order grid for a folder that names a multistep solver, parts in float32, and no Wan 2.2."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from pipelines import media, sampler
from tests.pipelines.policies.families import CASES, TEXTS

WAN = CASES["wan"]


@pytest.fixture
def folder(folder_of: Callable[[str], Path]) -> Path:
    """The tiny pipeline."""
    return folder_of("wan")


def _index(folder: Path, **changes: Any) -> None:
    """Change entries of a folder's model_index.json."""
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(("num_frames", "latent_frames"), [(1, 1), (5, 2), (33, 9)])
def test_frames(folder: Path, num_frames: int, latent_frames: int) -> None:
    policy = WAN.policy(folder, num_frames=num_frames)
    assert policy.latent_shape == (4, latent_frames, 2, 4)
    (video,) = policy.decode(sampler.batch_noise([3], -1, policy.latent_shape, policy.device))
    assert video.shape == (num_frames, 16, 32, 3)
    assert str(video.dtype) == "uint8"
    assert np.array_equal(media.decode(media.encode(video, "mp4")), video)


def test_defaults_are_flow_grpos(folder: Path) -> None:
    policy = WAN.load(str(folder), device="cpu")
    assert policy.latent_shape == (4, 9, 30, 52)
    assert policy.architecture.encoding == (512,)


@pytest.mark.parametrize("num_frames", [-3, 0, 2, 32])
def test_frames_that_it_cannot_draw(folder: Path, num_frames: int) -> None:
    told = f"policy.options.num_frames {num_frames} must be 4 k + 1, for example 33"
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        WAN.policy(folder, num_frames=num_frames)


def test_the_grid_has_the_shift_of_the_folders_solver_and_not_its_points(folder: Path, tmp_path: Path) -> None:
    policy = WAN.policy(folder)
    assert type(policy.pipeline.scheduler) is UniPCMultistepScheduler
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler.set_timesteps(10)
    assert np.array_equal(policy.sigmas(10), euler.sigmas.double().numpy())
    policy.pipeline.scheduler.set_timesteps(10)
    assert float(policy.pipeline.scheduler.sigmas[0]) < 1
    shutil.copytree(folder, tmp_path / "wan")
    FlowMatchEulerDiscreteScheduler(shift=7.0).save_pretrained(tmp_path / "wan" / "scheduler")
    _index(tmp_path / "wan", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    euler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    euler.set_timesteps(10)
    assert np.array_equal(WAN.policy(tmp_path / "wan").sigmas(10), euler.sigmas.double().numpy())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_norms_and_time_stay_in_float32(folder: Path, dtype: str) -> None:
    """As diffusers keeps them: in lower precision Wan's videos flicker."""
    policy = WAN.policy(folder, dtype=dtype)
    dtypes = {name: parameter.dtype for name, parameter in policy.trainable.named_parameters()}
    kept = ("time_embedder", "scale_shift_table", "norm2")
    assert {dtypes[name] for name in dtypes if any(part in name for part in kept)} == {torch.float32}
    assert dtypes["patch_embedding.weight"] == getattr(torch, dtype)
    whole = WAN.policy(folder)
    latents, sigmas = sampler.batch_noise([1], -1, policy.latent_shape, policy.device), torch.tensor([0.5]).double()
    with torch.no_grad():
        low, high = (one.velocity(latents, sigmas, one.encode(TEXTS[:1])) for one in (policy, whole))
    assert float((low - high).abs().max()) < {"float16": 0.02, "bfloat16": 0.2}[dtype]
    weights = {name: parameter.detach() for name, parameter in policy.trainable.named_parameters()}
    with torch.no_grad():
        assert torch.equal(policy.velocity(latents, sigmas, policy.encode(TEXTS[:1]), weights), low)


@pytest.mark.parametrize(
    "changes",
    [{"boundary_ratio": 0.875}, {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, {"expand_timesteps": True}],
    ids=["boundary", "two transformers", "a time for each token"],
)
def test_wan_2_2_is_refused_before_its_weights_are_read(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    copy = tmp_path / "wan"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    _index(copy, **changes)
    told = (
        f"cannot load the WanPipeline '{copy}': a Wan 2.2 has two transformers or a time for each token: "
        f"choose a Wan 2.1 text-to-video model"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        WAN.policy(copy)
