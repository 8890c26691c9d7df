"""The objective: closed forms in NumPy, and the gradients that they must have."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipelines import objective, sampler

ratios = st.floats(0.2, 3.0)
advantages = st.floats(-5, 5).filter(lambda a: a == 0 or abs(a) > 1e-6)
clips = st.floats(1e-3, 0.5)


def _tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_log_ratio_of_sums_and_of_means() -> None:
    current, old = _tensor(-100.0, 7.0), _tensor(-90.0, 6.0)
    assert objective.log_ratio(current, old, 72, "sum").tolist() == [-10.0, 1.0]
    np.testing.assert_allclose(objective.log_ratio(current, old, 72, "mean").numpy(), [-10 / 72, 1 / 72])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [
        (1.0, 2.0, -2.0),
        (1.1, 2.0, -2.2),
        (1.5, 2.0, -2.4),  # cut at 1.2: no reward for going further
        (0.5, 2.0, -1.0),  # the lower cut never shields a good sample
        (1.0, -2.0, 2.0),
        (1.5, -2.0, 3.0),  # nor the upper cut a bad one
        (0.5, -2.0, 1.4),  # cut at 0.7
        (1.5, 0.0, 0.0),
    ],
)
def test_surrogate_by_hand(ratio: float, advantage: float, loss: float) -> None:
    found = objective.clipped_surrogate(_tensor(ratio), _tensor(advantage), clip_low=0.3, clip_high=0.2)
    assert found.item() == pytest.approx(loss)


@given(ratio=ratios, advantage=advantages, low=clips, high=clips)
@settings(deadline=None)
def test_surrogate_is_the_pessimistic_bound(ratio: float, advantage: float, low: float, high: float) -> None:
    found = objective.clipped_surrogate(_tensor(ratio), _tensor(advantage), low, high).item()
    cut = min(max(ratio, 1 - low), 1 + high)
    assert found == pytest.approx(-min(ratio * advantage, cut * advantage))
    assert found >= -ratio * advantage - 1e-12


@given(ratio=ratios, advantage=advantages.filter(bool), low=clips, high=clips)
@settings(deadline=None, max_examples=300)
def test_clipped_is_where_the_gradient_vanishes(ratio: float, advantage: float, low: float, high: float) -> None:
    leaf = _tensor(ratio).requires_grad_()
    torch.autograd.backward(objective.clipped_surrogate(leaf, _tensor(advantage), low, high))
    assert leaf.grad is not None
    clipped = objective.is_clipped(_tensor(ratio), _tensor(advantage), low, high).item()
    assert clipped == (leaf.grad.item() == 0)
    if not clipped:
        assert leaf.grad.item() == pytest.approx(-advantage)


@pytest.mark.parametrize("edge", [1.01, 0.99])
def test_the_edge_itself_is_inside(edge: float) -> None:
    for advantage in (1.0, -1.0):
        leaf = _tensor(edge).requires_grad_()
        torch.autograd.backward(objective.clipped_surrogate(leaf, _tensor(advantage), 1 - 0.99, 1.01 - 1))
        assert leaf.grad is not None
        assert leaf.grad.item() == pytest.approx(-advantage)
        assert not objective.is_clipped(leaf, _tensor(advantage), 1 - 0.99, 1.01 - 1).item()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_at_ratio_1_the_gradient_is_the_policy_gradient(reduction: Literal["mean", "sum"]) -> None:
    """d loss / d v = -A d l / d v, with l the Gaussian log-density: A (velocity_coef / s^2) (x' - m), over D for a mean."""
    grid = sampler.transitions("flow_sde", np.linspace(1, 0, 6), 0.7)
    rng = torch.Generator().manual_seed(0)
    steps = torch.tensor([0, 1, 2, 3])
    latents, velocity, noise = (torch.randn((4, 2, 3, 3), generator=rng) for _ in range(3))
    coef, std = (values[steps.numpy()].reshape(-1, 1, 1, 1) for values in (grid.velocity_coef, grid.std))
    following = latents + sampler.offset(grid, steps, latents, velocity) + torch.tensor(std, dtype=torch.float32) * noise
    advantage = _tensor(1.5, -0.5, 0.0, 3.0)
    velocity.requires_grad_()
    current = sampler.log_density(grid, steps, latents, following, velocity)
    ratio = objective.log_ratio(current, current.detach(), 18, reduction).exp()
    torch.autograd.backward(objective.clipped_surrogate(ratio, advantage, 1e-2, 1e-2).sum())
    assert velocity.grad is not None
    score = coef * noise.double().numpy() / std  # x' - m = s eps
    golden = -advantage.numpy().reshape(-1, 1, 1, 1) * score / (18 if reduction == "mean" else 1)
    np.testing.assert_allclose(velocity.grad.numpy(), golden, rtol=1e-4, atol=1e-5)


@given(
    scale=st.floats(1e-3, 10),
    std=st.floats(0.01, 2),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=50)
def test_kl_of_two_gaussians(scale: float, std: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ours, theirs = rng.standard_normal((3, 2, 4)), scale * rng.standard_normal((3, 2, 4))
    assume(np.abs(ours - theirs).max() > 1e-3)
    # Integrated by Gauss-Hermite: E_p[log p - log q] is a polynomial of degree one in x, so three nodes are exact.
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    x = ours[..., None] + std * nodes
    log_ratio = ((x - theirs[..., None]) ** 2 - (x - ours[..., None]) ** 2) / (2 * std**2)
    golden = (log_ratio * weights).sum(-1) / math.sqrt(2 * math.pi)
    std64 = torch.full((3,), std, dtype=torch.float64)
    a, b = torch.tensor(ours), torch.tensor(theirs)
    np.testing.assert_allclose(objective.gaussian_kl(a, b, std64, "sum").numpy(), golden.sum((1, 2)), rtol=1e-8)
    np.testing.assert_allclose(objective.gaussian_kl(a, b, std64, "mean").numpy(), golden.mean((1, 2)), rtol=1e-8)
    assert not objective.gaussian_kl(a, a, std64, "sum").any()
