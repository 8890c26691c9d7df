"""FLUX: distilled guidance is an input, true guidance a second call, and a model without it takes none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import sampler
from pipelines.policies.pipeline_policy import PipelinePolicy
from tests.pipelines.policies.families import CASES, NEGATIVE, TEXTS
from tests.pipelines.policies.tiny import tiny_flux

FLUX = CASES["flux"]


@pytest.fixture(scope="session")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is not guidance-distilled, on a grid that is not shifted."""
    return tiny_flux(tmp_path_factory.mktemp("model") / "schnell", schnell=True)


@torch.no_grad()
def _velocity(policy: PipelinePolicy) -> torch.Tensor:
    latents = sampler.batch_noise([1, 2], -1, policy.latent_shape, policy.device)
    return policy.velocity(latents, torch.tensor([0.9, 0.3], dtype=torch.float64), policy.encode(TEXTS[:2]))


def test_latents_are_kept_unpacked(folder_of: Callable[[str], Path]) -> None:
    assert FLUX.policy(folder_of("flux")).latent_shape == (4, 4, 6)
    assert FLUX.policy(folder_of("flux"), height=32, width=8).latent_shape == (4, 8, 2)


def test_defaults_are_flow_grpos(folder_of: Callable[[str], Path]) -> None:
    policy = FLUX.load(str(folder_of("flux")), device="cpu")
    assert policy.latent_shape == (4, 128, 128)
    assert policy.architecture.encoding == (512,)
    assert not policy.guided


def test_distilled_guidance_is_the_pipelines_guidance_scale(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("flux")
    theirs = FLUX.theirs(folder)
    found = {}
    for scale in (1.0, 3.5, 8.0):
        policy = FLUX.policy(folder, distilled_guidance=scale)
        start = sampler.batch_noise([1, 2], -1, policy.latent_shape, policy.device)
        grid = sampler.transitions("ode", policy.sigmas(3), 0.0)
        condition = policy.encode(TEXTS[:2])
        path = sampler.draw(lambda x, s: policy.velocity(x, s, condition), start, grid, [1, 2], "float32")  # noqa: B023
        latents = theirs._pack_latents(start, *start.shape)
        options: dict[str, Any] = {**FLUX.options, "num_inference_steps": 3, "output_type": "latent", "guidance_scale": scale}
        golden = theirs._unpack_latents(theirs(list(TEXTS[:2]), latents=latents, **options).images, 16, 24, 4)
        assert float((path.latents[:, -1] - golden).abs().max()) <= 1e-5
        found[scale] = golden
    assert float((found[1.0] - found[8.0]).abs().max()) > 0.01


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_model_that_is_not_distilled(schnell: Path, scale: float) -> None:
    policy, theirs = FLUX.policy(schnell, guidance_scale=scale, negative_prompt=NEGATIVE), FLUX.theirs(schnell)
    start = sampler.batch_noise([1, 2], -1, policy.latent_shape, policy.device)
    grid = sampler.transitions("ode", policy.sigmas(4), 0.0)
    assert grid.sigmas.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    condition = policy.encode(TEXTS[:2])
    path = sampler.draw(lambda x, s: policy.velocity(x, s, condition), start, grid, [1, 2], "float32")
    for k, golden in enumerate(FLUX.path(theirs, TEXTS[:2], start, scale, 4)):
        assert float((path.latents[:, k + 1] - golden).abs().max()) <= 1e-5
    assert torch.equal(
        _velocity(policy),
        _velocity(FLUX.policy(schnell, guidance_scale=scale, negative_prompt=NEGATIVE, distilled_guidance=9.0)),
    )
