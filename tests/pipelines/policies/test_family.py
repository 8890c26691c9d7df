"""The formulas that families share, against diffusers' own and against arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, QwenImagePipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import sampler
from pipelines.policies import family
from pipelines.policies.flux import image_ids


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
@settings(deadline=None, max_examples=30)
def test_packing_is_the_pipelines_and_has_an_inverse(count: int, channels: int, rows: int, columns: int) -> None:
    latents = torch.randn(count, channels, 2 * rows, 2 * columns)
    packed = family.pack(latents)
    for pipeline in (FluxPipeline, QwenImagePipeline):
        assert torch.equal(packed, pipeline._pack_latents(latents, *latents.shape))
    assert torch.equal(family.unpack(packed, 2 * rows, 2 * columns), latents)
    assert torch.equal(packed[0, columns * (rows - 1)], latents[0, :, -2:, :2].flatten())


def test_image_ids_are_the_pipelines() -> None:
    golden = FluxPipeline._prepare_latent_image_ids(1, 3, 5, torch.device("cpu"), torch.float32)
    assert torch.equal(image_ids(3, 5), golden)
    assert image_ids(3, 5)[7].tolist() == [0, 1, 2]


@pytest.mark.parametrize("shift", [0.54, 0.58, 1.0, 1.57, 1.58, 1.83, 3.0, 5.0])
def test_every_shift_begins_at_1(shift: float) -> None:
    """In float32 some of them miss it by one digit; every other sigma is the scheduler's."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    grid = family.scheduler_sigmas(scheduler, 10)
    assert (grid[0], grid[-1]) == (1.0, 0.0)
    assert np.array_equal(grid[1:], scheduler.sigmas.double().numpy()[1:])
    deviations = sampler.transitions("flow_sde", grid, 0.7).std
    assert deviations[0] == pytest.approx(0.7 * ((1 - grid[1]) / (1 - grid[1])) ** 0.5)  # g = a sqrt(1 / (1 - s1)), d = 1 - s1


def test_a_grid_that_begins_elsewhere_is_left_alone() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    grid = family.scheduler_sigmas(scheduler, 2, sigmas=[0.9, 0.4])
    np.testing.assert_allclose(grid, [0.9, 0.4, 0.0], rtol=1e-6)


def test_the_dynamic_shift_by_hand() -> None:
    """exp(mu) / (exp(mu) + 1 / t - 1), mu linear from 0.5 at 256 tokens to 1.15 at 4096 (FLUX.1-dev's own numbers)."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = 0.5 + (1024 - 256) * (1.15 - 0.5) / (4096 - 256)
    times = np.linspace(1, 0.25, 4)
    golden = np.exp(mu) / (np.exp(mu) + 1 / times - 1)
    np.testing.assert_allclose(family.shifted_sigmas(scheduler, 4, 1024), [*golden, 0.0], rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_time_is_rounded_before_it_is_divided(dtype: torch.dtype) -> None:
    sigmas = torch.rand(1000, dtype=torch.float32, generator=torch.Generator().manual_seed(0)).double()
    timestep = (sigmas.float() * 1000).to(dtype)  # the scheduler's, then the pipeline's cast
    assert torch.equal(family.rounded_time(sigmas, dtype), timestep / 1000)
    assert family.rounded_time(sigmas, dtype).dtype == dtype


def test_linear_guidance() -> None:
    unguided, guided = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0])
    assert family.linear_guidance(unguided, guided, 3.0).tolist() == [4.0, -4.0]
    assert torch.equal(family.linear_guidance(unguided, guided, 1.0), guided)
    assert torch.equal(family.linear_guidance(unguided, guided, 0.0), unguided)


def test_media_are_rounded_not_cut() -> None:
    (image,) = family.to_uint8(np.array([[[[0.0, 0.4999, 1.0]]]], np.float32))
    assert image.dtype == np.uint8
    assert image.tolist() == [[[0, 127, 255]]]
