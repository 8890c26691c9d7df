"""The options of the objective: RatioNorm, the surrogate's gradient, divergences, and the forward-process loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from pipelines import objective

SHAPE = (2, 3, 2)
D = 12


def _tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _random(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def _gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    leaf = at.clone().requires_grad_()
    torch.autograd.backward(loss(leaf).sum())
    assert leaf.grad is not None
    return leaf.grad


# -- RatioNorm -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variance", "std"), [(0.01, 0.05), (0.5, 0.3), (4.0, 0.9)])
def test_normalised_log_ratio_has_mean_0_and_std_s_sqrt_lambda(variance: float, std: float) -> None:
    """log r = log p_theta - log p_old of x ~ N(m_old, s^2), drawn here: its normalised form is N(0, s^2 lambda)."""
    count, rng = 20_000, np.random.default_rng(7)
    shift = rng.standard_normal(D)
    shift *= std * math.sqrt(variance) / np.linalg.norm(shift)  # m_theta - m_old, with |shift|^2 / s^2 = lambda
    x = std * rng.standard_normal((count, D))
    log_ratio = torch.from_numpy((stats.norm.logpdf(x, shift, std) - stats.norm.logpdf(x, 0, std)).sum(1))
    stds = torch.full((count,), std, dtype=torch.float64)
    ours, theirs = torch.from_numpy(np.tile(shift, (count, 1))), torch.zeros(count, D, dtype=torch.float64)
    divergence = objective.gaussian_kl(ours, theirs, stds, "sum")
    found = objective.normalised_log_ratio(log_ratio, divergence, stds).numpy()
    spread = std * math.sqrt(variance)
    assert abs(found.mean()) < 4 * spread / math.sqrt(count)
    assert found.std() == pytest.approx(spread, rel=0.03)
    assert stats.kstest(found[:4000] / spread, "norm").pvalue > 0.01


def test_normalised_log_ratio_by_hand() -> None:
    found = objective.normalised_log_ratio(_tensor(-0.5, 1.0), _tensor(0.5, 0.25), _tensor(0.1, 2.0))
    np.testing.assert_allclose(found.numpy(), [0.0, 2.5])


def test_normalised_log_ratio_is_zero_with_gradient_s_score_where_nothing_moved() -> None:
    """At theta = old the divergence has no gradient: d/dm is that of log r, times s."""
    following, std = _random(0, 1, *SHAPE), _tensor(0.4)
    old = torch.zeros(1, *SHAPE, dtype=torch.float64)

    def loss(offset: Tensor) -> Tensor:
        log_ratio = ((following - old).square() - (following - offset).square()).flatten(1).sum(1) / (2 * std**2)
        return objective.normalised_log_ratio(log_ratio, objective.gaussian_kl(offset, old, std, "sum"), std)

    assert loss(old).item() == 0.0
    np.testing.assert_allclose(_gradient(loss, old).numpy(), (following / 0.4).numpy(), rtol=1e-12)


# -- clipped surrogate ---------------------------------------------------------------------------------------------------


@given(
    advantages=st.lists(st.floats(-5, 5), min_size=1, max_size=6),
    std=st.floats(0.05, 2),
    clip=st.floats(1e-4, 0.5),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=40)
def test_at_ratio_1_the_gradient_is_the_plain_policy_gradient(
    advantages: list[float], std: float, clip: float, seed: int
) -> None:
    """-A grad log p(x; m) = -A (x - m) / s^2, whatever the clip."""
    mean, x = _random(seed, len(advantages), D), _random(seed + 1, len(advantages), D)
    advantage = _tensor(*advantages)

    def loss(theta: Tensor) -> Tensor:
        ours, old = ((-(x - m).square() / (2 * std**2) - math.log(std)).sum(1) for m in (theta, mean))
        ratio = objective.log_ratio(ours, old, D, "sum").exp()
        return objective.clipped_surrogate(ratio, advantage, clip, clip)

    golden = -advantage[:, None] * (x - mean) / std**2
    np.testing.assert_allclose(_gradient(loss, mean).numpy(), golden.numpy(), rtol=1e-9, atol=1e-12)
    assert loss(mean).tolist() == pytest.approx([-value for value in advantages])


# -- divergences ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@given(seed=st.integers(0, 1000), stds=st.lists(st.floats(0.01, 3), min_size=1, max_size=4))
@settings(deadline=None, max_examples=25)
def test_gaussian_kl_is_torchs(reduction: Literal["sum", "mean"], seed: int, stds: list[float]) -> None:
    ours, theirs, std = _random(seed, len(stds), *SHAPE), _random(seed + 1, len(stds), *SHAPE), _tensor(*stds)
    wide = std.view(-1, 1, 1, 1).expand(-1, *SHAPE)
    each = torch.distributions.kl_divergence(torch.distributions.Normal(ours, wide), torch.distributions.Normal(theirs, wide))
    golden = each.flatten(1).sum(1) if reduction == "sum" else each.flatten(1).mean(1)
    found = objective.gaussian_kl(ours, theirs, std, reduction)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), golden.numpy(), rtol=1e-9)
    np.testing.assert_array_equal(objective.gaussian_kl(theirs, ours, std, reduction).numpy(), found.numpy())


# -- the forward process -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("advantage", "scale", "expected"),
    [(0.0, 2.0, 0.5), (1.0, 2.0, 0.75), (-1.0, 2.0, 0.25), (2.0, 2.0, 1.0), (9.0, 2.0, 1.0), (-9.0, 2.0, 0.0), (0.3, 0.5, 0.8)],
)
def test_optimality_by_hand(advantage: float, scale: float, expected: float) -> None:
    assert objective.optimality(_tensor(advantage), scale).item() == pytest.approx(expected, rel=1e-15)


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=8), st.floats(0.01, 10))
@settings(deadline=None, max_examples=50)
def test_optimality_is_a_probability_that_grows_with_the_advantage(advantages: list[float], scale: float) -> None:
    found = objective.optimality(_tensor(*sorted(advantages)), scale).numpy()
    np.testing.assert_allclose(found, np.clip(np.sort(advantages) / scale / 2 + 0.5, 0, 1), atol=1e-15)
    assert (np.diff(found) >= 0).all()
    mirrored = objective.optimality(-_tensor(*sorted(advantages)), scale).numpy()
    np.testing.assert_allclose(found + mirrored, 1.0, rtol=1e-15)


def _fields(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """current, old, target (count, *SHAPE) and optimal (count,)."""
    current, old, target = (_random(seed + i, count, *SHAPE) for i in range(3))
    return current, old, target, torch.from_numpy(np.random.default_rng(seed).uniform(size=count))


@given(seed=st.integers(0, 1000), count=st.integers(1, 4), strength=st.floats(0.05, 5))
@settings(deadline=None, max_examples=40)
def test_forward_contrast_is_numpys(seed: int, count: int, strength: float) -> None:
    current, old, target, optimal = _fields(seed, count)
    golden = []
    for v, b, t, r in zip(*(x.numpy().reshape(count, -1) for x in (current, old, target)), optimal.numpy(), strict=True):
        positive = (1 - strength) * b + strength * v
        negative = (1 + strength) * b - strength * v
        losses = [sum((x - y) ** 2 for x, y in zip(w, t, strict=True)) / D for w in (positive, negative)]
        golden.append((r * losses[0] + (1 - r) * losses[1]) / strength)
    found = objective.forward_contrast(current, old, target, optimal, strength)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), golden, rtol=1e-9)


@given(seed=st.integers(0, 1000), strength=st.floats(0.01, 10))
@settings(deadline=None, max_examples=40)
def test_gradient_where_nothing_moved(seed: int, strength: float) -> None:
    """d/dv at v = old of (r |old + b (v - old) - t|^2 + (1 - r) |old - b (v - old) - t|^2) / (b D)
    = (2 b r (old - t) - 2 b (1 - r) (old - t)) / (b D) = 2 (2r - 1) (old - t) / D: b has gone."""
    _, old, target, optimal = _fields(seed, 3)
    found = _gradient(lambda v: objective.forward_contrast(v, old, target, optimal, strength), old)
    golden = 2 * (2 * optimal - 1).view(-1, 1, 1, 1) * (old - target) / D
    np.testing.assert_allclose(found.numpy(), golden.numpy(), rtol=1e-6, atol=1e-9)


def test_a_sample_of_no_advantage_has_no_gradient_and_a_bad_one_the_opposite_of_a_good_one() -> None:
    _, old, target, _ = _fields(0, 1)

    def gradient(advantage: float) -> Tensor:
        optimal = objective.optimality(_tensor(advantage), 2.0)
        return _gradient(lambda v: objective.forward_contrast(v, old, target, optimal, 0.7), old)

    assert gradient(0.0).abs().max() < 1e-15
    np.testing.assert_allclose(gradient(1.5).numpy(), -gradient(-1.5).numpy(), rtol=1e-12)
    # A good sample draws the velocity towards its own: downhill is the direction of target - old.
    assert ((-gradient(1.5)) * (target - old)).sum() > 0


@given(seed=st.integers(0, 1000), optimal=st.floats(0, 1), strength=st.floats(0.1, 3))
@settings(deadline=None, max_examples=30)
def test_minimum_of_the_forward_contrast(seed: int, optimal: float, strength: float) -> None:
    """The loss is convex in v, with its minimum at old + (2r - 1)(target - old) / beta (set the derivative to 0)."""
    current, old, target, _ = _fields(seed, 1)
    r = _tensor(optimal)
    best = old + (2 * optimal - 1) * (target - old) / strength
    least = objective.forward_contrast(best, old, target, r, strength).item()
    assert least <= objective.forward_contrast(current, old, target, r, strength).item() + 1e-12
    assert _gradient(lambda v: objective.forward_contrast(v, old, target, r, strength), best).abs().max() < 1e-9


def test_certainly_good_samples_of_strength_1_are_plain_flow_matching() -> None:
    current, old, target, _ = _fields(3, 2)
    found = objective.forward_contrast(current, old, target, _tensor(1.0, 1.0), 1.0)
    np.testing.assert_allclose(found.numpy(), (current - target).square().flatten(1).mean(1).numpy(), rtol=1e-12)
