"""The OP-GRPO objective as pure functions of tensors (docs/maths.md, section 4; arXiv 2604.04142, arXiv 2505.05470).

N is the number of (trajectory, denoising step) pairs in a forward pass.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def log_ratio(current: Tensor, old: Tensor, num_elements: int, reduction: Literal["mean", "sum"]) -> Tensor:
    """l_theta - l_old per pair, (N,) float64: of the log-densities summed over D elements, or of their mean over D."""
    difference = current - old
    return difference / num_elements if reduction == "mean" else difference


def normalised_log_ratio(log_ratio: Tensor, divergence: Tensor, std: Tensor) -> Tensor:
    """RatioNorm (GRPO-Guard, arXiv 2510.22319): s (log r + |m_theta - m_old|^2 / (2 s^2)) per pair, (N,) float64.

    Under the old policy log r ~ N(-lambda/2, lambda). The divergence of the SAME pair (`gaussian_kl` of current and old
    policy, reduced like the ratio) takes away the bias -lambda/2, and s the growth of the spread at late steps.
    """
    return std * (log_ratio + divergence)


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) per pair, (N,): a loss, smaller is better (PPO, Eq. 7)."""
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def is_clipped(ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Where the clip removes the gradient, (N,) bool: the ratio has left the range in the direction A pushes it."""
    return ((ratio > 1 + clip_high) & (advantage > 0)) | ((ratio < 1 - clip_low) & (advantage < 0))


def gaussian_kl(offset: Tensor, reference_offset: Tensor, std: Tensor, reduction: Literal["mean", "sum"]) -> Tensor:
    """KL(N(m, s^2 I) || N(m_ref, s^2 I)) = |m - m_ref|^2 / (2 s^2) per pair, (N,) float64, reduced like the log-ratio.

    offset, reference_offset: (N, *latent_shape), m - x of either policy. std: (N,) float64.
    """
    squares = (offset - reference_offset).flatten(1).to(torch.float64).square()
    reduced = squares.mean(1) if reduction == "mean" else squares.sum(1)
    return reduced / (2 * std**2)


def optimality(advantage: Tensor, scale: float) -> Tensor:
    """Probability that a sample counts as good, (N,) in [0, 1]: (1 + clip(A / scale, -1, 1)) / 2 (arXiv 2509.16117)."""
    return (1 + (advantage / scale).clamp(-1, 1)) / 2


def forward_contrast(current: Tensor, old: Tensor, target: Tensor, optimal: Tensor, strength: float) -> Tensor:
    """Forward-process loss of N noised samples, (N,) float64 (DiffusionNFT, arXiv 2509.16117).

    r |v+ - v|^2 + (1 - r) |v- - v|^2, means over elements, with the implicit positive and negative policies
    v+ = v_old + beta (v_theta - v_old), v- = v_old - beta (v_theta - v_old), divided by beta so that the gradient at
    v_theta = v_old does not depend on it.
    current, old: velocities (N, *latent_shape) at the noised samples; target: eps - x. optimal: r, (N,).
    """
    step = strength * (current - old)
    positive, negative = ((old + sign * step - target).flatten(1).to(torch.float64).square().mean(1) for sign in (1, -1))
    return (optimal * positive + (1 - optimal) * negative) / strength
