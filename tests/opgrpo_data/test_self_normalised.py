"""The self-normalised estimate of an expectation under another policy: by hand, and on a toy whose answer is closed-form."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from opgrpo_data.importance import predicted_ess, self_normalised

STEPS, STD, START = 4, 0.5, 0.3
Toy = tuple[NDArray[np.float64], NDArray[np.float64]]


def toy(count: int, shift: float, seed: int) -> Toy:
    """Paths x_{k+1} ~ N(0.8 x_k, s^2) of four steps from x_0 = 0.3, and the log-weights of a policy whose means lie `shift`
    higher at every step: last states (count,) and log-weights (count,), in float64."""
    rng = np.random.default_rng(seed)
    x, log_w = np.full(count, START), np.zeros(count)
    for _ in range(STEPS):
        eps = rng.standard_normal(count)
        following = 0.8 * x + STD * eps
        # log N(x'; 0.8 x + shift, s^2) - log N(x'; 0.8 x, s^2)
        log_w += (eps**2 - ((following - 0.8 * x - shift) / STD) ** 2) / 2
        x = following
    return x, log_w


def shifted_mean(shift: float) -> float:
    """E[x_T] of the shifted policy: the recursion of its means."""
    mean = START
    for _ in range(STEPS):
        mean = 0.8 * mean + shift
    return mean


def names(count: int, each: int = 1) -> list[str]:
    return [f"g{i // each:06d}" for i in range(count)]


@pytest.mark.parametrize("shift", [-0.15, 0.1, 0.2])
def test_the_linear_gaussian_answer(shift: float) -> None:
    """E[x_T] under the policy from paths of the other; the ESS of log-normal weights is exp(-Lambda)."""
    values, log_w = toy(200_000, shift, 0)
    found = self_normalised(log_w, values, names(len(values)))
    assert abs(found.mean - shifted_mean(shift)) < 4 * found.standard_error
    assert abs(values.mean() - shifted_mean(shift)) > 20 * found.standard_error  # the unweighted mean is far off
    variance = (shift / STD) ** 2
    assert found.ess / len(values) == pytest.approx(predicted_ess([variance] * STEPS), rel=0.05)
    assert found.mean_weight == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("each", [1, 5])
def test_the_standard_error_is_the_spread_of_repetitions(each: int) -> None:
    """Clusters of five equal samples: a fifth of the information, which an error over samples would not notice."""
    means, errors = [], []
    for seed in range(300):
        values, log_w = (np.repeat(part, each) for part in toy(400, 0.15, seed))
        found = self_normalised(log_w, values, names(len(values), each))
        means.append(found.mean)
        errors.append(found.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.12)


def test_equal_weights_give_the_plain_mean_and_its_error() -> None:
    values = np.array([0.0, 1.0, 1.0, 5.0])
    found = self_normalised(np.zeros(4), values, names(4))
    assert (found.mean, found.ess, found.mean_weight, found.max_share) == (1.75, 4.0, 1.0, 0.25)
    assert found.standard_error == pytest.approx(values.std(ddof=1) / 2, rel=1e-12)


def test_by_hand() -> None:
    """Weights 1, 2, 1 of 0, 1, 4 in two clusters: mean 6/4; cluster sums (-1.5 - 1)/4 and 2.5/4."""
    found = self_normalised(np.log([1.0, 2.0, 1.0]), np.array([0.0, 1.0, 4.0]), ["a", "a", "b"])
    assert found.mean == pytest.approx(1.5, rel=1e-12)
    assert found.standard_error == pytest.approx(math.sqrt(2 * 2 * (2.5 / 4) ** 2), rel=1e-12)
    assert found.ess == pytest.approx(16 / 6, rel=1e-12)
    assert found.mean_weight == pytest.approx(4 / 3, rel=1e-12)
    assert found.max_share == pytest.approx(0.5, rel=1e-12)


def test_one_cluster_has_no_known_error() -> None:
    assert self_normalised(np.zeros(2), np.array([0.0, 1.0]), ["a", "a"]).standard_error == math.inf


@given(st.floats(-3000, 3000), st.lists(st.tuples(st.floats(-5, 5), st.floats(-2, 2)), min_size=2, max_size=8))
@settings(deadline=None, max_examples=100)
def test_a_constant_in_all_log_weights_changes_nothing(constant: float, samples: list[tuple[float, float]]) -> None:
    """Densities of thousands of elements overflow as weights; their ratios do not."""
    log_w, values = (np.array(column) for column in zip(*samples, strict=True))
    one, other = (self_normalised(part, values, names(len(values))) for part in (log_w, log_w + constant))
    for field in ("mean", "standard_error", "ess", "max_share"):
        assert getattr(other, field) == pytest.approx(getattr(one, field), rel=1e-6, abs=1e-9)
    assert values.min() - 1e-9 <= one.mean <= values.max() + 1e-9
    assert 1 - 1e-9 <= one.ess <= len(values) + 1e-9
