"""The sampler: coefficients, densities, path variance and noise, against closed forms written here in float64 NumPy."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from opgrpo_data.io import Directory
from opgrpo_data.locations import LatentLocation
from opgrpo_data.reading import read_latents
from pipelines import sampler
from pipelines.embedded import ABSENT, PIPELINE_DIR
from pipelines.policies.pipeline_policy import PipelinePolicy
from pipelines.trajectories import draw_fresh, to_stored, to_tensor
from tests.pipelines.helpers import elements, grid_of, members_of, small, stored

Array = NDArray[np.float64]
SHAPE = (8, 3, 3)
SDE_SAMPLERS: tuple[sampler.Sampler, ...] = ("flow_sde", "flow_cps", "dance_sde")


@st.composite
def grids(draw: Callable[..., Any]) -> list[float]:
    """Decreasing grids from 1, or from below it, to 0."""
    inner = draw(st.lists(st.integers(1, 999), min_size=1, max_size=12, unique=True))
    start = [1.0] if draw(st.booleans()) else []
    return [*start, *(value / 1000 for value in sorted(inner, reverse=True)), 0.0]


def sd3_grid(num_steps: int = 10) -> list[float]:
    """Stable Diffusion 3's own grid (shift 3), from diffusers."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(num_steps)
    return [float(sigma) for sigma in scheduler.sigmas]


def table_mean_and_std(name: str, grid: Array, k: int, a: float, x: Array, v: Array) -> tuple[Array, float]:
    """The table of samplers, as the papers write it: step k of a grid, in float64."""
    sigma, following = grid[k], grid[k + 1]
    dt = following - sigma
    if name == "ode":
        return x + v * dt, 0.0
    if name == "flow_sde":  # arXiv 2505.05470: at sigma = 1 the denominator takes the next sigma
        g = a * math.sqrt(sigma / (1 - (grid[1] if sigma == 1 else sigma)))
        mean = x * (1 + g**2 / (2 * sigma) * dt) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
        return mean, g * math.sqrt(-dt)
    if name == "dance_sde":  # arXiv 2505.07818: x + v dt with the score correction of a constant diffusion
        score = -(x + (1 - sigma) * v) / sigma
        return x + (v - 0.5 * a**2 * score) * dt, a * math.sqrt(-dt)
    sample, noise = x - sigma * v, x + (1 - sigma) * v  # arXiv 2509.05952
    std = following * math.sin(a * math.pi / 2)
    return (1 - following) * sample + math.sqrt(following**2 - std**2) * noise, std


@pytest.mark.parametrize("name", ["flow_sde", "flow_cps", "dance_sde", "ode"])
@given(grid=grids(), a=st.floats(0.05, 0.95), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_coefficients_are_those_of_the_papers(name: sampler.Sampler, grid: list[float], a: float, seed: int) -> None:
    _check_coefficients(name, grid, a, seed)


@pytest.mark.parametrize("name", ["flow_sde", "flow_cps", "dance_sde", "ode"])
def test_coefficients_on_sd3s_grid(name: sampler.Sampler) -> None:
    grid = sd3_grid()
    assert [round(sigma, 4) for sigma in grid[-3:]] == [0.278, 0.0089, 0.0]
    _check_coefficients(name, grid, 0.7, 0)


def _check_coefficients(name: sampler.Sampler, grid: list[float], a: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ours = sampler.transitions(name, grid, a)
    assert ours.num_steps == len(grid) - 1
    assert ours.sigmas.tolist() == grid
    for k in range(ours.num_steps):
        x, v = rng.standard_normal((2, 6))
        mean, std = table_mean_and_std(name, np.array(grid), k, a, x, v)
        np.testing.assert_allclose(x + ours.state_coef[k] * x + ours.velocity_coef[k] * v, mean, rtol=1e-10, atol=1e-10)
        assert ours.std[k] == pytest.approx(std, rel=1e-12)
        steps = torch.tensor([k, k])
        pair = torch.tensor(np.stack([x, x]), dtype=torch.float32), torch.tensor(np.stack([v, v]), dtype=torch.float32)
        offset = sampler.offset(ours, steps, *pair).numpy().astype(np.float64)
        np.testing.assert_allclose(offset, np.stack([mean - x] * 2), rtol=1e-5, atol=1e-5 * np.abs(mean - x).max() + 1e-30)


def test_at_sigma_1_flow_sde_takes_the_next_sigma() -> None:
    grid = sampler.transitions("flow_sde", [1.0, 0.75, 0.5, 0.0], 0.7)
    assert grid.std[0] == pytest.approx(0.7 * math.sqrt(1 / (1 - 0.75)) * math.sqrt(0.25))
    assert grid.std[1] == pytest.approx(0.7 * math.sqrt(0.75 / (1 - 0.75)) * math.sqrt(0.25))
    assert np.isfinite(grid.state_coef).all()
    assert np.isfinite(grid.velocity_coef).all()


@given(grid=grids())
@settings(deadline=None, max_examples=50)
def test_cps_without_noise_is_the_ode_and_its_last_step_never_has_noise(grid: list[float]) -> None:
    quiet, ode = sampler.transitions("flow_cps", grid, 1e-9), sampler.transitions("ode", grid, 0.0)
    np.testing.assert_allclose(quiet.state_coef, ode.state_coef, atol=1e-14)
    np.testing.assert_allclose(quiet.velocity_coef, ode.velocity_coef, atol=1e-14)
    loud = sampler.transitions("flow_cps", grid, 0.8)
    assert loud.std[-1] == 0
    assert (loud.std[:-1] > 0).all()
    assert not ode.std.any()


@pytest.mark.parametrize("name", SDE_SAMPLERS)
def test_a_short_step_keeps_the_marginals_of_the_flow(name: sampler.Sampler) -> None:
    """Data N(0, tau^2): the exact velocity is linear in x, so the variance after one step has a closed form.

    The variance of x_sigma is (1 - sigma)^2 tau^2 + sigma^2; an SDE with the right score correction keeps it to first order.
    """
    tau, sigma = 0.5, 0.6

    def variance(s: float) -> float:
        return (1 - s) ** 2 * tau**2 + s**2

    errors = []
    for step in (0.02, 0.01, 0.005):
        grid = sampler.transitions(name, [sigma, sigma - step, 0.0], 0.3)
        slope = (sigma - (1 - sigma) * tau**2) / variance(sigma)  # E[eps - x_0 | x] = slope x
        after = (1 + grid.state_coef[0] + grid.velocity_coef[0] * slope) ** 2 * variance(sigma) + grid.std[0] ** 2
        errors.append(abs(after - variance(sigma - step)))
    if name == "flow_cps":  # its noise does not shrink with the step, it replaces: the coefficients are exact instead
        grid = sampler.transitions(name, [sigma, 0.55, 0.0], 0.3)
        noise_kept = 1 + grid.state_coef[0] - (1 - 0.55)  # kept share of eps_hat; x = x0_hat (1 - sigma) + sigma eps_hat
        assert noise_kept**2 + grid.std[0] ** 2 == pytest.approx(0.55**2)
    else:
        assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
        assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize(
    "grid",
    [[1.0, 0.5], [1.0, 0.5, 0.5, 0.0], [0.0, 0.5, 1.0], [0.0], [], [1.5, 0.5, 0.0], [1.0, math.nan, 0.0], [1.0, -0.5, 0.0]],
)
def test_bad_grids_are_refused(grid: list[float]) -> None:
    with pytest.raises(ValueError, match="sigmas must decrease from at most 1 to 0, got"):
        sampler.transitions("flow_sde", grid, 0.7)


# -- densities --------------------------------------------------------------------------------------------------------


def _pairs(grid: sampler.Transitions, count: int, seed: int, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, ...]:
    """steps, latents, velocity and noise of `count` transitions that have a density."""
    rng = torch.Generator().manual_seed(seed)
    steps = torch.tensor(np.flatnonzero(grid.std > 0))[torch.arange(count) % int((grid.std > 0).sum())]
    return steps, *(torch.randn((count, *shape), generator=rng) for _ in range(3))


def _column(values: Array, steps: Tensor) -> Array:
    return np.asarray(values[steps.numpy()].reshape(-1, 1, 1, 1))


def _mean64(grid: sampler.Transitions, steps: Tensor, latents: Tensor, velocity: Tensor) -> Array:
    x, v = latents.double().numpy(), velocity.double().numpy()
    return np.asarray(x + _column(grid.state_coef, steps) * x + _column(grid.velocity_coef, steps) * v)


@pytest.mark.parametrize("name", SDE_SAMPLERS)
def test_log_density_is_scipys(name: sampler.Sampler) -> None:
    grid = sampler.transitions(name, sd3_grid(), 0.7)
    steps, latents, velocity, noise = _pairs(grid, 20, 0)
    mean = _mean64(grid, steps, latents, velocity)
    std = _column(grid.std, steps)
    following = torch.tensor(mean + std * noise.double().numpy(), dtype=torch.float32)
    ours = sampler.log_density(grid, steps, latents, following, velocity)
    golden = stats.norm.logpdf(following.double().numpy(), mean, std).sum((1, 2, 3))
    assert ours.dtype == torch.float64
    # x_{k+1} is float32, and so is what the density is computed in: 1e-7 |x| / s of a standard deviation is not known.
    doubt = 72 * 4 * 3e-7 * float(following.abs().max()) / grid.std[steps.numpy()]
    assert (np.abs(ours.numpy() - golden) <= doubt).all()


def test_log_density_is_differentiable_with_the_gaussian_gradient() -> None:
    grid = sampler.transitions("flow_sde", sd3_grid(), 0.7)
    steps, latents, velocity, noise = _pairs(grid, 10, 1)
    velocity.requires_grad_()
    with torch.no_grad():
        following = latents + sampler.offset(grid, steps, latents, velocity)
        following = following + torch.tensor(_column(grid.std, steps), dtype=torch.float32) * noise
    torch.autograd.backward(sampler.log_density(grid, steps, latents, following, velocity).sum())
    coef, std = _column(grid.velocity_coef, steps), _column(grid.std, steps)
    residual = following.double().numpy() - _mean64(grid, steps, latents, velocity.detach())
    assert velocity.grad is not None
    np.testing.assert_allclose(velocity.grad.numpy(), coef * residual / std**2, rtol=2e-3, atol=2e-3)


@given(scale=st.floats(0.01, 2), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_path_variance_is_the_squared_distance_of_means(scale: float, seed: int) -> None:
    grid = sampler.transitions("flow_sde", np.linspace(1, 0, 11), 0.7)
    steps, latents, behaviour, noise = _pairs(grid, 10, seed)
    old = behaviour + scale * torch.randn(behaviour.shape, generator=torch.Generator().manual_seed(seed + 1))
    following = latents + sampler.offset(grid, steps, latents, behaviour)
    following = following + torch.tensor(_column(grid.std, steps), dtype=torch.float32) * noise
    ours = sampler.path_variance(grid, steps, latents, following, old, noise).numpy()
    between = _column(grid.velocity_coef, steps) * (old.double() - behaviour.double()).numpy()
    golden = (between**2).sum((1, 2, 3)) / grid.std[steps.numpy()] ** 2
    np.testing.assert_allclose(ours, golden, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize(("dtype", "resolution"), [("float32", 2**-23), ("float16", 2**-11), ("bfloat16", 2**-8)])
def test_path_variance_of_an_unchanged_policy_is_the_rounding_alone(
    dtype: str, resolution: float, policy: PipelinePolicy
) -> None:
    config = small(rollout={"num_steps": 10, "storage_dtype": dtype})
    grid, members = grid_of(policy, config), members_of(config)
    path = draw_fresh(policy, members, grid, dtype)
    for k in range(grid.num_steps):
        steps = torch.full((len(members),), k)
        with torch.no_grad():
            velocity = policy.velocity(
                path.latents[:, k],
                torch.full((len(members),), grid.sigmas[k], dtype=torch.float64),
                policy.encode([member.prompt.text for member in members]),
            )
        drawn = torch.stack([sampler.noise(member.seed, k, policy.latent_shape) for member in members])
        found = sampler.path_variance(grid, steps, path.latents[:, k], path.latents[:, k + 1], velocity, drawn)
        bound = elements(policy) * (2 * resolution * float(path.latents[:, k : k + 2].abs().max()) / grid.std[k]) ** 2
        assert float(found.max()) <= bound
        assert float(found.max()) < 1e-8 or grid.std[k] < 0.1 or dtype != "float32"


def test_ratio_law() -> None:
    """Under x ~ N(m_b, s^2): log(p_old / p_b) ~ N(-lambda / 2, lambda), so E_b[ratio] = 1.

    20,000 draws at lambda = 0.8. Tolerances are five standard errors of each estimator.
    """
    count, k, lam = 20_000, 3, 0.8
    grid = sampler.transitions("flow_sde", np.linspace(1, 0, 11), 0.7)
    rng = torch.Generator().manual_seed(7)
    latents, behaviour, direction = (torch.randn((1, *SHAPE), generator=rng) for _ in range(3))
    wanted = math.sqrt(lam) * grid.std[k] / abs(grid.velocity_coef[k])
    old = behaviour + direction * (wanted / float(direction.norm()))
    steps, many = torch.full((count,), k), latents.expand(count, *SHAPE)
    noise = torch.randn((count, *SHAPE), generator=rng)
    following = many + sampler.offset(grid, steps, many, behaviour.expand_as(many)) + float(grid.std[k]) * noise
    under_old = sampler.log_density(grid, steps, many, following, old.expand_as(many))
    under_behaviour = sampler.log_density(grid, steps, many, following, behaviour.expand_as(many))
    log_ratio = (under_old - under_behaviour).numpy()
    assert abs(log_ratio.mean() + lam / 2) < 5 * math.sqrt(lam / count)
    assert abs(log_ratio.var() - lam) < 5 * lam * math.sqrt(2 / count)
    assert abs(np.exp(log_ratio).mean() - 1) < 5 * math.sqrt(math.expm1(lam) / count)
    assert stats.kstest(log_ratio, stats.norm(-lam / 2, math.sqrt(lam)).cdf).pvalue > 1e-3
    variance = sampler.path_variance(grid, steps, many, following, old.expand_as(many), noise)
    np.testing.assert_allclose(variance.numpy(), lam, rtol=1e-3)


# -- noise ------------------------------------------------------------------------------------------------------------


def test_noise_depends_on_seed_and_step_alone() -> None:
    seeds = [3, 2**62 + 5, 0, 77]
    together = sampler.batch_noise(seeds, 4, SHAPE, torch.device("cpu"))
    torch.manual_seed(123)
    for i, seed in enumerate(seeds):
        assert torch.equal(together[i], sampler.noise(seed, 4, SHAPE))
    shuffled = sampler.batch_noise(seeds[::-1], 4, SHAPE, torch.device("cpu"))
    assert torch.equal(shuffled, together.flip(0))
    assert together.dtype == torch.float32
    assert not torch.equal(sampler.noise(1, 0, SHAPE), sampler.noise(1 + 2**32, 0, SHAPE))  # every bit of the seed counts


def test_noise_is_standard_normal_and_independent_between_steps_and_seeds() -> None:
    draws = torch.stack([sampler.noise(seed, step, SHAPE).flatten() for seed in range(20) for step in range(-1, 9)])
    assert stats.kstest(draws.flatten().numpy(), "norm").pvalue > 1e-3
    correlation = np.corrcoef(draws.numpy())
    off_diagonal = correlation[~np.eye(len(draws), dtype=bool)]
    assert np.abs(off_diagonal).max() < 6 / math.sqrt(draws.shape[1])  # six standard errors over 19,900 pairs


# -- the denoising loop -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flow_sde", "flow_cps", "dance_sde", "ode"])
def test_draw_follows_the_table_step_by_step(name: sampler.Sampler) -> None:
    seeds = [5, 6, 7]
    grid = sampler.transitions(name, sd3_grid(6), 0.6)
    start = sampler.batch_noise(seeds, -1, SHAPE, torch.device("cpu"))
    path = sampler.draw(lambda x, sigma: 0.3 * x + sigma.view(-1, 1, 1, 1).float(), start, grid, seeds, "float32")
    state = start.double().numpy()
    for k in range(grid.num_steps):
        mean, std = table_mean_and_std(name, grid.sigmas, k, 0.6, state, 0.3 * state + grid.sigmas[k])
        state = mean + std * np.stack([sampler.noise(seed, k, SHAPE).double().numpy() for seed in seeds])
        np.testing.assert_allclose(path.latents[:, k + 1].numpy(), state, rtol=1e-5, atol=1e-5)
        stored_state = path.latents[:, k].double().numpy()
        mean, _ = table_mean_and_std(name, grid.sigmas, k, 0.6, stored_state, 0.3 * stored_state + grid.sigmas[k])
        if std > 0:
            golden = stats.norm.logpdf(path.latents[:, k + 1].double().numpy(), mean, std).sum((1, 2, 3))
            np.testing.assert_allclose(path.logprob[:, k].numpy(), golden, atol=1e-5 * math.prod(SHAPE) / std)
        else:
            assert not path.logprob[:, k].any()


def test_draw_from_the_middle_is_the_end_of_the_whole() -> None:
    seeds = [1, 2]
    grid = sampler.transitions("flow_sde", sd3_grid(6), 0.6)
    start = sampler.batch_noise(seeds, -1, SHAPE, torch.device("cpu"))

    def velocity(latents: Tensor, sigmas: Tensor) -> Tensor:
        return latents.tanh()

    whole = sampler.draw(velocity, start, grid, seeds, "float16")
    tail = sampler.draw(velocity, whole.latents[:, 2], grid, seeds, "float16", first_step=2)
    assert torch.equal(tail.latents, whole.latents[:, 2:])
    assert torch.equal(tail.logprob, whole.logprob[:, 2:])


# -- correct from the start -------------------------------------------------------------------------------------------

ON_POLICY = 1e-6
"""Largest |log ratio| of a transition under its own policy, in mean units, when it is evaluated in another batch."""


def _on_policy_bounds(grid: sampler.Transitions) -> Array:
    """ON_POLICY per step, more where the sampler magnifies the velocity: there a density cannot be known better.

    A velocity is uncertain by about 5e-7 (matrix products of other sizes add in another order), hence a mean by
    |velocity_coef| 5e-7. In standard deviations that is at most 1.8 ON_POLICY for flow_sde, 11 for dance_sde and 125 for
    flow_cps, all in the last step that has noise; and below ON_POLICY in the steps that are trained.
    """
    density = grid.std > 0
    magnified = np.abs(grid.velocity_coef) / np.where(density, grid.std, np.inf)
    assert (magnified[:5] < 1).all()
    return np.asarray(ON_POLICY * np.maximum(1, magnified))


def _reevaluated(policy: PipelinePolicy, grid: sampler.Transitions, texts: list[str], latents: Tensor, chunk: int) -> Tensor:
    """Log-density of all transitions that have one, shuffled and cut into batches of `chunk`: (B, T) float64."""
    count, steps = latents.shape[0], int((grid.std > 0).sum())
    order = torch.randperm(count * steps, generator=torch.Generator().manual_seed(0))
    result = torch.zeros(count, grid.num_steps, dtype=torch.float64)
    for chosen in torch.split(order, chunk):
        row, k = chosen // steps, chosen % steps
        with torch.no_grad():
            velocity = policy.velocity(
                latents[row, k], torch.tensor(grid.sigmas)[k], policy.encode([texts[i] for i in row.tolist()])
            )
        result[row, k] = sampler.log_density(grid, k, latents[row, k], latents[row, k + 1], velocity)
    return result


@pytest.mark.parametrize("name", SDE_SAMPLERS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_stored_trajectories_are_on_policy(dtype: str, name: str, policy: PipelinePolicy, directory: Directory) -> None:
    config = small(rollout={"num_steps": 10, "storage_dtype": dtype, "sampler": name})
    grid, members = grid_of(policy, config), members_of(config)
    drawn = draw_fresh(policy, members, grid, dtype)
    rows = stored(directory, "00000", policy, members, drawn, config)
    latents = torch.stack([to_tensor(read_latents(directory, LatentLocation.of(row), 0, 10), dtype) for row in rows])
    assert torch.equal(latents, drawn.latents)
    texts = [member.prompt.text for member in members]
    written = torch.tensor([row["behaviour_logprob"] for row in rows], dtype=torch.float64)
    for chunk in (1, 7, 80):
        again = _reevaluated(policy, grid, texts, latents, chunk)
        log_ratio = ((again - written) / elements(policy)).abs().amax(0).numpy()
        assert (log_ratio <= _on_policy_bounds(grid)).all(), log_ratio


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_same_check_catches_rounding_outside_of_the_loop(dtype: str, policy: PipelinePolicy) -> None:
    config = small(rollout={"num_steps": 10})
    grid, members = grid_of(policy, config), members_of(config)
    drawn = draw_fresh(policy, members, grid, "float32")
    rounded_late = to_tensor(to_stored(drawn.latents, dtype), dtype)
    again = _reevaluated(policy, grid, [member.prompt.text for member in members], rounded_late, 80)
    log_ratio = ((again - drawn.behaviour_logprob) / elements(policy)).abs().amax(0).numpy()
    assert (log_ratio > 10 * _on_policy_bounds(grid)).all(), log_ratio


def test_a_trajectory_drawn_alone_is_the_one_drawn_in_a_batch(policy: PipelinePolicy) -> None:
    """To float32 rounding: matrix products of other sizes add in another order. Ten steps let it grow to some 6e-6."""
    config = small(rollout={"num_steps": 10})
    grid, members = grid_of(policy, config), members_of(config)
    together = draw_fresh(policy, members, grid, "float32").latents
    for i, member in enumerate(members):
        alone = draw_fresh(policy, [member], grid, "float32").latents[0]
        assert torch.equal(alone[0], together[i, 0])
        assert float((alone - together[i]).abs().max()) <= 2e-5


# -- the ODE is diffusers' own ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@pytest.mark.parametrize("text", ["two blue squares", "a red circle left of a blue square"])
def test_ode_sampling_is_the_pipelines_call(text: str, guidance_scale: float, policy: PipelinePolicy) -> None:
    ours = dataclasses.replace(policy, guidance_scale=guidance_scale, _recent=OrderedDict())
    start = sampler.batch_noise([1], -1, policy.latent_shape, policy.device)
    theirs: list[Tensor] = []

    def collect(pipeline: object, step: int, timestep: Tensor, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        theirs.append(kwargs["latents"].clone())
        return {}

    pipeline = StableDiffusion3Pipeline.from_pretrained(PIPELINE_DIR, **ABSENT)
    pipeline.set_progress_bar_config(disable=True)
    call = {
        "num_inference_steps": 10,
        "guidance_scale": guidance_scale,
        "max_sequence_length": 0,
    }
    pipeline(text, latents=start.clone(), output_type="latent", callback_on_step_end=collect, **call)
    picture = pipeline(text, latents=start.clone(), output_type="pil", **call).images[0]
    grid = sampler.transitions("ode", ours.sigmas(10), 0.0)
    condition = ours.encode([text])
    path = sampler.draw(lambda x, sigma: ours.velocity(x, sigma, condition), start, grid, [1], "float32")
    assert len(theirs) == 10
    for k, latents in enumerate(theirs):
        assert float((path.latents[:, k + 1] - latents).abs().max()) <= 1e-5
    assert np.array_equal(ours.decode(theirs[-1])[0], np.asarray(picture))
    # Our last latents differ in the last digits: a value on the edge between two integers may round the other way.
    assert np.abs(ours.decode(path.latents[:, -1])[0].astype(int) - np.asarray(picture).astype(int)).max() <= 1
