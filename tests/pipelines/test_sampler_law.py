"""The law of the sampler, for made-up velocity fields on latents of the embedded world's size: D = 72, no model.

Two random fields play the behaviour and the old policy. What the formulas of docs/maths.md say of them is computed here in
float64 NumPy; what they say of distributions is tested as such, with fixed seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from pipelines import sampler
from pipelines.sampler import Path, Sampler, Transitions

Array = NDArray[np.float64]

SHAPE = (8, 3, 3)
D = 72
COUNT = 3000
SHIFTED = [3 * s / (1 + 2 * s) for s in np.linspace(1, 0, 7).tolist()]
"""Six steps, moved towards noise like Stable Diffusion 3's."""
LEVELS: dict[Sampler, float] = {"flow_sde": 0.7, "flow_cps": 0.6, "dance_sde": 0.5, "wan_sde": 1.0}
SAMPLERS = tuple(LEVELS)


def field(seed: int) -> sampler.Velocity:
    """A smooth random velocity: tanh of a linear map of the state, another map of it, and a drift in sigma."""
    rng = torch.Generator().manual_seed(seed)
    inner, outer = (torch.randn((D, D), generator=rng) / math.sqrt(D) for _ in range(2))
    drift = torch.randn((D,), generator=rng)

    def velocity(latents: Tensor, sigmas: Tensor) -> Tensor:
        flat = latents.flatten(1)
        found = torch.tanh(flat @ inner) + 0.5 * flat @ outer + sigmas.to(torch.float32).view(-1, 1) * drift
        return found.view(latents.shape)

    return velocity


def near(seed: int, distance: float) -> sampler.Velocity:
    """The field of seed 0, moved a little towards another."""
    base, other = field(0), field(seed)
    return lambda x, sigmas: (1 - distance) * base(x, sigmas) + distance * other(x, sigmas)


# -- coefficients --------------------------------------------------------------------------------------------------------


def diffusion(name: Sampler, sigmas: Array, a: float, k: int) -> float:
    """g of the three SDEs at step k."""
    sigma, first = float(sigmas[k]), float(sigmas[1])
    if name == "flow_sde":
        return a * math.sqrt(sigma / (1 - first)) if sigma == 1 else a * math.sqrt(sigma / (1 - sigma))
    return a if name == "dance_sde" else a * first * sigma


def mean_and_std(name: Sampler, sigmas: Array, a: float, k: int, x: Array, v: Array) -> tuple[Array, float]:
    """Euler and Maruyama on the reverse SDE dx = [v - g^2/2 score] dt + g dw, or coefficients-preserving sampling.

    Under rectified flow x = (1 - sigma) x0 + sigma eps and v = eps - x0: x0 = x - sigma v, eps = x + (1 - sigma) v,
    score = -eps / sigma.
    """
    sigma, following = float(sigmas[k]), float(sigmas[k + 1])
    clean, eps = x - sigma * v, x + (1 - sigma) * v
    if name == "flow_cps":
        std = following * math.sin(math.pi * a / 2)
        return (1 - following) * clean + following * math.cos(math.pi * a / 2) * eps, std
    g, dt = diffusion(name, sigmas, a, k), following - sigma
    return x + (v - g**2 / 2 * (-eps / sigma)) * dt, g * math.sqrt(-dt)


@st.composite
def grids(draw: st.DrawFn) -> list[float]:
    """Decreasing grids to 0, from 1 or from below."""
    inner = draw(st.lists(st.integers(1, 999), min_size=1, max_size=10, unique=True))
    start = [1.0] if draw(st.booleans()) else []
    return [*start, *(value / 1000 for value in sorted(inner, reverse=True)), 0.0]


@pytest.mark.parametrize("name", SAMPLERS)
@given(sigmas=grids(), a=st.floats(0.05, 0.95), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=40)
def test_coefficients_are_those_of_the_formulas(name: Sampler, sigmas: list[float], a: float, seed: int) -> None:
    grid, values = sampler.transitions(name, sigmas, a), np.array(sigmas)
    assert grid.num_steps == len(sigmas) - 1
    assert grid.sigmas.tolist() == sigmas
    x, v = np.random.default_rng(seed).standard_normal((2, 5))
    for k in range(grid.num_steps):
        mean, std = mean_and_std(name, values, a, k, x, v)
        np.testing.assert_allclose(x + grid.state_coef[k] * x + grid.velocity_coef[k] * v, mean, rtol=1e-10, atol=1e-10)
        assert grid.std[k] == pytest.approx(std, rel=1e-12, abs=1e-15)


def test_wan_by_hand() -> None:
    """sigmas 1, 0.8, 0.3, 0 and a = 1: g = 0.8 sigma; s = g sqrt(d); the correction g^2 / (2 sigma) is 0.32 sigma."""
    grid = sampler.transitions("wan_sde", [1.0, 0.8, 0.3, 0.0], 1.0)
    np.testing.assert_allclose(grid.std, [0.8 * 0.2**0.5, 0.64 * 0.5**0.5, 0.24 * 0.3**0.5], rtol=1e-12)
    np.testing.assert_allclose(grid.state_coef, [-0.2 * 0.32, -0.5 * 0.256, -0.3 * 0.096], rtol=1e-12)
    expected = [-0.2, -0.5 * (1 + 0.256 * 0.2), -0.3 * (1 + 0.096 * 0.7)]
    np.testing.assert_allclose(grid.velocity_coef, expected, rtol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_less_noise_is_closer_to_the_ode(name: Sampler) -> None:
    """As the noise level goes to 0 every sampler becomes Euler's method: m = x - d v."""
    grid, ode = sampler.transitions(name, SHIFTED, 1e-6), sampler.transitions("ode", SHIFTED, 0.0)
    np.testing.assert_allclose(grid.state_coef, ode.state_coef, atol=1e-9)
    np.testing.assert_allclose(grid.velocity_coef, ode.velocity_coef, rtol=1e-9)
    assert grid.std.max() < 1e-5


def test_only_the_last_step_of_cps_has_no_density() -> None:
    for name, a in LEVELS.items():
        std = sampler.transitions(name, SHIFTED, a).std
        assert (std[:-1] > 0).all()
        assert (std[-1] > 0) == (name != "flow_cps")


# -- densities -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
@given(seed=st.integers(0, 2**31), a=st.floats(0.1, 0.9))
@settings(deadline=None, max_examples=15)
def test_log_density_is_scipys(name: Sampler, seed: int, a: float) -> None:
    """Of transitions as they are drawn: the following state lies a few s_k from the mean."""
    grid, rng = sampler.transitions(name, SHIFTED, a), np.random.default_rng(seed)
    steps = rng.integers(0, grid.num_steps - 1, 7)
    x, v, eps = rng.standard_normal((3, 7, *SHAPE)).astype(np.float32)
    found, following = [], np.empty_like(x)
    for i, k in enumerate(steps):
        mean, std = mean_and_std(name, np.array(SHIFTED), a, int(k), x[i].astype(np.float64), v[i].astype(np.float64))
        following[i] = mean + std * eps[i]
        found.append(stats.norm.logpdf(following[i].astype(np.float64), mean, std).sum())
    tensors = (torch.from_numpy(array) for array in (x, following, v))
    density = sampler.log_density(grid, torch.from_numpy(steps), *tensors)
    assert density.dtype == torch.float64
    # Float32 states: a relative error of 1e-7 of |x| in a residual of size s_k.
    np.testing.assert_allclose(density.numpy(), found, atol=D * 3e-5, rtol=1e-6)


# -- the law of the ratio ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratios:
    """COUNT trajectories of the behaviour field, seen by the other one. Arrays (COUNT, steps with a density)."""

    grid: Transitions
    path: Path
    log_ratio: Array
    path_variance: Array
    distance: Array
    """|m_old - m_b|^2 / s^2 in float64, from both fields."""


@cache
def ratios(name: Sampler) -> Ratios:
    """Drawn by the field of seed 0; the other lies so near that Lambda is about 1."""
    behaviour, old = field(0), near(1, {"flow_sde": 0.06, "flow_cps": 0.05, "dance_sde": 0.04, "wan_sde": 0.05}[name])
    grid = sampler.transitions(name, SHIFTED, LEVELS[name])
    seeds = list(range(COUNT))
    start = torch.stack([sampler.noise(seed, -1, SHAPE) for seed in seeds])
    path = sampler.draw(behaviour, start, grid, seeds, "float32")
    log_ratio, variance, distance = [], [], []
    for k in np.flatnonzero(grid.std > 0):
        x, following = path.latents[:, k], path.latents[:, k + 1]
        steps, sigmas = torch.full((COUNT,), int(k)), torch.full((COUNT,), float(grid.sigmas[k]), dtype=torch.float64)
        ours, theirs = old(x, sigmas), behaviour(x, sigmas)
        log_ratio.append((sampler.log_density(grid, steps, x, following, ours) - path.logprob[:, k]).numpy())
        drawn = sampler.batch_noise(seeds, int(k), SHAPE, torch.device("cpu"))  # regenerated from the seeds
        variance.append(sampler.path_variance(grid, steps, x, following, ours, drawn).numpy())
        x64 = x.double().numpy()
        (one, std), (other, _) = (
            mean_and_std(name, np.array(SHIFTED), LEVELS[name], int(k), x64, v.double().numpy()) for v in (ours, theirs)
        )
        distance.append(np.square(one - other).sum((1, 2, 3)) / std**2)
    return Ratios(grid, path, *(np.stack(values, 1) for values in (log_ratio, variance, distance)))


@pytest.mark.parametrize("name", SAMPLERS)
def test_regenerated_noise_gives_the_distance_of_the_two_policies(name: Sampler) -> None:
    """m_b = x' - s eps needs no model: path_variance is |m_old - m_b|^2 / s^2 of the two fields."""
    found = ratios(name)
    assert found.path_variance.shape == (COUNT, 5 if name == "flow_cps" else 6)
    np.testing.assert_allclose(found.path_variance, found.distance, rtol=2e-3, atol=1e-6)
    assert 0.2 < found.distance.sum(1).mean() < 2.0  # else the tests below would say little


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_log_ratio_has_the_normal_law(name: Sampler) -> None:
    """(log r + lambda/2) / sqrt(lambda) ~ N(0, 1): at each step given its state, and of whole trajectories."""
    found = ratios(name)
    normal = (found.log_ratio + found.path_variance / 2) / np.sqrt(found.path_variance)
    for k in range(normal.shape[1]):
        assert stats.kstest(normal[:, k], "norm").pvalue > 0.01, k
    assert stats.kstest(normal.ravel(), "norm").pvalue > 0.01
    # Given the states, steps are independent: their standardised sum is normal as well.
    assert stats.kstest(normal.sum(1) / math.sqrt(normal.shape[1]), "norm").pvalue > 0.01
    assert abs(np.corrcoef(normal, rowvar=False) - np.eye(normal.shape[1])).max() < 4 / math.sqrt(COUNT)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_ratio_has_mean_1_under_the_behaviour_policy(name: Sampler) -> None:
    """E_b[p_old / p_b] = 1: of each step and of trajectories, within four standard errors."""
    found = ratios(name)
    for log_ratio in (*found.log_ratio.T, found.log_ratio.sum(1)):
        weights = np.exp(log_ratio)
        assert abs(weights.mean() - 1) < 4 * weights.std() / math.sqrt(COUNT)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_steps_are_drawn_from_what_they_say(name: Sampler) -> None:
    """(x' - m) / s of the behaviour field is standard normal, and the stored log-prob is its density."""
    found, values = ratios(name), np.array(SHIFTED)
    behaviour = field(0)
    for column, k in enumerate(np.flatnonzero(found.grid.std > 0)):
        x, following = found.path.latents[:400, k], found.path.latents[:400, k + 1].double().numpy()
        with torch.no_grad():
            v = behaviour(x, torch.full((400,), float(values[k]))).double().numpy()
        mean, std = mean_and_std(name, values, LEVELS[name], int(k), x.double().numpy(), v)
        residual = (following - mean) / std
        assert stats.kstest(residual.ravel(), "norm").pvalue > 0.001, k
        golden = stats.norm.logpdf(following, mean, std).sum((1, 2, 3))
        np.testing.assert_allclose(found.path.logprob[:400, k].numpy(), golden, atol=D * 3e-5)
        assert column <= k
    if name == "flow_cps":
        assert not found.path.logprob[:, -1].any()  # no density, no log-prob
