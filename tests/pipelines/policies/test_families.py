"""What holds for every family, on real pipelines in miniature: ours is diffusers' own, in every dtype, alone or in a batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opgrpo_data.io import Directory
from opgrpo_data.locations import LatentLocation
from opgrpo_data.reading import read_latents, read_media
from pipelines import media, sampler
from pipelines.groups import Member, shard_tasks
from pipelines.policies.pipeline_policy import PipelinePolicy
from pipelines.prompts import Prompt
from pipelines.trajectories import Stored, draw_fresh, evaluate, to_tensor
from tests.pipelines.helpers import elements, grid_of, small, stored
from tests.pipelines.policies.families import CASES, NEGATIVE, TEXTS, Case

STEPS = 4
Loaded = Callable[[str, str, float], PipelinePolicy]


def _start(policy: PipelinePolicy, count: int) -> Tensor:
    return sampler.batch_noise(range(count), -1, policy.latent_shape, policy.device)


# -- ours is diffusers' own -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, indirect=True)
@pytest.mark.parametrize("scale", [1.0, 4.5])
@pytest.mark.parametrize("count", [1, 3])
def test_ode_sampling_is_the_pipelines_call(case: Case, folder: Path, scale: float, count: int) -> None:
    policy, theirs = case.policy(folder, guidance_scale=scale, negative_prompt=NEGATIVE), case.theirs(folder)
    start, texts = _start(policy, count), TEXTS[:count]
    golden = case.path(theirs, texts, start, scale, STEPS)
    grid = sampler.transitions("ode", policy.sigmas(STEPS), 0.0)
    condition = policy.encode(texts)
    path = sampler.draw(lambda x, sigma: policy.velocity(x, sigma, condition), start, grid, range(count), "float32")
    assert len(golden) == STEPS
    for k, latents in enumerate(golden):
        assert float((path.latents[:, k + 1] - latents).abs().max()) <= 1e-5
    assert float((golden[-1] - start).abs().mean()) > 0.1


@pytest.mark.parametrize("count", [1, 3])
def test_decode_is_the_pipelines_own(case: Case, folder: Path, count: int) -> None:
    policy, theirs = case.policy(folder), case.theirs(folder)
    start, texts = _start(policy, count), TEXTS[:count]
    latents = case.path(theirs, texts, start, 1.0, 2)[-1]
    shown = np.stack(case.samples(theirs, texts, start, 1.0, 2))
    assert shown.shape[-3:] == (case.options["height"], case.options["width"], 3)
    assert shown.std() > 10  # of 255: there is something to see
    # Weights that lie elsewhere in memory add up in another order: a value on the edge between two integers may fall.
    assert np.abs(np.stack(policy.decode(latents)).astype(int) - shown).max() <= 1
    assert np.array_equal(np.stack(dataclasses.replace(policy, pipeline=theirs).decode(latents)), shown)


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_encoding_is_the_pipelines_own(case: Case, folder: Path, tiny_policy: PipelinePolicy) -> None:
    theirs = case.theirs(folder)
    for text in (*TEXTS, ""):
        with torch.no_grad():
            golden = case.encode(theirs, text)
        condition = tiny_policy.encode([text])
        assert condition.keys() == golden.keys()
        for name, tensor in golden.items():
            assert torch.equal(condition[name][0], tensor)


def test_the_grid_falls_from_exactly_1_to_exactly_0(tiny_policy: PipelinePolicy) -> None:
    for num_steps in (2, 10, 50):
        grid = tiny_policy.sigmas(num_steps)
        assert grid.dtype == np.float64
        assert (len(grid), grid[0], grid[-1]) == (num_steps + 1, 1.0, 0.0)
        assert (np.diff(grid) < 0).all()
        assert np.array_equal(tiny_policy.sigmas(num_steps), grid)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_network_gets_what_the_pipeline_gives_it(case: Case, folder: Path, dtype: torch.dtype) -> None:
    """In low precision, where it matters in which order things are rounded: time, embeddings, positions, guidance."""
    policy, theirs = case.policy(folder, dtype=str(dtype).removeprefix("torch.")), case.theirs(folder, dtype=dtype)
    ours, golden = (_recorded(pipeline.transformer) for pipeline in (policy.pipeline, theirs))
    start = _start(policy, 1).to(dtype).to(torch.float32)
    case.path(theirs, TEXTS[1:2], start, 1.0, STEPS)
    grid, condition = policy.sigmas(STEPS), policy.encode(TEXTS[1:2])
    for sigma in grid[:-1]:
        with torch.no_grad():
            policy.velocity(start, torch.tensor([sigma]), condition)
    assert len(ours) == len(golden) == STEPS
    for k, (found, expected) in enumerate(zip(ours, golden, strict=True)):
        for name, value in expected.items():
            if value is None or name.endswith("attention_kwargs"):
                assert found.get(name) is None
            elif not isinstance(value, Tensor):
                assert found[name] == value
            elif name != "hidden_states" or k == 0:
                assert found[name].dtype == value.dtype
                assert torch.equal(found[name], value)


def _recorded(network: torch.nn.Module) -> list[dict[str, Any]]:
    """A list that every call of the network adds its inputs to."""
    calls: list[dict[str, Any]] = []

    def record(_: Any, positional: Any, inputs: dict[str, Any]) -> None:
        assert not positional
        calls.append(inputs)

    network.register_forward_pre_hook(record, with_kwargs=True)
    return calls


# -- the sampler on it ------------------------------------------------------------------------------------------------


def _members() -> list[Member]:
    """Two prompts of different lengths, two trajectories each."""
    config = small(rollout={"group_size": 2, "prompts_per_iteration": 2})
    prompts = [Prompt(text, {}) for text in TEXTS[:2]]
    return [member for task in shard_tasks(config, config.run_id, prompts, 0, {}) for member in task.members]


def test_a_flow_sde_step_is_the_papers(tiny_policy: PipelinePolicy) -> None:
    """Flow-GRPO (arXiv 2505.05470): x' = x + [v + g^2 / (2 s) (x + (1 - s) v)] dt + g sqrt(-dt) eps, here in float64."""
    grid = sampler.transitions("flow_sde", tiny_policy.sigmas(STEPS), 0.7)
    seeds, texts = [11, 12], list(TEXTS[:2])
    condition = tiny_policy.encode(texts)
    path = sampler.draw(
        lambda x, sigma: tiny_policy.velocity(x, sigma, condition), _start(tiny_policy, 2), grid, seeds, "float32"
    )
    for k in range(STEPS):
        sigma, following = grid.sigmas[k], grid.sigmas[k + 1]
        with torch.no_grad():
            velocity = tiny_policy.velocity(path.latents[:, k], torch.full((2,), sigma, dtype=torch.float64), condition)
        x, v = path.latents[:, k].double().numpy(), velocity.double().numpy()
        g = 0.7 * math.sqrt(sigma / (1 - (grid.sigmas[1] if sigma == 1 else sigma)))
        dt, std = following - sigma, g * math.sqrt(sigma - following)
        mean = x + (v + g**2 / (2 * sigma) * (x + (1 - sigma) * v)) * dt
        noise = np.stack([sampler.noise(seed, k, tiny_policy.latent_shape).double().numpy() for seed in seeds])
        new = path.latents[:, k + 1].double().numpy()
        np.testing.assert_allclose(new, mean + std * noise, rtol=1e-5, atol=1e-5 * np.abs(x).max())
        golden = -((new - mean) ** 2 / (2 * std**2) + math.log(std) + 0.5 * math.log(2 * math.pi)).reshape(2, -1).sum(1)
        np.testing.assert_allclose(path.logprob[:, k].numpy(), golden, rtol=1e-4, atol=1e-4 * elements(tiny_policy))


VELOCITY_DOUBT = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}
"""How far a velocity (of size 1 to 2) may change with the batch it is computed in: a few roundings of the model's dtype."""


@pytest.mark.parametrize("storage_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", VELOCITY_DOUBT)
def test_stored_trajectories_are_on_policy(
    case: Case, loaded: Loaded, directory: Directory, dtype: str, storage_dtype: str
) -> None:
    """Read back from a shard and judged again the log-ratio is 0: exactly in the same batches, nearly in others.

    Per element, a mean that is uncertain by e standard deviations makes |log ratio| at most e (1 + e / 2) or so.
    """
    policy = loaded(case.name, dtype, 3.0)
    config = small(rollout={"num_steps": STEPS, "storage_dtype": storage_dtype})
    grid, members = grid_of(policy, config), _members()
    texts = [member.prompt.text for member in members]
    drawn = draw_fresh(policy, members, grid, storage_dtype)
    rows = stored(directory, "00000", policy, members, drawn, config)
    latents = torch.stack([to_tensor(read_latents(directory, LatentLocation.of(row), 0, STEPS), storage_dtype) for row in rows])
    assert torch.equal(latents, drawn.latents)
    written = torch.tensor([row["behaviour_logprob"] for row in rows], dtype=torch.float64)
    assert bool(torch.isfinite(written).all())
    condition = policy.encode(texts)
    for k in range(STEPS):
        sigmas, steps = torch.full((len(rows),), grid.sigmas[k], dtype=torch.float64), torch.full((len(rows),), k)
        with torch.no_grad():
            velocity = policy.velocity(latents[:, k], sigmas, condition)
        again = sampler.log_density(grid, steps, latents[:, k], latents[:, k + 1], velocity)
        assert torch.equal(again, written[:, k])
    doubt = VELOCITY_DOUBT[dtype] * np.abs(grid.velocity_coef) / grid.std + 1e-6
    for size in (1, 3, len(rows)):
        for part in torch.split(torch.arange(len(rows)), size):
            seeds, told = ([values[i] for i in part] for values in (drawn.noise_seeds, written.tolist()))
            judged = evaluate(policy, Stored([texts[i] for i in part], latents[part], told, seeds), grid)
            log_ratio = ((judged.logprob - written[part]) / elements(policy)).abs().amax(0).numpy()
            assert (log_ratio <= doubt * (1 + doubt / 2)).all(), (log_ratio, doubt)
    assert np.array_equal(media.decode(read_media(directory, rows[0])), policy.decode(drawn.latents[:, -1])[0])
    assert {row["media_format"] for row in rows} == {"mp4" if case.name == "wan" else "png"}


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_alone_or_among_prompts_of_other_lengths(case: Case, loaded: Loaded, scale: float) -> None:
    policy = loaded(case.name, "float32", scale)
    start, sigmas = _start(policy, 3), torch.tensor([1.0, 0.6, 0.05], dtype=torch.float64)
    with torch.no_grad():
        together = policy.velocity(start, sigmas, policy.encode(TEXTS))
        for i, text in enumerate(TEXTS):
            alone = policy.velocity(start[i : i + 1], sigmas[i : i + 1], policy.encode([text]))
            assert float((alone[0] - together[i]).abs().max()) <= 1e-5
    assert float((together[0] - together[1]).abs().max()) > 0.1


def test_every_input_counts(tiny_policy: PipelinePolicy) -> None:
    """Prompt, state and time change the velocity: nothing is wired to a constant."""
    start, sigmas = _start(tiny_policy, 2), torch.tensor([0.5, 0.5], dtype=torch.float64)
    condition = tiny_policy.encode(TEXTS[:2])
    with torch.no_grad():
        base = tiny_policy.velocity(start, sigmas, condition)
        swapped = tiny_policy.velocity(start, sigmas, tiny_policy.encode(TEXTS[:2][::-1]))
        later = tiny_policy.velocity(start, sigmas * 0.9, condition)
        moved = tiny_policy.velocity(start * 0.9, sigmas, condition)
    for other in (swapped, later, moved):
        assert float((other - base).abs().amax(tuple(range(1, base.ndim))).min()) > 1e-3
