"""The stochastic sampler: transition means and standard deviations, log-densities, seeded noise, the denoising loop.

Shapes: B trajectories, T denoising steps, latents x_0 (noise) .. x_T (sample), each (*latent_shape) with D elements.

Every transition is Gaussian, x_{k+1} ~ N(m_k, s_k^2 I), and for every sampler its mean is affine in state and velocity:

    m_k = x_k + state_coef_k x_k + velocity_coef_k v(x_k)

The offset m_k - x_k is small at late steps, so densities are computed from (x_{k+1} - x_k) - offset: subtracting m_k itself
would lose the digits that matter where s_k is small. All of it runs in float32 whatever the model's dtype; coefficients and
sums over elements are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opgrpo_data.ids import derived_seed

Sampler = Literal["flow_sde", "flow_cps", "dance_sde", "wan_sde", "ode"]
Velocity = Callable[[Tensor, Tensor], Tensor]
"""(latents (N, *latent_shape) float32, sigmas (N,) float64) -> velocity (N, *latent_shape) float32."""

STORAGE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Transitions:
    """The T transitions of a sampler on one sigma grid. All arrays float64.

    sigmas: (T+1,) from 1 to 0. state_coef, velocity_coef: (T,). std: (T,) s_k; 0 means no density.
    """

    sigmas: NDArray[np.float64]
    state_coef: NDArray[np.float64]
    velocity_coef: NDArray[np.float64]
    std: NDArray[np.float64]

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.std)


def transitions(sampler: Sampler, sigmas: Sequence[float] | NDArray[np.float64], noise_level: float) -> Transitions:
    """The transitions of `sampler` on a decreasing grid that ends at 0 (docs/maths.md, section 1).

    flow_sde (arXiv 2505.05470): g = a sqrt(sigma / (1 - sigma)), sigma_1 in the denominator at sigma = 1.
    dance_sde (arXiv 2505.07818): g = a, constant.
    wan_sde (Flow-GRPO's code for Wan): g = a sigma_1 sigma; there a is 1.
    All three: m = x - d [v + g^2 / (2 sigma) (x + (1 - sigma) v)], s = g sqrt(d), d = sigma - sigma'.
    flow_cps (arXiv 2509.05952): m = (1 - sigma') x0_hat + sqrt(sigma'^2 - s^2) eps_hat, s = sigma' sin(a pi / 2).
    ode: m = x - d v, s = 0.
    Raises ValueError on a grid that does not decrease to 0.
    """
    grid = np.asarray(sigmas, np.float64)
    if len(grid) < 2 or not (np.diff(grid) < 0).all() or grid[-1] != 0 or grid[0] > 1:
        raise ValueError(f"sigmas must decrease from at most 1 to 0, got {grid.tolist()}")
    sigma, sigma_next = grid[:-1], grid[1:]
    step = sigma - sigma_next
    if sampler == "flow_cps":
        std = sigma_next * math.sin(noise_level * math.pi / 2)
        kept = np.sqrt(sigma_next**2 - std**2)
        return Transitions(grid, kept - sigma_next, kept * (1 - sigma) - sigma * (1 - sigma_next), std)
    diffusion_coef = _diffusion_coef(sampler, grid, noise_level)
    correction = diffusion_coef**2 / (2 * sigma)
    return Transitions(grid, -step * correction, -step * (1 + correction * (1 - sigma)), diffusion_coef * np.sqrt(step))


def _diffusion_coef(sampler: Sampler, grid: NDArray[np.float64], noise_level: float) -> NDArray[np.float64]:
    sigma = grid[:-1]
    if sampler == "ode":
        return np.zeros_like(sigma)
    if sampler == "dance_sde":
        return np.full_like(sigma, noise_level)
    if sampler == "wan_sde":
        return np.asarray(noise_level * grid[1] * sigma)
    denominator = 1 - np.where(sigma == 1, grid[1], sigma)
    return np.asarray(noise_level * np.sqrt(sigma / denominator))


def noise(seed: int, step: int, shape: Sequence[int]) -> Tensor:
    """eps of one trajectory at one step, float32: a function of (seed, step), the same on any machine, batch or device.

    Step -1 is the initial noise x_0.
    """
    # Philox takes all bits of the seed; torch's CPU generator drops the upper 32, and a million draws would collide.
    generator = np.random.Generator(np.random.Philox(key=derived_seed(seed, step)))
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))


def batch_noise(seeds: Sequence[int], step: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """`noise` of B trajectories, (B, *shape)."""
    return torch.stack([noise(seed, step, shape) for seed in seeds]).to(device)


def store_round(latents: Tensor, dtype: str) -> Tensor:
    """Round to the storage dtype and back to float32: what the store will hold is what the model sees."""
    return latents.to(STORAGE_DTYPES[dtype]).to(torch.float32)


def offset(grid: Transitions, steps: Tensor, latents: Tensor, velocity: Tensor) -> Tensor:
    """m_k - x_k for N (latent, step) pairs: steps (N,) int64; latents, velocity and result (N, *latent_shape) float32."""
    state_coef = _per_pair(grid.state_coef, steps, latents)
    velocity_coef = _per_pair(grid.velocity_coef, steps, latents)
    return state_coef * latents + velocity_coef * velocity.to(torch.float32)


def log_density(grid: Transitions, steps: Tensor, latents: Tensor, next_latents: Tensor, velocity: Tensor) -> Tensor:
    """log N(x_{k+1}; m_k, s_k^2 I) of N transitions, summed over the D elements: (N,) float64, differentiable.

    Every step must have a density (s_k > 0). The true Gaussian log-density, constant included.
    """
    std = torch.as_tensor(grid.std, device=latents.device)[steps]
    residual = (next_latents - latents) - offset(grid, steps, latents, velocity)
    squares = residual.flatten(1).to(torch.float64).square().sum(1)
    elements = residual[0].numel()
    return -squares / (2 * std**2) - elements * (torch.log(std) + 0.5 * math.log(2 * math.pi))


def path_variance(
    grid: Transitions, steps: Tensor, latents: Tensor, next_latents: Tensor, velocity: Tensor, drawn: Tensor
) -> Tensor:
    """lambda_k = |m_old - m_b|^2 / s_k^2 of N transitions, (N,) float64 (docs/maths.md, section 5).

    `drawn` (N, *latent_shape) is the noise that drew x_{k+1}: m_b = x_{k+1} - s_k eps_k needs no model. Rounding of stored
    latents adds about D (3e-4 |x| / s)^2 in float16 and nothing that matters in float32.
    """
    std = torch.as_tensor(grid.std, device=latents.device)[steps]
    behaviour = (next_latents - latents) - std.to(torch.float32).view(-1, *[1] * (latents.ndim - 1)) * drawn
    difference = offset(grid, steps, latents, velocity) - behaviour
    return difference.flatten(1).to(torch.float64).square().sum(1) / std**2


def _per_pair(values: NDArray[np.float64], steps: Tensor, like: Tensor) -> Tensor:
    chosen = torch.as_tensor(values, device=like.device)[steps].to(torch.float32)
    return chosen.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class Path:
    """Consecutive latents of B trajectories. latents: (B, n+1, *latent_shape) float32, already rounded to the storage
    dtype; logprob: (B, n) float64 under the policy that drew them, 0 where a step has no density."""

    latents: Tensor
    logprob: Tensor


@torch.no_grad()
def draw(velocity: Velocity, start: Tensor, grid: Transitions, seeds: Sequence[int], dtype: str, first_step: int = 0) -> Path:
    """Denoise from x_{first_step} to x_T.

    start: (B, *latent_shape) float32, already rounded to the storage dtype `dtype`. The state is rounded INSIDE the loop:
    the stored x_{k+1} is the one that the model saw next and that the log-prob was evaluated on.
    """
    latents, states, logprobs = start, [start], []
    for k in range(first_step, grid.num_steps):
        steps = torch.full((len(start),), k, device=start.device)
        predicted = velocity(latents, torch.full((len(start),), grid.sigmas[k], dtype=torch.float64, device=start.device))
        mean = latents + offset(grid, steps, latents, predicted)
        if grid.std[k] > 0:
            mean = mean + float(grid.std[k]) * batch_noise(seeds, k, start.shape[1:], start.device)
        following = store_round(mean, dtype)
        logprobs.append(
            log_density(grid, steps, latents, following, predicted)
            if grid.std[k] > 0
            else torch.zeros(len(start), dtype=torch.float64, device=start.device)
        )
        latents = following
        states.append(latents)
    drawn = torch.stack(logprobs, 1) if logprobs else torch.zeros(len(start), 0, dtype=torch.float64, device=start.device)
    return Path(torch.stack(states, 1), drawn)
