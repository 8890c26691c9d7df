"""Importance weights and their law, against closed forms and Monte Carlo: log w ~ N(-L/2, L) under the behaviour policy."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from opgrpo_data.importance import damped, log_weight, longest_prefix, measured_ess, predicted_ess

SAMPLES = 400_000

# Multiples of 1/64: their sums are exact in float64, in any order.
VARIANCES = st.lists(st.integers(0, 128).map(lambda n: n / 64), max_size=10)


def log_weights(variance: float, seed: int) -> NDArray[np.float64]:
    """Draws of log w from its law."""
    rng = np.random.default_rng(seed)
    return -variance / 2 + math.sqrt(variance) * rng.standard_normal(SAMPLES)


# -- effective sample sizes ----------------------------------------------------------------------------------------------


def test_predicted_ess_by_hand() -> None:
    assert predicted_ess([]) == 1.0
    assert predicted_ess([0.0, 0.0]) == 1.0
    assert predicted_ess([0.25, 0.5, 0.25]) == pytest.approx(0.36787944117144233, rel=1e-15)
    assert predicted_ess([math.log(2)]) == pytest.approx(0.5, rel=1e-15)
    assert predicted_ess([1e6]) == 0.0  # underflows; it does not fail


@pytest.mark.parametrize("variance", [0.0, 0.05, 0.3, 1.0])
def test_predicted_ess_is_what_weights_of_that_law_leave(variance: float) -> None:
    """E[w]^2 / E[w^2]; with 400,000 draws the estimate is within 2 % for variances up to 1."""
    weights = np.exp(log_weights(variance, 1))
    assert weights.mean() == pytest.approx(1.0, abs=0.01)
    assert predicted_ess([variance / 4] * 4) == pytest.approx(weights.mean() ** 2 / np.square(weights).mean(), rel=0.02)
    assert predicted_ess([variance]) == pytest.approx(measured_ess(weights), rel=0.02)


@given(VARIANCES, st.floats(0, 5))
@settings(deadline=None, max_examples=50)
def test_more_variance_never_predicts_more(variances: list[float], further: float) -> None:
    assert 0 < predicted_ess([*variances, further]) <= predicted_ess(variances) <= 1


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30), st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=100)
def test_measured_ess_is_bounded_and_does_not_depend_on_the_unit(values: list[float], unit: float) -> None:
    """By Cauchy and Schwarz it is at most 1, and at least 1/n, when all weight lies on one."""
    found = measured_ess(np.array(values))
    assert 1 / len(values) - 1e-12 <= found <= 1 + 1e-12
    assert measured_ess(unit * np.array(values)) == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], 0.0),
        ([0.0, 0.0], 0.0),
        ([3.0], 1.0),
        ([0.7] * 5, 1.0),
        ([2.0, 0.0, 0.0, 0.0], 0.25),
        ([1.0, 1.0, 0.0], 2 / 3),
        ([1.0, 3.0], 16 / 20),  # (1 + 3)^2 / (2 (1 + 9))
    ],
)
def test_measured_ess_by_hand(values: list[float], expected: float) -> None:
    assert measured_ess(np.array(values, np.float64)) == pytest.approx(expected, rel=1e-15)


# -- how much of a prefix is trusted -------------------------------------------------------------------------------------


@given(VARIANCES, st.floats(0.001, 0.999))
@settings(deadline=None, max_examples=200)
def test_longest_prefix_is_the_largest_above_the_floor(variances: list[float], floor: float) -> None:
    """Brute force over every K: the sums are exact, compared as logarithms."""
    sums = [sum((Fraction(v) for v in variances[:k]), Fraction(0)) for k in range(len(variances) + 1)]
    expected = max(k for k, total in enumerate(sums) if math.exp(-float(total)) >= floor)
    found = longest_prefix(variances, floor)
    assert found == expected
    if found < len(variances):  # one step more would be too many
        assert float(sums[found + 1]) > -math.log(floor) - 1e-9


@pytest.mark.parametrize(
    ("variances", "floor", "expected"),
    [
        ([], 0.5, 0),
        ([0.3, 0.3, 0.3], 0.5, 2),  # exp(-0.6) = 0.549, exp(-0.9) = 0.407
        ([0.7, 0.0], 0.5, 0),  # exp(-0.7) = 0.497
        ([0.0, 0.0, 0.0], 0.999, 3),
        ([math.inf], 0.5, 0),
        ([0.1, math.inf, 0.0], 0.5, 1),
        ([1e9, 1e9], 0.0, 2),  # a floor of 0 trusts everything
        ([0.0, 5.0, 0.0], 0.5, 1),  # a prefix ends at the first step too many
    ],
)
def test_longest_prefix_by_hand(variances: list[float], floor: float, expected: int) -> None:
    assert longest_prefix(variances, floor) == expected


@given(VARIANCES, st.floats(0.01, 0.99), st.floats(0.01, 0.99))
@settings(deadline=None, max_examples=50)
def test_a_lower_floor_never_shortens_a_prefix(variances: list[float], one: float, other: float) -> None:
    assert longest_prefix(variances, min(one, other)) >= longest_prefix(variances, max(one, other))


# -- log-weights and damping ---------------------------------------------------------------------------------------------


def test_log_weight_keeps_the_digits_of_a_small_difference() -> None:
    """Sums of many large densities: naive addition would lose the third digit here."""
    behaviour = [1e15, 1.25, -1e15]
    assert log_weight([1e15, 1.5, -1e15], behaviour) == 0.25
    assert log_weight([], []) == 0.0
    assert log_weight([-1.0, -2.0], [-1.25, -1.5]) == -0.25


@given(st.floats(-20, 20), st.floats(0, 3), st.floats(0, 3))
@settings(deadline=None, max_examples=100)
def test_damping_is_affine_and_leaves_what_is_within_the_budget(log_w: float, variance: float, budget: float) -> None:
    """a log w + a (1 - a) L / 2, with a^2 L = budget."""
    found = damped(log_w, variance, budget)
    if variance <= budget:
        assert found == log_w
    else:
        scale = math.sqrt(budget / variance)
        assert found == pytest.approx(scale * log_w + (math.sqrt(budget * variance) - budget) / 2, rel=1e-9, abs=1e-9)


@given(st.floats(0.01, 30), st.floats(0, 30))
@settings(deadline=None, max_examples=100)
def test_damped_weights_have_mean_1_and_the_budget_as_variance_in_closed_form(variance: float, budget: float) -> None:
    """Of an affine map log w' = c + a log w of N(-L/2, L): variance a^2 L, and E[w'] = exp(c - a L/2 + a^2 L/2)."""
    c = damped(0.0, variance, budget)
    a = damped(1.0, variance, budget) - c
    assert a**2 * variance == pytest.approx(min(variance, budget), rel=1e-6, abs=1e-9)
    assert c - a * variance / 2 + a**2 * variance / 2 == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(("variance", "budget"), [(4.0, 0.5), (1.0, 0.25), (20.0, 1.0), (0.3, 0.3)])
def test_damped_weights_by_monte_carlo(variance: float, budget: float) -> None:
    found = np.array([damped(value, variance, budget) for value in log_weights(variance, 2)[:100_000].tolist()])
    assert found.var() == pytest.approx(budget, rel=0.02)
    assert np.exp(found).mean() == pytest.approx(1.0, abs=5 * math.sqrt(math.expm1(budget) / len(found)))
    assert measured_ess(np.exp(found)) == pytest.approx(predicted_ess([budget]), rel=0.05)


@given(st.floats(-50, 50), st.floats(0.001, 50))
@settings(deadline=None, max_examples=50)
def test_a_budget_of_0_gives_weight_1(log_w: float, variance: float) -> None:
    assert math.exp(damped(log_w, variance, 0.0)) == 1.0


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(0.01, 5), st.floats(0.001, 5))
@settings(deadline=None, max_examples=50)
def test_damping_keeps_the_order_of_weights(one: float, other: float, variance: float, budget: float) -> None:
    low, high = sorted((one, other))
    assert damped(low, variance, budget) <= damped(high, variance, budget)
